"""dsv4ckpt.encode against exact arithmetic and against DeepSeek's quantizers, written again in numpy.

The first oracle is Python integers: every bfloat16, every grid point and every middle between two of them is
an integer times one power of two, so bisect and the parity of an index are all of rounding to nearest even.
The second one follows DeepSeek-V4's kernel.py (scale by exponent bits, division, clamp, cast) in float32 and
float64.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ckpt import codec, encode
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE, FP8_TILE_32, Block

pytestmark = pytest.mark.slow  # exhaustive arithmetic, in many small pieces

FP4, FP8 = FP4_EXPERT.block, FP8_TILE.block
INF = 0x7F80
FP4_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)  # the grid of E2M1 in units of 0.5 (OCP MX v1.0 table 5)
# E4M3 in units of 2**-9: sign, 4 exponent bits with bias 7, 3 mantissa bits; 0x7F is NaN
FP8_UNITS = tuple(
    code & 7 if code < 8 else (8 + (code & 7)) << ((code >> 3) - 1) for code in range(0x7F)
)  # fmt: skip
Bytes = np.ndarray

# ---- the oracles

_POINT = 300  # binary places below the point: 2**-_POINT divides every number here


def scaled(units: int, exponent: int) -> int:
    """units * 2**exponent as an integer with _POINT binary places."""
    return units << (exponent + _POINT)


@functools.cache
def magnitude(pattern: int) -> int:
    """Of a finite bfloat16, with _POINT places; the upper half of binary32."""
    exponent, mantissa = (pattern >> 7) & 255, pattern & 127
    return scaled(mantissa if exponent == 0 else 128 + mantissa, max(exponent, 1) - 134)


def exact_codes(grid: tuple[int, ...], unit: int, byte: int) -> list[int]:
    """Of every finite magnitude under the scale byte: the nearest grid point, ties to even, saturating.

    grid is in units of 2**unit
    """
    middles = [scaled(a + b, unit - 1 + byte - 127) for a, b in itertools.pairwise(grid)]
    codes = []
    for pattern in range(INF):
        value = magnitude(pattern)
        below = bisect.bisect_left(middles, value)
        tie = below < len(middles) and middles[below] == value
        codes.append(below + (tie and below % 2))
    return codes


def round_scale(amax: Bytes, largest: float) -> Bytes:
    """kernel.py's fast_round_scale: the scale's exponent plus 127. A float32 product with the reciprocal."""
    product = amax.astype(np.float32) * np.float32(1 / np.float32(largest))
    bits = product.view(np.uint32)
    return ((bits >> 23) & 0xFF).astype(np.int64) + (bits & 0x7FFFFF != 0)


def deepseek_cast(values: Bytes, mantissa_bits: int, lowest_exponent: int, largest: float) -> Bytes:
    """Clamp and round to a small float, as float64."""
    clamped = np.clip(values.astype(np.float64), -largest, largest)
    exponent = np.maximum(np.frexp(clamped)[1] - 1, lowest_exponent)
    step = np.ldexp(1.0, exponent - mantissa_bits)
    return np.rint(clamped / step) * step  # rint: ties to even


def deepseek_fp4(values: Tensor, width: int = 32) -> tuple[Bytes, Bytes]:
    """(scale bytes [R, c], dequantized float64 [R, C]) of fp4_quant_kernel."""
    blocks = float64(values).reshape(values.shape[0], -1, width)
    amax = np.maximum(np.abs(blocks).max(-1), 6 * 2.0**-126)
    byte = round_scale(amax, 6.0)
    scale = np.ldexp(1.0, byte - 127)[..., None]
    return byte.astype(np.uint8), (deepseek_cast(blocks / scale, 1, 0, 6.0) * scale).reshape(values.shape)


def deepseek_fp8(values: Tensor, size: int) -> tuple[Bytes, Bytes]:
    """(scale bytes [r, c], dequantized float64 [R, C]) of the weight quantizer with round_scale."""
    rows, cols = values.shape
    tiles = float64(values).reshape(rows // size, size, cols // size, size)
    amax = np.maximum(np.abs(tiles).max((1, 3)), np.float32(1e-4))
    byte = round_scale(amax, 448.0)
    scale = np.ldexp(1.0, byte - 127)[:, None, :, None]
    return byte.astype(np.uint8), (deepseek_cast(tiles / scale, 3, -6, 448.0) * scale).reshape(rows, cols)


# ---- helpers


def of_patterns(patterns: object) -> Tensor:
    """bfloat16 of patterns, any shape."""
    return torch.from_numpy(np.array(patterns, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


def patterns_of(values: Tensor) -> Bytes:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def float64(values: Tensor) -> Bytes:
    """bfloat16 as float64 without a subnormal operand."""
    pattern = patterns_of(values).astype(np.int64)
    exponent, mantissa = pattern >> 7 & 255, pattern & 127
    units = np.where(exponent == 0, mantissa, 128 + mantissa).astype(np.float64)
    return np.ldexp(units, np.maximum(exponent, 1) - 134) * np.where(pattern >> 15, -1.0, 1.0)


def byte_tensor(values: object) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint8))


def nibbles(packed: Tensor) -> Bytes:
    """uint8 [R, C]; the low nibble is the even column."""
    codes = packed.numpy()
    return np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)


def pack(codes: object) -> Tensor:
    pairs = np.array(codes, dtype=np.uint8)
    return torch.from_numpy(pairs[:, 0::2] | pairs[:, 1::2] << 4)


def weights(rows: int, cols: int, *, seed: int = 0, sigma: float = 0.02) -> Tensor:
    """Rows of different spread, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    spread = sigma * (1 + torch.rand(rows, 1, generator=generator))
    return (torch.randn(rows, cols, generator=generator) * spread).to(torch.bfloat16)


def every_finite() -> Tensor:
    """bfloat16 [2, 32640]: all magnitudes, positive and negative."""
    return of_patterns([np.arange(INF), 0x8000 | np.arange(INF)])


def random_codes(shape: tuple[int, ...], high: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


SOME_BYTES = [0, 1, 2, 8, 11, 64, 105, 118, 127, 140, 200, 246, 252, 254]

# ---- codes of E8M0 scales: all finite patterns


def fp4_of_every_pattern(byte: int) -> Bytes:
    scale = torch.full((2, 1), byte, dtype=torch.uint8)
    return nibbles(encode.encode_fp4(every_finite(), scale, Block(1, INF)))


def fp8_of_every_pattern(byte: int) -> Bytes:
    scale = torch.full((1, 1), byte, dtype=torch.uint8)
    return encode.encode_fp8(every_finite(), scale, Block(2, INF)).numpy()


@pytest.mark.parametrize("byte", SOME_BYTES)
def test_encode_fp4_every_pattern_is_the_nearest_code_ties_to_even_sign_kept(byte: int) -> None:
    expected = np.array(exact_codes(FP4_HALVES, -1, byte))
    assert np.array_equal(fp4_of_every_pattern(byte), np.stack([expected, expected | 8]))


@pytest.mark.parametrize("byte", SOME_BYTES)
def test_encode_fp8_every_pattern_is_the_nearest_code_ties_to_even_sign_kept(byte: int) -> None:
    expected = np.array(exact_codes(FP8_UNITS, -9, byte))
    assert np.array_equal(fp8_of_every_pattern(byte), np.stack([expected, expected | 0x80]))


@pytest.mark.parametrize("byte", range(0, 255, 6))
def test_encode_every_pattern_equals_deepseeks_cast_in_float64(byte: int) -> None:
    quotient = np.ldexp(float64(every_finite()[:1]), 127 - byte)
    fp4 = np.array(FP4_HALVES)[fp4_of_every_pattern(byte)[:1]] / 2
    fp8 = np.array(FP8_UNITS)[fp8_of_every_pattern(byte)[:1]] / 512
    assert np.array_equal(fp4, deepseek_cast(quotient, 1, 0, 6.0))
    assert np.array_equal(fp8, deepseek_cast(quotient, 3, -6, 448.0))


@pytest.mark.parametrize("sign", [1, -1])
def test_encode_fp4_ties_go_to_the_even_code_not_toward_zero(sign: int) -> None:
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]]) * sign
    codes = nibbles(encode.encode_fp4(ties.to(torch.bfloat16), codec.unit_scale(1, 1), Block(1, 8)))
    assert (codes & 7).tolist() == [[0, 2, 2, 4, 4, 6, 6, 7]]
    assert (codes >> 3 == (sign < 0)).all()


def test_encode_fp8_ties_go_to_the_even_code_not_toward_zero() -> None:
    ties = torch.tensor([[17 / 16, 19 / 16, 2**-10, 3 * 2**-10, 432.0, -432.0, 1e4]])
    codes = encode.encode_fp8(ties.to(torch.bfloat16), codec.unit_scale(1, 1), FP8)
    assert codes.tolist() == [[0x38, 0x3A, 0x00, 0x02, 0x7E, 0xFE, 0x7E]]


@pytest.mark.parametrize("byte", [0, 1, 127, 254])
def test_encode_keeps_negative_zero(byte: int) -> None:
    values = of_patterns([[0x8000, 0x0000]])
    scale = byte_tensor([[byte]])
    assert encode.encode_fp4(values, scale, FP4).tolist() == [[0x08]]
    assert encode.encode_fp8(values, scale, FP8).tolist() == [[0x80, 0x00]]


def test_encode_fp4_gives_all_16_codes_back_under_scale_bytes_0_to_252() -> None:
    codes = pack(np.arange(16, dtype=np.uint8)[None].repeat(253, 0))
    scale = torch.arange(253, dtype=torch.uint8)[:, None]
    values = codec.decode_fp4(codes, scale, Block(1, 16)).values
    assert torch.equal(encode.encode_fp4(values, scale, Block(1, 16)), codes)


def test_encode_fp8_gives_all_254_codes_back_under_scale_bytes_3_to_246() -> None:
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    codes = byte_tensor([finite] * 244)
    scale = torch.arange(3, 247, dtype=torch.uint8)[:, None]
    values = codec.decode_fp8(codes, scale, Block(1, 254)).values
    assert torch.equal(encode.encode_fp8(values, scale, Block(1, 254)), codes)


@pytest.mark.parametrize("cols", [2, 16, 30, 32, 34, 96, 330])
@pytest.mark.parametrize("width", [16, 32])
def test_encode_fp4_geometry_rows_and_cut_off_blocks(cols: int, width: int) -> None:
    block, values = Block(1, width), weights(3, cols, seed=cols, sigma=1.0)
    scale = byte_tensor(124 + random_codes((3, -(-cols // width)), 5, cols))
    each = scale.repeat_interleave(width, 1)[:, :cols]
    expected = encode.encode_fp4(values, each, Block(1, 1))
    assert torch.equal(encode.encode_fp4(values, scale, block), expected)
    out = torch.empty_like(expected)
    assert encode.encode_fp4(values, scale, block, out) is out and torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 16), (9, 15), (16, 33), (3, 40)])
@pytest.mark.parametrize("f32", [False, True])
def test_encode_fp8_geometry_tiles_and_cut_off_edges(shape: tuple[int, int], f32: bool) -> None:
    block, values = Block(4, 8), weights(*shape, seed=sum(shape), sigma=50.0)
    scale = byte_tensor(125 + random_codes((-(-shape[0] // 4), -(-shape[1] // 8)), 5, 1))
    scale = 0.7 * torch.exp2(scale.to(torch.float32) - 127) if f32 else scale
    each = scale.repeat_interleave(4, 0).repeat_interleave(8, 1)[: shape[0], : shape[1]]
    expected = encode.encode_fp8(values, each.contiguous(), Block(1, 1))
    assert torch.equal(encode.encode_fp8(values, scale, block), expected)
    out = torch.empty_like(expected)
    assert encode.encode_fp8(values, scale, block, out) is out and torch.equal(out, expected)


# ---- codes of F32 scales

FINITE = [code for code in range(256) if code & 0x7F != 0x7F]


def lost_codes(scales: Tensor) -> Tensor:
    """bool [n]: encode_fp8 does not give all 254 codes back that decode_fp8 has decoded with this scale."""
    codes = byte_tensor(FINITE).repeat(len(scales), 1)
    block = Block(1, len(FINITE))
    values = codec.decode_fp8(codes, scales[:, None], block).values
    finite = values.isfinite().all(1)
    again = encode.encode_fp8(values.nan_to_num(), scales[:, None], block)
    return (again != codes).any(1) | ~finite


def random_f32(count: int, low: int, high: int, seed: int = 0) -> Tensor:
    """Random mantissas and signs, exponents low..high-1."""
    random = np.random.default_rng(seed)
    bits = (random.integers(low + 127, high + 127, count) << 23) | random.integers(0, 1 << 23, count)
    signed = bits | random.integers(0, 2, count) << 31
    return torch.from_numpy(signed.astype(np.uint32).view(np.int32)).view(torch.float32)


LOWEST_F32, BEYOND_F32 = 31 * 2.0**-129, 73 * 2.0**113


@pytest.mark.parametrize(("low", "high"), [(-30, -5), (-124, 119), (-124, -110), (112, 119)])
def test_encode_fp8_gives_every_code_back_under_random_f32_scales_of_either_sign(low: int, high: int) -> None:
    assert not lost_codes(random_f32(3000, low, high)).any()


def test_encode_fp8_gives_every_code_back_from_31_x_2_minus_129_on_but_not_below() -> None:
    def near(offsets: range) -> Tensor:
        at = torch.tensor(LOWEST_F32, dtype=torch.float32).view(torch.int32)
        return (at + torch.tensor(list(offsets), dtype=torch.int32)).view(torch.float32)

    # 31 * 2**-129 up to 2**-124 and beyond: near the end, and a grid of mantissas
    assert not lost_codes(near(range(1000))).any()
    assert not lost_codes(near(range(0, 1 << 24, 4099))).any()
    assert lost_codes(near(range(-1000, 0))).all()


def test_encode_fp8_gives_every_code_back_below_73_x_2_113_where_448_becomes_infinite() -> None:
    at = torch.tensor(BEYOND_F32, dtype=torch.float32).view(torch.int32)
    below = (at - torch.arange(1, 500, dtype=torch.int32)).view(torch.float32)
    assert not lost_codes(below).any()
    assert lost_codes(at.view(torch.float32)[None]).all()


def test_encode_fp8_f32_equals_deepseeks_division_clamp_and_cast() -> None:
    values = every_finite()
    for scale in [2.0**-20, 1 / 448, 0.37, 1e-4, -0.011, 3e30, 1e-30]:
        codes = encode.encode_fp8(values, torch.tensor([[scale]]), Block(2, INF)).numpy()
        with np.errstate(over="ignore", under="ignore"):
            quotient = (float64(values) / np.float64(np.float32(scale))).astype(np.float32)
        expected = deepseek_cast(quotient, 3, -6, 448.0)
        decoded = np.array(FP8_UNITS)[codes & 0x7F] / 512
        assert np.array_equal(decoded, np.abs(expected))
        assert np.array_equal(codes >> 7, np.signbit(float64(values)) ^ (scale < 0))


def test_encode_fp8_f32_power_of_two_scales_equal_e8m0() -> None:
    for byte in (3, 8, 12, 64, 127, 200):  # below 2**-116 the slow way
        f32 = encode.encode_fp8(every_finite(), torch.tensor([[2.0 ** (byte - 127)]]), Block(2, INF))
        assert np.array_equal(f32.numpy(), fp8_of_every_pattern(byte))


def test_encode_fp8_f32_flips_the_sign_of_zeros_under_a_negative_scale() -> None:
    values = of_patterns([[0x0000, 0x8000]])
    assert encode.encode_fp8(values, torch.tensor([[-0.5]]), FP8).tolist() == [[0x80, 0x00]]


# ---- fresh scales


def test_fresh_scales_of_every_amax_equal_deepseeks_and_exact_arithmetic() -> None:
    values = every_finite()[0][:, None]
    fp4, fp8 = encode.fp4_fresh_scale(values, FP4)[:, 0], encode.fp8_fresh_scale(values, Block(1, 1))[:, 0]
    assert (fp4.min(), fp4.max(), fp8.min(), fp8.max()) == (1, 253, 105, 247)
    amax = float64(values)[:, 0]
    assert np.array_equal(fp4.numpy(), round_scale(np.maximum(amax, 6 * 2.0**-126), 6.0))
    assert np.array_equal(fp8.numpy(), round_scale(np.maximum(amax, np.float32(1e-4)), 448.0))
    for pattern in range(INF):  # the smallest power of two that brings amax to the top
        for byte, top, lowest in ((int(fp4[pattern]), 6, 1), (int(fp8[pattern]), 448, 105)):
            assert byte >= lowest and magnitude(pattern) <= scaled(top, byte - 127)
            assert byte == lowest or magnitude(pattern) > scaled(top, byte - 128)


def test_fresh_scale_of_a_zero_block_is_what_deepseek_writes() -> None:
    zeros = of_patterns([[0, 0x8000] * 64] * 3)
    assert encode.fp4_fresh_scale(zeros, FP4).eq(1).all()
    assert encode.fp8_fresh_scale(zeros, FP8).tolist() == [[105]]
    expected = np.float32(1e-4) / np.float32(448)
    assert encode.fp8_fresh_scale_f32(zeros, FP8).numpy() == expected
    assert encode.encode_fp4(zeros, encode.fp4_fresh_scale(zeros, FP4), FP4).eq(0x80).all()


def test_fresh_scale_f32_of_every_amax_is_one_float32_division() -> None:
    values = every_finite()[0][:, None]
    expected = np.maximum(float64(values).astype(np.float32), np.float32(1e-4)) / np.float32(448)
    assert np.array_equal(encode.fp8_fresh_scale_f32(values, Block(1, 1)).numpy(), expected)


@pytest.mark.parametrize(
    ("block", "shape"), [(Block(1, 32), (3, 80)), (Block(4, 8), (10, 30)), (Block(4, 8), (2, 3))]
)
def test_fresh_scale_takes_the_largest_magnitude_of_each_block_edges_included(
    block: Block, shape: tuple[int, int]
) -> None:
    values = weights(*shape, seed=7)
    for r, c in np.ndindex(-(-shape[0] // block.rows), -(-shape[1] // block.cols)):
        part = values[r * block.rows : (r + 1) * block.rows, c * block.cols : (c + 1) * block.cols]
        amax = np.abs(float64(part)).max()
        assert encode.fp4_fresh_scale(values, block)[r, c] == round_scale(np.array(amax), 6.0)
        assert encode.fp8_fresh_scale_f32(values, block)[r, c] == np.float32(amax) / np.float32(448)


def test_values_that_round_up_to_2_128_under_a_fresh_scale_decode_to_infinity() -> None:
    values = every_finite()[0][0x7F00:, None]  # from 2**127 on
    fp4, fp8 = encode.fp4_fresh_scale(values, FP4), encode.fp8_fresh_scale(values, Block(1, 1))
    infinite4 = (
        codec.decode_fp4(encode.encode_fp4(values.repeat(1, 2), fp4, FP4), fp4, FP4).values[:, 0].isinf()
    )
    infinite8 = (
        codec.decode_fp8(encode.encode_fp8(values, fp8, Block(1, 1)), fp8, Block(1, 1)).values[:, 0].isinf()
    )
    multiple = float64(values)[:, 0] / 2.0**127
    assert np.array_equal(infinite4.numpy(), multiple >= 1.75)
    assert np.array_equal(infinite8.numpy(), multiple >= 1.9375)


@pytest.mark.parametrize("sigma", [1e-6, 0.02, 30.0])
def test_quantizing_new_weights_equals_deepseeks_kernel(sigma: float) -> None:
    values = weights(64, 256, sigma=sigma)
    byte, dequantized = deepseek_fp4(values)
    scale = encode.fp4_fresh_scale(values, FP4)
    decoded = codec.decode_fp4(encode.encode_fp4(values, scale, FP4), scale, FP4).values
    assert np.array_equal(scale.numpy(), byte)
    assert np.array_equal(float64(decoded), dequantized)
    byte, dequantized = deepseek_fp8(values, 32)
    scale, block = encode.fp8_fresh_scale(values, FP8_TILE_32.block), FP8_TILE_32.block
    decoded = codec.decode_fp8(encode.encode_fp8(values, scale, block), scale, block).values
    assert np.array_equal(scale.numpy(), byte)
    assert np.array_equal(float64(decoded), dequantized)


def test_encode_fp4_equals_compressed_tensors_rounding_and_packing() -> None:
    rounding = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    packing = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    values = every_finite()[:, 1:]  # its sign of a zero is +
    on_grid = rounding.cast_to_fp4(values.to(torch.float32))
    ours = encode.encode_fp4(values[:, 1:], codec.unit_scale(2, 1), Block(1, INF))
    assert torch.equal(packing.pack_fp4_to_uint8(on_grid[:, 1:]), ours)


# ---- the theorems: when a fresh scale gives the bytes back


def blocks_of_every_maximum(num_codes: int) -> Bytes:
    """[num_codes, num_codes]: row M holds all codes 0..M, padded with zeros."""
    code = np.arange(num_codes, dtype=np.uint8)
    return np.where(code <= code[:, None], code, 0).astype(np.uint8)


@pytest.mark.parametrize("byte", [8, 64, 118, 127, 200, 252])
def test_fresh_fp4_scale_keeps_values_always_and_bytes_iff_the_largest_code_is_4_or_6(byte: int) -> None:
    codes = pack(blocks_of_every_maximum(8))
    scale = torch.full((8, 1), byte, dtype=torch.uint8)
    values = codec.decode_fp4(codes, scale, FP4).values
    fresh = encode.fp4_fresh_scale(values, FP4)
    again = encode.encode_fp4(values, fresh, FP4)
    assert torch.equal(codec.decode_fp4(again, fresh, FP4).values, values)
    # M = 2, 3: one lower; 1, 1.5: two; 0.5: three
    assert (byte - fresh[1:, 0].to(torch.int32)).tolist() == [3, 2, 2, 1, 1, 0, 0]
    assert (again == codes).all(1).tolist() == [True] + [False] * 5 + [True] * 2


@pytest.mark.parametrize("byte", [116, 118, 127, 200, 246])
def test_fresh_fp8_scale_keeps_values_always_and_bytes_iff_the_largest_code_is_over_224(byte: int) -> None:
    codes = torch.from_numpy(blocks_of_every_maximum(0x7F))
    scale = torch.full((0x7F, 1), byte, dtype=torch.uint8)
    block = Block(1, 0x7F)
    values = codec.decode_fp8(codes, scale, block).values
    fresh = encode.fp8_fresh_scale(values, block)
    again = encode.encode_fp8(values, fresh, block)
    assert torch.equal(codec.decode_fp8(again, fresh, block).values, values)
    same = (again == codes).all(1) & (fresh == scale)[:, 0]
    assert same.nonzero().flatten().tolist() == list(range(0x77, 0x7F))
    assert fresh[0x76] == byte - 1 and again[0x76, 0x76] == 0x7E  # 224: codes doubled to 448


def test_fresh_fp8_scale_of_tiles_below_1e_4_stays_at_byte_105() -> None:
    codes = torch.from_numpy(blocks_of_every_maximum(0x7F))
    scale, block = torch.full((0x7F, 1), 105, dtype=torch.uint8), Block(1, 0x7F)
    values = codec.decode_fp8(codes, scale, block).values
    small = values.to(torch.float32).amax(1) < 1e-4
    assert small.nonzero().flatten().tolist() == list(
        range(0x7E)
    )  # 416 x 2**-22 is 9.9e-5, 448 x 2**-22 1.07e-4
    assert torch.equal(encode.fp8_fresh_scale(values, block), scale)
    assert torch.equal(encode.encode_fp8(values, scale, block), codes)


# ---- scales inferred from the grid


def largest_grid_scale(block: list[int]) -> int:
    """By trial, from the definition: patterns -> byte."""
    magnitudes = [magnitude(pattern & 0x7FFF) for pattern in block]
    if not any(magnitudes):
        return 1
    for byte in range(254, -1, -1):
        grid = {scaled(halves, byte - 128) for halves in FP4_HALVES}
        if grid.issuperset(magnitudes):
            return byte
    return 255


def grid_scale(blocks: list[list[int]]) -> list[int]:
    return encode.fp4_grid_scale(of_patterns(blocks), Block(1, len(blocks[0])))[:, 0].tolist()


def test_grid_scale_of_every_pattern_alone_is_the_largest_by_trial() -> None:
    candidates = [p for p in range(INF) if p < 0x100 or p & 0x3F in (0, 1, 0x20)]
    assert grid_scale([[p] for p in candidates]) == [largest_grid_scale([p]) for p in candidates]
    everything = encode.fp4_grid_scale(every_finite().view(-1, 1), FP4)[:, 0]
    loose = [p for p in range(0x80, INF) if p & 0x3F]
    assert everything[loose].eq(255).all()
    assert torch.equal(everything[:INF], everything[INF:])  # the sign does not matter


@pytest.mark.parametrize("exponent", [0, 1, 2, 6, 100, 127, 250, 254])
def test_grid_scale_of_every_block_over_a_small_alphabet_is_the_largest_by_trial(exponent: int) -> None:
    top = exponent << 7
    near = [top + step for step in range(-5 * 64, 4 * 64, 64)] + [top + 32, 0x8000]
    if exponent < 2:  # subnormals of two bits and one of three
        near = [0, 1, 2, 3, 6, 12, 16, 24, 32, 48, 64, 96, 128, 192, 7]
    alphabet = sorted({p for p in near if 0 <= p & 0x7FFF < INF and p >= 0})
    blocks = [list(three) for three in itertools.product(alphabet, repeat=3)]
    assert grid_scale(blocks) == [largest_grid_scale(block) for block in blocks]


def test_grid_scale_of_a_block_on_no_grid_is_nan() -> None:
    assert grid_scale([[0x3F80, 0x3FA0], [0x3F80, 0x4180], [0x3F80, 0x0001]]) == [255, 255, 255]
    # 1.25; 1 and 16; 1 and 2**-133


def test_grid_scale_of_a_zero_block_is_byte_1() -> None:
    assert grid_scale([[0, 0x8000], [0, 0]]) == [1, 1]


def test_grid_scale_recovers_the_byte_of_every_block_with_a_code_half_or_one_and_a_half() -> None:
    codes = random_codes((1024, 32), 16, 5)
    codes[:, 0] = np.where(np.arange(1024) % 2, 1, 3) | (np.arange(1024) % 4 // 2 * 8)
    scale = torch.from_numpy(random_codes((1024, 1), 253, 6))
    values = codec.decode_fp4(pack(codes), scale, FP4).values
    assert torch.equal(encode.fp4_grid_scale(values, FP4), scale)


def test_values_come_back_under_the_grid_scale_whatever_the_codes() -> None:
    scale = torch.arange(253, dtype=torch.uint8).repeat_interleave(8)[:, None]
    codes = pack(np.tile(blocks_of_every_maximum(8) | random_codes((8, 8), 2, 0) * 8, (253, 1)))
    values = codec.decode_fp4(codes, scale, FP4).values
    inferred = encode.fp4_grid_scale(values, FP4)
    assert inferred.ne(255).all()
    again = codec.decode_fp4(encode.encode_fp4(values, inferred, FP4), inferred, FP4).values
    assert np.array_equal(patterns_of(again), patterns_of(values))


@pytest.mark.parametrize("cols", [2, 16, 30, 32, 34, 96, 330])
@pytest.mark.parametrize("width", [6, 16, 32])
@pytest.mark.parametrize("alphabet", [(0,), (2, 5, 8), (4, 7, 12), (6, 14, 0), (0, 0, 0, 7, 6, 4), range(16)])
def test_grid_scale_of_codes_equals_grid_scale_of_their_values(
    cols: int, width: int, alphabet: tuple[int, ...]
) -> None:
    codes = pack(np.array(alphabet, dtype=np.uint8)[random_codes((253, cols), len(alphabet), cols)])
    scale = torch.arange(253, dtype=torch.uint8)[:, None].repeat(1, -(-cols // width))
    block = Block(1, width)
    expected = encode.fp4_grid_scale(codec.decode_fp4(codes, scale, block).values, block)
    assert torch.equal(encode.fp4_grid_scale_of_codes(codes, scale, block), expected)


def test_grid_scale_of_codes_every_set_of_codes_under_every_scale_byte() -> None:
    sets = np.array([[code * (bits >> code & 1) for code in range(8)] for bits in range(0, 256, 2)])
    codes = pack(np.tile(sets.astype(np.uint8), (253, 1)))
    scale = torch.arange(253, dtype=torch.uint8).repeat_interleave(len(sets))[:, None]
    expected = encode.fp4_grid_scale(codec.decode_fp4(codes, scale, Block(1, 8)).values, Block(1, 8))
    assert torch.equal(encode.fp4_grid_scale_of_codes(codes, scale, Block(1, 8)), expected)


def test_grid_scale_of_codes_at_an_odd_address_is_the_same() -> None:
    storage = torch.from_numpy(random_codes((3 + 4 * 64,), 256, 9))
    scale = torch.full((4, 4), 118, dtype=torch.uint8)
    codes = storage[3:].view(4, 64)
    aligned = encode.fp4_grid_scale_of_codes(codes.clone(), scale, FP4)
    assert torch.equal(encode.fp4_grid_scale_of_codes(codes, scale, FP4), aligned)


# ---- property tests

ADVERSARIAL = st.sampled_from(
    [[0], [8], [0, 8], [1], [2, 8], [3], [4, 0], [5], [6], [7], [1, 9, 0], [4, 12], [6, 7], list(range(16))]
)
EDGE_BYTES = st.sampled_from([0, 1, 2, 3, 4, 105, 119, 251, 252])


@st.composite
def fp4_blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Packed codes [R, 48] and scales [R, 3]."""
    rows = draw(st.integers(1, 4))
    blocks = [
        draw(st.lists(st.sampled_from(draw(ADVERSARIAL)), min_size=32, max_size=32)) for _ in range(3 * rows)
    ]
    scale = [draw(EDGE_BYTES) for _ in range(3 * rows)]
    return pack(np.array(blocks).reshape(rows, 96)), byte_tensor(scale).view(rows, 3)


@settings(max_examples=60, deadline=None)
@given(fp4_blocks())
def test_fp4_bytes_come_back_under_their_scales_and_values_under_inferred_ones(
    made: tuple[Tensor, Tensor],
) -> None:
    codes, scale = made
    values = codec.decode_fp4(codes, scale, FP4).values
    assert torch.equal(encode.encode_fp4(values, scale, FP4), codes)
    inferred = encode.fp4_grid_scale(values, FP4)
    assert torch.equal(encode.fp4_grid_scale_of_codes(codes, scale, FP4), inferred)
    again = codec.decode_fp4(encode.encode_fp4(values, inferred, FP4), inferred, FP4).values
    assert np.array_equal(patterns_of(again), patterns_of(values))
    assert torch.equal(encode.kept_scale_fp4(values, scale, FP4), scale)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([3, 4, 105, 110, 245, 246]),
    st.sampled_from([0x01, 0x07, 0x0B, 0x6F, 0x76, 0x7E]),
    st.data(),
)
def test_fp8_bytes_come_back_under_their_scales(byte: int, largest: int, data: st.DataObject) -> None:
    magnitudes = st.integers(0, largest)
    codes = data.draw(
        st.lists(st.builds(lambda m, s: m | s << 7, magnitudes, st.integers(0, 1)), min_size=24, max_size=24)
    )
    tile, scale, block = byte_tensor(codes).view(4, 6), byte_tensor([[byte, byte]]), Block(4, 4)
    values = codec.decode_fp8(tile, scale, block).values
    assert torch.equal(encode.encode_fp8(values, scale, block), tile)
    assert torch.equal(encode.kept_scale_fp8(values, scale, block), scale)
    f32 = torch.ldexp(torch.tensor([[1.37, -1.0]]), torch.tensor(min(byte, 245) - 127))
    values = codec.decode_fp8(tile, f32, block).values
    assert torch.equal(encode.encode_fp8(values, f32, block), tile)
    assert torch.equal(encode.kept_scale_fp8(values, f32, block), f32)


# ---- kept scales


def fp4_error(values: Tensor, scale: Tensor) -> Bytes:
    decoded = codec.decode_fp4(encode.encode_fp4(values, scale, FP4), scale, FP4).values
    return ((float64(decoded) - float64(values)) ** 2).reshape(values.shape[0], -1, 32).sum(-1)


def fp8_error(values: Tensor, scale: Tensor, size: int) -> Bytes:
    block = Block(size, size)
    decoded = codec.decode_fp8(encode.encode_fp8(values, scale, block), scale, block).values
    square = (float64(decoded) - float64(values)) ** 2
    return square.reshape(values.shape[0] // size, size, -1, size).sum((1, 3))


def test_kept_scale_fp4_slightly_grown_maximum_does_not_double_the_scale() -> None:
    values = torch.full((1, 32), 0.5)
    values[0, 0] = 6.03125
    values = values.to(torch.bfloat16)
    assert encode.fp4_fresh_scale(values, FP4).tolist() == [[128]]
    assert encode.kept_scale_fp4(values, byte_tensor([[127]]), FP4).tolist() == [[127]]


def test_kept_scale_fp8_slightly_grown_maximum_does_not_double_the_scale() -> None:
    values = torch.tensor([[450.0, 2**-9, 3 * 2**-9, 17.0]]).to(torch.bfloat16)
    assert encode.fp8_fresh_scale(values, FP8).tolist() == [[128]]
    assert encode.kept_scale_fp8(values, byte_tensor([[127]]), FP8).tolist() == [[127]]


@pytest.mark.parametrize(
    ("amax", "kept"), [(6.0, True), (6.03125, False), (1.5, False), (1.5078125, True), (0.0, True)]
)
def test_kept_scale_fp4_fits_over_one_and_a_half_up_to_six(amax: float, kept: bool) -> None:
    values = torch.tensor([[amax] + [0.0] * 31]).to(torch.bfloat16)
    amax_rc = torch.tensor([[int(patterns_of(values)[0, 0])]], dtype=torch.int32)
    assert encode._fits(amax_rc, byte_tensor([[127]]), 0x40C0).tolist() == [[kept]]
    doubled = (values.to(torch.float32) * 2.0**-130).to(torch.bfloat16)  # subnormals
    if amax in (6.0, 1.5, 0.0):
        amax_rc[0, 0] = int(patterns_of(doubled)[0, 0])
        # 6 x 2**-130 and 1.5 x 2**-130 over 2**-127
        assert encode._fits(amax_rc, byte_tensor([[0]]), 0x40C0).tolist() == [[amax == 0.0]]


@pytest.mark.parametrize("amax", [448.0, 450.0, 112.0, 112.5])
def test_kept_scale_fp8_fits_over_112_up_to_448(amax: float) -> None:
    values = torch.tensor([[amax]]).to(torch.bfloat16)
    amax_rc = torch.tensor([[int(patterns_of(values)[0, 0])]], dtype=torch.int32)
    assert encode._fits(amax_rc, byte_tensor([[127]]), 0x43E0).tolist() == [[amax in (448.0, 112.5)]]


def test_kept_scale_fp4_is_never_worse_than_fresh_where_it_changes_and_stays_where_it_fits() -> None:
    values = weights(64, 256, seed=11)
    source = encode.fp4_fresh_scale(values, FP4)
    moved = byte_tensor(source.numpy() + random_codes(tuple(source.shape), 7, 2) - 3)
    kept = encode.kept_scale_fp4(values, moved, FP4)
    ratio = np.abs(float64(values)).reshape(64, 8, 32).max(-1) / np.ldexp(
        1.0, moved.numpy().astype(int) - 127
    )
    fits = (ratio > 1.5) & (ratio <= 6)
    assert fits.any() and (~fits).any()
    assert np.array_equal(kept.numpy()[fits], moved.numpy()[fits])
    chosen = fp4_error(values, kept)
    steps = [moved.numpy().astype(int) + step for step in (0, -1, 1)]
    errors = np.stack([fp4_error(values, byte_tensor(scale)) for scale in [*steps, source.numpy()]])
    assert (chosen == errors.min(0))[~fits].all()


@pytest.mark.parametrize("f32", [False, True])
def test_kept_scale_fp8_is_never_worse_than_fresh_where_it_changes_and_stays_where_it_fits(f32: bool) -> None:
    values = weights(32, 48, seed=12)
    values.view(torch.int16)[:8, :8] = 0
    block, rule = Block(8, 8), encode.fp8_fresh_scale_f32 if f32 else encode.fp8_fresh_scale
    fresh = rule(values, block)
    shift = torch.from_numpy(random_codes(tuple(fresh.shape), 7, 2)).to(torch.int32) - 3
    moved = torch.ldexp(fresh, shift) * -0.9 if f32 else (fresh.to(torch.int32) + shift).to(torch.uint8)
    kept = encode.kept_scale_fp8(values, moved, block)
    assert kept.dtype == moved.dtype
    number = np.abs(moved.numpy().astype(float)) if f32 else np.ldexp(1.0, moved.numpy().astype(int) - 127)
    ratio = np.abs(float64(values)).reshape(4, 8, 6, 8).max((1, 3)) / number
    fits = (ratio > 112) & (ratio <= 448) | (ratio == 0)
    assert fits.any() and (~fits).any() and fits[0, 0]
    assert torch.equal(kept[torch.from_numpy(fits)], moved[torch.from_numpy(fits)])
    others = [moved, moved / 2, moved * 2, fresh] if f32 else [moved, moved - 1, moved + 1, fresh]
    errors = np.stack([fp8_error(values, scale, 8) for scale in others])
    assert (fp8_error(values, kept, 8) == errors.min(0))[~fits].all()


def test_kept_scale_of_decoded_values_is_the_source_scale_byte_for_byte() -> None:
    codes, scale = random_codes((64, 96), 16, 3), torch.from_numpy(random_codes((64, 3), 253, 4))
    codes[:16] &= 9  # largest code 0.5: no fit, yet nothing is better
    values = codec.decode_fp4(pack(codes), scale, FP4).values
    assert torch.equal(encode.kept_scale_fp4(values, scale, FP4), scale)
    tiles = torch.from_numpy(random_codes((20, 30), 0x7F, 5))
    tiles[:8] //= 4
    e8m0 = byte_tensor(3 + random_codes((3, 4), 244, 6))
    f32 = random_f32(12, -30, 0).view(3, 4)
    for kind in (e8m0, f32):
        values = codec.decode_fp8(tiles, kind, Block(8, 8)).values
        assert torch.equal(encode.kept_scale_fp8(values, kind, Block(8, 8)), kind)


def test_kept_scale_prefers_the_least_change_then_the_smaller_scale_among_equals() -> None:
    # amax 1 under scale 16: half is exact for a block of {1}; 1 / 32 rounds to zero, 1 / 8 to nothing better
    values = torch.tensor([[1.0] + [0.0] * 31]).to(torch.bfloat16)
    assert encode.kept_scale_fp4(values, byte_tensor([[131]]), FP4).tolist() == [[125]]  # only fresh is exact
    assert encode.kept_scale_fp4(values, byte_tensor([[129]]), FP4).tolist() == [[128]]  # half and fresh are
    assert encode.kept_scale_fp4(values, byte_tensor([[128]]), FP4).tolist() == [[128]]  # all but the double
    assert encode.kept_scale_fp4(values, byte_tensor([[124]]), FP4).tolist() == [[125]]  # saturates at 0.75


def test_kept_scale_of_a_zero_block_is_its_source() -> None:
    zeros = of_patterns([[0, 0x8000] * 32])
    source = byte_tensor([[0, 254]])
    assert torch.equal(encode.kept_scale_fp4(zeros, source, FP4), source)
    assert encode.kept_scale_fp8(zeros, byte_tensor([[77]]), FP8).tolist() == [[77]]


@pytest.mark.parametrize("byte", [0, 254])
def test_kept_scale_at_the_ends_of_e8m0_stays_a_number(byte: int) -> None:
    values = torch.tensor([[1.0] * 32]).to(torch.bfloat16)
    assert encode.kept_scale_fp4(values, byte_tensor([[byte]]), FP4).tolist() == [[125]]
    assert encode.kept_scale_fp8(values, byte_tensor([[byte]]), FP8).tolist() == [[119]]


# ---- empty, and the processor's flush-to-zero mode


def test_every_function_takes_a_matrix_without_rows() -> None:
    values = torch.empty(0, 64, dtype=torch.bfloat16)
    scale, tile = torch.empty(0, 2, dtype=torch.uint8), torch.empty(0, 1)
    assert encode.encode_fp4(values, scale, FP4).shape == (0, 32)
    assert encode.encode_fp8(values, tile, FP8).shape == (0, 64)
    assert encode.fp4_grid_scale(values, FP4).shape == (0, 2)
    assert encode.fp4_grid_scale_of_codes(torch.empty(0, 32, dtype=torch.uint8), scale, FP4).shape == (0, 2)
    assert encode.kept_scale_fp4(values, scale, FP4).shape == (0, 2)


_COLD = """
import sys, torch
torch.set_num_threads(1)
if sys.argv[1] == "flush":
    assert torch.set_flush_denormal(True)
from dsv4ckpt import encode
from dsv4ckpt.formats import Block
import hashlib
patterns = torch.cat([torch.arange(0x7F80), torch.arange(0x8000, 0xFF80)]).to(torch.int32).to(torch.int16)
values = patterns.view(torch.bfloat16).view(-1, 32)
digest = hashlib.sha256()
for byte in (0, 5, 127, 254):
    scale = torch.full((values.shape[0], 1), byte, dtype=torch.uint8)
    block = Block(1, 32)
    f32 = torch.tensor([0x00400000, 0x01000000, 0x04812345, 0x3F800000], dtype=torch.int32)
    f32 = f32.view(torch.float32)
    f32 = f32.repeat(values.shape[0] // 4)[:, None]
    made = [
        encode.encode_fp4(values, scale, block), encode.encode_fp8(values, scale, block),
        encode.encode_fp8(values, f32, block), encode.fp4_grid_scale(values, block),
        encode.fp4_grid_scale(values.view(-1, 1), Block(1, 1)), encode.fp8_fresh_scale_f32(values, block),
        encode.kept_scale_fp4(values, scale, block), encode.kept_scale_fp8(values, scale, block),
        encode.kept_scale_fp8(values, f32, block),
    ]
    for tensor in made:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_nothing_depends_on_flush_to_zero() -> None:
    printed = []
    for mode in ("flush", "gradual"):
        done = subprocess.run([sys.executable, "-c", _COLD, mode], capture_output=True, text=True)
        if "AssertionError" in done.stderr:
            pytest.skip("this processor has no flush-to-zero mode")
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("byte", [0, 1, 8])
def test_encode_under_flush_to_zero_is_unchanged(byte: int) -> None:
    assert np.array_equal(fp4_of_every_pattern(byte)[0], exact_codes(FP4_HALVES, -1, byte))
    assert np.array_equal(fp8_of_every_pattern(byte)[0], exact_codes(FP8_UNITS, -9, byte))


# ---- untouched values, the fast way


def on_the_grid(generator: torch.Generator, least: int, most: int, rows: int = 64, cols: int = 256) -> Tensor:
    """bfloat16 [rows, cols]: values of random codes, blocks of zeros among them, under scale bytes least..most."""
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
    codes.view(rows, -1, 16)[torch.rand((rows, cols // 32), generator=generator) < 0.1] &= 0x88
    small = torch.rand((rows, cols // 32), generator=generator) < 0.3
    codes.view(rows, -1, 16)[small] &= 0xBB  # codes 0..3: the largest value is at most 1.5
    scale = torch.randint(least, most + 1, (rows, cols // 32), generator=generator).to(torch.uint8)
    return codec.decode_fp4(codes, scale, BLOCK).values


BLOCK = Block(1, 32)


@pytest.mark.parametrize(("least", "most"), [(6, 235), (100, 130), (125, 125)])
def test_peaked_codes_moved_to_the_grid_scale_equal_the_slow_twin(least: int, most: int) -> None:
    values = on_the_grid(torch.Generator().manual_seed(least), least, most)
    peaked = encode.fp4_peaked(values, BLOCK)
    assert peaked is not None
    scale = encode.fp4_grid_scale_of_codes(peaked.codes, peaked.scale, BLOCK)
    assert torch.equal(scale, encode.fp4_grid_scale(values, BLOCK))
    assert torch.equal(encode.fp4_under(peaked, scale, BLOCK), encode.encode_fp4(values, scale, BLOCK))


def test_peaked_codes_keep_the_sign_of_zeros() -> None:
    values = torch.zeros((2, 64), dtype=torch.bfloat16)
    values[0, ::2] = -0.0
    values[1, 3], values[1, 4] = 6.0, -0.0
    peaked = encode.fp4_peaked(values, BLOCK)
    assert peaked is not None
    assert torch.equal(peaked.codes, encode.encode_fp4(values, peaked.scale, BLOCK))


@pytest.mark.parametrize(("least", "most"), [(0, 3), (240, 252)])
def test_values_near_the_ends_of_bfloat16_go_the_slow_way(least: int, most: int) -> None:
    values = on_the_grid(torch.Generator().manual_seed(0), least, most)
    assert encode.fp4_peaked(values, BLOCK) is None


def test_columns_that_are_no_whole_blocks_go_the_slow_way() -> None:
    assert encode.fp4_peaked(torch.ones((4, 48), dtype=torch.bfloat16), BLOCK) is None
