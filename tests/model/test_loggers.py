"""TensorBoard, W&B and trackio: they get the numbers of metrics.jsonl, and a run that continues stays one series.

Small modules of the same names record what they are told; all of them speak on stdout, as trackio does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dsv4ckpt.errors import Environment, Usage
from dsv4ckpt.stop import StopFlag
from dsv4model import trainer as trainer_module
from dsv4model.loggers import metrics
from dsv4model.recipe import LOGGERS, Recipe, read_recipe
from dsv4model.runs import BadRun, RunDirectory
from dsv4model.trainer import Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Fake(ModuleType):
    """All three at once: what was called, in order."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []
        self.fails = False

    def _call(self, *told: Any) -> None:
        print("words")
        self.calls.append(told)
        if self.fails:
            raise OSError(28, "No space left on device")

    def init(self, **settings: Any) -> SimpleNamespace:
        self._call("init", settings)
        return SimpleNamespace(
            id=settings.get("id", "abc123"), name=settings.get("name", f"{self.__name__}-sunset")
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log", step, values)

    def finish(self) -> None:
        self._call("finish")

    def SummaryWriter(self, directory: str, purge_step: int) -> SimpleNamespace:
        self._call("init", directory, purge_step)
        return SimpleNamespace(
            add_scalar=lambda name, value, step: self._call("log", step, {name: value}),
            flush=lambda: self._call("flush"),
            close=lambda: self._call("finish"),
        )

    def of(self, what: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == what]

    def numbers(self) -> list[tuple[int, str, float]]:
        return [(step, name, value) for step, values in self.of("log") for name, value in values.items()]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made = {name: Fake(name) for name in LOGGERS}
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, module, made[name])
    return made


def recipe(place: Path, *changes: str, source: str = "absent") -> Recipe:
    data = place / "tokens.jsonl"
    data.write_text('{"input_ids": [1, 2, 3, 4]}\n')
    text = f"""
        [model]\nsource = "{source}"
        [train]\nrun = "{place / "run"}"\nsteps = 3\nrows = 1
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 8
        [log]\nto = ["tensorboard", "wandb", "trackio"]
    """
    return read_recipe(text.encode(), changes)


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    (tmp_path / "run").mkdir()
    return recipe(tmp_path)


LINE = {"step": 1, "loss": 2.5, "load": {"a": 1.5, "b": 3.0}}
NUMBERS = [(1, "loss", 2.5), (1, "load/a", 1.5), (1, "load/b", 3.0)]


def tell(made: Recipe, *lines: dict[str, Any], first: int = 0, rank: int = 0) -> None:
    with metrics(RunDirectory(made.train.run), made, first, rank) as told:
        for line in lines:
            told(line)


def test_each_logger_gets_every_number_of_a_line_and_is_closed(
    made: Recipe, fakes: dict[str, Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    tell(made, LINE, {"step": 1, "eval_loss": 2.0})
    assert Path(made.train.run, "metrics.jsonl").read_text().count("\n") == 2
    for fake in fakes.values():
        assert fake.numbers() == [*NUMBERS, (1, "eval_loss", 2.0)]
        assert [call[0] for call in fake.calls].count("init") == 1
        assert fake.calls[-1] == ("finish",)
    assert capsys.readouterr() == ("", "")


def test_each_line_is_out_before_the_next(made: Recipe, fakes: dict[str, Fake]) -> None:
    """What TensorBoard keeps back would be lost with a process that is killed."""
    tell(made, LINE)
    assert fakes["tensorboard"].calls[-2] == ("flush",)


def test_run_that_continues_stays_the_same_series(made: Recipe, fakes: dict[str, Fake]) -> None:
    tell(made, LINE, {**LINE, "step": 2}, {**LINE, "step": 3})
    tell(made, {**LINE, "step": 3}, first=2)
    run = made.train.run
    assert fakes["tensorboard"].of("init") == [(f"{run}/tensorboard", 1), (f"{run}/tensorboard", 3)]
    (first,), (second,) = fakes["wandb"].of("init")
    assert "id" not in first and second == {**first, "id": "abc123"}
    assert (first["dir"], first["name"], first["project"]) == (run, "run", "dsv4")
    (first,), (second,) = fakes["trackio"].of("init")
    assert "name" not in first and second == {**first, "name": "trackio-sunset"}
    for settings in (first, second):
        assert settings["resume"] == "allow"
        assert settings["config"] == json.loads(json.dumps(settings["config"]))
        assert settings["config"]["train"]["steps"] == 3
    steps = [json.loads(line)["step"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_other_ranks_tell_nobody(made: Recipe, fakes: dict[str, Fake]) -> None:
    tell(made, LINE, rank=1)
    assert not any(fake.calls for fake in fakes.values())
    assert not Path(made.train.run, "metrics.jsonl").exists()


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_error_of_a_logger_is_told_as_its_own(
    name: str, when: str, made: Recipe, fakes: dict[str, Fake]
) -> None:
    def fail() -> None:
        fakes[name].fails = True

    if when == "init":
        fail()
    run, message = RunDirectory(made.train.run), f"{name} does not take the metrics\n.*No space"
    with pytest.raises(Environment, match=message) as caught, metrics(run, made, 0) as told:
        if when == "log":
            fail()
        told(LINE)
        fail()
    assert caught.value.exit_code == 4 and "log.to" in caught.value.facts["do"]


@pytest.mark.parametrize("name", LOGGERS)
def test_logger_that_is_not_installed_is_told_before_weights_are_read(
    name: str, smallest: Path, tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    monkeypatch.delattr(trainer_module, "load")
    with pytest.raises(Environment, match=f"{name} is not installed\n.*pip install {name}"):
        Trainer(recipe(tmp_path, source=str(smallest)))
    assert not (tmp_path / "run").exists()


def test_logger_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Usage, match=r"log\.to"):
        recipe(tmp_path, 'log.to=["tensorbord"]')


def test_file_of_names_that_is_malformed_is_told(made: Recipe, fakes: dict[str, Fake]) -> None:
    for text in ("[]", "{"):
        Path(made.train.run, "loggers.json").write_text(text)
        with pytest.raises(BadRun, match=r"loggers\.json"):
            tell(made, LINE)


@pytest.mark.slow
def test_training_tells_its_loggers_what_it_writes(
    smallest: Path, tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    made = recipe(tmp_path, "log.every=2", "data.eval_files=['{}']".format(tmp_path / "tokens.jsonl"),
                  source=str(smallest))  # fmt: skip
    train(Trainer(made), StopFlag())
    lines = [json.loads(line) for line in Path(made.train.run, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 3]
    wanted = [
        (line["step"], name, value)
        for line in lines
        for name, value in line.items()
        if name not in ("step", "load")
    ]
    for fake in fakes.values():
        assert [item for item in fake.numbers() if not item[1].startswith("load/")] == wanted
        assert len(fake.of("finish")) == 1
