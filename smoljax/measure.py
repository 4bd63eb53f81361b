"""How fast training is here, on random tokens: what `smoljax bench-train` prints and docs/benchmarks keeps.

Needs JAX, flax, optax and numpy alone, from an uninstalled checkout. A figure is of this device and these versions, and
says so itself. Nothing is read from or written to the compilation cache: compile seconds are of a cold one.
"""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smoljax import attention, budget, metrics, sharding
from smoljax.config import Train
from smoljax.step import abstract_state, compiled_init, compiled_step

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def surroundings() -> dict:
    """Device, versions, commit, flags: what a figure must be read with."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else processor()
    return {
        "device": kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "host": f"{os.cpu_count()} cores, {processor()}",
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := version(name))},
        "commit": commit(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    isa = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in isa]
    return f"{named[0] if named else platform.processor()} ({', '.join(known)})" if known else platform.processor()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout that this file lies in, + where it was changed; none outside of one."""

    def git(*words) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return (git("rev-parse", "--short", "HEAD") or "none") + "+" * bool(git("status", "--porcelain", "-uno"))
    except OSError:
        return "none"


def product_peak(dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of the best square product of random numbers on one device: what a device reaches, not its data sheet."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def described(config: Train) -> dict:
    """The settings that a figure depends on."""
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "compute", "optim", "mesh")}
    data = {name: getattr(config.data, name) for name in ("batch_size", "seq_len", "mask_documents")}
    return parts | {"data": data, "accumulate": config.accumulate, "z_loss": config.z_loss}


def random_batch(config: Train, n: int, documents: int | None = None) -> dict:
    """Batch n of ids that nothing can be learned from; documents: tokens of each document, where they are masked."""
    B, T = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(n).integers(0, config.model.vocab_size, (B, T + 1), np.int32)
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:]}
    if config.data.mask_documents:
        batch["segments"] = np.broadcast_to(1 + np.arange(T, dtype=np.int32) // (documents or 1024), (B, T))
    return batch


class Training:
    """A run's step, compiled ahead of time on a mesh over all devices, and its state."""

    def __init__(self, config: Train):
        self.mesh = sharding.mesh(config.mesh)
        self.config = config = budget.fitting(config, dict(self.mesh.shape), budget.device_memory(jax.devices()[0]))
        T, masked = config.data.seq_len, config.data.mask_documents
        self.backend, self.why = attention.choose(config.compute, T, masked)
        places = sharding.shardings(abstract_state(config), self.mesh)
        with jax.set_mesh(self.mesh):
            self.state = compiled_init(config, places)()
            begun = time.perf_counter()
            lowered = compiled_step(config, places).lower(self.state, self.batch(0))
            self.trace_s = time.perf_counter() - begun
            self.compiled = lowered.compile()
            self.compile_s = time.perf_counter() - begun - self.trace_s
        attention.check_compiled(self.compiled, config.compute, config.data)

    def batch(self, n: int) -> dict:
        return jax.device_put(random_batch(self.config, n), sharding.batch_sharding(self.mesh))

    def timed(self, n: int, steps: int) -> tuple[float, float, list[float]]:
        """Wall and CPU seconds a step of updates n ... n + steps - 1, and their losses; the host waits at the end."""
        batches = [self.batch(i) for i in range(n, n + steps)]
        jax.block_until_ready((self.state, batches))
        begun, used, values = time.perf_counter(), time.process_time(), []
        for batch in batches:
            self.state, value = self.compiled(self.state, batch)
            values.append(value["loss"])
        losses = [float(loss) for loss in values]
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begun) / steps, (time.process_time() - used) / steps, losses

    def memory(self) -> int:
        """Bytes of a device by the compiled program: what goes in, what comes out elsewhere, and what is at work."""
        m = self.compiled.memory_analysis()
        out = m.output_size_in_bytes - m.alias_size_in_bytes
        return m.argument_size_in_bytes + m.temp_size_in_bytes + max(out, 0)


def speed(config: Train, windows: int = 5, steps: int | None = None, warmup: int = 2) -> dict:
    """One row of a table: the median of `windows` windows of so many steps (default: about a second each)."""
    run = Training(config)
    once, _, _ = run.timed(0, warmup)
    steps = steps or max(1, min(20, round(1 / once)))
    timed = [run.timed(warmup + i * steps, steps) for i in range(windows)]
    wall, cpu = (statistics.median(t[i] for t in timed) for i in (0, 1))
    c, tokens = run.config, run.config.data.batch_size * run.config.data.seq_len
    peak = metrics.peak_flops(list(run.mesh.devices.flat))
    row = {
        "config": described(c),
        "step_s": wall,
        "cpu_s": cpu,
        "tokens_per_s": tokens / wall,
        "tokens_per_s_device": tokens / wall / run.mesh.size,
    }
    for kind in ("causal", "full"):
        flops = budget.flops_per_token(c.model, c.data.seq_len, kind == "causal") * tokens / wall
        row[f"tflops_{kind}"] = flops / 1e12
        row[f"mfu_{kind}"] = flops / peak if peak else None
    device = metrics.device_peak_gb(jax.devices()[0]).get("device/mem_peak_gb")
    row |= {"compile_s": run.compile_s, "trace_s": run.trace_s, "memory_gb": run.memory() / 1e9, "peak_gb": device}
    row |= {"remat": c.compute.remat, "attention": run.backend, "loss": timed[-1][2][-1]}
    return row
