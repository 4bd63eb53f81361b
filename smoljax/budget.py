"""What a run needs, by arithmetic on its config: FLOPs, bytes of a device's memory, bytes on disk.

Nothing is allocated, and JAX is imported only where an array's shape is asked for. The same formulas serve
`smoljax plan`, the meter's MFU and pretrain's out-of-memory message. Next: train/plan.py shows them.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from smoljax.config import Mesh, Model, Train

# Dense bf16 peak, TFLOP/s per device, by the words in jax.Device.device_kind (vendors' data sheets).
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6": 918,
}
# Memory of one device, GB, by the same words (the same data sheets). An A100 has 40 or 80: the smaller is promised.
MEMORY_GB = {
    "H200": 141,
    "H100 PCIe": 80,
    "H100": 80,
    "A100": 40,
    "L40S": 48,
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5e": 16,
    "TPU v5p": 95,
    "TPU v5": 95,
    "TPU v6": 32,
}
STATE_BYTES = 12  # of a parameter: its f32 weight and Adam's two f32 moments, in memory as in a checkpoint
RECORD_BYTES, SOURCE_BYTES = 700, 100  # of a line of metrics.jsonl, and what each source adds to it


def flops_per_token(model: Model, seq_len: int, causal: bool = True) -> float:
    """Forward and backward matrix FLOPs of one token: 6 per weight, and attention to half of T keys on average.

    causal=False counts all T keys, as PaLM, nanotron and nanochat do. The embedding counts once, as the head's product;
    recomputation does not count (model FLOPs, as in PaLM's MFU).
    """
    attention = 6 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * seq_len
    return 6 * model.parameters + attention * (1 if causal else 2)


def parameters_per_device(model: Model, mesh: dict[str, int]) -> int:
    """Of the eleven arrays, what one device holds: split as sharding.py's table says, whole where that does not divide.

    mesh: axis -> size, as from `axes`.
    """
    import jax

    from smoljax import sharding
    from smoljax.model import abstract

    sizes, total = SimpleNamespace(shape=mesh), 0
    for w in jax.tree.leaves(abstract(model), is_leaf=sharding.is_variable):
        split = [axis for axis in sharding.spec(w.dims, w.shape, sharding.WEIGHTS, sizes) if axis]
        piece = w.size
        for axis in split:
            piece //= mesh[axis]
        total += piece
    return total


def state_bytes(model: Model, mesh: dict[str, int]) -> int:
    """f32 weights and Adam's two moments on one device: 12 bytes a parameter it holds. A few counters are left out."""
    return STATE_BYTES * parameters_per_device(model, mesh)


def gradient_bytes(config: Train, mesh: dict[str, int]) -> int:
    """The f32 gradient on one device, split as the weights; of micro-batches there are the sum and the latest."""
    return 4 * parameters_per_device(config.model, mesh) * (1 if config.accumulate == 1 else 2)


def rows_per_device(config: Train, mesh: dict[str, int]) -> int:
    """Rows of a micro-batch on one device; rounded up where they do not divide, which pretrain refuses."""
    return -(-config.data.batch_size // (config.accumulate * mesh["data"] * mesh["fsdp"]))


def activation_bytes(config: Train, mesh: dict[str, int]) -> dict[str, int]:
    """What one device holds beside state and gradients at the worst moment of a step, by what it is: sum the values.

    For each of the b * T tokens of a micro-batch that lie on the device, with a = 4 or 2 bytes (compute.dtype), N, K, F
    and V divided by mesh.tensor where it divides them:

      kept     for the backward pass, of each of L layers: 8D in f32 for each of two norms (its input, and that
               normalised) and aD that its scale made of it; a(2N + 2K)H of q, k, v and attention's output; attention's
               T x T scores, (4 + a)NT: their exponentials in f32, the weights in a; 6aF of the MLP (gate, its sigmoid,
               silu, silu's derivative, up, and the product). With remat aD a layer, the residual stream, no more.
      at work  the larger of the head's and of one layer's backward pass, which follow each other. Head: logits, their
               exponentials and their gradient in f32, 12V. Layer: the scores' gradient in f32 and the weights' in a,
               (4 + a)NT; with remat also what is `kept` without it, of this one layer.
      weights  the layers' copy in a = 2, split as they are (none in f32), and the head's, whole in D. Over fsdp, what
               is gathered to be used: the embedding, in f32 for the lookup, and one layer's weights and gradients.

    It is what JAX's autodiff keeps, array by array (tests/test_plan.py compares). XLA may do better, where it fuses or
    computes again what is cheap, or worse, where it copies: compiled for CPUs, f32 needs 0.8 to 1.1 of it, bf16 1.0 to
    1.1 with jax 0.12 and up to 2 with 0.10, which computes bf16 in f32 and keeps that.
    """
    c, a, T = config.model, 2 if config.compute.dtype == "bfloat16" else 4, config.data.seq_len
    D, H, L = c.hidden_size, c.head_dim, c.num_hidden_layers

    def local(size: int) -> int:
        return size if size % mesh["tensor"] else size // mesh["tensor"]

    N, K, F, V = map(local, (c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.vocab_size))
    tokens = rows_per_device(config, mesh) * T
    scores = tokens * (4 + a) * N * T
    layer = tokens * (2 * (8 + a) * D + 2 * a * (N + K) * H + 6 * a * F) + scores
    remat = config.compute.remat
    weights, ways = a * V * D, 1 if D % mesh["fsdp"] else mesh["fsdp"]
    if a == 2:
        weights += a * (parameters_per_device(c, mesh) - V * D // ways)
    if ways > 1:
        weights += 4 * V * D + 2 * a * (2 * (N + K) * H * D + 3 * D * F)
    return {
        "kept": L * (tokens * a * D if remat else layer),
        "at work": max(12 * tokens * V, scores + remat * layer),
        "weights": weights,
    }


def compiled_activation_bytes(config: Train, mesh: dict[str, int]) -> tuple[int, dict[str, int]]:
    """The same from XLA's CPU compiler, without weights, and the mesh that it compiled for. config: one stage's.

    What the step's temporaries have beyond the gradients. JAX must have CPU devices; where they are fewer than the
    mesh's, a smaller one holds as many rows on each.
    """
    import jax
    import jax.numpy as jnp

    from smoljax import runtime, sharding
    from smoljax.step import compiled_step, init_state

    runtime.start()
    devices = jax.devices("cpu")
    small = smaller(mesh, len(devices))
    rows = rows_per_device(config, mesh) * small["data"] * small["fsdp"] * config.accumulate
    config = replace(config, mesh=Mesh(**small), data=replace(config.data, batch_size=rows))
    made = sharding.mesh(config.mesh, devices[: math.prod(small.values())])
    state = jax.eval_shape(partial(init_state, config))
    places = sharding.shardings(state, made)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
    row = jax.ShapeDtypeStruct((rows, config.data.seq_len), jnp.int32, sharding=sharding.batch_sharding(made))
    names = ("tokens", "labels", "segments") if config.data.mask_documents else ("tokens", "labels")
    with jax.set_mesh(made):
        compiled = compiled_step(config, places).lower(state, dict.fromkeys(names, row)).compile()
    return max(compiled.memory_analysis().temp_size_in_bytes - gradient_bytes(config, small), 0), small


def smaller(mesh: dict[str, int], limit: int) -> dict[str, int]:
    """A mesh of at most `limit` devices: fewer copies, then less fsdp; heads stay split as long as that is possible."""
    mesh = dict(mesh)
    for axis in ("data", "fsdp", "tensor"):
        while math.prod(mesh.values()) > limit and mesh[axis] > 1:
            mesh[axis] //= next(d for d in range(2, mesh[axis] + 1) if mesh[axis] % d == 0)
    return mesh


def stages(config: Train) -> list[tuple[int, int, Train]]:
    """(first update, the one after its last, the run as it is in between) of each stage."""
    return [(a, b, config.at(a)) for a, b in zip(config.starts, [*config.starts[1:], config.steps], strict=True)]


def largest(config: Train, mesh: dict[str, int]) -> tuple[int, Train]:
    """The stage, by its first update, whose activations need most."""
    sizes = {start: sum(activation_bytes(at, mesh).values()) for start, _, at in stages(config)}
    start = max(sizes, key=sizes.get)
    return start, config.at(start)


def memory_sentence(config: Train, devices: int) -> str:
    """What a run needs of each device, for the message when there is not enough."""
    mesh = config.mesh.axes(devices)
    _, at = largest(config, mesh)
    parts = [state_bytes(at.model, mesh), gradient_bytes(at, mesh), sum(activation_bytes(at, mesh).values())]
    total, state, gradients, activations = (f"{size / 1e9:.2f} GB" for size in (sum(parts), *parts))
    return (
        f"by formula a device needs {total}: {state} of weights and moments, {gradients} of gradients, "
        f"{activations} of activations for {rows_per_device(at, mesh)} x {at.data.seq_len:,} tokens at a time; "
        "`smoljax plan` shows what a setting would change"
    )


def checkpoint_bytes(model: Model) -> int:
    """Of one checkpoint before compression: 12 bytes a parameter. A few counters are left out."""
    return STATE_BYTES * model.parameters


def disk_bytes(config: Train) -> int:
    """The most that a run's folder holds: `keep` checkpoints, one being written, each keep_every-th; metrics.jsonl.

    Where something went wrong it holds more: checkpoints that were damaged, and up to three that dumps keep.
    """
    saved = [*range(config.save_every, config.steps, config.save_every), config.steps]
    last, older = saved[-config.keep - 1 :], saved[: -config.keep - 1]
    forever = sum(n % config.keep_every == 0 for n in older) if config.keep_every else 0
    sources = {name for _, _, at in stages(config) for name in at.data.sources}
    line = RECORD_BYTES + SOURCE_BYTES * len(sources)
    return (len(last) + forever) * checkpoint_bytes(config.model) + config.steps // config.log_every * line
