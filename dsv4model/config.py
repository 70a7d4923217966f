"""config.json -> the numbers that the model is made of.  Knows no tensors, no files, no torch.

Everything is read from the released keys and nothing is restated: a value that the file does not give is an error.
Source: the released configs; paper sec. 2 and 4.2.1 for what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from dsv4ckpt import config as configs
from dsv4ckpt.config import Fields
from dsv4ckpt.errors import BadConfig
from dsv4ckpt.formats import CONFIG_NAME
from dsv4ckpt.inventory import OVERLAP_RATIO

_MAX_POSITIONS, _MAX_WINDOW, _MAX_ROUNDS = 2**24, 2**20, 1000


class Yarn(NamedTuple):
    """How rotary frequencies are stretched for long contexts (arXiv 2309.00071), without its attention factor."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model's numbers. Widths are element counts, lengths are tokens."""

    vocab: int
    hidden: int
    num_layers: int
    num_hash_layers: int  # the first layers, whose experts the token id picks
    num_mtp: int  # blocks that predict the token after the next; DSpark's stages are none
    num_heads: int
    head_dim: int
    rope_dim: int  # the last dimensions of a head, and of an indexer head
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    window: int  # keys that a query sees at full resolution, itself included
    compress_ratios: tuple[int, ...]  # per layer: tokens per compressed entry; 0: window only
    index_num_heads: int
    index_head_dim: int
    index_topk: int  # compressed entries that a query sees where an indexer chooses
    num_experts: int
    experts_per_token: int
    intermediate: int
    routed_scaling: float
    swiglu_limit: float  # 0: no clamp
    clamps_shared: bool = True  # False: the shared expert as in the launch code of April 2026
    hc_mult: int
    hc_eps: float
    sinkhorn_iters: int
    norm_eps: float
    rope_theta: float  # base for layers without compression
    compress_theta: float  # base for all rotations of a layer with compression
    yarn: Yarn | None  # goes with compress_theta only
    max_positions: int
    init_std: float
    bos: int
    eos: int

    @classmethod
    def read(cls, document: dict[str, Any]) -> Config:
        """From the object in a released config.json. raises BadConfig"""
        _require_known(document)
        sizes = configs.read(document)
        keys = Fields(document, "")
        config = cls(
            vocab=sizes.vocab,
            hidden=sizes.hidden,
            num_layers=sizes.num_layers,
            num_hash_layers=sizes.num_hash_layers,
            num_mtp=0 if sizes.dspark_targets else sizes.num_stages,
            num_heads=sizes.num_heads,
            head_dim=sizes.head_dim,
            rope_dim=keys.count("qk_rope_head_dim", min(sizes.head_dim, sizes.index_head_dim)),
            q_lora_rank=sizes.q_lora_rank,
            o_groups=sizes.o_groups,
            o_lora_rank=sizes.o_lora_rank,
            window=keys.count("sliding_window", _MAX_WINDOW),
            compress_ratios=sizes.compress_ratios[: sizes.num_layers],
            index_num_heads=sizes.index_num_heads,
            index_head_dim=sizes.index_head_dim,
            index_topk=keys.count("index_topk", _MAX_POSITIONS),
            num_experts=sizes.num_experts,
            experts_per_token=sizes.experts_per_token,
            intermediate=sizes.intermediate,
            routed_scaling=sizes.routed_scaling_factor,
            swiglu_limit=keys.number("swiglu_limit"),
            hc_mult=sizes.hc_mult,
            hc_eps=keys.number("hc_eps"),
            sinkhorn_iters=keys.count("hc_sinkhorn_iters", _MAX_ROUNDS),
            norm_eps=sizes.rms_norm_eps,
            rope_theta=keys.number("rope_theta"),
            compress_theta=keys.number("compress_rope_theta"),
            yarn=_yarn(keys),
            max_positions=keys.count("max_position_embeddings", _MAX_POSITIONS),
            init_std=keys.number("initializer_range"),
            bos=keys.count("bos_token_id", sizes.vocab - 1, least=0),
            eos=keys.count("eos_token_id", sizes.vocab - 1, least=0),
        )
        _require_possible(config, keys, sizes)
        return config

    def overlaps(self, layer: int) -> bool:
        """Whether a layer's compressor pools the window before as well, and an indexer chooses among its entries."""
        return self.compress_ratios[layer] == OVERLAP_RATIO


def _require_known(document: dict[str, Any]) -> None:
    """raises BadConfig for the architectures that share names with V4 but not its formulas"""
    model_type = document.get("model_type")
    if model_type == configs.V41:
        other = "V4.1"
    elif "vision_config" in document:
        other = "Vision-Exp"
    else:
        return
    raise BadConfig(
        f"this is a {other} checkpoint, and dsv4model knows the text models of V4 only",
        file=CONFIG_NAME,
        expected=f"model_type {configs.V4!r} without vision_config",
        found=f"model_type {model_type!r}" + (" with vision_config" if "vision_config" in document else ""),
        do="dsv4 inspect, convert and verify work with it; to run it, take an engine that knows it",
    )


def _yarn(keys: Fields) -> Yarn | None:
    if keys.fields.get("rope_scaling", "") is None:  # a missing key may be one that another tool renamed
        return None
    if not isinstance(keys.fields.get("rope_scaling"), dict):
        keys.refuse("rope_scaling", "an object, or null")
    inner = Fields(keys.fields["rope_scaling"], "rope_scaling.")
    kind = "rope_type" if "rope_type" in inner.fields else "type"
    if inner.fields.get(kind) != "yarn":
        inner.refuse(kind, "'yarn'")
    yarn = Yarn(
        factor=inner.number("factor"),
        original_positions=inner.count("original_max_position_embeddings", _MAX_POSITIONS),
        beta_fast=inner.number("beta_fast"),
        beta_slow=inner.number("beta_slow"),
    )
    for key, value in (("factor", yarn.factor), ("beta_fast", yarn.beta_fast), ("beta_slow", yarn.beta_slow)):
        if value <= 0:
            inner.refuse(key, "a positive number")
    return yarn


def _require_possible(config: Config, keys: Fields, sizes: configs.ModelConfig) -> None:
    """raises BadConfig for what would make another model than the one that the paper describes"""
    for key, known in (
        ("scoring_func", "sqrtsoftplus"),
        ("hidden_act", "silu"),
        ("norm_topk_prob", True),
        ("attention_bias", False),
        ("tie_word_embeddings", False),
        ("num_key_value_heads", 1),
        ("n_shared_experts", 1),
    ):
        if keys.fields.get(key) != known:
            keys.refuse(key, repr(known))
    for key, base in (("rope_theta", config.rope_theta), ("compress_rope_theta", config.compress_theta)):
        if base <= 1:
            keys.refuse(key, "a number above 1")
    for key, positive in (
        ("routed_scaling_factor", config.routed_scaling),
        ("hc_eps", config.hc_eps),
        ("rms_norm_eps", config.norm_eps),
        ("initializer_range", config.init_std),
    ):
        if positive <= 0:
            keys.refuse(key, "a positive number")
    if config.rope_dim % 2:
        keys.refuse("qk_rope_head_dim", "an even number")
    if config.swiglu_limit < 0:
        keys.refuse("swiglu_limit", "0 for no clamp, or a positive number")
    if config.experts_per_token > config.num_experts:
        keys.refuse("num_experts_per_tok", f"at most {config.num_experts}, which is n_routed_experts")
    if config.num_heads % config.o_groups:
        keys.refuse("o_groups", f"a divisor of {config.num_heads}, which is num_attention_heads")
    if config.num_mtp > 1:
        keys.refuse("num_nextn_predict_layers", "0 or 1: no release has more MTP blocks")
    if any(sizes.compress_ratios[sizes.num_layers :]):
        keys.refuse("compress_ratios", "0 for every draft stage")


_WIDE_MODULES = frozenset({"attn_hc", "ffn_hc", "hc_head"})
_WIDE_LEAVES = frozenset({"sinks", "position_bias", "e_score_correction_bias"})
_NORMS = frozenset(
    {"q_a_norm", "kv_norm", "input_layernorm", "post_attention_layernorm", "norm", "enorm", "hnorm"}
)


def is_kept_wide(name: str) -> bool:
    """Whether a parameter or buffer of the model stays float32 where the others are bfloat16."""
    parts = name.split(".")
    owner = parts[-2] if len(parts) > 1 else ""
    return parts[-1] in _WIDE_LEAVES or owner in _WIDE_MODULES or owner in _NORMS
