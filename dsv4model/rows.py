"""Documents -> rows of one length, and the batches of every step: a pure function of documents, recipe and step.

Owns packing and order; knows no files, no ranks but a number of parts.
Source: paper sec. 4.2 (best-fit packing, sample-level masks).
"""

#  B rows, S tokens

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .corpus import Document
from .losses import IGNORED

_WINDOW = 8192  # documents that are packed together


class Batch(NamedTuple):
    """Rows for a forward pass."""

    ids: Tensor  # int64 [B, S]
    next_ids: Tensor  # int64 [B, S] the token after each; the end token after the last of a document
    documents: Tensor  # int64 [B, S] rising within a row; padding is -1
    targets: Tensor  # int64 [B, S] the token after each, where it is learned; else IGNORED
    targets_mtp: Tensor  # int64 [B, S] the one after that

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that is the same everywhere."""

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=12).digest()

    return sorted(range(count), key=rank)


def packed(lengths: Sequence[int], order: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of documents, by best fit: the longest first, each into the row that it fills most.

    lengths  of all documents, each at most row_length
    order    the documents to pack, a window at a time, so that what comes late stays late
    returns  rows and the documents in them, in the order of their first ones
    """
    rows = []
    for begin in range(0, len(order), _WINDOW):
        rows += _packed(lengths, order[begin : begin + _WINDOW], row_length)
    return rows


def _packed(lengths: Sequence[int], window: Sequence[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []  # of places in the window
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for place in sorted(range(len(window)), key=lambda place: -lengths[window[place]]):
        need = lengths[window[place]]
        at = bisect.bisect_left(rooms, (need, 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(place)
        if room > need:
            bisect.insort(rooms, (room - need, row))
    return [[window[place] for place in row] for row in sorted(sorted(row) for row in rows)]


class Rows:
    """All rows of all epochs, one after the other."""

    def __init__(
        self, documents: Sequence[Document], row_length: int, *, pack: bool, seed: int | None, end_id: int
    ) -> None:
        """seed: None: every epoch in the order of the files"""
        self._documents, self._length, self._end = documents, row_length, end_id
        self._lengths = [len(document) for document in documents]
        self._packs, self._seed = pack, seed
        self._epochs: dict[int, list[list[int]]] = {}
        self._begins = [0]  # of each epoch, in rows

    def batch(self, begin: int, count: int) -> Batch:
        """Rows [begin, begin + count) of the run."""
        made = [self._tensors(self._documents_of(number)) for number in range(begin, begin + count)]
        return Batch(*(torch.stack(column) for column in zip(*made, strict=True)))

    def epoch_of(self, number: int) -> tuple[int, int]:
        """(epoch, row within it) of a row of the run."""
        while self._begins[-1] <= number:
            self._begins.append(self._begins[-1] + len(self._rows(len(self._begins) - 1)))
        epoch = bisect.bisect_right(self._begins, number) - 1
        return epoch, number - self._begins[epoch]

    @property
    def per_epoch(self) -> int:
        """Rows of the first epoch; others have about as many."""
        return len(self._rows(0))

    def efficiency(self) -> float:
        """Tokens over places, in the first epoch."""
        return sum(self._lengths) / (self.per_epoch * self._length)

    def _documents_of(self, number: int) -> list[int]:
        epoch, row = self.epoch_of(number)
        return self._rows(epoch)[row]

    def _rows(self, epoch: int) -> list[list[int]]:
        """Rows of an epoch; the last two that were asked for stay at hand."""
        if epoch not in self._epochs:
            count = len(self._documents)
            order = list(range(count)) if self._seed is None else order_of(count, self._seed, epoch)
            rows = packed(self._lengths, order, self._length) if self._packs else [[item] for item in order]
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = rows
        return self._epochs[epoch]

    def _tensors(self, documents: Sequence[int]) -> Iterator[Tensor]:
        ids = torch.full((self._length,), self._end)
        number = torch.full((self._length,), -1)
        following, *targets = (torch.full((self._length,), value) for value in (self._end, IGNORED, IGNORED))
        at = 0
        for index, document in enumerate(documents):
            item = self._documents[document]
            tokens = torch.frombuffer(item.ids, dtype=torch.int32).long()
            learned = torch.where(
                torch.frombuffer(bytearray(item.counted), dtype=torch.bool), tokens, IGNORED
            )
            end = at + len(tokens)
            ids[at:end], number[at:end] = tokens, index
            following[at : end - 1] = tokens[1:]
            for ahead, target in enumerate(targets, 1):
                target[at : max(at, end - ahead)] = learned[ahead:]
            at = end
        yield from (ids, following, number, *targets)
