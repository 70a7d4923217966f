"""A model in memory, as a checkpoint that dsv4ckpt reads: released names, a storage format, bytes made on demand.

So a model is saved by the very plan and run that convert files, tensor by tensor, without a second copy of it.  What
the model does not have (DSpark stages, Base's copies of embed and head) comes from the checkpoint that it came from.
Knows no outputs.
"""

#  R rows, C columns of a released tensor, P of its codes; one of a single dimension is one row

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4ckpt import codec, formats, shard
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import MODEL_NAME, QUANTS, Kind, Quant, Shape, Storage
from dsv4ckpt.inventory import Layout, Logical, Stored, lay_out
from dsv4ckpt.names import Namespace
from dsv4ckpt.shard import Entry, Header
from dsv4ckpt.source import Checkpoint, Landing, Location, Reader, Shard, Stamp
from dsv4ckpt.survey import Survey
from dsv4ckpt.values import Values

from .loading import model_layout, rows_of, same_bytes, twins, unused_tensors
from .model import Model
from .packed import PackedExperts, PackedLinear, decoded

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_NUM_SAMPLES = 64

Rows = Callable[[Values, int, int], Tensor]  # (reader of `like`, first row, rows) -> those rows, contiguous


class _Held(NamedTuple):
    """A tensor as the checkpoint shows it."""

    dtype: str
    shape: Shape
    rows: Rows

    @property
    def row_bytes(self) -> int:
        return formats.stored_bytes(self.dtype, self.shape[-1:])


class ModelCheckpoint(Checkpoint):
    """Config and small files are those of `like`; the tensors are the model's."""

    def __init__(self, like: Survey, held: dict[str, _Held]) -> None:
        source = like.checkpoint
        super().__init__(source.directory, source.follow_links, source.config_bytes)
        self.like, self.held = like, held
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
    def reader(self) -> Iterator[Reader]:
        with self.like.checkpoint.reader() as files:
            yield _ModelReader(self, Values(self.like, files))

    def stamps_sha256(self) -> str:
        """Never the same: nothing tells whether a model is still what it was."""
        return secrets.token_hex(32)

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


class _ModelReader(Reader):
    """Makes the bytes of tensors. For one thread."""

    def __init__(self, checkpoint: ModelCheckpoint, like: Values) -> None:
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


# ---- what becomes of each tensor


def checkpoint_of(model: Model, like: Survey, storage: Storage) -> ModelCheckpoint:
    """The model under released names, in BF16 or as it is packed.

    raises  Usage if the model's tensors are not those that `like` has
    """
    packed = packed_storage(model)
    assert storage in (Storage.BF16, packed)
    maker = _Maker(model, like, packed or Storage.BF16)
    table = like.identity.release.family.table
    shown = lay_out(like.logicals, table, storage, Namespace.DEEPSEEK)
    return ModelCheckpoint(like, {name: maker.held(stored, shown) for name, stored in shown.stored.items()})


def packed_storage(model: Model) -> Storage | None:
    """The storage format whose codes the model holds; None: it holds values."""
    quants = {
        kind: module.quant
        for module in model.modules()
        for kind, packed in ((Kind.EXPERT, PackedExperts), (Kind.DENSE, PackedLinear))
        if isinstance(module, packed)
    }
    if not quants:
        return None
    return next(s for s, row in QUANTS.items() if all(row.get(kind) == quants[kind] for kind in quants))


class _Maker:
    """Knows where each released tensor stands in the model."""

    def __init__(self, model: Model, like: Survey, storage: Storage) -> None:
        self._like, self._layout = like, model_layout(like, storage)
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._require_equal()
        unused = unused_tensors(like, self._layout, self._state)
        with like.checkpoint.reader() as reader:
            found = twins(unused).items()
            self._repeats = {copy: twin for copy, twin in found if same_bytes(like, reader, copy, twin)}

    def _require_equal(self) -> None:
        stored = self._layout.stored
        for name, tensor in self._state.items():
            if name not in stored or stored[name].shape != tuple(tensor.shape) or not tensor.is_contiguous():
                raise Usage(
                    "the model is not one that load made from such a checkpoint",
                    expected=f"{name!r} {list(stored[name].shape)}, contiguous"
                    if name in stored
                    else "no other tensors than its own: adapters merged, wrappers taken off",
                    found=f"{name!r} {list(tensor.shape)}",
                    do="name with like= the checkpoint that the model was loaded from",
                )

    def held(self, stored: Stored, shown: Layout) -> _Held:
        (logical,) = (part.logical for part in stored.parts)
        quant = shown.quant(logical)
        twin = self._repeats.get(logical.name)
        place = self._layout.weights[twin or logical.name][0]
        if place not in self._state:
            rows = _from_files(logical, stored, quant)
        elif quant is not None:
            index = self._layout.weights if stored.leaf == "weight" else self._layout.scales
            rows = _as_they_are(self._part(index[logical.name][0], logical.name))
        elif (packed := self._layout.quant(logical)) is not None:
            codes = self._part(place, logical.name)
            scales = self._part(self._layout.scales[logical.name][0], logical.name)
            rows = _decoding(codes, scales, packed)
        else:
            rows = _rounding(self._part(place, twin or logical.name), _DTYPES[stored.dtype])
        return _Held(stored.dtype, stored.shape, rows)

    def _part(self, name: str, logical: str) -> Tensor:
        part = rows_of(self._state[name], self._layout.stored[name], logical)
        return part if part.dim() > 1 else part.unsqueeze(0)


def _as_they_are(part: Tensor) -> Rows:
    return lambda _like, first, count: part[first : first + count]


def _rounding(part: Tensor, dtype: torch.dtype) -> Rows:
    """To nearest even, once: a cast of float64 to bfloat16 would round twice."""

    def rows(_like: Values, first: int, count: int) -> Tensor:
        mine = part[first : first + count]
        if mine.dtype == torch.float64 and dtype == torch.bfloat16:
            return codec.bf16_bits(mine).bits.view(torch.bfloat16)
        return mine.to(dtype)

    return rows


def _decoding(codes: Tensor, scales: Tensor, quant: Quant) -> Rows:
    def rows(_like: Values, first: int, count: int) -> Tensor:
        skipped = first % quant.block.rows
        begin, end = first - skipped, first + count
        of = formats.block_rows_of(begin, end - begin, quant.block)
        return decoded(codes[begin:end], scales[of], quant, torch.bfloat16)[skipped:]

    return rows


def _from_files(logical: Logical, stored: Stored, quant: Quant | None) -> Rows:
    """Of a tensor that is no part of the model: values, or its codes, or its scales."""

    def values(like: Values, first: int, count: int) -> Tensor:
        out = torch.empty(count, *stored.shape[1:], dtype=_DTYPES[stored.dtype])
        if len(stored.shape) == 1:
            out = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        like.fill(logical.name, out, first)
        return out

    def codes(like: Values, first: int, count: int) -> Tensor:
        return both(like, first, first + count)[0][first % height :]

    def scales(like: Values, first: int, count: int) -> Tensor:
        return both(like, first * height, min((first + count) * height, logical.shape[0]))[1]

    def both(like: Values, first: int, end: int) -> tuple[Tensor, Tensor]:
        assert quant is not None
        begin = first - first % height
        shape = end - begin, logical.shape[1]
        grid = formats.scale_shape(shape, quant.block)
        dtype = torch.float32 if quant.scale == "F32" else torch.uint8
        found = (
            torch.empty(formats.codes_shape(shape, quant), dtype=torch.uint8),
            torch.empty(grid, dtype=dtype),
        )
        like.fill_raw(logical.name, *found, begin)
        return found

    if quant is None:
        return values
    height = quant.block.rows
    return codes if stored.leaf == "weight" else scales
