"""Repeat a step whose update was skipped, and say whether it gives the same value.

    smoljax replay runs/mine/dumps/1234

Trains from the newest checkpoint before the step (of the dump, else of the run, else from the beginning) to the step
before it, with the run's own data, and then computes the dumped batch. On the same machine and mesh the value is the
same bit for bit, so a loss that was not finite is in the data or the mathematics; where it differs, look at the device.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from smoljax import settings
from smoljax.config import Train
from smoljax.errors import DataError, run


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax replay", description=__doc__.splitlines()[0])
    parser.add_argument("dump", type=Path, metavar="DUMP", help="RUN/dumps/STEP, as pretrain names it")
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="another mesh, or where the data are now")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    args = parser.parse_intermixed_args(argv)

    import jax
    import numpy as np

    from smoljax import dumps, runtime, sharding
    from smoljax.data import Rows, batches
    from smoljax.step import compiled_step, of_stage

    content, found = dumps.read(args.dump)
    config = settings.override(settings.from_dict(Train, content["config"]), args.settings)
    n, data = content["step"], config.at(content["step"] - 1).data
    shape = data.batch_size, data.seq_len
    fits = 1 <= n <= config.steps and all(v.shape == shape and v.dtype == np.int32 for v in found.values())
    if not fits or set(found) != {"tokens", "labels"} | ({"segments"} if data.mask_documents else set()):
        raise DataError(f"{args.dump} is no batch of {shape[0]} x {shape[1]} at a step of its run; it is damaged")
    runtime.start()
    mesh = sharding.mesh(config.mesh)
    rows, place = Rows(config), sharding.batch_sharding(mesh)
    mine = {k: np.stack([rows.row(n - 1, i)[k] for i in range(data.batch_size)]) for k in found}
    same_rows = all(np.array_equal(mine[k], found[k]) for k in found)
    with jax.set_mesh(mesh):
        start, state = state_before(config, args.dump.resolve(), Path(content["run"]), n, rows)
        part = None
        for m, batch in enumerate(itertools.chain(batches(rows, start, n - 1, place), [None]), start):
            beside = args.dump.resolve().with_name(str(m + 1))  # skipped as well: what was fed, not what is on disk
            if m + 1 == n or (beside / "dump.json").exists():
                fed = found if m + 1 == n else dumps.read(beside)[1]
                batch = {k: jax.make_array_from_callback(v.shape, place, v.__getitem__) for k, v in fed.items()}
            if rows.part(m) is not part:
                part, state = rows.part(m), of_stage(config.at(m), state)
                step = compiled_step(config.at(m), sharding.shardings(state, mesh))
            state, values = step(state, batch)
            if sys.stderr.isatty():
                print(f"\rstep {m + 1}/{n}", end="\n" * (m + 1 == n), file=sys.stderr, flush=True)
    now = {k: repr(float(values[k])) for k in ("loss", "grad_norm")}
    same = all(now[k] == content[k] for k in now)
    result = {"step": n, "from": start, "same": same, "rows_as_on_disk": same_rows}
    result |= {"then": {k: content[k] for k in now}, "now": now}
    print(json.dumps(result) if args.json else describe(result))
    return 0 if same else 1


def state_before(config: Train, dump: Path, folder: Path, n: int, rows):
    """(updates done, the state after them): of the dump, else of the run, else from the beginning."""
    import jax

    from smoljax import checkpoint, committed, runs, sharding, sums
    from smoljax.step import abstract_state

    def abstract_and_places(step: int):
        abstract = abstract_state(config.at(step))
        return abstract, sharding.shardings(abstract, jax.sharding.get_mesh())

    for place in (dump, dump.parent.parent, folder):  # the run may have moved, or its dump
        for step in reversed([step for step in committed.steps(place) if step < n]):
            damaged = sums.damage(place / "checkpoints" / str(step))
            if damaged is None:
                return step, checkpoint.load_state(place, step, *abstract_and_places(step))
            print(f"smoljax: checkpoint {step} is damaged: {damaged}; going on with another", file=sys.stderr)
    return 0, runs.initial_state(config.at(0), rows, abstract_and_places(0)[1])


def describe(result: dict) -> str:
    then, now = result["then"], result["now"]
    lines = [
        f"step {result['step']}, trained to it from {result['from'] or 'the beginning'}",
        f"then  loss {then['loss']}  gradient norm {then['grad_norm']}",
        f"now   loss {now['loss']}  gradient norm {now['grad_norm']}",
        "the same, bit for bit" if result["same"] else "NOT the same: another mesh or machine, or a device that errs",
    ]
    if not result["rows_as_on_disk"]:
        lines.append("the batch is not what the shards hold at this step: it was corrupted between disk and device")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run(main))
