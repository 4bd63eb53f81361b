"""The same prompt continued by smoljax and by llama.cpp, in turn: A B A B, greedy, from the same weights.

llama.cpp is a process of its own (infer/bench_llama_cpp.mjs), reads a Q8_0 that gguf.py writes, and runs on CPU cores.
Q8_0 is 8 bits a number and an F16 scale for 32 of them, of the embedding too, so int8-embedding is what is like it
here, with an f32 scale for each output. It rounds x to 8 bits as well, and keeps keys and values in F16. Each
token passes through Node, which costs some tenths of a millisecond: little beside SmolLM's time, much beside a tiny
model's.
"""

import os
import tempfile
from pathlib import Path

import jax

from smoljax import exchange, gguf, tokenizer
from smoljax.config import Compute
from smoljax.decode_duel import Side, generations, in_turn, leading, loaded, named, ratios
from smoljax.decode_measure import Generation, random_prompts
from smoljax.duel import Peer
from smoljax.engine import Engine
from smoljax.errors import require
from smoljax.model import SmolLM
from smoljax.request import Request
from smoljax.sampling import Sampling

PEER = "llama.cpp Q8_0"


class Node(Peer):
    """infer/bench_llama_cpp.mjs at work, until `end`."""

    def __init__(self, program: Path, folder: Path, setup: dict):
        self.start(PEER, "it needs node-llama-cpp, built", "node", str(program), str(folder.absolute()))
        found = self.ask(setup)
        what = f"--llama-cpp {folder}: llama.cpp does not start ({found.get('error')})"
        require("error" not in found, f"{what}; install node-llama-cpp there again, which brings it built")
        self.versions = found["versions"]


def duel(
    model: SmolLM,
    program: Path,
    folder: Path,
    prompt_tokens: int,
    new_tokens: int,
    dtype: str,
    cache: str | None = None,
    drafts: int = 0,
    windows: int = 5,
) -> dict:
    """Speeds of both sides, one row each, and how many of their tokens are the same.

    `speedup` is ours, at `dtype` and `cache`, over llama.cpp's; `speedup_best` is our fastest of those listed over it;
    both as in decode_duel.duel. llama.cpp takes the number of threads that is fastest for it. `tokens_agree`: how many
    leading tokens of ours are its own, which rounds otherwise; after random prompts several are about as likely, and
    once apart they stay so. `likeliest_agree`: how many of its tokens are our likeliest after the same tokens before.
    Of random weights with a tied head both say little, for such a model mostly repeats the last token.
    """
    device = jax.default_backend()
    require(device == "cpu", f"--against llama.cpp is for a CPU, and JAX has a {device} here; set JAX_PLATFORMS=cpu")
    load, cores = loaded(), len(os.sched_getaffinity(0))
    prompts, asked = random_prompts(model.config, 1, prompt_tokens), named(dtype, cache)
    ours = generations(model, prompts, dtype, cache, drafts)
    with tempfile.TemporaryDirectory() as place:
        setup = {"file": str(q8_0(Path(place), model)), "prompts": prompts, "new_tokens": new_tokens}
        theirs = {PEER: Side(Node(program, folder, setup | {"threads": sorted({1, cores // 2 or 1, cores})}))}
    versions = theirs[PEER].peer.versions
    rows = {name: side.timed(new_tokens)[2][0] for name, side in (ours | theirs).items()}
    agree = {name: leading(row, rows[PEER]) for name, row in rows.items()}
    taken, found = in_turn(ours, theirs, agree, new_tokens, windows)
    result = ratios(taken, found, ours, theirs, asked, PEER)
    result |= {"tokens_agree": agree[asked], "likeliest_agree": likeliest_agree(ours[asked], rows[PEER])}
    return result | {"peer_versions": versions, "load": load} | found


def likeliest_agree(own: Generation, theirs: list[int]) -> int:
    """How many of a row's new tokens ours would take, too, were all before them the row's."""
    (prompt,), engine, how = own.prompts, own.engine, Sampling(logprobs=1, prompt_logprobs=True)
    compute = Compute(dtype=engine.model.dtype)
    probe = Engine(engine.model, 1, sampling=how, compute=compute, cache=engine.cache, eos=())
    ((_, done),) = probe.run([Request(prompt + theirs[:-1], 1)])
    likeliest = [ids[0] for _, ids, _ in done.prompt_logprobs[len(prompt) - 1 :]] + done.tokens
    return sum(a == b for a, b in zip(likeliest, theirs, strict=True))


def q8_0(folder: Path, model: SmolLM) -> Path:
    """The model's GGUF, with a vocabulary of bytes: llama.cpp loads none without, and ids alone are exchanged."""
    words = folder / "tokenizer.json"
    tokenizer.train(["the the"], tokenizer.SMALLEST + 1, words)
    source = exchange.of_model(model, model.config, {words.name: words.read_bytes()})
    gguf.write(path := folder / "model.gguf", source, "q8_0", "model")
    return path
