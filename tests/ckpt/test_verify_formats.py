"""verify: every storage format against every other, made from the flash sample by numpy; and what is wrong in them.

The sample's expert scales span three powers of two, so every format here holds its values exactly.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import Tensor

from dsv4ckpt import compare
from dsv4ckpt.compare import Verdict
from dsv4ckpt.formats import Storage

Shard = dict[str, Tensor]
Remake = Callable[[Shard], Shard]
Made = Callable[[str], Path]
EXPERT = "layers.1.ffn.experts.3.w1"
DENSE = "layers.1.attn.wo_b"
# E2M1 magnitudes by code & 7, and the E4M3 byte of each of them times a power of two
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
POWERS = np.array([2.0**exponent for exponent in range(-9, 9)])


def e8m0(tensor: Tensor) -> np.ndarray:
    """Exponents of stored scale bytes, in the tensor's shape."""
    assert isinstance(tensor.data, bytes)
    return np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape).astype(np.int64) - 127


def is_expert(name: str, *heads: str) -> bool:
    return name.startswith(heads) and ".ffn.experts." in name


def to_nvfp4(shard: Shard) -> Shard:
    """Experts of layers: nibbles stay, scales become E4M3 per 16 under one F32 number for w1 and w3."""
    made: Shard = {}
    for name, tensor in shard.items():
        stem, _, leaf = name.rpartition(".")
        if not is_expert(name, "layers.") or leaf == "scale":
            if not is_expert(name, "layers."):
                made[name] = tensor
            continue
        owner, _, inner = stem.rpartition(".")
        together = ("w2",) if inner == "w2" else ("w1", "w3")
        highest = max(int(e8m0(shard[f"{owner}.{one}.scale"]).max()) for one in together)
        exponents = np.repeat(e8m0(shard[f"{stem}.scale"]) - highest + 8, 2, axis=1)
        assert exponents.min() >= -6, "E4M3 has no mantissa bit to spend below its normal numbers"
        made[f"{stem}.weight"] = tensor._replace(dtype="U8")
        scales = ((exponents + 7) << 3).astype(np.uint8)
        made[f"{stem}.weight_scale"] = Tensor("F8_E4M3", scales.shape, scales.tobytes())
        made[f"{stem}.weight_scale_2"] = Tensor("F32", (), struct.pack("<f", 2.0 ** (highest - 8)))
        made[f"{stem}.input_scale"] = Tensor("F32", (), struct.pack("<f", 1.0))
    return made


def to_f32(tensor: Tensor) -> Tensor:
    """E8M0 scales as the same powers of two in F32."""
    return Tensor("F32", tensor.shape, (2.0 ** e8m0(tensor)).astype(np.float32).tobytes())


def to_compressed_tensors(shard: Shard) -> Shard:
    made: Shard = {}
    for name, tensor in shard.items():
        stem, _, leaf = name.rpartition(".")
        if tensor.dtype in ("I8", "F8_E8M0") and is_expert(name, "layers.", "mtp."):
            new = "weight_packed" if leaf == "weight" else "weight_scale"
            made[f"{stem}.{new}"] = tensor._replace(dtype="U8")
        elif tensor.dtype == "F8_E8M0" and not name.endswith("engram.embed.scale"):
            made[f"{stem}.weight_scale"] = to_f32(tensor)
        else:
            made[name] = tensor
    return made


def to_fp8(shard: Shard) -> Shard:
    """Experts as E4M3 under the scale of a 128x128 tile: its largest one over 64."""
    bits = np.arange(128, dtype=np.int64)
    exponent, mantissa = bits >> 3, bits & 7
    e4m3 = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa / 512)[:127]
    made = dict(shard)
    for name, tensor in shard.items():
        if tensor.dtype != "I8":
            continue
        packed = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)  # type: ignore[arg-type]
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
        scale_name = name.removesuffix("weight") + "scale"
        fine = e8m0(shard[scale_name])
        tiles = np.array([[fine[row : row + 128, col : col + 4].max() - 6 for col in range(0, fine.shape[1], 4)]
                          for row in range(0, fine.shape[0], 128)])  # fmt: skip
        coarse = np.repeat(np.repeat(tiles, 128, axis=0), 4, axis=1)[: fine.shape[0], : fine.shape[1]]
        sizes = E2M1[nibbles & 7] * 2.0 ** np.repeat(fine - coarse, 32, axis=1)
        codes = np.searchsorted(e4m3, sizes)
        assert (e4m3[codes] == sizes).all()
        codes = (codes | (nibbles & 8) << 4).astype(np.uint8)
        made[name] = Tensor("F8_E4M3", codes.shape, codes.tobytes())
        made[scale_name] = Tensor("F8_E8M0", tiles.shape, (tiles + 127).astype(np.uint8).tobytes())
    return made


def to_fp8_f32scale(shard: Shard) -> Shard:
    made = to_fp8(shard)
    return {name: to_f32(tensor) if tensor.dtype == "F8_E8M0" else tensor for name, tensor in made.items()}


def as_released(shard: Shard) -> Shard:
    return shard


REMAKES: dict[Storage, Remake] = {
    Storage.FP4_FP8: as_released,
    Storage.NVFP4: to_nvfp4,
    Storage.MXFP4_CT: to_compressed_tensors,
    Storage.FP8: to_fp8,
    Storage.FP8_F32SCALE: to_fp8_f32scale,
}


def remake(directory: Path, change: Remake) -> Path:
    """Write every shard and the index of a copy anew."""
    weight_map = {}
    for file in sorted(directory.glob("*.safetensors")):
        shard = change(tiny.read_shard(file))
        tiny.write_shard(file, shard)
        weight_map |= dict.fromkeys(shard, file.name)
    tiny.edit_weight_map(directory, lambda old: (old.clear(), old.update(weight_map)))
    return directory


@pytest.fixture(scope="module")
def made(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The flash sample in a storage format; nobody writes into it."""

    @functools.cache
    def directory(storage: str) -> Path:
        copy = tiny.copy_of(flash, tmp_path_factory.mktemp("formats") / storage)
        return remake(copy, REMAKES[Storage(storage)])

    return directory


def compared(a: Path, b: Path, **options: Any) -> compare.ValuesReport:
    return compare.verify_values(tiny.survey_of(a), tiny.survey_of(b), **options)


def the_one(report: compare.ValuesReport) -> compare.TensorVerdict:
    assert len(report.tensors) == 1, report.tensors
    return report.tensors[0]


def edited(directory: Path, target: Path, name: str, edit: Callable[[Shard], object]) -> Path:
    """A copy in which the shard that holds a tensor is another."""
    copy = tiny.copy_of(directory, target)
    file = tiny.shard_of(copy, name)
    tiny.edit_shard(file, edit)
    shard = tiny.read_shard(file)

    def follow(weight_map: dict[str, str]) -> None:
        for gone in [key for key, value in weight_map.items() if value == file.name and key not in shard]:
            del weight_map[gone]
        weight_map.update(dict.fromkeys(shard, file.name))

    tiny.edit_weight_map(copy, follow)
    return copy


def set_number(name: str, value: float) -> Callable[[Shard], object]:
    return lambda shard: shard.update({name: shard[name]._replace(data=struct.pack("<f", value))})


def xor_first(name: str, bits: int) -> Callable[[Shard], object]:
    def change(shard: Shard) -> None:
        data = bytearray(shard[name].data)  # type: ignore[arg-type]
        data[0] ^= bits
        shard[name] = shard[name]._replace(data=bytes(data))

    return change


# ---- right


@pytest.mark.parametrize("storage", REMAKES)
def test_inspect_finds_no_deviation_in_any_format(storage: Storage, made: Made) -> None:
    found = tiny.survey_of(made(storage))
    assert (found.identity.storage, found.deviations, found.checkpoint.problems) == (storage, [], [])


@pytest.mark.slow
@pytest.mark.parametrize("b", REMAKES)
@pytest.mark.parametrize("a", REMAKES)
def test_values_of_every_format_equal_those_of_every_other(a: Storage, b: Storage, made: Made) -> None:
    report = compared(made(a), made(b))
    assert report.ok and not report.tensors
    assert (report.counts[Verdict.SAME_VALUES] > 0) == (a != b)


@pytest.mark.parametrize("storage", REMAKES)
def test_every_stored_byte_of_every_format_is_proven(storage: Storage, made: Made, tmp_path: Path) -> None:
    report = compared(made(storage), tiny.copy_of(made(storage), tmp_path / "copy"))
    tensors = tiny.survey_of(made(storage)).checkpoint.tensors
    assert report.proven == {name: place.entry.end - place.entry.begin for name, place in tensors.items()}
    assert report.counts[Verdict.SAME_BYTES] == sum(report.counts.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "storage"), [(to_nvfp4, Storage.NVFP4_32), (to_compressed_tensors, Storage.MXFP4_CT_32)]
)
def test_formats_of_v41_with_its_tiles_and_tables_equal_the_release(
    change: Remake, storage: Storage, tmp_path: Path
) -> None:
    released = tiny.make_sample("v4.1-flash", tmp_path / "released")
    other = remake(tiny.copy_of(released, tmp_path / "other"), change)
    found = tiny.survey_of(other)
    assert (found.identity.storage, found.deviations) == (storage, [])
    report = compared(released, other)
    assert report.ok and report.counts[Verdict.SAME_VALUES] >= 96


def test_dense_matrices_of_base_and_compressed_tensors_differ_by_name_only(made: Made) -> None:
    report = compared(
        made(Storage.FP8_F32SCALE), made(Storage.MXFP4_CT), tensors=frozenset({f"{DENSE}.weight"})
    )
    assert report.counts[Verdict.SAME_BYTES] == 1
    assert not report.proven, "a file that holds other names is another file"


def test_nvfp4_scales_halved_under_twice_the_number_are_the_same_values(made: Made, tmp_path: Path) -> None:
    def change(shard: Shard) -> None:
        scales = np.frombuffer(shard[f"{EXPERT}.weight_scale"].data, np.uint8) - 8  # type: ignore[arg-type]
        shard[f"{EXPERT}.weight_scale"] = shard[f"{EXPERT}.weight_scale"]._replace(data=scales.tobytes())
        (number,) = struct.unpack("<f", shard[f"{EXPERT}.weight_scale_2"].data)  # type: ignore[arg-type]
        set_number(f"{EXPERT}.weight_scale_2", 2 * number)(shard)

    other = edited(made(Storage.NVFP4), tmp_path / "other", f"{EXPERT}.weight", change)
    report = compared(made(Storage.NVFP4), other)
    assert report.ok and report.counts[Verdict.SAME_VALUES] == 1


# ---- wrong


@pytest.mark.slow
@pytest.mark.parametrize("against", REMAKES)
def test_one_step_of_weight_scale_2_is_found_against_every_format(
    against: Storage, made: Made, tmp_path: Path
) -> None:
    change = xor_first(f"{EXPERT}.weight_scale_2", 1)
    found = the_one(
        compared(made(against), edited(made(Storage.NVFP4), tmp_path / "o", f"{EXPERT}.weight", change))
    )
    assert (found.name, found.verdict, found.reason) == (f"{EXPERT}.weight", Verdict.DIFFERS, None)
    assert found.apart is not None and found.apart.distance == 0, (
        "bfloat16 cannot tell them, codes are not rounded"
    )
    assert found.apart.num_values > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "leaf", "bits", "num_values"),
    [
        (Storage.NVFP4, "weight_scale", 0x01, 16),
        (Storage.NVFP4, "weight", 0x04, 1),
        (Storage.MXFP4_CT, "weight_scale", 0x01, 32),
        (Storage.MXFP4_CT, "weight_packed", 0x80, 1),
        (Storage.FP8, "weight", 0x80, 1),
        (Storage.FP8_F32SCALE, "scale", 0x01, 128 * 128),
    ],
)
def test_one_flipped_bit_is_found_where_it_is(
    storage: Storage, leaf: str, bits: int, num_values: int, made: Made, tmp_path: Path
) -> None:
    name = f"{EXPERT}.{leaf}"
    found = the_one(
        compared(made(Storage.FP4_FP8), edited(made(storage), tmp_path / "o", name, xor_first(name, bits)))
    )
    assert (found.name, found.verdict) == (f"{EXPERT}.weight", Verdict.DIFFERS)
    assert found.apart is not None and (found.apart.row, found.apart.col < 32) == (0, True)
    zeros = num_values / 4  # codes 0 and 8 of 16 stay zeros under any scale
    assert num_values - 2 * zeros <= found.apart.num_values <= num_values


@pytest.mark.slow
def test_another_input_scale_is_a_difference_between_two_nvfp4_and_no_value_elsewhere(
    made: Made, tmp_path: Path
) -> None:
    name = f"{EXPERT}.input_scale"
    other = edited(made(Storage.NVFP4), tmp_path / "other", name, set_number(name, 0.5))
    found = the_one(compared(made(Storage.NVFP4), other))
    assert (found.name, found.verdict, found.apart) == (f"{EXPERT}.weight", Verdict.DIFFERS, None)
    assert found.reason == "its input_scale is 1.0 in a, 0.5 in b"
    assert compared(made(Storage.FP4_FP8), other).ok


@pytest.mark.slow
@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale", "weight_scale"])
@pytest.mark.parametrize("against", [Storage.FP4_FP8, Storage.NVFP4])
def test_nvfp4_without_one_of_its_scales_differs_with_a_reason(
    against: Storage, leaf: str, made: Made, tmp_path: Path
) -> None:
    other = edited(
        made(Storage.NVFP4), tmp_path / "o", f"{EXPERT}.weight", lambda t: t.pop(f"{EXPERT}.{leaf}")
    )
    found = the_one(compared(made(against), other))
    words = "scales" if leaf == "weight_scale" else leaf
    assert (found.name, found.verdict, found.reason) == (
        f"{EXPERT}.weight",
        Verdict.DIFFERS,
        f"in b it has no {words}",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Tensor("F32", (1,), struct.pack("<f", 1.0)), "F32 [1] instead of F32 []"),
        (Tensor("BF16", (), b"\x80\x3f"), "BF16 [] instead of F32 []"),
        (Tensor("F32", (0,), b""), "F32 [0] instead of F32 []"),
    ],
)
def test_a_weight_scale_2_of_another_form_differs_with_a_reason_and_equals_its_copy(
    tensor: Tensor, words: str, made: Made, tmp_path: Path
) -> None:
    name = f"{EXPERT}.weight_scale_2"
    other = edited(made(Storage.NVFP4), tmp_path / "o", name, lambda shard: shard.update({name: tensor}))
    found = the_one(compared(made(Storage.FP4_FP8), other))
    assert found.reason == f"in b it has a weight_scale_2 that is {words}"
    if tensor.size:
        assert compared(other, tiny.copy_of(other, tmp_path / "copy")).ok


def test_numbers_whose_codes_are_gone_are_told_by_their_stored_names(made: Made, tmp_path: Path) -> None:
    name = f"{EXPERT}.weight"
    other = edited(made(Storage.NVFP4), tmp_path / "other", name, lambda shard: shard.pop(name))
    told = {item.name: item.verdict for item in compared(other, made(Storage.NVFP4)).tensors}
    leaves = ("weight_scale", "weight_scale_2", "input_scale")
    assert told == {name: Verdict.EXTRA, **{f"{EXPERT}.{leaf}": Verdict.MISSING for leaf in leaves}}


def test_report_with_a_reason_is_json(made: Made, tmp_path: Path) -> None:
    name = f"{EXPERT}.input_scale"
    other = edited(made(Storage.NVFP4), tmp_path / "other", name, set_number(name, float("nan")))
    document = json.loads(json.dumps(compared(made(Storage.NVFP4), other).document()))
    assert document["tensors"][0]["reason"] == "its input_scale is 1.0 in a, nan in b"
