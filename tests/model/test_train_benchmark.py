"""benchmarks/train.py runs, and compares only what is the same computation. Its numbers are no matter of tests."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("train_benchmark", BENCHMARKS / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("model", None)


@pytest.mark.slow
def test_quick_run_fills_every_table() -> None:
    """It ends with an error if losses and norms of both sides are not the same."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train.py"), "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("128 ")]
    assert [len(re.findall(r"\d[\d.]*", row)) for row in rows] == [1 + 3 * 4]
    assert len(re.findall(r"\d+\.\d%", done.stdout)) == 3 * 3
    assert re.search(r"every step +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+", done.stdout)


@pytest.mark.parametrize("key", ["loss", "norm"])
def test_other_computation_is_not_compared(key: str, benchmark: ModuleType) -> None:
    ours = [{"loss": 5.0, "norm": 2.0}, {"loss": 4.9, "norm": 1.9}]
    benchmark.require_same(ours, [dict(step) for step in ours])
    theirs = [{**ours[0], key: ours[0][key] * 1.001}, ours[1]]
    with pytest.raises(SystemExit, match=f"step 1: {key}"):
        benchmark.require_same(ours, theirs)
    with pytest.raises(ValueError):
        benchmark.require_same(ours, ours[:1])


def test_rows_of_best_fit_hold_what_first_fit_holds_in_more(benchmark: ModuleType) -> None:
    assert benchmark.first_fit([1000, 1500, 1048, 548], [0, 1, 2, 3]) == 2
    assert benchmark.first_fit([1000, 1500, 548, 1048], [0, 1, 2, 3]) == 3
    lengths = benchmark.lengths_of(100, 400, 1.0)
    assert max(lengths) <= benchmark.ROW and 300 < sorted(lengths)[50] < 500
