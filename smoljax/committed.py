"""Which checkpoints a run has on disk, and whether they are sound: names and hashes, which need no Orbax."""

import os
import sys
from pathlib import Path

from smoljax import sums
from smoljax.errors import CheckpointError


def locate(path: Path) -> tuple[Path, int | None] | None:
    """(run, None) for a run's folder, (run, step) for one of its checkpoints, None for anything else."""
    path = Path(path).resolve()
    path = path.parent if path.name == "checkpoints" else path
    if (path / "checkpoints").is_dir():
        return path, None
    if path.parent.name == "checkpoints" and path.parent.is_dir() and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return None


def steps(run: Path) -> list[int]:
    """The complete checkpoints in a run's folder, oldest first."""
    done = Path(run).glob("checkpoints/*/commit_success.txt")  # Orbax's mark, written last
    return sorted(int(mark.parent.name) for mark in done if mark.parent.name.isdecimal())


def written(run: Path) -> list[int]:
    """Every checkpoint that was written in full once, sound or not: Orbax renames a folder to its number when it is."""
    return sorted(int(p.name) for p in Path(run).glob("checkpoints/*") if p.name.isdecimal())


def has_begun(run: Path) -> bool:
    """Something was trained here, whatever is left of it."""
    return bool(written(run)) or (Path(run) / "damaged").exists()


def newest(run: Path, asked: int | None) -> int:
    """The newest complete checkpoint, or the one that was asked for."""
    found = steps(run)
    if not found or (asked is not None and asked not in found):
        which = "checkpoint yet" if asked is None else f"checkpoint {asked}; it has {found or 'none'}"
        raise CheckpointError(f"{run} holds no complete {which}")
    return found[-1] if asked is None else asked


def check_weights(run: Path, step: int):
    """The weights of a checkpoint are as SHA256SUMS says, where it has one."""
    if damaged := sums.damage(run / "checkpoints" / str(step), "model/"):
        raise CheckpointError(f"{damaged}; name another checkpoint, {run}/checkpoints/STEP, or restore it from a copy")


def newest_sound(run: Path) -> int | None:
    """The newest checkpoint whose files are as SHA256SUMS says; damaged ones are named and moved to RUN/damaged."""
    complete = steps(run)
    for step in reversed(written(run)):
        folder = run / "checkpoints" / str(step)
        damaged = sums.damage(folder) or (None if step in complete else "it has no commit_success.txt")
        if damaged is None:
            if not (folder / sums.NAME).exists():  # killed between the commit and the hashes
                print(f"smoljax: checkpoint {step} has no {sums.NAME}: it is read unverified", file=sys.stderr)
            return step
        aside = run / "damaged" / str(step)
        while aside.exists():
            aside = aside.with_name(aside.name + "-again")
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)
        print(f"smoljax: checkpoint {step} is damaged: {damaged}; it was moved to {aside}", file=sys.stderr)
    if (run / "damaged").exists():  # also when this is asked again: nothing of a run begins afresh by itself
        raise CheckpointError(
            f"all checkpoints of {run} are damaged, see {run / 'damaged'}; restore one of them "
            "from a copy into checkpoints/STEP, or name a new folder with run=DIR"
        )
    return None
