"""Executes a Plan: read -> decode -> write, one worker per output shard.  The only module that sees all the others.

Order comes from the plan, never from the disk, a dict or a thread: equal plans and sources give equal bytes for any
number of workers.  Memory is bounded by workers x (slabs + one chunk), whatever the sizes of tensors and shards.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import __version__, codec, contained, formats, outdir, strictjson
from .errors import ForeignOutput, Interrupted, NoSpace, NotFinite, SourceChanged
from .formats import INDEX_NAME
from .manifest import read_manifest
from .outdir import OutDir
from .plan import Op, Plan, PlannedFile, PlannedTensor, Step, space_needed
from .sink import FileSink, Receipt
from .source import Checkpoint, Reader
from .threads import one_torch_thread

_CHUNK_VALUES = 1024 * 1024  # decoded at a time: fits the second-level cache together with its index
_COPY_BYTES = 4 * 1024 * 1024
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Started:
    """The work that lies ahead. `done_bytes` were finished by an earlier run."""

    total_bytes: int
    done_bytes: int
    num_files: int
    num_done: int


@dataclass(frozen=True)
class Wrote:
    """More output bytes are on their way to the disk."""

    num_bytes: int


@dataclass(frozen=True)
class FileDone:
    """A file stands under its final name."""

    receipt: Receipt


Event = Started | Wrote | FileDone


class StopFlag:
    """Set from a signal handler; workers look at it once per chunk."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._failed = threading.Event()

    def fail(self) -> None:
        """One worker failed: the others stop."""
        self._failed.set()

    def check(self) -> None:
        """raises Interrupted"""
        if self.signal_number or self._failed.is_set():
            raise Interrupted(self.signal_number)


@dataclass(frozen=True)
class Summary:
    """What came of a run."""

    files: tuple[Receipt, ...]
    num_inexact: int  # values that BF16 could not hold exactly (F32 scales that are no powers of two)
    num_not_finite: int  # NaN or infinities in tensors that --allow-nan names
    num_resumed: int  # files that an earlier run had finished


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    path: str,
    *,
    num_workers: int = 2,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: StopFlag | None = None,
) -> Summary:
    """Carry out a plan into a directory, or continue where an earlier run of the same plan stopped.

    on_event  called from worker threads
    raises    NoSpace before the first byte if the output does not fit, Busy, ForeignOutput, SourceChanged, NotFinite,
              Interrupted; finished files stay, temporary ones are removed
    """
    stop = stop or StopFlag()
    complete = _already_complete(plan, checkpoint, path)
    if complete is not None:
        outdir.remove_leftovers(path)
        on_event(Started(plan.shard_bytes, plan.shard_bytes, len(plan.files), len(plan.files)))
        return complete
    known = {file.name for file in plan.files} | set(plan.written) | {name for name, _, _ in plan.copied}
    with outdir.open_outdir(path, plan.sha256, known, checkpoint.stamps_sha256()) as out:
        done = [file for file in plan.files if file.name in out.finished]
        waiting = [file for file in plan.files if file.name not in out.finished]
        done_bytes = sum(file.size for file in done)
        _require_space(path, plan.total_bytes - done_bytes)
        on_event(Started(plan.shard_bytes, done_bytes, len(plan.files), len(done)))
        with one_torch_thread():  # parallelism is across shards
            _run_jobs(waiting, checkpoint, plan, out, num_workers, on_event, stop)
        _write_small(plan, checkpoint, out)
        summary = _summarize(plan, out, len(done))
        out.finish(strictjson.pretty(_manifest(plan, checkpoint, summary)))
    return summary


def _already_complete(plan: Plan, checkpoint: Checkpoint, path: str) -> Summary | None:
    """The summary of a finished output of the same plan and source; None if there is work to do."""
    if not os.path.isdir(path):
        return None
    found = read_manifest(path)
    if found is None or found.plan_sha256 != plan.sha256:
        return None
    planned = {(file.name, file.size) for file in plan.files}
    planned |= {(name, len(data)) for name, data in plan.written.items()}
    planned |= {(name, size) for name, size, _ in plan.copied}
    if {(file.name, file.size) for file in found.files} != planned:
        return None
    if any(contained.size_of(path, file.name, follow_links=False) != file.size for file in found.files):
        return None
    for name, sampled in found.samples.items():
        if checkpoint.sample_sha256(name) != sampled:
            raise ForeignOutput(
                "this directory was made from another source with the same headers",
                file=name,
                do="choose a new directory",
            )
    files = tuple(Receipt(*file, {}) for file in found.files)
    return Summary(files, found.num_inexact, found.num_not_finite, len(plan.files))


def _require_space(path: str, remaining: int) -> None:
    needed, free = space_needed(remaining), outdir.free_bytes(path)
    if free < needed:
        raise NoSpace(
            "not enough room for the output",
            expected=f"{needed:,} bytes",
            found=f"{free:,} bytes free",
            do="make room or choose another disk; nothing was written",
        )


def _run_jobs(
    files: list[PlannedFile],
    checkpoint: Checkpoint,
    plan: Plan,
    out: OutDir,
    num_workers: int,
    on_event: Callable[[Event], None],
    stop: StopFlag,
) -> None:
    def job(file: PlannedFile) -> None:
        stop.check()
        on_event(FileDone(_write_shard(file, checkpoint, plan, out, on_event, stop)))

    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(job, file) for file in files]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            stop.fail()
            for future in futures:
                future.cancel()
            raise


def _write_shard(
    file: PlannedFile,
    checkpoint: Checkpoint,
    plan: Plan,
    out: OutDir,
    on_event: Callable[[Event], None],
    stop: StopFlag,
) -> Receipt:
    notes = {"not_exact": 0, "not_finite": 0}
    with checkpoint.reader() as reader, out.new_file(file.name, file.size) as sink:
        sink.notes = notes
        sink.write(file.header)
        worker = _Worker(reader, sink, plan.options.allow_nan, notes, on_event, stop)
        for tensor in file.tensors:
            for step in tensor.steps:
                worker.carry_out(step, tensor)
        reader.check_unchanged()  # before the file is published
    return out.finished[file.name]


class _Scratch:
    """A buffer that is reused from chunk to chunk: fresh pages cost more than the decoding."""

    def __init__(self) -> None:
        self._buffer = bytearray(0)

    def take(self, size: int) -> memoryview:
        """`size` bytes; what an earlier take returned must no longer be in use."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]


class _Worker:
    """Turns steps into bytes of one output file."""

    def __init__(
        self,
        reader: Reader,
        sink: FileSink,
        allow_nan: frozenset[str],
        notes: dict[str, int],
        on_event: Callable[[Event], None],
        stop: StopFlag,
    ) -> None:
        self._reader, self._sink, self._allow_nan = reader, sink, allow_nan
        self._notes, self._on_event, self._stop = notes, on_event, stop
        self._codes, self._scales, self._values = _Scratch(), _Scratch(), _Scratch()

    def carry_out(self, step: Step, tensor: PlannedTensor) -> None:
        self._reader.will_need(step.source, step.begin * step.row_bytes, step.rows * step.row_bytes)
        if step.op is Op.COPY:
            self._copy(step, tensor)
        else:
            self._decode(step)

    def _copy(self, step: Step, tensor: PlannedTensor) -> None:
        """Stored bytes are output bytes: read straight into the slab."""
        offset = step.begin * step.row_bytes
        end = offset + step.rows * step.row_bytes
        dtype = _FLOATS.get(tensor.dtype)
        width = formats.DTYPE_BITS[tensor.dtype] // 8 or 1
        while offset < end:
            self._stop.check()
            room = self._sink.room()
            count = min(len(room) // width * width or 1, end - offset, _COPY_BYTES)
            self._reader.read_into(step.source, room[:count], offset)
            if dtype is not None and count % width == 0:
                values = torch.frombuffer(room[:count], dtype=dtype)
                first = (offset - step.begin * step.row_bytes) // width
                self._note(step, values, codec.count_not_finite(values), first, step.row_bytes // width)
            self._sink.advance(count)
            self._on_event(Wrote(count))
            offset += count

    def _decode(self, step: Step) -> None:
        row_values = step.row_bytes * (2 if step.op is Op.FP4 else 1)
        row = 0
        while row < step.rows:
            self._stop.check()
            room = self._sink.room()
            fitting = len(room) // (2 * row_values)
            direct = fitting > 0 and _is_aligned(room)
            rows = _chunk_rows(row, step.rows, row_values, step.block.rows, fitting if direct else 1)
            size = 2 * row_values * rows
            data = room[:size] if direct else self._values.take(size)
            values = torch.frombuffer(data, dtype=torch.bfloat16).view(rows, row_values)
            self._decode_rows(step, row, values)
            if direct:
                self._sink.advance(size)
            else:  # a row that crosses the end of the slab
                self._sink.write(data)
            self._on_event(Wrote(size))
            row += rows

    def _decode_rows(self, step: Step, row: int, out: Tensor) -> None:
        """Rows [row, row + len(out)) of the step into `out`. raises NotFinite"""
        rows = out.shape[0]
        codes = self._read(self._codes, step.source, step.begin + row, rows, step.row_bytes)
        block_row = row // step.block.rows
        block_rows = formats.ceil_div(rows, step.block.rows)
        if step.scale is None:
            scales = codec.unit_scale(block_rows, formats.ceil_div(step.row_bytes, step.block.cols))
        else:
            first = step.scale_begin + block_row
            scales = self._read(self._scales, step.scale, first, block_rows, step.scale_row_bytes)
            scales = scales.view(torch.float32) if step.scale_dtype == "F32" else scales
        decode = codec.decode_fp4 if step.op is Op.FP4 else codec.decode_fp8
        decoded = decode(codes, scales, step.block, out)
        self._notes["not_exact"] += decoded.num_inexact
        if decoded.num_not_finite:
            self._require_finite_scales(step, scales, block_row)
            self._note(step, out, decoded.num_not_finite, row * out.shape[1], out.shape[1])

    def _read(self, scratch: _Scratch, name: str, first: int, rows: int, row_bytes: int) -> Tensor:
        data = scratch.take(rows * row_bytes)
        self._reader.read_into(name, data, first * row_bytes)
        return torch.frombuffer(data, dtype=torch.uint8).view(rows, row_bytes)

    def _require_finite_scales(self, step: Step, scales: Tensor, block_row: int) -> None:
        if step.name in self._allow_nan:
            return
        bad = (
            ~scales.view(torch.float32).isfinite()
            if step.scale_dtype == "F32"
            else scales == formats.E8M0_NAN
        )
        if bool(bad.any()):
            at_row, at_col = bad.nonzero()[0].tolist()
            raise NotFinite(
                f"a scale of {step.name!r} is NaN or infinite",
                file=self._reader.shard_of(str(step.scale)),
                found=f"block ({block_row + at_row}, {at_col}), {int(bad.sum())} in its rows",
                do=f"download the shard again; to convert it as it is: --allow-nan {step.name}",
            )

    def _note(self, step: Step, values: Tensor, num_not_finite: int, first: int, cols: int) -> None:
        """Count NaN and infinities where they are allowed. `first`: number of the first value within its tensor."""
        if not num_not_finite:
            return
        if step.name not in self._allow_nan:
            position = first + int((~values.view(-1).isfinite()).nonzero()[0])
            row, col = divmod(position, cols)
            block = f", block ({row // step.block.rows}, {col // step.block.cols})"
            raise NotFinite(
                f"{step.name!r} holds NaN or infinite values",
                file=self._reader.shard_of(step.source),
                found=f"the first at row {row}, column {col}{block if step.op is not Op.COPY else ''}",
                do=f"download the shard again; to convert it as it is: --allow-nan {step.name}",
            )
        self._notes["not_finite"] += num_not_finite


def _chunk_rows(row: int, rows: int, row_values: int, block_rows: int, most: int) -> int:
    """Rows to decode next: about _CHUNK_VALUES and at most `most`; whole tiles, or rows within one tile."""
    most = min(most, max(1, _CHUNK_VALUES // row_values), rows - row)
    into = row % block_rows
    if into or most < block_rows:
        return min(most, block_rows - into)
    return most if most == rows - row else most - most % block_rows


def _is_aligned(room: memoryview) -> bool:
    """Whether pairs of bfloat16 can be stored there as one 32-bit word."""
    return torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 4 == 0


def _write_small(plan: Plan, checkpoint: Checkpoint, out: OutDir) -> None:
    """Index, config and carried files, after all shards."""
    for name, _, sha256 in plan.copied:
        if name not in out.finished:
            data = checkpoint.read_small(name)
            receipt = out.publish_bytes(name, data)
            if receipt.sha256 != sha256:
                raise SourceChanged("this file changed while the command ran", file=name)
    for name in sorted(plan.written, key=lambda name: name != INDEX_NAME):
        if name not in out.finished:
            out.publish_bytes(name, plan.written[name])


def _summarize(plan: Plan, out: OutDir, num_resumed: int) -> Summary:
    order = [*(file.name for file in plan.files), *plan.written, *(name for name, _, _ in plan.copied)]
    receipts = tuple(out.finished[name] for name in sorted(order))
    return Summary(
        receipts,
        sum(receipt.notes.get("not_exact", 0) for receipt in receipts),
        sum(receipt.notes.get("not_finite", 0) for receipt in receipts),
        num_resumed,
    )


def _manifest(plan: Plan, checkpoint: Checkpoint, summary: Summary) -> dict[str, Any]:
    """Nothing in it names a machine, a path, a user or a time: equal inputs give equal bytes."""
    tensors = {file.name: len(file.tensors) for file in plan.files}
    return {
        "format": 1,
        "tool": f"dsv4ckpt {__version__}",
        "plan_sha256": plan.sha256,
        "release": plan.release,
        "options": plan.describe_options(),
        "source": [
            {
                "file": name,
                "size": size,
                "header_sha256": sha256,
                "sample_sha256": checkpoint.sample_sha256(name),
            }
            for name, size, sha256 in plan.source
        ],
        "files": [
            {"file": r.name, "size": r.size, "sha256": r.sha256, "tensors": tensors.get(r.name, 0)}
            for r in summary.files
        ],
        "values": {
            "unchanged_tensors": plan.num_unchanged,
            "not_exact": summary.num_inexact,
            "not_finite": summary.num_not_finite,
        },
        "opaque": list(plan.opaque),
        "dropped": [{"name": d.name, "reason": d.reason, "size": d.size} for d in plan.dropped],
        "left": [{"name": item.name, "reason": item.left} for item in plan.left],
    }
