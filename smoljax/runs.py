"""A run's folder: how a new one begins, and what a run that goes on may change.

RUN/config.json   the resolved config      RUN/tokenizer.json    the shards' tokenizer
RUN/metrics.jsonl see metrics.py           RUN/checkpoints/STEP  see checkpoint.py
"""

import dataclasses
import json
from pathlib import Path

from smoljax import atomic, checkpoint, settings, tokenizer
from smoljax.config import Train
from smoljax.data import Rows
from smoljax.errors import CheckpointError, DataError, UsageError, require

# What a resumed run may change: how it computes, how it reports, and the schedule ahead. All else is refused.
FREE = {
    *("steps", "optim.lr", "optim.min_lr", "optim.warmup_steps", "optim.decay_steps", "optim.decay"),
    *("accumulate", "log_every", "save_every", "keep", "keep_every", "run"),
    *("compute.dtype", "compute.remat", "compute.unroll", "mesh.data", "mesh.fsdp", "mesh.tensor"),
}


def open_run(folder: Path, config: Train) -> list[str]:
    """A new folder becomes a run by its config.json; an old one must be the same run. Returns its changes."""
    require(not folder.is_file(), f"run = {folder} is a file, expected a folder; name another with run=DIR")
    file = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            atomic.write_json(file, dataclasses.asdict(config))
        saved = json.loads(file.read_text()) if file.exists() else None
    except OSError as e:
        raise UsageError(f"run = {folder} cannot be written ({e.strerror}); name another folder with run=DIR") from None
    except ValueError as e:
        raise CheckpointError(f"{file} is not JSON ({e}); restore it from a checkpoint's metadata") from None
    if not isinstance(saved, dict) or not {"model", "steps"} <= saved.keys():
        raise UsageError(
            f"{folder} is not empty and not a run; name a new folder with run=DIR (weights alone go into init_from=)"
        )
    if not checkpoint.steps(folder):
        return []  # nothing was trained yet: there is nothing to contradict
    before, now = settings.flat(settings.from_dict(Train, saved)), settings.flat(config)
    changed = [k for k in now if k != "data.sources" and before[k] != now[k]]
    refused = [f"{k} = {now[k]} (the run has {before[k]})" for k in changed if k not in FREE]
    require(
        not refused, f"{config.run} is a run of another config: {', '.join(refused)}; name a new folder with run=DIR"
    )
    return [f"{k} = {now[k]} (was {before[k]})" for k in changed if k != "run"]


def write_run(folder: Path, config: Train, rows: Rows):
    """config.json and the shards' tokenizer, each complete or absent."""
    atomic.write_json(folder / "config.json", dataclasses.asdict(config))
    known = [w.shards.tokenizer_path for w in rows.windows if w.shards.tokenizer_path]
    if known:
        tokenizer.copy(known[0], folder)


def identity(config: Train, rows: Rows) -> list[dict]:
    """The run's data by content, not by place: a moved folder is the same source."""
    weights = config.data.sources
    return [{"source": n, "weight": weights[n], "fingerprint": f} for n, f in rows.fingerprints().items()]


def check_same_data(config: Train, rows: Rows, saved: dict):
    """saved: a checkpoint's metadata."""
    was, new = ([(s["weight"], s["fingerprint"]) for s in x] for x in (saved["data"], identity(config, rows)))
    if was != new:
        names = ", ".join(s["source"] for s in saved["data"])
        raise DataError(
            f"{config.run} was trained on other data than data.sources now holds: {names}, as they were then"
        )
