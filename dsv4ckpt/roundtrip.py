"""What a conversion remembers of codes and scales, and what that says later about values that come back.

Owns the records of the sidecar (which scales values do not tell, in which form) and the two ways to know an original:
by its sidecar, or by its files.  The rule that scales are predicted by is the quantizer's own, read backwards:
the largest FP4 scale that puts all values on the grid, the smallest FP8 scale that holds the largest value.
Source: quantization facts 5.2 and 5.5.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import codec, encode, formats
from .errors import BadSidecar, NotLossless
from .formats import Quant, Shape
from .sidecar import KEPT, RULE, UNIT, VERBATIM, Piece, Record, Sidecar, piece_rows
from .source import Landing, Reader
from .steps import Op, Step
from .survey import Survey

_EXACT_BYTES = (3, 246)  # E8M0 bytes for which bfloat16 holds every product with E4M3
_EXACT_F32 = 2.0**-117  # above it neighbouring codes stay apart in bfloat16, whatever number the scale is
_GAP_BYTES, _SCALE_BYTES = 4, 1
_CHUNK_VALUES = 1024 * 1024
_HASH_BYTES = 4 * 1024 * 1024


def has_rule(quant: Quant) -> bool:
    """Whether scales follow from values often enough that only the exceptions are kept.

    Tiles of many rows and columns have few scales: those are kept whole.
    """
    return quant.block.rows == 1 and quant.scale != "F32"


def ruled_scales(values_RC: Tensor, quant: Quant) -> Tensor:
    """The scales that the rule gives for decoded values. uint8 [r, c]"""
    if quant.codes_per_element == 2:
        return encode.fp4_grid_scale(values_RC, quant.block)
    return encode.fp8_fresh_scale(values_RC, quant.block)


def pack_exceptions(scales: Tensor, ruled: Tensor, *, every: bool = False) -> bytes:
    """Where the rule is wrong, and what is right: gaps between positions (int32), then the scale bytes."""
    scales, ruled = scales.reshape(-1), ruled.reshape(-1)
    at = torch.arange(scales.numel()) if every else (scales != ruled).nonzero().view(-1)
    if not at.numel():
        return b""
    gaps = torch.diff(at, prepend=torch.zeros(1, dtype=at.dtype)).to(torch.int32)
    return bytes(bytes_of(gaps)) + bytes(bytes_of(scales[at]))


def with_exceptions(ruled: Tensor, packed: bytes) -> Tensor | None:
    """The scales that `pack_exceptions` was given; None if the bytes cannot mean these scales."""
    if not packed:
        return ruled
    count, rest = divmod(len(packed), _GAP_BYTES + _SCALE_BYTES)
    if not count:
        return None
    gaps = torch.frombuffer(bytearray(packed[: count * _GAP_BYTES]), dtype=torch.int32)
    at = gaps.to(torch.int64).cumsum(0)
    if rest or bool((gaps < 0).any()) or int(at[-1]) >= ruled.numel():
        return None
    right = ruled.reshape(-1).clone()
    right[at] = torch.frombuffer(bytearray(packed[count * _GAP_BYTES :]), dtype=torch.uint8)
    return right.view(ruled.shape)


def carries_codes(scales: Tensor, quant: Quant) -> bool:
    """Whether bfloat16 values tell the codes again, with these scales at hand."""
    if quant.codes_per_element == 2:
        return True  # scale bytes from 0 on leave 2 significant bits
    if quant.scale == "F32":
        return bool((scales.abs() >= _EXACT_F32).all())
    return int(scales.min()) >= _EXACT_BYTES[0] and int(scales.max()) <= _EXACT_BYTES[1]


class Recorder:
    """Makes the record of one logical tensor while it is converted, piece after piece."""

    def __init__(self, step: Step) -> None:
        self._quant = step.quant
        self.record = Record(step.name, scales_are=_remembered_as(step))
        self._start()

    def _start(self) -> None:
        self._converted, self._codes = hashlib.sha256(), hashlib.sha256()
        self._ruled: list[Tensor] = []

    @property
    def wants_rule(self) -> bool:
        """Whether `ruled` must be told what the rule says for each row of scales."""
        return self.record.scales_are == RULE

    def copied(self, data: memoryview) -> None:
        """Bytes of source and output, in order."""
        self._converted.update(data)
        self._codes = self._converted

    def converted(self, data: memoryview) -> None:
        """Bytes of the output, in order."""
        self._converted.update(data)

    def codes(self, data: memoryview) -> None:
        """Codes of the source, in order."""
        self._codes.update(data)

    def ruled(self, scales: Tensor) -> None:
        """The next rows of scales as the rule gives them."""
        self._ruled.append(scales)

    def end_piece(self, scales: Tensor | None, codes: bytes = b"") -> None:
        """A piece is through.

        scales   of the source; None: it has none
        codes    of the source, if they must be kept because the values do not tell them; else empty
        """
        if self._quant is None:
            digest = self._converted.digest()
            self.record.pieces.append(Piece(digest, digest, b""))
            self._start()
            return
        stored = b"" if scales is None else bytes(bytes_of(scales))
        digests = (self._converted.digest(), self._codes.digest(), hashlib.sha256(stored).digest())
        self.record.pieces.append(Piece(*digests))
        remembered = stored if self.record.scales_are == VERBATIM else b""
        if self.wants_rule and scales is not None:
            remembered = pack_exceptions(scales, torch.cat(self._ruled), every=bool(codes))
        self.record.scales.append(remembered)
        self.record.codes.append(codes)
        self._start()


def _remembered_as(step: Step) -> str:
    """How the scales of a step's source are to be remembered."""
    if step.quant is None:
        return ""
    if step.scale is None:
        return UNIT
    if step.op is Op.COPY and not (step.target and step.target.per_tensor):
        return KEPT
    return RULE if has_rule(step.quant) else VERBATIM


# ---- the way back


class KnownPiece(NamedTuple):
    """What an original says about a piece of values."""

    untouched: bool  # the values are what the original became
    scales: Tensor | None = None  # the original's: uint8, or float32; of changed values where they are known
    codes: Tensor | None = None  # the original's own codes
    values: Tensor | None = None  # the original's own values, bfloat16: to measure what a change keeps
    hashes: Piece | None = None  # what untouched codes and scales must come out as


class Knowledge(Protocol):
    """An original, asked piece by piece."""

    def piece(
        self, name: str, first_row: int, converted: memoryview, values: Tensor, quant: Quant
    ) -> KnownPiece:
        """What is known of the rows from `first_row` on.

        converted   the bytes of the source that the values were read from
        values      bfloat16 [R, C]
        quant       how the original stores this tensor
        """

    def is_untouched(self, name: str, digest: bytes) -> bool | None:
        """Of a tensor that is not quantized: whether its bytes, of this SHA-256, are the original's; None: unknown."""


class SidecarKnowledge:
    """Knows hashes, and the scales that values do not tell."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar

    def piece(
        self, name: str, first_row: int, converted: memoryview, values: Tensor, quant: Quant
    ) -> KnownPiece:
        sidecar, where = self._sidecar, self._sidecar.where.get(name)
        number = first_row // piece_rows(values.shape[1])
        if where is None or number >= where.num_pieces or not where.scales_are:
            raise _foreign(f"it does not know the rows from {first_row} on of {name!r}")
        hashes = sidecar.pieces(name)[number]
        untouched = hashlib.sha256(converted).digest() == hashes.converted
        grid = formats.scale_shape((values.shape[0], values.shape[1]), quant.block)
        if where.scales_are == UNIT:
            return KnownPiece(
                untouched, codec.unit_scale(*grid), self._codes(name, number, values, quant), None, hashes
            )
        if where.scales_are == KEPT or (where.scales_are == RULE and not untouched):
            return KnownPiece(False)
        size = formats.stored_bytes(quant.scale, grid)
        most = max(size, (_GAP_BYTES + _SCALE_BYTES) * formats.num_elements(grid))
        packed = sidecar.scales(name, number, most)
        codes = self._codes(name, number, values, quant) if untouched else None
        if where.scales_are == RULE and quant.codes_per_element == 2 and codes is None:
            scales, codes = _untouched_fp4(values, quant, packed)
        elif where.scales_are == RULE:
            scales = with_exceptions(ruled_scales(values, quant), packed)
        else:
            scales = _as_scales(packed, quant, grid) if len(packed) == size else None
        if scales is None or (untouched and codes is None and not are_usable(scales)):
            raise _foreign(f"its scales of {name!r} are not {list(grid)}")
        return KnownPiece(untouched, scales, codes, None, hashes if untouched else None)

    def _codes(self, name: str, number: int, values: Tensor, quant: Quant) -> Tensor | None:
        shape = formats.codes_shape((values.shape[0], values.shape[1]), quant)
        packed = self._sidecar.codes(name, number, formats.num_elements(shape))
        if packed is None:
            return None
        if len(packed) != formats.num_elements(shape):
            raise _foreign(f"its codes of {name!r} are not {list(shape)}")
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(shape)

    def is_untouched(self, name: str, digest: bytes) -> bool | None:
        if name not in self._sidecar.where:
            return None
        pieces = self._sidecar.pieces(name)
        return len(pieces) == 1 and pieces[0].converted == digest


def _untouched_fp4(values: Tensor, quant: Quant, packed: bytes) -> tuple[Tensor | None, Tensor | None]:
    """(scales, codes) of values that lie on their grids; the slow twin is ruled_scales and encode_fp4."""
    spans = chunks(values.shape[0], values.shape[1], quant.block.rows)
    peaked = [encode.fp4_peaked(values[begin : begin + count], quant.block) for begin, count in spans]
    if any(part is None for part in peaked):
        return with_exceptions(ruled_scales(values, quant), packed), None
    found = [part for part in peaked if part is not None]
    ruled = torch.cat([encode.fp4_grid_scale_of_codes(*part, quant.block) for part in found])
    scales = with_exceptions(ruled, packed)
    if scales is None:
        return None, None
    mine = zip(found, spans, strict=True)
    codes = [
        encode.fp4_under(part, scales[begin : begin + count], quant.block) for part, (begin, count) in mine
    ]
    return scales, torch.cat(codes)


def are_usable(scales: Tensor) -> bool:
    """Whether values can be divided by them."""
    if scales.dtype == torch.float32:
        return bool((scales.isfinite() & (scales != 0)).all())
    return not bool((scales == formats.E8M0_NAN).any())


def chunks(rows: int, cols: int, height: int, first: int = 0) -> list[tuple[int, int]]:
    """(first row, rows) of chunks of about a million values that are whole rows of blocks, from row `first` on.

    A chunk that begins within a block ends with it.
    """
    most = max(1, _CHUNK_VALUES // max(1, cols) // height) * height
    head = min(-first % height, rows)  # what is left of the block that `first` stands in
    found = [(first, head)] if head else []
    return found + [(first + head + begin, count) for begin, count in formats.spans(rows - head, most)]


def _foreign(what: str) -> BadSidecar:
    return BadSidecar(
        f"the round-trip sidecar does not belong to this checkpoint: {what}",
        do="use the one that its own conversion wrote, or the released checkpoint: --source DIR",
    )


def _as_scales(data: bytes, quant: Quant, grid: Shape) -> Tensor:
    dtype = torch.float32 if quant.scale == "F32" else torch.uint8
    return torch.frombuffer(bytearray(data), dtype=dtype).view(grid)


class SourceKnowledge:
    """Knows everything: reads the original's codes and scales, and decodes them."""

    def __init__(self, survey: Survey, reader: Reader) -> None:
        self._survey, self._reader = survey, reader
        self._codes, self._scales = Landing(), Landing()  # of the last piece

    def piece(
        self,
        name: str,
        first_row: int,
        converted: memoryview,  # noqa: ARG002 - the values themselves are compared
        values: Tensor,
        quant: Quant,
    ) -> KnownPiece:
        rows, cols = values.shape
        layout = self._survey.layout
        shape = formats.codes_shape((rows, cols), quant)
        codes = self._read(layout.weights[name][0], first_row * shape[1], torch.uint8, shape, self._codes)
        grid = formats.scale_shape((rows, cols), quant.block)
        scale_name = layout.scales[name][0]
        if scale_name in self._survey.checkpoint.tensors:
            dtype = torch.float32 if quant.scale == "F32" else torch.uint8
            at = first_row // quant.block.rows * formats.stored_bytes(quant.scale, grid[1:])
            scales = self._read(scale_name, at, dtype, grid, self._scales)
        else:
            scales = codec.unit_scale(*grid)
        original = decoded_rows(codes, scales, quant).values
        if torch.equal(original.view(torch.int16), values.view(torch.int16)):
            return KnownPiece(True, scales, codes)
        return KnownPiece(False, scales, None, original)

    def _read(self, name: str, offset: int, dtype: torch.dtype, shape: Shape, landing: Landing) -> Tensor:
        data = self._reader.read(name, offset, formats.num_elements(shape) * dtype.itemsize, landing)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def is_untouched(self, name: str, digest: bytes) -> bool | None:
        if name not in self._survey.checkpoint.tensors:
            return None
        entry = self._survey.checkpoint.tensors[name].entry
        size, found = entry.end - entry.begin, hashlib.sha256()
        for offset, count in formats.spans(size, _HASH_BYTES):
            found.update(self._reader.read(name, offset, count, self._codes))
        return found.digest() == digest


def decoded_rows(
    codes: Tensor, scales: Tensor, quant: Quant, out: Tensor | None = None, scale_2: float = 1.0
) -> codec.Decoded:
    """bfloat16 values of codes, however they are stored."""
    if quant.per_tensor:
        return codec.decode_nvfp4(codes, scales, scale_2, quant.block, out)
    decode = codec.decode_fp4 if quant.codes_per_element == 2 else codec.decode_fp8
    return decode(codes, scales, quant.block, out)


def bytes_of(tensor: Tensor) -> memoryview:
    """A copy of the bytes of a tensor. (torch hands out views of its own memory through numpy only.)"""
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return memoryview(data)


def encoded(values: Tensor, scales: Tensor, quant: Quant, out: Tensor | None = None) -> Tensor:
    """The codes of values under given scales."""
    if quant.codes_per_element == 2:
        return encode.encode_fp4(values, scales, quant.block, out)
    return encode.encode_fp8(values, scales, quant.block, out)


# ---- what a change loses


@dataclass
class Loss:
    """How one tensor's values came through quantization. Sums over its values, in float64."""

    name: str
    num_blocks: int = 0
    num_same_blocks: int = 0  # held exactly; where the original is known: with its values again
    num_inexact: int = 0  # values
    error: float = 0.0  # sum of squares of what the codes miss
    energy: float = 0.0  # and of the values
    change: float = 0.0  # sum of squares of what training changed; 0: unknown
    kept: float = 0.0  # that change projected on what is left of it
    kept_fp8: float = 0.0  # the same if the experts were stored as FP8
    is_measured: bool = True  # the original values were at hand for all that changed

    def add_untouched(self, num_blocks: int) -> None:
        """Blocks in pieces of the tensor that nobody touched."""
        self.num_blocks += num_blocks
        self.num_same_blocks += num_blocks

    @property
    def kept_share(self) -> float | None:
        """Of the change, what survives: 1 all of it, 0 nothing; None: not measured."""
        return self.kept / self.change if self.is_measured and self.change else None

    @property
    def relative_error(self) -> float:
        return (self.error / self.energy) ** 0.5 if self.energy else 0.0


LossRow = list[float | str | bool]


@dataclass
class Losses:
    """Of all tensors of one file that were not untouched."""

    by_name: dict[str, Loss] = field(default_factory=dict)

    def of(self, name: str) -> Loss:
        return self.by_name.setdefault(name, Loss(name))

    def rows(self) -> list[LossRow]:
        """For the journal, as plain lists."""
        return [list(loss.__dict__.values()) for loss in self.by_name.values()]


def loss_of_row(row: LossRow) -> Loss:
    return Loss(*row)  # type: ignore[arg-type]


def measure(
    loss: Loss,
    values: Tensor,
    codes: Tensor,
    scales: Tensor,
    quant: Quant,
    original: Tensor | None,
    alternative: Quant | None,
) -> None:
    """Add some rows to a loss.

    original      the values before training, bfloat16 [R, C]; None: unknown
    alternative   FP8 tiles, to tell what those would keep
    """
    found = decoded_rows(codes, scales, quant).values
    same = (found == values) | (found.isnan() & values.isnan())
    compared = same if original is None else found == original  # a zero may have changed its sign
    loss.num_blocks += formats.num_elements(
        formats.scale_shape((values.shape[0], values.shape[1]), quant.block)
    )
    loss.num_same_blocks += _whole_blocks(compared, quant)
    inexact = int(same.numel() - same.sum())
    loss.num_inexact += inexact
    wide = values.to(torch.float32)
    loss.energy += _squares(wide)
    if inexact:
        loss.error += _squares(found.to(torch.float32) - wide)
    if original is None:
        loss.is_measured = loss.is_measured and not inexact
        return
    base = original.to(torch.float32)
    delta = wide - base
    loss.change += _squares(delta)
    loss.kept += _dot(found.to(torch.float32) - base, delta)
    if alternative is not None:
        fp8 = encode.fp8_fresh_scale(values, alternative.block)
        held = codec.decode_fp8(
            encode.encode_fp8(values, fp8, alternative.block), fp8, alternative.block
        ).values
        loss.kept_fp8 += _dot(held.to(torch.float32) - base, delta)


def _squares(values: Tensor) -> float:
    return _dot(values, values)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.to(torch.float64) * b.to(torch.float64)).sum())


def _whole_blocks(same_RC: Tensor, quant: Quant) -> int:
    """Blocks in which every value is the same."""
    rows, cols = same_RC.shape
    grid = formats.scale_shape((rows, cols), quant.block)
    padded = torch.ones((grid[0] * quant.block.rows, grid[1] * quant.block.cols), dtype=torch.bool)
    padded[:rows, :cols] = same_RC
    tiles = padded.view(grid[0], quant.block.rows, grid[1], quant.block.cols)
    return int(tiles.all(3).all(1).sum())


def require_measured(loss: Loss) -> None:
    """raises NotLossless where values are lost and nothing tells how much that matters"""
    if loss.num_inexact and not loss.is_measured:
        raise NotLossless(
            f"{loss.name!r} does not fit into the codes: values would be rounded, and what that costs is unknown",
            found=f"{loss.num_inexact:,} rounded values in its first rows, relative error {loss.relative_error:.2e}",
            do="--to native --source RELEASE measures the loss; or accept it unmeasured: --allow-lossy; or lose "
            "nothing: --to bf16",
        )
