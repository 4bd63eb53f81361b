"""The tokenizer: cuts as the published one does, loses nothing, comes out the same every time."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from smoljax import tokenizer as tok
from smoljax.errors import DataError, UsageError

TEXTS = [
    Path(__file__).read_text(),
    "The quick brown fox jumps over 13 lazy dogs. " * 20,
    "naïve café 東京 🤖\n\n\tx = 1",
]
# Produced by the published SmolLM tokenizer: texts and their ids.
VECTORS = json.loads((Path(__file__).parent / "data/tokenizer_vectors.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return tok.train(TEXTS, 400, path), path


def test_special_tokens_come_first_then_bytes(trained):
    tokenizer, _ = trained
    assert [tokenizer.id_to_token(i) for i in range(17)] == tok.SPECIAL_TOKENS
    assert tok.SPECIAL_TOKENS[0] == "<|endoftext|>" and tok.SPECIAL_TOKENS[16] == "<empty_output>"
    assert tokenizer.get_vocab_size() == 400 and tok.missing_bytes(tokenizer) == []


def test_cuts_as_published():
    """Known pieces of SmolLM's pre-tokenizer: single digits, words with their space, contractions."""
    cut = lambda text: [text[a:b] for _, (a, b) in tok.new().pre_tokenizer.pre_tokenize_str(text)]  # noqa: E731
    assert cut("In 2024, 3.14") == ["In", " ", "2", "0", "2", "4", ",", " ", "3", ".", "1", "4"]
    assert cut("I'm don't  we'll") == ["I", "'m", " don", "'t", " ", " we", "'ll"]
    assert cut("a   2024 b") == ["a", "   ", "2", "0", "2", "4", " b"]
    assert cut("\n\n   x") == ["\n\n  ", " x"]
    assert cut("½ ²")[-1] == "²"  # a digit to the pattern too


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: repr(v["text"]))
def test_digits_stand_alone_in_the_published_ids(vector):
    """Digits are one published id each (32..41), as many as the text has; ours cuts at the same places."""
    digits = [c for c in vector["text"] if c in "0123456789"]
    assert [i - 32 for i in vector["ids"] if 32 <= i <= 41] == [int(c) for c in digits]
    cuts = [word for word, _ in tok.new().pre_tokenizer.pre_tokenize_str(vector["text"])]
    assert [word for word in cuts if any(c in "0123456789" for c in word)] == digits
    # No published token crosses a cut of ours, so there are at least as many ids as pieces.
    if "<|" not in vector["text"]:
        assert len(vector["ids"]) >= len(cuts)


def test_nothing_is_lost(trained):
    tokenizer, _ = trained
    rng = random.Random(0)
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [
        "".join(map(chr, range(256))),
        "\x00\x04\x1d\r\n\t ",
        *("".join(rng.choices(every, k=200)) for _ in range(50)),
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_deterministic(trained, tmp_path):
    tok.train(iter(TEXTS), 400, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained[1].read_bytes()
    assert tok.sha256(tmp_path / "again.json") == tok.sha256(trained[1].parent)


def test_load_takes_a_file_or_its_folder(trained):
    tokenizer, path = trained
    assert tok.load(path).get_vocab() == tok.load(path.parent).get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_that_drops_bytes_is_found_out(trained):
    spec = json.loads(trained[0].to_str())
    vocab, alone = spec["model"]["vocab"], "Ä"  # the symbol of byte 0xC4
    vocab["<unused>"] = vocab.pop(alone)
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if not any(alone in part for part in pair)]
    assert tok.missing_bytes(Tokenizer.from_str(json.dumps(spec))) == [0xC4]


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    for call, error, words in (
        (lambda: tok.load(tmp_path / "none.json"), DataError, "none.json"),
        (lambda: tok.load(tmp_path), DataError, "expected a tokenizer.json"),
        (lambda: tok.load(tmp_path / "broken.json"), DataError, "broken.json is not a tokenizer.json"),
        (lambda: tok.train(TEXTS, 272, tmp_path / "t.json"), UsageError, "give 273 or more"),
        (lambda: tok.train(["ab"], 500, tmp_path / "t.json"), DataError, "ask for 274"),
    ):
        with pytest.raises(error, match=words) as e:
            call()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "t.json").exists()
