"""What turns stored bytes into output bytes: the steps, and which of them makes a tensor.  Opens no data.

A matrix is stored as codes with scales, or as values.  Each way from one form to another is a few steps that do not
know each other; no pair of formats has code of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from . import formats, shard, torchfile
from .errors import Usage
from .formats import Quant, Shape
from .inventory import Layout, Logical, Stored
from .source import Checkpoint
from .survey import Survey

_METADATA = {"format": "pt"}  # what loaders look for
_BF16_BYTES = 2


class Op(StrEnum):
    """How stored bytes become output bytes.  Conversions are composed of these, whatever their ends."""

    COPY = "copy"  # as they are
    DECODE = "decode"  # codes and scales -> BF16
    SCALES = "scales"  # E8M0 <-> F32 scales of the same codes
    RECAST = "recast"  # FP4 codes -> FP8 codes
    TILES = "tiles"  # FP4 scales -> the scales of those FP8 codes
    NVFP4_SCALES = "nvfp4 scales"  # FP4 scales -> E4M3 per 16
    NVFP4_SCALE_2 = "nvfp4 scale 2"  # and the F32 number that they are relative to
    NUMBER = "number"  # one F32 number that is known now
    ENCODE = "encode"  # values, or codes by their values -> other codes and their scales


class Matrix(NamedTuple):
    """One quantized matrix that shares a scale with another: its FP4 scales and codes, or its values."""

    source: str
    begin: int
    rows: int
    row_bytes: int
    scale: str | None
    scale_begin: int
    scale_row_bytes: int


class Step(NamedTuple):
    """Rows [begin, begin + rows) of one stored tensor, leading dimensions flattened, become output bytes.

    scale is None for what is not quantized, and for FP8 whose scales the user declared to be 1.
    """

    op: Op
    name: str  # the logical tensor, by its name in the source
    source: str
    begin: int
    rows: int
    row_bytes: int
    scale: str | None = None
    scale_begin: int = 0
    scale_row_bytes: int = 0
    quant: Quant | None = None  # of the source
    per_tensor: tuple[str, ...] = ()  # the source's further scales, as quant names them
    target: Quant | None = None  # of the output
    scale_out: str | None = None  # ENCODE: the tensor of this file that takes the scales, from this row on
    scale_out_begin: int = 0
    has_no_scales: bool = False  # ENCODE: the release has this matrix without scales, and so has the output
    shared: tuple[Matrix, ...] = ()  # NVFP4: the matrices under one weight_scale_2, this one included
    number: float = 0.0  # NUMBER
    is_released: bool = False  # COPY: the source lacks the tensor; it comes from what --source names
    leaf: str = "weight"  # which tensor of the matrix this makes, in the words of names.LEAVES

    @property
    def is_scale(self) -> bool:
        """Whether the values themselves, or their codes, are made by another step."""
        return self.leaf != "weight"

    @property
    def columns(self) -> int:
        """Values in a row."""
        if self.quant is None:
            return self.row_bytes // _BF16_BYTES
        return self.row_bytes * self.quant.codes_per_element

    @property
    def out_row_bytes(self) -> int:
        """Output bytes for one row of a step that makes rows from rows."""
        if self.op is Op.COPY:
            return self.row_bytes
        if self.op is Op.DECODE:
            return self.columns * _BF16_BYTES
        assert self.target is not None
        return formats.ceil_div(self.columns, self.target.codes_per_element)

    @property
    def out_bytes(self) -> int:
        """Output bytes of the whole step in its tensor."""
        if self.op in (Op.COPY, Op.DECODE, Op.RECAST) or (self.op is Op.ENCODE and self.leaf == "weight"):
            return self.rows * self.out_row_bytes
        if self.op in (Op.NUMBER, Op.NVFP4_SCALE_2):
            return formats.DTYPE_BITS["F32"] // 8
        assert self.target is not None
        grid = formats.scale_shape((self.rows, self.columns), self.target.block)
        return formats.stored_bytes(self.target.scale, grid)

    @property
    def inputs(self) -> frozenset[str]:
        """Stored tensors that are read for it: of the release if is_released, else of the source."""
        others = [name for matrix in self.shared for name in (matrix.source, matrix.scale)]
        return frozenset(filter(None, (self.source, self.scale, *self.per_tensor, *others)))


class PlannedTensor(NamedTuple):
    """One output tensor: its steps' results one after the other. Without steps: scales that ENCODE steps fill."""

    name: str
    dtype: str
    shape: Shape
    steps: tuple[Step, ...]
    frame: torchfile.Frame | None = None  # set: a chunk of a DCP file, with what torch.save puts around it
    offsets: Shape = ()  # of a chunk, within the tensor
    whole: Shape = ()  # the shape of that tensor

    @property
    def key(self) -> str:
        """Tells it from every other one of an output."""
        return self.name if self.frame is None else f"{self.name}{list(self.offsets)}"

    @property
    def size(self) -> int:
        """Bytes in the file. A chunk is filled up, so that the values of the next one are aligned in memory too."""
        if self.frame is None:
            return formats.stored_bytes(self.dtype, self.shape)
        return formats.ceil_div(self.frame.size, torchfile.ALIGNMENT) * torchfile.ALIGNMENT


@dataclass(frozen=True)
class PlannedFile:
    """One output shard, its tensors in the order of their bytes."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    released_header: bytes | None = None  # as the release had it; empty in DCP files; None: our canonical one

    @functools.cached_property
    def header(self) -> bytes:
        if self.released_header is not None:
            return self.released_header
        return shard.encode_header(((t.name, t.dtype, t.shape) for t in self.tensors), _METADATA)

    @functools.cached_property
    def size(self) -> int:
        return len(self.header) + sum(tensor.size for tensor in self.tensors)

    @functools.cached_property
    def begins(self) -> dict[str, int]:
        """Where each tensor, by its key, begins in the file."""
        position, found = len(self.header), {}
        for tensor in self.tensors:
            found[tensor.key] = position
            position += tensor.size
        return found

    def shards_read(self, checkpoint: Checkpoint, *, is_released: bool = False) -> frozenset[str]:
        """Shards of the source that hold the inputs, or of the release those that come from there."""
        steps = (step for tensor in self.tensors for step in tensor.steps if step.is_released is is_released)
        inputs = (name for step in steps for name in step.inputs)
        return frozenset(checkpoint.tensors[name].shard for name in inputs if name in checkpoint.tensors)

    @property
    def in_order(self) -> bool:
        """Whether bytes can be made in the order of the file. ENCODE makes codes and scales at once."""
        return not any(step.op is Op.ENCODE for tensor in self.tensors for step in tensor.steps)


class StepMaker:
    """Makes the steps of each output tensor."""

    def __init__(
        self,
        survey: Survey,
        target: Layout,
        origin: dict[str, Logical],
        *,
        input_scales: Mapping[str, float] | None,
        allow_lossy: bool,
        released: Survey | None = None,
    ) -> None:
        """
        origin        logical name in the target -> logical tensor of the source
        input_scales  None: all are 1
        released      where tensors come from that the source lacks
        """
        self._released = released
        self.survey, self.target = survey, target
        self._origin, self._input_scales, self._allow_lossy = origin, input_scales, allow_lossy

    def steps_of(self, stored: Stored, in_file: set[str]) -> tuple[Step, ...]:
        """The steps that fill one output tensor of a file that holds `in_file`."""
        made = []
        for part in stored.parts:
            step = self._step(stored, part.logical, in_file)
            if step is not None:
                made.append(step)
        return tuple(made)

    def _step(self, stored: Stored, logical: Logical, in_file: set[str]) -> Step | None:
        origin = self._origin[logical.name]
        if (
            self._released
            and self.survey.layout.weights[origin.name][0] not in self.survey.checkpoint.tensors
        ):
            layout = self._released.layout
            return self._copied_leaf(stored.leaf, origin, layout)._replace(is_released=True)
        before, after = self.survey.layout.quant(origin), self.target.quant(logical)
        op = op_of(before, after, stored.leaf, lossy=self._allow_lossy)
        if op is Op.NUMBER:
            return self._number(stored, origin)
        step = self._read(op, origin, after)._replace(leaf=stored.leaf)
        if op is Op.COPY and stored.leaf != "weight":
            return self._copied_leaf(stored.leaf, origin, self.survey.layout)
        if op in (Op.NVFP4_SCALES, Op.NVFP4_SCALE_2) or (op is Op.ENCODE and after and after.per_tensor):
            step = step._replace(shared=self._shared(origin))
        if op is not Op.ENCODE:
            return step
        scale, index = self.target.scales[logical.name]
        if scale not in self.target.stored:
            return step._replace(has_no_scales=True)
        if stored.leaf == "weight" and scale in in_file:
            return step._replace(
                scale_out=scale, scale_out_begin=self.target.stored[scale].parts[index].begin
            )
        if stored.leaf == "weight":
            return step  # the scales stand in another shard, and are made once more for it
        if self.target.weights[logical.name][0] in in_file:
            return None  # the step of the codes fills the scales too
        begin = self.target.stored[scale].parts[index].begin
        return step._replace(scale_out=scale, scale_out_begin=begin)

    def _read(self, op: Op, origin: Logical, after: Quant | None) -> Step:
        """A step that reads the whole of a logical tensor."""
        layout = self.survey.layout
        source, index = layout.weights[origin.name]
        held = layout.stored[source]
        row_bytes = formats.stored_bytes(held.dtype, held.shape[-1:] if len(held.shape) > 1 else held.shape)
        part = held.parts[index]
        step = Step(op, origin.name, source, part.begin, part.rows, row_bytes, target=after)
        quant = layout.quant(origin)
        if quant is None:
            return step
        step = step._replace(
            quant=quant,
            per_tensor=tuple(layout.per_tensor[leaf][origin.name][0] for leaf in quant.per_tensor),
        )
        scale, scale_index = layout.scales[origin.name]
        if scale not in self.survey.checkpoint.tensors:
            return step
        scales = layout.stored[scale]
        return step._replace(
            scale=scale,
            scale_begin=scales.parts[scale_index].begin,
            scale_row_bytes=formats.stored_bytes(quant.scale, scales.shape[-1:]),
        )

    def _copied_leaf(self, leaf: str, origin: Logical, layout: Layout) -> Step:
        index = {"weight": layout.weights, "scale": layout.scales, **layout.per_tensor}[leaf]
        name, number = index[origin.name]
        held = layout.stored[name]
        row_bytes = formats.stored_bytes(held.dtype, held.shape[-1:] if len(held.shape) > 1 else held.shape)
        part = held.parts[number]
        return Step(Op.COPY, origin.name, name, part.begin, part.rows, row_bytes, leaf=leaf)

    def _number(self, stored: Stored, origin: Logical) -> Step:
        step = self._read(Op.NUMBER, origin, None)._replace(leaf=stored.leaf)
        if self._input_scales is None:
            return step._replace(number=1.0)
        if stored.name not in self._input_scales:
            raise Usage(
                f"--input-scales does not name {stored.name!r}", do="name every expert, or leave it out"
            )
        return step._replace(number=self._input_scales[stored.name])

    def _shared(self, origin: Logical) -> tuple[Matrix, ...]:
        """w1 and w3 of an expert are multiplied as one matrix: they share weight_scale_2."""
        head, _, matrix = origin.name.removesuffix(".weight").rpartition(".")
        both = ("w1", "w3") if matrix in ("w1", "w3") else (matrix,)
        found = []
        for name in both:
            step = self._read(Op.COPY, origin._replace(name=f"{head}.{name}.weight"), None)
            found.append(
                Matrix(
                    step.source,
                    step.begin,
                    step.rows,
                    step.row_bytes,
                    step.scale,
                    step.scale_begin,
                    step.scale_row_bytes,
                )
            )
        return tuple(found)


def op_of(before: Quant | None, after: Quant | None, leaf: str, *, lossy: bool) -> Op:
    """What makes one of the tensors of a quantized matrix from another way to store it."""
    if after is None:
        return Op.COPY if before is None else Op.DECODE
    if leaf == "input_scale" and not (before and before.per_tensor):
        return Op.NUMBER
    if before is None:
        return _of_encoding(leaf)
    if before.codes_per_element == after.codes_per_element == 2:
        if bool(before.per_tensor) == bool(after.per_tensor):
            return Op.COPY
        if before.per_tensor:
            return Op.ENCODE
        return {"weight": Op.COPY, "scale": Op.NVFP4_SCALES, "scale_2": Op.NVFP4_SCALE_2}[leaf]
    if before.codes_per_element == after.codes_per_element and before.block == after.block:
        rounds = before.scale == "F32" and after.scale != "F32"  # an F32 scale need not be a power of two
        if rounds and lossy:
            return Op.ENCODE
        return Op.COPY if leaf == "weight" or before.scale == after.scale else Op.SCALES
    if before.codes_per_element == 2 and not before.per_tensor:
        return Op.RECAST if leaf == "weight" else Op.TILES
    return _of_encoding(leaf)


def _of_encoding(leaf: str) -> Op:
    return Op.NVFP4_SCALE_2 if leaf == "scale_2" else Op.ENCODE


def rows_of_step(step: Step, first: int, rows: int) -> Step:
    """The part of a copying or decoding step that makes some of its rows. first: of a row of blocks"""
    assert step.op in (Op.COPY, Op.DECODE) and first + rows <= step.rows
    height = step.quant.block.rows if step.quant else 1
    assert first % height == 0
    return step._replace(begin=step.begin + first, rows=rows, scale_begin=step.scale_begin + first // height)


def carried(checkpoint: Checkpoint, name: str) -> PlannedTensor:
    entry = checkpoint.tensors[name].entry
    step = Step(Op.COPY, name, name, 0, 1, entry.end - entry.begin)
    return PlannedTensor(name, entry.dtype, entry.shape, (step,))
