"""What a run will need, before it is paid for: tokens, FLOPs, memory of a device, disk, hours, text.

    smoljax plan smollm2-135m
    smoljax plan smollm2-1.7b accumulate=1 --devices 256 --accelerator H100 --mfu 0.4
    smoljax plan mine.py data.batch_size=256 --no-compile --json

Nothing is trained or allocated, nothing but JAX's compilation cache is written, and no accelerator is touched: memory
comes from formulas (smoljax/budget.py) and from compiling the training step for as many pretended devices. What is not
there yet is no mistake; what is there and wrong ends with pretrain's own sentence and exit code, after all was printed.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

from smoljax import budget, settings
from smoljax.config import Train
from smoljax.errors import Error, require, run

PRETENDED = 256  # devices at the most: as quick to compile for as one; 4,096 take 5 s more
FLOAT32 = "; compilers for CPUs may keep bfloat16 as float32, up to twice as much"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax plan", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="as for `smoljax pretrain`: a file, or a shipped name such as smollm2-135m")
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="settings that override the config's")
    parser.add_argument("--devices", type=int, metavar="N", help="default: the product of the mesh, -1 taken as 1")
    names = ", ".join(budget.PEAK_TFLOPS)
    parser.add_argument("--accelerator", default="H100", metavar="NAME", help=f"one of {names} (default: H100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak, attention causal (default: 0.4)")
    parser.add_argument("--no-compile", action="store_true", help="memory by formula alone")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    args = parser.parse_intermixed_args(argv)  # settings may stand behind --devices too
    config = settings.load(args.config, args.settings)
    accelerator = named(args.accelerator)
    require(0 < args.mfu <= 1, f"--mfu is {args.mfu}, expected more than 0, at most 1")
    devices = abs(math.prod(dataclasses.astuple(config.mesh))) if args.devices is None else args.devices
    require(devices >= 1, f"--devices is {devices}, expected at least 1")
    pretend(devices)

    checks = Checks()
    mesh = checks.add("mesh", partial(shape, config, devices))
    if mesh:
        config = budget.fitting(config, mesh, int(budget.MEMORY_GB[accelerator] * 1e9))
    fits = mesh is not None and checks.add("rows", partial(rows, config, mesh))
    plan = {
        "run": config.run,
        "devices": devices,
        "accelerator": accelerator,
        "mfu": args.mfu,
        "remat": config.compute.remat,
    }
    plan |= work(config)
    plan["hours"] = plan["flops_causal"] / (budget.PEAK_TFLOPS[accelerator] * 1e12 * args.mfu * devices) / 3600
    plan |= memory(config, mesh, compiling=bool(fits) and not args.no_compile)
    if mesh:
        checks.add("memory", partial(room, plan, accelerator, config.compute.remat))
    plan["sources"] = text(config, checks)
    checks.add("init_from", partial(beginning, config))
    plan |= {"checkpoint_bytes": budget.checkpoint_bytes(config), "disk_bytes": budget.disk_bytes(config)}
    plan["inference_bytes"] = budget.inference_bytes(config.model)
    checks.add("disk", partial(disk, config))
    plan["checks"] = checks.made
    print(json.dumps(plan) if args.json else page(config, plan))
    if checks.errors:
        raise checks.errors[0]
    return 0


def named(text: str) -> str:
    """The one accelerator whose name begins so, whatever the case; H100 is itself, and not H100 PCIe."""
    found = [name for name in budget.PEAK_TFLOPS if name.lower().startswith(text.lower())]
    found = [name for name in found if name.lower() == text.lower()] or found
    begins = " and ".join(found) if found else "no known accelerator"
    require(
        len(found) == 1,
        f"--accelerator {text!r} begins {begins}; expected one of {', '.join(budget.PEAK_TFLOPS)}",
    )
    return found[0]


def pretend(devices: int):
    """JAX will see CPUs alone, one for each device of the plan. Where it is imported already, it stays as it is."""
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flag = f"--xla_force_host_platform_device_count={min(devices, PRETENDED)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def work(config: Train) -> dict:
    """Tokens and FLOPs of each stage and of the run, whose FLOPs per token are the mean over its tokens."""
    stages = []
    for start, stop, at in budget.stages(config):
        T, B = at.data.seq_len, at.data.batch_size
        stage = {"start": start, "steps": stop - start, "seq_len": T, "batch_size": B, "tokens_per_step": B * T}
        stage |= {"tokens": (stop - start) * B * T, "micro_batch_rows": B // config.accumulate}
        stage |= {"flops_per_token_causal": budget.flops_per_token(at.model, T)}
        stages.append(stage | {"flops_per_token_full": budget.flops_per_token(at.model, T, causal=False)})
    out = {"parameters": config.model.parameters, "steps": config.steps, "tokens": sum(s["tokens"] for s in stages)}
    for kind in ("causal", "full"):
        out[f"flops_{kind}"] = sum(s["tokens"] * s[f"flops_per_token_{kind}"] for s in stages)
        out[f"flops_per_token_{kind}"] = out[f"flops_{kind}"] / out["tokens"]
    return out | {"stages": stages}


# ---- memory


def memory(config: Train, mesh: dict | None, compiling: bool) -> dict:
    """Bytes on one device; None where the mesh does not fit, or nothing was compiled."""
    names = ("state", "gradient", "activation")
    out = dict.fromkeys([f"{name}_bytes_per_device{'_formula' * (name == 'activation')}" for name in names])
    out |= {"activation_parts": None, "activation_bytes_per_device_compiled": None, "compiled": None}
    if mesh:
        start, at = budget.largest(config, mesh)
        parts = budget.activation_bytes(at, mesh)
        out["state_bytes_per_device"] = budget.state_bytes(config, mesh)
        out["gradient_bytes_per_device"] = budget.gradient_bytes(config, mesh)
        out |= {"activation_bytes_per_device_formula": sum(parts.values()), "activation_parts": parts}
        if compiling:
            begun = time.perf_counter()
            out["activation_bytes_per_device_compiled"], for_mesh = budget.compiled_activation_bytes(at, mesh)
            out["compiled"] = {"stage": start, "mesh": for_mesh, "seconds": time.perf_counter() - begun}
    return out


# ---- checks


class Checks:
    """Tests and their outcome: ok is True, False for what pretrain refuses, None for not there yet or not certain."""

    def __init__(self):
        self.made: list[dict] = []
        self.errors: list[Error] = []

    def add(self, name: str, test):
        """test() gives (ok, what was found, a value); the value is returned, None where an Error was raised."""
        try:
            ok, found, value = test()
        except Error as e:
            self.errors.append(e)
            ok, found, value = False, str(e), None
        self.made.append({"name": name, "ok": ok, "found": found})
        return value


def shape(config: Train, devices: int):
    mesh = config.mesh.axes(devices)
    return True, words(mesh), mesh


def words(mesh: dict) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


def rows(config: Train, mesh: dict):
    """As pretrain asks it."""
    from smoljax import sharding

    sharding.check_rows(config, mesh)
    return True, f"{budget.rows_per_device(budget.largest(config, mesh)[1], mesh)} of a micro-batch on a device", True


def room(plan: dict, accelerator: str, remat: str):
    """By formula; never a refusal, for a compiler may do better."""
    names = ("state_bytes_per_device", "gradient_bytes_per_device", "activation_bytes_per_device_formula")
    need, has = sum(plan[name] for name in names) / 1e9, budget.MEMORY_GB[accelerator]
    found = f"{need:.2f} GB by formula, {accelerator} has {has}"
    if need <= has:
        return True, found, None
    remat = "" if remat == "full" else "set compute.remat=full, "
    return None, f"{found}: {remat}raise accumulate or --devices, or take shorter rows", None


def text(config: Train, checks: Checks) -> dict:
    """{source: {tokens, epochs}}; epochs is None for a source that is not there yet, or is damaged."""
    needed = checks.add("mixture", partial(mixture, config))
    if needed is None:
        return {}
    found = checks.add("data", partial(shards, config, list(needed)))
    if found:
        checks.add("tokenizer_and_epochs", partial(belongs, config, found))
    epochs = found.epochs(config.steps) if found else {}
    if config.heldout.sets:
        checks.add("heldout", partial(measured, config, found))
    return {name: {"tokens": n, "epochs": epochs.get(name)} for name, n in needed.items()}


def mixture(config: Train):
    needed = tokens(config)
    return True, f"{len(needed)} source{'s' * (len(needed) != 1)}", needed


def tokens(config: Train) -> dict[str, int]:
    """What each source will give, as data.Rows counts it, but without the source."""
    import numpy as np

    from smoljax.data import SLOTS, slots

    needed: dict[str, int] = {}
    for start, stop, at in budget.stages(config):
        names, rows = list(at.data.sources), (stop - start) * at.data.batch_size
        table = slots(list(at.data.sources.values())) if names else []
        for k, name in enumerate(names):
            given = rows // SLOTS * np.count_nonzero(table == k) + np.count_nonzero(table[: rows % SLOTS] == k)
            needed[name] = needed.get(name, 0) + int(given) * at.data.seq_len
    return needed


class Some:
    """Those of a run's sources that are there, in place of data.Rows where others are not: for runs.check_data."""

    def __init__(self, config: Train, names: list[str]):
        from smoljax.data import Windows, same_tokenizer

        T, V = config.data.seq_len, config.model.vocab_size
        self.needed = tokens(config)
        self.sources = {name: Windows(name, T, V, False).shards for name in names}
        same_tokenizer(list(self.sources.values()))

    def epochs(self, n: int) -> dict[str, float]:
        """Passes over each in the whole run; Rows also counts the padding of a source's last window."""
        return {name: self.needed[name] / (shards.num_tokens - 1) for name, shards in self.sources.items()}


def shards(config: Train, names: list[str]):
    from smoljax.data import Rows

    missing = [name for name in names if not Path(name).exists()]
    if not names:
        return None, "data.sources names no folder yet", None
    if missing:
        return None, absent(missing), Some(config, [name for name in names if name not in missing])
    found = Rows(config)
    return True, f"{sum(s.num_tokens for s in found.sources.values()):,} tokens in {len(names)} of {len(names)}", found


def absent(folders: list[str]) -> str:
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return f"not there yet: {', '.join(folders[:3])}{more}"


def belongs(config: Train, found):
    from smoljax import runs

    runs.check_data(config, found)
    known = [f"{name} has {s.vocab_size:,} ids" for name, s in found.sources.items() if s.vocab_size]
    said = f"{', '.join(known) or 'no source is there that says its own'}; model.vocab_size is "
    return True if known else None, f"{said}{config.model.vocab_size:,}", None


def measured(config: Train, found):
    from smoljax import heldout

    sets = config.heldout.sets
    missing = [folder for folder in sets.values() if not Path(folder).exists()]
    there = {name: folder for name, folder in sets.items() if folder not in missing}
    for _, _, at in budget.stages(config):
        at = dataclasses.replace(at, heldout=dataclasses.replace(config.heldout, sets=there))
        heldout.open_sets(at, list(found.sources.values()) if found else [])
    if missing:
        return None, absent(missing), None
    return True, f"there: {', '.join(sets)}", None


def beginning(config: Train):
    if config.init_from is None:
        return True, "from scratch", None
    there = Path(config.init_from).exists()
    return there or None, f"there: {config.init_from}" if there else absent([config.init_from]), None


def disk(config: Train):
    from smoljax import runs

    need, free, place = runs.room(Path(config.run), config)
    if need > free and place != Path(config.run).absolute():  # it may be planned elsewhere than where it will run
        return (
            None,
            f"{need / 1e9:.2f} GB needed, {place} has {free / 1e9:.2f}: make room, or name another run=DIR",
            None,
        )
    runs.check_disk(Path(config.run), config)
    return True, f"{need / 1e9:.2f} GB needed, {place} has {free / 1e9:.2f}", None


# ---- the page


def page(config: Train, plan: dict) -> str:
    from smoljax.metrics import human

    p = plan
    speed = p["tokens"] / p["hours"] / 3600 / p["devices"]
    hours = f"{p['hours']:,.1f} hours" if p["hours"] > 0.1 else f"{p['hours'] * 3600:.2g} seconds"
    lines = [
        f"run          {p['run']}",
        f"model        {p['parameters']:,} parameters, computed in {config.compute.dtype}, remat {p['remat']}",
    ]
    lines += [
        f"stage        from step {s['start']:,}: {s['steps']:,} steps of {s['batch_size']:,} x {s['seq_len']:,} = "
        f"{s['tokens_per_step']:,} tokens, {s['tokens']:,} in all, in micro-batches of {s['micro_batch_rows']:,} rows\n"
        f"             {s['flops_per_token_causal'] / 1e9:.3f} GFLOPs a token with causal attention, "
        f"{s['flops_per_token_full'] / 1e9:.3f} counting it full"
        for s in p["stages"]
    ]
    lines += [
        f"total        {p['steps']:,} steps, {p['tokens']:,} tokens, {p['flops_causal']:.3g} FLOPs "
        f"({p['flops_full']:.3g} full)",
        f"time         {hours} on {p['devices']:,} x {p['accelerator']} at MFU {p['mfu']:g} (causal), "
        f"{human(speed)} tokens/s on each",
        *memory_lines(p, config.compute.dtype),
        f"checkpoint   {p['checkpoint_bytes'] / 1e9:.2f} GB, the run's folder up to {p['disk_bytes'] / 1e9:.2f} GB",
        inference_line(**p["inference_bytes"]),
    ]
    for name, s in p["sources"].items():
        passes = "" if s["epochs"] is None else f", it is read {s['epochs']:,.2f} times"
        lines.append(f"source       {name}: {s['tokens']:,} tokens needed{passes}")
    mark = {True: "ok", False: "NO", None: "?"}
    return "\n".join([*lines, *(f"{mark[c['ok']]:12s} {c['name']}: {c['found']}" for c in p["checks"])])


def inference_line(bfloat16: int, int8: dict) -> str:
    mb = {what: f"{size / 1e6:,.2f} MB" for what, size in int8.items()}
    return (
        f"inference    {bfloat16 / 1e6:,.2f} MB in bfloat16; in int8 weights {mb['weights']}, scales {mb['scales']}, "
        f"total {mb['total']}"
    )


def memory_lines(p: dict, dtype: str) -> list[str]:
    if p["activation_parts"] is None:
        return ["memory       not known: the mesh does not fit"]

    def gb(name: str) -> str:
        return f"{p[f'{name}_per_device'] / 1e9:.2f} GB"

    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in p["activation_parts"].items())
    lines = [
        f"a device     {gb('state_bytes')} of weights and moments, {gb('gradient_bytes')} of gradients",
        f"             {p['activation_bytes_per_device_formula'] / 1e9:.2f} GB of activations by formula ({parts})",
    ]
    if c := p["compiled"]:
        size, count = p["activation_bytes_per_device_compiled"] / 1e9, math.prod(c["mesh"].values())
        pretended = f"{count} pretended CPU device{'s' * (count > 1)}"
        pretended += f" in place of {p['devices']}, as many rows on each" * (count < p["devices"])
        lines += [
            f"             {size:.2f} GB of activations compiled for {pretended}",
            f"             the stage at {c['stage']:,}, in {c['seconds']:.1f} s{FLOAT32 * (dtype == 'bfloat16')}",
        ]
    return lines


if __name__ == "__main__":
    raise SystemExit(run(main))
