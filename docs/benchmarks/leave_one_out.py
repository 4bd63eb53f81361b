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

from smoljax import loss, measure, model, step, suite
from smoljax.config import SIZES, Compute, Data, Optim, Train


def all_scores(q, k, v, starts, backend):  # every score at once, kept for the backward pass
    return suite.all_scores(q, k, v, jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]))


def all_logits(x, embed, labels, count, chunk, z_loss):
    logits = jnp.einsum("BTD,VD->BTV", x, embed.astype(x.dtype), preferred_element_type=jnp.float32)
    target = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0), axis=-1)
    value = jnp.sum(jnp.where(labels == loss.IGNORE, 0, jax.nn.logsumexp(logits, axis=-1) - target)) / count
    return value, value


def einsum(form, x, weight):
    return jnp.einsum(form, x, weight[...])


def fused(self, x, angles, attention):  # a layer with q, k, v as one product, gate and up too
    B, T, D = x.shape
    parts = [w[...].reshape(D, -1) for w in (self.q, self.k, self.v)]
    y = model.product("BTD,DF->BTF", model.rms_norm(x, self.attn_norm, self.eps), jnp.concatenate(parts, axis=1))
    ends = [parts[0].shape[1], parts[0].shape[1] + parts[1].shape[1]]
    q, k, v = (a.reshape(B, T, -1, self.q.shape[-1]) for a in jnp.split(y, ends, axis=-1))
    q, k = model.rope.rotate(q, angles), model.rope.rotate(k, angles)
    y, kept = attention(*(model.checkpoint_name(a, "qkv") for a in (q, k, v)))
    x = x + model.checkpoint_name(model.product("BTNH,NHD->BTD", y, self.o), "attn_out")
    both = jnp.concatenate([self.gate[...], self.up[...]], axis=1)
    y = model.product("BTD,DF->BTF", model.rms_norm(x, self.mlp_norm, self.eps), both)
    gate, up = jnp.split(model.checkpoint_name(y, "gate_up"), 2, axis=-1)
    return x + model.product("BTF,FD->BTD", model.silu(gate) * up, self.down), kept


VARIANTS = {
    "as it is": (),
    "q, k, v fused, and gate, up": ("fused",),
    "layers unrolled": ("unroll",),
    "attention with all scores": ("attend",),
    "cross-entropy with all logits": ("cross_entropy",),
    "products as einsum": ("product",),
    "remat none": ("remat",),
    "all four": ("attend", "cross_entropy", "product", "remat"),
}


@contextmanager
def exchanged(parts):
    others = {"attend": (model, "attend", all_scores), "product": (model, "product", einsum)}
    others |= {"cross_entropy": (step, "cross_entropy", all_logits), "fused": (model.Block, "__call__", fused)}
    changed = [others[part] for part in parts if part in others]
    before = [getattr(where, name) for where, name, _ in changed]
    for where, name, other in changed:
        setattr(where, name, other)
    yield
    for (where, name, _), own in zip(changed, before, strict=True):
        setattr(where, name, own)


def main(dtype="float32", name="smollm2-135m", rows="2", length="512"):
    runs = {}
    for label, parts in VARIANTS.items():
        unroll = SIZES[name].num_hidden_layers if "unroll" in parts else 1
        compute = Compute(dtype=dtype, remat="none" if "remat" in parts else "minimal_with_context", unroll=unroll)
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
