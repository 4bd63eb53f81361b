"""JSON as all readers agree on it: no key twice in an object, no NaN or infinity, no half of a surrogate pair."""

import collections
import json

from smoljax.errors import DataError


def loads(content: bytes):
    """What it holds; a byte order mark before it is nothing. ValueError, whose text says what is wrong."""

    def unique(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        if twice := [key for key, n in counts.items() if n > 1]:
            raise ValueError(f"it holds {twice[0]!r} twice; remove one of the two")
        return dict(pairs)

    def constant(name):
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()  # 1e999 and "\ud800" are found here
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return found


def row(line: bytes) -> dict:
    """The object of a line of JSON lines; a DataError where there is none."""
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
