"""engine.py: any mix of lengths, limits, stops and arrivals gives, row for row, what each gives alone.

Compiling is most of the time, so engines and shapes are shared: every test takes the model of one tiny size.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import forward, make

from smoljax import decode, engine
from smoljax.config import Compute, Model
from smoljax.engine import LONGEST, Engine, bucket
from smoljax.errors import DataError, UsageError
from smoljax.generation import complete
from smoljax.layout import lay_out
from smoljax.quantize import quantize
from smoljax.request import Completion, Request
from smoljax.sampling import Sampling

TINY = Model(32, 64, 2, 4, 2, 8, vocab_size=64, max_position_embeddings=4096, rope_theta=1e5, eos_token_id=None)
EOS = (3, 11, 20, 22, 51)
SAMPLED = Sampling(
    1.5,
    top_k=50,
    top_p=0.98,
    min_p=0.001,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    logit_bias={7: 1.0, 9: -float("inf")},
    min_new_tokens=2,
    logprobs=2,
)
PENALIZED = Sampling(repetition_penalty=1.3, presence_penalty=0.2, logprobs=1)  # greedy, and no loop


def loud(config=TINY, seed=0):
    """A model whose layers say more than its embedding: else greedy tokens are soon all the same."""
    model = make(config, seed)
    for name in ("o", "down"):
        setattr(model.layers, name, getattr(model.layers, name).replace(getattr(model.layers, name)[...] * 12))
    return model


@pytest.fixture(scope="module")
def model():
    return loud()


@pytest.fixture(scope="module")
def served(model):
    return lay_out(model, "float32", 1)


SHALLOW = dataclasses.replace(TINY, num_hidden_layers=1)


@pytest.fixture(scope="module")
def shallow():
    return lay_out(loud(SHALLOW), "float32", 1)


GREEDY = dict(eos=(), rounds=4)  # the settings of most tests, with three slots


def prompt(length, seed):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist()


def results(engine, requests):
    found = list(engine.run(requests))
    assert sorted(number for number, _ in found) == list(range(len(found)))  # each once, numbered
    return [completion for _, completion in sorted(found, key=lambda pair: pair[0])]


def same(rows, others):
    assert [(r.tokens, r.finish_reason) for r in rows] == [(r.tokens, r.finish_reason) for r in others]
    for row, other in zip(rows, others, strict=True):
        if row.logprobs is None:
            assert other.logprobs is None
            continue
        assert len(row.logprobs) == len(other.logprobs) == len(row.tokens)
        for mine, its in zip(row.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(mine[0], its[0], atol=1e-4)
            assert mine[1] == its[1]
            np.testing.assert_allclose(mine[2], its[2], atol=1e-4)


@pytest.fixture
def dispatches(monkeypatch):
    """The calls of decode.advance, with what each gave."""
    calls, advance = [], decode.advance
    monkeypatch.setattr(decode, "advance", lambda *a: calls.append(advance(*a)) or calls[-1])
    return calls


# ---- the law

LENGTHS = (1, 600, 5, 22, 31, 29, 32, 700, 2, 20, 513, 1, 26, 7)  # beyond LONGEST, too
LIMITS = (1, 12, 30, 9, 60, 20, 1, 5, 2, 33, 3, 24, 6, 30)
SEEDS = (0, 1, 2**31, 2**32 - 1, 7, 7, 2, 3, 4, 5, 6, 8, 9, 0)
REQUESTS = [Request(prompt(n, i), new, s) for i, (n, new, s) in enumerate(zip(LENGTHS, LIMITS, SEEDS, strict=True))]


@pytest.mark.parametrize("how", [PENALIZED, SAMPLED], ids=["greedy", "sampled"])
def test_any_mix_gives_what_each_gives_alone(served, how):
    assert max(LENGTHS) > LONGEST
    options = dict(sampling=how, eos=EOS, rounds=4)
    one = Engine(served, 1, **options)
    alone = [results(one, [request])[0] for request in REQUESTS]
    assert {row.finish_reason for row in alone} == {"stop", "length"}
    assert len({token for row in alone for token in row.tokens}) > 30 and max(len(row.tokens) for row in alone) > 15
    for row, request in zip(alone, REQUESTS, strict=True):
        assert (row.tokens[-1] in EOS) == (row.finish_reason == "stop")
        assert not set(row.tokens[:-1]) & set(EOS) and len(row.tokens) <= request.max_new_tokens
    same(results(one, REQUESTS), alone)
    many = Engine(served, 3, **options)
    same(results(many, REQUESTS), alone)
    same(results(many, REQUESTS[2:3]), alone[2:3])  # the other slots idle
    same(results(many, REQUESTS[::-1])[::-1], alone)  # in another order, after other rows in each slot
    arrived = []

    def later():  # as slots come free
        for request in REQUESTS:
            arrived.append(len(given))
            yield request

    given = []
    for pair in many.run(later()):
        given.append(pair)
    same([completion for _, completion in sorted(given, key=lambda pair: pair[0])], alone)
    assert arrived[:3] == [0, 0, 0] and arrived[-1] > 3 and arrived == sorted(arrived)


def predicted(model, requests, rows):
    """The logits of each row's tokens, by the model as it was trained, all at once."""
    whole = np.zeros((3, 720), np.int32)
    for line, request, row in zip(whole, requests, rows, strict=True):
        line[: len(request.prompt) + len(row.tokens)] = request.prompt + row.tokens
    logits = np.asarray(forward(model, whole))
    return [x[len(q.prompt) - 1 :][: len(row.tokens)] for x, q, row in zip(logits, requests, rows, strict=True)]


def test_greedy_is_the_model_asked_again_for_each_token(model, served):
    requests = [REQUESTS[4], REQUESTS[8], Request(prompt(50, 9), 250)]  # over 256 places on the way
    rows = results(Engine(served, 3, **GREEDY), requests)
    assert [len(row.tokens) for row in rows] == [60, 2, 250]
    for row, logits in zip(rows, predicted(model, requests, rows), strict=True):
        assert row.tokens == logits.argmax(axis=-1).tolist() and row.finish_reason == "length"


def test_a_prompt_in_pieces_is_the_whole(model, served, monkeypatch):
    monkeypatch.setattr(engine, "LONGEST", 32)
    requests = [Request(prompt(n, n), 9) for n in (33, 128, 100)]
    rows = results(Engine(served, 3, **GREEDY), requests)
    for row, logits in zip(rows, predicted(model, requests, rows), strict=True):
        assert row.tokens == logits.argmax(axis=-1).tolist()


def test_logprobs_are_the_models(model, served):
    requests = [REQUESTS[i] for i in (1, 4, 7)]  # two of them beyond LONGEST
    rows = results(Engine(served, 3, sampling=SAMPLED, eos=EOS, rounds=4), requests)
    for row, logits in zip(rows, predicted(model, requests, rows), strict=True):
        for token, (own, which, top), line in zip(row.tokens, row.logprobs, jax.nn.log_softmax(logits), strict=True):
            np.testing.assert_allclose([own, *top], line[np.array([token, *which])], atol=1e-4)
            assert which == np.argsort(-line)[:2].tolist()


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prompt_logprobs_are_the_models(model, served, int8):
    requests = [Request(prompt(n, n), 2) for n in (1, 5, 30, 1300, 64)]  # a group, one in pieces
    if int8:  # by the weights that are asked
        model = quantize(model)
        served = lay_out(model, "float32", 3)
    how = Sampling(logprobs=2, prompt_logprobs=True)
    rows = results(Engine(served, 3, sampling=how, **GREEDY), requests)
    padded = np.array([request.prompt + [0] * (1300 - len(request.prompt)) for request in requests])
    every = np.asarray(jax.nn.log_softmax(forward(model, padded)))
    for row, request, lines in zip(rows, requests, every, strict=True):
        assert len(row.prompt_logprobs) == len(request.prompt) - 1 and len(row.logprobs) == 2
        for token, (own, which, top), line in zip(request.prompt[1:], row.prompt_logprobs, lines, strict=False):
            np.testing.assert_allclose([own, *top], line[np.array([token, *which])], atol=0.05 if int8 else 1e-4)
            assert int8 or which == np.argsort(-line)[:2].tolist()
    assert rows[1].tokens == results(Engine(served, 1, **GREEDY), requests[1:2])[0].tokens
    with pytest.raises(UsageError, match="comes with logprobs"):
        Sampling(prompt_logprobs=True)


def test_prompt_logprobs_in_parts_are_those_of_the_whole(served):
    x = np.random.default_rng(0).normal(size=(80, 32, TINY.hidden_size)).astype(np.float32)
    following = np.random.default_rng(1).integers(0, TINY.vocab_size, (80, 32))
    found = jax.jit(decode.judged, static_argnums=3)(served, x, following, 3)
    assert [a.shape for a in found] == [(80, 32), (80, 32, 3), (80, 32, 3)]
    logp = jax.nn.log_softmax(decode.head(served, x))
    np.testing.assert_allclose(found[0], np.take_along_axis(logp, following[:, :, None], 2)[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(found[2], -np.sort(-logp)[:, :, :3], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(logp, found[1], 2), found[2], atol=1e-5)


def test_requests_are_taken_as_slots_come_free(served):
    taken = []

    def endless():
        while True:
            taken.append(Request([len(taken) % 64], 3))
            yield taken[-1]

    rows = Engine(served, 3, **GREEDY).run(endless())
    assert not taken  # nor before somebody asks
    for n in range(12):
        number, row = next(rows)
        assert len(row.tokens) == 3 and len(taken) <= n + 1 + 3
    rows.close()
    with pytest.raises(UsageError, match="prompt 5 is empty"):  # said when its turn comes; those before are given
        done = []
        for pair in Engine(served, 3, **GREEDY).run([*[Request([1], 2)] * 4, Request([], 2)]):
            done.append(pair)
    assert len(done) >= 2


def test_one_engine_runs_again_and_nothing_stays(served):
    batch, requests = Engine(served, 3, **GREEDY), [Request([i, 3], 9) for i in range(5)]
    first = results(batch, requests)
    rows = batch.run([Request([7], 30), Request([8], 1)])
    next(rows)
    rows.close()
    same(results(batch, requests), first)
    assert list(batch.run([])) == []


# ---- drafts

REPEATED = [5, 17, 40, 2, 33, 8] * 5
DRAFTED = [Request(REPEATED, 60, 1), Request([9], 1, 2), Request(prompt(20, 5), 50, 3), Request([4, 4, 4], 2)]
DRAFTED += [Request([1, 2] * 6, 31, 2**31), Request(prompt(9, 6), 40, 4)]


def near(served):
    """A model that says the same often, not always."""
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda w: w * noise.uniform(0.8, 1.2, w.shape).astype(np.float32), served)


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.1, presence_penalty=0.02, logprobs=1)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("kind", ["lookup", "itself", "another"])
def test_drafts_change_no_token(shallow, dispatches, how, kind):
    draft = {"lookup": None, "itself": shallow, "another": near(shallow)}[kind]
    options, ends = dict(sampling=how, rounds=4), (11, 51)
    free = results(Engine(shallow, 1, eos=ends, **options), DRAFTED)
    assert {row.finish_reason for row in free} == {"stop", "length"}
    dispatches.clear()
    same(results(Engine(shallow, 2, eos=ends, drafts=3, draft=draft, **options), DRAFTED), free)
    tokens = np.concatenate([np.asarray(tokens).reshape(-1, 4) for _, tokens, _ in dispatches])
    taken = (tokens >= 0).sum(axis=-1)  # of each row in each round: one, and as many drafts as were right
    assert taken.max() > 1 and (tokens[taken > 0][:, 0] >= 0).all()
    if kind == "itself":  # EOS and limits are within drafts
        ended = np.isin(tokens, ends).any(axis=-1)
        assert (taken[ended] < 4).any() and taken[taken > 0].mean() > 1.2
        if how == Sampling():  # each draft is right, and a round's first is made with the keys of the last round's
            assert (taken > 0).sum() <= sum(-(-(len(row.tokens) - 1) // 4) for row in free) + 2


def test_a_repetitive_answer_takes_fewer_dispatches(shallow, dispatches):
    plain = results(Engine(shallow, 1, **GREEDY), [DRAFTED[0]])
    before = len(dispatches)
    same(results(Engine(shallow, 1, drafts=3, **GREEDY), [DRAFTED[0]]), plain)
    assert before == 15 and len(dispatches) - before < 10


def test_limits_that_end_inside_a_draft(shallow, served):
    """Each limit from 1 on: the longer answer's beginning."""
    batch = Engine(shallow, 1, drafts=3, draft=served, **GREEDY)  # of another depth
    whole = results(batch, [DRAFTED[0]])[0].tokens
    rows = results(batch, [Request(REPEATED, n, 1) for n in range(1, 12)])
    assert [row.tokens for row in rows] == [whole[:n] for n in range(1, 12)]
    assert {row.finish_reason for row in rows} == {"length"}


def test_lookup_drafts_what_followed():
    from smoljax.speculate import look_up

    history = np.zeros((4, 16), np.int32)
    history[0, :7] = [1, 2, 3, 9, 1, 2, 3]  # followed by 9 1 2 before
    history[1, :5] = [5, 5, 5, 5, 5]  # a loop goes on
    history[2, :8] = [2, 7, 8, 3, 7, 4, 3, 7]  # the longer match, not the later
    history[3, :1] = [6]
    found = look_up(jnp.array(history), jnp.array([6, 4, 7, 0]), 4)
    assert found[0].tolist() == [9, 1, 2, 3] and found[1].tolist() == [5] * 4
    assert found[2].tolist() == [4, 3, 7, 4] and found.shape == (4, 4)


# ---- int8 and bfloat16


def test_int8_cache_is_close(model, served):
    ids = np.array([prompt(40, 1), prompt(40, 2)])
    whole = np.asarray(forward(model, ids))

    @jax.jit
    def logits(served):
        slots, found = decode.Slots.empty(served, 2, 64, "int8", Sampling(), 0, None), []
        cache = slots.cache
        for begin, end in ((0, 30), (30, 31), (31, 40)):  # so that most is read from the cache
            at = jnp.broadcast_to(jnp.arange(begin, end), (2, end - begin))
            x, cache = decode.trunk(served, ids[:, begin:end], None, at, cache)
            found.append(decode.head(served, x))
        assert cache[0].k.dtype == cache[0].v.dtype == jnp.int8
        return jnp.concatenate(found, axis=1)

    assert 0 < np.abs(logits(served) - whole).max() < 0.05 * np.abs(whole).max()


SHORT = [Request(prompt(n, n), new, n) for n, new in ((5, 30), (31, 40), (1, 3), (12, 33), (2, 24), (32, 1))]


@pytest.mark.parametrize(
    "weights, cache",
    [("float32", "int8"), pytest.param("int8", "float32", marks=pytest.mark.slow), ("int8, embedding too", "int8")],
)
def test_int8_in_any_batch(shallow, weights, cache):
    small = shallow if weights == "float32" else quantize(loud(SHALLOW), embedding="too" in weights)
    options = dict(sampling=PENALIZED, eos=EOS, rounds=4, cache=cache)
    rows = results(Engine(small, 3, **options), SHORT)
    assert len({token for row in rows for token in row.tokens}) > 20
    same(rows, results(Engine(small, 1, **options), SHORT))


def test_bfloat16(shallow):
    narrow = lay_out(loud(SHALLOW), "bfloat16", 1)
    batch = Engine(narrow, 3, compute=Compute(dtype="bfloat16"), cache="bfloat16", **GREEDY)
    running = batch.run(SHORT)
    first = next(running)
    assert batch.state.cache[0].k.dtype == jnp.bfloat16
    rows, full = dict([first, *running]), results(Engine(shallow, 1, **GREEDY), SHORT)
    rows = [rows[i] for i in range(len(SHORT))]
    assert batch.state is None  # the cache is gone with the run
    assert [len(row.tokens) for row in rows] == [request.max_new_tokens for request in SHORT]
    assert sum(row.tokens[0] == other.tokens[0] for row, other in zip(rows, full, strict=True)) >= 4


# ---- memory and compiled programs


def test_few_programs_for_1000_prompts():
    """begin: 5 lengths up to 512, alone or in a group, and 2 sizes of the cache; advance: 2 sizes of the cache."""
    small = lay_out(make(dataclasses.replace(SHALLOW, rms_norm_eps=1e-6)), "float32", 4)  # no other test's programs
    random, sizes = np.random.default_rng(0), (decode.begin, decode.advance, decode.fitted, decode.extend)
    before = [f._cache_size() for f in sizes]
    requests = [
        Request(prompt(int(n), i), 1 + i % 2) for i, n in enumerate([*random.integers(1, 250, 990), *[300] * 10])
    ]
    rows = results(Engine(small, 4, eos=(), rounds=2), requests)
    assert [len(row.tokens) for row in rows] == [1, 2] * 500
    begin, advance, fitted, extend = (f._cache_size() - n for f, n in zip(sizes, before, strict=True))
    lengths = {bucket(len(r.prompt), 32) for r in requests}
    assert lengths == {32, 64, 128, 256, 512}
    assert begin <= 2 * 2 * len(lengths) and advance <= 2 and fitted <= 2 * 2 and extend == 0


@pytest.mark.parametrize(
    "slots, cache, drafts", [(1, "float32", 0), (3, "float32", 0), (3, "int8", 0), (2, "float32", 3)]
)
def test_the_cache_is_donated_and_never_copied(shallow, slots, cache, drafts):
    state = decode.Slots.empty(shallow, slots, 256, cache, Sampling(), drafts, None)
    args, leaves = (shallow, None, state, 4, drafts, Sampling(), ()), jax.tree.leaves(state)
    compiled = decode.advance.lower(*args).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(a.nbytes for a in leaves)
    made = re.findall(r" = \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", compiled.as_text())
    copied = {np.prod([int(n) for n in shape.split(",")]) for shape in made}
    assert not copied & {a.size for a in jax.tree.leaves(state.cache)}
    decode.advance(*args)
    assert all(a.is_deleted() for a in leaves)


def test_few_dispatches(served, dispatches):
    rows = results(Engine(served, 3, **GREEDY), [Request([1], 13), Request([2, 3], 13), Request([5] * 9, 1)])
    assert [len(row.tokens) for row in rows] == [13, 13, 1] and len(dispatches) == 3  # the first token is begin's
    dispatches.clear()
    assert len(results(Engine(served, 3, eos=rows[0].tokens[0], rounds=4), [Request([1], 13)])[0].tokens) == 1
    assert not dispatches


@pytest.fixture
def asked(monkeypatch):
    """What the device is asked: for each call the program, and rows and tokens of prompts, or rounds."""
    calls = []

    def noted(name, size):
        program = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *args: calls.append((name, size(args))) or program(*args))

    noted("extend", lambda args: args[3].shape)
    noted("begin", lambda args: args[3].shape)
    noted("advance", lambda args: args[3])
    return calls


def test_long_prompts_are_read_together(shallow, monkeypatch, asked):
    """As many pieces, as many rows: the last piece may be of any length."""
    monkeypatch.setattr(engine, "LONGEST", 32)
    requests = [Request(prompt(n, n), 4, n) for n in (70, 96, 40, 65, 33, 20, 97)]
    options = dict(sampling=dataclasses.replace(SAMPLED, prompt_logprobs=True), eos=EOS, rounds=4)
    batch = Engine(shallow, 8, **options)
    batch.budget = 3 * 32
    rows = results(batch, requests)
    assert asked[:6] == [
        *[("extend", (3, 32))] * 2, ("begin", (3, 32)),  # 70, 96 and 65
        ("extend", (3, 32)), ("begin", (3, 32)),  # 40 and 33, and padding
        ("begin", (1, 32)),
    ]  # fmt: skip
    assert asked[6:10] == [*[("extend", (1, 32))] * 3, ("begin", (1, 32))]
    same(rows, results(Engine(shallow, 1, **options), requests))
    for row, request in zip(rows, requests, strict=True):
        assert len(row.prompt_logprobs) == len(request.prompt) - 1


def test_no_more_rows_and_rounds_than_are_needed(shallow, asked):
    """Rows that join are padded to 1, 4, 16, ... of them, and rounds end at the power of two that all rows may have."""
    rows = results(Engine(shallow, 8, eos=(), rounds=16), [Request(prompt(n, n), 2) for n in (5, 6)])
    assert asked == [("begin", (4, 32)), ("advance", 1)] and [len(row.tokens) for row in rows] == [2, 2]
    asked.clear()
    limits = (4, 1, 6, *[9] * 5)
    rows = results(Engine(shallow, 8, eos=(), rounds=16), [Request(prompt(5, n), n) for n in limits])
    assert asked == [("begin", (8, 32)), ("advance", 8)] and [len(row.tokens) for row in rows] == [*limits]
    asked.clear()
    results(Engine(shallow, 8, eos=(), rounds=16), [Request(prompt(5, 0), 40)])
    assert asked == [("begin", (1, 32)), *[("advance", 16)] * 3]


def test_the_cache_grows_and_shrinks(served, monkeypatch):
    sizes, resize = [], Engine.resize
    monkeypatch.setattr(Engine, "resize", lambda self, n: resize(self, n) or sizes.append(self.places))
    requests = [Request(prompt(700, 0), 3), Request([1, 2], 40), Request([3], 30)]
    batch = Engine(served, 3, sampling=PENALIZED, eos=EOS, rounds=4)
    rows = results(batch, requests)
    assert max(sizes) == 1024 and sizes[-1] == 256
    monkeypatch.undo()
    same(rows[1:], results(batch, requests[1:]))


# ---- watch, and what is refused


def test_watch_ends_a_row(served):
    batch = Engine(served, 3, **GREEDY)
    whole = results(batch, [Request([1, 2], 40), Request([3], 30)])
    seen = []

    def at_six(tokens):
        seen.append(len(tokens))
        assert tokens == whole[0].tokens[: len(tokens)]
        return 6 if len(tokens) >= 6 else None

    requests = [
        Request([1, 2], 40, watch=at_six),
        Request([3], 30, watch=lambda tokens: None),
        Request([1, 2], 40, watch=lambda t: 0),
        *[Request([3], 30)] * 4,
    ]
    rows = results(batch, requests)
    assert rows[0].tokens == whole[0].tokens[:6] and rows[0].finish_reason == "stop"
    assert seen == [1, 5, 9]  # new tokens, a few at a time, and no more once it has ended
    assert rows[2] == Completion([], "stop")
    same([rows[1], *rows[3:]], [whole[1]] * 5)


def test_a_row_ended_by_watch_harms_no_other(served):
    """The device goes on with it, beyond the cache at last, until its slot is filled again."""
    batch, going = Engine(served, 3, **GREEDY), [Request([3], 250), Request([5, 6], 100), Request([7] * 20, 9)]
    alone = results(batch, going)
    rows = results(batch, [Request([1, 2] * 15, 3000, watch=lambda tokens: 1), *going])
    assert rows[0].finish_reason == "stop"
    same(rows[1:], alone)


def test_damaged_weights_are_said(served):
    broken = jax.tree.map(lambda w: w * jnp.nan, served)
    with pytest.raises(DataError, match="logits of prompt 1 are not finite: the model's weights are damaged"):
        list(Engine(broken, 3, **GREEDY).run([Request([1], 4)]))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(slots=0), "slots is 0, expected 1 or more"),
        (dict(drafts=17), "drafts is 17, expected 0 to 16"),
        (dict(drafts=-1), "drafts is -1"),
        (dict(cache="int4"), "cache is 'int4', expected int8 or a dtype"),
        (dict(draft="served"), "a draft model needs drafts"),
        (dict(draft="wide", drafts=2), "the draft model has 65 tokens, the model 64"),
        (dict(eos=64), "token id 64 (eos or logit_bias) is none of the model's, 0 to 63"),
        (dict(eos=(1, -1)), "token id -1"),
        (dict(compute=Compute(dtype="bfloat16")), "compute.dtype is bfloat16, and the model is laid out in float32"),
        (dict(sampling=Sampling(logit_bias={64: 1.0})), "token id 64"),
    ],
)
def test_an_engines_refusals(served, options, sentence):
    draft = {"served": served, "wide": make(dataclasses.replace(TINY, vocab_size=65))}.get(options.get("draft"))
    with pytest.raises(UsageError) as e:
        Engine(served, **options | ({"draft": draft} if draft is not None else {}))
    assert sentence in str(e.value)


@pytest.mark.parametrize(
    "request_, sentence",
    [
        (Request([]), "prompt 2 is empty; give at least one token"),
        (Request([1, 64]), "prompt 2 has the token id 64, expected 0 to 63"),
        (Request([-1]), "token id -1"),
        (Request([1] * 4000, 97), "prompt 2 has 4000 tokens; with max_new_tokens = 97"),
        (Request([1], 0), "max_new_tokens is 0"),
        (Request([1], True), "max_new_tokens is True"),
        (Request([1], 2.0), "max_new_tokens is 2.0"),
        (Request([1], 1, -1), "seed is -1"),
        (Request([1], 1, 2**32), "seed is 4294967296"),
        (Request([1], 1, 3.7), "seed is 3.7, expected a whole number"),
        (Request([1.5, 2.2]), "prompt 2 is [1.5, 2.2], expected a list of token ids"),
        ([1, 2], "prompt 2 is [1, 2], expected a Request"),
        (
            Request([1], 4, watch=lambda tokens: 0 in tokens),
            "watch gave False for prompt 2, expected None, or",
        ),
        (Request([1], 4, watch=lambda tokens: -1), "watch gave -1 for prompt 2"),
    ],
)
def test_a_requests_refusals(served, request_, sentence):
    with pytest.raises(UsageError) as e:
        list(Engine(served, 3, **GREEDY).run([Request([1], 1), request_]))
    assert sentence in str(e.value)


def test_one_run_at_a_time(served):
    """A second one would take the first one's slots: it is refused, and the first goes on."""
    batch, requests = Engine(served, 1, **GREEDY), [Request([i, 3], 9) for i in range(3)]
    whole = results(batch, requests)
    first = batch.run(requests)
    found = [next(first)]
    with pytest.raises(UsageError, match="this engine is at work; end its run, or make another engine"):
        next(batch.run(requests))
    same([completion for _, completion in sorted([*found, *first], key=lambda pair: pair[0])], whole)
    same(results(batch, requests), whole)


def test_options_that_are_none(model):
    with pytest.raises(UsageError, match="no option 'temprature'; did you mean 'temperature'|no option 'temprature'"):
        complete(model, [[1]], 2, temprature=1.0)
    with pytest.raises(UsageError, match="2 seeds for 1 prompts"):
        complete(model, [[1]], 2, seed=[1, 2])


def test_places_without_a_request_hold_nothing_up():
    """A row that cannot be is given on before those behind it are taken, however many come."""
    taken = []

    def requests():
        for i in range(5000):
            taken.append(i)
            yield None
        yield Request([1, 2], 2)

    run = Engine(make(SHALLOW), 2, eos=()).run(requests())
    assert next(run) == (0, None) and len(taken) == engine.PASSED
    found = list(run)
    assert [number for number, _ in found] == list(range(1, 5001)) and len(found[-1][1].tokens) == 2
