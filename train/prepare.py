"""Text to token shards: `smoljax prepare INPUT... --output DIR --tokenizer tokenizer.json`.

Every document of the input is either in the shards or named among the refused (text.py), and the work folder bears the
hash of everything that decides the result: a killed run goes on, a changed one starts afresh, the same one again does
nothing. datatrove 0.10.1 would call changed inputs "already completed".

    DIR/manifest.json, tokenizer.json, *.ds, *.ds.index, *.ds.metadata
    DIR/.prepare/<hash>/   logs of datatrove; while unfinished also parts/ (shards), ledger/ (what the reader counted)
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from smoljax import atomic, executors, runtime, special_tokens
from smoljax import tokenizer as tok
from smoljax.corpus import Source, find, look
from smoljax.encode import NOTHING, TASK, Reader, deal, describe, publish, say
from smoljax.errors import DataError, UsageError, run
from smoljax.shards import FORMAT, VERSION, Shards
from smoljax.text import RULES, accepted, check_refused


@contextmanager
def claim(out: Path):
    """The output folder, made if need be, for this process alone."""
    manifest = out / "manifest.json"
    ours = (out / ".prepare").is_dir() or (manifest.is_file() and FORMAT.encode() in manifest.read_bytes()[:100])
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--output {out} is not empty and not from `smoljax prepare`: give a new or an empty folder")
    try:
        (out / ".prepare").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"--output {out} cannot be written ({e.strerror}): give another folder") from None
    with atomic.lock(out / ".prepare/lock", f"another `smoljax prepare` is at work in {out}: wait for it to end"):
        yield


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
    if manifest["settings"]["key"] == key:
        return manifest
    say(f"replacing the {manifest['tokens']:,} tokens in {out}, which are of other inputs or settings")
    return None


def train_tokenizer(sources: list[Source], args, path: Path) -> None:
    """Learn from the very documents that will be encoded; too many bad ones end here, before the long part."""
    refused, good = [], 0

    def texts():
        nonlocal good
        for source in sources:
            for _, text, _ in accepted(source, args.text_key, refused, args.max_bad):
                good += 1
                yield text
        check_refused(refused, args.max_bad)
        if not good:
            raise DataError(NOTHING)

    say(f"training a tokenizer of {args.train_tokenizer} ids")
    temporary = path.with_name("tokenizer.json.tmp")
    tok.train(texts(), args.train_tokenizer, temporary)
    os.replace(temporary, path)


def load_tokenizer(path: Path, given: str):
    """The tokenizer as datatrove must have it: contiguous ids and an EOS."""
    tokenizer = tok.load(path)
    if tokenizer.token_to_id(tok.EOS) is None:
        raise DataError(f"{given} has no token {tok.EOS!r}, which ends every document: give a tokenizer that has it")
    if (top := max(tokenizer.get_vocab().values()) + 1) != (size := tokenizer.get_vocab_size()):
        raise DataError(f"{given} has {size} tokens but ids up to {top - 1}: expected ids without holes")
    if missing := tok.missing_bytes(tokenizer):
        names = " ".join(f"{byte:02X}" for byte in missing)
        say(f"this tokenizer has no token for {len(missing)} of the 256 bytes and drops them: {names}")
    return tokenizer


def prepare(args, out: Path, files: dict[str, Path], ignored: list[str]) -> tuple[dict, bool]:
    """Bring `out` up to date: its manifest, and whether there was nothing to do."""
    with ThreadPoolExecutor() as pool:
        sources = list(pool.map(look, files, files.values()))
    settings = {"text_key": args.text_key, "seed": args.seed, "task_bytes": TASK}
    settings |= {"train_tokenizer": args.train_tokenizer} if args.train_tokenizer else {}
    given = special_tokens.tokenizer_json(args.tokenizer) if args.tokenizer else b""
    settings["tokenizer"] = hashlib.sha256(given).hexdigest() if given else None
    settings["versions"] = {name: version(name) for name in ("datatrove", "tokenizers", "numpy")}
    identity = [VERSION, RULES, settings, [(source.name, source.bytes, source.sha256) for source in sources], ignored]
    settings["key"] = key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    if manifest := up_to_date(out, key):
        check_refused(manifest["refused"], args.max_bad)
        return manifest, True
    big = max(sources, key=lambda source: source.bytes)
    if args.workers != 1 and big.bytes > max(4 << 20, sum(source.bytes for source in sources) / 2):
        say(f"{big.name} is more than half of the input, and one file is one process: cut it up to use more")
    work = out / ".prepare" / key
    work.mkdir(exist_ok=True)
    if args.tokenizer:
        atomic.write(work / "tokenizer.json", given)
    elif not (work / "tokenizer.json").exists():
        train_tokenizer(sources, args, work / "tokenizer.json")
    tokenizer = load_tokenizer(work / "tokenizer.json", args.tokenizer or "the trained tokenizer")
    atomic.write(work / "encoder.json", tokenizer.to_str())  # a cluster's tasks may be reading it
    reader = Reader(work.resolve(), deal(sources), args.text_key, args.max_bad, settings["versions"])
    executors.run(args.executor, reader, out, args.workers, args.seed, args.cluster)
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
        "document), any of them as .gz or .zst, .parquet (a row is a document), or folders of these. What is left "
        "aside in a folder, as hidden files are, is named in DIR/manifest.json.",
        epilog="One file is read by one process, however large: cut a huge file into parts of some 64 MB to use all "
        "workers. The same command again finishes a killed run, and does nothing where nothing has changed. "
        "With --executor slurm a job array is submitted and waited for, and the shards appear when all of it is done; "
        "stopped while it waits, this command leaves the job at work, and the same command waits for it again. With "
        "--executor ray the cluster is that of RAY_ADDRESS, else the one that runs here, else this machine. "
        "For both, all nodes must have smoljax installed and see the inputs and DIR at the same path.",
    )

    def natural(text: str) -> int:
        return int(text) if text.isdecimal() else parser.error(f"expected a number, 0 or more, not {text!r}")

    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="a file, or a folder to read through")
    parser.add_argument("--output", metavar="DIR", help="the folder of shards; new, empty, or from an earlier run")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, or a folder that holds one")
    parser.add_argument("--train-tokenizer", metavar="V", type=natural, help="learn a tokenizer of V ids from the text")
    parser.add_argument("--text-key", metavar="KEY", default="text", help="JSON key or parquet column (default: text)")
    bad = "go on with up to N documents refused: not UTF-8, not JSON, an empty text (default: 0)"
    parser.add_argument("--max-bad", metavar="N", type=natural, default=0, help=bad)
    tasks = "tasks at once (default: one a core; on a cluster: all); the shards do not depend on it"
    parser.add_argument("--workers", metavar="N", type=natural, help=tasks)
    where = "who runs the tasks (default: local); the shards do not depend on it"
    parser.add_argument("--executor", choices=list(executors.KEYS), default="local", help=where)
    cluster = (
        "what a task gets: for slurm partition=NAME,time=H:MM:SS and maybe account, qos, constraint, reservation, "
    )
    cluster += "max_array_size (1001); for slurm and ray cpus_per_task (1), mem_per_cpu_gb (4)"
    parser.add_argument("--cluster", metavar="KEY=VALUE,...", help=cluster)
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
    args.cluster = executors.options(args.executor, args.cluster)
    if args.workers is None:
        args.workers = getattr(os, "process_cpu_count", os.cpu_count)() if args.executor == "local" else -1
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
    count = f"{documents:,} document{'s' * (documents != 1)}"
    print(f"{count}, {tokens:,} tokens, {size:,} bytes of text ({size / tokens:.2f} a token)")
    bare = [source["file"] for source in manifest["sources"] if not source["documents"]]
    lists = {"refused": [f"{r['where']} ({r['why']})" for r in refused], "without a document": bare}
    for what, names in (lists | {"left aside": ignored}).items():
        if names:
            more = ", ... (all in manifest.json)" if len(names) > 3 else ""
            print(f"{len(names):,} {what}: {', '.join(names[:3])}{more}")
    speed = "up to date" if current else f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    print(f"{speed}: {len(shards)} shard{'s' * (len(shards) > 1)} in {out}")


def main(argv=None) -> int:
    args, started = parse(argv), time.perf_counter()
    runtime.hear_interrupts()
    if args.verify:
        shards = Shards(args.verify)
        shards.verify()
        print(f"{args.verify}: {len(shards.shards)} shards, {shards.num_tokens:,} tokens, all as manifest.json says")
        return 0
    if args.train_tokenizer is not None:
        tok.check_vocab_size(args.train_tokenizer)
    else:
        tok.load(args.tokenizer)  # a mistake here is known before the text is read
        special_tokens.tokenizer_json(args.tokenizer)
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
