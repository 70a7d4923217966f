"""verify: three levels, against outputs that are right and outputs with one thing wrong; decoding against fractions."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from dsv4cli import main as cli
from safetensors.torch import load_file, save_file

from dsv4ckpt import compare, decode_plain, formats, run, sample, source, survey, verify
from dsv4ckpt.compare import Verdict, verify_values
from dsv4ckpt.decode_plain import Rows
from dsv4ckpt.errors import BadManifest, Interrupted, MissingFile, UnsafePath, Usage
from dsv4ckpt.formats import (
    CT_FP4,
    FP8_TILE_F32,
    INDEX_NAME,
    MANIFEST_NAME,
    NVFP4_EXPERT,
    OUR_NAMES,
    Block,
    Quant,
)
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES
from dsv4ckpt.survey import Survey
from dsv4ckpt.verify import FileState, compare_files, verify_bytes, verify_structure

Sample = Callable[[str], Path]
Convert = Callable[..., run.Summary]
Converted = Callable[[str, Namespace], Path]
EXPERT = "layers.1.ffn.experts.3.w2.weight"
DENSE = "layers.1.attn.wo_b.weight"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def converted(
    sample_of: Sample, convert: Convert, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Namespace], Path]:
    """The directory of a release's sample as BF16; nobody writes into it."""

    @functools.cache
    def directory(release: str, namespace: Namespace) -> Path:
        made = tmp_path_factory.mktemp("converted") / "out"
        convert(sample_of(release), made, namespace=namespace, max_shard_bytes=2_000_000)
        return made

    return directory


@pytest.fixture
def flash(sample_of: Sample, tmp_path: Path) -> Path:
    """A copy of the source, to be spoilt."""
    return Path(shutil.copytree(sample_of("flash"), tmp_path / "flash"))


@pytest.fixture
def out(converted: Converted, tmp_path: Path) -> Path:
    """A copy of a finished output, to be spoilt."""
    return Path(shutil.copytree(converted("flash", Namespace.DEEPSEEK), tmp_path / "out"))


def surveyed(directory: Path, **options: Any) -> Survey:
    return survey.survey(source.open_checkpoint(str(directory)), **options)


def compared(a: Path, b: Path, **options: Any) -> compare.ValuesReport:
    return verify_values(surveyed(a), surveyed(b), **options)


def the_one(report: compare.ValuesReport) -> compare.TensorVerdict:
    """The only verdict that is no "same"."""
    assert len(report.tensors) == 1, report.tensors
    return report.tensors[0]


def place(directory: Path, name: str) -> tuple[Path, int, int]:
    """File of a stored tensor, and where its bytes begin and end."""
    found = source.open_checkpoint(str(directory)).tensors[name]
    return directory / found.shard, found.entry.begin, found.entry.end


def stored(directory: Path, name: str) -> bytes:
    file, begin, end = place(directory, name)
    return file.read_bytes()[begin:end]


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def flip(file: Path, offset: int, bit: int) -> None:
    overwrite(file, offset, bytes([file.read_bytes()[offset] ^ 1 << bit]))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], holding: str) -> None:
    """Change the tensors of the shard that holds one, and the index with it."""
    file = place(directory, holding)[0]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    before = set(tensors)
    change(tensors)
    save_file(tensors, file)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    change(manifest)
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def bf16_of(exact: Fraction) -> int:
    """Pattern of the nearest bfloat16, ties to even; by the definition. Of 0: +0."""
    if not exact:
        return 0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 7)
    rounded = round(size / step) * step  # round() of a fraction takes ties to even
    high = 0x7F80 if rounded >= 2**128 else struct.unpack("<I", struct.pack("<f", float(rounded)))[0] >> 16
    return int(high) | (0x8000 if exact < 0 else 0)


def e2m1(code: int) -> Fraction:
    return Fraction((0, 1, 2, 3, 4, 6, 8, 12)[code & 7] * (-1 if code & 8 else 1), 2)


def e4m3(code: int) -> Fraction | None:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return None
    size = (
        Fraction(mantissa, 512)
        if exponent == 0
        else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    )
    return -size if code & 0x80 else size


def e8m0(byte: int) -> Fraction | None:
    return None if byte == 255 else Fraction(2) ** (byte - 127)


def expected_bf16(code: Fraction | None, negative: bool, scale: Fraction | None) -> int | None:
    """Pattern of a product; None for NaN. The sign of a zero comes from the code."""
    if code is None or scale is None:
        return None
    return bf16_of(code * scale) or (0x8000 if negative else 0)


def require_equal(values: torch.Tensor, expected: list[int | None]) -> None:
    found = values.contiguous().view(-1).view(torch.uint16).tolist()
    is_nan = values.contiguous().view(-1).isnan().tolist()
    wrong = [
        index
        for index, want in enumerate(expected)
        if (is_nan[index] if want is not None else not is_nan[index])
        or (want is not None and found[index] != want)
    ]
    assert len(found) == len(expected)
    assert not wrong, (len(wrong), wrong[:3])


# ---- decoding, against fractions


@pytest.mark.slow
def test_fp8_every_code_with_every_e8m0_scale_is_the_rounded_product() -> None:
    rows = Rows(
        256,
        "F8_E4M3",
        bytearray(range(256)) * 256,
        Quant("F8_E4M3", 1, "F8_E8M0", Block(1, 256)),
        bytearray(range(256)),
    )
    expected = [
        expected_bf16(e4m3(code), code >= 128, e8m0(scale)) for scale in range(256) for code in range(256)
    ]
    require_equal(decode_plain.decode(rows), expected)


@pytest.mark.slow
def test_fp4_every_byte_with_every_e8m0_scale_is_the_rounded_product_low_nibble_first() -> None:
    rows = Rows(
        256,
        "I8",
        bytearray(range(256)) * 256,
        Quant("I8", 2, "F8_E8M0", Block(1, 512)),
        bytearray(range(256)),
    )
    expected = [
        expected_bf16(e2m1(code), code >= 8, e8m0(scale))
        for scale in range(256)
        for byte in range(256)
        for code in (byte & 15, byte >> 4)
    ]
    require_equal(decode_plain.decode(rows), expected)


@pytest.mark.slow
def test_every_product_is_exact_before_rounding() -> None:
    for codes, value, quant in (
        (bytearray(range(256)), e4m3, Quant("F8_E4M3", 1, "F8_E8M0", Block(1, 256))),
        (bytearray(code | code << 4 for code in range(16)), e2m1, Quant("I8", 2, "F8_E8M0", Block(1, 32))),
    ):
        data, scales = codes * 256, bytearray(range(256))
        found = decode_plain.decode_exact(Rows(256, quant.codes, data, quant, scales)).tolist()
        for scale, row in zip(range(255), found, strict=False):
            for index, got in enumerate(row):
                code = value(index // quant.codes_per_element)
                exact = code is not None and code * Fraction(2) ** (scale - 127)
                assert np.isnan(got) if code is None else Fraction(got) == exact
        assert np.isnan(found[255]).all()


def test_u8_scales_mean_what_e8m0_scales_mean() -> None:
    rows = Rows(256, "U8", bytearray(range(16)) * 256, CT_FP4, bytearray(range(256)))
    expected = [
        expected_bf16(e2m1(code), code >= 8, e8m0(scale))
        for scale in range(256)
        for byte in range(16)
        for code in (byte & 15, byte >> 4)
    ]
    require_equal(decode_plain.decode(rows), expected)


@pytest.mark.slow
def test_f32_scales_that_are_powers_of_two_give_the_rounded_product() -> None:
    quant = Quant("F8_E4M3", 1, "F32", Block(1, 256))
    for exponent in range(1, 255):  # row by row: each alone decides whether bfloat16 holds all its products
        scale = bytearray(struct.pack("<I", exponent << 23))
        expected = [expected_bf16(e4m3(code), code >= 128, e8m0(exponent)) for code in range(256)]
        require_equal(
            decode_plain.decode(Rows(1, "F8_E4M3", bytearray(range(256)), quant, scale)), list(expected)
        )


def nvfp4_rows(scale_2: float) -> Rows:
    """A row for each E4M3 scale, with every nibble in it."""
    codes = bytearray((code + 1) << 4 | code for code in range(0, 16, 2))
    return Rows(256, "U8", codes * 256, NVFP4_EXPERT, bytearray(range(256)), scale_2=scale_2)


SCALES_2 = [
    *(1.0, 2.0**-8, 2.0**-123, 2.0**-124, 2.0**116, 2.0**117, 2.0**127, 2.0**-149),  # around where bfloat16 is exact
    *(struct.unpack("<f", struct.pack("<I", word))[0] for word in (0x3C23D70A, 0x3F7FFFFF, 0x00012345, 0x7E7FFFFF)),
    -0.0078125, 0.0,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scale_2", SCALES_2)
def test_nvfp4_every_nibble_with_every_scale_is_the_product_of_three_rounded_once(scale_2: float) -> None:
    expected: list[int | None] = []
    for byte in range(256):
        for code in range(16):
            scale = e4m3(byte)
            negative = bool(code >= 8) ^ bool(byte >= 128) ^ (scale_2 < 0)
            value = None if scale is None else abs(e2m1(code) * scale * Fraction(scale_2))
            expected.append(None if value is None else bf16_of(value) | 0x8000 * negative)
    require_equal(decode_plain.decode(nvfp4_rows(scale_2)), expected)


@pytest.mark.parametrize("scale_2", SCALES_2)
def test_nvfp4_products_are_exact_before_rounding(scale_2: float) -> None:
    found = decode_plain.decode_exact(nvfp4_rows(scale_2)).tolist()
    for byte, row in enumerate(found):
        for code, got in enumerate(row):
            scale = e4m3(byte)
            exact = None if scale is None else e2m1(code) * scale * Fraction(scale_2)
            assert np.isnan(got) if exact is None else Fraction(got) == exact


@pytest.mark.parametrize("scale_2", [float("nan"), float("inf")])
def test_nvfp4_under_a_scale_that_is_no_number_equals_itself_and_no_finite_one(scale_2: float) -> None:
    assert decode_plain.compare(nvfp4_rows(scale_2), nvfp4_rows(scale_2)) is None
    assert decode_plain.compare(nvfp4_rows(scale_2), nvfp4_rows(1.0)) is not None


def test_nvfp4_rounds_once_where_float32_lands_midway() -> None:
    generator = np.random.default_rng(6)
    scales_2 = generator.integers(0x3B000000, 0x3F800000, 1 << 21, np.uint32).view(np.float32)
    exact = 1.5 * 1.875 * scales_2.astype(np.float64)  # code 3, scale 0x3F
    near = exact.astype(np.float32)
    chosen = scales_2[(near.view(np.uint32) & 0xFFFF == 0x8000) & (near != exact)]
    assert len(chosen) > 10
    for scale_2 in chosen.tolist():
        rows = Rows(1, "U8", bytearray([0x33] * 8), NVFP4_EXPERT, bytearray([0x3F]), scale_2=scale_2)
        require_equal(decode_plain.decode(rows), [bf16_of(Fraction(45, 16) * Fraction(scale_2))] * 16)


@pytest.mark.slow
def test_blocks_cut_off_by_both_edges_and_rows_from_within_a_block_find_their_scales() -> None:
    generator = np.random.default_rng(1)
    codes = generator.integers(0, 0x7F, (300, 200), np.uint8)
    scales = generator.integers(110, 140, (3, 2), np.uint8)
    whole = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:300, :200]
    pairs = zip(codes[100:290].flat, whole[100:290].flat, strict=True)
    expected = [bf16_of(e4m3(int(code)) * e8m0(int(scale))) for code, scale in pairs]  # type: ignore[operator]
    quant = Quant("F8_E4M3", 1, "F8_E8M0", Block(128, 128))
    rows = Rows(190, "F8_E4M3", bytearray(codes[100:290].tobytes()), quant, bytearray(scales.tobytes()), 100)
    require_equal(decode_plain.decode(rows), list(expected))


def witnesses() -> tuple[np.ndarray, np.ndarray]:
    """(codes, F32 scales) whose product float32 rounds onto a midway point between two bfloat16 numbers."""
    generator = np.random.default_rng(2)
    scales = generator.integers(0x3F000000, 0x3F800000, 1 << 21, np.uint32).view(np.float32)
    codes = generator.choice(np.array([0x39, 0x3D, 0xBB, 0x07, 0x7E], np.uint8), len(scales))
    table = np.array([float(e4m3(code) or 0) for code in range(256)])
    exact = table[codes] * scales.astype(np.float64)
    near = exact.astype(np.float32)
    chosen = (near.view(np.uint32) & 0xFFFF == 0x8000) & (near != exact)
    return codes[chosen], scales[chosen]


def test_f32_scales_round_the_product_once() -> None:
    codes, scales = witnesses()
    quant = Quant("F8_E4M3", 1, "F32", Block(1, 1))
    rows = Rows(len(codes), "F8_E4M3", bytearray(codes.tobytes()), quant, bytearray(scales.tobytes()))
    exact = [e4m3(int(code)) * Fraction(float(scale)) for code, scale in zip(codes, scales, strict=True)]  # type: ignore[operator]
    expected = [bf16_of(value) for value in exact]
    twice = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(torch.bfloat16)
    wrong = sum(x != y for x, y in zip(twice.view(torch.uint16).tolist(), expected, strict=True))
    assert wrong > 5  # these are real witnesses: rounding twice gets many of them wrong
    require_equal(decode_plain.decode(rows), list(expected))


def test_f32_scales_of_any_size_round_the_product_once() -> None:
    generator = np.random.default_rng(3)
    scales = generator.integers(0, 1 << 32, 4096, np.uint32).view(np.float32)
    scales[:8] = [0.0, -0.0, np.inf, np.nan, 1e-45, 3e38, -1e-40, 1.0]
    codes = generator.integers(0, 256, len(scales), np.uint8)
    expected: list[int | None] = []
    for code, scale in zip(codes, scales, strict=True):
        value = e4m3(int(code))
        if value is None or np.isnan(scale) or (np.isinf(scale) and not value):
            expected.append(None)
            continue
        negative = 0x8000 * (bool(code & 0x80) != bool(np.signbit(scale)))
        expected.append(
            negative | (0x7F80 if np.isinf(scale) else bf16_of(abs(value * Fraction(float(scale)))))
        )
    quant = Quant("F8_E4M3", 1, "F32", Block(1, 1))
    rows = Rows(len(codes), "F8_E4M3", bytearray(codes.tobytes()), quant, bytearray(scales.tobytes()))
    require_equal(decode_plain.decode(rows), expected)


def test_round_once_equals_fractions_from_subnormals_to_overflow() -> None:
    generator = np.random.default_rng(4)
    mantissa = generator.integers(0, 1 << 52, 4000, np.uint64)
    mantissa[::4] &= np.uint64(0xFFF << 40)  # ties and near ties
    mantissa[1::4] = mantissa[::4] ^ np.uint64(1)
    exponent = generator.integers(1023 - 150, 1023 + 129, 4000).astype(np.uint64)
    values = (mantissa | exponent << np.uint64(52)).view(np.float64)
    values = np.concatenate([values, -values])
    require_equal(
        decode_plain.round_once(torch.from_numpy(values)), [bf16_of(Fraction(v)) for v in values.tolist()]
    )


@pytest.mark.parametrize(
    ("dtype", "a", "b", "distance"),
    [
        ("BF16", [0x3F80], [0x3F81], 1),
        ("BF16", [0x0000], [0x8000], 1),
        ("BF16", [0x0001], [0x8001], 3),
        ("BF16", [0x7FC0], [0x7FC1], 1),  # plain tensors are compared by their patterns
        ("F32", [0x3F800000], [0x3F80000A], 10),
        ("I64", [0x7FFFFFFFFFFFFFFF], [0x8000000000000000], 2**64 - 1),
        ("U8", [0], [255], 255),
    ],
)
def test_distance_counts_steps_between_patterns(
    dtype: str, a: list[int], b: list[int], distance: int
) -> None:
    form = {"BF16": "<H", "F32": "<I", "I64": "<Q", "U8": "<B"}[dtype]
    x, y = (Rows(1, dtype, bytearray(struct.pack(form, *values))) for values in (a, b))
    found = decode_plain.compare(x, y)
    assert found is not None
    assert (found.num_values, found.distance, found.unit, found.position) == (1, distance, dtype, 0)
    assert decode_plain.compare(x, x) is None


# ---- values: outputs that are right


@pytest.mark.slow
@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("release", RELEASES)
def test_values_every_release_converted_has_the_same_values(
    release: str, namespace: Namespace, sample_of: Sample, converted: Converted
) -> None:
    a, b = surveyed(sample_of(release)), surveyed(converted(release, namespace))
    report = verify_values(a, b)
    quantized = sum(a.layout.quant(logical) is not None for logical in a.logicals)
    plain = len(a.logicals) - quantized + len(a.opaque)
    assert report.ok and not report.tensors and not report.notes
    assert {k: v for k, v in report.counts.items() if v} == {
        Verdict.SAME_BYTES: plain,
        Verdict.SAME_VALUES: quantized,
    }
    assert json.loads(json.dumps(report.document()))["counts"]["same values"] == quantized


@pytest.mark.slow
def test_values_a_checkpoint_and_its_copy_have_the_same_bytes(sample_of: Sample, flash: Path) -> None:
    report = compared(sample_of("flash"), flash)
    assert report.ok and report.counts[Verdict.SAME_BYTES] == sum(report.counts.values())


@pytest.mark.slow
def test_values_both_namespaces_of_one_conversion_have_the_same_bytes(converted: Converted) -> None:
    report = compared(*(converted("vision-exp", namespace) for namespace in Namespace))
    assert report.ok and report.counts[Verdict.SAME_BYTES] == sum(report.counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("release", ["flash", "vision-exp", "v4.1-flash"])
def test_values_a_selection_of_layers_without_mtp_is_found_under_its_source_names(
    release: str, namespace: Namespace, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    layers = (0, 1, 2) if release == "v4.1-flash" else (1, 3)
    convert(sample_of(release), tmp_path / "out", layers=layers, keep_mtp=False, namespace=namespace)
    a, b = surveyed(sample_of(release)), surveyed(tmp_path / "out")
    report = verify_values(a, b)
    selected = tuple(f"layers.{layer}." for layer in layers)
    left_out = {
        logical.name
        for logical in a.logicals
        if logical.name.startswith(("layers.", "mtp.")) and not logical.name.startswith(selected)
    }
    assert report.ok and not report.notes
    assert {item.name for item in report.tensors if item.verdict is Verdict.LEFT_OUT} == left_out
    assert len(report.tensors) == len(left_out)


@pytest.mark.slow
def test_values_a_difference_in_a_selected_layer_is_told_by_its_source_name(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "out", layers=(1, 3))
    file, begin, _ = place(tmp_path / "out", "layers.1.attn.wo_b.weight")
    flip(file, begin, 0)
    wrong = [
        v for v in compared(sample_of("flash"), tmp_path / "out").tensors if v.verdict is Verdict.DIFFERS
    ]
    assert [item.name for item in wrong] == ["layers.3.attn.wo_b.weight"]


@pytest.mark.slow
def test_values_a_manifest_of_another_source_maps_no_layers(
    sample_of: Sample, convert: Convert, flash: Path, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "out", layers=(1, 3), keep_mtp=False)
    edit(flash, lambda tensors: tensors["layers.0.attn_norm.weight"].zero_(), "layers.0.attn_norm.weight")
    os.rename(place(flash, "embed.weight")[0], flash / "renamed.safetensors")
    index = json.loads((flash / "model.safetensors.index.json").read_text())
    index["weight_map"]["embed.weight"] = "renamed.safetensors"
    (flash / "model.safetensors.index.json").write_text(json.dumps(index))
    report = compared(flash, tmp_path / "out")
    assert not report.ok and report.counts[Verdict.LEFT_OUT] == 0 and report.counts[Verdict.MISSING] > 0
    assert "another source" in report.notes[0]


@pytest.mark.slow
def test_values_unit_scales_mean_one(flash: Path, convert: Convert, tmp_path: Path) -> None:
    unit = frozenset({DENSE})
    scale = DENSE.replace("weight", "scale")
    edit(flash, lambda tensors: tensors.pop(scale), scale)
    convert(flash, tmp_path / "out", unit_scales=unit)
    report = verify_values(surveyed(flash, unit_scales=unit), surveyed(tmp_path / "out"))
    assert report.ok, report.tensors


def test_values_equal_codes_under_unit_scales_and_under_others_differ(sample_of: Sample, flash: Path) -> None:
    scale = DENSE.replace("weight", "scale")
    edit(flash, lambda tensors: tensors.pop(scale), scale)
    report = verify_values(surveyed(flash, unit_scales=frozenset({DENSE})), surveyed(sample_of("flash")))
    found = the_one(report)
    assert (found.name, found.verdict, found.reason) == (DENSE, Verdict.DIFFERS, None)


@pytest.mark.slow
def test_values_any_nan_equals_any_nan(flash: Path, convert: Convert, tmp_path: Path) -> None:
    overwrite(*place(flash, DENSE.replace("weight", "scale"))[:2], b"\xff")
    convert(flash, tmp_path / "out", allow_nan=frozenset({DENSE}))
    file, begin, _ = place(tmp_path / "out", DENSE)
    overwrite(file, begin, struct.pack("<HH", 0x7FA1, 0xFFC0))
    assert compared(flash, tmp_path / "out").ok


# ---- values: outputs with one thing wrong


@pytest.mark.slow
@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("bit", [0, 3, 15])
def test_values_one_flipped_bit_is_found_with_tensor_place_and_distance(
    bit: int, namespace: Namespace, sample_of: Sample, converted: Converted, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(converted("flash", namespace), tmp_path / "spoilt"))
    fused = "model.layers.1.mlp.experts.down_proj"
    row, col, rows, cols = 70, 41, 256, 128
    name, skip = (EXPERT, 0) if namespace is Namespace.DEEPSEEK else (fused, 3 * rows)
    file, begin, _ = place(spoilt, name)
    offset = begin + ((skip + row) * cols + col) * 2
    (before,) = struct.unpack("<H", file.read_bytes()[offset : offset + 2])
    flip(file, offset + bit // 8, bit % 8)
    found = the_one(compared(sample_of("flash"), spoilt))
    assert (found.name, found.verdict) == (EXPERT, Verdict.DIFFERS)
    after = before ^ 1 << bit
    assert found.apart == compare.Apart(
        num_values=1,
        distance=2**bit if bit < 15 else 2 * (before & 0x7FFF) + 1,
        unit="BF16",
        row=row,
        col=col,
        a=str(struct.unpack("<f", struct.pack("<I", before << 16))[0]),
        b=str(struct.unpack("<f", struct.pack("<I", after << 16))[0]),
    )


def test_values_a_flipped_sign_of_zero_is_found(sample_of: Sample, out: Path) -> None:
    file, begin, _ = place(out, EXPERT)
    values = np.frombuffer(stored(out, EXPERT), np.uint16)
    at = int((values == 0x8000).argmax())
    assert values[at] == 0x8000
    overwrite(file, begin + 2 * at, b"\x00\x00")
    apart = the_one(compared(sample_of("flash"), out)).apart
    assert apart is not None
    assert (apart.row, apart.col, apart.a, apart.b, apart.distance) == (*divmod(at, 128), "-0.0", "0.0", 1)


@pytest.mark.parametrize(
    "name", ["layers.0.ffn.gate.tid2eid", "layers.2.hc_attn_fn", "embed.weight", "norm.weight"]
)
def test_values_a_flipped_bit_in_a_plain_tensor_is_found(name: str, sample_of: Sample, out: Path) -> None:
    file, begin, _ = place(out, name)
    flip(file, begin, 0)
    found = the_one(compared(sample_of("flash"), out))
    assert found.name == name and found.apart is not None
    assert (found.apart.distance, found.apart.row, found.apart.col) == (1, 0, 0)


@pytest.mark.slow
def test_values_small_chunks_find_every_difference_where_it_is(
    sample_of: Sample, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_CHUNK_VALUES", 1000)
    file, begin, _ = place(out, DENSE)
    for row, bit in ((200, 1), (201, 4), (255, 0)):
        flip(file, begin + (row * 256 + 9) * 2, bit)
    apart = the_one(compared(sample_of("flash"), out)).apart
    assert apart is not None
    assert (apart.num_values, apart.distance, apart.row, apart.col) == (3, 16, 200, 9)


def test_values_a_tensor_that_is_gone_is_missing_and_an_unknown_one_extra(
    sample_of: Sample, out: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.attn.wo_c.weight"] = tensors.pop(DENSE)

    edit(out, change, DENSE)
    report = compared(sample_of("flash"), out)
    assert {item.name: item.verdict for item in report.tensors} == {
        DENSE: Verdict.MISSING,
        "layers.1.attn.wo_c.weight": Verdict.EXTRA,
    }
    assert not report.ok


def test_values_a_tensor_that_is_in_neither_is_missing(flash: Path, out: Path) -> None:
    for directory in (flash, out):
        edit(directory, lambda tensors: tensors.pop("layers.1.attn_norm.weight"), "layers.1.attn_norm.weight")
    found = the_one(compared(flash, out))
    assert (found.name, found.verdict) == ("layers.1.attn_norm.weight", Verdict.MISSING)


def test_values_a_dropped_tensor_that_the_config_asks_for_is_missing(sample_of: Sample, out: Path) -> None:
    edit(out, lambda tensors: tensors.pop(DENSE), DENSE)
    edit_manifest(out, lambda m: m["dropped"].append({"name": DENSE, "reason": "--mtp drop", "size": 0}))
    assert the_one(compared(sample_of("flash"), out)).verdict is Verdict.MISSING


@pytest.mark.slow
def test_values_codes_without_scales_differ_with_a_reason(flash: Path, out: Path) -> None:
    scale = DENSE.replace("weight", "scale")
    edit(flash, lambda tensors: tensors.pop(scale), scale)
    found = the_one(compared(flash, out))
    assert (found.verdict, found.reason) == (Verdict.DIFFERS, "in a it has no scales")


def test_values_scales_without_codes_are_told_by_their_stored_name(flash: Path, out: Path) -> None:
    edit(flash, lambda tensors: tensors.pop(DENSE), DENSE)
    report = compared(flash, out)
    assert {item.name: item.verdict for item in report.tensors} == {
        DENSE: Verdict.EXTRA,
        DENSE.replace("weight", "scale"): Verdict.MISSING,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor[:-1].clone(), "its shape is [256, 256] in a, [255, 256] in b"),
        (lambda tensor: tensor.reshape(-1), "its shape is [256, 256] in a, [65536] in b"),
        (lambda tensor: tensor.float(), "it is F8_E4M3 in a, F32 in b"),
        (lambda tensor: tensor[:0].clone(), "in b it is BF16 [0, 256] instead of BF16 [256, 256]"),
        (lambda tensor: tensor[0, 0].clone(), "its shape is [256, 256] in a, [] in b"),
    ],
)
def test_values_another_shape_or_dtype_differs_with_a_reason(
    change: Callable[[torch.Tensor], torch.Tensor], words: str, sample_of: Sample, out: Path
) -> None:
    edit(out, lambda tensors: tensors.update({DENSE: change(tensors[DENSE])}), DENSE)
    found = the_one(compared(sample_of("flash"), out))
    assert (found.name, found.verdict, found.reason) == (DENSE, Verdict.DIFFERS, words)


@pytest.mark.slow
def test_values_fused_experts_of_another_shape_differ_with_a_reason(
    sample_of: Sample, converted: Converted, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(converted("flash", Namespace.TRANSFORMERS), tmp_path / "spoilt"))
    fused = "model.layers.1.mlp.experts.down_proj"
    edit(spoilt, lambda tensors: tensors.update({fused: tensors[fused].flatten(0, 1)}), fused)
    report = compared(sample_of("flash"), spoilt)
    assert [item.name for item in report.tensors] == [f"layers.1.ffn.experts.{e}.w2.weight" for e in range(8)]
    assert all("instead of BF16 [8, 256, 128]" in str(item.reason) for item in report.tensors)


def test_values_equal_copies_with_one_deviation_are_still_the_same(flash: Path, tmp_path: Path) -> None:
    edit(flash, lambda tensors: tensors.update({DENSE: tensors[DENSE][:-1].clone()}), DENSE)
    shutil.copytree(flash, tmp_path / "copy")
    assert compared(flash, tmp_path / "copy").ok
    file, begin, _ = place(tmp_path / "copy", DENSE)
    flip(file, begin, 0)
    found = the_one(compared(flash, tmp_path / "copy"))
    assert found.verdict is Verdict.DIFFERS and "instead of F8_E4M3 [256, 256]" in str(found.reason)


def test_values_codes_doubled_under_half_the_scale_are_the_same_values(flash: Path, tmp_path: Path) -> None:
    scale = EXPERT.replace("weight", "scale")
    other = Path(shutil.copytree(flash, tmp_path / "other"))
    for directory, code, byte in ((flash, 0x22, 120), (other, 0x44, 119)):
        overwrite(*place(directory, EXPERT)[:2], bytes([code]) * 16)
        overwrite(*place(directory, scale)[:2], bytes([byte]))
    report = compared(flash, other)
    assert report.ok and report.counts[Verdict.SAME_VALUES] == 1


def test_values_codes_are_compared_without_rounding(sample_of: Sample, tmp_path: Path) -> None:
    name = "layers.1.attn.wo_b.scale"
    other = Path(shutil.copytree(sample_of("flash-base"), tmp_path / "other"))
    file, begin, _ = place(other, name)
    flip(file, begin, 0)  # one step of float32: most products round to the same bfloat16
    found = the_one(compared(sample_of("flash-base"), other))
    assert found.name == DENSE and found.apart is not None
    assert found.apart.num_values > 128 * 100 and found.apart.distance <= 1


@pytest.mark.slow
def test_values_other_weights_differ_everywhere_and_subsets_cover_them_once(
    sample_of: Sample, tmp_path: Path
) -> None:
    options = sample.SampleOptions(release="flash", seed=1)
    sample.write_sample(sample.plan_sample(options), str(tmp_path / "other"))
    whole = [item.name for item in compared(sample_of("flash"), tmp_path / "other").tensors]
    parts = [
        [item.name for item in compared(sample_of("flash"), tmp_path / "other", subset=(n, 3)).tensors]
        for n in (1, 2, 3)
    ]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert len(whole) > 200 and min(map(len, parts)) > 60


def test_values_named_tensors_alone_are_compared(sample_of: Sample, out: Path) -> None:
    for name in (EXPERT, DENSE):
        file, begin, _ = place(out, name)
        flip(file, begin, 0)
    report = compared(sample_of("flash"), out, tensors=frozenset({DENSE, "norm.weight"}))
    assert [item.name for item in report.tensors] == [DENSE] and report.counts[Verdict.SAME_BYTES] == 1


def test_values_an_unknown_name_is_a_usage_error(sample_of: Sample) -> None:
    with pytest.raises(Usage, match=r"layers\.99"):
        compared(sample_of("flash"), sample_of("flash"), tensors=frozenset({"layers.99.attn_norm.weight"}))


@pytest.mark.parametrize("subset", [(0, 2), (3, 2), (1, 0)])
def test_a_part_that_does_not_exist_is_a_usage_error(
    subset: tuple[int, int], sample_of: Sample, converted: Converted
) -> None:
    with pytest.raises(Usage):
        compared(sample_of("flash"), sample_of("flash"), subset=subset)
    with pytest.raises(Usage):
        verify_bytes(str(converted("flash", Namespace.DEEPSEEK)), subset=subset)


@pytest.mark.slow
def test_events_add_up_to_what_was_announced(sample_of: Sample, converted: Converted) -> None:
    b = converted("flash", Namespace.TRANSFORMERS)
    for level in (
        lambda on_event: compared(sample_of("flash"), b, on_event=on_event),
        lambda on_event: verify_bytes(str(b), on_event=on_event),
    ):
        events: list[verify.Event] = []
        level(events.append)
        assert isinstance(events[0], verify.Started)
        assert events[0].total_bytes == sum(e.num_bytes for e in events[1:] if isinstance(e, verify.Read))


def test_a_stop_flag_ends_both_levels(sample_of: Sample, converted: Converted) -> None:
    b, stop = converted("flash", Namespace.DEEPSEEK), run.StopFlag()
    stop.signal_number = 15
    with pytest.raises(Interrupted) as raised:
        compared(sample_of("flash"), b, stop=stop)
    assert raised.value.exit_code == 143
    with pytest.raises(Interrupted):
        verify_bytes(str(b), stop=stop)


# ---- bytes


@pytest.mark.slow
def test_bytes_one_flipped_bit_is_found_in_every_file(out: Path) -> None:
    generator = random.Random(5)
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.name != MANIFEST_NAME)
    assert verify_bytes(str(out)).ok
    for turn in range(100):
        file = files[turn % len(files)]
        offset, bit = generator.randrange(file.stat().st_size), generator.randrange(8)
        flip(file, offset, bit)
        report = verify_bytes(str(out))
        wrong = [(found.name, found.verdict) for found in report.files if found.verdict != "ok"]
        assert wrong == [(str(file.relative_to(out)), "differs")] and not report.ok
        flip(file, offset, bit)
    assert verify_bytes(str(out)).ok


def test_bytes_a_truncated_file_differs_and_a_removed_one_is_missing(out: Path) -> None:
    os.truncate(min(out.glob("*.safetensors")), 1000)
    (out / "inference" / "config.json").unlink()
    report = verify_bytes(str(out))
    wrong = {found.name: (found.verdict, found.found) for found in report.files if found.verdict != "ok"}
    assert sorted(wrong.values(), key=str) == [("differs", "1,000 bytes"), ("missing", None)]
    assert wrong["inference/config.json"] == ("missing", None)
    assert json.loads(json.dumps(report.document()))["ok"] is False


@pytest.mark.slow
def test_bytes_subsets_cover_every_file_once(converted: Converted) -> None:
    directory = str(converted("flash", Namespace.DEEPSEEK))
    whole = [file.name for file in verify_bytes(directory).files]
    for count in (1, 2, 5, 100):
        parts = [verify_bytes(directory, subset=(n, count)) for n in range(1, count + 1)]
        assert sorted(file.name for part in parts for file in part.files) == sorted(whole)
        assert parts[0].files[0].name == whole[0]
        assert all(part.num_listed == len(whole) for part in parts)


def test_bytes_without_a_manifest_cannot_be_verified(sample_of: Sample) -> None:
    with pytest.raises(MissingFile, match="no manifest"):
        verify_bytes(str(sample_of("flash")))


def test_bytes_of_an_unfinished_run_cannot_be_verified(out: Path) -> None:
    (out / MANIFEST_NAME).unlink()
    (out / formats.WORK_NAME).mkdir()
    with pytest.raises(MissingFile, match="did not finish"):
        verify_bytes(str(out))
    assert [problem.file for problem in verify_structure(source.open_checkpoint(str(out))).problems] == [
        formats.WORK_NAME
    ]


HOSTILE = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "",
    ".",
    "a\x00b",
    "a//b",
    "inference/./config.json",
    "a\nb",
    "x" * 600,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names_in_a_manifest_are_refused(name: str, out: Path) -> None:
    edit_manifest(out, lambda manifest: manifest["files"][0].update(file=name))
    with pytest.raises(UnsafePath, match="plain relative"):
        verify_bytes(str(out))
    with pytest.raises(UnsafePath, match="plain relative"):
        verify_structure(source.open_checkpoint(str(out)))


@pytest.mark.parametrize("kind", ["file", "directory", "fifo"])
def test_listed_files_that_lead_outside_or_are_no_files_are_refused(
    kind: str, out: Path, tmp_path: Path
) -> None:
    if kind == "directory":
        shutil.move(out / "inference", tmp_path / "elsewhere")
        (out / "inference").symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        shutil.move(out / "LICENSE", tmp_path / "elsewhere")
        (out / "LICENSE").symlink_to(tmp_path / "elsewhere")
    else:
        (out / "LICENSE").unlink()
        os.mkfifo(out / "LICENSE")
    with pytest.raises(UnsafePath):
        verify_bytes(str(out))


def malformed() -> Iterator[Any]:
    def set_to(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
        def change(manifest: dict[str, Any]) -> None:
            at: Any = manifest
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value

        return change

    yield pytest.param(set_to(2, "format"), id="format")
    yield pytest.param(set_to({}, "files"), id="files")
    yield pytest.param(set_to([7], "files"), id="file is a number")
    yield pytest.param(set_to(True, "files", 0, "size"), id="size is a boolean")
    yield pytest.param(set_to(-1, "files", 0, "size"), id="size is negative")
    yield pytest.param(set_to("0" * 63, "files", 0, "sha256"), id="short sha256")
    yield pytest.param(set_to(None, "files", 0, "file"), id="no name")
    yield pytest.param(lambda manifest: manifest["files"].append(manifest["files"][0]), id="file twice")
    yield pytest.param(lambda manifest: manifest.pop("source"), id="no source")
    yield pytest.param(lambda manifest: manifest.pop("options"), id="no options")
    yield pytest.param(set_to([1, 0], "options", "layers"), id="layers descend")
    yield pytest.param(set_to(["0"], "options", "layers"), id="layers are words")
    yield pytest.param(set_to("0-1", "options", "layers"), id="layers are a word")
    yield pytest.param(set_to(["x"], "dropped"), id="dropped are words")
    yield pytest.param(set_to(0.5, "values"), id="a fraction")


@pytest.mark.parametrize("change", list(malformed()))
def test_a_malformed_manifest_is_refused_by_every_level(
    change: Callable[[dict[str, Any]], object], sample_of: Sample, out: Path
) -> None:
    edit_manifest(out, change)
    checkpoint = source.open_checkpoint(str(out))
    with pytest.raises(BadManifest):
        verify_bytes(str(out))
    with pytest.raises(BadManifest):
        verify_structure(checkpoint)
    with pytest.raises(BadManifest):
        verify_values(surveyed(sample_of("flash")), survey.survey(checkpoint))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"format":1,"format":1}', b"[" * 100_000])
def test_a_manifest_that_is_no_strict_json_object_is_refused(data: bytes, out: Path) -> None:
    (out / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(BadManifest):
        verify_bytes(str(out))


# ---- structure


def test_structure_of_a_source_has_no_problems(sample_of: Sample) -> None:
    report = verify_structure(source.open_checkpoint(str(sample_of("pro-0813"))))
    assert report.ok and not report.has_manifest and not report.notes
    assert (report.release, report.storage, report.namespace) == ("pro-0813", "fp4+fp8", "deepseek")


def test_structure_of_an_output_has_no_problems(out: Path) -> None:
    report = verify_structure(source.open_checkpoint(str(out)))
    assert report.ok and report.has_manifest and not report.notes
    assert json.loads(json.dumps(report.document()))["num_tensors"] == report.num_tensors


def test_structure_a_wrong_total_in_the_index_is_a_note(flash: Path) -> None:
    index = json.loads((flash / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (flash / "model.safetensors.index.json").write_text(json.dumps(index))
    report = verify_structure(source.open_checkpoint(str(flash)))
    assert report.ok and len(report.notes) == 1


def test_structure_lists_deviations_and_disagreements_with_the_manifest(out: Path) -> None:
    edit(out, lambda tensors: tensors.pop(DENSE), DENSE)
    (out / "LICENSE").unlink()
    (out / "stray.safetensors").write_bytes(next(out.glob("*.safetensors")).read_bytes())
    (out / "notes.md").write_text("mine")
    edit_manifest(out, lambda m: m["files"].remove(next(f for f in m["files"] if f["file"] == "config.json")))
    report = verify_structure(source.open_checkpoint(str(out)))
    told = {(problem.what, problem.file) for problem in report.problems}
    shard_name = {problem.file for problem in report.problems if "not the size" in problem.what}
    assert len(shard_name) == 2  # the edited shard and the index
    assert (f"tensor {DENSE!r} is in no shard", None) in told
    assert ("a file that the manifest lists is missing", "LICENSE") in told
    assert ("the manifest does not list this file", "stray.safetensors") in told
    assert ("the manifest does not list this file", "config.json") in told
    assert "the manifest does not list 'notes.md'" in report.notes and not report.ok


def test_structure_without_a_config_cannot_be_verified(out: Path) -> None:
    (out / "config.json").unlink()
    with pytest.raises(MissingFile, match=r"config\.json"):
        verify_structure(source.open_checkpoint(str(out)))


def test_structure_of_a_finished_output_does_not_mind_a_leftover_work_directory(out: Path) -> None:
    (out / formats.WORK_NAME).mkdir()
    assert verify_structure(source.open_checkpoint(str(out))).ok and verify_bytes(str(out)).ok


# ---- the house


@pytest.mark.slow
def test_importing_verify_imports_neither_torch_nor_what_writes() -> None:
    code = (
        "import sys, dsv4ckpt.verify, dsv4ckpt.compare; loaded = set(sys.modules); import dsv4ckpt.decode_plain;"
        "print(sorted(loaded & {'torch'}), sorted(m for m in sys.modules if m in"
        "('dsv4ckpt.run', 'dsv4ckpt.codec', 'dsv4ckpt.outdir', 'dsv4ckpt.plan')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["[]", "[]"]


@pytest.mark.slow
def test_f32_tiles_of_a_whole_tensor_equal_a_float64_decode(sample_of: Sample) -> None:
    codes = np.frombuffer(stored(sample_of("flash-base"), DENSE), np.uint8).reshape(256, 256)
    scales = np.random.default_rng(6).random((2, 2), np.float32)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    exact = table[codes] * np.repeat(np.repeat(scales, 128, 0), 128, 1).astype(np.float64)
    rows = Rows(256, "F8_E4M3", bytearray(codes.tobytes()), FP8_TILE_F32, bytearray(scales.tobytes()))
    expected = [
        bf16_of(Fraction(value)) | 0x8000 * (value == 0 and bool(np.signbit(value))) for value in exact.flat
    ]
    require_equal(decode_plain.decode(rows), list(expected))


# ---- files of two checkpoints


def files_of(a: Path, b: Path, **options: Any) -> verify.FilesReport:
    left, right = surveyed(a), surveyed(b)
    report = verify_values(left, right)
    assert report.ok or options.pop("tensors_differ", False)
    return compare_files(left.checkpoint, right.checkpoint, report.proven)


def not_identical(report: verify.FilesReport) -> dict[str, FileState]:
    return {pair.name: pair.state for pair in report.pairs if pair.state is not FileState.IDENTICAL}


@pytest.mark.parametrize("namespace", Namespace)
def test_files_of_a_copy_are_identical_and_no_shard_is_read_again(
    namespace: Namespace, converted: Converted, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    compare_content = verify._state

    def listen(a: source.Checkpoint, b: source.Checkpoint, name: str, watch: verify.Watch) -> FileState:
        read.append(name)
        return compare_content(a, b, name, watch)

    monkeypatch.setattr(verify, "_state", listen)
    copy = Path(shutil.copytree(converted("flash", namespace), tmp_path / "copy"))
    report = files_of(converted("flash", namespace), copy)
    assert report.ok and not not_identical(report)
    assert {"config.json", INDEX_NAME, "LICENSE", "inference/config.json"} <= set(read)
    assert not [name for name in read if name.endswith(".safetensors")]
    assert {pair.name for pair in report.pairs} | {*OUR_NAMES} == {
        str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()
    }


def test_files_that_no_verdict_covers_are_read(sample_of: Sample, flash: Path) -> None:
    a, b = source.open_checkpoint(str(sample_of("flash"))), source.open_checkpoint(str(flash))
    assert not not_identical(compare_files(a, b, {}))
    file, _, end = place(flash, EXPERT)
    flip(file, end - 1, 7)
    report = compare_files(a, source.open_checkpoint(str(flash)), {})
    assert (report.ok, not_identical(report)) == (False, {file.name: FileState.DIFFERS})


@pytest.mark.slow
def test_files_of_several_pieces_are_compared_to_their_end(
    sample_of: Sample, flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_HASH_BYTES", 1000)
    a, b = source.open_checkpoint(str(sample_of("flash"))), source.open_checkpoint(str(flash))
    assert compare_files(a, b, {}).ok
    for offset in (0, 999, 1000, (flash / "config.json").stat().st_size - 1):
        flip(flash / "config.json", offset, 0)
        assert not_identical(compare_files(a, b, {})) == {"config.json": FileState.DIFFERS}
        flip(flash / "config.json", offset, 0)


def test_files_with_a_flipped_bit_differ(sample_of: Sample, flash: Path) -> None:
    file, begin, _ = place(flash, EXPERT)
    flip(file, begin, 0)
    report = files_of(sample_of("flash"), flash, tensors_differ=True)
    assert (report.ok, not_identical(report)) == (False, {file.name: FileState.DIFFERS})


def test_files_with_tensors_in_another_order_are_told_and_no_failure(sample_of: Sample, flash: Path) -> None:
    file = place(flash, DENSE)[0]
    shard = tiny.read_shard(file)
    tiny.write_shard(file, dict(reversed(shard.items())))
    report = files_of(sample_of("flash"), flash)
    assert (report.ok, not_identical(report)) == (True, {file.name: FileState.OTHER_LAYOUT})


@pytest.mark.slow
def test_files_split_otherwise_are_told_with_their_index_and_no_failure(
    sample_of: Sample, flash: Path
) -> None:
    file = place(flash, DENSE)[0]
    tiny.write_shard(flash / "more.safetensors", {DENSE: tiny.read_shard(file)[DENSE]})
    tiny.edit_shard(file, lambda shard: shard.pop(DENSE))
    tiny.edit_weight_map(flash, lambda weight_map: weight_map.update({DENSE: "more.safetensors"}))
    for a, b, alone in (
        (sample_of("flash"), flash, FileState.ONLY_B),
        (flash, sample_of("flash"), FileState.ONLY_A),
    ):
        report = files_of(a, b)
        others = {
            file.name: FileState.OTHER_LAYOUT,
            INDEX_NAME: FileState.OTHER_LAYOUT,
            "more.safetensors": alone,
        }
        assert (report.ok, not_identical(report)) == (True, others)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "LICENSE", "inference/config.json"])
def test_files_of_other_content_differ_even_if_they_mean_the_same(
    name: str, sample_of: Sample, flash: Path
) -> None:
    overwrite(flash / name, (flash / name).stat().st_size, b"\n")
    report = files_of(sample_of("flash"), flash)
    assert (report.ok, not_identical(report)) == (False, {name: FileState.DIFFERS})


def test_small_files_of_one_side_are_told_and_no_failure(sample_of: Sample, flash: Path) -> None:
    (flash / "LICENSE").unlink()
    (flash / "hf_quant_config.json").write_text("{}")
    (flash / "modeling.py").write_text("")  # what no conversion carries is not looked at
    (flash / formats.SIDECAR_NAME).write_text("")
    report = files_of(sample_of("flash"), flash)
    assert report.ok
    assert not_identical(report) == {"LICENSE": FileState.ONLY_A, "hf_quant_config.json": FileState.ONLY_B}
    counts = report.document()["counts"]
    assert counts["small"]["only in A"] == counts["small"]["only in B"] == 1
    assert json.loads(json.dumps(report.document()))["not_identical"][0]["state"] == "only in A"


def test_a_stop_flag_ends_the_comparison_of_files(sample_of: Sample) -> None:
    checkpoint, stop = source.open_checkpoint(str(sample_of("flash"))), run.StopFlag()
    stop.signal_number = 2
    with pytest.raises(Interrupted):
        compare_files(checkpoint, checkpoint, {}, stop=stop)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.dsv4.main([str(item) for item in arguments], standalone_mode=False)
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_level_bytes_tells_of_files_and_exits_1_for_a_config_alone(
    sample_of: Sample, flash: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("verify", sample_of("flash"), flash, "--level", "bytes")
    num_small = len([item for item in source.open_checkpoint(str(flash)).small_files() if not item.left])
    code, words = shown(capsys, *arguments)
    assert code == 0
    small = f"{num_small} of {num_small} small files identical"
    assert f"7 of 7 shards identical, config.json identical, index identical, {small}" in words
    overwrite(flash / "config.json", (flash / "config.json").stat().st_size, b"\n")
    code, words = shown(capsys, *arguments)
    assert code == 1 and "differs: config.json" in words and "7 of 7 shards" in words
    code, words = shown(capsys, *arguments, "--json")
    document = json.loads(words)
    assert code == 1 and document["values"]["ok"] and not document["ok"] and not document["files"]["ok"]
    assert document["files"]["counts"]["shard"] == {"identical": 7}
    for part in (["--subset", "1/9"], ["--tensor", DENSE]):
        code, words = shown(capsys, *arguments, *part)
        assert code == 0 and "files     not compared" in words
    assert shown(capsys, *arguments[:3])[0] == 0, "values alone make no claim about files"
