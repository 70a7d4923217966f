"""A tiny model of ours with random weights, filled by its own parameter names.  Owns scales; knows no formula.

For tests that hold the model against itself: packed against separate, split against whole, one token changed.
Source: the scales of tiny_model.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from tiny_model import tiny_document
from torch import Tensor

from dsv4model.config import Config
from dsv4model.model import Block, Model, dtype_of
from dsv4model.simulate import Simulation

VOCAB = 128
WINDOWS_ONLY = {"compress_ratios": [0, 0, 0, 0, 0]}
# Every token goes to every expert: no sum depends on how many tokens an expert has, so what is the same is bitwise so.
ALL_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 2}


def random_model(
    dtype: torch.dtype = torch.float64, seed: int = 0, simulation: Simulation | None = None, **changes: Any
) -> Model:
    """The model of tiny_document(**changes), every tensor from a generator of its own."""
    model = Model(Config.read(tiny_document(**changes)), simulation)
    for name, parameter in model.named_parameters():
        parameter.data = _values(name, parameter.shape, seed).to(dtype_of(name, dtype))
    for name, buffer in model.named_buffers():
        random = _generator(name, seed)
        if buffer.dtype == torch.int64:
            order = torch.rand(len(buffer), model.config.num_experts, generator=random).argsort(1)
            buffer.copy_(order[:, : buffer.shape[1]])
        else:
            buffer.data = 0.3 * torch.randn(buffer.shape, generator=random).to(dtype_of(name, dtype))
    return model


def recomputing(model: Model, flag: bool = True) -> Model:
    """The same model, whose blocks backward computes again."""
    for block in model.modules():
        if isinstance(block, Block):
            block.recomputes = flag
    return model


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _values(name: str, shape: torch.Size, seed: int) -> Tensor:
    normal = torch.randn(shape, generator=_generator(name, seed))
    owner, leaf = name.split(".")[-2:]
    if owner.endswith("norm"):
        return 1 + 0.2 * normal
    if leaf in ("sinks", "scale", "hc_scale"):
        return 0.5 + torch.rand(shape, generator=_generator(name, seed))
    if leaf in ("base", "hc_base"):
        return 0.5 * normal
    if leaf == "position_bias" or owner == "embed_tokens":
        return normal
    gain = 1.5 if owner in ("gate", "gate_proj", "up_proj", "lm_head") or leaf == "gate_up_proj" else 1.0
    return gain / shape[-1] ** 0.5 * normal


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest expected value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
