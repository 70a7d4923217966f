"""dsv4 export: a run's checkpoint into one that engines serve."""

from __future__ import annotations

import click

from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ScalePolicy

from . import convert
from .common import common_options, dry_run_option, workers_option
from .words import Console, Size


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
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE")
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
    max_shard_size: int,
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

    \b
    Examples:
      dsv4 export runs/sft tuned
      dsv4 export runs/sft tuned-bf16 --to bf16
      dsv4 export runs/lora tuned --to fp8 --step 500 --allow-lossy
    """
    from dsv4model import exporting
    from dsv4model.runs import RunDirectory

    directory = RunDirectory(run)
    checkpoint = exporting.checkpoint_at(directory, step)
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
        if dry_run:
            return convert.show_plan(made, dst, console, more=more)
        return convert.carry_out(
            made,
            shown,
            dst,
            workers,
            console,
            verb="export",
            following=f"dsv4 verify {dst}; dsv4 generate {dst} --text '...'",
            accept_changes=True,  # that is what training is for
            more=more,
        )
