"""How far two recorded forward passes lie apart, tensor by tensor.  Pure; knows no files, no model and no names.

Values are compared in float64, whole numbers exactly, and memory beyond the two tensors at hand is bounded.
Source: IEEE 754 for the order of floating-point numbers, in which neighbours are one ulp apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4ckpt.errors import Usage

from .layers import dtype_name

_PIECE = 1 << 20  # elements compared at once; a handful of float64 copies of them exist at a time
_WORDS = {
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes of a float -> the integer that holds its bits
_SHOWN = 16  # values of a row of whole numbers that a message can hold


class Verdict(StrEnum):
    """What came out for one tensor."""

    EQUAL = "equal"  # every value; 0 and -0 are equal
    CLOSE = "close"  # every value is within the tolerance
    DIFFERS = "DIFFERS"
    NAN = "NaN"  # in either one, or in both at the same place: nothing can be said of what comes after


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A value passes if |a - b| <= atol + rtol * largest, or if it is at most max_ulp steps away.

    largest  finite |value| of both in the same row (last axis): what is near 0 comes out of sums of the row's terms and
             carries their rounding, so its own size would be no measure
    max_ulp  steps between neighbouring numbers of the coarser dtype of the two; 0: no value passes by it
    """

    atol: float = 2e-5
    rtol: float = 5e-6
    max_ulp: int = 0


class Row(NamedTuple):
    """One tensor of both. Of whole numbers, the figures are None and rows (the last axis) are counted."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    verdict: Verdict
    num_over: int  # values, or rows, that do not pass
    num_in_all: int
    at: tuple[int, ...] | None = None  # of the worst value that does not pass, or of the first such row
    values: tuple[str, str] | None = None  # what stands there in either
    cosine: float | None = None
    max_abs: float | None = None
    max_rel: float | None = None  # |a - b| / largest, as the tolerance measures it
    max_ulp: int | None = None


class Look(NamedTuple):
    """What can be told of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def aligned(names_a: Iterable[str], names_b: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Names in both, in A's order; names only in A; names only in B."""
    a, b = dict.fromkeys(names_a), dict.fromkeys(names_b)
    return [n for n in a if n in b], [n for n in a if n not in b], [n for n in b if n not in a]


def require_comparable(a: Mapping[str, Look], b: Mapping[str, Look]) -> None:
    """raises Usage if nothing is in both, or for the first tensor whose shape or kind of numbers differs"""
    common, *_ = aligned(a, b)
    if not common:
        raise Usage(
            "the two dumps have no tensor in common",
            expected=", ".join([*a][:3]) or "at least one tensor",
            found=", ".join([*b][:3]) or "no tensor at all",
            do="give both dumps the same names, or the same --only",
        )
    for name in common:
        if a[name].shape != b[name].shape or _is_float(a[name].dtype) != _is_float(b[name].dtype):
            raise Usage(
                f"{name!r} is not the same kind of tensor in both dumps",
                expected=_words(a[name]),
                found=_words(b[name]),
                do="compare dumps of the same model and ids; in a port of your own, look for a swapped axis",
            )


def compare(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: Tolerance | None = None
) -> Iterator[Row]:
    """A row for each name that is in both, in A's order, which is the order of execution.

    a, b     any mapping, as one that reads a tensor when it is asked for; each tensor is asked for once
    raises   Usage for a tensor that has another shape, or other numbers (whole or not), in B
    """
    for name in aligned(a, b)[0]:
        yield compare_tensors(name, a[name], b[name], tolerance or Tolerance())


def compare_tensors(name: str, a: Tensor, b: Tensor, tolerance: Tolerance) -> Row:
    """One row. Floating-point dtypes of either side may differ, and so may those of whole numbers."""
    looks = [{name: Look(tensor.dtype, tuple(tensor.shape))} for tensor in (a, b)]
    require_comparable(*looks)
    if _is_float(a.dtype):
        return _Figures(name, a, b, tolerance).row()
    return _whole_numbers(name, a, b)


def first_divergence(rows: Iterable[Row]) -> Row | None:
    """The first row that does not pass."""
    return next((row for row in rows if row.verdict in (Verdict.DIFFERS, Verdict.NAN)), None)


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Steps from a to b over the numbers of their dtype, int64; 0 and -0 are one number, infinity follows the largest.

    a, b     of one dtype: float64, float32, float16 or bfloat16; no NaN
    returns  exact up to 2**63 - 1, which stands for all that is farther (float64 of opposite signs)
    """
    a_key, b_key = _order(a), _order(b)
    opposite = (a_key < 0) != (b_key < 0)
    a_far, b_far = a_key.abs(), b_key.abs()
    most = torch.iinfo(torch.int64).max
    return torch.where(opposite, torch.minimum(a_far, most - b_far) + b_far, (a_far - b_far).abs())


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype whose numbers near 1 lie farther apart."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _order(x: Tensor) -> Tensor:
    """Whole numbers in the same order, neighbours 1 apart: the bits, which count away from zero on either side."""
    bits = x.contiguous().view(_WORDS[x.element_size()]).long()
    lowest = -(2 ** (8 * x.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


class _Figures:
    """Sums and maxima over the pieces of two tensors."""

    def __init__(self, name: str, a: Tensor, b: Tensor, tolerance: Tolerance) -> None:
        self.name, self.shape = name, tuple(a.shape)
        self.dtypes = (dtype_name(a.dtype), dtype_name(b.dtype))
        self.a, self.b = a.reshape(_rows_of(self.shape)), b.reshape(_rows_of(self.shape))
        self.tolerance, self.coarse = tolerance, coarser(a.dtype, b.dtype)
        self.dot = self.square_a = self.square_b = self.max_abs = self.max_rel = 0.0
        self.max_ulp = self.num_over = self.num_nan = self.num_equal = 0
        self.worst, self.first_nan = (-1.0, -1), -1  # of those that do not pass: difference, place
        num_rows, width = self.a.shape
        step = max(1, _PIECE // max(1, width))
        for begin in range(0, num_rows if width else 0, step):
            self._add(begin * width, self.a[begin : begin + step], self.b[begin : begin + step])

    def _add(self, begin: int, a: Tensor, b: Tensor) -> None:
        is_nan = a.isnan() | b.isnan()
        if is_nan.any():
            if self.first_nan < 0:
                self.first_nan = begin + int(is_nan.flatten().nonzero()[0])
            self.num_nan += int(is_nan.sum())
            a, b = a.masked_fill(is_nan, 0), b.masked_fill(is_nan, 0)  # the figures are about the others
        ulp = ulp_distance(a.to(self.coarse), b.to(self.coarse))
        a, b = a.double(), b.double()
        self.dot += float((a * b).sum())
        self.square_a += float(a.square().sum())
        self.square_b += float(b.square().sum())
        size = torch.maximum(a.abs(), b.abs())
        largest = size.where(size.isfinite(), 0.0).amax(1, keepdim=True)
        apart = torch.where(a == b, 0.0, (a - b).abs())  # infinity is as far from itself as any number
        passes = apart <= self.tolerance.atol + self.tolerance.rtol * largest
        passes |= (ulp <= self.tolerance.max_ulp) & apart.isfinite()
        self.num_equal += int((apart == 0).sum())
        self.num_over += int((~passes).sum())
        self.max_abs = max(self.max_abs, float(apart.max()))
        self.max_rel = max(self.max_rel, float((apart / largest.where(largest > 0, 1.0)).max()))
        self.max_ulp = max(self.max_ulp, int(ulp.max()))
        if not passes.all():
            far, place = apart.masked_fill(passes, -1).flatten().max(0)
            self.worst = max(self.worst, (float(far), begin + int(place)), key=lambda item: item[0])

    def row(self) -> Row:
        if self.num_nan:
            verdict, place = Verdict.NAN, self.first_nan
        elif self.num_over:
            verdict, place = Verdict.DIFFERS, self.worst[1]
        else:
            verdict = Verdict.EQUAL if self.num_equal == self.a.numel() else Verdict.CLOSE
            place = -1
        return Row(
            self.name,
            self.shape,
            self.dtypes,
            verdict,
            self.num_over + self.num_nan,
            self.a.numel(),
            None if place < 0 else _index(place, self.shape),
            None if place < 0 else (_told(self.a, place), _told(self.b, place)),
            self._cosine(),
            self.max_abs,
            self.max_rel,
            self.max_ulp,
        )

    def _cosine(self) -> float:
        """1 for two zero vectors, 0 for one; NaN where a square is infinite."""
        if not self.square_a or not self.square_b:
            return float(self.square_a == self.square_b)
        cosine = self.dot / (math.sqrt(self.square_a) * math.sqrt(self.square_b))
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def _whole_numbers(name: str, a: Tensor, b: Tensor) -> Row:
    shape = tuple(a.shape)
    a_rows, b_rows = a.long().reshape(_rows_of(shape)), b.long().reshape(_rows_of(shape))
    (differing,) = (a_rows != b_rows).any(1).nonzero(as_tuple=True)
    at = values = None
    if len(differing):
        first = int(differing[0])
        at = _index(first, shape[:-1])
        values = (_listed(a_rows[first]), _listed(b_rows[first]))
    verdict = Verdict.DIFFERS if len(differing) else Verdict.EQUAL
    return Row(
        name,
        shape,
        (dtype_name(a.dtype), dtype_name(b.dtype)),
        verdict,
        len(differing),
        len(a_rows),
        at,
        values,
    )


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the same tensor as rows: all axes but the last one are counted together."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _told(values: Tensor, place: int) -> str:
    return f"{float(values.flatten()[place]):.9g}"


def _listed(row: Tensor) -> str:
    numbers = [str(number) for number in row[:_SHOWN].tolist()]
    return " ".join([*numbers, "..."] if len(row) > _SHOWN else numbers)


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element that is counted in order of memory."""
    index = []
    for length in reversed(shape):
        place, rest = divmod(place, length)
        index.append(rest)
    return tuple(reversed(index))


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _words(look: Look) -> str:
    return f"{dtype_name(look.dtype)} {list(look.shape)}"
