"""The scripts of docs/dcp.md run as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import gangs
import pytest
import tiny

DRIVER = Path(__file__).with_name("script_driver.py")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "dcp.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(number: int, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of the guide on two ranks."""
    script = directory / "script.py"
    script.write_text(SCRIPTS[number])
    done = gangs.torchrun(2, str(DRIVER), str(script), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_guide_has_three_scripts() -> None:
    assert len(SCRIPTS) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"), [(0, "logits (1, 16, {vocab}), finite: True"), (1, "experts of (")]
)
def test_script_of_the_guide_runs_on_two_ranks(number: int, said: str, flash: Path, tmp_path: Path) -> None:
    vocab = json.loads((flash / "config.json").read_bytes())["vocab_size"]
    done = run(number, tmp_path, str(flash))
    for rank in range(2):
        assert f"rank {rank}: " in done.stdout
    assert done.stdout.count(said.format(vocab=vocab)) == 2, done.stdout


@pytest.mark.slow
def test_script_of_the_guide_saves_a_release(flash: Path, tmp_path: Path) -> None:
    done = run(2, tmp_path, str(flash), str(tmp_path / "out"))
    written, released = tiny.tree_of(tmp_path / "out"), tiny.tree_of(flash)
    changed = [name for name, digest in released.items() if written[name] != digest]
    assert changed == [tiny.shard_of(flash, "head.weight").name]
    assert f"{len(written) - 1} files, " in done.stdout and ", 1 changed" in done.stdout
