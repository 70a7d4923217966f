"""The released checkpoint that a conversion came from, as far as it is at hand: its sidecar, or the files themselves.

Tells how the released shards were laid out, and, per tensor, whether values are still what they were.  Headers only.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from . import config as configs
from . import shard
from .errors import BadSidecar, NotConform
from .formats import INDEX_NAME
from .shard import Entry
from .sidecar import Remembered, Sidecar
from .steps import PlannedFile
from .survey import Survey


@dataclass(frozen=True)
class Original:
    """Exactly one of `sidecar` and `survey` is set."""

    remembered: Remembered
    sidecar: Sidecar | None = None
    survey: Survey | None = None

    @functools.cached_property
    def files(self) -> tuple[tuple[str, bytes, dict[str, Entry]], ...]:
        """(shard, its header as it stood, the entries in order of their bytes). raises BadHeader"""
        return tuple(
            (name, raw, shard.parse_header(raw, None, name).entries) for name, raw in self.remembered.headers
        )

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The released config.json. raises BadConfig"""
        return configs.parse(self.remembered.config)

    @functools.cached_property
    def identity(self) -> str:
        """What of it decides output bytes, as far as headers tell."""
        known = self.sidecar.identity if self.sidecar else ""
        parts = (known, self.remembered.release, self.remembered.storage, self.remembered.headers)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def what(self) -> str:
        """For messages."""
        return "the round-trip sidecar" if self.sidecar else "the checkpoint that --source names"

    def shards_read(self, file: PlannedFile) -> frozenset[str]:
        """Shards of the release that an output file is copied from, or compared with."""
        if self.survey is None:
            return frozenset()
        layout, checkpoint = self.survey.layout, self.survey.checkpoint
        names = {step.name for tensor in file.tensors for step in tensor.steps}
        stored = {
            where[name][0] for where in (layout.weights, layout.scales) for name in names & where.keys()
        }
        compared = {checkpoint.tensors[name].shard for name in (stored | names) & checkpoint.tensors.keys()}
        return file.shards_read(checkpoint, is_released=True) | compared

    def refuse(self, what: str, **facts: Any) -> BadSidecar | NotConform:
        """An error for the caller to raise."""
        kind = BadSidecar if self.sidecar else NotConform
        do = "use what belongs to this checkpoint: the sidecar of its own conversion, or --source with its release"
        return kind(f"{self.what} does not belong to this checkpoint: {what}", do=do, **facts)


def remember(survey: Survey) -> Remembered:
    """Headers, config and index of a checkpoint as they stand. raises SourceChanged, Environment"""
    checkpoint = survey.checkpoint
    headers = [(name, checkpoint.header_bytes(name)) for name in checkpoint.shards]
    identity = survey.identity
    return Remembered(
        identity.release.name,
        identity.storage.value,
        tuple(headers),
        checkpoint.config_bytes or b"",
        checkpoint.read_small(INDEX_NAME) if checkpoint.has_index else None,
    )


def of_sidecar(sidecar: Sidecar) -> Original:
    return Original(sidecar.source, sidecar=sidecar)


def of_source(survey: Survey) -> Original:
    """raises NotConform if it is not stored as its release stores it"""
    survey.require_conform()
    identity = survey.identity
    if identity.storage is not identity.release.storage:
        raise NotConform(
            "the checkpoint that --source names is not in its released format",
            expected=identity.release.storage.value,
            found=identity.storage.value,
            do="name the checkpoint as it was downloaded",
        )
    return Original(remember(survey), survey=survey)
