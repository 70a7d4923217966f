"""A recorded forward pass on disk: tensors.safetensors, and dump.json with what it is.  Knows no model and no names.

Written as every output of ours: a temporary file, synced, renamed; dump.json comes last, so a directory that has it is
complete.  Read as strangers' files are: strict header, bounded JSON, every tensor's SHA-256 checked when it is read.
Nothing in a dump names a path, a host or a time: the same pass gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from dsv4ckpt import contained, formats, outdir, probe, shard, strictjson
from dsv4ckpt.errors import BadManifest, ForeignOutput, MissingFile, Usage
from dsv4ckpt.stop import StopFlag

from .layers import dtype_name
from .parity import Look

DUMP_NAME, TENSORS_NAME = "dump.json", "tensors.safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_OF_STORED = {stored: dtype for dtype, stored in DTYPES.items()}
_PIECE = 8 * 1024 * 1024  # bytes written, and looked for a signal, at once
_MAX_BYTES = 32 * 1024 * 1024
_LIMITS = strictjson.Limits(
    objects=formats.MAX_TENSORS + 100, lists=formats.MAX_TENSORS + 100, commas=12 * formats.MAX_TENSORS
)
_SHA256 = re.compile("[0-9a-f]{64}")
_AGAIN = "make the dump again"

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class About:
    """What was run, on what."""

    impl: str  # whose model: dsv4, transformers, or the name of your own
    dtype: str  # that it computed in, as torch names it
    ids_sha256: str
    ids_shape: tuple[int, int]
    checkpoint: dict[str, str] | None = None  # whatever tells one from another


def ids_sha256(ids: Ids) -> str:
    """SHA-256 of token ids, written as a JSON list of lists without blanks."""
    return hashlib.sha256(strictjson.compact([list(row) for row in ids])).hexdigest()


def about(impl: str, dtype: str, ids: Ids, checkpoint: dict[str, str] | None = None) -> About:
    """What a dump of a pass over these ids says of itself."""
    shape = (len(ids), len(ids[0]))
    return About(impl=impl, dtype=dtype, ids_sha256=ids_sha256(ids), ids_shape=shape, checkpoint=checkpoint)


def as_ids(ids: Ids) -> Tensor:
    """int64 [B, S]."""
    return torch.tensor([list(row) for row in ids], dtype=torch.int64)


def as_dtype(name: str) -> torch.dtype:
    """float32 -> torch.float32; any dtype that a dump can hold. raises KeyError"""
    return {dtype_name(dtype): dtype for dtype in DTYPES}[name]


# ---- writing


def require_free(path: str) -> None:
    """raises ForeignOutput, Environment unless a dump may go there: nothing, an empty directory, or one begun"""
    if not probe.is_there(path):
        return
    if not probe.is_directory(path):
        raise ForeignOutput(
            "the output is no directory",
            found=repr(os.path.basename(os.path.normpath(path))),
            do="choose a new directory",
        )
    with contained.io_errors("."):
        present = sorted(set(os.listdir(path)) - {formats.WORK_NAME})
    begun = probe.is_there(os.path.join(path, formats.WORK_NAME))
    if present and not (begun and set(present) <= {DUMP_NAME, TENSORS_NAME}):
        raise ForeignOutput(
            "the output directory is not empty",
            found=repr(present[0]) + (", ..." if len(present) > 1 else ""),
            do="choose a new directory, or remove this one",
        )


def write_dump(path: str, tensors: Mapping[str, Tensor], what: About, stop: StopFlag | None = None) -> int:
    """Write a dump into a directory that is absent or empty.

    tensors  in the order of execution; on the CPU, of the dtypes in DTYPES
    returns  bytes of the tensors
    raises   NoSpace, ForeignOutput, Environment, Interrupted; Usage for a dtype that dumps do not hold
    """
    stop = stop or StopFlag()
    _require_storable(tensors)
    header = shard.encode_header((name, DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    data_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    require_free(path)
    outdir.require_space(path, data_size, what="dump", do="make room, choose another disk, or dump less")
    request = [what.impl, what.dtype, what.ids_sha256, what.checkpoint or {}, [*tensors]]
    key = hashlib.sha256(strictjson.canonical(request)).hexdigest()
    with outdir.open_outdir(path, key, {DUMP_NAME, TENSORS_NAME}) as out:
        listed = []
        with out.new_file(TENSORS_NAME, len(header) + data_size) as sink:
            sink.write(header)
            for name, tensor in tensors.items():
                digest = hashlib.sha256()
                for piece in _pieces(tensor):
                    stop.check()
                    digest.update(piece)
                    sink.write(piece)
                listed.append(_line(name, tensor, digest.hexdigest()))
        out.publish_bytes(DUMP_NAME, strictjson.pretty(_document(what, listed)))
        out.clean()
    return data_size


def _require_storable(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise Usage(
                f"tensor {name!r} has a dtype that dumps do not hold",
                expected=", ".join(dtype_name(dtype) for dtype in DTYPES),
                found=dtype_name(tensor.dtype),
                do="cast it to one of these",
            )


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.reshape(-1)
    count = _PIECE // tensor.element_size()
    for begin in range(0, len(flat), count):
        piece = flat[begin : begin + count]
        data = bytearray(len(piece) * piece.element_size())
        torch.frombuffer(data, dtype=piece.dtype).copy_(piece)
        yield memoryview(data)


def _line(name: str, tensor: Tensor, sha256: str) -> dict[str, Any]:
    return {"name": name, "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "sha256": sha256}


def _document(what: About, listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": 1,
        "impl": what.impl,
        "dtype": what.dtype,
        "ids": {"shape": list(what.ids_shape), "sha256": what.ids_sha256},
        "checkpoint": what.checkpoint,
        "tensors": listed,
    }


# ---- reading


class Dump(Mapping[str, Tensor]):
    """Names in the order of execution; a tensor is read, and its SHA-256 checked, when it is asked for."""

    def __init__(self, fd: int, what: About, listed: dict[str, str], header: shard.Header) -> None:
        self._fd, self._sha256, self._entries = fd, listed, header.entries
        self.about = what
        self.looks = {
            name: Look(_OF_STORED[header.entries[name].dtype], header.entries[name].shape) for name in listed
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.looks)

    def __len__(self) -> int:
        return len(self.looks)

    def size_of(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._entries[name].end - self._entries[name].begin

    def __getitem__(self, name: str) -> Tensor:
        """raises BadManifest if the bytes are not those that dump.json vouches for; SourceChanged, Environment"""
        look, entry = self.looks[name], self._entries[name]
        tensor = torch.empty(look.shape, dtype=look.dtype)
        if not tensor.numel():
            return tensor
        data = bytearray(entry.end - entry.begin)
        with contained.io_errors(TENSORS_NAME):
            shard.read_into(self._fd, memoryview(data), entry.begin, TENSORS_NAME)
        if hashlib.sha256(data).hexdigest() != self._sha256[name]:
            raise BadManifest(
                f"tensor {name!r} is damaged: its bytes are not those that were written",
                file=TENSORS_NAME,
                expected=f"SHA-256 {self._sha256[name]}",
                do=_AGAIN,
            )
        return torch.frombuffer(data, dtype=look.dtype).view(look.shape)


@contextmanager
def open_dump(path: str) -> Iterator[Dump]:
    """A dump, open for reading. raises MissingFile, BadManifest, BadHeader, UnsafePath, Environment"""
    for name in (DUMP_NAME, TENSORS_NAME):
        if not probe.is_there(os.path.join(path, name)):
            raise MissingFile(
                "this is no finished dump" if probe.is_directory(path) else "there is no such directory",
                file=name,
                found=repr(os.path.basename(os.path.normpath(path))),
                do="name a directory that dsv4 dump has written to its end",
            )
    with contained.opened(path, DUMP_NAME, False) as fd:
        size = os.fstat(fd).st_size
        if size > _MAX_BYTES:
            _refuse("too large", f"at most {_MAX_BYTES:,} bytes", f"{size:,} bytes")
        what, listed = _parsed(shard.read_exactly(fd, size, 0, DUMP_NAME))
    with contained.opened(path, TENSORS_NAME, False) as fd:
        header = shard.read_header(fd, TENSORS_NAME)
        yield Dump(fd, what, _agreeing(listed, header), header)


def _parsed(data: bytes) -> tuple[About, list[dict[str, Any]]]:
    try:
        strictjson.require_modest(data, _LIMITS)
        document = strictjson.loads(data, floats=False)
    except strictjson.Malformed as error:
        _refuse(f"malformed: {error}")
    if _field(document, "format", int) != 1:
        _refuse("of a format that this version does not know", 1, document["format"])
    ids = _field(document, "ids", dict)
    shape = _field(ids, "shape", list)
    if len(shape) != 2 or any(type(length) is not int for length in shape):
        _refuse("wrong in `ids`", "a shape of two numbers", repr(shape)[:80])
    checkpoint = document.get("checkpoint")
    if checkpoint is not None and not (
        isinstance(checkpoint, dict) and all(isinstance(text, str) for text in checkpoint.values())
    ):
        _refuse("wrong in `checkpoint`", "null, or an object of texts", repr(checkpoint)[:80])
    what = About(
        impl=_field(document, "impl", str),
        dtype=_field(document, "dtype", str),
        ids_sha256=_digest(ids),
        ids_shape=(shape[0], shape[1]),
        checkpoint=checkpoint,
    )
    return what, _field(document, "tensors", list)


def _agreeing(listed: list[dict[str, Any]], header: shard.Header) -> dict[str, str]:
    """Name -> SHA-256, in the order of dump.json, which must list exactly what the file holds."""
    found: dict[str, str] = {}
    for line in listed:
        name = _field(line, "name", str)
        entry = header.entries.get(name)
        if entry is None or name in found:
            _refuse(f"of another tensors.safetensors: {name[:100]!r} is not in it, or listed twice")
        if (line.get("dtype"), line.get("shape")) != (entry.dtype, list(entry.shape)):
            told = f"{line.get('dtype')} {line.get('shape')}"[:100]
            _refuse(f"wrong about {name!r}", f"{entry.dtype} {list(entry.shape)}", told)
        if entry.dtype not in _OF_STORED:
            _refuse(f"about a dtype that dumps do not hold, of {name!r}", ", ".join(_OF_STORED), entry.dtype)
        found[name] = _digest(line)
    if len(found) != len(header.entries):
        more = next(name for name in header.entries if name not in found)
        _refuse(f"of another tensors.safetensors: it does not list {more!r}")
    return found


def _field(fields: Any, key: str, kind: type[Any]) -> Any:
    value = fields.get(key) if isinstance(fields, dict) else None
    if type(value) is not kind:
        _refuse(f"wrong in `{key}`", kind.__name__, repr(value)[:80])
    return value


def _digest(fields: Any) -> str:
    value: str = _field(fields, "sha256", str)
    if not _SHA256.fullmatch(value):
        _refuse("wrong in `sha256`", "64 hexadecimal digits", repr(value)[:80])
    return value


def _refuse(what: str, expected: object = None, found: object = None) -> NoReturn:
    raise BadManifest(f"dump.json is {what}", file=DUMP_NAME, expected=expected, found=found, do=_AGAIN)
