"""nanotron's YAML as keys to be taken one by one, so that what nobody took is known; the only file that knows YAML.

A group is its keys, `optimizer.weight_decay`; an item of a list of groups is `data_stages[0]`. The file may come from
anyone: its size is bounded, no tag makes an object, and an alias, which could make much of little, is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from smoljax.errors import UsageError, require

MAX_BYTES = 1 << 18  # SmolLM's have 2,500; PyYAML reads 100 kB a second or less
WHOLE = "dataset_folder"  # its value may be a dict, of folders
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
KINDS[(str, list, dict)] = "a folder, a list of folders, or folders with their weights"
# YAML 1.1, which PyYAML reads, takes 1e-08 for text as it has no point: here it is the number that it looks like.
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
REQUIRED = object()


class Keys:
    """The keys of a file that are not used yet."""

    def __init__(self, file: Path, leaves: dict):
        self.file, self.left = file, leaves  # path -> (value, line)
        self.lines = {path: line for path, (_, line) in leaves.items()}
        self.known = set()  # paths that were asked for

    def require(self, path: str, ok: bool, what: str):
        if not ok:
            line = f":{self.lines[path]}" if path in self.lines else ""
            raise UsageError(f"{self.file}{line}: {path} {what}")

    def look(self, path: str, kind, default=REQUIRED):
        """A value, or the default where it is null or absent; the key stays unused."""
        value = self.left.get(path, (None,))[0]
        if value is None and default is not REQUIRED:
            return default
        self.require(path, path in self.left, f"is missing, expected {KINDS[kind]}")
        fine = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or type(value) is not bool)
        self.require(path, fine, f"is {shown(value)}, expected {KINDS[kind]}")
        return value

    def take(self, path: str, kind, default=REQUIRED):
        value = self.look(path, kind, default)
        self.known.add(path)
        self.left.pop(path, None)
        return value

    def positive(self, path: str) -> int:
        value = self.take(path, int)
        self.require(path, value > 0, f"is {value}, expected more than 0")
        return value

    def only(self, path: str, *values, instead: str = ""):
        """The value of a key that may have these alone; None among them is null, or no such key."""
        self.known.add(path)
        value, _ = self.left.pop(path, (None, 0))
        fine = any(type(value) is type(v) and value == v for v in values)
        found = "missing" if path not in self.lines else shown(value)
        instead = instead or "smoljax has nothing else"
        self.require(path, fine, f"is {found}, expected {' or '.join(map(shown, values))}; {instead}")
        return value

    def items(self, path: str) -> list[str]:
        """The items of a list of groups: data_stages[0], ..."""
        found = list(dict.fromkeys(m[0] for key in self.left if (m := re.match(rf"{path}\[\d+\]", key))))
        there = shown(self.left.get(path, (None,))[0])
        self.require(path, bool(found), f"is {there}, expected a list of groups, one or more")
        return found

    def rest(self, sections: set[str], unused: set[str]) -> list[str]:
        """The keys that nobody took, all of these sections or of `unused`; another is a UsageError."""
        known = {plain(path) for path in self.known} | unused
        for path, (value, _) in self.left.items():
            if plain(path) in unused or re.match(r"\w*", path)[0] in sections:
                continue
            group, there = plain(path), set()
            while not there:  # what could be said in its group, or around that
                group = group.rpartition(".")[0]
                begin = f"{group}." if group else ""
                there = {re.match(r"\w+", k[len(begin) :])[0] for k in known | sections if k.startswith(begin)}
            known_there = f"known in {group}" if group else "known"
            self.require(
                path,
                False,
                f"= {shown(value)} is a key that smoljax does not know, and might change the mathematics; "
                f"{known_there}: {', '.join(sorted(there))}",
            )
        return list(self.left)


def plain(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def shown(value) -> str:
    """As YAML has it, bounded."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read(file: Path) -> dict[str, tuple[object, int]]:
    """Path -> value and line, of every key that holds no further keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(problem="an alias; write it out", problem_mark=self.peek_event().start_mark)
            return super().compose_node(parent, index)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"(?:{NUMBER.pattern})$"), list("-+.0123456789")
    )
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as e:
        raise UsageError(f"{file} cannot be read: {e.strerror}") from None
    require(len(data) <= MAX_BYTES, f"{file} has more than {MAX_BYTES:,} bytes; a nanotron config has some thousand")
    try:
        loader = Loader(data)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{file} is no nanotron config: expected keys such as model, optimizer, tokens")
        found = {}
        for path, value, line in walk(loader, root, "", 1):
            found[path] = (value, line)
        return found
    except yaml.MarkedYAMLError as e:
        line = (e.problem_mark or e.context_mark).line + 1
        raise UsageError(f"{file}:{line}: {', '.join(filter(None, [e.context, e.problem]))}") from None
    except yaml.reader.ReaderError as e:
        raise UsageError(f"{file}: byte or character {e.position}: {e.reason}; expected UTF-8 text") from None
    except RecursionError:
        raise UsageError(f"{file} nests too deep to be a nanotron config") from None


def walk(loader, node, path: str, line: int) -> Iterator[tuple[str, object, int]]:
    """The leaves: scalars, lists of scalars, empty groups, and the whole of dataset_folder."""
    children = node.value if node.id != "scalar" else []
    if node.id == "mapping" and children and not path.endswith(f".{WHOLE}"):
        for key, child, at in pairs(loader, node):
            named = isinstance(key, str) and re.fullmatch(r"\w+", key)
            fail(not named, f"a key {shown(key)}, expected a name", at)
            yield from walk(loader, child, f"{path}.{key}".lstrip("."), at.line + 1)
    elif node.id == "sequence" and any(child.id == "mapping" for child in children):
        for i, child in enumerate(children):
            yield from walk(loader, child, f"{path}[{i}]", child.start_mark.line + 1)
    else:
        yield path, value(loader, node), line


def pairs(loader, node) -> Iterator[tuple[object, object, object]]:
    seen = set()
    for key_node, child in node.value:
        key = value(loader, key_node)
        fail(key_node.id != "scalar", "a key that is no scalar", key_node.start_mark)
        fail(key in seen, f"{shown(key)} a second time; say it once", key_node.start_mark)
        seen.add(key)
        yield key, child, key_node.start_mark


def value(loader, node):
    own = {"mapping": "tag:yaml.org,2002:map", "sequence": "tag:yaml.org,2002:seq"}.get(node.id, node.tag)
    fail(node.tag != own, f"a tag {node.tag!r:.80}, expected plain values", node.start_mark)
    if node.id == "mapping":
        return {key: value(loader, child) for key, child, _ in pairs(loader, node)}
    if node.id == "sequence":
        return [value(loader, child) for child in node.value]
    try:
        found = loader.construct_object(node)
    except (ValueError, LookupError, AttributeError):  # 2024-99-99, 5,000 digits, or a tag: !!bool maybe
        found = None
        fail(True, f"{node.value!r:.80} is no value", node.start_mark)
    fail(type(found) is int and abs(found) >= 2**63, f"{node.value!r:.80} is too large a number", node.start_mark)
    return found


def fail(wrong: bool, problem: str, mark):
    if wrong:
        import yaml

        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
