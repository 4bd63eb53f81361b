"""From a name and `a.b=c` settings to a checked config, and to JSON and back.

`load("demo", ["optim.lr=1e-3"])` runs configs/demo.py, takes its `config`, and applies the settings by declared type:
an unknown key or a wrong type is one sentence with "did you mean", before JAX starts. nanotron's YAML is a config too.
"""

import dataclasses
import difflib
import json
import logging
import runpy
import traceback
import types
import typing
from pathlib import Path

from smoljax import nanotron_config
from smoljax.config import Train
from smoljax.errors import CheckpointError, UsageError, check_words, require

SUFFIXES = (".py", ".yaml", ".yml")


def load(name: str, overrides: typing.Sequence[str] = ()) -> Train:
    """The config in a file (a path, or a shipped name such as `demo`), with `a.b=c` overrides applied.

    What a YAML file says and smoljax has no use for is listed on stderr.
    """
    file = find(name)
    if file.suffix == ".py":
        config = from_python(file)
    else:
        config, unused = nanotron_config.from_yaml(file)
        if unused:
            said = f"{file}: {len(unused)} keys have no use here, and leave the mathematics as they are:"
            logging.getLogger("smoljax").warning(f"{said}\n{nanotron_config.told(unused)}")
    config = override(config, overrides)
    check_words(words(dataclasses.asdict(config)))
    return config if config.run is not None else dataclasses.replace(config, run=f"runs/{file.stem}")


def words(value):
    """All strings in a config, which are names of files where they are not ASCII."""
    if isinstance(value, dict):
        value = (*value, *value.values())
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from words(each)


def from_python(file: Path) -> Train:
    try:
        # Not an import: a .pyc is matched by size and second, so an edit of 1e-3 to 2e-3 at once could be overlooked.
        names = runpy.run_path(str(file))
    except UsageError as e:
        raise UsageError(f"{file}: {e}") from None
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(file)]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise UsageError(f"{where} does not run as Python: {type(e).__name__}: {e}") from e
    config = names.get("config")
    require(isinstance(config, Train), f"{file} must say `config = Train(...)`, found {type(config).__name__}")
    return config


def shipped() -> dict[str, Path]:
    """Name -> file of the configs that come with smoljax, from a checkout as from a wheel."""
    here = Path(__file__).parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {p.stem.replace("_", "-"): p for p in sorted(folder.glob("*.py")) if p.stem != "__init__"}


def find(name: str) -> Path:
    if name.endswith(SUFFIXES) or "/" in name:
        file = Path(name)
        require(
            file.is_file() and file.suffix in SUFFIXES,
            f"{name} is no config: expected a .py file that says config = Train(...), a .yaml file of nanotron's, "
            "or a shipped name",
        )
        return file
    names = shipped()
    key = name.replace("_", "-").replace(".", "-")  # smollm2-1.7b, as on the Hub, is configs/smollm2_1_7b.py
    require(key in names, f"no config named {name!r}{meant(key, names)}; shipped are {', '.join(names)}")
    return names[key]


def override(config, settings: typing.Sequence[str]):
    """`config` with settings like `optim.lr=1e-3` applied in one go, so that two may depend on each other."""
    changes: dict = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        require(bool(equals), f"expected a setting like optim.lr=1e-3, got {setting!r}")
        *parents, leaf = path.split(".")
        level = changes
        for parent in parents:
            level = level.setdefault(parent, {})
            require(isinstance(level, dict), f"{setting!r} contradicts an earlier setting")
        level[leaf] = text
    return replace(config, changes, "")


def replace(config, changes: dict, prefix: str):
    types_of = {f.name: f.type for f in dataclasses.fields(config)}
    new = {}
    for key, value in changes.items():
        where = f"unknown setting {prefix + key!r} in {type(config).__name__}"
        require(key in types_of, f"{where}{meant(key, types_of) or elsewhere(key)}; it has {', '.join(types_of)}")
        if dataclasses.is_dataclass(types_of[key]):
            require(
                isinstance(value, dict),
                f"{prefix + key} is a group of settings; set one of {prefix + key}."
                f"{{{', '.join(f.name for f in dataclasses.fields(types_of[key]))}}}",
            )
            new[key] = replace(getattr(config, key), value, f"{prefix}{key}.")
        else:
            require(not isinstance(value, dict), f"{prefix + key} is one value, it has no settings inside")
            new[key] = parse(value, types_of[key], prefix + key)
    return dataclasses.replace(config, **new)


def parse(text: str, kind, where: str):
    """One value from the command line, by its declared type; `none` where none is allowed."""
    require(text != "", f"{where} is empty, expected a value")
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is dict:  # {"shards/web": 0.7, "shards/code": 0.3}, or one folder
            return json.loads(text) if text.startswith("{") else {text: 1.0}
        if kind is tuple:  # [{"start": 1000, "seq_len": 8192}], or a,b
            return tuple(json.loads(text)) if text.startswith("[") else tuple(map(number, text.split(",")))
        return kind(text)
    except (ValueError, KeyError):
        expected = {
            int: "a whole number, like 1000",
            float: "a number, like 3e-4",
            bool: "true or false",
            dict: 'a folder, or JSON like {"shards/web": 0.7, "shards/code": 0.3}',
            tuple: 'names like a,b, or JSON like [{"start": 1000, "seq_len": 8192}]',
        }
        raise UsageError(f"{where} is {kind.__name__}, got {text!r}; expected {expected[kind]}") from None


def number(word: str) -> int | str:
    return int(word) if word.isdecimal() else word


def elsewhere(leaf: str) -> str:
    """`lr` is optim.lr."""
    groups = {f.name: f.type for f in dataclasses.fields(Train) if dataclasses.is_dataclass(f.type)}
    found = [f"{g}.{leaf}" for g, kind in groups.items() if leaf in {f.name for f in dataclasses.fields(kind)}]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def meant(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_dict(kind, values: dict):
    """A dataclass from the JSON of an earlier run's config; unknown and missing keys are errors."""
    require(isinstance(values, dict), f"a saved {kind.__name__} is {values!r:.80}, expected its keys and values")
    types_of = {f.name: f.type for f in dataclasses.fields(kind)}
    for key in values:
        require(key in types_of, f"unknown key {key!r} in a saved {kind.__name__}{meant(key, types_of)}")
    new = {k: from_dict(types_of[k], v) if dataclasses.is_dataclass(types_of[k]) else v for k, v in values.items()}
    try:
        return kind(**new)
    except TypeError as e:  # a required key is missing
        raise UsageError(f"saved {kind.__name__}: {e}") from None


def of_run(folder: Path) -> Train | None:
    """The config of a run's folder; None where its config.json is of something else. A CheckpointError if damaged."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file} is not JSON ({e}); restore it from a checkpoint's metadata") from None
    fine = isinstance(values, dict) and {"model", "steps"} <= values.keys()
    return from_dict(Train, values) if fine else None


def flat(config, prefix: str = "") -> dict:
    """{"optim.lr": 0.003, ...}: for comparing two configs key by key."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        out |= flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return out
