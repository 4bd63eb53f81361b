"""Causal attention tile by tile, in plain JAX: what runs on a CPU, and what every other backend is compared with.

Memory is linear in T; tiles after the diagonal, and those that lie before all documents of their queries, are skipped.

The online softmax of FlashAttention (Dao et al. 2022): forward keeps a row's output and its log-sum-exp, backward
computes the scores again. On 2 Xeon cores, 135M's heads, 2 x 512 tokens, forward and backward of one layer take 0.043
CPU seconds, where autodiff through all scores at once takes 0.154; at 2,048 tokens half of the tiles are left out.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

TILE = 128  # queries, and keys, of a tile: 64 to 256 are within 20% of each other, 512 takes twice as long
MASKED = -1e30  # finite: a row that is masked whole in one tile is mended by the next one, and its diagonal comes last


def blocked(q, k, v, starts=None):  # BTKGH BTKH BTKH BT -> BTKGH
    """starts: BT, where in the row each query's document begins; None: at 0."""
    B, T, K, G, H = q.shape
    tile = min(TILE, T)
    rest = -T % tile  # rows are filled up: filling comes after every query, and is not seen
    q = jnp.pad(q * jnp.asarray(H**-0.5, q.dtype), ((0, 0), (0, rest), (0, 0), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))).swapaxes(1, 2) for x in (k, v))
    if starts is not None:
        starts = jnp.pad(starts, ((0, 0), (0, rest)), mode="edge")
    out = tiles(q.transpose(0, 2, 3, 1, 4), k, v, starts, tile)
    return out.transpose(0, 3, 1, 2, 4)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def tiles(q, k, v, starts, tile: int):  # BKGTH BKTH BKTH BT -> BKGTH; q is scaled
    return forward(q, k, v, starts, tile)[0]


def forward(q, k, v, starts, tile: int):
    B, K, G, T, H = q.shape

    def row(_, i):
        query = piece(q, i, tile)

        def one(j, sums):
            out, top, total = sums
            s = scores(query, piece(k, j, tile), starts, i, j)
            new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
            p, shrink = jnp.exp(s - new), jnp.exp(top - new)
            out = out * shrink + dot("BKGTS,BKSH->BKGTH", p.astype(v.dtype), piece(v, j, tile))
            return out, new, total * shrink + jnp.sum(p, axis=-1, keepdims=True)

        out = jnp.zeros((B, K, G, tile, H), jnp.float32)
        out, top, total = jax.lax.fori_loop(
            first(starts, i, tile), i + 1, one, (out, out[..., :1] + MASKED, out[..., :1])
        )
        return None, ((out / total).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(row, None, jnp.arange(T // tile))
    # Named here, where backward takes them from: a layer that is computed again keeps these, or runs the loops twice.
    out, lse = (checkpoint_name(joined(x), "context") for x in (out, lse))
    return out, (q, k, v, starts, out, lse)


def backward(tile: int, kept, dout):
    q, k, v, starts, out, lse = kept
    # Of the softmax's Jacobian: sum_s p_ts dp_ts = out_t . dout_t
    inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def row(dkv, i):
        query, dquery, shift, centre = (piece(x, i, tile) for x in (q, dout, lse, inner))

        def one(j, sums):
            dq, dk, dv = sums
            key, value = piece(k, j, tile), piece(v, j, tile)
            p = jnp.exp(scores(query, key, starts, i, j) - shift)
            ds = p * (dot("BKGTH,BKSH->BKGTS", dquery, value) - centre)
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dq += dot("BKGTS,BKSH->BKGTH", ds, key)
            dk = add(dk, dot("BKGTS,BKGTH->BKSH", ds, query), j, tile)
            return dq, dk, add(dv, dot("BKGTS,BKGTH->BKSH", p, dquery), j, tile)

        zero = jnp.zeros(query.shape, jnp.float32)
        dq, *dkv = jax.lax.fori_loop(first(starts, i, tile), i + 1, one, (zero, *dkv))
        return tuple(dkv), dq.astype(q.dtype)

    zero = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(row, (zero, zero), jnp.arange(q.shape[3] // tile))
    return joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


tiles.defvjp(forward, backward)


def scores(query, key, starts, i, j):  # BKGTH BKSH -> BKGTS, in f32: tile i of the queries with tile j of the keys
    at = jnp.arange(query.shape[3])
    s, t = j * len(at) + at, (i * len(at) + at)[:, None]
    visible = (s <= t)[None]
    if starts is not None:
        visible &= s >= piece(starts[..., None], i, len(at))
    return jnp.where(visible[:, None, None], dot("BKGTH,BKSH->BKGTS", query, key), MASKED)


def first(starts, i, tile: int):
    """The first tile of keys that any query of tile i sees."""
    return 0 if starts is None else jnp.min(starts[:, i * tile]) // tile


def piece(x, i, tile: int):  # tile i of the axis T, the last but one
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=x.ndim - 2)


def add(x, part, i, tile: int):
    return jax.lax.dynamic_update_slice_in_dim(x, piece(x, i, tile) + part, i * tile, axis=x.ndim - 2)


def joined(x):  # tiles along a leading axis, each BKG_H -> BKGTH
    return jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1])


dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
