"""FLOPs on paper, records that survive a kill, and the line that people read."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from smoljax import metrics
from smoljax.config import SIZES, Data, Optim, Train

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

    def spend(seconds):
        now.seconds += seconds

    model = replace(SIZES["smollm2-135m"])
    config = Train(model=model, steps=10, data=Data(batch_size=8, seq_len=1024), optim=Optim(warmup_steps=0))
    meter = metrics.Meter(
        config,
        [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: {"peak_bytes_in_use": 2e9})] * 2,
        start=4,
    )
    values = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "labels": 8192.0}
    with meter.waiting():
        spend(50)  # before the first step: no step waits for it
    with meter.dispatching():
        spend(30)
    for _ in range(2):
        with meter.waiting():
            spend(0.5)
        with meter.dispatching():
            spend(0.0)
        spend(1.5)
    first = meter.record(6, values)
    assert first["goodput/compile_s"] == 30 and first["train/step_time_s"] == 2.0 and first["train/data_wait_s"] == 0.5
    assert first["train/tokens"] == 6 * 8192 and first["train/tokens_per_sec"] == 4096
    assert first["train/tokens_per_sec_per_device"] == 2048
    assert first["train/mfu"] == pytest.approx(4096 * metrics.flops_per_token(model, 1024) / (2 * 989e12))
    assert first["device/mem_peak_gb"] == 2
    with meter.saving():
        spend(9)  # its own time, not the next step's
    spend(1)
    second = meter.record(7, values)
    assert second["train/step_time_s"] == 1.0 and "goodput/compile_s" not in second
    assert second["goodput/checkpoint_s"] == 9


def test_numbers_for_people():
    assert [metrics.human(n) for n in (12, 3_279, 1_024_000, 2.097e12)] == ["12", "3.28k", "1.02M", "2.1T"]
    assert [metrics.clock(s) for s in (7, 65, 3 * 3600 + 61)] == ["00:07", "01:05", "3:01:01"]
