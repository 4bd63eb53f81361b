"""Several real processes (gloo on CPU) as one run: they compute what one computes, agree, and stop together.

Between set-ups, losses are compared within 1e-5: each adds the gradients of its devices in its own order. Between runs
of the same set-up, bit for bit.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import corpus
import launch
import numpy as np
import pytest
from test_pretrain import CONFIG, arrays

from smoljax import atomic, committed, data, errors, metrics, settings
from train import pretrain, replay

V, B, STEPS = 64, 8, 12
ALL = {(n, i) for n in range(STEPS) for i in range(B)}  # every row of every batch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.py").write_text(CONFIG)
    corpus.write(folder / "shards", corpus.documents(200, V), V)
    corpus.write(folder / "heldout", corpus.documents(40, V, seed=1), V)
    return folder


def words(place, name, *settings):
    always = (f"steps={STEPS}", "save_every=4", "keep=9", f"data.sources={place / 'shards'}", f"run={place / name}")
    return [str(place / "tiny.py"), *always, *settings]


def heldout(place):
    return f'heldout.sets={{"web": "{place / "heldout"}"}}'


@pytest.fixture(scope="module")
def two(place, launcher):
    """The uninterrupted run of two processes with four devices each, and its processes."""
    processes = launcher.several(*words(place, "two", heldout(place), "guard.check_every=6"))
    assert [p.code for p in processes] == [0, 0], [p.err for p in processes]
    return processes


@pytest.fixture(scope="module")
def one(place, launcher):
    """The same run of one process with eight devices."""
    process = launcher.one(*words(place, "one", heldout(place)))
    assert process.code == 0, process.err
    return process


def numbers(folder):
    """{step: [loss, gradient norm]}"""
    return {r["step"]: [r["train/loss"], r["train/grad_norm"]] for r in metrics.read(folder)}


def close(folder, other):
    mine, theirs = numbers(folder), numbers(other)
    assert list(mine) == list(theirs) == list(range(1, STEPS + 1))  # each step is written once, in order
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-5, atol=1e-5)
    mine, theirs = (metrics.read(f)[-1] for f in (folder, other))
    assert mine["data/tokens"] == theirs["data/tokens"] and mine["train/tokens"] == STEPS * B * 32


def cut(place, name, whole, step):
    """A copy of a run as it was right after checkpoint `step`."""
    shutil.copytree(place / whole, place / name)
    for later in committed.steps(place / name):
        if later > step:
            shutil.rmtree(place / name / "checkpoints" / str(later))
    return name


def slurm(count, mine):
    """The environment of one task of a job step on this host; JAX takes the port from the job's number."""
    return {
        **{"SLURM_JOB_ID": str(port_number() - 61440), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)},
        **{"SLURM_PROCID": str(mine), "SLURM_LOCALID": str(mine), "SLURM_STEP_NUM_NODES": "1"},
    }


def open_mpi(count, mine):
    job = (port_number() - 61440) << 12
    return {
        **{"OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": str(count)},
        **{"OMPI_COMM_WORLD_RANK": str(mine), "OMPI_COMM_WORLD_LOCAL_RANK": str(mine)},
    }


def port_number():
    """The first free one of those that JAX maps jobs to, other than its last time's."""
    for number in range(61440 + os.getpid() % 3000, 65536):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", number)):
                return number


# ---- they compute what one computes


def test_two_processes_train_as_one(place, two, one):
    close(place / "two", place / "one")
    measured = [metrics.read(place / name)[-1]["eval/web/loss"] for name in ("two", "one")]
    np.testing.assert_allclose(*measured, rtol=1e-5)
    assert [p.name for p in (place / "two").rglob("metrics*")] == ["metrics.jsonl"]
    assert two[0].file("out").read_text().splitlines()[-1].startswith(f"{place / 'two'}: 12 steps, 3.07k tokens, loss")
    assert "run:" not in two[1].file("out").read_text() and two[1].err == ""
    assert "8 x cpu" in two[0].err and "2 processes" in two[0].err


def test_each_process_reads_the_rows_of_its_own_devices(two, one):
    first, second = (p.rows for p in two)
    assert len(first) == len(second) == STEPS * B / 2 and set(first) | set(second) == ALL
    assert sorted(one.rows) == sorted(ALL)


def test_a_checkpoint_of_two_processes_goes_on_in_one(place, launcher, two):
    went_on = {}
    for devices in (8, 4, 1):
        env = slurm(1, 0) if devices == 1 else {}  # one task of one: a single process
        argv = words(place, cut(place, f"on-{devices}", "two", 8))
        went_on[devices] = launcher.one(*argv, devices=devices, env=env)
    for devices, process in went_on.items():
        assert process.code == 0 and "resuming at step 8" in process.err, process.err
        assert f"{devices} x cpu" in process.err and "1 process\n" in process.err
        assert sorted(process.rows) == sorted((n, i) for n, i in ALL if n >= 8)
        close(place / f"on-{devices}", place / "two")


def test_a_checkpoint_of_one_goes_on_in_two_of_a_slurm_step_with_weights_across_them(place, launcher, one):
    argv = words(place, cut(place, "slurm", "one", 8), "mesh.fsdp=1", "mesh.tensor=2")
    processes = [launcher.one(*argv, devices=1, env=slurm(2, i)) for i in range(2)]
    assert [p.code for p in processes] == [0, 0], [p.err for p in processes]
    assert "2 x cpu (cpu), mesh data=1 fsdp=1 tensor=2, 2 processes" in processes[0].err
    for process in processes:  # both hold a part of every row's computation
        assert sorted(process.rows) == sorted((n, i) for n, i in ALL if n >= 8)
    close(place / "slurm", place / "one")


# ---- they stop together, and go on


@pytest.mark.slow
def test_stopped_and_killed_in_turn_equals_uninterrupted_bit_for_bit(place, launcher, two):
    argv = words(place, "killed")

    asked = launcher.several(*argv, hold={1: 2})
    asked[1].until("held")
    asked[1].kill(signal.SIGTERM)  # one of them alone
    asked[1].go()
    assert [p.code for p in asked] == [75, 75], [p.err for p in asked]
    saved = committed.steps(place / "killed")[-1]
    assert saved in (3, 4)  # batches 0, 1, 2, and 3 where the answer was read a step later
    sentence = f"smoljax: SIGTERM came; step {saved} is saved, the same command goes on from there"
    assert [p.said for p in asked] == [sentence, sentence]

    worker = launcher.several(*argv, hold={1: 6})
    worker[1].until("held")
    worker[1].kill(signal.SIGKILL)
    assert [p.code for p in worker] == [75, -signal.SIGKILL]
    assert worker[0].said.startswith("smoljax: a process is gone (") and "Traceback" not in worker[0].err
    assert f"resuming at step {saved}" in worker[0].err

    coordinator = launcher.several(*argv, hold={0: 10})
    coordinator[0].until("held")
    coordinator[0].kill(signal.SIGKILL)
    # The others learn of it from a collective, or are aborted by JAX: whichever is first.
    assert coordinator[0].code == -signal.SIGKILL and coordinator[1].code in (75, -signal.SIGABRT)

    last = launcher.several(*argv)
    assert [p.code for p in last] == [0, 0], [p.err for p in last]
    assert numbers(place / "killed") == numbers(place / "two")
    for (name, a), b in zip(
        arrays(place / "two", STEPS).items(), arrays(place / "killed", STEPS).values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)


# ---- what one alone knows


def test_a_mistake_that_process_0_knows_ends_all_alike(place, launcher):
    (place / "locked").mkdir()
    config = settings.load(str(place / "tiny.py"), words(place, "locked")[1:])
    atomic.write_json(place / "locked/config.json", dataclasses.asdict(config))
    with atomic.lock(place / "locked/.lock", "mine"):
        processes = launcher.several(*words(place, "locked"))
        assert [p.code for p in processes] == [2, 2]
    for process in processes:
        assert (
            process.err.startswith("smoljax: another `smoljax pretrain` is at work in") and process.err.count("\n") == 1
        )


def test_a_damaged_token_that_process_1_reads_ends_both(place, launcher):
    folder = corpus.write(place / "damaged", corpus.documents(200, V), V, files=1, manifest=False)
    argv = words(place, "damage", f"data.sources={folder}")
    rows = data.Rows(settings.load(argv[0], argv[1:]))
    at = 32 * rows.orders[str(folder)].window(2 * B + 6, 32) + 1  # of row 6 of batch 2
    ids = np.fromfile(folder / "00000.ds", "<u2")
    ids[at] = 9_999
    ids.tofile(folder / "00000.ds")
    processes = launcher.several(*argv)
    assert [p.code for p in processes] == [75, 3]
    assert processes[0].said.startswith("smoljax: a process is gone (")
    assert f"token {at}, has id 9999, beyond model.vocab_size = 64" in processes[1].said


@pytest.mark.slow
def test_a_loss_that_is_not_finite_replays_in_one_process(place, launcher, capsys):
    argv = words(place, "nan")
    processes = [launcher.one(*argv, devices=4, bad=(5, 6), env=open_mpi(2, i)) for i in range(2)]
    assert [p.code for p in processes] == [0, 0], [p.err for p in processes]
    dump = place / "nan/dumps/6"
    assert f"smoljax: step 6: loss nan, gradient norm nan: the update was not applied; `smoljax replay {dump}`" in (
        processes[0].err
    )
    assert processes[1].err == "" and metrics.read(place / "nan")[-1]["train/skipped_steps"] == 1
    assert sorted(p.name for p in dump.iterdir()) == ["checkpoints", "dump.json", "rows-0.npz", "rows-1.npz"]
    for i in range(2):
        np.testing.assert_array_equal(np.load(dump / f"rows-{i}.npz")["rows"], np.arange(4) + 4 * i)
    assert replay.main([str(dump), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"] and found["now"] == {"loss": "nan", "grad_norm": "nan"} and found["from"] == 4
    assert not found["rows_as_on_disk"]


# ---- how they are started


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--num-processes=2"], "go together; found 1 of the three"),
        (["--coordinator=a:1", "--process-id=0"], "go together; found 2 of the three"),
        (launch.flags("127.0.0.1:1234", 2, 2), "--process-id is 2, expected 0 ... 1 of --num-processes 2"),
        (launch.flags("127.0.0.1:1234", 2, -1), "--process-id is -1, expected 0 ... 1"),
        (launch.flags("127.0.0.1:1234", 0, 0), "--num-processes is 0, expected at least 1"),
        (launch.flags("127.0.0.1", 2, 0), "--coordinator is '127.0.0.1', expected HOST:PORT"),
        (launch.flags("host:port", 2, 0), "--coordinator is 'host:port', expected HOST:PORT"),
        (launch.flags("host:99999", 2, 0), "--coordinator is 'host:99999', expected HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(place, capsys, flags, sentence):
    assert errors.run(pretrain.main, [*words(place, "flags"), *flags]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_a_process_that_finds_no_other_says_so(place, launcher):
    alone = []
    for mine in range(2):
        where = launch.flags(f"127.0.0.1:{launch.free_port()}", 2, mine)
        alone += [launcher.one(*words(place, "alone"), *where, patience=2)]
    alone += [launcher.one(*words(place, "alone"), env=slurm(2, 1), patience=2)]
    sentence = "smoljax: the other processes did not come within 2 s; start all of them"
    for process in alone:
        assert process.code == 75 and process.said.startswith(sentence), process.err
    assert not (place / "alone").exists()


def test_a_port_that_is_taken(place, launcher):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = launcher.one(*words(place, "alone"), *launch.flags(f"127.0.0.1:{port}", 2, 0))
        assert process.code == 2 and process.err.count("\n") == 1
    assert f"--coordinator is 127.0.0.1:{port}, where process 0 cannot listen: Address already in use" in process.err


# ---- minutes long


@pytest.mark.slow
def test_four_processes_and_back(place, launcher, two):
    argv = words(place, cut(place, "four", "two", 4), "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    four = launcher.several(*argv, "steps=8", count=4, devices=2)
    assert [p.code for p in four] == [0] * 4, [p.err for p in four]
    assert sorted(row for p in four for row in p.rows) == sorted((n, i) for n, i in ALL if 4 <= n < 8)
    back = launcher.several(*words(place, "four", "mesh.fsdp=1", "mesh.tensor=8"))  # each weight lies across both
    assert [p.code for p in back] == [0, 0], [p.err for p in back]
    close(place / "four", place / "two")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_hangs_is_taken_for_dead(place, launcher, two, stopped):
    argv = words(place, f"hangs-{stopped}", "guard.heartbeat_s=10")
    processes = launcher.several(*argv, hold={stopped: 6})
    processes[stopped].until("held")
    processes[stopped].kill(signal.SIGSTOP)
    try:
        assert processes[1 - stopped].code in (75, -signal.SIGABRT)
    finally:
        processes[stopped].kill(signal.SIGKILL)
    assert processes[stopped].code == -signal.SIGKILL
    assert [p.code for p in launcher.several(*argv)] == [0, 0]
    assert numbers(place / f"hangs-{stopped}") == numbers(place / "two")


@pytest.mark.slow
def test_restart_sh_around_two_processes_of_which_one_is_killed(place, two):
    argv = words(place, "restarted", "steps=120", "save_every=20")
    where = f"127.0.0.1:{launch.free_port()}"
    env = os.environ | launch.fake_devices(4) | {"PYTHONPATH": str(launch.ROOT), "PAUSE": "1"}
    script = ["bash", str(launch.ROOT / "configs/launch/restart.sh"), sys.executable, "-m", "train.pretrain"]

    def host(i):
        err = open(place / f"host{i}.err", "a")
        command = [*script, *argv, *launch.flags(where, 2, i)]
        return subprocess.Popen(command, env=env, cwd=launch.ROOT, stdout=subprocess.DEVNULL, stderr=err)

    hosts = [host(0), host(1)]
    while not committed.steps(place / "restarted"):
        assert hosts[0].poll() is None, (place / "host0.err").read_text()
        time.sleep(0.05)
    child = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text()
    os.kill(int(child), signal.SIGKILL)
    assert [h.wait() for h in hosts] == [0, 0], (place / "host0.err").read_text()
    said, other = ((place / f"host{i}.err").read_text() for i in range(2))
    assert re.search("restart.sh: exit code (75|134), starting again in 1 s", said)
    assert "restart.sh: exit code 137, starting again in 1 s" in other
    assert int(re.search(r"resuming at step (\d+)", said)[1]) >= 20
    assert list(numbers(place / "restarted")) == list(range(1, 121))
