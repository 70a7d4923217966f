"""dsv4 convert: plan, show or carry out."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import click

from dsv4ckpt import outdir, plan, source, survey
from dsv4ckpt.errors import EXIT_OK, NoSpace, Usage
from dsv4ckpt.formats import Storage
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ConvertOptions, Plan

from .common import common_options, follow_links_option, stopping_on_signals, without_collecting
from .progress import Progress
from .words import Console, LayerList, Size, human, plural, spans, table


@click.command("convert")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--to", "target", type=click.Choice([Storage.BF16.value]), required=True, help="Storage format of DST."
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
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Shards at a time; never changes bytes.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, from headers only.")
@click.option("--allow-nan", multiple=True, metavar="NAME", help="Accept NaN and infinities in this tensor.")
@click.option(
    "--unit-scale", multiple=True, metavar="NAME", help="This FP8 weight has no scales: take them as 1."
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
    workers: int,
    dry_run: bool,
    allow_nan: tuple[str, ...],
    unit_scale: tuple[str, ...],
    follow_links: bool,
    console: Console,
) -> int:
    """Convert the checkpoint in SRC into the new directory DST.

    Every value is exact; F32 and integer tensors stay what they are; nothing is dropped unless you say so. Memory
    stays below 1 GB for any checkpoint. Stop it at any time: the same command continues.

    \b
    Examples:
      dsv4 convert DeepSeek-V4-Flash out --to bf16
      dsv4 convert DeepSeek-V4-Flash out --to bf16 --names transformers
      dsv4 convert DeepSeek-V4-Flash tiny --to bf16 --layers 0-3 --mtp drop
    """
    options = ConvertOptions(
        target=Storage(target),
        namespace=Namespace(namespace),
        layers=layers,
        keep_mtp=mtp == "keep",
        max_shard_bytes=max_shard_size,
        allow_nan=frozenset(allow_nan),
        unit_scales=frozenset(unit_scale),
    )
    if os.path.realpath(src) == os.path.realpath(dst):
        raise Usage("DST is SRC: nothing is converted in place", do="name a new directory")
    with without_collecting():
        checkpoint = source.open_checkpoint(src, follow_links=follow_links)
        made = plan.make_plan(survey.survey(checkpoint, unit_scales=options.unit_scales), options)
    if dry_run:
        return _dry_run(made, dst, console)
    return _carry_out(made, checkpoint, src, dst, workers, console)


def _dry_run(made: Plan, dst: str, console: Console) -> int:
    needed, free = plan.space_needed(made.total_bytes), outdir.free_bytes(dst)
    _say_plan(made, console, files=True)
    console.say(f"  space     {needed:,} bytes needed, {free:,} free")
    document = {**made.document(), "plan_sha256": made.sha256, "bytes": made.total_bytes}
    for file in document["files"]:
        del file["steps"]
    left = [{"name": item.name, "reason": item.left} for item in made.left]
    console.document({**document, "left": left, "space": {"needed": needed, "free": free}})
    if free < needed:
        raise NoSpace(
            "not enough room for the output", expected=f"{needed:,} bytes", found=f"{free:,} bytes free"
        )
    console.say("nothing was written: this was a dry run")
    return EXIT_OK


def _say_plan(made: Plan, console: Console, *, files: bool) -> None:
    options = made.options
    console.say(f"{made.release} ({made.storage}) -> {options.target}, {options.namespace} names", bold=True)
    console.say(f"  output    {plural(len(made.files), 'shard')}, {plural(made.num_tensors, 'tensor')}, "
                f"{made.total_bytes:,} bytes ({human(made.total_bytes)})")  # fmt: skip
    console.say(f"  copied    {plural(made.num_unchanged, 'tensor')} byte for byte, the others decoded")
    if options.layers is not None:
        console.say(f"  layers    {spans(options.layers)}, renumbered from 0")
    for reason, count in Counter(item.reason for item in made.dropped).items():
        size = sum(item.size for item in made.dropped if item.reason == reason)
        console.say(f"  left out  {plural(count, 'tensor')}, {human(size)}, by {reason}")
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


def _carry_out(
    made: Plan, checkpoint: source.Checkpoint, src: str, dst: str, workers: int, console: Console
) -> int:
    from dsv4ckpt import run  # brings torch

    _say_plan(made, console, files=console.verbose)
    stop = run.StopFlag()
    with Progress("convert", quiet=console.quiet) as progress, stopping_on_signals(stop):

        def on_event(event: run.Event) -> None:
            if isinstance(event, run.Started):
                progress.start(event.total_bytes, event.done_bytes)
            elif isinstance(event, run.Wrote):
                progress.advance(event.num_bytes)

        summary = run.execute(made, checkpoint, dst, num_workers=workers, on_event=on_event, stop=stop)
    console.document(_document(made, summary, dst, progress))
    if summary.num_resumed == len(made.files):
        console.say(f"{dst} was complete already: nothing to do")
    else:
        kept = (
            f"; {plural(summary.num_resumed, 'shard')} kept from the run before"
            if summary.num_resumed
            else ""
        )
        console.say(f"done in {progress.seconds:.1f} s, {human(progress.rate)}/s{kept}")
    if summary.num_inexact:
        console.say(f"{summary.num_inexact:,} values were rounded: their F32 scales are no powers of two")
    if summary.num_not_finite:
        console.say(
            f"{summary.num_not_finite:,} values are NaN or infinite, in tensors that --allow-nan names"
        )
    console.say(f"next: dsv4 verify {src} {dst} --level values")
    return EXIT_OK


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
        "dropped": len(made.dropped),
        "opaque": len(made.opaque),
        "seconds": round(progress.seconds, 3),
    }
