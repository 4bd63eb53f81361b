"""What MODEL may be, on a command line and in `smoljax.load`: a run, one of its checkpoints, a Hugging Face folder, a
GGUF file, a nanotron checkpoint, a name on the Hugging Face hub (`owner/name@revision`), or a fetched model's name."""

import contextlib
import functools
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from smoljax import (
    committed,
    companions,
    exchange,
    fetch,
    gguf,
    hf,
    hub,
    nanotron,
    special_tokens,
    tokenizer,
)
from smoljax.config import Model
from smoljax.errors import DataError, Error, UsageError, require
from smoljax.model import SmolLM
from smoljax.settings import meant
from smoljax.shards import Shards

EXPECTED = "a run, a checkpoint (RUN/checkpoints/STEP), a Hugging Face folder, a .gguf file or a nanotron checkpoint"


@dataclass(frozen=True)
class Weights:
    model: SmolLM
    config: Model
    files: dict[str, bytes]  # tokenizer.json and the like, where they lie beside the weights
    dtype: str  # of the arrays; int8 where the matrices are QTensors
    source: str  # what was read, for people
    format_ends: tuple[int, ...] = ()  # as exchange.Source.ends

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        found = words(self.files, self.config, self.source)
        for sentence in special_tokens.contradictions(self.files, self.config, found) if found else ():
            logging.getLogger("smoljax").warning(f"{self.source}: {sentence}")
        return found

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text: the model's own, the tokenizer's eos, and those that its format has beside them."""
        ends = (*special_tokens.ends(self.files, self.config, self.tokenizer), *self.format_ends)
        return tuple(dict.fromkeys(ends))

    @functools.cached_property
    def prefix(self) -> int | None:
        """The id before a text without context: the tokenizer's bos, else its eos, as in lm-evaluation-harness."""
        if self.tokenizer is None:
            ids = map(special_tokens.model_ids, (self.config.bos_token_id, self.config.eos_token_id))
            return next(iter(sum(ids, ())), None)
        bos, eos = (
            special_tokens.id_of(name, self.files, self.config, self.tokenizer) for name in ("bos_token", "eos_token")
        )
        return eos if bos is None else bos


def load(path: str | Path, dtype: str | None = None) -> SmolLM:
    """The model alone; see `read`. It computes in f32 unless told otherwise (Compute), whatever its dtype."""
    return read(path, dtype).model


def load_tokenizer(path: str | Path) -> Tokenizer:
    """MODEL's tokenizer, or the one of a tokenizer.json: `.encode(text).ids`, `.decode(ids)`."""
    file, folder = Path(path), Path(path) / "tokenizer.json"
    if (file.name == "tokenizer.json" and file.is_file()) or (folder.is_file() and not (file / "config.json").exists()):
        return tokenizer.parse(special_tokens.tokenizer_json(path), str(tokenizer.find(path)))
    with open_source(path) as source:
        found = words(source.files, source.config, source.name)
    if found is None:
        raise DataError(f"{source.name} has no tokenizer.json; copy the model's into the folder")
    return found


def words(files: dict[str, bytes], config: Model, name: str) -> Tokenizer | None:
    if "tokenizer.json" not in files:
        return None
    found = tokenizer.parse(files["tokenizer.json"], f"{name}: tokenizer.json")
    tokenizer.check_fits(found, config, f"{name}: tokenizer.json")
    return found


def read(path: str | Path, dtype: str | None = None) -> Weights:
    """The weights of MODEL, all of them in memory.

    Args:
      dtype: of the arrays, one of exchange.DTYPES; as stored when None, and then int8 is QTensors.

    Raises UsageError where there is nothing at `path`, DataError or CheckpointError where it cannot be read.
    """
    require(dtype in (None, *exchange.DTYPES), f"dtype is {dtype!r}, expected one of {', '.join(exchange.DTYPES)}")
    path = find(path)
    if run := run_of(path):
        from smoljax import checkpoint  # Orbax takes half a second to import, for runs alone

        model, config, step = checkpoint.load_model(path, dtype)
        return Weights(model, config, companions.read(run[0]), str(model.embed.dtype), f"step {step} of {run[0]}")
    with open_source(path) as source:
        model = exchange.assemble(source, dtype)
        return Weights(model, source.config, source.files, dtype or source.dtype, source.name, source.ends)


@contextlib.contextmanager
def open_source(path: str | Path) -> Iterator[exchange.Source]:
    """MODEL, opened and checked, its tensors to be read one at a time."""
    path = find(path)
    if run_of(path):
        from smoljax import checkpoint

        with checkpoint.open_source(path) as source:
            yield source
    elif path.is_file():
        if path.suffix != ".gguf":
            what = "its folder" if path.suffix in (".safetensors", ".json") else EXPECTED
            pickle = (
                " (a pickle can run code and is never opened)" if path.suffix in (".bin", ".pt", ".pth", ".pkl") else ""
            )
            raise UsageError(f"{path} is a file; expected {what}{pickle}")
        yield gguf.open_source(path)
    elif nanotron.is_checkpoint(path):
        yield nanotron.open_source(path)
    else:
        ggufs = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise UsageError(f"{path} holds {len(ggufs)} GGUF files; name one: {', '.join(f.name for f in ggufs)}")
        if ggufs:
            yield gguf.open_source(companions.inside(path, ggufs[0].name))
        elif hf.is_folder(path):
            yield hf.open_source(path)
        else:
            companions.check_no_adapter(path)
            raise DataError(f"{path} is not {EXPECTED}: it holds neither checkpoints/ nor a model's config.json")


def run_of(path: Path) -> tuple[Path, int | None] | None:
    """The run that a path is in; nanotron calls its folders checkpoints/STEP, too."""
    return None if nanotron.is_checkpoint(path) else committed.locate(path)


def find(path: str | Path) -> Path:
    """Where MODEL lies on this disk; a name on the hub is downloaded."""
    name = str(path)
    try:
        if Path(path).exists():
            return Path(path)
    except OSError as e:
        raise UsageError(f"{name[:200]} cannot be read ({e.strerror})") from None
    if name in fetch.NAMES:
        if found := fetch.cached(name):
            return found
        raise UsageError(f"{name} is not fetched yet; run `smoljax fetch {name}` once")
    if hub.is_name(name) and not Path(name).parent.is_dir():  # runs/lnog is a typing error, and no name of the hub's
        try:
            return hub.download(name)
        except Error as e:
            raise e if "on this disk" in str(e) else type(e)(f"there is no {name} on this disk; {e}") from None
    raise UsageError(
        f"there is no {path}{meant(name, fetch.NAMES)}; expected {EXPECTED}, a name on the hub (owner/name) or "
        f"{', '.join(fetch.NAMES)}"
    )


def digest(found: Weights) -> str:
    """Tells these weights and files from others, so that no job goes on with others; no protection from malice."""
    sums = [zlib.crc32(np.asarray(a).reshape(-1).view(np.uint8)) for a in jax.tree.leaves(found.model)]
    files = {name: zlib.crc32(found.files[name]) for name in sorted(found.files) if name not in companions.PROSE}
    return f"{zlib.crc32(repr((found.config, sums, files)).encode()):08x}"


def check_tokenizer(found: Weights, shards: Shards):
    """A DataError where shards were made with another tokenizer than the model's; a warning where nobody knows."""
    if found.tokenizer is None or shards.tokenizer_path is None:
        logging.getLogger("smoljax").warning(
            f"{found.source if found.tokenizer is None else shards.path} carries no tokenizer: "
            "nothing says that model and shards belong together"
        )
    elif not tokenizer.same(found.tokenizer, tokenizer.load(shards.tokenizer_path)):
        raise DataError(
            f"{shards.path} was made with another tokenizer than the model's, that of {found.source}; "
            "prepare it with --tokenizer and the model's tokenizer.json"
        )
