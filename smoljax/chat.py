"""A model's chat templates, and conversations a line each; template.py renders, renderer.py gives it what it sees."""

import logging
from collections.abc import Iterator
from pathlib import Path

from smoljax.errors import DataError
from smoljax.messages import normalized
from smoljax.row_files import NoRow, line_rows

# The templates of the published models, SmolLM2's word for word; SmolLM has no system prompt of its own.
_LOOP, _SYSTEM = "{% for message in messages %}", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_FIRST = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
_BODY = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
_BODY += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML, SMOLLM2 = _LOOP + _BODY, _LOOP + _FIRST + _SYSTEM + "<|im_end|>\n' }}{% endif %}" + _BODY

MORE = "additional_chat_templates/"  # where transformers keeps a second template, NAME.jinja

log = logging.getLogger("smoljax")


def templates(files: dict[str, bytes]) -> dict[str, str]:
    """A model's own templates by their names; {} where it has none.

    As in transformers, chat_template.jinja and additional_chat_templates/NAME.jinja; only where none of them is there,
    tokenizer_config.json's chat_template, which may be a list of named ones.
    """
    from smoljax.hf_config import parse_json

    listed = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json").get("chat_template")
    listed = [] if listed is None else listed
    entries = listed if isinstance(listed, list) else [{"name": "default", "template": listed}]
    named = {str(entry.get("name")): entry.get("template") for entry in entries if isinstance(entry, dict)}
    for text in named.values():
        if not isinstance(text, str):
            raise DataError(f"tokenizer_config.json: chat_template is a {type(text).__name__}, expected text")
    beside = {"default": "chat_template.jinja"} if "chat_template.jinja" in files else {}
    beside |= {name.removeprefix(MORE).removesuffix(".jinja"): name for name in files if name.startswith(MORE)}
    texts = {name: text_of(files, file) for name, file in beside.items()}
    if "default" in texts and named.get("default") not in (None, texts["default"]):
        log.warning("chat_template.jinja and tokenizer_config.json's chat_template differ; the former is used")
    return texts or named


def text_of(files: dict[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8 text (byte {e.start})") from None


def own(files: dict[str, bytes]) -> str | None:
    """The template of conversations without tools; None where the model has none."""
    named = templates(files)
    if named and "default" not in named:
        raise DataError(f"the model has chat templates named {str([*named])[:200]}, expected a 'default'")
    return named.get("default")


def pick(files: dict[str, bytes], config) -> dict[str, str]:
    """What renders a model's conversations: "default", its own or else SmolLM's, and "tool_use" where it has that."""
    found = own(files)
    if found is None:
        new = config.max_position_embeddings == 8192 and config.rope_theta in (100_000, 130_000)
        log.warning("the model has no chat template; %s is used", "SmolLM2's" if new else "SmolLM's, plain ChatML,")
        return {"default": SMOLLM2 if new else CHATML}
    named = templates(files)
    used = {name: text for name, text in named.items() if name in ("default", "tool_use")}
    if len(named) > 1:
        rest = f"; not {str([name for name in named if name not in used])[:200]}" * (len(named) > len(used))
        tools = ", that named 'tool_use' where tools are given" * ("tool_use" in used)
        log.warning("of the chat templates the default is used%s%s", tools, rest)
    return used


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a rendered text. As in transformers, special tokens are special whoever wrote them.

    That is, a user's "<|im_end|>" ends the turn; who serves strangers removes it from their messages.
    """
    return tokenizer.encode(text, add_special_tokens=False).ids


def read_messages(file: str | Path) -> Iterator[dict]:
    """The rows of a JSONL file, each with "messages": where a row has none, its "prompt" is a user's one message."""
    for number, row in line_rows(file):
        try:
            if isinstance(row, NoRow):
                raise DataError(row["error"])
            yield conversation(row)
        except DataError as e:
            raise DataError(f"{file} line {number}: {e}") from None


def conversation(row: dict) -> dict:
    if not {"messages", "prompt"} & set(row):
        raise DataError('expected {"messages": [...]} or {"prompt": text}')
    messages = row.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": row.get("prompt")}]
    normalized(messages)
    return row | {"messages": messages}
