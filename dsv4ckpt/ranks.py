"""The ranks of a job: which one this process is, of how many; where they meet; and who writes what.

Ranks share a directory and nothing else.  Knows no torch (process_group.py has ranks that meet), no files.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .stop import StopFlag


@dataclass(frozen=True)
class Ranks:
    """This process among those that do one job together. As it stands here: alone."""

    rank: int = 0
    size: int = 1

    def meet(self, stop: StopFlag) -> None:  # noqa: ARG002 - there is nobody to wait for
        """Return when every rank has come here. raises Interrupted; Environment if one of them is gone"""
        assert self.size == 1

    @property
    def group(self) -> Any:
        """What torch calls these ranks; None: all that there are."""
        return None

    def apart(self) -> Ranks:
        """The same ranks, who meet without regard to other meetings: for a thread. All ask for it together."""
        return self


ALONE = Ranks()


class _Sized(Protocol):
    """A file that is to be written."""

    @property
    def size(self) -> int: ...


_File = TypeVar("_File", bound=_Sized)


def share(files: Sequence[_File], num_ranks: int) -> list[list[_File]]:
    """What each rank writes, in the order of the files: the largest first went to whoever had least.

    Equal files give equal shares, so that every rank knows those of all.
    """
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap: who has least, and of these the lowest
    taken: list[list[int]] = [[] for _ in range(num_ranks)]
    for number in sorted(range(len(files)), key=lambda number: -files[number].size):
        load, rank = heapq.heappop(loads)
        taken[rank].append(number)
        heapq.heappush(loads, (load + files[number].size, rank))
    return [[files[number] for number in sorted(numbers)] for numbers in taken]
