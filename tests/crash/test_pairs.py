"""Two runs into one output: one works, the other is turned away; where locks lie both end well and nothing is mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trials

Often = Callable[[int, int], int]


def paired(src: Path, base: Path, num_pairs: int, kind: str) -> dict[str, int]:
    """How often each pair of exit codes came, `first second`; what they left is right."""
    found = trials.drive("pairs", src, base, num_pairs, kind)
    assert found["torn"] == []
    assert found["different"] == []
    assert found["leftovers"] == []
    assert found["half"] > num_pairs / 3, "too few pairs met a half-finished output"
    codes: dict[str, int] = found["codes"]
    assert sum(codes.values()) == num_pairs
    return codes


@pytest.mark.slow
def test_pair_on_one_output_one_works_and_one_is_turned_away(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    """Either may come first. Both end well only where the second began when the first was done: that must be rare."""
    num_pairs = often(100, 1000)
    codes = paired(smallest, tmp_path, num_pairs, "locked")
    assert codes.keys() <= {"0 75", "75 0", "0 0"}
    assert codes.get("0 0", 0) <= num_pairs / 10


@pytest.mark.slow
def test_pair_where_locks_lie_both_end_well_in_the_same_bytes(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    assert paired(smallest, tmp_path, often(100, 1000), "unlocked").keys() == {"0 0"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["locked", "unlocked"])
def test_pair_interleaved_at_any_call_both_end_well_in_the_same_bytes(
    kind: str, smallest: Path, tmp_path: Path
) -> None:
    """One run halts, the other goes on or ends, the first continues: as when the work directory vanishes under it."""
    assert trials.drive("pairs", smallest, tmp_path, "interleaved", kind) == []


@pytest.mark.slow
def test_pair_of_different_plans_one_wins_and_nothing_is_mixed(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    codes = paired(smallest, tmp_path, often(60, 1000), "plans")
    assert codes.keys() <= {"0 75", "0 2", "75 0", "2 0"}
