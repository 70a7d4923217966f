"""The same weights in transformers: an independent float32 or float64 model to compare with.

Owns how released names, fused experts and the released config become a DeepseekV4ForCausalLM; knows no formula.
Source: the rename tables of dsv4ckpt.names, which the tests of the converter hold against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4ckpt.inventory import PREVIEW
from dsv4ckpt.names import Experts, Namespace

_STORAGE_KEYS = ("quantization_config", "expert_dtype")
_NAMED_RATIOS = (0, 4, 128)  # transformers has layer types for these; another flat ratio stands in for 128


def to_transformers(
    weights: Mapping[str, np.ndarray], document: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[DeepseekV4ForCausalLM, DeepseekV4Config]:
    """(model in evaluation mode, its config).

    weights  by released names; mtp.* is left out, for transformers has no module for it
    dtype    of every parameter and buffer; with float64, transformers still rounds to float32 in its norms, softmaxes
             and hyper-connections
    """
    made = peer_config(document)
    model = DeepseekV4ForCausalLM._from_config(
        made, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    backbone = {name: value for name, value in weights.items() if not name.startswith("mtp.")}
    state = {name: torch.from_numpy(value) for name, value in renamed(backbone).items()}
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval(), made


def peer_config(document: dict[str, Any]) -> DeepseekV4Config:
    """The released config as transformers reads it, without the quantization."""
    fields = {key: value for key, value in document.items() if key not in _STORAGE_KEYS}
    ratios = fields["compress_ratios"]
    if others := sorted(set(ratios) - set(_NAMED_RATIOS)):
        if len(others) > 1 or 128 in ratios:
            raise ValueError(f"transformers knows one flat ratio at a time, not {sorted(set(ratios))}")
        fields |= {"compress_ratios": [128 if ratio in others else ratio for ratio in ratios]}
        fields |= {"compress_rate_hca": others[0]}
    return DeepseekV4Config.from_dict(fields)


def renamed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Released names -> transformers names with fused experts ([E, 2I, H] and [E, H, I]), mtp.* included."""
    wholes: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    per_expert: dict[str, int] = {}
    for name, value in weights.items():
        match = PREVIEW.table.match(name)
        assert match is not None, name
        place = PREVIEW.table.place(match, Namespace.TRANSFORMERS, Experts.FUSED)
        if not place.parts_per_expert:
            wholes[place.name] = value
            continue
        parts.setdefault(place.name, []).append((place.number, value))
        per_expert[place.name] = place.parts_per_expert
    for name, numbered in parts.items():
        rows = np.concatenate([value for _, value in sorted(numbered, key=lambda item: item[0])])
        wholes[name] = rows.reshape(len(numbered) // per_expert[name], -1, rows.shape[-1])
    return wholes
