"""Planning on paper: releases without files, what each rank will read and write, and how long it takes."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from dsv4cli import main as cli

from dsv4ckpt import original, paper, plan, run, scaling, source, survey
from dsv4ckpt.errors import EXIT_OK, Usage
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES
from dsv4ckpt.steps import Op

# total_size of the published indexes, where they have it right
PUBLISHED = {"flash": 159_609_485_896, "flash-base": 294_673_469_000, "pro": 864_704_792_696}


@functools.cache
def on_paper(name: str) -> survey.Survey:
    return survey.survey(paper.on_paper(name))


@functools.cache
def planned(name: str, to: Target = Target.BF16) -> plan.Plan:
    return plan.make_plan(on_paper(name), plan.ConvertOptions(target=to))


# ---- releases on paper


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_release_on_paper_is_what_its_name_says_and_conforms(name: str) -> None:
    found = on_paper(name)
    assert found.identity.release.name == name
    assert found.deviations == []
    assert found.checkpoint.problems == []
    if name in PUBLISHED:
        assert found.checkpoint.total_size == PUBLISHED[name]


def test_release_on_paper_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(Usage) as error:
        paper.on_paper("flush")
    assert "flash-0731" in str(error.value)


def test_release_on_paper_header_bytes_are_those_of_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    checkpoint = paper.on_paper("flash")
    name, item = next(iter(checkpoint.shards.items()))
    assert hashlib.sha256(checkpoint.header_bytes(name)).hexdigest() == item.header.sha256
    assert len(checkpoint.header_bytes(name)) == item.header.data_start


# ---- loads


def counted(src: Path, out: Path, **options: Any) -> tuple[plan.Plan, int, int]:
    """The plan, and the bytes that a run of it really reads and writes in shards."""
    read: Counter[str] = Counter()
    whole, into = source.Reader.read, source.Reader.read_into

    def reads(self: source.Reader, name: str, offset: int, size: int, landing: source.Landing) -> memoryview:
        read[name] += size
        return whole(self, name, offset, size, landing)

    def reads_into(self: source.Reader, name: str, view: memoryview, offset: int) -> None:
        read[name] += len(view)
        into(self, name, view, offset)

    checkpoint = source.open_checkpoint(str(src))
    made = plan.make_plan(survey.survey(checkpoint), plan.ConvertOptions(**options))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(source.Reader, "read", reads)
        patched.setattr(source.Reader, "read_into", reads_into)
        run.execute(made, checkpoint, str(out), num_workers=1)
    return made, read.total(), sum(file.stat().st_size for file in out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("to", "names", "least", "most"),
    [
        (Target.BF16, Namespace.DEEPSEEK, 1.0, 1.0),
        (Target.BF16, Namespace.TRANSFORMERS, 1.0, 1.0),
        (Target.MXFP4_CT, Namespace.DEEPSEEK, 1.0, 1.0),
        (Target.FP8, Namespace.DEEPSEEK, 1.0, 1.1),  # scales are read twice: to prove that nothing is lost
    ],
)
def test_predicted_bytes_are_those_that_a_run_reads_and_writes(
    to: Target, names: Namespace, least: float, most: float, flash: Path, tmp_path: Path
) -> None:
    made, read, written = counted(flash, tmp_path / "out", target=to, namespace=names)
    loads = scaling.predict(made, 3, 1, None).loads
    assert sum(load.bytes_out for load in loads) == written
    assert least <= read / sum(load.bytes_in for load in loads) <= most


@pytest.mark.parametrize("to", Target)
@pytest.mark.parametrize("release", ["flash", "flash-base", "v4.1-flash"])
def test_every_step_of_every_conversion_has_a_cost(release: str, to: Target, tmp_path: Path) -> None:
    src = tiny.make_sample(release, tmp_path / "src", layers=1, experts=6)
    options = plan.ConvertOptions(target=to, allow_lossy=True)
    made = plan.make_plan(tiny.survey_of(src), options)
    steps = [step for file in made.files for tensor in file.tensors for step in tensor.steps]
    assert {scaling.kind_of(step) for step in steps} <= scaling.COSTS.keys() | {""}
    assert all(scaling.load_of(made, file).core_seconds > 0 for file in made.files)


def test_cost_of_the_way_back_counts_the_release_that_it_compares_with(flash: Path, tmp_path: Path) -> None:
    tiny.convert(flash, tmp_path / "bf16")
    known = original.of_source(tiny.survey_of(flash))
    options = plan.ConvertOptions(target=Target.NATIVE)
    made = plan.make_plan(tiny.survey_of(tmp_path / "bf16"), options, known)
    (load,) = scaling.predict(made, 1, 1, None).loads
    encoded = [s for f in made.files for t in f.tensors for s in t.steps if s.op is Op.ENCODE]
    assert encoded
    assert load.bytes_in > sum(step.rows * step.row_bytes for step in encoded) + made.shard_bytes


# ---- seconds


@pytest.mark.slow
def test_seconds_shrink_with_ranks_until_bandwidth_or_the_largest_file_is_the_limit() -> None:
    made = planned("flash")
    told = [scaling.predict(made, ranks, 2, 5 * 10**9) for ranks in (1, 2, 4, 1000)]
    seconds = [one.seconds for one in told]
    assert seconds == sorted(seconds, reverse=True)
    assert told[0].bottleneck == "cores"
    assert told[-1].bottleneck == "bandwidth"
    total = sum(load.bytes_in + load.bytes_out for load in told[0].loads)
    assert all(one.data == total / (5 * 10**9) for one in told)
    assert told[0].cpu == pytest.approx(told[0].loads[0].core_seconds / 2)
    largest = max(scaling.load_of(made, file).core_seconds for file in made.files)
    assert told[-1].cpu == largest, "a file has one worker"
    assert scaling.predict(made, 1000, 2, None).bottleneck == "the largest file"
    assert [one.data for one in (scaling.predict(made, 2, 2, None),)] == [None]


@pytest.mark.slow
def test_seconds_are_start_and_the_longer_of_data_and_cores_and_finish() -> None:
    made = planned("flash")
    for rate in (None, 10**9, 10**12):
        told = scaling.predict(made, 8, 2, rate)
        assert told.seconds == told.start + max(told.data or 0, told.cpu) + told.finish
    assert scaling.predict(made, 8, 2, 10**9).bottleneck == "bandwidth"
    assert scaling.predict(made, 8, 2, 10**12).bottleneck == "cores"
    assert scaling.predict(made, 100, 64, 10**15).start > 0


# ---- the command


def invoked(*arguments: str) -> Any:
    return CliRunner().invoke(cli.dsv4, ["convert", *arguments])


@pytest.mark.slow
def test_dry_run_of_a_release_on_paper_tells_time_and_bytes(tmp_path: Path) -> None:
    """For any room that there is: nobody will write here."""
    out = str(tmp_path / "out")
    arguments = ("release:flash", out, "--to", "bf16", "--dry-run", "--ranks", "8")
    done = invoked(*arguments, "--bandwidth", "5GB/s")
    assert done.exit_code == EXIT_OK, done.output
    assert "  ranks     8; the least loaded reads" in done.output
    assert "  limit     " in done.output
    document = json.loads(invoked(*arguments, "--bandwidth", "5GB/s", "--json", "-q").output)["prediction"]
    same = json.loads(invoked(*arguments, "--bandwidth", "5GB", "--json", "-q").output)["prediction"]
    assert document == same
    assert document["ranks"] == 8
    assert document["bytes_out"]["least"] <= document["bytes_out"]["most"]
    assert document["seconds"]["data"] == pytest.approx((159.6e9 + 582.0e9) / 5e9, rel=0.01)
    unknown = json.loads(invoked(*arguments, "--json", "-q").output)["prediction"]
    assert unknown["seconds"]["data"] is None
    assert not (tmp_path / "out").exists()


def test_prediction_and_releases_on_paper_go_with_dry_run_only(flash: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for arguments, word in (
        ((str(flash), out, "--to", "bf16", "--ranks", "2"), "--dry-run"),
        ((str(flash), out, "--to", "bf16", "--bandwidth", "1GB/s"), "--dry-run"),
        (("release:flash", out, "--to", "bf16"), "add --dry-run"),
        (("release:flush", out, "--to", "bf16", "--dry-run"), "no release"),
    ):
        error = invoked(*arguments).exception
        assert isinstance(error, Usage)
        assert word in str(error)
    assert "is no size" in invoked(str(flash), out, "--to", "bf16", "--dry-run", "--bandwidth", "fast").output
    assert not (tmp_path / "out").exists()
