"""Text to token ids: SmolLM's kind of tokenizer, trained or loaded. Thin over Hugging Face's `tokenizers`.

SmolLM and SmolLM2 share one byte-level BPE (49,152 ids, 17 special tokens first). Before merging, text is cut into
single digits, then into words by GPT-2's pattern. The published vocabulary lacks 21 of the 256 bytes and drops them
from the text without a word (see `missing_bytes`); one trained here has all 256, so decode(encode(text)) == text.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from smoljax import atomic, tokenizer_file
from smoljax.errors import DataError, UsageError

EOS = "<|endoftext|>"
# The published ids 0..16, in this order.
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"]
SPECIAL_TOKENS += ["<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"]
SPECIAL_TOKENS += ["<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]
SMALLEST = len(SPECIAL_TOKENS) + 256  # the special tokens and every byte, before the first merge


def new() -> Tokenizer:
    """An untrained tokenizer with SmolLM's pre-tokenizer and decoder."""
    tokenizer = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # "a 42" -> "a", " ", "4", "2"
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Learn `vocab_size` byte-level BPE ids from texts and write them to `path`; the same texts give the same file."""
    check_vocab_size(vocab_size)
    tokenizer = new()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # With too little text there are fewer merges to learn than ids asked for; a model of vocab_size would then
    # hold rows that no text can reach.
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(
            f"the text gives a vocabulary of {found} at most, not {vocab_size}: add text or ask for {found}"
        )
    tokenizer.save(str(path))
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST:
        raise UsageError(
            f"a vocabulary of {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes take "
            f"{SMALLEST}; give {SMALLEST} or more"
        )


def find(path: str | Path) -> Path:
    """The tokenizer.json that `path` is or holds."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}: expected a tokenizer.json or a folder that holds one")
    return file


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder."""
    file = find(path)
    try:
        if (size := file.stat().st_size) <= tokenizer_file.SIZE_LIMIT:
            return parse(file.read_bytes(), str(file))
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror})") from None
    raise DataError(f"{file} has {size:,} bytes, expected a tokenizer.json of at most {tokenizer_file.SIZE_LIMIT:,}")


def parse(content: bytes, name: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json, which may be hostile: what could hang, crash or flood later is refused here.

    `tokenizers` itself refuses merges that name unknown tokens. It accepts the rest, and panics on some of it.
    """
    try:
        added = tokenizer_file.check(content)
        tokenizer = Tokenizer.from_buffer(content)
        # A tokenizer.json may ask for either, and would silently cut documents or put padding into prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for token, id in added:
            if tokenizer.token_to_id(token) != id:  # it numbers them itself, from the vocabulary's size on
                raise DataError(f"an added token {token[:60]!r} with id {id}, which leaves a hole before it")
        tokenizer.decode(tokenizer.encode("Hi 12,\n\t é\u0301 東京 🤖 \0").ids, skip_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # `tokenizers` raises bare Exception, and its panics are not even that
        words = "".join(c if c.isprintable() else " " for c in str(e)[:400])
        what = f"holds {words}" if isinstance(e, DataError) else f"is not a tokenizer.json that can be read ({words})"
        raise DataError(f"{name} {what}") from None
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> int:
    """The rows that an embedding needs: the largest id and one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_fits(tokenizer: Tokenizer, config, name: str) -> None:
    """A DataError where the tokenizer has ids that the model has no rows for."""
    if (rows := vocabulary(tokenizer)) > config.vocab_size:
        first = min((id, token) for token, id in tokenizer.get_vocab().items() if id >= config.vocab_size)
        raise DataError(
            f"{name} has ids up to {rows - 1}, but the model has rows for {config.vocab_size}: it is another model's, "
            f"or one to which the token {first[1][:60]!r} was added without a row"
        )


def same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids, though another program may have written one of them anew."""

    def rules(tokenizer):
        content = json.loads(tokenizer.to_str())
        return [content[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")]

    return rules(one) == rules(other)


def copy(source: str | Path, folder: Path) -> None:
    """tokenizer.json, and the chat template and settings that lie beside it, into a folder."""
    source = find(source)
    atomic.copy(source, folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        if source.with_name(name).is_file():
            atomic.copy(source.with_name(name), folder / name)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of text that each id of a byte-level tokenizer stands for, special tokens none; None for other kinds."""
    if (json.loads(tokenizer.to_str())["decoder"] or {}).get("type") != "ByteLevel":
        return None
    lengths = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    for token, id in tokenizer.get_vocab().items():
        lengths[id] = len(token)  # a symbol a byte
    for id, token in tokenizer.get_added_tokens_decoder().items():
        lengths[id] = 0 if token.special else len(token.content.encode())
    return lengths


def missing_bytes(tokenizer: Tokenizer) -> list[int]:
    """The bytes that a byte-level tokenizer has no id for, and so drops; [] for other kinds of tokenizer."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    if decoder.get("type") != "ByteLevel":
        return []
    # GPT-2's byte symbols: a printable byte stands for itself, the others for 256, 257, ... in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [byte for byte in range(256) if tokenizer.token_to_id(symbol[byte]) is None]
