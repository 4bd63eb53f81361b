"""SmolLM: a pre-norm Llama decoder with grouped-query attention, rotary positions, SwiGLU and tied embeddings.

The alphabet. Each letter names one axis everywhere: in shapes, einsums, sharding.py's tables and hf.py's patterns.

    B batch   T query position   S key position   D hidden   F mlp hidden   V vocabulary   L layers
    N query heads   K key/value heads   G query heads per key/value head (N = K*G)   H head size

Eleven arrays make the model; the layers' nine are stacked along L and scanned, so compile time does not grow with
depth. Modules are plain pytrees: jax.jit, jax.grad, optax and Orbax take them as they are. Next: loss.py, step.py.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from smoljax import rope
from smoljax.attention import attend, choose
from smoljax.config import REMAT, Compute, Model
from smoljax.product import product
from smoljax.quantize import QTensor
from smoljax.sharding import constrain, is_variable


def weight(dims: str, sizes: dict, rngs: nnx.Rngs, std: float) -> nnx.Param:
    """A normal f32 weight that carries its axes' letters wherever tree maps take it."""
    shape = tuple(sizes[letter] for letter in dims)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), dims=dims)


def ones(dims: str, sizes: dict) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(sizes[letter] for letter in dims), jnp.float32), dims=dims)


def rms_norm(x, scale, eps: float):  # BTD D -> BTD
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def silu(x):  # BTF -> BTF, f32 inside
    y = x.astype(jnp.float32)
    return (y * jax.nn.sigmoid(y)).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, config: Model, std: float, rngs: nnx.Rngs):
        c = config
        self.eps = c.rms_norm_eps
        sizes = dict(D=c.hidden_size, F=c.intermediate_size, H=c.head_dim)
        sizes |= dict(N=c.num_attention_heads, K=c.num_key_value_heads)
        out = std * (2 * c.num_hidden_layers) ** -0.5  # what adds to the residual stream starts smaller (GPT-2)
        self.attn_norm = ones("D", sizes)
        self.q = weight("DNH", sizes, rngs, std)
        self.k = weight("DKH", sizes, rngs, std)
        self.v = weight("DKH", sizes, rngs, std)
        self.o = weight("NHD", sizes, rngs, out)
        self.mlp_norm = ones("D", sizes)
        self.gate = weight("DF", sizes, rngs, std)
        self.up = weight("DF", sizes, rngs, std)
        self.down = weight("FD", sizes, rngs, out)

    def __call__(self, x, angles, attention):  # BTD -> BTD, and what the attention keeps
        y = rms_norm(x, self.attn_norm, self.eps)
        q = rope.rotate(product("BTD,DNH->BTNH", y, self.q), angles)
        k = rope.rotate(product("BTD,DKH->BTKH", y, self.k), angles)
        v = product("BTD,DKH->BTKH", y, self.v)
        y, kept = attention(*(checkpoint_name(a, "qkv") for a in (q, k, v)))
        x = constrain(x + checkpoint_name(product("BTNH,NHD->BTD", y, self.o), "attn_out"), "BTD")

        y = rms_norm(x, self.mlp_norm, self.eps)
        gate = checkpoint_name(product("BTD,DF->BTF", y, self.gate), "gate_up")
        up = checkpoint_name(product("BTD,DF->BTF", y, self.up), "gate_up")
        return constrain(x + product("BTF,FD->BTD", silu(gate) * up, self.down), "BTD"), kept


class SmolLM(nnx.Module):
    """`model(tokens)` gives f32 logits BTV from int tokens BT. A token id outside the vocabulary gives NaN."""

    def __init__(self, config: Model, rngs: nnx.Rngs, init_std: float = 0.02):
        self.config = config
        sizes = dict(V=config.vocab_size, D=config.hidden_size)
        self.embed = weight("VD", sizes, rngs, init_std)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = jax.vmap(lambda key: Block(config, init_std, nnx.Rngs(params=key)))(keys)
        self.norm = ones("D", sizes)

    def __call__(self, tokens, segments=None, compute: Compute = Compute()):  # BT -> BTV
        return self.logits(self.trunk(tokens, segments, compute))

    def trunk(self, tokens, segments=None, compute: Compute = Compute()):  # BT -> BTD
        """All but the head: the last norm's output.

        segments: BT document numbers 1, 2, ... within each row: a document sees itself alone, and its positions start
        at 0. None: plain causal attention over the row, SmolLM's own recipe.
        """
        c, dtype = self.config, jnp.dtype(compute.dtype)
        starts = None if segments is None else document_starts(segments)
        backend, _ = choose(compute, tokens.shape[1], starts is not None)
        positions = jnp.arange(tokens.shape[1])[None] - (0 if starts is None else starts)
        angles = rope.angles(positions, c.head_dim, c.rope_theta)
        # The embedding is read in its own precision: the gradient's scatter-add over a batch must not round to bf16.
        x = constrain(look_up(constrain(self.embed[...], "VD"), tokens).astype(dtype), "BTD")

        def layer(x, block):
            return block(x, angles, lambda q, k, v: (attend(q, k, v, starts, backend), None))

        if compute.remat in REMAT:
            policy = jax.checkpoint_policies.save_only_these_names(*REMAT[compute.remat])
            # Forward and backward are two loops, between which XLA merges nothing, unless fully unrolled.
            layer = jax.checkpoint(layer, prevent_cse=compute.unroll >= c.num_hidden_layers, policy=policy)
        x, _ = jax.lax.scan(layer, x, cast(self.layers, dtype), unroll=min(compute.unroll, c.num_hidden_layers))
        return rms_norm(x, self.norm, c.rms_norm_eps)

    def logits(self, x):  # BTD -> BTV
        """The tied head, in x's dtype with f32 sums."""
        embed = constrain(self.embed[...].astype(x.dtype), "VD")
        return constrain(jnp.einsum("BTD,VD->BTV", x, embed, preferred_element_type=jnp.float32), "BTV")


def cast(tree, dtype):
    """The matrices in the dtype that they are multiplied in; norms' scales stay f32, as rms_norm multiplies them."""

    def one(w):
        return w.replace(w[...].astype(dtype)) if is_variable(w) and len(w.dims) > 1 else w

    return jax.tree.map(one, tree, is_leaf=lambda w: is_variable(w) or isinstance(w, QTensor))


def look_up(embed, tokens):  # VD BT -> BTD
    return embed.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def abstract(config: Model) -> SmolLM:
    """The model's shapes, without its weights."""
    return jax.tree.map(lambda shape: shape, traced(config))  # a module of its own, which may be changed


@functools.cache
def traced(config: Model) -> SmolLM:
    return jax.eval_shape(lambda: SmolLM(config, nnx.Rngs(params=0)))  # 56 ms, and a plan asks hundreds of times


def document_starts(segments):  # BT -> BT, the place in its row where each token's document begins
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1]), 0), axis=1)
