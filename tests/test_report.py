"""`smoljax report`: numbers that equal arithmetic on the records, a picture, and a page that needs no network."""

import base64
import dataclasses
import io
import json
import math
import re
import statistics
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from smoljax import curves, recorded
from smoljax.config import Data, Heldout, Model, Optim, Stage, Train
from smoljax.errors import CheckpointError, UsageError, run
from train import report

pytest.importorskip("matplotlib")

MODEL = Model(48, 96, 2, 4, 2, head_dim=12, vocab_size=64, max_position_embeddings=64)
STAGES = (Stage(start=20, sources={"a": 0.5, "c": 0.5}), Stage(start=40, seq_len=64, rope_theta=1e5))


def write(folder, steps=60, lr=1e-2, seed=0, old=False, stages=STAGES, heldout=("web", "code")):
    """A run's folder as pretrain leaves it; old: without what was recorded only later. Returns the records."""
    folder.mkdir(parents=True)
    data = Data(sources={"a": 0.7, "b": 0.3}, seq_len=32, batch_size=8)
    optim, held = Optim(lr=lr, warmup_steps=0), Heldout(sets={n: n for n in heldout}, every=10)
    config = Train(model=MODEL, steps=steps, data=data, optim=optim, stages=stages, heldout=held, run=str(folder))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    rng, records, tokens = np.random.default_rng(seed), [], {"a": 0, "b": 0, "c": 0}
    for n in range(1, steps + 1):
        loss, norm, speed, mfu = (4 / (1 + n / 30) + 0.1 * rng.random(4)).tolist()
        record = {"step": n, "train/loss": loss, "train/lr": lr, "train/grad_norm": norm, "train/tokens": 256 * n}
        record |= {"train/tokens_per_sec": 1000 * speed}
        if not old:
            tokens = tokens | {"a": tokens["a"] + 128, "b" if n <= 20 else "c": tokens["b" if n <= 20 else "c"] + 128}
            record |= {"train/mfu": mfu / 10, "train/skipped_steps": n // 25, "data/tokens": tokens}
            record |= {"goodput/productive_s": 2.0 * n, "goodput/compile_s": 30.0, "goodput/lost_s": n / 4}
            if n % 10 == 0:
                losses = {name: loss + 0.2 * rng.random() for name in heldout}
                record |= {f"eval/{name}/loss": v for name, v in losses.items()}
                record |= {f"eval/{name}/loss_by_position": {"0-31": 1.0} for name in heldout}
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def image(png: bytes) -> np.ndarray:
    import matplotlib.image

    return matplotlib.image.imread(io.BytesIO(png))


def test_the_table_is_arithmetic_on_the_records(tmp_path, capsys):
    records = {"a": write(tmp_path / "a"), "b": write(tmp_path / "b", steps=50, lr=2e-2, seed=1)}
    argv = [str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")]
    assert report.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differ"] == {"steps": [60, 50], "optim.lr": [1e-2, 2e-2]}
    for row, (name, made) in zip(found["runs"], records.items(), strict=True):
        last = made[-1]
        assert row["run"] == name and row["steps"] == len(made) and row["tokens"] == 256 * len(made)
        # On paper: 64 x 48 embedding, two layers of q and o 48 x 48, k and v 48 x 24, 3 x 48 x 96, two norms; a norm.
        assert row["parameters"] == 64 * 48 + 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96 + 2 * 48) + 48
        assert row["last_loss"] == pytest.approx(statistics.fmean(r["train/loss"] for r in made[-(len(made) // 10) :]))
        for held in ("web", "code"):
            measured = [(r[f"eval/{held}/loss"], r["step"]) for r in made if f"eval/{held}/loss" in r]
            assert len(measured) == len(made) // 10
            assert row["heldout"][held] == dict(zip(("loss", "step"), min(measured), strict=True))
        assert row["tokens_per_sec"] == statistics.median(r["train/tokens_per_sec"] for r in made)
        assert row["mfu"] == statistics.median(r["train/mfu"] for r in made)
        assert row["skipped"] == len(made) // 25
        assert row["goodput"] == last["goodput/productive_s"] / (2.25 * len(made) + 30)

    assert report.main(argv) == 0
    lines = {
        line.split("  ")[0]: line.split("  ", 1)[1].split()
        for line in capsys.readouterr().out.splitlines()
        if "  " in line
    }
    assert lines["run"] == ["a", "b"] and lines["tokens"] == ["15,360", "12,800"]
    assert lines["last loss"] == [f"{r['last_loss']:.4f}" for r in found["runs"]]
    assert lines["optim.lr"] == ["0.01", "0.02"] and lines["skipped updates"] == ["2", "2"]
    page = (tmp_path / "out/report.html").read_text()
    assert f"<td>{found['runs'][0]['last_loss']:.4f}</td>" in page and "<th>optim.lr</th><td>0.01</td>" in page


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_opens_offline_and_a_name_is_no_markup(tmp_path, capsys):
    names = ["<script>alert(1)<", 'a"b onload="x', "m$_{x}^$", "_hidden", "tab\tüber"]
    for i, name in enumerate(names):
        write(tmp_path / name, seed=i)
    argv = [str(tmp_path / name) for name in names]
    assert report.main([*argv, "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    tags = Tags(page)
    known = set("html head meta title style body h1 div table thead tbody tr th td span p img".split())
    assert {tag for tag, _ in tags.found} == known
    assert not {key for _, attrs in tags.found for key in attrs if key.startswith("on")}
    links = [attrs[key] for _, attrs in tags.found for key in ("src", "href") if key in attrs]
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?://|@import|url\(", page)
    assert all(name in tags.texts for name in names)
    picture = (tmp_path / "out/report.png").read_bytes()
    assert base64.b64decode(links[0].partition(",")[2]) == picture

    assert report.main([*argv, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/report.html").read_text() == page  # the same data, the same bytes


@pytest.mark.parametrize("steps, last", [(12, 1), (60, 6), (300, 20)])
def test_the_last_loss_is_of_the_end(tmp_path, steps, last):
    made = write(tmp_path / "run", steps=steps, stages=())
    assert report.row(*recorded.load([tmp_path / "run"]))["last_loss"] == pytest.approx(
        sum(r["train/loss"] for r in made[-last:]) / last, rel=1e-12
    )


def test_the_picture_shows_the_runs_each_in_its_colour(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    curves.draw([tmp_path / "a", tmp_path / "b"], tmp_path / "curves.png")
    pixels = image((tmp_path / "curves.png").read_bytes())
    assert pixels.shape[1] == 1320 and pixels.shape[0] > 800
    for colour in curves.COLOURS[:2]:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[..., :3] - wanted).max(-1) < 0.01).sum() > 500
    one, other = (curves.picture(recorded.load([tmp_path / name])) for name in "ab")
    assert one != other


def test_what_an_old_run_did_not_record_is_said(tmp_path, capsys, monkeypatch):
    write(tmp_path / "old", old=True, stages=(), heldout=())
    said, real = [], curves.not_recorded
    monkeypatch.setattr(curves, "not_recorded", lambda axis: (said.append(axis.get_title()), real(axis)))
    assert report.main([str(tmp_path / "old"), "--output", str(tmp_path / "out"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    assert said == ["where the time went (%)", "tokens by source"]
    assert row["heldout"] == {} and row["mfu"] is row["skipped"] is row["goodput"] is None
    assert row["last_loss"] > 0


def test_a_run_of_one_record_and_losses_that_are_not_finite_still_draw(tmp_path, capsys):
    (record, *_) = write(tmp_path / "one")
    (tmp_path / "one/metrics.jsonl").write_text(json.dumps(record | {"train/loss": math.nan}) + "\n")
    assert report.main([str(tmp_path / "one"), "--output", str(tmp_path / "out"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    assert row["last_loss"] is None and row["steps"] == 1


def test_tokens_and_stages_on_paper(tmp_path):
    write(tmp_path / "a")
    (r,) = recorded.load([tmp_path / "a"])
    # 8 rows of 32 for 40 updates; then rows of 64, as many tokens a step as before.
    assert [recorded.tokens_at(r.config, n) for n in (0, 1, 20, 40, 41, 60)] == [0, 256, 5120, 10240, 10496, 15360]
    config = dataclasses.replace(r.config, stages=(Stage(start=40, seq_len=64, batch_size=8),))
    assert recorded.tokens_at(config, 60) == 40 * 256 + 20 * 512
    # A measurement without train/tokens, as at the end of a run, stands where its step does.
    lines = [{"step": 10, "train/tokens": 100}, {"step": 15, "eval/web/loss": 2.0}, {"step": 20, "train/tokens": 300}]
    (tmp_path / "a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorded.load([tmp_path / "a"])[0].tokens.tolist() == [100, 200, 300]


def test_a_long_run_keeps_every_spike():
    rng = np.random.default_rng(0)
    x, y = np.arange(1_000_003.0), rng.normal(size=1_000_003)
    y[123_456], y[654_321], y[777_777] = 50.0, -50.0, np.nan
    few_x, few_y = curves.thin(x, y)
    assert len(few_x) <= 2 * curves.PARTS + 2 and (np.diff(few_x) > 0).all()
    assert few_x[0] == 0 and few_x[-1] == x[-1]
    assert {(123_456.0, 50.0), (654_321.0, -50.0)} <= set(zip(few_x, few_y, strict=True))
    assert all(y[int(a)] == b for a, b in zip(few_x, few_y, strict=True))
    edges = np.linspace(0, len(x), curves.PARTS + 1).astype(int)  # the envelope of each part is the part's own
    for a, b in zip(edges[:-1:100], edges[1::100], strict=True):
        inside = few_y[(few_x >= a) & (few_x < b)]
        assert inside.max() == np.nanmax(y[a:b]) and inside.min() == np.nanmin(y[a:b])
    short = curves.thin(x[:100], y[:100])
    assert (short[0] == x[:100]).all() and (short[1] == y[:100]).all()


def test_equal_names_are_told_apart(tmp_path):
    paths = [tmp_path / p for p in ("x/base", "y/base", "other", "p/q/same", "r/q/same")]
    assert recorded.labels(paths) == ["x/base", "y/base", "other", "p/q/same", "r/q/same"]
    with pytest.raises(UsageError, match="are the same run; name each once"):
        recorded.labels([tmp_path / "x/base", tmp_path / "y/../x/base"])


def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fine")
    write(tmp_path / "torn")
    (tmp_path / "torn/metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    write(tmp_path / "odd")
    (tmp_path / "odd/metrics.jsonl").write_text('{"step": 1, "train/loss": "low"}\n')
    write(tmp_path / "three")
    (tmp_path / "three/metrics.jsonl").write_text("3\n")
    write(tmp_path / "new")
    (tmp_path / "new/metrics.jsonl").unlink()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"hidden_size": 576}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text('{"model": [1], "steps": 5}')
    cases = {
        ("missing",): (2, "missing is not a run: it has no config.json"),
        ("hf",): (2, "hf is not a run: its config.json is of something else"),
        ("list",): (2, "a saved Model is [1], expected its keys and values"),
        ("new",): (2, "new has no records in metrics.jsonl"),
        ("torn",): (4, "torn/metrics.jsonl:2 is not JSON"),
        ("odd",): (3, "odd/metrics.jsonl has a train/loss that is not a number"),
        ("three",): (4, "three/metrics.jsonl:1 is no record with a step"),
        ("fine", "fine"): (2, "fine and fine are the same run"),
        ("fine", "--output", "fine/config.json"): (2, "--output fine/config.json cannot be written"),
    }
    for argv, (code, sentence) in cases.items():
        assert run(report.main, list(argv)) == code
        assert capsys.readouterr().err.startswith(f"smoljax: {sentence}")
    with pytest.raises(CheckpointError):
        curves.draw([tmp_path / "torn"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists() and not (tmp_path / "report").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(report.main, ["fine"]) == 2
    assert "pip install 'smoljax[plot]'" in capsys.readouterr().err
    with pytest.raises(ImportError):  # pretrain says it and goes on
        curves.draw([tmp_path / "fine"], tmp_path / "curves.png")
