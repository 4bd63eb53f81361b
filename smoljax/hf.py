"""Hugging Face folders, in and out: the only file that knows safetensors.

One table says where each of the eleven arrays lies in a LlamaForCausalLM and how its axes are ordered there. Read
forward it imports, read backward it exports. Strict in both directions: every tensor is consumed and every parameter
set. hf_config.py is the same for config.json.
"""

import contextlib
import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open

from smoljax import atomic
from smoljax import tokenizer as tokenizers
from smoljax.config import Model
from smoljax.errors import DataError, require
from smoljax.hf_config import read_config, read_json, to_config
from smoljax.model import SmolLM, abstract

# ours: (Hugging Face's name with {} for the layer, axes there -> axes here). A torch Linear is [out, in]; q and k are
# in half-split ("rotate_half") order there as here, so no row is permuted.
TABLE = {
    "embed": ("model.embed_tokens.weight", "V D -> V D"),
    "layers.attn_norm": ("model.layers.{}.input_layernorm.weight", "D -> D"),
    "layers.q": ("model.layers.{}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    "layers.k": ("model.layers.{}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    "layers.v": ("model.layers.{}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    "layers.o": ("model.layers.{}.self_attn.o_proj.weight", "D (N H) -> N H D"),
    "layers.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "D -> D"),
    "layers.gate": ("model.layers.{}.mlp.gate_proj.weight", "F D -> D F"),
    "layers.up": ("model.layers.{}.mlp.up_proj.weight", "F D -> D F"),
    "layers.down": ("model.layers.{}.mlp.down_proj.weight", "D F -> F D"),
    "norm": ("model.norm.weight", "D -> D"),
}
HEAD = "lm_head.weight"  # absent where the head is tied; some writers store the copy all the same
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def rows(model: SmolLM, config: Model):
    """For each array of the model: (its name, its Param, letter sizes, Hugging Face's names, pattern)."""
    for ours, (theirs, pattern) in TABLE.items():
        param = functools.reduce(getattr, ours.split("."), model)
        sizes = dict(zip(param.dims, param.shape[-len(param.dims) :], strict=True))
        layers = config.num_hidden_layers if "{}" in theirs else 1
        yield ours, param, sizes, [theirs.format(i) for i in range(layers)], pattern


def shape_of(axes: str, sizes: dict) -> list[int]:
    """The shape that a side of a pattern describes: "(N H) D" -> [N * H, D]."""
    return [math.prod(sizes[x] for x in group if x.isalpha()) for group in re.findall(r"\(.*?\)|\w", axes)]


def load(folder: str | Path, dtype: str | None = None) -> tuple[SmolLM, Model]:
    """A model and its config from a Hugging Face folder with one model.safetensors in f32, bf16 or f16.

    Args:
      dtype: of the arrays, "float32" or "bfloat16"; the file's own when None.

    Tensors are read one by one into the array of all layers that they belong to, so the peak is the model and its
    largest array. Raises DataError.
    """
    folder = Path(folder)
    require(dtype in (None, "float32", "bfloat16"), f"dtype is {dtype!r}, expected float32 or bfloat16")
    config = read_config(folder)
    model = abstract(config)
    with open_tensors(folder) as file:
        try:
            source = check(file, model, config)
        except DataError as e:
            raise DataError(f"{folder}: {e}") from None
        dtype = jnp.dtype(dtype or source)
        for ours, param, sizes, names, pattern in rows(model, config):
            array = np.empty(param.shape, dtype)
            for layer, name in zip(array if len(param.dims) < array.ndim else array[None], names, strict=True):
                letters = {k: v for k, v in sizes.items() if k in pattern}
                layer[...] = rearrange(file.get_tensor(name), pattern, **letters)
            *parents, leaf = ours.split(".")
            setattr(functools.reduce(getattr, parents, model), leaf, param.replace(jnp.asarray(array)))
        if HEAD in file.keys() and not np.array_equal(file.get_tensor(HEAD), file.get_tensor(TABLE["embed"][0])):
            raise DataError(
                f"{folder}: {HEAD} differs from {TABLE['embed'][0]}, although config.json says tie_word_embeddings; "
                "smoljax has tied heads only"
            )
    return model, config


@contextlib.contextmanager
def open_tensors(folder: Path):
    path = folder / "model.safetensors"
    if not path.is_file():
        if (folder / "model.safetensors.index.json").is_file():
            raise DataError(
                f"{folder} is split over several files (model.safetensors.index.json), which smoljax does not read; "
                'save it as one, in transformers: model.save_pretrained(folder, max_shard_size="100GB")'
            )
        raise DataError(f"{folder} has a config.json but no model.safetensors; expected the weights in that file")
    try:
        path.open("rb").close()
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is no sound safetensors file ({e})") from None


def check(file, model: SmolLM, config: Model) -> str:
    """All tensors are there, no other is, each has its shape, and all one dtype: that dtype."""
    expected = {}
    for _, _, sizes, names, pattern in rows(model, config):
        expected |= dict.fromkeys(names, shape_of(pattern.split(" -> ")[0], sizes))
    found = {name: file.get_slice(name) for name in file.keys()}
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected) - {HEAD})
    if missing or extra:
        raise DataError(
            f"model.safetensors does not hold the tensors that config.json describes: {some('missing', missing)}; "
            f"{some('not expected', extra)}"
        )
    if HEAD in found:
        expected[HEAD] = expected[TABLE["embed"][0]]
    for name, shape in expected.items():
        if found[name].get_shape() != shape:
            raise DataError(f"tensor {name} has shape {found[name].get_shape()}, but config.json gives it {shape}")
    dtypes = {found[name].get_dtype(): name for name in expected}
    odd = {dtype: name for dtype, name in dtypes.items() if dtype not in DTYPES}
    if odd:
        raise DataError(f"tensor {[*odd.values()][0]} is {[*odd][0]}; expected one of {', '.join(DTYPES)}")
    if len(dtypes) > 1:
        mix = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise DataError(f"the tensors have different dtypes ({mix}); expected one for all")
    return DTYPES[[*dtypes][0]]


def some(what: str, names: list[str]) -> str:
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{what}: {listed or 'none'}"


def save(
    folder: str | Path, model: SmolLM, config: Model, dtype: str | None = None, tokenizer: str | Path | None = None
):
    """Write a folder that transformers, and `load`, read: weights, config and, if given, the tokenizer's files.

    Args:
      dtype: of the file, "float32" or "bfloat16"; the model's own when None.
      tokenizer: a tokenizer.json or a folder that holds one.
    """
    dtype = dtype or str(model.embed.dtype)
    require(dtype in DTYPES.values(), f"dtype is {dtype!r}, expected one of {', '.join(DTYPES.values())}")
    with atomic.fresh(folder) as part:
        atomic.write_json(part / "config.json", to_config(config, dtype))
        special = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        atomic.write_json(part / "generation_config.json", {k: v for k, v in special.items() if v is not None})
        if tokenizer is not None:
            save_tokenizer(part, Path(tokenizer), config)
        write_tensors(part / "model.safetensors", model, config, dtype)


def write_tensors(file: Path, model: SmolLM, config: Model, dtype: str):
    """safetensors' format by hand, since its library wants all tensors at once: here one at a time is copied."""
    code = {name: code for code, name in DTYPES.items()}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for _, _, sizes, names, pattern in rows(model, config):
        shape = shape_of(pattern.split(" -> ")[0], sizes)
        for name in names:
            end = offset + math.prod(shape) * jnp.dtype(dtype).itemsize
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, param, sizes, _, pattern in rows(model, config):
            there, here = pattern.split(" -> ")
            letters = {k: v for k, v in sizes.items() if k in pattern}
            array = np.asarray(param[...])
            for layer in array if len(param.dims) < array.ndim else array[None]:
                tensor = rearrange(layer, f"{here} -> {there}", **letters).astype(dtype)
                out.write(np.ascontiguousarray(tensor).view(np.uint8).data)


def save_tokenizer(folder: Path, source: Path, config: Model):
    """tokenizer.json as it is, and a tokenizer_config.json that names its special tokens by the config's ids.

    The class is PreTrainedTokenizerFast: transformers then takes tokenizer.json as it is, where GPT2Tokenizer, which
    SmolLM's own folders name, may rebuild the pre-tokenizer without its digits.
    """
    source = tokenizers.find(source)
    tokenizer = tokenizers.load(source)
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise DataError(f"{source} has {size} tokens, but the model's vocab_size is {config.vocab_size}")
    special = {}
    for name in ("bos", "eos", "pad"):
        id = getattr(config, f"{name}_token_id")
        special[f"{name}_token"] = None if id is None else tokenizer.id_to_token(id)
        if id is not None and special[f"{name}_token"] is None:
            raise DataError(f"the model's {name}_token_id is {id}, but {source} has no token of that id")
    shutil.copyfile(source, folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
    settings |= {"clean_up_tokenization_spaces": False, **special}
    # A chat template belongs to the tokenizer: it is carried along as it was found, in its own file or in the config.
    if (template := source.with_name("chat_template.jinja")).is_file():
        shutil.copyfile(template, folder / template.name)
    if (old := source.with_name("tokenizer_config.json")).is_file() and "chat_template" in (found := read_json(old)):
        settings["chat_template"] = found["chat_template"]
    atomic.write_json(folder / "tokenizer_config.json", settings)
