"""The wish to stop early: a signal or a failed worker sets it, whoever works looks at it between two chunks.

And work in threads that ends with the first failure.  Knows no torch, so that every verb can have it.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from .errors import Interrupted

_Item = TypeVar("_Item")


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


def all_of(
    call: Callable[[_Item], None],
    items: Iterable[_Item],
    num_threads: int,
    on_failure: Callable[[], None] = lambda: None,
) -> None:
    """Call with every item, some at a time. The first failure is raised, once what is under way has ended."""
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            on_failure()
            for future in futures:
                future.cancel()
            raise
