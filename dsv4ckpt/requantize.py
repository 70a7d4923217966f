"""Values -> codes and scales, piece by piece: restored where they are untouched, quantized where they changed.

Untouched means that an original (sidecar or source) recognises the very bytes; then its codes and scales come out
again and are hashed again.  Everything else gets scales by a policy, and is measured.
Source: quantization facts 5.5 (grid inference) and 6 (levels 1-4), training facts 6 (why scales are kept).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from . import codec, encode, formats, recast
from .desk import Desk, edited
from .errors import BadSidecar, NotFinite, NotLossless
from .formats import E8M0_NAN, FP4_EXPERT, FP8_TILE, Quant
from .inputs import as_rows, exponent_of, nvfp4_scales, require_finite_scales
from .plan import ScalePolicy
from .roundtrip import (
    KnownPiece,
    are_usable,
    bytes_of,
    chunks,
    decoded_rows,
    encoded,
    measure,
    require_measured,
)
from .sidecar import piece_rows
from .steps import Matrix, Step

_NOTHING = KnownPiece(False)
_NO_SCALES = hashlib.sha256(b"").digest()  # of a matrix that the release has without scales


class Made(NamedTuple):
    """Codes and scales of a piece."""

    codes: Tensor  # uint8
    scales: Tensor  # uint8 E8M0, or float32


class Encoder:
    """The ENCODE steps of one output file."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._exponents: dict[tuple[Matrix, ...], int] = {}
        self._buffer = torch.empty(
            0, dtype=torch.bfloat16
        )  # decoded values of one piece; fresh pages are slow

    def encode(self, step: Step, begins: dict[str, int]) -> None:
        """Write codes at the sink's position, and scales where the file wants them; a scale step writes no codes."""
        assert step.target is not None
        desk, working = self._desk, _working(step.target)
        kmax = self.shared_exponent(step) if step.target.per_tensor else 0
        touched, num_blocks = False, 0
        for first, rows in formats.spans(step.rows, piece_rows(step.columns)):
            raw_bytes, values, num_inexact = self._values(step, first, rows)
            desk.notes.not_exact += num_inexact
            known = self._ask(step, first, raw_bytes, values, working)
            if known.untouched:
                made = self._restore(step, values, known, working)
                num_blocks += made.scales.numel()
            else:
                touched = True
                made = self._quantize(step, first, values, known, working)
            if not step.is_scale:
                desk.sink.write(bytes_of(made.codes))
                desk.on_bytes(made.codes.numel())
            if step.scale_out is not None:
                self._put_scales(step, begins, first, made, kmax)
        if touched and not step.is_scale:
            desk.notes.losses.of(step.name).add_untouched(num_blocks)
        if desk.knowledge and not step.is_scale:
            desk.notes.untouched += not touched
            desk.notes.changed += touched

    # -- what comes in

    def _values(self, step: Step, first: int, rows: int) -> tuple[memoryview, Tensor, int]:
        """The stored bytes of some rows, what they mean as bfloat16 [rows, C], and how many of those are rounded.

        raises NotFinite, Interrupted
        """
        desk, num_inexact = self._desk, 0
        desk.stop.check()
        data = desk.inputs.stored(step, first, rows)
        stored = as_rows(data, rows)
        if step.quant is None:
            values = stored.view(torch.bfloat16)
        else:
            scale_2 = desk.inputs.number(step.per_tensor[0]) if step.per_tensor else 1.0
            scales = desk.inputs.scales(step, first, rows)
            require_finite_scales(desk.inputs.reader, step, scales, first // step.quant.block.rows, scale_2)
            if self._buffer.numel() < rows * step.columns:
                self._buffer = torch.empty(rows * step.columns, dtype=torch.bfloat16)
            values = self._buffer[: rows * step.columns].view(rows, step.columns)
            for begin, count in chunks(rows, step.columns, step.quant.block.rows):
                mine = scales[formats.block_rows_of(begin, count, step.quant.block)]
                chunk = slice(begin, begin + count)
                decoded = decoded_rows(stored[chunk], mine, step.quant, values[chunk], scale_2)
                num_inexact += decoded.num_inexact
        return data, values, num_inexact

    def _ask(
        self, step: Step, first: int, raw_bytes: memoryview, values: Tensor, working: Quant
    ) -> KnownPiece:
        if self._desk.knowledge is None:
            return _NOTHING
        return self._desk.knowledge.piece(step.name, first, raw_bytes, values, working)

    # -- untouched

    def _restore(self, step: Step, values: Tensor, known: KnownPiece, working: Quant) -> Made:
        """The original's codes and scales; hashed again where only hashes are known of them. raises BadSidecar"""
        assert known.scales is not None
        codes = known.codes
        if codes is None:
            codes = self._codes(values, known.scales, working)
        if known.hashes:
            stored = b"" if known.hashes.scales == _NO_SCALES else bytes_of(known.scales)
            found = (hashlib.sha256(bytes_of(codes)).digest(), hashlib.sha256(stored).digest())
            if found != (known.hashes.codes, known.hashes.scales):
                raise BadSidecar(
                    f"{step.name!r} does not come out as it was, although its values are untouched",
                    expected=f"codes {known.hashes.codes.hex()[:16]}..., scales {known.hashes.scales.hex()[:16]}...",
                    found=f"codes {found[0].hex()[:16]}..., scales {found[1].hex()[:16]}...",
                    do="the sidecar is damaged or belongs to another conversion; the release restores it: --source DIR",
                )
        return Made(codes, known.scales)

    def _codes(self, values: Tensor, scales: Tensor, working: Quant) -> Tensor:
        rows, cols = values.shape
        codes = torch.empty(formats.codes_shape((rows, cols), working), dtype=torch.uint8)
        for begin, count in chunks(rows, cols, working.block.rows):
            mine = scales[formats.block_rows_of(begin, count, working.block)]
            encoded(values[begin : begin + count], mine, working, codes[begin : begin + count])
        return codes

    # -- changed, or not known

    def _quantize(self, step: Step, first: int, values: Tensor, known: KnownPiece, working: Quant) -> Made:
        desk = self._desk
        self._require_finite(step, first, values)
        if desk.rules.is_vouched and desk.knowledge:
            raise edited(step, f"other values in the {values.shape[0]} rows from row {first} on")
        if step.has_no_scales:
            scales = codec.unit_scale(*formats.scale_shape((values.shape[0], values.shape[1]), working.block))
        else:
            scales = self._scales(values, known, working)
        codes = self._codes(values, scales, working)
        if not step.is_scale:
            self._measure(step, values, codes, scales, known, working)
        return Made(codes, scales)

    def _require_finite(self, step: Step, first: int, values: Tensor) -> None:
        if codec.count_not_finite(values):
            row, col = (~values.isfinite()).nonzero()[0].tolist()
            raise NotFinite(
                f"{step.name!r} holds NaN or infinite values: no code can hold them",
                file=self._desk.inputs.reader.shard_of(step.source),
                found=f"the first at row {first + row}, column {col}",
                do="a training run that diverged leaves such values; take a checkpoint from before",
            )

    def _scales(self, values: Tensor, known: KnownPiece, working: Quant) -> Tensor:
        """What --scale-policy says, some rows of blocks at a time."""
        made = []
        kept = known.scales if self._desk.rules.scale_policy is ScalePolicy.KEEP else None
        if kept is not None and not are_usable(kept):
            kept = None
        for begin, count in chunks(values.shape[0], values.shape[1], working.block.rows):
            self._desk.stop.check()
            source = None if kept is None else kept[formats.block_rows_of(begin, count, working.block)]
            made.append(self._scales_of_chunk(values[begin : begin + count], source, working))
        return torch.cat(made)

    def _scales_of_chunk(self, values: Tensor, source: Tensor | None, working: Quant) -> Tensor:
        """source: the scales to keep while they fit; None: fresh ones"""
        if working.codes_per_element == 2:
            if source is not None:
                return encode.kept_scale_fp4(values, source, working.block)
            fresh = encode.fp4_fresh_scale(values, working.block)
            grid = encode.fp4_grid_scale(values, working.block)
            return torch.where(grid == E8M0_NAN, fresh, grid)  # values on a grid lose nothing there
        if source is not None:
            return encode.kept_scale_fp8(values, source, working.block)
        if working.scale == "F32" and self._desk.rules.float_scales:
            return encode.fp8_fresh_scale_f32(values, working.block)
        fresh = encode.fp8_fresh_scale(values, working.block)
        return recast.e8m0_to_f32(fresh) if working.scale == "F32" else fresh

    def _measure(
        self, step: Step, values: Tensor, codes: Tensor, scales: Tensor, known: KnownPiece, working: Quant
    ) -> None:
        loss = self._desk.notes.losses.of(step.name)
        alternative = FP8_TILE if working.codes_per_element == 2 else None
        for begin, count in chunks(values.shape[0], values.shape[1], working.block.rows):
            chunk = slice(begin, begin + count)
            mine = scales[formats.block_rows_of(begin, count, working.block)]
            original = None if known.values is None else known.values[chunk]
            measure(loss, values[chunk], codes[chunk], mine, working, original, alternative)
        if not self._desk.rules.allow_lossy:
            require_measured(loss)

    # -- what goes out

    def _put_scales(self, step: Step, begins: dict[str, int], first: int, piece: Made, kmax: int) -> None:
        assert step.target is not None and step.scale_out is not None
        scales = piece.scales
        if step.target.per_tensor:
            made = nvfp4_scales(step, scales, kmax)
            lost = made.lost_rc & recast.has_values(piece.codes, FP4_EXPERT.block)  # zeros lose nothing
            if bool(lost.any()) and not self._desk.rules.allow_lossy:
                raise NotLossless(
                    f"the blocks of {step.name!r} span more exponents than NVFP4 scales can hold",
                    do="--to native or --to mxfp4-ct keep them; or accept the loss with --allow-lossy",
                )
            stored = made.scale
        elif step.target.scale == "F32" and scales.dtype != torch.float32:
            stored = recast.e8m0_to_f32(scales)
        else:
            stored = scales
        block_row = step.scale_out_begin + first // _working(step.target).block.rows
        data = bytes_of(stored)
        offset = begins[step.scale_out] + block_row * (len(data) // max(1, stored.shape[0]))
        self._desk.sink.write_at(offset, data)
        self._desk.on_bytes(len(data))

    def shared_exponent(self, step: Step) -> int:
        """The largest exponent of the matrices that share weight_scale_2."""
        found = self._exponents.get(step.shared)
        if found is None:
            self._exponents.clear()  # steps of one expert stand together
            found = self._exponents[step.shared] = self._shared_exponent(step)
        return found

    def _shared_exponent(self, step: Step) -> int:
        if step.quant is None or step.quant.codes_per_element == 1:
            found = [scales for matrix in step.shared for scales in self._encoded_scales(step, matrix)]
            counting = [scales[scales > 1] for scales in found]  # 1: what all-zero blocks get
            return recast.nvfp4_exponent(counting)
        return exponent_of(self._desk.inputs, step)

    def _encoded_scales(self, step: Step, matrix: Matrix) -> list[Tensor]:
        """The FP4 scales that a matrix of values will get."""
        matrix_step = step._replace(**matrix._asdict())
        made = []
        for first, rows in formats.spans(matrix.rows, piece_rows(matrix_step.columns)):
            _, values, _ = self._values(matrix_step, first, rows)
            self._require_finite(matrix_step, first, values)
            made.append(self._scales(values, _NOTHING, FP4_EXPERT))
        return made


def _working(target: Quant) -> Quant:
    """What is encoded first: NVFP4 scales are made of FP4 scales."""
    return FP4_EXPERT if target.per_tensor else target
