"""`smoljax convert`: every route, exact where it can be, proven by --verify, and whole or absent."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from test_hf import cast, same, train_tokenizer
from test_model import CONFIG, SHAPES, make

from infer import convert
from smoljax import gguf, hf, weights
from smoljax.config import Model
from smoljax.errors import CheckpointError, DataError, UsageError

# Nobody published these: odd head counts and sizes, a head that is not hidden / heads, no grouping at all.
ODD = {
    "7 heads, 1 key head": Model(56, 104, 2, 7, 1, 8, vocab_size=300),
    "head of 10": Model(96, 160, 3, 6, 2, 10, vocab_size=311, rms_norm_eps=1e-6, rope_theta=500_000.0, pad_token_id=2),
    "one head": Model(32, 64, 1, 1, 1, 64, vocab_size=300, eos_token_id=2, bos_token_id=1),
}


def saved(folder, config=CONFIG, dtype="float32"):
    """A Hugging Face folder with all that may lie in one."""
    words = folder.parent / "words"
    words.mkdir(exist_ok=True)
    train_tokenizer(words / "tokenizer.json")
    (words / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    model = cast(make(config), dtype)
    hf.save(folder, model, config, tokenizer=words)
    return model


QUICK = ("smollm2-135m", "smollm-1.7b", *ODD)  # the others' shapes are alike: `make test-slow`


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SHAPES if n not in QUICK)])
def test_round_and_back(name, tmp_path, capsys):
    """Hugging Face -> Orbax -> GGUF -> Hugging Face in many files -> Hugging Face: the first folder, byte for byte."""
    config = (SHAPES | ODD)[name]
    model = saved(tmp_path / "a", config)
    a, b, c, d, e = (str(tmp_path / x) for x in "abcde")
    convert.main([a, b, "--to", "orbax"])
    convert.main([b, c, "--to", "gguf"])
    convert.main([c, d, "--to", "hf", "--max-file-size", str(config.parameters / 1e9)])  # a quarter in each
    convert.main([d, e, "--to", "hf"])
    assert "no tokenizer" not in capsys.readouterr().err and len(list((tmp_path / "d").glob("model-*"))) > 3
    for middle in (b, c, d, f"{b}/checkpoints/0", f"{c}/c-F32.gguf"):
        found = weights.read(middle)
        # GGUF has no key for initializer_range.
        assert found.config == dataclasses.replace(config, initializer_range=found.config.initializer_range)
        assert same(found.model, model)
        assert found.tokenizer.to_str() == weights.load_tokenizer(a).to_str()
    for file in ("model.safetensors", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "e" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["hf", "orbax", "gguf"])
def test_verify(to, dtype, tmp_path, capsys):
    saved(tmp_path / "a", dtype=dtype)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", to, "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "b" / "conversion.json").read_text())
    count = 2 + 9 * CONFIG.num_hidden_layers
    assert report["dtype"] == dtype
    assert report["tensors"] == {"count": count, "exact": count, "largest_difference": 0}
    assert report["logits"]["largest_difference"] == 0 and report["logits"]["tokens"] > 50
    assert report["loss"]["source"] == report["loss"]["written"] > 1
    listed = (tmp_path / "b" / "SHA256SUMS").read_text()
    assert "conversion.json" in listed and ("b-" if to == "gguf" else "tokenizer.json") in listed
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "b", check=True)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_verify_by_transformers(to, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    saved(tmp_path / "a")
    convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", to, "--verify", "--json"])
    theirs = json.loads(capsys.readouterr().out)["transformers"]
    assert 0 < theirs["largest_difference"] < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "q8_0", "q4_0"])
def test_verify_where_numbers_are_rounded(dtype, tmp_path, capsys):
    config = Model(96, 192, 2, 6, 3, 8, vocab_size=300)  # rows of 96 and 192 numbers, but of 48 for o: no whole blocks
    saved(tmp_path / "a", config)
    convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "gguf", "--dtype", dtype, "--verify", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == dtype and report["bits"] == "rounded" and 0 < report["logits"]["largest_difference"]
    if dtype in ("bfloat16", "float16"):
        assert report["tensors"]["exact"] == report["tensors"]["count"]  # the source's, rounded
    else:
        assert 0 < report["tensors"]["largest_difference"] < 0.2
        assert report["tensors"]["exact"] == 1 + 2 * 2 + 2  # the norms, and o, which is F16 as said


@pytest.mark.parametrize("damage", ["layout", "one number", "zero", "swap", "theta", "tokenizer", "template"])
def test_verify_finds_what_is_wrong(damage, tmp_path, monkeypatch):
    """A wrong rotary layout above all; nothing stays behind."""
    model = saved(tmp_path / "a")
    if damage == "zero":
        model.layers.up.set_value(model.layers.up[...].at[1, 4, 3].set(0.0))
        (tmp_path / "a").rename(tmp_path / "words" / "a")
        hf.save(tmp_path / "a", model, CONFIG, tokenizer=tmp_path / "words")
    source = hf.open_source(tmp_path / "a")

    def get(name):
        tensor = np.array(source.get(name))
        if damage == "layout" and "q_proj" in name:
            tensor = gguf.permute(tensor, CONFIG.num_attention_heads)
        if damage == "one number" and name.endswith("layers.2.mlp.up_proj.weight"):
            tensor[3, 4] = np.nextafter(tensor[3, 4], 9)
        if damage == "zero" and name.endswith("layers.1.mlp.up_proj.weight"):
            tensor[3, 4] = -0.0
        if damage == "swap":
            other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            for one, two in other.items():
                if one in name:
                    return np.array(source.get(name.replace(one, two)))
        return tensor

    config = dataclasses.replace(CONFIG, rope_theta=10_000.0) if damage == "theta" else CONFIG
    files = dict(source.files)
    if damage == "tokenizer":  # what transformers 5 makes of SmolLM's: no Digits step
        spec = json.loads(files["tokenizer.json"])
        spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
        files["tokenizer.json"] = json.dumps(spec).encode()
    if damage == "template":
        files["chat_template.jinja"] = b"{{ messages }}"
    wrong = dataclasses.replace(source, get=get, config=config, files=files)
    writer = hf.write
    monkeypatch.setattr(hf, "write", lambda folder, _, *rest: writer(folder, wrong, *rest))
    sentence = {"theta": "rope_theta was 100000", "tokenizer": "another tokenizer", "template": "another chat template"}
    sentence = sentence.get(damage, "tensor model.layers.*differs")
    with pytest.raises(DataError, match=sentence):
        convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hf", "--verify"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "words"]


def test_verify_finds_a_gguf_that_llama_cpp_would_read_wrongly(tmp_path, monkeypatch):
    """q and k left as they are on the way out and on the way in: we read it back well, transformers does not."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    saved(tmp_path / "a")
    monkeypatch.setattr(gguf, "permute", lambda tensor, heads: tensor)
    with pytest.raises(DataError, match="differ"):
        convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "gguf", "--verify"])
    monkeypatch.setattr(gguf, "unpermute", lambda tensor, heads: tensor)
    with pytest.raises(DataError, match="transformers' logits differ from ours by up to"):
        convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "gguf", "--verify"])


def test_what_it_says(tmp_path, capsys):
    hf.save(tmp_path / "bare", make(), CONFIG)
    assert convert.main([str(tmp_path / "bare"), str(tmp_path / "half"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert f"{CONFIG.parameters:,} parameters in bfloat16, bare -> hf" in out and "has no tokenizer.json" in err
    assert same(weights.read(tmp_path / "half").model, cast(make(), "bfloat16"))
    assert weights.read(tmp_path / "half").tokenizer is None
    with pytest.raises(DataError, match="tokenizer"):
        weights.load_tokenizer(tmp_path / "half")
    with pytest.raises(UsageError, match="exists already"):
        convert.main([str(tmp_path / "bare"), str(tmp_path / "half"), "--to", "orbax"])
    for flags, sentence in [
        (["--to", "hf", "--dtype", "q8_0"], "--dtype q8_0 is for --to gguf"),
        (["--to", "gguf", "--max-file-size", "1"], "--max-file-size is for --to hf"),
        (["--to", "hf", "--max-file-size", "-1"], "more than 0"),
        (["--to", "hf", "--max-file-size", "inf"], "--max-file-size is inf"),
        (["--to", "hf", "--private"], "--private is for --push"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            convert.main([str(tmp_path / "bare"), str(tmp_path / "new"), *flags])
    with pytest.raises(DataError, match="tokenizer"):
        convert.main([str(tmp_path / "bare"), str(tmp_path / "new"), "--to", "gguf"])
    with pytest.raises(UsageError, match="it is a folder"):
        convert.main([str(tmp_path / "bare"), str(tmp_path / "new.gguf"), "--to", "gguf"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "half"]


def test_what_is_no_model(tmp_path):
    with pytest.raises(UsageError, match="there is no .*nowhere; expected a run"):
        weights.read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a run"):
        weights.read(tmp_path)
    for name, sentence in [("a.safetensors", "expected its folder"), ("a.bin", "never opened"), ("a.txt", "is a file")]:
        (tmp_path / name).write_bytes(b"1")
        with pytest.raises(UsageError, match=sentence):
            weights.read(tmp_path / name)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.gguf").write_bytes(b"1")
    (tmp_path / "b.gguf").write_bytes(b"1")
    with pytest.raises(UsageError, match="holds 2 GGUF files; name one: a.gguf, b.gguf"):
        weights.read(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError):
        weights.read(tmp_path / "run")


MEMORY = """
import json, sys
from infer import convert
from smoljax import weights
convert.main([sys.argv[1], sys.argv[2], "--to", *sys.argv[3:], "--json"])
"""


def peak(*arguments) -> int:
    """MB that a conversion took, in a process of its own."""
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["peak_memory_mb"]


@pytest.mark.slow
def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """A bf16 model of 400 MB, its largest tensor 50 MB, costs less than twice that beyond a tiny model's conversion."""
    saved(tmp_path / "tiny")
    write_zeros(tmp_path / "big", Model(512, 8192, 14, 8, 8, 64, vocab_size=49152))
    base = peak(tmp_path / "tiny", tmp_path / "tiny-hf", "hf")
    assert peak(tmp_path / "big", tmp_path / "big-hf", "hf") < base + 100
    assert peak(tmp_path / "big", tmp_path / "big-8", "hf", "--dtype", "int8", "--int8-embedding") < base + 120
    assert peak(tmp_path / "big-8", tmp_path / "big-8-again", "hf") < base + 100


def write_zeros(folder, config):
    """A folder of zeros in bf16, of any size in no time: a sparse file."""
    from smoljax import exchange, tensors

    small = dataclasses.replace(config, num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=300)
    hf.save(folder, make(small), small)
    keys = json.loads((folder / "config.json").read_text()) | dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps(keys | {"rope_parameters": None}))
    header, end = {}, 0
    for name, shape in exchange.shapes(config).items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert tensors.open_file(folder / "model.safetensors").size == end
