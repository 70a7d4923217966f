"""Headers and options -> Plan: what will be written, byte for byte, before a byte of data is read.

A Plan is a value: every output file with its exact header and size, every step with its inputs, every input that is
left out and why.  From it come the dry run, the space check, the progress total, the resume key and the conservation
law: every input tensor is used exactly once or named as dropped, every expected output is produced exactly once.
Knows no time, no workers, no torch; opens no data.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from . import __version__, formats, shard, strictjson
from . import config as configs
from .errors import NotConform, Usage
from .formats import CONFIG_NAME, INDEX_NAME, Block, Shape, Storage
from .inventory import Logical, Stored, lay_out, shard_groups
from .names import Namespace
from .source import Checkpoint, SmallFile
from .survey import Survey

_METADATA = {"format": "pt"}  # what loaders look for
_SPACE_MARGIN = 64 * 1024 * 1024  # bytes kept free beyond the output itself


class Op(StrEnum):
    """How stored bytes become output bytes."""

    COPY = "copy"
    FP4 = "fp4"
    FP8 = "fp8"


_GROWTH = {Op.COPY: 1, Op.FP4: 4, Op.FP8: 2}  # output bytes for each stored byte


class Step(NamedTuple):
    """Rows [begin, begin + rows) of one stored tensor, leading dimensions flattened, become output bytes.

    scale is None for COPY, and for FP8 whose scales the user declared to be 1.
    """

    op: Op
    name: str  # the logical tensor, for messages
    source: str
    begin: int
    rows: int
    row_bytes: int
    scale: str | None = None
    scale_begin: int = 0
    scale_row_bytes: int = 0
    scale_dtype: str = ""
    block: Block = Block(1, 1)


class PlannedTensor(NamedTuple):
    """One output tensor: its steps' results one after the other."""

    name: str
    dtype: str
    shape: Shape
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class PlannedFile:
    """One output shard."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @functools.cached_property
    def header(self) -> bytes:
        return shard.encode_header(((t.name, t.dtype, t.shape) for t in self.tensors), _METADATA)

    @functools.cached_property
    def size(self) -> int:
        return len(self.header) + sum(formats.stored_bytes(t.dtype, t.shape) for t in self.tensors)


class Dropped(NamedTuple):
    """An input tensor that is left out."""

    name: str
    reason: str
    size: int


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What the output is to be. Every field changes bytes, so every field is part of the plan's hash."""

    target: Storage = Storage.BF16
    namespace: Namespace = Namespace.DEEPSEEK
    layers: tuple[int, ...] | None = None  # ascending source layers; None: all
    keep_mtp: bool = True
    max_shard_bytes: int = (
        5 * 10**9
    )  # Hub tools split here by default; one tensor may exceed it, alone in its shard
    allow_nan: frozenset[str] = frozenset()  # released names of tensors whose NaN or infinities are accepted
    unit_scales: frozenset[str] = frozenset()  # released names of FP8 weights that are stored without scales


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    options: ConvertOptions
    release: str
    storage: Storage  # of the source
    source: tuple[tuple[str, int, str], ...]  # (file, size, SHA-256 of its header)
    files: tuple[PlannedFile, ...]
    written: dict[str, bytes]  # files that we make: config and index
    copied: tuple[tuple[str, int, str], ...]  # small files of the source: (name, size, SHA-256)
    left: tuple[SmallFile, ...]  # small files that are not carried
    dropped: tuple[Dropped, ...]
    opaque: tuple[str, ...]  # input tensors carried byte for byte without being interpreted
    num_unchanged: int = field(default=0)  # output tensors whose bytes are copied

    @functools.cached_property
    def shard_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Size of the finished directory without its manifest."""
        return (
            self.shard_bytes + sum(map(len, self.written.values())) + sum(size for _, size, _ in self.copied)
        )

    @property
    def num_tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)

    @functools.cached_property
    def sha256(self) -> str:
        """The resume key: equal plans give equal bytes."""
        return hashlib.sha256(strictjson.canonical(self.document())).hexdigest()

    def document(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "tool": f"dsv4ckpt {__version__}",
            "release": self.release,
            "source": [list(item) for item in self.source],
            "options": self.describe_options(),
            "files": [
                {
                    "file": file.name,
                    "size": file.size,
                    "header_sha256": hashlib.sha256(file.header).hexdigest(),
                    "steps": [list(step) for tensor in file.tensors for step in tensor.steps],
                }
                for file in self.files
            ],
            "written": {name: hashlib.sha256(data).hexdigest() for name, data in self.written.items()},
            "copied": [list(item) for item in self.copied],
            "dropped": [list(item) for item in self.dropped],
        }

    def describe_options(self) -> dict[str, Any]:
        options = self.options
        return {
            "to": options.target.value,
            "names": options.namespace.value,
            "layers": None if options.layers is None else list(options.layers),
            "mtp": "keep" if options.keep_mtp else "drop",
            "max_shard_bytes": options.max_shard_bytes,
            "allow_nan": sorted(options.allow_nan),
            "unit_scale": sorted(options.unit_scales),
        }


def space_needed(remaining_bytes: int) -> int:
    """Free bytes that a run asks for before it starts."""
    return remaining_bytes + _SPACE_MARGIN


def make_plan(survey: Survey, options: ConvertOptions) -> Plan:
    """Plan a conversion.

    raises  NotConform and its kin if the source is not what its config asks for, Usage for options that do not fit
    """
    survey.require_conform()
    if options.target is not Storage.BF16:
        raise Usage(f"{options.target} cannot be written yet", expected=Storage.BF16)
    layers = _selected_layers(survey, options)
    _require_known_names(survey, options)
    kept, dropped_logicals = _select(survey, layers, options)
    target = lay_out(
        [renamed for _, renamed in kept],
        survey.identity.release.family.table,
        options.target,
        options.namespace,
    )
    origin = {renamed.name: source for source, renamed in kept}
    groups = [[_planned(survey, stored, origin) for stored in group] for group in shard_groups(target)]
    groups.append([_carried(survey.checkpoint, name) for name in survey.opaque])
    files = _split(groups, options.max_shard_bytes)
    dropped = _dropped(survey, dropped_logicals)
    document = configs.for_subset(survey.document, layers, keep_mtp=options.keep_mtp)
    small = survey.checkpoint.small_files()
    plan = Plan(
        options=options,
        release=survey.identity.release.name,
        storage=survey.identity.storage,
        source=tuple(
            (item.name, item.stamp.size, item.header.sha256) for item in survey.checkpoint.shards.values()
        ),
        files=files,
        written={
            CONFIG_NAME: strictjson.pretty(configs.for_bf16(document)),
            INDEX_NAME: index_bytes((file.name, file.tensors) for file in files),
        },
        copied=tuple(_hashed(survey.checkpoint, item) for item in small if item.left is None),
        left=tuple(item for item in small if item.left is not None),
        dropped=tuple(dropped),
        opaque=tuple(survey.opaque),
        num_unchanged=sum(
            all(step.op is Op.COPY for step in tensor.steps) for file in files for tensor in file.tensors
        ),
    )
    _require_conservation(survey, plan)
    return plan


def _selected_layers(survey: Survey, options: ConvertOptions) -> tuple[int, ...]:
    every = tuple(range(survey.model.num_layers))
    layers = every if options.layers is None else options.layers
    beyond = [layer for layer in layers if layer not in every]
    if beyond or not layers or list(layers) != sorted(set(layers)):
        raise Usage(
            f"there is no layer {beyond[0]}" if beyond else "layers must be named once, in ascending order",
            expected=f"layers 0 to {len(every) - 1}",
            do="dsv4 inspect tells how many layers there are",
        )
    return layers


def _require_known_names(survey: Survey, options: ConvertOptions) -> None:
    known = {logical.name for logical in survey.logicals} | set(survey.opaque)
    for flag, given in (("--allow-nan", options.allow_nan), ("--unit-scale", options.unit_scales)):
        for name in sorted(given - known):
            raise Usage(
                f"{flag} {name!r} names no tensor of this release",
                do="use the released name of the weight, such as layers.0.attn.wq_a.weight",
            )


def _select(
    survey: Survey, layers: tuple[int, ...], options: ConvertOptions
) -> tuple[list[tuple[Logical, Logical]], list[Logical]]:
    """(source logical, its renumbered twin) for what is kept; what is not."""
    number = {layer: index for index, layer in enumerate(layers)}
    kept, dropped = [], []
    for logical in survey.logicals:
        head, _, rest = logical.name.partition(".")
        if head == "layers":
            layer, _, inner = rest.partition(".")
            if int(layer) in number:
                kept.append((logical, logical._replace(name=f"layers.{number[int(layer)]}.{inner}")))
                continue
        elif head != "mtp" or options.keep_mtp:
            kept.append((logical, logical))
            continue
        dropped.append(logical)
    return kept, dropped


def _dropped(survey: Survey, logicals: list[Logical]) -> list[Dropped]:
    layout, tensors = survey.layout, survey.checkpoint.tensors
    reasons: dict[str, str] = {}
    for logical in logicals:
        reason = "--mtp drop" if logical.name.startswith("mtp.") else "--layers"
        for where in (layout.weights, layout.scales):
            if logical.name in where and where[logical.name][0] in tensors:
                reasons[where[logical.name][0]] = reason
    found = []
    for name, reason in sorted(reasons.items()):
        entry = tensors[name].entry
        found.append(Dropped(name, reason, entry.end - entry.begin))
    return found


def _planned(survey: Survey, stored: Stored, origin: dict[str, Logical]) -> PlannedTensor:
    steps = tuple(_step(survey, origin[part.logical.name]) for part in stored.parts)
    return PlannedTensor(stored.name, stored.dtype, stored.shape, steps)


def _step(survey: Survey, logical: Logical) -> Step:
    """The step that makes the BF16 form of one logical tensor from the way the source stores it."""
    layout = survey.layout
    source, index = layout.weights[logical.name]
    part = layout.stored[source].parts[index]
    dtype, shape = layout.stored[source].dtype, layout.stored[source].shape
    row_bytes = formats.stored_bytes(dtype, shape[-1:] if len(shape) > 1 else shape)
    quant = layout.quant(logical)
    if quant is None:
        return Step(Op.COPY, logical.name, source, part.begin, part.rows, row_bytes)
    op = Op.FP4 if quant.codes_per_element == 2 else Op.FP8
    scale, scale_index = layout.scales[logical.name]
    if scale not in survey.checkpoint.tensors:
        return Step(op, logical.name, source, part.begin, part.rows, row_bytes, block=quant.block)
    scale_part = layout.stored[scale].parts[scale_index]
    return Step(
        op,
        logical.name,
        source,
        part.begin,
        part.rows,
        row_bytes,
        scale,
        scale_part.begin,
        formats.stored_bytes(quant.scale, layout.stored[scale].shape[-1:]),
        quant.scale,
        quant.block,
    )


def _carried(checkpoint: Checkpoint, name: str) -> PlannedTensor:
    entry = checkpoint.tensors[name].entry
    step = Step(Op.COPY, name, name, 0, 1, entry.end - entry.begin)
    return PlannedTensor(name, entry.dtype, entry.shape, (step,))


def _split(groups: list[list[PlannedTensor]], max_shard_bytes: int) -> tuple[PlannedFile, ...]:
    """Fill shards in order; a tensor larger than the limit stands alone."""
    shards: list[list[PlannedTensor]] = []
    for group in groups:
        # widest dtype first, so that every tensor starts at a multiple of its element
        ordered = sorted(group, key=lambda tensor: -formats.DTYPE_BITS[tensor.dtype])
        size = max_shard_bytes + 1
        for tensor in ordered:
            added = formats.stored_bytes(tensor.dtype, tensor.shape)
            if size + added > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += added
    count = len(shards)
    return tuple(
        PlannedFile(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(tensors))
        for number, tensors in enumerate(shards, 1)
    )


class _Described(Protocol):
    """Anything with the name, dtype and shape of a stored tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


def index_bytes(files: Iterable[tuple[str, Sequence[_Described]]]) -> bytes:
    """model.safetensors.index.json for (file name, its tensors)."""
    weight_map, total = {}, 0
    for file, tensors in files:
        for tensor in tensors:
            weight_map[tensor.name] = file
            total += formats.stored_bytes(tensor.dtype, tensor.shape)
    return strictjson.pretty(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _hashed(checkpoint: Checkpoint, item: SmallFile) -> tuple[str, int, str]:
    data = checkpoint.read_small(item.name)
    return item.name, len(data), hashlib.sha256(data).hexdigest()


def _require_conservation(survey: Survey, plan: Plan) -> None:
    """Every input row once, or dropped by name; every output once, and filled.

    A failure here is our bug, caught before a byte is written.
    """
    tensors = survey.checkpoint.tensors
    made = [tensor for file in plan.files for tensor in file.tensors]
    if len({tensor.name for tensor in made}) != len(made):
        raise NotConform("two outputs would have one name", do="please report this")
    for tensor in made:
        size = sum(step.rows * step.row_bytes * _GROWTH[step.op] for step in tensor.steps)
        if size != formats.stored_bytes(tensor.dtype, tensor.shape):
            raise NotConform(f"tensor {tensor.name!r} would not be filled", do="please report this")
    uses: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}
    for file in plan.files:
        for tensor in file.tensors:
            for step in tensor.steps:
                uses[step.source].append((step.begin, step.rows))
                if step.scale:
                    rows = formats.ceil_div(step.rows, step.block.rows)
                    uses[step.scale].append((step.scale_begin, rows))
    for item in plan.dropped:
        uses[item.name].append((0, _num_rows(tensors[item.name].entry.shape)))
    for name, ranges in uses.items():
        position = 0
        for begin, rows in sorted(ranges):
            if begin != position:
                position = -1
                break
            position += rows
        expected = 1 if name in survey.opaque else _num_rows(tensors[name].entry.shape)
        if position != expected:
            raise NotConform(f"tensor {name!r} would not be used exactly once", do="please report this")


def _num_rows(shape: Shape) -> int:
    return formats.num_elements(shape[:-1]) if len(shape) > 1 else 1
