"""Tensors in memory, as a checkpoint that is read like files: released names, bytes made on demand.

So they are written by the very plan and run that convert files, tensor by tensor, without a second copy of them.  What
is not in memory (draft stages that a trainer dropped, Base's copies of embed and head) comes from the checkpoint that
the values came from.  Knows no models, no ranks and no outputs.
"""

#  R rows, C columns of a released tensor, P of its codes; one of a single dimension is one row

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import codec, formats, shard
from .formats import MODEL_NAME, Quant, Shape, Storage
from .inventory import Logical, Stored
from .shard import Entry, Header
from .source import Checkpoint, Landing, Location, Reader, Shard, Stamp
from .survey import Survey
from .values import Values

VALUE_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_TWINS = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}  # what Base repeats below mtp.0
_NUM_SAMPLES = 64
_COPY_BYTES = 4 * 1024 * 1024


class Like(NamedTuple):
    """The checkpoint that gives what is not in memory. For one thread."""

    values: Values
    reader: Reader


Rows = Callable[[Like, int, int], Tensor]  # (like, first row, rows) -> those rows, contiguous


class Held(NamedTuple):
    """A tensor as the checkpoint shows it."""

    dtype: str
    shape: Shape
    rows: Rows

    @property
    def row_bytes(self) -> int:
        return formats.stored_bytes(self.dtype, self.shape[1:] if len(self.shape) > 1 else self.shape)


class HeldCheckpoint(Checkpoint):
    """Config and small files are those of `like`; the tensors are those that are held."""

    def __init__(self, like: Survey, held: Mapping[str, Held], stamp: str | None = None) -> None:
        """stamp: what tells these values from others, the same for all ranks of a job; None: nothing does"""
        source = like.checkpoint
        super().__init__(source.small_directory, source.follow_links, source.config_bytes)
        self.like, self.held, self._stamp = like, held, stamp
        position, entries = 0, {}
        for name, tensor in held.items():
            end = position + formats.stored_bytes(tensor.dtype, tensor.shape)
            entries[name] = Entry(tensor.dtype, tensor.shape, position, end)
            self.tensors[name] = Location(MODEL_NAME, entries[name])
            position = end
        raw = shard.encode_header((name, tensor.dtype, tensor.shape) for name, tensor in held.items())
        header = Header(entries, {}, 0, hashlib.sha256(raw).hexdigest())
        self.shards[MODEL_NAME] = Shard(MODEL_NAME, header, Stamp(position, 0, 0))

    @property
    def has_sidecar(self) -> bool:
        """A sidecar speaks of BF16 values: it is carried on where `like` has them."""
        return super().has_sidecar and self.like.identity.storage is Storage.BF16

    @contextlib.contextmanager
    def reader(self, whole: Collection[str] = ()) -> Iterator[Reader]:  # noqa: ARG002 - all is at hand
        with self.like.checkpoint.reader() as files:
            yield _HeldReader(self, Like(Values(self.like, files), files))

    def stamps_sha256(self) -> str:
        """Without a stamp never the same: nothing tells whether values are still what they were."""
        return self._stamp or secrets.token_hex(32)

    def sample_sha256(self, name: str) -> str:
        """SHA-256 over the first row of evenly spread tensors."""
        assert name == MODEL_NAME
        names, digest = list(self.held), hashlib.sha256()
        with self.reader() as reader:
            for number in range(_NUM_SAMPLES):
                chosen = names[(len(names) - 1) * number // (_NUM_SAMPLES - 1)]
                data = bytearray(self.held[chosen].row_bytes)
                reader.read_into(chosen, memoryview(data), 0)
                digest.update(data)
        return digest.hexdigest()


class _HeldReader(Reader):
    """Makes the bytes of tensors. For one thread."""

    def __init__(self, checkpoint: HeldCheckpoint, like: Like) -> None:
        super().__init__(checkpoint)
        self._held, self._like = checkpoint.held, like

    def read(self, name: str, offset: int, size: int, landing: Landing) -> memoryview:
        view = landing.take(size)[:size]
        self.read_into(name, view, offset)
        return view

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        if not view:
            return
        held = self._held[name]
        first, into = divmod(offset, held.row_bytes)
        rows = held.rows(self._like, first, formats.ceil_div(into + len(view), held.row_bytes))
        data = rows.to("cpu").view(-1).view(torch.uint8)[into : into + len(view)]
        torch.frombuffer(view, dtype=torch.uint8).copy_(data)

    def will_need(self, name: str, offset: int, size: int) -> None:
        """Nothing is read from a disk."""


# ---- what may be held


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest even, once: a cast of float64 to bfloat16 would round twice."""
    return codec.to_bf16(rows) if dtype == torch.bfloat16 else rows.to(dtype)


def from_files(logical: Logical, stored: Stored, quant: Quant | None) -> Rows:
    """Of a tensor that is not in memory: values, or its codes, or its scales."""

    def values(like: Like, first: int, count: int) -> Tensor:
        shape = stored.shape if len(stored.shape) == 1 else (count, *stored.shape[1:])
        out = torch.empty(shape, dtype=VALUE_DTYPES[stored.dtype])
        like.values.fill(logical.name, out, first)
        return out

    def codes(like: Like, first: int, count: int) -> Tensor:
        return both(like, first, first + count)[0][first % height :]

    def scales(like: Like, first: int, count: int) -> Tensor:
        return both(like, first * height, min((first + count) * height, logical.shape[0]))[1]

    def both(like: Like, first: int, end: int) -> tuple[Tensor, Tensor]:
        assert quant is not None
        begin = first - first % height
        shape = end - begin, logical.shape[1]
        grid = formats.scale_shape(shape, quant.block)
        dtype = torch.float32 if quant.scale == "F32" else torch.uint8
        found = (
            torch.empty(formats.codes_shape(shape, quant), dtype=torch.uint8),
            torch.empty(grid, dtype=dtype),
        )
        like.values.fill_raw(logical.name, *found, begin)
        return found

    if quant is None:
        return values
    height = quant.block.rows
    return codes if stored.leaf == "weight" else scales


def carried(like: Survey, name: str) -> Held:
    """A tensor of `like` as it stands, whatever it means."""
    entry = like.checkpoint.tensors[name].entry

    def rows(like: Like, first: int, count: int) -> Tensor:
        data = like.reader.read(name, first * held.row_bytes, count * held.row_bytes, Landing())
        return torch.frombuffer(data, dtype=torch.uint8)

    held = Held(entry.dtype, entry.shape, rows)
    return held


def twins(names: Iterable[str]) -> dict[str, str]:
    """Of these released names, which are meant to repeat another tensor, and which one."""
    return {
        name: _TWINS[name.split(".", 2)[2]]
        for name in names
        if name.startswith("mtp.") and name.split(".", 2)[2] in _TWINS
    }


def same_bytes(found: Survey, reader: Reader, one: str, other: str) -> bool:
    """Whether two released tensors that are stored as they are hold the same."""
    layout, tensors = found.layout, found.checkpoint.tensors
    names = [layout.weights[name][0] for name in (one, other)]
    sizes = {tensors[name].entry.end - tensors[name].entry.begin for name in names}
    landings = Landing(), Landing()
    for offset, count in formats.spans(max(sizes), _COPY_BYTES):
        pieces = (
            torch.frombuffer(reader.read(name, offset, count, landing), dtype=torch.uint8)
            for name, landing in zip(names, landings, strict=True)
        )
        if not torch.equal(*pieces):
            return False
    return True


def repeats(like: Survey, absent: Iterable[str]) -> dict[str, str]:
    """Of tensors that are not in memory, those that follow another one: in `like` they were its copies."""
    with like.checkpoint.reader() as reader:
        return {copy: twin for copy, twin in twins(absent).items() if same_bytes(like, reader, copy, twin)}
