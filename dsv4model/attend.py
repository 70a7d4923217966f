"""Attention over a window and some compressed entries, with one softmax and a sink.  Knows no weights, no layers.

Keys are values: one vector per token serves all heads as both.  Queries are taken a few dozen at a time, against the
keys that these can see, and backward computes the same once more; so time and memory grow with S * (W + K), not S * S.
Source: paper sec. 2.3 (eq. 14-19, shared key-value heads, sinks); kernel.py sparse_attn of the reference.

    B batch, S queries, N heads, D head, R rotated dimensions of it, L keys at hand, W window, T entries,
    K entries picked per query, C queries of a chunk
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import inverse_rms, unit_rms, unit_rms_backward, wide
from .rope import Turn, rotate, rotate_

_CHUNK = {"cpu": 32, "cuda": 512}  # queries at a time: on a CPU what stays in its second-level cache


class View(NamedTuple):
    """What each query may see. Counts are tokens at hand, those of the cache first."""

    window: int
    past: int  # keys before that of the first query
    starts: Tensor  # [B or 1, S] the first key of the query's document, counted from the first query's own
    first: Tensor  # [B or 1, S] the first entry ...
    end: Tensor  # [B or 1, S] ... and the one after the last
    picks: Tensor | None  # [B, S, K] the entries chosen among these, -1: none; None: all of them


class Look(NamedTuple):
    """Where some queries look among the entries."""

    queries: slice
    entries: slice  # the K that these queries can see at most ...
    picks: Tensor | None  # ... or of each query its own K, as rows of entries [B * T, D]
    seen: Tensor  # bool [B or 1, C, K]
    share: Tensor  # float32 [B, C, K] what the heads give an entry, all together; 0 where it is not seen

    def take(self, x_BTD: Tensor) -> Tensor:
        """Of one vector per entry those at hand: [B, K, D], or [B, C, K, D], each query's own."""
        if self.picks is None:
            return x_BTD[:, self.entries]
        return x_BTD.flatten(0, 1).index_select(0, self.picks).view(*self.share.shape, -1)


class _Part(NamedTuple):
    """A chunk of queries and the keys and entries that it can see at most."""

    begin: int
    end: int
    keys: slice
    entries: slice


@torch.compiler.disable  # a loop over chunks, with gradients of its own
def attend(q_BSND: Tensor, kv_BLD: Tensor, entries_BTD: Tensor, sinks_N: Tensor, turn: Turn, eps: float, view: View
           ) -> Tensor:  # fmt: skip
    """Normalize and rotate the queries, attend, rotate the result back.

    q        [B, S, N, D] as projected
    kv       [B, L, D] rotated, the last S those of the queries
    entries  [B, T, D] rotated
    returns  [B, S, N, D] in q's dtype; softmax and sums in float32 (float64 for float64)
    """
    out: Tensor = _Attend.apply(q_BSND, kv_BLD, entries_BTD, sinks_N, turn, eps, view)
    return out


def attend_plain(
    q_BSND: Tensor, kv_BLD: Tensor, entries_BTD: Tensor, sinks_N: Tensor, turn: Turn, eps: float, view: View
) -> Tensor:
    """The slow twin: the formulas, all queries against everything at once."""
    whole = _Part(0, q_BSND.shape[1], slice(0, kv_BLD.shape[1]), slice(0, entries_BTD.shape[1]))
    sees_keys, sees_entries = _sees_keys(view, whole), _sees_entries(view._replace(picks=None), whole)
    if view.picks is not None:
        entry = torch.arange(entries_BTD.shape[1], device=q_BSND.device)
        sees_entries = sees_entries & (view.picks.unsqueeze(-1) == entry).any(2)
    q, heads = wide(queries(q_BSND, turn, eps)), q_BSND.shape[2]
    seen_BLD = wide(torch.cat((kv_BLD, entries_BTD), 1))
    sees = torch.cat([mask.expand(len(q), -1, -1) for mask in (sees_keys, sees_entries)], -1)
    scores = torch.einsum("bsnd,bld->bsnl", q, seen_BLD) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees.unsqueeze(2), float("-inf"))
    sink = wide(sinks_N)[:, None].expand(*q.shape[:2], heads, 1)  # takes its share, and gives nothing
    share = torch.softmax(torch.cat((scores, sink), -1), -1).to(q_BSND.dtype)[..., :-1]
    out = torch.einsum("bsnl,bld->bsnd", wide(share), seen_BLD)
    return rotate(out, turn.back()).to(q_BSND.dtype)


@torch.no_grad()
def looks(
    q_BSND: Tensor, kv_BLD: Tensor, entries_BTD: Tensor, sinks_N: Tensor, turn: Turn, eps: float, view: View
) -> Iterator[Look]:
    """Where attend looks among the entries, chunk by chunk. Its arguments; without gradient."""
    for part in _parts(view, q_BSND.shape[1], q_BSND.device):
        chunk = _Chunk(part, q_BSND, kv_BLD, entries_BTD, sinks_N, turn, eps, view)
        share = chunk.share()[..., chunk.keys.shape[-2] : -1].sum(2)
        picks = None if chunk.picks is None else chunk.index
        yield Look(slice(part.begin, part.end), part.entries, picks, _sees_entries(view, part), share)


def queries(q_BSND: Tensor, turn: Turn, eps: float) -> Tensor:
    """Every head over its own RMS (no weight), then rotated."""
    return rotate(unit_rms(q_BSND, eps).to(q_BSND.dtype), turn)


def _sees_keys(view: View, part: _Part) -> Tensor:
    """bool [B or 1, C, L]: the last W keys up to the query's own, of its document."""
    starts = view.starts[:, part.begin : part.end]
    own = torch.arange(part.begin, part.end, device=starts.device)
    key = torch.arange(part.keys.start, part.keys.stop, device=starts.device) - view.past
    first = torch.maximum(starts, own - view.window + 1)
    return (key >= first.unsqueeze(-1)) & (key <= own[:, None])


def _sees_entries(view: View, part: _Part) -> Tensor:
    """bool [B or 1, C, K]"""
    if view.picks is not None:
        return view.picks[:, part.begin : part.end] >= 0
    entry = torch.arange(part.entries.start, part.entries.stop, device=view.first.device)
    first, end = (bound[:, part.begin : part.end].unsqueeze(-1) for bound in (view.first, view.end))
    return (entry >= first) & (entry < end)


def _parts(view: View, length: int, device: torch.device) -> list[_Part]:
    size = _CHUNK.get(device.type, 512)
    begins = range(0, length, size)
    if view.picks is None and length:
        firsts = [int(part.min()) for part in view.first.cpu().split(size, 1)]
        ends = [int(part.max()) for part in view.end.cpu().split(size, 1)]
    else:
        firsts = ends = [0] * len(begins)
    parts = []
    for begin, first, end in zip(begins, firsts, ends, strict=True):
        stop = min(begin + size, length)
        key = max(0, view.past + begin - view.window + 1)
        parts.append(_Part(begin, stop, slice(key, view.past + stop), slice(min(first, end), end)))
    return parts


class _Attend(torch.autograd.Function):
    """Chunk by chunk; backward makes the shares again instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor, turn: Turn, eps: float, view: View
    ) -> Tensor:
        out = torch.empty_like(q)
        for part in _parts(view, q.shape[1], q.device):
            chunk = _Chunk(part, q, kv, entries, sinks, turn, eps, view)
            mixed = chunk.mix(chunk.rounded(chunk.share()))
            out[:, part.begin : part.end] = rotate_(mixed, chunk.turn.back())
        ctx.save_for_backward(q, kv, entries, sinks, out)
        ctx.rest = turn, eps, view
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sinks, out = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_kv, grad_entries, grad_sinks = (torch.zeros_like(wide(x)) for x in (kv, entries, sinks))
        for part in _parts(ctx.rest[2], q.shape[1], q.device):
            chunk = _Chunk(part, q, kv, entries, sinks, *ctx.rest)
            share, rows = chunk.share(), slice(part.begin, part.end)
            of_out = wide(grad[:, rows])
            # d(softmax) = share * (d - sum(share * d)); that sum is grad . out, which no rotation changes
            common = (of_out * wide(out[:, rows])).sum(-1, keepdim=True)
            of_mixed = rotate_(of_out.clone(), chunk.turn)
            grad_sinks -= (share[..., -1:] * common).sum((0, 1, 3))
            of_scores = chunk.dots(of_mixed)[..., :-1].sub_(common).mul_(share[..., :-1])
            chunk.add_to_keys(grad_kv, grad_entries, of_scores, chunk.q)
            chunk.add_to_keys(grad_kv, grad_entries, chunk.rounded(share), of_mixed)
            grad_q[:, rows] = chunk.before_queries(chunk.mix(of_scores))
        return (
            grad_q, grad_kv.to(kv.dtype), grad_entries.to(entries.dtype), grad_sinks.to(sinks.dtype), None, None, None
        )  # fmt: skip


class _Chunk:
    """Some queries with what they can see, in float32. Shares are [B, C, N, keys + entries + the sink]."""

    def __init__(
        self, part: _Part, q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor, turn: Turn, eps: float, view: View
    ) -> None:  # fmt: skip
        self.part, self.view, self.sinks = part, view, sinks
        self.turn = turn.at(part.begin, part.end)
        self.projected = q[:, part.begin : part.end]
        self.scale = q.shape[-1] ** -0.5
        self.inverse = inverse_rms(self.projected, eps)
        self.q = wide((wide(self.projected) * self.inverse).to(q.dtype)) * self.scale
        rotate_(self.q, self.turn)
        self.keys = wide(kv[:, part.keys])
        self.picks = None if view.picks is None else view.picks[:, part.begin : part.end]
        if self.picks is None:
            self.entries = wide(entries[:, part.entries])  # [B, K, D], the same for all queries
        else:  # [B, C, K, D], each query's own
            self.index = _flat_picks(self.picks, entries.shape[1])
            self.entries = wide(entries.flatten(0, 1).index_select(0, self.index).view(*self.picks.shape, -1))

    def dots(self, x_BCND: Tensor) -> Tensor:
        """x . key and x . entry for all of them, and a free place for the sink."""
        num_keys, num_entries = self.keys.shape[-2], self.entries.shape[-2]
        out = x_BCND.new_empty(*x_BCND.shape[:3], num_keys + num_entries + 1)
        flat = out.flatten(1, 2)
        torch.bmm(x_BCND.flatten(1, 2), self.keys.mT, out=flat[..., :num_keys])
        if self.picks is None:
            torch.bmm(x_BCND.flatten(1, 2), self.entries.mT, out=flat[..., num_keys:-1])
        else:
            out[..., num_keys:-1] = x_BCND @ self.entries.mT
        return out

    def share(self) -> Tensor:
        """Softmax over everything visible and the sink, which takes its share and gives nothing."""
        scores = self.dots(self.q)
        scores[..., -1] = self.sinks
        num_keys = self.keys.shape[-2]
        scores[..., :num_keys].masked_fill_(~_sees_keys(self.view, self.part).unsqueeze(2), float("-inf"))
        hidden = ~_sees_entries(self.view, self.part).unsqueeze(2)
        scores[..., num_keys:-1].masked_fill_(hidden, float("-inf"))
        return torch.softmax(scores, -1)

    def rounded(self, share: Tensor) -> Tensor:
        """The shares as the reference multiplies them with values: in the activations' dtype."""
        return wide(share.to(self.projected.dtype))[..., :-1]

    def mix(self, share: Tensor) -> Tensor:
        """The sum of keys and entries by their shares, [B, C, N, D]."""
        on_keys, on_entries = share.split((self.keys.shape[-2], self.entries.shape[-2]), -1)
        out = torch.bmm(on_keys.flatten(1, 2), self.keys)
        if self.picks is None:
            return out.baddbmm_(on_entries.flatten(1, 2), self.entries).view(self.q.shape)
        return out.view(self.q.shape) + on_entries @ self.entries

    def add_to_keys(self, grad_kv: Tensor, grad_entries: Tensor, share: Tensor, x_BCND: Tensor) -> None:
        """Add each key's and entry's sum of x by their shares."""
        on_keys, on_entries = share.split((self.keys.shape[-2], self.entries.shape[-2]), -1)
        flat = x_BCND.flatten(1, 2)
        grad_kv[:, self.part.keys].baddbmm_(on_keys.flatten(1, 2).mT, flat)
        if self.picks is None:
            grad_entries[:, self.part.entries].baddbmm_(on_entries.flatten(1, 2).mT, flat)
        else:
            grad_entries.flatten(0, 1).index_add_(0, self.index, (on_entries.mT @ x_BCND).flatten(0, 2))

    def before_queries(self, grad_BCND: Tensor) -> Tensor:
        """The gradient of the projected queries from that of the scaled, rotated ones."""
        grad = rotate_(grad_BCND * self.scale, self.turn.back())
        return unit_rms_backward(grad, wide(self.projected) * self.inverse, self.inverse)


def _flat_picks(picks_BCK: Tensor, num_entries: int) -> Tensor:
    """Rows of entries [B * T, D]; where nothing is picked, the row's first, whose share is 0."""
    row = torch.arange(picks_BCK.shape[0], device=picks_BCK.device)[:, None, None] * num_entries
    return (picks_BCK.clamp_min(0) + row).flatten()
