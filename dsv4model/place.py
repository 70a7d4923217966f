"""Where a rank stands: which layers it has, which rows it trains on, which experts it keeps.  Pure; knows no torch.

Ranks count through the experts first, then through the copies of these, then through the stages: ranks that exchange
tokens stand next to each other, and stages, which say least to each other, are furthest apart.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dsv4ckpt.errors import Usage
from dsv4ckpt.ranks import Ranks

from .recipe import Optimizer, ParallelPart, Recipe, Train


@dataclass(frozen=True)
class Place:
    """A rank among those that train together.

    part        of the rows of a step, out of num_parts
    expert_part of the routed experts, out of num_expert_parts, which divides num_parts
    layers      that it has: one stage of num_stages
    has_mtp     whether the model has an MTP block
    """

    part: int
    num_parts: int
    expert_part: int
    num_expert_parts: int
    stage: int
    num_stages: int
    layers: range
    has_mtp: bool

    @property
    def num_ranks(self) -> int:
        return self.num_parts * self.num_stages

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def shares_embedding(self) -> bool:
        """Whether the last stage has the embedding as the first one does: it makes MTP's inputs of it."""
        return self.num_stages > 1 and self.has_mtp

    def has(self, name: str) -> bool:
        """Whether this stage has what is called so in the whole model."""
        _, *inner = name.split(".")
        if inner[0] == "layers":
            return int(inner[1]) in self.layers
        if inner[0] == "embed_tokens":
            return self.is_first or (self.is_last and self.has_mtp)
        return self.is_last  # head, MTP, and what leads from the last layer to them

    @classmethod
    def of(
        cls, ranks: Ranks, parallel: ParallelPart, num_layers: int, num_experts: int, num_mtp: int
    ) -> Place:
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
            has_mtp=num_mtp > 0,
        )


def require_sound(made: Recipe, place: Place) -> None:
    """raises Usage for what ranks in such places do not do together"""
    train, each = made.train, made.train.micro_rows * place.num_parts
    if place.num_ranks == 1:
        return
    if train.rows % each:
        raise Usage(
            "the rows of a step cannot be divided over the ranks",
            expected=f"train.rows a multiple of train.micro_rows * parts = {each:,}",
            found=f"{train.rows:,}",
            do="change train.rows, or start another number of ranks",
        )
    if train.rows // each < place.num_stages:
        raise Usage(
            "there are fewer micro-batches than stages",
            expected=f"train.rows of {each * place.num_stages:,} at least, for {place.num_stages:,} stages",
            found=f"{train.rows:,}",
            do="take more rows, or fewer of them at a time",
        )
    if made.model.device != "cpu":
        raise Usage(
            "several ranks train on CPUs only so far",
            found=f"model.device {made.model.device!r}",
            do="start one process for a GPU",
        )
    if made.optimizer.kind is Optimizer.ADAMW8BIT:
        raise Usage(
            "8-bit moments are not divided over ranks",
            expected='optimizer.kind = "adamw"',
            found=made.optimizer.kind.value,
            do="take that, or start one process",
        )
    if train.what is Train.LORA and place.num_stages > 1:
        raise Usage(
            "adapters are not trained in stages",
            expected="parallel.stages 1",
            found=f"{place.num_stages:,}",
            do="divide rows and experts only",
        )


def _even(count: int, parts: int) -> tuple[int, ...]:
    """Parts as even as can be; the last ones, which have the head and MTP beside them, are no larger than the first."""
    least, more = divmod(count, parts)
    return tuple(least + (part < more) for part in range(parts))
