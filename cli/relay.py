"""dsv4 convert SRC hf://DST: shard by shard onto the Hub, with a window on this disk.  Used by convert.py alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from dsv4ckpt import hub, hub_source, outbox, outdir, probe, push, verify
from dsv4ckpt.card import early_card
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import CARD_NAME
from dsv4ckpt.hub import Remote
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.hub_writer import WritableRepo
from dsv4ckpt.manifest import manifest_of, read_manifest
from dsv4ckpt.outbox import Outbox
from dsv4ckpt.plan import Plan
from dsv4ckpt.push import Pushed
from dsv4ckpt.source import Checkpoint
from dsv4ckpt.stop import StopFlag
from dsv4ckpt.verify import FileVerdict

from .common import place_in_job
from .words import Console, human, plural


class Windows(NamedTuple):
    """Bytes of shards that are here at a time."""

    fetched: int
    finished: int


class Goal(NamedTuple):
    """Where a conversion goes to: a branch on the Hub, by way of a directory here."""

    repo: WritableRepo
    work: str


def default_work(dst: str) -> str:
    """The directory of this machine that a conversion to hf://owner/NAME goes through."""
    return f"{hub.parse_address(dst).name.partition('/')[2]}.partial"


def require_alone() -> None:
    """raises Usage under torchrun"""
    if place_in_job().size > 1:
        raise Usage(
            "one process converts onto the Hub",
            do="leave torchrun out; --workers makes more shards at a time",
        )


def require_another(src: str, dst: str) -> None:
    """raises Usage if both are the same branch of the Hub"""
    if not (src.startswith(hub.PREFIX) and dst.startswith(hub.PREFIX)):
        return
    one, other = hub.parse_address(src), hub.parse_address(dst)
    if (one.name, one.revision or "main") == (other.name, other.revision or "main"):
        raise Usage("DST is SRC: nothing is converted in place", do="name a new repository, or a new branch")


def reached(
    dst: str, work: str, made: Plan, checkpoint: Checkpoint, *, private: bool, console: Console
) -> Goal:
    """The repository, made if it is not there, after all that can be refused was. raises Usage, HubFailed"""
    address = hub.parse_address(dst)
    repo = WritableRepo(address.name)
    user = repo.user()
    has_card = any(name == CARD_NAME for name, _, _ in made.copied)
    source_card = checkpoint.read_small(CARD_NAME).decode(errors="replace") if has_card else ""
    origin = checkpoint.origin.get("repository")
    repo.require_card(early_card(made.release, made.options.target.value, origin, source_card))
    was_made = repo.create(private=private)
    repo.require_write()
    if address.revision not in (None, "main"):
        repo.take_branch(str(address.revision))
    kind = "new" if was_made else "there already"
    console.say(f"  to        {address.name}, {kind}, branch {repo.revision}, as {user}")
    return Goal(repo, work)


def is_complete(goal: Goal, made: Plan, checkpoint: Checkpoint) -> bool:
    """Whether the Hub has all of this plan's output, made from this very source. Shards are told by their ids."""
    there = HubCheckpoint(goal.repo, goal.repo.files(), None)
    found = manifest_of(there)
    if found is None or found.plan_sha256 != made.sha256:
        return False
    if any(checkpoint.proof(name) != proof for name, proof in found.proofs.items()):
        return False
    return verify.verify_published(there).ok


@contextmanager
def window(
    goal: Goal, limit: int, stop: StopFlag, on_sent: Callable[[int], None], console: Console
) -> Iterator[Outbox]:
    """Shards leave the work directory for the Hub while the block runs."""
    console.say(f"  by way of {goal.work}, at most {human(limit)} of finished shards at a time")
    goal.repo.pause = functools.partial(hub_source.pause, stop)
    with outbox.opened(goal.work, goal.repo, limit, stop, on_sent) as made:
        yield made


def _lost(goal: Goal, present: Mapping[str, Remote]) -> list[FileVerdict]:
    """Shards of a finished work directory that are neither there nor, any more, on the Hub."""
    manifest = read_manifest(goal.work) if probe.is_directory(goal.work) else None
    lost = []
    for file in manifest.files if manifest else ():
        is_here = probe.is_there(os.path.join(goal.work, file.name))
        if file.name != CARD_NAME and not is_here and not push.is_published(file, present):
            remote = present.get(file.name)
            verdict, found = ("differs", remote.id) if remote else ("missing", None)
            lost.append(FileVerdict(file.name, verdict, file.sha256, found))
    return lost


def finish(goal: Goal, on_sent: Callable[[int], None]) -> Pushed:
    """Send index, config, manifest and card, compare the ids, and remove the work directory if they are right.

    If shards on the Hub are not right any more, nothing is sent: no index is seen without its shards.
    """
    name, present = goal.repo.name, goal.repo.files()
    if lost := _lost(goal, present):
        return Pushed(tuple(lost), (), 0, 0, kept_card=False)
    plan = push.plan_push(goal.work, name, present=present)
    goal.repo.require_card(plan.card.decode())

    def on_event(event: push.Event) -> None:
        if isinstance(event, push.Sent):
            on_sent(event.num_bytes)

    pushed = push.push(plan, goal.repo, on_event)
    if pushed.ok:
        tidy(goal, plan.plan_sha256)
    return pushed


def tidy(goal: Goal, plan_sha256: str) -> None:
    """Remove what the plan has made in the work directory, and the directory if nothing else is in it."""
    if not probe.is_directory(goal.work):
        return
    found = read_manifest(goal.work)
    if found and found.plan_sha256 == plan_sha256:
        outdir.remove_output(goal.work, [file.name for file in found.files])
    elif not found and not os.listdir(goal.work):  # killed at the last moment of that
        os.rmdir(goal.work)


def tidy_lost(goal: Goal, plan_sha256: str) -> None:
    """The same if shards of it are lost, for they can only be made anew."""
    if _lost(goal, goal.repo.files()):
        tidy(goal, plan_sha256)


def windows(made: Plan, least_in: int, limit: int) -> Windows:
    """Divide the room: half for finished shards, but at least what one needs. raises Usage if it is too small

    least_in   bytes of shards that are fetched and read together
    """
    least_out = max(file.size for file in made.files)
    if least_in + least_out > limit:
        raise hub_source.too_small(least_in + least_out, limit)
    fetched = min(max(limit // 2, least_in), limit - least_out) if least_in else 0
    return Windows(fetched, limit - fetched)


def document(pushed: Pushed, goal: Goal) -> dict[str, Any]:
    return {
        "repo": goal.repo.name,
        "revision": goal.repo.revision,
        "ok": pushed.ok,
        "on_the_hub": [file._asdict() for file in pushed.files],
    }


def say_pushed(pushed: Pushed, goal: Goal, console: Console) -> None:
    for file in pushed.files:
        if file.verdict != "ok":
            console.say(
                f"  {file.name}: {file.verdict}, expected {file.expected}, found {file.found or 'nothing'}"
            )
    good = sum(file.verdict == "ok" for file in pushed.files)
    console.say(f"{good} of {plural(len(pushed.files), 'file')} on the Hub have the manifest's SHA-256")
    if pushed.others:
        console.say(f"also on the Hub, and not of this conversion: {', '.join(pushed.others)}")
    console.say(f"{goal.repo.endpoint}/{goal.repo.name}")
