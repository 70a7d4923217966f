"""Which tokens stand where: positions, documents in one row, groups that become compressed entries.

Owns the index arithmetic that keeps documents apart; knows no weights.
Source: paper sec. 4.2 (sample-level masks), sec. 2.3.1 (compression; a tail shorter than a group waits).

    B batch, S new tokens, T entries, r tokens per entry
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4ckpt.errors import Usage

from .layers import dtype_name


class Groups(NamedTuple):
    """The groups of r tokens that the rows are pooled in, and who may see what comes of them.

    Entries of one row stand one after the other, those of its first document first; padding at the end is seen by none.
    """

    ratio: int
    num: int  # T, of the row that has most
    tokens: Tensor | None  # [B, T * r] which tokens; None: the first T * r, in order
    positions: Tensor  # [B or 1, T] of each group's first token in its document
    follows: Tensor | None  # bool [B, T] the group before is of the same document; None: of all but the first
    first: Tensor  # [B or 1, S] the first entry that a token may see ...
    end: Tensor  # [B or 1, S] ... and the one after the last

    def take(self, x_BSC: Tensor) -> Tensor:
        """The tokens of each group, [B, T, r, C]."""
        if self.tokens is None:
            grouped = x_BSC[:, : self.num * self.ratio]
        else:
            row = torch.arange(len(x_BSC), device=x_BSC.device)[:, None] * x_BSC.shape[1]
            grouped = x_BSC.flatten(0, 1).index_select(0, (self.tokens + row).flatten())
            grouped = grouped.view(*self.tokens.shape, x_BSC.shape[-1])
        return grouped.unflatten(1, (self.num, self.ratio))


class Packing(NamedTuple):
    """Where the tokens at hand stand."""

    positions: Tensor  # [B or 1, S] within each token's document
    starts: Tensor  # [B or 1, S] where its document begins, counted from the first token at hand; below 0: in the cache
    documents: Tensor | None  # [B, S] as the caller numbered them
    past: int  # tokens in the cache, before those at hand

    def groups(self, ratio: int) -> Groups:
        """The groups for a compress ratio."""
        if self.documents is not None:
            return _packed_groups(self.positions, ratio)
        length = self.positions.shape[1]
        begin = self.past // ratio  # entries that the cache has
        num = (self.past + length) // ratio - begin
        device = self.positions.device
        positions = torch.arange(begin, begin + num, device=device)[None] * ratio
        end = (self.positions + 1) // ratio
        return Groups(ratio, num, None, positions, None, torch.zeros_like(end), end)


def pack(shape: torch.Size, device: torch.device, documents: Tensor | None, past: int) -> Packing:
    """Where tokens of this shape [B, S] stand after `past` tokens of the same document, or in documents of their own.

    documents  [B, S] whole numbers; neighbours with the same number are one document
    raises     Usage
    """
    batch, length = shape
    if documents is None:
        positions = torch.arange(past, past + length, device=device)[None]
        return Packing(positions, torch.full_like(positions, -past), None, past)
    if documents.shape != shape or documents.is_floating_point() or documents.is_complex():
        raise Usage(
            "documents does not fit input_ids",
            expected=f"one whole number per token, {list(shape)}",
            found=f"{dtype_name(documents.dtype)} {list(documents.shape)}",
            do="give every token the number of its document",
        )
    index = torch.arange(length, device=device).expand(batch, length)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = torch.where(begins, index, 0).cummax(1).values
    return Packing(index - starts, starts, documents, 0)


def _packed_groups(positions_BS: Tensor, ratio: int) -> Groups:
    """Groups begin anew with each document; what is left at its end makes no entry."""
    batch, device = len(positions_BS), positions_BS.device
    completes = positions_BS % ratio == ratio - 1  # the token is the last of a group
    num = int(completes.sum(1).max())
    slot = completes.cumsum(1)  # entries that end at or before this token
    last = torch.full((batch, num), ratio - 1, device=device)  # padding pools whatever stands first
    rows, tokens = completes.nonzero(as_tuple=True)
    last[rows, slot[rows, tokens] - 1] = tokens
    token = last[..., None] + torch.arange(1 - ratio, 1, device=device)
    positions = positions_BS.gather(1, last) - (ratio - 1) if num else last
    mine = (positions_BS + 1) // ratio  # entries of the token's own document that end at or before it
    own_start = slot - mine
    return Groups(ratio, num, token.flatten(1), positions, positions > 0, own_start, own_start + mine)


def shifted_left(ids_BS: Tensor, documents: Tensor | None, end_id: int) -> Tensor:
    """The next token of each token; after the last of a document comes `end_id`."""
    following = torch.full_like(ids_BS, end_id)
    following[:, :-1] = ids_BS[:, 1:]
    if documents is not None:
        ends = documents[:, 1:] != documents[:, :-1]
        following[:, :-1][ends] = end_id
    return following
