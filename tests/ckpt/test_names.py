"""dsv4ckpt.names: the rename tables are bijections, match whole names only, and are what transformers uses.

Oracles: transformers itself (the parameters of its model, and where its loader puts a released file), and
regular expressions made here from the rows.  The product's matcher is never its own witness.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ckpt import config, inventory, names, sample
from dsv4ckpt.formats import Storage
from dsv4ckpt.inventory import Layout
from dsv4ckpt.names import Experts, Namespace, Rename, Table
from dsv4ckpt.release import RELEASES, shipped_config

TABLES = {
    "preview": names.PREVIEW,
    "base": names.BASE,
    "dspark": names.DSPARK,
    "vision": names.VISION,
    "v4.1": names.V41,
}
USERS = {  # releases of each table
    "preview": ("flash", "pro"),
    "base": ("flash-base", "pro-base"),
    "dspark": ("flash-0731", "pro-0813"),
    "vision": ("vision-exp",),
    "v4.1": ("v4.1-flash",),
}


@functools.cache
def tiny(release: str) -> sample.Sample:
    return sample.plan_sample(sample.SampleOptions(release=release))


@functools.cache
def released_names(release: str) -> tuple[str, ...]:
    """Every stored name of the released config: all of Flash; elsewhere all layers with 12 experts each."""
    model = config.read(shipped_config(release))
    if release != "flash":
        model = replace(model, num_experts=12, dspark_num_experts=12)
    family = RELEASES[release].family
    logicals = list(inventory.logical_tensors(model, family))
    return tuple(
        inventory.lay_out(logicals, family.table, RELEASES[release].storage, Namespace.DEEPSEEK).stored
    )


def sample_names(release: str) -> tuple[str, ...]:
    return tuple(tiny(release).layout.stored)


def require_identity_split(table: Table, given: tuple[str, ...]) -> None:
    seen = set()
    for name in given:
        match = table.match(name)
        assert match is not None, name
        assert table.place(match, Namespace.DEEPSEEK) == names.Place(name)
        there = table.place(match, Namespace.TRANSFORMERS, Experts.SPLIT)
        assert there.parts_per_expert == 0
        assert table.from_transformers(there.name) == match, (name, there)
        seen.add(there.name)
    assert len(seen) == len(given)


def require_identity_fused(table: Table, given: tuple[str, ...]) -> None:
    """Every name has its own place, places of a fused tensor are gapless, and each leads back."""
    places: dict[str, dict[int, str]] = defaultdict(dict)
    for name in given:
        match = table.match(name)
        assert match is not None, name
        place = table.place(match, Namespace.TRANSFORMERS, Experts.FUSED)
        assert place.number not in places[place.name], name
        places[place.name][place.number] = name
        assert (place.parts_per_expert > 0) == (".experts." in name)
    for fused, parts in places.items():
        assert sorted(parts) == list(range(len(parts)))
        if len(parts) == 1 and ".experts." not in parts[0]:
            assert table.from_fused(fused, 1) == []
            continue
        num_experts = len(parts) // (2 if "gate_up_proj" in fused else 1)
        back = [table.place(match, Namespace.DEEPSEEK).name for match in table.from_fused(fused, num_experts)]
        assert back == [parts[index] for index in range(len(parts))]


@pytest.mark.parametrize("release", RELEASES)
def test_renames_are_a_bijection_on_the_tiny_checkpoint(release: str) -> None:
    require_identity_split(RELEASES[release].family.table, sample_names(release))


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_renames_are_a_bijection_on_the_released_names(release: str) -> None:
    require_identity_split(RELEASES[release].family.table, released_names(release))


@pytest.mark.parametrize("release", RELEASES)
def test_fused_renames_are_a_bijection_on_the_tiny_checkpoint(release: str) -> None:
    require_identity_fused(RELEASES[release].family.table, sample_names(release))


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_fused_renames_are_a_bijection_on_the_released_names(release: str) -> None:
    require_identity_fused(RELEASES[release].family.table, released_names(release))


def test_fused_order_is_gate_then_up_for_each_expert() -> None:
    table = RELEASES["flash"].family.table
    matches = table.from_fused("model.layers.7.mlp.experts.gate_up_proj", 3)
    assert [table.place(match, Namespace.DEEPSEEK).name for match in matches] == [
        f"layers.7.ffn.experts.{expert}.{part}.weight" for expert in range(3) for part in ("w1", "w3")
    ]
    scales = table.from_fused("mtp.0.mlp.experts.down_proj_scale_inv", 2)
    assert [table.place(match, Namespace.DEEPSEEK).name for match in scales] == [
        f"mtp.0.ffn.experts.{expert}.w2.scale" for expert in range(2)
    ]


# ---- the rows as a set


def spelled(row: Rename, namespace: Namespace) -> list[str]:
    """The row's pattern under each of its leaves."""
    pattern = row.deepseek if namespace is Namespace.DEEPSEEK else row.transformers
    leaves = ("weight", "scale" if namespace is Namespace.DEEPSEEK else "weight_scale_inv")
    return [pattern.replace("{leaf}", leaf) for leaf in (leaves if "{leaf}" in pattern else ("",))]


def as_regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{[LKE]\\\}", r"(?:0|[1-9][0-9]*)", re.escape(pattern)))


@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("family", TABLES)
def test_no_two_rows_of_a_table_match_one_name(family: str, namespace: Namespace) -> None:
    patterns = [pattern for row in TABLES[family] for pattern in spelled(row, namespace)]
    # slots hold numbers only, so two patterns share a name only if they are equal with every slot alike
    alike = Counter(re.sub(r"\{[LKE]\}", "#", pattern) for pattern in patterns)
    assert [pattern for pattern, count in alike.items() if count > 1] == []
    regexes = [as_regex(pattern) for pattern in patterns]
    for pattern in patterns:
        name = pattern.format(L=11, K=1, E=7)
        assert sum(bool(regex.fullmatch(name)) for regex in regexes) == 1


@pytest.mark.parametrize("family", TABLES)
def test_no_fused_name_is_the_name_of_another_row(family: str) -> None:
    fused = {
        row.fused.name.format(L=1, K=1, leaf=leaf)
        for row in TABLES[family]
        if row.fused
        for leaf in ("", "_scale_inv")
    }
    whole = [as_regex(pattern) for row in TABLES[family] for pattern in spelled(row, Namespace.TRANSFORMERS)]
    assert not [name for name in fused for regex in whole if regex.fullmatch(name)]
    assert len(fused) == 8  # gate_up_proj and down_proj, of layers and of stages, codes and scales


@pytest.mark.parametrize("family", TABLES)
def test_every_row_and_leaf_is_hit_by_a_sample_of_each_release_using_the_table(family: str) -> None:
    rows = {pattern for row in TABLES[family] for pattern in spelled(row, Namespace.DEEPSEEK)}
    for release in USERS[family]:
        unhit = {p for p in rows if not any(map(as_regex(p).fullmatch, sample_names(release)))}
        assert unhit == set(), f"rows that {release} never hits"


@pytest.mark.parametrize("family", TABLES)
def test_rows_are_complete(family: str) -> None:
    for row in TABLES[family]:
        assert row.group
        slots = [sorted(re.findall(r"\{(\w+)\}", name)) for name in (row.deepseek, row.transformers)]
        assert slots[0] == slots[1], row
        assert set(slots[0]) <= {"L", "K", "E", "leaf"}
        assert (row.fused is not None) == ("{E}" in row.deepseek)


def test_every_table_is_used_by_its_releases() -> None:
    assert sorted(itertools.chain(*USERS.values())) == sorted(RELEASES)
    for family, releases in USERS.items():
        for release in releases:
            assert RELEASES[release].family.table.rows is TABLES[family]


@pytest.mark.parametrize(
    ("family", "absent"),
    [
        ("dspark", "mtp.0.e_proj.weight"),
        ("dspark", "mtp.0.emb.tok_emb.weight"),
        ("dspark", "layers.0.ffn.gate.bias_vl"),
        ("preview", "mtp.0.head.weight"),
        ("preview", "mtp.0.main_proj.weight"),
        ("v4.1", "layers.0.ffn.gate.tid2eid"),
        ("v4.1", "layers.2.attn.compressor.ape"),
        ("v4.1", "hc_head_fn"),
        ("v4.1", "mtp.2.markov_head.markov_w1.weight"),
        ("vision", "layers.1.engram.embed.weight"),
    ],
)
def test_tables_do_not_know_the_tensors_of_other_releases(family: str, absent: str) -> None:
    assert Table(TABLES[family]).match(absent) is None


# ---- what matches nothing

REAL = ("layers.3.attn_norm.weight", "layers.10.ffn.experts.7.w1.weight", "mtp.0.e_proj.scale", "head.weight")
BROKEN = [
    "",
    ".",
    "weight",
    "layers.03.attn_norm.weight",
    "layers.00.attn_norm.weight",
    "layers.3.ffn.experts.07.w1.weight",
    "layers.-1.attn_norm.weight",
    "layers.+3.attn_norm.weight",
    "layers.3_0.attn_norm.weight",
    "layers. 3.attn_norm.weight",
    "layers.3e0.attn_norm.weight",
    "layers.\u0663.attn_norm.weight",  # ARABIC-INDIC DIGIT THREE, a decimal to Python
    "layers.\uff13.attn_norm.weight",  # FULLWIDTH DIGIT THREE
    "layers.\u00b3.attn_norm.weight",  # SUPERSCRIPT THREE
    "layers.#.attn_norm.weight",
    "layers.3.ffn.experts.#.w1.weight",
    "#.3.attn_norm.weight",
    "layers.{L}.attn_norm.weight",
    "layers..attn_norm.weight",
    "layers.3.3.attn_norm.weight",
    "layers.3.attn_norm.weight.weight",
    "layers.3.attn_norm.weight.3",
    "layers.3.attn_norm.weight.",
    ".layers.3.attn_norm.weight",
    "x.layers.3.attn_norm.weight",
    "layers.3.attn_norm",
    "layers.3.attn_norm.scale",
    "layers.3.attn_norm.bias",
    "layers.3.attn.wq_a.weights",
    "layers.3.attn.wq_a.weight_scale_inv",
    "layers.3.attn.wq_a.{leaf}",
    "layers.3.ffn.experts.w1.weight",
    "layers.3.ffn.experts.7.8.w1.weight",
    "layers.3.ffn.experts.7.w4.weight",
    "Layers.3.attn_norm.weight",
    "layers.3.attn_norm.weight\n",
    "layers.3.attn_norm.weight\0",
    " layers.3.attn_norm.weight",
    "mtp.layers.0.e_proj.weight",
    "3",
    "layers.3",
    "layers." + "9" * 500 + "x.attn_norm.weight",
]


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("name", BROKEN, ids=repr)
def test_broken_name_matches_nothing_in_any_namespace(name: str, family: str) -> None:
    table = Table(TABLES[family])
    assert table.match(name) is None
    assert table.from_transformers(name) is None
    assert table.from_fused(name, 2) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.03.input_layernorm.weight",
        "model.layers.#.input_layernorm.weight",
        "model.layers.3.input_layernorm.weight.weight",
        "model.model.layers.3.input_layernorm.weight",
        "layers.3.input_layernorm.weight",
        "model.layers.3.self_attn.q_a_proj.scale",
        "model.layers.3.mlp.experts.\u0663.gate_proj.weight",
        "model.layers.03.mlp.experts.gate_up_proj",
        "model.layers.#.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.gate_up_proj.weight",
        "model.layers.3.mlp.experts.gate_up_proj_scale",
        "model.layers.3.mlp.experts.gate_up_proj_scale_inv_scale_inv",
    ],
    ids=repr,
)
def test_broken_transformers_name_matches_nothing(name: str) -> None:
    table = RELEASES["flash"].family.table
    assert table.from_transformers(name) is None
    assert table.from_fused(name, 2) == []


@pytest.mark.parametrize("release", RELEASES)
def test_names_with_something_added_anywhere_match_nothing(release: str) -> None:
    table = RELEASES[release].family.table
    for name in sample_names(release):
        parts = name.split(".")
        for position in range(len(parts) + 1):
            assert table.match(".".join([*parts[:position], "weight", *parts[position:]])) is None, name


def test_numbers_are_told_apart_by_slot() -> None:
    match = RELEASES["flash"].family.table.match("layers.10.ffn.experts.7.w1.scale")
    assert match is not None
    assert (match.numbers, match.leaf) == ({"L": 10, "E": 7}, "scale")


# ---- block scales, and what only looks like one (defects 13 and 18 of the peers)


@pytest.mark.parametrize("release", RELEASES)
def test_hyper_connection_scales_are_never_taken_for_block_scales(release: str) -> None:
    table, layout = RELEASES[release].family.table, tiny(release).layout
    lookalikes = [name for name in layout.stored if re.search(r"hc_(attn|ffn|head)_scale$", name)]
    assert len(lookalikes) >= 2 * tiny(release).document.get("num_hidden_layers", 4)
    for name in lookalikes:
        match = table.match(name)
        assert match is not None and match.leaf == ""
        assert layout.stored[name].scale_of is None and layout.stored[name].dtype == "F32"
        there = table.place(match, Namespace.TRANSFORMERS).name
        assert there.endswith((".scale", ".hc_scale"))
        back = table.from_transformers(there)
        assert back is not None and back.leaf == ""


@pytest.mark.parametrize("release", RELEASES)
def test_block_scales_are_exactly_the_scale_leaves(release: str) -> None:
    table, layout = RELEASES[release].family.table, tiny(release).layout
    scales = {name for name, stored in layout.stored.items() if stored.scale_of is not None}
    assert scales == {name for name in layout.stored if re.fullmatch(r".*\.scale", name)}
    for name in scales:
        match = table.match(name)
        assert match is not None and match.leaf == "scale"
        weight = table.place(match._replace(leaf="weight"), Namespace.DEEPSEEK).name
        assert weight in layout.stored


@pytest.mark.parametrize(
    ("release", "name", "there"),
    [
        (
            "flash",
            "layers.2.attn.indexer.weights_proj.weight",
            "model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight",
        ),
        (
            "v4.1-flash",
            "layers.2.attn.indexer.weights_proj.weight",
            "model.layers.2.self_attn.indexer.scorer.weights_proj.weight",
        ),
        ("v4.1-flash", "layers.1.engram.q_weight", "model.layers.1.engram.q_weight"),
        (
            "flash",
            "layers.2.attn.indexer.wq_b.scale",
            "model.layers.2.self_attn.compressor.indexer.q_b_proj.weight_scale_inv",
        ),
        ("flash", "layers.2.hc_attn_scale", "model.layers.2.attn_hc.scale"),
        ("flash", "hc_head_scale", "model.hc_head.hc_scale"),
        ("flash", "mtp.0.hc_head_scale", "mtp.0.hc_head.hc_scale"),
        ("flash", "mtp.0.norm.weight", "mtp.0.norm.weight"),
        ("flash", "norm.weight", "model.norm.weight"),
        ("flash-base", "mtp.0.head.weight", "mtp.0.head.weight"),
        ("flash-0731", "mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w1.weight"),
    ],
)
def test_names_that_substring_rules_get_wrong(release: str, name: str, there: str) -> None:
    table = RELEASES[release].family.table
    match = table.match(name)
    assert match is not None
    assert table.place(match, Namespace.TRANSFORMERS).name == there
    assert table.from_transformers(there) == match


@pytest.mark.parametrize(
    "wrong", ["weights_proj.scale", "weights_proj.weight_scale_inv", "weights_proj.scales_proj"]
)
def test_weights_proj_has_no_block_scale(wrong: str) -> None:
    table = RELEASES["flash"].family.table
    assert table.match(f"layers.2.attn.indexer.{wrong}") is None
    assert table.from_transformers(f"model.layers.2.self_attn.compressor.indexer.scorer.{wrong}") is None


# ---- the published map (checkpoint_format 4.1), sentence by sentence

PUBLISHED = """
embed.weight model.embed_tokens.weight
head.weight lm_head.weight
norm.weight model.norm.weight
hc_head_fn model.hc_head.hc_fn
hc_head_base model.hc_head.hc_base
hc_head_scale model.hc_head.hc_scale
layers.2.attn_norm.weight model.layers.2.input_layernorm.weight
layers.2.ffn_norm.weight model.layers.2.post_attention_layernorm.weight
layers.2.hc_attn_fn model.layers.2.attn_hc.fn
layers.2.hc_attn_base model.layers.2.attn_hc.base
layers.2.hc_ffn_scale model.layers.2.ffn_hc.scale
layers.2.attn.attn_sink model.layers.2.self_attn.sinks
layers.2.attn.wq_a.weight model.layers.2.self_attn.q_a_proj.weight
layers.2.attn.q_norm.weight model.layers.2.self_attn.q_a_norm.weight
layers.2.attn.wq_b.scale model.layers.2.self_attn.q_b_proj.weight_scale_inv
layers.2.attn.wkv.weight model.layers.2.self_attn.kv_proj.weight
layers.2.attn.kv_norm.weight model.layers.2.self_attn.kv_norm.weight
layers.2.attn.wo_a.weight model.layers.2.self_attn.o_a_proj.weight
layers.2.attn.wo_b.weight model.layers.2.self_attn.o_b_proj.weight
layers.2.attn.compressor.ape model.layers.2.self_attn.compressor.position_bias
layers.2.attn.compressor.wkv.weight model.layers.2.self_attn.compressor.kv_proj.weight
layers.2.attn.compressor.wgate.weight model.layers.2.self_attn.compressor.gate_proj.weight
layers.2.attn.compressor.norm.weight model.layers.2.self_attn.compressor.kv_norm.weight
layers.2.attn.indexer.wq_b.weight model.layers.2.self_attn.compressor.indexer.q_b_proj.weight
layers.2.attn.indexer.compressor.ape model.layers.2.self_attn.compressor.indexer.position_bias
layers.2.attn.indexer.compressor.wkv.weight model.layers.2.self_attn.compressor.indexer.kv_proj.weight
layers.2.attn.indexer.compressor.wgate.weight model.layers.2.self_attn.compressor.indexer.gate_proj.weight
layers.2.attn.indexer.compressor.norm.weight model.layers.2.self_attn.compressor.indexer.kv_norm.weight
layers.2.ffn.gate.weight model.layers.2.mlp.gate.weight
layers.3.ffn.gate.bias model.layers.3.mlp.gate.e_score_correction_bias
layers.2.ffn.gate.tid2eid model.layers.2.mlp.gate.tid2eid
layers.2.ffn.shared_experts.w1.weight model.layers.2.mlp.shared_experts.gate_proj.weight
layers.2.ffn.shared_experts.w2.weight model.layers.2.mlp.shared_experts.down_proj.weight
layers.2.ffn.shared_experts.w3.scale model.layers.2.mlp.shared_experts.up_proj.weight_scale_inv
layers.2.ffn.experts.5.w1.weight model.layers.2.mlp.experts.5.gate_proj.weight
layers.2.ffn.experts.5.w2.weight model.layers.2.mlp.experts.5.down_proj.weight
layers.2.ffn.experts.5.w3.scale model.layers.2.mlp.experts.5.up_proj.weight_scale_inv
"""


@pytest.mark.parametrize("pair", PUBLISHED.strip().splitlines())
def test_rename_is_the_published_one(pair: str) -> None:
    table = RELEASES["flash"].family.table
    name, there = pair.split()
    match = table.match(name)
    assert match is not None
    assert table.place(match, Namespace.TRANSFORMERS, Experts.SPLIT).name == there


# ---- transformers itself


def without_quantization(document: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in document.items() if key not in ("quantization_config", "expert_dtype")
    }


def transformers_model(document: dict[str, Any], directory: Path, device: str) -> torch.nn.Module:
    """What AutoConfig and AutoModelForCausalLM make of a config.json."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    (directory / "config.json").write_text(json.dumps(without_quantization(document)))
    read = transformers.AutoConfig.from_pretrained(directory)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(read)
    assert type(model).__name__ == "DeepseekV4ForCausalLM"
    return model


def bf16_layout(document: dict[str, Any], release: str, namespace: Namespace) -> Layout:
    family = RELEASES[release].family
    logicals = list(inventory.logical_tensors(config.read(document), family))
    return inventory.lay_out(logicals, family.table, Storage.BF16, namespace)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "released"])
@pytest.mark.parametrize("release", ["flash", "pro", "flash-base", "flash-0731", "pro-0813"])
def test_transformers_layout_is_the_state_dict_of_its_model(release: str, size: str, tmp_path: Path) -> None:
    document = tiny(release).document if size == "tiny" else shipped_config(release)
    theirs = {
        name: tuple(value.shape)
        for name, value in transformers_model(document, tmp_path, "meta").state_dict().items()
    }
    layout = bf16_layout(document, release, Namespace.TRANSFORMERS)
    ours = {name: stored.shape for name, stored in layout.stored.items() if not name.startswith("mtp.")}
    assert ours == theirs


@pytest.mark.parametrize("release", ["flash", "pro"])
def test_transformers_loads_released_names_into_the_places_that_the_table_says(
    release: str, tmp_path: Path
) -> None:
    """Shapes cannot tell w1 from w3 or wkv from wgate: so every tensor gets its own values."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    save_file = pytest.importorskip("safetensors.torch").save_file
    document = without_quantization(tiny(release).document)
    released = bf16_layout(document, release, Namespace.DEEPSEEK)
    generator = torch.Generator().manual_seed(0)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    tensors = {
        name: torch.randint(0, 120, stored.shape, generator=generator).to(dtypes[stored.dtype])
        for name, stored in released.stored.items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(document))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report["missing_keys"]) and not any(report["mismatched_keys"])
    loaded = model.state_dict()
    for name, stored in bf16_layout(document, release, Namespace.TRANSFORMERS).stored.items():
        if name.startswith("mtp."):
            continue
        parts = [tensors[part.logical.name].to(torch.float32) for part in stored.parts]
        expected = torch.cat(parts).view(stored.shape) if len(parts) > 1 else parts[0]
        assert torch.equal(loaded[name].to(torch.float32), expected), name


# ---- telling namespaces and opaque tensors


@pytest.mark.parametrize("release", RELEASES)
def test_namespaces_are_told_apart(release: str) -> None:
    document = tiny(release).document
    assert not names.looks_like_transformers(sample_names(release))
    assert names.looks_like_transformers(bf16_layout(document, release, Namespace.TRANSFORMERS).stored)


def test_a_lone_draft_shard_looks_released() -> None:
    assert not names.looks_like_transformers(["mtp.0.e_proj.weight", "models.x", "head.weight"])


@pytest.mark.parametrize("name", ["vision.norm.weight", "aligner.w1.bias", "image_start", "image_pad"])
def test_vision_side_is_opaque(name: str) -> None:
    assert names.is_opaque(name)


@pytest.mark.parametrize(
    "name", ["visions.norm.weight", "layers.0.vision.x", "image", "image_start2", "", "Vision.x"]
)
def test_nothing_else_is_opaque(name: str) -> None:
    assert not names.is_opaque(name)


@pytest.mark.parametrize("release", RELEASES)
def test_no_row_lies_on_the_opaque_side(release: str) -> None:
    assert not any(map(names.is_opaque, sample_names(release)))


def test_released_names_cover_the_published_number_of_tensors() -> None:
    assert len(released_names("flash")) == len(set(released_names("flash"))) == 69_187
    assert math.prod(tiny("flash").layout.stored["embed.weight"].shape) > 0
