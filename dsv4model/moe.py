"""The mixture of experts: router, routed experts, shared expert.  Knows no attention, no streams.

Routing is float32.  The routing weight is multiplied in before the last matrix, so that one cast serves both.
Source: paper sec. 2.1; model.py Gate, Expert and MoE of the reference.

    T tokens, H hidden, E experts, I expert width, K experts per token, P = T * K pairs of token and expert
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import Config
from .divided import local
from .layers import Linear, Module, Prepare, linear_wide, recomputed, wide
from .simulate import Simulation, fp4_weight

_ALIGNMENT = 16  # bytes: what F.grouped_mm asks of a matrix's rows


Tap = Callable[[Tensor, Tensor], None]  # affinities [T, E] with their gradient, and the chosen experts [T, K]


class Router(Module):
    """Which experts a token goes to, and how much each counts.

    tap  is told of every call, for losses and counts of the load
    """

    tid2eid: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, config: Config, *, hashes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden))
        self.tap: Tap | None = None
        self.hashes, self.count, self.scaling = hashes, config.experts_per_token, config.routed_scaling
        if hashes:
            table = torch.empty(config.vocab, config.experts_per_token, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            bias = torch.empty(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TH: Tensor, token_ids_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Expert ids [T, K] and weights [T, K], float32."""
        scores_TE = affinity(linear_wide(x_TH, self.weight))
        if self.hashes:
            assert token_ids_T is not None  # Model asks for them
            ids_TK = self.tid2eid[token_ids_T]
        else:  # the bias selects, and never weighs
            selecting_TE = scores_TE + self.e_score_correction_bias
            ids_TK = self.choose(lambda: selecting_TE.topk(self.count, -1, sorted=False).indices)
        if self.tap is not None:
            self.tap(scores_TE, ids_TK)
        chosen = scores_TE.gather(1, ids_TK)
        return ids_TK, chosen / chosen.sum(-1, keepdim=True) * self.scaling


def affinity(logits_TE: Tensor) -> Tensor:
    """sqrt(softplus): stable for large logits, and above 0 with a finite slope for very negative ones."""
    softplus = torch.logaddexp(logits_TE, torch.zeros_like(logits_TE))
    return softplus.clamp_min(torch.finfo(softplus.dtype).tiny).sqrt()


def swiglu(gate_up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times a routing weight, with the gate clamped from above and up from both sides.

    gate_up  [..., 2I], the gate first
    limit    0: no clamp
    weight   [..., 1] or None: 1
    returns  float32 [..., I]
    """
    out: Tensor = _Swiglu.apply(gate_up, limit, weight)
    return out


class _Swiglu(torch.autograd.Function):
    """Keeps gate_up as it came; its gradient is made in place of the few tensors that it needs."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.limit = limit
        gate, up = _clamped(gate_up, limit)
        out = F.silu(gate) * up
        return out if weight is None else out.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        gate_up, weight = ctx.saved_tensors
        gate, up = _clamped(gate_up, ctx.limit)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        of_weight = None if weight is None else (grad * silu * up).sum(-1, keepdim=True)
        grad = grad if weight is None else grad * weight
        of_gate_up = torch.empty_like(gate_up)
        of_gate, of_up = of_gate_up.chunk(2, -1)
        of_up.copy_(grad * silu)
        slope = silu.sub_(silu * sigmoid).add_(sigmoid)  # d silu = sigmoid + silu - silu * sigmoid
        of_gate.copy_(slope.mul_(up).mul_(grad))
        if ctx.limit:  # a clamped value has no slope
            raw_gate, raw_up = gate_up.chunk(2, -1)
            of_gate.masked_fill_(raw_gate > ctx.limit, 0)
            of_up.masked_fill_(raw_up.abs() > ctx.limit, 0)
        return of_gate_up, None, of_weight


def _clamped(gate_up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    gate, up = (wide(half) for half in gate_up.chunk(2, -1))
    return (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit else (gate, up)


class Pairs(NamedTuple):
    """Pairs of token and expert, sorted by expert."""

    token: Tensor  # [P]
    place: Tensor  # [P] where the pair stood before: token * K + k
    back: Tensor  # [P] where the pair of each such place stands now
    ends: Tensor  # int32 [E] end of each expert's pairs
    per_token: int  # K

    @classmethod
    def of(cls, ids_TK: Tensor, num_experts: int) -> Pairs:
        flat = ids_TK.flatten()
        place = flat.argsort(stable=True)
        back = torch.empty_like(place)
        back[place] = torch.arange(len(place), device=place.device)
        ends = flat.bincount(minlength=num_experts).cumsum(0, dtype=torch.int32)
        return cls(place // ids_TK.shape[1], place, back, ends, ids_TK.shape[1])


Here = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, H], ids [T, K], weights [T, K] -> float32 [T, H]
Elsewhere = Callable[[Tensor, Tensor, Tensor, Here], Tensor]
Product = Callable[
    [Tensor, "Pairs"], Tensor
]  # rows of a pair [P, in], each times its expert's matrix -> [P, out]


def adapted(product: Product, adapter: nn.Module | None) -> Product:
    """The product, and what an adapter adds to it, made of the same inputs."""
    if adapter is None:
        return product
    return lambda x_PI, pairs: product(x_PI, pairs) + adapter(x_PI, pairs)


class Experts(Module):
    """All routed experts of a layer: gate_up_proj [E, 2I, H], rows of the gate first; down_proj [E, H, I].

    gate_up_adapter, down_adapter  what is added to each (adapters.py)
    part                           which part of the experts is here, of how many
    elsewhere                      takes tokens to the ranks that keep their experts, if these are not all here
                                   (expert_parallel.py)
    """

    gate_up_adapter: nn.Module | None
    down_adapter: nn.Module | None
    part: tuple[int, int] = (0, 1)
    elsewhere: Elsewhere | None = None

    def __init__(self, config: Config, simulation: Simulation) -> None:
        super().__init__()
        experts, width = config.num_experts, config.intermediate
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden, width))
        self.limit, self.simulation = config.swiglu_limit, simulation
        self.register_module("gate_up_adapter", None)
        self.register_module("down_adapter", None)

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The sum over each token's experts, float32 [T, H]."""
        if self.elsewhere is None:
            return self.here(x_TH, ids_TK, weights_TK)
        return self.elsewhere(x_TH, ids_TK, weights_TK, self.here)

    def here(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same for the experts that this process keeps."""
        gate_up, down = local(self.gate_up_proj), local(self.down_proj)
        if self.simulation.experts_fp4:
            gate_up, down = fp4_weight(gate_up), fp4_weight(down)
        by_expert = grouped if can_group(x_TH, gate_up, down) else looped
        up = adapted(partial(by_expert, gate_up), self.gate_up_adapter)
        back = adapted(partial(by_expert, down), self.down_adapter)
        pairs = Pairs.of(ids_TK, len(down))
        return routed(x_TH, pairs, weights_TK, up, back, self.limit, self.simulation.prepare)


@torch.compiler.disable  # its shapes depend on data, and torch's compiled grouped_mm takes bfloat16 only
def routed(x_TH: Tensor, pairs: Pairs, weights_TK: Tensor, up: Product, down: Product, limit: float,
           prepare: Prepare | None, *, keeps_inner: bool = False) -> Tensor:  # fmt: skip
    """Every token through its experts, summed by weight, float32 [T, H]. Backward projects up once more.

    keeps_inner  what goes into `down` is kept for backward; for a `down` that would else be computed once more too
    """
    as_read = prepare or _as_it_is

    def inner(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        weight_P1 = weights_TK.flatten()[pairs.place, None]
        inner_PI = swiglu(up(dispatched(as_read(x_TH), pairs), pairs), limit, weight_P1)
        return as_read(inner_PI.to(x_TH.dtype))

    def through(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        return down(inner(x_TH, weights_TK), pairs)

    kept = (
        down(recomputed(inner, x_TH, weights_TK), pairs)
        if keeps_inner
        else recomputed(through, x_TH, weights_TK)
    )
    return collected(kept, pairs)


def dispatched(x_TC: Tensor, pairs: Pairs) -> Tensor:
    """Tokens [T, C] -> pairs [P, C]."""
    out: Tensor = _Dispatch.apply(x_TC, pairs)
    return out


def collected(x_PC: Tensor, pairs: Pairs) -> Tensor:
    """Pairs [P, C] -> the sum of each token's, float32 [T, C]."""
    out: Tensor = _Collect.apply(x_PC, pairs)
    return out


class _Dispatch(torch.autograd.Function):
    """Backward sums in a fixed order, which index_put does not."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x_TC[pairs.token]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PC: Tensor) -> tuple[Tensor, None]:
        return _summed(grad_PC, ctx.pairs).to(grad_PC.dtype), None


class _Collect(torch.autograd.Function):
    """The transpose of _Dispatch."""

    @staticmethod
    def forward(ctx: Any, x_PC: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs, ctx.dtype = pairs, x_PC.dtype
        return _summed(x_PC, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, None]:
        return grad_TC.to(ctx.dtype)[ctx.pairs.token], None


def _summed(x_PC: Tensor, pairs: Pairs) -> Tensor:
    return wide(x_PC[pairs.back]).unflatten(0, (-1, pairs.per_token)).sum(1)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def grouped(weight_EOI: Tensor, x_PI: Tensor, pairs: Pairs) -> Tensor:
    """All experts in one product."""
    return F.grouped_mm(x_PI, weight_EOI.mT, offs=pairs.ends)


def looped(weight_EOI: Tensor, x_PI: Tensor, pairs: Pairs) -> Tensor:
    """The slow twin: one expert after the other."""
    counts = torch.diff(pairs.ends, prepend=pairs.ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(x, weight) for x, weight in zip(x_PI.split(counts), weight_EOI, strict=True)])


def can_group(*tensors: Tensor) -> bool:
    """Whether F.grouped_mm takes these: no float64, and rows of a multiple of 16 bytes."""
    return all(t.dtype != torch.float64 and t.shape[-1] * t.element_size() % _ALIGNMENT == 0 for t in tensors)


class SharedExpert(Module):
    """One more expert that every token goes to."""

    def __init__(self, config: Config, simulation: Simulation) -> None:
        super().__init__()
        prepare = simulation.prepare
        self.gate_proj = Linear(config.hidden, config.intermediate, prepare)
        self.up_proj = Linear(config.hidden, config.intermediate, prepare)
        self.down_proj = Linear(config.intermediate, config.hidden, prepare)
        self.limit = config.swiglu_limit if config.clamps_shared else 0.0

    def forward(self, x_TH: Tensor) -> Tensor:
        out: Tensor = recomputed(self._through, x_TH)
        return out

    def _through(self, x_TH: Tensor) -> Tensor:
        gate_up = torch.cat((self.gate_proj(x_TH), self.up_proj(x_TH)), -1)
        return self.down_proj(swiglu(gate_up, self.limit).to(x_TH.dtype))


class MoE(Module):
    """x [B, S, H], collapsed and normed -> [B, S, H]."""

    def __init__(self, config: Config, simulation: Simulation, *, hashes: bool) -> None:
        super().__init__()
        self.gate = Router(config, hashes=hashes)
        self.experts = Experts(config, simulation)
        self.shared_experts = SharedExpert(config, simulation)

    def forward(self, x_BSH: Tensor, token_ids_BS: Tensor | None) -> Tensor:
        self.show("in", x_BSH)
        x_TH = x_BSH.flatten(0, 1)
        ids, weights = self.gate(x_TH, None if token_ids_BS is None else token_ids_BS.flatten())
        order = ids.argsort(-1) if self.watcher else ids
        self.show("router_ids", lambda: ids.gather(1, order).unflatten(0, x_BSH.shape[:2]))
        self.show("router_weights", lambda: weights.gather(1, order).unflatten(0, x_BSH.shape[:2]))
        chosen = self.experts(x_TH, ids, weights)
        self.show("experts", lambda: chosen.view(x_BSH.shape))
        out = (chosen + wide(self.shared_experts(x_TH))).to(x_BSH.dtype).view(x_BSH.shape)
        self.show("out", out)
        return out
