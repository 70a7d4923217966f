"""The outbox by itself: what it sends together, who waits for room, and how what goes wrong gets to the workers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from dsv4ckpt import outbox, push
from dsv4ckpt.errors import HubFailed, Interrupted
from dsv4ckpt.hub import Remote
from dsv4ckpt.hub_writer import WritableRepo
from dsv4ckpt.outbox import Outbox
from dsv4ckpt.sink import Receipt
from dsv4ckpt.stop import StopFlag

PATIENCE = 30.0  # seconds, for what comes at once


class FakeRepo:
    """What an outbox asks of a repository. Commits wait while `gate` is closed."""

    def __init__(self) -> None:
        self.present: dict[str, Remote] = {}
        self.groups: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.under_way = threading.Event()
        self.error: Exception | None = None
        self.num_wrong = 0  # commits that take another id

    def files(self) -> dict[str, Remote]:
        return {**self.present}

    def commit(self, missing: Callable[..., Any], message: str, on_sent: Callable[[str], None]) -> None:
        self.under_way.set()
        assert self.gate.wait(PATIENCE)
        if self.error:
            raise self.error
        additions, deletions = missing(self.files())
        assert message.startswith("Add ")
        for name in deletions:
            del self.present[name]
        for item in additions:
            data = Path(item.content).read_bytes()
            sha256 = "0" * 64 if self.num_wrong else hashlib.sha256(data).hexdigest()
            self.present[item.name] = Remote(len(data), sha256, "")
            on_sent(item.name)
        self.num_wrong -= bool(self.num_wrong)
        self.groups.append([item.name for item in additions])


class Bench:
    """A directory, a repository, and what an outbox has said of both."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.repo, self.stop = directory, FakeRepo(), StopFlag()
        self.sent: list[int] = []

    def opened(self, limit: int) -> contextlib.AbstractContextManager[Outbox]:
        repo = cast("WritableRepo", self.repo)
        return outbox.opened(str(self.directory), repo, limit, self.stop, self.sent.append)

    def finished(self, name: str, size: int = 10) -> Receipt:
        """A shard that a worker has written."""
        data = name.encode().ljust(size)
        (self.directory / name).write_bytes(data)
        return Receipt(name, size, hashlib.sha256(data).hexdigest(), {})

    def here(self) -> list[str]:
        return sorted(file.name for file in self.directory.iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[concurrent.futures.Future[None]]:
    """The work of another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def test_shards_go_in_groups_once_it_is_worth_it_and_the_rest_at_the_end(bench: Bench) -> None:
    with bench.opened(1_000_000) as made:
        receipts = [bench.finished(f"{number:02}") for number in range(push.GROUP_FILES + 3)]
        for receipt in receipts[:3]:
            made.make_room(receipt.size)
            made.take(receipt)
        assert not bench.repo.under_way.wait(0.5)  # it waits for more
        for receipt in receipts[3:]:
            made.make_room(receipt.size)
            made.take(receipt)
        made.finish()
        assert [len(group) for group in bench.repo.groups] == [push.GROUP_FILES, 3]
        assert bench.here() == [] and bench.sent == [10] * len(receipts)
        assert all(made.has(receipt) for receipt in receipts)


def test_third_of_the_room_is_worth_a_commit(bench: Bench) -> None:
    with bench.opened(100) as made:
        made.make_room(34)
        made.take(bench.finished("large", 34))
        made.finish()
    assert bench.repo.groups == [["large"]]


def test_who_needs_room_waits_until_a_commit_has_made_it(bench: Bench) -> None:
    bench.repo.gate.clear()
    with bench.opened(1000) as made:
        made.make_room(600)
        made.take(bench.finished("first", 300))
        made.take(bench.finished("second", 300))

        with beside(lambda: made.make_room(500)) as waiting:
            assert bench.repo.under_way.wait(PATIENCE)
            assert concurrent.futures.wait([waiting], 0.3).not_done
            assert bench.here() == ["first", "second"]  # they stay until a commit shows them
            bench.repo.gate.set()
            waiting.result(PATIENCE)
        assert bench.here() == []
        made.make_room(500)  # and no more was taken than was asked for


def test_who_waits_for_room_makes_even_one_small_shard_go(bench: Bench) -> None:
    with bench.opened(1000) as made:
        made.make_room(10)
        made.take(bench.finished("small"))
        made.make_room(995)
        assert bench.repo.groups == [["small"]]


def test_shard_in_the_making_is_waited_for(bench: Bench) -> None:
    with bench.opened(1000) as made:
        made.make_room(600)

        with beside(lambda: made.make_room(600)) as waiting:
            assert concurrent.futures.wait([waiting], 0.3).not_done
            made.take(bench.finished("first", 600))
            waiting.result(PATIENCE)


def test_larger_shard_than_all_room_has_it_alone(bench: Bench) -> None:
    with bench.opened(100) as made:
        made.make_room(5000)
        made.take(bench.finished("huge", 5000))
        made.make_room(10)
        assert bench.repo.groups == [["huge"]]


@pytest.mark.parametrize("where", ["make_room", "finish"])
def test_error_of_the_sending_thread_gets_to_the_workers(bench: Bench, where: str) -> None:
    bench.repo.error = HubFailed("it is broken", do="mend it")
    with pytest.raises(HubFailed, match="it is broken"), bench.opened(100) as made:
        made.make_room(90)
        made.take(bench.finished("a", 90))
        if where == "make_room":
            made.make_room(90)
        else:
            made.finish()
    assert bench.here() == ["a"]  # for the next run


def test_stop_ends_who_waits_and_nobody_waits_for_what_is_under_way(bench: Bench) -> None:
    bench.repo.gate.clear()
    with pytest.raises(Interrupted), bench.opened(100) as made:
        made.make_room(90)
        made.take(bench.finished("a", 90))
        assert bench.repo.under_way.wait(PATIENCE)
        bench.stop.signal_number = 2
        made.make_room(90)
    assert not made.sending.done()
    bench.repo.gate.set()
    made.sending.result(PATIENCE)
    assert bench.repo.groups == [["a"]]


def test_failed_worker_lets_what_is_under_way_end_and_begins_no_other_group(bench: Bench) -> None:
    bench.repo.gate.clear()
    receipts = [bench.finished(f"{number}", 50) for number in range(push.GROUP_FILES + 1)]
    with pytest.raises(ZeroDivisionError), bench.opened(100) as made:
        for receipt in receipts:
            made.take(receipt)
        assert bench.repo.under_way.wait(PATIENCE)
        threading.Timer(0.3, bench.repo.gate.set).start()
        raise ZeroDivisionError
    assert made.sending.done() and len(bench.repo.groups) == 1
    assert bench.here() == [receipts[-1].name]


def test_stop_that_nobody_has_told_ends_the_thread(bench: Bench) -> None:
    with bench.opened(100) as made:
        made.take(bench.finished("small"))
        bench.stop.fail()
        made.sending.result(PATIENCE)
        with pytest.raises(Interrupted):
            made.finish()


def test_shard_of_an_earlier_run_is_sent_or_if_it_is_there_removed(bench: Bench) -> None:
    there, here = bench.finished("there", 90), bench.finished("here", 90)
    bench.repo.present["there"] = Remote(90, there.sha256, "")
    with bench.opened(100) as made:
        assert made.has(there) and not made.has(here)
        made.take_up(there)
        assert bench.here() == ["here"]
        made.take_up(there)  # as if the run before had removed it
        made.take_up(here)
        made.make_room(50)  # waits for `here` alone
        made.finish()
    assert bench.repo.groups == [["here"]] and bench.here() == []


@pytest.mark.parametrize(
    "remote", [Remote(90, "0" * 64, ""), Remote(89, None, ""), Remote(90, None, "0" * 40)]
)
def test_file_of_other_bytes_on_the_hub_does_not_count(bench: Bench, remote: Remote) -> None:
    receipt = bench.finished("a", 90)
    bench.repo.present["a"] = remote
    with bench.opened(100) as made:
        assert not made.has(receipt)
        made.take_up(receipt)
        made.finish()
    assert bench.repo.present["a"].sha256 == receipt.sha256


def test_wrong_id_after_a_commit_is_sent_again_and_in_the_end_told(bench: Bench) -> None:
    bench.repo.num_wrong = 2
    with bench.opened(100) as made:
        made.take(bench.finished("a", 90))
        made.finish()
    assert bench.repo.groups == [["a"]] * 3 and bench.here() == []
    bench.repo.num_wrong = 3
    with pytest.raises(HubFailed, match="another id") as told, bench.opened(100) as made:
        made.take(bench.finished("b", 90))
        made.finish()
    assert told.value.facts["found"] == "0" * 64
    assert bench.here() == ["b"]


def test_index_that_is_there_goes_with_the_first_shard(bench: Bench) -> None:
    bench.repo.present["model.safetensors.index.json"] = Remote(1, None, "")
    with bench.opened(100) as made:
        made.take(bench.finished("a", 90))
        made.finish()
    assert bench.repo.present.keys() == {"a"}


def test_many_workers_with_little_room_all_get_their_turn(bench: Bench) -> None:
    here: list[int] = []

    def worker(made: Outbox, number: int) -> None:
        made.make_room(30)
        here.append(30 * len(bench.here()))
        time.sleep(0.001)
        made.take(bench.finished(f"{number:02}", 30))

    with bench.opened(100) as made, concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(worker, made, number) for number in range(40)]:
            done.result(PATIENCE)
        made.finish()
    assert sorted(name for group in bench.repo.groups for name in group) == [f"{n:02}" for n in range(40)]
    assert max(here) <= 70 and bench.here() == []
