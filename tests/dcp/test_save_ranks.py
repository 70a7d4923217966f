"""Checkpoints that several ranks write while they train on: those of ranks that write them at once."""

from __future__ import annotations

import json
from pathlib import Path

import gangs
import pytest
import training

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def bytes_of(run: Path, step: int) -> dict[str, bytes]:
    directory = run / "checkpoints" / f"step-{step}"
    return {file.name: file.read_bytes() for file in directory.glob("*.distcp")}


@pytest.mark.slow
def test_ranks_that_save_in_the_background_stop_and_continue_to_the_same_files(
    smallest: Path, tmp_path: Path
) -> None:
    """A checkpoint every step: each is written while both ranks add up the gradients of the next step."""
    data = tmp_path / "tokens.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(5, 30 + at))}) + "\n" for at in range(8)))

    def trained(run: str, *changes: str, until: int | None = None) -> None:
        text = f"""
            [model]\nsource = "{smallest}"
            [train]\nrun = "{tmp_path / run}"\nsteps = 5\nrows = 2
            [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 40
            [checkpoint]\nevery = 1\nkeep = 2
        """
        gangs.gang(2, training.run, text, list(changes), until)

    trained("whole")
    trained("background", "checkpoint.background=true", until=3)
    assert (tmp_path / "background" / "latest").read_text() == "step-3\n"
    trained("background", "checkpoint.background=true")
    for run in ("whole", "background"):
        names = sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir())
        assert names == ["step-4", "step-5"]
    for step in (4, 5):
        found = bytes_of(tmp_path / "background", step)
        assert len(found) == 2 and found == bytes_of(tmp_path / "whole", step)
