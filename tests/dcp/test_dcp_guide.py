"""The scripts of docs/dcp.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import gangs
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "dcp.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_guide_has_two_scripts() -> None:
    assert len(SCRIPTS) == 2


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
