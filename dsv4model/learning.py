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

from . import eightbit
from .compressor import Indexer
from .divided import is_divided, local, num_holders
from .muon import Muon, has_halves, is_for_muon
from .recipe import Decay, LossPart, Optimizer, OptimizerPart, TrainPart, default_of

_NO_DECAY = ("norm", "hc", "hc_head")  # owners whose weights are gains and biases


def freeze(model: nn.Module, patterns: Iterable[str], *, optional: Container[str] = ()) -> list[str]:
    """Let parameters of these names stay. Returns their names.

    patterns  in order: one that begins with ! takes names out again
    optional  patterns that may fit nothing; for any other that is Usage
    """
    names = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern.removeprefix("!"))
        if not found and pattern not in optional:
            raise Usage(
                f"train.freeze: {pattern!r} fits no parameter",
                expected=f"patterns of names such as {next(iter(names))!r}",
                do="check the spelling; dsv4 finetune --dry-run lists what learns",
            )
        frozen = frozen - set(found) if pattern.startswith("!") else frozen | set(found)
    for name in frozen:
        names[name].requires_grad_(False)
    return sorted(frozen)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name. raises Usage if none does"""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise Usage("no parameter learns", do="look at train.freeze and lora.targets")
    return found


def learners(
    model: nn.Module, train: TrainPart, loss: LossPart, *, is_stage: bool = False
) -> dict[str, nn.Parameter]:
    """What learns of a model that is trained in full, by name; the rest is frozen. raises Usage

    Without a loss of their own indexers and MTP have no gradient: they stay, and have no optimizer state.

    is_stage  the model has some of the layers only: patterns may fit others, and nothing may learn in these
    """
    without_loss = ("*.indexer.*",) * (not loss.indexer) + ("mtp.*",) * (not loss.mtp)
    patterns = (*train.freeze, *without_loss)
    freeze(model, patterns, optional=patterns if is_stage else (*default_of("train.freeze"), *without_loss))
    if is_stage:
        return {name: item for name, item in model.named_parameters() if item.requires_grad}
    return learning(model)


def require_indexers(model: nn.Module, part: LossPart) -> None:
    """raises Usage: indexers have a loss of their own, and none of them learns"""
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    if part.indexer and not any(item.requires_grad for module in indexers for item in module.parameters()):
        raise Usage(
            "loss.indexer has no indexer that learns",
            expected="layers with an indexer, which train.freeze leaves out",
            do="give train.freeze without '*.indexer.*', which is in its default, or leave loss.indexer out",
        )


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
        {"params": [parameters[name] for name in group if is_divided(parameters[name]) is divided],
         "weight_decay": decay}
        for group, decay in ((names.decayed, part.weight_decay), (names.plain, 0.0))
        for divided in (False, True)  # torch does not step through both kinds together
    ]  # fmt: skip
    if not names.decayed and not names.plain:
        return made
    if part.kind is Optimizer.ADAMW8BIT:
        made.append(eightbit.adamw(plain, lr, part.betas, part.eps))
    else:
        # fused: one pass over each parameter, several times as fast on a CPU, and no temporaries
        adamw = torch.optim.AdamW(plain, lr=lr, betas=part.betas, eps=part.eps, fused=True)
        adamw.register_step_pre_hook(_straighten)
        _materialise(adamw)
        made.append(adamw)
    return made


def _materialise(adamw: torch.optim.AdamW) -> None:
    """torch makes a parameter's state at its first gradient; a checkpoint of before could then not be loaded after."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            zeros = [torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2)]
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": zeros[0], "exp_avg_sq": zeros[1],
            }  # fmt: skip


def _straighten(adamw: torch.optim.Optimizer, *_: Any) -> None:
    """Lay out gradients as parameters are: a fused step takes both as they lie in memory, and asks for no strides."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            assert parameter.is_contiguous()
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()  # itself, if it is


def optimizer_tensors(
    parameters: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """All state by "name.of.parameter/kind": what a checkpoint holds and fills in place."""
    named: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{named[parameter]}/{part}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, whole in state.items()
        for part, tensor in eightbit.parts(kind, whole).items()
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
def gradient_norm(
    parameters: Iterable[nn.Parameter], total: Callable[[Tensor], Tensor] = lambda squares: squares
) -> Tensor:
    """The norm of all gradients together, float32; not finite if one of them is not.

    total  squares of the norms of gradients of which this rank has a part, and of those that it has whole, [2] -> both
           over all ranks
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.zeros(2)
    for grad in grads:
        norm = torch.linalg.vector_norm(local(grad), dtype=torch.float32)
        square = norm.square().cpu()
        if is_divided(grad):
            squares[0] += square / num_holders(grad)
        else:
            squares[1] += square
    return total(squares).sum().sqrt()


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: Tensor, most: float) -> None:
    """Scale gradients of which this is the norm so that it is at most that; 0: leave them."""
    if not most:
        return
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device, parameter.grad.dtype))


def set_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # torchao insists
            else:
                group["lr"] = lr


def zero_grad(parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        parameter.grad = None
