"""dsv4 dump: the named intermediate tensors of a forward pass, by our model or by transformers."""

from __future__ import annotations

import fnmatch
import hashlib
from typing import TYPE_CHECKING, Any

import click

from dsv4ckpt import strictjson
from dsv4ckpt.errors import EXIT_OK, Usage
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.stop import StopFlag

from .common import common_options, follow_links_option, stopping_on_signals
from .prompts import Ids, read_ids
from .words import Console, human, plural

if TYPE_CHECKING:
    from dsv4ckpt.survey import Survey
    from dsv4model.config import Config
    from dsv4model.trace import Wanted

_IMPLS = {"dsv4": ("float32", "bfloat16", "float64"), "transformers": ("float32", "bfloat16")}


@click.command("dump")
@click.argument("ckpt", type=click.Path())
@click.option(
    "--ids", "ids_path", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
    help="Token ids: a JSON list, or a list of equally long lists (one per sequence), or plain text with blanks "
    "between the ids.",
)  # fmt: skip
@click.option(
    "--text", metavar="TEXT", help="A text, for the checkpoint's tokenizer; no begin token is added."
)
@click.option("--out", type=click.Path(), required=True, metavar="DIR", help="Absent, or an empty directory.")
@click.option(
    "--impl", type=click.Choice(list(_IMPLS)), default="dsv4", show_default=True, help="Whose model runs."
)
@click.option(
    "--dtype", type=click.Choice(_IMPLS["dsv4"]), default="float32", show_default=True,
    help="What it computes in. float64 is for dsv4 only.",
)  # fmt: skip
@click.option(
    "--only", "patterns", multiple=True, metavar="PATTERN",
    help="Only tensors whose name matches: 'layers.3.*', '*.out'. May be given again.",
)  # fmt: skip
@follow_links_option
@common_options
def command(
    ckpt: str,
    ids_path: str | None,
    text: str | None,
    out: str,
    impl: str,
    dtype: str,
    patterns: tuple[str, ...],
    follow_links: bool,
    console: Console,
) -> int:
    """Run the model of CKPT once and write its intermediate tensors, under canonical names, into DIR.

    CKPT is a DeepSeek-V4 checkpoint in any storage format that its implementation reads; both run on the CPU, and the
    whole model must fit into memory. DIR gets tensors.safetensors, in the order of execution, and dump.json. Equal
    commands on one machine give equal bytes.

    \b
    Examples:
      dsv4 dump demo/flash --ids ids.json --out a
      dsv4 dump demo/flash --ids ids.json --out b --impl transformers
      dsv4 dump demo/flash --text 'Hello' --out c --only 'layers.2.*' --only logits
      dsv4 parity a b
    """
    from dsv4model.dumps import about, require_free, write_dump
    from dsv4model.loading import surveyed

    if dtype not in _IMPLS[impl]:
        raise Usage(
            "transformers computes parts of the model in float32 whatever the rest is in",
            expected=" or ".join(_IMPLS[impl]),
            found=dtype,
            do="choose one of these, or --impl dsv4",
        )
    require_free(out)
    found, config = surveyed(ckpt, follow_links=follow_links)
    ids = _ids(ids_path, text, ckpt, follow_links)
    _require_ids(ids, config)
    wanted = _wanted(patterns, config, impl)
    what = about(impl, dtype, ids, _identity(found))
    shape = " x ".join(map(str, what.ids_shape))
    console.say(
        f"{found.identity.release.name}, stored as {found.identity.storage}: {shape} token ids", bold=True
    )
    console.say(f"  model     {impl}, in {dtype}; loading and running it on the CPU")
    tensors = _recorded(found, ids, impl, dtype, wanted)
    stop = StopFlag()
    with stopping_on_signals(stop):
        size = write_dump(out, tensors, what, stop)
    console.say(f"  recorded  {plural(len(tensors), 'tensor')}, {human(size)}")
    console.document(
        {
            "directory": out,
            "impl": impl,
            "dtype": dtype,
            "ids": {"shape": list(what.ids_shape), "sha256": what.ids_sha256},
            "checkpoint": what.checkpoint,
            "tensors": len(tensors),
            "bytes": size,
        }
    )
    console.say(f"next: dsv4 parity {out} OTHER")
    return EXIT_OK


# ---- the checkpoint


def _identity(found: Survey) -> dict[str, str]:
    """What tells this checkpoint from others: what it is, and a hash over headers and samples of the data."""
    checkpoint = found.checkpoint
    shards = [
        [name, item.header.sha256, checkpoint.sample_sha256(name)]
        for name, item in sorted(checkpoint.shards.items())
    ]
    config_sha256 = hashlib.sha256(checkpoint.config_bytes or b"").hexdigest()
    return {
        "release": found.identity.release.name,
        "storage": found.identity.storage.value,
        "names": found.identity.namespace.value,
        "sha256": hashlib.sha256(strictjson.canonical([config_sha256, shards])).hexdigest(),
    }


# ---- token ids


def _ids(path: str | None, text: str | None, ckpt: str, follow_links: bool) -> Ids:
    if (path is None) == (text is None):
        raise Usage(
            "one sequence of tokens, or one file of them, goes through the model",
            expected="either --ids FILE or --text TEXT",
            do="give one of them",
        )
    if path is not None:
        return read_ids(path)
    from dsv4model.tokenizer import Tokenizer

    return [Tokenizer.open(ckpt, follow_links=follow_links).encode(text or "")]


def _require_ids(ids: Ids, config: Config) -> None:
    """raises Usage before a model is loaded for nothing"""
    if not ids[0]:
        raise Usage("there are no token ids", expected="at least one", do="give some ids, or a longer text")
    if len(ids[0]) > config.max_positions:
        raise Usage(
            "the sequence is longer than the model's positions allow",
            expected=f"at most {config.max_positions:,} tokens, which is max_position_embeddings",
            found=f"{len(ids[0]):,} tokens",
            do="cut the sequence",
        )
    for number, row in enumerate(ids):
        for position, token in enumerate(row):
            if token >= config.vocab:
                raise Usage(
                    "a token id is not in the vocabulary of this checkpoint",
                    expected=f"0 to {config.vocab - 1:,}",
                    found=f"{token} at position {position} of sequence {number}",
                    do="use the tokenizer that belongs to this checkpoint",
                )


# ---- the pass


def _wanted(patterns: tuple[str, ...], config: Config, impl: str) -> Wanted:
    from dsv4model import trace

    known = [name for name in trace.names(config) if impl == "dsv4" or not name.startswith("mtp.")]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise Usage(
                "--only names no tensor of this pass",
                expected=f"a pattern for names like {known[0]}, {known[7]}, {known[-1]}",
                found=repr(pattern),
                do="see docs/parity.md for the names"
                + ("" if impl == "dsv4" else "; transformers has no MTP block"),
            )
    if not patterns:
        return trace.everything
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _recorded(found: Survey, ids: Ids, impl: str, dtype: str, wanted: Wanted) -> Any:
    """Canonical name -> tensor, in the order of execution."""
    from dsv4model import trace, trace_transformers
    from dsv4model.dumps import as_dtype, as_ids

    if impl == "transformers":
        if isinstance(found.checkpoint, HubCheckpoint):
            raise Usage("transformers reads a directory of this machine", do="download it first: hf download")
        peer = trace_transformers.load(found.checkpoint.directory, found.document, as_dtype(dtype))
        return trace_transformers.record(peer, as_ids(ids), wanted=wanted)
    from dsv4model.loading import load

    return trace.record(load(found, as_dtype(dtype)), as_ids(ids), wanted=wanted)
