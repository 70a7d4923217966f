"""A few whole files of a remote place on this disk: brought when they are first needed, gone after their last use.

Owns the room that they may take together, who waits for it, and what a killed run left.  A file is held by those who
read it; they take all that they need at once, so that nobody waits for what another one waiting holds.  Knows neither
the Hub nor tensors: a Fetch brings the bytes, and proves them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

from .sink import io_errors

_WHOLE, _PART, _MARKS = ".whole", ".part", ".marks"  # proven; under way; which pieces of that are there
_LOOK_SECONDS = 0.2  # how often somebody who waits looks whether the work is to stop


class Fetch(Protocol):
    """Brings a file to `part`, which may hold some of it; `marks` is for its own notes. What returned is proven."""

    def __call__(self, name: str, part: str, marks: str) -> None: ...


class Shelf:
    """A directory for whole files, which nothing else uses."""

    def __init__(
        self,
        path: str,
        sizes: Mapping[str, int],
        limit: int,
        fetch: Fetch,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """limit: bytes of all files that are here. check: raises when the work is to stop"""
        self.path = path
        self._sizes, self._limit, self._fetch, self._check = sizes, limit, fetch, check
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._here: dict[str, None] = {}  # taken up, the longest unused first
        self._proven: set[str] = set()
        self._held: Counter[str] = Counter()
        self._to_come: Counter[str] = Counter()  # how often each will still be held
        self._bringing = {name: threading.Lock() for name in sizes}

    def expect(self, uses: Mapping[str, int]) -> None:
        """How often each file will be held from now on. What an earlier run left of others is removed."""
        self._to_come = Counter(uses)
        with io_errors("."), contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.listdir(self.path)):
                name, ending = os.path.splitext(entry)
                if self._to_come[name] > 0 and ending in (_WHOLE, _PART, _MARKS):
                    self._here[name] = None
                else:
                    os.unlink(os.path.join(self.path, entry))

    def file_of(self, name: str) -> str:
        """What a proven file is called in the directory."""
        return name + _WHOLE

    def bytes_to_come(self, names: Iterable[str]) -> int:
        """Room that these files will still take here, beyond what is here already."""
        here = 0
        with io_errors("."), contextlib.suppress(FileNotFoundError):
            here = sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.path))
        return max(0, min(self._limit, sum(self._sizes[name] for name in {*names})) - here)

    @contextlib.contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """All of these files are here, whole and proven, while the block runs. raises what Fetch and check raise"""
        wanted = sorted({*names})
        self._take_up(wanted)
        is_done = False
        try:
            for name in wanted:
                self._bring(name)
            yield
            is_done = True
        finally:
            self._put_down(wanted, is_done=is_done)

    # ---- room

    def _take_up(self, wanted: list[str]) -> None:
        """Wait for one's turn, then for room."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or not self._make_room(wanted):
                    self._check()
                    self._changed.wait(_LOOK_SECONDS)
                for name in wanted:
                    self._held[name] += 1
                    self._here.pop(name, None)
                    self._here[name] = None
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _make_room(self, wanted: list[str]) -> bool:
        """Whether these fit, after what is neither held nor wanted has gone; with nothing held, all fits."""
        missing = sum(self._sizes[name] for name in wanted if name not in self._here)
        idle = [name for name in self._here if not self._held[name] and name not in wanted]
        taken = sum(self._sizes[name] for name in self._here)
        freed = sum(self._sizes[name] for name in idle)
        if taken - freed + missing > self._limit and any(self._held.values()):
            return False
        for name in idle:
            if taken + missing <= self._limit:
                break
            taken -= self._sizes[name]
            self._take_off(name)
        return True

    def _put_down(self, names: list[str], *, is_done: bool) -> None:
        with self._changed:
            for name in names:
                self._held[name] -= 1
                self._to_come[name] -= is_done
                if is_done and not self._held[name] and self._to_come[name] <= 0:
                    self._take_off(name)
            if not self._here:
                with contextlib.suppress(OSError):
                    os.rmdir(self.path)
            self._changed.notify_all()

    def _take_off(self, name: str) -> None:
        self._here.pop(name, None)
        self._proven.discard(name)
        for ending in (_WHOLE, _PART, _MARKS):
            with io_errors(name), contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, name + ending))

    def _bring(self, name: str) -> None:
        whole, part, marks = (os.path.join(self.path, name + ending) for ending in (_WHOLE, _PART, _MARKS))
        with self._bringing[name]:
            if name in self._proven:
                return
            with io_errors(name):
                os.makedirs(self.path, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    os.rename(whole, part)  # an earlier run's: to be proven again
            self._fetch(name, part, marks)
            with io_errors(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(marks)
                os.rename(part, whole)
            self._proven.add(name)
