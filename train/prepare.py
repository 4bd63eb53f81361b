"""Text to token shards: `smoljax prepare INPUT... --output DIR --tokenizer tokenizer.json`.

A datatrove pipeline in local processes: our reader, then datatrove's DocumentTokenizer, which encodes, appends
<|endoftext|> and shuffles the documents of each shard. The reader is ours because datatrove 0.10.1 drops malformed
lines with a log line only, and calls changed inputs "already completed". Here every document of the input is either in
the shards or named among the refused, and the work folder bears the hash of everything that decides the result: a
killed run goes on, a changed one starts afresh, the same one again does nothing. smoljax/shards.py reads the result.

    DIR/manifest.json, tokenizer.json, *.ds, *.ds.index, *.ds.metadata
    DIR/.prepare/<hash>/   logs of datatrove; while unfinished also parts/ (shards), ledger/ (what the reader counted)
"""

import argparse
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from smoljax import tokenizer as tok
from smoljax.errors import DataError, UsageError, run
from smoljax.shards import FORMAT, VERSION, Shards, sha256

TEXT, LINES, CODECS = (".txt", ".md", ".py"), (".jsonl", ".json"), {".gz": "gzip", ".zst": "zstd"}
LIMIT = 64 << 20  # bytes of one document: encoding takes some 160 bytes of memory a letter; a small .zst may be a bomb
TASK = 64 << 20  # input bytes of one shard
PATIENCE = 1000  # refused documents beyond --max-bad after which a task stops reading (a wrong --text-key, say)


class Source(NamedTuple):
    """An input file: its name in messages and manifest, where it lies, what it was when it was hashed."""

    name: str
    path: str
    bytes: int
    mtime_ns: int
    sha256: str


# ------------------------------------------------ find and read text ------------------------------------------------


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
        raise DataError(
            f"{count or len(refused)} of the documents cannot be used, --max-bad allows {max_bad} "
            f"({some}{'; ...' if len(refused) > 3 else ''}): mend the text, or allow more with --max-bad"
        )


# ---------------------------------------------------- the pipeline ----------------------------------------------------


@dataclass
class Reader:
    """datatrove's first step: the documents of one task; what it refused and counted goes into the task's ledger."""

    work: Path
    tasks: list[list[Source]]
    text_key: str
    max_bad: int

    def __call__(self, data, rank: int, world_size: int):
        from datatrove.data import Document

        counts = np.memmap(self.work / "progress", np.int64, "r+", shape=(world_size, 2))
        text_bytes, refused, sources = 0, [], []
        read = 0  # bytes on disk of the files behind us
        for source in self.tasks[rank]:
            good = 0
            for line, text, position in accepted(source, self.text_key, refused, self.max_bad):
                good += 1
                text_bytes += len(text.encode())
                counts[rank] = read + position, counts[rank, 1] + 1
                # `<|endoftext|>` inside a text becomes the special id, as in SmolLM's own shards, and so do
                # `<filename>` and its like, which code corpora write on purpose. Borders are in the index.
                yield Document(text=text, id=f"{source.name}:{line}")
            read += source.bytes
            counts[rank, 0] = read
            sources.append(good)
        ledger = {"documents_in": sum(sources) + len(refused), "text_bytes": text_bytes}
        write(self.work / "ledger" / f"{rank:05d}.json", ledger | {"refused": refused, "sources": sources})


def start_worker(log: Path, threads: int, stop):
    """Set up a worker process: quiet, and gone when its parent is (even killed) or calls to stop.

    An orphan would go on writing into the files of the next run. The call cannot be a signal: Python does not hear
    one while `tokenizers` encodes. datatrove forks a helper in each worker, which goes with it in the same way.
    """
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    sys.stderr = open(log, "a")  # datatrove's loguru writes to stderr: into the log folder with it
    from datatrove.utils.logging import setup_default_logger

    setup_default_logger()

    def last_while(needed):
        def watch():
            while needed():
                time.sleep(0.05)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()

    parent, worker = multiprocessing.parent_process(), os.getpid()
    last_while(lambda: parent.is_alive() and not stop.is_set())
    os.register_at_fork(after_in_child=lambda: last_while(lambda: os.getppid() == worker))


def run_task(reader: Reader, rank: int, seed: int):
    """One task of the pipeline, in a worker. Give the same steps to SlurmPipelineExecutor for a larger corpus."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer(
        output_folder=str(reader.work / "parts"),
        tokenizer_name_or_path=str(reader.work / "encoder.json"),  # a file here, so no hub is asked
        save_filename=reader.work.name,
        eos_token=tok.EOS,
        batch_size=16,  # all in memory with their encodings: 16 books of 1 MB are 2.5 GB
        seed=seed,
    )
    LocalPipelineExecutor(
        [reader, tokenizer], tasks=len(reader.tasks), local_tasks=1, local_rank_offset=rank, workers=1,
        logging_dir=str(reader.work / "logs"),
    ).run()  # fmt: skip


def deal(sources: list[Source]) -> list[list[Source]]:
    """Cut the files into tasks of about 64 MB, or into about 16 if that is less: by the inputs alone, so that the
    shards do not depend on --workers. A file is never cut, and documents are shuffled within their task."""
    size = min(TASK, max(1 << 20, sum(source.bytes for source in sources) // 16))
    tasks, weight = [[]], 0
    for source in sources:
        if weight >= size:
            tasks, weight = [*tasks, []], 0
        tasks[-1].append(source)
        weight += source.bytes
    return tasks


def shard_path(reader: Reader, out: Path, rank: int) -> Path:
    """A task's shard: in the work folder, or in the output if a killed run had come so far."""
    name = f"{reader.work.name}_{rank:05d}_00000_doc_shuffled.ds"
    return next((file for folder in (reader.work / "parts", out) if (file := folder / name).exists()), out / name)


def is_done(reader: Reader, out: Path, rank: int) -> bool:
    """Whether an earlier run completed the task and its files are all there."""
    marker, ledger = reader.work / f"logs/completions/{rank:05d}", reader.work / f"ledger/{rank:05d}.json"
    if marker.exists() and ledger.exists():
        ledger, shard = json.loads(ledger.read_text()), shard_path(reader, out, rank)
        if not (good := sum(ledger["sources"])):
            return True
        if shard.exists() and (index := Path(f"{shard}.index")).exists():
            ends = np.fromfile(index, "<u8")
            if len(ends) == good and shard.stat().st_size in (2 * ends[-1], 4 * ends[-1]):
                return True
    marker.unlink(missing_ok=True)
    return False


def run_pipeline(reader: Reader, out: Path, workers: int, seed: int) -> None:
    """Run the tasks that are not done in `workers` processes, with a progress bar."""
    todo = [rank for rank in range(len(reader.tasks)) if not is_done(reader, out, rank)]
    for folder in "parts", "ledger", "logs":
        (reader.work / folder).mkdir(exist_ok=True)
    counts = np.memmap(reader.work / "progress", np.int64, "w+", shape=(len(reader.tasks), 2))
    if not todo:
        return
    context = multiprocessing.get_context("forkserver")  # not fork: the caller may hold threads
    context.set_forkserver_preload(["datatrove.executor", "datatrove.pipeline.tokens", "pyarrow.parquet"])
    workers = min(workers, len(todo))
    stop = context.Event()
    setup = reader.work / "logs/workers.log", max(1, (os.cpu_count() or 1) // workers), stop
    pool = ProcessPoolExecutor(workers, context, start_worker, setup)
    tasks = [pool.submit(run_task, reader, rank, seed) for rank in todo]
    try:
        watch(tasks, counts, total=sum(source.bytes for rank in todo for source in reader.tasks[rank]))
        for task in tasks:
            if task.done():  # where one is not, another has failed
                task.result()
    except BrokenProcessPool:
        raise DataError(
            f"a worker process died, most likely for want of memory (see {setup[0]}): run the same command again with "
            "fewer --workers; finished tasks are kept"
        ) from None
    finally:
        if not all(task.done() for task in tasks):  # one has failed, or Ctrl-C: the others need not go on
            stop.set()
        pool.shutdown(cancel_futures=True)


def say(text: str) -> None:
    print(f"prepare: {text}", file=sys.stderr)


def watch(tasks: list, counts: np.ndarray, total: int) -> None:
    """Show progress on stderr until the tasks are done or one has failed: a bar, or a line every 5 s in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = "{task.fields[documents]:,} documents", BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console, start, told = Console(stderr=True), time.monotonic(), time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        line, pending = bar.add_task("", total=total, documents=0), tasks
        while pending:
            finished, pending = wait(pending, timeout=0.2)
            read, seen = (int(count) for count in counts.sum(axis=0))
            bar.update(line, completed=read, documents=seen)
            if any(task.exception() for task in finished):
                return
            if bar.disable and read and (now := time.monotonic()) > told + 5:
                told, rate = now, read / (now - start)
                rest = f"{rate / 1e6:.1f} MB/s, {(total - read) / rate:.0f} s to read"
                say(f"{seen:,} documents, {read / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rest}")


# ------------------------------------------------ manifest and output ------------------------------------------------


def write(path: Path, content: dict) -> None:
    """JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def describe(reader: Reader, out: Path, tokenizer, settings: dict, ignored: list[str]) -> dict:
    """Count and hash what the tasks wrote: the manifest."""
    ledgers = [json.loads((reader.work / f"ledger/{rank:05d}.json").read_text()) for rank in range(len(reader.tasks))]
    good = [sum(ledger["sources"]) for ledger in ledgers]
    refused = [entry for ledger in ledgers for entry in ledger["refused"]]
    check_refused(refused, reader.max_bad)
    if not sum(good):
        raise DataError("the inputs hold no documents: nothing to write")
    itemsize = 2 if (vocab_size := tokenizer.get_vocab_size()) <= 1 << 16 else 4  # datatrove's rule

    def shard(rank: int) -> tuple[dict, int]:
        file = shard_path(reader, out, rank)
        ends = np.fromfile(f"{file}.index", "<u8")
        tokens = np.memmap(file, f"<u{itemsize}", mode="r")
        assert len(ends) == good[rank] and ends[-1] == len(tokens), f"{file}: {len(ends)} ends, {good[rank]} documents"
        # datatrove writes the tokenizer's absolute path here; the tokenizer lies beside the shard.
        Path(f"{file}.metadata").write_text(f"tokenizer.json|{itemsize}\n{len(tokens)}\n{len(tokens):.3g} T")
        entry = {"file": file.name, "tokens": len(tokens), "documents": len(ends)}
        return entry | {"sha256": sha256(file), "index_sha256": sha256(f"{file}.index")}, int(tokens.max())

    with ThreadPoolExecutor() as pool:
        shards = list(pool.map(shard, [rank for rank, count in enumerate(good) if count]))
    per_source = [count for ledger in ledgers for count in ledger["sources"]]
    sources = [source for task in reader.tasks for source in task]
    listed = [
        {"file": source.name, "bytes": source.bytes, "sha256": source.sha256, "documents": count}
        for source, count in zip(sources, per_source, strict=True)
    ]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": f"uint{8 * itemsize}",
        "vocab_size": vocab_size,
        "max_token_id": max(largest for _, largest in shards),
        "eos_token": tok.EOS,
        "eos_token_id": tokenizer.token_to_id(tok.EOS),
        "tokenizer_sha256": sha256(reader.work / "tokenizer.json"),
        "tokens": sum(entry["tokens"] for entry, _ in shards),
        "documents": sum(entry["documents"] for entry, _ in shards),
        "text_bytes": sum(ledger["text_bytes"] for ledger in ledgers),
        "documents_in": sum(ledger["documents_in"] for ledger in ledgers),
        "refused": refused,
        "ignored_files": ignored,
        "sources": listed,
        "shards": [entry for entry, _ in shards],
        "settings": settings,
    }
    assert manifest["documents_in"] == manifest["documents"] + len(refused)
    return manifest


def publish(reader: Reader, out: Path, manifest: dict) -> None:
    """Move the shards beside the manifest and switch to them by its rename; a kill at any point can be resumed.

    Shards bear the key in their name, so those of an earlier run stay readable until the switch.
    """
    keep = {f"{entry['file']}{suffix}" for entry in manifest["shards"] for suffix in ("", ".index", ".metadata")}
    for name in keep:
        if (part := reader.work / "parts" / name).exists():
            os.replace(part, out / name)
    shutil.copyfile(reader.work / "tokenizer.json", out / "tokenizer.json.tmp")
    os.replace(out / "tokenizer.json.tmp", out / "tokenizer.json")
    write(out / "manifest.json", manifest)
    for file in out.iterdir():
        if file.name not in keep and file.name.endswith((".ds", ".ds.index", ".ds.metadata")):
            file.unlink()
    for folder in (out / ".prepare").iterdir():
        if folder.is_dir() and folder != reader.work:
            shutil.rmtree(folder)
    shutil.rmtree(reader.work / "parts")
    (reader.work / "progress").unlink()


@contextmanager
def claim(out: Path):
    """The output folder, made if need be, for this process alone."""
    manifest = out / "manifest.json"
    ours = (out / ".prepare").is_dir() or (manifest.is_file() and FORMAT.encode() in manifest.read_bytes()[:100])
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--output {out} is not empty and not from `smoljax prepare`: give a new or an empty folder")
    try:
        (out / ".prepare").mkdir(parents=True, exist_ok=True)
        lock = open(out / ".prepare/lock", "w")
    except OSError as e:
        raise UsageError(f"--output {out} cannot be written ({e.strerror}): give another folder") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
        except OSError:
            raise UsageError(f"another `smoljax prepare` is at work in {out}: wait for it to end") from None
        yield


def look(name: str, path: Path, hashed: bool = True) -> Source:
    try:
        stat = path.stat()
        return Source(name, str(path), stat.st_size, stat.st_mtime_ns, sha256(path) if hashed else "")
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None


def up_to_date(out: Path, key: str) -> dict | None:
    """The manifest in `out` if it is whole and of this very input."""
    if not (out / "manifest.json").exists():
        return None
    try:
        Shards(out)
    except DataError as e:
        say(f"{e}; writing it again")
        return None
    manifest = json.loads((out / "manifest.json").read_text())
    return manifest if manifest["settings"]["key"] == key else None


# ---------------------------------------------------- the program ----------------------------------------------------


def train_tokenizer(sources: list[Source], args, path: Path) -> None:
    """Learn from the very documents that will be encoded; too many bad ones end here, before the long part."""
    refused = []

    def texts():
        for source in sources:
            for _, text, _ in accepted(source, args.text_key, refused, args.max_bad):
                yield text
        check_refused(refused, args.max_bad)

    say(f"training a tokenizer of {args.train_tokenizer} ids")
    temporary = path.with_name("tokenizer.json.tmp")
    tok.train(texts(), args.train_tokenizer, temporary)
    os.replace(temporary, path)


def load_tokenizer(path: Path, given: str):
    """The tokenizer as datatrove must have it: contiguous ids, an EOS, and no truncation or padding, which a
    tokenizer.json may ask for and which would silently cut documents."""
    tokenizer = tok.load(path)
    if tokenizer.token_to_id(tok.EOS) is None:
        raise DataError(f"{given} has no token {tok.EOS!r}, which ends every document: give a tokenizer that has it")
    if (top := max(tokenizer.get_vocab().values()) + 1) != (size := tokenizer.get_vocab_size()):
        raise DataError(f"{given} has {size} tokens but ids up to {top - 1}: expected ids without holes")
    if missing := tok.missing_bytes(tokenizer):
        names = " ".join(f"{byte:02X}" for byte in missing)
        say(f"this tokenizer has no token for {len(missing)} of the 256 bytes and drops them: {names}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def prepare(args, out: Path, files: dict[str, Path], ignored: list[str]) -> tuple[dict, bool]:
    """Bring `out` up to date: its manifest, and whether there was nothing to do."""
    with ThreadPoolExecutor() as pool:
        sources = list(pool.map(look, files, files.values()))
    settings = {"text_key": args.text_key, "seed": args.seed, "task_bytes": TASK}
    settings |= {"train_tokenizer": args.train_tokenizer} if args.train_tokenizer else {}
    settings["tokenizer"] = None if args.train_tokenizer else tok.sha256(args.tokenizer)
    settings["versions"] = {name: version(name) for name in ("datatrove", "tokenizers", "numpy")}
    identity = [VERSION, settings, [(source.name, source.bytes, source.sha256) for source in sources], ignored]
    settings["key"] = key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    if manifest := up_to_date(out, key):
        check_refused(manifest["refused"], args.max_bad)
        return manifest, True
    big = max(sources, key=lambda source: source.bytes)
    if args.workers > 1 and big.bytes > max(4 << 20, sum(source.bytes for source in sources) / 2):
        say(f"{big.name} is more than half of the input, and one file is one process: cut it up to use more")
    work = out / ".prepare" / key
    work.mkdir(exist_ok=True)
    if args.tokenizer:
        shutil.copyfile(tok.find(args.tokenizer), work / "tokenizer.json")
    elif not (work / "tokenizer.json").exists():
        train_tokenizer(sources, args, work / "tokenizer.json")
    tokenizer = load_tokenizer(work / "tokenizer.json", args.tokenizer or "the trained tokenizer")
    tokenizer.save(str(work / "encoder.json"))
    reader = Reader(work.resolve(), deal(sources), args.text_key, args.max_bad)
    run_pipeline(reader, out, args.workers, args.seed)
    for source in sources:
        if look(source.name, Path(source.path), hashed=False)[2:4] != source[2:4]:
            shutil.rmtree(work)
            raise DataError(f"{source.path} changed while it was read: run the same command again when it rests")
    manifest = describe(reader, out, tokenizer, settings, ignored)
    publish(reader, out, manifest)
    Shards(out)
    return manifest, False


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="smoljax prepare",
        description="Turn text into token shards: .txt .md .py (a file is a document), .jsonl .json (a line is a "
        "document), any of them as .gz or .zst, .parquet (a row is a document), or folders of these.",
        epilog="One file is read by one process, however large: cut a huge file into parts of some 64 MB to use all "
        "workers. The same command again finishes a killed run, and does nothing where nothing has changed.",
    )

    def natural(text: str) -> int:
        return int(text) if text.isdecimal() else parser.error(f"expected a number, 0 or more, not {text!r}")

    cores = getattr(os, "process_cpu_count", os.cpu_count)()
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="a file, or a folder to read through")
    parser.add_argument("--output", metavar="DIR", help="the folder of shards; new, empty, or from an earlier run")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, or a folder that holds one")
    parser.add_argument("--train-tokenizer", metavar="V", type=natural, help="learn a tokenizer of V ids from the text")
    parser.add_argument("--text-key", metavar="KEY", default="text", help="JSON key or parquet column (default: text)")
    bad = "go on with up to N documents refused: not UTF-8, not JSON, empty (default: 0)"
    parser.add_argument("--max-bad", metavar="N", type=natural, default=0, help=bad)
    processes = "processes (default: one a core); the shards do not depend on it"
    parser.add_argument("--workers", metavar="N", type=natural, default=cores, help=processes)
    seed = "of the shuffle within a shard (default: 0)"
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help=seed)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON line")
    parser.add_argument("--verify", metavar="DIR", help="only hash the shards in DIR against their manifest")
    args = parser.parse_args(argv)
    if args.verify:
        if args.inputs or args.output:
            parser.error("--verify stands alone")
        return args
    if not args.inputs or not args.output:
        parser.error("expected INPUT... and --output DIR")
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        parser.error("expected either --tokenizer FILE or --train-tokenizer V")
    if args.workers == 0:
        parser.error("expected --workers of 1 or more")
    return args


def report(manifest: dict, out: Path, seconds: float, current: bool, as_json: bool) -> None:
    documents, tokens, size, shards = (manifest[key] for key in ("documents", "tokens", "text_bytes", "shards"))
    refused, ignored = manifest["refused"], manifest["ignored_files"]
    if as_json:
        summary = {"documents": documents, "tokens": tokens, "text_bytes": size, "bytes_per_token": size / tokens}
        summary |= {"refused": len(refused), "ignored_files": len(ignored), "shards": len(shards), "output": str(out)}
        summary |= {"up_to_date": current, "seconds": round(seconds, 3)}
        print(json.dumps(summary | {"tokens_per_second": None if current else round(tokens / seconds)}))
        return
    print(f"{documents:,} documents, {tokens:,} tokens, {size:,} bytes of text ({size / tokens:.2f} a token)")
    for what, names in ("refused", [f"{r['where']} ({r['why']})" for r in refused]), ("ignored", ignored):
        if names:
            more = ", ... (all in manifest.json)" if len(names) > 3 else ""
            print(f"{len(names):,} {what}: {', '.join(names[:3])}{more}")
    speed = "up to date" if current else f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    print(f"{speed}: {len(shards)} shard{'s' * (len(shards) > 1)} in {out}")


def main(argv=None) -> int:
    args, started = parse(argv), time.perf_counter()
    if args.verify:
        shards = Shards(args.verify)
        shards.verify()
        print(f"{args.verify}: {len(shards.shards)} shards, {shards.num_tokens:,} tokens, all as manifest.json says")
        return 0
    if args.train_tokenizer is not None:
        tok.check_vocab_size(args.train_tokenizer)
    else:
        tok.load(args.tokenizer)  # a mistake here is known before the text is read
    out = Path(args.output)
    found = find(args.inputs, out)
    with claim(out):
        try:
            manifest, current = prepare(args, out, *found)
        except OSError as e:  # the inputs' own are told apart before: disk full, quota, rights
            raise DataError(f"{e.filename or out} failed ({e.strerror}): mend it and run the same command again") from e
    report(manifest, out, time.perf_counter() - started, current, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
