"""What was timed once on this machine and is kept beside JAX's compilation cache.

Timing is noise: two starts in a row chose other forms for three of the 135M's five groups of matrices, and so compiled
other programs, with other last bits. What the first start chose, the next ones take, until it is forgotten.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from smoljax import atomic, runtime

VERSION = 1  # of what is kept; a folder of another one is not looked at

log = logging.getLogger("smoljax")


def surroundings() -> dict:
    """What decides how fast a form is beside the matrices: the processor, its cores for this process, XLA."""
    import jax

    info, limit = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/cpu.max")
    lines = info.read_text().splitlines() if info.exists() else []
    return {
        "processor": runtime.processor(),
        "model": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "limit": limit.read_text().strip() if limit.exists() else "",
        "devices": jax.local_device_count(),  # they share the threads
        "jaxlib": version("jaxlib"),
        "environment": {name: os.environ.get(name) for name in ("XLA_FLAGS", "NPROC")},
    }


def forget():
    """Measure anew from now on."""
    if (folder := runtime.cache_folder()) is not None:
        shutil.rmtree(folder / f"forms-{VERSION}", ignore_errors=True)


def kept(what: dict, measure: Callable[[], dict], fits: Callable[[dict], bool] = bool) -> dict:
    """What `measure` gave at the first start that asked for this, on this machine; of several at once, one's.

    Args:
      what: it is for, beside the surroundings; JSON.
      fits: whether what a file holds can be what `measure` gave; else it is measured anew.
    """
    what = surroundings() | what
    folder = runtime.cache_folder()
    if folder is None:
        log.warning(
            "JAX_COMPILATION_CACHE_DIR is empty, so the forms of matrices are not kept: each start measures them, and "
            "two starts may differ in the last bits; leave it unset, or name a folder"
        )
        return measure()
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"forms-{VERSION}" / f"{name}.json"
    if (found := read(file, fits)) is not None:
        return found
    measured = measure()
    try:
        write(file, {"for": what, "measured": measured})
    except OSError as e:
        log.warning(
            f"{file} cannot be written ({e.strerror}), so the next start measures again, and may choose otherwise"
        )
        return measured
    return read(file, fits) or measured


def read(file: Path, fits: Callable[[dict], bool]) -> dict | None:
    try:
        measured = json.loads(file.read_text())["measured"]
        if not isinstance(measured, dict) or not fits(measured):
            raise ValueError(measured)
        return measured
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as e:
        log.warning(f"{file} cannot be used ({type(e).__name__}); it is measured anew")
        with contextlib.suppress(OSError):  # that it cannot be written is said then
            file.unlink(missing_ok=True)
        return None


def write(file: Path, content: dict):
    """Whole or not at all; another process's that was first stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = file.with_name(f"{file.name}.{os.getpid()}")
    atomic.write_json(mine, content)
    try:
        os.link(mine, file)  # fails where it is there
    except FileExistsError:
        pass
    finally:
        mine.unlink(missing_ok=True)
