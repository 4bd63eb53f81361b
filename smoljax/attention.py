"""Causal attention with grouped queries, documents kept apart. The alphabet is at the top of model.py."""

import jax
import jax.numpy as jnp


def attend(q, k, v, segments=None, positions=None):  # BTNH BSKH BSKH -> BTNH
    """Each query sees the keys at or before its own place, in its own document.

    Args:
      segments: BT document numbers within a row; None where a row is one document. Needs S = T.
      positions: BT place of each query among the S keys, for decoding with a cache; None means place = T axis.

    Scores and softmax are f32 whatever the inputs are. A query always sees itself, so no row is fully masked.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    places = jnp.arange(T)[None] if positions is None else positions
    visible = jnp.arange(S) <= places[:, :, None]  # BTS
    if segments is not None:
        visible &= segments[:, :, None] == segments[:, None, :]

    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)
