"""A batch job's output: a result for each row of row_files.py, in order, each once, whatever is killed in between.

OUT.part-I-of-P    what process I of P has so far, in order: a job that is started again goes on behind its last line;
                   OUT.part-I-of-P.done when it has all
OUT.job            what the job is, so that no other one goes on in its place
OUT                all of it, when the last process has ended; then the parts go
.OUT...lock        held by who writes a part, or what is common
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

from smoljax import atomic, row_files
from smoljax.errors import DataError, UsageError, require

PATIENCE = 600  # s to wait for another process of the job
# How many processes share a job, and which one this is. SLURM's are of a step, that is srun's: a batch script is none.
LAUNCHERS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))  # inner first


def share(count: int | None, mine: int | None) -> tuple[int, int]:
    """(which process this is, of how many): by --process-id and --num-processes, else SLURM's or Open MPI's variables.

    They need not find each other.
    """
    if count is None and mine is None:
        for names in LAUNCHERS:
            if all(name in os.environ for name in names):
                return checked(*(pair for name in names for pair in (os.environ[name], name)))
        return 0, 1
    require(None not in (count, mine), "--num-processes and --process-id go together")
    return checked(count, "--num-processes", mine, "--process-id")


def checked(count, its: str, mine, name: str) -> tuple[int, int]:
    try:
        count, mine = int(count), int(mine)
    except ValueError:
        raise UsageError(f"{its} is {count!r} and {name} is {mine!r}, expected numbers") from None
    require(count >= 1, f"{its} is {count}, expected 1 or more")
    require(0 <= mine < count, f"{name} is {mine}, expected 0 ... {count - 1} of {its} {count}")
    return mine, count


def digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def errors(output: Path) -> list[str]:
    """What is said of the rows that have no answer."""
    with open(output, "rb") as file:
        found = ((number, json.loads(line)) for number, line in enumerate(file, start=1) if b'"error": ' in line)
        return [f"row {number}: {row['error']}" for number, row in found if "error" in row]


class Job:
    """This process's part of a job. `with` holds it alone; `begin` is the first row that is still to be done."""

    def __init__(self, source: Path, output: Path, what: dict, process: int, processes: int):
        self.source, self.output, self.process, self.processes = source, output, process, processes
        total = row_files.count(source)
        self.first, self.last = (total * p // processes for p in (process, process + 1))
        self.what = {"input": source.name, "sha256": digest(source), "rows": total, "processes": processes} | what
        self.part = self.named(process)
        self.complete = False

    def named(self, process: int) -> Path:
        return self.output.with_name(f"{self.output.name}.part-{process + 1}-of-{self.processes}")

    def hidden(self, process: int) -> Path:
        return self.output.with_name(f".{self.named(process).name}.lock")

    def beside(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    @property
    def common(self) -> Path:
        """What one process at a time holds, to begin the job or to put it together."""
        return self.output.with_name(f".{self.output.name}.lock")

    def __enter__(self):
        folder = self.output.absolute().parent
        require(folder.is_dir(), f"--output {self.output}: there is no folder {folder}")
        require(not self.output.is_dir(), f"--output {self.output} is a folder; name a file in it")
        known = self.beside(".job").exists() or not self.output.exists()
        require(known, f"{self.output} exists already; name a new file")
        with contextlib.ExitStack() as stack:
            held = f"{self.part} is being written by another process"
            stack.enter_context(atomic.lock(self.hidden(self.process), held))
            with waited(self.common, f"{self.output} is being begun by another process"):
                self.check()
                done = self.part.with_name(self.part.name + ".done")
                self.complete = self.output.exists() or done.exists()
                self.begin = self.last if self.complete else self.first + self.cut()
                self.file = None if self.complete else open(self.part, "ab")
            self.lock = stack.pop_all()
        return self

    def check(self):
        """The job in this place is this one, or there is none."""
        file, new = self.beside(".job"), json.loads(json.dumps(self.what))
        if not file.exists():
            left = sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.part-*"))
            require(
                not left, f"{left and left[0]} is of a job whose {file.name} is gone; remove it, or name a new file"
            )
            self.kept = {"begun": time.time()}
            self.save()
            return
        old = self.load()
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        if changed:
            raise UsageError(
                f"{self.output} is another job's ({'; '.join(changed)}); name a new file, or remove what there "
                f"is of {self.output.name}, {file.name} and {self.output.name}.part-*"
            )

    def load(self) -> dict:
        """What the job is, by its file; what is kept for those who go on with it lies in `kept`."""
        file = self.beside(".job")
        try:
            found = json.loads(file.read_text())
            self.kept = dict(found.pop("kept"))
            if not math.isfinite(self.kept["begun"]):
                raise ValueError(self.kept)
        except (ValueError, TypeError, LookupError, AttributeError):
            raise DataError(
                f"{file} is damaged, and says no more what {self.output} is; name a new file, or remove what there is "
                f"of {self.output.name}, {file.name} and {self.output.name}.part-*"
            ) from None
        return found

    def save(self):
        text = json.dumps(self.what | {"kept": self.kept}, indent=1)  # ASCII, for the name of a file may be no text
        atomic.write(self.beside(".job"), text + "\n")

    def keep(self, name: str, value):
        """What the first process of the job found: this, or what another found before."""
        with waited(self.common, f"{self.beside('.job')} is being written by another process"):
            self.load()
            if name not in self.kept:
                self.kept[name] = value
                self.save()
        return self.kept[name]

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
        self.file.write(json.dumps(finite(row), ensure_ascii=False, default=str).encode() + b"\n")
        self.file.flush()

    def __exit__(self, kind, *_):
        with self.lock:
            if self.file:
                os.fsync(self.file.fileno())
                self.file.close()
                if kind is None:
                    self.check_source()
                    os.replace(self.part, self.part.with_name(self.part.name + ".done"))

    def check_source(self):
        """What was read is what the job is of: a file that lost its end while it was read would give fewer rows."""
        if not self.source.is_file() or digest(self.source) != self.what["sha256"]:
            raise DataError(
                f"{self.source} is not what it was when the job began, and the rows in {self.part} are of no one file; "
                "name a new --output"
            )

    def join(self) -> bool:
        """Put the parts together, if this is the last process; whether the output is there."""
        parts = [self.named(p).with_name(self.named(p).name + ".done") for p in range(self.processes)]
        with waited(self.common, f"{self.output} is being put together by another process"):
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
                for file in (*parts, *locks, self.common):
                    file.unlink(missing_ok=True)
        return self.output.exists()


def finite(value):
    """null for NaN and infinity, which JSON has not: of a parquet file's floats, where NaN is what is missing."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def waited(file: Path, sentence: str):
    """atomic.lock, once whoever has it is done."""
    until = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(atomic.lock(file, sentence))
                break
            except UsageError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield
