"""prepare on a cluster: the same bytes as in local processes, and no task is lost without a word.

SLURM is played by a program that knows sbatch, squeue, sacct, srun and scontrol, refuses what it does not know, and
really runs the submitted script for each task of the array, two at once. Ray is Ray.
"""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoljax import encode, executors
from smoljax import tokenizer as tok
from smoljax.errors import Error, UsageError
from train import prepare

REPO = Path(__file__).resolve().parents[1]
TEXTS = [f"Document {i}.\nIt has {i % 7} lines{' and more' * (i % 40)}.\r\n" for i in range(60)]
LINES = b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS))

SLURM = r"""
import argparse, json, os, pathlib, re, shutil, signal, subprocess, sys, threading, time

STATE = pathlib.Path(os.environ["FAKE_SLURM"])


def jobs(name):
    for file in sorted(STATE.glob("[0-9]*/job.json"), key=lambda f: int(f.parent.name)):
        folder, job = file.parent, json.loads(file.read_text())
        if job["name"] == name:
            yield job, [(task, (folder / f"task{task}").read_text()) for task in job["array"]]


def put(path, text):  # at once: an empty state read half-way would be no state at all
    part = path.with_name("of-" + path.name)
    part.write_text(text)
    part.replace(path)


def sbatch(parser, argv):
    parser.add_argument("--export")
    parser.add_argument("--dependency", default="")
    parser.add_argument("script")
    args = parser.parse_args(argv)
    script = open(args.script).read()
    said = dict(line[10:].partition("=")[::2] for line in script.splitlines() if line.startswith("#SBATCH --"))
    if said["partition"] != "cpu":
        sys.exit("sbatch: error: invalid partition specified: " + said["partition"])
    first, last = re.match(r"(\d+)-(\d+)", said["array"]).groups()
    folder = STATE / str(len(list(STATE.glob("[0-9]*"))) + 1)
    folder.mkdir()
    (folder / "script").write_text(script)  # as sbatch keeps a copy
    job = {"name": said["job-name"], "array": list(range(int(first), int(last) + 1)), "output": said["output"]}
    job |= {"after": args.dependency.rpartition(":")[2], "said": said, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
    job |= {"env": dict(pair.split("=") for pair in args.export.split(",")[1:])}
    for task in job["array"]:
        put(folder / f"task{task}", "PENDING")
    put(folder / "job.json", json.dumps(job))
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, "slurmctld", folder.name], start_new_session=True, **quiet)
    print("Submitted batch job", folder.name)


def slurmctld(parser, argv):
    folder = STATE / argv[0]
    job = json.loads((folder / "job.json").read_text())
    while job["after"] and any(
        (STATE / job["after"] / f"task{task}").read_text() in ("PENDING", "RUNNING")
        for task in json.loads((STATE / job["after"] / "job.json").read_text())["array"]
    ):
        time.sleep(0.05)
    rooms = threading.Semaphore(2)

    def run(task):
        with rooms:
            while (STATE / "hold").exists():
                time.sleep(0.05)
            mark = folder / f"task{task}"
            put(mark, "RUNNING")
            env = os.environ | job["env"] | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": folder.name}
            log = job["output"].replace("%A", folder.name).replace("%a", str(task))
            with open(log, "w") as out:
                process = subprocess.Popen(
                    ["bash", folder / "script"], env=env | {"SLURM_NODELIST": "node1"}, stdout=out, stderr=out,
                    start_new_session=True,
                )
            if (STATE / "oom").exists() and (STATE / "oom").read_text() == str(task):
                while not pathlib.Path(log).read_text().startswith("Starting"):
                    time.sleep(0.01)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                put(mark, "OUT_OF_MEMORY")
            else:
                put(mark, "FAILED" if process.wait() else "COMPLETED")

    threads = [threading.Thread(target=run, args=[task]) for task in job["array"]]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


def squeue(parser, argv):
    parser.add_argument("--noheader", action="store_true", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--user", choices=[str(os.getuid())], required=True)
    parser.add_argument("--format", choices=["%T (%r)"], required=True)
    for _, tasks in jobs(parser.parse_args(argv).name):
        for _, state in tasks:
            if state in ("PENDING", "RUNNING"):
                print(state, {"PENDING": "(Priority)", "RUNNING": "(None)"}[state])


def sacct(parser, argv):
    for flag in "--noheader", "--allocations", "--parsable2":
        parser.add_argument(flag, action="store_true", required=True)
    parser.add_argument("--format", choices=["State"], required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("-S", required=True)
    args = parser.parse_args(argv)
    for job, tasks in jobs(args.name):
        if job["at"] >= args.S:
            print(*(state for _, state in tasks), sep="\n")


def srun(parser, argv):
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("-l", action="store_true")
    parser.add_argument("-n", type=int, choices=[1])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    command = parser.parse_args(argv).command
    os.execvp(command[0], command)


def scontrol(parser, argv):
    assert argv[:2] == ["show", "hostnames"], argv
    print(argv[2])


verb = sys.argv[1]
globals()[verb](argparse.ArgumentParser(verb, allow_abbrev=False), sys.argv[2:])
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tok.train(TEXTS, 290, path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """Three files, which are three tasks here; and what local processes make of them: bytes by file name."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in").mkdir()
    for i in range(3):
        (folder / f"in/{i}.jsonl").write_bytes(LINES.replace(b"Document", b"Text %d" % i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "TASK", 2000)
        prepare.main([str(folder / "in"), "--output", str(folder / "local"), "--tokenizer", str(tokenizer)])
    local = contents(folder / "local")
    assert len([name for name in local if name.endswith(".ds")]) == 3
    return folder / "in", local


@pytest.fixture
def go(tmp_path, tokenizer, capsys, monkeypatch):
    """Run prepare in this process: its JSON summary."""
    monkeypatch.setattr(encode, "TASK", 2000)

    def call(source, *flags, output="out"):
        argv = [str(source), "--output", str(tmp_path / output), "--tokenizer", str(tokenizer), "--json", *flags]
        assert prepare.main(argv) == 0
        return json.loads(capsys.readouterr().out)

    return call


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# ---- SLURM


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of the fake's state, with its commands on PATH; no polling for seconds."""
    state, programs = tmp_path / "slurm", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    (programs / "fake.py").write_text(SLURM)
    for verb in "sbatch", "squeue", "sacct", "srun", "scontrol":
        shim = programs / verb
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -S {programs / "fake.py"} {verb} "$@"\n')
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")  # without this Python's own programs
    monkeypatch.setattr(executors, "POLL", 0.1)
    monkeypatch.setattr(executors, "LATE", 1)
    yield state
    (state / "hold").unlink(missing_ok=True)
    until(lambda: not [f for f in state.glob("*/task*") if f.read_text() in ("PENDING", "RUNNING")])


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def submitted(state):
    return [json.loads(file.read_text()) for file in sorted(state.glob("[0-9]*/job.json"))]


CLUSTER = ["--executor", "slurm", "--cluster", "partition=cpu,time=1:00:00,account=lab,mem_per_cpu_gb=3"]


def test_slurm_writes_what_local_processes_write(go, corpus, slurm, tmp_path, capsys):
    source, local = corpus
    go(source, *CLUSTER[:-1], CLUSTER[-1] + ",max_array_size=2", "--workers", "7")  # two arrays for three tasks
    assert contents(tmp_path / "out") == local
    first, second = submitted(slurm)
    want = {"partition": "cpu", "time": "1:00:00", "account": "lab", "mem-per-cpu": "3G", "cpus-per-task": "1"}
    assert want.items() <= first["said"].items() and "qos" not in first["said"]
    assert (first["array"], first["said"]["array"], second["env"]["RUN_OFFSET"]) == ([0, 1], "0-1%7", "1")
    assert go(source, *CLUSTER)["up_to_date"] and len(submitted(slurm)) == 2
    assert go(source)["up_to_date"]  # whoever made them


def test_slurm_names_the_bad_document_and_then_goes_on(go, corpus, slurm, tmp_path):
    source, local = corpus
    shutil.copytree(source, tmp_path / "in")
    with open(tmp_path / "in/1.jsonl", "ab") as file:
        file.write(b'{"text": "caf\xe9"}\n')
    with pytest.raises(Error, match=r"1\.jsonl:61.*not UTF-8.*--max-bad") as e:
        go(tmp_path / "in", *CLUSTER)
    assert e.value.code == 3 and not (tmp_path / "out/manifest.json").exists()
    summary = go(tmp_path / "in", *CLUSTER, "--max-bad", "1")
    assert (summary["documents"], summary["refused"]) == (180, 1)
    shards = {name.partition("_")[2]: data for name, data in contents(tmp_path / "out").items() if ".ds" in name}
    want = {name.partition("_")[2]: data for name, data in local.items() if ".ds" in name}
    assert shards == want  # names begin with the hash of the inputs


def test_a_task_that_slurm_kills_is_named_and_then_done(go, corpus, slurm, tmp_path):
    source, local = corpus
    (slurm / "oom").write_text("1")
    with pytest.raises(Error, match=r"task 1 of 3, 1\.jsonl, did not end well: SLURM says OUT_OF_MEMORY; logs") as e:
        go(source, *CLUSTER)
    assert e.value.code == 1 and not (tmp_path / "out/manifest.json").exists()
    (slurm / "oom").unlink()
    go(source, *CLUSTER)
    assert contents(tmp_path / "out") == local
    assert [job["array"] for job in submitted(slurm)] == [[0, 1, 2], [0]]  # the finished two are kept


def test_killed_while_it_waits_the_same_command_takes_the_job_over(go, corpus, slurm, tmp_path, tokenizer):
    source, local = corpus
    (slurm / "hold").touch()
    program = "from smoljax import encode; from train import prepare; encode.TASK = 2000; prepare.main()"
    argv = [str(source), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    process = subprocess.Popen([sys.executable, "-c", program, *argv, *CLUSTER], cwd=REPO, stderr=subprocess.DEVNULL)
    until(lambda: submitted(slurm) or process.poll() is not None)
    process.kill()
    process.wait()
    with pytest.raises(UsageError, match="is still in the queue: go on with --executor slurm"):
        go(source)  # local processes would write into the same files
    (slurm / "hold").unlink()
    go(source, *CLUSTER)
    assert contents(tmp_path / "out") == local and len(submitted(slurm)) == 1


def test_slurm_mistakes_are_one_sentence(go, corpus, slurm, tmp_path, monkeypatch):
    source, _ = corpus
    with pytest.raises(Error, match=r"sbatch refused the job \(exit 1"):
        go(source, "--executor", "slurm", "--cluster", "partition=none,time=1:00:00")
    with pytest.raises(UsageError, match="holds no such path"):
        go(source, *CLUSTER, output="with space")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(UsageError, match="run it on a login node"):
        go(source, *CLUSTER)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(UsageError, match="there is no squeue here"):
        go(source, *CLUSTER)


@pytest.mark.parametrize(
    ("executor", "text", "words"),
    [
        ("slurm", None, "needs --cluster partition=NAME,time=H:MM:SS"),
        ("slurm", "partition=cpu", "needs --cluster partition=NAME,time=H:MM:SS"),
        ("slurm", "partition=cpu,time=1:00:00,gpus=1", "has 'gpus': --executor slurm takes partition, time"),
        ("slurm", "partition=cpu,time=1:00:00,cpus_per_task=two", "cpus_per_task=two, expected a whole number"),
        ("slurm", "partition=cpu,time=1:00:00,cpus_per_task=0", "cpus_per_task=0, expected a whole number"),
        ("slurm", "partition=cpu,time=1:00:00,partition=gpu", "has partition twice"),
        ("slurm", "partition", "has 'partition', expected KEY=VALUE"),
        ("ray", "partition=cpu", "has 'partition': --executor ray takes cpus_per_task, mem_per_cpu_gb"),
        ("local", "cpus_per_task=2", "--executor local takes none"),
    ],
)
def test_cluster_settings(executor, text, words):
    with pytest.raises(UsageError) as e:
        executors.options(executor, text)
    assert words in str(e.value)


def test_settings_of_a_cluster_are_typed_and_have_their_defaults():
    found = executors.options("slurm", "partition=cpu,time=1-00:00:00,max_array_size=10")
    resources = {"cpus_per_task": 1, "mem_per_cpu_gb": 4}
    assert found == {"partition": "cpu", "time": "1-00:00:00", "max_array_size": 10} | resources
    assert executors.options("ray", None) == resources and executors.options("local", None) == {}


def test_another_version_on_the_cluster_is_refused(tmp_path):
    """It could make other shards. The task says so itself, where its caller finds it."""
    (tmp_path / "failed").mkdir()
    reader = encode.Reader(tmp_path, [[]], "text", 0, {"numpy": "0.1"})
    with pytest.raises(Error, match="numpy.*'0.1'"):
        list(reader(None, 0, 1))
    assert "install the same on both" in str(executors.failure(reader))
    with pytest.raises(Error, match="another task has failed"):
        list(reader(None, 0, 1))


# ---- Ray


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine, its address."""
    ray = pytest.importorskip("ray", reason="pip install 'smoljax[ray]'")
    context = ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


RAY = ["--executor", "ray", "--cluster", "mem_per_cpu_gb=1"]


@pytest.mark.slow
def test_ray_writes_what_local_processes_write(go, corpus, cluster, tmp_path):
    source, local = corpus
    go(source, *RAY)
    assert contents(tmp_path / "out") == local
    assert go(source, *RAY)["up_to_date"]


@pytest.mark.slow
def test_ray_names_the_bad_document(go, corpus, cluster, tmp_path):
    source, _ = corpus
    shutil.copytree(source, tmp_path / "in")
    with open(tmp_path / "in/0.jsonl", "ab") as file:
        file.write(b"{\n")
    with pytest.raises(Error, match=r"0\.jsonl:61.*not JSON.*--max-bad") as e:
        go(tmp_path / "in", *RAY)
    assert e.value.code == 3 and not (tmp_path / "out/manifest.json").exists()


@pytest.mark.slow
def test_a_task_that_ray_gives_up_is_named(go, corpus, cluster, tmp_path, monkeypatch):
    """datatrove's Ray executor ends well where a task has raised: it must not become a shorter corpus."""
    source, local = corpus
    whole = encode.steps

    def broken(documents, rank, world_size):
        if rank == 2:
            raise RuntimeError("not one of ours")
        yield from documents

    with monkeypatch.context() as patch:
        patch.setattr(executors, "steps", lambda *args: [(parts := whole(*args))[0], broken, parts[1]])
        with pytest.raises(Error, match=r"task 2 of 3, 2\.jsonl, did not end well: Ray gave it up; logs"):
            go(source, *RAY)
    assert not (tmp_path / "out/manifest.json").exists()
    go(source, *RAY)
    assert contents(tmp_path / "out") == local


@pytest.mark.slow
def test_a_killed_ray_run_is_finished_by_the_same_command(go, corpus, cluster, tmp_path, tokenizer):
    source, local = corpus
    program = "from smoljax import encode; from train import prepare; encode.TASK = 2000; prepare.main()"
    argv = [str(source), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--workers", "1", *RAY]
    env = os.environ | {"RAY_ADDRESS": cluster}
    process = subprocess.Popen([sys.executable, "-c", program, *argv], cwd=REPO, env=env, stderr=subprocess.DEVNULL)
    until(lambda: list((tmp_path / "out").glob(".prepare/*/logs/completions/*")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/manifest.json").exists()
    go(source, *RAY)
    assert contents(tmp_path / "out") == local


def test_a_ray_cluster_that_is_not_there_is_one_sentence(corpus):
    pytest.importorskip("ray", reason="pip install 'smoljax[ray]'")
    with socket.socket() as held:  # bound, and never listened on
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        program = "from smoljax.errors import run; from train import prepare; raise SystemExit(run(prepare.main))"
        argv = [str(corpus[0]), "--output", str(corpus[0].parent / "lost"), "--train-tokenizer", "290", *RAY]
        done = subprocess.run(
            [sys.executable, "-c", program, *argv], cwd=REPO, env=os.environ | {"RAY_ADDRESS": address},
            capture_output=True, text=True,
        )  # fmt: skip
    want = f"smoljax: the Ray cluster at RAY_ADDRESS={address} cannot be joined: [Errno 111] Connection refused"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == want


def test_without_ray_it_says_what_to_install(go, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'smoljax\[ray\]'"):
        go(corpus[0], "--executor", "ray")
