"""What a recipe will train and hold, from headers alone: before anything is loaded.

Knows no data.  Memory counts weights, gradients and optimizer state; activations depend on rows and come on top.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from dsv4ckpt.formats import Storage
from dsv4ckpt.inventory import Layout
from dsv4ckpt.survey import Survey

from . import adapters, learning
from .config import Config
from .loading import model_layout, quantized_modules
from .masters import WIDE, has_master
from .model import Model, dtype_of
from .packed import pack_modules
from .recipe import Recipe, Train


class Group(NamedTuple):
    """Parameters of a class."""

    name: str
    num: int
    num_learning: int


class Outlook(NamedTuple):
    """Counts are parameters, memory is bytes."""

    groups: tuple[Group, ...]
    num_learning: int
    num_muon: int  # of these; AdamW trains the others
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  # state, and masters
    offloaded_bytes: int  # of gradients and optimizer, what is in the CPU's memory wherever the model is

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def outlook(made: Recipe, found: Survey, config: Config) -> Outlook:
    """raises Usage for patterns that fit nothing"""
    packed = made.model.experts == "packed"
    layout = model_layout(found, found.identity.storage if packed else Storage.BF16)
    with torch.device("meta"):
        model = Model(config)
    if packed:
        with torch.device("meta"):
            pack_modules(model, quantized_modules(layout))
    total = _grouped(
        layout, {name: _values(layout, name, tensor) for name, tensor in model.state_dict().items()}
    )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[made.model.dtype]
    if made.train.what is Train.LORA:
        learners = adapters.attach(model, made.lora, torch.Generator())
        chosen = Counter({"adapters": sum(parameter.numel() for parameter in learners.values())})
        total += chosen
    else:
        learners = learning.learners(model, made.train, made.loss)
        learning.require_indexers(model, made.loss)
        chosen = _grouped(layout, {name: parameter.numel() for name, parameter in learners.items()})
    state = model.state_dict()
    wide = {name: _wide(name, tensor, dtype) for name, tensor in state.items()}
    names = learning.split(learners, made.optimizer.kind)
    muon = {name: learners[name] for name in names.muon}
    narrow = {name for name in learners if made.optimizer.masters and has_master(wide[name])}
    bytes_of = {  # of a gradient, or of a moment
        name: parameter.numel() * (WIDE if name in narrow else wide[name]).itemsize
        for name, parameter in learners.items()
    }
    state_of = {
        name: size * ((1 if name in muon else 2) + (name in narrow)) for name, size in bytes_of.items()
    }
    groups = tuple(
        Group(name, total[name], chosen[name]) for name in sorted(total, key=lambda name: -total[name])
    )
    return Outlook(
        groups=groups,
        num_learning=sum(parameter.numel() for parameter in learners.values()),
        num_muon=sum(parameter.numel() for parameter in muon.values()),
        weight_bytes=sum(tensor.numel() * wide[name].itemsize for name, tensor in state.items()),
        gradient_bytes=sum(bytes_of.values()),
        optimizer_bytes=sum(state_of.values()),
        offloaded_bytes=sum(bytes_of[name] + state_of[name] for name in narrow if made.optimizer.offload),
    )


def _wide(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is held in."""
    if ".adapter.lora_" in name or "_adapter.lora_" in name or not tensor.is_floating_point():
        return tensor.dtype
    return dtype_of(name, dtype)


def _grouped(layout: Layout, counts: dict[str, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found[layout.group.get(name, "other")] += count
    return found


def _values(layout: Layout, name: str, tensor: torch.Tensor) -> int:
    """Parameters behind a stored tensor; scales are none."""
    stored = layout.stored.get(name)
    if stored is None or stored.scale_of:
        return 0
    quant = layout.quant(stored.parts[0].logical)
    return tensor.numel() * (quant.codes_per_element if quant else 1)
