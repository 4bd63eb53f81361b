"""Token shards written without smoljax, straight from the format: what the tests of data and programs read."""

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer, decoders, models


def tokenizer(vocab_size: int) -> str:
    """A byte-level tokenizer.json without merges: 0 is <|endoftext|>, then a, aa, aaa, b, bb, ..."""
    words = {"<|endoftext|>": 0} | {chr(0x61 + (i - 1) // 3) * length(i): i for i in range(1, vocab_size)}
    built = Tokenizer(models.BPE(words, []))
    built.add_special_tokens(["<|endoftext|>"])
    built.decoder = decoders.ByteLevel()
    return built.to_str()


def length(token: int) -> int:
    """Bytes of text that a token stands for: 1, 2 or 3; 0 for the end of text."""
    return 1 + (token - 1) % 3 if token else 0


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
        content = {
            "format": "smoljax-shards",
            "version": 1,
            "dtype": "uint16",
            "vocab_size": vocab_size,
            "eos_token_id": 0,
        }
        content |= {
            "eos_token_id": 0,
            "max_token_id": max(max(d) for d in docs),
            "text_bytes": sum(length(t) for d in docs for t in d),
        }
        content |= {k: sum(e[k] for e in entries) for k in ("tokens", "documents")}
        content |= {"tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(), "shards": entries}
        (folder / "manifest.json").write_text(json.dumps(content))
    return folder
