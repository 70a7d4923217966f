"""What we put around a tensor's values is what torch.save puts there; torch and zipfile read it."""

from __future__ import annotations

import io
import zipfile
import zlib

import pytest
import torch
from torch import Tensor

from dsv4ckpt import torchfile

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


def test_frame_of_a_tensor_beyond_4_gib_counts_in_64_bits() -> None:
    """The records are read by zipfile, from a file that is sparse where the values are."""
    shape = (2**16, 2**16 + 1)
    frame = torchfile.frame("U8", shape)
    end = torchfile.suffix(frame, 0)
    assert frame.values_bytes == shape[0] * shape[1] > 2**32

    class Sparse(io.RawIOBase):
        position, size = 0, len(frame.prefix) + frame.values_bytes + len(end)

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset + (0, self.position, self.size)[whence]
            return self.position

        def tell(self) -> int:
            return self.position

        def read(self, count: int = -1) -> bytes:
            count = self.size - self.position if count < 0 else count
            assert count < 2**20
            found = bytearray()
            for at in range(self.position, min(self.size, self.position + count)):
                behind = at - len(frame.prefix) - frame.values_bytes
                found.append(
                    frame.prefix[at] if at < len(frame.prefix) else end[behind] if behind >= 0 else 0
                )
            self.position += len(found)
            return bytes(found)

    with zipfile.ZipFile(Sparse()) as archive:  # type: ignore[type-var]
        values = archive.getinfo("archive/data/0")
        assert values.file_size == values.compress_size == frame.values_bytes
        assert archive.read("archive/version") == b"3\n"
