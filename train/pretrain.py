"""Train a model from a config; the same command resumes.

    smoljax pretrain demo
    smoljax pretrain smollm2-135m data.sources=shards run=runs/mine compute.remat=true

The run's folder holds config.json, tokenizer.json, metrics.jsonl, curves.png and checkpoints/STEP.
"""

import argparse
import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

from smoljax import atomic, settings
from smoljax.config import Train
from smoljax.errors import DataError, Error, UsageError, require, run

# What a resumed run may change: how it computes, how it reports, and the schedule ahead. All else is refused.
FREE = {
    *("steps", "optim.lr", "optim.min_lr", "optim.warmup_steps", "optim.decay_steps", "optim.decay"),
    *("accumulate", "log_every", "save_every", "keep", "keep_every", "run"),
    *("compute.dtype", "compute.remat", "compute.unroll", "mesh.data", "mesh.fsdp", "mesh.tensor"),
}


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

    # ---- data: opened first, so that what is wrong with it is said before a device is touched
    from smoljax.data import Rows, batches

    rows = Rows(config.data, config.model.vocab_size)

    # ---- mesh
    import jax

    from smoljax import curves, metrics, runtime, sharding
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
    open_run(folder, config)
    with jax.set_mesh(mesh), Checkpoints(folder, config.keep, config.keep_every) as checkpoints:
        # ---- state
        abstract = jax.eval_shape(partial(init_state, config))
        places = sharding.shardings(abstract, mesh)
        start = checkpoints.latest or 0
        if start:
            check_same_run(config, rows, checkpoints.metadata(start))
            if start >= config.steps:
                print(f"{folder} is complete: {start} steps; raise steps to go on")
                return 0
            state = checkpoints.restore(start, abstract, places)
        else:
            model = initial_weights(config, abstract, places) if config.init_from else None
            state = jax.jit(partial(init_state, config), out_shardings=places)(model)
        write_run(folder, config, rows)
        metadata = {"config": dataclasses.asdict(config), "data": identity(config, rows)}
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
                    checkpoints.save(n, metadata, model=state.model, opt=state.opt_state)
            checkpoints.wait()

    # ---- result
    try:
        curves.draw([folder], folder / "curves.png")
    except ImportError:
        print("no curves.png: pip install smoljax[plot] brings matplotlib", file=sys.stderr)
    print(
        f"{folder}: {config.steps} steps, {metrics.human(meter.tokens(config.steps))} tokens, loss {last['loss']:.4f}"
    )
    return 0


def open_run(folder: Path, config: Train):
    """A new folder becomes a run by its config.json, so that a run killed at once is known for one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            atomic.write_json(folder / "config.json", dataclasses.asdict(config))
    except OSError as e:
        raise UsageError(f"run = {folder} cannot be written ({e.strerror}); name another folder with run=DIR") from None
    if not (folder / "config.json").exists():
        raise UsageError(f"{folder} is not empty and not a run (it has no config.json); name a new folder with run=DIR")


def write_run(folder: Path, config: Train, rows):
    """config.json and tokenizer.json, each complete or absent."""
    atomic.write_json(folder / "config.json", dataclasses.asdict(config))
    tokenizers = [w.shards.tokenizer_path for w in rows.windows if w.shards.tokenizer_path]
    if tokenizers and not (folder / "tokenizer.json").exists():
        atomic.copy(tokenizers[0], folder / "tokenizer.json")


def identity(config: Train, rows) -> list[dict]:
    """The run's data by content, not by place: a moved folder is the same source."""
    weights = config.data.sources
    return [{"source": n, "weight": weights[n], "fingerprint": f} for n, f in rows.fingerprints().items()]


def check_same_run(config: Train, rows, saved: dict):
    """A checkpoint goes on only as the run that it is; what may change is said."""
    before, now = settings.flat(settings.from_dict(Train, saved["config"])), settings.flat(config)
    changed = [k for k in now if k != "data.sources" and before[k] != now[k]]
    refused = [f"{k} = {now[k]} (the run has {before[k]})" for k in changed if k not in FREE]
    require(
        not refused, f"{config.run} is a run of another config: {', '.join(refused)}; name a new folder with run=DIR"
    )
    was, new = ([(s["weight"], s["fingerprint"]) for s in x] for x in (saved["data"], identity(config, rows)))
    if was != new:
        names = ", ".join(s["source"] for s in saved["data"])
        raise DataError(
            f"{config.run} was trained on other data than data.sources now holds: {names}, as they were then"
        )
    for k in changed:
        print(f"resuming with {k} = {now[k]} (was {before[k]})", file=sys.stderr)


def initial_weights(config: Train, abstract, places):
    """The weights that config.init_from names, in f32, as this run's model: theta and length may differ, shapes not."""
    import jax

    from smoljax import weights

    found = weights.read(config.init_from, "float32")
    theirs, ours = (dataclasses.asdict(m) for m in (found.config, config.model))
    same = (
        "rope_theta",
        "max_position_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    differ = [f"model.{k} = {ours[k]} (there {theirs[k]})" for k in ours if k not in same and ours[k] != theirs[k]]
    require(not differ, f"init_from = {config.init_from} has another architecture: {', '.join(differ)}")
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
            f"model    {config.model.parameters:,} parameters, {config.compute.dtype}",
            f"devices  {mesh.size} x {device.device_kind} ({device.platform}), mesh {sizes}",
            f"tokens   {human(tokens)} in {config.steps:,} steps of {config.data.batch_size} x {config.data.seq_len}",
            *(f"data     {name}: {e:.2f} epochs" for name, e in epochs.items()),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
