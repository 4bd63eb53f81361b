"""Corpora as they lie on disks: what is no text is left aside by name, and blank or empty parts hold no document."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import zstandard
from datatrove.pipeline.readers import JsonlReader
from tokenizers import Tokenizer

from smoljax import text
from smoljax import tokenizer as tok
from smoljax.corpus import find
from smoljax.errors import DataError, UsageError, run
from train import prepare

ROWS = [{"text": f"text {i}", "id": i} for i in range(3)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tok.train(TEXTS, tok.SMALLEST, path)
    return path


def put(path: Path, data=b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def columns(path: Path, **given) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(given), path)
    return path


def read(file: Path, text_key="text"):
    """The texts of a file, and what is refused."""
    found = [(line, text, why) for line, text, why, _ in text.documents(file, text_key)]
    return [text for _, text, why in found if not why], [(line, why) for line, _, why in found if why]


def prepared(tokenizer, out: Path, *inputs, flags=()):
    """(exit code, the documents in the shards, the manifest) of the program."""
    argv = [*map(str, inputs), "--output", str(out), "--tokenizer", str(tokenizer), "--workers", "1", *flags]
    if code := run(prepare.main, argv):
        return code, None, None
    words, texts = Tokenizer.from_file(str(tokenizer)), []
    for file in out.glob("*.ds"):
        ids, ends = np.fromfile(file, "<u2"), np.fromfile(f"{file}.index", "<u8").astype(int)
        texts += [words.decode(part[:-1].tolist(), skip_special_tokens=False) for part in np.split(ids, ends)[:-1]]
    return code, Counter(texts), json.loads((out / "manifest.json").read_text())


# What lies beside texts, and under what name it is left aside.
ASIDE = {
    "._notes.txt": None,
    "a/._b.jsonl": None,
    "._c.parquet": None,
    ".DS_Store": None,
    ".hidden.txt": None,
    ".part-00000.json.crc": None,
    ".gitattributes": None,
    ".~lock.notes.md": None,
    ".#notes.md": None,
    "~$notes.md": None,
    "notes.txt~": None,
    "#notes.txt#": None,
    "notes.txt.bak": None,
    "a.jsonl.tmp": None,
    "a.jsonl.gz.part": None,
    "Thumbs.db": None,
    "desktop.ini": None,
    "_SUCCESS": None,
    "dataset_infos.json": None,
    "data/dataset_info.json": None,
    "dataset_dict.json": None,
    ".ipynb_checkpoints/notes-checkpoint.md": ".ipynb_checkpoints/",
    "a/.ipynb_checkpoints/b.py": "a/.ipynb_checkpoints/",
    ".git/COMMIT_EDITMSG.txt": ".git/",
    ".svn/pristine/ab/abc.txt": ".svn/",
    ".cache/huggingface/download/data/a.jsonl": ".cache/",
    ".Trash-1000/files/old.txt": ".Trash-1000/",
    "__MACOSX/a/._b.txt": "__MACOSX/",
    "$RECYCLE.BIN/S-1-5/$R1.txt": "$RECYCLE.BIN/",
    "b/$Recycle.Bin/S-1-5/$R2.md": "b/$Recycle.Bin/",
    "#recycle/notes.txt": "#recycle/",
    "@Recycle/notes.txt": "@Recycle/",
    "System Volume Information/tracking.txt": "System Volume Information/",
    "lost+found/a.txt": "lost+found/",
    "a/@eaDir/b.txt": "a/@eaDir/",
    "_temporary/0/task_1/part-00000.jsonl": "_temporary/",
}
# ... and names that are near them, of texts.
TAKEN = ["a.txt", "_utils.py", "__init__.py", "_posts/2020-01-01.md", "col=_x/a.jsonl", "x.git/a.txt", "~tilde/a.md"]
TAKEN += [
    "lost.txt",
    "MACOSX/a.txt",
    "a..txt",
    "b-._c.txt",
    "UP.TXT",
    "cache/a.json.gz",
    "README.md",
    "$x/a.txt",
    "recycle/a.md",
]


def test_what_is_left_aside_is_named_and_counted(tokenizer, tmp_path, capsys):
    for name in ASIDE:
        put(tmp_path / "in" / name, b"\x00\x05\x16\x07" if "._" in name else b"not a text, not JSON")
    for name in TAKEN:
        put(tmp_path / "in" / name, gzip.compress(LINES) if name.endswith(".gz") else LINES if ".js" in name else name)
    code, texts, manifest = prepared(tokenizer, tmp_path / "out", tmp_path / "in")
    assert code == 0
    assert texts == Counter([name for name in TAKEN if ".js" not in name] + 2 * TEXTS)
    aside = {folder or name for name, folder in ASIDE.items()}
    assert sorted(manifest["ignored_files"]) == manifest["ignored_files"] and set(manifest["ignored_files"]) == aside
    assert {source["file"] for source in manifest["sources"]} == set(TAKEN)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left aside" in line]
    assert line.startswith(f"{len(aside)} left aside: #notes.txt#, #recycle/, $RECYCLE.BIN/, ... (all in manifest")


@pytest.mark.parametrize("name", ["._a.parquet", ".a.parquet", ".cache/a.parquet", "x/.ipynb_checkpoints/a.parquet"])
def test_arrow_too_passes_over_what_is_hidden(tmp_path, name):
    columns(tmp_path / "b.parquet", text=TEXTS)
    columns(tmp_path / name, text=["other"])
    files, aside = find([str(tmp_path)], tmp_path.with_suffix(".out"))
    theirs = pyarrow.dataset.dataset(tmp_path, format="parquet", ignore_prefixes=["."])
    assert [str(path) for path in files.values()] == theirs.files and len(aside) == 1


def test_a_folder_under_version_control_changes_and_its_texts_do_not(tokenizer, tmp_path, capsys):
    """What lies within a folder that is left aside decides nothing: the shards are up to date."""
    put(tmp_path / "in/a.jsonl", LINES)
    put(tmp_path / "in/.git/HEAD")
    assert prepared(tokenizer, tmp_path / "out", tmp_path / "in")[0] == 0
    put(tmp_path / "in/.git/objects/ab/cdef.txt", "x")
    assert prepared(tokenizer, tmp_path / "out", tmp_path / "in")[0] == 0
    assert "up to date" in capsys.readouterr().out


def test_what_is_named_is_read(tokenizer, tmp_path, monkeypatch):
    """A hidden file or folder, or one in a hidden folder, where its user says so; but no Mac's attributes."""
    put(tmp_path / ".data/.x/a.txt", "one")
    put(tmp_path / ".data/.b.txt", "two")
    put(tmp_path / ".data/c.txt", "three")
    put(tmp_path / ".data/._c.txt", "attributes")
    monkeypatch.chdir(tmp_path)
    for inputs, expected in (
        ([".data"], ["three"]),
        ([".data/.x"], ["one"]),
        ([".data/.b.txt"], ["two"]),
        ([".data", ".data/.x", ".data/.b.txt"], ["one", "two", "three"]),
        (["."], None),
        ([".data/._c.txt"], None),
    ):
        if expected is None:
            with pytest.raises((DataError, UsageError), match="left aside: .data/|a Mac's attributes of c.txt"):
                find(inputs, tmp_path.with_suffix(".out"))
            continue
        files, aside = find(inputs, tmp_path.with_suffix(".out"))
        assert sorted(path.read_text() for path in files.values()) == sorted(expected)
        assert not {str(path) for path in aside} & set(files)


def test_a_link_is_read_under_its_own_name(tmp_path):
    """As the hub's cache keeps files: snapshots/.../a.parquet leads to blobs/HASH."""
    blob = columns(tmp_path / "blobs/4d7a", text=TEXTS)
    link = tmp_path / "snapshots/abc/data/a.parquet"
    link.parent.mkdir(parents=True)
    os.symlink(blob, link)
    for given in (link, link.parent, tmp_path / "snapshots"):
        (path,) = find([str(given)], tmp_path / "out")[0].values()
        assert read(path) == (TEXTS, [])


@pytest.mark.parametrize(
    "others, is_read",
    [
        (["data/a.parquet", ".gitattributes"], False),
        (["a.jsonl", "b.json.gz"], False),
        (["a.jsonl", "notes.md"], True),
        (["data/README.md", "a.jsonl"], True),
        (["picture.png"], True),
        ([], True),
    ],
)
def test_the_card_of_a_folder_of_rows(tmp_path, others, is_read):
    """The README.md that the hub puts beside rows is none of them; among other texts it is one."""
    for name in ("README.md", *others):
        put(tmp_path / name, "x")
    files, aside = find([str(tmp_path)], tmp_path.with_suffix(".out"))
    assert ("README.md" in files) == is_read != ("README.md" in aside)
    both = find([str(tmp_path), str(tmp_path / "README.md")], tmp_path.with_suffix(".out")) if not is_read else None
    assert not both or ("README.md" in both[0] and "README.md" not in both[1])


MARK = b"\xef\xbb\xbf"
BLANKS = [b"", b"\n", b"\r\n\r\n", b" \t\n", MARK, MARK + b"\n", b"\n" * 5000, "\u3000\n\ufeff\n".encode()]
NOTHING = {
    f"{i}{suffix}": data for i, data in enumerate(BLANKS) for suffix in (".jsonl", ".json", ".txt", ".md", ".py")
}
NOTHING |= {f"{i}.jsonl.gz": gzip.compress(data) for i, data in enumerate(BLANKS)} | {
    "0.txt.gz": b"",
    "0.json.zst": b"",
}
NOTHING |= {f"{i}.txt.zst": zstandard.compress(data) for i, data in enumerate(BLANKS)}


@pytest.mark.parametrize("name", NOTHING)
def test_a_file_of_blanks_holds_nothing(tmp_path, name):
    assert read(put(tmp_path / name, NOTHING[name])) == ([], [])


@pytest.mark.parametrize(
    "given", [{"text": pa.array([], pa.string())}, {"text": pa.nulls(0)}, {}, {"n": pa.array([], pa.int8())}]
)
def test_a_parquet_file_without_rows_holds_nothing(tmp_path, given):
    """Whatever its columns: pandas gives an empty one no type."""
    assert read(columns(tmp_path / "a.parquet", **given)) == ([], [])


def test_documents_in_are_documents_out_and_refused(tokenizer, tmp_path, capsys):
    for name, data in NOTHING.items():
        put(tmp_path / "in" / name, data)
    columns(tmp_path / "in/none.parquet", text=pa.nulls(0))
    assert prepared(tokenizer, tmp_path / "none", tmp_path / "in", flags=["--max-bad", "9"])[0] == 3
    assert "the inputs hold no documents" in capsys.readouterr().err
    assert run(prepare.main, [str(tmp_path / "in"), "--output", str(tmp_path / "t"), "--train-tokenizer", "300"]) == 3
    assert "the inputs hold no documents" in capsys.readouterr().err
    put(tmp_path / "in/a.jsonl", b"\n" + LINES.replace(b"\n", b"\r\n\r\n") + MARK)
    columns(tmp_path / "in/b.parquet", text=TEXTS)
    code, texts, manifest = prepared(tokenizer, tmp_path / "out", tmp_path / "in")
    assert code == 0 and texts == Counter(2 * TEXTS)
    assert manifest["documents_in"] == 6 and not manifest["refused"] and not manifest["ignored_files"]
    empty = [source["file"] for source in manifest["sources"] if not source["documents"]]
    assert set(empty) == {*NOTHING, "none.parquet"}
    assert f"{len(empty)} without a document: 0.json, 0.json.zst, 0.jsonl, ..." in capsys.readouterr().out
    put(tmp_path / "in/c.jsonl", b'\n{"text": " "}\n{"text": null}\n{"text": "\\ufeff"}\n{"text": "a", "text": "b"}\n')
    columns(tmp_path / "in/d.parquet", text=["", None, "\n", "\ufeff", "last"])
    code, texts, manifest = prepared(tokenizer, tmp_path / "out", tmp_path / "in", flags=["--max-bad", "8"])
    assert code == 0 and texts == Counter([*2 * TEXTS, "last"]) and manifest["documents_in"] == 7 + 8
    assert [(entry["where"], entry["why"].partition(" (")[0]) for entry in manifest["refused"]] == [
        ("c.jsonl:2", "empty"),
        ("c.jsonl:3", "'text' is of type NoneType, expected a string"),
        ("c.jsonl:4", "empty"),
        ("c.jsonl:5", "not JSON"),
        ("d.parquet:1", "empty"),
        ("d.parquet:2", "null"),
        ("d.parquet:3", "empty"),
        ("d.parquet:4", "empty"),
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"])
def test_blank_lines_between_rows_as_datatrove_has_them(tmp_path, end):
    """datatrove, which passes over lines that are not JSON with a word in its log, reads the same documents."""
    file = put(tmp_path / "in/a.jsonl", LINES.replace(b"\n", end) + end)
    theirs = [document.text for document in JsonlReader(str(tmp_path / "in"))()]
    assert read(file) == (theirs, []) and theirs == TEXTS


VALUES = ["one", None, "two", "one", "東京 🤖", "", "x" * 500]


def dictionary(values, kind=None) -> pa.Array:
    return pa.array(values, kind).dictionary_encode()


TAKEN_COLUMNS = {
    "string": pa.array(VALUES),
    "large_string": pa.array(VALUES, pa.large_string()),
    "string_view": pa.array(VALUES, pa.string_view()),
    "dictionary": dictionary(VALUES),
    "dictionary of large_string": dictionary(VALUES, pa.large_string()),
    "ordered dictionary": pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1, 0], pa.int8()), ["b", "a"], ordered=True
    ),
    "dictionaries that differ": pa.chunked_array([dictionary(VALUES), dictionary(VALUES[::-1])]),
    "wide indices": dictionary(VALUES * 200).cast(pa.dictionary(pa.int64(), pa.string())),
    "no value": pa.nulls(3),
    "no value of a string": pa.nulls(3, pa.string()),
}


@pytest.mark.parametrize("name", TAKEN_COLUMNS)
@pytest.mark.parametrize(
    "options",
    [{}, {"store_schema": False}, {"use_dictionary": False, "row_group_size": 2}, {"dictionary_pagesize_limit": 8}],
)
def test_columns_of_strings(tmp_path, name, options):
    pq.write_table(
        pa.table({"text": TAKEN_COLUMNS[name], "n": range(len(TAKEN_COLUMNS[name]))}), tmp_path / "a.parquet", **options
    )
    theirs = pq.read_table(tmp_path / "a.parquet")["text"].to_pylist()
    texts, refused = read(tmp_path / "a.parquet")
    assert texts == [value for value in theirs if value] and theirs == TAKEN_COLUMNS[name].to_pylist()
    assert refused == [(i, "null" if value is None else "empty") for i, value in enumerate(theirs, 1) if not value]


@pytest.mark.parametrize(
    "column, kind",
    [
        (pa.array([1, 2]), "int64"),
        (dictionary([1, 2]), "int64"),
        (pa.array([b"a", b"b"]), "binary"),
        (dictionary([b"a", b"b"]), "dictionary<values=binary"),
        (pa.array([b"a", b"b"], pa.large_binary()), "large_binary"),
        (pa.array([b"a", b"b"], pa.binary(1)), r"fixed_size_binary\[1\]"),
        (pa.array([["a"], ["b"]]), "list<element: string>"),
        (pa.array([{"text": "a"}, {"text": "b"}]), "struct<text: string>"),
        (pa.array([True, False]), "bool"),
        (pa.array([1.0, 2.0]), "double"),
    ],
)
def test_columns_of_other_kinds_are_refused_by_name(tmp_path, column, kind):
    file = columns(tmp_path / "a.parquet", text=column)
    with pytest.raises(DataError, match=f"a.parquet: column 'text' is {kind}.*, expected strings: name another"):
        read(file)


def test_a_column_twice(tokenizer, tmp_path, capsys):
    file = tmp_path / "a.parquet"
    for names in (["text", "text", "n"], ["n", "text", "n"], ["Text", "text", "n"]):
        arrays = [pa.array([f"{i}{name}"]) for i, name in enumerate(names)]
        pq.write_table(pa.Table.from_arrays(arrays, names=names), file)
        if names.count("text") == 2:
            assert prepared(tokenizer, tmp_path / "out", file)[0] == 3
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.endswith("a.parquet has the column 'text' twice: rename one of the two")
        else:
            assert read(file) == (["1text"], [])


def test_names_with_dots(tmp_path):
    """A name is a column's, and no path into one; parquet's own paths would bring the b of a column "a" along."""
    file = columns(tmp_path / "a.parquet", a=[{"b": "inner"}], **{"a.b": ["outer"]})
    assert read(file, "a.b") == (["outer"], [])
    with pytest.raises(DataError, match="has no column 'a.c' but a, a.b: name one with --text-key"):
        read(file, "a.c")
    lines = put(tmp_path / "a.jsonl", b'{"a": {"b": "inner"}, "a.b": "outer"}\n{"a": {"b": "inner"}}\n')
    assert read(lines, "a.b") == (["outer"], [(2, "no key 'a.b' but 'a'")])


def test_bytes_that_are_no_text_in_a_dictionary(tmp_path):
    raw = pa.array([b"ok", b"\xff"], pa.binary())
    words = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    file = columns(tmp_path / "a.parquet", text=pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), words))
    texts, ((line, why),) = read(file)
    assert texts == ["ok", "ok"] and line == 2 and why.startswith("not UTF-8")


def test_an_unfinished_parquet_file_is_no_empty_one(tmp_path):
    """Of nothing it would have an end that says so."""
    for data in (b"", b"PAR1"):
        with pytest.raises(DataError, match="cannot be read"):
            read(put(tmp_path / "a.parquet", data))
