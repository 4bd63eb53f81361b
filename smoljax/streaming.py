"""A row's text as its tokens come: no half character, no beginning of a stop string, and an end where one stands."""

import itertools
from collections.abc import Callable

from tokenizers import Tokenizer

HALF = "\ufffd"  # what a decoder gives for bytes that are no whole character yet
Parts = list[tuple[str, bool]]  # of a text: and whether a part is special tokens'


class Text:
    """An engine's `watch` for one row.

    Special tokens are no part of the text; a stop string may name them, as in transformers, and none reaches across.

    Args:
      stop: strings that end the row where one of them stands in its text, across tokens too.
      say: called with each new piece of text, which never has to be taken back.
    """

    def __init__(self, words: Tokenizer, stop: tuple[str, ...] = (), say: Callable[[str], None] | None = None):
        self.words, self.stop, self.say, self.seen, self.said = words, stop, say, 0, 0
        self.special = {id for id, token in words.get_added_tokens_decoder().items() if token.special}
        self.reach = 4 + 4 * max(map(len, stop), default=0)  # tokens: each has a byte or more, a character at most 4

    def __call__(self, tokens: list[int]) -> int | None:
        """How many tokens stay, where a stop string has come: as few as have it, however many came at a time."""
        first, self.seen = self.seen, len(tokens)
        # A stop string that is new ends in the new tokens. To decode all of 1,024 for every 32 took 4 to 7 ms a row.
        begin = max(0, first - self.reach)
        if self.stop and self.end(self.parts(tokens[begin:])) is not None:
            counts = range(first + 1, len(tokens) + 1)
            return next(n for n in counts if self.end(self.parts(tokens[begin:n])) is not None)
        if self.say:
            parts = self.parts(tokens)
            text = joined(parts).rstrip(HALF)
            held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            self.tell(shown(parts, len(text) - held))
        return None

    def whole(self, tokens: list[int]) -> str:
        """All of a row's text, once it has ended: before the first of the stop strings."""
        parts = self.parts(tokens)
        text = shown(parts, self.end(parts))
        if self.say:
            self.tell(text)
        return text

    def parts(self, tokens: list[int]) -> Parts:
        runs = itertools.groupby(tokens, key=self.special.__contains__)
        return [(self.words.decode([*ids], skip_special_tokens=False), special) for special, ids in runs]

    def end(self, parts: Parts) -> int | None:
        """Where the first of the stop strings begins."""
        text = joined(parts)
        return min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)

    def tell(self, text: str):
        if len(text) > self.said:
            self.say(text[self.said :])
            self.said = len(text)


def joined(parts: Parts) -> str:
    return "".join(text for text, _ in parts)


def shown(parts: Parts, end: int | None) -> str:
    """The parts up to there, without those of special tokens."""
    out, begun = "", 0
    for text, special in parts:
        out += "" if special else text[: None if end is None else max(0, end - begun)]
        begun += len(text)
    return out
