"""generation_config.json: how a model's publisher wants it sampled.

Each key is used, or passed over with a line where it changes no token with the flags given, or refused. Which those are
is read off transformers' generate (5.24, generation/configuration_utils.py). The special token ids in it are read with
config.json's (companions.generation_ids).
"""

import logging
from pathlib import Path

from smoljax.errors import UsageError
from smoljax.hf_config import parse_json

SAMPLED = ("temperature", "top_k", "top_p", "min_p")  # hold only where do_sample is true, as in transformers
ALWAYS = ("repetition_penalty", "min_new_tokens", "max_new_tokens", "stop_strings")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample")
# Said to nobody: what a file is by, and what it keeps beside tokens.
ABOUT = ("_from_model_config", "_commit_hash", "transformers_version", "use_cache", "return_dict_in_generate")
ABOUT += ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "transformers.js_config")
# How transformers computes, and what a draft model does, which change time alone.
NO_TOKEN = {"cache_config", "max_cache_len", "compile_config", "disable_compile", "low_memory"}
NO_TOKEN |= {
    "decoder_start_token_id",
    "prefill_chunk_size",
    "continuous_batching_config",
    "return_legacy_cache",
    "use_mtp",
    "speculation_type",
}
NO_TOKEN |= {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
NO_TOKEN |= {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"}
NO_TOKEN |= {"target_lookbehind", "assistant_ensemble_weight", "trust_remote_code", "unsloth_fixed", "unsloth_version"}
# Of finite logits the first changes none, of their order the second; how many samples there are, --n says.
NO_TOKEN |= {"chat_format", "max_window_size", "user_token_id", "assistant_token_id", "_name_or_path"}  # of no method
NO_TOKEN |= {"remove_invalid_values", "renormalize_logits", "num_return_sequences"}
BEAMS = {"length_penalty", "early_stopping", "diversity_penalty"}  # of a search with more than one
MORE_SAMPLED = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": 1.0}  # as SAMPLED, but not ours
# The value of a key that changes nothing; another one is of a method that smoljax has not.
NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "no_repeat_ngram_size": 0, "min_length": 0, "guidance_scale": 1.0}
NEUTRAL |= {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "penalty_alpha": 0.0}
NEUTRAL |= {"token_healing": False} | MORE_SAMPLED
OURS = {"presence_penalty": 0.0, "frequency_penalty": 0.0}  # transformers has neither
NEUTRAL |= OURS
EMPTY = {
    "watermarking_config",
    "dola_layers",
    "forced_eos_token_id",
    "forced_bos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
    "constraints",
    "sequence_bias",
}

log = logging.getLogger("smoljax")


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


def defaults(files: dict[str, bytes], source: str, flags: dict) -> dict:
    """What a model's own file asks for, by the names of Sampling, max_new_tokens and stop_strings; {} where there is
    none.

    Args:
      flags: by the same names; what they say holds in place of the file, and at temperature 0 nothing is sampled.

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
    sampled = found.get("do_sample") is True and flags.get("temperature") != 0
    out, unused = {}, []
    for key, value in found.items():
        if value is None or key in (*IDS, *ABOUT) or (key in SAMPLED and not sampled):
            continue
        if key in (*SAMPLED, *ALWAYS):
            out[key] = value
        elif changes_no_token(key, value, sampled, found, flags):
            if key not in NEUTRAL or value != NEUTRAL[key]:
                unused.append(f"{key} {value}"[:60])
        else:
            what = "takes as a flag alone" if key in OURS else "has not"
            raise UsageError(
                f"generation_config.json of {source} has {key} = {str(value)[:60]}, which smoljax {what}; "
                "--no-generation-config leaves what the file says of sampling aside"
            )
    if unused:
        log.warning("generation_config.json: passed over, for they change no token here: %s", ", ".join(unused))
    if sampled:
        out.setdefault("temperature", 1.0)
        if out.get("top_k") == 0:  # transformers' "all of them"
            del out["top_k"]
    if isinstance(out.get("stop_strings"), str):
        out["stop_strings"] = [out["stop_strings"]]
    return out


def changes_no_token(key: str, value, sampled: bool, found: dict, flags: dict) -> bool:
    """Whether a key that is not ours has no part in which tokens are given, with these flags."""
    if key in NO_TOKEN or (key in MORE_SAMPLED and not sampled):
        return True
    if key == "cache_implementation":  # of these one alone rounds keys and values
        return value != "quantized"
    if key in BEAMS:
        return found.get("num_beams") in (None, 1)  # more is refused itself
    if key == "max_length":  # a limit, where max_new_tokens is another, which holds in transformers as well
        return number(value)
    if key == "min_length" and (found | flags).get("min_new_tokens") is not None:  # likewise
        return True
    if key in EMPTY:
        return value in ([], {})
    return key in NEUTRAL and value == NEUTRAL[key]
