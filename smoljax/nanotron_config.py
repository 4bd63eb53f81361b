"""nanotron's YAML as a run: the files that trained SmolLM are configs here, and no key is passed over in silence.

`from_yaml(FILE)` gives the Train, and the keys that it did not use: where things are placed, named and logged. A key
that would change the mathematics and that smoljax does not have is a UsageError, and so is one that is not known.
Not as in nanotron: random numbers, so the order of the data and the fresh weights, come from other generators; and a
source that two stages read goes on where the first one stopped, where nanotron begins it anew.
From huggingface/nanotron: src/nanotron/config/config.py @00708b80, models_config.py @025f3141, helpers.py @06e39568,
trainer.py @004a89ca, data/nanoset.py @00708b80. Next: nanotron_yaml.py, which reads the file.
"""

import logging
import re
from pathlib import Path

from smoljax.config import Train
from smoljax.errors import UsageError
from smoljax.nanotron_yaml import Keys, read

LLAMA, SCHEDULE = "model.model_config", "optimizer.learning_rate_scheduler"
# Keys with one meaning here, and the values that have it; None is null, or no such key.
ONLY = {
    f"{LLAMA}.is_llama_config": (True,),
    f"{LLAMA}.hidden_act": ("silu", None),
    f"{LLAMA}.attention_bias": (False, None),
    f"{LLAMA}.rope_scaling": (None,),
    f"{LLAMA}.tie_word_embeddings": (True,),  # nanotron's own default is false
    f"{LLAMA}.pretraining_tp": (1, None),
    f"{LLAMA}.z_loss_enabled": (False, None),
    "model.init_method.scaling_method": ("NUM_LAYERS", None),  # o and down by 1 / sqrt(2 * layers)
    "model.init_method.use_mup": (None,),
    "model.init_method.path": (None,),
    "optimizer.accumulate_grad_in_fp32": (True,),
    "optimizer.optimizer_factory.name": ("adamW",),
    "optimizer.weight_decay_exclude_named_params": ([], None),
    f"{SCHEDULE}.lr_warmup_style": ("linear",),
    "checkpoints.resume_checkpoint_path": (None,),
}
INSTEAD = {
    "model.init_method.path": "start from weights with init_from=FOLDER",
    "checkpoints.resume_checkpoint_path": "the same command resumes its run; weights of another: init_from=FOLDER",
}
# Of a stage's dataset: what a later nanotron writes out, and what it may say.
DATASET = dict.fromkeys(("dataset_read_path", "dataset_max_tokens"), (None,))
DATASET |= dict.fromkeys(("return_positions", "skip_in_stream", "pad_samples_to_global_batch_size"), (False, None))
DATASET |= dict.fromkeys(("shuffle_files", "use_old_brrr_dataloader"), (False, None))
# Keys that leave the mathematics as they are: these sections, but for what is taken from them, and these.
PLACES = {"checkpoints", "general", "logging", "metrics_logging", "parallelism", "profiler", "tokenizer"}
PLACES |= {"lighteval", "s3_upload"}
UNUSED = {f"{LLAMA}.{key}" for key in ("use_cache", "_attn_implementation", "z_loss_coefficient")}
UNUSED |= {"model.ddp_bucket_cap_mb", "optimizer.zero_stage", "optimizer.optimizer_factory.torch_adam_is_fused"}
UNUSED |= {"tokens.limit_val_batches", "tokens.limit_test_batches"}
UNUSED |= {"data_stages[].name", "data_stages[].data.num_loading_workers", "data_stages[].data.seed"}
UNUSED |= {f"data_stages[].data.dataset.{key}" for key in ("tokenizer_name", "token_size_in_bytes")}
SEED = 42  # nanotron's, where the file names none
log = logging.getLogger("smoljax")


def from_yaml(file: Path | str) -> tuple[Train, list[str]]:
    """The run that the file describes, and its keys that say nothing to smoljax, as `parallelism.pp`.

    A step's rows are dp x micro_batch_size x batch_accumulation_per_replica, and the last of these is `accumulate`: on
    as many devices as there were replicas, each holds as many rows as it did; on fewer, set accumulate higher.
    UsageError, with file and line, for a key that smoljax cannot honour or does not know.
    """
    keys = Keys(Path(file), read(Path(file)))
    for path, values in ONLY.items():
        keys.only(path, *values, instead=INSTEAD.get(path, ""))
    tokens = {name: keys.positive(f"tokens.{name}") for name in ("train_steps", "sequence_length")}
    a = keys.positive("tokens.batch_accumulation_per_replica")
    rows = a * keys.positive("tokens.micro_batch_size") * keys.positive("parallelism.dp")
    every = keys.take("tokens.val_check_interval", int, -1)
    keys.require(
        "tokens.val_check_interval", every == -1 or every > 0, f"is {every}, expected -1, never, or a number of steps"
    )
    said = {
        "model": model(keys),
        "steps": tokens["train_steps"],
        "optim": optim(keys, tokens["train_steps"]),
        "compute": {
            "dtype": keys.only("model.dtype", "bfloat16", "float32", None) or "bfloat16",
            "remat": "full" if keys.take("parallelism.recompute_layer", bool, False) else "auto",
        },
        "heldout": {"every": None if every == -1 else every},
        "accumulate": a,
        "init_std": keys.take("model.init_method.std", float),
        "seed": keys.take("general.seed", int, SEED),
        "log_every": keys.take("logging.iteration_step_info_interval", int, 1),
        "save_every": keys.take("checkpoints.checkpoint_interval", int, Train.save_every),
    }
    said["data"], said["stages"] = stages(keys, rows, tokens["sequence_length"], said["model"]["vocab_size"])
    unused = keys.rest(PLACES, UNUSED)
    try:
        return build(said), unused
    except UsageError as e:
        raise UsageError(f"{file}: {e}") from None


def build(said: dict) -> Train:
    kinds = Train.__annotations__
    return Train(**{k: kinds[k](**v) if isinstance(v, dict) else v for k, v in said.items()})


def model(keys: Keys) -> dict:
    """Model's fields. Interleaved rotary pairs become half-split ones: from fresh weights that is the same training."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    found = {name: keys.positive(f"{LLAMA}.{name}") for name in (*names, "max_position_embeddings")}
    n, d = found["num_attention_heads"], found["hidden_size"]
    found["num_key_value_heads"] = keys.take(f"{LLAMA}.num_key_value_heads", int, n)
    keys.require(f"{LLAMA}.hidden_size", d % n == 0, f"is {d}, not a multiple of num_attention_heads = {n}")
    found["head_dim"] = d // n
    found["rope_theta"] = keys.take(f"{LLAMA}.rope_theta", float, 10_000.0)
    found["rms_norm_eps"] = keys.take(f"{LLAMA}.rms_norm_eps", float)
    found["initializer_range"] = keys.take(f"{LLAMA}.initializer_range", float, 0.02)  # of the export; not of training
    for name in ("bos_token_id", "eos_token_id"):
        found[name] = keys.take(f"{LLAMA}.{name}", int)
    found["pad_token_id"] = keys.take(f"{LLAMA}.pad_token_id", int, None)

    whole = keys.take("model.make_vocab_size_divisible_by", int, 1) * keys.look("parallelism.tp", int, 1)
    keys.require(
        "model.make_vocab_size_divisible_by",
        whole > 0 and found["vocab_size"] % whole == 0,
        f"times parallelism.tp is {whole}, which does not divide vocab_size = {found['vocab_size']}: "
        "nanotron would pad it; set vocab_size to a multiple",
    )
    if keys.take(f"{LLAMA}.rope_interleaved", bool, False):
        log.warning(
            f"{keys.file}: rope_interleaved is true: smoljax pairs feature i with i + H/2 instead, which from fresh "
            "weights is the same training under another order of q's and k's rows"
        )
    return found


def optim(keys: Keys, steps: int) -> dict:
    """Optim's fields: a schedule whose decay ends with the run."""
    lr, warmup = keys.take(f"{SCHEDULE}.learning_rate", float), keys.take(f"{SCHEDULE}.lr_warmup_steps", int, 0)
    decay = keys.take(f"{SCHEDULE}.lr_decay_steps", int, steps - warmup)
    begin = keys.take(f"{SCHEDULE}.lr_decay_starting_step", int, warmup)
    keys.require(
        f"{SCHEDULE}.lr_decay_steps",
        begin + decay == steps or warmup == decay == 0,  # the latter: nanotron then stays at lr
        f"and lr_decay_starting_step make the decay end at {begin} + {decay} = {begin + decay}, expected "
        f"tokens.train_steps = {steps}: smoljax's decay ends with the run",
    )
    factory = "optimizer.optimizer_factory"
    return {
        "lr": lr,
        "warmup_steps": warmup,
        "decay_steps": decay,
        "decay": keys.only(f"{SCHEDULE}.lr_decay_style", "linear", "1-sqrt", "cosine", None) or "linear",
        "min_lr": keys.take(f"{SCHEDULE}.min_decay_lr", float, lr),  # absent: nanotron does not decay at all
        "b1": keys.take(f"{factory}.adam_beta1", float),
        "b2": keys.take(f"{factory}.adam_beta2", float),
        "eps": keys.take(f"{factory}.adam_eps", float),
        "weight_decay": keys.take("optimizer.weight_decay", float),
        "clip": keys.take("optimizer.clip_grad", float),
    }


def stages(keys: Keys, rows: int, seq_len: int, vocab_size: int) -> tuple[dict, list[dict]]:
    """Data's fields for the first stage, Stage's for each further one.

    nanotron's iterations are 1 ... train_steps, and a stage takes over in the one that it names; our updates are 0 ...
    """
    found = []
    for at in keys.items("data_stages"):
        start = keys.positive(f"{at}.start_training_step")
        t = keys.take(f"{at}.sequence_length", int, seq_len)
        dataset = f"{at}.data.dataset"
        keys.only(f"{dataset}.hf_dataset_or_datasets", None, instead="make token shards of it with `smoljax prepare`")
        for name, values in DATASET.items():
            keys.only(f"{dataset}.{name}", *values)
        keys.only(f"{dataset}.vocab_size", vocab_size, None)
        found.append((start, at, sources(keys, dataset), t))
    found.sort(key=lambda stage: stage[0])  # as nanotron does
    first = found[0]
    keys.require(f"{first[1]}.start_training_step", first[0] == 1, f"is {first[0]}, expected 1: the run's first step")
    data = {"sources": first[2], "seq_len": first[3], "batch_size": rows}
    data["seed"] = keys.take(f"{first[1]}.data.seed", int, SEED)  # a run has one: the others' are not used
    later, before = [], first[3]
    for start, _, folders, t in found[1:]:
        later.append({"start": start - 1, "sources": folders})
        later[-1] |= (
            {"seq_len": t, "batch_size": rows} if t != before else {}
        )  # nanotron keeps the rows, not the tokens
        before = t
    return data, later


def sources(keys: Keys, at: str) -> dict:
    """Folder -> weight, from any of nanotron's three ways to say it."""
    path, weights = f"{at}.dataset_folder", keys.take(f"{at}.dataset_weights", list, None)
    folders = keys.take(path, (str, list, dict))
    names = [folders] if isinstance(folders, str) else list(folders)
    if isinstance(folders, dict):
        keys.require(f"{at}.dataset_weights", weights is None, "is given, but dataset_folder gives weights itself")
        weights = list(folders.values())
    elif weights is None:
        keys.require(
            f"{at}.dataset_weights",
            len(names) == 1,
            f"is absent for {len(names)} folders: nanotron then reads each as often as it is long, which the file does "
            "not say; write the weights",
        )
        weights = [1.0]
    fine = names and all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)
    keys.require(path, bool(fine), f"is {names!r:.200}, expected one or more folders, each once")
    keys.require(
        f"{at}.dataset_weights", len(weights) == len(names), f"are {len(weights)}, for {len(names)} dataset_folder"
    )
    return dict(zip(names, weights, strict=True))


def told(unused: list[str]) -> str:
    """The unused keys by section, a line each."""
    by = {}
    for path in unused:
        section = re.match(r"\w*", path)[0]
        by.setdefault(section, []).append(path[len(section) :].lstrip(".") or "(the whole section)")
    return "\n".join(f"  {section}: {', '.join(names)}" for section, names in by.items())
