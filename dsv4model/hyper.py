"""Hyper-connections: several residual streams, mixed before and after every sublayer.  Knows no attention, no experts.

All of it is float32, in a bfloat16 model too.  Four steps have their gradients written out, so that only the streams
are kept for backward, and as they are stored; the formulas are their forward lines.
Source: paper sec. 2.2 (manifold-constrained hyper-connections); kernel.py of the reference for where the epsilons go.

    B batch, S tokens, J = K streams, H hidden
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import Config
from .layers import Module, inverse_rms, wide


class HyperConnection(Module):
    """What one sublayer reads from the streams (pre), and how they go on (post, comb)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        streams = config.hc_mult
        self.fn = nn.Parameter(torch.empty((2 + streams) * streams, streams * config.hidden))
        self.base = nn.Parameter(torch.empty((2 + streams) * streams))
        self.scale = nn.Parameter(torch.empty(3))
        self.norm_eps, self.eps, self.iters = config.norm_eps, config.hc_eps, config.sinkhorn_iters

    def forward(self, streams_BSJH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre [B, S, J], post [B, S, K] and comb [B, S, J, K]."""
        count = streams_BSJH.shape[2]
        mixes = mixing_logits(streams_BSJH, self.fn, self.norm_eps)
        to_pre, to_post, to_comb = mixes.split((count, count, count * count), -1)
        base_pre, base_post, base_comb = wide(self.base).split((count, count, count * count))
        scale = wide(self.scale)
        pre = torch.sigmoid(to_pre * scale[0] + base_pre) + self.eps
        post = 2 * torch.sigmoid(to_post * scale[1] + base_post)  # no epsilon here
        logits = (to_comb * scale[2] + base_comb).unflatten(-1, (count, count))
        comb = doubly_stochastic(logits, self.iters, self.eps)
        self.show("pre", pre)
        self.show("post", post)
        self.show("comb", comb)
        return pre, post, comb


class HyperHead(Module):
    """The streams become one hidden state, before the last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden))
        self.hc_base = nn.Parameter(torch.empty(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.norm_eps, self.eps = config.norm_eps, config.hc_eps

    def forward(self, streams_BSJH: Tensor) -> Tensor:
        mixes = mixing_logits(streams_BSJH, self.hc_fn, self.norm_eps)
        pre = torch.sigmoid(mixes * wide(self.hc_scale) + wide(self.hc_base)) + self.eps
        return collapse(streams_BSJH, pre)


def mixing_logits(streams_BSJH: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn applied to all streams side by side; their RMS divides the product, not the streams."""
    out: Tensor = _MixingLogits.apply(streams_BSJH.flatten(2), fn, norm_eps)
    return out


class _MixingLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, fn: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(flat, eps)
        product = F.linear(wide(flat), wide(fn))
        ctx.save_for_backward(flat, fn, inverse, product)
        return product * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, fn, inverse, product = ctx.saved_tensors
        of_product = grad * inverse
        slope = (grad * product).sum(-1, keepdim=True) * inverse.pow(3) / -flat.shape[-1]
        of_flat = (of_product @ wide(fn)).addcmul_(wide(flat), slope)
        of_fn = of_product.flatten(0, 1).mT @ wide(flat).flatten(0, 1)
        return of_flat.to(flat.dtype), of_fn.to(fn.dtype), None


def collapse(streams_BSJH: Tensor, pre_BSJ: Tensor) -> Tensor:
    """The weighted sum of the streams."""
    out: Tensor = _Collapse.apply(streams_BSJH, pre_BSJ)
    return out


class _Collapse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(streams, pre)
        return (pre.unsqueeze(-2) @ wide(streams)).squeeze(-2).to(streams.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        streams, pre = ctx.saved_tensors
        grad = wide(grad)
        of_pre = (wide(streams) @ grad.unsqueeze(-1)).squeeze(-1)
        return (pre.unsqueeze(-1) * grad.unsqueeze(-2)).to(streams.dtype), of_pre


def spread(out_BSH: Tensor, streams_BSJH: Tensor, post_BSK: Tensor, comb_BSJK: Tensor) -> Tensor:
    """stream_k = post_k * out + sum_j comb[j, k] * stream_j: the sum runs over comb's first index."""
    new: Tensor = _Spread.apply(out_BSH, streams_BSJH, post_BSK, comb_BSJK)
    return new


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(out, streams, post, comb)
        mixed = comb.mT @ wide(streams)
        return mixed.addcmul_(post.unsqueeze(-1), wide(out).unsqueeze(-2)).to(streams.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, streams, post, comb = ctx.saved_tensors
        grad = wide(grad)
        of_out = (post.unsqueeze(-2) @ grad).squeeze(-2)
        of_post = (grad @ wide(out).unsqueeze(-1)).squeeze(-1)
        of_comb = wide(streams) @ grad.mT
        return of_out.to(out.dtype), (comb @ grad).to(streams.dtype), of_post, of_comb


def doubly_stochastic(logits_BSJK: Tensor, iters: int, eps: float) -> Tensor:
    """Rows softmaxed, plus eps; then columns and rows divided by their sums in turn, ending on columns (Sinkhorn)."""
    logits_JKT = logits_BSJK.flatten(0, 1).permute(1, 2, 0).contiguous()  # sums over the outer axes are fast
    comb_JKT: Tensor = _Sinkhorn.apply(torch.softmax(logits_JKT, 1) + eps, iters, eps)
    by_stream_BSKJ = (
        comb_JKT.permute(2, 1, 0).contiguous().view(logits_BSJK.shape)
    )  # as `spread` multiplies with it
    return by_stream_BSKJ.mT


class _Sinkhorn(torch.autograd.Function):
    """Keeps where it begins, and goes the way once more backward: 2 * iters tensors would else wait for it."""

    @staticmethod
    def forward(ctx: Any, comb_JKT: Tensor, iters: int, eps: float) -> Tensor:
        ctx.save_for_backward(comb_JKT)
        ctx.iters, ctx.eps = iters, eps
        for axis in _axes(iters):
            comb_JKT = comb_JKT / (comb_JKT.sum(axis, keepdim=True) + eps)
        return comb_JKT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (comb,) = ctx.saved_tensors
        steps = []
        for axis in _axes(ctx.iters):
            total = comb.sum(axis, keepdim=True) + ctx.eps
            comb = comb / total
            steps.append((axis, total, comb))
        for axis, total, comb in reversed(
            steps
        ):  # d(x / sum x) = (d - sum(d * y)) / sum x, with y = x / sum x
            grad = (grad - (grad * comb).sum(axis, keepdim=True)) / total
        return grad, None, None


def _axes(iters: int) -> list[int]:
    """Columns first (the sum over j), then rows and columns in turn."""
    return [0] + [1, 0] * (iters - 1)
