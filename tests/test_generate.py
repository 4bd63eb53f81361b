"""`smoljax generate`, its batch jobs, text as it comes, and the model's own generation settings."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from launch import fake_devices
from test_hf import train_tokenizer
from test_model import CONFIG, make

from infer import generate
from smoljax import generation_config, hf, jobs, layout
from smoljax.answers import Answers
from smoljax.errors import DataError, UsageError, run
from smoljax.generation import complete
from smoljax.streaming import Text

TEXTS = ["def test", "import 3.14", "return", "x  12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    train_tokenizer(place / "tokenizer.json")
    hf.save(place / "hf", make(), CONFIG, tokenizer=place)
    return place / "hf"


@pytest.fixture(scope="module")
def words(folder):
    from smoljax import load_tokenizer

    return load_tokenizer(folder)


@pytest.fixture
def few_devices(monkeypatch):
    """So many are there: each compiles programs of its own."""
    those = jax.local_devices()
    return lambda count: monkeypatch.setattr(jax, "local_devices", lambda **_: those[:count])


def answers(folder, capsys, *args) -> list[dict]:
    assert generate.main([str(folder), "--json", "--max-new-tokens", "8", *args]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prompts(folder, words, capsys):
    args = [word for text in TEXTS[:2] for word in ("--prompt", text)]
    rows = complete(make(), [words.encode(text).ids for text in TEXTS[:2]], 8, eos=CONFIG.eos_token_id)
    expected = [
        dict(prompt=prompt, text=words.decode(row.tokens), tokens=row.tokens, finish_reason=row.finish_reason)
        for prompt, row in zip(TEXTS, rows, strict=False)
    ]
    assert answers(folder, capsys, *args) == expected
    assert generate.main([str(folder), *args, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == "\n".join(row["prompt"] + row["text"] + "\n" for row in expected)
    assert generate.main([str(folder), "--stream", "--prompt", TEXTS[0], "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == expected[0]["text"] + "\n"


def test_a_terminal_without_the_characters(folder, capsys, monkeypatch):
    """It gets their escapes, and the run goes on; JSON is ASCII anyway."""
    argv = [str(folder), "--prompt", "caf\u00e9 \u6771\u4eac", "--max-new-tokens", "2"]
    assert run(generate.main, argv) == 0
    expected = capsys.readouterr().out.encode("ascii", "backslashreplace")
    monkeypatch.setattr(sys, "stdout", terminal := io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run(generate.main, argv) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == expected and expected.startswith(rb"caf\xe9 \u6771\u4eac")


def test_samples_and_logprobs(folder, words, capsys):
    how = ["--temperature", "1.5", "--prompt", TEXTS[0], "--ignore-eos"]
    (row,) = answers(folder, capsys, *how, "--n", "3", "--seed", "5", "--logprobs", "2", "--prompt-logprobs")
    alone = [answers(folder, capsys, *how, "--seed", str(seed))[0]["tokens"] for seed in (5, 6, 7)]
    assert [sample["tokens"] for sample in row["samples"]] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    for sample in row["samples"]:
        assert len(sample["logprobs"]) == 8
        for found in sample["logprobs"]:
            (_, first), (_, second) = found["top"]
            assert 0 > first >= second and found["logprob"] <= first
    (bare,) = answers(folder, capsys, *how, "--seed", "5", "--logprobs", "0")
    expected = [found["logprob"] for found in row["samples"][0]["logprobs"]]
    assert [found["logprob"] for found in bare["logprobs"]] == pytest.approx(expected, abs=1e-5)
    assert all(found["top"] == [] for found in bare["logprobs"])
    first, *found = row["prompt_logprobs"]
    assert first is None and len(found) == len(words.encode(TEXTS[0]).ids) - 1
    assert all(p["logprob"] <= p["top"][0][1] < 0 and len(p["top"]) == 2 for p in found)


def test_stop_strings(folder, words, capsys):
    args = ["--ignore-eos", "--max-new-tokens", "60", "--prompt", TEXTS[0]]
    (free,) = answers(folder, capsys, *args)
    text = free["text"]
    stop = next(text[i : i + 3] for i in range(3, len(text)) if "\ufffd" not in text[i : i + 3])  # no half character
    (row,) = answers(folder, capsys, *args, "--stop", stop, "--stop", "nowhere")
    assert row["text"] == text[: text.index(stop)] and row["finish_reason"] == "stop"
    assert row["tokens"] == free["tokens"][: len(row["tokens"])]
    assert stop in words.decode(row["tokens"]) and stop not in words.decode(row["tokens"][:-1])


def test_text_as_it_comes(words):
    """Whatever the pieces, what is said is the text, never half a character, never a stop string's beginning."""
    text = "caf\u00e9 \u6771\u4eac \U0001f916 return STOP more"
    ids = words.encode(text).ids
    assert words.decode(ids) == text
    for size in (1, 2, 3, 7):
        said = []
        one = Text(words, ("STOP", "\u4eac!"), said.append)
        ends = [n for i in range(0, len(ids), size) if (n := one(ids[: i + size])) is not None]
        assert one.whole(ids[: ends[0]]) == "".join(said) == text[: text.index("STOP")]
        assert ends[0] == next(n for n in range(len(ids)) if "STOP" in words.decode(ids[:n]))
        assert not any("\ufffd" in piece or "S" in piece for piece in said)
    said = []
    one = Text(words, ("f\u00e9",), said.append)
    for n in range(1, len(ids) + 1):  # a stop string whose second character comes in two tokens
        if one(ids[:n]) is not None:
            break
    assert "".join(said) == one.whole(ids[:n]) == "ca"


def test_a_stop_string_may_be_a_special_token(words):
    """As in transformers; and none reaches across one, which is no part of the text."""
    before, after = words.encode("ab ").ids, words.encode("cd").ids
    tokens = [*before, 2, *after]
    assert words.decode([2], skip_special_tokens=False) == "<|im_end|>"
    for size in (1, 3):
        said = []
        one = Text(words, ("<|im_end|>",), said.append)
        ends = [n for i in range(0, len(tokens), size) if (n := one(tokens[: i + size])) is not None]
        assert ends[0] == len(before) + 1 and one.whole(tokens[: ends[0]]) == "".join(said) == "ab "
        across, piece = Text(words, ("b c",)), Text(words, (" <|im", "nowhere"))
        assert across(tokens) is None and across.whole(tokens) == words.decode(tokens) == "ab cd"
        assert piece(tokens) == len(before) + 1 and piece.whole(tokens[: len(before) + 1]) == "ab"


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_stop_string_ends_a_row_where_it_first_stands(words, size):
    """Of random ids, special ones and halves of characters too; all of the text is decoded anew for each token."""
    random, stopped = np.random.default_rng(size), 0
    for _ in range(200):
        ids = random.integers(0, words.get_vocab_size(), random.integers(1, 120)).tolist()
        texts = [words.decode(ids[:n], skip_special_tokens=False) for n in range(len(ids) + 1)]
        places = random.integers(0, max(1, len(texts[-1])), 2).tolist()
        stop = tuple(filter(None, (texts[-1][i : i + 1 + i % 5].replace("\ufffd", "") for i in places)))
        first = next((n for n, text in enumerate(texts) if any(s in text for s in stop)), None)
        stopped += first is not None
        said = []
        one = Text(words, stop, said.append)
        ends = (one(ids[: n + size]) for n in range(0, len(ids), size))
        assert next(filter(None, ends), None) == first, (ids, stop)
        assert one.whole(ids[:first]) == "".join(said), (ids, stop)
    assert 100 < stopped


def write(file: Path, rows: list):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_a_job(folder, words, tmp_path, capsys):
    rows = [{"id": i, "prompt": TEXTS[i % 4] * (1 + i % 5), "max_new_tokens": 1 + i % 7} for i in range(21)]
    bad = [
        "{",
        {"prompt": ""},
        {"x": 1},
        {"prompt": "a", "text": "b"},
        {"prompt": "a", "error": "of a job before"},
        {"prompt": "\ud800"},
        {"prompt": "a", "max_new_tokens": 10_000},
        "[1]",
    ]
    mixed = [*rows[:9], *bad, *rows[9:], {"messages": []}]
    write(tmp_path / "in.jsonl", [*mixed[:4], "", *mixed[4:]])  # a blank line is nothing
    args = [str(folder), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--ignore-eos"]
    assert run(generate.main, [*args, "--batch-size", "12"]) == 3  # on three devices
    said = capsys.readouterr()
    assert "9 of 30 rows" in said.err and "the first: row 10: not JSON" in said.err and said.out == ""
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in row for row in out] == [False] * 9 + [True] * 8 + [False] * 12 + [True]
    assert [row["error"].partition(" (")[0].partition(" tokens; with")[0] for row in out[9:17]] == [
        "not JSON",
        "the prompt is '', which has no tokens; give some text",
        "expected a prompt or messages, found the keys ['x']",
        "it has the keys ['text'], which are the answer's; rename them",
        "it has the keys ['error'], which are the answer's; rename them",
        "not Unicode text",
        "the prompt has 1",
        "a JSON list, expected an object",
    ]
    good = [row for row in out if "error" not in row]
    assert [{key: row[key] for key in rows[0]} for row in good] == rows
    prompts = [words.encode(row["prompt"]).ids for row in rows]
    for row, prompt in zip(good[::5], prompts[::5], strict=True):
        (alone,) = complete(make(), [prompt], row["max_new_tokens"], eos=())
        assert row["tokens"] == alone.tokens and row["text"] == words.decode(alone.tokens)

    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(generate.main, args) == 3  # done already: nothing is computed again
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.job"]
    with pytest.raises(UsageError, match="is another job's .*seed was 0, is 1"):
        generate.main([*args, "--seed", "1"])


ODD = [  # what a bad row has must not end the job, nor be taken for an answer
    {"prompt": "a", "tokens": 7},
    {"prompt": "a", "samples": ["x"]},
    {"line": 1, "error": "mine"},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "seed": 2**32 - 1},
    {"prompt": "a", "max_new_tokens": True},
    {"prompt": "a" * 4000},
    {"prompt": None, "messages": [{"role": "user", "content": "a"}]},
]


@pytest.mark.parametrize("devices", [1, 3])
def test_odd_rows(folder, tmp_path, capsys, monkeypatch, few_devices, devices):
    from smoljax import budget

    few_devices(devices)
    monkeypatch.setattr(budget, "device_memory", lambda _: 12_000_000)  # less than a cache for 4,000 tokens
    good = [{"prompt": text, "seed": None, "max_new_tokens": None, "messages": None} for text in TEXTS]
    write(tmp_path / "in.jsonl", ["{", *ODD, *good, *[{"prompt": ""}] * 3000, *good])
    args = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--batch-size", "3", "--n", "2"]
    args += ["--temperature", "1"]
    assert run(generate.main, [str(folder), *args, "--max-new-tokens", "2", "--ignore-eos"]) == 3
    out = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert ["error" in row for row in out] == [True] * 9 + [False] * 4 + [True] * 3000 + [False] * 4
    assert [row["error"].partition(",")[0] for row in out[3:6]] == [
        "it has the keys ['error']",
        "the seed is -1",
        "the seed is 4294967295",
    ]
    assert "places need" in out[7]["error"] and "it has messages, among prompts" in out[8]["error"]
    assert all(len(sample["tokens"]) == 2 for row in out[9:13] for sample in row["samples"])


def test_an_end_in_the_middle_leaves_no_thread(folder, capsys, tmp_path, monkeypatch, few_devices):
    def full(*_):
        raise OSError(28, "No space left on device")

    few_devices(2)
    taken, request = [], Answers.request
    monkeypatch.setattr(Answers, "request", lambda self, row: taken.append(row) or request(self, row))
    write(tmp_path / "in.txt", TEXTS * 500)
    args = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--batch-size", "4"]
    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(jobs.Job, "write", full)
        assert run(generate.main, [str(folder), *args, "--ignore-eos"]) == 1
    assert threading.active_count() == before and "No space left" in capsys.readouterr().err
    assert len(taken) < 1000  # half of them: 2 devices, 4 at a time each


def test_what_a_parquet_file_may_hold(folder, tmp_path, capsys):
    far = pyarrow.array([0, 1 << 50, 0, 0], pyarrow.timestamp("s"))
    table = {
        "prompt": pyarrow.array([None, *TEXTS[1:]]),
        "messages": pyarrow.array([[{"role": "user", "content": "x"}], None, None, None]),
        "seed": pyarrow.array([None, None, 3, None]),
        "at": pyarrow.array([1, 2, 3, 4], pyarrow.timestamp("ns")),
        "far": far,
        "share": pyarrow.array([1.0, 0.5, math.nan, math.inf]),
        "shares": pyarrow.array([[("k", math.nan)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.float64())),
        "max_new_tokens": pyarrow.array([2.0, None, None, None]),
        "said": pyarrow.array([{"binary": "text"}] * 4),
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "in.parquet")
    args = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), "--max-new-tokens", "2"]
    args += ["--chat"]
    assert run(generate.main, [str(folder), *args, "--ignore-eos"]) == 3
    out = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out").read_text().splitlines()]
    assert ["error" in row for row in out] == [False, True, False, False]
    assert out[1].keys() == {"line", "error"} and out[1]["line"] == 2 and out[0]["at"].endswith(".000000001")
    assert out[2]["shares"] == [["k", None]]
    assert "text" in out[0] and out[2]["share"] is None is out[3]["share"] and out[2]["seed"] == 3
    bytes_ = pyarrow.array([[{"bytes": b"x"}]], pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary()})))
    for content, sentence in [
        ({"prompt": pyarrow.array([], pyarrow.string())}, "holds no rows"),
        ({"prompt": ["x"], "image": bytes_}, "has bytes in its column 'image', which the output's JSON cannot hold"),
        (None, "no sound"),
    ]:
        if content:
            pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "in.parquet")
        else:
            (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:-9])
        assert run(generate.main, [str(folder), *args]) in (2, 3)
        assert sentence in capsys.readouterr().err


def test_another_model_in_the_same_place_is_another_job(folder, tmp_path, capsys):
    place = shutil.copytree(folder, tmp_path / "model")
    write(tmp_path / "in.txt", TEXTS)
    args = [str(place), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--max-new-tokens", "2"]
    assert generate.main(args) == 0 and generate.main(args) == 0
    own = (place / "generation_config.json").read_bytes()
    (place / "generation_config.json").write_text('{"stop_strings": "zz"}')
    with pytest.raises(UsageError, match="is another job's .*stop was .*weights was"):
        generate.main(args)
    (place / "generation_config.json").write_bytes(own)
    assert generate.main(args) == 0
    (place / "README.md").write_text("of no weight")
    config = (place / "config.json").read_text()
    (place / "config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-04'))
    with pytest.raises(UsageError, match="is another job's .weights was '[0-9a-f]+', is"):
        generate.main(args)
    (place / "config.json").write_text(config)
    assert generate.main(args) == 0
    other = jax.tree.map(lambda w: w * 2, make())
    shutil.rmtree(place)
    hf.save(place, other, CONFIG, tokenizer=folder)
    with pytest.raises(UsageError, match="is another job's .weights was '[0-9a-f]+', is"):
        generate.main(args)
    for damaged in ("", "[]", "{}"):
        (tmp_path / "out.job").write_text(damaged)
        with pytest.raises(DataError, match="out.job is damaged"):
            generate.main(args)
    (tmp_path / "out").rename(tmp_path / "out.part-1-of-1")
    (tmp_path / "out.job").unlink()
    with pytest.raises(UsageError, match="out.part-1-of-1 is of a job whose out.job is gone"):
        generate.main(args)


def test_a_job_that_goes_on_is_laid_out_as_it_was(folder, tmp_path, capsys, monkeypatch):
    """Which form is the fastest differs from start to start, and sums are rounded by it."""
    write(tmp_path / "in.txt", TEXTS)
    args = [str(folder), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "2", "--logprobs", "1", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(layout, "choose", lambda groups, *_: ({names[0]: "left" for names in groups}, {}))
        assert generate.main([*args, str(tmp_path / "whole")]) == 0
    assert json.loads((tmp_path / "whole.job").read_text())["kept"]["ways"]["head"] == "left"
    shutil.copy(tmp_path / "whole.job", tmp_path / "again.job")
    monkeypatch.setattr(layout, "choose", lambda *_: pytest.fail("timed again"))
    assert generate.main([*args, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_template_is_told_the_time_that_its_job_began(folder, tmp_path, capsys):
    place = shutil.copytree(folder, tmp_path / "model")
    (place / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{{ messages[0].content }}")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    write(tmp_path / "in.jsonl", rows)
    args = [str(place), "--input", str(tmp_path / "in.jsonl"), "--max-new-tokens", "2", "--ignore-eos", "--output"]
    assert generate.main([*args, str(tmp_path / "whole"), "--prompt-logprobs", "--logprobs", "1"]) == 0
    shutil.copy(tmp_path / "whole.job", tmp_path / "again.job")
    time.sleep(1.1)
    assert generate.main([*args, str(tmp_path / "again"), "--prompt-logprobs", "--logprobs", "1"]) == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_conversations(folder, tmp_path, capsys):
    """--messages and --input give the same rows, by each row's own settings; prompts among them are not guessed at."""
    asked = [{"role": "user", "content": "x"}]
    rows = [{"id": 8, "messages": asked, "seed": 3, "max_new_tokens": 2}, {"messages": asked, "seed": 4}]
    write(tmp_path / "in.jsonl", [*rows, {"prompt": "x"}])
    write(tmp_path / "few.jsonl", rows)
    how = ["--temperature", "1", "--ignore-eos", "--max-new-tokens", "4"]
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    assert run(generate.main, [str(folder), *how, *files]) == 3
    out = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [len(row.get("tokens", ())) for row in out] == [2, 4, 0] and out[0]["id"] == 8
    assert out[2]["error"] == "it has a prompt, among messages; give --chat, or files of one kind"
    capsys.readouterr()
    assert generate.main([str(folder), *how, "--messages", str(tmp_path / "few.jsonl"), "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == out[:2]
    lengths = []
    for system in ([], ["--system", ""]):  # an empty one is in the template's own one's place
        (row,) = answers(
            folder, capsys, *how, "--prompt", "x", "--chat", *system, "--logprobs", "0", "--prompt-logprobs"
        )
        lengths.append(len(row["prompt_logprobs"]))
    assert lengths[1] != lengths[0]


def test_a_template_that_gives_nothing(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "model")
    (place / "chat_template.jinja").write_text("{% if false %}{{ messages }}{% endif %}")
    with pytest.raises(DataError, match="the chat template of .* gives no text for it"):
        generate.main([str(place), "--prompt", "x", "--chat"])


def test_other_files(folder, tmp_path, capsys):
    write(tmp_path / "a.jsonl", [{"prompt": text} for text in TEXTS])
    write(tmp_path / "b.txt", TEXTS)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "c.parquet")
    found = []
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        out = tmp_path / f"{name}.out"
        args = ["--input", str(tmp_path / name), "--output", str(out), "--max-new-tokens", "3", "--ignore-eos"]
        assert generate.main([str(folder), *args]) == 0
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[0] == found[1] == [{k: v for k, v in row.items() if k != "n"} for row in found[2]]
    assert [row["n"] for row in found[2]] == [1, 2, 3, 4]


def test_processes_share_a_job(folder, tmp_path, capsys):
    write(tmp_path / "in.txt", [*TEXTS * 2, "", *TEXTS])  # one bad row, of which each says the same
    base = [str(folder), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "2", "--ignore-eos"]
    assert run(generate.main, [*base, "--output", str(tmp_path / "one")]) == 3
    shared = [*base, "--output", str(tmp_path / "two"), "--num-processes", "3"]
    for process in (2, 0, 1):
        assert not (tmp_path / "two").exists()
        assert run(generate.main, [*shared, "--process-id", str(process)]) == (3 if process == 1 else 0)  # the last one
    assert capsys.readouterr().err.count("1 of 13 rows of") == 2
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def generate_job(argv) -> int:
    """In a process: `smoljax generate ARGV`."""
    return run(generate.main, argv)


def test_processes_begin_at_once(folder, launcher, tmp_path, capsys, few_devices):
    """Four share a job, each of two of them twice: one of each pair is refused, and nothing is lost or there twice."""
    few_devices(1)
    write(tmp_path / "in.jsonl", [{"prompt": TEXTS[i % 4] * (1 + i % 9), "max_new_tokens": 12} for i in range(40)])
    argv = [str(folder), "--input", str(tmp_path / "in.jsonl"), "--ignore-eos", "--batch-size", "8", "--output"]
    assert generate.main([*argv, str(tmp_path / "one")]) == 0
    shared = [*argv, str(tmp_path / "all"), "--num-processes", "2", "--process-id"]
    call = "test_generate:generate_job"
    started = [launcher.call(call, [*shared, str(i % 2)], env=fake_devices(1)) for i in range(4)]
    codes = [process.code for process in started]
    assert set(codes[::2]) | set(codes[1::2]) <= {0, 2} and 0 in codes[::2] and 0 in codes[1::2], codes
    for process in started:
        refused = process.code == 2
        assert refused == ("is being written by another process" in process.said), process.err
    assert (tmp_path / "all").read_bytes() == (tmp_path / "one").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "one", "one.job", "all", "all.job"}


def dying_generate(rows: int, argv):
    """In a process: `smoljax generate ARGV`, and kill -9 in the middle of the line behind so many more rows."""
    written, write = itertools.count(), jobs.Job.write

    def dying(job, row):
        if next(written) == rows:
            job.file.write(json.dumps(row).encode()[:20])
            job.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(job, row)

    jobs.Job.write = dying
    generate.main(argv)


def test_killed_at_any_moment(folder, launcher, tmp_path, capsys, few_devices):
    """kill -9, and the same command: each row once, in order, as uninterrupted."""
    few_devices(1)
    write(tmp_path / "in.jsonl", [{"prompt": TEXTS[i % 4] * (1 + i % 9), "max_new_tokens": 12} for i in range(60)])
    argv = [str(folder), "--input", str(tmp_path / "in.jsonl"), "--ignore-eos", "--batch-size", "30", "--output"]
    assert generate.main([*argv, str(tmp_path / "whole")]) == 0
    for rows, done in ((0, 0), (19, 19), (20, 39)):  # of its own, and in all
        argv_there = [*argv, str(tmp_path / "killed")]
        process = launcher.call("test_generate:dying_generate", rows, argv_there, env=fake_devices(1))
        assert process.code == -signal.SIGKILL, process.err
        left = (tmp_path / "killed.part-1-of-1").read_bytes()
        assert left.count(b"\n") == done and not left.endswith(b"\n") and not (tmp_path / "killed").exists()
    capsys.readouterr()
    assert generate.main([*argv, str(tmp_path / "killed")]) == 0
    assert "goes on behind the 39 rows" in capsys.readouterr().err
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_two_cannot_write_one_part(tmp_path):
    write(tmp_path / "in.txt", TEXTS)
    job = jobs.Job(tmp_path / "in.txt", tmp_path / "out", {}, 0, 1)
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(job.hidden(0))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(UsageError, match="is being written by another process"), job:
            pass
        other.stdin.close()


# A key of other makers -> the flags with which it changes no token. Each is one of transformers' GenerationConfig.
PASSED_OVER = [
    ({"max_length": 2048}, {"max_new_tokens": 5}),
    ({"max_length": 20}, {}),
    ({"min_length": 5}, {"min_new_tokens": 3}),
    ({"min_length": 0}, {}),
    *(({"cache_implementation": kind}, {}) for kind in ("static", "dynamic", "hybrid", "offloaded", "sliding_window")),
    ({"cache_config": {"batch_size": 1}}, {}),
    ({"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "is_assistant": False}, {}),
    ({"assistant_confidence_threshold": 0.4, "assistant_early_exit": 4, "prompt_lookup_num_tokens": 10}, {}),
    ({"prefill_chunk_size": 64, "disable_compile": True, "low_memory": True}, {}),
    ({"suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}}, {}),
    ({"force_words_ids": None, "constraints": None, "watermarking_config": None, "forced_eos_token_id": None}, {}),
    ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "diversity_penalty": 0.5}, {}),
    ({"num_return_sequences": 3, "remove_invalid_values": True, "renormalize_logits": True}, {}),
    ({"typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "top_h": 0.4}, {}),  # not sampled
    ({"do_sample": True, "typical_p": 0.9}, {"temperature": 0}),
    ({"chat_format": "chatml", "max_window_size": 24000, "user_token_id": 195, "max_length": 20.5}, {}),
    ({"presence_penalty": 0, "frequency_penalty": 0.0, "watermarking_config": {}, "dola_layers": []}, {}),
    ({"do_sample": True, "typical_p": 1.0, "penalty_alpha": 0.0, "token_healing": False}, {}),
]
# What changes a token stays an error, with what it is.
REFUSED = [
    *({key: value} for key, value in {"num_beams": 4, "num_beam_groups": 2, "max_time": 5.0, "min_length": 5}.items()),
    *({key: [3]} for key in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")),
    *({"cache_implementation": kind} for kind in ("quantized",)),
    {"do_sample": True, "typical_p": 0.9},
    {"do_sample": True, "epsilon_cutoff": 3e-4},
    {"penalty_alpha": 0.6},
    {"dola_layers": "high"},
    {"guidance_scale": 1.5},
    {"no_repeat_ngram_size": 3},
    {"forced_eos_token_id": 2},
    {"forced_bos_token_id": 2},
    {"exponential_decay_length_penalty": [15, 1.6]},
    {"sequence_bias": {"1": -1.0}},
    {"watermarking_config": {"bias": 2.5}},
    {"token_healing": True},
    {"encoder_repetition_penalty": 1.2},
    {"what_nobody_knows": 1},
]
# A flag of ours that transformers has not, so that the file may mean another's.
FLAGGED = [{"presence_penalty": 1.5}, {"frequency_penalty": 0.5}]


def settings_of(keys, flags):
    return generation_config.defaults({"generation_config.json": json.dumps(keys).encode()}, "it", flags)


@pytest.mark.parametrize("keys, flags", PASSED_OVER, ids=range(len(PASSED_OVER)))
def test_what_changes_no_token_is_passed_over(keys, flags, caplog):
    sampled = {"temperature": 1.0} if keys.get("do_sample") and not flags else {}
    assert settings_of(keys, flags) == sampled
    used = [line for line in caplog.messages if "passed over, for they change no token here" in line]
    assert len(used) <= 1
    for key, value in keys.items():
        said = key not in ("do_sample",) and value not in (None, [], {}, 0, False) and value != 1
        assert not said or any(f"{key} {value}" in line for line in used), key


@pytest.mark.parametrize("keys", REFUSED, ids=range(len(REFUSED)))
def test_what_changes_a_token_is_refused(keys):
    with pytest.raises(UsageError, match=f"has {[*keys][-1]} = .*, which smoljax has not; --no-generation-config"):
        settings_of(keys, {})


@pytest.mark.parametrize("keys", FLAGGED)
def test_what_is_a_flag_alone(keys):
    with pytest.raises(UsageError, match=f"has {[*keys][0]} = .*, which smoljax takes as a flag alone"):
        settings_of(keys, {})


def test_generation_config():
    def of(**keys):
        return settings_of(keys, {})

    assert generation_config.defaults({}, "it", {}) == {}
    assert of(eos_token_id=2, transformers_version="5", temperature=0.6, top_p=0.9) == {}
    sampled = of(do_sample=True, temperature=0.6, top_p=0.9, top_k=0, repetition_penalty=1.1, stop_strings="x")
    assert sampled == {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "stop_strings": ["x"]}
    assert of(do_sample=True) == {"temperature": 1.0}
    for keys in (dict(temperature="0.6"), dict(top_k=2.5), dict(min_new_tokens="3"), dict(max_new_tokens=0)):
        with pytest.raises(UsageError, match=f"of it has {next(iter(keys))} = .*, expected a .*number"):
            of(do_sample=True, **keys)
    for keys in (
        dict(stop_strings=""),
        dict(stop_strings=["a", 1]),
        dict(stop_strings={"a": 1}),
        dict(do_sample="true"),
    ):
        with pytest.raises(UsageError, match=f"of it has {next(iter(keys))} = .*, expected t"):
            of(**keys)


def test_every_key_of_transformers_is_known():
    """Each key of its GenerationConfig is used, passed over or refused by its own rule, not as an unknown one."""
    config = pytest.importorskip("transformers").GenerationConfig()
    g = generation_config
    known = {*g.SAMPLED, *g.ALWAYS, *g.IDS, *g.ABOUT, *g.NO_TOKEN, *g.BEAMS, *g.NEUTRAL, *g.EMPTY, "max_length"}
    known |= {
        "cache_implementation",
        "max_time",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "decoder_start_token_id",
    }
    known |= {"exponential_decay_length_penalty"}
    assert set(vars(config)) - known == set()


def test_the_models_own_settings(folder, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_new_tokens": 5}
    (own / "generation_config.json").write_text(json.dumps(settings))
    flags = ["--json", "--prompt", TEXTS[0], "--ignore-eos", "--seed", "3"]
    assert generate.main([str(own), *flags]) == 0
    said = capsys.readouterr()
    assert "by generation_config.json: temperature 1.5, top_k 40" in said.err
    row = json.loads(said.out)
    assert len(row["tokens"]) == 5
    told = answers(folder, capsys, *flags[1:], "--temperature", "1.5", "--top-k", "40")[0]
    assert told["tokens"][:5] == row["tokens"]
    greedy = answers(own, capsys, *flags[1:], "--temperature", "0")[0]
    assert greedy["tokens"] == answers(folder, capsys, *flags[1:])[0]["tokens"]
    assert answers(own, capsys, *flags[1:], "--no-generation-config")[0] == greedy


@pytest.mark.parametrize(
    "args, sentence",
    [
        ([], "expected --prompt TEXT, or --messages FILE, or --input FILE"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--prompt", "a", "--top-k", "5"], "greedy; give a temperature"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "5"], "give --temperature"),
        (["--prompt", "a", "--temperature", "1e38"], "temperature is 1e.38, expected 0 .greedy. to 1e.30"),
        (["--prompt", "a", "--min-new-tokens", "2147483648"], "min_new_tokens is 2147483648, expected"),
        (
            ["--prompt", "a", "--frequency-penalty", "1e39"],
            "frequency_penalty is 1e.39, expected a number within 1,000,000",
        ),
        (["--prompt", "a", "--logit-bias", "3=1e39"], "logit_bias has .3, 1e.39., expected"),
        (["--prompt", "a", "--min-p", "2"], "min_p is 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--prompt", "a", "--logit-bias", "x"], "--logit-bias 'x', expected a token id and a number"),
        (["--prompt", "a", "--logit-bias", "300=1"], "token id 300 .* is none of the model's, 0 to 299"),
        (["--prompt", "a", "--eos", "-1"], "token id -1"),
        (["--prompt", "a", "--stop", ""], "--stop ''"),
        (["--prompt", "a", "--n", "0"], "--n is 0"),
        (["--prompt", "a", "--n", "2"], "--n 2 samples are one at temperature 0; give --temperature"),
        (["--prompt", "a", "--system", ""], "--system is for --chat"),
        (["--prompt", "a", "--drafts", "17"], "--drafts is 17"),
        (["--prompt", "a", "--draft", "x"], "--draft guesses --drafts"),
        (["--prompt", "a", "--logprobs", "1"], "--logprobs are given with --json"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream is for one --prompt"),
        (["--prompt", ""], "row 1: the prompt is '', which has no tokens"),
        (["--prompt", "\udcff"], "--prompt .* is not UTF-8"),
        (["--prompt", "a " * 9000], "that is beyond the model's max_position_embeddings"),
        (["--messages", "x", "--chat", "--system", "y"], "--messages has conversations"),
        (["--prompt", "a", "--stop", "x\ufffd"], "the stop string .* has U.FFFD"),
        (["--prompt", "a", "--stop", "\udcff"], "--stop .* is not UTF-8 text"),
        (["--input", "x.txt", "--output", "/"], "--output / is a folder"),
        (["--prompt", "a", "--output", "x"], "--input and --output go together"),
        (["--input", "x.csv", "--output", "y"], "ends with '.csv', expected .jsonl, .parquet, .txt"),
        (["--input", "x.txt", "--output", "y", "--num-processes", "2"], "--num-processes and --process-id go together"),
        (["--prompt", "a", "--num-processes", "2"], "--num-processes and --process-id are for --input"),
    ],
)
def test_mistakes(folder, args, sentence):
    with pytest.raises(UsageError, match=sentence):
        generate.main([str(folder), *args])


BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.mark.parametrize(
    "environment, share", [({}, (0, 1)), (BATCH, (0, 1)), (STEP, (1, 2)), (MPI, (2, 3)), (STEP | MPI, (2, 3))]
)
def test_which_process_of_how_many(monkeypatch, environment, share):
    """A batch script is one process, whatever the tasks that its steps may have; mpirun may be within a step."""
    for name in (*STEP, *MPI):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert jobs.share(None, None) == share
    assert jobs.share(5, 4) == (4, 5)  # the flags stand above them


@pytest.mark.parametrize("count, mine", [("4", "x"), ("0", "0"), ("4", "7"), ("x", "0")])
def test_a_launcher_that_says_nonsense(folder, monkeypatch, count, mine):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", count)
    monkeypatch.setenv("SLURM_PROCID", mine)
    with pytest.raises(UsageError, match="SLURM_.* is .*, expected"):
        generate.main([str(folder), "--input", "x.txt", "--output", "y"])


def test_files_that_cannot_be(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "odd.parquet").write_text("no parquet")
    write(tmp_path / "in.txt", TEXTS)
    base = [str(folder), "--max-new-tokens", "2", "--output", str(tmp_path / "out"), "--input"]
    with pytest.raises(UsageError, match="holds no rows"):
        generate.main([*base, str(tmp_path / "empty.jsonl")])
    with pytest.raises(DataError, match="no sound parquet file"):
        generate.main([*base, str(tmp_path / "odd.parquet")])
    with pytest.raises(DataError, match="cannot be read"):
        generate.main([*base, str(tmp_path / "none.txt")])
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="exists already; name a new file"):
        generate.main([*base, str(tmp_path / "in.txt")])
    with pytest.raises(UsageError, match="there is no folder"):
        generate.main([*base[:-2], str(tmp_path / "no" / "out"), "--input", str(tmp_path / "in.txt")])


def test_a_pods_hosts_share_a_job(folder, tmp_path, monkeypatch, few_devices):
    """Where JAX knows of several processes, as on a TPU pod, each takes its part; flags say more."""
    few_devices(1)
    write(tmp_path / "in.txt", TEXTS)
    argv = [str(folder), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "2", "--output"]
    assert generate.main([*argv, str(tmp_path / "one")]) == 0
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (1, 0):
        assert not (tmp_path / "two").exists()
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert generate.main([*argv, str(tmp_path / "two")]) == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert generate.main([*argv, str(tmp_path / "alone"), "--num-processes", "1", "--process-id", "0"]) == 0
    assert (tmp_path / "alone").exists()


@pytest.mark.parametrize("left", ["def test\n", "def test\nanother\nreturn\nx  12\n", None])
def test_a_file_that_changes_while_it_is_read(folder, tmp_path, capsys, monkeypatch, few_devices, left):
    """Its rows are of no one file: no output, whether some are gone or are others."""
    few_devices(1)
    file, out = tmp_path / "in.txt", tmp_path / "out"
    write(file, TEXTS)

    def changing(*args):
        file.write_text(left) if left else file.unlink(missing_ok=True)
        return before(*args)

    place, name = (generate, "engines") if left else (jobs.Job, "write")  # before it is read, or when it is open
    before = getattr(place, name)
    monkeypatch.setattr(place, name, changing)
    argv = [str(folder), "--input", str(file), "--output", str(out), "--max-new-tokens", "2"]
    assert run(generate.main, argv) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert "in.txt is not what it was when the job began" in last and not out.exists()
    monkeypatch.undo()
    if left:
        assert run(generate.main, argv) == 2 and "is another job's (" in capsys.readouterr().err


def test_more_than_memory(folder, monkeypatch):
    from smoljax import budget

    monkeypatch.setattr(budget, "device_memory", lambda _: 1_000)
    with pytest.raises(
        UsageError, match="rows with 256 places need .* GB beside .*--batch-size.*--max-new-tokens.*int8"
    ):
        generate.main([str(folder), "--prompt", "a", "--n", "2", "--temperature", "1"])
