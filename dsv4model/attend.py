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

from .layers import unit_rms, wide
from .rope import Turn, rotate

_CHUNK = {"cpu": 64, "cuda": 512}  # queries at a time: on a CPU what stays in its second-level cache


class View(NamedTuple):
    """What each query may see. Counts are tokens at hand, those of the cache first."""

    window: int
    past: int  # keys before that of the first query
    starts: Tensor  # [B or 1, S] the first key of the query's document, counted from the first query's own
    first: Tensor  # [B or 1, S] the first entry ...
    end: Tensor  # [B or 1, S] ... and the one after the last
    picks: Tensor | None  # [B, S, K] the entries chosen among these, -1: none; None: all of them


class _Part(NamedTuple):
    """A chunk of queries and the keys and entries that it can see at most."""

    begin: int
    end: int
    keys: slice
    entries: slice


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


def attend_plain(q_BSND: Tensor, kv_BLD: Tensor, entries_BTD: Tensor, sinks_N: Tensor, turn: Turn, eps: float,
                 view: View) -> Tensor:  # fmt: skip
    """The slow twin: all queries against everything at once."""
    length, num_entries = q_BSND.shape[1], entries_BTD.shape[1]
    whole = _Part(0, length, slice(0, kv_BLD.shape[1]), slice(0, num_entries))
    everything = view._replace(picks=None)
    sees = _sees_entries(everything, whole, q_BSND.device)
    if view.picks is not None:
        index = torch.arange(num_entries, device=q_BSND.device)
        sees = sees & (view.picks.unsqueeze(-1) == index).any(2)
    return _attend_chunk(q_BSND, kv_BLD, entries_BTD, sinks_N, turn, eps, _sees_keys(view, whole), sees)


def queries(q_BSND: Tensor, turn: Turn, eps: float) -> Tensor:
    """Every head over its own RMS (no weight), then rotated."""
    return rotate(unit_rms(wide(q_BSND), eps).to(q_BSND.dtype), turn)


def _attend_chunk(q_BCND: Tensor, kv_BLD: Tensor, entries: Tensor, sinks_N: Tensor, turn: Turn, eps: float,
                  sees_keys_BCL: Tensor, sees_entries_BCK: Tensor) -> Tensor:  # fmt: skip
    """The formulas, for some queries. entries [B, T, D] are the same for all, [B, C, K, D] are each query's own."""
    dtype = q_BCND.dtype
    q = wide(queries(q_BCND, turn, eps))
    batch, count, heads, width = q.shape
    keys, entries = wide(kv_BLD), wide(entries)
    of_all = entries.dim() == 3
    to_keys = (q.flatten(1, 2) @ keys.mT).view(batch, count, heads, -1)
    to_entries = q.flatten(1, 2) @ entries.mT if of_all else q @ entries.mT
    scores = torch.cat((to_keys, to_entries.view(batch, count, heads, -1)), -1) * width**-0.5
    masks = (sees_keys_BCL, sees_entries_BCK)
    sees = torch.cat([mask.expand(batch, -1, -1) for mask in masks], -1).unsqueeze(2)
    scores = scores.masked_fill(~sees, float("-inf"))
    sink = wide(sinks_N)[:, None].expand(batch, count, heads, 1)  # takes its share, and gives nothing
    weight = torch.softmax(torch.cat((scores, sink), -1), -1).to(dtype)[..., :-1]
    on_keys, on_entries = wide(weight).split((keys.shape[1], sees_entries_BCK.shape[-1]), -1)
    out = (on_keys.flatten(1, 2) @ keys).view(q.shape)
    seen = on_entries.flatten(1, 2) @ entries if of_all else on_entries @ entries
    return rotate(out + seen.view(q.shape), turn.back()).to(dtype)


def _sees_keys(view: View, part: _Part) -> Tensor:
    """bool [B or 1, C, L]: the last W keys up to the query's own, of its document."""
    starts = view.starts[:, part.begin : part.end]
    own = torch.arange(part.begin, part.end, device=starts.device)
    key = torch.arange(part.keys.start, part.keys.stop, device=starts.device) - view.past
    first = torch.maximum(starts, own - view.window + 1)
    return (key >= first.unsqueeze(-1)) & (key <= own[:, None])


def _sees_entries(view: View, part: _Part, device: torch.device) -> Tensor:
    """bool [B or 1, C, K]"""
    if view.picks is not None:
        return view.picks[:, part.begin : part.end] >= 0
    entry = torch.arange(part.entries.start, part.entries.stop, device=device)
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
    """Chunk by chunk, twice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor, turn: Turn, eps: float, view: View
                ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, kv, entries, sinks)
        ctx.rest = turn, eps, view
        out = torch.empty_like(q)
        for part, inputs in _chunks(q, kv, entries, view):
            out[:, part.begin : part.end] = _run(part, inputs, sinks, turn, eps, view)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sinks = ctx.saved_tensors
        turn, eps, view = ctx.rest
        grad_q = torch.empty_like(q)
        grad_kv, grad_entries, grad_sinks = (torch.zeros_like(wide(x)) for x in (kv, entries, sinks))
        for part, inputs in _chunks(q, kv, entries, view):
            leaves = [*(x.detach().requires_grad_() for x in inputs), sinks.detach().requires_grad_()]
            with torch.enable_grad():
                out = _run(part, leaves[:3], leaves[3], turn, eps, view)
            of_q, of_kv, of_entries, of_sinks = torch.autograd.grad(
                out, leaves, grad[:, part.begin : part.end]
            )
            grad_q[:, part.begin : part.end] = of_q
            grad_kv[:, part.keys] += of_kv
            grad_sinks += of_sinks
            if view.picks is None:
                grad_entries[:, part.entries] += of_entries
            else:
                index = _flat_picks(view.picks[:, part.begin : part.end], entries.shape[1])
                grad_entries.flatten(0, 1).index_add_(0, index, wide(of_entries).flatten(0, 2))
        return (
            grad_q,
            grad_kv.to(kv.dtype),
            grad_entries.to(entries.dtype),
            grad_sinks.to(sinks.dtype),
            None,
            None,
            None,
        )


def _chunks(q: Tensor, kv: Tensor, entries: Tensor, view: View) -> Iterator[tuple[_Part, list[Tensor]]]:
    """Each chunk's queries, keys and entries."""
    for part in _parts(view, q.shape[1], q.device):
        if view.picks is None:
            seen = entries[:, part.entries]
        else:
            picks = view.picks[:, part.begin : part.end]
            index = _flat_picks(picks, entries.shape[1])
            seen = entries.flatten(0, 1).index_select(0, index).view(*picks.shape, entries.shape[2])
        yield part, [q[:, part.begin : part.end], kv[:, part.keys], seen]


def _flat_picks(picks_BCK: Tensor, num_entries: int) -> Tensor:
    """Rows of entries [B * T, D]; where nothing is picked, the row's first, whose weight is 0."""
    row = torch.arange(picks_BCK.shape[0], device=picks_BCK.device)[:, None, None] * num_entries
    return (picks_BCK.clamp_min(0) + row).flatten()


def _run(part: _Part, inputs: list[Tensor], sinks: Tensor, turn: Turn, eps: float, view: View) -> Tensor:
    q, keys, entries = inputs
    sees = _sees_keys(view, part), _sees_entries(view, part, q.device)
    return _attend_chunk(q, keys, entries, sinks, turn.at(part.begin, part.end), eps, *sees)
