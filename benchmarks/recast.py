"""Recasting beside decoding of the same data in the same run: one thread, data in memory.

    python benchmarks/recast.py

Rates are in GB of BF16 that the data would decode to per second, so that all rows measure the same work; memcpy
of that BF16 is the bound.  compressed-tensors (a dev dependency) decompresses the same bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from dsv4ckpt import codec, recast
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE, NVFP4_EXPERT

ROWS, COLS = 256, 4096
NUM_ROUNDS = 15


def decompress(layout: str, scheme: QuantizationScheme, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    return BaseCompressor.get_value_from_registry(layout).decompress(stored, scheme)["weight"]


def rates(actions: list[tuple[str, Callable[[], object]]], size: int) -> dict[str, float]:
    """GB per second, median. All actions in turn, round by round: what else runs here slows all alike."""
    times: dict[str, list[float]] = {name: [] for name, _ in actions}
    for number in range(NUM_ROUNDS + 1):
        for name, action in actions:
            began = time.perf_counter()
            action()
            if number > 0:  # the first round builds the tables
                times[name].append(time.perf_counter() - began)
    return {name: size / statistics.median(taken) / 1e9 for name, taken in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (ROWS, COLS // 2), dtype=torch.uint8)
    packed[:, : FP4_EXPERT.block.cols // 2] = 0x80  # blocks of nothing but zeros take the long way
    scale = torch.randint(112, 125, (ROWS, COLS // FP4_EXPERT.block.cols), dtype=torch.uint8)
    scale[:, 0] = 1
    tiles = recast.fp8_tiles(scale, FP4_EXPERT.block, FP8_TILE.block, packed)
    fp8 = recast.fp4_to_fp8(packed, scale, FP4_EXPERT.block, tiles.scale_rc, FP8_TILE.block).codes.clone()
    tile_f32 = recast.e8m0_to_f32(tiles.scale_rc)
    kmax = recast.nvfp4_exponent([scale], [packed])
    scale_2, scale_16 = recast.nvfp4_scale_2(kmax), recast.nvfp4_scales(scale, kmax).scale
    out = torch.empty(ROWS, COLS, dtype=torch.bfloat16)
    twin, codes = torch.empty_like(out), torch.empty_like(fp8)
    mxfp4, nvfp4, fp8_block = (
        preset_name_to_scheme(name, ["Linear"]) for name in ("MXFP4A16", "NVFP4A16", "FP8_BLOCK")
    )
    as_mxfp4 = {"weight_packed": packed, "weight_scale": scale}
    as_nvfp4 = {
        "weight_packed": packed,
        "weight_scale": scale_16.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([1 / scale_2]),
    }
    as_fp8 = {"weight": fp8.view(torch.float8_e4m3fn), "weight_scale": tile_f32}
    fp4_block, tile, nv_block = FP4_EXPERT.block, FP8_TILE.block, NVFP4_EXPERT.block
    actions: list[tuple[str, Callable[[], object]]] = [
        ("memcpy", lambda: twin.copy_(out)),
        ("decode FP4", lambda: codec.decode_fp4(packed, scale, fp4_block, out)),
        ("decode FP8, E8M0", lambda: codec.decode_fp8(fp8, tiles.scale_rc, tile, out)),
        ("decode FP8, F32", lambda: codec.decode_fp8(fp8, tile_f32, tile, out)),
        ("decode NVFP4", lambda: codec.decode_nvfp4(packed, scale_16, scale_2, nv_block, out)),
        ("FP8 tiles, header facts", lambda: recast.fp8_tiles(scale, fp4_block, tile)),
        ("FP8 tiles, zeros seen", lambda: recast.fp8_tiles(scale, fp4_block, tile, packed)),
        ("FP4 -> FP8", lambda: recast.fp4_to_fp8(packed, scale, fp4_block, tiles.scale_rc, tile, codes)),
        ("NVFP4 exponent, zeros seen", lambda: recast.nvfp4_exponent([scale], [packed])),
        ("NVFP4 scales", lambda: recast.nvfp4_scales(scale, kmax)),
        ("compressed-tensors MXFP4", lambda: decompress("mxfp4-pack-quantized", mxfp4, as_mxfp4)),
        ("compressed-tensors NVFP4", lambda: decompress("nvfp4-pack-quantized", nvfp4, as_nvfp4)),
        ("compressed-tensors FP8", lambda: decompress("float-quantized", fp8_block, as_fp8)),
    ]
    print(f"one thread, [{ROWS}, {COLS}]")
    for name, gb_per_second in rates(actions, 2 * ROWS * COLS).items():
        print(f"{name:28}{gb_per_second:8.2f} GB/s")


if __name__ == "__main__":
    main()
