"""Sizes, the six published recipes number by number, and mistakes in a config as one sentence before JAX starts."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import yaml
from flax import nnx

from smoljax import settings
from smoljax.config import SIZES, Compute, Data, Mesh, Model, Optim, Stage, Train
from smoljax.errors import UsageError
from smoljax.model import SmolLM

TINY = Model(16, 32, 2, 2, 1, head_dim=8, vocab_size=64, max_position_embeddings=32)
RUN = Train(model=TINY, steps=10, data=Data(seq_len=16, batch_size=4), optim=Optim(warmup_steps=2, decay_steps=3))

PARAMETERS = {"135m": 134_515_008, "360m": 361_821_120, "1.7b": 1_711_376_384}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    model = jax.eval_shape(lambda: SmolLM(SIZES[name], nnx.Rngs(params=0)))
    leaves = jax.tree.leaves(model)
    assert len(leaves) == 11
    counted = sum(leaf.size for leaf in leaves)
    assert counted == SIZES[name].parameters == PARAMETERS[name.partition("-")[2]]


def test_parameters_of_any_shape():
    odd = Model(24, 40, 3, 6, 2, head_dim=10, vocab_size=50)  # head_dim is not hidden / heads
    model = jax.eval_shape(lambda: SmolLM(odd, nnx.Rngs(params=0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == odd.parameters


# ---- the published recipes -------------------------------------------------------------------------------------------

RECIPES = {
    "smollm-135m": "config_smollm1_135M.yaml",
    "smollm-360m": "config_smollm1_360M.yaml",
    "smollm-1-7b": "config_smollm1_1B.yaml",
    "smollm2-135m": "config_smollm2_135M.yaml",
    "smollm2-360m": "config_smollm2_360M.yaml",
    "smollm2-1-7b": "config_smollm2_1B.yaml",
}
# Keys of nanotron's model_config that are no setting here, with the one value they may have.
FIXED = dict(hidden_act="silu", is_llama_config=True, pretraining_tp=1, rope_scaling=None, tie_word_embeddings=True)


def published(file: str) -> dict:
    """nanotron's configuration in our words: every number that says what was trained."""
    y = yaml.safe_load((Path(__file__).parent / "data/nanotron" / file).read_text())
    tokens, optimizer, parallelism = y["tokens"], y["optimizer"], y["parallelism"]
    schedule, adam = optimizer["learning_rate_scheduler"], optimizer["optimizer_factory"]
    stages = [(stage["start_training_step"] - 1, stage["data"]) for stage in y["data_stages"]]  # nanotron: 1, 2, ...
    assert stages[0][0] == 0 and len({data["seed"] for _, data in stages}) == 1

    model = dict(y["model"]["model_config"])
    for key, value in FIXED.items():
        assert model.pop(key) == value
    for key in ("use_cache", "rope_interleaved"):  # the latter: configs/smollm2_1_7b.py says why it is none of ours
        model.pop(key, None)
    model["head_dim"] = model["hidden_size"] // model["num_attention_heads"]

    assert schedule["lr_warmup_style"] == "linear" and adam["name"] == "adamW" and optimizer["accumulate_grad_in_fp32"]
    assert schedule["lr_decay_starting_step"] + schedule["lr_decay_steps"] == tokens["train_steps"]
    rows = tokens["micro_batch_size"] * tokens["batch_accumulation_per_replica"] * parallelism["dp"]
    mixtures = []
    for _, data in stages:
        folders = (folder.replace("datasets/", "shards/") for folder in data["dataset"]["dataset_folder"])
        mixtures.append(dict(zip(folders, data["dataset"]["dataset_weights"], strict=True)))
    every = tokens["val_check_interval"]
    return {f"model.{key}": value for key, value in model.items()} | {
        "steps": tokens["train_steps"],
        "seed": y["general"]["seed"],
        "init_std": y["model"]["init_method"]["std"],
        "init_from": None,
        "save_every": y["checkpoints"]["checkpoint_interval"],
        "compute.dtype": y["model"]["dtype"],
        "log_every": y["logging"]["iteration_step_info_interval"],
        "heldout.every": None if every == -1 else every,
        "data.sources": mixtures[0],
        "stages": tuple(Stage(start, mix) for (start, _), mix in list(zip(stages, mixtures, strict=True))[1:]),
        "data.seq_len": tokens["sequence_length"],
        "data.batch_size": rows,
        "data.mask_documents": False,
        "data.seed": stages[0][1]["seed"],
        "optim.lr": schedule["learning_rate"],
        "optim.warmup_steps": schedule["lr_warmup_steps"],
        "optim.decay_steps": schedule["lr_decay_steps"],
        "optim.decay": schedule["lr_decay_style"],
        "optim.min_lr": schedule["min_decay_lr"],
        "optim.b1": adam["adam_beta1"],
        "optim.b2": adam["adam_beta2"],
        "optim.eps": adam["adam_eps"],
        "optim.weight_decay": optimizer["weight_decay"],
        "optim.weight_decay_on": "all",
        "optim.clip": optimizer["clip_grad"],
    }


DEFAULTS = {"optim.kind": "adamw", "optim.mu_dtype": "float32", "xla_flags": None, "z_loss": 0.0}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_published_one(name):
    ours, theirs = settings.flat(settings.load(name)), published(RECIPES[name])
    if name == "smollm2-1-7b":  # whose stages are the paper's: the file prints one source
        assert theirs.pop("data.sources") == {"shards/smollm2-corpus": 1.0} and theirs.pop("stages") == ()
        paper = {"data.sources", "stages", "data.max_epochs"}
    else:
        paper = set()
        assert ours.pop("data.max_epochs") is None
    assert {key: ours[key] for key in theirs} == theirs
    own_groups = ("mesh.", "compute.", "guard.", "heldout.")
    ours_alone = {key for key in ours.keys() - theirs.keys() if not key.startswith(own_groups)}
    assert ours_alone - paper == {
        "accumulate",
        "run",
        "keep",
        "keep_every",
        "sinks",
        "data.chunk",
        *DEFAULTS,
    }  # nothing that changes the model
    assert ours.items() >= DEFAULTS.items()


def test_smollm2_1_7b_is_the_papers_stages():
    """Tables of the SmolLM2 paper, section 4: percent of web, code, mathematics and synthetic text by stage."""
    kinds = {
        "web": ("fineweb-edu", "dclm"),
        "code": ("starcoderdata", "stack-edu", "starcoder2data", "jupyter"),
        "math": ("open-web-math", "infimm-webmath", "infi-webmath-3plus", "finemath-4plus", "auggsm8k"),
        "synthetic": ("cosmopedia-v2",),
        "long": ("dolma-books-8k", "dclm-8k", "fineweb-edu-8k"),
    }
    config = settings.load("smollm2-1.7b")
    starts = [0, *(stage.start for stage in config.stages)]
    for start, tokens, *shares in [
        (0, 0, 90, 10, 0, 0, 0),
        (2_861_023, 6e12, 75, 20, 5, 0, 0),
        (3_814_698, 8e12, 74, 16, 10, 0, 0),
        (4_768_372, 10e12, 58, 24, 14, 4, 0),
        (5_204_000, None, 0.6 * 58, 0.6 * 24, 0.6 * 14, 0.6 * 4, 40),
    ]:
        assert starts.pop(0) == start
        now = config.at(start).data
        percent = {name.removeprefix("shards/"): 100 * weight for name, weight in now.sources.items()}
        for kind, share in zip(kinds, shares, strict=True):
            assert sum(percent.pop(name, 0) for name in kinds[kind]) == pytest.approx(share)
        assert not percent and now.batch_size * now.seq_len == 2_097_152
        if tokens is not None:  # the first update at or beyond the boundary
            assert (start - 1) * 2_097_152 < tokens <= start * 2_097_152
    assert not starts
    web = [config.at(s).data.sources for s in (0, 2_861_023, 3_814_698)]
    assert [w["shards/fineweb-edu"] / (w["shards/fineweb-edu"] + w["shards/dclm"]) for w in web] == pytest.approx(
        [0.6, 0.6, 0.4]
    )
    last = config.at(5_204_000)
    assert last.model == SIZES["smollm2-1.7b"] and config.at(5_203_999).model == config.model
    assert (last.data.seq_len, last.data.batch_size) == (8192, 256)
    assert last.data.sources == pytest.approx(settings.load("smollm2-1.7b-8k").data.sources)


def test_no_set_is_read_more_than_five_times_but_openwebmath():
    """The paper's sizes in billions of tokens; what it does not say of the mixtures is guessed so that this holds."""
    sizes = {"fineweb-edu": 1300, "dclm": 3800, "starcoderdata": 250, "stack-edu": 125, "infimm-webmath": 40}
    sizes |= {"infi-webmath-3plus": 20.5, "finemath-4plus": 10, "cosmopedia-v2": 28, "open-web-math": 12}
    config = settings.load("smollm2-1.7b")
    read = dict.fromkeys(sizes, 0.0)
    ends = [*(stage.start for stage in config.stages), config.steps]
    for start, end in zip([0, *ends], ends, strict=False):
        sources = config.at(start).data.sources
        for name in sizes:
            read[name] += (end - start) * 2_097_152 / 1e9 * sources.get(f"shards/{name}", 0.0)
    often = {name: tokens / sizes[name] for name, tokens in read.items() if tokens / sizes[name] > 5}
    assert often.keys() == {"open-web-math"} and 8 < often["open-web-math"] < 12  # as the recipe's comment says
    assert config.data.max_epochs == 5
    assert read["starcoderdata"] / 250 == pytest.approx(4, abs=0.01)  # the paper: about 4


def test_recipes_see_the_published_number_of_tokens():
    billions = dict(zip(RECIPES, (629, 629, 1049, 2097, 4089, 10_989), strict=True))
    for name, expected in billions.items():
        c = settings.load(name)
        assert round(c.steps * c.data.batch_size * c.data.seq_len / 1e9) == expected


@pytest.mark.parametrize("size, theta", [("135m", 100_000.0), ("360m", 100_000.0), ("1-7b", 130_000.0)])
def test_extension_to_8k(size, theta):
    short, long = settings.load(f"smollm2-{size}"), settings.load(f"smollm2-{size}-8k")
    assert long.model == replace(short.model, rope_theta=theta, max_position_embeddings=8192)
    assert long.model == SIZES[f"smollm2-{size.replace('-', '.')}"]  # exactly what was released
    assert long.data.seq_len == 8192 and short.data.seq_len == 2048
    assert long.data.seq_len * long.data.batch_size == short.data.seq_len * short.data.batch_size
    assert 75e9 < long.steps * long.data.seq_len * long.data.batch_size < 76e9
    assert sum(long.data.sources.values()) == pytest.approx(1)
    folder, _, step = long.init_from.partition("/checkpoints/")
    assert folder == short.run
    if step:  # a checkpoint that the pretraining run still has at its end
        saved = range(short.save_every, short.steps + 1, short.save_every)
        assert int(step) in saved[-short.keep :]
        assert short.steps - int(step) == long.steps


@pytest.mark.parametrize("name", settings.shipped())
def test_shipped_config(name):
    config = settings.load(name)
    assert config.run == f"runs/{settings.find(name).stem}"
    assert config.optim.warmup_steps + config.optim.decay_steps <= config.steps
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert settings.from_dict(Train, saved) == config
    # Its docstring gives the command, which finds this very file.
    docstring = settings.find(name).read_text().split('"""')[1]
    words = [line.split() for line in docstring.splitlines()]
    commands = [w for w in words if w[:1] == ["smoljax"] or w[:2] == ["make", "demo"]]
    assert commands, "no command in the docstring"
    for w in commands:
        if w[:2] == ["smoljax", "pretrain"]:
            assert settings.find(w[2]) == settings.find(name)


# ---- settings on the command line ------------------------------------------------------------------------------------


def test_override_every_type():
    config = settings.override(
        RUN,
        [
            "optim.lr=1e-3",
            "steps=20",
            "data.mask_documents=TRUE",
            "compute.dtype=bfloat16",
            "keep_every=2000",
            "run=somewhere/else",
            'data.sources={"a": 3, "b": 1}',
            "mesh.fsdp=-1",
        ],
    )
    assert (config.optim.lr, config.steps, config.data.mask_documents) == (1e-3, 20, True)
    assert (config.compute.dtype, config.keep_every, config.run) == ("bfloat16", 2000, "somewhere/else")
    assert config.data.sources == {"a": 3, "b": 1}
    assert config.optim.warmup_steps == 2 and config.model == TINY  # the rest is untouched
    assert settings.override(config, ["keep_every=none", "data.sources=a/b=c"]).keep_every is None
    assert settings.override(config, ["data.sources=a/b=c"]).data.sources == {"a/b=c": 1.0}
    assert settings.override(RUN, []) == RUN


def test_two_settings_may_depend_on_each_other():
    both = ["data.seq_len=64", "model.max_position_embeddings=64"]
    assert settings.override(RUN, both).data.seq_len == 64
    assert settings.override(RUN, both[::-1]).data.seq_len == 64
    with pytest.raises(UsageError, match="beyond model.max_position_embeddings = 32"):
        settings.override(RUN, both[:1])


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("optim.lrr=1", "unknown setting 'optim.lrr' in Optim; did you mean 'lr'?; it has lr, warmup_steps"),
        ("optm.lr=1", "unknown setting 'optm' in Train; did you mean 'optim'?"),
        ("zzz=1", "unknown setting 'zzz' in Train; it has model, steps"),
        ("steps=ten", "steps is int, got 'ten'"),
        ("steps=1e3", "steps is int, got '1e3'"),
        ("optim.lr=fast", "optim.lr is float, got 'fast'"),
        ("data.mask_documents=yes", "data.mask_documents is bool, got 'yes'"),
        ("keep_every=often", "keep_every is int, got 'often'"),
        ("steps=none", "steps is int, got 'none'"),
        ("data.sources={a: 1}", "data.sources is dict, got '{a: 1}'"),
        ('data.sources={"a": "much"}', "data.sources gives 'a' the weight 'much', expected a number above 0"),
        ('data.sources={"a": -1}', "data.sources gives 'a' the weight -1, expected a number above 0"),
        ('data.sources={"a": true}', "data.sources gives 'a' the weight True, expected a number above 0"),
        ('stages=[{"start": 2, "seqlen": 4}]', "a stage says {'start': 2, 'seqlen': 4}; it needs start, and may say"),
        ('stages=[{"seq_len": 4}]', "a stage says {'seq_len': 4}; it needs start"),
        ("stages=5", "stages holds [5], expected Stage(start=..., ...)"),
        ('stages=[{"start": 0}]', "a stage's start is 0, expected > 0"),
        ('stages=[{"start": 10}]', "a stage starts at [10], which steps = 10 does not reach"),
        ('stages=[{"start": 4}, {"start": 4}]', "stages start at [4, 4], expected each after the one before"),
        (
            'stages=[{"start": 4, "seq_len": 48}]',
            "the stage at 4: rows of 48 do not make up 64 tokens; set its batch_size",
        ),
        ('stages=[{"start": 4, "seq_len": 24, "batch_size": 2}]', "data.seq_len is 16, which does not divide 24"),
        ('stages=[{"start": 4, "batch_size": 3}]', None),
        ("sinks=wand", "sinks has wand; expected some of tensorboard, wandb, trackio"),
        ("guard.spike_window=1", "guard.spike_window is 1, expected 0 or at least 2"),
        ("guard.leave_out=3,x", "guard.leave_out is (3, 'x'), expected steps as in metrics.jsonl"),
        ("guard.leave_out=3,4", None),
        ("guard.leave_out=3,99999999999", "guard.leave_out names [99999999999], beyond steps = 10"),
        ("guard.watchdog=0", "guard.watchdog is 0.0, expected more than 0"),
        ("heldout.every=0", "heldout.every is 0, expected at least 1"),
        ("heldout.sets=held", "heldout.sets has 'held': 1.0, expected names and folders"),
        ("data.max_epochs=0", "data.max_epochs is 0.0, expected none or more than 0"),
        ("data.chunk=24", "data.seq_len is 16, which does not divide 24"),
        ("optim=fast", "optim is a group of settings; set one of optim.{lr, "),
        ("steps.x=1", "steps is one value, it has no settings inside"),
        ("steps", "expected a setting like optim.lr=1e-3, got 'steps'"),
        ("optim.lr=nan", "optim.lr is nan, expected more than 0"),
        ("optim.lr=inf", "optim.lr is inf, expected more than 0"),
        ("optim.decay=step", "optim.decay is 'step', expected one of linear, 1-sqrt, cosine"),
        ("optim.min_lr=1", "optim.min_lr is 1.0, above optim.lr = 0.003"),
        ("optim.b2=1", "optim.b2 is 1.0, expected 0 <= b2 < 1"),
        ("optim.weight_decay_on=norms", "optim.weight_decay_on is 'norms', expected all or matrices"),
        ("optim.warmup_steps=8", "optim.warmup_steps + optim.decay_steps = 11 do not fit into steps = 10"),
        ("accumulate=3", "data.batch_size is 4, which accumulate = 3 does not divide"),
        ("accumulate=0", "accumulate is 0, expected more than 0"),
        ("keep_every=0", "keep_every is 0, expected more than 0"),
        ("data.batch_size=0", "data.batch_size is 0, expected at least 1"),
        ("data.seq_len=64", "data.seq_len is 64, beyond model.max_position_embeddings = 32; raise the latter"),
        ("model.num_attention_heads=3", None),  # 3 query heads over 1 key/value head: fine
        ("model.num_key_value_heads=3", "model.num_attention_heads is 2, not a multiple of model.num_key_value_heads"),
        ("model.head_dim=7", "model.head_dim is 7, but rotary embedding needs an even size"),
        ("model.eos_token_id=64", "model.eos_token_id is 64, expected none or an id below model.vocab_size = 64"),
        ("model.rope_theta=0", "model.rope_theta is 0.0, expected more than 0"),
        ("compute.dtype=float16", "compute.dtype is 'float16', expected float32 or bfloat16"),
        ("compute.unroll=0", "compute.unroll is 0, expected at least 1"),
        ("mesh.data=-1", "mesh is data=-1 fsdp=-1 tensor=1; expected sizes of 1 or more, at most one of them -1"),
        ("mesh.tensor=0", "mesh is data=1 fsdp=-1 tensor=0; expected sizes of 1 or more, at most one of them -1"),
    ],
)
def test_mistakes_are_sentences(setting, sentence):
    if sentence is None:
        settings.override(RUN, [setting])
        return
    with pytest.raises(UsageError) as e:
        settings.override(RUN, [setting])
    assert sentence in str(e.value) and e.value.code == 2


def test_settings_that_contradict_each_other():
    for pair in (["optim=1", "optim.lr=1"], ["optim.lr=1", "optim=1"]):
        with pytest.raises(UsageError):
            settings.override(RUN, pair)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Optim(lr="fast"), "Optim.lr is float, got 'fast'"),
        (lambda: Train(model=TINY, steps=1.5), "Train.steps is int, got 1.5"),
        (lambda: Train(model=TINY, steps=True), "Train.steps is int, got True"),
        (lambda: replace(RUN, data=None), "Train.data is Data, got None"),
        (lambda: Data(sources=["a"]), "Data.sources is dict, got ['a']"),
        (lambda: Mesh(data="all"), "Mesh.data is int, got 'all'"),
        (lambda: Compute(remat=1), "Compute.remat is str, got 1"),
        (lambda: Compute(remat="most"), "compute.remat is 'most', expected one of auto, none, minimal_with_context"),
    ],
)
def test_mistakes_in_a_file_are_sentences(make, sentence):
    with pytest.raises(UsageError) as e:
        make()
    assert sentence in str(e.value)


def test_an_integer_is_a_float_where_one_is_meant():
    assert type(Optim(lr=1).lr) is float and type(replace(TINY, rope_theta=10_000).rope_theta) is float


def test_config_files(tmp_path):
    with pytest.raises(UsageError, match="no config named 'smolm-135m'; did you mean 'smollm-135m'"):
        settings.load("smolm-135m")
    with pytest.raises(UsageError, match="nothing.py is no config: expected a .py file"):
        settings.load(str(tmp_path / "nothing.py"))
    assert settings.load("smollm_135m") == settings.load("smollm-135m")
    for text, sentence in [
        ("config = 3", "must say `config = Train(...)`, found int"),
        ("", "must say `config = Train(...)`, found NoneType"),
        ("config = (", "does not run as Python: SyntaxError"),
        ("from smoljax.config import Optim\nconfig = Optim(lr=-1)", "optim.lr is -1.0, expected more than 0"),
        ("from smoljax.config import Optim\nconfig = Optim(rate=1)", "TypeError"),
    ]:
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(UsageError) as e:
            settings.load(str(tmp_path / "mine.py"))
        assert str(tmp_path / "mine.py") in str(e.value) and sentence in str(e.value)


def test_an_edited_config_is_read_again(tmp_path):
    """Python would match a .pyc by size and whole seconds, and give the first of these twice."""
    file = tmp_path / "mine.py"
    for lr in (1e-3, 2e-3):
        text = (
            "from smoljax.config import *\nconfig = Train(model=SIZES['smollm-135m'], steps=9000, optim=Optim(lr={}))"
        )
        file.write_text(text.format(lr))
        os.utime(file, (1e9, 1e9))
        assert settings.load(str(file)).optim.lr == lr
    assert list(tmp_path.iterdir()) == [file]


def test_saved_config():
    saved = json.loads(json.dumps(dataclasses.asdict(RUN)))
    assert settings.from_dict(Train, saved) == RUN
    with pytest.raises(UsageError, match="unknown key 'learning_rate' in a saved Optim"):
        settings.from_dict(Train, saved | {"optim": {"learning_rate": 1.0}})
    with pytest.raises(UsageError, match="saved Train: .*steps"):
        settings.from_dict(Train, {key: saved[key] for key in saved if key != "steps"})


def test_mistakes_cost_no_jax():
    """A mistake in the command is known before JAX, which takes seconds, is imported."""
    program = (
        "import sys\n"
        "from smoljax import errors, settings\n"
        "code = errors.run(lambda argv: settings.load(*argv), ['smollm2-135m', ['optim.lrr=1']])\n"
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules), 'imported too much'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "smoljax: unknown setting 'optim.lrr' in Optim; did you mean 'lr'?; it has lr, warmup_steps, decay_steps, "
        "decay, min_lr, b1, b2, eps, weight_decay, weight_decay_on, clip, kind, mu_dtype\n"
    )
