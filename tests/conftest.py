"""The suite's surroundings, set before JAX is imported and inherited by the processes that tests start:
8 fake CPU devices, one persistent compilation cache, no hub, and XLA's programs compiled with less work.

Compiling small programs is most of the suite's time: XLA as it is by itself takes 149 CPU s for test_decode.py and
test_sampling.py, 61 with QUICK (2 EPYC cores). CI gives what computes numbers the whole compiler, on one of its two
versions.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

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


@pytest.fixture(autouse=True)
def curves_only_where_looked_at(request, monkeypatch):
    """A run ends with curves.png, 2 s of matplotlib: for tests marked `curves` alone."""
    pretrain = sys.modules.get("train.pretrain")
    if pretrain and not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(pretrain, "draw_curves", lambda folder: None)
