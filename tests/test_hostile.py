"""Hostile model folders: each is refused in one sentence that names the file, in little memory, and runs nothing.

GGUF, tokenizers and chat templates have their own in test_gguf.py, test_tokenizer.py and test_chat.py.
"""

import json
import os
import random
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_hf import edit
from test_model import CONFIG, make

from smoljax import exchange, hf, tensors, weights
from smoljax.errors import DataError
from smoljax.hf import INDEX


@pytest.fixture
def folder(tmp_path):
    """Three files and an index."""
    (tmp_path / "model").mkdir()
    hf.write(tmp_path / "model", exchange.of_model(make(), CONFIG), max_file_size=CONFIG.parameters * 4 // 5 * 2)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    return tmp_path / "model"


def refused(folder, *sentences):
    with pytest.raises(DataError) as e:
        weights.read(folder)
    text = str(e.value)
    assert all(sentence in text for sentence in sentences) and "\n" not in text and len(text) < 600, text


def reindex(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".", "a\x00b.safetensors", "x.bin"]
)
def test_an_index_that_leads_out(folder, name):
    (folder.parent / "secret.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "x.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    reindex(folder, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(folder, str(folder))


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "tokenizer.json", INDEX])
def test_links_that_lead_out(folder, name):
    """Otherwise a folder could publish any file of the machine that converts it."""
    outside = folder.parent / "outside"
    outside.mkdir()
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    refused(folder, f"{folder / name} is a link to {outside / name}, outside the folder")


def test_links_of_the_hub_cache(folder, tmp_path):
    """models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH is how the hub's client stores a model."""
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert weights.read(snapshot).config == CONFIG
    for blob in list(blobs.iterdir()):  # as Xet stores them
        (tmp_path / "blobs" / "ab").mkdir(parents=True, exist_ok=True)
        blob.rename(tmp_path / "blobs" / "ab" / blob.name)
        blob.symlink_to(f"../../blobs/ab/{blob.name}")
    assert weights.read(snapshot).config == CONFIG
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes((blobs / "2").read_bytes())
    refused(snapshot, "outside the folder")


def test_index_and_files_that_contradict_each_other(folder):
    second, third = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
    good, text = {p.name: p.read_bytes() for p in folder.iterdir()}, (folder / INDEX).read_text()
    (folder / second).unlink()
    refused(folder, f"there is no file {folder / second}")
    (folder / second).write_bytes(good[third])  # a tensor in two files
    refused(folder, second)
    (folder / second).write_bytes(good[second])

    reindex(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(folder, "model.norm.weight")
    (folder / INDEX).write_text(text)
    reindex(folder, lambda index: index["metadata"].update(total_size=7))
    refused(folder, "total_size is 7")
    for content in [b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b"\xff", b"[" * 100_000]:
        (folder / INDEX).write_bytes(content)
        refused(folder, INDEX)
    (folder / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    refused(folder, "holds 'a' twice")
    (folder / INDEX).write_text(text)
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "holds both")


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def raw(folder, header, data=b"\0" * 16, length=None):
    """model.safetensors with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + data)


@pytest.mark.parametrize(
    "header, options",
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, {}),  # overlap
        ({"a": entry(0, 8), "b": entry(12, 20)}, {"data": b"\0" * 20}),  # hole
        ({"a": entry(0, 8), "b": entry(8, 16)}, {"data": b"\0" * 20}),  # trailing bytes
        ({"a": entry(0, 8), "b": entry(8, 16)}, {"data": b"\0" * 12}),  # short
        ({"a": entry(0, 8, shape=[3]), "b": entry(8, 16)}, {}),  # size
        ({"a": entry(0, 16, shape=[1 << 62, 4, 4])}, {}),  # overflow
        ({"a": entry(0, 16, shape=[-4])}, {}),
        ({"a": entry(0, 16, dtype="F99")}, {}),
        ({"a": entry(0, 16, dtype=None)}, {}),
        ({"a": entry(0, 16)}, {"length": 1 << 63}),
        ({"a": entry(0, 16)}, {"length": (4 << 20) + 1}),
        ({"a": entry(0, 16)}, {"length": 1000}),
        ({"a": entry(0, 16)}, {"length": 3}),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 16)).encode(),) * 2), {}),  # the library takes the last
        (b"[" * 100_000, {}),
        (b"\xff\xfe", {}),
        ([], {}),
        ({"model.norm.weight": entry(0, 0)}, {"data": b""}),
        ({"a\nb": entry(0, 16)}, {}),  # a name that would break the sentence in two
    ],
)
def test_safetensors(folder, header, options):
    (folder / INDEX).unlink()
    raw(folder, header, **options)
    refused(folder, str(folder))


def test_files_that_are_no_files(folder):
    """A pipe would block for ever, a device never end."""
    (folder / INDEX).unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    refused(folder, str(folder))


def test_code_is_refused_and_never_run(folder):
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    refused(folder, "auto_map is")
    edit(folder, auto_map=...)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", null]}}')
    refused(folder, "tokenizer_config.json: auto_map names code")


@pytest.mark.parametrize("name, size", [("config.json", 2 << 20), ("tokenizer.json", 33 << 20), (INDEX, 17 << 20)])
def test_files_beyond_all_measure(folder, name, size):
    with open(folder / name, "w") as file:
        file.truncate(size)
    refused(folder, f"{folder / name} has {size:,} bytes, expected at most")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four edits: bytes flipped, cut, doubled, or a number blown up."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(content)), rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at : at + rng.randint(1, 40)]
        elif kind == 2:
            content[at:at] = content[at : at + rng.randint(1, 40)]
        elif kind == 3:
            content[at:at] = rng.choice([b"-", b"9" * 18, b"null", b'"', b"[[", b"{", b"1e999", b"../", b"\0"])
        elif digits := [i for i, byte in enumerate(content) if 48 <= byte <= 57]:
            content[rng.choice(digits)] = rng.choice(b"0123456789")
        if not content:
            content = bytearray(b"{")
    return bytes(content)


def fuzz(folder, count, name):
    """Each mutated header or index is refused, or all numbers are read (two of one shape may have changed places)."""
    truth = {name: load_file(file)[name] for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    header = struct.unpack("<Q", files[TARGET][:8])[0]
    rng, outcomes = random.Random(0), {"refused": 0, "read": 0}
    numbers = sorted(value.tobytes() for value in truth.values())
    for _ in range(count):
        cut = len(files[INDEX]) if name == INDEX else 8 + header
        (folder / name).write_bytes(mutated(files[name][:cut], rng) + files[name][cut:])
        try:
            source = hf.open_source(folder)
            found = {tensor: source.tensor(tensor) for tensor in truth}
            assert all(found[tensor].shape == value.shape for tensor, value in truth.items())
            assert sorted(value.tobytes() for value in found.values()) == numbers
            outcomes["read"] += 1
        except DataError as e:
            assert "\n" not in str(e) and str(folder) in str(e), str(e)
            outcomes["refused"] += 1
        (folder / name).write_bytes(files[name])
    return outcomes


TARGET = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("name", [INDEX, TARGET])
def test_fuzz(folder, name):
    outcomes = fuzz(folder, 200, name)
    assert outcomes["refused"] > 150, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", [INDEX, TARGET])
def test_fuzz_long(folder, name):
    outcomes = fuzz(folder, 10_000, name)
    assert outcomes["refused"] > 7_500, outcomes


def test_the_writer_makes_what_the_library_reads(tmp_path):
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.float32)}
    tensors.write(tmp_path / "x.safetensors", {k: v.shape for k, v in values.items()}, "float32", values.get)
    back = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(back[k], v) for k, v in values.items())
    with pytest.raises(FileExistsError):
        tensors.write(tmp_path / "x.safetensors", {}, "float32", values.get)
