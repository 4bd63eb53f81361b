"""Messages to text by a chat template, and to ids; template.py renders."""

import logging
from collections.abc import Iterator
from pathlib import Path

from smoljax.errors import DataError
from smoljax.row_files import NoRow, line_rows
from smoljax.template import check_messages

# The templates of the published models, SmolLM2's word for word; SmolLM has no system prompt of its own.
_LOOP, _SYSTEM = "{% for message in messages %}", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_FIRST = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
_BODY = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
_BODY += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML, SMOLLM2 = _LOOP + _BODY, _LOOP + _FIRST + _SYSTEM + "<|im_end|>\n' }}{% endif %}" + _BODY

log = logging.getLogger("smoljax")


def own(files: dict[str, bytes]) -> str | None:
    """The template in a model's files: chat_template.jinja, else tokenizer_config.json's; None where there is none."""
    from smoljax.hf_config import parse_json

    found = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        if "default" not in named:
            raise DataError(
                f"tokenizer_config.json has chat templates named {str([*named])[:200]}, expected a 'default'"
            )
        found = named.pop("default")
        if named:
            log.warning("of the chat templates the default is used; not %s", str([*named])[:200])
    if not isinstance(found, str | None):
        raise DataError(f"tokenizer_config.json: chat_template is a {type(found).__name__}, expected text")
    if (own := files.get("chat_template.jinja")) is None:
        return found
    try:
        own = own.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"chat_template.jinja is not UTF-8 text (byte {e.start})") from None
    if found not in (None, own):
        log.warning("chat_template.jinja and tokenizer_config.json's chat_template differ; the former is used")
    return own


def pick(files: dict[str, bytes], config) -> str:
    """The model's own template, else SmolLM's."""
    if (found := own(files)) is not None:
        return found
    new = config.max_position_embeddings == 8192 and config.rope_theta in (100_000, 130_000)
    log.warning("the model has no chat template; %s is used", "SmolLM2's" if new else "SmolLM's, plain ChatML,")
    return SMOLLM2 if new else CHATML


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
    check_messages(messages)
    return row | {"messages": messages}
