"""Which release is this?  Told from the config and the stored dtypes, never from a directory's name.

Owns the list of releases and their configs (data in releases/, written from the published facts); opens no checkpoint.
The key `expert_dtype` decides nothing: launch configs lack it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from . import config as configs
from . import inventory, names
from .config import ModelConfig
from .errors import UnknownRelease
from .formats import FP4_EXPERT, QUANTS, Block, Kind, Quant, Shape, Spelling, Storage
from .inventory import Family
from .names import Experts, Namespace


class Release(NamedTuple):
    """One row per release."""

    name: str
    family: Family
    storage: Storage  # what `native` means for it
    repository: str


RELEASES = {
    row.name: row
    for row in (
        Release("flash", inventory.PREVIEW, Storage.FP4_FP8, "deepseek-ai/DeepSeek-V4-Flash"),
        Release("flash-base", inventory.BASE, Storage.FP8_F32SCALE, "deepseek-ai/DeepSeek-V4-Flash-Base"),
        Release("flash-0731", inventory.DSPARK, Storage.FP4_FP8, "deepseek-ai/DeepSeek-V4-Flash-0731"),
        Release("pro", inventory.PREVIEW, Storage.FP4_FP8, "deepseek-ai/DeepSeek-V4-Pro"),
        Release("pro-base", inventory.BASE, Storage.FP8_F32SCALE, "deepseek-ai/DeepSeek-V4-Pro-Base"),
        Release("pro-0813", inventory.DSPARK, Storage.FP4_FP8, "deepseek-ai/DeepSeek-V4-Pro-0813"),
        Release("vision-exp", inventory.VISION, Storage.FP4_FP8, "deepseek-ai/DeepSeek-V4-Flash-Vision-Exp"),
        Release("v4.1-flash", inventory.V41_FAMILY, Storage.FP4_FP8_32, "deepseek-ai/DeepSeek-V4.1-Flash"),
    )
}
_PRO_SCALING = (
    2.5  # routed_scaling_factor; Flash has 1.5. Width-independent, so that it holds for cut-down models
)
_BASE_COPIES = ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")


def shipped_config(name: str) -> dict[str, Any]:
    """The config.json of a release, from the package: the caller's own, to change as it likes."""
    return configs.parse(_shipped_bytes(name))


@functools.cache
def _shipped_bytes(name: str) -> bytes:
    return resources.files(__package__).joinpath("releases", f"{name}.json").read_bytes()


class Seen(NamedTuple):
    """A stored tensor, as a header tells it."""

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is."""

    release: Release
    storage: Storage
    namespace: Namespace


def identify(
    document: Mapping[str, Any],
    model: ModelConfig,
    seen: Mapping[str, Seen],
    namespace: Namespace,
    experts: Experts = Experts.FUSED,
) -> Identity:
    """Tell release and storage format. experts: of the transformers namespace. raises UnknownRelease"""
    storage = _storage(model, seen, namespace, experts)
    return Identity(RELEASES[_name(document, model, seen, storage)], storage, namespace)


def _name(document: Mapping[str, Any], model: ModelConfig, seen: Mapping[str, Seen], storage: Storage) -> str:
    if model.model_type == configs.V41:
        return "v4.1-flash"
    size = "pro" if model.routed_scaling_factor == _PRO_SCALING else "flash"
    if any(name.endswith((".bias_vl", "_bias_vl")) for name in seen) or "vision_config" in document:
        return "vision-exp"
    if model.dspark_targets:
        return "pro-0813" if size == "pro" else "flash-0731"
    # Base alone repeats embed and head below mtp.0; without draft stages its scales are what is left to tell it by
    if any(name in seen for name in _BASE_COPIES) or (
        storage is Storage.FP8_F32SCALE and not model.num_stages
    ):
        return f"{size}-base"
    return size


def _storage(model: ModelConfig, seen: Mapping[str, Seen], namespace: Namespace, experts: Experts) -> Storage:
    """Compare how experts and dense matrices are stored with every known way."""
    found = {kind: _observed(model, seen, namespace, experts, kind) for kind in (Kind.EXPERT, Kind.DENSE)}
    for storage, quants in QUANTS.items():
        if all(found[kind] == _summary(quants.get(kind), namespace) for kind in found):
            return storage
    raise UnknownRelease(
        "experts and dense matrices are stored in a way that no known release uses",
        expected=" or ".join(sorted(storage.value for storage in QUANTS)),
        found=", ".join(f"{kind.value}: {_words(found[kind])}" for kind in found),
        do="take a complete download of the release; not every format that other tools make of it is known here",
    )


class _Summary(NamedTuple):
    """How one matrix is stored, as far as names and headers show."""

    codes: str
    scale: str | None = None
    block: Block | None = None
    names: tuple[str, str] | None = None  # leaves of codes and scales


def _summary(quant: Quant | None, namespace: Namespace) -> _Summary:
    if quant is None:
        return _Summary("BF16")
    spelling = quant.spelling if namespace is Namespace.DEEPSEEK else Spelling.RELEASED
    return _Summary(quant.codes, quant.scale, quant.block, _leaves(spelling))


def _leaves(spelling: Spelling) -> tuple[str, str]:
    return names.LEAVES[spelling]["weight"], names.LEAVES[spelling]["scale"]


def _words(summary: _Summary | None) -> str:
    if summary is None:
        return "none found"
    return (
        f"{summary.codes} with {summary.scale} scales per {summary.block}" if summary.scale else summary.codes
    )


def _observed(
    model: ModelConfig, seen: Mapping[str, Seen], namespace: Namespace, experts: Experts, kind: Kind
) -> _Summary | None:
    """How the tensors of a kind are stored: what most of them say, so that one bad tensor is no unknown release.

    Geometry is read from the shapes, never assumed.
    """
    owner = "experts.0." if kind is Kind.EXPERT else "shared_experts."
    shapes = {
        "w1": (model.intermediate, model.hidden),
        "w2": (model.hidden, model.intermediate),
        "w3": (model.intermediate, model.hidden),
    }
    spellings = {_leaves(spelling): spelling for spelling in Spelling if namespace is Namespace.DEEPSEEK}
    spellings[_leaves(Spelling.RELEASED)] = Spelling.RELEASED
    votes: Counter[_Summary] = Counter()
    for layer in range(model.num_layers):
        for inner, (rows, cols) in shapes.items():
            is_fused = namespace is Namespace.TRANSFORMERS and experts is Experts.FUSED
            if is_fused and kind is Kind.EXPERT and inner != "w2":
                rows *= 2  # gate and up stand in one tensor
            best: _Summary | None = None
            for leaves, spelling in spellings.items():
                weight_name, scale_name = _names(
                    f"layers.{layer}.ffn.{owner}{inner}.weight", namespace, experts, spelling
                )
                weight, scale = seen.get(weight_name), seen.get(scale_name)
                if weight is None:
                    continue
                if scale is None or len(scale.shape) < 2:
                    best = best or _Summary(weight.dtype)
                    continue
                best = _Summary(weight.dtype, scale.dtype, _block(rows, cols, *scale.shape[-2:]), leaves)
            if best:
                votes[best] += 1
    return max(votes, key=lambda summary: votes[summary]) if votes else None


def _names(logical: str, namespace: Namespace, experts: Experts, spelling: Spelling) -> tuple[str, str]:
    table = inventory.PREVIEW.table
    match = table.match(logical)
    assert match is not None
    scale = match._replace(leaf="scale")
    return tuple(table.place(item, namespace, experts, spelling).name for item in (match, scale))  # type: ignore[return-value]


def _block(rows: int, cols: int, scale_rows: int, scale_cols: int) -> Block | None:
    """The one known geometry that gives this scale grid. None if no geometry fits or more than one does."""
    known = {FP4_EXPERT.block} | {quant.block for quants in QUANTS.values() for quant in quants.values()}
    fits = [
        block
        for block in sorted(known)
        if (-(-rows // block.rows), -(-cols // block.cols)) == (scale_rows, scale_cols)
    ]
    return fits[0] if len(fits) == 1 else None
