"""Headers and options -> Plan: what will be written, byte for byte, before a byte of data is read.

A Plan is a value: every output file with its exact header and size, every step with its inputs, every input that is
left out and why.  From it come the dry run, the space check, the progress total, the resume key and the conservation
law: every input tensor is used exactly once or named as dropped, every expected output is produced exactly once.
Knows no time, no workers, no torch; opens no data.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from . import __version__, formats, strictjson
from . import config as configs
from .dcp_layout import dcp_files, dcp_metadata
from .errors import NotConform, Usage
from .formats import CONFIG_NAME, DCP_METADATA_NAME, INDEX_NAME, Kind, Shape, Spelling, Storage, Target
from .inventory import Layout, Logical, Stored, lay_out, shard_groups
from .names import Experts, Namespace
from .original import Original, remember
from .release import shipped_config
from .sidecar import Remembered
from .source import Checkpoint, SmallFile
from .steps import Op, PlannedFile, PlannedTensor, Step, StepMaker, carried
from .survey import Survey

_MODELOPT_CONFIG = "hf_quant_config.json"


class Dropped(NamedTuple):
    """An input tensor that is left out."""

    name: str
    reason: str
    size: int


class ScalePolicy(StrEnum):
    """Which scales blocks get whose values changed."""

    KEEP = "keep"  # the source's while it fits, else the best of its neighbours
    FRESH = "fresh"  # what DeepSeek's quantizer would choose


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What the output is to be. Every field that changes bytes is part of the plan's hash."""

    target: Target = Target.BF16
    namespace: Namespace = Namespace.DEEPSEEK
    layers: tuple[int, ...] | None = None  # ascending source layers; None: all
    keep_mtp: bool = True
    max_shard_bytes: int = (
        5 * 10**9
    )  # Hub tools split here by default; one tensor may exceed it, alone in its shard
    allow_nan: frozenset[str] = frozenset()  # released names of tensors whose NaN or infinities are accepted
    unit_scales: frozenset[str] = frozenset()  # released names of FP8 weights that are stored without scales
    scale_policy: ScalePolicy = ScalePolicy.KEEP  # of blocks whose values changed
    input_scales: Mapping[str, float] | None = None  # NVFP4: tensor name -> activation scale; None: all are 1
    allow_lossy: bool = False  # accept that values change
    experts: Experts = Experts.FUSED  # of the transformers namespace
    chunk_bytes: int | None = None  # set: a torch DCP directory, in chunks of at most so many bytes
    as_stored: bool = False  # DCP: codes and scales stay as the source has them


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    options: ConvertOptions
    release: str
    storage: Storage  # of the source
    target: Storage
    source: tuple[tuple[str, int, str], ...]  # (file, size, SHA-256 of its header)
    files: tuple[PlannedFile, ...]
    written: dict[str, bytes]  # files that we make: config and index
    copied: tuple[tuple[str, int, str], ...]  # small files of the source: (name, size, SHA-256)
    left: tuple[SmallFile, ...]  # small files that are not carried
    dropped: tuple[Dropped, ...]
    opaque: tuple[str, ...]  # input tensors carried byte for byte without being interpreted
    layout: str  # whose shards the output has, in words
    remembered: Remembered | None = None  # what the sidecar is to say; None: no sidecar is written
    carries_sidecar: bool = False  # the source's own sidecar holds for the output too
    original: Original | None = None  # the release that values are compared with
    borrowed: tuple[str, ...] = ()  # draft tensors that the source lacks, and the release gives
    num_unchanged: int = field(default=0)  # output tensors whose bytes are copied

    @functools.cached_property
    def shard_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Size of the finished directory without its manifest and sidecar."""
        return (
            self.shard_bytes + sum(map(len, self.written.values())) + sum(size for _, size, _ in self.copied)
        )

    @property
    def num_tensors(self) -> int:
        return len({tensor.name for file in self.files for tensor in file.tensors})

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
            "layout": self.layout,
            "sidecar": "written" if self.remembered else "carried" if self.carries_sidecar else None,
            "original": self.original.identity if self.original else None,
        }

    def describe_options(self) -> dict[str, Any]:
        """What changes bytes; --allow-lossy only permits."""
        options = self.options
        return {
            "to": options.target.value,
            "names": options.namespace.value,
            "experts": options.experts.value,
            "chunk_bytes": options.chunk_bytes,
            "as_stored": options.as_stored,
            "layers": None if options.layers is None else list(options.layers),
            "mtp": "keep" if options.keep_mtp else "drop",
            "max_shard_bytes": options.max_shard_bytes,
            "allow_nan": sorted(options.allow_nan),
            "unit_scale": sorted(options.unit_scales),
            "scale_policy": options.scale_policy.value,
            "input_scales": None
            if options.input_scales is None
            else dict(sorted(options.input_scales.items())),
        }


def make_plan(survey: Survey, options: ConvertOptions, original: Original | None = None) -> Plan:
    """Plan a conversion.

    original  the release that the source was made from: its sidecar or its files; untouched values get its bytes back
    raises    NotConform and its kin if the source is not what its config asks for, Usage for options that do not fit,
              BadSidecar or NotConform for an original of another checkpoint
    """
    identity = survey.identity
    storage = formats.storage_of(options.target, identity.release.storage)
    if options.as_stored:
        storage = identity.storage
    borrowed = _borrowed(survey, options, original)
    survey.require_conform(excused=borrowed)
    _require_possible(survey, options, storage)
    layers = _selected_layers(survey, options)
    _require_known_names(survey, options)
    kept, dropped_logicals = _select(survey, layers, options)
    target = lay_out(
        [renamed for _, renamed in kept],
        identity.release.family.table,
        storage,
        options.namespace,
        options.experts,
    )
    original = original if storage is identity.release.storage else None
    if original:
        _leave_out_absent_scales(original, target)
        _require_kin(original, survey, target)
    maker = StepMaker(
        survey,
        target,
        {renamed.name: source for source, renamed in kept},
        input_scales=options.input_scales,
        allow_lossy=options.allow_lossy,
        released=original.survey if original and borrowed else None,
    )
    if options.chunk_bytes:
        files = dcp_files(
            maker, shard_groups(target), survey.opaque, options.chunk_bytes, options.max_shard_bytes
        )
    else:
        files = _files(maker, original, options.max_shard_bytes)
    _require_used_scales(options, target)
    dropped = _dropped(survey, dropped_logicals)
    document = configs.for_subset(survey.document, layers, keep_mtp=options.keep_mtp)
    released = original is not None and files[0].released_header is not None
    small = [item for item in survey.checkpoint.small_files() if _is_wanted(item)]
    small += [
        SmallFile(f"{CONFIG_NAME}: {key}", 0, "names code to run")
        for key in configs.code_keys(survey.document)
    ]
    identities = tuple(
        (item.name, item.stamp.size, item.header.sha256) for item in survey.checkpoint.shards.values()
    )
    written = _written(survey, storage, document, files, original if released else None)
    if options.chunk_bytes:
        del written[INDEX_NAME]
        written[DCP_METADATA_NAME] = dcp_metadata(files, identities)
    plan = Plan(
        options=options,
        release=identity.release.name,
        storage=identity.storage,
        target=storage,
        source=identities,
        files=files,
        written=written,
        copied=tuple(_hashed(survey.checkpoint, item) for item in small if item.left is None),
        left=tuple(item for item in small if item.left is not None),
        dropped=tuple(dropped),
        opaque=tuple(survey.opaque),
        layout="as released" if released else f"shards of at most {options.max_shard_bytes:,} bytes",
        remembered=None if options.chunk_bytes else _remembered(survey, storage, dropped),
        carries_sidecar=_sidecar_holds(survey, storage, files, dropped),
        original=original,
        borrowed=tuple(sorted(borrowed)),
        num_unchanged=len(
            {
                tensor.name
                for file in files
                for tensor in file.tensors
                if tensor.steps and all(step.op is Op.COPY for step in tensor.steps)
            }
        ),
    )
    _require_conservation(survey, plan)
    return plan


def _borrowed(survey: Survey, options: ConvertOptions, original: Original | None) -> frozenset[str]:
    """Draft stages that a trainer dropped come back from the release: the missing tensors, if all of them are."""
    if (
        original is None
        or original.survey is None
        or options.target is not Target.NATIVE
        or not options.keep_mtp
    ):
        return frozenset()
    drafts = {name for name in survey.layout.stored if name.startswith("mtp.")}
    missing = {item.name for item in survey.deviations if item.problem == "missing"}
    all_gone = drafts and drafts <= missing and options.namespace is Namespace.DEEPSEEK
    return frozenset(drafts) if all_gone else frozenset()


def _require_possible(survey: Survey, options: ConvertOptions, storage: Storage) -> None:
    if options.namespace is not Namespace.DEEPSEEK and not formats.fits_any_namespace(storage):
        raise Usage(
            f"{storage.value} goes with the released names: its readers know no others",
            expected="--names deepseek",
            do="leave --names out",
        )
    expert = formats.QUANTS[survey.identity.release.storage][Kind.EXPERT]
    needs_fp4 = options.target in (Target.NVFP4, Target.MXFP4_CT)
    if needs_fp4 and expert.codes_per_element == 1 and not options.allow_lossy:
        raise Usage(
            f"{options.target} stores experts as FP4, and {survey.identity.release.name} has them as FP8: "
            "most values would be rounded",
            do="choose --to fp8 or --to fp8-f32scale, or accept the loss with --allow-lossy",
        )
    if options.input_scales is not None and options.target is not Target.NVFP4:
        raise Usage("--input-scales goes with --to nvfp4 only", do="leave it out")
    for name, value in (options.input_scales or {}).items():
        head, _, inner = name.rpartition(".w")
        twin = f"{head}.w{'3' if inner.startswith('1.') else '1'}.input_scale"
        if (
            inner in ("1.input_scale", "3.input_scale")
            and options.input_scales
            and options.input_scales.get(twin) != value
        ):
            raise Usage(
                f"--input-scales gives {name!r} and {twin!r} different numbers",
                do="give both the same: w1 and w3 share one scale",
            )


def _require_used_scales(options: ConvertOptions, target: Layout) -> None:
    for name in sorted((options.input_scales or {}).keys() - target.stored.keys()):
        raise Usage(f"--input-scales names {name!r}, which the output does not have", do="check the spelling")


def _leave_out_absent_scales(original: Original, target: Layout) -> None:
    """A release may lack the scales of a matrix (--unit-scale): so does what is made of it."""
    names = {name for _, _, entries in original.files for name in entries}
    for stored in [*target.stored.values()]:
        weights = [part.logical.name for part in stored.parts]
        scales = [name.removesuffix("weight") + "scale" for name in weights]  # both by their released names
        if stored.leaf == "scale" and names.issuperset(weights) and names.isdisjoint(scales):
            del target.stored[stored.name]


def _require_kin(original: Original, survey: Survey, target: Layout) -> None:
    """raises BadSidecar or NotConform if these values cannot have come from that release"""
    identity = survey.identity
    for what, mine, theirs in (
        ("release", identity.release.name, original.remembered.release),
        ("storage", identity.release.storage.value, original.remembered.storage),
    ):
        if mine != theirs:
            raise original.refuse(f"another {what}", expected=mine, found=repr(theirs)[:80])
    entries = {name: entry for _, _, found in original.files for name, entry in found.items()}
    if target.namespace is not Namespace.DEEPSEEK:
        return
    for stored in target.stored.values():
        entry = entries.get(stored.name)
        if entry is None:
            raise original.refuse(f"it has no tensor {stored.name!r}")
        if entry is not None and (entry.dtype, entry.shape) != (stored.dtype, stored.shape):
            raise original.refuse(
                f"tensor {stored.name!r} differs",
                expected=f"{stored.dtype} {list(stored.shape)}",
                found=f"{entry.dtype} {list(entry.shape)}",
            )
    for name in survey.opaque:
        if name not in entries:
            raise original.refuse(f"it has no tensor {name!r}")


def _is_wanted(item: SmallFile) -> bool:
    """hf_quant_config.json describes ModelOpt's storage only, and is made anew for it."""
    return item.name != _MODELOPT_CONFIG or item.left is not None


def _written(
    survey: Survey,
    storage: Storage,
    document: dict[str, Any],
    files: tuple[PlannedFile, ...],
    released: Original | None,
) -> dict[str, bytes]:
    """config.json, the index, and what else a storage format asks for; the released ones where they still hold."""
    if released and configs.for_bf16(released.config) == configs.for_bf16(document):
        written = {CONFIG_NAME: released.remembered.config}
        made = released.config
    else:
        shipped = released.config if released else shipped_config(survey.identity.release.name)
        made = configs.for_storage(document, storage, shipped)
        written = {CONFIG_NAME: strictjson.pretty(made)}
    if released is None:
        written[INDEX_NAME] = index_bytes((file.name, file.tensors) for file in files)
    elif released.remembered.weight_map is not None:  # a single file needs none
        written[INDEX_NAME] = released.remembered.weight_map
    if formats.QUANTS[storage] and formats.QUANTS[storage][Kind.EXPERT].spelling is Spelling.MODELOPT:
        written[_MODELOPT_CONFIG] = strictjson.pretty(configs.hf_quant_config(made))
    return written


def _remembered(survey: Survey, storage: Storage, dropped: list[Dropped]) -> Remembered | None:
    """What a sidecar is to say: a whole released checkpoint becomes something else."""
    identity = survey.identity
    if identity.storage is not identity.release.storage or storage is identity.storage or dropped:
        return None
    if not survey.checkpoint.is_safetensors:
        return None
    return remember(survey)


def _sidecar_holds(
    survey: Survey, storage: Storage, files: tuple[PlannedFile, ...], dropped: list[Dropped]
) -> bool:
    """Whether the source's sidecar, if it has one, describes the output as well: the same bytes under other names."""
    if survey.identity.storage is survey.identity.release.storage or dropped:
        return False
    copied = all(step.op is Op.COPY for file in files for tensor in file.tensors for step in tensor.steps)
    return copied and survey.checkpoint.has_sidecar and storage is not survey.identity.release.storage


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
        for where in (layout.weights, layout.scales, *layout.per_tensor.values()):
            if logical.name in where and where[logical.name][0] in tensors:
                reasons[where[logical.name][0]] = reason
    found = []
    for name, reason in sorted(reasons.items()):
        entry = tensors[name].entry
        found.append(Dropped(name, reason, entry.end - entry.begin))
    return found


def _files(maker: StepMaker, original: Original | None, max_shard_bytes: int) -> tuple[PlannedFile, ...]:
    """The output shards: laid out as the release had them if all of it is there, else by size."""
    survey, target = maker.survey, maker.target
    opaque = {name: carried(survey.checkpoint, name) for name in survey.opaque}
    if original and target.namespace is Namespace.DEEPSEEK:
        names = {name for _, _, entries in original.files for name in entries}
        if names == target.stored.keys() | opaque.keys():
            return tuple(
                PlannedFile(
                    file,
                    tuple(
                        opaque[name] if name in opaque else _planned(maker, target.stored[name], {*entries})
                        for name in entries
                    ),
                    header,
                )
                for file, header, entries in original.files
            )
    groups: list[list[_Described]] = [[*group] for group in shard_groups(target)]
    groups.append([*opaque.values()])
    shards = _split(groups, max_shard_bytes)
    files = []
    for number, tensors in enumerate(shards, 1):
        in_file = {tensor.name for tensor in tensors}
        planned = (
            opaque.get(tensor.name) or _planned(maker, target.stored[tensor.name], in_file)
            for tensor in tensors
        )
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(PlannedFile(name, tuple(planned)))
    return tuple(files)


def _planned(maker: StepMaker, stored: Stored, in_file: set[str]) -> PlannedTensor:
    return PlannedTensor(stored.name, stored.dtype, stored.shape, maker.steps_of(stored, in_file))


def _split(groups: list[list[_Described]], max_shard_bytes: int) -> list[list[_Described]]:
    """Fill shards in order; a tensor larger than the limit stands alone."""
    shards: list[list[_Described]] = []
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
    return shards


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
    """Every input row used, none twice for two outputs, or dropped by name; every output once, and filled.

    A failure here is our bug, caught before a byte is written.
    """
    tensors = survey.checkpoint.tensors
    made = [tensor for file in plan.files for tensor in file.tensors]
    if len({tensor.key for tensor in made}) != len(made):
        raise NotConform("two outputs would have one name", do="please report this")
    uses: _Uses = {name: [] for name in tensors}
    for file in plan.files:
        filled = _filled(file)
        for tensor in file.tensors:
            if filled[tensor.key] != formats.stored_bytes(tensor.dtype, tensor.shape):
                raise NotConform(f"tensor {tensor.name!r} would not be filled", do="please report this")
            for step in tensor.steps:
                _use(uses, step)
    for number, item in enumerate(plan.dropped):
        uses[item.name].append((0, _num_rows(tensors[item.name].entry.shape), f"dropped {number}"))
    made_twice = _duplicates(plan)
    if made_twice:
        raise NotConform(f"tensor {made_twice!r} would not be used exactly once", do="please report this")
    for name, ranges in uses.items():
        position = 0
        for begin, rows, _ in sorted(set(ranges)):
            if begin != position:
                position = -1
                break
            position += rows
        expected = 1 if name in survey.opaque else _num_rows(tensors[name].entry.shape)
        if position != expected:
            raise NotConform(f"tensor {name!r} would not be used exactly once", do="please report this")


def _filled(file: PlannedFile) -> dict[str, int]:
    """Bytes that the steps of a file put into each of its tensors."""
    filled = dict.fromkeys((tensor.key for tensor in file.tensors), 0)
    for tensor in file.tensors:
        for step in tensor.steps:
            if not (step.op is Op.ENCODE and step.is_scale):
                filled[tensor.key] += step.out_bytes
            if step.scale_out is not None:
                filled[step.scale_out] += step._replace(leaf="scale").out_bytes
    return filled


_Uses = dict[str, list[tuple[int, int, str]]]  # stored tensor -> (first row, rows, for which logical tensor)


def _use(uses: _Uses, step: Step) -> None:
    """Note which input rows a step reads. Codes and scales of one matrix may be made by two steps that read both."""
    if step.is_released:
        return
    uses[step.source].append((step.begin, step.rows, step.name))
    if step.scale and step.quant and step.op is not Op.COPY:  # scales of copied codes have their own step
        rows = formats.ceil_div(step.rows, step.quant.block.rows)
        uses[step.scale].append((step.scale_begin, rows, step.name))
    for name in step.per_tensor:
        uses[name].append((0, 1, step.name))


def _duplicates(plan: Plan) -> str | None:
    """An input whose values would come out twice."""
    seen: set[tuple[str, int]] = set()
    for file in plan.files:
        for tensor in file.tensors:
            for step in tensor.steps:
                if step.is_scale:
                    continue
                if (step.source, step.begin) in seen:
                    return step.source
                seen.add((step.source, step.begin))
    return None


def _num_rows(shape: Shape) -> int:
    return formats.num_elements(shape[:-1]) if len(shape) > 1 else 1
