"""Logical tensors as values, against numpy in float64 on the bytes of the files; and codes as they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from dsv4ckpt import names, source, survey
from dsv4ckpt.errors import NotFinite
from dsv4ckpt.formats import Target
from dsv4ckpt.roundtrip import chunks
from dsv4ckpt.values import Values

WQ_B, EXPERT, GATE = (
    "layers.0.attn.wq_b.weight",
    "layers.1.ffn.experts.3.w1.weight",
    "layers.0.ffn.gate.weight",
)
SINK, HASH, NORM = "layers.0.attn.attn_sink", "layers.0.ffn.gate.tid2eid", "layers.2.attn_norm.weight"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
RELEASES = ["flash", "flash-base", "v4.1-flash"]


# ---- the oracle: OCP MX v1.0 and OCP FP8 in numpy, on stored bytes


def e4m3(codes: Any) -> Any:
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes >> 7, -magnitude, magnitude)


@functools.cache
def stored(directory: Path, name: str) -> tiny.Tensor:
    return tiny.read_shard(tiny.shard_of(directory, name))[name]


def as_bytes(tensor: tiny.Tensor) -> Any:
    assert isinstance(tensor.data, bytes)
    return np.frombuffer(tensor.data, np.uint8)


def oracle(directory: Path, name: str) -> Any:
    """float64 [R, C] of a matrix in a released layout."""
    weight, scale = stored(directory, name), stored(directory, name.removesuffix("weight") + "scale")
    codes = as_bytes(weight).reshape(weight.shape)
    if weight.dtype == "I8":
        values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(codes.shape[0], -1)
    else:
        values = e4m3(codes)
    assert isinstance(scale.data, bytes)
    if scale.dtype == "F32":
        factors = np.frombuffer(scale.data, np.float32).astype(np.float64)
    else:
        factors = 2.0 ** (as_bytes(scale).astype(np.float64) - 127)
    factors = factors.reshape(scale.shape)
    high, wide = -(-values.shape[0] // scale.shape[0]), -(-values.shape[1] // scale.shape[1])
    high, wide = 1 << (high - 1).bit_length(), 1 << (wide - 1).bit_length()  # tiles are powers of two
    grid = np.kron(factors, np.ones((high, wide)))
    return values * grid[: values.shape[0], : values.shape[1]]


def to_bf16(values: Any) -> Any:
    """float64 -> float64 on the grid of bfloat16, to nearest even; for normal numbers."""
    exponent = np.floor(np.log2(np.abs(np.where(values == 0, 1, values))))
    step = 2.0 ** (exponent - 7)
    return np.round(values / step) * step


# ---- reading


def filled(directory: Path, name: str, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
    checkpoint = source.open_checkpoint(str(directory))
    found = survey.survey(checkpoint)
    (logical,) = (item for item in found.logicals if item.name == name)
    out = torch.empty(logical.shape, dtype=dtype)[rows]
    with checkpoint.reader() as reader:
        Values(found, reader).fill(name, out, rows.start or 0)
    return out


@pytest.mark.parametrize("name", [WQ_B, EXPERT])
@pytest.mark.parametrize("release", RELEASES)
def test_values_of_a_quantized_matrix_are_those_of_exact_arithmetic(
    release: str, name: str, sample_of: Callable[[str], Path]
) -> None:
    """Rounded to bfloat16 where a scale is no power of two, and then the same in every dtype."""
    wanted = oracle(sample_of(release), name)
    rounded = to_bf16(wanted)
    assert release == "flash-base" or (wanted == rounded).all()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = filled(sample_of(release), name, dtype)
        assert (found.to(torch.float64).numpy() == rounded).all()
        assert (np.signbit(found.to(torch.float64).numpy()) == np.signbit(wanted)).all()


@pytest.mark.parametrize(("name", "dtype"), [(SINK, "<f4"), (HASH, "<i8")])
def test_values_that_are_no_codes_come_as_they_are(
    name: str, dtype: str, sample_of: Callable[[str], Path]
) -> None:
    held = stored(sample_of("flash"), name)
    assert isinstance(held.data, bytes)
    wanted = np.frombuffer(held.data, dtype).reshape(held.shape)
    found = filled(sample_of("flash"), name, torch.int64 if name == HASH else torch.float32)
    assert found.shape == wanted.shape and (found.numpy() == wanted).all()


@pytest.mark.parametrize("name", [NORM, GATE])
def test_bf16_values_come_bit_for_bit_and_exact_in_wider_dtypes(
    name: str, sample_of: Callable[[str], Path]
) -> None:
    held = stored(sample_of("flash"), name)
    assert isinstance(held.data, bytes)
    patterns = np.frombuffer(held.data, "<u2").reshape(held.shape)
    narrow = filled(sample_of("flash"), name, torch.bfloat16)
    assert (narrow.view(torch.int16).numpy().view(np.uint16) == patterns).all()
    exact = (patterns.astype(np.uint32) << 16).view(np.float32)
    assert (filled(sample_of("flash"), name, torch.float32).numpy() == exact).all()
    assert (filled(sample_of("flash"), name, torch.float64).numpy() == exact).all()


def test_values_are_not_narrowed(sample_of: Callable[[str], Path]) -> None:
    with pytest.raises(AssertionError, match="rounded"):
        filled(sample_of("flash"), SINK, torch.bfloat16)
    with pytest.raises(AssertionError, match="rounded"):
        filled(sample_of("flash"), EXPERT, torch.float16)


@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(100, 300), slice(255, 257), slice(128, 256), slice(77, 512)]
)
@pytest.mark.parametrize("release", ["flash", "flash-base"])
def test_rows_of_a_matrix_are_rows_of_the_whole_wherever_tiles_begin(
    release: str, rows: slice, sample_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filled(sample_of(release), WQ_B, torch.bfloat16)
    assert whole.shape[0] == 512
    for size in (1 << 20, 1):  # a tile's rows at a time, too
        monkeypatch.setattr("dsv4ckpt.roundtrip._CHUNK_VALUES", size)
        assert torch.equal(filled(sample_of(release), WQ_B, torch.bfloat16, rows), whole[rows])


def test_chunks_cover_the_rows_and_none_crosses_into_a_tile_it_does_not_begin() -> None:
    for first, rows, height in [
        (0, 300, 128),
        (5, 300, 128),
        (127, 2, 128),
        (128, 1, 128),
        (3, 4, 1),
        (0, 0, 32),
    ]:
        found = list(chunks(rows, 1 << 14, height, first))
        assert [row for begin, count in found for row in range(begin, begin + count)] == list(
            range(first, first + rows)
        )
        assert all(begin % height == 0 or begin % height + count <= height for begin, count in found)
        assert all(count <= max(height, 64) for _, count in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [Target.BF16, Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT]
)
def test_values_are_the_same_in_every_storage_of_one_release(
    target: Target, sample_of: Callable[[str], Path], convert: Callable[..., Any], tmp_path: Path
) -> None:
    """And in both namespaces, where experts are fused: what is read is a range of one tensor's rows."""
    flash = sample_of("flash")
    spaces = [names.Namespace.DEEPSEEK]
    if target in (Target.BF16, Target.FP8):
        spaces.append(names.Namespace.TRANSFORMERS)
    for namespace in spaces:
        out = tmp_path / namespace
        convert(flash, out, target=target, namespace=namespace)
        for name in (WQ_B, EXPERT, EXPERT.replace("w1", "w2"), EXPERT.replace("w1", "w3"), GATE, HASH, SINK):
            dtype = {HASH: torch.int64, SINK: torch.float32}.get(name, torch.bfloat16)
            assert torch.equal(filled(out, name, dtype), filled(flash, name, dtype)), name


def test_fill_takes_a_parameter_and_leaves_it_a_leaf(sample_of: Callable[[str], Path]) -> None:
    checkpoint = source.open_checkpoint(str(sample_of("flash")))
    weight = torch.nn.Parameter(torch.zeros(512, 128))
    with checkpoint.reader() as reader:
        Values(survey.survey(checkpoint), reader).fill(WQ_B, weight)
    assert weight.is_leaf and bool(weight.any())


# ---- codes as they are stored


def raw(
    directory: Path, name: str, first: int, rows: int, scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    checkpoint = source.open_checkpoint(str(directory))
    weight, scale = stored(directory, name), stored(directory, name.removesuffix("weight") + "scale")
    codes = torch.empty((rows, weight.shape[1]), dtype=torch.uint8)
    scales = torch.empty(
        (scale_rows, scale.shape[1]), dtype=torch.float32 if scale.dtype == "F32" else torch.uint8
    )
    with checkpoint.reader() as reader:
        Values(survey.survey(checkpoint), reader).fill_raw(name, codes, scales, first)
    return codes, scales


@pytest.mark.parametrize(("release", "name", "height"), [
    ("flash", EXPERT, 1), ("flash", WQ_B, 128), ("flash-base", EXPERT, 128), ("flash-base", WQ_B, 128),
])  # fmt: skip
def test_raw_codes_and_scales_are_the_bytes_of_the_file(
    release: str, name: str, height: int, sample_of: Callable[[str], Path]
) -> None:
    weight = stored(sample_of(release), name)
    scale = stored(sample_of(release), name.removesuffix("weight") + "scale")
    for first in (0, weight.shape[0] // 2 // height * height):
        rows, scale_rows = weight.shape[0] - first, scale.shape[0] - first // height
        codes, scales = raw(sample_of(release), name, first, rows, scale_rows)
        assert (codes.numpy() == as_bytes(weight).reshape(weight.shape)[first:]).all()
        wanted = as_bytes(scale).reshape(scale.shape[0], -1)[first // height :]
        assert (scales.view(torch.uint8).numpy() == wanted).all()


# ---- what is not finite


def damaged(path: Path, name: str, position: int, byte: int) -> None:
    """Change one byte of a stored tensor."""

    def edit(tensors: dict[str, tiny.Tensor]) -> None:
        data = bytearray(tensors[name].data)  # type: ignore[arg-type]
        data[position] = byte
        tensors[name] = tensors[name]._replace(data=bytes(data))

    tiny.edit_shard(tiny.shard_of(path, name), edit)


def scale_of(name: str) -> str:
    return name.removesuffix("weight") + "scale"


@pytest.mark.parametrize(("broken", "name", "byte"), [
    (scale_of(EXPERT), EXPERT, 255), (scale_of(EXPERT), EXPERT, 254), (scale_of(WQ_B), WQ_B, 255), (WQ_B, WQ_B, 0x7F),
    (scale_of(WQ_B), WQ_B, 254),
])  # fmt: skip
def test_values_that_are_not_finite_are_refused_by_name_and_place(
    broken: str, name: str, byte: int, checkpoint: Path
) -> None:
    damaged(checkpoint, broken, 5 if broken == WQ_B or name == EXPERT else 0, byte)
    stored.cache_clear()
    with pytest.raises(NotFinite, match=name) as told:
        filled(checkpoint, name, torch.float32)
    assert "row 0" in str(told.value) and "file" in str(told.value)
    with pytest.raises(NotFinite, match=name):
        raw(
            checkpoint,
            name,
            0,
            stored(checkpoint, name).shape[0],
            stored(checkpoint, scale_of(name)).shape[0],
        )


def test_plain_values_that_are_not_finite_are_refused(checkpoint: Path) -> None:
    damaged(checkpoint, NORM, 1, 0x7F)
    damaged(checkpoint, NORM, 0, 0x80)
    stored.cache_clear()
    with pytest.raises(NotFinite, match=NORM):
        filled(checkpoint, NORM, torch.float32)
