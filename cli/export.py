"""dsv4 export: a run's checkpoint into one that engines serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from dsv4ckpt import outdir
from dsv4ckpt.errors import EXIT_OK, Usage
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ScalePolicy
from dsv4ckpt.stop import StopFlag

from . import convert
from .common import common_options, dry_run_option, place_in_job, stopping_on_signals, workers_option
from .progress import Progress
from .shelves import scratch_limit_option
from .words import Console, Size, human, plural

if TYPE_CHECKING:
    from dsv4model.runs import Checkpoint, RunDirectory

_MERGING = {
    "to",
    "names",
    "scale_policy",
    "max_shard_size",
    "scratch_limit",
    "workers",
    "allow_lossy",
}  # options of merged weights


@click.command("export")
@click.argument("run", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--to",
    type=click.Choice([item.value for item in Target]),
    default=Target.NATIVE.value,
    show_default=True,
    help="Storage format of DST, as --to of dsv4 convert.",
)
@click.option(
    "--names",
    type=click.Choice([item.value for item in Namespace]),
    help="What tensors are called in DST.  [default: transformers for bf16, else deepseek]",
)
@click.option(
    "--step", type=click.IntRange(min=1), metavar="N", help="Of which checkpoint.  [default: the newest]"
)
@click.option(
    "--scale-policy",
    type=click.Choice([item.value for item in ScalePolicy]),
    help="Scales of blocks that changed. keep: the release's while it fits; fresh: as DeepSeek's quantizer chooses.  "
    "[default: keep; fresh after train.qat]",
)
@click.option("--adapter", is_flag=True, help="Do not merge: write the adapters alone, in PEFT's format.")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE")
@scratch_limit_option
@workers_option("Shards")
@dry_run_option
@click.option(
    "--allow-lossy", is_flag=True, help="Accept that values are rounded unmeasured, or a change vanishes."
)
@common_options
def command(
    run: str,
    dst: str,
    to: str,
    names: str | None,
    step: int | None,
    scale_policy: str | None,
    adapter: bool,
    max_shard_size: int,
    scratch_limit: int,
    workers: int,
    dry_run: bool,
    allow_lossy: bool,
    console: Console,
) -> int:
    """Write what a run of dsv4 finetune has trained into the new directory DST, ready to be served.

    RUN is the run's directory. Adapters are merged, weights are quantized and measured as they are written; what was
    not trained, MTP and all small files are the source's own, byte for byte. If quantizing would lose most of what
    training changed, the command says so and does not finish. Stop it at any time: the same command continues.

    After train.qat the routed experts lose nothing where DST stores them as FP4; other quantized matrices that learned
    are rounded. Formats but native and bf16 cannot be measured: what would be rounded there needs --allow-lossy.

    With --adapter DST holds adapter_model.safetensors and adapter_config.json, for the weights that the run began with.

    \b
    Examples:
      dsv4 export runs/sft tuned
      dsv4 export runs/sft tuned-bf16 --to bf16
      dsv4 export runs/lora tuned --to fp8 --step 500 --allow-lossy
      dsv4 export runs/lora adapters --adapter
    """
    from dsv4model import exporting, trained
    from dsv4model.runs import RunDirectory

    if adapter:
        _require_no_merging()
    directory = RunDirectory(run)
    checkpoint = trained.checkpoint_at(directory, step)
    if adapter:
        return _write_adapters(directory, checkpoint, dst, console, dry_run=dry_run)
    with exporting.planned(
        directory,
        checkpoint,
        to=to,
        names=names,
        scale_policy=scale_policy,
        max_shard_bytes=max_shard_size,
        allow_lossy=allow_lossy,
    ) as (made, shown):
        console.say(
            f"step {checkpoint.step:,} of {run}, trained from {shown.like.checkpoint.directory}", bold=True
        )
        more = {"step": checkpoint.step}
        job = convert.Job(
            made,
            shown,
            dst,
            workers,
            scratch_limit,
            verb="export",
            accept_changes=True,  # that is what training is for
        )
        if dry_run:
            return convert.show_plan(job, console, more=more)
        following = f"dsv4 verify {dst}; dsv4 generate {dst} --text '...'"
        return convert.carry_out(job, console, following=following, more=more)


def _require_no_merging() -> None:
    """raises Usage for what goes with merged weights only, and for a job of ranks"""
    context = click.get_current_context()
    for parameter in context.command.params:
        is_given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if is_given and parameter.name in _MERGING:
            raise Usage(f"{parameter.opts[0]} goes with merged weights", do="leave it out, or --adapter")
    if place_in_job().size > 1:
        raise Usage("adapters are written by one process", do="start the command without torchrun")


def _write_adapters(
    run: RunDirectory, checkpoint: Checkpoint, dst: str, console: Console, *, dry_run: bool
) -> int:
    from dsv4model import adapter_export

    made = adapter_export.planned(run, checkpoint)
    files = made.files
    console.say(f"step {made.step:,} of {run.path}, trained from {made.source}", bold=True)
    console.say(f"  output    {plural(len(files.places), 'adapter')}, {human(files.num_bytes)}")
    document = {"directory": dst, "step": made.step, "adapters": len(files.places), "bytes": files.num_bytes}
    if dry_run:
        outdir.require_space(dst, files.num_bytes)
        console.document(document)
        console.say("nothing was written: this was a dry run")
        return EXIT_OK
    stop = StopFlag()
    with Progress("export", quiet=console.quiet) as progress, stopping_on_signals(stop):
        progress.start(files.data_bytes)
        summary = adapter_export.execute(made, dst, on_bytes=progress.advance, stop=stop)
    listed = [{"file": file.name, "size": file.size, "sha256": file.sha256} for file in summary.files]
    console.document(document | {"files": listed})
    done = f"done in {progress.seconds:.1f} s"
    console.say(f"{dst} was complete already: nothing to do" if summary.was_complete else done)
    console.say(f"next: PeftModel.from_pretrained(model, {dst!r})")
    return EXIT_OK
