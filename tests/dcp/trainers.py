"""What trainers save: torch's own DCP directories, from ranks that divide their tensors in one way or the other.

Runs in processes of its own: see gangs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reading
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def _mesh(division: str) -> DeviceMesh:
    size = torch.distributed.get_world_size()
    if division.startswith("experts"):
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("ep", "fsdp"))
    return init_device_mesh("cpu", (size,))


def _placements(division: str, tensor: Tensor) -> list[Placement]:
    """rows, columns: along the first or last dimension. experts: those by one axis, and within by the other"""
    if division == "rows":
        return [Shard(0)]
    if division == "columns":
        return [Shard(tensor.dim() - 1)]
    inner = {"experts rows": 1, "experts columns": 2}[division]
    return [Shard(0), Shard(inner)] if tensor.dim() == 3 else [Replicate(), Shard(0)]


def _distributed(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """This rank's part of what every rank has whole: no communication."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements)


def save(
    converted: Path, out: Path, division: str, *, prefix: str = "", wide: bool = False, others: bool = False
) -> None:
    """Every tensor of a BF16 conversion, as torch saves it.

    wide     what is BF16 is kept in float32, as trainers of mixed precision do
    others   with an optimizer's moments, a step and an object beside the model
    """
    mesh = _mesh(division)
    state: dict[str, Any] = {}
    for name, tensor in reading.values_of(converted).items():
        held = tensor.float() if wide and tensor.dtype == torch.bfloat16 else tensor
        state[prefix + name] = _distributed(held, mesh, _placements(division, tensor))
        if others and tensor.dim() == 2 and tensor.is_floating_point():
            state[f"optim.state.{name}.exp_avg"] = _distributed(
                held * 0.5, mesh, _placements(division, tensor)
            )
    if others:
        state |= {
            "step": 1000,
            "optim.param_groups": [{"lr": 0.1}],
            "rng": torch.zeros(16, dtype=torch.uint8),
        }
    dcp.save(state, checkpoint_id=out)
