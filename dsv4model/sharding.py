"""A model divided over ranks by FSDP2, and sums over ranks.  Knows no data.

Every rank has rows of its own and a part of each weight. Losses are sums divided by the counts of the global batch, so
that gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dsv4ckpt.dcp import ReleaseReader
from dsv4ckpt.ranks import Ranks
from dsv4ckpt.survey import Survey

from .config import Config
from .divided import is_divided
from .loading import model_layout, unused_tensors
from .model import Model
from .simulate import Simulation


def divided(model: Model, ranks: Ranks) -> Model:
    """Divide a model that every rank has whole, or on the meta device: each block by itself, and all else together."""
    mesh = init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("dp",))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the MTP block too: its `hidden` calls its own forward
    register_fsdp_forward_method(model, "hidden")
    return model


def loaded(found: Survey, config: Config, simulation: Simulation, source: str, ranks: Ranks) -> Model:
    """The float32 model of a checkpoint, of which each rank reads and holds its part only."""
    with torch.device("meta"):
        model = Model(config, simulation).float()
    model = divided(model, ranks)
    model.to_empty(device="cpu")
    state = model.state_dict()
    layout = model_layout(found, found.identity.storage)
    unused = [layout.weights[name][0] for name in unused_tensors(found, layout, state)]
    load(state, storage_reader=ReleaseReader(source, partial=unused))
    model.load_state_dict(state)
    return model


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum over ranks the gradients of weights that every rank has whole; FSDP2 has done so for its own."""
    for parameter in parameters:
        if is_divided(parameter):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # another rank may have one
        dist.all_reduce(parameter.grad)


def total(values: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(values)
    return values
