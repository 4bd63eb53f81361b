"""`generate` and `complete`: a few prompts through one engine, as a library has it."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np

from smoljax.engine import Engine
from smoljax.errors import require
from smoljax.request import Completion, Request, checked
from smoljax.sampling import Sampling
from smoljax.settings import meant


def generate(
    model,
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
    require(options.get("logprobs") is None, "logprobs are what smoljax.generation.complete gives, beside the tokens")
    prompts = listed(prompts)
    texts = [isinstance(prompt, str) for prompt in prompts]
    if not any(texts):
        return [row.tokens for row in complete(model, prompts, max_new_tokens, **options)]
    require(all(texts), "some prompts are strings, some are not; give one kind")
    able = hasattr(tokenizer, "encode") and not isinstance(tokenizer, str)
    require(able, "the prompts are strings; give tokenizer=smoljax.load_tokenizer(...), or token ids")
    rows = complete(model, [tokenizer.encode(text).ids for text in prompts], max_new_tokens, **options)
    return [tokenizer.decode(row.tokens) for row in rows]


ENGINE = ("eos", "compute", "cache", "drafts", "draft", "rounds")


def complete(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, seed=0, slots: int | None = None, **options
) -> list[Completion]:
    """Continue lists of token ids.

    Args:
      seed: one for all rows, or one a row. A row's sample is the same in any batch; so two equal prompts under one
        seed give equal samples: for several samples of a prompt, give it several seeds.
      slots: rows at a time, at most 64 by default.
      options: the fields of Sampling (temperature, top_k, ...), and eos, compute, cache, drafts, draft of Engine.

    Raises UsageError for a prompt or a setting that cannot be, DataError if the model's logits are not finite.
    """
    known = ENGINE + tuple(f.name for f in fields(Sampling))
    names = ("max_new_tokens", "seed", "slots", *known)
    for name in options:
        require(name in known, f"no option {name!r}{meant(name, names)}; expected some of {', '.join(names)}")
    engine = {name: options.pop(name) for name in ENGINE if name in options}
    how = Sampling(**options)
    prompts = listed(prompts)
    seeds = [seed] * len(prompts) if np.ndim(seed) == 0 else list(seed)
    require(len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts; give one, or one a prompt")
    requests = [Request(prompt, max_new_tokens, s) for prompt, s in zip(prompts, seeds, strict=True)]
    requests = [checked(model.config, request, f"prompt {i}") for i, request in enumerate(requests, start=1)]
    if not prompts:
        return []
    slots = min(len(prompts), 64) if slots is None else slots
    rows = dict(Engine(model, slots, sampling=how, **engine).run(requests))
    return [rows[i] for i in range(len(prompts))]


def listed(prompts) -> list:
    require(isinstance(prompts, Iterable), f"prompts is {prompts!r:.60}, expected a list of them")
    return list(prompts)
