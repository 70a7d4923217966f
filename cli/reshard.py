"""dsv4 reshard: a checkpoint into the directory that torch.distributed.checkpoint loads."""

from __future__ import annotations

import os

import click

from dsv4ckpt import plan, source, survey
from dsv4ckpt.errors import Usage
from dsv4ckpt.names import Experts, Namespace
from dsv4ckpt.plan import ConvertOptions

from . import convert
from .common import common_options, follow_links_option, without_collecting
from .words import Console, Size

_LEAST_CHUNK = 64 * 1024  # smaller chunks are mostly what stands around them


@click.command("reshard")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option("--to", type=click.Choice(["dcp"]), required=True, help="What DST is: a torch DCP directory.")
@click.option(
    "--names",
    "namespace",
    type=click.Choice([item.value for item in Namespace]),
    default=Namespace.TRANSFORMERS.value,
    show_default=True,
    help="What tensors are called in DST. transformers: parameter names of dsv4model and transformers v5.",
)
@click.option(
    "--experts",
    type=click.Choice([item.value for item in Experts]),
    help="fused: one tensor for all of a layer, transformers names only; split: one each.  "
    "[default: fused for transformers, split for deepseek]",
)
@click.option(
    "--to-dtype",
    type=click.Choice(["bf16", "as-stored"]),
    default="bf16",
    show_default=True,
    help="as-stored: packed experts, FP8 codes and E8M0 scales stay, as uint8.",
)
@click.option(
    "--chunk-bytes",
    type=Size(),
    default="32MiB",
    show_default=True,
    metavar="SIZE",
    help="The most of a chunk. A rank reads whole chunks; experts are divided only where they are larger.",
)
@click.option(
    "--max-file-size", type=Size(), default="5GB", show_default=True, metavar="SIZE", help="Of .distcp files."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Files at a time; never changes bytes.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, from headers only.")
@click.option("--allow-nan", multiple=True, metavar="NAME", help="Accept NaN and infinities in this tensor.")
@follow_links_option
@common_options
def command(
    src: str,
    dst: str,
    to: str,  # noqa: ARG001 - one direction so far, and it has a name
    namespace: str,
    experts: str | None,
    to_dtype: str,
    chunk_bytes: int,
    max_file_size: int,
    workers: int,
    dry_run: bool,
    allow_nan: tuple[str, ...],
    follow_links: bool,
    console: Console,
) -> int:
    """Write the checkpoint in SRC into the new directory DST, as torch DCP loads it at any world size.

    SRC is a checkpoint in any storage format. torch.distributed.checkpoint.load reads DST without dsv4; the pickle
    in it names torch's own classes only. Trainers that can take a storage reader need no copy: see docs/dcp.md.

    \b
    Examples:
      dsv4 reshard DeepSeek-V4-Flash dcp --to dcp
      dsv4 reshard DeepSeek-V4-Flash dcp --to dcp --names deepseek
      dsv4 reshard DeepSeek-V4-Flash packed --to dcp --to-dtype as-stored
      torchrun --nproc-per-node 4 -m dsv4cli reshard DeepSeek-V4-Pro dcp --to dcp
    """
    space = Namespace(namespace)
    is_deepseek = space is Namespace.DEEPSEEK
    held = Experts(experts) if experts else Experts.SPLIT if is_deepseek else Experts.FUSED
    if is_deepseek and held is Experts.FUSED:
        raise Usage("the released names have no fused experts", do="say --experts split, or leave it out")
    if chunk_bytes < _LEAST_CHUNK:
        raise Usage(
            "--chunk-bytes is too small", expected=f"at least {_LEAST_CHUNK:,}", do="take 1MiB or more"
        )
    if os.path.realpath(src) == os.path.realpath(dst):
        raise Usage("DST is SRC: nothing is written in place", do="name a new directory")
    options = ConvertOptions(
        namespace=space,
        experts=held,
        max_shard_bytes=max_file_size,
        chunk_bytes=chunk_bytes,
        as_stored=to_dtype == "as-stored",
        allow_nan=frozenset(allow_nan),
    )
    with without_collecting():
        checkpoint = source.open_checkpoint(src, follow_links=follow_links)
        made = plan.make_plan(survey.survey(checkpoint), options)
    if dry_run:
        return convert.show_plan(made, dst, console, None, needs_space=True)
    following = f"torch.distributed.checkpoint.load(state_dict, checkpoint_id={dst!r})"
    return convert.carry_out(made, checkpoint, dst, workers, console, verb="reshard", following=following)
