"""The batch at step n is integer arithmetic on (config, shards, n): no iterator is ever saved, any resume is exact.

Row i of batch n is row r = (n - start) * B + i of its stage:
- its source: a table of 10,000 slots, weights rounded to 1e-4 and interleaved; source = slots[r % 10000], so any 10,000
  rows in a row have the exact mixture. How many rows that source gave before is a prefix count.
- its window: the source's tokens in chunks of C, the run's longest T, in an order that Grain's index shuffle permutes
  each epoch; windows of T walk through the chunks. The label of a window's last token is the next token on disk, so
  every token but a source's first is a label exactly once an epoch; the last window is padded.
- its segments, if documents are masked, from the shards' index: a document's first token is then no label either.
A new stage goes on where the last one stopped in each source, rounded up to its own T; what that leaves out is counted.
"""

import functools
import itertools
import logging
from pathlib import Path

import jax
import numpy as np

from smoljax.config import Train
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


class Order:
    """In which order a source's windows are read: whole chunks of C shuffled anew each epoch, then what is left."""

    def __init__(self, num_tokens: int, chunk: int, seed: int):
        import grain  # here, not above: tables and windows serve machines without Grain

        self.labels, self.chunk, self.chunks = num_tokens - 1, chunk, (num_tokens - 1) // chunk
        # Grain seeds epoch e with seed + e.
        self.shuffled = grain.MapDataset.range(self.chunks).shuffle(seed=seed) if self.chunks else None

    def window(self, g: int, T: int) -> int:
        """The source's g-th window of T since its first epoch began -> its number in the stream."""
        epoch, i = divmod(g, -(-self.labels // T))
        per = self.chunk // T
        if i >= self.chunks * per:
            return i
        return self.shuffled[epoch * self.chunks + i // per] * per + i % per

    def go_on(self, g: int, T: int, new: int) -> tuple[int, int]:
        """After g windows of T, the next of `new` tokens: its number, and how many labels are left out before it."""
        epoch, i = divmod(g, -(-self.labels // T))
        at, windows = i * T, -(-self.labels // new)
        first = -(-at // new)
        return epoch * windows + first, min(first * new, self.labels) - at


class Part:
    """The rows of one stage: which source each is from, and where every source goes on."""

    def __init__(self, start: int, config: Train, windows: dict, base: dict, skipped: dict):
        self.start, self.data = start, config.data
        self.names, self.windows = list(config.data.sources), windows  # by name
        self.base = base  # by name: windows of this T before the stage, had all been of this T
        self.skipped = skipped  # by name: labels left out where this stage begins
        self.slots = slots(list(config.data.sources.values()))
        # before[s][k]: how many of the slots before s are source k's; before[SLOTS] is the whole table's count.
        before = np.cumsum(np.eye(len(self.names), dtype=np.int64)[self.slots], axis=0)
        self.before = np.concatenate([np.zeros_like(before[:1]), before])

    def given(self, rows: int) -> np.ndarray:
        """How many of the stage's first `rows` rows each source gave."""
        return rows // SLOTS * self.before[-1] + self.before[rows % SLOTS]

    def read(self, n: int) -> dict[str, int]:
        """By name: windows since the source's first epoch, as this stage stands before update n."""
        rows = (n - self.start) * self.data.batch_size
        return self.base | {k: self.base[k] + int(g) for k, g in zip(self.names, self.given(rows), strict=True)}


class Rows:
    """Row i of batch n of a run, for any n and i."""

    def __init__(self, config: Train):
        datas = [config.at(start).data for start in config.starts]
        require(
            all(data.sources for data in datas),
            "data.sources is empty; name a folder made by `smoljax prepare`: data.sources=FOLDER",
        )
        self.names = list(dict.fromkeys(name for data in datas for name in data.sources))
        folders = [Path(name).resolve() for name in self.names]
        twice = [name for name, folder in zip(self.names, folders, strict=True) if folders.count(folder) > 1]
        require(not twice, f"{' and '.join(twice)} are one folder; name it alike in all stages, or it is read anew")
        self.chunk, self.parts, opened = config.chunk, [], {}
        for start, data in zip(config.starts, datas, strict=True):
            kind = (data.seq_len, data.mask_documents)
            for name in self.names:
                if (name, *kind) not in opened:
                    opened[name, *kind] = Windows(name, kind[0], config.model.vocab_size, kind[1])
            windows = {name: opened[name, *kind] for name in self.names}
            if not self.parts:  # sources are kept 2^20 epochs apart
                seeds = [(config.data.seed + (k << 20)) % 2**32 for k in range(len(self.names))]
                sizes = [windows[name].shards.num_tokens for name in self.names]
                orders = [Order(n, self.chunk, seed) for n, seed in zip(sizes, seeds, strict=True)]
                self.orders = dict(zip(self.names, orders, strict=True))
                base = skipped = dict.fromkeys(self.names, 0)
            else:
                last = self.parts[-1]
                found = {
                    k: self.orders[k].go_on(g, last.data.seq_len, data.seq_len) for k, g in last.read(start).items()
                }
                base, skipped = ({k: pair[i] for k, pair in found.items()} for i in (0, 1))
            self.parts.append(Part(start, config.at(start), windows, base, skipped))
        self.sources = {name: self.parts[0].windows[name].shards for name in self.names}
        same_tokenizer(list(self.sources.values()))

    @functools.cached_property
    def samples(self) -> dict[str, str]:
        """By name, a hash of samples of each source."""
        return {name: shards.sample() for name, shards in self.sources.items()}

    def part(self, n: int) -> Part:
        """The stage that batch n belongs to."""
        return next(part for part in reversed(self.parts) if part.start <= n)

    def row(self, n: int, i: int) -> dict[str, np.ndarray]:
        """{tokens T, labels T[, segments T]}, int32."""
        part = self.part(n)
        r = (n - part.start) * part.data.batch_size + i
        name = part.names[part.slots[r % SLOTS]]
        g = part.base[name] + int(part.given(r)[part.slots[r % SLOTS]])
        return part.windows[name][self.orders[name].window(g, part.data.seq_len)]

    def consumed(self, n: int) -> dict[str, int]:
        """Tokens that each source gave to the first n batches, padding included: their sum is that of the batches."""
        tokens = dict.fromkeys(self.names, 0)
        for part, stop in zip(self.parts, [*(p.start for p in self.parts[1:]), n], strict=True):
            rows = max(min(stop, n) - part.start, 0) * part.data.batch_size
            for name, given in zip(part.names, part.given(rows), strict=True):
                tokens[name] += int(given) * part.data.seq_len
        return tokens

    def epochs(self, n: int) -> dict[str, float]:
        """Passes over each source after n batches."""
        part = self.part(max(n - 1, 0))
        return {name: read / len(part.windows[name]) for name, read in part.read(n).items()}


def same_tokenizer(sources: list[Shards]):
    known = [shards for shards in sources if shards.tokenizer_sha256]
    for first, other in itertools.pairwise(known):
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(
                f"{other.path} was made with another tokenizer than {first.path} "
                f"(sha256 {other.tokenizer_sha256[:12]} and {first.tokenizer_sha256[:12]}); prepare both with one"
            )


def batches(rows: Rows, start: int, stop: int, sharding):
    """Batches number start ... stop - 1 as global arrays; each process reads the rows that its own devices hold."""
    import grain

    edges = [start, *(part.start for part in rows.parts if start < part.start < stop), stop]
    for first, last in itertools.pairwise(edges):  # the shape of a batch changes between stages alone
        data = rows.part(first).data
        shape = (data.batch_size, data.seq_len)
        mine = held(sharding, shape)
        m = len(mine)
        local = grain.MapDataset.range(first * m, last * m)
        local = local.map(lambda j, mine=mine, m=m: rows.row(j // m, mine[j % m])).batch(m)
        # Grain's default of 16 read threads is 10x slower than none on a memory map (2 against 20 M tokens/s).
        for batch in local.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)):
            yield {k: jax.make_array_from_process_local_data(sharding, v, shape) for k, v in batch.items()}


def held(sharding, shape) -> list[int]:
    """The rows of a global array BT that lie on this process's devices."""
    places = sharding.addressable_devices_indices_map(shape).values()
    return sorted({r for place in places for r in range(shape[0])[place[0]]})
