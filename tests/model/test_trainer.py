"""Training runs: what a step is made of, and that a run that is stopped anywhere ends in the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dsv4ckpt.errors import Busy, Diverged, Dsv4Error, ForeignOutput, Interrupted, Usage
from dsv4ckpt.stop import StopFlag
from dsv4model import trainer as trainer_module
from dsv4model.losses import IGNORED
from dsv4model.recipe import Recipe, document_of, read_recipe
from dsv4model.runs import BadRun, RunDirectory
from dsv4model.trainer import Outcome, Step, Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting upwards modulo 50, from anywhere, in documents of any length: easily learned."""
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    lengths = torch.randint(3, 40, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    lines = [{"input_ids": [10 + (index * 7 + step) % 50 for step in range(length)]}
             for index, length in enumerate(lengths)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make(smallest: Path, data: Path, tmp_path: Path) -> Make:
    """A recipe on the smallest sample, with changes."""

    def made(*changes: str, run: str = "run", source: Path = smallest) -> Recipe:
        text = f"""
            [model]\nsource = "{source}"
            [train]\nrun = "{tmp_path / run}"\nsteps = 10\nrows = 4\nmicro_rows = 2
            [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 64
            [optimizer]\nlr = 1e-3
        """
        return read_recipe(text.encode(), changes)

    return made


def run_of(
    made: Recipe, until: int | None = None, stop: StopFlag | None = None
) -> tuple[Trainer, Outcome | None]:
    """Train; until: stop after so many steps, as a signal does."""
    trainer, stop = Trainer(made), stop or StopFlag()

    def on_step(step: Step, _: float) -> None:
        if until is not None and step.step == until:
            stop.signal_number = signal.SIGTERM

    try:
        return trainer, train(trainer, stop, on_step)
    except Interrupted:
        assert until is not None
        return trainer, None


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def metrics(made: Recipe) -> list[dict[str, Any]]:
    lines = Path(made.train.run, "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


# ---- a step


@pytest.mark.slow
def test_loss_falls_and_nothing_that_is_frozen_moves(make: Make, smallest: Path) -> None:
    made = make("train.steps=40", "optimizer.lr=3e-3", "optimizer.decay=constant")
    before = Trainer(made)
    trainer, outcome = run_of(made)
    assert outcome is not None and outcome.last is not None
    told = metrics(made)
    assert [line["step"] for line in told] == list(range(1, 41))
    assert told[-1]["loss"] < 0.6 * told[0]["loss"]
    assert told[-1]["mtp_loss"] < 0.8 * told[0]["mtp_loss"]
    moved = {name for name in same(before.state(), trainer.state()) if name.startswith("model.")}
    learners = {f"model.{name}" for name in trainer.parameters}
    assert moved <= learners
    assert not any(".gate." in name or ".indexer." in name for name in moved)
    assert len(moved) > 0.8 * len(learners)


@pytest.mark.slow
def test_division_into_micro_batches_changes_nothing(make: Make) -> None:
    """Losses are over the tokens of the global batch, MTP and balance included: documents of very unequal lengths."""
    found = []
    for micro in (1, 2, 4):
        trainer = Trainer(
            make(f"train.micro_rows={micro}", "loss.balance=0.1", "loss.mtp=0.3", "train.freeze=[]")
        )
        grads: dict[str, torch.Tensor] = {}
        step = trainer.optimizers[0].step

        def kept(*arguments: Any, step: Any = step, trainer: Trainer = trainer, grads: Any = grads) -> Any:
            grads |= {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
            return step(*arguments)

        trainer.optimizers[0].step = kept  # type: ignore[method-assign]
        found.append((trainer.step(0), grads))
    for step, grads in found[1:]:
        first, of_first = found[0]
        assert step[1:4] == pytest.approx(first[1:4], rel=1e-6)
        assert step.tokens == first.tokens
        assert grads.keys() == of_first.keys()
        for name, grad in grads.items():
            assert torch.allclose(
                grad, of_first[name], rtol=1e-4, atol=1e-6 * float(of_first[name].abs().max())
            ), name


@pytest.mark.slow
def test_loss_is_cross_entropy_of_the_models_own_logits(make: Make) -> None:
    trainer = Trainer(make("train.micro_rows=4"))
    batch = trainer.rows.batch(0, 4)
    with torch.no_grad():
        out = trainer.model(batch.ids, batch.next_ids, batch.documents)
    assert out.mtp_logits is not None
    means = [
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), targets.flatten(), ignore_index=IGNORED
        )
        for logits, targets in ((out.logits, batch.targets), (out.mtp_logits, batch.targets_mtp))
    ]
    step = trainer.step(0)
    assert [step.loss, step.mtp_loss] == pytest.approx([float(mean) for mean in means], rel=1e-5)


@pytest.mark.slow
def test_packed_rows_learn_what_single_documents_learn(make: Make) -> None:
    """All documents in one step, packed or one a row: the same loss and the same gradients' norm."""
    packed, single = (Trainer(make(f"data.pack={flag}", "train.micro_rows=1", "data.shuffle=false"))
                      for flag in ("true", "false"))  # fmt: skip
    found = []
    for trainer in (packed, single):
        rows = trainer.rows.per_epoch
        trainer.recipe = make(f"train.rows={rows}", "train.micro_rows=1")
        found.append(trainer.step(0))
    assert found[0].tokens == found[1].tokens == packed.corpus.num_counted
    assert found[0][1:3] == pytest.approx(found[1][1:3], rel=1e-5)
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=1e-4)


@pytest.mark.slow
def test_selection_bias_moves_against_the_load_and_only_if_asked(flash: Path, make: Make) -> None:
    biases = []
    for changes in ((), ("loss.bias_update=0.5",)):
        trainer = Trainer(make("train.rows=2", *changes, source=flash))
        name = next(name for name, router in trainer._routers.items() if not router.hashes)
        before = trainer._routers[name].e_score_correction_bias.clone()
        step = trainer.step(0)
        assert step.load[name] >= 1
        biases.append((trainer._routers[name].e_score_correction_bias - before).abs())
    assert not biases[0].any()
    assert all(moved in (0.0, pytest.approx(0.5)) for moved in biases[1].tolist())
    assert biases[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_size_and_evenness_of_routers_are_told(micro_rows: int, flash: Path, make: Make) -> None:
    """Over all tokens but padding, of the mean router that chooses."""
    changes = ["train.rows=2", f"train.micro_rows={micro_rows}", "data.pack=false"]
    trainer = Trainer(make(*changes, source=flash))
    choosing = [router for router in trainer._routers.values() if not router.hashes]
    z, entropy = [], []

    def heard(router: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        logits = inputs[0].detach().double() @ router.weight.detach().double().T
        shares = torch.nn.functional.softplus(logits).sqrt()
        shares /= shares.sum(-1, keepdim=True)
        z.append(logits.logsumexp(-1) ** 2)
        entropy.append(-(shares * shares.log()).sum(-1))

    for router in choosing:
        router.register_forward_pre_hook(heard)
    step = trainer.step(0)
    batch = trainer.rows.batch(0, 2)
    per_pass = [row.flatten() >= 0 for row in batch.documents.split(micro_rows)]
    counted = torch.cat([passed for passed in per_pass for _ in choosing])
    assert 0 < int(counted.sum()) < len(counted)  # there is padding
    assert step.router_z == pytest.approx(float(torch.cat(z)[counted].mean()), rel=1e-5)
    assert step.router_entropy == pytest.approx(float(torch.cat(entropy)[counted].mean()), rel=1e-5)


@pytest.mark.slow
def test_quantization_aware_training_computes_with_the_weights_that_are_exported(make: Make) -> None:
    trainer = Trainer(make("train.qat=true"))
    plain = Trainer(make())
    assert trainer.step(0).loss != 0
    batch = plain.rows.batch(4, 2)
    from dsv4model.simulate import fp4_weight

    with torch.no_grad():
        logits = trainer.model(batch.ids, batch.next_ids, batch.documents).logits
        for name, parameter in trainer.model.named_parameters():
            if ".experts." in name:
                parameter.copy_(fp4_weight(parameter))
        plain.model.load_state_dict(trainer.model.state_dict())
        assert torch.equal(plain.model(batch.ids, batch.next_ids, batch.documents).logits, logits)


# ---- runs that stop


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stops", [(5,), (1,), (2, 3, 9)])
def test_stopped_run_ends_in_the_same_weights_to_the_bit(
    optimizer: str, stops: tuple[int, ...], make: Make
) -> None:
    extra = [f"optimizer.kind={optimizer}", "loss.bias_update=0.01", "optimizer.warmup=3"]
    whole, _ = run_of(make(*extra, run="whole"))
    for until in stops:
        _, outcome = run_of(make(*extra, run="stopped"), until)
        assert outcome is None
        assert Path(make(run="stopped").train.run, "latest").read_text() == f"step-{until}\n"
    resumed, outcome = run_of(make(*extra, run="stopped"))
    assert outcome is not None and outcome.first_step == stops[-1]
    assert same(weights(whole), weights(resumed)) == []
    assert metrics(make(run="whole")) == metrics(make(run="stopped"))


@pytest.mark.slow
def test_complete_run_does_nothing_more(make: Make) -> None:
    first, _ = run_of(make())
    again, outcome = run_of(make())
    assert outcome == Outcome(10, 10, None, None)
    assert same(weights(first), weights(again)) == []


@pytest.mark.slow
def test_old_checkpoints_go_and_the_newest_stay(make: Make) -> None:
    made = make("checkpoint.every=2", "checkpoint.keep=3")
    run_of(made)
    assert [found.step for found in RunDirectory(made.train.run).checkpoints()] == [6, 8, 10]
    assert not [name for name in os.listdir(Path(made.train.run, "checkpoints")) if name.startswith(".")]


@pytest.mark.slow
def test_killed_process_continues_from_the_last_whole_checkpoint(make: Make, tmp_path: Path) -> None:
    whole, _ = run_of(make("checkpoint.every=3", run="whole"))
    program = """
import os, signal, sys
from dsv4ckpt.stop import StopFlag
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Trainer, train
made = read_recipe(sys.stdin.buffer.read())
train(Trainer(made), StopFlag(), lambda step, _: step.step == 8 and os.kill(os.getpid(), signal.SIGKILL))
"""
    made = make("checkpoint.every=3", run="killed")
    text = f"""
        [model]\nsource = "{made.model.source}"
        [train]\nrun = "{made.train.run}"\nsteps = 10\nrows = 4\nmicro_rows = 2
        [data]\nfiles = ["{made.data.files[0]}"]\nkind = "tokens"\nlength = 64
        [optimizer]\nlr = 1e-3\n[checkpoint]\nevery = 3
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], input=text.encode(), env=environment, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    Path(made.train.run, "checkpoints", ".step-9.tmp").mkdir()
    resumed, outcome = run_of(made)
    assert outcome is not None and outcome.first_step == 6
    assert same(weights(whole), weights(resumed)) == []
    assert [line["step"] for line in metrics(made)] == list(range(1, 11))


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_and_touches_nothing(make: Make) -> None:
    made = make("checkpoint.every=2")
    trainer = Trainer(made)
    poison = trainer.model.model.norm.weight

    def on_step(step: Step, _: float) -> None:
        if step.step == 3:
            with torch.no_grad():
                poison[0] = torch.nan

    with pytest.raises(Diverged) as caught:
        train(trainer, StopFlag(), on_step)
    assert caught.value.exit_code == 5
    assert "step 4" in str(caught.value.facts["found"]) and "rows 12 to 15" in str(
        caught.value.facts["found"]
    )
    assert [found.step for found in RunDirectory(made.train.run).checkpoints()] == [2]
    resumed, _ = run_of(made)
    assert same(weights(run_of(make(run="whole"))[0]), weights(resumed)) == []


@pytest.mark.slow
def test_float32_products_are_as_the_recipe_says_while_it_trains_and_then_as_before(
    make: Make, data: Path
) -> None:
    trainer = Trainer(make("model.matmul=high", "train.steps=1", f'data.eval_files=["{data}"]'))
    precision, told = torch.get_float32_matmul_precision, dict[str, str]()
    norm = trainer.model.model.norm

    def tell(_: Any, __: Any, out: torch.Tensor) -> None:
        told["forward" if out.requires_grad else "evaluated"] = precision()

    norm.register_forward_hook(tell)
    norm.weight.register_hook(lambda _: told.__setitem__("backward", precision()))
    torch.set_float32_matmul_precision("medium")  # somebody else's, in the same process
    try:
        train(trainer, StopFlag())
        assert told == {"forward": "high", "backward": "high", "evaluated": "high"}
        assert precision() == "medium"
        with torch.no_grad():
            norm.weight[0] = torch.nan
        with pytest.raises(Diverged):
            trainer.step(1)
        assert precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    _, outcome = run_of(make("model.matmul=highest", "train.steps=2", f'data.eval_files=["{data}"]'))
    assert outcome is not None and outcome.first_step == 1  # it may change within a run


# ---- what does not continue


@pytest.fixture
def begun(make: Make) -> Recipe:
    run_of(make(), until=2)
    return make()


def refused(kind: type[Dsv4Error], made: Recipe) -> Dsv4Error:
    before = tiny.tree_of(Path(made.train.run))
    with pytest.raises(kind) as caught:
        train(Trainer(made), StopFlag())
    after = tiny.tree_of(Path(made.train.run))
    assert {name: after[name] for name in before} == before
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["optimizer.lr=0.1", "train.seed=3", "data.length=32", "optimizer.kind=muon"]
)
def test_other_recipe_does_not_continue_a_run(change: str, begun: Recipe, make: Make) -> None:
    assert change.partition("=")[0] in refused(Usage, make(change)).what


@pytest.mark.slow
def test_run_that_began_before_a_key_was_there_has_its_default(begun: Recipe, make: Make) -> None:
    file = Path(begun.train.run) / "recipe.json"
    whole = file.read_bytes()
    document = json.loads(whole)
    try:
        del document["parallel"], document["train"]["qat"], document["optimizer"]["betas"]
        file.write_text(json.dumps(document))
        RunDirectory(begun.train.run).require_same_recipe(document_of(make()), frozenset())
        assert refused(Usage, make("train.qat=true")).what.startswith("train.qat is not what")
    finally:
        file.write_bytes(whole)


@pytest.mark.slow
def test_other_data_does_not_continue_a_run(begun: Recipe, make: Make, data: Path) -> None:
    lines = data.read_text()
    try:
        data.write_text(lines + '{"input_ids": [11, 12, 13]}\n')
        assert "data" in refused(Usage, make()).what
    finally:
        data.write_text(lines)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["recipe", "data", "directory"])
def test_what_does_not_continue_is_refused_before_weights_are_read(
    how: str, begun: Recipe, make: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(trainer_module, "load")
    lines = data.read_text()
    if how == "data":
        data.write_text(lines + '{"input_ids": [11, 12, 13]}\n')
    if how == "directory":
        Path(begun.train.run, "recipe.json").rename(Path(begun.train.run, "thesis.txt"))
    try:
        refused(Usage, make("optimizer.lr=0.1" if how == "recipe" else "optimizer.lr=1e-3"))
    finally:
        data.write_text(lines)


@pytest.mark.slow
def test_run_that_another_recipe_began_since_is_refused(make: Make) -> None:
    trainer = Trainer(make("optimizer.lr=0.1"))
    run_of(make(), until=1)
    with pytest.raises(Usage, match=r"optimizer\.lr"):
        train(trainer, StopFlag())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "missing file", "no about", "pickle", "fewer steps"])
def test_checkpoint_that_is_not_whole_is_refused(how: str, begun: Recipe, make: Make) -> None:
    (found,) = RunDirectory(begun.train.run).checkpoints()
    directory, changes = Path(found.path), []
    if how == "cut":
        file = directory / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing file":
        (directory / "__0_0.distcp").unlink()
    elif how == "no about":
        (directory / "run.json").write_text("{}")
    elif how == "pickle":
        (directory / ".metadata").write_bytes((directory / ".metadata").read_bytes()[:-2] + b"R.")
    else:
        changes = ["train.steps=1"]
    refused(Dsv4Error, make(*changes))


@pytest.mark.slow
def test_two_trainers_do_not_share_a_directory(begun: Recipe) -> None:
    with RunDirectory(begun.train.run).locked():
        refused(Busy, begun)


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ForeignOutput), RunDirectory(str(tmp_path)).locked():
        pass
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.slow
def test_loss_on_unseen_data_is_told_and_changes_nothing(make: Make, data: Path) -> None:
    extra = [f'data.eval_files=["{data}"]', "log.eval_every=4"]
    looked, outcome = run_of(make(*extra, run="looked"))
    plain, _ = run_of(make(run="plain"))
    told = {line["step"]: line["eval_loss"] for line in metrics(make(run="looked")) if "eval_loss" in line}
    assert list(told) == [4, 8, 10]
    assert outcome is not None and outcome.eval_loss == told[10] < told[4]
    assert same(weights(looked), weights(plain)) == []
    unseen, rows = looked.eval_rows, looked.rows
    assert unseen is not None
    batch = unseen.batch(0, rows.per_epoch)
    with torch.no_grad():
        logits = looked.model(batch.ids, batch.next_ids, batch.documents).logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED
    )
    assert outcome.eval_loss == pytest.approx(float(wanted), rel=1e-5)


def test_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    with run.locked():
        run.write(3, {"a": torch.arange(5)}, {})
        with pytest.raises(BadRun):
            run.write(3, {"a": torch.arange(5)}, {})
        blank = {"a": torch.zeros(5, dtype=torch.int64)}
        assert run.read(run.checkpoints()[0], blank)["step"] == 3
        assert torch.equal(blank["a"], torch.arange(5))
        with pytest.raises(BadRun, match="other tensors"):
            run.read(run.checkpoints()[0], {**blank, "b": torch.zeros(1)})
        with pytest.raises(BadRun, match="other tensors"):
            run.read(run.checkpoints()[0], {})
