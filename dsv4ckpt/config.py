"""config.json: strict, typed, bounded; and what it becomes when layers, MTP or storage change.  Knows no shapes.

Only the keys that decide which tensors exist are read; every other key is carried as it stands.
Source: the released configs (V4: flat; V4.1: nested text_config), rules C1-C2; NVIDIA's ModelOpt exports of V4;
compressed-tensors 0.20 (QuantizationConfig, the MXFP4A16 and FP8_BLOCK presets).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from . import strictjson
from .errors import BadConfig, Usage
from .formats import CONFIG_NAME, QUANTS, Kind, Quant, Spelling, Storage

V4, V41 = "deepseek_v4", "deepseek_v41"
_QUANT_KEYS = ("quantization_config", "expert_dtype")
_MAX_ALL_EXPERTS = 100_000  # Pro has 23,808; an inventory must not explode
_MAX_LAYERS, _MAX_EXPERTS, _MAX_WIDTH, _MAX_ROWS = 512, 4096, 2**20, 2**34


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that decide names and shapes. Widths are element counts."""

    model_type: str
    vocab: int
    hidden: int
    num_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    num_experts: int
    experts_per_token: int
    intermediate: int
    num_layers: int
    num_hash_layers: int
    compress_ratios: tuple[int, ...]  # one per layer, then one per draft stage
    num_stages: int  # MTP or DSpark stages in the files; 0.. whatever num_nextn_predict_layers says
    hc_mult: int
    index_num_heads: int
    index_head_dim: int
    routed_scaling_factor: float
    rms_norm_eps: float
    dspark_targets: tuple[int, ...]  # empty: no DSpark
    dspark_rank: int
    dspark_num_experts: int
    kv_sources: tuple[int, ...] = ()  # V4.1: layers that own a compressor
    index_sources: tuple[int, ...] = ()  # V4.1: layers that own an indexer
    engram_rows: tuple[tuple[int, int], ...] = ()  # V4.1: (layer, rows of its table)
    engram_columns: int = 0  # hash columns looked up per token
    engram_width: int = 0  # width of a table row


class _Fields:
    """Typed, bounded access to one JSON object."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def refuse(self, key: str, expected: str) -> NoReturn:
        found = repr(self.fields[key])[:80] if key in self.fields else "nothing"
        raise BadConfig(f"{self.where}{key} is wrong", file=CONFIG_NAME, expected=expected, found=found)

    def count(self, key: str, most: int, *, least: int = 1) -> int:
        value = self.fields.get(key)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str) -> float:
        value = self.fields.get(key)
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            self.refuse(key, "a number")
        return float(value)  # type: ignore[arg-type]

    def counts(self, key: str, most: int, *, max_length: int = _MAX_LAYERS) -> tuple[int, ...]:
        value = self.fields.get(key)
        if not isinstance(value, list) or len(value) > max_length:
            self.refuse(key, f"a list of at most {max_length} whole numbers")
        if not all(type(item) is int and 0 <= item <= most for item in value):
            self.refuse(key, f"whole numbers from 0 to {most}")
        return tuple(value)


def parse(data: bytes) -> dict[str, Any]:
    """The object in a config.json. raises BadConfig"""
    try:
        document = strictjson.loads(data, floats=True)
    except strictjson.Malformed as error:
        raise BadConfig(f"config.json is malformed: {error}", file=CONFIG_NAME) from None
    if not isinstance(document, dict):
        raise BadConfig("config.json holds no object", file=CONFIG_NAME, found=type(document).__name__)
    return document


def _text(document: dict[str, Any]) -> dict[str, Any]:
    """The object that describes the language model: nested in V4.1."""
    nested = document.get("text_config")
    return nested if isinstance(nested, dict) else document


def read(document: dict[str, Any]) -> ModelConfig:
    """Check and take what the inventory needs. raises BadConfig"""
    model_type = document.get("model_type")
    if model_type not in (V4, V41):
        raise BadConfig(
            "this is no DeepSeek-V4 checkpoint",
            file=CONFIG_NAME,
            expected=f"model_type {V4!r} or {V41!r}",
            found=repr(model_type)[:80],
        )
    text = _Fields(_text(document), "" if model_type == V4 else "text_config.")
    num_layers = text.count("num_hidden_layers", _MAX_LAYERS)
    ratios = text.counts("compress_ratios", 2**20)
    nextn = text.count("num_nextn_predict_layers", 8, least=0)
    # 0731 and 0813 say 1 stage and ship 3: the ratios count the stages that are there.
    num_stages = len(ratios) - num_layers if nextn else 0
    if len(ratios) < num_layers or num_stages > 8 or (nextn and not num_stages):
        text.refuse("compress_ratios", f"{num_layers} entries, and one more for each draft stage")
    dspark = "dspark_block_size" in text.fields and num_stages > 0
    targets = text.counts("dspark_target_layer_ids", num_layers - 1, max_length=8) if dspark else ()
    if dspark and not targets:
        text.refuse("dspark_target_layer_ids", "at least one layer")
    num_experts = text.count("n_routed_experts", _MAX_EXPERTS)
    if (num_layers + num_stages) * num_experts > _MAX_ALL_EXPERTS:
        text.refuse("n_routed_experts", f"at most {_MAX_ALL_EXPERTS:,} experts in all layers")
    common = ModelConfig(
        model_type=model_type,
        vocab=text.count("vocab_size", _MAX_WIDTH),
        hidden=text.count("hidden_size", 2**17),
        num_heads=text.count("num_attention_heads", 4096),
        head_dim=text.count("head_dim", 2**14),
        q_lora_rank=text.count("q_lora_rank", _MAX_WIDTH),
        o_groups=text.count("o_groups", 4096),
        o_lora_rank=text.count("o_lora_rank", _MAX_WIDTH),
        num_experts=num_experts,
        experts_per_token=text.count("num_experts_per_tok", 256),
        intermediate=text.count("moe_intermediate_size", _MAX_WIDTH),
        num_layers=num_layers,
        num_hash_layers=text.count("num_hash_layers", num_layers, least=0) if model_type == V4 else 0,
        compress_ratios=ratios,
        num_stages=num_stages,
        hc_mult=text.count("hc_mult", 64),
        index_num_heads=text.count("index_n_heads", 4096),
        index_head_dim=text.count("index_head_dim", 2**14),
        routed_scaling_factor=text.number("routed_scaling_factor"),
        rms_norm_eps=text.number("rms_norm_eps"),
        dspark_targets=targets,
        dspark_rank=text.count("dspark_markov_rank", 2**16) if dspark else 0,
        dspark_num_experts=(
            text.count("dspark_n_routed_experts", _MAX_EXPERTS)
            if dspark and "dspark_n_routed_experts" in text.fields
            else num_experts
        ),
    )
    for key, width in (("hidden_size", common.hidden), ("moe_intermediate_size", common.intermediate)):
        if width % 2:
            text.refuse(key, "an even number: FP4 packs two columns into a byte")
    if common.num_heads * common.head_dim % common.o_groups:
        text.refuse("o_groups", f"a divisor of {common.num_heads} heads x {common.head_dim}")
    return common if model_type == V4 else _with_v41(common, text)


def _with_v41(common: ModelConfig, text: _Fields) -> ModelConfig:
    layers = text.counts("engram_layer_ids", common.num_layers - 1)
    rows = text.counts("engram_num_embeddings", _MAX_ROWS)
    if len(layers) != len(rows):
        text.refuse("engram_num_embeddings", f"{len(layers)} entries, one for each of engram_layer_ids")
    return ModelConfig(
        **{
            **common.__dict__,
            "kv_sources": text.counts("kv_source_layer_ids", common.num_layers - 1),
            "index_sources": text.counts("index_source_layer_ids", common.num_layers - 1),
            "engram_rows": tuple(zip(layers, rows, strict=True)),
            "engram_columns": (text.count("engram_max_ngram_size", 16) - 1)
            * text.count("engram_n_heads", 256),
            "engram_width": text.count("engram_head_dim", 2**14),
        }
    )


# ---- the config of an output


def for_bf16(document: dict[str, Any]) -> dict[str, Any]:
    """The same model stored as BF16: no key may claim quantized storage, everything else is kept."""
    kept = _without(document, _QUANT_KEYS)
    kept["torch_dtype"] = "bfloat16"
    if "dtype" in kept:  # what transformers 5 writes instead
        kept["dtype"] = "bfloat16"
    return kept


# What a config calls the experts of a storage format. No row: readers of that format want no such key.
_EXPERT_DTYPES = {
    Storage.FP4_FP8: "fp4",
    Storage.FP4_FP8_32: "fp4",
    Storage.FP8_F32SCALE: "fp8",  # without it vLLM takes the experts for FP4
    Storage.FP8_F32SCALE_32: "fp8",
    Storage.NVFP4: "fp4",
    Storage.NVFP4_32: "fp4",
}


def for_storage(document: dict[str, Any], storage: Storage, native: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model in a storage format, whatever format the document describes.

    native  the release's own config: it supplies the keys that say how a checkpoint is stored
    raises  BadConfig if it lacks what the format needs, or has other tiles than the format
    """
    if storage is Storage.BF16:
        return for_bf16(document)
    released = _released_quantization(native, storage)
    made = {key: native[key] for key in ("model_type", *_DTYPE_KEYS) if key in native}
    expert_dtype = _EXPERT_DTYPES.get(storage)
    if expert_dtype and native["model_type"] == V41:  # V4.1 has the key inside
        released = _placed(released, {"expert_dtype": expert_dtype}, native["quantization_config"])
    elif expert_dtype:
        made["expert_dtype"] = expert_dtype
    spelling = QUANTS[storage][Kind.EXPERT].spelling
    if spelling is Spelling.MODELOPT:
        released |= _modelopt(document, storage)
        made["expert_dtype"] = expert_dtype  # its readers look here, for V4.1 too
    made["quantization_config"] = _compressed(storage) if spelling is Spelling.COMPRESSED_PACKED else released
    gone = [key for key in (*_QUANT_KEYS, *_DTYPE_KEYS) if key not in made]
    return _placed(_without(document, gone), made, native)


def _without(document: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """All but these keys. The language model of V4.1 has none of those that claim quantized storage."""
    kept = {key: value for key, value in document.items() if key not in keys}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {k: v for k, v in kept["text_config"].items() if k not in _QUANT_KEYS}
    return kept


def _placed(kept: dict[str, Any], made: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """Set keys: each stands where it stood, else where it stands in `order`, else at the end."""
    keys = list(kept)
    before = -1
    for key in order:
        if key in made and key not in keys:
            keys.insert(before + 1, key)
        if key in keys:
            before = keys.index(key)
    keys += [key for key in made if key not in keys]
    return {key: made[key] if key in made else kept[key] for key in keys}


def _released_quantization(native: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """The release's quantization_config without what it says about experts. raises BadConfig"""
    fields = native.get("quantization_config")
    fields = fields if isinstance(fields, dict) else {}
    needed = {"quant_method": "fp8", "weight_block_size": list(QUANTS[storage][Kind.DENSE].block)}
    for key, expected in needed.items():
        if repr(fields.get(key)) != repr(expected):  # 128.0 and true are no counts
            raise BadConfig(
                f"quantization_config.{key} of the release does not go with {storage.value}",
                file=CONFIG_NAME,
                expected=repr(expected),
                found=repr(fields[key])[:80] if key in fields else "nothing",
                do=f"take quantization_config from the release's own {CONFIG_NAME}",
            )
    return {key: value for key, value in fields.items() if key != "expert_dtype"}


# What ModelOpt did not quantize, in its wildcards over released module names.
_MODELOPT_IGNORED = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
_MODELOPT_IGNORED_IF = {  # further ones, for configs with this key
    "engram_layer_ids": ("*.engram.*",),
    "vision_config": ("vision.*", "aligner.*"),
}


def _modelopt(document: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """What ModelOpt adds to quantization_config. vLLM and SGLang switch on moe_quant_algo."""
    expert = QUANTS[storage][Kind.EXPERT]
    text = _Fields(_text(document), "text_config." if "text_config" in document else "")
    group = {"group_size": expert.block.cols}
    floats = {"dynamic": False, "num_bits": _num_bits(expert), "type": "float", **group}
    ignored = [*_MODELOPT_IGNORED]
    for key, patterns in _MODELOPT_IGNORED_IF.items():
        ignored += patterns if key in document or key in text.fields else ()
    return {
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        **group,
        "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
        "config_groups": {
            "group_0": {"input_activations": {**floats}, "weights": {**floats}, "targets": ["Linear"]}
        },
        "quantized_layers": {
            f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", **group}
            for layer in range(text.count("num_hidden_layers", _MAX_LAYERS))
        },
        "ignore": ignored,
    }


# hf_quant_config.json's key for each of quantization_config's.
_MODELOPT_MANIFEST = {
    "moe_quant_algo": "moe_quant_algo",
    "quant_algo": "quant_algo",
    "kv_cache_quant_algo": "kv_cache_quant_algo",
    "group_size": "group_size",
    "config_groups": "config_groups",
    "quantized_layers": "quantized_layers",
    "ignore": "exclude_modules",
}


def hf_quant_config(document: dict[str, Any]) -> dict[str, Any]:
    """The object in hf_quant_config.json that goes with a config made by for_storage for NVFP4."""
    made = document["quantization_config"]
    manifest = {theirs: made[ours] for ours, theirs in _MODELOPT_MANIFEST.items()}
    return {"producer": made["producer"], "quantization": manifest}


# Regular expressions over released module names, with or without a prefix such as `model.`.
_CT_EXPERTS = (r"re:.*\bffn\.experts\.\d+\.w[123]$",)
_CT_DENSE = (
    r"re:.*\battn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)$",
    r"re:.*\bffn\.shared_experts\.w[123]$",
    r"re:.*\bengram\.wkv$",
    r"re:.*\bmtp\.\d+\.(e_proj|h_proj|main_proj)$",
)
_CT_IGNORED = (
    r"re:(.*\.)?(embed|head|tok_emb)$",  # Engram tables too: they stay as released
    r"re:.*\bffn\.gate$",
    r"re:.*\bcompressor\.(wkv|wgate)$",
    r"re:.*\battn\.indexer\.(weights_proj|wk)$",
    r"re:.*\b(markov_head\.markov_w[12]|confidence_head\.proj)$",
    r"re:(.*\.)?(vision|aligner)\..*",
)


def _compressed(storage: Storage) -> dict[str, Any]:
    """quantization_config of compressed-tensors: released nibbles as weight-only MXFP4, dense tiles as block FP8."""
    expert, dense = QUANTS[storage][Kind.EXPERT], QUANTS[storage][Kind.DENSE]
    floats = {"type": "float", "symmetric": True}
    mxfp4 = {
        "num_bits": _num_bits(expert),
        **floats,
        "strategy": "group",
        "group_size": expert.block.cols,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    fp8 = {"num_bits": _num_bits(dense), **floats}
    tiles = {**fp8, "strategy": "block", "block_structure": list(dense.block), "dynamic": False}
    tokens = {**fp8, "strategy": "group", "group_size": dense.block.cols, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": list(_CT_EXPERTS),
                "weights": mxfp4,
                "input_activations": None,
                "format": "mxfp4-pack-quantized",
            },
            "group_1": {
                "targets": list(_CT_DENSE),
                "weights": tiles,
                "input_activations": tokens,
                "format": "float-quantized",
            },
        },
        "ignore": list(_CT_IGNORED),
        "version": "0.20.0",  # whose QuantizationConfig this is
    }


def _num_bits(quant: Quant) -> int:
    return 8 // quant.codes_per_element


def for_subset(document: dict[str, Any], layers: tuple[int, ...], *, keep_mtp: bool) -> dict[str, Any]:
    """The config of the model made of these layers (ascending, renumbered from 0), with or without its draft stages.

    raises  Usage if such a model cannot run
    """
    text = dict(_text(document))
    model = read(document)
    whole = layers == tuple(range(model.num_layers))
    if whole and (keep_mtp or not model.num_stages):
        return document
    stages = range(model.num_layers, model.num_layers + model.num_stages) if keep_mtp else ()
    text["num_hidden_layers"] = len(layers)
    text["compress_ratios"] = [model.compress_ratios[index] for index in (*layers, *stages)]
    if model.model_type == V4:
        text["num_hash_layers"] = sum(layer < model.num_hash_layers for layer in layers)
    else:
        _subset_v41(text, model, layers)
    if not keep_mtp:
        text["num_nextn_predict_layers"] = 0
        text = {key: value for key, value in text.items() if not key.startswith("dspark_")}
    elif model.dspark_targets:
        text["dspark_target_layer_ids"] = _targets(model.dspark_targets, layers)
    return {**document, "text_config": text} if _text(document) is not document else text


def _targets(targets: tuple[int, ...], layers: tuple[int, ...]) -> list[int]:
    """The layers that DSpark taps: the same ones where they stay, else the last ones, so that it runs."""
    if len(layers) < len(targets):
        raise Usage(
            f"DSpark taps {len(targets)} layers, this selection has {len(layers)}",
            do=f"select at least {len(targets)} layers, or leave the draft stages out with --mtp drop",
        )
    if set(targets) <= set(layers):
        return [layers.index(target) for target in targets]
    return list(range(len(layers) - len(targets), len(layers)))


def _subset_v41(text: dict[str, Any], model: ModelConfig, layers: tuple[int, ...]) -> None:
    """V4.1 layers share the compressed keys of source layers before them: only a run from layer 0 stays whole."""
    if layers != tuple(range(len(layers))):
        raise Usage(
            "V4.1 layers read the keys of earlier source layers",
            expected="--layers 0-N",
            do="select the layers from 0 on",
        )
    text["kv_source_layer_ids"] = [layer for layer in model.kv_sources if layer in layers]
    text["index_source_layer_ids"] = [layer for layer in model.index_sources if layer in layers]
    if text.get("candidate_source_layer_id") not in layers:
        text["candidate_source_layer_id"] = -1  # no layer is left that would filter candidates
    tables = [(layer, rows) for layer, rows in model.engram_rows if layer in layers]
    text["engram_layer_ids"] = [layer for layer, _ in tables]
    text["engram_num_embeddings"] = [rows for _, rows in tables]
