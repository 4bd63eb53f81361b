"""Runs as they were recorded: config.json and metrics.jsonl, for curves.py to draw and `smoljax report` to compare."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from smoljax import metrics, settings
from smoljax.config import Train
from smoljax.errors import DataError, require

GOODPUT = [f"goodput/{name}_s" for name in metrics.SPENT]


@dataclass
class Run:
    """A run's folder as read: its config, and what was recorded at which number of tokens."""

    folder: Path
    label: str
    config: Train
    records: list[dict]

    @cached_property
    def steps(self) -> np.ndarray:
        return np.array([r["step"] for r in self.records], np.int64)

    @cached_property
    def tokens(self) -> np.ndarray:
        """As recorded; a record without them, such as a measurement alone, stands between its neighbours."""
        where, tokens = self.points("train/tokens")
        return np.interp(self.steps, [0, *self.steps[where]], [0, *tokens])

    def points(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the records that have the key, and their values in f64."""
        where = [i for i, r in enumerate(self.records) if r.get(key) is not None]
        try:
            return np.array(where, np.int64), np.array([self.records[i][key] for i in where], float)
        except (TypeError, ValueError):
            raise DataError(f"{self.folder}/metrics.jsonl has a {key} that is not a number") from None

    @cached_property
    def heldout(self) -> list[str]:
        """Names of the sets that were measured."""
        keys = set().union(*self.records)
        return sorted(m[1] for key in keys if (m := re.fullmatch(r"eval/(.+)/loss", key)))

    @cached_property
    def goodput(self) -> dict[str, float]:
        """Seconds by kind; empty where the records do not say what time went into."""
        last = next((r for r in reversed(self.records) if "goodput/productive_s" in r), {})
        return {key: float(last[key]) for key in GOODPUT if key in last}


def load(folders) -> list[Run]:
    """Runs from their folders, with labels that differ. A UsageError for a folder that is no run."""
    folders = [Path(f) for f in folders]
    return [
        Run(f, name, config_of(f), metrics.read(f, most=100_000))
        for f, name in zip(folders, labels(folders), strict=True)
    ]


def config_of(folder: Path) -> Train:
    there = (folder / "config.json").is_file()
    require(there, f"{folder} is not a run: it has no config.json; expected a folder made by smoljax pretrain")
    config = settings.of_run(folder)
    sentence = f"{folder} is not a run: its config.json is of something else, such as a Hugging Face folder"
    require(config is not None, sentence)
    return config


def labels(folders: list[Path]) -> list[str]:
    """The folders' names, with as much of the path before them as tells equal ones apart."""
    whole = [f.resolve() for f in folders]
    twice = [f for f, path in zip(folders, whole, strict=True) if whole.count(path) > 1]
    require(not twice, f"{' and '.join(map(str, twice))} are the same run; name each once")
    names = [path.name for path in whole]
    for depth in range(2, max((len(p.parts) for p in whole), default=0) + 1):
        names = ["/".join(p.parts[-depth:]) if names.count(n) > 1 else n for p, n in zip(whole, names, strict=True)]
    return names


def tokens_at(config: Train, n: int) -> int:
    """Tokens that were seen before update n; each stage has its own rows."""
    starts = [*(start for start in config.starts if start < n), n]
    rows = [config.at(start).data for start in starts[:-1]]
    return sum((b - a) * d.batch_size * d.seq_len for a, b, d in zip(starts, starts[1:], rows, strict=False))
