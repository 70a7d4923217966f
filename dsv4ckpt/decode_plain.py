"""Codes and scales -> floats a second time, by plain float arithmetic; and how far two tensors are apart.

The other opinion of `dsv4 verify`: shares neither code nor method with codec.py, so that no mistake there can
hide.  A code becomes a float32, its product with the scales is rounded to bfloat16 once.  Knows no names or
files.
Source: OCP MX v1.0 sec. 5.3-5.4 (E2M1, E8M0), OCP FP8 (E4M3), as torch casts them; NVFP4 as ModelOpt writes it.
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
_MIDWAY = -0x8000  # low half of a float32, as int16, that lies midway between two bfloat16 numbers
_SCALES = {
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,  # compressed-tensors calls the same bytes so
    "F8_E4M3": torch.float8_e4m3fn,
    "F32": torch.float32,
}
_LEAST_EXACT, _MOST_EXACT = 3, 246  # E8M0 bytes for which bfloat16 holds every product, of E2M1 and of E4M3
_MANTISSA = 0x7FFFFF  # of a float32; above it stand the exponent, biased as E8M0 is, and the sign
_SCALE_2_EXACT = (2.0**-123, 2.0**116)  # the same for powers of two times E2M1 times E4M3: 2**-10 to 2688


class Rows(NamedTuple):
    """Some rows of a tensor, as a file holds them."""

    num_rows: int
    dtype: str  # of the values, or of the codes
    data: Bytes  # not empty
    quant: Quant | None = None
    scales: Bytes | None = None  # of every block that the rows touch; None with quant: all are 1
    first_row: int = 0  # where the rows begin within their first block
    scale_2: float = 1.0  # a second factor of every value, an F32 number; only beside E4M3 scales


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
        dtype = _FLOATS.get(a.dtype, _PATTERNS[max(8, formats.DTYPE_BITS[a.dtype])])
        values_a, values_b = torch.frombuffer(a.data, dtype=dtype), torch.frombuffer(b.data, dtype=dtype)
        return _difference(values_a, values_b, a.dtype, any_nan=False)
    exact = a.quant and b.quant and not (_fits_bf16(a) and _fits_bf16(b))
    read = decode_exact if exact else decode
    return _difference(read(a).view(-1), read(b).view(-1), "BF16", any_nan=True)


def decode(rows: Rows) -> Tensor:
    """bfloat16 [R, C]: code times scale (times scale_2), the exact product rounded once, to nearest even.

    With E8M0 scales the factors are bfloat16 numbers; torch multiplies those in float32, where the product is
    exact, subnormals included, and rounds it.
    """
    if rows.quant is None:
        return torch.frombuffer(rows.data, dtype=torch.bfloat16).view(rows.num_rows, -1)
    if _SCALES[rows.quant.scale] != torch.float8_e8m0fnu and not _fits_bf16(rows):
        return _decode_rounding_once(rows)
    values_RC = _codes(rows, torch.bfloat16)
    if rows.scales is not None:
        _multiply(values_RC, _scales(rows).to(torch.bfloat16), rows.quant.block.cols)
    return values_RC.mul_(rows.scale_2) if rows.scale_2 != 1.0 else values_RC


def _decode_rounding_once(rows: Rows) -> Tensor:
    """The same where one factor is any F32 number, so that float32 must round the product.

    Rounding that again errs only where it came to lie midway between two bfloat16 numbers: these are done
    anew.
    """
    assert rows.quant is not None
    factor_RC, scale_Rc, block_cols = _codes(rows, torch.float32), _scales(rows), rows.quant.block.cols
    if rows.quant.scale == "F8_E4M3":
        _multiply(factor_RC, scale_Rc, block_cols)  # exact: 2 and 4 significant bits
        scale_Rc, block_cols = torch.full((rows.num_rows, 1), rows.scale_2), factor_RC.shape[1]
    product_RC = factor_RC.clone()
    _multiply(product_RC, scale_Rc, block_cols)
    values_RC = product_RC.to(torch.bfloat16)
    row, col = (product_RC.view(torch.int16)[:, ::2] == _MIDWAY).nonzero(as_tuple=True)
    exact = factor_RC[row, col].to(torch.float64) * scale_Rc[row, col // block_cols].to(torch.float64)
    values_RC[row, col] = round_once(exact)
    return values_RC


def decode_exact(rows: Rows) -> Tensor:
    """float64 [R, C]: code times scale times scale_2, exact for every kind (2, 4 and 24 significant bits)."""
    values_RC = _codes(rows, torch.float32).to(torch.float64)
    if rows.quant is not None and rows.scales is not None:
        _multiply(values_RC, _scales(rows).to(torch.float64), rows.quant.block.cols)
    return values_RC.mul_(rows.scale_2)


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


def _codes(rows: Rows, dtype: torch.dtype) -> Tensor:
    """bfloat16 or float32 [R, C]: what the codes mean without their scales; exact in both."""
    index = _raw(rows.data).to(torch.int32)
    if rows.quant and rows.quant.codes_per_element == 2:
        words = torch.int32 if dtype == torch.bfloat16 else torch.int64  # a pair is looked up as one word
        pairs = _e2m1_pairs().to(dtype).view(words).view(-1)
        return torch.index_select(pairs, 0, index).view(dtype).view(rows.num_rows, -1)
    return torch.index_select(_e4m3_values().to(dtype), 0, index).view(rows.num_rows, -1)


def _scales(rows: Rows) -> Tensor:
    """float32 [R, c]: the scales of every row."""
    assert rows.quant is not None and rows.scales is not None
    block_row = (torch.arange(rows.num_rows) + rows.first_row) // rows.quant.block.rows
    scales = torch.frombuffer(rows.scales, dtype=_SCALES[rows.quant.scale])
    scale_rc = scales.to(torch.float32).view(int(block_row[-1]) + 1, -1)
    return scale_rc.index_select(0, block_row)


def _multiply(values_RC: Tensor, scale_Rc: Tensor, block_cols: int) -> None:
    """Multiply every block by its scale, in place; the last block of a row may be cut off by the edge."""
    whole = values_RC.shape[1] // block_cols
    edge = whole * block_cols
    torch.unflatten(values_RC[:, :edge], 1, (whole, block_cols)).mul_(scale_Rc[:, :whole, None])
    if edge < values_RC.shape[1]:
        values_RC[:, edge:].mul_(scale_Rc[:, whole:])


def _fits_bf16(rows: Rows) -> bool:
    """Whether bfloat16 holds every product exactly; of F32 factors, only powers of two let it."""
    if rows.scales is None or rows.quant is None:
        return True
    if rows.quant.scale == "F8_E4M3":
        least, most = _SCALE_2_EXACT
        return least <= rows.scale_2 <= most and math.frexp(rows.scale_2)[0] == 0.5
    if rows.quant.scale == "F32":
        words = torch.frombuffer(rows.scales, dtype=torch.int32)
        if (words & _MANTISSA).any():
            return False
        words = words >> _MANTISSA.bit_length()  # negative if the sign is set
    else:
        words = _raw(rows.scales)
    lowest, highest = words.aminmax()
    return int(lowest) >= _LEAST_EXACT and int(highest) <= _MOST_EXACT


# ---- comparison


def _difference(a: Tensor, b: Tensor, unit: str, *, any_nan: bool) -> Difference | None:
    """Of two vectors of one dtype. any_nan: every NaN equals every other"""
    if _equal(a, b):
        return None
    at = (_pattern(a) != _pattern(b)).nonzero().view(-1)
    if any_nan:
        at = at[~(a[at].isnan() & b[at].isnan())]
        if not len(at):
            return None
    first, values_a, values_b = int(at[0]), a[at], b[at]
    if values_a.dtype == torch.float64 and unit == "BF16":
        values_a, values_b = round_once(values_a), round_once(values_b)
    rank_a, rank_b = _rank(values_a), _rank(values_b)
    steps = torch.maximum(rank_a, rank_b) - torch.minimum(rank_a, rank_b)
    distance = int((steps ^ -(2**63)).max()) + 2**63  # unsigned: I64 values may be 2**64 - 1 apart
    return Difference(len(at), distance, unit, first, str(a[first].item()), str(b[first].item()))


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
    return torch.equal(a.view(words), b.view(words))
