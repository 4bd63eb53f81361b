"""Runs compared: one picture, one page that opens offline, and the numbers in a table.

    smoljax report runs/demo
    smoljax report runs/a runs/b --output report-ab

Writes DIR/report.png and DIR/report.html, which holds the picture and the table and asks nothing of a network.
"""

import argparse
import base64
import dataclasses
import html
import json
import math
import statistics
from pathlib import Path

from smoljax import atomic, settings
from smoljax.errors import UsageError, require, run
from smoljax.metrics import human

LAST = 20  # records at the most: one loss alone is noise, and a short run's last 20 are its whole fall
NOTE = f"The last loss is the mean of the last tenth of a run's records, at most {LAST}."

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1320px; margin: 2em auto; padding: 0 1em }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3em 1.2em .3em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }}
td {{ overflow-wrap: anywhere; min-width: 8em }}
thead th {{ border-bottom: 2px solid #222; overflow-wrap: anywhere }}
tbody th {{ font-weight: normal; color: #555 }}
tr.part th {{ padding-top: 1.2em; color: #222; font-weight: bold }}
.run {{ display: inline-block; width: .8em; height: .8em; margin-right: .4em }}
img {{ width: 100% }}
</style>
</head>
<body>
<h1>{title}</h1>
<div><table>
{table}
</table></div>
<p>{note} Best held-out losses are those measured on the way; what a run did not record has a dash.</p>
<img alt="{alt}" src="data:image/png;base64,{picture}">
</body>
</html>
"""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder made by `smoljax pretrain`")
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="default: report")
    parser.add_argument("--json", action="store_true", help="the table as one JSON line on stdout")
    args = parser.parse_args(argv)

    from smoljax import curves, recorded

    runs = recorded.load(args.runs)
    for r in runs:
        require(bool(r.records), f"{r.folder} has no records in metrics.jsonl; let it train for a step first")
    rows, differ = [row(r) for r in runs], differences([r.config for r in runs])
    try:
        picture = curves.picture(runs)
    except ImportError:
        raise UsageError("report draws with matplotlib, which is not installed: pip install 'smoljax[plot]'") from None
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        atomic.write(args.output / "report.png", picture)
        atomic.write(args.output / "report.html", page(rows, differ, picture))
    except OSError as e:
        raise UsageError(f"--output {args.output} cannot be written ({e.strerror}); name another folder") from None
    if args.json:
        print(json.dumps({"runs": rows, "differ": differ}))
    else:
        print(table(rows, differ))
        print(f"\n{NOTE}\n{args.output / 'report.html'}")
    return 0


def row(r) -> dict:
    """One run's numbers; None is what it did not record, or a number that is none (NaN)."""
    loss, speed, mfu, skipped = (
        [v for v in r.points(f"train/{key}")[1].tolist() if math.isfinite(v)]
        for key in ("loss", "tokens_per_sec", "mfu", "skipped_steps")
    )
    time = r.goodput
    return {
        "run": r.label,
        "folder": str(r.folder),
        "parameters": r.config.model.parameters,
        "steps": int(r.steps[-1]),
        "tokens": int(r.tokens[-1]),
        "last_loss": statistics.fmean(loss[-min(LAST, len(loss) // 10 or 1) :]) if loss else None,
        "heldout": {name: best(r, name) for name in r.heldout},
        "tokens_per_sec": statistics.median(speed) if speed else None,
        "mfu": statistics.median(mfu) if mfu else None,
        "skipped": int(skipped[-1]) if skipped else None,
        "goodput": time["goodput/productive_s"] / sum(time.values()) if sum(time.values()) else None,
    }


def best(r, name: str) -> dict | None:
    """The lowest loss on a held-out set, and the step that it was measured at."""
    where, loss = r.points(f"eval/{name}/loss")
    found = [(v, int(r.steps[i])) for v, i in zip(loss.tolist(), where, strict=True) if math.isfinite(v)]
    return dict(zip(("loss", "step"), min(found), strict=True)) if found else None


def differences(configs) -> dict[str, list]:
    """Config keys in which the runs differ -> a value for each run, as in config.json."""
    said = [{k: plain(v) for k, v in settings.flat(c).items() if k != "run"} for c in configs]
    return {key: [s[key] for s in said] for key in said[0] if any(s[key] != said[0][key] for s in said)}


def plain(value):
    """A stage as its keys that say something."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        return {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    return value


def cells(rows: list[dict], differ: dict) -> list[tuple[str, list[str] | None]]:
    """The table, a line per number and a column per run; a line without cells is a heading."""

    def show(key, form):
        return [form(r[key]) if r[key] is not None else "-" for r in rows]

    def held(name):
        found = [r["heldout"].get(name) for r in rows]
        return [f"{f['loss']:.4f} at step {f['step']:,}" if f else "-" for f in found]

    lines = [("parameters", show("parameters", "{:,}".format)), ("steps", show("steps", "{:,}".format))]
    lines += [("tokens", show("tokens", "{:,}".format)), ("last loss", show("last_loss", "{:.4f}".format))]
    lines += [(f"best loss, {n}", held(n)) for n in sorted({name for r in rows for name in r["heldout"]})]
    lines += [("tokens/s, median", show("tokens_per_sec", human)), ("MFU", show("mfu", "{:.1%}".format))]
    lines += [("skipped updates", show("skipped", "{:,}".format)), ("goodput", show("goodput", "{:.1%}".format))]
    if differ:
        lines += [("settings that differ", None)]
        lines += [(key, [v if isinstance(v, str) else json.dumps(v) for v in vs]) for key, vs in differ.items()]
    return lines


def table(rows: list[dict], differ: dict) -> str:
    lines = [("run", [r["run"] for r in rows]), *cells(rows, differ)]
    lines = [(name, [" ".join(v.split()) for v in values or ()]) for name, values in lines]
    first = max(len(name) for name, _ in lines) + 2
    # A long setting does not push the other columns apart: it gets what the numbers leave.
    widths = [max(12, *(len(v[i]) for _, v in lines if v and len(v[i]) <= 40)) + 2 for i in range(len(rows))]
    ends = [[v.ljust(w - 1) + " " for v, w in zip(values, widths, strict=False)] for _, values in lines]
    return "\n".join((f"{name:<{first}}" + "".join(end)).rstrip() for (name, _), end in zip(lines, ends, strict=True))


def page(rows: list[dict], differ: dict, picture: bytes) -> str:
    from smoljax import curves

    said, names = html.escape, [r["run"] for r in rows]
    head = "".join(
        f'<th><span class="run" style="background:{curves.style(i)[0]}"></span>{said(n)}</th>'
        for i, n in enumerate(names)
    )
    lines = [f"<thead><tr><th>run</th>{head}</tr></thead>", "<tbody>"]
    for name, values in cells(rows, differ):
        part = "" if values else ' class="part"'
        lines.append(f"<tr{part}><th>{said(name)}</th>{''.join(f'<td>{said(v)}</td>' for v in values or ())}</tr>")
    return PAGE.format(
        title=said(", ".join(names)),
        table="\n".join([*lines, "</tbody>"]),
        note=NOTE,
        alt=said(f"curves of {', '.join(names)}"),
        picture=base64.b64encode(picture).decode(),
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
