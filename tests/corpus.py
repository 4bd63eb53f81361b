"""Token shards written without smoljax, straight from the format: what the tests of data and programs read."""

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer, models


def tokenizer(vocab_size: int) -> str:
    """tokenizer.json of a vocabulary without merges: 0 is <|endoftext|>, then w1, w2, ..."""
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    return Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")).to_str()


def documents(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Documents of 1 to 60 tokens that end with 0; most tokens are the one before plus 1, which can be learned."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        steps = np.where(rng.random(rng.integers(0, 60)) < 0.9, 1, rng.integers(1, vocab_size))
        out.append([*(1 + (rng.integers(vocab_size) + np.cumsum(steps)) % (vocab_size - 1)).tolist(), 0])
    return out


def write(folder, docs: list[list[int]], vocab_size: int, files: int = 2, manifest: bool = True):
    """A folder of shards as `smoljax prepare` leaves it, or as datatrove does (manifest=False)."""
    folder.mkdir(parents=True)
    text = tokenizer(vocab_size)
    (folder / "tokenizer.json").write_text(text)
    entries = []
    for i in range(files):
        part = docs[i * len(docs) // files : (i + 1) * len(docs) // files]
        file = folder / f"{i:05d}.ds"
        np.concatenate([np.array(d, "<u2") for d in part]).tofile(file)
        np.cumsum([len(d) for d in part]).astype("<u8").tofile(f"{file}.index")
        hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in (file, folder / f"{file.name}.index")]
        entry = {"file": file.name, "tokens": sum(map(len, part)), "documents": len(part)}
        entries.append(entry | {"sha256": hashes[0], "index_sha256": hashes[1]})
    if manifest:
        content = {"format": "smoljax-shards", "version": 1, "dtype": "uint16", "vocab_size": vocab_size}
        content |= {"max_token_id": max(max(d) for d in docs), "text_bytes": 4 * sum(map(len, docs))}
        content |= {k: sum(e[k] for e in entries) for k in ("tokens", "documents")}
        content |= {"tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(), "shards": entries}
        (folder / "manifest.json").write_text(json.dumps(content))
    return folder
