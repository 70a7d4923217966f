"""dsv4ckpt.sample and its tokenizer: deterministic, laid out like the releases, and as awkward as real weights are.

The expected statistics come from the measured share of -0 and the share of FP4 blocks whose largest value is 3 under
DeepSeek's scale rule (quantization 5.2); files are read with safetensors, not with our reader.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from dsv4ckpt import config, inventory, sample, source, survey
from dsv4ckpt.errors import BadConfig, Usage
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES, Seen, identify, shipped_config
from dsv4ckpt.sample import SampleOptions, plan_sample

V4_TEXT = ["flash", "flash-base", "flash-0731", "pro", "pro-base", "pro-0813"]
VISION = ["vision-exp", "v4.1-flash"]
SampleOf = Callable[[str], Path]


@functools.cache
def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read by safetensors."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def written(directory: Path, **options: Any) -> Path:
    sample.write_sample(plan_sample(SampleOptions(**options)), str(directory))
    return directory


# ---- deterministic


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes(sample_of: SampleOf, tmp_path: Path) -> None:
    assert tiny.tree_of(written(tmp_path / "again")) == tiny.tree_of(sample_of("flash"))


@pytest.mark.slow
def test_other_seed_changes_every_shard_and_nothing_else(sample_of: SampleOf, tmp_path: Path) -> None:
    first, second = tiny.tree_of(sample_of("flash")), tiny.tree_of(written(tmp_path / "other", seed=1))
    assert first.keys() == second.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


@pytest.mark.slow
def test_other_seed_changes_every_tensor(sample_of: SampleOf, tmp_path: Path) -> None:
    first, second = loaded(sample_of("flash")), loaded(written(tmp_path / "other", seed=1))
    same = {
        name for name in first if torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
    }
    assert {name for name in same if not name.endswith(".scale")} == set()
    assert all(first[name].numel() < 16 for name in same), "only a few scales may coincide"


def test_bytes_of_a_tensor_do_not_depend_on_the_other_tensors(sample_of: SampleOf, tmp_path: Path) -> None:
    whole, part = loaded(sample_of("flash")), loaded(written(tmp_path / "short", layers=2))
    assert set(part) < set(whole)
    for name, value in part.items():
        assert torch.equal(value.view(torch.uint8), whole[name].view(torch.uint8)), name


def test_tensors_of_one_sample_differ_from_each_other(sample_of: SampleOf) -> None:
    seen = Counter(
        hashlib.sha256(value.view(torch.uint8).numpy().tobytes()).hexdigest()
        for value in loaded(sample_of("flash")).values()
        if value.numel() > 64
    )
    assert max(seen.values()) == 1


# ---- laid out like the release


@pytest.mark.parametrize("release", V4_TEXT)
def test_files_are_those_of_the_release(release: str, sample_of: SampleOf) -> None:
    directory, layers = sample_of(release), 4
    stages = 3 if "dspark_block_size" in shipped_config(release) else 1
    count = 1 + layers + 1 + stages
    names = {f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    assert {file.name for file in directory.glob("*.safetensors")} == names
    expected = [
        "embed",
        *(f"layers.{layer}" for layer in range(layers)),
        "head",
        *(f"mtp.{k}" for k in range(stages)),
    ]
    for number, owner in enumerate(expected, 1):
        held = load_file(directory / f"model-{number:05d}-of-{count:05d}.safetensors").keys()
        if owner == "head":
            assert held == {"head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"}
        else:
            assert {re.match(rf"{re.escape(owner)}\.", name) is not None for name in held} == {True}


@pytest.mark.parametrize("release", RELEASES)
def test_small_files_and_index_are_there_and_agree(release: str, sample_of: SampleOf) -> None:
    directory = sample_of(release)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    where = {name: file.name for file in directory.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == where
    sizes = sum(value.numel() * value.element_size() for value in loaded(directory).values())
    assert index["metadata"] == {"total_size": sizes}
    assert {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
    } <= {file.name for file in directory.iterdir()}
    assert not (directory / ".dsv4").exists()


@pytest.mark.parametrize("release", RELEASES)
def test_headers_have_no_metadata_like_the_released_ones(release: str, sample_of: SampleOf) -> None:
    for file in sample_of(release).glob("*.safetensors"):
        raw = file.read_bytes()
        assert b"__metadata__" not in raw[8 : 8 + int.from_bytes(raw[:8], "little")]


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_names_and_dtypes_are_those_of_the_release(release: str, sample_of: SampleOf) -> None:
    """Layers 0 to 3 and the stages of the released inventory, with 8 experts, and the opaque side."""
    family, model = RELEASES[release].family, config.read(shipped_config(release))
    model = replace(model, num_experts=8, dspark_num_experts=8)
    logicals = list(inventory.logical_tensors(model, family))
    full = inventory.lay_out(logicals, family.table, RELEASES[release].storage, Namespace.DEEPSEEK)
    far = re.compile(r"layers\.([4-9]|\d\d+)\.")
    expected = {name: stored.dtype for name, stored in full.stored.items() if not far.match(name)}
    torch_names = {
        torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
        torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64",
    }  # fmt: skip
    found = {name: torch_names[value.dtype] for name, value in loaded(sample_of(release)).items()}
    opaque = {name for name in found if name not in expected}
    assert {name: found[name] for name in found if name not in opaque} == expected
    assert {name.split(".")[0] for name in opaque} <= {
        "vision", "aligner", "image_start", "image_end", "image_newline", "image_pad",
    }  # fmt: skip
    assert bool(opaque) == (release in VISION)


@pytest.mark.parametrize("release", RELEASES)
def test_config_has_the_keys_of_the_release_in_their_order(release: str, sample_of: SampleOf) -> None:
    document = json.loads((sample_of(release) / "config.json").read_text())
    assert list(document) == list(shipped_config(release))
    assert list(document.get("text_config", ())) == list(shipped_config(release).get("text_config", ()))
    assert document["quantization_config"] == shipped_config(release)["quantization_config"]
    assert document["model_type"] == shipped_config(release)["model_type"]


@pytest.mark.parametrize("release", RELEASES)
def test_sample_conforms_to_its_own_config(release: str, sample_of: SampleOf) -> None:
    found = survey.survey(source.open_checkpoint(str(sample_of(release))))
    assert (found.identity.release.name, found.deviations, found.checkpoint.problems) == (release, [], [])
    assert found.checkpoint.index_total == found.checkpoint.total_size


@pytest.mark.parametrize("release", RELEASES)
def test_planned_size_is_the_size_on_disk(release: str, sample_of: SampleOf) -> None:
    made = plan_sample(SampleOptions(release=release))
    sizes = {file.name: file.size for file in made.files}
    assert sizes == {file.name: file.stat().st_size for file in sample_of(release).glob("*.safetensors")}
    assert made.total_bytes == sum(sizes.values())
    assert made.num_tensors == len(loaded(sample_of(release)))


# ---- the values: what real files hold


def fp4_bytes(directory: Path) -> torch.Tensor:
    found = [
        value.view(torch.uint8).flatten() for value in loaded(directory).values() if value.dtype == torch.int8
    ]
    return torch.cat(found)


def fp4_magnitudes(directory: Path) -> torch.Tensor:
    """uint8 [blocks, 32]: the codes without their signs."""
    packed = fp4_bytes(directory).view(-1, 16)
    return torch.cat([packed & 7, packed >> 4 & 7], 1)


def fp8_codes(directory: Path) -> torch.Tensor:
    found = [value for value in loaded(directory).values() if value.dtype == torch.float8_e4m3fn]
    return torch.cat([value.view(torch.uint8).flatten() for value in found])


def e8m0(directory: Path) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in loaded(directory).items() if value.dtype == torch.float8_e8m0fnu}
    return {name: value.view(torch.uint8) for name, value in found.items()}


def test_every_packed_byte_and_nearly_every_fp8_code_occurs(sample_of: SampleOf) -> None:
    assert fp4_bytes(sample_of("flash")).unique().numel() == 256
    assert fp8_codes(sample_of("flash")).unique().numel() > 200


@pytest.mark.parametrize("release", ["flash", "pro", "v4.1-flash"])
def test_a_tenth_of_the_packed_bytes_holds_a_negative_zero(release: str, sample_of: SampleOf) -> None:
    packed = fp4_bytes(sample_of(release))
    share = float(((packed & 15 == 8) | (packed >> 4 == 8)).double().mean())
    assert 0.08 <= share <= 0.13  # real files: 0.108


@pytest.mark.parametrize("release", ["flash", "pro", "v4.1-flash"])
def test_a_fifth_of_the_blocks_reaches_only_3(release: str, sample_of: SampleOf) -> None:
    largest = fp4_magnitudes(sample_of(release)).amax(1)
    share = float((largest == 5).double().mean())
    assert 0.15 <= share <= 0.30  # DeepSeek's rule: log2(3.5 / 3) = 0.222
    assert float((largest >= 6).double().mean()) > 0.5


@pytest.mark.parametrize("release", ["flash", "flash-0731", "v4.1-flash"])
def test_blocks_of_nothing_but_zeros_occur(release: str, sample_of: SampleOf) -> None:
    largest = fp4_magnitudes(sample_of(release)).amax(1)
    assert 0 < int((largest == 0).sum()) < 0.02 * largest.numel()


@pytest.mark.parametrize("release", ["flash", "pro"])
def test_a_tile_of_128_by_4_fp4_scales_has_three_exponents(release: str, sample_of: SampleOf) -> None:
    """What a recast to FP8 128x128 has to bridge."""
    tiles = [
        scales[row : row + 128, col : col + 4]
        for name, scales in e8m0(sample_of(release)).items()
        if ".experts." in name
        for row in range(0, scales.shape[0], 128)
        for col in range(0, scales.shape[1], 4)
    ]
    assert tiles and all(tile.unique().numel() >= 3 for tile in tiles)


@pytest.mark.parametrize("release", RELEASES)
def test_odd_fp8_subnormals_occur_and_nan_codes_do_not(release: str, sample_of: SampleOf) -> None:
    magnitude = fp8_codes(sample_of(release)) & 0x7F
    assert {1, 3, 5, 7} <= set(magnitude[magnitude < 8].tolist())
    assert 0x7F not in magnitude


@functools.cache
def table_magnitudes(directory: Path) -> torch.Tensor:
    """uint8 [blocks, 32]: the codes of the Engram tables without their signs."""
    found = [value for name, value in loaded(directory).items() if name.endswith(".engram.embed.weight")]
    assert found
    return torch.cat([value.view(torch.uint8).reshape(-1, 32) & 0x7F for value in found])


def test_table_blocks_reach_224_to_448_like_those_of_deepseeks_quantizer(sample_of: SampleOf) -> None:
    """Rule ceil(amax / 448): 224 and 448 are what 5 % of all blocks reach each, log2(232 / 224) and log2(448 / 432)."""
    largest = table_magnitudes(sample_of("v4.1-flash")).amax(1)
    share = {code: float((largest == code).double().mean()) for code in (0x00, 0x76, 0x7E)}
    assert 0.03 < share[0x76] < 0.07 and 0.03 < share[0x7E] < 0.07
    assert 0.001 < share[0x00] < 0.01
    assert 0.005 < float((largest < 0x76).double().mean()) < 0.015
    assert set(range(0x77, 0x7E)) <= set(largest.tolist())


def test_tables_hold_odd_subnormals_and_both_signs(sample_of: SampleOf) -> None:
    magnitudes = table_magnitudes(sample_of("v4.1-flash"))
    odd = (magnitudes < 8) & (magnitudes % 2 == 1)
    assert 0.002 < float(odd.double().mean()) < 0.008
    tables = [
        v for name, v in loaded(sample_of("v4.1-flash")).items() if name.endswith("engram.embed.weight")
    ]
    signs = torch.cat([(value.view(torch.uint8) >> 7).flatten() for value in tables])
    assert 0.49 < float(signs.double().mean()) < 0.51


@pytest.mark.parametrize(("release", "tile"), [("flash", 128), ("pro-base", 128), ("v4.1-flash", 32)])
def test_dense_tiles_reach_224(release: str, tile: int, sample_of: SampleOf) -> None:
    """What DeepSeek's rule writes. Tiles cut off by the edge have fewer values and are left out."""
    largest = [
        int(block.max())
        for name, value in loaded(sample_of(release)).items()
        if value.dtype == torch.float8_e4m3fn and not name.endswith("engram.embed.weight")
        for rows in (value.view(torch.uint8) & 0x7F).split(tile)
        for block in rows.split(tile, 1)
        if block.shape == (tile, tile)
    ]
    assert sum(code >= 0x76 for code in largest) > 0.98 * len(largest)


def test_large_table_is_drawn_in_pieces_of_whole_blocks() -> None:
    made = plan_sample(SampleOptions(release="v4.1-flash"))
    stored = (item for file in made.files for item in file.tensors)
    table = next(item for item in stored if item.name.endswith("engram.embed.weight"))
    large = replace(table, shape=(40_000, table.shape[1]))
    first, second = sample._pieces(large, config.read(made.document), 0)
    assert first.numel() + second.numel() == 40_000 * table.shape[1]
    assert first.numel() % 32 == 0
    assert not torch.equal(first[: second.numel()], second)


@pytest.mark.parametrize("release", RELEASES)
def test_fp8_codes_have_both_signs_of_zero(release: str, sample_of: SampleOf) -> None:
    assert {0x00, 0x80} <= set(fp8_codes(sample_of(release)).unique().tolist())


@pytest.mark.parametrize("release", RELEASES)
def test_scales_are_finite_powers_of_two_near_the_fan_in(release: str, sample_of: SampleOf) -> None:
    scales = e8m0(sample_of(release))
    assert bool(scales) == ("base" not in release)
    for values in scales.values():
        assert int(values.min()) > 100 and int(values.max()) < 130
    if "base" in release:
        tensors = loaded(sample_of(release))
        found = torch.cat([value.flatten() for name, value in tensors.items() if name.endswith(".scale")])
        assert found.dtype == torch.float32
        assert torch.equal(torch.frexp(found).mantissa, torch.full_like(found, 0.5))
        assert found.unique().numel() >= 3


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_floats_are_finite_and_vary(release: str, sample_of: SampleOf) -> None:
    for name, value in loaded(sample_of(release)).items():
        if value.dtype in (torch.bfloat16, torch.float32):
            assert bool(value.isfinite().all()), name
            assert value.numel() < 4 or name.endswith(".scale") or value.unique().numel() > 1, name


def test_norms_are_near_one_and_matrices_near_the_fan_in(sample_of: SampleOf) -> None:
    tensors = loaded(sample_of("flash"))
    norm, head = tensors["layers.1.attn_norm.weight"].float(), tensors["head.weight"].float()
    assert abs(float(norm.mean()) - 1) < 0.05
    assert 0.9 < float(head.std()) * math.sqrt(head.shape[1]) < 1.1


@pytest.mark.parametrize("release", [name for name in RELEASES if name != "v4.1-flash"])
def test_hash_tables_name_different_experts_for_every_token(release: str, sample_of: SampleOf) -> None:
    for layer in range(3):
        table = loaded(sample_of(release))[f"layers.{layer}.ffn.gate.tid2eid"]
        assert table.dtype == torch.int64 and table.shape == (512, 6)
        assert int(table.min()) == 0 and int(table.max()) == 7
        assert all(len(set(row)) == 6 for row in table.tolist())
        assert table.unique(dim=0).shape[0] >= 8


# ---- sizes


@functools.cache
def of_50_mb(release: str) -> sample.Sample:
    return plan_sample(SampleOptions(release=release, target_bytes=50_000_000))


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_target_size_is_met_within_a_tenth(release: str) -> None:
    assert of_50_mb(release).total_bytes == pytest.approx(50_000_000, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("target", [200_000_000, 1_000_000_000, 5_000_000_000])
def test_larger_target_sizes_are_met_within_a_tenth(target: int) -> None:
    assert plan_sample(SampleOptions(target_bytes=target)).total_bytes == pytest.approx(target, rel=0.10)


def test_target_size_keeps_what_the_user_fixed() -> None:
    made = plan_sample(SampleOptions(target_bytes=50_000_000, hidden=384, layers=3))
    assert (made.document["hidden_size"], made.document["num_hidden_layers"]) == (384, 3)
    assert made.total_bytes == pytest.approx(50_000_000, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_target_size_gives_a_sample_that_can_be_identified(release: str) -> None:
    require_identifiable(of_50_mb(release), release)


def require_identifiable(made: sample.Sample, release: str) -> None:
    seen = {item.name: Seen(item.dtype, item.shape) for file in made.files for item in file.tensors}
    found = identify(made.document, config.read(made.document), seen, Namespace.DEEPSEEK)
    assert (found.release.name, found.storage) == (release, RELEASES[release].storage)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1},
        {"layers": 43},
        {"experts": 6},
        {"heads": 2},
        {"vocab": 1000},
        {"hidden": 130, "intermediate": 66},
        {"hidden": 64, "intermediate": 64},
        {"hidden": 32, "intermediate": 32},
        {"hidden": 2, "intermediate": 2},
    ],
    ids=str,
)
def test_every_sample_that_can_be_asked_for_can_be_identified(options: dict[str, int]) -> None:
    for release in ("flash", "flash-base"):
        try:
            made = plan_sample(SampleOptions(release=release, **options))
        except Usage:
            continue  # refused before anything is written: just as good
        require_identifiable(made, release)


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_release_dims_with_one_layer_has_the_true_shapes(release: str) -> None:
    made = plan_sample(SampleOptions(release=release, release_dims=True, layers=1))
    family, model = RELEASES[release].family, config.read(shipped_config(release))
    logicals = [
        item
        for item in inventory.logical_tensors(model, family)
        if not item.name.startswith("layers.") or item.name.startswith("layers.0.")
    ]
    full = inventory.lay_out(logicals, family.table, RELEASES[release].storage, Namespace.DEEPSEEK).stored
    # DSpark projects as many hidden states as it taps layers, and one layer can be tapped once only
    taps = ("mtp.0.main_proj.weight", "mtp.0.main_proj.scale")
    expected = {name: (item.dtype, item.shape) for name, item in full.items() if name not in taps}
    found = {
        item.name: (item.dtype, item.shape) for file in made.files for item in file.tensors if item.parts
    }
    assert {name: found[name] for name in found if name not in taps} == expected


def test_release_dims_with_fewer_experts_has_the_other_true_shapes() -> None:
    made = plan_sample(SampleOptions(release_dims=True, layers=4, experts=8)).document
    full = shipped_config("flash")
    changed = {key for key in full if made[key] != full[key]}
    assert changed == {"n_routed_experts", "num_hidden_layers", "compress_ratios"}
    assert made["n_routed_experts"] == 8


@pytest.mark.slow
def test_release_dims_without_layers_is_the_whole_release() -> None:
    made = plan_sample(SampleOptions(release="flash", release_dims=True))
    assert made.num_tensors == 69_187
    assert made.document == shipped_config("flash")


@pytest.mark.parametrize(
    "options",
    [
        {"release": "flash-v5"},
        {"layers": 44},
        {"layers": -1},
        {"hidden": 255},
        {"hidden": -2},
        {"heads": 3},
        {"vocab": 511},
        {"experts": 5},
        {"intermediate": 127},
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((Usage, BadConfig)):
        plan_sample(SampleOptions(**options))


# ---- the tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "the cat sat on the mat, and then it ran",
    "  two  blanks \n\n newlines\tand tabs\r\n",
    "\u00fcber \u6df1\u5ea6\u6c42\u7d22 \U0001f40b \u0645\u0631\u062d\u0628\u0627 e\u0301",
    "\x00\x01\x7f control",
    "def f(x):\n    return x**2  # 100%",
    "".join(map(chr, range(32, 1000))),
]


@pytest.fixture(scope="session")
def tokenizer(sample_of: SampleOf) -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(sample_of("flash") / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS, ids=[f"text{number}" for number in range(len(TEXTS))])
def test_tokenizer_gives_text_back(text: str, tokenizer: Any) -> None:
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert all(0 <= token < 512 for token in encoded.ids)


def test_tokenizer_merges_common_pairs(tokenizer: Any) -> None:
    assert len(tokenizer.encode("the then there").ids) < len("the then there")


def test_tokenizer_has_512_entries_with_the_released_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.get_vocab_size() == 512
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))
    assert tokenizer.token_to_id("<\uff5cbegin\u2581of\u2581sentence\uff5c>") == 0
    assert tokenizer.token_to_id("<\uff5cend\u2581of\u2581sentence\uff5c>") == 1
    marked = "<\uff5cUser\uff5c>hi<\uff5cAssistant\uff5c></think>"
    assert tokenizer.encode(marked).tokens[0] == "<\uff5cUser\uff5c>"
    assert tokenizer.encode(marked).tokens[-1] == "</think>"


def test_transformers_loads_the_tokenizer_of_a_sample(sample_of: SampleOf) -> None:
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoTokenizer.from_pretrained(sample_of("flash"))
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 1, 1)
    ids = found("the whale \U0001f40b")["input_ids"]
    assert found.decode(ids) == "the whale \U0001f40b"
