"""ONE checkpoint, read-only: index, containment, name -> bytes.  Knows no outputs and no targets.

Whatever the files say, nothing outside the checkpoint is opened: index entries are plain file names, links must stay
inside the directory or inside the Hub cache that it belongs to, and only regular files are read.
Rules I1-I6 are numbered where they are enforced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from . import config as configs
from . import formats, probe, shard, strictjson
from .contained import io_errors, open_direct, open_regular, opened, size_of
from .errors import (
    LEAVE_SOURCE_ALONE,
    BadConfig,
    BadIndex,
    Environment,
    MissingFile,
    SourceChanged,
    UnsafePath,
    printable,
)
from .formats import CONFIG_NAME, DCP_METADATA_NAME, INDEX_NAME, OUR_NAMES, SIDECAR_NAME
from .release import Seen
from .shard import Entry, Header

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_MAX_DEPTH, _MAX_PROBLEMS = 8, 1000
_INDEX_LIMITS = strictjson.Limits(objects=1000, lists=1000, commas=formats.MAX_TENSORS + 1000)
_PAGE = 4096  # direct reads begin and end at multiples of it, in the file and in memory
_PIECE = 4 * 1024 * 1024
_DIRECT_BYTES = 256 * 1024  # smaller reads gain nothing
_ONE_REVISION = "download the index and all shards of one revision again"
PROOFS = ("sample_sha256", "sha256", "git_blob")  # what a proof may be called
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1024  # of a shard, to tell revisions with equal headers apart
_CODE_DIRECTORIES = ("encoding", "inference")
_CARRIED_SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".pdf", ".yaml", ".yml")
_CARRIED_NAMES = re.compile(r"(LICENSE|NOTICE|COPYING|README)[A-Za-z0-9._-]*")


class Stamp(NamedTuple):
    """What tells that a file is still the same one."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint."""

    name: str
    header: Header
    stamp: Stamp


class Place(NamedTuple):
    """A file of this machine that holds a shard."""

    directory: str
    name: str
    stamp: Stamp


class Location(NamedTuple):
    """Where a stored tensor stands."""

    shard: str
    entry: Entry


class SmallFile(NamedTuple):
    """Something beside the shards. `left` says why it is not carried to outputs; None: it is."""

    name: str
    size: int
    left: str | None


@dataclass
class Checkpoint:
    """A checkpoint's headers and index, checked; bytes are read through `reader`."""

    directory: str
    follow_links: bool
    config_bytes: bytes | None
    index_total: int | None = None
    has_index: bool = False
    shards: dict[str, Shard] = field(default_factory=dict)
    tensors: dict[str, Location] = field(default_factory=dict)
    problems: list[BadIndex] = field(
        default_factory=list
    )  # index and headers disagree: fatal for every reader

    @property
    def seen(self) -> dict[str, Seen]:
        """dtype and shape of every stored tensor."""
        return {name: Seen(place.entry.dtype, place.entry.shape) for name, place in self.tensors.items()}

    @functools.cached_property
    def total_size(self) -> int:
        """Bytes of tensor data, as the index should say."""
        return sum(place.entry.end - place.entry.begin for place in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """The object in config.json. raises MissingFile, BadConfig"""
        if self.config_bytes is None:
            raise MissingFile(
                "there is no config.json beside the tensors",
                expected=CONFIG_NAME,
                do="name the checkpoint's directory, with its config.json in it",
            )
        return configs.parse(self.config_bytes)

    @property
    def is_safetensors(self) -> bool:
        """Whether its shards are safetensors files, as those of a release are."""
        return True

    def place(self, shard: str) -> Place:
        """Where a shard lies, and what it must be there."""
        return Place(self.directory, shard, self.shards[shard].stamp)

    @property
    def small_directory(self) -> str:
        """A directory of this machine with config.json, tokenizer and what else is small."""
        return self.directory

    @property
    def has_sidecar(self) -> bool:
        """Whether the conversion that made it left a round-trip sidecar in it."""
        return self.size_of(SIDECAR_NAME) is not None

    @property
    def sidecar_path(self) -> str | None:
        """Where that sidecar can be read; None: it left none."""
        return os.path.join(self.directory, SIDECAR_NAME) if self.has_sidecar else None

    @property
    def origin(self) -> dict[str, str]:
        """What a manifest says of where it came from, beside its files: nothing that names a machine."""
        return {}

    def expect(self, uses: Mapping[str, int]) -> None:
        """Be told how often each shard will be read as a whole from now on."""

    def scratch_bytes(self, shards: Iterable[str]) -> int:  # noqa: ARG002 - they are here
        """Room that reading these shards takes on this machine's disk."""
        return 0

    def require_sound(self) -> None:
        """raises BadIndex for the first disagreement between index and headers"""
        if self.problems:
            raise self.problems[0]

    def read_small(self, name: str) -> bytes:
        """The bytes of a small file. raises UnsafePath, Environment, SourceChanged"""
        with opened(self.directory, name, self.follow_links) as fd:
            return shard.read_exactly(fd, os.fstat(fd).st_size, 0, name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file of any size, a few megabytes at a time. raises UnsafePath, Environment, SourceChanged"""
        with opened(self.directory, name, self.follow_links) as fd:
            size = os.fstat(fd).st_size
            for offset in range(0, size, _PIECE):
                yield shard.read_exactly(fd, min(_PIECE, size - offset), offset, name)

    def size_of(self, name: str) -> int | None:
        """Size of a file; None if it is not there. raises UnsafePath, Environment"""
        return size_of(self.directory, name, self.follow_links)

    def published_sha256(self, name: str) -> str | None:  # noqa: ARG002
        """Of a file's bytes, where somebody publishes it; None: nobody, or only another kind of id."""
        return None

    def names(self) -> list[str]:
        """What lies at the top of it, sorted. raises Environment"""
        with io_errors("."):
            return sorted(os.listdir(self.directory))

    def header_bytes(self, name: str) -> bytes:
        """The header of a shard as it stands, its length field included. raises SourceChanged, Environment"""
        with opened(self.directory, name, self.follow_links) as fd:
            return shard.read_exactly(fd, self.shards[name].header.data_start, 0, name)

    def small_files(self) -> list[SmallFile]:
        """Everything beside the shards, sorted by name, each with the reason if it is left behind."""
        found = list(_list_small(self.directory, "", self.follow_links))
        return sorted(found)

    def stamps_sha256(self) -> str:
        """Sizes and modification times: the same files as before, as far as that can be told without reading them."""
        known = [(item.name, item.stamp.size, item.stamp.mtime_ns) for item in self.shards.values()]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def sample_sha256(self, name: str) -> str:
        """SHA-256 over evenly spread pieces of one shard's data.

        Two revisions of a release have equal headers: this tells them apart at the cost of a few reads. Equal samples
        are evidence, not proof.  raises SourceChanged, UnsafePath, Environment
        """
        item, place = self.shards[name], self.place(name)
        begin, size = item.header.data_start, item.stamp.size - item.header.data_start
        digest = hashlib.sha256()
        with opened(place.directory, place.name, self.follow_links) as fd:
            _require_same(name, place, os.fstat(fd))
            for number in range(_NUM_SAMPLES):
                offset = max(0, size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1)
                piece = min(_SAMPLE_BYTES, size)
                digest.update(shard.read_exactly(fd, piece, begin + offset, name))
        return digest.hexdigest()

    def proof(self, name: str) -> dict[str, str]:
        """What a manifest says of a shard's data, to tell it from others with the same header."""
        return {"sample_sha256": self.sample_sha256(name)}

    @contextlib.contextmanager
    def reader(self, whole: Collection[str] = ()) -> Iterator[Reader]:  # noqa: ARG002 - all is here
        """Positioned reads from the shards; files are opened at first use and closed together.

        whole   shards of which most will be read: what lies elsewhere is brought here first, and its bytes are proven
        """
        reader = Reader(self)
        try:
            yield reader
            reader.check_unchanged()
        finally:
            reader.close()


class Landing:
    """Page-aligned memory for one read at a time; it is used again, since fresh pages cost more than reading."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PAGE)

    def take(self, size: int) -> memoryview:
        """At least `size` bytes; what an earlier take returned must no longer be in use."""
        if len(self._memory) < size:
            self._memory = mmap.mmap(-1, -(-size // _PAGE) * _PAGE)
        return memoryview(self._memory)


class Reader:
    """Reads ranges of shards into the caller's buffers. For one thread.

    Large reads go past the page cache where the file system allows it: filling the cache costs a core about a second
    for each gigabyte, and evicts what other people use.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._fds: dict[str, int] = {}
        self._direct_fds: dict[str, int | None] = {}  # None: the file system cannot

    def read(self, name: str, offset: int, size: int, landing: Landing) -> memoryview:
        """`size` bytes of tensor `name` from `offset` within it, in `landing`. raises SourceChanged, Environment"""
        place = self._checkpoint.tensors[name]
        assert offset + size <= place.entry.end - place.entry.begin
        with _errors_of(name, place.shard):
            fd = self._direct_fd(place.shard) if size >= _DIRECT_BYTES else None
            if fd is None:
                view = landing.take(size)[:size]
                shard.read_into(self._fd(place.shard), view, place.entry.begin + offset, place.shard)
                return view
            begin = place.entry.begin + offset
            into = begin % _PAGE
            room = landing.take(-(-(into + size) // _PAGE) * _PAGE)
            got = shard.read_direct(fd, room[: -(-(into + size) // _PAGE) * _PAGE], begin - into)
            view = room[into : into + size]
            done = max(0, min(size, got - into))
            if done < size:  # rare: the rest by ordinary reads, which know the end of the file
                shard.read_into(self._fd(place.shard), view[done:], begin + done, place.shard)
            return view

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view` with bytes of tensor `name` from `offset` within it. raises SourceChanged, Environment"""
        place = self._checkpoint.tensors[name]
        assert offset + len(view) <= place.entry.end - place.entry.begin
        self._fill(name, place.shard, view, place.entry.begin + offset)

    def _fill(self, name: str, file: str, view: memoryview, position: int) -> None:
        """Read a file from `position` on, for tensor `name`."""
        with _errors_of(name, file):
            shard.read_into(self._fd(file), view, position, file)

    def shard_of(self, name: str) -> str:
        """The file that holds tensor `name`."""
        return self._checkpoint.tensors[name].shard

    def will_need(self, name: str, offset: int, size: int) -> None:
        """Tell the kernel to start reading a range of tensor `name`, unless `read` goes past its cache."""
        place = self._checkpoint.tensors[name]
        with _errors_of(name, place.shard):
            if size >= _DIRECT_BYTES and self._direct_fd(place.shard) is not None:
                return
            if hasattr(os, "posix_fadvise"):
                begin = place.entry.begin + offset
                os.posix_fadvise(self._fd(place.shard), begin, size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """raises SourceChanged if a file that was read is no longer the planned one"""
        for name, fd in (*self._fds.items(), *self._direct_fds.items()):
            if fd is not None:
                with io_errors(name):
                    _require_same(name, self._checkpoint.place(name), os.fstat(fd))

    def close(self) -> None:
        for fd in (*self._fds.values(), *self._direct_fds.values()):
            if fd is not None:
                os.close(fd)
        self._fds.clear()
        self._direct_fds.clear()

    def _direct_fd(self, name: str) -> int | None:
        if name not in self._direct_fds:
            place = self._checkpoint.place(name)
            fd = open_direct(place.directory, place.name, self._checkpoint.follow_links)
            self._direct_fds[name] = fd
            if fd is not None:
                _require_same(name, place, os.fstat(fd))
        return self._direct_fds[name]

    def _fd(self, name: str) -> int:
        fd = self._fds.get(name)
        if fd is None:
            place = self._checkpoint.place(name)
            with io_errors(name):
                fd = open_regular(place.directory, place.name, self._checkpoint.follow_links)
            self._fds[name] = fd
            _require_same(name, place, os.fstat(fd))
        return fd


def is_dcp(path: str) -> bool:
    """Whether torch would take a directory for a DCP checkpoint."""
    return probe.is_there(os.path.join(path, DCP_METADATA_NAME))


def open_checkpoint(path: str, *, follow_links: bool = False) -> Checkpoint:
    """Read index, headers and config of a directory of this machine, or of a single safetensors file.

    raises  MissingFile, UnsafePath, BadIndex, BadHeader, Environment.  Disagreements between index and headers are
            kept in `problems`, so that they can be listed; call require_sound before relying on the tensors.
    """
    if probe.is_directory(path):
        return _open_directory(path, follow_links)
    if probe.leads_somewhere(path):
        if not path.endswith(".safetensors"):
            raise MissingFile(
                "this file is no safetensors file",
                expected="a checkpoint's directory, or a file that ends in .safetensors",
                found=repr(os.path.basename(path)),
                do="name the directory that holds the checkpoint",
            )
        directory, name = os.path.split(os.path.abspath(path))
        checkpoint = Checkpoint(directory, follow_links, None)
        _add_shard(checkpoint, _read_header(checkpoint, name))
        return checkpoint
    raise MissingFile("there is no such file or directory", found=repr(path), do="check the spelling of SRC")


def read_config(directory: str, follow_links: bool) -> bytes | None:
    """config.json; None if it is missing. raises UnsafePath, BadConfig, Environment"""
    return _read_optional(directory, CONFIG_NAME, formats.MAX_CONFIG_BYTES, follow_links)


def _open_directory(path: str, follow_links: bool) -> Checkpoint:
    checkpoint = Checkpoint(path, follow_links, read_config(path, follow_links))
    index = _read_optional(path, INDEX_NAME, formats.MAX_INDEX_BYTES, follow_links)
    put_together(
        checkpoint,
        checkpoint.names(),
        index,
        lambda wanted: (_read_header(checkpoint, name) for name in wanted),
    )
    return checkpoint


def put_together(
    checkpoint: Checkpoint,
    present: Sequence[str],
    index: bytes | None,
    headers_of: Callable[[Sequence[str]], Iterable[Shard]],
) -> None:
    """Fill a checkpoint with the shards that its index names, or with the only one.

    present     names at the top of it
    headers_of  the shards of these names, in this order
    raises      MissingFile, UnsafePath, BadIndex, and what headers_of raises
    """
    in_directory = [name for name in present if name.endswith(".safetensors")]
    if index is not None:
        checkpoint.has_index = True
        weight_map, checkpoint.index_total = _parse_index(index)
        wanted = sorted(set(weight_map.values()))
    else:
        if len(in_directory) > 1:  # I6
            raise BadIndex(
                f"{len(in_directory)} safetensors files and no index to say how they belong together",
                expected=INDEX_NAME,
                do="download model.safetensors.index.json beside them",
            )
        weight_map, wanted = {}, in_directory
    if not wanted:
        raise MissingFile(
            "no safetensors file here",
            expected=f"{INDEX_NAME} and its shards",
            found=f"{len(present)} other entries",
            do="name the directory that holds the checkpoint",
        )
    absent = sorted(set(wanted) - set(present))
    if absent:
        raise MissingFile(
            f"{len(absent)} of {len(wanted)} shards that the index names are not here",
            file=INDEX_NAME,
            expected=", ".join(absent[:3]) + (", ..." if len(absent) > 3 else ""),
            do="finish the download",
        )
    for item in headers_of(wanted):
        _add_shard(checkpoint, item)
    if checkpoint.has_index:
        _compare_with_index(checkpoint, weight_map, sorted(set(in_directory) - set(wanted)))


def _read_optional(directory: str, name: str, most: int, follow_links: bool) -> bytes | None:
    if not probe.is_there(os.path.join(directory, name)):
        return None
    with opened(directory, name, follow_links) as fd:
        size = os.fstat(fd).st_size
        require_modest(name, size, most)
        return shard.read_exactly(fd, size, 0, name)


def require_modest(name: str, size: int, most: int) -> None:
    """raises BadConfig, BadIndex"""
    if size > most:
        kind = BadConfig if name == CONFIG_NAME else BadIndex
        raise kind(
            f"{name} is too large",
            file=name,
            expected=f"at most {most:,} bytes",
            found=f"{size:,} bytes",
            do="take the one that was published with these shards",
        )


def _parse_index(data: bytes) -> tuple[dict[str, str], int | None]:
    def refuse(what: str, **facts: Any) -> NoReturn:
        raise BadIndex(what, file=INDEX_NAME, do="download the index again", **facts)

    try:
        strictjson.require_modest(data, _INDEX_LIMITS)
        document = strictjson.loads(data, floats=True)  # I1
    except strictjson.Malformed as error:
        refuse(f"the index is malformed: {error}")
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse("the index has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or len(name) > 255 or not _SHARD_NAME.fullmatch(name):  # I2
            raise UnsafePath(
                f"the index puts tensor {tensor[:200]!r} into something that is no plain shard name",
                file=INDEX_NAME,
                expected="letters, digits, '.', '_', '-' and the ending .safetensors",
                found=repr(name)[:200],
                do="do not use this checkpoint: its index was tampered with",
            )
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total if type(total) is int else None


def _read_header(checkpoint: Checkpoint, name: str) -> Shard:
    with opened(checkpoint.directory, name, checkpoint.follow_links) as fd:
        return Shard(name, shard.read_header(fd, name), stamp(os.fstat(fd)))


def _add_shard(checkpoint: Checkpoint, item: Shard) -> None:
    checkpoint.shards[item.name] = item
    for tensor, entry in item.header.entries.items():
        first = checkpoint.tensors.setdefault(tensor, Location(item.name, entry))
        if first.shard != item.name:
            checkpoint.problems.append(
                BadIndex(
                    f"tensor {tensor!r} stands in two shards",
                    file=item.name,
                    found=f"also in {first.shard}",
                    do="remove the shard that belongs to another split",
                )
            )


def _compare_with_index(checkpoint: Checkpoint, weight_map: dict[str, str], strays: list[str]) -> None:  # I4
    problems = checkpoint.problems
    for tensor, name in weight_map.items():
        if len(problems) >= _MAX_PROBLEMS:  # enough to see what is wrong; a hostile index could name millions
            return
        place = checkpoint.tensors.get(tensor)
        if place is None or (place.shard != name and tensor not in checkpoint.shards[name].header.entries):
            found = f"it stands in {place.shard}" if place else "it stands in no shard"
            problems.append(
                BadIndex(
                    f"tensor {tensor[:200]!r} is not where the index says",
                    file=INDEX_NAME,
                    expected=name,
                    found=found,
                    do=_ONE_REVISION,
                )
            )
    for tensor, place in checkpoint.tensors.items():
        if tensor not in weight_map:
            problems.append(
                BadIndex(f"tensor {tensor!r} is in no line of the index", file=place.shard, do=_ONE_REVISION)
            )
    for name in strays:
        problems.append(
            BadIndex(
                "a shard that the index does not know lies in the directory",
                file=name,
                do="move it away: programs that read every *.safetensors would mix it in",
            )
        )


def stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


@contextlib.contextmanager
def _errors_of(tensor: str, file: str) -> Iterator[None]:
    """Whatever goes wrong while a tensor is read names it, and its file."""
    try:
        with io_errors(file):
            yield
    except (SourceChanged, UnsafePath, Environment) as error:
        raise type(error)(f"tensor {tensor!r}: {error.what}", **error.facts) from None


def _require_same(shard_name: str, place: Place, status: os.stat_result) -> None:
    if stamp(status) != place.stamp:
        raise SourceChanged(
            "this file changed while the command ran",
            file=shard_name,
            expected=f"{place.stamp.size:,} bytes, unmodified",
            found=f"{status.st_size:,} bytes, modified",
            do=LEAVE_SOURCE_ALONE,
        )


# ---- small files


def _list_small(directory: str, below: str, follow_links: bool) -> Iterator[SmallFile]:
    with io_errors(below or "."):
        entries = sorted(os.listdir(os.path.join(directory, below)))
    for entry in entries:
        if not entry.isprintable():
            yield SmallFile(os.path.join(below, printable(entry)), 0, "an unprintable name")
            continue
        name = os.path.join(below, entry) if below else entry
        if is_of_the_format(name):
            continue
        path = os.path.join(directory, name)
        if probe.is_real_directory(path):
            left = why_directory_left(name)
            if left:
                yield SmallFile(name + os.sep, 0, left)
            else:
                yield from _list_small(directory, name, follow_links)
            continue
        left = why_left(name)
        if left:
            yield SmallFile(name, 0, left)
            continue
        with opened(directory, name, follow_links) as fd:
            size = os.fstat(fd).st_size
        yield small_file(name, size)


def small_file(name: str, size: int) -> SmallFile:
    """One that is carried unless it is too large."""
    too_large = size > formats.MAX_SMALL_FILE_BYTES
    return SmallFile(name, size, "larger than 64 MiB" if too_large else None)


def is_of_the_format(name: str) -> bool:
    """Shards, config and index, which are read; and what a conversion makes anew."""
    return name.endswith(".safetensors") or name in (CONFIG_NAME, INDEX_NAME, *OUR_NAMES)


def why_directory_left(name: str) -> str | None:
    """Why a directory of the checkpoint is not looked into. name: relative, '/' between its parts"""
    if name.count(os.sep) >= _MAX_DEPTH:
        return "too deep"
    if name.partition(os.sep)[0] not in _CODE_DIRECTORIES:
        return "a directory that releases do not have"
    return None


def why_left(name: str) -> str | None:
    """Why a file of the checkpoint is not carried; None: nothing in its name speaks against it."""
    base = os.path.basename(name)
    if base.startswith("."):
        return "hidden"
    if base.endswith(".py"):
        in_code = name.partition(os.sep)[0] in _CODE_DIRECTORIES
        return None if in_code else "code outside encoding/ and inference/"
    if base.lower().endswith(_CARRIED_SUFFIXES) or _CARRIED_NAMES.fullmatch(base):
        return None
    return "a kind of file that we do not carry"
