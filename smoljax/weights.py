"""What MODEL may be on a command line: a run, one of its checkpoints, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from smoljax import checkpoint, hf
from smoljax.config import Model
from smoljax.errors import DataError, require
from smoljax.hf_config import read_json
from smoljax.model import SmolLM


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
    require(path.exists(), f"there is no {path}; expected {expected}")
    if checkpoint.is_run(path):
        model, config, step = checkpoint.load_model(path, dtype)
        folder = path if (path / "checkpoints").is_dir() else path.resolve().parent.parent
        source = f"step {step} of {folder}"
    elif (path / "config.json").is_file() and "model" not in read_json(path / "config.json"):
        model, config = hf.load(path, dtype)
        folder, source = path, f"Hugging Face folder {path}"
    else:
        raise DataError(f"{path} is neither {expected}: it holds no checkpoints/, and no config.json of a model")
    tokenizer = folder / "tokenizer.json"
    return Weights(model, config, tokenizer if tokenizer.is_file() else None, str(model.embed.dtype), source)
