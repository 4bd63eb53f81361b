"""Which tokens are special, from one source for every verb and format: the files that lie beside a model.

The tokenizer with all of them in it, the texts that a chat template sees, the ids that end a text. The files are read
as in transformers (5.24, tokenization_utils_base.py, `_from_pretrained`).
"""

import dataclasses
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from smoljax import tokenizer, tokenizer_file
from smoljax.errors import DataError
from smoljax.hf_config import parse_json
from smoljax.tokenizer_file import ADDED_LIMIT

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SETTINGS = "tokenizer_config.json"
# Texts of tokens that end a turn or a generation, as llama.cpp knows them (llama-vocab.cpp, special_eog_ids).
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>")
TURN_ENDS += ("_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|return|>")
TURN_ENDS += ("<|call|>", "<|flush|>", "<|calls|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[")


@dataclasses.dataclass(frozen=True)
class Named:
    """What the small files say of special tokens."""

    texts: dict[str, str | None]  # eos_token -> its text; None where they say that there is none
    extra: list[str]  # special ones without a name
    flags: dict[str, dict]  # of those that are given as objects, by their text
    added: list[tuple[int, dict, str]]  # (id, {"content": text, flags}, the file that says so)
    alone: bool  # whether tokenizer_config.json has added_tokens_decoder, beside which no other file counts


def read(files: dict[str, bytes]) -> Named:
    """tokenizer_config.json; beside one without added_tokens_decoder, special_tokens_map.json and added_tokens.json."""
    settings = parse_json(files.get(SETTINGS, b"{}"), SETTINGS)
    if settings.get("split_special_tokens"):
        raise DataError(f"{SETTINGS} says split_special_tokens, by which a template's own tokens are cut up; remove it")
    alone = "added_tokens_decoder" in settings
    theirs = {} if alone else parse_json(files.get("special_tokens_map.json", b"{}"), "special_tokens_map.json")
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = theirs.get("extra_special_tokens") or ([] if extra else theirs.get("additional_special_tokens")) or []
    named = dict((settings | theirs).get("model_specific_special_tokens") or {})
    named |= {key: value for key, value in (settings | theirs).items() if key in NAMES or is_token(key, value)}
    others = []
    for each in (extra, more):
        if not isinstance(each, list | dict) or len(each) > ADDED_LIMIT:
            raise DataError(f"{SETTINGS} has extra special tokens {str(each)[:60]}, expected at most {ADDED_LIMIT:,}")
        named |= each if isinstance(each, dict) else {}
        others += each if isinstance(each, list) else []
    texts = {key: None if value in (None, "") else text(value, key) for key, value in named.items()}
    objects = [value for value in (*named.values(), *others) if isinstance(value, dict)]
    others = [text(value, "a special token") for value in others]
    flags = {value["content"]: flags_of(value | {"special": True}, SETTINGS) for value in objects}
    file, decoder = SETTINGS, settings.get("added_tokens_decoder")
    if not alone:
        file, special = "added_tokens.json", {*texts.values(), *others}
        decoder = {}
        for content, id in parse_json(files.get(file, b"{}"), file).items():
            decoder[id] = {"content": content, "special": content in special, "normalized": content not in special}
    if not isinstance(decoder, dict) or len(decoder) > ADDED_LIMIT:
        raise DataError(f"{file} has added tokens {str(decoder)[:60]}, expected at most {ADDED_LIMIT:,} by their ids")
    added = [(whole(id, file), flags_of(token, file), file) for id, token in decoder.items()]
    return Named(texts, others, flags, added, alone)


def is_token(key: str, value) -> bool:
    """A name of the model's own, such as image_token."""
    written = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return key.endswith("_token") and (isinstance(value, str) or written)


def text(value, name: str) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        raise DataError(f"{SETTINGS} or special_tokens_map.json: {name} is {value!r:.60}, expected a token's text")
    return value


def whole(id, file: str) -> int:
    try:
        return int(id)
    except (TypeError, ValueError):
        raise DataError(f"{file} has an added token of the id {id!r:.60}, expected a whole number") from None


def flags_of(token, file: str) -> dict:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
        raise DataError(f"{file} has the added token {str(token)[:60]}, expected an object with its content")
    special = token.get("special", False)
    flags = dict.fromkeys(FLAGS, False) | {"normalized": not special} | {k: token[k] for k in FLAGS if k in token}
    return {"content": token["content"]} | flags


def complete(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """The files with a tokenizer.json that has every token which the others name, so that none is ever cut up.

    As in transformers their flags hold. A token that would get another id than its file says is a DataError.
    """
    if "tokenizer.json" not in files:
        return files
    named = read(files)
    if not (any(named.texts.values()) or named.extra or named.added):
        return files
    content, where = files["tokenizer.json"], f"{folder}: tokenizer.json"
    try:
        added = tokenizer_file.read_spec(content).get("added_tokens") or ()
        had = {token["content"]: token for token in added}
    except Exception:  # a sentence then, which takes reading all of it: 0.3 s
        tokenizer.parse(content, where)
        raise
    names = sorted(named.texts, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))
    texts = [named.texts[name] for name in names if named.texts[name]]
    told = sorted(named.added, key=lambda entry: entry[0])
    told += [] if named.alone else [(token["id"], token, SETTINGS) for token in had.values()]
    missing, known = [], {*had}
    for id, token, file in told:
        own = had.get(token["content"])
        known.add(token["content"])
        special = token["special"] or token["content"] in texts or (own or token)["special"]
        token = {key: token[key] for key in ("content", *FLAGS)} | {"special": special}
        missing += [] if own == token | {"id": id} else [(id, token, file)]
    plain = dict.fromkeys(FLAGS, False) | {"special": True}
    for name in dict.fromkeys([*texts, *named.extra]):
        if name not in known:
            missing.append((None, named.flags.get(name, plain | {"content": name}), SETTINGS))
    if not missing:
        return files
    words = tokenizer.parse(content, where)
    for id, token, file in missing:
        words.add_tokens([AddedToken(**token)])
        given = words.token_to_id(token["content"])
        if id not in (None, given):
            raise DataError(
                f"{folder}: {file} says that token {token['content'][:60]!r} has id {id}, by tokenizer.json it has "
                f"{given}; mend one of the two"
            )
    return files | {"tokenizer.json": words.to_str(pretty=True).encode()}


def tokenizer_json(path: str | Path) -> bytes:
    """A tokenizer.json completed by the small files beside it; or a file of another name as it is."""
    file = tokenizer.find(path)
    small = (SETTINGS, "special_tokens_map.json", "added_tokens.json") if file.name == "tokenizer.json" else ()
    try:
        files = {name: file.with_name(name).read_bytes() for name in small if file.with_name(name).is_file()}
        return complete(files | {"tokenizer.json": file.read_bytes()}, str(file.parent))["tokenizer.json"]
    except OSError as e:
        raise DataError(f"{e.filename} cannot be read ({e.strerror})") from None


def seen(files: dict[str, bytes], config, words: Tokenizer) -> dict[str, str]:
    """What a chat template sees of special tokens: name -> text, as transformers' special_tokens_map.

    Of bos, eos and pad that no file speaks of, the config's own ids.
    """
    named = read(files).texts
    for name in ("bos_token", "eos_token", "pad_token"):
        ids = model_ids(getattr(config, f"{name}_id"))
        named.setdefault(name, words.id_to_token(ids[0]) if ids else None)
    return {name: text for name, text in named.items() if text is not None}


def id_of(name: str, files: dict[str, bytes], config, words: Tokenizer) -> int | None:
    """The id of the tokenizer's own bos_token, eos_token, ...; None where it has none."""
    text = seen(files, config, words).get(name)
    return None if text is None else words.token_to_id(text)


def ends(files: dict[str, bytes], config, words: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end a text: the model's own, then the tokenizer's eos."""
    model = model_ids(config.eos_token_id)
    own = None if words is None else id_of("eos_token", files, config, words)
    return model if own is None or own in model else (*model, own)


def model_ids(ids) -> tuple[int, ...]:
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)


def around(words: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and behind a plain text."""
    plain, whole = (words.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def contradictions(files: dict[str, bytes], config, words: Tokenizer) -> list[str]:
    """Sentences: where files differ on a special token, and which holds."""
    named, found = read(files).texts, []
    for name, holds in (("bos_token", "the former is used"), ("eos_token", "both end a text")):
        ids = model_ids(getattr(config, f"{name}_id"))
        if named.get(name) and ids and (own := words.token_to_id(named[name])) not in ids:
            found.append(
                f"{name} is {named[name]!r:.60} ({own}) in the tokenizer's files, {', '.join(map(str, ids))} in the "
                f"model's config; {holds}"
            )
    settings = parse_json(files.get(SETTINGS, b"{}"), SETTINGS)
    for name, ids in zip(("add_bos_token", "add_eos_token"), around(words), strict=True):
        if settings.get(name) not in (None, bool(ids)):
            found.append(
                f"{name} is {settings[name]} in {SETTINGS}, and by tokenizer.json a plain text gets "
                f"{ids or 'none'}; as in transformers, the latter holds"
            )
    return found
