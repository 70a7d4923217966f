"""config.json -> every tensor that must exist, and how a storage format and a namespace lay them out.

Owns the shape rules as rows; knows no files and no torch.
Source: checkpoint_format facts (section 2 of the released inventories); the published totals hold it to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import names
from .config import V41, ModelConfig
from .formats import MATRICES, QUANTS, Kind, Quant, Shape, Storage, codes_shape, scale_shape
from .names import Experts, Match, Namespace, Place, Table


class Logical(NamedTuple):
    """A tensor of the model, independent of how it is stored: released name, kind, shape of its values."""

    name: str
    kind: Kind
    shape: Shape


OVERLAP_RATIO = (
    4  # compressors of this ratio pool the window before as well, and an indexer picks; all others do not
)


# ---- the rows.  Letters: H hidden, N*D query width, D head, Q and R low ranks, G groups, E experts, K experts per
# token, I expert width, V vocabulary, S streams, M = (2 + S) * S mixing terms, r ratio, C compressor channels,
# T indexer query width, A indexer heads, B indexer head, Z indexer compressor channels, X tapped width, W Markov rank

Rows = tuple[tuple[str, Kind, tuple[str, ...]], ...]
_BF16, _F32, _DENSE, _EXPERT = (
    Kind.BF16,
    Kind.F32,
    Kind.DENSE,
    Kind.EXPERT,
)  # the rows name EXPERT, stages DRAFT_EXPERT

TOP: Rows = (
    ("embed.weight", _BF16, ("V", "H")),
    ("head.weight", _BF16, ("V", "H")),
    ("norm.weight", _BF16, ("H",)),
)
HC_HEAD: Rows = (
    ("hc_head_fn", _F32, ("S", "SH")),
    ("hc_head_base", _F32, ("S",)),
    ("hc_head_scale", _F32, ("1",)),
)
BLOCK: Rows = (
    ("attn_norm.weight", _BF16, ("H",)),
    ("ffn_norm.weight", _BF16, ("H",)),
    ("hc_attn_fn", _F32, ("M", "SH")),
    ("hc_attn_base", _F32, ("M",)),
    ("hc_attn_scale", _F32, ("3",)),
    ("hc_ffn_fn", _F32, ("M", "SH")),
    ("hc_ffn_base", _F32, ("M",)),
    ("hc_ffn_scale", _F32, ("3",)),
    ("attn.attn_sink", _F32, ("N",)),
    ("attn.wq_a.weight", _DENSE, ("Q", "H")),
    ("attn.q_norm.weight", _BF16, ("Q",)),
    ("attn.wq_b.weight", _DENSE, ("ND", "Q")),
    ("attn.wkv.weight", _DENSE, ("D", "H")),
    ("attn.kv_norm.weight", _BF16, ("D",)),
    ("attn.wo_a.weight", _DENSE, ("GR", "ND/G")),
    ("attn.wo_b.weight", _DENSE, ("H", "GR")),
    ("ffn.gate.weight", _BF16, ("E", "H")),
    ("ffn.shared_experts.w1.weight", _DENSE, ("I", "H")),
    ("ffn.shared_experts.w2.weight", _DENSE, ("H", "I")),
    ("ffn.shared_experts.w3.weight", _DENSE, ("I", "H")),
)
EXPERT: Rows = (
    ("w1.weight", _EXPERT, ("I", "H")),
    ("w2.weight", _EXPERT, ("H", "I")),
    ("w3.weight", _EXPERT, ("I", "H")),
)
GATE_BIAS: Rows = (("ffn.gate.bias", _F32, ("E",)),)
GATE_BIAS_VISION: Rows = (("ffn.gate.bias_vl", _F32, ("E",)),)
GATE_HASH: Rows = (("ffn.gate.tid2eid", Kind.I64, ("V", "K")),)
COMPRESSOR: Rows = (
    ("attn.compressor.ape", _F32, ("r", "C")),
    ("attn.compressor.wkv.weight", _BF16, ("C", "H")),
    ("attn.compressor.wgate.weight", _BF16, ("C", "H")),
    ("attn.compressor.norm.weight", _BF16, ("D",)),
)
INDEXER: Rows = (
    ("attn.indexer.wq_b.weight", _DENSE, ("T", "Q")),
    ("attn.indexer.weights_proj.weight", _BF16, ("A", "H")),
    ("attn.indexer.compressor.ape", _F32, ("r", "Z")),
    ("attn.indexer.compressor.wkv.weight", _BF16, ("Z", "H")),
    ("attn.indexer.compressor.wgate.weight", _BF16, ("Z", "H")),
    ("attn.indexer.compressor.norm.weight", _BF16, ("B",)),
)
MTP_PREVIEW: Rows = (
    ("e_proj.weight", _DENSE, ("H", "H")),
    ("h_proj.weight", _DENSE, ("H", "H")),
    ("enorm.weight", _BF16, ("H",)),
    ("hnorm.weight", _BF16, ("H",)),
    ("norm.weight", _BF16, ("H",)),
    *HC_HEAD,
)
MTP_BASE: Rows = (("emb.tok_emb.weight", _BF16, ("V", "H")), ("head.weight", _BF16, ("V", "H")))
DSPARK_FIRST: Rows = (("main_proj.weight", _DENSE, ("H", "X")), ("main_norm.weight", _BF16, ("H",)))
DSPARK_LAST: Rows = (
    ("norm.weight", _BF16, ("H",)),
    *HC_HEAD,
    ("markov_head.markov_w1.weight", _BF16, ("V", "W")),
    ("markov_head.markov_w2.weight", _BF16, ("V", "W")),
    ("confidence_head.proj.weight", _BF16, ("1", "HW")),
)
V41_COMPRESSOR: Rows = (
    ("attn.compressor.wkv.weight", _BF16, ("D", "H")),
    ("attn.compressor.norm.weight", _BF16, ("D",)),
)
V41_COMPRESSOR_GATE: Rows = (("attn.compressor.wgate.weight", _BF16, ("D", "H")),)  # ratio 1 pools nothing
V41_INDEXER: Rows = (
    ("attn.indexer.wq_b.weight", _DENSE, ("T", "Q")),
    ("attn.indexer.weights_proj.weight", _BF16, ("A", "H")),
)
V41_INDEXER_KEYS: Rows = (
    ("attn.indexer.wk.weight", _BF16, ("B", "D")),
    ("attn.indexer.k_norm.weight", _BF16, ("B",)),
)
V41_ENGRAM: Rows = (
    ("engram.embed.weight", Kind.TABLE, ("rows", "width")),
    ("engram.wkv.weight", _DENSE, ("(S+1)H", "columns")),
    ("engram.q_weight", _BF16, ("S", "H")),
    ("engram.k_weight", _BF16, ("S", "H")),
)
V41_DSPARK_LAST: Rows = (
    ("norm.weight", _BF16, ("H",)),
    ("markov_head.embed.weight", _BF16, ("V", "W")),
    ("markov_head.head.weight", _BF16, ("V", "W")),
    ("confidence_head.proj.weight", _BF16, ("1", "HW")),
)


@dataclass(frozen=True)
class Family:
    """What the config alone does not say: which rename table applies, and which extras the files carry."""

    table: Table
    base: bool = False  # mtp.* repeats embed and head
    vision: bool = False  # a second router bias in every layer, and opaque vision tensors


PREVIEW = Family(Table(names.PREVIEW))
BASE = Family(Table(names.BASE), base=True)
DSPARK = Family(Table(names.DSPARK))
VISION = Family(Table(names.VISION), vision=True)
V41_FAMILY = Family(Table(names.V41), vision=True)


def logical_tensors(model: ModelConfig, family: Family) -> Iterator[Logical]:
    """Every tensor of the model: top level, then layers, then draft stages."""
    sizes = _sizes(model)
    v41 = model.model_type == V41
    yield from _fill(TOP if v41 else (*TOP, *HC_HEAD), "", sizes)
    for layer in range(model.num_layers):
        prefix = f"layers.{layer}."
        extras = _layer_v41(model, layer) if v41 else _layer_v4(model, family, layer)
        rows = dict(model.engram_rows).get(layer, 0)
        ratio = model.compress_ratios[layer]
        widths = {**sizes, "rows": rows, **_compressor_sizes(model, ratio)}
        yield from _fill((*BLOCK, *extras), prefix, widths)
        yield from _experts(prefix, Kind.EXPERT, model.num_experts, sizes)
    sizes = {**sizes, "E": model.dspark_num_experts if model.dspark_targets else model.num_experts}
    for stage in range(model.num_stages):
        prefix = f"mtp.{stage}."
        yield from _fill((*BLOCK, *_stage(model, family, stage)), prefix, sizes)
        yield from _experts(prefix, Kind.DRAFT_EXPERT, sizes["E"], sizes)


def _sizes(model: ModelConfig) -> dict[str, int]:
    query = model.num_heads * model.head_dim
    out = model.o_groups * model.o_lora_rank
    return {
        "1": 1, "3": 3, "H": model.hidden, "N": model.num_heads, "D": model.head_dim, "ND": query,
        "ND/G": query // model.o_groups, "Q": model.q_lora_rank, "GR": out, "E": model.num_experts,
        "K": model.experts_per_token, "I": model.intermediate, "V": model.vocab, "S": model.hc_mult,
        "SH": model.hc_mult * model.hidden, "(S+1)H": (model.hc_mult + 1) * model.hidden,
        "M": (2 + model.hc_mult) * model.hc_mult, "T": model.index_num_heads * model.index_head_dim,
        "A": model.index_num_heads, "B": model.index_head_dim, "X": len(model.dspark_targets) * model.hidden,
        "W": model.dspark_rank, "HW": model.hidden + model.dspark_rank,
        "columns": model.engram_columns * model.engram_width, "width": model.engram_width,
    }  # fmt: skip


def _compressor_sizes(model: ModelConfig, ratio: int) -> dict[str, int]:
    overlap = 2 if ratio == OVERLAP_RATIO else 1  # twice the channels
    return {"r": ratio, "C": overlap * model.head_dim, "Z": overlap * model.index_head_dim}


def _layer_v4(model: ModelConfig, family: Family, layer: int) -> Rows:
    ratio = model.compress_ratios[layer]
    hashed = layer < model.num_hash_layers
    return (
        *(GATE_HASH if hashed else ()),
        *(GATE_BIAS if not hashed or family.vision else ()),
        *(GATE_BIAS_VISION if family.vision else ()),
        *(COMPRESSOR if ratio else ()),
        *(INDEXER if ratio == OVERLAP_RATIO else ()),
    )


def _layer_v41(model: ModelConfig, layer: int) -> Rows:
    owns_keys = layer in model.kv_sources
    indexes = layer in model.index_sources
    return (
        *GATE_BIAS,
        *GATE_BIAS_VISION,
        *(V41_COMPRESSOR if owns_keys else ()),
        *(V41_COMPRESSOR_GATE if owns_keys and model.compress_ratios[layer] > 1 else ()),
        *(V41_INDEXER if indexes else ()),
        *(V41_INDEXER_KEYS if indexes and owns_keys else ()),
        *(V41_ENGRAM if layer in dict(model.engram_rows) else ()),
    )


def _stage(model: ModelConfig, family: Family, stage: int) -> Rows:
    first, last = stage == 0, stage == model.num_stages - 1
    bias = (*GATE_BIAS, *(GATE_BIAS_VISION if family.vision else ()))
    if not model.dspark_targets:
        return (*bias, *MTP_PREVIEW, *(MTP_BASE if family.base else ()))
    final = V41_DSPARK_LAST if model.model_type == V41 else DSPARK_LAST
    return (*bias, *(DSPARK_FIRST if first else ()), *(final if last else ()))


def _fill(rows: Rows, prefix: str, sizes: dict[str, int]) -> Iterator[Logical]:
    for name, kind, letters in rows:
        yield Logical(prefix + name, kind, tuple(sizes[letter] for letter in letters))


def _experts(prefix: str, kind: Kind, num_experts: int, sizes: dict[str, int]) -> Iterator[Logical]:
    filled = list(_fill(EXPERT, "", sizes))
    for expert in range(num_experts):
        for name, _, shape in filled:
            yield Logical(f"{prefix}ffn.experts.{expert}.{name}", kind, shape)


# ---- layout: logical tensors -> stored tensors


class Part(NamedTuple):
    """One logical tensor inside a stored one: rows [begin, begin + rows) of it, its leading dimensions flattened."""

    logical: Logical
    begin: int
    rows: int


@dataclass(slots=True)
class Stored:
    """A tensor as a file must hold it, and the logical tensors it is made of, in order of their rows."""

    name: str
    dtype: str
    shape: Shape
    parts: list[Part]
    scale_of: Quant | None = None  # set: these are scales of the parts
    leaf: str = (
        "weight"  # which of the tensors that a quantized matrix consists of, in the words of names.LEAVES
    )


@dataclass(frozen=True)
class Layout:
    """How one storage format and namespace hold a set of logical tensors."""

    storage: Storage
    namespace: Namespace
    stored: dict[str, Stored]
    group: dict[str, str]  # stored name -> class for overviews
    weights: dict[str, tuple[str, int]]  # logical name -> (stored name, number of its part)
    scales: dict[str, tuple[str, int]]
    per_tensor: dict[str, dict[str, tuple[str, int]]]  # further scales: leaf -> logical name -> place

    def quant(self, logical: Logical) -> Quant | None:
        """How the values of a logical tensor are quantized here; None: stored as they are."""
        return QUANTS[self.storage].get(logical.kind)


def lay_out(
    logicals: list[Logical],
    table: Table,
    storage: Storage,
    namespace: Namespace,
    experts: Experts = Experts.FUSED,
) -> Layout:
    """Every stored tensor for these logical ones."""
    layout = Layout(storage, namespace, {}, {}, {}, {}, {})
    for logical in logicals:
        match = table.match(logical.name)
        assert match is not None, (
            logical.name
        )  # the tables of one release cover its inventory: held by a test
        quant = layout.quant(logical)
        if quant is None:
            dtype = "BF16" if logical.kind in MATRICES else logical.kind.value
            place = table.place(match, namespace, experts)
            _store(layout, layout.weights, logical, place, logical.shape, dtype, match)
            continue
        grid = scale_shape(logical.shape, quant.block)
        leaves = [
            ("weight", layout.weights, codes_shape(logical.shape, quant), quant.codes),
            ("scale", layout.scales, grid, quant.scale),
            *((leaf, layout.per_tensor.setdefault(leaf, {}), (), "F32") for leaf in quant.per_tensor),
        ]
        for leaf, index, shape, dtype in leaves:
            place = table.place(match._replace(leaf=leaf), namespace, experts, quant.spelling)
            _store(layout, index, logical, place, shape, dtype, match, leaf, quant)
    for stored in layout.stored.values():
        stored.parts.sort(key=lambda part: part.begin)
    return layout


def _store(
    layout: Layout,
    index: dict[str, tuple[str, int]],
    logical: Logical,
    place: Place,
    shape: Shape,
    dtype: str,
    match: Match,
    leaf: str = "weight",
    quant: Quant | None = None,
) -> None:
    rows = shape[0] if len(shape) > 1 else 1
    stored = layout.stored.get(place.name)
    if stored is None:
        stored = Stored(place.name, dtype, shape, [], None if leaf == "weight" else quant, leaf)
        layout.stored[place.name] = stored
        layout.group[place.name] = match.row.group
    if place.parts_per_expert:
        stored.parts.append(Part(logical, place.number * rows, rows))
        num_experts = len(stored.parts) // place.parts_per_expert
        stored.shape = (num_experts, place.parts_per_expert * rows, *shape[1:])
    else:
        stored.parts.append(Part(logical, 0, rows))
    index[logical.name] = (place.name, place.number)


def shard_groups(layout: Layout) -> list[list[Stored]]:
    """Stored tensors that may share a shard, in the order of the releases: embedding, each layer, head, each stage."""
    early: dict[str, list[Stored]] = {}
    late: dict[str, list[Stored]] = {"head": []}
    for stored in layout.stored.values():
        head, _, rest = stored.parts[0].logical.name.partition(".")
        number = rest.partition(".")[0]
        if head in ("embed", "layers"):
            early.setdefault(f"{head}.{number}" if head == "layers" else head, []).append(stored)
        else:
            late.setdefault(f"{head}.{number}" if head == "mtp" else "head", []).append(stored)
    return [group for group in (*early.values(), *late.values()) if group]
