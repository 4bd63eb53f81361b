"""A row's conversation to the text that the model continues, by the model's own templates."""

import contextlib
import functools
import logging

from smoljax import chat, special_tokens
from smoljax.errors import DataError
from smoljax.special_tokens import TURN_ENDS
from smoljax.template import NEEDLE, Template

# apply_chat_template's own arguments, which it does not give to a template.
ITS_OWN = {"chat_template", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation"}
ITS_OWN |= {"max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}

log = logging.getLogger("smoljax")


class Renderer:
    """A model's templates, each in a process of its own, and the special tokens that they see. Close it.

    Args:
      loaded: weights.Weights, with a tokenizer.
    """

    def __init__(self, loaded):
        self.words = loaded.tokenizer
        self.texts = chat.pick(loaded.files, loaded.config)
        self.tokens = special_tokens.seen(loaded.files, loaded.config, self.words)
        self.name = f"the chat template of {loaded.source}"
        self.stack = contextlib.ExitStack()
        self.default = self.stack.enter_context(Template(self.texts["default"], self.name, self.tokens))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    def at(self, now: float):
        """The time that templates are told, seconds since 1970: of a job that goes on, when it began."""
        self.default.now = now

    @functools.cached_property
    def tool_use(self) -> Template:
        """The template of conversations with tools, which may be one of its own."""
        text = self.texts.get("tool_use", self.texts["default"])
        if "tools" not in text:
            log.warning("%s does not speak of tools, so the model is not told of those that rows have", self.name)
        if "tool_use" not in self.texts:
            return self.default
        return self.stack.enter_context(Template(text, f"{self.name} (tool_use)", self.tokens))

    def ids(self, messages: list[dict], given: dict) -> list[int]:
        """A conversation's ids; `given` are a row's other keys: tools, documents and chat_template_kwargs count."""
        variables = {key: check_list(given, key) for key in ("tools", "documents") if given.get(key) is not None}
        more = given.get("chat_template_kwargs") or {}
        if not isinstance(more, dict):
            raise DataError(f"chat_template_kwargs is {more!r:.60}, expected an object")
        if odd := sorted({"messages", *ITS_OWN, *variables} & set(more)):
            raise DataError(f"chat_template_kwargs has {odd[0]!r}, which is no variable of a template; remove it")
        variables |= {key: check_list(more, key) for key in ("tools", "documents") if more.get(key) is not None}
        template = self.default if variables.get("tools") is None else self.tool_use
        template.now = self.default.now
        ids = chat.encode(self.words, template.render(messages, **(more | variables)))
        if not ids:
            raise DataError(f"{template.name} gives no text for it")
        return ids

    def turn_ends(self) -> tuple[int, ...]:
        """The ids that end an answer: of the token that a template writes behind one, and TURN_ENDS in its text."""
        special, found = {token.content: id for id, token in self.words.get_added_tokens_decoder().items()}, []
        asked, answered = {"role": "user", "content": "?"}, {"role": "assistant", "content": NEEDLE}
        for name, text in self.texts.items():
            found += [id for token, id in special.items() if token in TURN_ENDS and token in text]
            template = self.default if name == "default" else self.tool_use
            for messages in ([asked, answered], [asked, answered, asked]):  # some end the last alone, some the others
                with contextlib.suppress(DataError):  # it may refuse them: messages of no sense
                    given = {"add_generation_prompt": False} | ({} if name == "default" else {"tools": []})
                    behind = template.render(messages, **given).rpartition(NEEDLE)[2].lstrip()
                    longest = max((token for token in special if behind.startswith(token)), key=len, default=None)
                    found += [] if longest is None else [special[longest]]
        return tuple(dict.fromkeys(found))


def check_list(given: dict, key: str) -> list[dict]:
    value = given[key]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{key} is {value!r:.60}, expected a list of objects")
    return value
