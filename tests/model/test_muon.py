"""Muon against singular value decompositions and a step in float64, written from the paper's lines."""

from __future__ import annotations

import pytest
import torch

import dsv4model
from dsv4model import muon
from dsv4model.muon import Muon, orthogonalized

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24), (3, 32, 48), (2, 2, 16, 40)])
def test_orthogonalized_is_u_v_of_the_decomposition(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    got = orthogonalized(x)
    values = torch.linalg.svdvals(got.double())
    assert got.shape == x.shape
    assert float(values.min()) > 0.99
    assert float(values.max()) < 1.01
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert torch.allclose(got.double(), u @ v, atol=0.02)


def test_five_steps_would_not_be_enough() -> None:
    """The usual Newton-Schulz leaves singular values far from 1: the last two steps are what makes them even."""
    x = random(64, 64)
    values = torch.linalg.svdvals(_by_steps(x, muon._STEPS[:5]))
    assert float(values.min()) < 0.8 or float(values.max()) > 1.1


def _by_steps(x: torch.Tensor, steps: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    x = x.double() / x.double().norm()
    for a, b, c in steps:
        s = x @ x.T
        x = a * x + b * s @ x + c * s @ s @ x
    return x


def test_three_steps_are_the_papers() -> None:
    """float64, one matrix, line by line; weight decay and Nesterov momentum included."""
    weight, grads = random(24, 40), [random(24, 40, seed=seed) for seed in (1, 2, 3)]
    ours = torch.nn.Parameter(weight.clone())
    optimizer = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    wanted, momentum = weight.double(), torch.zeros(24, 40, dtype=torch.float64)
    for grad in grads:
        ours.grad = grad.clone()
        optimizer.step()
        momentum = 0.95 * momentum + grad.double()
        step = _by_steps(0.95 * momentum + grad.double(), muon._STEPS) * 40**0.5 * 0.18
        wanted = wanted - 0.02 * (step + 0.1 * wanted)
    assert torch.allclose(ours.double(), wanted, atol=2e-5)
    root = float((step**2).mean().sqrt())
    assert root == pytest.approx(0.18, abs=0.002)


def test_experts_are_matrices_of_their_own_and_gate_and_up_are_two() -> None:
    weight, grad = random(3, 32, 24), random(3, 32, 24, seed=1)
    fused = torch.nn.Parameter(weight.clone())
    fused.grad = grad.clone()
    Muon([{"params": [fused], "halves": True}], lr=0.1).step()
    for expert in range(3):
        for half in (slice(0, 16), slice(16, 32)):
            alone = torch.nn.Parameter(weight[expert, half].clone())
            alone.grad = grad[expert, half].clone()
            Muon([alone], lr=0.1).step()
            assert torch.allclose(fused[expert, half], alone, atol=1e-6)


def test_what_has_no_gradient_stays_and_has_its_state() -> None:
    weight = torch.nn.Parameter(random(4, 4))
    before = weight.detach().clone()
    optimizer = Muon([weight])
    optimizer.step()
    assert torch.equal(weight, before)
    assert set(optimizer.state[weight]) == {"momentum"}
    assert optimizer.state_dict()["state"][0]["momentum"].shape == (4, 4)


def test_parameters_are_divided_as_the_paper_says(flash: object) -> None:
    model = dsv4model.load(str(flash))
    chosen = {name for name, item in model.named_parameters() if muon.is_for_muon(name, item.shape)}
    left = {name for name, _ in model.named_parameters()} - chosen
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= left
    assert not any("norm" in name.rpartition(".")[0].rpartition(".")[2] for name in chosen)
    assert all(name.endswith((".hc_fn", ".fn")) for name in chosen if "_hc." in name or "hc_head" in name)
    assert any(name.endswith(("_hc.fn", "hc_head.hc_fn")) for name in chosen)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_a_proj.weight",
            "mtp.0.e_proj.weight", "model.layers.0.mlp.gate.weight"} <= chosen  # fmt: skip
    assert {name for name in chosen if muon.has_halves(name)} == {n for n in chosen if "gate_up" in n}
