"""dsv4.roundtrip: what a conversion remembers of its source, so that the released bytes can be made again without it.

A safetensors container under a name that no loader globs for.  It holds the shards' headers as they stood, config.json
and the index verbatim, and for every tensor hashes of its source bytes and of what became of them, piece by piece,
with the scales that its values do not tell.  Values themselves are not in it.  Knows no arithmetic and no torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from . import contained, formats, probe, shard, strictjson
from .errors import BadHeader, BadSidecar
from .formats import CONFIG_NAME, INDEX_NAME, SIDECAR_NAME

_FORMAT = "dsv4ckpt roundtrip 1"
_HASH_BYTES = 32
_FOOTER = struct.Struct("<QQQ")  # bytes of blobs, table and hashes in a part
_COPY_BYTES = 4 * 1024 * 1024
_PIECE_VALUES = 2**23  # 16 MiB as BF16: decided and hashed as one, so that memory does not grow with a tensor
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_MAX_TABLE_BYTES = 256 * 1024 * 1024


def piece_rows(cols: int) -> int:
    """Rows of a logical matrix that are hashed as one piece: whole rows of tiles, of any size that a release has."""
    height = formats.FP8_TILE.block.rows
    return max(height, _PIECE_VALUES // max(1, cols) // height * height)


class Piece(NamedTuple):
    """SHA-256 of some rows: as converted, and the codes and scales that they came from."""

    converted: bytes
    codes: bytes
    scales: bytes


# How the scales of a tensor are remembered: all of them; where they are not what the rule says; not at all, since they
# stand in the output; there were none.
VERBATIM, RULE, KEPT, UNIT = "verbatim", "rule", "kept", "unit"


@dataclass
class Record:
    """What is remembered of one logical tensor."""

    name: str
    pieces: list[Piece] = field(default_factory=list)
    scales: list[bytes] = field(default_factory=list)  # one for each piece
    codes: list[bytes] = field(
        default_factory=list
    )  # only of pieces whose codes BF16 cannot tell; else empty
    scales_are: str = ""  # VERBATIM, RULE, KEPT or UNIT; "": a tensor that is not quantized


# ---- one part for each output shard, written while the shard is


class PartWriter:
    """Collects the records of one output shard; blobs go to a file at once, the rest is small."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._table: list[list[Any]] = []
        self._hashes = bytearray()
        self._blob_bytes = 0
        self._sha256 = hashlib.sha256()

    def add(self, record: Record) -> None:
        """Append a finished record."""
        sizes = [self._blob(data) for data in record.scales]
        codes = {str(number): self._blob(data) for number, data in enumerate(record.codes) if data}
        self._table.append([record.name, record.scales_are, len(record.pieces), sizes, codes])
        for piece in record.pieces:
            self._hashes += piece.converted if not record.scales_are else b"".join(piece)

    def _blob(self, data: bytes) -> int:
        packed = zlib.compress(data, 6) if data else b""
        self._write(packed)
        self._blob_bytes += len(packed)
        return len(packed)

    def _write(self, data: bytes | bytearray) -> None:
        self._sha256.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> str:
        """Write table, hashes and footer; the SHA-256 of the part."""
        table = zlib.compress(strictjson.compact([hashlib.sha256(self._hashes).hexdigest(), *self._table]), 6)
        self._write(table)
        self._write(self._hashes)
        self._write(_FOOTER.pack(self._blob_bytes, len(table), len(self._hashes)))
        return self._sha256.hexdigest()


class Section(NamedTuple):
    """Bytes of the sidecar: where they are to be read from."""

    name: str
    size: int
    data: bytes | None  # None: they stand in a part
    part: int = 0
    offset: int = 0


def sections_of_part(number: int, fd: int, size: int) -> list[Section]:
    """The three sections of a part. raises BadSidecar if it was damaged"""
    if size < _FOOTER.size:
        _refuse("an unfinished part is damaged")
    blobs, table, hashes = _FOOTER.unpack(os.pread(fd, _FOOTER.size, size - _FOOTER.size))
    if blobs + table + hashes + _FOOTER.size != size:
        _refuse("an unfinished part is damaged")
    return [
        Section(f"blobs.{number}", blobs, None, number, 0),
        Section(f"table.{number}", table, None, number, blobs),
        Section(f"hashes.{number}", hashes, None, number, blobs + table),
    ]


class Remembered(NamedTuple):
    """What is known of the source from its headers alone."""

    release: str
    storage: str
    headers: tuple[tuple[str, bytes], ...]  # (shard, length field and header as they stand)
    config: bytes
    weight_map: bytes | None  # model.safetensors.index.json


def fixed_sections(source: Remembered) -> list[Section]:
    """The sections that do not depend on the tensors' bytes."""
    named = [(CONFIG_NAME, source.config), *((f"header.{name}", header) for name, header in source.headers)]
    if source.weight_map is not None:
        named.append((INDEX_NAME, source.weight_map))
    packed = [(name, zlib.compress(data, 6)) for name, data in named]
    return [Section(name, len(data), data) for name, data in packed]


def container_header(source: Remembered, sections: list[Section]) -> bytes:
    """The safetensors header of the whole sidecar."""
    metadata = {"format": _FORMAT, "release": source.release, "storage": source.storage}
    return shard.encode_header(((s.name, "U8", (s.size,)) for s in sections), metadata)


def copy_section(fd: int, section: Section, write: Callable[[bytes], None]) -> None:
    """Hand the bytes of a section to `write`, some at a time; fd: of its part."""
    if section.data is not None:
        write(section.data)
        return
    for offset in range(0, section.size, _COPY_BYTES):
        count = min(_COPY_BYTES, section.size - offset)
        write(shard.read_exactly(fd, count, section.offset + offset, SIDECAR_NAME))


# ---- reading


class _Where(NamedTuple):
    part: int
    scales_are: str
    first_hash: int  # offset within the part's hashes
    num_pieces: int
    blobs: tuple[tuple[int, int], ...]  # (offset within the part's blobs, size) of each piece's scales
    codes: dict[int, tuple[int, int]]


class Sidecar:
    """An open sidecar; strict, since it may come from a stranger. Use `open_sidecar`."""

    def __init__(self, directory: str, name: str, follow_links: bool) -> None:
        self._directory, self._name, self._follow_links = directory, name, follow_links
        with contained.opened(directory, name, follow_links) as fd:
            try:
                self.header = shard.read_header(fd, name)
            except BadHeader as error:
                _refuse(error.what, error.facts.get("expected"), error.facts.get("found"))
            metadata = self.header.metadata
            if metadata.get("format") != _FORMAT:
                _refuse(
                    "its format is not one that this version knows",
                    _FORMAT,
                    repr(metadata.get("format"))[:80],
                )
            self.source = Remembered(
                metadata.get("release", ""),
                metadata.get("storage", ""),
                tuple(self._headers(fd)),
                self._unpacked(fd, CONFIG_NAME, formats.MAX_CONFIG_BYTES),
                self._unpacked(fd, INDEX_NAME, formats.MAX_INDEX_BYTES)
                if INDEX_NAME in self.header.entries
                else None,
            )
            self.where = dict(self._tables(fd))

    def _headers(self, fd: int) -> Iterator[tuple[str, bytes]]:
        for section in self.header.entries:
            kind, _, name = section.partition(".")
            if kind == "header":
                if not _SHARD_NAME.fullmatch(name):
                    _refuse(
                        "it names a shard by something that is no plain file name", found=repr(name)[:200]
                    )
                yield name, self._unpacked(fd, section, formats.MAX_HEADER_BYTES + 8)

    def _bytes(self, fd: int, section: str, most: int) -> bytes:
        entry = self.header.entries.get(section)
        if entry is None or entry.dtype != "U8":
            _refuse(f"it has no section {section!r}")
        if entry.end - entry.begin > most:
            _refuse(
                f"its section {section!r} is too large",
                f"at most {most:,} bytes",
                f"{entry.end - entry.begin:,}",
            )
        return shard.read_exactly(fd, entry.end - entry.begin, entry.begin, self._name)

    def _unpacked(self, fd: int, section: str, most: int) -> bytes:
        return _inflate(self._bytes(fd, section, most), most, section)

    def _tables(self, fd: int) -> Iterator[tuple[str, _Where]]:
        for section in self.header.entries:
            kind, _, number = section.partition(".")
            if kind != "table":
                continue
            if not re.fullmatch("[0-9]{1,6}", number):
                _refuse(f"it has an unknown section {section[:80]!r}")
            part = int(number)
            sha256, *rows = _parsed(self._unpacked(fd, section, _MAX_TABLE_BYTES), section)
            hash_at = blob_at = 0
            for row in rows:
                name, scales_are, num_pieces, sizes, codes = _row(row, section)
                blobs = []
                for size in sizes:
                    blobs.append((blob_at, size))
                    blob_at += size
                verbatim = {}
                for piece, size in codes.items():
                    verbatim[int(piece)] = (blob_at, size)
                    blob_at += size
                yield name, _Where(part, scales_are, hash_at, num_pieces, tuple(blobs), verbatim)
                hash_at += num_pieces * _HASH_BYTES * (3 if scales_are else 1)
            hashes = self._bytes(fd, f"hashes.{number}", _MAX_TABLE_BYTES)
            if hashlib.sha256(hashes).hexdigest() != sha256:
                _refuse(f"its section 'hashes.{number}' is damaged")
            for what, expected in (("hashes", hash_at), ("blobs", blob_at)):
                entry = self.header.entries.get(f"{what}.{number}")
                if entry is None or entry.end - entry.begin != expected:
                    _refuse(f"its sections {section!r} and '{what}.{number}' do not fit together")

    def pieces(self, name: str) -> list[Piece]:
        """The hashes of a tensor's pieces; of one that is not quantized, a single one of its bytes."""
        where = self.where[name]
        each = 3 if where.scales_are else 1
        data = self._read(f"hashes.{where.part}", where.first_hash, where.num_pieces * each * _HASH_BYTES)
        cut = [data[i : i + _HASH_BYTES] for i in range(0, len(data), _HASH_BYTES)]
        if each == 1:
            return [Piece(digest, digest, b"") for digest in cut]
        return [Piece(*cut[i : i + 3]) for i in range(0, len(cut), 3)]

    def scales(self, name: str, piece: int, most: int) -> bytes:
        """What is remembered of the scales of a piece; at most `most` bytes."""
        where = self.where[name]
        return _inflate(self._read(f"blobs.{where.part}", *where.blobs[piece]), most, name)

    def codes(self, name: str, piece: int, most: int) -> bytes | None:
        """The codes of a piece, if its values cannot tell them."""
        where = self.where[name]
        if piece not in where.codes:
            return None
        return _inflate(self._read(f"blobs.{where.part}", *where.codes[piece]), most, name)

    def _read(self, section: str, offset: int, size: int) -> bytes:
        entry = self.header.entries[section]
        if offset + size > entry.end - entry.begin:
            _refuse(f"its section {section!r} is cut off")
        with contained.opened(self._directory, self._name, self._follow_links) as fd:
            return shard.read_exactly(fd, size, entry.begin + offset, self._name)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 over headers and tables: tells one sidecar from another."""
        digest = hashlib.sha256(self.header.sha256.encode())
        with contained.opened(self._directory, self._name, self._follow_links) as fd:
            for section, entry in self.header.entries.items():
                if not section.startswith("blobs."):
                    digest.update(shard.read_exactly(fd, entry.end - entry.begin, entry.begin, self._name))
        return digest.hexdigest()


def open_sidecar(path: str, *, follow_links: bool = False) -> Sidecar | None:
    """The sidecar of a directory, or the sidecar file itself; None if the directory has none. raises BadSidecar"""
    directory, name = (path, SIDECAR_NAME) if probe.is_directory(path) else os.path.split(path)
    if not probe.is_there(os.path.join(directory or ".", name)):
        return None
    return Sidecar(directory or ".", name, follow_links)


def _inflate(data: bytes, most: int, what: str) -> bytes:
    """Decompress with a bound: a few bytes may stand for gigabytes."""
    if not data:
        return b""
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, most + 1)
    except zlib.error:
        _refuse(f"its section {what!r} is damaged")
    if len(found) > most or not inflater.eof or inflater.unused_data:
        _refuse(f"its section {what!r} is damaged or too large")
    return found


def _parsed(data: bytes, section: str) -> list[Any]:
    try:
        rows = strictjson.loads(data, floats=False)
    except strictjson.Malformed as error:
        _refuse(f"its section {section!r} is malformed: {error}")
    if not isinstance(rows, list) or not rows:
        _refuse(f"its section {section!r} is no list")
    return rows


def _row(row: Any, section: str) -> tuple[str, str, int, list[int], dict[str, int]]:
    kinds = (str, str, int, list, dict)
    if (
        not isinstance(row, list)
        or len(row) != len(kinds)
        or any(type(x) is not k for x, k in zip(row, kinds, strict=True))
    ):
        _refuse(f"a row of its section {section!r} is malformed", found=repr(row)[:80])
    name, scales_are, num_pieces, sizes, codes = row
    sound = (
        scales_are in ("", VERBATIM, RULE, KEPT, UNIT)
        and len(sizes) == (num_pieces if scales_are else 0)
        and all(type(size) is int for size in (*sizes, *codes.values()))
        and all(re.fullmatch("[0-9]{1,9}", key) and int(key) < num_pieces for key in codes)
    )
    if not sound:
        _refuse(f"a row of its section {section!r} is wrong", found=repr(name)[:200])
    return name, scales_are, num_pieces, sizes, codes


def _refuse(what: str, expected: object = None, found: object = None) -> NoReturn:
    raise BadSidecar(
        f"the round-trip sidecar cannot be used: {what}",
        file=SIDECAR_NAME,
        expected=expected,
        found=found,
        do="use the one that the conversion wrote, or the released checkpoint itself: --source DIR",
    )
