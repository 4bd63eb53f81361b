"""`smoljax generate`, its batch jobs, text as it comes, and the model's own generation settings."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_hf import train_tokenizer
from test_model import CONFIG, make

from infer import generate
from smoljax import generation_config, hf, jobs
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
    first, *found = row["prompt_logprobs"]
    assert first is None and len(found) == len(words.encode(TEXTS[0]).ids) - 1
    assert all(p["logprob"] <= p["top"][0][1] < 0 and len(p["top"]) == 2 for p in found)


def test_stop_strings(folder, words, capsys):
    (free,) = answers(folder, capsys, "--ignore-eos", "--prompt", TEXTS[0])
    text = free["text"]
    stop = text[3:6]
    (row,) = answers(folder, capsys, "--ignore-eos", "--prompt", TEXTS[0], "--stop", stop, "--stop", "nowhere")
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


def test_killed_at_any_moment(folder, launcher, tmp_path, capsys):
    """kill -9, and the same command: each row once, in order, as uninterrupted."""
    write(tmp_path / "in.jsonl", [{"prompt": TEXTS[i % 4] * (1 + i % 9), "max_new_tokens": 12} for i in range(60)])
    argv = [str(folder), "--input", str(tmp_path / "in.jsonl"), "--ignore-eos", "--batch-size", "30", "--output"]
    assert generate.main([*argv, str(tmp_path / "whole")]) == 0
    for rows, done in ((0, 0), (19, 19), (20, 39)):  # of its own, and in all
        process = launcher.call("test_generate:dying_generate", rows, [*argv, str(tmp_path / "killed")])
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


def test_generation_config():
    def of(**keys):
        return generation_config.defaults({"generation_config.json": json.dumps(keys).encode()}, "it")

    assert generation_config.defaults({}, "it") == {}
    assert of(eos_token_id=2, transformers_version="5", temperature=0.6, top_p=0.9) == {}
    sampled = of(do_sample=True, temperature=0.6, top_p=0.9, top_k=0, repetition_penalty=1.1, stop_strings="x")
    assert sampled == {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "stop_strings": ["x"]}
    assert of(do_sample=True) == {"temperature": 1.0}
    assert of(num_beams=1, length_penalty=1.0) == {}
    with pytest.raises(UsageError, match="num_beams = 4, which smoljax has not"):
        of(num_beams=4)


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
        (["--prompt", "a", "--min-p", "2"], "min_p is 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--prompt", "a", "--logit-bias", "x"], "--logit-bias 'x', expected a token id and a number"),
        (["--prompt", "a", "--logit-bias", "300=1"], "token id 300 .* is not below"),
        (["--prompt", "a", "--eos", "-1"], "token id -1"),
        (["--prompt", "a", "--stop", ""], "--stop ''"),
        (["--prompt", "a", "--n", "0"], "--n is 0"),
        (["--prompt", "a", "--drafts", "17"], "--drafts is 17"),
        (["--prompt", "a", "--draft", "x"], "--draft guesses --drafts"),
        (["--prompt", "a", "--logprobs", "1"], "--logprobs are given with --json"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream is for one --prompt"),
        (["--prompt", ""], "row 1: the prompt is '', which has no tokens"),
        (["--prompt", "\udcff"], "prompt 1 is not UTF-8"),
        (["--prompt", "a " * 9000], "that is beyond the model's max_position_embeddings"),
        (["--prompt", "a", "--output", "x"], "--input and --output go together"),
        (["--input", "x.csv", "--output", "y"], "ends with '.csv', expected .jsonl, .parquet, .txt"),
        (["--prompt", "a", "--num-processes", "2"], "--num-processes and --process-id go together"),
    ],
)
def test_mistakes(folder, args, sentence):
    with pytest.raises(UsageError, match=sentence):
        generate.main([str(folder), *args])


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


def test_more_than_memory(folder, monkeypatch):
    from smoljax import budget

    monkeypatch.setattr(budget, "device_memory", lambda _: 1_000)
    with pytest.raises(
        UsageError, match="rows with 256 places need .* GB beside .*--batch-size.*--max-new-tokens.*int8"
    ):
        generate.main([str(folder), "--prompt", "a", "--n", "2"])
