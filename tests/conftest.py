"""The suite's surroundings, set before JAX is imported and inherited by the processes that tests start:
8 fake CPU devices, one persistent compilation cache, no hub."""

import os
from importlib.metadata import version
from pathlib import Path

from smoljax.runtime import processor

REPO = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / f"jax-{version('jaxlib')}-{processor()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
