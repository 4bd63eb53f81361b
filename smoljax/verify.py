"""Whether what was written is what was read: tensor by tensor, by logits, and by transformers where it is installed."""

import contextlib
import dataclasses
import importlib.util
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smoljax import chat, exchange, gguf, special_tokens, weights
from smoljax.config import Model
from smoljax.errors import DataError
from smoljax.exchange import Source
from smoljax.model import SmolLM
from smoljax.quantize import TINY, dequantized

TEXT = """<|im_start|>user
What is the capital of France, and since when?<|im_end|>
<|im_start|>assistant
Paris has been the capital of France for most of the time since 987, when Hugh Capet made it his seat.
def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)  # 2.5 for [1, 2, 3, 4],   12345 or 3.14159


caf\u00e9 \u2013 \u6771\u4eac \U0001f916 \u00bd
"""
# A quantised number is at most this part of a block's step from the true one: Q8_0 rounds to nearest in steps of
# amax / 127; Q4_0's steps of amax / 8 reach from -8 to 7, so that +amax itself is a whole step off. A step is stored
# in f16, 11 bits of it, which moves the ends of Q8_0's range by another 127 / 2048 of a step.
STEPS = {"q8_0": (127, 0.5 + 127 / 2048), "q4_0": (8, 1 + 8 / 2048)}
HALF = 0.5 + 127 / 2**22  # of int8's step, which is a row's own, in f32
TRANSFORMERS = (
    1e-3  # largest difference of logits, both in f32; 1.1e-4 on the real 135M, units where the rotary layout is wrong
)


def compare(source: Source, folder: Path, dtype: str) -> dict:
    """Read `folder` back and compare it with `source`; DataError where they differ by more than `dtype` does."""
    with weights.open_source(folder) as written:
        report = {"tensors": tensors(source, written, dtype)}
        if written.ints:
            report["bytes"] = sizes(written)
        ids = fixed_ids(source)
        ours = logits(written, ids)
        before = logits(source, ids)
        for each, found in ((source, before), (written, ours)):
            if not np.isfinite(found).all():
                raise DataError(
                    f"{each.name}: the logits of a text are not finite, which proves nothing; its numbers are too "
                    "large for f32, or the weights are damaged"
                )
        report["logits"] = {"tokens": len(ids), "largest_difference": float(np.abs(ours - before).max())}
        report["loss"] = {"source": loss(before, ids), "written": loss(ours, ids)}
        check_config(source, written)
        report["tokenizer"] = check_words(source, written)
    if written.ints:
        report["transformers"] = "not compared, it does not read this format"
    else:
        report["transformers"] = with_transformers(folder, source.config, ids, ours)
    return report


def check_config(source: Source, written: Source):
    """The same config, but for initializer_range, which says nothing about these weights: GGUF has no key for it.

    GGUF has one bos, eos and pad for model and tokenizer, where a folder may have two: there what a chat template sees
    and which ids end a text are compared.
    """
    config, same = source.config, {"initializer_range": source.config.initializer_range}
    if written.name.startswith("GGUF"):
        same |= {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        before, after = (special(each) for each in (source, written))
        if before != after:
            raise DataError(f"{written.name} has other special tokens than its source: {before} were, {after} are")
    found = dataclasses.replace(written.config, **same)
    if found != config:
        pairs = {k: (v, getattr(found, k)) for k, v in vars(config).items() if getattr(found, k) != v}
        odd = ", ".join(f"{key} was {was}, is {now}" for key, (was, now) in pairs.items())
        raise DataError(f"{written.name} has another config than its source: {odd}")


def special(each: Source) -> tuple[dict[str, str], list[int]]:
    """The named special tokens, and the ids that end a text."""
    words = weights.words(each.files, each.config, each.name)
    seen = special_tokens.seen(each.files, each.config, words)
    named = {name: text for name, text in seen.items() if name in special_tokens.NAMES}
    return named, sorted(special_tokens.ends(each.files, each.config, words))


def check_words(source: Source, written: Source) -> str:
    """The same vocabulary, the same ids of a text, the same chat template; the special ids are the config's."""
    theirs, mine = (weights.words(each.files, each.config, each.name) for each in (written, source))
    if mine is None or theirs is None:
        if mine is not theirs:
            raise DataError(f"{written.name} and {source.name}: only one of them has a tokenizer")
        return "none"
    whole = written.files["tokenizer.json"] == source.files["tokenizer.json"]
    rebuilt = written.name.startswith("GGUF")  # GGUF has the vocabulary and the merges, not the file
    alike = theirs.get_vocab() == mine.get_vocab() and theirs.encode(TEXT).ids == mine.encode(TEXT).ids
    if not (whole or (alike and rebuilt)):
        raise DataError(f"{written.name} has another tokenizer than {source.name}; what was written was removed")
    if chat.templates(written.files) != chat.templates(source.files):
        raise DataError(f"{written.name} has another chat template than {source.name}; what was written was removed")
    return f"the same {len(mine.get_vocab())} tokens, and ids of a text"


def tensors(source: Source, written: Source, dtype: str) -> dict:
    """Each tensor as the source's rounded to `dtype`, bit for bit; quantised ones within their block's step."""
    exact, largest = 0, (0.0, None)
    for name in exchange.shapes(source.config):
        theirs = written.tensor(name)
        kind = "q8_0" if name == exchange.EMBED and dtype in STEPS else dtype
        if dtype == "int8":
            kind = "int8" if name in written.ints else "bfloat16"
        mine = source.tensor(name, kind if kind in exchange.DTYPES else "float32")
        if kind in STEPS and mine.ndim > 1 and mine.shape[1] % 32:  # no whole blocks: gguf.write falls back to f16
            mine = source.tensor(name, "float16")
        if same(mine, theirs):
            exact += 1
            continue
        if kind not in exchange.DTYPES and mine.ndim > 1 and not same(quantised(source, name, mine, kind), theirs):
            raise DataError(f"{written.name}: tensor {name} is not that of {source.name}, quantised; it was removed")
        off = float(np.abs(mine.astype(np.float32) - theirs.astype(np.float32)).max())
        if off > largest[0]:
            largest = off, name
        if not within_a_step(mine, theirs, kind):
            raise DataError(
                f"{written.name}: tensor {name} differs from that of {source.name} by up to {off:.3g}; "
                "what was written is wrong and was removed"
            )
    return {"count": len(exchange.shapes(source.config)), "exact": exact, "largest_difference": largest[0]}


def quantised(source: Source, name: str, mine: np.ndarray, kind: str) -> np.ndarray:
    """What is to be read back of a tensor that is quantised."""
    if kind == "int8":
        values, scale = source.int8(name)
        return dequantized(values, scale[:, None])
    return gguf.rounded(mine, kind)


def sizes(written: Source) -> dict[str, int]:
    """Bytes of an int8 model's weights and scales, as they were read."""
    found = {"weights": 0, "scales": 0}
    for name in exchange.shapes(written.config):
        values, scale = written.int8(name) if name in written.ints else (written.get(name), None)
        found["weights"] += values.nbytes
        found["scales"] += 0 if scale is None else scale.nbytes
    return found | {"total": sum(found.values())}


def same(mine: np.ndarray, theirs: np.ndarray) -> bool:
    """The same numbers, bit for bit; norms, which GGUF keeps in f32, are compared in that."""
    rows = zip(np.atleast_2d(mine), np.atleast_2d(theirs), strict=True)
    return all(a.astype(np.float32).tobytes() == b.astype(np.float32).tobytes() for a, b in rows)


def within_a_step(mine: np.ndarray, theirs: np.ndarray, kind: str) -> bool:
    """Whether each block of 32, in int8 each row, is as near as its quantisation allows."""
    if kind == "int8":
        steps = np.abs(mine).max(axis=1) / 127 + 254 * TINY  # rows of such numbers are 0
        return all((np.abs(a - b) <= HALF * step).all() for a, b, step in zip(mine, theirs, steps, strict=True))
    if kind not in STEPS or mine.ndim == 1 or mine.shape[1] % 32:
        return False
    steps, part = STEPS[kind]
    for a, b in zip(mine, theirs, strict=True):
        a, b = a.reshape(-1, 32), b.reshape(-1, 32)
        step = np.abs(a).max(axis=1, keepdims=True) / steps
        if (np.abs(a - b) > part * step).any():
            return False
    return True


def fixed_ids(source: Source) -> np.ndarray:
    """TEXT's ids; without a tokenizer, ids spread over the vocabulary."""
    words = weights.words(source.files, source.config, source.name)
    if words is not None:
        return np.array(words.encode(TEXT).ids, np.int32)
    return (np.arange(64) * 7919 % source.config.vocab_size).astype(np.int32)


forward = jax.jit(SmolLM.__call__)


def logits(source: Source, ids: np.ndarray) -> np.ndarray:  # T -> TV
    return np.asarray(forward(exchange.assemble(source), ids[None]))[0]


def loss(logits: np.ndarray, ids: np.ndarray) -> float:
    """Nats a token: a wrong layout on both sides of a conversion shows here alone (2.2 becomes 3.8 on SmolLM2-135M)."""
    logp = jax.nn.log_softmax(jnp.asarray(logits[:-1]), axis=-1)
    return float(-jnp.take_along_axis(logp, ids[1:, None], axis=-1).mean())


def with_transformers(folder: Path, config: Model, ids: np.ndarray, ours: np.ndarray) -> dict | str:
    """The largest difference of logits, or why there is none to report."""
    file = next(folder.glob("*.gguf"), None)
    for package in ("torch", "transformers") + (("accelerate",) if file else ()):
        if importlib.util.find_spec(package) is None:
            return f"not compared, {package} is not installed"
    if (folder / "checkpoints").is_dir():
        return "not compared, it does not read this format"
    if config.hidden_size % config.num_attention_heads:
        return "not compared, it wants heads that divide hidden_size"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    how = {"gguf_file": file.name if file else None, "dtype": torch.float32, "attn_implementation": "eager"}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no setting of transformers turns off
            theirs = AutoModelForCausalLM.from_pretrained(folder, **how)
        with torch.no_grad():
            theirs = theirs(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    except Exception as e:
        raise DataError(f"{folder}: transformers cannot read what was written ({type(e).__name__}: {e})") from e
    if file is None and (folder / "tokenizer.json").is_file():
        found = AutoTokenizer.from_pretrained(folder)
        words = weights.load_tokenizer(folder)
        if found(TEXT)["input_ids"] != words.encode(TEXT).ids:
            raise DataError(f"{folder}: transformers gives other ids than tokenizer.json; what was written was removed")
    off = float(np.abs(theirs - ours).max())
    if not off <= TRANSFORMERS:
        raise DataError(
            f"{folder}: transformers' logits differ from ours by up to {off:.3g}, expected at most {TRANSFORMERS}; "
            "what was written is wrong and was removed"
        )
    return {"largest_difference": off, "loss": loss(theirs, ids)}
