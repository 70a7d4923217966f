"""dsv4 sample: a small random checkpoint in a released layout."""

from __future__ import annotations

import click

from dsv4ckpt.release import RELEASES
from dsv4ckpt.stop import StopFlag

from .common import common_options, stopping_on_signals
from .progress import Progress
from .words import Console, Size, human, plural


@click.command("sample")
@click.argument("dst", type=click.Path())
@click.option("--release", type=click.Choice(list(RELEASES)), default="flash", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: 4]")
@click.option("--hidden", type=click.IntRange(2), help="Hidden size.  [default: 256]")
@click.option("--intermediate", type=click.IntRange(2), help="Width of an expert.  [default: 128]")
@click.option("--experts", type=click.IntRange(1), help="Routed experts per layer.  [default: 8]")
@click.option("--heads", type=click.IntRange(2), help="Attention heads.  [default: 4]")
@click.option("--vocab", type=click.IntRange(512), help="Vocabulary size.  [default: 512]")
@click.option("--target-size", type=Size(), help="Grow the sizes until the checkpoint is about this large.")
@click.option(
    "--release-dims",
    is_flag=True,
    help="The release's true tensor shapes; choose --layers, and perhaps --experts, with it.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@common_options
def command(
    dst: str,
    release: str,
    layers: int | None,
    hidden: int | None,
    intermediate: int | None,
    experts: int | None,
    heads: int | None,
    vocab: int | None,
    target_size: int | None,
    release_dims: bool,
    seed: int,
    console: Console,
) -> None:
    """Write a small random checkpoint into DST, in the layout of a release.

    Same names, dtypes, config keys, shards and small files as the real one, other sizes. Equal options give equal
    bytes.

    \b
    Examples:
      dsv4 sample demo/flash
      dsv4 sample demo/base --release flash-base
      dsv4 sample /data/4gb --target-size 4GB
      dsv4 sample /data/cut --release-dims --layers 4 --experts 8
    """
    from dsv4ckpt import sample as samples

    sizes = {
        "--hidden": hidden,
        "--intermediate": intermediate,
        "--experts": experts,
        "--heads": heads,
        "--vocab": vocab,
    }
    fixed = [flag for flag, value in sizes.items() if value is not None and flag != "--experts"]
    if release_dims and (fixed or target_size):
        raise click.UsageError(
            "--release-dims fixes every size but --layers and --experts; leave out "
            + ", ".join(fixed or ["--target-size"])
        )
    sample = samples.plan_sample(
        samples.SampleOptions(
            release=release,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            heads=heads,
            vocab=vocab,
            release_dims=release_dims,
            target_bytes=target_size,
            seed=seed,
        )
    )
    stop = StopFlag()
    with Progress("sample", quiet=console.quiet) as progress, stopping_on_signals(stop):
        progress.start(sample.total_bytes)
        samples.write_sample(sample, dst, progress.advance, stop)
    console.document(
        {"directory": dst, "release": release, "bytes": sample.total_bytes, "tensors": sample.num_tensors}
    )
    what = f"{plural(sample.num_tensors, 'tensor')} in {plural(len(sample.files), 'shard')}"
    console.say(f"{dst}: a {release} sample, {what}, {human(sample.total_bytes)}")
    console.say(f"next: dsv4 inspect {dst}")
