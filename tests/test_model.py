"""model.py alone: sizes, initialisation, causality, precision. test_parity.py compares it with transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smoljax.config import REMAT, Compute, Model
from smoljax.model import SmolLM

# The six released models in small: heads in the same ratios, same theta and positions; one head_dim is not
# hidden_size / heads.
SHAPES = {
    "smollm-135m": Model(72, 192, 2, 9, 3, 8, vocab_size=300),
    "smollm-360m": Model(120, 320, 2, 15, 5, 8, vocab_size=300),
    "smollm-1.7b": Model(64, 256, 3, 4, 4, 16, vocab_size=300),
    "smollm2-135m": Model(72, 192, 3, 9, 3, 16, 300, 8192, 100_000.0, initializer_range=1 / 24),
    "smollm2-360m": Model(120, 320, 2, 15, 5, 8, 300, 8192, 100_000.0),
    "smollm2-1.7b": Model(64, 256, 2, 4, 4, 16, 300, 8192, 130_000.0),
}
CONFIG = SHAPES["smollm2-135m"]


def make(config: Model = CONFIG, seed: int = 0) -> SmolLM:
    """A model with large random weights, norms included, so that each of them shows in the logits."""
    return jax.tree.map(jnp.array, made(config, seed))  # of its own: a test may change or donate it


@functools.cache
def made(config: Model, seed: int) -> SmolLM:
    model = SmolLM(config, nnx.Rngs(params=seed), init_std=0.15)
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda w: np.asarray(w) * noise.uniform(0.5, 1.5, w.shape).astype(np.float32), model)


forward = jax.jit(SmolLM.__call__, static_argnames="compute")


def tokens(*shape, seed: int = 0, vocab: int = CONFIG.vocab_size):
    return np.random.default_rng(seed).integers(0, vocab, shape)


def test_initialisation():
    model = SmolLM(Model(256, 512, 8, 4, 2, 64, vocab_size=1000), nnx.Rngs(params=0), init_std=0.03)
    out = 0.03 / np.sqrt(2 * 8)
    for name, std in dict(q=0.03, k=0.03, v=0.03, gate=0.03, up=0.03, o=out, down=out).items():
        weights = np.asarray(getattr(model.layers, name))
        assert weights.std() == pytest.approx(std, rel=0.01) and abs(weights.mean()) < std / 100
        assert not np.array_equal(weights[0], weights[1])
    assert np.asarray(model.embed).std() == pytest.approx(0.03, rel=0.01)
    assert (np.asarray(model.layers.attn_norm) == 1).all() and (np.asarray(model.norm) == 1).all()
    assert {w.dtype for w in jax.tree.leaves(model)} == {jnp.dtype("float32")}


def influence(model, row, segments=None):
    """[t, s]: how much the last norm's output at t moves with the embedding read at s; the row's tokens differ."""

    def outputs(model):
        x = model.trunk(row[None], segments)[0]
        return jnp.sum(x * jnp.sin(jnp.arange(x.shape[-1])), axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(model).embed[...]
    return np.abs(np.asarray(jacobian))[:, row].sum(axis=-1)


def test_causality_by_gradients():
    seen = influence(make(), np.random.default_rng(0).permutation(CONFIG.vocab_size)[:12])
    past = np.tri(12, dtype=bool)
    assert (seen[~past] == 0).all() and (seen[past] > 0).all()


def test_documents_do_not_see_each_other():
    documents = np.array([1] * 5 + [2] * 1 + [3] * 6)
    seen = influence(make(), np.random.default_rng(0).permutation(CONFIG.vocab_size)[:12], documents[None])
    visible = np.tri(12, dtype=bool) & (documents[:, None] == documents)
    assert (seen[~visible] == 0).all() and (seen[visible] > 0).all()


def test_packed_documents_equal_each_alone():
    model, lengths = make(), (7, 1, 9)
    documents = [tokens(1, n, seed=n) for n in lengths]
    segments = np.repeat([1, 2, 3], lengths)[None]
    packed = forward(model, np.concatenate(documents, axis=1), segments)
    alone = np.concatenate([forward(model, d) for d in documents], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("id", [CONFIG.vocab_size, -1])
def test_id_outside_the_vocabulary_gives_nan(id):
    row = tokens(1, 6)
    row[0, 2] = id
    assert np.isnan(forward(make(), row)[0, 2:]).all()


def test_compute_settings_change_nothing():
    model, row = make(), tokens(2, 16)
    logits = forward(model, row)
    assert logits.dtype == jnp.float32
    for compute in (*(Compute(remat=name) for name in ("none", *REMAT)), Compute(unroll=2), Compute(unroll=99)):
        np.testing.assert_allclose(forward(model, row, compute=compute), logits, atol=1e-5)
    half = forward(model, row, compute=Compute(dtype="bfloat16"))
    assert half.dtype == jnp.float32
    assert np.abs(half - logits).max() < 0.05 * np.abs(logits).max()


def operations(jaxpr):
    """(name, dtype) of every operation, inside loops and calls too."""
    for eqn in jaxpr.eqns:
        for out in eqn.outvars:
            yield eqn.primitive.name, getattr(out.aval, "dtype", None)
        if eqn.primitive.name == "dot_general":
            yield "factor", eqn.invars[0].aval.dtype
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def test_norms_softmax_rope_and_logits_are_f32_in_bf16():
    """Tolerances cannot see it: with all of them in bf16 logits stay within 5% of f32. The program can."""
    model, ids = make(), tokens(2, 16)
    compute = Compute(dtype="bfloat16")
    found = list(operations(jax.make_jaxpr(lambda m, t: m(t, compute=compute))(model, ids).jaxpr))
    narrow = {name for name, dtype in found if dtype == jnp.bfloat16}
    wide = {name for name, dtype in found if dtype == jnp.float32}
    precise = {"exp", "rsqrt", "cos", "sin", "reduce_sum", "reduce_max", "div", "logistic"}
    assert not precise & narrow and precise <= wide
    assert "factor" in narrow  # the matrix products are what bf16 is for
    assert forward(model, ids, compute=compute).dtype == jnp.float32
