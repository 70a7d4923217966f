"""Whole files by segments: only what is missing is asked for, and only what its id says is taken."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from server import Fault, Fetch, Hub, git_blob

from dsv4ckpt.errors import HubFailed, Interrupted
from dsv4ckpt.hub import Remote, Repo
from dsv4ckpt.hub_fetch import Bringer
from dsv4ckpt.stop import StopFlag

LAB, NAME, SEGMENT = "lab/one", "model.safetensors", 1000
STORAGE = "/storage/"


class Bench:
    """A file on the Hub, and where it is brought to."""

    def __init__(self, hub: Hub, at: Path) -> None:
        (at / "seed").mkdir()
        self.content = random.Random(1).randbytes(4500)
        (at / "seed" / NAME).write_bytes(self.content)
        hub.seed(LAB, at / "seed")
        self.hub, self.oid = hub, hashlib.sha256(self.content).hexdigest()
        self.part, self.marks = at / "file.part", at / "file.marks"
        self.arrived, self.stop = list[int](), StopFlag()

    def bring(self) -> None:
        repo = Repo(LAB)
        bringer = Bringer(repo, repo.files(), self.stop, self.arrived.append, SEGMENT)
        bringer(NAME, str(self.part), str(self.marks))

    @property
    def begins(self) -> list[int]:
        return sorted(item.begin for item in self.hub.fetches)


@pytest.fixture
def bench(hub: Hub, tmp_path: Path) -> Bench:
    return Bench(hub, tmp_path)


def test_segments_are_asked_for_once_and_make_the_file(bench: Bench) -> None:
    bench.bring()
    assert bench.part.read_bytes() == bench.content and not bench.marks.exists()
    assert {*bench.hub.fetches} == {
        *(Fetch(bench.oid, begin, SEGMENT) for begin in (0, 1000, 2000, 3000)),
        Fetch(bench.oid, 4000, 500),
    }
    assert sum(bench.arrived) == bench.hub.fetched == 4500


def test_segments_that_are_marked_are_not_asked_for_again(bench: Bench) -> None:
    bench.part.write_bytes(bench.content[:2000] + bytes(1000) + bench.content[3000:4000])
    bench.marks.write_bytes(b"\1\1\0\1\0")
    bench.bring()
    assert bench.begins == [2000, 4000] and bench.part.read_bytes() == bench.content


def test_marks_without_a_part_are_nothing(bench: Bench) -> None:
    bench.marks.write_bytes(b"\1\1\1\1\1")
    bench.bring()
    assert len(bench.begins) == 5 and bench.part.read_bytes() == bench.content


@pytest.mark.parametrize("marks", [b"", b"\1", b"\1\1\1"])
def test_marks_that_were_cut_are_believed_as_far_as_they_go(bench: Bench, marks: bytes) -> None:
    bench.part.write_bytes(bench.content[: 1000 * len(marks)])
    bench.marks.write_bytes(marks)
    bench.bring()
    assert len(bench.begins) == 5 - len(marks) and bench.part.read_bytes() == bench.content


def test_part_without_marks_is_proven_and_not_fetched(bench: Bench) -> None:
    bench.part.write_bytes(bench.content)
    bench.bring()
    assert bench.begins == []


@pytest.mark.parametrize("wrong", [b"", b"x", bytes(4500), bytes(5000)])
def test_part_without_marks_that_is_something_else_is_fetched_anew(bench: Bench, wrong: bytes) -> None:
    bench.part.write_bytes(wrong)
    bench.bring()
    assert len(bench.begins) == 5 and bench.part.read_bytes() == bench.content


def test_marks_that_lie_are_found_out(bench: Bench) -> None:
    bench.part.write_bytes(bytes(4500))
    bench.marks.write_bytes(b"\1" * 5)
    bench.bring()
    assert len(bench.begins) == 5 and bench.part.read_bytes() == bench.content


def test_link_in_the_place_of_a_part_is_not_written_through(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    bench.part.symlink_to(tmp_path / "precious")
    bench.marks.write_bytes(bytes(5))
    with pytest.raises(Exception, match="symbolic links"):
        bench.bring()
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("times", [1, 2])
def test_wrong_bytes_are_fetched_again(bench: Bench, times: int) -> None:
    """A segment that is wrong makes the whole file wrong: nobody knows which it was."""
    for _ in range(times):
        bench.hub.faults.append(Fault("GET", STORAGE, "wrong bytes"))
        bench.hub.faults.append(Fault("GET", STORAGE, "short", 0))
    bench.bring()
    assert bench.part.read_bytes() == bench.content
    assert len(bench.begins) in (10, 15)


def test_bytes_that_stay_wrong_are_not_taken(bench: Bench) -> None:
    bench.hub.faults.append(Fault("GET", STORAGE, "wrong bytes", 99))
    with pytest.raises(HubFailed, match="arrives 3 times as something else") as caught:
        bench.bring()
    assert caught.value.facts["expected"] == bench.oid and caught.value.facts["file"] == NAME
    assert not bench.part.exists() and not bench.marks.exists()
    assert len(bench.begins) == 15


def test_what_had_come_before_a_failure_stays(bench: Bench, waits: list[float]) -> None:
    bench.hub.on_request = lambda request: (
        bench.hub.faults.append(Fault("GET", STORAGE, 500, 999)) if len(bench.hub.fetches) >= 2 else None
    )
    with pytest.raises(HubFailed, match="fails again and again"):
        bench.bring()
    assert waits
    before = len(bench.hub.fetches)
    assert 2 <= before < 5 and bench.marks.read_bytes().count(b"\1") == before
    bench.hub.on_request = lambda request: None
    bench.hub.faults.clear()
    bench.bring()
    assert bench.begins == [0, 1000, 2000, 3000, 4000] and bench.part.read_bytes() == bench.content


def test_stop_ends_it_and_keeps_what_is_marked(bench: Bench) -> None:
    bench.hub.on_request = lambda request: bench.stop.fail() if len(bench.hub.fetches) >= 2 else None
    with pytest.raises(Interrupted):
        bench.bring()
    marked = bench.marks.read_bytes().count(b"\1")
    assert marked < 5
    bench.stop, num_before = StopFlag(), len(bench.hub.fetches)
    bench.hub.on_request = lambda request: None
    bench.bring()
    assert len(bench.hub.fetches) - num_before == 5 - marked
    assert bench.part.read_bytes() == bench.content


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_address_that_was_good_once_is_asked_for_anew(bench: Bench, waits: list[float], status: int) -> None:
    repo = Repo(LAB)
    assert repo.read(NAME, 0, 10) == bench.content[:10]
    bench.hub.faults.append(Fault("GET", STORAGE, status))
    assert repo.read(NAME, 10, 20) == bench.content[10:20]
    assert bench.hub.count("HEAD", "/resolve/") == 2 and waits == [1]
    assert repo.read(NAME, 20, 30) == bench.content[20:30]
    assert bench.hub.count("HEAD", "/resolve/") == 2


def test_address_that_was_never_good_is_refused_at_once(bench: Bench, waits: list[float]) -> None:
    bench.hub.faults.append(Fault("GET", STORAGE, 403, 9))
    with pytest.raises(HubFailed, match="does not allow it"):
        Repo(LAB).read(NAME, 0, 10)
    assert waits == []


def test_storage_that_ignores_the_range_is_not_believed_but_at_the_beginning(
    bench: Bench, waits: list[float]
) -> None:
    repo = Repo(LAB)
    bench.hub.faults.append(Fault("GET", STORAGE, "no range", 2))
    assert repo.read(NAME, 0, 10) == bench.content[:10] and waits == []
    assert repo.read(NAME, 10, 20) == bench.content[10:20] and waits == [1]
    bench.hub.faults.append(Fault("GET", STORAGE, "no range", 99))
    with pytest.raises(HubFailed, match="did not send the range"):
        repo.read(NAME, 10, 20)


def test_ids_of_both_kinds_are_those_of_the_bytes() -> None:
    data = b"hello"
    for remote in (Remote(5, hashlib.sha256(data).hexdigest(), ""), Remote(5, None, git_blob(data))):
        assert remote.is_of(data)
        assert not remote.is_of(b"hellp") and not remote.is_of(b"hello\0")
    assert (
        git_blob(data) == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    )  # printf hello | git hash-object --stdin
