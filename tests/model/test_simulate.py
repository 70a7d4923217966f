"""dsv4model.simulate against exact rational arithmetic, and against what the converter would write.

The oracle knows the two formats only as lists of magnitudes (OCP MX v1.0 table 5, OCP FP8 table 1) and finds scales
and nearest codes with Fraction; the rotation is checked against the recursive definition of the matrix in numpy.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4ckpt import codec, encode
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE
from dsv4model.simulate import Simulation, fp4_groups, fp4_weight, fp8_groups, hadamard

BLOCK = FP4_EXPERT.block
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


class Format(NamedTuple):
    """One of the two quantizers, and its definition."""

    quantize: Callable[[Tensor, int], Tensor]
    grid: list[Fraction]  # the magnitude of every code, in order
    amax_floor: Fraction


FP8 = Format(
    fp8_groups,
    # 4 exponent bits with bias 7, 3 mantissa bits, in units of 2**-9; 0x7F is NaN
    [Fraction(c if c < 8 else (8 + c % 8) << (c // 8 - 1), 512) for c in range(0x7F)],
    Fraction(1, 10_000),
)
FP4 = Format(fp4_groups, [Fraction(halves, 2) for halves in (0, 1, 2, 3, 4, 6, 8, 12)], Fraction(6, 2**126))
both_formats = pytest.mark.parametrize("fmt", [FP8, FP4], ids=["fp8", "fp4"])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- the oracle


def scale_of(group: list[float], fmt: Format) -> Fraction:
    """The smallest power of two under which nothing is beyond the largest code."""
    amax = max(fmt.amax_floor, *(Fraction(abs(value)) for value in group))
    exponent = math.frexp(float(amax / fmt.grid[-1]))[1] - 3  # begins below, climbs exactly
    while fmt.grid[-1] * Fraction(2) ** exponent < amax:
        exponent += 1
    assert fmt.grid[-1] * Fraction(2) ** (exponent - 1) < amax
    return Fraction(2) ** exponent


def nearest(magnitude: Fraction, grid: list[Fraction]) -> Fraction:
    """Of two codes that are equally near the even one."""
    above = bisect_left(grid, magnitude)
    if above == len(grid):
        return grid[-1]
    if above == 0 or grid[above] == magnitude:
        return grid[above]
    low, high = magnitude - grid[above - 1], grid[above] - magnitude
    return grid[above - (low < high or (low == high and above % 2 == 1))]


def exactly(group: list[float], fmt: Format) -> list[float]:
    scale = scale_of(group, fmt)
    return [
        math.copysign(float(nearest(abs(Fraction(value)) / scale, fmt.grid) * scale), value)
        for value in group
    ]


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(INTEGERS[values.dtype])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected)), (found, expected)


def assert_exact(groups: list[list[float]], fmt: Format, dtype: torch.dtype) -> None:
    """Every group, quantized as a row of its own, is what the oracle says, signs of zeros included."""
    values = torch.tensor(groups, dtype=dtype)
    expected = torch.tensor([exactly(row, fmt) for row in values.tolist()], dtype=torch.float64).to(dtype)
    assert_same_bits(fmt.quantize(values, values.shape[-1]), expected)


def neighbours(value: float, dtype: torch.dtype) -> list[float]:
    """A positive number of the dtype with the one below and the one above it."""
    at = bits(torch.tensor([value], dtype=dtype))
    assert at.view(dtype).item() == value
    return torch.cat([at - 1, at, at + 1]).view(dtype).tolist()


def exponents(dtype: torch.dtype, fmt: Format) -> range:
    """Of scales, from below the floor to where codes would leave the dtype; every 8th for float64."""
    if dtype == torch.float64:
        return range(-130, 1010, 8)
    return range(-30 if fmt is FP8 else -129, 120 if fmt is FP8 else 126)


def random_rows(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, each row and each element of an order of magnitude of its own."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=random, dtype=torch.float64)
    row, element = (torch.randint(-12, 3, size, generator=random) for size in ((rows, 1), (rows, cols)))
    return torch.ldexp(values, row + element).to(dtype)


# ---- switches


def test_simulation_without_arguments_imitates_nothing():
    assert Simulation() == Simulation(
        kv_fp8=False, indexer_fp4=False, activations_fp8=False, experts_fp4=False
    )
    assert Simulation().prepare is None


def test_simulation_takes_names_only_and_does_not_change():
    with pytest.raises(TypeError):
        Simulation(True)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Simulation().kv_fp8 = True  # type: ignore[misc]


def test_simulation_of_activations_prepares_them_in_groups_of_a_tile():
    prepare = Simulation(activations_fp8=True).prepare
    assert prepare is not None
    values = random_rows(4, 256, seed=13)
    assert_same_bits(prepare(values), fp8_groups(values, FP8_TILE.block.cols))


# ---- rounding and scales


@all_dtypes
@both_formats
def test_groups_of_codes_are_unchanged_under_every_scale(fmt: Format, dtype: torch.dtype):
    codes = torch.tensor([float(code) for code in fmt.grid], dtype=torch.float64)
    row = torch.cat([codes, -codes])
    lowest = -22 if fmt is FP8 else -126
    scales = torch.tensor([[2.0**k] for k in exponents(dtype, fmt) if k >= lowest], dtype=torch.float64)
    values = (scales * row).to(dtype)
    assert torch.equal(values.double(), scales * row)
    assert_same_bits(fmt.quantize(values, len(row)), values)


@all_dtypes
@both_formats
def test_groups_at_ties_and_beside_them_round_to_the_nearest_even_code(fmt: Format, dtype: torch.dtype):
    """float64's neighbours of a tie are ties in float32: they tell whether rounding goes through it."""
    middles = [float((low + high) / 2) for low, high in zip(fmt.grid, fmt.grid[1:], strict=False)]
    beside = [near for middle in middles for near in neighbours(middle, dtype)]
    signed = [sign * value for value in beside for sign in (1, -1)]
    for scale in (2.0**-22, 1.0, 2.0**100):
        assert_exact([[scale * float(fmt.grid[-1]), scale * value] for value in signed], fmt, dtype)


@all_dtypes
@both_formats
def test_groups_scale_at_every_power_of_the_largest_code_and_beside_it(fmt: Format, dtype: torch.dtype):
    """The second value tells the scale: 1.5 times the smallest code is a tie, and becomes one code under the double."""
    groups = []
    for exponent in exponents(dtype, fmt):
        probe = 1.5 * float(fmt.grid[1]) * 2.0**exponent
        for amax in neighbours(float(fmt.grid[-1]) * 2.0**exponent, dtype):
            groups += [[amax, probe], [-amax, -probe]]
    assert_exact(groups, fmt, dtype)


@all_dtypes
@both_formats
def test_groups_of_any_numbers_are_rounded_exactly(fmt: Format, dtype: torch.dtype):
    assert_exact(random_rows(60, 16, dtype=dtype).tolist(), fmt, dtype)


@all_dtypes
def test_groups_of_subnormals_are_zeros_to_fp8_and_whole_steps_to_fp4(dtype: torch.dtype):
    smallest = torch.finfo(dtype).smallest_normal if dtype != torch.float64 else 2.0**-126
    values = [[smallest * share, -smallest * share] for share in (1 / 64, 0.25, 0.375, 0.5, 0.75, 0.875, 1.5)]
    assert_exact(values, FP8, dtype)
    assert_exact(values, FP4, dtype)
    assert fp8_groups(torch.tensor(values, dtype=dtype), 2).abs().max() == 0
    assert fp4_groups(torch.tensor(values, dtype=dtype), 2).abs().max() == 1.5 * smallest


@all_dtypes
@both_formats
def test_groups_of_zeros_keep_their_signs(fmt: Format, dtype: torch.dtype):
    zeros = torch.tensor([[0.0, -0.0, -0.0, 0.0]], dtype=dtype)
    assert_same_bits(fmt.quantize(zeros, 4), zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_groups_agree_with_the_cast_to_float8(dtype: torch.dtype):
    """The reference's own way: divide, clamp, cast, multiply."""
    values = random_rows(200, 64, seed=1, dtype=dtype)
    scale = torch.tensor([[float(scale_of(row, FP8))] for row in values.tolist()])
    codes = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert_same_bits(fp8_groups(values, 64), (codes.float() * scale).to(dtype))


@both_formats
def test_groups_with_a_value_that_is_not_finite_do_not_hide_it(fmt: Format):
    for bad in (torch.inf, -torch.inf, torch.nan):
        quantized = fmt.quantize(torch.tensor([1.0, bad, 1.0, 2.0]), 2)
        assert not quantized[1].isfinite()
        assert quantized[2:].tolist() == [1, 2]


@all_dtypes
@both_formats
def test_groups_quantized_twice_do_not_change_again(fmt: Format, dtype: torch.dtype):
    once = fmt.quantize(random_rows(200, 32, seed=2, dtype=dtype), 32)
    assert_same_bits(fmt.quantize(once, 32), once)


# ---- geometry


@both_formats
def test_groups_do_not_see_each_other_and_the_last_may_be_shorter(fmt: Format):
    values = random_rows(6, 70, seed=3)
    parts = [fmt.quantize(values[:, first : first + 32], 32) for first in (0, 32, 64)]
    assert_same_bits(fmt.quantize(values, 32), torch.cat(parts, 1))
    assert_same_bits(parts[2], fmt.quantize(values[:, 64:], 6))


@both_formats
def test_groups_keep_the_shape_of_any_layout_and_leave_the_input_alone(fmt: Format):
    values = random_rows(12, 64, seed=4).view(3, 4, 64).transpose(0, 1)[..., ::2]
    before = values.clone()
    assert_same_bits(
        fmt.quantize(values, 16), fmt.quantize(values.contiguous().view(-1, 16), 16).view(4, 3, 32)
    )
    assert_same_bits(values, before)
    for empty in ((0, 64), (2, 0)):
        assert fmt.quantize(torch.zeros(empty), 32).shape == empty


def test_fp4_groups_are_of_32_unless_told_otherwise():
    values = random_rows(4, 64, seed=5)
    assert_same_bits(fp4_groups(values), fp4_groups(values, 32))


@pytest.mark.slow  # torch loads much before its first tensor without data
def test_all_functions_need_no_value_on_the_host():
    """What runs on tensors without data neither waits for an accelerator nor calls what only a CPU has."""
    values = torch.zeros(2, 64, dtype=torch.bfloat16, device="meta")
    for made in (fp8_groups(values, 64), fp4_groups(values), fp4_weight(values), hadamard(values)):
        assert (made.shape, made.dtype, made.device) == (values.shape, values.dtype, values.device)


# ---- gradients


@pytest.mark.parametrize(
    "quantize", [lambda x: fp8_groups(x, 24), fp4_groups, fp4_weight], ids=["fp8", "fp4", "weight"]
)
@all_dtypes
def test_gradients_pass_as_they_came(quantize: Callable[[Tensor], Tensor], dtype: torch.dtype):
    values = random_rows(5, 48, seed=6, dtype=dtype).requires_grad_()
    incoming = random_rows(5, 48, seed=7, dtype=dtype)
    incoming[0, :2] = torch.tensor([-0.0, 1e-40])
    quantized = quantize(values)
    quantized.backward(incoming)
    assert values.grad is not None
    assert_same_bits(values.grad, incoming)
    assert_same_bits(quantized.detach(), quantize(values.detach()))


# ---- rotation


def sylvester(size: int) -> np.ndarray:
    if size == 1:
        return np.ones((1, 1))
    half = sylvester(size // 2)
    return np.block([[half, half], [half, -half]])


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_hadamard_is_the_recursive_matrix(size: int):
    rotated = hadamard(torch.eye(size, dtype=torch.float64))
    assert np.array_equal(rotated.numpy(), sylvester(size) * size**-0.5)


@all_dtypes
def test_hadamard_sums_wide_and_rounds_once(dtype: torch.dtype):
    """Sums of integers below 2**24 and the factor 1/8 are exact, so only the last cast may round."""
    random = np.random.default_rng(8)
    integers = random.integers(-255, 256, (3, 4, 64)).astype(np.float64)  # bfloat16 has 8 bits
    exact = torch.from_numpy(integers @ sylvester(64) / 8)
    assert_same_bits(hadamard(torch.from_numpy(integers).to(dtype)), exact.to(dtype))


def test_hadamard_twice_is_the_identity_and_keeps_products():
    """float64: 7 levels of sums and two factors, each within 2**-53 of numbers below 8 in size."""
    queries, keys = torch.randn(2, 5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(hadamard(hadamard(queries)), queries, rtol=0, atol=2**-46)
    assert torch.allclose(hadamard(queries) @ hadamard(keys).T, queries @ keys.T, rtol=0, atol=2**-42)


def test_hadamard_gradient_is_the_rotated_gradient():
    values = torch.zeros(3, 16, dtype=torch.float64, requires_grad=True)
    incoming = random_rows(3, 16, seed=10, dtype=torch.float64)
    hadamard(values).backward(incoming)
    assert values.grad is not None
    assert np.allclose(values.grad, incoming.numpy() @ sylvester(16) / 4, rtol=0, atol=2**-50)


@pytest.mark.parametrize("size", [0, 3, 96])
def test_hadamard_of_no_power_of_two_is_refused(size: int):
    with pytest.raises(Usage, match=f"found *{size}\n *do "):
        hadamard(torch.zeros(2, size))


# ---- expert weights


def stored(values: Tensor) -> Tensor:
    """What an FP4 checkpoint holds of a bfloat16 matrix after a fresh quantization: codes decoded again."""
    scale = encode.fp4_fresh_scale(values, BLOCK)
    return codec.decode_fp4(encode.encode_fp4(values, scale, BLOCK), scale, BLOCK).values


def checkpoint_blocks() -> Tensor:
    """bfloat16 [n, 32]: for every scale byte and every largest code all codes up to it, of both signs."""
    rows = []
    for byte in range(1, 255):
        for top in range(8):
            codes = [FP4.grid[code % (top + 1)] for code in range(16)]
            values = [math.ldexp(float(code), byte - 127) for code in codes]
            if max(values) < 2.0**128:
                rows.append([*values, *(-value for value in values)])
    return torch.tensor(rows, dtype=torch.float64)


@all_dtypes
def test_fp4_weight_from_a_checkpoint_is_unchanged_bit_for_bit(dtype: torch.dtype):
    blocks = checkpoint_blocks()
    assert len(blocks) == 252 * 8 + 6 + 4  # bytes 253 and 254 have 2 and 4 codes beyond bfloat16
    assert torch.equal(blocks.to(torch.bfloat16).double(), blocks)
    assert_same_bits(fp4_weight(blocks.to(dtype)), blocks.to(dtype))


@all_dtypes
def test_fp4_weight_is_what_an_export_of_it_or_of_the_weight_holds(dtype: torch.dtype):
    weight = random_rows(300, 80, seed=11, dtype=dtype)
    simulated = fp4_weight(weight)
    assert simulated.dtype == dtype
    exported = stored(weight.to(torch.bfloat16))
    assert_same_bits(simulated, exported.to(dtype))
    assert_same_bits(stored(simulated.to(torch.bfloat16)), exported)


def test_fp4_weight_of_every_bfloat16_is_what_an_export_holds():
    """Every magnitude below the last binade beside a largest value up to 2**3 times as large, and alone."""
    pattern = torch.arange(0x7F00, dtype=torch.int32)
    for octaves in range(4):
        above = torch.where(pattern < 0x80, pattern, (pattern + (octaves << 7)).clamp(max=0x7F00))
        pairs = torch.stack([pattern, above], 1).to(torch.int16).view(torch.bfloat16)
        weight = torch.nn.functional.pad(pairs, (0, 30))
        assert_same_bits(fp4_weight(weight), stored(weight))


def test_fp4_weight_of_fused_experts_is_that_of_each():
    weight = random_rows(24, 64, seed=12, dtype=torch.bfloat16)
    assert_same_bits(fp4_weight(weight.view(3, 8, 64)), stored(weight).view(3, 8, 64))


def test_fp4_weight_that_is_wide_is_rounded_as_saving_does():
    """0.25 and a bit is a tie once it is bfloat16: to 0, where the FP4 rule alone would say 0.5."""
    weight = torch.tensor([[6.0, 0.25 + 2.0**-20]])
    assert fp4_weight(weight).tolist() == [[6.0, 0.0]]
    assert fp4_groups(weight).tolist() == [[6.0, 0.5]]
