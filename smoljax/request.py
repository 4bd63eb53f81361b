"""What is asked of an engine, a row each, and what it gave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from smoljax.config import Model
from smoljax.errors import DataError, UsageError, require, whole
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


@dataclass(eq=False)
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
                fine = type(keep) is int and 0 <= keep <= len(self.tokens)
                require(fine, f"watch gave {keep!r:.40} for {self.name}, expected None, or how many tokens are kept")
                del self.tokens[keep:], self.logprobs[keep:]
                self.reason = "stop"

    def completion(self, how: Sampling) -> Completion:
        found = None if how.logprobs is None else self.logprobs
        return Completion(self.tokens, self.reason, found, self.prompt_logprobs if how.prompt_logprobs else None)


def at(found: Sequence[np.ndarray], index) -> tuple:
    """One token's log-probabilities, of arrays of them: its own, the likeliest ids, theirs."""
    return tuple(part[index].tolist() for part in found)


def checked(config: Model, request: Request, name: str) -> Request:
    """The request, its numbers Python's own.

    Raises UsageError where it cannot be: an id that is not in the vocabulary, more than the model has positions.
    """
    V, S = config.vocab_size, config.max_position_embeddings
    prompt, seed = as_ids(request.prompt, name), whole(request.seed, "seed")
    new = whole(request.max_new_tokens, "max_new_tokens")
    require(new >= 1, f"max_new_tokens is {new}, expected 1 or more")
    require(0 <= seed < 2**32, f"seed is {seed}, expected 0 or more, below 2**32")
    require(bool(prompt), f"{name} is empty; give at least one token, such as the model's bos_token_id")
    unknown = next((token for token in prompt if not 0 <= token < V), None)
    require(unknown is None, f"{name} has the token id {unknown}, expected 0 to {V - 1}, the model's vocabulary")
    require(
        len(prompt) + new <= S,
        f"{name} has {len(prompt)} tokens; with max_new_tokens = {new} that is beyond the model's "
        f"max_position_embeddings = {S}; shorten one of them",
    )
    return replace(request, prompt=prompt, max_new_tokens=new, seed=seed)


def as_ids(prompt, name: str) -> list[int]:
    """Ids of any library's array or sequence, in their order."""
    found = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    try:
        if isinstance(found, Sequence) and not isinstance(found, str | bytes):
            return [whole(token, name) for token in found]
    except UsageError:
        pass
    raise UsageError(f"{name} is {prompt!r:.60}, expected a list of token ids")
