"""Messages as the world writes them, made what a chat template gets from transformers.

Its apply_chat_template (5.24, utils/chat_template_utils.py) drops a message's nulls, which OpenAI's format and Arrow
fill in, and gives reasoning under the names that templates read. Content in parts is joined here, for a model of text.
"""

from smoljax.errors import DataError

TEXT_PARTS = ("text", "input_text", "output_text")  # of OpenAI's chat and responses
REASONING = ("reasoning_content", "thinking", "reasoning")


def normalized(messages, parts: bool = False) -> list[dict]:
    """[{"role": text, "content": text, ...}, ...]; a DataError names the first message that cannot be.

    Content may be absent where the message says something else, such as tool_calls.

    Args:
      parts: whether content that is a list of parts stays one, for a template that reads nothing else.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"a conversation is {str(messages)[:60]}, expected a list of one message or more")
    return [message_of(message, f"message {i}", parts) for i, message in enumerate(messages)]


def message_of(given, name: str, parts: bool) -> dict:
    if not isinstance(given, dict):
        raise DataError(f"{name} is {given!r:.60}, expected an object with role and content")
    message = {key: value for key, value in given.items() if value is not None}
    check_text(message.get("role"), f"{name}: role")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part_text(part, f"{name}: content") for part in content]
        message["content"] = [{"type": "text", "text": text} for text in texts] if parts else "".join(texts)
    elif content is not None or not any(value for key, value in message.items() if key not in ("role", "name")):
        check_text(content, f"{name}: content")
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def part_text(part, name: str) -> str:
    """The text of a part; Arrow fills in the keys of the other kinds with null."""
    if isinstance(part, dict):
        kind = part.get("type")
        if kind not in TEXT_PARTS:
            raise DataError(f"{name} has a part of type {kind!r:.60}, expected 'text': the model reads nothing else")
        part = part.get("text")
    check_text(part, f"{name}: a part's text")
    return part


def check_text(value, name: str):
    if not isinstance(value, str):
        raise DataError(f"{name} is {'absent' if value is None else str(value)[:60]}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as e:  # "\ud800" in JSON
        raise DataError(f"{name} is not Unicode text ({e.reason}); mend it at its source") from None
