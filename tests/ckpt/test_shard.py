"""Headers written by us are read by safetensors, headers written by safetensors are read by us."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import deserialize, safe_open
from safetensors.torch import save_file

from dsv4ckpt import formats, shard
from dsv4ckpt.errors import BadHeader, SourceChanged
from dsv4ckpt.formats import MAX_TENSORS

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
SHAPES: tuple[formats.Shape, ...] = ((), (0,), (1,), (7,), (3, 5), (2, 0, 4), (2, 3, 1, 2), (1,) * 8)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "file.safetensors"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    yield path, fd
    os.close(fd)


def header(path: Path) -> shard.Header:
    with path.open("rb") as file:
        return shard.read_header(file.fileno(), path.name)


def test_dtype_bits_cover_every_torch_dtype_of_safetensors() -> None:
    assert set(formats.DTYPE_BITS) == {*DTYPES, "F4"}
    for name, dtype in DTYPES.items():
        assert formats.DTYPE_BITS[name] == 8 * dtype.itemsize


def test_encode_header_every_dtype_and_shape_is_read_back_by_safetensors() -> None:
    tensors = [(f"{dtype}.{number}", dtype, shape) for dtype in DTYPES for number, shape in enumerate(SHAPES)]
    size = sum(formats.stored_bytes(dtype, shape) for _, dtype, shape in tensors)
    read = deserialize(shard.encode_header(tensors, {"format": "pt"}) + bytes(size))
    assert {(name, fields["dtype"], tuple(fields["shape"])) for name, fields in read} == set(tensors)


def test_encode_header_f4_is_read_back_by_safetensors_as_half_bytes() -> None:
    ((name, fields),) = deserialize(shard.encode_header([("codes", "F4", (3, 64))]) + bytes(96))
    assert (name, fields["dtype"], len(fields["data"])) == ("codes", "F4", 96)


@pytest.mark.parametrize(
    "name", ["a", "layers.0.attn.wq_a.weight", 'with "quotes" and \\', "\u00e9\u4e2d", "\U0001f600"]
)
def test_encode_header_name_survives_both_readers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(shard.encode_header([(name, "U8", (3,))]) + b"abc")
    with safe_open(path, "np") as reference:
        assert list(reference.keys()) == [name]
    assert list(header(path).entries) == [name]


def test_encode_header_is_the_canonical_text_and_padded_to_eight_bytes() -> None:
    text = b'{"__metadata__":{"a":"1","b":"2"},"y":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    text += b'"x":{"dtype":"U8","shape":[],"data_offsets":[24,25]}}'
    made = shard.encode_header([("y", "F32", (2, 3)), ("x", "U8", ())], {"b": "2", "a": "1"})
    padded = text + b" " * (-len(text) % 8)
    assert made == struct.pack("<Q", len(padded)) + padded


@pytest.mark.parametrize("length", range(1, 18))
def test_encode_header_data_starts_at_a_multiple_of_eight(length: int) -> None:
    assert len(shard.encode_header([("n" * length, "U8", (1,))])) % 8 == 0


def test_encode_header_equal_arguments_give_equal_bytes() -> None:
    tensors = [(f"layers.{layer}.weight", "BF16", (layer + 1, 2)) for layer in range(200)]
    one = shard.encode_header(iter(tensors), {"format": "pt", "other": "x"})
    two = shard.encode_header(list(tensors), {"other": "x", "format": "pt"})
    assert one == two


def test_encode_header_without_tensors_is_a_file_for_both_readers(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(shard.encode_header([]))
    assert deserialize(path.read_bytes()) == []
    assert header(path).entries == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_header_of_save_file_finds_the_same_tensors_and_bytes(dtype: str, tmp_path: Path) -> None:
    tensors = {}
    for number, shape in enumerate(SHAPES):
        count = formats.num_elements(shape)
        raw = torch.arange(count * DTYPES[dtype].itemsize, dtype=torch.int64).to(torch.uint8) % 2
        tensors[f"t{number}"] = raw.view(DTYPES[dtype]).reshape(shape)
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found, data = header(path), path.read_bytes()
    assert found.metadata == {"format": "pt"}
    assert found.entries.keys() == tensors.keys()
    for name, entry in found.entries.items():
        stored = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (entry.dtype, entry.shape) == (dtype, tuple(tensors[name].shape))
        assert data[entry.begin : entry.end] == stored


def test_read_header_of_our_own_writer_lists_entries_in_order_of_their_bytes(tmp_path: Path) -> None:
    tensors = {"z": tiny.Tensor("U8", (2,), b"zz"), "a": tiny.Tensor("U8", (3,), b"aaa")}
    tiny.write_shard(tmp_path / "file", tensors)
    found = header(tmp_path / "file")
    assert list(found.entries) == ["z", "a"]
    assert [entry.end - entry.begin for entry in found.entries.values()] == [2, 3]


def test_read_header_json_order_does_not_matter(tmp_path: Path) -> None:
    fields = {"b": [4, 8], "a": [0, 4]}
    document = {
        name: {"dtype": "U8", "shape": [4], "data_offsets": offsets} for name, offsets in fields.items()
    }
    path = tmp_path / "file"
    path.write_bytes(tiny.packed(json.dumps(document).encode(), b"aaaabbbb"))
    assert list(header(path).entries) == ["a", "b"]


def test_read_header_sha256_changes_with_every_byte_of_the_header(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", set()
    for name in ("a", "b", "c"):
        path.write_bytes(shard.encode_header([(name, "U8", (1,))]) + b"x")
        seen.add(header(path).sha256)
    path.write_bytes(shard.encode_header([("a", "U8", (1,))]) + b"y")
    assert len(seen) == 3
    assert header(path).sha256 in seen  # data is not part of it


def test_read_into_fills_the_view_from_its_offset(opened: tuple[Path, int]) -> None:
    path, fd = opened
    path.write_bytes(bytes(range(256)))
    buffer = bytearray(300)
    shard.read_into(fd, memoryview(buffer)[10:110], 50, "file")
    assert buffer == bytes(10) + bytes(range(50, 150)) + bytes(190)


def test_read_into_short_reads_are_continued(
    opened: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = opened
    path.write_bytes(bytes(range(256)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    assert shard.read_exactly(fd, 256, 0, "file") == bytes(range(256))


def test_read_exactly_beyond_the_end_raises_source_changed(opened: tuple[Path, int]) -> None:
    path, fd = opened
    path.write_bytes(b"12345")
    with tiny.at_most(10), pytest.raises(SourceChanged, match="ended while it was read") as raised:
        shard.read_exactly(fd, 6, 0, "file")
    assert raised.value.facts["found"] == "5 bytes"


@pytest.mark.parametrize("left", [0, 7, 8, 20])
def test_read_header_of_a_file_truncated_meanwhile_raises_source_changed(
    left: int, opened: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = opened
    path.write_bytes(shard.encode_header([("a", "U8", (4,))]) + b"1234")
    whole = os.fstat

    def shrinking(fd: int) -> os.stat_result:
        status = whole(fd)
        os.truncate(path, left)
        return status

    monkeypatch.setattr(os, "fstat", shrinking)
    with tiny.at_most(10), pytest.raises(SourceChanged):
        shard.read_header(fd, "file")


def test_read_header_of_a_file_cut_before_is_a_bad_header(opened: tuple[Path, int]) -> None:
    path, fd = opened
    path.write_bytes((shard.encode_header([("a", "U8", (4,))]) + b"1234")[:-1])
    with pytest.raises(BadHeader, match="truncated"):
        shard.read_header(fd, "file")


# ---- what a header may cost

PEAK = """
import os, resource, sys
from dsv4ckpt import shard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    print(len(shard.read_header(fd, "file").entries))
except shard.BadHeader as error:
    print(error.what)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def cost_of(path: Path, header: bytes) -> tuple[str, int]:
    """What reading a header ends in, and the kilobytes that it needed at most."""
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    outcome, peak = done.stdout.splitlines()
    return outcome, int(peak)


def entries_of(count: int, name_chars: int) -> bytes:
    names = (f"x{number:07d}".ljust(name_chars, "n") for number in range(count))
    return b",".join(
        b'"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % name.encode() for name in names
    )


@pytest.mark.slow
def test_read_header_of_as_many_tensors_as_may_be_needs_300_mb_at_most(tmp_path: Path) -> None:
    outcome, kilobytes = cost_of(tmp_path / "file", b"{" + entries_of(MAX_TENSORS, 500) + b"}")
    assert outcome == str(MAX_TENSORS)
    assert kilobytes < 320_000


def test_read_header_of_more_tensors_than_any_checkpoint_has_is_refused_unparsed(
    opened: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b"{" + entries_of(MAX_TENSORS + 1, 8) + b"}"
    monkeypatch.setattr(shard.strictjson, "loads", lambda *rest, **options: pytest.fail("it was parsed"))
    with pytest.raises(BadHeader, match="more than 160,001 objects"):
        shard.parse_header(struct.pack("<Q", len(header)) + header, None, "file")
