"""A run's folder: how a new one begins, and what a run that goes on may change.

RUN/config.json   the resolved config      RUN/tokenizer.json    the shards' tokenizer
RUN/metrics.jsonl see metrics.py           RUN/checkpoints/STEP  see checkpoint.py
"""

import contextlib
import dataclasses
import logging
import os
import shutil
from pathlib import Path

import jax

from smoljax import atomic, attention, budget, committed, settings, tokenizer, weights
from smoljax.config import Guard, Train
from smoljax.data import Rows
from smoljax.errors import FULL, CheckpointError, DataError, Error, NotWritten, UsageError, require
from smoljax.step import TrainState, abstract_state, compiled_init

# What a resumed run may change: how it computes, watches and reports, and what lies ahead. All else is refused; data
# and stages are compared as far as they were read (check_same_data).
FREE = {
    *("steps", "optim.lr", "optim.min_lr", "optim.warmup_steps", "optim.decay_steps", "optim.decay"),
    *("accumulate", "init_from", "log_every", "save_every", "keep", "keep_every", "run", "sinks"),
    *("data.max_epochs", "data.chunk"),
    *("heldout.sets", "heldout.every", "heldout.max_tokens"),
    *(f"guard.{name}" for name in settings.flat(Guard()) if name != "spike_window"),
    *("compute.dtype", "compute.remat", "compute.unroll", "compute.attention", "compute.loss_chunk"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "xla_flags"),
}


def open_run(folder: Path, config: Train, allowed: tuple[str, ...] = ()) -> list[str]:
    """A new folder becomes a run by its config.json; an old one must be the same run. Returns its changes.

    allowed: keys that may change beside FREE; not model, data and spike_window, without which the weights, the place
    in the data or the guard's memory would mean something else.
    """
    for key in allowed:
        fixed = ("model.", "data.", "guard.", "stages", "optim.kind", "optim.mu_dtype")
        known = key in settings.flat(config) and not key.startswith(fixed)
        require(
            known,
            f"--allow-change {key}: expected a setting such as optim.b2 or seed, none of model, data, guard, nor "
            "optim.kind and optim.mu_dtype, which say what the moments are",
        )
    require(not folder.is_file(), f"run = {folder} is a file, expected a folder; name another with run=DIR")
    file = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if all(p.name.startswith(".") or p.name == "config.json.part" for p in folder.iterdir()):
            atomic.write_json(file, dataclasses.asdict(config))
        before = settings.of_run(folder) if file.exists() else None
    except OSError as e:
        raise UsageError(f"run = {folder} cannot be written ({e.strerror}); name another folder with run=DIR") from None
    if before is None:
        raise UsageError(
            f"{folder} is not empty and not a run; name a new folder with run=DIR (weights alone go into init_from=)"
        )
    if not committed.has_begun(folder):
        return []  # nothing was trained yet: there is nothing to contradict
    was, now = settings.flat(before), settings.flat(config)
    changed = [k for k in now if k not in ("data.sources", "stages") and was[k] != now[k]]
    refused = [f"{k} = {now[k]} (the run has {was[k]})" for k in changed if k not in FREE | set(allowed)]
    require(
        not refused,
        f"{config.run} is a run of another config: {', '.join(refused)}; name a new folder with run=DIR, or allow what "
        "is neither model nor data by --allow-change KEY",
    )
    starts = sorted(
        {s.start for s in (*before.stages, *config.stages) if s not in before.stages or s not in config.stages}
    )
    return [f"{k} = {now[k]} (was {was[k]})" for k in changed if k != "run"] + [f"another stage at {s}" for s in starts]


def write_run(folder: Path, config: Train, rows: Rows):
    """config.json and the shards' tokenizer, each complete or absent."""
    atomic.write_json(folder / "config.json", dataclasses.asdict(config))
    known = [shards.tokenizer_path for shards in rows.sources.values() if shards.tokenizer_path]
    if known:
        tokenizer.copy(known[0], folder)


def history(config: Train, rows: Rows, n: int) -> dict:
    """What n batches were made of, by content and not by place: a moved folder is the same source."""

    def stage(part) -> dict:
        at, total = config.at(part.start), sum(part.data.sources.values())
        sources = [
            {"source": name, "weight": weight / total, "fingerprint": rows.sources[name].fingerprint}
            | {"sample": rows.samples[name]}
            for name, weight in part.data.sources.items()
        ]
        sizes = {"seq_len": at.data.seq_len, "batch_size": at.data.batch_size}
        kind = {"mask_documents": at.data.mask_documents, "rope_theta": at.model.rope_theta}
        return {"start": part.start} | sizes | kind | {"sources": sources}

    consumed = {rows.sources[name].fingerprint: tokens for name, tokens in rows.consumed(n).items() if tokens}
    stages = [stage(part) for part in rows.parts if part.start < n or part.start == 0]
    return {"chunk": rows.chunk, "stages": stages, "consumed": consumed}


def check_same_data(config: Train, rows: Rows, n: int, saved: dict):
    """saved: history(...) as the checkpoint after n batches has it. What is still ahead may differ."""
    now, name = history(config, rows, n), config.run
    if len(now["stages"]) != len(saved["stages"]):
        starts = [[s["start"] for s in x["stages"]] for x in (saved, now)]
        raise UsageError(f"{name} read stages from {starts[0]} up to step {n}, the config has {starts[1]}")
    for was, new in zip(saved["stages"], now["stages"], strict=True):
        content = [[(s["fingerprint"], s["sample"]) for s in x["sources"]] for x in (was, new)]
        if content[0] != content[1]:
            names = ", ".join(s["source"] for s in was["sources"])
            raise DataError(f"{name} was trained on other data than data.sources now holds: {names}, as they were then")
        differ = [
            f"the weight of {b['source']} = {b['weight']:.6g} (the run has {a['weight']:.6g})"
            for a, b in zip(was["sources"], new["sources"], strict=True)
            if abs(a["weight"] - b["weight"]) > 1e-9
        ]
        differ += [f"{k} = {new[k]} (the run has {was[k]})" for k in was if k != "sources" and new[k] != was[k]]
        require(not differ, f"{name} had another stage at {was['start']}: {', '.join(differ)}")
    require(
        now["chunk"] == saved["chunk"],
        f"{name} has read its sources in chunks of {saved['chunk']} tokens, then its longest row ahead, now that is "
        f"{now['chunk']}; set data.chunk={saved['chunk']}, or for a longer row go on in a new folder with "
        f"init_from={name}",
    )
    if now["consumed"] != saved["consumed"]:
        raise CheckpointError(
            f"{name} had consumed {saved['consumed']} tokens at step {n}, the config makes it {now['consumed']}"
        )


def check_data(config: Train, rows: Rows):
    """The shards' end of document is the model's, which generation stops at; no source is read too often."""
    for name, shards in rows.sources.items():
        ours, theirs = config.model.eos_token_id, shards.eos_token_id
        require(
            ours is None or theirs is None or theirs in (ours if isinstance(ours, tuple) else (ours,)),
            f"{name} ends its documents with token {theirs}, but model.eos_token_id is {ours}; "
            f"set model.eos_token_id={theirs} (and model.bos_token_id)",
        )
        ids = shards.vocab_size
        if ids is not None and ids < config.model.vocab_size:
            logging.getLogger("smoljax").warning(
                f"{name} has a tokenizer of {ids} ids, model.vocab_size is {config.model.vocab_size}: "
                "the other rows of the embedding are never used"
            )
    limit, epochs = config.data.max_epochs, rows.epochs(config.steps)
    often = [f"{name} {e:.2f} times" for name, e in epochs.items() if limit is not None and e > limit]
    require(
        not often,
        f"the run would read {', '.join(often)}, data.max_epochs is {limit}; find more text or change weights",
    )


def room(folder: Path, config: Train) -> tuple[int, int, Path]:
    """Bytes that a run's folder still has to grow, bytes free there, and the nearest folder that exists."""
    folder = folder.absolute()
    there = 0
    for at, _, names in os.walk(folder / "checkpoints"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # Orbax clears away meanwhile what a kill left
                there += os.stat(os.path.join(at, name)).st_size
    place = next(p for p in (folder, *folder.parents) if p.exists())
    return budget.disk_bytes(config) - there, shutil.disk_usage(place).free, place


def check_left_out(config: Train, start: int, saved: dict):
    """saved: the config of checkpoint `start`. What its weights have learned cannot be left out any more."""
    late = sorted({n for n in config.guard.leave_out if n <= start} - set(saved["guard"]["leave_out"]))
    require(
        not late,
        f"guard.leave_out names {late}, but the run has learned from them: it goes on from step {start}; take them off "
        "the list, or move the checkpoints since out of its folder",
    )


def check_disk(folder: Path, config: Train):
    needed, free, place = room(folder, config)
    require(
        needed <= free,
        f"{config.run} will grow by {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free; make room, set keep "
        "lower or keep_every higher, or name another folder with run=DIR",
    )


def attending(config: Train) -> dict[int, str]:
    """By a stage's start, who computes its attention and why: a UsageError where what was asked for cannot be."""
    found = {}
    for start in config.starts:
        at = config.at(start)
        backend, why = attention.choose(at.compute, at.data.seq_len, at.data.mask_documents)
        found[start] = f"{backend} ({why})"
    return found


@contextlib.contextmanager
def disk(folder: Path):
    """Around a run: a file of its folder that cannot be written is as a checkpoint that cannot."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL and not isinstance(e, NotWritten):  # EIO of a shard is none
            raise
        raise CheckpointError(
            f"{e.filename or f'a file in {folder}'} cannot be written: {e.strerror}; make room, and the same "
            "command goes on from the last checkpoint"
        ) from e


@contextlib.contextmanager
def memory(config: Train, mesh):
    """Around a run's steps: where a device has not enough memory, the sentence says what was needed and what helps."""
    try:
        yield
    except Exception as e:
        if isinstance(e, Error) or "RESOURCE_EXHAUSTED" not in str(e):  # a full disk is one too
            raise
        remat = "" if config.compute.remat == "full" else "set compute.remat=full, "
        raise Error(
            f"a device has not enough memory: {budget.memory_sentence(config, mesh.size)}. Raise accumulate "
            f"(now {config.accumulate}), {remat}or use more devices ({str(e).splitlines()[0][:200]})"
        ) from e


def initial_state(config: Train, rows: Rows | None, places: TrainState) -> TrainState:
    """The state before the first update: fresh from config.seed, or around the weights of config.init_from."""
    model = None
    if config.init_from:
        model = jax.device_put(initial_weights(config, rows), places.model)
    return compiled_init(config, places)(model)


def initial_weights(config: Train, rows: Rows | None):
    """The weights that config.init_from names, in f32, as this run's model: theta and length may differ, shapes not."""
    found = weights.read(config.init_from, "float32")
    theirs, ours = (dataclasses.asdict(m) for m in (found.config, config.model))
    free = {"rope_theta", "max_position_embeddings", "initializer_range"}
    free |= {f"{name}_token_id" for name in ("bos", "eos", "pad")}
    differ = [f"model.{k} = {ours[k]} (there {theirs[k]})" for k in ours if k not in free and ours[k] != theirs[k]]
    require(not differ, f"init_from = {config.init_from} has another architecture: {', '.join(differ)}")
    for shards in rows.sources.values() if rows else ():
        weights.check_tokenizer(found, shards)
    shape = abstract_state(config).model
    return jax.tree.unflatten(jax.tree.structure(shape), jax.tree.leaves(found.model))
