"""GGUF, llama.cpp's file, in and out: tensors and config; gguf_header.py and gguf_tokenizer.py are the rest of it.

The `gguf` package (de)quantises blocks and writes headers. In a GGUF the rows of q and k are in interleaved order, each
head's rows (0, H/2, 1, H/2 + 1, ...) of Hugging Face's half-split order; norms are F32 whatever the matrices are; no
`output` means a tied head.
"""

import dataclasses
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from smoljax import exchange
from smoljax.config import SIZES, Model
from smoljax.errors import DataError, Error, require
from smoljax.exchange import EMBED, Source
from smoljax.gguf_header import NUMPY, Header, read_header, show, single
from smoljax.gguf_tokenizer import add_tokenizer, read_files
from smoljax.hf import some

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # what we write
# A layer's tensors in the order in which llama.cpp's converter writes them: its name -> Hugging Face's.
LAYER = {"attn_norm": "input_layernorm", "ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj"}
LAYER |= {"ffn_up": "mlp.up_proj", "ffn_norm": "post_attention_layernorm", "attn_k": "self_attn.k_proj"}
LAYER |= {"attn_output": "self_attn.o_proj", "attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj"}
# Keys that would change the mathematics, with the values at which they do not.
NEUTRAL = {"rope.scaling.type": ("none",), "rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (1.0,)}
NEUTRAL |= {"rope.scaling.finetuned": (False,), "expert_count": (0,), "expert_used_count": (0,)}
NEUTRAL |= {"logit_scale": (1.0,), "embedding_scale": (1.0,), "residual_scale": (1.0,), "attention.scale": (0.0,)}
NEUTRAL |= {"attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "attention.sliding_window": (0,)}
NEUTRAL |= {"attention.max_alibi_bias": (0.0,), "attention.clamp_kqv": (0.0,), "attention.causal": (True,)}
KNOWN = {"block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"}
KNOWN |= {"attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base"}
KNOWN |= {"rope.dimension_count", "context_length", "vocab_size"}
LARGEST = {Type.Q8_0: 127 * 65504, Type.Q4_0: 8 * 65504}  # beyond, a block's scale does not fit F16
STEP = 1 << 18  # numbers (de)quantised at once: temporaries of a few MB whatever the tensor's size

log = logging.getLogger("smoljax")


def read(header: Header, name: str, heads: int | None = None) -> np.ndarray:
    """One tensor, mapped and in the file's precision, or dequantised to f32; `heads` where it is q or k."""
    tensor = header.tensors[name]
    rows = math.prod(tensor.shape[:-1])
    try:
        raw = np.memmap(header.path, np.uint8, "r", tensor.start, (rows, tensor.size // rows))
    except (OSError, ValueError) as e:  # it was there when the header was read
        raise DataError(f"{header.path}: tensor {name} cannot be read ({e})") from None
    raw = np.asarray(raw)
    raw = raw if heads is None else unpermute(raw, heads)  # whole rows, so it may come first, while they are small
    if tensor.type in NUMPY:
        return raw.view(NUMPY[tensor.type]).reshape(tensor.shape)
    return dequantise(raw, tensor.type).reshape(tensor.shape)


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from half-split to interleaved order, as llama.cpp has them; the head count of that tensor."""
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """The way back."""
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def dequantise(raw: np.ndarray, kind: Type) -> np.ndarray:
    """Blocks of bytes to f32, a step at a time; one row of many blocks, since the package cuts into 16 rows at once."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw, step = raw.reshape(-1, size), STEP // block
    out = np.empty((len(raw), block), np.float32)

    def one(i: int):
        with np.errstate(all="ignore"):  # of infinite scales come NaN, which Source.tensor refuses
            out[i : i + step] = gguf.dequantize(raw[i : i + step].reshape(1, -1), kind).reshape(-1, block)

    starts = range(0, len(raw), step)
    if len(starts) < 16:
        list(map(one, starts))
    else:  # an embedding's; layers' matrices are read several at a time
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(one, starts))
    return out


def rounded(array: np.ndarray, kind: str) -> np.ndarray:
    """A matrix as it comes back from "q8_0" or "q4_0"."""
    kind = Type[TYPES[kind]]
    return dequantise(quantise(array, kind), kind).reshape(array.shape)


def quantise(array: np.ndarray, kind: Type) -> np.ndarray:
    """The way back, to bytes; OverflowError where a block's scale is beyond F16."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    array, step = np.ascontiguousarray(array).reshape(-1, block), STEP // block
    out = np.empty((len(array), size), np.uint8)
    for i in range(0, len(array), step):
        rows = array[i : i + step].astype(np.float32).reshape(1, -1)
        if np.abs(rows).max() > LARGEST[kind]:
            raise OverflowError
        with np.errstate(all="ignore"):  # 1 / scale overflows below 1e-38, where the scale itself becomes 0
            out[i : i + step] = gguf.quantize(rows, kind).reshape(-1, size)
    return out


def names(layers: int) -> dict[str, str]:
    """Hugging Face's name -> the file's, in the file's order."""
    found = {EMBED: "token_embd.weight"}
    for i in range(layers):
        found |= {f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}.weight" for ours, theirs in LAYER.items()}
    return found | {"model.norm.weight": "output_norm.weight"}


def heads(config: Model, name: str) -> int | None:
    """The heads of a tensor whose rows are rotated: q's and k's."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def open_source(path: str | Path) -> Source:
    """A file with its header read and checked; Source.tensor reads, dequantises and un-permutes one tensor at a time.

    The tensors are Hugging Face's ([out, in], q and k half-split): F32, F16 and BF16 as they are, quantised ones in
    f32. The tokenizer, its settings, the chat template and the special ids are in Source.files. Raises DataError.
    """
    header = read_header(path := Path(path))
    config = read_config(header)
    dtype = check_tensors(header, config)
    where = names(config.num_hidden_layers)

    def get(name: str) -> np.ndarray:
        return read(header, where[name], heads(config, name))

    files, ends = read_files(header, config)
    return Source(config, dtype, get, f"GGUF file {path}", files, ends=ends)


def read_config(header: Header) -> Model:
    get, fail = header.value, header.fail
    if get("general.type", str, "model") == "adapter":
        fail("holds an adapter and no model; merge it into its base with llama-export-lora, and give that file")
    if (kind := get("general.architecture", str)) != "llama":
        fail(f"general.architecture is {show(kind)}, expected 'llama'")
    if (parts := get("split.count", int, 0)) > 1:
        fail(f"split.count is {parts}: it is one of several files; merge them with llama-gguf-split --merge")
    for key, value in header.values.items():
        name, value = key.removeprefix("llama."), single(value)
        value = value.decode() if isinstance(value, bytes) else value
        if name in NEUTRAL or name.startswith("rope.scaling."):
            if isinstance(value, (list, np.ndarray)) or value not in NEUTRAL.get(name, ()):
                fail(f"{key} is {show(value)}; smoljax computes a plain Llama, without {name}, and nothing else")
        elif name != key and name not in KNOWN:
            log.warning(f"{header.path}: a Llama has no {key[:80]!r}; not used")
    width, layers = get("llama.embedding_length", int), get("llama.block_count", int)
    n = header.each("llama.attention.head_count", layers)
    head = get("llama.attention.key_length", int, width // n if n > 0 and width % n == 0 else None)
    if head is None:
        fail(f"llama.attention.head_count {n} does not divide embedding_length {width}, and key_length is absent")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := get(key, int, head)) != head:
            fail(f"{key} is {found}; smoljax computes heads of one size, here {head}, and rotates all of it")
    vocab = get("llama.vocab_size", int, None) or len(get("tokenizer.ggml.tokens", list))
    if layers > len(header.tensors):  # before that many names are made
        fail(f"llama.block_count is {layers:,}, but the file has {len(header.tensors):,} tensors")
    # llama.cpp ends a text at each of these three.
    ids = {name: get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    try:
        config = Model(
            hidden_size=width,
            intermediate_size=header.each("llama.feed_forward_length", layers),
            num_hidden_layers=layers,
            num_attention_heads=n,
            num_key_value_heads=header.each("llama.attention.head_count_kv", layers, n),
            head_dim=head,
            vocab_size=vocab,
            max_position_embeddings=get("llama.context_length", int),
            rope_theta=get("llama.rope.freq_base", float),
            rms_norm_eps=get("llama.attention.layer_norm_rms_epsilon", float),
            bos_token_id=ids["bos"],
            eos_token_id=ends if len(ends) > 1 else ends[0] if ends else None,
            pad_token_id=ids["padding"],
        )
    except Error as e:
        raise DataError(str(e) if isinstance(e, DataError) else f"{header.path}: {e}") from None
    # GGUF has no key for initializer_range: a released model's is known.
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")}
    same = [size for size in SIZES.values() if dataclasses.replace(size, **ids) == config]
    return dataclasses.replace(config, initializer_range=same[0].initializer_range) if same else config


def check_tensors(header: Header, config: Model) -> str:
    """All tensors are there, no other is, and each has its shape: the dtype that holds them all."""
    where, shapes, tensors = names(config.num_hidden_layers), exchange.shapes(config), dict(header.tensors)
    if tensors.pop("rope_freqs.weight", None) is not None:  # what theta's frequencies are divided by
        if (read(header, "rope_freqs.weight") != 1).any():
            header.fail("holds rope_freqs.weight; smoljax computes the default rotary embedding only")
        log.warning(f"{header.path}: rope_freqs.weight is passed over, for all of it is 1")
    if biases := [name for name in tensors if name.endswith(".bias")]:
        header.fail(f"holds {biases[0]}; smoljax computes linear layers without biases only")
    expected = {where[name]: shape for name, shape in shapes.items()}
    if "output.weight" in tensors:
        expected["output.weight"] = shapes[EMBED]
    missing, extra = ([n for n in a if n not in b] for a, b in ((expected, tensors), (tensors, expected)))
    if missing or extra:
        header.fail(f"llama's tensors are missing: {some(missing)}; not expected: {some(extra)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            header.fail(f"tensor {name} has shape {list(tensors[name].shape)}, but the keys give it {list(shape)}")
    if "output.weight" in tensors and not equal(header, "output.weight", "token_embd.weight"):
        header.fail("output.weight differs from token_embd.weight; smoljax computes tied heads only")
    kinds = {tensors[name].type for name, shape in expected.items() if len(shape) > 1}
    if len(kinds) > 1 or (kind := kinds.pop()) not in (Type.F16, Type.BF16):
        return "float32"
    dtype = NUMPY[kind]  # if the norms, in F32 beside such matrices, are numbers of that dtype as well
    for name in (name for name, shape in expected.items() if len(shape) == 1):
        norm = read(header, name).astype(np.float32)
        with np.errstate(all="ignore"):
            if not np.array_equal(norm.astype(dtype).astype(np.float32), norm):
                return "float32"
    return dtype.name


def equal(header: Header, one: str, other: str) -> bool:
    """Two tensors of the same shape have the same bytes, compared a step at a time."""
    a, b = header.tensors[one], header.tensors[other]
    if a.type != b.type:
        return False
    with open(header.path, "rb") as first, open(header.path, "rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        steps = [min(STEP, a.size - i) for i in range(0, a.size, STEP)]
        return all(first.read(n) == second.read(n) for n in steps)


def write(path: Path, source: Source, dtype: str, name: str):
    """One file for llama.cpp, at a path that does not exist; tensors come from the source one at a time.

    Args:
      dtype: of the matrices, one of TYPES. Norms are stored as F32, rounded to `dtype` where that is a 16-bit one, so
        that the file read back is the model in that dtype.
      name: general.name, for people.

    Raises DataError, also where the tokenizer is none that llama.cpp computes as SmolLM's.
    """
    require(dtype in TYPES, f"dtype is {dtype!r}, expected one of {', '.join(TYPES)}")
    config, shapes = source.config, exchange.shapes(source.config)
    writer = gguf.GGUFWriter(path, "llama")
    add_config(writer, source, dtype, name)
    add_tokenizer(writer, source)
    where, kinds = names(config.num_hidden_layers), {}
    for theirs, ours in where.items():
        kinds[theirs] = kind = type_of(theirs, shapes[theirs], dtype)
        block, width = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shapes[theirs]) // block * width
        writer.add_tensor_info(ours, shapes[theirs], np.dtype(np.float32), size, raw_dtype=kind)  # raw_dtype decides
    if dtype not in exchange.DTYPES and (odd := [where[n] for n, kind in kinds.items() if kind == Type.F16]):
        log.warning(f"{path.name}: rows not of whole blocks of 32 numbers, so not {dtype} but F16: {some(odd)}")
    path.touch(exist_ok=False)  # the writer alone would replace a file
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        for theirs in where:
            out.write(bytes(-out.tell() % writer.data_alignment))
            # Not the writer's write_tensor_data: numpy's tofile says no errno when the disk is full.
            out.write(encode(source, theirs, kinds[theirs], dtype).data)
        out.write(bytes(-out.tell() % writer.data_alignment))
    finally:
        writer.close()


def type_of(name: str, shape: tuple[int, ...], dtype: str) -> Type:
    if len(shape) == 1:
        return Type.F32  # llama.cpp has no norm in another type
    # The embedding is the output head as well, where 4 bits cost far more than in a layer; llama.cpp does likewise.
    kind = Type.Q8_0 if name == EMBED and dtype == "q4_0" else Type[TYPES[dtype]]
    return Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def encode(source: Source, name: str, kind: Type, dtype: str) -> np.ndarray:
    """One tensor's bytes."""
    rounded = dtype if dtype in exchange.DTYPES else NUMPY[kind].name if kind in NUMPY else None
    array = source.tensor(name, rounded)
    if (n := heads(source.config, name)) is not None:
        array = permute(array, n)
    if kind in NUMPY:
        array = np.ascontiguousarray(array, NUMPY[kind])
    else:
        try:
            array = quantise(array, kind)
        except OverflowError:
            raise DataError(f"{source.name}: tensor {name} holds numbers too large for {kind.name}") from None
    return array.reshape(-1).view(np.uint8)


def add_config(writer: gguf.GGUFWriter, source: Source, dtype: str, name: str):
    c = source.config
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "float32" else f"MOSTLY_{TYPES[dtype]}"))
    if dtype not in exchange.DTYPES:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    numbers = {"context_length": c.max_position_embeddings, "embedding_length": c.hidden_size}
    numbers |= {"block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size}
    numbers |= {"vocab_size": c.vocab_size, "rope.dimension_count": c.head_dim, "rope.freq_base": c.rope_theta}
    numbers |= {"attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads}
    numbers |= {"attention.layer_norm_rms_epsilon": c.rms_norm_eps}
    if c.head_dim * c.num_attention_heads != c.hidden_size:  # else llama.cpp divides
        numbers |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    for key, value in numbers.items():
        with np.errstate(all="ignore"):
            small = value < 2**32 if type(value) is int else 0 < np.float32(value) < np.inf
        if not small:
            raise DataError(f"{source.name}: llama.{key} would be {value}, which GGUF has no number for")
        (writer.add_uint32 if type(value) is int else writer.add_float32)(f"llama.{key}", value)
