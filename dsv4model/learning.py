"""Which parameters learn, by which optimizer, at which rate.  Knows no data, no files, no ranks.

Source: paper sec. 4.2.2 (which weights Muon trains, AdamW's numbers); training facts for what SFT freezes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv4ckpt.errors import Usage

from .divided import is_divided, local
from .muon import Muon, has_halves, is_for_muon
from .recipe import Decay, Optimizer, OptimizerPart

_NO_DECAY = ("norm", "hc", "hc_head")  # owners whose weights are gains and biases


def freeze(model: nn.Module, patterns: Iterable[str], *, optional: Container[str] = ()) -> list[str]:
    """Let parameters of these names stay. Returns their names.

    optional  patterns that may fit nothing; for any other that is Usage
    """
    names = dict(model.named_parameters())
    frozen = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found and pattern not in optional:
            raise Usage(
                f"train.freeze: {pattern!r} fits no parameter",
                expected=f"patterns of names such as {next(iter(names))!r}",
                do="check the spelling; dsv4 finetune --dry-run lists what learns",
            )
        frozen |= set(found)
    for name in frozen:
        names[name].requires_grad_(False)
    return sorted(frozen)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name. raises Usage if none does"""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise Usage("no parameter learns", do="look at train.freeze and lora.targets")
    return found


class Split(NamedTuple):
    """Names of parameters by what happens to them."""

    muon: list[str]
    decayed: list[str]  # AdamW
    plain: list[str]  # AdamW without weight decay: norms, biases, scales


def split(parameters: Mapping[str, Tensor], kind: Optimizer) -> Split:
    """Who trains what."""
    found = Split([], [], [])
    for name, parameter in parameters.items():
        if kind is Optimizer.MUON and is_for_muon(name, parameter.shape):
            found.muon.append(name)
        elif parameter.dim() < 2 or name.split(".")[-2].endswith(_NO_DECAY):
            found.plain.append(name)
        else:
            found.decayed.append(name)
    return found


def optimizers_of(
    parameters: Mapping[str, nn.Parameter], part: OptimizerPart, lr: float
) -> list[torch.optim.Optimizer]:
    """Optimizers over these parameters, each with all of its state: what never gets a gradient resumes as well."""
    names = split(parameters, part.kind)
    made: list[torch.optim.Optimizer] = []
    if names.muon:
        groups = [
            {
                "params": [parameters[name] for name in names.muon if has_halves(name) is halves],
                "halves": halves,
            }
            for halves in (False, True)
        ]
        made.append(Muon(groups, lr=lr, momentum=part.muon_momentum, weight_decay=part.weight_decay))
    plain: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in names.decayed], "weight_decay": part.weight_decay},
        {"params": [parameters[name] for name in names.plain], "weight_decay": 0.0},
    ]
    if names.decayed or names.plain:
        adamw = torch.optim.AdamW(plain, lr=lr, betas=part.betas, eps=part.eps)
        _materialise(adamw)
        made.append(adamw)
    return made


def _materialise(adamw: torch.optim.AdamW) -> None:
    """torch makes a parameter's state at its first gradient; a checkpoint of before could then not be loaded after."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            zeros = [torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2)]
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32), "exp_avg": zeros[0], "exp_avg_sq": zeros[1],
            }  # fmt: skip


def optimizer_tensors(
    parameters: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """All state by "name.of.parameter/kind": what a checkpoint holds and fills in place."""
    named: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{named[parameter]}/{kind}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }


def rate(step: int, num_steps: int, part: OptimizerPart, lr: float) -> float:
    """The learning rate of a step, counted from 0."""
    if step < part.warmup:
        return lr * (step + 1) / part.warmup
    done = (step - part.warmup) / max(1, num_steps - part.warmup)
    least = lr * part.least
    if part.decay is Decay.COSINE:
        return least + (lr - least) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return lr - (lr - least) * min(1.0, done) if part.decay is Decay.LINEAR else lr


@torch.no_grad()
def clip(
    parameters: Iterable[nn.Parameter], most: float, total: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """Scale all gradients so that their norm together is at most this; 0: only measure.

    total    the sum over ranks, for gradients of which each rank has a part
    returns  the norm before, float32; not finite if a gradient is not
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [torch.linalg.vector_norm(local(grad), dtype=torch.float32) for grad in grads]
    divided = [part for part, grad in zip(parts, grads, strict=True) if is_divided(grad)]
    norms = [part for part, grad in zip(parts, grads, strict=True) if not is_divided(grad)]
    if divided:
        norms.append(total(torch.stack(divided).square().sum()).sqrt())
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    if most:
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
    return norm


def set_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def zero_grad(parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        parameter.grad = None
