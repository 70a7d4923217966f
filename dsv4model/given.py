"""What a call of the model is given, and which of it cannot be computed: said before anything is.

Source: what the formulas need.  Knows no layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4ckpt.errors import Usage

from .cache import Cache
from .config import Config
from .layers import dtype_name
from .packing import Packing, pack


class Given(NamedTuple):
    """The arguments of Model.forward, where they are described."""

    input_ids: Tensor | None
    next_ids: Tensor | None
    documents: Tensor | None
    cache: Cache | None
    inputs_embeds: Tensor | None

    def packing(self, config: Config, dtype: torch.dtype) -> Packing:
        """Where the tokens stand. raises Usage"""
        first = self.inputs_embeds if self.input_ids is None else self.input_ids
        if first is None:
            raise Usage("the model needs input_ids", do="hand over token ids [B, S], or inputs_embeds")
        if self.input_ids is None and config.num_hash_layers:
            raise Usage(
                "inputs_embeds alone is not enough: the hash layers pick experts by token id",
                expected=f"input_ids too, for the first {config.num_hash_layers} layers",
                do="hand over input_ids as well",
            )
        shape = first.shape[:2]
        for name, ids in (("input_ids", self.input_ids), ("next_ids", self.next_ids)):
            if ids is not None:
                _require_ids(name, ids, shape, config.vocab)
        if self.inputs_embeds is not None:
            _require_embeddings(self.inputs_embeds, shape, config.hidden, dtype)
        past = 0
        if self.cache is not None:
            past = self.cache.length
            self._require_fitting(self.cache, shape, config)
        if past + shape[1] > config.max_positions:
            raise Usage(
                "the sequence is longer than the model's positions allow",
                expected=f"at most {config.max_positions:,} tokens, which is max_position_embeddings",
                found=f"{past + shape[1]:,} tokens",
                do="cut the sequence",
            )
        return pack(shape, first.device, self.documents, past)

    def _require_fitting(self, cache: Cache, shape: torch.Size, config: Config) -> None:
        """raises Usage for a cache that was made for something else"""
        anew = "start with a new cache"
        if cache.config != config:
            raise Usage("the cache was made for another model", do="make one with Cache(model.config)")
        if self.documents is not None:
            raise Usage("a cache holds one document per row", do="leave documents out, or the cache")
        if cache.batch not in (None, shape[0]):
            raise Usage(
                "the cache holds another number of rows",
                expected=f"{cache.batch} rows",
                found=f"{shape[0]} rows",
                do=anew,
            )
        if self.next_ids is not None and cache.mtp and cache.mtp_length != cache.length:
            raise Usage(
                "the MTP block has not seen all tokens of this cache",
                expected=f"next_ids with all {cache.length:,} tokens before",
                found=f"next_ids with {cache.mtp_length:,} of them",
                do=f"hand over next_ids from the first call on: {anew}",
            )


def _require_ids(name: str, ids: Tensor, shape: torch.Size, vocab: int) -> None:
    """raises Usage"""
    if ids.dim() != 2 or ids.shape != shape or ids.dtype != torch.int64 or not ids.numel():
        raise Usage(
            f"{name} is no batch of token ids",
            expected=f"int64 [B, S] with at least one token{'' if ids.shape == shape else ', as input_ids'}",
            found=f"{dtype_name(ids.dtype)} {list(ids.shape)}",
            do="hand over a tensor of int64 with one row per sequence",
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab:
        raise Usage(
            f"{name} holds a token id that the vocabulary does not have",
            expected=f"0 to {vocab - 1}",
            found=str(least if least < 0 else most),
            do="use the tokenizer that belongs to this checkpoint",
        )


def _require_embeddings(embeddings: Tensor, shape: torch.Size, hidden: int, dtype: torch.dtype) -> None:
    """raises Usage"""
    if embeddings.shape != (*shape, hidden) or embeddings.dtype != dtype or not embeddings.numel():
        rows = ", ".join(str(size) for size in shape) if len(shape) == 2 and all(shape) else "B, S"
        raise Usage(
            "inputs_embeds does not fit",
            expected=f"{dtype_name(dtype)} [{rows}, {hidden}], one embedding per token",
            found=f"{dtype_name(embeddings.dtype)} {list(embeddings.shape)}",
            do="hand over rows of model.model.embed_tokens.weight, or what takes their place",
        )
