"""Train a model from a config; the same command resumes.

    smoljax pretrain demo
    smoljax pretrain smollm2-135m data.sources=shards run=runs/mine compute.remat=full
    smoljax pretrain mine.py --dry-run           # compiles and runs one step on random tokens, writes nothing

The run's folder holds config.json, tokenizer.json, metrics.jsonl, curves.png and checkpoints/STEP. On several machines
the same command runs on each: configs/launch has files for SLURM, GKE and TPU pods.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

from smoljax import atomic, processes, settings, streams, watch
from smoljax.config import Train
from smoljax.errors import run


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        "smoljax pretrain",
        description=__doc__.splitlines()[0],
        epilog=f"Shipped configs: {', '.join(settings.shipped())}. What can be set: smoljax/config.py.",
    )
    parser.add_argument(
        "config", help="a Python file that says config = Train(...), a shipped name, or nanotron's YAML"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="a.b=c", help="settings that override the config's: optim.lr=1e-3"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile and run one step on random tokens, no more")
    more = "let this setting differ from the run's own, which is refused otherwise; may be repeated"
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help=more)
    processes.add_flags(parser)
    args = parser.parse_intermixed_args(argv)
    streams.forgive()  # its result is RUN: it goes on without a reader
    config = settings.load(args.config, args.settings)
    if args.dry_run:
        from smoljax import dryrun

        mesh = start_mesh(config, args)
        with processes.together():
            return dryrun.run(config, mesh)

    # ---- what can be known before JAX starts: the data, the weights to start from
    from smoljax import checkpoint, committed, heldout, runs, sinks, weights
    from smoljax.data import Rows

    sinks.check(config.sinks)
    rows = Rows(config)
    runs.check_data(config, rows)
    sources = list(rows.sources.values())
    held = {part.start: heldout.open_sets(config.at(part.start), sources) for part in rows.parts}
    if config.init_from and not committed.has_begun(Path(config.run)):  # a run that goes on has its own weights
        weights.find(config.init_from)

    # ---- mesh
    import jax

    from smoljax import budget, metrics

    mesh = start_mesh(config, args)
    folder = Path(config.run)
    with contextlib.ExitStack() as stack, processes.together():
        memory = processes.on_first(lambda: budget.device_memory(jax.local_devices()[0]))
        fitted = budget.fitting(config, dict(mesh.shape), memory)  # config.json keeps "auto", for another machine
        attending = runs.attending(fitted)
        stack.enter_context(runs.memory(fitted, mesh))
        stack.enter_context(runs.disk(folder))
        stop = stack.enter_context(watch.Stop(config.guard.grace_s))
        changes = processes.on_first(partial(claim, folder, config, args.allow_change, stack))
        stack.enter_context(jax.set_mesh(mesh))
        begun = time.perf_counter()

        # ---- checkpoints: which one to go on from, and whether it is of this run
        start = processes.on_first(partial(committed.newest_sound, folder)) or 0
        spent = processes.on_first(partial(metrics.spent_before, folder, start))
        kept = checkpoint.Checkpoints(folder, config.keep, config.keep_every, config.guard.failed_saves)
        checkpoints = stack.enter_context(kept)
        rows.samples = processes.on_first(lambda: rows.samples)
        if start:
            saved = checkpoints.metadata(start)
            runs.check_same_data(config, rows, start, saved["data"])
            runs.check_left_out(config, start, saved["config"])
            if start >= config.steps:
                processes.on_first(partial(draw_curves, folder))
                if processes.first():
                    print(f"{folder} is at step {start} already, steps = {config.steps}; raise steps to go on")
                return 0
        processes.on_first(partial(runs.check_disk, folder, config))
        processes.on_first(partial(runs.write_run, folder, config, rows))
        processes.on_first(partial(metrics.keep_spent, folder, spent))
        if processes.first():
            for change in changes:
                print(f"resuming with {change}", file=sys.stderr)
            print(header(fitted, rows, mesh, start, memory, attending), file=sys.stderr, flush=True)
        meter = metrics.Meter(mesh.devices.flat, start, spent, begun)
        last = train(config, fitted, rows, held, mesh, start, checkpoints, meter, stop)

    # ---- result
    if processes.first():
        draw_curves(folder)
        tokens = metrics.human(sum(rows.consumed(config.steps).values()))
        print(f"{folder}: {config.steps} steps, {tokens} tokens, loss {last['loss']:.4f}")
    return 0


def train(config: Train, fitted: Train, rows, held: dict, mesh, start: int, checkpoints, meter, stop) -> dict:
    """Updates start ... steps - 1. Returns the last one's numbers.

    Args:
      config: as it was given, which checkpoints say.
      fitted: as it is computed (budget.fitting), which dumps say: a replay on any machine is the same program.
      held: by a stage's start, its held-out sets.
    """
    import jax

    from smoljax import attention, corruption, metrics, runs, sharding
    from smoljax.checkpoint import parts
    from smoljax.data import batches
    from smoljax.readings import Readings
    from smoljax.step import abstract_state, compiled_step, of_stage

    feed = batches(rows, start, config.steps, sharding.batch_sharding(mesh))
    agreement = processes.Agreement(mesh)
    with Readings(fitted, rows, mesh, start, checkpoints, meter) as read:
        part = state = unread = None
        for n in range(start + 1, config.steps + 1):
            # ---- stage: its own shapes, theta and program
            begins = rows.part(n - 1) is not part
            if begins:
                if unread:
                    read(*unread)
                unread = None
                part, at = rows.part(n - 1), fitted.at(n - 1)
                with read.dog.pause(), meter.timing("restore"):
                    abstract = abstract_state(at)
                    places = sharding.shardings(abstract, mesh)
                    update = compiled_step(at, places)
                    check = corruption.Check(at, mesh) if config.guard.check_every else None
                    if state is not None:
                        state = of_stage(at, state)
                    else:
                        fresh = partial(runs.initial_state, at, rows, places)
                        state = checkpoints.restore(start, abstract, places) if start else fresh()
                    jax.block_until_ready(state)
                meter.enter(at, sum(rows.consumed(n - 1).values()))

            # ---- data
            with meter.timing("data_wait"):
                batch = next(feed)

            # ---- step
            if check and n % config.guard.check_every == 0:
                with read.dog.pause(), meter.timing("eval"):
                    check(n, state, batch)
            if n == start + 1:
                meter.starts()
            if begins:
                with read.compiling():
                    update = update.lower(state, batch).compile()
                    attention.check_compiled(update, at.compute, at.data)
            state, on_device = update(state, batch)
            full = config.guard.max_rss_gb is not None and metrics.host_rss_gb() > config.guard.max_rss_gb
            asked = agreement.ask(stop.asked or (watch.FULL if full else 0))

            # ---- log: the step before, which is done by now
            stopping = agreement.now(asked, read(*unread) if unread else 0)
            unread = n, on_device, batch, asked

            # ---- evaluate, save
            last = n == config.steps
            measure = held[part.start] and (last or (config.heldout.every and n % config.heldout.every == 0))
            if stopping or last or measure or n % config.save_every == 0:
                more = {}
                if measure:
                    jax.block_until_ready(on_device)  # the step's own time is not the evaluation's
                    with meter.timing("eval"):
                        more = evaluate(state.model, held[part.start], at, mesh, read.dog.alive)
                stopping, unread = read(*unread, more=more) or stopping, None
            if stopping or last or n % config.save_every == 0:
                metadata = {"config": dataclasses.asdict(config), "model": dataclasses.asdict(at.model)}
                metadata |= {"data": runs.history(config, rows, n)}
                with read.dog.patient(), meter.timing("checkpoint"):
                    checkpoints.save(n, metadata, **parts(state))
                    if stopping or last:
                        checkpoints.finish()
            if stopping and not last:
                raise watch.stopped(n, stopping)
    return read.last


def evaluate(model, sets: list, at: Train, mesh, alive) -> dict:
    """What metrics.jsonl keeps of every held-out set, in micro-batches: what fits in training fits here."""
    from smoljax import heldout

    rows, found = at.data.batch_size // at.accumulate, {}
    for held in sets:
        alive()
        result = heldout.measure(model, held, rows, at.compute, mesh, alive)
        found |= heldout.record(held.name, result)
        if not math.isfinite(result["loss"]) and processes.first():  # its weights are finite: guard.py sees to that
            print(f"smoljax: the loss on held-out {held.name} is {result['loss']}", file=sys.stderr)
    return found


def start_mesh(config: Train, args):
    from smoljax import runtime, sharding

    runtime.set_flags(config.xla_flags)
    processes.start(args, config.guard.heartbeat_s)
    runtime.start()
    mesh = sharding.mesh(config.mesh)
    sharding.check_rows(config, dict(mesh.shape))
    return mesh


def claim(folder: Path, config: Train, allowed: list[str], stack: contextlib.ExitStack) -> list[str]:
    """The run's folder for this run alone, until the stack is left. Returns what it changes in a run that goes on."""
    from smoljax import runs

    changes = runs.open_run(folder, config, tuple(allowed))
    busy = f"another `smoljax pretrain` is at work in {folder}; wait for it to end, or name another folder with run=DIR"
    stack.enter_context(atomic.lock(folder / ".lock", busy))
    return changes


def draw_curves(folder: Path):
    from smoljax import curves

    try:
        curves.draw([folder], folder / "curves.png")
    except ImportError:
        print("no curves.png: pip install smoljax[plot] brings matplotlib", file=sys.stderr)
    except Exception as e:  # the run has ended well, whatever becomes of its picture
        print(f"no curves.png: {type(e).__name__}: {e}", file=sys.stderr)


def header(config: Train, rows, mesh, start: int, memory: int, attending: dict[int, str]) -> str:
    import jax

    from smoljax import budget
    from smoljax.metrics import human

    tokens, epochs = sum(rows.consumed(config.steps).values()), rows.epochs(config.steps)
    device = mesh.devices.flat[0]
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    begin = f"resuming at step {start}" if start else f"from {config.init_from}" if config.init_from else "from scratch"
    count = jax.process_count()
    lines = [
        f"run      {config.run}, {begin}",
        f"jax      {jax.__version__}, XLA_FLAGS {os.environ.get('XLA_FLAGS') or 'none'}",
        f"model    {config.model.parameters:,} parameters, computed in {config.compute.dtype}",
        f"devices  {mesh.size} x {device.device_kind} ({device.platform}), mesh {sizes}, "
        f"{count} process{'es' * (count > 1)}",
        f"memory   {budget.remat_words(config, dict(mesh.shape), memory)}",
        f"tokens   {human(tokens)} in {config.steps:,} steps",
    ]
    for part in rows.parts:
        at = config.at(part.start)
        left = [f"{skipped} tokens of {name}" for name, skipped in part.skipped.items() if skipped]
        lines += [
            f"stage    from step {part.start:,}: {at.data.batch_size} x {at.data.seq_len} tokens, "
            + f"theta {at.model.rope_theta:g}"
            + ", documents masked" * at.data.mask_documents
            + f"; left out: {', '.join(left)}" * bool(left),
            f"attention  {attending[part.start]}",
        ]
    return "\n".join([*lines, *(f"data     {name}: {e:.2f} epochs" for name, e in epochs.items())])


if __name__ == "__main__":
    raise SystemExit(run(main))
