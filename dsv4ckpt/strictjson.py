"""JSON from strangers: UTF-8, one value, no duplicate key, no NaN.  Owns the parsing rules; knows no files.

json.loads takes the last of two equal keys, other parsers the first: a file that means two things is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NamedTuple, NoReturn

_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 600  # no name is as long
_WINDOW = 1 << 20
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Malformed(ValueError):
    """Not strict JSON; the message says why. Callers turn it into an error of their own that names the file."""


class Limits(NamedTuple):
    """The most of each sign that a document of some kind holds: what parsing it costs grows with them."""

    objects: int
    lists: int
    commas: int


def require_modest(data: bytes | bytearray, most: Limits) -> None:
    """Refuse unparsed what would take seconds and gigabytes to parse. raises Malformed"""
    for sign, name, limit in zip((b"{", b"[", b","), Limits._fields, most, strict=True):
        if data.count(sign) > limit:
            raise Malformed(f"more than {limit:,} {name}")
    # turning digits into a number takes the square of their count; a run of 600 holds two of every 300th bytes
    if b"00" not in data[:: len(_LONG_NUMBER) // 2].translate(_ANY_DIGIT):
        return
    for begin in range(0, len(data), _WINDOW):
        if _LONG_NUMBER in data[begin : begin + _WINDOW + len(_LONG_NUMBER)].translate(_ANY_DIGIT):
            raise Malformed("a number of hundreds of digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Malformed(f"the key {twice[:200]!r} stands there twice")
    return result


def _constant(text: str) -> NoReturn:
    raise Malformed(f"{text} is not a JSON number")


def _no_float(text: str) -> NoReturn:
    raise Malformed(f"{text[:40]} where only whole numbers may stand")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Malformed(f"{text[:40]} is no finite number")
    return value


def _unsigned(text: str) -> int:
    if text.startswith("-"):
        raise Malformed(f"{text[:40]} where only counts may stand")
    return int(text)


def decoded(data: bytes | memoryview, encoding: str = "utf-8") -> str:
    """Bytes as text. raises Malformed"""
    try:
        return str(data, encoding)
    except UnicodeDecodeError as error:
        raise Malformed(f"not {encoding.upper()}: {error.reason} at byte {error.start}") from None


def loads(data: bytes | str, *, floats: bool) -> Any:
    """Parse one JSON value. floats=False: all numbers are counts, without sign or point. raises Malformed"""
    text = data if isinstance(data, str) else decoded(data)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            # a hook for every number costs a second for a large header: only where a sign may be
            parse_int=_unsigned if not floats and "-" in text else None,
            parse_float=_float if floats else _no_float,
        )
        if "\\" in text and _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise Malformed("an escape that stands for half a character") from None
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except MemoryError:
        raise Malformed("too large for this machine's memory") from None
    except ValueError as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed("a number of thousands of digits") from None  # Python refuses to convert it


def compact(value: object) -> bytes:
    """The one byte string that we write for a value whose order of keys means something: no blanks, ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def canonical(value: object) -> bytes:
    """The same with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def pretty(value: object) -> bytes:
    """For files that people read (config.json, index, manifest): two blanks of indent, real letters, a last newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
