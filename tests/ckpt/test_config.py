"""dsv4ckpt.config: strict reading, and the configs of outputs.  The released configs are the data.

What other tools expect is asked of the tools themselves (transformers, compressed-tensors) where they are installed;
the ModelOpt keys are written out as NVIDIA publishes them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4ckpt import config, inventory
from dsv4ckpt.errors import BadConfig, Usage
from dsv4ckpt.formats import Kind, Storage, Target, storage_of
from dsv4ckpt.release import RELEASES, shipped_config

V4 = [name for name in RELEASES if name != "v4.1-flash"]
DSPARK = [name for name in RELEASES if "dspark_block_size" in json.dumps(shipped_config(name))]


def fresh(release: str) -> dict[str, Any]:
    return copy.deepcopy(shipped_config(release))


def text_of(document: dict[str, Any]) -> dict[str, Any]:
    return document.get("text_config", document)


# ---- for_bf16


@pytest.mark.parametrize("release", RELEASES)
def test_for_bf16_removes_the_quantization_keys_and_keeps_all_else(release: str) -> None:
    document = fresh(release)
    made = config.for_bf16(document)
    gone = {"quantization_config", "expert_dtype"} & document.keys()
    assert "quantization_config" in gone
    assert made == {key: value for key, value in document.items() if key not in gone}
    assert "expert_dtype" not in json.dumps(made) and "fp8" not in json.dumps(made)


@pytest.mark.parametrize("release", ["flash", "v4.1-flash"])
def test_for_bf16_removes_the_quantization_keys_from_text_config(release: str) -> None:
    inner = {
        "hidden_size": 8,
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8"},
        "x": None,
    }
    made = config.for_bf16({**fresh(release), "text_config": inner, "expert_dtype": "fp4"})
    assert made["text_config"] == {"hidden_size": 8, "x": None}


@pytest.mark.parametrize("release", RELEASES)
def test_for_bf16_keeps_the_order_of_keys_and_its_argument(release: str) -> None:
    document = fresh(release)
    made = config.for_bf16(document)
    assert document == shipped_config(release)
    assert list(made) == [key for key in document if key in made]


def test_for_bf16_names_the_dtype_under_whichever_key_is_there() -> None:
    made = config.for_bf16({"torch_dtype": "float8_e4m3fn", "dtype": "float8_e4m3fn"})
    assert made == {"torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_for_bf16_keeps_unknown_keys_of_any_kind() -> None:
    strange = {"a": None, "b": [1, {"c": 2.5}], "d": {"expert_dtypes": 1}, "torch_dtype": "bfloat16"}
    assert config.for_bf16(strange) == strange


@pytest.mark.parametrize("release", RELEASES)
def test_for_bf16_of_its_own_result_changes_nothing(release: str) -> None:
    made = config.for_bf16(fresh(release))
    assert config.for_bf16(made) == made


# ---- for_storage

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
FP8_V41 = {
    "activation_scheme": "dynamic",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [32, 32],
}
EVERY = [(release, target) for release in RELEASES for target in Target]


def target_of(release: str, target: Target) -> Storage:
    return storage_of(target, RELEASES[release].storage)


def stored_as(target: Target, release: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of a release (or of this document of it) for a target."""
    return config.for_storage(document or fresh(release), target_of(release, target), fresh(release))


def keys_of(value: object) -> set[str]:
    """Every key in a JSON value, at any depth."""
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    return {key for inner in value for key in keys_of(inner)} if isinstance(value, list) else set()


@pytest.mark.parametrize("release", RELEASES)
def test_for_storage_bf16_is_for_bf16(release: str) -> None:
    assert stored_as(Target.BF16, release) == config.for_bf16(fresh(release))


@pytest.mark.parametrize(("release", "target"), EVERY)
def test_for_storage_and_back_gives_the_shipped_config_with_its_order(release: str, target: Target) -> None:
    made = stored_as(target, release)
    back = stored_as(Target.NATIVE, release, made)
    assert json.dumps(back) == json.dumps(shipped_config(release))


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("release", ["flash", "flash-base", "vision-exp", "v4.1-flash"])
def test_for_storage_does_not_depend_on_the_format_it_comes_from(release: str, target: Target) -> None:
    direct = json.dumps(stored_as(target, release))
    for way in Target:
        assert json.dumps(stored_as(target, release, stored_as(way, release))) == direct


@pytest.mark.parametrize(("release", "target"), EVERY)
def test_for_storage_keeps_every_other_key_and_its_arguments(release: str, target: Target) -> None:
    document, native = {**fresh(release), "own": [1, None]}, fresh(release)
    before = copy.deepcopy((document, native))
    made = config.for_storage(document, target_of(release, target), native)
    assert (document, native) == before
    changing = {"quantization_config", "expert_dtype"}
    assert {k: v for k, v in made.items() if k not in changing} == {
        k: v for k, v in document.items() if k not in changing
    }


@pytest.mark.parametrize(
    ("target", "word"),
    [(Target.FP8, None), (Target.FP8_F32SCALE, "fp8"), (Target.NVFP4, "fp4"), (Target.MXFP4_CT, None)],
)
@pytest.mark.parametrize("release", V4)
def test_for_storage_says_expert_dtype_where_readers_want_it(
    release: str, target: Target, word: str | None
) -> None:
    made = stored_as(target, release)
    assert made.get("expert_dtype") == word
    assert ("expert_dtype" in made) == (word is not None)
    assert "expert_dtype" not in made["quantization_config"]


@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE])
@pytest.mark.parametrize("release", V4)
def test_for_storage_fp8_has_quantization_config_as_released(release: str, target: Target) -> None:
    assert stored_as(target, release)["quantization_config"] == FP8


def test_for_storage_fp8_of_v41_says_expert_dtype_inside_or_not_at_all() -> None:
    sglang = stored_as(Target.FP8, "v4.1-flash")
    assert sglang["quantization_config"] == FP8_V41 and "expert_dtype" not in keys_of(sglang)
    vllm = stored_as(Target.FP8_F32SCALE, "v4.1-flash")
    assert vllm["quantization_config"] == {**FP8_V41, "expert_dtype": "fp8"} and "expert_dtype" not in vllm


@pytest.mark.parametrize(("release", "target"), EVERY)
def test_for_storage_leaves_no_key_of_another_format(release: str, target: Target) -> None:
    own = {
        Target.NVFP4: {"moe_quant_algo", "quant_algo", "quantized_layers", "producer", "config_groups"},
        Target.MXFP4_CT: {"quantization_status", "config_groups", "format", "kv_cache_scheme"},
    }
    foreign = set().union(*own.values(), {"compression_config"}) - own.get(target, set())
    if target in (Target.BF16, Target.MXFP4_CT):
        foreign |= FP8.keys() - {"quant_method"}
    for way in Target:
        document = {**stored_as(way, release), "compression_config": {"format": "x"}}
        assert not keys_of(stored_as(target, release, document)) & foreign


def test_for_storage_takes_the_dtype_key_of_the_release() -> None:
    """transformers 5 writes `dtype`."""
    document = {key: value for key, value in fresh("flash").items() if key != "torch_dtype"}
    made = stored_as(Target.NATIVE, "flash", {**document, "dtype": "bfloat16"})
    assert json.dumps(made) == json.dumps(shipped_config("flash"))


@pytest.mark.parametrize("target", [target for target in Target if target is not Target.BF16])
def test_for_storage_writes_no_model_type_of_launchers(target: Target) -> None:
    """The mirror of the published FP8 repackage says deepseek_ref."""
    made = stored_as(target, "flash", {**fresh("flash"), "model_type": "deepseek_ref"})
    assert made["model_type"] == "deepseek_v4"
    assert stored_as(target, "v4.1-flash")["model_type"] == "deepseek_v41"


@pytest.mark.parametrize("release", V4)
def test_for_storage_nvfp4_is_what_nvidia_publishes(release: str) -> None:
    floats = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    layers = fresh(release)["num_hidden_layers"]
    assert stored_as(Target.NVFP4, release)["quantization_config"] == {
        **FP8,
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
        "config_groups": {"group_0": {"input_activations": floats, "weights": floats, "targets": ["Linear"]}},
        "quantized_layers": {
            f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}
            for layer in range(layers)
        },
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
    }


def test_for_storage_nvfp4_of_v41_keeps_what_the_release_says() -> None:
    made = stored_as(Target.NVFP4, "v4.1-flash")
    assert {**FP8_V41, "expert_dtype": "fp4"}.items() <= made["quantization_config"].items()
    assert made["expert_dtype"] == "fp4"
    assert len(made["quantization_config"]["quantized_layers"]) == 40


@pytest.mark.parametrize("release", RELEASES)
def test_for_storage_nvfp4_names_the_layers_of_a_subset(release: str) -> None:
    document = config.for_subset(fresh(release), (0, 1, 2, 3), keep_mtp=False)
    rows = stored_as(Target.NVFP4, release, document)["quantization_config"]["quantized_layers"]
    assert list(rows) == [f"layers.{layer}.ffn.experts" for layer in range(4)]


@pytest.mark.parametrize("release", ["flash", "v4.1-flash"])
def test_hf_quant_config_is_the_same_manifest_under_modelopts_keys(release: str) -> None:
    made = stored_as(Target.NVFP4, release)
    before = copy.deepcopy(made)
    found = config.hf_quant_config(made)
    assert made == before
    assert list(found) == ["producer", "quantization"]
    assert found["producer"] == {"name": "modelopt", "version": "dsv4-nvfp4-experts"}
    manifest = found["quantization"]
    assert manifest["exclude_modules"] == made["quantization_config"]["ignore"]
    assert "ignore" not in manifest and "producer" not in manifest
    same = {key: value for key, value in manifest.items() if key != "exclude_modules"}
    assert same.items() <= made["quantization_config"].items()
    assert {"quant_algo", "kv_cache_quant_algo", "quantized_layers", "config_groups"} <= same.keys()


def groups_of(release: str) -> dict[str, Any]:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    made = stored_as(Target.MXFP4_CT, release)["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(made)
    return {"parsed": parsed, **{group.format: group for group in parsed.config_groups.values()}}


@pytest.mark.parametrize(
    ("release", "tile"), [(name, 32 if name == "v4.1-flash" else 128) for name in RELEASES]
)
def test_for_storage_compressed_tensors_is_what_the_package_reads(release: str, tile: int) -> None:
    scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    groups = groups_of(release)
    parsed = groups.pop("parsed")
    assert set(groups) == {"mxfp4-pack-quantized", "float-quantized"}
    assert (parsed.quant_method, parsed.format) == ("compressed-tensors", "mixed-precision")
    assert parsed.quantization_status == "compressed"
    experts, dense = groups["mxfp4-pack-quantized"], groups["float-quantized"]
    assert experts.weights == scheme.MXFP4A16["weights"] and experts.input_activations is None
    preset = copy.deepcopy(scheme.FP8_BLOCK)
    preset["weights"].block_structure = [tile, tile]
    preset["input_activations"].group_size = tile
    assert (dense.weights, dense.input_activations) == (preset["weights"], preset["input_activations"])


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("release", RELEASES)
def test_for_storage_compressed_tensors_targets_exactly_the_modules_that_are_quantized(
    release: str, prefix: str
) -> None:
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    groups = groups_of(release)
    ignored = groups.pop("parsed").ignore
    wanted = {
        Kind.EXPERT: {"mxfp4-pack-quantized"},
        Kind.DRAFT_EXPERT: {"mxfp4-pack-quantized"},
        Kind.DENSE: {"float-quantized"},
    }
    document = fresh(release)
    text_of(document)["n_routed_experts"] = 6
    for item in inventory.logical_tensors(config.read(document), RELEASES[release].family):
        module, _, leaf = item.name.rpartition(".")
        if leaf != "weight":
            continue
        name = (prefix if module.startswith("layers.") else "") + module
        hit = {kind for kind, group in groups.items() if any(match_name(name, t) for t in group.targets)}
        skipped = any(match_name(name, pattern) for pattern in ignored)
        assert hit == wanted.get(item.kind, set()), name
        assert not (hit and skipped), name
        if len(item.shape) == 2 and not hit:
            assert skipped, f"{name} is a matrix in neither list"


@pytest.mark.parametrize(
    "module", ["vision.blocks.0.attn.qkv", "aligner.w1", "mtp.0.head", "mtp.0.emb.tok_emb"]
)
def test_for_storage_compressed_tensors_ignores_the_vision_side_and_the_copies_of_base(module: str) -> None:
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    assert any(match_name(module, pattern) for pattern in groups_of("flash")["parsed"].ignore)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("release", V4)
def test_transformers_reads_the_configs_of_every_target(release: str, target: Target, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = stored_as(target, release)
    (tmp_path / "config.json").write_text(json.dumps(made))
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(found).__name__ == "DeepseekV4Config"
    read = getattr(found, "quantization_config", {})  # transformers adds expert_dtype to it
    assert {**read, **made.get("quantization_config", {})} == read
    assert bool(read) == (target is not Target.BF16)
    assert read.get("expert_dtype") == made.get("expert_dtype")


@pytest.mark.parametrize("release", RELEASES)
def test_transformers_reads_the_compressed_tensors_quantization(release: str) -> None:
    pytest.importorskip("compressed_tensors")
    module = pytest.importorskip("transformers.utils.quantization_config")
    made = stored_as(Target.MXFP4_CT, release)["quantization_config"]
    assert module.CompressedTensorsConfig.from_dict(made).is_quantized


QUANTIZED = [target for target in Target if target is not Target.BF16]


@pytest.mark.parametrize(
    "sizes",
    [None, [64, 64], [128], [128, 128, 1], "128x128", 128, [128.0, 128.0], [True, True], ["128", "128"]],
)
@pytest.mark.parametrize("target", QUANTIZED)
def test_for_storage_refuses_a_release_whose_tiles_are_not_those_of_the_storage(
    target: Target, sizes: object
) -> None:
    native = {**fresh("flash"), "quantization_config": {**FP8, "weight_block_size": sizes}}
    with pytest.raises(BadConfig) as caught:
        config.for_storage(fresh("flash"), target_of("flash", target), native)
    assert {"file", "expected", "found", "do"} <= caught.value.facts.keys()
    assert "[128, 128]" in caught.value.facts["expected"] and caught.value.exit_code == 3


@pytest.mark.parametrize("broken", [None, [], "fp8", {}, {"quant_method": "fp8"}])
@pytest.mark.parametrize("target", QUANTIZED)
def test_for_storage_refuses_a_release_without_its_quantization(target: Target, broken: object) -> None:
    native = fresh("flash")
    for given in ({**native, "quantization_config": broken}, config.for_bf16(native)):
        with pytest.raises(BadConfig, match="quantization"):
            config.for_storage(fresh("flash"), target_of("flash", target), given)


def test_for_storage_refuses_the_tiles_of_another_release() -> None:
    with pytest.raises(BadConfig, match=r"\[32, 32\]"):
        config.for_storage(fresh("v4.1-flash"), Storage.FP8_32, fresh("flash"))


def test_for_storage_bf16_needs_nothing_of_the_release() -> None:
    assert config.for_storage(fresh("flash"), Storage.BF16, {}) == config.for_bf16(fresh("flash"))


# ---- for_subset


def test_for_subset_layers_0_to_3_of_flash_keeping_mtp() -> None:
    made = config.for_subset(fresh("flash"), (0, 1, 2, 3), keep_mtp=True)
    changed = {key: made[key] for key in made if made[key] != shipped_config("flash")[key]}
    assert changed == {"num_hidden_layers": 4, "compress_ratios": [0, 0, 4, 128, 0]}
    assert made["num_hash_layers"] == 3 and made["num_nextn_predict_layers"] == 1


def test_for_subset_layers_0_to_3_of_flash_dropping_mtp() -> None:
    made = config.for_subset(fresh("flash"), (0, 1, 2, 3), keep_mtp=False)
    changed = {key: made[key] for key in made if made[key] != shipped_config("flash")[key]}
    assert changed == {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 0, 4, 128],
        "num_nextn_predict_layers": 0,
    }


@pytest.mark.parametrize(
    ("layers", "num_hash"), [((0,), 1), ((0, 1), 2), ((1, 2, 3), 2), ((2, 7), 1), ((3, 9), 0)]
)
def test_for_subset_counts_the_hash_layers_that_stay(layers: tuple[int, ...], num_hash: int) -> None:
    assert config.for_subset(fresh("flash"), layers, keep_mtp=True)["num_hash_layers"] == num_hash


@pytest.mark.parametrize("release", V4)
def test_for_subset_takes_the_ratio_of_each_layer_and_of_each_stage(release: str) -> None:
    document, layers = fresh(release), (1, 2, 5, 30, 41)
    ratios, num_layers = document["compress_ratios"], document["num_hidden_layers"]
    kept = config.for_subset(document, layers, keep_mtp=True)["compress_ratios"]
    assert kept == [ratios[layer] for layer in layers] + ratios[num_layers:]
    dropped = config.for_subset(document, layers, keep_mtp=False)["compress_ratios"]
    assert dropped == [ratios[layer] for layer in layers]


@pytest.mark.parametrize(
    ("layers", "targets"),
    [
        ((0, 1, 2, 3), [1, 2, 3]),  # the tapped layers are gone: the last ones
        ((0, 40, 41, 42), [1, 2, 3]),  # they stay, under new numbers
        ((40, 41, 42), [0, 1, 2]),
        ((5, 40, 41), [0, 1, 2]),  # only some stay: the last ones
        ((1, 2, 40, 41, 42), [2, 3, 4]),
    ],
)
def test_for_subset_points_dspark_at_layers_that_exist(layers: tuple[int, ...], targets: list[int]) -> None:
    assert config.for_subset(fresh("flash-0731"), layers, keep_mtp=True)["dspark_target_layer_ids"] == targets


@pytest.mark.parametrize("release", DSPARK)
@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_for_subset_with_fewer_layers_than_dspark_taps_is_refused(
    release: str, layers: tuple[int, ...]
) -> None:
    with pytest.raises(Usage, match="--mtp drop") as caught:
        config.for_subset(fresh(release), layers, keep_mtp=True)
    assert caught.value.exit_code == 2
    assert text_of(config.for_subset(fresh(release), layers, keep_mtp=False))["num_hidden_layers"] == len(
        layers
    )


@pytest.mark.parametrize("release", DSPARK)
def test_for_subset_dropping_the_stages_leaves_no_dspark_key(release: str) -> None:
    document = fresh(release)
    every = tuple(range(text_of(document)["num_hidden_layers"]))
    for layers in (every, every[:4]):
        made = config.for_subset(document, layers, keep_mtp=False)
        assert "dspark_" not in json.dumps(made)
        model = config.read(made)
        assert (model.num_stages, model.dspark_targets) == (0, ())


@pytest.mark.parametrize("release", RELEASES)
def test_for_subset_of_everything_is_the_config_itself(release: str) -> None:
    document = fresh(release)
    every = tuple(range(text_of(document)["num_hidden_layers"]))
    assert config.for_subset(document, every, keep_mtp=True) == shipped_config(release)


@pytest.mark.parametrize("release", RELEASES)
def test_for_subset_leaves_its_argument_alone(release: str) -> None:
    document = fresh(release)
    config.for_subset(document, (0, 1, 2, 3), keep_mtp=False)
    config.for_subset(document, (0, 1, 2, 3), keep_mtp=True)
    assert document == shipped_config(release)


@pytest.mark.parametrize("layers", [(1, 2, 3), (0, 2), (0, 1, 3), (39,)])
@pytest.mark.parametrize("keep_mtp", [True, False])
def test_for_subset_of_v41_that_does_not_start_at_0_is_refused(
    layers: tuple[int, ...], keep_mtp: bool
) -> None:
    with pytest.raises(Usage, match="source layers"):
        config.for_subset(fresh("v4.1-flash"), layers, keep_mtp=keep_mtp)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (4, ([2], [2], -1, [1], [384006168])),
        (1, ([], [], -1, [], [])),
        (15, ([2, 8, 14], [2, 8, 14], -1, [1, 14], [384006168, 384016682])),
        (21, ([2, 8, 14, 20], [2, 8, 14, 20], 20, [1, 14], [384006168, 384016682])),
    ],
)
def test_for_subset_of_v41_keeps_the_sources_and_tables_that_stay(
    num_layers: int, expected: tuple[Any, ...]
) -> None:
    layers = tuple(range(num_layers))
    made = config.for_subset(fresh("v4.1-flash"), layers, keep_mtp=False)
    text = made["text_config"]
    keys = (
        "kv_source_layer_ids",
        "index_source_layer_ids",
        "candidate_source_layer_id",
        "engram_layer_ids",
        "engram_num_embeddings",
    )
    assert tuple(text[key] for key in keys) == expected
    assert {key: value for key, value in made.items() if key != "text_config"} == {
        key: value for key, value in shipped_config("v4.1-flash").items() if key != "text_config"
    }


SELECTIONS = [(0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 5, 30, 41), (3, 4, 5), tuple(range(40))]
CASES = [
    pytest.param(release, layers, id=f"{release}-{len(layers)}-from-{layers[0]}")
    for release in RELEASES
    for layers in SELECTIONS
    if layers[0] == 0 or release in V4  # V4.1 selections start at layer 0
]


@pytest.mark.parametrize("keep_mtp", [True, False])
@pytest.mark.parametrize(("release", "layers"), CASES)
def test_for_subset_asks_for_exactly_the_tensors_of_the_layers_that_stay(
    release: str, layers: tuple[int, ...], keep_mtp: bool
) -> None:
    """The config of the smaller model and the renumbered tensors of the larger one agree, shapes included."""
    document, family = fresh(release), RELEASES[release].family
    text_of(document)["n_routed_experts"] = 6
    if "dspark_n_routed_experts" in text_of(document):
        text_of(document)["dspark_n_routed_experts"] = 6
    number = {str(layer): str(index) for index, layer in enumerate(layers)}
    expected = set()
    for item in inventory.logical_tensors(config.read(document), family):
        parts = item.name.split(".")
        if parts[0] == "layers" and parts[1] in number:
            expected.add(item._replace(name=".".join(["layers", number[parts[1]], *parts[2:]])))
        elif parts[0] != "layers" and (parts[0] != "mtp" or keep_mtp):
            expected.add(item)
    made = config.read(config.for_subset(document, layers, keep_mtp=keep_mtp))
    assert set(inventory.logical_tensors(made, family)) == expected


# ---- read


def test_read_takes_the_numbers_that_decide_shapes() -> None:
    model = config.read(fresh("pro-0813"))
    assert (model.hidden, model.num_heads, model.q_lora_rank, model.o_groups) == (7168, 128, 1536, 16)
    assert (model.num_layers, model.num_stages, model.num_hash_layers, model.num_experts) == (61, 3, 3, 384)
    assert (model.dspark_targets, model.dspark_rank, model.dspark_num_experts) == ((58, 59, 60), 512, 384)


def test_read_v41_takes_its_own_numbers() -> None:
    model = config.read(fresh("v4.1-flash"))
    assert model.engram_rows == ((1, 384006168), (14, 384016682))
    assert (model.engram_columns, model.engram_width) == (3 * 8, 256)
    assert (model.num_hash_layers, model.num_stages, model.dspark_num_experts) == (0, 3, 128)


def test_read_counts_the_stages_by_the_ratios_not_by_nextn() -> None:
    assert [config.read(fresh(name)).num_stages for name in ("flash", "flash-0731", "vision-exp")] == [
        1,
        3,
        3,
    ]


def test_read_without_draft_stages() -> None:
    model = config.read({**fresh("flash"), "num_nextn_predict_layers": 0})
    assert model.num_stages == 0


BREAKING: dict[str, Callable[[dict[str, Any]], object]] = {
    "hidden_size is absent": lambda text: text.pop("hidden_size"),
    "hidden_size is a string": lambda text: text.update(hidden_size="4096"),
    "hidden_size is a bool": lambda text: text.update(hidden_size=True),
    "hidden_size is a float": lambda text: text.update(hidden_size=4096.0),
    "hidden_size is null": lambda text: text.update(hidden_size=None),
    "hidden_size is 0": lambda text: text.update(hidden_size=0),
    "hidden_size is negative": lambda text: text.update(hidden_size=-2),
    "hidden_size is enormous": lambda text: text.update(hidden_size=2**40),
    "hidden_size is odd": lambda text: text.update(hidden_size=4097),
    "moe_intermediate_size is odd": lambda text: text.update(moe_intermediate_size=2047),
    "o_groups is no divisor": lambda text: text.update(o_groups=7),
    "num_hidden_layers is enormous": lambda text: text.update(num_hidden_layers=10**6),
    "n_routed_experts is enormous": lambda text: text.update(n_routed_experts=10**9),
    "compress_ratios is absent": lambda text: text.pop("compress_ratios"),
    "compress_ratios is no list": lambda text: text.update(compress_ratios={"0": 4}),
    "compress_ratios is short": lambda text: text.update(compress_ratios=[0, 0, 4]),
    "compress_ratios has no stage": lambda text: text["compress_ratios"].pop(),
    "compress_ratios is long": lambda text: text["compress_ratios"].extend([0] * 9),
    "compress_ratios holds a float": lambda text: text["compress_ratios"].__setitem__(0, 4.0),
    "compress_ratios holds a bool": lambda text: text["compress_ratios"].__setitem__(0, True),
    "compress_ratios holds a negative": lambda text: text["compress_ratios"].__setitem__(0, -4),
    "num_hash_layers is too large": lambda text: text.update(num_hash_layers=44),
    "routed_scaling_factor is a string": lambda text: text.update(routed_scaling_factor="1.5"),
    "routed_scaling_factor is infinite": lambda text: text.update(routed_scaling_factor=float("inf")),
    "rms_norm_eps is absent": lambda text: text.pop("rms_norm_eps"),
    "num_nextn_predict_layers is negative": lambda text: text.update(num_nextn_predict_layers=-1),
}


@pytest.mark.parametrize("problem", BREAKING)
def test_read_refuses_a_broken_config_and_names_the_key(problem: str) -> None:
    document = fresh("flash")
    BREAKING[problem](document)
    with pytest.raises(BadConfig) as caught:
        config.read(document)
    assert problem.split()[0] in str(caught.value)
    assert caught.value.exit_code == 3
    assert {"file", "expected", "found"} <= caught.value.facts.keys()


@pytest.mark.parametrize("targets", [[], [43], [-1], "42", None, [True], [0] * 9])
def test_read_refuses_dspark_targets_that_are_no_layers(targets: object) -> None:
    with pytest.raises(BadConfig, match="dspark_target_layer_ids"):
        config.read({**fresh("flash-0731"), "dspark_target_layer_ids": targets})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engram_num_embeddings", [5]),
        ("engram_layer_ids", [1, 40]),
        ("engram_max_ngram_size", None),
        ("kv_source_layer_ids", [40]),
        ("index_source_layer_ids", 2),
    ],
)
def test_read_refuses_a_broken_v41_config_and_says_where(key: str, value: object) -> None:
    document = fresh("v4.1-flash")
    document["text_config"][key] = value
    with pytest.raises(BadConfig, match=r"text_config\.engram_num_embeddings|text_config\." + key):
        config.read(document)


@pytest.mark.parametrize(
    "model_type", [None, "deepseek_v3", "deepseek_v32", "DEEPSEEK_V4", 4, ["deepseek_v4"]]
)
def test_read_refuses_other_models(model_type: object) -> None:
    with pytest.raises(BadConfig, match="no DeepSeek-V4"):
        config.read({**fresh("flash"), "model_type": model_type})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'"x"',
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe{}",
        b"{} {}",
    ],
)
def test_parse_refuses_what_is_no_strict_json_object(data: bytes) -> None:
    with pytest.raises(BadConfig):
        config.parse(data)


def test_parse_keeps_floats_large_integers_and_order() -> None:
    document = config.parse(b'{"b": 1e-20, "a": 9007199254740993, "c": 10.0}')
    assert list(document.items()) == [("b", 1e-20), ("a", 9007199254740993), ("c", 10.0)]
