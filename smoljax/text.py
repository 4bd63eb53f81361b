"""Text files to documents: every document is given, or named among the refused with file, line and reason.

.txt .md .py hold one document each, .jsonl .json one a line, .parquet one a row; all but the last may be .gz or .zst.
encode.py makes token shards of them.
"""

import io
import os
from pathlib import Path
from typing import NamedTuple

import orjson

from smoljax.errors import DataError, UsageError
from smoljax.shards import sha256

TEXT, LINES, CODECS = (".txt", ".md", ".py"), (".jsonl", ".json"), {".gz": "gzip", ".zst": "zstd"}
LIMIT = 64 << 20  # bytes of one document: encoding takes some 160 bytes of memory a letter; a small .zst may be a bomb
PATIENCE = 1000  # refused documents beyond --max-bad after which a task stops reading (a wrong --text-key, say)


class Source(NamedTuple):
    """An input file: its name in messages and manifest, where it lies, what it was when it was hashed."""

    name: str
    path: str
    bytes: int
    mtime_ns: int
    sha256: str


def look(name: str, path: Path, hashed: bool = True) -> Source:
    try:
        stat = path.stat()
        return Source(name, str(path), stat.st_size, stat.st_mtime_ns, sha256(path) if hashed else "")
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None


def kind(path: Path) -> tuple[str | None, str | None]:
    """("text" | "lines" | "parquet" | None, codec) by the name's suffixes."""
    codec = CODECS.get(path.suffix.lower())
    suffix = (Path(path.stem) if codec else path).suffix.lower()
    if suffix == ".parquet" and not codec:
        return "parquet", None
    return "text" if suffix in TEXT else "lines" if suffix in LINES else None, codec


def find(inputs: list[str], out: Path) -> tuple[dict[str, Path], list[str]]:
    """The files to read by name, in the order of their names, and the names of those left aside.

    Names are relative to the input folder (of several inputs: to the folder that holds them all), so that the
    same text elsewhere gives the same manifest.
    """
    roots = [Path(i) for i in inputs]
    for root in roots:
        if not root.exists():
            raise DataError(f"no input at {root}: expected a file or a folder of text")
        if root.is_file() and kind(root)[0] is None:
            known = " ".join((*TEXT, *LINES, ".parquet"))
            raise UsageError(f"{root} is of no kind that can be read: expected {known} (the first five also .gz .zst)")
        if root.is_dir() and out.resolve().is_relative_to(root.resolve()):
            raise UsageError(f"--output {out} lies inside the input {root} and would be read as text: move it out")
    roots = [root.resolve() for root in roots]
    base = os.path.commonpath([root if root.is_dir() else root.parent for root in roots])
    files, ignored = {}, []

    def refuse(e: OSError):
        raise DataError(f"{e.filename} cannot be read ({e.strerror})")

    for root in roots:
        paths = [root] if root.is_file() else []
        for folder, subfolders, names in os.walk(root, onerror=refuse) if root.is_dir() else ():
            # A link to a folder is not followed (it may lead round in a circle), but it is named.
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            paths += [Path(folder, name) for name in (*names, *links)]
        for path in paths:
            name = os.path.relpath(path, base)
            if name in files:
                raise UsageError(f"{path} is among the inputs twice: name each file or folder once")
            if kind(path)[0] and path.is_file():
                files[name] = path
            else:
                ignored.append(name)
    if not files:
        raise DataError(f"no text in {', '.join(inputs)}: {len(ignored)} files, none of a kind that can be read")
    return dict(sorted(files.items())), sorted(ignored)


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
                pieces = ((*_judge(line, text_key), raw.tell()) for line in _lines(stream))
            else:
                pieces = iter([(*_judge(stream.read(LIMIT + 1)), raw.tell())])
            for count, (text, why, at, position) in enumerate(pieces, 1):
                yield (count if form != "text" else at), text, why, position
        if not count:
            yield 1, None, "no document in the file", 0
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{path} cannot be read beyond document {count} ({e}): replace the file") from None


def _lines(stream):
    while line := stream.readline(LIMIT + 1):
        rest = line
        while len(line) > LIMIT and rest and not rest.endswith(b"\n"):
            rest = stream.readline(1 << 20)
        yield line


def _rows(raw, path: Path, text_key: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(raw)
    schema = table.schema_arrow
    if text_key not in schema.names:
        raise DataError(f"{path} has no column {text_key!r} but {', '.join(schema.names)}: name one with --text-key")
    if (found := schema.field(text_key).type) not in (pa.string(), pa.large_string()):
        raise DataError(f"{path}: column {text_key!r} is {found}, expected strings: name another with --text-key")
    row, total, size = 0, table.metadata.num_rows, os.fstat(raw.fileno()).st_size
    for batch in table.iter_batches(256, columns=[text_key]):
        for value in batch.column(0).cast(pa.large_binary()):
            row, data = row + 1, value.as_py()
            yield (*((None, "null", 1) if data is None else _judge(data)), size * row // total)


def _judge(data: bytes, text_key: str | None = None) -> tuple[str | None, str | None, int]:
    """(text, None, 1) of a document's bytes, or (None, why, line of the fault)."""
    if len(data) > LIMIT:
        return None, f"longer than {LIMIT >> 20} MB, cut it up", 1
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()  # some editors begin a file with this mark
    except UnicodeDecodeError as e:
        return None, f"not UTF-8 ({e.reason} at byte {e.start})", e.object.count(b"\n", 0, e.start) + 1
    if text_key is not None and text.strip():
        try:
            record = orjson.loads(text)
        except orjson.JSONDecodeError as e:
            return None, f"not JSON ({e.msg} at character {e.pos + 1})", 1
        if not isinstance(record, dict):
            return None, f"a JSON {type(record).__name__}, expected an object", 1
        if text_key not in record:
            return None, f"no key {text_key!r} but {', '.join(map(repr, list(record)[:5])) or 'nothing'}", 1
        text = record[text_key]
        if not isinstance(text, str):
            return None, f"{text_key!r} is of type {type(text).__name__}, expected a string", 1
    return (text, None, 1) if text.strip() else (None, "empty", 1)


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
