"""SHA256SUMS: what a folder held when it was complete, in the format of sha256sum (`sha256sum -c SHA256SUMS`)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smoljax import atomic
from smoljax.shards import sha256

NAME = "SHA256SUMS"


def write(folder: Path):
    """Hash every file of the folder. 1 to 2 GB/s a core, which hashing gives other threads the use of."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(sha256, files))
    lines = [f"{h}  {p.relative_to(folder).as_posix()}\n" for h, p in zip(hashes, files, strict=True)]
    atomic.write(folder / NAME, "".join(lines))


def damage(folder: Path, part: str = "") -> str | None:
    """What differs from SHA256SUMS in the files below `part`, in words; None where nothing does, or it has no sums."""
    if not (folder / NAME).exists():
        return None
    try:
        lines = [line.split("  ", 1) for line in (folder / NAME).read_text().splitlines()]
        known = {name: h for h, name in lines}
    except ValueError:
        return f"{folder / NAME} is damaged itself"
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {NAME}
    if extra := sorted(there - known.keys()):
        return f"{folder / extra[0]} is not listed in {NAME}"

    def differs(name: str) -> str | None:
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        found = sha256(file)
        return None if found == known[name] else f"{file} has changed (sha256 {found[:12]}, was {known[name][:12]})"

    with ThreadPoolExecutor(4) as pool:
        checked = pool.map(differs, [name for name in known if name.startswith(part)])
        return next((found for found in checked if found), None)
