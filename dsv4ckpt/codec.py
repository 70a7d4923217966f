"""Codes and scales -> bfloat16.  Owns the arithmetic; knows no names, files or releases.

Decoding is a table lookup on bytes, not float arithmetic on unpacked nibbles: a table holds the bfloat16 pattern of
every (scale, byte) pair, so every result is exact by construction, -0 and subnormals included, whatever the
processor's rounding or flush-to-zero mode.  The tables are built with integer and float64 arithmetic, once.
Source: OCP MX v1.0 sec. 5.3-5.4 (E2M1, E8M0), OCP FP8 (E4M3).
"""

#  R rows, C columns of the logical weight;  r, c = number of blocks along them;  P = packed columns (C / 2)

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import E8M0_BIAS, E8M0_NAN, FP4_GRID, Block

_BF16_NAN = 0x7FC0
_BF16_INF = 0x7F80


class Decoded(NamedTuple):
    """Decoded values, and what a reader must be told about them."""

    values: Tensor  # bfloat16 [R, C]; `out` where one was given
    num_not_finite: int  # NaN or infinity among the values
    num_inexact: (
        int  # values that bfloat16 could not hold exactly; for E8M0 scales 0 unless a byte is < 3 or > 246
    )


def bf16_bits(values: Tensor) -> Tensor:
    """Round float64 to bfloat16 once, to nearest even, by integer arithmetic on the bit patterns.

    values   float64 of any shape; subnormal results and overflow to infinity included
    returns  int16, the bfloat16 patterns; every NaN becomes 0x7FC0
    exact    one rounding. A cast in torch goes through float32 and rounds twice
    """
    bits = values.view(torch.int64)
    sign = (bits >> 48) & 0x8000
    exponent = ((bits >> 52) & 0x7FF) - 1023
    significand = (bits & ((1 << 52) - 1)) | (1 << 52)
    significand = torch.where(values == 0, torch.zeros_like(significand), significand)
    # A bfloat16 keeps 8 significant bits of 53; below 2**-126 one less for each halving.
    drop = (45 + (-126 - exponent).clamp(min=0)).clamp(max=62)
    kept = significand >> drop
    rest = significand - (kept << drop)
    half = torch.ones_like(drop) << (drop - 1)
    kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1))).to(torch.int64)
    # Adding the significand (with its hidden bit) to the exponent field lets a carry move into it.
    magnitude = kept + ((exponent + 126).clamp(min=0) << 7)
    magnitude = torch.where((exponent > 127) | (magnitude > _BF16_INF), _BF16_INF, magnitude)
    magnitude = torch.where(values.isnan(), _BF16_NAN, magnitude)
    return (sign * ~values.isnan() | magnitude).to(torch.int32).to(torch.int16)


@functools.cache
def _e8m0_values() -> Tensor:
    """float64 [256]: byte b is 2**(b - 127), 255 is NaN."""
    values = torch.ldexp(
        torch.ones(256, dtype=torch.float64), torch.arange(256) - E8M0_BIAS
    )  # down to 2**-127: normal in float64
    values[E8M0_NAN] = torch.nan
    return values


@functools.cache
def _e4m3_values() -> Tensor:
    """float64 [256] from the definition of E4M3FN: bias 7, no infinity, 0x7F and 0xFF NaN."""
    code = torch.arange(256)
    sign = 1.0 - 2.0 * (code >> 7)
    exponent, mantissa = (code >> 3) & 15, (code & 7).to(torch.float64)
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    values = sign * torch.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[[0x7F, 0xFF]] = torch.nan
    return values


@functools.cache
def _fp4_table() -> Tensor:
    """int32 [65536]: for (scale byte << 8 | packed byte) the two bfloat16 values, low nibble first."""
    grid = torch.tensor(FP4_GRID, dtype=torch.float64)
    values = torch.cat([grid, -grid])  # -grid[0] is -0.0
    bits = bf16_bits(_e8m0_values()[:, None] * values).to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    pairs = bits[:, byte & 15] | (bits[:, byte >> 4] << 16)
    return pairs.reshape(-1).contiguous()


@functools.cache
def _fp8_table() -> Tensor:
    """int16 [65536]: for (scale byte << 8 | code) the bfloat16 value."""
    return bf16_bits(_e8m0_values()[:, None] * _e4m3_values()).reshape(-1).contiguous()


@functools.cache
def _fp8_inexact_table() -> Tensor:
    """bool [65536]: whether bfloat16 rounds the product; only for the smallest scale bytes, and on overflow."""
    exact = (_e8m0_values()[:, None] * _e4m3_values()).reshape(-1)
    return _is_rounded(exact, _fp8_table())


def _is_rounded(exact: Tensor, bits: Tensor) -> Tensor:
    held = bits.view(torch.bfloat16).to(torch.float64)
    return (held != exact) & ~exact.isnan()


def decode_fp4(codes_RP: Tensor, scale_rc: Tensor, block: Block, out: Tensor | None = None) -> Decoded:
    """Unpack E2M1 pairs and multiply every block of one row by its scale.

    codes_RP  uint8 [R, C/2]; the low nibble is the even column
    scale_rc  uint8 [R, c], E8M0: byte b means 2**(b - 127), 255 means NaN
    block     1 x n, n even
    out       where to put the values, bfloat16 [R, C], contiguous, at a multiple of 4 bytes; None: a new tensor
    returns   bfloat16 [R, C]; exact, -0 kept, infinity where 2**128 is passed (scale bytes 253 and 254)
    """
    rows, packed = codes_RP.shape
    per_block = block.cols // 2
    whole = packed // per_block * per_block
    index = torch.empty((rows, packed), dtype=torch.int32)
    index.copy_(codes_RP)
    base_rc = scale_rc.to(torch.int32) << 8
    blocks = torch.unflatten(index[:, :whole], 1, (whole // per_block, per_block))
    blocks += base_rc[:, : whole // per_block, None]
    if whole < packed:  # the last block of a row is cut off by the edge
        index[:, whole:] += base_rc[:, -1:]
    values = torch.empty((rows, 2 * packed), dtype=torch.bfloat16) if out is None else out
    torch.index_select(_fp4_table(), 0, index.view(-1), out=values.view(-1).view(torch.int32))
    # 6 * 2**(253 - 127) is the smallest product beyond bfloat16
    num_not_finite = _count_not_finite(values) if _highest(scale_rc) >= 253 else 0
    return Decoded(values, num_not_finite, 0)


def decode_fp8(codes_RC: Tensor, scale_rc: Tensor, block: Block, out: Tensor | None = None) -> Decoded:
    """Multiply every tile of E4M3 codes by its scale.

    codes_RC  uint8 [R, C], E4M3FN codes
    scale_rc  uint8 [r, c] E8M0, or float32 [r, c]
    out       where to put the values, bfloat16 [R, C], contiguous; None: a new tensor
    returns   bfloat16 [R, C]; the exact product rounded once to nearest even
    """
    rows, cols = codes_RC.shape
    if scale_rc.dtype == torch.float32:
        distinct, inverse = torch.unique(scale_rc, return_inverse=True)
        products = distinct.to(torch.float64)[:, None] * _e4m3_values()  # 24 + 4 significant bits: exact
        table = bf16_bits(products).reshape(-1).contiguous()
        inexact = _is_rounded(products.reshape(-1), table)
        base_rc = inverse.to(torch.int32) << 8
    else:
        table, inexact = _fp8_table(), _fp8_inexact_table()
        base_rc = scale_rc.to(torch.int32) << 8
    base_rC = base_rc.repeat_interleave(block.cols, 1)[:, :cols]
    index = torch.empty((rows, cols), dtype=torch.int32)
    index.copy_(codes_RC)
    whole = rows // block.rows * block.rows
    tiles = index[:whole].view(whole // block.rows, block.rows, cols)
    tiles += base_rC[: whole // block.rows, None, :]
    if whole < rows:  # the last tiles of a column are cut off by the edge
        index[whole:] += base_rC[-1:]
    flat = index.view(-1)
    values = torch.empty((rows, cols), dtype=torch.bfloat16) if out is None else out
    torch.index_select(table, 0, flat, out=values.view(-1).view(torch.int16))
    rounded = bool(inexact.view(-1, 256)[base_rc.unique() >> 8].any())
    num_inexact = int(torch.index_select(inexact, 0, flat).sum()) if rounded else 0
    return Decoded(values, _count_not_finite(values), num_inexact)


def unit_scale(rows: int, cols: int) -> Tensor:
    """E8M0 scales that mean 1."""
    return torch.full((rows, cols), E8M0_BIAS, dtype=torch.uint8)


def count_not_finite(values: Tensor) -> int:
    """NaN and infinities in a float tensor; 0 for integers and one-byte formats, which are not interpreted here."""
    if values.dtype == torch.bfloat16:
        return _count_not_finite(values)
    if not values.dtype.is_floating_point or values.element_size() == 1:
        return 0
    return int(values.numel() - torch.isfinite(values).sum())


def _count_not_finite(values: Tensor) -> int:
    """For bfloat16: exponent bits all set. One cheap pass decides, a second one counts only when needed."""
    magnitude = values.view(torch.int16) & 0x7FFF
    if _highest(magnitude) < _BF16_INF:
        return 0
    return int((magnitude >= _BF16_INF).sum())


def _highest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0
