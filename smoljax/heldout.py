"""Loss of a model on held-out shards, by position and in bits per byte: for `smoljax evaluate`, and while training.

A set is read from its beginning in windows of T, always the same ones, and nothing of a run's data or RNG is touched.
Each process reads the rows that its own devices hold, and all of them get the same numbers. Nats are summed in f64 on
the host: near 3e6, the sum of a million losses, f32 knows multiples of 0.25 alone.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from smoljax import sharding, tokenizer
from smoljax.config import Compute, Train
from smoljax.data import Windows, held, same_tokenizer
from smoljax.errors import DataError
from smoljax.loss import IGNORE
from smoljax.shards import Shards
from smoljax.step import losses

FILL = {"tokens": 0, "labels": IGNORE, "segments": 0}  # a row without labels, for the last batch


class HeldoutSet(NamedTuple):
    name: str
    windows: Windows
    count: int  # the first so many windows are measured
    lengths: np.ndarray | None  # bytes of text that each id stands for; None where no byte-level tokenizer says it


def open_sets(config: Train, trained: list[Shards]) -> list[HeldoutSet]:
    """The sets of config.heldout, as the run reads its own rows: with its T, its vocabulary and its masking.

    config: one stage's, from Train.at. trained: the shards of the run; a set made with another tokenizer is a
    DataError where both are known. One without a tokenizer.json is taken to have theirs.
    """
    return [open_set(name, folder, config, trained) for name, folder in config.heldout.sets.items()]


def open_set(name: str, folder: str, config: Train, trained: list[Shards]) -> HeldoutSet:
    data = config.data
    windows = Windows(folder, data.seq_len, config.model.vocab_size, data.mask_documents)
    shards = windows.shards
    same_tokenizer([*trained, shards])
    if data.mask_documents and shards.documents == shards.num_tokens:  # now, not at step K
        raise DataError(
            f"heldout.sets has {name}: {folder}, where every document is one token long: with data.mask_documents "
            "no token is predicted; name another folder"
        )
    if shards.fingerprint in [other.fingerprint for other in trained]:
        sharding.say_once(  # stages open it again
            f"heldout.sets has {name}: {folder}, which is trained on too: it tells nothing about text not seen"
        )
    count = min(len(windows), math.ceil(config.heldout.max_tokens / data.seq_len))
    beside = next((s.tokenizer_path for s in [shards, *trained] if s.tokenizer_path), None)
    return HeldoutSet(name, windows, count, beside and tokenizer.byte_lengths(tokenizer.load(beside)))


def measure(
    model, what: HeldoutSet, batch_size: int, compute: Compute, mesh, beat: Callable[[int], None] = lambda done: None
) -> dict:
    """{loss, perplexity, bits_per_byte, tokens, loss_by_position: {"0-127": ...}}; losses in nats per token.

    bits_per_byte is None where the tokenizer does not say bytes, perplexity beyond a double's range. The model is only
    read. With several processes, all call this together, and get the same numbers.

    Args:
      model: its arrays as sharding.shardings(model, mesh) places them; those of a TrainState lie so.
      batch_size: rows at a time, rounded up so that they split over the mesh: a micro-batch fits where training does.
      beat: called with the number of windows done after each batch.
    """
    return summarise(*by_position(model, what, batch_size, compute, mesh, beat))


def record(name: str, result: dict) -> dict:
    """What metrics.jsonl keeps of a result; bits per byte only where it is known."""
    if not math.isfinite(result["loss"]):
        return {f"eval/{name}/loss": None}
    keys = ("loss", "bits_per_byte", "loss_by_position")
    return {f"eval/{name}/{key}": result[key] for key in keys if result[key] is not None}


def by_position(model, what: HeldoutSet, batch_size: int, compute: Compute, mesh, beat):
    """Nats and number of labels at each position, [T] each, and the labels' bytes: 0 where nobody knows."""
    T, ways = what.windows.seq_len, mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-batch_size // ways) * ways
    nats, labels, size = np.zeros(T), np.zeros(T, int), 0
    step = compiled(compute, mesh)
    with jax.set_mesh(mesh):
        for first in range(0, what.count, rows):
            values, ids = jax.device_get(step(model, batch(what, first, rows, sharding.batch_sharding(mesh))))
            nats += values.astype(np.float64).sum(0)
            labels += (ids != IGNORE).sum(0)
            size += 0 if what.lengths is None else text_bytes(what, ids[ids != IGNORE])
            beat(min(first + rows, what.count))
    return nats, labels, size


@functools.cache  # by a run's one or two computes and meshes: measured every K steps, it is compiled at the first
def compiled(compute: Compute, mesh):
    """(model, batch) -> nats and labels, BT each and whole on every device, for any process to read."""

    def step(model, batch):
        return losses(model, batch, compute), batch["labels"]

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def batch(what: HeldoutSet, first: int, rows: int, places: NamedSharding) -> dict:
    """Windows `first` ... of the set as global arrays [rows, T], filled up with rows that have no labels."""
    T = what.windows.seq_len
    keys = ("tokens", "labels", "segments") if what.windows.mask_documents else ("tokens", "labels")
    empty = {k: np.full(T, FILL[k], np.int32) for k in keys}
    mine = [first + r for r in held(places, (rows, T))]
    mine = [what.windows[w] if w < what.count else empty for w in mine]
    local = {k: np.stack([row[k] for row in mine]) for k in keys}
    return {k: jax.make_array_from_process_local_data(places, v, (rows, T)) for k, v in local.items()}


def text_bytes(what: HeldoutSet, ids) -> int:
    if ids.size and ids.max() >= len(what.lengths):
        raise DataError(
            f"{what.windows.shards.path} holds token id {ids.max()}, but its tokenizer has ids below "
            f"{len(what.lengths)}; put the tokenizer.json that it was made with into the folder"
        )
    return int(what.lengths[ids].sum())


def summarise(nats, labels, size: int) -> dict:
    """What `measure` returns, from `by_position`'s sums."""
    if not labels.sum():
        raise DataError("no token is predicted here: every document is one token long; leave out --mask-documents")
    loss = float(nats.sum() / labels.sum())
    edges = [0, *(128 * 2**i for i in range(32) if 128 * 2**i < len(nats)), len(nats)]
    buckets = {
        f"{a}-{b - 1}": float(nats[a:b].sum() / labels[a:b].sum())
        for a, b in zip(edges[:-1], edges[1:], strict=True)
        if labels[a:b].sum()
    }
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,  # e^710 is beyond a double
        "bits_per_byte": float(nats.sum() / math.log(2) / size) if size else None,
        "tokens": int(labels.sum()),
        "loss_by_position": buckets,
    }
