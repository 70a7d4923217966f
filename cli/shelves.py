"""Checkpoints on the Hub as sources of a verb: which commit is read, and the room on this disk that its shards take.

Knows no verb.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import click

from dsv4ckpt import hub, hub_source, outdir, probe
from dsv4ckpt.formats import WORK_NAME
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.manifest import read_manifest
from dsv4ckpt.plan import Plan
from dsv4ckpt.source import Checkpoint
from dsv4ckpt.stop import StopFlag

from .common import place_in_job
from .progress import Progress
from .words import Console, Size, human, plural

scratch_limit_option = click.option(
    "--scratch-limit",
    type=Size(),
    default="20GB",
    show_default=True,
    metavar="SIZE",
    help="hf:// as SRC: shards are fetched when they are needed and removed after their last use; so many bytes "
    "of them are here at a time. hf:// as DST: the same of finished shards, and of both together.",
)


class _Source(NamedTuple):
    """A checkpoint on the Hub, and which of its shards are read together."""

    kind: str
    checkpoint: HubCheckpoint
    groups: tuple[Collection[str], ...]

    @property
    def least_bytes(self) -> int:
        """Of the shards that are read together."""
        files = self.checkpoint.files
        return max((sum(files[name].size for name in group) for group in self.groups), default=0)


def pinned(src: str, work: str, *, waits_there: bool = False) -> str:
    """SRC with the commit that an unfinished run in `work` reads, if that is of the same repository.

    waits_there   a finished run's output is in `work` until it is sent: it is gone on with as well
    """
    if not src.startswith(hub.PREFIX):
        return src
    address = hub.parse_address(src)
    told = outdir.pinned_commit(work)
    if told is None and waits_there and probe.is_directory(work) and (found := read_manifest(work)):
        told = " ".join(found.origin.values())
    name, _, commit = (told or "").partition(" ")
    return f"{hub.PREFIX}{name}@{commit}" if name == address.name and not address.revision else src


def _sources(made: Plan, checkpoint: Checkpoint) -> Iterator[_Source]:
    if isinstance(checkpoint, HubCheckpoint):
        yield _Source("source", checkpoint, tuple(file.shards_read(checkpoint) for file in made.files))
    released = made.original.survey.checkpoint if made.original and made.original.survey else None
    if made.original and isinstance(released, HubCheckpoint):
        yield _Source("released", released, tuple(made.original.shards_read(file) for file in made.files))


def least_bytes(made: Plan, checkpoint: Checkpoint) -> int:
    """Room that `shelves` needs for what is read together: it gives each checkpoint on the Hub the same."""
    sources = [*_sources(made, checkpoint)]
    return len(sources) * max((item.least_bytes for item in sources), default=0)


class Fetching(NamedTuple):
    """What will come from the Hub."""

    num_bytes: int
    document: dict[str, Any]  # for --json


def say_sources(made: Plan, checkpoint: Checkpoint, limit: int, console: Console) -> Fetching:
    """Tell what will be fetched."""
    document, total = {}, 0
    for item in _sources(made, checkpoint):
        needed = frozenset[str]().union(*item.groups)
        num_bytes = sum(item.checkpoint.files[name].size for name in needed)
        of = plural(len(item.checkpoint.shards), "shard")
        total += num_bytes
        console.say(
            f"  {item.kind:<9} hf://{item.checkpoint.repo.name}, commit {item.checkpoint.repo.revision}"
        )
        console.say(
            f"  to fetch  {len(needed):,} of {of}, {human(num_bytes)}, at most {human(limit)} at a time"
        )
        document[item.kind] = {**item.checkpoint.origin, "shards": len(needed), "bytes": num_bytes}
    return Fetching(total, {"to_fetch": document} if document else {})


def require_room(made: Plan, checkpoint: Checkpoint, limit: int) -> None:
    """raises Usage if what is read together does not fit"""
    least = least_bytes(made, checkpoint)
    if limit < least:
        raise hub_source.too_small(least, limit)


@contextmanager
def shelves(
    made: Plan, checkpoint: Checkpoint, work: str, limit: int, stop: StopFlag, progress: Progress
) -> Iterator[None]:
    """Room for shards from the Hub in the work directory of `work`. raises Usage if `limit` is too small"""
    sources = [*_sources(made, checkpoint)]
    require_room(made, checkpoint, limit)
    for item in sources:
        name = f"{outdir.SHELF_PREFIX}{item.kind}.{place_in_job().rank}"
        hub_source.put_on_shelf(
            item.checkpoint,
            os.path.join(work, WORK_NAME, name),
            limit // len(sources),
            stop,
            progress.fetched,
        )
    yield
