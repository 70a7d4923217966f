"""One flipped bit anywhere in an output: verify finds it and names the file, and sha256sum agrees.

A thousand flips at random places of a finished conversion, small files as often as large ones; then every bit of the
manifest itself, with a list of the fields in which a flip makes no difference to verification.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tools

from dsv4ckpt import plan, run, source
from dsv4ckpt.errors import BadManifest, Dsv4Error, UnsafePath
from dsv4ckpt.formats import INDEX_NAME, MANIFEST_NAME, SIDECAR_NAME, SUMS_NAME
from dsv4ckpt.manifest import Manifest, read_manifest
from dsv4ckpt.verify import verify_bytes

Often = Callable[[int, int], int]
SHARD_BYTES = 300_000


@pytest.fixture(scope="module")
def converted(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest sample as BF16, with its sidecar; nobody writes into it."""
    out = tmp_path_factory.mktemp("flips") / "out"
    options = plan.ConvertOptions(max_shard_bytes=SHARD_BYTES)
    made = plan.make_plan(tiny.survey_of(smallest), options)
    run.execute(made, source.open_checkpoint(str(smallest)), str(out))
    return out


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return tiny.copy_of(converted, tmp_path / "out")


def listed(directory: Path) -> list[str]:
    """The files that the manifest lists."""
    return [row["file"] for row in json.loads((directory / MANIFEST_NAME).read_bytes())["files"]]


class Flip(NamedTuple):
    """One bit of one file."""

    name: str
    byte: int
    bit: int

    def of(self, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[self.byte] ^= 1 << self.bit
        return bytes(changed)


def flips(directory: Path, count: int, seed: int) -> Iterator[Flip]:
    """Any file, then any place in it, so that a file of 50 bytes is hit as often as a shard."""
    rng, names = random.Random(seed), listed(directory)
    for _ in range(count):
        name = rng.choice(names)
        yield Flip(name, rng.randrange((directory / name).stat().st_size), rng.randrange(8))


def put(directory: Path, flip: Flip) -> None:
    tiny.replace(directory / flip.name, flip.of((directory / flip.name).read_bytes()))


def mend(directory: Path, whole: Path, name: str) -> None:
    (directory / name).unlink()
    os.link(whole / name, directory / name)


def wrong_files(directory: Path) -> list[str]:
    """What verify finds."""
    return [
        verdict.name
        for verdict in verify_bytes(str(directory), num_workers=1).files
        if verdict.verdict != "ok"
    ]


def wrong_sums(directory: Path) -> list[str]:
    """What sha256sum finds, by the list that lies in the output."""
    command = ["sha256sum", "--check", "--strict", "--quiet", SUMS_NAME]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    failed = [line.removesuffix(": FAILED") for line in done.stdout.splitlines()]
    assert bool(failed) == (done.returncode != 0), done.stderr
    return failed


def missed(found: Callable[[Path], list[str]], out: Path, whole: Path, some: Iterator[Flip]) -> list[Flip]:
    """The flips for which not exactly the flipped file is found."""
    unfound = []
    for flip in some:
        put(out, flip)
        if found(out) != [flip.name]:
            unfound.append(flip)
        mend(out, whole, flip.name)
    return unfound


@pytest.mark.slow
def test_verify_finds_each_of_a_thousand_flipped_bits_and_names_the_file(
    out: Path, converted: Path, often: Often
) -> None:
    some = list(flips(converted, often(1000, 20_000), 1))
    assert {flip.name for flip in some} == {*listed(converted)}
    assert missed(wrong_files, out, converted, iter(some)) == []


@pytest.mark.slow
def test_sha256sum_finds_each_of_a_thousand_flipped_bits_by_the_list_in_the_output(
    out: Path, converted: Path, often: Often
) -> None:
    """All but those in the list itself, of which the manifest keeps the sum."""
    tools.require("sha256sum")
    some = [flip for flip in flips(converted, often(1000, 20_000), 1) if flip.name != SUMS_NAME]
    assert missed(wrong_sums, out, converted, iter(some)) == []


@pytest.mark.slow
def test_verify_and_sha256sum_find_a_few_flipped_bits(out: Path, converted: Path) -> None:
    """The quick version, for while one edits."""
    tools.require("sha256sum")
    some = [flip for flip in flips(converted, 60, 2) if flip.name != SUMS_NAME]
    assert missed(wrong_files, out, converted, iter(some)) == []
    assert missed(wrong_sums, out, converted, iter(some)) == []


def test_verify_and_sha256sum_find_nothing_in_an_output_without_flips(converted: Path) -> None:
    tools.require("sha256sum")
    assert wrong_files(converted) == wrong_sums(converted) == []


def test_manifest_and_sums_list_every_file_that_is_there(converted: Path) -> None:
    """Else a flip could lie where nobody looks."""
    there = {str(file.relative_to(converted)) for file in converted.rglob("*") if file.is_file()}
    summed = {line.split("  ", 1)[1] for line in (converted / SUMS_NAME).read_text().splitlines()}
    assert {*listed(converted)} == there - {MANIFEST_NAME}
    assert summed == there - {MANIFEST_NAME, SUMS_NAME}
    assert {INDEX_NAME, SIDECAR_NAME, "config.json", "LICENSE"} < summed
    assert len([name for name in there if name.endswith(".safetensors")]) > 4


# ---- the manifest itself

# What verify does not go by. The plan's hash, the source and what was selected serve other commands; a flip in them
# makes a second run start anew or refuse, and a comparison of values find differences that are none.
NO_BEARING = {
    "tool", "plan_sha256", "release", "options", "source", "values", "opaque", "dropped", "left", "tensors"
}  # fmt: skip


def differing(one: Any, two: Any, key: str = "") -> Iterator[str]:
    """The innermost names of fields in which two JSON documents differ; a field below one that has no bearing is it."""
    if key in NO_BEARING or type(one) is not type(two):
        if one != two or type(one) is not type(two):
            yield key
    elif isinstance(one, dict):
        for name in {*one, *two}:
            yield from differing(one.get(name), two.get(name), name)
    elif isinstance(one, list) and len(one) == len(two):
        for left, right in zip(one, two, strict=True):
            yield from differing(left, right, key)
    elif one != two:
        yield key


def read(directory: Path, data: bytes) -> Manifest | None:
    """What a changed manifest says; None: it is refused."""
    tiny.replace(directory / MANIFEST_NAME, data)
    try:
        return read_manifest(str(directory))
    except (BadManifest, UnsafePath):
        return None


def is_noticed(directory: Path, whole: Manifest, data: bytes) -> bool:
    """Whether verify would tell: the manifest is refused, or lists what is not there."""
    found = read(directory, data)
    return found is None or found.files != whole.files


@pytest.mark.slow
def test_manifest_with_any_bit_flipped_is_refused_or_wrong_or_says_the_same_of_every_file(
    converted: Path, tmp_path: Path, often: Often
) -> None:
    """Every night all bits, else every seventh. What goes unnoticed is blanks, and fields without a bearing."""
    whole, data = read_manifest(str(converted)), (converted / MANIFEST_NAME).read_bytes()
    assert whole is not None
    document, unnoticed = json.loads(data), set()
    for place in range(0, 8 * len(data), often(7, 1)):
        changed = Flip(MANIFEST_NAME, place // 8, place % 8).of(data)
        if not is_noticed(tmp_path, whole, changed):
            unnoticed |= {*differing(document, json.loads(changed))}
    known = {name for name in unnoticed if name in NO_BEARING}
    # a key of them that is spelled otherwise is another key, of which nobody takes notice
    assert all(near(name, NO_BEARING) for name in unnoticed - known), unnoticed - known
    assert known


def near(name: str, others: set[str]) -> bool:
    """Whether one flipped bit makes a name of another."""
    return any(
        len(name.encode()) == len(other)
        and sum((a ^ b).bit_count() for a, b in zip(name.encode(), other.encode(), strict=True)) == 1
        for other in others
    )


def flipped(value: int | str) -> int | str:
    """One bit of a number, or of the number that a text begins with, or of its first letter."""
    if isinstance(value, int):
        return value ^ 1
    first = f"{int(value[0], 16) ^ 1:x}" if value[0] in "0123456789abcdef" else chr(ord(value[0]) ^ 1)
    return first + value[1:]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["file", "size", "sha256"])
def test_verify_finds_a_flip_in_what_the_manifest_says_of_any_file(field: str, out: Path) -> None:
    """Through the whole of verify, one file after the other."""
    document = json.loads((out / MANIFEST_NAME).read_bytes())
    for row in document["files"]:
        before = row[field]
        row[field] = flipped(before)
        tiny.replace(out / MANIFEST_NAME, json.dumps(document))
        told = row["file"]
        row[field] = before
        assert wrong_files(out) == [told]


def test_manifest_bits_that_verify_does_not_go_by_leave_the_verdict_as_it_is(out: Path) -> None:
    document = json.loads((out / MANIFEST_NAME).read_bytes())
    document["tool"] += "x"
    document["values"]["unchanged_tensors"] += 1
    tiny.replace(out / MANIFEST_NAME, json.dumps(document))
    assert wrong_files(out) == []


def test_run_into_an_output_with_a_flipped_plan_hash_is_refused_and_changes_nothing(
    smallest: Path, out: Path
) -> None:
    """The one field without a bearing on verify by which a finished output is known again."""
    document = json.loads((out / MANIFEST_NAME).read_bytes())
    document["plan_sha256"] = hashlib.sha256(b"another").hexdigest()
    tiny.replace(out / MANIFEST_NAME, json.dumps(document))
    before = {name: (out / name).read_bytes() for name in [*listed(out), MANIFEST_NAME]}
    made = plan.make_plan(tiny.survey_of(smallest), plan.ConvertOptions(max_shard_bytes=SHARD_BYTES))
    with pytest.raises(Dsv4Error) as raised:
        run.execute(made, source.open_checkpoint(str(smallest)), str(out))
    assert raised.value.exit_code == 2
    assert {name: (out / name).read_bytes() for name in before} == before
