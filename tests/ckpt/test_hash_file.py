"""verify.hash_file: every byte once and in order, whether the file system lets us past its page cache or not."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dsv4ckpt import contained, verify
from dsv4ckpt.errors import Environment, SourceChanged

PIECE = 64 * 1024
SIZES = (0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 4097)
WAYS = ("direct", "no direct files", "no direct reads", "short direct reads")
OPEN, READ = contained.open_regular, os.preadv


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file system behaves."""
    monkeypatch.setattr(verify, "_HASH_BYTES", PIECE)
    direct: set[int] = set()

    def opened(directory: str, name: str, follow_links: bool, extra_flags: int = 0) -> int:
        if extra_flags and request.param == "no direct files":
            raise OSError(errno.EINVAL, "no direct I/O here")
        fd = OPEN(directory, name, follow_links, extra_flags)
        direct.add(fd) if extra_flags else direct.discard(fd)
        return fd

    def read(fd: int, buffers: list[Any], offset: int) -> int:
        if fd in direct and request.param == "no direct reads":
            raise OSError(errno.EINVAL, "larger blocks")
        if fd in direct and request.param == "short direct reads":
            return READ(fd, [buffers[0][:4096]], offset)
        return READ(fd, buffers, offset)

    monkeypatch.setattr(contained, "open_regular", opened)
    monkeypatch.setattr(os, "preadv", read)
    return str(request.param)


def hashed(file: Path, size: int) -> tuple[str, int]:
    """The hash, and how many bytes were told."""
    told: list[int] = []
    watch = verify.Watch(lambda event: told.append(event.num_bytes), None)  # type: ignore[union-attr]
    found = verify.hash_file(hashlib.sha256(), str(file.parent), file.name, size, False, watch)
    return found, sum(told)


@pytest.mark.parametrize("size", SIZES)
def test_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path, way: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert hashed(tmp_path / "file", size) == (hashlib.sha256(data).hexdigest(), size)


@pytest.mark.parametrize("missing", [1, 4096, PIECE, PIECE + 1])
def test_hash_of_a_file_that_was_cut_off_meanwhile_is_refused(tmp_path: Path, way: str, missing: int) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * PIECE - missing))
    with pytest.raises(SourceChanged, match="ended while it was read"):
        hashed(tmp_path / "file", 3 * PIECE)


def test_hash_of_more_bytes_than_asked_for_is_that_of_the_first(tmp_path: Path, way: str) -> None:
    data = random.Random(0).randbytes(2 * PIECE + 100)
    (tmp_path / "file").write_bytes(data)
    assert hashed(tmp_path / "file", PIECE + 7)[0] == hashlib.sha256(data[: PIECE + 7]).hexdigest()


def test_failing_disk_is_an_error_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(PIECE))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "no luck")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(Environment, match="cannot read"):
        hashed(tmp_path / "file", PIECE)
