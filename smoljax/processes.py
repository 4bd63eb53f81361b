"""Several processes as one run: they start together, agree, and stop together.

`jax.distributed` does the work. A process that is lost is not mended inside a run: the others exit 75 (or, where the
coordinator is gone, a peer hangs or a save waits for it, JAX aborts them, 134, after guard.heartbeat_s at the latest),
and configs/launch/restart.sh starts all of them again from the last checkpoint. Every process runs the same program;
where one alone should act, or one alone knows, they ask here.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace

import numpy as np

from smoljax.errors import INTERRUPTED, RESUMABLE, Error, UsageError, require

GONE = ("Gloo", "NCCL", "onnection", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")  # in what a collective then says
PATIENCE = 300  # s to wait for the others at the start, as in JAX


def add_flags(parser: ArgumentParser):
    what = "several processes where no cluster is detected: "
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=f"{what}where process 0 listens")
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many they are")
    parser.add_argument("--process-id", type=int, metavar="I", help="which one this is: 0 ... N-1")


def start(args: Namespace, heartbeat_s: int):
    """Join the other processes, before JAX touches a device: by flags, or as JAX detects SLURM, GKE, TPU, Open MPI."""
    import jax

    given = [args.coordinator, args.num_processes, args.process_id]
    names = "--coordinator, --num-processes and --process-id"
    require(given.count(None) in (0, 3), f"{names} go together; found {3 - given.count(None)} of the three")
    address, count, mine = given
    if address is not None:
        host, _, port = address.rpartition(":")
        fine = host and port.isdecimal() and 0 < int(port) < 2**16
        require(bool(fine), f"--coordinator is {address!r}, expected HOST:PORT")
        require(count >= 1, f"--num-processes is {count}, expected at least 1")
        require(0 <= mine < count, f"--process-id is {mine}, expected 0 ... {count - 1} of --num-processes {count}")
        if count == 1:
            return
        if mine == 0:
            check_port(address, int(port))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # GPUs and TPUs have their own
    # JAX's own end of waiting is an abort (134) with the stack of its C++: we are a minute before it.
    what = f"the other processes did not come within {PATIENCE} s; start all of them, with one HOST:PORT for process 0"
    late = threading.Timer(PATIENCE, leave, (what, RESUMABLE))
    late.daemon = True
    late.start()
    try:
        waiting = {"heartbeat_timeout_seconds": heartbeat_s, "initialization_timeout": PATIENCE + 60}
        jax.distributed.initialize(address, count, mine, **waiting)
    except ValueError as e:
        if address is not None or "coordinator_address" not in str(e):
            raise Error(f"the processes cannot be started together: {e}") from e
        expected = {k: os.environ[k] for k in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE") if k in os.environ}
        alone = all(value == "1" for value in expected.values())
        require(alone, f"the cluster has started {expected} processes, but JAX does not find the others; give {names}")
    except RuntimeError as e:
        if address is None and "before any JAX calls" in str(e):  # called from Python that computes already: alone
            return
        raise Error(f"the processes do not find each other: {str(e).splitlines()[0]}") from e
    finally:
        late.cancel()


def check_port(address: str, port: int):
    """Process 0 can listen there: where it cannot, JAX says little and crashes (SIGSEGV in jaxlib 0.10.2)."""
    try:
        socket.create_server(("", port)).close()
    except OSError as e:
        reason = f"{e.strerror}; is a process of another run there?"
        raise UsageError(f"--coordinator is {address}, where process 0 cannot listen: {reason}") from None


def index() -> int:
    import jax

    return jax.process_index()


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return index() == 0


def on_first(do):
    """do() on process 0, its result on all of them; and what it raises there is an Error everywhere else."""
    import jax

    if jax.process_count() == 1:
        return do()
    result = error = raised = None
    if first():
        try:
            result = do()
        except Exception as e:  # our bugs too: the others would wait for an answer
            raised, error = e, [getattr(e, "code", 1), str(e) if isinstance(e, Error) else f"process 0 failed: {e!r}"]
    result, error = share([result, error])
    if error is not None:
        told = raised if raised is not None else Error(error[1])
        told.code, told.agreed = error[0], True
        raise told
    return result


def share(value):
    """Process 0's value on every process; what JSON can hold."""
    from jax.experimental import multihost_utils

    sent = np.frombuffer(json.dumps(value).encode(), np.uint8) if first() else np.zeros(0, np.uint8)
    padded = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(sent)))), np.uint8)
    padded[: len(sent)] = sent
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def read(tree):
    """numpy values of arrays that are whole on every device, or what any device of this process has to say instead.

    A process that dies in the middle of a collective leaves some devices here with an error, and others that wait for
    those: whoever asks the first device alone may learn of it by the heartbeat only.
    """
    import jax

    several = jax.process_count() > 1
    waited = [shard.data for array in jax.tree.leaves(tree) for shard in array.addressable_shards] if several else []
    while waited:
        for done in [array for array in waited if array.is_ready()]:
            done.block_until_ready()  # raises
        if waited := [array for array in waited if not array.is_ready()]:
            time.sleep(0.001)
    return jax.tree.map(np.asarray, tree)


class Agreement:
    """One number of every process, and the largest of them on all: `ask` now, read the array a step later."""

    def __init__(self, mesh):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        self.alone, self.count = jax.process_count() == 1, mesh.size
        self.split, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
        self.largest = jax.jit(jnp.max, out_shardings=whole)

    def now(self, asked, before: int) -> int:
        """What is known now: alone, what was just asked; with others, what all of them know of the step before."""
        return asked if self.alone else before

    def ask(self, value: int):
        import jax

        if self.alone:
            return value
        here = np.full(jax.local_device_count(), value, np.int32)
        return self.largest(jax.make_array_from_process_local_data(self.split, here, (self.count,)))


@contextlib.contextmanager
def together():
    """Around what all processes do: one that fails alone ends at once, for the others wait for it in a collective.

    What a collective says when a peer is gone is exit 75: start all of them again.
    """
    import jax

    try:
        yield
    except Exception as e:
        agreed = getattr(e, "agreed", False) or getattr(e, "code", 0) in (RESUMABLE, INTERRUPTED)
        if jax.process_count() == 1 or agreed:
            raise
        if isinstance(e, Error):
            leave(str(e), e.code)
        if any(word in str(e) for word in GONE):
            leave(f"a process is gone ({str(e).splitlines()[0][:200]}); start all again, the run goes on", RESUMABLE)
        traceback.print_exc()
        leave("process failed", 1)


def leave(sentence: str, code: int):
    """End at once, whatever other threads and processes wait for."""
    print(f"smoljax: {sentence}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
