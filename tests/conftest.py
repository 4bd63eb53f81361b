"""The suite's surroundings, set before JAX is imported and inherited by the processes that tests start:
8 fake CPU devices, one persistent compilation cache, no hub, and XLA's programs compiled with less work.

Compiling small programs is most of the suite's time: XLA as it is by itself takes 149 CPU s for test_decode.py and
test_sampling.py, 61 with QUICK (2 EPYC cores). CI gives what computes numbers the whole compiler, on one of its two
versions.
"""

import dataclasses
import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

import launch
import pytest

from smoljax.runtime import processor

REPO = Path(__file__).resolve().parents[1]
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # 104 -> 71 CPU s of these; newer ones have no other

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = (QUICK, os.environ.get("XLA_FLAGS"), "--xla_force_host_platform_device_count=8")
os.environ["XLA_FLAGS"] = " ".join(filter(None, FLAGS))  # of two the last holds
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / f"jax-{version('jaxlib')}-{processor()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure():
    """Two runs of one config are one program here: making 16 of them was 33 of test_pretrain.py's 98 s."""
    from smoljax import step

    for name in ("abstract_state", "compiled_init", "compiled_step"):
        setattr(step, name, made_once(getattr(step, name)))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: let no collection look through it again


def made_once(make):
    made = {}

    def of(config, places=None):
        import jax

        # What is not in the programs: where a run writes, how often, and without a decay at its end, when that is.
        config = dataclasses.replace(config, run=None, sinks=(), save_every=1, keep=1, keep_every=None, log_every=1)
        config = config if config.optim.decay_steps else dataclasses.replace(config, steps=10**6)
        given = () if places is None else (places,)
        key = repr(config), jax.tree.structure(given), *jax.tree.leaves(given)
        if key not in made:
            made[key] = make(config, *given)
        return made[key]

    return of


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    with launch.Launcher(tmp_path_factory.mktemp("launched")) as started:
        yield started


@pytest.fixture(autouse=True)
def curves_only_where_looked_at(request, monkeypatch):
    """A run ends with curves.png, 2 s of matplotlib: for tests marked `curves` alone."""
    pretrain = sys.modules.get("train.pretrain")
    if pretrain and not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(pretrain, "draw_curves", lambda folder: None)
