"""Hugging Face folders and `smoljax convert`: bit-exact round trips, and a sentence for each folder that cannot be."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_model import CONFIG, SHAPES, make

from infer import convert
from smoljax import exchange, hf, hf_config, tokenizer
from smoljax.config import SIZES
from smoljax.errors import DataError, UsageError
from smoljax.model import abstract

# A fixed text, so that no edit of a test changes which tokens another one sees.
TEXT = """def test_return(self, folder):
    import json
    for name, value in sorted(json.loads(text).items()):
        if value is not None and name != "the other": return [name, 3.14, 12, value]
    assert same(model, before) and not self.error, "the tensor of the model is not the one in the file"
"""


def train_tokenizer(path):
    return tokenizer.train([TEXT], CONFIG.vocab_size, path)


def cast(model, dtype):
    return jax.tree.map(lambda w: w.astype(dtype), model)


def same(a, b):
    """The same arrays, bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture
def folder(tmp_path):
    hf.save(tmp_path / "hf", make(), CONFIG)
    return tmp_path / "hf"


def edit(folder, **keys):
    """config.json with other values; ... takes a key away."""
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | keys).items() if v is not ...}))


def tensors(folder, **changes):
    """model.safetensors with other tensors; ... takes one away."""
    found = {k: v for k, v in (load_file(folder / "model.safetensors") | changes).items() if v is not ...}
    save_file(found, folder / "model.safetensors")


def test_the_table_names_every_parameter():
    leaves, _ = jax.tree.flatten_with_path(abstract(CONFIG), is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves} == set(exchange.TABLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_save_and_load_are_exact(name, dtype, tmp_path):
    model = cast(make(SHAPES[name]), dtype)
    hf.save(tmp_path / "hf", model, SHAPES[name])
    back, config = hf.load(tmp_path / "hf")
    assert config == SHAPES[name] and same(back, model)
    assert back.layers.q.dims == "DNH"
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"} and len(file.keys()) == 2 + 9 * config.num_hidden_layers
        q = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    N, H = config.num_attention_heads, config.head_dim
    by_hand = np.asarray(model.layers.q)[1].transpose(1, 2, 0).reshape(N * H, config.hidden_size)
    assert q.tobytes() == by_hand.tobytes()


def test_dtype_on_the_way(tmp_path):
    model, half = make(), cast(make(), "bfloat16")
    hf.save(tmp_path / "bf16", model, CONFIG, dtype="bfloat16")
    assert same(hf.load(tmp_path / "bf16")[0], half)
    assert same(hf.load(tmp_path / "bf16", "float32")[0], cast(half, "float32"))
    keys = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert keys["dtype"] == keys["torch_dtype"] == "bfloat16"
    # Half precision is read as it is.
    hf.save(tmp_path / "f16", cast(model, "float16"), CONFIG)
    assert same(hf.load(tmp_path / "f16")[0], cast(model, "float16"))
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        hf.load(tmp_path / "f16", "int8")


def test_config_as_transformers_4_and_5_write_it(folder):
    edit(folder, rope_parameters=...)
    assert hf.load(folder)[1] == CONFIG
    edit(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta})
    assert hf.load(folder)[1] == CONFIG
    edit(folder, hidden_act=..., attention_bias=..., mlp_bias=..., rope_scaling=..., use_cache=..., pad_token_id=...)
    edit(folder, rope_interleaved=False, is_llama_config=True)
    assert hf.load(folder)[1] == CONFIG


def test_the_published_config_is_read_in_silence(caplog):
    published = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range":
        0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
        "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "vocab_size": 49152}"""  # SmolLM2-135M's
    assert hf_config.from_config(json.loads(published)) == SIZES["smollm2-135m"] and not caplog.text


def test_absent_head_sizes(tmp_path):
    config = SHAPES["smollm-1.7b"]
    hf.save(tmp_path / "hf", make(config), config)
    edit(tmp_path / "hf", head_dim=..., num_key_value_heads=None)
    assert hf.load(tmp_path / "hf")[1] == config


def test_unknown_key_is_said(folder, caplog):
    edit(folder, colour="blue")
    hf.load(folder)
    assert "'colour'" in caplog.text


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures is"),
        ({"architectures": ...}, "architectures is"),
        ({"model_type": "qwen2"}, "model_type is"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"tie_word_embeddings": ...}, "tie_word_embeddings is"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_interleaved": True}, "rope_interleaved is true"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map is"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type is "linear"'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling.type is "dynamic"'),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 100_000.0}}, 'rope_parameters.rope_type is "yarn"'),
        ({"rope_parameters": {"factor": 4.0, "rope_theta": 100_000.0}}, "rope_parameters.factor is 4.0"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_theta": ..., "rope_parameters": ...}, "rope_theta is absent"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "rope_theta is absent"),
        ({"rope_theta": 10_000.0}, "contradict each other"),
        ({"rope_theta": "1e5", "rope_parameters": ...}, 'rope_theta is "1e5"'),
        ({"hidden_size": ...}, "hidden_size absent"),
        ({"rms_norm_eps": ...}, "rms_norm_eps absent"),
        ({"bos_token_id": ...}, "bos_token_id absent"),
        ({"head_dim": None, "hidden_size": 70}, "head_dim absent"),
        ({"bos_token_id": [0, 2]}, "bos_token_id is the list"),
        ({"eos_token_id": [0, 300]}, "eos_token_id is (0, 300)"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected at most 10,000"),
        ({"eos_token_id": 300}, "eos_token_id is 300"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is int, got '3'"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 9, not a multiple"),
    ],
)
def test_config_refusals(folder, keys, sentence):
    (folder / "generation_config.json").unlink()
    edit(folder, **keys)
    with pytest.raises(DataError, match=re.escape(sentence)) as e:
        hf.load(folder)
    assert str(folder / "config.json") in str(e.value) and "\n" not in str(e.value)


def test_tensor_refusals(folder):
    def refused(*sentences):
        with pytest.raises(DataError) as e:
            hf.load(folder)
        assert all(sentence in str(e.value) for sentence in sentences), str(e.value)

    name, shape = "model.layers.1.mlp.up_proj.weight", (CONFIG.intermediate_size, CONFIG.hidden_size)
    good = load_file(folder / "model.safetensors")
    tensors(folder, **{name: ..., "model.layers.7.mlp.up_proj.weight": good[name]})
    refused(f"missing: {name}", "not expected: model.layers.7.mlp.up_proj.weight")
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors(folder, **{name: good[name], "model.layers.7.mlp.up_proj.weight": ..., bias: good[name]})
    refused("missing: none", f"not expected: {bias}")
    tensors(folder, **{bias: ..., name: np.ascontiguousarray(good[name].T)})
    refused(f"tensor {name} has shape {list(shape[::-1])}", f"gives it {list(shape)}")
    tensors(folder, **{name: good[name].astype(np.int8)})
    refused(f"tensor {name} is I8")
    worst = good[name].copy()
    for number in (np.nan, np.inf, -np.inf):
        worst[3, 5] = number
        tensors(folder, **{name: worst})
        refused(f"tensor {name} holds NaN or infinity", str(folder))

    tensors(folder, **{name: good[name], hf.HEAD: good["model.embed_tokens.weight"]})
    assert same(hf.load(folder)[0], make())
    tensors(folder, **{hf.HEAD: good["model.embed_tokens.weight"] + 1})
    refused("lm_head.weight differs from model.embed_tokens.weight")

    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5])
    refused("no sound safetensors file")
    (folder / "model.safetensors").unlink()
    refused("no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refused("no model.safetensors", "pytorch_model.bin is a pickle")
    (folder / "config.json").write_text("{")
    refused("cannot be read as JSON")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_different_dtypes_take_the_one_that_holds_all(folder, dtype):
    """bf16 matrices with f32 norms, as some trainers write them: nothing is rounded unless it is asked for."""
    good = load_file(folder / "model.safetensors")
    tensors(folder, **{k: v.astype(dtype) for k, v in good.items() if "norm" not in k})
    model, _ = hf.load(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(model)} == {"float32"}
    assert np.array_equal(model.norm, good["model.norm.weight"])
    assert np.array_equal(model.embed, good["model.embed_tokens.weight"].astype(dtype).astype(np.float32))


def test_numbers_beyond_half_precision_are_refused(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    big = load_file(folder / "model.safetensors")[name]
    big[0, 0] = 1e6
    tensors(folder, **{name: big})
    assert str(hf.load(folder, "bfloat16")[0].embed.dtype) == "bfloat16"
    with pytest.raises(DataError, match=f"tensor {name} holds numbers beyond float16"):
        hf.load(folder, "float16")


def test_generation_config(folder, caplog):
    """A generation ends where generation_config.json says, and both files say so when written again."""
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": [0, 2], "temperature": 0.2, "top_p": 0.9}'
    )
    model, config = hf.load(folder)
    assert config.eos_token_id == (0, 2) and "eos_token_id is 0 in config.json, [0, 2] in generation" in caplog.text
    convert.main([str(folder), str(folder.parent / "again"), "--to", "hf"])
    generation = json.loads((folder.parent / "again" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [0, 2], "temperature": 0.2, "top_p": 0.9}
    assert json.loads((folder.parent / "again" / "config.json").read_text())["eos_token_id"] == [0, 2]
    caplog.clear()
    assert hf.load(folder.parent / "again")[1] == config and not caplog.text


def test_sharded(tmp_path, folder):
    """The same bytes in one file and in many, both ways; the index names each tensor's file."""
    size = (folder / "model.safetensors").stat().st_size
    many, one = str(tmp_path / "many"), str(tmp_path / "one")
    convert.main([str(folder), many, "--to", "hf", "--max-file-size", str(size / 5 / 1e9)])
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    good = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in good.values())
    for name, tensor in good.items():
        with safe_open(tmp_path / "many" / index["weight_map"][name], "numpy") as file:
            assert file.get_tensor(name).tobytes() == tensor.tobytes()
    assert same(hf.load(many)[0], make())
    convert.main([many, one, "--to", "hf"])
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_index_of_one_file(folder):
    """As some writers leave it beside model.safetensors; its total_size may be text, or null."""
    names = [*load_file(folder / "model.safetensors")]
    size = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    before = hf.load(folder)[0]
    for total in (size, str(size), None):
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert same(hf.load(folder)[0], before)


def test_no_padding_id_of_old_llama(folder, caplog):
    edit(folder, pad_token_id=-1)
    assert hf.load(folder)[1].pad_token_id is None and "pad_token_id is -1, which is taken for none" in caplog.text


def test_head_in_another_file(tmp_path, folder):
    convert.main([str(folder), str(tmp_path / "many"), "--to", "hf", "--max-file-size", "1e-4"])
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for odd in ([1], "x"):
        (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": odd}))
        with pytest.raises(DataError, match="metadata is .*, expected an object"):
            hf.load(tmp_path / "many")
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    index["weight_map"][hf.HEAD] = "head.safetensors"
    index["metadata"]["total_size"] += embed.nbytes
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({hf.HEAD: embed}, tmp_path / "many" / "head.safetensors")
    assert same(hf.load(tmp_path / "many")[0], make())
    embed[7, 7] += 1
    save_file({hf.HEAD: embed}, tmp_path / "many" / "head.safetensors")
    with pytest.raises(DataError, match="lm_head.weight differs"):
        hf.load(tmp_path / "many")


def test_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        hf.save(tmp_path / "full", make(), CONFIG)
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", make(), CONFIG)

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.tensors, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "new", make(), CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_tokenizer_refusals(tmp_path):
    train_tokenizer(tmp_path / "tokenizer.json")
    small = dataclasses.replace(CONFIG, vocab_size=299)
    with pytest.raises(DataError, match="has ids up to 299, but the model has rows for 299"):
        hf.save(tmp_path / "hf", make(small), small, tokenizer=tmp_path)
    odd = dataclasses.replace(CONFIG, vocab_size=400, pad_token_id=350)
    with pytest.raises(DataError, match="pad_token_id is 350"):
        hf.save(tmp_path / "hf", make(odd), odd, tokenizer=tmp_path)
