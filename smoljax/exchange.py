"""The one table between smoljax and every file format, and what a file of any format opens to.

Hugging Face's tensor names and layouts are the common tongue: a format gives, or takes, those tensors one at a time.
Read forward the table imports, read backward it exports. Strict in both directions: every tensor is consumed and every
parameter set. hf.py, gguf.py, nanotron.py and checkpoint.py know one format each.
"""

import functools
import math
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from smoljax.config import Model
from smoljax.errors import DataError, require
from smoljax.model import SmolLM, abstract
from smoljax.quantize import QTensor, quantized

# ours: (Hugging Face's name with {} for the layer, axes there -> axes here). A torch Linear is [out, in]; q and k are
# in half-split ("rotate_half") order there as here, so no row is permuted.
TABLE = {
    "embed": ("model.embed_tokens.weight", "V D -> V D"),
    "layers.attn_norm": ("model.layers.{}.input_layernorm.weight", "D -> D"),
    "layers.q": ("model.layers.{}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    "layers.k": ("model.layers.{}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    "layers.v": ("model.layers.{}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    "layers.o": ("model.layers.{}.self_attn.o_proj.weight", "D (N H) -> N H D"),
    "layers.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "D -> D"),
    "layers.gate": ("model.layers.{}.mlp.gate_proj.weight", "F D -> D F"),
    "layers.up": ("model.layers.{}.mlp.up_proj.weight", "F D -> D F"),
    "layers.down": ("model.layers.{}.mlp.down_proj.weight", "D F -> F D"),
    "norm": ("model.norm.weight", "D -> D"),
}
EMBED = TABLE["embed"][0]
SCALE = "_scale"  # of an int8 tensor, behind its name
DTYPES = ("float32", "bfloat16", "float16")
PIECE = 1 << 20  # numbers that are quantised at a time


def sizes(config: Model) -> dict[str, int]:
    """The letters' sizes."""
    c = config
    return dict(
        V=c.vocab_size,
        D=c.hidden_size,
        F=c.intermediate_size,
        N=c.num_attention_heads,
        K=c.num_key_value_heads,
        H=c.head_dim,
    )


def rows(config: Model):
    """For each array of the model: (its name, Hugging Face's names, the pattern's two sides, their letters' sizes)."""
    for ours, (theirs, pattern) in TABLE.items():
        names = [theirs.format(i) for i in range(config.num_hidden_layers)] if "{}" in theirs else [theirs]
        there, here = pattern.split(" -> ")
        yield ours, names, there, here, {k: v for k, v in sizes(config).items() if k in pattern}


def shapes(config: Model) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name -> shape there, of every tensor, in the table's order."""
    found = {}
    for _, names, there, _, letters in rows(config):
        shape = tuple(math.prod(letters[x] for x in g if x.isalpha()) for g in groups(there))
        found |= dict.fromkeys(names, shape)
    return found


def groups(there: str) -> list[str]:
    """(N H) D -> (N H), D: of a matrix the first are its outputs, the last what a product sums over."""
    return re.findall(r"\(.*?\)|\w", there)


def layout(config: Model, dtype: str, embedding: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of what a Hugging Face folder holds in `dtype`.

    In int8 that is whole numbers for the layers' matrices, and for the embedding where asked for, each followed by its
    scales, one for an output; the rest is bfloat16.
    """
    if dtype != "int8":
        return {name: (dtype, shape) for name, shape in shapes(config).items()}
    found = {}
    for name, shape in shapes(config).items():
        whole = embedding if name == EMBED else len(shape) > 1
        found[name] = "int8" if whole else "bfloat16", shape
        if whole:
            found[name + SCALE] = "float32", shape[:1]
    return found


@dataclass(frozen=True)
class Source:
    """A model's files, opened and checked, but for the numbers: `tensor` reads those, one tensor at a time.

    Raises DataError that names the file and the tensor.
    """

    config: Model
    dtype: str  # the smallest of DTYPES that holds every tensor exactly; int8 where matrices are whole numbers
    get: Callable[[str], np.ndarray]  # by Hugging Face's name, in Hugging Face's layout, in the file's own precision
    name: str  # what was opened, for people
    files: dict[str, bytes] = field(default_factory=dict)  # tokenizer.json and the like: name -> content
    # What an int8 source holds of a tensor by its name: whole numbers [out, in], scales [out]. Such a tensor's `get`
    # gives their product in f32.
    ints: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    ends: tuple[int, ...] = ()  # ids that end a text beside the config's: of a GGUF file, llama.cpp's by their texts

    def tensor(self, name: str, dtype: str | None = None) -> np.ndarray:
        """One tensor, in `dtype` (rounded to nearest where that is narrower) or as the source holds it."""
        array, shape = self.get(name), shapes(self.config)[name]
        if array.shape != shape:
            raise DataError(
                f"{self.name}: tensor {name} has shape {list(array.shape)}, but config.json gives it {list(shape)}"
            )
        if not finite(array):
            raise DataError(f"{self.name}: tensor {name} holds NaN or infinity; the weights are damaged")
        with np.errstate(over="ignore"):  # said below
            cast = array if dtype is None else array.astype(dtype, copy=False)
        if cast is not array and not finite(cast):
            wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
            raise DataError(f"{self.name}: tensor {name} holds numbers beyond {dtype}; convert to {wider}")
        return cast

    def int8(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A tensor's whole numbers [out, in] and f32 scales [out]: as they are held, or made of its numbers."""
        if name in self.ints:
            values, scale = self.ints[name]()
            if not finite(scale) or (scale < 0).any():
                raise DataError(
                    f"{self.name}: tensor {name}{SCALE} holds a number that is no scale, NaN, infinite or negative; "
                    "the weights are damaged"
                )
            return values, scale
        array = self.tensor(name)
        values, scale = np.empty(array.shape, np.int8), np.empty((len(array), 1), np.float32)
        step = max(1, PIECE // array.shape[1])
        for i in range(0, len(array), step):
            values[i : i + step], scale[i : i + step] = quantized(array[i : i + step])
        return values, scale[:, 0]


def finite(array: np.ndarray) -> bool:
    """No NaN, no infinity; by the exponent's bits, a few MB at a time, whatever the tensor's size."""
    bits, mask = {
        "float32": (np.uint32, 0x7F800000),
        "bfloat16": (np.uint16, 0x7F80),
        "float16": (np.uint16, 0x7C00),
    }[array.dtype.name]
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    step = 1 << 20
    return not any((flat[i : i + step] & mask == mask).any() for i in range(0, len(flat), step))


def widest(dtypes) -> str:
    """The smallest of DTYPES that holds each of these exactly: their own where they agree, else float32."""
    return dtypes.pop() if len(dtypes := set(dtypes)) == 1 else "float32"


def assemble(source: Source, dtype: str | None = None) -> SmolLM:
    """The model, in `dtype` or the source's; at its peak the model, twice its largest array and four tensors in memory.

    From an int8 source, where no dtype is given, what it holds in int8 is a QTensor.
    """
    require(dtype in (None, *DTYPES), f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    model, plain = abstract(source.config), dtype or ("bfloat16" if source.ints else source.dtype)
    for ours, names, there, here, letters in rows(source.config):
        *parents, leaf = ours.split(".")
        parent = functools.reduce(getattr, parents, model)
        param = getattr(parent, leaf)
        gathered = functools.partial(gather, names, f"{there} -> {here}", stacked=bool(parents))
        if dtype is None and names[0] in source.ints:
            values = gathered(lambda name: source.int8(name)[0], letters, "int8")
            ones = letters | dict.fromkeys(filter(str.isalpha, groups(there)[-1]), 1)
            scale = gathered(lambda name: source.int8(name)[1][:, None], ones, "float32")
            setattr(parent, leaf, QTensor(values, scale, param.dims))
        else:
            setattr(parent, leaf, param.replace(gathered(lambda name: source.tensor(name, plain), letters, plain)))
    return model


def gather(names: list[str], pattern: str, get: Callable, letters: dict[str, int], dtype: str, stacked: bool):
    """One array of the model from Hugging Face's tensors, as many at a time as there are cores, and at most four."""
    first = rearrange(get(names[0]), pattern, **letters)
    array = np.empty((len(names), *first.shape), dtype)
    array[0] = first

    def place(i: int):
        array[i] = rearrange(get(names[i]), pattern, **letters)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(place, range(1, len(names))))
    return jnp.asarray(array if stacked else array[0])


def disassemble(config: Model, array: Callable[[str], np.ndarray], scales: bool = False) -> Callable[[str], np.ndarray]:
    """A Source's `get` from a model's arrays by our names ("layers.q"); the last array is kept, for its layers.

    scales: the arrays are those of QTensors.
    """
    where = {}
    for ours, names, there, here, letters in rows(config):
        if scales:
            letters |= dict.fromkeys(filter(str.isalpha, groups(there)[-1]), 1)
        for layer, name in enumerate(names):
            where[name] = ours, layer if "layers." in ours else ..., f"{here} -> {there}", letters
    array, lock = functools.lru_cache(maxsize=1)(array), threading.Lock()

    def get(name: str) -> np.ndarray:
        ours, layer, pattern, letters = where[name]
        with lock:  # or several layers would each load it
            whole = array(ours)
        return np.ascontiguousarray(rearrange(whole[layer], pattern, **letters))

    return get


def of_model(model: SmolLM, config: Model, files: dict[str, bytes] | None = None, name: str = "the model") -> Source:
    """A model in memory as a Source."""
    params = {ours: functools.reduce(getattr, ours.split("."), model) for ours in TABLE}
    get = disassemble(config, lambda ours: np.asarray(params[ours][...]))
    whole = {ours for ours, param in params.items() if isinstance(param, QTensor)}
    if not whole:
        return Source(config, widest(str(p.dtype) for p in params.values()), get, name, files or {})
    values = disassemble(config, lambda ours: np.asarray(params[ours].values))
    scale = disassemble(config, lambda ours: np.asarray(params[ours].scale), scales=True)
    ints = {
        n: lambda n=n: (values(n), scale(n)[:, 0]) for ours, names, *_ in rows(config) if ours in whole for n in names
    }
    return Source(config, "int8", get, name, files or {}, ints)
