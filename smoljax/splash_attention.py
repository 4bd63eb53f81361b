"""Pallas's splash attention, for TPUs: documents by segment ids. On a CPU it runs interpreted, for the tests."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

BLOCK = 512  # queries, and keys, of a block at the most; MaxText's default. A block is a multiple of 128 that divides T


def splash(q, k, v, starts=None):  # BTKGH BTKH BTKH BT -> BTKGH
    B, T, K, G, H = q.shape
    q = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, T, K * G, H).swapaxes(1, 2)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    attend = made(K * G, T, jax.default_backend() != "tpu")
    if starts is None:
        out = jax.vmap(attend)(q, k, v)
    else:  # where a document begins is a number of its own in its row
        out = jax.vmap(attend)(q, k, v, kernel.SegmentIds(starts, starts))
    return out.swapaxes(1, 2).reshape(B, T, K, G, H)


def made(heads: int, T: int, interpret: bool):
    block = next(b for b in range(min(BLOCK, T), 0, -128) if T % b == 0)
    sizes = kernel.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * heads)
    return kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret, residual_checkpoint_name="context"
    )
