"""The one table between smoljax and every file format, and what a file of any format opens to.

Hugging Face's tensor names and layouts are the common tongue: a format gives, or takes, those tensors one at a time.
Read forward the table imports, read backward it exports. Strict in both directions: every tensor is consumed and every
parameter set. hf.py, gguf.py, nanotron.py and checkpoint.py know one format each.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from smoljax.config import Model
from smoljax.errors import DataError, require
from smoljax.model import SmolLM, abstract

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
DTYPES = ("float32", "bfloat16", "float16")


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
        groups = re.findall(r"\(.*?\)|\w", there)  # "(N H) D" -> [N * H, D]
        found |= dict.fromkeys(names, tuple(math.prod(letters[x] for x in g if x.isalpha()) for g in groups))
    return found


@dataclass(frozen=True)
class Source:
    """A model's files, opened and checked, but for the numbers: `tensor` reads those, one tensor at a time.

    Raises DataError that names the file and the tensor.
    """

    config: Model
    dtype: str  # the smallest of DTYPES that holds every tensor exactly
    get: Callable[[str], np.ndarray]  # by Hugging Face's name, in Hugging Face's layout, in the file's own precision
    name: str  # what was opened, for people
    files: dict[str, bytes] = field(default_factory=dict)  # tokenizer.json and the like: name -> content

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
            raise DataError(f"{self.name}: tensor {name} holds numbers beyond {dtype}; convert to bfloat16 or float32")
        return cast


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
    """The model, in `dtype` or the source's; at its peak the model and twice its largest array are in memory."""
    require(dtype in (None, *DTYPES), f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    model, dtype = abstract(source.config), dtype or source.dtype
    for ours, names, there, here, letters in rows(source.config):
        *parents, leaf = ours.split(".")
        parent = functools.reduce(getattr, parents, model)
        param = getattr(parent, leaf)
        array = np.empty(param.shape, dtype)
        for layer, name in zip(array if parents else array[None], names, strict=True):
            layer[...] = rearrange(source.tensor(name, dtype), f"{there} -> {here}", **letters)
        setattr(parent, leaf, param.replace(jnp.asarray(array)))
    return model


def disassemble(config: Model, array: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """A Source's `get` from a model's arrays by our names ("layers.q"); the last array is kept, for its layers."""
    where = {}
    for ours, names, there, here, letters in rows(config):
        for layer, name in enumerate(names):
            where[name] = ours, layer if "layers." in ours else ..., f"{here} -> {there}", letters
    array = functools.lru_cache(maxsize=1)(array)

    def get(name: str) -> np.ndarray:
        ours, layer, pattern, letters = where[name]
        return np.ascontiguousarray(rearrange(array(ours)[layer], pattern, **letters))

    return get


def of_model(model: SmolLM, config: Model, files: dict[str, bytes] | None = None, name: str = "the model") -> Source:
    """A model in memory as a Source."""

    def array(ours):
        return np.asarray(functools.reduce(getattr, ours.split("."), model)[...])

    dtype = widest(str(functools.reduce(getattr, ours.split("."), model).dtype) for ours in TABLE)
    return Source(config, dtype, disassemble(config, array), name, files or {})
