"""How tensors are laid into the files of a torch DCP directory: chunks that a rank's slice is made of.  Opens no data.

A reader takes whole chunks, so they are small enough that 64 ranks read little more than their own, and stand one
after the other: what a rank wants of fused experts is one run of bytes.  An expert is divided only where it is larger
than a chunk may be, and quantized matrices only between rows of blocks.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Iterable, Iterator

from . import formats, torchfile
from .dcp_metadata import Chunk, DcpTensor, Place, encode_metadata
from .inventory import Stored
from .steps import PlannedFile, PlannedTensor, Step, StepMaker, carried, rows_of_step

_PARTS = 64  # of a tensor, if they are not too small: so many ranks read no more than they need
_LEAST_BYTES = 1024 * 1024  # of a chunk: each costs a reader some fraction of a millisecond


def dcp_files(
    maker: StepMaker, groups: Iterable[list[Stored]], opaque: Iterable[str], chunk_bytes: int, most_bytes: int
) -> tuple[PlannedFile, ...]:
    """The files of a DCP directory; each as large as `most_bytes` allow, and one chunk at least."""
    tensors = (stored for group in groups for stored in group)
    chunks = [chunk for stored in tensors for chunk in _chunks(maker, stored, chunk_bytes)]
    chunks += [_framed(carried(maker.survey.checkpoint, name)) for name in opaque]
    files: list[list[PlannedTensor]] = []
    size = most_bytes + 1
    for chunk in chunks:
        if size + chunk.size > most_bytes:
            files.append([])
            size = 0
        files[-1].append(chunk)
        size += chunk.size
    return tuple(PlannedFile(f"__{number}_0.distcp", tuple(held), b"") for number, held in enumerate(files))


def dcp_metadata(files: tuple[PlannedFile, ...], source: tuple[tuple[str, int, str], ...]) -> bytes:
    """`.metadata` of these files, made from this source."""
    found: dict[str, tuple[PlannedTensor, list[Chunk], list[Place]]] = {}
    for file in files:
        position = 0
        for tensor in file.tensors:
            _, chunks, places = found.setdefault(tensor.name, (tensor, [], []))
            chunks.append(Chunk(tensor.offsets, tensor.shape))
            assert tensor.frame is not None
            places.append(Place(file.name, position, tensor.frame.size))
            position += tensor.size
    tensors = {
        name: DcpTensor(tensor.dtype, tensor.whole, tuple(chunks), tuple(places))
        for name, (tensor, chunks, places) in found.items()
    }
    return encode_metadata(tensors, hashlib.sha256(repr(source).encode()).hexdigest()[:32])


def _framed(tensor: PlannedTensor) -> PlannedTensor:
    """A whole tensor as one chunk."""
    frame = torchfile.frame(tensor.dtype, tensor.shape)
    return tensor._replace(frame=frame, offsets=(0,) * len(tensor.shape), whole=tensor.shape)


def _chunks(maker: StepMaker, stored: Stored, chunk_bytes: int) -> Iterator[PlannedTensor]:
    steps = maker.steps_of(stored, set())
    dtype = "U8" if formats.DTYPE_BITS[stored.dtype] == 8 else stored.dtype  # as every trainer has it
    unit = max(step.quant.block.rows if step.quant else 1 for step in steps)
    per_entry = functools.reduce(operator.mul, stored.shape[1:-1], 1)  # rows of an expert; 1 of a matrix
    for chunk in _boxes(stored, unit, chunk_bytes):
        first = chunk.offsets[0] * per_entry if len(stored.shape) > 1 else 0
        rows = functools.reduce(operator.mul, chunk.sizes[:-1], 1)
        if len(stored.shape) == 3:
            first += chunk.offsets[1]
        mine = tuple(_cut(stored, steps, first, rows))
        frame = torchfile.frame(dtype, chunk.sizes)
        yield PlannedTensor(stored.name, dtype, chunk.sizes, mine, frame, chunk.offsets, stored.shape)


def _cut(stored: Stored, steps: tuple[Step, ...], first: int, rows: int) -> Iterator[Step]:
    """What of the steps makes these rows, leading dimensions flattened."""
    for part, step in zip(stored.parts, steps, strict=True):
        begin, end = max(first, part.begin), min(first + rows, part.begin + part.rows)
        if begin < end:
            yield rows_of_step(step, begin - part.begin, end - begin)


def _boxes(stored: Stored, unit: int, chunk_bytes: int) -> Iterator[Chunk]:
    """unit: rows that stay together"""
    shape = stored.shape
    total = formats.stored_bytes(stored.dtype, shape)
    goal = min(chunk_bytes, max(_LEAST_BYTES, total // _PARTS))
    if len(shape) < 2:
        yield Chunk((0,) * len(shape), shape)
        return
    entry = formats.stored_bytes(stored.dtype, shape[1:])
    if len(shape) == 2:
        for row, count in formats.spans(shape[0], unit * _power_of_two(goal // (unit * entry))):
            yield Chunk((row, 0), (count, shape[1]))
    elif entry <= chunk_bytes:
        for expert, count in formats.spans(shape[0], _power_of_two(goal // entry)):
            yield Chunk((expert, 0, 0), (count, *shape[1:]))
    else:
        yield from _boxes_within_experts(stored, unit, chunk_bytes)


def _boxes_within_experts(stored: Stored, unit: int, chunk_bytes: int) -> Iterator[Chunk]:
    num_experts, height, cols = stored.shape
    row_bytes = formats.stored_bytes(stored.dtype, (cols,))
    each = unit * _power_of_two(chunk_bytes // (unit * row_bytes))
    within = [part for part in stored.parts if part.begin < height]  # matrices one below the other
    for expert in range(num_experts):
        for part in within:
            for row, count in formats.spans(part.rows, each):
                yield Chunk((expert, part.begin + row, 0), (1, count, cols))


def _power_of_two(count: int) -> int:
    """The largest that is not above; 1 at least. Slices of as many ranks then end where chunks end."""
    return 1 << (max(1, count).bit_length() - 1)
