"""A chat template, rendered safely: it comes with a model's files, so it may be hostile.

jinja2's sandbox keeps a template from running code, but not from taking memory and time, within a single call of C too
(`'a' * 10**9`). So a child process renders, under limits that the system enforces; it lives as long as its Template.
"""

import contextlib
import functools
import importlib.util
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from smoljax.errors import DataError
from smoljax.messages import normalized

TEMPLATE_LIMIT, TEXT_LIMIT = 1 << 20, 16 << 20  # bytes; published templates have less than 20 kB
CPU, WALL = 1.0, 30.0  # seconds for a conversation; 0.1 ms is usual, so that the wall's are for a machine that stalls
MEMORY = 128 << 20  # bytes, beyond the 25 MB of the process with jinja2
NEEDLE = "A text that no template has."
HEAD = struct.Struct("<?I")  # before what the two processes send: whether all is well, its length in bytes
BOOT = "import sys; root, *packages = sys.argv[1:]; sys.path[:0] = [root] * (root not in sys.path); "
BOOT += "sys.path += packages; from smoljax import template; template.serve()"


class Template:
    """A chat template, compiled: `render` as often as you like, from any thread, then `close`.

    Its `name` is for people; `tokens` are the special tokens that it sees: {"bos_token": text, ...}. `now` is what
    strftime_now says, one time for all conversations: seconds since 1970. A template at fault is a DataError.
    """

    def __init__(self, text: str, name: str, tokens: dict[str, str] | None = None):
        self.text, self.name = text.encode(errors="surrogatepass"), name
        if (size := len(self.text)) > TEMPLATE_LIMIT:
            raise DataError(f"{name} has {size:,} bytes, expected a chat template of at most {TEMPLATE_LIMIT:,}")
        self.tokens, self.lock = tokens or {}, threading.Lock()
        self.now = time.time()
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def render(self, messages, add_generation_prompt: bool = True, tools=None, documents=None, **variables) -> str:
        """The text of a conversation; `variables` are the template's own, such as enable_thinking.

        As in transformers they stand before the special tokens, and tools and documents are None where there are none.
        """
        plain = normalized(messages)
        if any(isinstance(message.get("content"), list) for message in messages) and self.wants_parts:
            plain = normalized(messages, parts=True)
        given = dict(tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)
        return self.write(plain, self.tokens | variables | given)

    @functools.cached_property
    def wants_parts(self) -> bool:
        """Whether the template writes a content that is a list of parts, and none that is text.

        llama.cpp finds it out likewise, as "requires typed content" (common/jinja/caps.cpp).
        """

        def writes(content) -> bool:
            with contextlib.suppress(DataError):
                messages = [{"role": "user", "content": content}]
                return NEEDLE in self.write(messages, self.tokens | dict(tools=None, documents=None))
            return False

        return not writes(NEEDLE) and writes([{"type": "text", "text": NEEDLE}])

    def write(self, messages: list[dict], variables: dict) -> str:
        try:
            request = json.dumps([self.now, variables | {"messages": messages}], ensure_ascii=False)
            request = request.encode(errors="surrogatepass")
        except (TypeError, ValueError, RecursionError) as e:
            raise DataError(f"messages, tools and variables must be what JSON can say ({e})") from None
        if len(request) > TEXT_LIMIT:
            raise DataError(f"a conversation has {len(request):,} bytes, expected at most {TEXT_LIMIT:,}")
        with self.lock:
            if self.child is None or self.owner != os.getpid():  # it died, or is another's: this process was forked
                self.start()
            return self.ask(request)

    def start(self):
        packages = [importlib.util.find_spec(name).origin for name in ("jinja2", "markupsafe")]  # not imported here
        paths = [str(Path(file).resolve().parents[1]) for file in (__file__, *packages)]
        keep = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "TZ") if key in os.environ}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.child = subprocess.Popen([sys.executable, "-I", "-c", BOOT, *paths], cwd="/", env=keep, **pipes)
        self.owner = os.getpid()
        try:
            self.ask(self.text)
        except DataError:
            self.close()
            raise

    def ask(self, request: bytes) -> str:
        try:
            with contextlib.suppress(BrokenPipeError):  # it died; reading tells how
                self.child.stdin.write(HEAD.pack(True, len(request)) + request)
                self.child.stdin.flush()
            good, size = HEAD.unpack(self.read(HEAD.size))
            answer = self.read(size).decode()
        except BaseException:  # Ctrl-C too: the next request would get this one's answer
            self.close()
            raise
        if not good:
            raise DataError(f"{self.name} {answer}")
        return answer

    def read(self, size: int) -> bytes:
        if len(found := self.child.stdout.read(size)) == size:
            return found
        took = {-signal.SIGPROF: f"more than {CPU:g} s of CPU", -signal.SIGALRM: f"more than {WALL:g} s"}
        took = took.get(code := self.child.wait(), f"its process down (exit code {code})")
        raise DataError(f"{self.name} takes {took} for a conversation; use a simpler template")

    def close(self):
        """End the child; a later `render` starts another."""
        child, self.child = self.child, None
        if child is not None and self.owner == os.getpid():
            child.kill()
            with contextlib.suppress(BrokenPipeError), child:
                pass  # its pipes are closed, its end is awaited


def serve():
    """The child: make a template of the first text on stdin, then render what follows, until stdin ends."""
    (make, clock), template = compiler(), None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process
    with contextlib.suppress(OSError, ValueError):  # macOS has neither
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(limit, (0, 0))  # who escapes from the sandbox can open no file and no socket
    while len(head := sys.stdin.buffer.read(HEAD.size)) == HEAD.size:
        request = sys.stdin.buffer.read(HEAD.unpack(head)[1]).decode(errors="surrogatepass")
        good, out = True, bytearray()
        signal.setitimer(signal.ITIMER_REAL, WALL)
        signal.setitimer(signal.ITIMER_PROF, CPU)  # then a signal ends this process, whatever call it is in
        try:
            if template:
                clock[0], given = json.loads(request)
                for part in template.generate(given):
                    out += part.encode()
                    if len(out) > TEXT_LIMIT:
                        raise OverflowError(f"a text of more than {TEXT_LIMIT:,} bytes")
            template = template or make(request)
        except BaseException as e:
            good, out = False, describe(e.with_traceback(None)).encode(errors="replace")  # without the frames' memory
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        sys.stdout.buffer.write(HEAD.pack(good, len(out)))
        sys.stdout.buffer.write(out)
        sys.stdout.buffer.flush()


def compiler():
    """text -> jinja2's template, in transformers' environment; and a list of the time that it is there."""
    import datetime

    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} marks what is trained on, for whoever asks; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("same"), [], [], body).set_lineno(line)

        def same(self, caller):
            return caller()

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):  # jinja2 would print nothing for the first such attribute
            raise sandbox.SecurityError(f"{attribute} of a {type(obj).__name__}")

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.filters["tojson"] = tojson
    clock = [time.time()]
    now = lambda format: datetime.datetime.fromtimestamp(clock[0]).strftime(format)  # noqa: E731
    made.globals |= dict(raise_exception=raise_exception, strftime_now=now)
    for text in ("{{ 'a b' | wordwrap(1) | pprint | striptags }}{{ lipsum(1) }}{{ [1] | random }}", "{{ 1 / 0 }}"):
        with contextlib.suppress(ZeroDivisionError):  # these import modules late, when no file can be opened
            made.from_string(text).render()
    now("%c")
    return made.from_string, clock


def describe(e: BaseException) -> str:
    """The sentence, after the template's name; short and printable, as the words may be the template's own."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    kinds = {
        MemoryError: f"takes more than {MEMORY >> 20} MB for a conversation; use a simpler template",
        TemplateSyntaxError: f"is not a chat template that jinja2 can read (line {getattr(e, 'lineno', 0)}: {{}})",
        SecurityError: "reaches for what a chat template may not have ({})",
        TemplateError: "refuses the conversation ({})",
    }
    kind = TemplateSyntaxError if isinstance(e, TemplateSyntaxError) else type(e)
    words = str(e.message) if kind is TemplateSyntaxError else str(e)
    words = "".join(c if c.isprintable() else " " for c in words[:300])
    return kinds.get(kind, f"fails ({kind.__name__}: {{}})").replace("{}", words)
