"""A user's mistake is one sentence and an exit code, never a traceback.

    1  the run itself failed      2  usage or config      3  bad data or weights      4  checkpoint trouble
    75  stopped, saved: the same command goes on (EX_TEMPFAIL)      130  Ctrl-C      141  nobody reads the results

A sentence names the thing, what was found, what was expected and what to do. Whatever is not an `Error`
is our bug and keeps its traceback.
"""

import errno
import operator
import os
import sys

from smoljax import streams

RESUMABLE = 75
INTERRUPTED = 130  # as a shell says it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # why a file that is open takes no more


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


class NotWritten(OSError):
    """A file that its disk does not take: unlike what `write` raises, it has the file's name."""


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
    streams.secure()
    try:
        check_words(map(str, sys.argv[1:] if argv is None else argv))
        return finished(main, argv)
    except Error as e:
        print(f"smoljax: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("smoljax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone: quietly, but the work is not done
        return 141  # as a shell reports SIGPIPE
    except Exception as e:
        sentence, code = mended(e)
        if sentence is None:
            raise
        print(f"smoljax: {sentence}", file=sys.stderr)
        return code
    finally:
        streams.settle()


def finished(main, argv) -> int:
    """main's exit code, once its results are out: what Python writes as it ends, nobody hears of when it fails."""
    try:
        code = main(argv) or 0
    except SystemExit:  # argparse, after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def mended(e: Exception) -> tuple[str | None, int]:
    """The sentence and the exit code of what others raise and a user can mend; None for a bug of ours."""
    if isinstance(e, OSError) and (e.errno in FULL or isinstance(e, NotWritten) or e.filename == "stdout"):
        return f"{e.filename or 'the output'} cannot be written: {e.strerror}", 1
    if isinstance(e, UnicodeEncodeError) and (e.encoding == file_names() != "utf-8" or undecoded(e.object)):
        return unencodable(e.object[max(e.start - 40, 0) : e.end + 40]), UsageError.code
    if "RESOURCE_EXHAUSTED" in str(e):
        return (
            "the device has not enough memory; take shorter or fewer rows (data.seq_len and accumulate, "
            "or --seq-len and --batch-size), set compute.remat=full to train, or use more devices "
            f"({str(e).splitlines()[0][:200]})",
            1,
        )
    return None, 1


# ---- words and names that the system's encoding has not


def file_names() -> str:
    return sys.getfilesystemencoding()


def undecoded(word) -> bool:
    """Whether Python could not read a byte of it, and holds it as half of a character: of arguments and file names."""
    return isinstance(word, str) and any("\udc80" <= c <= "\udcff" for c in word)


def unencodable(word: str) -> str:
    return (
        f"{word!a} has characters that are not {file_names()}, as this process reads file names and arguments; "
        "set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or rename it"
    )


def check_words(words):
    """Before anything is done: a prompt would be other text than its user typed, a file that is there not be found."""
    for word in words:
        try:
            os.fsencode(word)
        except UnicodeEncodeError:
            raise UsageError(unencodable(word)) from None
        if undecoded(word):
            raise UsageError(unencodable(word))
