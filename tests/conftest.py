"""The suite's surroundings, set before JAX is imported and inherited by the processes that tests start:
8 fake CPU devices, one persistent compilation cache, no hub, and XLA's machine code optimized less.

Most of the suite's time is compiling small programs: without a cache test_sharding.py takes 55 s as XLA is by itself,
35 s so (2 EPYC cores). XLA_FLAGS=--xla_backend_optimization_level=3 has it in full, as CI has for one of its two
versions.
"""

import os
from importlib.metadata import version
from pathlib import Path

from smoljax.runtime import processor

REPO = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FLAGS = (QUICK, os.environ.get("XLA_FLAGS"), "--xla_force_host_platform_device_count=8")
os.environ["XLA_FLAGS"] = " ".join(filter(None, FLAGS))  # of two the last holds
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / f"jax-{version('jaxlib')}-{processor()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
