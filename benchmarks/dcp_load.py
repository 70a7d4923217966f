"""Bytes that each rank reads when a release is loaded through torch DCP, against the bytes of its own slices.

    python benchmarks/dcp_load.py [--size 1GB] [--dir DIR]

For 1, 2 and 4 gloo ranks that divide the first dimension: whole experts, and rows of everything else.  Ideal are the
codes of a rank's own rows, the scales of the blocks that they touch, and its share of what is not quantized.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dsv4ckpt import formats, survey
from dsv4ckpt.dcp import ReleaseReader
from dsv4ckpt.formats import Storage
from dsv4ckpt.inventory import lay_out
from dsv4ckpt.names import Namespace
from dsv4ckpt.source import Reader, open_checkpoint


def ideal_bytes(source: str, state: dict[str, DTensor]) -> int:
    """Of the slices that this rank holds: dimension 0 is divided."""
    found = survey.survey(open_checkpoint(source))
    layout = lay_out(
        found.logicals, found.identity.release.family.table, Storage.BF16, Namespace.TRANSFORMERS
    )
    total = 0
    for name, tensor in state.items():
        shape, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        stored = layout.stored[name]
        per_entry = formats.num_elements(stored.shape[1:-1])  # rows of one expert; 1 of a matrix
        first, rows = offsets[0] * per_entry, shape[0] * per_entry
        for part in stored.parts:
            begin, end = max(first, part.begin), min(first + rows, part.begin + part.rows)
            quant = found.layout.quant(part.logical)
            if len(stored.shape) == 1:  # a vector is read whole
                total += formats.stored_bytes(stored.dtype, stored.shape) if shape[0] else 0
            elif begin < end and quant is None:
                total += (end - begin) * formats.stored_bytes(stored.dtype, stored.shape[-1:])
            elif begin < end and quant is not None:
                codes = formats.codes_shape((end - begin, stored.shape[-1]), quant)
                of = formats.block_rows_of(begin - part.begin, end - begin, quant.block)
                scales = formats.ceil_div(stored.shape[-1], quant.block.cols) * (of.stop - of.start)
                total += formats.stored_bytes(quant.codes, codes) + formats.stored_bytes(
                    quant.scale, (scales,)
                )
    return total


def counted(read: list[int]) -> None:
    """Note the size of every read of this process."""
    plain, plain_into = Reader.read, Reader.read_into

    def of_read(self: Reader, name: str, offset: int, size: int, landing: Any) -> memoryview:
        read.append(size)
        return plain(self, name, offset, size, landing)

    def of_read_into(self: Reader, name: str, view: memoryview, offset: int) -> None:
        read.append(len(view))
        plain_into(self, name, view, offset)

    Reader.read, Reader.read_into = of_read, of_read_into  # type: ignore[method-assign]


def rank_of(rank: int, size: int, meeting: str, source: str, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    reader = ReleaseReader(source, num_threads=1)
    told = reader.read_metadata().state_dict_metadata
    state = {
        name: zeros(item.size, dtype=item.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, item in told.items()
    }
    read: list[int] = []
    counted(read)
    dcp.load(state, storage_reader=reader)
    results.put((rank, sum(read), ideal_bytes(source, state)))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--dir", default=tempfile.gettempdir())
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="dsv4-bench-", dir=options.dir))
    try:
        source = str(base / "flash")
        command = [sys.executable, "-m", "dsv4cli", "sample", source, "--target-size", options.size, "-q"]
        subprocess.run(command, check=True)
        print(
            f"{'ranks':>5} {'rank':>4} {'read':>15} {'ideal':>15} {'read / ideal':>12} {'time / plain read':>17}"
        )
        for size in (1, 2, 4):
            context = processes.get_context("spawn")
            results = context.SimpleQueue()
            given = (size, str(base / f"meet{size}"), source, results)
            processes.spawn(rank_of, given, nprocs=size)
            for _ in range(size):
                rank, read, ideal = results.get()
                print(f"{size:>5} {rank:>4} {read:>15,} {ideal:>15,} {read / ideal:>12.4f}")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
