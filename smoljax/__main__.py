"""`smoljax VERB ...`: each verb is a program in train/ or infer/, imported only when it is asked for."""

import importlib
import logging
import signal
import sys

from smoljax.errors import UsageError, run
from smoljax.settings import meant

VERBS = {
    "prepare": ("train", "text -> token shards, with the model's tokenizer or a new one"),
    "pretrain": ("train", "train a model from a config; the same command resumes"),
    "plan": ("train", "what a run needs: memory, hours, disk, tokens; before it is paid for"),
    "evaluate": ("train", "loss, perplexity, bits per byte, loss by position"),
    "report": ("train", "runs against each other: one picture, one page, one table"),
    "bench-train": ("train", "how fast training is here; a duel with transformers"),
    "replay": ("train", "repeat a step whose update was skipped, to the same value"),
    "demo": ("train", "all of it in five minutes, on the text of Python's own library"),
    "generate": ("infer", "continue prompts, a few or a file of them; killed, the same command goes on"),
    "score": ("infer", "log-likelihood of continuations, as evaluation harnesses need it"),
    "bench-decode": ("infer", "how fast generation is here; a duel with transformers"),
    "fetch": ("infer", "real weights into the cache"),
    "convert": ("infer", "weights to and from Hugging Face, GGUF, nanotron, with a proof"),
}

HELP = f"""usage: smoljax VERB ...    (smoljax VERB --help says more)

{"".join(f"  {verb:12s} {what}" + chr(10) for verb, (_, what) in VERBS.items())}
exit codes: 0 fine, 1 the run failed, 2 usage or config, 3 bad data or weights, 4 checkpoint or disk trouble in a run,
            75 stopped and resumable: the same command goes on, 130 interrupted, 141 nobody reads the results (a
            training goes on without), 134 JAX lost another process, 129, 137, 143 ended by SIGHUP, SIGKILL, SIGTERM"""


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"smoljax {version('smoljax')}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UsageError(f"no verb {verb!r}{meant(verb, VERBS)}; `smoljax --help` lists them")
    program = importlib.import_module(f"smoljax.{VERBS[verb][0]}.{verb.partition('-')[0]}")
    return program.main(rest)


def command(argv: list[str]) -> int:
    notes = logging.StreamHandler()  # sys.stderr as `run` has made it
    notes.setFormatter(logging.Formatter("smoljax: %(message)s"))
    logging.getLogger("smoljax").addHandler(notes)
    logging.getLogger("smoljax").propagate = False
    return dispatch(argv)


def main() -> int:
    # An exception in the middle of an import is swallowed here and a crash there: until runtime.py hears interrupts,
    # Ctrl-C ends the process.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return run(command, sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
