"""The only file that knows Orbax: asynchronous, atomic checkpoints of a TrainState, and of a model alone.

    RUN/config.json           the resolved config
    RUN/tokenizer.json        the shards' tokenizer
    RUN/checkpoints/STEP/     model/ and opt/, restorable alone, on any mesh; metadata: config, hashes, versions

A step is written into a temporary folder and renamed when complete, so a killed save is never seen. Arrays are stored
by name ("layers.q", "opt.1.0.mu.layers.q"), so the files know no class of ours, of Flax or of Optax.
"""

import contextlib
import dataclasses
import logging
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from smoljax import atomic, companions, exchange, settings
from smoljax.config import Model
from smoljax.errors import CheckpointError
from smoljax.model import SmolLM, abstract
from smoljax.sharding import is_variable
from smoljax.step import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each stage of each save


class Checkpoints:
    """The checkpoints of a run, for the one process group that trains it. Close it: a save may be in flight."""

    def __init__(self, run: Path, keep: int = 1, keep_every: int | None = None):
        policies = ocp.training.preservation_policies
        preserve = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.folder = Path(run).resolve() / "checkpoints"
        self.orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )
        self.pending = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        finally:
            self.orbax.close()

    @property
    def latest(self) -> int | None:
        return self.orbax.latest.step if self.orbax.latest else None

    def metadata(self, step: int) -> dict:
        return describe(self.orbax, step).custom_metadata

    def save(self, step: int, metadata: dict, **trees):
        """Copy the trees to the host and write them in the background; a failed earlier save is raised here."""
        self.wait()
        versions = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
        self.pending = self.orbax.save_checkpointables_async(
            step,
            {name: by_name(tree) for name, tree in trees.items()},
            force=True,
            custom_metadata=metadata | {"versions": versions},
        )

    def check(self):
        """Raise what went wrong in a background save as soon as it is known."""
        if self.pending is not None and not self.orbax.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Until the save in flight is on disk."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as e:
            raise CheckpointError(f"a checkpoint could not be written into {self.folder}: {e}") from e

    def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
        """The state after `step` updates, placed as `shardings` say, whatever mesh wrote it."""
        trees = {"model": abstract.model, "opt": abstract.opt_state}
        places = {"model": shardings.model, "opt": shardings.opt_state}
        trees = read(self.orbax, step, jax.tree.map(place, trees, places))
        count = jax.device_put(jnp.asarray(step, jnp.int32), shardings.step)
        return TrainState(count, trees["model"], trees["opt"])


def describe(orbax, step: int):
    """A step's metadata: custom_metadata is what `save` was given, metadata[name] the shapes and dtypes of a tree."""
    try:
        found = orbax.checkpointables_metadata(step)
    except Exception as e:
        raise unreadable(orbax.directory / str(step), e) from e
    if not found.custom_metadata or not (found.metadata or {}).get("model"):
        raise CheckpointError(f"checkpoint {orbax.directory / str(step)} is damaged or was not written by smoljax")
    return found


def place(abstract, sharding, dtype=None):
    return jax.ShapeDtypeStruct(abstract.shape, dtype or abstract.dtype, sharding=sharding)


def by_name(tree) -> dict:
    """{"layers.q": array, ...}: leaves by their path, Flax's variables unwrapped."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=is_variable)
    return {path_name(path): jax.tree.leaves(leaf)[0] for path, leaf in leaves}


def from_names(tree, arrays: dict):
    """The inverse: `tree` with its leaves replaced."""

    def one(path, leaf):
        array = arrays[path_name(path)]
        return leaf.replace(array) if is_variable(leaf) else array

    return jax.tree.map_with_path(one, tree, is_leaf=is_variable)


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def read(orbax, step: int, trees: dict) -> dict:
    """Trees of ShapeDtypeStructs with shardings -> the same trees of arrays."""
    try:
        arrays = orbax.load_checkpointables(step, {name: by_name(tree) for name, tree in trees.items()})
        return {name: from_names(tree, arrays[name]) for name, tree in trees.items()}
    except Exception as e:
        raise unreadable(orbax.directory / str(step), e) from e


def unreadable(path: Path, e: Exception) -> CheckpointError:
    """Orbax's own text names a handler; the first cause behind it says what is wrong."""
    why = root_cause(e)
    return CheckpointError(f"checkpoint {path} cannot be read: {why}; remove its folder to use the one before")


def root_cause(e: BaseException) -> str:
    while e.__cause__ or e.__context__:
        e = e.__cause__ or e.__context__
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def locate(path: Path) -> tuple[Path, int | None] | None:
    """(run, None) for a run's folder, (run, step) for one of its checkpoints, None for anything else."""
    path = Path(path).resolve()
    path = path.parent if path.name == "checkpoints" else path
    if (path / "checkpoints").is_dir():
        return path, None
    if path.parent.name == "checkpoints" and path.parent.is_dir() and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return None


def steps(run: Path) -> list[int]:
    """The complete checkpoints in a run's folder, oldest first."""
    done = Path(run).glob("checkpoints/*/commit_success.txt")  # Orbax's mark, written last
    return sorted(int(mark.parent.name) for mark in done if mark.parent.name.isdecimal())


def newest(run: Path, asked: int | None) -> int:
    """The newest complete checkpoint, or the one that was asked for."""
    found = steps(run)
    if not found or (asked is not None and asked not in found):
        which = "checkpoint yet" if asked is None else f"checkpoint {asked}; it has {found or 'none'}"
        raise CheckpointError(f"{run} holds no complete {which}")
    return found[-1] if asked is None else asked


def load_model(path: Path, dtype: str | None = None) -> tuple[SmolLM, Model, int]:
    """The weights of a run (its newest checkpoint) or of one checkpoint, without the optimizer's state.

    In the dtype they were saved in, or in the given one. The run may be training: nothing in it is touched, and a
    checkpoint that its run deletes while it is read gives way to the newest.
    """
    run, asked = locate(path)
    while True:
        step = newest(run, asked)
        try:
            return *read_model(run, step, dtype), step
        except Exception as e:
            if asked is None and step not in steps(run):
                continue
            raise e if isinstance(e, CheckpointError) else unreadable(run / "checkpoints" / str(step), e) from e


def read_model(run: Path, step: int, dtype: str | None) -> tuple[SmolLM, Model]:
    with ocp.training.Checkpointer(run / "checkpoints") as orbax:
        saved = describe(orbax, step)
        config = settings.from_dict(Model, saved.custom_metadata["config"]["model"])
        dtype = dtype or saved.metadata["model"]["embed"].dtype
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        model = jax.tree.map(lambda a: place(a, device, dtype), abstract(config))
        return read(orbax, step, {"model": model})["model"], config


@contextlib.contextmanager
def open_source(path: Path):
    """A Source of a run (its newest checkpoint) or of one checkpoint, that reads one array at a time; a context."""
    run, asked = locate(path)
    step = newest(run, asked)
    with ocp.training.Checkpointer(run / "checkpoints") as orbax:
        saved = describe(orbax, step)
        config = settings.from_dict(Model, saved.custom_metadata["config"]["model"])
        stored, device = saved.metadata["model"], jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def array(name: str) -> np.ndarray:
            tree = dict.fromkeys(stored, ocp.PLACEHOLDER) | {name: place(stored[name], device)}
            try:
                return np.asarray(orbax.load_checkpointables(step, {"model": tree})["model"][name])
            except Exception as e:
                raise unreadable(orbax.directory / str(step), e) from e

        dtype = exchange.widest(str(found.dtype) for found in stored.values())
        get = exchange.disassemble(config, array)
        yield exchange.Source(config, dtype, get, f"step {step} of {run}", companions.read(run))


def save_model(folder: Path, model: SmolLM, config: Model):
    """A folder that load_model and `init_from` read, with one checkpoint 0."""
    metadata = {"config": {"model": dataclasses.asdict(config)}}
    with atomic.fresh(folder) as part:
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, metadata, model=model)
        atomic.write_json(part / "config.json", metadata["config"])
