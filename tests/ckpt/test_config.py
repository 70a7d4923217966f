"""dsv4ckpt.config: strict reading, and the configs of outputs.  The released configs are the data."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from dsv4ckpt import config, inventory
from dsv4ckpt.errors import BadConfig, Usage
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
