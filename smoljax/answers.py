"""Rows of text through engines: {"prompt": text} or {"messages": [...]} in, the same with the model's text out."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import jax

from smoljax import engine
from smoljax.engine import Engine
from smoljax.errors import DataError, Error, UsageError, require
from smoljax.renderer import Renderer
from smoljax.request import Completion, Request, checked
from smoljax.row_files import NoRow
from smoljax.streaming import HALF, Text
from smoljax.weights import Weights

OWN = ("text", "texts", "tokens", "finish_reason", "logprobs", "prompt_logprobs", "samples", "error")


@dataclass
class Row:
    """One on its way."""

    given: dict
    prompt: list[int]
    texts: list[Text]
    done: list[Completion | None] = field(default_factory=list)


class Answers:
    """What a model gives for rows of text.

    Args:
      loaded: the model with its tokenizer and the files beside it.
      engines: of that model, one a device.
      renderer: makes prompts of rows that are conversations; None where they are plain prompts.
      chat: prompts are made such conversations. `system`: a message before each of them.
      max_new_tokens, seed: for rows that have none of their own.
      n: samples of each row, by seeds seed ... seed + n - 1.
      stop: strings that end a row, and are not part of it.
      say: is called with each piece of text as it comes, of the only row.
    """

    def __init__(
        self,
        loaded: Weights,
        engines: list[Engine],
        *,
        renderer: Renderer | None = None,
        chat: bool = False,
        system: str | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        n: int = 1,
        stop: tuple[str, ...] = (),
        say: Callable[[str], None] | None = None,
    ):
        half = [text for text in stop if HALF in text]
        require(not half, f"the stop string {half and half[0]!r} has U+FFFD, half a character; leave that out")
        self.words, self.config, self.engines = loaded.tokenizer, loaded.config, engines
        self.renderer, self.chat, self.system = renderer, chat, system
        self.max_new_tokens, self.seed, self.n, self.stop, self.say = max_new_tokens, seed, n, stop, say

    def run(self, rows: Iterable[dict], strict: bool = False, before: int = 0) -> Iterator[dict]:
        """Each row with what was given for it, in order, as soon as those before it are done.

        A row that cannot be has an "error" in place of a text; where `strict`, that ends it all. `before`: so many rows
        went before, for messages; a row's own error does not say which row it is of.
        """
        at_work, ready, places, following = {}, {}, {}, 0
        numbers = itertools.count()

        def requests():
            for i, given in enumerate(rows):
                name = f"row {before + i + 1}"
                try:
                    row, wanted = self.request(given)
                except Error as e:
                    if strict:
                        raise type(e)(f"{name}: {e}") from None
                    ready[i], places[next(numbers)] = given | {"error": str(e)}, (i, 0)
                    yield None
                    continue
                at_work[i] = row
                for sample in range(self.n):
                    places[next(numbers)] = i, sample
                    yield replace(wanted, seed=wanted.seed + sample, watch=row.texts[sample], name=name)

        with contextlib.closing(across(self.engines, requests())) as found:
            for number, completion in found:
                i, sample = places.pop(number)
                if completion:
                    row = at_work[i]
                    row.done[sample] = completion
                    if all(row.done):
                        ready[i] = self.result(at_work.pop(i))
                while following in ready:
                    yield ready.pop(following)
                    following += 1

    def request(self, given: dict) -> tuple[Row, Request]:
        if isinstance(given, NoRow):
            raise DataError(given["error"])
        taken = [name for name in OWN if name in given]
        require(not taken, f"it has the keys {taken}, which are the answer's; rename them")
        if self.renderer:
            ids = self.renderer.ids(self.messages(given), given)
        else:
            for key in ("tools", "chat_template_kwargs"):
                require(given.get(key) is None, f"it has {key}, which a chat template alone can show; give --chat")
            if given.get("messages") is not None:
                raise UsageError("it has messages, among prompts; give --chat, or files of one kind")
            text = prompt(given)
            ids = self.words.encode(text).ids
            require(bool(ids), f"the prompt is {text!r}, which has no tokens; give some text")
        own = {name: given.get(name) for name in ("max_new_tokens", "seed")}
        own = {name: n for name, n in own.items() if n is not None and n == n}  # pandas has NaN for what is missing
        # Of whole numbers, some of them missing, pandas makes floats.
        own = {name: int(n) if isinstance(n, float) and n.is_integer() else n for name, n in own.items()}
        wanted = Request(ids, **{"max_new_tokens": self.max_new_tokens, "seed": self.seed} | own)
        seed, most = wanted.seed, 2**32 - self.n
        fine = type(seed) is int and 0 <= seed <= most
        require(fine, f"the seed is {seed!r:.60}, expected a whole number from 0 to {most}")
        wanted = checked(self.config, wanted, "the prompt")
        self.engines[0].check_memory(engine.bucket(len(ids) + wanted.max_new_tokens, 256))
        texts = [Text(self.words, self.stop, self.say) for _ in range(self.n)]
        return Row(given, ids, texts, [None] * self.n), wanted

    def messages(self, given: dict) -> list[dict]:
        found = given.get("messages")
        if found is None:
            text = prompt(given)
            require(self.chat, "it has a prompt, among messages; give --chat, or files of one kind")
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            found = [*system, {"role": "user", "content": text}]
        else:
            require(self.system is None, "it has messages of its own, and --system goes before prompts alone")
        return found

    def result(self, row: Row) -> dict:
        samples = [self.sample(text, done) for text, done in zip(row.texts, row.done, strict=True)]
        out = row.given | (samples[0] if self.n == 1 else {"samples": samples})
        found = row.done[0].prompt_logprobs
        return out if found is None else out | {"prompt_logprobs": [None, *map(written, found)]}

    def sample(self, text: Text, done: Completion) -> dict:
        out = {"text": text.whole(done.tokens), "tokens": done.tokens, "finish_reason": done.finish_reason}
        if done.logprobs is not None:
            out["logprobs"] = [written(found) for found in done.logprobs]
        return out


def prompt(given: dict) -> str:
    text = given.get("prompt")
    require(text is not None, f"expected a prompt or messages, found the keys {sorted(given)[:8]}")
    require(isinstance(text, str), f"the prompt is {text!r:.60}, expected a text")
    return text


def written(found: tuple) -> dict:
    """A token's log-probabilities, as a row of results has them."""
    own, ids, theirs = found
    return {"logprob": own, "top": [list(pair) for pair in zip(ids, theirs, strict=True)]}


def across(engines: list[Engine], requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion | None]]:
    """One stream of requests through several engines, each on its own device and thread; numbered as they come.

    However it ends, the threads end first: one that is within JAX as Python goes away would abort the process.
    """
    if len(engines) == 1:
        yield from engines[0].run(requests)
        return
    source, lock, results = enumerate(requests), threading.Lock(), queue.Queue()

    def work(engine: Engine):
        numbers = []

        def mine():
            while True:
                with lock:
                    number, request = next(source, (None, None))
                if number is None:
                    return
                numbers.append(number)
                yield request

        try:
            with jax.default_device(engine.device):
                for i, completion in engine.run(mine()):
                    results.put((numbers[i], completion))
            results.put(None)
        except BaseException as e:  # said by the caller's thread
            results.put(e)

    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in engines]
    for thread in threads:
        thread.start()
    at_work = len(engines)
    try:
        while at_work:
            match results.get():
                case None:
                    at_work -= 1
                case BaseException() as e:
                    raise e
                case found:
                    yield found
    finally:
        for one in engines:
            one.stopped = True
        for thread in threads:
            thread.join()
        for one in engines:
            one.stopped = False
