"""decode.py's parts and the public API of generation.py: the cache, pieces of a prompt and padding change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import train_tokenizer
from test_model import CONFIG, SHAPES, forward, make, tokens

from smoljax import decode, generation
from smoljax.config import Compute
from smoljax.errors import DataError, UsageError
from smoljax.generation import complete
from smoljax.layout import lay_out
from smoljax.quantize import quantize
from smoljax.sampling import Sampling

ROUNDING = 2e-5  # logits reach 5, and half an ulp of each weight, either way, moves them by up to 1e-5
PROMPTS = [tokens(n, seed=n).tolist() for n in (3, 17, 1, 8)]


@pytest.fixture(scope="module")
def model():
    return make()


# ---- the parts


@jax.jit
def extended(served, slots, piece, offsets, rows):
    """The logits of a piece of each row, and the slots."""
    x, slots = decode.extended(served, None, slots, piece, offsets, rows)
    return decode.head(served, x), slots


@jax.jit
def step(served, cache, ids, positions):
    x, cache = decode.trunk(served, ids[:, None], None, positions[:, None], cache)
    return decode.head(served, x)[:, 0], cache


def empty(served, rows, places, cache="float32", drafts=0):
    return decode.Slots.empty(served, rows, places, cache, Sampling(), drafts, None)


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm-1.7b"])  # grouped queries; as many keys as queries
@pytest.mark.parametrize("slots", [[2, 0], [0]])  # of three; of one, where a token is written without a scatter
def test_cached_logits_are_the_uncached(name, slots):
    model, n = make(SHAPES[name]), len(slots)
    served, row, lengths = lay_out(model, "float32", n), tokens(n, 30), np.array([5, 11])[:n]
    whole = forward(model, row)
    padded = np.where(np.arange(16) < lengths[:, None], row[:, :16], 299)  # padding that would show
    size = max(slots) + 1
    state = empty(served, size, 32)
    logits, state = extended(served, state, padded, np.zeros(n, int), np.array(slots))
    for i in range(n):
        np.testing.assert_allclose(logits[i, : lengths[i]], whole[i, : lengths[i]], atol=ROUNDING)
    cache, ids, positions = state.cache, np.zeros(size, int), np.zeros(size, int)
    for _ in range(19):
        ids[slots], positions[slots] = row[np.arange(n), lengths], lengths
        logits, cache = step(served, cache, ids, positions)
        np.testing.assert_allclose(logits[np.array(slots)], whole[np.arange(n), lengths], atol=ROUNDING)
        lengths = lengths + 1


def test_pieces_are_the_whole(model):
    served, row = lay_out(model, "float32", 2), tokens(2, 32)
    whole = forward(model, row)
    at, slots = np.array([3, 1]), empty(served, 4, 40)
    for begin in range(0, 32, 8):
        piece, offsets = row[:, begin : begin + 8], np.full(2, begin)
        logits, slots = extended(served, slots, piece, offsets, at)
        np.testing.assert_allclose(logits, whole[:, begin : begin + 8], atol=ROUNDING)
    for layer in slots.cache:  # nothing in other rows, nor behind
        used = np.abs(np.asarray(layer.v)).reshape(4, CONFIG.num_key_value_heads, 40, -1).sum(axis=(1, 3)) > 0
        assert used[[3, 1], :32].all() and not used[[0, 2]].any() and not used[:, 32:].any()


def test_a_row_beyond_the_slots_and_a_place_beyond_the_cache_leave_no_trace(model):
    served = lay_out(model, "float32", 2)
    _, slots = extended(served, empty(served, 2, 16), tokens(2, 8), np.zeros(2, int), np.arange(2))
    before = jax.tree.map(np.array, slots)
    _, slots = extended(served, slots, tokens(2, 8, seed=1), np.zeros(2, int), np.array([2, 9]))
    jax.tree.map(np.testing.assert_array_equal, before, slots)
    _, slots = extended(served, slots, tokens(2, 8, seed=1), np.full(2, 16), np.arange(2))
    jax.tree.map(np.testing.assert_array_equal, before, slots)


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_resized_keeps_what_is_seen(model, cache):
    served, row = lay_out(model, "float32", 2), tokens(2, 20)
    _, slots = extended(served, empty(served, 2, 32, cache, drafts=2), row, np.zeros(2, int), np.arange(2))
    slots = dataclasses.replace(slots, history=slots.history.at[:, :20].set(row))
    plain = step(served, slots.cache, row[:, 0], np.full(2, 20))[0]
    for places in (64, 20 + 1, 128):
        slots = decode.resized(slots, places)
        assert slots.cache[0].k.shape[2] == slots.cache[0].v.shape[1] == slots.history.shape[1] == places
        np.testing.assert_array_equal(slots.history[:, :20], row)
        np.testing.assert_allclose(step(served, slots.cache, row[:, 0], np.full(2, 20))[0], plain, atol=ROUNDING)


# ---- generate and complete


def test_greedy_equals_the_model_asked_again_for_each_token(model):
    for prompt, new in zip(PROMPTS, generation.generate(model, PROMPTS, 8, eos=()), strict=True):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(prompt) + 8] = prompt + new
        best = np.asarray(forward(model, row)).argmax(-1)[0]
        assert new == best[len(prompt) - 1 : len(prompt) + 7].tolist()


@pytest.mark.parametrize("how", [{}, dict(temperature=1.5, top_k=40, top_p=0.9, seed=7)])
def test_batch_equals_each_row_alone(model, how):
    how = how | {"eos": ()}  # so that no row ends early
    together = generation.generate(model, PROMPTS, 8, **how)
    assert together == [generation.generate(model, [prompt], 8, **how)[0] for prompt in PROMPTS]
    assert together == generation.generate(model, PROMPTS, 8, **how)
    assert together == generation.generate(model, PROMPTS, 8, slots=1, **how)
    assert [len(row) for row in together] == [8] * 4


def test_a_seed_for_each_row(model):
    how = dict(temperature=1.5, top_k=40, top_p=0.9, eos=())
    rows = generation.generate(model, [PROMPTS[0]] * 4, 8, seed=np.array([1, 2**32 - 1, 1, 2**31]), **how)
    assert rows[0] == rows[2] and len({tuple(row) for row in rows}) == 3


def test_ids_of_numpy_and_of_jax(model):
    plain = generation.generate(model, PROMPTS, 8, eos=())
    assert generation.generate(model, [np.array(p) for p in PROMPTS], 8, eos=()) == plain
    assert generation.generate(model, [list(np.array(p, np.uint16)) for p in PROMPTS], 8, eos=()) == plain
    assert generation.generate(model, tuple(tuple(p) for p in PROMPTS), 8, eos=(), seed=np.int64(3)) == plain
    assert all(type(token) is int for row in plain for token in row)


def test_stops_at_eos(model):
    free = generation.generate(model, PROMPTS, 8, eos=())
    eos = free[0][3]
    rows = complete(model, PROMPTS, 8, eos=eos)
    for row, whole in zip(rows, free, strict=True):
        stop = whole.index(eos) + 1 if eos in whole else 8  # EOS itself is given, as transformers does
        assert row.tokens == whole[:stop] and row.finish_reason == ("stop" if eos in whole else "length")
    assert rows[0].finish_reason == "stop" and rows[0].tokens[-1] == eos
    assert generation.generate(model, PROMPTS, 8, eos=(eos, 5)) == generation.generate(
        model, PROMPTS, 8, eos=[5, eos, 5]
    )


def test_the_models_own_end_unless_told_otherwise(model):
    free = generation.generate(model, PROMPTS[:1], 8, eos=())
    assert len(free[0]) == 8
    own = jax.tree.map(lambda w: w, model)
    for eos in (free[0][3], (free[0][3], 299)):
        own.config = dataclasses.replace(CONFIG, eos_token_id=eos)
        assert generation.generate(own, PROMPTS[:1], 8) == [free[0][: free[0].index(free[0][3]) + 1]]


def test_texts(model, tmp_path):
    words = train_tokenizer(tmp_path / "tokenizer.json")
    texts = ["def test", "import 3.14", "x"]
    ids = generation.generate(model, [words.encode(text).ids for text in texts], 8)
    assert generation.generate(model, texts, 8, tokenizer=words) == [words.decode(row) for row in ids]


def test_bfloat16_weights_and_arithmetic(model):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    full = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    assert generation.generate(half, PROMPTS, 8, eos=()) == generation.generate(full, PROMPTS, 8, eos=())
    row = generation.generate(half, PROMPTS[:1], 8, compute=Compute(dtype="bfloat16"))
    assert 1 <= len(row[0]) <= 8 and half.embed.dtype == jnp.bfloat16


def test_options_of_the_engine(model):
    """Drafts change nothing; int8 weights and cache go through; a model laid out is taken as it is."""
    plain = generation.generate(model, PROMPTS, 8, eos=())
    assert generation.generate(model, PROMPTS, 8, eos=(), drafts=2) == plain
    assert generation.generate(lay_out(model, "float32", 4), PROMPTS, 8, eos=()) == plain
    rows = complete(quantize(model), PROMPTS, 8, eos=(), cache="int8", logprobs=1)
    assert [len(row.logprobs) for row in rows] == [8] * 4 and rows[0].tokens[0] == plain[0][0]


def test_one_layer():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = make(config)
    new = generation.generate(model, PROMPTS[:1], 8, eos=())[0]
    best = np.asarray(forward(model, np.array([PROMPTS[0] + new]))).argmax(-1)[0]
    assert new == best[2:10].tolist()


@pytest.mark.parametrize(
    "prompts, options, sentence",
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 300]], {}, "prompt 1 has the token id 300, expected 0 to 299"),
        ([[-1]], {}, "token id -1"),
        ([[1.5]], {}, "expected a list of token ids"),
        ([b"def"], {}, "prompt 1 is b'def', expected a list of token ids"),
        ([{3, 1}], {}, "prompt 1 is {1, 3}, expected a list of token ids"),
        ([[True]], {}, "prompt 1 is [True], expected a list of token ids"),
        (None, {}, "prompts is None, expected a list of them"),
        (["text"], {"tokenizer": "a path"}, "the prompts are strings; give tokenizer="),
        ([[1]], {"logprobs": 1}, "logprobs are what smoljax.generation.complete gives"),
        ([[1]], {"max_new_token": 5}, "did you mean 'max_new_tokens'"),
        ([[1]], {"eos": False}, "eos is False, expected a whole number"),
        (["text"], {}, "the prompts are strings; give tokenizer="),
        (["text", [1]], {}, "some prompts are strings, some are not"),
        ("text", {}, "prompts is one string; give a list"),
        ([5], {}, "expected a list of token ids"),
        ([[1] * 8000], {"max_new_tokens": 193}, "8000 tokens; with max_new_tokens = 193"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 4.0}, "max_new_tokens is 4.0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_k": 5}, "temperature is 0, greedy"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ([[1]], {"temprature": 1.0}, "no option 'temprature'"),
        ([[1]], {"eos": 300}, "token id 300 (eos or logit_bias) is none of the model's, 0 to 299"),
        ([[1]], {"drafts": 17}, "drafts is 17"),
        ([[1]], {"cache": "int4"}, "cache is 'int4'"),
    ],
)
def test_refusals(model, prompts, options, sentence):
    with pytest.raises(UsageError) as e:
        generation.generate(model, prompts, **{"max_new_tokens": 4} | options)
    assert sentence in str(e.value)


def test_prompts_of_any_kind(model):
    """Once through an iterator, and numbers of NumPy's and JAX's."""
    plain = generation.generate(model, PROMPTS, 8, eos=())
    for kind in (np.array, jnp.array, tuple):
        new, seed = np.int64(8), np.uint32(0)
        assert generation.generate(model, (kind(p) for p in PROMPTS), new, eos=np.array([], int), seed=seed) == plain
    sampled = dict(temperature=0.7, top_k=5, logit_bias={3: 1.0, 2: 0.5})
    same = dict(temperature=jnp.float32(0.7), top_k=np.int32(5), logit_bias=[(2, np.float32(0.5)), (np.int64(3), 1)])
    size = decode.advance._cache_size()
    found = [generation.generate(model, PROMPTS, 8, eos=(), **how) for how in (sampled, same, sampled)]
    assert found[0] == found[1] == found[2] and decode.advance._cache_size() <= size + 2  # 0.7 in f32 is another


def test_no_prompts(model):
    assert generation.generate(model, [], 4) == [] and complete(model, [], 4) == []


def test_damaged_weights_are_said(model):
    broken = jax.tree.map(lambda w: w * jnp.nan, model)
    with pytest.raises(DataError, match="logits of prompt 1 are not finite"):
        generation.generate(broken, [[1]], 8, eos=())
