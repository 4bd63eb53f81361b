"""AdamW, as in SmolLM's recipes, or Muon, after a clip of the global norm, on a warmup-stable-decay schedule.

Muon (Jordan et al. 2024) steps along its momentum with all singular values made about equal, by five Newton-Schulz
iterations: products of matrices, for all layers of a stacked weight at once. The embedding and the norms stay AdamW's.
"""

import math

import jax
import jax.numpy as jnp
import optax
from optax import contrib

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


def is_hidden(w) -> bool:
    """A matrix of the layers: neither a norm ("D") nor the embedding ("VD")."""
    return len(w.dims) > 1 and "V" not in w.dims


def decayed(params):
    """Where weight_decay_on="matrices" decays."""
    return jax.tree.map(is_hidden, params, is_leaf=is_variable)


def optimizer(o: Optim) -> optax.GradientTransformation:
    """All but the learning rate, which step.py multiplies in: it follows the batches, also those that were skipped.

    Weight decay is added to what AdamW and Muon make, and is never orthogonalised.
    """
    mask = decayed if o.weight_decay_on == "matrices" else None
    step = optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.mu_dtype)
    if o.kind == "muon":
        step = optax.partition({"muon": muon(o), "adamw": step}, labels)
    return optax.chain(optax.clip_by_global_norm(o.clip), step, optax.add_decayed_weights(o.weight_decay, mask))


# ---- Muon ------------------------------------------------------------------------------------------------------------

MOMENTUM = 0.95  # Nesterov's; Jordan's and Moonlight's. optim.b1 and b2 are AdamW's
RMS = 0.2  # of an update, about AdamW's own: Moonlight's, and what optax.contrib.muon calls consistent_rms


def labels(params):
    """Who updates what."""
    return jax.tree.map(lambda w: "muon" if is_hidden(w) else "adamw", params, is_leaf=is_variable)


def muon(o: Optim) -> optax.GradientTransformation:
    """Orthogonal updates, times 0.2 * sqrt(max(rows, columns)) (Moonlight, Liu et al. 2025, arXiv:2502.16982).

    An orthogonal matrix's entries have an RMS of 1 / sqrt(max(rows, columns)); so scaled it is 0.2 in every shape, near
    AdamW's, and one learning rate, schedule and weight decay serve both. Jordan's own scale has none of that.
    """
    return optax.chain(
        contrib.scale_by_muon(beta=MOMENTUM, mu_dtype=o.mu_dtype, weight_dimension_numbers=matrices),
        optax.stateless(lambda updates, params: jax.tree.map(even, updates, is_leaf=is_variable)),
    )


def matrices(updates):
    """Which axes are a matrix's rows and columns, where optax looks for them: in each weight's own place."""
    return jax.tree.map(lambda w: w.replace(sides(w.dims)), updates, is_leaf=is_variable)


def sides(dims: str) -> contrib.MuonDimensionNumbers:
    """D is one side, the other letters are the other: "DNH" is D x NH, "NHD" NH x D. L, in front, numbers matrices."""
    axes, cut = tuple(range(-len(dims), 0)), 1 if dims[0] == "D" else -1
    return contrib.MuonDimensionNumbers(axes[:cut], axes[cut:])


def even(w):
    longer = max(math.prod(w.shape[axis] for axis in side) for side in sides(w.dims))
    return w.replace(RMS * longer**0.5 * w[...])
