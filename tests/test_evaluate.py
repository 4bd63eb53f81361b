"""`smoljax evaluate` against a loss computed by hand, and its mistakes."""

import json

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import convert
from smoljax import checkpoint, weights
from smoljax.errors import run
from train import evaluate, pretrain

V, T = 64, 160
CONFIG = f"""
from smoljax.config import Data, Model, Optim, Train

config = Train(
    model=Model(48, 96, 2, 4, 2, head_dim=12, vocab_size={V}, max_position_embeddings={T}),
    steps=2, data=Data(seq_len={T}, batch_size=8), optim=Optim(warmup_steps=1), init_std=0.1,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.py").write_text(CONFIG)
    corpus.write(folder / "shards", corpus.documents(60, V), V)
    pretrain.main([str(folder / "tiny.py"), f"data.sources={folder / 'shards'}", f"run={folder / 'run'}"])
    return folder


def by_hand(model, stream):
    """Nats of each next token, window by window, and their positions."""
    nats, positions = [], []
    for start in range(0, len(stream) - 1, T):
        ids = np.array(stream[start : start + T + 1])
        logits = np.asarray(model(jnp.asarray(ids[None, :-1])), np.float64)[0]
        logits -= logits.max(-1, keepdims=True)
        nats += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]).tolist()
        positions += range(len(ids) - 1)
    return np.array(nats), np.array(positions)


def test_loss_perplexity_bits_and_positions_are_those_computed_by_hand(place, capsys):
    capsys.readouterr()
    assert evaluate.main([str(place / "run"), "--data", str(place / "shards"), "--batch-size", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stream = [t for d in corpus.documents(60, V) for t in d]
    nats, positions = by_hand(weights.load(place / "run"), stream)
    assert found["tokens"] == len(stream) - 1 == len(nats)
    assert found["loss"] == pytest.approx(nats.mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-5)
    size = sum(corpus.length(t) for t in stream[1:])  # the first token is predicted by nobody
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / size, abs=1e-5)
    assert list(found["loss_by_position"]) == ["0-127", "128-159"]
    for name, part in (("0-127", positions < 128), ("128-159", positions >= 128)):
        assert found["loss_by_position"][name] == pytest.approx(nats[part].mean(), abs=1e-5)


def test_a_part_of_the_tokens_and_longer_windows(place, capsys):
    argv = [str(place / "run"), "--data", str(place / "shards")]
    assert evaluate.main([*argv, "--max-tokens", "300", "--json"]) == 0  # two windows
    found = json.loads(capsys.readouterr().out)
    stream = [t for d in corpus.documents(60, V) for t in d][: 2 * T + 1]
    nats, _ = by_hand(weights.load(place / "run"), stream)
    assert found["tokens"] == 2 * T and found["loss"] == pytest.approx(nats.mean(), abs=1e-5)
    size = sum(corpus.length(t) for t in stream[1:])
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / size, abs=1e-5)

    assert evaluate.main([*argv, "--mask-documents"]) == 0
    out = capsys.readouterr().out
    first = len(corpus.documents(60, V))  # a document's first token is predicted by nobody
    tokens = sum(map(len, corpus.documents(60, V)))
    assert f"nats per token, over {tokens - first:,} tokens" in out and "bits per byte" in out and "0-127" in out
    assert evaluate.main([*argv, "--seq-len", "512", "--json"]) == 0
    captured = capsys.readouterr()
    assert "beyond the model's 160 positions" in captured.err
    assert list(json.loads(captured.out)["loss_by_position"]) == ["0-127", "128-255", "256-511"]


@pytest.mark.slow
def test_every_kind_of_model_gives_the_same_loss(place, capsys, tmp_path):
    assert convert.main([str(place / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert convert.main([str(place / "run"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    found = []
    for model in (place / "run", place / "run/checkpoints/2", tmp_path / "hf", tmp_path / "orbax"):
        capsys.readouterr()
        assert evaluate.main([str(model), "--data", str(place / "shards"), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    assert found == [found[0]] * 4
    assert evaluate.main([str(place / "run"), "--data", str(place / "shards"), "--json", "--dtype", "bfloat16"]) == 0
    assert 0 < abs(json.loads(capsys.readouterr().out)["loss"] - found[0]) < 0.01


def test_mistakes_are_one_sentence(place, capsys, tmp_path):
    other = corpus.write(tmp_path / "other", corpus.documents(9, 60), 60)
    ends = corpus.write(tmp_path / "ends", [[0]] * 400, V)
    for argv, code, sentence in [
        ([place / "run", "--data", other], 3, "another tokenizer than the model's"),
        ([place / "run", "--data", tmp_path / "none"], 3, "no shards at"),
        ([tmp_path / "none", "--data", other], 2, "there is no"),
        ([place / "run", "--data", place / "shards", "--seq-len", 0], 2, "--seq-len is 0"),
        ([place / "run", "--data", ends, "--mask-documents"], 3, "no token is predicted here"),
    ]:
        capsys.readouterr()
        assert run(evaluate.main, [str(a) for a in argv]) == code
        err = capsys.readouterr().err.strip()
        assert sentence in err and err.count("\n") == 0, err


def test_weights_that_are_not_finite_are_refused(place, tmp_path, capsys):
    found = weights.read(place / "run")
    broken = jax.tree.map(lambda w: w * float("nan"), found.model)
    checkpoint.save_model(tmp_path / "model", broken, found.config)
    assert run(evaluate.main, [str(tmp_path / "model"), "--data", str(place / "shards")]) == 3
    assert "the loss is nan: the model's weights are not finite" in capsys.readouterr().err
