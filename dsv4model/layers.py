"""The smallest parts: a linear layer, a norm, and how wide they compute.  Knows nothing of the model.

In bfloat16 some parts compute in float32 (the reference's islands): `wide` is that float32, and float64 in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Watcher = Callable[[str, Tensor], None]
Prepare = Callable[[Tensor], Tensor]  # what the reference's inference does to the inputs of a matrix


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: float32."""
    return str(dtype).removeprefix("torch.")


def wide(x: Tensor) -> Tensor:
    """float32 at least: bfloat16 becomes float32, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class Module(nn.Module):
    """A module whose intermediate tensors can be watched."""

    watcher: Watcher | None = None
    choices: dict[Module, Tensor] | None = None  # in a block that backward computes again (recompute.py)

    def show(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Hand a tensor to the watcher. A callable is evaluated only if somebody watches."""
        if self.watcher is not None:
            self.watcher(name, value() if callable(value) else value)

    @torch.no_grad()
    def choose(self, make: Callable[[], Tensor]) -> Tensor:
        """make(), without gradient; where backward computes it again, what it was on the way forward.

        Once in a forward pass.
        """
        if self.choices is None:
            return make()
        if self not in self.choices:
            self.choices[self] = make()
        return self.choices[self]

    def remaking(self, tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """`remade`, but where backward computes the whole block again: what keeps nothing has nothing to spare."""
        return nullcontext() if self.choices is not None else remade(tensor, make)


class Linear(Module):
    """x @ weight.T; weight [out, in], no bias: V4 has none.

    prepare  what the reference's inference does to the inputs first (simulate.py)
    adapter  what is added, made of the same inputs (adapters.py)
    """

    adapter: nn.Module | None

    def __init__(self, in_features: int, out_features: int, prepare: Prepare | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.prepare = prepare
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.prepare is None else self.prepare(x)
        out = self.product(x)
        return out if self.adapter is None else out + self.adapter(x)

    def product(self, x: Tensor) -> Tensor:
        """The inputs times the weight."""
        return self.times(x, self.weight)

    @staticmethod
    def times(x: Tensor, weight: Tensor) -> Tensor:
        """How inputs are multiplied with a matrix [out, in] in this layer's place."""
        return F.linear(x, weight)


class GroupedLinear(Linear):
    """As many linear layers as groups, side by side: x [..., G, in] -> [..., G, out / G]; weight [out, in]."""

    @staticmethod
    def times(x: Tensor, weight: Tensor) -> Tensor:
        weight_GOI = weight.unflatten(0, (x.shape[-2], -1))
        flat_GTI = x.flatten(0, -3).transpose(0, 1)
        return (flat_GTI @ weight_GOI.mT).transpose(0, 1).unflatten(0, x.shape[:-2])


class WideLinear(Linear):
    """The same computed in float32 and returned so, with the weight stored as it is."""

    @staticmethod
    def times(x: Tensor, weight: Tensor) -> Tensor:
        return linear_wide(x, weight)


class RMSNorm(Module):
    """x / rms(x) * weight, in float32, then one cast back. weight is kept in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return out


class _RMSNorm(torch.autograd.Function):
    """Saves x as it came and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (wide(x) * inverse_rms(x, eps) * wide(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        inverse, grad = inverse_rms(x, ctx.eps), wide(grad)
        unit = wide(x) * inverse
        of_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        return unit_rms_backward(grad * wide(weight), unit, inverse).to(x.dtype), of_weight, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of the last dimension, which stays with size 1."""
    return torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in float32."""
    return wide(x) * inverse_rms(x, eps)


def unit_rms_backward(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x from that of unit = x * inverse."""
    return (grad - unit * (grad * unit).mean(-1, keepdim=True)) * inverse


class _LinearWide(torch.autograd.Function):
    """Saves the bfloat16 operands, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == weight.dtype:  # tensor cores multiply bfloat16 and sum in float32
            out = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
            return out.unflatten(0, x.shape[:-1])
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


def anchor(module: nn.Module, but: str) -> Tensor:
    """0, with a gradient of 0 for what learns in a module that these rows do not reach.

    So a step trains the same parameters whatever its rows are, and ranks agree on which gradients there are.

    but  how the names begin of what never has a gradient
    """
    learning = [
        item for name, item in module.named_parameters() if item.requires_grad and not name.startswith(but)
    ]
    return torch.stack([item.sum() * 0 for item in learning]).sum() if learning else torch.zeros(())


_Made = TypeVar("_Made")


def recomputed(make: Callable[..., _Made], *inputs: Any) -> _Made:
    """make(*inputs), of which only the inputs are kept: backward makes it again. For what is cheap or wide."""
    if not torch.is_grad_enabled():
        return make(*inputs)
    return cast(_Made, checkpoint(make, *inputs, use_reentrant=False, preserve_rng_state=False))


@contextmanager
def remade(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Within the block, whatever operation would keep `tensor` for backward keeps how to make it again instead."""
    if not torch.is_grad_enabled():
        yield
        return
    recipe, storage, count = _Recipe(make), tensor.untyped_storage().data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        # what is kept holds this function too, so it must not hold the tensor
        if saved.untyped_storage().data_ptr() != storage or saved.numel() != count:
            return saved
        recipe.num_kept += 1
        return saved.shape

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else recipe.made().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Recipe:
    """Makes a tensor when it is asked for, and holds it until everyone who kept it has asked."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make, self.num_kept, self._num_asked = make, 0, 0
        self._tensor: Tensor | None = None

    def made(self) -> Tensor:
        if self._tensor is None:
            with torch.no_grad():
                self._tensor = self._make()
        tensor, self._num_asked = self._tensor, self._num_asked + 1
        if self._num_asked % self.num_kept == 0:
            self._tensor = None
        return tensor
