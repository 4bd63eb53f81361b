"""Special tokens have one source: as transformers reads a folder and llama.cpp a GGUF, through every verb."""

import json
import logging
import re

import numpy as np
import published
import pytest
from gguf import GGUFValueType as V
from published import CHATML, SIZE, TEXT, gguf_file

from infer import convert, generate
from smoljax import chat, special_tokens, tokenizer, weights
from smoljax.errors import DataError, UsageError
from smoljax.renderer import Renderer
from train import prepare

NAMED = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>")
FAST = dict(tokenizer_class="PreTrainedTokenizerFast")
TOOL = dict(content="<tool>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
SHOW = "".join(f"[{{{{ {name} }}}}]" for name in (*special_tokens.NAMES, "image_token")) + "{{ messages[0].content }}"
# The small files beside a tokenizer.json that has none of <tool>, <image>, <think>.
FOLDERS = {
    "named": {"tokenizer_config.json": NAMED | FAST},
    "as objects": {
        "tokenizer_config.json": FAST | {k: TOOL | {"content": v, "__type": "AddedToken"} for k, v in NAMED.items()}
    },
    "null": {"tokenizer_config.json": NAMED | FAST | {"bos_token": None, "pad_token": None}},
    "all seven": {"tokenizer_config.json": NAMED | FAST | {f"{n}_token": "<reponame>" for n in ("sep", "cls", "mask")}},
    "decoder": {"tokenizer_config.json": NAMED | FAST | {"added_tokens_decoder": {"300": TOOL}}},
    "decoder with flags": {
        "tokenizer_config.json": NAMED
        | FAST
        | {
            "added_tokens_decoder": {
                "300": TOOL | {"lstrip": True},
                "4": TOOL | {"content": "<reponame>", "rstrip": True},
            }
        }
    },
    "decoder of two": {
        "tokenizer_config.json": NAMED
        | FAST
        | {"added_tokens_decoder": {"301": TOOL | {"content": "<think>", "special": False}, "300": TOOL}}
    },
    "additional": {"tokenizer_config.json": NAMED | FAST | {"additional_special_tokens": ["<tool>", "<|im_end|>"]}},
    "extra": {"tokenizer_config.json": NAMED | FAST | {"extra_special_tokens": ["<tool>", "<think>"]}},
    "extra by name": {"tokenizer_config.json": NAMED | FAST | {"extra_special_tokens": {"image_token": "<image>"}}},
    "a name of its own": {"tokenizer_config.json": NAMED | FAST | {"image_token": "<image>"}},
    "new eos and pad": {"tokenizer_config.json": NAMED | FAST | {"eos_token": "<tool>", "pad_token": "<think>"}},
    "an ordinary token": {"tokenizer_config.json": NAMED | FAST | {"sep_token": "the"}},
    "map": {
        "tokenizer_config.json": FAST | {"eos_token": "<|endoftext|>"},
        "special_tokens_map.json": NAMED | {"additional_special_tokens": ["<tool>"]},
    },
    "map of objects": {
        "tokenizer_config.json": FAST,
        "special_tokens_map.json": {"eos_token": {k: v for k, v in TOOL.items() if k != "special"}},
    },
    "names of transformers' own key": {
        "tokenizer_config.json": NAMED | FAST | {"model_specific_special_tokens": {"image_token": "<image>"}}
    },
    "extra in two files": {
        "tokenizer_config.json": NAMED | FAST | {"extra_special_tokens": ["<tool>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<think>"]},
    },
    "additional in two files": {
        "tokenizer_config.json": NAMED | FAST | {"additional_special_tokens": ["<tool>"]},
        "special_tokens_map.json": {"additional_special_tokens": ["<think>"]},
    },
    "flags of a named object": {
        "tokenizer_config.json": NAMED | FAST | {"eos_token": TOOL | {"lstrip": True, "__type": "AddedToken"}}
    },
    "flags of an additional object": {
        "tokenizer_config.json": NAMED
        | FAST
        | {"additional_special_tokens": [TOOL | {"rstrip": True, "__type": "AddedToken"}]}
    },
    "flags in the map": {
        "tokenizer_config.json": NAMED | FAST,
        "special_tokens_map.json": {"sep_token": {"content": "<tool>", "lstrip": True, "rstrip": False}},
    },
    "a named token that was not special": {
        "tokenizer_config.json": NAMED | FAST | {"pad_token": "<tool>"},
        "added tokens": TOOL | {"id": 300, "special": False},
    },
    "an extra token that was not special": {
        "tokenizer_config.json": NAMED | FAST | {"extra_special_tokens": ["<tool>"]},
        "added tokens": TOOL | {"id": 300, "special": False},
    },
    "special in one file alone": {
        "tokenizer_config.json": NAMED | FAST | {"added_tokens_decoder": {"300": TOOL | {"special": False}}},
        "added tokens": TOOL | {"id": 300},
    },
    "empty": {"tokenizer_config.json": NAMED | FAST | {"pad_token": "", "sep_token": ""}},
    "map beside a decoder": {
        "tokenizer_config.json": FAST | {"eos_token": "<|endoftext|>", "added_tokens_decoder": {}},
        "special_tokens_map.json": NAMED,
    },
    "added_tokens.json": {"tokenizer_config.json": NAMED | FAST, "added_tokens.json": {"<tool>": 300, "<think>": 301}},
    "added_tokens.json, special": {
        "tokenizer_config.json": NAMED | FAST | {"eos_token": "<tool>"},
        "added_tokens.json": {"<tool>": 300},
    },
}


def folder(path, files, **more):
    files = dict(files)
    if token := files.pop("added tokens", None):
        spec = json.loads(published.tokenizer_json())
        files["tokenizer.json"] = spec | {"added_tokens": [*spec["added_tokens"], token]}
    return published.folder(path, files, rows=SIZE + 4, **more)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_as_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    place = folder(tmp_path / "hf", FOLDERS[name], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(place), weights.read(place)
    texts = {name: str(text) for name, text in theirs.special_tokens_map.items() if str(text)}
    assert special_tokens.seen(ours.files, ours.config, ours.tokenizer) == texts
    for text in (TEXT, "a<tool>b<think> <image> c", "  <reponame>  x <tool>  y", "the theme"):
        assert ours.tokenizer.encode(text).ids == theirs(text)["input_ids"]
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert chat.encode(ours.tokenizer, text) == ids
        for skip in (True, False):
            assert ours.tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name, id in (("eos_token", theirs.eos_token_id), ("bos_token", theirs.bos_token_id)):
        assert special_tokens.id_of(name, ours.files, ours.config, ours.tokenizer) == id
    assert ours.ends == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    ours.files["chat_template.jinja"] = SHOW.encode()
    messages = [{"role": "user", "content": "hello <tool>"}]
    with Renderer(ours) as renderer:
        wanted = theirs.apply_chat_template(messages, chat_template=SHOW, add_generation_prompt=True, return_dict=False)
        assert renderer.ids(messages, {}) == wanted


@pytest.mark.parametrize("name", ["decoder of two", "added_tokens.json", "map", "new eos and pad"])
@pytest.mark.parametrize("to", ["hf", "orbax", "gguf"])
def test_every_conversion_keeps_them(name, to, tmp_path, capsys):
    place = folder(tmp_path / "a", FOLDERS[name], eos_token_id=0)
    convert.main([str(place), str(tmp_path / "b"), "--to", to, "--verify"])
    convert.main([str(tmp_path / "b"), str(tmp_path / "c"), "--to", "hf"])
    before, *after = (weights.read(tmp_path / name) for name in "abc")
    for found in after:
        for text in (TEXT, "a<tool>b<think> c"):
            assert found.tokenizer.encode(text).ids == before.tokenizer.encode(text).ids
        assert set(before.ends) <= set(found.ends)
        mine, theirs = (special_tokens.seen(each.files, each.config, each.tokenizer) for each in (before, found))
        assert {k: v for k, v in theirs.items() if k in mine} == mine
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == special_tokens.seen(before.files, before.config, before.tokenizer)["eos_token"]


def test_ids_of_the_config_where_no_file_names_a_token(tmp_path):
    """bos and eos of a folder that has a tokenizer.json alone; a file that says there is none is believed."""
    for settings, expected in (
        (None, {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}),
        (
            FAST | {"eos_token": "<|im_end|>"},
            {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ),
        (FAST | dict.fromkeys(NAMED), {}),
    ):
        place = folder(tmp_path / str(len(str(settings))), {"tokenizer_config.json": settings}, eos_token_id=[0, 5])
        found = weights.read(place)
        assert special_tokens.seen(found.files, found.config, found.tokenizer) == expected


def test_contradictions_are_said_once(tmp_path, caplog):
    place = folder(tmp_path / "a", {}, bos_token_id=0, eos_token_id=[0, 5])
    found = weights.read(place)
    assert found.ends == (0, 5, 2) and found.prefix == 1 and found.ends == (0, 5, 2)
    said = [line for line in caplog.messages if "in the model's config" in line]
    assert len(said) == 2 and "bos_token is '<|im_start|>' (1) in the tokenizer's files, 0 in the model's" in said[0]
    assert said[1].endswith(
        "eos_token is '<|im_end|>' (2) in the tokenizer's files, 0, 5 in the model's config; both end a text"
    )


ADDING = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]}
ADDING["single"] += [{"Sequence": {"id": "A", "type_id": 0}}]
ADDING["pair"] = [*ADDING["single"], {"Sequence": {"id": "B", "type_id": 1}}]
ADDING["special_tokens"] = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("says", [None, False, True])
def test_add_bos_token_of_a_folder(says, adds, tmp_path, caplog):
    """tokenizer.json alone says what a plain prompt gets, as in transformers; where the settings differ, so is said."""
    transformers = pytest.importorskip("transformers")
    settings = NAMED | FAST | ({} if says is None else {"add_bos_token": says})
    spec = json.loads(published.tokenizer_json()) | ({"post_processor": ADDING} if adds else {})
    place = folder(tmp_path / "a", {"tokenizer_config.json": settings, "tokenizer.json": spec})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(place)
    assert weights.read(place).tokenizer.encode("hello").ids == theirs("hello")["input_ids"]
    assert ("as in transformers, the latter holds" in caplog.text) == (says not in (None, adds))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"added_tokens_decoder": {"305": TOOL}}, "token '<tool>' has id 305, by tokenizer.json it has 300"),
        ({"added_tokens_decoder": {"7": TOOL | {"content": "<|im_end|>"}}}, "has id 7, by tokenizer.json it has 2"),
        ({"added_tokens_decoder": {"300": "<tool>"}}, "has the added token <tool>, expected an object with"),
        ({"added_tokens_decoder": {"x": TOOL}}, "an added token of the id 'x', expected a whole number"),
        ({"added_tokens_decoder": [TOOL]}, "has added tokens [{"),
        ({"split_special_tokens": True}, "says split_special_tokens, by which a template's own tokens are cut up"),
        ({"eos_token": 2}, "eos_token is 2, expected a token's text"),
        ({"eos_token": {"content": None}}, "eos_token is None, expected a token's text"),
        ({"extra_special_tokens": ["a", 3]}, "a special token is 3, expected a token's text"),
        ({"extra_special_tokens": "<a>"}, "has extra special tokens <a>, expected at most"),
        ({"extra_special_tokens": [f"<{i}>" for i in range(5)]}, "the token '<4>' was added without a row"),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_refused_by_name(settings, words, tmp_path):
    place = folder(tmp_path / "a", {"tokenizer_config.json": NAMED | FAST | settings})
    with pytest.raises(DataError, match=re.escape(words)):
        assert weights.read(place).tokenizer


def test_every_verb_has_the_same_tokenizer(tmp_path):
    """The tokens of the small files in `load_tokenizer`, of a folder that is no model, too."""
    place = folder(tmp_path / "a", FOLDERS["decoder of two"])
    expected = weights.load_tokenizer(place).encode("a<tool>b").ids
    assert 300 in expected
    (place / "config.json").unlink()
    for path in (place, place / "tokenizer.json"):
        assert weights.load_tokenizer(path).encode("a<tool>b").ids == expected


def test_shards_have_them(tmp_path):
    place = folder(tmp_path / "a", FOLDERS["decoder of two"])
    (tmp_path / "in.txt").write_text("a<tool>b<think>c")
    command = [str(tmp_path / "in.txt"), "--tokenizer", str(place), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert prepare.main(command) == 0
    ids = np.fromfile(next((tmp_path / "out").glob("*.ds")), np.uint16).tolist()
    assert ids == weights.load_tokenizer(place).encode("a<tool>b<think>c").ids + [0] and {300, 301} < set(ids)
    assert weights.load_tokenizer(tmp_path / "out").encode("<tool>").ids == [300]


# ---- GGUF, as llama.cpp's llama-vocab.cpp has it

TYPES = [3] * len(tokenizer.SPECIAL_TOKENS) + [1] * (SIZE - len(tokenizer.SPECIAL_TOKENS))
P = "tokenizer.ggml."


def types(changes):
    return {f"{P}token_type": ([changes.get(i, kind) for i, kind in enumerate(TYPES)], V.ARRAY, V.INT32)}


@pytest.mark.parametrize(
    "keys, drop",
    [
        (types({2: 1}), ()),
        (types({2: 0, 0: 1}), ()),
        (types({2: 6}), ()),
        (types({i: 1 for i in range(17)}), ()),  # of none: all of them look so
        (types({1: 2, 3: 2}), ()),  # UNKNOWN is looked for as well
        (types({2: 9}), ()),  # no type at all
        ({}, (f"{P}token_type",)),
    ],
    ids=["eos", "two", "byte", "all", "unknown", "no such type", "absent"],
)
def test_special_tokens_are_never_cut_up(keys, drop, tmp_path, caplog):
    found = weights.read(gguf_file(tmp_path / "a.gguf", keys, drop)).tokenizer
    text = "".join(tokenizer.SPECIAL_TOKENS)
    assert found.encode(text).ids == list(range(17)) and found.decode(range(17)) == ""
    overridden = keys and 2 not in keys[f"{P}token_type"][0][1:4:2]
    assert ("have the type of ordinary ones, or none" in caplog.text) == bool(drop or overridden)


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (False, True), (True, True), (None, None)])
def test_what_stands_around_a_plain_prompt(bos, eos, tmp_path, capsys, caplog):
    """By add_bos_token and add_eos_token; a chat has what its template writes. Back and forth it stays so."""
    keys = {f"{P}add_{key}_token": (value, V.BOOL) for key, value in (("bos", bos), ("eos", eos)) if value is not None}
    file = gguf_file(tmp_path / "a.gguf", keys, () if keys else (f"{P}add_bos_token",))
    convert.main([str(file), str(tmp_path / "hf")])
    convert.main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "gguf", "--verify"])
    for path in (file, tmp_path / "hf", tmp_path / "back"):
        words = weights.read(path).tokenizer
        plain = words.encode("hello", add_special_tokens=False).ids
        assert words.encode("hello").ids == [1] * bool(bos) + plain + [2] * bool(eos)
        assert chat.encode(words, "hello") == plain
    assert ("a plain prompt begins with <|im_start|>" in caplog.text) == bool(bos)


def test_nothing_to_add(tmp_path):
    file = gguf_file(tmp_path / "a.gguf", {f"{P}add_bos_token": (True, V.BOOL)}, (f"{P}bos_token_id",))
    with pytest.raises(DataError, match="add_bos_token is true, but there is no bos_token_id to add"):
        weights.read(file)


ENDS = [
    ({"eos": 2}, {0, 2, 4}),  # <|endoftext|>, <|im_end|> and <reponame>, as llama.cpp has it for this vocabulary
    ({"eos": 0}, {0, 2, 4}),
    ({"eos": 5, "eot": 6}, {0, 2, 4, 5, 6}),
    ({"eos": 5, "eot": 6, "eom": 7}, {0, 2, 4, 5, 6, 7}),
    ({"eos": 2, "fim_pad": 7, "fim_rep": 8, "fim_sep": 9}, {0, 2, 4, 7, 8, 9}),
    ({}, {0, 2, 4}),
]


@pytest.mark.parametrize("ids, expected", ENDS)
def test_what_ends_a_generation(ids, expected, tmp_path):
    drop = tuple(f"{P}{key}_token_id" for key in ("eos", "eot", "eom"))
    keys = {f"{P}{key}_token_id": (id, V.UINT32) for key, id in ids.items()}
    assert set(weights.read(gguf_file(tmp_path / "a.gguf", keys, drop)).ends) == expected


def test_what_else_a_file_says_of_sampling(tmp_path, capsys, caplog):
    """Keys that would change tokens are refused or said: llama.cpp takes both from the file."""
    keys = {f"{P}suppress_tokens": ([7, 8], V.ARRAY, V.INT32), "general.sampling.temp": (0.6, V.FLOAT32)}
    file = gguf_file(tmp_path / "a.gguf", keys)
    args = [str(file), "--prompt", "hello", "--max-new-tokens", "1"]
    with pytest.raises(UsageError, match=r"suppress_tokens = \[7, 8\], which smoljax has not; --no-generation-config"):
        generate.main(args)
    assert "general.sampling.temp are not used; give what they say as flags" in caplog.text
    assert generate.main([*args, "--no-generation-config"]) == 0


@pytest.mark.parametrize("token", special_tokens.TURN_ENDS)
def test_ends_of_generations_by_their_texts(token, tmp_path, caplog):
    """Under another tokenizer's name of them, and of an ordinary type, which llama.cpp overrides."""
    listed = [*tokenizer.SPECIAL_TOKENS]
    if token not in listed:
        listed[9] = token
    spec = json.loads(published.tokenizer_json())
    ids = {text: id for text, id in spec["model"]["vocab"].items()}
    texts = listed + sorted(ids, key=ids.get)[17:]
    keys = {f"{P}tokens": (texts, V.ARRAY, V.STRING)} | types({listed.index(token): 1})
    found = weights.read(gguf_file(tmp_path / "a.gguf", keys))
    assert found.tokenizer.encode(f"a{token}b").ids.count(listed.index(token)) == 1
    assert listed.index(token) in found.ends and "1 special tokens have the type" in caplog.text


# ---- what ends an answer

STOPS = {  # a template -> the ids that it ends answers with, where the model's own is 7 and the tokenizer's eos 7
    CHATML: {2, 7},
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}": {7},
    "{% for m in messages %}<{{ m.role }}>{{ m.content }} <file_sep>\n{% endfor %}": {5, 7},
    "{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}": {2, 7},
    "{{ messages[0].content }}": {7},
    "{% for m in messages %}{{ '<repo_name>' if m.role == 'user' else '<reponame>' }}{{ m.content }}{% endfor %}": {
        3,
        7,
    },
    "{{ raise_exception('no system') if messages[0].role != 'system' }}{{ messages[0].content }}<|im_end|>": {2, 7},
    "{% for m in messages %}{{ m.content }}{{ '<|im' ~ '_end|>' }}{% endfor %}": {2, 7},
}


@pytest.mark.parametrize("template", STOPS)
def test_the_template_s_end_of_turn(template, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    settings = NAMED | FAST | {"eos_token": "<gh_stars>"}
    loaded = weights.read(
        folder(tmp_path / "a", {"tokenizer_config.json": settings}, template=template, eos_token_id=7)
    )
    args = generate.parser().parse_args(["m"])
    with Renderer(loaded) as renderer:
        assert set(generate.ending(args, loaded, renderer)) == STOPS[template]
    assert generate.ending(args, loaded, None) == (7,)


def test_the_end_of_turn_of_a_second_template(tmp_path):
    files = {"chat_template.jinja": "{{ messages[-1].content }}", "tokenizer_config.json": NAMED | FAST}
    files["additional_chat_templates/tool_use.jinja"] = (
        "{{ tools }}{% for m in messages %}{{ m.content }}<file_sep>{% endfor %}"
    )
    loaded = weights.read(folder(tmp_path / "a", files, template=None))
    with Renderer(loaded) as renderer:
        assert renderer.turn_ends() == (5,)


def test_what_a_conversion_loses_is_said(tmp_path, capsys, caplog):
    """Names that GGUF has no key for; and what llama.cpp alone takes for the end of a generation."""
    place = folder(tmp_path / "a", FOLDERS["a name of its own"])
    convert.main([str(place), str(tmp_path / "b"), "--to", "gguf", "--verify"])
    assert "GGUF has no key for image_token, so a chat template there sees none" in caplog.text
    assert "llama.cpp also ends" not in capsys.readouterr().err
    convert.main([str(tmp_path / "b"), str(tmp_path / "c"), "--to", "hf"])
    said = capsys.readouterr().err
    assert "llama.cpp also ends a text of" in said and "<|endoftext|> (0), <reponame> (4)" in said


def test_an_answer_ends_there(tmp_path, capsys):
    """By the command, of a model that says <|im_end|> at once; and goes on where nothing says that it ends there."""
    settings = NAMED | FAST | {"eos_token": "<|endoftext|>"}
    place = folder(tmp_path / "a", {"tokenizer_config.json": settings}, eos_token_id=0)
    args = [str(place), "--prompt", "hello", "--json", "--max-new-tokens", "4", "--temperature", "0"]
    args += ["--logit-bias", "2=1000"]
    for more, count in ((["--chat"], 1), ([], 4), (["--chat", "--ignore-eos"], 4), (["--chat", "--eos", "9"], 4)):
        assert generate.main([*args, *more]) == 0
        row = json.loads(capsys.readouterr().out)
        assert (len(row["tokens"]), row["finish_reason"]) == (count, "stop" if count == 1 else "length")
