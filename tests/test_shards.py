"""Shards: one stream over many files, borders from the index, and every kind of damage named."""

import hashlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from smoljax.errors import DataError
from smoljax.shards import Shards

DOCUMENTS = [[3, 5, 1], [4], [2, 0, 9, 9]], [[7] * 10, [8, 1]], [[6, 6, 0, 6, 0]]  # three files; 0 is the EOS
STREAM = [token for file in DOCUMENTS for document in file for token in document]
BORDERS = [number for number, document in enumerate((d for file in DOCUMENTS for d in file), 1) for _ in document]


def sha256(file) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def write_shards(folder, dtype="<u2", manifest=True):
    """Shards as the format has them, written without smoljax."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    entries = []
    for number, documents in enumerate(DOCUMENTS):
        file = folder / f"{number:05d}.ds"
        np.concatenate([np.array(d, dtype) for d in documents]).tofile(file)
        np.cumsum([len(d) for d in documents]).astype("<u8").tofile(f"{file}.index")
        tokens = sum(map(len, documents))
        (folder / f"{file.name}.metadata").write_text(f"some|path|{int(dtype[2])}\n{tokens}\n{tokens} T")
        hashes = {"sha256": sha256(file), "index_sha256": sha256(f"{file}.index")}
        entries.append({"file": file.name, "tokens": tokens, "documents": len(documents)} | hashes)
    if manifest:
        totals = {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents")}
        content = {
            "format": "smoljax-shards",
            "version": 1,
            "dtype": f"uint{8 * int(dtype[2])}",
            "vocab_size": 10,
            "eos_token_id": 0,
        }
        content |= {
            "eos_token_id": 0,
            "max_token_id": 9,
            "text_bytes": 100,
            "tokenizer_sha256": sha256(folder / "tokenizer.json"),
        }
        (folder / "manifest.json").write_text(json.dumps(content | totals | {"shards": entries}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "bare"])
def test_every_window_equals_the_concatenation(tmp_path, dtype, manifest):
    shards = Shards(write_shards(tmp_path / "data", dtype, manifest))
    assert shards.num_tokens == len(STREAM) and shards.documents == 6
    for start in range(len(STREAM) + 1):
        for stop in range(start, len(STREAM) + 1):
            tokens, segments = shards.read(start, stop), shards.segments(start, stop)
            assert tokens.dtype == segments.dtype == np.int32
            assert tokens.tolist() == STREAM[start:stop]
            assert segments.tolist() == [b - BORDERS[start] + 1 for b in BORDERS[start:stop]]


def test_bare_shards_read_as_ours(folder, caplog):
    ours = Shards(folder)
    assert (ours.vocab_size, ours.max_token_id, ours.text_bytes) == (10, 9, 100)
    assert ours.tokenizer_sha256 == sha256(ours.tokenizer_path)
    assert not caplog.records
    (folder / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, "smoljax"):
        bare = Shards(folder)
    assert len(caplog.records) == 1 and "no manifest.json" in caplog.text
    n = len(STREAM)
    assert (bare.read(0, n) == ours.read(0, n)).all() and (bare.segments(0, n) == ours.segments(0, n)).all()
    assert bare.vocab_size is bare.max_token_id is bare.text_bytes is bare.tokenizer_sha256 is None


def test_bare_without_index_or_metadata_is_one_document_a_file(folder):
    for file in (*folder.glob("*.index"), *folder.glob("*.metadata"), folder / "manifest.json"):
        file.unlink()
    shards = Shards(folder)
    assert shards.documents == 3 and shards.read(0, len(STREAM)).tolist() == STREAM
    assert shards.segments(0, len(STREAM)).tolist() == [1] * 8 + [2] * 12 + [3] * 5


def test_positions_are_named_and_never_clipped(folder):
    shards = Shards(folder)
    assert shards.locate(7).endswith("00000.ds, token 7") and shards.locate(8).endswith("00001.ds, token 0")
    for start, stop in (-1, 2), (0, len(STREAM) + 1), (3, 2):
        for call in shards.read, shards.segments:
            with pytest.raises(ValueError, match="of a stream of 25"):
                call(start, stop)


def test_pickles_without_its_maps(folder):
    shards = Shards(folder)
    shards.read(0, 25)
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._maps and copy.read(5, 20).tolist() == STREAM[5:20]


def test_fingerprint_follows_the_content(folder):
    before = Shards(folder).fingerprint
    shutil.copytree(folder, folder.parent / "copy")
    assert Shards(folder.parent / "copy").fingerprint == before
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Shards(folder).fingerprint != before


def test_a_token_beyond_int32_is_refused(tmp_path):
    folder = write_shards(tmp_path / "data", "<u4", manifest=False)
    with open(folder / "00001.ds", "r+b") as f:
        f.seek(4 * 4)
        f.write(b"\xff\xff\xff\xff")
    with pytest.raises(DataError, match=r"00001.ds, token 4, is 4294967295"):
        Shards(folder).read(2, 20)


def edit(**changes):
    def apply(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))

    return apply


def shards_entry(**changes):
    def apply(folder):
        shards = json.loads((folder / "manifest.json").read_text())["shards"]
        edit(shards=[shards[0] | changes, *shards[1:]])(folder)

    return apply


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, by):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:by])


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def each(*steps):
    return lambda folder: [step(folder) for step in steps]


BARE = drop("manifest.json")
DAMAGE = {
    "missing shard": (drop("00001.ds"), "00001.ds is missing"),
    "truncated shard": (cut("00001.ds", -3), "00001.ds has 21 bytes, expected 24"),
    "longer shard": (put("00000.ds", b"\0" * 18), "00000.ds has 18 bytes, expected 16"),
    "missing index": (drop("00002.ds.index"), "00002.ds.index is missing"),
    "ragged index": (cut("00000.ds.index", -1), "00000.ds.index has 23 bytes, expected 3 document ends"),
    "index too short": (cut("00000.ds.index", 16), "00000.ds.index has 16 bytes"),
    "index of another shard": (
        lambda folder: np.array([1, 2, 9], "<u8").tofile(folder / "00000.ds.index"),
        "00000.ds.index ends at token 9, but 00000.ds has 8",
    ),
    "manifest no JSON": (put("manifest.json", b"{"), "manifest.json cannot be read"),
    "manifest no object": (put("manifest.json", b"[]"), "manifest.json cannot be read"),
    "manifest without a key": (
        put("manifest.json", b'{"format": "smoljax-shards", "version": 1}'),
        "KeyError: 'shards'",
    ),
    "unknown version": (edit(version=2), "version 2, this smoljax reads 'smoljax-shards' version 1"),
    "unknown dtype": (edit(dtype="int8"), "manifest.json cannot be read"),
    "totals differ": (edit(tokens=26), "its shards have 25 tokens, its total is 26"),
    "name leads out": (shards_entry(file="../00000.ds"), "leads out of the folder"),
    "tokenizer missing": (drop("tokenizer.json"), "tokenizer.json is missing"),
    "another tokenizer": (put("tokenizer.json", b"{ }"), "is not the tokenizer of these shards"),
    "no tokens": (each(BARE, *(drop(f"{i:05d}.ds") for i in range(3))), "holds no tokens"),
    "no bytes": (each(BARE, *(put(f"{i:05d}.ds", b"") for i in range(3))), "holds no tokens"),
    "bare, truncated": (each(BARE, cut("00001.ds", -2)), "00001.ds has 22 bytes, expected 24"),
    "bare, odd": (each(BARE, drop("00001.ds.metadata"), cut("00001.ds", -1)), "00001.ds has 23 bytes, expected 22"),
    "bare, ragged index": (each(BARE, cut("00000.ds.index", -1)), "00000.ds.index has 23 bytes"),
    "bare, empty index": (each(BARE, put("00000.ds.index", b"")), "00000.ds.index has 0 bytes"),
    "bare, short index": (each(BARE, cut("00000.ds.index", 8)), "00000.ds.index ends at token 3"),
    "bare, bad metadata": (each(BARE, put("00000.ds.metadata", b"x")), "00000.ds.metadata is not datatrove's"),
    "bare, mixed widths": (each(BARE, put("00000.ds.metadata", b"x|4\n4\n")), "mixes token sizes"),
    "bare, killed": (each(BARE, put("0_unshuffled.ds", b"12")), "holds both"),
    "unfinished": (each(BARE, lambda folder: (folder / ".prepare/k/parts").mkdir(parents=True)), "is unfinished"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_at_opening(folder, damage):
    apply, words = DAMAGE[damage]
    apply(folder)
    with pytest.raises(DataError) as e:
        Shards(folder)
    assert words in str(e.value) and str(folder) in str(e.value) and "\n" not in str(e.value)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="no shards at"):
        Shards(tmp_path / "none")


@pytest.mark.parametrize("name", ["00002.ds", "00002.ds.index"])
def test_verify_finds_one_flipped_bit(folder, name):
    shards = Shards(folder)
    shards.verify()
    data = bytearray((folder / name).read_bytes())
    data[0] ^= 1
    (folder / name).write_bytes(data)
    if name.endswith(".ds"):
        shards = Shards(folder)  # the size is right, so it opens
    with pytest.raises(DataError, match=f"{name} has changed"):
        shards.verify()
