"""A GGUF file's header: its keys and where its tensors lie, read with bounds, for a file may be hostile.

Not by the `gguf` package, whose reader has none.
"""

import dataclasses
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from smoljax import tensors
from smoljax.errors import DataError

NUMPY = {Type[code]: dtype for code, dtype in tensors.NUMPY.items()}  # F32, BF16, F16
# What we read besides: the kinds that the package dequantises, of which its older releases lack the last ones.
KINDS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M IQ4_NL IQ4_XS"
BLOCKS = tuple(Type[name] for name in f"{KINDS} TQ1_0 TQ2_0 MXFP4 NVFP4".split() if name in Type.__members__)
# SmolLM's header has 1.8 MB with 98,052 strings in 33 keys, and 272 tensors; Llama 3's 8 MB with 408,000 strings. At
# these bounds a header costs less than 64 MB: strings stay bytes objects, 33 more than they hold, plus 8 in their list.
MAX_HEADER, MAX_STRING, MAX_STRINGS, MAX_ITEMS = 20 << 20, 1 << 20, 600_000, 1_000_000
MAX_KEYS, MAX_KEY, MAX_TENSORS, MAX_NAME, MAX_ALIGNMENT = 1024, 256, 20_000, 64, 1 << 16
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9
REQUIRED = object()


@dataclass(frozen=True)
class Tensor:
    type: Type
    shape: tuple[int, ...]  # as numpy has it: the file lists the fastest dimension first
    start: int  # from the file's beginning
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """Keys and tensors of a file whose header is sound; `read_header` makes one."""

    path: Path
    values: dict[str, object]  # int, float, bool, bytes; an array is a list of bytes or a numpy array
    tensors: dict[str, Tensor]

    def fail(self, what: str):
        raise DataError(f"{self.path}: {what}")

    def value(self, key: str, kind: type, default=REQUIRED):
        """A key's value, of this type (str, int, float, list, np.ndarray); the default where the key is absent."""
        found = self.values.get(key, default)
        if found is REQUIRED:
            self.fail(f"{key} is absent; expected the keys of a llama")
        if key not in self.values:
            return found
        found = found if kind in (list, np.ndarray) else single(found)
        found = found.decode() if kind is str and type(found) is bytes else found  # valid, as `strings` saw
        if type(found) is not kind:
            self.fail(f"{key} is {show(found)}, expected {'an array' if kind in (list, np.ndarray) else kind.__name__}")
        return found

    def each(self, key: str, layers: int, default=REQUIRED):
        """An int that llama.cpp has for each layer or for all; a file with different ones is refused."""
        found = self.values.get(key)
        if isinstance(found, np.ndarray) and len(found) == layers > 1:
            if len(set(found.tolist())) > 1:
                self.fail(f"{key} differs by layer: {found.tolist()!s:.60}; smoljax computes equal layers")
            return dataclasses.replace(self, values={key: found[:1]}).value(key, int)
        return self.value(key, int, default)


def single(value):
    """The element of an array of one, as some writers put a number or a text; else the value itself."""
    if not isinstance(value, (list, np.ndarray)) or len(value) != 1:
        return value
    if isinstance(value, list):
        return value[0]
    return shortest(value[0]) if value.dtype == np.float32 else value[0].item()


def shortest(number) -> float:
    """F32's 9.999999747378752e-06 was written as 1e-5: the shortest decimal that rounds to the same number."""
    return float(str(np.float32(number)))


def show(value) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    text = repr(value.decode() if isinstance(value, bytes) else value)
    return text if len(text) < 100 else f"{text[:100]}..."


class Reader:
    """What a header is made of, read in order; a DataError before anything would take more than the file has."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.left, self.strings_left = file, path, min(size, MAX_HEADER), MAX_STRINGS
        self.end = "the file ends" if size <= MAX_HEADER else f"a header of more than {MAX_HEADER:,} bytes"

    def fail(self, what: str):
        raise DataError(f"{self.path}: {what}")

    def take(self, n: int, what: str) -> bytes:
        if n > self.left:
            self.fail(f"{self.end} within {what}, which needs {n:,} bytes where {self.left:,} are left")
        self.left -= n
        if len(found := self.file.read(n)) != n:
            self.fail(f"the file ends within {what}")
        return found

    def number(self, code: str, what: str):
        found = self.take(struct.calcsize(code), what)
        if code == "?" and found not in (b"\0", b"\1"):
            self.fail(f"{what} is {found[0]}, expected a bool of 0 or 1")
        found = struct.unpack(f"<{code}", found)[0]
        return shortest(found) if code == "f" else found

    def string(self, what: str, limit: int = MAX_STRING) -> bytes:
        return self.strings(1, what, limit)[0]

    def strings(self, n: int, what: str, limit: int = MAX_STRING) -> list[bytes]:
        if n > self.strings_left or 8 * n > self.left:
            self.fail(f"{what} has {n:,} strings, more than the file or the bound of {MAX_STRINGS:,} in all allows")
        self.strings_left -= n
        found = []
        for _ in range(n):
            if (length := int.from_bytes(self.take(8, what), "little")) > limit:
                self.fail(f"{what} has a string of {length:,} bytes, expected at most {limit:,}")
            found.append(self.take(length, what))
            try:
                found[-1].decode()
            except UnicodeDecodeError as e:
                self.fail(f"{what} is not UTF-8 ({e.reason} at byte {e.start})")
        return found

    def value(self, what: str):
        kind = self.number("I", what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            return self.number(self.code(kind, what), what)
        kind, n = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            return self.strings(n, what)
        code = self.code(kind, what)
        if n > MAX_ITEMS:
            self.fail(f"{what} is an array of {n:,}, expected at most {MAX_ITEMS:,}")
        return np.frombuffer(self.take(n * struct.calcsize(code), what), np.dtype(f"<{code}".replace("<?", "?")))

    def code(self, kind: int, what: str) -> str:
        if kind not in NUMBERS:
            self.fail(f"{what} is {'a nested array' if kind == ARRAY else f'of the unknown type {kind}'}")
        return NUMBERS[kind]

    def tensor(self, name: str) -> tuple[Type, tuple[int, ...], int]:
        """Its type, its shape, its offset among the data."""
        what = f"tensor {name!r}"
        if not 1 <= (n := self.number("I", what)) <= 4:
            self.fail(f"{what} has {n:,} dimensions, expected 1 to 4")
        shape = tuple(self.number("Q", what) for _ in range(n))[::-1]
        kind, offset = self.number("I", what), self.number("Q", what)
        try:
            kind = Type(kind)
        except ValueError:
            self.fail(f"{what} is of the unknown type {kind}")
        if kind not in NUMPY and kind not in BLOCKS:
            known = ", ".join(k.name for k in (*NUMPY, *BLOCKS))
            self.fail(f"{what} is {kind.name}, expected one of {known}; requantise the model")
        if 0 in shape or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            block = gguf.GGML_QUANT_SIZES[kind][0]
            self.fail(f"{what} has shape {list(shape)}, expected {kind.name} rows of whole blocks of {block}")
        return kind, shape, offset


def read_header(path: Path) -> Header:
    """The keys and tensors of a file, all of it checked but the numbers. Raises DataError."""
    try:
        if not path.is_file():  # a pipe would block, a device never end
            raise DataError(f"there is no file {path}; expected a GGUF file there")
        with open(path, "rb") as file:
            return parse(Reader(file, path, size := path.stat().st_size), size)
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None


def parse(reader: Reader, size: int) -> Header:
    fail = reader.fail
    if (magic := reader.take(4, "the magic number")) != b"GGUF":
        fail(f"begins with {magic!r}, not with 'GGUF': it is no GGUF file")
    version = reader.number("I", "the version")
    if version in (2 << 24, 3 << 24):
        fail("is a big-endian GGUF file; convert it to little-endian with gguf-convert-endian")
    if version not in (2, 3):
        fail(f"is of GGUF version {version}, expected 2 or 3")
    tensors, keys = reader.number("Q", "the tensor count"), reader.number("Q", "the key count")
    for n, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if n > most:
            fail(f"claims {n:,} {what}, expected at most {most:,}")
    values, found = {}, {}
    for _ in range(keys):
        key = reader.string("a key's name", MAX_KEY).decode()
        if key in values:
            fail(f"holds the key {key!r} twice")
        values[key] = reader.value(f"key {key!r}")
    for _ in range(tensors):
        name = reader.string("a tensor's name", MAX_NAME).decode()
        if name in found:
            fail(f"holds the tensor {name!r} twice")
        found[name] = reader.tensor(name)
    header = Header(reader.path, values, {})
    alignment = header.value("general.alignment", int, gguf.GGUF_DEFAULT_ALIGNMENT)
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        fail(f"general.alignment is {alignment}, expected a power of two from 8 to {MAX_ALIGNMENT}")
    start = -(-reader.file.tell() // alignment) * alignment
    return dataclasses.replace(header, tensors=place(found, start, alignment, size, fail))


def place(found: dict, data: int, alignment: int, size: int, fail) -> dict[str, Tensor]:
    """Tensors where they lie in the file: inside it, aligned, none over another."""
    tensors = {}
    for name, (kind, shape, offset) in found.items():
        block, width = gguf.GGML_QUANT_SIZES[kind]
        tensors[name] = Tensor(kind, shape, data + offset, math.prod(shape) // block * width)
        if offset % alignment:
            fail(f"tensor {name!r} begins at {offset:,}, which is no multiple of the alignment {alignment}")
        if (end := tensors[name].start + tensors[name].size) > size:
            fail(f"tensor {name!r} of shape {list(shape)} ends at byte {end:,}, but the file has {size:,}: is it cut?")
    order = sorted(tensors, key=lambda name: tensors[name].start)
    for one, two in zip(order, order[1:], strict=False):
        if tensors[one].start + tensors[one].size > tensors[two].start:
            fail(f"tensors {one!r} and {two!r} overlap")
    return tensors
