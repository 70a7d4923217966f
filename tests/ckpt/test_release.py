"""dsv4ckpt.release: what a checkpoint is follows from config and stored dtypes; shipped configs are facts."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4ckpt import config, inventory, sample, source, survey
from dsv4ckpt.errors import MissingScale, UnknownRelease
from dsv4ckpt.formats import QUANTS, Kind, Storage
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES, Identity, Seen, identify, shipped_config

V4 = [name for name in RELEASES if name != "v4.1-flash"]


@functools.cache
def tiny(release: str) -> sample.Sample:
    return sample.plan_sample(sample.SampleOptions(release=release))


def headers(release: str) -> dict[str, Seen]:
    """What the sample's headers say."""
    return {item.name: Seen(item.dtype, item.shape) for file in tiny(release).files for item in file.tensors}


def stored_as(release: str, storage: Storage, namespace: Namespace) -> dict[str, Seen]:
    """The headers of the same model in another storage format or namespace."""
    family = RELEASES[release].family
    logicals = list(inventory.logical_tensors(config.read(tiny(release).document), family))
    layout = inventory.lay_out(logicals, family.table, storage, namespace)
    return {name: Seen(item.dtype, item.shape) for name, item in layout.stored.items()}


def identity(
    release: str,
    seen: dict[str, Seen],
    document: dict[str, Any] | None = None,
    namespace: Namespace = Namespace.DEEPSEEK,
) -> Identity:
    document = tiny(release).document if document is None else document
    return identify(document, config.read(document), seen, namespace)


def with_expert_dtype(release: str, value: object) -> dict[str, Any]:
    """The sample's config with the key removed (None) or changed, wherever the release keeps it."""
    document = json.loads(json.dumps(tiny(release).document))
    for owner in (document, document["quantization_config"]):
        owner.pop("expert_dtype", None)
        if value is not None:
            owner["expert_dtype"] = value
    return document


# ---- detection


@pytest.mark.parametrize("release", RELEASES)
def test_identify_tells_every_release_from_its_sample(release: str) -> None:
    expected = Identity(RELEASES[release], RELEASES[release].storage, Namespace.DEEPSEEK)
    assert identity(release, headers(release)) == expected


@pytest.mark.parametrize("value", [None, "fp4", "fp8", "bf16", 7])
@pytest.mark.parametrize("release", RELEASES)
def test_identify_does_not_listen_to_expert_dtype(release: str, value: object) -> None:
    found = identity(release, headers(release), with_expert_dtype(release, value))
    assert (found.release.name, found.storage) == (release, RELEASES[release].storage)


@pytest.mark.parametrize("release", RELEASES)
def test_identify_does_not_listen_to_quantization_config(release: str) -> None:
    document = {key: value for key, value in tiny(release).document.items() if key != "quantization_config"}
    assert identity(release, headers(release), document).release.name == release


@pytest.mark.parametrize(
    ("release", "misleading"),
    [
        ("flash", "DeepSeek-V4-Pro-Base"),
        ("flash-base", "DeepSeek-V4-Flash"),
        ("pro-0813", "DeepSeek-V4-Flash-0731"),
        ("vision-exp", "DeepSeek-V4.1-Flash"),
    ],
)
def test_survey_does_not_listen_to_the_name_of_the_directory(
    release: str, misleading: str, sample_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(sample_of(release), tmp_path / misleading)
    found = survey.survey(source.open_checkpoint(str(tmp_path / misleading)))
    assert (found.identity.release.name, found.deviations) == (release, [])


@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("release", RELEASES)
def test_identify_tells_native_storage_in_both_namespaces(release: str, namespace: Namespace) -> None:
    native = RELEASES[release].storage
    found = identity(release, stored_as(release, native, namespace), namespace=namespace)
    assert found == Identity(RELEASES[release], native, namespace)


@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("release", RELEASES)
def test_identify_tells_bf16_of_every_release(release: str, namespace: Namespace) -> None:
    document = config.for_bf16(tiny(release).document)
    found = identity(release, stored_as(release, Storage.BF16, namespace), document, namespace)
    assert found == Identity(RELEASES[release], Storage.BF16, namespace)


@pytest.mark.parametrize("release", ["flash", "flash-0731", "pro", "pro-0813"])
def test_identify_tells_the_fp8_repack(release: str) -> None:
    seen = stored_as(release, Storage.FP8, Namespace.DEEPSEEK)
    assert seen["layers.0.ffn.experts.0.w1.weight"] == Seen("F8_E4M3", (128, 256))
    assert seen["layers.0.ffn.experts.0.w1.scale"] == Seen("F8_E8M0", (1, 2))
    found = identity(release, seen, with_expert_dtype(release, None))
    assert (found.release.name, found.storage) == (release, Storage.FP8)


def test_identify_reads_tiles_of_32_from_the_shapes() -> None:
    """Geometry is read, never assumed: V4 names with V4.1's tiles."""
    found = identity("flash", stored_as("flash", Storage.FP4_FP8_32, Namespace.DEEPSEEK))
    assert found.storage is Storage.FP4_FP8_32


@pytest.mark.parametrize("release", ["flash-0731", "pro-0813"])
def test_identify_tells_dspark_though_the_config_says_one_stage(release: str) -> None:
    assert tiny(release).document["num_nextn_predict_layers"] == 1
    assert identity(release, headers(release)).release.name == release
    assert config.read(tiny(release).document).num_stages == 3


@pytest.mark.parametrize("release", ["flash", "v4.1-flash"])
def test_identify_looks_past_a_layer_that_is_not_there(release: str) -> None:
    seen = {name: value for name, value in headers(release).items() if not name.startswith("layers.0.")}
    assert identity(release, seen).release.name == release


# ---- what is refused


def quantized(seen: dict[str, Seen], owner: str, leaf: str, dtype: str) -> dict[str, Seen]:
    """Another dtype for the weights or the scales of experts or shared experts."""
    return {
        name: value._replace(dtype=dtype) if f".ffn.{owner}." in name and name.endswith(leaf) else value
        for name, value in seen.items()
    }


@pytest.mark.parametrize(
    ("release", "owner", "leaf", "dtype"),
    [
        ("flash", "experts", "weight", "U8"),  # packed experts under another dtype
        ("flash", "experts", "weight", "F4"),
        ("flash", "experts", "scale", "F32"),
        ("flash", "experts", "scale", "U8"),
        ("flash", "shared_experts", "scale", "F32"),
        ("flash", "shared_experts", "weight", "I8"),  # a one-byte dtype that is not FP8
        ("flash", "shared_experts", "weight", "F8_E5M2"),
        ("flash", "shared_experts", "weight", "BF16"),
        ("flash-base", "experts", "scale", "F8_E8M0"),  # half repacked
        ("flash-base", "experts", "weight", "BF16"),
        ("flash-base", "experts", "weight", "F8_E4M3FNUZ"),
        ("v4.1-flash", "experts", "weight", "F8_E4M3"),
    ],
)
def test_identify_unknown_mixture_is_refused(release: str, owner: str, leaf: str, dtype: str) -> None:
    with pytest.raises(UnknownRelease) as caught:
        identity(release, quantized(headers(release), owner, leaf, dtype))
    assert caught.value.exit_code == 3
    assert caught.value.facts.keys() >= {"expected", "found", "do"}


@pytest.mark.parametrize(
    ("owner", "shape"),
    [("experts", (128, 16)), ("experts", (64, 8)), ("shared_experts", (2, 4)), ("shared_experts", (256,))],
)
def test_identify_unknown_geometry_is_refused(owner: str, shape: tuple[int, ...]) -> None:
    seen = {
        name: value._replace(shape=shape) if f".ffn.{owner}." in name and name.endswith(".scale") else value
        for name, value in headers("flash").items()
    }
    with pytest.raises(UnknownRelease):
        identity("flash", seen)


@pytest.mark.parametrize("part", [".ffn.experts.", ".ffn.shared_experts."])
def test_identify_without_any_probe_is_refused(part: str) -> None:
    with pytest.raises(UnknownRelease, match="none found"):
        identity("flash", {name: value for name, value in headers("flash").items() if part not in name})


def test_identify_mixed_experts_and_dense_of_two_releases_is_refused() -> None:
    seen = headers("flash")
    base = headers("flash-base")
    mixed = {name: base[name] if ".experts." in name else value for name, value in seen.items()}
    with pytest.raises(UnknownRelease):
        identity("flash", mixed)


# ---- one missing tensor does not hide what the rest is


@pytest.mark.parametrize("release", ["flash", "flash-base", "v4.1-flash"])
@pytest.mark.parametrize("owner", ["shared_experts", "experts.0"])
def test_identify_missing_scale_in_the_first_layer_does_not_hide_the_release(
    release: str, owner: str
) -> None:
    seen = headers(release)
    del seen[f"layers.0.ffn.{owner}.w1.scale"]
    assert identity(release, seen).release.name == release


def without(directory: Path, name: str) -> None:
    """Take one tensor out of a sample's shard and index."""
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = directory / index["weight_map"].pop(name)
    index_file.write_text(json.dumps(index))
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data, begin = json.loads(raw[8:start]), b"", 0
    del header[name]
    for entry in header.values():
        first, last = entry["data_offsets"]
        data += raw[start + first : start + last]
        entry["data_offsets"] = [begin, begin + last - first]
        begin += last - first
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("layer", [0, 1])
def test_survey_names_the_missing_scale_whichever_layer_it_is_in(
    layer: int, sample_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(sample_of("flash"), tmp_path / "src")
    weight = f"layers.{layer}.ffn.shared_experts.w1.weight"
    without(tmp_path / "src", weight.replace("weight", "scale"))
    found = survey.survey(source.open_checkpoint(str(tmp_path / "src")))
    with pytest.raises(MissingScale, match=f"--unit-scale {weight}"):
        found.require_conform()
    excused = survey.survey(source.open_checkpoint(str(tmp_path / "src")), unit_scales=frozenset({weight}))
    assert excused.deviations == []


# ---- the shipped configs are the published ones (checkpoint_format 1.4, 1.6, 1.7)

COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
    "compress_rope_theta": 160000,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "num_nextn_predict_layers": 1,
}
FLASH: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "index_topk": 512,
    "routed_scaling_factor": 1.5,
}
PRO: dict[str, Any] = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "index_topk": 1024,
    "routed_scaling_factor": 2.5,
}
FLASH_RATIOS = [0, 0] + [4, 128] * 20 + [4]
PRO_RATIOS = [128, 128] + [4, 128] * 29 + [4]
DSPARK_FLASH: dict[str, Any] = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}
DSPARK_PRO = {**DSPARK_FLASH, "dspark_target_layer_ids": [58, 59, 60], "dspark_markov_rank": 512}
FP4, FP8 = {"expert_dtype": "fp4"}, {"expert_dtype": "fp8"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "flash": {**COMMON, **FLASH, **FP4, "compress_ratios": [*FLASH_RATIOS, 0]},
    "flash-base": {**COMMON, **FLASH, **FP8, "compress_ratios": [*FLASH_RATIOS, 0]},
    "flash-0731": {**COMMON, **FLASH, **FP4, **DSPARK_FLASH, "compress_ratios": [*FLASH_RATIOS, 0, 0, 0]},
    "pro": {**COMMON, **PRO, **FP4, "compress_ratios": [*PRO_RATIOS, 0]},
    "pro-base": {**COMMON, **PRO, **FP8, "compress_ratios": [*PRO_RATIOS, 0]},
    "pro-0813": {**COMMON, **PRO, **FP4, **DSPARK_PRO, "compress_ratios": [*PRO_RATIOS, 0, 0, 0]},
}


@pytest.mark.parametrize("release", PUBLISHED)
def test_shipped_config_is_the_published_one(release: str) -> None:
    assert shipped_config(release) == PUBLISHED[release]


@pytest.mark.parametrize(
    ("release", "length"), [("flash", 44), ("flash-0731", 46), ("pro", 62), ("pro-0813", 64)]
)
def test_shipped_ratios_have_the_published_length_and_mixture(release: str, length: int) -> None:
    ratios = shipped_config(release)["compress_ratios"]
    layers = ratios[: shipped_config(release)["num_hidden_layers"]]
    assert len(ratios) == length
    counts = [layers.count(ratio) for ratio in (0, 4, 128)]
    assert counts == ([2, 21, 20] if release.startswith("flash") else [0, 30, 31])


def test_shipped_0813_differs_from_0731_in_the_twelve_published_keys() -> None:
    flash, pro = shipped_config("flash-0731"), shipped_config("pro-0813")
    assert flash.keys() == pro.keys()
    different = {key for key in flash if flash[key] != pro[key]}
    assert different == {*FLASH, "compress_ratios", "dspark_target_layer_ids", "dspark_markov_rank"}
    assert len(different) == 12


def test_shipped_vision_config_differs_from_0731_as_published() -> None:
    vision, flash = shipped_config("vision-exp"), shipped_config("flash-0731")
    different = {key for key in vision if vision[key] != flash.get(key)}
    assert different == {"rms_norm_eps", "num_nextn_predict_layers", "vision_config"}
    assert (vision["rms_norm_eps"], vision["num_nextn_predict_layers"]) == (1e-20, 3)
    tower = {
        "depth": 32,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 2816,
        "patch_size": 14,
        "rope_theta": 1e4,
        "downsample": 3,
        "max_n_token": 384,
        "min_pixels": 147456,
        "max_wh_ratio": 8,
    }
    assert vision["vision_config"] == tower


V41_TOP: dict[str, Any] = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "image_token_id": 129264,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    },
}
V41_TEXT: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 5120,
    "moe_intermediate_size": 2304,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1280,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 384,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "swiglu_limit": 10,
    "rms_norm_eps": 1e-20,
    "sliding_window": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0] + [2] * 18 + [1] * 20 + [0, 0, 0],
    "kv_source_layer_ids": [2, 8, 14, 20],
    "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 512,
    "candidate_source_layer_id": 20,
    "candidate_topk_blocks": 2048,
    "candidate_block_size": 8,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384006168, 384016682],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 16000000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99092,
    "num_nextn_predict_layers": 3,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [37, 38, 39],
    "dspark_markov_rank": 256,
    "dspark_n_routed_experts": 128,
    "dspark_num_experts_per_tok": 3,
}


def test_shipped_v41_config_holds_the_published_values() -> None:
    document = shipped_config("v4.1-flash")
    assert {key: document[key] for key in V41_TOP} == V41_TOP
    assert {key: document["text_config"][key] for key in V41_TEXT} == V41_TEXT
    rope = document["text_config"]["rope_scaling"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == (
        "yarn",
        16,
        65536,
    )
    assert "num_hash_layers" not in document["text_config"]
    assert "fmt" not in document["quantization_config"]
    assert document.keys() >= {"text_config", "vision_config"}


@pytest.mark.parametrize("release", V4)
def test_shipped_config_lacks_the_keys_that_are_not_on_disk(release: str) -> None:
    absent = {"pad_token_id", "n_group", "topk_group", "auto_map", "rope_parameters", "layer_types"}
    assert not absent & shipped_config(release).keys()


def test_every_storage_says_how_experts_and_dense_matrices_are_kept() -> None:
    assert set(QUANTS) == set(Storage)
    for storage, quants in QUANTS.items():
        assert not quants if storage is Storage.BF16 else quants.keys() >= {Kind.EXPERT, Kind.DENSE}


def test_shipped_config_that_somebody_changed_comes_unchanged_to_the_next() -> None:
    shipped_config("flash")["rope_scaling"]["factor"] = 1
    assert shipped_config("flash")["rope_scaling"]["factor"] == 16
