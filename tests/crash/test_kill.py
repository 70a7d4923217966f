"""kill -9 at random moments: nothing torn is ever visible, and the same command ends in the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsv4ckpt import plan, run, source, survey


def killed(src: Path, base: Path, num_outputs: int, to: str) -> dict[str, Any]:
    """What the driver found."""
    driver = Path(__file__).parent / "driver.py"
    done = subprocess.run(
        [sys.executable, str(driver), str(src), str(base), str(num_outputs), "7", to],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["torn"] == []
    assert found["early_manifest"] == 0
    assert found["different"] == []
    assert found["leftovers"] == 0
    return found


def test_run_killed_at_random_leaves_nothing_torn_and_resumes_to_the_same_bytes(
    flash: Path, tmp_path: Path
) -> None:
    """The sidecar among them: its parts must be there for every shard that is."""
    found = killed(flash, tmp_path, 60, "bf16")
    assert found["files"] > 40
    assert found["kills"] >= 60, "too few kills landed to mean anything"


def test_way_back_killed_at_random_resumes_to_the_released_bytes(flash: Path, tmp_path: Path) -> None:
    """Its shards are written out of order."""
    checkpoint = source.open_checkpoint(str(flash))
    run.execute(
        plan.make_plan(survey.survey(checkpoint), plan.ConvertOptions()), checkpoint, str(tmp_path / "bf16")
    )
    assert killed(tmp_path / "bf16", tmp_path / "outputs", 30, "native")["kills"] >= 30
