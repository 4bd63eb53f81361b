"""safetensors files, read and written a tensor at a time: the only file that knows their layout.

The `safetensors` library checks a file (offsets inside it, no hole, no overlap, sizes as the shapes say); numpy then
maps one tensor of it, so that a model of any size costs the memory of the tensor in hand.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from smoljax.errors import DataError
from smoljax.hf_config import parse_json

NUMPY = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("float16")}
STORED = NUMPY | {"I8": np.dtype("int8")}  # a model's numbers, and what smoljax's own int8 adds
CODES = {dtype.name: code for code, dtype in STORED.items()}
# The 1.7B model's header is 25 kB, 4 MB are 3,000 layers. The library would take 100 MB, and a gigabyte to read them.
MAX_HEADER = 4 << 20


@dataclass(frozen=True)
class File:
    """A safetensors file whose header is sound; `open_file` makes one."""

    path: Path
    start: int  # where the data begins
    size: int  # bytes of data
    metadata: dict[str, str]
    entries: dict[str, tuple[str, tuple[int, ...]]]  # a tensor's name -> its dtype code, its shape
    offsets: dict[str, int]  # from `start`

    def get(self, name: str) -> np.ndarray:
        """One tensor, mapped: read-only, and on disk until it is used."""
        code, shape = self.entries[name]
        if code not in STORED:
            raise DataError(f"{self.path}: tensor {name} is {code}; expected one of {', '.join(STORED)}")
        if 0 in shape:
            raise DataError(f"{self.path}: tensor {name} has shape {list(shape)}, which holds nothing")
        return np.asarray(np.memmap(self.path, STORED[code], "r", self.start + self.offsets[name], shape))


def open_file(path: Path) -> File:
    """Raises DataError that names the file, and the tensor where it is one tensor's fault."""
    if not path.is_file():  # a pipe would block, a device never end
        raise DataError(f"there is no file {path}; expected safetensors weights there")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise DataError(f"{path} asks for a header of {length:,} bytes, expected at most {MAX_HEADER:,}")
            text = file.read(length)
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is no sound safetensors file ({e})") from None
    header = parse_json(text, path)  # what the library lets pass: the same tensor twice
    metadata, start = header.pop("__metadata__", {}), 8 + length
    entries = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}
    return File(path, start, path.stat().st_size - start, metadata, entries, offsets)


def write(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str | dict[str, str], get: Callable[[str], np.ndarray]
):
    """One file of these tensors in this order. By hand, since the library wants all of them in memory at once.

    dtype: of all, or of each by its name.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        code = CODES[dtype if isinstance(dtype, str) else dtype[name]]
        end = offset + math.prod(shape) * STORED[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with open(path, "xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            out.write(np.ascontiguousarray(get(name)).view(np.uint8).reshape(-1).data)
