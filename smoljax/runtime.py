"""What happens once, before a program's first computation."""

import functools
import hashlib
import os
import platform
import signal
import sys
from pathlib import Path

from smoljax.errors import UsageError


def start(shortest: float = 0.5):
    """Turn the persistent compilation cache on; JAX_COMPILATION_CACHE_DIR moves it, or turns it off when empty.

    A restart then compiles nothing: the 135M train step takes 1.5 to 10 s to compile on 2 CPU cores.

    Args:
      shortest: seconds of compiling from which a program is kept; 0 for inference, whose many small ones add up.
    """
    import jax

    hear_interrupts()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def cache_folder() -> Path | None:
    """Where compiled programs lie, and what else is found out about this processor; None where that is turned off."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
        return Path(folder) if folder else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "smoljax" / "jax" / processor()


def set_flags(flags: str | None) -> str:
    """A run's own XLA flags, before JAX starts; of two the last holds. Returns all that are in effect, for its header.

    None is set that a user did not ask for: docs/benchmarks has those that were tried and did not pay. Of a GPU JAX
    takes 92% instead of its 75%, unless the environment says how much: the 1.7B with 16k tokens needs 64 GB of 80.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    both = f"{os.environ.get('XLA_FLAGS', '')} {flags or ''}".strip()
    if flags:
        bridge = sys.modules.get("jax._src.xla_bridge")
        if bridge and bridge.backends_are_initialized():
            raise UsageError(f"xla_flags = {flags!r} comes too late: JAX is at work already; set XLA_FLAGS instead")
        os.environ["XLA_FLAGS"] = both
    return both


def hear_interrupts():
    """Ctrl-C is an exception from here on. Before, in the middle of imports, it ends the process (__main__.py)."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # a shell's background job ignores it, and goes on doing so
        signal.signal(signal.SIGINT, signal.default_int_handler)


@functools.cache
def processor() -> str:
    """What XLA's compiled CPU code depends on: loaded on another processor it warns at length, or crashes."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))] or [platform.processor()]
    return platform.machine() + "-" + hashlib.sha256(features[0].encode()).hexdigest()[:8]
