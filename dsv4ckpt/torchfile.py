"""One tensor as torch.save writes it: a frame around values to come, and what stands in others' frames.

The format is a ZIP of stored records: a pickle that tells of dtype and shape, the values, some small records.  What
`frame` and `suffix` put around the values is torch.save's own, byte for byte, so that nobody has to trust ours; but
for 20 digits of an id, which torch takes from its C++ library's hash of names, and which nobody reads.  `read_saved`
takes the same container only: no other way to say the same thing, so that no two readers can understand it differently.
Knows no torch and no DCP.
Source: torch 2.13 (torch/serialization.py, torch/_utils.py, caffe2/serialize/inline_container.cc); PKWARE APPNOTE.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeGuard

from . import formats, pickled
from .formats import Shape
from .pickled import Global, Made, Malformed, Persistent, call_args

_REBUILD_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = Global("collections", "OrderedDict")
_UNTYPED = Global("torch.storage", "UntypedStorage")

TORCH_DTYPES = {
    "BOOL": Global("torch", "bool"),
    "U8": Global("torch", "uint8"),
    "I8": Global("torch", "int8"),
    "I16": Global("torch", "int16"),
    "F16": Global("torch", "float16"),
    "BF16": Global("torch", "bfloat16"),
    "I32": Global("torch", "int32"),
    "F32": Global("torch", "float32"),
    "F64": Global("torch", "float64"),
    "I64": Global("torch", "int64"),
    "C64": Global("torch", "complex64"),
    "F8_E4M3": Global("torch", "float8_e4m3fn"),
    "F8_E5M2": Global("torch", "float8_e5m2"),
    "F8_E8M0": Global("torch", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Global("torch", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Global("torch", "float8_e5m2fnuz"),
    "U16": Global("torch", "uint16"),
    "U32": Global("torch", "uint32"),
    "U64": Global("torch", "uint64"),
}
DTYPE_WORDS = {known: word for word, known in TORCH_DTYPES.items()}
DTYPES = tuple(TORCH_DTYPES)  # those of formats.DTYPE_BITS that torch can save
# torch has two ways to say a dtype: by the class of the storage, and, for what came later, by its name.
_STORAGES = {
    "BOOL": Global("torch", "BoolStorage"),
    "U8": Global("torch", "ByteStorage"),
    "I8": Global("torch", "CharStorage"),
    "I16": Global("torch", "ShortStorage"),
    "F16": Global("torch", "HalfStorage"),
    "BF16": Global("torch", "BFloat16Storage"),
    "I32": Global("torch", "IntStorage"),
    "F32": Global("torch", "FloatStorage"),
    "F64": Global("torch", "DoubleStorage"),
    "I64": Global("torch", "LongStorage"),
    "C64": Global("torch", "ComplexFloatStorage"),
}
_STORAGE_WORDS = {known: word for word, known in _STORAGES.items()}

# ---- the container

ALIGNMENT = 64  # every record's bytes begin at a multiple of it
_FLAG_UTF8, _FLAG_DESCRIPTOR = 0x0800, 0x0008  # of names; CRC and sizes follow the bytes
_MOST_32 = 2**32 - 1  # and beyond, a field of 32 bits refers to one of 64 elsewhere
# signature, version, flags, method, time, date, CRC, sizes, lengths of name and of extra
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_PADDING = struct.Struct("<2sH")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE, _DESCRIPTOR_SIGNATURE = b"PK\3\4", b"PK\1\2", b"PK\7\x08"
_END_SIGNATURE, _END_64_SIGNATURE, _LOCATOR_64_SIGNATURE = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ZIP64_EXTRA = 1  # key of the extra field with sizes and offset of 64 bits
_VERSION_MADE, _VERSION_NEEDED = 0x031E, 45  # as torch's ZIP library says

_FOLDER = "archive"  # torch.save's name for what goes to no file of its own
_PICKLE, _VALUES, _BYTEORDER = "data.pkl", "data/0", "byteorder"
_BEFORE = {".format_version": b"1", ".storage_alignment": b"64", _BYTEORDER: b"little"}
_VERSION = b"3\n"
# A hash over the names of the records, which are always these; with torch it depends on its C++ library.
_NAMES_HASH = 15728199511853464602


class _Record(NamedTuple):
    """What the central directory says of a record."""

    name: str
    crc32: int
    size: int
    offset: int


class Frame(NamedTuple):
    """What stands around the values of a tensor, as far as it can be known before they are."""

    prefix: bytes  # ends where the values begin
    values_bytes: int
    suffix_bytes: int
    before: tuple[_Record, ...]  # the records in the prefix
    values: _Record  # its CRC-32 is still to come

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return len(self.prefix) + self.values_bytes + self.suffix_bytes


def _strides(shape: Shape) -> Shape:
    """Of a contiguous tensor, in elements."""
    return tuple(
        formats.num_elements(tuple(max(length, 1) for length in shape[axis + 1 :]))
        for axis in range(len(shape))
    )


# ---- the way out


def frame(dtype: str, shape: Shape) -> Frame:
    """The layout of a saved tensor: of dtypes in DTYPES, of any size; values begin at a multiple of 64."""
    size = formats.stored_bytes(dtype, shape)
    prefix, before = b"", []
    for name, data in {_PICKLE: _tensor_pickle(dtype, shape), **_BEFORE}.items():
        record = _Record(f"{_FOLDER}/{name}", zlib.crc32(data), len(data), len(prefix))
        prefix += _local(record) + data + _descriptor(record)
        before.append(record)
    values = _Record(f"{_FOLDER}/{_VALUES}", 0, size, len(prefix))
    unfinished = Frame(prefix + _local(values), size, 0, tuple(before), values)
    return unfinished._replace(suffix_bytes=len(suffix(unfinished, 0)))


def suffix(frame: Frame, crc32: int) -> bytes:
    """What follows the values, once their CRC-32 (zlib.crc32) is known."""
    values = frame.values._replace(crc32=crc32)
    position = len(frame.prefix) + frame.values_bytes
    made, records = _descriptor(values), [*frame.before, values]
    for name in ("version", ".data/serialization_id"):
        data = _VERSION if name == "version" else _serialization_id(records)
        record = _Record(f"{_FOLDER}/{name}", zlib.crc32(data), len(data), position + len(made))
        made += _local(record) + data + _descriptor(record)
        records.append(record)
    directory = b"".join(_central(record) for record in records)
    return made + directory + _end(len(records), len(directory), position + len(made))


def _tensor_pickle(dtype: str, shape: Shape) -> bytes:
    count = formats.num_elements(shape)
    hooks = Made(_ORDERED_DICT, called=True)
    if dtype in _STORAGES:
        storage = Persistent(("storage", _STORAGES[dtype], "0", "cpu", count))
        args: tuple[object, ...] = (storage, 0, shape, _strides(shape), False, hooks)
        return pickled.dumps(Made(_REBUILD_V2, args, called=True), protocol=2)
    storage = Persistent(("storage", _UNTYPED, "0", "cpu", formats.stored_bytes(dtype, shape)))
    args = (storage, 0, shape, _strides(shape), False, hooks, TORCH_DTYPES[dtype])
    return pickled.dumps(Made(_REBUILD_V3, args, called=True), protocol=2)


def _local(record: _Record, num_padding: int | None = None) -> bytes:
    """The header before a record's bytes. Its last field is padding, up to the alignment if it is not told."""
    name, wide = record.name.encode(), _wide(record, 0)
    position = record.offset + _LOCAL.size + len(name) + len(wide) + _PADDING.size
    num_padding = -position % ALIGNMENT if num_padding is None else num_padding
    padding = _PADDING.pack(b"FB", num_padding) + b"Z" * num_padding
    fields = (_LOCAL_SIGNATURE, 0, _flags(record), 0, 0, 0, 0, 0, 0, len(name), len(wide) + len(padding))
    return _LOCAL.pack(*fields) + name + wide + padding


def _wide(record: _Record, packed: int) -> bytes:
    """The extra field with what does not fit 32 bits; empty where all does. packed: the size after compression"""
    numbers = [record.size, packed] if record.size >= _MOST_32 else []
    numbers += [record.offset] if record.offset >= _MOST_32 else []
    return struct.pack(f"<2H{len(numbers)}Q", _ZIP64_EXTRA, 8 * len(numbers), *numbers) if numbers else b""


def _flags(record: _Record) -> int:
    return _FLAG_UTF8 | (_FLAG_DESCRIPTOR if record.size else 0)


def _descriptor(record: _Record) -> bytes:
    """What follows a record's bytes, if it has any."""
    if not record.size:
        return b""
    layout = "<4sI2Q" if _wide(record, record.size) else "<4s3I"
    return struct.pack(layout, _DESCRIPTOR_SIGNATURE, record.crc32, record.size, record.size)


def _central(record: _Record) -> bytes:
    name, wide = record.name.encode(), _wide(record, record.size)
    size, offset = min(record.size, _MOST_32), min(record.offset, _MOST_32)
    lengths = (len(name), len(wide), 0, 0, 0)
    fields = (
        _CENTRAL_SIGNATURE,
        0,
        0,
        _flags(record),
        0,
        0,
        0,
        record.crc32,
        size,
        size,
        *lengths,
        0,
        offset,
    )
    return _CENTRAL.pack(*fields) + name + wide


def _end(num_records: int, directory_bytes: int, directory: int) -> bytes:
    counts = (num_records, num_records, directory_bytes)
    made_by = (_VERSION_MADE, _VERSION_NEEDED, 0, 0)
    end_64 = _END_64.pack(_END_64_SIGNATURE, _END_64.size - 12, *made_by, *counts, directory)
    locator = _LOCATOR_64.pack(_LOCATOR_64_SIGNATURE, 0, directory + directory_bytes, 1)
    return end_64 + locator + _END.pack(_END_SIGNATURE, 0, 0, *counts, min(directory, _MOST_32), 0)


def _serialization_id(records: list[_Record]) -> bytes:
    """What torch calls a checkpoint by: 20 digits for the names of its records, 20 for their CRCs."""
    combined = 0
    for record in [record for record in records if record.size]:
        combined ^= (record.crc32 + 0x9E3779B9 + (combined << 6) + (combined >> 2)) % 2**64
    return f"{_NAMES_HASH:020d}{combined:020d}".encode("ascii")


# ---- the way in

_MOST_HEAD_BYTES = 2**16  # up to the values; torch needs 1,000, with pages as alignment 29,000
_MOST_HEADER_BYTES = 2**13  # of the values' record: padding up to the alignment
_MOST_TAIL_BYTES = 2**14  # behind the values; torch needs 1,000, with pages as alignment 10,000
_ENDS_BYTES = _END_64.size + _LOCATOR_64.size + _END.size
_CONTENTS = {".format_version": b"1", _BYTEORDER: b"little", "version": _VERSION}  # older torch has not all
_NEEDED = {_PICKLE, _VALUES, "version"}
_NAMES = {*_NEEDED, *_BEFORE, ".data/serialization_id"}
_KNOWN = (
    _REBUILD_V2, _REBUILD_V3, _REBUILD_PARAMETER, _ORDERED_DICT, _UNTYPED, *DTYPE_WORDS, *_STORAGE_WORDS,
)  # fmt: skip


def is_count(value: object) -> TypeGuard[int]:
    """Whether what a pickle tells is a number of elements or bytes, and no boolean."""
    return type(value) is int and 0 <= value <= formats.MAX_COUNT


def is_shape(value: object) -> TypeGuard[Shape]:
    """The same of a shape, or of offsets or strides."""
    return type(value) is tuple and len(value) <= formats.MAX_RANK and all(map(is_count, value))


class Saved(NamedTuple):
    """What a record holds. begin: where its values begin, in bytes from its own begin"""

    dtype: str
    shape: Shape
    begin: int


def read_saved(read: Callable[[int, int], bytes], size: int) -> Saved:
    """What torch.save wrote into these `size` bytes: one contiguous tensor or Parameter, of whatever device.

    read     (offset, count) -> that many bytes of the record; called twice, for 80 KiB at most
    returns  dtype in the words of safetensors
    raises   pickled.Malformed: anything but torch.save's own bytes, the values apart
    """
    tail_begin = max(0, size - _MOST_TAIL_BYTES)
    tail = read(tail_begin, size - tail_begin)
    records, directory = _directory(tail, size)
    head_bytes = records[_VALUES].offset + _MOST_HEADER_BYTES
    if head_bytes > _MOST_HEAD_BYTES:
        raise Malformed("its values stand too far from its begin")
    head = read(0, min(size, head_bytes))

    def piece(offset: int, count: int) -> bytes:
        part, at = (head, offset) if offset + count <= len(head) else (tail, offset - tail_begin)
        if not 0 <= at <= len(part) - count:
            raise Malformed("a record beside the values is too large, or cut off")
        return part[at : at + count]

    begins = _begins(records, directory, piece)
    for name, wanted in _CONTENTS.items():
        if name in records and _content(records[name], begins[name], piece) != wanted:
            raise Malformed(f"its {name} is not {wanted!r}")
    dtype, shape = _told(_content(records[_PICKLE], begins[_PICKLE], piece))
    if records[_VALUES].size != formats.stored_bytes(dtype, shape):
        raise Malformed(f"{dtype} {list(shape)} has not the {records[_VALUES].size:,} bytes of its values")
    return Saved(dtype, shape, begins[_VALUES])


_Piece = Callable[[int, int], bytes]  # (offset, count) -> bytes of the record, away from the values


def _directory(tail: bytes, size: int) -> tuple[dict[str, _Record], int]:
    """The records in their order, and where the directory begins. What stands there is what `suffix` would write."""
    if len(tail) < _ENDS_BYTES:
        raise Malformed("it is too short for a ZIP")
    entries, ends = tail[:-_ENDS_BYTES], tail[-_ENDS_BYTES:]
    *_, num_records, num_bytes, begin = _END_64.unpack_from(ends)
    if (
        num_records > len(_NAMES)
        or num_bytes > len(entries)
        or begin != size - _ENDS_BYTES - num_bytes
        or ends != _end(num_records, num_bytes, begin)
    ):
        raise Malformed("it does not end as a ZIP of torch.save does")
    entries = entries[len(entries) - num_bytes :]
    found: dict[str, _Record] = {}
    folders = set()
    while entries:
        record, entries = _entry(entries)
        folder, _, name = record.name.partition("/")
        if name not in _NAMES or name in found:
            raise Malformed(f"it has a record {record.name[:80]!r}, which is unknown or comes again")
        found[name] = record
        folders.add(folder)
    if len(found) != num_records or len(folders) != 1 or not found.keys() >= _NEEDED:
        raise Malformed("its records are not those of one tensor")
    return found, begin


def _entry(entries: bytes) -> tuple[_Record, bytes]:
    """The first entry of the directory, and what follows it."""
    try:
        fields = _CENTRAL.unpack_from(entries)
        crc32, size, name_bytes, extra_bytes, offset = *fields[7:8], *fields[9:12], fields[-1]
        name_end = _CENTRAL.size + name_bytes
        name = entries[_CENTRAL.size : name_end].decode()
        wide = iter(struct.unpack(f"<{extra_bytes // 8}Q", entries[name_end + 4 : name_end + extra_bytes]))
    except (struct.error, UnicodeDecodeError):
        raise Malformed("its directory is malformed") from None
    if size == _MOST_32:
        size, _ = next(wide, 0), next(wide, 0)
    record = _Record(name, crc32, size, next(wide, 0) if offset == _MOST_32 else offset)
    entry = _central(record)
    if not entries.startswith(entry):
        raise Malformed(
            f"the directory tells of {name[:80]!r} in another way than torch.save: it is compressed or the like"
        )
    return record, entries[len(entry) :]


def _begins(records: Mapping[str, _Record], directory: int, piece: _Piece) -> dict[str, int]:
    """Where the bytes of each record begin. Records follow one another, and their headers agree with the directory."""
    found = {}
    position = 0
    for name, record in records.items():
        extra_bytes = _LOCAL.unpack(piece(position, _LOCAL.size))[-1]
        num_padding = extra_bytes - len(_wide(record, 0)) - _PADDING.size
        header, descriptor = _local(record, max(0, num_padding)), _descriptor(record)
        found[name] = position + len(header)
        end = found[name] + record.size
        if (
            record.offset != position
            or piece(position, len(header)) != header
            or piece(end, len(descriptor)) != descriptor
        ):
            raise Malformed(f"its record {name} is not where or what the directory says")
        position = end + len(descriptor)
    if position != directory:
        raise Malformed("something stands between the records and their directory")
    return found


def _content(record: _Record, begin: int, piece: _Piece) -> bytes:
    data = piece(begin, record.size)
    if record.crc32 not in (0, zlib.crc32(data)):  # 0: torch.serialization.set_crc32_options(False)
        raise Malformed(f"the CRC-32 of {record.name[:80]!r} is wrong")
    return data


def _told(data: bytes) -> tuple[str, Shape]:
    """dtype and shape that data.pkl tells, of a contiguous tensor that has its storage for itself."""
    value = pickled.loads(data, _KNOWN, with_persistent=True)
    if parameter := call_args(value, _REBUILD_PARAMETER, 3):
        value, *rest = parameter
        _require_plain(*rest)
    args = call_args(value, _REBUILD_V2, 6) or call_args(value, _REBUILD_V3, 7)
    if args is None:
        raise Malformed("it holds something else than one plain tensor")
    storage, offset, shape, strides, requires_grad, hooks, *named = args
    _require_plain(requires_grad, hooks)
    dtype, count = _storage(storage, *named)
    if not is_count(offset) or not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
        raise Malformed("its shape, strides or offset are none")
    num_elements = formats.num_elements(shape)
    if offset or count != (formats.stored_bytes(dtype, shape) if named else num_elements):
        raise Malformed("it does not have its storage for itself")
    steps = zip(shape, strides, _strides(shape), strict=True)
    if num_elements and any(length > 1 and told != step for length, told, step in steps):
        raise Malformed(
            f"its values stand in another order, with strides {list(strides)}: save it contiguous"
        )
    return dtype, shape


def _require_plain(requires_grad: object, hooks: object) -> None:
    if type(requires_grad) is not bool or call_args(hooks, _ORDERED_DICT, 0) is None:
        raise Malformed("it holds a tensor with hooks or the like")


def _storage(value: object, named: object = None) -> tuple[str, int]:
    """dtype, in the words of safetensors, and size: in elements, or in bytes where the dtype is named apart."""
    told = value.id if type(value) is Persistent else None
    if type(told) is not tuple or len(told) != 5:
        raise Malformed("it has no storage")
    word, kind, key, location, count = told
    if word != "storage" or key != "0" or type(location) is not str or not is_count(count):
        raise Malformed("its storage is malformed")
    by_name, of = (
        (DTYPE_WORDS, named) if kind is _UNTYPED else (_STORAGE_WORDS, kind if named is None else None)
    )
    if type(of) is not Global or of not in by_name:
        raise Malformed("its dtype is unknown, or told in two ways")
    return by_name[of], count
