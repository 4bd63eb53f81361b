"""The only file that knows Orbax: asynchronous, atomic checkpoints of a TrainState, and of a model alone.

    RUN/config.json           the resolved config
    RUN/tokenizer.json        the shards' tokenizer
    RUN/checkpoints/STEP/     model/ and opt/, restorable alone, on any mesh; metadata: config, hashes, versions

A step is written into a temporary folder and renamed when complete, so a killed save is never seen; then SHA256SUMS is
written into it, which every restore compares. Arrays are stored by name ("layers.q", "opt.1.mu.layers.q"), so the files
know no class of ours, of Flax or of Optax.
"""

import contextlib
import dataclasses
import logging
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from smoljax import atomic, committed, companions, exchange, processes, settings, sums
from smoljax.config import Model
from smoljax.errors import RESUMABLE, CheckpointError
from smoljax.model import SmolLM, abstract
from smoljax.sharding import is_variable
from smoljax.step import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports each stage of each save, and what it raises too


class Checkpoints:
    """The checkpoints of a run, for the one process group that trains it. Close it: a save may be in flight.

    `failures` saves in a row that went wrong are an error; one before that is said, and the next one tried.
    """

    def __init__(self, run: Path, keep: int = 1, keep_every: int | None = None, failures: int = 1):
        policies = ocp.training.preservation_policies
        preserve = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.folder = Path(run).resolve() / "checkpoints"
        self.orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )
        self.background = ThreadPoolExecutor(1, "checkpoint")
        self.pending: tuple[int, Future] | None = None
        self.failures, self.failed = failures, 0

    def __enter__(self):
        self.unraisable, sys.unraisablehook = sys.unraisablehook, but_late_writes(sys.unraisablehook)
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.finish()
            else:
                with contextlib.suppress(CheckpointError):  # what ended the run is not to be hidden by a save
                    self.wait()
        finally:
            self.background.shutdown()
            self.orbax.close()
            sys.unraisablehook = self.unraisable

    @property
    def latest(self) -> int | None:
        return self.orbax.latest.step if self.orbax.latest else None

    def metadata(self, step: int) -> dict:
        return describe(self.orbax, step).custom_metadata

    def save(self, step: int, metadata: dict, **trees):
        """Copy the trees to the host and write them in the background; `check` and `wait` raise what goes wrong."""
        self.wait()
        if self.failed and processes.first():  # room for this one; not sooner, for threads of the other may still write
            for left in self.folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(left, ignore_errors=True)
        versions = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
        try:
            response = self.orbax.save_checkpointables_async(
                step,
                {name: by_name(tree) for name, tree in trees.items()},
                force=True,
                custom_metadata=metadata | {"versions": versions},
            )
        except Exception as e:
            self.fail(step, e)
            return
        self.pending = step, self.background.submit(self.seal, step, response)

    def seal(self, step: int, response):
        response.result()
        if processes.first():
            self.write_sums(step)

    def write_sums(self, step: int):
        try:
            sums.write(self.folder / str(step))
        except OSError as e:
            raise OSError(f"it is complete, but its {sums.NAME} could not be written: {e}") from e

    def check(self):
        """Notice what went wrong in a background save as soon as it is known."""
        if self.pending is not None and self.pending[1].done():
            self.wait()

    def wait(self):
        """Until the save in flight is on disk, or has failed."""
        if self.pending is None:
            return
        (step, pending), self.pending = self.pending, None
        try:
            pending.result()
            self.failed = 0
        except Exception as e:
            self.fail(step, e)

    def finish(self):
        """Until the save in flight is on disk; a CheckpointError where the last one failed."""
        self.failures = 1
        self.wait()
        if self.failed:
            raise self.error

    def fail(self, step: int, e: Exception):
        kept = [s for s in committed.steps(self.folder.parent) if s < step]
        stands = f"checkpoint {kept[-1]} stands" if kept else "there is none before it"
        sentence = f"checkpoint {step} could not be written into {self.folder}: {root_cause(e)}; {stands}"
        if jax.process_count() > 1:  # the others may have saved, or wait for us: no collective can be in step again
            gone = any(word in sentence for word in processes.GONE)
            processes.leave(sentence, RESUMABLE if gone else CheckpointError.code)
        with contextlib.suppress(Exception):
            self.orbax.wait()  # Orbax raises a failure once in each thread: here, and not from the next save
        self.failed, self.error = self.failed + 1, CheckpointError(sentence)
        if self.failed >= self.failures:
            raise self.error from e
        print(f"smoljax: {sentence}; training goes on to the next save", file=sys.stderr)

    def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
        """The state after `step` updates, placed as `shardings` say, whatever mesh and processes wrote it."""
        state = read_state(self.orbax, step, abstract, shardings)
        if processes.first() and not (self.folder / str(step) / sums.NAME).exists():
            self.write_sums(step)  # a kill came between the checkpoint and its hashes, and it could be read
        return state


def but_late_writes(hook):
    """`hook` for all but what one write of a save that failed, and is said to have failed, leaves behind it.

    The others go on in TensorStore's threads, and a traceback would tell of each that the save's event loop is closed.
    """

    def told(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return told


def parts(state: TrainState) -> dict:
    """What a checkpoint of a run holds, by the folder that it lies in."""
    return {"model": state.model, "opt": state.opt_state, "guard": state.guard}


def read_state(orbax, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
    trees = read(orbax, step, jax.tree.map(place, parts(abstract), parts(shardings)))
    count = jax.device_put(jnp.asarray(step, jnp.int32), shardings.step)
    return TrainState(count, trees["model"], trees["opt"], trees["guard"])


def load_state(run: Path, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
    """A run's state after `step` updates, without touching the run."""
    with ocp.training.Checkpointer(run.resolve() / "checkpoints") as orbax:
        return read_state(orbax, step, abstract, shardings)


def describe(orbax, step: int):
    """A step's metadata: custom_metadata is what `save` was given, metadata[name] the shapes and dtypes of a tree."""
    try:
        found = orbax.checkpointables_metadata(step)
    except Exception as e:
        raise unreadable(orbax.directory / str(step), e) from e
    if "model" not in (found.custom_metadata or {}) or not (found.metadata or {}).get("model"):
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


def load_model(path: Path, dtype: str | None = None) -> tuple[SmolLM, Model, int]:
    """The weights of a run (its newest checkpoint) or of one checkpoint, without the optimizer's state.

    In the dtype they were saved in, or in the given one. The run may be training: nothing in it is touched, and a
    checkpoint that its run deletes while it is read gives way to the newest.
    """
    run, asked = committed.locate(path)
    while True:
        step = committed.newest(run, asked)
        try:
            return *read_model(run, step, dtype), step
        except Exception as e:
            if asked is None and step not in committed.steps(run):
                continue
            raise e if isinstance(e, CheckpointError) else unreadable(run / "checkpoints" / str(step), e) from e


def read_model(run: Path, step: int, dtype: str | None) -> tuple[SmolLM, Model]:
    committed.check_weights(run, step)
    with ocp.training.Checkpointer(run / "checkpoints") as orbax:
        found = describe(orbax, step)
        config = settings.from_dict(Model, found.custom_metadata["model"])
        dtype = dtype or found.metadata["model"]["embed"].dtype
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        model = jax.tree.map(lambda a: place(a, device, dtype), abstract(config))
        return read(orbax, step, {"model": model})["model"], config


@contextlib.contextmanager
def open_source(path: Path):
    """A Source of a run (its newest checkpoint) or of one checkpoint, that reads one array at a time; a context."""
    run, asked = committed.locate(path)
    step = committed.newest(run, asked)
    committed.check_weights(run, step)
    with ocp.training.Checkpointer(run / "checkpoints") as orbax:
        found = describe(orbax, step)
        config = settings.from_dict(Model, found.custom_metadata["model"])
        stored, device = found.metadata["model"], jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def one(name: str) -> np.ndarray:
            tree = dict.fromkeys(stored, ocp.PLACEHOLDER) | {name: place(stored[name], device)}
            try:
                return np.asarray(orbax.load_checkpointables(step, {"model": tree})["model"][name])
            except Exception as e:
                raise unreadable(orbax.directory / str(step), e) from e

        dtype = exchange.widest(str(array.dtype) for array in stored.values())
        get = exchange.disassemble(config, one)
        yield exchange.Source(config, dtype, get, f"step {step} of {run}", companions.read(run))


def save_model(folder: Path, model: SmolLM, config: Model):
    """A folder that load_model and `init_from` read, with one checkpoint 0."""
    metadata = {"model": dataclasses.asdict(config)}
    with atomic.fresh(folder) as part:
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, metadata, model=model)
        atomic.write_json(part / "config.json", metadata)
