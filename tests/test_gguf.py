"""GGUF files: bit-exact round trips, other readers of the same bytes, and a sentence for each file that cannot be."""

import dataclasses
import functools
import json
import math
import os
import struct
import tracemalloc
from pathlib import Path

import gguf as package
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from test_model import CONFIG, SHAPES, forward, make

from smoljax import exchange, gguf, gguf_header, gguf_tokenizer, tokenizer
from smoljax.config import SIZES, Model
from smoljax.errors import DataError, UsageError

TEXT = Path(__file__).read_text()
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %} é"
ROWS_OF_256 = Model(256, 256, 2, 4, 2, 64, vocab_size=300)  # a K-quant's block has 256 numbers
DTYPES = ("float32", "float16", "bfloat16")


@functools.cache
def words(vocab_size=300) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.train([TEXT], vocab_size, path := Path(folder) / "tokenizer.json")
        return path.read_bytes()


def source(config=CONFIG, dtype="float32", model=None, **files):
    model = jax.tree.map(lambda w: w.astype(dtype), model or make(config))
    given = {"tokenizer.json": words(), "chat_template.jinja": TEMPLATE.encode()}
    given |= {name.replace("_json", ".json"): content for name, content in files.items()}
    return exchange.of_model(model, config, {k: v for k, v in given.items() if v is not None})


def written(path, dtype="float32", **kwargs):
    gguf.write(path, source(**kwargs), dtype, "tiny")
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound file; not to be changed."""
    return written(tmp_path_factory.mktemp("gguf") / "good.gguf")


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# A file taken apart and put together by hand, so that each part can be made wrong.

CODES = {"UINT8": "B", "UINT32": "I", "INT32": "i", "FLOAT32": "f", "BOOL": "?", "UINT64": "Q", "FLOAT64": "d"}


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def item(kind: str, value) -> bytes:
    return text(value) if kind == "STRING" else struct.pack(f"<{CODES[kind]}", value)


def number(kind: str) -> bytes:
    return struct.pack("<I", package.GGUFValueType[kind])


def key(kind: str, value) -> bytes:
    """A value with its type before it; "ARRAY STRING" and the like for arrays."""
    if not kind.startswith("ARRAY"):
        return number(kind) + item(kind, value)
    kind = kind.split()[1]
    return number("ARRAY") + number(kind) + struct.pack("<Q", len(value)) + b"".join(item(kind, v) for v in value)


def take_apart(path) -> tuple[dict, dict]:
    """Keys: name -> its bytes. Tensors: name -> (type, dimensions, its bytes)."""
    reader = package.GGUFReader(path)
    keys = {
        name: key(" ".join(t.name for t in field.types), field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {t.name: (int(t.tensor_type), t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
    return keys, tensors


def put(path, keys, tensors, magic=b"GGUF", version=3, alignment=32, offsets=None, counts=(0, 0), tail=b""):
    """`offsets`: others than those in order, by name. `counts`: added to the two counts."""
    keys = keys if isinstance(keys, list) else list(keys.items())
    tensors = tensors if isinstance(tensors, list) else list(tensors.items())
    head = magic + struct.pack("<IQQ", version, len(tensors) + counts[0], len(keys) + counts[1])
    head += b"".join(text(name) + value for name, value in keys)
    data, infos = b"", b""
    for name, (kind, dims, content) in tensors:
        offset = (offsets or {}).get(name, len(data))
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        data += content + bytes(-len(content) % max(alignment, 1))
    head += infos
    path.write_bytes(head + bytes(-len(head) % max(alignment, 1)) + data + tail)
    return path


@functools.cache
def parts(path):
    return take_apart(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_write_and_read_are_exact(name, dtype, tmp_path):
    config = SHAPES[name]
    model = jax.tree.map(lambda w: w.astype(dtype), make(config))
    back = gguf.open_source(written(tmp_path / "a.gguf", dtype, config=config))
    assert same(exchange.assemble(back), model) and back.dtype == dtype
    assert back.config == dataclasses.replace(config, initializer_range=0.02)  # which GGUF has no key for
    assert tokenizer.parse(back.files["tokenizer.json"], "").to_str() == tokenizer.parse(words(), "").to_str()
    # Written again it is the same file, byte for byte, by names, keys, tokenizer and settings.
    gguf.write(tmp_path / "b.gguf", back, dtype, "tiny")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_gguf_reader_sees(dtype, tmp_path):
    """Another program's reading of the bytes: names, types, and each row of q and k in interleaved order."""
    src = source(dtype=dtype)
    gguf.write(tmp_path / "a.gguf", src, dtype, "tiny")
    reader = package.GGUFReader(tmp_path / "a.gguf")
    found = {t.name: t for t in reader.tensors}
    c, H = CONFIG, CONFIG.head_dim
    where = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(c.num_hidden_layers):
        for ours, theirs in {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}.items():
            where[f"blk.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
        for part in ("gate", "up", "down"):
            where[f"blk.{i}.ffn_{part}"] = f"model.layers.{i}.mlp.{part}_proj"
        for ours, theirs in {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}.items():
            where[f"blk.{i}.{ours}"] = f"model.layers.{i}.self_attn.{theirs}_proj"
    assert set(found) == {f"{name}.weight" for name in where}
    for name, theirs in where.items():
        tensor, expected = found[f"{name}.weight"], src.tensor(f"{theirs}.weight")
        if name.endswith(("attn_q", "attn_k")):
            heads = c.num_attention_heads if name.endswith("q") else c.num_key_value_heads
            rows = [h * H + half * H // 2 + i for h in range(heads) for i in range(H // 2) for half in (0, 1)]
            expected = expected[rows]
        if "norm" in name:
            expected = expected.astype(np.float32)
        assert tensor.tensor_type == (Type.F32 if "norm" in name else Type[gguf.TYPES[dtype]])
        assert tensor.shape.tolist() == list(expected.shape)[::-1] and tensor.data.tobytes() == expected.tobytes()

    def value(name):
        return reader.fields[name].contents()

    assert value("general.architecture") == "llama" and value("general.name") == "tiny"
    assert value("general.file_type") == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]
    assert value("llama.attention.key_length") == value("llama.attention.value_length") == H  # not 72 / 9
    assert value("llama.rope.dimension_count") == H and value("llama.vocab_size") == c.vocab_size
    assert value("llama.rope.freq_base") == c.rope_theta and value("llama.context_length") == 8192
    assert (value("tokenizer.ggml.model"), value("tokenizer.ggml.pre")) == ("gpt2", "smollm")
    assert value("tokenizer.ggml.tokens")[:2] == [tokenizer.EOS, "<|im_start|>"]
    assert value("tokenizer.ggml.token_type") == [3] * 17 + [1] * 283
    assert value("tokenizer.chat_template") == TEMPLATE and value("tokenizer.ggml.eos_token_id") == 0
    assert not value("tokenizer.ggml.add_bos_token") and not value("tokenizer.ggml.add_space_prefix")


def blocks(kind, shape, rng) -> np.ndarray:
    """Quantised rows: by the package where it can, else random bytes, with finite scales."""
    try:
        return package.quantize(rng.normal(size=shape).astype(np.float32), kind)
    except NotImplementedError:
        block, size = package.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
        return raw & 0xBF  # bit 14 of an F16 number, wherever a block has one: without it no exponent is infinity's


@pytest.mark.parametrize("kind", gguf_header.BLOCKS, ids=lambda k: k.name)
def test_each_quantised_type(kind, tmp_path, monkeypatch):
    keys, tensors = take_apart(written(tmp_path / "a.gguf", config=ROWS_OF_256))
    rng, expected = np.random.default_rng(0), {}
    for name, (_, dims, _) in tensors.items():
        if len(dims) == 2:
            raw = blocks(kind, dims[::-1], rng)
            expected[name], tensors[name] = package.dequantize(raw, kind), (int(kind), dims, raw.tobytes())
    monkeypatch.setattr(gguf, "STEP", 1000)  # many steps, the last one shorter
    back = gguf.open_source(put(tmp_path / "b.gguf", keys, tensors))
    assert back.dtype == "float32"
    for theirs, ours in gguf.names(2).items():
        if ours in expected:
            found, want = back.tensor(theirs), expected[ours]
            if ours.endswith(("attn_q.weight", "attn_k.weight")):
                heads = 4 if "attn_q" in ours else 2
                want = want.reshape(heads, 32, 2, 256).swapaxes(1, 2).reshape(want.shape)
            assert found.dtype == np.float32 and np.array_equal(found, want), ours


def test_mixed_types(tmp_path, good):
    """As llama.cpp writes them: F32 norms beside 16-bit matrices are no reason for f32, unless they need it."""
    keys, tensors = take_apart(written(tmp_path / "half.gguf", "float16"))
    assert gguf.open_source(tmp_path / "half.gguf").dtype == "float16"
    tensors["output_norm.weight"] = parts(good)[1]["output_norm.weight"]
    back = gguf.open_source(put(tmp_path / "norm.gguf", keys, tensors))
    assert back.dtype == "float32" and np.array_equal(back.tensor("model.norm.weight"), make().norm)
    keys, tensors = take_apart(tmp_path / "half.gguf")
    tensors["token_embd.weight"] = parts(good)[1]["token_embd.weight"]
    back = gguf.open_source(put(tmp_path / "embed.gguf", keys, tensors))
    assert back.dtype == "float32" and str(back.get("model.layers.0.mlp.up_proj.weight").dtype) == "float16"
    # A second copy of the embedding as the head is the same model.
    tensors["output.weight"] = tensors["token_embd.weight"]
    assert gguf.open_source(put(tmp_path / "copy.gguf", keys, tensors)).config == back.config


@pytest.mark.parametrize("dtype, parts_of_step", [("q8_0", 127), ("q4_0", 8)])
def test_quantised_within_a_step(dtype, parts_of_step, tmp_path, caplog):
    src = source(ROWS_OF_256, dtype="bfloat16")
    gguf.write(tmp_path / "a.gguf", src, dtype, "tiny")
    back, kinds = gguf.open_source(tmp_path / "a.gguf"), {}
    header = gguf_header.read_header(tmp_path / "a.gguf")
    assert header.values["general.quantization_version"] == 2
    assert header.values["general.file_type"] == {"q8_0": 7, "q4_0": 2}[dtype]
    for theirs, ours in gguf.names(2).items():
        want, found = src.tensor(theirs, "float32"), back.tensor(theirs)
        kinds[ours] = header.tensors[ours].type.name
        if want.ndim == 1:
            assert np.array_equal(want, found) and kinds[ours] == "F32"
            continue
        steps = 127 if ours == "token_embd.weight" else parts_of_step
        step = np.abs(want.reshape(-1, 32)).max(axis=1, keepdims=True) / steps
        # Half a step each way and the scale's rounding to F16; Q4_0 has 16 values on 17, so up to one on one side.
        bound = step * (0.5 if steps == 127 else 1) * 1.01 + step * steps * 2**-11
        off = np.abs(want - found).reshape(-1, 32)
        assert (off <= bound).all() and off.max() > 0, ours
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.1.ffn_up.weight"] == dtype.upper()
    assert "F16" not in caplog.text


def test_rows_that_are_no_whole_blocks(tmp_path, caplog):
    src = source(SHAPES["smollm-360m"])  # rows of 120 but for ffn_down's 320
    gguf.write(tmp_path / "a.gguf", src, "q8_0", "tiny")
    assert "not of whole blocks of 32 numbers, so not q8_0 but F16: token_embd.weight, blk.0." in caplog.text
    kinds = {name: t.type.name for name, t in gguf_header.read_header(tmp_path / "a.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["blk.0.attn_q.weight"] == "F16"
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(gguf.open_source(tmp_path / "a.gguf").get(name), src.tensor(name, "float16"))


def theirs(folder, ids):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="a.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("name", [pytest.param("smollm2-360m", marks=pytest.mark.slow), "smollm-1.7b"])
def test_transformers_reads_it(name, tmp_path, monkeypatch):
    config = SHAPES[name]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    ours = np.asarray(forward(make(config), ids))
    written(tmp_path / "a.gguf", config=config)
    assert np.abs(theirs(tmp_path, ids) - ours).max() < 1e-4
    # A layout that is wrong both ways would pass every round trip, and shows here.
    monkeypatch.setattr(gguf, "permute", lambda array, heads: array)
    (tmp_path / "a.gguf").unlink()
    written(tmp_path / "a.gguf", config=config)
    assert np.abs(theirs(tmp_path, ids) - ours).max() > 0.1


def test_config(good, tmp_path):
    def read(**changes):
        keys = dict(parts(good)[0])
        for name, value in changes.items():
            name = name.replace("__", ".")
            keys.pop(name, None) if value is None else keys.update({name: value})
        return gguf.open_source(put(tmp_path / "a.gguf", keys, parts(good)[1])).config

    assert read() == dataclasses.replace(CONFIG, initializer_range=0.02)
    assert read(llama__vocab_size=None).vocab_size == 300  # then the tokens are counted
    assert read(llama__rope__scaling__type=key("STRING", "none")) == read()
    assert read(llama__expert_count=key("UINT32", 0)) == read()
    assert read(llama__context_length=key("UINT64", 512)).max_position_embeddings == 512
    ids = {f"tokenizer__ggml__{n}_token_id": key("UINT32", i) for i, n in enumerate(("bos", "eos", "eot", "padding"))}
    found = read(**ids)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, (1, 2), 3)
    found = read(tokenizer__ggml__eos_token_id=None, tokenizer__ggml__bos_token_id=None)
    assert found.eos_token_id is None and found.bos_token_id is None
    # F32 keys come back as the decimals that were written.
    for number_ in (1e-5, 1e-6, 1e-8, 130_000.0, 500_000.0, 1.0e6):
        assert read(llama__attention__layer_norm_rms_epsilon=key("FLOAT32", number_)).rms_norm_eps == number_
    assert read(llama__rope__freq_base=key("FLOAT64", 123456789.0)).rope_theta == 123456789.0


def test_initializer_range_of_released_models(tmp_path):
    """The header alone, over a hole in the file."""
    for name in ("smollm-360m", "smollm2-135m", "smollm2-1.7b"):
        config = SIZES[name]
        src = exchange.Source(config, "float32", None, name, {"tokenizer.json": words()})
        writer = package.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        gguf.add_config(writer, src, "float32", name)
        gguf_tokenizer.add_tokenizer(writer, src)
        for theirs_, ours in gguf.names(config.num_hidden_layers).items():
            shape = exchange.shapes(config)[theirs_]
            writer.add_tensor_info(ours, shape, np.dtype("float32"), 4 * math.prod(shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        os.truncate(tmp_path / f"{name}.gguf", 8 * config.parameters)
        assert gguf.open_source(tmp_path / f"{name}.gguf").config == config


def test_tokenizer(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, vocab_size=311, eos_token_id=(0, 2), bos_token_id=1, pad_token_id=2)
    spec = json.loads(words())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 300, "content": "<think> x", "special": False})
    settings = json.dumps({"unk_token": {"content": tokenizer.EOS}}).encode()
    files = {"tokenizer_json": json.dumps(spec).encode(), "tokenizer_config_json": settings}
    back = gguf.open_source(written(tmp_path / "a.gguf", config=config, **files))
    assert back.config == dataclasses.replace(config, initializer_range=0.02)
    before, after = (tokenizer.parse(x, "") for x in (files["tokenizer_json"], back.files["tokenizer.json"]))
    for sentence in (TEXT, "x  12 \n\n12 ²³ é 🤖<|im_start|>a<think> x b<|im_end|>", "a   2024 b"):
        ids = before.encode(sentence).ids
        assert ids == after.encode(sentence).ids
        for special in (True, False):
            assert before.decode(ids, skip_special_tokens=special) == after.decode(ids, skip_special_tokens=special)
    values = gguf_header.read_header(tmp_path / "a.gguf").values
    assert values["tokenizer.ggml.tokens"][301:303] == [b"[PAD301]", b"[PAD302]"] and after.get_vocab_size() == 301
    assert values["tokenizer.ggml.token_type"][299:303].tolist() == [1, 4, 5, 5]
    found = {name: json.loads(back.files[name]) for name in ("tokenizer_config.json", "generation_config.json")}
    assert found["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2}
    assert found["tokenizer_config.json"] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>",
        "eos_token": tokenizer.EOS,
        "pad_token": "<|im_end|>",
        "unk_token": tokenizer.EOS,
        "chat_template": TEMPLATE,
    }
    assert back.files["chat_template.jinja"] == TEMPLATE.encode() and not caplog.text

    keys, tensors = take_apart(tmp_path / "a.gguf")
    keys |= {"tokenizer.ggml.pre": key("STRING", "llama-bpe"), "llama.colour": key("UINT32", 3)}
    files = gguf.open_source(put(tmp_path / "b.gguf", keys, tensors)).files
    assert set(files) == {"generation_config.json", "chat_template.jinja"}
    assert "'gpt2' with the pre-tokenizer 'llama-bpe'" in caplog.text and "'llama.colour'" in caplog.text


def test_what_cannot_be_written(tmp_path, caplog):
    def refused(sentence, dtype="float32", error=DataError, **kwargs):
        with pytest.raises(error, match=sentence):
            written(tmp_path / "a.gguf", dtype, **kwargs)
        assert not (tmp_path / "a.gguf").exists()

    refused("has no tokenizer.json, and llama.cpp loads no model", tokenizer_json=None)
    refused("dtype is 'q2_k', expected one of float32", "q2_k", UsageError)

    def changed(**changes):
        return json.dumps(json.loads(words()) | changes).encode()

    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    for name, value in {
        "pre_tokenizer": bytelevel,  # GPT-2's
        "normalizer": {"type": "NFC"},
        "model": json.loads(words())["model"] | {"byte_fallback": True},
    }.items():
        refused("llama.cpp has no such pre-tokenizer", tokenizer_json=changed(**{name: value}))
    roberta = {"type": "RobertaProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1]}
    roberta |= {"trim_offsets": True, "add_prefix_space": False}
    refused(r"adds the ids \[1\] to each text; llama.cpp adds a bos", tokenizer_json=changed(post_processor=roberta))
    for steps in ([digits | {"individual_digits": False}, bytelevel], [digits, bytelevel | {"add_prefix_space": True}]):
        steps = {"type": "Sequence", "pretokenizers": steps}
        refused("another pre_tokenizer than SmolLM's", tokenizer_json=changed(pre_tokenizer=steps))
    unknown = json.loads(words())["model"] | {"unk_token": tokenizer.EOS}
    written(tmp_path / "unk.gguf", tokenizer_json=changed(model=unknown))  # with all 256 bytes nothing is unknown
    symbols = {("éé" if k == "é" else k): v for k, v in unknown["vocab"].items()}
    refused("unk_token for bytes that it has no token for", tokenizer_json=changed(model=unknown | {"vocab": symbols}))
    refused("ids up to 299, but the model has rows for 290", config=dataclasses.replace(CONFIG, vocab_size=290))
    refused("llama.context_length would be", config=dataclasses.replace(CONFIG, max_position_embeddings=10**30))
    refused("llama.rope.freq_base would be 1e[+]300", config=dataclasses.replace(CONFIG, rope_theta=1e300))

    written(tmp_path / "b.gguf", config=dataclasses.replace(CONFIG, eos_token_id=(0, 1, 2, 3)))
    assert "GGUF has keys for three" in caplog.text
    before = (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(FileExistsError):
        written(tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == before
    big = make(ROWS_OF_256)
    big.embed = big.embed.replace(big.embed[...].at[3, 5].set(1e7))
    with pytest.raises(DataError, match="embed_tokens.weight holds numbers too large for Q8_0"):
        written(tmp_path / "c.gguf", "q8_0", config=ROWS_OF_256, model=big)
    big.embed = big.embed.replace(big.embed[...].at[3, 5].set(8e6))
    written(tmp_path / "d.gguf", "q8_0", config=ROWS_OF_256, model=big)
    off = gguf.open_source(tmp_path / "d.gguf").tensor(exchange.EMBED)[3, 5] / 8e6 - 1
    assert abs(off) < 1e-3


NAME = "blk.1.ffn_up.weight"


def refusals():
    """(what is said, what is changed): keys, tensors, arguments of `put`."""
    L, T = "llama.", "tokenizer.ggml."
    q = "blk.0.attn_q.weight"
    for name, value, sentence in [
        ("general.architecture", key("STRING", "qwen2"), "general.architecture is 'qwen2', expected 'llama'"),
        ("general.architecture", key("UINT32", 3), "general.architecture is 3, expected str"),
        ("general.alignment", key("UINT32", 0), "general.alignment is 0, expected a power of two"),
        ("general.alignment", key("UINT32", 48), "general.alignment is 48, expected a power of two"),
        ("general.alignment", key("UINT32", 1 << 31), "general.alignment is 2147483648, expected a power of two"),
        ("general.alignment", key("STRING", "32"), "general.alignment is '32', expected int"),
        ("split.count", key("UINT32", 3), "split.count is 3"),
        (f"{L}block_count", None, "llama.block_count is absent"),
        (f"{L}block_count", key("UINT32", 4), "missing: blk.3.attn_norm.weight, blk.3.attn_q.weight"),
        (f"{L}block_count", key("UINT32", 2), "missing: none; not expected: blk.2."),
        (f"{L}block_count", key("UINT32", 2**32 - 1), "llama.block_count is 4,294,967,295, but the file has 29"),
        (f"{L}block_count", key("INT32", -1), "num_hidden_layers is -1"),
        (f"{L}block_count", key("FLOAT32", 3.0), "llama.block_count is 3.0, expected int"),
        (f"{L}block_count", key("BOOL", True), "llama.block_count is True, expected int"),
        (f"{L}embedding_length", key("UINT32", 64), "but the keys give it [300, 64]"),
        (f"{L}attention.head_count", key("UINT32", 0), "num_attention_heads is 0"),
        (f"{L}attention.head_count", key("ARRAY UINT32", [9, 9]), "head_count is an array of 2, expected int"),
        (f"{L}attention.head_count", key("ARRAY UINT32", [9, 9, 3]), "head_count differs by layer: [9, 9, 3]; smoljax"),
        (f"{L}attention.head_count_kv", key("ARRAY UINT32", [2]), "not a multiple of model.num_key_value_heads = 2"),
        (f"{L}attention.head_count_kv", key("UINT32", 2), "not a multiple of model.num_key_value_heads = 2"),
        (f"{L}attention.key_length", key("UINT32", 8), "value_length is 16; smoljax computes heads of one size"),
        (f"{L}rope.dimension_count", key("UINT32", 8), "llama.rope.dimension_count is 8"),
        (f"{L}rope.freq_base", key("STRING", "1e5"), "llama.rope.freq_base is '1e5', expected float"),
        (f"{L}rope.freq_base", key("FLOAT32", math.nan), "rope_theta is nan"),
        (f"{L}rope.freq_base", None, "llama.rope.freq_base is absent"),
        (f"{L}attention.layer_norm_rms_epsilon", key("FLOAT32", math.inf), "rms_norm_eps is inf"),
        (f"{L}rope.scaling.type", key("STRING", "yarn"), "llama.rope.scaling.type is 'yarn'; smoljax computes"),
        (f"{L}rope.scaling.factor", key("FLOAT32", 4.0), "llama.rope.scaling.factor is 4.0; smoljax computes"),
        (f"{L}rope.scaling.odd", key("ARRAY UINT32", [1, 2]), "llama.rope.scaling.odd is an array of 2; smoljax"),
        (f"{L}rope.scaling.odd", key("ARRAY UINT32", [1]), "llama.rope.scaling.odd is 1; smoljax"),
        (f"{L}expert_count", key("UINT32", 8), "llama.expert_count is 8; smoljax computes"),
        (f"{T}eos_token_id", key("UINT32", 300), "eos_token_id is 300"),
        (f"{T}bos_token_id", key("STRING", "x"), "bos_token_id is 'x', expected int"),
        (f"{T}tokens", key("ARRAY STRING", ["a", "b", "a"]), "token_type has 300 entries"),
        (f"{T}tokens", key("ARRAY STRING", ["a"] * 300), "tokens holds a token twice"),
        (
            f"{T}tokens",
            key("ARRAY STRING", [f"{i:0>20000}" for i in range(300)]),
            "tokens has 300 entries of 6,000,000 bytes",
        ),
        (f"{T}tokens", key("ARRAY UINT32", [1, 2]), "tokenizer.ggml.tokens is an array of 2, expected an array"),
        (f"{T}tokens", key("STRING", "abc"), "tokenizer.ggml.tokens is 'abc', expected an array"),
        (f"{T}tokens", None, "tokenizer.ggml.tokens is absent"),
        (f"{T}token_type", key("ARRAY UINT32", [1, 2]), "token_type has 2 entries"),
        (f"{T}token_type", key("ARRAY FLOAT32", [0.5] * 301), "token_type has 301 entries"),
        (f"{T}merges", key("ARRAY STRING", ["a b c"]), "merges holds 'a b c', expected two tokens"),
        (f"{T}merges", key("ARRAY STRING", ["no such"]), "merges holds 'no such', expected two tokens that make"),
        (f"{T}merges", key("ARRAY STRING", ['! "']), "merges holds '! \"', expected two tokens that make a third"),
        (f"{T}merges", None, "tokenizer.ggml.merges is absent, without which every text"),
        (f"{T}merges", key("ARRAY STRING", []), "tokenizer.ggml.merges is empty, without which every text"),
        (f"{T}merges", key("ARRAY STRING", []), "its tokenizer holds a token of 1,025 characters"),
        (f"{T}merges", key("STRING", "a b"), "tokenizer.ggml.merges is 'a b', expected an array"),
        ("tokenizer.chat_template", key("UINT32", 1), "tokenizer.chat_template is 1, expected str"),
        ("general.name", number("STRING") + struct.pack("<Q", 1 << 40), "a string of 1,099,511,627,776 bytes"),
        ("general.name", key("STRING", b"\xff\xfe"), "key 'general.name' is not UTF-8"),
        (b"\xff", key("UINT32", 1), "a key's name is not UTF-8"),
        ("k" * 300, key("UINT32", 1), "a key's name has a string of 300 bytes, expected at most 256"),
        ("x", number("ARRAY") + number("ARRAY") + bytes(16), "key 'x' is a nested array"),
        ("x", number("ARRAY") + number("UINT8") + struct.pack("<Q", 1 << 62), "key 'x' is an array of 4,611,"),
        ("x", number("ARRAY") + number("UINT64") + struct.pack("<Q", 10**6), "the file ends within key 'x'"),
        ("x", number("ARRAY") + number("STRING") + struct.pack("<Q", 1 << 62), "key 'x' has 4,611,686,018,427"),
        ("x", number("ARRAY") + number("STRING") + struct.pack("<Q", 500_000), "key 'x' has 500,000 strings, more"),
        ("x", number("ARRAY") + struct.pack("<IQ", 77, 1), "key 'x' is of the unknown type 77"),
        ("x", struct.pack("<I", 13), "key 'x' is of the unknown type 13"),
        ("x", number("BOOL") + b"\2", "key 'x' is 2, expected a bool"),
    ]:
        changed = {name: value}
        if "1,025" in sentence:  # what tokenizer_file.py refuses in any tokenizer.json
            changed[f"{T}tokens"] = key("ARRAY STRING", ["x" * 1025, *map(str, range(299))])
            changed[f"{T}token_type"] = key("ARRAY INT32", [4] * 300)
        yield sentence, changed, {}, {}
    block = package.GGML_QUANT_SIZES[Type.Q8_0][1]
    for name, value, sentence in [
        (NAME, None, f"tensors are missing: {NAME}; not expected: none"),
        ("blk.7.ffn_up.weight", (0, [4], bytes(16)), "missing: none; not expected: blk.7.ffn_up.weight"),
        ("blk.1.attn_q.bias", (0, [4], bytes(16)), "holds blk.1.attn_q.bias; smoljax computes linear layers without"),
        ("rope_freqs.weight", (0, [4], bytes(16)), "holds rope_freqs.weight; smoljax computes the default rotary"),
        ("blk.1.ffn_up_exps.weight", (0, [4], bytes(16)), "not expected: blk.1.ffn_up_exps.weight"),
        ("output.weight", (0, [72, 300], bytes(4 * 72 * 300)), "output.weight differs from token_embd.weight"),
        ("output.weight", (1, [72, 300], bytes(2 * 72 * 300)), "output.weight differs from token_embd.weight"),
        (NAME, (0, [192, 72], bytes(4 * 72 * 192)), f"tensor {NAME} has shape [72, 192], but the keys give it [192, 7"),
        (NAME, (0, [1, 1, 1, 1, 1], b""), f"tensor '{NAME}' has 5 dimensions"),
        (NAME, (0, [], b""), f"tensor '{NAME}' has 0 dimensions"),
        (NAME, (0, [72, 0], b""), f"tensor '{NAME}' has shape [0, 72], expected F32 rows"),
        (NAME, (0, [1 << 33, 1 << 33], b""), f"tensor '{NAME}' of shape [8589934592, 8589934592] ends at byte"),
        (NAME, (0, [(1 << 64) - 1, 4], b""), f"tensor '{NAME}' of shape [4, 18446744073709551615] ends at byte"),
        (NAME, (99, [72, 192], b""), f"tensor '{NAME}' is of the unknown type 99"),
        (NAME, (15, [256, 54], b""), f"tensor '{NAME}' is Q8_K, expected one of F32, BF16"),
        (NAME, (8, [72, 192], bytes(192 * 3 * block)), "has shape [192, 72], expected Q8_0 rows of whole blocks of 32"),
        ("n" * 65, (0, [4], bytes(16)), "a tensor's name has a string of 65 bytes, expected at most 64"),
        (b"\xc3", (0, [4], bytes(16)), "a tensor's name is not UTF-8"),
        (q, (0, [72], bytes(4 * 72)), f"tensor {q} has shape [72], but the keys give it [144, 72]"),
    ]:
        yield sentence, {}, {name: value}, {}
    for changes, sentence in [
        ({"magic": b"GGML"}, "begins with b'GGML'"),
        ({"version": 1}, "is of GGUF version 1, expected 2 or 3"),
        ({"version": 4}, "is of GGUF version 4"),
        ({"version": 3 << 24}, "is a big-endian GGUF file"),
        ({"counts": (1 << 60, 0)}, "claims 1,152,921,504,606,84"),
        ({"counts": (0, 1 << 60)}, "claims 1,152,921,504,606,84"),
        ({"counts": (5000, 0)}, "tensor '' has 0 dimensions"),  # what follows is padding
        ({"counts": (0, 1)}, ""),  # the first tensor is read as a key
        ({"counts": (-1, 0)}, "tensors are missing"),
        ({"offsets": {NAME: 40}}, f"tensor '{NAME}' begins at 40, which is no multiple of the alignment 32"),
        ({"offsets": {NAME: 64}}, f"tensors 'token_embd.weight' and '{NAME}' overlap"),
        ({"offsets": {NAME: 1 << 62}}, f"tensor '{NAME}' of shape [192, 72] ends at byte 4,611,686"),
        ({"offsets": {NAME: (1 << 64) - 32}}, f"tensor '{NAME}' of shape [192, 72] ends at byte 18,446"),
    ]:
        yield sentence, {}, {}, changes


@pytest.mark.parametrize("sentence, keys, tensors, changes", refusals())
def test_refusals(good, tmp_path, sentence, keys, tensors, changes):
    def merged(old, new):
        return {k: v for k, v in (old | new).items() if v is not None}

    path = put(tmp_path / "a.gguf", merged(parts(good)[0], keys), merged(parts(good)[1], tensors), **changes)
    with pytest.raises(DataError) as e:
        gguf.open_source(path)
    said = str(e.value)
    assert sentence in said and str(path) in said and "\n" not in said and len(said) < 700, said


def test_put_together_by_hand_it_is_read(good, tmp_path):
    """What the refusals change is sound before; GGUF 2 and other alignments are, too."""
    keys, tensors = parts(good)
    before = exchange.assemble(gguf.open_source(good))
    for i, changes in enumerate([{}, {"version": 2}, {"alignment": 8}, {"alignment": 4096}, {"tail": b"more"}]):
        alignment = {"general.alignment": key("UINT32", changes.get("alignment", 32))}
        path = put(tmp_path / f"{i}.gguf", keys | alignment, tensors, **changes)
        assert same(exchange.assemble(gguf.open_source(path)), before)


def test_arrays_of_one_and_for_each_layer(good, tmp_path):
    """As some converters write numbers and texts, and as llama.cpp allows for layers; equal ones are one number."""
    keys, tensors = parts(good)
    before, L = gguf.open_source(good), "llama."
    for name, value in [
        (f"{L}block_count", key("ARRAY UINT32", [3])),
        (f"{L}rope.freq_base", key("ARRAY FLOAT32", [before.config.rope_theta])),
        (f"{L}attention.layer_norm_rms_epsilon", key("ARRAY FLOAT32", [1e-5])),
        (f"{L}attention.head_count", key("ARRAY UINT32", [before.config.num_attention_heads] * 3)),
        (f"{L}attention.head_count_kv", key("ARRAY INT32", [before.config.num_key_value_heads] * 3)),
        (f"{L}feed_forward_length", key("ARRAY UINT32", [before.config.intermediate_size] * 3)),
        (f"{L}expert_count", key("ARRAY UINT32", [0])),
        ("general.architecture", key("ARRAY STRING", ["llama"])),
        ("tokenizer.ggml.eos_token_id", key("ARRAY UINT32", [0])),
        ("tokenizer.ggml.add_bos_token", key("ARRAY BOOL", [False])),
        ("tokenizer.chat_template", key("ARRAY STRING", [TEMPLATE])),
    ]:
        back = gguf.open_source(put(tmp_path / "a.gguf", keys | {name: value}, tensors))
        assert back.config == before.config and back.files == before.files, name


def test_other_refusals(good, tmp_path):
    def refused(path, *sentences):
        with pytest.raises(DataError) as e:
            gguf.open_source(path)
        assert all(s in str(e.value) for s in (str(path), *sentences)) and "\n" not in str(e.value), str(e.value)

    keys, tensors = parts(good)
    twice = list(keys.items()) + [("general.name", keys["general.name"])]
    refused(put(tmp_path / "a.gguf", twice, tensors), "the key 'general.name' twice")
    twice = list(tensors.items()) + [(NAME, tensors[NAME])]
    refused(put(tmp_path / "a.gguf", keys, twice), f"the tensor '{NAME}' twice")
    refused(tmp_path / "none.gguf", "there is no file")
    refused(tmp_path, "there is no file")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "there is no file")  # and does not wait for a writer
    whole = good.read_bytes()
    for n in (0, 3, 4, 7, 15, 24, 100, 3000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        refused(tmp_path / "cut.gguf")
    # Cut after it was opened.
    (tmp_path / "cut.gguf").write_bytes(whole)
    source = gguf.open_source(tmp_path / "cut.gguf")
    os.truncate(tmp_path / "cut.gguf", len(whole) // 2)
    with pytest.raises(DataError, match="tensor output_norm.weight cannot be read"):
        source.tensor("model.norm.weight")


@pytest.mark.parametrize("worst", [np.nan, np.inf])
def test_damaged_numbers(worst, good, tmp_path):
    keys, tensors = parts(good)
    bad = np.full((192, 72), worst, np.float32)
    back = gguf.open_source(put(tmp_path / "a.gguf", keys, tensors | {NAME: (0, [72, 192], bad.tobytes())}))
    with pytest.raises(DataError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        exchange.assemble(back)
    keys, tensors = take_apart(written(tmp_path / "b.gguf", "q8_0", config=ROWS_OF_256))
    raw = bytearray(tensors[NAME][2])
    raw[:2] = np.float16(worst).tobytes()  # a block's scale
    back = gguf.open_source(put(tmp_path / "c.gguf", keys, tensors | {NAME: (8, [256, 256], bytes(raw))}))
    with pytest.raises(DataError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        exchange.assemble(back)


def traced(call) -> int:
    """Bytes that a call allocates at its peak, numpy's included; what it raises is let pass if it is a DataError."""
    tracemalloc.start()
    try:
        call()
    except DataError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_memory_of_a_hostile_header(good, tmp_path):
    """As many of the smallest strings as are allowed, as large a header as is; and one more of each is refused."""
    keys, tensors = parts(good)
    many = number("ARRAY") + number("STRING") + struct.pack("<Q", 600_000 - 700) + (text("ab") * (600_000 - 700))
    put(tmp_path / "many.gguf", {"x": many} | keys, [])
    large = {f"x{i}": key("STRING", "a" * (1 << 20)) for i in range(30)}
    put(tmp_path / "large.gguf", large | keys, tensors)
    words = [f"{i:06}" for i in range(280_000)]
    tokenizers = {"tokens": key("ARRAY STRING", words), "token_type": key("ARRAY INT32", [3] * len(words))}
    tokenizers |= {"merges": key("ARRAY STRING", [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)])}
    put(tmp_path / "words.gguf", keys | {f"tokenizer.ggml.{k}": v for k, v in tokenizers.items()}, tensors)
    for name in ("many", "large", "words"):
        assert 10 << 20 < traced(lambda name=name: gguf.open_source(tmp_path / f"{name}.gguf")) < 64 << 20
    more = number("ARRAY") + number("STRING") + struct.pack("<Q", 600_001) + text("ab") * 600_001
    for keys in ({"x": more}, {"x": key("STRING", "a" * ((1 << 20) + 1))}):
        put(tmp_path / "more.gguf", keys, [])
        with pytest.raises(DataError, match="key 'x' has"):
            gguf.open_source(tmp_path / "more.gguf")


@pytest.mark.slow
def test_memory_of_one_tensor(tmp_path):
    """Reading and writing the largest tensor, 33 MB in f32, in a model of bf16."""
    config = Model(256, 256, 1, 4, 4, 64, vocab_size=32768)
    noise = np.random.default_rng(0).normal(size=(32768, 256)).astype("bfloat16")

    def get(name):
        return noise if name == exchange.EMBED else np.ones(exchange.shapes(config)[name], "bfloat16")

    src = exchange.Source(config, "bfloat16", get, "noise", {"tokenizer.json": words()})
    size = noise.size * 4
    for dtype in ("float32", "q8_0", "q4_0"):
        path = tmp_path / f"{dtype}.gguf"
        assert traced(lambda d=dtype, p=path: gguf.write(p, src, d, "noise")) < 2 * size
        back = gguf.open_source(path)
        peak = traced(lambda b=back: b.tensor(exchange.EMBED))
        assert peak < (8 << 20 if dtype == "float32" else size + (16 << 20)), dtype


def mutate(whole: bytes, end: int, rng) -> bytes:
    """A file with its header, which ends at `end`, damaged: bits flipped, counts overwritten, bytes cut or added."""
    data, how = bytearray(whole), rng.integers(6)
    for _ in range(rng.integers(1, 4)):
        i = int(rng.integers(end))
        if how <= 1:  # anywhere, or among the counts and types of the beginning
            data[i if how else i % 1500] ^= 1 << rng.integers(8)
        elif how == 2:
            width = int(rng.choice([1, 4, 8]))
            worst = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1, 10**6][rng.integers(8)] % 2 ** (8 * width)
            data[i : i + width] = worst.to_bytes(width, "little")
        elif how == 3:
            del data[i : i + rng.integers(1, 40)]
        elif how == 4:
            data[i:i] = rng.bytes(rng.integers(1, 40))
        else:
            del data[rng.integers(len(data)) :]
    return bytes(data)


def fuzz(good, tmp_path, n, seed):
    whole, rng = good.read_bytes(), np.random.default_rng(seed)
    end = min(t.start for t in gguf_header.read_header(good).tensors.values())
    refused = 0
    for i in range(n):
        (tmp_path / "f.gguf").write_bytes(mutate(whole, end, rng))
        try:
            source = gguf.open_source(tmp_path / "f.gguf")
        except DataError as e:
            assert "\n" not in str(e) and str(tmp_path) in str(e), i
            refused += 1
            continue
        for name in exchange.shapes(source.config):  # what was let through is read, or refused in the same way
            try:
                source.tensor(name)
            except DataError:
                break
    return refused


def test_damaged_headers(good, tmp_path):
    assert 200 < fuzz(good, tmp_path, 400, 0) < 400


@pytest.mark.slow
def test_many_damaged_headers(good, tmp_path):
    assert 5000 < fuzz(good, tmp_path, 10_000, 1) < 10_000
