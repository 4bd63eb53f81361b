"""Metrics beside metrics.jsonl: what arrives is what was written, and a broken sink stops nothing and says so once."""

import importlib.util
import json
import logging
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from smoljax import sinks
from smoljax.errors import UsageError

FAKE = """
import json, os, pathlib, time
HERE = pathlib.Path(__file__).parent
def until_go():
    while not (HERE / "go").exists():
        time.sleep(0.01)
class Run:
    starting_step = _next_step = 0
    def log(self, values, step):
        {log}
        with open(HERE / "log", "a") as f:
            f.write(json.dumps([step, values]) + "\\n")
    def finish(self, exit_code=0):
        {finish}
        (HERE / "exit_code").write_text(str(exit_code))
class Settings:
    def __init__(self, **_): pass
def init(**_):
    print("noise on stdout"); {init}
    return Run()
"""


@pytest.fixture
def warned(caplog):
    """What the user is told; the package's own logger does not propagate under `smoljax`, but does here."""
    caplog.set_level(logging.WARNING, "smoljax")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "smoljax"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package wandb that does as it is told, and one named trackio that works; what they got is in `log`."""

    def write(init="pass", log="pass", finish="pass"):
        fine = FAKE.format(init="pass", log="pass", finish="pass")
        for name, code in (("wandb", FAKE.format(init=init, log=log, finish=finish)), ("trackio", fine)):
            (tmp_path / "fake" / name).mkdir(parents=True)
            (tmp_path / "fake" / name / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "fake"))
        return tmp_path / "fake/wandb"

    return write


def record(n):
    return {"step": n, "train/loss": 1 / n, "train/tokens": 2048 * n, "data/epochs": {"shards/web": n / 8, "b": 0.5}}


def flat(n):
    return {"train/loss": 1 / n, "train/tokens": 2048 * n, "data/epochs/shards/web": n / 8, "data/epochs/b": 0.5}


def logged(package):
    return [json.loads(line) for line in (package / "log").read_text().splitlines()]


def needs(package):
    """Skip without it, but do not import it here: these packages belong in a process of their own."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial, bit by bit, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(file):
    """TFRecords by hand: length, its checksum, an Event, its checksum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # tensorboardX would import it, for seconds
        event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, out = file.read_bytes(), []
    while data:
        size, check = struct.unpack("<QI", data[:12])
        assert check == crc32c(data[:8])
        body, end = data[12 : 12 + size], data[12 + size : 16 + size]
        assert struct.unpack("<I", end)[0] == crc32c(body)
        out.append(event_pb2.Event.FromString(body))
        data = data[16 + size :]
    return out


def test_tensorboard_has_what_was_written_and_a_resumed_run_takes_back_what_it_repeats(tmp_path, warned):
    needs("tensorboardX")
    for start, stop in ((0, 6), (4, 8)):  # killed after 6, resumed from the checkpoint of 4
        with sinks.Sinks(("tensorboard",), tmp_path, {}, start) as out:
            for n in range(start + 1, stop + 1):
                out.write(record(n))
    shown = {}
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        head, *rest = events(file)
        assert head.file_version == "brain.Event:2"
        for event in rest:
            if event.session_log.status:  # START: TensorBoard forgets this step and all after it
                shown = {n: v for n, v in shown.items() if n < event.step}
            else:
                assert event.step not in shown
                shown[event.step] = {v.tag: v.simple_value for v in event.summary.value}
    assert shown == {n: {k: float(np.float32(v)) for k, v in flat(n).items()} for n in range(1, 9)}
    assert not warned()


def test_a_package_that_is_not_installed_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "PACKAGES", {"wandb": "no_such_wandb", "trackio": "json"})
    (tmp_path / "no_such_wandb").mkdir()  # a folder is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    sinks.check(["trackio"])
    with pytest.raises(UsageError, match=r"sinks has wandb, but no_such_wandb is not installed: pip install 'smoljax"):
        sinks.check(["trackio", "wandb"])


BROKEN = {
    "raises at the start": ({"init": "until_go(); raise RuntimeError('no\\nserver')"}, "RuntimeError: no server", 0),
    "wants to leave": ({"log": "until_go(); raise SystemExit(3)"}, "SystemExit: 3", 0),
    "raises later": ({"log": "until_go(); step < 5 or 1 / 0"}, "ZeroDivisionError: division by zero", 4),
    "dies": ({"log": "until_go(); step < 5 or os._exit(7)"}, "its process ended with exit code 7", 4),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_sink_is_dropped_with_one_warning_and_costs_the_others_nothing(tmp_path, fake, warned, how, capfd):
    parts, why, arrived = BROKEN[how]
    package = fake(**parts)
    with sinks.Sinks(("wandb", "trackio"), tmp_path, {}, 0) as out:
        for n in range(1, 11):
            out.write(record(n))
        (package / "go").touch()
        wait(lambda: out.sinks[0].dropped)
        for n in range(11, 14):
            out.write(record(n))
    lost = f"{10 - arrived} of 10 records did not reach it"
    assert warned() == [f"wandb gets no more metrics: {why}; {lost}, metrics.jsonl has them all"]
    assert logged(package.parent / "trackio") == [[n, flat(n)] for n in range(1, 14)]
    assert capfd.readouterr().out == ""  # stdout is for the training's own result


def test_a_folder_that_vanishes(tmp_path, warned):
    needs("tensorboardX")
    with sinks.Sinks(("tensorboard",), tmp_path, {}, 0) as out:
        out.write(record(1))
        wait(lambda: out.sinks[0].delivered == 1)
        shutil.rmtree(tmp_path / "tensorboard")
        for n in range(2, 5):
            out.write(record(n))
            wait(lambda: out.sinks[0].dropped)
    (line,) = warned()
    assert "tensorboard gets no more metrics: FileNotFoundError" in line and "vanished; 1 of 2 records" in line


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_sink_that_hangs_is_killed(tmp_path, fake, warned, where, monkeypatch):
    fake(**{where: "until_go()"})
    monkeypatch.setattr(sinks, "HANG_S", 0.2)
    with sinks.Sinks(("wandb",), tmp_path, {}, 0) as out:
        (sink,) = out.sinks

        def written():
            out.write(record(sink.written + 1))
            return sink.dropped

        wait(written)
        assert sink.process.wait(60) == -9
        out.write(record(1))
    (line,) = warned()
    assert "wandb gets no more metrics: it has not answered for" in line


def test_the_end_of_a_run_waits_a_bounded_time(tmp_path, fake, warned, monkeypatch):
    package = fake(finish="until_go()")
    monkeypatch.setattr(sinks, "CLOSE_S", 0.3)
    with sinks.Sinks(("wandb",), tmp_path, {}, 0) as out:
        out.write(record(1))
        wait(lambda: out.sinks[0].delivered == 1)
    (line,) = warned()
    assert "it was not done within" in line and "0 of 1 records" in line
    assert out.sinks[0].process.wait(60) == -9 and not (package / "exit_code").exists()


def test_a_slow_sink_loses_what_its_queue_cannot_hold_and_that_is_said(tmp_path, fake, warned, monkeypatch):
    package = fake(log="until_go()")
    monkeypatch.setattr(sinks, "QUEUE", 3)
    with sinks.Sinks(("wandb",), tmp_path, {}, 0) as out:
        for n in range(1, 11):
            out.write(record(n))
        (package / "go").touch()
    rows = logged(package)
    assert 3 <= len(rows) < 10 and all(values == flat(n) for n, values in rows)
    (line,) = warned()
    assert f"slower than the training: {10 - len(rows)} of 10 records" in line
    assert (package / "exit_code").read_text() == "0"


def test_a_run_that_fails_is_marked_as_failed(tmp_path, fake, warned):
    package = fake()
    with pytest.raises(ZeroDivisionError), sinks.Sinks(("wandb",), tmp_path, {}, 0) as out:
        out.write(record(1))
        raise ZeroDivisionError
    assert (package / "exit_code").read_text() == "1" and not warned()


def test_what_was_written_arrives_when_the_training_is_killed(tmp_path, fake):
    package = fake(log='(HERE / "got").touch(); until_go()')
    code = f"""
import os, sys, time
sys.path.insert(0, {str(package.parent)!r})
from smoljax import sinks
out = sinks.Sinks(("wandb",), {str(tmp_path)!r}, {{}}, 0)
out.write({record(1)!r})
while not os.path.exists({str(package / "got")!r}):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | path, timeout=60).returncode == -9
    (package / "go").touch()
    wait((package / "exit_code").exists)
    assert logged(package) == [[1, flat(1)]]


def test_no_sinks_leave_nothing_and_a_damaged_id_is_said(tmp_path):
    with sinks.Sinks((), tmp_path, {}, 0) as out:
        out.write(record(1))
    assert not list(tmp_path.iterdir())
    (tmp_path / "sinks.json").write_text("{")
    with pytest.raises(UsageError, match="sinks.json does not hold the run's id; delete it"):
        sinks.Sinks(("wandb",), tmp_path, {}, 0)


def test_what_a_sink_keeps_of_an_attempt_before_is_said(tmp_path, fake, warned, capfd):
    package = fake(init="Run.starting_step = 7")
    with sinks.Sinks(("wandb",), tmp_path, {}, 4) as out:
        for n in range(5, 9):
            out.write(record(n))
    assert [step for step, _ in logged(package)] == [7, 8] and not warned()
    assert "wandb keeps steps 5 to 6 as an attempt before sent them" in capfd.readouterr().err


def resumed(name, folder):
    for start, stop in ((0, 6), (4, 8)):
        with sinks.Sinks((name,), folder, {"optim": {"lr": 1e-3}, "steps": stop}, start) as out:
            for n in range(start + 1, stop + 1):
                out.write(record(n))


def test_trackio_goes_on_in_the_same_run_and_keeps_a_step_once(tmp_path, warned, monkeypatch):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    resumed("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio/smoljax.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1 and not warned()
    assert [(step, json.loads(metrics)) for _, step, metrics in rows] == [(n, flat(n)) for n in range(1, 9)]


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(tmp_path, warned, monkeypatch):
    """Offline, where nobody can say which steps it has: both parts carry the run's id, and what they were given."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    resumed("wandb", tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.parent)
    assert len(files) == 2 and len({f.name for f in files}) == 1 and not warned()
    for file, steps in zip(files, (range(1, 7), range(5, 9)), strict=True):
        found = {}
        for line in leveldb_log(file.read_bytes()):
            history = internal.Record.FromString(line).history
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in history.item}
            if items:
                found[items["_step"]] = {k: v for k, v in items.items() if k[0] != "_"}
        assert found == {n: flat(n) for n in steps}


def leveldb_log(data: bytes):
    """The records of a log as LevelDB's doc/log_format.md has it, after wandb's own 7 bytes."""
    at, part = 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            yield part
            part = b""


def test_a_held_out_loss_that_is_no_number_is_no_point():
    record = {"step": 3, "train/loss": 1.5, "eval/web/loss": None, "data/epochs": {"a": {"b": 0.5}}}
    assert sinks.flat(record) == {"train/loss": 1.5, "data/epochs/a/b": 0.5}
