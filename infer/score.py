"""Log-likelihood of continuations, as evaluation harnesses need it: JSON lines in, a JSON line for each out, in order.

    {"context": "The capital of France is", "continuation": " Paris"}
    {"context": "The sky is", "choices": [" blue", " green"], "gold": 0}
    {"text": "All tokens of a text, in windows where it is longer than the context."}
    {"context_ids": [504, 357], "continuation_ids": [28]}

Other keys are passed through. A row that cannot be scored becomes {"line": ..., "error": "..."}, and the exit code is
then 3. Ids and windows are those of lm-evaluation-harness; with "gold", acc_norm is by characters, as there.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

from smoljax import atomic, jobs
from smoljax.errors import DataError, UsageError, require, run
from smoljax.pairs import Row, blocks
from smoljax.row_files import line_rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "smoljax score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("model", metavar="MODEL", help="a run, a Hugging Face folder, a .gguf, a fetched or a hub name, ...")
    p.add_argument("--input", required=True, metavar="FILE", help="rows, in JSON lines")
    p.add_argument("--output", metavar="FILE", help="of the results, replaced when all are there; default: stdout")
    p.add_argument(
        "--batch-size", type=int, metavar="B", help="rows at a time (default: 8192 tokens on a device, 2048 on a CPU)"
    )
    p.add_argument("--seq-len", type=int, metavar="T", help="window (default: the model's longest context)")
    p.add_argument("--truncate", action="store_true", help="drop the beginning of a context too long, and say so")
    p.add_argument("--token-logprobs", action="store_true", help="each token's log-probability too")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    p.add_argument("--json", action="store_true", help="with --output: the summary as a JSON line on stdout")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    for name in ("seq_len", "batch_size"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}, expected at least 1")
    require(args.output or not args.json, "--json prints the summary on stdout, where the rows go; give --output FILE")
    clash = args.output and Path(args.output).resolve() == Path(args.input).resolve()
    require(not clash, f"--output {args.output} is the input; name another file")
    require(not args.output or not Path(args.output).is_dir(), f"--output {args.output} is a folder; name a file in it")
    columns = Path(args.input).suffix == ".parquet"
    require(not columns, f"--input {args.input} is of columns, and rows are scored from JSON lines; write it as such")
    rows = line_rows(args.input)
    start = next(rows, None)  # which a pipe gives once
    if start is None:
        raise DataError(f"{args.input} holds no row; give one a line, such as " + __doc__.splitlines()[2].strip())

    import jax

    from smoljax import runtime, score, sharding, weights
    from smoljax.config import Compute, Mesh

    runtime.start()
    count = max(jobs.share(None, None)[1], jax.process_count())
    require(count == 1, f"{count} processes were started, and each would score all rows; start one, for all devices")
    found = weights.read(args.model)
    longest = args.seq_len or found.config.max_position_embeddings
    if longest > found.config.max_position_embeddings:
        positions = found.config.max_position_embeddings
        print(f"smoljax: --seq-len {longest} is beyond the model's {positions} positions", file=sys.stderr)
    compute, mesh = Compute(dtype=args.dtype, loss_chunk=score.COMPUTE.loss_chunk), sharding.mesh(Mesh())
    model = jax.device_put(found.model, sharding.shardings(found.model, mesh))
    sums, first, begun = Counter(), None, time.perf_counter()
    with writer(args.output) as out:
        for block in blocks(itertools.chain([start], rows), found, longest, args.truncate):
            pairs = [pair for row in block for pair in row.pairs]
            how = dict(batch_size=args.batch_size, longest=longest, compute=compute, mesh=mesh)
            scores = iter(score.loglikelihoods(model, pairs, **how, beat=lambda n: progress(sums["rows"], n)))
            for row in block:
                mine = [next(scores) for _ in row.pairs]
                result = {"line": row.line, "error": row.error} if row.error else answer(row, mine, args.token_logprobs)
                first = first or (row.error and f"line {row.line}: {row.error}")
                add(sums, row, result, mine)
                print(json.dumps(row.kept | result), file=out)
            out.flush()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    total = summary(sums, time.perf_counter() - begun)
    if args.json:
        print(json.dumps(total | {"model": args.model, "input": args.input}))
    else:
        parts = [f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in total.items()]
        print(", ".join(parts), file=sys.stderr)
    if first:
        raise DataError(f"{sums['errors']} of {sums['rows']} rows of {args.input} have no result; the first: {first}")
    return 0


def answer(row: Row, scores: list, logprobs: bool) -> dict:
    values = [s.loglikelihood for s in scores]
    tokens, greedy = [len(s.logprobs) for s in scores], [s.is_greedy for s in scores]
    each = [[float(p) for p in s.logprobs] for s in scores] if logprobs else []
    if row.form == "choices":
        texts = [text.lstrip() or text for text in row.given["choices"]]  # the space before a choice does not count
        characters, size = ([len(t) for t in texts], [len(t.encode()) for t in texts])
        result = {"loglikelihoods": values, "tokens": tokens, "is_greedy": greedy, "best": best(values)}
        result["best_per_character"], result["best_per_byte"] = best(values, characters), best(values, size)
        if "gold" in row.given:
            for name, key in [("acc", "best"), ("acc_norm", "best_per_character"), ("acc_bytes", "best_per_byte")]:
                result[name] = int(result[key] == row.given["gold"])
    else:
        result = {"loglikelihood": math.fsum(values), "tokens": sum(tokens), "is_greedy": all(greedy)}
        each = [p for window in each for p in window]
        if row.form == "text":
            result["bytes"] = len(row.given["text"].encode())
    result |= {"truncated": row.truncated} if row.truncated else {}
    return result | ({"logprobs": each} if logprobs else {})


def best(values: list[float], sizes: list[int] | None = None) -> int:
    per = [v / n for v, n in zip(values, sizes or [1] * len(values), strict=True)]
    return per.index(max(per))


def add(sums: Counter, row: Row, result: dict, scores: list):
    """What the summary needs of a row."""
    sums.update(rows=1, errors=int(row.error is not None), tokens=sum(len(s.logprobs) for s in scores))
    sums.update(truncated=row.truncated > 0)
    means = ("acc", "acc_norm", "acc_bytes", *(["is_greedy"] if row.form.startswith("continuation") else []))
    for key in set(means) & set(result):
        sums.update({f"sum {key}": result[key], f"rows with {key}": 1})
    if "bytes" in result:
        sums.update({"nats": -result["loglikelihood"], "bytes": result["bytes"], "predicted": result["tokens"]})


def summary(sums: Counter, seconds: float) -> dict:
    found = {key: sums[key] for key in ("rows", "errors", "truncated", "tokens")} | {"seconds": seconds}
    for key in ("is_greedy", "acc", "acc_norm", "acc_bytes"):
        if count := sums[f"rows with {key}"]:
            found[key] = sums[f"sum {key}"] / count
    if sums["bytes"]:
        found["nats_per_token"] = sums["nats"] / sums["predicted"]
        found["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
    return found


def progress(rows: int, pairs: int):
    """A counter on a terminal, nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r{rows:,} rows and {pairs:,} continuations ", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def writer(output: str | None):
    """stdout, a pipe or a device, or a file that is whole or absent."""
    if not output:
        yield sys.stdout
    elif Path(output).exists() and not Path(output).is_file():
        try:
            stream = open(output, "w")
        except OSError as e:
            raise UsageError(f"{output} cannot be written ({e.strerror})") from None
        with stream:
            yield stream
    else:
        with atomic.stream(Path(output).resolve()) as stream:  # where a link leads
            yield stream


if __name__ == "__main__":
    raise SystemExit(run(main))
