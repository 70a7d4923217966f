"""The scripts of docs/dcp.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import gangs
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "dcp.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_guide_has_three_scripts() -> None:
    assert len(SCRIPTS) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"), [(0, "logits (1, 16, {vocab}), finite: True"), (1, "experts of (")]
)
def test_script_of_the_guide_runs_on_two_ranks(number: int, said: str, flash: Path, tmp_path: Path) -> None:
    import json

    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[number])
    vocab = json.loads((flash / "config.json").read_bytes())["vocab_size"]
    done = gangs.torchrun(2, str(script), str(flash))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank}: " in done.stdout
    assert done.stdout.count(said.format(vocab=vocab)) == 2, done.stdout


@pytest.mark.slow
def test_script_of_the_guide_saves_a_release(flash: Path, tmp_path: Path) -> None:
    import tiny

    script = tmp_path / "write.py"
    script.write_text(SCRIPTS[2])
    done = gangs.torchrun(2, str(script), str(flash), str(tmp_path / "out"))
    # torch 2.13 may abort when a process exits that has called dcp.save, with a writer of its own as well
    aborted = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr[-3000:]
    written, released = tiny.tree_of(tmp_path / "out"), tiny.tree_of(flash)
    changed = [name for name, digest in released.items() if written[name] != digest]
    assert changed == [tiny.shard_of(flash, "head.weight").name]
    assert f"{len(written) - 1} files, " in done.stdout and ", 1 changed" in done.stdout
