"""A Model filled with an oracle's weights, what it shows, and what the oracle shows in its place.

Owns how released tensors are placed in a model, from this package or from a copy of it.  Knows no formula.
Source: the rename tables of dsv4ckpt.names; dsv4model.trace for the names of what is shown.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import oracle
import torch
from torch import Tensor

from dsv4ckpt import inventory
from dsv4ckpt.names import Experts, Namespace, Place
from dsv4model.config import Config
from dsv4model.rope import frequencies

# Sums of a few hundred products in float64, in another order than the oracle's: measured 2e-14 of values below 20.
EXACT = 1e-12
# Of the largest value of a tensor.  The second pair turns by 95 at position 300, and float32 knows that angle to
# 3.8e-6; every sum on the way is rounded as well.  Measured: 4.5e-6.
CLOSE = 5e-6
CLOSE_LOGITS = 2e-5  # as it is; measured: 1.3e-5


def place_of(released: str) -> Place:
    """Where a released tensor stands in the model."""
    match = inventory.PREVIEW.table.match(released)
    assert match is not None, released
    return inventory.PREVIEW.table.place(match, Namespace.TRANSFORMERS, Experts.FUSED)


def placed(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Released name -> array becomes the model's name -> tensor, with the experts of a layer in one."""
    parts: dict[str, dict[int, Tensor]] = {}
    per_expert: dict[str, int] = {}
    for released, value in tensors.items():
        place = place_of(released)
        parts.setdefault(place.name, {})[place.number] = torch.from_numpy(value)
        per_expert[place.name] = place.parts_per_expert
    return {name: _joined(numbered, per_expert[name]) for name, numbered in parts.items()}


def _joined(numbered: dict[int, Tensor], per_expert: int) -> Tensor:
    if not per_expert:
        return numbered[0]
    rows = torch.stack([numbered[number] for number in range(len(numbered))])
    return rows.unflatten(0, (-1, per_expert)).flatten(1, 2)


def built(
    weights: Mapping[str, np.ndarray],
    document: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    package: str = "dsv4model",
) -> Any:
    """A Model of this package with these weights; every floating tensor in this dtype."""
    config = importlib.import_module(f"{package}.config").Config.read(document)
    model = importlib.import_module(f"{package}.model").Model(config)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in placed(weights).items()
    }
    model.to(dtype).load_state_dict(state, strict=True)
    return model


def shown(model: Any, ids: np.ndarray, next_ids: np.ndarray | None = None) -> oracle.Shown:
    """Name -> what the model shows, in the order of execution."""
    package = type(model).__module__.rpartition(".")[0]
    following = None if next_ids is None else torch.from_numpy(next_ids)
    recorded = importlib.import_module(f"{package}.trace").record(model, torch.from_numpy(ids), following)
    return {name: tensor.numpy() for name, tensor in recorded.items()}


def expected(
    weights: Mapping[str, np.ndarray],
    document: dict[str, Any],
    ids: np.ndarray,
    next_ids: np.ndarray | None = None,
) -> oracle.Shown:
    """What the oracle shows with the frequencies of the release, which are float32 numbers. Gaps are left in.

    Theirs are held to the oracle's own and, bit for bit, to those of transformers in test_reference_traps.py.
    """

    def released(document: dict[str, Any], ratio: int) -> np.ndarray:
        return frequencies(Config.read(document), ratio).double().numpy()

    with mock.patch.object(oracle, "frequencies", released):
        return oracle.forward(weights, document, ids, next_ids)


def first_difference(found: oracle.Shown, truth: oracle.Shown, within: float) -> str | None:
    """The first name, in the oracle's order of execution, of which the values are further apart; None: all agree.

    A tensor that is missing, of another shape or not finite differs; so does a name that the oracle does not have.
    """
    names = [name for name in truth if not name.endswith("_gap")]
    for name in names:
        value = found.get(name)
        if value is None or value.shape != truth[name].shape:
            return name
        if not value.size:
            continue
        if not np.abs(value - truth[name]).max() <= within:  # nor if it is NaN
            return name
    return next((name for name in found if name not in truth), None)


def distances(found: oracle.Shown, truth: oracle.Shown) -> dict[str, float]:
    """Of every tensor the largest difference, in parts of its largest value."""
    assert list(found) == [name for name in truth if not name.endswith("_gap")]
    return {
        name: float(np.abs(value - truth[name]).max() / np.abs(truth[name]).max())
        for name, value in found.items()
        if value.size
    }
