"""Conservation: every tensor of a checkpoint is used once or named as dropped, and every change of one is detected.

For each tensor of the flash sample in turn: removed, renamed, stored a second time, of another dtype or shape with as
many bytes. All of it is found by make_plan, from headers, before any output exists.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import Tensor

from dsv4ckpt import plan, source, steps, survey
from dsv4ckpt.errors import (
    EXIT_BAD_INPUT,
    BadIndex,
    Dsv4Error,
    MissingScale,
    NotConform,
    OrphanScale,
    UnknownRelease,
)
from dsv4ckpt.source import Checkpoint, Location

OTHER_DTYPE = {"BF16": "F16", "F32": "I32", "I64": "F64", "I8": "U8", "F8_E4M3": "F8_E5M2", "F8_E8M0": "U8"}
Change = Callable[[Checkpoint, str], None]


@pytest.fixture(scope="module")
def whole(flash: Path) -> Checkpoint:
    return source.open_checkpoint(str(flash))


def copy_of(checkpoint: Checkpoint) -> Checkpoint:
    """The same headers, to be changed in memory: as a checkpoint whose index agrees with the change."""
    return dataclasses.replace(checkpoint, tensors=dict(checkpoint.tensors), problems=[])


def verdict(checkpoint: Checkpoint) -> BaseException | None:
    """What make_plan raises for it; None: it is accepted."""
    try:
        plan.make_plan(survey.survey(checkpoint), plan.ConvertOptions())
    except Exception as error:  # noqa: BLE001 - a wrong class is a finding
        return error
    return None


def refusal(checkpoint: Checkpoint) -> Dsv4Error:
    error = verdict(checkpoint)
    assert isinstance(error, Dsv4Error), error
    return error


def owner(name: str) -> str:
    """The weight or scale's common stem: a message may name either."""
    return name.removesuffix(".weight").removesuffix(".scale")


def removed(checkpoint: Checkpoint, name: str) -> None:
    del checkpoint.tensors[name]


def renamed(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.tensors[name + "_"] = checkpoint.tensors.pop(name)


def renumbered(checkpoint: Checkpoint, name: str) -> None:
    """layers.0. -> layers.00.: the same number, another name."""
    head, dot, rest = name.partition(".")
    checkpoint.tensors[f"{head}{dot}0{rest}"] = checkpoint.tensors.pop(name)


def in_capitals(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.tensors[name.upper()] = checkpoint.tensors.pop(name)


def added(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.tensors[name + ".copy"] = checkpoint.tensors[name]


def put(checkpoint: Checkpoint, name: str, **fields: object) -> None:
    place = checkpoint.tensors[name]
    checkpoint.tensors[name] = Location(place.shard, place.entry._replace(**fields))  # type: ignore[arg-type]


def retyped(checkpoint: Checkpoint, name: str) -> None:
    put(checkpoint, name, dtype=OTHER_DTYPE[checkpoint.tensors[name].entry.dtype])


def deepened(checkpoint: Checkpoint, name: str) -> None:
    put(checkpoint, name, shape=(1, *checkpoint.tensors[name].entry.shape))


def flattened(checkpoint: Checkpoint, name: str) -> None:
    shape = checkpoint.tensors[name].entry.shape
    count = 1
    for length in shape:
        count *= length
    put(checkpoint, name, shape=(count,) if len(shape) > 1 else (count, 1))


def stretched(checkpoint: Checkpoint, name: str) -> None:
    """[R, C] -> [2R, C/2], or [2, C/2] for a vector; where that is impossible, transposed or deeper."""
    *rows, cols = checkpoint.tensors[name].entry.shape
    if cols % 2 == 0:
        put(checkpoint, name, shape=(2 * rows[0], cols // 2) if rows else (2, cols // 2))
    elif rows and rows[0] != cols:
        put(checkpoint, name, shape=(cols, rows[0]))
    else:
        put(checkpoint, name, shape=(*rows, cols, 1))


CHANGES: dict[str, Change] = {
    change.__name__: change for change in (removed, renamed, added, retyped, deepened, flattened, stretched)
}
Verdicts = Callable[[str], dict[str, BaseException | None]]


@pytest.fixture(scope="module")
def verdicts(whole: Checkpoint) -> Verdicts:
    """What is said about each tensor when it alone is changed; None: nothing."""

    @functools.cache
    def about(change: str) -> dict[str, BaseException | None]:
        found: dict[str, BaseException | None] = {}
        for name in whole.tensors:
            changed = copy_of(whole)
            CHANGES[change](changed, name)
            found[name] = verdict(changed)
        return found

    return about


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_tensor_changed_in_turn_is_detected_with_exit_code_3(change: str, verdicts: Verdicts) -> None:
    found = verdicts(change)
    right = {name for name, error in found.items() if isinstance(error, NotConform | UnknownRelease)}
    assert {name: error for name, error in found.items() if name not in right} == {}
    assert NotConform.exit_code == UnknownRelease.exit_code == EXIT_BAD_INPUT


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_tensor_changed_in_turn_is_told_by_its_name(change: str, verdicts: Verdicts) -> None:
    """Who reads the message must find the tensor: one bad tensor is no unknown release."""
    untold = {
        name: type(error).__name__
        for name, error in verdicts(change).items()
        if not isinstance(error, NotConform) or owner(name) not in str(error)
    }
    assert untold == {}


@pytest.mark.slow
@pytest.mark.parametrize("change", [renumbered, in_capitals])
def test_tensor_under_a_name_that_is_nearly_right_is_detected(change: Change, whole: Checkpoint) -> None:
    for name in list(whole.tensors)[::5]:
        changed = copy_of(whole)
        change(changed, name)
        assert isinstance(refusal(changed), NotConform | UnknownRelease), name


@pytest.mark.slow
def test_every_swap_of_two_names_of_different_shape_is_detected(whole: Checkpoint) -> None:
    names = list(whole.tensors)
    for one, two in itertools.pairwise(names):
        changed = copy_of(whole)
        changed.tensors[one], changed.tensors[two] = whole.tensors[two], whole.tensors[one]
        seen = whole.seen
        if seen[one] != seen[two]:
            assert isinstance(refusal(changed), NotConform | UnknownRelease), (one, two)


# ---- the same through real files, with an index that agrees

SOME = (
    "head.weight", "norm.weight", "hc_head_scale", "layers.0.ffn.gate.tid2eid", "layers.1.attn.wq_a.weight",
    "layers.1.attn.wq_a.scale", "layers.2.ffn.experts.7.w2.weight", "layers.2.ffn.experts.7.w2.scale",
    "mtp.0.e_proj.weight", "layers.3.attn.compressor.ape",
)  # fmt: skip
NEW_SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "deeper": lambda shape: (1, *shape),
    "flat": lambda shape: (*shape, 1) if len(shape) == 1 else (shape[0] * shape[1],),
}


def written(directory: Path, name: str, new_name: str | None, tensor: Tensor) -> None:
    """Put `tensor` as `new_name` in the place of tensor `name` (None: nothing), in its shard and in the index."""
    shard = tiny.shard_of(directory, name)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[name]
        if new_name is not None:
            tensors[new_name] = tensor

    tiny.edit_shard(shard, edit)
    if new_name != name:
        tiny.edit_weight_map(directory, lambda names: names.pop(name))
        if new_name is not None:
            tiny.edit_weight_map(directory, lambda names: names.update({new_name: shard.name}))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("how", ["removed", "renamed", "retyped", *NEW_SHAPES])
def test_tensor_changed_in_its_file_is_detected_by_name(how: str, name: str, checkpoint: Path) -> None:
    tensor = tiny.read_shard(tiny.shard_of(checkpoint, name))[name]
    new_name = {"removed": None, "renamed": name + "_"}.get(how, name)
    if how == "retyped":
        tensor = tensor._replace(dtype=OTHER_DTYPE[tensor.dtype])
    elif how in NEW_SHAPES:
        tensor = tensor._replace(shape=NEW_SHAPES[how](tensor.shape))
    written(checkpoint, name, new_name, tensor)
    read = source.open_checkpoint(str(checkpoint))
    read.require_sound()
    error = refusal(read)
    assert isinstance(error, NotConform)
    assert error.exit_code == EXIT_BAD_INPUT
    assert owner(name) in str(error)


@pytest.mark.parametrize("name", SOME)
def test_tensor_removed_from_its_file_but_not_from_the_index_is_a_bad_index(
    name: str, checkpoint: Path
) -> None:
    tiny.edit_shard(tiny.shard_of(checkpoint, name), lambda tensors: tensors.pop(name))
    error = refusal(source.open_checkpoint(str(checkpoint)))
    assert isinstance(error, BadIndex)
    assert name in str(error)


def test_convert_of_a_checkpoint_that_does_not_conform_makes_no_output(
    checkpoint: Path, tmp_path: Path
) -> None:
    written(checkpoint, "norm.weight", None, Tensor("U8", (0,), b""))
    command = [
        sys.executable,
        "-m",
        "dsv4cli",
        "convert",
        str(checkpoint),
        str(tmp_path / "out"),
        "--to",
        "bf16",
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert b"norm.weight" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- scales and their weights


@pytest.mark.parametrize(
    "name", ["layers.1.attn.wq_a", "layers.2.ffn.experts.7.w2", "layers.0.ffn.experts.0.w1", "mtp.0.e_proj"]
)
def test_weight_without_its_scales_is_a_missing_scale_with_advice(name: str, whole: Checkpoint) -> None:
    changed = copy_of(whole)
    removed(changed, name + ".scale")
    error = refusal(changed)
    assert isinstance(error, MissingScale)
    assert f"--unit-scale {name}.weight" in error.facts["do"]


@pytest.mark.parametrize(
    "name", ["layers.1.attn.wq_a", "layers.2.ffn.experts.7.w2", "layers.0.ffn.experts.0.w1", "mtp.0.e_proj"]
)
def test_scales_without_their_weight_are_an_orphan_scale(name: str, whole: Checkpoint) -> None:
    changed = copy_of(whole)
    removed(changed, name + ".weight")
    error = refusal(changed)
    assert isinstance(error, OrphanScale)
    assert f"{name}.weight" in error.what


def test_missing_scale_that_the_user_declared_to_be_1_is_accepted(whole: Checkpoint) -> None:
    changed = copy_of(whole)
    removed(changed, "mtp.0.e_proj.scale")
    excused = frozenset({"mtp.0.e_proj.weight"})
    made = plan.make_plan(
        survey.survey(changed, unit_scales=excused), plan.ConvertOptions(unit_scales=excused)
    )
    planned = [step for file in made.files for tensor in file.tensors for step in tensor.steps]
    assert [step.name for step in planned if step.op is steps.Op.DECODE and step.scale is None] == [
        "mtp.0.e_proj.weight"
    ]


# ---- what is told


def test_survey_of_the_sample_has_no_deviation(whole: Checkpoint) -> None:
    found = survey.survey(whole)
    assert found.deviations == []
    assert found.opaque == []
    assert set(found.layout.stored) == set(whole.tensors)


def test_survey_lists_every_deviation_once(whole: Checkpoint) -> None:
    changed = copy_of(whole)
    removed(changed, "norm.weight")
    retyped(changed, "embed.weight")
    deepened(changed, "head.weight")
    added(changed, "hc_head_fn")
    found = {(item.problem, item.name) for item in survey.survey(changed).deviations}
    assert found == {
        ("missing", "norm.weight"),
        ("dtype", "embed.weight"),
        ("shape", "head.weight"),
        ("extra", "hc_head_fn.copy"),
    }


def test_require_conform_counts_what_it_does_not_show(whole: Checkpoint) -> None:
    changed = copy_of(whole)
    removed(changed, "norm.weight")
    retyped(changed, "embed.weight")
    assert "and 1 more" in refusal(changed).what


def test_plan_uses_every_input_byte_once_or_names_it_as_dropped(whole: Checkpoint) -> None:
    for options in (
        plan.ConvertOptions(),
        plan.ConvertOptions(keep_mtp=False),
        plan.ConvertOptions(layers=(0, 2), keep_mtp=False),
    ):
        made = plan.make_plan(survey.survey(whole), options)
        used: dict[str, int] = {item.name: item.size for item in made.dropped}
        for step in (step for file in made.files for tensor in file.tensors for step in tensor.steps):
            used[step.source] = used.get(step.source, 0) + step.rows * step.row_bytes
            if step.scale:
                block_rows = -(-step.rows // step.quant.block.rows)
                used[step.scale] = used.get(step.scale, 0) + block_rows * step.scale_row_bytes
        sizes = {name: place.entry.end - place.entry.begin for name, place in whole.tensors.items()}
        assert used == sizes
