"""What every step of one output file works with.  Holds no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import EditedOutput
from .inputs import Inputs
from .plan import ScalePolicy
from .roundtrip import Knowledge, Losses
from .sidecar import PartWriter
from .sink import FileSink
from .source import Reader
from .steps import Step
from .stop import StopFlag


@dataclass
class Notes:
    """What came of the values of one file."""

    not_exact: int = 0  # values that the output could not hold exactly
    not_finite: int = 0
    untouched: int = 0  # tensors that were the original's
    changed: int = 0
    losses: Losses = field(default_factory=Losses)

    def document(self) -> dict[str, Any]:
        counts = {key: value for key, value in self.__dict__.items() if key != "losses"}
        return {**counts, "losses": self.losses.rows()}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every step of a run."""

    allow_nan: frozenset[str]
    allow_lossy: bool
    scale_policy: ScalePolicy
    float_scales: bool  # fresh F32 scales are amax / 448, as in Base; else powers of two
    is_vouched: bool  # a manifest says that the source's values are as they were converted


def edited(step: Step, found: str) -> EditedOutput:
    """An error for the caller to raise: a manifest vouches for values that are not there."""
    return EditedOutput(
        f"{step.name!r} is not what it was when this directory was converted, and its manifest says it is",
        found=found,
        do="if you changed the values on purpose: --accept-changes; if not, convert the release again",
    )


@dataclass(frozen=True, kw_only=True)
class Desk:
    """One worker's: where it reads, where it writes, what it must respect."""

    inputs: Inputs
    sink: FileSink
    rules: Rules
    on_bytes: Callable[[int], None]  # told of output bytes as they come
    stop: StopFlag
    part: PartWriter | None = None  # takes the records for the sidecar
    knowledge: Knowledge | None = None  # of the original
    released: Reader | None = None  # gives what the source lacks
    notes: Notes = field(default_factory=Notes)
