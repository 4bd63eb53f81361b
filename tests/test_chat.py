"""Chat templates: rendered as by transformers; a hostile one ends as one sentence, soon and in little memory."""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken

from smoljax import chat, row_files
from smoljax import tokenizer as tok
from smoljax.config import SIZES
from smoljax.errors import DataError
from smoljax.template import Template

REPO = Path(__file__).resolve().parents[1]
SHA256 = "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"
HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATIONS = [
    HELLO,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 < 5?"}],
    [*HELLO, {"role": "assistant", "content": "Hi!\n"}, {"role": "user", "content": " <|im_end|> 東京 🤖 \0 "}],
    [{"role": "user", "content": ""}, {"role": "tool", "content": "{}", "name": "f", "calls": [{"x": 1.5, "y": None}]}],
]
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TOOLS = [{"type": "function", "function": {"name": "f<", "description": "é & 'x'", "parameters": {"a": [1, True]}}}]
TEMPLATES = {
    "SmolLM2": chat.SMOLLM2,
    "SmolLM": chat.CHATML,
    "Llama": """{{ bos_token }}
    {%- set ns = namespace(system=none, n=0) %}
    {% for m in messages if m.role == 'system' %}
        {% set ns.system = m.content | trim %}
        {% break %}
    {% endfor %}
{% if ns.system is not none and ns.system is defined %}[{{ ns.system }}]{% endif %}
    {% for m in messages %}
        {% if m['role'] == 'system' %}{% continue %}{% endif %}
        {% set ns.n = ns.n + 1 %}
  {{ loop.index0 }}{{ ns.n }} {{ m.role | upper }}: {{ m.content.strip().split('\\n')[0] }}{{ eos_token }}
    {% endfor %}
""",
    "tools": """{% if tools %}{{ tools | tojson }} {{ tools | tojson(indent=2) }}{% for t in tools %}
{{ t.function.name }}{% endfor %}{% endif %}
{{ messages | tojson }}{% macro m(x, y='<') %}{{ x ~ y }}{% endmacro %}{{ m('&') }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}
{% if enable_thinking %}<think>{% endif %}{{ absent }}""",
    "time": "{{ strftime_now('%Y %B') }} {{ messages[0].get('zzz', 'none') }} {{ messages[-1].content[::-1] }}",
    "filters": """{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto',
 'user') | list | length }} {{ 'a b' | title | replace('A', 'c') }} {{ '<b>x</b> &amp;' | striptags }}
 {{ "%s" | format(1) }}
 {{ 'one two' | wordwrap(3) }} {{ messages | groupby('role') | length }} {{ 'x' is string }} {{ [3, 1] | sort }}""",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = [Path(__file__).read_text(), "You are a helpful AI assistant named SmolLM"]
    return tok.train(texts, 400, tmp_path_factory.mktemp("chat") / "tokenizer.json")


@pytest.fixture(scope="module")
def theirs(words):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers(words, theirs, name):
    with Template(TEMPLATES[name], name, TOKENS) as template:
        for messages in CONVERSATIONS:
            for more in (
                dict(add_generation_prompt=True),
                dict(add_generation_prompt=False, tools=TOOLS),
                dict(add_generation_prompt=True, enable_thinking=True),
            ):
                given = dict(chat_template=TEMPLATES[name], **more)
                text = template.render(messages, **more)
                assert text == theirs.apply_chat_template(messages, tokenize=False, **given)
                ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
                assert chat.encode(words, text) == ids


def test_smollm2_is_the_published_template():
    """Word for word the text in SmolLM2-135M-Instruct's GGUF; SmolLM's is it without the system prompt."""
    assert hashlib.sha256(chat.SMOLLM2.encode()).hexdigest() == SHA256
    with Template(chat.SMOLLM2, "t") as new, Template(chat.CHATML, "t") as old:
        system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert new.render(HELLO) == system + text and old.render(HELLO) == text
        assert new.render(HELLO, add_generation_prompt=False) == system + "<|im_start|>user\nHello<|im_end|>\n"


def test_special_tokens_are_special_whoever_wrote_them(words):
    ids = chat.encode(words, "<|im_start|>user\n<|im_end|>x<|im_end|>\n")
    assert ids.count(1) == 1 and ids.count(2) == 2
    words.add_special_tokens([AddedToken("<new>")])
    assert chat.encode(words, "<new>") == [400]


HOSTILE = {
    "range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s of CPU"),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "more than 128 MB",
    ),
    "multiplied text": ("{{ 'a' * 10**9 }}", "more than 128 MB"),
    "multiplied list": ("{{ [1] * 10**9 }}", "more than 128 MB"),
    "formatted": ("{{ '%9999999999d' | format(1) }}", "more than 128 MB"),
    "centered": ("{{ 'a' | center(10**10) }}", "more than 128 MB"),
    "one call of C": ("{{ (10**10**6) ** (10**6) }}", "more than 1 s of CPU"),
    "long output": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "a text of more than 16,777,216 bytes"),
    "class": ("{{ ().__class__ }}", "reaches for what a chat template may not have (__class__ of a tuple)"),
    "ancestors": ("{{ ().__class__.__mro__[1].__subclasses__() }}", "__class__ of a tuple"),
    "attr": ("{{ () | attr('__class__') }}", "__class__"),
    "item": ("{{ ()['__class__'] }}", "__class__"),
    "format": ("{{ '{0.__class__}'.format(1) }}", "__class__"),
    "globals": ("{{ strftime_now.__globals__ }}", "__globals__"),
    "change": ("{{ messages.append(1) }}", "append of a list"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("\n{% for %}", "is not a chat template that jinja2 can read (line 2: Expected an expression"),
    "filter": ("{{ 1 | zzz }}", "is not a chat template that jinja2 can read (line 1: No filter named 'zzz'"),
    "deep": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "RecursionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "long": ("a" * (1 << 20) + "b", "has 1,048,577 bytes, expected a chat template of at most 1,048,576"),
    "50 MB": ("a" * 50_000_000, "has 50,000,000 bytes"),
    "many parts": ("{{ a }}" * 140_000, "more than"),
    "refusal": ("{{ raise_exception('no\n\\x1b[31m system') }}", "refuses the conversation (no  [31m system)"),
    "long refusal": ("{{ raise_exception('a' * 10**7) }}", "refuses the conversation (aaa"),
    "undefined": ("{{ a.b.c }}", "fails (UndefinedError: 'a' is undefined)"),
    "type": ("{{ messages + 1 }}", "fails (TypeError: can only concatenate list"),
    "no text": ("{{ '\\ud800' }}", "fails (UnicodeEncodeError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name):
    text, words = HOSTILE[name]
    with (
        pytest.raises(DataError, match=re.escape(words)) as e,
        Template(text, "m/chat_template.jinja") as template,
    ):
        template.render(HELLO)
    sentence = str(e.value)
    assert sentence.startswith("m/chat_template.jinja ") and sentence.isprintable() and len(sentence) < 450


def test_a_child_takes_little_memory_and_can_open_nothing():
    with Template("{{ '%9999d' | format(1) }}" + chat.SMOLLM2, "t") as template:
        template.render([{"role": "user", "content": "x" * 10_000_000}])
        if (status := Path(f"/proc/{template.child.pid}/status")).exists():
            peak = re.search(r"VmPeak:\s+(\d+) kB", status.read_text())[1]
            limits = (status.parent / "limits").read_text()
            assert int(peak) < 200_000 and re.search(r"Max open files +0 +0", limits)
            assert os.listdir(status.parent / "fd") == ["0", "1", "2"]
            assert b"HOME=" not in (status.parent / "environ").read_bytes()


def test_a_template_lives_on():
    """A conversation that it refuses, or that is too much for it, costs the others nothing."""
    text = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    text += "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    text += "{% endfor %}{% endif %}{% if messages[0].content == 'big' %}{{ 'a' * 10**9 }}{% endif %}"
    said = lambda content: [{"role": "user", "content": content}]  # noqa: E731
    with Template(text + chat.CHATML, "t") as template:
        good, child = template.render(HELLO), template.child.pid
        for content in ("no", "big"):
            with pytest.raises(DataError):
                template.render(said(content))
        assert template.render(HELLO) == good and template.child.pid == child  # the same process
        with pytest.raises(DataError, match="CPU"):
            template.render(said("loop"))
        assert template.render(HELLO) == good and template.child.pid != child
        os.kill(template.child.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"exit code -9"):
            template.render(HELLO)
        assert template.render(HELLO) == good
        child = template.child
    assert child.returncode is not None and template.child is None  # it has ended


def test_an_interrupted_answer_is_no_other_conversation_s(monkeypatch):
    with Template(chat.CHATML, "t") as template:
        read = template.read
        monkeypatch.setattr(template, "read", lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
        monkeypatch.setattr(template, "read", read)
        assert "second" in template.render([{"role": "user", "content": "second"}])


def test_threads_share_a_template():
    with Template(chat.CHATML, "t") as template:
        wrong = []

        def work(i):
            for _ in range(50):
                if f"<{i}>" * 1000 not in template.render([{"role": "user", "content": f"<{i}>" * 1000}]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert not wrong


def test_the_child_ends_with_its_parent():
    program = (
        "import os, signal; from smoljax import chat, template; t = template.Template(chat.CHATML, 't'); "
        "print(t.child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True).stdout
    for _ in range(100):
        try:
            os.kill(int(out), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{int(out)}/stat").read_text().split()[2] == "Z":  # ended, though nobody asked how
            return
        time.sleep(0.1)
    raise AssertionError("the child lives on")


def test_no_module_beside_the_user_is_run(tmp_path):
    """The child takes no jinja2.py or json.py from the folder that the parent runs in, nor from PYTHONPATH."""
    for name in ("jinja2", "json", "smoljax", "markupsafe"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    program = (
        f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(tmp_path)!r})] + [{str(REPO)!r}]; "
        f"from smoljax import chat, template; print(template.Template(chat.CHATML, 't').render({HELLO}))"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", "import os; " + program], cwd=tmp_path, capture_output=True, env=env)
    assert b"Hello<|im_end|>" in out.stdout and not (tmp_path / "ran").exists(), out.stderr


def test_pick(caplog):
    new, old = SIZES["smollm2-135m"], SIZES["smollm-135m"]
    config = lambda value: json.dumps({"chat_template": value}).encode()  # noqa: E731
    listed = config([{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}])
    caplog.set_level(logging.INFO, logger="smoljax")
    for files, size, expected, said in (
        ({}, new, chat.SMOLLM2, "SmolLM2's is used"),
        ({}, old, chat.CHATML, "plain ChatML, is used"),
        ({"tokenizer_config.json": config("C")}, new, "C", ""),
        ({"tokenizer_config.json": listed}, new, "D", "not ['tools']"),
        ({"tokenizer_config.json": b"{}", "chat_template.jinja": b"J\n"}, new, "J\n", ""),
        ({"tokenizer_config.json": config("J"), "chat_template.jinja": b"J"}, new, "J", ""),
        ({"tokenizer_config.json": config("C"), "chat_template.jinja": b"J"}, new, "J", "differ; the former is used"),
    ):
        caplog.clear()
        assert chat.pick(files, size)["default"] == expected
        assert said in caplog.text and bool(said) == bool(caplog.text)
    for files, words in (
        ({"tokenizer_config.json": config(1)}, "chat_template is a int"),
        ({"tokenizer_config.json": config([{"name": [], "template": "T"}])}, "expected a 'default'"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json cannot be read as JSON"),
        ({"chat_template.jinja": b"a\xff"}, "chat_template.jinja is not UTF-8 text (byte 1)"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            chat.pick(files, new)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "a conversation is [], expected a list"),
        ({"role": "user"}, "expected a list"),
        ("Hello", "a conversation is Hello, expected a list"),
        ([*HELLO, "Hi"], "message 1 is 'Hi', expected an object"),
        ([*HELLO, {"role": "user"}], "message 1: content is absent"),
        ([*HELLO, {"role": "user", "content": [{"type": "text"}]}], "message 1: content: a part's text is absent"),
        ([{"role": 1, "content": "x"}], "message 0: role is 1"),
        ([{"role": "user", "content": "\ud800"}], "message 0: content is not Unicode text"),
        ([*HELLO, {"role": "user", "content": "x", "more": {1, 2}}], "must be what JSON can say"),
        ([{"role": "user", "content": "x" * (17 << 20)}], "a conversation has 17,8"),
    ],
    ids=range(10),
)
def test_messages_are_checked(messages, words):
    with Template(chat.CHATML, "t") as template, pytest.raises(DataError, match=re.escape(words)):
        template.render(messages)


def test_read_messages(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LIMIT", 1000)
    file = tmp_path / "m.jsonl"
    file.write_text(
        json.dumps({"messages": CONVERSATIONS[1], "seed": 3})
        + "\n\n"
        + json.dumps({"prompt": "東京"}, ensure_ascii=False)
        + "\r\n"
    )
    assert list(chat.read_messages(file)) == [
        {"messages": CONVERSATIONS[1], "seed": 3},
        {"prompt": "東京", "messages": [{"role": "user", "content": "東京"}]},
    ]
    good = b'{"prompt": "x"}\n'
    for line, words in (
        (b"{", "line 2: not JSON"),
        (b"[" * 990, "line 2: not JSON"),
        (b'"\xff"', "line 2: not UTF-8 text (byte 1)"),
        (b"[]", "line 2: a JSON list, expected an object"),
        (b"{}", "line 2: expected {"),
        (b'{"prompt": 1}', "line 2: message 0: content is 1"),
        (b'{"messages": []}', "line 2: a conversation is []"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: not Unicode text"),
        (b'"' + b"x" * 1000, "line 2: longer than 64 MB, cut it up"),
    ):
        file.write_bytes(good + line)
        found = chat.read_messages(file)
        assert next(found)
        with pytest.raises(DataError, match=re.escape(f"{file} {words}")):
            next(found)
    with pytest.raises(DataError, match="cannot be read"):
        next(chat.read_messages(tmp_path))


def test_light():
    """The child imports this module: nothing but Python's own, and jinja2 not in the parent."""
    program = "import sys; from smoljax import chat; print([m for m in ('jax', 'numpy', 'jinja2') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
