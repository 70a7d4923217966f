"""Checkpoints of a run while it trains: each written at once, or by a thread while training goes on.

One at a time, in the order in which they were asked for.  Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from dsv4ckpt.errors import Interrupted
from dsv4ckpt.ranks import Ranks

from .recipe import CheckpointPart
from .runs import RunDirectory


class Saver:
    """Writes what it is given and removes what is too old. As a context it leaves nothing unfinished."""

    def __init__(self, run: RunDirectory, ranks: Ranks, part: CheckpointPart) -> None:
        """All ranks make one together."""
        self._rank, self._keep = ranks.rank, part.keep
        self._run = RunDirectory(run.path, ranks.apart()) if part.background else run
        self._thread = ThreadPoolExecutor(1) if part.background else None
        self._begun: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a checkpoint, once the one before it is there.

        In the background it is written from copies in CPU memory: the tensors may change once this has returned.

        raises  as RunDirectory.write; in the background what the one before it raised
        """
        self.join()
        if self._thread is None:
            self._write(step, tensors, about)
            return
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._begun = self._thread.submit(self._write, step, copies, about)

    def look(self) -> None:
        """Whether what was begun went well so far. raises as RunDirectory.write"""
        if self._begun is not None and self._begun.done():
            self.join()

    def join(self) -> None:
        """Wait until what was begun is there. raises as RunDirectory.write"""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def _write(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self._run.write(step, tensors, about)
        if self._rank == 0:
            self._run.keep(self._keep)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        # whoever is asked to stop relies on what was saved; another error tells more than this one would
        if error is None or isinstance(error, Interrupted):
            self.join()
