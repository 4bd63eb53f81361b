"""Held-out loss against one window after another on one device, on any mesh, in two processes; its mistakes."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest

from smoljax import heldout, sharding
from smoljax.config import Compute, Data, Heldout, Mesh, Model, Optim, Stage, Train
from smoljax.data import Windows
from smoljax.errors import DataError
from smoljax.model import SmolLM, abstract
from smoljax.shards import Shards

V, T, ROWS = 64, 160, 5  # 11 windows: on a mesh of 8 the second batch is half empty
CONFIG = Train(
    model=Model(48, 96, 2, 4, 2, head_dim=12, vocab_size=V, max_position_embeddings=T),
    steps=2,
    data=Data(seq_len=T, batch_size=16),
    optim=Optim(warmup_steps=1),
)
DOCUMENTS = corpus.documents(60, V)
STREAM = [token for document in DOCUMENTS for token in document]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    corpus.write(folder / "train", corpus.documents(20, V, seed=1), V)
    corpus.write(folder / "web", DOCUMENTS, V)
    return folder


def opened(place, masked: bool = False, web: Path | None = None, **settings) -> heldout.HeldoutSet:
    config = replace(CONFIG, data=replace(CONFIG.data, mask_documents=masked))
    config = replace(config, heldout=Heldout({"web": str(web or place / "web")}, **settings))
    return heldout.open_sets(config, [Shards(place / "train")])[0]


def fresh() -> SmolLM:
    """Weights from NumPy: JAX would compile for 10 s what draws them."""
    rng = np.random.default_rng(0)

    def draw(w):
        return w.replace(((len(w.dims) == 1) + 0.1 * rng.standard_normal(w.shape)).astype(np.float32))

    return jax.tree.map(draw, abstract(CONFIG.model), is_leaf=sharding.is_variable)


def placed(sizes: Mesh, devices):
    """The mesh, and a model on it as a training step leaves it."""
    mesh, model = sharding.mesh(sizes, devices), fresh()

    def place(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return mesh, jax.tree.map(place, model, sharding.shardings(model, mesh))


@functools.cache
def one_by_one(masked: bool, count: int):
    """Nats, positions and labels of the first windows: each, or each document within it, alone before the model."""
    model = jax.jit(jax.tree.map(jnp.asarray, fresh()))
    begins = {int(b) for b in np.cumsum([0, *map(len, DOCUMENTS)])}
    nats, positions, labels = [], [], []
    for start in range(0, min(count * T, len(STREAM) - 1), T):
        stop = min(start + T + 1, len(STREAM))
        cuts = [start, *sorted(begins & set(range(start + 1, stop))), stop] if masked else [start, stop]
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            ids = np.array(STREAM[a:b])
            rest = np.zeros(T + 1 - len(ids), int)  # causal: what comes after changes nothing
            logits = np.asarray(model(jnp.asarray([*ids, *rest])[None, :T])[0, : len(ids) - 1], np.float64)
            logits -= logits.max(-1, keepdims=True)
            nats += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]).tolist()
            positions += range(a - start, b - 1 - start)
            labels += ids[1:].tolist()
    return np.array(nats), np.array(positions), labels


def check(found: dict, masked: bool = False, count: int = 11):
    nats, positions, labels = one_by_one(masked, count)
    assert found["tokens"] == len(nats)
    assert found["loss"] == pytest.approx(nats.mean(), abs=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-6)
    size = sum(map(corpus.length, labels))
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / size, abs=1e-6)
    parts = {"0-127": positions < 128, "128-159": positions >= 128}
    assert found["loss_by_position"] == pytest.approx({k: nats[p].mean() for k, p in parts.items()}, abs=1e-6)


# Rows at a time are 5, rounded up to what splits over data x fsdp.
MESHES = {(1, 1, 1): [5, 10, 11], (1, 4, 1): [8, 11], (1, 8, 1): [8, 11], (2, 2, 2): [8, 11]}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_measures_what_one_window_after_another_does(place, sizes, masked):
    what, done = opened(place, masked), []
    assert what.count == len(what.windows) == 11
    mesh, model = placed(Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
    check(heldout.measure(model, what, ROWS, Compute(), mesh, done.append), masked)
    assert done == MESHES[sizes]


def test_a_part_of_a_set_from_its_beginning(place):
    what = opened(place, max_tokens=3 * T - 1)
    assert what.count == 3
    mesh, model = placed(Mesh(), jax.devices())
    check(heldout.measure(model, what, ROWS, Compute(), mesh), count=3)


@pytest.fixture
def compilations():
    """What JAX traces, lowers and compiles from here on."""
    heard = []

    def hear(event, *_, **__):
        heard.extend([event] if "compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield heard
    jax.monitoring.unregister_event_duration_listener(hear)


def test_measured_again_nothing_is_compiled_and_the_model_is_left_alone(place, compilations):
    what = opened(place)
    mesh, model = placed(Mesh(2, 2, 2), jax.devices())
    before = jax.device_get(model)
    first = heldout.measure(model, what, ROWS, Compute(), mesh)
    places = sharding.shardings(model, mesh)
    later = jax.jit(lambda m: jax.tree.map(lambda w: 1.5 * w, m), out_shardings=places)(model)
    assert compilations  # it does hear them
    compilations.clear()
    with jax.set_mesh(mesh):  # as around a run's loop
        other = heldout.measure(later, opened(place), ROWS, Compute(), mesh)
    again = heldout.measure(model, what, ROWS, Compute(), mesh)
    assert compilations == []
    assert again == first and other["loss"] != first["loss"]
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), b)


def test_a_stage_measures_as_it_trains(place):
    sets = Heldout({"web": str(place / "web"), "own": str(place / "train")}, max_tokens=1000)
    stages = (Stage(1, seq_len=320, rope_theta=1e6, mask_documents=True),)
    config = replace(CONFIG, heldout=sets, stages=stages)
    for n, length, masked in ((0, T, False), (1, 2 * T, True)):
        web, own = heldout.open_sets(config.at(n), [Shards(place / "web")])
        assert (web.name, own.name) == ("web", "own")
        assert (web.windows.seq_len, web.windows.mask_documents) == (length, masked)
        assert web.count == -(-1000 // length)
        assert own.count == len(own.windows) == -(-(own.windows.shards.num_tokens - 1) // length)


def test_a_set_that_is_trained_on_is_said(place, caplog):
    opened(place)
    assert "trained on" not in caplog.text
    config = replace(CONFIG, heldout=Heldout({"same": str(place / "web")}))
    heldout.open_sets(config, [Shards(place / "train"), Shards(place / "web")])
    assert f"heldout.sets has same: {place / 'web'}, which is trained on too" in caplog.text


def test_the_record_of_metrics():
    result = {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": None, "tokens": 9, "loss_by_position": {"0-7": 2.5}}
    assert heldout.record("web", result) == {"eval/web/loss": 2.5, "eval/web/loss_by_position": {"0-7": 2.5}}
    assert heldout.record("web", result | {"bits_per_byte": 0.5})["eval/web/bits_per_byte"] == 0.5


def test_shards_without_a_tokenizer_take_that_of_the_training_shards(place, tmp_path):
    bare = corpus.write(tmp_path / "bare", DOCUMENTS, V, manifest=False)
    (bare / "tokenizer.json").unlink()
    assert opened(place, web=bare).lengths.tolist() == [corpus.length(t) for t in range(V)]


def test_bits_per_byte_is_unknown_without_any_tokenizer(place):
    mesh, model = placed(Mesh(), jax.devices())
    found = heldout.measure(model, opened(place)._replace(lengths=None), ROWS, Compute(), mesh)
    assert found["bits_per_byte"] is None and found["loss"] == pytest.approx(one_by_one(False, 11)[0].mean(), abs=1e-6)


def test_sets_that_cannot_be(place, tmp_path):
    corpus.write(tmp_path / "other", corpus.documents(9, 60), 60)
    with pytest.raises(DataError, match="other was made with another tokenizer than .*train"):
        opened(place, web=tmp_path / "other")
    corpus.write(tmp_path / "one", [[0]], V, files=1)
    with pytest.raises(DataError, match="one holds 1 token, expected at least 2"):
        opened(place, web=tmp_path / "one")
    with pytest.raises(DataError, match="no shards at .*none"):
        opened(place, web=tmp_path / "none")
    corpus.write(tmp_path / "ends", [[0]] * 400, V)
    opened(place, web=tmp_path / "ends")
    with pytest.raises(DataError, match="heldout.sets has web: .*ends, where every document is one token long"):
        opened(place, masked=True, web=tmp_path / "ends")


def test_results_that_cannot_be(place, tmp_path):
    mesh, model = placed(Mesh(), jax.devices())
    late = corpus.write(tmp_path / "late", [[0]] * 2 * T + [[1, 2, 0]], V)
    with pytest.raises(DataError, match="no token is predicted here"):
        heldout.measure(model, opened(place, masked=True, web=late, max_tokens=T), ROWS, Compute(), mesh)
    short = opened(place)._replace(lengths=np.ones(V - 1, int))
    with pytest.raises(DataError, match="web holds token id 63, but its tokenizer has ids below 63"):
        heldout.measure(model, short, ROWS, Compute(), mesh)
    broken = jax.tree.map(lambda w: w * float("nan"), model)
    result = heldout.measure(broken, opened(place), ROWS, Compute(), mesh)
    assert np.isnan(result["loss"]) and heldout.record("web", result) == {"eval/web/loss": None}  # as JSON can have it


def test_two_processes_measure_what_one_does_and_read_their_own_rows_alone(place, launcher):
    args, env = (launch.free_port(), str(place)), launch.fake_devices(2)
    processes = [launcher.call("test_heldout:one_of_two", rank, *args, env=env) for rank in range(2)]
    assert [p.code for p in processes] == [0, 0], [p.err for p in processes]
    found = [json.loads(p.file("out").read_text().splitlines()[-1]) for p in processes]  # gloo writes there as well
    assert found[0]["results"] == found[1]["results"]  # bit for bit
    for result in found[0]["results"]:
        check(result)
    (split, whole), (other, whole_too) = found[0]["read"], found[1]["read"]
    assert split == [0, 1, 2, 3, 8, 9, 10] and other == [4, 5, 6, 7]  # 8 rows at a time over 4 devices
    assert whole == whole_too == list(range(11))  # weights are split over the processes, rows are not


def one_of_two(rank: int, port: int, place: str):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    results, read, read_window = [], [], Windows.__getitem__
    for sizes in (Mesh(1, 4, 1), Mesh(1, 1, 4)):
        numbers = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Windows, "__getitem__", lambda self, w, n=numbers: (n.append(w), read_window(self, w))[1])
            mesh, model = placed(sizes, jax.devices())
            results.append(heldout.measure(model, opened(Path(place)), ROWS, Compute(), mesh))
        read.append(numbers)
    print(json.dumps({"results": results, "read": read}))
