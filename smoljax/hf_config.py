"""A Hugging Face config.json, in and out; a key that asks for other mathematics than model.py's is refused by name."""

import dataclasses
import json
import logging
from pathlib import Path

from smoljax import strict_json
from smoljax.config import Model
from smoljax.errors import DataError, Error

# Keys of a config.json with the one value that model.py computes. The second table may be absent: these are
# transformers' defaults, or keys by which relatives of Llama depart from it.
REQUIRED = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
NEUTRAL = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
NEUTRAL |= {"rope_interleaved": False, "partial_rotary_factor": 1.0, "no_rope_layers": None, "layer_types": None}
NEUTRAL |= {"sliding_window": None, "use_sliding_window": False, "qk_norm": False, "use_qk_norm": False}
NEUTRAL |= {"logits_scaling": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logit_scale": 1.0}
NEUTRAL |= {"attention_multiplier": None, "final_logit_softcapping": None, "attn_logit_softcapping": None}
NEUTRAL |= {"quantization_config": None, "auto_map": None, "is_encoder_decoder": False, "add_cross_attention": False}
NEUTRAL |= {"pruned_heads": {}}
# Keys that say nothing about the mathematics.
HARMLESS = {"dtype", "torch_dtype", "transformers_version", "use_cache", "pretraining_tp", "is_llama_config"}
HARMLESS |= {"_name_or_path", "transformers.js_config", "rope_theta", "rope_parameters", "rope_scaling"}
HARMLESS |= {"output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "problem_type"}
HARMLESS |= {"id2label", "label2id", "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed"}
# quantization_config of our own int8, with "embedding" beside it. It has no "quant_method": transformers 5 passes over
# one that it does not know with a warning and takes the whole numbers for weights; where there is none it refuses.
INT8 = {"format": "smoljax-int8", "bits": 8, "symmetric": True, "scale": "float32, one for each output"}


def read_json(file: Path, limit: int = 1 << 20) -> dict:
    """A JSON object from a file of at most `limit` bytes."""
    try:
        if not file.is_file():  # a pipe would block
            raise DataError(f"there is no file {file}; expected JSON there")
        if (size := file.stat().st_size) > limit:
            raise DataError(f"{file} has {size:,} bytes, expected at most {limit:,}")
        return parse_json(file.read_bytes(), file)
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror})") from None


def parse_json(content: bytes, file: Path | str) -> dict:
    try:
        found = strict_json.loads(content)
    except ValueError as e:
        raise DataError(f"{file} cannot be read as JSON ({e})") from None
    if not isinstance(found, dict):
        raise DataError(f"{file} holds a {type(found).__name__}, expected a JSON object")
    return found


def from_config(found: dict, name: str = "config.json") -> Model:
    """The Model in a config.json's keys; a key that asks for something else is a DataError with its name."""
    try:
        return checked(found)
    except Error as e:
        raise DataError(f"{name}: {e}") from None


def int8_config(found: dict, name: str = "config.json") -> tuple[dict, bool | None]:
    """(A config.json's other keys, whether the embedding is int8, too), or (all its keys, None): no int8 of ours."""
    said = found.get("quantization_config")
    if not isinstance(said, dict) or said.get("format") != INT8["format"]:
        return found, None
    known = [INT8 | {"embedding": embedding} for embedding in (False, True)]
    if json.dumps(said, sort_keys=True) not in [json.dumps(one, sort_keys=True) for one in known]:
        raise DataError(
            f"{name}: quantization_config is {json.dumps(said)}; smoljax knows {json.dumps(known[0])} alone"
        )
    return {k: v for k, v in found.items() if k != "quantization_config"}, said["embedding"]


def checked(found: dict) -> Model:
    for key, expected in (NEUTRAL | REQUIRED).items():
        value = found.get(key, expected if key in NEUTRAL else "absent")
        if value != expected or (isinstance(expected, bool) and value is not expected):
            raise DataError(f"{key} is {json.dumps(value)}; smoljax computes {json.dumps(expected)} and nothing else")
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    whole = type(width) is int and type(heads) is int and heads > 0 and width % heads == 0
    # What transformers fills in, too. Its other defaults are guesses: here each of the other keys must be there.
    defaults = {"num_key_value_heads": heads, "head_dim": width // heads if whole else None, "initializer_range": 0.02}
    fields, absent = {"rope_theta": rope_theta(found)}, []
    for name in (f.name for f in dataclasses.fields(Model) if f.name != "rope_theta"):
        value = found.get(name)
        fields[name] = defaults.get(name) if value is None else value
        if isinstance(value, list) and name != "eos_token_id":
            raise DataError(f"{name} is the list {value}; smoljax has one value there")
        if fields[name] is None and name != "pad_token_id" and not (name in found and name.endswith("_token_id")):
            absent.append(name)
    if absent:
        raise DataError(f"{', '.join(absent)} absent; expected the keys of a LlamaForCausalLM")
    unknown = sorted(set(found) - set(fields) - set(REQUIRED) - set(NEUTRAL) - HARMLESS)
    if unknown:
        logging.getLogger("smoljax").warning("config.json: a Llama has no %s; not used", ", ".join(map(repr, unknown)))
    return Model(**fields)


def rope_theta(found: dict) -> float:
    """From `rope_theta` (transformers 4), `rope_parameters` (5) or both, which then must agree; there is no default."""
    thetas = {}
    if found.get("rope_theta") is not None:
        thetas["rope_theta"] = found["rope_theta"]
    for key in ("rope_parameters", "rope_scaling"):
        rope = found.get(key) or {}
        if not isinstance(rope, dict):
            raise DataError(f"{key} is {json.dumps(rope)}, expected an object or null")
        for name, value in rope.items():
            if name == "rope_theta":
                thetas[f"{key}.rope_theta"] = value
            elif (name, value) not in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)):
                raise DataError(
                    f"{key}.{name} is {json.dumps(value)}; smoljax computes the default rotary embedding only"
                )
    if not thetas:
        raise DataError("rope_theta is absent, in rope_parameters too; add the theta that the model was trained with")
    for key, value in thetas.items():
        if type(value) not in (int, float):
            raise DataError(f"{key} is {json.dumps(value)}, expected a number")
    if len(set(thetas.values())) > 1:
        raise DataError(f"{' and '.join(f'{k} = {v}' for k, v in thetas.items())} contradict each other; remove one")
    return next(iter(thetas.values()))


def to_config(config: Model, dtype: str, embedding: bool = False) -> dict:
    """What transformers 4 and 5 both read: 4 wants rope_theta and torch_dtype, 5 rope_parameters and dtype.

    embedding: whether it is int8 too, where dtype is; what stays is bfloat16 then.
    """
    quantization = {}
    if dtype == "int8":
        dtype, quantization = "bfloat16", {"quantization_config": INT8 | {"embedding": embedding}}
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    neutral = {key: NEUTRAL[key] for key in ("hidden_act", "attention_bias", "mlp_bias", "attention_dropout")}
    other = {"rope_parameters": rope, "rope_scaling": None, "dtype": dtype, "torch_dtype": dtype, "use_cache": True}
    return REQUIRED | dataclasses.asdict(config) | neutral | other | quantization
