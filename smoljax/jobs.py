"""A batch job's files: prompts in, results out in the same order, each once, whatever is killed in between.

OUT.part-I-of-P    what process I of P has so far, in order: a job that is started again goes on behind its last line
OUT.job            what the job is, so that no other one goes on in its place
OUT                all of it, when the last process has ended
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from smoljax import atomic, strict_json
from smoljax.errors import DataError, UsageError, require

KINDS = (".jsonl", ".parquet", ".txt")
PATIENCE = 600  # s to wait for another process that puts the parts together


def rows(path: Path) -> Iterator[dict]:
    """A file's rows; one that is none as {"line": its number, "error": why}.

    .jsonl: objects with a "prompt" or "messages", blank lines are nothing; .parquet: rows with such a column; .txt: a
    prompt a line.
    """
    if path.suffix == ".parquet":
        yield from parquet(path)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if path.suffix == ".jsonl" and not line.strip():
                continue
            try:
                yield strict_json.row(line) if path.suffix == ".jsonl" else {"prompt": plain(line)}
            except DataError as e:
                yield {"line": number, "error": str(e)}


def plain(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 text (byte {e.start})") from None


def parquet(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise DataError(f"{path} is no sound parquet file ({str(e).splitlines()[0]})") from None


def count(path: Path) -> int:
    """How many rows a file has."""
    require(path.suffix in KINDS, f"--input {path} ends with {path.suffix!r}, expected {', '.join(KINDS)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.ParquetFile(path).metadata.num_rows
        with open(path, "rb") as file:
            found = sum(1 for line in file if path.suffix == ".txt" or line.strip())
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None
    except Exception as e:
        raise DataError(f"{path} is no sound parquet file ({str(e).splitlines()[0]})") from None
    require(found > 0, f"--input {path} holds no rows; give it a prompt a line")
    return found


def errors(output: Path) -> list[str]:
    """What is said of the rows that have no answer."""
    with open(output, "rb") as file:
        found = ((number, json.loads(line)) for number, line in enumerate(file, start=1) if b'"error": ' in line)
        return [f"row {number}: {row['error']}" for number, row in found if "error" in row]


class Job:
    """This process's part of a job. `with` holds it alone; `begin` is the first row that is still to be done."""

    def __init__(self, source: Path, output: Path, what: dict, process: int, processes: int):
        self.source, self.output, self.process, self.processes = source, output, process, processes
        total = count(source)
        self.first, self.last = (total * p // processes for p in (process, process + 1))
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.what = {"input": source.name, "sha256": digest, "rows": total, "processes": processes} | what
        self.part = self.named(process)
        self.complete = False

    def named(self, process: int) -> Path:
        return self.output.with_name(f"{self.output.name}.part-{process + 1}-of-{self.processes}")

    def hidden(self, process: int) -> Path:
        return self.output.with_name(f".{self.named(process).name}.lock")

    def beside(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    def __enter__(self):
        folder = self.output.absolute().parent
        require(folder.is_dir(), f"--output {self.output}: there is no folder {folder}")
        held = f"{self.part} is being written by another process"
        self.lock = atomic.lock(self.hidden(self.process), held)
        self.lock.__enter__()
        self.check()
        done = self.part.with_name(self.part.name + ".done")
        self.complete = self.output.exists() or done.exists()
        self.begin = self.last if self.complete else self.first + self.cut()
        self.file = None if self.complete else open(self.part, "ab")
        return self

    def check(self):
        """The job in this place is this one, or there is none."""
        file = self.beside(".job")
        if not file.exists():
            require(not self.output.exists(), f"{self.output} exists already; name a new file")
            atomic.write_json(file, self.what)
            return
        old = json.loads(file.read_text())
        new = json.loads(json.dumps(self.what))
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        if changed:
            raise UsageError(
                f"{self.output} is another job's ({'; '.join(changed)}); name a new file, or remove it and {file.name}"
            )

    def cut(self) -> int:
        """How many rows a killed process has left whole; half a line goes."""
        if not self.part.exists():
            return 0
        found, end = 0, 0
        with open(self.part, "rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found, end = found + 1, end + len(line)
            file.truncate(end)
        return found

    def write(self, row: dict):
        self.file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        self.file.flush()

    def __exit__(self, kind, *_):
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
            if kind is None:
                os.replace(self.part, self.part.with_name(self.part.name + ".done"))
        self.lock.__exit__(None, None, None)

    def join(self) -> bool:
        """Put the parts together, if this is the last process; whether the output is there."""
        parts = [self.named(p).with_name(self.named(p).name + ".done") for p in range(self.processes)]
        with waited(self.beside(".lock"), f"{self.output} is being put together by another process"):
            if not self.output.exists() and all(part.exists() for part in parts):
                whole = self.beside(".whole")
                with open(whole, "wb") as out:
                    for part in parts:
                        with open(part, "rb") as file:
                            shutil.copyfileobj(file, out, 1 << 20)
                    os.fsync(out.fileno())
                os.replace(whole, self.output)
            if self.output.exists():
                locks = [self.hidden(process) for process in range(self.processes)]
                for file in (*parts, *locks, self.beside(".lock")):
                    file.unlink(missing_ok=True)
        return self.output.exists()


@contextlib.contextmanager
def waited(file: Path, sentence: str):
    """atomic.lock, once whoever has it is done."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with atomic.lock(file, sentence):
                yield
                return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
