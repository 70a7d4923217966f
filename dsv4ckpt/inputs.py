"""Reads the stored side of steps, and judges scales: are they finite, do they span what a recast can hold.

Buffers are reused: what a call returns holds until the next one of its kind.  Knows no outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import codec, formats, recast
from .errors import NotFinite, NotLossless
from .source import Landing, Reader
from .steps import Matrix, Step


class Inputs:
    """Reads codes, scales and values of steps, in buffers that the next call uses again."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._codes, self._scales = Landing(), Landing()

    def stored(self, step: Step | Matrix, first: int, rows: int) -> memoryview:
        """The bytes of some of the step's own rows: codes, or values."""
        offset, size = (step.begin + first) * step.row_bytes, rows * step.row_bytes
        return self.reader.read(step.source, offset, size, self._codes)

    def codes(self, step: Step | Matrix, first: int, rows: int) -> Tensor:
        """uint8 [rows, row_bytes] of the same."""
        return as_rows(self.stored(step, first, rows), rows)

    def scales(self, step: Step, first: int, rows: int) -> Tensor:
        """The scales of every block that these rows touch; uint8 or float32 [r, c]."""
        assert step.quant is not None
        of = formats.block_rows_of(first, rows, step.quant.block)
        count = of.stop - of.start
        if step.scale is None:
            return codec.unit_scale(count, formats.ceil_div(step.columns, step.quant.block.cols))
        offset, size = (step.scale_begin + of.start) * step.scale_row_bytes, count * step.scale_row_bytes
        found = as_rows(self.reader.read(step.scale, offset, size, self._scales), count)
        return found.view(torch.float32) if step.quant.scale == "F32" else found

    def scales_of(self, matrix: Matrix) -> Tensor:
        """All FP4 scales of a matrix, one row each."""
        assert matrix.scale is not None
        data = bytearray(matrix.rows * matrix.scale_row_bytes)
        self.reader.read_into(matrix.scale, memoryview(data), matrix.scale_begin * matrix.scale_row_bytes)
        return torch.frombuffer(data, dtype=torch.uint8).view(matrix.rows, matrix.scale_row_bytes)

    def number(self, name: str) -> float:
        """A tensor of one F32 number."""
        data = bytearray(4)
        self.reader.read_into(name, memoryview(data), 0)
        return float(torch.frombuffer(data, dtype=torch.float32)[0])


def as_rows(data: memoryview, rows: int) -> Tensor:
    """uint8 [rows, n]: the same memory as a tensor."""
    return torch.frombuffer(data, dtype=torch.uint8).view(rows, -1)


def and_more(bad: Tensor) -> str:
    """What a message adds to the first of the true ones."""
    others = int(bad.sum()) - 1
    return f", and {others:,} more near it" if others else ""


def require_finite_scales(
    reader: Reader, step: Step, scales: Tensor, block_row: int, scale_2: float = 1.0
) -> None:
    """raises NotFinite for a scale that is NaN or infinite. block_row: of the first row of scales"""
    assert step.quant is not None
    if scales.dtype == torch.float32:
        bad = ~scales.isfinite()
    elif step.quant.per_tensor:
        bad = ((scales & 0x7F) == 0x7F) | (not math.isfinite(scale_2))
    else:
        bad = scales == formats.E8M0_NAN
    if bool(bad.any()):
        at_row, at_col = bad.nonzero()[0].tolist()
        raise NotFinite(
            f"a scale of {step.name!r} is NaN or infinite",
            file=reader.shard_of(str(step.scale)),
            found=f"block ({block_row + at_row}, {at_col}){and_more(bad)}",
            do=f"download the shard again; to convert it as it is: --allow-nan {step.name}",
        )


def lost_values(inputs: Inputs, step: Step, first: int, rows: int, lost_rc: Tensor) -> int:
    """FP4 values that are not zero, in blocks whose scale is lost."""
    assert step.quant is not None
    codes = inputs.codes(step, first, rows)
    counts = ((codes & 7) != 0).to(torch.int32) + ((codes >> 4 & 7) != 0).to(torch.int32)
    width = step.quant.block.cols // step.quant.codes_per_element
    padded = torch.nn.functional.pad(counts, (0, lost_rc.shape[1] * width - counts.shape[1]))
    per_block = torch.unflatten(padded, 1, (-1, width)).sum(2)
    return int(per_block[lost_rc].sum())


def exponent_of(inputs: Inputs, step: Step) -> int:
    """kmax of FP4 matrices under one scale; all-zero blocks are left out where they would matter.

    Told from scales if possible.
    """
    scales = [inputs.scales_of(matrix) for matrix in step.shared]
    kmax = recast.nvfp4_exponent(scales)
    if not any(bool(recast.nvfp4_scales(item, kmax).lost_rc.any()) for item in scales):
        return kmax
    codes = [inputs.codes(matrix, 0, matrix.rows).clone() for matrix in step.shared]
    return recast.nvfp4_exponent(scales, codes)


def nvfp4_scales(step: Step, scales: Tensor, kmax: int) -> recast.NvScales:
    """E4M3 scales of the rows that have these FP4 scales; a last block cut off by the edge has fewer."""
    assert step.target is not None
    made = recast.nvfp4_scales(scales, kmax)
    return made._replace(scale=made.scale[:, : formats.ceil_div(step.columns, step.target.block.cols)])


def tile_scales(inputs: Inputs, step: Step, first: int, rows: int) -> recast.Tiles:
    """Scales of the FP8 tiles over some rows of FP4 blocks. All-zero blocks are left out where they would matter."""
    assert step.quant is not None and step.target is not None
    scales = inputs.scales(step, first, rows)
    tiles = recast.fp8_tiles(scales, step.quant.block, step.target.block)
    hard = (tiles.gap_rc > recast.FP8_LOSSLESS_GAP) | tiles.low_rc
    if not bool(hard.any()):
        return tiles
    fine = recast.fp8_tiles(scales, step.quant.block, step.target.block, inputs.codes(step, first, rows))
    pairs = zip(fine, tiles, strict=True)
    return recast.Tiles(*(torch.where(hard, mine, plain) for mine, plain in pairs))


def as_stored_scales(step: Step, scales: Tensor) -> Tensor:
    """Scales in the dtype of the output. raises NotLossless for an F32 scale that is no power of two"""
    assert step.target is not None
    if step.target.scale == "F32":
        return scales if scales.dtype == torch.float32 else recast.e8m0_to_f32(scales)
    if scales.dtype != torch.float32:
        return scales
    made = recast.f32_to_e8m0(scales)
    if bool(made.bad.any()):
        row, col = made.bad.nonzero()[0].tolist()
        raise NotLossless(
            f"a scale of {step.name!r} is no power of two: E8M0 cannot hold it",
            found=f"{float(scales[row, col])!r} for block ({row}, {col}){and_more(made.bad)}",
            do="keep F32 scales: --to fp8-f32scale; or quantize anew, which rounds values: --allow-lossy",
        )
    return made.scale_rc
