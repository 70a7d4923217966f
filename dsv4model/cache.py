"""What decoding keeps of the tokens before: the window's keys, compressed entries, tokens of unfinished groups.

One row is one document; all rows are equally long.  Memory per layer: W - 1 keys, one entry per r tokens, fewer than
2 r projected tokens.  Knows no weights.

    B batch, S new tokens, T entries, W window, D width, C channels
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import Config
from .packing import Groups


@dataclass
class PoolCache:
    """Projected tokens that wait for their group, and the last whole group where the next one overlaps with it."""

    overlaps: bool
    kv: Tensor | None = None  # [B, fewer than 2 r, C]
    gate: Tensor | None = None
    num_groups: int = 0  # whole ones in front: 0 or 1
    entries: Tensor | None = None  # [B, T, D] that there are already

    def with_pending(self, kv_BSC: Tensor, gate_BSC: Tensor, groups: Groups) -> tuple[Tensor, Tensor, int]:
        """The waiting tokens and the new ones, and how many groups in front have given their entries already."""
        if self.kv is not None and self.gate is not None:
            kv_BSC, gate_BSC = torch.cat((self.kv, kv_BSC), 1), torch.cat((self.gate, gate_BSC), 1)
        num_before = self.num_groups
        num_whole = num_before + groups.num
        self.num_groups = min(num_whole, 1) if self.overlaps else 0
        begin = (num_whole - self.num_groups) * groups.ratio
        self.kv, self.gate = (
            kv_BSC[:, begin:].clone(),
            gate_BSC[:, begin:].clone(),
        )  # a view would keep the whole
        return kv_BSC, gate_BSC, num_before

    def with_earlier(self, new_BTD: Tensor) -> Tensor:
        """All entries so far."""
        self.entries = new_BTD if self.entries is None else torch.cat((self.entries, new_BTD), 1)
        return self.entries


@dataclass
class LayerCache:
    """One layer's."""

    window: int
    pool: PoolCache
    index_pool: PoolCache
    kv: Tensor | None = None  # [B, at most W - 1, D]

    def with_earlier(self, kv_BSD: Tensor) -> Tensor:
        """The keys of the window before, then the new ones."""
        both = kv_BSD if self.kv is None else torch.cat((self.kv, kv_BSD), 1)
        self.kv = both[:, max(0, both.shape[1] - self.window + 1) :].clone()
        return both


@dataclass
class Cache:
    """The whole model's. Make one per batch of rows, and hand it to every call of the model."""

    config: Config
    length: int = 0  # tokens of each row that it holds
    mtp_length: int = 0  # of these, tokens that the MTP block has seen
    batch: int | None = None  # rows
    layers: list[LayerCache] = field(default_factory=list)
    mtp: list[LayerCache] = field(default_factory=list)

    def __post_init__(self) -> None:
        def empty(*, overlaps: bool) -> LayerCache:
            return LayerCache(self.config.window, PoolCache(overlaps), PoolCache(overlaps=True))

        self.layers = [empty(overlaps=self.config.overlaps(i)) for i in range(self.config.num_layers)]
        self.mtp = [empty(overlaps=False) for _ in range(self.config.num_mtp)]

    def grow(self, shape: torch.Size, *, with_mtp: bool) -> None:
        """So many rows and tokens [B, S] more have been seen."""
        self.batch, num_new = shape
        self.length += num_new
        self.mtp_length += num_new if with_mtp else 0
