"""What a run of one process does when something goes wrong: kills, signals, bad numbers, full disks, hanging steps.

Faults come in through the fed batches, in a process of its own for what ends one.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import re
import resource
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import corpus
import jax
import numpy as np
import pytest
import test_pretrain as whole
from test_pretrain import words

from smoljax import (
    budget,
    checkpoint,
    committed,
    corruption,
    data,
    dumps,
    errors,
    guard,
    metrics,
    runs,
    settings,
    sharding,
    sums,
    watch,
)
from smoljax.config import Guard, Mesh
from smoljax.step import abstract_state
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
    corpus.write(folder / "held", corpus.documents(20, V, seed=1), V)
    return folder


def faulty(feed, kill=None, bad=(), signals=(), block=None, native=None, calls=MappingProxyType({})):
    """data.batches with faults before batch number n (from 1): what a machine, a scheduler or a disk does."""

    def batches(rows, start, stop, sharding):
        for n, batch in enumerate(feed(rows, start, stop, sharding), start + 1):
            if n == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            for at, number in signals:
                if n == at:
                    os.kill(os.getpid(), number)
            calls.get(n, int)()
            if n == block:
                time.sleep(3600)
            if n == native:
                stand_still(signal.SIGTERM)
            if n in bad:  # an id outside the vocabulary, which no check on disk can see any more
                batch = batch | {"tokens": batch["tokens"].at[3, 5].set(V + 1)}
            yield batch

    return batches


def stand_still(number):
    """A signal comes while this thread is in native code, for ever."""
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    lock(mutex)


def faulty_pretrain(faults: dict, *argv) -> int:
    """What a process does that a fault ends: launcher.call("test_faults:faulty_pretrain", ...)."""
    data.batches, pretrain.draw_curves = faulty(data.batches, **faults), lambda folder: None
    return errors.run(pretrain.main, argv)


@pytest.fixture
def child(launcher):
    return functools.partial(launcher.call, "test_faults:faulty_pretrain")


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
        assert run(patch, words(place, "uninterrupted", "keep=99", "save_every=1"), bad=BAD) == 0
    return place / "uninterrupted"


BAD = [4, 11]


def test_killed_on_both_sides_of_a_stage_equals_uninterrupted_bit_for_bit(place, uninterrupted, child, monkeypatch):
    rng = np.random.default_rng(0)
    kills = [int(rng.integers(3, 8)), 8, int(rng.integers(9, 15))]  # within each stage, and where the second begins
    for kill in kills:
        ended = child({"kill": kill, "bad": BAD}, *words(place, "killed", "keep=99"))
        assert ended.code == -signal.SIGKILL, ended.err
    assert run(monkeypatch, words(place, "killed", "keep=99"), bad=BAD) == 0
    assert_same_run(uninterrupted, place / "killed", 14)
    last = records(uninterrupted)[-1]
    assert last["train/skipped_steps"] > 2  # a spike beside the two bad batches: there was something to remember
    assert last["train/tokens"] == 7 * 16 * 16 + 7 * 16 * 32
    assert last["data/tokens"] == {str(place / "shards"): last["train/tokens"]}


# ---- signals


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(place, uninterrupted, monkeypatch, capsys, number, code):
    argv = words(place, f"signal-{number}", "keep=99", "save_every=100")
    before = signal.getsignal(number)
    assert run(monkeypatch, argv, bad=BAD, signals=[(5, number)]) == code
    err = capsys.readouterr().err
    saved = committed.steps(place / f"signal-{number}")[-1]
    assert 5 <= saved <= 7 and err.count("Traceback") == 0
    assert f"smoljax: {signal.Signals(number).name} came; step {saved} is saved, the same command goes on" in err
    assert signal.getsignal(number) == before
    assert run(monkeypatch, argv, bad=BAD) == 0
    assert_same_run(uninterrupted, place / f"signal-{number}", 14)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(place, child):
    faults = {"signals": [[4, signal.SIGTERM], [4, signal.SIGINT]]}
    ended = child(faults, *words(place, "twice", "save_every=100"))
    assert ended.code == 130 and "a second signal stops at once" in ended.err
    assert committed.steps(place / "twice") == []


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


# ---- bad numbers, and their dumps


def replayed(capsys, dump, *settings):
    code = errors.run(replay.main, [str(dump), *settings, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_bad_batch_changes_nothing_but_the_count(uninterrupted):
    lr = [r["train/lr"] for r in records(uninterrupted)]
    np.testing.assert_allclose(lr, [0, 5e-3] + [1e-2] * 9 + [7.5e-3, 5e-3, 2.5e-3], rtol=1e-6)  # by the batches
    skipped = [r["train/skipped_steps"] for r in records(uninterrupted)]
    assert skipped[3] > skipped[2] and skipped[10] > skipped[9]
    for n in range(2, 15):
        before, after = whole.arrays(uninterrupted, n - 1), whole.arrays(uninterrupted, n)
        moved = {k for k in before if k.startswith(("model", "opt")) and (before[k] != after[k]).any()}
        assert bool(moved) == (skipped[n - 1] == skipped[n - 2]), (n, moved)
        assert all(np.isfinite(a).all() for a in after.values())


def test_a_dump_repeats_bit_for_bit(place, uninterrupted, capsys):
    steps = sorted(int(p.name) for p in (uninterrupted / "dumps").iterdir())
    spikes = set(steps) - set(BAD)
    assert set(BAD) < set(steps) and spikes
    by_step = {r["step"]: r for r in metrics.read(uninterrupted)}
    for n in (4, 11, min(spikes)):  # of both stages
        code, found = replayed(capsys, uninterrupted / f"dumps/{n}")
        assert code == 0 and found["same"] and found["rows_as_on_disk"] == (n not in BAD) and found["from"] < n
        value = by_step[n]["train/loss"]
        assert found["now"]["loss"] == ("nan" if n in BAD else repr(value)) and (value is None) == (n in BAD)
    pinned = len(list((uninterrupted / "dumps").glob("*/checkpoints")))
    assert pinned == min(len(steps), dumps.PINNED)


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """A run that has moved: its dumps are beside other checkpoints now."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "moved"))


def forget(place, moved):
    """Point the dumps of a copy at no other run than itself."""
    for file in moved.glob("dumps/*/dump.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"run": str(moved)}))


@pytest.mark.slow
def test_a_dump_without_its_run(place, copy, capsys):
    forget(place, copy)
    shutil.rmtree(copy / "checkpoints")
    code, found = replayed(capsys, copy / "dumps/4")
    assert (code, found["from"]) == (0, committed.steps(copy / "dumps/4")[0])  # the checkpoint that it pinned
    last = max((copy / "dumps").iterdir(), key=lambda p: int(p.name))
    assert int(last.name) >= 11 and not (last / "checkpoints").exists()
    code, found = replayed(capsys, last)
    assert (code, found["from"], found["same"]) == (0, 0, True)  # from the beginning, the other bad batch on the way


def test_a_falsified_or_damaged_dump(place, copy, capsys):
    forget(place, copy)
    file = copy / "dumps/4/dump.json"
    text = file.read_text()
    for damaged in [
        "",
        "[]",
        "{}",
        text[: len(text) // 2],
        text.replace('"step": 4', '"step": "4"'),
        text.replace('"step": 4', '"step": 400'),
        text.replace('"step": 4', '"step": 9'),
    ]:
        file.write_text(damaged)
        assert errors.run(replay.main, [str(file.parent)]) == 3, damaged
        err = capsys.readouterr().err
        assert err.startswith("smoljax: ") and err.count("\n") == 1 and "dumps/4" in err
    file.write_text(text)
    rows = copy / "dumps/4/rows-0.npz"
    content = rows.read_bytes()
    for damaged in [b"", b"PK", content[:-30], content[:200] + b"\0" * 99 + content[299:]]:
        rows.write_bytes(damaged)
        assert errors.run(replay.main, [str(file.parent)]) == 3, damaged[:9]
        assert "is no whole dump" in capsys.readouterr().err
    rows.unlink()
    assert errors.run(replay.main, [str(file.parent)]) == 3
    assert errors.run(replay.main, [str(copy / "dumps/77")]) == 3
    rows.write_bytes(content)
    capsys.readouterr()
    file.write_text(text.replace('"loss": "nan"', '"loss": "3.25"'))
    assert errors.run(replay.main, [str(file.parent)]) == 1
    out = capsys.readouterr().out
    assert "then  loss 3.25" in out and "now   loss nan" in out and "NOT the same" in out
    assert "the batch is not what the shards hold at this step" in out


def test_a_dump_of_a_step_that_came_before_keeps_its_checkpoint(place, copy):
    """A resumed run comes to the same bad step again, and dumps it again."""
    for newest in (3, 2):  # the second time the run has gone back to an older one
        dumps.pin(copy, copy / "dumps/4", 4)
        assert committed.steps(copy / "dumps/4") == [newest]
        shutil.rmtree(copy / f"checkpoints/{newest}")  # links and no copies, and yet there
        assert whole.arrays(copy / "dumps/4", newest).keys() == whole.arrays(copy, 6).keys()


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_and_the_same_command_goes_on(place, monkeypatch, capsys):
    argv = words(
        place, "row", "guard.max_skips=3", "guard.spike_window=0", "stages=[]", "steps=9", "optim.decay_steps=0"
    )
    assert run(monkeypatch, argv, bad=[4, 5, 6]) == 1
    err = capsys.readouterr().err
    assert "step 6: loss nan, gradient norm nan; 3 updates in a row could not be applied" in err
    assert "Its newest checkpoint is 4;" in err and "dumps/6` repeats it" in err
    assert run(monkeypatch, argv) == 0  # the batches were fine on disk


# ---- steps that do not come


@pytest.mark.slow
def test_a_step_that_never_comes_is_ended_with_all_stacks(place, child):
    """The second one, when no step is known to be done yet."""
    argv = words(place, "hangs", "guard.watchdog_s=2", "guard.watchdog=2", "stages=[]", "save_every=1")
    ended = child({"block": 2}, *argv)
    assert ended.code == 75, ended.err
    assert "no step for" in ended.err and "Traceback" not in ended.err
    stacks = (place / "hangs/stacks-0.txt").read_text()
    assert stacks.count("Thread 0x") + stacks.count("Current thread") > 1
    assert "in batches" in stacks and "train/pretrain.py" in stacks  # which says what it waited for
    assert committed.newest_sound(place / "hangs") == 1


@pytest.mark.slow
def test_signals_are_heard_while_the_main_thread_is_in_native_code(place, child):
    """As in a long compilation, or in a collective whose peer is gone: there the interpreter runs no handler."""
    ended = child({"native": 4}, *words(place, "native", "stages=[]", "guard.grace_s=0.5"))
    assert ended.code == 75, ended.err
    assert "no checkpoint within guard.grace_s = 0.5 s of the signal; the last one stands" in ended.err
    assert committed.newest_sound(place / "native") == 2


def test_pauses_are_not_watched(tmp_path, monkeypatch):
    bitten, now = [], [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    dog = watch.Watchdog(10, 5, tmp_path / "stacks.txt")
    monkeypatch.setattr(dog, "bite", bitten.append)

    def look(seconds):
        now[0] += seconds
        dog.closed.wait = lambda _, turns=iter([False, True]): next(turns)  # one look of its thread
        dog.watch()
        return len(bitten)

    assert look(1000) == 0  # before the first compilation is over
    with dog.pause():
        assert look(1000) == 0
        with dog.pause():
            pass
        assert look(1000) == 0  # the outer one goes on
    assert look(4) == 0 and look(2) == 1  # no step yet: least
    for _ in range(3):
        dog.beat()
        now[0] += 2
    dog.beat()
    assert dog.limit() == 20.0  # 10 times the median of 2
    assert look(19) == 1 and look(2) == 2
    with dog.pause():
        now[0] += 1000
    assert look(0) == 2


@pytest.mark.slow
def test_memory_beyond_the_limit_saves_and_ends(place, uninterrupted, monkeypatch, capsys):
    argv = words(place, "memory", "save_every=99", "guard.max_rss_gb=0.001")
    assert run(monkeypatch, argv, bad=BAD) == 75
    saved = committed.newest_sound(place / "memory")
    assert saved <= 3
    assert f"host memory is beyond guard.max_rss_gb; step {saved} is saved, the same" in capsys.readouterr().err
    argv[-1] = "guard.max_rss_gb=1000"
    assert run(monkeypatch, argv, bad=BAD) == 0
    assert_same_run(uninterrupted, place / "memory", 14)


# ---- spikes


def test_judge_is_its_definition_in_plain_python():
    rng, W, sigma = np.random.default_rng(0), 8, 3.0
    config = Guard(spike_window=W, spike_sigma=sigma)
    values = np.abs(rng.normal(3, 0.1, (300, 2)))
    values[rng.choice(300, 20, False), rng.integers(0, 2, 20)] += 2  # spikes of one or the other
    values[rng.choice(300, 9, False), rng.integers(0, 2, 9)] = [np.nan, np.inf, -np.inf] * 3
    values = values.astype(np.float32)
    state, judge = guard.fresh(config), jax.jit(guard.judge, static_argnums=3)
    window, skipped, row, refused = [], 0, 0, []
    for n, (loss, norm) in enumerate(values):
        fine, state = judge(state, loss, norm, config)
        expected = bool(np.isfinite([loss, norm]).all())
        if expected and len(window) == W:
            recent = np.array(window, np.float64)
            expected = bool(((values[n] - recent.mean(0)) <= sigma * recent.std(0)).all())
        if np.isfinite([loss, norm]).all():
            window = [*window, values[n]][-W:]
        skipped, row = (skipped, 0) if expected else (skipped + 1, row + 1)
        refused += [] if expected else [n]
        assert (bool(fine), int(state["skipped"]), int(state["in_a_row"])) == (expected, skipped, row), n
    assert 9 < len(refused) < 40 and any(np.isfinite(values[n]).all() for n in refused)
    sizes = {k: (v.shape, str(v.dtype)) for k, v in state.items()}
    assert sizes == {k: (v.shape, str(v.dtype)) for k, v in guard.fresh(config).items()}


def test_without_a_window_only_what_is_not_finite_is_refused():
    state = guard.fresh(Guard())
    for loss, norm, fine in [(1, 1, True), (1e30, 1e30, True), (np.nan, 1, False), (1, np.inf, False), (1, 1, True)]:
        found, state = guard.judge(state, np.float32(loss), np.float32(norm), Guard())
        assert bool(found) == fine
    assert (int(state["skipped"]), int(state["in_a_row"])) == (2, 0)


# ---- silent corruption

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2), "heads": (1, 1, 8), "replicas": (2, 4, 1)}


def at_work(place, sizes):
    """(config, mesh, state, batch) of a run's beginning on a mesh."""
    config = dataclasses.replace(settings.load(*[(w := words(place, "x", "stages=[]"))[0], w[1:]]), mesh=Mesh(*sizes))
    mesh = sharding.mesh(config.mesh)
    places = sharding.shardings(abstract_state(config), mesh)
    with jax.set_mesh(mesh):
        state = runs.initial_state(config, None, places)
        return config, mesh, state, next(data.batches(data.Rows(config), 0, 1, sharding.batch_sharding(mesh)))


@pytest.mark.parametrize(
    "name", ["data", "fsdp", "all", *(pytest.param(n, marks=pytest.mark.slow) for n in ("heads", "replicas"))]
)
def test_an_honest_state_passes_and_a_flipped_bit_is_found(place, name):
    config, mesh, state, batch = at_work(place, MESHES[name])
    with jax.set_mesh(mesh):
        check = corruption.Check(config, mesh)
        for n in range(3):
            check(n, state, batch)
        found = 0
        for which in ("norm", "embed"):
            leaf = getattr(state.model, which)[...]
            pieces = [np.array(shard.data) for shard in leaf.addressable_shards]
            odd = leaf.addressable_shards[5]
            copies = [s.device for s in leaf.addressable_shards if s.index == odd.index]
            pieces[5].view(np.uint32).flat[-1] ^= 1  # the lowest bit of one number, of one copy
            parts = [jax.device_put(p, s.device) for p, s in zip(pieces, leaf.addressable_shards, strict=True)]
            flipped = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
            model = jax.tree.map(lambda x, leaf=leaf, flipped=flipped: flipped if x is leaf else x, state.model)
            corrupt = dataclasses.replace(state, model=model)
            if len(copies) == 1:  # what is held once alone cannot be compared
                check(9, corrupt, batch)
                continue
            with pytest.raises(errors.Error, match=rf"before step 9 .*{which}.* differs between its copies") as error:
                check(9, corrupt, batch)
            assert str(odd.device) in str(error.value) or len(copies) > 2
            assert sum(str(device) in str(error.value) for device in copies) == 2
            found += 1
        assert found == {"fsdp": 0}.get(name, 2 if name in ("data", "replicas", "all") else 1)


def test_a_value_that_does_not_repeat_is_found(place, monkeypatch):
    config, mesh, state, batch = at_work(place, (1, 8, 1))
    with jax.set_mesh(mesh):
        check = corruption.Check(config, mesh)
        honest, calls = check.value, []

        def errs(model, batch):
            calls.append(1)
            value = np.array(honest(model, batch))
            value.view(np.uint32)[1] ^= len(calls) == 2  # the norm's lowest bit, the second time
            return value

        check.value = errs
        with pytest.raises(errors.Error, match="step 7 has a loss and gradient of .*, and computed again of .*wrongly"):
            check(7, state, batch)
        check(8, state, batch)


# ---- what a run that goes on may change


@pytest.fixture
def at_nine(copy):
    """The run as it was after step 9, in its second stage."""
    for step in range(10, 15):
        shutil.rmtree(copy / f"checkpoints/{step}")
    return copy


def stages(*more, **second):
    return f"stages={json.dumps([{'start': 7, 'seq_len': 32, 'batch_size': 16, 'rope_theta': 1e5} | second, *more])}"


REFUSED = {
    "theta": ([stages(rope_theta=2e5)], 2, "had another stage at 7: rope_theta = 200000.0 (the run has 100000.0)"),
    "batch": ([stages(batch_size=32)], 2, "had another stage at 7: batch_size = 32 (the run has 16)"),
    "start": ([stages(start=8)], 2, "had another stage at 7: start = 8 (the run has 7)"),
    "gone": (["stages=[]"], 2, "read stages from [0, 7] up to step 9, the config has [0]"),
    "more": ([stages({"start": 8, "rope_theta": 2e5})], 2, "from [0, 7] up to step 9, the config has [0, 7, 8]"),
    "chunk": (
        [stages({"start": 12, "seq_len": 64, "batch_size": 16})],
        2,
        "in chunks of 32 tokens, then its longest row ahead, now that is 64",
    ),
    "first": (["data.batch_size=32"], 2, "data.batch_size = 32 (the run has 16)"),
    "window": (["guard.spike_window=4"], 2, "guard.spike_window = 4 (the run has 3)"),
    "seed": (["data.seed=1", "optim.b2=0.9"], 2, "data.seed = 1 (the run has 0), optim.b2 = 0.9 (the run has 0.95)"),
    "epochs": (["data.max_epochs=0.25"], 2, "data.max_epochs is 0.25; find more text or change weights"),
}


def content(folder):
    """All that a run is, without the lock and what its clock says."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p: p.read_bytes() for p in files}


def test_what_was_read_may_not_change(place, at_nine, capsys):
    before = content(at_nine)
    for name, (changed, code, sentence) in REFUSED.items():
        argv = [*words(place, "x", "keep=99", "save_every=1", *changed), f"run={at_nine}"]
        assert errors.run(pretrain.main, argv) == code, name
        err = capsys.readouterr().err
        assert sentence in err and err.count("smoljax: ") == 1 and "Traceback" not in err, (name, err)
    assert content(at_nine) == before


def test_what_lies_ahead_may_change(place, at_nine, capsys):
    ahead = [
        stages({"start": 9, "rope_theta": 3e5}, {"start": 12, "mask_documents": False}),
        "steps=13",
        "optim.lr=5e-3",
    ]
    argv = [*words(place, "x", "keep=99", *ahead), f"run={at_nine}"]
    assert errors.run(pretrain.main, argv) == 0
    err = capsys.readouterr().err
    for said in ("steps = 13 (was 14)", "optim.lr = 0.005 (was 0.01)", "another stage at 12", "save_every = 2 (was 1)"):
        assert f"resuming with {said}" in err
    assert "stage    from step 9: 16 x 32 tokens, theta 300000, documents masked" in err
    rows = records(at_nine)
    assert [r["step"] for r in rows] == list(range(1, 14))
    np.testing.assert_allclose([r["train/lr"] for r in rows[9:]], [5e-3, 3.75e-3, 2.5e-3, 1.25e-3], rtol=1e-6)
    assert checkpoint.load_model(at_nine)[1].rope_theta == 3e5


def test_tokens_that_do_not_add_up_are_refused(place, at_nine, capsys):
    """As after a bug, or a hand, that changed how batches are made: the checkpoint says what it was trained on."""
    file = at_nine / "checkpoints/9/_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    (name,) = content["custom_metadata"]["data"]["consumed"]
    content["custom_metadata"]["data"]["consumed"][name] += 32
    file.write_text(json.dumps(content))
    argv = [*words(place, "x", "keep=99"), f"run={at_nine}"]
    sums.write(at_nine / "checkpoints/9")
    assert errors.run(pretrain.main, argv) == 4
    assert re.search(
        r"had consumed \{.*: 2848\} tokens at step 9, the config makes it .*: 2816", capsys.readouterr().err
    )


# ---- full disks


def test_no_room_is_known_before_the_first_step(place, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert errors.run(pretrain.main, words(place, "small", "stages=[]", "keep=2")) == 2
    err = capsys.readouterr().err
    assert "small will grow by 0.00 GB" in err and "has 0.00 GB free; make room, set keep lower" in err
    assert not (place / "small/metrics.jsonl").exists()


def test_room_is_counted_while_files_vanish(place, tmp_path):
    """Orbax clears away what a kill left in a thread of its own, while the disk is looked at."""
    config = settings.load(str(place / "tiny.py"), [f"run={tmp_path}"])
    for _ in range(20):
        for folder in range(30):
            (tmp_path / f"checkpoints/{folder}").mkdir(parents=True)
            for file in range(10):
                (tmp_path / f"checkpoints/{folder}/{file}").write_text("x")
        clearing = threading.Thread(target=shutil.rmtree, args=(tmp_path / "checkpoints",))
        clearing.start()
        needed, _, _ = runs.room(tmp_path, config)
        clearing.join()
        assert 0 <= budget.disk_bytes(config) - needed <= 300


@contextlib.contextmanager
def limited(size):
    """No file may grow beyond `size` bytes: writes fail, in native code too, as on a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (size if on else hard, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture
def written(monkeypatch):
    """Waits until the save of a step is over, well or not."""
    over, seal = collections.defaultdict(threading.Event), checkpoint.Checkpoints.seal

    def noted(self, step, response):
        try:
            seal(self, step, response)
        finally:
            over[step].set()

    monkeypatch.setattr(checkpoint.Checkpoints, "seal", noted)
    return lambda step: over[step].wait()


@pytest.mark.slow
def test_one_save_that_fails_is_made_up_for(place, uninterrupted, written, monkeypatch, capsys):
    with limited(30_000) as limit:
        faults = {"bad": BAD, "calls": {3: lambda: written(2) and limit(True), 6: lambda: written(4) and limit(False)}}
        assert run(monkeypatch, words(place, "once", "keep=99"), **faults) == 0
    err = capsys.readouterr().err
    assert "checkpoint 4 could not be written into" in err and "File too large" in err, err
    assert "checkpoint 2 stands; training goes on to the next save" in err and err.count("could not be written") == 1
    assert committed.steps(place / "once") == [2, 6, 8, 10, 12, 14]
    assert_same_run(uninterrupted, place / "once", 14)


@pytest.mark.slow
def test_saves_that_go_on_failing_end_the_run(place, uninterrupted, written, monkeypatch, capsys):
    argv = words(place, "never", "keep=99")
    with limited(30_000) as limit:
        assert run(monkeypatch, argv, bad=BAD, calls={3: lambda: written(2) and limit(True)}) == 4
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("smoljax: checkpoint 6 could not be written into"), err
    assert "checkpoint 2 stands" in err and "enough memory" not in err and "Traceback" not in err
    assert committed.steps(place / "never") == [2]
    assert [r["step"] for r in records(place / "never")] == list(range(1, len(records(place / "never")) + 1))
    assert run(monkeypatch, argv, bad=BAD) == 0
    assert all(p.name.isdecimal() for p in (place / "never/checkpoints").iterdir())  # what failed was cleared away
    assert_same_run(uninterrupted, place / "never", 14)


def test_a_full_disk_is_not_a_full_device(place):
    config, mesh = settings.load(str(place / "tiny.py")), sharding.mesh(Mesh())
    full = errors.CheckpointError("RESOURCE_EXHAUSTED: Failed to write 454 bytes to file 14: No space left on device")
    with pytest.raises(errors.CheckpointError, match="No space left"), runs.memory(config, mesh):
        raise full


# ---- what may not happen meanwhile


@pytest.mark.slow
def test_nothing_is_compiled_anew_but_where_a_stage_begins(place, monkeypatch):
    names, now = {}, []

    class Heard(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling "):
                names.setdefault(now[-1] if now else 0, []).append(record.getMessage().split(" with ")[0])

    argv = words(place, "compiled", "guard.check_every=1", "heldout.every=1", "log_every=1", "save_every=3")
    argv += ["steps=13", f"heldout.sets={json.dumps({'held': str(place / 'held')})}"]
    heard, logger = Heard(), logging.getLogger("jax")
    logger.addHandler(heard)
    try:
        with jax.log_compiles():
            assert run(monkeypatch, argv, calls={n: partial(now.append, n) for n in range(1, 14)}) == 0
    finally:
        logger.removeHandler(heard)
    assert any("train_step" in name for name in names[1]) and any("train_step" in name for name in names[8])
    assert set(names) <= {0, 1, 2, 8, 9}, names


@pytest.mark.slow
def test_a_sink_that_breaks_stops_nothing(place, uninterrupted, monkeypatch, caplog):
    pytest.importorskip("tensorboardX")
    folder = place / "sink/tensorboard"

    def vanish():
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_text("no folder any more")

    argv = words(place, "sink", 'sinks=["tensorboard"]', "save_every=99")
    assert run(monkeypatch, argv, bad=BAD, calls={6: vanish}) == 0
    said = [r.getMessage() for r in caplog.records if "gets no more metrics" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("tensorboard gets no more metrics")
    assert_same_run(uninterrupted, place / "sink", 14)
