"""dsv4ckpt.inventory against what was published: totals to the byte, the census by dtype, counts and shapes.

Every number here was taken from the releases' indexes and headers (checkpoint_format 1.1, 1.2, 1.7, 2.2-2.7),
none from the product.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest

from dsv4ckpt import config, formats, inventory
from dsv4ckpt.formats import Kind, Shape, Storage
from dsv4ckpt.inventory import Stored, lay_out, logical_tensors
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES, shipped_config

pytestmark = pytest.mark.slow  # lists whole releases

WIDTH = {"I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}


class Census(NamedTuple):
    """What a release stores, added up; of its tensors only the first expert's are kept."""

    counts: Counter[str]  # by dtype
    sizes: Counter[str]  # bytes by dtype
    per_block: Counter[str]  # tensors of layers.3, mtp.0, ... and '' for the top level
    draft: tuple[int, int, int]  # tensors, bytes, parameters of mtp.*
    parameters: int  # of all logical tensors
    backbone: int  # the same without mtp.*, tid2eid and router biases
    tensors: dict[str, tuple[str, Shape]]
    groups: list[frozenset[str]]  # first parts of the names that share a shard


def size_of(stored: Stored) -> int:
    return math.prod(stored.shape) * WIDTH[stored.dtype]


@functools.cache
def census(release: str) -> Census:
    family, storage = RELEASES[release].family, RELEASES[release].storage
    logicals = list(logical_tensors(config.read(shipped_config(release)), family))
    layout = lay_out(logicals, family.table, storage, Namespace.DEEPSEEK)
    counts, sizes, blocks = Counter[str](), Counter[str](), Counter[str]()
    num_draft = draft_bytes = 0
    for name, stored in layout.stored.items():
        counts[stored.dtype] += 1
        sizes[stored.dtype] += size_of(stored)
        blocks[block_of(name)] += 1
        if name.startswith("mtp."):
            num_draft += 1
            draft_bytes += size_of(stored)
    of_draft = sum(math.prod(item.shape) for item in logicals if item.name.startswith("mtp."))
    everything = sum(math.prod(item.shape) for item in logicals)
    buffers = sum(
        math.prod(item.shape)
        for item in logicals
        if not item.name.startswith("mtp.") and (item.kind is Kind.I64 or ".gate.bias" in item.name)
    )
    kept = {
        name: (stored.dtype, stored.shape)
        for name, stored in layout.stored.items()
        if ".experts." not in name or ".experts.0." in name
    }
    groups = [frozenset(block_of(item.name) for item in group) for group in inventory.shard_groups(layout)]
    draft = (num_draft, draft_bytes, of_draft)
    return Census(counts, sizes, blocks, draft, everything, everything - of_draft - buffers, kept, groups)


def block_of(name: str) -> str:
    head, _, rest = name.partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head in ("layers", "mtp") else ""


# ---- totals


@pytest.mark.parametrize(
    ("release", "num_tensors", "num_bytes"),
    [
        ("flash", 69_187, 159_609_485_896),
        ("flash-base", 69_189, 294_673_469_000),
        ("flash-0731", 72_317, 166_878_536_440),
        ("pro", 145_116, 864_704_792_696),
        ("pro-0813", 149_782, 892_727_580_904),
        ("pro-base", 145_118, 1_606_032_540_792),
        # 266 vision, aligner and image tensors of 485,268,480 BF16 parameters are opaque to the inventory
        ("v4.1-flash", 96_085 - 266, 510_286_023_000 - 2 * 485_268_480),
    ],
)
def test_inventory_equals_the_published_total_to_the_byte(
    release: str, num_tensors: int, num_bytes: int
) -> None:
    assert census(release).counts.total() == num_tensors
    assert census(release).sizes.total() == num_bytes


def test_inventory_of_vision_exp_has_the_published_number_of_tensors() -> None:
    # vision.* 259, aligner.* 4 and four image_* tensors are opaque to the inventory
    assert census("vision-exp").counts.total() == 72_633 - 267


@pytest.mark.parametrize(
    ("release", "parameters"),
    [
        ("flash", 290_944_616_402),
        ("flash-base", 292_003_678_162),
        ("flash-0731", 304_180_418_494),
        ("pro", 1_598_839_674_782),
        ("pro-base", 1_600_693_032_862),
        ("pro-0813", 1_650_497_936_906),
        ("v4.1-flash", 763_205_315_794 - 485_268_480),
    ],
)
def test_inventory_has_the_published_number_of_parameters(release: str, parameters: int) -> None:
    assert census(release).parameters == parameters


@pytest.mark.parametrize("release", ["flash", "flash-base", "flash-0731"])
def test_inventory_of_the_flash_backbone_has_the_parameters_that_veomni_printed(release: str) -> None:
    assert census(release).backbone == 284_332_230_231


def test_inventory_of_flash_without_mtp_is_in_67612_tensors() -> None:
    assert census("flash").counts.total() - census("flash").draft[0] == 67_612


# ---- the census by dtype

CENSUS = {
    "flash": {
        "BF16": (433, 2_830_518_528),
        "F32": (417, 144_672_072),
        "F8_E4M3": (375, 6_023_020_544),
        "F8_E8M0": (34_167, 8_858_737_664),
        "I8": (33_792, 141_733_920_768),
        "I64": (3, 18_616_320),
    },
    "flash-base": {
        "BF16": (435, 4_948_642_048),
        "F32": (34_584, 215_348_552),
        "F8_E4M3": (34_167, 289_490_862_080),
        "I64": (3, 18_616_320),
    },
    "flash-0731": {
        "BF16": (445, 2_967_134_976),
        "F32": (433, 150_966_520),
        "F8_E4M3": (390, 6_304_038_912),
        "F8_E8M0": (35_718, 9_261_408_000),
        "I8": (35_328, 148_176_371_712),
        "I64": (3, 18_616_320),
    },
    "pro": {
        "BF16": (619, 5_633_798_656),
        "F32": (590, 351_105_656),
        "F8_E4M3": (528, 23_169_335_296),
        "F8_E8M0": (71_952, 49_150_268_416),
        "I8": (71_424, 786_381_668_352),
        "I64": (3, 18_616_320),
    },
    "pro-0813": {
        "BF16": (631, 5_909_640_704),
        "F32": (606, 362_120_232),
        "F8_E4M3": (543, 23_952_621_568),
        "F8_E8M0": (74_271, 50_735_763_136),
        "I8": (73_728, 811_748_818_944),
        "I64": (3, 18_616_320),
    },
    "pro-base": {
        "BF16": (621, 9_340_514_816),
        "F32": (72_542, 740_737_656),
        "F8_E4M3": (71_952, 1_595_932_672_000),
        "I64": (3, 18_616_320),
    },
    "v4.1-flash": {
        "BF16": (
            254,
            510_286_023_000
            - 2 * 485_268_480
            - 169_229_128
            - 204_015_223_296
            - 23_563_015_184
            - 278_585_671_680,
        ),
        "F32": (387, 169_229_128),
        "F8_E4M3": (357, 204_015_223_296),
        "F8_E8M0": (47_589, 23_563_015_184),
        "I8": (47_232, 278_585_671_680),
    },
}


@pytest.mark.parametrize("release", CENSUS)
def test_inventory_census_by_dtype_is_the_published_one(release: str) -> None:
    found = census(release)
    assert {dtype: (found.counts[dtype], found.sizes[dtype]) for dtype in found.counts} == CENSUS[release]


@pytest.mark.parametrize(
    ("release", "draft"),
    [
        ("flash", (1_575, 3_593_787_756, 6_610_048_891)),
        ("flash-base", (1_577, 8_733_413_356, 7_669_110_651)),
        ("flash-0731", (4_705, 10_862_838_300, 19_845_850_983)),
        ("pro", (2_343, 13_956_587_692, 25_840_145_979)),
        ("pro-0813", (7_009, 41_979_375_900, 77_498_408_103)),
        ("pro-base", (2_345, 29_560_434_668, 27_693_504_059)),
    ],
)
def test_inventory_of_draft_stages_is_the_published_one(release: str, draft: tuple[int, int, int]) -> None:
    assert census(release).draft == draft


# ---- counts per layer (2.6) and shards (1.3)


def test_flash_layers_hold_the_published_number_of_tensors() -> None:
    blocks = census("flash").per_block
    assert blocks[""] == 6
    assert [blocks[f"layers.{layer}"] for layer in (0, 1)] == [1_565, 1_565]
    assert {blocks[f"layers.{layer}"] for layer in range(2, 43, 2)} == {1_576}  # ratio 4
    assert {blocks[f"layers.{layer}"] for layer in range(3, 43, 2)} == {1_569}  # ratio 128
    assert blocks["mtp.0"] == 1_575
    assert len(blocks) == 1 + 43 + 1


def test_dspark_stages_hold_the_published_number_of_tensors() -> None:
    blocks = census("flash-0731").per_block
    assert [blocks[f"mtp.{stage}"] for stage in range(3)] == [1_565 + 3, 1_565, 1_565 + 7]
    assert len(blocks) == 1 + 43 + 3


def test_pro_layers_0_and_1_have_a_compressor() -> None:
    blocks = census("pro").per_block
    experts = 6 * 384
    assert {blocks[f"layers.{layer}"] for layer in (0, 1, *range(3, 61, 2))} == {29 + experts + 4}
    assert {blocks[f"layers.{layer}"] for layer in range(2, 61, 2)} == {29 + experts + 11}


@pytest.mark.parametrize(
    ("release", "num_shards"),
    [("flash", 46), ("flash-base", 46), ("flash-0731", 48), ("pro", 64), ("pro-0813", 66)],
)
def test_shard_groups_are_embedding_layers_head_and_stages_in_order(release: str, num_shards: int) -> None:
    groups = census(release).groups
    num_layers = shipped_config(release)["num_hidden_layers"]
    assert len(groups) == num_shards
    expected = ["", *(f"layers.{layer}" for layer in range(num_layers)), ""]
    expected += [f"mtp.{stage}" for stage in range(num_shards - num_layers - 2)]
    assert groups == [frozenset({name}) for name in expected]


# ---- shapes (2.1-2.5 and 2.7)

FLASH = """
embed.weight BF16 129280x4096
head.weight BF16 129280x4096
norm.weight BF16 4096
hc_head_fn F32 4x16384
hc_head_base F32 4
hc_head_scale F32 1
layers.5.attn_norm.weight BF16 4096
layers.5.attn.attn_sink F32 64
layers.5.attn.wq_a.weight F8_E4M3 1024x4096
layers.5.attn.wq_a.scale F8_E8M0 8x32
layers.5.attn.q_norm.weight BF16 1024
layers.5.attn.wq_b.weight F8_E4M3 32768x1024
layers.5.attn.wq_b.scale F8_E8M0 256x8
layers.5.attn.wkv.weight F8_E4M3 512x4096
layers.5.attn.wkv.scale F8_E8M0 4x32
layers.5.attn.kv_norm.weight BF16 512
layers.5.attn.wo_a.weight F8_E4M3 8192x4096
layers.5.attn.wo_a.scale F8_E8M0 64x32
layers.5.attn.wo_b.weight F8_E4M3 4096x8192
layers.5.attn.wo_b.scale F8_E8M0 32x64
layers.5.hc_attn_fn F32 24x16384
layers.5.hc_attn_base F32 24
layers.5.hc_ffn_scale F32 3
layers.5.ffn.gate.weight BF16 256x4096
layers.5.ffn.gate.bias F32 256
layers.2.ffn.gate.tid2eid I64 129280x6
layers.5.ffn.experts.0.w1.weight I8 2048x2048
layers.5.ffn.experts.0.w1.scale F8_E8M0 2048x128
layers.5.ffn.experts.0.w2.weight I8 4096x1024
layers.5.ffn.experts.0.w2.scale F8_E8M0 4096x64
layers.5.ffn.experts.0.w3.weight I8 2048x2048
layers.5.ffn.shared_experts.w1.weight F8_E4M3 2048x4096
layers.5.ffn.shared_experts.w1.scale F8_E8M0 16x32
layers.5.ffn.shared_experts.w2.weight F8_E4M3 4096x2048
layers.5.ffn.shared_experts.w2.scale F8_E8M0 32x16
layers.4.attn.compressor.ape F32 4x1024
layers.4.attn.compressor.wkv.weight BF16 1024x4096
layers.4.attn.compressor.wgate.weight BF16 1024x4096
layers.4.attn.compressor.norm.weight BF16 512
layers.5.attn.compressor.ape F32 128x512
layers.5.attn.compressor.wkv.weight BF16 512x4096
layers.4.attn.indexer.wq_b.weight F8_E4M3 8192x1024
layers.4.attn.indexer.wq_b.scale F8_E8M0 64x8
layers.4.attn.indexer.weights_proj.weight BF16 64x4096
layers.4.attn.indexer.compressor.ape F32 4x256
layers.4.attn.indexer.compressor.wkv.weight BF16 256x4096
layers.4.attn.indexer.compressor.wgate.weight BF16 256x4096
layers.4.attn.indexer.compressor.norm.weight BF16 128
mtp.0.e_proj.weight F8_E4M3 4096x4096
mtp.0.e_proj.scale F8_E8M0 32x32
mtp.0.h_proj.weight F8_E4M3 4096x4096
mtp.0.enorm.weight BF16 4096
mtp.0.norm.weight BF16 4096
mtp.0.hc_head_fn F32 4x16384
mtp.0.ffn.gate.bias F32 256
"""
BASE = """
layers.5.attn.wq_a.weight F8_E4M3 1024x4096
layers.5.attn.wq_a.scale F32 8x32
layers.5.ffn.experts.0.w1.weight F8_E4M3 2048x4096
layers.5.ffn.experts.0.w1.scale F32 16x32
layers.5.ffn.experts.0.w2.weight F8_E4M3 4096x2048
layers.5.ffn.experts.0.w2.scale F32 32x16
mtp.0.emb.tok_emb.weight BF16 129280x4096
mtp.0.head.weight BF16 129280x4096
"""
DSPARK = """
mtp.0.main_proj.weight F8_E4M3 4096x12288
mtp.0.main_proj.scale F8_E8M0 32x96
mtp.0.main_norm.weight BF16 4096
mtp.2.norm.weight BF16 4096
mtp.2.hc_head_fn F32 4x16384
mtp.2.markov_head.markov_w1.weight BF16 129280x256
mtp.2.markov_head.markov_w2.weight BF16 129280x256
mtp.2.confidence_head.proj.weight BF16 1x4352
mtp.1.ffn.gate.bias F32 256
"""
PRO = """
embed.weight BF16 129280x7168
hc_head_fn F32 4x28672
layers.0.attn.compressor.ape F32 128x512
layers.2.ffn.gate.tid2eid I64 129280x6
layers.7.attn.attn_sink F32 128
layers.7.attn.wq_b.weight F8_E4M3 65536x1536
layers.7.attn.wq_b.scale F8_E8M0 512x12
layers.7.attn.wo_a.weight F8_E4M3 16384x4096
layers.7.attn.wo_b.weight F8_E4M3 7168x16384
layers.7.hc_attn_fn F32 24x28672
layers.7.ffn.gate.weight BF16 384x7168
layers.7.ffn.experts.0.w1.weight I8 3072x3584
layers.7.ffn.experts.0.w1.scale F8_E8M0 3072x224
layers.7.ffn.experts.0.w2.weight I8 7168x1536
layers.7.ffn.experts.0.w2.scale F8_E8M0 7168x96
layers.6.attn.indexer.wq_b.weight F8_E4M3 8192x1536
"""
PRO_0813 = """
mtp.0.main_proj.weight F8_E4M3 7168x21504
mtp.0.main_proj.scale F8_E8M0 56x168
mtp.2.markov_head.markov_w1.weight BF16 129280x512
mtp.2.confidence_head.proj.weight BF16 1x7680
"""
V41 = """
layers.1.engram.embed.weight F8_E4M3 384006168x256
layers.1.engram.embed.scale F8_E8M0 384006168x8
layers.14.engram.embed.weight F8_E4M3 384016682x256
layers.1.engram.wkv.weight F8_E4M3 25600x6144
layers.1.engram.wkv.scale F8_E8M0 800x192
layers.1.engram.q_weight BF16 4x5120
layers.14.engram.k_weight BF16 4x5120
layers.2.attn.compressor.wkv.weight BF16 512x5120
layers.20.attn.compressor.norm.weight BF16 512
layers.14.attn.compressor.wgate.weight BF16 512x5120
layers.36.attn.indexer.wq_b.weight F8_E4M3 4096x1280
layers.36.attn.indexer.wq_b.scale F8_E8M0 128x40
layers.24.attn.indexer.weights_proj.weight BF16 32x5120
layers.20.attn.indexer.wk.weight BF16 128x512
layers.8.attn.indexer.k_norm.weight BF16 128
layers.0.ffn.gate.bias F32 384
layers.0.ffn.gate.bias_vl F32 384
layers.9.ffn.experts.0.w1.weight I8 2304x2560
layers.9.ffn.experts.0.w1.scale F8_E8M0 2304x160
mtp.0.ffn.gate.weight BF16 128x5120
mtp.0.main_proj.weight F8_E4M3 5120x15360
mtp.0.main_proj.scale F8_E8M0 160x480
mtp.2.markov_head.embed.weight BF16 129280x256
mtp.2.markov_head.head.weight BF16 129280x256
mtp.2.confidence_head.proj.weight BF16 1x5376
"""
VISION = """
layers.0.ffn.gate.bias F32 256
layers.0.ffn.gate.bias_vl F32 256
layers.0.ffn.gate.tid2eid I64 129280x6
mtp.2.ffn.gate.bias_vl F32 256
"""
SHAPES = [
    (release, *line.split())
    for release, text in [
        ("flash", FLASH), ("flash-base", BASE), ("flash-0731", DSPARK), ("pro", PRO), ("pro-0813", PRO_0813),
        ("v4.1-flash", V41), ("vision-exp", VISION),
    ]
    for line in text.strip().splitlines()
]  # fmt: skip


@pytest.mark.parametrize(("release", "name", "dtype", "shape"), SHAPES)
def test_tensor_has_the_published_dtype_and_shape(release: str, name: str, dtype: str, shape: str) -> None:
    assert census(release).tensors[name] == (dtype, tuple(map(int, shape.split("x"))))


ABSENT = """
flash layers.3.ffn.gate.tid2eid
flash layers.2.ffn.gate.bias
flash layers.0.attn.compressor.ape
flash layers.3.attn.indexer.wq_b.weight
flash mtp.0.attn.compressor.ape
flash mtp.0.emb.tok_emb.weight
flash mtp.1.attn_norm.weight
flash layers.0.ffn.gate.bias_vl
flash-0731 mtp.0.e_proj.weight
flash-0731 mtp.0.norm.weight
flash-0731 mtp.1.main_proj.weight
flash-0731 mtp.2.main_norm.weight
v4.1-flash hc_head_fn
v4.1-flash layers.0.ffn.gate.tid2eid
v4.1-flash layers.2.attn.compressor.ape
v4.1-flash layers.20.attn.compressor.wgate.weight
v4.1-flash layers.3.attn.compressor.wkv.weight
v4.1-flash layers.24.attn.indexer.wk.weight
v4.1-flash layers.2.engram.wkv.weight
v4.1-flash mtp.2.hc_head_fn
"""


@pytest.mark.parametrize("line", ABSENT.strip().splitlines())
def test_tensor_that_the_release_does_not_have_is_not_asked_for(line: str) -> None:
    release, name = line.split()
    assert name not in census(release).tensors


@pytest.mark.parametrize(
    ("inner", "layers"),
    [
        ("attn.compressor.wkv.weight", {2, 8, 14, 20}),
        ("attn.compressor.wgate.weight", {2, 8, 14}),
        ("attn.indexer.wq_b.weight", {2, 8, 14, 20, 24, 28, 32, 36}),
        ("attn.indexer.wk.weight", {2, 8, 14, 20}),
        ("engram.q_weight", {1, 14}),
        ("ffn.gate.bias_vl", set(range(40))),
    ],
)
def test_v41_parts_stand_on_the_published_layers(inner: str, layers: set[int]) -> None:
    tensors = census("v4.1-flash").tensors
    assert {layer for layer in range(40) if f"layers.{layer}.{inner}" in tensors} == layers


def test_scales_stand_beside_exactly_the_quantized_matrices() -> None:
    for release in RELEASES:
        tensors = census(release).tensors
        scales = {name.removesuffix("scale") + "weight" for name in tensors if name.endswith(".scale")}
        codes = {name for name, (dtype, _) in tensors.items() if dtype in ("I8", "F8_E4M3")}
        assert scales == codes


# ---- layouts


@pytest.mark.parametrize(
    ("storage", "namespace"),
    [
        (storage, namespace)
        for storage in Storage
        for namespace in Namespace
        if namespace is Namespace.DEEPSEEK or formats.fits_any_namespace(storage)
    ],
)
def test_layouts_hold_every_logical_tensor_once_and_gaplessly(storage: Storage, namespace: Namespace) -> None:
    model = replace(
        config.read(shipped_config("flash")), num_layers=4, num_experts=3, compress_ratios=(0, 0, 4, 128, 0)
    )
    family = RELEASES["flash"].family
    logicals = list(logical_tensors(model, family))
    layout = lay_out(logicals, family.table, storage, namespace)
    assert set(layout.weights) == {item.name for item in logicals}
    held: Counter[tuple[str, str]] = Counter()
    for stored in layout.stored.values():
        rows = math.prod(stored.shape[:-1]) if len(stored.shape) > 1 else 1
        position = 0
        for part in stored.parts:
            assert part.begin == position
            position += part.rows
            held[part.logical.name, stored.leaf] += 1
            assert (stored.leaf == "weight") == (stored.scale_of is None)
        assert position == rows, stored.name
    expected = [(item.name, "weight") for item in logicals]
    for item in logicals:
        if quant := layout.quant(item):
            expected += [(item.name, leaf) for leaf in ("scale", *quant.per_tensor)]
    assert held == Counter(expected)
    for index in (layout.weights, layout.scales, *layout.per_tensor.values()):
        for name, (place, number) in index.items():
            assert layout.stored[place].parts[number].logical.name == name


def test_bf16_layout_keeps_f32_and_integers_and_makes_every_matrix_bf16() -> None:
    for release in ("flash", "flash-base", "v4.1-flash"):
        model = replace(config.read(shipped_config(release)), num_experts=1, dspark_num_experts=1)
        family = RELEASES[release].family
        logicals = list(logical_tensors(model, family))
        layout = lay_out(logicals, family.table, Storage.BF16, Namespace.DEEPSEEK)
        assert not layout.scales
        for item in logicals:
            stored = layout.stored[item.name]
            assert stored.shape == item.shape
            expected = item.kind.value if item.kind in (Kind.F32, Kind.I64) else "BF16"
            assert stored.dtype == expected


def test_fused_experts_are_gate_and_up_stacked_for_each_expert() -> None:
    model = replace(config.read(shipped_config("flash")), num_layers=1, num_experts=5, compress_ratios=(0, 0))
    family = RELEASES["flash"].family
    layout = lay_out(
        list(logical_tensors(model, family)), family.table, Storage.FP4_FP8, Namespace.TRANSFORMERS
    )
    seen = {
        name: (stored.dtype, stored.shape) for name, stored in layout.stored.items() if ".experts." in name
    }
    assert seen == {
        f"{prefix}.mlp.experts.{name}": value
        for prefix in ("model.layers.0", "mtp.0")
        for name, value in {
            "gate_up_proj": ("I8", (5, 4096, 2048)),
            "gate_up_proj_scale_inv": ("F8_E8M0", (5, 4096, 128)),
            "down_proj": ("I8", (5, 4096, 1024)),
            "down_proj_scale_inv": ("F8_E8M0", (5, 4096, 64)),
        }.items()
    }
