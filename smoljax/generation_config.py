"""generation_config.json: how a model's publisher wants it sampled. Each key is used, or refused where it would matter.

Its special token ids are read with config.json's (companions.generation_ids).
"""

from pathlib import Path

from smoljax.errors import UsageError
from smoljax.hf_config import parse_json

SAMPLED = ("temperature", "top_k", "top_p", "min_p")  # hold only where do_sample is true, as in transformers
ALWAYS = ("repetition_penalty", "min_new_tokens", "max_new_tokens", "stop_strings")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample")
ABOUT = ("_from_model_config", "transformers_version", "use_cache", "return_dict_in_generate", "compile_config")
ABOUT += ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# The value of a key that changes nothing; another one is of a method that smoljax has not.
NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0}
NEUTRAL |= {"eta_cutoff": 0.0, "length_penalty": 1.0, "diversity_penalty": 0.0, "num_return_sequences": 1}
NEUTRAL |= {"guidance_scale": 1.0}
NEUTRAL |= {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "min_length": 0}
NEUTRAL |= {"remove_invalid_values": False, "renormalize_logits": False, "early_stopping": False, "max_length": 20}


def number(value) -> bool:
    return type(value) in (int, float)


def texts(value) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in each)


KINDS = {key: (number, "a number") for key in ("temperature", "top_p", "min_p", "repetition_penalty")}
KINDS |= {key: (lambda value: type(value) is int, "a whole number") for key in ("top_k", "min_new_tokens")}
KINDS["max_new_tokens"] = (lambda value: type(value) is int and value >= 1, "a whole number, 1 or more")
KINDS |= {
    "stop_strings": (texts, "texts that are not empty"),
    "do_sample": (lambda v: type(v) is bool, "true or false"),
}


def defaults(files: dict[str, bytes], source: str) -> dict:
    """What a model's own file asks for, by the names of Sampling, max_new_tokens and stop_strings; {} where there is
    none.

    Raises UsageError for a key that would change what is given and that smoljax has not.
    """
    found = parse_json(files.get("generation_config.json", b"{}"), Path("generation_config.json"))
    for key, (fine, expected) in KINDS.items():
        value = found.get(key)
        if value is not None and not fine(value):
            raise UsageError(
                f"generation_config.json of {source} has {key} = {value!r:.60}, expected {expected}; mend it, or leave "
                "what the file says of sampling aside by --no-generation-config"
            )
    out = {}
    for key, value in found.items():
        if value is None or key in (*IDS, *ABOUT) or (key in SAMPLED and found.get("do_sample") is not True):
            continue
        if key in (*SAMPLED, *ALWAYS):
            out[key] = value
        elif key not in NEUTRAL or value != NEUTRAL[key]:
            raise UsageError(
                f"generation_config.json of {source} has {key} = {str(value)[:60]}, which smoljax has not; "
                "--no-generation-config leaves what the file says of sampling aside"
            )
    if found.get("do_sample") is True:
        out.setdefault("temperature", 1.0)
        if out.get("top_k") == 0:  # transformers' "all of them"
            del out["top_k"]
    if isinstance(out.get("stop_strings"), str):
        out["stop_strings"] = [out["stop_strings"]]
    return out
