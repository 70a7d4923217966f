"""The indexer's own loss: how far its scores are from where attention looks.

What an indexer picks has no gradient, so it learns from attention itself: the shares that all heads give the entries at
hand, added up and normalised, against the softmax of its scores of the same entries.  Queries are taken a few dozen at
a time, as attention takes them.  Knows no weights, no layers.
Source: DeepSeek-V3.2 sec. 2.1 (eq. 3 and 4); paper sec. 4.2 (a warm-up of the indexer before attention is sparse).

    B batch, S queries, A indexer heads, D their width, T entries, C queries of a chunk, K entries that these can see
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .attend import Look
from .compressor import index_scores
from .layers import wide


@torch.compiler.disable  # a loop over chunks, with gradients of its own
def divergence(
    q_BSAD: Tensor, weight_BSA: Tensor, keys_BTD: Tensor, looks: Iterable[Look], counted_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of KL(attention || indexer) and, for comparison, of KL(attention || the same for every entry).

    q, weight, keys  the indexer's, with gradient
    looks            where attention looks, for all queries
    counted          bool [B, S]; None: every token counts. One that sees no entry adds 0
    returns          float32 scalars (float64 in float64); the second has no gradient
    memory           the scores of a chunk, and the gradients of q, weight and keys, which are made in the forward pass
    """
    total, uniform = _Divergence.apply(q_BSAD, weight_BSA, keys_BTD, looks, counted_BS)
    return total, uniform


class _Divergence(torch.autograd.Function):
    """The gradients are linear in what comes back, so that they are made once, while the scores are there."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, weight: Tensor, keys: Tensor, looks: Iterable[Look], counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        of_q, of_weight, of_keys = (torch.zeros_like(wide(x)) for x in (q, weight, keys))
        total, uniform = of_q.new_zeros(()), of_q.new_zeros(())
        for look in looks:
            rows = look.queries
            counts = None if counted is None else counted[:, rows]
            kept = saved_tensors_hooks(_as_it_is, _as_it_is)  # not by the hooks of a block that is recomputed
            with torch.enable_grad(), kept:
                leaves = [x.detach().requires_grad_() for x in (q[:, rows], weight[:, rows], keys)]
                scores = index_scores(leaves[0], leaves[1], look.take(leaves[2]))
            found, even, slope = _compared(scores.detach(), look, counts)
            total, uniform = total + found, uniform + even
            grads = torch.autograd.grad(scores, leaves, slope)
            of_q[:, rows], of_weight[:, rows] = grads[:2]
            of_keys += grads[2]
        ctx.save_for_backward(of_q.to(q.dtype), of_weight.to(weight.dtype), of_keys.to(keys.dtype))
        ctx.mark_non_differentiable(uniform)
        return total, uniform

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _of_uniform: Tensor) -> tuple[Tensor | None, ...]:
        return *((made * grad).to(made.dtype) for made in ctx.saved_tensors), None, None


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _compared(scores_BCK: Tensor, look: Look, counted_BC: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both sums of a chunk, and the slope of the first by the scores."""
    target = look.share / look.share.sum(-1, keepdim=True).clamp_min(torch.finfo(look.share.dtype).tiny)
    if counted_BC is not None:
        target = target * counted_BC.unsqueeze(-1)
    hidden = ~look.seen
    logs = scores_BCK.masked_fill(hidden, float("-inf")).log_softmax(-1).masked_fill(hidden, 0)
    share = target.sum(-1, keepdim=True)  # 1, or 0 where nothing is seen or counted
    known = torch.xlogy(target, target).sum()
    num = look.seen.sum(-1, keepdim=True, dtype=target.dtype)
    even = (share * num.clamp_min(1).log()).sum()
    slope = logs.exp().masked_fill(hidden, 0) * share - target
    return known - (target * logs).sum(), known + even, slope
