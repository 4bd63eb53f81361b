"""The small files beside the weights: tokenizer, chat template, generation settings, model card. Read as bytes, carried
along whatever format the weights take, and made consistent where a Hugging Face folder is written."""

import json
import logging
from importlib.metadata import version
from pathlib import Path

from smoljax import chat, special_tokens
from smoljax import tokenizer as tokenizers
from smoljax.config import Model
from smoljax.errors import DataError
from smoljax.hf_config import parse_json, read_json

# Name -> the most bytes that one is read to. SmolLM's tokenizer.json has 2 MB, Llama 3's 17 MB.
NAMES = {"tokenizer.json": 32 << 20, "tokenizer_config.json": 8 << 20, "chat_template.jinja": 1 << 20}
NAMES |= {"special_tokens_map.json": 1 << 20, "added_tokens.json": 8 << 20, "vocab.json": 16 << 20}
NAMES |= {"merges.txt": 16 << 20, "generation_config.json": 1 << 20, "README.md": 8 << 20, "LICENSE": 1 << 20}
ADAPTER = "adapter_config.json"  # PEFT's, beside adapter_model.safetensors
PROSE = ("README.md", "LICENSE")  # which say nothing of what the model gives

log = logging.getLogger("smoljax")


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder; a DataError where the name, or a link, leads out of it.

    The hub's cache alone is made of links: snapshots/REVISION/FILE into the repository's blobs/, and from there, where
    Xet stored it, into the blobs/XX/ that all repositories share.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise DataError(f"{folder} names a file {name!r}; expected a plain name of a file in the folder itself")
    path, home = folder / name, folder.resolve()
    if path.is_symlink():
        target = path.resolve().parent
        ours = target == home
        if home.parent.name == "snapshots":
            ours |= target == home.parents[1] / "blobs" or target.parent == home.parents[2] / "blobs"
        if not ours:
            raise DataError(f"{path} is a link to {path.resolve()}, outside the folder; put a copy of the file there")
    return path


def read(folder: Path) -> dict[str, bytes]:
    """The content of those that a folder holds; tokenizer.json with the tokens that only the others name."""
    found = {}
    for name, limit in NAMES.items():
        path = inside(folder, name)
        if path.is_file():
            if (size := path.stat().st_size) > limit:
                raise DataError(f"{path} has {size:,} bytes, expected at most {limit:,}")
            try:
                found[name] = path.read_bytes()
            except OSError as e:
                raise DataError(f"{path} cannot be read ({e.strerror})") from None
    if (folder / chat.MORE).is_dir():
        found |= more_templates(folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if "auto_map" in parse_json(found.get(name, b"{}"), folder / name):
            raise DataError(f"{folder / name}: auto_map names code to run, which smoljax never does; remove the key")
    return special_tokens.complete(found, str(folder))


def check_no_adapter(folder: Path):
    """A DataError where a folder without weights of a model holds an adapter."""
    if not inside(folder, ADAPTER).is_file():
        return
    base = read_json(inside(folder, ADAPTER)).get("base_model_name_or_path")
    raise DataError(adapter(str(folder), base))


def adapter(name: str, base=None) -> str:
    of = f" of {base!r:.100}" if base else ""
    return (
        f"{name} holds an adapter{of} ({ADAPTER}) and no model; merge it into its base (PEFT's merge_and_unload, then "
        "save_pretrained) and give that folder"
    )


def more_templates(folder: Path) -> dict[str, bytes]:
    """additional_chat_templates/NAME.jinja, as transformers writes a second template."""
    found, limit = {}, NAMES["chat_template.jinja"]
    for path in sorted(inside(folder, chat.MORE.rstrip("/")).glob("*.jinja")):
        content = inside(path.parent, path.name).read_bytes() if path.stat().st_size <= limit else None
        if content is None or len(found) == 16:
            raise DataError(f"{path}: expected at most 16 chat templates of at most {limit:,} bytes")
        found[chat.MORE + path.name] = content
    return found


def generation_ids(config: dict, files: dict[str, bytes], folder: Path) -> dict:
    """A config.json whose special ids are generation_config.json's, where both are given: those end a generation."""
    found, ids = parse_json(files.get("generation_config.json", b"{}"), folder / "generation_config.json"), {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if found.get(key) is not None and found[key] != config.get(key):
            if config.get(key) is not None:
                log.warning(
                    f"{folder}: {key} is {config[key]} in config.json, {found[key]} in generation_config.json; "
                    "the latter is taken"
                )
            ids[key] = found[key]
        if key == "pad_token_id" and (config | ids).get(key) == -1:  # old Llama's "none"
            log.warning(f"{folder}: {key} is -1, which is taken for none")
            ids[key] = None
    return config | ids


def of_folder(config: Model, files: dict[str, bytes], dtype: str) -> dict[str, bytes]:
    """What to write beside a model in a Hugging Face folder: the files found, completed and consistent."""
    out = dict(files)
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    old = parse_json(files.get("generation_config.json", b"{}"), Path("generation_config.json"))
    out["generation_config.json"] = to_json(old | {k: v for k, v in ids.items() if v is not None})
    ours = {library: card(config, library) for library in ("transformers", "smoljax")}
    if files.get("README.md", ours["transformers"]) in ours.values():
        out["README.md"] = ours["smoljax" if dtype == "int8" else "transformers"]
    if "tokenizer.json" in files:
        settings = tokenizer_config(config, files)
        named = chat.templates(files)
        if "default" in named:  # old readers look into the settings, new ones into the files
            out |= {f"{chat.MORE}{name}.jinja": text.encode() for name, text in named.items() if name != "default"}
            out["chat_template.jinja"] = named["default"].encode()
            listed = [{"name": name, "template": text} for name, text in named.items()]
            settings["chat_template"] = named["default"] if len(named) == 1 else listed
        out["tokenizer_config.json"] = to_json(settings)
        if "special_tokens_map.json" in files:  # which old readers put before the settings
            special = {key: settings[key] for key in special_tokens.NAMES if settings.get(key) is not None}
            out["special_tokens_map.json"] = to_json(special)
    return out


def tokenizer_config(config: Model, files: dict[str, bytes]) -> dict:
    """The settings found, with the special tokens that they do not name by the config's ids.

    What the tokenizer's eos was, stays it, whichever ids end the model's own texts.

    transformers 5 builds its GPT2Tokenizer, which SmolLM's published settings name, anew from vocabulary and merges,
    without the Digits step: "x  12" then has other ids. Under PreTrainedTokenizerFast it takes tokenizer.json as it is.
    """
    words = tokenizers.parse(files["tokenizer.json"], "tokenizer.json")
    tokenizers.check_fits(words, config, "tokenizer.json")
    found = parse_json(files.get("tokenizer_config.json", b"{}"), Path("tokenizer_config.json"))
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings} | found
    for name in ("bos", "eos", "pad"):
        ids = special_tokens.model_ids(getattr(config, f"{name}_token_id"))
        if ids and words.id_to_token(ids[0]) is None:
            raise DataError(f"the model's {name}_token_id is {ids[0]}, but tokenizer.json has no token of that id")
    settings |= special_tokens.seen(files, config, words)
    for name in ("bos_token", "eos_token", "pad_token"):
        settings.setdefault(name, None)
    if settings.get("tokenizer_class", "GPT2Tokenizer") in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings


def to_json(value) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def card(config: Model, library: str) -> bytes:
    """A model card's beginning, for whoever publishes the folder to complete."""
    return f"""---
library_name: {library}
tags: [smoljax]
---
A LlamaForCausalLM of {config.parameters:,} parameters, written by smoljax {version("smoljax")}.
""".encode()
