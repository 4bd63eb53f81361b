"""Continue prompts, or answer messages by the model's chat template: a few of them, or a file.

    smoljax generate MODEL --prompt TEXT [--chat] [--stream]
    smoljax generate MODEL --messages FILE
    smoljax generate MODEL --input prompts.jsonl --output out.jsonl

The model's end-of-text tokens end a row, and the chat template's end of turn an answer. Its generation_config.json says
how to sample where the flags do not; else the likeliest token is taken each time. A file is .jsonl (a "prompt" or
"messages" a line; "seed" and "max_new_tokens" there hold for the row, the chat template sees "tools", "documents" and
"chat_template_kwargs", other keys are passed through), .parquet or .txt. The output has a row for
each, in order; a bad one has an "error" in place of a text, and then the exit code is 3. A job that is killed goes on
where it was by the same command.
"""

import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path

from smoljax import generation_config, jobs, row_files
from smoljax.errors import DataError, UsageError, require, run

FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
FLAGS += ("min_new_tokens", "logprobs", "prompt_logprobs")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "smoljax generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("model", metavar="MODEL", help="a run, a Hugging Face folder, a .gguf, a fetched or a hub name, ...")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="give it again for a batch")
    p.add_argument("--chat", action="store_true", help="prompts are messages, for the model's chat template")
    p.add_argument("--system", metavar="TEXT", help="a system message before each prompt; with --chat")
    p.add_argument("--messages", metavar="FILE", help="conversations to answer, in JSON lines")
    p.add_argument("--input", metavar="FILE", help="a batch job: .jsonl, .parquet or .txt")
    p.add_argument("--output", metavar="FILE", help="its results, in JSON lines")
    p.add_argument("--json", action="store_true", help="a JSON line each: text, tokens, finish_reason, logprobs")
    p.add_argument("--stream", action="store_true", help="text as it comes; for one prompt")
    a = p.add_argument_group("sampling and stopping")
    a.add_argument("--max-new-tokens", type=int, metavar="N", help="default 64")
    a.add_argument("--min-new-tokens", type=int, metavar="N", help="before as many, none that ends a row")
    a.add_argument("--temperature", type=float, metavar="T", help="0, the default: the likeliest token")
    a.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    a.add_argument("--top-p", type=float, metavar="P", help="... from the fewest that reach the probability P")
    a.add_argument("--min-p", type=float, metavar="P", help="... from those with P of the likeliest one's or more")
    a.add_argument("--repetition-penalty", type=float, metavar="P", help="of tokens in the prompt or before; 1: none")
    a.add_argument("--frequency-penalty", type=float, metavar="P", help="subtracted for each time a token was given")
    a.add_argument("--presence-penalty", type=float, metavar="P", help="subtracted where a token was given")
    a.add_argument("--logit-bias", action="append", default=[], metavar="ID=X", help="added to a token's logit")
    a.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a row, and is not part of it")
    a.add_argument("--eos", action="append", type=int, metavar="ID", help="ends a row, in place of all that would")
    a.add_argument("--ignore-eos", action="store_true", help="nothing but the limit, or --stop, ends a row")
    a.add_argument("--seed", type=int, default=0, help="of the samples; equal prompts give equal samples")
    a.add_argument("--n", type=int, default=1, metavar="N", help="samples a prompt, by seeds SEED ... SEED + N - 1")
    a.add_argument("--logprobs", type=int, metavar="N", help="of each token, and of the N likeliest; with --json")
    a.add_argument("--prompt-logprobs", action="store_true", default=None, help="... of the prompt's tokens, too")
    a.add_argument("--no-generation-config", action="store_true", help="leave what it says of sampling aside")
    b = p.add_argument_group("how to run")
    b.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    b.add_argument("--int8", action="store_true", help="weights in int8; a folder that is in int8 needs no flag")
    b.add_argument(
        "--cache", choices=("float32", "bfloat16", "int8"), help="keys and values (default: --dtype; CPU: float32)"
    )
    b.add_argument("--batch-size", type=int, metavar="B", help="rows at a time, on each device (8 on a CPU, else 64)")
    b.add_argument("--drafts", type=int, default=0, metavar="K", help="tokens a round that are guessed, and checked")
    b.add_argument("--draft", metavar="MODEL", help="a small model that guesses (default: what stood there before)")
    b.add_argument("--measure-forms", action="store_true", help="time anew which forms of matrices are fastest here")
    b.add_argument("--verbose", action="store_true", help="say on stderr which forms of matrices it computes with")
    b.add_argument(
        "--num-processes", type=int, metavar="N", help="that share the job (default: srun's, MPI's, a pod's)"
    )
    b.add_argument("--process-id", type=int, metavar="I", help="which one this is: 0 ... N-1")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    check(args)
    processes = jobs.share(args.num_processes, args.process_id) if args.input else (0, 1)
    import jax

    from smoljax import chat, runtime, weights
    from smoljax.answers import Answers
    from smoljax.renderer import Renderer
    from smoljax.sampling import Sampling

    bias = tuple(map(pair, args.logit_bias))
    flags = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    check_sampling(flags, bias)
    rows = [{"prompt": text} for text in args.prompt]
    if args.messages:
        rows = list(chat.read_messages(args.messages))
        require(bool(rows), f"{args.messages} holds no conversation; give one a line")
    if args.input:
        row_files.count(Path(args.input))
    runtime.start(shortest=0)
    if processes == (0, 1) and args.num_processes is None:
        processes = jax.process_index(), jax.process_count()  # a TPU pod's hosts find each other
    loaded = weights.read(args.model)
    if loaded.tokenizer is None:
        raise UsageError(f"{args.model} has no tokenizer.json, which prompts need; copy the model's into the folder")
    first = next(filter(asks, row_files.rows(Path(args.input)) if args.input else rows), {})  # a bad row tells nothing
    conversations = args.chat or first.get("messages") is not None
    settings = asked(args, flags, loaded)
    own = {name: settings.pop(name, default) for name, default in (("stop_strings", ()), ("max_new_tokens", 64))}
    stop, limit = tuple(args.stop or own["stop_strings"]), args.max_new_tokens or own["max_new_tokens"]
    how = Sampling(**settings | {"logit_bias": bias})
    require(args.n == 1 or how.temperature > 0, f"--n {args.n} samples are one at temperature 0; give --temperature")
    with contextlib.ExitStack() as held:
        work, renderer = None, held.enter_context(Renderer(loaded)) if conversations else None
        eos = ending(args, loaded, renderer)
        if args.input:
            found = {"settings": settings, "source": loaded.source, "weights": weights.digest(loaded), "stop": stop}
            found |= {"max_new_tokens": limit, "eos": eos, "platform": jax.default_backend()}
            work = held.enter_context(job(args, found, processes))
        if not (work and work.complete):
            answers = Answers(
                loaded,
                engines(args, loaded, how, eos, len(rows), work),
                renderer=renderer,
                chat=args.chat,
                system=args.system,
                max_new_tokens=limit,
                seed=args.seed,
                n=args.n,
                stop=stop,
                say=say if args.stream else None,
            )
            del loaded  # laid out, the weights are others
            if not work:
                return few(answers, rows, args)
            answer_all(answers, work)
    return joined(work)


def ending(args, loaded, renderer) -> tuple[int, ...]:
    """The ids that end a row: the model's own and the tokenizer's eos, of an answer the template's end of turn, too."""
    if args.eos or args.ignore_eos:
        return tuple(args.eos or ())
    return tuple(dict.fromkeys((*loaded.ends, *(renderer.turn_ends() if renderer else ()))))


def job(args, found: dict, processes: tuple[int, int]) -> jobs.Job:
    """What may not change when it goes on: the flags but those of who computes it, and what was found of the model."""
    what = vars(args) | found
    for name in ("input", "output", "num_processes", "process_id", "batch_size", "json", "verbose", "measure_forms"):
        what.pop(name)
    return jobs.Job(Path(args.input), Path(args.output), what, *processes)


def engines(args, loaded, how, eos, rows: int, work: jobs.Job | None) -> list:
    """One for each device that is needed."""
    import jax

    from smoljax import forms, weights
    from smoljax.config import Compute
    from smoljax.engine import Engine
    from smoljax.quantize import quantize

    if args.measure_forms:
        forms.forget()
    model = quantize(loaded.model) if args.int8 and loaded.dtype != "int8" else loaded.model
    wanted = (work.what["rows"] if work else rows) * args.n
    size = min(args.batch_size or (8 if jax.default_backend() == "cpu" else 64), wanted)
    served = laid_out(model, args.dtype, size * (1 + args.drafts), work, args.verbose)
    options = {"sampling": how, "eos": eos, "compute": Compute(dtype=args.dtype), "cache": args.cache}
    options |= {"drafts": args.drafts, "draft": weights.load(args.draft) if args.draft else None}
    return [Engine(served, size, device=device, **options) for device in jax.local_devices()[: -(-wanted // size)]]


def laid_out(model, dtype: str, rows: int, work, verbose: bool):
    """The model in the forms that are fastest here; of a job that goes on, in those that it had, for equal sums."""
    from smoljax.layout import lay_out

    served = lay_out(model, dtype, rows, work.kept.get("ways") if work else None)
    if served.report and verbose:
        print(f"smoljax: laid out for {served.report}", file=sys.stderr)
    if work and (ways := work.keep("ways", served.ways)) != served.ways:  # of another process, which was first
        served = lay_out(model, dtype, rows, ways)
    return served


def asks(row: dict) -> bool:
    return row.get("messages") is not None or row.get("prompt") is not None


def few(answers, rows: list[dict], args) -> int:
    """Each on stdout: a JSON line, or the prompt and what follows it; an answer stands alone."""
    for i, row in enumerate(answers.run(rows, strict=True)):
        if args.json:
            print(json.dumps(row))
            continue
        asked = "" if answers.renderer else row["prompt"]
        if args.stream:
            print()
            continue
        for j, sample in enumerate(row.get("samples", [row])):
            print(("\n" if i + j else "") + asked + sample["text"])
    return 0


def say(text: str):
    print(text, end="", flush=True)


def answer_all(answers, work: jobs.Job):
    """A file's rows, from the first that is not done."""
    from smoljax.progress import Progress

    if work.begin > work.first:
        print(f"smoljax: goes on behind the {work.begin - work.first} rows that are done", file=sys.stderr)
    rows = itertools.islice(row_files.rows(work.source), work.begin, work.last)
    if answers.renderer:
        answers.renderer.at(work.kept["begun"])
    with (
        contextlib.closing(answers.run(rows, before=work.begin)) as found,
        Progress(work.last - work.first, work.begin - work.first) as progress,
    ):
        for row in found:
            work.write(row)
            samples = () if "error" in row else row.get("samples", [row])  # what a bad row has is the user's
            progress.add(sum(len(sample["tokens"]) for sample in samples))


def joined(work: jobs.Job) -> int:
    """The output, where this was the last process of the job."""
    if not work.join():
        print(f"smoljax: rows {work.first + 1} to {work.last} are done, others are not yet", file=sys.stderr)
        return 0
    bad = jobs.errors(work.output)
    if bad:
        raise DataError(f"{len(bad)} of {work.what['rows']} rows of {work.source} have no answer; the first: {bad[0]}")
    print(f"smoljax: {work.output}: {work.what['rows']} rows", file=sys.stderr)
    return 0


def asked(args, flags: dict, loaded) -> dict:
    """The flags, and what generation_config.json says beside them."""
    given = flags | ({"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {})
    own = {} if args.no_generation_config else generation_config.defaults(loaded.files, loaded.source, given)
    settings = own | flags
    used = {key: value for key, value in own.items() if settings[key] is value}
    if used:
        print(f"smoljax: by generation_config.json: {', '.join(f'{k} {v}' for k, v in used.items())}", file=sys.stderr)
    return settings


def check_sampling(flags: dict, bias: tuple):
    """Each flag by itself, before weights are read; whether they are sampled at all is known when they are."""
    from smoljax.sampling import Sampling

    Sampling(**{"temperature": 1.0} | {k: v for k, v in flags.items() if k != "temperature"}, logit_bias=bias)
    Sampling(temperature=flags.get("temperature", 0.0))
    greedy = flags.get("temperature") == 0 and {"top_k", "top_p", "min_p"} & set(flags)
    require(not greedy, "--top-k, --top-p and --min-p choose what is sampled from; give --temperature above 0")


def check(args):
    """What cannot be, before anything is read."""
    ways = [bool(args.prompt), bool(args.messages), bool(args.input)]
    require(sum(ways) == 1, "expected --prompt TEXT, or --messages FILE, or --input FILE, and one of them")
    require(bool(args.input) == bool(args.output), "--input and --output go together")
    alone = args.num_processes is None and args.process_id is None
    require(alone or bool(args.input), "--num-processes and --process-id are for --input")
    require(args.system is None or args.chat, "--system is for --chat")
    fine = args.system is None or not args.messages
    require(fine, "--system goes before prompts, and --messages has conversations")
    require(
        args.max_new_tokens is None or args.max_new_tokens >= 1,
        f"--max-new-tokens is {args.max_new_tokens}, expected 1 or more",
    )
    require(args.n >= 1, f"--n is {args.n}, expected 1 or more")
    require(0 <= args.seed <= 2**32 - args.n, f"--seed is {args.seed}, expected 0 or more, below 2**32")
    require(args.batch_size is None or args.batch_size >= 1, f"--batch-size is {args.batch_size}, expected 1 or more")
    require(0 <= args.drafts <= 16, f"--drafts is {args.drafts}, expected 0 to 16")
    require(not args.draft or args.drafts, "--draft guesses --drafts tokens a round; give both, such as --drafts 4")
    require(not (args.eos and args.ignore_eos), "--eos and --ignore-eos exclude each other")
    one = len(args.prompt) == 1 and args.n == 1 and not args.json
    require(not args.stream or one, "--stream is for one --prompt, without --n and --json")
    told = args.json or args.input
    require(args.logprobs is None or told, "--logprobs are given with --json, or in --output")
    require(not args.prompt_logprobs or args.logprobs is not None, "--prompt-logprobs comes with --logprobs N")
    require(all(args.stop), "--stop '' would end every row at once")
    for flag, texts in {"--prompt": args.prompt, "--stop": args.stop, "--system": [args.system or ""]}.items():
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:  # bytes of the command line that are no text
                raise UsageError(f"{flag} {text!r:.60} is not UTF-8 text") from None
    require(not args.output or Path(args.output).name, f"--output {args.output} is a folder; name a file in it")


def pair(text: str) -> tuple[int, float]:
    id, _, value = text.partition("=")
    try:
        return int(id), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias {text!r}, expected a token id and a number: 42=-1.5") from None


if __name__ == "__main__":
    raise SystemExit(run(main))
