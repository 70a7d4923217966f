"""A function on several gloo ranks, each in a process of its own: what they return and raise comes back.

Nobody stays behind: whatever happens, every rank has ended when a call returns.  Processes are forked from a server
that has imported torch and the trainer once, so that a rank starts in no time; the server ends with the test process.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp",
        "torch.distributed.pipelining", "dsv4ckpt.dcp", "dsv4model.trainer", "dsv4model.sharding", "dsv4model.pipeline",
    ]
)  # fmt: skip
_GRACE_SECONDS = 20.0  # what the others have once a rank has failed: they may wait for it


class Outcome(NamedTuple):
    """What came of one rank: `error` is None, or what it raised, and `trace` where."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""


class RankDied(Exception):
    """A rank ended without an answer, or had to be ended."""


def gang(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """What `work(*arguments)` returns on each of `size` ranks, in their order.

    work      a function of a module, so that it can be found again; the process group is there when it begins
    raises    AssertionError with the traces of all ranks that raised
    """
    found = outcomes(size, work, *arguments, timeout=timeout)
    traces = [f"rank {rank}:\n{outcome.trace}" for rank, outcome in enumerate(found) if outcome.error]
    assert not traces, "\n".join(traces)
    return [outcome.value for outcome in found]


def outcomes(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Outcome]:
    """The same, with errors as values: what each rank returned or raised. RankDied: it did neither."""
    packed = pickle.dumps((work, arguments))  # not multiprocessing's pickler: that one shares tensors' memory
    with tempfile.TemporaryDirectory() as meeting, contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(size):
            ours, theirs = _SERVER.Pipe(duplex=False)
            given = (rank, size, f"file://{meeting}/meet", timeout, packed, theirs)
            process = _SERVER.Process(target=_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            stack.callback(_end, process)
            stack.callback(ours.close)
            ranks.append((process, ours))
        return _answers(ranks, time.monotonic() + timeout)


def rank_errors(error: BaseException | None) -> dict[int, BaseException]:
    """What the ranks raised, out of the one exception that torch makes of it."""
    from torch.distributed.checkpoint.api import CheckpointException

    assert isinstance(error, CheckpointException), repr(error)
    return {rank: wrapped[0] for rank, wrapped in error.failures.items()}


def _answers(ranks: list[tuple[Any, Any]], deadline: float) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    while len(found) < len(ranks):
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks) if rank not in found}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = waiting[pipe]
            found[rank] = _answer(*ranks[rank])
            if found[rank].error:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if not ready:
            for rank in waiting.values():
                ranks[rank][0].kill()
                found[rank] = Outcome(error=RankDied("no answer in time"), trace="no answer in time")
    return [found[rank] for rank in range(len(ranks))]


def _answer(process: Any, pipe: Any) -> Outcome:
    try:
        outcome = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(_GRACE_SECONDS)
        what = f"ended with exit code {process.exitcode} and no answer"
        return Outcome(error=RankDied(what), trace=what)
    assert isinstance(outcome, Outcome)
    return outcome


def _end(process: Any) -> None:
    process.join(2.0)
    if process.is_alive():
        process.kill()
        process.join()


def _rank(rank: int, size: int, meeting: str, timeout: float, packed: bytes, pipe: Any) -> None:
    try:
        outcome = Outcome(_work(rank, size, meeting, timeout, packed))
        answer = pickle.dumps(outcome)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        answer = _packed_error(error, traceback.format_exc())
    pipe.send_bytes(answer)
    pipe.close()


def _work(rank: int, size: int, meeting: str, timeout: float, packed: bytes) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    work, arguments = pickle.loads(packed)
    patience = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=patience)
    try:
        value = work(*arguments)
        dist.barrier()  # a rank that left early would take its connections along
        return value
    finally:
        dist.destroy_process_group()


def _packed_error(error: BaseException, trace: str) -> bytes:
    try:
        packed = pickle.dumps(Outcome(error=error, trace=trace))
        pickle.loads(packed)
    except Exception:  # noqa: BLE001 - pickles raise anything
        return pickle.dumps(Outcome(error=RankDied(repr(error)), trace=trace))
    return packed


# ---- scripts, under torchrun


def torchrun(
    size: int, *arguments: str, cwd: Path | None = None, timeout: float = 240.0, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node SIZE ARGUMENTS` on a free port. raises TimeoutExpired once all are killed"""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    launcher.append(f"--max-restarts={restarts}")
    command = [*launcher, *arguments]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            for rank in [*_children(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank, signal.SIGKILL)  # torchrun gives each rank a session of its own
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _children(pid: int) -> list[int]:
    """As Linux tells it; none if the process has ended."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found
