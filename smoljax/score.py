"""Log-likelihood of continuations, as evaluation harnesses ask for it: a batch gives what each row gives alone.

Rows are padded on the right, where no token sees the padding. Only a continuation's places meet the head, in chunks:
the logits of all tokens exist nowhere. Ids, windows and limits are those of EleutherAI's lm-evaluation-harness.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smoljax import sharding
from smoljax.config import Compute
from smoljax.errors import DataError, require
from smoljax.loss import IGNORE, in_chunks
from smoljax.model import SmolLM

TOKENS = 8192  # on a device at a time, padding included, where no batch size is given
COMPUTE = Compute(loss_chunk=1024)  # 200 MB of logits with SmolLM's vocabulary
Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, and of its continuation


class Score(NamedTuple):
    """Of a continuation's tokens, in order."""

    logprobs: np.ndarray  # nats, f32
    greedy: np.ndarray  # bool: it is the likeliest, of equals the one with the lowest id

    @property
    def loglikelihood(self) -> float:
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        return bool(self.greedy.all())


def loglikelihoods(
    model: SmolLM,
    pairs: Sequence[Pair],
    *,
    batch_size: int | None = None,
    longest: int | None = None,
    compute: Compute = COMPUTE,
    mesh=None,
    beat: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """What each continuation scores after its context, in the order of `pairs`.

    Args:
      batch_size: rows at a time; by default as many as have TOKENS on each device, 2,048 on a CPU.
      longest: tokens that the model may see; its max_position_embeddings by default. See `check`.
      mesh: over whose data and fsdp axes rows are split; the model lies as sharding.shardings(model, mesh).
      beat: called with the number of pairs done after each batch.

    Raises DataError for a pair that cannot be scored, and where the model's numbers are not finite.
    """
    require(batch_size is None or batch_size >= 1, f"batch_size is {batch_size}, expected 1 or more")
    longest = model.config.max_position_embeddings if longest is None else longest
    require(longest >= 1, f"longest is {longest}, expected 1 or more tokens")
    for i, pair in enumerate(pairs, start=1):
        try:
            check(pair, model.config.vocab_size, longest)
        except DataError as e:
            raise DataError(f"pair {i}: {e}") from None
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    lengths = np.array([len(context) + len(continuation) - 1 for context, continuation in pairs], int)
    scores, done = [None] * len(pairs), 0
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for which, rows, T in batches(lengths, batch_size, ways):
            batch = padded([pairs[i] for i in which], rows, T)
            if mesh is not None:
                batch = jax.device_put(batch, sharding.batch_sharding(mesh))
            found = np.asarray(judge(model, *batch, compute=compute))
            for i, row in zip(which, found, strict=False):  # the rows behind fill the batch up
                row = row[: len(pairs[i][1])]
                if not np.isfinite(row).all():
                    raise DataError("a log-likelihood is not finite: the model's weights are damaged")
                scores[i] = Score(row[:, 0], row[:, 1] == 1)
            done += len(which)
            beat(done)
    return scores


def batches(lengths: np.ndarray, batch_size: int | None, ways: int = 1) -> Iterator[tuple[np.ndarray, int, int]]:
    """(which rows, rows of the batch, T): the longest first, so that one too large for the device is known at once.

    T is a power of two, rows are one number for each T, in its last batch the next power of two: few programs for all
    lengths.
    """
    places = np.array([bucket(length) for length in lengths], int)
    tokens = 2048 if jax.default_backend() == "cpu" else TOKENS  # more in a batch is no faster there
    for T in sorted(set(places.tolist()), reverse=True):
        which = np.flatnonzero(places == T)
        rows = batch_size or max(1, tokens // T) * ways
        for first in range(0, len(which), rows):
            part = which[first : first + rows]
            yield part, -(-min(rows, bucket(len(part), 1)) // ways) * ways, T


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two."""
    return max(smallest, 1 << (int(length) - 1).bit_length())


def padded(pairs: Sequence[Pair], rows: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels, BT: a label where a continuation's token is predicted, IGNORE elsewhere."""
    tokens, labels = np.zeros((rows, T), np.int32), np.full((rows, T), IGNORE, np.int32)
    for row, (context, continuation) in enumerate(pairs):
        ids = [*context, *continuation]
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(context) - 1 : len(ids) - 1] = continuation
    return tokens, labels


@functools.partial(jax.jit, static_argnames="compute")
def judge(model: SmolLM, tokens, labels, compute: Compute):  # BT BT -> BT2
    """Each label's log-probability in f32, and 1 where it is the likeliest; a row's labels first, 0 behind them.

    compute.loss_chunk tokens have logits at a time, and none where all rows' labels have ended: a long context with a
    short continuation costs the trunk alone.
    """
    x = model.trunk(tokens, compute=compute)
    order = jnp.argsort(labels == IGNORE, axis=1, stable=True)
    x, labels = jnp.take_along_axis(x, order[..., None], axis=1), jnp.take_along_axis(labels, order, axis=1)

    def scored(x, labels):
        logits = model.logits(x)
        place = jnp.maximum(labels, 0)
        target = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
        logprobs = target - jax.nn.logsumexp(logits, axis=-1)
        found = jnp.stack([logprobs, jnp.argmax(logits, axis=-1) == place], axis=-1)
        return jnp.where((labels == IGNORE)[..., None], 0, found)

    def nothing(x, labels):
        return jnp.zeros((*labels.shape, 2), jnp.float32)

    def one(_, x, labels):
        return None, jax.lax.cond(jnp.any(labels != IGNORE), scored, nothing, x, labels)

    return in_chunks(one, None, x, labels, compute.loss_chunk)[1]


def check(pair: Pair, vocab_size: int, longest: int):
    """A DataError where a pair cannot be scored: all but its last token are what the model sees, `longest` at most."""
    context, continuation = pair
    if not len(continuation):
        raise DataError("the continuation has no tokens of its own; give it some text, or score the whole as a text")
    if not len(context):
        raise DataError("the context has no tokens; give at least one, such as the model's bos_token_id")
    for id in (*context, *continuation):
        if type(id) is bool or not isinstance(id, int | np.integer) or not 0 <= id < vocab_size:
            raise DataError(f"{id!r:.40} is among the ids, expected 0 to {vocab_size - 1}, the model's vocabulary")
    if len(continuation) > longest:
        raise DataError(
            f"{len(continuation)} tokens of continuation are more than {longest} positions hold; shorten it, or score "
            "the whole as a text, which is cut into windows"
        )
    if (seen := len(context) + len(continuation) - 1) > longest:
        raise DataError(
            f"{len(context)} tokens of context and {len(continuation)} of continuation are {seen - longest} more than "
            f"{longest} positions hold; shorten the context, or drop its beginning with --truncate"
        )


def encode_pair(tokenizer, context: str, continuation: str, prefix: int) -> tuple[list[int], list[int]]:
    """Ids as the harness has them: the whole's, cut where the context's own end; spaces at that end go over.

    prefix: the id that stands before a continuation without context.
    """
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    whole, before = (encode(tokenizer, text) for text in (context + continuation, context))
    if not before:  # the prefix may be written out, and then it is not doubled
        return (whole[:1], whole[1:]) if whole[:1] == [prefix] else ([prefix], whole)
    if whole[: len(before)] != before:
        sharding.say_once(
            "a token reaches from a context into its continuation; scored is what lm-evaluation-harness scores, the "
            "whole's tokens beyond as many as the context alone has (a space between them avoids it)"
        )
    return before, whole[len(before) :]


def windows(ids: list[int], prefix: int, longest: int) -> list[Pair]:
    """All of a text's ids, each scored once: windows of `longest` after one another, as the harness rolls them.

    The first token follows the prefix. The last window is as long as the others: it sees tokens scored before it.
    """
    found = [([prefix], ids[:longest])]
    for start in range(longest, len(ids), longest):
        end = min(start + longest, len(ids))
        found.append((ids[end - longest - 1 : start], ids[start:end]))
    return found


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
