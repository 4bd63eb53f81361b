"""SmolLM2-135M-Instruct's own weights (4-bit, 92 MB, fetched once into the cache): what a user sees is what is right.

tests/data/greedy_fp32.json holds transformers' greedy answers on the same dequantised weights in f32, and
tests/data/tokenizer_vectors.json ids that llama.cpp's tokenizer gives.
"""

import argparse
import decimal
import doctest
import functools
import heapq
import importlib.util
import json
import optparse
import os
import pydoc_data.topics
import statistics
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import forward

import smoljax
from infer import convert, generate
from smoljax import chat, decode, fetch, layout, weights
from smoljax.errors import Error
from smoljax.template import Template

NAME = "smollm2-135m-instruct"
DATA = Path(__file__).parent / "data"
VECTORS = json.loads((DATA / "tokenizer_vectors.json").read_text())
ANSWERS = json.loads((DATA / "greedy_fp32.json").read_text())


@pytest.fixture(scope="module")
def path():
    try:
        return fetch.fetch(NAME)
    except Error as e:
        pytest.skip(f"THE REAL WEIGHTS WERE NOT TESTED: {e}")


@pytest.fixture(scope="module")
def real(path):
    return weights.read(NAME)


def code_and_prose() -> str:
    """200 kB: code of Python's own library, and the prose of its reference."""
    code = Path(statistics.__file__).read_text() + Path(json.decoder.__file__).read_text()
    prose = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    return (code + prose)[:200_000]


def test_what_it_is(real):
    c = real.config
    assert c.parameters == 134_515_008 and real.dtype == "float32"
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads) == (576, 30, 9, 3)
    assert (c.rope_theta, c.rms_norm_eps, c.max_position_embeddings, c.initializer_range) == (1e5, 1e-5, 8192, 1 / 24)
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_tokenizer(real, vector):
    assert real.tokenizer.encode(vector["text"]).ids == vector["ids"]


@pytest.mark.slow
def test_tokenizer_as_transformers(path, real):
    """transformers builds its tokenizer of a GGUF without the Digits step; with it, the ids are the same."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    text = code_and_prose()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    assert len(text) == 200_000
    assert real.tokenizer.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids
    theirs.pre_tokenizer = words
    assert real.tokenizer.encode(text).ids != theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.slow  # 90 s, transformers' reading of the file mostly
def test_logits_as_transformers(path, real):
    """Over a chat prompt and 2,048 tokens of code; transformers reads and dequantises the GGUF by itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    prompt = real.tokenizer.encode(ANSWERS[0]["rendered"]).ids
    code = real.tokenizer.encode(code_and_prose()).ids[:2048]
    for ids in (prompt, code):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        found = np.asarray(forward(real.model, np.array([ids])))[0]
        assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("new_tokens", [32, pytest.param(96, marks=pytest.mark.slow)])
def test_greedy_answers(real, new_tokens):
    """The smallest margin between the two likeliest tokens is 0.015 in these answers, a thousand times our error."""
    with Template(chat.pick(real.files, real.config)["default"], "the model's own template") as template:
        texts = [template.render([{"role": "user", "content": answer["prompt"]}]) for answer in ANSWERS]
    assert texts == [answer["rendered"] for answer in ANSWERS]
    found = smoljax.generate(real.model, [real.tokenizer.encode(text).ids for text in texts], max_new_tokens=new_tokens)
    for new, answer in zip(found, ANSWERS, strict=True):
        said = real.tokenizer.decode(new, skip_special_tokens=False)
        whole = len(new) < new_tokens or new_tokens == 96  # as many as the recorded answers have
        assert said == (answer["text"] if whole else answer["text"][: len(said)])


@pytest.mark.slow
def test_it_answers(path, capsys):
    assert generate.main([NAME, "--chat", "--prompt", "What is the capital of France?"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


@pytest.mark.slow
def test_through_every_format(path, real, tmp_path, capsys):
    """GGUF -> Hugging Face -> GGUF in f32 -> the same numbers, each proven, and the same answer."""
    hf, gguf = str(tmp_path / "hf"), str(tmp_path / "gguf")
    convert.main([NAME, hf, "--to", "hf", "--verify", "--json"])
    convert.main([hf, gguf, "--to", "gguf", "--verify", "--json"])
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(reports) == 2
    for report in reports:
        assert report["tensors"] == {"count": 272, "exact": 272, "largest_difference": 0}
        if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
            assert report["transformers"]["largest_difference"] < 1e-3
    for one, other in zip(jax.tree.leaves(weights.read(gguf).model), jax.tree.leaves(real.model), strict=True):
        assert np.array_equal(one, other)
    assert generate.main([gguf, "--chat", "--prompt", "What is the capital of France?"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_llama_cpp_gives_the_same_answers(real, tmp_path):
    """In F32, from the GGUF that we write; the smallest margin of these answers is 0.015, its error 1e-4."""
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip(
            "LLAMA.CPP WAS NOT ASKED: npm install --ignore-scripts node-llama-cpp@3.22.1 in a folder, and set LLAMA_CPP"
        )
    convert.main([NAME, str(tmp_path / "gguf"), "--to", "gguf"])
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    command = ["node", DATA.parent / "llama_cpp.mjs", folder, file, DATA / "greedy_fp32.json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for line, answer in zip(map(json.loads, lines), ANSWERS, strict=True):
        assert line["prompt"] == real.tokenizer.encode(answer["rendered"]).ids
        assert real.tokenizer.decode(line["answer"], skip_special_tokens=False) == answer["text"]


# ---- int8

TEXTS = {
    "code": lambda: Path(statistics.__file__).read_text(),
    "reference": lambda: "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)),
    "docstrings": lambda: "\n".join(
        m.__doc__ for m in (argparse, doctest, heapq, decimal, optparse, json, json.encoder)
    ),
}


@functools.partial(jax.jit, static_argnames="dtype")
def nats_and_greedy(model, ids, dtype):
    """The loss of each next token, and the token that greedy decoding would take: through a cache of this dtype."""
    T = len(ids) - 1
    cache = [decode.Cache.zeros(model.config, 1, T, dtype) for _ in range(model.config.num_hidden_layers)]
    x, _ = decode.trunk(model, ids[None, :-1], None, jnp.arange(T)[None], cache)
    logits = decode.head(model, x)[0]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], axis=-1)[:, 0], logits.argmax(-1)


@pytest.mark.slow
def test_int8_perplexity(real, tmp_path, capsys):
    """Within 1% of f32's on each of three texts, as written, read and laid out; by weights, cache, and both."""
    models = {"float32": real.model}
    for name, flags in {"int8": [], "int8 embedding": ["--int8-embedding"]}.items():
        convert.main([NAME, str(tmp_path / name), "--dtype", "int8", *flags])
        models[name] = weights.load(tmp_path / name)
    models = {name: layout.lay_out(model, "float32", 1) for name, model in models.items()}
    ways = [
        ("float32", "float32"),
        ("float32", "int8"),
        ("int8", "float32"),
        ("int8", "int8"),
        ("int8 embedding", "int8"),
    ]
    said = []
    for text, read in TEXTS.items():
        ids = np.array(real.tokenizer.encode(read()).ids[:1025], np.int32)
        assert len(ids) == 1025
        (nats, greedy), *found = [jax.device_get(nats_and_greedy(models[name], ids, cache)) for name, cache in ways]
        for (name, cache), (its, tokens) in zip(ways[1:], found, strict=True):
            ratio, agreement = float(np.exp(its.mean() - nats.mean())), float((tokens == greedy).mean())
            what = f"{text}: {name} weights, {cache} cache"
            said.append(f"{what}: perplexity x {ratio:.4f} of {np.exp(nats.mean()):.2f}, {agreement:.1%} greedy")
            assert abs(ratio - 1) < 0.01 and 0.9 < agreement < 1, said
    with capsys.disabled():
        print("", *said, sep="\n")
