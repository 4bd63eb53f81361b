"""A tokenizer, its settings and its chat template in a GGUF file's keys, in and out."""

import json
import logging

import gguf
import numpy as np

from smoljax import chat, companions, tokenizer
from smoljax.config import Model
from smoljax.errors import DataError
from smoljax.exchange import Source
from smoljax.gguf_header import Header, show
from smoljax.hf_config import parse_json
from smoljax.tokenizer_file import ADDED_LIMIT, VOCAB_LIMIT

MAX_WORDS = 4 << 20  # bytes of all tokens, or of all merges; SmolLM's have 0.3 MB each
CONTROL, USER_DEFINED, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED

log = logging.getLogger("smoljax")


def read_files(header: Header, config: Model) -> dict[str, bytes]:
    """What would lie beside a Hugging Face model: name -> content."""
    get, files = header.value, {}
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    files["generation_config.json"] = companions.to_json({k: v for k, v in ids.items() if v is not None})
    if (template := get("tokenizer.chat_template", str, None)) is not None:
        files["chat_template.jinja"] = template.encode()
    kind, pre = get("tokenizer.ggml.model", str, "none"), get("tokenizer.ggml.pre", str, "none")
    if (kind, pre) != ("gpt2", "smollm"):
        log.warning(
            f"{header.path}: the tokenizer is {show(kind)} with the pre-tokenizer {show(pre)}; only SmolLM's ('gpt2' "
            "with 'smollm') can be rebuilt, so the model comes without one"
        )
        return files
    words = read_tokenizer(header)
    tokenizer.check_fits(words, config, f"{header.path}: tokenizer.ggml.tokens")
    files["tokenizer.json"] = words.to_str(pretty=True).encode()
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings}
    for name, id in ids.items():
        id = id[0] if isinstance(id, tuple) else id
        settings[name.removesuffix("_id")] = None if id is None else words.id_to_token(id)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as in companions.py
    if (unknown := get("tokenizer.ggml.unknown_token_id", int, None)) is not None:
        settings["unk_token"] = words.id_to_token(unknown) if 0 <= unknown < config.vocab_size else None
    if template is not None:
        settings["chat_template"] = template
    files["tokenizer_config.json"] = companions.to_json(settings)
    return files


def read_tokenizer(header: Header):
    """SmolLM's kind of tokenizer from the vocabulary and the merges; what is wrong is said while they are bytes."""
    get, fail, prefix = header.value, header.fail, "tokenizer.ggml."
    tokens, merges = get(f"{prefix}tokens", list), get(f"{prefix}merges", list, [])
    types = get(f"{prefix}token_type", np.ndarray, np.ones(len(tokens), np.int32)).tolist()
    for key, found in (("tokens", tokens), ("merges", merges)):
        if (size := sum(map(len, found))) > MAX_WORDS or len(found) > VOCAB_LIMIT:
            fail(f"{prefix}{key} has {len(found):,} entries of {size:,} bytes, expected at most {MAX_WORDS:,} bytes")
    if len(types) != len(tokens):
        fail(f"{prefix}token_type has {len(types):,} entries, expected one for each of {len(tokens):,} tokens")
    added = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    if len(added) > ADDED_LIMIT:
        fail(f"{prefix}token_type has {len(added):,} special tokens, expected at most {ADDED_LIMIT:,}")
    # llama.cpp wants a token for each of the model's rows; its converter fills the rest with these.
    padding = {i for i, kind in enumerate(types) if kind == UNUSED and tokens[i] == b"[PAD%d]" % i}
    vocab = {token: i for i, token in enumerate(tokens) if i not in padding}
    if len(vocab) + len(padding) != len(tokens):
        fail(f"{prefix}tokens holds a token twice")
    for merge in merges:
        one, _, two = merge.partition(b" ")
        if merge.count(b" ") != 1 or not (one in vocab and two in vocab and one + two in vocab):
            fail(f"{prefix}merges holds {show(merge)}, expected two tokens that make a third, a space between them")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = json.loads(tokenizer.new().to_str())
    spec["model"]["vocab"] = {token.decode(): i for token, i in vocab.items()}
    spec["model"]["merges"] = [merge.decode() for merge in merges]
    spec["added_tokens"] = [
        {"id": i, "content": tokens[i].decode(), **plain, "special": types[i] == CONTROL} for i in added
    ]
    return tokenizer.parse(json.dumps(spec, ensure_ascii=False).encode(), f"{header.path}: its tokenizer")


def add_tokenizer(writer: gguf.GGUFWriter, source: Source):
    """tokenizer.json, the chat template and the model's special ids, as llama.cpp's converter writes them."""
    config, files, name = source.config, source.files, f"{source.name}: tokenizer.json"
    if "tokenizer.json" not in files:
        raise DataError(f"{source.name} has no tokenizer.json, and llama.cpp loads no model without a tokenizer")
    words = tokenizer.parse(files["tokenizer.json"], name)
    tokenizer.check_fits(words, config, name)
    spec = json.loads(words.to_str())
    check_rules(spec, name)
    if spec["model"].get("unk_token") and tokenizer.missing_bytes(words):
        raise DataError(f"{name} gives unk_token for bytes that it has no token for; llama.cpp drops them")
    tokens, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    for token, id in words.get_vocab().items():
        tokens[id], types[id] = token, gguf.TokenType.NORMAL
    for token in spec["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if any(token[key] for key in ("lstrip", "rstrip", "single_word")):
            log.warning(f"{name}: llama.cpp has no lstrip, rstrip or single_word; lost of {token['content'][:60]!r}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    if len(ends) > 3:
        log.warning(f"{source.name}: eos_token_id is {list(ends)}; GGUF has keys for three, so the others are lost")
    ids = {"bos": config.bos_token_id, **dict(zip(("eos", "eot", "eom"), ends, strict=False))}
    settings = parse_json(files.get("tokenizer_config.json", b"{}"), f"{source.name}: tokenizer_config.json")
    unknown = settings.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    ids |= {"padding": config.pad_token_id, "unknown": words.token_to_id(unknown) if type(unknown) is str else None}
    for key, id in ids.items():
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if (template := chat.own(files)) is not None:
        writer.add_chat_template(template)


def check_rules(spec: dict, name: str):
    """A DataError unless a tokenizer.json cuts and merges text as llama.cpp does for "smollm"."""

    def rules(spec):
        part = spec["pre_tokenizer"] or {}
        steps = [{k: v for k, v in s.items() if k != "trim_offsets"} for s in part.get("pretokenizers", [part])]
        fixed = {key: spec["model"].get(key) or False for key in ("byte_fallback", "ignore_merges")}
        return {"pre_tokenizer": steps, "normalizer": spec["normalizer"], "type": spec["model"]["type"], **fixed}

    theirs, ours = rules(spec), rules(json.loads(tokenizer.new().to_str()))
    odd = [key for key, value in ours.items() if theirs[key] != value]
    if (spec["post_processor"] or {}).get("type", "ByteLevel") != "ByteLevel":
        odd.append("post_processor")
    if odd:
        raise DataError(
            f"{name} has another {odd[0]} than SmolLM's (byte-level BPE after single digits, nothing added), and "
            "llama.cpp has no such pre-tokenizer"
        )
    if any(" " in token for merge in spec["model"]["merges"] for token in merge) or not spec["model"]["merges"]:
        raise DataError(f"{name} has no merges, or one of a token with a space, which GGUF cannot hold")
