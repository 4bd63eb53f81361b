"""Eight fake devices do what one does, with nothing replicated that could be split."""

import functools
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from smoljax import sharding
from smoljax.config import Compute, Data, Mesh, Model, Optim, Train
from smoljax.errors import UsageError
from smoljax.step import abstract_state, compiled_init, compiled_step, train_step

CONFIG = Train(
    model=Model(32, 64, 2, 8, 4, head_dim=8, vocab_size=96, max_position_embeddings=32),
    steps=10,
    data=Data(seq_len=32, batch_size=16),
    optim=Optim(lr=1e-2, warmup_steps=2, decay_steps=2),
    init_std=0.1,
)


def slowly(*meshes):
    """For `make test-slow` alone: compiling for eight devices takes 10 s."""
    return [pytest.param(sizes, marks=pytest.mark.slow) for sizes in meshes]


def batch(config: Train, n: int) -> dict:
    rows, T = config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(n).integers(0, config.model.vocab_size, (rows, T + 1), np.int32)
    segments = 1 + (np.arange(T) >= np.arange(rows)[:, None]).astype(np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segments": segments}


def start(config: Train, devices):
    """The mesh, a fresh state on it and the step, as the pretrain program makes them."""
    mesh = sharding.mesh(config.mesh, devices)
    places = sharding.shardings(abstract_state(config), mesh)
    return mesh, compiled_init(config, places)(), compiled_step(config, places)


def train(config: Train, devices, steps: int = 5):
    mesh, state, step = start(config, devices)
    losses = []
    with jax.set_mesh(mesh):
        for n in range(steps):
            state, metrics = step(state, jax.device_put(batch(config, n), sharding.batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def on_one_device(kind: str = "adamw"):
    """What the meshes are compared with."""
    optim = replace(CONFIG.optim, kind=kind)
    state, losses = train(replace(CONFIG, optim=optim, mesh=Mesh(1, 1, 1)), jax.devices()[:1])
    assert losses[-1] < losses[0] - 0.1  # it learns: equal losses are not those of a model that stands still
    return jax.device_get(state.model), losses


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, -1, 1), *slowly((1, 1, 8), (1, 8, 1), (1, 4, 2))], ids=str)
def test_eight_devices_are_one(sizes):
    config = replace(CONFIG, mesh=Mesh(*sizes))
    state, losses = train(config, jax.devices())
    model, expected = on_one_device()
    np.testing.assert_allclose(losses, expected, atol=5e-6, rtol=0)
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_eight_devices_are_one_with_muon(sizes):
    """A matrix that lies on eight devices is orthogonalised as a whole, not piece by piece."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, kind="muon"), mesh=Mesh(*sizes))
    state, losses = train(config, jax.devices())
    model, expected = on_one_device("muon")
    np.testing.assert_allclose(losses, expected, atol=5e-6, rtol=0)
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, atol=1e-4)


def test_accumulation_remat_and_unroll_on_a_mesh():
    config = replace(CONFIG, mesh=Mesh(2, 2, 2), accumulate=4, compute=Compute(remat="full", unroll=2))
    _, losses = train(config, jax.devices())
    np.testing.assert_allclose(losses, on_one_device()[1], atol=5e-6, rtol=0)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_moments_lie_like_their_weights(sizes):
    _, state, _ = start(replace(CONFIG, mesh=Mesh(*sizes)), jax.devices())
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    data, fsdp, tensor = sizes
    for w, mu, nu in zip(*(jax.tree.leaves(tree) for tree in (state.model, adam.mu, adam.nu)), strict=True):
        assert mu.sharding == w.sharding == nu.sharding
        pieces = {s.data.shape for s in (*w.addressable_shards, *mu.addressable_shards, *nu.addressable_shards)}
        assert len(pieces) == 1
        # Every weight has an axis D, split over fsdp; all matrices have one more, split over tensor.
        ways = fsdp * (tensor if w.ndim > 2 or w.shape[0] == CONFIG.model.vocab_size else 1)
        assert np.prod(pieces.pop()) * ways == w.size, w.shape


@pytest.mark.parametrize(
    "sizes, mu_dtype",
    [((1, 8, 1), "float32"), ((2, 2, 2), "bfloat16"), pytest.param((1, 4, 2), "float32", marks=pytest.mark.slow)],
    ids=str,
)
def test_muons_momentum_lies_like_its_weights(sizes, mu_dtype):
    """Each weight has a momentum or Adam's moments, on its own places before a step and after."""
    optim = replace(CONFIG.optim, kind="muon", mu_dtype=mu_dtype)
    config = replace(CONFIG, optim=optim, mesh=Mesh(*sizes))
    mesh, state, step = start(config, jax.devices())

    def by_letters(tree):
        leaves = jax.tree.leaves_with_path(tree, is_leaf=sharding.is_variable)
        return {jax.tree_util.keystr(p, simple=True, separator="."): w for p, w in leaves if sharding.is_variable(w)}

    def check(state):
        weights, moments = by_letters(state.model), by_letters(state.opt_state)
        matrices = {name for name, w in weights.items() if len(w.dims) > 1 and w.dims != "VD"}
        muon, adam = "1.inner_states.muon.inner_state.0.mu.", "1.inner_states.adamw.inner_state."
        expected = {muon + name: w for name, w in weights.items() if name in matrices}
        for moment in ("mu.", "nu."):
            expected |= {adam + moment + name: w for name, w in weights.items() if name not in matrices}
        assert moments.keys() == expected.keys() and len(matrices) == 7
        for name, w in expected.items():
            assert moments[name].sharding == w.sharding and moments[name].dims == w.dims, name
            assert moments[name].dtype == (mu_dtype if ".mu." in name else "float32")
            pieces = {s.data.shape for x in (w, moments[name]) for s in x.addressable_shards}
            ways = sizes[1] * (sizes[2] if len(w.dims) > 1 else 1)
            assert len(pieces) == 1 and np.prod(pieces.pop()) * ways == w.size, name

    check(state)
    with jax.set_mesh(mesh):
        b = jax.device_put(batch(config, 0), sharding.batch_sharding(mesh))
        old, (state, _) = jax.tree.leaves(state), step(state, b)
    check(state)
    assert all(x.is_deleted() for x in old)  # donated: the new state lies in the old one's memory


def test_state_is_split_evenly_and_stays_where_it_lies():
    """No device holds more than its eighth of the state, before and after a step."""
    mesh, state, step = start(replace(CONFIG, mesh=Mesh(1, 8, 1)), jax.devices())

    def places(state):
        return [(x.sharding, x.addressable_shards[0].data.nbytes) for x in jax.tree.leaves(state)]

    before = places(state)
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    assert sum(nbytes for _, nbytes in before) < whole / 8 + 64  # the counters are replicated
    with jax.set_mesh(mesh):
        for n in range(2):
            state, _ = step(state, jax.device_put(batch(CONFIG, n), sharding.batch_sharding(mesh)))
            assert places(state) == before


def test_donated_state_is_reused():
    """The step writes the new state into the old one's memory: at 12 bytes a parameter it must not exist twice."""
    for sizes in ((1, 1, 1), (1, 8, 1)):
        config = replace(CONFIG, mesh=Mesh(*sizes))
        mesh, state, step = start(config, jax.devices()[: abs(np.prod(sizes))])
        own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        with jax.set_mesh(mesh):
            b = jax.device_put(batch(config, 0), sharding.batch_sharding(mesh))
            compiled = step.lower(state, b).compile()
            assert compiled.memory_analysis().alias_size_in_bytes >= own
            old = jax.tree.leaves(state)
            step(state, b)
        assert all(x.is_deleted() for x in old)


def test_steps_compile_once():
    """The new state looks to jit as the old one did: its places, dtypes and weak types."""
    mesh, state, _ = start(replace(CONFIG, mesh=Mesh(1, 8, 1)), jax.devices())
    step = compiled_step(CONFIG, sharding.shardings(state, mesh))
    with jax.set_mesh(mesh):
        for n in range(5):
            state, _ = step(state, jax.device_put(batch(CONFIG, n), sharding.batch_sharding(mesh)))
    assert step._cache_size() == 1


def test_the_program_does_not_grow_with_depth():
    """Layers are a loop, and so is what they leave to the backward pass: 8 compile as fast as 2, unless unrolled."""

    def lowered(layers: int, unroll: int = 1):
        model = replace(CONFIG.model, num_hidden_layers=layers)
        config = replace(CONFIG, model=model, compute=Compute(unroll=unroll))
        state = abstract_state(config)
        return jax.jit(functools.partial(train_step, config=config)).lower(state, batch(config, 0))

    def lines(program):
        return len(program.as_text().splitlines())

    two, eight = lowered(2), lowered(8)
    assert lines(two) == lines(eight) < lines(lowered(8, unroll=2)) < lines(lowered(8, unroll=4))
    two, eight = (lines(program.compile()) for program in (two, eight))
    assert abs(two - eight) < two / 200


def test_an_axis_that_does_not_divide_stays_whole_and_says_so_once(caplog):
    """135M's heads: 9 and 3, over 2 devices."""
    sharding.say_once.cache_clear()
    config = replace(
        CONFIG,
        model=Model(36, 64, 2, 9, 3, head_dim=4, vocab_size=96, max_position_embeddings=32),
        mesh=Mesh(1, 4, 2),
    )
    with caplog.at_level(logging.WARNING, "smoljax"):
        state, losses = train(config, jax.devices())
        train(replace(config, z_loss=1e-4), jax.devices(), steps=1)  # a program of its own
    said = [record.getMessage() for record in caplog.records if record.name == "smoljax"]
    assert "axis N of LDNH has size 9, which tensor = 2 does not divide: it stays whole" in said
    assert "axis K of LDKH has size 3, which tensor = 2 does not divide: it stays whole" in said
    assert len(said) == len(set(said))
    assert all(" N of " in s or " K of " in s for s in said), said
    q = state.model.layers.q
    assert q.sharding.spec == P(None, "fsdp", None, None) and state.model.layers.gate.sharding.spec[2] == "tensor"
    alone = replace(config, mesh=Mesh(1, 1, 1))
    np.testing.assert_allclose(losses, train(alone, jax.devices()[:1])[1], atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ((3, 1, 1), "mesh data=3 fsdp=1 tensor=1 needs 3 devices, found 8"),
        ((1, 1, 1), "mesh data=1 fsdp=1 tensor=1 needs 1 devices, found 8"),
        ((4, 4, 1), "mesh data=4 fsdp=4 tensor=1 needs 16 devices, found 8"),
        ((3, -1, 1), "mesh data=3 fsdp=-1 tensor=1 needs 6 devices, found 8"),
        ((4, 4, -1), "mesh data=4 fsdp=4 tensor=-1 needs 16 devices, found 8"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit(sizes, sentence):
    with pytest.raises(UsageError) as e:
        sharding.mesh(Mesh(*sizes))
    assert sentence in str(e.value) and e.value.code == 2


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.ones((4, 8, 32))
    assert sharding.constrain(x, "BTD") is x


def test_every_letter_of_a_weight_is_in_the_alphabet():
    state = abstract_state(CONFIG)
    weights = jax.tree.leaves(state.model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert {letter for w in weights for letter in w.dims} == set("VDNKHF")
    assert all(len(w.shape) - len(w.dims) in (0, 1) for w in weights)  # one more axis where layers are stacked
    assert sharding.WEIGHTS.keys() | sharding.ACTIVATIONS.keys() <= set("BTSDFVLNKGH")
