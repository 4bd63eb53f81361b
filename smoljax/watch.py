"""What looks at a run from outside its loop: signals that ask it to stop, and a watchdog that sees it stand still."""

import contextlib
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from smoljax.errors import INTERRUPTED, RESUMABLE, Error
from smoljax.processes import leave

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FULL = 1  # why to stop, beside the signals' numbers: host memory is beyond guard.max_rss_gb


def stopped(n: int, why: int) -> Error:
    """The run has saved and ends, for the same command to go on."""
    reason = "host memory is beyond guard.max_rss_gb" if why == FULL else f"{signal.Signals(why).name} came"
    e = Error(f"{reason}; step {n} is saved, the same command goes on from there")
    e.code = INTERRUPTED if why == signal.SIGINT else RESUMABLE
    return e


class Stop:
    """SIGTERM (a scheduler), SIGINT (Ctrl-C) and SIGHUP (a terminal that closes) ask the loop to save and end.

    A second one, unless it is a SIGHUP, ends it at once. A SIGHUP that is ignored, as nohup has it, stays so.

    `asked` is 0 or the signal's number. The run has `grace_s` seconds from the first signal, saved or not: schedulers
    kill without warning after theirs (SLURM 30 s, Kubernetes 30 s, spot machines 30 to 120 s, unless told otherwise).

    A thread hears them, through a pipe that the interpreter's C handler writes to: a Python handler would wait until
    the main thread comes back from compiling, or from a collective that never ends.
    """

    def __init__(self, grace_s: float):
        self.grace_s, self.asked, self.timer, self.before = grace_s, 0, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.wakeup = signal.set_wakeup_fd(self.pipe[1])
            self.heard = [s for s in ASKING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
            self.thread = threading.Thread(target=self.listen, name="signals", daemon=True)
            self.thread.start()
            self.before = {s: signal.signal(s, lambda *_: None) for s in self.heard}
        return self

    def __exit__(self, *_):
        if self.timer:
            self.timer.cancel()
        if self.before:
            for number, handler in self.before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: set by another language than Python
            signal.set_wakeup_fd(self.wakeup)
            os.write(self.pipe[1], b"\0")
            self.thread.join()
            for end in self.pipe:
                os.close(end)

    def listen(self):
        while number := os.read(self.pipe[0], 1)[0]:
            if number in self.heard:
                self.hear(number)

    def hear(self, number: int):
        code = INTERRUPTED if number == signal.SIGINT else RESUMABLE
        if self.asked and number == signal.SIGHUP:
            return  # a shell that ends and the kernel send one each
        if self.asked:
            os._exit(code)
        self.asked = number
        with contextlib.suppress(OSError):  # whoever closes the terminal sends a signal too
            os.write(2, b"\nsmoljax: saving, then stopping; a second signal stops at once\n")
        late = f"no checkpoint within guard.grace_s = {self.grace_s:g} s of the signal; the last one stands"
        self.timer = threading.Timer(self.grace_s, leave, (late, code))
        self.timer.daemon = True
        self.timer.start()


class Watchdog:
    """Ends the process, with the stacks of all its threads in `file`, when no step has come for too long.

    Too long is `factor` times the median of the last 100 steps and at least `least` seconds; compiling is not watched,
    and its end starts the clock.
    """

    def __init__(self, factor: float, least: float, file: Path):
        self.factor, self.least, self.file = factor, least, file
        self.times, self.last, self.paused, self.patience = deque(maxlen=100), None, 0, 1
        self.closed = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed.set()

    def beat(self):
        """A step is done."""
        now = time.monotonic()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now

    def alive(self, *_):
        """No step, but not standing still: after each batch of a held-out set."""
        self.last = time.monotonic()

    @contextlib.contextmanager
    def patient(self):
        """Around a save, which may have to wait for the last one: ten times the limit (20 GB at 60 MB/s are 340 s)."""
        self.patience, self.last = 10, time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic()  # first, as in pause
            self.patience = 1

    @contextlib.contextmanager
    def pause(self):
        self.paused += 1
        try:
            yield
        finally:
            self.last = time.monotonic()  # first: the pause may have been longer than the limit
            self.paused -= 1

    def limit(self) -> float:
        return self.patience * max(self.least, self.factor * statistics.median(self.times or [0]))

    def watch(self):
        while not self.closed.wait(min(1.0, self.least / 10)):
            paused, limit, last = self.paused, self.limit(), self.last  # `last` last, for a pause's end sets it first
            if last is not None and not paused and time.monotonic() - last > limit:
                self.bite(time.monotonic() - last)

    def bite(self, seconds: float):
        with contextlib.suppress(OSError), open(self.file, "w") as f:
            faulthandler.dump_traceback(f)
        with contextlib.suppress(Exception):  # where stderr is no file
            faulthandler.dump_traceback(sys.__stderr__)
        leave(
            f"no step for {seconds:.0f} s (limit {self.limit():.0f} s); stacks of all threads are in {self.file}",
            RESUMABLE,
        )
