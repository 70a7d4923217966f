"""Checkpoints for torch.distributed.checkpoint: a release is loaded as if torch had saved it, decoded on the way.

Owns what a reader tells torch about a checkpoint, and how the box that a rank asks for becomes rows of released
tensors; decoding is values'.  Knows no models.
Source: torch/distributed/checkpoint/storage.py for the calls and their order.
"""

#  E experts;  M rows of one expert, C columns, in a fused tensor [E, M, C];  R rows of a matrix [R, C]

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
import queue
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from . import boxes
from .boxes import Run
from .dcp_storage import PathReader, done
from .dcp_writer import ReleaseWriter as ReleaseWriter
from .errors import NotConform, Usage
from .formats import QUANTS, Kind, Shape, Storage
from .hub_source import open_checkpoint
from .inventory import Layout, Logical, Part, Stored, lay_out
from .names import Experts, Namespace
from .roundtrip import chunks
from .source import Landing, Reader
from .survey import Survey, survey
from .threads import one_torch_thread
from .values import Values

AS_STORED: Literal["as-stored"] = "as-stored"
_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_HELD = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_Word = TypeVar("_Word", bound=StrEnum)
_MOST_IN_FLIGHT = 8  # items that threads work on while the next ones are laid out


class ReleaseReader(PathReader):
    """A checkpoint of DeepSeek-V4 as a storage that torch.distributed.checkpoint.load reads.

        dcp.load(model.state_dict(), storage_reader=ReleaseReader(path))

    Every rank reads codes and scales of its own rows and experts, and decodes them into its own shards: at the same
    time as the others, without a copy in between.  Two exceptions, where more is read than kept: a shard that takes
    some of the columns of a matrix reads whole rows, and one of a vector reads the vector.

    unread   on the coordinator, once a load was planned: names that no rank asked for
    exact    the values that the conversion to BF16 gives, in each of the dtypes
    memory   above the state dict less than 32 MB for each thread
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        names: Literal["transformers", "deepseek"] = "transformers",
        experts: Literal["fused", "split"] = "fused",
        dtype: torch.dtype | Literal["as-stored"] = torch.bfloat16,
        partial: bool | Collection[str] = False,
        num_threads: int = 2,
        follow_links: bool = False,
    ) -> None:
        """Read the headers and refuse what does not conform, on every rank, before anything is loaded.

        path         a directory with a checkpoint, in any storage and either namespace
        names        what the keys of the state dict are; "deepseek" goes with experts="split"
        experts      "fused": all of a layer in [E, M, C], as modules hold them; "split": a matrix each
        dtype        what torch is told that values have: it matters to who makes tensors from the metadata. Tensors
                     that are there may have this dtype or a wider one. "as-stored": codes and E8M0 scales as uint8, F32
                     scales as float32, as packed models hold them
        partial      keys that no rank needs to ask for: all of them, or those that match one of these patterns
        num_threads  of each rank; it changes speed, never values
        raises       Usage, BadConfig, UnknownRelease, NotConform and its kin, MissingFile, BadIndex, BadHeader,
                     UnsafePath, Environment
        """
        super().__init__(path)
        self._num_threads = _require_count(num_threads)
        self._partial = (partial,) if isinstance(partial, str) else partial
        space = _choice("names", names, Namespace)
        held = _choice("experts", experts, Experts)
        _require_dtype(dtype)
        if space is Namespace.DEEPSEEK and held is Experts.FUSED:
            raise Usage(
                "the released names have no fused experts",
                expected='names="deepseek" with experts="split"',
                found='experts="fused"',
                do='say experts="split", or leave names out',
            )
        self._survey = survey(open_checkpoint(self._path, follow_links=follow_links))
        self._survey.require_conform()
        self._entries = _entries(self._survey, space, held, dtype)
        self.unread: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json, to make a model of."""
        return self._survey.checkpoint.config()

    # ---- what torch calls, in its order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """raises Usage if the caller names another checkpoint"""
        super().reset(checkpoint_id)
        self.unread = ()

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """raises NotConform for tensors that no rank asks for"""
        asked = {item.storage_index.fqn for plan in plans for item in plan.items}
        self.unread = tuple(sorted(self._entries.keys() - asked))
        lost = [name for name in self.unread if not self._may_stay(name)]
        if lost:
            raise NotConform(
                f"the checkpoint's {lost[0]!r} is in no rank's state dict"
                + (f", nor are {len(lost) - 1:,} more" if lost[1:] else ""),
                expected=f"all of its {len(self._entries):,} tensors, each on one rank at least",
                do="if the model has no place for them, name them: partial=(pattern, ...); partial=True for all",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Fill every tensor of a plan.

        raises  Usage for a tensor that would round; NotFinite, SourceChanged, Environment
        """
        with one_torch_thread(), contextlib.ExitStack() as stack:
            hands: queue.SimpleQueue[_Hand] = queue.SimpleQueue()
            for _ in range(self._num_threads if plan.items else 0):
                hands.put(_Hand(self._survey, stack.enter_context(self._survey.checkpoint.reader())))
            pool = stack.enter_context(ThreadPoolExecutor(self._num_threads))
            try:
                self._read(plan.items, planner, pool, hands)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return done()

    # ---- inside

    def _told(self) -> dict[str, tuple[torch.dtype, Shape]]:
        return {name: (entry.told, entry.shape) for name, entry in self._entries.items()}

    def _may_stay(self, name: str) -> bool:
        if isinstance(self._partial, bool):
            return self._partial
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._partial)

    def _read(
        self,
        items: list[ReadItem],
        planner: LoadPlanner,
        pool: ThreadPoolExecutor,
        hands: queue.SimpleQueue[_Hand],
    ) -> None:
        """Items in the order of the files, each in pieces; errors come in this order too, whatever thread was first."""
        in_flight: deque[tuple[ReadItem, Tensor, list[Future[None]]]] = deque()

        def finish() -> None:
            item, target, futures = in_flight.popleft()
            for future in futures:
                future.result()
            planner.commit_tensor(item, target)

        for item in sorted(items, key=self._position):
            entry = self._entries[item.storage_index.fqn]
            target = planner.resolve_tensor(item).detach()
            entry.require_held_by(target)
            work = [pool.submit(_with_hand, hands, piece) for piece in _pieces(entry, item, target)]
            in_flight.append((item, target, work))
            if len(in_flight) > _MOST_IN_FLIGHT:
                finish()
        while in_flight:
            finish()

    def _position(self, item: ReadItem) -> tuple[str, int]:
        """Where an item's first bytes stand; an empty one stands first."""
        entry = self._entries[item.storage_index.fqn]
        first = next(_runs(entry, item), None)
        if first is None:
            return "", 0
        name = entry.name
        if entry.logical is not None:
            name, _ = self._survey.layout.weights[first.part.logical.name]
        place = self._survey.checkpoint.tensors[name]
        return place.shard, place.entry.begin


# ---- what the checkpoint holds, as torch is told


@dataclass(frozen=True)
class _Entry:
    """A tensor of the state dict, and the rows that it is made of."""

    name: str
    shape: Shape
    held: torch.dtype  # narrow enough to be read into, wide enough for every value
    told: torch.dtype
    parts: tuple[Part, ...]
    logical: Logical | None  # of its first part; None: opaque, carried under its own name
    leaf: str  # "": values; "weight": codes as they are stored; "scale": scales

    @property
    def is_fused(self) -> bool:
        return self.logical is not None and len(self.shape) == 3

    @property
    def row_shape(self) -> Shape:
        """Of what is read at least; a vector is one row."""
        if len(self.shape) < 2:
            return self.shape
        return self.shape[2:] if self.is_fused else self.shape[1:]

    def require_held_by(self, target: Tensor) -> None:
        """raises Usage"""
        if self.held == target.dtype:
            return
        floats = self.held.is_floating_point and target.dtype in (*_DTYPES, torch.float16)
        if floats and self.held.itemsize > 1 and torch.promote_types(self.held, target.dtype) == target.dtype:
            return
        raise Usage(
            f"{self.name!r} would be rounded or reinterpreted by the tensor that it is to be loaded into",
            expected=f"{self.held}" + (" or wider" if self.held.is_floating_point else ""),
            found=str(target.dtype),
            do="give the module this dtype before it is sharded, and cast for computing only; or load a float32 model",
        )


def _entries(
    found: Survey, space: Namespace, held: Experts, dtype: torch.dtype | Literal["as-stored"]
) -> dict[str, _Entry]:
    storage = found.identity.storage if dtype == AS_STORED else Storage.BF16
    if any(quant.per_tensor for quant in QUANTS[storage].values()):
        raise Usage(
            f'dtype="as-stored" does not know the two-level scales of {storage.value}',
            do="load the released checkpoint: it has the same codes; or leave dtype out",
        )
    layout = lay_out(found.logicals, found.identity.release.family.table, storage, space, held)
    entries = {name: _entry(layout, stored, dtype) for name, stored in layout.stored.items()}
    return entries | {name: _opaque(found, name) for name in found.opaque}


def _entry(layout: Layout, stored: Stored, dtype: torch.dtype | Literal["as-stored"]) -> _Entry:
    logical = stored.parts[0].logical
    quant = layout.quant(logical)
    if quant is None:
        held = _HELD[stored.dtype]
        told = held if isinstance(dtype, str) or held != torch.bfloat16 else dtype
        return _Entry(stored.name, stored.shape, held, told, tuple(stored.parts), logical, "")
    held = torch.float32 if stored.dtype == "F32" else torch.uint8
    return _Entry(stored.name, stored.shape, held, held, tuple(stored.parts), logical, stored.leaf)


def _opaque(found: Survey, name: str) -> _Entry:
    place = found.checkpoint.tensors[name].entry
    held = _HELD.get(place.dtype)
    if held is None:
        raise NotConform(
            f"torch has no dtype for {name!r}",
            found=place.dtype,
            do="dsv4 convert carries it; to load the rest, remove it from the checkpoint",
        )
    rows = place.shape[0] if len(place.shape) > 1 else 1
    part = Part(Logical(name, Kind.BF16, place.shape), 0, rows)
    return _Entry(name, place.shape, held, held, (part,), None, "")


# ---- from what a rank asks for to rows


class _Piece(NamedTuple):
    """Rows [first, first + n) of one part, and where they go."""

    entry: _Entry
    part: Part
    first: int
    out: Tensor  # [n, columns...] of the target
    columns: tuple[slice, ...]  # of a row


def _runs(entry: _Entry, item: ReadItem) -> Iterator[Run]:
    offsets, lengths = item.storage_offsets, item.lengths
    if 0 in lengths:
        return iter(())
    if len(entry.shape) < 2:
        return boxes.runs(entry.parts, 1, range(1), range(1))
    ranges = [range(begin, begin + count) for begin, count in zip(offsets, lengths, strict=True)]
    if entry.is_fused:
        return boxes.runs(entry.parts, entry.shape[1], ranges[0], ranges[1])
    return boxes.runs(entry.parts, entry.shape[0], range(1), ranges[0])


def _pieces(entry: _Entry, item: ReadItem, target: Tensor) -> Iterator[_Piece]:
    """Of about a million values each, so that threads share a tensor and none holds much."""
    depth = len(entry.row_shape)
    lead = target[None] if len(entry.shape) > 1 else target[None, None]
    out_ERC = target if entry.is_fused else lead
    begins, counts = (
        item.storage_offsets[len(item.lengths) - depth :],
        item.lengths[len(item.lengths) - depth :],
    )
    columns = tuple(slice(begin, begin + count) for begin, count in zip(begins, counts, strict=True))
    for run in _runs(entry, item):
        for first, count in chunks(run.rows, math.prod(entry.row_shape), 1, run.first):
            at = run.at + first - run.first
            yield _Piece(entry, run.part, first, out_ERC[run.expert, at : at + count], columns)


class _Hand:
    """What one thread works with."""

    def __init__(self, found: Survey, reader: Reader) -> None:
        self._reader, self._landing, self._values = reader, Landing(), Values(found, reader)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def fill(self, piece: _Piece) -> None:
        shape = (len(piece.out), *piece.entry.row_shape)
        if tuple(piece.out.shape) == shape and piece.out.is_contiguous():
            self._fill(piece, piece.out)
            return
        whole = self._room(shape, piece.entry.held)
        self._fill(piece, whole)
        piece.out.copy_(whole[(slice(None), *piece.columns)])

    def _fill(self, piece: _Piece, out: Tensor) -> None:
        """Whole rows."""
        name, entry = piece.part.logical.name, piece.entry
        if entry.logical is None:
            row_bytes = math.prod(entry.row_shape) * entry.held.itemsize
            data = self._reader.read(name, piece.first * row_bytes, len(out) * row_bytes, self._landing)
            out.copy_(torch.frombuffer(data, dtype=entry.held).view(out.shape))
        elif entry.leaf == "":
            self._values.fill(name, out, piece.first)
        elif entry.leaf == "weight":
            self._values.fill_codes(name, out, piece.first)
        else:
            self._values.fill_scales(name, out, piece.first)

    def _room(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size].view(dtype).view(shape)


def _with_hand(hands: queue.SimpleQueue[_Hand], piece: _Piece) -> None:
    hand = hands.get()
    try:
        hand.fill(piece)
    finally:
        hands.put(hand)


# ---- what a caller may say


def _choice(what: str, given: str, words: type[_Word]) -> _Word:
    """raises Usage"""
    try:
        return words(given)
    except ValueError:
        raise Usage(
            f"there is no {what}={given!r}",
            expected=" or ".join(repr(word.value) for word in words),
            do="check the spelling",
        ) from None


def _require_dtype(dtype: torch.dtype | str) -> None:
    """raises Usage"""
    if dtype != AS_STORED and dtype not in _DTYPES:
        raise Usage(
            "values cannot be read in this dtype",
            expected=", ".join(str(known) for known in _DTYPES) + f" or {AS_STORED!r}",
            found=repr(dtype),
            do="leave dtype out for bfloat16",
        )


def _require_count(num_threads: int) -> int:
    """raises Usage"""
    if num_threads < 1:
        raise Usage("num_threads is no number of threads", expected="at least 1", do="leave it out for 2")
    return num_threads
