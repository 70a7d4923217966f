"""Rows of the library `datasets` as lines of JSON, where it is installed.  Knows no tokens.

    datasets:DIRECTORY[@SPLIT]       what save_to_disk wrote
    datasets:NAME[:CONFIG][@SPLIT]   what load_dataset knows: on the Hub, or in the library's cache

SPLIT is train if nobody says.  Code that comes with data is never run.  Where the library looks and what it keeps are
its own settings.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4ckpt.errors import Environment, Usage, printable

from .optional import library

PREFIX = "datasets:"
_SPLIT = "train"


def rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number, from 1, and columns of every row of `datasets:...`. raises Usage, Environment"""
    name, at, split = source.removeprefix(PREFIX).rpartition("@")
    name, split = (name, split) if at else (split, _SPLIT)
    datasets = library("datasets", name="datasets", file=source)
    with _told(source):
        found = _on_disk(datasets, name, split) if os.path.isdir(name) else _named(datasets, name, split)
        yield from enumerate(found.with_format(None), 1)


def as_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a file. raises Usage for values that JSON does not have"""
    try:
        return json.dumps(_without_blanks(row), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise Usage(f"it holds what JSON does not: {printable(str(error))[:100]}") from None


def _on_disk(datasets: Any, directory: str, split: str) -> Any:
    found = datasets.load_from_disk(directory)
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise Usage(
            f"the data set has no split {split!r}",
            file=directory,
            expected=" or ".join(sorted(found)),
            do="name one of them: datasets:DIRECTORY@SPLIT",
        )
    return found[split]


def _named(datasets: Any, name: str, split: str) -> Any:
    path, _, config = name.partition(":")
    return datasets.load_dataset(path, config or None, split=split, trust_remote_code=False)


def _without_blanks(value: Any) -> Any:
    """Tables have every column in every row, and every field in every record: None where a line had none."""
    if isinstance(value, Mapping):
        return {name: _without_blanks(inner) for name, inner in value.items() if inner is not None}
    return [_without_blanks(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _told(source: str) -> Iterator[None]:
    try:
        yield
    except Usage:
        raise
    except Exception as error:  # noqa: BLE001 - the library has many of its own, and of others
        raise Environment(
            "the library datasets cannot read this",
            file=source,
            found=repr(str(error).strip().partition("\n")[0][:200]),
            do="check name, configuration and split: datasets:NAME:CONFIG@SPLIT",
        ) from None
