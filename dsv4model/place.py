"""Where a rank stands: which layers it has, which rows it trains on, which experts it keeps.  Pure; knows no torch.

Ranks count through the experts first, then through the copies of these, then through the stages: ranks that exchange
tokens stand next to each other, and stages, which say least to each other, are furthest apart.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dsv4ckpt.errors import Usage
from dsv4ckpt.ranks import Ranks

from .recipe import ParallelPart


@dataclass(frozen=True)
class Place:
    """A rank among those that train together.

    part        of the rows of a step, out of num_parts
    expert_part of the routed experts, out of num_expert_parts, which divides num_parts
    layers      that it has: one stage of num_stages
    """

    part: int
    num_parts: int
    expert_part: int
    num_expert_parts: int
    stage: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @classmethod
    def of(cls, ranks: Ranks, parallel: ParallelPart, num_layers: int, num_experts: int) -> Place:
        """raises Usage where the ranks cannot be divided so"""
        each = parallel.stages * parallel.experts
        if ranks.size % each:
            raise Usage(
                "the ranks cannot be divided so",
                expected=f"a multiple of parallel.stages * parallel.experts = {each:,} ranks",
                found=f"{ranks.size:,}",
                do="start another number of ranks (torchrun --nproc-per-node), or change [parallel]",
            )
        if num_experts % parallel.experts:
            raise Usage(
                "the experts of a layer cannot be divided so",
                expected=f"parallel.experts that divides {num_experts:,}",
                found=f"{parallel.experts:,}",
                do="change parallel.experts",
            )
        counts = parallel.layers or _even(num_layers, parallel.stages)
        if len(counts) != parallel.stages or sum(counts) != num_layers or min(counts) < 1:
            raise Usage(
                "the layers cannot be divided so over the stages",
                expected=f"{parallel.stages:,} counts of 1 or more that make {num_layers:,} together",
                found=", ".join(map(str, counts)),
                do="change parallel.layers, or leave it out for stages as even as can be",
            )
        num_parts = ranks.size // parallel.stages
        stage, part = divmod(ranks.rank, num_parts)
        ends = list(itertools.accumulate(counts))
        return cls(
            part=part,
            num_parts=num_parts,
            expert_part=part % parallel.experts,
            num_expert_parts=parallel.experts,
            stage=stage,
            num_stages=parallel.stages,
            layers=range(ends[stage] - counts[stage], ends[stage]),
        )


def _even(count: int, parts: int) -> tuple[int, ...]:
    """Parts as even as can be; the last ones, which have the head and MTP beside them, are no larger than the first."""
    least, more = divmod(count, parts)
    return tuple(least + (part < more) for part in range(parts))
