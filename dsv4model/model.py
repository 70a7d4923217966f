"""The model: embedding, residual streams through blocks of attention and experts, head, and the MTP block.

Read it from the bottom up, or the paper from the top down.  Knows no files, no training.
Source: paper sec. 2; model.py of the reference.

    B batch, S tokens, V vocabulary, H hidden, J streams
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import recompute
from .attention import Attention, Setting
from .cache import Cache, LayerCache
from .config import Config, is_kept_wide
from .given import Given
from .hyper import HyperConnection, HyperHead, collapse, spread
from .layers import Linear, Module, RMSNorm, WideLinear
from .moe import MoE
from .packing import shifted_left
from .simulate import Simulation


class Output(NamedTuple):
    """What a forward pass gives."""

    # [B, S, V], float32 (float64 in a float64 model): of the next token, and of the one after it.
    # None: there is no MTP block, or it was given no next tokens.
    logits: Tensor
    mtp_logits: Tensor | None


class Block(Module):
    """One layer: attention, then experts, each between two mixings of the streams.

    recomputes  backward computes it once more, and only its inputs are kept until then (recompute.py)
    """

    recomputes = False

    def __init__(
        self, config: Config, *, ratio: int, layer: int, hashes: bool, simulation: Simulation
    ) -> None:
        super().__init__()
        self.attn_hc = HyperConnection(config)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config, ratio, layer, simulation)
        self.ffn_hc = HyperConnection(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MoE(config, simulation, hashes=hashes)

    def forward(
        self, streams_BSJH: Tensor, token_ids: Tensor | None, setting: Setting, cache: LayerCache | None
    ) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return recompute.made_again(self, self._through, streams_BSJH, token_ids, setting, cache)
        return self._through(streams_BSJH, token_ids, setting, cache)

    def _through(
        self, streams_BSJH: Tensor, token_ids: Tensor | None, setting: Setting, cache: LayerCache | None
    ) -> Tensor:
        x, *mixes = self._read(self.attn_hc, self.input_layernorm, streams_BSJH)
        out = self.self_attn(x, setting, cache)
        between = spread(out, streams_BSJH, *mixes)
        with self.remaking(between, lambda: spread(out, streams_BSJH, *mixes)):
            x, *more = self._read(self.ffn_hc, self.post_attention_layernorm, between)
            streams = spread(self.mlp(x, token_ids), between, *more)
        self.show("out", streams)
        return streams

    def _read(
        self, hc: HyperConnection, norm: RMSNorm, streams_BSJH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A sublayer's input, and how its output goes back to the streams."""
        pre, post, comb = hc(streams_BSJH)
        collapsed = collapse(streams_BSJH, pre)
        return norm(collapsed), post, comb


class MtpBlock(Block):
    """Predicts one token further, from the last streams and the next token's embedding (paper sec. 2.4)."""

    def __init__(self, config: Config, simulation: Simulation) -> None:
        super().__init__(config, ratio=0, layer=config.num_layers, hashes=False, simulation=simulation)
        self.enorm = RMSNorm(config.hidden, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden, config.norm_eps)
        self.e_proj = Linear(config.hidden, config.hidden, simulation.prepare)
        self.h_proj = Linear(config.hidden, config.hidden, simulation.prepare)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden, config.norm_eps)

    def hidden(
        self, streams_BSJH: Tensor, next_BSH: Tensor, setting: Setting, cache: LayerCache | None
    ) -> Tensor:
        """What the head takes, [B, S, H]."""
        ahead = self.e_proj(self.enorm(next_BSH)).unsqueeze(2)  # the same for every stream
        streams = ahead + self.h_proj(self.hnorm(streams_BSJH))
        self.show("in", streams)
        collapsed = self.hc_head(self(streams, None, setting, cache))
        self.show("collapsed", collapsed)
        normed: Tensor = self.norm(collapsed)
        self.show("norm", normed)
        return normed


class Backbone(Module):
    """Embedding, layers, final collapse and norm."""

    def __init__(self, config: Config, simulation: Simulation) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(
            Block(
                config, ratio=ratio, layer=layer, hashes=layer < config.num_hash_layers, simulation=simulation
            )
            for layer, ratio in enumerate(config.compress_ratios)
        )
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.num_streams = config.hc_mult

    def forward(
        self,
        streams_BSJH: Tensor,
        token_ids: Tensor | None,
        settings: dict[int, Setting],
        caches: Iterable[LayerCache | None],
        ratios: tuple[int, ...],
    ) -> Tensor:
        """Streams [B, S, J, H] through the layers that are here: others are another rank's (pipeline.py)."""
        for block, ratio, cache in zip(self.layers, ratios, caches, strict=True):
            if isinstance(block, Block):
                streams_BSJH = block(streams_BSJH, token_ids, settings[ratio], cache)
        return streams_BSJH

    def spread(self, embedded_BSH: Tensor) -> Tensor:
        """The first streams [B, S, J, H]."""
        self.show("embed", embedded_BSH)
        return embedded_BSH.unsqueeze(2).expand(-1, -1, self.num_streams, -1)

    def collapsed(self, streams_BSJH: Tensor) -> Tensor:
        """What the head takes of the last streams, [B, S, H]."""
        collapsed = self.hc_head(streams_BSJH)
        self.show("final.collapsed", collapsed)
        normed: Tensor = self.norm(collapsed)
        self.show("final.norm", normed)
        return normed


class Embedding(Module):
    """Rows of a table [V, H]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class Model(Module):
    """DeepSeek-V4. Parameters are called as transformers calls them; `load` fills them."""

    # What `load` says: released names of what the checkpoint has beside this model, and what else is worth knowing.
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, config: Config, simulation: Simulation | None = None) -> None:
        super().__init__()
        simulation = simulation or Simulation()
        self.config = config
        self.model = Backbone(config, simulation)
        self.mtp = nn.ModuleList(MtpBlock(config, simulation) for _ in range(config.num_mtp))
        self.lm_head = WideLinear(config.hidden, config.vocab)

    def forward(
        self,
        input_ids: Tensor | None = None,
        next_ids: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Output:
        """Logits for every position.

        input_ids      int64 [B, S]
        next_ids       int64 [B, S] the tokens that follow them, for the MTP block; None: input_ids shifted left, with
                       the end token after the last of a document. With a cache, mtp_logits need them
        documents      [B, S] number of each token's document: documents in one row do not see each other. Padding is a
                       document of its own
        cache          of the tokens before, which grows by these; one document per row
        inputs_embeds  [B, S, H] in place of embedded input_ids; hash layers need the ids as well
        raises         Usage for what cannot be computed, before anything is
        """
        given = Given(input_ids, next_ids, documents, cache, inputs_embeds)
        passed = self._through(given)
        hidden = self.model.collapsed(passed.streams)
        logits = self.lm_head(hidden)
        self.show("logits", logits)
        mtp_hidden, mtp_logits = self._ahead(given, passed), None
        if mtp_hidden is not None:
            mtp_logits = self.lm_head(mtp_hidden)
            self.show("mtp.0.logits", mtp_logits)
        if cache is not None:
            cache.grow(hidden.shape[:2], with_mtp=mtp_logits is not None)
        return Output(logits, mtp_logits)

    def hidden(
        self, input_ids: Tensor, next_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the head takes for both logits, [B, S, H]: for losses that never have all logits. Else as forward."""
        given = Given(input_ids, next_ids, documents, None, None)
        passed = self._through(given)
        return self.model.collapsed(passed.streams), self._ahead(given, passed)

    def stage(
        self, input_ids: Tensor, next_ids: Tensor, documents: Tensor, streams: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """As `hidden`, of a model that has some of the layers only: one stage of a pipeline.

        streams  [B, S, J, H] of the stage before; None: this is the first
        returns  streams for the next stage; of the last one, what `hidden` gives
        """
        given = Given(input_ids, next_ids, documents, None, None)
        passed = self._through(given, streams)
        if not isinstance(self.model.layers[-1], Block):
            return passed.streams
        return self.model.collapsed(passed.streams), self._ahead(given, passed)

    def _through(self, given: Given, streams: Tensor | None = None) -> _Passed:
        """Embedding, unless there are streams already, and layers."""
        dtype = self.model.embed_tokens.weight.dtype if streams is None else streams.dtype
        packing = given.packing(self.config, dtype)
        if streams is None:
            embeds = given.inputs_embeds
            streams = self.model.spread(
                self.model.embed_tokens(given.input_ids) if embeds is None else embeds
            )
        ratios = self.config.compress_ratios
        settings = {r: Setting.of(self.config, r, packing, streams.dtype) for r in {0, *ratios}}
        caches: Iterable[LayerCache | None] = given.cache.layers if given.cache else [None] * len(ratios)
        return _Passed(self.model(streams, given.input_ids, settings, caches, ratios), settings[0])

    def _ahead(self, given: Given, passed: _Passed) -> Tensor | None:
        """What the head takes from the MTP block. None: there is none, or it was given no next tokens."""
        next_ids, cache = given.next_ids, given.cache
        if self.mtp and next_ids is None and given.input_ids is not None and cache is None:
            next_ids = shifted_left(given.input_ids, given.documents, self.config.eos)
        if not self.mtp or next_ids is None:
            return None
        block = self.mtp[0]
        assert isinstance(block, MtpBlock)
        embedded = self.model.embed_tokens(next_ids)
        return block.hidden(passed.streams, embedded, passed.setting, cache.mtp[0] if cache else None)


class _Passed(NamedTuple):
    """What came out of the layers."""

    streams: Tensor  # [B, S, J, H]
    setting: Setting  # of a layer without compression


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a floating parameter or buffer is held in, in a model of this dtype."""
    return torch.float32 if is_kept_wide(name) and dtype != torch.float64 else dtype


@torch.no_grad()
def initialize(model: Model, generator: torch.Generator) -> None:
    """Weights to train from scratch with: normal with the config's deviation, norms 1, biases and sinks 0.

    Streams start out equal and are read with equal weight; hash tables spread the token ids over the experts evenly.

    generator  on the model's device
    """
    for name, parameter in model.named_parameters():
        leaf, owner = name.split(".")[-1], name.split(".")[-2]
        if owner.endswith("norm"):
            parameter.fill_(1)
        elif leaf in ("sinks", "position_bias", "base", "hc_base"):
            parameter.zero_()
        elif leaf in ("scale", "hc_scale"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, model.config.init_std, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            shape = len(buffer), model.config.num_experts
            order = torch.rand(shape, generator=generator, device=buffer.device).argsort(1)
            buffer.copy_(order[:, : buffer.shape[1]])
        else:
            buffer.zero_()
