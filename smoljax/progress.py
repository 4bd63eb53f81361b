"""How far a batch job is, on stderr: a bar on a terminal, a line a minute in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """rows: of the job; done: before this process began. `with` shows it."""

    def __init__(self, rows: int, done: int):
        self.rows, self.done, self.begun, self.tokens, self.told = rows, done, time.monotonic(), 0, 0.0
        self.before = done
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("rows, {task.fields[speed]} tokens/s,"))
        self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("", total=rows, completed=done, speed="-")

    def __enter__(self):
        self.bar.__enter__()
        return self

    def add(self, tokens: int):
        """One more row, with as many new tokens."""
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        self.bar.update(self.task, completed=self.done, speed=f"{self.speed:,.0f}")
        if self.bar.disable and time.monotonic() - self.begun - self.told > 60:
            self.told = time.monotonic() - self.begun
            self.tell()

    @property
    def speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.begun, 1e-9)

    def tell(self):
        spent, new = time.monotonic() - self.begun, max(self.done - self.before, 1)
        left = spent / new * (self.rows - self.done)
        print(
            f"smoljax: {self.done} of {self.rows} rows, {self.speed:,.0f} tokens/s, {left:,.0f} s left",
            file=sys.stderr,
        )

    def __exit__(self, *failed):
        self.bar.__exit__(*failed)
        if self.bar.disable:
            self.tell()
