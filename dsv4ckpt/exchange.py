"""Boxes of tensors that are spread over ranks, for whichever rank asks: in rounds that every rank takes part in.

A rank comes to a round to ask for a box, to wait for the others, or to say that it failed; whatever it came for, it
sends what the others ask for.  So nobody has to know who needs what when, nobody waits for a rank that does not answer,
and no rank holds more than one box that is not its own.  Knows no files and no formats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import get_backend_config

from . import boxes
from .boxes import Box
from .errors import Environment
from .formats import MAX_RANK
from .held import rounded
from .process_group import noticed
from .ranks import Ranks
from .stop import StopFlag

_MEET, _ASK, _FAIL = range(3)  # what a rank comes for
_AGAIN = "then save again, into a new directory"


class Piece(NamedTuple):
    """What this rank has of a tensor: `values` gives that box of it, on any device."""

    number: int
    box: Box
    values: Callable[[], Tensor]


class _Request(NamedTuple):
    """What a rank comes to a round for. It travels as numbers."""

    what: int
    number: int = 0
    box: Box = ()

    def row(self) -> list[int]:
        edges = [edge for along in self.box for edge in (along.start, along.stop)]
        return [self.what, self.number, len(self.box), *edges, *[0] * (2 * MAX_RANK - len(edges))]

    @classmethod
    def of_row(cls, row: list[int]) -> _Request:
        what, number, rank, *edges = row
        return cls(what, number, tuple(map(range, edges[: 2 * rank : 2], edges[1 : 2 * rank : 2])))


class Exchange:
    """All ranks make one at the same time, and come to the same rounds until one of them fails."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        dtypes: list[torch.dtype],
        pieces: list[Piece],
    ) -> None:
        """
        dtypes  of every tensor, by its number, as it travels: values are rounded to it, to nearest even
        pieces  this rank's; those of all ranks tile each tensor that any of them has
        raises  Environment
        """
        self.rank, self.size = rank, size
        self._group, self._dtypes = group, dtypes
        self._device = _device(group) if size > 1 else torch.device("cpu")
        self._is_over = self._is_lost = self._has_stopped = False
        self._mine: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._mine.setdefault(piece.number, []).append(piece)
        self._owners = self._told_boxes(pieces)

    def has(self, number: int) -> bool:
        """Whether any rank has a tensor."""
        return number in self._owners

    def box(self, number: int, box: Box) -> Tensor:
        """A box of a tensor, on the CPU, from all who have some of it. raises Environment"""
        out = torch.empty([len(along) for along in box], dtype=self._dtypes[number])
        self._come(_Request(_ASK, number, box), out)
        return out

    def meet(self) -> None:
        """Return when every rank has come here. raises Environment"""
        while any(request.what != _MEET for request in self._come(_Request(_MEET))):
            pass

    def is_quiet(self) -> bool:
        """After an error: tell the others of it, and wait until all of them have come here as well.

        False: a rank is gone, and others may not have noticed yet.
        """
        with contextlib.suppress(Environment):
            self._come(_Request(_FAIL))
        with contextlib.suppress(Environment):
            if not self._is_lost and not self._has_stopped:
                self._has_stopped = True
                self._of_all(torch.zeros(1, dtype=torch.int64))
        return not self._is_lost

    # ---- a round

    def _come(self, mine: _Request, out: Tensor | None = None) -> list[_Request]:
        """One round. out: takes what was asked for. Returns what every rank came for. raises Environment"""
        if self._is_over:
            raise self._given_up("this rank")
        rows = self._of_all(torch.tensor(mine.row())).tolist()
        requests = [_Request.of_row(row) for row in rows]
        failed = [rank for rank, request in enumerate(requests) if request.what == _FAIL]
        if failed:
            self._is_over = True
            raise self._given_up(f"rank {failed[0]}")
        self._serve(requests, out)
        return requests

    def _given_up(self, who: str) -> Environment:
        return Environment(f"the save was given up: {who} failed", do=f"see what that rank said; {_AGAIN}")

    def _serve(self, requests: list[_Request], out: Tensor | None) -> None:
        """Send what others ask for, and receive what this rank does."""
        transfers, arriving = [], []
        for rank, request in enumerate(requests):
            if request.what == _ASK and rank != self.rank:
                data = self._packed(request)
                if data.numel():
                    transfers.append(
                        dist.P2POp(dist.isend, data.to(self._device), group=self._group, group_peer=rank)
                    )
        asked = requests[self.rank]
        if out is not None:
            for rank, shared in self._sources(asked).items():
                num_bytes = sum(map(boxes.size, shared)) * out.itemsize
                data = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                if rank == self.rank:
                    data = self._packed(asked)
                else:
                    transfers.append(dist.P2POp(dist.irecv, data, group=self._group, group_peer=rank))
                arriving.append((shared, data))
        if transfers:
            with self._noticed():
                for work in dist.batch_isend_irecv(transfers):
                    work.wait()
        for shared, data in arriving:
            values, begin = data.to("cpu").view(self._dtypes[asked.number]), 0
            for box in shared:
                assert out is not None
                part = values[begin : begin + boxes.size(box)]
                out[boxes.within(box, asked.box)] = part.view([len(along) for along in box])
                begin += boxes.size(box)

    def _packed(self, request: _Request) -> Tensor:
        """This rank's share of what is asked for, piece after piece. uint8 [n]"""
        dtype = self._dtypes[request.number]
        found = [torch.empty(0, dtype=torch.uint8, device=self._device)]
        for piece in self._mine.get(request.number, []):
            shared = boxes.overlap(piece.box, request.box)
            if shared:
                values = rounded(piece.values().detach()[boxes.within(shared, piece.box)], dtype)
                found.append(values.to(self._device).contiguous().view(-1).view(torch.uint8))
        return torch.cat(found)

    def _sources(self, request: _Request) -> dict[int, list[Box]]:
        """Who has which boxes of what is asked for, in the order in which they are packed."""
        found: dict[int, list[Box]] = {}
        for rank, box in self._owners[request.number]:
            shared = boxes.overlap(box, request.box)
            if shared:
                found.setdefault(rank, []).append(shared)
        return found

    # ---- what all ranks tell each other

    def _told_boxes(self, pieces: list[Piece]) -> dict[int, list[tuple[int, Box]]]:
        """Who has which boxes of which tensors."""
        most = int(self._of_all(torch.tensor([len(pieces)])).max())
        rows = [_Request(_ASK, piece.number, piece.box).row() for piece in pieces]
        rows += [_Request(_MEET).row()] * (most - len(pieces))  # all ranks tell equally much
        found: dict[int, list[tuple[int, Box]]] = {}
        for rank, told in enumerate(self._of_all(torch.tensor(rows, dtype=torch.int64)).tolist()):
            for request in map(_Request.of_row, told):
                if request.what == _ASK:
                    found.setdefault(request.number, []).append((rank, request.box))
        return found

    def _of_all(self, row: Tensor) -> Tensor:
        """int64 [n, ...] of every rank: [ranks, n, ...]. raises Environment"""
        if self.size == 1:
            return row[None]
        found = [torch.empty_like(row, device=self._device) for _ in range(self.size)]
        with self._noticed():
            dist.all_gather(found, row.to(self._device), group=self._group)
        return torch.stack(found).cpu()

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            with noticed(self.size, _AGAIN):
                yield
        except Environment:
            self._is_over = self._is_lost = True
            raise


@dataclass(frozen=True)
class ExchangingRanks(Ranks):
    """Ranks that answer each other while they wait."""

    exchange: Exchange | None = None

    def meet(self, stop: StopFlag) -> None:
        """As Ranks says."""
        assert self.exchange is not None
        stop.check()
        self.exchange.meet()


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must be that this group sends."""
    kinds = [pair.partition(":")[0] for pair in get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())
