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

    import jax

    from smoljax import runtime, sharding, tokenizer, weights
    from smoljax.data import Windows
    from smoljax.heldout import HeldoutSet, measure

    runtime.start()
    found = weights.read(args.model)  # as stored, int8 too; --dtype is that of the arithmetic
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
    rows, compute, mesh = args.batch_size or max(1, 8192 // T), Compute(dtype=args.dtype), sharding.mesh(Mesh())
    model = jax.device_put(found.model, sharding.shardings(found.model, mesh))
    what = HeldoutSet(args.data, windows, count, lengths)
    result = measure(model, what, rows, compute, mesh, partial(progress, count=count))
    if not math.isfinite(result["loss"]):
        raise DataError(f"the loss is {result['loss']}: the model's weights are not finite")
    result |= {"model": str(args.model), "data": str(args.data), "seq_len": T}
    print(json.dumps(result) if args.json else table(result))
    return 0


def progress(done: int, count: int):
    """A counter on a terminal, nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r{done}/{count} windows", end="\n" if done == count else "", file=sys.stderr, flush=True)


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
