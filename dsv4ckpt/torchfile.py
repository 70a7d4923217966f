"""One tensor as torch.save writes it: a frame around values to come.

The format is a ZIP of stored records: a pickle that tells of dtype and shape, the values, some small records.  What
`frame` and `suffix` put around the values is torch.save's own, byte for byte, so that nobody has to trust ours; but
for 20 digits of an id, which torch takes from its C++ library's hash of names, and which nobody reads.
Knows no torch and no DCP.
Source: torch 2.13 (torch/serialization.py, torch/_utils.py, caffe2/serialize/inline_container.cc); PKWARE APPNOTE.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from . import formats, pickled
from .formats import Shape
from .pickled import Global, Made, Persistent

_REBUILD_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_ORDERED_DICT = Global("collections", "OrderedDict")
_UNTYPED = Global("torch.storage", "UntypedStorage")

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
_NEW_DTYPES = {
    "F8_E4M3": Global("torch", "float8_e4m3fn"),
    "F8_E5M2": Global("torch", "float8_e5m2"),
    "F8_E8M0": Global("torch", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Global("torch", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Global("torch", "float8_e5m2fnuz"),
    "U16": Global("torch", "uint16"),
    "U32": Global("torch", "uint32"),
    "U64": Global("torch", "uint64"),
}
DTYPES = (*_STORAGES, *_NEW_DTYPES)  # those of formats.DTYPE_BITS that torch can save

# ---- the container

_ALIGNMENT = 64  # every record's bytes begin at a multiple of it
_FLAGS = 0x0808  # names are UTF-8; sizes and CRC follow the bytes
_MOST_32 = 2**32 - 1  # and beyond, a field of 32 bits refers to one of 64 elsewhere
# signature, version, flags, method, time, date, CRC, sizes, lengths of name and of extra
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
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
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    hooks = Made(_ORDERED_DICT, called=True)
    if dtype in _STORAGES:
        storage = Persistent(("storage", _STORAGES[dtype], "0", "cpu", count))
        args: tuple[object, ...] = (storage, 0, shape, tuple(reversed(strides)), False, hooks)
        return pickled.dumps(Made(_REBUILD_V2, args, called=True), protocol=2)
    storage = Persistent(("storage", _UNTYPED, "0", "cpu", formats.stored_bytes(dtype, shape)))
    args = (storage, 0, shape, tuple(reversed(strides)), False, hooks, _NEW_DTYPES[dtype])
    return pickled.dumps(Made(_REBUILD_V3, args, called=True), protocol=2)


def _local(record: _Record) -> bytes:
    """The header before a record's bytes. Its last field is padding, up to the alignment."""
    name, wide = record.name.encode(), _wide(record)
    position = record.offset + _LOCAL.size + len(name) + len(wide) + 4
    num_padding = -position % _ALIGNMENT
    padding = struct.pack("<2sH", b"FB", num_padding) + b"Z" * num_padding
    fields = (_LOCAL_SIGNATURE, 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(name), len(wide) + len(padding))
    return _LOCAL.pack(*fields) + name + wide + padding


def _wide(record: _Record) -> bytes:
    """The extra field with what does not fit 32 bits; empty where all does."""
    numbers = [record.size] * 2 if record.size >= _MOST_32 else []
    numbers += [record.offset] if record.offset >= _MOST_32 else []
    return struct.pack(f"<2H{len(numbers)}Q", _ZIP64_EXTRA, 8 * len(numbers), *numbers) if numbers else b""


def _descriptor(record: _Record) -> bytes:
    layout = "<4sI2Q" if _wide(record) else "<4s3I"
    return struct.pack(layout, _DESCRIPTOR_SIGNATURE, record.crc32, record.size, record.size)


def _central(record: _Record) -> bytes:
    name, wide = record.name.encode(), _wide(record)
    size, offset = min(record.size, _MOST_32), min(record.offset, _MOST_32)
    lengths = (len(name), len(wide), 0, 0, 0)
    fields = (_CENTRAL_SIGNATURE, 0, 0, _FLAGS, 0, 0, 0, record.crc32, size, size, *lengths, 0, offset)
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
    for record in records:
        combined ^= (record.crc32 + 0x9E3779B9 + (combined << 6) + (combined >> 2)) % 2**64
    return f"{_NAMES_HASH:020d}{combined:020d}".encode("ascii")
