"""Muon against AdamW at equal tokens: each at the best of its own learning rates, held-out loss over tokens.

    python docs/muon/run.py                      # two CPU cores, this machine's Python library as the text

Every run is an ordinary `smoljax pretrain`, printed before it starts; the same command again goes on where it stopped.
Under --output lie shards, runs, results.json, loss.png and the tables. README.md beside this file is the report.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from smoljax import atomic, metrics, runtime, settings
from smoljax.errors import require, run
from train.demo import smoljax as command
from train.demo import title, write_corpus

KINDS = {"adamw": "AdamW", "muon": "Muon"}
RATES = (0.005, 0.01, 0.02)  # and, while the best is at an end, the next one by a factor of 2, MORE times at most
MORE = 2
STEPS = 200  # in the last 60 of them the rate falls to 0
ROWS, LENGTH = 16, 128
SETTINGS = (
    *("model.vocab_size=2048", f"steps={STEPS}", "optim.warmup_steps=20", "optim.decay_steps=60"),
    *("heldout.every=20", "heldout.max_tokens=32768", "save_every=1000"),
    *(f"data.batch_size={ROWS}", f"data.seq_len={LENGTH}"),
)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs at the best rate, the sweep's included")
    parser.add_argument("--output", type=Path, default=Path("docs-out/muon"), metavar="DIR")
    args = parser.parse_args(argv)
    require(args.seeds >= 1, f"--seeds is {args.seeds}, expected at least 1")
    runtime.hear_interrupts()
    out = args.output
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)

    runs = []
    for kind in KINDS:
        title(f"{KINDS[kind]}: learning rates, one seed")
        rates = list(RATES)
        found = {rate: pretrain(out, kind, rate, 1) for rate in rates}
        for _ in range(MORE):
            best = min(found, key=lambda rate: found[rate]["loss"])
            if best not in (min(found), max(found)):
                break
            more = best * 2 if best == max(found) else best / 2
            found[more] = pretrain(out, kind, more, 1)
        best = min(found, key=lambda rate: found[rate]["loss"])
        title(f"{KINDS[kind]}: {best:g} is best, {args.seeds} seeds of it")
        runs += [*found.values(), *(pretrain(out, kind, best, seed) for seed in range(2, args.seeds + 1))]

    title("the time of a step, the two in turns")
    results = {"tokens": STEPS * ROWS * LENGTH, "step_ms": step_times(), "runs": runs}
    atomic.write_json(out / "results.json", results)
    draw(results, out / "loss.png")
    print(tables(results))
    return 0


def prepare(out: Path):
    """The text, and token shards of it; every 20th module is held out."""
    title("text -> shards")
    if not (out / "corpus.done").exists():
        require(not (out / "corpus").exists(), f"{out / 'corpus'} is unfinished; delete it and start again")
        print(write_corpus(out / "corpus"))
        (out / "corpus.done").touch()
    train, heldout = out / "shards/train", out / "shards/heldout"
    command("prepare", out / "corpus/train", "--train-tokenizer", 2048, "--output", train)
    command("prepare", out / "corpus/heldout", "--tokenizer", train / "tokenizer.json", "--output", heldout)


def settings_of(kind: str, rate: float, seed: int) -> tuple[str, ...]:
    return (*SETTINGS, f"optim.kind={kind}", f"optim.lr={rate}", f"seed={seed}", f"data.seed={seed}")


def pretrain(out: Path, kind: str, rate: float, seed: int) -> dict:
    """One run, of the demo's model, and its loss on all held-out text; what is complete is not trained again."""
    folder, heldout = out / f"runs/{kind}-{rate:g}-{seed}", json.dumps({"text": str(out / "shards/heldout")})
    sources = f"data.sources={out / 'shards/train'}", f"heldout.sets={heldout}"
    command("pretrain", "demo", *settings_of(kind, rate, seed), *sources, f"run={folder}")
    held = [r for r in metrics.read(folder) if "eval/text/loss" in r]
    final = json.loads(command("evaluate", folder, "--data", out / "shards/heldout", "--json", capture=True))
    said = {"kind": kind, "lr": rate, "seed": seed, "loss": round(final["loss"], 4)}
    said |= {"tokens": [r["train/tokens"] for r in held]}
    return said | {"on_the_way": [round(r["eval/text/loss"], 4) for r in held]}


def step_times(rounds: int = 30) -> dict[str, float]:
    """Milliseconds of a step, the fastest of some that take turns: other work on the machine slows both."""
    import jax
    import jax.numpy as jnp

    from smoljax.step import init_state, train_step

    runtime.start()
    batch = {name: jnp.ones((ROWS, LENGTH), jnp.int32) for name in ("tokens", "labels")}
    states, steps, times = {}, {}, {kind: [] for kind in KINDS}
    for kind in KINDS:
        config = settings.load("demo", settings_of(kind, RATES[0], 1))
        states[kind] = init_state(config)
        steps[kind] = jax.jit(partial(train_step, config=config), donate_argnums=0)
    for _ in range(1 + rounds):
        for kind in KINDS:
            begun = time.perf_counter()
            states[kind], _ = jax.block_until_ready(steps[kind](states[kind], batch))
            times[kind].append(time.perf_counter() - begun)
    return {kind: round(1000 * min(some[1:]), 1) for kind, some in times.items()}


# ---- for people ------------------------------------------------------------------------------------------------------


def sweep(results: dict, kind: str) -> dict[float, float]:
    """Final held-out loss by rate, of the first seed: the others are not asked which rate is best."""
    return {r["lr"]: r["loss"] for r in results["runs"] if (r["kind"], r["seed"]) == (kind, 1)}


def at_best(results: dict, kind: str) -> list[dict]:
    """Every seed at the best rate."""
    found = sweep(results, kind)
    best = min(found, key=found.get)
    return [r for r in results["runs"] if (r["kind"], r["lr"]) == (kind, best)]


def reached(run: dict, loss: float) -> float | None:
    """Tokens at which a run's held-out loss first is `loss`, between measurements by a straight line."""
    points = list(zip(run["tokens"], run["on_the_way"], strict=True))
    for (t0, l0), (t1, l1) in zip(points, points[1:], strict=False):
        if l1 <= loss:
            return t0 + (t1 - t0) * min(1.0, (l0 - loss) / (l0 - l1))
    return None


def tables(results: dict) -> str:
    """The sweep; the seeds at the best rate; the tokens that Muon needs for AdamW's final loss."""
    found = {kind: sweep(results, kind) for kind in KINDS}
    rates = sorted({rate for losses in found.values() for rate in losses})
    first = [["final held-out loss, seed 1, at rate", *(f"{rate:g}" for rate in rates)]]
    second = [
        ["final held-out loss at the best rate", *(f"seed {r['seed']}" for r in at_best(results, "muon")), "mean"]
    ]
    for kind, name in KINDS.items():
        first.append([name, *(f"{found[kind][rate]:.3f}" if rate in found[kind] else "-" for rate in rates)])
        losses = [r["loss"] for r in at_best(results, kind)]
        rate = min(found[kind], key=found[kind].get)
        second.append([f"{name}, {rate:g}", *(f"{x:.3f}" for x in (*losses, statistics.mean(losses)))])
    pairs = list(zip(at_best(results, "adamw"), at_best(results, "muon"), strict=True))
    tokens = [reached(muon, adam["on_the_way"][-1]) for adam, muon in pairs]
    needed = [f"{t / results['tokens']:.0%}" if t else "not reached" for t in tokens]
    second.append(["tokens after which Muon is at AdamW's last loss, of AdamW's", *needed, ""])
    return "\n\n".join(map(table, (first, second)))


def table(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (lines[0], rule, *lines[1:]))


def draw(results: dict, file: Path):
    """Held-out loss over tokens, every seed a line, and the sweep. Needs matplotlib: smoljax[plot]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"adamw": "#0072B2", "muon": "#D55E00"}
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.7, 1), layout="constrained")
        for kind, name in KINDS.items():
            for i, r in enumerate(at_best(results, kind)):
                label = f"{name}, learning rate {r['lr']:g}" if i == 0 else None
                x = [t / 1000 for t in r["tokens"]]
                left.plot(x, r["on_the_way"], marker=".", color=colours[kind], linewidth=1, label=label)
            right.plot(*zip(*sorted(sweep(results, kind).items()), strict=True), "o-", color=colours[kind], label=name)
        left.set(
            xlabel="tokens (thousands)",
            ylabel="held-out loss (nats per token)",
            title="a sample on the way: best rate, every seed",
        )
        right.set(xlabel="learning rate", xscale="log", title="all held-out text at the end, seed 1")
        rates = sorted({r["lr"] for r in results["runs"]})
        right.minorticks_off()
        right.set_xticks(rates, [f"{rate:g}" for rate in rates])
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.legend(frameon=False)
        figure.savefig(file, dpi=90, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(run(main))
