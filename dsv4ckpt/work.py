"""Carries out the steps of one output file: read -> decode or recast -> write.  Knows no directories.

Memory is bounded: a step passes in pieces of a few million values and chunks of one million, whatever its size.
Turning values back into codes is requantize.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import codec, encode, formats, recast
from .desk import Desk, edited
from .errors import NotFinite
from .formats import Quant
from .inputs import (
    as_rows,
    as_stored_scales,
    lost_values,
    nvfp4_scales,
    require_finite_scales,
    tile_scales,
)
from .requantize import Encoder
from .roundtrip import Recorder, bytes_of, carries_codes, decoded_rows, ruled_scales
from .sidecar import piece_rows
from .source import Landing
from .steps import Op, PlannedTensor, Step

_CHUNK_VALUES = 1024 * 1024  # decoded at a time: fits the second-level cache together with its index
_COPY_BYTES = 4 * 1024 * 1024
_SCALE_ROWS = 4096  # rows of scales taken at a time
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def chunk_rows(row: int, rows: int, row_values: int, block_rows: int, most: int) -> int:
    """Rows to take next: about _CHUNK_VALUES and at most `most`; whole tiles, or rows within one tile."""
    most = min(most, max(1, _CHUNK_VALUES // row_values), rows - row)
    into = row % block_rows
    if into or most < block_rows:
        return min(most, block_rows - into)
    return most if most == rows - row else most - most % block_rows


class Worker:
    """Turns steps into bytes of one output file, and into records of what they were."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._inputs, self._sink = desk, desk.inputs, desk.sink
        self._reader, self._values, self._encoder = desk.inputs.reader, Landing(), Encoder(desk)
        self._landing = Landing()

    def carry_out(self, step: Step, tensor: PlannedTensor, begins: dict[str, int]) -> None:
        """begins: where the file's tensors begin, for what is not made in order."""
        if step.op not in (Op.NUMBER, Op.NVFP4_SCALE_2) and not step.is_released:
            self._reader.will_need(step.source, step.begin * step.row_bytes, step.rows * step.row_bytes)
        if step.op is Op.COPY:
            self._copy(step, tensor)
        elif step.op is Op.DECODE:
            self._decode(step)
        elif step.op is Op.RECAST:
            self._recast(step)
        elif step.op is Op.ENCODE:
            self._encoder.encode(step, begins)
        elif step.op is Op.NUMBER:
            self._write(torch.tensor([step.number], dtype=torch.float32))
        elif step.op is Op.NVFP4_SCALE_2:
            scale_2 = recast.nvfp4_scale_2(self._encoder.shared_exponent(step))
            self._write(torch.tensor([scale_2], dtype=torch.float32))
        else:
            self._scales(step)

    def _write(self, tensor: Tensor) -> memoryview:
        data = bytes_of(tensor)
        self._sink.write(data)
        self._desk.on_bytes(len(data))
        return data

    def _recorder(self, step: Step) -> Recorder | None:
        """Only what holds values is recorded; scales belong to it."""
        return None if self._desk.part is None or step.is_scale else Recorder(step)

    def _pieces(self, step: Step) -> list[tuple[int, int]]:
        """(first row, rows) of what is recorded as one."""
        return formats.spans(step.rows, step.rows if step.quant is None else piece_rows(step.columns))

    def _finish(self, recorder: Recorder | None) -> None:
        if recorder and self._desk.part:
            self._desk.part.add(recorder.record)

    # -- bytes as they are

    def _copy(self, step: Step, tensor: PlannedTensor) -> None:
        recorder = self._recorder(step)
        compares = self._desk.knowledge and step.quant is None and not step.is_scale and not step.is_released
        digest = hashlib.sha256() if compares else None
        for first, rows in self._pieces(step):
            data = memoryview(b"")
            for data in self._copied(step, tensor, first, rows):
                if recorder:
                    recorder.copied(data)
                if digest:
                    digest.update(data)
            if recorder:
                has_scales = step.quant is not None and step.scale is not None
                scales = self._inputs.scales(step, first, rows) if has_scales else None
                if recorder.wants_rule and scales is not None and step.quant:
                    codes = as_rows(data, rows)  # a piece of codes came in one
                    recorder.ruled(encode.fp4_grid_scale_of_codes(codes, scales, step.quant.block))
                recorder.end_piece(scales)
        self._finish(recorder)
        if digest and self._desk.knowledge:
            same = self._desk.knowledge.is_untouched(step.name, digest.digest())
            if same is False and self._desk.rules.is_vouched:
                raise edited(step, "other bytes")
            self._desk.notes.untouched += same is True
            self._desk.notes.changed += same is False

    def _copied(self, step: Step, tensor: PlannedTensor, first: int, rows: int) -> Iterator[memoryview]:
        """Stored bytes become output bytes; they are shown on the way, codes a piece at a time."""
        reader = self._desk.released if step.is_released and self._desk.released else self._reader
        begin, size = first * step.row_bytes, rows * step.row_bytes
        dtype = None if step.quant else _FLOATS.get(tensor.dtype)
        for skipped, count in formats.spans(size, max(1, size) if step.quant else _COPY_BYTES):
            self._desk.stop.check()
            at = begin + skipped
            data = reader.read(step.source, step.begin * step.row_bytes + at, count, self._landing)
            if dtype is not None:
                values = torch.frombuffer(data, dtype=dtype)
                width = values.element_size()
                num_bad = codec.count_not_finite(values)
                self._note_not_finite(step, values, num_bad, at // width, step.row_bytes // width)
            self._sink.write(data)
            self._desk.on_bytes(count)
            yield data

    # -- codes to values

    def _decode(self, step: Step) -> None:
        assert step.quant is not None
        recorder = self._recorder(step)
        scale_2 = self._inputs.number(step.per_tensor[0]) if step.per_tensor else 1.0
        for first, rows in self._pieces(step):
            scales, stored = self._inputs.scales(step, first, rows), self._inputs.stored(step, first, rows)
            codes = as_rows(stored, rows)
            if recorder:
                recorder.codes(stored)
            row, not_finite = first, 0
            while row < first + rows:
                self._desk.stop.check()
                count, bad = self._decode_chunk(step, codes, scales, scale_2, first, row, recorder)
                not_finite += bad
                row += count
            if recorder:
                keeps = bool(not_finite) or not carries_codes(scales, step.quant)
                recorder.end_piece(None if step.scale is None else scales, bytes(stored) if keeps else b"")
        self._finish(recorder)

    def _decode_chunk(
        self,
        step: Step,
        piece_codes: Tensor,
        scales: Tensor,
        scale_2: float,
        first: int,
        row: int,
        recorder: Recorder | None,
    ) -> tuple[int, int]:
        """Decode some rows, from `row` on, of the piece that begins at `first`.

        returns   how many rows; how many values are not finite
        """
        assert step.quant is not None
        rows = piece_codes.shape[0]
        height = step.quant.block.rows
        room = self._sink.room()
        fitting = len(room) // (2 * step.columns)
        direct = fitting > 0 and _is_aligned(room)
        count = chunk_rows(row - first, rows, step.columns, height, fitting if direct else 1)
        size = 2 * step.columns * count
        data = room[:size] if direct else self._values.take(size)[:size]
        values = torch.frombuffer(data, dtype=torch.bfloat16).view(count, step.columns)
        codes = piece_codes[row - first : row - first + count]
        mine = scales[formats.block_rows_of(row - first, count, step.quant.block)]
        decoded = decoded_rows(codes, mine, step.quant, values, scale_2)
        self._desk.notes.not_exact += decoded.num_inexact
        if decoded.num_not_finite:
            self._require_finite(step, mine, row // height, scale_2)
            self._note_not_finite(step, values, decoded.num_not_finite, row * step.columns, step.columns)
        if recorder:
            recorder.converted(data)
            if recorder.wants_rule:
                recorder.ruled(_ruled(codes, mine, values, step.quant))
        if direct:
            self._sink.advance(size)
        else:  # a row that crosses the end of the slab
            self._sink.write(data)
        self._desk.on_bytes(size)
        return count, decoded.num_not_finite

    # -- codes to codes

    def _recast(self, step: Step) -> None:
        """FP4 codes to FP8 codes of the same values."""
        assert step.quant is not None and step.target is not None
        tile = step.target.block
        recorder = self._recorder(step)
        for first, rows in self._pieces(step):
            scales = self._inputs.scales(step, first, rows)
            tiles = tile_scales(self._inputs, step, first, rows).scale_rc
            stored = self._inputs.stored(step, first, rows)
            codes = as_rows(stored, rows)
            if recorder:
                recorder.codes(stored)
            row = 0
            while row < rows:
                self._desk.stop.check()
                count = chunk_rows(row, rows, step.columns, tile.rows, rows)
                under = tiles[formats.block_rows_of(row, count, tile)]
                mine, chunk = scales[row : row + count], codes[row : row + count]
                made = recast.fp4_to_fp8(chunk, mine, step.quant.block, under, tile)
                self._desk.notes.not_exact += made.num_changed
                data = self._write(made.codes)
                if recorder:
                    recorder.converted(data)
                    recorder.ruled(encode.fp4_grid_scale_of_codes(chunk, mine, step.quant.block))
                row += count
            if recorder:
                recorder.end_piece(scales)
        self._finish(recorder)

    def _scales(self, step: Step) -> None:
        """Scales of codes that stay, or that _recast makes."""
        assert step.quant is not None and step.target is not None
        if step.op is Op.NVFP4_SCALES:
            kmax = self._encoder.shared_exponent(step)
            for first, rows in formats.spans(step.rows, _SCALE_ROWS):
                self._desk.stop.check()
                made = nvfp4_scales(step, self._inputs.scales(step, first, rows), kmax)
                if bool(made.lost_rc.any()):
                    self._desk.notes.not_exact += lost_values(self._inputs, step, first, rows, made.lost_rc)
                self._write(made.scale)
            return
        height = step.target.block.rows if step.op is Op.TILES else step.quant.block.rows
        for first, rows in formats.spans(step.rows, max(1, _SCALE_ROWS // height) * height):
            self._desk.stop.check()
            if step.op is Op.TILES:
                scales = tile_scales(self._inputs, step, first, rows).scale_rc
            else:
                scales = self._inputs.scales(step, first, rows)
                self._require_finite(step, scales, first // height)
            self._write(as_stored_scales(step, scales))

    # -- what is not finite

    def _require_finite(self, step: Step, scales: Tensor, block_row: int, scale_2: float = 1.0) -> None:
        if step.name not in self._desk.rules.allow_nan:
            require_finite_scales(self._reader, step, scales, block_row, scale_2)

    def _note_not_finite(
        self, step: Step, values: Tensor, num_not_finite: int, first: int, cols: int
    ) -> None:
        """Count NaN and infinities where they are allowed. `first`: number of the first value within its tensor."""
        if not num_not_finite:
            return
        if step.name not in self._desk.rules.allow_nan:
            position = first + int((~values.view(-1).isfinite()).nonzero()[0])
            row, col = divmod(position, cols)
            block = (
                f", block ({row // step.quant.block.rows}, {col // step.quant.block.cols})"
                if step.quant
                else ""
            )
            raise NotFinite(
                f"{step.name!r} holds NaN or infinite values",
                file=self._reader.shard_of(step.source),
                found=f"the first at row {row}, column {col}{block if step.op is not Op.COPY else ''}",
                do=f"download the shard again; to convert it as it is: --allow-nan {step.name}",
            )
        self._desk.notes.not_finite += num_not_finite


def _ruled(codes: Tensor, scales: Tensor, values: Tensor, quant: Quant) -> Tensor:
    """What the rule will say for these values; of FP4 told from the codes, which is many times faster."""
    if quant.codes_per_element == 2:
        return encode.fp4_grid_scale_of_codes(codes, scales, quant.block)
    return ruled_scales(values, quant)


def _is_aligned(room: memoryview) -> bool:
    """Whether pairs of bfloat16 can be stored there as one 32-bit word."""
    return torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 4 == 0
