"""Loss, perplexity, bits per byte and loss by position of a model on token shards.

    smoljax evaluate runs/demo --data shards/heldout
    smoljax evaluate runs/demo/checkpoints/400 --data shards/heldout --seq-len 512 --json

MODEL is a run, a checkpoint or a Hugging Face folder. The shards are read once, in order, in windows of --seq-len;
loss by position is the loss of the tokens that far into a window, so that an extended context shows.
"""

import argparse
import json
import math
import sys
from functools import partial

import numpy as np

from smoljax.config import Compute, Mesh
from smoljax.errors import DataError, require, run


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder made by `smoljax prepare`")
    parser.add_argument("--seq-len", type=int, metavar="T", help="window (default: the model's longest context)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="rows at a time (default: 8192 / T)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after about N tokens (default: all)")
    parser.add_argument("--mask-documents", action="store_true", help="a document sees itself alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    args = parser.parse_args(argv)
    for name in ("seq_len", "batch_size", "max_tokens"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}, expected at least 1")

    from smoljax import runtime, tokenizer, weights
    from smoljax.data import Windows

    runtime.start()
    found = weights.read(args.model, "float32")
    longest = found.config.max_position_embeddings
    T = args.seq_len or longest
    if T > longest:  # worth looking at: it is what extending the context is for
        print(f"--seq-len {T} is beyond the model's {longest} positions", file=sys.stderr)
    windows = Windows(args.data, T, found.config.vocab_size, args.mask_documents)
    weights.check_tokenizer(found, windows.shards)
    tokens = windows.shards.num_tokens
    require(not args.seq_len or T <= tokens, f"--seq-len {T} is longer than all {tokens} tokens in {args.data}")
    count = min(len(windows), math.ceil(args.max_tokens / T)) if args.max_tokens else len(windows)

    words, beside = found.tokenizer, windows.shards.tokenizer_path
    words = tokenizer.load(beside) if words is None and beside else words
    lengths = None if words is None else tokenizer.byte_lengths(words)
    rows = args.batch_size or max(1, 8192 // T)
    nats, labels, size = by_position(found.model, windows, count, rows, lengths, Compute(dtype=args.dtype))
    result = summarise(nats, labels, size) | {"model": str(args.model), "data": str(args.data), "seq_len": T}
    print(json.dumps(result) if args.json else table(result))
    return 0


def by_position(model, windows, count: int, batch_size: int, lengths, compute: Compute):
    """Nats and number of labels at each position, [T] each, over the first `count` windows, and the labels' bytes."""
    import jax

    from smoljax import sharding
    from smoljax.loss import IGNORE
    from smoljax.step import losses

    mesh = sharding.mesh(Mesh())
    rows = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        model = jax.device_put(model, sharding.shardings(model, mesh))
        step = jax.jit(partial(losses, compute=compute))
        nats, labels, size = np.zeros(windows.seq_len), np.zeros(windows.seq_len, int), 0
        for first in range(0, count, rows):
            some = [windows[w] for w in range(first, min(first + rows, count))]
            batch = {k: np.stack([w[k] for w in some]) for k in some[0]}
            missing = rows - len(some)  # the last batch is filled up with rows that have no labels
            batch = {k: np.pad(v, ((0, missing), (0, 0)), constant_values=FILL[k]) for k, v in batch.items()}
            values = step(model, jax.device_put(batch, sharding.batch_sharding(mesh)))
            nats += np.asarray(values, np.float64).sum(0)
            real = batch["labels"] != IGNORE
            labels += real.sum(0)
            size += 0 if lengths is None else int(lengths[batch["labels"][real]].sum())
            if sys.stderr.isatty():
                print(f"\r{first + len(some)}/{count} windows", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return nats, labels, size


FILL = {"tokens": 0, "labels": -1, "segments": 0}


def summarise(nats, labels, size: int) -> dict:
    """size: bytes of text that the labels stand for; 0 where the tokenizer does not say."""
    if not labels.sum():
        raise DataError("no token is predicted here: every document is one token long; leave out --mask-documents")
    loss = float(nats.sum() / labels.sum())
    if not math.isfinite(loss):
        raise DataError(f"the loss is {loss}: the model's weights are not finite")
    edges = [0, *(128 * 2**i for i in range(32) if 128 * 2**i < len(nats)), len(nats)]
    buckets = {
        f"{a}-{b - 1}": float(nats[a:b].sum() / labels[a:b].sum())
        for a, b in zip(edges[:-1], edges[1:], strict=True)
        if labels[a:b].sum()
    }
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,  # e^710 is beyond a double
        "bits_per_byte": float(nats.sum() / math.log(2) / size) if size else None,
        "tokens": int(labels.sum()),
        "loss_by_position": buckets,
    }


def table(result: dict) -> str:
    bits = result["bits_per_byte"]
    lines = [
        f"loss           {result['loss']:.4f} nats per token, over {result['tokens']:,} tokens",
        f"perplexity     {result['perplexity']:.2f}" if result["perplexity"] else "perplexity     beyond 1e304",
        f"bits per byte  {bits:.4f}" if bits else "bits per byte  unknown: no byte-level tokenizer",
        "position       loss",
    ]
    return "\n".join(lines + [f"  {k:12s} {v:.4f}" for k, v in result["loss_by_position"].items()])


if __name__ == "__main__":
    raise SystemExit(run(main))
