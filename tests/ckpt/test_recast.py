"""dsv4ckpt.recast and codec.decode_nvfp4 against the formats' definitions.

The oracle below is Fractions and numpy float64, in which every product here is exact (E2M1 has 2 significant
bits, E4M3 4, scales are powers of two between 2**-149 and 2**127), and none of the product's tables.  torch's own
float8 casts are a second witness.
"""

from __future__ import annotations

import functools
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ckpt import codec, recast
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE, FP8_TILE_32, Block

pytestmark = pytest.mark.slow  # exhaustive arithmetic, in many small pieces

FP4 = Block(1, 32)
NV = Block(1, 16)
TILES = [FP8_TILE.block, FP8_TILE_32.block]
NAN, INF = 0x7FC0, 0x7F80  # bfloat16 patterns

# ---- the oracle


def e4m3(code: int) -> Fraction:
    """Magnitude of a code below 0x7F: 4 exponent bits with bias 7, 3 mantissa bits."""
    exponent, mantissa = code >> 3, Fraction(code & 7, 8)
    return mantissa / 64 if exponent == 0 else (1 + mantissa) * Fraction(2) ** (exponent - 7)


def nearest_e4m3(magnitude: Fraction) -> int:
    """The nearest of the 127 codes; of two as near, the even one."""
    return min(range(0x7F), key=lambda code: (abs(e4m3(code) - magnitude), code & 1))


FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8_VALUES = np.array([float(e4m3(code)) if code < 0x7F else math.nan for code in range(128)])
FP8_VALUES = np.concatenate([FP8_VALUES, -FP8_VALUES])


def fp4_numbers(codes: Tensor, scales: Tensor, block: Block = FP4) -> np.ndarray:
    """float64 [R, C]."""
    column = np.arange(2 * codes.shape[1])
    nibble = codes.numpy()[:, column // 2] >> (4 * (column % 2)) & 15
    return FP4_VALUES[nibble] * np.ldexp(1.0, scales.numpy()[:, column // block.cols].astype(int) - 127)


def fp8_numbers(codes: Tensor, scales: Tensor, tile: Block) -> np.ndarray:
    """float64 [R, C]."""
    rows, cols = codes.shape
    of_each = scales.numpy()[np.arange(rows)[:, None] // tile.rows, np.arange(cols) // tile.cols]
    return FP8_VALUES[codes.numpy()] * np.ldexp(1.0, of_each.astype(int) - 127)


def bf16(value: Fraction, sign: int) -> int:
    """The nearest bfloat16 pattern, ties to even; round() of a Fraction is exact and goes to even."""
    if value == 0:
        return sign << 15
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent = max(exponent - (value < Fraction(2) ** exponent), -126)
    return sign << 15 | min(((exponent + 126) << 7) + round(value / Fraction(2) ** (exponent - 7)), INF)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal numbers with equal signs, those of zeros included."""
    return np.array_equal(left.view(np.int64), right.view(np.int64))


# ---- helpers


def u8(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def every_code(rows: int) -> Tensor:
    """uint8 [rows, 16]: every code in both nibbles, in one block of 32."""
    return torch.arange(16, dtype=torch.uint8).mul(0x11).repeat(rows, 1)


def random_fp4(rows: int, cols: int, low: int, high: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and scales; scale bytes in low..high - 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
    shape = (rows, -(-cols // 32))
    return codes, torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def to_fp8(codes: Tensor, scales: Tensor, tile: Block) -> tuple[recast.Tiles, recast.Recast]:
    tiles = recast.fp8_tiles(scales, FP4, tile, codes)
    return tiles, recast.fp4_to_fp8(codes, scales, FP4, tiles.scale_rc, tile)


def under_gaps(gaps: range) -> recast.Recast:
    """Every code, one row for each gap below a tile scale of 2**(120 - 127)."""
    scales = u8([120 + 6 - gap for gap in gaps])[:, None]
    return recast.fp4_to_fp8(every_code(len(gaps)), scales, FP4, u8([[120]]), Block(32, 32))


# ---- FP4 -> FP8: codes


@pytest.mark.parametrize("gap", range(-12, 25))
def test_fp4_to_fp8_every_code_is_the_nearest_e4m3_ties_to_even(gap: int) -> None:
    expected = [
        nearest_e4m3(Fraction(abs(value)) * Fraction(2) ** (6 - gap)) | (code & 8) << 4
        for code, value in enumerate(FP4_VALUES)
    ]
    assert under_gaps(range(gap, gap + 1)).codes[0, ::2].tolist() == expected
    assert under_gaps(range(gap, gap + 1)).codes[0, 1::2].tolist() == expected


def test_fp4_to_fp8_every_code_equals_torch_casts() -> None:
    gaps = torch.arange(25)
    exact = torch.from_numpy(FP4_VALUES) * torch.pow(2.0, (6 - gaps).to(torch.float64))[:, None]
    witness = exact.to(torch.float32).to(torch.float8_e4m3fn)  # 2 significant bits: exact in float32
    assert torch.equal(under_gaps(range(25)).codes[:, ::2], witness.view(torch.uint8))


LOST = {
    14: set(),
    15: {0.5, 1.5},
    16: {0.5, 1, 1.5, 3},
    17: {0.5, 1, 1.5, 2, 3, 6},
    18: {0.5, 1, 1.5, 2, 3, 4, 6},
}


@pytest.mark.parametrize("gap", LOST)
def test_fp4_to_fp8_beyond_gap_14_loses_exactly_these_magnitudes(gap: int) -> None:
    made = under_gaps(range(gap, gap + 1))
    held = FP8_VALUES[made.codes[0, ::2].numpy()] * 2.0 ** (gap - 6)
    assert set(np.abs(FP4_VALUES[held != FP4_VALUES])) == LOST[gap]
    assert made.num_changed == 4 * len(LOST[gap])  # two signs, two nibbles


@pytest.mark.parametrize("gap", range(recast.FP8_LOSSLESS_GAP + 1))
def test_fp4_to_fp8_up_to_the_lossless_gap_changes_nothing(gap: int) -> None:
    assert under_gaps(range(gap, gap + 1)).num_changed == 0
    assert under_gaps(range(recast.FP8_LOSSLESS_GAP + 1, 25)).num_changed > 0


@pytest.mark.parametrize("top", range(6, 255))
def test_fp4_to_fp8_is_exact_for_every_largest_byte_and_every_gap_to_14(top: int) -> None:
    scales = u8(range(max(0, top - 14), top + 1))[:, None]
    codes = every_code(scales.shape[0])
    tiles, made = to_fp8(codes, scales, Block(32, 32))
    assert (int(tiles.scale_rc), int(tiles.gap_rc), bool(tiles.low_rc)) == (top - 6, min(14, top), False)
    assert same(fp8_numbers(made.codes, tiles.scale_rc, Block(32, 32)), fp4_numbers(codes, scales))
    assert made.num_changed == 0


@pytest.mark.parametrize("top", range(6))
def test_fp4_to_fp8_of_a_low_tile_is_exact_under_byte_0(top: int) -> None:
    scales = u8(range(top + 1))[:, None]
    codes = every_code(top + 1)
    tiles, made = to_fp8(codes, scales, Block(32, 32))
    assert (int(tiles.scale_rc), bool(tiles.low_rc), made.num_changed) == (0, True, 0)
    assert same(fp8_numbers(made.codes, tiles.scale_rc, Block(32, 32)), fp4_numbers(codes, scales))


def test_fp4_to_fp8_negative_zero_is_kept_under_every_gap() -> None:
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    codes = torch.full((255, 16), 0x80, dtype=torch.uint8)  # low nibble 0, high nibble -0
    made = recast.fp4_to_fp8(codes, scales, FP4, u8([[100]]), Block(255, 32))
    assert made.codes.view(255, 16, 2).unique(dim=1).tolist() == [[[0x00, 0x80]]] * 255
    assert made.num_changed == 0


def test_fp4_to_fp8_low_nibble_is_the_even_column() -> None:
    made = recast.fp4_to_fp8(u8([[0x72]]), u8([[106]]), FP4, u8([[100]]), Block(1, 32))
    assert FP8_VALUES[made.codes.numpy()].tolist() == [[64.0, 384.0]]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 30), (32, 32), (130, 96), (128, 130), (200, 300), (257, 128)])
def test_fp4_to_fp8_geometry_and_cut_off_edges(shape: tuple[int, int], tile: Block) -> None:
    codes, scales = random_fp4(*shape, 110, 125, seed=1)
    tiles, made = to_fp8(codes, scales, tile)
    assert tiles.scale_rc.shape == (-(-shape[0] // tile.rows), -(-shape[1] // tile.cols))
    assert same(fp8_numbers(made.codes, tiles.scale_rc, tile), fp4_numbers(codes, scales))
    assert made.num_changed == 0


@pytest.mark.parametrize("cols", [30, 64, 130, 256])
def test_fp4_to_fp8_counts_changed_values_in_whole_and_cut_off_blocks(cols: int) -> None:
    codes, scales = random_fp4(140, cols, 100, 125, seed=2)
    tiles, made = to_fp8(codes, scales, FP8_TILE.block)
    held = fp8_numbers(made.codes, tiles.scale_rc, FP8_TILE.block)
    assert made.num_changed == int((held != fp4_numbers(codes, scales)).sum()) > 0


def test_fp4_to_fp8_under_too_small_a_tile_scale_saturates_and_counts() -> None:
    made = recast.fp4_to_fp8(every_code(1), u8([[200]]), FP4, u8([[100]]), Block(1, 32))
    assert made.codes[0, ::2].tolist() == [0x00, *[0x7E] * 7, 0x80, *[0xFE] * 7]
    assert made.num_changed == 28


def pieces(rows: int, size: int, tile: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `size` that lie within a row of tiles, or begin at its start."""
    row = 0
    while row < rows:
        most = size - size % tile if size >= tile else min(size, tile - row % tile)
        yield row, min(row + most, rows)
        row = min(row + most, rows)


@pytest.mark.parametrize("size", [1, 7, 32, 40, 96, 128, 256])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_fp4_to_fp8_in_chunks_equals_the_whole(tile: Block, size: int) -> None:
    codes, scales = random_fp4(300, 200, 100, 125, seed=3)
    tiles, whole = to_fp8(codes, scales, tile)
    parts = [
        recast.fp4_to_fp8(
            codes[begin:end],
            scales[begin:end],
            FP4,
            tiles.scale_rc[begin // tile.rows : -(-end // tile.rows)],
            tile,
        )
        for begin, end in pieces(300, size, tile.rows)
    ]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert sum(part.num_changed for part in parts) == whole.num_changed


def test_fp4_to_fp8_into_out_writes_there_and_nowhere_else() -> None:
    memory = bytearray(b"\xa5" * (2 + 6 * 64 + 2))
    out = torch.frombuffer(memory, dtype=torch.uint8)[2:-2].view(6, 64)
    codes, scales = random_fp4(6, 64, 100, 125, seed=4)
    made = recast.fp4_to_fp8(codes, scales, FP4, u8([[118]]), Block(32, 64), out)
    assert made.codes.data_ptr() == out.data_ptr()
    assert torch.equal(out, recast.fp4_to_fp8(codes, scales, FP4, u8([[118]]), Block(32, 64)).codes)
    assert memory[:2] == memory[-2:] == b"\xa5" * 2


def test_recasts_leave_their_inputs_alone() -> None:
    codes, scales = random_fp4(40, 64, 100, 125, seed=5)
    before = codes.clone(), scales.clone()
    to_fp8(codes, scales, FP8_TILE_32.block)
    recast.nvfp4_scales(scales, recast.nvfp4_exponent([scales], [codes]))
    recast.e8m0_to_f32(scales)
    codec.decode_nvfp4(codes, scales.repeat_interleave(2, 1), 1.0, NV)
    assert torch.equal(codes, before[0]) and torch.equal(scales, before[1])


# ---- FP4 -> FP8: tiles


def test_fp8_tiles_zero_blocks_count_neither_for_the_scale_nor_for_the_gap() -> None:
    scales = u8([[1, 120, 110, 200]])
    codes = torch.full((1, 64), 0x11, dtype=torch.uint8)
    codes[0, :16], codes[0, 48:] = 0x80, 0x08
    tiles = recast.fp8_tiles(scales, FP4, FP8_TILE.block, codes)
    assert (int(tiles.scale_rc), int(tiles.gap_rc), bool(tiles.low_rc)) == (114, 10, False)
    made = recast.fp4_to_fp8(codes, scales, FP4, tiles.scale_rc, FP8_TILE.block)
    assert made.num_changed == 0
    assert same(fp8_numbers(made.codes, tiles.scale_rc, FP8_TILE.block), fp4_numbers(codes, scales))


def test_fp8_tiles_without_codes_count_every_block() -> None:
    tiles = recast.fp8_tiles(u8([[1, 120, 110, 200]]), FP4, FP8_TILE.block)
    assert (int(tiles.scale_rc), int(tiles.gap_rc), bool(tiles.low_rc)) == (194, 199, False)


@pytest.mark.parametrize(("top", "scale"), [(0, 0), (1, 0), (5, 0), (6, 0), (7, 1), (105, 99), (254, 248)])
def test_fp8_tiles_where_nothing_counts_the_zero_blocks_give_the_scale(top: int, scale: int) -> None:
    codes = u8([[0x00, 0x08, 0x80, 0x88] * 16])
    tiles = recast.fp8_tiles(u8([[0, top, 0, 0]]), FP4, FP8_TILE.block, codes)
    assert (int(tiles.scale_rc), int(tiles.gap_rc), bool(tiles.low_rc)) == (scale, 0, False)


@pytest.mark.parametrize("top", range(12))
def test_fp8_tiles_low_are_those_whose_largest_byte_is_below_6(top: int) -> None:
    for codes in (None, torch.full((1, 16), 0x11, dtype=torch.uint8)):
        tiles = recast.fp8_tiles(u8([[top]]), FP4, FP8_TILE.block, codes)
        assert (bool(tiles.low_rc), int(tiles.scale_rc)) == (top < 6, max(0, top - 6))


def test_fp8_tiles_dtypes() -> None:
    tiles = recast.fp8_tiles(u8([[120]]), FP4, FP8_TILE.block)
    assert [part.dtype for part in tiles] == [torch.uint8, torch.int16, torch.bool]


def fresh_exponent(amax: Fraction) -> int:
    """DeepSeek's rule for a fresh FP8 tile: ceil(log2(amax / 448)), in whole numbers."""
    exponent = -200
    while Fraction(448) * Fraction(2) ** exponent < amax:
        exponent += 1
    return exponent


@pytest.mark.parametrize(("magnitude", "below"), [(6, 0), (4, 0), (3, 1), (2, 1), (1.5, 2), (1, 2), (0.5, 3)])
def test_fp8_tiles_scale_is_the_fresh_rules_where_the_top_block_reaches_4(
    magnitude: float, below: int
) -> None:
    for top in (10, 120, 250):
        code = FP4_VALUES.tolist().index(magnitude)
        codes = torch.full((1, 16), code * 0x11, dtype=torch.uint8)
        tiles = recast.fp8_tiles(u8([[top]]), FP4, FP8_TILE.block, codes)
        amax = Fraction(magnitude) * Fraction(2) ** (top - 127)
        assert int(tiles.scale_rc) - 127 - fresh_exponent(amax) == below


def test_has_values_is_false_only_for_zeros_of_either_sign() -> None:
    for byte in range(256):
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, 20] = byte
        nonzero = bool(byte & 0x77)
        assert recast.has_values(codes, FP4).tolist() == [[False, nonzero]]
        assert recast.has_values(codes, Block(1, 4)).tolist() == [
            [number == 10 and nonzero for number in range(16)]
        ]


def test_has_values_of_a_block_cut_off_by_the_edge() -> None:
    codes = torch.zeros(2, 19, dtype=torch.uint8)
    codes[1, 18] = 0x10
    assert recast.has_values(codes, FP4).tolist() == [[False, False], [False, True]]


# ---- adversarial blocks

BYTES = st.sampled_from(
    [0, 1, 5, 6, 7, 13, 14, 15, 20, 21, 105, 112, 113, 119, 120, 126, 127, 128, 239, 240, 253, 254]
)
CODES = st.sampled_from([0x00, 0x08, 0x80, 0x88, 0x01, 0x30, 0x77, 0xFF, 0x19, 0x52, 0x66, 0xAB])


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Few blocks under far-apart scales; many of them zeros only; some cut off."""
    rows, packed = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    blocks = -(-packed // 16)
    zeros = draw(st.lists(st.booleans(), min_size=rows * blocks, max_size=rows * blocks))
    codes = torch.zeros(rows, 16 * blocks, dtype=torch.uint8)
    for number, zero in enumerate(zeros):
        motif = [0x80, 0x08] if zero else draw(st.lists(CODES, min_size=1, max_size=4))
        row, block = divmod(number, blocks)
        codes[row, 16 * block : 16 * block + 16] = u8((motif * 16)[:16])
    scales = draw(st.lists(BYTES, min_size=rows * blocks, max_size=rows * blocks))
    return codes[:, :packed].contiguous(), u8(scales).view(rows, blocks)


def expected_tile(codes: np.ndarray, scales: np.ndarray) -> tuple[int, int, bool]:
    """Scale, gap and low of one tile, from the values and bytes of its blocks."""
    bytes_ = [
        int(scales[row, block])
        for row in range(scales.shape[0])
        for block in range(scales.shape[1])
        if (codes[row, 16 * block : 16 * block + 16] & 0x77).any()
    ]
    if not bytes_:
        return max(0, int(scales.max()) - 6), 0, False
    return max(0, max(bytes_) - 6), max(bytes_) - min(bytes_), max(bytes_) < 6


@settings(max_examples=300, deadline=None)
@given(matrices(), st.sampled_from([Block(1, 32), Block(2, 64), Block(4, 32), Block(8, 128)]))
def test_fp4_to_fp8_of_adversarial_blocks(matrix: tuple[Tensor, Tensor], tile: Block) -> None:
    codes, scales = matrix
    tiles, made = to_fp8(codes, scales, tile)
    wide = tile.cols // 32
    for row in range(tiles.scale_rc.shape[0]):
        for col in range(tiles.scale_rc.shape[1]):
            of_rows = slice(row * tile.rows, (row + 1) * tile.rows)
            expected = expected_tile(
                codes.numpy()[of_rows, 16 * wide * col : 16 * wide * (col + 1)],
                scales.numpy()[of_rows, wide * col : wide * (col + 1)],
            )
            found = tiles.scale_rc[row, col], tiles.gap_rc[row, col], tiles.low_rc[row, col]
            assert (int(found[0]), int(found[1]), bool(found[2])) == expected
    before, after = fp4_numbers(codes, scales), fp8_numbers(made.codes, tiles.scale_rc, tile)
    assert made.num_changed == int((before != after).sum())
    assert np.array_equal(np.signbit(before), np.signbit(after))
    if int(tiles.gap_rc.max()) <= recast.FP8_LOSSLESS_GAP:
        assert made.num_changed == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(matrices(), min_size=1, max_size=3))
def test_nvfp4_of_adversarial_blocks_loses_only_what_it_names(pair: list[tuple[Tensor, Tensor]]) -> None:
    kmax = recast.nvfp4_exponent((scales for _, scales in pair), (codes for codes, _ in pair))
    scale_2 = recast.nvfp4_scale_2(kmax)
    counting = [scales[recast.has_values(codes, FP4)] for codes, scales in pair]
    tops = [int(each.max()) for each in counting if each.numel()]
    assert kmax == (max(tops) - 127 if tops else 0)
    for codes, scales in pair:
        made = recast.nvfp4_scales(scales, kmax)
        factor = FP8_VALUES[made.scale.numpy()].repeat(16, 1)[:, : 2 * codes.shape[1]] * scale_2
        after = fp4_numbers(codes, torch.full_like(scales, 127)) * factor
        changed = (after != fp4_numbers(codes, scales)).any(1)
        lost = (made.lost_rc & recast.has_values(codes, FP4)).any(1).numpy()
        assert np.array_equal(changed, lost)


# ---- FP4 -> NVFP4


@pytest.mark.parametrize("gap", range(recast.NVFP4_LOSSLESS_GAP + 1))
def test_nvfp4_scales_are_powers_of_two_from_2_8_to_the_smallest_subnormal(gap: int) -> None:
    made = recast.nvfp4_scales(u8([[120 - gap]]), 120 - 127)
    assert FP8_VALUES[made.scale.numpy()].tolist() == [[2.0 ** (8 - gap)] * 2]
    assert made.scale.view(torch.float8_e4m3fn).float().tolist() == [[2.0 ** (8 - gap)] * 2]
    assert not bool(made.lost_rc)


@pytest.mark.parametrize(("gap", "code"), [(18, 0), (40, 0), (120, 0), (-1, 0x7E), (-134, 0x7E)])
def test_nvfp4_scales_beyond_gap_17_or_above_kmax_are_lost(gap: int, code: int) -> None:
    made = recast.nvfp4_scales(u8([[120 - gap]]), 120 - 127)
    assert made.scale.tolist() == [[code, code]]
    assert bool(made.lost_rc)


def test_nvfp4_subnormal_scales_are_those_from_gap_15() -> None:
    made = recast.nvfp4_scales(u8([[106, 105, 104, 103, 102]]), 120 - 127)
    assert made.scale[0, ::2].tolist() == [0x08, 0x04, 0x02, 0x01, 0x00]
    assert made.lost_rc.tolist() == [[False, False, False, False, True]]


@pytest.mark.parametrize("top", range(255))
def test_nvfp4_is_exact_and_reversible_for_every_largest_byte_and_every_gap_to_17(top: int) -> None:
    scales = u8(range(max(0, top - 17), top + 1))[:, None]
    kmax = recast.nvfp4_exponent([scales])
    made = recast.nvfp4_scales(scales, kmax)
    scale_2 = recast.nvfp4_scale_2(kmax)
    assert struct.unpack("<f", struct.pack("<f", scale_2))[0] == scale_2 == 2.0 ** (top - 127 - 8)
    # the way back: the product of both scales is the E8M0 scale
    product = FP8_VALUES[made.scale.numpy()] * scale_2
    assert np.array_equal(np.log2(product) + 127, np.repeat(scales.numpy(), 2, 1))
    assert not bool(made.lost_rc.any())


def test_nvfp4_decodes_to_the_same_bits_with_the_nibbles_untouched() -> None:
    codes, scales = random_fp4(64, 256, 108, 126, seed=6)
    kmax = recast.nvfp4_exponent([scales], [codes])
    made = recast.nvfp4_scales(scales, kmax)
    decoded = codec.decode_nvfp4(codes, made.scale, recast.nvfp4_scale_2(kmax), NV)
    assert torch.equal(
        decoded.values.view(torch.int16), codec.decode_fp4(codes, scales, FP4).values.view(torch.int16)
    )
    assert decoded[1:] == (0, 0)


def test_nvfp4_exponent_is_that_of_the_largest_scale_of_both_matrices() -> None:
    assert recast.nvfp4_exponent(iter([u8([[100, 101]]), u8([[130, 90]])])) == 3


def test_nvfp4_exponent_with_codes_leaves_out_zero_blocks() -> None:
    codes = torch.full((1, 32), 0x88, dtype=torch.uint8)
    codes[0, 0] = 0x98
    assert recast.nvfp4_exponent([u8([[100, 200]])], [codes]) == 100 - 127


def test_nvfp4_exponent_with_codes_of_a_cut_off_block() -> None:
    codes = torch.zeros(1, 20, dtype=torch.uint8)
    codes[0, 19] = 0x10
    assert recast.nvfp4_exponent([u8([[200, 90]])], [codes]) == 90 - 127


def test_nvfp4_exponent_where_nothing_counts_is_0() -> None:
    assert recast.nvfp4_exponent([u8([[200]])], [torch.full((1, 16), 0x80, dtype=torch.uint8)]) == 0
    assert recast.nvfp4_exponent([]) == 0
    assert recast.nvfp4_exponent([torch.empty(0, dtype=torch.uint8)]) == 0


def test_nvfp4_exponent_of_unequal_numbers_of_scales_and_codes_is_an_error() -> None:
    with pytest.raises(ValueError):
        recast.nvfp4_exponent([u8([[200]])], [])


@pytest.mark.parametrize("kmax", [-127, -119, -1, 0, 127])
def test_nvfp4_scale_2_is_a_float32(kmax: int) -> None:
    assert Fraction(recast.nvfp4_scale_2(kmax)) == Fraction(2) ** (kmax - 8)
    assert struct.unpack("<f", struct.pack("<f", recast.nvfp4_scale_2(kmax)))[0] == recast.nvfp4_scale_2(kmax)


# ---- E8M0 <-> F32


def test_e8m0_to_f32_every_byte_is_its_power_of_two() -> None:
    found = recast.e8m0_to_f32(torch.arange(256, dtype=torch.uint8))
    assert found.dtype == torch.float32
    for byte, value in enumerate(found.tolist()[:255]):
        assert Fraction(value) == Fraction(2) ** (byte - 127)
    assert math.isnan(found[255])


def test_e8m0_to_f32_equals_torch_casts() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(recast.e8m0_to_f32(every), every.view(torch.float8_e8m0fnu).float())


def test_f32_to_e8m0_is_the_inverse_for_every_byte() -> None:
    every = torch.arange(255, dtype=torch.uint8).view(5, 51)
    made = recast.f32_to_e8m0(recast.e8m0_to_f32(every))
    assert torch.equal(made.scale_rc, every)
    assert not bool(made.bad.any())


@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_f32_to_e8m0_every_exponent_with_a_mantissa_bit_or_a_sign_is_bad(sign: int) -> None:
    for exponent in range(256):
        for mantissa in (0, 1, 0x400000, 0x200000, 0x7FFFFF):
            pattern = sign | exponent << 23 | mantissa
            value = torch.from_numpy(np.array([pattern], dtype=np.uint32).view(np.float32))
            number = value.to(torch.float64).item()
            good = number in {2.0**power for power in range(-127, 128)}
            made = recast.f32_to_e8m0(value)
            assert bool(made.bad) is not good
            assert int(made.scale_rc) == (int(math.log2(number)) + 127 if good else 255)


def test_f32_to_e8m0_names_zeros_infinities_nan_and_what_lies_outside() -> None:
    numbers = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        -1.0,
        3.0,
        2.0**-128,
        2.0**-149,
        1.0,
        2.0**-127,
        2.0**127,
    ]
    made = recast.f32_to_e8m0(torch.tensor([numbers]))
    assert made.bad.tolist() == [[True] * 9 + [False] * 3]
    assert made.scale_rc.tolist() == [[255] * 9 + [127, 0, 254]]


# ---- NVFP4 -> bfloat16

SCALE_2S = {
    "one": 1.0,
    "power of two": 2.0**-15,
    "ModelOpt's": struct.unpack("<f", struct.pack("<f", 0.000123))[0],
    "24 bits": 1.0 + 2.0**-23,
    "negative": -0.75,
    "largest": float(np.finfo(np.float32).max),
    "overflows": 2.0**119,
    "smallest normal": 2.0**-126,
    "kmax of byte 0": 2.0**-135,
    "smallest subnormal": 2.0**-149,
    "subnormal": 12345 * 2.0**-149,
    "zero": 0.0,
    "negative zero": -0.0,
}


@functools.cache
def nvfp4_oracle(scale_2: str) -> tuple[np.ndarray, np.ndarray]:
    """Patterns, and where bfloat16 does not hold the product; [256 scale bytes, 16 codes]."""
    factor, negative = Fraction(abs(SCALE_2S[scale_2])), math.copysign(1, SCALE_2S[scale_2]) < 0
    patterns, inexact = np.full((256, 16), NAN), np.zeros((256, 16), dtype=bool)
    for byte in range(256):
        if byte & 0x7F == 0x7F:
            continue
        for code, value in enumerate(FP4_VALUES):
            exact = e4m3(byte & 0x7F) * Fraction(abs(value)) * factor
            pattern = bf16(exact, byte >> 7 ^ code >> 3 ^ negative)
            held = math.ldexp(
                pattern & 0x7F | (0x80 if pattern & 0x7F80 else 0), max(pattern >> 7 & 255, 1) - 134
            )
            patterns[byte, code] = pattern
            inexact[byte, code] = pattern & 0x7FFF == INF or Fraction(held) != exact
    return patterns, inexact


@pytest.mark.parametrize("scale_2", SCALE_2S)
def test_decode_nvfp4_every_code_and_scale_is_the_exact_product_rounded_once(scale_2: str) -> None:
    patterns, inexact = nvfp4_oracle(scale_2)
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    decoded = codec.decode_nvfp4(
        codes, torch.arange(256, dtype=torch.uint8)[:, None], SCALE_2S[scale_2], Block(1, 512)
    )
    found = decoded.values.view(torch.int16).numpy().view(np.uint16).reshape(256, 256, 2)
    pair = np.arange(256)
    assert np.array_equal(found[:, :, 0], patterns[:, pair & 15])
    assert np.array_equal(found[:, :, 1], patterns[:, pair >> 4])
    assert decoded.num_inexact == 32 * int(inexact.sum())
    assert decoded.num_not_finite == 32 * int(((patterns & 0x7FFF) >= INF).sum())


def test_decode_nvfp4_zero_scales_of_both_signs_one_after_the_other_keep_their_signs() -> None:
    for zero, pattern in ((0.0, 0x0000), (-0.0, 0x8000), (0.0, 0x0000)):
        decoded = codec.decode_nvfp4(u8([[0x22]]), u8([[0x38]]), zero, NV)
        assert decoded.values.view(torch.int16).numpy().view(np.uint16).tolist() == [[pattern, pattern]]


@pytest.mark.parametrize("scale_2", [math.nan, math.inf, -math.inf])
def test_decode_nvfp4_under_a_scale_that_is_not_finite_nothing_is(scale_2: float) -> None:
    decoded = codec.decode_nvfp4(every_code(1), u8([[0x38, 0x38]]), scale_2, NV)
    assert decoded.num_not_finite == 32
    assert decoded.num_inexact == 0
    assert bool(decoded.values[0, :2].isnan().all())  # zero times infinity


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_decode_nvfp4_nan_scale_is_nan_and_counted(byte: int) -> None:
    decoded = codec.decode_nvfp4(every_code(1), u8([[0x38, byte]]), 1.0, NV)
    assert decoded.num_not_finite == int(decoded.values[:, 16:].isnan().sum()) == 16


@pytest.mark.parametrize("cols", [2, 16, 18, 30, 32, 64, 130])
@pytest.mark.parametrize("rows", [1, 5])
def test_decode_nvfp4_geometry_and_cut_off_blocks(rows: int, cols: int) -> None:
    codes, _ = random_fp4(rows, cols, 0, 1, seed=cols)
    scales = torch.randint(0, 0x7F, (rows, -(-cols // 16)), dtype=torch.uint8)
    decoded = codec.decode_nvfp4(codes, scales, 0.5, NV)
    factor = FP8_VALUES[scales.numpy()].repeat(16, 1)[:, :cols] * 0.5
    exact = fp4_numbers(codes, torch.full((rows, -(-cols // 32)), 127, dtype=torch.uint8)) * factor
    assert same(decoded.values.to(torch.float64).numpy(), exact)


def test_decode_nvfp4_into_out_writes_there_and_nowhere_else() -> None:
    memory = bytearray(b"\xa5" * (8 + 2 * 6 * 64 + 8))
    out = torch.frombuffer(memory, dtype=torch.bfloat16)[4:-4].view(6, 64)
    codes, scales = random_fp4(6, 64, 0x30, 0x48, seed=7)
    scales = scales.repeat_interleave(2, 1)
    decoded = codec.decode_nvfp4(codes, scales, 0.25, NV, out)
    assert decoded.values.data_ptr() == out.data_ptr()
    assert torch.equal(out, codec.decode_nvfp4(codes, scales, 0.25, NV).values)
    assert memory[:8] == memory[-8:] == b"\xa5" * 8


# ---- the processor's flush-to-zero mode

_COLD = """
import hashlib, sys, torch
if sys.argv[1] == "flush":
    assert torch.set_flush_denormal(True)
from dsv4ckpt import codec, recast
from dsv4ckpt.formats import Block
every = torch.arange(256, dtype=torch.uint8)
f32 = recast.e8m0_to_f32(every)
rows = every.repeat(256, 1)
made = [
    f32.view(torch.int32),
    *recast.f32_to_e8m0(f32),
    recast.fp4_to_fp8(rows[:255], every[:255, None], Block(1, 512), every[None, 118:119], Block(255, 512)).codes,
    *recast.nvfp4_scales(every[None, :255], -7),
]
for kmax in (-127, -119, 0):
    decoded = codec.decode_nvfp4(rows, every[:, None], recast.nvfp4_scale_2(kmax), Block(1, 512))
    made += [decoded.values.view(torch.int16), torch.tensor(decoded[1:])]
for tensor in made:
    print(hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
"""


def cold_start(mode: str) -> list[str]:
    """Digests from a process that has always been in this mode."""
    done = subprocess.run([sys.executable, "-c", _COLD, mode], capture_output=True, text=True)
    if "AssertionError" in done.stderr:
        pytest.skip("this processor has no flush-to-zero mode")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_recasts_and_tables_built_under_flush_to_zero_hold_the_same_bytes() -> None:
    plain = cold_start("plain")
    assert len(plain) == 12
    assert cold_start("flush") == plain


def test_expert_geometry_is_what_nvfp4_halves() -> None:
    assert FP4_EXPERT.block.cols == 2 * NV.cols
