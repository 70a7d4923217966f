"""How long a conversion takes on many ranks, told from its plan alone.  Knows no torch, no files, no clock.

    seconds = start + max(bytes of all ranks / bandwidth, core-seconds of the slowest rank / its cores) + finish

Reading, computing and writing go on at the same time, so that the slower of the two counts.  The constants are what
benchmarks/scaling.py measured (docs/scaling.md: on what, and how far off the prediction was); another machine has
others, mostly by one factor, which that benchmark finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import formats
from .plan import Plan
from .ranks import share
from .steps import Op, PlannedFile, Step

_GB = 10**9
# Core-seconds for each GB of weight_of: the step alone; hashing and writing its output are apart.
COSTS = {
    "copy": 1.31,
    "copy 4-bit": 0.20,
    "copy 8-bit": 0.98,
    "decode 4-bit": 0.43,
    "decode 8-bit": 1.33,
    "recast 4-bit": 1.11,
    "tiles 4-bit": 3.18,
    "nvfp4 scales 4-bit": 16.54,
    "encode 4-bit": 2.27,
    "encode 8-bit": 2.03,
    "scales 8-bit": 0.0,  # next to no bytes
}
STEP_COST = 0.00017  # core-seconds of a step, whatever it does
RECORD_COST = 0.75  # for each GB of codes and values that are hashed for a sidecar
WRITE_COST = 0.82  # for each GB that is hashed and written
START_SECONDS = 3.5  # of a process: imports, joining the job
START_SECONDS_PER_TENSOR = 0.00008  # reading headers and planning, which every rank does by itself
FINISH_SECONDS_PER_FILE = 0.0007  # samples of the source, sums, manifest
_ON_SCALES = (Op.SCALES, Op.TILES, Op.NVFP4_SCALES, Op.NVFP4_SCALE_2)  # these read no codes


class Load(NamedTuple):
    """The work of one rank."""

    bytes_in: int
    bytes_out: int
    core_seconds: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a conversion, by what they are spent on. data is None where no bandwidth was told."""

    loads: tuple[Load, ...]
    start: float
    data: float | None
    cpu: float
    finish: float
    largest_file: float  # cpu seconds of the file that takes most, which one worker makes

    @property
    def seconds(self) -> float:
        return self.start + max(self.data or 0.0, self.cpu) + self.finish

    @property
    def bottleneck(self) -> str:
        """What to have more of, for a shorter time."""
        work = max(self.data or 0.0, self.cpu)
        if self.start + self.finish > work:
            return "start and finish"
        if self.data and self.data > self.cpu:
            return "bandwidth"
        return "the largest file" if self.cpu == self.largest_file else "cores"


def predict(plan: Plan, num_ranks: int, cores_per_rank: int, bandwidth: int | None) -> Prediction:
    """What a conversion will take.

    cores_per_rank  workers of a rank, each with a core of its own
    bandwidth       bytes per second that the file system gives to all ranks together, read or written; None: unknown
    """
    costs = {file.name: load_of(plan, file) for file in plan.files}
    loads = tuple(_sum([costs[file.name] for file in files]) for files in share(plan.files, num_ranks))
    num_bytes = sum(load.bytes_in + load.bytes_out for load in loads)
    largest = max(load.core_seconds for load in costs.values())
    return Prediction(
        loads=loads,
        start=START_SECONDS + START_SECONDS_PER_TENSOR * plan.num_tensors,
        data=None if bandwidth is None else num_bytes / bandwidth,
        cpu=max(largest, *(load.core_seconds / cores_per_rank for load in loads)),
        finish=FINISH_SECONDS_PER_FILE * (len(plan.files) + len(plan.source)),
        largest_file=largest,
    )


def _sum(loads: list[Load]) -> Load:
    return Load(
        sum(load.bytes_in for load in loads),
        sum(load.bytes_out for load in loads),
        sum(load.core_seconds for load in loads),
    )


def load_of(plan: Plan, file: PlannedFile) -> Load:
    """Bytes and core-seconds of one output file."""
    steps = [step for tensor in file.tensors for step in tensor.steps]
    bytes_in = sum(bytes_read(step) for step in steps)
    seconds = WRITE_COST * file.size / _GB + STEP_COST * len(steps)
    seconds += sum(COSTS[kind_of(step)] * weight_of(step) for step in steps if kind_of(step)) / _GB
    if plan.remembered:
        seconds += RECORD_COST * sum(bytes_recorded(step) for step in steps) / _GB
    if plan.original and plan.original.survey:
        bytes_in += file.size  # the release's codes and scales, which values are compared with
    return Load(bytes_in, file.size, seconds)


def kind_of(step: Step) -> str:
    """What COSTS knows it as; empty for a single number."""
    if step.op in (Op.NUMBER, Op.NVFP4_SCALE_2):
        return ""
    quant = step.target if step.op is Op.ENCODE else step.quant
    if quant is None:
        return step.op.value
    return f"{step.op} {8 // quant.codes_per_element}-bit"


def weight_of(step: Step) -> int:
    """The bytes that its cost grows with: what comes out, or what is read where next to nothing comes out."""
    return bytes_read(step) if step.op is Op.ENCODE or step.op in _ON_SCALES else step.out_bytes


def bytes_recorded(step: Step) -> int:
    """Hashed for the sidecar: codes, and what becomes of them."""
    return 0 if step.is_scale else step.rows * step.row_bytes + step.out_bytes


def bytes_read(step: Step) -> int:
    """Of the source, for one step."""
    if step.op is Op.NUMBER:
        return 0
    codes = step.rows * step.row_bytes
    scales = 0  # of codes that are copied: the sidecar remembers them
    if step.scale and step.quant:
        scales = formats.ceil_div(step.rows, step.quant.block.rows) * step.scale_row_bytes
    return scales if step.op in _ON_SCALES else codes + scales
