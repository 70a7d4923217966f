"""The mixture of experts: router, routed experts, shared expert.  Knows no attention, no streams.

Routing is float32.  The routing weight is multiplied in before the last matrix, so that one cast serves both.
Source: paper sec. 2.1; model.py Gate, Expert and MoE of the reference.

    T tokens, H hidden, E experts, I expert width, K experts per token, P = T * K pairs of token and expert
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .layers import Linear, Module, linear_wide, wide
from .simulate import Simulation, fp4_weight

_ALIGNMENT = 16  # bytes: what F.grouped_mm asks of a matrix's rows


class Router(Module):
    """Which experts a token goes to, and how much each counts."""

    tid2eid: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, config: Config, *, hashes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden))
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
            ids_TK = (scores_TE + self.e_score_correction_bias).topk(self.count, -1, sorted=False).indices
        chosen = scores_TE.gather(1, ids_TK)
        return ids_TK, chosen / chosen.sum(-1, keepdim=True) * self.scaling


def affinity(logits_TE: Tensor) -> Tensor:
    """sqrt(softplus): stable for large logits, and above 0 with a finite slope for very negative ones."""
    softplus = torch.logaddexp(logits_TE, torch.zeros_like(logits_TE))
    return softplus.clamp_min(torch.finfo(softplus.dtype).tiny).sqrt()


class Swiglu(NamedTuple):
    """silu(gate) * up with the gate clamped from above and up from both sides; limit 0: not at all."""

    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = wide(gate), wide(up)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return F.silu(gate) * up


class Pairs(NamedTuple):
    """Pairs of token and expert, sorted by expert."""

    token: Tensor  # [P]
    place: Tensor  # [P] where the pair stands among the token's K: token * K + k
    ends: Tensor  # int32 [E] end of each expert's pairs

    @classmethod
    def of(cls, ids_TK: Tensor, num_experts: int) -> Pairs:
        flat = ids_TK.flatten()
        place = flat.argsort(stable=True)
        ends = flat.bincount(minlength=num_experts).cumsum(0, dtype=torch.int32)
        return cls(place // ids_TK.shape[1], place, ends)


class Experts(Module):
    """All routed experts of a layer: gate_up_proj [E, 2I, H], rows of the gate first; down_proj [E, H, I]."""

    def __init__(self, config: Config, simulation: Simulation) -> None:
        super().__init__()
        experts, width = config.num_experts, config.intermediate
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden, width))
        self.swiglu, self.simulation = Swiglu(config.swiglu_limit), simulation

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The sum over each token's experts, float32 [T, H]."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if self.simulation.experts_fp4:
            gate_up, down = fp4_weight(gate_up), fp4_weight(down)
        run = grouped_experts if can_group(x_TH, gate_up, down) else looped_experts
        prepare = self.simulation.prepare
        return run(x_TH, ids_TK, weights_TK, gate_up, down, self.swiglu, prepare)


def looped_experts(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, swiglu: Swiglu,
                   prepare: Any = None) -> Tensor:  # fmt: skip
    """The slow twin: one expert after the other."""
    out = torch.zeros_like(wide(x_TH))
    x_TH = x_TH if prepare is None else prepare(x_TH)
    for expert in range(len(down)):
        token, k = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TH[token], gate_up[expert]).chunk(2, -1)
        inner = (swiglu(gate, up) * weights_TK[token, k, None]).to(x_TH.dtype)
        inner = inner if prepare is None else prepare(inner)
        out = out.index_add(0, token, wide(F.linear(inner, down[expert])))
    return out


def can_group(*tensors: Tensor) -> bool:
    """Whether F.grouped_mm takes these: no float64, and rows of a multiple of 16 bytes."""
    return all(t.dtype != torch.float64 and t.shape[-1] * t.element_size() % _ALIGNMENT == 0 for t in tensors)


def grouped_experts(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, swiglu: Swiglu,
                    prepare: Any = None) -> Tensor:  # fmt: skip
    """The same with one grouped product for all experts."""
    pairs = Pairs.of(ids_TK, len(down))
    x_TH = x_TH if prepare is None else prepare(x_TH)
    gate, up = F.grouped_mm(x_TH[pairs.token], gate_up.mT, offs=pairs.ends).chunk(2, -1)
    inner = (swiglu(gate, up) * weights_TK.flatten()[pairs.place, None]).to(x_TH.dtype)
    inner = inner if prepare is None else prepare(inner)
    out_PH = F.grouped_mm(inner, down.mT, offs=pairs.ends)
    back = torch.empty_like(pairs.place).scatter_(0, pairs.place, torch.arange(len(pairs.place)))
    return wide(out_PH[back]).unflatten(0, ids_TK.shape).sum(1)


class SharedExpert(Module):
    """One more expert that every token goes to."""

    def __init__(self, config: Config, simulation: Simulation) -> None:
        super().__init__()
        prepare = simulation.prepare
        self.gate_proj = Linear(config.hidden, config.intermediate, prepare)
        self.up_proj = Linear(config.hidden, config.intermediate, prepare)
        self.down_proj = Linear(config.intermediate, config.hidden, prepare)
        self.swiglu = Swiglu(config.swiglu_limit if config.clamps_shared else 0.0)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.swiglu(self.gate_proj(x_TH), self.up_proj(x_TH)).to(x_TH.dtype))


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
        routed = self.experts(x_TH, ids, weights)
        self.show("experts", lambda: routed.view(x_BSH.shape))
        out = (routed + wide(self.shared_experts(x_TH))).to(x_BSH.dtype).view(x_BSH.shape)
        self.show("out", out)
        return out
