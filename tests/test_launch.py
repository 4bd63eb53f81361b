"""configs/launch: what starts runs on clusters. The scripts really run, with programs of ours in place of smoljax,
srun, scontrol and gcloud; nothing here has seen a real cluster. jobset.yaml and the Dockerfile are read only."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from smoljax import settings
from smoljax.config import Guard

REPO = Path(__file__).resolve().parents[1]
LAUNCH = REPO / "configs/launch"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["restart.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


# ---- restart.sh

# Does what the next line of `plan` says: an exit code, or 134 as abort() leaves it; before that maybe a checkpoint.
FAKE = """#!/usr/bin/env bash
cd "$(dirname "$0")"
printf '%s\\n' "$*" >>ran
read -r code folder < <(sed -n "$(wc -l <ran)p" plan)
[[ -z $folder ]] || mkdir -p "run/checkpoints/$folder"
[[ $code != 134 ]] || kill -ABRT $$
exit "$code"
"""


def restart(folder: Path, plan: list[str], **env):
    program(folder / "fake", FAKE)
    (folder / "plan").write_text("\n".join(plan) + "\n")
    argv = ["bash", LAUNCH / "restart.sh", folder / "fake", "pretrain", f"run={folder / 'run'}", 'a={"b": 0.5}']
    done = subprocess.run(argv, env=os.environ | {"PAUSE": "0.01"} | env, capture_output=True, text=True, timeout=120)
    ran = (folder / "ran").read_text().splitlines()
    assert set(ran) == {f'pretrain run={folder / "run"} a={{"b": 0.5}}'}
    return done.returncode, len(ran), done.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130])
def test_restart_ends_with_the_code_of_what_cannot_go_on(tmp_path, code):
    assert restart(tmp_path, [str(code)])[:2] == (code, 1)


@pytest.mark.parametrize("code", [75, 134, 137])
def test_restart_goes_on_after_a_resumable_end(tmp_path, code):
    assert restart(tmp_path, [str(code), "0"])[:2] == (0, 2)
    (tmp_path / "ran").unlink()
    assert restart(tmp_path, [str(code), str(code), "4"])[:2] == (4, 3)


def test_restart_gives_up_without_progress(tmp_path):
    code, runs, err = restart(tmp_path, ["75"] * 9)
    assert (code, runs) == (75, 4) and "3 restarts in a row brought no checkpoint" in err.splitlines()[-1]
    (tmp_path / "ran").unlink()
    assert restart(tmp_path, ["134"] * 9, MAX_RESTARTS="0")[:2] == (134, 1)


def test_a_new_checkpoint_is_progress(tmp_path):
    plan = ["75", "75 5", "134 10", "75", "75", "75 100", "75", "75", "0"]  # 100 is after 10, as a number
    assert restart(tmp_path, plan, MAX_RESTARTS="2")[:2] == (0, 9)
    (tmp_path / "ran").unlink()
    half = ["75 200.orbax-checkpoint-tmp", "75 201.part", "75 x", "0"]
    assert restart(tmp_path, half, MAX_RESTARTS="2")[:2] == (75, 3)


def test_restart_wants_a_run():
    done = subprocess.run(["bash", LAUNCH / "restart.sh", "true"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("restart.sh: expected a command that says run=DIR")


# Like pretrain: the first signal saves and exits 75, a second one ends it at once.
SAVING = f"""#!{sys.executable}
import os, signal, sys, time
def hear(number, frame):
    with open("signals", "a") as file:
        file.write(f"{{number}}\\n")
    asked.append(number)
asked = []
signal.signal(signal.SIGTERM, hear)
signal.signal(signal.SIGINT, hear)
open("ready", "w").close()
while not asked:
    time.sleep(0.01)
time.sleep(0.3)  # what a save takes; another signal would be heard by now
sys.exit(75 if len(asked) == 1 else 9)
"""


@pytest.mark.parametrize("whom", ["the loop", "a terminal", "a terminal that closes"])
def test_a_stopped_restart_passes_it_on_once_and_ends(tmp_path, whom):
    program(tmp_path / "fake", SAVING)
    argv = ["bash", LAUNCH / "restart.sh", tmp_path / "fake", "run=run"]
    # A suite that runs in the background inherits an ignored SIGINT, which bash could then not trap.
    hear = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    hear += "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", hear, *argv], cwd=tmp_path, start_new_session=True)
    until((tmp_path / "ready").exists)
    if whom == "the loop":
        process.send_signal(signal.SIGTERM)
    elif whom == "a terminal that closes":
        os.killpg(process.pid, signal.SIGHUP)
    else:
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C: to the whole process group
    assert process.wait(timeout=120) == 75
    assert (tmp_path / "signals").read_text() == f"{signal.SIGTERM:d}\n"


def test_a_restart_stopped_in_its_pause_ends_at_once(tmp_path):
    program(tmp_path / "fake", "#!/bin/sh\nexit 75\n")
    argv = ["bash", LAUNCH / "restart.sh", tmp_path / "fake", f"run={tmp_path}"]
    env = os.environ | {"PAUSE": "1000"}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    assert "exit code 75, starting again in 1000 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    process.stderr.close()


# ---- slurm.sbatch


def directives() -> dict[str, str]:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    return dict(line[10:].partition("=")[::2] for line in lines if line.startswith("#SBATCH --"))


def test_slurm_gives_each_gpu_a_process():
    """jax's SlurmCluster takes SLURM_LOCALID as the process's only device, of all that the node shows."""
    said = directives()
    assert said["ntasks-per-node"] == said["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind", "gpus", "gres"} & said.keys()
    assert said["requeue"] == "" and said["signal"].startswith("TERM@")  # no B: the processes, not this script
    assert int(said["signal"].removeprefix("TERM@")) > Guard().grace_s


# 2 nodes of 2 tasks. Its own code is the largest of the tasks', as slurm's srun.c takes the maximum.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
flags = ["--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=8", "--gpu-bind=none", "--label"]
assert sys.argv[1:6] == flags, sys.argv
tasks = [{{"SLURM_PROCID": i, "SLURM_LOCALID": i % 2, "SLURM_NTASKS": 4}} for i in range(4)]
codes = []
for task in tasks:
    env = os.environ | {{name: str(value) for name, value in task.items()}}
    codes.append(subprocess.run(sys.argv[6:], env=env).returncode)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
TASK = f"""#!{sys.executable}
import json, os, sys
home = os.path.dirname(os.path.abspath(__file__))
with open(home + "/tasks", "a") as file:
    file.write(json.dumps([int(os.environ["SLURM_PROCID"]), sys.argv[1:]]) + "\\n")
with open(home + "/code") as file:
    code = file.read().split()
os.makedirs(home + "/a run/checkpoints/" + code[1], exist_ok=True) if code[1:] else None
if code[0] == "134":
    os.abort()
sys.exit(int(code[0]) if os.environ["SLURM_PROCID"] == "2" else 0)
"""


def sbatch(folder: Path, code: str):
    """One turn of the job: its exit code, and whether it went back into the queue."""
    program(folder / "srun", SRUN)
    program(folder / "fake", TASK)
    program(folder / "scontrol", f'#!/bin/sh\necho "$*" >>{folder}/requeued\n')
    (folder / "code").write_text(code)
    (folder / "requeued").unlink(missing_ok=True)
    script = shutil.copy(LAUNCH / "slurm.sbatch", folder / "slurm_script")  # SLURM runs a copy, elsewhere
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    argv = ["bash", script, "smollm2-135m", f"run={folder}/a run", 'data.sources={"a": 0.5}']
    done = subprocess.run(argv, env=env | {"SMOLJAX": str(folder / "fake")}, cwd=folder, capture_output=True, text=True)
    queued = (folder / "requeued").read_text() if (folder / "requeued").exists() else ""
    assert queued in ("", "requeue 7\n")
    return done.returncode, bool(queued)


def test_slurm_runs_every_task_with_the_same_command(tmp_path):
    assert sbatch(tmp_path, "0") == (0, False)
    tasks = [json.loads(line) for line in (tmp_path / "tasks").read_text().splitlines()]
    command = ["pretrain", "smollm2-135m", f"run={tmp_path}/a run", 'data.sources={"a": 0.5}']
    assert tasks == [[i, command] for i in range(4)]


@pytest.mark.parametrize(
    ("code", "queued"), [("75", True), ("134", True), ("137", True), ("1", False), ("2", False), ("4", False)]
)
def test_slurm_queues_again_what_can_go_on(tmp_path, code, queued):
    assert sbatch(tmp_path, code) == (0 if queued else int(code), queued)


def test_slurm_gives_up_without_progress(tmp_path):
    assert [sbatch(tmp_path, "75")[1] for _ in range(2)] == [True, True]
    assert [sbatch(tmp_path, f"75 {n}")[1] for n in (5, 10)] == [True, True]  # progress: counted afresh
    assert [sbatch(tmp_path, "75 10") for _ in range(4)] == [(0, True)] * 3 + [(75, False)]


def test_slurm_wants_a_run(tmp_path):
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "demo"], capture_output=True, text=True)
    assert done.returncode == 2 and "expected a config and run=DIR" in done.stderr


# ---- tpu_vm.sh

GCLOUD = """#!/usr/bin/env bash
# Two hosts, which are two home folders.
cd "$(dirname "$0")"
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]] || exit 9
verb=$4; shift 4
for argument in "$@"; do
    case $argument in
    --worker=all) hosts=(0 1) ;;
    --worker=0) hosts=(0) ;;
    --command) seen=yes ;;
    *) [[ -z ${seen:-} ]] || command=$argument ;;
    esac
done
echo "$verb $*" >>asked
for host in "${hosts[@]}"; do
    mkdir -p "home$host"
    case $verb in
    scp) cp "$1" "home$host/${2#*:}" ;;
    ssh) (cd "home$host" && HOME=$PWD bash -c "$command") || exit ;;
    esac
done
"""


def tpu_vm(folder: Path, *argv, **env):
    program(folder / "gcloud", GCLOUD)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "NAME": "tpu", "ZONE": "zone"} | env
    return subprocess.run(
        ["bash", LAUNCH / "tpu_vm.sh", *argv], env=env, cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("missing", ["NAME", "ZONE"])
def test_tpu_vm_wants_a_name_and_a_zone(tmp_path, missing):
    done = tpu_vm(tmp_path, "stop", **{missing: ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "asked").exists()
    assert done.stderr.startswith("tpu_vm.sh: NAME and ZONE of the TPU VM are not set")


def test_tpu_vm_refuses_what_it_does_not_know(tmp_path):
    for argv in [], ["begin"], ["start"]:
        done = tpu_vm(tmp_path, *argv)
        assert done.returncode == 2 and "tpu_vm.sh: expected" in done.stderr and not (tmp_path / "asked").exists()


def test_tpu_vm_starts_and_stops_all_hosts(tmp_path):
    homes = [tmp_path / "home0", tmp_path / "home1"]
    for home in homes:
        program(
            home / "smoljax-env/bin/smoljax", SAVING.replace("asked = []", 'asked = []; print("\\n".join(sys.argv))')
        )
        (home / "smoljax").symlink_to(REPO)
    command = ["smollm2-135m", "run=/shared/a run", 'data.sources={"a": 0.5, "b\'s": 0.5}', "x=$HOME"]
    assert tpu_vm(tmp_path, "start", *command, PROJECT="mine").returncode == 0
    assert (tmp_path / "asked").read_text().startswith("ssh tpu --zone zone --project mine --worker=all --command")
    until(lambda: all((home / "ready").exists() for home in homes))
    again = tpu_vm(tmp_path, "start", *command)
    assert again.returncode == 1 and "stop it first" in again.stderr
    pids = [int((home / "smoljax.pid").read_text()) for home in homes]
    assert tpu_vm(tmp_path, "stop").returncode == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    for home in homes:
        assert (home / "signals").read_text() == f"{signal.SIGTERM:d}\n"
        assert (home / "smoljax.log").read_text().splitlines()[-5:] == ["pretrain", *command]


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="it installs what is committed: needs a git checkout")
def test_tpu_vm_installs_what_is_committed(tmp_path):
    uv = '#!/bin/sh\necho "$*" >>~/uv-asked\nmkdir -p ~/smoljax-env/bin\n'
    uv += 'printf "#!/bin/sh\\necho smoljax 1" >~/smoljax-env/bin/smoljax\nchmod +x ~/smoljax-env/bin/smoljax\n'
    for host in "home0", "home1":
        program(tmp_path / host / ".local/bin/uv", uv)
    done = tpu_vm(tmp_path, "install")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["smoljax 1"] * 2), done.stderr
    for host in "home0", "home1":
        assert (tmp_path / host / "smoljax/pyproject.toml").is_file()
        assert (tmp_path / host / "uv-asked").read_text().splitlines()[1].endswith("-e smoljax[tpu]")


# ---- jobset.yaml and the Dockerfile: read, against the names of their formats

# kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go; batch/v1 and core/v1 of Kubernetes. What is used here.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"network", "failurePolicy", "replicatedJobs", "successPolicy", "ttlSecondsAfterFinished"},
    "network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rules": {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"},
    "replicatedJobs": {"name", "replicas", "template"},
    "job": {"completions", "parallelism", "completionMode", "backoffLimit", "podFailurePolicy", "template"},
    "pod": {"restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "containers", "volumes"},
    "container": {"name", "image", "command", "securityContext", "resources", "volumeMounts"},
}


def test_jobset():
    text = (LAUNCH / "jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = spec["failurePolicy"]["rules"]
    found = {"": jobset, "spec": spec, "network": spec["network"], "failurePolicy": spec["failurePolicy"]}
    found |= {"rules": rule, "replicatedJobs": replicated, "job": job, "pod": pod, "container": container}
    for where, part in found.items():
        assert part.keys() <= FIELDS[where], where
    # One pod for each host, and one host's failure is the job's.
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    # What cannot go on fails the set: a Job that podFailurePolicy ends has that reason.
    assert spec["failurePolicy"]["restartStrategy"] in ("Recreate", "BlockingRecreate", "InPlaceRestart")
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    (codes,) = job["podFailurePolicy"]["rules"]
    assert codes["action"] == "FailJob" and codes["onExitCodes"].keys() == {"containerName", "operator", "values"}
    assert (codes["onExitCodes"]["operator"], codes["onExitCodes"]["values"]) == ("NotIn", [75, 134, 137, 143])
    assert codes["onExitCodes"]["containerName"] == container["name"] and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > Guard().grace_s
    # All of it together: mounts, the command, and the names in the GPU's example.
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    assert container["command"][:3] == ["restart.sh", "smoljax", "pretrain"]
    config = settings.load(container["command"][3], container["command"][4:])
    mount = container["volumeMounts"][0]["mountPath"]
    assert config.run.startswith(mount) and all(path.startswith(mount) for path in config.data.sources)
    name = jobset["metadata"]["name"]
    assert f"--coordinator {name}-{replicated['name']}-0-0.{name}:" in text
    assert f"--num-processes {job['completions']} " in text


def test_dockerfile():
    """As far as reading goes: there is no docker here, and nothing has built it."""
    text = re.sub(r"\\\n\s*", "", (LAUNCH / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    verbs = [verb for verb, _ in steps]
    assert set(verbs) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT"} and verbs[0] == "FROM"
    said = {verb: rest for verb, rest in steps}
    assert said["FROM"].startswith("python:3.") and said["USER"] not in ("root", "0")
    assert json.loads(said["ENTRYPOINT"]) == ["smoljax"] and verbs.index("RUN") < verbs.index("USER")
    built = tomllib.loads((REPO / "pyproject.toml").read_text())
    extras = built["project"]["optional-dependencies"]
    assert said["ARG"].removeprefix("EXTRA=") in extras and "tpu" in extras
    copied = {source for verb, rest in steps if verb == "COPY" for source in rest.split()[:-1]}
    assert all((REPO / source).exists() for source in copied)
    # The build needs the packages, and what pyproject.toml reads.
    package = built["tool"]["setuptools"]["package-dir"].values()
    assert copied == {*package, "pyproject.toml", built["project"]["readme"], *built["project"]["license-files"]}
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == copied and "*" in ignore
