"""Matrices that stay codes and scales, and become values only while they are multiplied, forward and backward.

A model of these takes as much memory as its checkpoint.  The codes are buffers under the names that the transformers
namespace gives them, they never change and have no gradient; the inputs' gradient is that of the decoded matrix.
Knows no files; the arithmetic of decoding is dsv4ckpt.codec's.
Source: quantization facts 5.1-5.5 for the formats.
"""

#  E experts;  R rows, C columns of a matrix;  r, c blocks along them;  P columns of codes (C / 2 for E2M1 pairs)
#  T tokens, H hidden, I expert width, K experts per token;  N pairs of token and expert;  G groups

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4ckpt import codec
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import E8M0_BIAS, FP4_GRID, Quant, Shape, block_rows_of, codes_shape, scale_shape
from dsv4ckpt.roundtrip import chunks, decoded_rows

from .layers import GroupedLinear, Linear, Module
from .moe import Experts, Pairs, adapted, routed

SCALES = "_scale_inv"  # what transformers appends to a matrix's name; all scales mean "multiply by"


# ---- decoding


def decoded(codes: Tensor, scales: Tensor, quant: Quant, dtype: torch.dtype, num_parts: int = 1) -> Tensor:
    """The values of a matrix.

    codes      uint8 [R, P]
    scales     uint8 [r, c], E8M0, or float32 [r, c]
    num_parts  equal matrices that stand one below the other, each with blocks of its own
    returns    dtype [R, C]: what dense loading gives, in every dtype; above the result it needs memory for one chunk,
               on a GPU for one part
    raises     Usage if the scales were cast
    """
    if scales.dtype != scale_dtype(quant):
        raise Usage(
            "the scales of a packed matrix were cast to another dtype",
            expected=f"{scale_dtype(quant)}",
            found=f"{scales.dtype}",
            do="leave out .to(dtype) on a packed model: load takes the dtype",
        )
    rows, packed = codes.shape
    out = torch.empty(rows, packed * quant.codes_per_element, dtype=dtype, device=codes.device)
    parts = (tensor.chunk(num_parts) for tensor in (codes, scales, out))
    for codes_RP, scales_rc, out_RC in zip(*parts, strict=True):
        if codes.device.type != "cpu":  # few large operations are fast there
            out_RC.copy_(decoded_plain(codes_RP, scales_rc, quant))
            continue
        for first, count in chunks(out_RC.shape[0], out_RC.shape[1], quant.block.rows):
            mine = scales_rc[block_rows_of(first, count, quant.block)]
            _decode(codes_RP[first : first + count], mine, quant, out_RC[first : first + count])
    return out


def _decode(codes_RP: Tensor, scales_rc: Tensor, quant: Quant, out_RC: Tensor) -> None:
    if out_RC.dtype == torch.bfloat16:
        decoded_rows(codes_RP, scales_rc, quant, out_RC)
    else:
        out_RC.copy_(decoded_rows(codes_RP, scales_rc, quant).values)


def decoded_plain(codes_RP: Tensor, scales_rc: Tensor, quant: Quant) -> Tensor:
    """The slow twin, bfloat16 [R, C], for devices that the tables of codec are not on: exact products, rounded once.

    float32 holds every code times every power of two that E8M0 has, subnormals included; float64 every other product.
    """
    exact = torch.float64 if quant.scale == "F32" else torch.float32
    if quant.codes_per_element == 2:
        grid = torch.tensor((*FP4_GRID, *(-value for value in FP4_GRID)), device=codes_RP.device)
        pairs = torch.stack((codes_RP & 15, codes_RP >> 4), -1)
        values_RC = grid[pairs.flatten(-2).to(torch.int32)].to(exact)
    else:
        values_RC = codes_RP.view(torch.float8_e4m3fn).to(exact)
    factors_rc = scales_rc.to(exact)
    if quant.scale != "F32":
        factors_rc = torch.ldexp(torch.ones_like(factors_rc), scales_rc.to(torch.int32) - E8M0_BIAS)
    rows, cols = values_RC.shape
    factors_Rc = factors_rc.repeat_interleave(quant.block.rows, 0)[:rows]
    factors_RC = factors_Rc.repeat_interleave(quant.block.cols, 1)[:, :cols]
    product_RC = values_RC * factors_RC
    if exact is torch.float32:
        return product_RC.to(torch.bfloat16).masked_fill_(product_RC.isnan(), torch.nan)  # any NaN is 0x7FC0
    return codec.bf16_bits(product_RC).bits.view(torch.bfloat16)


def scale_dtype(quant: Quant) -> torch.dtype:
    """E8M0 scales are kept as bytes: no cast of the model can touch them."""
    return torch.float32 if quant.scale == "F32" else torch.uint8


# ---- products


class _Product(torch.autograd.Function):
    """x @ matrix.T. Keeps the codes, not the matrix, and nothing of the input: only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, x_GTC: Tensor, codes: Tensor, scales: Tensor, quant: Quant) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.quant = quant
        matrix_GRC = decoded(codes, scales, quant, x_GTC.dtype).unflatten(0, (*x_GTC.shape[:-2], -1))
        return x_GTC @ matrix_GRC.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GTR: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        matrix = decoded(codes, scales, ctx.quant, grad_GTR.dtype)
        return grad_GTR @ matrix.unflatten(0, (*grad_GTR.shape[:-2], -1)), None, None, None


def product(x_GTC: Tensor, codes: Tensor, scales: Tensor, quant: Quant) -> Tensor:
    """[T, C] times the whole matrix transposed, or group by group [G, T, C] times [R / G, C] transposed."""
    return cast(Tensor, _Product.apply(x_GTC, codes, scales, quant))


class _ProductByExpert(torch.autograd.Function):
    """x @ matrix.T, each expert's rows with its own matrix, of which one is decoded at a time."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, codes: Tensor, scales: Tensor, ends_E: list[int], quant: Quant, num_parts: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.ends, ctx.quant, ctx.num_parts = ends_E, quant, num_parts
        out_NR = x_NC.new_empty(len(x_NC), codes.shape[1])
        for expert, rows in _busy(ends_E):
            matrix_RC = decoded(codes[expert], scales[expert], quant, x_NC.dtype, num_parts)
            torch.mm(x_NC[rows], matrix_RC.mT, out=out_NR[rows])
        return out_NR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NR: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        cols = codes.shape[-1] * ctx.quant.codes_per_element
        out_NC = grad_NR.new_empty(len(grad_NR), cols)
        for expert, rows in _busy(ctx.ends):
            matrix_RC = decoded(codes[expert], scales[expert], ctx.quant, grad_NR.dtype, ctx.num_parts)
            torch.mm(grad_NR[rows], matrix_RC, out=out_NC[rows])
        return out_NC, None, None, None, None, None


def product_by_expert(
    x_NC: Tensor, codes: Tensor, scales: Tensor, ends_E: list[int], quant: Quant, num_parts: int
) -> Tensor:
    """What F.grouped_mm gives for decoded matrices [E, R, C]: rows of x up to ends[e] belong to expert e."""
    apply = _ProductByExpert.apply
    return cast(Tensor, apply(x_NC, codes, scales, ends_E, quant, num_parts))


def _busy(ends_E: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which ones."""
    bounds = itertools.pairwise((0, *ends_E))
    return [(expert, slice(begin, end)) for expert, (begin, end) in enumerate(bounds) if begin < end]


# ---- modules


def _register(module: Module, name: str, lead: Shape, shape: Shape, quant: Quant, num_parts: int = 1) -> None:
    """Buffers for `lead` x `num_parts` matrices of this shape, those of one index one below the other."""
    codes, grid = codes_shape(shape, quant), scale_shape(shape, quant.block)
    codes, grid = (num_parts * codes[0], codes[1]), (num_parts * grid[0], grid[1])
    module.register_buffer(name, torch.empty(*lead, *codes, dtype=torch.uint8))
    module.register_buffer(name + SCALES, torch.empty(*lead, *grid, dtype=scale_dtype(quant)))


class PackedLinear(Linear):
    """A Linear whose weight [out, in] is codes, with weight_scale_inv beside it; made from the dense one."""

    weight_scale_inv: Tensor

    def __init__(self, dense: Linear, quant: Quant) -> None:
        Module.__init__(self)  # not Linear's, which makes a parameter
        self.prepare, self.quant = dense.prepare, quant
        self.register_module("adapter", None)
        _register(self, "weight", (), tuple(dense.weight.shape), quant)

    def product(self, x: Tensor) -> Tensor:
        out = product(x.flatten(0, -2), self.weight, self.weight_scale_inv, self.quant)
        return out.unflatten(0, x.shape[:-1])


class PackedGroupedLinear(PackedLinear, GroupedLinear):
    """A GroupedLinear of the same kind."""

    def product(self, x: Tensor) -> Tensor:
        flat_GTC = x.flatten(0, -3).transpose(0, 1)
        out_GTR = product(flat_GTC, self.weight, self.weight_scale_inv, self.quant)
        return out_GTR.transpose(0, 1).unflatten(0, x.shape[:-2])


class PackedExperts(Experts):
    """Routed experts as codes: gate_up_proj [E, 2I, P] and down_proj [E, H, P], each with its scales beside it."""

    gate_up_proj_scale_inv: Tensor
    down_proj_scale_inv: Tensor

    def __init__(self, dense: Experts, quant: Quant) -> None:
        Module.__init__(self)
        self.limit, self.simulation, self.quant = dense.limit, dense.simulation, quant
        if dense.simulation.experts_fp4 and quant.codes_per_element == 1:
            raise Usage(
                "experts_fp4 rounds the experts' weights to FP4, and these stay packed as FP8",
                do='load with experts="dense", or leave experts_fp4 off',
            )
        experts, rows, hidden = dense.gate_up_proj.shape
        self.register_module("gate_up_adapter", None)
        self.register_module("down_adapter", None)
        _register(self, "gate_up_proj", (experts,), (rows // 2, hidden), quant, 2)
        _register(self, "down_proj", (experts,), (hidden, rows // 2), quant)

    def here(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As Experts says."""
        pairs = Pairs.of(ids_TK, len(self.down_proj))
        ends = pairs.ends.tolist()

        def up(x_NC: Tensor, pairs: Pairs) -> Tensor:  # noqa: ARG001 - its ends are known already
            return product_by_expert(
                x_NC, self.gate_up_proj, self.gate_up_proj_scale_inv, ends, self.quant, 2
            )

        def down(x_NC: Tensor, pairs: Pairs) -> Tensor:  # noqa: ARG001
            return product_by_expert(x_NC, self.down_proj, self.down_proj_scale_inv, ends, self.quant, 1)

        prepare = self.simulation.prepare
        both = adapted(up, self.gate_up_adapter), adapted(down, self.down_adapter)
        return routed(x_TH, pairs, weights_TK, *both, self.limit, prepare, keeps_inner=True)


def pack_modules(model: Module, quants: dict[str, Quant]) -> None:
    """Put packed modules in place of dense ones, empty; paths that the model does not have are passed over."""
    for path, dense in dict(model.named_modules()).items():
        if path not in quants:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _packed(dense, quants[path]))


def _packed(dense: torch.nn.Module, quant: Quant) -> Module:
    if isinstance(dense, Experts):
        return PackedExperts(dense, quant)
    assert isinstance(dense, Linear)
    return (PackedGroupedLinear if isinstance(dense, GroupedLinear) else PackedLinear)(dense, quant)
