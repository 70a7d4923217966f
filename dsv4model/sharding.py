"""A model divided over ranks: layers over stages, experts over ranks, all else by FSDP2; and sums over ranks.

Knows no data.  Losses are sums divided by the counts of the global batch, so that gradients are summed over ranks,
never averaged.  What a mixed model keeps in float32 (norms, streams' mixing, sinks) is small, and whole on every rank:
FSDP2 takes one dtype at a time.

    mesh [stages, copies of the experts, parts of the experts]; the last two together divide rows and all other weights
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from dsv4ckpt.dcp import ReleaseReader
from dsv4ckpt.survey import Survey

from .adapters import ExpertAdapter
from .config import is_kept_wide
from .divided import local
from .expert_parallel import Exchange
from .loading import model_layout, unused_tensors
from .model import Block, Model, dtype_of
from .moe import Experts
from .place import Place

_STAGES, _COPIES, _EXPERTS = "stages", "copies", "experts"


class Grid:
    """The ranks in their places. Made on all of them at the same time."""

    def __init__(self, place: Place) -> None:
        shape = place.num_stages, place.num_parts // place.num_expert_parts, place.num_expert_parts
        self.place = place
        self._mesh = init_device_mesh("cpu", shape, mesh_dim_names=(_STAGES, _COPIES, _EXPERTS))
        self._parts: DeviceMesh = self._mesh[_COPIES, _EXPERTS]._flatten("parts")
        self.stages: dist.ProcessGroup = self._mesh[_STAGES].get_group()

    # ---- models

    def divided(self, model: Model) -> Model:
        """Divide a model that every rank has whole or on the meta device: each rank keeps its part.

        Stages have taken their layers before (pipeline.py). Each block is gathered by itself, and all else together.
        """
        self._divide_experts(model)
        wide = {item for name, item in model.named_parameters() if is_kept_wide(name)}
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # what is added up over ranks
        groups: list[nn.Module] = []
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        for block in blocks:
            fully_shard(
                block.mlp.experts,
                mesh=self._mesh[_COPIES],
                shard_placement_fn=lambda _: Shard(1),
                mp_policy=policy,
            )
            groups.append(block.mlp.experts)
        of_root = {*model.mtp, model}  # the MTP block goes with it: its `hidden` calls its own forward
        roots: list[nn.Module] = [*(block for block in blocks if block not in of_root), model]
        for module in roots:
            fully_shard(module, mesh=self._parts, mp_policy=policy, ignored_params=wide)
            groups.append(module)
        for module in groups:
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        model.model.embed_tokens.register_forward_hook(_with_gradient)
        for method in ("hidden", "stage"):
            register_fsdp_forward_method(model, method)
        return model

    def _divide_experts(self, model: Model) -> None:
        """Each rank keeps its experts of every layer."""
        mesh, place = self._mesh[_EXPERTS], self.place
        for experts in model.modules():
            if not isinstance(experts, Experts):
                continue
            num_here = len(experts.down_proj) // place.num_expert_parts
            mine = slice(place.expert_part * num_here, (place.expert_part + 1) * num_here)
            for name, parameter in list(experts.named_parameters(recurse=False)):
                part = DTensor.from_local(parameter.detach()[mine].clone(), mesh, [Shard(0)], run_check=False)
                setattr(experts, name, nn.Parameter(part))
            experts.part = place.expert_part, place.num_expert_parts
        self._connect(model)

    def with_adapters(self, model: Model) -> None:
        """Divide the adapters of a model that was loaded with this rank's experts only."""
        mesh = self._mesh[_COPIES, _EXPERTS]
        for module in model.modules():
            if isinstance(module, ExpertAdapter):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    part = DTensor.from_local(
                        parameter.detach(), mesh, [Replicate(), Shard(0)], run_check=False
                    )
                    setattr(module, name, nn.Parameter(part))
        self._connect(model)

    def _connect(self, model: Model) -> None:
        """Let tokens find the experts that are elsewhere."""
        for experts in model.modules():
            if isinstance(experts, Experts) and self.place.num_expert_parts > 1:
                experts.elsewhere = Exchange(self._mesh[_EXPERTS].get_group(), len(local(experts.down_proj)))

    def loaded(self, model: Model, found: Survey, source: str, dtype: torch.dtype) -> Model:
        """A model on the meta device, divided and filled from a checkpoint: each rank reads its part only."""
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype_of(name, dtype))
        model = self.divided(model)
        model.to_empty(device="cpu")
        state = model.state_dict()
        layout = model_layout(found, found.identity.storage)
        unused = [layout.weights[name][0] for name in unused_tensors(found, layout, self.everyone(state))]
        load(state, storage_reader=ReleaseReader(source, partial=unused))
        model.load_state_dict(state)
        return model

    # ---- sums

    def everyone(self, names: Iterable[str]) -> set[str]:
        """What the ranks of all stages name together."""
        told: list[list[str]] = [[] for _ in range(self.place.num_stages)]
        dist.all_gather_object(told, sorted(names), group=self.stages)
        return {name for names in told for name in names}

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over ranks the gradients of weights that every rank has whole; FSDP2 has done so for its own."""
        for parameter in parameters:
            for group in self._holders(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # another rank may have one
                dist.all_reduce(local(parameter.grad), group=group)

    def _holders(self, parameter: nn.Parameter) -> list[dist.ProcessGroup]:
        """Groups of ranks that hold the same of it."""
        if not isinstance(parameter, DTensor):
            return [self._parts.get_group()]
        mesh = parameter.device_mesh
        return [
            mesh.get_group(dim)
            for dim, placement in enumerate(parameter.placements)
            if placement.is_replicate() and mesh.size(dim) > 1
        ]

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    def total_over_stages(self, values: Tensor) -> Tensor:
        """The sum over the stages that this rank's rows go through, in place."""
        dist.all_reduce(values, group=self.stages)
        return values


def _with_gradient(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
    """FSDP2 adds up what learns in a block when a gradient comes by, so one has to, whatever is frozen before it."""
    return embedded.requires_grad_() if torch.is_grad_enabled() and not embedded.requires_grad else embedded
