"""dsv4 inspect: what is it, and what is wrong with it.  Headers only, no torch."""

from __future__ import annotations

import fnmatch
from typing import Any

import click

from dsv4ckpt import names, probe, source, survey
from dsv4ckpt.errors import EXIT_BAD_INPUT, EXIT_OK
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.survey import Survey

from .common import common_options, follow_links_option, open_any, without_collecting
from .words import Console, human, plural, spans, table

_SHOWN = 20  # deviations; --json lists all


@click.command("inspect")
@click.argument("src", type=click.Path())
@click.option(
    "--tensors", "pattern", is_flag=False, flag_value="*", metavar="[GLOB]", help="List the tensors."
)
@follow_links_option
@common_options
def command(src: str, pattern: str | None, follow_links: bool, console: Console) -> int:
    """Say what SRC is: release, layers, experts, sizes by class, shards, and every deviation from the inventory.

    SRC is a checkpoint's directory, a single safetensors file, or hf://owner/name[@revision]. Reads headers only, from
    the Hub by range requests. Exits with 3 if the checkpoint is broken.

    \b
    Examples:
      dsv4 inspect DeepSeek-V4-Flash
      dsv4 inspect hf://deepseek-ai/DeepSeek-V4-Flash
      dsv4 inspect DeepSeek-V4-Flash --tensors '*.attn.*'
      dsv4 inspect DeepSeek-V4-Flash --json | jq .deviations
    """
    with without_collecting():
        checkpoint = open_any(src, follow_links=follow_links)
        if not isinstance(checkpoint, HubCheckpoint) and not probe.is_directory(src):
            _single_file(checkpoint, pattern or "*", console)
            return EXIT_OK
        found = survey.survey(checkpoint)
        classes = _classes(found)
    _say(found, classes, console)
    listed = _list_tensors(checkpoint, pattern, console) if pattern else None
    if console.as_json:
        document = _document(found, classes)
        console.document(document if listed is None else {**document, "listed": listed})
    return EXIT_OK if _conforms(found) else EXIT_BAD_INPUT


def _single_file(checkpoint: source.Checkpoint, pattern: str, console: Console) -> None:
    (shard,) = checkpoint.shards.values()
    what = f"{plural(len(checkpoint.tensors), 'tensor')}, {human(shard.stamp.size)}"
    console.say(f"{shard.name}: one safetensors file, {what}", bold=True)
    console.say(
        "the inventory needs the whole directory with its config.json; the file itself is well formed\n"
    )
    listed = _list_tensors(checkpoint, pattern, console)
    console.document(
        {"file": shard.name, "bytes": shard.stamp.size, "metadata": shard.header.metadata, "listed": listed}
    )


def _list_tensors(checkpoint: source.Checkpoint, pattern: str, console: Console) -> list[dict[str, Any]]:
    listed = []
    rows = [("tensor", "bytes", "dtype", "shape")]
    for name, place in checkpoint.tensors.items():
        if not fnmatch.fnmatchcase(name, pattern):
            continue
        entry = place.entry
        listed.append(
            {
                "name": name,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "bytes": entry.end - entry.begin,
                "file": place.shard,
            }
        )
        rows.append(
            (name, f"{entry.end - entry.begin:,}", entry.dtype, "x".join(map(str, entry.shape)) or "scalar")
        )
    console.say(table(rows) if listed else f"no tensor matches {pattern!r}")
    return listed


def _conforms(found: Survey) -> bool:
    return not found.deviations and not found.checkpoint.problems


_Classes = list[tuple[str, int, int, str]]


def _classes(found: Survey) -> _Classes:
    """(class, tensors, bytes, stored as) from the largest to the smallest."""
    counts: dict[str, list[int]] = {}
    dtypes: dict[str, set[str]] = {}
    for name, place in found.checkpoint.tensors.items():
        group = found.layout.group.get(name)
        if group is None:
            group = "vision (opaque)" if names.is_opaque(name) else "unknown"
        elif name.startswith("mtp."):
            group = f"draft: {group}"
        count = counts.setdefault(group, [0, 0])
        count[0] += 1
        count[1] += place.entry.end - place.entry.begin
        dtypes.setdefault(group, set()).add(place.entry.dtype)
    return sorted(
        ((group, n, size, " ".join(sorted(dtypes[group]))) for group, (n, size) in counts.items()),
        key=lambda row: -row[2],
    )


def _draft(found: Survey) -> str:
    stages = found.model.num_stages
    if not stages:
        return "none"
    if found.model.dspark_targets:
        return f"DSpark, {plural(stages, 'stage')} tapping layers {spans(found.model.dspark_targets)}"
    return plural(stages, "MTP stage")


def _say(found: Survey, classes: _Classes, console: Console) -> None:
    identity, model, checkpoint = found.identity, found.model, found.checkpoint
    console.say(
        f"{identity.release.name}, stored as {identity.storage}, {identity.namespace} names", bold=True
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in survey.attention_kinds(model).items())
    hashed = (
        f", hash routing in layers {spans(range(model.num_hash_layers))}" if model.num_hash_layers else ""
    )
    total = checkpoint.total_size
    if checkpoint.origin:
        repository, commit = checkpoint.origin.values()
        console.say(f"  source    hf://{repository}, commit {commit}")
    console.say(f"  layout    {identity.release.repository}")
    console.say(f"  layers    {model.num_layers}: {kinds}")
    console.say(
        f"  experts   {model.num_experts} per layer, {model.experts_per_token} at work, 1 shared{hashed}"
    )
    console.say(f"  draft     {_draft(found)}")
    shards = plural(len(checkpoint.shards), "shard")
    console.say(f"  tensors   {len(checkpoint.tensors):,} in {shards}, {total:,} bytes ({human(total)})")
    if identity.storage != "bf16":
        console.say(f"  as BF16   about {human(survey.logical_bytes_bf16(found.logicals))}")
    rows = [("class", "tensors", "bytes", "stored as")]
    rows += [(group, f"{count:,}", f"{size:,}", dtypes) for group, count, size, dtypes in classes]
    console.say("\n" + table(rows))
    rows = [("shard", "tensors", "bytes", "")]
    for item in checkpoint.shards.values():
        rows.append((item.name, f"{len(item.header.entries):,}", f"{item.stamp.size:,}", ""))
    console.say("\n" + table(rows) + "\n")
    _say_deviations(found, console)


def _say_deviations(found: Survey, console: Console) -> None:
    for note in _notes(found):
        console.say(f"note: {note}")
    problems = [problem.what + (f" ({problem.facts['file']})" if "file" in problem.facts else "")
                for problem in found.checkpoint.problems]  # fmt: skip
    for item in found.deviations:
        facts = [
            f"expected {item.expected}" if item.expected else "",
            f"found {item.found}" if item.found else "",
        ]
        where = f" ({item.file})" if item.file else ""
        problems.append("; ".join([item.sentence() + where, *filter(None, facts)]))
    if not problems:
        console.say("conform: every tensor of the inventory is there, as it should be, and no other")
        return
    console.say(f"BROKEN: {plural(len(problems), 'deviation')} from the inventory", bold=True)
    for text in problems[:_SHOWN]:
        console.say(f"  {text}")
    if len(problems) > _SHOWN:
        console.say(f"  ... and {len(problems) - _SHOWN:,} more; --json lists all")


def _notes(found: Survey) -> list[str]:
    checkpoint = found.checkpoint
    notes = []
    if checkpoint.has_index and checkpoint.index_total != checkpoint.total_size:
        says = "nothing" if checkpoint.index_total is None else f"{checkpoint.index_total:,}"
        notes.append(f"total_size in the index is {says}, the tensors have {checkpoint.total_size:,} bytes")
    if found.opaque:
        notes.append(
            f"{plural(len(found.opaque), 'tensor')} of the vision side are carried without being interpreted"
        )
    return notes


def _document(found: Survey, classes: _Classes) -> dict[str, Any]:
    identity, model, checkpoint = found.identity, found.model, found.checkpoint
    return {
        "release": identity.release.name,
        "storage": identity.storage.value,
        "names": identity.namespace.value,
        "conform": _conforms(found),
        **({"source": checkpoint.origin} if checkpoint.origin else {}),
        "layers": model.num_layers,
        "attention": survey.attention_kinds(model),
        "hash_layers": model.num_hash_layers,
        "experts": {"routed": model.num_experts, "per_token": model.experts_per_token},
        "draft": {"stages": model.num_stages, "dspark": bool(model.dspark_targets)},
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.total_size,
        "index_total_size": checkpoint.index_total,
        "classes": [
            {"class": group, "tensors": count, "bytes": size, "dtypes": dtypes.split()}
            for group, count, size, dtypes in classes
        ],
        "shards": [
            {"file": item.name, "tensors": len(item.header.entries), "bytes": item.stamp.size}
            for item in checkpoint.shards.values()
        ],
        "notes": _notes(found),
        "index_problems": [{"what": problem.what, **problem.facts} for problem in checkpoint.problems],
        "deviations": [item.__dict__ for item in found.deviations],
        "opaque": found.opaque,
    }
