"""Tables of training speed: `smoljax bench-train --suite`. A part is a list of rows, a label and what to measure each.

Sizes are those of the machine: what a GPU trains in a second takes a CPU ten minutes. Next: measure.py.
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smoljax import budget, measure, settings
from smoljax.attention import attend, attend_cached, choose
from smoljax.config import REMAT, SIZES, Train
from smoljax.errors import Error, UsageError, require
from smoljax.settings import meant


def run(config, asked: str, out: str | None, verb="bench-train", parts=None, columns=None, peaks=None, compared=None):
    """Every row as it is measured to stderr and into the JSON file, the tables to stdout at the end.

    Args:
      config: what the parts take.
      parts, columns: those below, or another verb's (decode_suite.py).
      peaks: the device's own figures, by name and kind; `compared` adds to a row what it is worth beside them.
    """
    every, columns, peaks, compared = parts or PARTS, columns or COLUMNS, peaks or products, compared or beside_products
    parts = chosen(asked, every)
    result = measure.surroundings()
    words = "".join(c if c.isalnum() else " " for c in result["device"].partition("(")[0]).lower().split()
    file = Path(out or f"{verb}-{'-'.join(words)}.json")
    try:
        file.open("a").close()  # before anything is measured; what is there stays until then
    except OSError as e:
        raise UsageError(f"{file} cannot be written ({e.strerror}); name another with --out") from None
    best = peaks()
    result |= best
    for part in parts:
        result[part] = []
        file.write_text(json.dumps(result, indent=1) + "\n")
        for label, row in every[part](config):
            begun = time.perf_counter()
            try:
                found = row()
            except Exception as e:  # a row that does not fit, or fails, is said so and must not cost the others
                found = {"error": f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160] if str(e) else ''}"}
            compared(found, result)
            result[part].append({"what": label} | found)
            took = time.perf_counter() - begun
            print(f"{part:9s} {label:42s} {line(found, columns)}  ({took:.0f} s)", file=sys.stderr)
            file.write_text(json.dumps(result, indent=1) + "\n")
        if not result[part]:
            print(f"{part:9s} has no row for this model", file=sys.stderr)
    print(page(result, parts, best, columns))
    print(f"{file} written", file=sys.stderr)


def chosen(asked: str, every) -> list[str]:
    parts = list(every) if asked == "all" else [part.strip() for part in asked.split(",")]
    for part in parts:
        require(part in every, f"--suite {part}{meant(part, every)}; expected some of {', '.join(every)}, or all")
    return parts


def products() -> dict:
    return {"product_tflops": {dtype: measure.product_peak(dtype) / 1e12 for dtype in ("float32", "bfloat16")}}


def beside_products(found: dict, result: dict):
    """A row's share of the best product."""
    if "tflops_causal" in found:
        peak = result["product_tflops"][found["config"]["compute"]["dtype"]]
        found["of_product_peak"] = found["tflops_causal"] / peak / (1 if on_cpu() else found["devices"])


def measured(config: Train, *changes: str):
    """A row: this config with settings changed."""

    def row() -> dict:
        return {"devices": jax.device_count()} | measure.speed(settings.override(config, changes), windows=3)

    return row


def speed(config: Train):
    """The sizes, at two lengths, as much a device as is usual there."""
    if on_cpu():
        for dtype in ("float32", "bfloat16"):
            for T, B in ((512, 2), (2048, 1)):
                yield (
                    f"135M, {B} x {T}, {dtype}",
                    measured(sized(config, "smollm2-135m", T, B), f"compute.dtype={dtype}"),
                )
        return
    for name, tokens in (("smollm2-135m", 65_536), ("smollm2-360m", 32_768), ("smollm2-1.7b", 16_384)):
        for T in (2048, 8192):
            at = sized(config, name, T, tokens // T)
            yield f"{name}, {tokens // T} x {T}", measured(at, "compute.dtype=bfloat16")
    at = sized(config, "smollm2-135m", 8192, 8)
    masked = ("compute.dtype=bfloat16", "data.mask_documents=true")
    yield "smollm2-135m, 8 x 8192, documents of 1,024", measured(at, *masked)


def ablation(config: Train):
    """One change at a time."""
    yield "as it is", measured(config)
    for name in ("none", *REMAT):
        yield f"remat={name}", measured(config, f"compute.remat={name}")
    for n in sorted({2, 5, config.model.num_hidden_layers}):
        yield f"unroll={n}", measured(config, f"compute.unroll={n}")
    for chunk in (1024, 16_384):
        yield f"loss_chunk={chunk}", measured(config, f"compute.loss_chunk={chunk}")
    yield "attention=blocked", measured(config, "compute.attention=blocked")
    yield "optim.mu_dtype=bfloat16", measured(config, "optim.mu_dtype=bfloat16")
    yield "optim.kind=muon", measured(config, "optim.kind=muon")
    yield "accumulate=2", measured(config, "accumulate=2")


def attention(config: Train):
    """One layer's forward and backward pass by length, once its values and gradients are those of another form."""
    for T in (512, 1024, 2048, 4096, 8192):
        if T <= 4096 or not on_cpu():
            yield f"T={T}", attention_row(config, T, None)
            yield f"T={T}, documents of 256", attention_row(config, T, 256)


def attention_row(config: Train, T: int, document: int | None):
    """Compared with all scores at once where those fit and nothing is masked, else with the blocked form."""

    def row() -> dict:
        c, dtype = config.model, config.compute.dtype
        B = 1 if on_cpu() else max(1, 65_536 // T)
        name, _ = choose(config.compute, T, document is not None)
        random = np.random.default_rng(0)
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads, c.num_attention_heads)
        args = [jnp.asarray(random.normal(size=(B, T, n, c.head_dim)), dtype) for n in heads]
        places = jnp.broadcast_to(jnp.arange(T), (B, T))
        starts = None if document is None else places // document * document
        forms = {n: lambda q, k, v, n=n: attend(q, k, v, starts, n) for n in dict.fromkeys((name, "blocked"))}
        if document is None and B * T**2 <= 2**23:
            forms["all scores"] = lambda q, k, v: all_scores(q, k, v, places)
        found = {n: both_passes(form, args) for n, form in forms.items()}
        reference = list(forms)[-1]
        apart = max(
            float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))))
            for a, b in zip(found[name][0], found[reference][0], strict=True)
        )
        limit = 1e-3 if dtype == "float32" else 0.2  # of gradients of size 10: sums over up to T terms
        if apart > limit:
            raise Error(f"{name} differs from {reference} by {apart:.3g}, expected at most {limit}")
        row = {"attention": name, "ms": found[name][1] * 1e3}
        row |= {f"{n} ms": seconds * 1e3 for n, (_, seconds) in found.items() if n != name}
        return row | ({"difference": apart, "from": reference} if reference != name else {})

    return row


def all_scores(q, k, v, places):  # BTNH BTKH BTKH BT -> BTNH
    """As decoding attends, to a cache of all keys."""
    T, H = k.shape[1::2]
    return attend_cached(q, k.transpose(0, 2, 3, 1).reshape(-1, H, T), v.swapaxes(1, 2).reshape(-1, T, H), places)


def both_passes(form, args):
    """Output and gradients, and the median seconds of five calls."""

    @jax.jit
    def both(q, k, v, dout):
        out, back = jax.vjp(form, q, k, v)
        return out, *back(dout)

    result, times = jax.block_until_ready(both(*args)), []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(both(*args))
        times.append(time.perf_counter() - begun)
    return result, statistics.median(times)


def scaling(config: Train):
    """Against depth, width, length and devices; compile seconds against depth."""
    model, B, T = config.model, config.data.batch_size, config.data.seq_len
    for L in (2, 4, 8, 16, 30):
        yield f"depth {L}", measured(config, f"model.num_hidden_layers={L}")
    for name in SIZES:
        if name.startswith("smollm2"):
            at = dataclasses.replace(config, model=dataclasses.replace(SIZES[name], num_hidden_layers=4))
            yield f"width {at.model.hidden_size}, 4 layers", measured(at)
    shallow = dataclasses.replace(config, model=dataclasses.replace(model, num_hidden_layers=4))
    for length in (T // 2, T, 2 * T, 4 * T):
        rows = max(1, B * T // length)
        yield f"length {rows} x {length}, 4 layers", measured(sized(shallow, None, length, rows))
    if on_cpu():
        for n in (1, 2, 4, 8):
            eight = sized(config, None, T, 8)
            count = f"xla_flags=--xla_force_host_platform_device_count={n}"
            yield f"{n} fake devices, 8 x {T}, 4 layers", apart(eight, "model.num_hidden_layers=4", count)


def apart(config: Train, *changes: str):
    """A row in a process of its own: JAX takes XLA's flags at its start."""

    def row() -> dict:
        program = "smoljax.train.bench" if importlib.util.find_spec("smoljax.train") else "train.bench"
        command = [sys.executable, "-m", program, "--windows", "3", "--json", "--dtype", config.compute.dtype]
        command += ["--batch", str(config.data.batch_size), "--seq", str(config.data.seq_len), *changes]
        own = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # this process holds its memory meanwhile
        done = subprocess.run(command, env=own, capture_output=True, text=True)
        if done.returncode:
            raise Error(f"exit code {done.returncode}: {(done.stderr.strip() or 'nothing was said').splitlines()[-1]}")
        return json.loads(done.stdout.splitlines()[-1])

    return row


# XLA's flags that others found to matter, each tried alone.
FLAGS = {
    "cpu": (
        "--xla_cpu_prefer_vector_width=512",
        "--xla_cpu_use_onednn=true",
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_RUNTIME",
    ),
    "gpu": (
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION",
        "--xla_gpu_cudnn_gemm_fusion_level=2",
        "--xla_gpu_exhaustive_tiling_search=true",
        "--xla_gpu_autotune_level=5",
        "--xla_disable_hlo_passes=rematerialization",
    ),
    "tpu": ("--xla_tpu_scoped_vmem_limit_kib=98304",),
}


def flags(config: Train):
    """XLA's flags, one at a time, beside none."""
    for flag in ("", *FLAGS.get(jax.default_backend(), ())):
        yield flag or "none", apart(config, *([f"xla_flags={flag}"] if flag else []))


def memory(config: Train):
    """Bytes of a device by the compiled step, nothing allocated; beside the formula's."""
    for name, rows in (("smollm2-135m", 8), ("smollm2-360m", 8), ("smollm2-1.7b", 8)):
        for T, B in ((2048, rows), (8192, rows // 4)):
            for remat in REMAT:
                at = settings.override(sized(config, name, T, B), ["compute.dtype=bfloat16", f"compute.remat={remat}"])
                yield f"{name}, {B} x {T}, {remat}", memory_row(at)
    for chunk in (1024, 4096, 16_384):
        at = ["compute.dtype=bfloat16", "compute.remat=minimal_with_context", f"compute.loss_chunk={chunk}"]
        yield (
            f"smollm2-135m, 8 x 2048, loss_chunk={chunk}",
            memory_row(settings.override(sized(config, "smollm2-135m", 2048, 8), at)),
        )


def memory_row(config: Train):
    def row() -> dict:
        mesh = {"data": 1, "fsdp": 1, "tensor": 1}
        state = budget.state_bytes(config, mesh) + budget.gradient_bytes(config, mesh)
        formula = sum(budget.activation_bytes(config, mesh).values())
        compiled, _ = budget.compiled_activation_bytes(config, mesh)
        return {"state_gb": state / 1e9, "formula_gb": (state + formula) / 1e9, "compiled_gb": (state + compiled) / 1e9}

    return row


PARTS = {
    "speed": speed,
    "ablation": ablation,
    "attention": attention,
    "flags": flags,
    "scaling": scaling,
    "memory": memory,
}


def sized(config: Train, name: str | None, T: int, B: int) -> Train:
    model = SIZES[name] if name else config.model
    model = dataclasses.replace(model, max_position_embeddings=max(T, model.max_position_embeddings))
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, seq_len=T, batch_size=B))


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def page(result: dict, parts, best: dict, columns: dict) -> str:
    """One Markdown table a part; a column for each figure that its rows have."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    out = [f"{result['device']}, {result['host']}; {versions}; commit {result['commit']}"]
    for name, each in best.items():
        out.append(f"{name.replace('_', ' ')}, best: {', '.join(f'{v:.3g} in {k}' for k, v in each.items())}")
    for part in parts:
        rows = result[part]
        names = [n for n in columns if any(row.get(n) is not None for row in rows)]
        out += ["", f"| {part} | {' | '.join(columns[n] for n in names)} |", "|---" * (len(names) + 1) + "|"]
        out += [f"| {row['what']} | {' | '.join(cell(row.get(n)) for n in names)} |" for row in rows]
    return "\n".join(out)


COLUMNS = {
    "tokens_per_s_device": "tokens/s a device",
    "step_s": "s a step",
    "cpu_s": "CPU s",
    "mfu_causal": "MFU causal",
    "mfu_full": "full",
    "of_product_peak": "of best product",
    "ms": "ms",
    "blocked ms": "blocked ms",
    "all scores ms": "all scores ms",
    "difference": "difference",
    "from": "from",
    "compile_s": "compile s",
    "memory_gb": "GB compiled",
    "peak_gb": "GB peak",
    "state_gb": "GB state, gradient",
    "formula_gb": "GB by formula",
    "compiled_gb": "GB compiled",
    "remat": "remat",
    "attention": "attention",
    "error": "error",
}


def cell(value) -> str:
    return "" if value is None else shown(value)


def line(found: dict, columns: dict) -> str:
    return "  ".join(f"{columns[n]} {shown(found[n])}" for n in columns if found.get(n) is not None)


def shown(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
