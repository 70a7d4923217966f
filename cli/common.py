"""What every verb shares: its options, signals, errors as words.  Knows no verb."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import click

from .words import Console


class Stoppable(Protocol):
    """Something that workers look at between chunks."""

    signal_number: int


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json, -q and -v, handed to the verb as one Console."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; words go to stderr.")
    @click.option("-q", "--quiet", is_flag=True, help="No words, no progress; errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="More detail, and a traceback for our own bugs.")
    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        return command(*args, console=Console(as_json=as_json, quiet=quiet, verbose=verbose), **kwargs)

    return wrapped


follow_links_option = click.option(
    "--follow-symlinks",
    "follow_links",
    is_flag=True,
    help="Follow links that lead outside the checkpoint. Links within a Hub cache are always followed.",
)


@contextmanager
def without_collecting() -> Iterator[None]:
    """No garbage collection while headers become 100,000 small objects that all stay: it finds nothing, slowly."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def stopping_on_signals(stop: Stoppable) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the workers to stop, the second one ends the process at once."""

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stop.signal_number:
            os._exit(128 + number)
        stop.signal_number = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
