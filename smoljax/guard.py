"""Whether an update is applied: not where the loss or the gradient is not finite, nor, if asked for, at a spike.

Part of the jitted step, so nothing waits for the host. Its memory is part of the state and of every checkpoint, so that
a resumed run judges as the uninterrupted one. Spikes as in MaxText's skip_step_on_spikes and OLMo's SkipStepOptimizer:
a loss or gradient norm more than `spike_sigma` standard deviations above the mean of the last `spike_window` steps.
"""

import jax.numpy as jnp

from smoljax.config import Guard


def fresh(config: Guard) -> dict:
    """{"skipped": updates skipped so far, "in_a_row": of them the last ones[, "recent": 2W, "seen": of these]}."""
    state = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "in_a_row")}  # two arrays: both are donated
    if config.spike_window:  # the losses and gradient norms of the last W steps that were finite
        state |= {"recent": jnp.zeros((2, config.spike_window), jnp.float32), "seen": jnp.zeros((), jnp.int32)}
    return state


def judge(state: dict, loss, grad_norm, config: Guard):
    """(whether to apply the update, the new state) for one step's loss and global gradient norm."""
    values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(values))
    fine, new = finite, {}
    if config.spike_window:
        recent, seen = state["recent"], state["seen"]
        limit = jnp.mean(recent, axis=1) + config.spike_sigma * jnp.std(recent, axis=1)
        fine = finite & ((seen < config.spike_window) | jnp.all(values <= limit))
        # A spike is remembered too: where the level has moved for good, the window follows, or max_skips stops the run.
        written = recent.at[:, seen % config.spike_window].set(values)
        new = {"recent": jnp.where(finite, written, recent), "seen": seen + finite}
    in_a_row = jnp.where(fine, 0, state["in_a_row"] + 1)
    return fine, {"skipped": state["skipped"] + ~fine, "in_a_row": in_a_row} | new


def left_out(step, config: Guard):
    """Whether update number `step`, from 0, is of a batch that guard.leave_out names, from 1 as metrics.jsonl does."""
    return jnp.isin(step + 1, jnp.array(config.leave_out, jnp.int32))
