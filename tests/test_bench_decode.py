"""`smoljax bench-decode`: its arithmetic, what it needs, the duel's fairness, and its mistakes."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import pytest

from infer.bench import DTYPES, main
from smoljax import decode_duel, decode_measure, decode_suite, exchange, hf, layout, quantize, settings, suite
from smoljax.config import SIZES, Train
from smoljax.errors import Error, run

REPO = Path(__file__).resolve().parents[1]
TINY = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.head_dim=16"]
TINY += ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=512"]
ARGS = ["--batch", "2", "--prompt-tokens", "8", "--new-tokens", "12", "--windows", "2", "--json"]


@cache
def model():
    config = settings.override(Train(SIZES["smollm2-135m"], 10_000), TINY).model
    return decode_measure.random_model(config)


def last_line(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_a_row_is_arithmetic_on_what_was_measured(capsys):
    assert main([*ARGS, *TINY]) == 0
    row = last_line(capsys.readouterr().out)
    assert row["tokens_per_s"] == pytest.approx(2 * 12 / row["wall_s"])
    assert row["prefill_tokens_per_s"] == pytest.approx(2 * 8 / row["prefill_s"])
    assert row["cpu_s_per_token"] > 0 and row["warmup_s"] > row["wall_s"]
    c, layer = model().config, 2 * 64 * 16 * (4 + 2) + 3 * 64 * 128 + 2 * 64
    weights, kept = 2 * layer + 64 + 512 * 64, 2 * 2 * 2 * c.num_key_value_heads * c.head_dim * 256
    assert row["read_mb"] * 1e6 == 4 * (weights + kept)
    assert row["memory_gb"] * 1e3 > row["read_mb"] and row["peak_gb"] is None  # a CPU does not say
    assert {"device", "versions", "commit", "XLA_FLAGS"} <= row.keys() and row["versions"]["jax"] == jax.__version__
    assert row["config"]["num_hidden_layers"] == 2 and (row["dtype"], row["cache"]) == ("float32", None)


def test_medians_of_windows():
    found = decode_measure.figures([(1, 3, 4, []), (2, 9, 8, []), (1, 4, 6, [])], 2, 10, 5)
    assert (found["wall_s"], found["prefill_s"]) == (4, 1)
    assert found["tokens_per_s"] == 2 * 5 / 4 and found["decode_tokens_per_s"] == 2 * 4 / 3
    assert found["prefill_tokens_per_s"] == 2 * 10 and found["cpu_s_per_token"] == 6 / 10
    for nothing in ([(1, 1, 1, [])], 2, 10, 1), ([(2, 1, 1, [])], 2, 10, 5):
        assert "decode_tokens_per_s" not in decode_measure.figures(*nothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_its_own_bytes_and_all_its_tokens(dtype):
    served = decode_measure.served(model(), dtype, 1)
    generation = decode_measure.Generation(served, [[1, 2, 3]], "int8")
    assert len(generation.timed(7)[2][0]) == 7  # none ends a row
    row = decode_measure.rounds(generation.engine, 64)
    numbers = {name: getattr(model().layers, name).size for name in quantize.MATRICES}
    sizes = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 4), "int8-embedding": (1, 1)}[dtype]
    least = sizes[0] * sum(numbers.values()) + sizes[1] * model().embed.size
    kept = 2 * 2 * 2 * 256 * (16 + 4)  # layers, keys and values, heads, places, numbers and a scale
    assert least + kept <= row["read_mb"] * 1e6 < least + kept + 20_000  # scales and norms


def test_it_runs_from_a_checkout_without_what_a_gpu_machine_lacks(tmp_path):
    """Nothing but JAX, flax (which brings orbax and rich itself), optax and numpy is imported, the suite too."""
    lacking = "grain datatrove einops safetensors tokenizers pyarrow orjson gguf jinja2 torch transformers".split()
    more = ["--suite", "bandwidth", "--out", str(tmp_path / "out.json")]
    text = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from infer.bench import main; "
    text += f"main({[*ARGS, *TINY]}); main({[*more, *TINY]})"
    done = subprocess.run([sys.executable, "-c", text], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"batch": 2' in done.stdout and "| bandwidth |" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    rows = {row["what"]: row for row in written["bandwidth"]}
    best = max(written["bandwidth_gb_s"].values())
    assert max(row["of_bandwidth"] for name, row in rows.items() if "float32" in name) >= 1 and len(rows) == 6
    int8 = rows["decode, 1 x 64, int8"]
    assert int8["of_bandwidth"] == pytest.approx(int8["read_gb_s"] / best) and "error" not in int8


@pytest.fixture
def peer(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_duel_is_one_generation_on_both_sides(peer, capsys):
    assert main([*ARGS, "--dtype", "int8", "--cache", "int8", "--drafts", "2", "--against", "transformers", *TINY]) == 0
    result = last_line(capsys.readouterr().out)
    ours, theirs = ([name for name in result if name.startswith(f"{side} ")] for side in ("smoljax", "transformers"))
    assert {
        "smoljax float32",
        "smoljax bfloat16",
        "smoljax int8",
        "smoljax int8, cache int8",
        "smoljax int8-embedding",
    } == set(ours)
    assert {"transformers float32", "transformers bfloat16"} == set(theirs)
    assert result["tokens_agree"] == result["smoljax float32"]["tokens_agree"] == 12
    assert result["logprob_difference"] < 1e-5
    assert result["ours"] == "smoljax int8, cache int8" and result["against"].startswith("transformers float32 (")
    assert f"smoljax {result['best_dtype']}" == min(ours, key=lambda name: result[name]["wall_s"])
    assert result["best_against"] == min(theirs, key=lambda name: result[name]["wall_s"])
    speedups = {name for name in result if name.startswith("speedup")}
    assert len(speedups) == 6 and all(result[name] > 0 for name in speedups if "decode" not in name)  # too short
    assert {"torch", "transformers"} == result["peer_versions"].keys()
    assert all(result[name]["cpu_s_per_token"] > 0 for name in (*ours, *theirs))


def test_another_model_is_no_duel(peer, capsys, monkeypatch):
    """One matrix turned around in what the peer is given, and the speeds are not worth a word."""
    of_model = exchange.of_model

    def changed(*args):
        source = of_model(*args)
        return replace(source, get=lambda name: source.get(name)[:: -1 if "0.mlp.down" in name else 1])

    monkeypatch.setattr(exchange, "of_model", changed)
    assert run(main, [*ARGS, "--against", "transformers", *TINY]) == 1
    err = capsys.readouterr().err
    assert "in float32" in err and "transformers'" in err and "this is not the same generation" in err


def test_how_many_tokens_are_the_same():
    assert decode_duel.leading([1, 2, 3], [1, 2, 3]) == 3 and decode_duel.leading([1, 5, 3], [1, 2, 3]) == 1


def test_a_peer_that_cannot_start_is_one_sentence(tmp_path):
    (tmp_path / "peer.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(Error, match="ended with exit code 1, what it said is above; it needs torch and transformers"):
        decode_duel.peers(tmp_path / "peer.py", {"platform": "cpu"}, 1)


def test_the_suite_writes_what_it_has_and_goes_on_after_a_row_that_fails(tmp_path, capsys, monkeypatch):
    def fails():
        raise MemoryError("too large for this machine")

    rows = [("fails", fails), ("runs", decode_suite.decoding(model(), "float32", "int8", 2, 64))]
    monkeypatch.setattr(decode_suite, "PARTS", {"decode": lambda _: rows})
    monkeypatch.setattr(decode_suite, "bandwidth", lambda: {"sum": 2.0, "copy": 1.0})
    decode_suite.run(model(), "all", str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["decode"][0] == {"what": "fails", "error": "MemoryError: too large for this machine"}
    row = written["decode"][1]
    assert row["of_bandwidth"] == row["read_gb_s"] / 2 and row["decode_tokens_per_s"] > 0
    table = capsys.readouterr().out
    assert "| runs |" in table and "too large for this machine" in table and written["device"] in table


def test_every_part_of_the_suite_has_rows(monkeypatch):
    monkeypatch.setattr(decode_suite, "bandwidth", lambda: {"sum": 2.0, "copy": 1.0})
    for name, part in decode_suite.PARTS.items():
        labels = [label for label, _ in part(model())]
        assert labels and len(set(labels)) == len(labels), name


def test_the_layout_table_has_every_way_of_every_matrix():
    rows = dict(decode_suite.layout(model()))
    assert {f"{name}, 2 rows, {kind}" for name in ("q", "k", "o", "gate", "down", "head") for kind in layout.WAYS} == {
        label for label in rows if ", 2 rows" in label
    }
    found = rows["down, 2 rows, int8"]()
    assert found["best"] in layout.WAYS["int8"] and all(found[f"{way}_ms"] > 0 for way in layout.WAYS["int8"])


def test_prompts_are_timed_alone():
    row = decode_suite.reading(model(), "bfloat16", 2, 40)()
    assert row["prefill_tokens_per_s"] == pytest.approx(2 * 40 / row["prefill_s"])
    assert all(part in suite.line(row, decode_suite.COLUMNS) for part in ("tokens/s", "CPU s"))


def test_weights_of_a_folder(tmp_path, capsys):
    pytest.importorskip("safetensors")
    hf.save(tmp_path / "model", model(), model().config)
    assert main([*ARGS, "--model", str(tmp_path / "model")]) == 0
    assert last_line(capsys.readouterr().out)["config"]["hidden_size"] == 64


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--model", "smollm2-135"], "--model 'smollm2-135'; did you mean 'smollm2-135m'"),
        (["--model", "/no/folder"], "there is no /no/folder"),
        (["--model", "smollm2-135m-instruct", TINY[0]], "model.hidden_size is for random weights, and --model smollm2"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--new-tokens", "0"], "--new-tokens is 0, expected at least 1"),
        (["--drafts", "17"], "--drafts is 17, expected at most 16"),
        (["--prompt-tokens", "8000", "--new-tokens", "193"], "are 8193 positions, more than the model's 8192"),
        (["--against", "transformers", "--suite"], "--against, --suite: one of them"),
        (["--suite", "decoed"], "--suite decoed; did you mean 'decode'"),
        (["--suite", "--dtype", "int8"], "--dtype is not for --suite"),
        (["compute.dtype=float32"], "unknown setting 'compute.dtype=float32'; expected model.NAME=VALUE"),
        (["model.vocab_sise=3"], "did you mean 'vocab_size'"),
    ],
    ids=str,
)
def test_mistakes(argv, sentence, capsys):
    assert run(main, argv) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
