"""What MODEL may be on a command line: a run, one of its checkpoints, or a Hugging Face folder."""

import logging
from dataclasses import dataclass
from pathlib import Path

from smoljax import checkpoint, hf, tokenizer
from smoljax.config import Model
from smoljax.errors import DataError, require
from smoljax.hf_config import read_json
from smoljax.model import SmolLM
from smoljax.shards import Shards


@dataclass(frozen=True)
class Weights:
    model: SmolLM
    config: Model
    tokenizer: Path | None  # a tokenizer.json, where one lies beside the weights
    dtype: str  # of the arrays
    source: str  # what was read, for people


def load(path: str | Path, dtype: str | None = None) -> SmolLM:
    """The model alone; see `read`."""
    return read(path, dtype).model


def read(path: str | Path, dtype: str | None = None) -> Weights:
    """Weights from a run (its newest checkpoint), a checkpoint (RUN/checkpoints/STEP) or a Hugging Face folder.

    Args:
      dtype: "float32" or "bfloat16"; as stored when None.

    Raises UsageError where there is nothing at `path`, DataError or CheckpointError where it cannot be read.
    """
    path = Path(path)
    expected = "a run's folder, one of its checkpoints (RUN/checkpoints/STEP) or a Hugging Face folder"
    run = checkpoint.locate(path)
    require(bool(run) or path.exists(), f"there is no {path}; expected {expected} (the hub is not asked)")
    require(not path.is_file(), f"{path} is a file; expected {expected}")
    if run:
        model, config, step = checkpoint.load_model(path, dtype)
        folder, _ = run
        source = f"step {step} of {folder}"
    elif (path / "config.json").is_file() and "model" not in read_json(path / "config.json"):
        model, config = hf.load(path, dtype)
        folder, source = path, f"Hugging Face folder {path}"
    else:
        raise DataError(f"{path} is neither {expected}: it holds no checkpoints/, and no config.json of a model")
    words = folder / "tokenizer.json"
    return Weights(model, config, words if words.is_file() else None, str(model.embed.dtype), source)


def check_tokenizer(found: Weights, shards: Shards):
    """A DataError where shards were made with another tokenizer than the model's; a warning where nobody knows."""
    if found.tokenizer is None or shards.tokenizer_path is None:
        logging.getLogger("smoljax").warning(
            f"{found.source if found.tokenizer is None else shards.path} carries no tokenizer: "
            "nothing says that model and shards belong together"
        )
    elif not tokenizer.same(found.tokenizer, shards.tokenizer_path):
        raise DataError(
            f"{shards.path} was made with another tokenizer than the model's {found.tokenizer}; "
            f"prepare it with --tokenizer {found.tokenizer}"
        )
