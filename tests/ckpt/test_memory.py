"""Memory does not grow with a tensor, a shard or the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tools

from dsv4ckpt import sink, work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc"),
]

MB = 10**6
WORKERS = 2
MOST_GROWTH = 120 * MB  # buffers that the small one does not fill, and what malloc keeps
LARGEST_STEP = max(sink._SLAB_BYTES, work._COPY_BYTES, 8 * work._CHUNK_VALUES)  # a value is at most a float64
BOUND = 2 * LARGEST_STEP * WORKERS + 500 * MB  # above importing torch
SMALL = {"hidden": 480, "intermediate": 512, "vocab": 2900}
LARGE = {"hidden": 2048, "intermediate": 2048, "vocab": 24576}


def num_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def peaks(checkpoint: Path, base: Path) -> dict[str, int]:
    """Most bytes that each conversion needed."""
    base.mkdir()
    driver = Path(__file__).with_name("memory_driver.py")
    command = [sys.executable, str(driver), str(checkpoint), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, int]]:
    """Of a checkpoint, and of one that is 20 times as large with the same number of tensors."""
    with tools.roomy(1500 * MB, tmp_path_factory.mktemp("memory")) as base:
        small = tiny.make_sample("flash", base / "small", layers=1, experts=6, **SMALL)
        large = tiny.make_sample("flash", base / "large", layers=1, experts=6, **LARGE)
        assert num_bytes(large) > 20 * num_bytes(small)
        assert num_bytes(small) > 10 * MB
        return peaks(small, base / "of small"), peaks(large, base / "of large")


def test_largest_tensors_outgrow_every_buffer() -> None:
    """So that whole tensors in memory would be seen, as they are and fused."""
    assert LARGE["vocab"] * LARGE["hidden"] * 2 > 4 * LARGEST_STEP
    assert 6 * LARGE["intermediate"] * LARGE["hidden"] * 2 > 4 * LARGEST_STEP


def test_peak_memory_of_a_checkpoint_20_times_larger_grows_by_a_constant_at_most(
    measured: tuple[dict[str, int], dict[str, int]],
) -> None:
    """To BF16 under both namespaces, and back."""
    small, large = measured
    assert len(small) == 4
    assert {way: large[way] - peak for way, peak in small.items() if large[way] - peak > MOST_GROWTH} == {}


def test_peak_memory_stays_below_the_promised_bound(
    measured: tuple[dict[str, int], dict[str, int]],
) -> None:
    assert max(*measured[0].values(), *measured[1].values()) < BOUND
