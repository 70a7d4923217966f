"""Training on several gloo ranks: the curve and the weights of one process, also after a stop and on other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gangs
import pytest
import torch
import training

from dsv4ckpt.errors import Usage
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Step, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very unequal lengths: some rows have none that a compressor of any ratio sees."""
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    lengths = [3, 2, 150, 3, 2, 3, 60, 2, 3, 140, 2, 3, 2, 160, 5, 3]
    lines = [{"input_ids": [10 + (index * 7 + step) % 50 for step in range(length)]}
             for index, length in enumerate(lengths)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def text_of(source: Path, data: Path, run: Path) -> str:
    return f"""
        [model]\nsource = "{source}"
        [train]\nrun = "{run}"\nsteps = 4\nrows = 4\nmicro_rows = 1
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 160\npack = false\nshuffle = false
        [optimizer]\nlr = 1e-2\nclip = 0.5\neps = 0.01
    """  # Adam's usual eps would turn a gradient's last digit into a whole step


def require_close(
    got: tuple[list[Step], State], wanted: tuple[list[Step], State], weights: float = 2e-5
) -> None:
    steps, state = got
    of_wanted, state_of_wanted = wanted
    assert [step.step for step in steps] == [step.step for step in of_wanted]
    for step, other in zip(steps, of_wanted, strict=True):
        assert step[1:6] == pytest.approx(other[1:6], rel=1e-5, abs=1e-7)
        assert (step.tokens, step.load) == (other.tokens, other.load)
    assert state.keys() == state_of_wanted.keys()
    for name, tensor in state_of_wanted.items():
        if name.startswith("model."):
            assert torch.allclose(state[name].double(), tensor.double(), atol=weights), name


CASES: dict[str, list[str]] = {
    "full": ["loss.balance=0.01", "loss.bias_update=0.01", "train.freeze=['*.indexer.*']"],
    "muon": ["optimizer.kind=muon"],
    "lora": ["train.what=lora", "model.experts=packed", "lora.rank=4"],
    "initialize": ["model.initialize=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "size"), [("full", 2), ("full", 4), ("muon", 2), ("lora", 2), ("initialize", 2)]
)
def test_ranks_train_as_one_process_does(
    case: str, size: int, flash: Path, data: Path, tmp_path: Path
) -> None:
    one = gangs.gang(1, training.run, text_of(flash, data, tmp_path / "one"), CASES[case])[0]
    many = gangs.gang(size, training.run, text_of(flash, data, tmp_path / "many"), CASES[case])
    for found in many:
        # Muon makes every direction of a gradient as long as the longest, those of rounding errors too
        require_close(found, one, 2e-5 if case != "muon" else 0.1)
    assert (tmp_path / "many" / "latest").read_text() == "step-4\n"
    lines = (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.slow
def test_muon_steps_divided_weights_as_whole_ones() -> None:
    """From equal gradients: matrices of uneven shards, experts, and halves."""
    whole = gangs.gang(1, training.muon_steps)[0]
    for size in (2, 3):
        for found in gangs.gang(size, training.muon_steps):
            assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


@pytest.mark.slow
def test_stopped_ranks_continue_to_the_bit_and_other_ranks_closely(
    flash: Path, data: Path, tmp_path: Path
) -> None:
    """A signal to one rank stops all of them after the same step."""

    def trained(size: int, run: str, *more: Any) -> tuple[list[Step], State]:
        found: tuple[list[Step], State] = gangs.gang(
            size, training.run, text_of(flash, data, tmp_path / run), CASES["full"], *more
        )[0]
        return found

    steps, whole = trained(2, "whole")
    early, _ = trained(2, "stopped", 2)
    assert [step.step for step in early] == [0, 1]
    late, resumed = trained(2, "stopped")
    assert late == steps[2:]
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    trained(2, "moved", 2)
    require_close(trained(1, "moved"), (steps[2:], whole))


def test_rows_that_ranks_cannot_share_are_an_error(smallest: Path, data: Path, tmp_path: Path) -> None:
    from dsv4ckpt.ranks import Ranks

    made = read_recipe(text_of(smallest, data, tmp_path / "run").encode(), [])
    for ranks, changes in ((Ranks(0, 3), []), (Ranks(0, 2), ["model.dtype=bfloat16"])):
        made = read_recipe(text_of(smallest, data, tmp_path / "run").encode(), changes)
        with pytest.raises(Usage):
            Trainer(made, ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_rank_is_started_again_by_torchrun_and_the_run_ends_in_the_same_weights(
    flash: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    changes = ["checkpoint.every=1", "checkpoint.keep=9"]
    for name in ("whole", "killed"):
        recipe.write_text(text_of(flash, data, tmp_path / name))
        command = ["-m", "dsv4cli"] if name == "whole" else [str(Path(__file__).with_name("train_driver.py"))]
        done = gangs.torchrun(2, *command, "finetune", str(recipe), *changes, "-q", restarts=1)
        assert done.returncode == 0, done.stderr[-6000:]
    told = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    steps = [[(line["step"], line["loss"]) for line in map(json.loads, lines)] for lines in told]
    assert steps[0] == steps[1]
    ends = [tmp_path / name / "checkpoints" / "step-4" for name in ("whole", "killed")]
    for rank in range(2):
        one, other = (end / f"__{rank}_0.distcp" for end in ends)
        assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "killed" / "loss.svg").exists()
