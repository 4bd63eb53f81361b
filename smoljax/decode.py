"""Generation: one jitted prefill and one jitted step over an explicit, donated cache of keys and values.

Prompts of unequal length are padded on the right to a shared length. Each row then writes at its own places: a new
token overwrites the padding that lies where it goes, and a query sees no place after its own, so padding is never
seen. A row's tokens depend on its prompt and seed alone, not on the batch that it is in.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.config import Compute, Model
from smoljax.errors import DataError, UsageError, require
from smoljax.model import SmolLM, cast


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """Keys and values of the places seen so far: LBSKH; BSKH in a layer, which the model's scan hands to `write`."""

    k: jax.Array
    v: jax.Array

    @staticmethod
    def zeros(config: Model, rows: int, places: int, dtype: str) -> "Cache":
        c = config
        shape = (c.num_hidden_layers, rows, places, c.num_key_value_heads, c.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, k, v, positions) -> "Cache":  # BTKH BTKH BT
        """These keys and values at each row's own places."""
        rows = jnp.arange(k.shape[0])[:, None]
        return Cache(self.k.at[rows, positions].set(k), self.v.at[rows, positions].set(v))


def prefill(model: SmolLM, tokens, lengths, cache: Cache, compute: Compute):  # BT B -> BV
    """The logits after each prompt's last token, and the cache that holds the prompts.

    The head, a third of the 135M's arithmetic, is applied to that one place of each row.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = model.trunk(tokens, positions=positions, cache=cache, compute=compute)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return model.logits(last)[:, 0], cache


def decode(model: SmolLM, tokens, positions, cache: Cache, compute: Compute):  # B B -> BV
    """The logits after one more token in each row, at its position, and the cache that holds it too."""
    x, cache = model.trunk(tokens[:, None], positions=positions[:, None], cache=cache, compute=compute)
    return model.logits(x)[:, 0], cache


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from f32 logits; checked when made, constant in the compiled program."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # of those, only the fewest that together reach this probability (nucleus)

    def __post_init__(self):
        t, k, p = self.temperature, self.top_k, self.top_p
        require(math.isfinite(t) and t >= 0, f"temperature is {t}, expected 0 (greedy) or more")
        require(k is None or k >= 1, f"top_k is {k}, expected 1 or more; leave it out to keep all tokens")
        require(p is None or 0 < p <= 1, f"top_p is {p}, expected more than 0 and at most 1")


def sample(logits, keys, how: Sampling):  # BV B -> B
    """A token id a row, by the row's own key: temperature, then top-k, then top-p. -1 where logits are not finite."""
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if how.temperature == 0:
        ids = jnp.argmax(logits, axis=-1)
    else:
        # Differences to the best, so that no temperature, however small, makes an infinity of it.
        scaled = (logits - top) / max(how.temperature, 1e-37)
        order = None
        if how.top_k is not None or how.top_p is not None:
            scaled, order = jax.lax.top_k(scaled, min(how.top_k or scaled.shape[-1], scaled.shape[-1]))
        if how.top_p is not None:
            before = jnp.cumsum(jax.nn.softmax(scaled), axis=-1) - jax.nn.softmax(scaled)
            scaled = jnp.where(before < how.top_p, scaled, -jnp.inf)  # the first always stays
        ids = jax.vmap(jax.random.categorical)(keys, scaled)
        if order is not None:
            ids = jnp.take_along_axis(order, ids[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(top[:, 0]), ids, -1).astype(jnp.int32)


def keys(seeds, n):  # B -> B
    """Each row's key for its n-th new token."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), n))(seeds)


@functools.partial(jax.jit, static_argnames=("how", "places", "compute"))
def first(model, tokens, lengths, seeds, how: Sampling, places: int, compute: Compute):
    cache = Cache.zeros(model.config, len(tokens), places, compute.dtype)
    logits, cache = prefill(model, tokens, lengths, cache, compute)
    return sample(logits, keys(seeds, 0), how), cache


@functools.partial(jax.jit, static_argnames=("how", "compute"), donate_argnames="cache")
def following(model, tokens, positions, cache, seeds, n, how: Sampling, compute: Compute):
    logits, cache = decode(model, tokens, positions, cache, compute)
    return sample(logits, keys(seeds, n), how), cache


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # without the prompt, with the EOS that ended it
    finish_reason: str  # "stop" at an EOS, "length" at max_new_tokens


def generate(
    model: SmolLM,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    max_new_tokens: int = 64,
    *,
    tokenizer=None,
    **options,
) -> list[list[int]] | list[str]:
    """What follows each prompt, without the prompt: ids for ids, texts for texts, which need a `tokenizer`.

    `complete` says what the options are, and why each row ended. A text is without special tokens.
    """
    require(not isinstance(prompts, str), "prompts is one string; give a list of them")
    texts = [isinstance(prompt, str) for prompt in prompts]
    if not any(texts):
        return [row.tokens for row in complete(model, prompts, max_new_tokens, **options)]
    require(all(texts), "some prompts are strings, some are not; give one kind")
    require(tokenizer is not None, "the prompts are strings; give tokenizer=smoljax.load_tokenizer(...), or token ids")
    rows = complete(model, [tokenizer.encode(text).ids for text in prompts], max_new_tokens, **options)
    return [tokenizer.decode(row.tokens) for row in rows]


def complete(
    model: SmolLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    eos: int | Iterable[int] | None = None,
    compute: Compute = Compute(),
) -> list[Completion]:
    """Continue lists of token ids, all in one batch.

    Args:
      temperature, top_k, top_p: see Sampling.
      seed: one for all rows, or one a row. A row's sample is the same in any batch; so two equal prompts under one
        seed give equal samples: for several samples of a prompt, give it several seeds.
      eos: ids that end a row: the model's own eos_token_id by default; with () a row never stops.

    Raises UsageError for a prompt or a setting that cannot be, DataError if the model's logits are not finite.
    """
    how = Sampling(temperature, top_k, top_p)
    prompts = check(model.config, prompts, max_new_tokens)
    seeds = [seed] * len(prompts) if np.ndim(seed) == 0 else list(seed)
    require(len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts; give one, or one a prompt")
    require(all(0 <= s < 2**32 for s in seeds), f"seed is {seed}, expected 0 or more, below 2**32")
    if eos is None:
        eos = () if model.config.eos_token_id is None else model.config.eos_token_id
    eos = set(eos) if isinstance(eos, Iterable) else {eos}
    if not prompts:
        return []

    # Lengths are padded to powers of two, so that prompts of all lengths share a few compiled programs.
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    places = bucket(lengths.max() + max_new_tokens)
    model, seeds = cast(model, compute.dtype), np.array(seeds, np.uint32)  # once, not once a token

    new, cache = first(model, tokens, lengths, seeds, how=how, places=places, compute=compute)
    out, reasons = [[] for _ in prompts], [None] * len(prompts)
    for n in range(max_new_tokens):
        for row, token in enumerate(np.asarray(new).tolist()):
            if reasons[row] is None:
                if token < 0:
                    raise DataError(f"the logits of prompt {row + 1} are not finite: the model's weights are damaged")
                out[row].append(token)
                reasons[row] = "stop" if token in eos else "length" if n + 1 == max_new_tokens else None
        if all(reasons):
            break
        new, cache = following(model, new, lengths + n, cache, seeds, n + 1, how=how, compute=compute)
    return [Completion(*row) for row in zip(out, reasons, strict=True)]


def check(config: Model, prompts, max_new_tokens: int) -> list[list[int]]:
    """The prompts as lists of ints, each id in the vocabulary, each fitting into the model's positions."""
    whole = isinstance(max_new_tokens, int) and max_new_tokens >= 1
    require(whole, f"max_new_tokens is {max_new_tokens!r}, expected a whole number, 1 or more")
    V, S = config.vocab_size, config.max_position_embeddings
    checked = []
    for i, prompt in enumerate(prompts, start=1):
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise UsageError(f"prompt {i} is {prompt!r:.60}, expected a list of token ids") from None
        require(bool(ids), f"prompt {i} is empty; give at least one token, such as the model's bos_token_id")
        for token in ids:
            known = 0 <= token < V
            require(known, f"prompt {i} has the token id {token}, expected 0 to {V - 1}, the model's vocabulary")
        require(
            len(ids) + max_new_tokens <= S,
            f"prompt {i} has {len(ids)} tokens; with max_new_tokens = {max_new_tokens} that is beyond the model's "
            f"max_position_embeddings = {S}; shorten one of them",
        )
        checked.append(ids)
    return checked


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two."""
    return max(smallest, 1 << int(length - 1).bit_length())
