"""smoljax.hub through the real client, each time in a process of its own: it reads its settings when it is imported."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import launch
import pytest
from hub_server import READ_TOKEN, TOKEN, Fault, Repo, running

from smoljax import hub

pytest.importorskip("huggingface_hub", reason="it is the extra hf: pip install 'smoljax[hf]'")

REPO = Path(__file__).resolve().parents[1]
WEIGHTS = bytes(range(256)) * 800
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "README.md": b"# a model",
    "LICENSE": b"Apache-2.0",
}
UNWANTED = {
    "pytorch_model.bin": b"a pickle",
    "modeling_x.py": b"print('never')",
    "onnx/model.safetensors": b"elsewhere",
    "consolidated.safetensors": b"the same once more",
    "model.Q4.gguf": b"GGUF",
    "training_args.pt": b"a pickle",
}
NOW = {"Retry-After": "0"}

PROGRAM = """
import logging, os, sys
assert "huggingface_hub" not in sys.modules
from smoljax import errors, hub
logging.basicConfig(format="smoljax: %(message)s")
{before}
def main(argv):
    print({call})
code = errors.run(main)
sys.stdout.flush()
os._exit(code)  # what is forked takes 0.2 s to end by itself
"""


@pytest.fixture
def server():
    with running() as found:
        found.repos["me/model"] = Repo()
        found.repos["me/model"].commit(FILES | UNWANTED)
        yield found


@pytest.fixture
def start(server, launcher, tmp_path):
    """Start a process that calls hub.*"""

    def start(call: str, before: str = "", **env) -> launch.Process:
        ours = {name: None for name in os.environ if name.startswith("HF_") or name == "TRANSFORMERS_OFFLINE"}
        ours |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return launcher.call("launch:program", PROGRAM.format(call=call, before=before), env=ours | env)

    return start


@pytest.fixture
def run(start):
    """hub.* in such a process: its exit code, its stdout, its stderr; a token is in neither, and no traceback."""

    def run(call: str, before: str = "", **env) -> tuple[int, str, str]:
        process = start(call, before, **env)
        code, out, err = process.code, process.file("out").read_text(), process.file("err").read_text()
        assert "hf_" not in out + err and "Bearer" not in out + err
        assert "Traceback" not in err, err
        return code, out.strip(), err.strip()

    return run


def read(folder: str) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def refused(found: tuple[int, str, str], code: int, *words: str):
    """One sentence with these words, and that exit code."""
    assert found[0] == code, found
    assert found[2].startswith("smoljax: ") and "\n" not in found[2], found[2]
    for word in words:
        assert word in found[2], found[2]


@pytest.mark.parametrize(
    "text",
    ["a/b", "HuggingFaceTB/SmolLM2-135M", "a/b@main", "a/b@refs/pr/1", "a/b.c_d-e@v1.0", "a/b@" + "0123456789" * 4],
)
def test_a_name(text):
    assert hub.is_name(text)


@pytest.mark.parametrize(
    "text",
    ["a", "a/b/c", "/a/b", "a/b/", "./a/b", "../a", "a/..", "a/b@", "a/b@../c", "a b/c", "a/b@c@d", "", "~/a", "a/b\n"]
    + ["runs/model.gguf", "runs/weights.safetensors", "hf://a/b"],
)
def test_no_name(text):
    assert not hub.is_name(text)


def test_download_takes_what_is_read_and_nothing_else(server, run):
    code, out, err = run("hub.download('me/model')")
    assert (code, err) == (0, "")
    assert read(out) == FILES
    assert Path(out).name == server.repos["me/model"].refs["main"]  # the commit
    for unwanted in UNWANTED:
        assert not server.seen(f"(GET|HEAD) /me/model/resolve/.*/{unwanted}")
    run("hub.download('me/model')")
    assert len(server.seen("GET /cdn/")) == 1 and len(server.seen("GET /me/model/resolve/.*config.json")) == 1


def test_shards_and_their_index(server, run):
    files = {f"model-0000{i}-of-00002.safetensors": b"part %d" % i for i in (1, 2)}
    files |= {"config.json": b"{}", "model.safetensors.index.json": b"{}", "LICENSE.md": b"L", "a[1].txt": b"no"}
    server.repos["me/model"].commit(files)
    code, out, _ = run("hub.download('me/model')")
    del files["a[1].txt"]
    assert code == 0 and read(out) == files


def test_weights_under_another_name(server, run):
    files = {"config.json": b"{}", "weights[1].safetensors": b"odd", "model.safetensors.index.json": b"{}"}
    server.repos["me/model"].commit(files)
    assert read(run("hub.download('me/model')")[1]) == files


def test_a_revision_is_pinned(server, run):
    model = server.repos["me/model"]
    old = model.refs["main"]
    new = model.commit(FILES | {"config.json": b'{"new": 1}'})
    model.refs["v1"] = old
    for revision, commit in ((None, new), ("main", new), ("v1", old), (old, old)):
        name = "me/model" if revision is None else f"me/model@{revision}"
        code, out, _ = run(f"hub.download({name!r})")
        assert code == 0 and Path(out).name == commit
        assert (Path(out) / "config.json").read_bytes() == model.commits[commit]["config.json"]
    assert len(server.seen("GET /cdn/")) == 1  # the weights are the same


def test_a_cut_download_resumes(server, run):
    chunk = 10 << 20  # the client writes, and so resumes, by these
    files = FILES | {"model.safetensors": os.urandom(chunk + 5000)}
    server.repos["me/model"].commit(files)
    server.faults.append(Fault("GET /cdn/", cut=chunk + 1000))
    code, out, _ = run("hub.download('me/model')")
    assert code == 0 and read(out) == files
    assert [headers.get("range") for headers in server.seen("GET /cdn/")] == [None, f"bytes={chunk}-"]


def test_a_killed_download_goes_on_with_the_files_that_are_missing(server, start, run, tmp_path):
    hold = threading.Event()
    server.faults.append(Fault("GET /cdn/", cut=1000, hold=hold))
    process = start("hub.download('me/model')")
    until(lambda: server.seen("GET /cdn/") and len([*tmp_path.glob("hf/**/snapshots/*/*")]) == len(FILES) - 1)
    process.kill(signal.SIGKILL)
    assert process.code == -signal.SIGKILL
    hold.set()
    code, out, _ = run("hub.download('me/model')")
    assert code == 0 and read(out) == FILES
    assert len(server.seen("GET .*/resolve/.*/config.json")) == 1


def until(true, seconds: float = 120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("what", "name"), [("/cdn/", "model.safetensors"), ("/tokenizer.json", "tokenizer.json")])
def test_damaged_bytes_are_found_and_fetched_again(server, run, what, name):
    server.faults.append(Fault(f"GET .*{what}", damage=True))
    refused(run("hub.download('me/model')"), 3, name, "damaged", "download it again")
    code, out, _ = run("hub.download('me/model')")
    assert code == 0 and read(out) == FILES


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(server, run, status):
    server.faults.append(Fault("GET /api/models/me/model/?$", times=2, status=status, headers=NOW))
    code, out, err = run("hub.download('me/model')")
    assert (code, err) == (0, "") and read(out) == FILES
    assert not server.faults[0].times


def test_a_hub_that_stays_busy(server, run):
    server.faults.append(Fault("GET /api/models/", times=99, status=503, headers=NOW))
    refused(run("hub.download('me/model')"), 1, server.endpoint, "503", "run it again")
    assert len(server.seen("GET /api/models/")) == 1 + len(hub.WAITS)


def test_a_hub_that_names_a_long_wait(server, run):
    server.faults.append(Fault("GET /api/models/", times=99, status=429, headers={"Retry-After": "3600"}))
    start = time.monotonic()
    refused(run("hub.download('me/model')"), 1, "429", "run it again")
    assert time.monotonic() - start < 600


def test_a_busy_hub_whose_model_is_cached(server, run):
    folder = run("hub.download('me/model')")[1]
    server.faults.append(Fault("GET /api/", times=99, status=503, headers=NOW))
    code, out, err = run("hub.download('me/model')")
    assert (code, out) == (0, folder)
    assert "503" in err and f"taken from the cache: commit {Path(folder).name}" in err and "\n" not in err


def test_a_hub_that_goes_away_in_the_middle(server, run):
    """The client then takes an older commit, without a word."""
    folder = run("hub.download('me/model')")[1]
    server.repos["me/model"].commit(FILES | {"config.json": b'{"new": 1}'})
    server.faults.append(Fault("GET /api/models/", after=1, times=99, status=503, headers=NOW))
    code, out, err = run("hub.download('me/model')")
    assert (code, out) == (0, folder) and f"changed while it was read; taken from the cache: commit {out[-40:]}" in err


def test_no_network(run):
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused(run("hub.download('me/model')", **away), 1, "http://127.0.0.1:9", "cannot be reached")
    folder = run("hub.download('me/model')")[1]
    code, out, err = run("hub.download('me/model')", **away)
    assert (code, out) == (0, folder) and "taken from the cache" in err
    secret = {"HF_ENDPOINT": "http://me:secret@127.0.0.1:9"}
    assert "secret" not in run("hub.download('me/other')", **secret)[2]


def test_offline(server, run):
    offline = {"HF_HUB_OFFLINE": "1"}
    refused(run("hub.download('me/model')", **offline), 1, "me/model", "HF_HUB_OFFLINE")
    old, folder = server.repos["me/model"].refs["main"], run("hub.download('me/model')")[1]
    for name in ("me/model", f"me/model@{old}"):
        assert run(f"hub.download({name!r})", **offline) == (0, folder, "")
    refused(run("hub.download('me/model@v9')", **offline), 1, "HF_HUB_OFFLINE")
    (Path(folder) / "model.safetensors").unlink()
    refused(run("hub.download('me/model')", **offline), 1, "HF_HUB_OFFLINE")


def test_one_gguf(server, run):
    """Without the config.json beside it, which would make the folder one of safetensors."""
    server.repos["me/model"].commit({"config.json": b"{}", "a.gguf": b"GGUF", "x.bin": b"pickle", "README.md": b"#"})
    code, out, _ = run("hub.download('me/model')")
    assert code == 0 and read(out) == {"a.gguf": b"GGUF", "README.md": b"#"}
    assert run("hub.download('me/model')", HF_HUB_OFFLINE="1") == (0, out, "")


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({"config.json": b"{}", "a.Q4.gguf": b"", "a.Q8.gguf": b""}, 2, ["2 GGUF files", "a.Q4.gguf, a.Q8.gguf"]),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, 3, ["only pickles (pytorch_model.bin)", ".safetensors"]),
        ({"config.json": b"{}"}, 3, ["no weights"]),
        ({}, 3, ["no weights"]),
        ({"model.safetensors": b""}, 3, ["no config.json"]),
        ({"onnx/model.safetensors": b"", "config.json": b"{}"}, 3, ["no weights"]),
    ],
)
def test_repositories_without_a_model(server, run, files, code, words):
    server.repos["me/model"].commit(files)
    refused(run("hub.download('me/model')"), code, "me/model", *words)
    assert not server.seen("GET .*(/resolve/|/cdn/)")


def test_what_is_not_there_or_not_allowed(server, run):
    refused(run("hub.download('me/none')"), 2, "me/none is not on this disk", "HF_TOKEN")
    refused(run("hub.download('me/none')", HF_TOKEN=TOKEN), 2, "me/none is not on this disk")
    refused(run("hub.download('me/model@v9')"), 2, "me/model@v9 is no branch, tag or commit")
    refused(run("hub.download('me/model')", HF_TOKEN="hf_old"), 2, "does not take the token (401)")
    server.repos["me/model"].private = True
    refused(run("hub.download('me/model')"), 2, "or private")
    code, out, _ = run("hub.download('me/model')", HF_TOKEN=READ_TOKEN)
    assert code == 0 and read(out) == FILES
    assert server.seen("GET /cdn/") and not any("authorization" in headers for headers in server.seen("GET /cdn/"))
    server.repos["me/model"].gated = True
    refused(run("hub.download('me/model')", HF_TOKEN=TOKEN), 2, "me/model is gated", "HF_TOKEN")
    refused(run("hub.download('me')"), 2, "owner/name")
    refused(run("hub.download('me/a--b')"), 2, "me/a--b")


@pytest.mark.parametrize("token", ["hf_a b", "hf_\u00e9", "hf_a\x01b"])
def test_a_token_that_is_none(run, token):
    """An HTTP client would quote it in its complaint about the header."""
    refused(run("hub.download('me/model')", HF_TOKEN=token), 2, "token", "character")


def test_an_answer_that_is_no_hubs(server, run):
    for body in (b"<html>sign in</html>", b"[]", b'{"id": "me/model"}'):
        server.faults = [Fault("GET /api/models/", status=200, body=body)]
        assert run("hub.download('me/model')")[0] in (1, 3)
    server.faults = [Fault("GET /api/models/", status=418)]
    refused(run("hub.download('me/model')"), 1, "418")


FULL = """
import errno, huggingface_hub.file_download as d
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
d.http_get = full
"""
SMALL_DISK = "import shutil, collections\nshutil.disk_usage = lambda path: collections.namedtuple('D', 'free')(1000)"


def test_a_full_disk(server, run):
    refused(run("hub.download('me/model')", FULL), 1, "no room for me/model", "HF_HOME")
    refused(run("hub.download('me/model')", SMALL_DISK), 1, "has 1,000 free", "HF_HOME")
    assert not server.seen("GET /cdn/")


def test_without_the_extra(run):
    gone = "sys.modules['huggingface_hub'] = None"
    refused(run("hub.download('me/model')", gone), 2, "pip install 'smoljax[hf]'")
    refused(run("hub.check_push('me/model')", gone), 2, "pip install 'smoljax[hf]'")


def test_importing_hub_imports_no_client():
    program = "import sys; import smoljax.hub; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO)


@pytest.fixture
def folder(tmp_path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    files = {name: FILES[name] for name in FILES} | {"model-00001-of-00002.safetensors": WEIGHTS[:5000]}
    files["conversion.json"] = json.dumps({"smoljax": 1}).encode()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out


@pytest.mark.parametrize("private", [False, True])
def test_push_and_download_again(server, run, folder, private):
    token = {"HF_TOKEN": TOKEN}
    assert run("hub.check_push('me/new')", **token) == (0, "None", "")
    assert "me/new" not in server.repos
    code, url, err = run(f"hub.push({str(folder)!r}, 'me/new', private={private})", **token)
    new = server.repos["me/new"]
    assert (code, err) == (0, "") and url == f"{server.endpoint}/me/new/commit/{new.refs['main']}"
    assert new.commits[new.refs["main"]] == read(folder) and new.private == private
    (folder / "config.json").write_bytes(b'{"second": 1}')
    assert run(f"hub.push({str(folder)!r}, 'me/new')", **token)[0] == 0
    assert new.commits[new.refs["main"]] == read(folder) and len(new.commits) == 3
    code, out, _ = run("hub.download('me/new')", **token)
    got = {k: v for k, v in read(folder).items() if k != "conversion.json"}
    assert code == 0 and read(out) == got


def test_push_is_refused_before_the_work(server, run, folder):
    refused(run("hub.check_push('me/new')"), 2, "no token", "HF_TOKEN")
    refused(run("hub.check_push('me/new')", HF_TOKEN="hf_old"), 2, "does not take the token")
    refused(run("hub.check_push('me/new')", HF_TOKEN=READ_TOKEN), 2, "may only read")
    refused(run("hub.check_push('me/new')", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1"), 2, "HF_HUB_OFFLINE")
    refused(run("hub.check_push('me/new')", HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9"), 1, "cannot be reached")
    for name in ("new", "me/new@v1", "me/new/x"):
        refused(run(f"hub.check_push({name!r})", HF_TOKEN=TOKEN), 2, "OWNER/NAME")
    server.faults.append(Fault("GET /api/whoami", times=99, status=503, headers=NOW))
    refused(run("hub.check_push('me/new')", HF_TOKEN=TOKEN), 1, "503")
    assert "me/new" not in server.repos


def test_push_that_the_hub_does_not_take(server, run, folder):
    call = f"hub.push({str(folder)!r}, 'me/new')"
    refused(run(call, HF_TOKEN=READ_TOKEN), 2, "forbids", "403")
    server.faults = [Fault("POST .*/commit/", status=403)]
    refused(run(call, HF_TOKEN=TOKEN), 2, "forbids", "403")
    server.faults = [Fault("PUT /upload/", times=1, status=400)]
    refused(run(call, HF_TOKEN=TOKEN), 1, "400")
    server.faults = [Fault("POST .*/commit/", times=2, status=503, headers=NOW)]
    assert run(call, HF_TOKEN=TOKEN)[0] == 0
    new = server.repos["me/new"]
    assert new.commits[new.refs["main"]] == read(folder)
