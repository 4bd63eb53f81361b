"""attend(): causal attention with grouped queries, documents kept apart, by the backend that the platform has.

    blocked   plain JAX, any platform and dtype: blocked_attention.py, which the others are compared with
    cudnn     NVIDIA, bfloat16: cuDNN's flash attention, documents by sequence offsets: cudnn_attention.py
    splash    TPU: Pallas's splash attention with segment ids: splash_attention.py

Memory is linear in T in each of them (cuDNN keeps f32 statistics for up to T / 256 documents a row). `choose` says
which one a run takes, and why; nothing falls back in silence.
"""

import jax
import jax.numpy as jnp

from smoljax import sharding
from smoljax.blocked_attention import blocked
from smoljax.config import Compute, Data
from smoljax.errors import Error, UsageError


def attend(q, k, v, starts=None, backend: str = "blocked"):  # BTNH BTKH BTKH BT -> BTNH
    """Each query sees the keys at or before its own place, in its own document.

    Args:
      starts: BT, where in its row each query's document begins (model.document_starts); None where a row is one.

    Scores and softmax are f32 whatever the inputs are. On a mesh each device attends for its own rows and heads:
    query heads are split where the key/value heads divide.
    """
    if backend == "blocked":
        local = blocked
    elif backend == "cudnn":
        from smoljax.cudnn_attention import cudnn as local
    else:
        from smoljax.splash_attention import splash as local
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    rest, dims = ((), ()) if starts is None else ((starts,), ("BT",))
    out = sharding.on_each_device(local, "BTKGH", "BTKH", "BTKH", *dims)(q, k, v, *rest)
    return out.reshape(B, T, N, H)


def attend_cached(q, k, v, positions, k_scale=None, v_scale=None):  # BTNH (BK)HS (BK)SH BT (BK)S (BK)S -> BTNH
    """Queries at their places among the S keys of a cache, for decoding: all scores at once, for T is small.

    A head's keys and values are matrices as XLA's CPU compiler multiplies with them: else it copies the cache, which
    took a tenth of a token's time. k and v in int8 are multiplied as they are, their scales with scores and weights.
    """
    B, T, N, H = q.shape
    S, K, asked = v.shape[1], len(v) // B, q.dtype
    q = q.astype(jnp.promote_types(q.dtype, k.dtype) if k_scale is None else q.dtype)  # an f32 cache is f32 arithmetic
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B * K, -1, H)
    dims = (((2,), (1,)), ((0,), (0,)))
    scores = jax.lax.dot_general(rows, k.astype(q.dtype), dims, preferred_element_type=jnp.float32) * H**-0.5
    if k_scale is not None:
        scores = scores * k_scale[:, None]
    visible = jnp.repeat(jnp.arange(S) <= positions[:, :, None], N // K, axis=1)  # B(TG)S
    scores = jnp.where(jnp.repeat(visible, K, axis=0), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if v_scale is not None:
        weights = weights * v_scale[:, None]
    out = jax.lax.dot_general(weights.astype(q.dtype), v.astype(q.dtype), dims, preferred_element_type=jnp.float32)
    out = out.astype(asked).reshape(B, K, T, N // K, H)
    return out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def choose(compute: Compute, T: int, documents: bool) -> tuple[str, str]:
    """(the backend for rows of T tokens, why): compute.attention where it is not "auto", checked against what is here.

    A backend that was asked for and cannot be is a UsageError; "auto" takes the platform's own where that can be, and
    the reason says what stood in its way.
    """
    platform, asked = jax.default_backend(), compute.attention
    native = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "blocked")
    wanted = native if asked == "auto" else asked
    obstacle = {"blocked": lambda *_: None, "cudnn": no_cudnn, "splash": no_splash}[wanted](compute.dtype, T, documents)
    if asked == "auto":
        return ("blocked", f"{wanted} {obstacle}") if obstacle else (wanted, f"on {platform}")
    if obstacle:
        raise UsageError(f"compute.attention={asked} {obstacle}; set compute.attention=auto or blocked")
    return wanted, "as asked for"


def no_cudnn(dtype: str, T: int, documents: bool) -> str | None:
    """Why cuDNN's attention cannot be taken here; None where it can. Limits as in jax's fused_attention_stablehlo."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, JAX runs on {jax.default_backend()}"
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return f"needs an NVIDIA GPU, found {device.device_kind}"
    if dtype != "bfloat16":
        return f"needs compute.dtype=bfloat16, found {dtype}"
    capability = float(device.compute_capability)
    if capability < (9.0 if documents else 8.0):
        return f"needs compute capability {'9.0 for masked documents' if documents else '8.0'}, found {capability:g}"
    from smoljax.cudnn_attention import missing

    return missing(documents)


def no_splash(dtype: str, T: int, documents: bool) -> str | None:
    if jax.default_backend() != "tpu":
        return f"needs a TPU, JAX runs on {jax.default_backend()}"
    return f"needs rows of a multiple of 128 tokens, found {T}" if T % 128 else None


def check_compiled(compiled, compute: Compute, data: Data):
    """An Error where a compiled step does not hold the kernel of its backend: it would be slow without a word."""
    backend, _ = choose(compute, data.seq_len, data.mask_documents)
    kernel = {"cudnn": "__cudnn$fmha", "splash": "tpu_custom_call"}.get(backend)
    if kernel and kernel not in compiled.as_text():
        raise Error(f"attention is {backend}, but the compiled program has no {kernel}; set compute.attention=blocked")
