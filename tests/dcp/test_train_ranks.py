"""Training on several gloo ranks: the curve and the weights of one process, also after a stop and on other ranks."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gangs
import pytest
import torch
import training

from dsv4ckpt.errors import Usage
from dsv4ckpt.ranks import Ranks
from dsv4model.loading import surveyed
from dsv4model.outlook import outlook
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Step, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
State = dict[str, torch.Tensor]
Trained = tuple[list[Step], State]


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


def evaluated_on(data: Path) -> str:
    return f"data.eval_files={data}"


def require_same_steps(steps: list[Step], wanted: list[Step]) -> None:
    assert [step.step for step in steps] == [step.step for step in wanted]
    for step, other in zip(steps, wanted, strict=True):
        assert step[1:-2] == pytest.approx(other[1:-2], rel=1e-5, abs=1e-7)
        assert (step.tokens, step.load) == (other.tokens, other.load)


def require_close(got: Trained, wanted: Trained, weights: float = 2e-5) -> None:
    steps, state = got
    of_wanted, state_of_wanted = wanted
    require_same_steps(steps, of_wanted)
    assert state.keys() == state_of_wanted.keys()
    for name, tensor in state_of_wanted.items():
        if name.startswith("model."):
            assert torch.allclose(state[name].double(), tensor.double(), atol=weights), name


CASES: dict[str, list[str]] = {
    "full": ["loss.balance=0.01", "loss.bias_update=0.01", "loss.indexer=0.5", "train.freeze=[]"],
    "muon": ["optimizer.kind=muon", "train.recompute=blocks"],
    "lora": ["train.what=lora", "model.experts=packed", "lora.rank=4"],
    "initialize": ["model.initialize=true", "train.recompute=blocks"],
    "warm-up": ["loss.indexer=1.0", "loss.indexer_entries=dense", "train.freeze=['*', '!*.indexer.*']"],
    "first stage stays": ["train.freeze=['*.layers.[01].*', '*.indexer.*', '*embed_tokens*']"],
}


@pytest.fixture(scope="module")
def alone(flash: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """What one process makes of a case, and its metrics."""
    known: dict[str, Trained] = {}

    def made(case: str) -> Trained:
        if case not in known:
            text = text_of(flash, data, tmp_path_factory.mktemp("alone") / "run")
            known[case] = gangs.gang(1, training.run, text, CASES[case])[0]
        return known[case]

    return made


STOPPED = [(2, 1, 1), (4, 2, 2)]  # ranks, stages and groups of experts of the case that is stopped on its way


class Together(NamedTuple):
    """What ranks make of a case."""

    run: Path
    steps: list[list[Step]]  # of each rank
    state: State


@pytest.fixture(scope="module")
def together(flash: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Together]:
    """A case on so many ranks, in so many stages and groups of experts; those that are stopped later are evaluated."""

    @functools.cache
    def made(case: str, size: int, stages: int, experts: int) -> Together:
        run = tmp_path_factory.mktemp("together") / "run"
        changes = [*CASES[case], f"parallel.stages={stages}", f"parallel.experts={experts}"]
        if case == "full" and (size, stages, experts) in STOPPED:
            changes.append(evaluated_on(data))
        many = gangs.gang(size, training.run, text_of(flash, data, run), changes)
        return Together(run, [steps for steps, _ in many], many[0][1])

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "size", "stages", "experts"),
    [
        ("full", 2, 1, 1),
        ("full", 4, 1, 2),
        ("full", 4, 2, 1),
        ("full", 4, 2, 2),
        ("muon", 2, 1, 2),
        ("lora", 2, 1, 1),
        ("lora", 4, 1, 2),
        ("initialize", 2, 2, 1),
        ("warm-up", 4, 2, 1),
        ("first stage stays", 2, 2, 1),
    ],
)
def test_ranks_train_as_one_process_does(
    case: str, size: int, stages: int, experts: int, alone: Callable[[str], Trained],
    together: Callable[..., Together],
) -> None:  # fmt: skip
    """Rows, experts and layers divided, each alone and every two of them together."""
    found, wanted = together(case, size, stages, experts), alone(case)
    assert len(found.steps) == size
    for steps in found.steps:
        require_same_steps(steps, wanted[0])
    # Muon makes every direction of a gradient as long as the longest, those of rounding errors too
    require_close((found.steps[0], found.state), wanted, 2e-5 if case != "muon" else 0.1)
    assert (found.run / "latest").read_text() == "step-4\n"
    lines = [json.loads(line) for line in (found.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_muon_steps_divided_weights_as_whole_ones() -> None:
    """From equal gradients: matrices of uneven shards, experts, and halves."""
    whole = gangs.gang(1, training.muon_steps)[0]
    for size in (2, 3):
        for found in gangs.gang(size, training.muon_steps):
            assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stages", "experts"), STOPPED, ids=["rows", "all"])
def test_stopped_ranks_continue_to_the_bit_and_other_ranks_closely(
    size: int,
    stages: int,
    experts: int,
    together: Callable[..., Together],
    flash: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    """A signal to one rank stops all of them after the same step."""

    def trained(size: int, changes: list[str], run: str, until: int | None = None) -> Trained:
        changes = [*CASES["full"], *changes, evaluated_on(data)]
        text = text_of(flash, data, tmp_path / run)
        found: Trained = gangs.gang(size, training.run, text, changes, until)[0]
        return found

    undisturbed = together("full", size, stages, experts)
    steps, whole = undisturbed.steps[0], undisturbed.state
    division = [f"parallel.stages={stages}", f"parallel.experts={experts}"]
    early, _ = trained(size, division, "stopped", 2)
    assert [step.step for step in early] == [1, 2]
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    late, resumed = trained(size, division, "stopped")
    assert late == steps[2:]
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    require_close(trained(1, [], "moved"), (steps[2:], whole))
    lines = [
        (run / "metrics.jsonl").read_text().splitlines()[-1] for run in (undisturbed.run, tmp_path / "moved")
    ]
    evaluated = [json.loads(line)["eval_loss"] for line in lines]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


@pytest.mark.slow
def test_ranks_train_bfloat16_with_what_is_float32_in_it(flash: Path, data: Path, tmp_path: Path) -> None:
    changes = ["model.dtype=bfloat16", "optimizer.masters=true", "loss.balance=0.01"]
    one, state = gangs.gang(1, training.run, text_of(flash, data, tmp_path / "one"), changes)[0]
    changes += ["parallel.stages=2", "parallel.experts=2"]
    many = gangs.gang(4, training.run, text_of(flash, data, tmp_path / "many"), changes)
    for steps, _ in many:
        assert steps[0][1:4] == one[0][1:4]  # before anything was added up in another order
        for step, other in zip(steps, one, strict=True):
            assert step[1:4] == pytest.approx(other[1:4], rel=2e-3)
    tensors = many[0][1]
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    masters = {name: tensor for name, tensor in tensors.items() if name.endswith("/master")}
    for name, master in masters.items():
        weight = tensors[f"model.{name.removeprefix('optim.').removesuffix('/master')}"]
        assert torch.equal(master.bfloat16(), weight), name
    assert masters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (4, ["parallel.stages=2", "parallel.experts=2", "model.dtype=bfloat16", "optimizer.masters=true"]),
        (2, ["parallel.stages=2", "parallel.layers=[3, 1]"]),
        (2, ["train.what=lora", "model.experts=packed", "parallel.experts=2"]),
    ],
)
def test_each_rank_holds_what_the_dry_run_says(
    size: int, changes: list[str], flash: Path, data: Path, tmp_path: Path
) -> None:
    text = text_of(flash, data, tmp_path / "run")
    ahead = outlook(read_recipe(text.encode(), changes), *surveyed(str(flash)), size)
    said = [stage.memory for stage in ahead.stages for _ in range(stage.num_ranks)]
    assert len(said) == size
    for memory, (weights, state) in zip(said, gangs.gang(size, training.held, text, changes), strict=True):
        # shards of few rows are not even
        assert weights == pytest.approx(memory.weights, rel=0.01)
        assert state == pytest.approx(memory.optimizer, rel=0.01)


@pytest.mark.parametrize(
    ("size", "changes", "word"),
    [
        (3, [], "train.rows a multiple of"),
        (3, ["parallel.stages=2"], "a multiple of parallel.stages"),
        (3, ["parallel.experts=3"], "parallel.experts that divides"),
        (2, ["parallel.stages=2", "parallel.layers=[1, 2]"], "counts of 1 or more"),
        (2, ["parallel.layers=[1, 2]"], "counts of 1 or more"),
        (4, ["parallel.stages=2", "train.micro_rows=2"], "train.rows of 8 at least"),
        (2, ["train.what=lora", "parallel.stages=2"], "parallel.stages 1"),
    ],
)
def test_what_ranks_cannot_do_together_is_an_error(
    size: int, changes: list[str], word: str, flash: Path, data: Path, tmp_path: Path
) -> None:
    made = read_recipe(text_of(flash, data, tmp_path / "run").encode(), changes)
    with pytest.raises(Usage) as caught:
        Trainer(made, Ranks(0, size))
    assert word in str(caught.value)
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
