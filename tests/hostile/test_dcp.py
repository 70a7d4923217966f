"""Hostile DCP directories: pickles that would run, ZIPs that say two things, descriptions that cost; and fuzz.

Everything is given to the readers of `.metadata` and of saved tensors: refused with our errors, at little cost, and
nothing done but reading (Python's audit events tell).  That the payloads work is shown with Python's own unpickler, in
a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_driver
import pytest
import tiny
import torch
from refusals import MOST_BYTES, attempted, refusal
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv4ckpt import pickled, torchfile
from dsv4ckpt.dcp_metadata import DcpContents, parse_metadata
from dsv4ckpt.errors import BadDcp
from dsv4ckpt.pickled import Global, Made, Malformed, Persistent
from dsv4ckpt.torchfile import Saved, read_saved

SIZES = {"__0_0.distcp": 100_000, "__1_0.distcp": 100_000}
SENTINEL = "executed"  # a file that payloads make
COMMAND = f"touch {SENTINEL}"
CODE = f"open('{SENTINEL}', 'w')"


# ---- pickles, in instructions


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def by_lines(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def attack(*pieces: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(pieces) + b"."


SYSTEM = named("os", "system")
SHELL = call(SYSTEM, text(COMMAND))
CALL = text(COMMAND) + b"\x85R"  # of what is on the stack
IMPORTED = call(named("builtins", "__import__"), text("os"))
COMPILED = call(named("builtins", "compile"), text(CODE), text(""), text("exec"))
NAMESPACE = named("types", "SimpleNamespace")
REGISTERED = call(named("copyreg", "add_extension"), text("os"), text("system"), b"K\x07")

RUNS: dict[str, bytes] = {  # with Python's unpickler; the control shows it
    "os.system": attack(SHELL),
    "os.system in protocol 2": attack(call(by_lines("os", "system"), text(COMMAND)), protocol=2),
    "os.system in protocol 0": f"cos\nsystem\n(S'{COMMAND}'\ntR.".encode(),
    "posix.system": attack(call(named("posix", "system"), text(COMMAND))),
    "eval": attack(call(named("builtins", "eval"), text(CODE))),
    "exec": attack(call(named("builtins", "exec"), text(CODE))),
    "exec of compiled": attack(call(named("builtins", "exec"), COMPILED)),
    "open": attack(call(named("builtins", "open"), text(SENTINEL), text("w"))),
    "getattr of an import": attack(call(call(named("builtins", "getattr"), IMPORTED, text("system")), text(COMMAND))),
    "NEWOBJ of a partial": attack(named("functools", "partial"), SYSTEM, text(COMMAND), b"\x86\x81)R"),
    "NEWOBJ_EX of a partial": attack(named("functools", "partial"), SYSTEM, text(COMMAND), b"\x86}\x92)R"),
    "BUILD of a __setstate__": attack(NAMESPACE, b")\x81}", text("__setstate__"), SYSTEM, b"sb", text(COMMAND), b"b"),
    "INST": f"\x80\x02(S'{COMMAND}'\nios\nsystem\n.".encode("latin-1"),
    "OBJ": attack(b"(", SYSTEM, text(COMMAND), b"o"),
    "extension registry": attack(REGISTERED, b"0\x82\x07", CALL),
    "name that is computed": attack(
        text("os"), call(named("operator", "add"), text("sys"), text("tem")), b"\x93", CALL
    ),
    "name out of the memo": attack(text("system"), b"q\x050", text("os"), b"h\x05\x93", CALL),
    "dotted name": attack(call(named("os", "system.__call__"), text(COMMAND))),
    "dotted name through a module": attack(call(named("pathlib", "os.system"), text(COMMAND))),
    "method of a path": attack(call(named("pathlib", "Path.touch"), call(named("pathlib", "Path"), text(SENTINEL)))),
    "map": attack(
        call(named("collections", "deque"), call(named("builtins", "map"), SYSTEM, b"(", text(COMMAND), b"l"))
    ),
    "Popen": attack(call(named("subprocess", "getoutput"), text(COMMAND))),
    "pickle in a pickle": attack(call(named("pickle", "loads"), b"C", bytes([len(attack(SHELL))]), attack(SHELL))),
    "reduced behind a value": attack(SHELL, b"0N"),
}  # fmt: skip

OTHERS: dict[str, bytes] = {
    "torch.load": attack(call(named("torch", "load"), text(SENTINEL))),
    "torch.serialization.load": attack(call(named("torch.serialization", "load"), text(SENTINEL))),
    "torch.hub": attack(call(named("torch.hub", "load"), text("owner/repository"), text("model"))),
    "torch.jit": attack(call(named("torch.jit", "load"), text(SENTINEL))),
    "module of the list, other name": attack(named("torch.distributed.checkpoint.metadata", "os.system"), CALL),
    "name of the list, other module": attack(named("os", "Size")),
    "collections.Counter": attack(named("collections", "Counter")),
    "names in bytes": attack(b"C\x02osC\x06system\x93", CALL),
    "getattr of a known class": attack(
        call(named("builtins", "getattr"), named("torch", "Size"), text("__new__")), b")R"
    ),
    "numpy": attack(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\x00\x85\x86R"),
    "numpy.load": attack(call(named("numpy", "load"), text(SENTINEL))),
    "path with a state": attack(call(named("pathlib", "PosixPath"), text("/")), b"}", text("touch"), SYSTEM, b"sb"),
    "path of a new object": attack(named("pathlib", "PosixPath"), text("/"), b"\x85\x81"),
    "persistent by line": attack(b"Pos.system\n"),
    "persistent": attack(text("storage"), b"Q"),
    "persistent of a call": attack(SHELL, b"Q"),
    "memo far away": attack(b"Nr\xff\xff\xff\xff"),
    "memo of nothing": attack(b"j\xff\xff\xff\xff"),
    "laughs": attack(b")\x94", *(b"h%ch%c\x86\x94" % (n, n) for n in range(200))),
    "laughs in lists": attack(b"]\x94", *(b"](h%ch%ce\x94" % (n, n) for n in range(99))),
    "deep": attack(b")" + b"\x85" * 1_000_000),
    "deep lists": attack(b"]" * 10_000 + b"a" * 9_999),
    "list in itself": attack(b"]\x94h\x00a"),
    "marks": attack(b"(" * 100_000),
    "many objects": attack(b"(" + b"}" * 200_000 + b"t"),
    "memo of one value": attack(b"N" + b"\x94" * 1_000_000),
    "huge text": attack(b"X\xff\xff\xff\xffabc"),
    "huger text": attack(b"\x8d" + b"\xff" * 8 + b"abc"),
    "huge bytes": attack(b"B\xff\xff\xff\xffabc"),
    "huger bytes": attack(b"\x8e" + b"\xff" * 8 + b"abc"),
    "huge bytearray": attack(b"\x96" + b"\xff" * 8 + b"abc"),
    "huge integer": attack(b"\x8b\xff\xff\xff\x7f" + b"\xff" * 100_000),
    "long integer": attack(b"\x8a\xff" + b"\xff" * 255),
    "integer in digits": attack(b"I" + b"9" * 100_000 + b"\n"),
    "long in digits": attack(b"L" + b"9" * 100_000 + b"L\n"),
    "float": attack(b"G" + bytes(8)),
    "float in digits": attack(b"F1.0\n"),
    "text by line": attack(b"Vabc\n"),
    "string": attack(b"S'abc'\n"),
    "short string": attack(b"U\x03abc"),
    "dict by mark": attack(b"(d"),
    "memo by line": attack(b"Np0\n"),
    "duplicate": attack(b"N2\x86"),
    "pop": attack(b"NN0"),
    "pop to the mark": attack(b"N(N1"),
    "set": attack(b"\x8f"),
    "frozen set": attack(b"(\x91"),
    "buffer": attack(b"\x97"),
    "buffer to read": attack(b"N\x98"),
    "text no UTF-8": attack(b"X\x01\0\0\0\xff"),
    "text of a surrogate": attack(b"X\x03\0\0\0\xed\xa0\x80"),
    "frame beyond the end": attack(b"\x95" + b"\xff" * 8 + b"N"),
    "begins twice": attack(b"\x80\x04N"),
    "protocol 0": b"N.",
    "protocol 1": b"\x80\x01N.",
    "protocol 6": b"\x80\x06N.",
    "None": attack(b"N"),
    "trailing bytes": attack(b"N") + b"N.",
    "two values": attack(b"NN"),
    "nothing": attack(),
    "empty": b"",
    "one byte": b"\x80",
    "zeros": bytes(1000),
    "stops never": b"\x80\x04" + b"N" * 1000,
}  # fmt: skip
PICKLES = {**RUNS, **OTHERS}


def test_there_are_many() -> None:
    assert len(PICKLES) >= 80


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


_CONTROL = """
import json, os, pickle, sys
ran = []
for name, payload in json.load(sys.stdin).items():
    try:
        pickle.loads(bytes.fromhex(payload))
    except Exception:
        pass
    if os.path.exists(sys.argv[1]):
        ran.append(name)
        os.remove(sys.argv[1])
print(json.dumps(ran))
"""


@pytest.mark.slow
def test_payloads_run_with_the_unpickler_of_python() -> None:
    """The control: without it, tests that nothing runs would say nothing."""
    given = json.dumps({name: payload.hex() for name, payload in RUNS.items()})
    done = subprocess.run(
        [sys.executable, "-c", _CONTROL, SENTINEL], input=given, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == list(RUNS)


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_metadata_is_refused_and_does_nothing(name: str, here: Path) -> None:
    refusal(lambda: parse_metadata(PICKLES[name], SIZES), BadDcp)
    assert not any(here.iterdir())


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickle_of_a_tensor_is_refused_and_does_nothing(name: str, here: Path) -> None:
    require_malformed(written({**RECORDS, "data.pkl": PICKLES[name]}))
    assert not any(here.iterdir())


# ---- what else torch would run, in files that are whole otherwise


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (COMMAND,)

    def __hash__(self) -> int:
        return 1


class EvilState(BytesStorageMetadata):
    """A class of ours in the place of torch's."""


def metadata() -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((2, 3))) for at in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size((4, 3)), chunks)
    storage = {
        MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 1000),
        MetadataIndex("w", [2, 0], 1): _StorageInfo("__1_0.distcp", 0, 1000),
        MetadataIndex("o"): _StorageInfo("__1_0.distcp", 1000, 1000),
    }
    meta = StorageMeta(pathlib.Path("/somewhere"), "id", None, [])
    entries = {"w": entry, "o": BytesStorageMetadata()}
    return Metadata(entries, {"w": ("w",), "o": ("o", 0)}, storage, meta, "1.0.0")


def replaced(value: Any, path: str, new: Any) -> None:
    """Put something at a place of metadata: attributes by dots, items by brackets."""
    *steps, last = re.findall(r"\w+|\[\w+\]", path)
    for step in steps:
        value = item_of(value, step)
    if last.startswith("["):
        value[int(last[1:-1]) if last[1:-1].isdigit() else last[1:-1]] = new
    else:
        object.__setattr__(value, last, new)


def item_of(value: Any, step: str) -> Any:
    if not step.startswith("["):
        return getattr(value, step)
    return value[int(step[1:-1]) if step[1:-1].isdigit() else step[1:-1]]


@pytest.mark.parametrize(
    "path",
    [
        "planner_data", "planner_data[w]", "storage_meta", "storage_meta.checkpoint_id", "storage_meta.modules",
        "version", "extra", "state_dict_metadata", "state_dict_metadata[w]", "state_dict_metadata[w].size",
        "state_dict_metadata[w].chunks", "state_dict_metadata[w].chunks[0]",
        "state_dict_metadata[w].chunks[1].sizes", "state_dict_metadata[o]",
        "state_dict_metadata[w].properties", "state_dict_metadata[w].properties.dtype", "storage_data",
    ],
)  # fmt: skip
def test_object_that_runs_is_refused_wherever_it_stands(path: str, here: Path) -> None:
    found = metadata()
    assert parse_metadata(pickle.dumps(found), SIZES).others == ("o",)
    replaced(found, path, Evil())
    refusal(lambda: parse_metadata(pickle.dumps(found), SIZES), BadDcp)
    assert not any(here.iterdir())


@pytest.mark.parametrize("where", ["key", "name", "offset", "place", "class"])
def test_object_that_runs_is_refused_among_the_places(where: str, here: Path) -> None:
    found = metadata()
    index, info = next(iter(found.storage_data.items()))
    if where == "key":
        found.storage_data[Evil()] = info
    elif where == "name":
        object.__setattr__(index, "fqn", Evil())
    elif where == "offset":
        object.__setattr__(index, "offset", Evil())
    elif where == "place":
        info.length = Evil()
    else:
        found.state_dict_metadata["o"] = EvilState()
    refusal(lambda: parse_metadata(pickle.dumps(found), SIZES), BadDcp)
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    "value", [Evil(), [torch.ones(3), Evil()], {"a": Evil()}], ids=["alone", "listed", "named"]
)
def test_saved_object_that_runs_is_refused(value: object, here: Path) -> None:
    require_malformed(saved(value))
    assert not any(here.iterdir())


# ---- descriptions that cost


@pytest.mark.slow
def test_chunks_that_many_tensors_share_are_not_looked_at_for_each() -> None:
    """A pickle tells of 4,000 tensors with the same 4,000 chunks in the size of both: 16 million to look at."""
    found = metadata()
    chunks = [ChunkStorageMetadata(torch.Size((at,)), torch.Size((1,))) for at in range(4000)]
    properties = TensorProperties(dtype=torch.bfloat16)
    entry = TensorStorageMetadata(properties, torch.Size((4000,)), chunks)
    found.state_dict_metadata = {f"{number:04}": entry for number in range(4000)}
    found.storage_data = {
        MetadataIndex("0000", [at]): _StorageInfo("__0_0.distcp", at * 10, 10) for at in range(4000)
    }
    data = pickle.dumps(found)
    assert len(data) < 600_000
    refusal(lambda: parse_metadata(data, SIZES), BadDcp)


@pytest.mark.slow
def test_cuts_that_make_many_cells_are_refused_soon() -> None:
    found = metadata()
    boxes = [((0, at), (1000, 1)) for at in range(1000)] + [((at, 1000), (1, 1)) for at in range(1000)]
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
    properties = TensorProperties(dtype=torch.uint8)
    found.state_dict_metadata = {"w": TensorStorageMetadata(properties, torch.Size((1000, 1001)), chunks)}
    found.storage_data = {
        MetadataIndex("w", at): _StorageInfo("__0_0.distcp", number * 2000, 2000)
        for number, (at, _) in enumerate(boxes)
    }
    error = refusal(lambda: parse_metadata(pickle.dumps(found), {"__0_0.distcp": 2**30}), BadDcp)
    assert "too irregularly" in str(error)


@pytest.mark.parametrize(
    "path", ["version", "state_dict_metadata[w].size", "storage_data", "state_dict_metadata[w]"]
)
def test_deep_value_is_refused_wherever_it_stands(path: str) -> None:
    """By what looks at it, not by the machine: nothing there recurses."""
    marker = "0123456789"
    deep = b")" + b"\x85" * 100_000
    found = metadata()
    found.planner_data = [f"{number}" * 9000 for number in range(100)]  # a pickle has objects by its size
    replaced(found, path, marker)
    whole = re.sub(rb"\x95.{8}", b"", pickle.dumps(found, 4), flags=re.DOTALL)
    data = whole.replace(b"\x8c\x0a" + marker.encode(), deep)
    assert len(data) > len(deep)
    error = refusal(lambda: parse_metadata(data, SIZES), BadDcp)
    assert "its pickle" not in str(error)


TINY = [
    b"]NNNN",
    b"}NNNN",
    b"]\x94\x94\x94\x94",
    b"X\x02\0\0\0ab",
    b"\x8c\x02ab",
    b"M\xff\xff",
    b"h\x00)R\x94",
    b"h\x00)\x81\x94",
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", TINY)
def test_pickle_takes_at_most_23_times_its_bytes(unit: bytes) -> None:
    """The worst that the machine lets through: lists, dicts, texts and objects as small as they can be told."""
    size = 10_000_000
    pieces = (b"(" + unit * 3000 + b"e") * (size // (len(unit) * 3000))
    data = attack(named("torch", "Size"), b"\x94]", pieces)
    known = [pickled.Global("torch", "Size")]
    attempt = attempted(lambda: pickled.loads(data, known))
    assert isinstance(attempt.error, Malformed)  # two values on the stack, told at the end
    assert attempt.num_bytes < 23 * len(data)


# ---- containers


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def written(records: dict[str, bytes], folder: str = "archive") -> bytes:
    """A container with these records, as torch's own writer makes it."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return file.getvalue()


RECORD = saved(torch.arange(600, dtype=torch.int64))
with zipfile.ZipFile(io.BytesIO(RECORD)) as _archive:
    RECORDS = {
        info.filename.partition("/")[2]: _archive.read(info)
        for info in _archive.infolist()
        if not info.filename.endswith(("/version", "/serialization_id"))
    }
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def read(record: bytes) -> Saved:
    return read_saved(lambda offset, count: record[offset : offset + count], len(record))


def require_malformed(record: bytes) -> str:
    attempt = attempted(lambda: read(record))
    assert isinstance(attempt.error, Malformed), repr(attempt.error)
    assert not attempt.deeds
    assert attempt.num_bytes <= MOST_BYTES
    message = str(attempt.error)
    assert tiny.is_plain(message) and len(message) < 1000
    return message


def patched(signature: bytes, name: str, offset: int, new: bytes, record: bytes = RECORD) -> bytes:
    """The header of this kind that belongs to a record, with other bytes at an offset."""
    at = -1
    name_at = {LOCAL: 30, CENTRAL: 46}[signature]
    while True:
        at = record.index(signature, at + 1)
        if record[at + name_at :].startswith(f"archive/{name}".encode()):
            return record[: at + offset] + new + record[at + offset + len(new) :]


def both(name: str, local_offset: int, central_offset: int, new: bytes) -> bytes:
    return patched(CENTRAL, name, central_offset, new, patched(LOCAL, name, local_offset, new))


def zipped(method: int, records: dict[str, bytes] = RECORDS) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in {**records, "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def with_ends(*numbers: tuple[int, str, tuple[Any, ...]]) -> bytes:
    """Other numbers at these offsets of the ends."""
    ends = bytearray(RECORD[-98:])
    for offset, layout, values in numbers:
        struct.pack_into(layout, ends, offset, *values)
    return RECORD[:-98] + bytes(ends)


def with_directory_moved(between: bytes) -> bytes:
    """Something between the records and the directory, and the ends tell where it is now."""
    begin = RECORD.index(CENTRAL)
    ends = bytearray(RECORD[-98:])
    struct.pack_into("<Q", ends, 48, begin + len(between))
    struct.pack_into("<Q", ends, 64, len(RECORD) - 98 + len(between))
    struct.pack_into("<I", ends, 92, begin + len(between))
    return RECORD[:begin] + between + RECORD[begin:-98] + bytes(ends)


def offset_of(name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(RECORD)) as archive:
        return struct.pack("<I", archive.getinfo(f"archive/{name}").header_offset)


CONTAINERS: dict[str, bytes] = {
    "stored by zipfile": zipped(zipfile.ZIP_STORED),
    "compressed": zipped(zipfile.ZIP_DEFLATED),
    "bomb": zipped(zipfile.ZIP_DEFLATED, {**RECORDS, "data.pkl": bytes(50_000_000)}),
    "bomb of bzip2": zipped(zipfile.ZIP_BZIP2, {**RECORDS, "data/0": bytes(50_000_000)}),
    "method 8 in both headers": both("data/0", 8, 10, b"\x08\0"),
    "method 8 in the directory": patched(CENTRAL, "data/0", 10, b"\x08\0"),
    "method 8 before the bytes": patched(LOCAL, "data/0", 8, b"\x08\0"),
    "encrypted": both("data/0", 6, 8, b"\x09\x08"),
    "masked headers": both("data/0", 6, 8, b"\x08\x28"),
    "two pickles": written({**RECORDS, "data.pkk": RECORDS["data.pkl"]}).replace(b"data.pkk", b"data.pkl"),
    "two values": written({**RECORDS, "data/x": RECORDS["data/0"]}).replace(b"data/x", b"data/0"),
    "no pickle": written({name: data for name, data in RECORDS.items() if name != "data.pkl"}),
    "no values": written({name: data for name, data in RECORDS.items() if name != "data/0"}),
    "no version": RECORD.replace(b"archive/version", b"archive/versiom"),
    "more values": written({**RECORDS, "data/1": b"12345678"}),
    "code": written({**RECORDS, "code/evil.py": b"import os"}),
    "path up": written({**RECORDS, "../../evil": b""}),
    "two folders": patched(LOCAL, "data/0", 30, b"archivf", patched(CENTRAL, "data/0", 46, b"archivf")),
    "another name before the bytes": patched(LOCAL, "data.pkl", 30, b"archive/data.pkk"),
    "another name in the directory": patched(CENTRAL, "data.pkl", 46, b"archive/data.pkk"),
    "names swapped in the directory": patched(CENTRAL, "byteorder", 46, b"archive/byteordes"),
    "another size in the directory": patched(CENTRAL, "data/0", 20, struct.pack("<2I", 4801, 4801)),
    "two sizes in the directory": patched(CENTRAL, "data/0", 20, struct.pack("<I", 4801)),
    "a size before the bytes": patched(LOCAL, "data/0", 18, struct.pack("<2I", 4800, 4800)),
    "size of 32 bits full": patched(CENTRAL, "data/0", 20, b"\xff" * 8),
    "another CRC before the bytes": patched(LOCAL, "data.pkl", 14, b"1234"),
    "another CRC in the directory": patched(CENTRAL, "data.pkl", 16, b"1234"),
    "values where the pickle is": patched(CENTRAL, "data/0", 42, offset_of("data.pkl")),
    "pickle where the values are": patched(CENTRAL, "data.pkl", 42, offset_of("data/0")),
    "offset beyond the end": patched(CENTRAL, "data/0", 42, struct.pack("<I", 2**31)),
    "offset of 32 bits full": patched(CENTRAL, "data/0", 42, b"\xff" * 4),
    "comment of a record": patched(CENTRAL, "data/0", 32, b"\x01"),
    "extra of a record": patched(CENTRAL, "data/0", 30, b"\x14"),
    "name longer than the directory": patched(CENTRAL, "data/0", 28, b"\xff\xff"),
    "other disk": patched(CENTRAL, "data/0", 34, b"\x01"),
    "padding with something in it": RECORD.replace(b"ZZZZ", b"ZZAZ", 1),
    "padding beyond the end": patched(LOCAL, "data/0", 28, b"\xff\xff"),
    "padding less than none": patched(LOCAL, "data/0", 28, b"\x01\0"),
    "something before": b"PK\x03\x04" + RECORD,
    "something behind": RECORD + b"\0",
    "another ZIP behind": RECORD + RECORD,
    "comment": RECORD[:-2] + b"\x01\0x",
    "gap before the directory": with_directory_moved(b"\0"),
    "record that the directory hides": with_directory_moved(RECORD[: RECORD.index(LOCAL, 4)]),
    "number of records": RECORD[:-98] + RECORD[-98:-74] + b"\xff" * 16 + RECORD[-58:],
    "directory beyond the end": RECORD[:-98] + RECORD[-98:-58] + b"\xff" * 16 + RECORD[-42:],
    "directory of no record": RECORD[:-74] + bytes(24) + struct.pack("<Q", len(RECORD) - 98) + RECORD[-42:],
    "one record more": with_ends((24, "<2Q", (8, 8)), (84, "<2H", (8, 8))),
    "one record less": with_ends((24, "<2Q", (6, 6)), (84, "<2H", (6, 6))),
    "two numbers of records": with_ends((24, "<Q", (6,))),
    "number of records in 32 bits": with_ends((84, "<2H", (6, 6))),
    "size of the end": with_ends((4, "<Q", (45,))),
    "version": with_ends((12, "<H", (0,))),
    "disk": with_ends((16, "<I", (1,))),
    "disks": with_ends((72, "<I", (2,))),
    "end elsewhere": with_ends((64, "<Q", (0,))),
    "signature of the end": with_ends((76, "<4s", (b"PK\5\7",))),
    "directory elsewhere in 32 bits": with_ends((92, "<I", (0,))),
    "size of the directory in 32 bits": with_ends((88, "<I", (0,))),
    "end of 32 bits only": RECORD[:-98] + RECORD[-22:],
    "big endian": written({**RECORDS, "byteorder": b"big"}),
    "byteorder with more": written({**RECORDS, "byteorder": b"little\n"}),
    "other format": written({**RECORDS, ".format_version": b"2"}),
    "other version": RECORD.replace(b"3\nPK", b"4\nPK"),
    "pickle of another CRC": RECORD.replace(b"\3\0\0\0cpu", b"\3\0\0\0cpv"),
    "large pickle": written({**RECORDS, "data.pkl": RECORDS["data.pkl"] + bytes(100_000)}),
    "large format_version": written({**RECORDS, ".format_version": bytes(100_000)}),
    "values before the pickle": written(dict(reversed(RECORDS.items()))).replace(b"data/0", b"data/1"),
    "nothing": b"",
    "end only": RECORD[-98:],
    "zeros": bytes(5000),
    "pickle alone": RECORDS["data.pkl"],
}  # fmt: skip


def test_containers_begin_with_one_that_is_good() -> None:
    assert read(RECORD)[:2] == ("I64", (600,))
    assert read(written(RECORDS))[:2] == ("I64", (600,))
    assert RECORD[read(RECORD).begin :].startswith(RECORDS["data/0"])


@pytest.mark.parametrize("name", CONTAINERS)
def test_container_that_is_not_torchs_is_refused(name: str) -> None:
    assert CONTAINERS[name] != RECORD
    require_malformed(CONTAINERS[name])


def test_large_records_are_not_even_read() -> None:
    for name, message in (("data.pkl", "too far"), (".format_version", "too far")):
        large = written({**RECORDS, name: RECORDS[name] + bytes(10_000_000)})
        reads: list[int] = []

        def piece(offset: int, count: int, it: bytes = large, into: list[int] = reads) -> bytes:
            into.append(count)
            return it[offset : offset + count]

        with pytest.raises(Malformed, match=message):
            read_saved(piece, len(large))
        assert sum(reads) <= 80 * 1024


def test_directory_larger_than_4_gib_is_refused() -> None:
    size = 2**34
    ends = bytearray(RECORD[-98:])
    struct.pack_into("<2Q", ends, 40, 2**33, size - 98 - 2**33)
    with pytest.raises(Malformed, match="does not end"):
        read_saved(lambda offset, count: bytes(count - 98) + ends, size)


def test_record_cut_off_anywhere_is_refused() -> None:
    for length in range(len(RECORD)):
        with pytest.raises(Malformed):
            read(RECORD[:length])


def told(old: bytes, new: bytes) -> bytes:
    """The record, with something else in its pickle."""
    assert RECORDS["data.pkl"].count(old) == 1
    return written({**RECORDS, "data.pkl": RECORDS["data.pkl"].replace(old, new)})


LONG = Global("torch", "LongStorage")
TOLD: dict[str, bytes] = {
    "other storage": told(b"LongStorage", b"IntStorage"),
    "unknown storage": told(b"LongStorage", b"TypedStorage"),
    "dtype as a storage": told(b"ctorch\nLongStorage\n", b"ctorch\nint64\n"),
    "untyped storage": told(b"ctorch\nLongStorage\n", b"ctorch.storage\nUntypedStorage\n"),
    "storage of another name": told(b"X\x07\0\0\0storage", b"X\x07\0\0\0storags"),
    "other key": told(b"X\x01\0\0\x000", b"X\x01\0\0\x001"),
    "key as a number": told(b"X\x01\0\0\x000", b"K\x00N\x85"),
    "offset": told(b"QK\x00", b"QK\x01"),
    "offset that is true": told(b"QK\x00", b"Q\x89"),
    "v3 without a dtype": told(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
    "parameter of nothing": told(b"_rebuild_tensor_v2", b"_rebuild_parameter"),
    "requires_grad as a number": told(b"\x89ccollections", b"K\x00ccollections"),
    "hooks as a dict": told(b"ccollections\nOrderedDict\n", b"ctorch\nLongStorage\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_pickle_that_tells_of_another_tensor_is_refused(name: str) -> None:
    require_malformed(TOLD[name])


def tensor_pickle(storage: object = ("storage", LONG, "0", "cpu", 600), **parts: object) -> bytes:
    """data.pkl of the record, with other parts."""
    hooks = Made(Global("collections", "OrderedDict"), called=True)
    of = Global("torch._utils", "_rebuild_tensor_v2")
    plain = {"offset": 0, "shape": (600,), "strides": (1,), "requires_grad": False, "hooks": hooks}
    args = (Persistent(storage), *{**plain, **parts}.values())
    return pickled.dumps(Made(of, args, called=True), 2)


SHAPES: dict[str, dict[str, object]] = {
    "shape as a list": {"shape": [600]},
    "shape that is true": {"shape": (600, True), "strides": (1, 1)},
    "negative shape": {"shape": (-20, -30), "strides": (-30, 1)},
    "shape of texts": {"shape": ("600",)},
    "shape of nothing": {"shape": None},
    "strides as a list": {"strides": [1]},
    "negative strides": {"shape": (1, 600), "strides": (-600, 1)},
    "strides that are true": {"strides": (True,)},
    "too few strides": {"strides": ()},
    "too many strides": {"strides": (1, 1)},
    "offset of nothing": {"offset": None},
    "offset that is false": {"offset": False},
    "storage as a list": {"storage": ["storage", LONG, "0", "cpu", 600]},
    "storage with more": {"storage": ("storage", LONG, "0", "cpu", 600, None)},
    "storage of a text": {"storage": "storage"},
    "storage on no device": {"storage": ("storage", LONG, "0", None, 600)},
    "storage of nothing": {"storage": ("storage", None, "0", "cpu", 600)},
    "one more argument": {"metadata": {}},
}


@pytest.mark.parametrize("name", SHAPES)
def test_pickle_with_parts_of_other_types_is_refused(name: str) -> None:
    assert read(written({**RECORDS, "data.pkl": tensor_pickle()})) == read(RECORD)
    require_malformed(written({**RECORDS, "data.pkl": tensor_pickle(**SHAPES[name])}))  # type: ignore[arg-type]


# ---- fuzz


def mutated(rng: random.Random, data: bytes, changes: tuple[fuzz_driver.Change, ...]) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(changes)(rng, data, rng.randrange(len(data) + 1))
    return data[: rng.randrange(len(data))] if data and rng.random() < 0.05 else data


CHANGES = (
    fuzz_driver.bit_flipped, fuzz_driver.byte_replaced, fuzz_driver.slice_deleted, fuzz_driver.slice_doubled,
    fuzz_driver.slice_moved,
)  # fmt: skip


def is_sound(found: DcpContents) -> bool:
    """Whether the tensors of tiny metadata are tiled, by counting, and their places are there."""
    for entry in found.tensors.values():
        if torch.Size(entry.shape).numel() > 10_000:
            continue  # it takes a lot of luck
        counts = torch.zeros(entry.shape, dtype=torch.int64)
        for offsets, sizes in entry.chunks:
            counts[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
        if not bool((counts == 1).all()):
            return False
    places = [place for entry in found.tensors.values() for place in entry.places]
    return all(place.offset + place.length <= SIZES[place.file] for place in places)


@pytest.mark.slow
def test_metadata_with_any_bit_flipped_or_cut_off_is_sound_or_refused() -> None:
    data = pickle.dumps(metadata())
    for at in range(len(data)):
        for bit in range(8):
            changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                assert is_sound(parse_metadata(changed, SIZES))
            except BadDcp as error:
                assert tiny.is_plain(str(error))
        with pytest.raises(BadDcp):
            parse_metadata(data[:at], SIZES)


@pytest.mark.slow
def test_changed_metadata_is_sound_or_refused(often: Callable[[int, int], int]) -> None:
    rng, data = random.Random(1), pickle.dumps(metadata())
    num_taken = 0
    for _ in range(often(20_000, 2_000_000)):
        changed = mutated(rng, data, CHANGES)
        try:
            assert is_sound(parse_metadata(changed, SIZES))
            num_taken += 1
        except BadDcp as error:
            assert tiny.is_plain(str(error)) and len(str(error)) < 3000
    assert num_taken


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5), (600,), (0,)], ids=str)
def test_record_with_any_bit_flipped_is_read_alike_or_refused(shape: tuple[int, ...]) -> None:
    """But for the values, and the id that nobody reads."""
    record = saved(torch.zeros(shape, dtype=torch.bfloat16))
    wanted = read(record)
    for at in range(len(record)):
        for bit in range(8):
            try:
                assert read(record[:at] + bytes([record[at] ^ 1 << bit]) + record[at + 1 :]) == wanted
            except Malformed as error:
                assert tiny.is_plain(str(error))


@pytest.mark.slow
def test_changed_record_is_read_alike_or_refused(often: Callable[[int, int], int]) -> None:
    rng, record = random.Random(2), saved(torch.zeros(3, 5, dtype=torch.float8_e4m3fn))
    wanted = read(record)
    for _ in range(often(20_000, 2_000_000)):
        with contextlib.suppress(Malformed):
            assert read(mutated(rng, record, CHANGES)) == wanted


@pytest.mark.slow
def test_changed_pickle_of_a_tensor_is_read_alike_or_refused(often: Callable[[int, int], int]) -> None:
    """In a container that is right, so that only the pickle is between it and us."""
    rng = random.Random(3)
    for _ in range(often(10_000, 500_000)):
        changed = mutated(rng, RECORDS["data.pkl"], CHANGES)
        try:
            dtype, shape = torchfile._told(changed)
        except Malformed as error:
            assert tiny.is_plain(str(error))
            continue
        assert dtype in torchfile.DTYPES
        assert all(type(length) is int and length >= 0 for length in shape)
