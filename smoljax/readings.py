"""What is known of a step once it is done, which is while the next one runs: nothing here waits for the newest step."""

import contextlib
import dataclasses
import sys
from pathlib import Path

from smoljax import dumps, metrics, processes, sinks, watch
from smoljax.config import Train
from smoljax.errors import Error


class Readings:
    """What is known of a step when it is done, while the next one runs: logged, dumped where its update was skipped."""

    def __init__(self, config: Train, rows, mesh, start: int, checkpoints, meter):
        self.config, self.rows, self.mesh, self.checkpoints, self.meter = config, rows, mesh, checkpoints, meter
        folder, guard = Path(config.run), config.guard
        self.dog = watch.Watchdog(guard.watchdog, guard.watchdog_s, folder / f"stacks-{processes.index()}.txt")
        self.logs, self.records, self.usual_gb = [], 0, 0.0
        if processes.first():
            self.logs.append(metrics.Log(folder, start, config.steps))
            if config.sinks:
                self.logs.append(sinks.Sinks(config.sinks, folder, dataclasses.asdict(config), start))

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        for part in (*self.logs, self.dog):  # a sink may take its time to close, which is no stand-still
            self.stack.enter_context(part)
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def compiling(self):
        both = contextlib.ExitStack()
        both.enter_context(self.dog.pause())
        both.enter_context(self.meter.timing("compile"))
        return both

    def __call__(self, n: int, on_device: dict, batch: dict, asked, more: dict | None = None) -> int:
        """Waits for step n alone. Returns what Agreement was asked at step n: why to stop, or 0.

        With `more`, which goes into the record, it is recorded in any case; else at every log_every-th step.
        """
        values = self.last = {name: value.item() for name, value in processes.read(on_device).items()}
        self.dog.beat()
        self.checkpoints.check()
        if more is not None or n % self.config.log_every == 0:
            consumed = self.rows.consumed(n)
            record = self.meter.record(n, values, sum(consumed.values()))
            record |= {"data/epochs": self.rows.epochs(n), "data/tokens": consumed} | (more or {})
            for log in self.logs:
                log.write(record)
            self.notice(record["host/rss_gb"])
        if values["skipped"]:
            self.dump(n, batch, values)
        return int(processes.read(asked))

    def notice(self, rss_gb: float):
        """Say it when the process has grown by half and a gigabyte since the run was under way; and then again."""
        self.records += 1
        if self.records <= 20:  # until then buffers and caches fill
            self.usual_gb = rss_gb
        elif rss_gb > 1.5 * self.usual_gb + 1:
            print(f"smoljax: host memory grew from {self.usual_gb:.2f} to {rss_gb:.2f} GB", file=sys.stderr)
            self.usual_gb = rss_gb

    def dump(self, n: int, batch: dict, values: dict):
        """Keep what `smoljax replay` needs of a step whose update was skipped; too many in a row are an Error."""
        before = self.rows.consumed(n - 1)
        found = f"step {n}: loss {values['loss']:.6g}, gradient norm {values['grad_norm']:.6g}"
        try:
            where = dumps.write(Path(self.config.run), n, self.config, batch, values, before, self.mesh)
            again = f"`smoljax replay {where}` repeats it"
        except OSError as e:  # a full disk is no reason to stop
            again = f"it could not be dumped: {e}"
        if values["in_a_row"] >= self.config.guard.max_skips:
            e = Error(
                f"{found}; {values['in_a_row']} updates in a row could not be applied (guard.max_skips), the run "
                f"stops here. Its newest checkpoint is {self.checkpoints.latest or 'none'}; {again}; "
                "try a lower optim.lr"
            )
            e.agreed = True  # all processes read the same values: they end together, and a save in flight is waited for
            raise e
        if processes.first():
            print(f"smoljax: {found}: the update was not applied; {again}", file=sys.stderr)
