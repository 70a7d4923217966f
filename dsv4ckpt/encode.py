"""bfloat16 -> codes and scales.  Owns the arithmetic; knows no names, files or releases.

Encoding with an E8M0 scale is a table lookup on the bfloat16 pattern: a table (16 MB a format) holds the code
of every (scale byte, pattern) pair, so that rounding (to nearest, ties to even), saturation, subnormals and
the sign of zeros are right by construction, whatever the processor's flush-to-zero mode.  Scales come from
integer arithmetic on patterns.  Every function takes finite values; its caller has refused NaN and infinity.
A value close to 2**128 may round up to a code that decodes to infinity, as it does at DeepSeek: under a fresh
scale from 1.75 * 2**127 on in FP4, from 1.9375 * 2**127 on in FP8.
Source: DeepSeek-V4 kernel.py (fresh scales, rounding of codes), OCP MX v1.0 sec. 5.3-5.4 (E2M1, E8M0),
OCP FP8 (E4M3).
"""

#  R rows, C columns of the logical weight;  r, c = number of blocks along them;  P = packed columns (C / 2)
#  n, m = blocks, h, w = elements of each, of a view [n, h, m, w];  b = blocks chosen from a matrix

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codec import _e4m3_values, _float64, decode_fp4, decode_fp8
from .formats import E8M0_BIAS, E8M0_NAN, FP4_GRID, FP8_AMAX_FLOOR, FP8_MAX, Block, scale_shape

_MANTISSA = 7  # bits of a bfloat16 below its exponent
_ONE = E8M0_BIAS << _MANTISSA  # the pattern of 1.0; bfloat16 and E8M0 have the same bias
_FP4_TOP = 0x40C0  # the pattern of FP4_MAX
_FP8_TOP = 0x43E0  # of FP8_MAX
_FP4_LOWEST = 1  # scale byte of FP4_AMAX_FLOOR: ceil(log2(6 * 2**-126 / 6)) + 127
_FP8_LOWEST = 105  # of FP8_AMAX_FLOOR: ceil(log2(1e-4 / 448)) + 127
_E8M0_MAX = 254
_NEVER = 1 << 20  # beyond every exponent
# A subnormal bfloat16 over a scale of at least 2**-116 is below half of the smallest code: it rounds to zero.
_FLUSH_IS_HARMLESS = 2.0**-116

# values and scales -> what encoding and decoding makes of the values
_Again = Callable[[Tensor, Tensor, Block], Tensor]


# ---- blocks


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """(first block, number of blocks, their size): the whole ones, then the one cut off by the edge."""
    whole, rest = divmod(length, size)
    return [(0, whole, size)] * (whole > 0) + [(whole, 1, rest)] * (rest > 0)


def _tiles(matrix_RC: Tensor, grid_rc: Tensor, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a matrix as blocks [n, h, m, w], and their part [n, m] of the grid; up to 4, for the edges."""
    rows, cols = matrix_RC.shape
    for row, n, h in _spans(rows, block.rows):
        for col, m, w in _spans(cols, block.cols):
            top, left = row * block.rows, col * block.cols
            part = matrix_RC[top : top + n * h, left : left + m * w]
            tiles = torch.unflatten(torch.unflatten(part, 1, (m, w)), 0, (n, h))
            yield tiles, grid_rc[row : row + n, col : col + m]


def _patterns(values_RC: Tensor) -> Tensor:
    return values_RC.view(torch.int16)


def _over_blocks(reduce: Callable[[Tensor, int], Tensor], matrix_RC: Tensor, block: Block) -> Tensor:
    """int32 [r, c]: torch.amax or torch.amin of every block."""
    reduced_rc = torch.empty(scale_shape(tuple(matrix_RC.shape), block), dtype=torch.int32)
    for tiles, reduced in _tiles(matrix_RC, reduced_rc, block):
        rows = tiles[:, 0] if tiles.shape[1] == 1 else reduce(tiles, 1)
        reduced.copy_(reduce(rows.to(torch.int32), -1))  # along the inner axis torch is slow for int16
    return reduced_rc


def _block_amax(values_RC: Tensor, block: Block) -> Tensor:
    """int32 [r, c]: the pattern of the largest magnitude of every block."""
    return _over_blocks(torch.amax, _patterns(values_RC) & 0x7FFF, block)


# ---- tables


@functools.cache
def _extended_patterns() -> Tensor:
    """int32 [32768]: (exponent + 127) << 7 | mantissa of every magnitude, subnormals too.

    The pattern of a normal number is its own; a subnormal has an exponent below -126; zero is -_NEVER.
    """
    pattern = torch.arange(1 << 15, dtype=torch.int32)
    subnormal = torch.arange(1, 1 << _MANTISSA)  # units of 2**-133
    length = torch.frexp(subnormal.to(torch.float64)).exponent  # number of significant bits, 1..7
    mantissa = (subnormal << (_MANTISSA + 1 - length)) & 0x7F
    pattern[1 : 1 << _MANTISSA] = (((length - _MANTISSA) << _MANTISSA) + mantissa).to(torch.int32)
    pattern[0] = -_NEVER
    return pattern


def _extended(patterns_rc: Tensor) -> Tensor:
    return torch.index_select(_extended_patterns(), 0, patterns_rc.view(-1)).view(patterns_rc.shape)


def _nearest(grid: Tensor, values: Tensor) -> Tensor:
    """uint8: the number of the nearest entry of an ascending grid, ties to the even number. Both float64."""
    middles = (grid[1:] + grid[:-1]) / 2  # exact: one more bit
    below = torch.searchsorted(middles, values)
    tie = middles[below.clamp(max=len(middles) - 1)] == values
    return (below + (tie & (below & 1 == 1)).to(torch.int64)).to(torch.uint8)


def _code_table(grid: Tensor, sign: int) -> Tensor:
    """uint8 [255 * 65536]: for (scale byte << 16 | pattern + 32768) the code; patterns are int16.

    grid  float64, ascending: the magnitude of every code
    sign  the bit that makes a code negative
    """
    lowest, highest = (
        -12,
        10,
    )  # exponents; in both formats what is below rounds to zero, what is above saturates
    first = lowest << _MANTISSA
    steps = torch.arange(first, highest << _MANTISSA)
    mantissa = (steps & 0x7F).to(torch.float64) / (1 << _MANTISSA)
    codes = _nearest(grid, torch.ldexp(1 + mantissa, steps >> _MANTISSA))
    table = torch.empty((_E8M0_MAX + 1, 2, 1 << 15), dtype=torch.uint8)
    for byte in range(_E8M0_MAX + 1):
        relative = _extended_patterns() - (byte << _MANTISSA)
        at = (relative - first).clamp(0, len(codes) - 1)
        torch.index_select(codes, 0, at, out=table[byte, 1])
    torch.bitwise_or(table[:, 1], sign, out=table[:, 0])
    return table.view(-1)


@functools.cache
def _fp4_codes() -> Tensor:
    return _code_table(torch.tensor(FP4_GRID, dtype=torch.float64), 8)


@functools.cache
def _fp8_codes() -> Tensor:
    return _code_table(_e4m3_values()[:0x7F], 1 << 7)


@functools.cache
def _grid_tops() -> Tensor:
    """uint8 [32768]: for a magnitude's pattern one more than the largest scale byte that has it on its grid.

    1 x 2**e and 3 x 2**e are on the grid up to the scale 2**(e+1). Zero is on every grid, what has more than
    two significant bits on none: 0.
    """
    extended = _extended_patterns()
    odd = (extended >> (_MANTISSA - 1)) & 1  # the value is 1.5 x 2**exponent
    tops = (extended >> _MANTISSA) - odd + 1
    tops = torch.where(extended & 0x3F == 0, tops.clamp(-1, _E8M0_MAX), -1)
    tops[0] = _E8M0_MAX
    return (tops + 1).to(torch.uint8)


def _look_up(table: Tensor, values_RC: Tensor, scale_rc: Tensor, block: Block, out_RC: Tensor) -> None:
    """Write the code of every value: table is a _code_table, scale_rc uint8."""
    index = _patterns(values_RC).to(torch.int32)
    base_rc = (scale_rc.to(torch.int32) << 16) + (1 << 15)
    for tiles, base in _tiles(index, base_rc, block):
        tiles += base[:, None, :, None]
    torch.index_select(table, 0, index.view(-1), out=out_RC.view(-1))


# ---- scales of new values


def _fresh(amax_rc: Tensor, top: int, lowest: int) -> Tensor:
    """uint8: ceil(log2(amax / max)) as a byte, at least `lowest`. amax and top are patterns.

    The difference of two patterns, in units of the mantissa, rounded up to a whole exponent is that ceiling:
    patterns are piecewise linear in the logarithm and meet it at the powers of two.
    """
    exponent = (amax_rc - top + (1 << _MANTISSA) - 1) >> _MANTISSA
    return (exponent + E8M0_BIAS).clamp(lowest, _E8M0_MAX).to(torch.uint8)


def fp4_fresh_scale(values_RC: Tensor, block: Block) -> Tensor:
    """ceil(log2(amax / 6)) of every block, amax taken for at least 6 * 2**-126: DeepSeek's rule.

    values_RC  bfloat16 [R, C], finite
    returns    uint8 [r, c], E8M0: 1..253
    """
    return _fresh(_block_amax(values_RC, block), _FP4_TOP, _FP4_LOWEST)


def fp8_fresh_scale(values_RC: Tensor, block: Block) -> Tensor:
    """ceil(log2(amax / 448)) of every block, amax taken for at least 1e-4: DeepSeek's rule.

    values_RC  bfloat16 [R, C], finite
    returns    uint8 [r, c], E8M0: 105..247
    """
    return _fresh(_block_amax(values_RC, block), _FP8_TOP, _FP8_LOWEST)


def fp8_fresh_scale_f32(values_RC: Tensor, block: Block) -> Tensor:
    """max(amax, 1e-4) / 448 of every block, one float32 division: the rule of the Base layout.

    values_RC  bfloat16 [R, C], finite
    returns    float32 [r, c]
    """
    return _fresh_f32(_block_amax(values_RC, block))


def _fresh_f32(amax_rc: Tensor) -> Tensor:
    return (amax_rc << 16).view(torch.float32).clamp(min=FP8_AMAX_FLOOR) / FP8_MAX


# ---- scales of values that were quantized before


def fp4_grid_scale(values_RC: Tensor, block: Block) -> Tensor:
    """The largest scale under which every value of the block is on the grid of E2M1.

    That is the scale the values were made with whenever one of them is 0.5 or 1.5 times it.

    values_RC  bfloat16 [R, C], finite
    returns    uint8 [r, c], E8M0: 1 where all values are zero, as DeepSeek's quantizer has it; 255 (NaN)
               where there is no such scale among 2**-127..2**127
    """
    index = (_patterns(values_RC) & 0x7FFF).to(torch.int32)
    amax_rc = _over_blocks(torch.amax, index, block)
    tops_RC = torch.index_select(_grid_tops(), 0, index.view(-1)).view(index.shape)
    del (
        index
    )  # the next line takes as much; both together would be unmapped and faulted in again at every call
    scale_rc = _over_blocks(torch.amin, tops_RC, block) - 1
    # 4 and 6 are the largest of the grid: the scale is at least 2**-2 of the largest value's power of two.
    lowest_rc = ((_extended(amax_rc) >> _MANTISSA) - 2).clamp_(min=0)
    scale_rc.masked_fill_(scale_rc < lowest_rc, E8M0_NAN).masked_fill_(amax_rc == 0, _FP4_LOWEST)
    return scale_rc.to(torch.uint8)


def fp4_grid_scale_of_codes(codes_RP: Tensor, scale_rc: Tensor, block: Block) -> Tensor:
    """fp4_grid_scale of what the codes decode to, without decoding them.

    codes_RP  uint8 [R, C/2], contiguous; the low nibble is the even column
    scale_rc  uint8 [R, c], E8M0, 0..252: the values are finite
    block     1 x n, n even
    returns   uint8 [R, c]; equal to fp4_grid_scale(decode_fp4(codes_RP, scale_rc, block).values, block)
    """
    per_block = block.cols // 2
    rest = -codes_RP.shape[1] % per_block
    codes_RP = pad(codes_RP, (0, rest)) if rest else codes_RP  # zeros are on every grid
    words, ones = _as_words(codes_RP.view(-1, per_block))
    # of code & 7 = abc, 0.5 and 1.5 are 0b1: they pin the scale
    loose = (~_any(words & ~(words >> 2), ones)).nonzero().view(-1)
    scale = scale_rc.flatten().clone()  # a flat view may be the input itself
    top = scale[loose].to(torch.int16) + _slack(words[loose], ones)
    scale[loose] = torch.where(top >= _NO_VALUE, _FP4_LOWEST, top.clamp(max=_E8M0_MAX)).to(torch.uint8)
    return scale.view(scale_rc.shape)


_NO_VALUE = 1 << 9  # slack of a block of zeros: beyond every scale byte


def _as_words(blocks: Tensor) -> tuple[Tensor, int]:
    """uint8 [b, n] as words, as wide as they fit; and the word whose nibbles are all 1."""
    if blocks.shape[1] % 8 == 0 and blocks.storage_offset() % 8 == 0:
        return blocks.view(torch.int64), 0x1111111111111111
    return blocks, 0x11


def _any(bits: Tensor, ones: int) -> Tensor:
    """bool [b]: the lowest bit of some nibble is set."""
    found = bits & ones
    return functools.reduce(torch.bitwise_or, found.unbind(-1)) != 0


def _slack(words: Tensor, ones: int) -> Tensor:
    """int16 [b]: how far above the true scale the largest one lies that has all values of a block on its grid.

    Told by the value with the smallest step: 1 and 3 (codes 0b010, 0b101) leave 1; 2 and 6 (0b100, 0b111) leave 2;
    4 leaves 3.
    """
    a, b, c = words >> 2, words >> 1, words
    one = _any((b & ~a & ~c) | (a & ~b & c), ones)
    two = _any(a & ~(b ^ c), ones)
    some = _any(a | b | c, ones)
    slack = torch.where(one, 1, torch.where(two, 2, torch.where(some, 3, _NO_VALUE)))
    return slack.to(torch.int16)


# ---- untouched values: codes and scales at once


class Peaked(NamedTuple):
    """Codes under the scales that make the largest value of every block 4 or 6, and those scales."""

    codes: Tensor  # uint8 [R, C/2]
    scale: Tensor  # uint8 [R, c], E8M0


_LANE = 0x3FF  # sign, exponent and first mantissa bit of a bfloat16: all that a value on the grid has
_MOST_PEAK = 240  # biased exponent; beyond it, and below 4, the lanes of zeros would look like values


@functools.cache
def _peaked_pairs() -> Tensor:
    """uint8 [2**26], touched at 2**20 places: two codes for (lane of the odd column << 16 | lane of the even one).

    A lane is the value's sign, exponent and first mantissa bit, minus those of the smallest number on the grid (0.5).
    What has no place among the first eight steps is a zero, whose subtraction borrowed from the sign.
    """
    lane = torch.arange(_LANE + 1)
    step, sign = lane & (_LANE >> 1), (lane >> 9) << 3
    code = torch.where(step < 8, step.clamp(min=1) | sign, 8 - sign)
    table = torch.zeros(1 << 26, dtype=torch.uint8)
    table.view(-1, 1 << 16)[:, : _LANE + 1] = (code[:, None] << 4 | code).to(torch.uint8)
    return table


def fp4_peaked(values_RC: Tensor, block: Block) -> Peaked | None:
    """Codes of values that are known to lie on the grid of E2M1, twice as fast as grid inference and encoding.

    values_RC  bfloat16 [R, C], contiguous; on the grid of each block, or all zero
    block      1 x 32
    returns    codes that decode to the very values; None if this fast way cannot be gone: C is no multiple of the
               block, or values are so small or large that their exponents do not fit. Then use fp4_grid_scale
    """
    rows, cols = values_RC.shape
    if block.cols != 32 or cols % block.cols or not values_RC.numel():
        return None
    words = values_RC.view(torch.int32) & 0x7FFF7FFF
    odd = words.view(rows, -1, block.cols // 2).amax(2)
    words <<= 16
    top = torch.maximum(odd, words.view(rows, -1, block.cols // 2).amax(2)) >> 23  # biased exponents
    is_zero = top == 0
    top.masked_fill_(is_zero, E8M0_BIAS)
    if int(top.min()) < 4 or int(top.max()) > _MOST_PEAK:
        return None
    lanes = (values_RC.view(torch.int16) >> 6).view(rows, -1, block.cols)
    lanes -= ((top - 3) << 1).to(torch.int16)[:, :, None]
    lanes &= _LANE
    codes = torch.index_select(_peaked_pairs(), 0, lanes.view(-1).view(torch.int32))
    return Peaked(codes.view(rows, cols // 2), (top - 2).to(torch.uint8))


@functools.cache
def _moved_pairs() -> Tensor:
    """uint8 [4 * 256]: a packed byte whose two values are halved 0 to 3 times; what no longer fits is of no meaning."""
    halved = torch.tensor((0, 0, 1, 0, 2, 3, 4, 5))  # of codes 0..7, where the half is on the grid
    table = torch.empty((4, 256), dtype=torch.int64)
    magnitude = torch.arange(8)
    byte = torch.arange(256)
    for times in range(4):
        code = torch.cat([magnitude, magnitude | 8])
        table[times] = code[byte & 15] | code[byte >> 4] << 4
        magnitude = halved[magnitude]
    return table.view(-1).to(torch.uint8)


def fp4_under(peaked: Peaked, scale_rc: Tensor, block: Block) -> Tensor:
    """The codes of the same values under other scales, 1 to 8 times as large. uint8 [R, C/2]; zeros take any scale

    exact where the values are on the grid of scale_rc
    """
    times = (scale_rc.to(torch.int16) - peaked.scale.to(torch.int16)).clamp(0, 3)
    at = times.nonzero(as_tuple=True)
    if at[0].numel():
        blocks = peaked.codes.view(*scale_rc.shape, block.cols // 2)
        index = blocks[at].to(torch.int32) + (times[at].to(torch.int32) << 8)[:, None]
        blocks[at] = torch.index_select(_moved_pairs(), 0, index.view(-1)).view(index.shape)
    return peaked.codes


# ---- codes


def encode_fp4(values_RC: Tensor, scale_rc: Tensor, block: Block, out: Tensor | None = None) -> Tensor:
    """Divide every block of one row by its scale, round to E2M1 and pack pairs.

    values_RC  bfloat16 [R, C], finite, contiguous; C even
    scale_rc   uint8 [R, c], E8M0, 0..254
    block      1 x n
    out        where to put the codes, uint8 [R, C/2], contiguous; None: a new tensor
    returns    uint8 [R, C/2]; the low nibble is the even column. The exact quotient rounded once to nearest,
               ties to even, at most 6; a zero, and what rounds to it, keeps its sign
    """
    codes = torch.empty(values_RC.shape, dtype=torch.uint8)
    _look_up(_fp4_codes(), values_RC, scale_rc, block, codes)
    pairs = codes.view(torch.int16)  # the even column is the low byte
    packed = torch.empty(pairs.shape, dtype=torch.uint8) if out is None else out
    return packed.copy_(pairs | pairs >> 4)  # to uint8: the low byte


def encode_fp8(values_RC: Tensor, scale_rc: Tensor, block: Block, out: Tensor | None = None) -> Tensor:
    """Divide every tile by its scale and round to E4M3.

    values_RC  bfloat16 [R, C], finite, contiguous
    scale_rc   uint8 [r, c] E8M0, 0..254, or float32 [r, c], finite and not zero
    out        where to put the codes, uint8 [R, C], contiguous; None: a new tensor
    returns    uint8 [R, C], E4M3FN; at most 448, zeros keep the quotient's sign. E8M0: the exact quotient
               rounded once to nearest, ties to even. float32: the float32 quotient rounded again, as
               DeepSeek's quantizer does. Gives decode_fp8's codes back for every float32 scale with
               31 * 2**-129 <= |scale| < 73 * 2**113: smaller ones merge codes, larger ones make 448 infinite;
               and for E8M0 bytes 3..246
    """
    codes = torch.empty(values_RC.shape, dtype=torch.uint8) if out is None else out
    if scale_rc.dtype != torch.float32:
        _look_up(_fp8_codes(), values_RC, scale_rc, block, codes)
        return codes
    quotients = _quotients(values_RC, scale_rc, block).clamp_(-FP8_MAX, FP8_MAX)
    codes.view(torch.float8_e4m3fn).copy_(quotients)
    return codes


def _quotients(values_RC: Tensor, scale_rc: Tensor, block: Block) -> Tensor:
    """float32 [R, C]: values over float32 scales, to nearest; what is below 2**-10 may be a zero."""
    if not scale_rc.numel() or scale_rc.abs().min() >= _FLUSH_IS_HARMLESS:
        quotients = values_RC.to(torch.float32)
    else:  # float64 holds over 2 * 24 + 2 bits, so rounding its quotient to float32 is no second rounding
        quotients = _float64(_patterns(values_RC).to(torch.int32) << 16)
        scale_rc = _float64(scale_rc.view(torch.int32))
    for tiles, scale in _tiles(quotients, scale_rc, block):
        tiles /= scale[:, None, :, None]
    return quotients.to(torch.float32)


# ---- scales kept from the source


def kept_scale_fp4(values_RC: Tensor, source_scale_rc: Tensor, block: Block) -> Tensor:
    """The source's scale where the block still fits it, else the best of it, half, double and a fresh one.

    A block fits while amax / scale is in (1.5, 6], or if it is all zero. Best: least squared error; among
    equals the least change, then the smaller scale.

    values_RC        bfloat16 [R, C], finite, contiguous
    source_scale_rc  uint8 [R, c], E8M0, 0..254
    returns          uint8 [R, c]; values that the source's scale decodes to keep it
    """
    amax_rc = _block_amax(values_RC, block)
    fits_rc = _fits(amax_rc, source_scale_rc, _FP4_TOP)
    fresh_rc = _fresh(amax_rc, _FP4_TOP, _FP4_LOWEST)
    return _kept(values_RC, source_scale_rc, fresh_rc, fits_rc, block, _fp4_again)


def kept_scale_fp8(values_RC: Tensor, source_scale_rc: Tensor, block: Block) -> Tensor:
    """The same for tiles of E4M3: a tile fits while amax / scale is in (112, 448].

    values_RC        bfloat16 [R, C], finite, contiguous
    source_scale_rc  uint8 [r, c] E8M0, 0..254, or float32 [r, c] in the range that encode_fp8 names
    returns          the source's dtype [r, c]; values that the source's scale decodes to keep it
    """
    amax_rc = _block_amax(values_RC, block)
    if source_scale_rc.dtype == torch.float32:
        ratio_rc = _float64(amax_rc << 16) / _float64(source_scale_rc.view(torch.int32)).abs()
        fits_rc = (ratio_rc > FP8_MAX / 4) & (ratio_rc <= FP8_MAX) | (amax_rc == 0)
        fresh_rc = _fresh_f32(amax_rc)
    else:
        fits_rc = _fits(amax_rc, source_scale_rc, _FP8_TOP)
        fresh_rc = _fresh(amax_rc, _FP8_TOP, _FP8_LOWEST)
    return _kept(values_RC, source_scale_rc, fresh_rc, fits_rc, block, _fp8_again)


def _fits(amax_rc: Tensor, scale_rc: Tensor, top: int) -> Tensor:
    """bool [r, c]: amax / scale is in (max / 4, max], or amax is 0. amax and top are patterns."""
    below = top - _ONE - _extended(amax_rc) + (scale_rc.to(torch.int32) << _MANTISSA)
    return (below >= 0) & (below < 2 << _MANTISSA) | (amax_rc == 0)


def _kept(
    values_RC: Tensor, source_rc: Tensor, fresh_rc: Tensor, fits_rc: Tensor, block: Block, again: _Again
) -> Tensor:
    """The source's scales, and the best candidate where they do not fit."""
    kept_rc = source_rc.clone()
    source, fresh = source_rc[~fits_rc], fresh_rc[~fits_rc]  # [b]
    if source.numel():
        kept_rc[~fits_rc] = _best(_chosen(values_RC, ~fits_rc, block), _candidates(source, fresh), again)
    return kept_rc


def _chosen(values_RC: Tensor, where_rc: Tensor, block: Block) -> Tensor:
    """bfloat16 [b, h, w]: some blocks of a matrix, zeros where the edge cuts one off."""
    (rows, cols), (r, c) = values_RC.shape, where_rc.shape
    whole = pad(values_RC, (0, c * block.cols - cols, 0, r * block.rows - rows))
    return whole.view(r, block.rows, c, block.cols).transpose(1, 2)[where_rc]


def _candidates(source: Tensor, fresh: Tensor) -> Tensor:
    """[4, b]: the scale, its half, its double, a fresh one; no half or double beyond the normal numbers."""
    if source.dtype == torch.uint8:
        half, double = source - (source > 0).to(torch.uint8), source + (source < _E8M0_MAX).to(torch.uint8)
        return torch.stack([source, half, double, fresh])
    bits = source.view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    half = bits - (exponent > 1).to(torch.int32).mul_(1 << 23)
    double = bits + ((exponent > 0) & (exponent < 254)).to(torch.int32).mul_(1 << 23)
    return torch.stack([source, half.view(torch.float32), double.view(torch.float32), fresh])


def _best(blocks: Tensor, candidates: Tensor, again: _Again) -> Tensor:
    """[b]: the candidate of least squared error; among equals the nearest to the first, then the first.

    blocks      bfloat16 [b, h, w]
    candidates  [4, b], uint8 or float32
    """
    errors = torch.stack([_squared_errors(blocks, scale, again) for scale in candidates])
    if candidates.dtype == torch.uint8:
        octaves = candidates.to(torch.float64)
    else:
        octaves = _float64(candidates.view(torch.int32)).abs().log2()
    change = (octaves - octaves[0]).abs()
    change[errors != errors.amin(0)] = torch.inf
    return candidates.gather(0, change.argmin(0, keepdim=True))[0]  # argmin: the first of equals


def _squared_errors(blocks: Tensor, scale: Tensor, again: _Again) -> Tensor:
    """float64 [b]: summed squares of what encoding and decoding changes."""
    _, height, width = blocks.shape
    decoded = again(blocks.flatten(0, 1), scale[:, None], Block(height, width)).view(blocks.shape)
    # through patterns: a cast of subnormals may flush them to zero
    wide, again_wide = (_float64(_patterns(side).to(torch.int32) << 16) for side in (blocks, decoded))
    return (again_wide - wide).square_().sum((1, 2))


def _fp4_again(values_RC: Tensor, scale_rc: Tensor, block: Block) -> Tensor:
    return decode_fp4(encode_fp4(values_RC, scale_rc, block), scale_rc, block).values


def _fp8_again(values_RC: Tensor, scale_rc: Tensor, block: Block) -> Tensor:
    return decode_fp8(encode_fp8(values_RC, scale_rc, block), scale_rc, block).values
