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
from functools import partial
from pathlib import Path

from smoljax import settings
from smoljax.config import Train
from smoljax.errors import run


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
    n = content["step"]
    runtime.start()
    mesh = sharding.mesh(config.mesh)
    rows = Rows(config)
    at, place = config.at(n - 1), sharding.batch_sharding(mesh)
    mine = {k: np.stack([rows.row(n - 1, i)[k] for i in range(at.data.batch_size)]) for k in found}
    same_rows = all(np.array_equal(mine[k], found[k]) for k in found)
    with jax.set_mesh(mesh):
        start, state = state_before(config, args.dump, Path(content["run"]), n, rows)
        dumped = {k: jax.make_array_from_callback(v.shape, place, v.__getitem__) for k, v in found.items()}
        part = None
        for m, batch in enumerate(itertools.chain(batches(rows, start, n - 1, place), [dumped]), start):
            if rows.part(m) is not part:
                part, state = rows.part(m), of_stage(config.at(m), state)
                step = compiled_step(config.at(m), sharding.shardings(state, mesh))
            state, values = step(state, batch)
            if sys.stderr.isatty():
                print(f"\rstep {m + 1}/{n}", end="\n" * (m + 1 == n), file=sys.stderr, flush=True)
    now = {k: repr(float(values[k])) for k in ("loss", "grad_norm")}
    same = all(now[k] == content[k] for k in now)
    result = {
        "step": n,
        "from": start,
        "same": same,
        "rows_as_on_disk": same_rows,
        "then": {k: content[k] for k in now},
    }
    result["now"] = now
    print(json.dumps(result) if args.json else describe(result))
    return 0 if same else 1


def state_before(config: Train, dump: Path, folder: Path, n: int, rows):
    """(updates done, the state after them): the nearest that is known before step n."""
    import jax

    from smoljax import checkpoint, runs, sharding
    from smoljax.step import init_state

    mesh = jax.sharding.get_mesh()
    known = [(step, run) for run in (folder, dump) for step in checkpoint.steps(run) if step < n]
    start, run = max(known, key=lambda pair: pair[0], default=(0, None))
    abstract = jax.eval_shape(partial(init_state, config.at(start)))
    places = sharding.shardings(abstract, mesh)
    if run is None:
        return 0, runs.initial_state(config.at(0), rows, places)
    return start, checkpoint.load_state(run, start, abstract, places)


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
