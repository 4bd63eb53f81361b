"""sampling.py: each step against transformers' or arithmetic, the distribution, a row's own noise, what is refused."""

import functools
import math

import jax
import numpy as np
import pytest

from smoljax.errors import UsageError
from smoljax.sampling import DAMAGED, Sampling, filtered, logprobs, processed, sample

V, B = 50, 64
choose = jax.jit(sample, static_argnames=("how", "eos"))


def draw(logits, how, seeds=None, n=0, **more):
    """A token a row, the rows' seeds 0, 1, ... unless given."""
    rows = len(logits)
    seeds = np.arange(rows) if seeds is None else seeds
    return np.asarray(choose(logits, np.asarray(seeds, np.uint32), np.full(rows, n, np.int32), how=how, **more))


# ---- the distribution


def reference(logits, temperature, top_k, top_p, min_p):
    """As Hugging Face's warpers define it: temperature, the k likeliest, the nucleus of those, min-p."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    kept = p[order] / p[order].sum()
    if top_p is not None:
        kept = kept[: np.searchsorted(np.cumsum(kept), top_p) + 1]
    if min_p is not None:
        kept = kept[kept >= min_p * kept[0]]
    out = np.zeros_like(p)
    out[order[: len(kept)]] = kept / kept.sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [
        (1.0, None, None, None),
        (0.5, None, None, None),
        (1.0, 3, None, None),
        (1.0, None, 0.7, None),
        (2.0, 6, 0.8, None),
        (1.0, 1, None, None),
        (1.0, None, 1e-9, None),
        (1.5, 7, 0.95, 0.3),
    ],
)
def test_sampling_distribution(temperature, top_k, top_p, min_p):
    logits = np.array([0.1, 2.0, -1.0, 1.2, 0.7, -3.0, 1.9, 0.0], np.float32)
    expected, n = reference(logits, temperature, top_k, top_p, min_p), 40_000
    found = np.bincount(draw(np.tile(logits, (n, 1)), Sampling(temperature, top_k, top_p, min_p), n=3), minlength=8) / n
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / n))


def test_each_new_token_has_noise_of_its_own():
    """Over n as over seeds: independent draws of the same distribution."""
    logits, n = np.log(np.array([[0.5, 0.3, 0.2]], np.float32)), 4000
    ids = choose(np.tile(logits, (n, 1)), np.full(n, 7, np.uint32), np.arange(n, dtype=np.int32), how=Sampling(1.0))
    np.testing.assert_allclose(np.bincount(ids, minlength=3) / n, [0.5, 0.3, 0.2], atol=0.04)
    pairs = np.bincount(np.asarray(ids)[1:] * 3 + np.asarray(ids)[:-1], minlength=9).reshape(3, 3) / (n - 1)
    np.testing.assert_allclose(pairs, np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]), atol=0.04)


def test_a_seed_and_n_give_one_token_in_any_batch():
    logits = np.random.default_rng(0).normal(size=(8, V)).astype(np.float32)
    seeds, n = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 5, 5, 0], np.uint32), np.arange(8, dtype=np.int32) // 2
    how = Sampling(1.3, top_k=40, top_p=0.95, min_p=0.01)
    together = np.asarray(choose(logits, seeds, n, how=how))
    order = np.random.default_rng(1).permutation(8)
    assert (choose(logits[order], seeds[order], n[order], how=how) == together[order]).all()
    for i in range(8):
        assert choose(logits[i : i + 1], seeds[i : i + 1], n[i : i + 1], how=how)[0] == together[i]
    others = [
        draw(np.zeros((1, V), np.float32), Sampling(1.0), [seed])[0] for seed in (0, 1, 2, 2**31, 2**31 + 1, 2**32 - 1)
    ]
    assert len(set(others)) > 3  # seeds beyond 2**31 are seeds of their own


# ---- each step, against transformers and arithmetic


def rows(seed=0, ties=False, scale=3.0):
    logits = np.random.default_rng(seed).normal(scale=scale, size=(B, V)).astype(np.float32)
    return np.round(logits) if ties else logits


@functools.cache
def theirs():
    pytest.importorskip("transformers")
    from transformers.generation import logits_process

    return logits_process


def warp(logits, *warpers, ids=((),)):
    import torch

    scores = torch.tensor(np.asarray(logits))
    ids = torch.tensor(np.broadcast_to(np.asarray(ids, np.int64), (len(logits), np.shape(ids)[-1])))
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.numpy()


def histories(seed=0):
    """Ids of each row, 9 of them the prompt's; and prompt and given, as sample() takes them."""
    ids = np.random.default_rng(seed).integers(0, V, (B, 20))
    prompt, given = np.zeros((B, V), bool), np.zeros((B, V), np.int32)
    np.put_along_axis(prompt, ids[:, :9], True, axis=1)
    np.add.at(given, (np.arange(B)[:, None], ids[:, 9:]), 1)
    return ids, prompt, given


jitted = jax.jit(processed, static_argnames=("how", "eos"))
LATE = np.full(B, 11, np.int32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_as_transformers(penalty, ties):
    hf = theirs().RepetitionPenaltyLogitsProcessor(penalty)
    for seed in range(10):
        ids, prompt, given = histories(seed)
        ours = jitted(rows(seed, ties), LATE, Sampling(repetition_penalty=penalty), (), prompt, given)
        np.testing.assert_allclose(ours, warp(rows(seed, ties), hf, ids=ids), rtol=1e-6)


def test_logit_bias_as_transformers():
    bias = {3: 2.5, 0: -1.0, 49: -math.inf}
    hf = theirs().SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()])
    ours = jitted(rows(), LATE, Sampling(logit_bias=bias), (), None, None)
    np.testing.assert_allclose(ours, warp(rows(), hf, ids=[[1]]), rtol=1e-6)
    assert Sampling(logit_bias=bias) == Sampling(logit_bias=tuple(sorted(bias.items())))  # a dict, or pairs
    assert (draw(rows(), Sampling(logit_bias={7: 1e4})) == 7).all()
    assert 7 not in draw(rows(), Sampling(5.0, logit_bias={7: -math.inf}))


def test_min_new_tokens_as_transformers():
    hf, how = theirs().MinNewTokensLengthLogitsProcessor(9, 4, [2, 5]), Sampling(min_new_tokens=4)
    for n in range(6):  # rows of one n, and of all at once
        ours = jitted(rows(), np.full(B, n, np.int32), how, (2, 5), None, None)
        np.testing.assert_array_equal(ours, warp(rows(), hf, ids=np.zeros((1, 9 + n))))
    mixed = np.asarray(jitted(rows(), np.arange(B, dtype=np.int32), how, (2, 5), None, None))
    assert (np.isneginf(mixed).sum(axis=1) == [2] * 4 + [0] * (B - 4)).all()


@pytest.mark.parametrize("ties", [False, True])
def test_all_processors_in_transformers_order(ties):
    hf, bias = theirs(), {3: 2.5, 8: -2.0}
    how = Sampling(repetition_penalty=1.2, logit_bias=bias, min_new_tokens=12)
    processors = (
        hf.SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()]),
        hf.RepetitionPenaltyLogitsProcessor(1.2),
        hf.MinNewTokensLengthLogitsProcessor(9, 12, 0),
    )
    for seed in range(10):
        ids, prompt, given = histories(seed)
        ours = jitted(rows(seed, ties), LATE, how, (0,), prompt, given)
        np.testing.assert_allclose(ours, warp(rows(seed, ties), *processors, ids=ids), rtol=1e-6)


def test_frequency_and_presence_penalties_by_openais_formula():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, of tokens given, not of the prompt's."""
    _, prompt, given = histories()
    how = Sampling(frequency_penalty=0.4, presence_penalty=-0.7)
    expected = rows().astype(float) - given * 0.4 - (given > 0) * -0.7
    np.testing.assert_allclose(jitted(rows(), LATE, how, (), prompt, given), expected, rtol=1e-5, atol=1e-6)
    assert given.max() > 1 and how.counts and not Sampling().counts


narrow = jax.jit(lambda scores, how: filtered(scores - scores.max(-1, keepdims=True), how), static_argnames="how")


def kept(warpers, logits):
    return np.isfinite(warp(logits, *warpers))


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_and_min_p_as_transformers(ties):
    for k, m in [
        (1, None),
        (5, None),
        (49, None),
        (50, None),
        (99, None),
        (None, 0.03),
        (None, 0.0),
        (None, 1.0),
        (9, 0.1),
    ]:
        warpers = [theirs().TopKLogitsWarper(k)] if k else []
        warpers += [theirs().MinPLogitsWarper(m)] if m is not None else []
        for seed in range(5):
            ours = np.asarray(narrow(rows(seed, ties), Sampling(1.0, top_k=k, min_p=m)))
            np.testing.assert_array_equal(np.isfinite(ours), kept(warpers, rows(seed, ties)))
            differences = rows(seed, ties) - rows(seed, ties).max(-1, keepdims=True)
            np.testing.assert_array_equal(ours[np.isfinite(ours)], differences[np.isfinite(ours)])  # and no more


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_as_transformers(p):
    warper = theirs().TopPLogitsWarper(p)
    for seed in range(5):
        ours = np.isfinite(narrow(rows(seed), Sampling(1.0, top_p=p)))
        differ = ours != kept([warper], rows(seed))
        exact = np.exp(rows(seed).astype(float))
        exact /= exact.sum(axis=-1, keepdims=True)
        before = np.where(exact[:, None] > exact[:, :, None], exact[:, None], 0).sum(axis=-1)  # of the likelier
        assert differ.sum() <= 2 and (np.abs(before - p)[differ] < 1e-6).all()  # where f32's sums decide
    logits = rows(ties=True)  # of equals transformers keeps some, by chance of its sort; we keep all
    ours, found = np.isfinite(narrow(logits, Sampling(1.0, top_p=p))), kept([warper], logits)
    assert (ours >= found).all()
    last = np.where(found, logits, np.inf).min(axis=-1, keepdims=True)
    np.testing.assert_array_equal(ours, logits >= last)


def test_top_p_of_1_and_min_p_of_0_leave_nothing_out():
    logits = np.concatenate([rows(scale=30), rows(1)])
    wide = np.random.default_rng(0).normal(scale=4, size=(4, 50_000)).astype(np.float32)
    for scores in (logits, wide):
        assert np.isfinite(narrow(scores, Sampling(1.0, top_p=1.0, min_p=0.0))).all()


@pytest.mark.parametrize("ties", [False, True])
def test_all_warpers_in_transformers_order(ties):
    hf = theirs()
    warpers = (
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    )
    for seed in range(20):
        logits = rows(seed, scale=1.0) if not ties else rows(seed, scale=1.0).round(1)
        found = kept(warpers, logits)
        ours = np.isfinite(narrow(logits / np.float32(0.7), Sampling(0.7, top_k=20, top_p=0.9, min_p=0.02)))
        if ties:
            assert (ours >= found).all() and (
                ours == (logits >= np.where(found, logits, np.inf).min(-1, keepdims=True))
            ).all()
        else:
            np.testing.assert_array_equal(ours, found)


def test_logprobs_are_the_models_own():
    logits, ids = rows(), np.random.default_rng(1).integers(0, V, B)
    ids[0] = DAMAGED
    exact = logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(axis=-1, keepdims=True))
    own, which, top = (np.asarray(a) for a in logprobs(logits, ids, 5))
    np.testing.assert_allclose(own[1:], exact[np.arange(1, B), ids[1:]], atol=1e-5)
    np.testing.assert_array_equal(which, np.argsort(-exact, axis=-1)[:, :5])
    np.testing.assert_allclose(top, -np.sort(-exact, axis=-1)[:, :5], atol=1e-5)
    own, which, top = logprobs(logits, ids, 0)
    assert own.shape == (B,) and which.shape == top.shape == (B, 0)
    assert logprobs(logits, ids, 100)[1].shape == (B, V)  # all that there are


# ---- the extremes


def test_sampling_extremes():
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    for tiny in (1e-300, 1e-30):
        assert draw(logits, Sampling(tiny)).tolist() == [1]
        assert draw(logits * 1e30, Sampling(tiny, top_k=2, top_p=0.5, min_p=0.5)).tolist() == [1]
    assert draw(logits, Sampling(1.0, top_k=99))[0] in (0, 1, 2)
    assert set(draw(np.tile(logits, (100, 1)), Sampling(1e30))) == {0, 1, 2}
    assert set(draw(np.tile(logits, (100, 1)), Sampling(1e30, logit_bias=((1, -np.inf),)))) == {0, 2}
    for p in (1e-30, 1e-38, 1e-300):
        assert set(draw(np.tile(logits, (100, 1)), Sampling(1.0, top_p=p))) == {1}
    assert draw(logits.astype("bfloat16"), Sampling()).tolist() == [1]
    for bad in (np.nan, np.inf, -np.inf):
        both = np.array([[1.0, bad, 2.0], [1.0, 3.0, 2.0]], np.float32)
        for how in (Sampling(), Sampling(1e-9), Sampling(1.0, top_k=1, top_p=0.5, min_p=0.5)):
            assert draw(both, how).tolist() == [DAMAGED, 1] or how.temperature == 1.0
            assert draw(both, how)[0] == DAMAGED


def test_greedy_takes_the_first_of_equals():
    assert draw(np.array([[1.0, 3.0, 3.0]], np.float32), Sampling()).tolist() == [1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(temperature=-1.0), "temperature is -1.0, expected 0"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(temperature=1.0, top_k=0), "top_k is 0, expected 1 or more"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        (dict(temperature=1.0, top_p=1.1), "top_p is 1.1"),
        (dict(temperature=1.0, top_p=math.nan), "top_p is nan"),
        (dict(temperature=1.0, min_p=-0.1), "min_p is -0.1"),
        (dict(temperature=1.0, min_p=1.5), "min_p is 1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (dict(repetition_penalty=math.inf), "repetition_penalty is inf"),
        (dict(frequency_penalty=math.nan), "frequency_penalty is nan"),
        (dict(presence_penalty=math.inf), "presence_penalty is inf"),
        (dict(logit_bias={-1: 1.0}), "logit_bias has (-1, 1.0)"),
        (dict(logit_bias={1.5: 1.0}), "an id of logit_bias is 1.5, expected a whole number"),
        (dict(logit_bias={1: math.nan}), "logit_bias has (1, nan)"),
        (dict(logit_bias={1: math.inf}), "logit_bias has (1, inf)"),
        (dict(logit_bias=((1, 2, 3),)), "logit_bias is ((1, 2, 3),), expected pairs of a token id and a number"),
        (dict(logit_bias=None), "logit_bias is None, expected pairs"),
        (dict(temperature="1"), "temperature is '1', expected a number"),
        (dict(repetition_penalty=None), "repetition_penalty is None, expected a number"),
        (dict(temperature=1.0, top_k=2.5), "top_k is 2.5, expected a whole number"),
        (dict(min_new_tokens=True), "min_new_tokens is True, expected a whole number"),
        (dict(min_new_tokens=-1), "min_new_tokens is -1"),
        (dict(logprobs=-1), "logprobs is -1"),
        (dict(logprobs=101), "logprobs is 101"),
        (dict(top_k=5), "top_k chooses what is sampled from, but temperature is 0"),
        (dict(top_p=0.5), "top_p chooses what is sampled from"),
        (dict(min_p=0.5), "min_p chooses what is sampled from"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(UsageError) as e:
        Sampling(**options)
    assert sentence in str(e.value)
