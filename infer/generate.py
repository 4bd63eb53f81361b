"""`smoljax generate MODEL --prompt TEXT`: continue prompts.

The model's own end-of-text token ends a row. Without --temperature the likeliest token is taken each time.
"""

import argparse
import json

from smoljax.errors import UsageError, require, run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("smoljax generate", description="Continue prompts.", allow_abbrev=False)
    p.add_argument("model", metavar="MODEL", help="a run, a checkpoint (RUN/checkpoints/STEP) or a Hugging Face folder")
    p.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="give it again for a batch")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest token")
    p.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="... from the fewest that reach the probability P")
    p.add_argument("--seed", type=int, default=0, help="of the samples; equal prompts give equal samples")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    p.add_argument("--json", action="store_true", help="a JSON line per prompt: prompt, text, tokens, finish_reason")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    from smoljax import decode, runtime, tokenizer, weights
    from smoljax.config import Compute

    decode.Sampling(args.temperature, args.top_k, args.top_p)  # a wrong setting is said before weights are read
    require(args.max_new_tokens >= 1, f"--max-new-tokens is {args.max_new_tokens}, expected 1 or more")
    runtime.start()
    loaded = weights.read(args.model)
    if loaded.tokenizer is None:
        raise UsageError(f"{args.model} has no tokenizer.json, which --prompt needs; copy the model's into the folder")
    words = tokenizer.load(loaded.tokenizer)
    prompts = [encode(words, text, i) for i, text in enumerate(args.prompt, start=1)]

    rows = decode.complete(
        loaded.model,
        prompts,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos=() if loaded.config.eos_token_id is None else loaded.config.eos_token_id,
        compute=Compute(dtype=args.dtype),
    )
    for i, (prompt, row) in enumerate(zip(args.prompt, rows, strict=True)):
        text = words.decode(row.tokens)
        if args.json:
            print(json.dumps(dict(prompt=prompt, text=text, tokens=row.tokens, finish_reason=row.finish_reason)))
        else:
            print(("\n" if i else "") + prompt + text)
    return 0


def encode(words, text: str, number: int) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise UsageError(f"prompt {number} is not UTF-8 text") from None
    ids = words.encode(text).ids
    require(bool(ids), f"prompt {number} is {text!r}, which has no tokens; give some text")
    return ids


if __name__ == "__main__":
    raise SystemExit(run(main))
