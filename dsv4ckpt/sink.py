"""Streams one file to disk through reused aligned slabs: filled, hashed and written side by side.

Owns direct I/O, the order of hashing and writing, and the temporary file until it is published; knows no directories'
rules (outdir.py) and no tensors.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

from .errors import Environment, NoSpace

_SLAB_BYTES = 8 * 1024 * 1024  # a multiple of any block device's alignment
_NUM_SLABS = 3  # one filled, one hashed and written, one on its way between
_ALIGNMENT = 4096
_NO_SPACE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have your quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


class Receipt(NamedTuple):
    """What a finished file is. `notes` are the writer's own words about it, kept in the journal."""

    name: str
    size: int
    sha256: str
    notes: dict[str, Any]


@contextlib.contextmanager
def io_errors(name: str) -> Iterator[None]:
    """OSError -> NoSpace or Environment, naming the file relative to the output."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        if error.errno in _NO_SPACE:
            raise NoSpace(
                f"the output cannot grow: {reason}",
                file=name,
                do=f"{_NO_SPACE[error.errno]}, then give the same command again: finished files are kept",
            ) from None
        raise Environment(
            f"cannot write: {reason}",
            file=name,
            do="check path, disk and permissions, then give the same command again: finished files are kept",
        ) from None


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """All of `data`, from `offset` on. raises OSError"""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class FileSink:
    """Streams one output file through reused aligned slabs; hashing and writing run beside the producer.

    Direct I/O where the file system allows it, so that write-back neither throttles us nor evicts other people's
    cache; elsewhere buffered, with each slab written back early and dropped.
    With in_order=False the producer may `seek`, and put small pieces elsewhere with `write_at`: for what is made
    together and stands apart.  Such a file is buffered, and hashed as it is read back.
    """

    def __init__(
        self,
        name: str,
        size: int,
        temporary: str,
        publish: Callable[[str, Receipt], None],
        *,
        in_order: bool = True,
    ) -> None:
        self._in_order = in_order
        self._name = name
        self._temporary = temporary
        self._publish_as = publish
        self._size = size
        self._sha256 = hashlib.sha256()
        self._at = 0  # where the current slab goes
        self._written = 0  # bytes in all
        self._filled = 0
        self.notes: dict[str, Any] = {}
        self.crc32: int | None = None  # set by who wants to know that of the bytes to come
        self.check: Callable[[], None] = lambda: None  # raises when the work is to stop

    def __enter__(self) -> FileSink:
        with io_errors(self._name):
            flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            if self._in_order:
                self._fd, self._direct = _open_direct(self._temporary, flags | os.O_WRONLY)
            else:
                self._fd, self._direct = os.open(self._temporary, flags | os.O_RDWR, 0o666), False
            try:
                if (self._direct or not self._in_order) and self._size:
                    _reserve(self._fd, self._size)
                slab = min(_SLAB_BYTES, -(-self._size // _ALIGNMENT) * _ALIGNMENT)
                self._slabs = [mmap.mmap(-1, max(slab, _ALIGNMENT)) for _ in range(_NUM_SLABS)]
                self._pending: list[concurrent.futures.Future[None] | None] = [None] * _NUM_SLABS
                self._current = 0
                self._pool = concurrent.futures.ThreadPoolExecutor(1)
            except BaseException:
                os.close(self._fd)
                os.unlink(self._temporary)
                raise
        return self

    def room(self) -> memoryview:
        """What is left of the current slab, to be filled from its start."""
        if self._filled == len(self._slabs[self._current]):
            self._flush()
        return memoryview(self._slabs[self._current])[self._filled :]

    def advance(self, count: int) -> None:
        """`count` bytes of `room` were filled."""
        if self.crc32 is not None:
            filled = memoryview(self._slabs[self._current])[self._filled : self._filled + count]
            self.crc32 = zlib.crc32(filled, self.crc32)
        self._filled += count

    def write(self, data: memoryview | bytes) -> None:
        """Append a copy of `data`."""
        view = memoryview(data)
        while view:
            room = self.room()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.advance(count)
            view = view[count:]

    def seek(self, offset: int) -> None:
        """What comes next stands at `offset` of the file."""
        if offset == self._at + self._filled:
            return
        assert not self._in_order
        if self._filled:
            self._flush()
        self._at = offset

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Put a small piece where it belongs; the next byte of `room` stays where it was."""
        assert not self._in_order
        self._written += len(data)
        with io_errors(self._name):
            write_at(self._fd, data, offset)

    def _flush(self) -> None:
        """Hand the current slab to the writing thread and wait until the next one is free."""
        slab, count, offset = self._slabs[self._current], self._filled, self._at
        self._pending[self._current] = self._pool.submit(self._hash_and_write, slab, count, offset)
        self._at += count
        self._written += count
        self._filled = 0
        self._current = (self._current + 1) % _NUM_SLABS
        waiting = self._pending[self._current]
        if waiting is not None:
            waiting.result()

    def _hash_and_write(self, slab: mmap.mmap, count: int, offset: int) -> None:
        whole = memoryview(slab)
        if self._in_order:
            self._sha256.update(whole[:count])
        padded = -(-count // _ALIGNMENT) * _ALIGNMENT if self._direct else count
        view = whole[:padded]
        with io_errors(self._name):
            write_at(self._fd, view, offset)
            if not self._direct and hasattr(os, "posix_fadvise"):
                # the first call starts write-back of this slab, the second drops the one before the last
                os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
                if self._in_order:
                    behind = max(0, offset - 2 * len(slab))
                    os.posix_fadvise(self._fd, behind, len(slab), os.POSIX_FADV_DONTNEED)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        if self._filled:
            self._flush()
        for waiting in self._pending:
            if waiting is not None:
                waiting.result()
        with io_errors(self._name):
            if self._in_order:
                os.ftruncate(self._fd, self._written)
            os.fsync(self._fd)
            if not self._in_order:
                self._hash_what_stands_there()
            fd, self._fd = self._fd, -1
            os.close(fd)
            if self._written != self._size:
                raise Environment(
                    "the file did not come out as planned",
                    file=self._name,
                    expected=f"{self._size:,} bytes",
                    found=f"{self._written:,} bytes",
                    do="please report this",
                )
            receipt = Receipt(self._name, self._written, self._sha256.hexdigest(), self.notes)
            self._publish_as(self._temporary, receipt)

    def _hash_what_stands_there(self) -> None:
        view = memoryview(self._slabs[0])
        offset = 0
        while count := os.preadv(self._fd, [view], offset):
            self.check()
            self._sha256.update(view[:count])
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
            offset += count
        if offset != self._size:
            self._written = offset  # told below

    def _discard(self) -> None:
        """Release everything; a temporary file that was not published is removed."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)


def _reserve(fd: int, size: int) -> None:
    """Ask for the space at once: less fragmentation, and a full disk is noticed early. Some file systems cannot."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _open_direct(path: str, flags: int) -> tuple[int, bool]:
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # some kernels create the file before they refuse
                os.unlink(path)
    return os.open(path, flags, 0o666), False
