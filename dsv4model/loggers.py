"""Lines of metrics, and who else is told: TensorBoard, Weights & Biases, trackio, where they are installed.

RUN/metrics.jsonl has it all without them.  What W&B and trackio send, and where, is for their own settings to say: they
get the recipe and the lines, and nothing else of ours.  Knows no training.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from dsv4ckpt.errors import Environment

from .optional import library
from .recipe import LOGGERS, Recipe, document_of
from .runs import RunDirectory

Tell = Callable[[Mapping[str, Any]], None]  # a line: "step", and numbers by name
_MODULES = {name: name for name in LOGGERS} | {"tensorboard": "torch.utils.tensorboard"}


class Logger(Protocol):
    """Where numbers go besides the run's own file."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def require(names: Sequence[str]) -> None:
    """raises Environment for the first that is not installed"""
    for name in names:
        _module(name)


@contextlib.contextmanager
def metrics(run: RunDirectory, made: Recipe, first: int, rank: int = 0) -> Iterator[Tell]:
    """What takes the lines of a run that goes on after step `first`. Only rank 0's are kept. raises Environment"""
    if rank:
        yield lambda line: None
        return
    run.cut_metrics(first)
    loggers = [_KINDS[name](run, made, first) for name in made.log.to]

    def tell(line: Mapping[str, Any]) -> None:
        run.add_metrics(line)
        for logger in loggers:
            logger.add(line["step"], numbers(line))

    try:
        yield tell
    finally:
        for logger in loggers:
            logger.close()


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a line but the step; {"load": {"a": 1.5}} is load/a."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif name != "step":
            found[name] = value
    return found


class _TensorBoard:
    """RUN/tensorboard. What was logged of steps that are made again is hidden."""

    def __init__(self, run: RunDirectory, made: Recipe, first: int) -> None:  # noqa: ARG002 - as the others are made
        module = _module("tensorboard")
        with _told("tensorboard"):
            self._writer = module.SummaryWriter(os.path.join(run.path, "tensorboard"), purge_step=first + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        with _told("tensorboard"):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # a process that is killed takes nothing along

    def close(self) -> None:
        with _told("tensorboard"):
            self._writer.close()


class _Tracker:
    """W&B or trackio, which are called alike. The run keeps what they know it by, to go on with the same series."""

    def __init__(self, name: str, run: RunDirectory, made: Recipe, identity: str, /, **settings: Any) -> None:
        """identity  the argument and the attribute by which a run is known"""
        self._name, self._module = name, _module(name)
        known = run.known_as()
        if name in known:
            settings[identity] = known[name]
        recipe = json.loads(json.dumps(document_of(made)))
        with _told(name):
            begun = self._module.init(project=made.log.project, config=recipe, resume="allow", **settings)
        run.keep_known_as({**known, name: getattr(begun, identity)})

    def add(self, step: int, values: Mapping[str, float]) -> None:
        with _told(self._name):
            self._module.log(dict(values), step=step)

    def close(self) -> None:
        with _told(self._name):
            self._module.finish()


def _wandb(run: RunDirectory, made: Recipe, first: int) -> Logger:  # noqa: ARG001
    """Its files go to RUN/wandb."""
    title = os.path.basename(os.path.normpath(run.path))
    return _Tracker("wandb", run, made, "id", dir=run.path, name=title, settings={"console": "off"})


def _trackio(run: RunDirectory, made: Recipe, first: int) -> Logger:  # noqa: ARG001
    return _Tracker("trackio", run, made, "name")


_KINDS: dict[str, Callable[[RunDirectory, Recipe, int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _module(name: str) -> Any:
    return library(_MODULES[name], name=name, otherwise="take it out of log.to")


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Its words stay away from stdout, which is ours; whatever it raises is an Environment error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # noqa: BLE001 - each has many of its own
        raise Environment(
            f"{name} does not take the metrics",
            found=repr(str(error).strip().partition("\n")[0][:200]),
            do=f"see its own settings, or go on without it: take it out of log.to; {_GOES_ON}",
        ) from None


_GOES_ON = "the same command continues from the last checkpoint"
