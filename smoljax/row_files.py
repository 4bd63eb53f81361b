"""Rows of files, as prepare, generate and score read them: of JSON lines, of parquet, or a text a line.

A blank line (whitespace, a byte order mark) is nothing; but between prompts it is one without text, so that row i is
of line i. A row that cannot be read has a NoRow in its place; a file that is not whole, or no UTF-8 at all, is a
DataError.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path

from smoljax import strict_json
from smoljax.errors import DataError, require

KINDS = (".jsonl", ".parquet", ".txt")
LIMIT = 64 << 20  # bytes of a row: encoding takes some 160 bytes of memory a letter; a small .zst may be a bomb
TOO_LONG = f"longer than {LIMIT >> 20} MB, cut it up"
HEAD = 4096  # bytes of a file that tell what it is
UTF16, UTF32 = "in UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)", "in UTF-32 (iconv -f UTF-32 -t UTF-8 converts it)"
# In this order, for UTF-32's mark begins with UTF-16's.
MARKS = {codecs.BOM_UTF32_LE: UTF32, codecs.BOM_UTF32_BE: UTF32, codecs.BOM_UTF16_LE: UTF16, codecs.BOM_UTF16_BE: UTF16}
MARKS[b"\x00\x05\x16\x07"] = "a Mac's attributes of another file, without its text"
MARKS[b"version https://git-lfs.github.com/spec/"] = "Git LFS's pointer to a file (git lfs pull brings it)"


class NoRow(dict):
    """In place of a row that cannot be read: {"line": its number, "error": why}."""


def foreign(head: bytes) -> str | None:
    """What a file is that is not UTF-8 text, though its bytes may be valid UTF-8; None where nothing is wrong.

    UTF-16 without a mark: of most alphabets' letters every second byte is below 9 (0 of Latin, 4 of Cyrillic), where
    UTF-8 has control characters.
    """
    for mark, what in MARKS.items():
        if head.startswith(mark):
            return what
    if len(head) >= 4 and not head.strip(b"\0"):
        return "of zero bytes, as a crash leaves files"
    low = sorted(sum(byte < 9 for byte in head[i::2]) / max(1, len(head) // 2) for i in (0, 1))
    if len(head) >= 4 and low[0] < 0.6 and low[1] > 0.75:
        return UTF32 if head.count(b"\0\0") > len(head) // 8 else UTF16
    return None


def blank(text: str) -> bool:
    return not text.strip().strip("\ufeff").strip()


def lines(stream, name, inner: bool = False) -> Iterator[tuple[int, bytes]]:
    """The lines of a buffered stream that are not blank, and their numbers; of one beyond LIMIT its first LIMIT + 1.

    inner: also the blank ones that others follow.
    """
    if what := foreign(stream.peek(HEAD)[:HEAD]):
        raise DataError(f"{name} is {what}, expected text in UTF-8")
    number, blanks = 0, []
    while line := stream.readline(LIMIT + 1):
        number, rest = number + 1, line
        while len(line) > LIMIT and rest and not rest.endswith(b"\n"):
            rest = stream.readline(1 << 20)
        if line[:1] == b"{" or not blank(line.decode(errors="replace")):
            yield from blanks
            yield number, line
            blanks = []
        elif inner:
            blanks.append((number, line))


def prompt(line: bytes) -> dict:
    try:
        return {"prompt": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 text (byte {e.start})") from None


def line_rows(file: str | Path, prompts: bool = False) -> Iterator[tuple[int, dict]]:
    """(number of its line, a row or a NoRow) of JSON lines, or of prompts a line."""
    try:
        with open(file, "rb") as stream:
            for number, line in lines(stream, file, prompts):
                try:
                    if len(line) > LIMIT:
                        raise DataError(TOO_LONG)
                    found = prompt(line) if prompts else strict_json.row(line)
                except DataError as e:
                    found = NoRow(line=number, error=str(e))
                yield number, found
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror})") from None


def rows(path: Path) -> Iterator[dict]:
    """A batch job's rows.

    .jsonl: objects with a "prompt" or "messages"; .parquet: rows with such a column; .txt: a prompt a line.
    """
    if path.suffix == ".parquet":
        yield from parquet(path)
    else:
        for _, found in line_rows(path, prompts=path.suffix == ".txt"):
            yield found


def parquet(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    begun = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from converted(batch, begun)
                begun += len(batch)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path} is no sound parquet file ({said(e)})") from None


def converted(batch, begun: int) -> list[dict]:
    """Its rows, by themselves where one has what Python cannot hold: a date in the year 20,000, a text not in UTF-8."""
    import pyarrow

    kinds = (ValueError, OverflowError, pyarrow.ArrowException)
    try:
        return as_python(batch)
    except kinds:
        found = []
    for i in range(len(batch)):
        try:
            found += as_python(batch.slice(i, 1))
        except kinds as e:
            found.append(NoRow(line=begun + i, error=said(e)))
    return found


def as_python(batch) -> list[dict]:
    """A column of times in nanoseconds, of which Python's own would lose the end, as texts."""
    import pyarrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        columns[name] = column.cast(pyarrow.string()) if getattr(column.type, "unit", None) == "ns" else column
    return pyarrow.RecordBatch.from_pydict(columns).to_pylist()


def said(e: Exception) -> str:
    return getattr(e, "strerror", None) or str(e).partition("\n")[0]


def count(path: Path) -> int:
    """How many rows a batch job's file has; a mistake in its name, or a file that cannot be, is said here."""
    require(path.suffix in KINDS, f"--input {path} ends with {path.suffix!r}, expected {', '.join(KINDS)}")
    require(not path.exists() or path.is_file(), f"--input {path} is no file, which a job reads more than once")
    try:
        with open(path, "rb") as file:
            if path.suffix == ".parquet":
                found = parquet_count(path)
            else:
                found = sum(1 for _ in lines(file, path, inner=path.suffix == ".txt"))
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None
    require(
        found > 0, f"--input {path} holds no rows; give it some, such as " + '{"prompt": "The capital of France is"}'
    )
    return found


def parquet_count(path: Path) -> int:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, found = file.schema_arrow, file.metadata.num_rows
    except Exception as e:
        raise DataError(f"{path} is no sound parquet file ({said(e)})") from None
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of the two")
    binary = [field.name for field in schema if holds_bytes(field.type)]
    if binary:
        raise DataError(f"{path} has bytes in its column {binary[0]!r}, which the output's JSON cannot hold; drop it")
    return found


def holds_bytes(kind) -> bool:
    """Whether a column of that type has bytes, in a list or an object or a dictionary too."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if kind.num_fields:
        return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    kinds = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(is_one(kind) for is_one in kinds)
