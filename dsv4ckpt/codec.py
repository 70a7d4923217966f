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


class Rounded(NamedTuple):
    """bfloat16 patterns, and which of them are not exactly what was rounded."""

    bits: Tensor  # int16
    inexact: Tensor  # bool: bits were lost, or the value overflowed; a NaN is no loss


def bf16_bits(values: Tensor) -> Rounded:
    """Round float64 to bfloat16 once, to nearest even, by integer arithmetic on the bit patterns.

    values   float64 of any shape; subnormal results and overflow to infinity included
    returns  the bfloat16 patterns, every NaN as 0x7FC0, and what was lost
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
    overflow = (exponent > 127) | (magnitude >= _BF16_INF)
    magnitude = torch.where(overflow, _BF16_INF, magnitude)
    magnitude = torch.where(values.isnan(), _BF16_NAN, magnitude)
    pattern = (sign * ~values.isnan() | magnitude).to(torch.int32).to(torch.int16)
    return Rounded(pattern, ((rest != 0) | overflow) & values.isfinite())


def to_bf16(values: Tensor) -> Tensor:
    """Floating values as bfloat16, rounded once, to nearest even."""
    if values.dtype == torch.float64:
        return bf16_bits(values).bits.view(torch.bfloat16)
    return values.to(torch.bfloat16)


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
    bits = bf16_bits(_e8m0_values()[:, None] * values).bits.to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    pairs = bits[:, byte & 15] | (bits[:, byte >> 4] << 16)
    return pairs.reshape(-1).contiguous()


@functools.cache
def _fp8_table() -> Rounded:
    """[65536]: for (scale byte << 8 | code) the bfloat16 value."""
    return _scaled_table(_e8m0_values())


def _scaled_table(scales: Tensor) -> Rounded:
    """[n * 256]: for (number of the scale << 8 | code) the bfloat16 value. scales: float64 [n]"""
    rounded = bf16_bits(
        scales[:, None] * _e4m3_values()
    )  # at most 24 + 4 significant bits: the product is exact
    return Rounded(rounded.bits.reshape(-1).contiguous(), rounded.inexact.reshape(-1).contiguous())


def _float64(patterns: Tensor) -> Tensor:
    """float64 of float32 patterns (int32), by integer arithmetic: a cast may flush subnormals to zero."""
    exponent = ((patterns >> 23) & 0xFF).to(torch.int64)
    mantissa = (patterns & 0x7FFFFF).to(torch.float64)
    normal = torch.ldexp(mantissa + 2.0**23, exponent - 150)
    values = torch.where(exponent == 0, mantissa * 2.0**-149, normal)
    values = torch.where(exponent == 255, torch.where(mantissa == 0, torch.inf, torch.nan), values)
    return torch.where(patterns < 0, -values, values)


def decode_fp4(codes_RP: Tensor, scale_rc: Tensor, block: Block, out: Tensor | None = None) -> Decoded:
    """Unpack E2M1 pairs and multiply every block of one row by its scale.

    codes_RP  uint8 [R, C/2]; the low nibble is the even column
    scale_rc  uint8 [R, c], E8M0: byte b means 2**(b - 127), 255 means NaN
    block     1 x n, n even
    out       where to put the values, bfloat16 [R, C], contiguous, at a multiple of 4 bytes; None: a new tensor
    returns   bfloat16 [R, C]; exact, -0 kept, infinity where 2**128 is passed (scale bytes 253 and 254)
    """
    rows, packed = codes_RP.shape
    index = pair_index(codes_RP, scale_rc.to(torch.int32) << 8, block)
    values = torch.empty((rows, 2 * packed), dtype=torch.bfloat16) if out is None else out
    torch.index_select(_fp4_table(), 0, index.view(-1), out=values.view(-1).view(torch.int32))
    if _highest(scale_rc) < 253:  # 6 * 2**(253 - 127) is the smallest product beyond bfloat16
        return Decoded(values, 0, 0)
    return Decoded(values, _count_not_finite(values), int(values.isinf().sum()))


def decode_fp8(codes_RC: Tensor, scale_rc: Tensor, block: Block, out: Tensor | None = None) -> Decoded:
    """Multiply every tile of E4M3 codes by its scale.

    codes_RC  uint8 [R, C], E4M3FN codes
    scale_rc  uint8 [r, c] E8M0, or float32 [r, c]
    out       where to put the values, bfloat16 [R, C], contiguous; None: a new tensor
    returns   bfloat16 [R, C]; the exact product rounded once to nearest even
    """
    rows, cols = codes_RC.shape
    if scale_rc.dtype == torch.float32:
        # told apart by their patterns: -0 is not +0
        patterns, inverse = torch.unique(scale_rc.view(torch.int32), return_inverse=True)
        table = _scaled_table(_float64(patterns))
        base_rc = inverse.to(torch.int32) << 8
    else:
        table = _fp8_table()
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
    torch.index_select(table.bits, 0, flat, out=values.view(-1).view(torch.int16))
    rounded = bool(table.inexact.view(-1, 256)[base_rc.unique() >> 8].any())
    num_inexact = int(torch.index_select(table.inexact, 0, flat).sum()) if rounded else 0
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


def pair_index(codes_RP: Tensor, base_rc: Tensor, block: Block) -> Tensor:
    """Index of every packed byte into a table of 256 pairs for each row of the table.

    codes_RP  uint8 [R, C/2]
    base_rc   int32 [R, c]: 256 times the row of the table that each block of one row uses
    returns   int32 [R, C/2]
    """
    rows, packed = codes_RP.shape
    per_block = block.cols // 2
    whole = packed // per_block * per_block
    index = torch.empty((rows, packed), dtype=torch.int32)
    index.copy_(codes_RP)
    blocks = torch.unflatten(index[:, :whole], 1, (whole // per_block, per_block))
    blocks += base_rc[:, : whole // per_block, None]
    if whole < packed:  # the last block of a row is cut off by the edge
        index[:, whole:] += base_rc[:, -1:]
    return index


class _NvTable(NamedTuple):
    """For (E4M3 scale << 8 | packed byte) the two values under one weight_scale_2, low nibble first."""

    pairs: Tensor  # int32 [65536]: bfloat16 patterns
    num_inexact: Tensor  # uint8 [65536]
    plain: Tensor  # bool [256]: all values under this scale are finite and exact


@functools.lru_cache(maxsize=8)
def _nvfp4_table(scale_2: str) -> _NvTable:
    """scale_2: float.hex(), for 0.0 and -0.0 are one key but two tables, and NaN is a new key each time."""
    grid = torch.tensor(FP4_GRID, dtype=torch.float64)
    codes = torch.cat([grid, -grid])  # -grid[0] is -0.0
    # at most 4 + 2 + 24 significant bits: the product is exact
    rounded = bf16_bits(_e4m3_values()[:, None] * codes * float.fromhex(scale_2))
    bits, inexact = rounded.bits.to(torch.int32) & 0xFFFF, rounded.inexact.to(torch.uint8)
    byte = torch.arange(256)
    low, high = byte & 15, byte >> 4
    not_finite = (bits & 0x7FFF) >= _BF16_INF
    return _NvTable(
        (bits[:, low] | (bits[:, high] << 16)).reshape(-1).contiguous(),
        (inexact[:, low] + inexact[:, high]).reshape(-1).contiguous(),
        ~(rounded.inexact | not_finite).any(1),
    )


def decode_nvfp4(
    codes_RP: Tensor, scale_rc: Tensor, scale_2: float, block: Block, out: Tensor | None = None
) -> Decoded:
    """Unpack E2M1 pairs and multiply every block of one row by its scale and the matrix's.

    codes_RP  uint8 [R, C/2]; the low nibble is the even column
    scale_rc  uint8 [R, c], E4M3: 0x7F and 0xFF mean NaN
    scale_2   a float32 number, weight_scale_2
    block     1 x n, n even
    out       where to put the values, bfloat16 [R, C], contiguous, at a multiple of 4 bytes; None: a new tensor
    returns   bfloat16 [R, C]; the exact product rounded once to nearest even, -0 kept
    """
    rows, packed = codes_RP.shape
    table = _nvfp4_table(scale_2.hex())
    scale_index = scale_rc.to(torch.int32)
    index = pair_index(codes_RP, scale_index << 8, block).view(-1)
    values = torch.empty((rows, 2 * packed), dtype=torch.bfloat16) if out is None else out
    torch.index_select(table.pairs, 0, index, out=values.view(-1).view(torch.int32))
    if bool(torch.index_select(table.plain, 0, scale_index.reshape(-1)).all()):
        return Decoded(values, 0, 0)
    num_inexact = int(torch.index_select(table.num_inexact, 0, index).sum())
    return Decoded(values, _count_not_finite(values), num_inexact)
