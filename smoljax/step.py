"""One training step as a pure function of (state, batch): jit it, donate the state, give it shardings."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from smoljax import guard
from smoljax.config import Compute, Train
from smoljax.loss import IGNORE, cross_entropy, nats
from smoljax.model import SmolLM, cast
from smoljax.optim import optimizer, wsd


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    step: jax.Array  # batches seen, the skipped ones too; the next batch is number `step`
    model: SmolLM  # f32 master weights
    opt_state: optax.OptState
    guard: dict  # what guard.py remembers


def init_state(config: Train, model: SmolLM | None = None) -> TrainState:
    """A fresh state, from config.seed or around given weights."""
    if model is None:
        model = SmolLM(config.model, nnx.Rngs(params=config.seed), config.init_std)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer(config.optim).init(model), guard.fresh(config.guard))


def abstract_state(config: Train) -> TrainState:
    """init_state's shapes, without its weights."""
    return jax.eval_shape(partial(init_state, config))


def compiled_init(config: Train, places: TrainState):
    """init_state under jit: each device makes its own part; weights that are given are donated."""
    return jax.jit(partial(init_state, config), donate_argnums=0, out_shardings=places)


def of_stage(config: Train, state: TrainState) -> TrainState:
    """The same arrays in a model of this stage (Train.at): theta and length are not arrays, but a model's structure."""
    return jax.tree.unflatten(jax.tree.structure(abstract_state(config)), jax.tree.leaves(state))


def compiled_step(config: Train, places: TrainState):
    """train_step under jit: the state is donated and stays where it lies, metrics are whole on every process."""
    whole = places.step
    return jax.jit(partial(train_step, config=config), donate_argnums=0, out_shardings=(places, whole))


def losses(model: SmolLM, batch: dict, compute: Compute):
    """Nats of each label of the batch, BT; 0 where it is ignored. Forward only."""
    x = model.trunk(batch["tokens"], batch.get("segments"), compute=compute)
    return nats(x, model.embed[...], batch["labels"], compute.loss_chunk)


def train_step(state: TrainState, batch: dict, config: Train) -> tuple[TrainState, dict]:
    """One update on batch = {tokens BT, labels BT[, segments BT]}; labels of -1 are ignored.

    Where guard.py finds the loss or the gradient unfit, weights and moments stay as they were. Metrics stay on the
    device, for the host to read a step later.
    """
    value, grads, count = gradient(state.model, batch, config)
    norm = optax.tree.norm(grads)
    fine, guarded = guard.judge(state.guard, value, norm, config.guard)
    applies, skipped = fine, ~fine
    if config.guard.leave_out:  # such a batch is neither learned from nor judged
        out = guard.left_out(state.step, config.guard)
        applies, skipped = fine & ~out, ~fine & ~out
        guarded = jax.tree.map(lambda new, old: jnp.where(out, old, new), guarded, state.guard)
    lr = wsd(config.optim, config.steps)(state.step)
    updates, opt_state = optimizer(config.optim).update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, jax.tree.map(lambda u: -lr * u, updates))

    def applied(new, old):
        return jax.tree.map(lambda a, b: jnp.where(applies, a, b), new, old)

    metrics = {"loss": value, "lr": lr, "grad_norm": norm, "labels": count}
    metrics |= {"skipped": skipped, "skipped_steps": guarded["skipped"], "in_a_row": guarded["in_a_row"]}
    new = TrainState(state.step + 1, applied(model, state.model), applied(opt_state, state.opt_state), guarded)
    return new, metrics


def gradient(model: SmolLM, batch: dict, config: Train):
    """Loss, gradient and number of labels of one batch.

    The loss is the mean over all labels of the step, so splitting it into micro-batches changes rounding and nothing
    else: gradients are summed in f32. Weights are cast once, not in each micro-batch.
    """
    count, compute = jnp.sum(batch["labels"] != IGNORE), config.compute
    narrow = jax.tree.map(lambda w: w, model)
    narrow.layers = cast(model.layers, compute.dtype)

    def minimised(model, batch):
        x = model.trunk(batch["tokens"], batch.get("segments"), compute=compute)
        return cross_entropy(x, model.embed[...], batch["labels"], count, compute.loss_chunk, config.z_loss)

    def one(micro):
        (_, loss), grads = jax.value_and_grad(minimised, has_aux=True)(narrow, micro)
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if config.accumulate == 1:
        return *one(batch), count
    # Micro-batch a takes rows a, a + A, ...: the split axis B stays where it lies, no row changes device.
    A = config.accumulate
    micros = jax.tree.map(lambda x: x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, model))
    (value, grads), _ = jax.lax.scan(lambda sums, micro: (jax.tree.map(jnp.add, sums, one(micro)), None), zeros, micros)
    return value, grads, count
