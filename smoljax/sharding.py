"""Where arrays lie: two tables from the alphabet (model.py) to mesh axes, and nothing else.

`jax.jit` with NamedSharding is what used to be called pjit. The mesh always has the axes ("data", "fsdp", "tensor");
axes of size 1 cost nothing, so one program serves a laptop and a pod. XLA places the collectives.
"""

import functools
import logging

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from smoljax import config
from smoljax.errors import require

WEIGHTS = dict(V="tensor", D="fsdp", N="tensor", K="tensor", F="tensor")
ACTIVATIONS = dict(B=("data", "fsdp"), V="tensor", N="tensor", K="tensor", F="tensor")


def mesh(sizes: config.Mesh, devices=None) -> jax.sharding.Mesh:
    """The device mesh; -1 is filled in from the number of devices. Raises UsageError when the sizes do not fit."""
    devices = devices or jax.devices()
    axes = sizes.axes(len(devices))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(dims: str, shape: tuple[int, ...], table: dict, mesh) -> P:
    """The PartitionSpec of an array whose axes bear these letters; a stacked array has one more, L, in front."""
    dims = "L" * (len(shape) - len(dims)) + dims
    axes = []
    for letter, size in zip(dims, shape, strict=True):
        axis = table.get(letter)
        ways = 1
        for name in (axis,) if isinstance(axis, str) else axis or ():
            ways *= mesh.shape[name]
        if size % ways:
            say_once(f"axis {letter} of {dims} has size {size}, which {axis} = {ways} does not divide: it stays whole")
            axis = None
        axes.append(axis)
    return P(*axes)


@functools.cache
def say_once(sentence: str):
    logging.getLogger("smoljax").warning(sentence)


def shardings(tree, mesh):
    """A NamedSharding for each leaf of a model, its gradients, Adam's moments or a whole TrainState.

    Every weight carries its letters (`Param.dims`), and so does everything made from it by tree maps; what carries
    none (step counters) is replicated. Give the result to `jax.jit(init, out_shardings=...)`: without it the moments
    come out replicated.
    """

    def one(leaf):
        if is_variable(leaf):
            return leaf.replace(NamedSharding(mesh, spec(leaf.dims, leaf.shape, WEIGHTS, mesh)))
        return NamedSharding(mesh, P())

    return jax.tree.map(one, tree, is_leaf=is_variable)


def is_variable(leaf) -> bool:
    """A weight with its letters, as a leaf of tree maps."""
    return isinstance(leaf, nnx.Variable)


def check_rows(run: config.Train, axes: dict[str, int]):
    """The rows of every stage's micro-batch split over the axes of B; a UsageError where they do not."""
    ways = axes["data"] * axes["fsdp"]
    for start in run.starts:
        micro = run.at(start).data.batch_size // run.accumulate
        require(
            micro % ways == 0,
            f"a micro-batch of {micro} rows (data.batch_size / accumulate) does not split over {ways} devices "
            "(mesh.data x mesh.fsdp); change one of them" + f", or batch_size of the stage at {start}" * bool(start),
        )


def batch_sharding(mesh) -> NamedSharding:
    return NamedSharding(mesh, P(ACTIVATIONS["B"]))


def constrain(x, dims: str):
    """Pin an activation to its place; does nothing without a mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(dims, x.shape, ACTIVATIONS, mesh))


def on_each_device(f, *dims: str):
    """f as each device computes it, on its own part of the arguments (jax.shard_map); f itself without a mesh.

    dims: letters of each argument; the result lies as the first. Devices exchange nothing, but that the gradients of
    those which compute the same, where an axis stays whole, are added up.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f

    def on_mesh(*args):
        places = tuple(spec(letters, x.shape, ACTIVATIONS, mesh) for letters, x in zip(dims, args, strict=True))
        # check_vma=False: a loop's zeros vary over no axis until something is added, which that check refuses.
        return jax.shard_map(f, in_specs=places, out_specs=places[0], check_vma=False)(*args)

    return on_mesh
