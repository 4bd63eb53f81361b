"""`smoljax pretrain` from outside: resume bit for bit, other meshes, extension, and a user's mistakes."""

import dataclasses
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import corpus
import jax
import numpy as np
import pytest

from infer import convert
from smoljax import budget, checkpoint, committed, metrics, readings, runs, settings, sharding, step
from smoljax.data import Rows
from smoljax.errors import Error, run
from smoljax.step import abstract_state
from train import pretrain

V = 64
CONFIG = """
from smoljax.config import Data, Model, Optim, Train

config = Train(
    model=Model(48, 96, 2, 4, 2, head_dim=12, vocab_size=64, max_position_embeddings=64),
    steps=4,
    data=Data(seq_len=32, batch_size=8, mask_documents=True),
    optim=Optim(lr=1e-2, warmup_steps=1),
    save_every=2,
    init_std=0.1,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, shards, and shards of other text."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "tiny.py").write_text(CONFIG)
    corpus.write(folder / "shards", corpus.documents(200, V), V)
    corpus.write(folder / "others", corpus.documents(200, V, seed=1), V)
    return folder


def words(place, name, *settings):
    return [str(place / "tiny.py"), f"data.sources={place / 'shards'}", f"run={place / name}", *settings]


def arrays(folder, step):
    """Every array of a checkpoint by name, read without the code under test's trees."""
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer(folder / "checkpoints") as orbax:
        saved = orbax.checkpointables_metadata(step).metadata
        wanted = {
            k: {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in saved[k].items()}
            for k in ("model", "opt", "guard")
        }
        found = orbax.load_checkpointables(step, wanted)
    return {f"{k}.{n}": np.asarray(a) for k, tree in found.items() for n, a in tree.items()}


ROOT = Path(__file__).parent.parent


def losses(folder):
    return [(r["step"], r["train/loss"], r["train/grad_norm"], r["train/lr"]) for r in metrics.read(folder)]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(place, launcher):
    argv = ("steps=60", "save_every=5", "keep=3")
    assert pretrain.main(words(place, "whole", *argv)) == 0
    child = launcher.one(*words(place, "killed", *argv))
    while not child.file("code").exists() and not committed.steps(place / "killed"):
        time.sleep(0.01)
    child.kill(signal.SIGKILL)
    assert child.code == -signal.SIGKILL
    with checkpoint.Checkpoints(place / "killed") as saved:
        assert 0 < saved.latest < 60
    assert pretrain.main(words(place, "killed", *argv)) == 0

    whole, killed = (arrays(place / name, 60) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and {"model.layers.q", "opt.1.mu.layers.q", "opt.1.nu.embed"} < whole.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], killed[name], err_msg=name)
    assert losses(place / "whole") == losses(place / "killed")
    assert [r["step"] for r in metrics.read(place / "killed")] == list(range(1, 61))
    assert losses(place / "whole")[-1][1] < 0.6 * losses(place / "whole")[0][1]


@pytest.mark.slow
def test_a_run_on_8_devices_goes_on_on_4(place, launcher):
    assert pretrain.main(words(place, "eight", "steps=4", "mesh.fsdp=4", "mesh.tensor=2")) == 0
    assert pretrain.main(words(place, "four", "steps=2", "mesh.fsdp=4", "mesh.tensor=2")) == 0
    child = launcher.one(*words(place, "four", "steps=4", "mesh.data=2", "mesh.fsdp=2"), devices=4)
    assert child.code == 0, child.err
    assert "resuming with mesh.fsdp = 2 (was 4)" in child.err and "4 x cpu" in child.err
    eight, four = losses(place / "eight"), losses(place / "four")
    assert [s for s, *_ in four] == [1, 2, 3, 4]
    np.testing.assert_allclose([x[1] for x in eight], [x[1] for x in four], atol=1e-5)
    for (name, a), b in zip(arrays(place / "eight", 4).items(), arrays(place / "four", 4).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.curves
def test_the_run_folder_holds_what_the_readme_says(place, capsys):
    argv = words(place, "folder", "steps=6", "keep=1", "keep_every=4")
    assert pretrain.main(argv) == 0
    out = capsys.readouterr()
    assert out.out.startswith(f"{place / 'folder'}: 6 steps, 1.54k tokens, loss ")
    assert "step 6/6" in out.err and "parameters, computed in float32" in out.err and "from scratch" in out.err
    assert sorted(p.name for p in (place / "folder/checkpoints").iterdir()) == ["4", "6"]
    assert (place / "folder/curves.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((place / "folder/config.json").read_text())
    assert saved["optim"]["lr"] == 1e-2 and saved["steps"] == 6 and saved["model"]["hidden_size"] == 48
    assert (place / "folder/tokenizer.json").read_bytes() == (place / "shards/tokenizer.json").read_bytes()
    records = metrics.read(place / "folder")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[3]["train/tokens"] == 4 * 8 * 32
    assert {"train/tokens_per_sec", "train/step_time_s", "train/data_wait_s", "host/rss_gb"} < records[3].keys()
    assert pretrain.main(argv) == 0  # nothing left to do
    assert "is at step 6 already" in capsys.readouterr().out


def test_init_from_takes_the_weights_and_not_the_moments(place):
    assert pretrain.main(words(place, "base", "steps=4")) == 0
    longer = ("model.max_position_embeddings=256", "model.rope_theta=100000", "data.seq_len=128", "data.batch_size=8")
    argv = words(
        place, "longer", *longer, f"init_from={place / 'base'}", "optim.warmup_steps=2", "steps=2", "save_every=1"
    )
    assert pretrain.main([*argv, "keep=5"]) == 0
    base, first = arrays(place / "base", 4), arrays(place / "longer", 1)
    for name in base:  # warmup starts at learning rate 0, so the first update moves nothing
        if name.startswith("model."):
            np.testing.assert_array_equal(base[name], first[name], err_msg=name)
    assert any((base[n] != first[n]).any() for n in base if ".mu." in n)
    _, config, step = checkpoint.load_model(place / "longer")
    assert (config.rope_theta, config.max_position_embeddings, step) == (100_000, 256, 2)


def test_a_stage_has_its_own_length_theta_and_masking(place, capsys):
    """Each checkpoint says the model that its last update trained, and the stage's loss is that of its theta."""
    stage = '[{"start": 3, "seq_len": 64, "rope_theta": 500000, "mask_documents": false}]'
    short = ("model.max_position_embeddings=32", "keep=9", "save_every=1", "steps=5", f"stages={stage}")
    assert pretrain.main(words(place, "stages", *short, "mesh.fsdp=4", "mesh.tensor=2")) == 0
    assert "stage    from step 3: 4 x 64 tokens, theta 500000" in capsys.readouterr().err
    sizes = {step: checkpoint.load_model(place / f"stages/checkpoints/{step}")[1] for step in range(1, 6)}
    assert {n: (m.rope_theta, m.max_position_embeddings) for n, m in sizes.items()} == {
        n: (10_000, 32) if n <= 3 else (500_000, 64) for n in range(1, 6)
    }
    config = settings.load(str(place / "tiny.py"), words(place, "stages", *short)[1:])
    model, _, _ = checkpoint.load_model(place / "stages/checkpoints/3")
    batch = [Rows(config).row(3, i) for i in range(4)]
    batch = {k: np.stack([row[k] for row in batch]) for k in batch[0]}
    assert set(batch) == {"tokens", "labels"} and batch["tokens"].shape == (4, 64)
    found = metrics.read(place / "stages")[3]["train/loss"]
    for theta in (500_000.0, 10_000.0):
        model.config = dataclasses.replace(model.config, rope_theta=theta)
        nats = np.asarray(step.losses(model, batch, config.compute))
        loss = nats.sum() / (batch["labels"] != -1).sum()
        assert (abs(loss - found) < 2e-6) == (theta == 500_000), (theta, loss, found)
    assert [r["train/tokens"] for r in metrics.read(place / "stages")] == [256, 512, 768, 1024, 1280]


@pytest.mark.slow
def test_remat_and_attention_are_chosen_and_said_and_config_json_stays_as_written(place, capsys, monkeypatch):
    """The next machine chooses anew; what was chosen is what is compiled, and what a dump would say."""
    compiled, made = [], step.compiled_step

    def seen(config, places):
        compiled.append(config.compute.remat)
        return made(config, places)

    monkeypatch.setattr(step, "compiled_step", seen)
    for memory, remat in ((10**9, "minimal_with_context"), (1000, "full")):
        monkeypatch.setattr(budget, "device_memory", lambda device, memory=memory: memory)
        argv = words(place, f"remat-{remat}", "steps=1", "optim.warmup_steps=0")
        assert pretrain.main(argv) == 0
        err = capsys.readouterr().err
        assert f"memory   {remat} of {memory / 1e9:.1f} GB: 0.0 GB by formula" in err
        assert "attention  blocked (on cpu)" in err and compiled.pop() == remat
        saved = json.loads((place / f"remat-{remat}/config.json").read_text())
        assert saved["compute"]["remat"] == "auto"
    assert run(pretrain.main, [*words(place, "remat-cudnn"), "compute.attention=cudnn"]) == 2
    assert "compute.attention=cudnn needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (place / "remat-cudnn").exists()


def compiling_to(update):
    """What jit gives, as far as pretrain asks it."""
    return SimpleNamespace(lower=lambda state, batch: SimpleNamespace(compile=lambda: update))


def test_what_does_not_fit_says_what_it_needs(place, capsys, monkeypatch):
    def full(config, places):
        def update(state, batch):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

        return compiling_to(update)

    monkeypatch.setattr(step, "compiled_step", full)
    assert run(pretrain.main, words(place, "oom")) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a device has not enough memory: by formula a device needs 0.00 GB" in err
    assert "Raise accumulate (now 1), set compute.remat=full, or use more devices" in err


def test_dry_run_needs_no_data_and_writes_nothing(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    stage = 'stages=[{"start": 2, "seq_len": 64}]'
    assert run(pretrain.main, ["tiny.py", "--dry-run", stage, "data.sources=nowhere"]) == 2
    assert "a micro-batch of 4 rows (data.batch_size / accumulate) does not split over 8" in capsys.readouterr().err
    assert pretrain.main(["tiny.py", "--dry-run", "data.sources=nowhere", "run=runs/dry"]) == 0
    out = capsys.readouterr().out
    assert "stage at 0: 8 x 32 random tokens, loss 4." in out and "guessing is 4.1589" in out
    assert sorted(place.iterdir()) == before


MISTAKES = {
    "unknown key": (["optim.lrr=1"], 2, "unknown setting 'optim.lrr' in Optim; did you mean 'lr'?"),
    "wrong type": (["steps=ten"], 2, "steps is int, got 'ten'"),
    "heads": (["model.num_key_value_heads=3"], 2, "not a multiple of model.num_key_value_heads = 3"),
    "too long": (["data.seq_len=65"], 2, "beyond model.max_position_embeddings = 64"),
    "missing shards": (["data.sources=nowhere"], 3, "no shards at nowhere"),
    "vocabulary": (["model.vocab_size=40"], 3, "beyond model.vocab_size = 40"),
    "mesh": (["mesh.tensor=3"], 2, "found 8; set mesh.data"),
    "rows": (["data.batch_size=12"], 2, "does not split over 8 devices"),
    "missing weights": (["init_from=nowhere"], 2, "there is no nowhere"),
    "end of text": (["model.eos_token_id=3"], 2, "ends its documents with token 0, but model.eos_token_id is 3"),
    "no folder": (["run="], 2, "run is empty"),
    "seed": (["seed=99999999999"], 2, "below 2**32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(place, capsys, name):
    settings, code, sentence = MISTAKES[name]
    assert run(pretrain.main, words(place, f"mistake-{name}", *settings)) == code
    err = capsys.readouterr().err.strip()
    assert sentence in err and err.count("\n") == 0 and err.startswith("smoljax: "), err


def test_a_run_goes_on_only_as_itself(place, capsys):
    assert pretrain.main(words(place, "itself")) == 0
    capsys.readouterr()
    assert run(pretrain.main, words(place, "itself", "steps=6", "model.hidden_size=64", "seed=1")) == 2
    err = capsys.readouterr().err
    assert "is a run of another config: model.hidden_size = 64 (the run has 48), seed = 1 (the run has 0)" in err
    assert run(pretrain.main, words(place, "itself", "steps=6", f"data.sources={place / 'others'}")) == 3
    assert "was trained on other data" in capsys.readouterr().err
    assert run(pretrain.main, words(place, "itself", "steps=6", "optim.lr=1e-3")) == 0
    assert "resuming with optim.lr = 0.001 (was 0.01)" in capsys.readouterr().err

    # Weights are no run: training into their folder would take it for a fresh one, and delete them.
    for form in ("hf", "orbax"):
        assert convert.main([str(place / "itself"), str(place / form), "--to", form]) == 0
        before = sorted(p for p in (place / form).rglob("*"))
        assert run(pretrain.main, words(place, form)) == 2
        assert "not a run" in capsys.readouterr().err
        assert sorted(p for p in (place / form).rglob("*")) == before

    (place / "file").write_text("")
    assert run(pretrain.main, words(place, "file")) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    (place / "papers").mkdir()
    (place / "papers/thesis.txt").write_text("mine")
    assert run(pretrain.main, words(place, "papers")) == 2
    assert "is not empty and not a run" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_refused_may_be_allowed_by_name(place, capsys):
    assert pretrain.main(words(place, "allowed")) == 0
    other = words(place, "allowed", "steps=6", "optim.b2=0.99", "optim.weight_decay=0.1")
    capsys.readouterr()
    assert run(pretrain.main, [*other, "--allow-change", "optim.b2"]) == 2
    err = capsys.readouterr().err
    assert "another config: optim.weight_decay = 0.1 (the run has 0.01);" in err and "optim.b2" not in err
    for key in ("model.hidden_size", "data.seed", "guard.spike_window", "optim.beta2", "optim.kind"):
        assert run(pretrain.main, [*other, "--allow-change", key]) == 2
        assert f"--allow-change {key}: expected a setting such as optim.b2" in capsys.readouterr().err
    assert pretrain.main([*other, "--allow-change", "optim.b2", "--allow-change", "optim.weight_decay"]) == 0
    assert "resuming with optim.b2 = 0.99 (was 0.95)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_that_is_left_out_is_read_and_not_learned_from(place, capsys):
    argv = ("steps=5", "save_every=1", "keep=9", "optim.warmup_steps=0", "guard.leave_out=3,4", "guard.spike_window=2")
    assert pretrain.main(words(place, "out", *argv)) == 0
    two, three, four, five = (arrays(place / "out", n) for n in (2, 3, 4, 5))
    for name in two:
        np.testing.assert_array_equal(two[name], three[name], err_msg=name)
        np.testing.assert_array_equal(two[name], four[name], err_msg=name)
    assert (four["model.embed"] != five["model.embed"]).any() and five["guard.skipped"] == 0
    assert five["opt.1.count"] == 3 and not (place / "out/dumps").exists()
    assert [r["train/tokens"] for r in metrics.read(place / "out")] == [256 * n for n in range(1, 6)]
    again = [*words(place, "out", *argv[1:]), "steps=6"]  # what was left out may stay on the list, no more
    again[again.index("guard.leave_out=3,4")] = "guard.leave_out=2,3,4,6"
    assert run(pretrain.main, again) == 2
    assert (
        "guard.leave_out names [2], but the run has learned from them: it goes on from step 5"
        in capsys.readouterr().err
    )
    # Its loss is that of the weights before it, on its own rows.
    model, _, _ = checkpoint.load_model(place / "out/checkpoints/2")
    config = settings.load(str(place / "tiny.py"), words(place, "out", *argv)[1:])
    batch = [Rows(config).row(3, i) for i in range(8)]
    batch = {k: np.stack([row[k] for row in batch]) for k in batch[0]}
    loss = np.asarray(step.losses(model, batch, config.compute)).sum() / (batch["labels"] != -1).sum()
    assert abs(loss - metrics.read(place / "out")[3]["train/loss"]) < 2e-6


def test_weights_of_another_tokenizer_are_refused(place, capsys, tmp_path):
    assert pretrain.main(words(place, "first")) == 0
    other = corpus.write(tmp_path / "other", corpus.documents(50, 60), 60)
    capsys.readouterr()
    settings = (f"data.sources={other}", f"init_from={place / 'first'}")
    assert run(pretrain.main, words(place, "second", *settings)) == 3
    assert "was made with another tokenizer than the model's" in capsys.readouterr().err


def test_ids_that_no_text_uses_are_said(place, caplog):
    assert pretrain.main(words(place, "wide", "model.vocab_size=80", "steps=1")) == 0
    assert "has a tokenizer of 64 ids, model.vocab_size is 80" in caplog.text


def test_a_start_killed_before_its_first_checkpoint_may_change(place):
    assert run(pretrain.main, words(place, "began", "mesh.tensor=3")) == 2  # after the folder was made
    other = ("seed=1", f"data.sources={place / 'others'}")
    assert pretrain.main(words(place, "began", *other)) == 0
    assert json.loads((place / "began/config.json").read_text())["seed"] == 1


def test_one_run_is_trained_by_one_process(place, launcher):
    argv = words(place, "busy", "steps=100000", "save_every=100000")
    first = launcher.one(*argv, hold=1)
    first.until("held")
    second = launcher.one(*argv)
    assert second.code == 2
    assert second.err.startswith("smoljax: another `smoljax pretrain` is at work in") and second.err.count("\n") == 1
    first.kill(signal.SIGKILL)
    assert first.code == -signal.SIGKILL


def test_a_damaged_metrics_file_is_named(place, capsys):
    assert pretrain.main(words(place, "metrics", "steps=2")) == 0
    (place / "metrics/metrics.jsonl").write_text('{"step": 1}\n{"step": oh}\n')
    assert run(pretrain.main, words(place, "metrics", "steps=4")) == 4
    assert "metrics.jsonl:2 is not JSON" in capsys.readouterr().err


def test_numbers_are_read_a_step_late(place, monkeypatch):
    events, compiled = [], step.compiled_step

    def noted(config, places):
        update = compiled(config, places)
        return compiling_to(lambda state, batch: events.append("dispatch") or update(state, batch))

    class Readings(readings.Readings):
        def __call__(self, n, *rest, **more):
            events.append(n)
            return super().__call__(n, *rest, **more)

    monkeypatch.setattr(step, "compiled_step", noted)
    monkeypatch.setattr(readings, "Readings", Readings)
    assert pretrain.main(words(place, "late", "steps=5", "save_every=4")) == 0
    d = "dispatch"  # step 4 is saved, and the last is the last: nothing is dispatched before they are read
    assert events == [d, d, 1, d, 2, d, 3, 4, d, 5]


def test_a_loss_that_is_never_finite_stops_the_run_and_changes_nothing(place, capsys):
    argv = words(place, "nan", "steps=8", "init_std=1e18", "optim.warmup_steps=0")
    assert run(pretrain.main, argv) == 1
    err = capsys.readouterr().err
    assert err.count("the update was not applied") == 2 and "3 updates in a row could not be applied" in err
    assert sorted(p.name for p in (place / "nan/dumps").iterdir()) == ["1", "2", "3"]
    config = settings.load(*(argv[0], argv[1:]))
    mesh = sharding.mesh(config.mesh)
    places = sharding.shardings(abstract_state(config), mesh)
    fresh = checkpoint.by_name(runs.initial_state(config, None, places).model)
    saved = arrays(place / "nan", 2)
    for name, array in fresh.items():
        np.testing.assert_array_equal(saved[f"model.{name}"], array)
    assert saved["opt.1.count"] == 0 and saved["guard.skipped"] == saved["guard.in_a_row"] == 2
    with pytest.raises(Error) as told:
        pretrain.main(argv)
    assert told.value.agreed  # several processes end as one does: a save in flight is waited for


def test_a_truncated_shard_is_named_before_a_step(place, capsys, tmp_path):
    folder = corpus.write(tmp_path / "cut", corpus.documents(50, V), V)
    data = (folder / "00001.ds").read_bytes()
    (folder / "00001.ds").write_bytes(data[:-2])
    assert run(pretrain.main, words(place, "cut", f"data.sources={folder}")) == 3
    assert f"00001.ds has {len(data) - 2} bytes, expected {len(data)}" in capsys.readouterr().err
    assert not (place / "cut").exists()


def test_one_step_program_is_compiled(place, caplog):
    with jax.log_compiles():
        assert pretrain.main(words(place, "compiled", "steps=5", "data.seq_len=24")) == 0
    assert sum("Compiling jit(train_step)" in r.getMessage() for r in caplog.records) == 1
    records = metrics.read(place / "compiled")
    assert records[0]["goodput/compile_s"] > 0 and len({r["goodput/compile_s"] for r in records}) == 1
