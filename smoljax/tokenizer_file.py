"""What a tokenizer.json may hold: one comes with a model's files, and may be hostile.

Checked before `tokenizers` reads it, and in little memory. A sentence here begins after the file's name and "holds".
"""

import collections
import json

from smoljax.errors import DataError

# What a tokenizer.json may have. Llama 3's, the largest of this kind of model, has 17 MB, 128,256 tokens and 280,147
# merges, each merge a list; SmolLM's 2 to 3.5 MB.
SIZE_LIMIT, SYMBOL_LIMITS = 18 << 20, {b"{": 50_000, b"[": 400_000, b",": 1_000_000, b":": 350_000}
VOCAB_LIMIT, ADDED_LIMIT, TOKEN_LIMIT = 300_000, 10_000, 1024  # the last in characters
PARTS = {
    "normalizer": "Sequence Replace Prepend Strip StripAccents Lowercase BertNormalizer NFC NFD NFKC NFKD".split(),
    "pre_tokenizer": "Sequence Split Digits ByteLevel Metaspace Punctuation Whitespace WhitespaceSplit".split(),
    "post_processor": "Sequence TemplateProcessing ByteLevel RobertaProcessing BertProcessing".split(),
    "decoder": "Sequence ByteLevel Replace ByteFallback Fuse Strip Metaspace BPEDecoder".split(),
}
REPEATABLE = {"Replace", "Split", "Punctuation", "Digits", "Strip"}
# The regular expressions of GPT-2, GPT-4, Llama 3 and Qwen 2: in linear time on any text. `[ab]*(?!c)(?<=d)` is not.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    _HEAD + r"\p{N}{1,3}" + _TAIL,
    _HEAD + r"\p{N}" + _TAIL,
}


def check(content: bytes) -> list[tuple[str, int]]:
    """The added tokens and their ids in a file that may be read; a DataError, or what JSON raises, where it may not."""
    spec = read_spec(content)
    check_parts(spec)
    return check_ids(spec)


def refuse(bad: bool, what: str):
    if bad:
        raise DataError(what)


def read_spec(content: bytes) -> dict:
    refuse(len(content) > SIZE_LIMIT, f"{len(content):,} bytes, expected at most {SIZE_LIMIT:,}")
    for symbol, limit in SYMBOL_LIMITS.items():  # before any of them takes memory
        found = content.count(symbol)
        refuse(found > limit, f"{found:,} times {symbol.decode()!r}, expected at most {limit:,}")

    def unique(pairs):
        refuse(len(found := dict(pairs)) != len(pairs), "an object with the same key twice")  # readers differ on it
        return found

    spec = json.loads(content.decode(), object_pairs_hook=unique)
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError("no object with a model")
    return spec


def check_parts(spec: dict) -> None:
    """Only known parts, each at most once where twice would multiply text; only known patterns."""
    model, kind = spec["model"], spec["model"].get("type", "BPE")
    refuse(kind not in ("BPE", "Unigram", "WordLevel"), f"a {str(kind)[:60]!r}, expected BPE, Unigram or WordLevel")
    refuse("type" not in model and "merges" not in model, "a model without a type")  # `tokenizers` would guess
    refuse(bool(model.get("dropout")), "dropout, by which a text has other ids each time; set it to null")
    # With a prefix that is not before every merge's second token, `tokenizers` 0.23 aborts the process.
    refuse(bool(model.get("continuing_subword_prefix")), "a continuing_subword_prefix, expected none")
    suffix = str(model.get("end_of_word_suffix") or "")
    refuse(len(suffix) > 16, f"an end_of_word_suffix of {len(suffix):,} characters, which every word would get")
    for section, known in PARTS.items():
        used, growth = collections.Counter(), 1
        for part in flat(spec.get(section), section):
            kind = str(part.get("type"))
            refuse(kind not in known, f"a {section} {kind[:60]!r}, expected one of {', '.join(known)}")
            used[kind] += 1
            growth *= max(1, *(len(str(part.get(key, ""))) for key in ("content", "prepend")))
            much = (used[kind] > 1 and kind not in REPEATABLE) or used.total() > 16 or growth > 64
            refuse(much, f"a {section} of {used.total()} parts, {used[kind]} of them {kind}, that may flood the memory")
            refuse(part.get("stop", 0) != 0, f"a {section} {kind} with stop {str(part.get('stop'))[:60]}, expected 0")
            for key in ("single", "pair"):
                refuse(len(part.get(key) or ()) > 32, f"a {section} {kind} that adds {len(part.get(key) or ())} tokens")
            pattern = part.get("pattern")
            refuse(pattern in ("", {"String": ""}), f"a {section} {kind} with an empty pattern")
            if isinstance(pattern, dict) and "Regex" in pattern:
                sentence = f"a {section} {kind} by the pattern {str(pattern['Regex'])[:100]!r}, which may take forever"
                refuse(
                    pattern["Regex"] not in PATTERNS, f"{sentence}; expected GPT-2's, GPT-4's, Llama 3's or Qwen 2's"
                )


def flat(part, section: str) -> list[dict]:
    """A section's parts, those of a Sequence after it; each must be an object, as `tokenizers` guesses no more then."""
    if part is None:
        return []
    refuse(not isinstance(part, dict), f"a {section} part that is no object")
    parts = [part]
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        for inner in part.get(key) or ():
            refuse(not isinstance(inner, dict) or inner.get("type") == "Sequence", f"a {section} that is nested twice")
            parts.append(inner)
    return parts


def check_ids(spec: dict) -> list[tuple[str, int]]:
    """One id for each token, not far apart, the same wherever the file names them; the added tokens and theirs."""
    model, added, post = spec["model"], spec.get("added_tokens") or [], spec.get("post_processor") or {}
    own = model.get("vocab") or {}
    vocab = {token: i for i, (token, _) in enumerate(own)} if isinstance(own, list) else dict(own)
    named = [(token["content"], token["id"]) for token in added]
    vocab |= {token: id for token, id in named if token not in vocab}
    n, merges = len(vocab), len(model.get("merges") or ())
    refuse(n > VOCAB_LIMIT, f"{n:,} tokens, expected at most {VOCAB_LIMIT:,}")
    refuse(merges > 4 * n, f"{merges:,} merges for {n:,} tokens, expected about as many of both")
    refuse(len(added) > ADDED_LIMIT, f"{len(added):,} added tokens, expected at most {ADDED_LIMIT:,}")
    longest = max(map(len, vocab), default=0)
    refuse(longest > TOKEN_LIMIT, f"a token of {longest:,} characters, expected at most {TOKEN_LIMIT:,}")
    refuse(len(set(vocab.values())) != n, "two tokens of the same id")
    top = max(vocab.values(), default=0)
    refuse(top >= max(2 * n, 1024), f"an id of {top:,} among {n:,} tokens, expected ids without large holes")
    unknown = model.get("unk_token")
    refuse(bool(unknown) and unknown not in vocab, f"unk_token {str(unknown)[:60]!r}, which is not in its vocab")
    others = list(named)
    for part in post.get("processors", [post]):
        others += [part[key] for key in ("sep", "cls") if key in part]
        for token in part.get("special_tokens", {}).values():
            refuse(len(token["ids"]) > 32, f"a post_processor token that stands for {len(token['ids'])}")
            others += zip(token["tokens"], token["ids"], strict=True)
    for token, id in others:
        is_ = vocab.get(token, "none")
        refuse(is_ != id, f"token {token[:60]!r} with id {str(id)[:60]}, where its vocab has {is_}")
    return named
