"""dsv4 verify: structure, bytes, values."""

from __future__ import annotations

import os
from typing import Any

import click

from dsv4ckpt import compare, source, survey, verify
from dsv4ckpt.errors import EXIT_DIFFERENT, EXIT_OK, Interrupted, Usage
from dsv4ckpt.formats import MANIFEST_NAME

from .common import common_options, follow_links_option, stopping_on_signals
from .progress import Progress
from .words import Console, Subset, human, plural, table

_SHOWN = 20  # differences; --json lists all


class _StopFlag:
    """As run.StopFlag, without torch."""

    signal_number = 0

    def check(self) -> None:
        if self.signal_number:
            raise Interrupted(self.signal_number)


@click.command("verify")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path(), required=False)
@click.option(
    "--level",
    type=click.Choice(["structure", "bytes", "values"]),
    help="structure: headers only. bytes: SHA-256 against the manifest; with B, stored bytes of both. "
    "values: decode both and compare.  [default: bytes, with B values]",
)
@click.option(
    "--subset", type=Subset(), metavar="n/t", help="A spot check: part n of t, of the files or tensors."
)
@click.option(
    "--tensor", "tensors", multiple=True, metavar="NAME", help="Only this tensor (released name of A)."
)
@click.option(
    "--unit-scale", multiple=True, metavar="NAME", help="This FP8 weight has no scales: take them as 1."
)
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True)
@follow_links_option
@common_options
def command(
    a: str,
    b: str | None,
    level: str | None,
    subset: tuple[int, int] | None,
    tensors: tuple[str, ...],
    unit_scale: tuple[str, ...],
    workers: int,
    follow_links: bool,
    console: Console,
) -> int:
    """Verify one checkpoint against its inventory and manifest, or compare A with B tensor by tensor.

    Names and storage formats may differ: a BF16 conversion is compared with its packed source. The decoding is done
    by other code than the conversion's. Exits with 1 if there is any difference.

    \b
    Examples:
      dsv4 verify flash-bf16
      dsv4 verify DeepSeek-V4-Flash flash-bf16 --level values
      dsv4 verify DeepSeek-V4-Flash flash-bf16 --subset 1/20
    """
    if b is None:
        if level == "values" or tensors:
            raise Usage(
                "values are compared between two checkpoints",
                expected="dsv4 verify A B --level values",
                do="name the second one",
            )
        return _one(a, level, subset, frozenset(unit_scale), workers, follow_links, console)
    if level == "structure":
        raise Usage("--level structure looks at one checkpoint", do=f"dsv4 verify {b} --level structure")
    return _two(
        a,
        b,
        level or "values",
        subset,
        frozenset(tensors),
        frozenset(unit_scale),
        workers,
        follow_links,
        console,
    )


def _one(
    path: str,
    level: str | None,
    subset: tuple[int, int] | None,
    unit_scales: frozenset[str],
    workers: int,
    follow_links: bool,
    console: Console,
) -> int:
    checkpoint = source.open_checkpoint(path, follow_links=follow_links)
    structure = verify.verify_structure(checkpoint, unit_scales=unit_scales)
    what = f"{structure.release}, {structure.storage}, {structure.namespace} names"
    size = f"{plural(structure.num_tensors, 'tensor')} in {plural(structure.num_shards, 'shard')}"
    console.say(f"{path}: {what}, {size}", bold=True)
    for note in structure.notes:
        console.say(f"  note      {note}")
    _say_problems([_words(problem) for problem in structure.problems], console)
    complete = (
        "complete against inventory and manifest"
        if structure.has_manifest
        else "complete against the inventory"
    )
    console.say(f"  structure {complete if structure.ok else 'NOT complete'}")
    document: dict[str, Any] = {"ok": structure.ok, "structure": structure.document()}
    has_manifest = os.path.lexists(os.path.join(path, MANIFEST_NAME))
    if level == "bytes" or (level is None and has_manifest):
        stop = _StopFlag()
        with Progress("verify", quiet=console.quiet) as progress, stopping_on_signals(stop):
            report = verify.verify_bytes(
                path,
                subset=subset,
                follow_links=follow_links,
                num_workers=workers,
                on_event=_follow(progress),
                stop=stop,
            )
        _say_problems(
            [f"{file.name}: {file.verdict}" + (f", expected {file.expected}, found {file.found}" if file.found else "")
             for file in report.files if file.verdict != "ok"],
            console,
        )  # fmt: skip
        good = sum(file.verdict == "ok" for file in report.files)
        of = "" if len(report.files) == report.num_listed else f" (of {report.num_listed} listed)"
        files = plural(len(report.files), "file")
        console.say(
            f"  bytes     {good} of {files}{of} have the SHA-256 of the manifest, {human(report.num_bytes)}"
        )
        document |= {"ok": structure.ok and report.ok, "bytes": report.document()}
    elif level is None:
        console.say(f"  bytes     not checked: there is no {MANIFEST_NAME} with their SHA-256")
    return _conclude(document, console)


def _two(
    path_a: str,
    path_b: str,
    level: str,
    subset: tuple[int, int] | None,
    tensors: frozenset[str],
    unit_scales: frozenset[str],
    workers: int,
    follow_links: bool,
    console: Console,
) -> int:
    surveys = [
        survey.survey(source.open_checkpoint(path, follow_links=follow_links), unit_scales=unit_scales)
        for path in (path_a, path_b)
    ]
    for letter, path, found in zip("AB", (path_a, path_b), surveys, strict=True):
        identity = found.identity
        what = f"{identity.release.name}, {identity.storage}, {identity.namespace} names"
        console.say(f"{letter} {path}: {what}", bold=True)
    stop = _StopFlag()
    with Progress("verify", quiet=console.quiet) as progress, stopping_on_signals(stop):
        report = compare.verify_values(
            surveys[0],
            surveys[1],
            subset=subset,
            tensors=tensors,
            num_workers=workers,
            on_event=_follow(progress),
            stop=stop,
        )
    for note in report.notes:
        console.say(f"  note      {note}")
    _say_problems([_sentence(item) for item in report.tensors if item.verdict != "left out"], console)
    counts = [(verdict.value, f"{count:,}", "") for verdict, count in report.counts.items() if count]
    console.say(table([("verdict", "tensors", ""), *counts]))
    same_bytes = level == "bytes" and report.counts[compare.Verdict.SAME_VALUES]
    if same_bytes:
        console.say(f"  {plural(same_bytes, 'tensor')} have the same values in other bytes")
    return _conclude({"ok": report.ok and not same_bytes, "values": report.document()}, console)


def _follow(progress: Progress) -> verify.OnEvent:
    def on_event(event: verify.Event) -> None:
        if isinstance(event, verify.Started):
            progress.start(event.total_bytes)
        else:
            progress.advance(event.num_bytes)

    return on_event


def _conclude(document: dict[str, Any], console: Console) -> int:
    console.document(document)
    console.say("ok" if document["ok"] else "NOT the same", bold=True)
    return EXIT_OK if document["ok"] else EXIT_DIFFERENT


def _words(problem: verify.Problem) -> str:
    facts = [
        problem.file,
        problem.expected and f"expected {problem.expected}",
        problem.found and f"found {problem.found}",
    ]
    return "; ".join([problem.what, *(fact for fact in facts if fact)])


def _sentence(item: compare.TensorVerdict) -> str:
    if item.apart is None:
        return f"{item.name}: {item.verdict}" + (f": {item.reason}" if item.reason else "")
    apart = item.apart
    many = f"{plural(apart.num_values, 'value')} differ by up to {apart.distance} ulp of {apart.unit}"
    return (
        f"{item.name}: {many}; first at row {apart.row}, column {apart.col}: {apart.a} in A, {apart.b} in B"
    )


def _say_problems(problems: list[str], console: Console) -> None:
    for text in problems[:_SHOWN]:
        console.say(f"  {text}")
    if len(problems) > _SHOWN:
        console.say(f"  ... and {len(problems) - _SHOWN:,} more; --json lists all")
