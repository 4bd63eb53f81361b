"""layout.py: every way of multiplying gives the product, and a row's is its own in any batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import CONFIG, forward, make, tokens

from smoljax import decode, layout
from smoljax.layout import TIMED, WAYS, choose, laid, lay_out
from smoljax.quantize import MATRICES, QTensor, quantize, quantized

FORMS = {"q": "BTD,DNH->BTNH", "o": "BTNH,NHD->BTD", "up": "BTD,DF->BTF", "embed": "BTD,VD->BTV"}
SIZES = dict(D=37, N=3, H=10, F=53, V=101)  # none a multiple of 8
AXES = MATRICES | {"embed": (-1,)}


def numbers(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def factors(name, B, T):
    x, w, y = FORMS[name].replace("->", ",").split(",")
    sizes = SIZES | dict(B=B, T=T)
    return [numbers(*(sizes[a] for a in letters), seed=i) for i, letters in enumerate((x, w))]


times = jax.jit(lambda weight, x: weight.times("", x))
sums = jax.jit(lambda weight, x: weight.sums(x))


@pytest.mark.parametrize("B, T", [(1, 1), (3, 4), (2, 40)])
@pytest.mark.parametrize("name", FORMS)
def test_every_way_gives_the_product(name, B, T):
    x, w = factors(name, B, T)
    exact = np.einsum(FORMS[name], np.asarray(x, float), np.asarray(w, float))
    for way in WAYS["float32"]:
        y = times(laid(w, AXES[name], "float32", way), x)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, exact, atol=1e-5)
    half_x, half_w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    exact = np.einsum(FORMS[name], np.asarray(half_x, float), np.asarray(half_w, float))
    for way in WAYS["bfloat16"]:
        weight = laid(w, AXES[name], "bfloat16", way)
        assert weight.values.dtype == jnp.bfloat16 and times(weight, half_x).dtype == jnp.bfloat16
        np.testing.assert_allclose(times(weight, half_x).astype(float), exact, rtol=2**-8, atol=1e-4)
        y = sums(weight, half_x)  # in f32, not rounded on the way
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y.reshape(exact.shape), exact, atol=1e-4)
    q = QTensor(*quantized(w, AXES[name]), "")
    exact = np.einsum(FORMS[name], np.asarray(x, float), np.asarray(q.values, float) * np.asarray(q.scale, float))
    for way in WAYS["int8"]:
        weight = laid(q, AXES[name], "float32", way)
        assert weight.values.dtype == jnp.int8
        np.testing.assert_allclose(times(weight, x), exact, atol=1e-4 * np.abs(exact).max())
        if B * T > 1:
            y, near = times(weight, half_x), np.abs(exact).max() * 0.02
            assert y.dtype == jnp.bfloat16
            np.testing.assert_allclose(y.astype(float), exact, atol=near)


@pytest.mark.parametrize("way", ["split", "split left"])
def test_split_gives_a_row_the_same_bits_in_any_batch(way):
    x, w = numbers(33, 1, 576) * np.logspace(-20, 15, 33, dtype=np.float32)[:, None, None], numbers(576, 192, seed=1)
    weight = laid(QTensor(*quantized(w, (-2,)), ""), (-2,), "float32", way)
    together = np.asarray(sums(weight, x))
    for i in range(33):
        np.testing.assert_array_equal(sums(weight, x[i : i + 1])[0], together[i])
    np.testing.assert_array_equal(sums(weight, x.reshape(3, 11, 576)).reshape(together.shape), together)
    np.testing.assert_array_equal(sums(weight, x[::-1])[::-1], together)
    exact = np.asarray(x[:, 0], float) @ (np.asarray(weight.values, float).T * np.asarray(weight.scale, float))
    error = np.abs(together[:, 0] - exact).max(axis=-1) / np.abs(exact).max(axis=-1)
    assert error.max() < 1e-4


@pytest.mark.parametrize("way", ["split", "split left"])
def test_split_of_nothing_and_of_damage(way):
    weight = laid(QTensor(*quantized(numbers(24, 16), (-2,)), ""), (-2,), "float32", way)
    x = np.zeros((3, 1, 24), np.float32)
    x[1, 0, 5], x[2, 0, 7] = np.nan, np.inf
    y = np.asarray(sums(weight, x))
    assert (y[0] == 0).all() and not np.isfinite(y[1:]).any()  # what is not finite stays so


def test_a_model_laid_out_gives_the_models_logits():
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    model, ids = make(config), tokens(2, 20)
    whole = forward(model, ids)

    @jax.jit
    def logits(served):
        slots = decode.Slots.empty(served, 2, 32, served.dtype, decode.Sampling(), 0, None)
        x, _ = decode.trunk(served, ids, jnp.arange(2), jnp.broadcast_to(jnp.arange(20), (2, 20)), slots.cache)
        return decode.head(served, x)

    for way in WAYS["float32"]:
        served = relaid(model, "float32", way)
        np.testing.assert_allclose(logits(served), whole, atol=2e-5)
    half = logits(lay_out(model, "bfloat16", 2))
    assert half.dtype == jnp.float32 and np.abs(half - whole).max() < 0.08 * np.abs(whole).max()
    small = quantize(model, embedding=True)
    exact = forward(small_in_f32(small), ids)
    for way, off in {"sum": 1e-4, "split": 5e-3, "split left": 5e-3}.items():  # of logits up to 5
        np.testing.assert_allclose(logits(relaid(small, "float32", way)), exact, atol=off)


def relaid(model, dtype, way):
    """lay_out, were `way` the fastest."""
    before = layout.choose
    layout.choose = lambda groups, dtype, rows: ({names[0]: way for names in groups}, {})
    try:
        return lay_out(model, dtype, 2)
    finally:
        layout.choose = before


def small_in_f32(model):
    """A quantized model's numbers as Params."""
    full = make(model.config)
    for name in MATRICES:
        full.layers.__dict__[name] = getattr(full.layers, name).replace(getattr(model.layers, name)[...])
    full.embed = full.embed.replace(model.embed[...])
    return full


def test_lay_out_leaves_the_model_as_it_is():
    model = make()
    before = jax.tree.map(lambda w: np.array(w), model)
    served = lay_out(model, "bfloat16", 1)
    assert served.embed.dtype == jnp.bfloat16 and model.embed.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, model, before)
    assert len(served.layers) == CONFIG.num_hidden_layers and served.config is model.config
    weights = sum(a.size for a in jax.tree.leaves(served))
    assert weights == sum(a.size for a in jax.tree.leaves(model)) + model.embed.size  # the head is laid out by itself


@pytest.fixture
def nothing_kept(monkeypatch):
    """Times that are made up stay in this process."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


def test_tiny_matrices_are_not_timed_and_large_ones_are(nothing_kept, monkeypatch):
    timed = []
    monkeypatch.setattr(layout, "seconds", lambda *given: timed.append(given[-2:]) or len(timed))
    for dtype in ("float32", "bfloat16"):
        served = lay_out(make(), dtype, 4)
        assert set(served.ways.values()) == {served.head.way} == {WAYS[dtype][0]} and not timed
    assert lay_out(quantize(make()), "float32", 4).layers[0].down.way == WAYS["int8"][0]
    side = math.isqrt(TIMED)
    ways, times = choose({("head",): (numbers(side, side),), ("o",): (numbers(2, side, 1, side - 1),)}, "float32", 4)
    turns = [*WAYS["float32"], "rows", "rows"]  # the others took twice as long
    assert timed == [(way, 4) for way in turns] and ways == {"head": "rows", "o": WAYS["float32"][0]}
    assert times == {"head": {"rows": 1000.0, "left": 2000.0, "columns": 3000.0}}


def test_the_fastest_is_taken(nothing_kept, monkeypatch):
    speed = {"rows": 3.0, "left": 5.0, "columns": 2.0, "sum": 1.0, "split": 4.0, "split left": 6.0}
    monkeypatch.setattr(layout, "seconds", lambda names, weights, dtype, way, rows: speed[way])
    monkeypatch.setattr(layout, "TIMED", 0)
    for dtype, expected in {"float32": "columns", "bfloat16": "sum"}.items():
        served = lay_out(make(), dtype, 3)
        assert served.head.way == served.layers[0].down.way == expected
        for what in ("q/k/v", "o", "gate/up", "down", "head"):
            assert f"{what} {expected} (rows 3000.00 ms" in served.report
    assert lay_out(quantize(make()), "float32", 3).layers[1].q.way == "sum"


@pytest.mark.parametrize(
    "damage", [{}, {"head": {}}, {"head": {"rows": 1.0}}, {"head": {"rows": "fast", "left": 1.0, "columns": 2.0}}]
)
def test_times_that_cannot_be_are_taken_anew(damage, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(layout, "seconds", lambda names, weights, dtype, way, rows: 0.001 * len(way))
    groups = {("head",): (numbers(1, TIMED),)}
    expected = choose(groups, "float32", 4)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(
        file.read_text().replace('"measured"', '"before"')[:-2] + f', "measured": {damage!r}}}'.replace("'", '"')
    )
    assert (
        choose(groups, "float32", 4) == expected and "cannot be used (ValueError); it is measured anew" in caplog.text
    )
    assert expected[0] == {"head": "rows"}


@pytest.mark.parametrize("kind, count", [("float32", 3), ("bfloat16", 6), ("int8", 7)])
def test_seconds_are_of_one_product_of_several(kind, count, monkeypatch):
    weights, asked = tuple(numbers(7, 64, 16, seed=i) for i in range(2)), []
    if kind == "int8":
        weights = tuple(QTensor(*quantized(w, (-2,)), "") for w in weights)
    dtype, once = "float32" if kind == "int8" else kind, layout.once

    def noted(weight, x):
        asked.append((np.asarray(weight.values).tobytes(), weight.outs, x.shape, x.dtype))
        return once(weight, x)

    monkeypatch.setattr(layout, "once", noted)
    monkeypatch.setattr(layout, "READ", 3 * 64 * 32 * 4)
    for way in WAYS[kind]:
        asked.clear()
        assert layout.seconds(("gate", "up"), weights, dtype, way, 5) > 0
        assert {each[1:] for each in asked} == {(((16,), (16,)), (5, 1, 64), jnp.dtype(dtype))}
        values = [each[0] for each in asked]
        assert values == values[:count] * 4 and len(set(values[:count])) == count  # each layer's, in turn
    monkeypatch.setattr(layout, "READ", 1)
    asked.clear()
    assert layout.seconds(("gate", "up"), weights, dtype, WAYS[kind][0], 5) > 0 and len(asked) == 4


@pytest.mark.parametrize(
    "way, kind", [("rows", "f32"), ("left", "f32"), ("columns", "f32"), ("split left", "int8"), ("sum", "int8")]
)
def test_weights_beside_each_other_are_each_its_own(way, kind):
    ws = [numbers(37, n, 10, seed=n) for n in (9, 3, 3)]
    if kind == "int8":
        ws = [QTensor(*quantized(w, (-3,)), "") for w in ws]
    parts, x = [laid(w, (-3,), "float32", way) for w in ws], numbers(2, 3, 37)
    whole, start = layout.beside(parts), 0
    for part in parts:
        mine = layout.Part(whole, start, part.outs).times("", x)
        assert mine.shape == (2, 3, *part.outs)
        np.testing.assert_allclose(mine, part.times("", x), atol=1e-5)
        start += part.outs[0] * part.outs[1]
    assert start == whole.sums(x).shape[-1]
