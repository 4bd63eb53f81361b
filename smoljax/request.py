"""What is asked of an engine, a row each, and what it gave."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from smoljax.config import Model
from smoljax.errors import DataError, UsageError, require
from smoljax.sampling import DAMAGED, NONE, Sampling


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_new_tokens: int = 64
    seed: int = 0  # below 2**32; one prompt and seed give one sample, whatever else is in the batch
    watch: Callable[[list[int]], int | None] | None = None
    """Called with all new tokens when there are more of them; a number ends the row with so many of them kept."""
    name: str | None = None  # what it is called in a message: by default a prompt, with its number


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # without the prompt, with the EOS that ended it
    finish_reason: str  # "stop" at an EOS or where `watch` said so, "length" at max_new_tokens
    logprobs: list | None = None  # of each token (its own, the likeliest ids, theirs); where Sampling asks for them
    prompt_logprobs: list | None = None  # the same of the prompt's tokens but the first, which follows nothing


@dataclass
class Row:
    """A request at work in a slot."""

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.request.name or f"prompt {self.number + 1}"

    def take(self, tokens, found, eos: tuple):
        """More tokens from the device, each with its log-probabilities, up to the row's end."""
        new = len(self.tokens)
        for i, token in enumerate(tokens):
            if self.reason or token == NONE:
                continue
            if token == DAMAGED:
                raise DataError(
                    f"the logits of {self.name} are not finite: the model's weights are damaged, or "
                    "logit_bias forbids every token"
                )
            self.tokens.append(token)
            if found is not None:
                self.logprobs.append(at(found, i))
            at_limit = len(self.tokens) == self.request.max_new_tokens
            self.reason = "stop" if token in eos else "length" if at_limit else None
        if self.request.watch and len(self.tokens) > new:
            keep = self.request.watch(self.tokens)
            if keep is not None:
                del self.tokens[keep:], self.logprobs[keep:]
                self.reason = "stop"

    def completion(self, how: Sampling) -> Completion:
        found = None if how.logprobs is None else self.logprobs
        return Completion(self.tokens, self.reason, found, self.prompt_logprobs if how.prompt_logprobs else None)


def at(found: Sequence[np.ndarray], index) -> tuple:
    """One token's log-probabilities, of arrays of them: its own, the likeliest ids, theirs."""
    return tuple(part[index].tolist() for part in found)


def check(config: Model, request: Request, name: str):
    """A UsageError where a request cannot be: each id in the vocabulary, all of it within the model's positions."""
    V, S = config.vocab_size, config.max_position_embeddings
    new = request.max_new_tokens
    require(type(new) is int and new >= 1, f"max_new_tokens is {new!r:.60}, expected a whole number, 1 or more")
    require(0 <= request.seed < 2**32, f"seed is {request.seed}, expected 0 or more, below 2**32")
    require(bool(request.prompt), f"{name} is empty; give at least one token, such as the model's bos_token_id")
    for token in request.prompt:
        known = 0 <= token < V
        require(known, f"{name} has the token id {token}, expected 0 to {V - 1}, the model's vocabulary")
    require(
        len(request.prompt) + new <= S,
        f"{name} has {len(request.prompt)} tokens; with max_new_tokens = {new} that is beyond the model's "
        f"max_position_embeddings = {S}; shorten one of them",
    )


def whole(value, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r:.60}, expected a whole number") from None
