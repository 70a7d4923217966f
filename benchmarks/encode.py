"""Encoding alone, one thread, data in memory: beside decoding, the naive float way and compressed-tensors.

    python benchmarks/encode.py

Rates are in GB of BF16 per second; decode of the same run is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from decode import rate

from dsv4ckpt import codec, encode
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE

ROWS, COLS = 256, 4096
THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
FP4, FP8 = FP4_EXPERT.block, FP8_TILE.block


def blocks_of(values: torch.Tensor) -> torch.Tensor:
    return values.float().unflatten(-1, (-1, FP4.cols))


def tiles_of(values: torch.Tensor) -> torch.Tensor:
    return values.float().view(ROWS // FP8.rows, FP8.rows, COLS // FP8.cols, FP8.cols)


def untouched_fp4(values: torch.Tensor) -> torch.Tensor:
    """What --to native does with values that were quantized before: scales and codes at once."""
    peaked = encode.fp4_peaked(values, FP4)
    assert peaked is not None
    return encode.fp4_under(peaked, encode.fp4_grid_scale_of_codes(peaked.codes, peaked.scale, FP4), FP4)


def naive_fp4(values: torch.Tensor) -> torch.Tensor:
    """Fresh scale, bucketize, pack; ties are not to even."""
    blocks = blocks_of(values)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / 6)))
    codes = torch.bucketize((blocks / scale).abs(), THRESHOLDS) | (blocks.signbit().long() << 3)
    codes = codes.flatten(-2).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def naive_fp8(values: torch.Tensor) -> torch.Tensor:
    """Fresh scale, cast."""
    tiles = tiles_of(values)
    scale = torch.exp2(torch.ceil(torch.log2(tiles.abs().amax((1, 3), keepdim=True) / 448)))
    return (tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def peer_fp4(values: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' scale, rounding and packing, as its MXFP4 compressor calls them."""
    blocks = blocks_of(values)
    exponent = generate_mx_scales(blocks.abs().amax(-1))
    scaled = (blocks / torch.exp2(exponent - 127)[..., None]).clamp(-6, 6)
    return pack_fp4_to_uint8(cast_to_fp4(scaled).flatten(-2))


def main() -> None:
    torch.set_num_threads(1)
    new = (torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    scale4, scale8 = encode.fp4_fresh_scale(new, FP4), encode.fp8_fresh_scale(new, FP8)
    scale32 = encode.fp8_fresh_scale_f32(new, FP8)
    codes4, codes8 = encode.encode_fp4(new, scale4, FP4), encode.encode_fp8(new, scale8, FP8)
    old4, old8 = codec.decode_fp4(codes4, scale4, FP4).values, codec.decode_fp8(codes8, scale8, FP8).values
    out, spare4, spare8 = torch.empty_like(new), torch.empty_like(codes4), torch.empty_like(codes8)
    size = 2 * ROWS * COLS
    rows: list[tuple[str, Callable[[], object]]] = [
        ("memcpy", lambda: out.copy_(new)),
        ("FP4 decode", lambda: codec.decode_fp4(codes4, scale4, FP4, out)),
        ("FP4 encode, scales given", lambda: encode.encode_fp4(old4, scale4, FP4, codes4)),
        ("FP4 grid scale", lambda: encode.fp4_grid_scale(old4, FP4)),
        ("FP4 grid scale of codes", lambda: encode.fp4_grid_scale_of_codes(codes4, scale4, FP4)),
        (
            "FP4 grid scale + encode",
            lambda: encode.encode_fp4(old4, encode.fp4_grid_scale(old4, FP4), FP4, codes4),
        ),
        ("FP4 untouched: scales, codes", lambda: untouched_fp4(old4)),
        (
            "FP4 fresh scale + encode",
            lambda: encode.encode_fp4(new, encode.fp4_fresh_scale(new, FP4), FP4, spare4),
        ),
        ("FP4 kept scale, all fit", lambda: encode.kept_scale_fp4(new, scale4, FP4)),
        ("FP4 kept scale, none fits", lambda: encode.kept_scale_fp4(new, scale4 + 3, FP4)),
        ("FP4 naive", lambda: naive_fp4(new)),
        ("FP4 compressed-tensors", lambda: peer_fp4(new)),
        ("FP8 decode, E8M0 scales", lambda: codec.decode_fp8(codes8, scale8, FP8, out)),
        ("FP8 encode, E8M0 given", lambda: encode.encode_fp8(old8, scale8, FP8, codes8)),
        (
            "FP8 fresh scale + encode",
            lambda: encode.encode_fp8(new, encode.fp8_fresh_scale(new, FP8), FP8, spare8),
        ),
        ("FP8 kept scale, none fits", lambda: encode.kept_scale_fp8(new, scale8 + 3, FP8)),
        ("FP8 decode, F32 scales", lambda: codec.decode_fp8(codes8, scale32, FP8, out)),
        ("FP8 encode, F32 given", lambda: encode.encode_fp8(old8, scale32, FP8, codes8)),
        ("FP8 naive", lambda: naive_fp8(new)),
    ]
    print(f"one thread, [{ROWS}, {COLS}]")
    for name, action in rows:
        print(f"{name:30}{rate(action, size):7.2f} GB/s")


if __name__ == "__main__":
    main()
