"""A checkpoint on the Hub as a Checkpoint: headers by range requests, as of one commit.  Knows no outputs and no torch.

Data is read in one of two ways.  Shards of which most is needed are brought to a shelf on this disk, whole, and their
bytes are compared with the ids that the Hub publishes; what is read without a shelf comes by ranges, and is not proven.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from . import contained, formats, hub, shard, source, temporaries
from .errors import HubFailed, UnsafePath, Usage, printable
from .formats import CONFIG_NAME, INDEX_NAME, SIDECAR_NAME
from .hub import Remote, Repo
from .hub_fetch import Bringer
from .shelf import Shelf
from .sink import io_errors
from .source import Checkpoint, Landing, Place, Reader, Shard, SmallFile, Stamp
from .stop import StopFlag

_NUM_ASKING = 16  # requests for headers at a time
_FIRST_BYTES = 256 * 1024  # of a shard: most headers of a release are shorter
_GIT_ATTRIBUTES = ".gitattributes"  # the Hub's own: no download has to have it
_UNPRINTABLE = "an unprintable name"
_CHUNK = 4 * 1024 * 1024
_LOOK_SECONDS = 0.2  # how often somebody who waits looks whether the work is to stop
_GIT_FILES = (
    "the Hub's files of this commit are not what it says: give the same command again, or name a commit"
)


def open_checkpoint(name: str, *, follow_links: bool = False) -> Checkpoint:
    """Whatever a SRC may name: a directory, a safetensors file, or hf://owner/name[@revision].

    raises  as source.open_checkpoint; Usage, HubFailed
    """
    if name.startswith(hub.PREFIX):
        return open_hub(name)
    return source.open_checkpoint(name, follow_links=follow_links)


def put_on_shelf(
    checkpoint: HubCheckpoint, path: str, limit: int, stop: StopFlag, on_bytes: Callable[[int], None]
) -> None:
    """From now on shards that are read as a whole are brought to a directory, so many bytes at a time.

    limit     at least that of the shards that will be read together
    on_bytes  told of bytes as they arrive, from any thread
    """
    sizes = {name: checkpoint.files[name].size for name in checkpoint.shards}
    bring = Bringer(checkpoint.repo, checkpoint.files, stop, on_bytes)
    checkpoint.shelf = Shelf(path, sizes, limit, bring, stop.check)
    checkpoint.repo.pause = functools.partial(pause, stop)


def too_small(least: int, limit: int) -> Usage:
    """What to raise if the shards that are needed at one time do not fit."""
    return Usage(
        "--scratch-limit is too small: shards that are needed at one time do not fit",
        expected=f"at least {least:,} bytes",
        found=f"{limit:,} bytes",
        do="allow more, or make smaller shards: --max-shard-size",
    )


def pause(stop: StopFlag, seconds: float) -> None:
    """Wait, but not longer than the work goes on."""
    never = threading.Event()
    while seconds > 0:
        stop.check()
        never.wait(min(seconds, _LOOK_SECONDS))
        seconds -= _LOOK_SECONDS


class HubCheckpoint(Checkpoint):
    """Headers, index and config of one commit of a repository, and small files where they are asked for."""

    def __init__(self, repo: Repo, files: dict[str, Remote], config: bytes | None) -> None:
        super().__init__(f"{hub.PREFIX}{repo.name}@{repo.revision}", False, config)
        self.repo, self.files = repo, files
        self.shelf: Shelf | None = None  # set: where shards are brought to
        self._headers: dict[str, bytes] = {}

    @property
    def origin(self) -> dict[str, str]:
        return {"repository": self.repo.name, "commit": self.repo.revision}

    def names(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.files})

    def size_of(self, name: str) -> int | None:
        found = self.files.get(name)
        return None if found is None else found.size

    def published_sha256(self, name: str) -> str | None:
        return self.files[name].sha256

    def read_small(self, name: str) -> bytes:
        """Proven by the id that the Hub publishes. raises HubFailed"""
        remote = self.files[name]
        data = self.repo.read(name, 0, remote.size)
        if not remote.is_of(data):
            raise _not_its_id(name)
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        """The last one is followed by HubFailed if they are not what the id says."""
        remote = self.files[name]
        digest = remote.digest()
        for offset in range(0, remote.size, _CHUNK):
            piece = self.repo.read(name, offset, min(offset + _CHUNK, remote.size))
            digest.update(piece)
            yield piece
        if digest.hexdigest() != remote.id:
            raise _not_its_id(name)

    def small_files(self) -> list[SmallFile]:
        found = {}
        for name, remote in self.files.items():
            if source.is_of_the_format(name) or name == _GIT_ATTRIBUTES:
                continue
            item = _left(name) or source.small_file(name, remote.size)
            found[item.name] = item
        return sorted(found.values())

    @functools.cached_property
    def small_directory(self) -> str:
        """A copy of config, tokenizer and the like, until the process ends."""
        with io_errors("."):
            directory = temporaries.new_directory()
        names = [item.name for item in self.small_files() if item.left is None]
        for name in [CONFIG_NAME, *names] if CONFIG_NAME in self.files else names:
            self._keep(directory, name, self.read_small(name))
        return directory

    @functools.cached_property
    def sidecar_path(self) -> str | None:
        """A copy of the round-trip sidecar, until the process ends; None: there is none. raises HubFailed"""
        if SIDECAR_NAME not in self.files:
            return None
        with io_errors("."):
            path = os.path.join(temporaries.new_directory(), SIDECAR_NAME)
        Bringer(self.repo, self.files, StopFlag(), lambda count: None)(SIDECAR_NAME, path, path + ".marks")
        return path

    def _keep(self, directory: str, name: str, data: bytes) -> None:
        path = os.path.join(directory, name)
        with io_errors(name):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as file:
                file.write(data)

    def header_bytes(self, name: str) -> bytes:
        return self._headers[name]

    def keep_header(self, name: str, data: bytes) -> Shard:
        """Take the header of a shard, with its length field. raises BadHeader"""
        self._headers[name] = data
        size = self.files[name].size
        return Shard(name, shard.parse_header(data, size, name), Stamp(size, 0, 0))

    def stamps_sha256(self) -> str:
        """The ids of its shards, whichever commit has them."""
        known = [(name, *self.files[name]) for name in self.shards]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def proof(self, name: str) -> dict[str, str]:
        remote = self.files[name]
        return {"sha256": remote.sha256} if remote.sha256 else {"git_blob": remote.git_blob}

    def expect(self, uses: Mapping[str, int]) -> None:
        if self.shelf:
            self.shelf.expect(uses)

    def scratch_bytes(self, shards: Iterable[str]) -> int:
        return self.shelf.bytes_to_come(shards) if self.shelf else 0

    def place(self, shard: str) -> Place:
        assert self.shelf is not None
        path = os.path.join(self.shelf.path, self.shelf.file_of(shard))
        with io_errors(shard):
            return Place(self.shelf.path, self.shelf.file_of(shard), source.stamp(os.stat(path)))

    @contextlib.contextmanager
    def reader(self, whole: Collection[str] = ()) -> Iterator[Reader]:
        if not whole or self.shelf is None:
            yield _RangeReader(self, frozenset())
            return
        with self.shelf.holding(whole):
            self._require_headers(whole)
            reader = _RangeReader(self, frozenset(whole))
            try:
                yield reader
                reader.check_unchanged()
            finally:
                reader.close()

    def _require_headers(self, names: Iterable[str]) -> None:
        """The plan was made by headers that nothing had proven. raises HubFailed"""
        for name in names:
            place, known = self.place(name), self._headers[name]
            with contained.opened(place.directory, place.name, follow_links=False) as fd:
                if shard.read_exactly(fd, len(known), 0, name) != known:
                    raise HubFailed("a header came as something else than it is", file=name, do=_GIT_FILES)

    def sample_sha256(self, name: str) -> str:
        """Over its ids: no byte of it need be read."""
        return hashlib.sha256(repr(self.proof(name)).encode()).hexdigest()


def _not_its_id(name: str) -> HubFailed:
    return HubFailed("a file is not what the Hub's id of it says", file=name, do=_GIT_FILES)


def _left(name: str) -> SmallFile | None:
    """What is left behind of the way to a file, the outermost first: a directory that is not looked into, or itself."""
    parts = name.split("/")
    for count in range(1, len(parts) + 1):
        path = "/".join(parts[:count])
        if not parts[count - 1].isprintable():
            return SmallFile("/".join([*parts[: count - 1], printable(parts[count - 1])]), 0, _UNPRINTABLE)
        left = source.why_left(path) if count == len(parts) else source.why_directory_left(path)
        if left:
            return SmallFile(path if count == len(parts) else path + "/", 0, left)
    return None


def _require_plain(names: Iterable[str]) -> None:
    """git keeps no other names; a server might say some all the same. raises UnsafePath"""
    for name in names:
        if {"", ".", ".."} & {*name.split("/")} or "\0" in name:
            raise UnsafePath(
                "the repository lists something that is no plain relative file name",
                found=repr(name)[:200],
                do="do not use this repository",
            )


def listed(address: str) -> tuple[Repo, dict[str, Remote]]:
    """A repository at the commit that its revision names now, and its files. raises Usage, HubFailed, UnsafePath"""
    name, revision = hub.parse_address(address)
    repo = Repo(name, revision)
    repo.pin()
    files = repo.files()
    _require_plain(files)
    return repo, files


def open_hub(address: str) -> HubCheckpoint:
    """Read index, headers and config of a repository, at the commit that its revision names now.

    address  hf://owner/name[@revision]
    raises   Usage, HubFailed, MissingFile, UnsafePath, BadIndex, BadHeader, BadConfig
    """
    repo, files = listed(address)
    checkpoint = HubCheckpoint(repo, files, None)
    checkpoint.config_bytes = _read_optional(checkpoint, CONFIG_NAME, formats.MAX_CONFIG_BYTES)
    index = _read_optional(checkpoint, INDEX_NAME, formats.MAX_INDEX_BYTES)

    def headers_of(wanted: Sequence[str]) -> Iterator[Shard]:
        with concurrent.futures.ThreadPoolExecutor(_NUM_ASKING) as pool:
            for first, count in formats.spans(
                len(wanted), _NUM_ASKING
            ):  # a header may be 100 MB: not all at once
                names = wanted[first : first + count]
                found = pool.map(lambda name: _header(checkpoint, name), names)
                for name, data in zip(names, found, strict=True):
                    yield checkpoint.keep_header(name, data)

    source.put_together(checkpoint, checkpoint.names(), index, headers_of)
    return checkpoint


def _read_optional(checkpoint: HubCheckpoint, name: str, most: int) -> bytes | None:
    size = checkpoint.size_of(name)
    if size is None:
        return None
    source.require_modest(name, size, most)
    return checkpoint.read_small(name)


def _header(checkpoint: HubCheckpoint, name: str) -> bytes:
    """The header of a shard with its length field. raises UnsafePath, BadHeader, HubFailed"""
    size = checkpoint.size_of(name)
    if size is None:
        raise UnsafePath("this is no regular file", file=name, do="remove it from the checkpoint")
    data = checkpoint.repo.read(name, 0, min(size, _FIRST_BYTES))
    end = shard.header_end(data, size, name)
    return data[:end] if end <= len(data) else data + checkpoint.repo.read(name, len(data), end)


# ---- reading without a shelf


class _Window(NamedTuple):
    """Bytes of a shard, from `begin` on."""

    shard: str
    begin: int
    data: bytes


class _RangeReader(Reader):
    """Reads from held shards on the shelf, and ranges of all others. For one thread."""

    NUM_WINDOWS, LEAST, MOST = 4, 64 * 1024, 16 * 1024 * 1024  # bytes that are asked for

    def __init__(self, checkpoint: HubCheckpoint, held: frozenset[str]) -> None:
        super().__init__(checkpoint)
        self._hub, self._held = checkpoint, held
        self._windows: list[_Window] = []  # the longest unused first

    def read(self, name: str, offset: int, size: int, landing: Landing) -> memoryview:
        if self.shard_of(name) in self._held:
            return super().read(name, offset, size, landing)
        view = landing.take(size)[:size]
        self.read_into(name, view, offset)
        return view

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        place = self._hub.tensors[name]
        if place.shard in self._held:
            super().read_into(name, view, offset)
            return
        assert offset + len(view) <= place.entry.end - place.entry.begin
        done = 0
        while done < len(view):
            window, at = self._window(place.shard, place.entry.begin + offset + done, len(view) - done)
            piece = window.data[at : at + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)

    def will_need(self, name: str, offset: int, size: int) -> None:
        if self.shard_of(name) in self._held:
            super().will_need(name, offset, size)

    def _window(self, file: str, position: int, size: int) -> tuple[_Window, int]:
        """A window with the byte at `position`, and where in it that is. What is read on is asked for further ahead."""
        ahead = self.LEAST
        for window in self._windows:
            at = position - window.begin
            if window.shard != file or at < 0:
                continue
            if at < len(window.data):
                self._windows.remove(window)
                self._windows.append(window)
                return window, at
            if at - len(window.data) <= len(window.data) // 2:  # it goes on nearly where this one ended
                ahead = max(ahead, min(2 * len(window.data), self.MOST))
        end = min(position + max(min(size, self.MOST), ahead), self._hub.files[file].size)
        made = _Window(file, position, self._hub.repo.read(file, position, end))
        self._windows = [*self._windows[-self.NUM_WINDOWS + 1 :], made]
        return made, 0
