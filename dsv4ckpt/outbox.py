"""Finished shards on their way to the Hub: sent by a thread while others are made, gone from here once they are seen.

Is a run.Outlet.  A shard stays on this disk until a commit shows it, so that a kill costs only what was under way.
Commits are groups: the Hub allows about 128 of them in an hour.  Knows no tensors.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from .errors import Dsv4Error, HubFailed, Interrupted
from .hub_writer import WritableRepo
from .manifest import Listed
from .push import GROUP_BYTES, GROUP_FILES, is_published, send_shards
from .sink import Receipt, io_errors
from .stop import StopFlag

_LOOK_SECONDS = 0.2  # how often somebody who waits looks whether the work is to stop
_TIMES = 3  # that a group is committed before the Hub's ids of it count as wrong


class Outbox:
    """Sends shards of a directory to a repository. Use `opened`."""

    def __init__(
        self, directory: str, repo: WritableRepo, limit: int, stop: StopFlag, on_sent: Callable[[int], None]
    ) -> None:
        self._directory, self._repo, self._limit = directory, repo, limit
        self._stop, self._on_sent = stop, on_sent
        self._present = repo.files()
        self._changed = threading.Condition()
        self._queue: list[Listed] = []
        self._taken = 0  # bytes of shards that are here, or are being made
        self._num_waiting = 0  # for room
        self._is_last = self._is_closed = False  # nothing more will come; nothing more is sent
        self.sending = concurrent.futures.Future[None]()  # the thread's work

    @property
    def limit(self) -> int:
        return self._limit

    def has(self, receipt: Receipt) -> bool:
        return is_published(_listed(receipt), self._present)

    def make_room(self, size: int) -> None:
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                self._wait_for(lambda: not self._taken or self._taken + size <= self._limit)
            finally:
                self._num_waiting -= 1
            self._taken += size

    def take(self, receipt: Receipt) -> None:
        with self._changed:
            self._queue.append(_listed(receipt))
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._is_last = True
            self._changed.notify_all()
            self._wait_for(lambda: not self._queue)

    def take_up(self, receipt: Receipt) -> None:
        if self.has(receipt):  # the run before may have been killed just after the commit
            self._remove(receipt.name)
            return
        with self._changed:
            self._taken += receipt.size
        self.take(receipt)

    def close(self) -> None:
        """No other group is begun."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        """raises what sending raised, what `stop` raises"""
        while not is_so():
            self._stop.check()
            if self.sending.done():
                self.sending.result()
            self._changed.wait(_LOOK_SECONDS)

    # ---- the thread

    def send_all(self) -> None:
        """What the thread does; `sending` has what it raised: HubFailed, Environment, what `stop` raises."""
        try:
            while group := self._next_group():
                self._send(group)
        except Dsv4Error as error:
            self.sending.set_exception(error)
        except BaseException as error:  # noqa: BLE001
            self.sending.set_exception(error)
            raise SystemExit from None  # the thread ends without a word: who waits has it
        else:
            self.sending.set_result(None)

    def _next_group(self) -> list[Listed]:
        """What goes into one commit: as much as there is, once it is enough or somebody waits. Empty: all is done."""
        with self._changed:
            while not self._is_due():
                if self._is_last or self._is_closed or self._stop.is_set:
                    return []
                self._changed.wait(_LOOK_SECONDS)
            return [] if self._is_closed or self._stop.is_set else self._queue[:GROUP_FILES]

    def _is_due(self) -> bool:
        enough = min(GROUP_BYTES, self._limit // 3)
        is_full = len(self._queue) >= GROUP_FILES or sum(file.size for file in self._queue) >= enough
        return bool(self._queue) and (is_full or self._num_waiting > 0 or self._is_last)

    def _send(self, group: list[Listed]) -> None:
        sizes = {file.name: file.size for file in group}
        for _ in range(_TIMES):
            send_shards(self._repo, self._directory, group, lambda name: self._on_sent(sizes[name]))
            self._present = self._repo.files()
            wrong = [file for file in group if not is_published(file, self._present)]
            if not wrong:
                break
        else:
            remote = self._present.get(wrong[0].name)
            raise HubFailed(
                "the Hub shows another id for a shard than it was sent with",
                file=wrong[0].name,
                expected=wrong[0].sha256,
                found=remote.id if remote else "nothing",
                do="see whether somebody else writes to this branch, then give the same command again",
            )
        for file in group:
            self._remove(file.name)
        with self._changed:
            self._queue = self._queue[len(group) :]
            self._taken -= sum(sizes.values())
            self._changed.notify_all()

    def _remove(self, name: str) -> None:
        with io_errors(name), contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, name))


def _listed(receipt: Receipt) -> Listed:
    return Listed(receipt.name, receipt.size, receipt.sha256)


@contextlib.contextmanager
def opened(
    directory: str, repo: WritableRepo, limit: int, stop: StopFlag, on_sent: Callable[[int], None]
) -> Iterator[Outbox]:
    """An outbox that sends while the block runs.

    limit    bytes of shards that may be in the directory, made or in the making
    on_sent  told of bytes that the Hub has, from a thread
    """
    outbox = Outbox(directory, repo, limit, stop, on_sent)
    # after a signal nobody waits for what is under way, the interpreter neither: the next run asks what has arrived
    threading.Thread(target=outbox.send_all, daemon=True).start()
    is_waited_for = True
    try:
        yield outbox
    except Interrupted:
        is_waited_for = False
        raise
    finally:
        outbox.close()
        if is_waited_for:
            concurrent.futures.wait([outbox.sending])
