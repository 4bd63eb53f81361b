"""`smoljax bench-train`: its arithmetic, what it needs, the duel's fairness, and its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from smoljax import budget, duel, measure, runtime, settings, suite
from smoljax.config import SIZES, Data, Optim, Train
from smoljax.errors import Error, UsageError, run
from train.bench import main

REPO = Path(__file__).resolve().parents[1]
TINY = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.head_dim=16"]
TINY += ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=512"]
ARGS = ["--batch", "8", "--seq", "32", "--windows", "2", "--steps", "1", "--json", *TINY]


def config(*changes: str) -> Train:
    made = Train(SIZES["smollm2-135m"], 100, Data(seq_len=32, batch_size=8), optim=Optim(warmup_steps=1))
    return settings.override(made, [*TINY, *changes])


def last_line(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_a_row_is_arithmetic_on_what_was_measured(capsys):
    assert main(ARGS) == 0
    row = last_line(capsys.readouterr().out)
    assert row["tokens_per_s"] == pytest.approx(8 * 32 / row["step_s"])
    assert row["tokens_per_s_device"] == pytest.approx(row["tokens_per_s"] / jax.device_count())
    flops = {kind: budget.flops_per_token(config().model, 32, kind == "causal") for kind in ("causal", "full")}
    for kind, each in flops.items():
        assert row[f"tflops_{kind}"] == pytest.approx(each * row["tokens_per_s"] / 1e12)
        assert row[f"mfu_{kind}"] is None  # a CPU's peak is on no data sheet
    assert row["compile_s"] > 0 and row["step_s"] > 0 and row["attention"] == "blocked"
    assert row["memory_gb"] * 1e9 > budget.state_bytes(config(), {"data": 1, "fsdp": 8, "tensor": 1})
    assert row["loss"] == pytest.approx(np.log(512), abs=0.3)  # nothing can be learned from random ids
    assert {"device", "versions", "commit", "XLA_FLAGS"} <= row.keys() and row["versions"]["jax"] == jax.__version__


def test_it_runs_from_a_checkout_without_what_a_gpu_machine_lacks():
    """Nothing but JAX, flax (which brings orbax and rich itself), optax and numpy is imported."""
    lacking = "grain datatrove einops safetensors tokenizers pyarrow orjson gguf jinja2 torch transformers".split()
    text = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from train.bench import main; main({ARGS})"
    done = subprocess.run([sys.executable, "-c", text], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout)["config"]["data"]["batch_size"] == 8


@pytest.mark.slow
def test_a_flag_reaches_xla_and_is_printed(capsys):
    flag = "--xla_cpu_prefer_vector_width=128"
    done = subprocess.run(
        [sys.executable, "-m", "train.bench", *ARGS, f"xla_flags={flag}"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0 and last_line(done.stdout)["XLA_FLAGS"].endswith(flag)
    jax.devices()
    with pytest.raises(UsageError, match="comes too late: JAX is at work already"):
        runtime.set_flags(flag)
    assert flag not in os.environ["XLA_FLAGS"] and runtime.set_flags(None) == os.environ["XLA_FLAGS"]


@pytest.fixture
def peer(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # its compiler takes half a minute; test_the_duel_compiled has it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_duel_is_one_training_on_both_sides(peer, capsys, dtype):
    assert main([*ARGS, "--against", "transformers", "--dtype", dtype]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["loss_difference"] < (1e-5 if dtype == "float32" else 0.01)
    assert len(result["losses"]["smoljax"]) == 2 + 2 * 2 and set(result["losses"]) == {"smoljax", "eager", "compile"}
    assert result["speedup"] > 0 and result["speedup_cpu_seconds"] > 0
    best = result["against"].split()[-1]
    assert result[best]["step_s"] == min(result[kind]["step_s"] for kind in ("eager", "compile"))
    assert {"torch", "transformers"} == result["peer_versions"].keys()


@pytest.mark.slow
def test_another_training_is_no_duel(peer, capsys, monkeypatch):
    """One changed weight matrix, and the speeds are not worth a word."""
    arrays = duel.arrays
    monkeypatch.setattr(duel, "arrays", lambda model: arrays(model) | {"embed": 1.5 * arrays(model)["embed"]})
    assert run(main, [*ARGS, "--against", "transformers"]) == 1
    assert "nats, expected at most 0.01: these are not the same training" in capsys.readouterr().err


def test_a_peer_that_cannot_start_is_one_sentence(tmp_path):
    (tmp_path / "peer.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(Error, match="ended with exit code 1, what it said is above; it needs torch and transformers"):
        duel.Peer(tmp_path / "peer.py", {"kind": "eager"})


@pytest.mark.slow
def test_the_duel_compiled(capsys):
    """Under torch.compile too the losses are ours; by its own figures it was not eager's double."""
    pytest.importorskip("torch")
    assert main([*ARGS, "--against", "transformers"]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["loss_difference"] < 1e-5 and "compile" in result


def test_the_suite_writes_what_it_has_and_goes_on_after_a_row_that_fails(tmp_path, capsys, monkeypatch):
    def fails():
        raise MemoryError("too large for this machine")

    rows = [("fails", fails), ("runs", suite.measured(config(), "compute.unroll=2"))]
    monkeypatch.setattr(suite, "PARTS", {"speed": lambda _: rows})
    monkeypatch.setattr(measure, "product_peak", lambda dtype: 1e12)
    suite.run(config(), "all", str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["speed"][0] == {"what": "fails", "error": "MemoryError: too large for this machine"}
    row = written["speed"][1]
    assert row["of_product_peak"] == pytest.approx(row["tflops_causal"])  # pretended devices share the cores
    table = capsys.readouterr().out
    assert "| runs |" in table and "too large for this machine" in table and written["device"] in table


def test_every_part_of_the_suite_has_rows():
    for name, part in suite.PARTS.items():
        labels = [label for label, _ in part(config())]
        assert labels and len(set(labels)) == len(labels), name


def test_attention_is_compared_before_it_is_timed(monkeypatch):
    row = suite.attention_row(config(), 64, None)()
    assert row["from"] == "all scores" and row["difference"] < 1e-4
    attend = suite.attend
    monkeypatch.setattr(suite, "attend", lambda *args: 1.1 * attend(*args))
    with pytest.raises(Error, match="blocked differs from all scores by"):
        suite.attention_row(config(), 64, None)()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--model", "smollm2-135"], "--model 'smollm2-135'; did you mean 'smollm2-135m'"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--against", "transformers", "--suite"], "--against, --suite, --host: one of them"),
        (["--suite", "speeed"], "--suite speeed; did you mean 'speed'"),
        (["xla_flags=-O3"], "xla_flags has ['-O3'], expected flags such as"),
        (["compute.remat=ful"], "compute.remat is 'ful', expected one of auto, none, minimal_with_context"),
        (["--host", "no/shards"], "no/shards"),
    ],
    ids=str,
)
def test_mistakes(argv, sentence, capsys):
    assert run(main, [*TINY, *argv]) in (2, 3)
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
