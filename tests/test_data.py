"""The batch at step n: exact mixtures, every token once an epoch, any resume exact."""

import dataclasses
from collections import Counter

import corpus
import jax
import numpy as np
import pytest

from smoljax import sharding
from smoljax.config import Data, Mesh, Model, Optim, Stage, Train
from smoljax.data import Rows, Windows, batches, slots
from smoljax.errors import DataError, UsageError
from smoljax.loss import IGNORE

V, T = 50, 16


@pytest.fixture
def docs():
    return corpus.documents(60, V)


def run_of(sources, stages=(), vocab_size=V, steps=1_000_000, batch_size=8, **data):
    model = Model(8, 8, 1, 1, 1, 8, vocab_size=vocab_size, max_position_embeddings=64, eos_token_id=None)
    model = dataclasses.replace(model, bos_token_id=None)
    data = Data(
        sources={str(f): w for f, w in sources.items()}, seq_len=data.pop("seq_len", T), batch_size=batch_size, **data
    )
    return Train(model=model, steps=steps, data=data, stages=tuple(stages), optim=Optim(warmup_steps=0))


def rows_of(folder, **changes):
    return Rows(run_of({folder: 1.0}, **changes))


def row(rows, r):
    """Row r of a run of one stage."""
    return rows.row(*divmod(r, rows.parts[0].data.batch_size))


def test_mixture_is_exact_over_any_10_000_rows():
    weights = [0.7, 0.15, 0.08, 0.06, 0.01]  # SmolLM1's
    table = slots(weights)
    assert Counter(table.tolist()) == {0: 7000, 1: 1500, 2: 800, 3: 600, 4: 100}
    twice = np.tile(table, 2)
    for start in (0, 1, 4999, 9999):
        assert np.bincount(twice[start : start + 10_000]).tolist() == [7000, 1500, 800, 600, 100]
    # Interleaved: no stretch of 1,000 rows is off by more than one row per source.
    counts = np.array([np.bincount(twice[s : s + 1000], minlength=5) for s in range(0, 10_000, 137)])
    assert np.abs(counts - np.array(weights) * 1000).max() <= 1


def test_weights_that_do_not_divide_still_fill_every_slot():
    assert np.bincount(slots([1, 1, 1])).tolist() == [3334, 3333, 3333]
    with pytest.raises(UsageError, match="leave the source out"):
        slots([1.0, 1e-6])


def test_each_source_walks_on_without_a_gap(tmp_path, docs):
    folders = [corpus.write(tmp_path / name, docs[i * 20 :], V) for i, name in enumerate("abc")]
    rows = Rows(run_of(dict(zip(folders, (0.5, 0.3, 0.2), strict=True))))
    (part,), place = rows.parts, Counter()
    for r in range(2000):
        k = int(part.slots[r % 10_000])
        assert part.given(r)[k] == place[k]
        place[k] += 1
    assert part.given(25_000).tolist() == [12_500, 7_500, 5_000]
    assert rows.epochs(25_000 // 8)[str(folders[1])] == 7_500 / len(part.windows[str(folders[1])])
    assert list(rows.consumed(25_000 // 8).values()) == [12_500 * T, 7_500 * T, 5_000 * T]


def test_rows_of_a_mixture_come_from_their_sources(tmp_path):
    """Three sources of disjoint ids: what a row holds says where it came from."""
    weights, folders = (0.5, 0.3, 0.2), []
    for k, name in enumerate("abc"):
        docs = [[1 + 16 * k + t % 16 for t in d] for d in corpus.documents(40 + k, V, seed=k)]
        folders.append(corpus.write(tmp_path / name, docs, V))
    rows = Rows(run_of(dict(zip(folders, weights, strict=True))))
    windows = [rows.parts[0].windows[str(folder)] for folder in folders]
    given, seen = Counter(), [Counter() for _ in folders]
    for r in range(10_000):
        found = row(rows, r)
        real = found["labels"] != IGNORE
        (k,) = set(((found["labels"][real] - 1) // 16).tolist())
        if given[k] < len(windows[k]):  # the first epoch: each window once
            seen[k][found["labels"].tobytes()] += 1
        given[k] += 1
    assert given == {0: 5000, 1: 3000, 2: 2000}
    for source, counts in zip(windows, seen, strict=True):
        assert counts == Counter(source[w]["labels"].tobytes() for w in range(len(source)))


def test_every_token_is_a_label_once_an_epoch(tmp_path, docs):
    rows = rows_of(corpus.write(tmp_path / "a", docs, V, files=3))
    stream = [t for d in docs for t in d]
    (windows,) = rows.parts[0].windows.values()
    (order,), epoch = rows.orders.values(), len(windows)
    assert epoch == -(-(len(stream) - 1) // T)
    orders = []
    for first in (0, epoch):
        pairs = Counter()
        for r in range(first, first + epoch):
            found = row(rows, r)
            real = found["labels"] != IGNORE
            pairs.update(zip(found["tokens"][real].tolist(), found["labels"][real].tolist(), strict=True))
        assert pairs == Counter(zip(stream[:-1], stream[1:], strict=True))
        orders.append([order.window(r, T) for r in range(first, first + epoch)])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(epoch)) and orders[0] != orders[1]


def test_documents_are_kept_apart_by_the_index(tmp_path, docs):
    windows = Windows(str(corpus.write(tmp_path / "a", docs, V)), T, V, mask_documents=True)
    lengths = [len(d) for d in docs]
    number = np.repeat(np.arange(len(docs)), lengths)
    first = np.concatenate([[True], number[1:] != number[:-1]])  # tokens that begin a document are predicted by nobody
    seen = 0
    for w in range(len(windows)):
        row, start = windows[w], w * T
        n = min(T, len(number) - 1 - start)
        inside = number[start : start + n]
        assert (row["segments"][:n] == inside - inside[0] + 1).all()
        assert ((row["labels"][:n] == IGNORE) == first[start + 1 : start + 1 + n]).all()
        assert (row["labels"][n:] == IGNORE).all() and (row["tokens"][n:] == 0).all()
        seen += n
    assert seen == sum(lengths) - 1


def test_bare_datatrove_shards_give_the_same_rows(tmp_path, docs, caplog):
    ours, bare = (rows_of(corpus.write(tmp_path / str(m), docs, V, manifest=m)) for m in (True, False))
    assert "no manifest.json" in caplog.text
    for r in range(50):
        assert all((row(ours, r)[k] == row(bare, r)[k]).all() for k in row(ours, r))


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_batches_from_any_step_on_any_mesh_are_the_rows(tmp_path, docs, devices):
    rows = rows_of(corpus.write(tmp_path / "a", docs, V), mask_documents=True)
    mesh = sharding.mesh(Mesh(fsdp=-1), jax.devices()[:devices])
    found = list(batches(rows, 3, 6, sharding.batch_sharding(mesh)))
    assert len(found) == 3
    for n, batch in enumerate(found, 3):
        assert set(batch) == {"tokens", "labels", "segments"}
        for k, value in batch.items():
            assert value.dtype == np.int32 and len(value.sharding.device_set) == devices
            np.testing.assert_array_equal(value, [rows.row(n, i)[k] for i in range(8)])


def test_less_than_a_row_is_said(tmp_path, docs, caplog):
    rows_of(corpus.write(tmp_path / "a", [[1, 2, 0], [3, 0]], V))
    assert "holds 5 tokens, less than a row of 16" in caplog.text


def test_data_that_does_not_fit_is_named(tmp_path, docs):
    folder = corpus.write(tmp_path / "a", docs, V)
    with pytest.raises(DataError, match=r"token ids up to 49, beyond model.vocab_size = 40"):
        Rows(run_of({folder: 1.0}, vocab_size=40))
    bare = corpus.write(tmp_path / "bare", docs, V, manifest=False)
    windows = Windows(str(bare), T, 40, False)
    with pytest.raises(DataError, match=r"0000\d.ds, token \d+, has id \d+, beyond model.vocab_size = 40"):
        for w in range(len(windows)):
            windows[w]
    other = corpus.write(tmp_path / "other", corpus.documents(9, V), V + 1)
    with pytest.raises(DataError, match="another tokenizer"):
        Rows(run_of({folder: 1.0, other: 1.0}))
    with pytest.raises(UsageError, match="data.sources is empty"):
        Rows(run_of({}))


def read_of(rows, updates):
    """By source: the stream positions of the labels that `updates` batches predict, in order. Tokens are unique."""
    found = {name: [] for name in rows.names}
    for n in range(updates):
        part = rows.part(n)
        for i in range(part.data.batch_size):
            labels = rows.row(n, i)["labels"]
            labels = labels[labels != IGNORE]
            k = int(labels[0]) // 10_000
            assert (labels // 10_000 == k).all() and (np.diff(labels) == 1).all()  # one stretch of one source
            found[rows.names[k]].append((int(labels[0]) % 10_000, len(labels)))
    return found


def test_a_source_goes_on_where_the_last_stage_stopped(tmp_path):
    """Streams of distinct ids: source k holds 10,000 k, 10,000 k + 1, ..., so a label says where it came from."""
    sizes, folders = (1_000, 777), []
    for k, size in enumerate(sizes):
        folders.append(corpus.write(tmp_path / "ab"[k], [list(range(10_000 * k, 10_000 * k + size))], 50_000, 1))
    a, b = map(str, folders)
    stages = [
        Stage(start=7, seq_len=32, sources={b: 0.5, a: 0.5}),  # 16 rows of 16, then 8 rows of 32
        Stage(start=10, sources={a: 1.0}),
        Stage(start=14, seq_len=16),
    ]
    config = run_of({a: 0.75, b: 0.25}, stages, vocab_size=50_000, batch_size=16, steps=17)
    rows = Rows(config)
    assert [(p.data.seq_len, p.data.batch_size) for p in rows.parts] == [(16, 16), (32, 8), (32, 8), (16, 16)]
    assert rows.chunk == 32 and list(rows.sources) == [a, b]
    found = read_of(rows, 17)
    labels = {a: 999, b: 776}
    for name in (a, b):
        # Each label once in the first epoch, but for what a change of length left out: an odd number of windows of 16.
        pieces, first, left = found[name], Counter(), sum(part.skipped[name] for part in rows.parts)
        for at, size in pieces:
            if sum(first.values()) + left >= labels[name]:
                break
            first.update(range(at, at + size))
        assert set(first.values()) == {1} and sum(first.values()) >= min(labels[name], sum(s for _, s in pieces)) - left
        assert left < 32 and all(0 <= part.skipped[name] < part.data.seq_len for part in rows.parts)
    # By hand: 7 batches give a 84 rows of 16 (63 windows an epoch: at window 21 of the second), b 28.
    assert rows.parts[1].skipped == {a: 16, b: 0}
    assert rows.consumed(7) == {a: 84 * 16, b: 28 * 16}
    assert rows.consumed(10) == {a: 84 * 16 + 12 * 32, b: 28 * 16 + 12 * 32}
    for n in range(18):
        assert sum(rows.consumed(n).values()) == 256 * n
    assert rows.parts[1].read(10)[a] == 32 + 11 + 12  # an epoch of 32, 21 windows of 16 rounded up to 11 of 32, 12 read


def test_one_folder_has_one_name(tmp_path, docs):
    """By another it would be another source, read from its beginning."""
    folder = corpus.write(tmp_path / "web", docs, V)
    with pytest.raises(UsageError, match="web and .*web/ are one folder; name it alike in all stages"):
        Rows(run_of({folder: 1.0}, stages=[Stage(3, sources={f"{folder}/": 1.0})]))


def test_a_stage_has_its_own_mixture_exactly(tmp_path):
    a, b, c = (str(corpus.write(tmp_path / n, corpus.documents(40, V, seed=i), V)) for i, n in enumerate("abc"))
    rows = Rows(run_of({a: 0.9, b: 0.1}, [Stage(start=1_003, sources={a: 0.745, b: 0.2, c: 0.055})], batch_size=10))
    second = rows.parts[1]
    names = [second.names[second.slots[r % 10_000]] for r in range(25_000)]
    for start in (0, 10_000):  # aligned
        assert Counter(names[start : start + 10_000]) == {a: 7_450, b: 2_000, c: 550}
    for start in (1, 777, 9_999, 14_321):  # any other: to 0.1%
        counts = Counter(names[start : start + 10_000])
        assert all(abs(counts[n] - 10_000 * w) <= 10 for n, w in ((a, 0.745), (b, 0.2), (c, 0.055)))
    assert rows.consumed(1_003)[c] == 0 and rows.consumed(2_003)[c] == 550 * T


def test_batches_change_shape_between_stages(tmp_path, docs):
    folder = corpus.write(tmp_path / "a", docs, V)
    rows = Rows(run_of({folder: 1.0}, [Stage(start=3, seq_len=32, mask_documents=True)], batch_size=16))
    found = list(batches(rows, 2, 5, sharding.batch_sharding(sharding.mesh(Mesh()))))
    assert [b["tokens"].shape for b in found] == [(16, 16), (8, 32), (8, 32)]
    assert ["segments" in b for b in found] == [False, True, True]
    for n, batch in enumerate(found, 2):
        for k, value in batch.items():
            np.testing.assert_array_equal(value, [rows.row(n, i)[k] for i in range(len(value))])
    resumed = list(batches(rows, 4, 5, sharding.batch_sharding(sharding.mesh(Mesh()))))
    np.testing.assert_array_equal(resumed[0]["tokens"], found[2]["tokens"])
