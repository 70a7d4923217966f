"""dsv4 verify: structure, bytes, values, and ids from the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from dsv4ckpt import compare, hub, hub_source, oids, survey, verify
from dsv4ckpt.errors import EXIT_DIFFERENT, EXIT_OK, Usage
from dsv4ckpt.formats import CARD_NAME, MANIFEST_NAME
from dsv4ckpt.hub_source import HubCheckpoint
from dsv4ckpt.stop import StopFlag

from .common import common_options, follow_links_option, open_any, stopping_on_signals
from .progress import Progress
from .words import Console, Subset, human, plural, table

_SHOWN = 20  # differences; --json lists all


class _FileOrHub(click.Path):
    """A file that is there, or an address that begins with hf://."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith(hub.PREFIX):
            return value
        return super().convert(value, param, ctx)


@click.command("verify")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path(), required=False)
@click.option(
    "--level",
    type=click.Choice(["structure", "bytes", "values"]),
    help="structure: headers only. bytes: SHA-256 against the manifest; with B, stored bytes of both, and their "
    "files. values: decode both and compare.  [default: bytes, with B values]",
)
@click.option(
    "--against-hub-oids",
    "oids_path",
    type=_FileOrHub(exists=True, dir_okay=False),
    metavar="FILE|hf://owner/name",
    help="Hash A's files and compare them with the ids that the Hub publishes: now, or in FILE. FILE: `git lfs "
    "ls-files -l` in a clone, `sha256sum *` elsewhere, or JSON of the Hub's tree or model info (see above).",
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
    oids_path: str | None,
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

    With --level bytes, shards, config, index and small files of both are compared as files too. Shards that hold the
    same tensors in another order or split are told, and no failure.

    Of hf://owner/name[@revision] the ids that the Hub publishes are compared with the manifest, and nothing is
    downloaded; values come by ranges.

    \b
    Examples:
      dsv4 verify flash-bf16
      dsv4 verify hf://me/flash-bf16
      dsv4 verify DeepSeek-V4-Flash flash-bf16 --level values
      dsv4 verify DeepSeek-V4-Flash flash-bf16 --subset 1/20
      dsv4 verify DeepSeek-V4-Flash restored --level bytes
      dsv4 verify DeepSeek-V4-Flash --against-hub-oids hf://deepseek-ai/DeepSeek-V4-Flash
      dsv4 verify restored --against-hub-oids oids.txt

    \b
    Ids as a file, for a machine without network: of LFS files in a clone (no need to fetch them), or of all files:
      GIT_LFS_SKIP_SMUDGE=1 git clone https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash
      git -C DeepSeek-V4-Flash lfs ls-files -l > oids.txt
      python -c "import dataclasses, json, huggingface_hub as hub; \\
        info = hub.HfApi().model_info('deepseek-ai/DeepSeek-V4-Flash', files_metadata=True); \\
        print(json.dumps({'siblings': [dataclasses.asdict(s) for s in info.siblings]}))" > oids.json
    """
    if oids_path is not None:
        if b is not None or level or tensors or unit_scale:
            raise Usage(
                "--against-hub-oids compares the files of one directory with a list, whatever is in them",
                expected="dsv4 verify A --against-hub-oids FILE",
                do="leave out B, --level, --tensor and --unit-scale",
            )
        return _against_oids(a, oids_path, subset, workers, follow_links, console)
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
    checkpoint = open_any(path, follow_links=follow_links)
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
    if level == "bytes" or (level is None and structure.has_manifest):
        if isinstance(checkpoint, HubCheckpoint):
            report = verify.verify_published(checkpoint, subset=subset)
        else:
            with _watched(console) as (on_event, stop):
                report = verify.verify_bytes(
                    path,
                    subset=subset,
                    follow_links=follow_links,
                    num_workers=workers,
                    on_event=on_event,
                    stop=stop,
                )
        _say_problems(
            [_file_words(file) for file in report.files if file.verdict not in ("ok", verify.OTHER_CARD)],
            console,
        )
        if any(file.verdict == verify.OTHER_CARD for file in report.files):
            console.say(f"  card      {CARD_NAME} is another one than the source's, as a model card may be")
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


def _published(oids_path: str) -> tuple[tuple[oids.Published, ...], str]:
    """Ids, and where they are from. raises BadManifest, UnsafePath, HubFailed"""
    if not oids_path.startswith(hub.PREFIX):
        return oids.read_list(oids_path), f"in {os.path.basename(oids_path)}"
    repo, files = hub_source.listed(oids_path)
    found = (oids.Published(name, *remote) for name, remote in sorted(files.items()))
    return tuple(found), f"of {repo.name}, commit {repo.revision}"


def _against_oids(
    path: str,
    oids_path: str,
    subset: tuple[int, int] | None,
    workers: int,
    follow_links: bool,
    console: Console,
) -> int:
    published, where = _published(oids_path)
    console.say(f"{path}: against {plural(len(published), 'id')} {where}", bold=True)
    with _watched(console) as (on_event, stop):
        report = oids.verify_oids(
            path,
            published,
            subset=subset,
            follow_links=follow_links,
            num_workers=workers,
            on_event=on_event,
            stop=stop,
        )
    problems = [_file_words(file) for file in report.files if file.verdict != "ok"]
    problems += [f"{name}: the list does not know this shard" for name in report.unlisted]
    _say_problems(problems, console)
    good = sum(file.verdict == "ok" for file in report.files)
    files = plural(len(report.files), "file")
    console.say(f"  ids       {good} of {files} have the published id, {human(report.num_bytes)} hashed")
    if not report.files:
        console.say("  nothing was compared: no listed file is here")
    if report.not_here:
        console.say(f"  not here  {_few(report.not_here)}: listed, but no checkpoint needs them")
    return _conclude({"ok": report.ok, "oids": report.document()}, console)


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
        survey.survey(open_any(path, follow_links=follow_links), unit_scales=unit_scales)
        for path in (path_a, path_b)
    ]
    for letter, path, found in zip("AB", (path_a, path_b), surveys, strict=True):
        identity = found.identity
        what = f"{identity.release.name}, {identity.storage}, {identity.namespace} names"
        console.say(f"{letter} {path}: {what}", bold=True)
    with _watched(console) as (on_event, stop):
        report = compare.verify_values(
            surveys[0],
            surveys[1],
            subset=subset,
            tensors=tensors,
            num_workers=workers,
            on_event=on_event,
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
    document: dict[str, Any] = {"ok": report.ok and not same_bytes, "values": report.document()}
    if level == "bytes" and (subset or tensors):
        console.say("  files     not compared: only a part of the tensors was")
    elif level == "bytes":
        with stopping_on_signals(stop):
            a, b = (found.checkpoint for found in surveys)
            files = verify.compare_files(a, b, report.proven, stop=stop)
        _say_files(files, console)
        document |= {"ok": document["ok"] and files.ok, "files": files.document()}
    return _conclude(document, console)


def _say_files(files: verify.FilesReport, console: Console) -> None:
    """`7 of 7 shards identical, config.json identical, ...`, then the names of those that are not."""
    parts = []
    for kind, word in (
        ("shard", "shards"),
        ("config", "config.json"),
        ("index", "index"),
        ("small", "small files"),
    ):
        pairs = [pair for pair in files.pairs if pair.kind == kind]
        good = sum(pair.state is verify.FileState.IDENTICAL for pair in pairs)
        if kind in ("shard", "small"):
            parts += [f"{good} of {len(pairs)} {word} identical"]
        else:
            parts += [f"{word} {pair.state}" for pair in pairs]
    console.say(f"  files     {', '.join(parts)}")
    for state, comment in (
        (verify.FileState.DIFFERS, ""),
        (verify.FileState.OTHER_LAYOUT, " (no failure: the tensors of both were compared one by one)"),
        (verify.FileState.ONLY_A, " (no failure)"),
        (verify.FileState.ONLY_B, " (no failure)"),
    ):
        names = [pair.name for pair in files.pairs if pair.state is state]
        if names:
            console.say(f"    {state}{comment}: {_few(names)}")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more; --json lists all" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def _watched(console: Console) -> Iterator[tuple[verify.OnEvent, StopFlag]]:
    """A progress bar and a flag that signals raise, for as long as the work takes."""
    stop = StopFlag()
    with Progress("verify", quiet=console.quiet) as progress, stopping_on_signals(stop):
        yield _follow(progress), stop


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


def _file_words(file: verify.FileVerdict) -> str:
    facts = f", expected {file.expected}, found {file.found}" if file.found else ""
    return f"{file.name}: {file.verdict}{facts}"


def _sentence(item: compare.TensorVerdict) -> str:
    if item.apart is None:
        return f"{item.name}: {item.verdict}" + (f": {item.reason}" if item.reason else "")
    apart = item.apart
    many = f"{plural(apart.num_values, 'value')} differ by up to {apart.distance} ulp of {apart.unit}"
    first = f"first at row {apart.row}, column {apart.col}: {apart.a} in A, {apart.b} in B"
    return "; ".join([f"{item.name}: {many}", first, *filter(None, [item.reason])])


def _say_problems(problems: list[str], console: Console) -> None:
    for text in problems[:_SHOWN]:
        console.say(f"  {text}")
    if len(problems) > _SHOWN:
        console.say(f"  ... and {len(problems) - _SHOWN:,} more; --json lists all")
