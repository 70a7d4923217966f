"""Conversion on many ranks: the bytes of one process, whatever dies on the way.

Ranks of a gang share this machine's forked processes; those of torchrun are the installed command, from start to end.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gangs
import pytest
import tiny
import torch.distributed

from dsv4ckpt import original, outdir, plan, process_group, run, sidecar, source, survey
from dsv4ckpt.errors import EXIT_BUSY, EXIT_USAGE, Busy, Environment, Interrupted, NotFinite, NotLossless
from dsv4ckpt.formats import MANIFEST_NAME, WORK_NAME, Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.ranks import ALONE, Ranks, share
from dsv4ckpt.stop import StopFlag

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 60_000
PLAN, NAMES = "ab" * 32, {"a", "b", "c"}


class File(NamedTuple):
    size: int


class Case(NamedTuple):
    """A conversion: where from, to what, and what the way back is told by."""

    src: Path
    to: str = "bf16"
    names: str = "deepseek"
    released: Path | None = None


def planned(case: Case) -> tuple[plan.Plan, source.Checkpoint]:
    checkpoint = source.open_checkpoint(str(case.src))
    known = None
    if case.released:
        known = original.of_source(survey.survey(source.open_checkpoint(str(case.released))))
    elif case.to == "native" and (memory := sidecar.open_sidecar(str(case.src))):
        known = original.of_sidecar(memory)
    options = plan.ConvertOptions(
        target=Target(case.to), namespace=Namespace(case.names), max_shard_bytes=SHARD_BYTES
    )
    return plan.make_plan(survey.survey(checkpoint), options, known), checkpoint


def convert(case: Case, out: Path, ranks: Ranks = ALONE, **options: Any) -> run.Summary:
    made, checkpoint = planned(case)
    return run.execute(made, checkpoint, str(out), ranks=ranks, **options)


# ---- work for ranks


def convert_all(cases: list[tuple[Case, Path]], workers: int) -> list[run.Summary]:
    ranks = process_group.GroupRanks()
    return [convert(case, out, ranks, num_workers=workers) for case, out in cases]


def dying(case: Case, out: Path, victim: int, after: int) -> None:
    """One rank ends itself by kill -9 when it has finished so many files."""
    ranks, done = process_group.GroupRanks(), itertools.count(1)

    def on_event(event: run.Event) -> None:
        if isinstance(event, run.FileDone) and ranks.rank == victim and next(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(case, out, ranks, on_event=on_event, num_workers=1)


def counting(case: Case, out: Path) -> list[str]:
    """Names of the files that this rank wrote."""
    ranks, wrote = process_group.GroupRanks(), []

    def on_event(event: run.Event) -> None:
        if isinstance(event, run.FileDone):
            wrote.append(event.receipt.name)
        elif isinstance(event, run.Started):
            assert len(event.shares) == ranks.size

    convert(case, out, ranks, on_event=on_event)
    return wrote


def meeting_late(seconds: float) -> float:
    """How long rank 0 waits for the others."""
    ranks, began = process_group.GroupRanks(), time.monotonic()
    if ranks.rank:
        time.sleep(seconds)
    ranks.meet(StopFlag())
    return time.monotonic() - began


def interrupted_meeting(told: Path) -> None:
    """Rank 0 is alone at the meeting when a signal comes, and writes down what it heard and how long it took."""
    ranks, stop = process_group.GroupRanks(), StopFlag()
    if ranks.rank:
        time.sleep(1.5)
        return
    signal.signal(signal.SIGALRM, lambda *_: setattr(stop, "signal_number", signal.SIGALRM))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    began = time.monotonic()
    try:
        ranks.meet(stop)
    except Interrupted as error:
        told.write_text(f"{time.monotonic() - began} {error}")
    os._exit(0)


# ---- what each rank writes


@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_share_gives_every_file_to_one_rank_in_its_order_and_no_rank_much_more(num_ranks: int) -> None:
    """All lists of up to four sizes out of four; and the bound of greedy sharing, 4/3 - 1/(3m) of the best."""
    for length in range(5):
        for sizes in itertools.product((1, 2, 3, 7), repeat=length):
            files = [File(size) for size in sizes]
            shares = share(files, num_ranks)
            assert len(shares) == num_ranks
            numbers = [[index_of(files, file) for file in one] for one in shares]
            assert sorted(itertools.chain(*numbers)) == list(range(length))
            assert all(one == sorted(one) for one in numbers)
            most = max(sum(file.size for file in one) for one in shares)
            assert 3 * num_ranks * most <= (4 * num_ranks - 1) * best(sizes, num_ranks)


def index_of(files: list[File], file: File) -> int:
    return next(number for number, item in enumerate(files) if item is file)


def best(sizes: tuple[int, ...], num_ranks: int) -> int:
    """The smallest largest load, of all ways to share."""
    ways = itertools.product(range(num_ranks), repeat=len(sizes)) if num_ranks < 4 else ()
    loads = [
        max(
            sum(size for size, rank in zip(sizes, way, strict=True) if rank == one)
            for one in range(num_ranks)
        )
        for way in ways
    ]
    return min(loads, default=10**9)


# ---- the directory


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[outdir.OutDir, outdir.OutDir]]:
    """Rank 0 and rank 1 of a job; locks know no processes, only open files."""
    with outdir.open_outdir(str(tmp_path / "out"), PLAN, NAMES) as first:
        first.share()
        with outdir.join_outdir(str(tmp_path / "out"), PLAN, NAMES, "", 1) as second:
            yield first, second


def write(out: outdir.OutDir, name: str) -> None:
    with out.new_file(name, 3) as sink:
        sink.write(b"abc")


def test_outdir_of_two_ranks_rank_0_reads_what_the_other_wrote_down(
    shared: tuple[outdir.OutDir, outdir.OutDir],
) -> None:
    first, second = shared
    write(first, "a")
    write(second, "b")
    assert first.finished.keys() == {"a"}
    first.read_journals()
    assert first.finished.keys() == {"a", "b"}
    first.finish(b"{}")
    assert sorted(os.listdir(first.path)) == ["a", "b", MANIFEST_NAME]


def test_lost_rank_is_told_from_other_errors() -> None:
    for error in (RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
                  torch.distributed.DistNetworkError("the store is gone")):  # fmt: skip
        with pytest.raises(Environment, match="another rank is gone"), process_group.noticed(2, "go on"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), process_group.noticed(2, "go on"):
        raise RuntimeError("shapes do not fit")


def test_outdir_of_two_ranks_is_busy_until_the_last_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "out")

    def third() -> None:
        with outdir.open_outdir(path, PLAN, NAMES) as out:
            assert out.finished.keys() == {"a"}

    with outdir.open_outdir(path, PLAN, NAMES) as first:
        first.share()
        write(first, "a")
        with outdir.join_outdir(path, PLAN, NAMES, "", 1):
            with pytest.raises(Busy):
                third()
            first.close()
            with pytest.raises(Busy):
                third()
        third()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_outdir_journals_of_any_number_of_ranks_are_read_by_any_other(size: int, tmp_path: Path) -> None:
    """A torn tail of one of them takes nothing else along."""
    path = str(tmp_path / "out")
    with outdir.open_outdir(path, PLAN, NAMES) as first:
        first.share()
        write(first, "a")
        for rank, name in ((1, "b"), (7, "c")):
            with outdir.join_outdir(path, PLAN, NAMES, "", rank) as other:
                write(other, name)
    with open(tmp_path / "out" / WORK_NAME / "journal.1", "ab") as journal:
        journal.write(b'1234abcd ["c", 3')
    with outdir.open_outdir(path, PLAN, NAMES) as again:
        again.share()
        assert again.finished.keys() == NAMES
        for rank in range(1, size):
            with outdir.join_outdir(path, PLAN, NAMES, "", rank) as other:
                assert other.finished.keys() == NAMES
                other.forget("b")
                write(other, "b")
        again.read_journals()
        assert again.finished.keys() == NAMES


def test_outdir_rank_cuts_the_torn_tail_off_its_own_journal_before_it_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    for name in "ab":
        with outdir.open_outdir(path, PLAN, NAMES) as first:
            first.share()
            with outdir.join_outdir(path, PLAN, NAMES, "", 1) as other:
                write(other, name)
        with open(tmp_path / "out" / WORK_NAME / "journal.1", "ab") as journal:
            journal.write(b'1234abcd ["c", 3')
    with outdir.open_outdir(path, PLAN, NAMES) as again:
        assert again.finished.keys() == {"a", "b"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("refuses", [0, 1])
def test_outdir_that_one_rank_refuses_the_last_one_leaves_nothing(
    refuses: int, order: tuple[int, int], tmp_path: Path
) -> None:
    path = str(tmp_path / "out")
    ranks = [
        outdir.open_outdir(path, PLAN, NAMES),
        outdir.join_outdir(path, PLAN, NAMES, "", 1),
    ]
    outs = [ranks[0].__enter__()]
    outs[0].share()
    outs.append(ranks[1].__enter__())
    for out, name in zip(outs, "ab", strict=True):
        write(out, name)
    for number, rank in enumerate(order):
        error = NotFinite("NaN") if rank == refuses else Interrupted(15)
        assert not ranks[rank].__exit__(type(error), error, None)
        if number == 0:
            assert {"a", "b", WORK_NAME} == set(os.listdir(path)), "another rank still writes"
    assert not os.path.exists(path) or os.listdir(path) == []


def test_outdir_interrupted_ranks_leave_what_is_finished(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    with pytest.raises(Interrupted), outdir.open_outdir(path, PLAN, NAMES) as first:
        first.share()
        with outdir.join_outdir(path, PLAN, NAMES, "", 1) as second:
            write(second, "b")
            raise Interrupted(15)
    with outdir.open_outdir(path, PLAN, NAMES) as again:
        assert again.finished.keys() == {"b"}


def test_outdir_refusal_of_a_job_whose_last_rank_was_killed_is_forgotten(tmp_path: Path) -> None:
    """The next job begins where it ended, and an interruption of that one removes nothing."""
    path, refused = str(tmp_path / "out"), tmp_path / "out" / WORK_NAME / "refused"
    with outdir.open_outdir(path, PLAN, NAMES) as first:
        write(first, "a")
    refused.touch()
    with pytest.raises(Interrupted), outdir.open_outdir(path, PLAN, NAMES) as again:
        again.share()
        raise Interrupted(15)
    assert (tmp_path / "out" / "a").exists()
    assert not refused.exists()


def test_outdir_is_joined_by_ranks_of_the_same_plan_only(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    with outdir.open_outdir(path, PLAN, NAMES, "stamps") as first:
        first.share()
        for other in (("cd" * 32, "stamps"), (PLAN, "others")):
            with (
                pytest.raises(Environment, match="other source files than rank 0"),
                outdir.join_outdir(path, other[0], NAMES, other[1], 1),
            ):
                pass
        assert os.listdir(tmp_path / "out" / WORK_NAME)


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_outdir_strange_file_among_the_journals_is_an_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with outdir.open_outdir(str(path), PLAN, NAMES) as first:
        write(first, "a")
    strange = path / WORK_NAME / "journal.3"
    strange.symlink_to("journal") if kind == "link" else os.mkfifo(strange)
    with tiny.at_most(20), pytest.raises(Environment), outdir.open_outdir(str(path), PLAN, NAMES):
        pass


# ---- ranks that meet


@pytest.mark.slow
def test_meet_waits_for_the_last_rank_and_not_longer() -> None:
    waited = gangs.gang(3, meeting_late, 0.5)
    assert all(0.4 < seconds < 5 for seconds in waited), waited


@pytest.mark.slow
def test_meet_is_interrupted_by_a_signal(tmp_path: Path) -> None:
    gangs.outcomes(2, interrupted_meeting, tmp_path / "told")
    seconds, _, told = (tmp_path / "told").read_text().partition(" ")
    assert told.startswith("stopped by a signal")
    assert float(seconds) < 1.2, "it waited for the other rank"


# ---- bytes


@pytest.fixture(scope="module")
def cases(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, dict[str, str]]]:
    """Conversions, and the files that one process makes of each."""
    base = tmp_path_factory.mktemp("alone")
    values = base / "bf16 deepseek"
    found = {}
    for name, case in (
        ("bf16 deepseek", Case(flash)),
        ("bf16 transformers", Case(flash, names="transformers")),
        ("nvfp4", Case(flash, "nvfp4")),
        ("fp8", Case(flash, "fp8")),
        ("native by sidecar", Case(values, "native")),
        ("native by source", Case(values, "native", released=flash)),
    ):
        convert(case, base / name)
        found[name] = case, tiny.tree_of(base / name)
    assert len(found["bf16 deepseek"][1]) > 50, "too few files to share"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_make_the_bytes_of_one_process(
    size: int, cases: dict[str, tuple[Case, dict[str, str]]], tmp_path: Path
) -> None:
    """Every file, the manifest and the sidecar among them; and nothing else stays."""
    work = [(case, tmp_path / name) for name, (case, _) in cases.items()]
    summaries = gangs.gang(size, convert_all, work, 1 + size % 2)
    for number, (name, (_, expected)) in enumerate(cases.items()):
        assert tiny.tree_of(tmp_path / name) == expected, name
        files = {file.name for file in summaries[0][number].files}
        assert files == expected.keys() - {MANIFEST_NAME}
    again = gangs.gang(size, convert_all, work, 1)
    assert all(summary.was_complete for one in again for summary in one)
    assert all(tiny.tree_of(tmp_path / name) == expected for name, (_, expected) in cases.items())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "victim", "then"), [(3, 1, 1), (3, 0, 2), (2, 1, 4)])
def test_rank_killed_in_the_middle_the_others_say_so_and_any_number_of_ranks_continues(
    size: int, victim: int, then: int, cases: dict[str, tuple[Case, dict[str, str]]], tmp_path: Path
) -> None:
    case, expected = cases["bf16 deepseek"]
    out = tmp_path / "out"
    found = gangs.outcomes(size, dying, case, out, victim, 3)
    for rank, outcome in enumerate(found):
        if rank == victim:
            assert isinstance(outcome.error, gangs.RankDied)
        else:
            assert isinstance(outcome.error, Environment), outcome.trace
            assert "another rank is gone" in str(outcome.error)
    kept = {name for name in os.listdir(out) if name.endswith(".safetensors")}
    assert MANIFEST_NAME not in os.listdir(out)
    assert len(kept) > 3, "the others had finished their share"
    wrote = gangs.gang(then, counting, case, out)
    assert tiny.tree_of(out) == expected
    anew = set(itertools.chain(*wrote))
    shards = {name for name in expected if name.endswith(".safetensors")}
    assert sum(map(len, wrote)) == len(anew), "a shard was written twice"
    assert anew >= shards - kept
    assert len(anew & kept) <= 1, "what was finished is kept, but for the file that was not yet written down"
    assert all(wrote), "a rank had nothing to do"


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 2])
def test_ranks_prove_before_anything_is_written_that_no_value_is_lost(
    layer: int, flash: Path, tmp_path: Path
) -> None:
    """Each a share of the scales; what one refuses none begins."""
    src, name = tiny.copy_of(flash, tmp_path / "src"), f"layers.{layer}.ffn.experts.1.w2"

    def spread(tensors: dict[str, tiny.Tensor]) -> None:
        for leaf, data in (("weight", b"\x11"), ("scale", b"\x78")):
            tensor = tensors[f"{name}.{leaf}"]
            tensors[f"{name}.{leaf}"] = tensor._replace(data=data * tensor.size)
        scale = tensors[f"{name}.scale"]
        assert isinstance(scale.data, bytes)
        tensors[f"{name}.scale"] = scale._replace(data=b"\x60" + scale.data[1:])  # 24 below the others

    tiny.edit_shard(tiny.shard_of(src, f"{name}.weight"), spread)
    found = gangs.outcomes(2, convert_all, [(Case(src, "fp8"), tmp_path / "out")], 1)
    kinds = {type(outcome.error): str(outcome.error) for outcome in found}
    assert kinds.keys() == {NotLossless, Environment}, found
    assert f"'{name}.weight' does not fit" in kinds[NotLossless]
    assert not (tmp_path / "out").exists()


# ---- the installed command, under torchrun


class Job:
    """A torchrun of the slowed command, and what it said. seconds: for a shard, of every rank or of each."""

    def __init__(self, size: int, seconds: float | str, *arguments: object) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command = [str(ROOT / "tests/dcp/ranks_driver.py"), str(seconds), *map(str, arguments)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            launcher + command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def wait_for_files(self, out: Path, count: int, pattern: str = "*.safetensors") -> None:
        deadline = time.monotonic() + 100
        while len([*out.glob(pattern)]) < count:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.02)

    def ranks(self) -> dict[int, int]:
        """rank -> process, of those that live."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/environ"):
            try:
                told = dict(item.partition("=")[::2] for item in status.read_text().split("\0"))
                parent = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, UnicodeDecodeError):
                continue
            if parent == self.process.pid and "RANK" in told:
                found[int(told["RANK"])] = int(status.parent.name)
        return found

    def end(self, timeout: float = 100) -> tuple[int, str]:
        """Exit code and what was said on stderr; nobody of the job is left."""
        try:
            _, said = self.process.communicate(timeout=timeout)
        finally:
            ranks = self.ranks()
            for process in ranks.values():
                os.kill(process, signal.SIGKILL)
            if self.process.poll() is None:
                self.process.kill()
        assert not ranks, "ranks outlived their job"
        return self.process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_rank_killed_ends_the_job_with_a_message_and_the_next_run_resumes(
    victim: int, cases: dict[str, tuple[Case, dict[str, str]]], tmp_path: Path
) -> None:
    case, expected = cases["bf16 deepseek"]
    out = tmp_path / "out"
    job = Job(2, 0.1, "convert", case.src, out, "--to", "bf16", "--max-shard-size", SHARD_BYTES)
    job.wait_for_files(out, 6)
    began = time.monotonic()
    os.kill(job.ranks()[victim], signal.SIGKILL)
    code, said = job.end()
    assert time.monotonic() - began < 20
    assert code
    assert "exitcode: -9" in said or "SIGKILL" in said.upper()
    assert "the same command continues" in said
    assert not [*out.rglob(MANIFEST_NAME)]
    kept = len([*out.glob("*.safetensors")])
    done = convert(case, out)
    assert done.num_resumed >= kept - 1 > 4
    assert tiny.tree_of(out) == expected


@pytest.mark.slow
def test_torchrun_rank_killed_in_reshard_torch_sees_no_checkpoint_and_one_process_continues(
    flash: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", ["--to", "dcp", "--max-file-size", SHARD_BYTES, "--chunk-bytes", "65536"]
    job = Job(2, 0.1, "reshard", flash, out, *options)
    job.wait_for_files(out, 4, "*.distcp")
    os.kill(job.ranks()[1], signal.SIGKILL)
    code, said = job.end()
    assert code
    assert "the same command continues" in said
    assert not [*out.rglob(MANIFEST_NAME), *out.rglob(".metadata")]
    assert len([*out.glob("*.distcp")]) >= 4
    for path in (out, tmp_path / "whole"):
        done = alone("reshard", str(flash), str(path), *map(str, options))
        assert done.returncode == 0, done.stderr
    assert tiny.tree_of(out) == tiny.tree_of(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_stopped_by_sigterm_leaves_no_temporary_and_continues(
    cases: dict[str, tuple[Case, dict[str, str]]], tmp_path: Path
) -> None:
    """One rank is done and waits for the other when the signal comes. While they run nobody else may write there."""
    case, expected = cases["bf16 deepseek"]
    out = tmp_path / "out"
    arguments = ("convert", case.src, out, "--to", "bf16", "--max-shard-size", SHARD_BYTES)
    job = Job(2, "0.2,0", *arguments)
    job.wait_for_files(out, len([name for name in expected if name.endswith(".safetensors")]) // 2 + 4)
    with pytest.raises(Busy) as busy:
        convert(case, out)
    assert busy.value.exit_code == EXIT_BUSY
    job.process.send_signal(signal.SIGTERM)
    code, said = job.end(20)
    assert code
    assert "Interrupted: stopped by a signal" in said
    assert "rank 1: Interrupted: stopped by a signal" in said
    assert [*out.rglob("*.part")] == []
    second = Job(3, 0, *arguments)
    assert second.end()[0] == 0
    assert tiny.tree_of(out) == expected


@pytest.mark.slow
def test_torchrun_rank_that_is_stopped_while_it_waits_for_another_leaves_at_once(
    cases: dict[str, tuple[Case, dict[str, str]]], tmp_path: Path
) -> None:
    """It does not wait until the other comes to the meeting."""
    case, expected = cases["bf16 deepseek"]
    out = tmp_path / "out"
    job = Job(2, "1,0", "convert", case.src, out, "--to", "bf16", "--max-shard-size", SHARD_BYTES)
    job.wait_for_files(out, len([name for name in expected if name.endswith(".safetensors")]) // 2)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(job.ranks()[1], signal.SIGTERM)
    _, said = job.end(20)
    assert time.monotonic() - began < 10
    assert "rank 1: Interrupted: stopped by a signal" in said
    assert MANIFEST_NAME not in os.listdir(out)


@pytest.mark.slow
def test_torchrun_rank_that_meets_nan_says_so_and_nothing_stays(flash: Path, tmp_path: Path) -> None:
    """What remains is as after one process: the mended source converts into the same directory."""
    src, out = tiny.copy_of(flash, tmp_path / "src"), tmp_path / "out"
    name, weight = "layers.0.attn.wq_a.scale", "layers.0.attn.wq_a.weight"

    def spoil(tensors: dict[str, tiny.Tensor]) -> None:
        data = tensors[name].data
        assert isinstance(data, bytes)
        tensors[name] = tensors[name]._replace(data=b"\xff" + data[1:])

    shard = tiny.shard_of(src, name)
    tiny.edit_shard(shard, spoil)
    job = Job(2, 0.02, "convert", src, out, "--to", "bf16", "--max-shard-size", SHARD_BYTES)
    code, said = job.end()
    assert code
    assert "NotFinite" in said
    assert weight in said
    assert not out.exists() or os.listdir(out) == []
    shard.unlink()
    os.link(flash / shard.name, shard)
    assert Job(2, 0, "convert", src, out, "--to", "bf16").end()[0] == 0


@pytest.mark.slow
def test_torchrun_complete_output_nothing_to_do_and_one_json_document(
    cases: dict[str, tuple[Case, dict[str, str]]], tmp_path: Path
) -> None:
    case, expected = cases["bf16 deepseek"]
    out = tmp_path / "out"
    convert(case, out)
    arguments = ["convert", str(case.src), str(out), "--to", "bf16", "--max-shard-size", str(SHARD_BYTES)]
    done = gangs.torchrun(2, "-m", "dsv4cli", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] == len([name for name in expected if "safetensors" in name]) - 1
    assert done.stderr.count("nothing to do") == 1
    assert tiny.tree_of(out) == expected


# ---- the command by itself


def alone(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsv4cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_verb_of_one_process_refuses_to_run_on_many(tmp_path: Path) -> None:
    many = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = alone("inspect", str(tmp_path), **many)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.startswith("rank 1: Usage: inspect runs in one process")
    assert "do " in done.stderr
    assert alone("inspect", str(tmp_path), **{**many, "WORLD_SIZE": "1"}).returncode != EXIT_USAGE


@pytest.mark.slow
def test_command_in_one_process_loads_no_process_group(smallest: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from dsv4cli import main as cli\n"
        "assert not cli.dsv4.main(args=sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(9 if 'dsv4ckpt.process_group' in sys.modules else 0)\n"
    )
    command = ["convert", str(smallest), str(tmp_path / "out"), "--to", "bf16", "-q"]
    assert subprocess.run([sys.executable, "-c", program, *command]).returncode == 0
