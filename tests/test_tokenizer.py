"""The tokenizer: cuts as the published one does, loses nothing, comes out the same every time."""

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from smoljax import tokenizer as tok
from smoljax import tokenizer_file
from smoljax.config import Model
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
    assert (tmp_path / "again.json").read_bytes() == tok.find(trained[1].parent).read_bytes()


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


def edited(trained, edit) -> bytes:
    spec = json.loads(trained[1].read_bytes())
    edit(spec)
    return json.dumps(spec).encode()


def refused(content: bytes, words: str):
    with pytest.raises(DataError, match=re.escape(words)) as e:
        tok.parse(content, "hostile.json")
    sentence = str(e.value)
    assert sentence.startswith("hostile.json ") and sentence.isprintable() and len(sentence) < 600


def split(pattern) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content, pattern="a") -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(key, *parts) -> dict:
    return {"type": "Sequence", key: list(parts)}


def template(**token) -> dict:
    piece = {"SpecialToken": {"id": token["id"], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {token["id"]: token}
    return {"type": "TemplateProcessing", "single": [piece, text], "pair": [text, other], "special_tokens": tokens}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
EOS = template(id=tok.EOS, ids=[0], tokens=[tok.EOS])
SLOW = r"[ab]*(?!c)(?<=d)"  # 13 s for 40,000 letters
HOSTILE = {
    "no vocabulary": (lambda s: s["model"].pop("vocab"), "merges for 17 tokens"),
    "no merges' token": (lambda s: s["model"]["merges"].append(["zzz", "q"]), "Token `zzz` out of vocabulary"),
    "the same id twice": (lambda s: s["model"]["vocab"].update(zzz=300), "two tokens of the same id"),
    "a far id": (lambda s: s["model"]["vocab"].update(zzz=4_000_000_000), "an id of 4,000,000,000 among 401 tokens"),
    "an added far id": (
        lambda s: s["added_tokens"].append(s["added_tokens"][0] | dict(content="zzz", id=2**32 - 1)),
        "an id",
    ),
    "an added other id": (
        lambda s: s["added_tokens"][3].update(id=7),
        "token '<repo_name>' with id 7, where its vocab has 3",
    ),
    "an added hole": (
        lambda s: s["added_tokens"].append(s["added_tokens"][0] | dict(content="zzz", id=500)),
        "with id 500",
    ),
    "an added nothing": (
        lambda s: s["added_tokens"].append(s["added_tokens"][0] | dict(content="", id=400)),
        "with id 400",
    ),
    "many added": (
        lambda s: s["added_tokens"].extend(
            s["added_tokens"][0] | dict(content=f"<{i}>", id=400 + i) for i in range(10_001)
        ),
        "10,018 added tokens, expected at most 10,000",
    ),
    "a long token": (lambda s: s["model"]["vocab"].update({"a" * 5000: 400}), "a token of 5,000 characters"),
    "dropout": (lambda s: s["model"].update(dropout=0.1), "dropout"),
    "an unknown token": (lambda s: s["model"].update(unk_token="zzz"), "unk_token 'zzz'"),
    "what aborts the process": (
        lambda s: s["model"].update(continuing_subword_prefix="ab"),
        "continuing_subword_prefix",
    ),
    "a long suffix": (lambda s: s["model"].update(end_of_word_suffix="z" * 17), "end_of_word_suffix"),
    "many merges": (lambda s: s["model"]["merges"].extend([["a", "b"]] * 2000), "merges for 400 tokens"),
    "another model": (lambda s: s["model"].update(type="WordPiece"), "a 'WordPiece', expected BPE"),
    "a model to guess": (lambda s: s.update(model={"vocab": {"a": 0}, "unk_token": "a"}), "without a type"),
    "a slow pattern": (lambda s: s.update(pre_tokenizer=split(SLOW)), "which may take forever"),
    "a slow pattern inside": (
        lambda s: s.update(pre_tokenizer=sequence("pretokenizers", BYTE_LEVEL, split(SLOW))),
        "which may take forever",
    ),
    "a slow normalizer": (
        lambda s: s.update(normalizer={"type": "Replace", "pattern": {"Regex": SLOW}, "content": ""}),
        "which may take forever",
    ),
    "a slow decoder": (
        lambda s: s.update(decoder={"type": "Replace", "pattern": {"Regex": SLOW}, "content": ""}),
        "which may take forever",
    ),
    "a part to guess": (
        lambda s: s.update(normalizer={"pattern": {"Regex": SLOW}, "content": ""}),
        "normalizer 'None'",
    ),
    "a flood": (lambda s: s.update(normalizer=replace("a" * 65)), "may flood the memory"),
    "a flood of floods": (
        lambda s: s.update(normalizer=sequence("normalizers", *[replace("aaa")] * 4)),
        "may flood the memory",
    ),
    "bytes of bytes": (
        lambda s: s.update(pre_tokenizer=sequence("pretokenizers", *[BYTE_LEVEL] * 20)),
        "2 of them ByteLevel",
    ),
    "a deep sequence": (
        lambda s: s.update(pre_tokenizer=sequence("pretokenizers", sequence("pretokenizers", BYTE_LEVEL))),
        "nested twice",
    ),
    "an empty pattern": (lambda s: s.update(normalizer=replace("x", "")), "an empty pattern"),
    "a strip beyond": (lambda s: s.update(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 9}), "stop 9"),
    "a panic": (
        lambda s: s.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "'Precompiled'",
    ),
    "a template's far id": (
        lambda s: s.update(post_processor=template(id=tok.EOS, ids=[4_000_000], tokens=[tok.EOS])),
        "with id 4000000, where its vocab has 0",
    ),
    "a template's flood": (
        lambda s: s.update(post_processor=EOS | {"single": EOS["single"] * 20}),
        "that adds 40 tokens",
    ),
    "a template's undefined token": (
        lambda s: s.update(post_processor=EOS | {"special_tokens": {}}),
        "is not a tokenizer.json",
    ),
    "Roberta's far id": (
        lambda s: s.update(post_processor={"type": "RobertaProcessing", "sep": ["a", 99_999], "cls": [tok.EOS, 0]}),
        "token 'a' with id 99999",
    ),
    "a unigram that cannot": (
        lambda s: s.update(model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}, added_tokens=[]),
        "unk_id",
    ),
    "an escape": (lambda s: s["model"]["merges"].append(["\x1b[31m", "q"]), "out of vocabulary"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(trained, name):
    edit, words = HOSTILE[name]
    refused(edited(trained, edit), words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b" " * (tokenizer_file.SIZE_LIMIT + 1), "bytes, expected at most"),
        (b'{"model": [' + b"[]," * 500_000 + b"1]}", "500,001 times '['"),
        (b"[" * 300_000, "is not a tokenizer.json"),
        (b'{"model": {}, "model": {}}', "the same key twice"),
        (b'{"model": {"vocab": {"\xff": 0}}}', "is not a tokenizer.json"),
        (b"", "is not a tokenizer.json"),
        (b"[]", "is not a tokenizer.json"),
        (b"null", "is not a tokenizer.json"),
        (b'{"model": 1}', "is not a tokenizer.json"),
    ],
    ids=["size", "lists", "depth", "twice", "UTF-8", "empty", "list", "null", "number"],
)
def test_hostile_bytes_are_refused(content, words):
    refused(content, words)


def test_a_hostile_file_takes_little_memory(trained, tmp_path):
    """In a process of its own, as a peak cannot be taken back."""
    (tmp_path / "big.json").write_bytes(
        edited(trained, lambda s: s["model"]["vocab"].update({f"t{i}": i + 400 for i in range(299_000)}, zzz=0))
    )
    program = (
        "import resource, sys; from smoljax import tokenizer; rss = lambda: resource.getrusage(0).ru_maxrss\n"
        "before = rss()\n"
        "try: tokenizer.load(sys.argv[1])\n"
        "except Exception as e: print(rss() - before, e)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "big.json"], capture_output=True, text=True, check=True
    ).stdout
    kilobytes, _, sentence = out.partition(" ")
    assert "two tokens of the same id" in sentence and int(kilobytes) < 200_000


def test_what_is_not_hostile_is_accepted(trained):
    """The parts of GPT-2, Llama 2, Llama 3 and Qwen 2."""
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    llama2 = sequence("decoders", replace(" ", "\u2581"), {"type": "ByteFallback"}, {"type": "Fuse"}, strip)
    for edit in (
        lambda s: None,
        lambda s: s.update(post_processor=EOS),
        lambda s: s.update(post_processor=sequence("processors", BYTE_LEVEL, EOS)),
        lambda s: s.update(normalizer={"type": "NFC"}, decoder=llama2),
        lambda s: s.update(normalizer=sequence("normalizers", {"type": "Prepend", "prepend": "_"}, replace("_", " "))),
        lambda s: s["model"].pop("type"),
        lambda s: s["model"].update(unk_token=tok.EOS),
        lambda s: s["added_tokens"].append(s["added_tokens"][0] | dict(content="<new>", id=400)),
        *(
            lambda s, p=p: s.update(pre_tokenizer=sequence("pretokenizers", split(p), BYTE_LEVEL))
            for p in sorted(tokenizer_file.PATTERNS)
        ),
    ):
        assert tok.parse(edited(trained, edit), "t").encode("It's 12 dogs", add_special_tokens=False).ids


def test_truncation_and_padding_are_taken_away(trained):
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 1000}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": tok.EOS}
    found = tok.parse(edited(trained, lambda s: s.update(truncation=truncation, padding=padding)), "t")
    assert found.encode("quick brown fox").ids == trained[0].encode("quick brown fox").ids


def test_vocabulary_and_fit(trained):
    model = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    assert tok.vocabulary(trained[0]) == 400 and tok.vocabulary(tok.new()) == 0
    tok.check_fits(trained[0], Model(**model, vocab_size=400), "t.json")
    with pytest.raises(DataError, match="t.json has ids up to 399, but the model has rows for 399"):
        tok.check_fits(trained[0], Model(**model, vocab_size=399), "t.json")


VALUES = [
    None,
    True,
    0,
    -1,
    2**31,
    2**32,
    2**64,
    10**30,
    0.5,
    1e308,
    "",
    "a",
    "\0",
    "é🤖",
    [],
    {},
    [[]],
    ["a", 1],
    "a" * 2000,
]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out or doubled; or, where it stays JSON, keys gone, values of another type or size."""
    if rng.random() < 0.4:
        out = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(len(out))
            match rng.randrange(3):
                case 0:
                    out[at] ^= 1 << rng.randrange(8)
                case 1:
                    del out[at : at + rng.choice([1, 10, 1000])]
                case 2:
                    out[at:at] = out[at : at + rng.choice([1, 10, 1000])]
            if not out:
                break
        return bytes(out)
    spec = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        holder, steps = spec, rng.choice([1, 2, 3, 4, 6])
        for _ in range(steps):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            if not keys:
                break
            key = rng.choice(keys)
            if steps > 1 and isinstance(holder[key], dict | list) and rng.random() < 0.8:
                holder = holder[key]
                continue
            match rng.randrange(4):
                case 0:
                    del holder[key]
                case 1:
                    holder[key] = copy.deepcopy(rng.choice(VALUES))
                case 2:
                    other = copy.deepcopy(holder[rng.choice(keys)])
                    holder[key] = [other] if isinstance(holder, list) else other
                case 3:
                    if isinstance(holder, list):
                        holder *= rng.choice([2, 50]) if len(holder) < 1000 else 1
                    else:
                        holder[rng.choice(["type", "content", "id", "zzz"])] = copy.deepcopy(rng.choice(VALUES))
            break
        else:
            continue
    return json.dumps(spec).encode()


def fuzz(trained, count: int, seed: int):
    rng, outcomes = random.Random(seed), {True: 0, False: 0}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    bases = [
        edited(trained, lambda s: None),
        edited(trained, lambda s: s.update(post_processor=sequence("processors", BYTE_LEVEL, EOS))),
        edited(trained, lambda s: s.update(normalizer=sequence("normalizers", replace("b"), {"type": "NFC"}))),
        edited(trained, lambda s: s.update(decoder=sequence("decoders", replace(" ", "_"), {"type": "Fuse"}, strip))),
    ]
    for i in range(count):
        content = mutate(rng, rng.choice(bases))
        try:
            found = tok.parse(content, "fuzzed.json")
        except DataError as e:
            assert str(e).startswith("fuzzed.json ") and str(e).isprintable() and len(str(e)) < 700, (i, str(e))
            outcomes[False] += 1
            continue
        outcomes[True] += 1  # then it works, too
        ids = found.encode("The fox's 12 <|im_end|> é\n\n🤖" + "a" * 200).ids
        assert len(ids) < 10_000 and all(id < tok.vocabulary(found) for id in ids), i
        found.decode(ids, skip_special_tokens=False)
    assert min(outcomes.values()) > count / 20  # neither all good nor all bad


def test_fuzzed_files(trained):
    fuzz(trained, 400, seed=0)


@pytest.mark.slow
def test_many_fuzzed_files(trained):
    fuzz(trained, 10_000, seed=1)
