"""Checkpoints by name: what is kept, what is read back, and what a damaged one says. test_pretrain.py kills runs."""

import dataclasses
import shutil
import subprocess
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from smoljax import checkpoint, committed, sharding, sums
from smoljax.config import Mesh, Model, Optim, Train
from smoljax.errors import CheckpointError
from smoljax.step import abstract_state, init_state

CONFIG = Train(model=Model(32, 64, 2, 4, 2, 8, vocab_size=100), steps=10, optim=Optim(warmup_steps=0))


@pytest.fixture(scope="module")
def state():
    return jax.jit(partial(init_state, CONFIG))()


@pytest.fixture(scope="module")
def trained(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with checkpoint.Checkpoints(folder, keep=2, keep_every=3) as saved:
        for step in range(1, 9):
            moved = dataclasses.replace(state, model=jax.tree.map(lambda w, s=step: w + s, state.model))
            saved.save(step, {"model": dataclasses.asdict(CONFIG.model)}, **checkpoint.parts(moved))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_newest_and_every_third_are_kept(run):
    assert committed.steps(run) == [3, 6, 7, 8]


def test_a_state_is_restored_bit_for_bit_on_another_mesh(run, state):
    mesh = sharding.mesh(Mesh(fsdp=4, tensor=2))
    abstract = abstract_state(CONFIG)
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
    with pytest.raises(CheckpointError, match=r"checkpoints/8/model/\S+ is missing"):
        checkpoint.load_model(run)
    (run / "checkpoints/8/SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/8 (cannot be read|is damaged)"):
        checkpoint.load_model(run)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")


def test_sums_are_those_of_sha256sum(run):
    for step in (3, 6, 7, 8):
        folder = run / "checkpoints" / str(step)
        listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        assert listed == {p.relative_to(folder).as_posix() for p in files_of(folder)}
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_one_flipped_byte_of_any_file_is_found_and_the_one_before_is_used(run, capsys):
    newest = run / "checkpoints/8"
    for i, file in enumerate(files_of(newest)):
        whole = file.read_bytes()
        at = len(whole) * i // len(files_of(newest)) if whole else 0
        broken = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] if whole else b"x"
        for damaged in (broken, whole[:-1] or b"x"):  # flipped, truncated
            file.write_bytes(damaged)
            assert f"{file} has changed" in sums.damage(newest)
        file.write_bytes(whole)
        assert sums.damage(newest) is None
    file.write_bytes(b"no")
    assert committed.newest_sound(run) == 7
    assert f"checkpoint 8 is damaged: {file} has changed" in capsys.readouterr().err
    assert committed.steps(run) == [3, 6, 7] and files_of(run / "damaged/8")


def test_damage_that_is_no_flipped_byte(run):
    folder = run / "checkpoints/8"
    (folder / "model/more").write_text("")
    assert "model/more is not listed" in sums.damage(folder)
    (folder / "model/more").unlink()
    text = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(text[: len(text) // 2])
    assert sums.damage(folder) is not None
    (folder / "SHA256SUMS").write_text("cut")
    assert "SHA256SUMS is damaged itself" in sums.damage(folder)


@pytest.mark.parametrize("sums_too", [False, True])
def test_a_checkpoint_that_lost_its_mark_is_damaged_too(run, capsys, sums_too):
    """Orbax writes the mark before it renames: a folder with a number and without it was sound once."""
    for step in (8, 7, 6, 3):
        (run / f"checkpoints/{step}/commit_success.txt").unlink()
        if sums_too:
            (run / f"checkpoints/{step}/SHA256SUMS").unlink()
        if step == 8:
            assert committed.newest_sound(run) == 7
            assert "checkpoint 8 is damaged" in (err := capsys.readouterr().err) and "commit_success.txt" in err
            assert committed.written(run) == [3, 6, 7] and files_of(run / "damaged/8")
    with pytest.raises(CheckpointError, match="all checkpoints of .* are damaged"):
        committed.newest_sound(run)
    assert committed.has_begun(run) and not committed.written(run)


def test_when_all_are_damaged_nothing_starts_afresh(run):
    for step in committed.steps(run):
        files_of(run / "checkpoints" / str(step))[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="all checkpoints of .* are damaged"):
        committed.newest_sound(run)
    with pytest.raises(CheckpointError, match="all checkpoints of .* are damaged"):  # nor when asked again
        committed.newest_sound(run)


def test_a_failed_save_is_known_a_step_later_and_the_second_in_a_row_is_an_error(tmp_path, state, monkeypatch, capsys):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    parts, metadata = checkpoint.parts(state), {"model": dataclasses.asdict(CONFIG.model)}
    with checkpoint.Checkpoints(tmp_path, keep=5, failures=2) as saved:
        saved.save(1, metadata, **parts)
        saved.wait()
        monkeypatch.setattr(sums, "write", full)
        for step in (2, 3):
            saved.save(step, metadata, **parts)
            saved.wait() if step == 2 else None
            if step == 2:
                assert "checkpoint 2 could not be written" in (err := capsys.readouterr().err)
                assert "No space left on device" in err and "checkpoint 1 stands" in err
        with pytest.raises(CheckpointError, match="checkpoint 3 could not be written"):
            saved.wait()
        monkeypatch.undo()
        saved.save(4, metadata, **parts)
    assert committed.newest_sound(tmp_path) == 4


def test_cleaning_up_touches_only_what_a_save_left(run, state):
    left = run / "checkpoints/9.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints/8", left)
    mine = [run / "checkpoints/notes.txt", run / "checkpoints/mine.tmp/x", run / "mine/9.orbax-checkpoint-tmp"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    with checkpoint.Checkpoints(run, keep=9) as saved:
        saved.save(10, {"model": dataclasses.asdict(CONFIG.model)}, **checkpoint.parts(state))
    assert not left.exists() and all(file.read_text() == "mine" for file in mine)
    assert committed.steps(run) == [3, 6, 7, 8, 10]
