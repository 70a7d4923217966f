"""What a checkpoint is, and where it departs from what its config asks for.  Reads headers only; knows no torch.

Everything that consumes a checkpoint starts here: release, storage format and namespace, the expected layout, and the
full list of deviations.  Nothing is tolerated silently: what is neither expected nor opaque is a deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import config as configs
from . import release
from .config import ModelConfig
from .errors import MissingScale, NotConform, OrphanScale, UnknownRelease
from .formats import CONFIG_NAME, Kind, num_elements
from .inventory import Layout, Logical, Stored, lay_out, logical_tensors
from .names import Experts, Namespace, has_split_experts, is_opaque, looks_like_transformers
from .release import Identity, Seen
from .source import Checkpoint

_LEAST_PER_LAYER = 15  # tensors beside the experts; every release has more
_MOST_UNSEEN = 10_000  # tensors that may be missing before we look whether it is most of them


@dataclass(frozen=True)
class Deviation:
    """One difference between the stored tensors and the inventory."""

    problem: str  # missing, extra, dtype, shape, weight without scale, scale without weight
    name: str
    file: str | None
    expected: str | None
    found: str | None

    def sentence(self) -> str:
        words = {
            "missing": "tensor {} is in no shard",
            "extra": "tensor {} is not in the inventory of this release",
            "dtype": "tensor {} has the wrong dtype",
            "shape": "tensor {} has the wrong shape",
            "weight without scale": "the scales {} are in no shard, their weight is there",
            "scale without weight": "the weight {} is in no shard, its scales are there",
        }
        return words[self.problem].format(repr(self.name))


@dataclass(frozen=True)
class Survey:
    """A checkpoint with its identity, and every stored tensor accounted for."""

    checkpoint: Checkpoint
    document: dict[str, Any]  # config.json
    model: ModelConfig
    identity: Identity
    logicals: list[Logical]
    layout: Layout
    opaque: list[str]  # carried as they are: sorted names
    unit_scales: frozenset[str]  # logical weights whose missing scales the user declared to be 1
    deviations: list[Deviation]

    def require_conform(self, *, excused: frozenset[str] = frozenset()) -> None:
        """raises BadIndex, MissingScale, OrphanScale or NotConform for the first deviation

        excused   stored tensors that may be missing: they come from elsewhere
        """
        self.checkpoint.require_sound()
        deviations = [
            item for item in self.deviations if item.problem != "missing" or item.name not in excused
        ]
        if not deviations:
            return
        first, more = deviations[0], len(deviations) - 1
        kind = {"weight without scale": MissingScale, "scale without weight": OrphanScale}
        raise kind.get(first.problem, NotConform)(
            first.sentence() + (f", and {more:,} more deviations" if more else ""),
            file=first.file,
            expected=first.expected,
            found=first.found,
            do=_advice(first),
        )


def _advice(deviation: Deviation) -> str:
    if deviation.problem == "weight without scale":
        weight = deviation.name.removesuffix(".scale") + ".weight"
        return f"if the file really stores unscaled FP8: --unit-scale {weight}"
    if deviation.problem == "missing" and deviation.name.startswith("mtp."):
        return (
            "if it was saved without its draft stages: --to native --source DIR takes them from the release; "
            "or set num_nextn_predict_layers to 0 in its config.json"
        )
    return "take a complete download of one release; dsv4 inspect lists every deviation"


def survey(checkpoint: Checkpoint, *, unit_scales: frozenset[str] = frozenset()) -> Survey:
    """Identify a checkpoint and compare it with its inventory.

    raises  BadConfig, UnknownRelease, BadIndex, MissingFile; NotConform if most of what the config asks for is missing
    """
    document = checkpoint.config()
    model = configs.read(document)
    seen = checkpoint.seen
    namespace = Namespace.TRANSFORMERS if looks_like_transformers(seen) else Namespace.DEEPSEEK
    split = namespace is Namespace.TRANSFORMERS and has_split_experts(seen)
    experts = Experts.SPLIT if split else Experts.FUSED
    try:
        identity = release.identify(document, model, seen, namespace, experts)
    except UnknownRelease:
        checkpoint.require_sound()  # an index that misses shards is the likelier cause
        raise
    _require_most(model, len(seen), namespace)
    family = identity.release.family
    logicals = list(logical_tensors(model, family))
    layout = lay_out(logicals, family.table, identity.storage, namespace, experts)
    unknown = [name for name in seen if name not in layout.stored]
    opaque = sorted(name for name in unknown if family.vision and is_opaque(name))
    excused = {layout.scales[name][0] for name in unit_scales if name in layout.scales}
    deviations = [*_extras(checkpoint, sorted(set(unknown) - set(opaque)))]
    for stored in layout.stored.values():
        deviations += _compare(checkpoint, layout, stored, seen.get(stored.name), excused)
    return Survey(
        checkpoint, document, model, identity, logicals, layout, opaque, unit_scales, _sorted(deviations)
    )


def _require_most(model: ModelConfig, num_seen: int, namespace: Namespace) -> None:
    """A config of a few bytes must not make us list a hundred thousand tensors that are not there. raises NotConform"""
    num_blocks = model.num_layers + model.num_stages
    per_block = _LEAST_PER_LAYER + (3 * model.num_experts if namespace is Namespace.DEEPSEEK else 0)
    if num_blocks * per_block > 2 * num_seen + _MOST_UNSEEN:
        raise NotConform(
            "most of the tensors that config.json asks for are not here",
            file=CONFIG_NAME,
            expected=f"more than {num_blocks * per_block:,} tensors",
            found=f"{num_seen:,} tensors",
            do="finish the download, or take the config.json that belongs to these shards",
        )


def _sorted(deviations: list[Deviation]) -> list[Deviation]:
    order = ("scale without weight", "weight without scale", "missing", "dtype", "shape", "extra")
    return sorted(deviations, key=lambda item: (order.index(item.problem), item.name))


def _extras(checkpoint: Checkpoint, names: list[str]) -> list[Deviation]:
    found = []
    for name in names:
        place = checkpoint.tensors[name]
        stored = f"{place.entry.dtype} {list(place.entry.shape)}"
        found.append(Deviation("extra", name, place.shard, None, stored))
    return found


def _compare(
    checkpoint: Checkpoint, layout: Layout, stored: Stored, seen: Seen | None, excused: set[str]
) -> list[Deviation]:
    if seen == (stored.dtype, stored.shape):
        return []
    expected = f"{stored.dtype} {list(stored.shape)}"
    if seen is None:
        if stored.name in excused:
            return []
        return [Deviation(_missing(checkpoint, layout, stored), stored.name, None, expected, None)]
    found = f"{seen.dtype} {list(seen.shape)}"
    file = checkpoint.tensors[stored.name].shard
    deviations = []
    if seen.dtype != stored.dtype:
        deviations.append(Deviation("dtype", stored.name, file, expected, found))
    if seen.shape != stored.shape:
        deviations.append(Deviation("shape", stored.name, file, expected, found))
    return deviations


def _missing(checkpoint: Checkpoint, layout: Layout, stored: Stored) -> str:
    """Say which half of a weight and scale pair is gone."""
    logical = stored.parts[0].logical
    if layout.quant(logical) is None:
        return "missing"
    weight, scale = layout.weights[logical.name][0], layout.scales[logical.name][0]
    if stored.scale_of and weight in checkpoint.tensors:
        return "weight without scale"
    if not stored.scale_of and scale in checkpoint.tensors:
        return "scale without weight"
    return "missing"


def attention_kinds(model: ModelConfig) -> dict[str, int]:
    """How many layers attend in which way."""
    counts: dict[str, int] = {}
    for ratio in model.compress_ratios[: model.num_layers]:
        kind = {0: "sliding window", 4: "CSA (ratio 4)", 128: "HCA (ratio 128)"}.get(ratio, f"ratio {ratio}")
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def logical_bytes_bf16(logicals: list[Logical]) -> int:
    """Size of the same tensors with every quantized matrix as BF16."""
    widths = {Kind.F32: 4, Kind.I64: 8}
    return sum(num_elements(logical.shape) * widths.get(logical.kind, 2) for logical in logicals)
