"""What run.py measured, for people: the tables in Markdown, and recall as heat maps."""

from pathlib import Path

import numpy as np

TITLES = {
    "short": "trained at T = {0}",
    "more": "trained on at {0}",
    "same": "extended to {1}, theta kept",
    "theta": "extended to {1}, theta changed",
}


def title_of(arm: str, results: dict) -> str:
    return TITLES[arm].format(results["seq_len"], 4 * results["seq_len"])


def recall_of(runs: list[dict]) -> np.ndarray:
    """Accuracy by seed, length and depth."""
    return np.array([list(run["recall"].values()) for run in runs])


def tables(results: dict) -> str:
    """Loss by position, and recall by length over all depths: one row a kind of run, each seed in its cell."""
    runs = {arm: results["runs"][arm] for arm in TITLES}
    first = runs["short"][0]
    loss = {a: [[f"{x:.3f}" for x in r["loss_by_position"].values()] for r in some] for a, some in runs.items()}
    lookup = {arm: [[f"{x:.1%}" for x in seed.mean(-1)] for seed in recall_of(some)] for arm, some in runs.items()}
    chance = " | ".join(["chance", *[f"{1 / results['values']:.1%}"] * len(first["recall"])])
    return "\n".join(
        [
            table("held-out loss at position", first["loss_by_position"], loss, results),
            "",
            table("recall in a document of", first["recall"], lookup, results),
            f"| {chance} |",
        ]
    )


def table(head: str, columns, cells: dict, results: dict) -> str:
    lines = [[head, *columns], ["---", *("---:" for _ in columns)]]
    for arm, seeds in cells.items():
        lines.append([title_of(arm, results), *(" / ".join(one) for one in zip(*seeds, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict, file: Path):
    """Accuracy by length and depth, the mean over seeds, one panel a kind of run. Needs matplotlib: smoljax[plot]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chance = 1 / results["values"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained", sharex=True, sharey=True)
    for axis, arm in zip(axes.flat, TITLES, strict=True):
        runs = results["runs"][arm]
        mean = recall_of(runs).mean(0)
        image = axis.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(mean):
            color = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=9)
        axis.set_title(title_of(arm, results) + (f", mean of {len(runs)}" if len(runs) > 1 else ""), fontsize=10)
        axis.set_yticks(range(len(mean)), runs[0]["recall"])
        axis.set_xticks(
            range(results["bins"]), [f"{100 * (b + 0.5) / results['bins']:.0f}" for b in range(results["bins"])]
        )
    for axis in axes[:, 0]:
        axis.set_ylabel("document, tokens")
    for axis in axes[1]:
        axis.set_xlabel("depth of the binding, % of the document")
    figure.colorbar(
        image, ax=axes, label=f"recall, %: chance is {100 * chance:.1f}", format=lambda x, _: f"{100 * x:.0f}"
    )
    figure.savefig(file, dpi=100)
    plt.close(figure)
