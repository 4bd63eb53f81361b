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
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smoljax.errors import DataError, UsageError, require, run

FORMS = ("continuation", "choices", "text", "continuation_ids")  # the key that tells a row's kind
OUT = {"line", "error", "loglikelihood", "loglikelihoods", "tokens", "is_greedy", "logprobs", "bytes", "truncated"}
OUT |= {"best", "best_per_character", "best_per_byte", "acc", "acc_norm", "acc_bytes"}
BLOCK = 1024  # continuations that are sorted by length, scored and written at a time
LIMIT = 64 << 20  # bytes of a line


class Row(NamedTuple):
    line: int
    given: dict
    form: str
    pairs: list
    truncated: int = 0  # tokens of context
    error: str | None = None

    @property
    def kept(self) -> dict:
        return {k: v for k, v in self.given.items() if k not in (*FORMS, "context", "context_ids")}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "smoljax score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("model", metavar="MODEL", help="a run, a Hugging Face folder, a .gguf, a fetched or a hub name, ...")
    p.add_argument("--input", required=True, metavar="FILE", help="rows, in JSON lines")
    p.add_argument("--output", metavar="FILE", help="of the results; default: stdout")
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
    if next(lines(args.input), None) is None:
        raise DataError(f"{args.input} holds no row; give one a line, such as " + __doc__.splitlines()[2].strip())

    import jax

    from smoljax import runtime, score, sharding, weights
    from smoljax.config import Compute, Mesh

    runtime.start()
    found = weights.read(args.model)
    longest = args.seq_len or found.config.max_position_embeddings
    if longest > found.config.max_position_embeddings:
        positions = found.config.max_position_embeddings
        print(f"--seq-len {longest} is beyond the model's {positions} positions", file=sys.stderr)
    compute, mesh = Compute(dtype=args.dtype, loss_chunk=score.COMPUTE.loss_chunk), sharding.mesh(Mesh())
    model = jax.device_put(found.model, sharding.shardings(found.model, mesh))
    sums, first, begun = Counter(), None, time.perf_counter()
    with writer(args.output) as out:
        for block in blocks(args.input, found, longest, args.truncate):
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


def lines(file: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, and their numbers."""
    try:
        with open(file, "rb") as stream:
            number = 0
            while line := stream.readline(LIMIT + 1):
                number += 1
                if len(line) > LIMIT:
                    raise DataError(f"{file} line {number} has more than {LIMIT >> 20} MB, expected a row a line")
                if line.strip():
                    yield number, line
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror})") from None


def blocks(file: str, found, longest: int, truncate: bool) -> Iterator[list[Row]]:
    block, pairs = [], 0
    for number, line in lines(file):
        given, form = {}, ""
        try:
            given = parse(line)
            form = kind(given)
            made, truncated = encoded(given, form, found, longest, truncate)
            block.append(Row(number, given, form, made, truncated))
            pairs += len(made)
        except DataError as e:
            kept = {k: v for k, v in given.items() if k not in OUT}
            block.append(Row(number, kept, form, [], error=str(e)))
        if pairs >= BLOCK or len(block) >= BLOCK:
            yield block
            block, pairs = [], 0
    if block:
        yield block


def parse(line: bytes) -> dict:
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as e:
        raise DataError(f"not UTF-8 text ({e.reason})") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"not JSON ({e})") from None
    if not isinstance(row, dict):
        raise DataError(f"a JSON {type(row).__name__}, expected an object with 'context' and 'continuation'")
    return row


def kind(row: dict) -> str:
    """Which of FORMS, its keys of the right types."""
    forms = [key for key in FORMS if key in row]
    if len(forms) != 1:
        found = f"both {forms[0]!r} and {forms[1]!r}" if forms else f"the keys {[*row]!r:.100}"
        raise DataError(f"{found}, expected one of {', '.join(map(repr, FORMS))}")
    (form,) = forms
    wanted = {"text": {}, "continuation_ids": {"context_ids": list}}.get(form, {"context": str})
    for key, type_ in (wanted | {form: list if form in ("choices", "continuation_ids") else str}).items():
        if key not in row:
            raise DataError(f"no key {key!r}, which a row with {form!r} needs")
        if not isinstance(row[key], type_):
            raise DataError(f"{key!r} is {row[key]!r:.60}, expected {'a list' if type_ is list else 'text'}")
    for text in row["choices"] if form == "choices" else [row[form]]:
        if not isinstance(text, list if form == "continuation_ids" else str) or not text:
            raise DataError(f"{form!r} has {text!r:.60}, expected text" if form == "choices" else f"{form!r} is empty")
    if form == "choices":
        if not row[form]:
            raise DataError("'choices' is empty, expected a list of texts")
        gold, count = row.get("gold", 0), len(row[form])
        if type(gold) is not int or not 0 <= gold < count:
            raise DataError(f"'gold' is {gold!r:.60}, expected the number of a choice, 0 to {count - 1}")
    if taken := OUT & set(row):
        raise DataError(f"the key {min(taken)!r} is one that results have; give it another name")
    return form


def encoded(row: dict, form: str, found, longest: int, truncate: bool) -> tuple[list, int]:
    """The pairs of ids to score, and how many tokens of context are left out."""
    from smoljax import score

    c, words = found.config, found.tokenizer
    if words is None and form != "continuation_ids":
        raise UsageError(f"{found.source} has no tokenizer.json, which text needs; copy the model's into the folder")
    eos = (*c.eos_token_id, None)[0] if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    prefix = eos if c.bos_token_id is None else c.bos_token_id
    if form == "text":
        pairs = score.windows(score.encode(words, row["text"]), prefix, longest)
    elif form == "continuation_ids":
        pairs = [(row["context_ids"] or [prefix], row["continuation_ids"])]
    else:
        texts = row["choices"] if form == "choices" else [row["continuation"]]
        pairs = [score.encode_pair(words, row["context"], text, prefix) for text in texts]
    truncated = 0
    for i, (context, continuation) in enumerate(pairs):
        if context[:1] == [None]:
            raise DataError("an empty context needs the bos_token_id that the model's config lacks; give a context")
        beyond = len(context) + len(continuation) - 1 - longest
        if truncate and 0 < beyond < len(context):
            pairs[i], truncated = (context[beyond:], continuation), truncated + beyond
        score.check(pairs[i], c.vocab_size, longest)
    return pairs, truncated


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
    sums.update(rows=1, errors=row.error is not None, tokens=sum(len(s.logprobs) for s in scores))
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
    """stdout, or a file that is whole or absent."""
    if not output:
        yield sys.stdout
        return
    part = f"{output}.part"
    try:
        stream = open(part, "w")
    except OSError as e:
        raise UsageError(f"{output} cannot be written ({e.strerror})") from None
    try:
        with stream:
            yield stream
        os.replace(part, output)
    finally:
        Path(part).unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
