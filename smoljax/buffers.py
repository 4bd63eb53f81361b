"""Buffers that older savers kept beside the weights: computed here, so passed over, and checked against the config."""

import logging
import re
from collections.abc import Callable

import numpy as np

from smoljax.config import Model
from smoljax.errors import DataError
from smoljax.tensors import NUMPY, File

STORED = NUMPY | {"F64": np.dtype("f8"), "I64": np.dtype("i8"), "I32": np.dtype("i4"), "I8": np.dtype("i1")}
STORED |= {"U8": np.dtype("u1"), "BOOL": np.dtype("?")}
# Of a number near 1 in each dtype; the angles of a table of 8,192 positions are off by a thousandth already in f32.
ROUNDED = {"F64": 1e-5, "F32": 1e-5, "F16": 2**-10, "BF16": 2**-7}


def inv_freq(found, config: Model, off: float) -> bool:
    H = config.head_dim
    expected = config.rope_theta ** (-np.arange(0, H, 2) / H)
    return found.shape == expected.shape and np.allclose(found, expected, off, 6e-8)  # F16's smallest step


def cached(function: Callable) -> Callable:
    """The check of a table of cosines or sines of all positions, [..., T, H]."""

    def check(found, config: Model, off: float) -> bool:
        H = config.head_dim
        if found.ndim < 2 or found.shape[-1] != H or found.size != found.shape[-2] * H:
            return False
        angles = np.arange(found.shape[-2])[:, None] * config.rope_theta ** (-np.arange(0, H, 2) / H)
        return np.allclose(found.reshape(-1, H), function(np.concatenate([angles, angles], 1)), 0, off + 2e-3)

    return check


def causal(found, config: Model, off: float) -> bool:
    """[..., T, T]: nothing above the diagonal, or nothing on it and below."""
    if found.ndim < 2 or found.shape[-1] != found.shape[-2] or found.size != found.shape[-1] ** 2:
        return False
    ones = found.reshape(found.shape[-2:]) != 0
    return np.array_equal(ones, np.tri(len(ones), dtype=bool)) or np.array_equal(ones, ~np.tri(len(ones), dtype=bool))


def masked(found, config: Model, off: float) -> bool:
    return found.size == 1 and bool(found.reshape(()) <= -1e3)


def positions(found, config: Model, off: float) -> bool:
    return np.array_equal(found.reshape(-1), np.arange(found.size))


# What a name ends with; each was a buffer of transformers' models of this kind, GPT-2's and GPT-NeoX's among them.
KINDS = {
    r"(rotary_emb|rotary|rope)\.(original_)?inv_freq": inv_freq,
    r"rotary_emb\.cos_cached": cached(np.cos),
    r"rotary_emb\.sin_cached": cached(np.sin),
    r"(self_attn|attn|attention)\.masked_bias": masked,
    r"(self_attn|attn|attention)\.bias|causal_mask": causal,
    r"position_ids": positions,
}
log = logging.getLogger("smoljax")


def passed_over(name: str, where: dict[str, File], config: Model, among: set[str]) -> set[str]:
    """Which of these tensors are such buffers; one that is not what the config says is a DataError.

    Args:
      name: of what holds them, for messages.
      where: a tensor's name -> its file.
    """
    buffers = {}
    for tensor in sorted(among):
        for pattern, check in KINDS.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", tensor):
                buffers[tensor] = check
    for tensor, check in buffers.items():
        file = where[tensor]
        code, shape = file.entries[tensor]
        found = read(file, tensor)
        if found is None or not check(found, config, ROUNDED.get(code, 0)):
            raise DataError(
                f"{file.path}: the buffer {tensor} ({code} {list(shape)}) is not what config.json says (rope_theta "
                f"{config.rope_theta:g}, {config.head_dim} numbers a head); mend the one that is wrong, or remove the "
                "buffer"
            )
    if buffers:
        some = ", ".join([*buffers][:2]) + ", ..." * (len(buffers) > 2)
        log.warning(f"{name}: {len(buffers)} buffers are passed over, for they are computed here ({some})")
    return set(buffers)


def read(file: File, tensor: str) -> np.ndarray | None:
    """Its numbers in f64, or whole ones as they are; None where they are of another dtype."""
    code, shape = file.entries[tensor]
    if code not in STORED or 0 in shape:
        return None
    found = np.memmap(file.path, STORED[code], "r", file.start + file.offsets[tensor], shape or (1,))
    return np.asarray(found).astype(np.float64) if code in ROUNDED else np.asarray(found)
