"""Which rows of which released tensors a box of a stored tensor covers.  Pure; knows no files and no torch.

Experts of a layer may stand in one tensor [E, M, C], in which expert e takes the rows from e * M on once the leading
dimensions are flattened, one matrix below the other.  A matrix [R, C] is the same with one expert.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .inventory import Part


class Run(NamedTuple):
    """Rows [first, first + rows) of a part; in the box they begin at `at` of its expert number `expert`."""

    part: Part
    first: int
    rows: int
    expert: int
    at: int


def runs(parts: Sequence[Part], height: int, experts: range, rows: range) -> Iterator[Run]:
    """What a box takes of each part that it touches, in the order of the parts.

    parts    in the order of their rows, without gaps
    height   rows of one expert: M; of a matrix any number
    experts  those of the box; range(1) for a matrix
    rows     those of the box, within each expert
    """
    begins = [part.begin for part in parts]
    for number, expert in enumerate(experts):
        begin = expert * height + rows.start
        end = begin + len(rows)
        row = begin
        while row < end:
            part = parts[bisect.bisect_right(begins, row) - 1]
            count = min(end, part.begin + part.rows) - row
            yield Run(part, row - part.begin, count, number, row - begin)
            row += count
