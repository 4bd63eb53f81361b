"""The same training in smoljax and in transformers, in turn: A B A B, same weights, batches, schedule and precision.

The peer is a process of its own (train/bench_peer.py), so that neither side's threads or memory are in the other's
figures, and it waits on a pipe while smoljax computes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from smoljax import budget, measure
from smoljax.config import Train
from smoljax.errors import Error
from smoljax.optim import wsd

WARMUP = 2  # updates before the first window: they compile


def duel(config: Train, peer: Path, windows: int, steps: int) -> dict:
    """Speeds of smoljax, of transformers as it is and under torch.compile, and how far their losses are apart.

    In each turn of each side one step is not timed, `steps` are.

    `speedup` and `speedup_cpu_seconds` are medians of the ratios of windows beside each other, against the better of
    the two by wall time, and by CPU seconds. A peer that fails under torch.compile is said on stderr and left out.
    """
    ours = measure.Training(config)
    last = WARMUP + windows * (1 + steps)
    with tempfile.TemporaryDirectory() as place:
        np.savez(file := Path(place) / "weights.npz", **arrays(ours.state.model))
        setup = {"weights": str(file), "lr": jax.vmap(wsd(config.optim, config.steps))(np.arange(last)).tolist()}
        setup |= {"platform": jax.default_backend(), "threads": len(os.sched_getaffinity(0))}
        setup |= {"model": dataclasses.asdict(config.model), "optim": dataclasses.asdict(config.optim)}
        setup |= {"batch": config.data.batch_size, "seq": config.data.seq_len, "dtype": config.compute.dtype}
        peers = {kind: Peer(peer, setup | {"kind": kind}) for kind in ("eager", "compile")}
        versions = peers["eager"].versions
        warm = {"smoljax": ours.timed(0, WARMUP), "eager": peers["eager"].timed(0, WARMUP)}
        try:
            warm["compile"] = peers["compile"].timed(0, WARMUP)
        except Error as e:
            print(f"smoljax: torch.compile is left out: {e}", file=sys.stderr)
            del peers["compile"]
        sides = {"smoljax": ours, **peers}
        taken = {name: [warm[name]] for name in sides}
        for n in range(WARMUP, last, 1 + steps):
            for name, side in sides.items():
                again = side.timed(n, 1)  # until then caches are the other's, and free memory may be gone to the host
                window = side.timed(n + 1, steps)
                taken[name].append((*window[:2], again[2] + window[2]))
        for side in peers.values():
            side.end()

    found = {name: figures(config, parts[1:]) for name, parts in taken.items()}
    found["smoljax"] |= {"compile_s": ours.compile_s, "memory_gb": ours.memory() / 1e9}
    found["smoljax"] |= {"attention": ours.backend, "remat": ours.config.compute.remat}
    for kind, side in peers.items():
        found[kind] |= {"warmup_s": warm[kind][0] * WARMUP} | ({"peak_gb": side.peak_gb} if side.peak_gb else {})
    wall, cpu = (min(peers, key=lambda kind: found[kind][k]) for k in ("step_s", "cpu_s"))

    def ratio(kind: str, i: int) -> float:
        return statistics.median(a[i] / b[i] for a, b in zip(taken[kind][1:], taken["smoljax"][1:], strict=True))

    losses = {name: [loss for part in parts for loss in part[2]] for name, parts in taken.items()}
    apart = max(abs(a - b) for kind in peers for a, b in zip(losses["smoljax"], losses[kind], strict=True))
    result = {"speedup": ratio(wall, 0), "speedup_cpu_seconds": ratio(cpu, 1), "against": f"transformers, {wall}"}
    return result | {"peer_versions": versions, "loss_difference": apart, **found, "losses": losses}


def figures(config: Train, windows: list) -> dict:
    wall, cpu = (statistics.median(window[i] for window in windows) for i in (0, 1))
    tokens = config.data.batch_size * config.data.seq_len
    flops = budget.flops_per_token(config.model, config.data.seq_len) * tokens
    return {"step_s": wall, "cpu_s": cpu, "tokens_per_s": tokens / wall, "tflops_causal": flops / wall / 1e12}


def arrays(model) -> dict:
    """The eleven arrays by their names, the layers' stacked."""
    whole = {name: getattr(model, name) for name in ("embed", "norm")}
    names = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
    return {name: np.asarray(w[...]) for name, w in (whole | {n: getattr(model.layers, n) for n in names}).items()}


class Peer:
    """A program at work beside ours, until `end`: a JSON line in, a JSON line out. By default one of transformers."""

    def __init__(self, program: Path, setup: dict):
        self.peak_gb = None
        needs = "it needs torch and transformers: pip install torch transformers"
        self.start(f"transformers ({setup['kind']})", needs, sys.executable, str(program))
        self.versions = self.ask(setup)["versions"]

    def start(self, name: str, needs: str, *command: str):
        self.name, self.needs = name, needs
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: dict) -> dict:
        line = ""
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self.process.wait()
            raise Error(f"{self.name} ended with exit code {code}, what it said is above; {self.needs}")
        return json.loads(line)

    def timed(self, n: int, steps: int) -> tuple[float, float, list[float]]:
        """As measure.Training.timed."""
        found = self.ask({"first": n, "steps": steps})
        self.peak_gb = found.get("peak_gb")
        return found["wall"], found["cpu"], found["losses"]

    def end(self):
        self.process.stdin.close()
        self.process.wait()
