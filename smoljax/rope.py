"""Rotary position embedding (Su et al. 2021), in Hugging Face's half-split ("rotate_half") layout.

Computed from positions where it is used and cached nowhere: extending the context is another theta, not another code.
"""

import jax.numpy as jnp


def angles(positions, head_dim: int, theta: float):  # BT -> BTH/2, in f32
    """Rotation angle of each pair of features; feature i is paired with i + H/2."""
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions.astype(jnp.float32)[..., None] * frequency


def rotate(x, angles):  # BTNH BTH/2 -> BTNH
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
