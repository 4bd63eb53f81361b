"""The schedule at every joint, the optimizer against numpy, and gradient accumulation against one big batch."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smoljax import settings
from smoljax.config import Compute, Data, Model, Optim, Train
from smoljax.loss import IGNORE
from smoljax.model import SmolLM
from smoljax.optim import decayed, optimizer, wsd
from smoljax.step import init_state, losses, train_step

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


@pytest.mark.parametrize("accumulate", [2, 3, 12])
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
        return jax.grad(lambda model: jnp.sum(losses(model, row, Compute(dtype="bfloat16"))) / count)(model)

    rows = [gradient({name: x[r : r + 1] for name, x in b.items()}) for r in range(12)]
    summed = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g), *rows)
    for name, mu in named(state.opt_state[1].mu).items():
        assert mu.dtype == jnp.float32
        expected = 0.1 * clip * named(summed)[name][...]
        np.testing.assert_allclose(mu[...], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
