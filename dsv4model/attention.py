"""The attention sublayer: low-rank queries, one shared key-value head, compressed entries, grouped low-rank output.

Knows neither streams nor experts.
Source: paper sec. 2.3; model.py Attention of the reference.

    B batch, S tokens, H hidden, N heads, D head, G output groups, T entries
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attend import View, attend, queries
from .cache import LayerCache
from .compressor import Compressor, simulated_cache
from .config import Config
from .layers import GroupedLinear, Linear, Module, RMSNorm, anchor, remade
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
        entries = kv[:, :0]
        if self.compressor is not None and setting.groups is not None:
            entries, view = self._compressed(x_BSH, qr, setting, view, cache)
        shape = q.shape  # the recipe must not hold q itself
        with remade(q, lambda: self.q_b_proj(qr).view(shape)):
            out = attend(q, keys, entries, self.sinks, setting.turn, config.norm_eps, view)
        by_group = out.flatten(2).unflatten(-1, (config.o_groups, -1))
        out = self.o_b_proj(self.o_a_proj(by_group).flatten(2))
        if self.compressor is not None and not entries.shape[1] and torch.is_grad_enabled():
            out = out + anchor(self.compressor, "indexer.").to(out.dtype)
        self.show("out", out)
        return out

    def _compressed(
        self, x_BSH: Tensor, qr_BSQ: Tensor, setting: Setting, view: View, cache: LayerCache | None
    ) -> tuple[Tensor, View]:
        """The entries [B, T, D], and which of them each query sees."""
        compressor, groups, entry_turn = self.compressor, setting.groups, setting.entry_turn
        assert compressor is not None and groups is not None and entry_turn is not None
        pool = cache.pool if cache else None
        entries = compressor.simulated(compressor.entries(x_BSH, groups, entry_turn, pool))
        entries = entries if pool is None else pool.with_earlier(entries)
        self.show("entries", entries)
        view = view._replace(first=groups.first, end=groups.end)
        indexer = compressor.indexer
        if indexer is None:
            return entries, view
        pool, picks_all = cache.index_pool if cache else None, entries.shape[1] <= indexer.topk
        if not picks_all or pool is not None:  # a cache needs the keys of all tokens, for later
            with torch.no_grad():  # picks have no gradient, so nothing before them needs one
                keys = indexer.simulated(indexer.entries(x_BSH, groups, entry_turn, pool))
                keys = keys if pool is None else pool.with_earlier(keys)
        if picks_all:  # whatever the scores
            self.show("picks", lambda: all_visible(groups, entries))
            return entries, view
        with torch.no_grad():
            q, weight = indexer.queries(x_BSH, qr_BSQ, setting.turn)
            picks = indexer.picks(q, weight, keys, groups)
        self.show("picks", picks)
        return entries, view._replace(picks=picks)


def all_visible(groups: Groups, entries_BTD: Tensor) -> Tensor:
    """[B, S, T] the visible entries, ascending, then -1."""
    batch, num_entries, _ = entries_BTD.shape
    entry = torch.arange(num_entries, device=entries_BTD.device)
    index = groups.first.unsqueeze(-1) + entry
    return torch.where(index < groups.end.unsqueeze(-1), index, -1).expand(batch, -1, -1)
