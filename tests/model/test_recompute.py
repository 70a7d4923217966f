"""Blocks that backward computes again: the same bits, the same choices, counted once, and much less memory."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import random_ids, random_model, recomputing
from test_model_cost import SMALL, Counter
from torch import Tensor

from dsv4ckpt.errors import Interrupted
from dsv4ckpt.stop import StopFlag
from dsv4model.compressor import Indexer
from dsv4model.model import Block, Model
from dsv4model.moe import Router
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Step, Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

IDS = random_ids(2, 150)  # 37 entries of ratio 4, of which 8 are picked; 1 of ratio 128
DOCUMENTS = torch.tensor([[0] * 70 + [1] * 80, [0] * 150])


def loss_of(model: Model) -> Tensor:
    out = model(IDS, documents=DOCUMENTS)
    assert out.mtp_logits is not None
    loss: Tensor = out.logits.square().mean() + out.mtp_logits.square().mean()
    return loss


def gradients(model: Model) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys() and len(one) > 50
    return [name for name in one if not torch.equal(one[name], other[name])]


# ---- the model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_same_bits(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    found = []
    for flag in (False, True):
        loss = loss_of(recomputing(model, flag))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert differing(found[0][1], found[1][1]) == []


@pytest.mark.slow
def test_backward_takes_the_entries_that_forward_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in an indexer has a gradient, so changing it in between must change no gradient."""
    calls = []
    picks = Indexer.picks
    monkeypatch.setattr(Indexer, "picks", lambda self, *given: calls.append(self) or picks(self, *given))
    model = recomputing(random_model(torch.float32))
    loss_of(model).backward()
    wanted, num_calls = gradients(model), len(calls)
    assert num_calls > 0
    loss = loss_of(model)
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.data = -parameter.data.flip(0)
    loss.backward()
    assert differing(gradients(model), wanted) == []
    assert len(calls) == 2 * num_calls
    changed = loss_of(model).detach()
    assert not torch.equal(changed, loss.detach())  # so the indexers do pick others


def test_backward_takes_the_experts_that_forward_took() -> None:
    """Routers that are turned round in between would send every token elsewhere."""
    model = recomputing(random_model(torch.float32, n_routed_experts=16))
    heard: dict[str, Tensor] = {}
    routers = {name: item for name, item in model.named_modules() if isinstance(item, Router)}
    for name, router in routers.items():
        router.tap = lambda _, ids, name=name: heard.__setitem__(name, ids)
    out = model(random_ids(1, 6))
    loss = out.logits.square().mean() + out.mtp_logits.square().mean()
    taken = {name: set(ids.flatten().tolist()) for name, ids in heard.items()}
    heard.clear()
    for router in routers.values():
        router.weight.data = -router.weight.data
        if not router.hashes:
            router.e_score_correction_bias.neg_()
    loss.backward()
    assert heard == {}
    assert all(router.tap is not None and router.choices is None for router in routers.values())
    for name, ids in taken.items():
        grad = model.get_parameter(name.removesuffix("gate") + "experts.gate_up_proj").grad
        assert grad is not None
        assert {expert for expert in range(16) if grad[expert].any()} == ids, name
        assert len(ids) < 16


@pytest.mark.slow
def test_backward_of_a_graph_that_is_kept_can_be_made_twice() -> None:
    model = recomputing(random_model(torch.float32))
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    assert differing(gradients(model), first) == []


def peak_bytes(num_layers: int, *, flag: bool) -> int:
    changes = SMALL | {"num_hidden_layers": num_layers, "compress_ratios": [4] * num_layers}
    model = recomputing(random_model(torch.float32, **changes), flag)
    with Counter() as counter:
        model(random_ids(1, 1024)).logits.square().mean().backward()
    return counter.peak_bytes


@pytest.mark.slow
def test_layer_more_keeps_its_streams_and_choices() -> None:
    streams = 1024 * 4 * 32 * 4
    choices = 1024 * (8 * 8 + 4 * 2 * 8)  # 8 entries and 2 experts; those three more times, sorted by expert
    again, plain = ((peak_bytes(4, flag=flag) - peak_bytes(2, flag=flag)) / 2 for flag in (True, False))
    assert streams < again < 1.1 * (streams + choices)
    assert plain > 3 * again


# ---- the trainer


@pytest.fixture
def make(flash: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the flash sample, with changes of its recipe."""
    lines = [json.dumps({"input_ids": [10 + (7 * row + step) % 50 for step in range(3 + 13 * row % 60)]})
             for row in range(20)]  # fmt: skip
    (tmp_path / "tokens.jsonl").write_text("\n".join(lines))

    def made(*changes: str, run: str = "run") -> Trainer:
        text = f"""
            [model]\nsource = "{flash}"
            [train]\nrun = "{tmp_path / run}"\nsteps = 3\nrows = 2\nfreeze = ["*.indexer.*"]
            [data]\nfiles = ["{tmp_path / "tokens.jsonl"}"]\nkind = "tokens"\nlength = 64
            [optimizer]\nlr = 1e-3\n[loss]\nbalance = 0.1\nbias_update = 0.01
        """
        return Trainer(read_recipe(text.encode(), changes))

    return made


def stepped(trainer: Trainer, num: int = 2) -> tuple[list[Step], dict[str, Tensor]]:
    return [trainer.step(number) for number in range(num)], trainer.state()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("train.what=lora", "model.experts=packed"), ("train.qat=true",)])
def test_steps_are_the_same_bits_and_loads_are_counted_once(
    changes: tuple[str, ...], make: Callable[..., Trainer]
) -> None:
    plain, again = (make(*changes, f"train.recompute={how}") for how in ("none", "blocks"))
    steps, state = stepped(plain)
    steps_again, state_again = stepped(again)
    assert steps == steps_again  # losses, norms and loads
    assert differing(state, state_again) == []
    assert {block.recomputes for block in again.model.modules() if isinstance(block, Block)} == {True}


@pytest.mark.slow
def test_run_may_begin_to_recompute(make: Callable[..., Trainer]) -> None:
    whole = make(run="whole")
    train(whole, StopFlag())
    stop = StopFlag()

    def on_step(*_: Any) -> None:
        stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        train(make(run="stopped"), stop, on_step)
    resumed = make("train.recompute=blocks", run="stopped")
    assert train(resumed, StopFlag()).first_step == 1
    assert differing(whole.state(), resumed.state()) == []
