"""What a bare machine may lack, asked for by name: a test that needs it is skipped with a printed reason.

`.ci/run` installs these where it can.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def require(*programs: str) -> None:
    """Skip the test unless these programs are here."""
    for program in programs:
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")


def require_mounts(where: Path) -> None:
    """Skip the test unless we may mount a tmpfs."""
    require("mount", "umount")
    try:
        with mounted(where / "probe", "-t", "tmpfs", "-o", "size=1M", "tmpfs"):
            pass
    except OSError as error:
        pytest.skip(f"mounting is not allowed here: {error}")


@contextlib.contextmanager
def roomy(num_bytes: int, otherwise: Path) -> Iterator[Path]:
    """A directory for large files: in memory if there is so much. Removed at the end."""
    status = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    in_memory = status is not None and status.f_bavail * status.f_frsize > 4 * num_bytes
    where = Path(tempfile.mkdtemp(dir="/dev/shm" if in_memory else otherwise))
    try:
        yield where
    finally:
        shutil.rmtree(where)


@contextlib.contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    """`mount ARGUMENTS WHERE` while the block runs. raises OSError with what mount said"""
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(where)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield where
    finally:
        unmount(where)


def unmount(where: Path) -> None:
    """Take a file system off, even while something on it is still open."""
    subprocess.run(["umount", "-l", str(where)], capture_output=True)
