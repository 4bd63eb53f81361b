"""decode.py and `smoljax generate`: the cache, the batch and the padding change nothing; sampling is what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import train_tokenizer
from test_model import CONFIG, forward, make, tokens

from infer import generate
from smoljax import decode, hf
from smoljax.config import Compute
from smoljax.decode import Cache, Sampling, complete, sample
from smoljax.errors import DataError, UsageError

PROMPTS = [tokens(n, seed=n).tolist() for n in (3, 17, 1, 8)]


@pytest.fixture(scope="module")
def model():
    return make()


def test_cached_logits_are_the_uncached(model):
    row, prompts = tokens(2, 30), np.array([5, 11])
    whole = forward(model, row)
    padded = np.where(np.arange(16) < prompts[:, None], row[:, :16], 299)  # padding that would show
    prefill = jax.jit(decode.prefill, static_argnames="compute")
    step = jax.jit(decode.decode, static_argnames="compute")
    cache = Cache.zeros(CONFIG, 2, 32, "float32")
    logits, cache = prefill(model, padded, prompts, cache, compute=Compute())
    for n in range(19):
        np.testing.assert_allclose(logits, whole[np.arange(2), prompts + n - 1], atol=1e-5)
        logits, cache = step(model, row[np.arange(2), prompts + n], prompts + n, cache, compute=Compute())


def test_greedy_equals_the_model_asked_again_for_each_token(model):
    for prompt, new in zip(PROMPTS, decode.generate(model, PROMPTS, 8, eos=()), strict=True):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(prompt) + 8] = prompt + new
        best = np.asarray(forward(model, row)).argmax(-1)[0]
        assert new == best[len(prompt) - 1 : len(prompt) + 7].tolist()


@pytest.mark.parametrize("how", [{}, dict(temperature=1.5, seed=7), dict(temperature=1.5, top_k=40, top_p=0.9, seed=7)])
def test_batch_equals_each_row_alone(model, how):
    how = how | {"eos": ()}  # so that no row ends early
    together = decode.generate(model, PROMPTS, 8, **how)
    assert together == [decode.generate(model, [prompt], 8, **how)[0] for prompt in PROMPTS]
    assert together == decode.generate(model, PROMPTS, 8, **how)
    assert [len(row) for row in together] == [8] * 4


def test_a_seed_for_each_row(model):
    rows = decode.generate(model, [PROMPTS[0]] * 3, 8, temperature=1.5, seed=np.array([1, 2, 1]))
    assert rows[0] == rows[2] != rows[1]


def test_stops_at_eos(model):
    free = decode.generate(model, PROMPTS, 8, eos=())
    eos = free[0][3]
    rows = complete(model, PROMPTS, 8, eos=eos)
    for row, whole in zip(rows, free, strict=True):
        stop = whole.index(eos) + 1 if eos in whole else 8  # EOS itself is given, as transformers does
        assert row.tokens == whole[:stop] and row.finish_reason == ("stop" if eos in whole else "length")
    assert rows[0].finish_reason == "stop" and rows[0].tokens[-1] == eos
    assert decode.generate(model, PROMPTS, 8, eos=(eos, 5)) == decode.generate(model, PROMPTS, 8, eos=[5, eos])


def test_the_models_own_end_unless_told_otherwise(model):
    free = decode.generate(model, PROMPTS[:1], 8, eos=())
    assert len(free[0]) == 8
    own = jax.tree.map(lambda w: w, model)
    for eos in (free[0][3], (free[0][3], 299)):
        own.config = dataclasses.replace(CONFIG, eos_token_id=eos)
        assert decode.generate(own, PROMPTS[:1], 8) == [free[0][: free[0].index(free[0][3]) + 1]]
        assert decode.generate(own, PROMPTS[:1], 8, eos=()) == free


def test_texts(model, tmp_path):
    words = train_tokenizer(tmp_path / "tokenizer.json")
    texts = ["def test", "import 3.14"]
    ids = decode.generate(model, [words.encode(text).ids for text in texts], 8)
    assert decode.generate(model, texts, 8, tokenizer=words) == [words.decode(row) for row in ids]


def test_stops_early_when_all_rows_are_done(model, monkeypatch):
    steps = []
    following = decode.following
    monkeypatch.setattr(decode, "following", lambda *a, **k: steps.append(1) or following(*a, **k))
    first = decode.generate(model, PROMPTS[:1], 1)[0][0]
    assert decode.generate(model, PROMPTS[:1], 8, eos=first) == [[first]] and not steps


def test_bfloat16_weights_and_arithmetic(model):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    full = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    assert decode.generate(half, PROMPTS, 8) == decode.generate(full, PROMPTS, 8)
    row = decode.generate(half, PROMPTS[:1], 8, compute=Compute(dtype="bfloat16"))
    assert 1 <= len(row[0]) <= 8 and half.embed.dtype == jnp.bfloat16


def test_few_programs_and_a_donated_cache(model):
    decode.generate(model, [[1]], 9)
    before = decode.first._cache_size(), decode.following._cache_size()
    for n in range(1, 8):
        decode.generate(model, [[1] * n], 9)
    assert (decode.first._cache_size(), decode.following._cache_size()) == before
    settings = dict(how=Sampling(), compute=Compute())
    seeds, lengths = np.zeros(1, np.uint32), np.ones(1, np.int32)
    new, cache = decode.first(model, np.zeros((1, 16), np.int32), lengths, seeds, places=16, **settings)
    decode.following(model, new, lengths, cache, seeds, 1, **settings)
    assert cache.k.is_deleted() and cache.v.is_deleted()


def reference(logits, temperature, top_k, top_p):
    """The distribution as Hugging Face's warpers define it: temperature, the k likeliest, the nucleus of those."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    kept = p[order] / p[order].sum()
    if top_p is not None:
        kept = kept[: np.searchsorted(np.cumsum(kept), top_p) + 1]
    out = np.zeros_like(p)
    out[order[: len(kept)]] = kept / kept.sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, None),
        (0.5, None, None),
        (1.0, 3, None),
        (1.0, None, 0.7),
        (2.0, 6, 0.8),
        (1.0, 1, None),
        (1.0, None, 1e-9),
    ],
)
def test_sampling_distribution(temperature, top_k, top_p):
    logits = np.array([0.1, 2.0, -1.0, 1.2, 0.7, -3.0, 1.9, 0.0], np.float32)
    expected = reference(logits, temperature, top_k, top_p)
    n = 40_000
    keys = decode.keys(np.arange(n, dtype=np.uint32), 3)
    ids = jax.jit(sample, static_argnames="how")(np.tile(logits, (n, 1)), keys, how=Sampling(temperature, top_k, top_p))
    found = np.bincount(ids, minlength=8) / n
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / n))


def test_sampling_extremes():
    keys = decode.keys(np.zeros(1, np.uint32), 0)
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    assert sample(logits, keys, Sampling(1e-300)).tolist() == [1]
    assert sample(logits, keys, Sampling(1.0, top_k=99)).tolist()[0] in (0, 1, 2)
    for bad in (np.nan, np.inf):
        for how in (Sampling(), Sampling(1.0)):
            assert sample(np.array([[1.0, bad, 2.0]], np.float32), keys, how).tolist() == [-1]


@pytest.mark.parametrize(
    "prompts, options, sentence",
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 300]], {}, "prompt 1 has the token id 300, expected 0 to 299"),
        ([[-1]], {}, "token id -1"),
        ([[1.5]], {}, "expected a list of token ids"),
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
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_refusals(model, prompts, options, sentence):
    with pytest.raises(UsageError) as e:
        decode.generate(model, prompts, **{"max_new_tokens": 4} | options)
    assert sentence in str(e.value)


def test_no_prompts(model):
    assert decode.generate(model, [], 4) == []


def test_damaged_weights_are_said(model):
    broken = jax.tree.map(lambda w: w * jnp.nan, model)
    with pytest.raises(DataError, match="logits of prompt 1 are not finite"):
        decode.generate(broken, [[1]], 4)


def test_generate_program(model, tmp_path, capsys):
    words = train_tokenizer(tmp_path / "tokenizer.json")
    hf.save(tmp_path / "hf", model, CONFIG, tokenizer=tmp_path)
    args = [str(tmp_path / "hf"), "--prompt", "def test", "--prompt", "import 3.14", "--max-new-tokens", "8"]
    assert generate.main([*args, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompts = [words.encode(text).ids for text in ("def test", "import 3.14")]
    rows = complete(model, prompts, 8, eos=CONFIG.eos_token_id)
    assert lines == [
        dict(prompt=prompt, text=words.decode(row.tokens), tokens=row.tokens, finish_reason=row.finish_reason)
        for prompt, row in zip(("def test", "import 3.14"), rows, strict=True)
    ]
    assert generate.main(args) == 0
    out = capsys.readouterr().out
    assert out == "\n".join(line["prompt"] + line["text"] + "\n" for line in lines)

    for bad, sentence in [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--top-k", "5"], "give --temperature"),
        (["--prompt", ""], "prompt 3 is ''"),
        (["--prompt", "\udcff"], "prompt 3 is not UTF-8"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            generate.main([*args, *bad])
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="has no tokenizer.json"):
        generate.main(args)
