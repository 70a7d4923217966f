"""What the ranks of test_release_reader do.  Runs in processes of its own: see gangs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, zeros

from dsv4ckpt.dcp import ReleaseReader


def values_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as the safetensors package reads it."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Signs of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def shared(wanted: dict[str, Tensor], mesh: DeviceMesh, placements: Any) -> dict[str, DTensor]:
    """A state dict of zeros; placements(name, tensor) says how a tensor is divided."""
    return {
        name: zeros(tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=placements(name, tensor))
        for name, tensor in wanted.items()
    }


def differing(state: dict[str, DTensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not what they should be, once they are whole again."""
    return [name for name, tensor in state.items() if not same_bits(tensor.full_tensor(), wanted[name])]


def load_by_rows(source: Path, converted: Path, dimension: int) -> list[str]:
    """Everything divided along one dimension, as FSDP2 does; vectors along their only one."""
    wanted = values_of(converted)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def placements(name: str, tensor: Tensor) -> list[Placement]:
        return [Shard(min(dimension, tensor.dim() - 1))]

    state = shared(wanted, mesh, placements)
    dcp.load(state, storage_reader=ReleaseReader(source))
    return differing(state, wanted)


def load_directory(directory: Path, converted: Path, dimension: int) -> list[str]:
    """The same from a DCP directory, by torch alone."""
    wanted = values_of(converted)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    state = shared(wanted, mesh, lambda _, tensor: [Shard(min(dimension, tensor.dim() - 1))])
    dcp.load(state, checkpoint_id=directory)
    return differing(state, wanted)


def load_by_experts(source: Path, converted: Path) -> list[str]:
    """Experts over one axis of a 2 x 2 mesh, their rows over the other; all else over the second."""
    wanted = values_of(converted)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))

    def placements(name: str, tensor: Tensor) -> list[Placement]:
        return [Shard(0), Shard(1)] if tensor.dim() == 3 else [Replicate(), Shard(0)]

    state = shared(wanted, mesh, placements)
    dcp.load(state, storage_reader=ReleaseReader(source, num_threads=1))
    return differing(state, wanted)


def load_split(source: Path, dropped: str) -> str:
    """Every rank asks for something else, and one tensor is asked for by nobody."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    reader = ReleaseReader(source)
    told = reader.read_metadata().state_dict_metadata
    mine = [name for number, name in enumerate(sorted(told)) if number % size == rank and name != dropped]
    state = {name: torch.zeros(told[name].size, dtype=told[name].properties.dtype) for name in mine}
    dcp.load(state, storage_reader=reader)
    return "loaded"


def logits_of_a_sharded_model(source: Path) -> tuple[Tensor, int]:
    """A real model under FSDP2, from the released files. The logits, and how many elements this rank holds."""
    from torch.distributed.fsdp import fully_shard

    from dsv4model.config import Config
    from dsv4model.model import Model

    reader = ReleaseReader(source)
    with torch.device("meta"):
        model = Model(Config.read(reader.config)).float()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    state = model.state_dict()
    dcp.load(state, storage_reader=reader)
    model.load_state_dict(state)
    held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    model.eval()
    with torch.no_grad():
        logits = model(torch.arange(40)[None] % 500).logits
    return logits, held
