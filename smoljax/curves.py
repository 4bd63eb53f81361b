"""Runs drawn against each other, from their metrics.jsonl: a run's curves.png, and the picture of `smoljax report`.

Everything is drawn over tokens seen. A key that a run's records lack is "not recorded", never a line at zero.
"""

import io
from pathlib import Path

import numpy as np

from smoljax import atomic, metrics, recorded
from smoljax.recorded import Run, tokens_at

# Okabe and Ito's colours, which colour-blind people tell apart, without their yellow, which nobody sees on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # for the 8th run and on
MARKERS = "osD^vP*X"  # of held-out sets
GREY = "#999999"
GOODPUT = {  # cumulative seconds in every record -> what a run's time went into
    "goodput/productive_s": ("training", "#009E73"),
    "goodput/data_wait_s": ("waiting for data", "#E69F00"),
    "goodput/eval_s": ("held-out sets", "#56B4E9"),
    "goodput/checkpoint_s": ("checkpoints", "#0072B2"),
    "goodput/compile_s": ("compiling", "#CC79A7"),
    "goodput/restore_s": ("restoring", GREY),
    "goodput/lost_s": ("lost to failures", "#D55E00"),
}
PANELS = {"train/lr": "learning rate", "train/grad_norm": "gradient norm", "train/tokens_per_sec": "tokens per second"}
SMALL = {"frameon": False, "fontsize": 8, "handlelength": 1.0, "columnspacing": 1.2}  # a legend below its panel
PARTS = 2000  # of a longer line, each drawn by its smallest and largest value: a spike stays as high as it was


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A long line as the smallest and largest point of each of PARTS parts, in order, with both ends."""
    if len(x) <= 2 * PARTS:
        return x, y
    edges = np.linspace(0, len(x), PARTS + 1).astype(int)
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    keep = [a + low[a:b].argmin() for a, b in pairs] + [a + high[a:b].argmax() for a, b in pairs]
    keep = np.unique([0, *keep, len(x) - 1])
    return x[keep], y[keep]


def draw(runs: list[Path], file: Path):
    """The picture of these runs' folders as a PNG. Needs matplotlib: pip install smoljax[plot]."""
    atomic.write(Path(file), picture(recorded.load(runs)))


def picture(runs: list[Run]) -> bytes:
    """A PNG; the same records give the same bytes with the same matplotlib. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mixed = [run for run in runs if any(r.get("data/tokens") for r in run.records)]
    wide = [[f"mix{i}", f"mix{i + 1}" if i + 1 < len(mixed) else "."] for i in range(0, len(mixed), 2)]
    wide = wide if len(mixed) > 1 else [["mix0", "mix0"]]
    rows = [["loss", "loss"], ["train/lr", "train/grad_norm"], ["train/tokens_per_sec", "goodput"], *wide]
    heights = [1.8, 1, 1, *(0.9 if mixed else 0.3 for _ in wide)]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        size = (12, 2.6 * sum(heights))
        figure, axes = plt.subplot_mosaic(rows, figsize=size, height_ratios=heights, layout="constrained")
        most = max([t for run in runs for t in run.tokens[-1:]], default=0)
        unit, word = next(((u, w) for u, w in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if most >= u), (1, ""))
        draw_loss(axes["loss"], runs, unit)
        for key, title in PANELS.items():
            draw_lines(axes[key], runs, key, title, unit)
        draw_goodput(axes["goodput"], runs)
        sources = sources_of(mixed)
        for i, run in enumerate(mixed):
            title = "tokens by source" + (f": {text(run.label, 36)}" if len(runs) > 1 else "")
            draw_mixture(axes[f"mix{i}"], run, title, unit, sources)
        if not mixed:
            axes["mix0"].set_title("tokens by source")
            not_recorded(axes["mix0"])
        for name, axis in axes.items():
            if name != "goodput" and axis.axison:
                axis.set(xlabel=f"tokens ({word})" if word else "tokens", xlim=(0, 1.01 * most / unit or 1))
                mark_stages(axis, runs if name[:3] != "mix" else [mixed[int(name[3:])]], unit, named=name == "loss")
        handles = [plt.Line2D([], [], color=c, linestyle=d, linewidth=2.5) for c, d in map(style, range(len(runs)))]
        names = [text(run.label) for run in runs]
        columns = max(1, min(4, len(runs), 150 // (8 + max(map(len, names), default=0))))
        figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
        if notes := remarks(runs):
            figure.supxlabel(notes, fontsize=8, color="#555555")
        out = io.BytesIO()
        figure.savefig(out, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return out.getvalue()


def style(i: int) -> tuple[str, str]:
    """Colour and dashes of the i-th run."""
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]


def text(name: str, longest: int = 48) -> str:
    """A name as matplotlib shows it: $ begins no formula, a leading _ hides nothing, a long one loses its middle."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    name = name if len(name) <= longest else f"{name[: longest // 2]}\u2026{name[1 - longest // 2 :]}"
    return name.replace("$", r"\$").replace("_", " _", 1) if name[0] == "_" else name.replace("$", r"\$")


def window(run: Run) -> int:
    """Records that the faint line averages over; 0 for a run too short to need one."""
    return len(run.records) // 40 if len(run.records) >= 200 else 0


def remarks(runs: list[Run]) -> str:
    windows = sorted({window(run) for run in runs} - {0})
    said = (
        [f"loss: thin as recorded, wide the mean of {' or '.join(f'{w:,}' for w in windows)} records"]
        if windows
        else []
    )
    if any(len(run.records) > 2 * PARTS for run in runs):
        said.append(f"of more than {2 * PARTS:,} records, each of {PARTS:,} parts is drawn by its minimum and maximum")
    return "; ".join(said)


def not_recorded(axis):
    axis.text(0.5, 0.5, "not recorded", ha="center", va="center", color=GREY, transform=axis.transAxes)
    axis.set_axis_off()


def mark_stages(axis, runs: list[Run], unit: float, named: bool):
    """A vertical line where a stage begins, in the run's colour where the runs' stages differ."""
    reached = [[s.start for s in run.config.stages if len(run.steps) and s.start < run.steps[-1]] for run in runs]
    places = [tuple(tokens_at(run.config, n) / unit for n in starts) for run, starts in zip(runs, reached, strict=True)]
    most = max(places, key=len)
    same = all(p == most[: len(p)] for p in places)  # one that stopped before a stage says nothing against it
    for i, marks in enumerate([most] if same else places):
        for k, x in enumerate(marks):
            colour = GREY if same else style(i)[0]
            axis.axvline(x, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
            if named and same and (k == 0 or x - marks[k - 1] > 0.07 * axis.get_xlim()[1]):
                axis.set_title(axis.get_title(), pad=16)  # above the stages' names
                axis.text(x, 1.0, f" stage {k + 2}", color="#555555", transform=axis.get_xaxis_transform(), va="bottom")


def draw_loss(axis, runs: list[Run], unit: float):
    shown, above, sets = [], [], sorted({name for run in runs for name in run.heldout})
    longest = max([run.tokens[-1] / unit for run in runs if run.records], default=0)
    for i, run in enumerate(runs):
        colour, dashes = style(i)
        where, loss = run.points("train/loss")
        x = run.tokens[where] / unit
        dot = {"marker": "."} if len(loss) == 1 else {}
        axis.plot(*thin(x, loss), linestyle=dashes, color=colour, linewidth=0.7, alpha=0.6, zorder=3, **dot)
        if w := min(window(run), len(loss)):
            mean = np.convolve(loss, np.ones(w) / w, "valid")
            axis.plot(*thin(x[w // 2 :][: len(mean)], mean), color=colour, linewidth=3, alpha=0.5, zorder=2)
        for name in run.heldout:
            at, values = run.points(f"eval/{name}/loss")
            marker = MARKERS[sets.index(name) % len(MARKERS)]
            line = {"color": colour, "linewidth": 0.8, "markersize": 5.5, "markeredgecolor": "white", "zorder": 4}
            axis.plot(*thin(run.tokens[at] / unit, values), linestyle=dashes, marker=marker, **line)
            shown.append(values)
        # The first fall, from ln(V), would take all of the panel's height.
        later = x > 0.05 * longest if len(x) and x[-1] > 0.05 * longest else x > 0.05 * x[-1:].sum()
        shown.append(loss[later])
        above.append(loss[~later])
    values, first = (np.concatenate([*v, []]) for v in (shown, above))
    values, first = values[np.isfinite(values)], first[np.isfinite(first)]
    axis.set_title("loss (nats per token)")
    if not len(values):
        return not_recorded(axis)
    low, high = values.min(), values.max()
    margin = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)
    if len(first) and first.max() > high + margin:
        axis.set_title(f"loss (nats per token); it begins above this panel, at {first.max():.2f}")
    axis.grid(alpha=0.25)
    if sets:
        axis.plot([], [], color="#555555", linewidth=0.8, label="training")
        for k, name in enumerate(sets):
            point = {"marker": MARKERS[k % len(MARKERS)], "color": "#555555", "linewidth": 0.8, "markersize": 5.5}
            axis.plot([], [], label=f"held out: {text(name)}", **point)
        axis.legend(loc="upper right", framealpha=0.9, edgecolor="none")


def draw_lines(axis, runs: list[Run], key: str, title: str, unit: float):
    from matplotlib import ticker

    empty = True
    for i, run in enumerate(runs):
        colour, dashes = style(i)
        where, values = run.points(key)
        dot = {"marker": "."} if len(where) == 1 else {}  # one record is no line
        width = 1.5 if key == "train/lr" else 0.8
        axis.plot(*thin(run.tokens[where] / unit, values), linestyle=dashes, color=colour, linewidth=width, **dot)
        empty = empty and not np.isfinite(values).any()
    axis.set_title(title)
    if empty:
        return not_recorded(axis)
    axis.grid(alpha=0.25)
    if key == "train/grad_norm":
        axis.set_yscale("log")  # spikes are many times the rest
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.yaxis.set_major_formatter(lambda y, _: metrics.human(y) if y >= 1 else f"{y:g}")
        axis.set_ylim(bottom=0)


def draw_goodput(axis, runs: list[Run]):
    """One bar a run: what percentage of its time went into what."""
    axis.set_title("where the time went (%)")
    if not any(sum(run.goodput.values()) for run in runs):
        return not_recorded(axis)
    left = np.zeros(len(runs))
    for key, (name, colour) in GOODPUT.items():
        share = np.array([100 * r.goodput.get(key, 0.0) / (sum(r.goodput.values()) or 1.0) for r in runs])
        if share.any():
            axis.barh(range(len(runs)), share, left=left, color=colour, label=name, height=0.6)
            for i, s in enumerate(share):
                if s >= 8:
                    axis.text(left[i] + s / 2, i, f"{s:.0f}", ha="center", va="center", color="white", weight="bold")
            left += share
    for i in np.flatnonzero(left == 0):
        axis.text(1, i, "not recorded", va="center", color=GREY)
    axis.set_yticks(range(len(runs)), [text(run.label, 20) for run in runs])
    axis.set(xlim=(0, 100), ylim=(len(runs) - 0.4, -0.6))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, **SMALL)


def sources_of(runs: list[Run]) -> dict[str, str]:
    """Source -> colour, the largest first; what has no colour of its own is drawn as others, in grey."""
    totals: dict = {}
    for run in runs:
        for name, count in next(r["data/tokens"] for r in reversed(run.records) if r.get("data/tokens")).items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda n: (-totals[n], n))
    return dict(zip(names, COLOURS, strict=False))


def draw_mixture(axis, run: Run, title: str, unit: float, colours: dict[str, str]):
    """The share of each source in the tokens between records, in at most 200 intervals."""
    where = [i for i, r in enumerate(run.records) if r.get("data/tokens")]
    where = [where[k] for k in np.unique(np.linspace(0, len(where) - 1, 200).astype(int))]
    totals = [run.records[i]["data/tokens"] for i in where]
    rows = {text(name, 30): [t.get(name, 0) for t in totals] for name in colours if name in totals[-1]}
    kinds = [colours[name] for name in colours if name in totals[-1]]
    others = [sum(count for name, count in t.items() if name not in colours) for t in totals]
    if any(others):
        rows, kinds = rows | {"others": others}, [*kinds, GREY]
    counts = np.diff(np.array(list(rows.values()), float), axis=1, prepend=0)
    share = 100 * counts / np.maximum(counts.sum(0), 1)
    share = np.concatenate([share, share[:, -1:]], axis=1)  # the last interval ends at the last record
    x = np.array([0, *run.tokens[where]]) / unit
    axis.stackplot(x, share, labels=list(rows), colors=kinds, step="post", alpha=0.85)
    axis.set_title(title)
    axis.set(ylim=(0, 100), ylabel="%")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, **SMALL)
