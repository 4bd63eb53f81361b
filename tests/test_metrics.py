"""FLOPs on paper, records that survive a kill, and the line that people read."""

import contextlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from smoljax import metrics
from smoljax.config import SIZES, Data, Optim, Train
from smoljax.errors import CheckpointError

RECORD = {"train/loss": 3.41234, "train/lr": 2.9e-3, "train/grad_norm": 0.81, "train/tokens_per_sec": 412_345.0}
RECORD |= {"train/step_time_s": 0.5, "train/data_wait_s": 0.01}


def test_flops_per_token_on_paper():
    model = SIZES["smollm2-135m"]
    # 6 a weight, and per layer 12 * T/2 * N * H for scores and their product with the values, forward and backward.
    assert metrics.flops_per_token(model, 2048) == 6 * 134_515_008 + 30 * 12 * 1024 * 9 * 64
    assert metrics.flops_per_token(model, 8192) - metrics.flops_per_token(model, 2048) == 30 * 12 * 3072 * 576


@pytest.mark.parametrize(
    "kind, tflops",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("TPU v5 lite", 197), ("TPU v5p", 459), ("cpu", None)],
)
def test_peaks_are_of_the_device_named(kind, tflops):
    devices = [SimpleNamespace(device_kind=kind)] * 8
    assert metrics.peak_flops(devices) == (tflops and 8 * tflops * 1e12)


def test_a_line_cut_by_a_kill_and_records_past_the_checkpoint_are_dropped(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3, 4)) + '{"step": 5, "tr')
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4]
    with metrics.Log(tmp_path, step=2, steps=4) as log:
        assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]
        for n in (3, 4):
            log.write({"step": n, **RECORD})
            assert metrics.read(tmp_path)[-1] == {"step": n, **RECORD}  # on disk at once
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "step 4/4  loss 3.4123  lr 2.90e-03  gnorm 0.810  tok/s 412k  data 2%  eta 00:00"


def test_speed_is_of_the_steps_since_the_last_record(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.seconds)

    def spend(seconds, what=None):
        with meter.timing(what) if what else contextlib.nullcontext():
            now.seconds += seconds

    model = replace(SIZES["smollm2-135m"])
    config = Train(model=model, steps=10, data=Data(batch_size=8, seq_len=1024), optim=Optim(warmup_steps=0))
    stats = {"peak_bytes_in_use": 2e9}
    device = dict(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: stats, process_index=0)
    before = dict.fromkeys(metrics.SPENT, 0.0) | {"productive": 100.0, "lost": 7.0}
    meter = metrics.Meter([SimpleNamespace(**device)] * 2, 4, before)
    meter.enter(config, 4 * 8192)
    values = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "labels": 8192.0, "skipped_steps": 3}
    spend(11)  # opening files, of which nothing is said
    spend(50, "data_wait")  # before the first step: no step waits for it
    meter.starts()
    spend(30, "compile")
    for _ in range(2):
        spend(0.5, "data_wait")
        spend(1.5)
    first = meter.record(6, values, 6 * 8192)
    assert first["train/step_time_s"] == 2.0 and first["train/data_wait_s"] == 0.5
    assert first["train/tokens"] == 6 * 8192 and first["train/tokens_per_sec"] == 4096
    assert first["train/tokens_per_sec_per_device"] == 2048 and first["train/skipped_steps"] == 3
    assert first["train/mfu"] == pytest.approx(4096 * metrics.flops_per_token(model, 1024) / (2 * 989e12))
    assert first["device/mem_peak_gb"] == 2
    spend(9, "checkpoint")  # its own time, not the next step's
    spend(1)
    meter.enter(replace(config, data=Data(batch_size=4, seq_len=2048)), 7 * 8192)
    spend(1)  # step 7 is of the stage before, step 8 of this one
    second = meter.record(8, values, 8 * 8192)
    assert second["train/step_time_s"] == 1.0 and second["train/tokens_per_sec"] == 8192
    both = metrics.flops_per_token(model, 1024) + metrics.flops_per_token(model, 2048)
    assert second["train/mfu"] == pytest.approx(8192 * both / (2 * 2 * 989e12))
    spent = {k: second[f"goodput/{k}_s"] for k in metrics.SPENT}
    assert spent == {"productive": 105, "compile": 30, "checkpoint": 9, "restore": 11, "data_wait": 51} | {
        "eval": 0,
        "lost": 7,
    }
    assert sum(spent.values()) == now.seconds + 107


def test_what_a_kill_took_is_lost(tmp_path):
    """Killed at step 7 with checkpoint 4: the seconds between are lost, the ones before are not."""
    keys = [f"goodput/{k}_s" for k in metrics.SPENT]
    records = [{"step": n} | dict.fromkeys(keys, 0.0) | {keys[0]: 2.0 * n, keys[1]: 5.0} for n in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    zeros = dict.fromkeys(metrics.SPENT, 0.0)
    found = metrics.spent_before(tmp_path, 4)
    assert found == zeros | {"productive": 8.0, "compile": 5.0, "lost": 6.0}
    metrics.keep_spent(tmp_path, found)
    with metrics.Log(tmp_path, 4, 9):  # killed again, before its first record: what was lost before is not forgotten
        assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4]
    assert metrics.spent_before(tmp_path, 4) == found
    assert metrics.spent_before(tmp_path, 2) == zeros | {"productive": 4.0, "compile": 5.0, "lost": 10.0}
    assert metrics.spent_before(tmp_path, 0) == zeros | {"lost": 19.0}
    assert metrics.spent_before(tmp_path / "new", 0) == zeros


def test_seconds_that_a_power_cut_took_are_no_reason_to_stop(tmp_path, capsys):
    for text in ("", "[]", '{"lost": "much"}'):
        (tmp_path / "goodput.json").write_text(text)
        assert metrics.spent_before(tmp_path, 0) == dict.fromkeys(metrics.SPENT, 0.0)
        assert "goodput.json is damaged" in capsys.readouterr().err


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"note": 1}\n')
    for read in (lambda: metrics.spent_before(tmp_path, 1), lambda: metrics.read(tmp_path)):
        with pytest.raises(CheckpointError, match="metrics.jsonl:2 is no record with a step; mend or delete that line"):
            read()


def test_of_a_long_run_a_part_is_read(tmp_path):
    lines = [json.dumps({"step": n} | ({"eval/web/loss": 1.0} if n == 5001 else {})) for n in range(1, 10_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')
    steps = [r["step"] for r in metrics.read(tmp_path, most=100)]
    assert 100 <= len(steps) <= 102 and {100, 5001, 10_000} < set(steps) and steps == sorted(steps)
    assert len(metrics.read(tmp_path)) == 10_000
    assert next(metrics.backwards(tmp_path / "metrics.jsonl"))[1] == {"step": 10_000}


def test_a_step_without_a_loss_is_null(tmp_path):
    with metrics.Log(tmp_path, step=0, steps=2) as log:
        log.write({"step": 1, **RECORD, "train/loss": math.nan, "train/grad_norm": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    assert metrics.read(tmp_path)[0]["train/loss"] is None


def test_numbers_for_people():
    assert [metrics.human(n) for n in (12, 3_279, 1_024_000, 2.097e12)] == ["12", "3.28k", "1.02M", "2.1T"]
    assert [metrics.clock(s) for s in (7, 65, 3 * 3600 + 61)] == ["00:07", "01:05", "3:01:01"]
