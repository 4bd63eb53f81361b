"""docs/long_context/recall.py: what a document of the recall task is, and what counts as recalled."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from docs.long_context import figures, recall
from smoljax import tokenizer
from smoljax.errors import UsageError

WORDS = recall.Words(
    "mark", {f"k{i}": tuple(f"v{i}-{j}" for j in range(4)) for i in range(16)}, tuple(f"f{i}" for i in range(9))
)
NUMBERS = {w: i for i, w in enumerate(["mark", *WORDS.filler, *WORDS.values, *sum(WORDS.values.values(), ())])}


def ids(text: str) -> list[int]:
    return [NUMBERS[word] for word in text.split()]


@pytest.mark.parametrize("seed", range(20))
def test_a_key_is_bound_once_and_asked_once_for_the_same_value(seed):
    pairs = recall.document(60, WORDS, random.Random(seed))
    assert len(pairs) == 60
    said = [pair for pair in pairs if pair[0] in WORDS.values]
    assert len(said) == 32 and set(Counter(said).values()) == {2}  # 16 keys, each with one value, twice
    assert all(value in WORDS.values[key] for key, value in said)
    assert {word for pair in pairs if pair not in said for word in pair} <= set(WORDS.filler)


@pytest.mark.parametrize("seed", range(20))
def test_kept_keys_stand_where_they_should_and_are_not_asked(seed):
    kept = (0, 7, 30, 31, 59)
    pairs = recall.document(60, WORDS, random.Random(seed), kept)
    times = Counter(key for key, _ in pairs)
    assert all(pairs[place][0] in WORDS.values and times[pairs[place][0]] == 1 for place in kept)
    assert sum(n == 2 for key, n in times.items() if key in WORDS.values) == 16 - 5


def test_values_are_even():
    rng, found = random.Random(0), Counter()
    for _ in range(500):
        found.update(int(value[-1]) for key, value in set(recall.document(60, WORDS, rng)) if key in WORDS.values)
    expected = 500 * 16 / 4  # four values: 3 degrees of freedom, 16.3 is exceeded once in 1,000
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 16.3 and sum(found.values()) == 8000


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="17 depths need as many keys, found 16"):
        recall.document(60, WORDS, random.Random(0), range(17))
    with pytest.raises(UsageError, match="a multiple of 16 tokens, not 120"):
        recall.row(120, WORDS, random.Random(0))
    with pytest.raises(UsageError, match="16 tokens are too few for 8 depths"):
        recall.probe(16, 8, 1, WORDS, ids, seed=0)


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
    words, rng = [*NUMBERS], random.Random(0)
    guesses = np.zeros_like(probe.tokens)
    for row, asked, tokens in zip(guesses, probe.asked, probe.tokens, strict=True):
        row[asked] = [NUMBERS[rng.choice(WORDS.values[words[key]])] for key in tokens[asked]]
    found = np.array(recall.accuracy(guesses, probe, 8))
    assert abs(found - 0.25).max() < 4 * (0.25 * 0.75 / 400) ** 0.5  # four standard errors


def test_words_are_one_token_each_and_differ(tmp_path):
    names = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]
    words = tokenizer.train([" ".join(["", *names]) * 3], 428, tmp_path / "tokenizer.json")
    some = recall.choose_words(words, 5, 8, 20)
    every = [some.marker, *some.filler, *some.values, *sum(some.values.values(), ())]
    assert len(set(every)) == 1 + 20 + 5 + 5 * 8 and some == recall.choose_words(words, 5, 8, 20)
    assert all(len(words.encode(f" {word}").ids) == 1 for word in every)
    pairs = recall.document(30, some, random.Random(0))
    assert len(words.encode(recall.text(pairs, some)).ids) == 61
    with pytest.raises(UsageError, match="lower-case words of one token, expected 1065"):
        recall.choose_words(words, 100, 9, 64)


def test_a_row_of_several_documents_is_as_long(tmp_path):
    lengths = set()
    for seed in range(12):
        row = recall.row(64, WORDS, random.Random(seed))
        documents = row.split(tokenizer.EOS)
        lengths.add(len(documents))
        assert sum(len(ids(document)) + 1 for document in documents) == 64  # each with its end
        assert all(document.startswith(" mark ") for document in documents)
    assert lengths == {1, 2, 4, 8}


def test_the_report_says_what_was_measured():
    folder = Path(recall.__file__).parent
    results = json.loads((folder / "results.json").read_text())
    assert figures.tables(results) + "\n" in (folder / "README.md").read_text()
