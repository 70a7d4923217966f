"""Which rank has which layers, rows and experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dsv4ckpt.errors import Usage
from dsv4ckpt.ranks import Ranks
from dsv4model.place import Place
from dsv4model.recipe import ParallelPart


def places(size: int, num_layers: int = 7, **parallel: Any) -> list[Place]:
    return [Place.of(Ranks(rank, size), ParallelPart(**parallel), num_layers, 8, 1) for rank in range(size)]


@pytest.mark.parametrize(("stages", "experts"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (3, 4)])
def test_every_row_goes_through_every_layer_once_and_every_expert_is_kept(stages: int, experts: int) -> None:
    size = 24
    found = places(size, stages=stages, experts=experts)
    num_parts = size // stages
    for part in range(num_parts):
        mine = [place for place in found if place.part == part]
        assert [layer for place in mine for layer in place.layers] == list(range(7))
        assert [place.stage for place in mine] == list(range(stages))
        assert (mine[0].is_first, mine[-1].is_last) == (True, True)
    kept = Counter((place.stage, place.expert_part) for place in found)
    assert kept == {(stage, part): num_parts // experts for stage in range(stages) for part in range(experts)}
    assert {place.num_parts for place in found} == {num_parts}


def test_ranks_that_exchange_tokens_stand_next_to_each_other() -> None:
    found = places(8, stages=2, experts=2)
    assert [(place.stage, place.part, place.expert_part) for place in found] == [
        (0, 0, 0), (0, 1, 1), (0, 2, 0), (0, 3, 1), (1, 0, 0), (1, 1, 1), (1, 2, 0), (1, 3, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "stages", "wanted"),
    [(43, 4, (11, 11, 11, 10)), (43, 8, (6, 6, 6, 5, 5, 5, 5, 5)), (4, 4, (1, 1, 1, 1)), (5, 1, (5,))],
)
def test_stages_are_as_even_as_can_be_and_the_last_is_no_larger(
    layers: int, stages: int, wanted: tuple[int, ...]
) -> None:
    """Flash's 43 layers are a prime number."""
    assert tuple(len(place.layers) for place in places(stages, layers, stages=stages)) == wanted


def test_stages_are_as_large_as_the_recipe_says() -> None:
    found = places(3, 43, stages=3, layers=(20, 20, 3))
    assert [place.layers for place in found] == [range(20), range(20, 40), range(40, 43)]


@pytest.mark.parametrize(
    ("size", "parallel", "word"),
    [
        (6, {"stages": 4}, "4 ranks"),
        (6, {"experts": 4}, "4 ranks"),
        (6, {"stages": 2, "experts": 2}, "4 ranks"),
        (3, {"experts": 3}, "divides 8"),
        (8, {"stages": 8}, "make 7 together"),
        (2, {"stages": 2, "layers": (3, 3)}, "make 7 together"),
        (2, {"stages": 2, "layers": (7,)}, "make 7 together"),
        (2, {"stages": 2, "layers": (0, 7)}, "make 7 together"),
        (1, {"layers": (6,)}, "make 7 together"),
    ],
)
def test_division_that_does_not_come_out_is_an_error(size: int, parallel: dict[str, Any], word: str) -> None:
    with pytest.raises(Usage, match=word):
        places(size, **parallel)


@pytest.mark.parametrize("num_mtp", [0, 1])
def test_every_name_is_in_one_stage_and_the_embedding_in_two_for_mtp(num_mtp: int) -> None:
    parallel = ParallelPart(stages=3, layers=(2, 2, 3))
    found = [Place.of(Ranks(rank, 3), parallel, 7, 8, num_mtp) for rank in range(3)]

    def stages(name: str) -> list[int]:
        return [place.stage for place in found if place.has(name)]

    assert [stages(f"model.layers.{layer}.mlp.gate.weight") for layer in range(7)] == [
        [0], [0], [1], [1], [2], [2], [2],
    ]  # fmt: skip
    for name in ("lm_head.weight", "model.norm.weight", "model.hc_head.hc_base", "mtp.0.norm.weight"):
        assert stages(name) == [2]
    assert stages("model.embed_tokens.weight") == ([0, 2] if num_mtp else [0])
    assert {place.shares_embedding for place in found} == {bool(num_mtp)}
