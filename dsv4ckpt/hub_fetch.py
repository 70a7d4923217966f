"""Brings whole files of a repository to this disk, a few segments at a time, and proves them by the Hub's ids.

What has arrived stays over a kill: a file that is under way has marks beside it, one byte for each segment.  Knows no
tensors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping

from . import formats
from .errors import HubFailed
from .hub import Remote, Repo
from .sink import io_errors, write_at
from .stop import StopFlag, all_of

_CHUNK = 4 * 1024 * 1024
_SEGMENT_BYTES = 64 * 1024 * 1024  # asked for at a time
_NUM_CONNECTIONS = 4  # for each file
_TIMES = 3  # that a file is brought before it counts as wrong


class Bringer:
    """Brings whole files of a repository, a few segments at a time, and proves them. Is a shelf.Fetch."""

    def __init__(
        self,
        repo: Repo,
        files: Mapping[str, Remote],
        stop: StopFlag,
        on_bytes: Callable[[int], None],
        segment_bytes: int = _SEGMENT_BYTES,
    ) -> None:
        """on_bytes: told of bytes as they arrive, from any thread"""
        self._repo, self._files, self._stop, self._on_bytes = repo, files, stop, on_bytes
        self._segment_bytes = segment_bytes

    def __call__(self, name: str, part: str, marks: str) -> None:
        """raises HubFailed, NoSpace, Environment, what `stop` raises"""
        for _ in range(_TIMES):
            self._fill(name, part, marks)
            if self._is_proven(name, part):
                return
            with io_errors(name):
                os.unlink(part)
        raise HubFailed(
            f"a shard arrives {_TIMES} times as something else than the Hub's id of it says",
            file=name,
            expected=self._files[name].id,
            do="give the same command again later; if it stays so, ask who published it",
        )

    def _fill(self, name: str, part: str, marks: str) -> None:
        """Bring what is not there. A part without marks is complete, or was never begun."""
        size = self._files[name].size
        segments = formats.spans(size, self._segment_bytes)
        with contextlib.ExitStack() as stack:
            with io_errors(name):
                if not os.path.lexists(part):
                    _write_new(marks, bytes(len(segments)))
                    _write_new(part, b"")
                elif not os.path.lexists(marks):
                    return
                flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
                part_fd, marks_fd = os.open(part, flags), os.open(marks, flags)
                stack.callback(os.close, part_fd)
                stack.callback(os.close, marks_fd)
                there = os.pread(marks_fd, len(segments), 0)
                os.ftruncate(part_fd, size)

            def bring(number: int) -> None:
                begin, count = segments[number]
                self._bring(name, begin, begin + count, part_fd)
                with io_errors(name):
                    os.pwrite(marks_fd, b"\1", number)

            waiting = [number for number in range(len(segments)) if there[number : number + 1] != b"\1"]
            all_of(bring, waiting, _NUM_CONNECTIONS)
        with io_errors(name):
            os.unlink(marks)

    def _bring(self, name: str, begin: int, end: int, fd: int) -> None:
        def take(offset: int, piece: bytes) -> None:
            self._stop.check()
            with io_errors(name):
                write_at(fd, piece, offset)
            self._on_bytes(len(piece))

        self._repo.stream(name, begin, end, take)

    def _is_proven(self, name: str, part: str) -> bool:
        remote = self._files[name]
        with io_errors(name), open(part, "rb") as file:
            digest = remote.digest()
            while piece := file.read(_CHUNK):
                self._stop.check()
                digest.update(piece)
            return file.tell() == remote.size and digest.hexdigest() == remote.id


def _write_new(path: str, data: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with open(path, "xb") as file:
        file.write(data)
