"""AdamW with moments of one byte, by torchao if it is installed: codes, and a scale for every 256 of them.

Parameters that are small or not of whole blocks keep moments as wide as themselves.  Knows no model.
Source: torchao 0.18, torchao.optim; 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .optional import library

_LEAST, _BLOCK = 4096, 256  # values: of a parameter with codes, and for one scale


def require() -> Any:
    """torchao's optimizers. raises Environment if it is not installed"""
    return library("torchao.optim", name="torchao", otherwise='take optimizer.kind="adamw"')


def adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """With all state from the start, as zeros: what never has a gradient resumes too. raises Environment"""
    library = require()

    class AdamW8bit(library.AdamW8bit):  # type: ignore[misc, name-defined]  # whatever is installed
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            # torchao compiles a step for each shape: half a minute on a CPU, for what takes it a moment
            on_gpu = all(item.is_cuda for group in self.param_groups for item in group["params"])
            with contextlib.nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    made = AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
    for group in made.param_groups:
        for parameter in group["params"]:
            made.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": made._new_buffer(parameter, True),
                "exp_avg_sq": made._new_buffer(parameter, False),
            }
    return cast(torch.optim.Optimizer, made)


def parts(name: str, state: Any) -> dict[str, Tensor]:
    """The plain tensors that a state consists of, by name: itself, or codes and scales."""
    if not hasattr(state, "codes"):
        return {name: state}
    return {f"{name}.codes": state.codes, f"{name}.scales": state.scale}


def moment_bytes(num_values: int, dtype: torch.dtype) -> int:
    """Of one moment of a parameter."""
    if num_values < _LEAST or num_values % _BLOCK:
        return num_values * dtype.itemsize
    return num_values + num_values // _BLOCK * torch.float32.itemsize
