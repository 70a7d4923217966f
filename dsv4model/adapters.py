"""LoRA adapters: a low-rank product beside matrices that stay as they are, values or codes.

Owns which matrices may have one, how it starts, what it adds, and what merging adds to the matrix.  Knows no files
(peft.py), no data, no optimizer.
Source: LoRA (arXiv 2106.09685) sec. 4.1; PEFT 0.21 for how it starts and for experts.

An adapted layer is the layer of the matrix W + scale * B A, whatever a simulation does to its inputs.  Adapters are
float32 in a bfloat16 model: a step of AdamW moves a number by the learning rate, and bfloat16 does not hold 1 + 1e-4.
They are cast to the inputs' dtype when they are used, so that products cost what those of the model cost.
"""

#  E experts;  R rows, C columns of a matrix;  r rank;  P pairs of token and expert

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import Shape

from .divided import local
from .layers import Linear, Module
from .moe import Experts, Pairs, can_group, grouped, looped
from .packed import PackedExperts, PackedLinear
from .recipe import LoraPart

Times = Callable[[Tensor, Tensor], Tensor]  # inputs, matrix [R, C]

_HEAD = "lm_head.weight"  # losses multiply with it themselves, so an adapter would never be seen
_INDEXER = ".indexer."  # what it picks has no gradient, so an adapter would never learn


class Adapter(Module):
    """scale * B (A x), for a matrix [R, C] or the matrices [E, R, C].

    lora_A  [r, C] or [E, r, C]; lora_B [R, r] or [E, R, r]
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, alpha: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.alpha = nn.Parameter(lora_A), nn.Parameter(lora_B), alpha

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LinearAdapter(Adapter):
    """Beside a linear layer.

    times  how the layer multiplies with its own matrix: a grouped one divides the rows of B among its groups
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, alpha: float, times: Times) -> None:
        super().__init__(lora_A, lora_B, alpha)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.lora_A.to(x.dtype)) * self.scale
        return self.times(inner, self.lora_B.to(x.dtype))


class ExpertAdapter(Adapter):
    """Beside routed experts: each pair's row goes through its expert's adapter."""

    def forward(self, x_PC: Tensor, pairs: Pairs) -> Tensor:
        down_ErC, up_ERr = (local(matrix).to(x_PC.dtype) for matrix in (self.lora_A, self.lora_B))
        by_expert = grouped if can_group(x_PC, down_ErC, up_ERr) else looped
        return by_expert(up_ERr, by_expert(down_ErC, x_PC, pairs) * self.scale, pairs)


# ---- places


class Place(NamedTuple):
    """A matrix that can have an adapter."""

    name: str  # as a parameter of the dense model is called
    module: Module
    slot: str  # the module's attribute that takes the adapter
    shape: Shape  # of the values, [R, C] or [E, R, C]

    @property
    def adapter_name(self) -> str:
        """What its adapter is called, as a module of the model."""
        return f"{self.name.rpartition('.')[0]}.{self.slot}"

    @property
    def adapter(self) -> Adapter | None:
        found: Adapter | None = getattr(self.module, self.slot)
        return found

    def blank(self, rank: int, alpha: float, dtype: torch.dtype) -> Adapter:
        """An adapter for it, not filled, on its device."""
        *lead, rows, cols = self.shape
        device = next(tensor.device for tensor in (*self.module.parameters(), *self.module.buffers()))
        lora_A, lora_B = (
            torch.empty(*lead, *shape, dtype=dtype, device=device) for shape in ((rank, cols), (rows, rank))
        )
        if isinstance(self.module, Linear):
            return LinearAdapter(lora_A, lora_B, alpha, self.module.times)
        return ExpertAdapter(lora_A, lora_B, alpha)


def places(model: nn.Module) -> dict[str, Place]:
    """Every matrix that can have an adapter, by name, in the model's order."""
    found = (place for path, module in model.named_modules() for place in _places_of(path, module))
    return {place.name: place for place in found if place.name != _HEAD}


def _places_of(path: str, module: nn.Module) -> Iterator[Place]:
    if isinstance(module, Linear):
        per_code = module.quant.codes_per_element if isinstance(module, PackedLinear) else 1
        yield Place(f"{path}.weight", module, "adapter", _unpacked(module.weight, per_code))
    elif isinstance(module, Experts):
        per_code = module.quant.codes_per_element if isinstance(module, PackedExperts) else 1
        for leaf in ("gate_up", "down"):
            shape = _unpacked(getattr(module, f"{leaf}_proj"), per_code)
            yield Place(f"{path}.{leaf}_proj", module, f"{leaf}_adapter", shape)


def _unpacked(weight: Tensor, per_code: int) -> Shape:
    return (*weight.shape[:-1], weight.shape[-1] * per_code)


def _chosen(model: nn.Module, patterns: Iterable[str]) -> list[Place]:
    """The places that patterns fit, in the model's order; the indexer's are passed over. raises Usage"""
    fit = places(model)
    others = [name for name, _ in model.named_parameters() if name not in fit]
    chosen = set()
    for pattern in patterns:
        found = _fitting(fit, pattern)
        if wrong := _fitting(others, pattern):
            raise Usage(
                f"lora.targets: {pattern!r} fits {wrong[0]!r}, which cannot have an adapter",
                expected="linear layers of attention, of experts or of the MTP block",
                do="write a pattern that leaves out norms, embedding, head, routers and hyper-connections",
            )
        if not found:
            raise Usage(
                f"lora.targets: {pattern!r} fits no weight",
                expected=f"patterns of names such as {next(iter(fit), 'none')!r}",
                do="check the spelling: names are those of transformers",
            )
        chosen |= {name for name in found if _INDEXER not in name}
    if not chosen:
        raise Usage(
            "lora.targets fits the indexer only, and nothing that it picks has a gradient",
            do="name weights of attention or of experts",
        )
    return [place for name, place in fit.items() if name in chosen]


def _fitting(names: Iterable[str], pattern: str) -> list[str]:
    """Names that a pattern fits, with or without the .weight at their end."""
    return [name for name in names if fnmatch.filter((name, name.removesuffix(".weight")), pattern)]


# ---- attaching


def attach(model: nn.Module, part: LoraPart, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Give a dense or packed model adapters, which alone learn from now on, and change nothing yet.

    part       patterns as shell knows them, * fits dots too; names with or without .weight. The indexer's weights are
               passed over: what it picks has no gradient
    generator  for every A: uniform within 1 / sqrt(C), as PEFT does; every B is 0
    returns    the adapters' parameters by name, float32 (float64 in a float64 model)
    raises     Usage for a pattern that fits nothing or what cannot have an adapter, and for a model that has adapters:
               before anything is attached
    """
    require_none(model)
    if part.rank < 1 or not (math.isfinite(part.alpha) and part.alpha > 0):
        raise Usage(
            "there are no adapters of this kind",
            expected="lora.rank 1 or more, lora.alpha above 0",
            found=f"{part.rank}, {part.alpha}",
            do="change it",
        )
    made = {}
    for place in _chosen(model, part.targets):
        made[place] = adapter = place.blank(part.rank, part.alpha, dtype_in(model))
        if not adapter.lora_A.is_meta:  # there only shapes count
            _start(adapter, generator, getattr(place.module, "part", (0, 1)))
    return put(model, made)


def _start(adapter: Adapter, generator: torch.Generator, part: tuple[int, int]) -> None:
    """part: which of how many parts of the experts it is for; the same is drawn as for all of them"""
    lora_A, bound = adapter.lora_A.data, adapter.lora_A.shape[-1] ** -0.5
    number, count = part
    first, *others = lora_A.shape
    drawn = torch.empty(count * first, *others, dtype=lora_A.dtype, device=generator.device)
    drawn.uniform_(-bound, bound, generator=generator)
    lora_A.copy_(drawn[number * first : (number + 1) * first])
    adapter.lora_B.data.zero_()


def dtype_in(model: nn.Module) -> torch.dtype:
    """What adapters of this model are held in."""
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if is_double else torch.float32


def put(model: nn.Module, adapters: Mapping[Place, Adapter]) -> dict[str, nn.Parameter]:
    """Attach filled adapters, and freeze all else. Returns their parameters by name."""
    model.requires_grad_(False)
    for place, adapter in adapters.items():
        setattr(place.module, place.slot, adapter)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def require_none(model: nn.Module) -> None:
    """raises Usage if the model has adapters"""
    if attached(model):
        raise Usage("the model has adapters already", do="load it anew: a model takes one set of them")


def attached(model: nn.Module) -> dict[Place, Adapter]:
    """The adapters of a model, in its order."""
    return {place: place.adapter for place in places(model).values() if place.adapter is not None}


# ---- merging


class Delta(NamedTuple):
    """What merging adds to a matrix [R, C], or to those of all experts, one below the other."""

    lora_A: Tensor  # [..., r, C]
    lora_B: Tensor  # [..., R, r]
    scale: float

    def rows(self, first: int, count: int) -> Tensor:
        """Rows from `first` on, made now.

        returns  float64 [count, C]: B and A are widened, multiplied in float64, and the product times scale. Products
                 of two float32 numbers are exact in it; their sum has the order of the matrix product
        """
        height, rank, cols = self.lora_B.shape[-2], *self.lora_A.shape[-2:]
        lora_A, lora_B = self.lora_A.reshape(-1, rank, cols), self.lora_B.reshape(-1, rank)
        made = torch.empty(count, cols, dtype=torch.float64, device=lora_B.device)
        begin = first
        while begin < first + count:
            expert = begin // height
            end = min(first + count, (expert + 1) * height)
            out = made[begin - first : end - first]
            torch.mm(lora_B[begin:end].double(), lora_A[expert].double(), out=out)
            begin = end
        return made.mul_(self.scale)


def deltas(model: nn.Module) -> dict[str, Delta]:
    """What merging adds to each adapted weight, by the name of the dense model's parameter."""
    return {
        place.name: Delta(adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scale)
        for place, adapter in attached(model).items()
    }
