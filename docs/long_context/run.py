"""Long context, shown to work: pretrain at T, extend to 4T, and look at the loss by position and at recall.

    python docs/long_context/run.py --size demo                        # CPU, this machine's Python library as the text
    python docs/long_context/run.py --size smollm2-135m --text FOLDER --heldout FOLDER      # a GPU

Every step is an ordinary `smoljax` command, printed before it runs; the same command again goes on where it stopped.
Under --output lie shards, runs, results.json, recall.png and the tables. README.md beside this file is the report.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import figures  # beside this file, as recall is
import numpy as np
import recall
from smoljax.train.demo import smoljax as command
from smoljax.train.demo import title, write_corpus

from smoljax import atomic, runtime, tokenizer, weights
from smoljax.errors import require, run


@dataclass(frozen=True)
class Size:
    config: str  # what `smoljax pretrain` is given; then settings of both stages, of the first, of the extension
    both: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    seq_len: int  # T
    rows: int  # of T tokens a step; a quarter as many of 4T
    steps: int
    long_steps: int
    keys: int
    recall_tokens: int  # of each length; beyond them documents are read again
    values: int  # of each key: a guess is right once in so many
    vocab_size: int = 49152
    theta: tuple[float, float] = (10_000.0, 100_000.0)  # of the first stage; of the extension, as released
    samples: int = 128  # documents a length: each asks for one key out of each depth
    heldout_tokens: int = 200_000


SIZES = {
    "demo": Size(
        config="demo",
        both=("model.vocab_size=2048", "model.num_hidden_layers=2", "model.intermediate_size=256", "save_every=500"),
        short=("optim.lr=3e-3", "optim.warmup_steps=50", "optim.decay_steps=1500"),
        long=("optim.lr=1e-3", "optim.warmup_steps=10", "optim.decay_steps=100"),
        seq_len=128,
        rows=16,
        steps=5000,
        long_steps=200,
        recall_tokens=614_400,
        keys=16,
        values=8,
        vocab_size=2048,
    ),
    "smollm2-135m": Size(  # 1.05B tokens, then 105M an extension: a demonstration, not the released model's 2T
        config="smollm2-135m",
        both=("accumulate=16", "save_every=500"),
        short=("optim.warmup_steps=200", "optim.decay_steps=800"),
        long=("optim.lr=5e-4", "optim.warmup_steps=20", "optim.decay_steps=200"),
        seq_len=2048,
        rows=128,
        steps=4000,
        long_steps=400,
        recall_tokens=120_000_000,
        keys=64,
        values=16,
        heldout_tokens=4_000_000,
    ),
}
BINS, SHARE = 8, 0.1  # depths of the recall task; its share of the training tokens
ARMS = {  # what goes on from the first stage, with as many tokens each -> (times T, is theta changed)
    "theta": (4, True),
    "same": (4, False),
    "more": (1, False),
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="demo", help="default: demo")
    parser.add_argument("--text", type=Path, metavar="DIR", help="text or shards (default: Python's library, for demo)")
    parser.add_argument("--heldout", type=Path, metavar="DIR", help="text or shards that --text does not hold")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="for text (default: trained on it)")
    parser.add_argument(
        "--seeds", type=int, default=2, metavar="N", help="extensions of each kind, by the order of data"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: docs-out/SIZE")
    args = parser.parse_args(argv)
    size, out = SIZES[args.size], args.output or Path("docs-out") / args.size
    require((args.text is None) == (args.heldout is None), "--text and --heldout belong together; give both or neither")
    require(args.text is not None or args.size == "demo", f"--size {args.size} needs --text and --heldout")
    require(args.seeds >= 1, f"--seeds is {args.seeds}, expected at least 1")
    runtime.hear_interrupts()
    out.mkdir(parents=True, exist_ok=True)

    title("text and recall documents -> shards")
    train, heldout = texts(args, size, out)
    words = recall.choose_words(tokenizer.load(train), size.keys, size.values)
    sources = {times: {train: 1 - SHARE, recall_shards(times, size, words, train, out): SHARE} for times in (1, 4)}

    title(f"pretrain at {size.seq_len} tokens, then go on from there in {len(ARMS)} ways, {args.seeds} times each")
    runs = {"short": [out / "runs/short"]}
    pretrain(size, runs["short"][0], size.steps, sources[1], 1, size.theta[0], 0, size.short)
    for arm, (times, changed) in ARMS.items():
        runs[arm] = [out / f"runs/{arm}-{seed}" for seed in range(1, args.seeds + 1)]
        for seed, folder in enumerate(runs[arm], 1):
            settings = (*size.long, f"init_from={runs['short'][0]}")
            pretrain(size, folder, size.long_steps, sources[times], times, size.theta[changed], seed, settings)

    title("loss by position and recall")
    measured = {arm: [measure(folder, size, words, heldout) for folder in some] for arm, some in runs.items()}
    results = {"size": args.size, "seq_len": size.seq_len, "values": size.values, "bins": BINS, "runs": measured}
    atomic.write_json(out / "results.json", results)
    figures.draw(results, out / "recall.png")
    print(figures.tables(results))
    return 0


def texts(args, size: Size, out: Path) -> tuple[Path, Path]:
    """The shards of training and held-out text: those given, or prepared from what is given."""
    if args.text is None:
        if not (out / "corpus.done").exists():
            require(not (out / "corpus").exists(), f"{out / 'corpus'} is unfinished; delete it and start again")
            print(write_corpus(out / "corpus"))
            (out / "corpus.done").touch()
        args.text, args.heldout = out / "corpus/train", out / "corpus/heldout"
    found = []
    for name, given in ("train", args.text), ("heldout", args.heldout):
        if given.is_dir() and any(given.glob("*.ds")):
            found.append(given)
            continue
        words = args.tokenizer or (found[0] / "tokenizer.json" if found else None)
        how = ("--tokenizer", words) if words else ("--train-tokenizer", size.vocab_size)
        command("prepare", given, *how, "--output", out / "shards" / name)
        found.append(out / "shards" / name)
    return found[0], found[1]


def recall_shards(times: int, size: Size, words: recall.Words, train: Path, out: Path) -> Path:
    """Rows of recall documents of the length that they will be read in."""
    length = times * size.seq_len
    count = size.recall_tokens // length + 1
    file, folder = out / f"recall/{length}.jsonl", out / f"shards/recall-{length}"
    file.parent.mkdir(exist_ok=True)
    rng = random.Random(times)
    lines = [json.dumps({"text": recall.row(length, words, rng)}) for _ in range(count)]
    atomic.write(file, "\n".join(lines) + "\n")
    command("prepare", file, "--tokenizer", train / "tokenizer.json", "--output", folder)
    return folder


def pretrain(size: Size, folder: Path, steps: int, sources: dict, times: int, theta: float, seed: int, settings):
    """One run; where it is complete, the command says so and does nothing."""
    length = times * size.seq_len
    command(
        *(
            "pretrain",
            size.config,
            *size.both,
            *settings,
            f"run={folder}",
            f"steps={steps}",
            f"model.rope_theta={theta}",
        ),
        *(f"model.max_position_embeddings={length}", f"data.seq_len={length}", f"data.batch_size={size.rows // times}"),
        *(f"data.seed={seed}", f"data.sources={json.dumps({str(k): v for k, v in sources.items()})}"),
    )


def measure(folder: Path, size: Size, words: recall.Words, heldout: Path) -> dict:
    """Loss by position on held-out text at 4T, and recall by length and depth."""
    long = 4 * size.seq_len
    asked = ("--data", heldout, "--seq-len", long, "--max-tokens", size.heldout_tokens, "--json")
    loss = json.loads(command("evaluate", folder, *asked, capture=True))
    return {
        "tokens": loss["tokens"],
        "loss_by_position": loss["loss_by_position"],
        "recall": {str(n): recall_at(folder, n, size, words) for n in (long // 8, long // 4, long // 2, long)},
    }


def recall_at(folder: Path, length: int, size: Size, words: recall.Words) -> list[float]:
    """Accuracy by depth over `size.samples` documents, the same ones for every model."""
    import jax
    import jax.numpy as jnp

    runtime.start()
    model, encoder = weights.load(folder), weights.load_tokenizer(folder)
    probe = recall.probe(length, BINS, size.samples, words, lambda text: encoder.encode(text).ids, seed=length)
    guess = jax.jit(lambda model, tokens: jnp.argmax(model(tokens), axis=-1))
    rows = max(1, 8192 // length)  # at a time: 8,192 tokens' logits are 64 MB in the demo, 1.6 GB at 49,152 ids
    parts = [guess(model, probe.tokens[i : i + rows]) for i in range(0, size.samples, rows)]
    return recall.accuracy(np.concatenate(parts), probe, BINS)


if __name__ == "__main__":
    raise SystemExit(run(main))
