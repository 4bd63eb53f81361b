"""The main job, end to end, in five minutes on 2 CPU cores: text, shards, model, longer context, export.

    smoljax demo [--output demo-out]

Its text is the Python library of this machine: sources, docstrings and pydoc's topics; nothing is downloaded. Every
step is an ordinary `smoljax` command, printed before it runs; the pretraining is killed once and resumed.
"""

import argparse
import ast
import json
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from smoljax import runtime
from smoljax.errors import Error, require, run

PROMPTS = ("def __init__(self", "import os\n", '"""Return ')


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="settings for the pretraining, such as steps=200")
    args = parser.parse_intermixed_args(argv)
    out, begun = args.output, time.monotonic()
    runtime.hear_interrupts()
    mark = out / "smoljax-demo"  # what is deleted below is an earlier demo's and nobody else's
    require(not out.exists() or mark.exists(), f"{out} exists and is no demo's folder; name another --output")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()

    # ---- text -> shards
    title("the text: this machine's Python library")
    print(write_corpus(out / "corpus"))
    train, heldout, short, long = (out / p for p in ("shards/train", "shards/heldout", "runs/short", "runs/long"))
    smoljax("prepare", out / "corpus/train", "--train-tokenizer", 4096, "--output", train)
    smoljax("prepare", out / "corpus/heldout", "--tokenizer", train / "tokenizer.json", "--output", heldout)

    # ---- pretrain, kill, resume
    title("pretrain at 128 tokens; kill -9 on the way, and resume with the same command")
    command = ("pretrain", "demo", f"data.sources={train}", f"run={short}", *args.settings)
    kill_on_the_way(short, *command)
    smoljax(*command)
    before = evaluate(short, heldout)

    # ---- extend
    title("extend the context fourfold: 128 -> 512 tokens, rope theta 10,000 -> 100,000")
    smoljax("pretrain", "demo-long", f"data.sources={train}", f"init_from={short}", f"run={long}")
    after = evaluate(long, heldout)

    # ---- speak, export
    title("generate and export")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    smoljax("generate", long, *prompts, "--max-new-tokens", 48, "--temperature", 0.7, "--seed", 1)
    smoljax("convert", long, out / "hf", "--to", "hf")

    # ---- the table
    from smoljax import curves

    curves.draw([short, long], out / "curves.png")
    title(f"done in {time.monotonic() - begun:.0f} s")
    print(summary(out, short, long, before, after))
    return 0


def title(text: str):
    print(f"\n== {text}", flush=True)


def smoljax(*words, capture=False, wait=True):
    """Run a command as a user would, and show it."""
    words = [str(w) for w in words]
    print("$ smoljax", *(repr(w) if set(w) & set(" \n\"'(") else w for w in words), flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "smoljax", *words], stdout=subprocess.PIPE if capture else None, text=True
    )
    if not wait:
        return process
    output, _ = process.communicate()
    if process.returncode:
        raise Error(f"the demo stops: `smoljax {words[0]}` ended with exit code {process.returncode}")
    return output


def evaluate(model: Path, heldout: Path) -> dict:
    """Loss by position at the long length, on 100,000 held-out tokens."""
    words = ("evaluate", model, "--data", heldout, "--seq-len", 512, "--max-tokens", 100_000, "--batch-size", 16)
    return json.loads(smoljax(*words, "--json", capture=True))


def kill_on_the_way(folder: Path, *command):
    """Start the run and kill it without warning once it is past its first checkpoint."""
    from smoljax import committed, metrics

    process = smoljax(*command, wait=False)
    while process.poll() is None:
        saved, records = committed.steps(folder), metrics.read(folder)
        if saved and records and records[-1]["step"] > max(saved):
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"killed at step {records[-1]['step']}; the last checkpoint is {max(saved)}", flush=True)
            return
        time.sleep(0.1)
    raise Error("the demo stops: the run ended before it could be killed")


def write_corpus(folder: Path) -> str:
    """Sources as .py, docstrings as JSON lines, pydoc's topics as .txt; every 20th module is held out."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    modules = [p for p in sorted(library.rglob("*.py")) if not skip & set(p.relative_to(library).parts)]
    files = docstrings = size = 0
    for i, module in enumerate(modules):
        text = module.read_text(encoding="utf-8")
        if not text.strip():
            continue
        part = folder / ("heldout" if i % 20 == 19 else "train")
        copy = part / "sources" / module.relative_to(library)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
        found = docstrings_of(text)
        with open(part / "docstrings.jsonl", "a", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": d}) + "\n" for d in found)
        files, docstrings, size = files + 1, docstrings + len(found), size + len(text) + sum(map(len, found))
    (folder / "train/topics").mkdir()
    for name, text in topics.items():
        (folder / "train/topics" / f"{name}.txt").write_text(text, encoding="utf-8")
        size += len(text)
    return f"{files} sources, {docstrings} docstrings, {len(topics)} topics: {size / 1e6:.1f} MB"


def docstrings_of(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [text for text in found if text and text.strip()]


def summary(out: Path, short: Path, long: Path, before: dict, after: dict) -> str:
    from smoljax import metrics

    first = metrics.read(short)[0]
    key = "train/tokens_per_sec"
    speed = [statistics.median(r[key] for r in metrics.read(p)) for p in (short, long)]
    rows = [("held-out loss at position", *before["loss_by_position"])]
    rows += [
        (name, *(f"{loss:.3f}" for loss in result["loss_by_position"].values()))
        for name, result in (("trained at 128", before), ("extended to 512", after))
    ]
    lines = ["".join(f"{cell:<{28 if i == 0 else 12}}" for i, cell in enumerate(row)) for row in rows]
    lines += [
        f"training loss at step {first['step']:<6}{first['train/loss']:.3f}, guessing is ln(4096) = 8.318",
        f"bits per byte               {before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f} at 512 tokens",
        f"tokens/s                    {speed[0]:,.0f} at 128, {speed[1]:,.0f} at 512",
    ]
    places = {"shards": "shards", "runs": "runs", "Hugging Face folder": "hf", "curves": "curves.png"}
    return "\n".join(lines + [f"{name:<28}{out / place}" for name, place in places.items()])


if __name__ == "__main__":
    raise SystemExit(run(main))
