"""What happens once, before a program's first computation."""

import hashlib
import os
import platform
import signal
from pathlib import Path


def start():
    """Turn the persistent compilation cache on; JAX_COMPILATION_CACHE_DIR moves it, or turns it off when empty.

    A restart then compiles nothing: the 135M train step takes 1.5 to 10 s to compile on 2 CPU cores.
    """
    import jax

    hear_interrupts()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "smoljax" / "jax" / processor()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def hear_interrupts():
    """Ctrl-C is an exception from here on. Before, in the middle of imports, it ends the process (__main__.py)."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # a shell's background job ignores it, and goes on doing so
        signal.signal(signal.SIGINT, signal.default_int_handler)


def processor() -> str:
    """What XLA's compiled CPU code depends on: loaded on another processor it warns at length, or crashes."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))] or [platform.processor()]
    return platform.machine() + "-" + hashlib.sha256(features[0].encode()).hexdigest()[:8]
