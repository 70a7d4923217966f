"""What every verb shares: its options, signals, its place in a job of many ranks.  Knows no verb."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NamedTuple

import click

from dsv4ckpt import hub_source, probe, source
from dsv4ckpt.errors import EXIT_SIGNAL
from dsv4ckpt.formats import INDEX_NAME
from dsv4ckpt.ranks import ALONE, Ranks
from dsv4ckpt.source import Checkpoint
from dsv4ckpt.stop import StopFlag

from .words import Console

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class Place(NamedTuple):
    """Which rank this process is, of how many."""

    rank: int
    size: int


def place_in_job() -> Place:
    """As torchrun tells the processes that it starts; without it, alone."""
    told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if "MASTER_ADDR" not in os.environ or not all(text.isdecimal() and len(text) < 10 for text in told):
        return Place(0, 1)
    return Place(int(told[0]), int(told[1]))


def _attempt() -> int | None:
    """How often torchrun has started the ranks again; None if it is not the same number for all of them."""
    told = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return int(told) if is_one_machine and told.isdecimal() and len(told) < 10 else None


@contextmanager
def ranks_of_this_job() -> Iterator[Ranks]:
    """The ranks that torchrun started, joined while the block runs. raises Environment"""
    if place_in_job().size == 1:
        yield ALONE
        return
    from dsv4ckpt import process_group  # brings torch

    with ExitStack() as stack:
        before = _handle(signal.SIG_DFL)  # no handler of ours runs while torch waits for the other ranks
        try:
            ranks = stack.enter_context(process_group.joined(_attempt()))
        finally:
            _restore(before)
        yield ranks


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json, -q and -v, handed to the verb as one Console. Of several ranks only the first one speaks."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; words go to stderr.")
    @click.option("-q", "--quiet", is_flag=True, help="No words, no progress; errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="More detail, and a traceback for our own bugs.")
    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        others = place_in_job().rank > 0
        console = Console(as_json=as_json and not others, quiet=quiet or others, verbose=verbose)
        return command(*args, console=console, **kwargs)

    return wrapped


dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, from headers only.")


def workers_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """what: of which so many are written at a time"""
    return click.option(
        "--workers",
        type=click.IntRange(1, 64),
        default=2,
        show_default=True,
        help=f"{what} at a time; never changes bytes.",
    )


follow_links_option = click.option(
    "--follow-symlinks",
    "follow_links",
    is_flag=True,
    help="Follow links that lead outside the checkpoint. Links within a Hub cache are always followed.",
)


def open_any(path: str, *, follow_links: bool) -> Checkpoint:
    """A checkpoint: safetensors files or a torch DCP directory. raises as their own functions"""
    if not source.is_dcp(path) or probe.is_there(os.path.join(path, INDEX_NAME)):
        return hub_source.open_checkpoint(path, follow_links=follow_links)
    from dsv4ckpt import dcp_source  # brings torch

    return dcp_source.open_dcp(path, follow_links=follow_links)[0].checkpoint


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


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    os._exit(EXIT_SIGNAL + number)


@contextmanager
def ending_on_signals(*, to_the_last: bool) -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once and without a word: nothing is being written.

    to_the_last  after the block as well, while the interpreter leaves
    """
    before = _handle(_end)
    try:
        yield
    finally:
        if not to_the_last:
            _restore(before)


@contextmanager
def stopping_on_signals(stop: StopFlag) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the workers to stop, the second one ends the process at once.

    raises  Interrupted also if the work was done before anybody looked
    """

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal_number:
            _end(number, frame)
        stop.signal_number = number

    before = _handle(ask)
    try:
        yield
        stop.check()
    finally:
        _restore(before)


def _handle(handler: _Handler) -> dict[int, _Handler]:
    """Install a handler; those from before."""
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(before: dict[int, _Handler]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
