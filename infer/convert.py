"""`smoljax convert SRC DST --to hf|orbax`: weights from a run, a checkpoint or a Hugging Face folder into another form.

`hf` is what transformers loads. `orbax` is a folder that smoljax's programs and `init_from` take.
"""

import argparse
import sys

from smoljax.errors import run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("smoljax convert", description="Convert a model's weights.", allow_abbrev=False)
    p.add_argument("src", metavar="SRC", help="a run, a checkpoint (RUN/checkpoints/STEP) or a Hugging Face folder")
    p.add_argument("dst", metavar="DST", help="a new folder")
    p.add_argument("--to", choices=("hf", "orbax"), required=True)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the source's")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    from smoljax import atomic, checkpoint, hf, runtime, tokenizer, weights

    runtime.start()
    with atomic.fresh(args.dst) as part:  # refuses a DST that exists before any weight is read
        loaded = weights.read(args.src, args.dtype)
        if args.to == "hf":
            hf.save(part, loaded.model, loaded.config, tokenizer=loaded.tokenizer)
        else:
            checkpoint.save_model(part, loaded.model, loaded.config)
            if loaded.tokenizer:
                tokenizer.copy(loaded.tokenizer, part)
    if loaded.tokenizer is None:
        print(f"smoljax: note: {args.src} has no tokenizer.json, so {args.dst} has none", file=sys.stderr)
    print(f"wrote {args.dst}: {loaded.config.parameters:,} parameters in {loaded.dtype}, from {loaded.source}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
