"""loss.py is the dense cross-entropy in values and gradients, and nowhere the logits of all tokens."""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax import sharding, step
from smoljax.config import REMAT, Compute, Data, Mesh, Model, Optim, Train
from smoljax.loss import IGNORE, cross_entropy, nats

V, D = 96, 16


def case(B: int = 2, T: int = 12, vocab: int = V):
    """x, embed, labels, count; logits of some size, labels at both ends of the vocabulary, some ignored."""
    random = np.random.default_rng(B * T + vocab)
    x, embed = (random.standard_normal(shape).astype(np.float32) for shape in ((B, T, D), (vocab, D)))
    labels = random.integers(0, vocab, (B, T)).astype(np.int32)
    labels.flat[:2], labels.flat[3:-1:5] = (0, vocab - 1), IGNORE
    return x, embed, labels, np.int32((labels != IGNORE).sum())


def dense(x, embed, labels, count, z_loss: float = 0.0):
    """What cross_entropy is, of all logits at once, for autodiff."""
    logits = jnp.einsum("BTD,VD->BTV", x, embed, precision="highest").astype(jnp.float32)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    z = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    loss, z = (jnp.sum(jnp.where(labels == IGNORE, 0, a)) / count for a in (loss, z))
    return loss + z, loss


def graded(f):
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))


dense_graded, in_eights = graded(dense), graded(functools.partial(cross_entropy, chunk=8))


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "T, chunk, z_loss", [(12, 1, 0.0), (12, 5, 0.0), (12, 5, 0.02), (12, 8, 0.02), (12, 1000, 0.0), (1, 1, 0.02)]
)
def test_it_is_the_dense_form(T, chunk, z_loss):
    """Of 2 rows: 8 divides the tokens, 5 leaves a piece that is filled up, 1 is less than a piece can be. The value
    is computed in another way where nobody asks for the gradient."""
    args = case(T=T)
    f = functools.partial(cross_entropy, chunk=chunk, z_loss=z_loss)
    got, value = jax.jit(lambda *args: (graded(f)(*args), f(*args)))(*args)
    same(got, dense_graded(*args, z_loss))
    same(value, got[0])
    assert (value[0] > 1.1 * value[1]) == bool(z_loss)


def test_no_label_at_all():
    x, embed, labels, _ = case()
    (_, loss), grads = in_eights(x, embed, np.full_like(labels, IGNORE), np.int32(7))
    assert loss == 0 and not any(g.any() for g in grads)


def test_a_scaled_loss_has_a_scaled_gradient():
    args = case()

    def scaled(*args, by):
        minimised, loss = cross_entropy(*args, 8, 1e-3)
        return by * minimised, loss

    once, thrice = (graded(functools.partial(scaled, by=by))(*args)[1] for by in (1.0, 3.0))
    same(jax.tree.map(lambda g: 3 * g, once), thrice)


def test_nats_are_each_tokens():
    x, embed, labels, _ = case()
    logits = x.astype(np.float64) @ embed.T
    one = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    expected = np.where(labels == IGNORE, 0, one).astype(np.float32)
    for chunk in (5, 24):
        got = jax.jit(nats, static_argnums=3)(x, embed, labels, chunk)
        same(got, expected)
        assert (np.asarray(got)[labels == IGNORE] == 0).all()


@pytest.mark.parametrize("label", [V, -2, 2**31 - 1])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    x, embed, labels, count = case()
    labels[1, 4] = label
    found = np.isnan(jax.jit(nats, static_argnums=3)(x, embed, labels, 8))
    assert found[1, 4] and found.sum() == 1
    assert np.isnan(in_eights(x, embed, labels, count)[0]).all()


def test_bf16_is_rounded_where_it_says_and_nowhere_else():
    """Logits and loss are f32: as exact as in f32. Their gradient is rounded to bf16 once, and so is dx; each bound is
    half a unit of bf16, 2**-8, of what is summed. The embedding's gradient stays f32."""
    x, embed, labels, count = case(4, 32)
    x, narrow = jnp.asarray(x, jnp.bfloat16), jnp.asarray(embed, jnp.bfloat16).astype(jnp.float32)
    (_, loss), (dx, dembed) = graded(functools.partial(cross_entropy, chunk=32))(x, embed, labels, count)
    assert dx.dtype == jnp.bfloat16 and dembed.dtype == jnp.float32
    wide, table = np.asarray(x, np.float64), np.asarray(narrow, np.float64)
    logits = wide @ table.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    hit = labels[..., None] == np.arange(V)
    np.testing.assert_allclose(loss, -np.log(p[hit]).sum() / count, rtol=1e-6)
    d = np.where((labels == IGNORE)[..., None], 0, p - hit) / count
    off = np.abs(np.asarray(dx, np.float64) - d @ table)
    assert (off <= 2**-7 * (np.abs(d) @ np.abs(table)) + 1e-7).all()
    off = np.abs(np.asarray(dembed, np.float64) - np.einsum("BTV,BTD->VD", d, wide))
    assert (off <= 2**-8 * np.einsum("BTV,BTD->VD", np.abs(d), np.abs(wide)) + 1e-7).all()


@pytest.mark.parametrize("sizes, vocab", [((8, 1, 1), V), ((2, 2, 2), V), ((1, 2, 4), V), ((1, 2, 4), 90)], ids=str)
def test_eight_devices_are_one(sizes, vocab):
    """90 ids do not split over 4 devices: each has all of them. A device's chunk is of its own rows."""
    args = case(8, 6, vocab)
    wrong = np.where(np.arange(48).reshape(8, 6) == 20, vocab, args[2])  # a label that is on no device

    @jax.jit
    def f(x, embed, labels, count):
        loss = functools.partial(cross_entropy, chunk=4, z_loss=0.02)
        return graded(loss)(x, embed, labels, count), nats(x, embed, labels, 4), nats(x, embed, wrong, 1000)

    mesh = sharding.mesh(Mesh(*sizes))
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        *got, on_mesh = f(jax.device_put(args[0], rows), args[1], jax.device_put(args[2], rows), args[3])
    *expected, alone = f(*args)
    same(got, expected)
    same(got[0], dense_graded(*args, 0.02))
    found = np.isnan(on_mesh)
    assert found[3, 2] and found.sum() == 1
    np.testing.assert_allclose(on_mesh, alone, rtol=1e-5, atol=1e-6)


# A whole step. No other axis or product of axes has as many elements as the logits of all tokens.
CONFIG = Train(
    model=Model(16, 48, 2, 2, 1, head_dim=8, vocab_size=1021, max_position_embeddings=64),
    steps=10,
    data=Data(seq_len=32, batch_size=8),
    optim=Optim(warmup_steps=2, decay_steps=2),
    compute=Compute(loss_chunk=32),
)
LOGITS = CONFIG.data.batch_size * CONFIG.data.seq_len * CONFIG.model.vocab_size
BATCH = {name: jax.ShapeDtypeStruct((8, 32), jnp.int32) for name in ("tokens", "labels", "segments")}
STATE = step.abstract_state(CONFIG)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def largest(program) -> int:
    """Elements of the largest array in a compiled program, of any type and layout, in fusions too."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]", program.as_text())
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


def test_the_logits_of_all_tokens_exist_nowhere():
    """Neither in training, in bf16 with f32 logits, nor where a set is measured."""
    config = replace(CONFIG, compute=replace(CONFIG.compute, dtype="bfloat16"))
    trains = compiled(functools.partial(step.train_step, config=config), STATE, BATCH)
    measures = compiled(lambda model, batch: step.losses(model, batch, CONFIG.compute), STATE.model, BATCH)
    assert largest(trains) == largest(measures) == LOGITS // 8  # 256 tokens in chunks of 32


def test_the_reader_of_shapes_sees_dense_logits():
    def loss(x, embed, labels):
        return dense(x, embed, labels, 1)[1]

    shapes = (8, 32, CONFIG.model.hidden_size), (CONFIG.model.vocab_size, CONFIG.model.hidden_size)
    args = *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), BATCH["labels"]
    assert largest(compiled(loss, *args)) >= LOGITS
    assert largest(compiled(jax.grad(loss), *args)) >= LOGITS


def products(jaxpr):
    """Shapes of every matrix product's factors and result, inside loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("remat", ["none", *REMAT])
def test_three_products_with_the_head(remat):
    """Forward, and the gradients of both factors: under no rematerialisation is one of them computed again."""
    config = replace(CONFIG, compute=Compute(remat=remat, loss_chunk=32))
    jaxpr = jax.make_jaxpr(functools.partial(step.gradient, config=config))(STATE.model, BATCH).jaxpr
    with_head = [shapes for shapes in products(jaxpr) if any(config.model.vocab_size in s for s in shapes)]
    assert len(with_head) == 3, with_head
    jaxpr = jax.make_jaxpr(lambda m, b: step.losses(m, b, config.compute))(STATE.model, BATCH).jaxpr
    assert sum(any(config.model.vocab_size in s for s in shapes) for shapes in products(jaxpr)) == 1
