"""Opens regular files below one directory, and nothing else, whatever names and links say.  Knows no checkpoints.

Links must stay inside the directory, or inside the Hub cache that it belongs to (its files are links to blobs).
Rules I2-I3 of the hostile-input rules.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from . import probe
from .errors import Environment, UnsafePath


@contextlib.contextmanager
def io_errors(name: str) -> Iterator[None]:
    """OSError -> Environment, naming the file relative to the checkpoint."""
    try:
        yield
    except OSError as error:
        raise Environment(
            f"cannot read: {os.strerror(error.errno or errno.EIO)}",
            file=name,
            do="check path, disk and permissions, then give the same command again",
        ) from None


@contextlib.contextmanager
def opened(directory: str, name: str, follow_links: bool) -> Iterator[int]:
    """A regular file below `directory`, open for reading. raises UnsafePath, Environment"""
    with io_errors(name):
        fd = open_regular(directory, name, follow_links)
        try:
            yield fd
        finally:
            os.close(fd)


def open_regular(directory: str, name: str, follow_links: bool, extra_flags: int = 0) -> int:
    """Open a regular file below `directory` for reading. raises UnsafePath, OSError"""
    path = os.path.join(directory, name)
    _require_plain_parents(directory, name)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW | extra_flags
    if probe.is_link(path):  # I3
        path = _contained_target(directory, name, follow_links)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ELOOP):  # a socket; a link that was put there meanwhile
            raise
        raise _irregular(name) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _irregular(name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_direct(directory: str, name: str, follow_links: bool) -> int | None:
    """The same, for reading past the page cache; None where the file system cannot. raises UnsafePath, OSError"""
    try:
        return open_regular(directory, name, follow_links, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


@contextlib.contextmanager
def opened_direct(directory: str, name: str, follow_links: bool) -> Iterator[int | None]:
    """As `opened`, for reading past the page cache; None where the file system cannot."""
    with io_errors(name):
        fd = open_direct(directory, name, follow_links)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)


def _irregular(name: str) -> UnsafePath:
    return UnsafePath("this is no regular file", file=name, do="remove it from the checkpoint")


def _require_plain_parents(directory: str, name: str) -> None:
    """A linked directory on the way to a file would lead anywhere. raises UnsafePath"""
    parent = os.path.dirname(name)
    if parent and os.path.realpath(os.path.join(directory, parent)) != os.path.join(
        os.path.realpath(directory), parent
    ):
        raise UnsafePath(
            "a directory on the way to this file is a link, or leads outside",
            file=name,
            do="put its target in its place",
        )


def size_of(directory: str, name: str, follow_links: bool) -> int | None:
    """Size of a file below `directory`; None if it is missing. raises UnsafePath, Environment"""
    _require_plain_parents(directory, name)
    if not probe.is_there(os.path.join(directory, name)):
        return None
    with opened(directory, name, follow_links) as fd:
        return os.fstat(fd).st_size


def _contained_target(directory: str, name: str, follow_links: bool) -> str:
    target = os.path.realpath(os.path.join(directory, name))
    allowed = [os.path.realpath(directory)]
    cache = os.path.dirname(os.path.dirname(allowed[0]))  # the Hub cache: models--*/snapshots/REVISION
    if os.path.basename(cache).startswith("models--"):
        allowed.append(os.path.join(cache, "blobs"))
    if not follow_links and not any(os.path.commonpath([target, root]) == root for root in allowed):
        raise UnsafePath(
            "this link leads outside the checkpoint",
            file=name,
            expected="a target in the directory itself, or in the Hub cache that it belongs to",
            do="if you made the link yourself: --follow-symlinks",
        )
    return target
