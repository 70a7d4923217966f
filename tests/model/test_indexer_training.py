"""Training with the indexers' own loss: the indexers learn from it, and nothing else notices."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dsv4ckpt.errors import Interrupted, Usage
from dsv4ckpt.stop import StopFlag
from dsv4model import indexing
from dsv4model.loading import surveyed
from dsv4model.outlook import outlook
from dsv4model.recipe import Recipe, read_recipe
from dsv4model.trainer import Step, Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

Make = Callable[..., Recipe]
LEARNS = ("loss.indexer=1.0", "train.freeze=['*.mlp.gate.*']")
WARM_UP = ("loss.indexer=1.0", "loss.indexer_entries=dense", "train.freeze=['*', '!*.indexer.*']")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample whose third layer picks 8 entries."""
    path = tmp_path_factory.mktemp("three") / "layers"
    tiny.make_sample("flash", path, **{**tiny.SMALLEST, "layers": 3})
    document = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**document, "index_topk": 8, "sliding_window": 16}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very unequal lengths: some have fewer entries than are picked, some none."""
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    lengths = [96, 3, 70, 20, 2, 88, 50, 40, 96, 30, 60, 33, 90, 5, 77]
    lines = [{"input_ids": [10 + (index * 7 + step * step) % 50 for step in range(length)]}
             for index, length in enumerate(lengths)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make(source: Path, data: Path, tmp_path: Path) -> Make:
    def made(*changes: str, run: str = "run") -> Recipe:
        text = f"""
            [model]\nsource = "{source}"
            [train]\nrun = "{tmp_path / run}"\nsteps = 4\nrows = 4\nmicro_rows = 2
            [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 96
            [optimizer]\nlr = 1e-3
        """
        return read_recipe(text.encode(), changes)

    return made


def gradients(trainer: Trainer) -> tuple[Step, dict[str, torch.Tensor]]:
    """Of the first step, after clipping."""
    grads: dict[str, torch.Tensor] = {}
    step = trainer.optimizers[0].step

    def kept(*arguments: Any) -> Any:
        grads.update({n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None})
        return step(*arguments)

    trainer.optimizers[0].step = kept  # type: ignore[method-assign]
    return trainer.step(0), grads


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.slow
def test_everything_else_takes_the_same_step_to_the_bit(make: Make) -> None:
    """Clipped as it would be without; and without a loss, an indexer that may learn does not decay."""
    found = []
    for changes in (("train.freeze=['*.mlp.gate.*']",), LEARNS):
        trainer = Trainer(make("optimizer.clip=0.05", "optimizer.weight_decay=0.1", *changes))
        before = weights(trainer)
        step, grads = gradients(trainer)
        found.append((step, grads, moved(before, weights(trainer))))
    (plain, without, moved_without), (step, grads, moved_with) = found
    of_indexer = grads.keys() - without.keys()
    assert len(of_indexer) == 6 and all(".indexer." in name and grads[name].any() for name in of_indexer)
    assert not moved({name: grads[name] for name in without}, without)
    assert moved_with - moved_without >= {f"model.{name}" for name in of_indexer}
    assert not any(".indexer." in name for name in moved_without)
    assert (step.loss, step.mtp_loss, step.load) == (plain.loss, plain.mtp_loss, plain.load)
    assert step.grad_norm > plain.grad_norm
    assert (plain.indexer, plain.indexer_uniform) == (0, 0)
    assert step.indexer > 0.01 < step.indexer_uniform


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LEARNS, WARM_UP], ids=["sparse", "warm-up"])
def test_neither_micro_batches_nor_recomputed_blocks_change_the_loss(
    changes: tuple[str, ...], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that is computed twice compares each chunk of queries twice and not more."""
    compared, num = indexing._compared, list[int]()
    monkeypatch.setattr(indexing, "_compared", lambda *given: (num.append(1), compared(*given))[1])
    first, of_first = gradients(Trainer(make(*changes)))
    num_first = len(num)
    for division in ("train.micro_rows=1", "train.recompute=blocks"):
        num.clear()
        step, grads = gradients(Trainer(make(*changes, division)))
        assert len(num) == 2 * num_first
        assert step[1:6] == pytest.approx(first[1:6], rel=1e-6)
        assert grads.keys() == of_first.keys()
        for name, grad in grads.items():
            most = float(of_first[name].abs().max())
            assert torch.allclose(grad, of_first[name], rtol=1e-4, atol=1e-6 * most), name


@pytest.mark.slow
def test_warm_up_moves_indexers_only_and_brings_them_near(make: Make) -> None:
    trainer = Trainer(
        make(*WARM_UP, "train.steps=24", "train.rows=2", "optimizer.lr=1e-2", "optimizer.decay=constant")
    )
    before = weights(trainer)
    steps = [trainer.step(number) for number in range(24)]
    changed = {name for name in moved(before, weights(trainer)) if name.startswith("model.")}
    assert len(changed) == 6 and all(".indexer." in name for name in changed)
    parts = [
        step.indexer / step.indexer_uniform for step in steps
    ]  # both depend on the lengths of the documents
    assert min(parts[:4]) > 1.2 and max(parts[-4:]) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LEARNS, WARM_UP], ids=["sparse", "warm-up"])
def test_stopped_run_with_an_indexer_that_learns_ends_in_the_same_weights(
    changes: tuple[str, ...], make: Make
) -> None:
    whole = Trainer(make(*changes, run="whole"))
    train(whole, StopFlag())
    stop = StopFlag()

    def on_step(step: Step, _: float) -> None:
        if step.step == 2:
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        train(Trainer(make(*changes, run="stopped")), stop, on_step)
    resumed = Trainer(make(*changes, run="stopped"))
    train(resumed, StopFlag())
    assert moved(weights(whole), weights(resumed)) == set()
    lines = [
        json.loads(line)
        for line in Path(make(run="stopped").train.run, "metrics.jsonl").read_text().splitlines()
    ]
    assert all(line["indexer"] > 0 < line["indexer_uniform"] for line in lines) and len(lines) == 4


@pytest.mark.slow
def test_loss_on_unseen_data_is_that_of_the_entries_that_are_picked(make: Make, data: Path) -> None:
    """Though attention sees all of them in training."""
    files = f"data.eval_files=['{data}']"
    losses = [Trainer(make(*changes, files)).evaluate(StopFlag()) for changes in ((), WARM_UP)]
    assert losses[0] == losses[1]
    dense, sparse = (Trainer(make(*changes)).step(0).loss for changes in (WARM_UP, ()))
    assert dense != sparse


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (("loss.indexer=1.0",), "train.freeze"),
        (("loss.indexer=1.0", "train.freeze=['*.compressor.*']"), "train.freeze"),
        (("loss.indexer=1.0", "train.what=lora"), "leave one out"),
        (("loss.indexer_entries=dense",), "loss.indexer=1.0"),
        (("loss.indexer=-1",), "change it"),
    ],
)
def test_indexer_loss_that_teaches_nobody_is_refused(changes: tuple[str, ...], what: str, make: Make) -> None:
    for read in (Trainer, lambda made: outlook(made, *surveyed(made.model.source))):
        with pytest.raises(Usage) as caught:
            read(make(*changes))  # type: ignore[operator]
        assert what in str(caught.value.facts["do"])


def test_indexer_without_a_loss_stays_whatever_is_frozen(make: Make) -> None:
    """So several ranks, which give what has no gradient one of zero, do not let it decay."""
    assert not any(".indexer." in name for name in Trainer(make("train.freeze=[]")).parameters)
    with_loss = Trainer(make("train.freeze=[]", "loss.indexer=1.0")).parameters
    assert sum(".indexer." in name for name in with_loss) == 6


def test_model_without_an_indexer_has_nothing_to_teach(smallest: Path, make: Make) -> None:
    with pytest.raises(Usage, match="no indexer"):
        Trainer(make(*LEARNS, f"model.source={smallest}"))
