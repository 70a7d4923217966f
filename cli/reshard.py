"""dsv4 reshard: into the directory that torch.distributed.checkpoint loads, and out of it again."""

from __future__ import annotations

import os
from typing import Any

import click

from dsv4ckpt import formats, hub, hub_source, plan, source, survey
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Experts, Namespace
from dsv4ckpt.plan import ConvertOptions, ScalePolicy
from dsv4ckpt.survey import Survey

from . import convert
from .common import common_options, dry_run_option, follow_links_option, without_collecting, workers_option
from .shelves import pinned, scratch_limit_option
from .words import Console, Size, plural

_LEAST_CHUNK = 64 * 1024  # smaller chunks are mostly what stands around them
_CHUNK = 32 * 1024 * 1024
_NAMES = {"dcp": Namespace.TRANSFORMERS, "safetensors": Namespace.DEEPSEEK}
_SHOWN = 3  # of the entries that are left


@click.command("reshard")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(list(_NAMES)),
    required=True,
    help="What DST is: a torch DCP directory, or a checkpoint made of one.",
)
@click.option(
    "--names",
    "namespace",
    type=click.Choice([item.value for item in Namespace]),
    help="What tensors are called in DST. transformers: parameter names of dsv4model and transformers v5.  "
    "[default: transformers for dcp, deepseek for safetensors]",
)
@click.option(
    "--experts",
    type=click.Choice([item.value for item in Experts]),
    help="fused: one tensor for all of a layer, transformers names only; split: one each.  "
    "[default: fused for transformers, split for deepseek]",
)
@click.option(
    "--storage",
    type=click.Choice([item.value for item in Target]),
    help="--to safetensors: storage format of DST, as --to of dsv4 convert.  [default: bf16]",
)
@click.option(
    "--to-dtype",
    type=click.Choice(["bf16", "as-stored"]),
    help="--to dcp: as-stored: packed experts, FP8 codes and E8M0 scales stay, as uint8.  [default: bf16]",
)
@click.option(
    "--chunk-bytes",
    type=Size(),
    metavar="SIZE",
    help="--to dcp: the most of a chunk. A rank reads whole chunks; experts are divided only where they are larger.  "
    "[default: 32MiB]",
)
@click.option(
    "--max-file-size", type=Size(), default="5GB", show_default=True, metavar="SIZE", help="Of files in DST."
)
@scratch_limit_option
@workers_option("Files")
@dry_run_option
@click.option("--allow-nan", multiple=True, metavar="NAME", help="Accept NaN and infinities in this tensor.")
@click.option(
    "--prefix",
    metavar="NAME",
    help="SRC is DCP: what stands before the model's names, such as model.  [default: found]",
)
@click.option(
    "--like",
    type=click.Path(),
    metavar="DIR",
    help="SRC is DCP: take config.json, tokenizer and other small files from here.  "
    "[default: SRC, else --source]",
)
@convert.original_options("--storage native")
@follow_links_option
@common_options
def command(
    src: str,
    dst: str,
    to: str,
    namespace: str | None,
    experts: str | None,
    storage: str | None,
    to_dtype: str | None,
    chunk_bytes: int | None,
    max_file_size: int,
    scratch_limit: int,
    workers: int,
    dry_run: bool,
    allow_nan: tuple[str, ...],
    prefix: str | None,
    like: str | None,
    released: str | None,
    sidecar: str | None,
    scale_policy: str,
    allow_lossy: bool,
    follow_links: bool,
    console: Console,
) -> int:
    """Write a checkpoint as torch DCP loads it at any world size, or a DCP directory as a checkpoint.

    --to dcp: SRC is a checkpoint in any storage format. torch.distributed.checkpoint.load reads DST without dsv4; the
    pickle in it names torch's own classes only. Trainers that can take a storage reader need no copy: see docs/dcp.md.

    --to safetensors: SRC is a DCP directory that any number of ranks saved. Its pickles are read, not run; optimizer
    and other state is listed and left. What is wider than BF16 is rounded once. Then all is as dsv4 convert does it:
    with --storage native --source RELEASE, what training left untouched gets its released bytes again.

    \b
    Examples:
      dsv4 reshard DeepSeek-V4-Flash dcp --to dcp
      dsv4 reshard DeepSeek-V4-Flash dcp --to dcp --names deepseek
      dsv4 reshard DeepSeek-V4-Flash packed --to dcp --to-dtype as-stored
      torchrun --nproc-per-node 4 -m dsv4cli reshard DeepSeek-V4-Pro dcp --to dcp
      dsv4 reshard step-1000 tuned --to safetensors --storage native --source DeepSeek-V4-Flash
    """
    _require_fitting(
        to,
        {"--storage": storage, "--source": released, "--sidecar": sidecar},
        {"--to-dtype": to_dtype, "--chunk-bytes": chunk_bytes},
    )
    options = ConvertOptions(
        target=Target(storage or Target.BF16),
        namespace=Namespace(namespace or _NAMES[to]),
        experts=_experts(Namespace(namespace or _NAMES[to]), experts),
        max_shard_bytes=max_file_size,
        chunk_bytes=_chunk_bytes(chunk_bytes) if to == "dcp" else None,
        as_stored=to_dtype == "as-stored",
        allow_nan=frozenset(allow_nan),
        scale_policy=ScalePolicy(scale_policy),
        allow_lossy=allow_lossy,
    )
    convert.require_native(options.target, "--storage native", released, sidecar)
    if os.path.realpath(src) == os.path.realpath(dst):
        raise Usage("DST is SRC: nothing is written in place", do="name a new directory")
    with without_collecting():
        config_at = like or _config_at(src, released)
        found, left = _surveyed(pinned(src, dst), to, config_at, prefix, allow_lossy, follow_links)
        known = convert.original_of(src, found.checkpoint, released, sidecar, options, follow_links)
        made = plan.make_plan(found, options, known)
    if left:
        shown = ", ".join(left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
        console.say(f"{plural(len(left), 'item')} of SRC, not of the model, stay behind: {shown}")
    more: dict[str, Any] = {"not_of_the_model": list(left)}
    job = convert.Job(
        made,
        found.checkpoint,
        dst,
        workers,
        scratch_limit,
        verb="reshard",
        accept_changes=True,  # a trainer changes what it saves, and no manifest knows of it
    )
    if dry_run:
        return convert.show_plan(job, console, more=more)
    following = f"dsv4 verify {dst}"
    if to == "dcp":
        following = f"torch.distributed.checkpoint.load(state_dict, checkpoint_id={dst!r})"
    elif found.checkpoint.directory == src or src.startswith(hub.PREFIX):
        following = f"dsv4 verify {src} {dst} --level values"
    return convert.carry_out(job, console, following=following, more=more)


def _surveyed(
    src: str, to: str, config_at: str | None, prefix: str | None, allow_lossy: bool, follow_links: bool
) -> tuple[Survey, tuple[str, ...]]:
    """SRC, and what of it is not the model's."""
    if source.is_dcp(src):
        from dsv4ckpt import dcp_source  # brings torch

        config_at = _small_files_at(config_at)
        return dcp_source.open_dcp(
            src, config_at=config_at, prefix=prefix, allow_lossy=allow_lossy, follow_links=follow_links
        )
    if to == "safetensors":
        raise Usage(
            "SRC is no torch DCP directory",
            expected=f"a directory with {formats.DCP_METADATA_NAME} in it, which a finished save has written",
            do="if SRC is a checkpoint: dsv4 convert; if it is an unfinished save: take the one before",
        )
    if prefix is not None or config_at not in (None, src):
        raise Usage("--prefix and --like go with a DCP directory as SRC", do="leave them out")
    return survey.survey(hub_source.open_checkpoint(src, follow_links=follow_links)), ()


def _config_at(src: str, released: str | None) -> str | None:
    """Where config.json is: in SRC itself if it has one. None: there"""
    return None if released is None or os.path.lexists(os.path.join(src, formats.CONFIG_NAME)) else released


def _small_files_at(like: str | None) -> str | None:
    """The same, on this machine."""
    if like is None or not like.startswith(hub.PREFIX):
        return like
    return hub_source.open_hub(like).small_directory


def _require_fitting(to: str, of_safetensors: dict[str, Any], of_dcp: dict[str, Any]) -> None:
    """raises Usage"""
    wrong = [name for name, value in (of_dcp if to == "safetensors" else of_safetensors).items() if value]
    if wrong:
        other = "dcp" if to == "safetensors" else "safetensors"
        raise Usage(f"{wrong[0]} goes with --to {other}", do="leave it out")


def _experts(space: Namespace, wanted: str | None) -> Experts:
    is_deepseek = space is Namespace.DEEPSEEK
    held = Experts(wanted) if wanted else Experts.SPLIT if is_deepseek else Experts.FUSED
    if is_deepseek and held is Experts.FUSED:
        raise Usage("the released names have no fused experts", do="say --experts split, or leave it out")
    return held


def _chunk_bytes(wanted: int | None) -> int:
    if wanted is not None and wanted < _LEAST_CHUNK:
        raise Usage(
            "--chunk-bytes is too small", expected=f"at least {_LEAST_CHUNK:,}", do="take 1MiB or more"
        )
    return wanted or _CHUNK
