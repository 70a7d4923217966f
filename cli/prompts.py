"""What goes through a model, from files that the user names: token ids and text.  Knows no verb and no model."""

from __future__ import annotations

import os
from collections.abc import Callable

from dsv4ckpt import strictjson
from dsv4ckpt.contained import opened
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import MAX_SMALL_FILE_BYTES
from dsv4ckpt.shard import read_exactly

_IDS_LIMITS = strictjson.Limits(objects=0, lists=1_000_000, commas=10_000_000)
_IDS = "a JSON list of token ids, a list of equally long lists, or ids with blanks between them"

Ids = list[list[int]]


def _contents(path: str, too_large: Callable[[int], Usage]) -> bytes:
    """The whole of a file, wherever it is."""
    directory, name = os.path.split(os.path.abspath(path))
    with opened(directory, name, True) as fd:
        size = os.fstat(fd).st_size
        if size > MAX_SMALL_FILE_BYTES:
            raise too_large(size)
        return read_exactly(fd, size, 0, name)


def read_ids(path: str) -> Ids:
    """One row for each sequence, all of one length. raises Usage, Environment"""
    data = _contents(path, lambda size: _bad_ids(path, f"{size:,} bytes"))
    try:
        stripped = strictjson.decoded(data).strip()
        if not stripped.startswith("["):
            return [[_id(path, word) for word in stripped.split()]]
        strictjson.require_modest(data, _IDS_LIMITS)
        value = strictjson.loads(stripped, floats=False)
    except strictjson.Malformed as error:
        raise _bad_ids(path, str(error)) from None
    rows = value if value and isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or any(type(number) is not int for number in row):
            raise _bad_ids(path, repr(row)[:80])
        if len(row) != len(rows[0]):
            raise _bad_ids(path, f"lists of {len(rows[0])} and {len(row)} ids")
    return rows


def _id(path: str, word: str) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) < 20):
        raise _bad_ids(path, repr(word)[:80])
    return int(word)


def _bad_ids(path: str, found: str) -> Usage:
    return Usage(
        "--ids is no list of token ids",
        file=os.path.basename(path),
        expected=_IDS,
        found=found,
        do="write the ids like [0, 17, 256]; for a text, use --text",
    )


def read_text(path: str) -> str:
    """raises Usage, Environment, UnsafePath"""
    name = os.path.basename(path)

    def too_large(size: int) -> Usage:
        return Usage(
            "--file is too large for a prompt",
            file=name,
            expected=f"at most {MAX_SMALL_FILE_BYTES:,} bytes",
            found=f"{size:,} bytes",
            do="cut it",
        )

    data = _contents(path, too_large)
    try:
        return strictjson.decoded(data)
    except strictjson.Malformed as error:
        raise Usage(
            "--file is no text", file=name, expected="UTF-8", found=str(error), do="convert it"
        ) from None
