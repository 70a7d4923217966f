"""kill -9 at random moments: nothing torn is ever visible, and the same command ends in the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trials

Often = Callable[[int, int], int]


def killed(src: Path, base: Path, num_outputs: int, to: str) -> dict[str, Any]:
    """What the driver found."""
    found: dict[str, Any] = trials.drive("kill", src, base, num_outputs, 7, to, timeout=3600)
    assert found["torn"] == []
    assert found["different"] == []
    assert found["leftovers"] == []
    return found


@pytest.mark.slow
def test_run_killed_at_random_leaves_nothing_torn_and_resumes_to_the_same_bytes(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    """The sidecar among them: its parts must be there for every shard that is."""
    outputs = often(270, 2300)
    found = killed(smallest, tmp_path, outputs, "bf16")
    assert found["files"] > 30
    assert found["kills"] >= 2 * outputs, "too few kills landed to mean anything"


@pytest.mark.slow
def test_way_back_killed_at_random_resumes_to_the_released_bytes(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    """Its shards are written out of order."""
    conversion = trials.Conversion(str(smallest))
    conversion.into(tmp_path / "bf16")
    outputs = often(60, 500)
    assert killed(tmp_path / "bf16", tmp_path / "outputs", outputs, "native")["kills"] >= 2 * outputs


def test_run_killed_a_few_times_resumes_to_the_same_bytes(smallest: Path, tmp_path: Path) -> None:
    """The quick version, for while one edits."""
    assert killed(smallest, tmp_path, 10, "bf16")["kills"] >= 10
    assert not [name for name in os.listdir(tmp_path) if not name.startswith("reference")]
