"""What a run leaves in its checkpoints: which tensors, and their values read where they stand.

A model is built on the meta device only, and no tensor is held that nobody asked for.  Knows no outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dsv4ckpt import dcp_source
from dsv4ckpt.errors import MissingFile
from dsv4ckpt.source import Reader
from dsv4ckpt.survey import Survey

from . import adapters, learning
from .adapters import Place
from .config import Config
from .model import Model
from .recipe import Recipe, Train, read_document
from .runs import MODEL, BadRun, Checkpoint, RunDirectory

_FLOATS = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


def recipe_of(run: RunDirectory) -> Recipe:
    """What a run was made by. raises MissingFile, BadRun, Usage"""
    return read_document(run.recipe())


def checkpoint_at(run: RunDirectory, step: int | None) -> Checkpoint:
    """A run's checkpoint of that step; None: the newest. raises MissingFile"""
    known = run.checkpoints()
    found = [item for item in known if step in (None, item.step)]
    if not found:
        raise MissingFile(
            "the run has no checkpoint" + (f" of step {step:,}" if step is not None else " yet"),
            file=run.path,
            found=", ".join(str(item.step) for item in known) or None,
            do="name a step that is there, or train on",
        )
    return found[-1]


class Left(NamedTuple):
    """What a run leaves in its checkpoints, besides the optimizers' state."""

    tensors: dict[str, Tensor]  # on the meta device
    learned: frozenset[str]  # names of the dense model's weights that are no longer the source's
    adapted: dict[str, Place]  # those that have adapters, in the model's order


def left_by(made: Recipe, config: Config) -> Left:
    """raises Usage for patterns that fit nothing"""
    with torch.device("meta"):
        model = Model(config)
    if made.train.what is Train.LORA:
        tensors: dict[str, Tensor] = {**adapters.attach(model, made.lora, torch.Generator())}
        adapted = {place.name: place for place in adapters.attached(model)}
        return Left(tensors, frozenset(adapted), adapted)
    state = model.state_dict()
    learners = learning.learners(model, made.train, made.loss)
    return Left(state, frozenset(state if made.model.initialize or made.model.weights else learners), {})


class Trained:
    """The tensors of a run's checkpoint. Rows are read within `reading`, each thread with files of its own."""

    def __init__(self, made: Recipe, checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
        """raises BadRun, BadDcp"""
        self.recipe, self._about = made, about
        self.checkpoint, others = dcp_source.open_tensors(checkpoint.path)
        self._local = threading.local()
        if others:
            raise BadRun(
                "it holds objects that no run leaves", file=checkpoint.path, do="take another checkpoint"
            )

    def require(self, wanted: Mapping[str, Tensor]) -> None:
        """That it holds these weights and no others. raises BadRun"""
        names = self.names()
        for name in sorted({*names, *wanted}):
            if name not in names or name not in wanted:
                _refuse(name)
            entry = self.checkpoint.tensors[MODEL + name].entry
            dtype = _FLOATS.get(entry.dtype)
            if dtype is None or dtype.is_floating_point is not wanted[name].is_floating_point():
                _refuse(name)
            if entry.shape != tuple(wanted[name].shape):
                _refuse(name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Files stay open within the block, for what this thread reads. raises SourceChanged at its end"""
        before = getattr(self._local, "reader", None)
        try:
            with self.checkpoint.reader() as self._local.reader:
                yield
        finally:
            self._local.reader = before

    def stamp(self, like: Survey) -> str:
        """Which very files are read."""
        both = self.checkpoint.stamps_sha256() + like.checkpoint.stamps_sha256()
        return hashlib.sha256(both.encode()).hexdigest()

    def sample_sha256(self) -> str:
        """Over its step, its data and pieces of its files, optimizer state included, which no step leaves alone."""
        samples = [self.checkpoint.sample_sha256(name) for name in sorted(self.checkpoint.shards)]
        return hashlib.sha256(json.dumps([self._about, samples], sort_keys=True).encode()).hexdigest()

    def names(self) -> set[str]:
        return {name.removeprefix(MODEL) for name in self.checkpoint.tensors if name.startswith(MODEL)}

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a matrix, leading dimensions flattened; a vector is one row."""
        entry = self.checkpoint.tensors[MODEL + name].entry
        dtype = _FLOATS[entry.dtype]
        width = entry.shape[-1] if entry.shape else 1
        data = bytearray(count * width * dtype.itemsize)
        reader: Reader = self._local.reader
        reader.read_into(MODEL + name, memoryview(data), first * width * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).view(count, width)

    def whole(self, name: str) -> Tensor:
        shape = self.checkpoint.tensors[MODEL + name].entry.shape
        return self.rows(name, 0, torch.Size(shape[:-1]).numel()).view(shape)


def _refuse(name: str) -> NoReturn:
    raise BadRun(
        "the checkpoint does not hold what such a run trains",
        found=repr(name)[:200],
        do="put the run's recipe.json and the source that it names back, or take another checkpoint",
    )
