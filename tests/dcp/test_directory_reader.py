"""DirectoryReader: what torch saved at one world size is loaded at another, and no pickle is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gangs
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dsv4ckpt.dcp_reader import DirectoryReader
from dsv4ckpt.errors import Dsv4Error, MissingFile, Usage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> dict[str, Any]:
    """Whatever trainers have: widths, integers, scalars, odd sizes, nothing."""
    return {
        "model.a": torch.arange(77, dtype=torch.float32).view(11, 7),
        "model.b": torch.arange(60, dtype=torch.bfloat16).view(3, 4, 5),
        "optim.step": torch.tensor(17.0),
        "optim.mask": torch.tensor([True, False, True]),
        "ids": torch.arange(9) * 10**12,
        "wide": torch.linspace(0, 1, 13, dtype=torch.float64),
        "nothing": torch.zeros(0, 3),
    }


def blank() -> dict[str, Any]:
    return {name: torch.full_like(tensor, 1) for name, tensor in state().items()}


def as_shards(tensors: dict[str, Any], dimension: int) -> dict[str, Any]:
    """Divided over the ranks, but for scalars."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    made = {}
    for name, tensor in tensors.items():
        whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
        made[name] = whole.redistribute(
            mesh, [Shard(min(dimension, tensor.dim() - 1)) if tensor.dim() else Replicate()]
        )
    return made


def save(out: Path, dimension: int) -> None:
    dcp.save({**as_shards(state(), dimension), "object": {"lr": 0.1}}, checkpoint_id=out)


def load(path: Path, dimension: int) -> list[str]:
    """Names of what is not as it was."""
    found = as_shards(blank(), dimension)
    dcp.load(found, storage_reader=DirectoryReader(path))
    return [name for name, tensor in state().items() if not torch.equal(found[name].full_tensor(), tensor)]


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("dimension", [0, 1])
def test_any_division_is_loaded_by_any_other(
    saved_by: int, loaded_by: int, dimension: int, tmp_path: Path
) -> None:
    gangs.gang(saved_by, save, tmp_path / "step", dimension)
    assert gangs.gang(loaded_by, load, tmp_path / "step", 1 - dimension) == [[]] * loaded_by


def test_one_process_loads_and_is_told_of_objects(tmp_path: Path) -> None:
    dcp.save({**state(), "object": {"lr": 0.1}}, checkpoint_id=tmp_path / "step", no_dist=True)
    found = blank()
    reader = DirectoryReader(tmp_path / "step")
    with tiny.recorded_events() as events:
        dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in state().items())
    assert reader.others == ("object.lr",)
    assert not [event for event in events if event.kind == "pickle.find_class"]


def test_another_dtype_or_name_is_an_error(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path / "step", no_dist=True)
    found = blank()
    found["model.a"] = found["model.a"].double()
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(found, storage_reader=DirectoryReader(tmp_path / "step"), no_dist=True)
    assert isinstance(caught.value.failures[0][0], Usage)
    with pytest.raises((dcp.CheckpointException, RuntimeError), match=r"model\.c"):
        dcp.load({"model.c": torch.zeros(3)}, storage_reader=DirectoryReader(tmp_path / "step"), no_dist=True)


def test_what_is_no_directory_of_dcp_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        DirectoryReader(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(Dsv4Error):
        DirectoryReader(tmp_path)
