"""A model laid out for inference: its layers apart, each matrix in the form that multiplies fastest here.

A slice of stacked layers is a copy, which costs nothing beside training's products and as much as decoding's own. And
what is fastest depends on processor, dtype and rows at a time, by up to a hundred times on a CPU (docs/benchmarks), so
there the forms are timed on the model's own matrices the first time that it is laid out (forms.py keeps what was
found): on several layers', for one alone would stay in the processor's cache, where another form is the fastest.
Elsewhere XLA lays out for itself.
"""

import functools
import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from smoljax import forms
from smoljax.config import Model
from smoljax.quantize import MATRICES, QTensor, quantized

READ, MOST = 1 << 25, 8  # bytes of matrices, and how many, that a form is timed on; a single one of any size
TIMED = 1 << 18  # numbers of a matrix below which any form will do
FEW = 64  # rows up to which "sum" and "left" are so: a prompt's are "rows"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["way", "outs"])
@dataclass
class Laid:
    """A weight as a matrix, and the way to multiply with it.

    rows        [outputs, inputs], a matrix product
    left        the same numbers, but as the product's first factor, which XLA's CPU products do not rearrange
    columns     [inputs, outputs], a matrix product
    sum         [outputs, inputs], multiplied and summed as one loop, in f32
    split       int8 [outputs, inputs]; x becomes int8 too, in two parts that hold 15 bits of each row: x is off by
                at most 2e-5 of the row's largest, and sums are exact. CPUs have instructions for products of int8
    split left  the same, with the weight as the first factor
    """

    values: jax.Array
    scale: jax.Array | None  # f32, one an output, of int8 values
    way: str
    outs: tuple  # the outputs' sizes; of several weights beside each other, a tuple of those

    def times(self, form: str, x):
        """As product.product; what x is summed over are its axes behind B and T."""
        return self.sums(x).astype(x.dtype).reshape(*x.shape[:2], *self.outs)

    def sums(self, x):
        """The same in f32, as logits are; outputs as one axis."""
        lead = x.shape[:2]
        x = x.reshape(math.prod(lead), -1)
        M, cpu = len(x), jax.default_backend() == "cpu"
        split = self.way.startswith("split")
        if M == 1 and cpu and not split and (self.way == "sum" or x.dtype == jnp.bfloat16):
            x = jnp.concatenate([x, x])  # XLA has no fast code for one row: a bf16 product takes 15 times as long
        if self.way == "sum" and M <= FEW:
            y = jnp.sum(x.astype(jnp.float32)[:, None] * self.values.astype(jnp.float32), axis=-1)
        elif split:
            y = split_product(x.astype(jnp.float32), self.values, self.way.removeprefix("split "))
        else:
            y = contracted(x, self.values.astype(x.dtype), self.way, jnp.float32)
        y = y[:M]
        y = y if self.scale is None else y * self.scale
        return y.reshape(*lead, -1)


def contracted(x, values, way: str, sums):  # MK NK (columns: KN) -> MN
    """The matrix product, its sums in that dtype."""
    if way == "left" and len(x) <= FEW:
        y = jax.lax.dot_general(values, x, (((1,), (1,)), ((), ())), preferred_element_type=sums)
        return jax.lax.optimization_barrier(y).T  # or XLA exchanges the factors again to be rid of the transpose
    dims = (((1,), (0 if way == "columns" else 1,)), ((), ()))
    return jax.lax.dot_general(x, values, dims, preferred_element_type=sums)


def split_product(x, values, way: str):  # MK NK -> MN
    """x times int8 values, x as hi + lo / 254, both int8, times a scale a row."""
    M = len(x)
    high, scale = quantized(x)
    low = jnp.round((x / jnp.where(scale == 0, 1, scale) - high) * 254).astype(jnp.int8)
    parts = jnp.concatenate([high, low])
    y = contracted(parts, values, way, jnp.int32)
    return (y[:M].astype(jnp.float32) + y[M:].astype(jnp.float32) / 254) * scale


WAYS = {
    "float32": ("rows", "left", "columns"),
    "bfloat16": ("rows", "left", "columns", "sum"),
    "int8": ("split", "split left", "sum"),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["embed", "layers", "norm", "head"],
    meta_fields=["config", "dtype"],
)
@dataclass
class Served:
    """A SmolLM as decode.py takes it."""

    embed: jax.Array | QTensor
    layers: tuple  # of Block, one a layer, with Laid in place of its matrices
    norm: jax.Array
    head: Laid
    config: Model
    dtype: str  # of the arithmetic

    # No fields, for programs do not depend on them:
    ways = {}  # of each product, by its first weight's name
    report = ""  # what was chosen, and the times of it or where it was found

    def look_up(self, tokens):  # BT -> BTD
        if isinstance(self.embed, QTensor):
            x = self.embed.values[tokens].astype(jnp.float32) * self.embed.scale[tokens]
        else:
            x = self.embed[tokens]
        return x.astype(self.dtype)


def lay_out(model, dtype: str, rows: int, ways: dict[str, str] | None = None) -> Served:
    """Args:
    model: a SmolLM, its matrices of any dtype or int8 (QTensor).
    dtype: of the arithmetic, and so of the matrices that are not int8.
    rows: that decode at a time, for which the forms are timed.
    ways: a Served's, so that nothing is timed and sums are rounded as there.
    """
    embed = model.embed if isinstance(model.embed, QTensor) else model.embed[...].astype(dtype)
    groups = {names: tuple(getattr(model.layers, name) for name in names) for names in GROUPS} | {("head",): (embed,)}
    ways, times = (ways, {}) if ways else choose(groups, dtype, rows)
    rest = jax.tree.map(lambda w: w, model.layers)
    for name in MATRICES:
        setattr(rest, name, None)
    layers = [of_layer(rest, jnp.int32(i)) for i in range(model.config.num_hidden_layers)]
    for names in GROUPS:
        for i, block in enumerate(layers):
            laid_out = one_form(groups[names], jnp.int32(i), axes_of(names), dtype, ways[names[0]])
            setattr(block, names[0], laid_out)
    head = one_form((embed,), None, (-1,), dtype, ways["head"])
    served = Served(embed, tuple(layers), model.norm[...], head, model.config, dtype)
    said = [f"{'/'.join(names)} {ways[names[0]]}{told(times.get(names[0]))}" for names in groups]
    served.ways, served.report = ways, f"{rows} rows: {', '.join(said)}"
    return served


def told(times: dict[str, float] | None) -> str:
    return f" ({', '.join(f'{way} {ms:.2f} ms' for way, ms in times.items())})" if times else ""


def axes_of(names: tuple[str, ...]) -> tuple[int, ...]:
    return MATRICES.get(names[0], (-1,))


@jax.jit
def of_layer(layers, i):
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), layers)


@functools.partial(jax.jit, static_argnames=("axes", "dtype", "way"))
def one_form(weights: tuple, i, axes: tuple[int, ...], dtype: str, way: str) -> Laid:
    """Weights beside each other as one, of layer i, or where that is None of none: a program for all layers."""
    each = weights if i is None else of_layer(weights, i)
    return beside([laid(w, axes, dtype, way) for w in each])


GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # one product each: the first of them holds all


def beside(weights: list[Laid]) -> Laid:
    """Weights of the same inputs as one."""
    if len(weights) == 1:
        return weights[0]
    axis = 1 if weights[0].way == "columns" else 0
    scale = None if weights[0].scale is None else jnp.concatenate([w.scale for w in weights])
    values = jnp.concatenate([w.values for w in weights], axis)
    return Laid(values, scale, weights[0].way, tuple(w.outs for w in weights))


@dataclass
class Part:
    """One of several weights beside each other, while a program is traced: XLA finds that their product is the same."""

    whole: Laid
    start: int
    outs: tuple[int, ...]

    def times(self, form: str, x):
        y = self.whole.sums(x)[..., self.start : self.start + math.prod(self.outs)]
        return y.astype(x.dtype).reshape(*x.shape[:2], *self.outs)


def spread(block):
    """A layer as model.Block has it, its weights apart, in a program that is traced."""
    block = jax.tree.map(lambda w: w, block, is_leaf=lambda w: isinstance(w, Laid))
    for names in GROUPS:
        if len(names) == 1:
            continue
        whole, start = getattr(block, names[0]), 0
        for name, outs in zip(names, whole.outs, strict=True):
            setattr(block, name, Part(whole, start, outs))
            start += math.prod(outs)
    return block


def laid(w, axes: tuple[int, ...], dtype: str, way: str) -> Laid:
    """axes: those that a product sums over, as in quantize.MATRICES."""
    values, scale = (w.values, w.scale) if isinstance(w, QTensor) else (w[...].astype(dtype), None)
    summed = [axis % values.ndim for axis in axes]
    rest = [axis for axis in range(values.ndim) if axis not in summed]
    outs = tuple(values.shape[axis] for axis in rest)
    K, N = (math.prod(values.shape[axis] for axis in group) for group in (summed, rest))
    order, shape = (summed + rest, (K, N)) if way == "columns" else (rest + summed, (N, K))
    return Laid(values.transpose(order).reshape(shape), None if scale is None else scale.reshape(N), way, outs)


def choose(groups: dict, dtype: str, rows: int) -> tuple[dict, dict]:
    """(the way of each group by its first weight's name, the milliseconds of the ways that were timed)."""
    ways = {names[0]: default(names, weights, dtype) for names, weights in groups.items()}
    timed = {names: weights for names, weights in groups.items() if ways[names[0]] is None}
    if not timed:
        return ways, {}
    what = {"dtype": dtype, "rows": rows}
    what["matrices"] = {
        "/".join(names): [(str(w.dtype), list(w.shape)) for w in group] for names, group in timed.items()
    }

    def measure() -> dict:
        return {names[0]: milliseconds(names, weights, dtype, rows) for names, weights in timed.items()}

    def fits(times: dict) -> bool:
        each = {names[0]: set(candidates(weights, dtype)) for names, weights in timed.items()}
        numbers = all(isinstance(ms, float) and ms > 0 for group in times.values() for ms in dict(group).values())
        return numbers and {name: set(group) for name, group in times.items()} == each

    times = forms.kept(what, measure, fits)
    return ways | {name: min(each, key=each.get) for name, each in times.items()}, times


def default(names, weights: tuple, dtype: str) -> str | None:
    """The way that needs no timing: XLA's own on an accelerator, any for a small matrix; None where it is timed."""
    if jax.default_backend() != "cpu":
        return "rows" if names == ("head",) else "columns"
    size = math.prod(weights[0].shape[names != ("head",) :])
    return candidates(weights, dtype)[0] if size < TIMED else None


def candidates(weights: tuple, dtype: str) -> tuple[str, ...]:
    return WAYS["int8" if isinstance(weights[0], QTensor) else dtype]


def milliseconds(names, weights: tuple, dtype: str, rows: int) -> dict[str, float]:
    times = {way: math.inf for way in candidates(weights, dtype)}
    for _ in range(3):  # in turn, for others may be at work for a moment
        for way in times:
            if times[way] == math.inf or times[way] < 2 * min(times.values()):
                times[way] = min(times[way], 1e3 * seconds(names, weights, dtype, way, rows))
    return times


def seconds(names, weights: tuple, dtype: str, way: str, rows: int) -> float:
    """Of a product with one group, behind the one before; the best of three."""
    axes, head = axes_of(names), names == ("head",)
    first = one_form(weights, None if head else jnp.int32(0), axes, dtype, way)
    count = 1 if head else max(1, min(MOST, weights[0].shape[0], READ // first.values.nbytes))
    laid_out = [first, *(one_form(weights, jnp.int32(i), axes, dtype, way) for i in range(1, count))]
    inputs = first.values.shape[0 if way == "columns" else 1]
    x, taken = jnp.ones((rows, 1, inputs), dtype), []
    jax.block_until_ready(laid_out)
    for _ in range(4):
        begun, y = time.perf_counter(), x
        for weight in laid_out:
            y = once(weight, y)
        y.block_until_ready()
        taken.append(time.perf_counter() - begun)
    return min(taken[1:]) / count  # the first one compiled


@jax.jit
def once(weight: Laid, x):
    y = jax.lax.optimization_barrier(weight.sums(x))  # else XLA would compute that one output alone
    return x + y[..., :1].astype(x.dtype) * 1e-3
