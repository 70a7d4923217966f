"""dsv4ckpt.plan: what will be written is known before a byte of data is read, and nothing gets lost.

The plans are made from samples on disk, or from headers alone where no small file exists (fused FP4 experts,
the real Flash); sizes, offsets and indexes are added up here, not taken from the plan's own properties.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dsv4ckpt import config, inventory, plan, sample, source, survey
from dsv4ckpt.errors import NotConform, Usage
from dsv4ckpt.formats import Storage, Target
from dsv4ckpt.names import Experts, Namespace
from dsv4ckpt.plan import ConvertOptions, Plan, ScalePolicy, make_plan
from dsv4ckpt.release import RELEASES, shipped_config
from dsv4ckpt.shard import Entry
from dsv4ckpt.steps import Op, PlannedFile, PlannedTensor, Step
from dsv4ckpt.survey import Survey

WIDTH = {"I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}
SampleOf = Callable[[str], Path]
SurveyOf = Callable[[str], Survey]


@pytest.fixture(scope="session")
def survey_of(sample_of: SampleOf) -> SurveyOf:
    """The survey of a release's tiny sample."""
    return functools.cache(lambda release: survey.survey(source.open_checkpoint(str(sample_of(release)))))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transformers": {"namespace": Namespace.TRANSFORMERS},
    "subset": {"layers": (0, 1, 2), "keep_mtp": False},
    "fused subset": {"layers": (0, 1, 2), "namespace": Namespace.TRANSFORMERS},
    "small shards": {"max_shard_bytes": 300_000},
    "tiny fused shards": {"max_shard_bytes": 20_000, "namespace": Namespace.TRANSFORMERS, "keep_mtp": False},
    "one byte": {"max_shard_bytes": 1},
}


@pytest.fixture(scope="session")
def plan_of(survey_of: SurveyOf) -> Callable[[str, str], Plan]:
    """The plan of a release's tiny sample with one of the sets of options."""
    return functools.cache(
        lambda release, variant: make_plan(survey_of(release), ConvertOptions(**VARIANTS[variant]))
    )


@pytest.fixture(params=[f"{release}, {variant}" for release in RELEASES for variant in VARIANTS])
def planned(
    request: pytest.FixtureRequest, survey_of: SurveyOf, plan_of: Callable[[str, str], Plan]
) -> tuple[Survey, Plan]:
    """Every release with every set of options."""
    release, variant = request.param.split(", ")
    return survey_of(release), plan_of(release, variant)


def header_of(file: PlannedFile) -> tuple[int, dict[str, dict[str, Any]]]:
    """(where the data starts, entries) as a reader of the file will see them."""
    length = int.from_bytes(file.header[:8], "little")
    assert len(file.header) == 8 + length
    document = json.loads(file.header[8:])
    assert document.pop("__metadata__") == {"format": "pt"}
    return 8 + length, document


def tensors(made: Plan) -> Iterator[PlannedTensor]:
    return (tensor for file in made.files for tensor in file.tensors)


def size_of(tensor: PlannedTensor) -> int:
    return math.prod(tensor.shape) * WIDTH[tensor.dtype]


def bytes_made(step: Step) -> int:
    """A packed FP4 byte becomes two values of two bytes, an FP8 byte one."""
    growth = 1 if step.quant is None else 2 * step.quant.codes_per_element
    return step.rows * step.row_bytes * (growth if step.op is Op.DECODE else 1)


def block_rows(step: Step) -> int:
    assert step.quant is not None
    return step.quant.block.rows


def require_aligned(found: Survey, made: Plan) -> None:
    for file in made.files:
        start, entries = header_of(file)
        for name, entry in entries.items():
            assert (start + entry["data_offsets"][0]) % WIDTH[entry["dtype"]] == 0, name


def require_filled(found: Survey, made: Plan) -> None:
    for tensor in tensors(made):
        assert sum(map(bytes_made, tensor.steps)) == size_of(tensor), tensor.name


def require_within_source(found: Survey, made: Plan) -> None:
    for tensor in tensors(made):
        for step in tensor.steps:
            entry = found.checkpoint.tensors[step.source].entry
            assert (step.begin + step.rows) * step.row_bytes <= entry.end - entry.begin
            if step.scale:
                scale = found.checkpoint.tensors[step.scale].entry
                rows = -(-step.rows // block_rows(step))
                assert (step.scale_begin + rows) * step.scale_row_bytes <= scale.end - scale.begin


def require_all_used_or_dropped(found: Survey, made: Plan) -> None:
    used = Counter[str]()
    for tensor in tensors(made):
        for step in tensor.steps:
            used[step.source] += step.rows * step.row_bytes
            if step.scale:
                used[step.scale] += -(-step.rows // block_rows(step)) * step.scale_row_bytes
    for item in made.dropped:
        assert item.name not in used
        used[item.name] += item.size
    stored = found.checkpoint.tensors
    assert used == {name: place.entry.end - place.entry.begin for name, place in stored.items()}


# ---- files


@pytest.mark.slow
def test_every_tensor_starts_at_a_multiple_of_its_element(planned: tuple[Survey, Plan]) -> None:
    require_aligned(*planned)


def test_headers_hold_the_planned_tensors_in_order_without_holes(planned: tuple[Survey, Plan]) -> None:
    for file in planned[1].files:
        start, entries = header_of(file)
        position = 0
        assert list(entries) == [tensor.name for tensor in file.tensors]
        for tensor in file.tensors:
            end = position + size_of(tensor)
            assert entries[tensor.name] == {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        assert file.size == start + position
    assert planned[1].shard_bytes == sum(file.size for file in planned[1].files)


def test_steps_fill_their_tensor_exactly(planned: tuple[Survey, Plan]) -> None:
    require_filled(*planned)


def test_steps_stay_within_their_source(planned: tuple[Survey, Plan]) -> None:
    require_within_source(*planned)


def test_no_output_is_planned_twice(planned: tuple[Survey, Plan]) -> None:
    assert max(Counter(tensor.name for tensor in tensors(planned[1])).values()) == 1
    assert planned[1].num_tensors == sum(len(header_of(file)[1]) for file in planned[1].files)


def test_index_points_at_the_file_of_every_tensor_and_adds_up_the_bytes(planned: tuple[Survey, Plan]) -> None:
    index = json.loads(planned[1].written["model.safetensors.index.json"])
    where = {name: file.name for file in planned[1].files for name in header_of(file)[1]}
    assert index["weight_map"] == where
    assert list(index["weight_map"]) == sorted(where)
    assert index["metadata"] == {"total_size": sum(map(size_of, tensors(planned[1])))}


def test_files_are_numbered_like_shards_of_one_model(planned: tuple[Survey, Plan]) -> None:
    count = len(planned[1].files)
    expected = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [file.name for file in planned[1].files] == expected


def test_shards_keep_to_the_limit_or_hold_one_larger_tensor_alone(planned: tuple[Survey, Plan]) -> None:
    for file in planned[1].files:
        size = sum(map(size_of, file.tensors))
        assert size <= planned[1].options.max_shard_bytes or len(file.tensors) == 1
        assert file.tensors


@pytest.mark.parametrize("limit", [1, 1_000, 20_000, 131_072, 131_073, 300_000, 5 * 10**9])
def test_shards_are_filled_before_the_next_one_is_opened(limit: int, survey_of: SurveyOf) -> None:
    made = make_plan(survey_of("flash"), ConvertOptions(max_shard_bytes=limit))
    for file, following in zip(made.files, made.files[1:], strict=False):
        if owner(file.tensors[-1]) == owner(following.tensors[0]):
            assert sum(map(size_of, file.tensors)) + size_of(following.tensors[0]) > limit


def owner(tensor: PlannedTensor) -> str:
    """The layer, stage or top part that a tensor belongs to, by the logical name of its first step."""
    head, _, rest = tensor.steps[0].name.partition(".")
    if head in ("layers", "mtp"):
        return f"{head}.{rest.partition('.')[0]}"
    return {"embed": "embed", "head": "head", "norm": "head"}.get(
        head, "head" if head.startswith("hc_") else "opaque"
    )


def test_a_shard_never_mixes_layers(planned: tuple[Survey, Plan]) -> None:
    for file in planned[1].files:
        assert len({owner(tensor) for tensor in file.tensors}) == 1, file.name


def test_shards_follow_the_order_of_the_release(survey_of: SurveyOf) -> None:
    made = make_plan(survey_of("flash-0731"), ConvertOptions())
    order = [owner(file.tensors[0]) for file in made.files]
    assert order == [
        "embed",
        *(f"layers.{layer}" for layer in range(4)),
        "head",
        *(f"mtp.{k}" for k in range(3)),
    ]


# ---- what the output is


@pytest.mark.parametrize("release", RELEASES)
def test_output_of_all_layers_holds_every_source_weight_and_no_scale(
    release: str, survey_of: SurveyOf
) -> None:
    made = make_plan(survey_of(release), ConvertOptions())
    weights = {name for name in survey_of(release).checkpoint.tensors if not name.endswith(".scale")}
    assert {tensor.name for tensor in tensors(made)} == weights
    assert made.dropped == ()


@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("release", RELEASES)
def test_only_quantized_matrices_are_decoded(release: str, namespace: Namespace, survey_of: SurveyOf) -> None:
    stored = survey_of(release).checkpoint.tensors
    ops = {"I8": Op.DECODE, "F8_E4M3": Op.DECODE}
    made = make_plan(survey_of(release), ConvertOptions(namespace=namespace))
    for tensor in tensors(made):
        for step in tensor.steps:
            entry = stored[step.source].entry
            assert step.op is ops.get(entry.dtype, Op.COPY)
            assert tensor.dtype == ("BF16" if entry.dtype in ops else entry.dtype)
            expected = step.source.removesuffix("weight") + "scale" if entry.dtype in ops else None
            assert step.scale == expected
    copied = [t for t in tensors(made) if all(step.op is Op.COPY for step in t.steps)]
    assert made.num_unchanged == len(copied)


@pytest.mark.parametrize("release", RELEASES)
def test_hyper_connection_scales_are_copied_and_scale_nothing(release: str, survey_of: SurveyOf) -> None:
    made = make_plan(survey_of(release), ConvertOptions())
    steps = [step for tensor in tensors(made) for step in tensor.steps]
    copied = [step.source for step in steps if "hc_" in step.source]
    assert (
        len(copied)
        == len(set(copied))
        == sum("hc_" in name for name in survey_of(release).checkpoint.tensors)
    )
    assert {step.op for step in steps if "hc_" in step.source} == {Op.COPY}
    assert not [step.scale for step in steps if step.scale and "hc_" in step.scale]


def test_fused_experts_are_made_of_gate_and_up_expert_by_expert(survey_of: SurveyOf) -> None:
    made = make_plan(survey_of("flash"), ConvertOptions(namespace=Namespace.TRANSFORMERS))
    by_name = {tensor.name: tensor for tensor in tensors(made)}
    fused = by_name["model.layers.1.mlp.experts.gate_up_proj"]
    assert fused.shape == (8, 2 * 128, 256)
    expected = [f"layers.1.ffn.experts.{e}.{part}.weight" for e in range(8) for part in ("w1", "w3")]
    assert [step.source for step in fused.steps] == expected
    down = by_name["model.layers.1.mlp.experts.down_proj"]
    assert [step.source for step in down.steps] == [f"layers.1.ffn.experts.{e}.w2.weight" for e in range(8)]


@pytest.mark.parametrize("release", ["vision-exp", "v4.1-flash"])
@pytest.mark.parametrize("namespace", Namespace)
def test_opaque_tensors_are_carried_whole_under_their_own_name(
    release: str, namespace: Namespace, survey_of: SurveyOf
) -> None:
    options = ConvertOptions(namespace=namespace, layers=(0, 1, 2), keep_mtp=False)
    made = make_plan(survey_of(release), options)
    found = {tensor.name: tensor for tensor in tensors(made)}
    assert len(made.opaque) > 20
    for name in made.opaque:
        entry = survey_of(release).checkpoint.tensors[name].entry
        assert (found[name].dtype, found[name].shape) == (entry.dtype, entry.shape)
        assert [(step.op, step.source) for step in found[name].steps] == [(Op.COPY, name)]
        assert sum(map(bytes_made, found[name].steps)) == entry.end - entry.begin


@pytest.mark.parametrize("keep_mtp", [True, False])
def test_selected_layers_are_renumbered_and_the_config_agrees(keep_mtp: bool, survey_of: SurveyOf) -> None:
    made = make_plan(survey_of("flash"), ConvertOptions(layers=(1, 3), keep_mtp=keep_mtp))
    document = json.loads(made.written["config.json"])
    assert (document["num_hidden_layers"], document["num_hash_layers"]) == (2, 1)
    assert document["compress_ratios"] == [0, 128, *([0] if keep_mtp else [])]
    assert document["num_nextn_predict_layers"] == int(keep_mtp)
    assert "quantization_config" not in document and "expert_dtype" not in document
    found = {tensor.name: tensor.steps[0].source for tensor in tensors(made)}
    assert found["layers.0.attn.wq_a.weight"] == "layers.1.attn.wq_a.weight"
    assert found["layers.1.attn.compressor.ape"] == "layers.3.attn.compressor.ape"
    assert not [name for name in found if name.startswith(("layers.2", "layers.3"))]
    assert any(name.startswith("mtp.") for name in found) == keep_mtp


def test_small_files_are_carried_with_their_hashes_and_the_rest_is_named(
    sample_of: SampleOf, tmp_path: Path
) -> None:
    shutil.copytree(sample_of("flash"), tmp_path / "src")
    (tmp_path / "src" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "src" / "weights.bin").write_bytes(b"\x80\x04")
    made = make_plan(survey.survey(source.open_checkpoint(str(tmp_path / "src"))), ConvertOptions())
    copied = {name for name, _, _ in made.copied}
    assert copied >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}
    assert {item.name: bool(item.left) for item in made.left} == {"evil.py": True, "weights.bin": True}
    for name, size, _ in made.copied:
        assert size == (tmp_path / "src" / name).stat().st_size
    everything = (
        sum(size for _, size, _ in made.copied) + sum(map(len, made.written.values())) + made.shard_bytes
    )
    assert made.total_bytes == everything


# ---- what is left out


def test_dropping_mtp_names_every_tensor_of_it_with_its_scales(survey_of: SurveyOf) -> None:
    made = make_plan(survey_of("flash"), ConvertOptions(keep_mtp=False))
    stored = survey_of("flash").checkpoint.tensors
    expected = {
        name: place.entry.end - place.entry.begin for name, place in stored.items() if name.startswith("mtp.")
    }
    assert {item.name: item.size for item in made.dropped} == expected
    assert {item.reason for item in made.dropped} == {"--mtp drop"}


def test_leaving_layers_out_names_every_tensor_of_them(survey_of: SurveyOf) -> None:
    made = make_plan(survey_of("flash"), ConvertOptions(layers=(0, 1), keep_mtp=False))
    reasons = {item.name: item.reason for item in made.dropped}
    expected = {}
    for name in survey_of("flash").checkpoint.tensors:
        if name.startswith(("layers.2.", "layers.3.")):
            expected[name] = "--layers"
        elif name.startswith("mtp."):
            expected[name] = "--mtp drop"
    assert reasons == expected
    assert [item.name for item in made.dropped] == sorted(expected)


def test_every_input_byte_is_used_or_dropped_by_name(planned: tuple[Survey, Plan]) -> None:
    require_all_used_or_dropped(*planned)


# ---- sources that only exist as headers


def surveyed(
    document: dict[str, Any], release: str, storage: Storage, namespace: Namespace, directory: Path
) -> Survey:
    """The survey of a checkpoint of one huge shard, made from the inventory instead of from files."""
    family = RELEASES[release].family
    logicals = list(inventory.logical_tensors(config.read(document), family))
    stored = inventory.lay_out(logicals, family.table, storage, namespace).stored
    checkpoint = source.Checkpoint(str(directory), False, json.dumps(document).encode())
    position = 0
    for name, item in stored.items():
        end = position + math.prod(item.shape) * WIDTH[item.dtype]
        checkpoint.tensors[name] = source.Location("all", Entry(item.dtype, item.shape, position, end))
        position = end
    return survey.survey(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("to", Namespace)
@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize(
    ("release", "storage"),
    [
        ("flash", Storage.FP4_FP8),
        ("flash", Storage.FP8),
        ("flash", Storage.BF16),
        ("pro-base", Storage.FP8_F32SCALE),
        ("pro-0813", Storage.FP8),
        ("v4.1-flash", Storage.FP4_FP8_32),
    ],
)
def test_plan_from_every_storage_and_namespace_is_whole(
    release: str, storage: Storage, namespace: Namespace, to: Namespace, tmp_path: Path
) -> None:
    document = sample.plan_sample(sample.SampleOptions(release=release)).document
    found = surveyed(document, release, storage, namespace, tmp_path)
    assert found.deviations == []
    made = make_plan(found, ConvertOptions(namespace=to, layers=(0, 1, 2)))
    for require in (require_all_used_or_dropped, require_filled, require_within_source, require_aligned):
        require(found, made)
    native = make_plan(surveyed(document, release, storage, Namespace.DEEPSEEK, tmp_path), made.options)
    shapes = [[(t.name, t.dtype, t.shape) for t in tensors(each)] for each in (made, native)]
    assert shapes[0] == shapes[1]


def test_plan_from_fused_fp4_experts_takes_rows_of_codes_and_scales(tmp_path: Path) -> None:
    document = sample.plan_sample(sample.SampleOptions()).document
    found = surveyed(document, "flash", Storage.FP4_FP8, Namespace.TRANSFORMERS, tmp_path)
    by_name = {tensor.name: tensor for tensor in tensors(make_plan(found, ConvertOptions()))}
    (step,) = by_name["layers.2.ffn.experts.5.w3.weight"].steps
    # I = 128, H = 256: expert 5 starts at row 5 x 2 x 128, its w3 128 rows later; a scale row for each row
    assert (step.source, step.begin, step.rows, step.row_bytes) == (
        "model.layers.2.mlp.experts.gate_up_proj", (5 * 2 + 1) * 128, 128, 128,
    )  # fmt: skip
    assert (step.scale, step.scale_begin, step.scale_row_bytes) == (
        "model.layers.2.mlp.experts.gate_up_proj_scale_inv", (5 * 2 + 1) * 128, 8,
    )  # fmt: skip


@pytest.mark.slow
def test_plan_of_the_real_flash_has_the_size_that_follows_from_the_published_census(tmp_path: Path) -> None:
    found = surveyed(shipped_config("flash"), "flash", Storage.FP4_FP8, Namespace.DEEPSEEK, tmp_path)
    made = make_plan(found, ConvertOptions(namespace=Namespace.TRANSFORMERS))
    f32_bytes, i64_bytes = 144_672_072, 18_616_320
    in_bf16 = 290_944_616_402 - f32_bytes // 4 - i64_bytes // 8
    index = json.loads(made.written["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == 2 * in_bf16 + f32_bytes + i64_bytes
    num_scales, num_experts, num_blocks = 34_167, 44 * 256 * 3, 44
    assert len(index["weight_map"]) == 69_187 - num_scales - num_experts + 2 * num_blocks
    large = {sum(map(size_of, file.tensors)) for file in made.files if len(file.tensors) > 1}
    assert max(large) <= 5 * 10**9


# ---- equal plans, other plans


@pytest.mark.parametrize("release", RELEASES)
def test_plan_is_equal_for_equal_inputs(release: str, sample_of: SampleOf) -> None:
    options = ConvertOptions(namespace=Namespace.TRANSFORMERS)
    one, two = (
        make_plan(survey.survey(source.open_checkpoint(str(sample_of(release)))), options) for _ in range(2)
    )
    assert one == two
    assert one.sha256 == two.sha256


def test_plan_of_a_copy_in_another_place_is_equal(sample_of: SampleOf, tmp_path: Path) -> None:
    shutil.copytree(sample_of("flash"), tmp_path / "else where")
    for file in (tmp_path / "else where").rglob("*"):
        os.utime(file, (1, 1))
    plans = [
        make_plan(survey.survey(source.open_checkpoint(str(path))), ConvertOptions())
        for path in (sample_of("flash"), tmp_path / "else where")
    ]
    assert plans[0].sha256 == plans[1].sha256


_HASHED = """
import sys
from dsv4ckpt import plan, source, survey
nan = frozenset({"embed.weight", "head.weight", "norm.weight"})
unit = frozenset({"layers.0.attn.wkv.weight", "mtp.0.e_proj.weight", "mtp.0.h_proj.weight"})
options = plan.ConvertOptions(layers=(0, 2), allow_nan=nan, unit_scales=unit)
print(plan.make_plan(survey.survey(source.open_checkpoint(sys.argv[1])), options).sha256)
"""


@pytest.mark.slow
def test_plan_does_not_depend_on_the_order_of_sets(sample_of: SampleOf) -> None:
    found = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _HASHED, str(sample_of("flash"))]
        found.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1


OTHER: dict[str, Any] = {
    "target": Target.FP8,
    "namespace": Namespace.TRANSFORMERS,
    "layers": (0, 1, 2),
    "keep_mtp": False,
    "max_shard_bytes": 10**9,
    "allow_nan": frozenset({"embed.weight"}),
    "unit_scales": frozenset({"layers.0.attn.wkv.weight"}),
    "scale_policy": ScalePolicy.FRESH,
    "input_scales": {"layers.0.ffn.experts.0.w2.input_scale": 0.5},
    "allow_lossy": True,
    "experts": Experts.SPLIT,
    "chunk_bytes": 10**6,
    "as_stored": True,
}
ONLY_PERMITS = {"allow_lossy"}  # changes no byte: what was refused is finished by the same plan


def test_every_option_is_tested_below() -> None:
    assert {item.name for item in fields(ConvertOptions)} == set(OTHER)


@pytest.mark.parametrize("option", OTHER)
def test_hash_changes_with_each_option(option: str, survey_of: SurveyOf) -> None:
    plain = make_plan(survey_of("flash"), ConvertOptions())
    changed = replace(plain, options=replace(plain.options, **{option: OTHER[option]}))
    assert (changed.sha256 != plain.sha256) == (option not in ONLY_PERMITS)
    if option not in ("input_scales", *ONLY_PERMITS):  # those go with NVFP4 only
        assert make_plan(survey_of("flash"), changed.options).sha256 != plain.sha256


def test_naming_every_layer_plans_the_same_files(survey_of: SurveyOf) -> None:
    plain = make_plan(survey_of("flash"), ConvertOptions())
    named = make_plan(survey_of("flash"), ConvertOptions(layers=(0, 1, 2, 3)))
    assert named.files == plain.files and named.written == plain.written


@pytest.mark.parametrize("what", ["config", "small file", "header"])
def test_hash_changes_with_the_source(
    what: str, sample_of: SampleOf, survey_of: SurveyOf, tmp_path: Path
) -> None:
    shutil.copytree(sample_of("flash"), tmp_path / "src")
    if what == "config":
        file = tmp_path / "src" / "config.json"
        file.write_text(file.read_text().replace('"rope_theta": 10000', '"rope_theta": 10001'))
    elif what == "small file":
        (tmp_path / "src" / "LICENSE").write_text("another one")
    else:
        file = tmp_path / "src" / "model-00001-of-00007.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        file.write_bytes(
            (length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :]
        )
    changed = make_plan(survey.survey(source.open_checkpoint(str(tmp_path / "src"))), ConvertOptions())
    assert changed.sha256 != make_plan(survey_of("flash"), ConvertOptions()).sha256


def test_document_is_json_and_names_no_place_or_time(survey_of: SurveyOf, sample_of: SampleOf) -> None:
    text = json.dumps(make_plan(survey_of("flash"), ConvertOptions()).document())
    assert str(sample_of("flash")) not in text
    assert str(Path.home()) not in text
    assert set(json.loads(text)) == {
        "tool", "release", "source", "options", "files", "written", "copied", "dropped", "layout", "sidecar",
        "original",
    }  # fmt: skip


# ---- options that do not fit


@pytest.mark.parametrize("layers", [(), (4,), (0, 9), (0, 1, 2, 3, 4)])
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...], survey_of: SurveyOf) -> None:
    with pytest.raises(Usage, match="layer") as caught:
        make_plan(survey_of("flash"), ConvertOptions(layers=layers))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("option", ["allow_nan", "unit_scales"])
@pytest.mark.parametrize(
    "name", ["layers.0.attn.wkv", "layers.0.attn.wkv.scale", "model.norm.weight", "*", ""]
)
def test_names_of_no_tensor_are_refused(option: str, name: str, survey_of: SurveyOf) -> None:
    with pytest.raises(Usage, match="names no tensor"):
        make_plan(survey_of("flash"), ConvertOptions(**{option: frozenset({name})}))


def test_too_few_layers_for_dspark_are_refused(survey_of: SurveyOf) -> None:
    with pytest.raises(Usage, match="--mtp drop"):
        make_plan(survey_of("flash-0731"), ConvertOptions(layers=(0, 1)))


@pytest.mark.parametrize("target", [Target.NVFP4, Target.MXFP4_CT])
def test_formats_of_other_tools_keep_the_released_names(target: Target, survey_of: SurveyOf) -> None:
    with pytest.raises(Usage, match="released names"):
        make_plan(survey_of("flash"), ConvertOptions(target=target, namespace=Namespace.TRANSFORMERS))


@pytest.mark.parametrize("target", [Target.NVFP4, Target.MXFP4_CT])
def test_fp8_experts_do_not_become_fp4_unasked(target: Target, survey_of: SurveyOf) -> None:
    with pytest.raises(Usage, match="--allow-lossy"):
        make_plan(survey_of("flash-base"), ConvertOptions(target=target))


# ---- conservation: a plan that someone broke by hand is caught


def first_decoded(made: Plan, suffix: str = "layers.1.ffn.experts.0.w1.weight") -> tuple[int, int]:
    """(file, tensor) of a tensor with scales."""
    for number, file in enumerate(made.files):
        for index, tensor in enumerate(file.tensors):
            if tensor.name == suffix:
                return number, index
    raise AssertionError(suffix)


def with_tensors(made: Plan, number: int, changed: dict[int, PlannedTensor | None]) -> Plan:
    """The plan with some tensors of one file replaced or, for None, removed."""
    kept = tuple(changed.get(index, tensor) for index, tensor in enumerate(made.files[number].tensors))
    file = replace(made.files[number], tensors=tuple(tensor for tensor in kept if tensor is not None))
    return replace(made, files=(*made.files[:number], file, *made.files[number + 1 :]))


def require_caught(found: Survey, broken: Plan) -> None:
    with pytest.raises(NotConform):
        plan._require_conservation(found, broken)


@pytest.fixture
def sound(survey_of: SurveyOf) -> tuple[Survey, Plan]:
    return survey_of("flash"), make_plan(survey_of("flash"), ConvertOptions(layers=(0, 1, 2)))


def test_conservation_holds_for_every_plan(planned: tuple[Survey, Plan]) -> None:
    plan._require_conservation(*planned)


def test_conservation_catches_a_step_removed(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    number, index = first_decoded(made)
    tensor = made.files[number].tensors[index]
    require_caught(found, with_tensors(made, number, {index: tensor._replace(steps=())}))


def test_conservation_catches_an_output_removed(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    number, index = first_decoded(made)
    require_caught(found, with_tensors(made, number, {index: None}))


def test_conservation_catches_a_step_done_twice(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    number, index = first_decoded(made)
    tensor = made.files[number].tensors[index]
    require_caught(found, with_tensors(made, number, {index: tensor._replace(steps=tensor.steps * 2)}))


@pytest.mark.parametrize(
    "change",
    [{"rows": 127}, {"begin": 1}, {"begin": 64, "rows": 64}, {"scale": None}, {"scale_begin": 1}],
    ids=str,
)
def test_conservation_catches_a_step_that_covers_other_rows(
    change: dict[str, Any], sound: tuple[Survey, Plan]
) -> None:
    found, made = sound
    number, index = first_decoded(made)
    tensor = made.files[number].tensors[index]
    (step,) = tensor.steps
    broken = with_tensors(made, number, {index: tensor._replace(steps=(step._replace(**change),))})
    require_caught(found, broken)


def test_conservation_catches_scales_of_another_matrix(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    number, index = first_decoded(made)
    tensor = made.files[number].tensors[index]
    (step,) = tensor.steps
    other = step._replace(scale="layers.1.ffn.experts.1.w1.scale")
    require_caught(found, with_tensors(made, number, {index: tensor._replace(steps=(other,))}))


def test_conservation_catches_an_input_both_used_and_dropped(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    for name in ("norm.weight", "layers.1.ffn.experts.0.w1.weight", "layers.1.ffn.experts.0.w1.scale"):
        require_caught(found, replace(made, dropped=(*made.dropped, plan.Dropped(name, "--layers", 1))))


@pytest.mark.parametrize("position", [0, -1])
def test_conservation_catches_a_dropped_tensor_that_is_not_named(
    position: int, sound: tuple[Survey, Plan]
) -> None:
    found, made = sound
    dropped = list(made.dropped)
    del dropped[position]
    require_caught(found, replace(made, dropped=tuple(dropped)))


def test_conservation_catches_a_tensor_dropped_twice(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    require_caught(found, replace(made, dropped=(*made.dropped, made.dropped[0])))


@pytest.mark.parametrize("copies", [0, 2])
def test_conservation_catches_an_opaque_tensor_lost_or_doubled(copies: int, survey_of: SurveyOf) -> None:
    found = survey_of("vision-exp")
    made = make_plan(found, ConvertOptions())
    number = len(made.files) - 1
    tensor = made.files[number].tensors[0]
    assert tensor.name in made.opaque
    require_caught(found, with_tensors(made, number, {0: tensor._replace(steps=tensor.steps * copies)}))


def test_conservation_catches_steps_that_moved_to_another_output(sound: tuple[Survey, Plan]) -> None:
    """Every input is used once, but one output is empty and another one twice as long."""
    found, made = sound
    number, index = first_decoded(made)
    other = first_decoded(made, "layers.1.ffn.experts.0.w3.weight")[1]
    empty, double = made.files[number].tensors[index], made.files[number].tensors[other]
    moved = {index: empty._replace(steps=()), other: double._replace(steps=double.steps + empty.steps)}
    require_caught(found, with_tensors(made, number, moved))


def test_conservation_catches_two_outputs_of_one_name(sound: tuple[Survey, Plan]) -> None:
    found, made = sound
    number, index = first_decoded(made)
    other = first_decoded(made, "layers.1.ffn.experts.0.w3.weight")[1]
    name = made.files[number].tensors[other].name
    renamed = made.files[number].tensors[index]._replace(name=name)
    require_caught(found, with_tensors(made, number, {index: renamed}))
