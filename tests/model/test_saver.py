"""Checkpoints that are written while training goes on: the promises of those that are written at once.

The oracle is a run that writes them at once: equal tensors, equal files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dsv4ckpt.errors import Diverged, Environment, Interrupted
from dsv4ckpt.ranks import ALONE
from dsv4ckpt.stop import StopFlag
from dsv4model import runs
from dsv4model.recipe import CheckpointPart, Recipe, read_recipe
from dsv4model.runs import RunDirectory
from dsv4model.saver import Saver
from dsv4model.trainer import Step, Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
BACKGROUND = "checkpoint.background=true"
Make = Callable[..., Recipe]


@pytest.fixture
def text(smallest: Path, tmp_path: Path) -> str:
    data = tmp_path / "tokens.jsonl"
    lines = [{"input_ids": [10 + (index * 7 + at) % 50 for at in range(5 + index)]} for index in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"""
        [model]\nsource = "{smallest}"
        [train]\nrun = "{tmp_path / "run"}"\nsteps = 6\nrows = 1
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 32
        [optimizer]\nlr = 1e-3
    """


@pytest.fixture
def make(text: str, tmp_path: Path) -> Make:
    """A short run on the smallest sample, with changes."""
    return lambda *changes, run="run": read_recipe(text.encode(), [*changes, f"train.run={tmp_path / run}"])


def trained(made: Recipe, until: int | None = None) -> None:
    """To the end, or to a signal after so many steps."""
    stop = StopFlag()

    def on_step(step: Step, _: float) -> None:
        if step.step == until:
            stop.signal_number = signal.SIGTERM

    if until is None:
        train(Trainer(made), stop, on_step)
        return
    with pytest.raises(Interrupted):
        train(Trainer(made), stop, on_step)


def steps_in(made: Recipe) -> list[int]:
    return [found.step for found in RunDirectory(made.train.run).checkpoints()]


def tensors_of(made: Recipe, step: int) -> bytes:
    return Path(made.train.run, "checkpoints", f"step-{step}", "__0_0.distcp").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("until", [1, 3])
def test_run_that_saves_in_the_background_continues_to_the_same_files(make: Make, until: int) -> None:
    whole, stopped = make("checkpoint.every=2", run="whole"), make("checkpoint.every=2", BACKGROUND)
    trained(whole)
    trained(stopped, until)
    assert Path(stopped.train.run, "latest").read_text() == f"step-{until}\n"
    trained(stopped)
    assert steps_in(stopped) == steps_in(whole) == [4, 6]
    for step in (4, 6):
        assert tensors_of(stopped, step) == tensors_of(whole, step)


# ---- one write, held


class Held:
    """torch's save, which waits before it writes until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        self._save = runs.save
        monkeypatch.setattr(runs, "save", self)

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        self.begun.set()
        assert self.may.wait(60)
        self._save(*arguments, **keywords)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.may.set()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    made = RunDirectory(str(tmp_path / "run"))
    with made.locked():
        yield made


IN_BACKGROUND = CheckpointPart(background=True, keep=1)


def read(run: RunDirectory) -> list[int]:
    """The newest checkpoint's tensor."""
    found = {"a": torch.zeros(3, dtype=torch.int64)}
    run.read(run.checkpoints()[-1], found)
    return found["a"].tolist()


def test_tensors_may_change_while_they_are_written(run: RunDirectory, held: Held) -> None:
    tensors = {"a": torch.tensor([1, 2, 3])}
    with Saver(run, ALONE, IN_BACKGROUND) as saver:
        saver.save(1, tensors, {})
        assert held.begun.wait(60)
        tensors["a"].zero_()
        saver.look()
        assert run.checkpoints() == [] and not Path(run.path, "latest").exists()
        held.may.set()
    assert read(run) == [1, 2, 3]


def test_next_checkpoint_waits_for_the_one_before_it_and_the_old_one_goes(
    run: RunDirectory, held: Held
) -> None:
    with Saver(run, ALONE, IN_BACKGROUND) as saver:
        saver.save(1, {"a": torch.tensor([1, 1, 1])}, {})
        threading.Timer(0.1, held.may.set).start()
        saver.save(2, {"a": torch.tensor([2, 2, 2])}, {})
        assert 1 in [found.step for found in run.checkpoints()]
    assert [found.step for found in run.checkpoints()] == [2] and read(run) == [2, 2, 2]
    assert Path(run.path, "latest").read_text() == "step-2\n"


@pytest.mark.parametrize("when", ["next save", "next look", "join", "end", "stopped"])
def test_error_of_the_writer_is_raised_once_and_later(
    when: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "save", _full_disk)
    tensors = {"a": torch.zeros(3)}
    message = "No space left on device"
    with pytest.raises(Environment, match=message) as caught, Saver(run, ALONE, IN_BACKGROUND) as saver:
        saver.save(1, tensors, {})
        if when == "stopped":
            raise Interrupted(signal.SIGTERM)
        if when == "next save":
            saver.save(2, tensors, {})
        elif when == "join":
            saver.join()
        elif when == "next look":
            with tiny.at_most(60):
                while True:
                    saver.look()
    assert caught.value.exit_code == 4
    assert run.checkpoints() == []


def test_error_of_training_is_not_hidden_by_one_of_the_writer(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "save", _full_disk)
    with pytest.raises(Diverged), Saver(run, ALONE, IN_BACKGROUND) as saver:
        saver.save(1, {"a": torch.zeros(3)}, {})
        raise Diverged("the loss is not finite")


def test_error_of_training_waits_for_what_is_written(run: RunDirectory, held: Held) -> None:
    with pytest.raises(Diverged), Saver(run, ALONE, IN_BACKGROUND) as saver:
        saver.save(1, {"a": torch.tensor([1, 2, 3])}, {})
        threading.Timer(0.1, held.may.set).start()
        raise Diverged("the loss is not finite")
    assert read(run) == [1, 2, 3]


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


# ---- whole runs that end badly

FULL = """
import resource, signal, sys
import torch
from dsv4ckpt.errors import Environment
from dsv4ckpt.ranks import ALONE
from dsv4model.recipe import CheckpointPart
from dsv4model.runs import RunDirectory
from dsv4model.saver import Saver
run = RunDirectory(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with run.locked():
    with Saver(run, ALONE, CheckpointPart()) as saver:
        saver.save(1, {"a": torch.ones(3)}, {})
    for step, background, most_bytes in ((2, True, 500_000), (3, False, 500_000), (4, True, 0), (5, False, 0)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        try:
            with Saver(run, ALONE, CheckpointPart(background=background)) as saver:
                saver.save(step, {"a": torch.ones(500_000)}, {})
        except Environment as error:
            print(error.what, [found.step for found in run.checkpoints()], error.exit_code)
"""


@pytest.mark.slow
def test_disk_that_is_full_is_told_as_such(tmp_path: Path) -> None:
    """torch has two errors of its own for it: one if nothing fits, another if something does."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.stdout == "cannot use the run's directory: File too large [1] 4\n" * 4, done.stderr


KILLED = """
import os, signal, sys, threading
from dsv4ckpt.stop import StopFlag
from dsv4model import runs
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Trainer, train
save, half = runs.save, threading.Event()
def held(*arguments, **keywords):
    save(*arguments, **keywords)
    if half.count:
        half.set()
        threading.Event().wait()
    half.count = 1
half.count = 0
def on_step(step, seconds):
    if step.step == 5:
        half.wait()
        os.kill(os.getpid(), signal.SIGKILL)
runs.save = held
train(Trainer(read_recipe(sys.stdin.buffer.read(), sys.argv[1:])), StopFlag(), on_step)
"""


@pytest.mark.slow
def test_process_killed_while_it_writes_continues_from_the_last_whole_checkpoint(
    make: Make, text: str
) -> None:
    changes = ["checkpoint.every=2", BACKGROUND]
    whole, killed = make(*changes, run="whole"), make(*changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *changes]
    done = subprocess.run(command, input=text.encode(), env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    below = Path(killed.train.run, "checkpoints")
    assert sorted(os.listdir(below)) == [".step-4.tmp", "step-2"]
    assert (below / ".step-4.tmp" / "__0_0.distcp").stat().st_size > 0
    trained(killed)
    trained(whole)
    assert steps_in(killed) == [4, 6]
    assert tensors_of(killed, 6) == tensors_of(whole, 6)
    lines = Path(killed.train.run, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
