"""What every reader of ours is to torch.distributed.checkpoint.load: of one path, that shows each tensor in one chunk.

Source: torch 2.13 (torch/distributed/checkpoint/storage.py for the calls and their order).
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.storage import StorageReader

from . import probe
from .errors import Usage
from .formats import Shape


class PathReader(StorageReader):
    """All is read from headers when it is made; whoever inherits fills tensors in read_data."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    @abc.abstractmethod
    def _told(self) -> Mapping[str, tuple[torch.dtype, Shape]]:
        """dtype and shape of every tensor, by its name."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """raises Usage if the caller names another checkpoint"""
        if checkpoint_id is not None and os.fspath(checkpoint_id) != self._path:
            raise Usage(
                "checkpoint_id names another checkpoint than this reader has opened",
                expected=repr(self._path),
                found=repr(os.fspath(checkpoint_id)),
                do="leave checkpoint_id out",
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - torch looks for the names
        """Every tensor, in one chunk: any box of it can be read."""
        told: dict[str, STORAGE_TYPES] = {name: _whole(*item) for name, item in self._told().items()}
        return Metadata(told, planner_data={name: (name,) for name in told})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: all was read when the reader was made."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return probe.is_directory(os.fspath(checkpoint_id))


def done() -> torch.futures.Future[None]:
    """What read_data gives once everything is read."""
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return future


def _whole(dtype: torch.dtype, shape: Shape) -> TensorStorageMetadata:
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])
