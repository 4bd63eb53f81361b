"""A file or a folder is whole or absent: written under another name, then renamed. And one writer at a time."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path

from smoljax.errors import FULL, NotWritten, UsageError, require


@contextlib.contextmanager
def naming(file: Path, why: tuple[int, ...] = (*FULL, errno.EIO)):
    """Around what writes `file`: NotWritten names it, where Python has no name for what is open. why: the reasons."""
    try:
        yield
    except OSError as e:
        if e.errno in why:
            raise NotWritten(e.errno, e.strerror, str(e.filename or file)) from e
        raise


def write(file: Path, content: str | bytes):
    part = file.with_name(f"{file.name}.part")
    with naming(file):
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, file)


def write_json(file: Path, value, indent: int = 1):
    write(file, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def stream(file: Path):
    """A text to write that becomes `file` when the block ends well and vanishes when it does not."""
    part = file.with_name(f".{file.name}.part-{os.getpid()}")
    try:
        held = open(part, "w", encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{file} cannot be written ({e.strerror})") from None
    try:
        with naming(file, FULL):  # EIO may be of what is read meanwhile
            with held:
                yield held
            os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def copy(source: Path, file: Path):
    part = file.with_name(f"{file.name}.part")
    with naming(file):
        shutil.copyfile(source, part)
        os.replace(part, file)


@contextlib.contextmanager
def fresh(folder: str | Path):
    """A temporary sibling that becomes `folder` when the block ends well and vanishes when it does not."""
    folder = Path(folder).absolute()
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        require(free, f"{folder} exists already; name a new folder")
        part.mkdir(parents=True)
    except OSError as e:
        raise UsageError(f"{folder} cannot be written: {e.strerror or e}") from None
    try:
        yield part
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def lock(file: Path, sentence: str):
    """Hold `file` for this process alone; a UsageError with the sentence while another does.

    The lock falls with the process, however it ends.
    """
    try:
        held = open(file, "a+")
    except OSError as e:
        raise UsageError(f"{file.parent} cannot be written ({e.strerror}); name another folder") from None
    with held:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                raise UsageError(f"{file} cannot be locked ({e.strerror}); use a file system with locks") from None
            held.seek(0)
            raise UsageError(f"{sentence} ({held.read().strip() or 'it does not say who it is'})") from None
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        with naming(file):
            held.flush()
        yield
