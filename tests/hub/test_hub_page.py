"""The session of docs/hub.md runs as it stands there, and what the page points to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def test_page_points_to_files_that_exist() -> None:
    links = re.findall(r"\]\(\.\./([\w/.]+)\)", PAGE)
    assert len(links) > 3 and [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.slow
def test_session_of_the_page_runs_as_it_stands_there(tmp_path: Path) -> None:
    (script,) = SCRIPTS
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path / "home")}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hf://tester/flash-bf16 was complete already: nothing to do\n" in done.stdout
    assert "sent      0 files, 0 B" in done.stdout
    checked = re.findall(r"bytes     (\d+) of (\d+) files have the SHA-256 of the manifest", done.stdout)
    assert len(checked) == 2 and all(
        good == every for good, every in checked
    )  # by ids; of what was downloaded
    released, flash = tiny.tree_of(tmp_path / "released"), tiny.tree_of(tmp_path / "flash")
    assert {name: released[name] for name in flash} == flash
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again", "flash", "home", "hub.address", "released", "tests",
    ]  # fmt: skip
