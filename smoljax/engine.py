"""Many requests through decode.py: slots of a batch, filled again as their rows end.

The host gives the device a fixed number of rounds at a time, and reads what came of them: no token waits for it.
Lengths are padded to powers of two, so that a million prompts share a few compiled programs.
"""

from collections.abc import Iterable, Iterator

import jax
import numpy as np

from smoljax import budget, decode
from smoljax.config import Compute
from smoljax.errors import require, whole
from smoljax.layout import Served, lay_out
from smoljax.request import Completion, Request, Row, at, checked
from smoljax.sampling import Sampling

LONGEST = 512  # tokens of a prompt that are read at a time: scores of all heads against 8,192 places are 150 MB
SHORTEST = 32
PASSED = 1000  # places without a request that are gone past before rows at work go on


class Engine:
    """Rows of one model through a batch of slots, on one device.

    Args:
      model: a SmolLM, or one laid out.
      slots: rows at a time.
      sampling, eos: of all rows; eos None is the model's own, () never stops.
      compute: its dtype alone matters here; of a model laid out it is that one's.
      cache: dtype of keys and values, or int8; by default compute's, on a CPU float32.
      drafts: tokens a round that are guessed and checked: by looking up, or by the small model `draft`.
      rounds: that the device computes between two looks of the host, at most: no more than all rows may need.
      device: JAX's first by default.
    """

    def __init__(
        self,
        model,
        slots: int = 8,
        *,
        sampling: Sampling = Sampling(),
        eos: int | Iterable[int] | None = None,
        compute: Compute | None = None,
        cache: str | None = None,
        drafts: int = 0,
        draft=None,
        rounds: int | None = None,
        device=None,
    ):
        require(slots >= 1, f"slots is {slots}, expected 1 or more")
        require(rounds is None or rounds >= 1, f"rounds is {rounds}, expected 1 or more")
        require(type(drafts) is int and 0 <= drafts <= 16, f"drafts is {drafts}, expected 0 to 16 tokens a round")
        require(cache in (None, "int8", "float32", "bfloat16"), f"cache is {cache!r}, expected int8 or a dtype")
        require(draft is None or drafts > 0, "a draft model needs drafts, the tokens that it guesses a round: try 4")
        laid = isinstance(model, Served)
        dtype = (compute or (model if laid else Compute())).dtype
        same = not laid or dtype == model.dtype
        require(same, f"compute.dtype is {dtype}, and the model is laid out in {laid and model.dtype}; leave it out")
        self.model = model if laid else lay_out(model, dtype, slots * (1 + drafts))
        self.config, self.slots, self.sampling, self.drafts = self.model.config, slots, sampling, drafts
        if draft is not None:
            same = draft.config.vocab_size == self.config.vocab_size
            require(same, f"the draft model has {draft.config.vocab_size} tokens, the model {self.config.vocab_size}")
            draft = draft if isinstance(draft, Served) else lay_out(draft, dtype, slots)
        self.draft, self.cache = draft, cache or usual_cache(dtype)
        self.device = device or jax.local_devices()[0]
        if device is not None:
            self.model, self.draft = jax.device_put((self.model, self.draft), device)
        self.eos = ids(self.config.eos_token_id if eos is None else eos)
        for token in (*self.eos, *(token for token, _ in sampling.logit_bias)):
            V = self.config.vocab_size
            require(0 <= token < V, f"token id {token} (eos or logit_bias) is none of the model's, 0 to {V - 1}")
        on_cpu = jax.default_backend() == "cpu"
        self.rounds = rounds or (8 if on_cpu else 32)
        self.budget = 512 if on_cpu else 8192  # tokens of prompts that are read at a time
        arrays = {id(a): a for a in jax.tree.leaves((self.model, self.draft))}  # once: a million rows are checked
        self.weight_bytes = sum(a.nbytes for a in arrays.values())
        self.memory = budget.device_memory(self.device)
        self.stopped = False  # by another thread: then a run ends behind its next rounds
        self.at_work = False

    def run(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion | None]]:
        """(the request's number, what it gave), as rows end. Requests are checked, and taken, as slots come free.

        None in place of a request, which could not be made, gives None: so that nobody waits for it. One run at a time:
        a second one before the first has ended, or is closed, is a UsageError.
        """
        require(not self.at_work, "this engine is at work; end its run, or make another engine")
        self.at_work = True
        self.state, self.rows, self.places = None, [None] * self.slots, 0
        self.waiting, self.source, self.passed = [], enumerate(requests), []
        try:
            while not self.stopped and self.fill():
                yield from self.finished()
                if any(self.rows):
                    self.advance()
                    yield from self.finished()
        finally:
            self.at_work, self.state = False, None  # the cache is the largest of what is here

    def finished(self):
        yield from ((number, None) for number in self.passed)
        self.passed = []
        for slot, row in enumerate(self.rows):
            if row and row.reason:
                self.rows[slot] = None
                yield row.number, row.completion(self.sampling)

    def fill(self) -> bool:
        """Requests into free slots; whether there is anything at work."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        while len(self.waiting) < len(free) and len(self.passed) < PASSED:
            number, request = next(self.source, (None, None))
            if number is None:
                break
            if request is None:
                self.passed.append(number)
                continue
            given = isinstance(request, Request)
            require(given, f"prompt {number + 1} is {request!r:.60}, expected a Request")
            row = Row(number, request)
            row.request = checked(self.config, request, row.name)
            self.waiting.append(row)
        while free and self.waiting:
            shape = T, _ = padded(self.waiting[0])  # all of one shape together
            most = max(1, self.budget // T)
            group = [row for row in self.waiting if padded(row) == shape][: min(len(free), most)]
            size = next(n for n in (1, 4, 16, 64, 256, self.slots) if n >= len(group))  # a few, for few programs
            self.waiting = [row for row in self.waiting if row not in group]
            for row, slot in zip(group, free, strict=False):
                self.rows[slot] = row
            self.resize(1 + max(len(row.request.prompt) for row in group))
            self.begin(T, group, free[: len(group)], min(size, self.slots, most))
            free = free[len(group) :]
        return any(self.rows) or bool(self.passed)

    def begin(self, T: int, group: list[Row], slots: list[int], size: int):
        prompts = [row.request.prompt for row in group]
        lengths = np.ones(size, np.int32)
        lengths[: len(group)] = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        rows = np.full(size, self.slots, np.int32)  # beyond the slots: padding
        rows[: len(group)] = slots
        tokens = np.zeros((size, -(-longest // T) * T), np.int32)
        for line, prompt in zip(tokens, prompts, strict=False):
            line[: len(prompt)] = prompt
        following = np.roll(tokens, -1, axis=1) if self.sampling.prompt_logprobs else None
        pieces = [
            (tokens[:, i : i + T], None if following is None else following[:, i : i + T], np.full(size, i, np.int32))
            for i in range(0, tokens.shape[1], T)
        ]
        read = []
        for piece in pieces[:-1]:  # of prompts longer than T, all of as many pieces
            args = (*piece, rows, self.sampling.logprobs)
            self.state, found = decode.extend(self.model, self.draft, self.state, *args)
            read.append(found)
        seeds, limits = np.zeros(size, np.uint32), np.ones(size, np.int32)
        seeds[: len(group)] = [row.request.seed for row in group]
        limits[: len(group)] = [row.request.max_new_tokens for row in group]
        prompt = history = None
        if self.sampling.counts:
            prompt = np.zeros((size, self.config.vocab_size), bool)
            for line, p in zip(prompt, prompts, strict=False):
                line[p] = True
        if self.state.history is not None:
            history = np.zeros((size, self.places), np.int32)
            history[:, : tokens.shape[1]] = tokens[:, : self.places]
        args = (*pieces[-1], rows, lengths, seeds, limits, prompt, history, self.sampling, self.eos)
        self.state, new, found, last = decode.begin(self.model, self.draft, self.state, *args)
        new, found, read = jax.device_get((new, found, [*read, last]))
        if following is not None:
            read = [np.concatenate(parts, axis=1) for parts in zip(*read, strict=True)]
        for i, row in enumerate(group):
            if following is not None:
                row.prompt_logprobs = [at(read, (i, j)) for j in range(lengths[i] - 1)]
            row.take(new[i : i + 1].tolist(), None if found is None else [part[i : i + 1] for part in found], self.eos)

    def advance(self):
        """Rounds for all slots, and what came of them to the rows."""
        # By what rows may have in all, not by what is left: else a job's end would compile a program of its own.
        needed = max(row.request.max_new_tokens for row in self.rows if row) - 1
        rounds = min(self.rounds, bucket(needed, 1))
        most = rounds * (1 + self.drafts)
        self.resize(
            max(len(r.request.prompt) + min(len(r.tokens) + most, r.request.max_new_tokens) for r in self.rows if r)
        )
        self.state, tokens, found = decode.advance(
            self.model, self.draft, self.state, rounds, self.drafts, self.sampling, self.eos
        )
        tokens, found = jax.device_get((tokens, found))
        for slot, row in enumerate(self.rows):
            if row:
                mine = None
                if found is not None:
                    mine = [flat(part[:, slot]) for part in found]
                row.take(tokens[:, slot].reshape(-1).tolist(), mine, self.eos)

    def resize(self, places: int):
        """A cache with room for as many, for all rows at work; smaller again once a long row is gone."""
        needed = [len(row.request.prompt) + len(row.tokens) for row in self.rows if row]
        places = bucket(max([places, *needed]), 256)
        if self.state is not None and self.places // 4 < places <= self.places:
            return
        self.check_memory(places)
        if self.state is None:
            look_up = self.drafts > 0 and self.draft is None
            args = (self.slots, places, self.cache, self.sampling, look_up, self.draft)
            self.state = decode.Slots.empty(self.model, *args)
        else:
            self.state = decode.resized(self.state, places)
        self.places = places

    def check_memory(self, places: int):
        """A UsageError where weights, cache and the scores of prompts cannot fit, before the device says it itself."""
        models = [m.config for m in (self.model, self.draft) if m]
        cache = self.slots * sum(budget.cache_bytes(config, places, self.cache) for config in models)
        # In f32, as attend_cached has them before and behind the softmax, of the prompts that are read at a time.
        scores = 2 * 4 * self.budget * places * max(config.num_attention_heads for config in models)
        require(
            self.weight_bytes + cache + scores <= self.memory,
            f"{self.slots} rows with {places:,} places need {(cache + scores) / 1e9:.1f} GB beside weights of "
            f"{self.weight_bytes / 1e9:.1f} GB; the device has {self.memory / 1e9:.1f}: take fewer rows at a time "
            "(--batch-size), shorter ones (--max-new-tokens), or an int8 cache (--cache int8)",
        )


def usual_cache(dtype: str) -> str:
    """On a CPU f32: products of bf16 take two rows or more there, and a cache in it is written by way of f32, whole."""
    return "float32" if jax.default_backend() == "cpu" else dtype


def flat(part: np.ndarray) -> np.ndarray:  # RD... -> (RD)...
    return part.reshape(part.shape[0] * part.shape[1], *part.shape[2:])  # no -1: of 0 likeliest there is nothing


def ids(eos) -> tuple[int, ...]:
    if eos is None:
        return ()
    return tuple(sorted({whole(id, "eos") for id in (eos if isinstance(eos, Iterable) else (eos,))}))


def padded(row: Row) -> tuple[int, int]:
    """What a prompt is padded to, or each piece of a long one; and how many pieces it has."""
    n = len(row.request.prompt)
    T = min(LONGEST, bucket(n, SHORTEST))
    return T, -(-n // T)


def bucket(length: int, smallest: int) -> int:
    """The next power of two."""
    return max(smallest, 1 << int(length - 1).bit_length())
