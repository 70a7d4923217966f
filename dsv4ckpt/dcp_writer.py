"""A checkpoint of torch.distributed.checkpoint that is a release: written from sharded state, quantized on the way.

Owns which tensors a state dict must hold, and how they are shown as a checkpoint with released names; where their rows
come from is exchange's, everything after that export's, as when a whole model is saved.  Knows no models.
Source: torch/distributed/checkpoint/storage.py and state_dict_saver.py for the calls and their order.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from collections.abc import Container
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from . import boxes, export
from .boxes import Box
from .errors import NotConform, NotLossless, Usage
from .exchange import Exchange, ExchangingRanks, Piece
from .export import Path
from .formats import Storage
from .held import VALUE_DTYPES, Held, HeldCheckpoint, Like, Rows, carried, from_files, repeats, twins
from .hub_source import open_checkpoint
from .inventory import Layout, Part, Stored, lay_out
from .names import Experts, Namespace
from .plan import ConvertOptions, make_plan
from .run import Summary
from .survey import Survey, survey

_TAKEN = {  # dtypes of a state dict, by the dtype that the release has where it has no codes
    "BF16": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "F32": (torch.float32, torch.float64),
    "I64": (torch.int64,),
}
_SPELLINGS = (  # of the keys of a state dict
    (Namespace.TRANSFORMERS, Experts.FUSED),
    (Namespace.TRANSFORMERS, Experts.SPLIT),
    (Namespace.DEEPSEEK, Experts.SPLIT),
)


class _Order(NamedTuple):
    """What the coordinator tells every rank."""

    size: int
    spelling: int  # number of a row of _SPELLINGS
    stamp: str  # of this very save


class ReleaseWriter(StorageWriter):
    """A released checkpoint as a storage that torch.distributed.checkpoint.save writes.

        dcp.save(model.state_dict(), storage_writer=ReleaseWriter(path, like="DeepSeek-V4-Flash"))

    Every rank makes some of the files: it gets the rows that it needs from the ranks that hold them, a few million
    values at a time, quantizes and writes them.  No rank holds more than its part of the model, nothing is gathered.

    summary  once a save has ended well, what was written and what quantizing cost: on rank 0 of all ranks, on others of
             themselves
    bytes    those that one process writes that has all of the model (dsv4model.save), for any number of ranks
    memory   above the state dict less than 150 MB
    """

    def __init__(
        self,
        path: Path,
        *,
        like: Path,
        to: str = "native",
        names: str = "deepseek",
        source: Path | None = None,
        process_group: dist.ProcessGroup | None = None,
        max_shard_bytes: int = 5 * 10**9,
        scale_policy: str = "keep",
        allow_lossy: bool = False,
    ) -> None:
        """Read the headers of `like`, on every rank, and refuse what makes no sense.

        The keys of the state dict are parameters' names as transformers has them, experts fused or one by one, or the
        released names; nothing but the model may be in it. Wider values are rounded to BF16, to nearest even, before
        anything else; what a release stores as F32 or I64 stays that. Draft stages (mtp.*) may be absent
        as a whole: then those of `like` are written. So are vision parts.

        path             a new or empty directory that all ranks see: a save is never continued, and one that fails
                         leaves nothing, unless a rank dies
        like             a checkpoint of the same model, in any storage: its config and small files are carried over
        to               native, bf16, fp8, ...: as --to of dsv4 convert
        names            of the output: deepseek or transformers; other tools' formats go with deepseek
        source           to="native": the release that the values came from. What is untouched gets its bytes again,
                         what changed is measured against it. None: `like` itself if it is as released, else its sidecar
        process_group    the one that dcp.save gets
        max_shard_bytes  of a shard; one tensor may exceed it. Ranks write whole shards, at the same time
        scale_policy     keep or fresh, as --scale-policy: of blocks that changed
        allow_lossy      accept that values are rounded without measure, or that a change vanishes
        raises           Usage, BadConfig, UnknownRelease, NotConform and its kin, MissingFile, BadIndex, BadHeader,
                         UnsafePath, Environment
        """
        self._options = export.options_of(
            to=to,
            names=names,
            source=source,
            max_shard_bytes=max_shard_bytes,
            scale_policy=scale_policy,
            allow_lossy=allow_lossy,
        )
        self._path, self._group = os.fspath(path), process_group
        self._like = _conforming(like)
        self._source = _conforming(source) if source is not None else None
        self.summary: Summary | None = None

    # ---- what torch calls, in its order

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """raises Usage if the caller names another directory"""
        if checkpoint_id is not None and os.fspath(checkpoint_id) != self._path:
            raise Usage(
                "checkpoint_id names another directory than this writer",
                expected=repr(self._path),
                found=repr(os.fspath(checkpoint_id)),
                do="leave checkpoint_id out; make a writer for each save",
            )
        self.summary = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """raises ForeignOutput"""
        if is_coordinator:
            export.require_new(self._path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_identity(self._like, self._options))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """raises Usage for what is no tensor of the model, NotConform if one is missing or not whole, NotLossless"""
        if not all(plan.usable for plan in plans):
            raise Usage(
                "the planner tells what changed since the last save, and a release is always written as a whole",
                do="leave enable_plan_caching off",
            )
        if {plan.storage_data for plan in plans} != {_identity(self._like, self._options)}:
            raise Usage(
                "the ranks were given different options, or like= checkpoints of different models",
                do="make the writer in the same way on every rank",
            )
        items = [item for plan in plans for item in plan.items]
        spelling = _spelling(self._like, {item.index.fqn for item in items})
        _require_model(_layout(self._like, spelling), items, self._options.allow_lossy)
        order = _Order(len(plans), spelling, secrets.token_hex(32))
        return [replace(plan, storage_data=order) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Everything is written when this returns, the manifest last.

        raises  NotFinite, NotLossless, VanishingChange, NoSpace; Environment also if another rank failed
        """
        order = plan.storage_data
        assert isinstance(order, _Order)
        _require_group(self._group, order.size)
        layout = _layout(self._like, order.spelling)
        numbers = {name: number for number, name in enumerate(layout.stored)}
        pieces = [
            Piece(numbers[item.index.fqn], box, functools.partial(_values, planner, item))
            for item in plan.items
            if all(box := _box(item))
        ]
        dtypes = [VALUE_DTYPES[stored.dtype] for stored in layout.stored.values()]
        rank = dist.get_rank(self._group) if order.size > 1 else 0
        exchange = Exchange(self._group, rank, order.size, dtypes, pieces)
        try:
            self.summary = self._write(order, layout, exchange)
            exchange.meet()  # what fails on one rank, fails on all
        except BaseException:
            exchange.is_quiet()
            raise
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([])
        return done

    def _write(self, order: _Order, layout: Layout, exchange: Exchange) -> Summary:
        checkpoint = HeldCheckpoint(self._like, _held(self._like, layout, exchange), order.stamp)
        original = export.original_of(self._options, Storage.BF16, self._like, self._source)
        made = make_plan(survey(checkpoint), self._options, original)
        ranks = ExchangingRanks(exchange.rank, exchange.size, exchange)
        return export.write(
            made, checkpoint, self._path, num_workers=1, ranks=ranks, is_quiet=exchange.is_quiet
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing: index, config and manifest were written by rank 0 when all shards were there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:  # noqa: ARG003
        """Never chosen by itself: it needs more than a path."""
        return False


def _conforming(path: Path) -> Survey:
    found = survey(open_checkpoint(os.fspath(path)))
    found.require_conform()
    return found


def _identity(like: Survey, options: ConvertOptions) -> str:
    """What must be the same on all ranks before anything begins."""
    return hashlib.sha256(repr((like.logicals, like.opaque, options)).encode()).hexdigest()


def _require_group(group: dist.ProcessGroup | None, size: int) -> None:
    """raises Usage"""
    if size > 1 and size != dist.get_world_size(group):
        raise Usage(
            "the writer and dcp.save were given different process groups",
            expected=f"{size} ranks",
            found=f"{dist.get_world_size(group)} ranks",
            do="give both the same: ReleaseWriter(..., process_group=group), and dcp.save(..., process_group=group)",
        )


# ---- what a state dict must hold


def _layout(like: Survey, spelling: int) -> Layout:
    """The tensors of a state dict."""
    space, experts = _SPELLINGS[spelling]
    return lay_out(like.logicals, like.identity.release.family.table, Storage.BF16, space, experts)


def _spelling(like: Survey, names: set[str]) -> int:
    """Under which names a state dict holds its tensors: those of which it has most."""
    known = [len(_layout(like, spelling).stored.keys() & names) for spelling in range(len(_SPELLINGS))]
    return known.index(max(known))


def _require_model(layout: Layout, items: list[WriteItem], allow_lossy: bool) -> None:
    """raises Usage, NotConform, NotLossless"""
    held: dict[str, list[Box]] = {}
    for item in items:
        stored = layout.stored.get(item.index.fqn)
        if stored is None or item.type is WriteItemType.BYTE_IO:
            raise Usage(
                f"{item.index.fqn!r} in the state dict is no tensor of this model",
                expected=f"{len(layout.stored):,} tensors, such as {next(iter(layout.stored))!r}",
                do="give dcp.save the model's state dict itself: optimizer and other state go into a checkpoint of "
                "their own, adapters are merged, vision parts stay those of like=. torch's get_model_state_dict takes "
                "names of wrappers off",
            )
        _require_alike(item, stored, allow_lossy)
        held.setdefault(stored.name, [])
        if all(box := _box(item)):
            held[stored.name].append(box)
    for name, found in held.items():
        if not boxes.tile(found, layout.stored[name].shape):
            raise NotConform(
                f"the ranks' shards of {name!r} do not make up the tensor",
                expected=f"each element of {list(layout.stored[name].shape)} on one rank",
                found=f"{sum(map(boxes.size, found)):,} elements in {len(found):,} shards",
                do="let every rank give what it has; a tensor that all ranks have is told by the same name and shape",
            )
    missing = _missing(layout, held)
    if missing:
        raise NotConform(
            f"{missing[0]!r} is in no rank's state dict"
            + (f", nor are {len(missing) - 1:,} more" if missing[1:] else ""),
            expected=f"all {len(layout.stored):,} tensors of the model; only all of the draft stages may be absent",
            do="give dcp.save the state dict of the whole model; pipeline stages each give theirs",
        )


def _require_alike(item: WriteItem, stored: Stored, allow_lossy: bool) -> None:
    """raises NotConform, NotLossless, Usage"""
    assert item.tensor_data is not None
    shape, dtype = tuple(item.tensor_data.size), item.tensor_data.properties.dtype
    if shape != stored.shape:
        raise NotConform(
            f"{stored.name!r} has another shape than in the checkpoint that like= names",
            expected=f"{list(stored.shape)}",
            found=f"{list(shape)}",
            do="name the checkpoint that the model was loaded from",
        )
    if dtype in _TAKEN[stored.dtype] or (allow_lossy and stored.dtype == "F32" and dtype in _TAKEN["BF16"]):
        return
    expected = " or ".join(map(str, _TAKEN[stored.dtype]))
    if dtype in _TAKEN["BF16"]:
        raise NotLossless(
            f"{stored.name!r} is {stored.dtype} in every release, and is rounded in the state dict",
            expected=expected,
            found=str(dtype),
            do="keep it in float32 when training; allow_lossy=True takes it as it is",
        )
    raise Usage(
        f"{stored.name!r} has a dtype that is not written",
        expected=expected,
        found=str(dtype),
        do="give values, not codes: codes are made while they are written",
    )


def _missing(layout: Layout, held: Container[str]) -> list[str]:
    """What must be there and is not. Copies that Base repeats may be absent, and draft stages if all of them are."""
    names = {stored.name: stored.parts[0].logical.name for stored in layout.stored.values()}
    copies = twins(names.values())
    absent = [name for name, logical in names.items() if name not in held and logical not in copies]
    drafts = [name for name, logical in names.items() if logical.startswith("mtp.") and logical not in copies]
    if set(drafts) <= set(absent):
        return [name for name in absent if name not in set(drafts)]
    return absent


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return tuple(range(begin, begin + count) for begin, count in zip(chunk.offsets, chunk.sizes, strict=True))


# ---- how it is shown


def _values(planner: SavePlanner, item: WriteItem) -> Tensor:
    return cast(Tensor, planner.resolve_data(item))


def _held(like: Survey, layout: Layout, exchange: Exchange) -> dict[str, Held]:
    """Every released tensor: from the ranks, else as a copy of another one, else from the files of `like`."""
    numbers = {name: number for number, name in enumerate(layout.stored)}

    def place(logical: str) -> tuple[int, Stored, Part]:
        name, index = layout.weights[logical]
        return numbers[name], layout.stored[name], layout.stored[name].parts[index]

    copies = repeats(like, [item.name for item in like.logicals if not exchange.has(place(item.name)[0])])
    table = like.identity.release.family.table
    shown = lay_out(like.logicals, table, Storage.BF16, Namespace.DEEPSEEK).stored
    held = {}
    for name, stored in shown.items():
        (logical,) = (part.logical for part in stored.parts)
        number, of, part = place(copies.get(logical.name, logical.name))
        rows = (
            _spread(exchange, number, of, part) if exchange.has(number) else from_files(logical, stored, None)
        )
        held[name] = Held(stored.dtype, stored.shape, rows)
    return held | {name: carried(like, name) for name in like.opaque}


def _spread(exchange: Exchange, number: int, stored: Stored, part: Part) -> Rows:
    """Of a tensor that ranks hold."""

    def rows(_like: Like, first: int, count: int) -> Tensor:
        return exchange.box(number, boxes.of_rows(part, stored.shape, first, count))

    return rows
