"""float32 copies of narrower weights: an optimizer moves the copy, the model computes with what it is rounded to.

bfloat16 has 8 significant bits, so a step of 1e-5 leaves a weight of 0.01 as it is: the next numbers are 6e-5 away.
Copies may live in the CPU's memory, and the optimizer's state, which is made beside them, with them.
Knows no optimizer, no files.
Source: Mixed Precision Training (arXiv 1710.03740) sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .recipe import OptimizerPart

WIDE = torch.float32


class Masters:
    """What the optimizers move: a copy of each parameter that is narrower than float32, and all others themselves.

    learners  by name. Their gradients are those of all backward passes since they were forgotten, summed in float32;
              the narrow parameter's own is gone as soon as it is there
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], part: OptimizerPart) -> None:
        self.learners: dict[str, nn.Parameter] = dict(parameters)
        self._narrow = {
            name: parameter
            for name, parameter in parameters.items()
            if part.masters and has_master(parameter.dtype)
        }
        for name, parameter in self._narrow.items():
            values = parameter.detach().to("cpu" if part.offload else parameter.device)
            self.learners[name] = master = nn.Parameter(values.to(WIDE))
            parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))

    @torch.no_grad()
    def round(self) -> None:
        """Give the model what its copies are by now, rounded to nearest even."""
        for name, parameter in self._narrow.items():
            parameter.copy_(
                self.learners[name].to(parameter.dtype)
            )  # rounded before it travels: half the bytes

    def tensors(self) -> dict[str, Tensor]:
        """All copies by "name.of.parameter/master": what a checkpoint holds and fills in place."""
        return {f"{name}/master": self.learners[name].detach() for name in self._narrow}


def has_master(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < WIDE.itemsize


@torch.no_grad()
def _hand_over(master: nn.Parameter, parameter: Tensor) -> None:
    """A narrow parameter's gradient goes to its copy."""
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad.to(master.device), None
    if master.grad is None:
        master.grad = grad.to(master.dtype)
    else:
        master.grad += grad
