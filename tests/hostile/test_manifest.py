"""dsv4.manifest.json from strangers: refused at little cost, whatever it holds; and what an honest one may hold.

File names that lead outside and fields of a wrong kind are in ckpt/test_verify.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from refusals import refusal

from dsv4ckpt.errors import BadManifest
from dsv4ckpt.formats import MANIFEST_NAME, MAX_TENSORS
from dsv4ckpt.manifest import Manifest, read_manifest

LARGEST = 24 * 1024 * 1024
BEFORE = '{"format":1,"x":'
HONEST: dict[str, Any] = {
    "format": 1,
    "plan_sha256": "0" * 64,
    "options": {"layers": None},
    "source": [],
    "files": [{"file": "model.safetensors", "size": 1, "sha256": "0" * 64, "tensors": 1}],
    "values": {"not_exact": 0, "not_finite": 0},
    "dropped": [],
}


def filled(before: str, unit: str, after: str) -> str:
    return BEFORE + before + unit * ((LARGEST - len(BEFORE + before + after) - 1) // len(unit)) + after + "}"


def keys(count: int) -> str:
    return "{" + ",".join(f'"{number}":1' for number in range(count)) + "}"


LARGE: dict[str, Callable[[], str]] = {
    "zeros": lambda: "\0" * LARGEST,
    "blanks": lambda: filled("", " ", "0"),
    "lists": lambda: filled("[", "[],", "0]"),
    "objects": lambda: filled("[", "{},", "0]"),
    "objects in objects": lambda: filled("", '{"a":', "0"),
    "open lists": lambda: filled("", "[", ""),
    "as many objects as may be": lambda: BEFORE + "[" + "{}," * MAX_TENSORS + "0]}",
    "keys": lambda: BEFORE + keys(1_500_000) + "}",
    "one key again and again": lambda: filled("{", '"a":1,', '"b":1}'),
    "numbers": lambda: filled("[", "1,", "1]"),
    "fractions": lambda: filled("[", "1.5,", "1]"),
    "one number": lambda: filled("", "9", ""),
    "numbers of 4,000 digits": lambda: filled("[", "9" * 4000 + ",", "0]"),
    "numbers of 255 digits": lambda: filled("[", "9" * 255 + ",", "0]"),
    "one string": lambda: filled('"', "x", '"'),
    "escapes": lambda: filled('"', "\\u0061", '"'),
    "surrogate pairs": lambda: filled('"', "\\ud83d\\ude00", '"'),
    "strings": lambda: filled("[", '"' + "x" * 20 + '",', "0]"),
    "one byte too much": lambda: " " * (LARGEST + 1),
}


def read(directory: Path, text: str) -> Manifest | None:
    tiny.replace(directory / MANIFEST_NAME, text)
    return read_manifest(str(directory))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_manifest_of_the_largest_size_is_refused_cheaply(case: str, tmp_path: Path) -> None:
    tiny.replace(tmp_path / MANIFEST_NAME, LARGE[case]())
    error = refusal(lambda: read_manifest(str(tmp_path)), BadManifest, tmp_path)
    assert error.facts["file"] == MANIFEST_NAME


@pytest.mark.slow
def test_manifest_that_dropped_as_many_tensors_as_any_checkpoint_has_is_read(tmp_path: Path) -> None:
    rows = [
        {"name": f"layers.{n % 61}.ffn.experts.{n}.w1.weight", "reason": "--layers", "size": 11_010_048}
        for n in range(150_000)
    ]
    found = read(tmp_path, json.dumps({**HONEST, "dropped": rows}, indent=2))
    assert found is not None
    assert len(found.dropped) == 150_000


def test_manifest_with_fractions_among_its_options_is_read(tmp_path: Path) -> None:
    """Of --input-scales, for one."""
    options = {"layers": None, "input_scales": {"layers.0.ffn.experts.0.w1.input_scale": 0.5}}
    found = read(tmp_path, json.dumps({**HONEST, "options": options}))
    assert found is not None
    assert [file.name for file in found.files] == ["model.safetensors"]


@pytest.mark.parametrize("size", [1.0, -1, True, "1", None])
def test_manifest_with_a_size_that_is_no_count_is_refused(size: object, tmp_path: Path) -> None:
    files = [{**HONEST["files"][0], "size": size}]
    with pytest.raises(BadManifest):
        read(tmp_path, json.dumps({**HONEST, "files": files}))
