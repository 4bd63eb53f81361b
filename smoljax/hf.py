"""Hugging Face folders, in and out: config.json, one or many safetensors files, and what lies beside them.

hf_config.py is config.json, tensors.py a safetensors file, companions.py the small files, exchange.py the table.
"""

import functools
import logging
import math
from pathlib import Path

import numpy as np

from smoljax import atomic, buffers, companions, exchange, tensors
from smoljax import tokenizer as tokenizers
from smoljax.companions import inside
from smoljax.config import Model
from smoljax.errors import DataError, require
from smoljax.exchange import DTYPES, EMBED, SCALE, Source, layout
from smoljax.hf_config import from_config, int8_config, read_json, to_config
from smoljax.model import SmolLM
from smoljax.quantize import dequantized

HEAD = "lm_head.weight"  # absent where the head is tied; some writers store the copy all the same
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 16 << 20  # bytes; the 1.7B model's would have 20 kB

log = logging.getLogger("smoljax")


def is_folder(folder: Path) -> bool:
    """Whether a folder holds the config.json of a model, and not that of a run."""
    return (folder / "config.json").is_file() and "model" not in read_json(inside(folder, "config.json"))


def open_source(folder: str | Path) -> Source:
    """A folder with its config.json read and all its headers checked; the numbers are read by Source.tensor."""
    folder = Path(folder)
    found, embedding = int8_config(read_json(inside(folder, "config.json")), str(folder / "config.json"))
    files = companions.read(folder)
    if (folder / companions.ADAPTER).is_file():
        log.warning(f"{folder} holds an adapter beside the model ({companions.ADAPTER}), which is not applied")
    config = from_config(companions.generation_ids(found, files, folder), str(folder / "config.json"))
    opened = open_files(folder)
    where = {name: file for file in opened for name in file.entries}
    dtype = check(folder, where, config, embedding)

    def whole(name: str):
        return where[name].get(name), where[name + SCALE].get(name + SCALE)

    ints = {name: functools.partial(whole, name) for name in where if name + SCALE in where}

    def get(name: str) -> np.ndarray:
        if name not in ints:
            return where[name].get(name)
        values, scale = source.int8(name)
        return dequantized(values, scale[:, None])

    source = Source(config, dtype, get, f"Hugging Face folder {folder}", files, ints)
    if HEAD in where and not equal(get(HEAD), get(EMBED)):
        raise DataError(
            f"{folder}: {HEAD} differs from {EMBED}, although config.json says tie_word_embeddings; "
            "smoljax has tied heads only"
        )
    return source


def open_files(folder: Path) -> list[tensors.File]:
    """model.safetensors, or the files that the index names, which must hold what it says and nothing else."""
    single, index = inside(folder, SINGLE), inside(folder, INDEX)
    if single.is_file() and index.is_file():  # some writers give both, of one file
        named = read_json(index, MAX_INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(value == SINGLE for value in named.values()):
            raise DataError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    elif single.is_file():
        return [tensors.open_file(single)]
    if not index.is_file():
        companions.check_no_adapter(folder)
        pickles = [p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
        raise DataError(
            f"{folder} has a config.json but no {SINGLE}; expected the weights in that file or in those of {INDEX}"
            + (f" ({pickles[0]} is a pickle, which can run code: save it as safetensors in torch)" if pickles else "")
        )
    found = read_json(index, MAX_INDEX)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DataError(f"{index} has no weight_map from tensors to files")
    opened, size = [], 0
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors"):
            raise DataError(f"{index} names the file {name!r}, expected a name that ends with .safetensors")
        file = tensors.open_file(inside(folder, name))
        if odd := sorted(set(file.entries) ^ {tensor for tensor, its in weight_map.items() if its == name}):
            raise DataError(f"{index} and {name} differ: only one of them has {some(odd)}")
        size += file.size
        opened.append(file)
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"{index}: metadata is {metadata!r:.60}, expected an object")
    total = metadata.get("total_size")
    if total is not None and str(total) != str(size):  # some writers have it as text, or null
        raise DataError(f"{index}: total_size is {total}, but the tensors have {size} bytes; a file may be missing")
    return opened


def check(folder: Path, where: dict[str, tensors.File], config: Model, embedding: bool | None) -> str:
    """All tensors are there, no other is, and each has its shape: the dtype that holds them all.

    embedding: whether it is int8 too; None where config.json says that nothing is. Of int8, each dtype is given.
    """
    kind = None if embedding is None else "int8"
    for name, file in where.items():
        if kind is None and file.entries[name][0] == "I8":
            raise DataError(
                f"{file.path}: tensor {some([name])} is I8, but config.json has no quantization_config of smoljax's; "
                f"expected one of {', '.join(tensors.NUMPY)}"
            )
    expected = layout(config, kind, bool(embedding))
    if HEAD in where and not embedding:
        expected[HEAD] = expected[EMBED]
    missing, extra = sorted(set(expected) - set(where)), set(where) - set(expected)
    if kind is None:
        extra -= buffers.passed_over(str(folder), where, config, extra)
    extra = sorted(extra)
    if missing or extra:
        raise DataError(
            f"{folder} does not hold the tensors that config.json describes: missing: {some(missing)}; "
            f"not expected: {some(extra)}"
        )
    dtypes = set()
    for name, (own, shape) in expected.items():
        file = where[name]
        code, found = file.entries[name]
        if found != shape:
            raise DataError(
                f"{file.path}: tensor {name} has shape {list(found)}, but config.json gives it {list(shape)}"
            )
        if code not in (known := tensors.NUMPY if kind is None else [tensors.CODES[own]]):
            raise DataError(f"{file.path}: tensor {name} is {code}; expected one of {', '.join(known)}")
        dtypes.add(tensors.STORED[code].name)
    return kind or exchange.widest(dtypes)


def some(names: list[str]) -> str:
    """The first of them, for one line: a hostile name may hold line ends."""
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Row by row: the embedding of the 1.7B has 200 MB."""
    return one.dtype == other.dtype and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def load(folder: str | Path, dtype: str | None = None) -> tuple[SmolLM, Model]:
    """A model and its config from a folder.

    Args:
      dtype: of the arrays, one of exchange.DTYPES; the files' own when None, and then int8 is QTensors.

    Raises DataError.
    """
    source = open_source(folder)
    return exchange.assemble(source, dtype), source.config


def save(
    folder: str | Path, model: SmolLM, config: Model, dtype: str | None = None, tokenizer: str | Path | None = None
):
    """Write a folder that transformers, and `load`, read: weights, config and, if given, the tokenizer's files.

    Args:
      dtype: of the file, one of exchange.DTYPES or int8; the model's own when None.
      tokenizer: a tokenizer.json or a folder that holds one.
    """
    files = {} if tokenizer is None else companions.read(tokenizers.find(tokenizer).parent)
    with atomic.fresh(folder) as part:
        write(part, exchange.of_model(model, config, files), dtype)


def write(
    folder: Path,
    source: Source,
    dtype: str | None = None,
    max_file_size: int | None = None,
    embedding: bool = False,
):
    """Into a folder that exists. Tensors come from the source one at a time, so one is in memory.

    Args:
      max_file_size: bytes; weights beyond it are split over several files with an index. None: one file.
      embedding: int8: whether the embedding is int8, too; where the source's is, it stays so.
    """
    dtype, config = dtype or source.dtype, source.config
    known = (*DTYPES, "int8")
    require(dtype in known, f"dtype is {dtype!r}, expected one of {', '.join(known)}")
    embedding |= EMBED in source.ints
    atomic.write_json(folder / "config.json", to_config(config, dtype, embedding))
    for name, content in companions.of_folder(config, source.files, dtype).items():
        (folder / name).parent.mkdir(exist_ok=True)  # additional_chat_templates/
        (folder / name).write_bytes(content)
    entries = layout(config, dtype, embedding)
    sizes = {
        name: math.prod(shape) * tensors.STORED[tensors.CODES[own]].itemsize for name, (own, shape) in entries.items()
    }
    int8 = functools.lru_cache(maxsize=1)(source.int8)  # whose numbers are asked for first, whose scales next

    def get(name: str) -> np.ndarray:
        if name.endswith(SCALE):
            return int8(name.removesuffix(SCALE))[1]
        return int8(name)[0] if entries[name][0] == "int8" else source.tensor(name, entries[name][0])

    parts = split(sizes, max_file_size)
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    names = [SINGLE] if len(parts) == 1 else names
    for file, part in zip(names, parts, strict=True):
        dtypes, shapes = ({name: entries[name][i] for name in part} for i in (0, 1))
        tensors.write(folder / file, shapes, dtypes, get)
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        total = {"total_size": sum(sizes.values())}
        atomic.write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def split(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    """In order, a new file where the next tensor would not fit; a tensor larger than the limit has its own."""
    parts, size = [[]], 0
    for name, own in sizes.items():
        if limit is not None and parts[-1] and size + own > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    return parts
