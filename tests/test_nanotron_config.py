"""nanotron's YAML as a config: the published files are the recipes; a key is used, listed or refused; and the layout of
rotary pairs in which SmolLM2-1.7B was trained is the same training."""

import copy
import dataclasses
import logging
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from smoljax import settings
from smoljax.config import Model, Optim, Stage, Train
from smoljax.errors import UsageError
from smoljax.model import SmolLM
from smoljax.nanotron_config import from_yaml

FOLDER = Path(__file__).parent / "data/nanotron"
RECIPES = {
    "config_smollm1_135M.yaml": "smollm-135m",
    "config_smollm1_360M.yaml": "smollm-360m",
    "config_smollm1_1B.yaml": "smollm-1-7b",
    "config_smollm2_135M.yaml": "smollm2-135m",
    "config_smollm2_360M.yaml": "smollm2-360m",
    "config_smollm2_1B.yaml": "smollm2-1-7b",
}
PUBLISHED = yaml.safe_load((FOLDER / "config_smollm1_1B.yaml").read_text())


def leaves(tree, path="") -> set[str]:
    """As the reader names them, from PyYAML's own tree."""
    if isinstance(tree, dict) and not path.endswith(".dataset_folder"):
        return set().union(*(leaves(v, f"{path}.{k}".lstrip(".")) for k, v in tree.items()))
    if isinstance(tree, list) and isinstance(tree[0], dict):
        return set().union(*(leaves(v, f"{path}[{i}]") for i, v in enumerate(tree)))
    return {path}


def written(tmp_path, *changes, drop=()) -> Path:
    """SmolLM-1.7B's file with changes such as ("model.dtype", "float16")."""
    tree = copy.deepcopy(PUBLISHED)
    for path, value in [*changes, *((path, None) for path in drop)]:
        *parents, leaf = [int(part) if part.isdigit() else part for part in re.split(r"\.|\[(\d+)\]\.?", path) if part]
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {}) if isinstance(at, dict) else at[parent]
        if path in drop:
            del at[leaf]
        else:
            at[leaf] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


# ---- the published files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES)
def test_published_file_is_the_recipe(file):
    config, recipe = from_yaml(FOLDER / file)[0], settings.load(RECIPES[file])

    def here(sources):
        return {folder.replace("datasets/", "shards/"): weight for folder, weight in sources.items()}

    theirs, ours = settings.flat(config), settings.flat(recipe)
    theirs["data.sources"] = here(theirs["data.sources"])
    theirs["stages"] = tuple(dataclasses.replace(s, sources=here(s.sources)) for s in theirs["stages"])
    differ = {key for key in ours if ours[key] != theirs[key]}
    # How the recipes save memory and keep checkpoints is theirs. SmolLM2-1.7B's stages are in the paper alone.
    papers = {"data.sources", "data.max_epochs", "stages"} if file == "config_smollm2_1B.yaml" else set()
    assert differ - {"accumulate", "compute.remat", "run", "keep", "keep_every"} == papers


def test_recomputed_layers_are_remat_full(tmp_path):
    """nanotron recomputes whole layers or nothing; where it keeps all, what fits is found anew."""
    for said, remat in ((True, "full"), (False, "auto")):
        config, _ = from_yaml(written(tmp_path, ("parallelism.recompute_layer", said)))
        assert config.compute.remat == remat


def test_stages_of_smollm_1_7b():
    config, _ = from_yaml(FOLDER / "config_smollm1_1B.yaml")
    code = [config.at(n).data.sources.get("datasets/python-edu", 0) for n in (0, 299_998, 299_999, 499_999)]
    assert code == [0, 0, 0.08, 0.08]  # nanotron's iteration 300,000, the first with Python-Edu, is update 299,999


def test_used_is_what_another_value_changes(tmp_path):
    """Another value of a used key is another config, or is refused; of an unused one, the same config."""

    def another(value, factor):
        if isinstance(value, list):
            return [another(v, factor) for v in value]
        if isinstance(value, bool) or value is None:
            return value is not True
        return value + "x" if isinstance(value, str) else value * factor or 1

    def loaded(path, factor):
        at = PUBLISHED
        for part in re.findall(r"\w+", path):
            at = at[int(part) if part.isdigit() else part]
        try:
            return from_yaml(written(tmp_path, (path, another(at, factor))))[0]
        except UsageError as e:
            return str(e)

    published, unused = from_yaml(written(tmp_path))
    assert len(unused) == len(set(unused)) and set(unused) < leaves(PUBLISHED)
    for path in leaves(PUBLISHED) - set(unused):
        assert loaded(path, -7) != published, path
    for path in unused:
        assert loaded(path, 2) == published, path


def test_what_is_unused_exactly():
    _, unused = from_yaml(FOLDER / "config_smollm1_1B.yaml")
    assert set(unused) == {
        *("checkpoints.checkpoints_path", "checkpoints.checkpoints_path_is_shared_file_system"),
        *("checkpoints.save_final_state", "checkpoints.save_initial_state"),
        *("data_stages[0].data.num_loading_workers", "data_stages[0].name"),
        *("data_stages[1].data.num_loading_workers", "data_stages[1].name", "data_stages[1].data.seed"),
        *(f"general.{key}" for key in ("benchmark_csv_path", "consumed_train_samples", "ignore_sanity_checks")),
        *("general.project", "general.run", "general.step", "logging.log_level", "logging.log_level_replica"),
        *("model.ddp_bucket_cap_mb", "model.model_config.use_cache", "optimizer.zero_stage"),
        *("optimizer.optimizer_factory.torch_adam_is_fused", "parallelism.expert_parallel_size", "parallelism.pp"),
        *("parallelism.pp_engine", "parallelism.tp", "parallelism.tp_linear_async_communication"),
        *("parallelism.tp_mode", "parallelism.tp_recompute_allgather", "profiler"),
        *("tokenizer.tokenizer_max_length", "tokenizer.tokenizer_name_or_path", "tokenizer.tokenizer_revision"),
        *("tokens.limit_test_batches", "tokens.limit_val_batches"),
    }
    used = leaves(PUBLISHED) - set(unused)
    assert used == {
        *(f"model.model_config.{key}" for key in PUBLISHED["model"]["model_config"] if key != "use_cache"),
        *("model.dtype", "model.init_method.std", "model.make_vocab_size_divisible_by"),
        *("optimizer.accumulate_grad_in_fp32", "optimizer.clip_grad", "optimizer.weight_decay"),
        *(f"optimizer.learning_rate_scheduler.{key}" for key in PUBLISHED["optimizer"]["learning_rate_scheduler"]),
        *(f"optimizer.optimizer_factory.{key}" for key in ("adam_beta1", "adam_beta2", "adam_eps", "name")),
        *("tokens.batch_accumulation_per_replica", "tokens.micro_batch_size", "tokens.sequence_length"),
        *("tokens.train_steps", "tokens.val_check_interval", "parallelism.dp", "parallelism.recompute_layer"),
        *(f"data_stages[{i}].data.dataset.{key}" for i in (0, 1) for key in ("dataset_folder", "dataset_weights")),
        *("data_stages[0].start_training_step", "data_stages[1].start_training_step", "data_stages[0].data.seed"),
        *("general.seed", "checkpoints.checkpoint_interval", "checkpoints.resume_checkpoint_path"),
        "logging.iteration_step_info_interval",
    }


# ---- keys ------------------------------------------------------------------------------------------------------------

LLAMA, SCHEDULE, STAGE = "model.model_config", "optimizer.learning_rate_scheduler", "data_stages[0].data.dataset"


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        (f"{LLAMA}.rope_scaling", {"type": "linear"}, None),  # its own key, below the one that is known
        (f"{LLAMA}.rope_scaling", "yarn", 'is "yarn", expected null; smoljax has nothing else'),
        (f"{LLAMA}.tie_word_embeddings", False, "is false, expected true"),
        (f"{LLAMA}.hidden_act", "gelu", 'is "gelu", expected "silu" or null'),
        (f"{LLAMA}.is_llama_config", False, "is false, expected true"),
        (f"{LLAMA}.pretraining_tp", 2, "is 2, expected 1 or null"),
        (f"{LLAMA}.attention_bias", True, "is true, expected false or null"),
        (f"{LLAMA}.z_loss_enabled", True, "is true, expected false or null"),
        (f"{LLAMA}.sliding_window", 512, "= 512 is a key that smoljax does not know, and might change the mathematics"),
        (f"{LLAMA}.moe", 8, "; known in model.model_config: _attn_implementation, attention_bias, bos_token_id, eos_"),
        (f"{LLAMA}.hidden_size", 2000, "is 2000, not a multiple of num_attention_heads = 32"),
        (f"{LLAMA}.hidden_size", "2048", 'is "2048", expected a whole number'),
        (f"{LLAMA}.num_attention_heads", 0, "is 0, expected more than 0"),
        (f"{LLAMA}.vocab_size", True, "is true, expected a whole number"),
        ("model.dtype", "float16", 'is "float16", expected "bfloat16" or "float32"'),
        ("model.init_method.path", "there", 'is "there", expected null; start from weights with init_from=FOLDER'),
        ("model.init_method.use_mup", True, "is true, expected null"),
        ("model.init_method.scaling_method", "NONE", 'is "NONE", expected "NUM_LAYERS" or null'),
        ("model.make_vocab_size_divisible_by", 1000, "times parallelism.tp is 1000, which does not divide vocab_size"),
        ("model.fancy", 1, "known in model: ddp_bucket_cap_mb, dtype, init_method, make_vocab"),
        ("optimizer.optimizer_factory.name", "sgd", 'is "sgd", expected "adamW"'),
        (
            "optimizer.optimizer_factory.adam_beta3",
            0.9,
            "optimizer_factory: adam_beta1, adam_beta2, adam_eps, name, tor",
        ),
        ("optimizer.accumulate_grad_in_fp32", False, "is false, expected true"),
        ("optimizer.weight_decay_exclude_named_params", [".*norm.*"], 'is [".*norm.*"], expected [] or null'),
        ("optimizer.clip_grad", None, "is null, expected a number"),
        (f"{SCHEDULE}.lr_warmup_style", "constant", 'is "constant", expected "linear"'),
        (f"{SCHEDULE}.lr_decay_style", "exponential", 'is "exponential", expected "linear" or "1-sqrt" or "cosine"'),
        (f"{SCHEDULE}.lr_decay_steps", 50_000, "at 400000 + 50000 = 450000, expected tokens.train_steps = 500000"),
        (f"{SCHEDULE}.learning_rate", "fast", 'is "fast", expected a number'),
        ("tokens.train_steps", 500_000.0, "is 500000.0, expected a whole number"),
        ("tokens.val_check_interval", 0, "is 0, expected -1, never, or a number of steps"),
        ("tokens.micro_batch_size", 0, "is 0, expected more than 0"),
        ("tokens.extra", 1, "known in tokens: batch_accumulation_per_replica, limit_test_batches"),
        ("data_stages[0].start_training_step", 2, "is 2, expected 1: the run's first step"),
        ("data_stages[1].until", 2, "known in data_stages[]: data, name, sequence_length, start_training_step"),
        (f"{STAGE}.dataset_weights", [1.0], "are 1, for 5 dataset_folder"),
        (f"{STAGE}.dataset_weights", None, "is absent for 5 folders: nanotron then reads each as often as it is long"),
        (f"{STAGE}.dataset_folder", ["a", "a", "b", "c", "d"], "expected one or more folders, each once"),
        (f"{STAGE}.dataset_folder", {"a": 0.5, "b": 0.5}, None),
        (f"{STAGE}.hf_dataset_or_datasets", "c4", "expected null; make token shards of it with `smoljax prepare`"),
        (f"{STAGE}.return_positions", True, "is true, expected false or null"),
        (f"{STAGE}.vocab_size", 50_000, "is 50000, expected 49152 or null"),
        ("data_stages", None, "is null, expected a list of groups"),
        ("checkpoints.resume_checkpoint_path", "old", 'is "old", expected null; the same command resumes its run'),
        ("parallelism.dp", None, "is null, expected a whole number"),
        (
            "optimiser.lr",
            1,
            "; known: checkpoints, data_stages, general, lighteval, logging, metrics",
        ),
    ],
)
def test_what_would_change_the_mathematics_is_refused(tmp_path, path, value, sentence):
    file = written(tmp_path, (path, value))
    named = path
    if sentence is None and isinstance(value, dict):
        named, sentence = {
            f"{LLAMA}.rope_scaling": (f"{path}.type", '= "linear" is a key that smoljax does not know'),
            f"{STAGE}.dataset_folder": (f"{STAGE}.dataset_weights", "is given, but dataset_folder gives weights"),
        }[path]
    with pytest.raises(UsageError) as e:
        from_yaml(file)
    where, _, said = str(e.value).partition(f": {named} ")
    assert sentence in said and e.value.code == 2
    line = re.fullmatch(rf"{re.escape(str(file))}:(\d+)", where)
    leaf = re.split(r"\.", named)[-1]
    if named != "optimiser.lr" and "absent" not in said:
        assert leaf in file.read_text().splitlines()[int(line[1]) - 1]


@pytest.mark.parametrize(
    "path",
    [
        *(f"{LLAMA}.{key}" for key in ("hidden_size", "rms_norm_eps", "is_llama_config", "tie_word_embeddings")),
        *(f"{LLAMA}.{key}" for key in ("vocab_size", "max_position_embeddings", "bos_token_id")),
        *("model.init_method.std", f"{SCHEDULE}.learning_rate", f"{SCHEDULE}.lr_warmup_style", "parallelism.dp"),
        *("optimizer.optimizer_factory.adam_beta2", "optimizer.accumulate_grad_in_fp32", "optimizer.clip_grad"),
        *(
            "tokens.train_steps",
            "tokens.sequence_length",
            f"{STAGE}.dataset_folder",
            "data_stages[1].start_training_step",
        ),
    ],
)
def test_a_missing_key_is_no_guess(tmp_path, path):
    with pytest.raises(UsageError, match=rf"mine.yaml: {re.escape(path)} is missing, expected "):
        from_yaml(written(tmp_path, drop=[path]))


def test_what_the_config_refuses_names_the_file(tmp_path):
    for change, sentence in [
        ((f"{LLAMA}.num_key_value_heads", 5), "not a multiple of model.num_key_value_heads = 5"),
        (("general.seed", -1), "seed is -1, expected 0 or more"),
        ((f"{STAGE}.dataset_weights", [0.0, 1, 1, 1, 1]), "the weight 0.0, expected a number above 0"),
        (("tokens.sequence_length", 4096), "data.seq_len is 4096, beyond model.max_position_embeddings = 2048"),
        (("data_stages[1].start_training_step", 600_000), "a stage starts at [599999], which steps = 500000"),
    ]:
        with pytest.raises(UsageError) as e:
            from_yaml(written(tmp_path, change))
        assert str(e.value).startswith(f"{tmp_path / 'mine.yaml'}: ") and sentence in str(e.value)


def test_what_nanotron_takes_where_a_key_is_absent(tmp_path):
    """LRSchedulerArgs and lr_scheduler_builder: the decay follows the warmup, to the end; the floor is the peak."""
    absent = [f"{SCHEDULE}.{k}" for k in ("lr_decay_steps", "lr_decay_starting_step", "lr_decay_style", "min_decay_lr")]
    absent += ["general.seed", f"{LLAMA}.rope_theta", f"{LLAMA}.hidden_act", "checkpoints", "logging", "profiler"]
    config, _ = from_yaml(written(tmp_path, (f"{LLAMA}.num_key_value_heads", None), drop=absent))
    assert config.optim == Optim(lr=5e-4, warmup_steps=2000, decay_steps=498_000, decay="linear", min_lr=5e-4)
    assert (config.seed, config.model.rope_theta, config.model.num_key_value_heads) == (42, 10_000, 32)
    no_ramps = [(f"{SCHEDULE}.lr_warmup_steps", 0), (f"{SCHEDULE}.lr_decay_steps", 0)]
    assert from_yaml(written(tmp_path, *no_ramps))[0].optim.decay_steps == 0


def test_three_ways_to_name_folders_and_stages_in_any_order(tmp_path):
    def stage(start, dataset, **more):
        return {"name": str(start), "start_training_step": start, "data": {"dataset": dataset, "seed": start}} | more

    found = [
        stage(2001, {"dataset_folder": {"s3://a.b/c": 3, "d": 1}}, sequence_length=4096),
        stage(3001, {"dataset_folder": ["x", "y"], "dataset_weights": [0.5, 0.5], "shuffle_files": False}),
        stage(1, {"dataset_folder": "one"}),
    ]
    config, unused = from_yaml(written(tmp_path, ("data_stages", found), (f"{LLAMA}.max_position_embeddings", 4096)))
    assert config.data.sources == {"one": 1.0} and config.data.seed == 1
    assert config.stages == (
        Stage(2000, {"s3://a.b/c": 3, "d": 1}, seq_len=4096, batch_size=1024),  # nanotron keeps the rows
        Stage(3000, {"x": 0.5, "y": 0.5}, seq_len=2048, batch_size=1024),
    )
    assert {key for key in unused if key.endswith("seed")} == {"data_stages[0].data.seed", "data_stages[1].data.seed"}


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, number", [("1e-08", 1e-8), ("1E-8", 1e-8), ("2e3", 2000.0), ("1.5e+2", 150.0)])
def test_a_number_without_a_point_is_a_number(tmp_path, text, number):
    """YAML 1.1, so PyYAML, makes text of the first three."""
    file = tmp_path / "mine.yaml"
    published = (FOLDER / "config_smollm1_1B.yaml").read_text()
    assert "adam_eps: 1.0e-08" in published
    file.write_text(published.replace("adam_eps: 1.0e-08", f"adam_eps: {text}"))
    assert from_yaml(file)[0].optim.eps == number
    file.write_text(published.replace("adam_eps: 1.0e-08", f"adam_eps: '{text}'"))  # but quoted it is text
    with pytest.raises(UsageError, match=rf':\d+: .*adam_eps is "{re.escape(text)}", expected a number'):
        from_yaml(file)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"", " is no nanotron config: expected keys such as model"),
        (b"- a\n- b\n", " is no nanotron config"),
        (b"tokens:\n  train_steps: 1\n  train_steps: 2\n", ':3: "train_steps" a second time; say it once'),
        (b"a: {dataset_folder: {x: 1, x: 2}}\n", ':1: "x" a second time'),
        (b"a: &x [1]\nb: *x\n", ":2: an alias; write it out"),
        (b"a: &x [*x]\n", ":1: an alias; write it out"),
        (b"a: 1\n---\nb: 2\n", ":2: expected a single document in the stream, but found another document"),
        (b"a: [1\nb: 2\n", ":2: while parsing a flow sequence, expected ',' or ']'"),
        (b"a: b: c\n", ":1: mapping values are not allowed here"),
        (b"a:\n\tb: 1\n", ":2: while scanning for the next token, found character '\\t'"),
        (b"a: !!python/object/apply:os.system [ls]\n", ":1: a tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        (b"a: !!python/name:os.system x\n", ":1: could not determine a constructor"),
        (b"a: !!bool maybe\n", ":1: 'maybe' is no value"),
        (b"a: !!timestamp x\n", ":1: 'x' is no value"),
        (b"a: !!float ''\n", ":1: '' is no value"),
        (b"a: 2024-99-99\n", ":1: '2024-99-99' is no value"),
        (b"a: %s\n" % (b"9" * 20), "is too large a number"),
        (b"a: %s\n" % (b"9" * 5000), "is no value"),
        (b"a.b: 1\n", ':1: a key "a.b", expected a name'),
        (b"? [a]\n: 1\n", ":1: a key that is no scalar"),
        (b"yes: 1\n", ":1: a key true, expected a name"),
        (b"<<: {a: 1}\n", ":1: could not determine a constructor"),
        (b"a: \xff\n", ": byte or character 3: "),
        (b"a: \x00\n", ": byte or character 3: special characters are not allowed"),
        (b"[" * 5000, " nests too deep"),
        (b"a: 1\n" + b"#" * (1 << 18), " has more than 262,144 bytes"),
    ],
)
def test_what_is_no_such_file(tmp_path, text, sentence):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text)
    with pytest.raises(UsageError) as e:
        from_yaml(file)
    assert str(e.value).startswith(str(file)) and sentence in str(e.value) and "\n" not in str(e.value)


# ---- as a config -----------------------------------------------------------------------------------------------------


def test_as_a_config(tmp_path, caplog):
    file = tmp_path / "mine.yml"
    file.write_text((FOLDER / "config_smollm2_1B.yaml").read_text())
    with caplog.at_level(logging.WARNING, "smoljax"):
        config = settings.load(str(file), ["optim.lr=1e-3", 'data.sources={"shards/web": 1}', "accumulate=8"])
    assert config.run == "runs/mine" and config.optim.lr == 1e-3 and config.accumulate == 8
    assert config.data.sources == {"shards/web": 1} and isinstance(config, Train)
    rotary, unused = (record.getMessage() for record in caplog.records)
    assert rotary.startswith(f"{file}: rope_interleaved is true: ") and "the same training" in rotary
    first, *sections = unused.splitlines()
    assert first == f"{file}: 31 keys have no use here, and leave the mathematics as they are:"
    assert "  general: benchmark_csv_path, consumed_train_samples, ignore_sanity_checks, project, run, step" in sections
    assert "  profiler: (the whole section)" in sections and len(sections) == 10
    assert max(map(len, sections)) <= 120
    with pytest.raises(UsageError, match="unknown setting 'optim.lrr' in Optim; did you mean 'lr'"):
        settings.load(str(file), ["optim.lrr=1"])


def test_only_yaml_and_python_are_configs(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    for name in ("mine.json", "nothing.yaml"):
        with pytest.raises(UsageError) as e:
            settings.load(str(tmp_path / name))
        assert str(e.value) == (
            f"{tmp_path / name} is no config: expected a .py file that says config = Train(...), a .yaml file of "
            "nanotron's, or a shipped name"
        )


def test_it_costs_no_jax(tmp_path):
    """And a Python config costs no YAML."""
    program = (
        "import sys\n"
        "from smoljax import settings\n"
        "settings.load('demo')\n"
        "assert 'yaml' not in sys.modules\n"
        f"settings.load({str(FOLDER / 'config_smollm1_135M.yaml')!r})\n"
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules), 'imported too much'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- interleaved rotary pairs ----------------------------------------------------------------------------------------

TINY = Model(24, 40, 2, 4, 2, head_dim=6, vocab_size=32, max_position_embeddings=16, rope_theta=100.0)


def interleaved(w, tokens):
    """A Llama written out, with nanotron's interleaved rotary embedding: feature 2i is paired with 2i + 1."""
    n, k, h = TINY.num_attention_heads, TINY.num_key_value_heads, TINY.head_dim

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + TINY.rms_norm_eps) * scale

    t = tokens.shape[1]
    turn = jnp.exp(1j * jnp.arange(t)[:, None] * TINY.rope_theta ** (-jnp.arange(0, h, 2) / h))  # T H/2

    def rotate(x):  # B T heads H, as complex numbers x[2i] + j x[2i + 1]
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
        return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["embed"][tokens]
    for i in range(TINY.num_hidden_layers):
        y = norm(x, w["attn_norm"][i])
        q, key, v = (jnp.einsum("btd,dnh->btnh", y, w[name][i]) for name in "qkv")
        key, v = (jnp.repeat(a, n // k, axis=2) for a in (key, v))
        scores = jnp.einsum("btnh,bsnh->bnts", rotate(q), rotate(key)) / jnp.sqrt(h)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        x += jnp.einsum("btnh,nhd->btd", mixed, w["o"][i])
        y = norm(x, w["mlp_norm"][i])
        x += (jax.nn.silu(y @ w["gate"][i]) * (y @ w["up"][i])) @ w["down"][i]
    return norm(x, w["norm"]) @ w["embed"].T


@pytest.mark.slow
def test_interleaved_pairs_are_the_same_training():
    """The same weights, q's and k's rows in another order: the same logits, and the same after ten steps of AdamW."""
    model = jax.jit(lambda: SmolLM(TINY, nnx.Rngs(params=0), init_std=0.3))()
    # Interleaved feature 2i is half-split feature i, and 2i + 1 is i + H/2: rows 0, H/2, 1, H/2 + 1, ...
    order = np.arange(TINY.head_dim).reshape(2, -1).T.ravel()
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
    back = np.argsort(order)

    def theirs(model):
        names = "attn_norm q k v o mlp_norm gate up down".split()
        w = {name: getattr(model.layers, name)[...] for name in names}
        w |= {"embed": model.embed[...], "norm": model.norm[...]}
        return w | {name: w[name][..., order] for name in "qk"}

    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, TINY.vocab_size)

    def loss(logits):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return -picked.mean()

    w = theirs(model)
    logits, forward = jax.jit(lambda m: m(tokens))(model), jax.jit(interleaved)
    np.testing.assert_allclose(forward(w, tokens), logits, atol=2e-5)
    as_it_is = w | {name: w[name][..., back] for name in "qk"}  # a difference that the comparison would see
    assert np.abs(forward(as_it_is, tokens) - logits).max() > 0.1

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.01))

    @jax.jit
    def step(model, w, states):
        ours, grads = jax.value_and_grad(lambda m: loss(m(tokens)))(model)
        theirs, w_grads = jax.value_and_grad(lambda w: loss(interleaved(w, tokens)))(w)
        updates, state = tx.update(grads, states[0], model)
        w_updates, w_state = tx.update(w_grads, states[1], w)
        return optax.apply_updates(model, updates), optax.apply_updates(w, w_updates), (state, w_state), (ours, theirs)

    states, losses = (tx.init(model), tx.init(w)), []
    for _ in range(10):
        model, w, states, both = step(model, w, states)
        losses.append(both)
    losses = np.array(losses)
    assert losses[-1, 0] < losses[0, 0] - 0.2  # it learns
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    expected = theirs(model)
    for name, array in w.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)
