"""Checkpoints by name: what is kept, what is read back, and what a damaged one says. test_pretrain.py kills runs."""

import dataclasses
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from smoljax import checkpoint, sharding
from smoljax.config import Mesh, Model, Optim, Train
from smoljax.errors import CheckpointError
from smoljax.step import init_state

CONFIG = Train(model=Model(32, 64, 2, 4, 2, 8, vocab_size=100), steps=10, optim=Optim(warmup_steps=0))


@pytest.fixture(scope="module")
def state():
    return jax.jit(partial(init_state, CONFIG))()


@pytest.fixture
def run(tmp_path, state):
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=3) as saved:
        for step in range(1, 9):
            moved = dataclasses.replace(state, model=jax.tree.map(lambda w, s=step: w + s, state.model))
            saved.save(step, {"config": dataclasses.asdict(CONFIG)}, model=moved.model, opt=moved.opt_state)
    return tmp_path


def test_the_newest_and_every_third_are_kept(run):
    assert checkpoint.steps(run) == [3, 6, 7, 8]


def test_a_state_is_restored_bit_for_bit_on_another_mesh(run, state):
    mesh = sharding.mesh(Mesh(fsdp=4, tensor=2))
    abstract = jax.eval_shape(partial(init_state, CONFIG))
    with checkpoint.Checkpoints(run) as saved:
        found = saved.restore(7, abstract, sharding.shardings(abstract, mesh))
        assert saved.metadata(7)["versions"]["jax"] == jax.__version__
    assert int(found.step) == 7 and "fsdp" in str(found.model.layers.gate.sharding.spec)
    for a, b in zip(jax.tree.leaves(found.model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_array_equal(a, b + 7)
    assert jax.tree.structure(found) == jax.tree.structure(state)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_model_alone_in_its_dtype_or_another(run, state, dtype):
    model, config, step = checkpoint.load_model(run / "checkpoints/6", dtype)
    assert (config, step, str(model.embed.dtype)) == (CONFIG.model, 6, dtype or "float32")
    expected = np.asarray(state.model.embed) + 6
    np.testing.assert_array_equal(model.embed, expected.astype(model.embed.dtype))
    assert checkpoint.load_model(run)[2] == 8


def test_weights_are_saved_in_the_dtype_that_they_have(tmp_path, state):
    half = jax.tree.map(lambda w: w.astype("bfloat16"), state.model)
    checkpoint.save_model(tmp_path / "weights", half, CONFIG.model)
    model, config, step = checkpoint.load_model(tmp_path / "weights")
    assert (config, step) == (CONFIG.model, 0)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(half), strict=True):
        assert a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint 5; it has \[3, 6, 7, 8\]"):
        checkpoint.load_model(run / "checkpoints/5")
    shutil.copytree(run / "checkpoints/8", run / "checkpoints/9.orbax-checkpoint-tmp")  # as a kill leaves it
    assert checkpoint.load_model(run)[2] == 8
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint yet"):
        checkpoint.load_model(tmp_path / "new")


def test_a_damaged_checkpoint_is_named(run):
    for folder in (run / "checkpoints/8/model").rglob("d"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"checkpoints/8 (cannot be read|is damaged)"):
        checkpoint.load_model(run)
