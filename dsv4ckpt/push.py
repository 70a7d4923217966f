"""Publishes a finished directory on the Hub: what its manifest names, group by group, and proof at the end.

A PushPlan is made from the directory alone.  Shards go first, a few at a time, each group in a commit of its own:
killed anywhere, the next run finds what is there by its id and reads only the rest.  Index, config and manifest come in
the last commit; an index that is there before is removed by the first one, so that none is seen without its shards.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from . import card, contained, probe, shard, verify
from .errors import BadConfig, EditedOutput, MissingFile
from .formats import (
    CARD_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_METADATA_BYTES,
    MAX_SMALL_FILE_BYTES,
    SIDECAR_NAME,
    WORK_NAME,
)
from .hub import Remote
from .hub_writer import Addition, WritableRepo
from .manifest import Listed, Manifest, read_manifest
from .verify import FileVerdict

GROUP_FILES = 8  # of shards in one commit: the Hub allows 128 commits in an hour
GROUP_BYTES = 40 * 10**9


@dataclass(frozen=True)
class PushPlan:
    """What a push will publish. The card's bytes are here, all other files are read when they are sent."""

    directory: str
    files: tuple[Listed, ...]  # all but the card, the manifest among them
    card: bytes
    card_from: str  # where the card comes from, for people
    card_is_ours: bool  # made here: it gives way to one that is on the Hub
    strays: tuple[str, ...]  # in the directory, but not in the manifest
    plan_sha256: str

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files) + len(self.card)

    @property
    def groups(self) -> tuple[tuple[Listed, ...], ...]:
        """Shards and sidecar in the order of their names, in groups."""
        groups: list[list[Listed]] = []
        for file in filter(_is_heavy, self.files):
            full = not groups or len(groups[-1]) == GROUP_FILES
            if full or sum(item.size for item in groups[-1]) + file.size > GROUP_BYTES:
                groups.append([])
            groups[-1].append(file)
        return tuple(tuple(group) for group in groups)

    @property
    def last(self) -> tuple[Listed, ...]:
        """What makes the shards a checkpoint."""
        return tuple(file for file in self.files if not _is_heavy(file))


@dataclass(frozen=True)
class Started:
    """How many bytes there are, and how many of them are on the Hub already."""

    total_bytes: int
    present_bytes: int


@dataclass(frozen=True)
class Sent:
    """Another file's bytes are on the Hub."""

    num_bytes: int


@dataclass(frozen=True)
class Committed:
    """A group of files is to be seen."""

    names: tuple[str, ...]


Event = Started | Sent | Committed
OnEvent = Callable[[Event], None]


class Pushed(NamedTuple):
    """What is on the Hub now, compared with the manifest file by file."""

    files: tuple[FileVerdict, ...]
    others: tuple[str, ...]  # on the Hub, and not of this directory
    num_sent: int
    sent_bytes: int
    kept_card: bool  # that of the Hub, instead of ours

    @property
    def ok(self) -> bool:
        return all(file.verdict == "ok" for file in self.files)


def _is_heavy(file: Listed) -> bool:
    return file.name.endswith(".safetensors") or file.name == SIDECAR_NAME


def plan_push(
    directory: str,
    repo: str,
    card_path: str | None = None,
    present: Mapping[str, Remote] = MappingProxyType({}),
) -> PushPlan:
    """Look at a directory: its manifest, the size of every file, and what else lies there.

    card_path  a model card to take instead of the directory's README.md
    present    what the Hub has already: shards that are there need not be here
    raises     MissingFile, BadManifest, UnsafePath, EditedOutput, BadConfig for a card that is no text, Environment
    """
    manifest = read_manifest(directory) if probe.is_directory(directory) else None
    if manifest is None:
        raise _unfinished(directory)
    for file in manifest.files:
        if file.name != CARD_NAME and not is_published(file, present):  # anybody may write another card
            _require_size(directory, file)
    whole = _read(directory, MANIFEST_NAME, MAX_SMALL_FILE_BYTES)
    itself = Listed(MANIFEST_NAME, len(whole), hashlib.sha256(whole).hexdigest())
    text, card_from = _card(directory, manifest, repo, card_path)
    files = sorted(file for file in (*manifest.files, itself) if file.name != CARD_NAME)
    known = {file.name for file in files} | {CARD_NAME}
    _require_bytes(directory, [file for file in files if not _is_heavy(file)])
    return PushPlan(
        directory=directory,
        files=tuple(files),
        card=text,
        card_from=card_from or "made from the manifest",
        card_is_ours=not card_from,
        strays=tuple(name for name in _present(directory) if name not in known),
        plan_sha256=manifest.plan_sha256,
    )


def _unfinished(directory: str) -> MissingFile:
    if probe.is_there(os.path.join(directory, WORK_NAME)):
        what, do = "the work in this directory did not finish", "give its command again, then push"
    else:
        what, do = "this directory has no manifest", "push what dsv4 convert or dsv4 export has written"
    return MissingFile(what, expected=MANIFEST_NAME, do=do)


def _require_size(directory: str, file: Listed) -> None:
    size = contained.size_of(directory, file.name, follow_links=False)
    if size != file.size:
        raise _edited(file.name, f"{file.size:,} bytes", "nothing" if size is None else f"{size:,} bytes")


def _edited(name: str, expected: str, found: str) -> EditedOutput:
    return EditedOutput(
        "a file is not what the manifest says",
        file=name,
        expected=expected,
        found=found,
        do="dsv4 verify shows whether others differ; convert again into a new directory, then push that",
    )


def _read(directory: str, name: str, limit: int) -> bytes:
    with contained.opened(directory, name, follow_links=False) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise BadConfig(
                "this file is too large", file=name, expected=f"at most {limit:,} bytes", do="shorten it"
            )
        return shard.read_exactly(fd, size, 0, name)


def _card(directory: str, manifest: Manifest, repo: str, card_path: str | None) -> tuple[bytes, str]:
    """The card, and where it is from; empty if it was made here. That of the source lends its licence only."""
    carried = next((file for file in manifest.files if file.name == CARD_NAME), None)
    if card_path is not None:
        folder, name = os.path.split(os.path.realpath(card_path))
        data, where = _read(folder, name, MAX_METADATA_BYTES), name
    elif probe.is_there(os.path.join(directory, CARD_NAME)):
        data, where = _read(directory, CARD_NAME, MAX_METADATA_BYTES), f"{CARD_NAME} of the directory"
        if carried and hashlib.sha256(data).hexdigest() == carried.sha256:
            return card.card_of(manifest, repo, data.decode(errors="replace")).encode(), ""
    else:
        return card.card_of(manifest, repo).encode(), ""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise BadConfig(
            "the model card is no text", file=where, expected="UTF-8", found=found, do="mend it"
        ) from None
    return data, where


def _present(directory: str) -> Iterator[str]:
    """Names of what lies in a directory and below."""
    with contained.io_errors("."):
        for path, folders, names in os.walk(directory):
            folders.sort()
            yield from (os.path.relpath(os.path.join(path, name), directory) for name in sorted(names))


# ---- doing it


def push(plan: PushPlan, repo: WritableRepo, on_event: OnEvent = lambda event: None) -> Pushed:
    """Send what is missing, then compare what is there with the manifest.

    A shard's bytes are compared with the manifest before they are sent, group by group.
    raises  EditedOutput, SourceChanged, UnsafePath, HubFailed, Environment
    """
    found = repo.files()
    kept_card = plan.card_is_ours and CARD_NAME in found
    there = [file for file in plan.files if _is_there(plan, file, found)]
    on_event(Started(plan.num_bytes, sum(file.size for file in there)))
    sent: dict[str, int] = {}
    sizes = {file.name: file.size for file in plan.files} | {CARD_NAME: len(plan.card)}

    def on_sent(name: str) -> None:
        if name not in sent:  # the same file again, after a connection broke
            sent[name] = sizes[name]
            on_event(Sent(sizes[name]))

    for group in plan.groups:
        before, absent = len(sent), [file for file in group if file not in there]
        _require_bytes(plan.directory, absent)
        if absent:
            send_shards(repo, plan.directory, absent, on_sent, functools.partial(_is_there, plan))
        if len(sent) > before:
            on_event(Committed(tuple(sent)[before:]))
    _require_bytes(plan.directory, [file for file in plan.last if file not in there])

    def rest(present: Mapping[str, Remote]) -> tuple[list[Addition], list[str]]:
        absent = [file for file in plan.last if not _is_there(plan, file, present)]
        adds = [Addition(file.name, os.path.join(plan.directory, file.name)) for file in absent]
        if not kept_card and not _is_card(plan, present):
            adds.append(Addition(CARD_NAME, plan.card))
        return adds, []

    before = len(sent)
    repo.commit(rest, "Add index, config and manifest", on_sent)
    if len(sent) > before:
        on_event(Committed(tuple(sent)[before:]))
    return _compared(plan, repo.files(), sent, kept_card=kept_card)


def is_published(file: Listed, present: Mapping[str, Remote]) -> bool:
    """Whether the Hub has these very bytes under this name, by the id of an LFS file."""
    remote = present.get(file.name)
    return remote is not None and (remote.size, remote.sha256) == (file.size, file.sha256)


def send_shards(
    repo: WritableRepo,
    directory: str,
    group: Sequence[Listed],
    on_sent: Callable[[str], None],
    is_there: Callable[[Listed, Mapping[str, Remote]], bool] = is_published,
) -> None:
    """One commit of shards. An index that is there before is removed: it would be seen without its shards.

    raises  HubFailed, Environment
    """

    def missing(present: Mapping[str, Remote]) -> tuple[list[Addition], list[str]]:
        absent = [file for file in group if not is_there(file, present)]
        adds = [Addition(file.name, os.path.join(directory, file.name)) for file in absent]
        return adds, [INDEX_NAME] if adds and INDEX_NAME in present else []

    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    repo.commit(missing, f"Add {group[0].name}{more}", on_sent)


def _require_bytes(directory: str, files: Sequence[Listed]) -> None:
    """raises EditedOutput"""
    for file in files:
        _require_size(directory, file)
        digest = _digest(directory, file, hashlib.sha256())
        if digest != file.sha256:
            raise _edited(file.name, file.sha256, digest)


def _digest(directory: str, file: Listed, empty: verify.Digest) -> str:
    watch = verify.Watch(verify.ignore, None)
    return verify.hash_file(empty, directory, file.name, file.size, False, watch)


def _is_there(plan: PushPlan, file: Listed, present: Mapping[str, Remote]) -> bool:
    """Whether the Hub has the manifest's bytes under this name. LFS files are not read for that."""
    remote = present.get(file.name)
    if remote is None or remote.size != file.size:
        return False
    if remote.sha256:
        return is_published(file, present)
    _require_bytes(plan.directory, [file])
    return remote.id == _digest(plan.directory, file, remote.digest())


def _is_card(plan: PushPlan, present: Mapping[str, Remote]) -> bool:
    return CARD_NAME in present and present[CARD_NAME].is_of(plan.card)


def _compared(
    plan: PushPlan, present: Mapping[str, Remote], sent: Mapping[str, int], *, kept_card: bool
) -> Pushed:
    verdicts = []
    for file in plan.files:
        remote = present.get(file.name)
        verdict = "missing" if remote is None else "ok" if _is_there(plan, file, present) else "differs"
        found = None if remote is None else remote.id
        verdicts.append(FileVerdict(file.name, verdict, file.sha256, found))
    if not kept_card:
        verdict = "ok" if _is_card(plan, present) else "differs" if CARD_NAME in present else "missing"
        verdicts.append(FileVerdict(CARD_NAME, verdict, hashlib.sha256(plan.card).hexdigest(), None))
    known = {file.name for file in plan.files} | {CARD_NAME, ".gitattributes"}
    return Pushed(
        tuple(verdicts), tuple(sorted(present.keys() - known)), len(sent), sum(sent.values()), kept_card
    )
