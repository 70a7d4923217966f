"""What the ranks of test_release_writer do.  Runs in processes of its own: see gangs.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reading
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peaks import kilobytes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, zeros

from dsv4ckpt.dcp import ReleaseReader, ReleaseWriter
from dsv4ckpt.names import is_opaque

State = dict[str, Any]


def spread(values: dict[str, Tensor], how: str) -> State:
    """A state dict of these values, divided as trainers do it."""
    size = dist.get_world_size()
    if how == "experts":  # over one axis of a 2 x 2 mesh, their rows over the other; all else over the second
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))
        return {
            name: distribute_tensor(
                tensor, mesh, [Shard(0), Shard(1)] if tensor.dim() == 3 else [Replicate(), Shard(0)]
            )
            for name, tensor in values.items()
        }
    mesh = init_device_mesh("cpu", (size,))
    if how == "replicated":
        return {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in values.items()}
    if how == "plain":
        return dict(values)
    if how == "alternating":  # every rank has other tensors, as pipeline stages do
        mine = range(dist.get_rank(), len(values), size)
        return {name: values[name] for name in (sorted(values)[number] for number in mine)}
    dimension = int(how)
    return {
        name: distribute_tensor(tensor, mesh, [Shard(min(dimension, tensor.dim() - 1))])
        for name, tensor in values.items()
    }


def save(
    out: Path,
    like: Path,
    values: Path,
    how: str,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    **options: Any,
) -> Any:
    """Save the tensors of a checkpoint of values, as `edit` changes them. Returns the summary."""
    found = reading.values_of(values)
    if edit:
        edit(found)
    writer = ReleaseWriter(out, like=like, **options)
    dcp.save(spread(found, how), storage_writer=writer)
    return writer.summary


def save_keys(out: Path, like: Path, values: Path, names: str) -> Any:
    """The same, rows divided, with keys in another spelling: as ReleaseReader gives them."""
    found = read_as(values, names)
    writer = ReleaseWriter(out, like=like, to="bf16")
    dcp.save(spread(found, "0"), storage_writer=writer)
    return writer.summary


def read_as(directory: Path, names: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one for each expert."""
    reader = ReleaseReader(directory, names=names, experts="split")  # type: ignore[arg-type]
    told = reader.read_metadata().state_dict_metadata
    state: State = {
        name: torch.empty(item.size, dtype=item.properties.dtype)  # type: ignore[union-attr]
        for name, item in told.items()
    }
    dcp.load(state, storage_reader=reader)
    return state


def save_model(out: Path, like: Path) -> Any:
    """A real model under FSDP2, after a step that changed its head. Returns the summary."""
    from torch.distributed.fsdp import fully_shard

    import dsv4model

    model = dsv4model.load(like, dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    writer = ReleaseWriter(out, like=like)
    dcp.save(model.state_dict(), storage_writer=writer)
    return writer.summary


def save_meanwhile(out: Path, like: Path, values: Path) -> list[str]:
    """In a thread, from copies, while this one changes the values."""
    group = dist.new_group(backend="gloo")
    state = spread(reading.values_of(values), "0")
    writer = ReleaseWriter(out, like=like, to="bf16", names="transformers", process_group=group)
    future = dcp.async_save(state, storage_writer=writer, process_group=group)
    for tensor in state.values():
        tensor.zero_()
    future.result()
    assert writer.summary is not None
    return [receipt.name for receipt in writer.summary.files]


def save_twice(out: Path, directory: Path, like: Path, values: Path) -> None:
    """As a release, and as a directory of torch's own."""
    found = reading.values_of(values)
    trained(found)
    state = spread(found, "0")
    dcp.save(state, storage_writer=ReleaseWriter(out, like=like))
    dcp.save(state, checkpoint_id=directory)


def save_and_measure(out: Path, like: Path, warm: Path) -> tuple[int, int]:
    """(bytes that this rank holds of the state dict, the most that it held above what was there before the save)"""

    def loaded(directory: Path) -> State:
        reader = ReleaseReader(directory)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        state: State = {
            name: zeros(item.size, dtype=item.properties.dtype, device_mesh=mesh, placements=[Shard(0)])  # type: ignore[union-attr]
            for name, item in reader.read_metadata().state_dict_metadata.items()
        }
        dcp.load(state, storage_reader=reader)
        return state

    first = out.with_name("warm")  # what is imported and made once, such as tables
    dcp.save(loaded(warm), storage_writer=ReleaseWriter(first, like=warm))
    state = loaded(like)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    dcp.save(state, storage_writer=ReleaseWriter(out, like=like))
    held = sum(tensor.to_local().nbytes for tensor in state.values())
    return held, (kilobytes("VmHWM") - before) * 1024


# ---- what is done to values


def trained(values: dict[str, Tensor]) -> None:
    """The head doubled, an expert's gate and a norm moved; some of it in wider dtypes, between values of BF16."""
    values["lm_head.weight"] = values["lm_head.weight"].double() * 2 + 2.0**-40
    gate = values["model.layers.0.mlp.experts.gate_up_proj"].float()
    gate[2, 5:40] *= 1.5
    values["model.layers.0.mlp.experts.gate_up_proj"] = gate
    values["model.norm.weight"] = values["model.norm.weight"].float() * (1 + 2.0**-8 + 2.0**-20)
    values["model.hc_head.hc_base"] = values["model.hc_head.hc_base"] + 1


def without_drafts_and_vision(values: dict[str, Tensor]) -> None:
    for name in [name for name in values if name.startswith("mtp.") or is_opaque(name)]:
        del values[name]


def without_copies(values: dict[str, Tensor]) -> None:
    """Embedding and head doubled, and not their copies, which models do not have."""
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        values[name] = values[name] * 2
    del values["mtp.0.emb.tok_emb.weight"], values["mtp.0.head.weight"]


def without_one(values: dict[str, Tensor]) -> None:
    del values["model.layers.1.mlp.experts.down_proj"]


def without_half_a_draft(values: dict[str, Tensor]) -> None:
    del values["mtp.0.enorm.weight"]


def with_another_shape(values: dict[str, Tensor]) -> None:
    values["model.norm.weight"] = values["model.norm.weight"][:-1].clone()


def with_a_stranger(values: dict[str, Tensor]) -> None:
    values["model.adapter"] = torch.zeros(8)


def with_optimizer(values: dict[str, Any]) -> None:
    values["optim"] = {"step": 3, "exp_avg": {"lm_head.weight": torch.zeros(8)}}


def with_codes(values: dict[str, Tensor]) -> None:
    values["lm_head.weight"] = torch.zeros(values["lm_head.weight"].shape, dtype=torch.uint8)


def rounded(values: dict[str, Tensor]) -> None:
    values["model.hc_head.hc_base"] = values["model.hc_head.hc_base"].bfloat16()


def in_half(values: dict[str, Tensor]) -> None:
    """Whatever the release has in BF16."""
    for name, tensor in values.items():
        if tensor.dtype == torch.bfloat16 and bool((tensor.half().bfloat16() == tensor).all()):
            values[name] = tensor.half()


def with_nan(values: dict[str, Tensor]) -> None:
    values["model.layers.1.mlp.experts.down_proj"][3, 7, 11] = torch.nan


def hardly_changed(values: dict[str, Tensor]) -> None:
    values["model.layers.1.mlp.experts.gate_up_proj"].mul_(1 + 2.0**-6)


# ---- what goes wrong


def save_with_different_options(out: Path, like: Path, values: Path) -> Any:
    return save(out, like, values, "0", to=("bf16", "native")[dist.get_rank()])


def save_with_different_sources(out: Path, like: Path, source: Path) -> Any:
    return save(out, like, like, "0", source=source if dist.get_rank() else None)


def save_in_another_group(out: Path, like: Path, values: Path) -> Any:
    group = dist.new_group([0, 1])
    writer = ReleaseWriter(out, like=like, process_group=group)
    dcp.save(spread(reading.values_of(values), "0"), storage_writer=writer)


def save_until_step(
    out: Path, like: Path, values: Path, failing: int, steps: int, happens: Callable[[], None]
) -> Any:
    """On one rank, something happens instead of a step."""
    from dsv4ckpt.work import Worker

    plain, taken = Worker.carry_out, []

    def carry_out(self: Worker, *arguments: Any) -> None:
        taken.append(1)
        if dist.get_rank() == failing and len(taken) > steps:
            happens()
        plain(self, *arguments)

    Worker.carry_out = carry_out  # type: ignore
    return save(out, like, values, "0", max_shard_bytes=10**6, to="bf16")


def run_out_of_space() -> None:
    from dsv4ckpt.errors import NoSpace

    raise NoSpace("the output cannot grow", do="make room")


def stumble() -> None:
    raise KeyError("a bug")


def die() -> None:
    os._exit(1)
