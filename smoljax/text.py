"""Text files to documents: every document is given, or named among the refused with file, line and reason.

.txt .md .py hold one document each, .jsonl .json one a line, .parquet one a row; all but the last may be .gz or .zst.
Blank lines and blank files hold none. corpus.py finds the files, encode.py makes token shards of the documents.
"""

import io
import os
from pathlib import Path

from smoljax import row_files, strict_json
from smoljax.corpus import Source, kind
from smoljax.errors import DataError

RULES = 2  # to be raised when other documents are read from the same files
PATIENCE = 1000  # refused documents beyond --max-bad after which a task stops reading (a wrong --text-key, say)


def documents(path: Path, text_key: str):
    """Yield (line, text, why, position) for each document of a file: text of a good one, why of a refused one.

    `position` is how far we are in the file, in bytes on disk. A file that is not whole (a truncated .gz) hides
    an unknown number of documents, so it is an error whatever --max-bad says.
    """
    import pyarrow as pa

    form, codec = kind(path)
    count = 0
    try:
        with open(path, "rb") as raw:
            # pyarrow's streams are bounded in memory, go through concatenated members, and know a truncated file
            # (zstandard's own reader ends there without an error).
            stream = io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20) if codec else raw
            if form == "parquet":
                pieces = _rows(raw, path, text_key)
            elif form == "lines":
                numbered = row_files.lines(stream, path)
                pieces = ((number, *_of_line(line, text_key), raw.tell()) for number, line in numbered)
            else:
                pieces = ((*piece, raw.tell()) for piece in _whole(stream))
            for piece in pieces:
                count += 1
                yield piece
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{path} cannot be read beyond document {count} ({e}): replace the file") from None


def _whole(stream):
    """Yield (line of the fault, text, why) of the one document; of a blank file, which has none, nothing."""
    if what := row_files.foreign(stream.peek(row_files.HEAD)[: row_files.HEAD]):
        yield 1, None, f"{what}, expected text in UTF-8"
        return
    data = stream.read(row_files.LIMIT + 1)
    if len(data) > row_files.LIMIT:
        yield 1, None, row_files.TOO_LONG
        return
    try:
        text = data.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as e:
        yield data.count(b"\n", 0, e.start) + 1, None, f"not UTF-8 ({e.reason} at byte {e.start})"
        return
    if not row_files.blank(text):
        yield 1, text, None


def _of_line(line: bytes, text_key: str) -> tuple[str | None, str | None]:
    """(text, None) of a JSON line, or (None, why)."""
    if len(line) > row_files.LIMIT:
        return None, row_files.TOO_LONG
    try:
        record = strict_json.row(line)
    except DataError as e:
        return None, str(e)
    if text_key not in record:
        return None, f"no key {text_key!r} but {', '.join(map(repr, list(record)[:5])) or 'nothing'}"
    text = record[text_key]
    if not isinstance(text, str):
        return None, f"{text_key!r} is of type {type(text).__name__}, expected a string"
    return (None, "empty") if row_files.blank(text) else (text, None)


def _rows(raw, path: Path, text_key: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if what := row_files.foreign(raw.peek(row_files.HEAD)[: row_files.HEAD]):
        raise DataError(f"{path} is {what}, expected parquet")
    table = pq.ParquetFile(raw)
    row, total, size = 0, table.metadata.num_rows, os.fstat(raw.fileno()).st_size
    if not total:
        return
    schema = table.schema_arrow
    if text_key not in schema.names:
        raise DataError(f"{path} has no column {text_key!r} but {', '.join(schema.names)}: name one with --text-key")
    if schema.names.count(text_key) > 1:
        raise DataError(f"{path} has the column {text_key!r} twice: rename one of the two")
    found = schema.field(text_key).type
    values = found.value_type if pa.types.is_dictionary(found) else found  # pandas' categorical
    if values not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise DataError(f"{path}: column {text_key!r} is {found}, expected strings: name another with --text-key")
    for batch in table.iter_batches(256, columns=[text_key]):
        column = batch.column(text_key)  # by name: a column "a.b" brings the b of a column "a" along
        column = column.dictionary_decode() if pa.types.is_dictionary(found) else column
        for value in column.cast(pa.large_binary()):
            row += 1
            yield row, *_of_value(value.as_py()), size * row // total


def _of_value(data: bytes | None) -> tuple[str | None, str | None]:
    """(text, None) of a value in a column of strings, or (None, why)."""
    if data is None:
        return None, "null"
    if len(data) > row_files.LIMIT:
        return None, row_files.TOO_LONG
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        return None, f"not UTF-8 ({e.reason} at byte {e.start})"
    return (None, "empty") if row_files.blank(text) else (text, None)


def accepted(source: Source, text_key: str, refused: list[dict], max_bad: int):
    """Yield (line, text, position) of the good documents; put the others, with the reason, into `refused`."""
    for line, text, why, position in documents(Path(source.path), text_key):
        if why is None:
            yield line, text, position
        else:
            refused.append({"where": f"{source.name}:{line}", "why": why})
            if len(refused) > max_bad + PATIENCE:
                check_refused(refused, max_bad, f"more than {max_bad + PATIENCE}")


def check_refused(refused: list[dict], max_bad: int, count: str = "") -> None:
    if len(refused) > max_bad:
        some = "; ".join(f"{entry['where']}: {entry['why']}" for entry in refused[:3])
        cure = "mend the text, or allow more with --max-bad"
        if refused[0]["why"].startswith("no key"):
            cure = "name the key that holds the text with --text-key, or allow more with --max-bad"
        raise DataError(
            f"{count or len(refused)} of the documents cannot be used, --max-bad allows {max_bad} "
            f"({some}{'; ...' if len(refused) > 3 else ''}): {cure}"
        )
