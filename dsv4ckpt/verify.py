"""Compares a checkpoint with its inventory and its manifest, and the files of two checkpoints.

Two levels: `structure` reads headers, `bytes` hashes what the manifest lists.  Comparing two checkpoints value by value
is compare.py; comparing one with ids from the Hub is oids.py.  Shares no code with what writes (run, codec, outdir), so
that no mistake there can hide.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeVar

from . import contained, probe, shard
from .errors import MissingFile, Usage
from .formats import CARD_NAME, CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, WORK_NAME
from .manifest import Listed, Manifest, manifest_of, read_manifest
from .source import Checkpoint, Landing
from .stop import StopFlag
from .survey import survey

_HASH_BYTES = 4 * 1024 * 1024
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Started:
    """The work that lies ahead. Scales are not counted."""

    total_bytes: int


@dataclass(frozen=True)
class Read:
    """More bytes were read and compared."""

    num_bytes: int


Event = Started | Read
OnEvent = Callable[[Event], None]
Subset = tuple[int, int]  # (n, t): the n-th of t parts, n from 1 on


def ignore(_: Event) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """Told of every chunk that was read."""

    on_event: OnEvent
    stop: StopFlag | None

    def read(self, num_bytes: int) -> None:
        if self.stop:
            self.stop.check()
        self.on_event(Read(num_bytes))


# ---- structure


class Problem(NamedTuple):
    """Something that a finished, complete checkpoint does not have."""

    what: str
    file: str | None = None
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class StructureReport:
    """What headers, index and manifest tell."""

    release: str
    storage: str
    namespace: str
    num_shards: int
    num_tensors: int
    has_manifest: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]  # worth knowing, no failure

    @property
    def ok(self) -> bool:
        return not self.problems

    def document(self) -> dict[str, Any]:
        problems = [without_none(problem._asdict()) for problem in self.problems]
        return {
            "level": "structure",
            "ok": self.ok,
            **self.__dict__,
            "problems": problems,
            "notes": [*self.notes],
        }


def verify_structure(checkpoint: Checkpoint, *, unit_scales: frozenset[str] = frozenset()) -> StructureReport:
    """Compare headers with index, inventory and manifest; no tensor is read.

    raises  MissingFile, BadConfig, UnknownRelease if nothing says what to expect; BadManifest, UnsafePath
    """
    found = survey(checkpoint, unit_scales=unit_scales)
    problems = [
        Problem(error.what, *(error.facts.get(key) for key in Problem._fields[1:]))
        for error in checkpoint.problems
    ]
    problems += [Problem(item.sentence(), item.file, item.expected, item.found) for item in found.deviations]
    notes = []
    if checkpoint.index_total not in (None, checkpoint.total_size):
        notes.append(
            f"the index says {checkpoint.index_total:,} bytes of tensors, there are {checkpoint.total_size:,}"
        )
    manifest = manifest_of(checkpoint)
    if manifest is not None:
        problems += _compare_with_manifest(checkpoint, manifest)
        listed = {file.name for file in manifest.files} | {CARD_NAME}
        others = [item.name for item in checkpoint.small_files() if not item.left and item.name not in listed]
        notes += [f"the manifest does not list {name!r}" for name in others]
    elif WORK_NAME in checkpoint.names():
        problems.append(Problem("a conversion into this directory did not finish", file=WORK_NAME))
    identity = found.identity
    return StructureReport(
        release=identity.release.name,
        storage=identity.storage.value,
        namespace=identity.namespace.value,
        num_shards=len(checkpoint.shards),
        num_tensors=len(checkpoint.tensors),
        has_manifest=manifest is not None,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _compare_with_manifest(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Problem]:
    listed = {file.name: file for file in manifest.files}
    for name, file in listed.items():
        if name == CARD_NAME:
            continue
        size = checkpoint.size_of(name)
        if size is None:
            yield Problem("a file that the manifest lists is missing", name, f"{file.size:,} bytes")
        elif size != file.size:
            what = "a file has not the size that the manifest says"
            yield Problem(what, name, f"{file.size:,} bytes", f"{size:,} bytes")
    present = [name for name in checkpoint.names() if name.endswith(".safetensors")]
    needed = [CONFIG_NAME, *([INDEX_NAME] if checkpoint.has_index else [])]
    for name in sorted({*present, *checkpoint.shards, *needed} - listed.keys()):
        yield Problem("the manifest does not list this file", name)


# ---- bytes

OTHER_CARD = "another card"


class FileVerdict(NamedTuple):
    """What became of a listed file: ok, differs, missing; `another card`: README.md is a new one, which it may be."""

    name: str
    verdict: str
    expected: str
    found: str | None


@dataclass(frozen=True)
class BytesReport:
    """Every checked file, in the manifest's order."""

    files: tuple[FileVerdict, ...]
    num_listed: int
    num_bytes: int  # that the checked files should have

    @property
    def ok(self) -> bool:
        return all(file.verdict in ("ok", OTHER_CARD) for file in self.files)

    def document(self) -> dict[str, Any]:
        files = [without_none(file._asdict()) for file in self.files]
        return {"level": "bytes", "ok": self.ok, **self.__dict__, "files": files}


def verify_bytes(
    directory: str,
    *,
    subset: Subset | None = None,
    follow_links: bool = False,
    num_workers: int = 2,
    on_event: OnEvent = ignore,
    stop: StopFlag | None = None,
) -> BytesReport:
    """Compare the SHA-256 of every listed file, or of every t-th one, with the manifest.

    on_event  called from worker threads
    raises    MissingFile without a manifest, BadManifest, UnsafePath, Usage, Environment, what `stop` raises
    """
    manifest = read_manifest(directory, follow_links=follow_links)
    if manifest is None:
        raise _unverifiable(directory)
    chosen = part_of(manifest.files, subset)
    num_bytes = sum(file.size for file in chosen)
    on_event(Started(num_bytes))
    watch = Watch(on_event, stop)
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        verdicts = pool.map(lambda file: _verdict_of_file(directory, file, follow_links, watch), chosen)
        return BytesReport(tuple(verdicts), len(manifest.files), num_bytes)


def verify_published(checkpoint: Checkpoint, *, subset: Subset | None = None) -> BytesReport:
    """The same of a checkpoint on the Hub, by the ids that it publishes: small files alone are read.

    raises  MissingFile without a manifest, BadManifest, UnsafePath, HubFailed
    """
    manifest = manifest_of(checkpoint)
    if manifest is None:
        raise _without_manifest()
    chosen, verdicts = part_of(manifest.files, subset), []
    for file in chosen:
        size = checkpoint.size_of(file.name)
        found = _sha256(checkpoint, file.name, Watch(ignore, None)) if size == file.size else None
        verdicts.append(_verdict(file, size, found))
    return BytesReport(tuple(verdicts), len(manifest.files), sum(file.size for file in chosen))


def _sha256(checkpoint: Checkpoint, name: str, watch: Watch) -> str:
    """As the Hub publishes it, or of the bytes."""
    published = checkpoint.published_sha256(name)
    if published:
        return published
    digest = hashlib.sha256()
    for piece in checkpoint.chunks(name):
        digest.update(piece)
        watch.read(len(piece))
    return digest.hexdigest()


def _unverifiable(directory: str) -> MissingFile:
    if probe.is_there(os.path.join(directory, WORK_NAME)):
        what, do = (
            "a conversion into this directory did not finish",
            "give the same command again: it continues",
        )
        return MissingFile(what, expected=MANIFEST_NAME, do=do)
    return _without_manifest()


def _without_manifest() -> MissingFile:
    return MissingFile(
        "there is no manifest in it",
        expected=MANIFEST_NAME,
        do="compare it with its source instead: --level values",
    )


def _verdict_of_file(directory: str, file: Listed, follow_links: bool, watch: Watch) -> FileVerdict:
    size = contained.size_of(directory, file.name, follow_links)
    if size != file.size:
        watch.read(file.size)
        return _verdict(file, size, None)
    return _verdict(file, size, hash_file(hashlib.sha256(), directory, file.name, size, follow_links, watch))


def _verdict(file: Listed, size: int | None, sha256: str | None) -> FileVerdict:
    """sha256: of the bytes; None: the size tells enough"""
    if sha256 == file.sha256:
        return FileVerdict(file.name, "ok", file.sha256, sha256)
    verdict = OTHER_CARD if file.name == CARD_NAME else "missing" if size is None else "differs"
    if sha256 is None:
        return FileVerdict(
            file.name, verdict, f"{file.size:,} bytes", None if size is None else f"{size:,} bytes"
        )
    return FileVerdict(file.name, verdict, file.sha256, sha256)


# ---- files of two checkpoints


class FileState(StrEnum):
    """What became of a file of one or two checkpoints. Only DIFFERS is a failure: tensors are judged on their own."""

    IDENTICAL = "identical"
    DIFFERS = "differs"
    OTHER_LAYOUT = "other layout"  # a shard with another header; the index where a shard is not the same
    ONLY_A = "only in A"
    ONLY_B = "only in B"


class FilePair(NamedTuple):
    """Files of one name. kind: shard, config, index or small."""

    name: str
    kind: str
    state: FileState


@dataclass(frozen=True)
class FilesReport:
    """Every file of two checkpoints that a conversion carries or makes, but manifest and sidecar."""

    pairs: tuple[FilePair, ...]

    @property
    def ok(self) -> bool:
        return not any(pair.state is FileState.DIFFERS for pair in self.pairs)

    def document(self) -> dict[str, Any]:
        counts: dict[str, dict[str, int]] = {}
        for pair in self.pairs:
            states = counts.setdefault(pair.kind, {})
            states[pair.state.value] = states.get(pair.state.value, 0) + 1
        others = [pair._asdict() for pair in self.pairs if pair.state is not FileState.IDENTICAL]
        return {"ok": self.ok, "counts": counts, "not_identical": others}


def compare_files(
    a: Checkpoint, b: Checkpoint, proven: Mapping[str, int], *, stop: StopFlag | None = None
) -> FilesReport:
    """Tell which files of two checkpoints hold the same bytes.

    proven  how many bytes of each stored tensor of a are known to be the same in b: compare.ValuesReport. Shards with
            equal headers that these cover are not read again.
    raises  UnsafePath, SourceChanged, Environment, and what `stop` raises
    """
    watch = Watch(ignore, stop)
    shards = [
        FilePair(name, "shard", _state_of_shard(a, b, name, proven, watch))
        for name in sorted({*a.shards, *b.shards})
    ]
    same_layout = all(pair.state in (FileState.IDENTICAL, FileState.DIFFERS) for pair in shards)
    pairs = [*shards, FilePair(CONFIG_NAME, "config", _state(a, b, CONFIG_NAME, watch))]
    if a.has_index or b.has_index:
        state = _state(a, b, INDEX_NAME, watch)
        excused = state is FileState.DIFFERS and not same_layout
        pairs.append(FilePair(INDEX_NAME, "index", FileState.OTHER_LAYOUT if excused else state))
    carried = {item.name for side in (a, b) for item in side.small_files() if not item.left}
    pairs += [FilePair(name, "small", _state(a, b, name, watch)) for name in sorted(carried)]
    return FilesReport(tuple(pairs))


def _state_of_shard(
    a: Checkpoint, b: Checkpoint, name: str, proven: Mapping[str, int], watch: Watch
) -> FileState:
    if name not in a.shards or name not in b.shards:
        return FileState.ONLY_B if name in b.shards else FileState.ONLY_A
    header = a.shards[name].header
    if header.sha256 != b.shards[name].header.sha256:
        return FileState.OTHER_LAYOUT
    # a file is its header and its tensors' bytes, without holes; a tensor that stands in two shards was read in one
    covered = all(
        a.tensors[tensor].shard == b.tensors[tensor].shard == name
        and proven.get(tensor, 0) == entry.end - entry.begin
        for tensor, entry in header.entries.items()
    )
    return FileState.IDENTICAL if covered else _state(a, b, name, watch)


def _state(a: Checkpoint, b: Checkpoint, name: str, watch: Watch) -> FileState:
    """Read the same file of both, as far as they are equal."""
    sizes = [side.size_of(name) for side in (a, b)]
    if None in sizes:
        return FileState.ONLY_B if sizes[0] is None else FileState.ONLY_A
    if sizes[0] != sizes[1]:
        return FileState.DIFFERS
    if a.published_sha256(name) or b.published_sha256(name):
        same = _sha256(a, name, watch) == _sha256(b, name, watch)
        return FileState.IDENTICAL if same else FileState.DIFFERS
    for piece_a, piece_b in zip(a.chunks(name), b.chunks(name), strict=True):
        if piece_a != piece_b:
            return FileState.DIFFERS
        watch.read(2 * len(piece_a))
    return FileState.IDENTICAL


# ---- shared with compare.py and oids.py


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def hash_file(digest: Digest, directory: str, name: str, size: int, follow_links: bool, watch: Watch) -> str:
    """Feed the first `size` bytes of a file to a hash. raises UnsafePath, SourceChanged, Environment

    Read past the page cache where the file system allows it: filling it costs as much as hashing.
    """
    memory = Landing().take(_HASH_BYTES)
    with (
        contained.opened(directory, name, follow_links) as fd,
        contained.opened_direct(directory, name, follow_links) as direct_fd,
    ):
        for offset in range(0, size, _HASH_BYTES):
            view = memory[: size - offset]
            done = shard.read_direct(direct_fd, memory, offset)
            shard.read_into(fd, view[done:], offset + done, name)
            digest.update(view)
            watch.read(len(view))
    return digest.hexdigest()


def part_of(items: Sequence[_Item], subset: Subset | None) -> list[_Item]:
    """Every t-th item. raises Usage"""
    number, count = subset or (1, 1)
    if not 1 <= number <= count:
        raise Usage("there is no such part", expected="n/t with n from 1 to t", found=f"{number}/{count}")
    return [item for index, item in enumerate(items) if index % count == number - 1]


def without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
