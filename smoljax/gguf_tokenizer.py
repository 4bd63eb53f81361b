"""A tokenizer, its settings and its chat template in a GGUF file's keys, in and out."""

import json
import logging

import gguf
import numpy as np

from smoljax import chat, companions, special_tokens, tokenizer
from smoljax.config import Model
from smoljax.errors import DataError
from smoljax.exchange import Source
from smoljax.gguf_header import Header, show
from smoljax.hf import some
from smoljax.special_tokens import TURN_ENDS
from smoljax.tokenizer_file import ADDED_LIMIT, VOCAB_LIMIT

MAX_WORDS = 4 << 20  # bytes of all tokens, or of all merges; SmolLM's have 0.3 MB each
CONTROL, USER_DEFINED, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
UNKNOWN = gguf.TokenType.UNKNOWN
WHOLE = (CONTROL, USER_DEFINED, UNKNOWN)  # the types that llama.cpp looks for in a text before it merges
PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
NAMES |= {"sep_token": "seperator", "cls_token": "cls", "mask_token": "mask"}  # GGUF spells it so
# What llama.cpp takes for the end of a generation by its text, beside the turns' ends (llama-vocab.cpp).
FIM_ENDS = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>")
FIM_ENDS += ("<REPO>", "<reponame>", "<|file_sep|>")
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # and by these keys

log = logging.getLogger("smoljax")


def read_files(header: Header, config: Model) -> tuple[dict[str, bytes], tuple[int, ...]]:
    """What would lie beside a Hugging Face model, name -> content; and the ids that end a generation by their texts."""
    get, files = header.value, {}
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if len(suppressed := get(f"{PREFIX}suppress_tokens", np.ndarray, np.zeros(0, np.int32))):
        ids["suppress_tokens"] = suppressed.tolist()  # which generate refuses, unless told to leave it aside
    files["generation_config.json"] = companions.to_json({k: v for k, v in ids.items() if v is not None})
    if sampling := [key for key in header.values if key.startswith("general.sampling.")]:
        log.warning(f"{header.path}: {some(sampling)} are not used; give what they say as flags")
    if (template := get(TEMPLATE, str, None)) is not None:
        files["chat_template.jinja"] = template.encode()
    for key in header.values:
        name = key.removeprefix(f"{TEMPLATE}.")
        if name == "default" and template is not None:
            continue  # llama.cpp's default is the key without a name
        if name != key and name.replace("_", "").replace("-", "").isalnum():  # it becomes the name of a file
            files[f"{chat.MORE}{name}.jinja"] = get(key, str).encode()
    kind, pre = get("tokenizer.ggml.model", str, "none"), get("tokenizer.ggml.pre", str, "none")
    if (kind, pre) != ("gpt2", "smollm"):
        log.warning(
            f"{header.path}: the tokenizer is {show(kind)} with the pre-tokenizer {show(pre)}; only SmolLM's ('gpt2' "
            "with 'smollm') can be rebuilt, so the model comes without one"
        )
        return files, ()
    words = read_tokenizer(header)
    tokenizer.check_fits(words, config, f"{header.path}: tokenizer.ggml.tokens")
    files["tokenizer.json"] = words.to_str(pretty=True).encode()
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings}
    for name, key in NAMES.items():
        id = get(f"{PREFIX}{key}_token_id", int, None)
        if id is not None and 0 <= id < config.vocab_size:
            settings[name] = words.id_to_token(id)
    settings |= {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as in companions.py
    if template is not None:
        settings["chat_template"] = template
    files["tokenizer_config.json"] = companions.to_json(settings)
    added = {token.content: id for id, token in words.get_added_tokens_decoder().items()}
    ends = [id for text, id in added.items() if text in (*TURN_ENDS, *FIM_ENDS)]
    ends += [get(f"{PREFIX}{key}_token_id", int, None) for key in END_KEYS]
    return files, tuple(id for id in dict.fromkeys(ends) if id is not None and 0 <= id < config.vocab_size)


def read_tokenizer(header: Header):
    """SmolLM's kind of tokenizer from the vocabulary and the merges; what is wrong is said while they are bytes."""
    get, fail = header.value, header.fail
    tokens, merges = get(f"{PREFIX}tokens", list), get(f"{PREFIX}merges", list, None)
    if merges is None:
        fail(f"{PREFIX}merges is absent, without which every text would be single bytes; convert the model anew")
    types = get(f"{PREFIX}token_type", np.ndarray, np.ones(len(tokens), np.int32)).tolist()
    for key, found in (("tokens", tokens), ("merges", merges)):
        if (size := sum(map(len, found))) > MAX_WORDS or len(found) > VOCAB_LIMIT:
            fail(f"{PREFIX}{key} has {len(found):,} entries of {size:,} bytes, expected at most {MAX_WORDS:,} bytes")
    if len(types) != len(tokens):
        fail(f"{PREFIX}token_type has {len(types):,} entries, expected one for each of {len(tokens):,} tokens")
    # llama.cpp wants a token for each of the model's rows; its converter fills the rest with these.
    padding = {i for i, kind in enumerate(types) if kind == UNUSED and tokens[i] == b"[PAD%d]" % i}
    vocab = {token: i for i, token in enumerate(tokens) if i not in padding}
    if len(vocab) + len(padding) != len(tokens):
        fail(f"{PREFIX}tokens holds a token twice")
    made = set()
    for merge in merges:
        one, _, two = merge.partition(b" ")
        if merge.count(b" ") != 1 or not (one in vocab and two in vocab and one + two in vocab):
            fail(f"{PREFIX}merges holds {show(merge)}, expected two tokens that make a third, a space between them")
        made.add(one + two)
    types = mended(header, tokens, types, made)
    added = [i for i, kind in enumerate(types) if kind in WHOLE]
    if len(added) > ADDED_LIMIT:
        fail(f"{PREFIX}token_type has {len(added):,} special tokens, expected at most {ADDED_LIMIT:,}")
    if not merges and any(len(token.decode()) > 1 for token, i in vocab.items() if types[i] not in (*WHOLE, UNUSED)):
        fail(f"{PREFIX}merges is empty, without which every text would be single bytes; convert the model anew")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = json.loads(tokenizer.new().to_str())
    spec["model"]["vocab"] = {token.decode(): i for token, i in vocab.items()}
    spec["model"]["merges"] = [merge.decode() for merge in merges]
    spec["added_tokens"] = [
        {"id": i, "content": tokens[i].decode(), **plain, "special": types[i] != USER_DEFINED} for i in added
    ]
    spec["post_processor"] = post_processor(header, tokens) or spec["post_processor"]
    return tokenizer.parse(json.dumps(spec, ensure_ascii=False).encode(), f"{header.path}: its tokenizer")


def mended(header: Header, tokens: list[bytes], types: list[int], made: set[bytes]) -> list[int]:
    """The types, with control for tokens that only look like ordinary ones, which llama.cpp overrides likewise.

    Those are: the ones that a key names or that end a generation by their text; and what is written as a special token
    is and no merge makes, for a text would never become it.
    """
    get = header.value
    keys = {get(f"{PREFIX}{key}_token_id", int, None) for key in (*NAMES.values(), *END_KEYS)}
    ends = {text.encode() for text in (*TURN_ENDS, *FIM_ENDS)}
    overridden = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        ordinary = kind in (*WHOLE, UNUSED) or token in made or len(token.decode()) == 1
        written_so = (token[:1], token[-1:]) in ((b"<", b">"), (b"[", b"]"))
        if (token in ends and kind != CONTROL) or (not ordinary and (i in keys or written_so)):
            overridden.append(i)
    if overridden:
        texts = ", ".join(tokens[i].decode() for i in overridden[:4]) + ", ..." * (len(overridden) > 4)
        log.warning(
            f"{header.path}: {len(overridden)} special tokens have the type of ordinary ones, or none ({texts[:200]}); "
            "they are taken for special"
        )
    overridden = set(overridden)
    return [CONTROL if i in overridden else kind for i, kind in enumerate(types)]


def post_processor(header: Header, tokens: list[bytes]) -> dict | None:
    """What stands around a plain text by add_bos_token and add_eos_token, as a tokenizer.json has it."""
    single, special = [{"Sequence": {"id": "A", "type_id": 0}}], {}
    for key, at in (("bos", 0), ("eos", 2)):
        if not header.value(f"{PREFIX}add_{key}_token", bool, False):
            continue
        id = header.value(f"{PREFIX}{key}_token_id", int, None)
        if id is None or not 0 <= id < len(tokens):
            header.fail(f"{PREFIX}add_{key}_token is true, but there is no {key}_token_id to add")
        text = tokens[id].decode()
        single.insert(at, {"SpecialToken": {"id": text, "type_id": 0}})
        special[text] = {"id": text, "ids": [id], "tokens": [text]}
        log.warning(f"{header.path}: by add_{key}_token a plain prompt {'begins' if at == 0 else 'ends'} with {text}")
    if not special:
        return None
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


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
    ids = {key: special_tokens.id_of(token, files, config, words) for token, key in NAMES.items()}
    if lost := [token for token in special_tokens.seen(files, config, words) if token not in NAMES]:
        log.warning(f"{source.name}: GGUF has no key for {some(lost)}, so a chat template there sees none")
    # llama.cpp ends a text at each of these three; the first is the tokenizer's own eos, as its converter has it.
    ends = tuple(dict.fromkeys(id for id in (ids["eos"], *special_tokens.ends(files, config, words)) if id is not None))
    if len(ends) > 3:
        log.warning(f"{source.name}: {list(ends)} end a text; GGUF has keys for three, so the others are lost")
    for key, id in (ids | dict(zip(("eos", "eot", "eom"), ends, strict=False))).items():
        if id is not None:
            writer.add_uint32(f"{PREFIX}{key}_token_id", id)
    before, behind = special_tokens.around(words)
    for ids_added, key in ((before, "bos"), (behind, "eos")):
        if ids_added not in ([], [ids[key]]):
            raise DataError(f"{name} adds the ids {ids_added} to each text; llama.cpp adds a bos and an eos alone")
    writer.add_add_bos_token(bool(before))
    if behind:
        writer.add_add_eos_token(True)
    writer.add_add_space_prefix(False)
    templates = [{"name": name, "template": text} for name, text in chat.templates(files).items()]
    if templates:
        writer.add_chat_template(templates if len(templates) > 1 else templates[0]["template"])


def check_rules(spec: dict, name: str):
    """A DataError unless a tokenizer.json cuts and merges text as llama.cpp does for "smollm"."""

    def rules(spec):
        part = spec["pre_tokenizer"] or {}
        steps = [{k: v for k, v in s.items() if k != "trim_offsets"} for s in part.get("pretokenizers", [part])]
        fixed = {key: spec["model"].get(key) or False for key in ("byte_fallback", "ignore_merges")}
        return {"pre_tokenizer": steps, "normalizer": spec["normalizer"], "type": spec["model"]["type"], **fixed}

    theirs, ours = rules(spec), rules(json.loads(tokenizer.new().to_str()))
    odd = [key for key, value in ours.items() if theirs[key] != value]
    if odd:
        raise DataError(
            f"{name} has another {odd[0]} than SmolLM's (byte-level BPE after single digits, nothing added), and "
            "llama.cpp has no such pre-tokenizer"
        )
    if any(" " in token for merge in spec["model"]["merges"] for token in merge) or not spec["model"]["merges"]:
        raise DataError(f"{name} has no merges, or one of a token with a space, which GGUF cannot hold")
