"""How fast generation is here, on random prompts: what `smoljax bench-decode` prints and docs/benchmarks keeps.

Greedy, no token ends a row, one device. A run is an Engine's, with all that it does: prompts read, tokens fetched. Its
decoding alone is a run without the time of another for one new token each, which is the prompt's reading and no more.
A round alone (`rounds`) is the device's program for all rows, over a cache that nobody filled: its time depends on
lengths, not on numbers. Needs JAX, flax, optax and numpy alone, as measure.py.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smoljax import decode, metrics
from smoljax.config import Compute, Model
from smoljax.engine import Engine, bucket
from smoljax.layout import Served, lay_out
from smoljax.model import SmolLM
from smoljax.quantize import quantize
from smoljax.request import Request

DTYPES = ("float32", "bfloat16", "int8", "int8-embedding")


def random_model(config: Model) -> SmolLM:
    return jax.jit(lambda: SmolLM(config, nnx.Rngs(0), config.initializer_range))()


def random_prompts(config: Model, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).tolist()


def usual() -> str:
    """The dtype that is compared where none is said, and in which int8's arithmetic is done."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def arithmetic(dtype: str) -> str:
    return usual() if dtype.startswith("int8") else dtype


def served(model: SmolLM, dtype: str, rows: int) -> Served:
    """The f32 model in one of DTYPES, laid out for so many rows."""
    if dtype.startswith("int8"):
        model = quantize(model, embedding=dtype == "int8-embedding")
    return lay_out(model, arithmetic(dtype), rows)


class Generation:
    """The same prompts again and again through one engine, with a slot for each."""

    def __init__(self, model: Served, prompts: Sequence[list[int]], cache: str | None = None, drafts: int = 0):
        compute = Compute(dtype=model.dtype)
        self.prompts = prompts
        self.engine = Engine(model, len(prompts), compute=compute, cache=cache, drafts=drafts, eos=())

    def timed(self, new_tokens: int) -> tuple[float, float, list[list[int]]]:
        """Wall and CPU seconds of a whole run, and the tokens of each row."""
        begun, used = time.perf_counter(), time.process_time()
        rows = dict(self.engine.run([Request(prompt, new_tokens) for prompt in self.prompts]))
        wall, cpu = time.perf_counter() - begun, time.process_time() - used
        return wall, cpu, [rows[i].tokens for i in range(len(self.prompts))]


def window(side, new_tokens: int) -> tuple[float, float, float, list[list[int]]]:
    """Seconds of a run for one new token, wall and CPU seconds of a whole one, its tokens.

    One run before them is not timed: until then caches are another's.
    """
    side.timed(1)
    first = side.timed(1)[0]
    return first, *side.timed(new_tokens)


def figures(windows: list, batch: int, prompt_tokens: int, new_tokens: int) -> dict:
    """Medians of windows. `tokens_per_s` is of whole runs, `decode_tokens_per_s` of decoding alone."""
    first, wall, cpu = (statistics.median(w[i] for w in windows) for i in range(3))
    found = {"tokens_per_s": batch * new_tokens / wall, "wall_s": wall}
    decoding = [w[1] - w[0] for w in windows]
    if new_tokens > 1 and min(decoding) > 0:  # else it is too short to be told from the prompt
        found["decode_tokens_per_s"] = batch * (new_tokens - 1) / statistics.median(decoding)
    found |= {"prefill_s": first, "prefill_tokens_per_s": batch * prompt_tokens / first}
    return found | {"cpu_s_per_token": cpu / (batch * new_tokens)}


def speed(generation: Generation, new_tokens: int, windows: int = 3) -> dict:
    begun = time.perf_counter()
    generation.timed(new_tokens)
    generation.timed(1)
    warmup = time.perf_counter() - begun
    prompts = generation.prompts
    taken = [window(generation, new_tokens) for _ in range(windows)]
    row = figures(taken, len(prompts), len(prompts[0]), new_tokens) | {"warmup_s": warmup}
    one = rounds(generation.engine, len(prompts[0]), 1)
    row |= {name: one[name] for name in ("read_mb", "memory_gb", "peak_gb")}
    return row | {"layout": generation.engine.model.report}


def rounds(engine: Engine, context: int, windows: int = 3) -> dict:
    """A round of all slots with `context` places seen: the device's program, and the fetching of its tokens."""
    n, model = engine.slots, engine.model
    places = bucket(context + engine.rounds * (1 + engine.drafts), 256)
    args = (n, places, engine.cache, engine.sampling, engine.drafts, None)
    state, taken = decode.Slots.empty(model, *args), []
    how = (engine.rounds, engine.drafts, engine.sampling, engine.eos)
    for _ in range(1 + windows):  # the first compiles
        position, left = (jnp.full(n, number, jnp.int32) for number in (context, 1 << 30))
        state = dataclasses.replace(state, position=position, left=left)
        jax.block_until_ready(state)
        begun, used = time.perf_counter(), time.process_time()
        state, tokens, _ = decode.advance(model, None, state, *how)
        jax.device_get(tokens)
        taken.append((time.perf_counter() - begun, time.process_time() - used))
    wall, cpu = (statistics.median(t[i] for t in taken[1:]) / engine.rounds for i in range(2))
    m = decode.advance.lower(model, None, state, *how).compile().memory_analysis()
    out = max(0, m.output_size_in_bytes - m.alias_size_in_bytes)
    read = weight_bytes(model) + size(state.cache)
    row = {"decode_tokens_per_s": n / wall, "round_ms": wall * 1e3, "cpu_s_per_token": cpu / n}
    row |= {"read_mb": read / 1e6, "read_gb_s": read / wall / 1e9}
    row["memory_gb"] = (m.argument_size_in_bytes + m.temp_size_in_bytes + out) / 1e9
    return row | {"peak_gb": metrics.device_peak_gb(jax.devices()[0]).get("device/mem_peak_gb")}


def size(tree) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def weight_bytes(model: Served) -> int:
    """Bytes that a round reads of the weights: all of them, but of the embedding's own form a few rows alone."""
    return size((model.layers, model.norm, model.head))


@cache
def bandwidth(seconds: float = 1.0) -> dict:
    """GB/s of the best of many sums over rows of an f32 matrix, and of its copy, which reads and writes."""
    rows = 1 << (16 if jax.default_backend() == "cpu" else 18)
    a, found = jnp.ones((rows, 4096), jnp.float32), {}
    for name, times, form in (("sum", 1, partial(jnp.sum, axis=1)), ("copy", 2, lambda a: a + 1)):
        form, best = jax.jit(form), float("inf")
        form(a).block_until_ready()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            begun = time.perf_counter()
            form(a).block_until_ready()
            best = min(best, time.perf_counter() - begun)
        found[name] = times * a.nbytes / best / 1e9
    return found
