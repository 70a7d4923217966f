"""Values of a checkpoint's logical tensors, however they are stored, into memory that the caller owns.

Decodes piece by piece, so that nothing is ever held twice, and takes any range of rows.  Codes and scales can be had as
they are stored, for whoever decodes them later.  Knows no models and no outputs; the arithmetic is codec's.
"""

#  R rows, C columns of the logical tensor; a tensor of one dimension is one row;  r, c blocks along them

from __future__ import annotations

import torch
from torch import Tensor

from . import codec, formats
from .errors import NotFinite
from .formats import Quant, Storage
from .inputs import Inputs
from .inventory import lay_out
from .names import Namespace
from .roundtrip import chunks, decoded_rows
from .source import Reader
from .steps import Step, StepMaker
from .survey import Survey

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_MOST_BYTE = 246  # the largest E8M0 scale under which no code of E4M3 is beyond bfloat16
_MOST_F32 = 2.0**119  # the same for F32 scales: 448 * 2**119 is below 2**128
_MOST_FP4_BYTE = 252  # the same for E2M1: 6 * 2**125 is below 2**128


class Values:
    """Reads logical tensors, by their released names, of a checkpoint that conforms. For one thread."""

    def __init__(self, survey: Survey, reader: Reader) -> None:
        self._survey, self._reader, self._inputs = survey, reader, Inputs(reader)
        self._logicals = {logical.name: logical for logical in survey.logicals}
        table = survey.identity.release.family.table
        self._plain = lay_out(survey.logicals, table, Storage.BF16, Namespace.DEEPSEEK)
        self._maker = StepMaker(
            survey, self._plain, self._logicals, input_scales=None, allow_lossy=False
        )  # what turns each into its values is a step of the conversion to BF16
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    def quant(self, name: str) -> Quant | None:
        """How a logical tensor is stored; None: as its values."""
        return self._survey.layout.quant(self._logicals[name])

    def fill(self, name: str, out: Tensor, first: int = 0) -> None:
        """Rows of a logical tensor from `first` on, as many as `out` has.

        out     contiguous [R', C], or [C] for a tensor of one dimension; the dtype that the values have in BF16
                storage or a wider one, on any device
        exact   the values that the conversion to BF16 gives, in every dtype: decoding rounds only what bfloat16 cannot
                hold, such as products with scales that are no power of two
        raises  NotFinite, SourceChanged, Environment
        """
        step = self._step(name)
        rows_RC = out.detach().view(out.shape[0] if out.dim() > 1 else 1, -1)
        assert first + rows_RC.shape[0] <= step.rows, name
        height = step.quant.block.rows if step.quant else 1
        for row, count in chunks(rows_RC.shape[0], rows_RC.shape[1], height, first):
            piece = rows_RC[row - first : row - first + count]
            if step.quant is None:
                self._copy(step, row, piece)
            else:
                self._decode(step, step.quant, row, piece)

    def fill_raw(self, name: str, codes_out: Tensor, scales_out: Tensor, first: int = 0) -> None:
        """Codes and scales of some rows of a quantized matrix, as they are stored.

        codes_out   contiguous [R', C] of one-byte elements: E4M3, or [R', C/2] for pairs of E2M1
        scales_out  contiguous [r', c] of one-byte elements, or float32: E8M0 bytes or F32 numbers. `first` is the first
                    row of a block
        raises      NotFinite if a value that they stand for is NaN or infinite; SourceChanged, Environment
        """
        step = self._step(name)
        assert step.quant is not None and not step.quant.per_tensor and first % step.quant.block.rows == 0
        block = step.quant.block
        codes_RP, scales_rc = codes_out.view(torch.uint8), _as_stored(scales_out, step.quant)
        for row, count in chunks(codes_RP.shape[0], step.columns, block.rows, first):
            codes, scales = self._inputs.codes(step, row, count), self._inputs.scales(step, row, count)
            if not _surely_finite(codes, scales, step.quant):
                decoded = decoded_rows(codes, scales, step.quant)
                self._require_finite(step, row, decoded.values, decoded.num_not_finite)
            codes_RP[row - first : row - first + count].copy_(codes)
            scales_rc[formats.block_rows_of(row - first, count, block)].copy_(scales)

    def fill_codes(self, name: str, out: Tensor, first: int = 0) -> None:
        """Some rows of a quantized matrix's codes, as they are stored.

        out     contiguous uint8 [R', C], or [R', C/2] for pairs of E2M1; `first` may be any row
        raises  NotFinite if one of them is NaN, under whatever scale; SourceChanged, Environment
        """
        step = self._step(name)
        assert step.quant is not None
        for row, count in chunks(out.shape[0], step.columns, step.quant.block.rows, first):
            codes = self._inputs.codes(step, row, count)
            if step.quant.codes_per_element == 1 and bool(_nan_codes(codes).any()):
                self._judge(step, row, count)
            out[row - first : row - first + count].copy_(codes)

    def fill_scales(self, name: str, out: Tensor, first: int = 0) -> None:
        """Some rows of a quantized matrix's scales, as they are stored. Codes are read only where a scale is suspect.

        out     contiguous uint8 or float32 [r', c], one row for each row of blocks from `first` on
        raises  NotFinite if a value that they stand for is NaN or infinite; SourceChanged, Environment
        """
        step = self._step(name)
        assert step.quant is not None and not step.quant.per_tensor
        height = step.quant.block.rows
        for block, count in chunks(out.shape[0], out.shape[1], 1, first):
            rows = min(count * height, step.rows - block * height)
            scales = self._inputs.scales(step, block * height, rows)
            suspects = (~_modest(scales, step.quant)).any(1).nonzero().view(-1).tolist()
            out[block - first : block - first + count].copy_(scales)
            for suspect in suspects:
                row = (block + suspect) * height
                self._judge(step, row, min(height, step.rows - row))

    def _judge(self, step: Step, row: int, count: int) -> None:
        """raises NotFinite if one of the values is"""
        assert step.quant is not None
        codes, scales = self._inputs.codes(step, row, count), self._inputs.scales(step, row, count)
        decoded = decoded_rows(codes, scales, step.quant)
        self._require_finite(step, row, decoded.values, decoded.num_not_finite)

    def _step(self, name: str) -> Step:
        (step,) = self._maker.steps_of(self._plain.stored[name], {name})
        return step

    def _copy(self, step: Step, row: int, out_RC: Tensor) -> None:
        dtype = _DTYPES[self._survey.layout.stored[step.source].dtype]
        assert torch.promote_types(dtype, out_RC.dtype) == out_RC.dtype, "values would be rounded"
        data = self._inputs.stored(step, row, out_RC.shape[0])
        stored = torch.frombuffer(data, dtype=dtype).view(out_RC.shape)
        self._require_finite(step, row, stored, codec.count_not_finite(stored))
        out_RC.copy_(stored)

    def _decode(self, step: Step, quant: Quant, row: int, out_RC: Tensor) -> None:
        assert out_RC.is_floating_point() and out_RC.dtype != torch.float16, "values would be rounded"
        count, cols = out_RC.shape
        direct = out_RC.dtype == torch.bfloat16 and out_RC.device.type == "cpu"
        values = out_RC if direct else self._room(count, cols)
        scale_2 = self._inputs.number(step.per_tensor[0]) if step.per_tensor else 1.0
        scales, codes = self._inputs.scales(step, row, count), self._inputs.codes(step, row, count)
        decoded = decoded_rows(codes, scales, quant, values, scale_2)
        self._require_finite(step, row, values, decoded.num_not_finite)
        if not direct:
            out_RC.copy_(values)

    def _room(self, rows: int, cols: int) -> Tensor:
        if self._scratch.numel() < rows * cols:
            self._scratch = torch.empty(rows * cols, dtype=torch.bfloat16)
        return self._scratch[: rows * cols].view(rows, cols)

    def _require_finite(self, step: Step, first: int, values: Tensor, num_not_finite: int) -> None:
        if not num_not_finite:
            return
        row, col = (~values.isfinite()).nonzero()[0].tolist()
        others = f", and {num_not_finite - 1:,} more near it" if num_not_finite > 1 else ""
        raise NotFinite(
            f"{step.name!r} holds NaN or infinite values, in its codes or in their scales",
            file=self._reader.shard_of(step.source),
            found=f"the first at row {first + row}, column {col}{others}",
            do="download the shard again; if the release itself is like that, it cannot be run",
        )


def _as_stored(scales_out: Tensor, quant: Quant) -> Tensor:
    if quant.scale == "F32":
        assert scales_out.dtype == torch.float32
        return scales_out
    return scales_out.view(torch.uint8)


def _surely_finite(codes: Tensor, scales: Tensor, quant: Quant) -> bool:
    """Whether one look at codes and scales shows that all values are finite. False: decode them to know."""
    if not codes.numel():
        return True
    if quant.codes_per_element == 1 and bool(_nan_codes(codes).any()):
        return False
    return bool(_modest(scales, quant).all())


def _nan_codes(codes: Tensor) -> Tensor:
    """Which codes of E4M3 are NaN."""
    return (codes & 0x7F) == 0x7F


def _modest(scales: Tensor, quant: Quant) -> Tensor:
    """Which scales make of every code, NaN left aside, something that bfloat16 holds."""
    if scales.dtype == torch.float32:
        return scales.abs() <= _MOST_F32
    return scales <= (_MOST_FP4_BYTE if quant.codes_per_element == 2 else _MOST_BYTE)
