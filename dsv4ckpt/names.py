"""What tensors are called: rename tables as rows, and the one matcher.  Knows no shapes, files or torch.

Logical names are the released (`deepseek`) names; {leaf} is `weight` or the block scale that goes with it.
Slots: {L} layer, {K} MTP or DSpark stage, {E} expert, {leaf}.  A name matches exactly one row or none; nothing is
matched by a substring, so `hc_attn_scale` is never taken for a block scale.
The `transformers` column is what transformers 5.23 calls its parameters.  What transformers has no module for (mtp.*,
vision, Engram, the V4.1 indexer) keeps its place and gets the same inner names, which are also dsv4model's.
Source: conversion_mapping.py of transformers 5.23 ("deepseek_v4"), the released headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from .formats import Spelling


class Namespace(StrEnum):
    """What tensors are called in a checkpoint."""

    DEEPSEEK = "deepseek"
    TRANSFORMERS = "transformers"


class Experts(StrEnum):
    """How the transformers namespace holds routed experts: one tensor each, or all of a layer in one."""

    SPLIT = "split"
    FUSED = "fused"


class Fused(NamedTuple):
    """One tensor for all experts of a layer: expert e gives `parts` matrices, of which this is number `part`."""

    name: str
    part: int
    parts: int


class Rename(NamedTuple):
    """One row: the released name, the transformers name, the class under which overviews count it."""

    deepseek: str
    transformers: str
    group: str
    fused: Fused | None = None


class Place(NamedTuple):
    """Where a logical tensor stands in a namespace: the whole of `name`, or part `number` along its rows."""

    name: str
    number: int = 0
    parts_per_expert: int = 0  # 0: the whole tensor


# What stands in place of {leaf} under released names. All scales mean "multiply by".
LEAVES = {
    Spelling.RELEASED: {"weight": "weight", "scale": "scale"},
    Spelling.MODELOPT: {
        "weight": "weight",
        "scale": "weight_scale",
        "scale_2": "weight_scale_2",
        "input_scale": "input_scale",
    },
    Spelling.COMPRESSED: {"weight": "weight", "scale": "weight_scale"},
    Spelling.COMPRESSED_PACKED: {"weight": "weight_packed", "scale": "weight_scale"},
}
_TRANSFORMERS_LEAVES = {
    "weight": "weight",
    "scale": "weight_scale_inv",
}  # "multiply by" too, despite the "inv"
_FUSED_LEAVES = {"weight": "", "scale": "_scale_inv"}

_TOP = (
    Rename("embed.weight", "model.embed_tokens.weight", "embedding and head"),
    Rename("head.weight", "lm_head.weight", "embedding and head"),
    Rename("norm.weight", "model.norm.weight", "norms"),
)
_TOP_HC = (
    Rename("hc_head_fn", "model.hc_head.hc_fn", "hyper-connections"),
    Rename("hc_head_base", "model.hc_head.hc_base", "hyper-connections"),
    Rename("hc_head_scale", "model.hc_head.hc_scale", "hyper-connections"),
)
# Inner names of a block, as it stands under layers.{L}. and mtp.{K}.
_BLOCK = (
    Rename("attn_norm.weight", "input_layernorm.weight", "norms"),
    Rename("ffn_norm.weight", "post_attention_layernorm.weight", "norms"),
    Rename("hc_attn_fn", "attn_hc.fn", "hyper-connections"),
    Rename("hc_attn_base", "attn_hc.base", "hyper-connections"),
    Rename("hc_attn_scale", "attn_hc.scale", "hyper-connections"),
    Rename("hc_ffn_fn", "ffn_hc.fn", "hyper-connections"),
    Rename("hc_ffn_base", "ffn_hc.base", "hyper-connections"),
    Rename("hc_ffn_scale", "ffn_hc.scale", "hyper-connections"),
    Rename("attn.attn_sink", "self_attn.sinks", "attention"),
    Rename("attn.wq_a.{leaf}", "self_attn.q_a_proj.{leaf}", "attention"),
    Rename("attn.q_norm.weight", "self_attn.q_a_norm.weight", "norms"),
    Rename("attn.wq_b.{leaf}", "self_attn.q_b_proj.{leaf}", "attention"),
    Rename("attn.wkv.{leaf}", "self_attn.kv_proj.{leaf}", "attention"),
    Rename("attn.kv_norm.weight", "self_attn.kv_norm.weight", "norms"),
    Rename("attn.wo_a.{leaf}", "self_attn.o_a_proj.{leaf}", "attention"),
    Rename("attn.wo_b.{leaf}", "self_attn.o_b_proj.{leaf}", "attention"),
    Rename("ffn.gate.weight", "mlp.gate.weight", "router"),
    Rename("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "router"),
    Rename("ffn.shared_experts.w1.{leaf}", "mlp.shared_experts.gate_proj.{leaf}", "shared experts"),
    Rename("ffn.shared_experts.w2.{leaf}", "mlp.shared_experts.down_proj.{leaf}", "shared experts"),
    Rename("ffn.shared_experts.w3.{leaf}", "mlp.shared_experts.up_proj.{leaf}", "shared experts"),
    # gate_up_proj is [E, 2I, H]: for each expert first w1 (gate), then w3 (up); down_proj is [E, H, I]
    Rename(
        "ffn.experts.{E}.w1.{leaf}",
        "mlp.experts.{E}.gate_proj.{leaf}",
        "routed experts",
        Fused("mlp.experts.gate_up_proj{leaf}", 0, 2),
    ),
    Rename(
        "ffn.experts.{E}.w2.{leaf}",
        "mlp.experts.{E}.down_proj.{leaf}",
        "routed experts",
        Fused("mlp.experts.down_proj{leaf}", 0, 1),
    ),
    Rename(
        "ffn.experts.{E}.w3.{leaf}",
        "mlp.experts.{E}.up_proj.{leaf}",
        "routed experts",
        Fused("mlp.experts.gate_up_proj{leaf}", 1, 2),
    ),
)
_HASH = (Rename("ffn.gate.tid2eid", "mlp.gate.tid2eid", "router"),)
_COMPRESSOR = (
    Rename("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight", "compressor and indexer"),
    Rename("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight", "compressor and indexer"),
    Rename("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight", "compressor and indexer"),
)
# V4: on disk the indexer stands beside the compressor and owns one; in transformers it stands inside it, flattened.
_INDEXER_V4 = tuple(
    Rename(f"attn.{old}", f"self_attn.compressor.{new}", "compressor and indexer")
    for old, new in (
        ("compressor.ape", "position_bias"),
        ("indexer.wq_b.{leaf}", "indexer.q_b_proj.{leaf}"),
        ("indexer.weights_proj.weight", "indexer.scorer.weights_proj.weight"),
        ("indexer.compressor.ape", "indexer.position_bias"),
        ("indexer.compressor.wkv.weight", "indexer.kv_proj.weight"),
        ("indexer.compressor.wgate.weight", "indexer.gate_proj.weight"),
        ("indexer.compressor.norm.weight", "indexer.kv_norm.weight"),
    )
)
# V4.1: layers without a compressor have an indexer too, so it stays beside it.
_INDEXER_V41 = tuple(
    Rename(f"attn.indexer.{old}", f"self_attn.indexer.{new}", "compressor and indexer")
    for old, new in (
        ("wq_b.{leaf}", "q_b_proj.{leaf}"),
        ("weights_proj.weight", "scorer.weights_proj.weight"),
        ("wk.weight", "k_proj.weight"),
        ("k_norm.weight", "k_norm.weight"),
    )
)
_ENGRAM = tuple(
    Rename(name, name, "engram")
    for name in ("engram.embed.{leaf}", "engram.wkv.{leaf}", "engram.q_weight", "engram.k_weight")
)
_VISION_BIAS = (Rename("ffn.gate.bias_vl", "mlp.gate.e_score_correction_bias_vl", "router"),)
_MTP_HEAD = (
    Rename("norm.weight", "norm.weight", "norms"),
    Rename("hc_head_fn", "hc_head.hc_fn", "hyper-connections"),
    Rename("hc_head_base", "hc_head.hc_base", "hyper-connections"),
    Rename("hc_head_scale", "hc_head.hc_scale", "hyper-connections"),
)
_MTP_PREVIEW = tuple(
    Rename(name, name, "draft projections")
    for name in ("e_proj.{leaf}", "h_proj.{leaf}", "enorm.weight", "hnorm.weight")
)
_MTP_BASE = (  # copies of embed and head that only the Base releases carry
    Rename("emb.tok_emb.weight", "emb.tok_emb.weight", "embedding and head"),
    Rename("head.weight", "head.weight", "embedding and head"),
)
_DSPARK = tuple(
    Rename(name, name, "draft projections")
    for name in ("main_proj.{leaf}", "main_norm.weight", "confidence_head.proj.weight")
)
_MARKOV_V4 = tuple(
    Rename(name, name, "draft projections")
    for name in ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
)
_MARKOV_V41 = tuple(
    Rename(name, name, "draft projections")
    for name in ("markov_head.embed.weight", "markov_head.head.weight")
)


def _under(deepseek: str, transformers: str, rows: Iterable[Rename]) -> tuple[Rename, ...]:
    placed = []
    for row in rows:
        fused = row.fused and row.fused._replace(name=transformers + row.fused.name)
        placed.append(Rename(deepseek + row.deepseek, transformers + row.transformers, row.group, fused))
    return tuple(placed)


def _layers(*tables: Iterable[Rename]) -> tuple[Rename, ...]:
    return tuple(row for rows in tables for row in _under("layers.{L}.", "model.layers.{L}.", rows))


def _stages(*tables: Iterable[Rename]) -> tuple[Rename, ...]:
    return tuple(row for rows in tables for row in _under("mtp.{K}.", "mtp.{K}.", rows))


_BACKBONE_V4 = _TOP + _TOP_HC + _layers(_BLOCK, _HASH, _COMPRESSOR, _INDEXER_V4)

PREVIEW = _BACKBONE_V4 + _stages(_BLOCK, _MTP_HEAD, _MTP_PREVIEW)
BASE = _BACKBONE_V4 + _stages(_BLOCK, _MTP_HEAD, _MTP_PREVIEW, _MTP_BASE)
DSPARK = _BACKBONE_V4 + _stages(_BLOCK, _MTP_HEAD, _DSPARK, _MARKOV_V4)
VISION = _BACKBONE_V4 + _layers(_VISION_BIAS) + _stages(_BLOCK, _MTP_HEAD, _DSPARK, _MARKOV_V4, _VISION_BIAS)
V41 = (
    _TOP
    + _layers(_BLOCK, _VISION_BIAS, _COMPRESSOR, _INDEXER_V41, _ENGRAM)
    + _stages(_BLOCK, _VISION_BIAS, _MTP_HEAD[:1], _DSPARK, _MARKOV_V41)
)
OPAQUE_HEADS = ("vision", "aligner", "image_start", "image_end", "image_newline", "image_pad")


class Match(NamedTuple):
    """A name taken apart: its row, its numbers by slot, and the leaf it ends in ('' if the row has none)."""

    row: Rename
    numbers: dict[str, int]
    leaf: str


class Table:
    """A rename table, ready to look names up in both directions."""

    def __init__(self, rows: tuple[Rename, ...]) -> None:
        self.rows = rows
        self._by_deepseek = _compile((row.deepseek, LEAVES[Spelling.RELEASED], row) for row in rows)
        self._by_transformers = _compile((row.transformers, _TRANSFORMERS_LEAVES, row) for row in rows)
        self._by_fused = _compile((row.fused.name, _FUSED_LEAVES, row) for row in rows if row.fused)

    def match(self, name: str) -> Match | None:
        """Take a released name apart; None if no row knows it."""
        return _lookup(self._by_deepseek, name)

    def place(
        self,
        match: Match,
        namespace: Namespace,
        experts: Experts = Experts.FUSED,
        spelling: Spelling = Spelling.RELEASED,
    ) -> Place:
        """Where the tensor stands in a namespace. Spellings of other tools go with released names only."""
        row, numbers, leaf = match
        if namespace is Namespace.DEEPSEEK:
            return Place(_fill(row.deepseek, numbers, LEAVES[spelling].get(leaf, "")))
        if row.fused and experts is Experts.FUSED:
            name = _fill(row.fused.name, numbers, _FUSED_LEAVES[leaf])
            return Place(name, numbers["E"] * row.fused.parts + row.fused.part, row.fused.parts)
        return Place(_fill(row.transformers, numbers, _TRANSFORMERS_LEAVES.get(leaf, "")))

    def from_transformers(self, name: str) -> Match | None:
        """The logical tensor behind a transformers name that holds a whole one."""
        return _lookup(self._by_transformers, name)

    def from_fused(self, name: str, num_experts: int) -> list[Match]:
        """The logical tensors behind a fused name, in the order of its rows; empty if it is no fused name."""
        rows = self._by_fused.get(_template(name)[0], [])
        numbers = _template(name)[1]
        found = []
        for expert in range(num_experts):
            for row, leaf, slots in sorted(rows, key=lambda item: item[0].fused.part if item[0].fused else 0):
                found.append(Match(row, {**dict(zip(slots, numbers, strict=True)), "E": expert}, leaf))
        return found


_Compiled = dict[str, list[tuple[Rename, str, tuple[str, ...]]]]


def _compile(patterns: Iterable[tuple[str, dict[str, str], Rename]]) -> _Compiled:
    """Index rows by their name with every number replaced by '#'; rows with a leaf are entered under each leaf."""
    compiled: _Compiled = {}
    for pattern, leaves, row in patterns:
        slots = tuple(slot for slot in ("L", "K", "E") if "{" + slot + "}" in pattern)
        with_leaf = leaves.items() if "{leaf}" in pattern else [("", "")]
        for leaf, spelled in with_leaf:
            key = pattern.format(L="#", K="#", E="#", leaf=spelled)
            compiled.setdefault(key, []).append((row, leaf, slots))
    return compiled


_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)")  # written one way: no 03


def _template(name: str) -> tuple[str, list[int]]:
    """`layers.3.attn_norm.weight` -> (`layers.#.attn_norm.weight`, [3])."""
    if "#" in name:
        return "", []
    return _NUMBER.sub("#", name), [int(number) for number in _NUMBER.findall(name)]


def _lookup(compiled: _Compiled, name: str) -> Match | None:
    key, numbers = _template(name)
    rows = compiled.get(key)
    if not rows:
        return None
    row, leaf, slots = rows[0]
    return Match(row, dict(zip(slots, numbers, strict=True)), leaf)


def _fill(pattern: str, numbers: dict[str, int], leaf: str) -> str:
    return pattern.format(leaf=leaf, **numbers)


def is_opaque(name: str) -> bool:
    """Whether a tensor is carried as it is: the vision side, whose inner names we do not interpret."""
    return name.partition(".")[0] in OPAQUE_HEADS


def has_split_experts(names: Iterable[str]) -> bool:
    """Whether a checkpoint of the transformers namespace has a tensor for each expert."""
    return any(".experts.0." in name for name in names)


def looks_like_transformers(names: Iterable[str]) -> bool:
    """Whether a checkpoint uses the transformers namespace."""
    return any(name.startswith(("model.", "lm_head.")) for name in names)
