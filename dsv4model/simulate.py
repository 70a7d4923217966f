"""What the reference inference loses to quantization, as functions that a trainer can differentiate.

Owns the arithmetic of quantize-dequantize, the Hadamard rotation and the switches; knows no modules and no names.
The grids are reached by rounding in float32 (float64 for float64) to a multiple of a power of two, which is exact:
torch's casts to float8 round float64 twice, and there is none to E2M1.  Scales are read from exponent bits.
Gradients are straight-through: they pass as if nothing had been rounded.  An autograd function says so; the usual
values + (quantized - values).detach() would round the sum again and lose the sign of zeros.
Source: DeepSeek-V4 kernel.py (scales, rounding), OCP MX v1.0 sec. 5.3 (E2M1), OCP FP8 (E4M3).
"""

#  ... any leading axes;  C columns, the axis along which groups lie;  g groups of G columns

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import FP4_AMAX_FLOOR, FP4_EXPERT, FP4_MAX, FP8_AMAX_FLOOR, FP8_MAX, FP8_TILE, ceil_div

KV_GROUP = (
    64  # columns of a key/value entry that share a scale; DeepSeek-V4 model.py, Attention and Compressor
)
FP4_GROUP = FP4_EXPERT.block.cols  # the same of the indexer's queries and keys, and of expert weights


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Which quantizations of the reference a model imitates; none of them: a model in its own precision.

    kv_fp8           window and compressed entries but for their rotary columns: E4M3 in groups of KV_GROUP
    indexer_fp4      the indexer's queries and keys: rotated by hadamard, then E2M1 in groups of FP4_GROUP
    activations_fp8  inputs of the matrices that the release quantizes: E4M3 in groups as wide as a weight's tile
    experts_fp4      weights of the routed experts, as the release stores them: E2M1 in groups of FP4_GROUP
    """

    # window and compressed entries, all but the rotary columns: E4M3 in groups of KV_GROUP
    kv_fp8: bool = False
    # the indexer's queries and keys: Hadamard, then E2M1 in groups of FP4_GROUP
    indexer_fp4: bool = False
    # inputs of the matrices that the release quantizes: E4M3, one scale a tile's width
    activations_fp8: bool = False
    # weights of the routed experts: E2M1 in groups of FP4_GROUP, as they are stored
    experts_fp4: bool = False

    @property
    def prepare(self) -> Callable[[Tensor], Tensor] | None:
        """What happens to the inputs of the matrices that the release quantizes; None: nothing."""
        if not self.activations_fp8:
            return None
        return functools.partial(fp8_groups, group=FP8_TILE.block.cols)


class _Grid(NamedTuple):
    """The numbers of a small float format, as far as rounding to them needs to know."""

    largest: float
    amax_floor: float  # no group's largest value is taken for less
    mantissa_bits: int
    lowest_exponent: int  # of a normal number; below it the steps get no smaller


class _Wide(NamedTuple):
    """The type that the arithmetic is done in."""

    dtype: torch.dtype
    bits: torch.dtype
    mantissa_bits: int
    bias: int


_E4M3 = _Grid(FP8_MAX, FP8_AMAX_FLOOR, 3, -6)
_E2M1 = _Grid(FP4_MAX, FP4_AMAX_FLOOR, 1, 0)
_FLOAT32 = _Wide(torch.float32, torch.int32, 23, 127)
_FLOAT64 = _Wide(torch.float64, torch.int64, 52, 1023)


def fp8_groups(values: Tensor, group: int) -> Tensor:
    """Quantize to E4M3 and back: groups of the last axis share the scale 2**ceil(log2(amax / 448)), amax >= 1e-4.

    values   float32, bfloat16 or float64 [..., C]; if C is no multiple of the group, the last group is shorter
    returns  the same dtype and shape, contiguous or not; gradients pass through unchanged
    exact    the quotient is rounded once, to nearest with ties to even; the rest is exact unless subnormals are
             flushed. The scale leaves nothing beyond 448 to clamp, but in the last binade of the dtype rounding up
             may give infinity. Zeros, and what rounds to them, keep their sign. What is not finite stays not
             finite, and the rest of its group means nothing
    """
    return _straight_through(values, _quantized(values.detach(), group, _E4M3))


def fp4_groups(values: Tensor, group: int = FP4_GROUP) -> Tensor:
    """Quantize to E2M1 and back: the scale is 2**ceil(log2(amax / 6)), amax >= 6 * 2**-126; else as fp8_groups."""
    return _straight_through(values, _quantized(values.detach(), group, _E2M1))


def fp4_weight(weight: Tensor) -> Tensor:
    """What a weight will be once it was exported to FP4: for training that expects it.

    A wider weight is rounded to bfloat16 first, as saving it does, so that simulation and export round alike.

    weight   float32, bfloat16 or float64 [..., R, C]; groups of FP4_GROUP lie along C
    returns  the same dtype and shape: what dsv4ckpt.encode's codes under fresh scales decode to, given the weight
             or this result. Weights from an FP4 checkpoint come back bit for bit: on the grid of a larger scale
             they are on that of the fresh one too (scale bytes from 1 on). Gradients pass through unchanged
    """
    quantized = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    # one matrix at a time: the arithmetic takes many times the memory of what it works on
    for matrix_RC, out_RC in zip(_matrices(weight.detach()), _matrices(quantized), strict=True):
        out_RC.copy_(_quantized(matrix_RC.to(torch.bfloat16), FP4_GROUP, _E2M1))
    return _straight_through(weight, quantized)


def hadamard(values: Tensor) -> Tensor:
    """Rotate the last axis by the Walsh-Hadamard matrix in Sylvester's order over sqrt(C): its own inverse.

    values   float32, bfloat16 or float64 [..., C], C a power of two
    returns  the same dtype and shape; sums in float32 (float64 for float64), rounded once to the dtype at the end
    raises   Usage
    """
    *leading, cols = values.shape
    if cols < 1 or cols & (cols - 1):
        raise Usage(
            "the Hadamard rotation needs a power of two",
            expected="1, 2, 4, 8, ... columns",
            found=cols,
            do="choose such a width (index_head_dim in config.json), or leave indexer_fp4 off",
        )
    rotated = values.to(_wide(values).dtype)
    half = 1
    while half < cols:
        upper, lower = rotated.reshape(*leading, cols // (2 * half), 2, half).unbind(-2)
        rotated = torch.stack((upper + lower, upper - lower), -2).flatten(-3)
        half *= 2
    return (rotated * float(cols**-0.5)).to(values.dtype)


def _matrices(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.reshape(-1, *weight.shape[-2:]).unbind()


class _StraightThrough(torch.autograd.Function):
    """The second input, with the gradient going to the first."""

    @staticmethod
    def forward(_ctx: Any, _values: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _straight_through(values: Tensor, quantized: Tensor) -> Tensor:
    return cast(Tensor, _StraightThrough.apply(values, quantized))


def _quantized(values: Tensor, group: int, grid: _Grid) -> Tensor:
    wide = _wide(values)
    *leading, cols = values.shape
    padded = pad(values.to(wide.dtype), (0, -cols % group))  # zeros do not change the largest magnitude
    groups_gG = padded.reshape(*leading, ceil_div(cols, group), group)
    amax_g1 = groups_gG.abs().amax(-1, keepdim=True).clamp(min=grid.amax_floor)
    exponent_g1 = _exponent(amax_g1, wide) - (math.frexp(grid.largest)[1] - 1)
    exponent_g1 = exponent_g1 + (amax_g1 > grid.largest * _power(exponent_g1, wide)).to(wide.bits)
    rounded_gG = _rounded(groups_gG * _power(-exponent_g1, wide), grid, wide)
    return (rounded_gG * _power(exponent_g1, wide)).flatten(-2)[..., :cols].to(values.dtype)


def _rounded(quotients: Tensor, grid: _Grid, wide: _Wide) -> Tensor:
    """To the nearest of the grid, ties to even: to a multiple of the step that the grid has at the quotient."""
    step = _exponent(quotients, wide).clamp(min=grid.lowest_exponent) - grid.mantissa_bits
    return (quotients * _power(-step, wide)).round() * _power(step, wide)


def _wide(values: Tensor) -> _Wide:
    return _FLOAT64 if values.dtype == torch.float64 else _FLOAT32


def _exponent(values: Tensor, wide: _Wide) -> Tensor:
    """floor(log2(|value|)) from the bits; the lowest there is for zeros and subnormals."""
    return ((values.view(wide.bits) >> wide.mantissa_bits) & (2 * wide.bias + 1)) - wide.bias


def _power(exponent: Tensor, wide: _Wide) -> Tensor:
    """2**exponent, exactly, within the normal numbers."""
    return ((exponent + wide.bias) << wide.mantissa_bits).view(wide.dtype)
