"""config.json: strict, typed, bounded; and what it becomes when layers, MTP or storage change.  Knows no tensors.

Only the keys that decide which tensors exist are read; every other key is carried as it stands, but those that name
code to run.
Source: the released configs (V4: flat; V4.1: nested text_config), rules C1-C3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from . import strictjson
from .errors import BadConfig, Usage
from .formats import CONFIG_NAME, CT_FP4, QUANTS, Block, Kind, Quant, Spelling, Storage

V4, V41 = "deepseek_v4", "deepseek_v41"
_QUANT_KEYS = ("quantization_config", "expert_dtype", "compression_config")
_CODE_KEYS = ("auto_map",)  # C3: a trusting loader imports what it names, from any repository
_FETCH = "take the config.json that was published with these shards"
_MAX_ALL_EXPERTS = 100_000  # Pro has 23,808; an inventory must not explode
_LARGEST = 2**1023  # what a float holds for sure
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


class Fields:
    """Typed, bounded access to one JSON object."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def refuse(self, key: str, expected: str) -> NoReturn:
        found = repr(self.fields[key])[:80] if key in self.fields else "nothing"
        raise BadConfig(
            f"{self.where}{key} is wrong", file=CONFIG_NAME, expected=expected, found=found, do=_FETCH
        )

    def count(self, key: str, most: int, *, least: int = 1) -> int:
        value = self.fields.get(key)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str) -> float:
        value = self.fields.get(key)
        if type(value) is int and abs(value) <= _LARGEST:
            return float(value)
        if type(value) is not float or not math.isfinite(value):
            self.refuse(key, "a number")
        return value

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
        raise BadConfig(f"config.json is malformed: {error}", file=CONFIG_NAME, do=_FETCH) from None
    if not isinstance(document, dict):
        raise BadConfig(
            "config.json holds no JSON object",
            file=CONFIG_NAME,
            found=f"a {type(document).__name__}",
            do=_FETCH,
        )
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
            do="name the directory of a DeepSeek-V4 or V4.1 checkpoint: dsv4 knows no other model",
        )
    text = Fields(_text(document), "" if model_type == V4 else "text_config.")
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


def _with_v41(common: ModelConfig, text: Fields) -> ModelConfig:
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


def code_keys(document: dict[str, Any]) -> list[str]:
    """The keys of a config that name code to run; no output carries them."""
    return sorted({key for fields in (document, _text(document)) for key in _CODE_KEYS if key in fields})


def for_bf16(document: dict[str, Any]) -> dict[str, Any]:
    """The same model stored as BF16: no key may claim quantized storage or name code, everything else is kept."""
    gone = (*_QUANT_KEYS, *_CODE_KEYS)
    kept = {key: value for key, value in document.items() if key not in gone}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in kept["text_config"].items() if key not in gone}
    kept["torch_dtype"] = "bfloat16"
    if "dtype" in kept:  # what transformers 5 writes instead
        kept["dtype"] = "bfloat16"
    return kept


def for_storage(document: dict[str, Any], storage: Storage, native: Mapping[str, Any]) -> dict[str, Any]:
    """The same model stored in another format, as the readers of that format expect it.

    document  of a checkpoint in any format
    native    of the release itself: where quantization_config comes from
    raises    BadConfig if the release's own config cannot describe this storage
    """
    plain = for_bf16(document)
    if storage is Storage.BF16:
        return plain
    if "dtype" not in native:  # what transformers 5 writes instead of torch_dtype
        plain.pop("dtype", None)
    released = _released_quantization(native, storage)
    expert = QUANTS[storage][Kind.EXPERT]
    is_nested = "expert_dtype" in released  # V4.1 has it there
    dense = {key: value for key, value in released.items() if key != "expert_dtype"}
    made: dict[str, Any]
    if expert.spelling is Spelling.COMPRESSED_PACKED:
        made = {"quantization_config": _compressed_tensors(QUANTS[storage][Kind.DENSE].block)}
    elif expert.spelling is Spelling.MODELOPT:
        made = {"expert_dtype": "fp4", "quantization_config": {**released, **_modelopt(document, expert)}}
    elif expert.codes_per_element == 1 and expert.scale != "F32":
        made = {"quantization_config": dense}  # what SGLang takes for FP8 experts with E8M0 scales
    else:
        word = "fp4" if expert.codes_per_element == 2 else "fp8"
        if is_nested:
            made = {"quantization_config": {**released, "expert_dtype": word}}
        elif "expert_dtype" in native or word == "fp8":
            made = {"expert_dtype": word, "quantization_config": dense}
        else:  # launch configs do not say it
            made = {"quantization_config": dense}
    made["model_type"] = V41 if document["model_type"] == V41 else V4
    whole = {**plain, **made}
    return {
        key: whole[key]
        for key in (*(key for key in native if key in whole), *(key for key in whole if key not in native))
    }


def _released_quantization(native: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """quantization_config of the release. raises BadConfig if it does not say the tiles that are stored"""
    found = native.get("quantization_config")
    block = QUANTS[storage][Kind.DENSE].block
    sizes = found.get("weight_block_size") if isinstance(found, dict) else None
    if not isinstance(found, dict) or repr(sizes) != repr([block.rows, block.cols]):  # 32.0 is no count
        raise BadConfig(
            "the release's config.json does not describe its quantization",
            file=CONFIG_NAME,
            expected=f"quantization_config with weight_block_size {[block.rows, block.cols]}",
            found=repr(found)[:80],
            do="take the config.json of the release as it was published",
        )
    return found


_DENSE_MODULES = (
    r"re:.*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$",
    r"re:.*\.attn\.indexer\.wq_b$",
    r"re:.*\.ffn\.shared_experts\.w[123]$",
    r"re:.*\.(e_proj|h_proj|main_proj)$",
    r"re:.*\.engram\.wkv$",
)
# What stays BF16, and Engram tables, which stay as released.
_PLAIN_MODULES = ("head", "embed", r"re:.*\.(head|tok_emb)$", r"re:.*\.gate$", r"re:.*\.compressor\..*",
                  r"re:.*\.indexer\.(weights_proj|wk)$", r"re:.*\.markov_head\..*", r"re:.*\.confidence_head\..*",
                  r"re:.*\.engram\.embed$", r"re:(vision|aligner)\..*")  # fmt: skip


def _compressed_tensors(block: Block) -> dict[str, Any]:
    """quantization_config of compressed-tensors: FP4 experts and FP8 tiles, module names as released."""
    number = {"type": "float", "symmetric": True}
    fp4 = {**number, "num_bits": 4, "strategy": "group", "group_size": CT_FP4.block.cols, "dynamic": False,
           "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}  # fmt: skip
    fp8 = {**number, "num_bits": 8, "strategy": "block", "block_structure": list(block), "dynamic": False}
    activations = {**number, "num_bits": 8, "strategy": "group", "group_size": block.cols, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            "experts": {
                "targets": [r"re:.*\.ffn\.experts\.\d+\.w[123]$"],
                "weights": fp4,
                "input_activations": None,
                "output_activations": None,
                "format": "mxfp4-pack-quantized",
            },
            "dense": {
                "targets": list(_DENSE_MODULES),
                "weights": fp8,
                "input_activations": activations,
                "output_activations": None,
                "format": "float-quantized",
            },
        },
        "ignore": list(_PLAIN_MODULES),
        "kv_cache_scheme": None,
        "version": "0.12.0",  # of the format; readers of that version and later load it
    }


def _modelopt(document: dict[str, Any], expert: Quant) -> dict[str, Any]:
    """What ModelOpt's readers look for beside the released keys. `moe_quant_algo` is the switch of vLLM and SGLang."""
    width = expert.block.cols
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": width}
    layer = {"quant_algo": "NVFP4", "group_size": width}
    return {
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": width,
        "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
        "config_groups": {
            "group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        },
        "quantized_layers": {
            f"layers.{number}.ffn.experts": layer for number in range(_text(document)["num_hidden_layers"])
        },
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
    }


def hf_quant_config(document: dict[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json for a config.json of NVFP4 storage: the same manifest, where ModelOpt's tools look first."""
    manifest = dict(document["quantization_config"])
    producer, ignored = manifest.pop("producer"), manifest.pop("ignore")
    return {"producer": producer, "quantization": {**manifest, "exclude_modules": ignored}}


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
