"""Tensors of which each rank has a part: told from whole ones, and made whole.  Loads no torch.distributed."""

from __future__ import annotations

import math
import sys
from typing import Any, cast

from torch import Tensor


def is_divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # before it is loaded, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_divided(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_divided(tensor) else tensor


def num_holders(tensor: Tensor) -> int:
    """How many ranks hold the same part of a divided tensor."""
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    return math.prod(mesh.size(dim) for dim, item in enumerate(placements) if item.is_replicate())


def as_divided(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of what every rank has whole, divided as another one."""
    if not is_divided(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    found = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return cast(Tensor, found.redistribute(mesh, placements))
