"""The named intermediate tensors of a forward pass, in the order of execution.  Knows no files, no transformers.

Owns the names.  They follow the paper, not the modules, so that any implementation of the model can be recorded under
them (trace_transformers.py does it for another one) and two recordings can be laid side by side.

    B batch, S tokens, H hidden, J = K streams, N heads, D head width, T entries, P picks, E routes, V vocabulary
    embed                              [B, S, H]
    layers.L.attn_hc.pre .post .comb   [B, S, J] [B, S, K] [B, S, J, K]
    layers.L.attn.in                   [B, S, H]        collapsed and normed
    layers.L.attn.q .kv                [B, S, N, D] [B, S, D]        rotated
    layers.L.attn.entries              [B, T, D]        pooled, normed, rotated; where the layer compresses
    layers.L.attn.picks                [B, S, P] int64  ascending, then -1 for none; where an indexer chooses
    layers.L.attn.out                  [B, S, H]
    layers.L.ffn_hc.pre .post .comb, layers.L.ffn.in as above
    layers.L.ffn.router_ids            [B, S, E] int64  ascending
    layers.L.ffn.router_weights        [B, S, E]        in that order, scaled
    layers.L.ffn.experts               [B, S, H]        the routed ones
    layers.L.ffn.out                   [B, S, H]        with the shared one
    layers.L.out                       [B, S, K, H]
    final.collapsed final.norm logits  [B, S, H] [B, S, H] [B, S, V]
    mtp.0.in, a block like a layer's, mtp.0.out, mtp.0.collapsed, mtp.0.norm, mtp.0.logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import Config
from .layers import Module, Watcher

Wanted = Callable[[str], bool]  # by canonical name
_PARTS = {"self_attn": "attn", "mlp": "ffn"}  # a module's name where the canonical one is another
_NAMELESS = "model"  # what it shows belongs to the whole model


def everything(name: str) -> bool:  # noqa: ARG001
    """Every name is wanted."""
    return True


@torch.no_grad()
def record(
    model: nn.Module, input_ids: Tensor, next_ids: Tensor | None = None, *, wanted: Wanted = everything
) -> dict[str, Tensor]:
    """Run the model once and keep what its modules show.

    input_ids  int64 [B, S]; next_ids what follows them, for an MTP block; None: as the model takes it
    wanted     which names to keep; the others cost nothing
    returns    canonical name -> a copy on the CPU, in the order of execution and the dtype that it was shown in
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        assert name not in kept, f"{name} was shown twice"
        kept[name] = copy_of(tensor)

    was_training = model.training
    model.eval()
    try:
        with _watched(model, keep, wanted):
            model(input_ids, next_ids)
    finally:
        model.train(was_training)
    return kept


@contextmanager
def _watched(model: nn.Module, keep: Watcher, wanted: Wanted) -> Iterator[None]:
    """Every module tells `keep` in the block, and its earlier watcher afterwards."""
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, Module)]
    before = [module.watcher for _, module in modules]
    try:
        for path, module in modules:
            module.watcher = _renaming(prefix_of(path), keep, wanted)
        yield
    finally:
        for (_, module), watcher in zip(modules, before, strict=True):
            module.watcher = watcher


def _renaming(prefix: str, keep: Watcher, wanted: Wanted) -> Watcher:
    def watch(name: str, tensor: Tensor) -> None:
        if wanted(prefix + name):
            keep(prefix + name, tensor)

    return watch


def prefix_of(path: str) -> str:
    """What stands before the names that the module at `path` shows: model.layers.3.self_attn -> layers.3.attn."""
    parts = [_PARTS.get(part, part) for part in path.split(".") if part not in ("", _NAMELESS)]
    return "".join(f"{part}." for part in parts)


def names(config: Config) -> list[str]:
    """Every canonical name of a model, in the order of execution."""
    blocks = [_block(f"layers.{layer}.", config, layer) for layer in range(config.num_layers)]
    mtp: list[str] = []
    for number in range(config.num_mtp):
        block = _block(f"mtp.{number}.", config, None)
        mtp += [
            f"mtp.{number}.in",
            *block,
            *(f"mtp.{number}.{end}" for end in ("collapsed", "norm", "logits")),
        ]
    return ["embed", *(name for block in blocks for name in block), *_LAST, *mtp]


_LAST = ("final.collapsed", "final.norm", "logits")


def _block(prefix: str, config: Config, layer: int | None) -> list[str]:
    compresses = layer is not None and config.compress_ratios[layer] > 0
    picks = layer is not None and config.overlaps(layer)
    return [
        prefix + name
        for name in (
            *_mixes("attn_hc"),
            *("attn.in", "attn.q", "attn.kv"),
            *(("attn.entries",) if compresses else ()),
            *(("attn.picks",) if picks else ()),
            "attn.out",
            *_mixes("ffn_hc"),
            *("ffn.in", "ffn.router_ids", "ffn.router_weights", "ffn.experts", "ffn.out"),
            "out",
        )
    ]


def _mixes(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{part}" for part in ("pre", "post", "comb"))


# ---- the forms in which every implementation is recorded


def copy_of(tensor: Tensor) -> Tensor:
    """Nothing that the model does later changes it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def sorted_picks(picks: Tensor) -> Tensor:
    """int64 [..., P]: ascending, and what is negative, for none, as -1 at the end."""
    last = torch.iinfo(torch.int64).max
    ascending = picks.long().masked_fill(picks < 0, last).sort(-1).values
    return ascending.masked_fill(ascending == last, -1)


def sorted_routes(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Expert ids int64 [..., E] ascending, and the weights in that order."""
    ascending, order = ids.long().sort(-1)
    return ascending, weights.gather(-1, order)
