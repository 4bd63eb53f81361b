"""nanotron's checkpoints: bit-exact from any topology, the rotation proved by itself, and a sentence for each fault."""

import json
import re
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from nanotron_checkpoint import save
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_model import SHAPES, forward, make, tokens

from smoljax import exchange, nanotron, weights
from smoljax.config import Model
from smoljax.errors import DataError

CONFIG = SHAPES["smollm-135m"]
QKV = "model/model/decoder/1/pp_block/attn/qkv_proj"
EMBEDDING = "model/model/token_position_embeddings/pp_block/token_embedding"
NORM = "model/model/final_layer_norm/pp_block/model_weight.safetensors"


@cache
def hf_tensors(config=CONFIG):
    source = exchange.of_model(make(config), config)
    return {name: source.get(name) for name in exchange.shapes(config)}


def name(tp_rank, tp, pp_rank=0, pp=1):
    return f"model_weight_pp-rank-{pp_rank}-of-{pp}_tp-rank-{tp_rank}-of-{tp}.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "nt", CONFIG, hf_tensors(), tp=3, interleaved=True)


def edit(folder, file="model_config.json", **keys):
    """A JSON file with other values; ... takes a key away."""
    found = json.loads((folder / file).read_text()) | keys
    (folder / file).write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def change(path, **metadata):
    """A shard with other metadata; ... takes a key away."""
    with safe_open(path, "numpy") as file:
        found = (file.metadata() or {}) | metadata
    save_file(load_file(path), path, {k: v for k, v in found.items() if v is not ...})


def refused(folder, *sentences):
    with pytest.raises(DataError) as e:
        source = nanotron.open_source(folder)
        for tensor in exchange.shapes(source.config):
            source.tensor(tensor)
    assert all(sentence in str(e.value) for sentence in (str(folder), *sentences)), str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "size, tp, pp, dtype",
    [
        ("smollm-135m", 1, 1, "float32"),
        ("smollm-135m", 3, 1, "bfloat16"),
        ("smollm-360m", 5, 2, "float32"),
        ("smollm2-360m", 1, 2, "bfloat16"),
        ("smollm-1.7b", 2, 1, "float32"),
        ("smollm-1.7b", 4, 3, "float16"),
        ("smollm2-1.7b", 1, 1, "bfloat16"),
    ],
)
def test_round_trip_is_exact(size, tp, pp, dtype, interleaved, tmp_path):
    config = SHAPES[size]
    expected = {name: tensor.astype(dtype) for name, tensor in hf_tensors(config).items()}
    folder = save(tmp_path, config, expected, tp, pp, interleaved, dtype, numpy2=tp != 4)
    assert nanotron.is_checkpoint(folder)
    source = nanotron.open_source(folder)
    assert source.config == config and source.dtype == dtype and source.files == {}
    for name, tensor in expected.items():
        found = source.tensor(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.tobytes() == tensor.tobytes(), name


def test_the_makers_files(folder):
    """Some of it by hand, lest maker and reader be wrong alike."""
    rank = load_file(folder / QKV / name(1, 3))
    assert set(rank) == {"data"} and rank["data"].shape == ((9 + 3 + 3) * 8 // 3, 72)
    with safe_open(folder / QKV / name(1, 3), "numpy") as file:
        assert file.metadata() == {
            "version": "1.4",
            "local_global_slices_pairs": "0,24,None|None,None,None#24,48,None|None,None,None;"
            "24,32,None|None,None,None#80,88,None|None,None,None;32,40,None|None,None,None#104,112,None|None,None,None",
            "unsharded_shape": "(np.int64(120), 72)",
        }
    layer = "model.layers.1.self_attn"
    tensors = hf_tensors()
    q, k, v = (tensors[f"{layer}.{part}_proj.weight"] for part in "qkv")
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of a head's 8 rows, interleaved
    expected = [q.reshape(9, 8, 72)[3:6][:, order], k.reshape(3, 8, 72)[1:2][:, order], v.reshape(3, 8, 72)[1:2]]
    assert np.array_equal(rank["data"], np.concatenate(expected).reshape(40, 72))
    o = load_file(folder / "model/model/decoder/0/pp_block/attn/o_proj" / name(2, 3))["data"]
    assert np.array_equal(o, tensors["model.layers.0.self_attn.o_proj.weight"][:, 48:])
    up = load_file(folder / "model/model/decoder/0/pp_block/mlp/gate_up_proj" / name(0, 3))["data"][64:]
    assert np.array_equal(up, tensors["model.layers.0.mlp.up_proj.weight"][:64])
    assert not (folder / "model/model/lm_head").exists()


def test_one_file_is_mapped_and_not_copied(tmp_path):
    source = nanotron.open_source(save(tmp_path, CONFIG, hf_tensors()))
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        base = source.get(f"model.layers.1.{part}.weight")
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), part


def attention_scores(q, k, x, config, rotate):
    """[head, t, s] before the softmax, of one layer's q and k as rows."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k = (x @ q.T).reshape(-1, N, H), (x @ k.T).reshape(-1, K, H)
    q, k = rotate(q, config.rope_theta), np.repeat(rotate(k, config.rope_theta), N // K, axis=1)
    return np.einsum("tnh,snh->nts", q, k)


def rotate_interleaved(x, theta):
    """RotaryEmbedding.forward of nanotron's models/llama.py @4796d2d9: neighbours are one complex number."""
    T, _, H = x.shape
    freqs = np.outer(np.arange(T), 1.0 / theta ** (np.arange(0, H, 2) / H))
    x = x.reshape(*x.shape[:2], H // 2, 2)
    x = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * freqs)[:, None]
    return np.stack([x.real, x.imag], axis=-1).reshape(T, -1, H)


def rotate_half(x, theta):
    """transformers' apply_rotary_pos_emb."""
    T, _, H = x.shape
    freqs = np.outer(np.arange(T), 1.0 / theta ** (np.arange(0, H, 2) / H))
    freqs = np.concatenate([freqs, freqs], axis=-1)[:, None]
    turned = np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], axis=-1)
    return x * np.cos(freqs) + turned * np.sin(freqs)


@pytest.mark.parametrize("size", ["smollm-135m", "smollm2-1.7b"])
def test_scores_are_those_of_nanotrons_rotation(size, tmp_path):
    """Weights that are random in nanotron's own order: its attention scores on them are ours on what is read."""
    config, rng = SHAPES[size], np.random.default_rng(0)
    folder = save(tmp_path, config, hf_tensors(config), interleaved=True)
    path = folder / QKV / name(0, 1)
    raw = rng.normal(size=load_file(path)["data"].shape).astype(np.float32)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file({"data": raw}, path, metadata)
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = rng.normal(size=(50, config.hidden_size)) / config.hidden_size**0.5
    theirs = attention_scores(raw[: N * H], raw[N * H : (N + K) * H], x, config, rotate_interleaved)
    source = nanotron.open_source(folder)
    q, k = (source.tensor(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qk")
    np.testing.assert_allclose(attention_scores(q, k, x, config, rotate_half), theirs, atol=1e-5)
    edit(folder, rope_interleaved=False)
    source = nanotron.open_source(folder)
    q, k = (source.tensor(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qk")
    assert np.abs(attention_scores(q, k, x, config, rotate_half) - theirs).max() > 0.1


def test_logits(folder):
    """The model that was saved, and another one where rope_interleaved says the contrary."""
    ids = tokens(1, 24)
    read = exchange.assemble(nanotron.open_source(folder))
    np.testing.assert_array_equal(forward(read, ids), forward(make(CONFIG), ids))
    edit(folder, rope_interleaved=False)
    wrong = exchange.assemble(nanotron.open_source(folder))
    assert np.abs(forward(wrong, ids) - forward(read, ids)).max() > 0.1


def test_load(folder):
    found = weights.read(folder, "bfloat16")
    assert found.config == CONFIG and found.dtype == "bfloat16" and found.source == f"nanotron checkpoint {folder}"
    expected = jax.tree.map(lambda w: w.astype("bfloat16"), make(CONFIG))
    for a, b in zip(jax.tree.leaves(found.model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_published_configs(folder):
    """model_config as the recipes give it: SmolLM1's is from before the key, and is asked for it."""
    for file in sorted((Path(__file__).parent / "data/nanotron").glob("*.yaml")):
        keys = yaml.safe_load(file.read_text())["model"]["model_config"]
        (folder / "model_config.json").write_text(json.dumps(keys))
        if "smollm1" in file.name:
            with pytest.raises(DataError, match="rope_interleaved is 'absent'"):
                nanotron.read_config(folder)
            keys["rope_interleaved"] = True
            (folder / "model_config.json").write_text(json.dumps(keys))
        config, interleaved = nanotron.read_config(folder)
        assert interleaved == ("smollm1" in file.name or "1B" in file.name)
        fields = {k: v for k, v in keys.items() if hasattr(config, k)}
        assert len(fields) == 13 and {k: getattr(config, k) for k in fields} == fields and config.head_dim == 64


def test_keys_that_change_nothing(folder):
    edit(folder, moe_config=None, sliding_window_size=None, z_loss_enabled=True, _use_doc_masking=False)
    edit(folder, num_key_value_heads=None, num_attention_heads=9, attention_bias=False)
    assert nanotron.read_config(folder)[0].num_key_value_heads == 9


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (
            {"rope_interleaved": ...},
            "rope_interleaved is 'absent', expected true or false; add it: true if trained before",
        ),
        ({"rope_interleaved": None}, "rope_interleaved is None"),
        ({"rope_interleaved": "no"}, "rope_interleaved is 'no'"),
        ({"rope_interleaved": 1}, "rope_interleaved is 1"),
        ({"is_llama_config": ...}, "is_llama_config is not true"),
        ({"is_llama_config": ..., "is_qwen2_config": True}, "is_llama_config is not true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"tie_word_embeddings": ...}, "tie_word_embeddings is"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type is "linear"'),
        ({"rope_theta": ...}, "rope_theta is absent"),
        ({"rms_norm_eps": ...}, "rms_norm_eps absent"),
        ({"moe_config": {"num_experts": 8}}, "'moe_config' unknown here"),
        ({"sliding_window_size": 4096}, "'sliding_window_size' unknown here"),
        ({"no_rope_layer": 4}, "'no_rope_layer' unknown here"),
        ({"head_dim": 8}, "'head_dim' unknown here"),
        ({"zero": 0}, "'zero' unknown here"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is int, got '2'"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 9, not a multiple"),
        ({"hidden_size": 70}, "head_dim absent"),
        ({"num_key_value_heads": 9}, "shape is '(np.int64(120), 72)', but model_config.json gives it [216, 72]"),
        ({"hidden_size": 144}, "gives it"),
        ({"num_hidden_layers": 3}, "missing: model/model/decoder/2/pp_block/input_layernorm, "),
        ({"num_hidden_layers": 1}, "missing: none; not expected: model/model/decoder/1/pp_block/attn/o_proj"),
    ],
)
def test_config_refusals(folder, keys, sentence):
    edit(folder, **keys)
    refused(folder, "model_config.json", sentence)


def test_other_configs(folder):
    edit(folder, "checkpoint_metadata.json", version="1.1")
    refused(folder, "checkpoint_metadata.json: the format's version is '1.1'")
    edit(folder, "checkpoint_metadata.json", version="2.0")
    refused(folder, "checkpoint_metadata.json: the format's version is '2.0'")
    (folder / "checkpoint_metadata.json").unlink()  # as after nanotron's own converter
    nanotron.open_source(folder)
    (folder / "config.yaml").write_text("model:\n  init_method:\n    use_mup: true\n")
    refused(folder, "config.yaml: use_mup is true")
    (folder / "config.yaml").unlink()
    nanotron.open_source(folder)
    (folder / "model_config.json").write_text("{")
    refused(folder, "model_config.json cannot be read as JSON")
    (folder / "model_config.json").unlink()
    assert nanotron.is_checkpoint(folder)
    refused(folder, "there is no file", "model_config.json")


def test_files_refused(folder):
    path = folder / QKV / name(2, 3)
    other = path.rename(path.with_name("model_bias_pp-rank-0-of-1_tp-rank-2-of-3.safetensors"))
    refused(folder, "missing: none", f"not expected: {QKV}/{other.name}")
    other.rename(folder / "aside")
    refused(folder, f"{QKV} lacks or repeats a part of [120, 72]; expected each tp-rank once")
    (folder / "aside").rename(path)
    nanotron.open_source(folder)

    head = folder / "model/model/lm_head/pp_block" / name(0, 3)
    head.parent.mkdir(parents=True)
    head.write_bytes(path.read_bytes())
    refused(folder, f"not expected: model/model/lm_head/pp_block/{head.name}")
    head.rename(folder / "model/stray.safetensors")
    refused(folder, "not expected: model/stray.safetensors")
    (folder / "model/stray.safetensors").rename(path.with_name(name(0, 1)))
    refused(folder, f"{QKV} lacks or repeats")  # two runs' files in one folder
    path.with_name(name(0, 1)).unlink()
    (folder / NORM).rename(folder / "aside")
    refused(folder, "missing: model/model/final_layer_norm/pp_block; not expected: none")
    (folder / "aside").rename(folder / NORM)
    nanotron.open_source(folder)
    for file in folder.glob("model/**/*.safetensors"):
        file.unlink()
    refused(folder, "missing: model/model/token_position_embeddings/pp_block/token_embedding, ")


@pytest.mark.parametrize("tensors", [{"x": 1}, {"data": 1, "x": 1}, {"data": np.int8}, {"data": np.float64}, {}])
def test_tensors_refused(folder, tensors):
    path = folder / QKV / name(2, 3)
    good = load_file(path)["data"]
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    changed = {key: good if dtype == 1 else good.astype(dtype) for key, dtype in tensors.items()}
    save_file(changed, path, metadata)
    refused(folder, f"{path} holds", "expected one tensor, data, that is F32 or BF16 or F16")


def test_numbers_and_shapes_refused(folder):
    path = folder / QKV / name(2, 3)
    good, whole = load_file(path)["data"], path.read_bytes()
    bad = good.copy()
    bad[0, 0] = np.nan  # a row of q
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file({"data": bad}, path, metadata)
    refused(folder, "model.layers.1.self_attn.q_proj.weight holds NaN")
    for shape in [(39, 72), (72, 40), (2880,), (40, 72, 1), (1, 40, 72)]:
        save_file({"data": np.ones(shape, np.float32)}, path, metadata)
        refused(folder, f"{path}: local_global_slices_pairs '0,24,None", f"do not map {shape} into (120, 72)")
    path.write_bytes(whole[:-5])
    refused(folder, f"{path} is no sound safetensors file")
    path.write_bytes(whole)
    for shape in [(71,), (72, 1), (9, 8)]:
        save_file({"data": np.ones(shape, np.float32)}, folder / NORM)
        refused(folder, f"{NORM}: the whole tensor's shape is '{shape}', but model_config.json gives it [72]")


SLICES = "0,24,None|None,None,None#48,72,None|None,None,None;24,32,None|None,None,None#88,96,None|None,None,None;"
SLICES += "32,40,None|None,None,None#112,120,None|None,None,None"  # the last rank's


@pytest.mark.parametrize(
    "old, new",
    [
        (SLICES, ""),
        (SLICES, SLICES + ";"),
        (SLICES, SLICES.rpartition(";")[0]),  # rows 32 to 40 of the file go nowhere
        (SLICES, SLICES + ";" + SLICES.rpartition(";")[2]),  # rows 32 to 40 go there twice
        ("#48,72", "#48,71"),
        ("#48,72", "#72,48"),
        ("#48,72", "#-72,-48"),
        ("#112,120", "#113,121"),
        ("0,24,None", "0,24,2"),
        ("24,32,None", "23,31,None"),  # overlaps here
        ("0,24,None", "zero,24,None"),
        ("0,24,None", "0,24"),
        ("0,24,None|None,None,None", "0,24,None"),
        ("0,24,None", "0,24,None|0,24,None"),
        ("#48", "##48"),
        ("#48", ""),
        ("|None,None,None#48", "|0,9,None#48"),
        ("0,24", "0," + "9" * 5000),
    ],
)
def test_slices_refused(folder, old, new):
    path = folder / QKV / name(2, 3)
    assert old in SLICES
    change(path, local_global_slices_pairs=SLICES)
    nanotron.open_source(folder)
    change(path, local_global_slices_pairs=SLICES.replace(old, new, 1))
    refused(folder, f"{path}: local_global_slices_pairs", "do not map (40, 72) into (120, 72)")


def test_slices_of_several_ranks(folder):
    path = folder / QKV / name(2, 3)
    change(path, local_global_slices_pairs=SLICES.replace("#48,72", "#24,48"))  # where rank 1's are
    refused(folder, f"{QKV} lacks or repeats a part of [120, 72]")
    change(path, local_global_slices_pairs=SLICES, unsharded_shape="(120, 73)")
    refused(folder, f"{path}: the whole tensor's shape is '(120, 73)', but model_config.json gives it [120, 72]")
    change(path, unsharded_shape=...)
    refused(folder, f"{path}: the whole tensor's shape is 'absent'")
    change(path, unsharded_shape="(120, 72)", local_global_slices_pairs=...)
    refused(folder, f"{path}: local_global_slices_pairs '' do not map")


def test_slices_mean_what_they_say(folder):
    """The ranks' files under each other's names: where a slice belongs is in it."""
    a, b = folder / EMBEDDING / name(0, 3), folder / EMBEDDING / name(2, 3)
    a.rename(folder / "aside")
    b.rename(a)
    (folder / "aside").rename(b)
    found = nanotron.open_source(folder).tensor("model.embed_tokens.weight")
    assert np.array_equal(found, hf_tensors()["model.embed_tokens.weight"])
    save_file({"data": np.roll(found, 100, axis=0)}, a, {"unsharded_shape": "(300, 72)"})  # one file, turned
    change(
        a, local_global_slices_pairs="0,100,None|None,None,None#200,300,1|0,72,1;100,None,None|0,72,1#0,200,1|0,72,1"
    )
    for path in (b, a.with_name(name(1, 3))):
        path.unlink()
    found = nanotron.open_source(folder).tensor("model.embed_tokens.weight")
    assert np.array_equal(found, hf_tensors()["model.embed_tokens.weight"])


def test_different_dtypes_take_the_one_that_holds_all(tmp_path):
    folder = save(tmp_path, CONFIG, hf_tensors(), tp=3, dtype="bfloat16")
    norm = hf_tensors()["model.norm.weight"]
    save_file({"data": norm}, folder / NORM)
    rank = folder / EMBEDDING / name(1, 3)
    with safe_open(rank, "numpy") as file:
        metadata = file.metadata()
    save_file({"data": load_file(rank)["data"].astype(np.float32)}, rank, metadata)
    source = nanotron.open_source(folder)
    assert source.dtype == "float32" and np.array_equal(source.tensor("model.norm.weight"), norm)
    embedding, expected = source.tensor("model.embed_tokens.weight"), hf_tensors()["model.embed_tokens.weight"]
    assert str(embedding.dtype) == "float32" and np.array_equal(embedding, expected.astype("bfloat16").astype("f4"))


def test_pickles_are_not_opened_and_said(folder, caplog):
    exchange.assemble(nanotron.open_source(folder))
    assert "optimizer_pp-0-of-1_tp-0-of-3_exp-0-of-1.pt: optimizer state is a pickle, not read; training" in caplog.text
    assert len(caplog.records) == 1 and not (folder / "was-unpickled").exists()
    for file in folder.glob("*/*.pt"):
        file.unlink()
    caplog.clear()
    nanotron.open_source(folder)
    assert not caplog.text


def test_links_that_leave(folder, tmp_path):
    path = folder / QKV / name(2, 3)
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    refused(folder, f"{path} is a link to {outside}, outside the folder")
    path.unlink()
    path.symlink_to("../../../../../../../../outside")
    refused(folder, f"is a link to {outside}, outside the folder")
    path.unlink()
    path.symlink_to(path)  # to itself
    refused(folder, str(path))
    path.unlink()
    outside.rename(path)
    (folder / QKV).rename(outside)
    (folder / QKV).symlink_to(outside)
    refused(folder, f"missing: {QKV}; not expected: {QKV}")
    (folder / QKV).unlink()
    outside.rename(folder / QKV)
    nanotron.open_source(folder)
    (folder / "model").rename(outside)
    (folder / "model").symlink_to(outside)
    refused(folder, f"{folder / 'model'} is a link to {outside}, outside the folder")
    (folder / "model").unlink()
    outside.rename(folder / "model")
    (folder / "model_config.json").rename(outside)
    (folder / "model_config.json").symlink_to(outside)
    refused(folder, "model_config.json is a link to")


def test_links_of_the_hubs_cache(folder, tmp_path):
    """models--HuggingFaceTB--SmolLM2-nanotron-ckpt/snapshots/REVISION/135M/final/..., each file a link to blobs/."""
    blobs, home = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc/135M/final"
    blobs.mkdir(parents=True)
    for i, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = home / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(i))
        link.symlink_to(Path(*[".."] * (len(link.relative_to(tmp_path / "cache").parts) - 1), "blobs", str(i)))
    found = nanotron.open_source(home).tensor("model.layers.1.self_attn.k_proj.weight")
    assert np.array_equal(found, hf_tensors()["model.layers.1.self_attn.k_proj.weight"])


def test_tokenizer_beside_it(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert nanotron.open_source(folder).files == {"tokenizer.json": b'{"version": "1.0"}'}


def test_what_is_none(tmp_path):
    assert not nanotron.is_checkpoint(tmp_path) and not nanotron.is_checkpoint(tmp_path / "absent")
    config = Model(64, 128, 1, 4, 4, 16, vocab_size=300)
    source = nanotron.open_source(save(tmp_path, config, hf_tensors(config), tp=2))
    with pytest.raises(KeyError):
        source.get("lm_head.weight")
    assert re.match("nanotron checkpoint ", source.name)


def test_as_nanotron_calls_its_folders(tmp_path):
    """checkpoints/STEP is what our own runs have, too."""
    config = SHAPES["smollm2-360m"]
    source = exchange.of_model(make(config), config)
    values = {name: source.tensor(name) for name in exchange.shapes(config)}
    save(tmp_path / "checkpoints" / "2000", config, values)
    with weights.open_source(tmp_path / "checkpoints" / "2000") as found:
        assert all(np.array_equal(found.tensor(name), value) for name, value in values.items())
    assert weights.read(tmp_path / "checkpoints" / "2000").source.startswith("nanotron checkpoint")
