"""The shelf: what is needed together is here together, within the room, once, and gone after its last use."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv4ckpt.errors import HubFailed, Interrupted
from dsv4ckpt.shelf import Shelf
from dsv4ckpt.stop import StopFlag

SIZES = {"a": 100, "b": 200, "c": 300, "d": 400, "e": 500}


class Far:
    """A place whose files are their names, again and again. Notes what it is asked for, and how full it gets here."""

    def __init__(self, at: Path) -> None:
        self.at, self.brought, self.most = at, list[str](), 0
        self.lock = threading.Lock()

    def __call__(self, name: str, part: str, marks: str) -> None:
        with self.lock:
            if Path(part).exists() and Path(part).read_bytes() == self.content(name):
                return
            self.brought.append(name)
        Path(part).write_bytes(self.content(name))
        self.most = max(self.most, self.used())

    def content(self, name: str) -> bytes:
        return name.encode() * SIZES[name]

    def used(self) -> int:
        return sum(SIZES[file.stem] for file in self.at.iterdir())


@pytest.fixture
def far(tmp_path: Path) -> Far:
    return Far(tmp_path / "shelf")


def made(far: Far, limit: int, uses: dict[str, int] | Counter[str], stop: StopFlag | None = None) -> Shelf:
    shelf = Shelf(str(far.at), SIZES, limit, far, stop.check if stop else lambda: None)
    shelf.expect(uses)
    return shelf


def hold(shelf: Shelf, *names: str) -> None:
    with shelf.holding(names):
        pass


def here(far: Far) -> list[str]:
    return sorted(file.name for file in far.at.iterdir()) if far.at.exists() else []


def test_files_are_here_whole_while_they_are_held_and_gone_after_their_last_use(far: Far) -> None:
    shelf = made(far, 1000, {"a": 2, "b": 1})
    with shelf.holding(["b", "a", "a"]):
        assert here(far) == ["a.whole", "b.whole"] == [shelf.file_of(name) for name in "ab"]
        assert (far.at / "a.whole").read_bytes() == far.content("a")
    assert here(far) == ["a.whole"]
    hold(shelf, "a")
    assert not far.at.exists()
    assert far.brought == ["a", "b"]


def test_longest_unused_file_makes_room(far: Far) -> None:
    shelf = made(far, 600, dict.fromkeys("abc", 9))
    for name in "abcab":  # 100 + 200 + 300
        hold(shelf, name)
    assert far.brought == ["a", "b", "c"]
    shelf.expect(dict.fromkeys("abcde", 9))
    shelf = made(far, 600, dict.fromkeys("abcde", 9))
    for name in "cab":
        hold(shelf, name)
    hold(shelf, "d")  # takes the place of c and a
    assert here(far) == ["b.whole", "d.whole"]
    assert far.most <= 600


def test_what_is_held_is_waited_for(far: Far) -> None:
    shelf = made(far, 500, dict.fromkeys("ae", 2))
    order: list[str] = []

    def second() -> None:
        with shelf.holding(["e"]):
            order.append("e")

    with shelf.holding(["a"]):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.05)
        order.append("a")
        assert here(far) == ["a.whole"]
    other.join(5)
    assert order == ["a", "e"] and far.most <= 500


@pytest.mark.parametrize("limit", [900, 1000, 1500])
def test_many_threads_with_little_room_end_and_never_take_more(far: Far, limit: int) -> None:
    """Whatever two of them want at once, nobody waits for what another one waiting holds."""
    chance = random.Random(limit)
    groups = [chance.sample("abcde", chance.randint(1, 3)) for _ in range(200)]
    groups = [group for group in groups if sum(SIZES[name] for name in group) <= limit]
    shelf = made(far, limit, Counter(name for group in groups for name in group))

    def work(group: Collection[str]) -> bool:
        with shelf.holding(group):
            return all((far.at / f"{name}.whole").read_bytes() == far.content(name) for name in group)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, group) for group in groups]
        assert all(future.result(timeout=30) for future in futures)
    assert 0 < far.most <= limit and not far.at.exists()


def test_file_that_two_want_at_once_is_brought_once(far: Far) -> None:
    shelf = made(far, 1500, {"e": 8})
    meeting = threading.Barrier(8)

    def work() -> None:
        meeting.wait(5)
        with shelf.holding(["e"]):
            meeting.wait(5)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result(timeout=10)
    assert far.brought == ["e"] and not far.at.exists()


def test_file_whose_reader_failed_stays_for_the_next_run(far: Far) -> None:
    shelf = made(far, 1000, {"a": 1})
    with pytest.raises(HubFailed), shelf.holding(["a"]):
        raise HubFailed("no")
    assert here(far) == ["a.whole"]
    hold(made(far, 1000, {"a": 1}), "a")
    assert far.brought == ["a"] and not far.at.exists()


def test_what_a_killed_run_left_is_kept_if_it_will_be_used_and_proven_again(far: Far) -> None:
    far.at.mkdir()
    for name in ("a.whole", "b.part", "b.marks", "c.whole", "d.part", "x.whole", "a.other"):
        (far.at / name).write_bytes(b"?")
    (far.at / "a.whole").write_bytes(far.content("a"))
    shelf = made(far, 1000, {"a": 1, "b": 1, "e": 1})
    assert here(far) == ["a.whole", "b.marks", "b.part"]
    hold(shelf, "a")
    assert far.brought == []
    hold(shelf, "b")
    assert far.brought == ["b"] and not far.at.exists()


def test_file_of_an_earlier_run_that_was_tampered_with_is_not_taken(far: Far) -> None:
    far.at.mkdir()
    (far.at / "a.whole").write_bytes(far.content("b")[:100])
    shelf = made(far, 1000, {"a": 1})
    with shelf.holding(["a"]):
        assert (far.at / "a.whole").read_bytes() == far.content("a")
    assert far.brought == ["a"]


def test_what_is_left_of_more_room_than_there_is_now_goes_first(far: Far) -> None:
    far.at.mkdir()
    for name in "abcde":
        (far.at / f"{name}.whole").write_bytes(far.content(name))
    shelf = made(far, 600, dict.fromkeys("abcde", 1))
    with shelf.holding(["a", "e"]):
        assert far.used() <= 600
        assert {"a.whole", "e.whole"} <= {*here(far)}


def test_who_waits_for_room_hears_of_the_stop(far: Far) -> None:
    stop = StopFlag()
    shelf = made(far, 500, {"a": 1, "e": 1}, stop)
    with ThreadPoolExecutor(1) as pool, shelf.holding(["a"]):
        waiting = pool.submit(hold, shelf, "e")
        time.sleep(0.05)
        assert not waiting.done()
        stop.fail()
        with pytest.raises(Interrupted):
            waiting.result(timeout=5)


def test_fetch_that_fails_lets_others_have_the_room(far: Far) -> None:
    def bring(name: str, part: str, marks: str) -> None:
        if name == "a":
            raise HubFailed("no")
        far(name, part, marks)

    shelf = Shelf(str(far.at), SIZES, 500, bring)
    shelf.expect({"a": 1, "e": 1})
    with pytest.raises(HubFailed):
        hold(shelf, "a")
    hold(shelf, "e")
    assert far.brought == ["e"]


def test_room_that_is_still_needed_is_what_is_not_here(far: Far) -> None:
    shelf = made(far, 600, {"a": 2, "e": 1})
    assert shelf.bytes_to_come(["a", "a"]) == 100
    assert shelf.bytes_to_come("abcde") == 600
    hold(shelf, "a")
    taken = (far.at / "a.whole").stat().st_blocks * 512
    assert shelf.bytes_to_come("abcde") == max(0, 600 - taken)
