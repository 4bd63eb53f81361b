"""The tasks of `smoljax prepare` on a cluster, by datatrove's own SLURM and Ray executors.

The tasks, and so the shards, are those of local processes. datatrove 0.10.1 submits and leaves (SLURM), or ends well
with "Only 3/4 tasks completed" in a log (Ray); here the caller waits, and a task that is not done is an error that
names it. The output folder and the inputs lie where all nodes see them, at the same path.
"""

import contextlib
import hashlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from smoljax.encode import Reader, begin, is_done, run_pipeline, say, steps
from smoljax.errors import Error, UsageError, require

RESOURCES = {"cpus_per_task": int, "mem_per_cpu_gb": int}
KEYS = {
    "local": {},
    "slurm": {"partition": str, "time": str, **RESOURCES, "max_array_size": int}
    | dict.fromkeys(["account", "qos", "constraint", "reservation"], str),
    "ray": RESOURCES,
}
POLL = 10  # seconds between looks at the queue
LATE = 90  # seconds after a job's end in which its files may still appear: NFS shows a folder up to 60 s old


def options(executor: str, text: str | None) -> dict:
    """`partition=cpu,time=4:00:00` checked for this executor; a UsageError names the key that is wrong or missing."""
    keys, found = KEYS[executor], {}
    for item in (text or "").split(",") if text else ():
        key, equals, value = item.partition("=")
        expected = f"--executor {executor} takes {', '.join(keys) or 'none'}"
        require(bool(equals and value), f"--cluster has {item!r}, expected KEY=VALUE,...: {expected}")
        require(key in keys, f"--cluster has {key!r}: {expected}")
        require(key not in found, f"--cluster has {key} twice: name it once")
        whole = keys[key] is str or (value.isdecimal() and int(value) > 0)
        require(whole, f"--cluster has {item}, expected a whole number, 1 or more")
        found[key] = keys[key](value)
    if executor == "slurm":
        require(
            "partition" in found and "time" in found, "--executor slurm needs --cluster partition=NAME,time=H:MM:SS"
        )
    return {"cpus_per_task": 1, "mem_per_cpu_gb": 4} | found if keys else found


def run(executor: str, reader: Reader, out: Path, workers: int, seed: int, cluster: dict) -> None:
    """Do the tasks that are not done, `workers` of them at once (-1: all); an Error where one is not done at the end.

    `cluster` is what `options` gave.
    """
    mark, name = reader.work / "slurm", job_name(reader.work)
    if executor != "slurm" and mark.exists():  # its tasks would write into the same files
        say(f"an earlier command gave this to SLURM as {name} (if that is long gone, remove {mark})")
        require(not queue(name), f"{name} is still in the queue: go on with --executor slurm, or scancel --name {name}")
        mark.unlink()
    if executor == "local":
        run_pipeline(reader, out, workers, seed)
    else:
        {"slurm": slurm, "ray": on_ray}[executor](reader, out, workers, seed, cluster)


# ---- what both have


@contextlib.contextmanager
def quiet(log: Path):
    """datatrove's words in a file: its loguru writes to stderr."""
    from datatrove.utils.logging import logger, setup_default_logger

    logger.remove()
    logger.add(log)
    try:
        yield
    finally:
        logger.remove()
        setup_default_logger()


def undone(reader: Reader, todo: list[int]) -> list[int]:
    """Those without datatrove's completion mark; a listing, so that NFS looks again."""
    folder = reader.work / "logs/completions"
    marks = set(os.listdir(folder)) if folder.exists() else ()
    return [rank for rank in todo if f"{rank:05d}" not in marks]


def failure(reader: Reader) -> Error | None:
    """What a task left that ended with a sentence of its own: bad text, another version."""
    for file in sorted((reader.work / "failed").glob("*.json")):
        code, sentence = json.loads(file.read_text())
        error = Error(sentence)
        error.code = code
        return error
    return None


def check(reader: Reader, out: Path, todo: list[int], what: str) -> None:
    """Every task of `todo` is done, or an Error says which is not, and what `what` says of it."""
    if error := failure(reader):
        raise error
    if lost := [rank for rank in todo if not is_done(reader, out, rank)]:
        first, *_, last = [source.name for source in reader.tasks[lost[0]]] * 2
        files = first if first == last else f"{first} ... {last}"
        more = f" (and {len(lost) - 1} more: {', '.join(map(str, lost[1:6]))}{' ...' * (len(lost) > 6)})"
        raise Error(
            f"task {lost[0]} of {len(reader.tasks)}, {files}, did not end well{more if lost[1:] else ''}: {what}; logs "
            f"are in {reader.work / 'logs'}; mend it and run the same command again, finished tasks are kept"
        )


# ---- SLURM


def job_name(work: Path) -> str:
    """The same for the same input and output: how a later command finds the job that an earlier one submitted."""
    return f"smoljax-{work.name}-{hashlib.sha256(str(work).encode()).hexdigest()[:8]}"


def queue(name: str) -> list[str]:
    """State and reason of the job's parts that wait or run: ["PENDING (Priority)", "RUNNING"]."""
    command = ["squeue", "--noheader", "--name", name, "--user", str(os.getuid()), "--format", "%T (%r)"]
    for attempt in range(30):  # slurmctld is deaf at times
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise UsageError("there is no squeue here: run it where SLURM's commands are, as on a login node") from None
        if not done.returncode:
            return sorted({line.removesuffix(" (None)") for line in done.stdout.splitlines()})
        if not attempt:
            say(f"squeue fails, trying again for {30 * POLL:.0f} s: {done.stderr.strip()}")
        time.sleep(POLL)
    raise Error(f"squeue fails: {done.stderr.strip()}; the job may go on, run the same command again to wait for it")


def slurm(reader: Reader, out: Path, workers: int, seed: int, cluster: dict) -> None:
    """Submit an array of one task each, unless an earlier command's is at work, and wait for its end."""
    from datatrove.executor import SlurmPipelineExecutor

    inside = "SLURM_ARRAY_TASK_ID" in os.environ  # datatrove would take itself for one of its own tasks
    require(not inside, "--executor slurm submits a job array, and this is one: run it on a login node")
    work, name = reader.work, job_name(reader.work)
    plain = shlex.quote(str(work)) == str(work)
    require(plain, f"--output {out}: datatrove's job script holds no such path; name one without spaces and signs")
    if queue(name):
        say("a job of an earlier command is at work on this, and is waited for first")
        wait(reader, name, list(range(len(reader.tasks))), earlier=True)
    if not (todo := begin(reader, out)):
        return
    (work / "failed").mkdir()
    cluster = dict(cluster)
    others = {key: cluster.pop(key) for key in ("account", "constraint", "reservation") if key in cluster}
    threads = cluster["cpus_per_task"]
    executor = SlurmPipelineExecutor(
        steps(reader, seed),
        tasks=len(reader.tasks),
        workers=workers,
        job_name=name,
        logging_dir=str(work / "logs"),
        # This Python's programs, not those that a login shell finds.
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH RAYON_NUM_THREADS={threads}",
        srun_args={"cpus-per-task": threads},  # srun does not take over sbatch's since SLURM 22.05
        sbatch_args=others,
        **{"qos": "", **cluster},
    )
    executor.launch_merge_stats = lambda: None  # a job after the job, which would wait for ever if that failed
    (work / "slurm").touch()
    began = time.strftime("%Y-%m-%dT%H:%M:%S")
    try:
        with quiet(work / "logs/executor.log"):
            executor.run()
    except FileNotFoundError:
        raise UsageError("there is no sbatch here: run it where SLURM's commands are, as on a login node") from None
    except subprocess.CalledProcessError as e:
        raise Error(f"sbatch refused the job (exit {e.returncode}; it says why above): change --cluster") from None
    wait(reader, name, todo)
    if not queue(name):
        (work / "slurm").unlink()
    check(reader, out, todo, states(name, began))


def wait(reader: Reader, name: str, todo: list[int], earlier: bool = False) -> None:
    """Until all of `todo` are done, or one has left a sentence, or the job has left the queue and its files had time.

    An `earlier` command's job may end as it likes, but it must have ended: another would write into the same files.
    """
    told, seen = None, time.monotonic()
    while left := undone(reader, todo):
        if failure(reader) and not earlier:
            return
        if now := queue(name):
            seen = time.monotonic()
        elif earlier or time.monotonic() - seen > LATE:
            return
        if (news := f"{len(todo) - len(left)} of {len(todo)} tasks done; {name}: {', '.join(now) or 'ended'}") != told:
            say(told := news)
        try:
            time.sleep(POLL)
        except KeyboardInterrupt:
            say(f"the job goes on: the same command waits for it again, `scancel --name {name}` ends it")
            raise


def states(name: str, began: str) -> str:
    """What SLURM's accounting, where there is one, says of the job since `began`: "SLURM says OUT_OF_MEMORY"."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format", "State", "--name", name, "-S", began]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        found = []
    bad = sorted({state.partition(" ")[0] for state in found} - {"COMPLETED", "RUNNING", "PENDING", ""})
    return f"SLURM says {', '.join(bad)}" if bad else "SLURM says nothing of it (do all nodes see that folder?)"


# ---- Ray


def reachable(folder: str) -> bool:
    """Run once on every node: there is smoljax, or this could not be called; is there the folder?"""
    return Path(folder).is_dir()


def on_ray(reader: Reader, out: Path, workers: int, seed: int, cluster: dict) -> None:
    """Run the tasks on the Ray cluster of RAY_ADDRESS, else the one that runs here, else one started for this."""
    try:
        import ray
    except ImportError:
        raise UsageError("--executor ray needs Ray: pip install 'smoljax[ray]'") from None
    from datatrove.executor import RayPipelineExecutor

    if not (todo := begin(reader, out)):
        return
    (reader.work / "failed").mkdir()
    ours, address = not ray.is_initialized(), os.environ.get("RAY_ADDRESS", "")
    try:
        host, _, port = address.rpartition(":")
        if ours and port.isdecimal() and "/" not in host:  # where nobody listens, Ray 2.60 goes on trying for > 6 min
            socket.create_connection((host, int(port)), timeout=30).close()
        if ours:
            ray.init(logging_level="ERROR", log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as e:
        where = f"at RAY_ADDRESS={address}" if address else "of this machine"
        raise Error(f"the Ray cluster {where} cannot be joined: {str(e).splitlines()[0]}") from e
    ended = threading.Event()
    try:
        check_nodes(reader, cluster)
        threading.Thread(target=tell, args=(reader, todo, ended), daemon=True).start()
        environment = {"env_vars": {"RAYON_NUM_THREADS": str(cluster["cpus_per_task"])}}
        with quiet(reader.work / "logs/executor.log"):
            RayPipelineExecutor(
                steps(reader, seed),
                tasks=len(reader.tasks),
                workers=workers,
                logging_dir=str(reader.work / "logs"),
                ray_remote_kwargs={"runtime_env": environment},
                **cluster,
            ).run()
    finally:
        ended.set()
        if ours:
            ray.shutdown()
    check(reader, out, todo, "Ray gave it up")


def check_nodes(reader: Reader, cluster: dict) -> None:
    """What datatrove would wait for without a word: a node that has the room; and that each can run a task at all."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus, memory = cluster["cpus_per_task"], cluster["cpus_per_task"] * cluster["mem_per_cpu_gb"]
    room = [n["Resources"].get("CPU", 0) >= cpus and n["Resources"].get("memory", 0) >= memory << 30 for n in nodes]
    if not any(room):
        say(f"no node of the Ray cluster has {cpus} CPUs and {memory} GB yet; waiting for one (see --cluster)")
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0, scheduling_strategy=here, max_retries=0)(reachable)
        where = f"the Ray node {node['NodeManagerAddress']}"
        try:
            sees = ray.get(look.remote(str(reader.work)), timeout=300)
        except Exception as e:  # Ray has many: what the node said is the last line of them all
            raise Error(f"{where} cannot run a task: {str(e).splitlines()[-1]}; install smoljax there as here") from e
        require(sees, f"{where} does not see {reader.work}: give an --output that all nodes share")


def tell(reader: Reader, todo: list[int], ended: threading.Event) -> None:
    told = None
    while not ended.is_set():
        if (left := len(undone(reader, todo))) != told:
            say(f"{len(todo) - left} of {len(todo)} tasks done")
            told = left
        ended.wait(2)
