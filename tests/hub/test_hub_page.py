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
    assert "sent      0 files, 0 B" in done.stdout
    again, here = tiny.tree_of(tmp_path / "again", without=".cache"), tiny.tree_of(tmp_path / "bf16")
    del again["README.md"], again[".gitattributes"]
    assert again == here
