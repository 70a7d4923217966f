"""dsv4 convert: plan, show or carry out."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from dsv4ckpt import (
    hub,
    hub_source,
    original,
    outbox,
    outdir,
    paper,
    plan,
    scaling,
    source,
    strictjson,
    survey,
)
from dsv4ckpt import sidecar as sidecars
from dsv4ckpt.errors import EXIT_DIFFERENT, EXIT_OK, Usage
from dsv4ckpt.formats import MAX_INDEX_BYTES, SIDECAR_NAME, Target
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.names import Namespace
from dsv4ckpt.original import Original
from dsv4ckpt.plan import ConvertOptions, Plan, ScalePolicy
from dsv4ckpt.stop import StopFlag

from . import relay
from .common import (
    common_options,
    dry_run_option,
    follow_links_option,
    place_in_job,
    ranks_of_this_job,
    stopping_on_signals,
    without_collecting,
    workers_option,
)
from .progress import Progress
from .shelves import least_bytes, pinned, require_room, say_sources, scratch_limit_option, shelves
from .words import Console, LayerList, Size, human, plural, spans, table

if TYPE_CHECKING:
    from dsv4ckpt import run

_SHOWN = 20  # quantized tensors; --json lists all


class Rate(Size):
    """Bytes per second: 5GB/s, or 5GB."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return super().convert(
            value.strip().removesuffix("/s") if isinstance(value, str) else value, param, ctx
        )


def original_options(native: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What goes with the way back to the release. native: the option that asks for it"""
    options = (
        click.option(
            "--source",
            "released",
            type=click.Path(),
            metavar="DIR",
            help=f"{native}: the release that SRC was made from. What is untouched is copied from it, what changed is "
            "measured against it.",
        ),
        click.option(
            "--sidecar",
            type=click.Path(),
            metavar="PATH",
            help=f"{native}: the {SIDECAR_NAME} of the conversion, or its directory.  [default: the one in SRC]",
        ),
        click.option(
            "--scale-policy",
            type=click.Choice([item.value for item in ScalePolicy]),
            default=ScalePolicy.KEEP.value,
            show_default=True,
            help="Scales of blocks that changed. keep: the release's while it fits; fresh: as DeepSeek's quantizer "
            "chooses.",
        ),
        click.option(
            "--allow-lossy", is_flag=True, help="Accept that values are rounded, or that a change vanishes."
        ),
    )

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda inner, option: option(inner), reversed(options), command)

    return decorated


@click.command("convert")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--to",
    "target",
    type=click.Choice([item.value for item in Target]),
    required=True,
    help="Storage format of DST. native: as the release has it; fp8: for SGLang; fp8-f32scale: for vLLM; "
    "nvfp4: ModelOpt's; mxfp4-ct: compressed-tensors'.",
)
@click.option(
    "--names",
    "namespace",
    type=click.Choice([item.value for item in Namespace]),
    default=Namespace.DEEPSEEK.value,
    show_default=True,
    help="What tensors are called in DST. transformers: its v5 parameter names, experts fused.",
)
@click.option(
    "--layers",
    type=LayerList(),
    metavar="0-3",
    help="Only these layers, renumbered: a smaller model that runs.",
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="MTP or DSpark stages.",
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE")
@scratch_limit_option
@click.option(
    "--work",
    type=click.Path(),
    metavar="DIR",
    help="hf:// as DST: the directory that shards go through; it is removed at the end.  [default: NAME.partial]",
)
@click.option(
    "--private", is_flag=True, help="hf:// as DST: make it a private repository; one that is there must be."
)
@workers_option("Shards")
@dry_run_option
@click.option(
    "--bandwidth",
    type=Rate(),
    metavar="RATE",
    help="--dry-run: predict the time; RATE, such as 5GB/s, is what the file system gives to all ranks together, "
    "reading and writing added.",
)
@click.option(
    "--ranks",
    "num_ranks",
    type=click.IntRange(1, 65536),
    metavar="N",
    help="--dry-run: of so many processes under torchrun, each with --workers cores.  [default: 1]",
)
@click.option("--allow-nan", multiple=True, metavar="NAME", help="Accept NaN and infinities in this tensor.")
@click.option(
    "--unit-scale", multiple=True, metavar="NAME", help="This FP8 weight has no scales: take them as 1."
)
@original_options("--to native")
@click.option("--accept-changes", is_flag=True, help="SRC was edited after its conversion, on purpose.")
@click.option(
    "--input-scales",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="--to nvfp4: JSON of activation scales, {tensor name: number}.  [default: all 1.0]",
)
@follow_links_option
@common_options
def command(
    src: str,
    dst: str,
    target: str,
    namespace: str,
    layers: tuple[int, ...] | None,
    mtp: str,
    max_shard_size: int,
    scratch_limit: int,
    work: str | None,
    private: bool,
    workers: int,
    dry_run: bool,
    bandwidth: int | None,
    num_ranks: int | None,
    allow_nan: tuple[str, ...],
    unit_scale: tuple[str, ...],
    released: str | None,
    sidecar: str | None,
    scale_policy: str,
    accept_changes: bool,
    allow_lossy: bool,
    input_scales: str | None,
    follow_links: bool,
    console: Console,
) -> int:
    """Convert the checkpoint SRC into the new directory DST. Either may be on the Hub: hf://owner/name[@revision].

    Every value is exact, or the command refuses; F32 and integer tensors stay what they are; nothing is dropped
    unless you say so. A conversion remembers what values do not tell, so that --to native makes the released bytes
    again. Memory stays below 1 GB for any checkpoint. Stop it at any time: the same command continues.

    Under torchrun the ranks share the work; DST is on a file system that all of them see. To plan such a job without
    the files, SRC may be release:NAME, with --dry-run.

    \b
    Examples:
      dsv4 convert DeepSeek-V4-Flash bf16 --to bf16
      dsv4 convert bf16 again --to native
      dsv4 convert tuned out --to native --source DeepSeek-V4-Flash
      dsv4 convert DeepSeek-V4-Flash out --to nvfp4
      dsv4 convert DeepSeek-V4-Flash out --to bf16 --names transformers
      dsv4 convert DeepSeek-V4-Flash tiny --to bf16 --layers 0-3 --mtp drop
      torchrun --nproc-per-node 4 -m dsv4cli convert DeepSeek-V4-Pro bf16 --to bf16
      dsv4 convert hf://deepseek-ai/DeepSeek-V4-Flash small --to bf16 --layers 0-3 --mtp drop
      dsv4 convert hf://deepseek-ai/DeepSeek-V4-Flash hf://me/flash-bf16 --to bf16 --scratch-limit 30GB
      dsv4 convert release:pro-base bf16 --to bf16 --dry-run --bandwidth 5GB/s --ranks 64
    """
    options = ConvertOptions(
        target=Target(target),
        namespace=Namespace(namespace),
        layers=layers,
        keep_mtp=mtp == "keep",
        max_shard_bytes=max_shard_size,
        allow_nan=frozenset(allow_nan),
        unit_scales=frozenset(unit_scale),
        scale_policy=ScalePolicy(scale_policy),
        input_scales=None if input_scales is None else _input_scales(input_scales),
        allow_lossy=allow_lossy,
    )
    require_native(options.target, "--to native", released, sidecar)
    if not dry_run and (bandwidth or num_ranks):
        raise Usage("--bandwidth and --ranks go with --dry-run", do="leave them out; torchrun starts ranks")
    on_paper = src.startswith(paper.PREFIX)
    if on_paper and not dry_run:
        raise Usage(
            f"{src[:80]!r} stands for a release without its files: there is nothing to convert",
            do="add --dry-run, or name a directory",
        )
    if os.path.realpath(src) == os.path.realpath(dst):
        raise Usage("DST is SRC: nothing is converted in place", do="name a new directory")
    relay.require_another(src, dst)
    goes_to_hub = dst.startswith(hub.PREFIX)
    if (work or private) and not goes_to_hub:
        raise Usage("--work and --private go with hf:// as DST", do="leave them out")
    at = (work or relay.default_work(dst)) if goes_to_hub else dst
    with without_collecting():
        if on_paper:
            checkpoint: source.Checkpoint = paper.on_paper(src.removeprefix(paper.PREFIX))
        else:
            pinned_src = pinned(src, at, waits_there=goes_to_hub)
            checkpoint = hub_source.open_checkpoint(pinned_src, follow_links=follow_links)
        known = None if on_paper else original_of(src, checkpoint, released, sidecar, options, follow_links)
        made = plan.make_plan(survey.survey(checkpoint, unit_scales=options.unit_scales), options, known)
    job = Job(made, checkpoint, at, workers, scratch_limit, accept_changes=accept_changes)
    if dry_run:
        predicted = None
        if bandwidth or num_ranks:
            predicted = scaling.predict(made, num_ranks or 1, workers, bandwidth)
        return show_plan(job, console, predicted, needs_space=not on_paper, goes_to_hub=goes_to_hub)
    if goes_to_hub:
        return to_hub(job, dst, private=private, console=console)
    following = f"dsv4 verify {src} {dst} --level values"
    return carry_out(job, console, following=following)


def require_native(target: Target, native: str, released: str | None, sidecar: str | None) -> None:
    """raises Usage"""
    if (released or sidecar) and target is not Target.NATIVE:
        raise Usage(f"--source and --sidecar go with {native}", do="leave them out")


def _input_scales(path: str) -> dict[str, float]:
    """Activation scales from a JSON object of numbers. raises Usage"""
    with open(path, "rb") as file:
        data = file.read(MAX_INDEX_BYTES + 1)
    try:
        scales = strictjson.loads(data[:MAX_INDEX_BYTES], floats=True)
    except strictjson.Malformed as error:
        raise Usage(
            f"--input-scales is no JSON: {error}", file=os.path.basename(path), do="write it anew"
        ) from None
    numbers = isinstance(scales, dict) and all(
        type(value) in (int, float) and value > 0 for value in scales.values()
    )
    if not numbers:
        raise Usage(
            "--input-scales is no object of numbers above zero",
            file=os.path.basename(path),
            expected='{"layers.0.ffn.experts.0.w1.input_scale": 0.5, ...}',
        )
    return {name: float(value) for name, value in scales.items()}


def original_of(
    src: str,
    checkpoint: source.Checkpoint | None,
    released: str | None,
    sidecar: str | None,
    options: ConvertOptions,
    follow_links: bool,
) -> Original | None:
    """What is at hand of the release that SRC was made from. checkpoint: SRC, opened"""
    if options.target is not Target.NATIVE:
        return None
    if released:
        release = hub_source.open_checkpoint(released, follow_links=follow_links)
        return original.of_source(survey.survey(release, unit_scales=options.unit_scales))
    at = sidecar or (checkpoint.sidecar_path if isinstance(checkpoint, HubCheckpoint) else src)
    found = sidecars.open_sidecar(at, follow_links=follow_links) if at else None
    if found is None and sidecar:
        raise Usage(
            f"there is no {SIDECAR_NAME} there", found=repr(sidecar), do="name the conversion's directory"
        )
    return original.of_sidecar(found) if found else None


def show_plan(
    job: Job,
    console: Console,
    predicted: scaling.Prediction | None = None,
    *,
    needs_space: bool = True,
    goes_to_hub: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """
    needs_space   DST is where the output will go, and not only a word
    goes_to_hub   no more than the window is here at a time
    more          for the JSON document
    """
    made, limit = job.made, job.scratch_limit
    _say_plan(made, console, files=predicted is None)
    fetching = say_sources(made, job.checkpoint, limit, console)
    if goes_to_hub:
        relay.windows(made, least_bytes(made, job.checkpoint), limit)
        num_bytes = min(limit, made.total_bytes + fetching.num_bytes)
    else:
        require_room(made, job.checkpoint, limit)
        num_bytes = made.total_bytes + min(limit, fetching.num_bytes)
    needed, free = outdir.space_needed(num_bytes), outdir.free_bytes(job.at)
    console.say(f"  space     {needed:,} bytes needed, {free:,} free")
    if predicted:
        _say_prediction(predicted, console)
    document = {**made.document(), "plan_sha256": made.sha256, "bytes": made.total_bytes}
    for file in document["files"]:
        del file["steps"]
    left = [{"name": item.name, "reason": item.left} for item in made.left]
    document |= {"left": left, "space": {"needed": needed, "free": free}, **fetching.document, **more}
    console.document(document | ({"prediction": _prediction_document(predicted)} if predicted else {}))
    if needs_space:
        outdir.require_space(job.at, num_bytes)
    console.say("nothing was written: this was a dry run")
    return EXIT_OK


def _say_prediction(predicted: scaling.Prediction, console: Console) -> None:
    loads = predicted.loads
    least, most = min(loads), max(loads)
    idle = sum(not load.bytes_out for load in loads)
    if len(loads) == 1:
        console.say(f"  rank      reads {human(most.bytes_in)}, writes {human(most.bytes_out)}")
    else:
        console.say(f"  ranks     {len(loads):,}; the least loaded reads {human(least.bytes_in)} and writes "
                    f"{human(least.bytes_out)}, the most loaded {human(most.bytes_in)} and {human(most.bytes_out)}"
                    + (f"; {idle:,} have nothing to do" if idle else ""))  # fmt: skip
    data = "unknown without --bandwidth" if predicted.data is None else f"{predicted.data:,.0f} s"
    console.say(f"  time      {predicted.seconds:,.0f} s: start {predicted.start:,.0f} s, then the longer of data "
                f"({data}) and computing ({predicted.cpu:,.0f} s), finish {predicted.finish:,.0f} s")  # fmt: skip
    console.say(f"  limit     {predicted.bottleneck}")


def _prediction_document(predicted: scaling.Prediction) -> dict[str, Any]:
    loads = predicted.loads
    return {
        "ranks": len(loads),
        "bytes_in": {
            "least": min(load.bytes_in for load in loads),
            "most": max(load.bytes_in for load in loads),
        },
        "bytes_out": {
            "least": min(load.bytes_out for load in loads),
            "most": max(load.bytes_out for load in loads),
        },
        "seconds": {
            "start": predicted.start,
            "data": predicted.data,
            "cpu": predicted.cpu,
            "finish": predicted.finish,
            "total": predicted.seconds,
        },
        "limit": predicted.bottleneck,
    }


def _say_plan(made: Plan, console: Console, *, files: bool) -> None:
    options = made.options
    what = "DCP file" if options.chunk_bytes else "shard"
    console.say(f"{made.release} ({made.storage}) -> {made.target}, {options.namespace} names", bold=True)
    console.say(f"  output    {plural(len(made.files), what)}, {plural(made.num_tensors, 'tensor')}, "
                f"{made.total_bytes:,} bytes ({human(made.total_bytes)})")  # fmt: skip
    console.say(f"  copied    {plural(made.num_unchanged, 'tensor')} byte for byte, the others recoded")
    if made.original:
        console.say(f"  original  {made.original.what}; shards {made.layout}")
    elif made.remembered:
        console.say(f"  sidecar   {SIDECAR_NAME} remembers what the way back needs")
    if options.layers is not None:
        console.say(f"  layers    {spans(options.layers)}, renumbered from 0")
    for reason, count in Counter(item.reason for item in made.dropped).items():
        size = sum(item.size for item in made.dropped if item.reason == reason)
        console.say(f"  left out  {plural(count, 'tensor')}, {human(size)}, by {reason}")
    if made.borrowed:
        console.say(
            f"  draft     {plural(len(made.borrowed), 'tensor')} that SRC lacks come from the release"
        )
    if made.opaque:
        console.say(
            f"  opaque    {plural(len(made.opaque), 'tensor')} of the vision side, carried as they are"
        )
    if made.copied:
        console.say(f"  carried   {', '.join(name for name, _, _ in made.copied)}")
    for item in made.left:
        console.say(f"  not taken {item.name!r}: {item.left}")
    if files:
        rows = [("file", "tensors", "bytes", "")]
        rows += [(file.name, f"{len(file.tensors):,}", f"{file.size:,}", "") for file in made.files]
        rows += [(name, "", f"{len(data):,}", "") for name, data in made.written.items()]
        console.say(table(rows))


class Job(NamedTuple):
    """A plan, and how it is carried out. `at`: the directory that is written"""

    made: Plan
    checkpoint: source.Checkpoint
    at: str
    workers: int
    scratch_limit: int  # bytes that are fetched, and that wait to be sent, at a time
    verb: str = "convert"
    accept_changes: bool = False


def carry_out(
    job: Job, console: Console, *, following: str, more: Mapping[str, Any] = MappingProxyType({})
) -> int:
    """Execute a plan, and say what came of it. following: what to do next. more: for the JSON document"""
    _say_plan(job.made, console, files=console.verbose)
    say_sources(job.made, job.checkpoint, job.scratch_limit, console)
    stop = StopFlag()
    with _progress(job, console) as progress, stopping_on_signals(stop):
        summary = _executed(job, job.scratch_limit, None, progress, stop)
    console.document({**_document(job.made, summary, job.at, progress), **more})
    _say_done(job, summary, job.at, progress, console)
    console.say(f"next: {following}")
    return EXIT_OK


def to_hub(job: Job, dst: str, *, private: bool, console: Console) -> int:
    """Execute a plan onto the Hub, shard by shard, and say what came of it."""
    made, checkpoint = job.made, job.checkpoint
    relay.require_alone()
    _say_plan(made, console, files=console.verbose)
    say_sources(made, checkpoint, job.scratch_limit, console)
    room = relay.windows(made, least_bytes(made, checkpoint), job.scratch_limit)
    goal = relay.reached(dst, job.at, made, checkpoint, private=private, console=console)
    if relay.is_complete(goal, made, checkpoint):
        relay.tidy(goal, made.sha256)
        console.document({"repo": goal.repo.name, "revision": goal.repo.revision, "ok": True})
        console.say(f"{dst} was complete already: nothing to do")
        return EXIT_OK
    relay.tidy_lost(goal, made.sha256)
    stop = StopFlag()
    with _progress(job, console) as progress:
        opened = relay.window(goal, room.finished, stop, progress.sent, console)
        with stopping_on_signals(stop), opened as outlet:
            summary = _executed(job, room.fetched, outlet, progress, stop)
        pushed = relay.finish(goal, progress.sent)  # a signal ends that at once
    console.document(
        {**_document(made, summary, job.at, progress), "directory": dst, **relay.document(pushed, goal)}
    )
    _say_done(job, summary, dst, progress, console)
    relay.say_pushed(pushed, goal, console)
    if not pushed.ok:
        console.say("NOT the same", bold=True)
        return EXIT_DIFFERENT
    console.say(f"next: dsv4 verify {dst}")
    return EXIT_OK


def _progress(job: Job, console: Console) -> Progress:
    size = place_in_job().size
    what = job.verb if size == 1 else f"{job.verb}, rank 0 of {size:,}"
    return Progress(what, quiet=console.quiet)


def _executed(
    job: Job, fetched_limit: int, outlet: outbox.Outbox | None, progress: Progress, stop: StopFlag
) -> run.Summary:
    """Carry out the plan, with progress."""
    from dsv4ckpt import run  # brings torch

    def on_event(event: run.Event) -> None:
        if isinstance(event, run.Started):
            progress.start(event.total_bytes, event.done_bytes)
        elif isinstance(event, run.Wrote):
            progress.advance(event.num_bytes)

    shelf = shelves(job.made, job.checkpoint, job.at, fetched_limit, stop, progress)
    with ranks_of_this_job() as ranks, shelf:
        return run.execute(
            job.made,
            job.checkpoint,
            job.at,
            num_workers=job.workers,
            accept_changes=job.accept_changes,
            on_event=on_event,
            stop=stop,
            ranks=ranks,
            outlet=outlet,
        )


def _say_done(job: Job, summary: run.Summary, dst: str, progress: Progress, console: Console) -> None:
    made = job.made
    if summary.was_complete:
        console.say(f"{dst} was complete already: nothing to do")
    else:
        kept = (
            f"; {plural(summary.num_resumed, 'shard')} kept from the run before"
            if summary.num_resumed
            else ""
        )
        size = place_in_job().size
        by = "" if size == 1 else f" by each of {size:,} ranks"
        console.say(f"done in {progress.seconds:.1f} s, {human(progress.rate)}/s{by}{kept}")
    if made.original and not summary.was_complete:
        console.say(
            f"{plural(summary.num_untouched, 'tensor')} came out as the release has them, "
            f"{summary.num_changed:,} had changed"
        )
    _say_losses(summary.losses, console)
    if summary.num_inexact:
        console.say(
            f"{summary.num_inexact:,} values were rounded: the codes or BF16 cannot hold them exactly"
        )
    if summary.num_not_finite:
        console.say(
            f"{summary.num_not_finite:,} values are NaN or infinite, in tensors that --allow-nan names"
        )
    side = next((item for item in summary.files if item.name == SIDECAR_NAME), None)
    if side and made.remembered:
        share = side.size / sum(size for _, size, _ in made.source)
        console.say(f"{SIDECAR_NAME}: {human(side.size)}, {share:.3%} of the source; --to native needs it")


def _say_losses(losses: tuple[Any, ...], console: Console) -> None:
    """The worst of the tensors that were quantized anew."""
    lossy = [loss for loss in losses if loss.num_inexact]
    if not losses:
        return
    console.say(f"{plural(len(losses), 'tensor')} quantized anew, {len(lossy):,} of them with loss")
    if not lossy:
        return
    worst = sorted(
        lossy, key=lambda loss: (loss.kept_share is None, loss.kept_share or 0.0, -loss.relative_error)
    )
    rows = [("tensor", "same blocks", "relative error", "kept delta", "")]
    for loss in worst[:_SHOWN]:
        same, kept = loss.num_same_blocks / max(1, loss.num_blocks), loss.kept_share
        told = "not measured" if kept is None else f"{kept:.1%}"
        rows.append((loss.name, f"{same:.1%}", f"{loss.relative_error:.2e}", told, ""))
    console.say(table(rows))
    if len(lossy) > _SHOWN:
        console.say(f"  ... and {len(lossy) - _SHOWN:,} more; --json lists all")


def _loss_document(loss: Any) -> dict[str, Any]:
    return {
        "name": loss.name,
        "same_blocks": loss.num_same_blocks / max(1, loss.num_blocks),
        "rounded_values": loss.num_inexact,
        "relative_error": loss.relative_error,
        "kept_delta": loss.kept_share,
    }


def _document(made: Plan, summary: Any, dst: str, progress: Progress) -> dict[str, Any]:
    return {
        "directory": dst,
        "release": made.release,
        "plan_sha256": made.sha256,
        "bytes": made.total_bytes,
        "tensors": made.num_tensors,
        "files": [{"file": item.name, "size": item.size, "sha256": item.sha256} for item in summary.files],
        "resumed": summary.num_resumed,
        "not_exact": summary.num_inexact,
        "not_finite": summary.num_not_finite,
        "untouched": summary.num_untouched,
        "changed": summary.num_changed,
        "quantized": [_loss_document(loss) for loss in summary.losses],
        "dropped": len(made.dropped),
        "opaque": len(made.opaque),
        "seconds": round(progress.seconds, 3),
    }
