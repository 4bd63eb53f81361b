"""Where numbers go: metrics.jsonl, the source of truth, and one progress line; throughput and MFU."""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path

from smoljax import atomic
from smoljax.config import Model, Train
from smoljax.errors import CheckpointError

# Dense bf16 peak, TFLOP/s per device, by the words in jax.Device.device_kind (vendors' data sheets).
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6": 918,
}


def flops_per_token(model: Model, seq_len: int) -> float:
    """Forward and backward matrix FLOPs of one token: 6 per weight, and causal attention (half of T keys on average).

    The embedding counts once, as the head's product; recomputation does not count (model FLOPs, as in PaLM's MFU).
    """
    attention = 6 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * seq_len
    return 6 * model.parameters + attention


def peak_flops(devices) -> float | None:
    """Peak bf16 FLOP/s of all devices together; None where it is not known, as on CPUs."""
    kind = devices[0].device_kind
    known = [peak for words, peak in PEAK_TFLOPS.items() if words in kind]
    return known[0] * 1e12 * len(devices) if known else None


class Meter:
    """Turns a step's numbers into a record: tokens, speed since the last record, MFU, waiting for data, compilation."""

    def __init__(self, config: Train, devices, start: int):
        self.tokens_per_step = config.data.batch_size * config.data.seq_len
        self.flops = flops_per_token(config.model, config.data.seq_len)
        self.peak, self.devices = peak_flops(devices), len(devices)
        self.device = devices[0]
        self.step, self.since, self.wait, self.compile, self.save = start, None, 0.0, None, None

    @contextlib.contextmanager
    def waiting(self):
        """Around the wait for a batch."""
        begun = time.perf_counter()
        yield
        self.wait += time.perf_counter() - begun

    @contextlib.contextmanager
    def dispatching(self):
        """Around the call of the step: the first one compiles, which is all that takes time in it."""
        begun = time.perf_counter()
        yield
        if self.since is None:
            self.since = time.perf_counter()
            self.compile, self.wait = self.since - begun, 0.0

    @contextlib.contextmanager
    def saving(self):
        """Around a save: the time that it blocks is its own, not the next step's."""
        begun = time.perf_counter()
        yield
        self.save = time.perf_counter() - begun
        self.since += self.save

    def tokens(self, n: int) -> int:
        return n * self.tokens_per_step

    def record(self, n: int, values: dict) -> dict:
        """values: the step's loss, lr, grad_norm and labels, read from the device just now."""
        now = time.perf_counter()
        seconds = (now - self.since) / (n - self.step)
        speed = self.tokens_per_step / seconds
        out = {"step": n} | {f"train/{key}": values[key] for key in ("loss", "lr", "grad_norm")}
        out |= {"train/tokens": self.tokens(n), "train/labels": int(values["labels"])}
        out |= {"train/tokens_per_sec": speed, "train/tokens_per_sec_per_device": speed / self.devices}
        out |= {"train/mfu": speed * self.flops / self.peak} if self.peak else {}
        out |= {"train/step_time_s": seconds, "train/data_wait_s": self.wait / (n - self.step)}
        out |= {"goodput/compile_s": self.compile} if self.compile else {}
        out |= {"goodput/checkpoint_s": self.save} if self.save else {}
        self.step, self.since, self.wait, self.compile, self.save = n, now, 0.0, None, None
        return out | {"host/rss_gb": host_rss_gb()} | device_peak_gb(self.device)


def read(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; a last line cut by a kill is left out."""
    file = Path(run) / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = []
    try:
        for line in lines:
            if line.endswith("\n"):
                records.append(json.loads(line))
        return records
    except ValueError as e:
        raise CheckpointError(f"{file}:{len(records) + 1} is not JSON ({e}); mend or delete that line") from None


class Log:
    """Appends records to metrics.jsonl and shows the latest: a rich line on a terminal, else a plain line at times.

    Records past `step` are dropped first: the resumed run writes them anew, and bit for bit the same on CPU.
    """

    def __init__(self, run: Path, step: int, steps: int):
        kept = [r for r in read(run) if r["step"] <= step]
        atomic.write(Path(run) / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        self.file = open(Path(run) / "metrics.jsonl", "a")
        self.begun, self.first, self.steps, self.shown = time.monotonic(), step, steps, 0.0
        self.bar = progress_bar(step, steps) if sys.stderr.isatty() else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.bar:
            self.bar.stop()

    def write(self, record: dict):
        """record: {"step": updates done, "train/loss": ..., ...}, numbers and dicts of numbers only."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        now, last = time.monotonic(), record["step"] == self.steps
        eta = (now - self.begun) / (record["step"] - self.first) * (self.steps - record["step"])
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=record["step"], text=summary(record))
        elif now - self.shown > 10 or last:  # a log file wants a line now and then, not one a step
            self.shown = now
            done = f"step {record['step']}/{self.steps}"
            print(f"{done}  {summary(record)}  eta {clock(eta)}", file=sys.stderr, flush=True)


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
