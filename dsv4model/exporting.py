"""A run's checkpoint -> a servable checkpoint, streamed: adapters are merged and weights quantized as they are written.

What was not trained is the source's own, byte for byte.  No model is built, and no tensor is held whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from dsv4ckpt import dcp_source, export, held, plan
from dsv4ckpt.errors import MissingFile
from dsv4ckpt.formats import Storage
from dsv4ckpt.held import VALUE_DTYPES, Held, HeldCheckpoint, Like, Rows
from dsv4ckpt.inventory import Layout, Part, lay_out
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import Plan
from dsv4ckpt.source import Reader
from dsv4ckpt.survey import Survey
from dsv4ckpt.survey import survey as survey_of

from .adapters import Delta
from .loading import model_layout, surveyed
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
    """What is to be written, and from what; to be carried out by dsv4ckpt.export.write within the block.

    names         None: deepseek for native and other tools' formats, else transformers
    scale_policy  None: fresh after quantization-aware training, whose values are on the grid; else keep
    raises        Usage, BadRun, BadDcp, NotConform, MissingFile: nothing was written
    """
    made = recipe_of(run)
    run.about(checkpoint)
    like, _ = surveyed(made.model.source)
    options = export.options_of(
        to=to,
        names=names or (Namespace.TRANSFORMERS.value if to == "bf16" else Namespace.DEEPSEEK.value),
        source=None,
        max_shard_bytes=max_shard_bytes,
        scale_policy=scale_policy or ("fresh" if made.train.qat else "keep"),
        allow_lossy=allow_lossy,
    )
    with _Trained(made, checkpoint).reading() as trained:
        shown = _shown(like, trained)
        known = export.original_of(options, Storage.BF16, like, None)
        yield plan.make_plan(survey_of(shown), options, known), shown


class _Trained:
    """The tensors of a run's checkpoint, read where they stand."""

    def __init__(self, made: Recipe, checkpoint: Checkpoint) -> None:
        self.recipe = made
        self._checkpoint, others = dcp_source.open_tensors(checkpoint.path)
        self._path = checkpoint.path
        self._local, self._stack, self._lock = threading.local(), contextlib.ExitStack(), threading.Lock()
        if others:
            raise BadRun(
                "it holds objects that no run leaves", file=checkpoint.path, do="take another checkpoint"
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[_Trained]:
        """Files stay open within the block, for each thread that reads."""
        with self._stack:
            yield self

    def __contains__(self, name: str) -> bool:
        return _MODEL + name in self._checkpoint.tensors

    def stamp(self, like: Survey) -> str:
        """Which very files are read."""
        both = self._checkpoint.stamps_sha256() + like.checkpoint.stamps_sha256()
        return hashlib.sha256(both.encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.tensors[_MODEL + name].entry.shape

    def names(self) -> list[str]:
        return [name.removeprefix(_MODEL) for name in self._checkpoint.tensors if name.startswith(_MODEL)]

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a matrix, leading dimensions flattened; a vector is one row."""
        entry = self._checkpoint.tensors[_MODEL + name].entry
        dtype = _FLOATS[entry.dtype]
        width = entry.shape[-1] if entry.shape else 1
        data = bytearray(count * width * dtype.itemsize)
        self._reader().read_into(_MODEL + name, memoryview(data), first * width * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).view(count, width)

    def whole(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, torch.Size(shape[:-1]).numel()).view(shape)

    def _reader(self) -> Reader:
        found: Reader | None = getattr(self._local, "reader", None)
        if found is None:
            with self._lock:
                found = self._stack.enter_context(self._checkpoint.reader())
            self._local.reader = found
        return found


def _shown(like: Survey, trained: _Trained) -> HeldCheckpoint:
    """The trained model in BF16, under released names. raises BadRun"""
    layout = model_layout(like, Storage.BF16)
    is_lora = trained.recipe.train.what is Train.LORA
    deltas = _deltas(trained, layout) if is_lora else {}
    weights = set() if is_lora else _weights(trained, layout)
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
            rows = _of_run(trained, name, part, stored.dtype, is_expert=".experts." in logical.name)
        elif name in deltas:
            rows = _merged(rows, deltas[name], part, VALUE_DTYPES[stored.dtype])
        tensors[stored.name] = Held(stored.dtype, stored.shape, rows)
    for name in like.opaque:
        tensors[name] = held.carried(like, name)
    return HeldCheckpoint(like, tensors, trained.stamp(like))


def _place(layout: Layout, logical: str) -> tuple[str, Part]:
    """Which tensor of the model holds a released one, and which rows of it."""
    name, _ = layout.weights[logical]
    (part,) = (part for part in layout.stored[name].parts if part.logical.name == logical)
    return name, part


def _weights(trained: _Trained, layout: Layout) -> set[str]:
    """Names of the model's tensors, all of the shape that they must have. raises BadRun"""
    names = set(trained.names())
    wrong = [
        name
        for name in names
        if name not in layout.stored or trained.shape(name) != layout.stored[name].shape
    ]
    if wrong or not names:
        _refuse(sorted(wrong)[0] if wrong else "nothing")
    return names


def _deltas(trained: _Trained, layout: Layout) -> dict[str, Delta]:
    """What is added to each adapted weight, by the weight's name. raises BadRun"""
    found = {}
    names = set(trained.names())
    scale = trained.recipe.lora.alpha / trained.recipe.lora.rank
    for name in sorted(names):
        if not name.endswith(f".{_A}"):
            continue
        owner = name.removesuffix(f".{_A}")
        path, _, slot = owner.rpartition(".")
        weight = f"{path}.weight" if slot == "adapter" else f"{path}.{slot.removesuffix('_adapter')}_proj"
        twin = f"{owner}.{_B}"
        if twin not in names or weight not in layout.stored:
            _refuse(name)
        lora_A, lora_B = trained.whole(name), trained.whole(twin)
        if (*lora_A.shape[:-2], lora_B.shape[-2], lora_A.shape[-1]) != layout.stored[weight].shape:
            _refuse(name)
        names -= {name, twin}
        found[weight] = Delta(lora_A, lora_B, scale)
    if names or not found:
        _refuse(min(names, default="nothing"))
    return found


def _refuse(name: str) -> NoReturn:
    raise BadRun(
        "the checkpoint does not hold what such a run trains",
        found=repr(name)[:200],
        do="put the run's recipe.json and the source that it names back, or take another checkpoint",
    )


def _of_run(trained: _Trained, name: str, part: Part, dtype: str, *, is_expert: bool) -> Rows:
    """Rows of a weight that the run holds; after quantization-aware training, experts as they were computed with."""
    on_grid = is_expert and trained.recipe.train.qat

    def rows(_like: Like, first: int, count: int) -> Tensor:
        found = trained.rows(name, part.begin + first, count)
        return held.rounded(fp4_weight(found) if on_grid else found, VALUE_DTYPES[dtype])

    return rows


def _merged(base: Rows, delta: Delta, part: Part, dtype: torch.dtype) -> Rows:
    """A weight with its adapter: the sum in float64, rounded once."""

    def rows(like: Like, first: int, count: int) -> Tensor:
        added = delta.rows(part.begin + first, count)
        return held.rounded(base(like, first, count).double() + added, dtype)

    return rows
