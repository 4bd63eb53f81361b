"""What a run needs, by arithmetic on its config: FLOPs, bytes of a device's memory, bytes on disk.

Nothing is allocated, and JAX is imported only where an array's shape is asked for. The same formulas serve
`smoljax plan`, the meter's MFU and pretrain's out-of-memory message. Next: train/plan.py shows them.
"""

import math
import os
from dataclasses import replace
from types import SimpleNamespace

from smoljax.config import REMAT, Mesh, Model, Train

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
RECORD_BYTES, SOURCE_BYTES = 700, 100  # of a line of metrics.jsonl, and what each source adds to it


def flops_per_token(model: Model, seq_len: int, causal: bool = True) -> float:
    """Forward and backward matrix FLOPs of one token: 6 per weight, and attention to half of T keys on average.

    causal=False counts all T keys, as PaLM, nanotron and nanochat do. The embedding counts once, as the head's product;
    recomputation does not count (model FLOPs, as in PaLM's MFU).
    """
    attention = 6 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * seq_len
    return 6 * model.parameters + attention * (1 if causal else 2)


def parameters_per_device(model: Model, mesh: dict[str, int], counts=lambda w: True) -> int:
    """Of the eleven arrays, what one device holds: split as sharding.py's table says, whole where that does not divide.

    Args:
      mesh: axis -> size, as from `axes`.
      counts: which arrays; all of them by default.
    """
    import jax

    from smoljax import sharding
    from smoljax.model import abstract

    sizes, total = SimpleNamespace(shape=mesh), 0
    for w in filter(counts, jax.tree.leaves(abstract(model), is_leaf=sharding.is_variable)):
        split = [axis for axis in sharding.spec(w.dims, w.shape, sharding.WEIGHTS, sizes) if axis]
        piece = w.size
        for axis in split:
            piece //= mesh[axis]
        total += piece
    return total


def state_bytes(config: Train, mesh: dict[str, int]) -> int:
    """f32 weights and moments on one device. A few counters are left out.

    12 bytes a parameter with AdamW, 10 with its first moment in bfloat16; Muon has no second one for the layers'
    matrices, 4 bytes less.
    """
    from smoljax.optim import is_hidden

    size = parameters_per_device(config.model, mesh) * (10 if config.optim.mu_dtype == "bfloat16" else 12)
    if config.optim.kind == "muon":
        size -= 4 * parameters_per_device(config.model, mesh, is_hidden)
    return size


def gradient_bytes(config: Train, mesh: dict[str, int]) -> int:
    """The f32 gradient on one device, split as the weights; of micro-batches there are the sum and the latest."""
    return 4 * parameters_per_device(config.model, mesh) * (1 if config.accumulate == 1 else 2)


def rows_per_device(config: Train, mesh: dict[str, int]) -> int:
    """Rows of a micro-batch on one device; rounded up where they do not divide, which pretrain refuses."""
    return -(-config.data.batch_size // (config.accumulate * mesh["data"] * mesh["fsdp"]))


def activation_bytes(config: Train, mesh: dict[str, int]) -> dict[str, int]:
    """What one device holds beside state and gradients at the worst moment of a step, by what it is: sum the values.

    For each of the b * T tokens of a micro-batch that lie on the device, with a = 4 or 2 bytes (compute.dtype), N, K, F
    and V divided by mesh.tensor where it divides them. All of it is linear in T.

      kept     for the backward pass, of each of L layers: the residual stream aD, and by compute.remat's names "qkv"
               a(N + 2K)H, "context" aNH and 4N of its log-sum-exp, "attn_out" aD, "gate_up" 2aF. "none" and "auto":
               what autodiff keeps. Of two norms 8D in f32 (the input, and that normalised) and aD that the scale made
               of it; a(3N + 2K)H + 4N of attention (q, k, v, its output once for itself and once for the product
               after it); (12 + 3a)F of the MLP (gate, its sigmoid and silu in f32; silu, up and the product).
      at work  what the loss leaves for the backward pass, the embedding's gradient in f32, 4VD, and aD, with the larger
               of two that follow each other. Head: logits and their exponentials in f32 and their gradient, (8 + a)V a
               token of one chunk (compute.loss_chunk). One layer's backward: its MLP, (12 + 3a)F again, be it computed
               again or the gradients and what is read of the stack; of its norms and attention what remat computes
               again; three f32 tiles of scores for each row and head.
      weights  the layers' copy in a = 2, split as they are (none in f32), and the head's, whole in D. Over fsdp, what
               is gathered to be used: the embedding, in f32 for the lookup, and one layer's weights and gradients.

    What is kept is what JAX's autodiff keeps, array by array (tests/test_plan.py compares); the rest is fitted to XLA's
    CPU compiler, whose f32 programs need 0.81 to 1.03 of the sum. bf16 it computes in f32 and may keep that.
    """
    c, a, T = config.model, 2 if config.compute.dtype == "bfloat16" else 4, config.data.seq_len
    D, H, L = c.hidden_size, c.head_dim, c.num_hidden_layers

    def local(size: int) -> int:
        return size if size % mesh["tensor"] else size // mesh["tensor"]

    N, K, F, V = map(local, (c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.vocab_size))
    rows = rows_per_device(config, mesh)
    tokens = rows * T
    pieces = min(-(-tokens // config.compute.loss_chunk), T)  # loss.in_chunks
    norms, attention, mlp = 2 * (8 + a) * D, a * (3 * N + 2 * K) * H + 4 * N, (12 + 3 * a) * F
    named = {"qkv": a * (N + 2 * K) * H, "context": a * N * H + 4 * N, "attn_out": a * D, "gate_up": 2 * a * F}
    if config.compute.remat in REMAT:
        names = REMAT[config.compute.remat]
        kept = a * D + sum(named[name] for name in names)
        again = norms + attention - sum(named[name] for name in ("qkv", "context") if name in names)
    else:
        kept, again = norms + attention + mlp, 0
    tile = min(T, 128)  # blocked_attention.TILE
    head = (8 + a) * V * rows * -(-T // pieces)
    layer = tokens * (mlp + again) + 3 * 4 * rows * N * tile**2
    weights, ways = a * V * D, 1 if D % mesh["fsdp"] else mesh["fsdp"]
    if a == 2:
        weights += a * (parameters_per_device(c, mesh) - V * D // ways)
    if ways > 1:
        weights += 4 * V * D + 2 * a * (2 * (N + K) * H * D + 3 * D * F)
    return {"kept": L * tokens * kept, "at work": 4 * V * D + tokens * a * D + max(head, layer), "weights": weights}


def device_bytes(config: Train, mesh: dict[str, int]) -> int:
    """All that one device holds at the worst moment of the run's largest stage, by formula."""
    _, at = largest(config, mesh)
    return state_bytes(at, mesh) + gradient_bytes(at, mesh) + sum(activation_bytes(at, mesh).values())


def fitting(config: Train, mesh: dict[str, int], memory: int) -> Train:
    """compute.remat="auto" is made the first of REMAT with which every stage needs at most 90% of a device's memory.

    The rest is for what the formula does not know: fragments, collectives, a compiler's copies. Where none fits it is
    "full". Whatever else a config says is left alone, "none" too.
    """
    if config.compute.remat != "auto":
        return config
    for name in REMAT:
        found = replace(config, compute=replace(config.compute, remat=name))
        if device_bytes(found, mesh) <= 0.9 * memory:
            break
    return found


def remat_words(config: Train, mesh: dict[str, int], memory: int) -> str:
    """What `fitting` chose, for a program's first lines."""
    return f"{config.compute.remat} of {memory / 1e9:.1f} GB: {device_bytes(config, mesh) / 1e9:.1f} GB by formula"


def cache_bytes(model: Model, places: int, dtype: str) -> int:
    """Of one row's keys and values in decoding; int8 has a 4-byte scale a place and head."""
    width = {"float32": 4 * model.head_dim, "bfloat16": 2 * model.head_dim, "int8": model.head_dim + 4}[dtype]
    return 2 * model.num_hidden_layers * model.num_key_value_heads * places * width


def device_memory(device) -> int:
    """Bytes that JAX may use of a device: of a GPU what XLA_PYTHON_CLIENT_MEM_FRACTION says (runtime.set_flags).

    A CPU's are its share of the machine's: all of it, not what is free now, so that a run is always the same program.
    """
    import jax

    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // len(jax.local_devices(backend=device.platform))


def compiled_activation_bytes(config: Train, mesh: dict[str, int]) -> tuple[int, dict[str, int]]:
    """The same from XLA's CPU compiler, without weights, and the mesh that it compiled for. config: one stage's.

    What the step's temporaries have beyond the gradients. JAX must have CPU devices; where they are fewer than the
    mesh's, a smaller one holds as many rows on each.
    """
    import jax
    import jax.numpy as jnp

    from smoljax import runtime, sharding
    from smoljax.step import abstract_state, compiled_step

    runtime.start()
    devices = jax.devices("cpu")
    small = smaller(mesh, len(devices))
    rows = rows_per_device(config, mesh) * small["data"] * small["fsdp"] * config.accumulate
    config = replace(config, mesh=Mesh(**small), data=replace(config.data, batch_size=rows))
    made = sharding.mesh(config.mesh, devices[: math.prod(small.values())])
    state = abstract_state(config)
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
    parts = [state_bytes(at, mesh), gradient_bytes(at, mesh), sum(activation_bytes(at, mesh).values())]
    total, state, gradients, activations = (f"{size / 1e9:.2f} GB" for size in (sum(parts), *parts))
    return (
        f"by formula a device needs {total}: {state} of weights and moments, {gradients} of gradients, "
        f"{activations} of activations for {rows_per_device(at, mesh)} x {at.data.seq_len:,} tokens at a time; "
        "`smoljax plan` shows what a setting would change"
    )


def inference_bytes(model: Model) -> dict[str, int | dict[str, int]]:
    """Of the weights alone, in bfloat16 and in int8: the layers' matrices in whole numbers, an f32 scale an output."""
    c, L, D = model, model.num_hidden_layers, model.hidden_size
    heads = c.num_attention_heads + 2 * c.num_key_value_heads  # of q, k and v
    outputs = L * (heads * c.head_dim + D + 2 * c.intermediate_size + D)
    plain = D * (c.vocab_size + 2 * L + 1)  # embedding and norms stay bfloat16
    weights, scales = c.parameters + plain, 4 * outputs
    int8 = {"weights": weights, "scales": scales, "total": weights + scales}
    return {"bfloat16": 2 * c.parameters, "int8": int8}


def checkpoint_bytes(config: Train) -> int:
    """Of one checkpoint before compression: weights and moments, as in memory. A few counters are left out."""
    return state_bytes(config, Mesh().axes(1))


def disk_bytes(config: Train) -> int:
    """The most that a run's folder holds: `keep` checkpoints, one being written, each keep_every-th; metrics.jsonl.

    Where something went wrong it holds more: checkpoints that were damaged, and up to three that dumps keep.
    """
    saved = [*range(config.save_every, config.steps, config.save_every), config.steps]
    last, older = saved[-config.keep - 1 :], saved[: -config.keep - 1]
    forever = sum(n % config.keep_every == 0 for n in older) if config.keep_every else 0
    sources = {name for _, _, at in stages(config) for name in at.data.sources}
    line = RECORD_BYTES + SOURCE_BYTES * len(sources)
    return (len(last) + forever) * checkpoint_bytes(config) + config.steps // config.log_every * line
