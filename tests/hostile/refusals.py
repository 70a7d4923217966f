"""What every refusal of a hostile file has in common: its class, at little cost, and nothing done but reading.

`refusal` is how the tests of this folder ask for one.  Costs are the process's own: processor time, and the highest
resident size above what was resident before, which Linux can be told to forget (proc(5), clear_refs).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tiny
from dsv4cli.common import without_collecting

from dsv4ckpt.errors import EXIT_BAD_INPUT, Dsv4Error

MOST_SECONDS = 0.5  # of processor time, for one file
MOST_BYTES = 300_000_000  # above what the process held before
MOST_CHARS = 3000  # of a message
NUM_ATTEMPTS = 3  # a busy machine slows one or two of them
Kinds = type[Dsv4Error] | tuple[type[Dsv4Error], ...]


class Attempt(NamedTuple):
    """What came of one call, and what it cost."""

    error: Exception | None
    seconds: float
    num_bytes: int
    deeds: list[str]  # whatever is not reading in the allowed directories


def refusal(work: Callable[[], object], kinds: Kinds, *allowed: Path) -> Dsv4Error:
    """The error of exactly one of these classes that `work` ends with; only `allowed` may be read."""
    attempts = [attempted(work, *allowed)]
    while len(attempts) < NUM_ATTEMPTS and attempts[-1].seconds > MOST_SECONDS:
        attempts.append(attempted(work, *allowed))
    error = attempts[0].error
    assert type(error) in (kinds if isinstance(kinds, tuple) else (kinds,)), repr(error)[:500]
    assert isinstance(error, Dsv4Error)
    assert error.exit_code == EXIT_BAD_INPUT
    assert tiny.is_plain(str(error)) and len(str(error)) < MOST_CHARS, ascii(str(error))[:500]
    for attempt in attempts:
        assert not attempt.deeds, attempt.deeds[:10]
        assert attempt.num_bytes <= MOST_BYTES, f"{attempt.num_bytes:,} bytes"
    seconds = min(attempt.seconds for attempt in attempts)
    assert seconds <= MOST_SECONDS, f"{seconds} s"
    return error


def attempted(work: Callable[[], object], *allowed: Path) -> Attempt:
    """One call, as a command makes it. What it raises is looked at, not raised."""
    error: Exception | None = None
    forget_peak()
    before, began = peak(), time.process_time()
    with tiny.recorded_events() as events, without_collecting():
        try:
            work()
        except Exception as raised:  # noqa: BLE001 - the caller judges it
            error = raised.with_traceback(None)  # its frames hold what was read
    seconds = time.process_time() - began
    return Attempt(error, seconds, peak() - before, tiny.not_only_reading(events, *allowed))


def forget_peak() -> None:
    """The highest resident size is from now on. Where the kernel cannot, only growth beyond the old peak is seen."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes that were resident when most were."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024
