"""What we write, read by others: transformers, compressed-tensors, and plain numpy on safetensors' own reader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_roundtrip import convert

from dsv4ckpt.formats import Target


def everything(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def values(
    sample_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The sample as BF16, which test_convert.py compares with transformers."""
    out = tmp_path_factory.mktemp("interop") / "bf16"
    convert(sample_of("flash"), out, Target.BF16)
    return everything(out)


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE, Target.NATIVE])
def test_transformers_dequantizes_what_we_write_to_the_same_values(
    sample_of: Callable[[str], Path], tmp_path: Path, target: Target
) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    convert(sample_of("flash"), tmp_path / "bf16", Target.BF16)
    convert(
        sample_of("flash") if target is not Target.NATIVE else tmp_path / "bf16", tmp_path / "out", target
    )
    models = []
    for directory in (sample_of("flash"), tmp_path / "out"):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            output_loading_info=True,
            quantization_config=FineGrainedFP8Config(dequantize=True),
        )
        assert not any(info.values()), info
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.slow
def test_compressed_tensors_reads_config_and_every_matrix(
    sample_of: Callable[[str], Path], values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its config class parses, its group for each module is the right one, its decompressors give our values."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    convert(sample_of("flash"), tmp_path / "out", Target.MXFP4_CT)
    stored = everything(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    config = QuantizationConfig.model_validate(document["quantization_config"])
    seen = {"mxfp4-pack-quantized": 0, "float-quantized": 0}
    for name, value in values.items():
        module = name.removesuffix(".weight")
        groups = [
            group
            for group in config.config_groups.values()
            if any(re.match(target.removeprefix("re:"), module) for target in group.targets)
        ]
        is_stored_plain = name in stored and stored[name].dtype == value.dtype
        assert len(groups) == (0 if is_stored_plain else 1), name
        if is_stored_plain:
            assert torch.equal(stored[name].view(torch.uint8), value.view(torch.uint8))
            continue
        (group,) = groups
        leaves = {
            key.rpartition(".")[2]: tensor
            for key, tensor in stored.items()
            if key.rpartition(".")[0] == module
        }
        compressor = BaseCompressor.get_value_from_registry(group.format)
        found = compressor.decompress(leaves, group)["weight"].to(torch.bfloat16)
        assert torch.equal(found, value), name
        seen[group.format] += 1
    assert seen["mxfp4-pack-quantized"] == 120 and seen["float-quantized"] > 30


@pytest.mark.slow
def test_nvfp4_means_nibble_times_two_scales(
    sample_of: Callable[[str], Path], values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """By numpy in float64, from ModelOpt's definition."""
    convert(sample_of("flash"), tmp_path / "out", Target.NVFP4)
    stored = everything(tmp_path / "out")
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    checked = 0
    for name, value in values.items():
        if not name.startswith("layers.") or ".ffn.experts." not in name:
            continue
        module = name.removesuffix(".weight")
        codes = stored[name].numpy()
        wide = np.empty((codes.shape[0], 2 * codes.shape[1]))
        wide[:, ::2], wide[:, 1::2] = grid[codes & 15], grid[codes >> 4]
        scale = stored[f"{module}.weight_scale"].to(torch.float64).numpy()
        wide *= np.repeat(scale, 16, axis=1) * float(stored[f"{module}.weight_scale_2"])
        assert np.array_equal(wide, value.to(torch.float64).numpy()), name
        assert np.array_equal(np.signbit(wide), value.signbit().numpy()), name
        checked += 1
    assert checked == 4 * 8 * 3
