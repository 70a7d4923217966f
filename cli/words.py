"""How numbers, tables and errors read.  Owns the wording of the terminal; knows no checkpoints."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "KIB": 2**10, "M": 10**6, "MB": 10**6, "MIB": 2**20,
          "G": 10**9, "GB": 10**9, "GIB": 2**30, "T": 10**12, "TB": 10**12, "TIB": 2**40}  # fmt: skip


class Size(click.ParamType[int]):
    """A size in bytes: 5GB, 5GiB, 500000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        if not match or match[2].upper() not in _UNITS:
            self.fail(f"{value!r} is no size: write it like 5GB or 5GiB", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size < 1:
            self.fail(f"{value!r} is no size above zero", param, ctx)
        return size


class LayerList(click.ParamType[tuple[int, ...]]):
    """Layers: 0-3, or 0,2,40-42."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        chosen: set[int] = set()
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
            if not match or int(match[2] or match[1]) < int(match[1]):
                self.fail(f"{value!r} selects no layers: write it like 0-3 or 0,2,40-42", param, ctx)
            chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        return tuple(sorted(chosen))


class Subset(click.ParamType[tuple[int, int]]):
    """Part n of t: 1/10."""

    name = "n/t"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part: write 1/10 for the first of ten", param, ctx)
        return int(match[1]), int(match[2])


def human(num_bytes: float) -> str:
    """159609485896 -> '159.61 GB'."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes:.0f} B"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def spans(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows as aligned columns; the first `left` columns and the last one are words, the others numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column < left or column == last else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


class Console:
    """Words go to stderr with --json and to stdout without; the one JSON document goes to stdout."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose

    def say(self, text: str = "", *, bold: bool = False) -> None:
        if not self.quiet:
            stream = sys.stderr if self.as_json else sys.stdout
            click.echo(style(text, stream, bold=bold) if bold else text, file=stream)

    def document(self, value: dict[str, Any]) -> None:
        if self.as_json:
            click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def style(text: str, stream: Any, **how: Any) -> str:
    colored = stream.isatty() and "NO_COLOR" not in os.environ
    return click.style(text, **how) if colored else text
