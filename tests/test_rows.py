"""One reader: prepare, generate and score agree on which lines are rows, and on what is wrong with the others."""

import gzip
import io
import itertools
import json
import re
import threading
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoljax import chat, row_files, strict_json, text
from smoljax.errors import DataError, Error

KEYS = {"prompt": "p", "text": "t"}  # a row for each of the three
GOOD = json.dumps(KEYS).encode()
MORE = GOOD[:-1] + b', "more": '  # a value goes here


def prepared(file):
    """(line, why) of what prepare reads, why None where it is right."""
    return [(line, why) for line, _, why, _ in text.documents(file, "text")]


def scored(file):
    return [(line, row.get("error")) for line, row in row_files.line_rows(file)]


def generated(file):
    """generate --input numbers its bad rows alone."""
    rows = list(row_files.rows(file))
    assert row_files.count(file) == len(rows)
    return [(row.get("line"), row.get("error")) for row in rows]


def conversed(file):
    """generate --messages ends at the first bad row."""
    try:
        return [(None, None) for _ in chat.read_messages(file)]
    except DataError as e:
        where, _, why = str(e).partition(": ")
        return int(where.rpartition(" ")[2]), why


def same(file) -> list:
    """What all four say of a file."""
    found = scored(file)
    assert prepared(file) == found
    assert generated(file) == [(line if why else None, why) for line, why in found]
    bad = next(((line, why) for line, why in found if why), None)
    assert conversed(file) == (bad or [(None, None) for _ in found])
    return found


MARK = b"\xef\xbb\xbf"
BLANK = [
    b"",
    b"\r",
    b" ",
    b"\t \t",
    MARK,
    MARK + b"\r",
    b" " + MARK + b" ",
    b"\x0b\x0c",
    "\u3000\u2003\xa0\x85".encode(),
]


@pytest.mark.parametrize("blank", BLANK)
def test_a_blank_line_is_nothing(tmp_path, blank):
    file, end = tmp_path / "a.jsonl", b"\n"
    for places in itertools.product((False, True), repeat=4):
        before, between, after, newline = places
        lines = [blank] * before + [GOOD] + [blank] * between + [GOOD] + [blank] * after
        file.write_bytes(end.join(lines) + end * newline)
        first, second = 1 + before, 2 + before + between
        assert same(file) == [(first, None), (second, None)]
    file.write_bytes(blank + end)
    assert same_nothing(file)


def same_nothing(file) -> bool:
    with pytest.raises(Error, match="holds no rows"):
        row_files.count(file)
    return prepared(file) == scored(file) == conversed(file) == list(row_files.rows(file)) == []


GOOD_VALUES = [
    b"1",
    b"-0.0",
    b"1e308",
    b"123456789012345678901234567890",
    b'"\\ud83e\\udd16"',
    b'"\\u0000"',
    b"[{}, {}]",
]
GOOD_VALUES += [
    b'{"a": {"a": {"a": 1}}}',
    b'[{"a": 1}, {"a": 2}]',
    b"[" * 490 + b"]" * 490,
    b'"\xef\xbb\xbf"',
    b'"a\\": 1, \\"a\\": 2"',
]
BAD_VALUES = {
    b"NaN": "NaN is no JSON",
    b"-Infinity": "-Infinity is no JSON",
    b"[1, NaN]": "NaN is no JSON",
    b"1e309": "1e309 is beyond what a number can be",
    b"[-1e400]": "-1e400 is beyond",
    b"1" * 5000: "a whole number of more than 4,300 digits",
    b'"\\ud83e"': "not Unicode text",
    b'{"\\uDD16": 1}': "not Unicode text",
    b'1, "text": "u"': "it holds 'text' twice",
    b'1, "t\\u0065xt": "t"': "it holds 'text' twice",
    b'1, "prompt" : "p"': "it holds 'prompt' twice",
    b'{"a": 1, "b": 2, "a": 1}': "it holds 'a' twice",
    b'[[{"\\\\": 1, "\\\\": 1}]]': "twice",
    b"[" * 501 + b"]" * 501: "nested too deep",
    b'[{"a":' * 300 + b"1" + b"}]" * 300: "nested too deep",
    b"[" * 100_000: "nested too deep",
    b"'x'": "not JSON",
    b'"\t"': "not JSON",
    b"01": "not JSON",
    b"1 // more": "not JSON",
    b'"\xff"': "not UTF-8",
    b'"\xed\xa0\xbe"': "not UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("value", GOOD_VALUES, ids=range(len(GOOD_VALUES)))
def test_what_json_has(tmp_path, value):
    spaced = MORE.replace(b"{", b"  {" + b" " * 20) + value
    (tmp_path / "a.jsonl").write_bytes(b"}\n".join([GOOD[:-1], MORE + value, spaced, MARK + MORE + value, b""]))
    assert [why for _, why in same(tmp_path / "a.jsonl")] == [None] * 4
    assert strict_json.loads(value) == json.loads(value)


@pytest.mark.parametrize("value", BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_what_readers_differ_on_is_refused_by_all(tmp_path, value):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, MORE + value + b"}", b"", GOOD]))
    (_, good), (line, why), (last, right) = same(tmp_path / "a.jsonl")
    assert good is right is None and (line, last) == (2, 4) and BAD_VALUES[value] in why


@pytest.mark.parametrize("value", [b'{"a": 1e309}', b"[" * 501 + b"]" * 501])
def test_the_depth_and_the_caller_do_not_decide(value):
    """A row that is refused here is refused in a thread, whose stack is empty."""
    found = []

    def judge():
        try:
            found.append(strict_json.loads(value))
        except ValueError as e:
            found.append(str(e))

    def deep(n: int):
        deep(n - 1) if n else judge()

    judge()
    deep(300)
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert len(set(found)) == 1 and isinstance(found[0], str)


@pytest.mark.parametrize(
    "line", [b"[]", b"null", b'"text"', b"1", b"[" + GOOD + b"]", GOOD + GOOD, b"\0" * 9, b"\x1e" + GOOD]
)
def test_a_line_that_is_no_object(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line)
    (_, good), (number, why) = same(tmp_path / "a.jsonl")
    assert good is None and number == 2 and why.startswith(("not JSON", "a JSON "))


@pytest.mark.parametrize("indent", [1, 4, "\t"])
@pytest.mark.parametrize("value", [KEYS, [KEYS, KEYS]])
def test_json_over_several_lines_is_said_to_be_such(tmp_path, indent, value):
    (tmp_path / "a.jsonl").write_text(json.dumps(value, indent=indent))
    found = same(tmp_path / "a.jsonl")
    assert found[0][1].startswith("not JSON (it goes on over several lines; write an object a line")
    assert all(why for _, why in found) and len(found) == len((tmp_path / "a.jsonl").read_text().splitlines())


def test_a_line_too_long_is_a_bad_row_and_takes_no_other_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LIMIT", 1000)
    for length in (999, 1000, 1001, 3_000_000):
        long = GOOD + b" " * (length - len(GOOD) - 1) + b"\n"
        (tmp_path / "a.jsonl").write_bytes(long + GOOD + b"\n")
        why = "longer than 64 MB, cut it up" if length > 1000 else None
        assert same(tmp_path / "a.jsonl") == [(1, why), (2, None)]


LETTERS = ["hello world", "Привет, мир: как дела?", "Grüße aus Köln\r\nund tschüß", "čeština, łódź", "Ω και α"]
CODECS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("letters", LETTERS)
def test_other_encodings_are_named(tmp_path, codec, letters):
    """Not as UTF-8 with a character of 0 in every second place, which ASCII and Cyrillic in UTF-16 are."""
    name = f"UTF-{codec[4:6]}"
    lines = json.dumps(KEYS | {"text": letters}, ensure_ascii=False) + "\n"
    for file, data in ((tmp_path / "a.jsonl", lines * 2), (tmp_path / "a.txt", letters)):
        file.write_bytes(data.encode(codec))
        for read in (row_files.rows, row_files.line_rows, row_files.count, chat.read_messages):
            with pytest.raises(DataError, match=f"{file.name} is in {name} .*expected text in UTF-8"):
                list([read(file)] if read is row_files.count else read(file))
    with pytest.raises(DataError, match=f"a.jsonl is in {name} "):
        prepared(tmp_path / "a.jsonl")
    ((line, why),) = prepared(tmp_path / "a.txt")
    assert line == 1 and why.startswith(f"in {name} ")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(letters.encode(codec)))
    assert prepared(tmp_path / "b.txt.gz") == [(1, why)]


@pytest.mark.parametrize(
    "letters", [*LETTERS, "\0", "a\0", "x\0\x04", "日本語", "𝔘", "\x01\x02\x03", "tab\there\n" * 900]
)
@pytest.mark.parametrize("mark", [b"", MARK])
def test_utf_8_is_read_as_python_reads_it(tmp_path, letters, mark):
    (tmp_path / "a.txt").write_bytes(mark + letters.encode())
    expected = (mark + letters.encode()).decode("utf-8-sig")
    assert [text for _, text, _, _ in text.documents(tmp_path / "a.txt", "text")] == [expected]
    assert [row["prompt"] for row in row_files.rows(tmp_path / "a.txt")] == re.split("\r?\n", expected.rstrip("\r\n"))


@pytest.mark.parametrize(
    "data, what",
    [
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(58), "a Mac's attributes"),
        (bytes(5), "of zero bytes"),
        (bytes(1 << 20), "of zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS's pointer"),
    ],
)
def test_what_stands_in_the_place_of_a_file(tmp_path, data, what):
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        (tmp_path / name).write_bytes(data)
    for file in (tmp_path / "a.jsonl", tmp_path / "a.txt"):
        with pytest.raises(DataError, match=f"is {what}.*expected text"):
            row_files.count(file)
    for file in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        with pytest.raises(DataError, match=f"{file.name} is {what}.*expected"):
            prepared(file)
    ((line, why),) = prepared(tmp_path / "a.txt")
    assert line == 1 and why.startswith(what)


def test_prompts_a_line(tmp_path):
    """Row i is of line i; blank lines at the end are nothing."""
    file = tmp_path / "a.txt"
    lines = ["one", "", " two ", "", "\t", "three\u2028more"]
    for end in ("", "\n", "\r\n", "\n\n\n", "\r\n \r\n", "\n\ufeff\n"):
        file.write_bytes(MARK + ("\r\n".join(lines) + end).encode())
        assert list(row_files.rows(file)) == [{"prompt": line} for line in lines]
        assert row_files.count(file) == len(lines)
    file.write_bytes(b"one\n\xff\nthree")
    assert list(row_files.rows(file))[1] == {"line": 2, "error": "not UTF-8 text (byte 0)"}
    file.write_bytes(b"\n \n")
    assert same_nothing(file)


@pytest.mark.parametrize(
    "kind, bad",
    [
        (pa.dictionary(pa.int32(), pa.binary()), True),
        (pa.list_(pa.large_binary()), True),
        (pa.struct([("a", pa.binary(4))]), True),
        (pa.map_(pa.string(), pa.binary()), True),
        (pa.binary_view(), True),
        (pa.dictionary(pa.int8(), pa.string()), False),
        (pa.string_view(), False),
        (pa.large_string(), False),
        (pa.decimal128(5, 2), False),
    ],
)
def test_a_column_of_bytes_is_found_wherever_it_is(kind, bad):
    assert row_files.holds_bytes(kind) == bad


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_prompts_of_any_kind_of_string_column(tmp_path, kind):
    values, file = ["one", None, "two", "one"], tmp_path / "a.parquet"
    column = pa.array(values).dictionary_encode() if kind == "dictionary" else pa.array(values, kind)
    pq.write_table(pa.table({"prompt": column}), file)  # of a categorical pandas makes a dictionary
    assert [row["prompt"] for row in row_files.rows(file)] == values == pq.read_table(file)["prompt"].to_pylist()


def test_numbers_pass_through_as_they_are(tmp_path):
    digits = "123456789012345678901234567890"
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "p", "text": "t", "n": {digits}}}')
    (row,) = row_files.rows(tmp_path / "a.jsonl")
    assert row["n"] == int(digits) == Decimal(digits)


def test_a_pipe_is_read_once(tmp_path):
    stream = io.BufferedReader(io.BytesIO(GOOD + b"\n\n" + GOOD))
    assert [number for number, _ in row_files.lines(stream, "a pipe")] == [1, 3]
