"""Across formats: what is lossless is proven, what is not is refused with tensor and tile, and never silent.

Blocks are made by hand in a real checkpoint; expectations are the theorems on exponent gaps, not our own arithmetic.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from test_roundtrip import convert, files_of, tensors_of

from dsv4ckpt import compare, errors, formats, verify
from dsv4ckpt.formats import SIDECAR_NAME, Target
from dsv4ckpt.names import Namespace

W1, W3 = "layers.1.ffn.experts.2.w1", "layers.1.ffn.experts.2.w3"  # [128, 256]: 8 scales in a row
DENSE = "layers.1.attn.wq_a"


def edit(directory: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change a tensor's bytes in place."""

    def apply(tensors: dict[str, tiny.Tensor]) -> None:
        data = tensors[name].data
        assert isinstance(data, bytes)
        changed = bytearray(data)
        change(changed)
        tensors[name] = tensors[name]._replace(data=bytes(changed))

    tiny.edit_shard(tiny.shard_of(directory, name), apply)


def set_scales(directory: Path, matrix: str, byte: int, at: dict[int, int] | None = None) -> None:
    """All scales of a matrix to one byte, some to others."""

    def change(data: bytearray) -> None:
        data[:] = bytes([byte]) * len(data)
        for position, other in (at or {}).items():
            data[position] = other

    edit(directory, f"{matrix}.scale", change)


def no_zero_blocks(directory: Path, matrix: str) -> None:
    """Every block gets a value, so that every block counts."""

    def change(data: bytearray) -> None:
        for block in range(0, len(data), 16):
            data[block] |= 0x01

    edit(directory, f"{matrix}.weight", change)


def same_values(a: Path, b: Path) -> bool:
    report = compare.verify_values(tiny.survey_of(a), tiny.survey_of(b))
    return report.ok


@pytest.mark.slow
def test_gap_of_14_in_a_tile_is_recast_and_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    no_zero_blocks(checkpoint, W1)
    set_scales(checkpoint, W1, 120, {0: 120 - 14})
    convert(checkpoint, tmp_path / "fp8", Target.FP8)
    assert same_values(checkpoint, tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


def test_gap_of_15_is_refused_with_tensor_and_tile_before_anything_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    no_zero_blocks(checkpoint, W1)
    set_scales(checkpoint, W1, 120, {5 + 8 * 3: 120 - 15})  # row 3, columns 160..191: tile (0, 1)
    for target in (Target.FP8, Target.FP8_F32SCALE):
        with pytest.raises(errors.NotLossless) as caught:
            convert(checkpoint, tmp_path / "fp8", target)
        assert f"{W1}.weight" in caught.value.what
        assert "tile (0, 1)" in caught.value.facts["found"] and "15" in caught.value.facts["found"]
        assert caught.value.exit_code == 3
        assert not (tmp_path / "fp8").exists()


@pytest.mark.slow
def test_gap_of_15_is_counted_when_it_is_allowed(checkpoint: Path, tmp_path: Path) -> None:
    """At a gap of 15 the values 0.5 and 1.5 are lost, no others."""
    edit(checkpoint, f"{W1}.weight", lambda data: data.__setitem__(slice(0, 16), bytes([0x31] * 16)))
    no_zero_blocks(checkpoint, W1)
    set_scales(checkpoint, W1, 120, {0: 105})
    summary = convert(checkpoint, tmp_path / "fp8", Target.FP8, allow_lossy=True)
    assert summary.num_inexact == 32
    report = compare.verify_values(tiny.survey_of(checkpoint), tiny.survey_of(tmp_path / "fp8"))
    (apart,) = [item.apart for item in report.tensors]
    assert apart is not None and apart.num_values == 32


@pytest.mark.slow
def test_blocks_of_zeros_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    """DeepSeek's quantizer gives them scale byte 1, far below every other."""
    no_zero_blocks(checkpoint, W1)
    edit(checkpoint, f"{W1}.weight", lambda data: data.__setitem__(slice(0, 16), bytes([0x80] * 16)))
    set_scales(checkpoint, W1, 120, {0: 1})
    for target in (Target.FP8, Target.NVFP4):
        convert(checkpoint, tmp_path / target, target)
        assert same_values(checkpoint, tmp_path / target)
        convert(tmp_path / target, tmp_path / f"{target} back", Target.NATIVE)
        assert files_of(tmp_path / f"{target} back") == files_of(checkpoint)


@pytest.mark.slow
def test_nvfp4_holds_a_gap_of_17_over_both_matrices_and_no_more(checkpoint: Path, tmp_path: Path) -> None:
    for matrix in (W1, W3):
        no_zero_blocks(checkpoint, matrix)
    set_scales(checkpoint, W1, 120)
    set_scales(checkpoint, W3, 120, {9: 120 - 17})
    convert(checkpoint, tmp_path / "nvfp4", Target.NVFP4)
    assert same_values(checkpoint, tmp_path / "nvfp4")
    convert(tmp_path / "nvfp4", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)
    set_scales(checkpoint, W3, 120, {9: 120 - 18})
    with pytest.raises(errors.NotLossless) as caught:
        convert(checkpoint, tmp_path / "more", Target.NVFP4)
    assert f"{W3}.weight" in caught.value.what and "(1, 1)" in caught.value.facts["found"]
    assert not (tmp_path / "more").exists()


@pytest.mark.slow
def test_nvfp4_keeps_every_nibble_and_shares_scale_2_of_w1_and_w3(checkpoint: Path, tmp_path: Path) -> None:
    set_scales(checkpoint, W1, 118)
    set_scales(checkpoint, W3, 121)
    convert(checkpoint, tmp_path / "nvfp4", Target.NVFP4)
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "nvfp4")
    experts = [name for name in before if ".experts." in name and name.endswith(".weight")]
    assert all(after[name].data == before[name].data for name in experts)
    assert {after[name].dtype for name in experts if name.startswith("layers.")} == {"U8"}
    assert after[f"{W1}.weight_scale_2"].data == struct.pack("<f", 2.0 ** (121 - 127 - 8))
    assert after[f"{W3}.weight_scale_2"] == after[f"{W1}.weight_scale_2"]
    assert after[f"{W1}.weight_scale"].data == bytes([0x60]) * (128 * 16)  # 2**5 in E4M3
    assert after[f"{W1}.input_scale"] == tiny.Tensor("F32", (), struct.pack("<f", 1.0))
    draft = [name for name in before if name.startswith("mtp.")]
    assert all(after[name] == before[name] for name in draft)
    document = json.loads((tmp_path / "nvfp4" / "hf_quant_config.json").read_text())
    assert document["quantization"]["exclude_modules"]


@pytest.mark.slow
def test_input_scales_come_from_the_file(checkpoint: Path, tmp_path: Path) -> None:
    names = [name for name in tensors_of(checkpoint) if name.startswith("layers.") and ".experts." in name]
    scales = {
        name.replace(".weight", ".input_scale"): 0.25
        for name in names
        if name.endswith(".weight") and "shared" not in name
    }
    scales["layers.0.ffn.experts.0.w2.input_scale"] = 0.5
    convert(checkpoint, tmp_path / "out", Target.NVFP4, input_scales=scales)
    found = tensors_of(tmp_path / "out")
    assert found["layers.0.ffn.experts.0.w2.input_scale"].data == struct.pack("<f", 0.5)
    assert found[f"{W1}.input_scale"].data == struct.pack("<f", 0.25)
    with pytest.raises(errors.Usage, match="share"):
        convert(checkpoint, tmp_path / "x", Target.NVFP4, input_scales={**scales, f"{W1}.input_scale": 1.0})
    with pytest.raises(errors.Usage, match="does not name"):
        convert(
            checkpoint,
            tmp_path / "x",
            Target.NVFP4,
            input_scales={f"{W1}.input_scale": 1.0, f"{W3}.input_scale": 1.0},
        )
    with pytest.raises(errors.Usage, match="does not have"):
        convert(checkpoint, tmp_path / "x", Target.NVFP4, input_scales={**scales, "nobody.input_scale": 1.0})


def test_compressed_tensors_is_a_relabel_of_bytes(flash: Path, tmp_path: Path) -> None:
    convert(flash, tmp_path / "ct", Target.MXFP4_CT)
    before, after = tensors_of(flash), tensors_of(tmp_path / "ct")
    for name, tensor in before.items():
        if ".experts." in name and name.endswith(".weight"):
            assert after[name + "_packed"] == tensor._replace(dtype="U8")
            scale = before[name.replace(".weight", ".scale")]
            assert after[name + "_scale"] == scale._replace(dtype="U8")
        elif tensor.dtype == "F8_E4M3":
            assert after[name] == tensor
            assert after[name + "_scale"].dtype == "F32"


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0.75, 3.0, 0.0, -1.0])
def test_f32_scale_that_is_no_power_of_two_does_not_become_e8m0(
    sample_of: Callable[[str], Path], tmp_path: Path, bad: float
) -> None:
    base = tiny.copy_of(sample_of("flash-base"), tmp_path / "base")
    edit(base, f"{DENSE}.scale", lambda data: data.__setitem__(slice(4, 8), struct.pack("<f", bad)))
    with pytest.raises(errors.NotLossless, match="power of two"):
        convert(base, tmp_path / "fp8", Target.FP8)
    assert not (tmp_path / "fp8").exists()
    if bad > 0:
        summary = convert(base, tmp_path / "fp8", Target.FP8, allow_lossy=True)
        assert [loss.name for loss in summary.losses if loss.num_inexact] == [f"{DENSE}.weight"]


# ---- adversarial blocks through BF16 and back


SCALES_OF_F32 = [1.0, 0.1, -0.3, 2.0**-100, 3e-38, 1e-41, 0.0, 1e30]


@pytest.mark.slow
@pytest.mark.parametrize("value", SCALES_OF_F32)
def test_base_scales_of_any_size_and_sign_come_back(
    sample_of: Callable[[str], Path], tmp_path: Path, value: float
) -> None:
    """Scales so small that BF16 cannot tell the codes apart: the sidecar keeps those codes."""
    base = tiny.copy_of(sample_of("flash-base"), tmp_path / "base")
    edit(base, f"{DENSE}.scale", lambda data: data.__setitem__(slice(0, 4), struct.pack("<f", value)))
    convert(base, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.slow
@pytest.mark.parametrize("byte", [0, 1, 2, 3, 105, 246, 247, 254])
def test_e8m0_scales_of_dense_tiles_from_end_to_end(flash: Path, tmp_path: Path, byte: int) -> None:
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")
    if byte > 246:  # else the products would be infinite
        edit(
            checkpoint,
            f"{DENSE}.weight",
            lambda data: data.__setitem__(slice(None), bytes(code & 0x87 for code in data)),
        )
    edit(checkpoint, f"{DENSE}.scale", lambda data: data.__setitem__(0, byte))
    convert(checkpoint, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


BLOCKS = {
    "largest 0.5": [0x11, 0x99, 0x00, 0x88],
    "largest 1": [0x22, 0xAA, 0x20, 0x0A],
    "largest 1.5": [0x33, 0xBB, 0x31, 0x83],
    "largest 2": [0x44, 0xC4, 0x40, 0x84],
    "largest 3": [0x55, 0xD5, 0x54, 0x85],
    "largest 4": [0x66, 0xE6, 0x64, 0x46],
    "largest 6": [0x77, 0xF7, 0x07, 0x78],
    "only 4 and 2": [0x64, 0x46],
    "only -0": [0x88],
    "zeros": [0x00],
    "all codes": [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE],
}


@pytest.mark.slow
@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("byte", [0, 1, 2, 3, 6, 127, 235, 240, 252])
def test_adversarial_fp4_blocks_from_end_to_end(
    flash: Path, tmp_path: Path, byte: int, namespace: Namespace
) -> None:
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")

    def change(data: bytearray) -> None:
        for number, pattern in enumerate(BLOCKS.values()):
            data[16 * number : 16 * (number + 1)] = bytes(pattern * 16)[:16]

    edit(checkpoint, f"{W1}.weight", change)
    set_scales(checkpoint, W1, byte)
    convert(checkpoint, tmp_path / "bf16", Target.BF16, namespace=namespace)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


@pytest.mark.slow
def test_tiles_whose_largest_code_is_224_and_odd_subnormals_come_back(flash: Path, tmp_path: Path) -> None:
    """A fresh quantizer would halve the first tile's scale and double its codes."""
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")

    def change(data: bytearray) -> None:
        data[:] = bytes(min(code & 0x7F, 0x76) | code & 0x80 for code in data)  # 0x76: 224
        data[:64] = bytes([0x01, 0x83, 0x05, 0x80] * 16)

    edit(checkpoint, f"{DENSE}.weight", change)
    convert(checkpoint, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


@pytest.mark.slow
def test_weight_and_scale_in_different_shards_come_back(flash: Path, tmp_path: Path) -> None:
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")
    moved: dict[str, tiny.Tensor] = {}
    tiny.edit_shard(
        tiny.shard_of(checkpoint, f"{W1}.scale"),
        lambda tensors: moved.update({f"{W1}.scale": tensors.pop(f"{W1}.scale")}),
    )
    tiny.edit_shard(checkpoint / tiny.EMBED, lambda tensors: tensors.update(moved))
    tiny.edit_weight_map(checkpoint, lambda weight_map: weight_map.update({f"{W1}.scale": tiny.EMBED}))
    convert(checkpoint, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


def without_scales(flash: Path, target: Path) -> Path:
    """A copy in which DENSE has no scales, as one public repack has it."""
    checkpoint = tiny.copy_of(flash, target)
    name = f"{DENSE}.scale"
    tiny.edit_shard(tiny.shard_of(checkpoint, name), lambda tensors: tensors.pop(name))
    tiny.edit_weight_map(checkpoint, lambda weight_map: weight_map.pop(name))
    return checkpoint


@pytest.mark.slow
def test_fp8_weight_without_scales_comes_back_without_scales(flash: Path, tmp_path: Path) -> None:
    checkpoint = without_scales(flash, tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "bf16", Target.BF16, unit_scales=frozenset({f"{DENSE}.weight"}))
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


@pytest.mark.slow
def test_header_with_metadata_padding_and_another_order_comes_back(flash: Path, tmp_path: Path) -> None:
    """The file's own bytes, not our way of writing them."""
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")
    path = checkpoint / tiny.FIRST_LAYER
    tensors = dict(sorted(tiny.read_shard(path).items(), key=lambda item: item[0][::-1]))
    header = json.loads(tiny.header_of(tensors))
    raw = json.dumps({"__metadata__": {"b": "2", "a": "1"}, **header}, indent=1).encode() + b" " * 13
    tiny.replace(path, tiny.packed(raw, b"".join(bytes(t.data) for t in tensors.values())))  # type: ignore[arg-type]
    convert(checkpoint, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


@pytest.mark.slow
def test_bf16_without_any_memory_still_gets_every_value(flash: Path, tmp_path: Path) -> None:
    """No sidecar, no source: grid inference. Values are the same, and only a few scales may differ."""
    for namespace in Namespace:
        convert(flash, tmp_path / namespace, Target.BF16, namespace=namespace)
        (tmp_path / namespace / SIDECAR_NAME).unlink()
        summary = convert(tmp_path / namespace, tmp_path / f"{namespace} back", Target.NATIVE)
        assert summary.num_inexact == 0
        assert same_values(flash, tmp_path / f"{namespace} back")
        document = json.loads((tmp_path / f"{namespace} back" / "config.json").read_text())
        assert document == json.loads((flash / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT])
def test_bf16_into_any_format_keeps_values(flash: Path, tmp_path: Path, target: Target) -> None:
    convert(flash, tmp_path / "bf16", Target.BF16)
    summary = convert(tmp_path / "bf16", tmp_path / "out", target)
    assert summary.num_inexact == 0
    assert same_values(flash, tmp_path / "out")
    assert verify.verify_bytes(str(tmp_path / "out")).ok


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_and_resuming_change_no_byte(flash: Path, tmp_path: Path, workers: int) -> None:
    from dsv4ckpt import original, plan, run, sidecar, source, survey

    convert(flash, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "a", Target.NATIVE)
    checkpoint = source.open_checkpoint(str(tmp_path / "bf16"))
    found = sidecar.open_sidecar(str(tmp_path / "bf16"))
    assert found is not None
    options = plan.ConvertOptions(target=Target.NATIVE)
    made = plan.make_plan(survey.survey(checkpoint), options, original.of_sidecar(found))
    run.execute(made, checkpoint, str(tmp_path / "b"), num_workers=workers)
    for name in os.listdir(tmp_path / "a"):
        if (tmp_path / "a" / name).is_file():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.slow
def test_sidecar_does_not_end_as_loaders_expect_and_is_listed_in_the_manifest(
    flash: Path, tmp_path: Path
) -> None:
    convert(flash, tmp_path / "bf16", Target.BF16)
    assert not SIDECAR_NAME.endswith(".safetensors")
    manifest = json.loads((tmp_path / "bf16" / "dsv4.manifest.json").read_text())
    assert SIDECAR_NAME in {row["file"] for row in manifest["files"]}
    assert not (tmp_path / "bf16" / formats.WORK_NAME).exists()


@pytest.mark.slow
def test_run_that_lost_a_part_of_its_sidecar_makes_that_shard_again(flash: Path, tmp_path: Path) -> None:
    from dsv4ckpt import outdir

    convert(flash, tmp_path / "whole", Target.BF16)
    broken = tmp_path / "broken"

    class Stopped(Exception):
        pass

    def stop_before_the_sidecar(*_: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4ckpt.run._write_sidecar", stop_before_the_sidecar)
        with pytest.raises(Stopped):
            convert(flash, broken, Target.BF16)
    parts = sorted((broken / formats.WORK_NAME).glob(f"{outdir.PART_PREFIX}*"))
    assert len(parts) == len(list(broken.glob("*.safetensors")))
    parts[2].unlink()
    tiny.replace(parts[3], b"damaged")
    summary = convert(flash, broken, Target.BF16)
    assert summary.num_resumed == len(parts) - 2
    assert files_of(broken) == files_of(tmp_path / "whole")
    assert (broken / SIDECAR_NAME).read_bytes() == (tmp_path / "whole" / SIDECAR_NAME).read_bytes()


def test_selection_of_layers_leaves_no_sidecar(flash: Path, tmp_path: Path) -> None:
    convert(flash, tmp_path / "two", Target.BF16, layers=(0, 1))
    assert not (tmp_path / "two" / SIDECAR_NAME).exists()


@pytest.mark.slow
def test_single_file_without_an_index_comes_back_without_one(flash: Path, tmp_path: Path) -> None:
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")
    together = tensors_of(checkpoint)
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    (checkpoint / tiny.INDEX).unlink()
    tiny.write_shard(checkpoint / "model.safetensors", together)
    convert(checkpoint, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


@pytest.mark.slow
def test_config_that_lacks_the_quantization_comes_back_as_it_was(flash: Path, tmp_path: Path) -> None:
    """Launch configs have no expert_dtype; somebody's may lack more. The stored bytes are what is restored."""
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")
    tiny.edit_json(
        checkpoint / "config.json",
        lambda document: [document.pop(key) for key in ("quantization_config", "expert_dtype")],
    )
    convert(checkpoint, tmp_path / "bf16", Target.BF16)
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)


@pytest.mark.slow
def test_config_edited_by_a_trainer_keeps_its_keys_and_gets_the_quantization_back(
    flash: Path, tmp_path: Path
) -> None:
    convert(flash, tmp_path / "bf16", Target.BF16)
    (tmp_path / "bf16" / "dsv4.manifest.json").unlink()
    tiny.edit_json(
        tmp_path / "bf16" / "config.json", lambda document: document.update(rope_theta=20000, note="tuned")
    )
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    document = json.loads((tmp_path / "back" / "config.json").read_text())
    released = json.loads((flash / "config.json").read_text())
    assert document == {**released, "rope_theta": 20000, "note": "tuned"}


@pytest.mark.slow
def test_changed_matrix_that_the_release_has_without_scales_is_quantized_without_scales(
    flash: Path, tmp_path: Path
) -> None:
    """Any other scale would be lost: there is no tensor for it."""
    from test_roundtrip import tune

    checkpoint = without_scales(flash, tmp_path / "checkpoint")
    unit = frozenset({f"{DENSE}.weight"})
    convert(checkpoint, tmp_path / "bf16", Target.BF16, unit_scales=unit)
    tune(tmp_path / "bf16", f"{DENSE}.weight", lambda values: values * 1.25)
    convert(tmp_path / "bf16", tmp_path / "out", Target.NATIVE, allow_lossy=True)
    assert f"{DENSE}.scale" not in tensors_of(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again", Target.BF16, unit_scales=unit)
    stored = [
        tensors_of(directory)[f"{DENSE}.weight"].data for directory in (tmp_path / "bf16", tmp_path / "again")
    ]
    one, two = (torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float() for data in stored)  # type: ignore[arg-type]
    assert float((one - two).norm() / one.norm()) < 0.05


@pytest.mark.slow
def test_nan_that_was_allowed_comes_back_as_it_was(flash: Path, tmp_path: Path) -> None:
    """The sign and payload of a NaN code, and a NaN scale, are nothing that BF16 values tell."""
    checkpoint = tiny.copy_of(flash, tmp_path / "checkpoint")
    edit(checkpoint, f"{DENSE}.weight", lambda data: data.__setitem__(slice(5, 7), b"\xff\x7f"))
    edit(checkpoint, f"{W1}.scale", lambda data: data.__setitem__(3, 255))
    allowed = frozenset({f"{DENSE}.weight", f"{W1}.weight"})
    summary = convert(checkpoint, tmp_path / "bf16", Target.BF16, allow_nan=allowed)
    assert summary.num_not_finite == 2 + 32
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(checkpoint)
    with pytest.raises(errors.NotFinite):
        convert(checkpoint, tmp_path / "fp8", Target.FP8, allow_nan=allowed)
