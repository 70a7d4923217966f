"""torch DCP directories for torch.distributed.checkpoint.load, without running their pickles.  Knows no models.

    dcp.load(state, storage_reader=DirectoryReader(path))

torch's own reader unpickles `.metadata`, which runs whatever stands in it; this one reads it as inert values.
Source: torch 2.13 (torch/distributed/checkpoint/storage.py for the calls and their order).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from . import dcp_source, probe
from .dcp_metadata import Chunk
from .errors import Usage
from .source import Reader
from .torchfile import TORCH_DTYPES


class DirectoryReader(StorageReader):
    """Tensors of a DCP directory of any world size; pickled objects in it are not read.

    exact   dtypes must be equal: nothing is cast
    memory  above the state dict, what is asked for of one tensor
    """

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        """Look at every chunk. raises MissingFile, BadDcp, UnsafePath, Environment"""
        self._path = os.fspath(path)
        self._checkpoint, self.others = dcp_source.open_tensors(self._path, follow_links=follow_links)

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
        told: dict[str, STORAGE_TYPES] = {}
        for name, place in self._checkpoint.tensors.items():
            size = torch.Size(place.entry.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            told[name] = TensorStorageMetadata(TensorProperties(dtype=self._dtype(name)), size, [chunk])
        return Metadata(told, planner_data={name: (name,) for name in told})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: all was read when the reader was made."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Fill every tensor of a plan. raises Usage for another dtype; SourceChanged, Environment"""
        with self._checkpoint.reader() as reader:
            for item in plan.items:
                target = planner.resolve_tensor(item).detach()
                self._fill(item, target, reader)
                planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return probe.is_directory(os.fspath(checkpoint_id))

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, TORCH_DTYPES[self._checkpoint.tensors[name].entry.dtype].name)
        return found

    def _fill(self, item: ReadItem, target: Tensor, reader: Reader) -> None:
        name = item.storage_index.fqn
        dtype = self._dtype(name)
        if target.dtype != dtype:
            raise Usage(
                f"{name!r} has another dtype than the tensor that it is to be loaded into",
                expected=str(target.dtype),
                found=str(dtype),
                do="make the tensor with the dtype that was saved",
            )
        box = Chunk(tuple(item.storage_offsets), tuple(item.lengths))
        if 0 in box.sizes:
            return
        shape = self._checkpoint.tensors[name].entry.shape
        lie = dcp_source.lie(box, shape, dtype.itemsize)
        data = bytearray(lie.size * lie.num_runs)
        for number in range(lie.num_runs):
            view = memoryview(data)[number * lie.size : (number + 1) * lie.size]
            reader.read_into(name, view, lie.at(number))
        target.copy_(torch.frombuffer(data, dtype=dtype).view(target.shape))
