"""dsv4ckpt.codec against exact rational arithmetic.

The oracle below knows the formats from their definitions alone (OCP MX v1.0 sec. 5.3-5.4, OCP FP8 E4M3,
bfloat16 as the upper half of binary32): Python integers and Fractions, none of the product's tables.  torch's
float8 casts and numpy's float64 serve as second witnesses where their own arithmetic is exact.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4ckpt import codec
from dsv4ckpt.formats import Block

NAN, INF = 0x7FC0, 0x7F80  # bfloat16 patterns
Number = tuple[int, Fraction | float]  # sign bit; magnitude: a Fraction, math.inf or math.nan

# ---- the oracle


def e2m1(code: int) -> Number:
    """Sign, 2 exponent bits with bias 1, 1 mantissa bit; no infinity, no NaN."""
    exponent, mantissa = (code >> 1) & 3, Fraction(code & 1, 2)
    return code >> 3, mantissa if exponent == 0 else (1 + mantissa) * 2 ** (exponent - 1)


def e4m3(code: int) -> Number:
    """Sign, 4 exponent bits with bias 7, 3 mantissa bits; all ones is NaN, there is no infinity."""
    exponent, mantissa = (code >> 3) & 15, Fraction(code & 7, 8)
    if code & 0x7F == 0x7F:
        return 0, math.nan
    return code >> 7, mantissa / 64 if exponent == 0 else (1 + mantissa) * Fraction(2) ** (exponent - 7)


def e8m0(byte: int) -> Number:
    return 0, math.nan if byte == 255 else Fraction(2) ** (byte - 127)


def number(value: float) -> Number:
    magnitude = abs(value)
    return int(math.copysign(1, value) < 0), Fraction(value).__abs__() if math.isfinite(value) else magnitude


def product(left: Number, right: Number) -> Number:
    sign, (a, b) = left[0] ^ right[0], (left[1], right[1])
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return sign, a * b
    is_nan = a != a or b != b or a == 0 or b == 0  # infinity times zero is NaN
    return sign, math.nan if is_nan else math.inf


def bf16(value: Number) -> int:
    """The nearest bfloat16 pattern, ties to even; round() of a Fraction is exact and goes to even."""
    sign, magnitude = value
    if not isinstance(magnitude, Fraction):
        return NAN if magnitude != magnitude else sign << 15 | INF
    if magnitude == 0:
        return sign << 15
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, -126)
    significand = round(magnitude / Fraction(2) ** (exponent - 7))  # 128..256, or less if subnormal
    return sign << 15 | min(((exponent + 126) << 7) + significand, INF)


def value_of(pattern: int) -> Number:
    """What a bfloat16 pattern means."""
    exponent, mantissa = (pattern >> 7) & 255, pattern & 127
    if exponent == 255:
        return pattern >> 15, math.nan if mantissa else math.inf
    units = mantissa if exponent == 0 else 128 + mantissa
    return pattern >> 15, units * Fraction(2) ** (max(exponent, 1) - 134)


def is_inexact(value: Number) -> bool:
    return value[1] == value[1] and value_of(bf16(value))[1] != value[1]


@functools.cache
def fp4_oracle() -> np.ndarray:
    """uint16 [256 scale bytes, 16 codes]."""
    rows = [[bf16(product(e8m0(byte), e2m1(code))) for code in range(16)] for byte in range(256)]
    return np.array(rows, dtype=np.uint16)


@functools.cache
def fp8_oracle() -> np.ndarray:
    """uint16 [256 scale bytes, 256 codes]."""
    rows = [[bf16(product(e8m0(byte), e4m3(code))) for code in range(256)] for byte in range(256)]
    return np.array(rows, dtype=np.uint16)


@functools.cache
def fp8_inexact_oracle() -> np.ndarray:
    """bool [256 scale bytes, 256 codes]."""
    rows = [[is_inexact(product(e8m0(byte), e4m3(code))) for code in range(256)] for byte in range(256)]
    return np.array(rows)


def expected_fp4(codes: Tensor, scales: Tensor, block: Block) -> np.ndarray:
    rows, packed = codes.shape
    column = np.arange(2 * packed)
    nibble = codes.numpy()[:, column // 2] >> (4 * (column % 2)) & 15
    return fp4_oracle()[scales.numpy()[np.arange(rows)[:, None], column // block.cols], nibble]


def tile_of(scales: Tensor, shape: tuple[int, ...], block: Block) -> np.ndarray:
    """The scale of every element."""
    rows, cols = shape
    return scales.numpy()[np.arange(rows)[:, None] // block.rows, np.arange(cols) // block.cols]


def expected_fp8(codes: Tensor, scales: Tensor, block: Block) -> np.ndarray:
    return fp8_oracle()[tile_of(scales, codes.shape, block), codes.numpy()]


# ---- helpers


def patterns(values: Tensor) -> np.ndarray:
    assert values.dtype == torch.bfloat16
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def random_bytes(rows: int, cols: int, *, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, cols), dtype=torch.uint8, generator=generator)


def ceil(count: int, size: int) -> int:
    return (count + size - 1) // size


def every_code_under(scales: list[float]) -> codec.Decoded:
    """decode_fp8 of all 256 codes, a row for each F32 scale."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    return codec.decode_fp8(codes, torch.tensor(scales, dtype=torch.float32)[:, None], Block(1, 256))


@functools.cache
def every_bfloat16() -> np.ndarray:
    """float64 [65536], made without subnormal operands, so that it holds in flush-to-zero mode too."""
    pattern = np.arange(65536)
    exponent, mantissa = pattern >> 7 & 255, pattern & 127
    units = np.where(exponent == 0, mantissa, 128 + mantissa).astype(np.float64)
    values = np.ldexp(units, np.maximum(exponent, 1) - 134)
    values[exponent == 255] = np.nan
    values[[INF, 0x8000 | INF]] = np.inf
    return np.copysign(values, np.where(pattern >> 15, -1.0, 1.0))


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def float32_of_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


# ---- FP4: all 256 packed bytes x 256 scale bytes


@functools.cache
def all_fp4() -> codec.Decoded:
    """Row s: every packed byte under scale byte s."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    return codec.decode_fp4(codes, torch.arange(256, dtype=torch.uint8)[:, None], Block(1, 512))


def test_decode_fp4_every_byte_and_scale_equals_the_definition() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    expected = expected_fp4(codes, torch.arange(256, dtype=torch.uint8)[:, None], Block(1, 512))
    assert np.array_equal(patterns(all_fp4().values), expected)


def test_decode_fp4_every_byte_and_scale_equals_torch_casts() -> None:
    grid = torch.tensor(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64
    )
    byte = torch.arange(256)
    pairs = torch.stack([grid[byte & 15], grid[byte >> 4]], 1).flatten()
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).to(torch.float64)
    exact = (scale[:, None] * pairs).to(torch.float32)  # 2 significant bits: exact in float32
    witness = exact.to(torch.bfloat16)  # one rounding
    assert torch.equal(all_fp4().values[:255].view(torch.int16), witness[:255].view(torch.int16))
    assert all_fp4().values[255].isnan().all() and witness[255].isnan().all()


def test_decode_fp4_low_nibble_is_the_even_column() -> None:
    decoded = codec.decode_fp4(
        torch.tensor([[0x72]], dtype=torch.uint8), codec.unit_scale(1, 1), Block(1, 32)
    )
    assert decoded.values.tolist() == [[1.0, 6.0]]


def test_decode_fp4_negative_zero_is_kept_under_every_scale() -> None:
    codes = torch.full((255, 1), 0x88, dtype=torch.uint8)
    decoded = codec.decode_fp4(codes, torch.arange(255, dtype=torch.uint8)[:, None], Block(1, 32))
    assert (patterns(decoded.values) == 0x8000).all()


def test_decode_fp4_scale_byte_0_gives_subnormals() -> None:
    codes = torch.tensor([[0x21, 0x75]], dtype=torch.uint8)
    decoded = codec.decode_fp4(codes, torch.tensor([[0]], dtype=torch.uint8), Block(1, 32))
    # 2**-127 is 0x0040: half of the smallest normal; codes 1 2 5 7 are 0.5 1 3 6
    assert patterns(decoded.values).tolist() == [[0x0020, 0x0040, 0x00C0, 0x0140]]


def test_decode_fp4_scale_byte_255_makes_every_element_nan_zeros_included() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    decoded = codec.decode_fp4(codes, torch.tensor([[255]], dtype=torch.uint8), Block(1, 512))
    assert (patterns(decoded.values) == NAN).all()
    assert decoded.num_not_finite == 512


@pytest.mark.parametrize(("byte", "num_infinite"), [(252, 0), (253, 2), (254, 4)])
def test_decode_fp4_overflows_to_infinity_where_2_128_is_reached(byte: int, num_infinite: int) -> None:
    codes = torch.tensor([[code | code << 4 for code in range(16)]], dtype=torch.uint8)
    decoded = codec.decode_fp4(codes, torch.tensor([[byte]], dtype=torch.uint8), Block(1, 32))
    # num_infinite magnitudes, both signs, and each code stands in both nibbles
    assert int(decoded.values.isinf().sum()) == decoded.num_not_finite == 4 * num_infinite


def test_decode_fp4_counts_what_is_not_finite_and_nothing_inexact_below_overflow() -> None:
    oracle = fp4_oracle()[:, np.arange(256) & 15], fp4_oracle()[:, np.arange(256) >> 4]
    assert all_fp4().num_not_finite == sum(int((half & 0x7FFF >= INF).sum()) for half in oracle)
    codes = torch.arange(256, dtype=torch.uint8).repeat(253, 1)
    below = codec.decode_fp4(codes, torch.arange(253, dtype=torch.uint8)[:, None], Block(1, 512))
    assert below[1:] == (0, 0)


def test_decode_fp4_overflow_counts_as_inexact_like_fp8() -> None:
    codes = torch.tensor([[0x77]], dtype=torch.uint8)  # 6 x 2**127, twice: bfloat16 cannot hold it
    assert codec.decode_fp4(codes, torch.tensor([[254]], dtype=torch.uint8), Block(1, 32)).num_inexact == 2


@pytest.mark.parametrize("cols", [2, 16, 30, 32, 34, 64, 96, 126, 128, 320, 330])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("width", [16, 32])
def test_decode_fp4_geometry_rows_and_cut_off_blocks(rows: int, cols: int, width: int) -> None:
    block = Block(1, width)
    codes = random_bytes(rows, cols // 2, seed=cols)
    scales = random_bytes(rows, ceil(cols, width), seed=rows)
    decoded = codec.decode_fp4(codes, scales, block)
    assert np.array_equal(patterns(decoded.values), expected_fp4(codes, scales, block))


# ---- FP8 with E8M0 scales: all 256 codes x 256 scale bytes


@functools.cache
def all_fp8() -> codec.Decoded:
    """Row s: every code under scale byte s."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    return codec.decode_fp8(codes, torch.arange(256, dtype=torch.uint8)[:, None], Block(1, 256))


@pytest.mark.slow
def test_decode_fp8_every_code_and_scale_equals_the_definition() -> None:
    assert np.array_equal(patterns(all_fp8().values), fp8_oracle())


def test_decode_fp8_every_code_and_scale_equals_torch_casts() -> None:
    code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).to(torch.float64)
    exact = (scale[:, None] * code).to(torch.float32)  # 4 significant bits down to 2**-136: exact in float32
    witness = exact.to(torch.bfloat16)  # one rounding
    same = all_fp8().values.view(torch.int16) == witness.view(torch.int16)
    assert (same | witness.isnan()).all()
    assert torch.equal(all_fp8().values.isnan(), witness.isnan())


@pytest.mark.slow
def test_decode_fp8_every_code_and_scale_equals_numpy_float64() -> None:
    code = np.array(
        [
            math.nan if value[1] != value[1] else float((1 - 2 * value[0]) * value[1])
            for value in map(e4m3, range(256))
        ]
    )
    with np.errstate(over="ignore"):
        exact = np.ldexp(1.0, np.arange(255) - 127)[:, None] * code  # float64 holds every product
    held = all_fp8().values[:255].to(torch.float64).numpy()
    finite = np.isfinite(held)
    assert np.array_equal(
        held[finite & ~fp8_inexact_oracle()[:255]], exact[finite & ~fp8_inexact_oracle()[:255]]
    )
    # half of the gap between neighbours bounds the error: 2**-134 below 2**-126, half a unit of 8 bits above
    gap = np.maximum(np.ldexp(1.0, -134), np.abs(exact) * 2.0**-9)
    assert (np.abs(held - exact)[finite] <= gap[finite]).all()


@pytest.mark.slow
def test_fp8_to_bf16_exact_for_scale_bytes_3_to_246() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(244, 1)
    decoded = codec.decode_fp8(codes, torch.arange(3, 247, dtype=torch.uint8)[:, None], Block(1, 256))
    assert decoded.num_inexact == 0
    for byte, row in zip(range(3, 247), patterns(decoded.values), strict=True):
        for code in range(256):
            exact = product(e8m0(byte), e4m3(code))
            assert code & 0x7F == 0x7F or value_of(int(row[code]))[1] == exact[1]


@pytest.mark.parametrize("byte", [0, 1, 2, 247, 248, 254])
def test_fp8_to_bf16_is_inexact_just_outside_3_to_246(byte: int) -> None:
    decoded = codec.decode_fp8(
        torch.arange(256, dtype=torch.uint8)[None], torch.tensor([[byte]], dtype=torch.uint8), Block(1, 256)
    )
    assert decoded.num_inexact == fp8_inexact_oracle()[byte].sum() > 0


def test_decode_fp8_counts_inexact_and_not_finite_exactly_over_all_pairs() -> None:
    assert all_fp8().num_inexact == fp8_inexact_oracle().sum()
    assert all_fp8().num_not_finite == (fp8_oracle() & 0x7FFF >= INF).sum()


def test_decode_fp8_negative_zero_is_kept_under_every_scale() -> None:
    assert (patterns(all_fp8().values)[:255, 0x80] == 0x8000).all()
    assert (patterns(all_fp8().values)[:255, 0x00] == 0x0000).all()


def test_decode_fp8_scale_byte_0_is_2_to_minus_127_and_gives_subnormals() -> None:
    row = patterns(all_fp8().values)[0]
    assert row[0x38] == 0x0040  # 1.0 x 2**-127
    assert row[0x30] == 0x0020  # 0.5 x 2**-127
    assert row[0x40] == 0x0080  # 2.0 x 2**-127 is the smallest normal
    assert row[0x01] == 0x0000  # 2**-9 x 2**-127 is less than half of the smallest subnormal


def test_decode_fp8_scale_byte_255_makes_every_element_nan_zeros_included() -> None:
    assert (patterns(all_fp8().values)[255] == NAN).all()


def test_decode_fp8_nan_codes_are_nan_under_every_scale() -> None:
    assert (patterns(all_fp8().values)[:, [0x7F, 0xFF]] == NAN).all()


def test_decode_fp8_overflows_to_infinity_where_the_product_rounds_to_2_128() -> None:
    decoded = patterns(all_fp8().values)
    assert (decoded[246] & 0x7FFF)[:0x7F].max() < INF  # 448 x 2**119 is the largest product that fits
    assert decoded[247, 0x7E] == INF and decoded[247, 0xFE] == 0x8000 | INF  # 448 x 2**120 > 2**128
    assert decoded[247, 0x77] < INF  # 240 x 2**120 fits
    assert decoded[247, 0x78] == INF  # 256 x 2**120 is 2**128


GEOMETRIES = [Block(128, 128), Block(32, 32), Block(1, 32), Block(1, 128), Block(4, 8)]
SHAPES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (3, 5),
    (128, 128),
    (129, 127),
    (256, 384),
    (300, 200),
    (130, 32),
    (33, 260),
]


@pytest.mark.parametrize("block", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_fp8_geometry_edges_in_both_directions(shape: tuple[int, int], block: Block) -> None:
    rows, cols = shape
    codes = random_bytes(rows, cols, seed=rows)
    scales = random_bytes(ceil(rows, block.rows), ceil(cols, block.cols), seed=cols)
    decoded = codec.decode_fp8(codes, scales, block)
    assert np.array_equal(patterns(decoded.values), expected_fp8(codes, scales, block))
    assert decoded.num_inexact == fp8_inexact_oracle()[tile_of(scales, shape, block), codes.numpy()].sum()


@pytest.mark.parametrize("block", GEOMETRIES, ids=str)
def test_decode_fp8_f32_scales_have_the_same_geometry(block: Block) -> None:
    rows, cols = 300, 200
    codes = random_bytes(rows, cols)
    bytes_rc = random_bytes(ceil(rows, block.rows), ceil(cols, block.cols), low=60, high=190)
    scales = torch.ldexp(torch.ones(bytes_rc.shape), bytes_rc.to(torch.int32) - 127)
    decoded = codec.decode_fp8(codes, scales, block)
    assert np.array_equal(patterns(decoded.values), expected_fp8(codes, bytes_rc, block))


# ---- FP8 with F32 scales


def check_f32_scales(scales: list[float]) -> None:
    """Every code under every scale: value, number of inexact and of not finite results."""
    exact = [[product(number(scale), e4m3(code)) for code in range(256)] for scale in scales]
    expected = np.array([[bf16(value) for value in row] for row in exact], dtype=np.uint16)
    decoded = every_code_under(scales)
    assert np.array_equal(patterns(decoded.values), expected)
    assert decoded.num_inexact == sum(is_inexact(value) for row in exact for value in row)
    assert decoded.num_not_finite == int((expected & 0x7FFF >= INF).sum())


def test_decode_fp8_f32_powers_of_two_are_exact() -> None:
    scales = [2.0**exponent for exponent in range(-124, 120)]  # scale bytes 3 to 246
    decoded = every_code_under(scales)
    assert decoded.num_inexact == 0
    assert np.array_equal(patterns(decoded.values), fp8_oracle()[3:247])


def test_decode_fp8_f32_scales_that_are_no_powers_of_two_are_rounded_once() -> None:
    generator = random.Random(1)
    check_f32_scales([float32(generator.uniform(1e-4, 1e-2)) for _ in range(40)])


def double_rounding_witnesses() -> list[tuple[float, int, int, int]]:
    """(F32 scale, code, right pattern, pattern by way of float32) where the two differ.

    scale x 1.125 (code 0x39) is put within half a float32 step of a tie of bfloat16, on its far side: going
    through float32 lands on the tie, and the tie goes the wrong way.
    """
    found = []
    for odd in range(257, 512, 2):  # ties between neighbours in [1, 2), in units of 2**-8
        for offset in (-3, -2, -1, 1, 2, 3):  # in units of 2**-26; float32 steps by 8 of them
            units, rest = divmod(odd * 2**18 + offset, 9)
            if rest or units >= 2**24:
                continue
            exact = Fraction(odd * 2**18 + offset, 2**26)
            scale = units / 2**23
            right = bf16((0, exact))
            twice = bf16((0, Fraction(float32(float(exact)))))
            if right != twice:
                found.append((scale, 0x39, right, twice))
    return found


def test_decode_fp8_does_not_round_by_way_of_float32() -> None:
    witnesses = double_rounding_witnesses()
    assert len(witnesses) > 20
    codes = torch.tensor([[code] for _, code, _, _ in witnesses], dtype=torch.uint8)
    scales = torch.tensor([[scale] for scale, _, _, _ in witnesses], dtype=torch.float32)
    decoded = codec.decode_fp8(codes, scales, Block(1, 1))
    assert patterns(decoded.values)[:, 0].tolist() == [right for _, _, right, _ in witnesses]
    # the witnesses are real: torch's own cast of the exact float64 product gives the other answer
    product64 = scales.to(torch.float64) * 1.125
    assert patterns(product64.to(torch.float32).to(torch.bfloat16))[:, 0].tolist() == [
        twice for *_, twice in witnesses
    ]


def test_decode_fp8_f32_nan_and_infinite_scales() -> None:
    check_f32_scales([math.nan, math.inf, -math.inf])


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_decode_fp8_f32_zero_scale_gives_signed_zeros(zero: float) -> None:
    check_f32_scales([zero])


def test_decode_fp8_f32_zero_scales_of_both_signs_in_one_matrix_keep_their_signs() -> None:
    check_f32_scales([0.0, -0.0])


def test_decode_fp8_f32_negative_scales() -> None:
    check_f32_scales([-1.0, -(2.0**-126), -0.3333333432674408, -3.0e38])


def test_decode_fp8_f32_subnormal_scales() -> None:
    generator = random.Random(2)
    bits = [1, 2, 3, 0x7FFFFF, 0x400000, 0x600000, *(generator.randrange(1, 2**23) for _ in range(10))]
    check_f32_scales([float32_of_bits(pattern) for pattern in bits])


def test_decode_fp8_f32_scales_at_the_ends_of_the_range() -> None:
    check_f32_scales(
        [float32_of_bits(bits) for bits in (0x00800000, 0x7F7FFFFF, 0x7F000000, 0x7E800001, 0x00800001)]
    )


@pytest.mark.slow
def test_decode_fp8_f32_random_bit_patterns() -> None:
    generator = random.Random(3)
    check_f32_scales([float32_of_bits(generator.randrange(2**32)) for _ in range(60)])


def test_decode_fp8_f32_counts_inexact_over_tiles_of_mixed_scales() -> None:
    block = Block(32, 32)
    codes = random_bytes(70, 100, seed=4)
    scales = torch.tensor([[1.0, 0.1, 0.5, 3.0], [0.7, 2.0, 1.1, 0.25], [1.5, 1.25, 1.75, 1.0]])
    decoded = codec.decode_fp8(codes, scales, block)
    owner = tile_of(scales, (70, 100), block)
    pairs = zip(owner.flatten().tolist(), codes.flatten().tolist(), strict=True)
    assert (
        decoded.num_inexact
        == sum(is_inexact(product(number(scale), e4m3(code))) for scale, code in pairs)
        > 0
    )


# ---- parts and places


def chunks(rows: int, size: int, tile: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `size` that never cross a tile border unless they start and end on one."""
    row = 0
    while row < rows:
        most = size - size % tile if size >= tile else min(size, tile - row % tile)
        yield row, min(row + most, rows)
        row = min(row + most, rows)


@pytest.mark.parametrize("size", [1, 7, 32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("block", [Block(128, 128), Block(32, 32), Block(1, 32)], ids=str)
def test_decode_fp8_in_chunks_equals_the_whole(block: Block, size: int) -> None:
    codes = random_bytes(300, 200, seed=5)
    scales = random_bytes(ceil(300, block.rows), ceil(200, block.cols), seed=6)
    whole = codec.decode_fp8(codes, scales, block)
    parts = []
    for begin, end in chunks(300, size, block.rows):
        of_chunk = scales[begin // block.rows : ceil(end, block.rows)]
        parts.append(codec.decode_fp8(codes[begin:end].contiguous(), of_chunk, block))
    assert np.array_equal(np.concatenate([patterns(part.values) for part in parts]), patterns(whole.values))
    assert sum(part.num_inexact for part in parts) == whole.num_inexact
    assert sum(part.num_not_finite for part in parts) == whole.num_not_finite


@pytest.mark.parametrize("size", [1, 3, 8])
def test_decode_fp4_in_chunks_equals_the_whole(size: int) -> None:
    codes, scales = random_bytes(20, 24, seed=7), random_bytes(20, 2, seed=8)
    whole = codec.decode_fp4(codes, scales, Block(1, 32))
    parts = [
        codec.decode_fp4(codes[row : row + size], scales[row : row + size], Block(1, 32))
        for row in range(0, 20, size)
    ]
    assert np.array_equal(np.concatenate([patterns(part.values) for part in parts]), patterns(whole.values))
    assert sum(part.num_not_finite for part in parts) == whole.num_not_finite


@pytest.mark.parametrize("name", ["decode_fp4", "decode_fp8"])
def test_decode_into_out_writes_there_and_nowhere_else(name: str) -> None:
    memory = bytearray(b"\xa5" * (8 + 2 * 6 * 64 + 8))
    out = torch.frombuffer(memory, dtype=torch.bfloat16)[4:-4].view(6, 64)
    codes = random_bytes(6, 32 if name == "decode_fp4" else 64, seed=9)
    scales = random_bytes(6, 2, seed=10)
    decode = getattr(codec, name)
    decoded = decode(codes, scales, Block(1, 32), out)
    assert decoded.values.data_ptr() == out.data_ptr()
    assert np.array_equal(patterns(out), patterns(decode(codes, scales, Block(1, 32)).values))
    assert memory[:8] == memory[-8:] == b"\xa5" * 8


@pytest.mark.parametrize("name", ["decode_fp4", "decode_fp8"])
def test_decode_leaves_its_inputs_alone(name: str) -> None:
    codes, scales = random_bytes(4, 64, seed=11), random_bytes(4, 4, seed=12)
    before = codes.clone(), scales.clone()
    getattr(codec, name)(codes, scales, Block(1, 32))
    assert torch.equal(codes, before[0]) and torch.equal(scales, before[1])


def test_unit_scale_decodes_codes_to_themselves() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    decoded = codec.decode_fp8(codes, codec.unit_scale(1, 1), Block(1, 256))
    assert patterns(decoded.values)[0].tolist() == [bf16(e4m3(code)) for code in range(256)]


# ---- bf16_bits: float64 -> bfloat16 in one rounding


def bits_of(values: list[float] | np.ndarray) -> np.ndarray:
    return codec.bf16_bits(torch.tensor(np.asarray(values, dtype=np.float64))).bits.numpy().view(np.uint16)


def test_bf16_bits_of_every_bfloat16_is_itself() -> None:
    values = every_bfloat16()
    assert np.array_equal(bits_of(values), np.where(np.isnan(values), NAN, np.arange(65536)))


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_bf16_bits_of_every_tie_goes_to_even_and_its_neighbours_to_the_nearer(sign: int) -> None:
    below = np.arange(INF)  # each finite magnitude; above the last one stands 2**128
    edges = np.append(every_bfloat16()[below], 2.0**128)
    middle = (edges[:-1] + edges[1:]) / 2 * (-1.0 if sign else 1.0)  # exact: one more bit
    towards, away = np.zeros_like(middle), np.full_like(middle, np.copysign(np.inf, middle[1]))
    assert np.array_equal(bits_of(middle), sign | below + (below & 1))
    assert np.array_equal(bits_of(np.nextafter(middle, towards)), sign | below)
    assert np.array_equal(bits_of(np.nextafter(middle, away)), sign | below + 1)


@pytest.mark.slow
def test_bf16_bits_of_100000_random_bit_patterns_equal_exact_rounding() -> None:
    generator = random.Random(4)
    words = [generator.getrandbits(64) for _ in range(40_000)]
    # the whole range of float64 is rarely that of bfloat16: most exponents are drawn from its neighbourhood
    words += [
        generator.getrandbits(1) << 63 | generator.randrange(880, 1156) << 52 | generator.getrandbits(52)
        for _ in range(60_000)
    ]
    values = [struct.unpack("<d", struct.pack("<Q", word))[0] for word in words]
    expected = np.array([bf16(number(value)) for value in values], dtype=np.uint16)
    assert np.array_equal(bits_of(np.array(words, dtype=np.uint64).view(np.float64)), expected)


def test_bf16_bits_of_special_values() -> None:
    tiny, largest = 2.0**-1074, 1.7976931348623157e308
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, tiny, -tiny, 2.0**-1022, largest, -largest]
    expected = [0, 0x8000, INF, 0x8000 | INF, NAN, NAN, 0, 0x8000, 0, INF, 0x8000 | INF]
    assert bits_of(values).tolist() == expected


def test_bf16_bits_keeps_the_shape() -> None:
    assert codec.bf16_bits(torch.ones(2, 3, 4, dtype=torch.float64)).bits.shape == (2, 3, 4)


# ---- counting


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_count_not_finite_counts_nan_and_both_infinities(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, -0.0, math.nan, math.inf], [-math.inf, 1.0, -math.nan, 2.0]]).to(dtype)
    assert codec.count_not_finite(values) == 4
    assert codec.count_not_finite(values[:, :2]) == 1
    assert codec.count_not_finite(torch.finfo(dtype).max * torch.ones(3, dtype=dtype)) == 0
    assert codec.count_not_finite(torch.empty(0, dtype=dtype)) == 0


def test_count_not_finite_knows_every_bfloat16() -> None:
    every = torch.arange(65536).to(torch.int32).to(torch.int16)
    each = [
        codec.count_not_finite(every[index : index + 128].view(torch.bfloat16))
        for index in range(0, 65536, 128)
    ]
    assert sum(each) == codec.count_not_finite(every.view(torch.bfloat16)) == 2 * 128
    assert [index for index, count in enumerate(each) if count] == [255, 511]


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_count_not_finite_does_not_interpret_integers_and_one_byte_formats(dtype: torch.dtype) -> None:
    assert codec.count_not_finite(torch.full((16,), 0x7F, dtype=torch.uint8).view(torch.uint8).to(dtype)) == 0


# ---- the processor's flush-to-zero mode

_COLD = """
import hashlib, torch
assert torch.set_flush_denormal(True)
from dsv4ckpt import codec
from dsv4ckpt.formats import Block
rows = torch.arange(256, dtype=torch.uint8)[:, None]
codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
for decoded in (codec.decode_fp4(codes, rows, Block(1, 512)), codec.decode_fp8(codes, rows, Block(1, 256))):
    print(hashlib.sha256(decoded.values.view(torch.int16).numpy().tobytes()).hexdigest(), *decoded[1:])
"""


@functools.cache
def cold_start_under_flush() -> list[list[str]]:
    """Digest and counts of all FP4 and all FP8 pairs, from a process that never left the mode."""
    done = subprocess.run([sys.executable, "-c", _COLD], capture_output=True, text=True)
    if "AssertionError" in done.stderr:
        pytest.skip("this processor has no flush-to-zero mode")
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def digest(expected: np.ndarray) -> str:
    return hashlib.sha256(expected.astype(np.uint16).tobytes()).hexdigest()


@pytest.mark.slow
def test_tables_built_under_flush_to_zero_hold_the_same_values() -> None:
    fp4, fp8 = cold_start_under_flush()
    pair = np.arange(256)
    halves = np.stack([fp4_oracle()[:, pair & 15], fp4_oracle()[:, pair >> 4]], -1).reshape(256, 512)
    assert fp4[0] == digest(halves)
    assert fp8[0] == digest(fp8_oracle())


def test_tables_built_under_flush_to_zero_count_the_same() -> None:
    _, fp8 = cold_start_under_flush()
    counted = {"not finite": int(fp8[1]), "inexact": int(fp8[2])}
    assert counted == {
        "not finite": int((fp8_oracle() & 0x7FFF >= INF).sum()),
        "inexact": int(fp8_inexact_oracle().sum()),
    }


@pytest.mark.usefixtures("flushing")
def test_decode_of_e8m0_scales_under_flush_to_zero_is_unchanged() -> None:
    rows = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    assert np.array_equal(
        patterns(codec.decode_fp4(codes, rows, Block(1, 512)).values), patterns(all_fp4().values)
    )
    assert np.array_equal(patterns(codec.decode_fp8(codes, rows, Block(1, 256)).values), fp8_oracle())


@pytest.mark.usefixtures("flushing")
def test_decode_of_f32_scales_under_flush_to_zero_is_unchanged() -> None:
    decoded = every_code_under([2.0**-126, 2.0**-120, 1.0])  # normal scales, subnormal results
    assert np.array_equal(patterns(decoded.values), fp8_oracle()[[1, 7, 127]])
    assert decoded.num_inexact == fp8_inexact_oracle()[[1, 7, 127]].sum()


@pytest.mark.usefixtures("flushing")
def test_decode_of_subnormal_f32_scales_under_flush_to_zero_is_unchanged() -> None:
    bits = np.array([[0x00400000], [0x00200000], [0x00000001]], dtype=np.int32)  # 2**-127, 2**-128, 2**-149
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    decoded = codec.decode_fp8(codes, torch.from_numpy(bits).view(torch.float32), Block(1, 256))
    exact = [
        [product((0, Fraction(2) ** power), e4m3(code)) for code in range(256)]
        for power in (-127, -128, -149)
    ]
    assert patterns(decoded.values).tolist() == [[bf16(value) for value in row] for row in exact]


@pytest.mark.usefixtures("flushing")
def test_bf16_bits_and_counting_under_flush_to_zero_are_unchanged() -> None:
    values = every_bfloat16()
    assert np.array_equal(bits_of(values), np.where(np.isnan(values), NAN, np.arange(65536)))
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    assert codec.count_not_finite(every) == 256
