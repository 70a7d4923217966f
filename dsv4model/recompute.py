"""A block that backward computes once more instead of keeping what it made.  Knows no block.

What it chose on the way forward (experts, entries) is kept and chosen again, whatever the scores are then: tokens whose
gradient went through other experts than their values did would learn from an error.  Taps hear the way forward only.
Source: training facts for activation checkpointing (never re-route, count loads once).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Module

_Made = TypeVar("_Made")


def made_again(block: nn.Module, through: Callable[..., _Made], *inputs: Any) -> _Made:
    """through(*inputs), of which only the inputs and what modules of the block chose are kept for backward.

    returns  what through returns; its gradients are the same to the bit where the same operations give the same bits
    """
    passes = _Passes(block)

    def passed(*inputs: Any) -> _Made:
        with passes:
            return through(*inputs)

    return cast(_Made, checkpoint(passed, *inputs, use_reentrant=False, preserve_rng_state=False))


class _Passes:
    """Around the pass forward, and around each that backward makes after it."""

    def __init__(self, block: nn.Module) -> None:
        self._modules = [module for module in block.modules() if isinstance(module, Module)]
        self._choices: dict[Module, Tensor] = {}
        self._tapped: list[Any] | None = None  # modules whose tap heard the way forward
        self._taps: list[Any] = []  # what is put back

    def __enter__(self) -> None:
        for module in self._modules:
            module.choices = self._choices
        if self._tapped is None:
            self._tapped = [module for module in self._modules if getattr(module, "tap", None) is not None]
            return
        self._taps = [module.tap for module in self._tapped]
        for module in self._tapped:
            module.tap = _deaf  # what is computed for a tap only is computed again, so that passes are alike

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.choices = None
        for module, tap in zip(self._tapped or (), self._taps, strict=False):
            module.tap = tap


def _deaf(*_: Any) -> None:
    """A tap that nobody hears."""
