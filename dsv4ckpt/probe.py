"""Is it there?  As os.path asks, but an I/O error is an error, and not a no.  Knows nothing else.

os.path.exists and its kin answer False to every error of the system: a disk that fails for a moment would make a file
that is there look absent, and what is absent is skipped.
"""

from __future__ import annotations

import errno
import os
import stat

from .errors import Environment

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _mode(path: str, *, follow_links: bool) -> int:
    """0 if there is nothing."""
    try:
        return os.stat(path, follow_symlinks=follow_links).st_mode
    except ValueError:  # a NUL in the path
        return 0
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        reason = os.strerror(error.errno or errno.EIO)
        name = os.path.basename(path.rstrip(os.sep)) or os.sep
        raise Environment(
            f"cannot look at it: {reason}", file=name, do="make it readable, then try again"
        ) from None


def is_there(path: str) -> bool:
    """Whether the name is taken; a link that leads nowhere counts. raises Environment"""
    return _mode(path, follow_links=False) != 0


def leads_somewhere(path: str) -> bool:
    """Whether there is something, at the end of links. raises Environment"""
    return _mode(path, follow_links=True) != 0


def is_directory(path: str) -> bool:
    """A directory, or a link to one. raises Environment"""
    return stat.S_ISDIR(_mode(path, follow_links=True))


def is_real_directory(path: str) -> bool:
    """A directory, and no link to one. raises Environment"""
    return stat.S_ISDIR(_mode(path, follow_links=False))


def is_link(path: str) -> bool:
    """raises Environment"""
    return stat.S_ISLNK(_mode(path, follow_links=False))
