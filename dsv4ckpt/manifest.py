"""dsv4.manifest.json: what a finished output directory says about itself, read strictly.  Knows no tensors' bytes.

The manifest may come from a stranger: its file names must be plain and relative before anything is opened.
run.py writes it, last of all files; verify and a second run of the same plan read it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from . import contained, formats, probe, shard, source, strictjson
from .errors import BadManifest, UnsafePath
from .formats import MANIFEST_NAME

_SHA256 = re.compile("[0-9a-f]{64}")
# What parsing may cost is bounded before it: most of a manifest is what was dropped, in objects of three values.
_MAX_BYTES = 24 * 1024 * 1024
_LIMITS = strictjson.Limits(
    objects=formats.MAX_TENSORS + 10_000, lists=1000, commas=3 * (formats.MAX_TENSORS + 10_000)
)
_REMAKE = "convert again into a new directory"
_WORDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}
_Item = TypeVar("_Item")


class Listed(NamedTuple):
    """A file as the manifest describes it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What dsv4.manifest.json says, checked."""

    plan_sha256: str
    files: tuple[Listed, ...]
    source: frozenset[Listed]  # shards that the output was made from; the SHA-256 is their header's
    proofs: dict[str, dict[str, str]]  # source shard -> what tells its data from others: Checkpoint.proof
    origin: dict[str, str]  # repository and commit of a source on the Hub; empty if it was not there
    layers: tuple[int, ...] | None  # source layers that were selected; None: all
    dropped: frozenset[str]  # tensors of the source that were left out
    num_unchanged: int | None  # tensors with the source's bytes; None: it does not say
    num_inexact: int
    num_not_finite: int
    tool: str | None  # told to people only, as it stands there
    release: str | None
    options: dict[str, Any]

    @property
    def is_of_a_model(self) -> bool:
        """Whether a model was saved here: its values are new, and nothing vouches that they are those of a release."""
        return any(listed.name == formats.MODEL_NAME for listed in self.source)


def read_manifest(directory: str, *, follow_links: bool = False) -> Manifest | None:
    """Read a directory's manifest; None if it has none. raises BadManifest, UnsafePath, Environment"""
    if not probe.is_there(os.path.join(directory, MANIFEST_NAME)):
        return None
    with contained.opened(directory, MANIFEST_NAME, follow_links) as fd:
        size = os.fstat(fd).st_size
        _require_modest(size)
        data = shard.read_exactly(fd, size, 0, MANIFEST_NAME)
    return parse_manifest(data)


def manifest_of(checkpoint: source.Checkpoint) -> Manifest | None:
    """The manifest of a checkpoint, wherever that is. raises as read_manifest"""
    size = checkpoint.size_of(MANIFEST_NAME)
    if size is None:
        return None
    _require_modest(size)
    return parse_manifest(checkpoint.read_small(MANIFEST_NAME))


def _require_modest(size: int) -> None:
    if size > _MAX_BYTES:
        raise _bad("too large", f"at most {_MAX_BYTES:,} bytes", f"{size:,} bytes")


def parse_manifest(data: bytes) -> Manifest:
    """raises BadManifest, UnsafePath"""
    try:
        strictjson.require_modest(data, _LIMITS)
        document = strictjson.loads(data, floats=True)  # --input-scales are told
    except strictjson.Malformed as error:
        raise _bad(f"malformed: {error}") from None
    if _field(document, "format", int) != 1:
        raise _bad("of a format that this version does not know", 1, document["format"])
    options = _field(document, "options", dict)
    layers = None if options.get("layers", ()) is None else _field(options, "layers", list)
    if layers and not _ascend(layers):
        raise _bad("wrong in `layers`", "ascending numbers", repr(layers)[:80])
    files = tuple(_listed(row, "sha256") for row in _field(document, "files", list))
    twice = [name for name, count in Counter(listed.name for listed in files).items() if count > 1]
    if twice:
        raise _bad("wrong in `files`", "every file once", f"{twice[0]!r} twice")
    values = _field(document, "values", dict)
    return Manifest(
        plan_sha256=_field(document, "plan_sha256", str),
        files=files,
        source=frozenset(_listed(row, "header_sha256") for row in _field(document, "source", list)),
        proofs={_field(row, "file", str): _proof(row) for row in _field(document, "source", list)},
        origin=_origin(document),
        layers=None if layers is None else tuple(layers),
        dropped=frozenset(_field(row, "name", str) for row in _field(document, "dropped", list)),
        num_unchanged=_field(values, "unchanged_tensors", int) if "unchanged_tensors" in values else None,
        num_inexact=_field(values, "not_exact", int),
        num_not_finite=_field(values, "not_finite", int),
        tool=_text(document, "tool"),
        release=_text(document, "release"),
        options=options,
    )


def _bad(what: str, expected: object = None, found: object = None) -> BadManifest:
    return BadManifest(
        f"the manifest is {what}", file=MANIFEST_NAME, expected=expected, found=found, do=_REMAKE
    )


def _field(fields: Any, key: str, kind: type[_Item]) -> _Item:
    value = fields.get(key) if isinstance(fields, dict) else None
    if type(value) is not kind:
        raise _bad(f"wrong in `{key}`", _WORDS[kind], repr(value)[:80])
    return value


def _text(fields: dict[str, Any], key: str) -> str | None:
    value = fields.get(key)
    return value if isinstance(value, str) else None


def _proof(row: dict[str, Any]) -> dict[str, str]:
    return {key: _field(row, key, str) for key in source.PROOFS if key in row} or {
        source.PROOFS[0]: _field(row, source.PROOFS[0], str)
    }


def _origin(document: dict[str, Any]) -> dict[str, str]:
    """What can be one, or nothing: it is told to people, and in a model card."""
    found = {key: _text(document, f"source_{key}") or "" for key in ("repository", "commit")}
    plain = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", found["repository"], re.ASCII)
    return found if plain and re.fullmatch("[0-9a-f]{40}", found["commit"]) else {}


def _ascend(numbers: list[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers) and numbers == sorted({*numbers})


def _listed(row: Any, sha256_key: str) -> Listed:
    listed = Listed(_field(row, "file", str), _field(row, "size", int), _field(row, sha256_key, str))
    plain = listed.name.isprintable() and len(listed.name) <= formats.MAX_NAME_CHARS
    if not plain or {"", ".", ".."} & {*listed.name.split("/")}:
        raise UnsafePath(
            "the manifest lists something that is no plain relative file name",
            file=MANIFEST_NAME,
            found=repr(listed.name)[:200],
            do="do not use this directory: its manifest was tampered with",
        )
    if listed.size < 0 or not _SHA256.fullmatch(listed.sha256):
        raise _bad(f"wrong about {listed.name!r}", "a size and 64 hexadecimal digits", repr(row)[:200])
    return listed
