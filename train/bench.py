"""Training speed here, on random tokens; a duel with transformers on the same weights and batches.

    smoljax bench-train --model smollm2-135m --batch 2 --seq 512
    smoljax bench-train --model smollm2-135m --batch 2 --seq 512 --against transformers --json
    smoljax bench-train --suite                          # tables and JSON, or some parts: --suite speed,ablation
    smoljax bench-train --host shards/web                # the loader's tokens a second, and how long a save blocks

From an uninstalled checkout: python -m train.bench. Nothing but JAX, flax, optax and numpy is needed, and torch and
transformers for the duel. What was measured for smoljax is in docs/benchmarks.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

from smoljax import settings
from smoljax.config import SIZES, Data, Optim, Train
from smoljax.errors import Error, require, run
from smoljax.settings import meant

CLOSE = 0.01  # nats: two trainings that are the same but for rounding stay within this of each other


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax bench-train", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="as for pretrain: compute.remat=full mesh.fsdp=4")
    parser.add_argument("--model", default="smollm2-135m", help=f"one of {', '.join(SIZES)} (default: smollm2-135m)")
    parser.add_argument("--batch", type=int, help="rows a step (default: 2 on a CPU, else 65,536 tokens)")
    parser.add_argument("--seq", type=int, help="tokens a row (default: 512 on a CPU, else 2,048)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--windows", type=int, default=5, metavar="N", help="timed windows, the median counts")
    parser.add_argument("--steps", type=int, metavar="N", help="steps a window (default: about a second)")
    parser.add_argument("--against", choices=["transformers"], help="the same training there too, in turn: A B A B")
    parser.add_argument(
        "--suite",
        nargs="?",
        const="all",
        metavar="PARTS",
        help="tables; or some: speed,ablation,attention,flags,scaling,memory",
    )
    parser.add_argument("--host", metavar="SHARDS", help="the loader on these shards, and a save; no step")
    parser.add_argument("--out", metavar="FILE", help="the suite's JSON (default: bench-train-DEVICE.json)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is JSON")
    args = parser.parse_intermixed_args(argv)
    require(sum(bool(x) for x in (args.against, args.suite, args.host)) <= 1, "--against, --suite, --host: one of them")
    for name in ("batch", "seq", "steps", "windows"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} is {value}, expected at least 1")
    if args.against:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both are on one GPU
    config = configured(args)
    from smoljax import measure, suite

    if args.suite:
        suite.run(config, args.suite, args.out)
        return 0

    around = measure.surroundings()
    if args.host:
        result = host(args.host, config)
    elif args.against:
        from smoljax.duel import duel

        result = duel(config, Path(__file__).with_name("bench_peer.py"), args.windows, args.steps or 2)
    else:
        result = measure.speed(config, args.windows, args.steps)
    result = around | {"config": measure.described(config)} | result
    print("\n".join(f"{name:22s} {suite.shown(value)}" for name, value in result.items() if name != "losses"))
    if args.json:
        print(json.dumps(result))
    if args.against and result["loss_difference"] > CLOSE:
        raise Error(
            f"the losses differ by up to {result['loss_difference']:.4f} nats, expected at most {CLOSE}: these are not "
            "the same training, and their speeds say nothing"
        )
    return 0


def configured(args) -> Train:
    """A run with SmolLM2's optimizer, as the flags and settings say. Mistakes in them are said before JAX starts."""
    from smoljax import runtime

    require(
        args.model in SIZES, f"--model {args.model!r}{meant(args.model, SIZES)}; expected one of {', '.join(SIZES)}"
    )
    config = Train(SIZES[args.model], steps=10_000, optim=Optim(lr=1e-3, warmup_steps=10, decay_steps=2000))
    runtime.set_flags(settings.override(config, args.settings).xla_flags)
    import jax

    cpu = jax.default_backend() == "cpu"
    T = args.seq or (512 if cpu else 2048)
    B = args.batch or (2 if cpu else max(1, 65_536 // T) * jax.device_count())
    longest = max(T, config.model.max_position_embeddings)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_position_embeddings=longest),
        data=Data(seq_len=T, batch_size=B),
    )
    config = settings.override(config, [f"compute.dtype={args.dtype or ('float32' if cpu else 'bfloat16')}"])
    return settings.override(config, args.settings)


# ---- the host


def host(folder: str, config: Train) -> dict:
    """Tokens a second of the loader, plain and with documents masked, and how long a save of this model blocks."""
    import jax
    import numpy as np

    from smoljax import checkpoint, measure, sharding
    from smoljax.data import Rows, batches

    result = {}
    for masked in (False, True):
        data = dataclasses.replace(config.data, sources={folder: 1}, mask_documents=masked, seq_len=2048, batch_size=64)
        model = dataclasses.replace(config.model, max_position_embeddings=8192)
        rows = Rows(dataclasses.replace(config, data=data, model=model))
        feed = batches(rows, 0, 400, sharding.batch_sharding(sharding.mesh(config.mesh)))
        next(feed)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 5 and count < 390:
            jax.block_until_ready(next(feed))
            count += 1
        speed = count * data.batch_size * data.seq_len / (time.perf_counter() - begun)
        result[f"loader_tokens_per_s{'_masked' * masked}"] = speed
    ours = measure.Training(config)
    ours.timed(0, 1)
    with tempfile.TemporaryDirectory() as place:
        kept = checkpoint.Checkpoints(Path(place), 2, None, 1)
        with kept:
            blocks, whole = [], []
            for n in (1, 2, 3):
                ours.timed(n, 1)
                begun = time.perf_counter()
                kept.save(n, {}, **checkpoint.parts(ours.state))
                blocks.append(time.perf_counter() - begun)
                kept.finish()
                whole.append(time.perf_counter() - begun)
    return result | {"save_blocks_s": float(np.median(blocks)), "save_s": float(np.median(whole))}


if __name__ == "__main__":
    raise SystemExit(run(main))
