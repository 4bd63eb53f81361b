"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio; as far as they take them.

metrics.jsonl is the truth, and training never waits for a sink. Each has a thread with a queue, and a process of its
own at the end of a pipe: there it may ask for a login, print, hang in native code or in its exit hooks, and be killed.
"""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from smoljax import atomic, streams
from smoljax.errors import UsageError, require

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
QUEUE = 4096  # records that wait, a few kB each; more are dropped
HANG_S = 120.0  # without an answer; wandb.init gives up by itself after 90
CLOSE_S = 10.0  # for the last records of all sinks together, and for wandb's upload


def check(names):
    """A sink whose package is not installed is a mistake to be told of before training, not a warning in the middle."""
    for name in names:
        spec = importlib.util.find_spec(PACKAGES[name])
        found = spec is not None and spec.origin is not None  # a folder ./wandb, as wandb leaves one, is no package
        require(found, f"sinks has {name}, but {PACKAGES[name]} is not installed: pip install 'smoljax[{name}]'")


def identity(folder: Path) -> str:
    """An id that stays with the run's folder, also when it moves: what wandb and Trackio know the run by."""
    file = folder / "sinks.json"
    if not file.exists():
        atomic.write_json(file, {"id": secrets.token_hex(4)})
    try:
        return str(json.loads(file.read_text())["id"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{file} does not hold the run's id; delete it, and its sinks begin new runs") from None


class Sinks:
    """Hands records to the sinks named; `start` is the step that the run resumes at, 0 for a new one.

    config: as JSON has it. Writes folder/sinks.json, folder/tensorboard and folder/wandb.

    `write` neither blocks nor raises. A sink that raises, hangs or dies is dropped with one warning; the others go on.
    """

    def __init__(self, names, folder: Path, config: dict, start: int):
        folder = Path(folder).resolve()
        begin = {"folder": str(folder), "config": config, "start": start, "id": identity(folder) if names else None}
        self.sinks = [Sink(name, begin) for name in dict.fromkeys(names)]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        deadline = time.monotonic() + CLOSE_S
        for sink in self.sinks:
            sink.queue.put({"close": kind is not None})
        for sink in self.sinks:
            sink.thread.join(max(0.0, deadline - time.monotonic()))
            sink.closed()

    def write(self, record: dict):
        """record: {"step": updates done, "train/loss": ..., "data/epochs": {...}}, numbers and dicts of numbers."""
        for sink in self.sinks:
            sink.write(record)


class Sink:
    """One sink, as the training sees it: a queue, and the thread that talks to the process."""

    def __init__(self, name: str, begin: dict):
        self.name, self.begin = name, begin
        self.queue, self.lock = queue.SimpleQueue(), threading.Lock()
        self.written = self.delivered = 0
        self.asked = None  # when the question was asked that has no answer yet
        self.process, self.dropped = None, False
        self.thread = threading.Thread(target=self.run, name=f"sink {name}", daemon=True)
        self.thread.start()

    def write(self, record: dict):
        self.written += 1
        asked = self.asked
        if asked is not None and time.monotonic() - asked > HANG_S:
            self.drop(f"it has not answered for {HANG_S:.0f} s")
        elif not self.dropped and self.queue.qsize() < QUEUE:
            self.queue.put(record)

    def run(self):
        try:
            # The search path is this process's own, so that the package found by `check` is the one used.
            program = f"import sys; sys.path[:] = {sys.path!r}; from smoljax import sinks; sinks.serve({self.name!r})"
            command, pipe = [sys.executable, "-c", program], subprocess.PIPE
            # In a session of its own: Ctrl-C and a signal to the group are for the training, which then says `close`.
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
            self.ask(self.begin)
            while "close" not in (record := self.queue.get()):
                self.ask(record)
                self.delivered += 1
            self.ask(record)
            self.process.stdin.close()
            self.process.wait()
        except Exception as e:
            self.drop(str(e) if isinstance(e, Refused) else f"{type(e).__name__}: {e}")

    def ask(self, value: dict):
        """One line there, one line back: an error's text, or nothing."""
        self.asked = time.monotonic()
        line = json.dumps(value) + "\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it may have said why
        answer = self.process.stdout.readline()
        self.asked = None
        if not answer:
            raise Refused(f"its process ended with exit code {self.process.wait()}")
        if answer.strip():
            raise Refused(answer.strip())

    def drop(self, why: str):
        """Once: say it, and end the process, which may hang anywhere."""
        with self.lock:
            first, self.dropped = not self.dropped, True
        if first:
            if self.process:
                self.process.kill()
            lost = self.written - self.delivered
            logging.getLogger("smoljax").warning(
                f"{self.name} gets no more metrics: {why}; {lost} of {self.written} records did not reach it, "
                "metrics.jsonl has them all"
            )

    def closed(self):
        lost = self.written - self.delivered
        if self.thread.is_alive():
            self.drop(f"it was not done within the {CLOSE_S:.0f} s that the end of a run waits")
        elif lost and not self.dropped:
            logging.getLogger("smoljax").warning(
                f"{self.name} was slower than the training: {lost} of {self.written} records did not reach it, "
                "metrics.jsonl has them all"
            )


class Refused(Exception):
    """What a sink answered instead of taking a record."""


# ---- in the sink's own process


def serve(name: str):
    """Read begin, records and close from stdin, a line each; answer each on stdout. Ends when stdin does."""
    streams.secure()  # its stderr is the training's, and may lose its reader
    answers = os.dup(1)
    os.dup2(2, 1)  # what the package prints is for people, not for the pipe nor for the training's results
    questions = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor does it read our records as the answer to a prompt

    def answer(text: str = ""):
        with contextlib.suppress(BrokenPipeError):  # the training was killed; its last records are still in the pipe
            os.write(answers, f"{text}\n".encode())

    sink = None
    try:
        begin = json.loads(questions.readline())
        sink = KINDS[name](Path(begin["folder"]), begin["config"], begin["start"], begin["id"])
        again, kept = begin["start"] + 1, getattr(sink, "first", 0)
        if kept > again:  # the same numbers, unless settings have changed since
            print(f"smoljax: {name} keeps steps {again} to {kept - 1} as an attempt before sent them", file=sys.stderr)
        answer()
        for line in questions:
            record = json.loads(line)
            if "close" in record:
                sink.close(record["close"])
                sink = None
            else:
                sink.write(record["step"], flat(record))
            answer()
        if sink:  # killed: what it said until then still arrives, if that takes no longer than this
            signal.alarm(60)
            sink.close(True)
    except BaseException as e:  # a package may raise SystemExit too; the process ends here in any case
        answer(" ".join(f"{type(e).__name__}: {e}".split())[:500])


def flat(record: dict) -> dict:
    """{"data/epochs": {"web": 0.1}} -> {"data/epochs/web": 0.1}; `step` is left out, and None: no number, no point."""
    out = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= {f"{key}/{inner}": v for inner, v in flat(value).items()}
        elif key != "step" and value is not None:
            out[key] = value
    return out


class TensorBoard:
    """RUN/tensorboard: the event file format, without SummaryWriter, whose exit hook waits for ever on a full disk."""

    def __init__(self, folder: Path, config: dict, start: int, id: str):
        sys.modules["torch"] = None  # tensorboardX imports it where it is installed, 4 s for nothing
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        # Its files are named by the second: two starts within one would overwrite each other.
        self.writer = EventsWriter(str(place / "events"), f".{start}")
        self.file = Path(self.writer._file_name)
        # As SummaryWriter(purge_step=start + 1): TensorBoard hides what an earlier process logged beyond `start`.
        status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.write_event(self.event(step=start + 1, wall_time=time.time(), session_log=status))

    def write(self, step: int, values: dict):
        if not self.file.exists():  # Linux would write on into a deleted file without a word
            raise FileNotFoundError(f"{self.file} has vanished")
        scalars = [self.summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        summary = self.summary(value=scalars)
        self.writer.write_event(self.event(step=step, wall_time=time.time(), summary=summary))
        self.writer.flush()

    def close(self, failed: bool):
        self.writer.close()


class Wandb:
    """A run of Weights & Biases: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and a login hold as everywhere."""

    def __init__(self, folder: Path, config: dict, start: int, id: str):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "smoljax"),
            id=id,
            name=folder.name,
            dir=folder,
            config=config,
            resume="allow",
            allow_val_change=True,  # a resumed run may have more steps
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=CLOSE_S - 2),
        )
        self.first = self.run.starting_step  # it refuses steps that it has, with a warning each

    def write(self, step: int, values: dict):
        if step >= self.first:
            self.run.log(values, step=step)

    def close(self, failed: bool):
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, local unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says where."""

    def __init__(self, folder: Path, config: dict, start: int, id: str):
        import trackio

        name = f"{folder.name}-{id}"  # it resumes by name, and two folders may share one
        self.run = trackio.init(project="smoljax", name=name, config=config, resume="allow", embed=False)
        self.first = self.run._next_step  # it would keep a step twice; there is no public name for what it has

    def write(self, step: int, values: dict):
        if step >= self.first:
            self.run.log(values, step=step)

    def close(self, failed: bool):
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
