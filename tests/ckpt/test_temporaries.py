"""Directories for small files: they go with their process, or with the next one on the same host."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dsv4ckpt import temporaries

MAKE = "from dsv4ckpt import temporaries; print(temporaries.new_directory(), flush=True)"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's place for temporary files, of this test alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def made_by(code: str) -> tuple[int, Path]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, Path(done.stdout.strip())


def test_directory_goes_when_the_process_ends(place: Path) -> None:
    code, there = made_by(MAKE)
    assert code == 0 and there.parent == place and not there.exists()


def test_directory_of_a_killed_process_goes_with_the_next_one(place: Path) -> None:
    code, there = made_by(f"{MAKE}\nimport os; os.kill(os.getpid(), 9)")
    assert code == -9 and there.is_dir()
    (there / "file").write_text("left")
    mine = Path(temporaries.new_directory())
    assert mine.is_dir() and [*place.iterdir()] == [mine]


def test_what_is_not_of_a_dead_process_of_this_host_and_user_stays(place: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, other = temporaries.host_key(), "0" * 8
    assert host != other
    kept = [
        f"dsv4-{host}-{os.getppid()}-alive",
        f"dsv4-{other}-{gone.pid}-elsewhere",
        f"dsv4-{host}-{gone.pid}",
        "dsv4-mine",
    ]
    for name in kept:
        (place / name).mkdir()
    (place / f"dsv4-{host}-{gone.pid}-file").write_text("no directory")
    (place / f"dsv4-{host}-{gone.pid}-link").symlink_to(place / "dsv4-mine")
    (place / f"dsv4-{host}-{gone.pid}-dead").mkdir()
    temporaries.new_directory()
    left = {path.name for path in place.iterdir()}
    assert {*kept, f"dsv4-{host}-{gone.pid}-file", f"dsv4-{host}-{gone.pid}-link"} <= left
    assert f"dsv4-{host}-{gone.pid}-dead" not in left and (place / "dsv4-mine").is_dir()


def test_directory_outlives_a_forked_child(place: Path) -> None:
    child = "import os, sys; pid = os.fork(); pid or sys.exit(0); os.waitpid(pid, 0); "
    code, _ = made_by(f"{MAKE}; {child}assert os.listdir({str(place)!r})")
    assert code == 0 and [*place.iterdir()] == []
