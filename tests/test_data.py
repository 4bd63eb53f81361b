"""The batch at step n: exact mixtures, every token once an epoch, any resume exact."""

from collections import Counter

import corpus
import jax
import numpy as np
import pytest

from smoljax import sharding
from smoljax.config import Data, Mesh
from smoljax.data import Rows, Windows, batches, slots
from smoljax.errors import DataError, UsageError
from smoljax.loss import IGNORE

V, T = 50, 16


@pytest.fixture
def docs():
    return corpus.documents(60, V)


def rows_of(folder, **changes):
    return Rows(Data(sources={str(folder): 1.0}, seq_len=T, **changes), V)


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
    rows = Rows(Data(sources={str(f): w for f, w in zip(folders, (0.5, 0.3, 0.2), strict=True)}, seq_len=T), V)
    place = Counter()
    for r in range(2000):
        k = int(rows.slots[r % 10_000])
        assert rows.given(r)[k] == place[k]
        place[k] += 1
    assert rows.given(25_000).tolist() == [12_500, 7_500, 5_000]
    assert rows.epochs(25_000)[str(folders[1])] == 7_500 / len(rows.windows[1])


def test_rows_of_a_mixture_come_from_their_sources(tmp_path):
    """Three sources of disjoint ids: what a row holds says where it came from."""
    weights, folders = (0.5, 0.3, 0.2), []
    for k, name in enumerate("abc"):
        docs = [[1 + 16 * k + t % 16 for t in d] for d in corpus.documents(40 + k, V, seed=k)]
        folders.append(corpus.write(tmp_path / name, docs, V))
    rows = Rows(Data(sources={str(f): w for f, w in zip(folders, weights, strict=True)}, seq_len=T), V)
    given, seen = Counter(), [Counter() for _ in folders]
    for r in range(10_000):
        row = rows[r]
        real = row["labels"] != IGNORE
        (k,) = set(((row["labels"][real] - 1) // 16).tolist())
        if given[k] < len(rows.windows[k]):  # the first epoch: each window once
            seen[k][row["labels"].tobytes()] += 1
        given[k] += 1
    assert given == {0: 5000, 1: 3000, 2: 2000}
    for windows, counts in zip(rows.windows, seen, strict=True):
        assert counts == Counter(windows[w]["labels"].tobytes() for w in range(len(windows)))


def test_every_token_is_a_label_once_an_epoch(tmp_path, docs):
    rows = rows_of(corpus.write(tmp_path / "a", docs, V, files=3))
    stream = [t for d in docs for t in d]
    epoch = len(rows.windows[0])
    assert epoch == -(-(len(stream) - 1) // T)
    orders = []
    for first in (0, epoch):
        pairs = Counter()
        for r in range(first, first + epoch):
            row = rows[r]
            real = row["labels"] != IGNORE
            pairs.update(zip(row["tokens"][real].tolist(), row["labels"][real].tolist(), strict=True))
        assert pairs == Counter(zip(stream[:-1], stream[1:], strict=True))
        orders.append([rows.orders[0][r] for r in range(first, first + epoch)])
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
        assert all((ours[r][k] == bare[r][k]).all() for k in ours[r])


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_batches_from_any_step_on_any_mesh_are_the_rows(tmp_path, docs, devices):
    rows = rows_of(corpus.write(tmp_path / "a", docs, V), mask_documents=True)
    mesh = sharding.mesh(Mesh(fsdp=-1), jax.devices()[:devices])
    found = list(batches(rows, 8, 3, 6, sharding.batch_sharding(mesh)))
    assert len(found) == 3
    for n, batch in enumerate(found, 3):
        assert set(batch) == {"tokens", "labels", "segments"}
        for k, value in batch.items():
            assert value.dtype == np.int32 and len(value.sharding.device_set) == devices
            np.testing.assert_array_equal(value, [rows[n * 8 + i][k] for i in range(8)])


def test_less_than_a_row_is_said(tmp_path, docs, caplog):
    rows_of(corpus.write(tmp_path / "a", [[1, 2, 0], [3, 0]], V))
    assert "holds 5 tokens, less than a row of 16" in caplog.text


def test_data_that_does_not_fit_is_named(tmp_path, docs):
    folder = corpus.write(tmp_path / "a", docs, V)
    with pytest.raises(DataError, match=r"token ids up to 49, beyond model.vocab_size = 40"):
        Rows(Data(sources={str(folder): 1.0}, seq_len=T), 40)
    bare = corpus.write(tmp_path / "bare", docs, V, manifest=False)
    windows = Windows(str(bare), T, 40, False)
    with pytest.raises(DataError, match=r"0000\d.ds, token \d+, has id \d+, beyond model.vocab_size = 40"):
        for w in range(len(windows)):
            windows[w]
    other = corpus.write(tmp_path / "other", corpus.documents(9, V), V + 1)
    with pytest.raises(DataError, match="another tokenizer"):
        Rows(Data(sources={str(folder): 1.0, str(other): 1.0}, seq_len=T), V)
    with pytest.raises(UsageError, match="data.sources is empty"):
        Rows(Data(), V)
