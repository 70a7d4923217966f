"""Layers divided over ranks, one stage after the other: streams go forward, their gradients back.

Only streams [B, S, J, H] travel: every stage makes ids and documents of its rows itself, for hash layers and masks.
The order of micro-batches is torch's 1F1B.  A loss that a stage has of its own (balance of its routers) joins in when
the gradient of the streams that it passed on comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from .divided import local
from .model import Model
from .place import Place


class Elsewhere(nn.Module):
    """Stands where another stage has something."""


def cut(model: Model, place: Place) -> Model:
    """Leave a model what its stage computes."""
    for index in range(len(model.model.layers)):
        if not place.has(f"model.layers.{index}"):
            model.model.layers[index] = Elsewhere()
    if not place.has("lm_head.weight"):
        model.model.hc_head, model.model.norm, model.lm_head = Elsewhere(), Elsewhere(), Elsewhere()  # type: ignore[assignment]
        model.mtp = nn.ModuleList()
    if not place.has("model.embed_tokens"):
        model.model.embed_tokens = Elsewhere()  # type: ignore[assignment]
    return model


# micro-batch by number, streams of the stage before -> streams for the next one (the last: None), this stage's loss
Through = Callable[[int, Tensor | None], tuple[Tensor | None, Tensor]]


class Pipeline:
    """The stages of one step. All their ranks do the same at the same time."""

    def __init__(
        self, place: Place, group: dist.ProcessGroup, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """shape, dtype: of the streams of a micro-batch, [B, S, J, H]"""
        self._place, self._group = place, group
        self._streams = torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)
        self._stage = _Stage()
        self._schedules: dict[int, Schedule1F1B] = {}  # by number of micro-batches

    def step(self, num: int, through: Through) -> None:
        """`num` micro-batches forward and backward."""
        if num not in self._schedules:  # the stages agree on shapes first
            self._schedules[num] = self._schedule(num)
        self._stage.through = through
        numbers = torch.arange(num)
        self._schedules[num].step(number=numbers, target=numbers, losses=[], return_outputs=False)

    def _schedule(self, num: int) -> Schedule1F1B:
        place = self._place
        streams, loss = (self._streams,), torch.empty((), device="meta")
        stage = PipelineStage(
            self._stage,
            place.stage,
            place.num_stages,
            torch.device("cpu"),
            input_args=() if place.is_first else streams,
            output_args=(loss,) if place.is_last else streams,
            group=self._group,
        )
        return Schedule1F1B(stage, num, loss_fn=lambda loss, _: loss, scale_grads=False)

    @torch.no_grad()
    def forward(self, number: int, through: Through) -> None:
        """A single row forward only."""
        place, streams = self._place, None
        if not place.is_first:
            streams = torch.empty_like(self._streams[:1], device="cpu")
            self._receive(streams, place.stage - 1)
        passed, _ = through(number, streams)
        if passed is not None:
            self._send(passed, place.stage + 1)

    # ---- what the first and the last stage share

    @torch.no_grad()
    def add_shared(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of what both ends have; to the bit the same on both."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            mine = local(parameter.grad)
            theirs = torch.empty_like(mine)
            if self._place.is_first:
                self._send(mine, self._place.num_stages - 1)
                self._receive(theirs, self._place.num_stages - 1)
            else:
                self._receive(theirs, 0)
                self._send(mine, 0)
            mine += theirs

    @torch.no_grad()
    def give_shared(self, tensors: Iterable[Tensor]) -> None:
        """From the first stage to the last."""
        last = self._place.num_stages - 1
        for tensor in tensors:
            mine = local(tensor.detach())
            if self._place.is_first:
                self._send(mine, last)
            else:
                self._receive(mine, 0)

    def _send(self, tensor: Tensor, stage: int) -> None:
        dist.send(tensor.contiguous(), group=self._group, group_dst=stage)

    def _receive(self, tensor: Tensor, stage: int) -> None:
        dist.recv(tensor, group=self._group, group_src=stage)


class _Stage(nn.Module):
    """What torch calls. through: what the step at hand does."""

    through: Through

    def forward(self, streams: Tensor | None = None, *, number: Tensor) -> Tensor:
        passed, loss = self.through(int(number), streams)
        if passed is None:
            return loss
        return with_loss(
            passed if passed.requires_grad else passed.requires_grad_(), loss
        )  # all may be frozen


def with_loss(streams: Tensor, loss: Tensor) -> Tensor:
    """The streams as they are; when their gradient comes back, the loss gets a gradient of 1."""
    out: Tensor = _WithLoss.apply(streams, loss)
    return out


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
