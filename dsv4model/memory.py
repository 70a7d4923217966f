"""A model in memory, as a checkpoint that dsv4ckpt reads: released names, a storage format, bytes made on demand.

So a model is saved by the very plan and run that convert files, tensor by tensor, without a second copy of it.  What
the model does not have (DSpark stages, Base's copies of embed and head) comes from the checkpoint that it came from.
Knows no outputs.
"""

#  R rows, C columns of a released tensor, P of its codes; one of a single dimension is one row

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ckpt import formats
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import QUANTS, Kind, Quant, Storage
from dsv4ckpt.held import VALUE_DTYPES, Held, HeldCheckpoint, Like, Rows, from_files, repeats, rounded
from dsv4ckpt.inventory import Layout, Stored, lay_out
from dsv4ckpt.names import Namespace
from dsv4ckpt.survey import Survey

from .loading import model_layout, rows_of, unused_tensors
from .model import Model
from .packed import PackedExperts, PackedLinear, decoded


def checkpoint_of(model: Model, like: Survey, storage: Storage) -> HeldCheckpoint:
    """The model under released names, in BF16 or as it is packed.

    raises  Usage if the model's tensors are not those that `like` has
    """
    packed = packed_storage(model)
    assert storage in (Storage.BF16, packed)
    maker = _Maker(model, like, packed or Storage.BF16)
    table = like.identity.release.family.table
    shown = lay_out(like.logicals, table, storage, Namespace.DEEPSEEK)
    return HeldCheckpoint(like, {name: maker.held(stored, shown) for name, stored in shown.stored.items()})


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
        self._repeats = repeats(like, unused)

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

    def held(self, stored: Stored, shown: Layout) -> Held:
        (logical,) = (part.logical for part in stored.parts)
        quant = shown.quant(logical)
        twin = self._repeats.get(logical.name)
        place = self._layout.weights[twin or logical.name][0]
        if place not in self._state:
            rows = from_files(logical, stored, quant)
        elif quant is not None:
            index = self._layout.weights if stored.leaf == "weight" else self._layout.scales
            rows = _as_they_are(self._part(index[logical.name][0], logical.name))
        elif (packed := self._layout.quant(logical)) is not None:
            codes = self._part(place, logical.name)
            scales = self._part(self._layout.scales[logical.name][0], logical.name)
            rows = _decoding(codes, scales, packed)
        else:
            rows = _rounding(self._part(place, twin or logical.name), VALUE_DTYPES[stored.dtype])
        return Held(stored.dtype, stored.shape, rows)

    def _part(self, name: str, logical: str) -> Tensor:
        part = rows_of(self._state[name], self._layout.stored[name], logical)
        return part if part.dim() > 1 else part.unsqueeze(0)


def _as_they_are(part: Tensor) -> Rows:
    return lambda _like, first, count: part[first : first + count]


def _rounding(part: Tensor, dtype: torch.dtype) -> Rows:
    return lambda _like, first, count: rounded(part[first : first + count], dtype)


def _decoding(codes: Tensor, scales: Tensor, quant: Quant) -> Rows:
    def rows(_like: Like, first: int, count: int) -> Tensor:
        skipped = first % quant.block.rows
        begin, end = first - skipped, first + count
        of = formats.block_rows_of(begin, end - begin, quant.block)
        return decoded(codes[begin:end], scales[of], quant, torch.bfloat16)[skipped:]

    return rows
