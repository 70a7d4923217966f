"""kill -9 at random moments: nothing torn is ever visible, and the same command ends in the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_run_killed_at_random_leaves_nothing_torn_and_resumes_to_the_same_bytes(
    flash: Path, tmp_path: Path
) -> None:
    driver = Path(__file__).parent / "driver.py"
    done = subprocess.run(
        [sys.executable, str(driver), str(flash), str(tmp_path), "60", "7"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] > 40
    assert found["kills"] >= 60, "too few kills landed to mean anything"
    assert found["torn"] == []
    assert found["early_manifest"] == 0
    assert found["different"] == []
    assert found["leftovers"] == 0
