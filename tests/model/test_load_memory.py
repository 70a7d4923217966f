"""Loading takes the memory of the model, and saving next to none: nothing is ever held twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tools

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"
    ),
]

MB = 10**6
LARGE = {"layers": 1, "experts": 24, "hidden": 1024, "intermediate": 1024, "vocab": 30000}
MOST_LOADING = 64 * MB  # beside the model: one chunk of codes, indices and values
MOST_SAVING = 150 * MB  # what a conversion takes: slabs and pieces of two workers


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Of a checkpoint whose largest tensors are beyond every buffer."""
    found = {}
    with tools.roomy(1000 * MB, tmp_path_factory.mktemp("memory")) as base:
        small, large = (
            tiny.make_sample("flash", base / "small"),
            tiny.make_sample("flash", base / "large", **LARGE),
        )
        for how in ("dense", "packed"):
            driver = Path(__file__).with_name("load_save_driver.py")
            command = [sys.executable, driver, small, large, base / how, how]
            done = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-4000:]
            found[how] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", ["dense", "packed"])
def test_peak_memory_of_loading_is_the_model_and_a_bounded_rest(
    how: str, measured: dict[str, dict[str, int]]
) -> None:
    assert measured[how]["model"] > {"dense": 400 * MB, "packed": 200 * MB}[how]
    assert measured[how]["load"] < measured[how]["model"] + MOST_LOADING


@pytest.mark.parametrize("how", ["dense", "packed"])
def test_peak_memory_of_saving_holds_no_second_copy(how: str, measured: dict[str, dict[str, int]]) -> None:
    assert measured[how]["save"] < MOST_SAVING < measured[how]["model"]
