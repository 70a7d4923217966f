"""What we put around a tensor's values is what torch.save puts there; torch and zipfile read it, and we theirs."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsv4ckpt import torchfile
from dsv4ckpt.pickled import Malformed
from dsv4ckpt.torchfile import Saved, read_saved

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (7,),
    (0,),
    (3, 5),
    (2, 0, 4),
    (2, 3, 4),
    (1, 2, 3, 4),
    (300, 70000 // 300),
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def saved(dtype: str, tensor: Tensor) -> bytes:
    """The tensor in our frame."""
    frame, data = torchfile.frame(dtype, tuple(tensor.shape)), bytes_of(tensor)
    end = torchfile.suffix(frame, zlib.crc32(data))
    assert len(end) == frame.suffix_bytes
    assert len(frame.prefix) % 64 == 0
    return frame.prefix + data + end


def test_every_dtype_that_torch_can_save_is_tried() -> None:
    assert set(torchfile.DTYPES) == set(DTYPES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_framed_tensor_is_what_torch_save_writes(
    dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, wanted = random_tensor(DTYPES[dtype], shape), io.BytesIO()
    torch.save(tensor, wanted)
    with zipfile.ZipFile(wanted) as archive:  # half of the id is a hash of the C++ library's
        monkeypatch.setattr(
            torchfile, "_NAMES_HASH", int(archive.read("archive/.data/serialization_id")[:20])
        )
    made = saved(dtype, tensor)
    loaded = torch.load(io.BytesIO(made), weights_only=True)
    assert loaded.dtype == tensor.dtype
    assert loaded.shape == tensor.shape
    assert bytes_of(loaded) == bytes_of(tensor)
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.testzip() is None
    if torch.__version__.startswith("2.13."):  # others may write other records
        assert made == wanted.getvalue()


class Sparse(io.RawIOBase):
    """A frame with zeros between its ends, of any size."""

    def __init__(self, frame: torchfile.Frame) -> None:
        self.begin, self.end = frame.prefix, torchfile.suffix(frame, 0)
        self.behind = len(frame.prefix) + frame.values_bytes
        self.position, self.size = 0, self.behind + len(self.end)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        count = self.size - self.position if count < 0 else count
        found = self.piece(self.position, count)
        self.position += len(found)
        return found

    def piece(self, offset: int, count: int) -> bytes:
        assert count < 2**20
        found = bytearray()
        for at in range(offset, min(self.size, offset + count)):
            behind = at - self.behind
            found.append(self.begin[at] if at < len(self.begin) else self.end[behind] if behind >= 0 else 0)
        return bytes(found)


def test_frame_of_a_tensor_beyond_4_gib_counts_in_64_bits() -> None:
    """The records are read by zipfile, from a file that is sparse where the values are."""
    frame = torchfile.frame("U8", (2**16, 2**16 + 1))
    assert frame.values_bytes == 2**16 * (2**16 + 1) > 2**32
    with zipfile.ZipFile(Sparse(frame)) as archive:  # type: ignore[type-var]
        values = archive.getinfo("archive/data/0")
        assert values.file_size == values.compress_size == frame.values_bytes
        assert archive.read("archive/version") == b"3\n"
    # as torch 2.13 writes it: before the bytes, nothing is packed yet
    assert (
        b"archive/data/0\1\0\x10\0" + frame.values_bytes.to_bytes(8, "little") + bytes(8) + b"FB"
        in frame.prefix
    )


# ---- the way in


def saved_by_torch(value: object, where: str | io.BytesIO | None = None) -> bytes:
    file = where or io.BytesIO()
    torch.save(value, file)
    return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()


def read(record: bytes) -> Saved:
    return read_saved(lambda offset, count: record[offset : offset + count], len(record))


def written(records: dict[str, bytes]) -> bytes:
    """A container with these records, as torch's own writer makes it."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return file.getvalue()


def records_of(record: bytes) -> dict[str, bytes]:
    """Without those that torch's writer adds itself."""
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: data for name, data in found.items() if name not in ("version", ".data/serialization_id")}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_saves_is_read(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(DTYPES[dtype], shape)
    for value in (tensor, nn.Parameter(tensor, requires_grad=False)):
        record = saved_by_torch(value)
        found = read(record)
        assert found[:2] == (dtype, shape)
        assert record[found.begin : found.begin + tensor.nbytes] == bytes_of(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_write_is_read(dtype: str) -> None:
    tensor = random_tensor(DTYPES[dtype], (3, 5))
    assert read(saved(dtype, tensor)) == read(saved_by_torch(tensor))


def test_other_ways_to_save_the_same_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    ways = {
        "trained": saved_by_torch(tensor.clone().requires_grad_()),
        "trained parameter": saved_by_torch(nn.Parameter(tensor)),
        "detached": saved_by_torch(nn.Parameter(tensor).detach()),
        "to a file": saved_by_torch(tensor, str(tmp_path / "a b.c-1.pt")),
        "to a file with a long name": saved_by_torch(tensor, str(tmp_path / ("x" * 250 + ".pt"))),
        "dimension of one": saved_by_torch(tensor.view(3, 1, 4).transpose(0, 1).contiguous()),
        "strides of one": saved_by_torch(tensor.as_strided((1, 3, 4), (99, 4, 1))),
    }
    for name, record in ways.items():
        found = read(record)
        assert found.dtype == "F32", name
        assert record[found.begin : found.begin + 48] == bytes_of(tensor), name


def test_record_of_older_torch_is_read() -> None:
    """2.0 has neither byteorder nor what begins with a dot, 2.1 has the former."""
    wanted = records_of(saved_by_torch(torch.arange(12.0)))
    for missing in ({".format_version", ".storage_alignment"}, set(wanted) - {"data.pkl", "data/0"}):
        record = written({name: data for name, data in wanted.items() if name not in missing})
        found = read(record)
        assert (found.dtype, found.shape) == ("F32", (12,))
        assert record[found.begin : found.begin + 48] == wanted["data/0"]


def test_record_without_crc_is_read() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        record = saved_by_torch(torch.arange(12.0))
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(record).shape == (12,)


def test_record_with_another_alignment_is_read() -> None:
    with torch.utils.serialization.config.patch("save.storage_alignment", 4096):
        record = saved_by_torch(torch.arange(12.0))
    assert read(record).begin % 4096 == 0
    assert record[read(record).begin :][:48] == bytes_of(torch.arange(12.0))


@pytest.mark.parametrize("location", ["cuda:0", "cuda:17", "mps", "hpu", ""])
def test_device_says_nothing(location: str) -> None:
    records = records_of(saved_by_torch(torch.arange(12.0)))
    old, new = b"X\x03\0\0\0cpu", b"X" + len(location).to_bytes(4, "little") + location.encode()
    assert records["data.pkl"].count(old) == 1
    assert read(written({**records, "data.pkl": records["data.pkl"].replace(old, new)})).shape == (12,)


def test_tensor_beyond_4_gib_is_read_by_two_small_reads() -> None:
    sparse = Sparse(torchfile.frame("BF16", (3, 2**32 + 1)))
    reads = []

    def piece(offset: int, count: int) -> bytes:
        reads.append(count)
        return sparse.piece(offset, count)

    assert read_saved(piece, sparse.size) == ("BF16", (3, 2**32 + 1), len(sparse.begin))
    assert len(reads) == 2 and sum(reads) < 30_000


NOT_PLAIN: dict[str, tuple[str, Callable[[], object]]] = {
    "transposed": ("another order", lambda: torch.ones(2, 3).t()),
    "channels last": ("another order", lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    "part": ("for itself", lambda: torch.ones(4)[:3]),
    "end": ("for itself", lambda: torch.ones(4)[1:]),
    "every other": ("for itself", lambda: torch.ones(4)[::2]),
    "expanded": ("for itself", lambda: torch.ones(1).expand(4)),
    "viewed as another dtype": ("for itself", lambda: torch.ones(4).view(torch.int32)[:2]),
    "two": ("ZIP", lambda: [torch.ones(4), torch.ones(4)]),
    "a dict": ("plain tensor", lambda: {"a": torch.ones(4)}),
    "a number": ("not those of one", lambda: 3),
    "a storage": ("plain tensor", lambda: torch.ones(4).untyped_storage()),
    "sparse": ("ZIP", lambda: torch.eye(3).to_sparse()),
    "quantized": ("no place there", lambda: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8)),
    "complex128": ("no place there", lambda: torch.ones(4, dtype=torch.complex128)),
    "conjugated": ("plain tensor", lambda: torch.ones(4, dtype=torch.complex64).conj()),
    "with attributes": ("no place there", lambda: marked(nn.Parameter(torch.ones(4)))),
    "meta": ("not those of one", lambda: torch.ones(4, device="meta")),
    "rank 9": ("are none", lambda: torch.ones((1,) * 9)),
}  # fmt: skip


def marked(value: torch.Tensor) -> torch.Tensor:
    value.mark = "mine"  # type: ignore[attr-defined]
    return value


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_no_plain_tensor_is_refused(name: str) -> None:
    message, value = NOT_PLAIN[name]
    with pytest.raises(Malformed, match=message):
        read(saved_by_torch(value()))


def test_old_format_of_torch_save_is_refused() -> None:
    file = io.BytesIO()
    torch.save(torch.ones(4), file, _use_new_zipfile_serialization=False)
    with pytest.raises(Malformed, match="ZIP"):
        read(file.getvalue())
