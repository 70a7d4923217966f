"""What other trainers of this family got wrong, and no other test here asks: docs/training.md lists all of it.

The oracles: the release's own bytes, torch's reader of its checkpoints, and runs that nobody stopped.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

from dsv4ckpt import run as runs
from dsv4ckpt.errors import Interrupted
from dsv4ckpt.stop import StopFlag
from dsv4model.exporting import planned
from dsv4model.recipe import Recipe, read_recipe
from dsv4model.runs import RunDirectory
from dsv4model.trained import checkpoint_at
from dsv4model.trainer import Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.slow,
]

Make = Callable[..., Recipe]


@pytest.fixture
def make(flash: Path, tmp_path: Path) -> Make:
    """make(*changes, lengths=..., run=...): a recipe on the sample, which has every kind of layer."""

    def made(*changes: str, lengths: tuple[int, ...] = (40, 30, 50, 20), run: str = "run") -> Recipe:
        data = tmp_path / f"{'-'.join(map(str, lengths))}.jsonl"
        lines = [{"input_ids": [10 + (7 * index + at) % 50 for at in range(length)]}
                 for index, length in enumerate(lengths)]  # fmt: skip
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = f"""
            [model]\nsource = "{flash}"
            [train]\nrun = "{tmp_path / run}"\nsteps = 3\nrows = 2\nmicro_rows = 1
            [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 64
            [optimizer]\nlr = 0.01\ndecay = "constant"
        """
        return read_recipe(text.encode(), changes)

    return made


def trained(made: Recipe, *, until: int | None = None) -> Trainer:
    """until: stopped by a signal after so many steps"""
    trainer, stop = Trainer(made), StopFlag()

    def on_step(step: object, _: float) -> None:
        if getattr(step, "step") == until:  # noqa: B009
            stop.signal_number = signal.SIGTERM

    if until is None:
        train(trainer, stop, on_step)
    else:
        with pytest.raises(Interrupted):
            train(trainer, stop, on_step)
    return trainer


def saved(made: Recipe, step: int) -> dict[str, Tensor]:
    """Every tensor of a run's checkpoint, by torch."""
    path = Path(made.train.run, "checkpoints", f"step-{step}")
    known = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in known.items()}
    load_dcp(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def exported(made: Recipe, to: str, path: Path) -> dict[str, tiny.Tensor]:
    directory = RunDirectory(made.train.run)
    with planned(directory, checkpoint_at(directory, None), to=to, names="deepseek", allow_lossy=True) as (
        plan,
        shown,
    ):
        runs.execute(plan, shown, str(path), num_workers=1, accept_changes=True)
    found: dict[str, tiny.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        found |= tiny.read_shard(shard)
    return found


def test_float32_parameters_and_the_hash_table_pass_a_bfloat16_run_and_its_export_unrounded(
    make: Make, flash: Path, tmp_path: Path
) -> None:
    """Sinks, hyper-connections, position biases, selection biases; token ids of experts, which no float may touch."""
    made = make("model.dtype=bfloat16", "train.steps=1", "loss.bias_update=0.001")
    trainer = trained(made)
    kept, state = saved(made, 1), trainer.model.state_dict()
    out, release = exported(made, "native", tmp_path / "out"), dict[str, tiny.Tensor]()
    for shard in flash.glob("*.safetensors"):
        release |= tiny.read_shard(shard)
    learned = 0
    for name, tensor in release.items():
        if tensor.dtype == "I64":
            assert out[name] == tensor, name
        elif tensor.dtype == "F32":
            assert out[name].dtype == "F32", name
            values = torch.frombuffer(bytearray(out[name].data), dtype=torch.float32)  # type: ignore[arg-type]
            held = [value for value in state.values() if value.dtype == torch.float32
                    and value.numel() == len(values) and torch.equal(value.flatten(), values)]  # fmt: skip
            assert held, name
            learned += not torch.equal(values, values.bfloat16().float())
    assert learned > 20
    for name, tensor in state.items():
        assert kept[f"model.{name}"].dtype == tensor.dtype and torch.equal(kept[f"model.{name}"], tensor), (
            name
        )


def test_selection_bias_of_a_release_is_moved_by_single_steps_and_never_centred(make: Make) -> None:
    """Those of releases are near 5, all of them: their mean is not ours to take away."""
    trainer = Trainer(make("loss.bias_update=0.25"))
    biases = {name: router.e_score_correction_bias for name, router in trainer._routers.items()
              if not router.hashes}  # fmt: skip
    for bias in biases.values():
        bias += 5
    before = {name: bias.clone() for name, bias in biases.items()}
    trainer.step(0)
    moved = {name: (bias - before[name]).tolist() for name, bias in biases.items()}
    assert all(set(steps) <= {-0.25, 0.0, 0.25} and any(steps) for steps in moved.values()), moved


def test_run_whose_parameters_never_had_a_gradient_continues_to_the_bit(make: Make) -> None:
    """Nothing reaches an indexer without a loss of its own, and documents of two tokens reach no compressor."""
    extra = ("train.freeze=[]", "data.pack=false")
    short = (2, 2, 2, 2)
    whole = trained(make(*extra, lengths=short, run="whole"))
    trained(make(*extra, lengths=short, run="stopped"), until=1)
    resumed = trained(make(*extra, lengths=short, run="stopped"))
    state, other = whole.state(), resumed.state()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    still = [name for name in state if name.endswith("/exp_avg") and not state[name].any()]
    assert any(".compressor." in name for name in still)
    assert not any(name.startswith("optim.") and ".indexer." in name for name in state)


def test_checkpoint_n_is_of_n_steps_and_the_last_step_always_has_one(make: Make) -> None:
    made = make("checkpoint.every=2", "checkpoint.keep=9")
    trained(made)
    assert [item.step for item in RunDirectory(made.train.run).checkpoints()] == [2, 3]
    assert Path(made.train.run, "latest").read_text() == "step-3\n"
    trainer = Trainer(make(run="by-hand"))
    for step in range(3):
        trainer.step(step)
        if step >= 1:
            found = saved(made, step + 1)
            assert all(torch.equal(tensor, found[name]) for name, tensor in trainer.state().items()), step
