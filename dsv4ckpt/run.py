"""Executes a Plan: read -> decode -> write, one worker per output shard.  The only module that sees all the others.

Order comes from the plan, never from the disk, a dict or a thread: equal plans and sources give equal bytes for any
number of workers and of ranks.  Memory is bounded by workers x (slabs + one chunk), whatever the sizes of tensors and
shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import __version__, contained, formats, outdir, probe, prove, sidecar, strictjson, torchfile
from .desk import Desk, Rules
from .errors import LEAVE_SOURCE_ALONE, Environment, ForeignOutput, SourceChanged, VanishingChange
from .formats import (
    CARD_NAME,
    DCP_METADATA_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    OUR_NAMES,
    SIDECAR_NAME,
    SUMS_NAME,
    WORK_NAME,
    Kind,
)
from .inputs import Inputs
from .manifest import manifest_of, read_manifest
from .outdir import OutDir
from .plan import Plan
from .ranks import ALONE, Ranks, share
from .release import RELEASES
from .roundtrip import Knowledge, Loss, SidecarKnowledge, SourceKnowledge, loss_of_row
from .sidecar import PartWriter
from .sink import Receipt, io_errors
from .source import Checkpoint, Reader
from .steps import PlannedFile
from .stop import StopFlag, all_of
from .threads import one_torch_thread
from .work import Worker

_LEAST_KEPT = 0.5  # of a change: what keeps less is refused
_MOST_LOOKS, _LOOK_SECONDS = 100, 1.0  # at what another rank wrote: longer than network file systems remember


@dataclass(frozen=True)
class Started:
    """The work that lies ahead of this rank. `done_bytes` were finished by an earlier run, and are counted in."""

    total_bytes: int
    done_bytes: int
    num_files: int
    num_done: int
    shares: tuple[tuple[PlannedFile, ...], ...] = ()  # what every rank will write, in its order


@dataclass(frozen=True)
class Wrote:
    """More output bytes are on their way to the disk."""

    num_bytes: int


@dataclass(frozen=True)
class FileDone:
    """A file stands under its final name."""

    receipt: Receipt


Event = Started | Wrote | FileDone


class Outlet(Protocol):
    """Takes finished shards away, so that not all of them need be on this disk."""

    @property
    def limit(self) -> int:
        """Bytes of shards that may be here."""

    def make_room(self, size: int) -> None:
        """Return when a shard of this size may be begun. raises what went wrong on the way out"""

    def take(self, receipt: Receipt) -> None:
        """Take a finished shard over: it may vanish from here at any time."""

    def take_up(self, receipt: Receipt) -> None:
        """The same of one that an earlier run finished, unless it is where it goes."""

    def finish(self) -> None:
        """Return when all that was taken is where it goes. raises what went wrong"""

    def has(self, receipt: Receipt) -> bool:
        """Whether the very bytes are where they go."""


@dataclass(frozen=True)
class Summary:
    """What came of a run."""

    files: tuple[Receipt, ...]
    num_inexact: int  # values that the output could not hold exactly
    num_not_finite: int  # NaN or infinities in tensors that --allow-nan names
    num_resumed: int  # files that an earlier run had finished
    num_untouched: int = 0  # tensors that are what the original had
    num_changed: int = 0  # and those that are not
    losses: tuple[Loss, ...] = ()  # of tensors that were quantized
    was_complete: bool = False  # an earlier run had finished all of it


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    path: str,
    *,
    num_workers: int = 2,
    accept_changes: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: StopFlag | None = None,
    ranks: Ranks = ALONE,
    outlet: Outlet | None = None,
) -> Summary:
    """Carry out a plan into a directory, or continue where an earlier run of the same plan stopped.

    accept_changes  the source's manifest may say other values than there are
    on_event        called from worker threads
    ranks           of a job whose every rank calls this with the same plan and path; bytes are those of one
    outlet          takes shards away once they are finished; alone only
    returns         on rank 0 the whole; on other ranks, what was done before and what they did themselves
    raises          NoSpace before the first byte if the output does not fit, NotLossless if scales alone tell that it
                    would lose values; Busy, ForeignOutput, SourceChanged, Interrupted: finished files stay, temporary
                    ones are removed; NotFinite, NotLossless, EditedOutput, BadSidecar from the tensors' bytes: nothing
                    stays; VanishingChange: everything stays but index, config and manifest; Environment: also if
                    another rank is gone
    """
    stop = stop or StopFlag()
    assert outlet is None or ranks.size == 1
    complete = _already_complete(plan, checkpoint, path, outlet)
    try:
        with one_torch_thread():  # parallelism is across shards
            if complete is None:
                if ranks.rank == 0:
                    _require_space(plan, checkpoint, path, plan.files, _finished_bytes(path, plan), outlet)
                prove.require_lossless(plan, checkpoint, stop, share(plan.files, ranks.size)[ranks.rank])
            ranks.meet(stop)  # what one rank refuses, none begins
            is_complete = complete is not None
            with _opened(plan, checkpoint, path, ranks, stop, outlet, is_complete=is_complete) as out:
                if out is not None:
                    rules = _rules(plan, checkpoint, accept_changes)
                    run = _Run(plan, checkpoint, out, rules, on_event, stop, outlet)
                    return _carry_out(run, ranks, num_workers)
    except (Environment, ForeignOutput):
        # another run of this plan may have ended just before ours began or, where locks lie, while it worked
        complete = _already_complete(plan, checkpoint, path, outlet)
        if complete is None:
            raise
        return complete
    complete = complete or _already_complete(plan, checkpoint, path, outlet)
    assert complete is not None
    on_event(Started(plan.shard_bytes, plan.shard_bytes, len(plan.files), len(plan.files)))
    return complete


@contextlib.contextmanager
def _opened(
    plan: Plan,
    checkpoint: Checkpoint,
    path: str,
    ranks: Ranks,
    stop: StopFlag,
    outlet: Outlet | None,
    *,
    is_complete: bool,
) -> Iterator[OutDir | None]:
    """The output directory: rank 0 opens it, then the others join. None if rank 0 found it complete."""
    known = {file.name for file in plan.files} | set(plan.written) | {name for name, _, _ in plan.copied}
    known |= {SUMS_NAME} | ({SIDECAR_NAME} if plan.remembered or plan.carries_sidecar else set())
    if ranks.rank == 0 and is_complete:
        ranks.meet(stop)
        yield None
    elif ranks.rank == 0:
        is_elsewhere = outlet.has if outlet else None
        stamps = _stamps(plan, checkpoint)
        with outdir.open_outdir(path, plan.sha256, known, stamps, is_elsewhere) as out:
            if checkpoint.origin:
                out.pin(" ".join(checkpoint.origin.values()))
            if ranks.size > 1:
                out.share()
                ranks.meet(stop)
            yield out
    else:
        ranks.meet(stop)
        if not _seen(
            lambda: outdir.is_claimed(path) or probe.is_there(os.path.join(path, MANIFEST_NAME)), stop
        ):
            raise Environment(
                "this rank does not see the directory that rank 0 writes into",
                do="name a directory on a file system that all ranks share",
            )
        if not outdir.is_claimed(path) and _already_complete(plan, checkpoint, path, outlet):
            yield None
            return
        with outdir.join_outdir(path, plan.sha256, known, _stamps(plan, checkpoint), ranks.rank) as out:
            yield out


def _seen(look: Callable[[], bool], stop: StopFlag) -> bool:
    """Whether it comes to be seen: a network file system may show for a minute what was there before."""
    pause = threading.Event()
    for _ in range(_MOST_LOOKS):
        if look():
            return True
        stop.check()
        pause.wait(_LOOK_SECONDS)
    return look()


def _carry_out(run: _Run, ranks: Ranks, num_workers: int) -> Summary:
    """Every rank its share of the files; then rank 0 what is made of all of them."""
    plan, out, stop = run.plan, run.out, run.stop
    waiting = [item for item in enumerate(plan.files) if not _is_done(item, run)]
    done = len(plan.files) - len(waiting)
    done_bytes = plan.shard_bytes - sum(file.size for _, file in waiting)
    if ranks.rank == 0:
        files = [file for _, file in waiting]
        _require_space(plan, run.checkpoint, out.path, files, done_bytes, run.outlet)
    ranks.meet(stop)  # nobody writes before all have seen the same files finished
    shares = share([file for _, file in waiting], ranks.size)
    names = {file.name for file in shares[ranks.rank]}
    ours = [item for item in waiting if item[1].name in names]
    our_bytes = sum(file.size for _, file in ours)
    run.expect([file for _, file in ours])
    run.on_event(
        Started(done_bytes + our_bytes, done_bytes, done + len(ours), done, tuple(map(tuple, shares)))
    )
    if run.outlet:
        unfinished = {file.name for _, file in waiting}
        for file in plan.files:
            if file.name not in unfinished:
                run.outlet.take_up(out.finished[file.name])
    _run_jobs(ours, run, num_workers)
    if run.outlet:
        run.outlet.finish()
    ranks.meet(stop)
    if ranks.rank:
        summary = Summary(tuple(receipt for _, receipt in sorted(out.finished.items())), 0, 0, done)
    else:
        summary = _completed(run, ranks, done)
    ranks.meet(stop)
    return summary


def _completed(run: _Run, ranks: Ranks, num_resumed: int) -> Summary:
    """All shards are there: everything else, and the manifest."""
    plan, out = run.plan, run.out
    if ranks.size > 1:
        _gather(run)
    losses = _losses(out)
    _require_kept(plan, losses)
    _write_sidecar(run)
    _write_small(plan, run.checkpoint, out)
    write_sums(out)
    summary = _summarize(plan, out, num_resumed, losses)
    out.finish(strictjson.pretty(_manifest(plan, run.checkpoint, summary)))
    return summary


def _gather(run: _Run) -> None:
    """Read what the other ranks wrote down. raises Environment if it does not come to be seen"""
    names = {file.name for file in run.plan.files}

    def look() -> bool:
        with io_errors(WORK_NAME):
            run.out.read_journals()
        return names <= run.out.finished.keys()

    if not _seen(look, run.stop):
        missing = sorted(names - run.out.finished.keys())
        raise Environment(
            "rank 0 does not see what another rank has written",
            file=missing[0],
            do="see that all ranks share one file system; the same command continues",
        )


def _stamps(plan: Plan, checkpoint: Checkpoint) -> str:
    """Which very files are read. The original decides bytes as much as the source does."""
    stamps = checkpoint.stamps_sha256()
    if plan.original and plan.original.survey:
        both = stamps + plan.original.survey.checkpoint.stamps_sha256()
        stamps = hashlib.sha256(both.encode()).hexdigest()
    return stamps


@dataclass(frozen=True)
class _Run:
    """What every worker of a run needs."""

    plan: Plan
    checkpoint: Checkpoint
    out: OutDir
    rules: Rules
    on_event: Callable[[Event], None]
    stop: StopFlag
    outlet: Outlet | None

    def expect(self, files: list[PlannedFile]) -> None:
        """Say which shards these files will need, and how often."""
        uses = Counter(name for file in files for name in file.shards_read(self.checkpoint))
        self.checkpoint.expect(uses)
        original = self.plan.original
        if original and original.survey:
            uses = Counter(name for file in files for name in original.shards_read(file))
            original.survey.checkpoint.expect(uses)

    def released(self, stack: contextlib.ExitStack, file: PlannedFile) -> Reader | None:
        """Reads the release, for one worker."""
        original = self.plan.original
        if original is None or original.survey is None:
            return None
        return stack.enter_context(original.survey.checkpoint.reader(original.shards_read(file)))

    def knowledge(self, released: Reader | None) -> Knowledge | None:
        """What the original says, for one worker."""
        original = self.plan.original
        if original is None:
            return None
        if original.sidecar:
            return SidecarKnowledge(original.sidecar)
        assert original.survey is not None and released is not None
        return SourceKnowledge(original.survey, released)


def _rules(plan: Plan, checkpoint: Checkpoint, accept_changes: bool) -> Rules:
    options = plan.options
    manifest = manifest_of(checkpoint)
    return Rules(
        allow_nan=options.allow_nan,
        allow_lossy=options.allow_lossy,
        scale_policy=options.scale_policy,
        float_scales=formats.QUANTS[RELEASES[plan.release].storage][Kind.DENSE].scale == "F32",
        is_vouched=manifest is not None and not manifest.is_of_a_model and not accept_changes,
    )


def _require_space(
    plan: Plan,
    checkpoint: Checkpoint,
    path: str,
    files: Sequence[PlannedFile],
    done_bytes: int,
    outlet: Outlet | None,
) -> None:
    """For what is still to be written, and what is brought here to make these files. raises NoSpace"""
    shards = plan.shard_bytes - done_bytes
    if outlet:
        shards = min(shards, outlet.limit)
    scratch = checkpoint.scratch_bytes(name for file in files for name in file.shards_read(checkpoint))
    original = plan.original
    if original and original.survey:
        names = (name for file in files for name in original.shards_read(file))
        scratch += original.survey.checkpoint.scratch_bytes(names)
    outdir.require_space(path, shards + plan.total_bytes - plan.shard_bytes + scratch)


def _finished_bytes(path: str, plan: Plan) -> int:
    """What an earlier run may have finished: a first, generous look at the space before anything is proven."""
    sizes = (contained.size_of(path, file.name, follow_links=False) for file in plan.files)
    return sum(size for size in sizes if size) if probe.is_directory(path) else 0


def _is_done(item: tuple[int, PlannedFile], run: _Run) -> bool:
    """Whether an earlier run finished a shard, and what its sidecar part says of it is there."""
    number, file = item
    receipt = run.out.finished.get(file.name)
    if receipt is None or run.plan.remembered is None or SIDECAR_NAME in run.out.finished:
        return receipt is not None
    if run.out.part_sha256(_part_name(number)) == receipt.notes.get("part_sha256"):
        return True
    run.out.forget(file.name)
    return False


def _losses(out: OutDir) -> tuple[Loss, ...]:
    """Of every tensor that was not untouched, by name."""
    rows = [row for receipt in out.finished.values() for row in receipt.notes.get("losses", [])]
    return tuple(sorted((loss_of_row(row) for row in rows), key=lambda loss: loss.name))


def _require_kept(plan: Plan, losses: tuple[Loss, ...]) -> None:
    """raises VanishingChange if most of what training changed in a tensor would not survive"""
    gone = [loss for loss in losses if loss.kept_share is not None and loss.kept_share < _LEAST_KEPT]
    if not gone or plan.options.allow_lossy:
        return
    worst = min(gone, key=lambda loss: loss.kept_share or 0.0)
    fp8 = worst.kept_fp8 / worst.change
    is_better = fp8 > 2 * (worst.kept_share or 0)
    better = f"--to fp8 --allow-lossy keeps {fp8:.0%} of that one, " if is_better else ""
    raise VanishingChange(
        f"most of what training changed would be lost: {len(gone):,} of {len(losses):,} changed tensors keep less "
        f"than {_LEAST_KEPT:.0%} of their change",
        expected="a change that is larger than the steps between codes",
        found=f"{worst.name!r} keeps {worst.kept_share or 0.0:.1%}",
        do=f"{better}--to bf16 keeps everything, of a LoRA run dsv4 export --adapter too; or finish all the same: "
        "--allow-lossy (what is done so far stays)",
    )


def _write_sidecar(run: _Run) -> None:
    """Join the parts, or take the source's own sidecar along."""
    plan, out = run.plan, run.out
    if SIDECAR_NAME in out.finished:
        return
    if plan.carries_sidecar:
        size = run.checkpoint.size_of(SIDECAR_NAME) or 0
        with out.new_file(SIDECAR_NAME, size) as sink:
            for piece in run.checkpoint.chunks(SIDECAR_NAME):
                sink.write(piece)
    if plan.remembered is None:
        return
    sections = sidecar.fixed_sections(plan.remembered)
    for number in range(len(plan.files)):
        with out.open_part(_part_name(number)) as fd:
            sections += sidecar.sections_of_part(number, fd, os.fstat(fd).st_size)
    header = sidecar.container_header(plan.remembered, sections)
    size = len(header) + sum(section.size for section in sections)
    with out.new_file(SIDECAR_NAME, size) as sink:
        sink.write(header)
        for section in sections:
            run.stop.check()
            if section.data is not None:
                sink.write(section.data)
                continue
            with out.open_part(_part_name(section.part)) as fd:
                sidecar.copy_section(fd, section, sink.write)


def _already_complete(plan: Plan, checkpoint: Checkpoint, path: str, outlet: Outlet | None) -> Summary | None:
    """The summary of a finished output of the same plan and source, tidied up; None if there is work to do."""
    if not probe.is_directory(path):
        return None
    found = read_manifest(path)
    if found is None or found.plan_sha256 != plan.sha256:
        return None
    planned = {(file.name, file.size) for file in plan.files}
    planned |= {(name, len(data)) for name, data in plan.written.items()}
    planned |= {(name, size) for name, size, _ in plan.copied}
    if {(file.name, file.size) for file in found.files if file.name not in OUR_NAMES} != planned:
        return None
    files = tuple(Receipt(*file, {}) for file in found.files)
    for receipt in files:
        is_here = contained.size_of(path, receipt.name, follow_links=False) == receipt.size
        if not is_here and not (outlet and outlet.has(receipt)):
            return None
    for name, proof in found.proofs.items():
        mine = checkpoint.proof(name)
        if mine.keys() != proof.keys():
            raise ForeignOutput(
                "this directory is complete, and its source was read from elsewhere: one of a directory and one of the "
                "Hub are not compared",
                file=name,
                expected=", ".join(mine),
                found=", ".join(proof),
                do="name the same source as before, or choose a new directory",
            )
        if mine != proof:
            raise ForeignOutput(
                "this directory was made from another source with the same headers",
                file=name,
                do="choose a new directory",
            )
    outdir.remove_leftovers(path)
    return Summary(files, found.num_inexact, found.num_not_finite, len(plan.files), was_complete=True)


def _run_jobs(files: list[tuple[int, PlannedFile]], run: _Run, num_workers: int) -> None:
    def job(item: tuple[int, PlannedFile]) -> None:
        number, file = item
        run.stop.check()
        run.on_event(FileDone(_write_shard(file, number, run)))

    all_of(job, files, num_workers, run.stop.fail)


def _write_shard(file: PlannedFile, number: int, run: _Run) -> Receipt:
    with contextlib.ExitStack() as stack:
        if run.outlet:
            run.outlet.make_room(file.size)
        reader = stack.enter_context(run.checkpoint.reader(file.shards_read(run.checkpoint)))
        released = run.released(stack, file)
        part = None
        if run.plan.remembered is not None:
            part = PartWriter(stack.enter_context(run.out.new_part(_part_name(number))))
        sink = run.out.new_file(file.name, file.size, in_order=file.in_order)
        sink.check = run.stop.check
        with sink:
            sink.write(file.header)
            desk = Desk(
                inputs=Inputs(reader),
                sink=sink,
                rules=run.rules,
                on_bytes=lambda count: run.on_event(Wrote(count)),
                stop=run.stop,
                part=part,
                knowledge=run.knowledge(released),
                released=released,
            )
            worker = Worker(desk)
            for tensor in file.tensors:
                if tensor.steps:
                    sink.seek(file.begins[tensor.key])
                if tensor.frame is not None:
                    sink.write(tensor.frame.prefix)
                    sink.crc32 = 0
                for step in tensor.steps:
                    worker.carry_out(step, tensor, file.begins)
                if tensor.frame is not None and sink.crc32 is not None:
                    crc32, sink.crc32 = sink.crc32, None
                    sink.write(torchfile.suffix(tensor.frame, crc32) + bytes(tensor.size - tensor.frame.size))
            sink.notes = desk.notes.document()
            if part is not None:
                sink.notes["part_sha256"] = part.finish()
            stack.close()  # before the shard is there: its part must be, and whatever was read be unchanged
    receipt = run.out.finished[file.name]
    if run.outlet:
        run.outlet.take(receipt)
    return receipt


def _part_name(number: int) -> str:
    return f"{outdir.PART_PREFIX}{number:06d}"


def _write_small(plan: Plan, checkpoint: Checkpoint, out: OutDir) -> None:
    """Index, config and carried files, after all shards."""
    for name, _, sha256 in plan.copied:
        if name not in out.finished:
            data = checkpoint.read_small(name)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise SourceChanged(
                    "this file changed while the command ran",
                    file=name,
                    do=LEAVE_SOURCE_ALONE,
                )
            out.publish_bytes(name, data)
    # torch takes a directory for a checkpoint once its metadata is there
    for name in sorted(plan.written, key=lambda name: (name == DCP_METADATA_NAME, name != INDEX_NAME)):
        if name not in out.finished:
            out.publish_bytes(name, plan.written[name])


def write_sums(out: OutDir) -> None:
    """What `sha256sum -c` reads: every file but this one, the manifest, and what may be another model card."""
    if SUMS_NAME not in out.finished:
        listed = (receipt for name, receipt in sorted(out.finished.items()) if name != CARD_NAME)
        lines = (_sum_line(receipt) for receipt in listed)
        out.publish_bytes(SUMS_NAME, "".join(lines).encode())


def _sum_line(receipt: Receipt) -> str:
    """As coreutils writes it: a backslash in a name is doubled, and told by one before the digits."""
    escaped = receipt.name.replace("\\", "\\\\")
    return f"{chr(92) if escaped != receipt.name else ''}{receipt.sha256}  {escaped}\n"


def _summarize(plan: Plan, out: OutDir, num_resumed: int, losses: tuple[Loss, ...]) -> Summary:
    order = {*(file.name for file in plan.files), *plan.written, *(name for name, _, _ in plan.copied)}
    receipts = tuple(out.finished[name] for name in sorted(order | (out.finished.keys() & {*OUR_NAMES})))

    def total(note: str) -> int:
        return sum(receipt.notes.get(note, 0) for receipt in receipts)

    return Summary(
        receipts,
        total("not_exact") + sum(loss.num_inexact for loss in losses),
        total("not_finite"),
        num_resumed,
        total("untouched"),
        total("changed"),
        losses,
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
        **{f"source_{key}": text for key, text in checkpoint.origin.items()},
        "source": [
            {
                "file": name,
                "size": size,
                "header_sha256": sha256,
                **checkpoint.proof(name),
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
            "as_in_original": summary.num_untouched,
            "changed_since": summary.num_changed,
        },
        "opaque": list(plan.opaque),
        "dropped": [{"name": d.name, "reason": d.reason, "size": d.size} for d in plan.dropped],
        "left": [{"name": item.name, "reason": item.left} for item in plan.left],
    }
