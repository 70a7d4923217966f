"""The released configs: accepted or refused, key by key; and the model that they make, name by name at full size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_model import tiny_document

from dsv4ckpt import config as configs
from dsv4ckpt import inventory
from dsv4ckpt.errors import BadConfig
from dsv4ckpt.formats import Storage
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES, shipped_config
from dsv4model.config import Config, Yarn, is_kept_wide
from dsv4model.model import Model, dtype_of

# release -> MTP blocks; 0731 and 0813 have DSpark stages instead
NUM_MTP = {"flash": 1, "flash-base": 1, "pro": 1, "pro-base": 1, "flash-0731": 0, "pro-0813": 0}
REFUSED = {"v4.1-flash": "V4.1", "vision-exp": "Vision-Exp"}
releases = pytest.mark.parametrize("release", NUM_MTP)

COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_hash_layers", "num_nextn_predict_layers",
    "num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
    "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
MAY_BE_ZERO = ("num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")
NUMBERS = (
    "routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta",
    "initializer_range",
)  # fmt: skip
FIXED = (
    "scoring_func", "hidden_act", "norm_topk_prob", "attention_bias", "tie_word_embeddings", "num_key_value_heads",
    "n_shared_experts",
)  # fmt: skip
YARN_NUMBERS = ("factor", "beta_fast", "beta_slow")
YARN_COUNTS = ("original_max_position_embeddings",)


def refused(key: str, change: Callable[[dict[str, Any]], object]) -> BadConfig:
    """The error for a tiny document that was changed; it names the key and the file and says what to do."""
    document = copy.deepcopy(tiny_document())
    Config.read(document)
    change(document)
    with pytest.raises(BadConfig) as caught:
        Config.read(document)
    assert key in caught.value.what
    assert caught.value.facts["file"] == "config.json" and caught.value.facts["do"]
    return caught.value


# ---- releases


@releases
def test_released_config_is_read_with_the_mtp_blocks_that_its_files_hold(release: str) -> None:
    document = shipped_config(release)
    config = Config.read(document)
    assert config.num_mtp == NUM_MTP[release]
    assert config.num_layers == len(config.compress_ratios) == document["num_hidden_layers"]
    assert set(config.compress_ratios) == ({0, 4, 128} if "flash" in release else {4, 128})
    assert config.yarn == Yarn(16.0, 65536, 32.0, 1.0)


def test_every_number_of_the_flash_config_stands_where_it_belongs() -> None:
    document = shipped_config("flash")
    assert Config.read(document) == Config(
        vocab=129280, hidden=4096, num_layers=43, num_hash_layers=3, num_mtp=1, num_heads=64, head_dim=512,
        rope_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, window=128,
        compress_ratios=(0, 0, *[4, 128] * 20, 4), index_num_heads=64, index_head_dim=128, index_topk=512,
        num_experts=256, experts_per_token=6, intermediate=2048, routed_scaling=1.5, swiglu_limit=10.0,
        clamps_shared=True, hc_mult=4, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6, rope_theta=10000.0,
        compress_theta=160000.0, yarn=Yarn(16.0, 65536, 32.0, 1.0), max_positions=1048576, init_std=0.02, bos=0,
        eos=1,
    )  # fmt: skip


@pytest.mark.parametrize("release", REFUSED)
def test_config_of_another_architecture_is_refused_by_its_name(release: str) -> None:
    with pytest.raises(BadConfig) as caught:
        Config.read(shipped_config(release))
    assert REFUSED[release] in caught.value.what and "dsv4model" in caught.value.what
    assert "dsv4 inspect" in caught.value.facts["do"]


def test_every_release_is_either_accepted_or_refused_here() -> None:
    assert set(RELEASES) == set(NUM_MTP) | set(REFUSED)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", None, 4])
def test_config_of_another_model_is_refused(model_type: object) -> None:
    refused("no DeepSeek-V4", lambda document: document.update(model_type=model_type))


# ---- keys


@pytest.mark.parametrize("key", [*COUNTS, *NUMBERS, *FIXED, "compress_ratios"])
def test_missing_key_is_refused_by_its_name(key: str) -> None:
    error = refused(key, lambda document: document.pop(key))
    assert error.facts["found"] == "nothing"


@pytest.mark.parametrize("value", ["8", None, True, 8.0, [8], {}, -1, 2**70], ids=repr)
@pytest.mark.parametrize("key", COUNTS)
def test_count_of_another_type_or_out_of_bounds_is_refused_by_its_name(key: str, value: object) -> None:
    refused(key, lambda document: document.update({key: value}))


@pytest.mark.parametrize("key", [key for key in COUNTS if key not in MAY_BE_ZERO])
def test_count_of_zero_is_refused_by_its_name(key: str) -> None:
    refused(key, lambda document: document.update({key: 0}))


@pytest.mark.parametrize("value", ["1.5", None, True, [1.5], math.nan, math.inf, -math.inf], ids=repr)
@pytest.mark.parametrize("key", NUMBERS)
def test_number_of_another_type_or_not_finite_is_refused_by_its_name(key: str, value: object) -> None:
    refused(key, lambda document: document.update({key: value}))


@pytest.mark.parametrize("key", NUMBERS)
def test_number_that_no_float_holds_is_refused_by_its_name(key: str) -> None:
    refused(key, lambda document: document.update({key: 10**400}))


@pytest.mark.parametrize("key", NUMBERS)
def test_negative_number_is_refused_by_its_name(key: str) -> None:
    refused(key, lambda document: document.update({key: -0.5}))


@pytest.mark.parametrize("key", [key for key in NUMBERS if key != "swiglu_limit"])
def test_number_of_zero_is_refused_by_its_name(key: str) -> None:
    refused(key, lambda document: document.update({key: 0}))


@pytest.mark.parametrize("key", FIXED)
@pytest.mark.parametrize("value", ["sigmoid", None, 2, -1, []], ids=repr)
def test_value_that_would_make_another_model_is_refused_by_its_key(key: str, value: object) -> None:
    refused(key, lambda document: document.update({key: value}))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("qk_rope_head_dim", {"qk_rope_head_dim": 15}),  # pairs
        ("qk_rope_head_dim", {"qk_rope_head_dim": 34}),  # of a head of 32
        ("qk_rope_head_dim", {"index_head_dim": 8}),
        ("num_experts_per_tok", {"num_experts_per_tok": 9}),
        ("o_groups", {"o_groups": 3}),
        ("num_hash_layers", {"num_hash_layers": 5}),
        ("rope_theta", {"rope_theta": 1}),
        ("compress_rope_theta", {"compress_rope_theta": 1.0}),
        ("bos_token_id", {"bos_token_id": 128}),
        ("eos_token_id", {"eos_token_id": 128}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4]}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4, 128]}),  # nothing for the MTP block
        ("compress_ratios", {"compress_ratios": [0, 0, 4, 128, 4]}),  # whose ratio is 0
        ("compress_ratios", {"compress_ratios": "0"}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4, -128, 0]}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4, 128.0, 0]}),
        (
            "num_nextn_predict_layers",
            {"compress_ratios": [0, 0, 4, 128, 0, 0], "num_nextn_predict_layers": 2},
        ),
        ("swiglu_limit", {"swiglu_limit": -10.0}),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_refused_by_the_key(key: str, changes: dict[str, Any]) -> None:
    refused(key, lambda document: document.update(changes))


@pytest.mark.parametrize("key", [*YARN_NUMBERS, *YARN_COUNTS, "type"])
@pytest.mark.parametrize("value", ["missing", None, "linear", True, 0, -1, math.nan], ids=repr)
def test_rope_scaling_that_is_not_yarn_is_refused_by_its_key(key: str, value: object) -> None:
    def change(document: dict[str, Any]) -> None:
        document["rope_scaling"][key] = value
        if value == "missing":
            del document["rope_scaling"][key]

    refused(f"rope_scaling.{key}", change)


@pytest.mark.parametrize("value", [[], "yarn", 16, True], ids=repr)
def test_rope_scaling_that_is_no_object_is_refused(value: object) -> None:
    refused("rope_scaling", lambda document: document.update(rope_scaling=value))


def test_missing_rope_scaling_is_refused() -> None:
    """A tool that renamed the key would otherwise get a model that forgets after its first 65,536 tokens."""
    refused("rope_scaling", lambda document: document.pop("rope_scaling"))


def test_rope_scaling_may_be_null_and_its_type_spelled_anew() -> None:
    assert Config.read(tiny_document(rope_scaling=None)).yarn is None
    document = tiny_document()
    scaling = document.pop("rope_scaling")
    renewed = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    assert Config.read(document | {"rope_scaling": renewed}) == Config.read(tiny_document())


@pytest.mark.parametrize("key", ["swiglu_limit", "num_hash_layers", "bos_token_id"])
def test_zero_is_taken_where_it_means_something(key: str) -> None:
    assert Config.read(tiny_document(**{key: 0}))


def test_reading_changes_nothing_in_the_document_and_ignores_other_keys() -> None:
    document = tiny_document(transformers_version="6", pad_token_id=None)
    before = copy.deepcopy(document)
    assert Config.read(document) == Config.read(tiny_document())
    assert document == before


# ---- the model that it makes


def laid_out(release: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of the BF16 checkpoint of a release in transformers' names, less what no model holds."""
    family, model = RELEASES[release].family, configs.read(shipped_config(release))
    logicals = [
        logical
        for logical in inventory.logical_tensors(model, family)
        if not logical.name.startswith("mtp." if not NUM_MTP[release] else ("mtp.0.emb.", "mtp.0.head."))
    ]
    layout = inventory.lay_out(logicals, family.table, Storage.BF16, Namespace.TRANSFORMERS)
    return {name: (stored.dtype, tuple(stored.shape)) for name, stored in layout.stored.items()}


@pytest.mark.slow
@releases
def test_model_at_full_size_has_exactly_the_tensors_of_the_release(release: str) -> None:
    with torch.device("meta"):
        model = Model(Config.read(shipped_config(release)))
    expected = laid_out(release)
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == {name: shape for name, (_, shape) in expected.items()}
    assert found.keys() == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, (dtype, _) in expected.items():
        if dtype == "F32":
            assert is_kept_wide(name) and dtype_of(name, torch.bfloat16) == torch.float32
        elif dtype == "I64":
            assert model.get_buffer(name).dtype == torch.int64
        else:
            assert dtype == "BF16" and is_kept_wide(name) == name.endswith("norm.weight"), name


@pytest.mark.slow
def test_number_of_parameters_is_the_published_one() -> None:
    """Flash without MTP, without hash tables and router biases, which are buffers; and what its MTP block has."""
    with torch.device("meta"):
        model = Model(Config.read(shipped_config("flash")))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    backbone = sum(size for name, size in sizes.items() if not name.startswith("mtp."))
    assert backbone == 284_332_230_231
    assert sum(sizes.values()) - backbone == 6_610_048_891 - 256  # less its router bias
    tables = [value for name, value in model.named_buffers() if name.endswith("tid2eid")]
    assert sum(table.numel() * 8 for table in tables) == 18_616_320


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("model.layers.0.attn_hc.fn", True),
        ("model.layers.0.ffn_hc.scale", True),
        ("model.hc_head.hc_base", True),
        ("mtp.0.hc_head.hc_fn", True),
        ("model.layers.3.self_attn.sinks", True),
        ("model.layers.3.self_attn.compressor.position_bias", True),
        ("model.layers.2.self_attn.compressor.indexer.position_bias", True),
        ("model.layers.3.mlp.gate.e_score_correction_bias", True),
        ("model.layers.3.self_attn.kv_norm.weight", True),
        ("model.layers.3.self_attn.compressor.kv_norm.weight", True),
        ("model.layers.3.input_layernorm.weight", True),
        ("model.norm.weight", True),
        ("mtp.0.norm.weight", True),
        ("mtp.0.enorm.weight", True),
        ("mtp.0.hnorm.weight", True),
        ("mtp.0.e_proj.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.0.mlp.gate.tid2eid", False),
        ("model.layers.3.self_attn.compressor.kv_proj.weight", False),
        ("model.layers.3.mlp.experts.gate_up_proj", False),
        ("model.layers.3.self_attn.o_a_proj.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_stays_float32_in_a_bfloat16_model(name: str, kept: bool) -> None:
    assert is_kept_wide(name) is kept
    assert dtype_of(name, torch.bfloat16) == (torch.float32 if kept else torch.bfloat16)
    assert dtype_of(name, torch.float64) == torch.float64
