"""One training step as a pure function of (state, batch): jit it, donate the state, give it shardings."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from smoljax.config import Compute, Train
from smoljax.loss import IGNORE, cross_entropy
from smoljax.model import SmolLM
from smoljax.optim import optimizer, wsd


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    step: jax.Array  # updates done; the next batch is number `step`
    model: SmolLM  # f32 master weights
    opt_state: optax.OptState


def init_state(config: Train, model: SmolLM | None = None) -> TrainState:
    """A fresh state, from config.seed or around given weights. Run under jit with out_shardings."""
    if model is None:
        model = SmolLM(config.model, nnx.Rngs(params=config.seed), config.init_std)
    opt_state = optimizer(config.optim, config.steps).init(model)
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)


def losses(model: SmolLM, batch: dict, compute: Compute):
    """Nats of each label of the batch, BT; 0 where it is ignored."""
    return cross_entropy(model(batch["tokens"], batch.get("segments"), compute), batch["labels"])


def train_step(state: TrainState, batch: dict, config: Train) -> tuple[TrainState, dict]:
    """One update on batch = {tokens BT, labels BT[, segments BT]}; labels of -1 are ignored.

    The loss is the mean over all labels of the step, so splitting it into micro-batches changes rounding and nothing
    else: gradients are summed in f32. Metrics stay on the device, for the host to read a step later.
    """
    count = jnp.sum(batch["labels"] != IGNORE)

    def loss(model, batch):
        return jnp.sum(losses(model, batch, config.compute)) / count

    def accumulate(sums, micro):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(state.model, micro)), None

    if config.accumulate == 1:
        value, grads = jax.value_and_grad(loss)(state.model, batch)
    else:
        # Micro-batch a takes rows a, a + A, ...: the split axis B stays where it lies, no row changes device.
        A = config.accumulate
        micros = jax.tree.map(lambda x: x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.model))
        (value, grads), _ = jax.lax.scan(accumulate, zeros, micros)

    tx = optimizer(config.optim, config.steps)
    updates, opt_state = tx.update(grads, state.opt_state, state.model)
    metrics = {
        "loss": value,
        "lr": wsd(config.optim, config.steps)(state.step),
        "grad_norm": optax.tree.norm(grads),
        "labels": count,
    }
    model = optax.apply_updates(state.model, updates)
    return TrainState(state.step + 1, model, opt_state), metrics
