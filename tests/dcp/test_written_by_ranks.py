"""What torch's planner and FileSystemWriter write on 1 to 4 ranks is read as torch itself reads it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gangs
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dsv4ckpt import torchfile
from dsv4ckpt.dcp_metadata import DcpTensor, parse_metadata

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
SHARDINGS = (Shard(0), Shard(1), Shard(2), Replicate())


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def save_many_layouts(directory: str) -> None:
    """Uneven shards, ranks that get nothing, replicas, two meshes, FSDP with its optimizer, objects."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    state: dict[str, Any] = {
        f"{shape} {placement}": distribute_tensor(numbers(*shape), mesh, [placement])
        for shape in ((7, 5, 3), (2, 3, 1), (1, 1, 1), (0, 3, 2), (5, 0, 2))
        for placement in SHARDINGS
    }
    if size == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp"))
        for one in SHARDINGS:
            for other in SHARDINGS:
                state[f"{one} {other}"] = distribute_tensor(numbers(5, 3, 7), two, [one, other])
        both = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
        parallelize_module(both, two["dp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(both, mesh=two["ep"])  # shards of shards, of the same dimension too
        state["both"] = both.state_dict()
    model = nn.Linear(5, 3)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    state["model"], state["optimizer"] = model.state_dict(), optimizer.state_dict()
    state["app"] = {"step": 7, "list": [1, torch.ones(3)], "nothing": None, "scalar": torch.tensor(2.5)}
    dcp.save(state, checkpoint_id=directory)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_checkpoint_of_ranks_is_read_as_torch_reads_it(size: int, tmp_path: Path) -> None:
    gangs.gang(size, save_many_layouts, str(tmp_path))
    data = (tmp_path / ".metadata").read_bytes()
    found = parse_metadata(data, {file.name: file.stat().st_size for file in tmp_path.iterdir()})
    wanted: Metadata = pickle.loads(data)
    objects = [k for k, v in wanted.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)]
    assert found.others == tuple(sorted(objects))
    assert {"app.step", "app.nothing", "app.list.0"} <= set(objects)
    assert len(found.tensors) + len(objects) == len(wanted.state_dict_metadata)
    state = {name: torch.empty(entry.shape) for name, entry in found.tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path)
    for name, entry in found.tensors.items():
        assert entry.dtype == "F32"
        assert torch.equal(assembled(tmp_path, entry), state[name]), name


def assembled(directory: Path, entry: DcpTensor) -> torch.Tensor:
    """The tensor, from the bytes of its chunks."""
    whole = torch.full(entry.shape, -1.0)
    for (offsets, sizes), place in zip(entry.chunks, entry.places, strict=True):
        record = (directory / place.file).read_bytes()[place.offset : place.offset + place.length]
        saved = torchfile.read_saved(lambda at, count, it=record: it[at : at + count], len(record))
        assert (saved.dtype, saved.shape) == (entry.dtype, sizes)
        if num_elements := torch.Size(sizes).numel():
            values = torch.frombuffer(
                bytearray(record), dtype=torch.float32, count=num_elements, offset=saved.begin
            )
            box = tuple(slice(at, at + length) for at, length in zip(offsets, sizes, strict=True))
            whole[box] = values.view(sizes)
    return whole
