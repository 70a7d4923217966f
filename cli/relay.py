"""dsv4 convert SRC hf://DST: shard by shard onto the Hub, with a window on this disk.  Used by convert.py alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dsv4ckpt import hub, hub_source, outbox, outdir, probe, push, verify
from dsv4ckpt.card import early_card
from dsv4ckpt.errors import Usage
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.hub_writer import WritableRepo
from dsv4ckpt.manifest import manifest_of, read_manifest
from dsv4ckpt.outbox import Outbox
from dsv4ckpt.plan import Plan
from dsv4ckpt.push import Pushed
from dsv4ckpt.source import Checkpoint
from dsv4ckpt.stop import StopFlag

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


def reached(dst: str, work: str, made: Plan, *, private: bool, console: Console) -> Goal:
    """The repository, made if it is not there, after all that can be refused was. raises Usage, HubFailed"""
    address = hub.parse_address(dst)
    repo = WritableRepo(address.name)
    user = repo.user()
    repo.require_card(early_card(made.release, made.options.target.value))
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
    with outbox.opened(goal.work, goal.repo, limit, stop, on_sent) as made:
        yield made


def finish(goal: Goal, on_sent: Callable[[int], None]) -> Pushed:
    """Send index, config, manifest and card, compare the ids, and remove the work directory if they are right."""
    name = goal.repo.name
    plan = push.plan_push(goal.work, name, present=goal.repo.files())
    goal.repo.require_card(plan.card.decode())

    def on_event(event: push.Event) -> None:
        if isinstance(event, push.Sent):
            on_sent(event.num_bytes)

    pushed = push.push(plan, goal.repo, on_event)
    if pushed.ok:
        tidy(goal.work)
    return pushed


def tidy(work: str) -> None:
    """Remove what the manifest in the work directory names, and the directory if nothing else is in it."""
    if probe.is_directory(work) and (found := read_manifest(work)):
        outdir.remove_output(work, [file.name for file in found.files])


def windows(made: Plan, groups: Iterable[Collection[str]], checkpoint: Checkpoint, limit: int) -> Windows:
    """Divide the room: half for finished shards, but at least what one needs. raises Usage if it is too small

    groups   shards of the source that are read together, if they are fetched
    """
    sizes = {name: item.stamp.size for name, item in checkpoint.shards.items()}
    least_in = max((sum(sizes[name] for name in group) for group in groups), default=0)
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
