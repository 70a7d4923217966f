"""A release written by torch.distributed.checkpoint: the bytes that one process writes, from whatever ranks hold.

The oracles are the released files themselves, and the directories that dsv4model.save writes of the same values.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gangs
import pytest
import reading
import tiny
import torch
import torch.distributed.checkpoint as dcp
import writing
from dsv4cli.main import main

import dsv4model
from dsv4ckpt import boxes
from dsv4ckpt.dcp import ReleaseWriter
from dsv4ckpt.errors import (
    Environment,
    ForeignOutput,
    NoSpace,
    NotConform,
    NotFinite,
    NotLossless,
    Usage,
    VanishingChange,
)
from dsv4ckpt.formats import MANIFEST_NAME, OUR_NAMES, Kind, Target
from dsv4ckpt.inventory import Logical, Part
from dsv4ckpt.names import Namespace

Make = Callable[..., Path]
save = dcp.save  # type: ignore[attr-defined]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made("flash"): a sample; made("flash", target): a conversion of it; made once. "small": flash, and little."""
    base = tmp_path_factory.mktemp("written")

    @functools.cache
    def directory(name: str, target: Target | None = None) -> Path:
        where = base / f"{name}-{target}"
        if target is not None:
            tiny.convert(directory(name), where, workers=1, target=target, namespace=Namespace.TRANSFORMERS)
        elif name == "small":
            tiny.make_sample("flash", where, **{**tiny.SMALLEST, "layers": 2})
        else:
            tiny.make_sample(name, where)
        return where

    return directory


@pytest.fixture(scope="session")
def values(made: Make) -> Callable[[str], Path]:
    """The values of a release under transformers' names."""
    return lambda name: made(name, Target.BF16)


@pytest.fixture(scope="session")
def whole(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """whole(edit, to=..., ...): what one process saves of flash, as `edit` changes its values; made once."""
    base = tmp_path_factory.mktemp("whole")

    @functools.cache
    def directory(edit: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Path:
        where = base / str(len([*base.iterdir()]))
        model = dsv4model.load(made("flash"), dtype=torch.float64)
        if edit:
            state: dict[str, Any] = reading.values_of(made("flash", Target.BF16))
            edit(state)
            model.load_state_dict(state)
        options = {"to": "native", "names": "deepseek", **options}
        dsv4model.save(model, where, like=made("flash"), **options)
        return where

    return directory


def released(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but those that tell how the directory came about."""
    return {name: digest for name, digest in tiny.tree_of(directory).items() if name not in OUR_NAMES}


def causes(size: int, work: Callable[..., Any], *arguments: Any) -> list[dict[int, BaseException]]:
    """What each rank is told of the errors of all."""
    return [gangs.rank_errors(outcome.error) for outcome in gangs.outcomes(size, work, *arguments)]


def left(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*")) if out.exists() else []


# ---- bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "how"),
    [
        (1, "0"),
        (2, "0"),
        (3, "0"),
        (4, "1"),
        (3, "2"),
        (4, "experts"),
        (2, "replicated"),
        (2, "plain"),
        (3, "alternating"),
    ],
)
def test_untouched_state_becomes_the_release_byte_for_byte(
    size: int, how: str, made: Make, values: Make, whole: Make, tmp_path: Path
) -> None:
    """Three ranks divide nothing evenly. Manifest and checksums are those of one process, too."""
    out = tmp_path / "out"
    told = gangs.gang(size, writing.save, out, made("flash"), values("flash"), how)
    assert released(out) == released(made("flash"))
    assert tiny.tree_of(out) == tiny.tree_of(whole())
    assert (told[0].num_changed, told[0].losses) == (0, ()) and told[0].num_untouched > 200
    assert len(told[0].files) == len(tiny.tree_of(out)) - 1  # the manifest is no part of itself


@pytest.mark.slow
@pytest.mark.parametrize(("size", "how"), [(1, "0"), (2, "1"), (3, "0"), (4, "experts")])
def test_trained_state_becomes_what_one_process_saves(
    size: int, how: str, made: Make, values: Make, whole: Make, tmp_path: Path
) -> None:
    """Wider values are rounded once; what changed is measured against the release."""
    out = tmp_path / "out"
    told = gangs.gang(size, writing.save, out, made("flash"), values("flash"), how, writing.trained)
    assert tiny.tree_of(out) == tiny.tree_of(whole(writing.trained))
    assert released(out) != released(made("flash"))
    assert [loss.name for loss in told[0].losses] == ["layers.0.ffn.experts.2.w1.weight"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"to": "bf16", "names": "transformers", "max_shard_bytes": 10**6},
        {"to": "bf16"},
        {"to": "fp8", "allow_lossy": True},
        {"to": "fp8-f32scale", "names": "transformers", "allow_lossy": True},
        {"to": "nvfp4", "allow_lossy": True},
        {"to": "mxfp4-ct", "allow_lossy": True},
        {"to": "native", "names": "transformers"},
        {"to": "native", "scale_policy": "fresh", "max_shard_bytes": 10**6, "allow_lossy": True},
    ],
)
def test_every_format_is_what_one_process_saves(
    options: dict[str, Any], made: Make, values: Make, whole: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = functools.partial(writing.save, **options)
    gangs.gang(2, work, out, made("flash"), values("flash"), "0", writing.trained)
    assert tiny.tree_of(out) == tiny.tree_of(whole(writing.trained, **options))


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-base", "flash-0731", "pro", "vision-exp", "v4.1-flash"])
def test_every_release_comes_back_without_its_drafts(
    release: str, made: Make, values: Make, tmp_path: Path
) -> None:
    """Draft stages and vision parts are those of the release, Base's copies of embed and head included."""
    out = tmp_path / "out"
    gangs.gang(2, writing.save, out, made(release), values(release), "0", writing.without_drafts_and_vision)
    assert released(out) == released(made(release))


@pytest.mark.slow
def test_copies_in_base_follow_the_state_where_they_were_copies(
    made: Make, values: Make, tmp_path: Path
) -> None:
    base, out = tiny.copy_of(made("flash-base"), tmp_path / "base"), tmp_path / "out"
    copy, head = "mtp.0.head.weight", "head.weight"
    twin = tiny.read_shard(tiny.shard_of(base, head))[head]
    tiny.edit_shard(tiny.shard_of(base, copy), lambda tensors: tensors.update({copy: twin}))
    work = functools.partial(writing.save, to="bf16")
    gangs.gang(2, work, out, base, values("flash-base"), "0", writing.without_copies)
    found = reading.values_of(out)
    doubled = reading.values_of(base)[head] * 2
    assert torch.equal(found[head], doubled) and torch.equal(found[copy], doubled)
    kept = "mtp.0.emb.tok_emb.weight"
    assert torch.equal(found[kept], reading.values_of(base)[kept])


@pytest.mark.slow
@pytest.mark.parametrize("names", ["transformers", "deepseek"])
def test_keys_may_name_each_expert(names: str, made: Make, whole: Make, tmp_path: Path) -> None:
    gangs.gang(2, writing.save_keys, tmp_path / "out", made("flash"), made("flash"), names)
    assert tiny.tree_of(tmp_path / "out") == tiny.tree_of(whole(to="bf16"))


@pytest.mark.slow
def test_release_is_told_by_a_source_or_by_a_sidecar(made: Make, values: Make, tmp_path: Path) -> None:
    converted = values("flash")
    choices: tuple[dict[str, Any], ...] = ({"source": made("flash")}, {})
    for number, options in enumerate(choices):
        out = tmp_path / str(number)
        gangs.gang(2, functools.partial(writing.save, **options), out, converted, converted, "0")
        assert released(out) == released(made("flash"))


@pytest.mark.slow
def test_sharded_model_is_saved_and_loads_again(made: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = gangs.gang(2, writing.save_model, out, made("flash"))
    assert told[0].num_changed == 1
    model, again = dsv4model.load(made("flash")), dsv4model.load(out)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight * 2)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.slow
def test_directory_of_torch_becomes_the_same_release(made: Make, values: Make, tmp_path: Path) -> None:
    """Two ways that share no reading: from the ranks, and from the files that they wrote."""
    out, directory, back = (tmp_path / name for name in ("out", "directory", "back"))
    gangs.gang(2, writing.save_twice, out, directory, made("small"), values("small"))
    arguments = ["reshard", directory, back, "--to", "safetensors", "--storage", "native"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--source", str(made("small"))])
    assert ended.value.code == 0
    assert released(out) == released(back)


@pytest.mark.slow
def test_narrower_floats_that_lose_nothing_are_taken(made: Make, values: Make, tmp_path: Path) -> None:
    gangs.gang(2, writing.save, tmp_path / "out", made("small"), values("small"), "0", writing.in_half)
    assert released(tmp_path / "out") == released(made("small"))
    lossy = functools.partial(writing.save, allow_lossy=True)
    gangs.gang(2, lossy, tmp_path / "lossy", made("small"), values("small"), "0", writing.rounded)
    base = reading.values_of(made("small"))["hc_head_base"]
    assert torch.equal(reading.values_of(tmp_path / "lossy")["hc_head_base"], base.bfloat16().float())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_ranks_hold_little_beside_their_own(made: Make, tmp_path: Path) -> None:
    big = tiny.make_sample("flash", tmp_path / "big", layers=1, hidden=2048, intermediate=1024, experts=32)
    for held, above in gangs.gang(2, writing.save_and_measure, tmp_path / "out", big, made("small")):
        assert held > 250 * 10**6
        assert above < 150 * 10**6


@pytest.mark.slow
def test_save_in_the_background_has_the_values_of_when_it_began(
    made: Make, values: Make, tmp_path: Path
) -> None:
    told = gangs.gang(2, writing.save_meanwhile, tmp_path / "out", made("flash"), values("flash"))
    assert released(tmp_path / "out") == released(values("flash"))
    assert "config.json" in told[0]


def test_one_process_needs_no_process_group(smallest: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = writing.read_as(smallest, "deepseek")
    writer = ReleaseWriter(tmp_path / "out", like=smallest)
    save(state, storage_writer=writer)
    assert released(tmp_path / "out") == released(smallest)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save(state, storage_writer=ReleaseWriter(tmp_path / "out", like=smallest))
    assert isinstance(caught.value.failures[0][0], ForeignOutput)


# ---- what is refused before the first byte


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (
            writing.without_one,
            NotConform,
            "'model.layers.1.mlp.experts.down_proj' is in no rank's state dict",
        ),
        (writing.without_half_a_draft, NotConform, "'mtp.0.enorm.weight' is in no rank's state dict"),
        (writing.with_another_shape, NotConform, "'model.norm.weight' has another shape"),
        (writing.with_a_stranger, Usage, "'model.adapter' in the state dict is no tensor"),
        (writing.with_optimizer, Usage, "'optim."),
        (writing.with_codes, Usage, "'lm_head.weight' has a dtype"),
        (writing.rounded, NotLossless, "'model.hc_head.hc_base' is F32 in every release"),
    ],
)
def test_state_that_is_not_the_model_is_refused_on_all_ranks(
    edit: Any, kind: type[Exception], words: str, made: Make, values: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for told in causes(2, writing.save, out, made("small"), values("small"), "plain", edit):
        (error,) = told.values()
        assert isinstance(error, kind) and words in str(error)
    assert not out.exists()


@pytest.mark.slow
def test_ranks_with_different_options_are_refused(made: Make, values: Make, tmp_path: Path) -> None:
    work = writing.save_with_different_options
    for told in causes(2, work, tmp_path / "out", made("small"), values("small")):
        (error,) = told.values()
        assert isinstance(error, Usage) and "different options" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_with_different_sources_end_before_anything_is_written(
    made: Make, values: Make, tmp_path: Path
) -> None:
    """The plan differs, so that the other ranks cannot join."""
    out = tmp_path / "out"
    for told in causes(3, writing.save_with_different_sources, out, values("small"), made("small")):
        assert {type(error) for error in told.values()} == {Environment}
        assert any("other options" in str(error) for error in told.values())
    assert left(out) == []


@pytest.mark.slow
def test_writer_in_another_group_is_refused(made: Make, values: Make, tmp_path: Path) -> None:
    for told in causes(3, writing.save_in_another_group, tmp_path / "out", made("small"), values("small")):
        assert {type(error) for error in told.values()} == {Usage}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"to": "gguf"}, {"names": "llama"}, {"scale_policy": "best"}, {"to": "bf16", "source": "x"}]
)
def test_wrong_wish_is_refused(options: dict[str, Any], smallest: Path, tmp_path: Path) -> None:
    with pytest.raises(Usage):
        ReleaseWriter(tmp_path / "out", like=smallest, **options)


def test_writer_keeps_to_its_directory(smallest: Path, tmp_path: Path) -> None:
    writer = ReleaseWriter(tmp_path / "out", like=smallest)
    writer.reset(str(tmp_path / "out"))
    with pytest.raises(Usage):
        writer.reset("elsewhere")


# ---- what goes wrong on the way


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "kind"), [(writing.with_nan, NotFinite), (writing.hardly_changed, VanishingChange)]
)
def test_values_that_cannot_be_written_end_the_save_and_leave_nothing(
    edit: Any, kind: type[Exception], made: Make, values: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for told in causes(3, writing.save, out, made("small"), values("small"), "0", edit):
        assert sorted(told) == [0, 1, 2]
        found = sorted((type(error).__name__ for error in told.values()), key=str)
        assert found == ["Environment", "Environment", kind.__name__]
    assert left(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("happens", "kind"), [(writing.run_out_of_space, NoSpace), (writing.stumble, KeyError)]
)
def test_rank_that_fails_ends_all_and_nothing_stays(
    failing: int, happens: Any, kind: type[Exception], made: Make, values: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = writing.save_until_step
    for told in causes(3, work, out, made("small"), values("small"), failing, 20, happens):
        assert isinstance(told[failing], kind)
        others = [error for rank, error in told.items() if rank != failing]
        assert all(isinstance(error, Environment) for error in others)
        assert all(f"rank {failing} failed" in str(error) for error in others)
    assert left(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_rank_that_dies_ends_all_without_a_manifest(
    dying: int, made: Make, values: Make, tmp_path: Path
) -> None:
    """Of finished files, what is there is whole."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = made("small"), values("small"), dying, 20, writing.die
    found = gangs.outcomes(3, writing.save_until_step, out, *arguments, timeout=60.0)
    assert all(outcome.error is not None for outcome in found)
    assert "no answer in time" not in [outcome.trace for outcome in found]
    assert MANIFEST_NAME not in left(out)
    tiny.convert(made("small"), whole, target=Target.BF16, max_shard_bytes=10**6)
    files = {name: digest for name, digest in tiny.tree_of(out).items() if name.endswith(".safetensors")}
    assert files.items() <= tiny.tree_of(whole).items()


# ---- boxes


def test_box_of_rows_is_what_runs_take() -> None:
    """Both ways to say which rows of an expert stand where."""
    parts = [
        Part(Logical(f"{expert}.{matrix}", Kind.EXPERT, (3, 5)), (expert * 2 + matrix) * 3, 3)
        for expert in range(4)
        for matrix in range(2)
    ]
    for part in parts:
        for first, rows in ((0, 3), (1, 1), (2, 1), (0, 2)):
            experts, along, columns = boxes.of_rows(part, (4, 6, 5), first, rows)
            (run,) = boxes.runs(parts, 6, experts, along)
            assert (run.part, run.first, run.rows, run.at) == (part, first, rows, 0)
            assert columns == range(5)
    matrix = Part(Logical("m", Kind.DENSE, (7, 5)), 0, 7)
    assert boxes.of_rows(matrix, (7, 5), 2, 3) == (range(2, 5), range(5))
    assert boxes.of_rows(Part(Logical("v", Kind.F32, (5,)), 0, 1), (5,), 0, 1) == (range(5),)


def test_boxes_tile_a_tensor_or_not() -> None:
    """Against counting every element."""
    random_numbers, answers = random.Random(7), []

    def some(length: int) -> range:
        begin = random_numbers.randrange(length)
        return range(begin, random_numbers.randint(begin + 1, length))

    for _ in range(3000):
        shape = (2, 3)
        found = [tuple(map(some, shape)) for _ in range(random_numbers.randint(1, 4))]
        counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        for box in found:
            for at in itertools.product(*box):
                counts[at] += 1
        answers.append(set(counts.values()) == {1})
        assert boxes.tile(found, shape) == answers[-1], found
    assert 10 < sum(answers) < 2990
    assert boxes.tile([()], ()) and not boxes.tile([], ())
    assert not boxes.tile([(range(5),)], (4,)) and not boxes.tile([], (4,)) and boxes.tile([], (0, 4))
