"""Real processes for tests, forked from one that has imported everything already: they start in 0.1 s instead of 4.

A process calls one function of a module of this folder. Its output and its exit code are in files, and what a process
of `smoljax pretrain` reads:

    NAME.out  NAME.err  NAME.pid  NAME.code  NAME.rows (a line "batch row" for each row asked for)
    NAME.held appears when it is about to read a row of the batch to `hold` at, where it waits for NAME.go
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("train.pretrain", "smoljax.heldout", "smoljax.readings", "smoljax.runs", "smoljax.corruption", "grain")
HEAVY += ("jax.experimental.multihost_utils", "jax._src.clusters", "matplotlib.pyplot", "infer.generate", "pytest")


class Process:
    """One forked process; its files begin with `at`."""

    def __init__(self, at: Path):
        self.at = at

    def file(self, kind: str) -> Path:
        return self.at.with_name(f"{self.at.name}.{kind}")

    def until(self, kind: str, seconds: float = 240) -> str:
        """What is in NAME.kind, once it is there."""
        end = time.monotonic() + seconds
        while not self.file(kind).exists():
            assert time.monotonic() < end, f"no {kind} after {seconds} s; stderr: {self.err}"
            assert kind == "code" or not self.file("code").exists(), f"ended before {kind}; stderr: {self.err}"
            time.sleep(0.01)
        return self.file(kind).read_text()

    def kill(self, number: int):
        os.kill(int(self.until("pid")), number)

    def go(self):
        self.file("go").touch()

    @property
    def code(self) -> int:
        """The exit code, waited for; minus a signal's number where that ended it."""
        return int(self.until("code"))

    @property
    def err(self) -> str:
        """stderr without what the network library says of its connections."""
        lines = self.file("err").read_text().splitlines(keepends=True) if self.file("err").exists() else []
        return "".join(line for line in lines if "[Gloo]" not in line)

    @property
    def said(self) -> str:
        """The last line of stderr."""
        return self.err.rstrip().rpartition("\n")[2]

    @property
    def rows(self) -> list[tuple[int, int]]:
        return [tuple(map(int, line.split())) for line in self.file("rows").read_text().splitlines()]


class Launcher:
    """Starts processes, with their files in a folder; a context, which ends with all of them gone."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []

    @functools.cached_property
    def zygote(self) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True, env=env)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.started:
            if process.file("pid").exists() and not process.file("code").exists():
                with contextlib.suppress(ProcessLookupError):
                    process.kill(signal.SIGKILL)
        if self.started:
            self.zygote.stdin.close()
            self.zygote.wait()

    def call(self, function: str, *args, env=(), at=None) -> Process:
        """A process of module:function with arguments that JSON has, whose result is its exit code.

        env: what is different in its environment; None where a variable is gone. at: its files begin so.
        """
        process = Process(at or self.next())
        job = {"function": function, "args": args, "env": dict(env), "at": str(process.at)}
        print(json.dumps(job), file=self.zygote.stdin, flush=True)
        self.started.append(process)
        return process

    def next(self) -> Path:
        return self.folder / f"p{len(self.started)}"

    def one(self, *argv, devices=8, hold=None, bad=(), env=(), patience=120) -> Process:
        """One process of `smoljax pretrain` on as many fake devices.

        hold: the number of the batch, from 0, to wait before. bad: (batch, row) that is damaged once it is read.
        patience: seconds to wait for the others at the start.
        """
        at = self.next()
        args = argv, str(at), hold, bad, patience
        return self.call("launch:pretrain", *args, env=fake_devices(devices) | dict(env), at=at)

    def several(self, *argv, count=2, devices=4, hold=(), **kw) -> list[Process]:
        """Processes that find each other by flags. hold: {process: batch}."""
        where, hold = f"127.0.0.1:{free_port()}", dict(hold)
        return [self.one(*argv, *flags(where, count, i), devices=devices, hold=hold.get(i), **kw) for i in range(count)]


def flags(where: str, count: int, mine: int) -> list[str]:
    return [f"--coordinator={where}", f"--num-processes={count}", f"--process-id={mine}"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- in the processes


def zygote():
    """Reads jobs, a JSON object a line, and forks for each: a parent that waits, and the process itself."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # or each process looks through all of it as it ends: 0.8 s
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if not pid:
            return call(job)
        note(f"{job['at']}.pid", pid)
        note(f"{job['at']}.code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)


def fake_devices(count: int) -> dict[str, str]:
    """What a process's environment gets for as many devices, beside what the suite itself was given."""
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"}


def note(file: str, value):
    Path(f"{file}.part").write_text(str(value))
    os.replace(f"{file}.part", file)


def call(job: dict) -> int:
    for name, value in job["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for fd, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['at']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module, name = job["function"].split(":")
    return getattr(importlib.import_module(module), name)(*job["args"])


def program(text: str):
    exec(text, {})


def pretrain(argv: list, at: str, hold: int | None, bad: list[int], patience: float) -> int:
    from jax._src import compiler

    from smoljax import errors, processes
    from train import pretrain

    # On CPU each process compiles a program of its own, and JAX caches the first one's alone: 20 s for each pair.
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    processes.PATIENCE, pretrain.draw_curves = patience, lambda folder: None
    watch_rows(at, hold, bad)
    return errors.run(pretrain.main, argv)


def watch_rows(at: str, hold: int | None, bad: list[int]):
    from smoljax.data import Rows

    read, log = Rows.row, open(f"{at}.rows", "w", buffering=1)

    def row(self, n, i):
        if n == hold:
            note(f"{at}.held", n)
            while not os.path.exists(f"{at}.go"):
                time.sleep(0.01)
        print(n, i, file=log)
        row = read(self, n, i)
        if [n, i] == bad:  # an id outside the vocabulary, which no check on disk can see any more
            row["tokens"][5] = 60_000
        return row

    Rows.row = row


if __name__ == "__main__":
    sys.exit(zygote())
