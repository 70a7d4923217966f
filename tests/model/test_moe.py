"""Experts and router against the oracle's loops and finite differences, and both ways of multiplying together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from random_model import distance
from tiny_model import tiny_document
from torch import Tensor

from dsv4model import moe
from dsv4model.config import Config
from dsv4model.moe import Experts, MoE, Router
from dsv4model.simulate import Simulation

CLOSE = 1e-12  # of the largest value, float64; measured: 1e-15
LIMIT = 1.0


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(module: torch.nn.Module, gain: float = 1.0) -> Any:
    module.double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = gain * normal(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5
    return module


def experts(dtype: torch.dtype = torch.float64, gain: float = 1.0, **changes: Any) -> Experts:
    config = Config.read(tiny_document(swiglu_limit=LIMIT, **changes))
    return filled(Experts(config, Simulation()), gain).to(dtype)


def random_table(num_tokens: int) -> Tensor:
    """Two different experts of eight for each token id."""
    return normal(num_tokens, 8, seed=6).argsort(1)[:, :2]


class Routed(NamedTuple):
    """What an Experts module takes."""

    x: Tensor
    ids: Tensor
    weights: Tensor


def routed(num_tokens: int, hidden: int = 64, dtype: torch.dtype = torch.float64, used: int = 8) -> Routed:
    """Two different experts for each token, of the first `used`."""
    random = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, used, generator=random).argsort(1)[:, :2]
    weights = 0.2 + torch.rand(num_tokens, 2, generator=random)
    wide = torch.promote_types(dtype, torch.float32)
    return Routed(normal(num_tokens, hidden, seed=1, dtype=dtype), ids, weights.to(wide))


def in_numpy(module: Experts, given: Routed) -> Tensor:
    """One token and one expert after the other."""
    gate_up, down = (x.detach().double().numpy() for x in (module.gate_up_proj, module.down_proj))
    x, ids, weights = (part.double().numpy() for part in given)
    out, half = np.zeros_like(x), gate_up.shape[1] // 2
    for t, k in np.ndindex(*ids.shape):
        e = int(ids[t, k])
        p = {"w1.weight": gate_up[e, :half], "w3.weight": gate_up[e, half:], "w2.weight": down[e]}
        out[t] += oracle.swiglu(p, {"swiglu_limit": LIMIT}, x[t], float(weights[t, k]))
    return torch.from_numpy(out)


def swiglu_margin(module: Experts, given: Routed) -> float:
    """How far the nearest gate or up is from where the clamp begins to bind."""
    projected = torch.einsum("th,eih->tei", given.x, module.gate_up_proj.detach())
    return float((projected.abs() - LIMIT).abs().min())


def with_gradients(module: Experts, given: Routed) -> list[Tensor]:
    x, weights = given.x.detach().requires_grad_(), given.weights.detach().requires_grad_()
    out = module(x, given.ids, weights)
    leaves = [x, weights, module.gate_up_proj, module.down_proj]
    return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=7).to(out.dtype))]


def looped_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "can_group", lambda *_: False)


# ---- values


@pytest.mark.parametrize("num_tokens", [1, 2, 50])
def test_experts_give_what_a_loop_over_tokens_does(num_tokens: int) -> None:
    module, given = experts(), routed(num_tokens)
    assert distance(module(*given), in_numpy(module, given)) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_in_narrower_dtypes_stay_near_float64(dtype: torch.dtype) -> None:
    """float32: sums of 64 products. bfloat16: gate, up, inner and each expert's result are rounded by 2**-9."""
    module, given = experts(dtype), routed(200, dtype=dtype)
    found = module(*given)
    assert found.dtype == torch.float32
    within = {torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]  # measured: 3e-7 and 3e-3
    assert distance(found.double(), in_numpy(module, given)) < within


# ---- one product for all experts, or one for each


@pytest.mark.parametrize("used", [8, 5, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_and_looped_experts_have_the_same_values_and_gradients(
    dtype: torch.dtype, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, given = experts(dtype), routed(60, dtype=dtype, used=used)
    assert moe.can_group(given.x, module.gate_up_proj, module.down_proj)
    grouped = with_gradients(module, given)
    looped_only(monkeypatch)
    for one, other in zip(grouped, with_gradients(module, given), strict=True):
        # measured on a CPU: the same bits. A sum in another order may round each element once more
        assert distance(one, other) < {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", [2, 3])
def test_experts_without_tokens_get_gradients_of_zero(dtype: torch.dtype, used: int) -> None:
    module, given = experts(dtype), routed(20, dtype=dtype, used=used)
    _, _, _, of_gate_up, of_down = with_gradients(module, given)
    for gradient in (of_gate_up, of_down):
        assert not gradient[used:].any()
        assert gradient[:used].flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("dtype", "changes", "groups"),
    [
        (torch.float32, {}, True),
        (torch.bfloat16, {}, True),
        (torch.float64, {}, False),
        (torch.float32, {"hidden_size": 62}, False),
        (torch.float32, {"moe_intermediate_size": 6}, False),
        (torch.float32, {"moe_intermediate_size": 4}, True),
        (torch.bfloat16, {"moe_intermediate_size": 4}, False),  # 8 bytes
        (torch.bfloat16, {"hidden_size": 68}, False),
    ],
    ids=str,
)
def test_sizes_that_grouped_products_refuse_are_looped_over(
    dtype: torch.dtype, changes: dict[str, int], groups: bool
) -> None:
    module = experts(dtype, **changes)
    given = routed(30, hidden=changes.get("hidden_size", 64), dtype=dtype)
    assert moe.can_group(given.x, module.gate_up_proj, module.down_proj) is groups
    with_gradients(module, given)
    within = {torch.float64: CLOSE, torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]
    assert distance(module(*given).double(), in_numpy(module, given)) < within


def test_what_can_be_grouped_is_what_torch_takes() -> None:
    """The rule is of torch's: where it is looser here, the product fails; where stricter, it is slow."""
    for dtype in (torch.float32, torch.bfloat16):
        for width in range(2, 40, 2):
            weight, x = torch.zeros(2, width, width, dtype=dtype), torch.zeros(3, width, dtype=dtype)
            try:
                torch.nn.functional.grouped_mm(x, weight.mT, offs=torch.tensor([1, 3], dtype=torch.int32))
                taken = True
            except (RuntimeError, ValueError):
                taken = False
            assert moe.can_group(x, weight) is taken, (dtype, width)


# ---- gradients


@pytest.mark.slow
def test_gradients_of_the_experts_are_what_finite_differences_give() -> None:
    module = experts(hidden_size=4, moe_intermediate_size=4, n_routed_experts=3, gain=2.0)
    given = routed(5, hidden=4, used=3)
    assert swiglu_margin(module, given) > 1e-3  # steps of 1e-6 cross no clamp; some bind, some do not

    def of_all(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        names = ("gate_up_proj", "down_proj")
        return torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x, given.ids, weights)
        )

    leaves = [given.x, given.weights, module.gate_up_proj, module.down_proj]
    assert torch.autograd.gradcheck(of_all, [x.detach().clone().requires_grad_() for x in leaves])


def test_gradients_where_the_clamp_binds_are_zero() -> None:
    """gate is clamped from above only, up from both sides."""
    module = experts(hidden_size=2, moe_intermediate_size=2, n_routed_experts=1, num_experts_per_tok=1)
    rows = {"gate high": (3.0, 0.5), "gate low": (-3.0, 0.5), "up high": (0.5, 3.0), "up low": (0.5, -3.0)}
    for name, (gate, up) in rows.items():
        module.gate_up_proj.data = torch.tensor([[[gate, 0], [0, 0], [up, 0], [0, 0]]]).double()
        module.down_proj.data = torch.ones(1, 2, 2).double()
        x, one = torch.tensor([[1.0, 0]]).double(), torch.ones(1, 1).double()
        (gradient,) = torch.autograd.grad(module(x, torch.tensor([[0]]), one).sum(), module.gate_up_proj)
        assert (gradient[0, 0, 0] == 0) == (name == "gate high"), name
        assert (gradient[0, 2, 0] == 0) == name.startswith("up"), name


# ---- router


def router(*, hashes: bool = False, **changes: Any) -> Router:
    made: Router = filled(Router(Config.read(tiny_document(**changes)), hashes=hashes), 2.0)
    if hashes:
        made.tid2eid.copy_(random_table(len(made.tid2eid)))
    else:
        made.e_score_correction_bias.copy_(0.3 * normal(8, seed=4))
    return made


@pytest.mark.parametrize("hashes", [False, True])
def test_router_picks_and_weighs_as_the_formulas_do(hashes: bool) -> None:
    made, x, tokens = router(hashes=hashes), normal(100, 64, seed=2), torch.arange(100)
    p = {"weight": made.weight.detach().numpy()}
    p |= {"tid2eid": made.tid2eid.numpy()} if hashes else {"bias": made.e_score_correction_bias.numpy()}
    expected = oracle.route(p, tiny_document(), x.numpy(), tokens.numpy())
    assert expected["router_gap"].min() > 1e-6
    ids, weights = made(x, tokens)
    ids, order = ids.sort(1)
    assert ids.tolist() == expected["router_ids"].tolist()
    assert distance(weights.gather(1, order), torch.from_numpy(expected["router_weights"])) < CLOSE


def test_router_of_equal_scores_picks_different_experts_of_equal_weight() -> None:
    made = router(n_routed_experts=8, num_experts_per_tok=3, routed_scaling_factor=1.5)
    made.weight.data.zero_()
    made.e_score_correction_bias.zero_()
    ids, weights = made(normal(20, 64), None)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert distance(weights, torch.full((20, 3), 0.5).double()) < CLOSE


def test_router_with_a_bias_changes_who_is_picked_and_never_the_scores() -> None:
    made, x = router(), normal(50, 64)
    made.e_score_correction_bias.zero_()
    made.e_score_correction_bias[5] = 1e6
    ids, weights = made(x, None)
    assert (ids == 5).any(1).all()
    scores = torch.nn.functional.softplus(x @ made.weight.T).sqrt().gather(1, ids)
    assert distance(weights, 1.5 * scores / scores.sum(1, keepdim=True)) < 1e-7  # softplus is linear above 20


@pytest.mark.parametrize("logit", [-200.0, -90.0, 90.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_router_of_extreme_logits_stays_finite_with_its_gradient(logit: float, dtype: torch.dtype) -> None:
    made = router().to(dtype)
    made.e_score_correction_bias = torch.zeros(8)
    made.weight.data.fill_(0)
    made.weight.data[:, 0] = logit
    x = torch.zeros(3, 64, dtype=dtype)
    x[:, 0] = 1
    x.requires_grad_()
    _, weights = made(x, None)
    gradients = torch.autograd.grad((weights * torch.tensor([1.0, 3.0])).sum(), [x, made.weight])
    assert weights.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert torch.allclose(weights.sum(1), torch.tensor(1.5).to(weights.dtype))


def test_router_of_a_bfloat16_model_scores_in_float32() -> None:
    made = router().to(torch.bfloat16)
    made.e_score_correction_bias = made.e_score_correction_bias.float()
    x = normal(100, 64, seed=2, dtype=torch.bfloat16)
    ids, weights = made(x, None)
    scores = (
        torch.logaddexp(x.double() @ made.weight.double().T, torch.zeros(1).double()).sqrt().gather(1, ids)
    )
    assert weights.dtype == torch.float32
    assert distance(weights.double(), 1.5 * scores / scores.sum(1, keepdim=True)) < 2e-6


# ---- the whole


@pytest.mark.parametrize("hashes", [False, True])
def test_moe_gives_what_the_formulas_do(hashes: bool) -> None:
    document = tiny_document()
    made: MoE = filled(MoE(Config.read(document), Simulation(), hashes=hashes), 1.5)
    for buffer in made.buffers():
        buffer.copy_(random_table(len(buffer)) if hashes else 0.3 * normal(8))
    state = {name: value.detach().numpy() for name, value in made.state_dict().items()}
    p = {"gate.weight": state["gate.weight"]}
    p |= (
        {"gate.tid2eid": state["gate.tid2eid"]}
        if hashes
        else {"gate.bias": state["gate.e_score_correction_bias"]}
    )
    for e in range(8):
        gate_up, down = state["experts.gate_up_proj"][e], state["experts.down_proj"][e]
        for inner, weight in (("w1", gate_up[:32]), ("w3", gate_up[32:]), ("w2", down)):
            p[f"experts.{e}.{inner}.weight"] = weight
    for inner, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        p[f"shared_experts.{inner}.weight"] = state[f"shared_experts.{name}.weight"]
    x, tokens = normal(2, 30, 64, seed=3), torch.arange(60).view(2, 30)
    found = made(x, tokens)
    for row in range(2):
        expected = oracle.experts(p, document, x[row].numpy(), tokens[row].numpy())
        assert distance(found[row], torch.from_numpy(expected["out"])) < CLOSE
