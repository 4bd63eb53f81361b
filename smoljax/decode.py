"""Generation on the device: slots of a batch, a prompt into a slot, rounds of new tokens.

Each slot writes keys and values at its own places: a token overwrites what an earlier row left there, and a query sees
no place after its own. So a row's tokens depend on its prompt and seed alone, not on the batch that it is in.

A round feeds each row's last token and k drafts of what may follow (speculate.py; none where k = 0), and takes the
model's own choices for as long as the drafts were those: with drafts or without, the same tokens. (A product of another
shape rounds otherwise, which may turn a near tie in bf16.) Next: engine.py.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from smoljax import rope
from smoljax.attention import attend_cached
from smoljax.config import Model
from smoljax.layout import Served, spread
from smoljax.model import rms_norm
from smoljax.quantize import quantized
from smoljax.sampling import DAMAGED, NONE, Sampling, logprobs, sample
from smoljax.speculate import draft_tokens


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """A layer's keys, (BK)HS, and values, (BK)SH, of the places seen so far; in int8 with scales of each, (BK)S.

    Rows and heads are one axis, as in the products: XLA's CPU compiler copies a cache that it must see in two shapes.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @staticmethod
    def zeros(config: Model, rows: int, places: int, dtype: str) -> "Cache":
        heads, H = rows * config.num_key_value_heads, config.head_dim
        scales = [jnp.zeros((heads, places)) for _ in "kv"] if dtype == "int8" else [None, None]
        return Cache(jnp.zeros((heads, H, places), dtype), jnp.zeros((heads, places, H), dtype), *scales)

    def attend(self, q, k, v, rows, positions):  # BTNH BTKH BTKH B BT -> BTNH
        """These keys and values at their places in these rows, then the queries' attention there; and the cache.

        rows None: all of them, in order, which then need not be copied.
        """
        B, T, K, _ = k.shape
        k_scale = v_scale = None
        if self.k_scale is not None:
            (k, k_scale), (v, v_scale) = quantized(k), quantized(v)
            k_scale, v_scale = (
                write(a, b[..., 0], rows, positions, 2) for a, b in ((self.k_scale, k_scale), (self.v_scale, v_scale))
            )
        cache = Cache(write(self.k, k, rows, positions, 3), write(self.v, v, rows, positions, 2), k_scale, v_scale)
        seen = cache
        if rows is not None:
            heads = (rows[:, None] * K + jnp.arange(K)).reshape(-1)
            seen = jax.tree.map(lambda a: a[heads], cache)
        return attend_cached(q, seen.k, seen.v, positions, seen.k_scale, seen.v_scale), cache


def write(cache, new, rows, positions, axis: int):  # (BK)... BTK... B BT
    """The cache with new numbers at their rows and places, which are counted along `axis` of BK...

    A place beyond the cache is padding's or a draft's, and dropped; so is a row beyond it.
    """
    B, T, K = new.shape[:3]
    if rows is None and B == T == 1:  # in place, where a scatter of one index would be a copy; a row at work is within
        new = jnp.expand_dims(new[0, 0], axis - 1).astype(cache.dtype)
        return jax.lax.dynamic_update_slice_in_dim(cache, new, positions[0, 0], axis - 1)
    rows = jnp.arange(B) if rows is None else rows
    split = cache.reshape(-1, K, *cache.shape[1:])
    at = (rows[:, None], *[slice(None)] * (axis - 1), positions)
    return split.at[at].set(new.astype(cache.dtype)).reshape(cache.shape)


@jax.tree_util.register_dataclass
@dataclass
class Slots:
    """What the device knows of each row at work. A row's last token is not in the cache yet: it is to be fed."""

    cache: tuple[Cache, ...]
    token: jax.Array  # B
    position: jax.Array  # B, where that token goes
    left: jax.Array  # B, how many more tokens the row may have; 0: it is done, or the slot is free
    made: jax.Array  # B, how many it has
    seed: jax.Array  # B
    prompt: jax.Array | None  # BV, whether a token is in the prompt; where penalties need it
    given: jax.Array | None  # BV, how often a token was given
    history: jax.Array | None  # BS, prompt and tokens; where drafts are made
    draft: tuple[Cache, ...] | None  # the draft model's cache

    @staticmethod
    def empty(model: Served, rows: int, places: int, cache: str, how: Sampling, look_up: bool, draft: Served | None):
        V, zero = model.config.vocab_size, jnp.zeros(rows, jnp.int32)
        counts = [jnp.zeros((rows, V), bool), jnp.zeros((rows, V), jnp.int32)] if how.counts else [None, None]

        def caches(model):
            c = model.config
            return tuple(Cache.zeros(c, rows, places, cache) for _ in range(c.num_hidden_layers))

        history = jnp.zeros((rows, places), jnp.int32) if look_up else None
        mine = caches(draft) if draft else None
        zeros = [jnp.zeros_like(zero) for _ in range(4)]
        return Slots(caches(model), *zeros, jnp.zeros(rows, jnp.uint32), *counts, history, mine)


def resized(slots: Slots, places: int) -> Slots:
    """More places, or fewer where those left out hold nothing that is needed. The slots given are used up.

    Layer by layer, so that the old cache goes as the new one comes: both at once would be twice the memory.
    """

    def moved(layers: list[Cache]):
        for i, c in enumerate(layers):
            scales = [None if a is None else fitted(a, places, 1) for a in (c.k_scale, c.v_scale)]
            layers[i] = Cache(fitted(c.k, places, 2), fitted(c.v, places, 1), *scales)
        return tuple(layers)

    cache, draft = list(slots.cache), slots.draft and list(slots.draft)
    slots.cache = slots.draft = None
    history = None if slots.history is None else fitted(slots.history, places, 1)
    return replace(slots, cache=moved(cache), draft=draft and moved(draft), history=history)


@functools.partial(jax.jit, static_argnames=("places", "axis"))
def fitted(a, places: int, axis: int):
    a = jax.lax.slice_in_dim(a, 0, min(places, a.shape[axis]), axis=axis)
    return jnp.pad(a, [(0, places - a.shape[i] if i == axis else 0) for i in range(a.ndim)])


def trunk(model: Served, tokens, rows, positions, cache):  # BT B BT -> BTD
    """The last norm's output for tokens at their places in these rows, and the cache that holds them."""
    c, x, kept = model.config, model.look_up(tokens), []
    angles = rope.angles(positions, c.head_dim, c.rope_theta)
    for block, layer in zip(model.layers, cache, strict=True):
        x, layer = through(block, layer, x, angles, rows, positions)
        kept.append(layer)
    return rms_norm(x, model.norm, c.rms_norm_eps), tuple(kept)


@jax.jit
def through(block, layer: Cache, x, angles, rows, positions):
    """x behind a layer, and the layer's cache. Traced once, not for each layer."""
    return spread(block)(x, angles, functools.partial(layer.attend, rows=rows, positions=positions))


def head(model: Served, x):  # BTD -> BTV
    return model.head.sums(x)


def extended(model: Served, draft: Served | None, slots: Slots, tokens, offsets, rows):
    """A piece of each prompt in its row's cache, and the draft model's."""
    positions = offsets[:, None] + jnp.arange(tokens.shape[1])
    x, cache = trunk(model, tokens, rows, positions, slots.cache)
    mine = trunk(draft, tokens, rows, positions, slots.draft)[1] if draft else None
    return x, replace(slots, cache=cache, draft=mine)


def judged(model: Served, x, following, top: int):  # BTD BT -> BT BTn BTn
    """sampling.logprobs of the tokens of a prompt that follow x. For about 1,024 at a time: logits are 200 kB each."""
    B, T = following.shape
    size = min(T, max(1, 1 << (1024 // B).bit_length() - 1))  # a power of two, as T is

    def one(part):
        x, ids = part
        found = logprobs(head(model, x).reshape(B * size, -1), ids.reshape(-1), top)
        return tuple(a.reshape(B, size, *a.shape[1:]) for a in found)

    parts = tuple(a.reshape(B, T // size, size, *a.shape[2:]).swapaxes(0, 1) for a in (x, following))
    return tuple(a.swapaxes(0, 1).reshape(B, T, *a.shape[3:]) for a in jax.lax.map(one, parts))


@functools.partial(jax.jit, static_argnames="top", donate_argnames="slots")
def extend(model: Served, draft: Served | None, slots: Slots, tokens, following, offsets, rows, top):  # BT BT B B
    """All but the last piece of prompts too long for one: (slots, logprobs of the tokens `following` these)."""
    x, slots = extended(model, draft, slots, tokens, offsets, rows)
    return slots, None if following is None else judged(model, x, following, top)


@functools.partial(jax.jit, static_argnames=("how", "eos"), donate_argnames="slots")
def begin(
    model: Served,
    draft,
    slots: Slots,
    tokens,
    following,
    offsets,
    rows,
    lengths,
    seeds,
    limits,
    prompt,
    history,
    how,
    eos,
):
    """The last piece of each prompt, padded on the right, and its first new token.

    Gives (slots, B tokens, their logprobs, those of the tokens that follow the prompt's).
    The head, a third of the 135M's arithmetic, is applied to each prompt's last token alone. A row beyond the slots is
    padding, and leaves no trace.
    """
    x, slots = extended(model, draft, slots, tokens, offsets, rows)
    last = jnp.take_along_axis(x, (lengths - offsets - 1)[:, None, None], axis=1)
    logits = head(model, last)[:, 0]
    zero = jnp.zeros_like(lengths)
    nothing = jnp.zeros((len(rows), logits.shape[1]), jnp.int32) if how.counts else None
    token = sample(logits, seeds, zero, how, eos, prompt, nothing)
    left = jnp.where(ends(token, eos), 0, limits - 1)
    new = {"token": token, "position": lengths, "left": left, "made": zero + 1, "seed": seeds}
    if how.counts:
        new |= {"prompt": prompt, "given": nothing.at[jnp.arange(len(rows)), token].add(1)}
    if history is not None:
        new["history"] = history.at[jnp.arange(len(rows)), lengths].set(token)
    slots = replace(slots, **{name: getattr(slots, name).at[rows].set(a) for name, a in new.items()})
    found = None if how.logprobs is None else logprobs(logits, token, how.logprobs)
    return slots, token, found, None if following is None else judged(model, x, following, how.logprobs)


@functools.partial(jax.jit, static_argnames=("rounds", "drafts", "how", "eos"), donate_argnames="slots")
def advance(model: Served, draft: Served | None, slots: Slots, rounds: int, drafts: int, how: Sampling, eos: tuple):
    """A fixed number of rounds: (slots, new tokens [rounds, B, 1 + drafts], logprobs); NONE where a row has no more."""

    def one(slots, _):
        return one_round(model, draft, slots, drafts, how, eos)

    slots, (tokens, probabilities) = jax.lax.scan(one, slots, length=rounds)
    return slots, tokens, probabilities


def one_round(model: Served, draft: Served | None, slots: Slots, drafts: int, how: Sampling, eos: tuple):
    guess, mine = draft_tokens(draft, trunk, head, slots, drafts)  # Bk
    tokens = jnp.concatenate([slots.token[:, None], guess], axis=1)
    rows, positions = jnp.arange(len(tokens)), slots.position[:, None] + jnp.arange(1 + drafts)
    x, cache = trunk(model, tokens, None, positions, slots.cache)
    logits = head(model, x)
    token, left, made, given, history = slots.token, slots.left, slots.made, slots.given, slots.history
    alive, out = left > 0, []
    for j in range(1 + drafts):
        choice = sample(logits[:, j], slots.seed, made, how, eos, slots.prompt, given)
        if how.counts:
            given = given.at[rows, choice].add(alive)
        if history is not None:  # a row that has ended writes beyond it: nothing
            history = history.at[rows, jnp.where(alive, slots.position + 1 + j, history.shape[1])].set(choice)
        found = None if how.logprobs is None else logprobs(logits[:, j], choice, how.logprobs)
        out.append((jnp.where(alive, choice, NONE), found))
        token, made = jnp.where(alive, choice, token), made + alive
        left = jnp.where(alive, jnp.where(ends(choice, eos), 0, left - 1), left)
        alive = alive & (left > 0) & (guess[:, j] == choice if j < drafts else False)
    position = slots.position + made - slots.made
    slots = Slots(cache, token, position, left, made, slots.seed, slots.prompt, given, history, mine)
    return slots, jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *out)


def ends(token, eos: tuple):  # B -> B
    """Whether a token is a row's last, whatever its limit."""
    return jnp.isin(token, jnp.array((DAMAGED, *eos)))
