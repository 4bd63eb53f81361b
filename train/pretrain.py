"""Train a model from a config; the same command resumes.

    smoljax pretrain demo
    smoljax pretrain smollm2-135m data.sources=shards run=runs/mine compute.remat=true

The run's folder holds config.json, tokenizer.json, metrics.jsonl, curves.png and checkpoints/STEP.
"""

import argparse
import dataclasses
import logging
import math
import sys
from functools import partial
from pathlib import Path

from smoljax import atomic, settings
from smoljax.config import Train
from smoljax.errors import Error, require, run


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        "smoljax pretrain",
        description=__doc__.splitlines()[0],
        epilog=f"Shipped configs: {', '.join(settings.shipped())}. What can be set: smoljax/config.py.",
    )
    parser.add_argument("config", help="a Python file that says config = Train(...), or a shipped name such as demo")
    parser.add_argument(
        "settings", nargs="*", metavar="a.b=c", help="settings that override the config's: optim.lr=1e-3"
    )
    args = parser.parse_args(argv)
    config = settings.load(args.config, args.settings)
    folder = Path(config.run)

    # ---- what can be known before JAX starts: the run's folder, the weights to start from, the data
    from smoljax import runs
    from smoljax.data import Rows, batches

    rows = Rows(config.data, config.model.vocab_size)
    check_data(config, rows)
    if config.init_from:
        require(Path(config.init_from).exists(), f"init_from = {config.init_from} does not exist")
    changes = runs.open_run(folder, config)

    # ---- mesh
    import jax

    from smoljax import metrics, runtime, sharding
    from smoljax.checkpoint import Checkpoints
    from smoljax.step import init_state, train_step

    runtime.start()
    # Each process would write the same files; until that is built, it is refused.
    require(jax.process_count() == 1, f"pretrain runs on one host, found {jax.process_count()} processes")
    mesh = sharding.mesh(config.mesh)
    ways, micro = mesh.shape["data"] * mesh.shape["fsdp"], config.data.batch_size // config.accumulate
    require(
        micro % ways == 0,
        f"a micro-batch of {micro} rows (data.batch_size / accumulate) does not split over {ways} devices "
        "(mesh.data x mesh.fsdp); change one of them",
    )
    busy = f"another `smoljax pretrain` is at work in {folder}; wait for it to end, or name another folder with run=DIR"
    with (
        atomic.lock(folder / ".lock", busy),
        jax.set_mesh(mesh),
        Checkpoints(folder, config.keep, config.keep_every) as checkpoints,
    ):
        # ---- state
        abstract = jax.eval_shape(partial(init_state, config))
        places = sharding.shardings(abstract, mesh)
        start = checkpoints.latest or 0
        if start:
            runs.check_same_data(config, rows, checkpoints.metadata(start))
            if start >= config.steps:
                draw_curves(folder)
                print(f"{folder} is at step {start} already, steps = {config.steps}; raise steps to go on")
                return 0
            for change in changes:
                print(f"resuming with {change}", file=sys.stderr)
            state = checkpoints.restore(start, abstract, places)
        else:
            model = initial_weights(config, abstract, places, rows) if config.init_from else None
            state = jax.jit(partial(init_state, config), out_shardings=places, donate_argnums=0)(model)
        runs.write_run(folder, config, rows)
        metadata = {"config": dataclasses.asdict(config), "data": runs.identity(config, rows)}
        print(header(config, rows, mesh, start), file=sys.stderr, flush=True)

        # ---- step
        step = jax.jit(partial(train_step, config=config), donate_argnums=0, out_shardings=(places, None))
        meter = metrics.Meter(config, mesh.devices.flat, start)

        def record(n, on_device):  # waits for step n alone: n + 1 is running already
            values = {k: float(v) for k, v in on_device.items()}
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                raise Error(
                    f"step {n}: loss {values['loss']}, gradient norm {values['grad_norm']}; the run stops here. "
                    f"The newest checkpoint, {checkpoints.latest or 'none'}, is from before; try a lower optim.lr"
                )
            checkpoints.check()
            epochs = {"data/epochs": rows.epochs(n * config.data.batch_size)}
            log.write(meter.record(n, values) | epochs)
            return values

        # ---- loop
        feed = batches(rows, config.data.batch_size, start, config.steps, sharding.batch_sharding(mesh))
        with metrics.Log(folder, start, config.steps) as log:
            unread = None
            for n in range(start + 1, config.steps + 1):
                with meter.waiting():
                    batch = next(feed)
                with meter.dispatching():
                    state, on_device = step(state, batch)
                if unread:
                    record(*unread)
                save = n % config.save_every == 0 or n == config.steps
                unread = (n, on_device) if save or n % config.log_every == 0 else None
                if save:  # a checkpoint has its metrics, and is never of a step whose loss was not finite
                    last, unread = record(*unread), None
                    with meter.saving():
                        checkpoints.save(n, metadata, model=state.model, opt=state.opt_state)
            checkpoints.wait()

    # ---- result
    draw_curves(folder)
    tokens = metrics.human(meter.tokens(config.steps))
    print(f"{folder}: {config.steps} steps, {tokens} tokens, loss {last['loss']:.4f}")
    return 0


def draw_curves(folder: Path):
    from smoljax import curves

    try:
        curves.draw([folder], folder / "curves.png")
    except ImportError:
        print("no curves.png: pip install smoljax[plot] brings matplotlib", file=sys.stderr)


def check_data(config: Train, rows):
    """The shards' end of document must be the model's, which generation stops at; ids that no text uses are said."""
    for windows in rows.windows:
        ours, theirs = config.model.eos_token_id, windows.shards.eos_token_id
        require(
            ours is None or theirs is None or theirs in (ours if isinstance(ours, tuple) else (ours,)),
            f"{windows.shards.path} ends its documents with token {theirs}, but model.eos_token_id is {ours}; "
            f"set model.eos_token_id={theirs} (and model.bos_token_id)",
        )
        ids = windows.shards.vocab_size
        if ids is not None and ids < config.model.vocab_size:
            logging.getLogger("smoljax").warning(
                f"{windows.shards.path} has a tokenizer of {ids} ids, model.vocab_size is {config.model.vocab_size}: "
                "the other rows of the embedding are never used"
            )


def initial_weights(config: Train, abstract, places, rows):
    """The weights that config.init_from names, in f32, as this run's model: theta and length may differ, shapes not."""
    import jax

    from smoljax import weights

    found = weights.read(config.init_from, "float32")
    theirs, ours = (dataclasses.asdict(m) for m in (found.config, config.model))
    free = {"rope_theta", "max_position_embeddings", "initializer_range"} | {
        f"{name}_token_id" for name in ("bos", "eos", "pad")
    }
    differ = [f"model.{k} = {ours[k]} (there {theirs[k]})" for k in ours if k not in free and ours[k] != theirs[k]]
    require(not differ, f"init_from = {config.init_from} has another architecture: {', '.join(differ)}")
    for windows in rows.windows:
        weights.check_tokenizer(found, windows.shards)
    model = jax.tree.unflatten(jax.tree.structure(abstract.model), jax.tree.leaves(found.model))
    return jax.device_put(model, places.model)


def header(config: Train, rows, mesh, start: int) -> str:
    from smoljax.metrics import human

    tokens = config.steps * config.data.batch_size * config.data.seq_len
    epochs = rows.epochs(config.steps * config.data.batch_size)
    device = mesh.devices.flat[0]
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    begin = f"resuming at step {start}" if start else f"from {config.init_from}" if config.init_from else "from scratch"
    return "\n".join(
        [
            f"run      {config.run}, {begin}",
            f"model    {config.model.parameters:,} parameters, computed in {config.compute.dtype}",
            f"devices  {mesh.size} x {device.device_kind} ({device.platform}), mesh {sizes}",
            f"tokens   {human(tokens)} in {config.steps:,} steps of {config.data.batch_size} x {config.data.seq_len}",
            *(f"data     {name}: {e:.2f} epochs" for name, e in epochs.items()),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
