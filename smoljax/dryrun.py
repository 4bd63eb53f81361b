"""`smoljax pretrain --dry-run`: whether a run fits and computes, before its data are there."""

import dataclasses
import time

import jax
import numpy as np

from smoljax import attention, budget, measure, metrics, processes, runs, sharding
from smoljax.config import Train
from smoljax.step import abstract_state, compiled_step


def run(config: Train, mesh) -> int:
    """Compile every stage and run one step of it on random tokens; nothing is read or written."""
    config = dataclasses.replace(config, init_from=None)
    memory = processes.on_first(lambda: budget.device_memory(jax.local_devices()[0]))
    config = budget.fitting(config, dict(mesh.shape), memory)
    attending = runs.attending(config)
    if processes.first():
        print(f"memory   {budget.remat_words(config, dict(mesh.shape), memory)}")
    with jax.set_mesh(mesh), runs.memory(config, mesh):
        for start in config.starts:
            at = config.at(start)
            B, T = at.data.batch_size, at.data.seq_len
            batch = measure.random_batch(at, 0)
            where = sharding.batch_sharding(mesh)
            batch = {k: jax.make_array_from_callback(v.shape, where, v.__getitem__) for k, v in batch.items()}
            places = sharding.shardings(abstract_state(at), mesh)
            state = runs.initial_state(at, None, places)
            begun = time.perf_counter()
            step = compiled_step(at, places).lower(state, batch).compile()
            attention.check_compiled(step, at.compute, at.data)
            compiled = time.perf_counter()
            state, values = step(state, batch)
            loss, norm = (float(values[k]) for k in ("loss", "grad_norm"))
            ran = time.perf_counter()
            peak = metrics.device_peak_gb(mesh.devices.flat[0]).get("device/mem_peak_gb")
            del state
            if processes.first():
                peaked = f", {peak:.2f} GB at the most on a device" if peak else ""
                print(
                    f"stage at {start}: {B} x {T} random tokens, loss {loss:.4f} (guessing is "
                    f"{np.log(at.model.vocab_size):.4f}), gradient norm {norm:.3f}; compiled in "
                    f"{compiled - begun:.1f} s, ran in {ran - compiled:.2f} s{peaked}; attention {attending[start]}"
                )
    return 0
