"""Conservation through real files: each tensor of a checkpoint damaged in turn, and `dsv4 convert` given the result.

Every one of 146 tensors is removed, renamed, doubled, retyped, reshaped, given a neighbour; every line of the index is
removed, renamed or bent. Each is refused with exit code 3 by an error of the right class that names the tensor, and the
output is not even created. Only headers and the index are written anew: the data of a changed shard is sparse, which is
how we know that nothing of it was read. test_survey does the same to checkpoints in memory.

What headers cannot tell is not here: two tensors of one dtype and shape that are exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from dsv4cli import main as cli
from tiny import INDEX, Tensor

from dsv4ckpt import plan, run, source
from dsv4ckpt.errors import BadIndex, Dsv4Error, MissingScale, NotConform, OrphanScale

Shards = dict[str, dict[str, Tensor]]  # file -> its tensors
NUM_TENSORS = 146
OTHER_DTYPE = {"BF16": "F16", "F32": "I32", "I64": "F64", "I8": "U8", "F8_E4M3": "I8", "F8_E8M0": "U8"}
ONE_BYTE = Tensor("U8", (1,), 1)


class Case(NamedTuple):
    """A checkpoint's headers and index, to be damaged, and the tensor that is."""

    name: str
    shards: Shards
    weight_map: dict[str, str]

    @property
    def file(self) -> str:
        return self.weight_map[self.name]

    @property
    def neighbours(self) -> dict[str, Tensor]:
        """All tensors of its shard."""
        return self.shards[self.file]

    @property
    def other_file(self) -> str:
        files = sorted(self.shards)
        return files[files.index(self.file) - 1]

    def put(self, tensor: Tensor) -> None:
        self.neighbours[self.name] = tensor

    def add(self, name: str, tensor: Tensor) -> None:
        """Beside it, in the index as well."""
        self.neighbours[name] = tensor
        self.weight_map[name] = self.file

    def remove(self) -> None:
        """A shard without tensors goes with the last of them."""
        del self.neighbours[self.name]
        if not self.neighbours:
            del self.shards[self.file]
        del self.weight_map[self.name]


class Bench:
    """A copy of a checkpoint that is damaged and made whole again, thousands of times."""

    def __init__(self, whole: Path, directory: Path) -> None:
        self.whole, self.directory = whole, tiny.copy_of(whole, directory)
        self.shards = {
            file.name: tiny.read_shard(file, with_data=False) for file in whole.glob("*.safetensors")
        }
        self.weight_map = {name: file for file, tensors in self.shards.items() for name in tensors}
        self.quantized = {name.removesuffix(".scale") for name in self.weight_map if name.endswith(".scale")}

    def cases(self) -> Iterator[Case]:
        for name in sorted(self.weight_map):
            yield Case(
                name, {file: {**tensors} for file, tensors in self.shards.items()}, {**self.weight_map}
            )

    def damage(self, case: Case) -> list[str]:
        """Write what the case changes: the names of the files."""
        changed = [file for file in self.shards if case.shards.get(file) != self.shards[file]]
        for file in changed:
            if file in case.shards:
                tiny.write_shard(self.directory / file, case.shards[file])
            else:
                (self.directory / file).unlink()
        if case.weight_map == self.weight_map:
            return changed
        tiny.edit_json(self.directory / INDEX, lambda document: document.update(weight_map=case.weight_map))
        return [*changed, INDEX]

    def convert(self, case: Case, out: Path) -> Dsv4Error | None:
        """How the command ends for the damaged checkpoint; None: well."""
        changed = self.damage(case)
        assert changed, f"{case.name} is not damaged"
        try:
            command = ["convert", str(self.directory), str(out), "--to", "bf16", "--quiet"]
            cli.dsv4.main(command, standalone_mode=False)
        except Dsv4Error as error:
            return error
        finally:
            self.mend(changed)
        return None

    def mend(self, files: list[str]) -> None:
        for file in files:
            (self.directory / file).unlink(missing_ok=True)
            os.link(self.whole / file, self.directory / file)


@pytest.fixture
def bench(smallest: Path, tmp_path: Path) -> Bench:
    return Bench(smallest, tmp_path / "checkpoint")


Damage = Callable[[Case], str]  # returns the name that the message must tell


def unnoticed(
    bench: Bench, damage: Damage, kind_of: Callable[[str], type[Dsv4Error]], out: Path
) -> list[str]:
    """The cases that were not refused as they should be, of all tensors to which the damage can be done.

    The conservation law of a plan asks for a report: it is the net below, not what is to catch a bad checkpoint.
    """
    found = []
    for case in bench.cases():
        told = damage(case)
        if not told:
            continue
        error = bench.convert(case, out)
        right = type(error) is kind_of(case.name) and error.exit_code == 3 and repr(told) in error.what
        if not right or "report" in str(error) or out.exists():
            found.append(f"{case.name}: {error!r}")
    return found


# ---- tensors, with an index that agrees


def removed(case: Case) -> str:
    case.remove()
    return case.name


def renamed(case: Case) -> str:
    case.add(case.name + "_", case.neighbours[case.name])
    case.remove()
    return case.name


def moved_to_a_layer_that_does_not_exist(case: Case) -> str:
    head, _, rest = case.name.partition(".0.")
    if head not in ("layers", "mtp"):
        return ""
    tensor = case.neighbours[case.name]
    case.add(f"{head}.1.{rest}", tensor)
    case.remove()
    return case.name


def doubled_under_a_second_name(case: Case) -> str:
    case.add(case.name + ".copy", case.neighbours[case.name])
    return case.name + ".copy"


def retyped(case: Case) -> str:
    tensor = case.neighbours[case.name]
    case.put(tensor._replace(dtype=OTHER_DTYPE[tensor.dtype]))
    return case.name


def retyped_to_bytes(case: Case) -> str:
    """As many bytes, each for itself."""
    tensor = case.neighbours[case.name]
    case.put(tensor._replace(dtype="BOOL", shape=(tensor.size,)))
    return case.name


def turned(case: Case) -> str:
    """Rows for columns; what is square or a vector gets half the columns and twice the rows, or one column."""
    tensor = case.neighbours[case.name]
    *rows, cols = tensor.shape
    if rows and rows[0] != cols:
        shape: tuple[int, ...] = (cols, rows[0])
    elif cols % 2 == 0:
        shape = (2 * (rows[0] if rows else 1), cols // 2)
    else:
        shape = (*tensor.shape, 1)
    case.put(tensor._replace(shape=shape))
    return case.name


def given_a_dimension(case: Case) -> str:
    tensor = case.neighbours[case.name]
    case.put(tensor._replace(shape=(1, *tensor.shape)))
    return case.name


def resized(case: Case, rows: int) -> str:
    tensor = case.neighbours[case.name]
    first, *rest = tensor.shape
    case.put(tensor._replace(shape=(first + rows, *rest), data=tensor.size // first * (first + rows)))
    return case.name


def one_row_longer(case: Case) -> str:
    return resized(case, 1)


def one_row_shorter(case: Case) -> str:
    return resized(case, -1)


def emptied(case: Case) -> str:
    tensor = case.neighbours[case.name]
    case.put(tensor._replace(shape=(0, *tensor.shape[1:]), data=0))
    return case.name


def given_a_neighbour(case: Case, leaf: str) -> str:
    stem = case.name.rpartition(".")[0] or case.name
    name = f"{stem}.{leaf}"
    if name in case.weight_map:
        return ""
    case.add(name, ONE_BYTE)
    return name


def given_a_bias(case: Case) -> str:
    return given_a_neighbour(case, "bias")


def given_a_scale(case: Case) -> str:
    """As quantized matrices have, and as other tools call it."""
    return given_a_neighbour(case, "scale") or given_a_neighbour(case, "weight_scale_inv")


CHANGES: tuple[Damage, ...] = (
    doubled_under_a_second_name, retyped, retyped_to_bytes, turned, given_a_dimension, one_row_longer, one_row_shorter,
    emptied, given_a_bias, given_a_scale,
)  # fmt: skip
LOSSES: tuple[Damage, ...] = (removed, renamed, moved_to_a_layer_that_does_not_exist)


def named(damages: Iterable[Damage]) -> list[object]:
    return [pytest.param(damage, id=damage.__name__) for damage in damages]


@pytest.mark.slow
@pytest.mark.parametrize("damage", named(CHANGES))
def test_convert_with_any_tensor_changed_is_refused_by_name_before_there_is_an_output(
    damage: Damage, bench: Bench, tmp_path: Path
) -> None:
    assert unnoticed(bench, damage, lambda name: NotConform, tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", named(LOSSES))
def test_convert_without_any_one_tensor_is_refused_by_the_half_that_is_missing(
    damage: Damage, bench: Bench, tmp_path: Path
) -> None:
    def kind_of(name: str) -> type[Dsv4Error]:
        stem, _, leaf = name.rpartition(".")
        if stem not in bench.quantized:
            return NotConform
        return MissingScale if leaf == "scale" else OrphanScale

    assert unnoticed(bench, damage, kind_of, tmp_path / "out") == []


# ---- the index, and shards that disagree with it


def doubled_in_another_shard(case: Case) -> str:
    case.shards[case.other_file][case.name] = case.neighbours[case.name]
    return case.name


def doubled_in_another_shard_with_other_bytes(case: Case) -> str:
    case.shards[case.other_file][case.name] = ONE_BYTE
    return case.name


def doubled_without_a_line(case: Case) -> str:
    case.neighbours[case.name + ".copy"] = case.neighbours[case.name]
    return case.name + ".copy"


def removed_but_for_its_line(case: Case) -> str:
    del case.neighbours[case.name]
    return case.name


def moved_but_for_its_line(case: Case) -> str:
    case.shards[case.other_file][case.name] = case.neighbours.pop(case.name)
    return case.name


def line_removed(case: Case) -> str:
    """The last line of a shard makes the shard a stray, which is told by its own name: not here."""
    is_last = len(case.neighbours) == 1
    del case.weight_map[case.name]
    return "" if is_last else case.name


def line_renamed(case: Case) -> str:
    case.weight_map[case.name + "_"] = case.weight_map.pop(case.name)
    return case.name + "_"


def line_doubled(case: Case) -> str:
    case.weight_map[case.name + "_"] = case.file
    return case.name + "_"


def line_points_elsewhere(case: Case) -> str:
    case.weight_map[case.name] = case.other_file
    return case.name


DISAGREEMENTS: tuple[Damage, ...] = (
    doubled_in_another_shard, doubled_in_another_shard_with_other_bytes, doubled_without_a_line,
    removed_but_for_its_line, moved_but_for_its_line, line_removed, line_renamed, line_doubled, line_points_elsewhere,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", named(DISAGREEMENTS))
def test_convert_where_index_and_shards_disagree_about_any_tensor_is_refused_by_name(
    damage: Damage, bench: Bench, tmp_path: Path
) -> None:
    assert unnoticed(bench, damage, lambda name: BadIndex, tmp_path / "out") == []


# ---- that all this says something


def test_bench_goes_through_every_tensor_of_the_checkpoint(bench: Bench, smallest: Path) -> None:
    read = source.open_checkpoint(str(smallest))
    assert [case.name for case in bench.cases()] == sorted(read.tensors)
    assert len(read.tensors) == NUM_TENSORS


@pytest.mark.slow
def test_plan_with_any_tensor_moved_to_another_shard_is_made_if_the_index_says_so(bench: Bench) -> None:
    """The control: what is written here can be read, and no refusal above has another cause than the damage."""
    expected = [(file.name, file.header) for file in tiny.plan_of(bench.whole).files]
    for case in bench.cases():
        file, other = case.file, case.other_file
        tensor = case.neighbours[case.name]
        case.remove()
        case.shards[other][case.name] = tensor
        case.weight_map[case.name] = other
        bench.damage(case)
        planned = tiny.plan_of(bench.directory).files
        bench.mend([file, other, INDEX])
        assert [(file.name, file.header) for file in planned] == expected, case.name


@pytest.mark.parametrize("damage", named((*CHANGES, *LOSSES, *DISAGREEMENTS)))
def test_convert_with_every_fifteenth_tensor_damaged_is_refused(
    damage: Damage, bench: Bench, tmp_path: Path
) -> None:
    """The quick version, for while one edits."""
    out = tmp_path / "out"
    for case in list(bench.cases())[::15]:
        if damage(case):
            error = bench.convert(case, out)
            assert error is not None and error.exit_code == 3, case.name
            assert not out.exists()


def test_run_of_a_plan_whose_source_lost_a_tensor_meanwhile_is_refused(bench: Bench, tmp_path: Path) -> None:
    """A plan is no licence: what is read must still be what was planned."""
    read = source.open_checkpoint(str(bench.directory))
    made = plan.make_plan(tiny.survey_of(bench.directory), plan.ConvertOptions())
    file = bench.weight_map["norm.weight"]
    tiny.edit_shard(bench.directory / file, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(Dsv4Error, match="changed while") as raised:
        run.execute(made, read, str(tmp_path / "out"))
    assert raised.value.exit_code == 3
    assert raised.value.facts["file"] == file
    assert not (tmp_path / "out" / "dsv4.manifest.json").exists()
