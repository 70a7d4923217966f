"""The smallest parts: a linear layer, a norm, and how wide they compute.  Knows nothing of the model.

In bfloat16 some parts compute in float32 (the reference's islands): `wide` is that float32, and float64 in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Watcher = Callable[[str, Tensor], None]


def wide(x: Tensor) -> Tensor:
    """float32 at least: bfloat16 becomes float32, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class Module(nn.Module):
    """A module whose intermediate tensors can be watched."""

    watcher: Watcher | None = None

    def show(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Hand a tensor to the watcher. A callable is evaluated only if somebody watches."""
        if self.watcher is not None:
            self.watcher(name, value() if callable(value) else value)


class Linear(Module):
    """x @ weight.T; weight [out, in], no bias: V4 has none.

    prepare  what the reference's inference does to the inputs first (simulate.py)
    """

    def __init__(
        self, in_features: int, out_features: int, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.prepare = prepare

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.prepare is None else self.prepare(x), self.weight)


class GroupedLinear(Linear):
    """As many linear layers as groups, side by side: x [..., G, in] -> [..., G, out / G]; weight [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        weight_GOI = self.weight.unflatten(0, (x.shape[-2], -1))
        flat_GTI = x.flatten(0, -3).transpose(0, 1)
        return (flat_GTI @ weight_GOI.mT).transpose(0, 1).unflatten(0, x.shape[:-2])


class WideLinear(Linear):
    """The same computed in float32 and returned so, with the weight stored as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_wide(x, self.weight)


class RMSNorm(Module):
    """x / rms(x) * weight, in float32, then one cast back. weight is kept in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (unit_rms(wide(x), self.eps) * wide(self.weight)).to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, taken over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class _LinearWide(torch.autograd.Function):
    """Saves the bfloat16 operands, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(wide(x), wide(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ wide(weight)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ wide(x).flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight


def linear_wide(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32, whatever the operands are stored as. Products of bfloat16 numbers are exact in it."""
    if x.dtype == weight.dtype == wide(x).dtype:
        return F.linear(x, weight)
    out: Tensor = _LinearWide.apply(x, weight)
    return out
