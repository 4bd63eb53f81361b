"""A row's text as its tokens come: no half character, no beginning of a stop string, and an end where one stands."""

from collections.abc import Callable

from tokenizers import Tokenizer

HALF = "\ufffd"  # what a decoder gives for bytes that are no whole character yet


class Text:
    """An engine's `watch` for one row.

    Args:
      stop: strings that end the row where one of them stands in its text, across tokens too.
      say: called with each new piece of text, which never has to be taken back.
    """

    def __init__(self, words: Tokenizer, stop: tuple[str, ...] = (), say: Callable[[str], None] | None = None):
        self.words, self.stop, self.say, self.seen, self.said = words, stop, say, 0, 0

    def __call__(self, tokens: list[int]) -> int | None:
        """How many tokens stay, where a stop string has come: as few as have it, however many came at a time."""
        text, first = self.words.decode(tokens), self.seen
        self.seen = len(tokens)
        if any(s in text for s in self.stop):
            counts = range(first + 1, len(tokens) + 1)
            return next(n for n in counts if any(s in self.words.decode(tokens[:n]) for s in self.stop))
        if self.say:
            text = text.rstrip(HALF)
            held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            self.tell(text[: len(text) - held])
        return None

    def whole(self, tokens: list[int]) -> str:
        """All of a row's text, once it has ended: before the first of the stop strings."""
        text = self.words.decode(tokens)
        text = text[: min((at for s in self.stop if (at := text.find(s)) >= 0), default=len(text))]
        if self.say:
            self.tell(text)
        return text

    def tell(self, text: str):
        if len(text) > self.said:
            self.say(text[self.said :])
            self.said = len(text)
