"""Experts divided over ranks: tokens go to the ranks that keep their experts, and come back.

Every rank has tokens of its own and experts [E / N] of each layer.  An exchange is one all-to-all; which row goes where
is known once, from counts.  Knows no model but the experts of one layer.

    T tokens, H hidden, K experts per token, P = T * K pairs sent, R pairs received, N ranks
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .moe import Here, Pairs, collected, dispatched


class Exchange:
    """What stands between a router, which knows all experts, and the experts that are here."""

    def __init__(self, group: dist.ProcessGroup, num_here: int) -> None:
        """num_here: experts of a layer that each rank keeps; rank r those from r * num_here"""
        self._group, self._num_here = group, num_here
        self._size = dist.get_world_size(group)

    def __call__(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, here: Here) -> Tensor:
        """As Experts.forward, with ids of all experts; `here` takes ids of those that this rank keeps."""
        pairs = Pairs.of(ids_TK, self._size * self._num_here)
        sent_NE = torch.diff(pairs.ends, prepend=pairs.ends.new_zeros(1)).long().view(self._size, -1)
        received_NE = torch.empty_like(sent_NE)
        dist.all_to_all_single(received_NE, sent_NE, group=self._group)
        sent, received = sent_NE.sum(1).tolist(), received_NE.sum(1).tolist()
        x_RH = self._moved(dispatched(x_TH, pairs), sent, received)
        weights_R = self._moved(weights_TK.flatten()[pairs.place], sent, received)
        expert = torch.arange(self._num_here, device=x_TH.device).repeat(self._size)
        ids_R = expert.repeat_interleave(received_NE.flatten())
        out_RH = here(x_RH, ids_R[:, None], weights_R[:, None])  # one expert for each row
        # what was summed is one value in the dtype of x: it goes back as that
        return collected(self._moved(out_RH.to(x_TH.dtype), received, sent), pairs)

    def _moved(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out: Tensor = _Moved.apply(rows, sent, received, self._group)
        return out


class _Moved(torch.autograd.Function):
    """Rows to the ranks that they are for; gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
