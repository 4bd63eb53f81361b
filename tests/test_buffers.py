"""Weights with company: buffers of older savers, adapters."""

import json
import re

import ml_dtypes
import numpy as np
import published
import pytest
from gguf import GGUFValueType as V
from published import gguf_file
from safetensors.numpy import load_file, save_file

from infer import convert
from smoljax import hf, weights
from smoljax.errors import DataError, run

H, THETA, T = 32, 10000.0, 64
INV = (THETA ** (-np.arange(0, H, 2) / H)).astype(np.float32)
ANGLES = np.concatenate([np.arange(T)[:, None] * INV] * 2, axis=1).astype(np.float32)
LAYER = "model.layers.0.self_attn"
GOOD = {
    f"{LAYER}.rotary_emb.inv_freq": INV,
    "model.rotary_emb.inv_freq": INV.astype(ml_dtypes.bfloat16),
    "model.rotary_emb.original_inv_freq": INV.astype(np.float16),
    "model.layers.0.attention.rotary_emb.inv_freq": INV.astype(np.float64),
    f"{LAYER}.rotary_emb.cos_cached": np.cos(ANGLES)[None, None],
    f"{LAYER}.rotary_emb.sin_cached": np.sin(ANGLES).astype(ml_dtypes.bfloat16),
    f"{LAYER}.masked_bias": np.array(-1e4, np.float32),
    "model.layers.0.attn.masked_bias": np.array([-np.inf], np.float16),
    f"{LAYER}.bias": np.tri(T, dtype=bool)[None, None],
    "model.layers.0.attn.bias": np.tri(T, dtype=np.uint8)[None, None],
    "model.causal_mask": np.triu(np.full((T, T), -1.0, np.float32), 1),
    "model.embeddings.position_ids": np.arange(T)[None],
    "position_ids": np.arange(T, dtype=np.int32),
}
BAD = {
    f"{LAYER}.rotary_emb.inv_freq": INV * 1.01,
    "model.rotary_emb.inv_freq": (500_000.0 ** (-np.arange(0, H, 2) / H)).astype(np.float32),
    "model.layers.0.rotary_emb.inv_freq": INV[:-1],
    f"{LAYER}.rotary_emb.cos_cached": np.sin(ANGLES),
    f"{LAYER}.rotary_emb.sin_cached": np.sin(ANGLES)[:, :-1],
    f"{LAYER}.masked_bias": np.array(0, np.float32),
    f"{LAYER}.bias": np.ones((1, 1, T, T), bool),
    "model.layers.0.attn.bias": np.zeros(3 * T, np.float32),  # a projection's, which changes what is computed
    "position_ids": np.arange(T)[::-1].copy(),
}


@pytest.fixture
def folder(tmp_path):
    return published.folder(tmp_path / "hf")


def add(folder, tensors):
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})


def test_buffers_are_passed_over(folder, caplog):
    """And said in one line; the model is the one without them, as in transformers."""
    before = hf.load(folder)[0]
    add(folder, GOOD)
    model, config = hf.load(folder)
    assert np.array_equal(model.embed, before.embed) and np.array_equal(model.layers.q, before.layers.q)
    said = [line for line in caplog.messages if "buffers are passed over" in line]
    assert len(said) == 1 and f"{len(GOOD)} buffers are passed over, for they are computed here" in said[0]
    convert.main([str(folder), str(folder.parent / "again")])
    assert set(load_file(folder.parent / "again" / "model.safetensors")) == {
        name for name in load_file(folder / "model.safetensors") if name not in GOOD
    }


@pytest.mark.parametrize("name", BAD)
def test_a_buffer_of_another_model_is_refused(name, folder):
    add(folder, {name: BAD[name]})
    with pytest.raises(DataError, match=re.escape(f"the buffer {name} (") + ".* is not what config.json says"):
        hf.load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.inv_freq", "model.layers.0.q.lora_A.weight"]
)
def test_what_is_no_buffer_is_refused(name, folder):
    add(folder, {name: np.zeros(64, np.float32)})
    with pytest.raises(DataError, match=f"not expected: {re.escape(name)}"):
        hf.load(folder)


@pytest.mark.parametrize("files", [[], ["config.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_an_adapter_alone(files, folder, tmp_path, capsys):
    """Whatever small files lie beside it, one sentence that says what it is and whose."""
    place = tmp_path / "lora"
    place.mkdir()
    for name in files:
        (place / name).write_bytes((folder / name).read_bytes())
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "me/base"}')
    save_file({"base_model.model.x.lora_A.weight": np.zeros((2, 2), np.float32)}, place / "adapter_model.safetensors")
    assert run(convert.main, [str(place), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert f"{place} holds an adapter of 'me/base' (adapter_config.json) and no model; merge it" in said
    assert len(said.splitlines()) == 1


def test_an_adapter_beside_a_model_is_said(folder, caplog):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    weights.read(folder)
    assert "holds an adapter beside the model (adapter_config.json), which is not applied" in caplog.text


def test_an_adapter_as_gguf(tmp_path):
    file = gguf_file(tmp_path / "a.gguf", {"general.type": ("adapter", V.STRING)})
    with pytest.raises(DataError, match="holds an adapter and no model"):
        weights.read(file)
