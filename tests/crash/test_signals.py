"""SIGINT and SIGTERM at any moment: the command ends within 2 s and without a word too many, and continues later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tools
import trials

from dsv4ckpt import run, sample
from dsv4ckpt.stop import StopFlag

Often = Callable[[int, int], int]
LARGE = {"layers": 1, "hidden": 256, "intermediate": 32, "experts": 6, "heads": 4096}
PIECE_BYTES = 36 * 1024 * 1024  # a row of tiles of the widest matrix, and some scales


def stopped(kind: str, src: Path, work: Path, num_signals: int) -> dict[str, Any]:
    """What the driver found: every exit code is the signal's, nothing is torn, no traceback was shown."""
    found: dict[str, Any] = trials.drive("signals", kind, src, work, num_signals, timeout=3600)
    assert found["codes"] == []
    assert found["said"] == []
    assert found["torn"] == []
    assert found["different"] == []
    assert found["leftovers"] == []
    return found


def in_time(found: dict[str, Any]) -> bool:
    """Whether all ended within the promised 2 s, and took their temporaries along."""
    return found["slow"] == [] and found["temporaries"] == []


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A layer with tensors of 67 MB, which are 134 MB as BF16. Removed at once, with all that was made of it."""
    with tools.roomy(1_300_000_000, tmp_path) as base:
        yield tiny.make_sample("flash", base / "large", **LARGE)


@pytest.mark.slow
def test_signal_at_random_ends_the_command_and_the_same_command_gives_the_same_bytes(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    """SIGINT and SIGTERM in turn, while it plans, while it writes and when it is done."""
    num_signals = often(100, 2000)
    found = stopped("once", smallest, tmp_path, num_signals)
    assert found["landed"] >= num_signals, "too few signals landed to mean anything"
    assert in_time(found), found


@pytest.mark.slow
def test_signal_while_nothing_is_written_ends_the_command_without_a_trace(
    smallest: Path, tmp_path: Path
) -> None:
    """While it reads headers and plans, just before it writes, and when it only has to tell what came of it."""
    assert stopped("outside", smallest, tmp_path, 0)["landed"] == 12


@pytest.mark.slow
def test_signal_to_a_fresh_process_ends_it_quietly_from_the_start_on(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    """While it imports torch as well."""
    num_signals = often(6, 60)
    found = stopped("process", smallest, tmp_path, num_signals)
    assert found["landed"] >= num_signals / 2, "too few signals landed to mean anything"
    assert in_time(found), found


@pytest.mark.slow
def test_signal_stops_every_verb_in_the_middle_of_large_tensors(large: Path, often: Often) -> None:
    found = stopped("large", large, large.parent, often(2, 10))
    assert found["landed"] >= often(8, 40)
    assert in_time(found), found


class Asked(StopFlag):
    """Counts the bytes that were written between two looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._since = 0

    def check(self) -> None:
        self._since = 0

    def hear(self, num_bytes: int) -> None:
        self._since += num_bytes
        self.most = max(self.most, self._since)

    def on_event(self, event: run.Event) -> None:
        if isinstance(event, run.Wrote):
            self.hear(event.num_bytes)


@pytest.mark.slow
def test_stop_flag_is_looked_at_before_every_piece_of_a_large_tensor(large: Path) -> None:
    bf16, asked = large.parent / "bf16", [Asked(), Asked(), Asked()]
    for src, to, flag in ((large, "bf16", asked[0]), (bf16, "native", asked[1])):
        conversion = trials.Conversion(str(src), to)
        conversion.into(large.parent / to, workers=1, on_event=flag.on_event, stop=flag)
    planned = sample.plan_sample(sample.SampleOptions(**LARGE))  # type: ignore[arg-type]
    sample.write_sample(planned, str(large.parent / "sample"), asked[2].hear, asked[2])
    assert all(0 < flag.most <= PIECE_BYTES for flag in asked), [flag.most for flag in asked]


@pytest.mark.slow
def test_two_signals_end_the_command_and_the_same_command_gives_the_same_bytes(
    smallest: Path, tmp_path: Path, often: Often
) -> None:
    num_signals = often(20, 500)
    found = stopped("twice", smallest, tmp_path, num_signals)
    assert found["landed"] >= num_signals
    assert found["longest"] <= 2, found


@pytest.mark.slow
def test_second_signal_ends_a_command_whose_workers_are_deaf(flash: Path, tmp_path: Path) -> None:
    """At once: nothing is asked of anybody."""
    found = stopped("unheard", flash, tmp_path, 4)
    assert found["landed"] == 4
    assert found["longest"] <= 2, found
