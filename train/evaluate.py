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
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows at a time (default: 8)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after about N tokens (default: all)")
    parser.add_argument("--mask-documents", action="store_true", help="a document sees itself alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    args = parser.parse_args(argv)
    for name in ("seq_len", "batch_size", "max_tokens"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}, expected at least 1")

    from smoljax import runtime, weights
    from smoljax.data import Windows

    runtime.start()
    found = weights.read(args.model, "float32")
    longest = found.config.max_position_embeddings
    T = args.seq_len or longest
    if T > longest:  # worth looking at: it is what extending the context is for
        print(f"--seq-len {T} is beyond the model's {longest} positions", file=sys.stderr)
    windows = Windows(args.data, T, found.config.vocab_size, args.mask_documents)
    check_tokenizer(found.tokenizer, windows.shards)
    count = min(len(windows), math.ceil(args.max_tokens / T)) if args.max_tokens else len(windows)

    nats, labels = by_position(found.model, windows, count, args.batch_size, Compute(dtype=args.dtype))
    result = summarise(nats, labels, windows.shards) | {"model": str(args.model), "data": str(args.data), "seq_len": T}
    print(json.dumps(result) if args.json else table(result))
    return 0


def by_position(model, windows, count: int, batch_size: int, compute: Compute):
    """Sum of nats and number of labels at each position, [T] each, over the first `count` windows."""
    import jax

    from smoljax import sharding
    from smoljax.loss import IGNORE
    from smoljax.step import losses

    mesh = sharding.mesh(Mesh())
    rows = -(-batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        model = jax.device_put(model, sharding.shardings(model, mesh))
        step = jax.jit(partial(losses, compute=compute))
        nats, labels = np.zeros(windows.seq_len), np.zeros(windows.seq_len, int)
        for first in range(0, count, rows):
            some = [windows[w] for w in range(first, min(first + rows, count))]
            batch = {k: np.stack([w[k] for w in some]) for k in some[0]}
            missing = rows - len(some)  # the last batch is filled up with rows that have no labels
            batch = {k: np.pad(v, ((0, missing), (0, 0)), constant_values=FILL[k]) for k, v in batch.items()}
            values = step(model, jax.device_put(batch, sharding.batch_sharding(mesh)))
            nats += np.asarray(values, np.float64).sum(0)
            labels += (batch["labels"] != IGNORE).sum(0)
            if sys.stderr.isatty():
                print(f"\r{first + len(some)}/{count} windows", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return nats, labels


FILL = {"tokens": 0, "labels": -1, "segments": 0}


def check_tokenizer(tokenizer, shards):
    from smoljax.tokenizer import sha256

    if tokenizer is None or shards.tokenizer_sha256 is None:
        print("the model or the shards carry no tokenizer: nothing says that they belong together", file=sys.stderr)
    elif sha256(tokenizer) != shards.tokenizer_sha256:
        raise DataError(
            f"{shards.path} was made with another tokenizer than the model's {tokenizer} (sha256 "
            f"{shards.tokenizer_sha256[:12]} and {sha256(tokenizer)[:12]}); prepare it with --tokenizer {tokenizer}"
        )


def summarise(nats, labels, shards) -> dict:
    loss = float(nats.sum() / labels.sum())
    if not math.isfinite(loss):
        raise DataError(f"the loss is {loss}: the model's weights are not finite")
    edges = [0, *(128 * 2**i for i in range(32) if 128 * 2**i < len(nats)), len(nats)]
    buckets = {
        f"{a}-{b - 1}": float(nats[a:b].sum() / labels[a:b].sum())
        for a, b in zip(edges[:-1], edges[1:], strict=True)
        if labels[a:b].sum()
    }
    per_byte = shards.num_tokens / shards.text_bytes if shards.text_bytes else None
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * per_byte if per_byte else None,
        "tokens": int(labels.sum()),
        "loss_by_position": buckets,
    }


def table(result: dict) -> str:
    bits = result["bits_per_byte"]
    lines = [
        f"loss           {result['loss']:.4f} nats per token, over {result['tokens']:,} tokens",
        f"perplexity     {result['perplexity']:.2f}",
        f"bits per byte  {bits:.4f}" if bits else "bits per byte  unknown: the shards have no manifest",
        "position       loss",
    ]
    return "\n".join(lines + [f"  {k:12s} {v:.4f}" for k, v in result["loss_by_position"].items()])


if __name__ == "__main__":
    raise SystemExit(run(main))
