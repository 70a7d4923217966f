"""The attention sublayer: low-rank queries, one shared key-value head, compressed entries, grouped low-rank output.

Knows neither streams nor experts.
Source: paper sec. 2.3; model.py Attention of the reference.

    B batch, S tokens, H hidden, N heads, D head, G output groups, T entries
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attend import View, attend, looks, queries
from .cache import LayerCache
from .compressor import Compressor, Tap, simulated_cache
from .config import Config
from .indexing import divergence
from .layers import GroupedLinear, Linear, Module, RMSNorm, anchor
from .packing import Groups, Packing
from .rope import Turn, frequencies, rotate, turn
from .simulate import Simulation


@dataclass(frozen=True)
class Setting:
    """Where the tokens of a forward pass stand, as the layers of one compress ratio see it."""

    packing: Packing
    turn: Turn  # of the tokens
    groups: Groups | None  # None: no compression
    entry_turn: Turn | None  # of the new entries

    @classmethod
    def of(cls, config: Config, ratio: int, packing: Packing, dtype: torch.dtype) -> Setting:
        inv_freq = frequencies(config, ratio)
        groups = packing.groups(ratio) if ratio else None
        entry_turn = turn(groups.positions, inv_freq, dtype) if groups else None
        return cls(packing, turn(packing.positions, inv_freq, dtype), groups, entry_turn)


class Scored(NamedTuple):
    """What an indexer that learns makes its scores of. Gradients end at its own weights."""

    tap: Tap
    q: Tensor  # [B, S, A, D] of A heads
    weight: Tensor  # [B, S, A]
    keys: Tensor  # [B, T, D]


class Attention(Module):
    """x [B, S, H], collapsed and normed -> [B, S, H]."""

    def __init__(self, config: Config, ratio: int, layer: int, simulation: Simulation) -> None:
        super().__init__()
        heads, width, prepare = config.num_heads, config.head_dim, simulation.prepare
        self.q_a_proj = Linear(config.hidden, config.q_lora_rank, prepare)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * width, prepare)
        self.kv_proj = Linear(config.hidden, width, prepare)
        self.kv_norm = RMSNorm(width, config.norm_eps)
        self.o_a_proj = GroupedLinear(heads * width // config.o_groups, config.o_groups * config.o_lora_rank)
        self.o_b_proj = Linear(config.o_groups * config.o_lora_rank, config.hidden, prepare)
        self.sinks = nn.Parameter(torch.empty(heads))
        self.compressor = Compressor(config, layer, simulation, prepare) if ratio else None
        self.config, self.simulates_fp8 = config, simulation.kv_fp8

    def forward(self, x_BSH: Tensor, setting: Setting, cache: LayerCache | None = None) -> Tensor:
        config, packing = self.config, setting.packing
        self.show("in", x_BSH)
        qr = self.q_a_norm(self.q_a_proj(x_BSH))
        q = self.q_b_proj(qr).unflatten(-1, (config.num_heads, config.head_dim))
        self.show("q", lambda: queries(q, setting.turn, config.norm_eps))
        kv = rotate(self.kv_norm(self.kv_proj(x_BSH)), setting.turn)  # values carry the rotation too
        kv = simulated_cache(kv, config.rope_dim) if self.simulates_fp8 else kv
        self.show("kv", kv)
        keys = kv if cache is None else cache.with_earlier(kv)
        none = torch.zeros_like(packing.starts)
        view = View(config.window, keys.shape[1] - kv.shape[1], packing.starts, none, none, None)
        entries, scored = kv[:, :0], None
        if self.compressor is not None and setting.groups is not None:
            entries, view, scored = self._compressed(x_BSH, qr, setting, view, cache)
        shape = q.shape  # the recipe must not hold q itself
        with self.remaking(q, lambda: self.q_b_proj(qr).view(shape)):
            out = attend(q, keys, entries, self.sinks, setting.turn, config.norm_eps, view)
        if scored is not None:
            wanted = looks(q, keys, entries, self.sinks, setting.turn, config.norm_eps, view)
            counted = None if packing.documents is None else packing.documents >= 0
            scored.tap(*divergence(scored.q, scored.weight, scored.keys, wanted, counted))
        by_group = out.flatten(2).unflatten(-1, (config.o_groups, -1))
        out = self.o_b_proj(self.o_a_proj(by_group).flatten(2))
        if self.compressor is not None and not entries.shape[1] and torch.is_grad_enabled():
            out = out + anchor(self.compressor, "indexer.").to(out.dtype)
        self.show("out", out)
        return out

    def _compressed(
        self, x_BSH: Tensor, qr_BSQ: Tensor, setting: Setting, view: View, cache: LayerCache | None
    ) -> tuple[Tensor, View, Scored | None]:
        """The entries [B, T, D], which of them each query sees, and what an indexer that learns made of them."""
        compressor, groups, entry_turn = self.compressor, setting.groups, setting.entry_turn
        assert compressor is not None and groups is not None and entry_turn is not None
        pool = cache.pool if cache else None
        entries = compressor.simulated(compressor.entries(x_BSH, groups, entry_turn, pool))
        entries = entries if pool is None else pool.with_earlier(entries)
        self.show("entries", entries)
        view = view._replace(first=groups.first, end=groups.end)
        indexer = compressor.indexer
        if indexer is None:
            return entries, view, None
        pool, learns = cache.index_pool if cache else None, indexer.tap is not None
        picks_all = entries.shape[1] <= indexer.topk or (learns and indexer.sees_all)
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):  # picks have no gradient
            x, qr = x_BSH.detach(), qr_BSQ.detach()  # nothing before the indexer has a part in its loss
            if learns or not picks_all or pool is not None:  # a cache needs the keys of all tokens, for later
                keys = indexer.simulated(indexer.entries(x, groups, entry_turn, pool))
                keys = keys if pool is None else pool.with_earlier(keys)
            if learns or not picks_all:
                q, weight = indexer.queries(x, qr, setting.turn)
        scored = None if indexer.tap is None else Scored(indexer.tap, q, weight, keys)
        if picks_all:  # whatever the scores
            self.show("picks", lambda: all_visible(groups, entries))
            return entries, view, scored
        picks = self.choose(lambda: indexer.picks(q, weight, keys, groups))
        self.show("picks", picks)
        return entries, view._replace(picks=picks), scored


def all_visible(groups: Groups, entries_BTD: Tensor) -> Tensor:
    """[B, S, T] the visible entries, ascending, then -1."""
    batch, num_entries, _ = entries_BTD.shape
    entry = torch.arange(num_entries, device=entries_BTD.device)
    index = groups.first.unsqueeze(-1) + entry
    return torch.where(index < groups.end.unsqueeze(-1), index, -1).expand(batch, -1, -1)
