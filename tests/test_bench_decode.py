"""`smoljax bench-decode`: its arithmetic, what it needs, the duel's fairness, and its mistakes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from infer.bench import DTYPES, main
from smoljax import (
    decode_duel,
    decode_llama_cpp,
    decode_measure,
    decode_suite,
    exchange,
    gguf,
    gguf_header,
    hf,
    layout,
    quantize,
    settings,
    suite,
    weights,
)
from smoljax.config import SIZES, Train
from smoljax.errors import Error, UsageError, run

REPO = Path(__file__).resolve().parents[1]
TINY = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.head_dim=16"]
TINY += ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=512"]
SHORT = ["--prompt-tokens", "8", "--new-tokens", "12", "--windows", "2", "--json"]
ARGS = ["--batch", "2", *SHORT]


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
    assert row["cpu_s_per_token"] > 0 and row["warmup_s"] > 0
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


@pytest.mark.slow  # 20 CPU s of compiling every dtype's programs
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


@pytest.mark.slow
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
    whole = {"speedup", "speedup_best", "speedup_cpu_seconds", "speedup_best_cpu_seconds"}
    assert whole <= speedups and all(result[name] > 0 for name in speedups)
    assert {"torch", "transformers"} == result["peer_versions"].keys()
    assert all(result[name]["cpu_s_per_token"] > 0 for name in (*ours, *theirs))


@pytest.mark.slow
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


def test_decoding_is_compared_where_its_time_was_seen():
    """By hand, in windows of (prompt's seconds, all seconds, CPU seconds, ids)."""
    taken = {"ours": [(1, 3, 2, []), (1, 2, 2, [])], "theirs": [(1, 5, 3, []), (1, 7, 3, [])]}

    def found():
        taken_for = {name: decode_measure.figures(parts, 1, 8, 4) for name, parts in taken.items()}
        return decode_duel.ratios(taken, taken_for, {"ours": None}, {"theirs": None}, "ours", "theirs")

    assert found()["speedup"] == (5 / 3 + 7 / 2) / 2 and found()["speedup_decode"] == (4 / 2 + 6 / 1) / 2
    taken["ours"][1] = (3, 2, 2, [])
    assert "speedup" in found() and not {"speedup_decode", "speedup_best_decode"} & found().keys()


def test_how_many_tokens_are_the_same():
    assert decode_duel.leading([1, 2, 3], [1, 2, 3]) == 3 and decode_duel.leading([1, 5, 3], [1, 2, 3]) == 1


def test_a_peer_that_cannot_start_is_one_sentence(tmp_path):
    (tmp_path / "peer.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(Error, match="ended with exit code 1, what it said is above; it needs torch and transformers"):
        decode_duel.peers(tmp_path / "peer.py", {"platform": "cpu"}, 1)


# What bench_llama_cpp.mjs asks of node-llama-cpp; an id is 400 and its place. It sets the clocks itself: an id takes a
# millisecond a thread, so that one thread is the fastest, and half of that of the processor.
NODE_LLAMA_CPP = """
let now = 0;
performance.now = () => now;
process.cpuUsage = (since = {user: 0}) => ({user: now * 500 - since.user, system: 0});
export const LlamaLogLevel = {error: "error"};
const sequence = (threads) => ({
  kept: [],
  async clearHistory() { this.kept = []; },
  async *evaluate(prompt, {temperature, yieldEogToken}) {
    if (this.kept.length || temperature !== 0 || !yieldEogToken) throw new Error("another run's");
    this.kept = [...prompt];
    for (;;) {
      now += threads;
      this.kept.push(400 + this.kept.length);
      yield this.kept.at(-1);
    }
  },
});
const model = {
  createContext: async ({contextSize, threads: {ideal}}) => ({
    getSequence: () => sequence(ideal), dispose: async () => {},
  }),
};
export async function getLlama({gpu, build}) {
  if (gpu !== false || build !== "never") throw new Error("another llama.cpp");
  return {llamaCppRelease: {release: "b0"}, loadModel: async () => model, dispose: async () => {}};
}
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder as `npm install` leaves it, whose llama.cpp counts."""
    module = tmp_path / "node_modules/node-llama-cpp"
    (module / "dist").mkdir(parents=True)
    (module / "package.json").write_text('{"type": "module", "version": "0.0.0"}')
    (module / "dist/index.js").write_text(NODE_LLAMA_CPP)
    return tmp_path


@pytest.fixture
def node():
    if not shutil.which("node"):
        pytest.skip("THE DUEL WITH LLAMA.CPP WAS NOT TESTED: there is no program node")


def against_llama_cpp(folder) -> list[str]:
    return ["--against", "llama.cpp", "--llama-cpp", str(folder)]


@pytest.mark.slow
def test_the_duel_with_llama_cpp_by_one_that_counts(node, installed, capsys):
    assert main([*SHORT, *against_llama_cpp(installed), *TINY]) == 0
    result = last_line(capsys.readouterr().out)
    theirs = result["llama.cpp Q8_0"]
    assert theirs["threads"] == 1 and theirs["tokens_agree"] == 12 and result["tokens_agree"] == 0
    assert result["likeliest_agree"] < 12
    assert (theirs["wall_s"], theirs["prefill_s"]) == pytest.approx((12e-3, 1e-3))
    assert (theirs["tokens_per_s"], theirs["decode_tokens_per_s"]) == pytest.approx((1e3, 1e3))
    assert theirs["cpu_s_per_token"] == pytest.approx(0.5e-3)
    versions = result["peer_versions"]
    assert (versions["llama.cpp"], versions["node-llama-cpp"]) == ("b0", "0.0.0") and versions["node"]
    assert (result["dtype"], result["ours"], result["against"]) == (
        "int8-embedding",
        "smoljax int8-embedding",
        "llama.cpp Q8_0",
    )


def test_the_duel_with_llama_cpp(node, capsys):
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip(
            "LLAMA.CPP WAS NOT TIMED: npm install --ignore-scripts node-llama-cpp@3.22.1 in a folder, and set LLAMA_CPP"
        )
    assert main([*SHORT, *against_llama_cpp(folder), "--dtype", "int8", "--cache", "int8", *TINY]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["ours"] == "smoljax int8, cache int8" and result["speedup"] > 0 and result["speedup_best"] > 0
    assert 1 <= result["smoljax float32"]["tokens_agree"] <= 12  # the same model, but for what Q8_0 rounds
    assert (
        result["llama.cpp Q8_0"]["threads"] >= 1 and {"llama.cpp", "node-llama-cpp"} <= result["peer_versions"].keys()
    )


@pytest.mark.parametrize("new_tokens", [1, 12])
def test_how_many_tokens_are_the_likeliest_after_the_same_ones(new_tokens):
    own = decode_measure.Generation(decode_measure.served(model(), "int8", 1), [[5, 6, 7]], "int8")
    (row,) = own.timed(new_tokens)[2]
    assert decode_llama_cpp.likeliest_agree(own, row) == new_tokens
    assert decode_llama_cpp.likeliest_agree(own, [*row[:-1], (row[-1] + 1) % 512]) == new_tokens - 1


def test_what_llama_cpp_reads_is_the_model_in_q8_0(tmp_path):
    path = decode_llama_cpp.q8_0(tmp_path, model())
    kinds = {tensor.type.name for tensor in gguf_header.read_header(path).tensors.values() if len(tensor.shape) > 1}
    assert kinds == {"Q8_0"}  # the embedding, too
    source, back = (
        exchange.of_model(model(), model().config),
        exchange.of_model(weights.read(path).model, model().config),
    )
    for name, shape in exchange.shapes(model().config).items():
        given = source.tensor(name)
        if len(shape) > 1:
            given = gguf.rounded(given, "q8_0")
        assert np.array_equal(back.tensor(name), given), name


@pytest.mark.parametrize(
    "does, code, sentence",
    [
        (
            'throw new Error("no binary\\nat all")',
            2,
            "llama.cpp does not start (no binary); install node-llama-cpp there",
        ),
        ("process.exit(7)", 1, "smoljax: llama.cpp Q8_0 ended with exit code 7, what it said is above; it needs"),
    ],
)
def test_a_llama_cpp_that_cannot_start_is_one_sentence(does, code, sentence, node, installed, capsys):
    index = installed / "node_modules/node-llama-cpp/dist/index.js"
    index.write_text(f"export const LlamaLogLevel = {{}};\nexport async function getLlama() {{ {does} }}")
    assert run(main, [*SHORT, *against_llama_cpp(installed), *TINY]) == code
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_mistakes_about_llama_cpp(installed, capsys, monkeypatch):
    def said(argv) -> str:
        assert run(main, argv) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        return err

    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs Node.js, and there is no program node; install it" in said(against_llama_cpp(installed))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert "--batch is 2, expected 1 for --against llama.cpp" in said([*ARGS, *against_llama_cpp(installed)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(Error, match="is for a CPU, and JAX has a gpu here; set JAX_PLATFORMS=cpu"):
        decode_llama_cpp.duel(model(), Path("peer.mjs"), installed, 8, 12, "int8")


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


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode_suite, "bandwidth", lambda: pytest.fail("measured"))
    for out in (tmp_path, tmp_path / "no" / "out.json"):
        with pytest.raises(UsageError, match=f"{out} cannot be written"):
            decode_suite.run(model(), "all", str(out))


def test_positions_are_the_models_own(capsys):
    assert run(main, [*TINY, "model.max_position_embeddings=16", "--prompt-tokens", "4", "--new-tokens", "13"]) == 2
    assert "17 positions, more than the model's 16" in capsys.readouterr().err


def test_a_peer_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(main, ["--against", "transformers"]) == 2
    assert "needs torch and transformers: pip install" in capsys.readouterr().err


def test_every_part_of_the_suite_has_rows(monkeypatch):
    monkeypatch.setattr(decode_suite, "bandwidth", lambda: {"sum": 2.0, "copy": 1.0})
    for name, part in decode_suite.PARTS.items():
        labels = [label for label, _ in part(model())]
        assert labels and len(set(labels)) == len(labels), name


def test_the_layout_table_has_every_way_of_every_matrix():
    rows = dict(decode_suite.layout(model()))
    assert {
        f"{name}, 2 rows, {kind}" for name in ("q/k/v", "o", "gate/up", "down", "head") for kind in layout.WAYS
    } == {label for label in rows if ", 2 rows" in label}
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
        (["--against", "llama.cpp"], "--against llama.cpp needs --llama-cpp FOLDER, a folder where `npm install"),
        (["--llama-cpp", "/no/folder"], "--llama-cpp is for --against llama.cpp"),
        (["--against", "llama.cpp", "--llama-cpp", "/no/folder"], "--llama-cpp /no/folder holds no node_modules/node"),
        (["--suite", "decoed"], "--suite decoed; did you mean 'decode'"),
        (["--suite", "--dtype", "int8"], "--dtype is not for --suite"),
        (["--suite", "--batch", "1"], "--batch is not for --suite"),
        (["--suite", "--windows", "0"], "--windows is not for --suite"),
        (["--suite="], "--suite '' has no part"),
        (["--out", "x.json"], "--out is for --suite"),
        (["compute.dtype=float32"], "unknown setting 'compute.dtype=float32'; expected model.NAME=VALUE"),
        (["model.vocab_sise=3"], "did you mean 'vocab_size'"),
    ],
    ids=str,
)
def test_mistakes(argv, sentence, capsys):
    assert run(main, argv) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
