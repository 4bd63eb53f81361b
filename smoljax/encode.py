"""Documents to token shards: a datatrove pipeline in local processes, one task for some 64 MB of input.

Our reader, then datatrove's DocumentTokenizer, which encodes, appends <|endoftext|> and shuffles the documents of each
shard. The reader is ours because datatrove 0.10.1 drops malformed lines with a log line only. train/prepare.py decides
what is to be done and when; executors.py runs the same tasks on a cluster; shards.py reads the result.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from smoljax import atomic
from smoljax import tokenizer as tok
from smoljax.corpus import Source
from smoljax.errors import DataError, Error
from smoljax.shards import FORMAT, VERSION, sha256
from smoljax.text import accepted, check_refused

TASK = 64 << 20  # input bytes of one shard
NOTHING = "the inputs hold no documents: nothing to write"


@dataclass
class Reader:
    """datatrove's first step: the documents of one task; what it refused and counted goes into the task's ledger.

    All that a task needs to know travels in here, to another process or another machine. `progress`, bytes and
    documents for the bar, is there for local processes alone (two machines may not map one file); `failed`, where a
    task leaves the sentence that ended it, is there on a cluster alone.
    """

    work: Path
    tasks: list[list[Source]]
    text_key: str
    max_bad: int
    versions: dict[str, str]

    def __call__(self, data, rank: int, world_size: int):
        failed = self.work / "failed"
        if not failed.is_dir():
            yield from self.documents(rank)
            return
        parent = os.getppid()
        last_while(lambda: os.getppid() == parent)
        if any(failed.iterdir()):
            raise Error("another task has failed, and so the whole: this one is not begun")
        try:
            there = {name: version(name) for name in self.versions}
            if there != self.versions:  # which could mean other shards
                raise Error(f"the cluster has {there}, here are {self.versions}: install the same on both")
            yield from self.documents(rank)
        except Error as e:
            atomic.write_json(failed / f"{rank:05d}.json", [e.code, str(e)])
            raise

    def documents(self, rank: int):
        from datatrove.data import Document

        live, shape = (self.work / "progress").exists(), (len(self.tasks), 2)
        counts = np.memmap(self.work / "progress", np.int64, "r+", shape=shape) if live else np.zeros(shape, np.int64)
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
        atomic.write_json(self.work / "ledger" / f"{rank:05d}.json", ledger | {"refused": refused, "sources": sources})


def last_while(needed):
    """End this process when `needed()` is false, looking every 50 ms. An orphan would go on writing into the files of
    the next run."""

    def watch():
        while needed():
            time.sleep(0.05)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(log: Path, threads: int, stop):
    """Set up a worker process: quiet, and gone when its parent is (even killed) or calls to stop.

    The call cannot be a signal: Python does not hear one while `tokenizers` encodes. datatrove forks a helper in each
    worker, which goes with it in the same way.
    """
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    sys.stderr = open(log, "a")  # datatrove's loguru writes to stderr: into the log folder with it
    from datatrove.utils.logging import setup_default_logger

    setup_default_logger()
    parent, worker = multiprocessing.parent_process(), os.getpid()
    last_while(lambda: parent.is_alive() and not stop.is_set())
    os.register_at_fork(after_in_child=lambda: last_while(lambda: os.getppid() == worker))


def steps(reader: Reader, seed: int) -> list:
    """The pipeline, new for each task: DocumentTokenizer's shuffle goes on where its last one ended."""
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer(
        output_folder=str(reader.work / "parts"),
        tokenizer_name_or_path=str(reader.work / "encoder.json"),  # a file here, so no hub is asked
        save_filename=reader.work.name,
        eos_token=tok.EOS,
        batch_size=16,  # all in memory with their encodings: 16 books of 1 MB are 2.5 GB
        seed=seed,
    )
    return [reader, tokenizer]


def run_task(reader: Reader, rank: int, seed: int):
    """One task of the pipeline, in a worker."""
    from datatrove.executor import LocalPipelineExecutor

    LocalPipelineExecutor(
        steps(reader, seed), tasks=len(reader.tasks), local_tasks=1, local_rank_offset=rank, workers=1,
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


def begin(reader: Reader, out: Path) -> list[int]:
    """The tasks that are not done, in a work folder that is ready for them."""
    todo = [rank for rank in range(len(reader.tasks)) if not is_done(reader, out, rank)]
    for folder in "parts", "ledger", "logs":
        (reader.work / folder).mkdir(exist_ok=True)
    shutil.rmtree(reader.work / "failed", ignore_errors=True)
    (reader.work / "progress").unlink(missing_ok=True)
    return todo


def run_pipeline(reader: Reader, out: Path, workers: int, seed: int) -> None:
    """Run the tasks that are not done in `workers` processes, with a progress bar."""
    if not (todo := begin(reader, out)):
        return
    counts = np.memmap(reader.work / "progress", np.int64, "w+", shape=(len(reader.tasks), 2))
    context = multiprocessing.get_context("forkserver")  # not fork: the caller may hold threads
    context.set_forkserver_preload(["datatrove.executor", "datatrove.pipeline.tokens", "pyarrow.parquet"])
    workers = min(workers, len(todo))
    stop = context.Event()
    setup = reader.work / "logs/workers.log", max(1, (os.cpu_count() or 1) // workers), stop
    # Workers are born deaf to Ctrl-C, which a terminal sends to all: the parent hears it, and stops them.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, start_worker, setup)
    tasks = [pool.submit(run_task, reader, rank, seed) for rank in todo]
    signal.signal(signal.SIGINT, heard)
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


def describe(reader: Reader, out: Path, tokenizer, settings: dict, ignored: list[str]) -> dict:
    """Count and hash what the tasks wrote: the manifest."""
    ledgers = [json.loads((reader.work / f"ledger/{rank:05d}.json").read_text()) for rank in range(len(reader.tasks))]
    good = [sum(ledger["sources"]) for ledger in ledgers]
    refused = [entry for ledger in ledgers for entry in ledger["refused"]]
    check_refused(refused, reader.max_bad)
    if not sum(good):
        raise DataError(NOTHING)
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
    atomic.copy(reader.work / "tokenizer.json", out / "tokenizer.json")
    atomic.write_json(out / "manifest.json", manifest)
    for file in out.iterdir():
        if file.name not in keep and file.name.endswith((".ds", ".ds.index", ".ds.metadata")):
            file.unlink()
    for folder in (out / ".prepare").iterdir():
        if folder.is_dir() and folder.name != reader.work.name:  # out may be relative, work is not
            shutil.rmtree(folder)
    shutil.rmtree(reader.work / "parts")
    (reader.work / "progress").unlink(missing_ok=True)
