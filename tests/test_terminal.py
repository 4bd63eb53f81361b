"""A run outlives its terminal, whoever reads its output, and its disk; and names that the system cannot hold."""

import builtins
import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_faults import assert_same_run, child, faulty, place, run, words  # noqa: F401  fixtures

from smoljax import __main__, data, errors, metrics, settings, streams
from train import pretrain

SHORT = ("steps=6", "stages=[]", "save_every=3", "keep=9")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def usual(place):  # noqa: F811
    """What each of these runs has to be."""
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, words(place, "usual", *SHORT)) == 0
    return place / "usual"


# ---- stdin, stdout, stderr


def lose(streams: dict[str, str]):
    """As a process finds its streams that was started so: "1": "closed", "pipe", "terminal" or "full"."""
    for fd, how in streams.items():
        fd = int(fd)
        if how == "closed":
            os.close(fd)
            name = ("stdin", "stdout", "stderr")[fd]
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
            continue
        reader, writer = os.openpty() if how == "terminal" else os.pipe()
        if how == "full":
            writer = os.open("/dev/full", os.O_WRONLY)
        os.dup2(writer, fd)
        for end in {reader, writer}:
            os.close(end)


def without(streams: dict[str, str], faults: dict, *argv) -> int:
    lose(streams)
    data.batches, pretrain.draw_curves = faulty(data.batches, **faults), lambda folder: None
    sys.modules["smoljax.train.pretrain"] = pretrain  # as tests import it
    sys.argv = ["smoljax", "pretrain", *argv]
    return __main__.main()


LOST = {
    "stderr": {"2": "closed"},
    "all": {"0": "closed", "1": "closed", "2": "closed"},
    "reader": {"1": "pipe", "2": "pipe"},
    "terminal": {"0": "terminal", "1": "terminal", "2": "terminal"},
}
LOST_TOO = {
    "stdin": {"0": "closed"},
    "stdout": {"1": "closed"},
    "output": {"1": "closed", "2": "closed"},
    "in-and-err": {"0": "closed", "2": "closed"},
    "in-and-out": {"0": "closed", "1": "closed"},
    "results": {"1": "pipe"},
    "errors": {"2": "pipe"},
    "disk": {"1": "full", "2": "full"},
}


@pytest.mark.parametrize("name", [*LOST, *(pytest.param(name, marks=pytest.mark.slow) for name in LOST_TOO)])
def test_training_goes_on_without_its_streams(place, usual, launcher, name):  # noqa: F811
    argv = words(place, f"lost-{name}", *SHORT)

    ended = launcher.call("test_terminal:without", (LOST | LOST_TOO)[name], {}, *argv)
    assert ended.code == 0, ended.err
    assert_same_run(usual, place / f"lost-{name}", 6)
    for file in (place / f"lost-{name}").glob("*.json*"):  # none was opened as stderr, and warned into
        assert "smoljax:" not in file.read_text()


@pytest.mark.parametrize("lost, code, said", [
    (">&-", 1, "stdout cannot be written: Bad file descriptor"),
    (">/dev/full", 1, "stdout cannot be written: No space left on device"),
    ("2>&-", 0, ""),
    ("2>/dev/full", 0, ""),
    ("<&- 2>&-", 0, ""),
])  # fmt: skip
@pytest.mark.parametrize("argv", ["smoljax --help", "smoljax --version", "train.plan --help"])
def test_results_that_are_lost_are_no_success(lost, code, said, argv):
    command = f"exec {sys.executable} -m {argv} {lost}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and done.stderr.removeprefix("smoljax: ").strip() == said


def test_a_reader_of_results_that_leaves_is_141():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "smoljax", "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_is_said_is_dropped_and_what_results_is_not(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    for forgiving in (True, False):
        stream = io.TextIOWrapper(io.BufferedWriter(streams.Stream(full, "stdout", forgiving)), line_buffering=True)
        if forgiving:
            print("a warning", file=stream, flush=True)
        else:
            with pytest.raises(OSError, match="stdout") as raised:
                print("a result", file=stream, flush=True)
            assert raised.value.errno == errno.ENOSPC
            stream.buffer.raw.forgiving = True  # or it is told as the stream is collected
    os.close(full)


# ---- a terminal that closes


@pytest.mark.parametrize("signals", [[1], [1, 1]])
def test_a_terminal_that_closes_saves_and_the_same_command_goes_on(place, usual, launcher, monkeypatch, signals):  # noqa: F811
    name = f"hangup-{len(signals)}"
    argv = words(place, name, "steps=6", "stages=[]", "save_every=99", "keep=9")
    faults = {"signals": [[3, signal.SIGHUP] for _ in signals]}
    ended = launcher.call("test_terminal:without", LOST["terminal"], faults, *argv)
    assert ended.code == errors.RESUMABLE
    assert run(monkeypatch, argv) == 0
    assert_same_run(usual, place / name, 6)


def test_under_nohup_it_is_no_signal(place, usual, monkeypatch):  # noqa: F811
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(monkeypatch, words(place, "nohup", *SHORT), signals=[(3, signal.SIGHUP)]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_run(usual, place / "nohup", 6)


def test_every_exit_code_is_where_it_is_looked_for():
    readme = (ROOT / "README.md").read_text().partition("Exit codes of `pretrain`:")[2].partition("\n\n")[0]
    script = (ROOT / "configs/launch/restart.sh").read_text().partition("set -u")[0]
    for text in (readme, __main__.HELP.partition("exit codes:")[2], script):
        for code in (0, 1, 2, 3, 4, 75, 129, 130, 134, 137, 141, 143):
            assert f" {code} " in text.replace(",", " ").replace(";", " ").replace("\n", " ").replace(":", " "), (
                code,
                text,
            )


# ---- a disk that is full, or fails

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Filling(io.FileIO):
    """Takes four records and half of the fifth."""

    number, taken = errno.ENOSPC, 0

    def write(self, line) -> int:
        self.taken += 1
        if self.taken == 5:
            return super().write(bytes(line)[: len(line) // 2])
        if self.taken > 5:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(line)


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_a_record_that_the_disk_does_not_take(place, usual, monkeypatch, capsys, number):  # noqa: F811
    name = f"full-{number}"
    argv, file = words(place, name, *SHORT), place / name / "metrics.jsonl"

    def filling(path, mode="r", *args, **kw):
        opened = builtins.open(path, mode, *args, **kw)
        if "a" not in mode:
            return opened
        opened.close()
        opened = Filling(path, mode)
        opened.number = number
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open", filling, raising=False)
        assert run(patch, argv) == 4
    err = capsys.readouterr().err
    assert f"smoljax: {file} cannot be written at step 5: {os.strerror(number)}" in err
    assert "Traceback" not in err and not file.read_text().endswith("\n")
    assert run(monkeypatch, argv) == 0
    assert_same_run(usual, place / name, 6)


@pytest.mark.parametrize(
    "name, code", [("goodput.json", 4), ("config.json", 2), ("sinks.json", 4), ("tokenizer.json", 4)]
)
@pytest.mark.parametrize("number", FULL[:2], ids=errno.errorcode.get)
def test_a_file_that_the_disk_does_not_take(tmp_path, place, monkeypatch, capsys, name, code, number):  # noqa: F811
    import shutil

    write, copy = Path.write_bytes, shutil.copyfile

    def filling(file, content):
        if file.name == f"{name}.part":
            write(file, content[:5])
            raise OSError(number, os.strerror(number))
        return write(file, content)

    def filling_copy(source, file, **kw):
        if Path(file).name == f"{name}.part":
            raise OSError(number, os.strerror(number))
        return copy(source, file, **kw)

    if name == "sinks.json":
        pytest.importorskip("tensorboardX")
    if name == "tokenizer.json" and not (place / "shards/tokenizer.json").exists():
        pytest.skip("these shards have no tokenizer")
    monkeypatch.setattr(Path, "write_bytes", filling)
    monkeypatch.setattr(shutil, "copyfile", filling_copy)
    assert run(monkeypatch, [*words(place, "x", *SHORT, 'sinks=["tensorboard"]'), f"run={tmp_path / 'r'}"]) == code
    err = capsys.readouterr().err
    assert os.strerror(number) in err and str(tmp_path / "r") in err and "Traceback" not in err, err
    assert name in err or code == 2


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_file_system_without_a_byte_left(tmp_path, place, usual, monkeypatch, capfd):  # noqa: F811
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    def fill():
        with open(tmp_path / "filler", "wb", buffering=0) as f:
            while True:
                try:
                    f.write(bytes(256))
                except OSError:
                    return

    argv = [
        *words(place, "x", "steps=200", "stages=[]", "save_every=3", "keep=9", "data.max_epochs=none"),
        f"run={tmp_path / 'r'}",
    ]
    try:
        assert run(monkeypatch, argv, calls={8: fill}) == 4
        err = capfd.readouterr().err
        assert "Traceback" not in err and "Event loop" not in err
        assert f"{tmp_path / 'r'}" in err.strip().splitlines()[-1] and "No space left" in err.strip().splitlines()[-1]
        assert run(monkeypatch, argv) == 2
        (tmp_path / "filler").unlink()
        short = [*words(place, "x", *SHORT), f"run={tmp_path / 'r'}"]
        assert json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
        assert run(monkeypatch, [*short, "steps=12"]) == 0
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# ---- names outside the file system's encoding

CONFIG = (ROOT / "tests/test_faults.py").read_text().partition('CONFIG = """')[2].partition('"""')[0]
IN_CONFIG = {
    "run": 'run="r/ü",',
    "sources": 'data=Data(sources={"shärds": 1.0}, seq_len=16, batch_size=16),',
    "init": 'init_from="wü",',
    "held-out": 'heldout=Heldout(sets={"ü": "shärds"}),',
    "stage": 'stages=[Stage(start=7, sources={"shärds": 1.0})],',
}
ON_THE_LINE = [
    ["pretrain", "demo", "run=rü"],
    ["pretrain", "demo", 'data.sources={"shärds": 1.0}'],
    ["pretrain", "demo", "init_from=ü"],
    ["pretrain", "ü.py"],
    ["prepare", "ü", "--output", "x"],
    ["prepare", "x", "--output", "ü"],
    ["generate", "ü", "--prompt", "a"],
    ["generate", "x", "--prompt", "ü"],
    ["score", "x", "--input", "ü"],
    ["convert", "x", "ü"],
    ["fetch", "ü"],
    ["report", "ü"],
]


def in_ascii(folder, argv):
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    verb, *rest = argv
    program = f"{__main__.VERBS[verb][0]}.{verb}"  # by itself, for the checkout may not be installed
    done = subprocess.run([sys.executable, "-m", program, *rest], capture_output=True, cwd=folder, env=env)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("argv", ON_THE_LINE, ids=" ".join)
def test_a_word_that_is_not_ascii_where_only_ascii_is(tmp_path, argv):
    code, err = in_ascii(tmp_path, argv)
    assert code == 2 and err.count("\n") == 1 and "set PYTHONUTF8=1" in err and "Traceback" not in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", IN_CONFIG)
def test_a_name_of_a_config_that_is_not_ascii_where_only_ascii_is(tmp_path, name):
    changed = CONFIG.replace("config = Train(", "from smoljax.config import *\nimport dataclasses\nconfig = Train(")
    changed += f"\nconfig = dataclasses.replace(config, {IN_CONFIG[name]})\n"
    (tmp_path / "mine.py").write_text(changed, encoding="utf-8")
    assert settings.load(str(tmp_path / "mine.py"))  # nothing else is wrong with it
    code, err = in_ascii(tmp_path, ["pretrain", "mine.py"])
    assert code == 2 and "set PYTHONUTF8=1" in err and err.count("\n") == 1, err
