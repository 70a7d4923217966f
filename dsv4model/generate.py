"""Text token by token, for a look at what a checkpoint says: one sequence, not made for serving.

Owns decoding: the prompt in pieces and then one token at a time on a cache, the choice of the next token, and how the
bytes of tokens become whole characters. Knows no files, no tokenizer and no roles.
Source: nucleus sampling is arXiv 1904.09751 sec. 3.1.

    V tokens that may be chosen, K kept ones of them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from dsv4ckpt.errors import Environment, NotFinite, Usage

from .cache import Cache
from .config import Config
from .model import Model

PIECE = 256  # tokens of a prompt that go through the model at once: so many rows of logits there are
_MANY = 16  # waiting tokens from which on a TextStream looks for some that it can let go


def generate(
    model: Model,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    num_tokens: int | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Token ids that follow the prompt, one at a time, up to and including the first of stop_ids.

    temperature  0: the likeliest token, of equal ones that of the lowest id. Above: drawn from softmax(logits / it)
    top_p        draw only among the likeliest tokens that together have at least this much, 1: among all
    generator    on the CPU, asked for one number per token; equal states and equal logits give equal tokens
    num_tokens   ids from this on are never chosen: rows of the vocabulary without a token. None: all are chosen from
    memory       logits of 256 tokens, and the cache
    raises       Usage at once; NotFinite when a token is asked for
    """
    require_possible(model.config, prompt_ids, max_new_tokens, temperature, top_p)
    if temperature and generator is None:
        raise Usage("drawing tokens needs a generator", do="hand over torch.Generator().manual_seed(0)")
    if num_tokens is not None and num_tokens < 1:
        raise Usage(
            "no token may be chosen",
            expected="num_tokens of at least 1",
            found=str(num_tokens),
            do="leave it out",
        )

    def choose(logits_V: Tensor) -> int:
        return next_token(logits_V[:num_tokens], temperature, top_p, generator)

    return _decoded(model, prompt_ids, max_new_tokens, choose, stop_ids)


def require_possible(
    config: Config, prompt_ids: Sequence[int], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """What can be said before there is a model. raises Usage"""
    if not prompt_ids:
        raise Usage("the prompt is empty", expected="at least one token", do="begin with the begin token")
    stranger = next((token for token in prompt_ids if not 0 <= token < config.vocab), None)
    if stranger is not None:
        raise Usage(
            "a token id of the prompt is not in the vocabulary of this checkpoint",
            expected=f"0 to {config.vocab - 1:,}",
            found=str(stranger),
            do="use the tokenizer that belongs to this checkpoint",
        )
    if max_new_tokens < 1:
        raise Usage(
            "no tokens are asked for", expected="1 or more", found=str(max_new_tokens), do="ask for some"
        )
    if len(prompt_ids) + max_new_tokens > config.max_positions:
        raise Usage(
            "prompt and new tokens are more than the model's positions",
            expected=f"at most {config.max_positions:,} together, which is max_position_embeddings",
            found=f"{len(prompt_ids):,} in the prompt, {max_new_tokens:,} new ones",
            do="cut the prompt, or ask for fewer tokens",
        )
    if not 0 <= temperature < math.inf:
        raise Usage(
            "this is no temperature",
            expected="0 for the likeliest token, or a positive number",
            found=str(temperature),
            do="leave it at 0, or take 1",
        )
    if not 0 < top_p <= 1:
        raise Usage(
            "this is no top_p", expected="above 0, and at most 1", found=str(top_p), do="leave it at 1"
        )


def _decoded(
    model: Model,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], int],
    stop_ids: Collection[int],
) -> Iterator[int]:
    cache, fresh = Cache(model.config), prompt_ids
    for _ in range(max_new_tokens):
        token = choose(_last_logits(model, fresh, cache))
        yield token
        if token in stop_ids:
            return
        fresh = [token]


@torch.no_grad()  # not inference_mode: what the model may keep of this must not spoil a training step after it
def _last_logits(model: Model, ids: Sequence[int], cache: Cache) -> Tensor:
    """float64 [V] of the token after these, which go into the cache; on the CPU, so that draws agree everywhere."""
    device = model.lm_head.weight.device
    for begin in range(0, len(ids), PIECE):
        piece = torch.tensor([ids[begin : begin + PIECE]], dtype=torch.int64, device=device)
        last_V = model(piece, cache=cache).logits[0, -1].cpu()
    return last_V.double()


# ---- the choice


def next_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """The id that is chosen, as `generate` says. logits_V: float64 on the CPU. raises NotFinite"""
    if not logits_V.isfinite().all():
        raise NotFinite(
            "the model's logits are not finite",
            found=f"NaN or infinity for {int((~logits_V.isfinite()).sum()):,} of {len(logits_V):,} tokens",
            do="dsv4 verify the checkpoint; if it is whole, compute in float32",
        )
    if temperature == 0:
        return int(logits_V.argmax())
    # less the largest first: a low temperature then makes zeros, and no infinities
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / temperature, 0)
    kept_K, ids_K = nucleus(probabilities_V, top_p)
    below_K = kept_K.cumsum(0)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * below_K[-1]
    return int(ids_K[torch.searchsorted(below_K, drawn, right=True)])


def nucleus(probabilities_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest tokens that together have at least top_p: their probabilities as they were, and their ids.

    In descending order, equal ones by id. 1 keeps all, also those that rounding lets begin above it.
    """
    sorted_V, ids_V = probabilities_V.sort(descending=True, stable=True)
    if top_p == 1:
        return sorted_V, ids_V
    count = 1 + int((sorted_V.cumsum(0)[:-1] < top_p).sum())
    return sorted_V[:count], ids_V[:count]


# ---- characters


class TextStream:
    """Tokens one by one -> text as soon as it is certain: a character waits until its last byte has come."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """decode: the text of some tokens, which is that of their bytes one after the other; U+FFFD for no UTF-8"""
        self._decode = decode
        self._waiting: list[int] = []
        self._told = 0  # characters of their text that have been given out

    def push(self, token: int) -> str:
        """What has become certain with this token; all that is given out is the text of all tokens."""
        self._waiting.append(token)
        text = self._decode(self._waiting)
        certain = text.removesuffix("\ufffd")  # this may be the beginning of a character
        new, self._told = certain[self._told :], len(certain)
        if certain == text:
            self._waiting, self._told = [], 0
        elif len(self._waiting) >= _MANY:
            self._let_go(text)
        return new

    def close(self) -> str:
        """The rest: nothing, or one U+FFFD for a character that was cut off."""
        rest = self._decode(self._waiting)[self._told :]
        self._waiting, self._told = [], 0
        return rest

    def _let_go(self, text: str) -> None:
        """Keep waiting tokens few, also where no text comes: a cut between characters shows in that nothing changes."""
        front, rest = self._waiting[:-4], self._waiting[-4:]
        text_front = self._decode(front)
        if text_front + self._decode(rest) == text:
            self._waiting, self._told = rest, self._told - len(text_front)


# ---- where, and from what


def device_of(name: str) -> torch.device:
    """cpu or cuda. raises Environment if that is not here"""
    if name != "cpu" and not torch.cuda.is_available():
        raise Environment(
            "torch finds no CUDA device here", found=f"device {name!r}", do="use the device 'cpu'"
        )
    return torch.device(name)


def seeded(seed: int) -> torch.Generator:
    """A generator for `generate`."""
    return torch.Generator().manual_seed(seed)
