"""Which rows of which released tensors a box of a stored tensor covers, and back.  Pure; knows no files and no torch.

Experts of a layer may stand in one tensor [E, M, C], in which expert e takes the rows from e * M on once the leading
dimensions are flattened, one matrix below the other.  A matrix [R, C] is the same with one expert.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .formats import Shape
from .inventory import Part

Box = tuple[range, ...]  # along each dimension of a tensor


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


def of_rows(part: Part, shape: Shape, first: int, rows: int) -> Box:
    """The box of a stored tensor of this shape that rows [first, first + rows) of one of its parts are.

    A tensor of fewer than two dimensions is one row.
    """
    if len(shape) < 2:
        return tuple(map(range, shape))
    expert, begin = divmod(part.begin, shape[1]) if len(shape) == 3 else (0, part.begin)
    mine = range(begin + first, begin + first + rows), range(shape[-1])
    return (range(expert, expert + 1), *mine) if len(shape) == 3 else mine


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes of one tensor share; None: nothing."""
    both = tuple(range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(both) else None


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box stands in the tensor that a larger one is."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))


def size(box: Box) -> int:
    """Elements of a box."""
    return math.prod(map(len, box))


def tile(boxes: Sequence[Box], shape: Shape) -> bool:
    """Whether boxes, none of them empty, cover every element of a tensor once.

    Edges of boxes cut the tensor into cells.  As shards lie, a box is one cell.
    """
    cuts = [sorted({0, length}) for length in shape]
    for axis, cut in enumerate(cuts):
        ends = {end for box in boxes for end in (box[axis].start, box[axis].stop)}
        if ends and (min(ends) < 0 or max(ends) > shape[axis]):
            return False
        cuts[axis] = sorted(ends | set(cut))
    covered = set[tuple[int, ...]]()
    for box in boxes:
        spans = (
            range(bisect.bisect_left(cut, along.start), bisect.bisect_left(cut, along.stop))
            for cut, along in zip(cuts, box, strict=True)
        )
        cells = set(itertools.product(*spans))
        if covered & cells:
            return False
        covered |= cells
    return len(covered) == math.prod(len(cut) - 1 for cut in cuts)
