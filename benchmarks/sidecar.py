"""How large the round-trip sidecar is for every release: dsv4.roundtrip beside the released bytes.

    python benchmarks/sidecar.py

Headers, index and table are made for the true tensors of each release; hashes and FP8 scales follow from the shapes.
What inference misses is measured on simulated weights (normal, one sigma for each block of rows over a binade),
quantized as DeepSeek's quantizer does, and packed as the converter packs it.
"""

from __future__ import annotations

import zlib

import torch

from dsv4ckpt import codec, encode, formats, roundtrip, sample, sidecar
from dsv4ckpt.formats import FP4_EXPERT, FP8_ROW_32, QUANTS, Kind
from dsv4ckpt.inventory import Layout
from dsv4ckpt.plan import index_bytes
from dsv4ckpt.release import RELEASES

ROWS, COLS = 8192, 1024  # one piece
HASH_BYTES = 32


def weights() -> torch.Tensor:
    """float32 [ROWS, COLS]: normal, with a sigma for each row that spreads over a binade."""
    generator = torch.Generator().manual_seed(0)
    sigma = 0.02 * torch.exp2(torch.rand((ROWS, 1), generator=generator))
    return torch.randn((ROWS, COLS), generator=generator) * sigma


def quantized(values: torch.Tensor, largest: float, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(values divided by their scales, scale bytes) per 32 columns, by ceil(log2(amax / largest))."""
    blocks = values.view(ROWS, -1, 32)
    exponent = torch.ceil(torch.log2(blocks.abs().amax(2).clamp(min=floor) / largest)).to(torch.int32)
    return (blocks / torch.exp2(exponent.float())[..., None]).view(ROWS, COLS), (exponent + 127).to(
        torch.uint8
    )


def bytes_per_fp4_block() -> float:
    scaled, scale = quantized(weights(), formats.FP4_MAX, formats.FP4_AMAX_FLOOR)
    ones = torch.full_like(scale, formats.E8M0_BIAS)
    codes = encode.encode_fp4(scaled.to(torch.bfloat16), ones, FP4_EXPERT.block)
    ruled = encode.fp4_grid_scale_of_codes(codes, scale, FP4_EXPERT.block)
    return len(zlib.compress(roundtrip.pack_exceptions(scale, ruled), 6)) / scale.numel()


def bytes_per_table_block() -> float:
    scaled, scale = quantized(weights(), formats.FP8_MAX, formats.FP8_AMAX_FLOOR)
    codes = scaled.clamp(-formats.FP8_MAX, formats.FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    values = codec.decode_fp8(codes, scale, FP8_ROW_32.block).values
    packed = roundtrip.pack_exceptions(scale, roundtrip.ruled_scales(values, FP8_ROW_32))
    return len(zlib.compress(packed, 6)) / scale.numel()


def parts(layout: Layout, per_fp4: float, per_table: float) -> dict[str, float]:
    """Bytes for what depends on the tensors' data."""
    hashes = scales = exceptions = 0.0
    for stored in layout.stored.values():
        if stored.leaf != "weight":
            continue
        logical = stored.parts[0].logical
        quant = layout.quant(logical)
        if quant is None:
            hashes += HASH_BYTES
            continue
        hashes += 3 * HASH_BYTES * formats.ceil_div(logical.shape[0], sidecar.piece_rows(logical.shape[-1]))
        grid = formats.scale_shape(logical.shape, quant.block)
        if not roundtrip.has_rule(quant):
            scales += formats.stored_bytes(quant.scale, grid)
        else:
            per_block = per_fp4 if quant.codes_per_element == 2 else per_table
            exceptions += formats.num_elements(grid) * per_block
    return {"hashes": hashes, "FP8 scales": scales, "exceptions": exceptions}


def fixed(made: sample.Sample) -> float:
    """Headers, index and table, compressed."""
    headers = sum(len(zlib.compress(file.header, 6)) for file in made.files)
    index = index_bytes((file.name, file.tensors) for file in made.files)
    table = repr([[name, "rule", 1, [0], {}] for name in made.layout.weights]).encode()
    return headers + len(zlib.compress(index, 6)) + len(zlib.compress(table, 6))


def main() -> None:
    torch.set_num_threads(1)
    per_fp4, per_table = bytes_per_fp4_block(), bytes_per_table_block()
    print(f"exceptions: {per_fp4:.2e} bytes for an FP4 block, {per_table:.3f} for a block of an Engram table")
    print(
        f"{'release':12}{'headers':>10}{'hashes':>10}{'FP8 scales':>12}{'exceptions':>12}{'of the source':>16}"
    )
    for name in RELEASES:
        options = sample.SampleOptions(release=name, release_dims=True)
        made = sample.plan_sample(options)
        found = parts(made.layout, per_fp4, per_table)
        around = fixed(made)
        share = (around + sum(found.values())) / made.total_bytes
        row = [around, *found.values()]
        cells = "".join(
            f"{size / 1e6:>{width}.1f}" for size, width in zip(row, (10, 10, 12, 12), strict=True)
        )
        print(f"{name:12}{cells}{share:>16.4%}   (MB)")
    assert Kind.TABLE in QUANTS[RELEASES["v4.1-flash"].storage]


if __name__ == "__main__":
    main()
