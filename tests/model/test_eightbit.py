"""AdamW with 8-bit moments: torchao where it is installed; what is built around it is held by a stand-in as well."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_masters import MIXED, differing, held, recipe_for, trained
from torch import Tensor

from dsv4ckpt.errors import Environment, Usage
from dsv4ckpt.ranks import Ranks
from dsv4model.loading import surveyed
from dsv4model.outlook import Memory, outlook
from dsv4model.recipe import Recipe
from dsv4model.trainer import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

KIND = "optimizer.kind=adamw8bit"
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
Make = Callable[..., Recipe]


class Codes:
    """A moment of the stand-in: a byte a value, and a scale for every 256."""

    def __init__(self, shape: torch.Size, signed: bool) -> None:
        self.codes, self.scale = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape.numel() // 256)
        self.middle = 128.0 if signed else 0.0

    def float(self) -> Tensor:
        return ((self.codes.view(-1, 256).float() - self.middle) * self.scale[:, None]).view(self.codes.shape)

    def set(self, values: Tensor) -> None:
        blocks = values.view(-1, 256)
        self.scale.copy_(blocks.abs().amax(1) / 127)
        codes = (blocks / self.scale.clamp_min(1e-30)[:, None]).round() + self.middle
        self.codes.copy_(codes.view(self.codes.shape))


class StandIn(torch.optim.Optimizer):
    """torchao's AdamW8bit as it looks from outside: a rate that is a tensor, state that is made when asked for."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps})

    def _new_buffer(self, parameter: Tensor, signed: bool) -> Any:
        coded = parameter.numel() >= 4096 and parameter.numel() % 256 == 0
        return Codes(parameter.shape, signed) if coded else torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group["lr"])

    def _update(self, parameter: Tensor, state: dict[str, Any], lr: Tensor) -> None:
        state["step"] += 1
        for kind, new in (("exp_avg", parameter.grad), ("exp_avg_sq", parameter.grad.square())):  # type: ignore[union-attr]
            mixed = state[kind].float().lerp(new, 0.1)
            if isinstance(state[kind], Codes):
                state[kind].set(mixed)
            else:
                state[kind].copy_(mixed)
        parameter -= lr * state["exp_avg"].float() / (state["exp_avg_sq"].float().sqrt() + 1e-8)


@pytest.fixture(params=["stand-in", pytest.param("torchao", marks=needs_torchao)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "torchao.optim", SimpleNamespace(AdamW8bit=StandIn))  # type: ignore[misc]
    name: str = request.param
    return name


@pytest.fixture
def make(smallest: Path, tmp_path: Path) -> Make:
    return lambda *changes, run="run": recipe_for(smallest, tmp_path, (KIND, *changes), run)


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_stopped_run_with_8_bit_moments_ends_in_the_same_bits(make: Make) -> None:
    whole = trained(make(*MIXED, run="whole"))
    trained(make(*MIXED, run="stopped"), until=1)
    assert differing(whole, trained(make(*MIXED, run="stopped"))) == []
    codes = [tensor for name, tensor in whole.items() if name.endswith("/exp_avg_sq.codes")]
    assert len(codes) > 10 and all(tensor.dtype == torch.uint8 and tensor.any() for tensor in codes)
    scales = [tensor for name, tensor in whole.items() if name.endswith("/exp_avg_sq.scales")]
    assert [256 * len(scale) for scale in scales] == [tensor.numel() for tensor in codes]


@pytest.mark.slow
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("changes", [(), MIXED, ("train.what=lora", "lora.rank=16")])
def test_memory_of_8_bit_moments_is_what_the_dry_run_foretells(changes: tuple[str, ...], make: Make) -> None:
    made = make(*changes)
    assert outlook(made, *surveyed(made.model.source)).memory == Memory(*held(Trainer(made)), 0)


@pytest.mark.slow
@needs_torchao
def test_steps_are_close_to_those_of_wide_moments(make: Make) -> None:
    """Four steps end within a tenth of the way from where those of torch's AdamW end."""
    start = Trainer(make()).state()
    ours, theirs = trained(make(run="ours")), trained(make("optimizer.kind=adamw", run="theirs"))
    names = [
        name for name in start if name.startswith("model.") and not torch.equal(start[name], theirs[name])
    ]
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in names)
    way = sum(float((start[name] - theirs[name]).square().sum()) for name in names)
    assert 0 < apart < 0.01 * way


def test_without_torchao_the_command_says_what_to_install(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)  # type: ignore[arg-type]
    with pytest.raises(Environment, match="torchao") as caught:
        Trainer(make())
    assert "pip install torchao" in str(caught.value)
    assert not Path(make().train.run).exists()


@pytest.mark.usefixtures("library")
def test_several_ranks_do_not_divide_8_bit_moments(make: Make) -> None:
    with pytest.raises(Usage, match="8-bit"):
        Trainer(make(), Ranks(0, 2))
