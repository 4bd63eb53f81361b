"""Next-token cross-entropy of the tied head, in chunks of tokens: the logits of all tokens exist nowhere.

A chunk's gradient is formed where its logits are, in the forward pass, so that training takes three products with the
head and none of them twice (as Liger Kernel, Hsu et al. 2024). Logits, softmax and sums are f32 whatever x is.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from smoljax import sharding

IGNORE = -1  # a label that is no prediction: padding, or the first token of the next document


def nats(x, embed, labels, chunk: int):  # BTD VD BT -> BT
    """The loss of each label, 0 where it is IGNORE, NaN where it is no id of the vocabulary. Forward only."""

    def local(x, embed, labels, rows, vocabulary):
        def one(_, x, labels):
            return None, softmax(x, embed, labels, vocabulary)[1]

        return in_chunks(one, None, x, labels, chunk)[1]

    return on_mesh(local, x, embed.astype(x.dtype), labels)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(x, embed, labels, count, chunk: int, z_loss: float = 0.0):  # BTD VD BT -> two numbers
    """(what is minimised, the loss): nats of all labels over `count`, the first with z_loss * lse^2 of each added.

    Args:
      count: by what the sums are divided; the gradient leaves it out, as it does the second number.
      chunk: tokens on a device whose logits exist at a time; their f32 gradient and they take 8V bytes each.
      z_loss: keeps the log of the softmax's denominator near 0 (PaLM, Chowdhery et al. 2022, took 1e-4).
    """
    loss = nats(x, embed, labels, chunk)
    if z_loss:
        return forward(x, embed, labels, count, chunk, z_loss)[0]
    return (jnp.sum(loss) / count,) * 2


def forward(x, embed, labels, count, chunk, z_loss):
    def local(x, embed, labels, count, rows, vocabulary):
        def one(sums, x, labels):
            p, loss, lse, hit = softmax(x, embed, labels, vocabulary)
            counts = labels != IGNORE
            z = jnp.where(counts, z_loss * lse**2, 0)
            slope = 1 + 2 * z_loss * lse if z_loss else jnp.ones_like(lse)
            d = jnp.where(counts[..., None], p * slope[..., None] - hit, 0) / count
            # Written once, for both products: fused into them it is computed twice, once across its rows.
            d = jax.lax.optimization_barrier(d.astype(x.dtype))
            dx = jnp.einsum("BTV,VD->BTD", d, embed, preferred_element_type=jnp.float32)
            if vocabulary:
                dx = jax.lax.psum(dx, vocabulary)
            total, z_total, dembed = sums
            dembed += jnp.einsum("BTV,BTD->VD", d, x, preferred_element_type=jnp.float32)
            return (total + jnp.sum(loss), z_total + jnp.sum(z), dembed), dx.astype(x.dtype)

        zeros = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(embed.shape, jnp.float32))
        (loss, z, dembed), dx = in_chunks(one, zeros, x, labels, chunk)
        if rows:
            loss, z, dembed = jax.lax.psum((loss, z, dembed), rows)
        return loss / count, z / count, dx, dembed

    loss, z, dx, dembed = on_mesh(local, x, embed.astype(x.dtype), labels, count)
    return (loss + z, loss), (dx, dembed)


def backward(chunk, z_loss, kept, cotangents):
    slope = cotangents[0]  # 1, a constant that XLA takes away, where the loss is not scaled afterwards
    dx, dembed = kept
    return (dx * slope).astype(dx.dtype), dembed * slope, None, None


cross_entropy.defvjp(forward, backward)


def softmax(x, embed, labels, vocabulary):  # BTD VD BT -> BTV BT BT BTV
    """Probabilities of this device's ids; losses, logs of the denominators; which of the ids the label is.

    vocabulary: the mesh axis over which V is split, or (): each device sees its own ids, sums go over all of them.
    """
    logits = jnp.einsum("BTD,VD->BTV", x, embed, preferred_element_type=jnp.float32)
    V = embed.shape[0]
    place = labels - (jax.lax.axis_index(vocabulary) * V if vocabulary else 0)
    target = jnp.take_along_axis(logits, jnp.clip(place, 0, V - 1)[..., None], axis=-1)[..., 0]
    target = jnp.where((place >= 0) & (place < V), target, 0)
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = V
    if vocabulary:
        ids, top = V * jax.lax.axis_size(vocabulary), jax.lax.pmax(top, vocabulary)
    p = jnp.exp(logits - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if vocabulary:
        total, target = jax.lax.psum((total, target), vocabulary)
    lse = (top + jnp.log(total))[..., 0]
    loss = jnp.where((labels >= 0) & (labels < ids), lse - target, jnp.where(labels == IGNORE, 0, jnp.nan))
    return p / total, loss, lse, place[..., None] == jnp.arange(V)


def in_chunks(one, sums, x, labels, chunk: int):  # BTD BT -> sums, BT...
    """one(sums, x, labels) over pieces of T: rows stay where they lie. What fills the last piece up has no labels."""
    B, T, _ = x.shape
    n = min(-(-B * T // chunk), T)
    size = -(-T // n)
    if n == 1:
        return one(sums, x, labels)
    fill = n * size - T
    x = jnp.pad(x, ((0, 0), (0, fill), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, fill)), constant_values=IGNORE)
    pieces = [y.reshape(B, n, size, *y.shape[2:]).swapaxes(0, 1) for y in (x, labels)]
    sums, out = jax.lax.scan(lambda sums, piece: one(sums, *piece), sums, tuple(pieces))
    return sums, out.swapaxes(0, 1).reshape(B, n * size, *out.shape[3:])[:, :T]


def on_mesh(local, x, embed, labels, *count):
    """local(..., rows, vocabulary): the mesh axes over which B and V are split, which it sums over itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x, embed, labels, *count, rows=(), vocabulary=())
    place = partial(sharding.spec, table=sharding.ACTIVATIONS, mesh=mesh)
    rows, ids = place("BT", labels.shape), place("VD", embed.shape)
    local = partial(local, rows=rows[0] or (), vocabulary=ids[0] or ())
    ins, out = (rows, ids, rows), rows
    if count:  # with the gradients
        ins, out = (*ins, P()), (P(), P(), rows, ids)
    return jax.shard_map(local, in_specs=ins, out_specs=out, check_vma=False)(x, embed, labels, *count)
