"""The optimizer of SmolLM's recipes: AdamW after a clip of the global norm, on a warmup-stable-decay schedule."""

import jax
import jax.numpy as jnp
import optax

from smoljax.config import Optim
from smoljax.sharding import is_variable


def wsd(o: Optim, steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: linear from 0 to lr at n = warmup_steps, flat, then to min_lr at `steps`.

    `1-sqrt` is lr * (1 - sqrt(t)) over the decay (Hägele et al. 2024), as in nanotron's scheduler.
    """

    def schedule(n):
        t = jnp.clip((n - (steps - o.decay_steps)) / max(o.decay_steps, 1), 0.0, 1.0)
        fall = {"linear": 1 - t, "1-sqrt": 1 - jnp.sqrt(t), "cosine": (1 + jnp.cos(jnp.pi * t)) / 2}[o.decay]
        return jnp.where(n < o.warmup_steps, o.lr * n / max(o.warmup_steps, 1), o.min_lr + (o.lr - o.min_lr) * fall)

    return schedule


def decayed(params):
    """Where weight_decay_on="matrices" decays: neither norms ("D") nor the embedding ("VD")."""
    return jax.tree.map(lambda p: len(p.dims) > 1 and "V" not in p.dims, params, is_leaf=is_variable)


def optimizer(o: Optim) -> optax.GradientTransformation:
    """All but the learning rate, which step.py multiplies in: it follows the batches, also those that were skipped."""
    mask = decayed if o.weight_decay_on == "matrices" else None
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, mask),
    )
