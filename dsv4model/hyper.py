"""Hyper-connections: several residual streams, mixed before and after every sublayer.  Knows no attention, no experts.

All of it is float32, in a bfloat16 model too.
Source: paper sec. 2.2 (manifold-constrained hyper-connections); kernel.py of the reference for where the epsilons go.

    B batch, S tokens, J = K streams, H hidden
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import Config
from .layers import Module, wide


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
        """The sublayer's input [B, S, H], post [B, S, K] and comb [B, S, J, K]."""
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
        return collapse(streams_BSJH, pre), post, comb


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
    flat = wide(streams_BSJH.flatten(2))
    return F.linear(flat, wide(fn)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def collapse(streams_BSJH: Tensor, pre_BSJ: Tensor) -> Tensor:
    """The weighted sum of the streams."""
    return (pre_BSJ.unsqueeze(-2) @ wide(streams_BSJH)).squeeze(-2).to(streams_BSJH.dtype)


def spread(out_BSH: Tensor, streams_BSJH: Tensor, post_BSK: Tensor, comb_BSJK: Tensor) -> Tensor:
    """stream_k = post_k * out + sum_j comb[j, k] * stream_j: the sum runs over comb's first index."""
    mixed = comb_BSJK.transpose(-1, -2) @ wide(streams_BSJH)
    return (post_BSK.unsqueeze(-1) * wide(out_BSH).unsqueeze(2) + mixed).to(streams_BSJH.dtype)


def doubly_stochastic(logits_BSJK: Tensor, iters: int, eps: float) -> Tensor:
    """Rows softmaxed, plus eps; then columns and rows divided by their sums in turn, ending on columns (Sinkhorn).

    Backward computes it again: that is cheaper than keeping 80 tensors of it.
    """
    logits_JKT = logits_BSJK.flatten(0, 1).permute(1, 2, 0).contiguous()  # sums over the outer axes are fast
    comb_JKT = checkpoint(_sinkhorn, logits_JKT, iters, eps, use_reentrant=False)
    by_stream_BSKJ = (
        comb_JKT.permute(2, 1, 0).contiguous().view(logits_BSJK.shape)
    )  # as `spread` multiplies with it
    return by_stream_BSKJ.mT


def _sinkhorn(logits_JKT: Tensor, iters: int, eps: float) -> Tensor:
    comb = torch.softmax(logits_JKT, 1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb
