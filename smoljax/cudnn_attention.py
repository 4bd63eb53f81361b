"""cuDNN's flash attention, for NVIDIA GPUs in bfloat16; documents by sequence offsets, not by a T x T mask.

jax.nn.dot_product_attention has no offsets, and under jax.checkpoint it runs its forward pass twice, for the softmax's
statistics bear no name there. So this calls what lies below it, jax._src.cudnn.fused_attention_stablehlo, which is
private: `missing` refuses a JAX where it is not as this file knows it. jax 0.10.2 scales the keys' offsets by the
number of query heads, which is wrong where heads are grouped (found by reading; 0.11.2 has it right).
"""

import inspect

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smoljax.blocked_attention import blocked
from smoljax.errors import UsageError

# Arguments of JAX's rules that are not arrays, jax 0.10.2 to 0.12.0.1 (which added score_mod); given by their names.
SETTINGS = dict(
    seed=0, dropout_rate=0.0, variadic_args=(False, False), sliding_window_length=None, return_residual=False
)
SETTINGS |= dict(score_mod=None, score_mod_args=(), is_training=True)
ARRAYS = {"query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"}
ARRAYS |= {"page_table_k", "page_table_v", "res", "grad_output"}
TESTED = ((0, 10, 2), (0, 13))  # lowered for CUDA in tests/test_attention.py; grouped documents from 0.11.2


def missing(documents: bool) -> str | None:
    """Why JAX's private functions cannot be used; None where they can."""
    found = f"found {jax.__version__}"
    if not TESTED[0] <= jax.__version_info__ < TESTED[1]:
        return f"is known to fit jax 0.10.2 up to 0.12, {found}"
    if documents and jax.__version_info__ < (0, 11, 2):
        return f"needs jax 0.11.2 for masked documents, {found}"
    from jax._src.cudnn import fused_attention_stablehlo as fused

    known = ARRAYS | SETTINGS.keys() | {"scale", "mask_type", "layout", "cudnn_version"}
    for rule in (fused._dot_product_attention_fwd_rule, fused._dot_product_attention_bwd_rule):
        if unknown := inspect.signature(rule).parameters.keys() - known:
            return f"does not know {', '.join(sorted(unknown))} of {rule.__name__} in jax {jax.__version__}"
    try:
        fused.check_cudnn_version()
    except RuntimeError as e:
        return f"needs cuDNN ({e})"
    return None


def cudnn(q, k, v, starts=None):  # BTKGH BTKH BTKH BT -> BTKGH
    B, T, K, G, H = q.shape
    if H % 8 or H > 128:
        raise UsageError(
            f"cuDNN's attention takes head sizes of 8, 16, ... 128, found {H}; set compute.attention=blocked"
        )
    q = q.reshape(B, T, K * G, H)
    if starts is None:
        out = flash(q, k, v)
    else:
        # The number of documents in a row is part of the program. A row that has more goes the other way, as right.
        # cuDNN keeps f32 statistics of [B * most, N, T]: with 32 at 8,192 tokens as many bytes as the output.
        most = max(16, T // 256)
        begins = starts == jnp.arange(T)
        fits = jnp.max(jnp.sum(begins, axis=1)) <= most
        out = either(fits, q, k, v, starts, most)
    return out.reshape(B, T, K, G, H)


def either(fits, q, k, v, starts, most: int):
    def grouped(q, k, v, starts):
        B, T, N, H = q.shape
        return blocked(q.reshape(B, T, k.shape[2], -1, H), k, v, starts).reshape(q.shape)

    def packed(q, k, v, starts):
        return flash(q, k, v, *offsets(starts, most))

    return jax.lax.cond(fits, packed, grouped, q, k, v, starts)


def offsets(starts, most: int):  # BT -> [B, most], [B, most + 1]
    """Each document's length and the place where it begins; -1 where a row has fewer than `most`.

    JAX puts those of all rows behind each other and the batch's end after them: a row's own end must not be there.
    """
    T = starts.shape[1]

    def row(begins):
        at = jnp.nonzero(begins, size=most + 1, fill_value=T)[0].astype(jnp.int32)
        lengths = jnp.diff(at)
        return jnp.where(lengths > 0, lengths, -1), jnp.where(at < T, at, -1)

    return jax.vmap(row)(starts == jnp.arange(T))


@jax.custom_vjp
def flash(q, k, v, lengths=None, places=None):  # BTNH BTKH BTKH -> BTNH
    return forward(q, k, v, lengths, places)[0]


def forward(q, k, v, lengths, places):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    none = jnp.zeros(0, q.dtype)
    lengths, places = (none if x is None else x for x in (lengths, places))
    arrays = dict(query=q, key=k, value=v, bias=none, page_table_k=none, page_table_v=none)
    arrays |= dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=places, kv_offsets=places)
    out, kept = call(fused._dot_product_attention_fwd_rule, q, lengths, arrays)
    *inputs, statistics, _ = kept
    out, statistics = (checkpoint_name(x, "context") for x in (out, statistics))
    return out, (*inputs, statistics, out)


def backward(kept, dout):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    arrays = dict(res=kept, grad_output=dout.astype(kept[0].dtype))
    dq, dk, dv, *_ = call(fused._dot_product_attention_bwd_rule, kept[0], kept[4], arrays)
    return dq, dk, dv, None, None


def call(rule, q, lengths, arrays: dict):
    """One of JAX's two rules with those arguments that its version has."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mask = fused.MaskType.PADDING_CAUSAL if lengths.size else fused.MaskType.CAUSAL
    given = arrays | SETTINGS | dict(scale=q.shape[-1] ** -0.5, mask_type=mask)
    given |= dict(layout=fused.AttentionLayout.BTNH.value, cudnn_version=fused.check_cudnn_version())
    return rule(**{name: given[name] for name in inspect.signature(rule).parameters})


flash.defvjp(forward, backward)
