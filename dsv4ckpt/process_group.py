"""Ranks that meet through torch.distributed: the processes that torchrun starts.  Knows no files and no conversion.

torchrun starts, watches and ends the ranks; when one fails it asks the others to stop.  All that is ours is a barrier
that can be interrupted: gloo's own keeps Python's signal handlers waiting as long as it waits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import Environment
from .ranks import Ranks
from .stop import StopFlag

_PATIENCE = default_pg_timeout * 1440  # 30 days: a rank may be done long before another
_LOOK_SECONDS = 0.01


class GroupRanks(Ranks):
    """The ranks of torch's default process group, or of `group`. After an interrupted meeting, only leave.

    gloo threads wait for what was begun, so that a process which leaves in the ordinary way would wait too: os._exit.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        object.__setattr__(self, "_group", group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """As Ranks says."""
        return self._group  # type: ignore[attr-defined, no-any-return]

    def apart(self) -> GroupRanks:
        """As Ranks says."""
        everyone = dist.get_process_group_ranks(self.group)
        return GroupRanks(dist.new_group(everyone, timeout=_PATIENCE, backend="gloo"))

    def meet(self, stop: StopFlag) -> None:
        """As Ranks says."""
        stop.check()
        pause = threading.Event()
        with noticed(self.size, "the same command continues: files that are finished stay"):
            work = dist.barrier(self.group, async_op=True)
            while not work.is_completed():
                pause.wait(_LOOK_SECONDS)
                stop.check()
            work.wait()


@contextlib.contextmanager
def noticed(size: int, then: str) -> Iterator[None]:
    """What torch raises when one of `size` ranks is gone. `then`: what the user can do. raises Environment"""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise Environment(
            "another rank is gone",
            expected=f"{size} ranks",
            found=str(error).partition("\n")[0][:200],
            do=f"see what that rank said; {then}",
        ) from None


@contextlib.contextmanager
def joined(attempt: int | None = None) -> Iterator[GroupRanks]:
    """This process as a rank of the job that its environment tells of, as torchrun sets it.

    attempt  how often the ranks were started again, if all of them know: torchrun keeps its store when it does that,
             with the addresses of those that are gone
    raises  Environment. After an error the group stays as it is: the process has to be left by os._exit.
    """
    try:
        store, rank, size = next(rendezvous("env://", timeout=default_pg_timeout))
        if attempt is not None:
            store = PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group("gloo", timeout=_PATIENCE, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise Environment(
            "cannot join the ranks of this job",
            found=str(error).partition("\n")[0][:200],
            do="start all ranks with one torchrun; GLOO_SOCKET_IFNAME names the network interface to use",
        ) from None
    yield GroupRanks()
    dist.destroy_process_group()
