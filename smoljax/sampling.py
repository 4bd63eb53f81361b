"""How a token is chosen from logits: penalties, then temperature, then top-k, top-p, min-p, then a row's own noise.

The order is that of transformers' processors. The noise of a row's n-th new token is by its seed, n, and the token's
id, so that a row gives the same sample in any batch, and in any round of speculation.
"""

import math
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp

from smoljax.errors import UsageError, number, require, whole

KINDS = dict.fromkeys(("top_k", "min_new_tokens", "logprobs"), whole)
KINDS |= dict.fromkeys(("temperature", "top_p", "min_p"), number)
KINDS |= dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty"), number)
HOTTEST, LARGEST = 1e30, 1_000_000  # of what divides logits, and of what is added or multiplied: f32 holds the result
NONE, DAMAGED = -1, -2  # in place of a token: none here; the logits are not finite


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from f32 logits; checked when made, constant in the compiled program."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None  # only the k likeliest, and those that are as likely as the k-th
    top_p: float | None = None  # of those, only the fewest that together reach this probability (nucleus)
    min_p: float | None = None  # of those, only the ones with at least this part of the likeliest one's probability
    repetition_penalty: float = 1.0  # of tokens in the prompt or before: logit / p where positive, else * p (CTRL)
    frequency_penalty: float = 0.0  # subtracted for each time a token was given so far (OpenAI's)
    presence_penalty: float = 0.0  # subtracted where a token was given so far (OpenAI's)
    logit_bias: tuple = ()  # of (id, what is added)
    min_new_tokens: int = 0  # before as many, none that ends a row
    logprobs: int | None = None  # log-probabilities by the model itself: of the token given, and of the n likeliest
    prompt_logprobs: bool = False  # of the prompt's tokens, too

    def __post_init__(self):
        self.convert()
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        require(0 <= t <= HOTTEST, f"temperature is {t}, expected 0 (greedy) to {HOTTEST:g}")
        require(k is None or k >= 1, f"top_k is {k}, expected 1 or more; leave it out to keep all tokens")
        require(p is None or 0 < p <= 1, f"top_p is {p}, expected more than 0 and at most 1")
        require(m is None or 0 <= m <= 1, f"min_p is {m}, expected 0 to 1")
        r = self.repetition_penalty
        fine = 1 / LARGEST <= r <= LARGEST
        require(
            fine, f"repetition_penalty is {r}, expected more than 0, {1 / LARGEST} to {LARGEST:,}; 1 changes nothing"
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            fine = -LARGEST <= value <= LARGEST
            require(fine, f"{name} is {value}, expected a number within {LARGEST:,} of 0, which changes nothing")
        for id, bias in self.logit_bias:
            fine = id >= 0 and (-LARGEST <= bias <= LARGEST or bias == -math.inf)
            require(
                fine, f"logit_bias has {id, bias}, expected a token id and a number within {LARGEST:,} of 0, or -inf"
            )
        fine = 0 <= self.min_new_tokens < 2**31
        require(fine, f"min_new_tokens is {self.min_new_tokens}, expected 0 or more, below 2**31")
        n = self.logprobs
        require(n is None or 0 <= n <= 100, f"logprobs is {n}, expected 0 to 100 of the likeliest tokens")
        require(n is not None or not self.prompt_logprobs, "prompt_logprobs comes with logprobs, how many a token")
        if t == 0:
            for name in ("top_k", "top_p", "min_p"):
                require(
                    getattr(self, name) is None,
                    f"{name} chooses what is sampled from, but temperature is 0, greedy; give a temperature above 0",
                )

    def convert(self):
        """Numbers of any library's to Python's own, which hash and compare alike: equal settings, one program."""
        for f in fields(self):
            kind, value = KINDS.get(f.name), getattr(self, f.name)
            if kind and (value is not None or f.default is not None):
                object.__setattr__(self, f.name, kind(value, f.name))
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        try:
            pairs = tuple((whole(id, "an id of logit_bias"), number(bias, "logit_bias")) for id, bias in pairs)
        except (TypeError, ValueError):
            found = f"logit_bias is {self.logit_bias!r:.60}"
            raise UsageError(f"{found}, expected pairs of a token id and a number") from None
        object.__setattr__(self, "logit_bias", tuple(sorted(pairs)))

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens a row has had."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def keys(seeds, n):  # B B -> B
    """Each row's key for its n-th new token."""
    return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds, n)


def sample(logits, seeds, n, how: Sampling, eos: tuple = (), prompt=None, given=None):  # BV B B BV BV -> B
    """A token id a row, by the row's own noise for its n-th new token; DAMAGED where logits are not finite.

    Args:
      n: how many new tokens each row has already.
      eos: the ids that end a row: none of them before how.min_new_tokens.
      prompt, given: whether a token is in the prompt, and how often it was given; needed where how.counts.
    """
    logits = logits.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    scores = processed(logits, n, how, eos, prompt, given)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if how.temperature == 0:
        ids = jnp.argmax(scores, axis=-1)
    else:
        # Differences to the best, so that no temperature, however small, makes an infinity of it.
        scaled = filtered((scores - top) / max(how.temperature, 1e-37), how)
        ids = jax.vmap(jax.random.categorical)(keys(seeds, n), scaled)
    return jnp.where(finite & jnp.isfinite(top[:, 0]), ids, DAMAGED).astype(jnp.int32)  # or all are forbidden


def processed(logits, n, how: Sampling, eos: tuple, prompt, given):  # BV -> BV
    """Bias, penalties, and no end too early."""
    if how.logit_bias:
        ids, bias = (jnp.array(part) for part in zip(*how.logit_bias, strict=True))
        logits = logits.at[:, ids].add(bias.astype(jnp.float32))
    if how.repetition_penalty != 1:
        weaker = jnp.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
        logits = jnp.where(prompt | (given > 0), weaker, logits)
    if how.frequency_penalty or how.presence_penalty:
        logits = logits - how.frequency_penalty * given - how.presence_penalty * (given > 0)
    if how.min_new_tokens and eos:
        early = (n < how.min_new_tokens)[:, None] & jnp.zeros(logits.shape[1], bool).at[jnp.array(eos)].set(True)
        logits = jnp.where(early, -jnp.inf, logits)
    return logits


def filtered(scaled, how: Sampling):  # BV -> BV
    """-inf for what top-k, top-p and min-p leave out. The best of a row is 0 here, and always stays."""
    if how.top_k is not None:
        k = min(how.top_k, scaled.shape[-1])
        scaled = jnp.where(scaled >= least(scaled, lambda kept: jnp.sum(kept, -1) >= k), scaled, -jnp.inf)
    if how.top_p is not None and how.top_p < 1:  # f32's sum can be 1 before the last
        p, wanted = jax.nn.softmax(scaled), max(how.top_p, jnp.finfo(jnp.float32).tiny)  # below that f32 has 0
        enough = least(scaled, lambda kept: jnp.sum(jnp.where(kept, p, 0), -1) >= wanted)
        scaled = jnp.where(scaled >= enough, scaled, -jnp.inf)
    if how.min_p is not None:
        scaled = jnp.where(scaled >= (math.log(how.min_p) if how.min_p else -jnp.inf), scaled, -jnp.inf)
    return scaled


def least(x, enough):  # BV -> B1
    """The largest t for which enough(x >= t), where enough is true for ever smaller t; else the least of all.

    Bit by bit of f32 in the order of its numbers: 32 sums over V, an eighth of the time that sorting V takes on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    order = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))

    def one(i, t):
        higher = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(order >= higher[:, None]), higher, t)

    t = jax.lax.fori_loop(0, 32, one, jnp.zeros(len(x), jnp.uint32))
    return jnp.min(jnp.where(order >= t[:, None], x, jnp.inf), axis=-1, keepdims=True)


def logprobs(logits, ids, n: int):  # BV B -> B Bn Bn
    """By the model itself, before all of the above: of each row's token; the n likeliest ids, and theirs."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(logp, jnp.maximum(ids, 0)[:, None], axis=-1)[:, 0]
    top, which = jax.lax.top_k(logp, min(n, logp.shape[-1]))
    return own, which, top
