"""A run's checkpoint -> a servable checkpoint, streamed: adapters are merged and weights quantized as they are written.

What was not trained is the source's own, byte for byte.  No tensor is held whole.
After train.qat routed experts come out as they were computed with, bit for bit, where the output stores them as FP4 or
BF16.  Whatever else learned is rounded to what the output stores: FP8 codes, or bfloat16, norms too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Container, Iterator, Mapping

import torch
from torch import Tensor

from dsv4ckpt import export, held, plan
from dsv4ckpt.errors import NotLossless
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

from .adapters import Delta, Place
from .loading import model_layout, surveyed
from .recipe import Recipe, Train
from .runs import Checkpoint, RunDirectory
from .simulate import fp4_weight
from .trained import Left, Trained, left_by, recipe_of


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
    left = left_by(made, config)
    options = export.options_of(
        to=to,
        names=names or (Namespace.TRANSFORMERS.value if to == "bf16" else Namespace.DEEPSEEK.value),
        source=None,
        max_shard_bytes=max_shard_bytes,
        scale_policy=scale_policy or ("fresh" if made.train.qat else "keep"),
        allow_lossy=allow_lossy,
    )
    trained = Trained(made, checkpoint, about)
    trained.require(left.tensors)
    known = export.original_of(options, Storage.BF16, like, None)
    if not allow_lossy:
        _require_measured(made, like, left.learned, options, known)
    shown = _shown(like, trained, left)
    yield plan.make_plan(survey_of(shown), options, known), shown


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


class _Shown(HeldCheckpoint):
    """A trained model that is made while it is read, of two checkpoints' files."""

    def __init__(self, like: Survey, tensors: Mapping[str, Held], trained: Trained) -> None:
        super().__init__(like, tensors, trained.stamp(like))
        self._trained = trained

    @contextlib.contextmanager
    def reader(self, whole: Collection[str] = ()) -> Iterator[Reader]:
        with self._trained.reading(), super().reader(whole) as reader:
            yield reader

    def sample_sha256(self, name: str) -> str:
        """Values alone would not tell two steps apart that differ in few of them."""
        both = super().sample_sha256(name) + self._trained.sample_sha256()
        return hashlib.sha256(both.encode()).hexdigest()


def _shown(like: Survey, trained: Trained, left: Left) -> _Shown:
    """The trained model in BF16, under released names."""
    layout = model_layout(like, Storage.BF16)
    is_lora = trained.recipe.train.what is Train.LORA
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
        elif name in left.adapted:
            rows = _merged(rows, trained, left.adapted[name], part, VALUE_DTYPES[stored.dtype])
        tensors[stored.name] = Held(stored.dtype, stored.shape, _piecewise(rows, stored.shape[-1]))
    for name in like.opaque:
        tensors[name] = held.carried(like, name)
    return _Shown(like, tensors, trained)


def _place(layout: Layout, logical: str) -> tuple[str, Part]:
    """Which tensor of the model holds a released one, and which rows of it."""
    name, _ = layout.weights[logical]
    (part,) = (part for part in layout.stored[name].parts if part.logical.name == logical)
    return name, part


def _of_run(trained: Trained, name: str, part: Part, dtype: str, *, on_grid: bool) -> Rows:
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


def _merged(base: Rows, trained: Trained, place: Place, part: Part, dtype: torch.dtype) -> Rows:
    """A weight with its adapter: the sum in float64, rounded once. It is of one matrix, so of one expert."""
    lora_A, lora_B = (f"{place.adapter_name}.lora_{side}" for side in "AB")
    rank, scale = trained.recipe.lora.rank, trained.recipe.lora.alpha / trained.recipe.lora.rank
    expert = part.begin // place.shape[-2]

    def rows(like: Like, first: int, count: int) -> Tensor:
        down = trained.rows(lora_A, expert * rank, rank)
        up = trained.rows(lora_B, part.begin + first, count)
        return held.rounded(base(like, first, count).double() + Delta(down, up, scale).rows(0, count), dtype)

    return rows
