"""The wish to stop early: a signal or a failed worker sets it, whoever works looks at it between two chunks.

Knows no torch, so that every verb can have it.
"""

from __future__ import annotations

import threading

from .errors import Interrupted


class StopFlag:
    """Set from a signal handler; workers look at it once per chunk."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._failed = threading.Event()

    def fail(self) -> None:
        """One worker failed: the others stop."""
        self._failed.set()

    @property
    def is_set(self) -> bool:
        return bool(self.signal_number) or self._failed.is_set()

    def check(self) -> None:
        """raises Interrupted"""
        if self.is_set:
            raise Interrupted(self.signal_number)
