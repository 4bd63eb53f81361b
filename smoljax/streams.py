"""stdin, stdout and stderr of a process whose terminal, reader or parent may be gone, or was never there.

What is said on stderr never ends a program: it is dropped where nobody can read it. What is written on stdout is a
program's result, so a stdout that takes nothing is an OSError that names it; but a training's result is its folder,
and its stdout is as stderr is (`forgive`).
"""

import errno
import io
import os
import select
import sys

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # a reader that left, a terminal that closed: for ever


class Stream(io.FileIO):
    """The descriptor below sys.stdout or sys.stderr."""

    def __init__(self, fd: int, said: str, forgiving: bool):
        super().__init__(fd, "w", closefd=False)
        self.said, self.forgiving = said, forgiving

    def write(self, data) -> int:
        """Bytes written; a forgiving stream drops what it cannot write, and then says that it wrote it."""
        try:
            written = super().write(data)
            while written is None:  # another program made the terminal non-blocking, and it is full
                if not select.select([], [self], [], 1.0)[1] and self.forgiving:
                    return len(data)
                written = super().write(data)
            return written
        except OSError as e:
            if not self.forgiving:
                e.filename = self.said
                raise
            if e.errno in GONE:
                drain(self.fileno())
            return len(data)


def secure():
    """Make the three streams safe to use, whatever the process was started with; called again it changes nothing.

    A closed descriptor is taken by the next file that is opened: warnings would go into a checkpoint. So /dev/null
    takes it; as stdout for reading alone, so that results are not lost without a word.
    """
    for fd, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest one free: this, for those below are open
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)
    if is_own(sys.stdout, sys.__stdout__):
        sys.stdout = sys.__stdout__ = text(1, "stdout", sys.stdout, forgiving=False)
    elif isinstance(sys.stdout, io.TextIOWrapper):  # whoever calls us has put it there
        sys.stdout.reconfigure(errors="backslashreplace")
    if is_own(sys.stderr, sys.__stderr__):
        sys.stderr = sys.__stderr__ = text(2, "stderr", sys.stderr, forgiving=True)


def is_own(stream, first) -> bool:
    """Whether this is what the process began with, and neither ours yet nor a stand-in, as a test's."""
    return stream is first and not isinstance(getattr(getattr(stream, "buffer", None), "raw", None), Stream)


def text(fd: int, said: str, before: io.TextIOWrapper | None, forgiving: bool) -> io.TextIOWrapper:
    """A text to write as `before` was; a character that the terminal has not must not end a run."""
    if before is not None:
        before.flush()
    raw = Stream(fd, said, forgiving)
    lines = forgiving or (before is not None and before.line_buffering)  # what stderr says is said at once
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def forgive():
    """stdout drops from now on what it cannot write, as stderr does."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Stream):
        raw.forgiving = True


def settle():
    """Before a process ends: what stdout still holds and does not take would be told, and 120 be the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        drain(1)


def drain(fd: int):
    """What goes to a descriptor from now on vanishes: here, in native code, and in processes started later."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, fd)
    os.close(nothing)
