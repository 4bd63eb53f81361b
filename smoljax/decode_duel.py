"""The same prompts continued by smoljax and by transformers, in turn: A B A B, greedy, from the same weights.

Each precision of the peer is a process of its own (infer/bench_peer.py) that loads what smoljax exports, and waits on a
pipe while others compute. What is timed, and how, is in decode_measure.py, the same for both.
"""

import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from smoljax import exchange, hf
from smoljax.config import Compute
from smoljax.decode_measure import Generation, arithmetic, figures, random_prompts, served, usual, window
from smoljax.duel import Peer
from smoljax.engine import Engine
from smoljax.errors import Error
from smoljax.model import SmolLM
from smoljax.request import Request
from smoljax.sampling import Sampling

ALIKE = 8  # new tokens of each row that must be transformers' own, in f32
LIKELIEST = 5  # tokens whose log-probabilities are compared, too
CLOSE = 1e-3  # nats
REFERENCE = "transformers float32"


class Side:
    """A process of the peer, as Generation is ours."""

    def __init__(self, peer: Peer):
        self.peer, self.said = peer, {}

    def timed(self, new_tokens: int, exact: bool = False) -> tuple[float, float, list[list[int]]]:
        found = self.peer.ask({"new_tokens": new_tokens, "exact": exact})
        self.said = {name: found[name] for name in ("threads", "peak_gb") if name in found}
        return found["wall"], found["cpu"], found["tokens"]

    def likeliest(self, new_tokens: int, count: int) -> list:
        """Log-probabilities of so many likeliest tokens, for each row and new token."""
        return self.peer.ask({"new_tokens": new_tokens, "exact": True, "likeliest": count})["likeliest"]


def duel(
    model: SmolLM,
    program: Path,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: str,
    cache: str | None = None,
    drafts: int = 0,
    windows: int = 5,
) -> dict:
    """Speeds of both sides, and how many of their tokens are the same.

    `speedup` is ours, at `dtype` and `cache`, over transformers' at the same precision, or at the device's usual one
    where ours is int8. `speedup_best` is our fastest over their fastest, of those listed. Both are medians of the
    ratios of whole runs beside each other, prompt included; `..._decode` of decoding alone, where figures() sees it;
    `..._cpu_seconds` of CPU seconds, for the best with each side's own least. A peer that fails under torch.compile is
    said on stderr and left out; on a CPU each takes the number of threads that is fastest for it, and `load` says who
    else was at work before.
    `tokens_agree`: how many leading tokens are transformers' in f32, in the row that differs first.
    """
    load, cores = loaded(), len(os.sched_getaffinity(0))
    prompts, asked = random_prompts(model.config, batch, prompt_tokens), named(dtype, cache)
    ours = generations(model, prompts, dtype, cache, drafts)
    with tempfile.TemporaryDirectory() as place:
        hf.write(Path(place), exchange.of_model(model, model.config), "float32")
        setup = {"folder": place, "prompts": prompts, "platform": jax.default_backend()}
        theirs, versions = peers(program, setup | {"threads": cores}, new_tokens)
    agree, apart = alike(ours, theirs, new_tokens)
    taken, found = in_turn(ours, theirs, agree, new_tokens, windows)
    equal = f"transformers {arithmetic(dtype)}"
    against = best(found, [name for name in theirs if name.startswith(equal)])
    result = ratios(taken, found, ours, theirs, asked, against)
    if dtype.startswith("int8"):
        result["against"] += f" ({usual()} is the usual precision here)"
    result |= {"tokens_agree": agree["smoljax float32"], "logprob_difference": apart}
    return result | {"peer_versions": versions, "load": load} | found


def loaded() -> float:
    """The machine's load; others at work are said on stderr."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > cores / 4:
        print(
            f"smoljax: the load of this machine is {load:.1f} on {cores} cores: others are at work, and threads of "
            "the peer that wait for each other may take ten times as long; measure again when it is idle",
            file=sys.stderr,
        )
    return load


def generations(model: SmolLM, prompts: list, dtype: str, cache: str | None, drafts: int) -> dict[str, Generation]:
    """Ours: what is asked for, and every precision beside it."""
    forms = [(dtype, cache), ("float32", None), ("bfloat16", None), ("int8", None), ("int8", "int8")]
    forms = dict.fromkeys([*forms, ("int8-embedding", None)])
    rows = len(prompts) * (1 + drafts)
    kept = {kind: served(model, kind, rows) for kind in dict.fromkeys(kind for kind, _ in forms)}
    return {named(kind, c): Generation(kept[kind], prompts, c, drafts) for kind, c in forms}


def in_turn(ours: dict, theirs: dict, agree: dict, new_tokens: int, windows: int) -> tuple[dict, dict]:
    """The windows of each side, taken beside the others', and its figures; then the peers end."""
    for side in ours.values():
        side.timed(1)  # compiles the shorter run
    sides, prompts = ours | theirs, next(iter(ours.values())).prompts
    taken = {name: [] for name in sides}
    for _ in range(windows):
        for name, side in sides.items():
            taken[name].append(window(side, new_tokens))
    found = {name: figures(parts, len(prompts), len(prompts[0]), new_tokens) for name, parts in taken.items()}
    for name in sides:
        found[name]["tokens_agree"] = agree[name]
    for name, side in theirs.items():
        found[name] |= side.said
        side.peer.end()
    for name, side in ours.items():
        found[name]["layout"] = side.engine.model.report
    return taken, found


def best(found: dict, names, figure: str = "wall_s") -> str:
    return min(names, key=lambda name: found[name][figure])


def ratios(taken: dict, found: dict, ours: dict, theirs: dict, asked: str, against: str) -> dict:
    """How many times faster `asked` is than `against`, and our fastest than theirs."""

    def ratio(their: str, our: str, figure) -> float:
        pairs = zip(taken[their], taken[our], strict=True)
        return statistics.median(figure(a) / figure(b) for a, b in pairs)

    fastest, rival = best(found, ours), best(found, theirs)
    least, their_least = best(found, ours, "cpu_s_per_token"), best(found, theirs, "cpu_s_per_token")
    result = {
        "speedup": ratio(against, asked, wall),
        "speedup_cpu_seconds": ratio(against, asked, cpu),
        "ours": asked,
        "against": against,
        "speedup_best": ratio(rival, fastest, wall),
        "speedup_best_cpu_seconds": ratio(their_least, least, cpu),
        "best_dtype": fastest.removeprefix("smoljax "),
        "best_against": rival,
    }
    for name, their, our in (("speedup_decode", against, asked), ("speedup_best_decode", rival, fastest)):
        if all("decode_tokens_per_s" in found[side] for side in (their, our)):
            result[name] = ratio(their, our, alone)
    return result


def wall(part) -> float:
    return part[1]


def cpu(part) -> float:
    return part[2]


def alone(part) -> float:
    """Seconds of decoding."""
    return part[1] - part[0]


def named(dtype: str, cache: str | None) -> str:
    return f"smoljax {dtype}" + (f", cache {cache}" if cache else "")


def peers(program: Path, setup: dict, new_tokens: int) -> tuple[dict, dict]:
    """transformers in each precision, and on a GPU with its static cache and torch.compile too, warm; its versions."""
    found, versions = {}, {}
    for compiled in (False,) if setup["platform"] == "cpu" else (False, True):
        for dtype in ("float32", "bfloat16"):
            kind = f"{dtype}{', compiled' * compiled}"
            try:
                side = Side(Peer(program, setup | {"kind": kind, "dtype": dtype, "compile": compiled}))
                side.timed(new_tokens)
            except Error as e:
                if not compiled:
                    raise
                print(f"smoljax: torch.compile is left out: {e}", file=sys.stderr)
                continue
            found[f"transformers {kind}"], versions = side, side.peer.versions
    return found, versions


def alike(ours: dict, theirs: dict, new_tokens: int) -> tuple[dict, float]:
    """Leading tokens of each side that are transformers' in f32, the least of all rows; and how far the likeliest
    tokens' log-probabilities are apart in f32, over each row's first new ones. An Error where ours in f32 are others:
    then it is not the same model, or not the same work. Tokens alone would not tell: a model of random weights with a
    tied head mostly repeats the last one, whatever its layers are.

    Elsewhere than on a CPU f32 is faster than exact by default, in both; here it is exact.
    """
    on_cpu, n = jax.default_backend() == "cpu", min(ALIKE, new_tokens)
    given, own = {}, ours["smoljax float32"]
    with contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest"):
        for name, side in ours.items():
            given[name] = side.timed(new_tokens)[2]
        how = Sampling(logprobs=LIKELIEST)
        probe = Engine(own.engine.model, len(own.prompts), sampling=how, compute=Compute(dtype="float32"), eos=())
        rows = dict(probe.run([Request(prompt, n) for prompt in own.prompts]))
    if not on_cpu:
        for side in ours.values():  # compiles what will be timed
            side.timed(new_tokens)
    given |= {name: side.timed(new_tokens, exact=True)[2] for name, side in theirs.items()}
    agree = {name: min(map(leading, rows, given[REFERENCE])) for name, rows in given.items()}
    where = [leading(a, b) for a, b in zip(given["smoljax float32"], given[REFERENCE], strict=True)]
    if min(where) < n:
        raise Error(
            f"row {where.index(min(where)) + 1} of {len(where)}: the first {min(where)} greedy tokens in float32 are "
            f"transformers', expected at least {n}: this is not the same generation, and its speed says nothing"
        )
    mine = np.array([[top for _, _, top in rows[i].logprobs] for i in range(len(rows))])
    apart = float(np.max(np.abs(mine - np.array(theirs[REFERENCE].likeliest(n, LIKELIEST)))))
    if not apart <= CLOSE:
        raise Error(
            f"log-probabilities in float32 differ from transformers' by up to {apart:.3g}, expected at most {CLOSE}: "
            "this is not the same generation, and its speed says nothing"
        )
    return agree, apart


def leading(one: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
