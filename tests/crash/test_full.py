"""The disk is too small, or fills up meanwhile: a refusal that says so, and the same bytes once there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tools
import trials

from dsv4ckpt.errors import EXIT_ENVIRONMENT

Often = Callable[[int, int], int]
Attempt = dict[str, Any]


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """Where a driver mounts its file systems; they are unmounted even if the driver dies."""
    tools.require_mounts(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    try:
        yield base
    finally:
        tools.unmount(base / "disk")


def attempts(what: str, src: Path, base: Path, case: str, count: int) -> list[Attempt]:
    """What the driver saw; each attempt ended well, or as it should for want of room."""
    seen: list[Attempt] = trials.drive("full", what, src, base, case, count, timeout=3600)
    for attempt in seen:
        assert attempt["code"] in (0, EXIT_ENVIRONMENT), attempt
        assert attempt["torn"] == [], attempt
        assert attempt["parts"] == [], attempt
        assert attempt["same"], attempt
        assert attempt["leftovers"] == [], attempt
    return seen


def failed(seen: list[Attempt]) -> list[Attempt]:
    """Those that ended for want of room. Some did not, or there was no such thing as enough."""
    found = [attempt for attempt in seen if attempt["code"]]
    assert 0 < len(found) < len(seen)
    return found


def failed_on_the_way(seen: list[Attempt], reason: str) -> list[Attempt]:
    """The same; each said where it stopped, why, and what to do."""
    for attempt in (found := failed(seen)):
        what, *facts = attempt["error"].splitlines()
        assert what == f"the output cannot grow: {reason}"
        assert [fact.split()[0] for fact in facts] == ["file", "do"], attempt
        assert "the same command again" in facts[1]
    return found


# ---- the check before the first byte


@pytest.mark.slow
@pytest.mark.parametrize(("what", "sizes"), [("bf16", 50), ("sample", 5)])
def test_output_that_does_not_fit_is_refused_before_anything_is_written(
    what: str, sizes: int, smallest: Path, base: Path
) -> None:
    for attempt in failed(attempts(what, smallest, base, "checked", sizes)):
        assert attempt["error"].startswith("not enough room for the ")
        assert attempt["files"] == []


# ---- space that goes away afterwards


@pytest.mark.slow
def test_run_on_a_disk_that_fills_up_says_so_and_continues_to_the_same_bytes(
    smallest: Path, base: Path, often: Often
) -> None:
    seen = attempts("bf16", smallest, base, "blinded", often(50, 450))
    found = failed_on_the_way(seen, "No space left on device")
    assert len({attempt["error"] for attempt in found}) > 10  # it ended in many places


@pytest.mark.slow
@pytest.mark.parametrize("what", ["native", "sample"])
def test_other_writer_on_a_disk_that_fills_up_says_so_and_continues_to_the_same_bytes(
    what: str, smallest: Path, tmp_path: Path, base: Path, often: Often
) -> None:
    """The way back writes its shards out of order."""
    if what == "native":
        trials.Conversion(str(smallest)).into(tmp_path / "bf16")
    seen = attempts(what, tmp_path / "bf16", base, "blinded", often(10, 200))
    failed_on_the_way(seen, "No space left on device")


@pytest.mark.slow
def test_run_on_a_disk_without_free_inodes_says_so_and_continues_to_the_same_bytes(
    smallest: Path, base: Path
) -> None:
    """There is room for bytes, but not for one more file."""
    seen = attempts("sample", smallest, base, "inodes", 22)
    failed_on_the_way(seen, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bf16", "sample"])
def test_run_that_may_not_make_files_so_large_says_so_and_continues_to_the_same_bytes(
    what: str, smallest: Path, base: Path, often: Often
) -> None:
    """A write comes back short, the next one fails."""
    found = failed_on_the_way(attempts(what, smallest, base, "limited", often(5, 100)), "File too large")
    assert all("ulimit -f" in attempt["error"] for attempt in found)
