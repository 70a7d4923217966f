"""The model card of a converted or trained directory, made from its manifest.  Knows no network and opens no file.

The manifest may come from a stranger: words of it that stand outside of quotes are taken from our own tables.
Source: the Hub's metadata of model cards (base_model, base_model_relation: quantized, finetune or adapter).
"""

from __future__ import annotations

from typing import NamedTuple

from .errors import printable
from .formats import Target
from .manifest import Manifest
from .names import Namespace
from .release import RELEASES

CARD_NAME = "README.md"


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


def card_of(manifest: Manifest, repo: str) -> str:
    """README.md for a repository: what this is, what was done, and how anybody can check it."""
    made = _made(manifest)
    release = RELEASES.get(manifest.release or "")
    base = release.repository if release else None
    target = next((item.value for item in Target if item.value == manifest.options.get("to")), None)
    title = repo.partition("/")[2]
    return "\n".join(
        [
            "---",
            *([f"base_model: {base}", f"base_model_relation: {made.relation}"] if base else []),
            "pipeline_tag: text-generation",
            "tags:",
            "- deepseek_v4",
            "- dsv4ckpt",
            *([f"- {target}"] if target else []),
            "---",
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
            "## How to check it",
            "",
            f"`dsv4.manifest.json` has the size and the SHA-256 of every file but `{CARD_NAME}`. For large files",
            "this is also the id that the Hub shows.",
            "",
            "```bash",
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
        "release": f"[{base}](https://huggingface.co/{base})" if base else _quoted(manifest.release),
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
    rows["values that were rounded"] = f"{manifest.num_inexact:,}"
    return rows


def _command(manifest: Manifest, made: _Made, base: str | None) -> str:
    """As it has to be given again; where files lay is nobody's business."""
    source = "RUN" if made is not _CONVERTED else base.partition("/")[2] if base else "SRC"
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
