"""A tiny DeepSeek-V4: its config.json, and random weights with which every mechanism matters to the output.

Owns the sizes and the scales; knows no formula of the model.
Source: the released config of Flash for the keys, the inventory for names and shapes.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np

from dsv4ckpt import config, inventory, release
from dsv4ckpt.formats import Kind
from dsv4ckpt.inventory import Logical

# Sixteen indexer heads: with four, the ReLU leaves one score in sixteen at exactly 0, and ties decide the choice.
_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 4, "compress_ratios": [0, 0, 4, 128, 0], "num_hash_layers": 1,
    "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_groups": 2,
    "o_lora_rank": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "index_n_heads": 16, "index_head_dim": 32, "index_topk": 8, "sliding_window": 16, "vocab_size": 128,
    "swiglu_limit": 1.0, "max_position_embeddings": 4096, "torch_dtype": "float32",
}  # fmt: skip
_SHORT = {"original_max_position_embeddings": 256}  # the ramp of YaRN then ends at pair 3 of 8


def tiny_document(**changes: Any) -> dict[str, Any]:
    """The config.json of Flash cut down to four layers and an MTP block, unquantized; `changes` are keys of it.

    Layer 0 routes by token id; layers 0 and 1 have a window only, layer 2 ratio 4, layer 3 ratio 128.
    """
    document = copy.deepcopy(release.shipped_config("flash"))
    del document["quantization_config"], document["expert_dtype"]
    document |= copy.deepcopy(_SMALL)
    document["rope_scaling"] |= _SHORT
    return document | changes


def random_weights(document: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Released name -> float64 array whose values float32 holds exactly; tid2eid is int64.

    Every tensor has a generator of its own, so one that keeps its name and shape keeps its values.
    """
    model = config.read(document)
    weights = {}
    for logical in inventory.logical_tensors(model, inventory.PREVIEW):
        random = np.random.default_rng([seed, zlib.crc32(logical.name.encode())])
        if logical.kind is Kind.I64:
            order = np.argsort(random.random((logical.shape[0], model.num_experts)), axis=1)
            weights[logical.name] = order[:, : logical.shape[1]].astype(np.int64)
        else:
            weights[logical.name] = _values(random, logical).astype(np.float32).astype(np.float64)
    return weights


def _values(random: np.random.Generator, logical: Logical) -> np.ndarray:
    """Matrices keep the size of what goes through them, times a factor; what is added or compared is spread out."""
    name, shape = logical.name, logical.shape
    normal = random.standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * normal
    if name.endswith("attn_sink"):
        return random.uniform(0, 2, shape)
    if name.endswith("_scale"):
        return random.uniform(0.5, 1.5, shape)
    if name.endswith("_base"):
        return 0.5 * normal
    if name.endswith("gate.bias"):
        return 0.3 * normal
    if name.endswith(("ape", "embed.weight")):
        return normal
    gain = 1.5 if name.endswith(("gate.weight", "w1.weight", "w3.weight", "head.weight")) else 1.0
    return gain / shape[-1] ** 0.5 * normal
