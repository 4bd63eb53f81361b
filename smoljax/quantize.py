"""int8: a weight as whole numbers from -127 to 127 and an f32 scale for each of its outputs.

Symmetric and rounded to nearest: w = values * scale, scale = the largest of an output's weights / 127, so that a
weight is at most half a step off. Embedding and norms keep their dtype, as the model cards' "int8" has it (135M:
162.86 MB and the scales), unless the embedding is asked for too. The cache of keys and values is made the same way, a
scale for each place and head.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

TINY = np.finfo(np.float32).tiny  # below it XLA's CPU programs have 0
MATRICES = {"q": (-3,), "k": (-3,), "v": (-3,), "o": (-3, -2), "gate": (-2,), "up": (-2,), "down": (-2,)}
"""The layers' matrices, and the axes of each that a product sums over; an output is what is left."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["dims"])
@dataclass
class QTensor:
    """A weight in int8: whole numbers in the model's own order of axes, and scales of size 1 in the summed ones.

    Layers may be stacked in front, as of a Param: dims are one layer's letters.
    """

    values: jax.Array  # int8
    scale: jax.Array  # f32
    dims: str

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def times(self, form: str, x):
        """As product.product: multiplied in x's dtype, which holds the whole numbers exactly, then scaled in f32."""
        y = jnp.einsum(form, x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * self.scale.reshape(y.shape[2:])).astype(x.dtype)

    def __getitem__(self, index):
        """The weight in f32: `[...]` as of a Param."""
        return (self.values.astype(jnp.float32) * self.scale)[index]


def quantized(x, axes=(-1,)):
    """(int8 values, f32 scales with size 1 in `axes`) of numbers: values * scale is x, rounded to half a step.

    The same bits from NumPy, for an array of its own, as from JAX on a CPU: by products, for XLA's quotient of an array
    and a number is one with its inverse. A scale too small for a normal number is 0.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    x = x.astype(xp.float32)
    scale = xp.max(xp.abs(x), axis=axes, keepdims=True) * np.float32(1 / 127)
    scale = xp.where(scale < TINY, 0, scale)
    return xp.round(x * (1 / xp.where(scale == 0, 1, scale))).astype(xp.int8), scale


def dequantized(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """NumPy's values * scale in f32; an absurd scale gives infinity, which is no warning."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32) * scale


def quantize(model, embedding: bool = False):
    """A copy of a SmolLM with its layers' matrices in int8, and the embedding where asked for."""
    model = jax.tree.map(lambda w: w, model)

    def one(w, axes):
        return QTensor(*quantized(w[...], axes), w.dims)

    for name, axes in MATRICES.items():
        setattr(model.layers, name, one(getattr(model.layers, name), axes))
    if embedding:
        model.embed = one(model.embed, (-1,))
    return model
