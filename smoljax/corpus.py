"""The files of a corpus: which are read, which are left aside because of their names.

text.py reads them.
"""

import os
from pathlib import Path
from typing import NamedTuple

from smoljax.errors import DataError, UsageError
from smoljax.shards import sha256

TEXT, LINES, CODECS = (".txt", ".md", ".py"), (".jsonl", ".json"), {".gz": "gzip", ".zst": "zstd"}
# What systems and programs leave behind among a user's files, besides names that begin with a dot. A ._ file beside
# notes.txt holds a Mac's attributes of it; Spark's _temporary holds rows that were not committed.
HIDDEN = (".", "~$")
FOLDERS = {"__macosx", "$recycle.bin", "recycler", "#recycle", "@recycle", "system volume information"}
FOLDERS |= {"network trash folder", "temporary items", "lost+found", "@eadir", "_temporary"}
FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json"}  # what Hugging Face's datasets says of its own
CARD = "README.md"  # ... and says at the top of a folder of rows


class Source(NamedTuple):
    """An input file: its name in messages and manifest, where it lies, what it was when it was hashed."""

    name: str
    path: str
    bytes: int
    mtime_ns: int
    sha256: str


def look(name: str, path: Path, hashed: bool = True) -> Source:
    try:
        stat = path.stat()
        return Source(name, str(path), stat.st_size, stat.st_mtime_ns, sha256(path) if hashed else "")
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror})") from None


def kind(path: Path) -> tuple[str | None, str | None]:
    """("text" | "lines" | "parquet" | None, codec) by the name's suffixes."""
    codec = CODECS.get(path.suffix.lower())
    suffix = (Path(path.stem) if codec else path).suffix.lower()
    if suffix == ".parquet" and not codec:
        return "parquet", None
    return "text" if suffix in TEXT else "lines" if suffix in LINES else None, codec


def find(inputs: list[str], out: Path) -> tuple[dict[str, Path], list[str]]:
    """The files to read by name, in the order of their names, and the names of those left aside.

    Names are relative to the input folder (of several inputs: to the folder that holds them all), so that the
    same text elsewhere gives the same manifest. A folder that is left aside has one name, which ends with "/".
    """
    roots = [Path(i) for i in inputs]
    for root in roots:
        check(root, out)
    # A link to a file keeps its name: the hub's cache has links NAME.parquet to files without a suffix.
    roots = [root.resolve() if root.is_dir() else root.parent.resolve() / root.name for root in roots]
    base = os.path.commonpath([root if root.is_dir() else root.parent for root in roots])
    files, ignored = {}, []
    for root in roots:
        paths, aside = inside(root) if root.is_dir() else ([root], [])
        for path in paths:
            name = os.path.relpath(path, base)
            if name in files:
                raise UsageError(f"{path} is among the inputs twice: name each file or folder once")
            files[name] = path
        for path in set(aside).difference(roots):
            ignored.append(os.path.relpath(path, base) + "/" * (path.is_dir() and not path.is_symlink()))
    if not files:
        some = f" (left aside: {', '.join(sorted(ignored)[:3])}{', ...' * (len(ignored) > 3)})" if ignored else ""
        raise DataError(f"no text in {', '.join(inputs)}: {len(ignored)} files, none of a kind that can be read{some}")
    return dict(sorted(files.items())), sorted(ignored)


def check(root: Path, out: Path):
    if not root.exists():
        raise DataError(f"no input at {root}: expected a file or a folder of text")
    if root.is_file() and kind(root)[0] is None:
        known = " ".join((*TEXT, *LINES, ".parquet"))
        raise UsageError(f"{root} is of no kind that can be read: expected {known} (the first five also .gz .zst)")
    if root.is_file() and root.name.startswith("._"):
        raise UsageError(f"{root} holds a Mac's attributes of {root.name[2:]} and no text: name that file")
    if root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"--output {out} lies inside the input {root} and would be read as text: move it out")


def inside(root: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder to read, and the files and folders in it that are left aside."""

    def refuse(e: OSError):
        raise DataError(f"{e.filename} cannot be read ({e.strerror})")

    paths, aside = [], []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        # A link to a folder is not followed (it may lead round in a circle), but it is named.
        passed = [name for name in subfolders if left(name, FOLDERS) or os.path.islink(os.path.join(folder, name))]
        subfolders[:] = [name for name in subfolders if name not in passed]
        aside += [Path(folder, name) for name in passed]
        for path in (Path(folder, name) for name in names):
            wanted = kind(path)[0] and path.is_file() and not left(path.name, FILES)
            (paths if wanted else aside).append(path)
    card, others = root / CARD, {kind(path)[0] for path in paths if path != root / CARD}
    if card in paths and others and "text" not in others:
        paths.remove(card)
        aside.append(card)
    return paths, aside


def left(name: str, names: set[str]) -> bool:
    return name.startswith(HIDDEN) or name.lower() in names
