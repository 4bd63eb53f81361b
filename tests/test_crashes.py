"""Runs that are killed at any moment and at every write, and one that is watched for long.

`python tests/test_crashes.py < JOBS` runs each of a JSON list of jobs, {"argv": [...]} and faults, in a process of its
own that is forked from one where all is imported: a start costs a second in place of five. Prints their exit codes.
Curves are drawn where the changes of files are counted, and nowhere else: they are half of a short run's time.
"""

import builtins
import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import corpus
import launch
import numpy as np
import pytest
import test_faults as faults
import test_pretrain as whole

from smoljax import committed, errors, metrics, sums

pytestmark = pytest.mark.slow
V = 64
CONFIG = """
from smoljax.config import Data, Guard, Model, Optim, Stage, Train

config = Train(
    model=Model(32, 64, 2, 2, 1, head_dim=16, vocab_size=64, max_position_embeddings=16),
    steps=16,
    data=Data(seq_len=8, batch_size=4),
    optim=Optim(lr=1e-2, warmup_steps=2),
    guard=Guard(spike_window=4, spike_sigma=2.0, max_skips=99),
    stages=[Stage(start=9, seq_len=16, rope_theta=1e5)],
    save_every=1,
    init_std=0.1,
)
"""


# ---- the process that forks


def main():
    for module in launch.HEAVY:
        importlib.import_module(module)
    from train import pretrain

    gc.freeze()
    codes = []
    for job in json.load(sys.stdin):
        begun, pid = time.monotonic(), os.fork()
        if not pid:
            with open(job["log"], "a") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            if not job.get("ends_at"):
                pretrain.draw_curves = lambda folder: None
            else:
                end_at(job["ends_at"], job["within"], job.get("count"))
            if job.get("watched"):
                keep_watch(job["watched"])
            os._exit(errors.run(pretrain.main, job["argv"]))
        if "after" in job:
            threading.Timer(job["after"], os.kill, (pid, signal.SIGKILL)).start()
        status = os.waitpid(pid, 0)[1]
        codes.append([os.waitstatus_to_exitcode(status), time.monotonic() - begun])
    print(json.dumps(codes))


CHANGES = ("open", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir", "truncate")


def end_at(k: int, within: str, file: str | None):
    """This process ends, as by kill -9, before it changes the k-th file or folder below `within`.

    One that ends by itself leaves in `file` how many it changed.
    """
    count, lock, leave = [0], threading.Lock(), os._exit

    def last(code):
        if file:
            with open(file, "w") as f:
                f.write(str(count[0]))
        leave(code)

    os._exit = last

    def counted(call):
        def changed(path, *args, **kw):
            name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
            reads = call.__name__ == "open" and not changes(call, *args, **kw)
            if not reads and (str(name).startswith(within) or kw.get("dir_fd") is not None):
                with lock:
                    count[0] += 1
                    if count[0] == k:
                        os.kill(os.getpid(), signal.SIGKILL)
            return call(path, *args, **kw)

        return changed

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)


def changes(call, *args, **kw) -> bool:
    how = args[0] if args else kw.get("mode", kw.get("flags", "r"))
    return bool(how & (os.O_WRONLY | os.O_RDWR)) if isinstance(how, int) else any(c in how for c in "wax+")


def keep_watch(file: str):
    """Every 100 steps: how many open files and threads this process has, and how much it has compiled."""
    import jax

    from smoljax import data

    seen, compiled, feed = [], [], data.batches
    handler = logging.Handler()
    handler.emit = lambda record: record.getMessage().startswith("Compiling ") and compiled.append(record)
    logging.getLogger("jax").addHandler(handler)
    jax.config.update("jax_log_compiles", True)

    def batches(rows, start, stop, sharding):
        for n, batch in enumerate(feed(rows, start, stop, sharding), start + 1):
            if n % 100 == 0:
                counts = {
                    what: len(os.listdir(f"/proc/self/{at}")) for what, at in (("fds", "fd"), ("threads", "task"))
                }
                seen.append({"step": n, "compiled": len(compiled)} | counts)
                with open(file, "w") as f:
                    json.dump(seen, f)
            yield batch

    data.batches = batches


# ---- the tests


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashes")
    (folder / "tiny.py").write_text(CONFIG)
    corpus.write(folder / "shards", corpus.documents(100, V), V)
    return folder


def job(place, name, *settings, **more):
    argv = [str(place / "tiny.py"), f"data.sources={place / 'shards'}", f"run={place / name}", *settings]
    return {"argv": argv, "log": str(place / f"{name}.log")} | more


def run_all(jobs):
    """[(exit code, seconds)] of each job, one after the other, on one device."""
    env = os.environ | launch.fake_devices(1) | {"PYTHONPATH": str(whole.ROOT)}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(jobs), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The run as it should be, and the seconds that it takes."""
    [[code, _], [again, seconds]] = run_all([job(place, "whole"), job(place, "timed")])  # the second finds all compiled
    assert code == again == 0, (place / "whole.log").read_text()
    faults.assert_same_run(place / "whole", place / "timed", 16)
    assert faults.records(place / "whole")[-1]["train/skipped_steps"] > 0
    return place / "whole", seconds


def assert_sound(folder):
    """What a kill left: the newest checkpoint that is listed is whole, and so is every record.

    An older one may be half deleted; then its sums say so, and the next save clears it away.
    """
    *older, newest = committed.steps(folder) or [None]
    for step in older:
        assert "is missing" in (sums.damage(folder / "checkpoints" / str(step)) or "is missing"), step
    if newest:
        assert sums.damage(folder / "checkpoints" / str(newest)) is None
        assert {"model.embed", "opt.1.mu.embed", "guard.recent"} < whole.arrays(folder, newest).keys()
    assert [r["step"] for r in metrics.read(folder)] == list(range(1, len(metrics.read(folder)) + 1))


def test_killed_at_any_moment_several_times(place, uninterrupted):
    one, seconds = uninterrupted
    left, killed = {}, 0
    while any(left.values()) or len(left) < 20 or (killed <= 20 and len(left) < 60):  # a busy machine's moments miss
        if not any(left.values()):
            for seed in range(len(left), max(20, len(left) + 5)):
                rng = np.random.default_rng(seed)
                every = f"save_every={rng.choice([1, 1, 2, 5])}"
                moments = rng.uniform(0.1, 1, int(rng.integers(1, 4))) * seconds
                left[f"seed-{seed}"] = [(every, float(moment)) for moment in moments]
        names = [name for name, kills in left.items() if kills]
        for code, _ in run_all([job(place, n, k[0], after=k[1]) for n in names for k in [left[n].pop()]]):
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
        for name in names:
            assert_sound(place / name)
    assert killed > 20  # the others had ended before
    assert {code for code, _ in run_all([job(place, name) for name in left])} == {0}
    for name in left:
        faults.assert_same_run(one, place / name, 16)
        assert "Traceback" not in (place / f"{name}.log").read_text()


SHORT = ("stages=[]", "steps=2", "keep=1")  # a first save, and one that deletes the first


def test_killed_before_every_second_change_of_a_file(place):
    """At the places where a run makes, names or removes a file, about 120: the first ten, and then every other one.

    What TensorStore writes, in native code, is not among them; the kills at any moment hit that.
    """
    short, last = place / "short", 10**9
    [[code, _]] = run_all([job(place, "short", *SHORT, ends_at=last, within=str(place), count=str(place / "count"))])
    assert code == 0
    count = int((place / "count").read_text())
    assert count > 60
    ks = [*range(1, 11), *range(12, count, 2)]
    killed = run_all([job(place, f"at-{k}", *SHORT, ends_at=k, within=str(place)) for k in ks])
    for k in ks:
        assert_sound(place / f"at-{k}")
    resumed = run_all([job(place, f"at-{k}", *SHORT) for k in ks])
    for k, (code, _), (again, _) in zip(ks, killed, resumed, strict=True):
        log = (place / f"at-{k}.log").read_text()
        assert code in (0, -signal.SIGKILL) and again == 0 and "Traceback" not in log, (k, code, again, log)
        faults.assert_same_run(short, place / f"at-{k}", 2)
        assert committed.newest_sound(place / f"at-{k}") == 2


def test_2000_steps_and_50_saves_leave_nothing_behind(place):
    """Host memory, open files and threads do not grow, and nothing is compiled, from a tenth of the run on."""
    wide = ("model.hidden_size=128", "model.intermediate_size=512")
    argv = job(place, "long", "stages=[]", "steps=2000", "save_every=40", "guard.check_every=100", *wide)
    [[code, _]] = run_all([argv | {"watched": str(place / "watched.json")}])
    assert code == 0, (place / "long.log").read_text()
    assert committed.steps(place / "long") == [1960, 2000]
    steps, rss = np.array([[r["step"], r["host/rss_gb"] * 1e3] for r in metrics.read(place / "long")])[400:].T
    per_save = np.polyfit(steps, rss, 1)[0] * 40  # MB
    print(f"{per_save:.2f} MB a save, {rss[0]:.0f} to {rss[-1]:.0f} MB")
    # A state is 12 x 395,000 bytes = 4.7 MB, which one that is kept with each save would add. Orbax keeps some 0.1 MB
    # of TensorStore's counters, whatever the model's size, and glibc's arenas grow at first: 0.3 to 0.9 MB a save were
    # measured, 0.015 without saves.
    assert per_save < 4.7 / 2
    seen = json.loads((place / "watched.json").read_text())
    late = [s for s in seen if s["step"] > 200]
    assert len(late) == 18
    for what in ("fds", "threads"):
        # The least of each half, for in between a save is in flight; pools of threads fill slowly, and one more with
        # each save would be 20.
        halves = [min(s[what] for s in half) for half in (late[:9], late[9:])]
        assert halves[1] <= halves[0] + 5, (what, late)
    assert late[0]["compiled"] == late[-1]["compiled"] > 0, late[-1]


if __name__ == "__main__":
    main()
