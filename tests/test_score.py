"""score.py and `smoljax score`: a batch scores what each row scores alone, and what transformers and lm-eval say."""

import dataclasses
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import train_tokenizer
from test_model import CONFIG, forward, make, tokens

from infer import score as program
from smoljax import fetch, hf, load_tokenizer, quantize, score, sharding, weights
from smoljax.config import Compute, Mesh
from smoljax.errors import DataError, Error, UsageError, run

POSITIONS = 64
SHORT = dataclasses.replace(CONFIG, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=0)


def pairs(count: int, longest: int = POSITIONS, seed: int = 0) -> list:
    random = np.random.default_rng(seed)
    found = []
    for length in random.integers(2, longest + 2, count):
        cut = random.integers(1, length)
        ids = random.integers(0, CONFIG.vocab_size, length).tolist()
        found.append((ids[:cut], ids[cut:]))
    return found


def by_hand(logits, pair):
    """Log-probabilities and argmax matches of a continuation, in f64, from the logits of the whole."""
    context, continuation = pair
    logits = np.asarray(logits, np.float64)[len(context) - 1 : len(context) + len(continuation) - 1]
    logits -= logits.max(-1, keepdims=True)
    found = logits[np.arange(len(continuation)), continuation] - np.log(np.exp(logits).sum(-1))
    return found, logits.argmax(-1) == continuation


def same(scores, others, atol=1e-5):
    for one, other in zip(scores, others, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)
        assert one.greedy.tolist() == other.greedy.tolist()


@pytest.fixture(scope="module")
def model():
    return make(SHORT)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    train_tokenizer(folder / "tokenizer.json")
    hf.save(folder / "hf", model, SHORT, tokenizer=folder)
    return folder


def greedy_pairs(model, count=4):
    """Continuations that are the likeliest ids, one of them but for its last."""
    found = []
    for n in range(count):
        row = tokens(1, 32, seed=n)
        for place in range(4, 9):
            row[0, place] = np.asarray(forward(model, row))[0, place - 1].argmax()
        found.append((row[0, :4].tolist(), row[0, 4:9].tolist()))
    found[-1][1][-1] = (found[-1][1][-1] + 1) % CONFIG.vocab_size
    return found


def test_as_transformers(model, folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    other = transformers.LlamaForCausalLM.from_pretrained(
        folder / "hf", attn_implementation="eager", dtype=torch.float32
    )
    asked = pairs(20) + greedy_pairs(model)
    found = score.loglikelihoods(model, asked)
    for pair, ours in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = other(torch.tensor([[*pair[0], *pair[1]]])).logits[0]
        logprobs, greedy = by_hand(logits.numpy(), pair)
        np.testing.assert_allclose(ours.logprobs, logprobs, atol=1e-4)
        assert ours.greedy.tolist() == greedy.tolist()
        assert ours.loglikelihood == pytest.approx(logprobs.sum(), abs=1e-3)
    assert [s.is_greedy for s in found[-4:]] == [True, True, True, False]


@pytest.mark.parametrize("batch_size", [None, 1, 3, 64])
def test_a_batch_scores_what_each_row_scores_alone(model, batch_size):
    asked = pairs(40) + greedy_pairs(model)
    together = score.loglikelihoods(model, asked, batch_size=batch_size)
    same(together, [score.loglikelihoods(model, [pair])[0] for pair in asked])
    assert [len(s.logprobs) for s in together] == [len(continuation) for _, continuation in asked]


@pytest.mark.slow
def test_chunks_mesh_and_dtypes(model):
    asked = pairs(30)
    whole = score.loglikelihoods(model, asked)
    same(score.loglikelihoods(model, asked, compute=Compute(loss_chunk=7)), whole)
    mesh = sharding.mesh(Mesh())
    assert mesh.size == 8
    placed = jax.device_put(model, sharding.shardings(model, mesh))
    same(score.loglikelihoods(placed, asked, mesh=mesh, batch_size=5), whole)
    assert {type(s.logprobs[0]) for s in whole} == {np.float32}
    half = score.loglikelihoods(model, asked, compute=Compute(dtype="bfloat16"))
    differences = [abs(a.loglikelihood - b.loglikelihood) / len(a.logprobs) for a, b in zip(half, whole, strict=True)]
    assert 0 < np.mean(differences) < 0.5
    small = quantize.quantize(model)
    wide = jax.tree.map(lambda w: w, small)
    for name in quantize.MATRICES:
        setattr(wide.layers, name, getattr(model.layers, name).replace(getattr(small.layers, name)[...]))
    same(score.loglikelihoods(small, asked), score.loglikelihoods(wide, asked), atol=1e-4)


def test_logits_of_all_tokens_exist_nowhere(model):
    compute, rows, T = Compute(loss_chunk=64), 8, 64
    batch = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
    program = str(jax.make_jaxpr(lambda m, *b: score.judge(m, *b, compute=compute))(model, *batch))
    V = CONFIG.vocab_size
    assert (
        f"f32[{rows},{64 // rows},{V}]" in program and f"{T},{V}]" not in program and f"{rows * T},{V}]" not in program
    )


def test_few_programs_for_all_lengths(model):
    score.judge.clear_cache()
    asked = pairs(300, POSITIONS)
    for n in range(0, 300, 100):
        score.loglikelihoods(model, asked[n : n + 100], batch_size=16)
    assert score.judge._cache_size() <= 3 * 5  # 16, 32 and 64 tokens; 16 rows, and last batches of 1, 2, 4 or 8
    shapes = set()
    for count in range(1, 200, 7):
        lengths = np.random.default_rng(count).integers(1, 2048, count)
        seen = []
        for which, rows, T in score.batches(lengths, None, 8):
            assert len(which) <= rows and lengths[which].max() <= T and rows % 8 == 0 and rows * T <= 8 * score.TOKENS
            shapes.add((rows, T))
            assert lengths[which].min() > T // 2 or T == 16
            seen += which.tolist()
        assert sorted(seen) == list(range(count))
    assert len(shapes) <= 32 and {T for _, T in shapes} <= {16 << i for i in range(8)}


@pytest.mark.slow
def test_the_real_weights_score_in_a_batch_what_they_score_alone():
    name = "smollm2-135m-instruct"
    try:
        fetch.fetch(name)
    except Error as e:
        pytest.skip(f"THE REAL WEIGHTS WERE NOT TESTED: {e}")
    real = weights.read(name)
    texts = ["The capital of France is", "def add(a, b):\n   ", "Once upon a time, there was a", "2, 4, 6,"]
    ends = [" Paris", " return a + b", " little girl who lived near the forest", " 8, 10, 12"]
    asked = [score.encode_pair(real.tokenizer, text, end, 1) for text, end in zip(texts, ends, strict=True)]
    together = score.loglikelihoods(real.model, asked)
    same(together, [score.loglikelihoods(real.model, [pair])[0] for pair in asked], atol=2e-4)
    assert together[0].is_greedy and together[0].loglikelihood == pytest.approx(-0.2581, abs=1e-3)


def rolled(ids, prefix, longest):
    """A loop as the harness has it: (what is seen, what is predicted), the latter the last of the former's outputs."""
    found, predicted = [], 0
    while predicted < len(ids):
        count = min(len(ids) - predicted, longest)
        end = predicted + count
        seen = [prefix, *ids[: end - 1]] if not predicted else ids[max(0, end - longest - 1) : end - 1]
        found.append((seen, ids[predicted:end]))
        predicted = end
    return found


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 150, 200])
def test_windows_against_a_loop(model, length):
    ids = tokens(length, seed=length).tolist()
    windows = score.windows(ids, 0, POSITIONS)
    expected = rolled(ids, 0, POSITIONS)
    assert [list(context) + list(new[:-1]) for context, new in windows] == [seen for seen, _ in expected]
    assert [new for _, new in windows] == [new for _, new in expected]
    assert [token for _, new in windows for token in new] == ids
    if length > 1:
        assert all(len(seen) == min(length, POSITIONS) for seen, _ in expected)
    total = sum(s.loglikelihood for s in score.loglikelihoods(model, windows))
    by_loop = 0.0
    for seen, new in expected:
        row = np.zeros((1, POSITIONS), np.int32)
        row[0, : len(seen)] = seen
        logits = np.asarray(forward(model, row))[0, : len(seen)]
        by_loop += by_hand(logits, (seen[: len(seen) - len(new) + 1], new))[0].sum()
    assert total == pytest.approx(by_loop, abs=1e-3)


def test_ids_as_the_harness_has_them(folder):
    from smoljax import tokenizer

    words = tokenizer.load(folder / "tokenizer.json")

    def ids(text):
        return words.encode(text).ids

    for context, continuation in [("def test", "_model(x)"), ("import ", "numpy as np"), ("a:\n\n  ", "return 3")]:
        before, new = score.encode_pair(words, context, continuation, 0)
        assert before == ids(context.rstrip()) and before + new == ids(context + continuation)
    assert score.encode_pair(words, "import ", "numpy", 0) == score.encode_pair(words, "import", " numpy", 0)
    assert score.encode_pair(words, "", "import", 7) == ([7], ids("import"))
    assert score.encode_pair(words, " \n", "import", 7) == ([7], ids(" \nimport"))
    assert score.encode_pair(words, "", "<|endoftext|>import", 0) == ([0], ids("import"))


@pytest.mark.parametrize("id", [-1, CONFIG.vocab_size, 1.5, "a", True, None])
def test_ids_that_are_none(model, id):
    with pytest.raises(DataError, match="pair 2: .* among the ids, expected 0 to 299"):
        score.loglikelihoods(model, [([1], [2]), ([1], [id])])


def test_refusals(model):
    for pair, sentence in [
        (([1], []), "the continuation has no tokens"),
        (([], [1]), "the context has no tokens"),
        (([1] * 60, [2] * 6), "60 tokens of context and 6 of continuation are 1 more than 64 positions hold"),
    ]:
        with pytest.raises(DataError, match=sentence):
            score.loglikelihoods(model, [pair])
    assert score.loglikelihoods(model, []) == []
    assert len(score.loglikelihoods(model, [([1] * 60, [2] * 6)], longest=65)[0].logprobs) == 6
    for options in (dict(batch_size=0), dict(batch_size=-1), dict(longest=0)):
        with pytest.raises(UsageError, match=f"{next(iter(options))} is .*, expected 1 or more"):
            score.loglikelihoods(model, [([1], [2])], **options)
    broken = jax.tree.map(lambda w: w * jnp.nan, model)
    with pytest.raises(DataError, match="a log-likelihood is not finite"):
        score.loglikelihoods(broken, [([1], [2])])


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


GOOD = [
    {"id": 7, "context": "def test", "continuation": "_model"},
    {"context": "import ", "continuation": "numpy as np", "task": {"name": "x"}},
    {"context": "", "continuation": "import json"},
    {"text": "import numpy as np\n" * 12, "id": "long"},
    {"context": "assert a", "choices": [" == b", " is none at all", "!"], "gold": 1},
    {"context": "x", "choices": [" = 1"]},
    {"context_ids": [], "continuation_ids": [5, 6]},
]


def test_program(model, folder, capsys):
    words = hf_words(folder)
    (folder / "in.jsonl").write_text(lines(*GOOD[:3], "", *GOOD[3:]))
    out = folder / "out.jsonl"
    argv = [str(folder / "hf"), "--input", str(folder / "in.jsonl")]
    capsys.readouterr()
    assert program.main([*argv, "--output", str(out), "--json", "--token-logprobs", "--batch-size", "2"]) == 0
    total = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not list(folder.glob(".out*"))

    def alone(context, continuation):
        return score.loglikelihoods(model, [score.encode_pair(words, context, continuation, 0)])[0]

    for row, given in zip(rows[:3], GOOD[:3], strict=True):
        expected = alone(given["context"], given["continuation"])
        assert row["loglikelihood"] == pytest.approx(expected.loglikelihood, abs=1e-5)
        assert row["logprobs"] == pytest.approx(expected.logprobs.tolist(), abs=1e-5)
        assert (row["tokens"], row["is_greedy"]) == (len(expected.logprobs), expected.is_greedy)
    assert rows[0]["id"] == 7 and rows[1]["task"] == {"name": "x"} and "context" not in rows[0]

    text = words.encode(GOOD[3]["text"]).ids
    assert len(text) > POSITIONS
    found = [s.loglikelihood for s in score.loglikelihoods(model, score.windows(text, 0, POSITIONS))]
    assert rows[3]["loglikelihood"] == pytest.approx(sum(found), abs=1e-4)
    assert (rows[3]["tokens"], rows[3]["bytes"], rows[3]["id"]) == (len(text), 19 * 12, "long")
    assert len(rows[3]["logprobs"]) == len(text)

    values = np.array([alone("assert a", choice).loglikelihood for choice in GOOD[4]["choices"]])
    assert rows[4]["loglikelihoods"] == pytest.approx(values.tolist(), abs=1e-5)
    assert rows[4]["best"] == values.argmax() and rows[4]["best_per_character"] == (values / [4, 14, 1]).argmax()
    assert rows[4]["best_per_byte"] == rows[4]["best_per_character"] and rows[4]["gold"] == 1
    assert rows[4]["acc"] == int(values.argmax() == 1) and rows[4]["acc_norm"] == int((values / [4, 14, 1]).argmax())
    assert len(rows[4]["is_greedy"]) == len(rows[4]["logprobs"]) == 3
    assert rows[5]["best"] == 0 and "acc" not in rows[5]
    (expected,) = score.loglikelihoods(model, [([0], [5, 6])])
    assert rows[6]["loglikelihood"] == pytest.approx(expected.loglikelihood, abs=1e-5)

    assert (total["rows"], total["errors"]) == (7, 0) and total["acc_norm"] == rows[4]["acc_norm"]
    assert total["bits_per_byte"] == pytest.approx(-sum(found) / np.log(2) / (19 * 12), abs=1e-5)
    assert total["tokens"] == sum(np.sum(row["tokens"]) for row in rows)
    assert program.main([*argv, "--seq-len", "1000"]) == 0
    captured = capsys.readouterr()
    assert "beyond the model's 64 positions" in captured.err and "rows 7, errors 0" in captured.err
    longer = [json.loads(line) for line in captured.out.splitlines()]
    assert longer[3]["loglikelihood"] != pytest.approx(rows[3]["loglikelihood"], abs=1e-3)


def hf_words(folder):
    from smoljax import tokenizer

    return tokenizer.load(folder / "tokenizer.json")


def test_a_row_that_cannot_be_scored_is_said_in_its_place(model, folder, capsys, monkeypatch):
    monkeypatch.setattr("smoljax.pairs.BLOCK", 3)
    bad = [
        ('{"context": ', "not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ({"context": "a", "continuation": "", "id": 3}, "'continuation' is empty"),
        ({"continuation": "a"}, "no key 'context', which a row with 'continuation' needs"),
        ({"context": "a"}, "the keys ['context'], expected one of 'continuation', 'choices'"),
        ({"context": "a", "continuation": "b", "text": "c"}, "both 'continuation' and 'text'"),
        ({"context": 5, "continuation": "b"}, "'context' is 5, expected text"),
        ({"context": "a", "choices": []}, "'choices' is empty"),
        ({"context": "a", "choices": ["b", 5]}, "'choices' has 5, expected text"),
        ({"context": "a", "choices": ["b", "c"], "gold": 2}, "'gold' is 2, expected the number of a choice, 0 to 1"),
        ({"context": "a", "continuation": "b", "tokens": 1}, "the key 'tokens' is one that results have"),
        ('{"context": "a", "continuation": "\\ud800"}', "not Unicode text"),
        ('{"context": "a", "context": "b", "continuation": "c"}', "it holds 'context' twice"),
        ('{"context": "a", "continuation": "c", "x": NaN}', "NaN is no JSON"),
        ('{"context": "a", "continuation": "c", "x": 1e999}', "not JSON (1e999 is beyond"),
        ({"text": "a", "context": "b"}, "'context' is not for a row with 'text'"),
        (
            {"context": "a", "context_ids": [1], "continuation": "b"},
            "'context_ids' is not for a row with",
        ),
        (
            {"context_ids": [1], "continuation_ids": [2] * 65},
            "65 tokens of continuation are more than 64",
        ),
        ({"context_ids": [1], "continuation_ids": [300]}, "300 is among the ids, expected 0 to 299"),
        ({"context_ids": [1], "continuation_ids": []}, "'continuation_ids' is empty"),
        ({"context_ids": [1] * 64, "continuation_ids": [1, 2]}, "1 more than 64 positions hold; shorten the context"),
        ({"text": ""}, "'text' is empty"),
    ]
    mixed = [row for (row, _), good in zip(bad, GOOD * 4, strict=False) for row in (row, good)]
    (folder / "bad.jsonl").write_bytes(lines(*mixed).encode() + b'{"text": "\xff"}\n')
    argv = [str(folder / "hf"), "--input", str(folder / "bad.jsonl")]
    capsys.readouterr()
    assert run(program.main, argv) == 3
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert len(rows) == 2 * len(bad) + 1
    for number, (_, sentence) in enumerate(bad):
        row = rows[2 * number]
        assert sentence in row["error"] and row["line"] == 2 * number + 1 and "loglikelihood" not in row
        assert "loglikelihood" in rows[2 * number + 1] or "loglikelihoods" in rows[2 * number + 1]
    assert rows[4]["id"] == 3 and "not UTF-8" in rows[-1]["error"]
    last = captured.err.splitlines()[-1]
    assert last.startswith(
        f"smoljax: 23 of 45 rows of {folder / 'bad.jsonl'} have no result; the first: line 1: not JSON"
    )

    # What is too long loses its beginning where that is asked for, and nothing else does.
    (folder / "long.jsonl").write_text(lines({"context_ids": [9, 8] * 40, "continuation_ids": [1, 2]}, GOOD[-1]))
    assert run(program.main, [str(folder / "hf"), "--input", str(folder / "long.jsonl"), "--truncate"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    (expected,) = score.loglikelihoods(model, [(([9, 8] * 40)[-63:], [1, 2])])
    assert first["truncated"] == 17 and "truncated" not in second
    assert first["loglikelihood"] == pytest.approx(expected.loglikelihood, abs=1e-5)

    # Of choices each loses what is beyond for itself, and the row says how much the longest one lost.
    words, context = load_tokenizer(folder / "hf"), "def " * 40
    choices = ["x", "return import def x"]
    (folder / "long.jsonl").write_text(lines({"context": context, "choices": choices}))
    assert run(program.main, [str(folder / "hf"), "--input", str(folder / "long.jsonl"), "--truncate"]) == 0
    row = json.loads(capsys.readouterr().out)
    long = [score.encode_pair(words, context, text, 0) for text in choices]
    beyond = [len(context) + len(continuation) - 1 - POSITIONS for context, continuation in long]
    assert 0 < beyond[0] < beyond[1] == row["truncated"]
    cut = [(context[n:], continuation) for n, (context, continuation) in zip(beyond, long, strict=True)]
    alone = [score.loglikelihoods(model, [pair])[0].loglikelihood for pair in cut]
    np.testing.assert_allclose(row["loglikelihoods"], alone, atol=1e-5)


def test_several_processes_are_refused(folder, tmp_path, capsys, monkeypatch):
    (folder / "few.jsonl").write_text(lines(GOOD[0]))
    argv = [str(folder / "hf"), "--input", str(folder / "few.jsonl")]
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_STEP_NUM_TASKS", "8")
        patch.setenv("SLURM_PROCID", "0")
        assert run(program.main, argv) == 2
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 4)
        assert run(program.main, argv) == 2
    said = capsys.readouterr().err
    assert "8 processes were started" in said and "4 processes were started" in said


def test_files_that_are_none(folder, capsys, tmp_path):
    """A pipe gives its rows once; nothing beside the output is touched, and a link's file gets the rows."""
    rows = lines(*GOOD[:3] * 30)
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=(tmp_path / "pipe").write_text, args=[rows])
    thread.start()
    for name in ("out.part", "real"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "link").symlink_to("real")
    assert program.main([str(folder / "hf"), "--input", str(tmp_path / "pipe"), "--output", str(tmp_path / "out")]) == 0
    thread.join()
    assert len((tmp_path / "out").read_text().splitlines()) == 90
    inputs = ["--input", str(tmp_path / "out.part"), "--output"]
    for name in ("out", "link", "/dev/null"):
        assert program.main([str(folder / "hf"), *inputs, str(tmp_path / name)]) == 0
    assert (tmp_path / "out.part").read_text() == rows and (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == (tmp_path / "out").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out", "out.part", "pipe", "real"]


def test_mistakes_are_one_sentence(folder, capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "one.jsonl").write_text(lines(GOOD[0]))
    here, one, at = str(folder / "hf"), str(tmp_path / "one.jsonl"), tmp_path / "no" / "out.jsonl"
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / file).write_bytes((folder / "hf" / file).read_bytes())
    for argv, code, sentence in [
        ([here, "--input", tmp_path / "none.jsonl"], 3, "none.jsonl cannot be read (No such file or directory)"),
        ([here, "--input", tmp_path / "some.parquet"], 2, "some.parquet is of columns, and rows are scored from JSON"),
        ([here, "--input", tmp_path / "empty.jsonl"], 3, "empty.jsonl holds no row; give one a line, such as {"),
        ([here, "--input", tmp_path], 3, "cannot be read (Is a directory)"),
        ([tmp_path / "none", "--input", one], 2, "there is no"),
        ([tmp_path / "bare", "--input", one], 2, "has no tokenizer.json, which text needs"),
        ([here, "--input", one, "--batch-size", "0"], 2, "--batch-size is 0, expected at least 1"),
        ([here, "--input", one, "--json"], 2, "give --output FILE"),
        ([here, "--input", one, "--output", one], 2, "is the input; name another file"),
        ([here, "--input", one, "--output", tmp_path], 2, "is a folder; name a file in it"),
        ([here, "--input", one, "--output", at], 2, "out.jsonl cannot be written (No such file or directory)"),
    ]:
        capsys.readouterr()
        assert run(program.main, [str(a) for a in argv]) == code, argv
        err = capsys.readouterr().err.strip()
        assert sentence in err and err.count("\n") == 0, err
    (tmp_path / "ids.jsonl").write_text(lines({"context_ids": [1], "continuation_ids": [2]}))
    assert program.main([str(tmp_path / "bare"), "--input", str(tmp_path / "ids.jsonl")]) == 0
