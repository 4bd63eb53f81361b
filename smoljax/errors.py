"""A user's mistake is one sentence and an exit code, never a traceback.

    1  the run itself failed      2  usage or config      3  bad data or weights      4  checkpoint trouble
    75  stopped, saved: the same command goes on (EX_TEMPFAIL)      130  Ctrl-C      141  nobody reads the output

A sentence names the thing, what was found, what was expected and what to do. Whatever is not an `Error`
is our bug and keeps its traceback.
"""

import errno
import io
import operator
import os
import sys

RESUMABLE = 75
INTERRUPTED = 130  # as a shell says it


class Error(Exception):
    """What the user can mend; `code` is the process's exit code."""

    code = 1


class UsageError(Error):
    """A flag, a config key or a setting that cannot be."""

    code = 2


class DataError(Error):
    """Text, shards, tokenizers or weights that are not what they should be."""

    code = 3


class CheckpointError(Error):
    """A checkpoint that cannot be read or written."""

    code = 4


def require(ok: bool, sentence: str):
    """A setting that cannot be is a UsageError with this sentence."""
    if not ok:
        raise UsageError(sentence)


def whole(value, name: str) -> int:
    """A setting that is a whole number of any library's, as Python's own."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UsageError(f"{name} is {value!r:.60}, expected a whole number")


def number(value, name: str) -> float:
    """A setting that is a number of any library's, as Python's own."""
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except TypeError:
        pass
    raise UsageError(f"{name} is {value!r:.60}, expected a number")


def run(main, argv=None) -> int:
    """Call a program's main(argv) as a process would: its exit code, its mistakes as one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal has not must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except Error as e:
        print(f"smoljax: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("smoljax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone: quietly, but the work is not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports SIGPIPE
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            print(f"smoljax: {e.filename or 'the output'} cannot be written: {e.strerror}", file=sys.stderr)
            return 1
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(
            "smoljax: the device has not enough memory; take shorter or fewer rows (data.seq_len and accumulate, "
            "or --seq-len and --batch-size), set compute.remat=full to train, or use more devices "
            f"({str(e).splitlines()[0][:200]})",
            file=sys.stderr,
        )
        return 1
