"""Silent corruption: a device that computes something else the second time, or replicas that are no longer the same.

Of the silent corruptions seen on GPUs 1% show as NaN or infinity (arXiv 2605.04213); the rest is found by doing a thing
twice. Both checks cost about one step, at every `guard.check_every`-th.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from smoljax.config import Train
from smoljax.errors import Error, require
from smoljax.step import TrainState, gradient

# The embedding's gradient is a scatter-add: without one of these XLA makes it of atomics on GPUs.
FIXED_ORDER = ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_deterministic_ops=true")


class Check:
    """Call it with a state and a batch: an Error where a value does not repeat, or copies of a weight differ."""

    def __init__(self, config: Train, mesh):
        flags = os.environ.get("XLA_FLAGS", "")
        require(
            mesh.devices.flat[0].platform != "gpu" or any(flag in flags for flag in FIXED_ORDER),
            "guard.check_every compares bits, and a GPU adds up in no fixed order unless XLA_FLAGS has "
            f"{FIXED_ORDER[0]}; set that, or guard.check_every=none",
        )
        whole = NamedSharding(mesh, P())
        self.mesh = mesh
        self.value = jax.jit(partial(fingerprint, config=config), out_shardings=whole)
        self.sums = None

    def __call__(self, n: int, state: TrainState, batch: dict):
        first, second = (np.asarray(self.value(state.model, batch)) for _ in range(2))
        if (first.view(np.uint32) != second.view(np.uint32)).any():
            raise Error(
                f"step {n} has a loss and gradient of {first.tolist()}, and computed again of {second.tolist()}: "
                "a device computes wrongly; find it before the run goes on (it resumes from its last checkpoint)"
            )
        leaves, _ = jax.tree.flatten_with_path((state.model, state.opt_state))
        if self.sums is None:
            specs = tuple(leaf.sharding.spec for _, leaf in leaves)
            bits = jax.shard_map(
                piece_sums, mesh=self.mesh, in_specs=specs, out_specs=P(None, self.mesh.axis_names), check_vma=False
            )
            self.sums = jax.jit(bits, out_shardings=NamedSharding(self.mesh, P()))
        sums = np.asarray(self.sums(*(leaf for _, leaf in leaves)))  # [leaves, devices]
        for (path, leaf), row in zip(leaves, sums, strict=True):
            odd = differing(leaf, dict(zip(self.mesh.devices.flat, row.tolist(), strict=True)))
            if odd:
                raise Error(
                    f"before step {n} {jax.tree_util.keystr(path)} differs between its copies on {odd[0]} and "
                    f"{odd[1]}: one of them is corrupted; the run resumes from its last checkpoint"
                )


def fingerprint(model, batch, config: Train):
    """Loss, gradient norm and the sum of the gradient, f32[3]."""
    loss, grads, _ = gradient(model, batch, config)
    leaves = jax.tree.leaves(grads)
    return jnp.stack([loss, jnp.sqrt(sum(jnp.vdot(g, g) for g in leaves)), sum(jnp.sum(g) for g in leaves)])


def piece_sums(*pieces):  # -> uint32 [leaves, 1]: the bits of each device's own piece, summed modulo 2^32
    def one(x):
        x = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
        return jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([one(piece) for piece in pieces])[:, None]


def differing(leaf, sums: dict):
    """Two devices that hold the same piece of an array, and not the same bits; None where there are none."""
    seen: dict = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        key = tuple((part.start, part.stop) for part in index)
        other = seen.setdefault(key, device)
        if sums[other] != sums[device]:
            return other, device
    return None
