"""What we recast means the same to the packages that read it: compressed-tensors and transformers.

No oracle of ours: the released bytes are decoded once by codec (which test_codec holds to the definitions), and
the packages decompress the recast tensors with their own code. Results are compared bit for bit, signs of zeros
included.

Conventions found in compressed-tensors 0.20:
  mxfp4-pack-quantized  weight_packed uint8 [R, C/2], low nibble first; weight_scale uint8 [R, c], E8M0 bytes
  nvfp4-pack-quantized  weight_scale float8_e4m3fn [R, C/16]; weight_global_scale float32 [1] DIVIDES: it is
                        the reciprocal of ModelOpt's weight_scale_2
  float-quantized       block strategy: weight_scale of any float dtype [r, c] multiplies; the result has its
                        dtype
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from dsv4ckpt import codec, config, names, recast, release
from dsv4ckpt.formats import Block, Spelling, Target, storage_of

FP4, NV = Block(1, 32), Block(1, 16)
TILES = [Block(128, 128), Block(32, 32)]
MXFP4, NVFP4, FP8 = (
    preset_name_to_scheme(name, ["Linear"]) for name in ("MXFP4A16", "NVFP4A16", "FP8_BLOCK")
)


def decompress(layout: str, scheme: QuantizationScheme, stored: dict[str, Tensor]) -> Tensor:
    return BaseCompressor.get_value_from_registry(layout).decompress(stored, scheme)["weight"].detach()


def same_bits(left: Tensor, right: Tensor) -> bool:
    assert left.dtype == right.dtype
    integer = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[left.dtype]
    return torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))


def released_expert(rows: int, cols: int, *, low: int = 112, high: int = 125) -> tuple[Tensor, Tensor]:
    """Codes and E8M0 bytes as released, every code and -0 among them, and a block of nothing but zeros."""
    generator = torch.Generator().manual_seed(rows + cols)
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(low, high, (rows, cols // 32), dtype=torch.uint8, generator=generator)
    codes[0, :16], scales[0, 0] = 0x80, 1
    return codes, scales


def released_dense(rows: int, cols: int, tile: Block) -> tuple[Tensor, Tensor]:
    """Codes and E8M0 bytes as released; every code but NaN."""
    generator = torch.Generator().manual_seed(rows + cols)
    codes = torch.randint(0, 0x7F, (rows, cols), dtype=torch.uint8, generator=generator)
    codes |= torch.randint(0, 2, (rows, cols), dtype=torch.uint8, generator=generator) << 7
    shape = -(-rows // tile.rows), -(-cols // tile.cols)
    return codes, torch.randint(105, 125, shape, dtype=torch.uint8, generator=generator)


# ---- compressed-tensors, tensor by tensor


def test_released_fp4_bytes_under_other_names_are_mxfp4_pack_quantized() -> None:
    codes, scales = released_expert(64, 256)
    found = decompress("mxfp4-pack-quantized", MXFP4, {"weight_packed": codes, "weight_scale": scales})
    assert same_bits(found, codec.decode_fp4(codes, scales, FP4).values)


@pytest.mark.parametrize("byte", range(255))
def test_mxfp4_pack_quantized_reads_every_scale_byte_and_code_as_we_do(byte: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    scales = torch.full((1, 16), byte, dtype=torch.uint8)
    found = decompress("mxfp4-pack-quantized", MXFP4, {"weight_packed": codes, "weight_scale": scales})
    assert same_bits(found, codec.decode_fp4(codes, scales, FP4).values)


def as_nvfp4(codes: Tensor, scales: Tensor) -> tuple[dict[str, Tensor], float]:
    """What nvfp4-pack-quantized holds, and ModelOpt's weight_scale_2."""
    kmax = recast.nvfp4_exponent([scales], [codes])
    made, scale_2 = recast.nvfp4_scales(scales, kmax), recast.nvfp4_scale_2(kmax)
    stored = {
        "weight_packed": codes,
        "weight_scale": made.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([1 / scale_2], dtype=torch.float32),
    }
    return stored, scale_2


@pytest.mark.parametrize("gap", [12, recast.NVFP4_LOSSLESS_GAP])
def test_recast_nvfp4_is_nvfp4_pack_quantized_with_the_reciprocal_of_scale_2(gap: int) -> None:
    codes, scales = released_expert(64, 256, low=124 - gap, high=125)
    stored, scale_2 = as_nvfp4(codes, scales)
    found = decompress("nvfp4-pack-quantized", NVFP4, stored)
    assert same_bits(found, codec.decode_fp4(codes, scales, FP4).values)
    our = codec.decode_nvfp4(codes, stored["weight_scale"].view(torch.uint8), scale_2, NV)
    assert same_bits(found, our.values)


def test_nvfp4_pack_quantized_does_not_multiply_by_the_global_scale() -> None:
    codes, scales = released_expert(8, 64)
    stored, scale_2 = as_nvfp4(codes, scales)
    wrong = {**stored, "weight_global_scale": torch.tensor([scale_2])}
    right = decompress("nvfp4-pack-quantized", NVFP4, stored)
    assert not torch.equal(decompress("nvfp4-pack-quantized", NVFP4, wrong), right)


def test_the_reciprocal_of_scale_2_is_a_float32_for_every_scale_byte_from_8() -> None:
    """Below, ModelOpt's convention holds what compressed-tensors' cannot."""
    for byte in range(255):
        reciprocal = torch.tensor(1 / recast.nvfp4_scale_2(byte - 127), dtype=torch.float32)
        assert bool(reciprocal.isfinite()) is (byte >= 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (200, 256), (7, 128)])
def test_fp8_tiles_with_f32_scales_are_float_quantized_blocks(
    shape: tuple[int, int], tile: Block, dtype: torch.dtype
) -> None:
    """BF16 too: it is what scales become in a BF16 model of transformers."""
    codes, scales = released_dense(*shape, tile)
    scheme = FP8.model_copy(deep=True)
    assert scheme.weights is not None
    scheme.weights.block_structure = list(tile)
    stored = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": recast.e8m0_to_f32(scales).to(dtype)}
    found = decompress("float-quantized", scheme, stored)
    assert found.dtype == dtype
    assert same_bits(found.to(torch.bfloat16), codec.decode_fp8(codes, scales, tile).values)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_experts_recast_to_fp8_mean_the_same_to_float_quantized(tile: Block) -> None:
    codes, scales = released_expert(128, 256)
    tiles = recast.fp8_tiles(scales, FP4, tile, codes)
    made = recast.fp4_to_fp8(codes, scales, FP4, tiles.scale_rc, tile)
    assert made.num_changed == 0
    scheme = FP8.model_copy(deep=True)
    assert scheme.weights is not None
    scheme.weights.block_structure = list(tile)
    stored = {
        "weight": made.codes.view(torch.float8_e4m3fn),
        "weight_scale": recast.e8m0_to_f32(tiles.scale_rc),
    }
    found = decompress("float-quantized", scheme, stored).to(torch.bfloat16)
    assert same_bits(found, codec.decode_fp4(codes, scales, FP4).values)


# ---- compressed-tensors, from our config.json to weights


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq_a, self.wo_b = linear(256, 384), linear(200, 256)
        self.kv_norm = nn.LayerNorm(64, dtype=torch.bfloat16)


def linear(rows: int, cols: int) -> nn.Linear:
    return nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)


def ffn() -> nn.Module:
    made = nn.Module()
    made.gate = linear(8, 128)
    made.experts = nn.ModuleList(
        nn.ModuleDict({name: linear(96, 128) for name in ("w1", "w2", "w3")}) for _ in range(2)
    )
    made.shared_experts = nn.ModuleDict({name: linear(128, 128) for name in ("w1", "w2", "w3")})
    return made


def released_skeleton() -> nn.Module:
    """Modules under released names, a draft stage among them; a twin of the real ones in shape, not in size."""
    model, layer, stage = nn.Module(), nn.Module(), nn.Module()
    layer.attn, layer.ffn = Attention(), ffn()
    stage.attn, stage.ffn, stage.e_proj = Attention(), ffn(), linear(128, 128)
    model.embed, model.head = nn.Embedding(16, 128, dtype=torch.bfloat16), linear(16, 128)
    model.layers, model.mtp = nn.ModuleList([layer]), nn.ModuleList([stage])
    return model


def quantization_of(name: str) -> dict[str, Any]:
    """quantization_config that we write for a release in mxfp4-ct."""
    document = release.shipped_config(name)
    storage = storage_of(Target.MXFP4_CT, release.RELEASES[name].storage)
    return config.for_storage(document, storage, document)["quantization_config"]


def is_expert(module: str) -> bool:
    return ".ffn.experts." in module


def is_dense(module: str) -> bool:
    return module.rpartition(".")[2] in ("wq_a", "wo_b", "e_proj") or ".shared_experts." in module


def stored_and_meant(model: nn.Module, tile: Block) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State as an mxfp4-ct checkpoint holds it, and the weights that it means."""
    stored, meant = {}, {}
    packed_leaf, plain_leaf = names.LEAVES[Spelling.COMPRESSED_PACKED], names.LEAVES[Spelling.COMPRESSED]
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if is_expert(module):
            codes, scales = released_expert(*weight.shape)
            stored |= {f"{module}.{packed_leaf['weight']}": codes, f"{module}.{packed_leaf['scale']}": scales}
            meant[name] = codec.decode_fp4(codes, scales, FP4).values
        elif is_dense(module):
            codes, scales = released_dense(*weight.shape, tile)
            stored[f"{module}.{plain_leaf['weight']}"] = codes.view(torch.float8_e4m3fn)
            stored[f"{module}.{plain_leaf['scale']}"] = recast.e8m0_to_f32(scales)
            meant[name] = codec.decode_fp8(codes, scales, tile).values
        else:
            stored[name] = meant[name] = weight.clone()
    return stored, meant


@pytest.mark.parametrize(("name", "tile"), [("flash", TILES[0]), ("v4.1-flash", TILES[1])])
def test_a_model_loaded_by_our_config_has_the_released_weights(name: str, tile: Block) -> None:
    """The steps of transformers' CompressedTensorsHfQuantizer: apply the config, compress, load, decompress."""
    parsed = QuantizationConfig.model_validate(quantization_of(name))
    model = released_skeleton()
    stored, meant = stored_and_meant(model, tile)
    apply_quantization_config(model, parsed, show_progress=False)
    compressor = ModelCompressor(quantization_config=parsed)
    compressor.compress_model(model)
    loaded = model.load_state_dict(stored, strict=True)  # names and shapes are what the package expects
    assert not loaded.missing_keys and not loaded.unexpected_keys
    compressor.decompress_model(model)
    found = {key: value for key, value in model.state_dict().items() if not key.endswith("weight_scale")}
    assert set(found) == set(meant)
    for key, value in found.items():
        assert same_bits(value, meant[key]), key


def test_the_package_would_choose_the_formats_that_our_config_names() -> None:
    parsed = QuantizationConfig.model_validate(quantization_of("flash"))
    for scheme in parsed.config_groups.values():
        assert isinstance(scheme, QuantizationScheme)
        assert infer_module_format(nn.Linear, scheme).value == scheme.format


# ---- transformers


def by_transformers(codes: Tensor, scales: Tensor) -> Tensor:
    found = Fp8Dequantize(None).convert({"weight": [codes], "weight_scale_inv": [scales]})["weight"]
    assert isinstance(found, Tensor)
    return found.to(torch.bfloat16)


def test_transformers_dequantizes_released_fp4_to_our_values() -> None:
    codes, scales = released_expert(64, 256)
    found = by_transformers(codes.view(torch.int8), scales.view(torch.float8_e8m0fnu))
    assert same_bits(found, codec.decode_fp4(codes, scales, FP4).values)


@pytest.mark.parametrize("scale_dtype", ["E8M0", "F32"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_transformers_dequantizes_experts_recast_to_fp8_to_the_released_values(
    tile: Block, scale_dtype: str
) -> None:
    codes, scales = released_expert(256, 384)
    tiles = recast.fp8_tiles(scales, FP4, tile, codes)
    made = recast.fp4_to_fp8(codes, scales, FP4, tiles.scale_rc, tile)
    stored = (
        recast.e8m0_to_f32(tiles.scale_rc)
        if scale_dtype == "F32"
        else tiles.scale_rc.view(torch.float8_e8m0fnu)
    )
    found = by_transformers(made.codes.view(torch.float8_e4m3fn), stored)
    assert same_bits(found, codec.decode_fp4(codes, scales, FP4).values)


def test_transformers_takes_the_tile_from_the_grid_of_scales_and_so_misreads_cut_off_tiles() -> None:
    """200 rows under 2 scales are 100 each to transformers; 201 it refuses. Releases have no such edges."""
    codes, scales = (
        torch.full((200, 128), 0x38, dtype=torch.uint8),
        torch.tensor([[127], [128]], dtype=torch.uint8),
    )
    f32 = recast.e8m0_to_f32(scales)
    found = by_transformers(codes.view(torch.float8_e4m3fn), f32)
    assert (found[:, 0] == 2).nonzero().flatten().tolist() == list(range(100, 200))
    ours = codec.decode_fp8(codes, scales, TILES[0]).values
    assert (ours[:, 0] == 2).nonzero().flatten().tolist() == list(range(128, 200))
    with pytest.raises(ValueError, match="not divisible"):
        by_transformers(torch.full((201, 128), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn), f32)


def test_the_smallest_e8m0_scale_is_no_zero_to_either_package() -> None:
    scale = recast.e8m0_to_f32(torch.zeros(1, 1, dtype=torch.uint8))
    assert scale.item() == math.ldexp(1.0, -127)
    codes = torch.full((1, 128), 0x38, dtype=torch.uint8)  # 1.0
    stored = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    found = [
        decompress("float-quantized", FP8, stored),
        by_transformers(codes.view(torch.float8_e4m3fn), scale).float(),
    ]
    assert all(bool((value == scale).all()) for value in found)
