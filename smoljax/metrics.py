"""Where numbers go: metrics.jsonl, the source of truth, and one progress line; throughput and MFU."""

import contextlib
import json
import math
import mmap
import resource
import sys
import time
from pathlib import Path

from smoljax import atomic, processes
from smoljax.budget import PEAK_TFLOPS, flops_per_token
from smoljax.config import Train
from smoljax.errors import CheckpointError


def peak_flops(devices) -> float | None:
    """Peak bf16 FLOP/s of all devices together; None where it is not known, as on CPUs."""
    kind = devices[0].device_kind
    known = [peak for words, peak in PEAK_TFLOPS.items() if words in kind]
    return known[0] * 1e12 * len(devices) if known else None


# Where a run's seconds go; each record has the sums since the run began, over all its resumptions, so goodput is
# productive / (all of them). Lost is what a kill took: the time of the steps after the last checkpoint.
SPENT = ("productive", "compile", "checkpoint", "restore", "data_wait", "eval", "lost")


class Meter:
    """Turns a step's numbers into a record: tokens, speed since the last record, MFU, and where the time went."""

    def __init__(self, devices, start: int, spent: dict | None = None, begun: float | None = None):
        self.devices, self.peak, self.step = len(devices), peak_flops(devices), start
        here = [device for device in devices if device.process_index == processes.index()]
        self.device = here[0]  # others do not tell us of their memory
        self.before = spent or dict.fromkeys(SPENT, 0.0)
        self.own = dict.fromkeys(SPENT, 0.0)
        self.begun = time.perf_counter() if begun is None else begun
        self.last, self.tokens = dict(self.own), None
        self.stages: list[tuple[int, float]] = []  # tokens when a stage began, FLOPs of one of its tokens

    def enter(self, config: Train, tokens: int):
        """A stage begins after so many tokens."""
        self.stages.append((tokens, flops_per_token(config.model, config.data.seq_len)))
        self.tokens = tokens if self.tokens is None else self.tokens

    def flops(self, tokens: int) -> float:
        """Of the tokens since the last record, each by its stage."""
        ends = [start for start, _ in self.stages[1:]] + [tokens]
        spans = [max(end - max(start, self.tokens), 0) for (start, _), end in zip(self.stages, ends, strict=True)]
        return sum(span * each for span, (_, each) in zip(spans, self.stages, strict=True))

    @contextlib.contextmanager
    def timing(self, what: str):
        """Around what is not a step: compile, checkpoint, restore, data_wait or eval."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.own[what] += time.perf_counter() - begun

    def starts(self):
        """The first step is next: what was not timed until here, checking and opening, belongs to the restore."""
        self.spent()
        self.own["restore"] += self.own["productive"]
        self.spent()
        self.last = dict(self.own)

    def spent(self) -> dict:
        elapsed = time.perf_counter() - self.begun
        self.own["productive"] = elapsed - sum(v for k, v in self.own.items() if k != "productive")
        return {k: self.before[k] + v for k, v in self.own.items()}

    def record(self, n: int, values: dict, tokens: int) -> dict:
        """values: the step's loss, lr, grad_norm, labels, skipped_steps, read just now; tokens: of all n batches."""
        spent, steps = self.spent(), n - self.step
        used = {k: self.own[k] - self.last[k] for k in ("productive", "data_wait")}
        seconds = sum(used.values()) / steps
        speed = (tokens - self.tokens) / (seconds * steps)
        out = {"step": n} | {f"train/{key}": values[key] for key in ("loss", "lr", "grad_norm")}
        out |= {"train/tokens": tokens, "train/labels": int(values["labels"])}
        out |= {"train/skipped_steps": int(values["skipped_steps"])}
        out |= {"train/tokens_per_sec": speed, "train/tokens_per_sec_per_device": speed / self.devices}
        out |= {"train/mfu": self.flops(tokens) / (seconds * steps * self.peak)} if self.peak else {}
        out |= {"train/step_time_s": seconds, "train/data_wait_s": used["data_wait"] / steps}
        self.step, self.tokens, self.last = n, tokens, dict(self.own)
        out |= {f"goodput/{k}_s": v for k, v in spent.items()}
        return out | {"host/rss_gb": host_rss_gb()} | device_peak_gb(self.device)


def spent_before(run: Path, step: int) -> dict:
    """The seconds of a run so far, as a process that goes on from checkpoint `step` finds them.

    What is not in the record of that step was spent in vain: lost. `keep_spent` writes it down, for the next attempt
    may be killed before its first record.
    """
    last, kept = None, {}
    for _, record in backwards(Path(run) / "metrics.jsonl"):
        last = last or record
        if record["step"] <= step:
            kept = record
            break
    file = Path(run) / "goodput.json"
    try:
        before = {k: float(v) for k, v in json.loads(file.read_text()).items()} if file.exists() else {}
    except (ValueError, TypeError, AttributeError):  # a power cut may leave it empty; it is no reason to stop
        print(f"smoljax: {file} is damaged: seconds of attempts without a record are not counted", file=sys.stderr)
        before = {}
    of_last = {k: (last or {}).get(f"goodput/{k}_s", 0.0) for k in SPENT}
    spent = {k: kept.get(f"goodput/{k}_s", 0.0) for k in SPENT}
    total = max(sum(of_last.values()), sum(before.values()))
    return spent | {"lost": total - sum(spent.values()) + spent["lost"]}


def keep_spent(run: Path, spent: dict):
    atomic.write_json(Path(run) / "goodput.json", spent)


def backwards(file: Path):
    """(where it ends, record) of the complete lines of a metrics.jsonl, the last first; of years of it a little."""
    if not file.exists() or not file.stat().st_size:
        return
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n")
        while end >= 0:
            start = text.rfind(b"\n", 0, end)
            try:
                record = parse(text[start + 1 : end])
            except ValueError as e:
                line = text[:end].count(b"\n") + 1
                raise CheckpointError(f"{file}:{line} {e}; mend or delete that line") from None
            yield end + 1, record
            end = start


def parse(line: str | bytes) -> dict:
    """A line's record; a ValueError says what it is instead."""
    try:
        record = json.loads(line)
    except ValueError as e:
        raise ValueError(f"is not JSON ({e})") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("is no record with a step")
    return record


def read(run: Path, most: int | None = None) -> list[dict]:
    """The records of a run's metrics.jsonl; a last line cut by a kill is left out.

    Of more than `most` lines every so manieth is taken, the last, and those with held-out sets: a year of steps fills
    memory.
    """
    file = Path(run) / "metrics.jsonl"
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
        every = max(count // most, 1) if most else 1
        lines.seek(0)
        records = []
        for number, line in enumerate(lines, 1):
            taken = number % every == 0 or number == count or '"eval/' in line
            if not taken or not line.endswith("\n"):
                continue
            try:
                records.append(parse(line))
            except ValueError as e:
                raise CheckpointError(f"{file}:{number} {e}; mend or delete that line") from None
    return records


class Log:
    """Appends records to metrics.jsonl and shows the latest: a rich line on a terminal, else a plain line at times.

    Records past `step` are dropped first: the resumed run writes them anew, and bit for bit the same on CPU.
    """

    def __init__(self, run: Path, step: int, steps: int):
        file = Path(run) / "metrics.jsonl"
        end = next((end for end, record in backwards(file) if record["step"] <= step), 0)
        self.file = open(file, "ab", buffering=0)  # a buffer would be written once more as it is closed, and fail again
        self.file.truncate(end)
        self.begun, self.first, self.steps, self.shown = None, step, steps, 0.0
        self.bar = progress_bar(step, steps) if sys.stderr.isatty() else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.bar:
            self.bar.stop()

    def write(self, record: dict):
        """record: {"step": updates done, "train/loss": ..., ...}, numbers and dicts of numbers only."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.append(json.dumps(finite, allow_nan=False) + "\n", record["step"])  # JSON has no NaN: null is none
        now, last = time.monotonic(), record["step"] == self.steps
        if self.begun is None:  # compiling came before the first record, and says nothing about the others
            self.begun, self.first, eta = now, record["step"], clock(0) if last else "unknown"
        else:
            eta = clock((now - self.begun) / (record["step"] - self.first) * (self.steps - record["step"]))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=record["step"], text=summary(record))
        elif now - self.shown > 10 or last:  # a log file wants a line now and then, not one a step
            self.shown = now
            done = f"step {record['step']}/{self.steps}"
            print(f"{done}  {summary(record)}  eta {eta}", file=sys.stderr, flush=True)

    def append(self, line: str, step: int):
        """A full disk may take a part of the line: the resumed run cuts it off."""
        rest = memoryview(line.encode())
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as e:
            raise CheckpointError(
                f"{self.file.name} cannot be written at step {step}: {e.strerror}; make room, and the same command "
                "goes on from the last checkpoint"
            ) from e


def progress_bar(step: int, steps: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}"),
        TextColumn("eta"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task("train", total=steps, completed=step, text="compiling")
    bar.start()
    return bar


def summary(record: dict) -> str:
    """loss 3.412  lr 2.9e-03  gnorm 0.81  tok/s 412k  mfu 0.38  data 2%"""
    r = {key.removeprefix("train/"): value for key, value in record.items()}
    text = f"loss {r['loss']:.4f}  lr {r['lr']:.2e}  gnorm {r['grad_norm']:.3f}"
    text += f"  tok/s {human(r['tokens_per_sec'])}"
    if "mfu" in r:
        text += f"  mfu {r['mfu']:.3f}"
    text += f"  data {r['data_wait_s'] / r['step_time_s']:.0%}"
    return text


def human(number: float) -> str:
    """412k, 1.31M"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"


def host_rss_gb() -> float:
    """Resident memory of this process now (on macOS its peak)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def device_peak_gb(device) -> dict:
    """{"device/mem_peak_gb": ...} where the device says it; CPUs do not."""
    stats = device.memory_stats() or {}
    return {"device/mem_peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}
