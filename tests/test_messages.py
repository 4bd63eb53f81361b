"""Messages as the world writes them: a template gets what transformers gives it, or the row has an error."""

import json
import re

import published
import pytest
from gguf import GGUFValueType as V
from jinja2 import UndefinedError
from published import CHATML, gguf_file

from infer import convert, generate
from smoljax import weights
from smoljax.errors import DataError
from smoljax.renderer import Renderer

CALL = {"type": "function", "function": {"name": "sat", "arguments": {"on": "mat", "x": None}}}
TOOLS = [{"type": "function", "function": {"name": "sat", "parameters": {"type": "object", "properties": {}}}}]
USER = {"role": "user", "content": "hello"}
# Writes all that it gets; `content` where there is one.
ALL = (
    "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% if documents is not none %}{{ documents }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{% if add_generation_prompt %}>{% endif %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
)
EITHER += "{% endfor %}{% endif %}{% endfor %}"
ONLY_PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.type }}: {{ p.text }};{% endfor %}{% endfor %}"
TEMPLATES = {"all": ALL, "ChatML": CHATML, "either": EITHER, "only parts": ONLY_PARTS}

# messages, the row's other keys: as transformers renders them.
ROWS = {
    "null beside a call": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
    "absent beside a call": ([USER, {"role": "assistant", "tool_calls": [CALL]}], {}),
    "an old call": ([USER, {"role": "assistant", "content": None, "function_call": {"name": "f"}}], {}),
    "empty beside a call": ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], {}),
    "a tool's answer": ([USER, {"role": "tool", "content": "cat", "name": "sat", "tool_call_id": "1"}], {}),
    "developer": ([{"role": "developer", "content": "be brief"}, USER], {}),
    "a role of its own": ([{"role": "ipython", "content": "1"}, USER], {}),
    "a name": ([USER | {"name": "Ann"}], {}),
    "nulls that Arrow filled in": ([USER | {"tool_calls": None, "name": None}, USER | {"tool_calls": [CALL]}], {}),
    "reasoning": ([USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}], {}),
    "thinking": ([USER, {"role": "assistant", "content": "a", "thinking": "b", "reasoning": None}], {}),
    "reasoning by its short name": ([USER, {"role": "assistant", "content": "a", "reasoning": "b"}], {}),
    "a call with reasoning alone": ([USER, {"role": "assistant", "content": None, "reasoning_content": "b"}], {}),
    "tools": ([USER], {"tools": TOOLS}),
    "no tools": ([USER], {"tools": []}),
    "null tools": ([USER], {"tools": None, "documents": None, "chat_template_kwargs": None}),
    "documents": ([USER], {"documents": [{"title": "t", "text": "x"}]}),
    "variables": ([USER], {"chat_template_kwargs": {"enable_thinking": False}}),
    "a variable before a special token": ([USER], {"chat_template_kwargs": {"eos_token": "!", "bos_token": "?"}}),
    "no generation prompt": ([USER], {"chat_template_kwargs": {"add_generation_prompt": False}}),
    "documents among the variables": ([USER], {"chat_template_kwargs": {"documents": [{"text": "x"}]}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.folder(tmp_path_factory.mktemp("messages") / "hf")


@pytest.fixture(scope="module")
def theirs(folder):
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(folder, template, messages, given) -> list[int]:
    loaded = weights.read(folder)
    loaded.files["chat_template.jinja"] = template.encode()
    with Renderer(loaded) as renderer:
        return renderer.ids(messages, given)


@pytest.mark.parametrize("template", ["all", "ChatML"])
@pytest.mark.parametrize("name", ROWS)
def test_as_transformers(name, template, folder, theirs):
    messages, given = ROWS[name]
    given = {key: value for key, value in given.items() if value is not None}
    more = {"add_generation_prompt": True} | given.pop("chat_template_kwargs", {}) | given
    try:
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES[template], return_dict=False, **more)
    except (TypeError, UndefinedError):  # ChatML adds a content that is not there to a text
        with pytest.raises(DataError, match="the chat template of .* fails"):
            rendered(folder, TEMPLATES[template], *ROWS[name])
    else:
        assert rendered(folder, TEMPLATES[template], *ROWS[name]) == expected


PARTS = [
    [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}],
    [{"type": "text", "text": "a", "image_url": None}],
    [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}],
    ["a", {"type": "text", "text": "b"}],
    [],
]


@pytest.mark.parametrize("parts", PARTS, ids=range(5))
def test_parts_are_joined(parts, folder, theirs):
    """As text, in every template that takes one; a template that reads parts alone gets them as in transformers."""
    text = "".join(part if isinstance(part, str) else part["text"] for part in parts)
    messages = [USER | {"content": parts}]
    for name in ("all", "ChatML", "either"):
        if text or name != "either":
            plain = rendered(folder, TEMPLATES[name] + ".", [USER | {"content": text}], {})
            assert rendered(folder, TEMPLATES[name] + ".", messages, {}) == plain
    typed = [part if isinstance(part, dict) and part["type"] == "text" else None for part in parts]
    if all(typed):
        expected = theirs.apply_chat_template(messages, chat_template=ONLY_PARTS + ".", return_dict=False)
        assert rendered(folder, ONLY_PARTS + ".", messages, {}) == expected


@pytest.mark.parametrize(
    "messages, given, words",
    [
        ([USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "a part of type 'image_url'"),
        ([USER | {"content": ["a", {"type": "input_audio"}]}], {}, "a part of type 'input_audio'"),
        ([USER | {"content": [{"text": "a"}]}], {}, "a part of type None, expected 'text'"),
        ([USER | {"content": [{"type": "text", "text": None}]}], {}, "a part's text is absent, expected text"),
        ([USER | {"content": [3]}], {}, "a part's text is 3, expected text"),
        ([USER | {"content": {"a": 1}}], {}, "message 0: content is {'a': 1}, expected text"),
        ([USER | {"content": 3, "tool_calls": [CALL]}], {}, "message 0: content is 3, expected text"),
        ([USER, {"role": "assistant", "content": None}], {}, "message 1: content is absent, expected text"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": None}], {}, "message 1: content is absent"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], {}, "message 1: content is absent"),
        ([{"content": "x"}], {}, "message 0: role is absent, expected text"),
        ([USER], {"tools": "[]"}, "tools is '[]', expected a list of objects"),
        ([USER], {"tools": [TOOLS[0], "f"]}, "expected a list of objects"),
        ([USER], {"documents": [["x"]]}, "documents is [['x']], expected a list of objects"),
        ([USER], {"chat_template_kwargs": [1]}, "chat_template_kwargs is [1], expected an object"),
        ([USER], {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages'"),
        ([USER], {"chat_template_kwargs": {"continue_final_message": True}}, "has 'continue_final_message'"),
        ([USER], {"tools": TOOLS, "chat_template_kwargs": {"tools": TOOLS}}, "chat_template_kwargs has 'tools'"),
    ],
    ids=range(18),
)  # fmt: skip
def test_refusals(messages, given, words, folder):
    with pytest.raises(DataError, match=re.escape(words)):
        rendered(folder, ALL, messages, given)


def test_rows_of_a_job(folder, tmp_path, capsys):
    """The keys reach the template from a batch job, from --messages and beside a prompt; or the row has an error."""
    (folder / "chat_template.jinja").write_text(ALL)
    rows = [{"messages": [USER]}, {"messages": [USER], "tools": TOOLS}, {"messages": [USER], "tools": "x"}]
    rows += [{"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--max-new-tokens", "1", "--temperature", "0", "--logprobs", "0", "--prompt-logprobs"]
    with pytest.raises(DataError, match="1 of 4 rows"):
        generate.main([str(folder), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), *flags])
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    lengths = [len(row.get("prompt_logprobs", ())) for row in found]
    loaded = weights.read(folder)
    with Renderer(loaded) as renderer:
        assert lengths == [len(renderer.ids([USER], row)) if row.get("tools") != "x" else 0 for row in rows]
    assert "expected a list of objects" in found[2]["error"]
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert generate.main([str(folder), "--messages", str(tmp_path / "m.jsonl"), "--json", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["prompt_logprobs"]) == lengths[1]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "hello", "tools": TOOLS}) + "\n")
    job = [str(folder), "--input", str(tmp_path / "p.jsonl"), *flags, "--output"]
    with pytest.raises(DataError, match="it has tools, which a chat template alone can show; give --chat"):
        generate.main([*job, str(tmp_path / "plain")])
    assert generate.main([*job, str(tmp_path / "chat"), "--chat"]) == 0
    assert len(json.loads((tmp_path / "chat").read_text())["prompt_logprobs"]) == lengths[1]


# ---- more than one template

DEFAULT, TOOL_USE = "{{ messages[0].content }}", "{{ tools | tojson }} then {{ messages[0].content }}"
TWO = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]
TWO += [{"name": "rag", "template": "{{ documents }}"}]
PLACES = {
    "listed": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TWO}},
    "beside it": {
        "chat_template.jinja": DEFAULT,
        "additional_chat_templates/tool_use.jinja": TOOL_USE,
        "additional_chat_templates/rag.jinja": "{{ documents }}",
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_a_second_template_is_used_with_tools_and_said(name, tmp_path, caplog):
    """As transformers has it, from both places, through every format and back."""
    transformers = pytest.importorskip("transformers")
    place = published.folder(tmp_path / "a", PLACES[name], template=None)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(place)
    for step, to in enumerate(("hf", "orbax", "gguf", "hf")):
        before, after = tmp_path / "abcde"[step], tmp_path / "abcde"[step + 1]
        convert.main([str(before), str(after), "--to", to, "--verify"])
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "e")
    for path in (tmp_path / letter for letter in "abcde"):
        caplog.clear()
        loaded = weights.read(path)
        with Renderer(loaded) as renderer:
            for given in ({}, {"tools": TOOLS}, {"tools": []}):
                expected = theirs.apply_chat_template([USER], return_dict=False, **given)
                assert renderer.ids([USER], given) == expected
                assert again.apply_chat_template([USER], return_dict=False, **given) == expected
        said = "the default is used, that named 'tool_use' where tools are given; not ['rag']"
        assert said in caplog.text


def test_a_second_template_of_a_gguf_file(tmp_path, caplog):
    keys = {"tokenizer.chat_template.tool_use": (TOOL_USE, V.STRING), "tokenizer.chat_template": (DEFAULT, V.STRING)}
    keys |= {"tokenizer.chat_template.../x": ("{{ no }}", V.STRING)}  # no name for a file
    loaded = weights.read(gguf_file(tmp_path / "a.gguf", keys))
    with Renderer(loaded) as renderer:
        assert len(renderer.ids([USER], {"tools": TOOLS})) > len(renderer.ids([USER], {}))
    assert "that named 'tool_use' where tools are given" in caplog.text


def test_the_default_template_of_a_gguf_file_has_no_name(tmp_path):
    keys = {"tokenizer.chat_template.default": ("no", V.STRING), "tokenizer.chat_template": (DEFAULT, V.STRING)}
    loaded = weights.read(gguf_file(tmp_path / "a.gguf", keys))
    with Renderer(loaded) as renderer:
        assert renderer.texts == {"default": DEFAULT}


def test_a_template_without_tools_says_so(folder, caplog):
    plain = rendered(folder, CHATML, [USER], {})
    assert rendered(folder, CHATML, [USER], {"tools": TOOLS}) == plain
    assert "does not speak of tools, so the model is not told of those that rows have" in caplog.text
