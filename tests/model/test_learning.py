"""Who learns, by what and how fast; state is there from the start, so that any step can be resumed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsv4model
from dsv4ckpt.errors import Usage
from dsv4model import learning
from dsv4model.model import Model
from dsv4model.recipe import Decay, LossPart, Optimizer, OptimizerPart, TrainPart

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(smallest: Path) -> Model:
    return dsv4model.load(str(smallest), dtype=torch.float32)


def test_frozen_parameters_are_those_that_the_patterns_name(model: Model) -> None:
    frozen = learning.freeze(model, ["*.mlp.gate.*", "mtp.*"])
    left = learning.learning(model)
    assert "model.layers.0.mlp.gate.weight" in frozen
    assert not frozen & left.keys()
    assert set(frozen) | left.keys() == {name for name, _ in model.named_parameters()}
    assert all(name.startswith("mtp.") or ".gate." in name for name in frozen)


def test_pattern_with_a_mark_takes_names_out_of_those_before(model: Model) -> None:
    learning.freeze(model, ["*", "!*.mlp.gate.*", "!mtp.*", "mtp.0.norm.*"])
    names = [name for name, _ in model.named_parameters()]
    wanted = [name for name in names if ".mlp.gate." in name or name.startswith("mtp.")]
    assert sorted(learning.learning(model)) == sorted(name for name in wanted if ".0.norm." not in name)
    with pytest.raises(Usage, match=r"!\*.robots"):
        learning.freeze(model, ["!*.robots.*"])


def test_pattern_that_fits_nothing_and_a_model_that_learns_nothing_are_errors(model: Model) -> None:
    with pytest.raises(Usage, match="fits no parameter"):
        learning.freeze(model, ["*.robots.*"])
    learning.freeze(model, ["*"])
    with pytest.raises(Usage, match="no parameter learns"):
        learning.learning(model)


def train_part(**values: Any) -> TrainPart:
    return TrainPart(run="run", steps=1, **values)


def test_what_has_no_loss_stays(model: Model) -> None:
    names = {name for name, _ in model.named_parameters()}
    found = learning.learners(model, train_part(freeze=()), LossPart(mtp=0.0)).keys()
    assert found == {name for name in names if not name.startswith("mtp.")}


def test_stage_may_have_nothing_that_learns_and_nothing_that_a_pattern_fits(model: Model) -> None:
    everything = train_part(freeze=("*.layers.99.*", "*"))
    assert learning.learners(model, everything, LossPart(), is_stage=True) == {}
    with pytest.raises(Usage, match=r"layers\.99"):
        learning.learners(model, everything, LossPart())


@pytest.mark.parametrize("kind", [Optimizer.ADAMW, Optimizer.MUON])
def test_every_parameter_has_one_optimizer_and_gains_do_not_decay(kind: Optimizer, model: Model) -> None:
    parameters = learning.learning(model)
    names = learning.split(parameters, kind)
    assert sorted(names.muon + names.decayed + names.plain) == sorted(parameters)
    assert bool(names.muon) == (kind is Optimizer.MUON)
    plain = {
        name for name in parameters if parameters[name].dim() < 2 or "hc" in name or "norm.weight" in name
    }
    assert plain - set(names.muon) == set(names.plain)
    optimizers = learning.optimizers_of(parameters, OptimizerPart(kind=kind, weight_decay=0.1), 1e-3)
    held = [parameter for item in optimizers for group in item.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == len(parameters)


@pytest.mark.parametrize("kind", [Optimizer.ADAMW, Optimizer.MUON])
def test_state_is_there_before_the_first_step_and_changes_nothing(kind: Optimizer, model: Model) -> None:
    """Half of the parameters never get a gradient. The oracle is torch's own lazily made state."""
    parameters = learning.learning(model)
    part = OptimizerPart(kind=kind)
    twin = copy.deepcopy(model)
    optimizers = learning.optimizers_of(parameters, part, 1e-3)
    before = set(learning.optimizer_tensors(parameters, optimizers))
    per = {
        name: {key.rpartition("/")[2] for key in before if key.startswith(f"{name}/")} for name in parameters
    }
    assert all(kinds in ({"momentum"}, {"step", "exp_avg", "exp_avg_sq"}) for kinds in per.values())
    lazy: list[torch.optim.Optimizer] = []
    theirs = dict(twin.named_parameters())
    if kind is Optimizer.ADAMW:
        lazy = [
            torch.optim.AdamW(
                theirs.values(), lr=1e-3, betas=part.betas, eps=part.eps, weight_decay=0, fused=True
            )
        ]
    for _ in range(2):
        for number, (name, parameter) in enumerate(parameters.items()):
            if number % 2:
                parameter.grad = torch.full_like(parameter, 0.5)
                theirs[name].grad = torch.full_like(parameter, 0.5)
        for item in (*optimizers, *lazy):
            item.step()
    assert set(learning.optimizer_tensors(parameters, optimizers)) == before
    if lazy:
        assert all(torch.equal(parameter, theirs[name]) for name, parameter in parameters.items())


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        sizes = [leaf.untyped_storage().nbytes() for leaf in made if leaf.data_ptr() not in given]
        self.largest = max([self.largest, *sizes])
        return out


def test_adamw_makes_nothing_of_a_parameters_size() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(64, 64)) for name in ("a.weight", "b.weight")}
    (adamw,) = learning.optimizers_of(parameters, OptimizerPart(weight_decay=0.1), 1e-3)
    for parameter in parameters.values():
        parameter.grad = torch.ones(64, 64)
    with Allocations() as seen:
        adamw.step()
    assert seen.largest <= 8
    assert all((parameter < 1).all() for parameter in parameters.values())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_its_formula_whatever_the_strides_of_a_gradient(decay: float) -> None:
    """Oracle: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, in float64."""
    part = OptimizerPart(weight_decay=decay, eps=1e-3)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    parameters = {"a.weight": torch.nn.Parameter(weight.clone())}
    (adamw,) = learning.optimizers_of(parameters, part, 0.1)
    wanted, first, second = weight.double(), torch.zeros(5, 3), torch.zeros(5, 3)
    for step in range(1, 4):
        grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(step + 1)).T
        parameters["a.weight"].grad = grad
        adamw.step()
        one, two = part.betas
        first = one * first + (1 - one) * grad.double()
        second = two * second + (1 - two) * grad.double().square()
        wanted = wanted * (1 - 0.1 * decay)
        wanted -= 0.1 * (first / (1 - one**step)) / ((second / (1 - two**step)).sqrt() + part.eps)
    assert torch.allclose(parameters["a.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_rate_warms_up_and_falls_to_its_least() -> None:
    part = OptimizerPart(warmup=4, least=0.1)
    rates = [learning.rate(step, 24, part, 1.0) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[24] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    linear = OptimizerPart(decay=Decay.LINEAR, least=0.5)
    assert [learning.rate(step, 4, linear, 1.0) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert learning.rate(3, 4, OptimizerPart(decay=Decay.CONSTANT), 0.3) == 0.3


def test_norm_and_clip_are_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    ours = [
        torch.nn.Parameter(torch.zeros(5, 3)),
        torch.nn.Parameter(torch.zeros(7)),
        torch.nn.Parameter(torch.zeros(2)),
    ]
    theirs = copy.deepcopy(ours)
    for one, other in zip(ours[:2], theirs, strict=False):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    norm = learning.gradient_norm(ours)
    assert norm.dtype == torch.float32
    learning.clip(ours, norm, 0.0)
    assert learning.gradient_norm(ours) == norm
    learning.clip(ours, norm, 1.0)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm == pytest.approx(float(wanted))
    for one, other in zip(ours[:2], theirs, strict=False):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-6)
    assert ours[2].grad is None
    ours[0].grad = torch.full((5, 3), torch.nan)
    assert not learning.gradient_norm(ours).isfinite()
