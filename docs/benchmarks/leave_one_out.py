"""What each part of the training step is worth: the step as it is, and with one part as autodiff and einsum have it.

    python docs/benchmarks/leave_one_out.py [float32 | bfloat16] [MODEL ROWS LENGTH]

The parts are exchanged in memory, in this process alone; all variants are compiled, then timed in turn. The table of
README.md beside this file was made by it.
"""

import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from smoljax import loss, measure, model, step
from smoljax.config import SIZES, Compute, Data, Optim, Train


def all_scores(q, k, v, starts, backend):  # every score at once, kept for the backward pass
    T = q.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
    return model.attend_cached(q, k, v, positions)


def all_logits(x, embed, labels, count, chunk, z_loss):
    logits = jnp.einsum("BTD,VD->BTV", x, embed.astype(x.dtype), preferred_element_type=jnp.float32)
    target = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0), axis=-1)
    value = jnp.sum(jnp.where(labels == loss.IGNORE, 0, jax.nn.logsumexp(logits, axis=-1) - target)) / count
    return value, value


def einsum(form, x, weight):
    return jnp.einsum(form, x, weight[...])


VARIANTS = {
    "as it is": (),
    "attention with all scores": ("attend",),
    "cross-entropy with all logits": ("cross_entropy",),
    "products as einsum": ("product",),
    "remat none": ("remat",),
    "all four": ("attend", "cross_entropy", "product", "remat"),
}


@contextmanager
def exchanged(parts):
    others = {"attend": (model, all_scores), "product": (model, einsum), "cross_entropy": (step, all_logits)}
    before = {name: getattr(where, name) for name, (where, _) in others.items()}
    for name in set(parts) & set(others):
        setattr(others[name][0], name, others[name][1])
    yield
    for name, (where, _) in others.items():
        setattr(where, name, before[name])


def main(dtype="float32", name="smollm2-135m", rows="2", length="512"):
    runs = {}
    for label, parts in VARIANTS.items():
        compute = Compute(dtype=dtype, remat="none" if "remat" in parts else "minimal_with_context")
        data = Data(seq_len=int(length), batch_size=int(rows))
        config = Train(SIZES[name], steps=100, data=data, optim=Optim(warmup_steps=1), compute=compute)
        with exchanged(parts):
            runs[label] = measure.Training(config)
        runs[label].timed(0, 1)
    taken = {label: [] for label in runs}
    for window in range(5):
        for label, run in runs.items():
            taken[label].append(run.timed(1 + window, 1))
    around = measure.surroundings()
    print(f"{name}, {rows} x {length}, {dtype}; {around['device']}, {around['versions']}, commit {around['commit']}")
    print("| | wall s | CPU s | GB compiled | loss |\n|---|---|---|---|---|")
    for label, windows in taken.items():
        wall, cpu = (statistics.median(w[i] for w in windows) for i in (0, 1))
        print(f"| {label} | {wall:.2f} | {cpu:.2f} | {runs[label].memory() / 1e9:.2f} | {windows[-1][2][0]:.5f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
