"""docs/long_context/recall.py: what a document of the recall task is, and what counts as recalled."""

import random
from collections import Counter

import numpy as np
import pytest

from docs.long_context import recall
from smoljax import tokenizer
from smoljax.errors import UsageError

WORDS = recall.Words("mark", tuple(f"k{i}" for i in range(40)), ("red", "green", "blue", "white"))


def ids(text: str) -> list[int]:
    """A number a word: 0 the marker, then the keys, then the values."""
    number = {word: i for i, word in enumerate([WORDS.marker, *WORDS.keys, *WORDS.values])}
    return [number[word] for word in text.split()]


@pytest.mark.parametrize("seed", range(20))
def test_a_key_is_bound_once_and_asked_at_most_once_for_the_same_value(seed):
    pairs = recall.document(60, WORDS, random.Random(seed))
    assert len(pairs) == 60 and {value for _, value in pairs} <= set(WORDS.values)
    assert max(Counter(key for key, _ in pairs).values()) == 2  # at most, and some are asked
    assert len(set(pairs)) == len({key for key, _ in pairs})  # a key has one value


@pytest.mark.parametrize("seed", range(20))
def test_kept_keys_are_fresh_and_never_asked_even_when_keys_run_out(seed):
    kept = frozenset((0, 7, 30, 71, 75))
    pairs = recall.document(75 + 1, recall.Words("m", WORDS.keys + ("k40",), WORDS.values), random.Random(seed), kept)
    times = Counter(key for key, _ in pairs)
    assert all(times[pairs[place][0]] == 1 for place in kept)


def test_the_first_value_cannot_be_known_and_values_are_even():
    pairs = recall.document(20_000, WORDS._replace(keys=tuple(map(str, range(10_000)))), random.Random(0))
    bound = Counter({key: value for key, value in pairs}.values())
    expected = sum(bound.values()) / 4  # four values: 3 degrees of freedom, 16.3 is exceeded once in 1,000
    assert sum((n - expected) ** 2 / expected for n in bound.values()) < 16.3


def test_too_few_keys_and_odd_lengths_are_refused():
    with pytest.raises(UsageError, match="82 pairs need 41 keys, found 40"):
        recall.document(82, WORDS, random.Random(0))
    with pytest.raises(UsageError, match="even number of tokens from 4 on, not 127"):
        recall.pairs_in(127)
    with pytest.raises(UsageError, match="16 tokens are too few for 8 depths"):
        recall.probe(16, 8, 1, WORDS, ids, seed=0)


def test_a_document_with_its_end_fills_a_row():
    pairs = recall.document(recall.pairs_in(128), WORDS, random.Random(0))
    assert len(ids(recall.text(pairs, WORDS))) + 1 == 128


@pytest.mark.parametrize(("length", "bins"), [(64, 8), (128, 8), (65, 5), (34, 8)])
def test_a_probe_asks_once_out_of_each_depth(length, bins):
    probe = recall.probe(length, bins, 30, WORDS, ids, seed=3)
    context = (length - 1) // 2 - bins
    assert probe.tokens.shape == (30, 1 + 2 * ((length - 1) // 2))
    for row, asked, answers, depths in zip(*probe, strict=True):
        assert sorted(depths) == list(range(bins))
        for at, answer, depth in zip(asked, answers, depths, strict=True):
            places = np.flatnonzero(row == row[at])
            assert len(places) == 2 and places[1] == at  # bound once, asked here
            assert row[places[0] + 1] == row[at + 1] == answer
            pair = (places[0] - 1) // 2  # bins are equal to within the rounding of their edges
            assert round(depth * context / bins) <= pair < round((depth + 1) * context / bins)


def test_accuracy_is_by_depth():
    probe = recall.Probe(
        np.zeros((2, 6), int), np.array([[1, 3], [3, 5]]), np.array([[7, 8], [9, 7]]), np.array([[0, 1], [1, 0]])
    )
    guesses = np.array([[0, 7, 0, 1, 0, 0], [0, 0, 0, 9, 0, 1]])
    # depth 0: row 0 at place 1 is right (7), row 1 at place 5 is wrong; depth 1: wrong, then right
    assert recall.accuracy(guesses, probe, 2) == [0.5, 0.5]
    assert recall.accuracy(np.array([[0, 7, 0, 8, 0, 0], [0, 0, 0, 1, 0, 7]]), probe, 2) == [1.0, 0.5]


def test_guessing_scores_chance():
    probe = recall.probe(80, 8, 400, WORDS, ids, seed=0)
    guesses = np.random.default_rng(0).integers(41, 45, probe.tokens.shape)  # one of the four values
    found = np.array(recall.accuracy(guesses, probe, 8))
    assert abs(found - 0.25).max() < 4 * (0.25 * 0.75 / 400) ** 0.5  # four standard errors


def test_words_are_one_token_each_and_differ(tmp_path):
    names = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]
    words = tokenizer.train([" ".join(["", *names]) * 3], 428, tmp_path / "tokenizer.json")
    some = recall.choose_words(words, 40, 8)
    every = [some.marker, *some.keys, *some.values]
    assert len(set(every)) == 49 and some == recall.choose_words(words, 40, 8)
    assert all(len(words.encode(f" {word}").ids) == 1 for word in every)
    pairs = recall.document(30, some, random.Random(0))
    assert len(words.encode(recall.text(pairs, some)).ids) == 61
    with pytest.raises(UsageError, match="lower-case words of one token, expected 1009"):
        recall.choose_words(words, 1000, 8)


def test_a_row_of_several_documents_is_as_long(tmp_path):
    lengths = set()
    for seed in range(12):
        row = recall.row(64, WORDS, random.Random(seed))
        documents = row.split(tokenizer.EOS)
        lengths.add(len(documents))
        assert sum(len(ids(document)) + 1 for document in documents) == 64  # each with its end
        assert all(document.startswith(" mark ") for document in documents)
    assert lengths == {1, 2, 4, 8}
