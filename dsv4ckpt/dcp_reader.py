"""torch DCP directories for torch.distributed.checkpoint.load, without running their pickles.  Knows no models.

    dcp.load(state, storage_reader=DirectoryReader(path))

torch's own reader unpickles `.metadata`, which runs whatever stands in it; this one reads it as inert values.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from . import dcp_source
from .dcp_metadata import Chunk
from .dcp_storage import PathReader, done
from .errors import Usage
from .formats import Shape
from .source import Reader
from .torchfile import TORCH_DTYPES


class DirectoryReader(PathReader):
    """Tensors of a DCP directory of any world size; pickled objects in it are not read.

    exact   dtypes must be equal, or with `widens` hold all values of what is stored: nothing is rounded
    memory  above the state dict, what is asked for of one tensor
    """

    def __init__(
        self, path: str | os.PathLike[str], *, follow_links: bool = False, widens: bool = False
    ) -> None:
        """Look at every chunk. raises MissingFile, BadDcp, UnsafePath, Environment"""
        super().__init__(path)
        self._checkpoint, self.others = dcp_source.open_tensors(self._path, follow_links=follow_links)
        self._widens = widens

    def _told(self) -> dict[str, tuple[torch.dtype, Shape]]:
        tensors = self._checkpoint.tensors
        return {name: (self._dtype(name), place.entry.shape) for name, place in tensors.items()}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Fill every tensor of a plan. raises Usage for another dtype; SourceChanged, Environment"""
        with self._checkpoint.reader() as reader:
            for item in plan.items:
                target = planner.resolve_tensor(item).detach()
                self._fill(item, target, reader)
                planner.commit_tensor(item, target)
        return done()

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, TORCH_DTYPES[self._checkpoint.tensors[name].entry.dtype].name)
        return found

    def _fill(self, item: ReadItem, target: Tensor, reader: Reader) -> None:
        name = item.storage_index.fqn
        dtype = self._dtype(name)
        if target.dtype != dtype and not (
            self._widens
            and torch.promote_types(dtype, target.dtype) == target.dtype
            and dtype.is_floating_point
        ):
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
