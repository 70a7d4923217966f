"""Progress on stderr: a bar on a terminal, a line every 10 s elsewhere.  Knows only byte counts."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from .words import human

_LINE_SECONDS = 10.0


class Progress:
    """Counts bytes from any thread."""

    def __init__(self, what: str, *, quiet: bool) -> None:
        self._what, self._quiet = what, quiet
        self._lock = threading.Lock()
        self._bar: tqdm[None] | None = None
        self._done = self._start_done = self._total = 0
        self._beside: dict[str, int] = {}  # bytes of other kinds, told but not counted
        self._began = self._spoke = time.monotonic()

    def start(self, total: int, done: int = 0) -> None:
        """The whole work, and how much of it was done before."""
        self._total, self._done, self._start_done = total, done, done
        self._began = self._spoke = time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, unit="B", unit_scale=True, desc=self._what, dynamic_ncols=True,
                smoothing=0.1, file=sys.stderr,
            )  # fmt: skip

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._bar is not None:
                self._bar.update(num_bytes)
            self._speak()

    def fetched(self, num_bytes: int) -> None:
        self._count("fetched", num_bytes)

    def sent(self, num_bytes: int) -> None:
        self._count("sent", num_bytes)

    def _count(self, word: str, num_bytes: int) -> None:
        with self._lock:
            self._beside[word] = self._beside.get(word, 0) + num_bytes
            if self._bar is not None:
                self._bar.set_postfix_str(self._words(), refresh=False)
            self._speak()

    def _words(self) -> str:
        return ", ".join(f"{word} {human(count)}" for word, count in self._beside.items())

    def _speak(self) -> None:
        """A line now and then, where there is no bar."""
        if self._bar is None and not self._quiet and time.monotonic() - self._spoke >= _LINE_SECONDS:
            self._spoke = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = self.rate
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        share = self._done / self._total if self._total else 1
        done = f"{human(self._done)} of {human(self._total)}"
        beside = f"; {self._words()}" if self._beside else ""
        return f"{self._what}: {done} ({share:.0%}), {human(rate)}/s{left}{beside}"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Bytes per second of this run."""
        return (self._done - self._start_done) / max(self.seconds, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
