"""Compressed entries: groups of tokens pooled into one key-value, and the indexer that picks among them.

The projections and the pooling are float32.  Entries become visible when their last token is there.
Source: paper sec. 2.3.1 (CSA, eq. 9-17) and 2.3.2 (HCA, eq. 20-23); model.py Compressor and Indexer of the reference.

    B batch, S tokens, T entries, r tokens per entry, C channels (twice the width where windows overlap), D entry width,
    A indexer heads, K entries picked
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cache import PoolCache
from .config import Config
from .layers import Linear, Module, Prepare, RMSNorm, WideLinear, recomputed, wide
from .packing import Groups
from .rope import Turn, rotate
from .simulate import KV_GROUP, Simulation, fp4_groups, fp8_groups, hadamard

_SCORES, _QUERIES = (
    2**24,
    256,
)  # of the indexer at a time: bounds memory, and what is scored though nobody sees it


Tap = Callable[[Tensor, Tensor], None]


class Pool(Module):
    """Softmax-weighted sums of projected tokens, per channel."""

    def __init__(self, config: Config, ratio: int, width: int, *, overlaps: bool) -> None:
        super().__init__()
        channels = 2 * width if overlaps else width
        self.kv_proj = WideLinear(config.hidden, channels)
        self.gate_proj = WideLinear(config.hidden, channels)
        self.position_bias = nn.Parameter(torch.empty(ratio, channels))
        self.kv_norm = RMSNorm(width, config.norm_eps)
        self.ratio, self.width, self.overlaps = ratio, width, overlaps

    def entries(self, x_BSH: Tensor, groups: Groups, turn: Turn, cache: PoolCache | None) -> Tensor:
        """The new entries [B, T, D], normalized and rotated to their groups' first positions; in x's dtype."""
        kv, gate = self.kv_proj(x_BSH), self.gate_proj(x_BSH)
        num_before = 0
        if cache is not None:
            kv, gate, num_before = cache.with_pending(kv, gate, groups)
            groups = groups._replace(num=groups.num + num_before)
        kv_BTrC, gate_BTrC = groups.take(kv), groups.take(gate) + wide(self.position_bias)
        pooled = recomputed(self._pooled, kv_BTrC, gate_BTrC, groups.follows)[:, num_before:]
        return rotate(self.kv_norm(pooled.to(x_BSH.dtype)), turn)

    def _pooled(self, kv_BTrC: Tensor, gate_BTrC: Tensor, follows: Tensor | None) -> Tensor:
        if self.overlaps:
            kv_BTrC = _with_previous(kv_BTrC, follows, 0.0)
            gate_BTrC = _with_previous(gate_BTrC, follows, float("-inf"))
        return (torch.softmax(gate_BTrC, 2) * kv_BTrC).sum(2)


def _with_previous(x_BTrC: Tensor, follows_BT: Tensor | None, nothing: float) -> Tensor:
    """Slots of the group before (first half of its channels), then the group's own (second half): [B, T, 2r, D]."""
    early, late = x_BTrC.chunk(2, -1)
    before = torch.cat((torch.full_like(early[:, :1], nothing), early[:, :-1]), 1)
    if follows_BT is not None:
        before = torch.where(follows_BT[..., None, None], before, nothing)
    return torch.cat((before, late), 2)


class Scorer(Module):
    """How much each indexer head counts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weights_proj = Linear(config.hidden, config.index_num_heads)


class Indexer(Pool):
    """Scores every visible entry for every query by keys of its own, and picks the best.

    tap       is told of its own loss, which is computed for it: both sums of indexing.divergence
    sees_all  then attention sees every entry, whatever would be picked
    """

    def __init__(self, config: Config, ratio: int, simulation: Simulation, prepare: Prepare | None) -> None:
        super().__init__(config, ratio, config.index_head_dim, overlaps=True)
        self.q_b_proj = Linear(config.q_lora_rank, config.index_num_heads * config.index_head_dim, prepare)
        self.scorer = Scorer(config)
        self.num_heads, self.topk = config.index_num_heads, config.index_topk
        self.simulates_fp4 = simulation.indexer_fp4
        self.tap: Tap | None = None
        self.sees_all = False

    def queries(self, x_BSH: Tensor, qr_BSQ: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """[B, S, A, D] rotated, and the weight of each head [B, S, A]."""
        q = rotate(self.q_b_proj(qr_BSQ).unflatten(-1, (self.num_heads, -1)), turn)
        weight = wide(self.scorer.weights_proj(x_BSH)) * (self.width * self.num_heads) ** -0.5
        return self.simulated(q), weight

    def simulated(self, x: Tensor) -> Tensor:
        """As the reference's inference rounds queries and keys, if asked for."""
        return fp4_groups(hadamard(x)) if self.simulates_fp4 else x

    @torch.no_grad()
    def picks(self, q_BSAD: Tensor, weight_BSA: Tensor, keys_BTD: Tensor, groups: Groups) -> Tensor:
        """[B, S, K] the entries with the highest scores, ascending; -1 where fewer are visible, at the end.

        Of equal scores the earlier entry is picked: ReLU makes exact zeros, so ties are real.
        """
        batch, length, heads, _ = q_BSAD.shape
        num_entries = keys_BTD.shape[1]
        size = max(1, min(_QUERIES, _SCORES // max(1, batch * heads * num_entries)))
        picked = []
        for begin in range(0, length, size):
            part = slice(begin, min(begin + size, length))
            first, end = groups.first[:, part, None], groups.end[:, part, None]
            stop = max(self.topk, int(end.max()))  # nobody here sees what comes later
            scores = index_scores(q_BSAD[:, part], weight_BSA[:, part], keys_BTD[:, :stop])
            entry = torch.arange(scores.shape[-1], device=scores.device)
            unseen = (entry < first) | (entry >= end) | scores.isnan()
            scores = scores.masked_fill(unseen, float("-inf"))
            picked.append(_best(scores, self.topk))
        return torch.cat(picked, 1)


def index_scores(q_BSAD: Tensor, weight_BSA: Tensor, keys: Tensor) -> Tensor:
    """sum over heads of weight * relu(q . k), float32 [B, S, T]. Differentiable.

    keys  [B, T, D], or [B, S, T, D] of each query its own
    """
    q, keys = wide(q_BSAD), wide(keys)
    dots = q @ keys.mT if keys.dim() == 4 else (q.flatten(1, 2) @ keys.mT).unflatten(1, q.shape[1:3])
    return (weight_BSA.unsqueeze(-2) @ torch.relu(dots)).squeeze(-2)


def _best(scores_BST: Tensor, count: int) -> Tensor:
    """Positions of the highest finite scores, ascending, then -1."""
    least = scores_BST.topk(count, -1, sorted=True).values[..., -1:]
    above, equal = scores_BST > least, scores_BST == least
    open_places = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= open_places))
    index = chosen.nonzero()[:, -1].view(*scores_BST.shape[:-1], count)
    visible = scores_BST.gather(-1, index) > float("-inf")
    none = torch.iinfo(index.dtype).max
    ordered = torch.where(visible, index, none).sort(-1).values
    return torch.where(ordered == none, -1, ordered)


class Compressor(Pool):
    """A layer's compressed keys, and with overlapping windows the indexer that picks among them."""

    def __init__(self, config: Config, layer: int, simulation: Simulation, prepare: Prepare | None) -> None:
        ratio, overlaps = config.compress_ratios[layer], config.overlaps(layer)
        super().__init__(config, ratio, config.head_dim, overlaps=overlaps)
        self.indexer = Indexer(config, ratio, simulation, prepare) if overlaps else None
        self.rope_dim, self.simulates_fp8 = config.rope_dim, simulation.kv_fp8

    def simulated(self, kv: Tensor) -> Tensor:
        """What is not rotated goes through FP8 as in the reference's cache, if asked for."""
        return simulated_cache(kv, self.rope_dim) if self.simulates_fp8 else kv


def simulated_cache(kv: Tensor, rope_dim: int) -> Tensor:
    """Key-values as the reference's FP8 cache gives them back."""
    still, turned = kv.split((kv.shape[-1] - rope_dim, rope_dim), -1)
    return torch.cat((fp8_groups(still, KV_GROUP), turned), -1)
