"""prepare: every document is in the shards or named as refused, whatever the file, the workers, or the accident."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer

from smoljax import encode, row_files
from smoljax import tokenizer as tok
from smoljax.errors import DataError, UsageError
from smoljax.shards import Shards
from smoljax.text import documents
from train import prepare

# Unlike in size and letters; one speaks of the EOS token itself.
TEXTS = [f"Document {i}.\nIt has {i % 7} lines{' and more' * (i % 40)}.\r\n" for i in range(120)]
TEXTS += ["naïve café 東京 🤖\x00\x04", "before <|endoftext|> after", 'quotes " and \\ and \u2028']
LINES = b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tok.train(TEXTS, 320, path)
    return path


@pytest.fixture
def go(tmp_path, tokenizer, capsys, monkeypatch):
    """Run prepare in this process, in tmp_path: its JSON summary."""
    monkeypatch.chdir(tmp_path)

    def call(*inputs, output="out", **options):
        options = {"tokenizer": tokenizer, "workers": 1} | options
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
        prepare.main([*map(str, inputs), "--output", output, *flags, "--json"])  # relative, as people type it
        return json.loads(capsys.readouterr().out)

    return call


def put(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def encoded(tokenizer, texts=TEXTS):
    """The outside truth: plain `tokenizers`, the EOS after each document."""
    plain = tok.load(tokenizer)
    return Counter((*plain.encode(text).ids, plain.token_to_id("<|endoftext|>")) for text in texts)


def stored(folder):
    shards = Shards(folder)
    tokens, borders = shards.read(0, shards.num_tokens), shards.segments(0, shards.num_tokens)
    documents = {}
    for token, border in zip(tokens.tolist(), borders.tolist(), strict=True):
        documents.setdefault(border, []).append(token)
    return Counter(map(tuple, documents.values()))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_every_format_gives_the_same_documents(go, tmp_path, tokenizer):
    table = pa.table({"text": pa.array(TEXTS), "n": list(range(len(TEXTS)))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    forms = {
        "a.jsonl": LINES,
        "a.json": LINES,
        "a.jsonl.gz": gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]),  # as `cat a.gz b.gz` makes them
        "A.JSONL.ZST": zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]),
    }
    inputs = [put(tmp_path / name, data) for name, data in forms.items()] + [tmp_path / "a.parquet"]
    folder = tmp_path / "texts"
    for i, content in enumerate(TEXTS):
        form = i % 4
        name = f"{i % 5}/{i}" + [".txt", ".md", ".py.gz", ".txt.zst"][form]
        data = content.encode()
        put(folder / name, gzip.compress(data) if form == 2 else zstandard.compress(data) if form == 3 else data)
    truth = encoded(tokenizer)
    for number, source in enumerate([*inputs, folder]):
        summary = go(source, output=f"out{number}")
        out = tmp_path / f"out{number}"
        assert stored(out) == truth, source
        assert summary["documents"] == len(TEXTS) and summary["tokens"] == Shards(out).num_tokens
        assert summary["text_bytes"] == Shards(out).text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert [entry["documents"] for entry in manifest(out)["sources"]] == [1] * len(TEXTS)
    Shards(out).verify()


def test_the_manifest_accounts_for_everything(go, tmp_path, tokenizer):
    put(tmp_path / "in/a.jsonl", LINES)
    put(tmp_path / "in/b/c.txt", "\ufeffx")  # the mark at the beginning is no text
    put(tmp_path / "in/b/empty.py", "")  # has no document to refuse
    put(tmp_path / "in/b/latin.md", b"caf\xe9")
    put(tmp_path / "in/b/picture.png", b"\x89")
    os.symlink(tmp_path / "in/b", tmp_path / "in/loop")
    summary = go(tmp_path / "in", max_bad=1)
    found = manifest(tmp_path / "out")
    assert found["documents_in"] == len(TEXTS) + 2 == found["documents"] + len(found["refused"])
    (refused,) = found["refused"]
    assert refused["where"] == "b/latin.md:1" and "not UTF-8" in refused["why"] and summary["refused"] == 1
    assert found["ignored_files"] == ["b/picture.png", "loop"]
    assert [(s["file"], s["documents"]) for s in found["sources"]] == [
        ("a.jsonl", 123),
        ("b/c.txt", 1),
        ("b/empty.py", 0),
        ("b/latin.md", 0),
    ]
    assert found["eos_token"] == "<|endoftext|>" and found["eos_token_id"] == 0
    assert found["vocab_size"] == 320 and found["dtype"] == "uint16"
    assert found["max_token_id"] == Shards(tmp_path / "out").read(0, found["tokens"]).max()
    assert found["tokenizer_sha256"] == hashlib.sha256(tok.find(tokenizer).read_bytes()).hexdigest()
    assert found["text_bytes"] == sum(len(text.encode()) for text in TEXTS) + 1
    assert (tmp_path / "out/tokenizer.json").read_bytes() == tokenizer.read_bytes()
    (tmp_path / "out/manifest.json").unlink()
    assert stored(tmp_path / "out") == encoded(
        tokenizer, [*TEXTS, "x"]
    )  # the shards are datatrove's, and need no manifest


def test_workers_do_not_change_a_byte(go, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "TASK", 2000)
    for i in range(6):
        put(tmp_path / f"in/{i}.jsonl", LINES)
    go(tmp_path / "in", output="two", workers=1)
    go(tmp_path / "in", output="four", workers=4)
    go(tmp_path / "in", output="seeded", workers=4, seed=1)
    assert len(manifest(tmp_path / "two")["shards"]) > 2
    assert contents(tmp_path / "two") == contents(tmp_path / "four")
    assert stored(tmp_path / "two") == stored(tmp_path / "seeded")
    two, seeded = (Shards(tmp_path / name) for name in ("two", "seeded"))
    assert (two.read(0, two.num_tokens) != seeded.read(0, two.num_tokens)).any()


BAD = {
    "not UTF-8": b'{"text": "caf\xe9"}',
    "not JSON": b'{"text": "open',
    "no key 'text' but 'body'": b'{"body": "x"}',
    "'text' is of type NoneType": b'{"text": null}',
    "a JSON list": b"[1, 2]",
    "empty": b'{"text": " \\n"}',
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_line_is_named_and_takes_no_other_with_it(go, tmp_path, tokenizer, why):
    lines = LINES.splitlines()
    put(tmp_path / "in/a.jsonl", b"\n".join([*lines[:41], BAD[why], *lines[41:]]))
    with pytest.raises(DataError, match=r"a\.jsonl:42.*--max-bad") as e:
        go(tmp_path / "in")
    assert why in str(e.value) and e.value.code == 3
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(DataError, match="unfinished"):
        Shards(tmp_path / "out")
    go(tmp_path / "in", max_bad=1)  # goes on from there
    assert stored(tmp_path / "out") == encoded(tokenizer)
    with pytest.raises(DataError, match=r"a\.jsonl:42"):
        go(tmp_path / "in")  # up to date, and still one too many


def test_bad_parquet_rows_and_bad_text_are_named(tmp_path):
    raw = pa.array([b"ok", b"\xff", None, b""], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    found = [(line, why) for line, _, why, _ in documents(tmp_path / "a.parquet", "text") if why]
    assert [line for line, _ in found] == [2, 3, 4] and [why[:5] for _, why in found] == ["not U", "null", "empty"]
    file = put(tmp_path / "a.txt", b"one\ntwo\xff")
    assert [(line, why[:9]) for line, _, why, _ in documents(file, "text")] == [(2, "not UTF-8")]


def test_a_bomb_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LIMIT", 1000)
    bomb = put(
        tmp_path / "a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' + b"0" * 5_000_000 + b"\n" + b'{"text": "b"}')
    )
    found = [(line, text, why) for line, text, why, _ in documents(bomb, "text")]
    assert found[0] == (1, "a", None) and found[1][2].startswith("longer than") and found[2] == (3, "b", None)
    whole = put(tmp_path / "a.txt.gz", gzip.compress(b"0" * 5_000_000))
    assert [why[:11] for *_, why, _ in documents(whole, "text")] == ["longer than"]


@pytest.mark.parametrize("form", ["gz", "zst", "parquet"])
def test_half_a_file_is_an_error_whatever_max_bad(go, tmp_path, form):
    if form == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
        file = tmp_path / "a.parquet"
    else:
        data = gzip.compress(LINES) if form == "gz" else zstandard.compress(LINES)
        file = put(tmp_path / f"a.jsonl.{form}", data)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{file.name} cannot be read beyond document"):
        go(file, max_bad=1000)


def test_changed_text_runs_again_and_leaves_nothing_stale(go, tmp_path, tokenizer):
    file = put(tmp_path / "in/a.jsonl", LINES)
    assert go(tmp_path / "in")["up_to_date"] is False
    before = contents(tmp_path / "out")
    assert go(tmp_path / "in")["up_to_date"] is True and contents(tmp_path / "out") == before
    changed = LINES.replace(b"Document 7.", b"document 7.")  # as many bytes as before
    file.write_bytes(changed)
    assert go(tmp_path / "in")["up_to_date"] is False
    texts = [text.replace("Document 7.", "document 7.") for text in TEXTS]
    assert stored(tmp_path / "out") == encoded(tokenizer, texts)
    assert len(list((tmp_path / "out").glob("*.ds"))) == 1 and len(list((tmp_path / "out/.prepare").iterdir())) == 2
    (tmp_path / "out/manifest.json").unlink()
    assert stored(tmp_path / "out") == encoded(tokenizer, texts)  # nor for a reader without the manifest
    assert go(tmp_path / "in")["up_to_date"] is False  # the manifest comes back
    shard = next((tmp_path / "out").glob("*.ds"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    go(tmp_path / "in")  # a damaged shard is written again
    assert shard.read_bytes() == whole


def test_a_trained_tokenizer_lies_beside_the_shards(go, tmp_path):
    put(tmp_path / "in/a.jsonl", LINES)
    for output in "a", "b":
        go(tmp_path / "in", output=output, tokenizer=None, train_tokenizer=300)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shards = Shards(tmp_path / "a")
    assert shards.vocab_size == 300 and stored(tmp_path / "a") == encoded(shards.tokenizer_path)
    put(tmp_path / "in/b.jsonl", b"no\n")
    with pytest.raises(DataError, match=r"b\.jsonl:1"):
        go(tmp_path / "in", output="c", tokenizer=None, train_tokenizer=300)


def test_a_tokenizer_that_truncates_and_pads_does_neither(go, tmp_path, tokenizer):
    cutting = tok.load(tokenizer)
    cutting.enable_truncation(4)
    cutting.enable_padding(length=6)
    cutting.save(str(tmp_path / "t.json"))
    go(put(tmp_path / "a.jsonl", LINES), tokenizer=tmp_path / "t.json")
    assert stored(tmp_path / "out") == encoded(tokenizer)


def test_a_large_vocabulary_takes_four_bytes(go, tmp_path, tokenizer):
    spec = json.loads(tokenizer.read_text())
    spec["model"]["vocab"] |= {f"<<{i}>>": 320 + i for i in range(65_536 - 320)}  # which no text reaches
    large = Tokenizer.from_str(json.dumps(spec))
    large.add_tokens(["<<65216>>"])
    large.save(str(tmp_path / "t.json"))
    go(put(tmp_path / "a.txt", "x <<65216>>"), tokenizer=tmp_path / "t.json")
    assert manifest(tmp_path / "out")["dtype"] == "uint32" and manifest(tmp_path / "out")["max_token_id"] == 65_536
    assert stored(tmp_path / "out") == encoded(tmp_path / "t.json", ["x <<65216>>"])


def test_a_killed_run_is_finished_by_the_same_command(go, tmp_path, tokenizer):
    for i in range(8):
        put(tmp_path / f"in/{i}.jsonl", LINES * (40 if i > 1 else 10))
    go(tmp_path / "in", output="whole", workers=2)
    command = [sys.executable, "-m", "train.prepare", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    command += ["--tokenizer", str(tokenizer), "--workers", "2"]
    process = subprocess.Popen(command, cwd=Path(prepare.__file__).parents[1], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".prepare/*/logs/completions/*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.read()  # ends when every process that it had started has left
    process.stderr.close()
    assert not (tmp_path / "out/manifest.json").exists()
    done = len(list((tmp_path / "out").glob(".prepare/*/logs/completions/*")))
    assert done < len(manifest(tmp_path / "whole")["shards"])
    go(tmp_path / "in", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_at_once_are_refused(go, tmp_path):
    put(tmp_path / "in/a.jsonl", LINES)
    hold = "import sys, pathlib; from train import prepare\n"
    hold += "with prepare.claim(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "out")],
        cwd=Path(prepare.__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match="another `smoljax prepare` is at work"):
        go(tmp_path / "in")
    process.communicate()
    go(tmp_path / "in")


def test_mistakes_are_one_sentence(go, tmp_path, tokenizer):
    text = put(tmp_path / "in/a.txt", "text")
    put(tmp_path / "foreign/precious.ds", "mine")
    put(tmp_path / "odd.png", "")
    put(tmp_path / "images/odd.png", "")
    put(tmp_path / "blank/a.txt", " \n")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "nothing").mkdir()
    bare = json.loads(tokenizer.read_text())
    bare["added_tokens"] = [t for t in bare["added_tokens"] if t["id"]]
    bare["model"]["vocab"]["<other>"] = bare["model"]["vocab"].pop("<|endoftext|>")
    put(tmp_path / "no_eos.json", json.dumps(bare))
    for inputs, options, error, words in (
        ([tmp_path / "none"], {}, DataError, "no input at"),
        ([tmp_path / "odd.png"], {}, UsageError, r"odd\.png is of no kind"),
        ([tmp_path / "images"], {}, DataError, "1 files, none of a kind"),
        ([tmp_path / "nothing"], {}, DataError, "no text in"),
        ([tmp_path / "blank"], {"max_bad": 5}, DataError, "hold no documents"),
        ([tmp_path / "a.parquet"], {}, DataError, "no column 'text' but body, n"),
        ([tmp_path / "a.parquet"], {"text_key": "n"}, DataError, "'n' is int64"),
        ([text, tmp_path / "in"], {}, UsageError, "twice"),
        ([text], {"output": "foreign"}, UsageError, "not empty and not from"),
        ([text], {"output": "odd.png"}, UsageError, "not empty and not from"),
        ([tmp_path / "in"], {"output": "in/out"}, UsageError, "lies inside the input"),
        ([text], {"tokenizer": tmp_path / "none.json"}, DataError, "no tokenizer at"),
        ([text], {"tokenizer": tmp_path / "no_eos.json"}, DataError, r"no_eos.json has no token '<\|endoftext\|>'"),
        ([text], {"tokenizer": None, "train_tokenizer": 100}, UsageError, "too small"),
    ):
        with pytest.raises(error, match=words) as e:
            go(*inputs, **{"output": f"new{words[:3]}"} | options)
        assert "\n" not in str(e.value)
    assert contents(tmp_path / "foreign") == {"precious.ds": b"mine"}


USAGE = ["in", "in --output o", "in --output o --tokenizer t --train-tokenizer 5", "--verify d in"]
USAGE += ["in --output o --tokenizer t --max-bad x", "in --output o --tokenizer t --workers 0"]


@pytest.mark.parametrize("argv", USAGE)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as e:
        prepare.main(argv.split())
    assert e.value.code == 2 and "smoljax prepare: error: " in capsys.readouterr().err


def test_the_summary_speaks(go, tmp_path, tokenizer, capsys):
    put(tmp_path / "in/a.txt", "text <|endoftext|>")
    argv = [str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    prepare.main(argv)
    assert "1 document, " in capsys.readouterr().out
    prepare.main(argv)
    assert "up to date" in capsys.readouterr().out
    prepare.main(["--verify", str(tmp_path / "out")])
    assert "all as manifest.json says" in capsys.readouterr().out


def test_shards_of_other_inputs_are_not_replaced_without_a_word(tmp_path, tokenizer, capsys):
    for words, said in (("one", False), ("two", True)):
        put(tmp_path / "in/a.txt", words)
        argv = [str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
        before = Shards(tmp_path / "out").num_tokens if said else 0
        assert prepare.main(argv) == 0
        err = capsys.readouterr().err
        assert (f"replacing the {before} tokens in {tmp_path / 'out'}" in err) == said
