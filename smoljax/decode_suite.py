"""Tables of generation speed: `smoljax bench-decode --suite`. A part is a list of rows, as in suite.py.

Sizes are those of the machine. A row of `decode` is a round alone; `of_bandwidth` is what it reads of weights and of
the cache, all places of it, against the best sum or copy of an f32 matrix here. Next: decode_measure.py.
"""

import gc

import jax

from smoljax import suite
from smoljax.decode_measure import DTYPES, Generation, arithmetic, bandwidth, random_prompts, rounds, served
from smoljax.engine import usual_cache
from smoljax.layout import GROUPS, WAYS, seconds
from smoljax.model import SmolLM
from smoljax.quantize import quantize

LONG = 960  # a context whose rounds still fit into 1,024 places


def run(model: SmolLM, asked: str, out: str | None):
    suite.run(model, asked, out, "bench-decode", PARTS, COLUMNS, lambda: {"bandwidth_gb_s": bandwidth()}, compared)


def compared(found: dict, result: dict):
    """A row's share of the device's bandwidth."""
    if "read_gb_s" in found:
        found["of_bandwidth"] = found["read_gb_s"] / max(result["bandwidth_gb_s"].values())


def forget():
    """The last row's arrays and programs."""
    gc.collect()
    jax.clear_caches()


def decoding(model: SmolLM, dtype: str, cache: str | None, batch: int, context: int):
    def row() -> dict:
        forget()
        laid_out = served(model, dtype, batch)
        generation = Generation(laid_out, random_prompts(model.config, batch, 1), cache)
        return rounds(generation.engine, context) | {"layout": laid_out.report}

    return row


def decode(model: SmolLM):
    """A round by rows, dtype of weights, of the cache, and length of context."""
    contexts = [T for T in (64, LONG) if T + 64 <= model.config.max_position_embeddings] or [1]
    for batch in (1, 8, 32) if suite.on_cpu() else (1, 8, 64, 256):
        for context in contexts:
            for dtype in DTYPES:
                caches = (None,) if dtype == "int8-embedding" else (None, "int8")
                for cache in caches:
                    label = f"{batch} x {context}, {dtype}, cache {cache or usual_cache(arithmetic(dtype))}"
                    yield label, decoding(model, dtype, cache, batch, context)


def prefill(model: SmolLM):
    """Prompts alone, up to the first new token."""
    for batch in (1,) if suite.on_cpu() else (1, 64):
        for length in (64, 128, 256, 512, 1024, 2047):
            if length < model.config.max_position_embeddings:
                for dtype in DTYPES[:3]:
                    yield f"{batch} x {length}, {dtype}", reading(model, dtype, batch, length)


def reading(model: SmolLM, dtype: str, batch: int, length: int):
    def row() -> dict:
        forget()
        generation = Generation(served(model, dtype, batch), random_prompts(model.config, batch, length))
        generation.timed(1)  # compiles
        wall, cpu = sorted(generation.timed(1)[:2] for _ in range(3))[1]
        return {"prefill_tokens_per_s": batch * length / wall, "prefill_s": wall, "cpu_s": cpu}

    return row


def layout(model: SmolLM):
    """Every way to multiply with the model's matrices, those beside each other as one, as layout.py times them."""
    for kind in WAYS:
        whole = quantize(model, embedding=True) if kind == "int8" else model
        products = {("head",): (whole.embed,)}
        products |= {names: tuple(getattr(whole.layers, name) for name in names) for names in GROUPS}
        for names, weights in products.items():
            for rows in (1, 2, 8, 64):
                yield f"{'/'.join(names)}, {rows} rows, {kind}", ways(names, weights, kind, rows)


def ways(names: tuple[str, ...], weights: tuple, kind: str, rows: int):
    def row() -> dict:
        times = {way: 1e3 * seconds(names, weights, arithmetic(kind), way, rows) for way in WAYS[kind]}
        return {f"{way}_ms": ms for way, ms in times.items()} | {"best": min(times, key=times.get)}

    return row


def reach(model: SmolLM):
    """What the device reads in a second, and how much of that decoding one row reaches."""
    for name, speed in bandwidth().items():
        yield f"{name}, float32", lambda speed=speed: {"read_gb_s": speed}
    for dtype in DTYPES:
        yield f"decode, 1 x 64, {dtype}", decoding(model, dtype, None, 1, 64)


PARTS = {"decode": decode, "prefill": prefill, "layout": layout, "bandwidth": reach}

COLUMNS = {
    "decode_tokens_per_s": "tokens/s",
    "round_ms": "ms a round",
    "cpu_s_per_token": "CPU s a token",
    "prefill_tokens_per_s": "tokens/s",
    "prefill_s": "s",
    "cpu_s": "CPU s",
    "read_mb": "MB read",
    "read_gb_s": "GB/s",
    "of_bandwidth": "of bandwidth",
    "memory_gb": "GB compiled",
    "peak_gb": "GB peak so far",
    **{f"{way}_ms": f"{way} ms" for way in dict.fromkeys(way for each in WAYS.values() for way in each)},
    "best": "best",
    "layout": "layout",
    "error": "error",
}
