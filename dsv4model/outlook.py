"""What a recipe will train and hold, from headers alone: before anything is loaded.

Knows no data.  Memory counts weights, gradients and optimizer state; activations depend on rows and come on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from dsv4ckpt.formats import Storage
from dsv4ckpt.inventory import Layout
from dsv4ckpt.ranks import Ranks
from dsv4ckpt.survey import Survey

from . import adapters, eightbit, learning
from .config import Config, is_kept_wide
from .dumps import as_dtype
from .loading import model_layout, quantized_modules
from .masters import WIDE, has_master
from .model import Model, dtype_of
from .packed import pack_modules
from .place import Place, require_sound
from .recipe import Optimizer, Recipe, Train


class Group(NamedTuple):
    """Parameters of a class."""

    name: str
    num: int
    num_learning: int


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int  # state, and masters
    offloaded: int  # of gradients and optimizer, what is in the CPU's memory wherever the model is

    @property
    def together(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Stage(NamedTuple):
    """What each rank of a stage holds; while it computes, a block at a time is whole on top of that."""

    layers: range
    num_ranks: int
    memory: Memory


class Outlook(NamedTuple):
    """Counts are parameters."""

    groups: tuple[Group, ...]
    num_learning: int
    num_muon: int  # of these; AdamW trains the others
    memory: Memory  # of one process that trains alone
    stages: tuple[Stage, ...]  # of the ranks that divide it


def outlook(made: Recipe, found: Survey, config: Config, num_ranks: int = 1) -> Outlook:
    """raises Usage for patterns that fit nothing, and for ranks that cannot be divided as the recipe says"""
    num_stages = made.parallel.stages
    places = [
        Place.of(
            Ranks(num_ranks // num_stages * stage, num_ranks),
            made.parallel,
            config.num_layers,
            config.num_experts,
            config.num_mtp,
        )
        for stage in range(num_stages)
    ]
    require_sound(made, places[0])
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
    dtype = as_dtype(made.model.dtype)
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
    moments_of = {name: size * (1 if name in muon else 2) for name, size in bytes_of.items()}
    if made.optimizer.kind is Optimizer.ADAMW8BIT:
        moments_of = {
            name: 2 * eightbit.moment_bytes(parameter.numel(), WIDE if name in narrow else wide[name])
            for name, parameter in learners.items()
        }
    state_of = {name: size + (bytes_of[name] if name in narrow else 0) for name, size in moments_of.items()}
    weights_of = {name: tensor.numel() * wide[name].itemsize for name, tensor in state.items()}
    offloaded_of = {name: bytes_of[name] + state_of[name] for name in narrow if made.optimizer.offload}

    def memory(divisor: Callable[[str], int]) -> Memory:
        """Of what each tensor is divided by; 0: it is left out."""
        return Memory(
            *(
                sum(-(-size // divisor(name)) for name, size in sizes.items() if divisor(name))
                for sizes in (weights_of, bytes_of, state_of, offloaded_of)
            )
        )

    groups = tuple(
        Group(name, total[name], chosen[name]) for name in sorted(total, key=lambda name: -total[name])
    )
    return Outlook(
        groups=groups,
        num_learning=sum(parameter.numel() for parameter in learners.values()),
        num_muon=sum(parameter.numel() for parameter in muon.values()),
        memory=memory(lambda _: 1),
        stages=tuple(
            Stage(place.layers, place.num_parts, memory(partial(_divisor, place, made.train.what)))
            for place in places
        ),
    )


def _divisor(place: Place, what: Train, name: str) -> int:
    """How many ranks of its stage a tensor is divided over; 0: it is not in this stage."""
    if not place.has(name):
        return 0
    if ".experts." in name and what is Train.LORA:
        return place.num_expert_parts
    is_whole = what is Train.LORA or is_kept_wide(name) or name.endswith("tid2eid")
    return 1 if is_whole else place.num_parts


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
