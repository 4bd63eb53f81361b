"""A batch job's input: rows with a prompt or messages, of .jsonl, .parquet or .txt."""

from collections.abc import Iterator
from pathlib import Path

from smoljax import strict_json
from smoljax.errors import DataError, require

KINDS = (".jsonl", ".parquet", ".txt")


class NoRow(dict):
    """In place of a row that cannot be read: {"line": its number, "error": why}."""


def rows(path: Path) -> Iterator[dict]:
    """A file's rows.

    .jsonl: objects with a "prompt" or "messages", blank lines are nothing; .parquet: rows with such a column; .txt: a
    prompt a line.
    """
    if path.suffix == ".parquet":
        yield from parquet(path)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if path.suffix == ".jsonl" and not line.strip():
                continue
            try:
                yield strict_json.row(line) if path.suffix == ".jsonl" else {"prompt": plain(line)}
            except DataError as e:
                yield NoRow(line=number, error=str(e))


def plain(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 text (byte {e.start})") from None


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
    """How many rows a file has; a mistake in its name, or a file that cannot be, is said here."""
    require(path.suffix in KINDS, f"--input {path} ends with {path.suffix!r}, expected {', '.join(KINDS)}")
    require(not path.exists() or path.is_file(), f"--input {path} is no file, which a job reads more than once")
    try:
        with open(path, "rb") as file:
            if path.suffix == ".parquet":
                found = parquet_count(path)
            else:
                found = sum(1 for line in file if path.suffix == ".txt" or line.strip())
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
    """Whether a column of that type has bytes, in a list or an object too."""
    from pyarrow import types

    if kind.num_fields:
        return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    kinds = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(is_one(kind) for is_one in kinds)
