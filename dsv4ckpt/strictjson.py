"""JSON from strangers: UTF-8, one value, no duplicate key, no NaN.  Owns the parsing rules; knows no files.

json.loads takes the last of two equal keys, other parsers the first: a file that means two things is refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class Malformed(ValueError):
    """Not strict JSON; the message says why. Callers turn it into an error of their own that names the file."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Malformed(f"the key {twice[:200]!r} stands there twice")
    return result


def _constant(text: str) -> NoReturn:
    raise Malformed(f"{text} is not a JSON number")


def _no_float(text: str) -> NoReturn:
    raise Malformed(f"{text[:40]} where only whole numbers may stand")


def loads(data: bytes, *, floats: bool) -> Any:
    """Parse one JSON value. raises Malformed"""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=float if floats else _no_float,
        )
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise Malformed("nested too deeply") from None
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
