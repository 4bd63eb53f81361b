"""A folder of token shards, read as one long stream of tokens.

The format is datatrove's, which SmolLM was trained from: `x.ds` holds little-endian uint16 ids (uint32 when the
vocabulary exceeds 65,536), `x.ds.index` the uint64 end of every document, counted in tokens of that file.
`smoljax prepare` adds manifest.json and tokenizer.json. Opening a folder checks every size, so that a short shard is
an error now and not a shorter epoch later; `verify` also hashes. data.py cuts windows out of the stream.
"""

import hashlib
import json
import logging
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smoljax.errors import DataError

FORMAT, VERSION = "smoljax-shards", 1
WIDTH = {"uint16": 2, "uint32": 4}
REPAIR = "restore it, or run the same `smoljax prepare` again"


class Shard(NamedTuple):
    """One .ds file. A hash is None, and `documents` is 1, where nobody wrote them down."""

    file: str
    tokens: int
    documents: int
    sha256: str | None = None
    index_sha256: str | None = None


class Shards:
    """The tokens of a folder as one stream, in manifest order (sorted by name where there is no manifest)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"no shards at {self.path}: expected a folder that `smoljax prepare` wrote")
        self._maps: dict[str, np.ndarray] = {}  # file name -> memory map, made at first use
        tokenizer = self.path / "tokenizer.json"
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None
        if (self.path / "manifest.json").is_file():
            self._open_manifest()
        else:
            self._open_bare()
        for shard in self.shards:
            self._check_sizes(shard)
        self._ends = list(accumulate(shard.tokens for shard in self.shards))  # of each shard in the stream
        self.num_tokens = self._ends[-1] if self._ends else 0
        self.documents = sum(shard.documents for shard in self.shards)
        if not self.num_tokens:
            raise DataError(
                f"{self.path} holds no tokens: expected *.ds files that `smoljax prepare` or datatrove wrote"
            )

    def _open_manifest(self) -> None:
        file = self.path / "manifest.json"
        try:
            raw = file.read_bytes()
            manifest = json.loads(raw)
            if (found := (manifest.get("format"), manifest.get("version"))) != (FORMAT, VERSION):
                raise DataError(
                    f"{file} is {found[0]!r} version {found[1]!r}, this smoljax reads {FORMAT!r} version {VERSION}: "
                    "prepare the text again, or read it with the smoljax that wrote it"
                )
            self.shards = [Shard(**{key: entry[key] for key in Shard._fields}) for entry in manifest["shards"]]
            self.itemsize = WIDTH[manifest["dtype"]]
            self.vocab_size, self.max_token_id = int(manifest["vocab_size"]), int(manifest["max_token_id"])
            self.eos_token_id = int(manifest["eos_token_id"])
            self.text_bytes, self.tokenizer_sha256 = int(manifest["text_bytes"]), str(manifest["tokenizer_sha256"])
            if any(Path(shard.file).name != shard.file for shard in self.shards):
                raise ValueError("a shard's name leads out of the folder")
            for key in "tokens", "documents":
                if (total := sum(getattr(shard, key) for shard in self.shards)) != manifest[key]:
                    raise ValueError(f"its shards have {total} {key}, its total is {manifest[key]}")
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{file} cannot be read ({type(e).__name__}: {e}): {REPAIR}") from None
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        if self.tokenizer_path is None:
            raise DataError(f"{self.path / 'tokenizer.json'} is missing: {REPAIR}")
        if (found := hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()) != self.tokenizer_sha256:
            raise DataError(
                f"{self.tokenizer_path} is not the tokenizer of these shards "
                f"(sha256 {found[:12]}, manifest.json says {self.tokenizer_sha256[:12]}): {REPAIR}"
            )

    def _open_bare(self) -> None:
        """datatrove's own files: what they do not say is assumed, with one warning."""
        if unfinished := next(self.path.glob(".prepare/*/parts"), None):
            raise DataError(f"{self.path} is unfinished ({unfinished} is still there): {REPAIR}")
        files = sorted(file for file in self.path.glob("*.ds") if file.stat().st_size)
        kinds = {"unshuffled" if file.name.endswith("unshuffled.ds") else "shuffled" for file in files}
        if len(kinds) == 2:  # datatrove deletes the former when it has written the latter
            raise DataError(
                f"{self.path} holds both *_unshuffled.ds and shuffled shards, as after a killed datatrove run"
            )
        widths = {}
        metadata = {file: self._read_metadata(file) for file in files}
        for file in files:
            width, _ = metadata[file]
            widths[width or 2] = file.name
        if len(widths) > 1:
            raise DataError(f"{self.path} mixes token sizes: {widths[2]} has 2 bytes a token, {widths[4]} has 4")
        self.itemsize = next(iter(widths), 2)
        self.shards = []
        for file in files:
            size, index = file.stat().st_size, Path(f"{file}.index")
            tokens = metadata[file][1]
            tokens = size // self.itemsize if tokens is None else tokens
            documents = index.stat().st_size // 8 if index.is_file() else 1
            self.shards.append(Shard(file.name, tokens, documents))
        self.eos_token_id = None
        self.vocab_size = self.max_token_id = self.text_bytes = self.tokenizer_sha256 = None
        names = json.dumps([(file.name, file.stat().st_size) for file in files])
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()
        if files:
            logging.getLogger("smoljax").warning(
                f"{self.path} has no manifest.json: read as datatrove's own shards, {8 * self.itemsize} bits a token, "
                "sizes checked but not hashes, and the tokenizer not known"
            )

    def _read_metadata(self, file: Path) -> tuple[int | None, int | None]:
        """(bytes a token, tokens) from datatrove's .ds.metadata: `tokenizer|bytes`, the count, the count for people."""
        metadata = Path(f"{file}.metadata")
        if not metadata.is_file():
            return None, None
        try:
            first, count, *_ = metadata.read_text().split("\n")
            width = int(first.rpartition("|")[2])
            if width not in WIDTH.values():
                raise ValueError(f"{width} bytes a token")
            return width, int(count)
        except ValueError as e:
            raise DataError(
                f"{metadata} is not datatrove's metadata ({e}): expected `tokenizer|2`, then a count"
            ) from None

    def _check_sizes(self, shard: Shard) -> None:
        file, index = self.path / shard.file, self.path / f"{shard.file}.index"
        if not file.is_file():
            raise DataError(f"{file} is missing: {REPAIR}")
        size, expected = file.stat().st_size, shard.tokens * self.itemsize
        if size != expected:
            raise DataError(
                f"{file} has {size} bytes, expected {expected} ({shard.tokens} tokens of {self.itemsize}): {REPAIR}"
            )
        if not index.is_file():
            if shard.sha256 is None:
                return
            raise DataError(f"{index} is missing: {REPAIR}")
        if (size := index.stat().st_size) != shard.documents * 8 or not size:
            raise DataError(f"{index} has {size} bytes, expected {shard.documents} document ends of 8 bytes: {REPAIR}")
        with open(index, "rb") as f:
            f.seek(-8, 2)
            end = int.from_bytes(f.read(), "little")
        if end != shard.tokens:
            raise DataError(f"{index} ends at token {end}, but {file.name} has {shard.tokens} tokens: {REPAIR}")

    def __getstate__(self):
        return self.__dict__ | {"_maps": {}}  # a worker process maps the files itself

    def _map(self, name: str, dtype: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.memmap(self.path / name, dtype, mode="r")
        return self._maps[name]

    def _parts(self, start: int, stop: int):
        """Yield (shard, start, stop) in each shard's own tokens for the stream's [start, stop)."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        i = bisect_right(self._ends, start)
        while start < stop:
            shard, first = self.shards[i], self._ends[i] - self.shards[i].tokens
            end = min(stop, self._ends[i])
            yield shard, start - first, end - first
            start, i = end, bisect_right(self._ends, end)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int32."""
        out = np.empty(stop - start if stop > start else 0, np.int32)
        done = 0
        for shard, a, b in self._parts(start, stop):
            part = self._map(shard.file, f"<u{self.itemsize}")[a:b]
            if self.itemsize == 4 and part.max() >= 1 << 31:  # int32 would wrap it to a negative id
                raise DataError(f"{self.locate(start + done + int(part.argmax()))}, is {part.max()}: not a token id")
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def segments(self, start: int, stop: int) -> np.ndarray:
        """The document of each token of [start, stop), int32: 1, 2, 3, ... counted within the window.

        Borders come from the index, never from the EOS token: text may contain `<|endoftext|>`.
        """
        first = np.zeros(stop - start if stop > start else 0, np.int32)  # 1 where a document begins
        done = 0
        for shard, a, b in self._parts(start, stop):
            first[done] = 1  # a window or a shard begins here
            if (self.path / f"{shard.file}.index").is_file():
                ends = self._map(f"{shard.file}.index", "<u8")
                low, high = np.searchsorted(ends, np.array([a, b], np.uint64), side="left")
                borders = np.asarray(ends[low:high], np.int64) - a  # an end is the next document's beginning
                first[done + borders] = 1
            done += b - a
        return np.cumsum(first, dtype=np.int32)

    def locate(self, position: int) -> str:
        """Where token `position` of the stream lies, for an error message."""
        shard, offset, _ = next(self._parts(position, position + 1))
        return f"{self.path / shard.file}, token {offset}"

    def sample(self) -> str:
        """A hash of 16 evenly spaced blocks of each shard: whether it was written anew, without reading all of it."""
        seen = hashlib.sha256()
        for shard in self.shards:
            with open(self.path / shard.file, "rb") as f:
                for i in range(16):
                    f.seek(shard.tokens * self.itemsize * i // 16)
                    seen.update(f.read(4096))
        return seen.hexdigest()

    def verify(self) -> None:
        """Hash every shard and index against the manifest: a DataError names the first that differs."""
        if any(shard.sha256 is None for shard in self.shards):
            raise DataError(f"{self.path} has no manifest.json, so there are no hashes to verify")
        for shard in self.shards:
            for name, expected in (shard.file, shard.sha256), (f"{shard.file}.index", shard.index_sha256):
                if (found := sha256(self.path / name)) != expected:
                    raise DataError(
                        f"{self.path / name} has changed (sha256 {found[:12]}, manifest.json says {expected[:12]}): "
                        "restore it, or delete the folder and prepare the text again"
                    )


def sha256(path: str | Path) -> str:
    """The hash of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
