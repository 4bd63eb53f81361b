"""JSON as all readers agree on it: no key twice in an object, no NaN or infinity, no half of a surrogate pair."""

import codecs
import json
import math

from smoljax.errors import DataError

DEPTH = 500  # of objects and lists; Python's own limit depends on its version and on who calls


def loads(content: bytes):
    """What it holds; a byte order mark before it is nothing. ValueError, whose text says what is wrong."""
    text = content.removeprefix(codecs.BOM_UTF8).decode()
    try:
        found = DECODER.decode(text)
        if "\\u" in text and ("\\ud" in text or "\\uD" in text):
            json.dumps(found, ensure_ascii=False).encode()  # half a pair is found here
        if len(text) > DEPTH and text.count("[") + text.count("{") > DEPTH and depth(found) > DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as e:
        if "integer string conversion" in str(e):  # Python's own sentence tells how to set Python
            raise ValueError("it holds a whole number of more than 4,300 digits") from None
        raise
    return found


def unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in found if names.count(key) > 1)
        raise ValueError(f"it holds {twice!r:.100} twice; remove one of the two")
    return found


def constant(name: str):
    raise ValueError(f"{name} is no JSON")


def finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits:.60} is beyond what a number can be")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=constant, parse_float=finite)


def depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def row(line: bytes) -> dict:
    """The object of a line of JSON lines; a DataError where there is none."""
    if len(line) < 9 and line.strip() in (b"{", b"["):
        raise DataError("not JSON (it goes on over several lines; write an object a line, as jq -c does)")
    try:
        found = loads(line)
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 text (byte {e.start})") from None
    except UnicodeEncodeError as e:
        raise DataError(f"not Unicode text ({e.reason}); mend it at its source") from None
    except ValueError as e:
        raise DataError(f"not JSON ({e})") from None
    if not isinstance(found, dict):
        raise DataError(f"a JSON {type(found).__name__}, expected an object")
    return found
