"""Generation speed here, on random prompts; a duel with transformers or llama.cpp on the same weights and prompts.

    smoljax bench-decode --model smollm2-135m --batch 1 --prompt-tokens 64 --new-tokens 128
    smoljax bench-decode --model smollm2-135m --batch 8 --dtype int8 --against transformers --json
    smoljax bench-decode --model smollm2-135m --against llama.cpp --llama-cpp FOLDER --json
    smoljax bench-decode --suite                         # tables and JSON, or some parts: --suite decode,layout

From an uninstalled checkout: python -m infer.bench. Nothing but JAX, flax, optax and numpy is needed for random
weights. The duel with transformers needs torch, transformers, tokenizers, safetensors and einops too; the one with
llama.cpp gguf, tokenizers, safetensors, einops, Node.js and a folder where `npm install --ignore-scripts
node-llama-cpp@3.22.1` was run. What was measured for smoljax is in docs/benchmarks.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

from smoljax import settings
from smoljax.config import SIZES, Data, Train
from smoljax.errors import require, run
from smoljax.settings import meant

DTYPES = ("float32", "bfloat16", "int8", "int8-embedding")
COUNTS = {  # what --suite has of its own: the default, the least, the help
    "batch": (1, 1, "rows at a time"),
    "prompt_tokens": (64, 1, "of each row"),
    "new_tokens": (128, 1, "of each row"),
    "drafts": (0, 0, "tokens a round, looked up and checked"),
    "windows": (5, 1, "timed runs, the median counts"),
}
MODULE, INSTALL = "node_modules/node-llama-cpp", "npm install --ignore-scripts node-llama-cpp@3.22.1"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("smoljax bench-decode", description=__doc__.splitlines()[0])
    parser.add_argument(
        "settings", nargs="*", metavar="a.b=c", help="of random weights: model.num_hidden_layers=2; xla_flags=--xla_..."
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"random weights of a size ({', '.join(SIZES)}; default: smollm2-135m), or a MODEL: a run, a folder, ...",
    )
    for name, (default, _, what) in COUNTS.items():
        parser.add_argument(flag(name), type=int, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: float32 on a CPU, else bfloat16; int8-embedding, which is like Q8_0, against llama.cpp",
    )
    parser.add_argument(
        "--cache", choices=["int8"], help="of keys and values (default: the arithmetic's, float32 on a CPU)"
    )
    parser.add_argument(
        "--against", choices=["transformers", "llama.cpp"], help="the same prompts there too, in turn: A B A B"
    )
    parser.add_argument("--llama-cpp", metavar="FOLDER", help=f"for --against llama.cpp: where `{INSTALL}` was run")
    parser.add_argument(
        "--suite", nargs="?", const="all", metavar="PARTS", help="tables; or some: decode,prefill,layout,bandwidth"
    )
    parser.add_argument(
        "--measure-forms", action="store_true", help="time anew which forms of the matrices are fastest here"
    )
    parser.add_argument("--out", metavar="FILE", help="the suite's JSON (default: bench-decode-DEVICE.json)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is JSON")
    args = parser.parse_intermixed_args(argv)
    check(args)
    check_peer(args)
    if args.against:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both are on one GPU
    own = configured(args)
    from smoljax import decode_measure, decode_suite, forms, measure, suite

    if args.measure_forms:
        forms.forget()
    if args.suite:
        suite.chosen(args.suite, decode_suite.PARTS)  # a mistake is said before weights are made
    model = read(args.model, own)
    if args.suite:
        decode_suite.run(model, args.suite, args.out)
        return 0

    fits(args, model.config)
    usual = "int8-embedding" if args.against == "llama.cpp" else decode_measure.usual()
    config, dtype, N = dataclasses.asdict(model.config), args.dtype or usual, args.new_tokens
    around = measure.surroundings() | {"model": args.model, "dtype": dtype, "cache": args.cache, "drafts": args.drafts}
    around |= {"batch": args.batch, "prompt_tokens": args.prompt_tokens, "new_tokens": N, "windows": args.windows}
    how = (args.prompt_tokens, N, dtype, args.cache, args.drafts, args.windows)
    if args.against == "transformers":
        from smoljax import decode_duel

        result = decode_duel.duel(model, Path(__file__).with_name("bench_peer.py"), args.batch, *how)
    elif args.against == "llama.cpp":
        from smoljax import decode_llama_cpp

        program = Path(__file__).with_name("bench_llama_cpp.mjs")
        result = decode_llama_cpp.duel(model, program, Path(args.llama_cpp), *how)
    else:
        prompts = decode_measure.random_prompts(model.config, args.batch, args.prompt_tokens)
        served = decode_measure.served(model, dtype, args.batch * (1 + args.drafts))
        del model
        generation = decode_measure.Generation(served, prompts, args.cache, args.drafts)
        result = decode_measure.speed(generation, N, args.windows)
    result = around | {"config": config} | result
    print("\n".join(f"{name:26s} {suite.shown(value)}" for name, value in result.items()))
    if args.json:
        print(json.dumps(result))
    return 0


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(args):
    """Flags that cannot be; those of COUNTS that are not given get their defaults."""
    require(not (args.against and args.suite), "--against, --suite: one of them")
    require(args.suite != "", "--suite '' has no part; leave the '' out for all")
    require(args.suite or not args.out, "--out is for --suite; else --json prints the result")
    for name in ("dtype", "cache", "json", *COUNTS):
        given = getattr(args, name)
        fine = not args.suite or given is None or given is False
        require(fine, f"{flag(name)} is not for --suite, which has rows of its own and writes JSON to --out")
    for name, (default, least, _) in COUNTS.items():
        given = getattr(args, name)
        require(given is None or given >= least, f"{flag(name)} is {given}, expected at least {least}")
        setattr(args, name, default if given is None else given)
    require(args.drafts <= 16, f"--drafts is {args.drafts}, expected at most 16")


def check_peer(args):
    """A UsageError unless the duel that is asked for can be."""
    folder = args.llama_cpp
    if args.against == "transformers":
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        require(not missing, f"--against transformers needs {' and '.join(missing)}: pip install torch transformers")
    if args.against != "llama.cpp":
        require(folder is None, "--llama-cpp is for --against llama.cpp")
        return
    require(folder, f"--against llama.cpp needs --llama-cpp FOLDER, a folder where `{INSTALL}` was run")
    found = (Path(folder) / MODULE / "package.json").is_file()
    require(found, f"--llama-cpp {folder} holds no {MODULE}; run `{INSTALL}` there")
    require(shutil.which("node"), "--against llama.cpp needs Node.js, and there is no program node; install it")
    require(args.batch == 1, f"--batch is {args.batch}, expected 1 for --against llama.cpp: it continues one row")


def configured(args):
    """The model's config where its weights are random, else None. Mistakes are said before JAX starts."""
    from smoljax import runtime

    model = SIZES.get(args.model, SIZES["smollm2-135m"])
    config = Train(model, steps=10_000, data=Data(seq_len=1))  # for its model and its xla_flags
    for setting in args.settings:
        name = setting.partition("=")[0]
        known = name == "xla_flags" or name.startswith("model.")
        require(known, f"unknown setting {setting!r}; expected model.NAME=VALUE or xla_flags=FLAGS")
        random = args.model in SIZES or not name.startswith("model.")
        require(random, f"{name} is for random weights, and --model {args.model} has its own")
    config = settings.override(config, args.settings)
    if args.model in SIZES:
        fits(args, config.model)
    else:
        from smoljax.fetch import NAMES

        known = args.model in NAMES or "/" in args.model or Path(args.model).exists()
        names = (*SIZES, *NAMES)
        require(
            known,
            f"--model {args.model!r}{meant(args.model, names)}; expected one of {', '.join(SIZES)} for random weights, "
            "or a MODEL: a run, a Hugging Face folder, a .gguf, a fetched or a hub name",
        )
    runtime.set_flags(config.xla_flags)
    return config.model if args.model in SIZES else None


def fits(args, config):
    asked, most = args.prompt_tokens + args.new_tokens, config.max_position_embeddings
    require(
        bool(args.suite) or asked <= most,
        f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are {asked} positions, more than the "
        f"model's {most}; take fewer",
    )


def read(name: str, config):
    """The model, in f32; of int8 weights the numbers that they stand for."""
    if config:
        from smoljax.decode_measure import random_model

        return random_model(config)
    from smoljax import weights

    return weights.read(name, "float32").model


if __name__ == "__main__":
    raise SystemExit(run(main))
