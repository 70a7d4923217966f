"""The power fails at random moments: nothing torn is there when it comes back, and what was finished stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tools
import trials

Often = Callable[[int, int], int]
MIB = 1024 * 1024


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a driver keeps its disk; it is unmounted even if the driver dies, and the loop device goes with it."""
    tools.require_mounts(tmp_path)
    tools.require("mkfs.ext4")
    monkeypatch.setenv("PATH", f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    image = tmp_path / "probe.ext4"
    image.write_bytes(b"")
    os.truncate(image, 16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    try:
        with tools.mounted(tmp_path / "probe", "-t", "ext4", "-o", "loop", str(image)):
            pass
    except OSError as error:
        pytest.skip(f"loop devices are not allowed here: {error}")
    base = tmp_path / "base"
    base.mkdir()
    try:
        yield base
    finally:
        tools.unmount(base / "disk")


def cut(what: str, src: Path, base: Path, num_cuts: int) -> None:
    """Cut the power of the writer as it is, and of one that leaves everything to fsync: they show no difference."""
    both: list[dict[str, Any]] = trials.drive("power", what, src, base, num_cuts, "durable", timeout=3600)
    assert sum(found.pop("cuts") for found in both) >= num_cuts
    nothing = {"torn": [], "odd_ends": [], "different": [], "leftovers": [], "lost": []}
    assert both == [nothing, nothing]


def torn_without_fsync(what: str, src: Path, base: Path, num_cuts: int) -> int:
    """The control: of that many cuts, how many left something torn."""
    (found,) = trials.drive("power", what, src, base, num_cuts, "careless")
    assert found["cuts"] == num_cuts
    return len(found["torn"])


@pytest.mark.slow
def test_run_whose_power_is_cut_leaves_nothing_torn_and_continues_to_the_same_bytes(
    smallest: Path, base: Path, often: Often
) -> None:
    cut("bf16", smallest, base, often(100, 2000))


@pytest.mark.slow
def test_run_without_fsync_whose_power_is_cut_leaves_torn_files(smallest: Path, base: Path) -> None:
    """Or the test above would prove nothing."""
    assert torn_without_fsync("bf16", smallest, base, 100) >= 20


@pytest.mark.slow
def test_way_back_whose_power_is_cut_leaves_nothing_torn_and_continues_to_the_released_bytes(
    smallest: Path, tmp_path: Path, base: Path, often: Often
) -> None:
    """Its shards are written out of order."""
    trials.Conversion(str(smallest)).into(tmp_path / "bf16")
    cut("native", tmp_path / "bf16", base, often(20, 500))


@pytest.mark.slow
def test_sample_whose_power_is_cut_leaves_nothing_torn_and_continues_to_the_same_bytes(
    smallest: Path, base: Path, often: Often
) -> None:
    cut("sample", smallest, base, often(20, 500))
