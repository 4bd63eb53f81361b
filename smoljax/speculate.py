"""Drafts of the next tokens, for the model to check in one go: by looking up what followed before, or by a small model.

Prompt lookup (Saxena 2023): where the last tokens stood before in prompt or answer, what followed then may follow now.
A wrong draft costs time alone: decode.py takes none but the model's own choices.
"""

import jax
import jax.numpy as jnp

LONGEST = 3  # tokens that are looked up; shorter where those did not stand together before


def draft_tokens(model, trunk, head, slots, k: int):
    """k tokens a row, Bk, and the draft model's cache."""
    if k and model is None:
        return look_up(slots.history, slots.position, k), None
    if not k:
        return jnp.zeros((len(slots.token), 0), jnp.int32), slots.draft

    def one(carry, _):
        token, position, cache = carry
        x, cache = trunk(model, token[:, None], None, position[:, None], cache)
        token = jnp.argmax(head(model, x)[:, 0], axis=-1).astype(jnp.int32)
        return (token, position + 1, cache), token

    # Once more than there are drafts: if all of them are taken, the last one's keys and values are needed too.
    (_, _, cache), tokens = jax.lax.scan(one, (slots.token, slots.position, slots.draft), length=k + 1)
    return tokens[:k].T, cache


def look_up(history, position, k: int):  # BS B -> Bk
    """What followed the latest place where the longest match of the last tokens, up to LONGEST, ended.

    Where there is none, the row's first tokens: drafts that are not taken.
    """
    S = history.shape[1]
    places = jnp.arange(S)
    matched, score = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
    for n in range(LONGEST):
        wanted = jnp.take_along_axis(history, jnp.maximum(position - n, 0)[:, None], axis=1)
        matched &= (jnp.roll(history, n, axis=1) == wanted) & (places >= n)
        score = jnp.where(matched & (places < position[:, None]), (n + 1) * S + places, score)
    latest = jnp.argmax(score, axis=1)[:, None] * (jnp.max(score, axis=1, keepdims=True) > 0)
    known = jnp.maximum(position[:, None] - latest, 1)  # tokens behind it; a loop as short as they goes round again
    return jnp.take_along_axis(history, jnp.minimum(latest + 1 + jnp.arange(k) % known, S - 1), axis=1)
