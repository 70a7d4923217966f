"""Rotary position embedding: interleaved pairs, on the last dimensions of a vector.  Knows no layers.

Source: paper sec. 2.3; RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071 sec. 3.2) without its attention factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Config, Yarn
from .layers import wide


class Turn(NamedTuple):
    """The angles of some positions, as complex numbers of length 1: [B or 1, S, R/2] for R rotated dimensions."""

    cis: Tensor  # complex64, of a float64 model complex128

    def back(self) -> Turn:
        """The opposite angles."""
        return Turn(self.cis.conj().resolve_conj())

    def at(self, begin: int, end: int) -> Turn:
        """The angles of positions begin..end - 1."""
        return Turn(self.cis[:, begin:end])


def frequencies(config: Config, ratio: int) -> Tensor:
    """Radians per position of each pair, float32 [R/2], for a layer of this compress ratio."""
    if ratio == 0:
        return _plain(config.rope_dim, config.rope_theta)
    inv_freq = _plain(config.rope_dim, config.compress_theta)
    return inv_freq if config.yarn is None else _stretched(inv_freq, config.compress_theta, config.yarn)


def _plain(rope_dim: int, theta: float) -> Tensor:
    pairs = torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu")
    return 1.0 / theta ** (pairs / rope_dim)


def _stretched(inv_freq: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """Slow pairs turn `factor` times slower, fast ones as before, those between by a linear ramp."""
    num_pairs = len(inv_freq)

    def pair_of(turns: float) -> float:
        """The pair that turns so often within the original context."""
        return num_pairs * math.log(yarn.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), 2 * num_pairs - 1)
    pairs = torch.arange(num_pairs, dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / yarn.factor * ramp + inv_freq * (1 - ramp)


def turn(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Turn:
    """The angles of these positions [B or 1, S], in float64 for a float64 model and else in float32."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    angle = positions[..., None].to(exact) * inv_freq.to(positions.device, exact)
    return Turn(torch.polar(torch.ones_like(angle), angle))


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of the last R dimensions by their angles, in float32, then cast back.

    x        [B, S, D], or [B, S, N, D] with the same angle for all heads
    """
    still = x.shape[-1] - 2 * turn.cis.shape[-1]
    pairs = _pairs(wide(x[..., still:])) * _for_heads(turn, x)
    return torch.cat((x[..., :still], torch.view_as_real(pairs).flatten(-2).to(x.dtype)), -1)


def rotate_(x: Tensor, turn: Turn) -> Tensor:
    """The same in place, for float32 or float64 without gradient."""
    _pairs(x[..., x.shape[-1] - 2 * turn.cis.shape[-1] :]).mul_(_for_heads(turn, x))
    return x


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _for_heads(turn: Turn, x: Tensor) -> Tensor:
    return turn.cis if x.dim() == 3 else turn.cis.unsqueeze(2)
