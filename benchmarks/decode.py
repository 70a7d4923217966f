"""Decoding alone, one thread, data in memory: our lookup beside the naive float way.

    python benchmarks/decode.py

Rates are in GB of BF16 output per second; memcpy is the bound of the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dsv4ckpt import codec
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE

ROWS, COLS = 256, 4096
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def naive_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    halves = torch.stack([GRID[(packed & 15).long()], GRID[(packed >> 4).long()]], -1).flatten(-2)
    scale = scale.view(torch.float8_e8m0fnu).float()
    return (halves.unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2).to(torch.bfloat16)


def naive_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.view(torch.float8_e8m0fnu).float()
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (codes.view(torch.float8_e4m3fn).float() * wide).to(torch.bfloat16)


def rate(action: Callable[[], object], out_bytes: int) -> float:
    action()
    times = []
    for _ in range(15):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return out_bytes / statistics.median(times) / 1e9


def main() -> None:
    torch.set_num_threads(1)
    packed = torch.randint(0, 256, (ROWS, COLS // 2), dtype=torch.uint8)
    scale4 = torch.randint(110, 125, (ROWS, COLS // 32), dtype=torch.uint8)
    codes = torch.randint(0, 0x7F, (ROWS, COLS), dtype=torch.uint8)
    scale8 = torch.randint(110, 125, (ROWS // 128, COLS // 128), dtype=torch.uint8)
    scale32 = scale8.view(torch.float8_e8m0fnu).float()
    out = torch.empty(ROWS, COLS, dtype=torch.bfloat16)
    twin = torch.empty_like(out)
    size = 2 * ROWS * COLS
    rows: list[tuple[str, Callable[[], object]]] = [
        ("memcpy", lambda: twin.copy_(out)),
        ("FP4 lookup", lambda: codec.decode_fp4(packed, scale4, FP4_EXPERT.block, out)),
        ("FP4 naive", lambda: naive_fp4(packed, scale4)),
        ("FP8 lookup, E8M0 scales", lambda: codec.decode_fp8(codes, scale8, FP8_TILE.block, out)),
        ("FP8 lookup, F32 scales", lambda: codec.decode_fp8(codes, scale32, FP8_TILE.block, out)),
        ("FP8 naive", lambda: naive_fp8(codes, scale8)),
    ]
    print(f"one thread, [{ROWS}, {COLS}]")
    for name, action in rows:
        print(f"{name:26}{rate(action, size):7.2f} GB/s")


if __name__ == "__main__":
    main()
