"""The model card of a converted or trained directory, made from its manifest.  Knows no network and opens no file.

The manifest may come from a stranger: words of it that stand outside of quotes are taken from our own tables.
Source: the Hub's metadata of model cards (base_model, base_model_relation: quantized, finetune or adapter).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .errors import printable
from .formats import CARD_NAME, Target
from .manifest import Manifest
from .names import Namespace
from .release import RELEASES

_LICENSE = re.compile(r"(?:license|license_name|license_link): [\w.:/#-]{1,200}", re.ASCII)


class _Made(NamedTuple):
    """How something came about: the Hub's word for it, and ours."""

    relation: str
    verb: str
    sentence: str


_CONVERTED = _Made(
    "quantized", "convert", "The weights are those of the release, converted and not trained further."
)
_TRAINED = _Made("finetune", "export", "The weights were trained further, and exported from the run.")
_ADAPTERS = _Made("adapter", "export", "Adapters in PEFT's format, for the weights of the release.")


def metadata_of(base: str | None, relation: str, target: object, licenses: Sequence[str] = ()) -> list[str]:
    """The lines that the Hub reads: between, and with, the two --- at the beginning of a card."""
    known = [item.value for item in Target if item.value == target]
    return [
        "---",
        *licenses,
        *([f"base_model: {base}", f"base_model_relation: {relation}"] if base else []),
        "pipeline_tag: text-generation",
        "tags:",
        "- deepseek_v4",
        "- dsv4ckpt",
        *(f"- {word}" for word in known),
        "---",
    ]


def early_card(release: str, target: str, repository: str | None, source_card: str) -> str:
    """What can be said before a conversion: enough for the Hub to accept or refuse.

    repository    the source's, if it is on the Hub
    source_card   as in card_of
    """
    base = repository or (RELEASES[release].repository if release in RELEASES else None)
    return "\n".join([*metadata_of(base, _CONVERTED.relation, target, licenses_of(source_card)), ""])


def licenses_of(card: str) -> list[str]:
    """The lines about the licence in a card's metadata."""
    head = card.partition("---\n")[2].partition("\n---")[0] if card.startswith("---\n") else ""
    return [line for line in head.splitlines() if _LICENSE.fullmatch(line)]


def card_of(manifest: Manifest, repo: str, source_card: str = "") -> str:
    """README.md for a repository: what this is, what was done, and how anybody can check it.

    source_card   that of the source, whose licence holds on
    """
    made = _made(manifest)
    release = RELEASES.get(manifest.release or "")
    base = manifest.origin.get("repository") or (release.repository if release else None)
    title = repo.partition("/")[2]
    return "\n".join(
        [
            *metadata_of(base, made.relation, manifest.options.get("to"), licenses_of(source_card)),
            f"# {title}",
            "",
            made.sentence,
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in _rows(manifest, base).items()),
            "",
            "## How it was made",
            "",
            "```bash",
            _command(manifest, made, base),
            "```",
            "",
            "## What was checked",
            "",
            *(f"- {sentence}" for sentence in _checked(manifest)),
            "",
            "## How to check it",
            "",
            f"`dsv4.manifest.json` has the size and the SHA-256 of every file but `{CARD_NAME}`. For large files",
            "this is also the id that the Hub shows.",
            "",
            "```bash",
            f"dsv4 verify hf://{repo}     # compares the ids, downloads nothing",
            f"hf download {repo} --local-dir {title}",
            f"dsv4 verify {title}",
            f"(cd {title} && sha256sum -c dsv4.sha256)     # without dsv4",
            "```",
            "",
        ]
    )


def _made(manifest: Manifest) -> _Made:
    if manifest.options.get("adapter"):
        return _ADAPTERS
    return _TRAINED if manifest.is_of_a_model else _CONVERTED


def _rows(manifest: Manifest, base: str | None) -> dict[str, str]:
    rows = {
        "source": f"[{base}](https://huggingface.co/{base})" if base else _quoted(manifest.release),
    }
    if manifest.origin:
        commit = manifest.origin["commit"]
        rows["source commit"] = f"[`{commit}`](https://huggingface.co/{base}/tree/{commit})"
    rows |= {
        "made with": _quoted(manifest.tool),
        "plan": f"`{manifest.plan_sha256[:16]}`" if manifest.plan_sha256.isalnum() else "unknown",
        "files": f"{len(manifest.files):,}, {sum(file.size for file in manifest.files):,} bytes",
    }
    for key in ("to", "names"):
        if key in manifest.options:
            rows[{"to": "storage format", "names": "tensor names"}[key]] = _quoted(manifest.options[key])
    if manifest.layers is not None:
        rows["layers"] = f"{len(manifest.layers):,} of the release's"
    rows["tensors left out"] = f"{len(manifest.dropped):,}"
    return rows


def _checked(manifest: Manifest) -> Iterator[str]:
    """What the manifest vouches for."""
    if manifest.origin:
        yield "Every shard that was read had the SHA-256 that the Hub publishes for it at the source commit."
    if manifest.num_unchanged is not None:
        yield f"{manifest.num_unchanged:,} tensors have the very bytes of the source; the others were recoded."
    exact = (
        "No value was rounded"
        if not manifest.num_inexact
        else f"{manifest.num_inexact:,} values were rounded"
    )
    yield f"{exact}; {manifest.num_not_finite:,} are NaN or infinite."


def _command(manifest: Manifest, made: _Made, base: str | None) -> str:
    """As it has to be given again; where files lay is nobody's business."""
    source = "RUN" if made is not _CONVERTED else base.partition("/")[2] if base else "SRC"
    if made is _CONVERTED and manifest.origin:
        source = "hf://{repository}@{commit}".format(**manifest.origin)
    words = ["dsv4", made.verb, source, "OUT"]
    if made is _ADAPTERS:
        return " ".join([*words, "--adapter"])
    for key, kind in (("to", Target), ("names", Namespace)):
        known = [item.value for item in kind if item.value == manifest.options.get(key)]
        words += [f"--{key}", *known] if known else []
    if manifest.layers:
        words += ["--layers", ",".join(map(str, manifest.layers))]
    if manifest.options.get("mtp") == "drop":
        words += ["--mtp", "drop"]
    if manifest.options.get("scale_policy") == "fresh":
        words += ["--scale-policy", "fresh"]
    return " ".join(words)


def _quoted(value: object) -> str:
    """A word of the manifest, as code."""
    text = printable(str(value))[:80].replace("`", "'").replace("|", "/")
    return f"`{text}`"
