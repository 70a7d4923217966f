"""A run's checkpoint -> a servable checkpoint, streamed: adapters are merged and weights quantized as they are written.

What was not trained is the source's own, byte for byte.  A model is built on the meta device only, to know what such a
run leaves, and but for adapters no tensor is held whole.
After train.qat routed experts come out as they were computed with, bit for bit, where the output stores them as FP4 or
BF16.  Whatever else learned is rounded to what the output stores: FP8 codes, or bfloat16, norms too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dsv4ckpt import dcp_source, export, held, plan
from dsv4ckpt.errors import MissingFile, NotLossless
from dsv4ckpt.formats import QUANTS, Storage, Target, storage_of
from dsv4ckpt.held import VALUE_DTYPES, Held, HeldCheckpoint, Like, Rows
from dsv4ckpt.inventory import Layout, Part, lay_out
from dsv4ckpt.names import Namespace
from dsv4ckpt.original import Original
from dsv4ckpt.plan import ConvertOptions, Plan
from dsv4ckpt.roundtrip import chunks
from dsv4ckpt.source import Reader
from dsv4ckpt.survey import Survey
from dsv4ckpt.survey import survey as survey_of

from . import adapters, learning, recipe
from .adapters import Delta
from .config import Config
from .loading import model_layout, surveyed
from .model import Model
from .recipe import Recipe, Train, read_document
from .runs import BadRun, Checkpoint, RunDirectory
from .simulate import fp4_weight

_MODEL = "model."  # before the names of weights in a run's checkpoint
_A, _B = "lora_A", "lora_B"
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


@contextlib.contextmanager
def planned(
    run: RunDirectory,
    checkpoint: Checkpoint,
    *,
    to: str = "native",
    names: str | None = None,
    scale_policy: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    allow_lossy: bool = False,
) -> Iterator[tuple[Plan, HeldCheckpoint]]:
    """What is to be written, and from what; to be carried out by dsv4ckpt.run.execute within the block.

    names         None: deepseek for native and other tools' formats, else transformers
    scale_policy  None: fresh after quantization-aware training, whose values are on the grid; else keep
    raises        Usage, BadRun, BadDcp, NotConform, MissingFile: nothing was written; NotLossless for weights that
                  learned and would be quantized without measure, unless allow_lossy
    """
    made = recipe_of(run)
    about = run.about(checkpoint)
    like, config = surveyed(made.model.source)
    left = _left_by(made, config)
    options = export.options_of(
        to=to,
        names=names or (Namespace.TRANSFORMERS.value if to == "bf16" else Namespace.DEEPSEEK.value),
        source=None,
        max_shard_bytes=max_shard_bytes,
        scale_policy=scale_policy or ("fresh" if made.train.qat else "keep"),
        allow_lossy=allow_lossy,
    )
    trained = _Trained(made, checkpoint, about)
    trained.require(left.tensors)
    known = export.original_of(options, Storage.BF16, like, None)
    if not allow_lossy:
        _require_measured(made, like, left.learned, options, known)
    shown = _shown(like, trained)
    yield plan.make_plan(survey_of(shown), options, known), shown


class _Left(NamedTuple):
    """What a run leaves in its checkpoints, besides the optimizers' state."""

    tensors: dict[str, Tensor]  # on the meta device
    learned: frozenset[str]  # names of the dense model's weights that are no longer the source's


def _left_by(made: Recipe, config: Config) -> _Left:
    """raises Usage for patterns that fit nothing"""
    with torch.device("meta"):
        model = Model(config)
    state = model.state_dict()
    if made.train.what is Train.LORA:
        tensors: dict[str, Tensor] = {**adapters.attach(model, made.lora, torch.Generator())}
        return _Left(tensors, frozenset(adapters.deltas(model)))
    learning.freeze(model, made.train.freeze, optional=recipe.default_of("train.freeze"))
    return _Left(state, frozenset(state if made.model.initialize else learning.learning(model)))


def _require_measured(
    made: Recipe, like: Survey, learned: Container[str], options: ConvertOptions, known: Original | None
) -> None:
    """raises NotLossless if weights that learned would be rounded, and nothing could tell what that costs"""
    if known is not None and known.survey is not None:
        return
    quants = QUANTS[storage_of(options.target, like.identity.release.storage)]
    weights = model_layout(like, Storage.BF16).weights
    for logical in like.logicals:
        quant = quants.get(logical.kind)
        if quant is None or weights[logical.name][0] not in learned:
            continue
        if _is_on_grid(made, logical.name) and quant.codes_per_element == 2:
            continue  # nothing is rounded
        raise NotLossless(
            f"{logical.name!r} was trained, and what quantizing it would lose of that cannot be measured",
            expected="--to native, of a run that began with the checkpoint as it was released",
            found=f"--to {options.target.value}, of a run that began with {like.identity.storage.value}",
            do="--to bf16 quantizes nothing, and dsv4 convert --to native --source RELEASE measures from there; or "
            "accept the loss unmeasured: --allow-lossy"
            if options.target is Target.NATIVE
            else "--to native or --to bf16; or accept the loss unmeasured: --allow-lossy",
        )


def _is_on_grid(made: Recipe, logical: str) -> bool:
    """Whether the weight was computed with as FP4, so that it comes out as such."""
    return made.train.qat and ".experts." in logical


class _Trained:
    """The tensors of a run's checkpoint, read where they stand."""

    def __init__(self, made: Recipe, checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
        """raises BadRun, BadDcp"""
        self.recipe, self._about = made, about
        self._checkpoint, others = dcp_source.open_tensors(checkpoint.path)
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
            entry = self._checkpoint.tensors[_MODEL + name].entry
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
            with self._checkpoint.reader() as self._local.reader:
                yield
        finally:
            self._local.reader = before

    def stamp(self, like: Survey) -> str:
        """Which very files are read."""
        both = self._checkpoint.stamps_sha256() + like.checkpoint.stamps_sha256()
        return hashlib.sha256(both.encode()).hexdigest()

    def sample_sha256(self) -> str:
        """Over its step, its data and pieces of its files, optimizer state included, which no step leaves alone."""
        samples = [self._checkpoint.sample_sha256(name) for name in sorted(self._checkpoint.shards)]
        return hashlib.sha256(json.dumps([self._about, samples], sort_keys=True).encode()).hexdigest()

    def names(self) -> set[str]:
        return {name.removeprefix(_MODEL) for name in self._checkpoint.tensors if name.startswith(_MODEL)}

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a matrix, leading dimensions flattened; a vector is one row."""
        entry = self._checkpoint.tensors[_MODEL + name].entry
        dtype = _FLOATS[entry.dtype]
        width = entry.shape[-1] if entry.shape else 1
        data = bytearray(count * width * dtype.itemsize)
        reader: Reader = self._local.reader
        reader.read_into(_MODEL + name, memoryview(data), first * width * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).view(count, width)

    def whole(self, name: str) -> Tensor:
        shape = self._checkpoint.tensors[_MODEL + name].entry.shape
        return self.rows(name, 0, torch.Size(shape[:-1]).numel()).view(shape)


class _Shown(HeldCheckpoint):
    """A trained model that is made while it is read, of two checkpoints' files."""

    def __init__(self, like: Survey, tensors: Mapping[str, Held], trained: _Trained) -> None:
        super().__init__(like, tensors, trained.stamp(like))
        self._trained = trained

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        with self._trained.reading(), super().reader() as reader:
            yield reader

    def sample_sha256(self, name: str) -> str:
        """Values alone would not tell two steps apart that differ in few of them."""
        both = super().sample_sha256(name) + self._trained.sample_sha256()
        return hashlib.sha256(both.encode()).hexdigest()


def _shown(like: Survey, trained: _Trained) -> _Shown:
    """The trained model in BF16, under released names."""
    layout = model_layout(like, Storage.BF16)
    is_lora = trained.recipe.train.what is Train.LORA
    deltas = _deltas(trained) if is_lora else {}
    weights = set() if is_lora else trained.names()
    absent = [logical.name for logical in like.logicals if layout.weights[logical.name][0] not in weights]
    repeats = {} if is_lora else held.repeats(like, absent)
    table = like.identity.release.family.table
    shown = lay_out(like.logicals, table, Storage.BF16, Namespace.DEEPSEEK)
    tensors: dict[str, Held] = {}
    for stored in shown.stored.values():
        (logical,) = (part.logical for part in stored.parts)
        name, part = _place(layout, repeats.get(logical.name, logical.name))
        rows = held.from_files(logical, stored, None)
        if name in weights:
            rows = _of_run(
                trained, name, part, stored.dtype, on_grid=_is_on_grid(trained.recipe, logical.name)
            )
        elif name in deltas:
            rows = _merged(rows, deltas[name], part, VALUE_DTYPES[stored.dtype])
        tensors[stored.name] = Held(stored.dtype, stored.shape, _piecewise(rows, stored.shape[-1]))
    for name in like.opaque:
        tensors[name] = held.carried(like, name)
    return _Shown(like, tensors, trained)


def _place(layout: Layout, logical: str) -> tuple[str, Part]:
    """Which tensor of the model holds a released one, and which rows of it."""
    name, _ = layout.weights[logical]
    (part,) = (part for part in layout.stored[name].parts if part.logical.name == logical)
    return name, part


def _deltas(trained: _Trained) -> dict[str, Delta]:
    """What is added to each adapted weight, by the weight's name."""
    found = {}
    scale = trained.recipe.lora.alpha / trained.recipe.lora.rank
    with trained.reading():
        for name in sorted(trained.names()):
            owner, _, leaf = name.rpartition(".")
            if leaf == _A:
                path, _, slot = owner.rpartition(".")
                weight = "weight" if slot == "adapter" else f"{slot.removesuffix('_adapter')}_proj"
                lora_A, lora_B = trained.whole(name), trained.whole(f"{owner}.{_B}")
                found[f"{path}.{weight}"] = Delta(lora_A, lora_B, scale)
    return found


def _refuse(name: str) -> NoReturn:
    raise BadRun(
        "the checkpoint does not hold what such a run trains",
        found=repr(name)[:200],
        do="put the run's recipe.json and the source that it names back, or take another checkpoint",
    )


def _of_run(trained: _Trained, name: str, part: Part, dtype: str, *, on_grid: bool) -> Rows:
    """Rows of a weight that the run holds, or of what it was computed with."""

    def rows(_like: Like, first: int, count: int) -> Tensor:
        found = trained.rows(name, part.begin + first, count)
        return held.rounded(fp4_weight(found) if on_grid else found, VALUE_DTYPES[dtype])

    return rows


def _piecewise(rows: Rows, width: int) -> Rows:
    """The same rows, a few at a time: what makes them takes many times the memory of what it makes."""

    def in_pieces(like: Like, first: int, count: int) -> Tensor:
        made = [rows(like, first + begin, num) for begin, num in chunks(count, width, 1)]
        return torch.cat(made) if len(made) > 1 else made[0]

    return in_pieces


def _merged(base: Rows, delta: Delta, part: Part, dtype: torch.dtype) -> Rows:
    """A weight with its adapter: the sum in float64, rounded once."""

    def rows(like: Like, first: int, count: int) -> Tensor:
        added = delta.rows(part.begin + first, count)
        return held.rounded(base(like, first, count).double() + added, dtype)

    return rows
