"""Codes and scales -> floats a second time, by plain float arithmetic; and how far two tensors are apart.

The other opinion of `dsv4 verify`: shares neither code nor method with codec.py, so that no mistake there can
hide.  A code becomes a float32, its product with the scale is rounded to bfloat16 once.  Knows no names or
files.
Source: OCP MX v1.0 sec. 5.3-5.4 (E2M1, E8M0), OCP FP8 (E4M3), as torch casts them.
"""

#  R rows, C columns of the logical weight;  c = number of blocks along a row

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import formats
from .formats import Quant

Bytes = bytearray | memoryview

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_PATTERNS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}  # by bits of an element
_MIDWAY = 0x8000  # low half of a float32 that lies midway between two bfloat16 numbers
_LEAST_EXACT, _MOST_EXACT = 3, 246  # E8M0 bytes for which bfloat16 holds every product, of E2M1 and of E4M3


class Rows(NamedTuple):
    """Some rows of a tensor, as a file holds them."""

    num_rows: int
    dtype: str  # of the values, or of the codes
    data: Bytes  # not empty
    quant: Quant | None = None
    scales: Bytes | None = None  # of every block that the rows touch; None with quant: all are 1
    first_row: int = 0  # where the rows begin within their first block


class Difference(NamedTuple):
    """Where two equally shaped tensors part.

    `distance` counts steps in the order of the patterns of `unit`: neighbours are 1 apart, so are -0 and +0,
    NaN is beyond infinity. It is 0 where values differ by less than a bfloat16 can tell.
    """

    num_values: int
    distance: int  # the largest
    unit: str
    position: int  # of the first different value, row by row
    a: str
    b: str


def same_bytes(a: Rows, b: Rows) -> bool:
    """Whether two sets of rows, stored the same way, hold the same bytes, scales included."""
    both = [(a.data, b.data)]
    if a.scales is not None and b.scales is not None:
        both.append((a.scales, b.scales))
    return all(_equal(_raw(x), _raw(y)) for x, y in both)


def compare(a: Rows, b: Rows) -> Difference | None:
    """Compare equally many values; None if all are the same.

    Two plain tensors have one dtype and are compared by their patterns.  Where one side holds codes the other
    holds BF16 or codes: what codes mean is rounded to bfloat16, and NaN equals NaN.  Two sets of codes are
    not rounded.
    """
    if a.quant is None and b.quant is None:
        return _compare_plain(a, b)
    if a.quant and b.quant and not (_fits_bf16(a) and _fits_bf16(b)):
        exact_a, exact_b = decode_exact(a), decode_exact(b)
        return _compare_decoded(exact_a, exact_b, round_once(exact_a), round_once(exact_b))
    values_a, values_b = decode(a), decode(b)
    return _compare_decoded(values_a, values_b, values_a, values_b)


def decode(rows: Rows) -> Tensor:
    """bfloat16 [R, C]: code times scale, the exact product rounded once, to nearest even.

    With E8M0 scales the float32 product is exact, subnormals included.  With F32 scales it is rounded, and
    rounding it again errs only where it came to lie midway between two bfloat16 numbers: those few are done
    anew.
    """
    if rows.quant is None:
        return torch.frombuffer(rows.data, dtype=torch.bfloat16).view(rows.num_rows, -1)
    codes_RC = _codes(rows)
    if rows.scales is None:
        return codes_RC.to(torch.bfloat16)
    scale_Rc, block_cols = _scales(rows), rows.quant.block.cols
    product_RC = _product(codes_RC, scale_Rc, block_cols)
    values_RC = product_RC.to(torch.bfloat16)
    if rows.quant.scale == "F32":
        row, col = ((product_RC.view(torch.int32) & 0xFFFF) == _MIDWAY).nonzero(as_tuple=True)
        exact = codes_RC[row, col].to(torch.float64) * scale_Rc[row, col // block_cols].to(torch.float64)
        values_RC[row, col] = round_once(exact)
    return values_RC


def decode_exact(rows: Rows) -> Tensor:
    """float64 [R, C]: code times scale, exact for either kind of scale (4 and 24 significant bits)."""
    codes_RC = _codes(rows).to(torch.float64)
    if rows.quant is None or rows.scales is None:
        return codes_RC
    return _product(codes_RC, _scales(rows).to(torch.float64), rows.quant.block.cols)


def round_once(exact: Tensor) -> Tensor:
    """float64 -> bfloat16, to nearest even.

    A cast goes through float32 and rounds twice.  Here the step to float32 rounds to odd: towards zero, its
    last bit set if anything was cut off.  It lies midway between two bfloat16 numbers only if `exact` does.
    """
    near = exact.to(torch.float32)
    bits = near.view(torch.int32)
    bits = bits - (near.abs() > exact.abs()).to(torch.int32)  # the pattern below is the next one towards zero
    bits = bits | ((near != exact) & ~exact.isnan()).to(torch.int32)
    return bits.view(torch.float32).to(torch.bfloat16)


# ---- codes and scales


@functools.cache
def _e2m1_pairs() -> Tensor:
    """float32 [256, 2]: the values in a packed byte; the low nibble is the even column."""

    def value(code: int) -> float:
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        return math.copysign(magnitude, -1 if code & 8 else 1)

    return torch.tensor([(value(byte & 15), value(byte >> 4)) for byte in range(256)])


@functools.cache
def _e4m3_values() -> Tensor:
    """float32 [256] as torch casts them: looking them up is five times faster than casting every code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def _codes(rows: Rows) -> Tensor:
    """float32 [R, C]: what the codes mean without their scales."""
    index = _raw(rows.data).to(torch.int32)
    if rows.quant and rows.quant.codes_per_element == 2:
        pairs = _e2m1_pairs().view(torch.int64).view(-1)  # a pair is looked up as one word
        return torch.index_select(pairs, 0, index).view(torch.float32).view(rows.num_rows, -1)
    return torch.index_select(_e4m3_values(), 0, index).view(rows.num_rows, -1)


def _scales(rows: Rows) -> Tensor:
    """float32 [R, c]: the scales of every row."""
    assert rows.quant is not None and rows.scales is not None
    dtype = torch.float32 if rows.quant.scale == "F32" else torch.float8_e8m0fnu
    block_row = (torch.arange(rows.num_rows) + rows.first_row) // rows.quant.block.rows
    scale_rc = torch.frombuffer(rows.scales, dtype=dtype).to(torch.float32).view(int(block_row[-1]) + 1, -1)
    return scale_rc.index_select(0, block_row)


def _product(codes_RC: Tensor, scale_Rc: Tensor, block_cols: int) -> Tensor:
    """Every block times its scale; the last block of a row may be cut off by the edge."""
    whole = codes_RC.shape[1] // block_cols
    edge = whole * block_cols
    product_RC = torch.empty_like(codes_RC)
    blocks = torch.unflatten(codes_RC[:, :edge], 1, (whole, block_cols))
    products = torch.unflatten(product_RC[:, :edge], 1, (whole, block_cols))
    torch.mul(blocks, scale_Rc[:, :whole, None], out=products)
    if edge < codes_RC.shape[1]:
        torch.mul(codes_RC[:, edge:], scale_Rc[:, whole:], out=product_RC[:, edge:])
    return product_RC


def _fits_bf16(rows: Rows) -> bool:
    """Whether bfloat16 holds every product exactly."""
    if rows.scales is None:
        return True
    if rows.quant is None or rows.quant.scale == "F32":
        return False
    least, most = _raw(rows.scales).aminmax()
    return int(least) >= _LEAST_EXACT and int(most) <= _MOST_EXACT


# ---- comparison


def _compare_plain(a: Rows, b: Rows) -> Difference | None:
    dtype = _FLOATS.get(a.dtype, _PATTERNS[max(8, formats.DTYPE_BITS[a.dtype])])
    values_a, values_b = torch.frombuffer(a.data, dtype=dtype), torch.frombuffer(b.data, dtype=dtype)
    if _equal(values_a, values_b):
        return None
    differs = _pattern(values_a) != _pattern(values_b)
    return _difference(values_a, values_b, _steps(values_a, values_b, differs), a.dtype, differs)


def _compare_decoded(a: Tensor, b: Tensor, rounded_a: Tensor, rounded_b: Tensor) -> Difference | None:
    if _equal(a, b):
        return None
    differs = (_pattern(a) != _pattern(b)) & ~(a.isnan() & b.isnan())
    if not bool(differs.any()):
        return None
    return _difference(a, b, _steps(rounded_a, rounded_b, differs), "BF16", differs)


def _difference(a: Tensor, b: Tensor, distance: int, unit: str, differs: Tensor) -> Difference:
    first = int(differs.view(-1).to(torch.uint8).argmax())
    value_a, value_b = a.view(-1)[first].item(), b.view(-1)[first].item()
    return Difference(int(differs.sum()), distance, unit, first, str(value_a), str(value_b))


def _steps(a: Tensor, b: Tensor, differs: Tensor) -> int:
    """The largest distance between patterns in the order of their values."""
    rank_a, rank_b = _rank(a[differs]), _rank(b[differs])
    spread = torch.maximum(rank_a, rank_b) - torch.minimum(rank_a, rank_b)
    return int((spread ^ -(2**63)).max()) + 2**63  # unsigned: I64 values may be 2**64 - 1 apart


def _rank(values: Tensor) -> Tensor:
    """int64 in the order of the values; of floats, -0 stands right below +0."""
    pattern = _pattern(values)
    if not values.dtype.is_floating_point:
        return pattern.to(torch.int64)
    bits = 8 * pattern.element_size()
    magnitude = 2 ** (bits - 1) - 1
    rank: Tensor = pattern ^ ((pattern >> (bits - 1)) & magnitude)
    return rank.to(torch.int64)


def _raw(data: Bytes) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _pattern(values: Tensor) -> Tensor:
    return values.view(_PATTERNS[8 * values.element_size()])


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the patterns are the same; by words where they divide evenly, which is three times faster."""
    words = torch.uint8 if a.numel() * a.element_size() % 8 else torch.int64
    return torch.equal(a.view(-1).view(words), b.view(-1).view(words))
