"""ONE safetensors file: strict header in, canonical header out, positioned reads.  Knows no scales, index or torch.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes without holes.  We read with pread only:
a memory-mapped file that is truncated under us would kill the process.
Source: safetensors format (README and 0.8.0); rules H1-H14 are numbered where they are enforced.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from . import formats, strictjson
from .errors import LEAVE_SOURCE_ALONE, BadHeader, SourceChanged
from .formats import Shape

_LENGTH = struct.Struct("<Q")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_ENTRY_COMMAS = 2 + formats.MAX_RANK + 2  # between fields, dimensions, offsets and entries
_LIMITS = strictjson.Limits(  # itself and its entries; some more commas in names and __metadata__
    objects=formats.MAX_TENSORS + 1,
    lists=2 * formats.MAX_TENSORS + 1000,
    commas=_ENTRY_COMMAS * formats.MAX_TENSORS + 100_000,
)
_MOST_QUOTES = 10 * formats.MAX_TENSORS + 400_000  # of a name, three keys and a dtype; and of __metadata__
_ALIGNMENT = 8  # bytes; where the reference writer starts the data, so every element is aligned


class Entry(NamedTuple):
    """Where a tensor's bytes stand: [begin, end) from the start of the file."""

    dtype: str
    shape: Shape
    begin: int
    end: int


class Header(NamedTuple):
    """What a safetensors header says, checked."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    sha256: str  # of the length field and the header as they stand in the file


def read_header(fd: int, file: str) -> Header:
    """Read and check the header of an open safetensors file.

    file     name for messages
    returns  every entry, in order of its bytes
    raises   BadHeader
    """
    size = os.fstat(fd).st_size
    prefix = read_exactly(fd, min(size, _LENGTH.size), 0, file)
    prefixed = bytearray(header_end(prefix, size, file))
    read_into(fd, memoryview(prefixed), 0, file)
    text, sha256 = _text(prefixed, file), hashlib.sha256(prefixed).hexdigest()
    data_start = len(prefixed)
    del prefixed  # a header may be 100 MB: once is enough
    return _parsed(text, data_start, size, sha256, file)


def header_end(prefix: bytes, file_size: int, file: str) -> int:
    """Where the header ends, by the length field that a file begins with. raises BadHeader"""
    if file_size < _LENGTH.size:  # H1
        _refuse(
            file, "shorter than the length field", expected="at least 8 bytes", found=f"{file_size} bytes"
        )
    (length,) = _LENGTH.unpack(prefix[: _LENGTH.size])
    most = min(formats.MAX_HEADER_BYTES, file_size - _LENGTH.size)
    if length > most:  # H2
        limit = f"at most {most:,} bytes of header"
        _refuse(file, "header length out of range", expected=limit, found=f"{length:,}")
    return _LENGTH.size + int(length)


def parse_header(prefixed: bytes, file_size: int | None, file: str) -> Header:
    """Check a header, given with its length field, against the size of its file if that is known. raises BadHeader"""
    text, sha256 = _text(prefixed, file), hashlib.sha256(prefixed).hexdigest()
    return _parsed(text, len(prefixed), file_size, sha256, file)


def _text(prefixed: bytes | bytearray, file: str) -> str:
    """The JSON of a header, after all that can be told without parsing it: what parsing would cost is bounded here."""
    begin, end = _LENGTH.size, len(prefixed)
    if _LENGTH.pack(end - begin) != prefixed[:begin]:
        _refuse(file, "header length out of range", found=f"{end - begin:,} bytes of header")
    if prefixed[begin : begin + 1] != b"{":  # H3
        _refuse(
            file,
            "the header is no JSON object",
            expected="'{'",
            found=repr(bytes(prefixed[begin : begin + 8])),
        )
    last = prefixed.rfind(b"}")
    if prefixed.count(b" ", last + 1) != end - last - 1:  # H4
        _refuse(file, "something but blanks follows the header's JSON")
    try:
        strictjson.require_modest(prefixed, _LIMITS)
        if end - begin <= formats.MAX_PLAIN_HEADER_BYTES:
            return strictjson.decoded(memoryview(prefixed)[begin:])
        if b"\\" in prefixed:
            raise strictjson.Malformed("escapes in a header of this size")
        quotes = prefixed.count(b'"')
        if quotes > _MOST_QUOTES:
            raise strictjson.Malformed(f"more than {_MOST_QUOTES:,} quotes")
        if last - begin > (quotes + 1) * formats.MAX_NAME_CHARS + formats.MAX_METADATA_BYTES:
            raise strictjson.Malformed("texts or blanks longer than any header has")
        return strictjson.decoded(memoryview(prefixed)[begin:], "ascii")
    except strictjson.Malformed as error:
        _refuse(file, f"the header is malformed: {error}")


def _parsed(text: str, data_start: int, file_size: int | None, sha256: str, file: str) -> Header:
    try:
        document = strictjson.loads(text, floats=False)  # H4 H5 H6 H14
    except strictjson.Malformed as error:
        _refuse(file, f"the header is malformed: {error}")
    metadata = _metadata(document.pop("__metadata__", {}), file)
    found = [(name, _entry(name, fields, data_start, file)) for name, fields in document.items()]
    found.sort(key=lambda item: (item[1].begin, item[1].end))
    position = data_start
    for name, entry in found:  # H11
        if entry.begin != position:
            problem = (
                "overlaps what stands before it" if entry.begin < position else "leaves a hole before it"
            )
            _refuse(
                file,
                f"tensor {name!r} {problem}",
                expected=position - data_start,
                found=entry.begin - data_start,
            )
        position = entry.end
    if file_size is not None and position != file_size:
        problem = "the file is truncated" if file_size < position else "bytes follow the last tensor"
        _refuse(file, problem, expected=f"{position:,} bytes", found=f"{file_size:,} bytes")
    return Header(dict(found), metadata, data_start, sha256)


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):  # H13
        _refuse(file, "__metadata__ is no map of strings")
    if sum(len(key) + len(text) for key, text in value.items()) > formats.MAX_METADATA_BYTES:
        _refuse(
            file, "__metadata__ is too large", expected=f"at most {formats.MAX_METADATA_BYTES:,} characters"
        )
    return value


def _entry(name: str, fields: Any, data_start: int, file: str) -> Entry:
    if not 0 < len(name) <= formats.MAX_NAME_CHARS or not name.isprintable():  # H12
        _refuse(file, f"tensor name {name[:100]!r} is empty, too long or not printable")
    if not isinstance(fields, dict) or fields.keys() != _ENTRY_KEYS:  # H7
        _refuse(file, f"tensor {name!r} is described by the wrong fields", expected=sorted(_ENTRY_KEYS))
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in formats.DTYPE_BITS:  # H8
        _refuse(
            file,
            f"tensor {name!r} has an unknown dtype",
            found=repr(dtype[:60] if isinstance(dtype, str) else dtype)[:60],
        )
    if not isinstance(shape, list) or len(shape) > formats.MAX_RANK or not _are_counts(shape):  # H9
        _refuse(file, f"tensor {name!r} has no valid shape", found=repr(shape)[:60])
    bits = formats.DTYPE_BITS[dtype] * math.prod(shape)
    # also when a later dimension is 0: every partial product must be a count
    whole = bits or formats.DTYPE_BITS[dtype] * math.prod(length or 1 for length in shape)
    if whole > formats.MAX_COUNT:
        _refuse(file, f"tensor {name!r} is larger than any file", found=repr(shape)[:60])
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets):
        _refuse(file, f"tensor {name!r} has no valid data_offsets", found=repr(offsets)[:60])
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:  # H9 H10
        _refuse(
            file,
            f"tensor {name!r} does not fill its range",
            expected=f"{bits / 8:g} bytes for {dtype} {shape}",
            found=f"{end - begin} bytes",
        )
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _are_counts(values: list[Any]) -> bool:
    for value in values:  # noqa: SIM110 - a plain loop: this runs four times for each of 150,000 tensors
        if type(value) is not int or not 0 <= value <= formats.MAX_COUNT:  # bool is no count
            return False
    return True


def _refuse(file: str, what: str, *, expected: object = None, found: object = None) -> NoReturn:
    raise BadHeader(
        what, file=file, expected=expected, found=found, do="download the file again and compare its SHA-256"
    )


def encode_header(tensors: Iterable[tuple[str, str, Shape]], metadata: dict[str, str] | None = None) -> bytes:
    """Header bytes, length field included, of a file that holds (name, dtype, shape) in this order without holes.

    Keys keep the given order, blanks pad the data to a multiple of 8 bytes: equal arguments give equal bytes.
    """
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + formats.stored_bytes(dtype, shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = strictjson.compact(document)
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return _LENGTH.pack(len(raw)) + raw


def read_exactly(fd: int, size: int, offset: int, file: str) -> bytes:
    """`size` bytes from `offset`. raises SourceChanged if the file ends before"""
    data = bytearray(size)
    read_into(fd, memoryview(data), offset, file)
    return bytes(data)


def read_into(fd: int, view: memoryview, offset: int, file: str) -> None:
    """Fill `view` from `offset`. raises SourceChanged if the file ends before"""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            raise SourceChanged(
                "the file ended while it was read",
                file=file,
                expected=f"{len(view):,} bytes from {offset:,}",
                found=f"{done:,} bytes",
                do=LEAVE_SOURCE_ALONE,
            )
        done += got


def read_direct(fd: int | None, memory: memoryview, offset: int) -> int:
    """Read past the page cache into aligned memory, from an aligned offset.

    returns  how many bytes came; the others, if the file has them, are to be read in the ordinary way
    """
    if fd is None:
        return 0
    try:
        return os.preadv(fd, [memory], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a device with larger blocks
            raise
        return 0
