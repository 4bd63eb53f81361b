"""The schedule at every joint, both optimizers against numpy, and gradient accumulation against one big batch."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from docs.muon import run as report
from smoljax import settings
from smoljax.config import Compute, Data, Model, Optim, Train
from smoljax.errors import UsageError, run
from smoljax.loss import IGNORE, cross_entropy
from smoljax.model import SmolLM
from smoljax.optim import MOMENTUM, RMS, decayed, optimizer, sides, wsd
from smoljax.step import init_state, train_step
from train import pretrain

MODEL = Model(32, 64, 3, 4, 2, head_dim=8, vocab_size=96, max_position_embeddings=32)


def nanotron(o: Optim, steps: int, n: int) -> float:
    """The learning rate of update n as the recipes' own trainer computes it, in Python's doubles."""
    start = steps - o.decay_steps
    if o.warmup_steps == 0 and o.decay_steps == 0:
        return o.lr
    if o.warmup_steps > 0 and n <= o.warmup_steps:
        return o.lr * n / o.warmup_steps
    if n < start:
        return o.lr
    if n < start + o.decay_steps:
        left = {
            "linear": (o.decay_steps - (n - start)) / o.decay_steps,
            "1-sqrt": 1 - math.sqrt((n - start) / o.decay_steps),
            "cosine": (1 + math.cos(math.pi * (n - start) / o.decay_steps)) / 2,
        }[o.decay]
        return o.min_lr + (o.lr - o.min_lr) * left
    return o.min_lr


def rates(o: Optim, steps: int, at) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(wsd(o, steps)))(jnp.asarray(at, jnp.int32)))


@pytest.mark.parametrize("decay", ["linear", "1-sqrt", "cosine"])
@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
@pytest.mark.parametrize(
    "warmup, decay_steps", [(10, 20), (0, 20), (10, 0), (0, 0), (40, 60), (1, 1), (0, 100), (100, 0)]
)
def test_wsd_is_nanotrons_at_every_step(decay, min_lr, warmup, decay_steps):
    o = Optim(lr=3e-3, warmup_steps=warmup, decay_steps=decay_steps, decay=decay, min_lr=min_lr)
    steps = 100
    expected = [nanotron(o, steps, n) for n in range(steps)]
    np.testing.assert_allclose(rates(o, steps, range(steps)), expected, rtol=1e-6, atol=1e-6 * o.lr)


def test_wsd_joints():
    o = Optim(lr=1.0, warmup_steps=4, decay_steps=4, decay="linear", min_lr=0.2)
    found = rates(o, 12, range(13))
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    found = rates(replace(o, decay="1-sqrt", min_lr=0.0), 12, range(8, 13))
    np.testing.assert_allclose(found, [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0], rtol=1e-6, atol=1e-7)
    found = rates(replace(o, decay="cosine", min_lr=0.0), 12, range(8, 13))
    np.testing.assert_allclose(found, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(rates(o, 12, [13, 10**6]), 0.2, rtol=1e-6)  # beyond the end: the floor


@pytest.mark.parametrize(
    "name", ["smollm-135m", "smollm-360m", "smollm-1-7b", "smollm2-135m", "smollm2-360m", "smollm2-1-7b"]
)
def test_wsd_of_the_published_runs(name):
    """Millions of steps in f32: the joints are exact, the rest is within 1e-6 of the peak."""
    c = settings.load(name)
    o, steps = c.optim, c.steps
    start = steps - o.decay_steps
    joints = [
        0,
        1,
        o.warmup_steps - 1,
        o.warmup_steps,
        o.warmup_steps + 1,
        start - 1,
        start,
        start + 1,
        steps - 1,
        steps,
    ]
    some = sorted({*joints, *np.linspace(0, steps, 1001, dtype=int).tolist()})
    np.testing.assert_allclose(
        rates(o, steps, some), [nanotron(o, steps, n) for n in some], rtol=1e-6, atol=1e-6 * o.lr
    )
    assert rates(o, steps, [0, o.warmup_steps, start - 1, start, steps]).tolist() == [0, *[np.float32(o.lr)] * 3, 0]


# ---- AdamW -----------------------------------------------------------------------------------------------------------


def named(tree) -> dict:
    """ "layers.q" -> weight, of a model or of something with its shape."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_weight_decay_mask():
    mask = named(decayed(SmolLM(MODEL, nnx.Rngs(params=0))))
    assert len(mask) == 11
    assert {name for name, on in mask.items() if on} == {f"layers.{w}" for w in "q k v o gate up down".split()}


@pytest.mark.parametrize("on", ["all", "matrices"])
def test_adamw_is_numpys(on):
    """Four updates by hand: clip by the global norm, moments, bias correction, decoupled decay, the schedule."""
    o = Optim(lr=1e-2, warmup_steps=2, decay_steps=1, weight_decay=0.1, weight_decay_on=on, clip=1.0)
    steps = 4
    model = SmolLM(MODEL, nnx.Rngs(params=0))
    tx = optimizer(o)
    state = tx.init(model)
    mask = named(decayed(model))
    w = {name: np.asarray(x, np.float64) for name, x in named(model).items()}
    m = {name: np.zeros_like(x) for name, x in w.items()}
    v = {name: np.zeros_like(x) for name, x in w.items()}
    for n in range(steps):
        scale = [1e-3, 10.0, 1e-3, 1.0][n]  # below the clip and above it
        grads = jax.tree.map(lambda x, n=n, s=scale: s * jax.random.normal(jax.random.key(n), x.shape), model)
        updates, state = jax.jit(tx.update)(grads, state, model)
        model = jax.tree.map(lambda x, u, n=n: x - wsd(o, steps)(n) * u, model, updates)

        g = {name: np.asarray(x, np.float64) for name, x in named(grads).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        lr = nanotron(o, steps, n)
        for name in w:
            clipped = g[name] / max(1.0, norm / o.clip)
            m[name] = o.b1 * m[name] + (1 - o.b1) * clipped
            v[name] = o.b2 * v[name] + (1 - o.b2) * clipped**2
            step = m[name] / (1 - o.b1 ** (n + 1)) / (np.sqrt(v[name] / (1 - o.b2 ** (n + 1))) + o.eps)
            decay = o.weight_decay if on == "all" or mask[name] else 0.0
            w[name] = w[name] - lr * (step + decay * w[name])
        for name, x in named(model).items():
            np.testing.assert_allclose(x, w[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} after update {n}")


# ---- Muon ------------------------------------------------------------------------------------------------------------

HIDDEN = {f"layers.{w}" for w in "q k v o gate up down".split()}


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Jordan's: five steps of a quintic on the singular values of one matrix."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / np.linalg.norm(wide)
    for _ in range(5):
        a = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * a + 2.0315 * a @ a) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def matrix(name: str, layer: np.ndarray) -> np.ndarray:
    """One layer's weight as the matrix that multiplies from the right: D x N H, N H x D."""
    rows = layer.shape[0] if name[-1] in "qkvpe" else layer.size // layer.shape[-1]  # q, k, v, up, gate | o, down
    return layer.reshape(rows, -1)


def drawn(model, n: int, scale: float = 1.0):
    """Gradients, other ones in each weight."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(n), len(leaves))
    return jax.tree.unflatten(tree, [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("on", ["all", pytest.param("matrices", marks=pytest.mark.slow)])
def test_muon_is_numpys_layer_by_layer_and_the_rest_is_adamws(on):
    """Four updates: clip, momentum, each layer's matrix orthogonalised on its own, shape, decay, the schedule."""
    o = Optim(lr=1e-2, warmup_steps=2, decay_steps=1, weight_decay=0.1, weight_decay_on=on, kind="muon")
    steps, plain = 4, replace(o, kind="adamw")
    model = other = SmolLM(MODEL, nnx.Rngs(params=0))
    state, adams = optimizer(o).init(model), optimizer(plain).init(model)
    mask = named(decayed(model))
    w = {name: np.asarray(x, np.float64) for name, x in named(model).items()}
    m = {name: np.zeros_like(w[name]) for name in HIDDEN}
    for n in range(steps):
        grads = drawn(model, n, [1e-3, 10.0, 1e-3, 1.0][n])  # below the clip and above it
        updates, state = jax.jit(optimizer(o).update)(grads, state, model)
        theirs, adams = jax.jit(optimizer(plain).update)(grads, adams, other)
        model, other = (
            jax.tree.map(lambda x, u, n=n: x - wsd(o, steps)(n) * u, *pair)
            for pair in ((model, updates), (other, theirs))
        )
        g = {name: np.asarray(x, np.float64) for name, x in named(grads).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for name in HIDDEN:
            clipped = g[name] / max(1.0, norm / o.clip)
            m[name] = MOMENTUM * m[name] + (1 - MOMENTUM) * clipped
            ahead = MOMENTUM * m[name] / (1 - MOMENTUM ** (n + 2))  # Nesterov's, as optax corrects its bias
            ahead = ahead + (1 - MOMENTUM) * clipped / (1 - MOMENTUM ** (n + 1))
            step = np.empty_like(ahead)
            for layer in range(MODEL.num_hidden_layers):
                flat = matrix(name, ahead[layer])
                step[layer] = (RMS * max(flat.shape) ** 0.5 * newton_schulz(flat)).reshape(ahead[layer].shape)
            w[name] = w[name] - nanotron(o, steps, n) * (step + (0.1 if on == "all" or mask[name] else 0) * w[name])
            np.testing.assert_allclose(named(model)[name], w[name], atol=2e-6, err_msg=f"{name} after update {n}")
        for name in w.keys() - HIDDEN:  # the same bits
            np.testing.assert_array_equal(named(model)[name], named(other)[name], err_msg=f"{name} after update {n}")
        assert n == 0 or all((named(model)[name][...] != named(other)[name][...]).any() for name in HIDDEN)


def test_a_muon_update_is_orthogonal_in_every_layer():
    """Singular values of 0.68 to 1.14 where they should be 1: Jordan's quintic goes for speed; RMS near 0.2."""
    model = SmolLM(MODEL, nnx.Rngs(params=0))
    tx = optimizer(Optim(kind="muon", weight_decay=0.0))
    updates, _ = jax.jit(tx.update)(drawn(model, 0), tx.init(model), model)
    for name in HIDDEN:
        for layer in np.asarray(named(updates)[name][...]):
            flat = matrix(name, layer)
            values = np.linalg.svd(flat / (RMS * max(flat.shape) ** 0.5), compute_uv=False)
            assert values.max() < 1.25, (name, values)
            assert min(flat.shape) == max(flat.shape) or values.min() > 0.6, (name, values)
            assert 0.15 < np.sqrt((flat**2).mean()) < 0.22, name


def test_the_sides_of_every_matrix_are_d_and_the_rest():
    for w in named(SmolLM(MODEL, nnx.Rngs(params=0))).values():
        if decayed(w):
            rows, columns = ("".join(w.dims[axis] for axis in side) for side in sides(w.dims))
            assert rows + columns == w.dims and "D" in (rows, columns)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_first_moment_is_kept_in_mu_dtype(kind):
    """bf16 stays bf16 and costs no more than its rounding; float32, the default, is as if nobody had asked."""
    model = SmolLM(MODEL, nnx.Rngs(params=0))
    found = {}
    for dtype in ("bfloat16", "float32"):
        tx = optimizer(Optim(kind=kind, mu_dtype=dtype))
        state = tx.init(model)
        for n in range(3):
            updates, state = jax.jit(tx.update)(drawn(model, n), state, model)
        leaves = jax.tree.leaves_with_path(state)
        paths = {jax.tree_util.keystr(path, simple=True, separator="."): x.dtype for path, x in leaves}
        assert {d for p, d in paths.items() if ".mu." in p} == {jnp.dtype(dtype)}
        assert sum(".mu." in p for p in paths) == 11
        assert {d for p, d in paths.items() if ".nu." in p} == {jnp.dtype("float32")}
        found[dtype] = named(updates)
    for name, x in found["float32"].items():
        y = found["bfloat16"][name]
        assert y.dtype == jnp.float32 and 0 < np.abs(x[...] - y[...]).max() < 0.06 * np.abs(x[...]).max(), name
    if kind == "adamw":
        o = Optim()
        plain = optax.chain(
            optax.clip_by_global_norm(o.clip),
            optax.scale_by_adam(o.b1, o.b2, o.eps),
            optax.add_decayed_weights(o.weight_decay),
        )
        state = plain.init(model)
        assert jax.tree.structure(state) == jax.tree.structure(optimizer(o).init(model))
        for n in range(3):
            updates, state = jax.jit(plain.update)(drawn(model, n), state, model)
        for name, x in named(updates).items():
            np.testing.assert_array_equal(x, found["float32"][name], err_msg=name)


def test_what_an_optimizer_may_be():
    for wrong, sentence in [
        ({"kind": "sgd"}, "optim.kind is 'sgd', expected adamw or muon"),
        ({"mu_dtype": "float16"}, "optim.mu_dtype is 'float16', expected float32 or bfloat16"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            Optim(**wrong)


@pytest.mark.slow
def test_muon_resumed_is_muon_uninterrupted_and_goes_on_only_as_itself(tmp_path, capsys):
    corpus.write(tmp_path / "shards", corpus.documents(60, 64), 64)
    (tmp_path / "tiny.py").write_text(
        "from smoljax.config import Data, Model, Optim, Train\n"
        "config = Train(\n"
        "    Model(32, 64, 2, 4, 2, head_dim=8, vocab_size=64, max_position_embeddings=32),\n"
        "    steps=4, data=Data(seq_len=32, batch_size=8), init_std=0.1,\n"
        "    optim=Optim(lr=1e-2, warmup_steps=1, kind='muon', mu_dtype='bfloat16'),\n"
        ")\n"
    )

    def words(name, *more):
        return [str(tmp_path / "tiny.py"), f"data.sources={tmp_path / 'shards'}", f"run={tmp_path / name}", *more]

    assert pretrain.main(words("whole")) == 0
    assert pretrain.main(words("halves", "steps=2")) == 0
    assert "resuming at step 2" not in capsys.readouterr().err
    for refused, sentence in [
        ("optim.kind=adamw", "optim.kind = adamw (the run has muon)"),
        ("optim.mu_dtype=float32", "optim.mu_dtype = float32 (the run has bfloat16)"),
    ]:
        assert run(pretrain.main, words("halves", refused)) == 2
        assert sentence in capsys.readouterr().err
    assert pretrain.main(words("halves")) == 0
    assert "resuming at step 2" in capsys.readouterr().err
    whole, halves = (saved(tmp_path / name, 4) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and len(whole) > 11 + 11 + 4
    assert whole["opt.1.inner_states.muon.inner_state.0.mu.layers.q"].dtype == jnp.bfloat16
    for name in whole:
        np.testing.assert_array_equal(whole[name], halves[name], err_msg=name)
    two = saved(tmp_path / "whole", 4)["model.layers.q"], saved(tmp_path / "halves", 2)["model.layers.q"]
    assert (two[0] != two[1]).any()


def test_the_report_says_what_was_measured():
    folder = Path(report.__file__).parent
    results = json.loads((folder / "results.json").read_text())
    assert report.tables(results) + "\n" in (folder / "README.md").read_text()


def saved(folder, step: int) -> dict:
    """Every array of a checkpoint by name, as Orbax finds it there."""
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer(folder / "checkpoints") as orbax:
        there = orbax.checkpointables_metadata(step).metadata
        wanted = {
            k: {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in there[k].items()}
            for k in ("model", "opt")
        }
        found = orbax.load_checkpointables(step, wanted)
    return {f"{k}.{n}": np.asarray(a) for k, tree in found.items() for n, a in tree.items()}


# ---- accumulation ----------------------------------------------------------------------------------------------------


def train(accumulate: int, dtype: str = "float32", steps: int = 3):
    """The state and the metrics after some updates on 12 rows, of which the first have few labels: a mean of means
    over micro-batches would differ from the mean."""
    config = Train(
        model=MODEL,
        steps=10,
        data=Data(seq_len=16, batch_size=12),
        optim=Optim(lr=1e-2, warmup_steps=1),
        compute=Compute(dtype=dtype),
        accumulate=accumulate,
        init_std=0.1,
    )
    step = jax.jit(functools.partial(train_step, config=config))
    state, metrics = init_state(config), []
    for n in range(steps):
        state, m = step(state, batch(n))
        metrics.append({name: float(x) for name, x in m.items()})
    return state, metrics


def batch(n: int) -> dict:
    tokens = jax.random.randint(jax.random.key(n), (12, 17), 0, MODEL.vocab_size)
    counted = jnp.arange(16) < jnp.arange(4, 16)[:, None]
    return {"tokens": tokens[:, :-1], "labels": jnp.where(counted, tokens[:, 1:], IGNORE)}


@pytest.mark.parametrize("accumulate", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 12))])
def test_accumulation_is_one_big_batch(accumulate):
    one, one_metrics = train(1)
    many, many_metrics = train(accumulate)
    for a, b in zip(one_metrics, many_metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(many.opt_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # the moments: gradients to the first and second power


def test_accumulation_sums_in_f32_when_compute_is_bf16():
    """The first moment after one update is 0.1 of the clipped gradient; bf16 sums would be 4e-3 off."""
    state, metrics = train(12, "bfloat16", steps=1)
    clip = min(1.0, 1.0 / metrics[0]["grad_norm"])
    model = SmolLM(MODEL, nnx.Rngs(params=0), 0.1)
    b = batch(0)
    count = jnp.sum(b["labels"] != IGNORE)

    @jax.jit
    def gradient(row):
        def minimised(model):
            x = model.trunk(row["tokens"], compute=Compute(dtype="bfloat16"))
            return cross_entropy(x, model.embed[...], row["labels"], count, Compute().loss_chunk)[0]

        return jax.grad(minimised)(model)

    rows = [gradient({name: x[r : r + 1] for name, x in b.items()}) for r in range(12)]
    summed = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g), *rows)
    for name, mu in named(state.opt_state[1].mu).items():
        assert mu.dtype == jnp.float32
        expected = 0.1 * clip * named(summed)[name][...]
        np.testing.assert_allclose(mu[...], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
