"""`smoljax generate MODEL --prompt TEXT`: continue prompts, or answer messages by the model's chat template.

The model's own end-of-text token ends a row. Without --temperature the likeliest token is taken each time. --chat makes
each --prompt a user's message; --messages reads whole conversations, a JSON line each: {"messages": [{"role": "user",
"content": "..."}]}. Answers go to stdout.
"""

import argparse
import json

from smoljax.errors import UsageError, require, run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("smoljax generate", description="Continue prompts.", allow_abbrev=False)
    p.add_argument("model", metavar="MODEL", help="a run, a Hugging Face folder, a .gguf, a fetched or a hub name, ...")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="give it again for a batch")
    p.add_argument("--chat", action="store_true", help="prompts are messages, for the model's chat template")
    p.add_argument("--messages", metavar="FILE", help="conversations to answer, in JSON lines")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest token")
    p.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="... from the fewest that reach the probability P")
    p.add_argument("--seed", type=int, default=0, help="of the samples; equal prompts give equal samples")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    p.add_argument(
        "--json", action="store_true", help="a JSON line each: prompt or messages, text, tokens, finish_reason"
    )
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    from smoljax import chat, decode, runtime, weights
    from smoljax.config import Compute

    decode.Sampling(args.temperature, args.top_k, args.top_p)  # a wrong setting is said before weights are read
    require(args.max_new_tokens >= 1, f"--max-new-tokens is {args.max_new_tokens}, expected 1 or more")
    greedy = args.temperature == 0 and (args.top_k is not None or args.top_p is not None)
    require(not greedy, "--top-k and --top-p choose what is sampled from; give --temperature, more than 0")
    require(bool(args.prompt) != bool(args.messages), "expected --prompt TEXT, or --messages FILE, and not both")
    for number, text in enumerate(args.prompt, start=1):
        check_text(text, number)
    conversations = list(chat.read_messages(args.messages)) if args.messages else []
    require(bool(conversations) or not args.messages, f"{args.messages} holds no conversation; give one a line")
    if args.chat:
        conversations = conversations or [[{"role": "user", "content": text}] for text in args.prompt]
    runtime.start()
    loaded = weights.read(args.model)
    words = loaded.tokenizer
    if words is None:
        raise UsageError(f"{args.model} has no tokenizer.json, which prompts need; copy the model's into the folder")
    texts = render(loaded, conversations) if conversations else args.prompt
    eos = None  # the model's own
    if conversations:
        prompts = [chat.encode(words, text) for text in texts]
        if chat.own(loaded.files) is None:  # a base model ends a document, and not a turn
            eos = ends(loaded.config) + (words.token_to_id("<|im_end|>"),)
    else:
        prompts = [words.encode(text).ids for text in texts]
    for number, ids in enumerate(prompts, start=1):
        require(bool(ids), f"prompt {number} is {texts[number - 1]!r}, which has no tokens; give some text")

    rows = decode.complete(
        loaded.model,
        prompts,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos=eos,
        compute=Compute(dtype=args.dtype),
    )
    for i, row in enumerate(rows):
        text, asked = words.decode(row.tokens), "" if conversations else args.prompt[i]
        if args.json:
            given = {"messages": conversations[i]} if conversations else {"prompt": asked}
            print(json.dumps(given | dict(text=text, tokens=row.tokens, finish_reason=row.finish_reason)))
        else:
            print(("\n" if i else "") + asked + text)
    return 0


def render(loaded, conversations: list) -> list[str]:
    """By the model's own chat template, which runs in a process of its own."""
    from smoljax import chat
    from smoljax.template import Template

    c, words = loaded.config, loaded.tokenizer
    first = ends(c)[0] if ends(c) else None
    bos, eos = ("" if id is None else words.id_to_token(id) or "" for id in (c.bos_token_id, first))
    name = f"the chat template of {loaded.source}"
    with Template(chat.pick(loaded.files, c), name, bos, eos) as template:
        return [template.render(messages) for messages in conversations]


def ends(config) -> tuple[int, ...]:
    eos = config.eos_token_id
    return eos if isinstance(eos, tuple) else () if eos is None else (eos,)


def check_text(text: str, number: int):
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise UsageError(f"prompt {number} is not UTF-8 text") from None


if __name__ == "__main__":
    raise SystemExit(run(main))
