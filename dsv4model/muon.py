"""Muon as DeepSeek-V4 trains with it: momentum whose singular values are all made 1.  Knows no model but its names.

Source: paper sec. 2.5 and 4.2.2 (hybrid Newton-Schulz of 8 and 2 steps, Nesterov, RMS 0.18, which weights).
"""

#  ... any leading axes, each a matrix of its own;  N rows, M columns

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .divided import as_divided, whole

_FAST, _SHARP = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)  # coefficients of x, x x' x, x x' x x' x
_STEPS = (_FAST,) * 8 + (_SHARP,) * 2
UPDATE_RMS = (
    0.18  # of every step, in units of lr: what AdamW's have, so that its learning rates go on being right
)
_TINY = 1e-7
_HALVES = ".gate_up_proj"  # two matrices, one below the other


def orthogonalized(x_NM: Tensor) -> Tensor:
    """U V' for x = U S V', nearly: singular values between 0.99 and 1.01.

    x_NM     [..., N, M]
    returns  the same shape and dtype; float32 products on CPUs, bfloat16 on GPUs, where the paper found them stable
    """
    x = x_NM.to(torch.bfloat16 if x_NM.is_cuda else torch.float32)
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + _TINY)
    for a, b, c in _STEPS:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if wide else x).to(x_NM.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices; of more than two dimensions, each of the last two is a matrix of its own.

    A fused gate and up projection is two of them: say so by the group's `halves`.
    State: one momentum of the parameter's shape and dtype, made at once, so that what never has a gradient resumes too.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "halves": False}
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. A parameter without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[parameter]["momentum"]
        momentum.mul_(group["momentum"]).add_(parameter.grad)
        ahead = whole(momentum * group["momentum"] + parameter.grad)  # Nesterov
        matrices = ahead.unflatten(-2, (2, -1)) if group["halves"] else ahead
        scale = UPDATE_RMS * max(matrices.shape[-2:]) ** 0.5
        step = as_divided(orthogonalized(matrices).view_as(ahead), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=-group["lr"] * scale)


def is_for_muon(name: str, shape: torch.Size) -> bool:
    """Whether the paper trains a parameter by Muon: all matrices but embedding, head, norms, hyper-connections' biases
    and gating factors.

    name   as dsv4model calls it
    """
    owner, _, leaf = name.rpartition(".")
    if len(shape) < 2 or owner.endswith("norm") or owner in ("model.embed_tokens", "lm_head"):
        return False
    return leaf not in ("base", "scale", "hc_base", "hc_scale")


def has_halves(name: str) -> bool:
    """Whether a parameter is two matrices, one below the other."""
    return name.endswith(_HALVES)
