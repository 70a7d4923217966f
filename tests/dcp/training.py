"""What the ranks of test_train_ranks do. Runs in processes of its own: see gangs.py."""

from __future__ import annotations

import signal

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dsv4ckpt.errors import Interrupted
from dsv4ckpt.process_group import GroupRanks
from dsv4ckpt.ranks import ALONE
from dsv4ckpt.stop import StopFlag
from dsv4model.divided import local, whole
from dsv4model.muon import Muon
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Step, Trainer, train


def run(
    text: str, changes: list[str], until: int | None = None
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Train; until: rank 0 is asked to stop after so many steps.

    returns  steps that this call made; and on rank 0 the whole state: of what several ranks have, the last one's
    """
    many = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    ranks = GroupRanks() if many else ALONE
    trainer, stop, steps = Trainer(read_recipe(text.encode(), changes), ranks), StopFlag(), list[Step]()

    def on_step(step: Step, _: float) -> None:
        steps.append(step)
        if step.step == until and ranks.rank == 0:
            stop.signal_number = signal.SIGTERM

    try:
        train(trainer, stop, on_step)
    except Interrupted as error:
        assert error.exit_code == 143 and until is not None
    state = {name: whole(tensor).clone() for name, tensor in trainer.state().items()}
    if many:  # stages have their own tensors
        states: list[dict[str, torch.Tensor]] = [{}] * ranks.size
        torch.distributed.gather_object(state, states if ranks.rank == 0 else None)
        state = {name: tensor for one in states for name, tensor in one.items()}
    return steps, state


def muon_steps() -> list[torch.Tensor]:
    """Two steps of Muon on a matrix, on experts and on fused halves, divided over the ranks. The weights after them."""
    generator = torch.Generator().manual_seed(3)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = []
    for shape, halves in (((7, 12), False), ((5, 8, 6), False), ((4, 8, 6), True)):
        weight, *grads = (torch.randn(shape, generator=generator) for _ in range(3))
        parameter = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        optimizer = Muon([{"params": [parameter], "halves": halves}], lr=0.1, weight_decay=0.1)
        for grad in grads:
            parameter.grad = distribute_tensor(grad, mesh, [Shard(0)])
            optimizer.step()
        found.append(whole(parameter.detach()))
    return found


def held(text: str, changes: list[str]) -> tuple[int, int]:
    """Bytes of weights and of optimizer state that this rank holds."""
    trainer = Trainer(read_recipe(text.encode(), changes), GroupRanks())
    optimizer = trainer.optimizer_tensors()
    weights, state = (
        sum(local(item).nbytes for item in tensors.values())
        for tensors in (trainer.model.state_dict(), optimizer)
    )
    return weights, state
