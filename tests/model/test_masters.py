"""float32 copies of bfloat16 weights: small steps add up in them, they resume to the bit, and memory is as foretold."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4cli.main import main
from torch import Tensor, nn

from dsv4ckpt.errors import Interrupted, Usage
from dsv4ckpt.stop import StopFlag
from dsv4model import learning
from dsv4model.loading import load, surveyed
from dsv4model.masters import Masters
from dsv4model.outlook import Memory, outlook
from dsv4model.recipe import OptimizerPart, Recipe, read_recipe
from dsv4model.trainer import Step, Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

MIXED = ("model.dtype=bfloat16", "optimizer.masters=true")
SHAPES = {"a.weight": (6, 5), "b.norm.weight": (7,), "c.weight": (4, 3)}


def parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    """Two matrices, and a gain that is float32 whatever they are."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(
            torch.randn(shape, generator=generator).bfloat16().to(torch.float32 if "norm" in name else dtype)
        )
        for name, shape in SHAPES.items()
    }


def made_of(part: OptimizerPart) -> tuple[dict[str, nn.Parameter], Masters, list[torch.optim.Optimizer]]:
    model = parameters()
    masters = Masters(model, part)
    return model, masters, learning.optimizers_of(masters.learners, part, 1e-5)


def backward(model: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    sum((model[name] * grad).sum() for name, grad in grads.items()).backward()  # type: ignore[union-attr]


# ---- copies


@pytest.mark.parametrize("offload", [False, True])
def test_hundred_tiny_steps_are_those_of_float32_and_the_weights_are_rounded_from_them(offload: bool) -> None:
    """The oracle is torch's AdamW on float32 weights, from the gradients that bfloat16 weights were given."""
    part = OptimizerPart(masters=True, offload=offload)
    model, masters, optimizers = made_of(part)
    wanted = parameters(torch.float32)
    plain = torch.optim.AdamW(wanted.values(), lr=1e-5, betas=part.betas, eps=part.eps, weight_decay=0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        grads = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
        backward(model, grads)
        assert model["a.weight"].grad is None  # it went on
        for optimizer in optimizers:
            optimizer.step()
        masters.round()
        learning.zero_grad(masters.learners.values())
        for name, grad in grads.items():
            wanted[name].grad = grad.float()
        plain.step()
    for name, parameter in model.items():
        # one rounding to 24 bits a step, in another order of operations
        assert torch.allclose(masters.learners[name], wanted[name], rtol=0, atol=100 * 2.0**-24 * 4), name
        assert torch.equal(parameter, masters.learners[name].detach().to(parameter.dtype))
    assert masters.tensors().keys() == {"a.weight/master", "c.weight/master"}
    assert masters.learners["b.norm.weight"] is model["b.norm.weight"]
    assert (masters.learners["a.weight"] != parameters()["a.weight"]).all()


def test_without_copies_most_tiny_steps_are_lost() -> None:
    part = OptimizerPart()
    model, masters, optimizers = made_of(part)
    assert not masters.tensors()
    for _ in range(100):
        backward(model, {"a.weight": torch.ones(6, 5)})
        for optimizer in optimizers:
            optimizer.step()
        learning.zero_grad(model.values())
    assert (model["a.weight"] == parameters()["a.weight"]).float().mean() > 0.8


def test_gradients_of_several_passes_are_summed_in_float32() -> None:
    """1 + 1/512 is no bfloat16."""
    model, masters, _ = made_of(OptimizerPart(masters=True))
    for size in (1.0, 2.0**-9):
        backward(model, {name: torch.full(shape, size) for name, shape in SHAPES.items()})
    for learner in masters.learners.values():
        assert learner.grad is not None and learner.grad.dtype == torch.float32
        assert torch.equal(learner.grad, torch.full(learner.shape, 1 + 2.0**-9))


def test_what_has_no_use_for_copies_is_refused(smallest: Path) -> None:
    text = f'[model]\nsource = "{smallest}"\n[train]\nrun = "run"\nsteps = 1\n[data]\nfiles = ["x"]'.encode()
    for changes in (
        ("optimizer.masters=true",),
        (*MIXED, "train.what=lora"),
        ("model.dtype=bfloat16", "optimizer.offload=true"),
        (*MIXED, "optimizer.offload=true", "optimizer.kind=muon"),
    ):
        with pytest.raises(Usage):
            read_recipe(text, changes)


# ---- runs


def recipe_for(source: Path, directory: Path, changes: tuple[str, ...], run: str) -> Recipe:
    """Of a short run on a small sample, with data that it writes."""
    lines = [json.dumps({"input_ids": [10 + (7 * row + step) % 50 for step in range(3 + 13 * row % 60)]})
             for row in range(20)]  # fmt: skip
    (directory / "tokens.jsonl").write_text("\n".join(lines))
    text = f"""
        [model]\nsource = "{source}"
        [train]\nrun = "{directory / run}"\nsteps = 4\nrows = 4\nmicro_rows = 2
        [data]\nfiles = ["{directory / "tokens.jsonl"}"]\nkind = "tokens"\nlength = 64
        [optimizer]\nlr = 1e-5
    """
    return read_recipe(text.encode(), changes)


@pytest.fixture
def make(smallest: Path, tmp_path: Path) -> Callable[..., Recipe]:
    return lambda *changes, run="run": recipe_for(smallest, tmp_path, changes, run)


def trained(made: Recipe, until: int | None = None) -> dict[str, Tensor]:
    """The state at the end of a run; until: it is stopped after so many steps."""
    trainer, stop = Trainer(made), StopFlag()

    def on_step(step: Step, _: float) -> None:
        if step.step == until:
            stop.signal_number = signal.SIGTERM

    try:
        train(trainer, stop, on_step)
    except Interrupted:
        assert until is not None
    return trainer.state()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_stopped_run_with_copies_ends_in_the_same_bits(kind: str, make: Callable[..., Recipe]) -> None:
    changes = [*MIXED, f"optimizer.kind={kind}"]
    whole = trained(make(*changes, run="whole"))
    trained(make(*changes, run="stopped"), until=1)
    resumed = trained(make(*changes, run="stopped"))
    assert differing(whole, resumed) == []
    names = [name.removeprefix("optim.").removesuffix("/master") for name in whole if "/master" in name]
    assert len(names) > 10
    for name in names:
        master, weight = whole[f"optim.{name}/master"], whole[f"model.{name}"]
        assert (master.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master.to(torch.bfloat16), weight)
    assert any(
        not torch.equal(whole[f"optim.{name}/master"], whole[f"model.{name}"].float()) for name in names
    )


@pytest.mark.slow
def test_offload_may_begin_within_a_run_and_gives_the_same_bits(make: Callable[..., Recipe]) -> None:
    """On a CPU; test_gpu holds that another device's weights are trained by copies here."""
    whole = trained(make(*MIXED, run="whole"))
    trained(make(*MIXED, run="moved"), until=2)
    assert differing(whole, trained(make(*MIXED, "optimizer.offload=true", run="moved"))) == []


@pytest.mark.slow
def test_what_is_exported_is_what_the_model_computed_with(
    make: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(*MIXED, "train.steps=1")
    state = trained(made)
    with pytest.raises(SystemExit) as ended:
        main(["export", made.train.run, str(tmp_path / "out"), "--to", "bf16", "-q"])
    assert ended.value.code == 0, capsys.readouterr().err
    model = load(tmp_path / "out", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if f"optim.{name}/master" in state:
            assert torch.equal(parameter, state[f"model.{name}"]), name


def held(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of weights, of gradients when the optimizers begin, and of state and masters."""
    found: list[int] = []
    step = trainer.optimizers[-1].step

    def counted(*arguments: Any) -> Any:
        both = {id(item): item for item in (*trainer.learners.values(), *trainer.parameters.values())}
        found.append(sum(item.grad.nbytes for item in both.values() if item.grad is not None))
        return step(*arguments)

    trainer.optimizers[-1].step = counted  # type: ignore[method-assign]
    trainer.step(0)
    state = {name: tensor for name, tensor in trainer.state().items() if name.startswith("optim.")}
    optimizer = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("/step"))
    return sum(tensor.nbytes for tensor in trainer.model.state_dict().values()), found[0], optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [(), MIXED[:1], MIXED, (*MIXED, "optimizer.kind=muon"), ("train.what=lora", "model.experts=packed")],
)
def test_memory_is_what_the_dry_run_foretells(changes: tuple[str, ...], make: Callable[..., Recipe]) -> None:
    made = make(*changes)
    ahead = outlook(made, *surveyed(made.model.source)).memory
    assert ahead == Memory(*held(Trainer(made)), 0)
