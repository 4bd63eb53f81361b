"""The curves of one or more runs as one PNG, from their metrics.jsonl."""

from pathlib import Path

from smoljax import metrics

PANELS = {
    "train/loss": "loss (nats per token)",
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_sec": "tokens per second",
}


def draw(runs: list[Path], file: Path):
    """Loss, learning rate, gradient norm and speed against tokens seen. Needs matplotlib: pip install smoljax[plot]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for run in runs:
        records = metrics.read(run)
        for axis, key in zip(axes.flat, PANELS, strict=True):
            points = [(r["train/tokens"] / 1e6, r[key]) for r in records if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=Path(run).name, linewidth=1.2)
    for axis, title in zip(axes.flat, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="million tokens")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
