"""The batch at step n is integer arithmetic on (config, shards, n): no iterator is ever saved, any resume is exact.

Row r of a run (batch n holds rows n*B ... n*B + B - 1):
- its source: a table of 10,000 slots, weights rounded to 1e-4 and interleaved; source = slots[r % 10000], so any 10,000
  rows in a row have the exact mixture. How many rows that source gave before is a prefix count.
- its window: the source's tokens in windows of T, in an order that Grain's index shuffle permutes each epoch.
  The label of a window's last token is the next token on disk, so every token but a source's first is a label exactly
  once an epoch; the last window is padded.
- its segments, if documents are masked, from the shards' index: a document's first token is then no label either.
"""

import itertools
import logging

import jax
import numpy as np

from smoljax.config import Data
from smoljax.errors import DataError, require
from smoljax.loss import IGNORE
from smoljax.shards import Shards

SLOTS = 10_000


def slots(weights: list[float]) -> np.ndarray:
    """Source of each of 10,000 rows: exact counts by largest remainder, each source spread evenly."""
    share = np.array(weights) / sum(weights) * SLOTS
    counts = np.floor(share).astype(int)
    counts[np.argsort(counts - share, kind="stable")[: SLOTS - counts.sum()]] += 1
    require(counts.min() > 0, f"data.sources weight {min(weights)} is below 1/{SLOTS} of the sum; leave the source out")
    source = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return source[np.argsort(place, kind="stable")]


class Windows:
    """One folder of shards as windows of T tokens with labels, by number; the last one is padded."""

    def __init__(self, folder: str, seq_len: int, vocab_size: int, mask_documents: bool):
        self.shards = Shards(folder)
        self.seq_len, self.vocab_size, self.mask_documents = seq_len, vocab_size, mask_documents
        highest = self.shards.max_token_id
        if highest is not None and highest >= vocab_size:
            raise DataError(
                f"{folder} holds token ids up to {highest}, beyond model.vocab_size = {vocab_size}; "
                "use the model's own tokenizer for `smoljax prepare`, or set model.vocab_size"
            )
        if self.shards.num_tokens < 2:
            raise DataError(f"{folder} holds {self.shards.num_tokens} token, expected at least 2")
        if self.shards.num_tokens <= seq_len:
            logging.getLogger("smoljax").warning(
                f"{folder} holds {self.shards.num_tokens} tokens, less than a row of {seq_len}: the rest is padding"
            )

    def __len__(self) -> int:
        return -(-(self.shards.num_tokens - 1) // self.seq_len)

    def __getitem__(self, w: int) -> dict[str, np.ndarray]:
        T = self.seq_len
        start, stop = w * T, min(w * T + T + 1, self.shards.num_tokens)
        ids = self.shards.read(start, stop)
        if ids.max() >= self.vocab_size:  # XLA would clamp or invent: this is the last place that can tell
            i = int(np.argmax(ids >= self.vocab_size))
            raise DataError(
                f"{self.shards.locate(start + i)}, has id {ids[i]}, beyond model.vocab_size = {self.vocab_size}"
            )
        pad = (0, T + 1 - len(ids))
        tokens = np.pad(ids, pad)[:T]
        labels = np.pad(ids, pad, constant_values=IGNORE)[1:]
        if not self.mask_documents:
            return {"tokens": tokens, "labels": labels}
        segments = np.pad(self.shards.segments(start, stop), pad)  # padding is document 0
        labels = np.where(segments[1:] == segments[:-1], labels, IGNORE)
        return {"tokens": tokens, "labels": labels, "segments": segments[:T]}


class Rows:
    """Row r of a run, for any r."""

    def __init__(self, data: Data, vocab_size: int):
        import grain  # here, not above: tables and windows serve machines without Grain

        require(
            bool(data.sources), "data.sources is empty; name a folder made by `smoljax prepare`: data.sources=FOLDER"
        )
        self.names = list(data.sources)
        self.windows = [Windows(f, data.seq_len, vocab_size, data.mask_documents) for f in self.names]
        same_tokenizer(self.windows)
        self.slots = slots(list(data.sources.values()))
        # before[s][k]: how many of the slots before s are source k's; before[SLOTS] is the whole table's count.
        self.before = np.cumsum(np.eye(len(self.names), dtype=np.int64)[self.slots], axis=0)
        self.before = np.concatenate([np.zeros_like(self.before[:1]), self.before])
        # Grain seeds epoch e with seed + e: sources are kept 2^20 epochs apart.
        seeds = [(data.seed + (k << 20)) % 2**32 for k in range(len(self.names))]
        self.orders = [grain.MapDataset.range(len(w)).shuffle(seed=s) for w, s in zip(self.windows, seeds, strict=True)]

    def given(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows each source gave."""
        return rows // SLOTS * self.before[-1] + self.before[rows % SLOTS]

    def __getitem__(self, r: int) -> dict[str, np.ndarray]:
        k = int(self.slots[r % SLOTS])
        return self.windows[k][self.orders[k][int(self.given(r)[k])]]

    def epochs(self, rows: int) -> dict[str, float]:
        """Passes over each source after `rows` rows."""
        return {n: float(g / len(w)) for n, g, w in zip(self.names, self.given(rows), self.windows, strict=True)}

    def fingerprints(self) -> dict[str, str]:
        """What a resumed run must find again, in this order."""
        return {n: w.shards.fingerprint for n, w in zip(self.names, self.windows, strict=True)}


def same_tokenizer(windows: list[Windows]):
    known = [w.shards for w in windows if w.shards.tokenizer_sha256]
    for first, other in itertools.pairwise(known):
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(
                f"{other.path} was made with another tokenizer than {first.path} "
                f"(sha256 {other.tokenizer_sha256[:12]} and {first.tokenizer_sha256[:12]}); prepare both with one"
            )


def batches(rows, batch_size: int, start: int, stop: int, sharding):
    """Batches number start ... stop - 1 as global arrays; each process reads the rows that its own devices hold."""
    import grain

    shape = (batch_size, rows[0]["tokens"].shape[0])
    held = sharding.addressable_devices_indices_map(shape).values()
    mine = sorted({r for index in held for r in range(batch_size)[index[0]]})
    m = len(mine)
    local = grain.MapDataset.range(start * m, stop * m).map(lambda i: rows[i // m * batch_size + mine[i % m]]).batch(m)
    # Grain's default of 16 read threads is 10x slower than none on a memory map (2 against 20 M tokens/s).
    for batch in local.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)):
        yield {k: jax.make_array_from_process_local_data(sharding, v, shape) for k, v in batch.items()}
