"""What a run of one process does when something goes wrong: kills, signals, bad numbers, a full disk, a step that hangs.

Faults come in through the fed batches: `python tests/test_faults.py FAULTS ARGS...` is `smoljax pretrain ARGS...` with
the faults of a JSON object, {"kill": 5, "bad": [3]}, for what ends a process.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus
import jax
import numpy as np
import pytest
import test_pretrain as whole

from smoljax import checkpoint, data, dumps, errors, metrics, processes, watch
from train import pretrain, replay

V = 64
CONFIG = """
from smoljax.config import Data, Guard, Model, Optim, Stage, Train

config = Train(
    model=Model(48, 96, 2, 4, 2, head_dim=12, vocab_size=64, max_position_embeddings=32),
    steps=14,
    data=Data(seq_len=16, batch_size=16, mask_documents=True),
    optim=Optim(lr=1e-2, warmup_steps=2, decay_steps=4),
    guard=Guard(spike_window=3, spike_sigma=1.0, max_skips=9),
    stages=[Stage(start=7, seq_len=32, batch_size=16, rope_theta=1e5)],
    accumulate=2,
    save_every=2,
    keep=3,
    init_std=0.1,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "tiny.py").write_text(CONFIG)
    corpus.write(folder / "shards", corpus.documents(400, V), V)
    return folder


def words(place, name, *settings):
    return [str(place / "tiny.py"), f"data.sources={place / 'shards'}", f"run={place / name}", *settings]


def faulty(feed, kill=None, bad=(), signals=(), block=None, last=None):
    """data.batches with faults before batch number n (from 1): what a machine, a scheduler or a disk does."""

    def batches(rows, start, stop, sharding):
        for n, batch in enumerate(feed(rows, start, stop, sharding), start + 1):
            if n == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            for at, number in signals:
                if n == at:
                    os.kill(os.getpid(), number)
            if n == block:
                time.sleep(3600)
            if n in bad:  # an id outside the vocabulary, which no check on disk can see any more
                batch = batch | {"tokens": batch["tokens"].at[3, 5].set(V + 1)}
            yield batch

    return batches


def child(faults, *argv, devices=8, **kw):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    env |= {"PYTHONPATH": str(whole.ROOT)}
    command = [sys.executable, __file__, json.dumps(faults), *argv]
    kw = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | kw
    return subprocess.run(command, env=env, cwd=whole.ROOT, text=True, **kw)


def run(monkeypatch, argv, **faults):
    """`smoljax pretrain` here, with faults: its exit code."""
    with monkeypatch.context() as patch:
        patch.setattr(data, "batches", faulty(data.batches, **faults))
        return errors.run(pretrain.main, argv)


TIMES = ("tokens_per_sec", "_s", "rss_gb", "mfu")


def records(folder):
    """The records of a run without what a clock says."""
    return [{k: v for k, v in r.items() if not k.endswith((*TIMES, "per_device"))} for r in metrics.read(folder)]


def assert_same_run(one, other, step):
    a, b = (whole.arrays(folder, step) for folder in (one, other))
    assert a.keys() == b.keys() and {"model.layers.q", "opt.1.mu.embed", "guard.in_a_row"} < a.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert records(one) == records(other)
    assert [r["step"] for r in records(one)] == list(range(1, step + 1))


# ---- kill -9


@pytest.fixture(scope="module")
def uninterrupted(place):
    """One bad batch in each stage, and spikes as the noise has them."""
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, words(place, "uninterrupted", "keep=99"), bad=BAD) == 0
    return place / "uninterrupted"


BAD = [4, 11]


def test_killed_on_both_sides_of_a_stage_equals_uninterrupted_bit_for_bit(place, uninterrupted, monkeypatch):
    rng = np.random.default_rng(0)
    kills = [int(rng.integers(3, 8)), 8, int(rng.integers(9, 15))]  # within each stage, and where the second begins
    for kill in kills:
        ended = child({"kill": kill, "bad": BAD}, *words(place, "killed", "keep=99"))
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert run(monkeypatch, words(place, "killed", "keep=99"), bad=BAD) == 0
    assert_same_run(uninterrupted, place / "killed", 14)
    last = records(uninterrupted)[-1]
    assert last["train/skipped_steps"] > 2  # a spike beside the two bad batches: there was something to remember
    assert last["train/tokens"] == 7 * 16 * 16 + 7 * 16 * 32
    assert last["data/tokens"] == {str(place / "shards"): last["train/tokens"]}


# ---- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(place, uninterrupted, monkeypatch, capsys, number, code):
    argv = words(place, f"signal-{number}", "keep=99", "save_every=100")
    assert run(monkeypatch, argv, bad=BAD, signals=[(5, number)]) == code
    err = capsys.readouterr().err
    saved = checkpoint.steps(place / f"signal-{number}")[-1]
    assert 5 <= saved <= 7 and err.count("Traceback") == 0
    assert f"smoljax: {signal.Signals(number).name} came; step {saved} is saved, the same command goes on" in err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was
    assert run(monkeypatch, argv, bad=BAD) == 0
    assert_same_run(uninterrupted, place / f"signal-{number}", 14)


def test_a_second_signal_ends_at_once(place):
    faults = {"signals": [[4, signal.SIGTERM], [4, signal.SIGINT]]}
    ended = child(faults, *words(place, "twice", "save_every=100"))
    assert ended.returncode == 130 and "a second signal stops at once" in ended.stderr
    assert checkpoint.steps(place / "twice") == []


# ---- a disk that is full


def test_a_save_that_fails_as_the_last_one_is_no_success(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "checkpoints")

    for name, faults in {"last": {}, "signalled": {"signals": [(3, signal.SIGTERM)]}}.items():
        argv = words(place, f"full-{name}", "save_every=100", "stages=[]", "steps=7")
        with monkeypatch.context() as patch:
            patch.setattr("orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async", full)
            code = run(monkeypatch, argv, **faults)
        err = capsys.readouterr().err
        assert code == 4 and "No space left on device" in err and "is saved" not in err, (name, code, err)


if __name__ == "__main__":
    data.batches = faulty(data.batches, **json.loads(sys.argv[1]))
    raise SystemExit(errors.run(pretrain.main, sys.argv[2:]))
