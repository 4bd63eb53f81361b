"""What is kept of a step whose update was skipped, so that `smoljax replay` can repeat it to the same value.

    RUN/dumps/STEP/dump.json    step, loss, gradient norm, tokens read from each source before it, config, mesh
    RUN/dumps/STEP/rows-P.npz   the rows of the batch that process P fed
    RUN/dumps/STEP/checkpoints  the newest checkpoint before it, by hard links; in a run's first dumps alone

Weights are not in a dump: when the host learns of the step, a later one has changed them. They come back by training
from the checkpoint to the step before, which is exact (data.py).
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from smoljax import atomic, committed, processes
from smoljax.config import Train
from smoljax.errors import DataError

CONTENT = {"step": int, "loss": str, "grad_norm": str, "processes": int, "run": str, "config": dict}  # of dump.json
PINNED = 3  # dumps that hold their checkpoint back from deletion: 12 B a parameter each


def write(run: Path, n: int, config: Train, batch: dict, values: dict, consumed: dict, mesh) -> Path:
    """Dump step n of a run; values: the step's metrics. Every process writes its own rows."""
    folder = run / "dumps" / str(n)
    folder.mkdir(parents=True, exist_ok=True)
    rows, arrays = local(batch)
    file = folder / f"rows-{jax.process_index()}.npz"
    with atomic.naming(file):
        with open(f"{file}.part", "wb") as f:
            np.savez(f, rows=rows, **arrays)
        os.replace(f.name, file)
    if processes.first():
        pin(run, folder, n)
        content = {"step": n, "loss": repr(values["loss"]), "grad_norm": repr(values["grad_norm"])}
        content |= {"consumed": consumed, "processes": jax.process_count(), "devices": mesh.devices.flat[0].device_kind}
        content |= {"mesh": dict(mesh.shape), "run": str(run.resolve()), "config": dataclasses.asdict(config)}
        atomic.write_json(folder / "dump.json", content)
    return folder


def local(batch: dict) -> tuple[np.ndarray, dict]:
    """The rows of a global batch on this process's devices: their numbers, and what is in them."""
    found = {}
    for name, array in batch.items():
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            found.setdefault(name, {}).update({first + i: row for i, row in enumerate(np.asarray(shard.data))})
    rows = sorted(found["tokens"])
    return np.array(rows), {name: np.stack([by_row[r] for r in rows]) for name, by_row in found.items()}


def pin(run: Path, folder: Path, n: int):
    """Hold the newest checkpoint before step n by hard links, which cost nothing until the run deletes its own."""
    kept, part = folder / "checkpoints", folder / "checkpoints.part"
    before = [step for step in committed.steps(run) if step < n]
    others = [pinned for pinned in (run / "dumps").glob("*/checkpoints") if pinned != kept]
    if not before or len(others) >= PINNED:
        return
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):  # where links are not possible, the run's own checkpoint serves while it lives
        shutil.copytree(run / "checkpoints" / str(before[-1]), part / str(before[-1]), copy_function=os.link)
        shutil.rmtree(kept, ignore_errors=True)  # of the same step, before the run was resumed
        os.replace(part, kept)
    shutil.rmtree(part, ignore_errors=True)


def read(folder: Path) -> tuple[dict, dict]:
    """(dump.json, the batch as numpy arrays BT) of a dump. A DataError where any of it is missing or damaged."""
    try:
        content, by_row = json.loads((folder / "dump.json").read_text()), {}
        wrong = [name for name, kind in CONTENT.items() if not isinstance(content[name], kind)]
        if wrong:
            raise ValueError(f"dump.json has {wrong[0]} = {content[wrong[0]]!r}")
        for p in range(content["processes"]):
            with np.load(folder / f"rows-{p}.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            by_row |= {int(r): {k: v[i] for k, v in arrays.items()} for i, r in enumerate(arrays.pop("rows"))}
        rows = [by_row[r] for r in range(len(by_row))]
        return content, {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    except Exception as e:  # zipfile, zlib and NumPy each have their own for what is damaged
        raise DataError(f"{folder} is no whole dump ({type(e).__name__}: {e}); expected RUN/dumps/STEP") from None
