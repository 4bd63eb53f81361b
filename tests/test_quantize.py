"""int8: the arithmetic, `smoljax convert --dtype int8` and its folder, read as it is, and refused where it is not."""

import dataclasses
import json
import re
import shutil

import corpus
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import saved
from test_hf import cast, edit, same, tensors
from test_model import CONFIG, SHAPES, forward, make

from infer import convert
from smoljax import budget, exchange, hf, verify, weights
from smoljax.config import SIZES
from smoljax.errors import DataError, UsageError, run
from smoljax.quantize import MATRICES, QTensor, quantize, quantized
from train import evaluate

IDS = np.arange(24)[None] * 7 % CONFIG.vocab_size
UP, EMBED = "model.layers.1.mlp.up_proj.weight", exchange.EMBED
COUNT = 2 + 9 * CONFIG.num_hidden_layers
HALF = 0.5 + 1e-4  # of a step


def stored(model, embedding):
    """A model in int8 as a file has it: the rest in bfloat16."""

    def one(w):
        return w if isinstance(w, QTensor) else w.astype("bfloat16")

    return jax.tree.map(one, quantize(model, embedding), is_leaf=lambda w: isinstance(w, QTensor))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in f32, its int8, and its int8 with the embedding."""
    place = tmp_path_factory.mktemp("int8")
    saved(place / "f32")
    for name, flags in {"int8": [], "embedding": ["--int8-embedding"]}.items():
        assert convert.main([str(place / "f32"), str(place / name), "--dtype", "int8", *flags]) == 0
    return place


@pytest.fixture
def folder(place, tmp_path):
    """An int8 folder to be damaged."""
    return shutil.copytree(place / "int8", tmp_path / "int8")


# ---- the arithmetic


def test_half_a_step_and_the_same_bits_from_numpy():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 96)) * np.exp(rng.normal(0, 4, (64, 1)))).astype(np.float32)
    x[3], x[4], x[5], x[6, :2] = 0, 1e-40, np.arange(96) * 2.5e-37, [-9e30, 9e30]
    x[7] = (np.arange(96) - 48) / 2 / 127  # halves of a step, to even
    x[7, 0] = 1
    for array in (x, x.astype(ml_dtypes.bfloat16), (x / 1e30).astype(np.float16)):
        for axes in ((-1,), (0,), (0, 1)):
            values, scale = quantized(array, axes)
            assert isinstance(values, np.ndarray) and (values.dtype, scale.dtype) == (np.int8, np.float32)
            for made in (quantized, jax.jit(quantized, static_argnums=1)):
                theirs, its = made(jnp.asarray(array), axes)
                assert np.array_equal(values, theirs) and np.asarray(its).tobytes() == scale.tobytes()
            assert values.min() >= -127 and np.isfinite(scale).all()
            wide = array.astype(np.float32)
            assert (np.abs(wide - values * scale) <= HALF * np.maximum(scale, 254 * 1.2e-38)).all()
            top = np.abs(wide).max(axis=axes, keepdims=True)
            assert np.allclose(scale, np.where(top / 127 < 1.1754944e-38, 0, top / 127), rtol=2e-7, atol=0)
    values, scale = quantized(x)
    assert not values[3:5].any() and np.array_equal(values[7, 1:6], np.round((np.arange(1, 6) - 48) / 2))


QUICKLY = ("smollm-1.7b", "smollm2-135m")  # as many keys as queries; fewer


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize(
    "name", [*QUICKLY, *(pytest.param(n, marks=pytest.mark.slow) for n in SHAPES if n not in QUICKLY)]
)
def test_what_is_read_is_what_quantize_makes(name, embedding, tmp_path):
    """Bit for bit, of bf16 weights as they are published and of f32 ones; and so are the logits."""
    flags = ["--int8-embedding"] if embedding else []
    for dtype in ("bfloat16", "float32"):
        model = cast(make(SHAPES[name]), dtype)
        hf.save(tmp_path / dtype, model, SHAPES[name])
        convert.main([str(tmp_path / dtype), str(tmp_path / f"{dtype}-8"), "--dtype", "int8", *flags])
        expected = stored(model, embedding)
        found = weights.read(tmp_path / f"{dtype}-8")
        assert found.dtype == "int8" and found.config == SHAPES[name] and same(found.model, expected)
        assert all(isinstance(getattr(found.model.layers, m), QTensor) for m in MATRICES)
        assert isinstance(found.model.embed, QTensor) == embedding
        assert np.array_equal(forward(found.model, IDS), forward(expected, IDS))
        # From memory: the same file.
        hf.save(tmp_path / f"{dtype}-m", expected, SHAPES[name])
        files = [tmp_path / f"{dtype}-{end}" / "model.safetensors" for end in "8m"]
        assert files[0].read_bytes() == files[1].read_bytes()


# ---- the folder


def test_what_lies_in_it(place):
    found, good = load_file(place / "int8" / "model.safetensors"), load_file(place / "f32" / "model.safetensors")
    assert found.keys() == good.keys() | {name + "_scale" for name in good if "proj" in name}
    for name, array in good.items():
        if "proj" in name:
            scale = found[name + "_scale"]
            assert found[name].dtype == np.int8 and found[name].shape == array.shape
            assert scale.dtype == np.float32 and scale.shape == array.shape[:1]
            assert np.allclose(scale, np.abs(array).max(axis=1) / 127, rtol=2e-7)
            assert (np.abs(found[name] * scale[:, None] - array) <= HALF * scale[:, None]).all()
        else:
            assert found[name].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
    keys = json.loads((place / "int8" / "config.json").read_text())
    assert keys["quantization_config"] == {
        "format": "smoljax-int8",
        "bits": 8,
        "symmetric": True,
        "scale": "float32, one for each output",
        "embedding": False,
    }
    assert keys["dtype"] == "bfloat16" and "library_name: smoljax" in (place / "int8" / "README.md").read_text()
    embedding = load_file(place / "embedding" / "model.safetensors")
    assert embedding.keys() == found.keys() | {EMBED + "_scale"} and embedding[EMBED].dtype == np.int8


def test_converted_again_it_is_the_same_in_one_file_or_many(place, tmp_path, capsys):
    for name in ("int8", "embedding"):
        whole, many, again = place / name, tmp_path / f"{name}-many", tmp_path / f"{name}-again"
        convert.main([str(whole), str(many), "--max-file-size", "1e-5", "--verify", "--json"])
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (report["dtype"], report["bits"], report["tensors"]["exact"]) == ("int8", "exact", COUNT)
        assert report["logits"]["largest_difference"] == 0
        assert len(list(many.glob("model-*-of-*.safetensors"))) > 5
        index = json.loads((many / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == report["bytes"]["total"]
        convert.main([str(many), str(again), "--dtype", "int8"])
        for file in ("model.safetensors", "config.json"):
            assert (again / file).read_bytes() == (whole / file).read_bytes()
    convert.main([str(place / "int8"), str(tmp_path / "more"), "--dtype", "int8", "--int8-embedding", "--verify"])
    argv = [str(tmp_path / "more"), str(tmp_path / "same"), "--dtype", "int8", "--int8-embedding", "--verify", "--json"]
    capsys.readouterr()
    convert.main(argv)
    assert json.loads(capsys.readouterr().out)["bits"] == "exact"
    layers = load_file(tmp_path / "more" / "model.safetensors").items()
    assert all(np.array_equal(v, load_file(place / "int8" / "model.safetensors")[k]) for k, v in layers if "proj" in k)


def test_logits_that_are_not_finite_prove_nothing(place, tmp_path):
    shutil.copytree(place / "f32", tmp_path / "huge")
    found = load_file(tmp_path / "huge" / "model.safetensors")
    found[UP][0, 0] = 3.4e38
    save_file(found, tmp_path / "huge" / "model.safetensors")
    with pytest.raises(DataError, match="logits of a text are not finite, which proves nothing"):
        convert.main([str(tmp_path / "huge"), str(tmp_path / "out"), "--dtype", "int8", "--verify"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dequantised(place, tmp_path):
    """As Params by `read`, and by the other formats, which hold the same numbers."""
    found = load_file(place / "int8" / "model.safetensors")
    ours = weights.read(place / "int8", "float32")
    assert ours.dtype == "float32" and {str(x.dtype) for x in jax.tree.leaves(ours.model)} == {"float32"}
    up = found[UP] * found[UP + "_scale"][:, None]
    assert np.array_equal(ours.model.layers.up[1], up.T) and ours.model.layers.up.dims == "DF"
    for name in MATRICES:
        whole = getattr(weights.load(place / "int8").layers, name)
        assert np.array_equal(whole[...], getattr(ours.model.layers, name)), name
    narrow = weights.read(place / "int8", "bfloat16")
    assert narrow.dtype == "bfloat16" and same(narrow.model, cast(ours.model, "bfloat16"))
    assert np.abs(forward(weights.load(place / "int8"), IDS) - forward(ours.model, IDS)).max() < 1e-4
    for to, flags in {"hf": ["--dtype", "float32"], "gguf": [], "orbax": []}.items():
        assert convert.main([str(place / "int8"), str(tmp_path / to), "--to", to, "--verify", *flags]) == 0
        assert same(weights.read(tmp_path / to).model, ours.model)


def test_verify(place, tmp_path, capsys):
    for name, flags in {"int8": [], "embedding": ["--int8-embedding"]}.items():
        argv = [str(place / "f32"), str(tmp_path / name), "--dtype", "int8", *flags, "--verify"]
        assert convert.main([*argv, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((tmp_path / name / "conversion.json").read_text())
        tensor = load_file(tmp_path / name / "model.safetensors")
        scales = sum(v.nbytes for k, v in tensor.items() if k.endswith("_scale"))
        total = sum(v.nbytes for v in tensor.values())
        assert report["bytes"] == {"weights": total - scales, "scales": scales, "total": total}
        assert name != "int8" or report["bytes"] == budget.inference_bytes(CONFIG)["int8"]
        exact = COUNT - len(MATRICES) * CONFIG.num_hidden_layers - len(flags)
        assert report["tensors"]["exact"] == exact and 0 < report["tensors"]["largest_difference"] < 0.1
        assert report["transformers"] == "not compared, it does not read this format"
        assert report["loss"]["source"] != report["loss"]["written"]
        shutil.rmtree(tmp_path / name)
        convert.main(argv)
        said = capsys.readouterr().out
        for sentence in ("weights 0.", "MB, scales 0.", "MB, total 0.", "the others within half a step", "loss"):
            assert sentence in said


@pytest.mark.parametrize("damage", ["one step", "scale", "norm"])
def test_verify_finds_what_is_wrong(damage, place, tmp_path, monkeypatch):
    source = hf.open_source(place / "f32")

    class Wrong(exchange.Source):
        def int8(self, name):
            values, scale = super().int8(name)
            if name == UP and damage == "one step":
                values[3, 4] += 1 if values[3, 4] < 0 else -1
            return values, scale * np.float32(1.001 if name == UP and damage == "scale" else 1)

        def tensor(self, name, dtype=None):
            array = super().tensor(name, dtype)
            return array + 1 if damage == "norm" and name == "model.norm.weight" else array

    wrong = Wrong(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source)})
    writer = hf.write
    monkeypatch.setattr(hf, "write", lambda folder, _, *rest: writer(folder, wrong, *rest))
    name = "model.norm.weight differs" if damage == "norm" else f"{UP} is not that of"
    with pytest.raises(DataError, match=f"tensor {name}"):
        convert.main([str(place / "f32"), str(tmp_path / "b"), "--dtype", "int8", "--verify"])
    assert not list(tmp_path.iterdir())


def test_half_a_step_of_its_own_row():
    mine = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32) * np.logspace(-3, 3, 8)[:, None]
    values, scale = quantized(mine := mine.astype(np.float32))
    assert verify.within_a_step(mine, values * scale, "int8")
    values[5, 3] += 1 if values[5, 3] < 100 else -1
    assert not verify.within_a_step(mine, values * scale, "int8")


def test_sizes_are_the_model_cards():
    """Their 162.87 counts 128 B a layer of rotary buffers besides, and the 360M's 723.56 is a misprint."""
    cards = {"135m": (269.03, 162.86), "360m": (723.64, 409.07), "1.7b": (3422.75, 1812.14)}
    for size, (bfloat16, weight) in cards.items():
        found = budget.inference_bytes(SIZES[f"smollm2-{size}"])
        assert (round(found["bfloat16"] / 1e6, 2), round(found["int8"]["weights"] / 1e6, 2)) == (bfloat16, weight)
        kinds = exchange.layout(SIZES[f"smollm2-{size}"], "int8")
        scales = 4 * sum(shape[0] for name, (_, shape) in kinds.items() if name.endswith("_scale"))
        assert found["int8"]["scales"] == scales and found["int8"]["total"] == found["int8"]["weights"] + scales


def test_evaluate_takes_it(place, tmp_path, capsys):
    """As it is stored, on the suite's 8 devices; the loss is the dequantised weights'."""
    data = corpus.write(tmp_path / "data", corpus.documents(20, CONFIG.vocab_size), CONFIG.vocab_size)
    convert.main([str(place / "int8"), str(tmp_path / "plain"), "--dtype", "float32"])
    for bare in ("int8", "embedding", "plain"):
        at = tmp_path / "plain" if bare == "plain" else shutil.copytree(place / bare, tmp_path / bare)
        (at / "tokenizer.json").unlink()
    loss = {}
    for name in ("int8", "plain", "embedding"):
        capsys.readouterr()
        assert evaluate.main([str(tmp_path / name), "--data", str(data), "--seq-len", "32", "--json"]) == 0
        loss[name] = json.loads(capsys.readouterr().out)["loss"]
    assert loss["int8"] == pytest.approx(loss["plain"], abs=1e-5) != loss["embedding"]
    assert loss["embedding"] == pytest.approx(loss["plain"], abs=0.05)


# ---- mistakes


def test_flags(place, tmp_path, capsys):
    for flags, sentence in [
        (["--to", "gguf", "--dtype", "int8"], "--dtype int8 is for --to hf; --to gguf takes float32"),
        (["--to", "orbax", "--dtype", "int8"], "--dtype int8 is for --to hf; --to orbax takes float32"),
        (["--int8-embedding"], "--int8-embedding is for --dtype int8"),
        (["--int8-embedding", "--dtype", "float32"], "--int8-embedding is for --dtype int8"),
    ]:
        assert run(convert.main, [str(place / "f32"), str(tmp_path / "new"), *flags]) == 2
        assert sentence in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        weights.read(place / "int8", "int8")


def refused(folder, *sentences):
    with pytest.raises(DataError) as e:
        weights.read(folder)
    assert all(sentence in str(e.value) for sentence in sentences) and "\n" not in str(e.value), str(e.value)


def test_scales_that_are_none(folder):
    good = load_file(folder / "model.safetensors")
    scale = good[UP + "_scale"]
    tensors(folder, **{UP + "_scale": ...})
    refused(folder, f"missing: {UP}_scale")
    for number in (np.nan, np.inf, -np.inf, -1e-9):
        worst = scale.copy()
        worst[5] = number
        tensors(folder, **{UP + "_scale": worst})
        refused(folder, f"tensor {UP}_scale holds a number that is no scale", str(folder))
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(DataError, match="_scale holds a number that is no scale"):
                weights.read(folder, dtype)
    for wrong in (scale[:-1], scale[:, None], scale[:1]):
        tensors(folder, **{UP + "_scale": np.ascontiguousarray(wrong)})
        refused(folder, f"tensor {UP}_scale has shape {list(wrong.shape)}", f"gives it {list(scale.shape)}")
    tensors(folder, **{UP + "_scale": scale.astype(np.float16)})
    refused(folder, f"tensor {UP}_scale is F16; expected one of F32")
    tensors(folder, **{UP + "_scale": np.full_like(scale, 3e38)})
    weights.read(folder)  # as it is stored
    with pytest.raises(DataError, match=f"tensor {UP} holds NaN or infinity"):
        weights.read(folder, "float32")
    tensors(folder, **{UP + "_scale": scale, UP: np.full_like(good[UP], -128)})
    assert np.array_equal(weights.load(folder).layers.up[1][0], -128 * scale)


def test_tensors_that_are_none(folder):
    good = load_file(folder / "model.safetensors")
    tensors(folder, **{UP: good[UP].astype(np.float32)})
    refused(folder, f"tensor {UP} is F32; expected one of I8")
    tensors(folder, **{UP: np.ascontiguousarray(good[UP].T)})
    refused(folder, f"tensor {UP} has shape")
    tensors(folder, **{UP: good[UP], EMBED: good[EMBED].astype(np.float32)})
    refused(folder, f"tensor {EMBED} is F32; expected one of BF16")
    tensors(folder, **{EMBED: good[EMBED], "model.norm.weight_scale": np.ones(1, np.float32)})
    refused(folder, "not expected: model.norm.weight_scale")
    tensors(folder, **{"model.norm.weight_scale": ..., hf.HEAD: good[EMBED]})
    assert np.array_equal(weights.load(folder).embed, good[EMBED])
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (whole[:-5], whole[: len(whole) // 2], whole[:6], b""):
        (folder / "model.safetensors").write_bytes(cut)
        refused(folder, "no sound safetensors file")


@pytest.mark.parametrize(
    "said, sentence",
    [
        (..., "is I8, but config.json has no quantization_config of smoljax's"),
        (None, "is I8, but config.json has no quantization_config of smoljax's"),
        ({"quant_method": "gptq", "bits": 4}, 'quantization_config is {"quant_method": "gptq"'),
        ({"format": "smoljax-int9"}, "quantization_config is"),
        ({"format": "smoljax-int8"}, "smoljax knows"),
        ({"bits": 4}, "smoljax knows"),
        ({"bits": True}, "smoljax knows"),
        ({"embedding": 1}, "smoljax knows"),
        ({"more": 1}, "smoljax knows"),
        ({"embedding": True}, f"missing: {EMBED}_scale"),
        (["smoljax-int8"], "quantization_config is"),
    ],
    ids=str,
)
def test_other_quantizations(folder, said, sentence):
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]
    if isinstance(said, dict) and not said.keys() & {"format", "quant_method"}:
        said = ours | said
    edit(folder, quantization_config=said)
    refused(folder, sentence)


def test_what_says_int8_and_is_not(place, tmp_path):
    ours = json.loads((place / "int8" / "config.json").read_text())["quantization_config"]
    hf.save(tmp_path / "f32", make(), CONFIG)
    edit(tmp_path / "f32", quantization_config=ours)
    refused(tmp_path / "f32", "missing: model.layers.0.mlp.down_proj.weight_scale")


def test_transformers_refuses_it(place):
    """transformers 5 passes over a quant_method that it does not know, and computes with whole numbers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        for how in ({}, {"dtype": "float32"}):
            with pytest.raises(ValueError, match=re.escape("has no `quant_method`")):
                kind.from_pretrained(place / "int8", **how)
