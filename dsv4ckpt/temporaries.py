"""Whose temporary things are these, and is that process alive?  And directories of this process for small files.

Such a directory goes when the process ends.  Where that could not be (a kill, a power cut), the next process that makes
one on the same host removes it.  Knows nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile

_OURS = re.compile(r"dsv4-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,9})-\w+")


def host_key() -> str:
    """Tells this host from others that share a file system."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this host has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def new_directory() -> str:
    """An empty directory in the system's place for such. raises OSError"""
    _remove_dead(tempfile.gettempdir())
    made = tempfile.mkdtemp(prefix=f"dsv4-{host_key()}-{os.getpid()}-")
    atexit.register(_remove_own, made, os.getpid())
    return made


def _remove_own(directory: str, pid: int) -> None:
    """A forked child has its parent's handlers, and not its directories."""
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_dead(directory: str) -> None:
    """What processes of this host and user left that are no more. raises OSError"""
    for entry in os.scandir(directory):
        match = _OURS.fullmatch(entry.name)
        if match is None or match["host"] != host_key() or is_alive(int(match["pid"])):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                shutil.rmtree(entry.path, ignore_errors=True)
