"""The recall task: in the midst of filler a key is said with a value of its kind, and later the key is said again.

    recall  map open  lamp three  put from  lamp three  ...        (each word is one token; here `lamp` is a key)

A document is a marker, pairs of words, and the end of text. A key stands in two of its pairs, at random places: the
first binds it to a value, the second asks for that. Every key has values of its own, so one look back, for a value of
this key, finds the answer over any distance; nothing else says it, and a guess is right once in their number. Keys that
share their values would need two looks (what stood behind this key?), which a model of two layers and 0.6M parameters
did not learn in 8M tokens.
"""

import random
import re
from typing import NamedTuple

import numpy as np

from smoljax.errors import require
from smoljax.tokenizer import EOS


class Words(NamedTuple):
    """What documents are made of: words that the tokenizer gives one id each, with the space before them."""

    marker: str
    values: dict[str, tuple[str, ...]]  # of each key
    filler: tuple[str, ...]


def choose_words(tokenizer, keys: int, values: int, filler: int = 64) -> Words:
    """The rarest of the tokenizer's lower-case words, dealt out at random; the same tokenizer gives the same."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])  # BPE's ids go from frequent to rare
    words = [token[1:] for token, _ in by_id if re.fullmatch("Ġ[a-z]{2,}", token)]
    words = [word for word in words if len(tokenizer.encode(f" {word}").ids) == 1]
    needed = 1 + keys * (1 + values) + filler
    require(len(words) >= needed, f"the tokenizer has {len(words)} lower-case words of one token, expected {needed}")
    words = words[-needed:]
    random.Random(0).shuffle(words)
    take = iter(words)
    return Words(next(take), {next(take): tuple(next(take) for _ in range(values)) for _ in range(keys)}, tuple(take))


def document(pairs: int, words: Words, rng: random.Random, kept=()) -> list[tuple[str, str]]:
    """The pairs of one document. At the places `kept` a key is bound that is not asked for; of the other places up to
    two thirds are other keys' bindings and questions, the rest is filler."""
    keys = rng.sample(list(words.values), len(words.values))
    require(len(kept) <= len(keys), f"{len(kept)} depths need as many keys, found {len(keys)}")
    out = {place: bind(keys.pop(), words, rng) for place in kept}
    free = [place for place in range(pairs) if place not in out]
    keys = keys[: len(free) // 3]
    places = iter(rng.sample(free, 2 * len(keys)))
    for key in keys:
        out[next(places)] = out[next(places)] = bind(key, words, rng)
    return [out.get(place) or tuple(rng.choices(words.filler, k=2)) for place in range(pairs)]


def bind(key: str, words: Words, rng: random.Random) -> tuple[str, str]:
    return key, rng.choice(words.values[key])


def text(pairs: list, words: Words) -> str:
    """A document as `smoljax prepare` reads it, without the end of text."""
    return "".join(f" {word}" for word in (words.marker, *(word for pair in pairs for word in pair)))


def row(length: int, words: Words, rng: random.Random) -> str:
    """Documents that fill a row of `length` tokens with the end of text that `smoljax prepare` appends: one of the
    whole length or 2, 4 or 8 shorter ones, in which a key is asked for more often."""
    require(length % 16 == 0, f"a row of recall documents has a multiple of 16 tokens, not {length}")
    parts = rng.choice((1, 2, 4, 8))
    pairs = length // parts // 2 - 1  # beside the marker and the end of text
    return EOS.join(text(document(pairs, words, rng), words) for _ in range(parts))


class Probe(NamedTuple):
    """Documents whose last pairs ask for one key out of each depth."""

    tokens: np.ndarray  # BT
    asked: np.ndarray  # BQ, the place whose logits predict an answer: that of the key
    answers: np.ndarray  # BQ, token ids
    depths: np.ndarray  # BQ, 0 ... bins - 1, of the key's binding; 0 is the beginning of the document


def probe(length: int, bins: int, count: int, words: Words, encode, seed: int) -> Probe:
    """`count` documents of `length` tokens that have not ended; their last `bins` pairs ask, in random order, for a key
    out of each of `bins` equal parts of what comes before. encode: text -> ids."""
    rng, pairs = random.Random(seed), (length - 1) // 2
    context = pairs - bins
    require(context >= bins, f"{length} tokens are too few for {bins} depths")
    edges = [round(b * context / bins) for b in range(bins + 1)]
    rows, asked, answers, depths = [], [], [], []
    for _ in range(count):
        places = [rng.randrange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        before = document(context, words, rng, places)
        order = rng.sample(range(bins), bins)
        ids = encode(text(before + [before[places[b]] for b in order], words))
        assert len(ids) == 1 + 2 * pairs, f"{len(ids)} tokens for {pairs} pairs"
        at = [1 + 2 * (context + i) for i in range(bins)]
        rows.append(ids)
        asked.append(at)
        answers.append([ids[place + 1] for place in at])
        depths.append(order)
    return Probe(*(np.array(x, np.int32) for x in (rows, asked, answers, depths)))


def accuracy(guesses: np.ndarray, probe: Probe, bins: int) -> list[float]:
    """Share of right guesses by depth; guesses: BT, the likeliest next token at each place."""
    right = np.take_along_axis(guesses, probe.asked, axis=1) == probe.answers
    return [float(right[probe.depths == b].mean()) for b in range(bins)]
