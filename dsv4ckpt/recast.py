"""Codes and scales of one format -> codes and scales of another, without passing through floats.

Owns the arithmetic of recasting; knows no names, files or releases.  Whatever can be recast exactly is; what
cannot is rounded once, to nearest even, and counted, so that a caller may refuse it.
Source: OCP MX v1.0 sec. 5.3-5.4 (E2M1, E8M0), OCP FP8 (E4M3), DeepSeek-V4 convert.py (the scale of an FP8
tile), ModelOpt's NVFP4 (weight_scale x weight_scale_2).
"""

#  R rows, C columns of the logical weight;  r, c = number of blocks along them;  P = packed columns (C / 2)

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .codec import pair_index
from .formats import E8M0_BIAS, E8M0_NAN, FP4_EXPERT, FP4_GRID, FP8_MAX, NVFP4_EXPERT, Block, ceil_div

FP8_LOSSLESS_GAP = 14  # within a tile: 0.5 * 2**(6 - 14) is 2**-9, the smallest E4M3 subnormal
NVFP4_LOSSLESS_GAP = 17  # below the largest scale of a matrix: 2**(8 - 17) is that subnormal again

_FP8_HEADROOM = (
    6  # a tile's largest FP4 scale is 2**6 tile scales: 6 * 2**6 = 384 <= 448, and 6 * 2**7 is not
)
_NVFP4_HEADROOM = 8  # the largest E4M3 power of two is 2**8
_FLUSHED_GAP = 19  # 6 * 2**(6 - 19) is less than half of 2**-9: from here on every code becomes a zero
_SATURATED_GAP = -4  # 0.5 * 2**(6 + 4) is beyond 448: from here down every code but zero saturates
_E4M3_MIN_EXPONENT = -6  # of the normal numbers; subnormals share it
_E4M3_MAX = 0x7E
_F32_NAN = 0x7FC00000
_F32_2_M127 = 0x00400000  # E8M0 byte 0 as float32: a subnormal


class Tiles(NamedTuple):
    """E8M0 scales of FP8 tiles, and what stands in the way of an exact recast. All [r, c] of the tiles."""

    scale_rc: Tensor  # uint8 E8M0
    gap_rc: Tensor  # int16: largest minus smallest FP4 exponent that counts; 0 where nothing counts
    low_rc: Tensor  # bool: the scale would lie below byte 0 and is 0 instead


class Recast(NamedTuple):
    """E4M3 codes, and how many of them are not the value that was recast."""

    codes: Tensor  # uint8 [R, C]; `out` where one was given
    num_changed: int


class NvScales(NamedTuple):
    """E4M3 scales of 1x16 blocks, and which scales of 1x32 blocks they cannot express."""

    scale: Tensor  # uint8 [R, 2c], E4M3
    lost_rc: Tensor  # bool [R, c]


class E8m0Scales(NamedTuple):
    """E8M0 scales, and which numbers are none."""

    scale_rc: Tensor  # uint8; 255 (NaN) where bad
    bad: Tensor  # bool


class _Pairs(NamedTuple):
    """For (gap - _SATURATED_GAP) << 8 | packed byte, what becomes of its two codes."""

    codes: Tensor  # int16: two E4M3 codes, low nibble first
    num_changed: Tensor  # uint8


def has_values(codes_RP: Tensor, fp4_block: Block) -> Tensor:
    """Which blocks count for scales: those that hold more than zeros of either sign.

    codes_RP  uint8 [R, C/2]
    returns   bool [R, c]
    """
    rows, packed = codes_RP.shape
    per_block = fp4_block.cols // 2
    num_blocks = ceil_div(packed, per_block)
    magnitude = codes_RP & 0x77
    if num_blocks * per_block > packed:  # the last block of a row is cut off by the edge
        magnitude = torch.nn.functional.pad(magnitude, (0, num_blocks * per_block - packed))
    blocks = magnitude.reshape(rows, num_blocks, per_block)
    words = blocks.view(torch.int64) if per_block % 8 == 0 else blocks
    return (words != 0).any(-1)


def fp8_tiles(scale_rc: Tensor, fp4_block: Block, tile: Block, codes_RP: Tensor | None = None) -> Tiles:
    """Scale of every FP8 tile: 2**-6 of the largest FP4 scale inside, so that 6 becomes at most 384.

    scale_rc   uint8 [R, c], E8M0 scales of FP4 blocks; no 255
    fp4_block  1 x n, n even
    tile       a whole number of FP4 blocks; tiles cut off by the edge are legal
    codes_RP   uint8 [R, C/2]: blocks of nothing but zeros then count neither for the scale nor for the gap. A
               tile of nothing else takes its scale from them all the same, is never low and has gap 0
    returns    scale: the largest byte less 6, at least 0
    exact      the recast is, where gap_rc <= FP8_LOSSLESS_GAP. A low tile stays exact too (its FP4 bytes are
               0..5, at most 6 below 2**6 times byte 0), but holds smaller codes than a fresh quantizer's
    """
    exponent = scale_rc.to(torch.int16)
    top = _tile_max(exponent, fp4_block, tile)
    counts = top >= 0
    bottom = -_tile_max(-exponent, fp4_block, tile)
    if codes_RP is not None:
        nonzero = has_values(codes_RP, fp4_block)
        top_nonzero = _tile_max(torch.where(nonzero, exponent, -1), fp4_block, tile)
        bottom = -_tile_max(torch.where(nonzero, -exponent, -E8M0_NAN), fp4_block, tile)
        counts = top_nonzero >= 0
        top = torch.where(counts, top_nonzero, top)
    scale = (top - _FP8_HEADROOM).clamp(min=0).to(torch.uint8)
    return Tiles(scale, torch.where(counts, top - bottom, 0), counts & (top < _FP8_HEADROOM))


def _tile_max(exponent_rc: Tensor, fp4_block: Block, tile: Block) -> Tensor:
    """Largest exponent of every tile; int16, of FP4 blocks in, of tiles out."""
    rows, cols = exponent_rc.shape
    high, wide = tile.rows // fp4_block.rows, tile.cols // fp4_block.cols
    num_rows, num_cols = ceil_div(rows, high), ceil_div(cols, wide)
    missing = (0, num_cols * wide - cols, 0, num_rows * high - rows)
    if any(missing):
        lowest = torch.iinfo(exponent_rc.dtype).min
        exponent_rc = torch.nn.functional.pad(exponent_rc, missing, value=lowest)
    return exponent_rc.reshape(num_rows, high, num_cols, wide).amax((1, 3))


def fp4_to_fp8(
    codes_RP: Tensor,
    scale_rc: Tensor,
    fp4_block: Block,
    tile_scale_rc: Tensor,
    tile: Block,
    out: Tensor | None = None,
) -> Recast:
    """E2M1 codes under block scales -> E4M3 codes under tile scales.

    codes_RP       uint8 [R, C/2]; rows begin at a tile's first row, or all lie within one row of tiles
    scale_rc       uint8 [R, c] E8M0 of the FP4 blocks; no 255
    fp4_block      1 x n, n even
    tile_scale_rc  uint8 E8M0 of the tiles these rows lie in
    tile           a whole number of FP4 blocks
    out            where to put the codes, uint8 [R, C], contiguous, at a multiple of 2 bytes; None: a new one
    returns        uint8 [R, C]: v * 2**(s - S) to nearest even, saturating at 448, -0 kept; exact for scales
                   from 2**6 tile scales, the tile's largest, down to FP8_LOSSLESS_GAP below
    """
    rows, packed = codes_RP.shape
    level_rc = _levels(scale_rc, fp4_block, tile_scale_rc, tile)
    base_rc = level_rc.clamp(0, _FLUSHED_GAP - _SATURATED_GAP) << 8
    index = pair_index(codes_RP, base_rc, fp4_block)
    codes = torch.empty((rows, 2 * packed), dtype=torch.uint8) if out is None else out
    table = _fp8_pairs()
    torch.index_select(table.codes, 0, index.view(-1), out=codes.view(-1).view(torch.int16))
    doubtful_rc = level_rc.clamp(-_SATURATED_GAP, FP8_LOSSLESS_GAP - _SATURATED_GAP) != level_rc
    if not bool(doubtful_rc.any()):
        return Recast(codes, 0)
    # 0, what fills up a block cut off by the edge, is a pair of zeros: never changed
    missing = level_rc.shape[1] * (fp4_block.cols // 2) - packed
    blocks = torch.nn.functional.pad(index, (0, missing)).view(*level_rc.shape, -1)
    changed = torch.index_select(table.num_changed, 0, blocks[doubtful_rc].view(-1))
    return Recast(codes, int(changed.sum()))


def _levels(scale_rc: Tensor, fp4_block: Block, tile_scale_rc: Tensor, tile: Block) -> Tensor:
    """int32 [r, c]: the gap of every FP4 block below 2**6 tile scales, less _SATURATED_GAP."""
    rows, cols = scale_rc.shape
    highest = tile_scale_rc.to(torch.int32) + (_FP8_HEADROOM - _SATURATED_GAP)
    highest = highest.repeat_interleave(tile.cols // fp4_block.cols, 1)[:, :cols]
    if rows > 1 or highest.shape[0] > 1:
        highest = highest.repeat_interleave(tile.rows, 0)[:rows]
    return highest - scale_rc.to(torch.int32)


@functools.cache
def _fp8_pairs() -> _Pairs:
    """[24 * 256]: every gap that matters x every packed byte."""
    grid = torch.tensor(FP4_GRID, dtype=torch.float64)
    gap = torch.arange(_SATURATED_GAP, _FLUSHED_GAP + 1)
    exact = torch.ldexp(torch.ones_like(gap, dtype=torch.float64), _FP8_HEADROOM - gap)[:, None] * grid
    magnitude, changed = _e4m3_codes(exact)
    codes = torch.cat([magnitude, magnitude | 1 << 7], 1)  # zero included: code 8 is -0
    changed = torch.cat([changed, changed], 1).to(torch.uint8)
    byte = torch.arange(256)
    pairs = codes[:, byte & 15] | codes[:, byte >> 4] << 8
    num_changed = changed[:, byte & 15] + changed[:, byte >> 4]
    return _Pairs(pairs.to(torch.int16).reshape(-1).contiguous(), num_changed.reshape(-1).contiguous())


def _e4m3_codes(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """float64 >= 0 -> E4M3 codes (int64), to nearest even, saturating; and where they are another number."""
    exponent = torch.frexp(magnitude).exponent.to(torch.int64) - 1  # its significand is in [0.5, 1)
    exponent = torch.where(magnitude == 0, _E4M3_MIN_EXPONENT, exponent.clamp(min=_E4M3_MIN_EXPONENT))
    units = torch.ldexp(magnitude, 3 - exponent)  # of the last of 3 mantissa bits
    kept = torch.round(units)  # ties to even
    # Adding the significand (with its hidden bit) to the exponent field lets a carry move into it.
    code = kept.to(torch.int64) + ((exponent - _E4M3_MIN_EXPONENT) << 3)
    return code.clamp(max=_E4M3_MAX), (kept != units) | (magnitude > FP8_MAX)


def nvfp4_exponent(
    scale_rcs: Iterable[Tensor], codes: Iterable[Tensor] | None = None, fp4_block: Block = FP4_EXPERT.block
) -> int:
    """Exponent of the largest scale of matrices that are to share one weight_scale_2.

    scale_rcs  uint8 [R, c] E8M0 each; no 255
    codes      uint8 [R, C/2] of each matrix: blocks of nothing but zeros then do not count
    returns    byte - 127; 0 where nothing counts
    """
    highest = -1
    every = (
        ((scale_rc, None) for scale_rc in scale_rcs) if codes is None else zip(scale_rcs, codes, strict=True)
    )
    for scale_rc, codes_RP in every:
        counting = scale_rc if codes_RP is None else scale_rc[has_values(codes_RP, fp4_block)]
        highest = max(highest, int(counting.max()) if counting.numel() else -1)
    return highest - E8M0_BIAS if highest >= 0 else 0


def nvfp4_scale_2(kmax: int) -> float:
    """weight_scale_2: the largest scale becomes 2**8 of these, the largest E4M3 power of two.

    exact  as float32 for every E8M0 exponent, -127..127: 2**-135 is a subnormal of it
    """
    return math.ldexp(1.0, kmax - _NVFP4_HEADROOM)


def nvfp4_scales(scale_rc: Tensor, kmax: int) -> NvScales:
    """E8M0 scales of 1x32 blocks -> E4M3 scales of 1x16 blocks, in units of nvfp4_scale_2(kmax).

    scale_rc  uint8 [R, c] E8M0; no 255
    kmax      nvfp4_exponent of all the matrices that share weight_scale_2
    returns   2**(k - kmax + 8), each twice: uint8 [R, 2c]; where C ends within the first half of a block of 32
              the last column is one too many
    exact     for k from kmax down to kmax - NVFP4_LOSSLESS_GAP; else lost_rc, and the scale is 0 or 448, which
              is no loss for a block of nothing but zeros
    """
    gap_rc = kmax + E8M0_BIAS - scale_rc.to(torch.int16)
    lost_rc = (gap_rc < 0) | (gap_rc > NVFP4_LOSSLESS_GAP)
    index = gap_rc.clamp(-1, NVFP4_LOSSLESS_GAP + 1) + 1
    byte = torch.index_select(_nvfp4_scale_codes(), 0, index.reshape(-1).to(torch.int32))
    halves = FP4_EXPERT.block.cols // NVFP4_EXPERT.block.cols
    return NvScales(byte.view(scale_rc.shape).repeat_interleave(halves, 1), lost_rc)


@functools.cache
def _nvfp4_scale_codes() -> Tensor:
    """uint8 [20], by gap + 1: beyond 448, the 18 powers of two from 2**8 to 2**-9, below them."""
    powers = torch.ldexp(
        torch.ones(NVFP4_LOSSLESS_GAP + 2, dtype=torch.float64),
        _NVFP4_HEADROOM - torch.arange(-1, NVFP4_LOSSLESS_GAP + 1),
    )
    return torch.cat([_e4m3_codes(powers)[0].to(torch.uint8), torch.zeros(1, dtype=torch.uint8)])


@functools.cache
def _f32_patterns() -> Tensor:
    """int32 [256]: the float32 pattern of every E8M0 byte."""
    patterns = torch.arange(256, dtype=torch.int32) << 23
    patterns[0] = _F32_2_M127
    patterns[E8M0_NAN] = _F32_NAN
    return patterns


def e8m0_to_f32(scale_rc: Tensor) -> Tensor:
    """E8M0 -> float32, by patterns: no processor mode turns byte 0, a subnormal, into zero.

    scale_rc  uint8 of any shape; 255 becomes NaN
    returns   float32; exact
    """
    index = scale_rc.reshape(-1).to(torch.int32)
    return torch.index_select(_f32_patterns(), 0, index).view(torch.float32).view(scale_rc.shape)


def f32_to_e8m0(scale_rc: Tensor) -> E8m0Scales:
    """float32 -> E8M0, by patterns; the inverse of e8m0_to_f32.

    scale_rc  float32 of any shape
    returns   uint8; bad, and 255, where the number is no power of two within 2**-127..2**127: zero, negative
              numbers, infinity and NaN included
    """
    patterns = scale_rc.contiguous().view(torch.int32)
    byte = patterns >> 23  # negative where the sign bit is set
    is_power = (patterns & 0x7FFFFF == 0) & (byte > 0) & (byte < E8M0_NAN)
    byte = torch.where(is_power, byte, E8M0_NAN)
    byte = torch.where(patterns == _F32_2_M127, 0, byte)
    return E8m0Scales(byte.to(torch.uint8), byte == E8M0_NAN)
