"""The main job end to end, by the programs' own main(argv): text, shards, model, longer context, export."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest

from infer import convert, generate
from smoljax import metrics
from train import demo, evaluate, prepare, pretrain

pytestmark = pytest.mark.slow  # a minute, mostly of training, as `make demo` is
REPO = Path(__file__).parents[1]
SMALL = ["model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2"]
SMALL += ["data.batch_size=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """This repository's own text through the README's commands."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("smoljax", "train", "configs"):
        shutil.copytree(
            REPO / name, folder / "text" / name, ignore=shutil.ignore_patterns("__pycache__", "__init__.py")
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert prepare.main(["text", "--train-tokenizer", "512", "--output", "shards", "--workers", "2"]) == 0
        sources = "data.sources=shards"
        argv = ["demo", sources, "run=runs/short", "steps=160", "optim.decay_steps=30", *SMALL]
        assert pretrain.main(argv) == 0
        argv = [
            "demo-long",
            sources,
            "init_from=runs/short",
            "run=runs/long",
            "steps=6",
            "optim.decay_steps=2",
            "optim.warmup_steps=1",
        ]
        assert pretrain.main([*argv, *SMALL]) == 0
        assert convert.main(["runs/long", "hf", "--to", "hf"]) == 0
    return folder


def test_the_loss_falls_and_the_longer_context_goes_on_from_there(place):
    """Below what the frequencies of tokens alone give: the text is this repository's, so it changes with each commit,
    and this bound with it. Of 5.26 nats, three seeds are left with 3.8 to 4.1."""
    (file,) = (place / "shards").glob("*.ds")
    counts = np.bincount(np.fromfile(file, np.uint16))
    p = counts[counts > 0] / counts.sum()
    frequencies = -(p * np.log(p)).sum()
    short, long = ([r["train/loss"] for r in metrics.read(place / "runs" / name)] for name in ("short", "long"))
    assert short[0] == pytest.approx(np.log(512), abs=0.5)
    assert statistics.mean(short[-3:]) < min(0.8 * short[0], frequencies - 0.5)
    assert long[0] < frequencies - 0.5


def test_the_longer_context_shows_in_the_loss_by_position(place, capsys):
    found = []
    for run in ("short", "long"):
        argv = [str(place / "runs" / run), "--data", str(place / "shards"), "--seq-len", "512", "--max-tokens", "20000"]
        capsys.readouterr()
        assert evaluate.main([*argv, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss_by_position"])
    short, long = found
    assert list(short) == ["0-127", "128-255", "256-511"]
    assert long["256-511"] < short["256-511"]


def test_the_export_is_the_same_model_in_transformers(place, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    capsys.readouterr()
    argv = [
        str(place / "runs/long"),
        "--prompt",
        "import numpy as",
        "--prompt",
        "def",
        "--max-new-tokens",
        "24",
        "--json",
    ]
    assert generate.main(argv) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(r) for r in rows] == [{"prompt", "text", "tokens", "finish_reason"}] * 2

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(place / "hf")
    for row in rows:
        ids = words(row["prompt"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert out == row["tokens"] and words.decode(out) == row["text"]

    from smoljax import weights

    ids = words("class Checkpoints:\n    def save(self, step: int) -> None:\n" * 8).input_ids
    ours = np.asarray(weights.load(place / "runs/long")(np.array([ids])))
    theirs = model(torch.tensor([ids])).logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert len(ids) > 128  # beyond the length of the first run


def test_the_demo_writes_its_corpus_from_the_library(tmp_path):
    assert "docstrings" in demo.write_corpus(tmp_path / "corpus")
    for part in ("train", "heldout"):
        assert any((tmp_path / "corpus" / part / "sources").rglob("*.py"))
        lines = (tmp_path / "corpus" / part / "docstrings.jsonl").read_text().splitlines()
        assert len(lines) > 100 and all(json.loads(line)["text"].strip() for line in lines)
    held = {p.relative_to(tmp_path / "corpus/heldout") for p in (tmp_path / "corpus/heldout").rglob("*.py")}
    assert not any((tmp_path / "corpus/train" / p).exists() for p in held)
