"""Conversion to BF16 from end to end, against safetensors, numpy and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tools
import torch
from safetensors.torch import load_file, save_file

from dsv4ckpt import outdir, plan, run, sample, sink, source, survey
from dsv4ckpt.errors import ForeignOutput, Interrupted, NoSpace, NotConform, NotFinite, SourceChanged
from dsv4ckpt.formats import Storage
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ConvertOptions
from dsv4ckpt.release import RELEASES

Sample = Callable[[str], Path]
Convert = Callable[..., run.Summary]
Tree = Callable[[Path], dict[str, str]]


def everything(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def float64(tensor: torch.Tensor) -> np.ndarray:
    """Stored values, without scales, by numpy and from the formats' definitions."""
    if tensor.dtype == torch.int8:
        grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        packed = tensor.view(torch.uint8).numpy()
        return np.stack([grid[packed & 15], grid[packed >> 4]], -1).reshape(packed.shape[0], -1)
    if tensor.dtype == torch.float8_e8m0fnu:
        return np.ldexp(1.0, tensor.view(torch.uint8).numpy().astype(int) - 127)
    return tensor.float().numpy().astype(np.float64)


def bf16(values: np.ndarray) -> np.ndarray:
    """Round normal float64 values to bfloat16, ties to even; exact ones only need the high half of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_convert_every_release_equals_a_float64_decode_by_numpy(
    release: str, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    summary = convert(sample_of(release), tmp_path / "out")
    stored, made = everything(sample_of(release)), everything(tmp_path / "out")
    assert summary.num_inexact == summary.num_not_finite == 0
    for name, value in stored.items():
        scale = stored.get(name.removesuffix(".weight") + ".scale") if name.endswith(".weight") else None
        if name.endswith(".scale"):
            assert name not in made
        elif scale is None:
            assert made[name].dtype == value.dtype, name
            assert torch.equal(made[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name
        else:
            logical, scales = float64(value), float64(scale)
            rows = -(-logical.shape[0] // scales.shape[0])
            cols = -(-logical.shape[1] // scales.shape[1])
            wide = scales.repeat(rows, 0).repeat(cols, 1)[: logical.shape[0], : logical.shape[1]]
            got = made[name].view(torch.uint16).numpy()
            assert made[name].dtype == torch.bfloat16
            assert np.array_equal(got, bf16(logical * wide)), name
    assert len(made) == sum(not name.endswith(".scale") for name in stored)


@pytest.mark.slow
@pytest.mark.parametrize("namespace", list(Namespace))
@pytest.mark.parametrize("release", RELEASES)
def test_convert_output_conforms_to_its_own_inventory(
    release: str, namespace: Namespace, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    convert(sample_of(release), tmp_path / "out", namespace=namespace)
    found = survey.survey(source.open_checkpoint(str(tmp_path / "out")))
    assert found.deviations == []
    assert found.checkpoint.problems == []
    assert found.checkpoint.index_total == found.checkpoint.total_size
    assert found.identity == (found.identity.__class__)(RELEASES[release], Storage.BF16, namespace)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-base", "flash-0731", "v4.1-flash"])
def test_convert_to_transformers_names_and_back_gives_the_same_shards(
    release: str, sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    convert(sample_of(release), tmp_path / "direct")
    convert(sample_of(release), tmp_path / "renamed", namespace=Namespace.TRANSFORMERS)
    convert(tmp_path / "renamed", tmp_path / "back", namespace=Namespace.DEEPSEEK)
    direct, back = tree_of(tmp_path / "direct"), tree_of(tmp_path / "back")
    for bookkeeping in (
        "dsv4.manifest.json",
        "dsv4.roundtrip",
        "dsv4.sha256",
    ):  # its parts follow the first conversion's shards
        del direct[bookkeeping], back[bookkeeping]
    assert direct == back


def test_convert_any_number_of_workers_gives_the_same_bytes(
    sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    trees = []
    for workers in (1, 2, 3, 7):
        convert(sample_of("flash-0731"), tmp_path / str(workers), workers=workers)
        trees.append(tree_of(tmp_path / str(workers)))
    assert trees[0] == trees[1] == trees[2] == trees[3]


@pytest.mark.slow
def test_convert_buffered_io_gives_the_same_bytes_as_direct_io(
    sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(sample_of("flash"), tmp_path / "direct")
    monkeypatch.setattr(sink, "_open_direct", lambda path, flags: (os.open(path, flags, 0o666), False))
    convert(sample_of("flash"), tmp_path / "buffered")
    assert tree_of(tmp_path / "direct") == tree_of(tmp_path / "buffered")


@pytest.mark.slow
def test_convert_copy_of_the_source_elsewhere_gives_the_same_bytes(
    sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    shutil.copytree(sample_of("flash"), tmp_path / "other name")
    convert(sample_of("flash"), tmp_path / "a")
    convert(tmp_path / "other name", tmp_path / "b")
    assert tree_of(tmp_path / "a") == tree_of(tmp_path / "b")


@pytest.mark.slow
def test_convert_small_shards_split_layers_and_leave_large_tensors_alone(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    limit = 300_000
    convert(sample_of("flash"), tmp_path / "out", namespace=Namespace.TRANSFORMERS, max_shard_bytes=limit)
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
    fused = everything(tmp_path / "out")["model.layers.0.mlp.experts.gate_up_proj"]
    assert fused.shape == (8, 256, 256)


# ---- stopping and continuing


class Stopper:
    """Asks to stop after a number of written pieces."""

    def __init__(self, after: int) -> None:
        self.stop = run.StopFlag()
        self.left = after

    def __call__(self, event: run.Event) -> None:
        if isinstance(event, run.Wrote):
            self.left -= 1
            if self.left == 0:
                self.stop.signal_number = 2


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 40, 120, 200, 250])
def test_convert_stopped_anywhere_continues_to_the_same_bytes(
    after: int, sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "whole")
    checkpoint = source.open_checkpoint(str(sample_of("flash")))
    made = plan.make_plan(survey.survey(checkpoint), ConvertOptions())
    stopper = Stopper(after)
    with pytest.raises(Interrupted) as caught:
        run.execute(made, checkpoint, str(tmp_path / "out"), on_event=stopper, stop=stopper.stop)
    assert caught.value.exit_code == 130
    left = [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [name for name in left if name.endswith(".part")]
    assert "dsv4.manifest.json" not in left
    finished = sum(name.endswith(".safetensors") for name in left)
    summary = convert(sample_of("flash"), tmp_path / "out")
    assert summary.num_resumed == finished
    assert tree_of(tmp_path / "whole") == tree_of(tmp_path / "out")


@pytest.mark.slow
def test_convert_complete_output_is_not_written_again(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    summary = convert(sample_of("flash"), tmp_path / "out")
    assert summary.num_resumed == 7
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}


@pytest.mark.slow
def test_convert_finished_output_whose_manifest_lists_no_files_is_not_taken_for_complete(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "out")
    manifest = tmp_path / "out" / "dsv4.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": []}))
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ForeignOutput):
        convert(sample_of("flash"), tmp_path / "out")


@pytest.mark.slow
def test_convert_killed_after_its_manifest_is_tidied_up_by_the_next_run(
    sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    """Found by tests/crash: the output was complete, and .dsv4 stayed in it for ever."""
    convert(sample_of("flash"), tmp_path / "out")
    whole = tree_of(tmp_path / "out")
    work = tmp_path / "out" / ".dsv4"
    work.mkdir()
    for name in ("plan", "journal", "lock"):
        (work / name).touch()
    assert convert(sample_of("flash"), tmp_path / "out").num_resumed == 7
    assert not work.exists()
    assert tree_of(tmp_path / "out") == whole


@pytest.mark.slow
def test_convert_other_options_into_a_used_directory_is_refused(
    sample_of: Sample, convert: Convert, tree_of: Tree, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "out")
    before = tree_of(tmp_path / "out")
    with pytest.raises(ForeignOutput) as caught:
        convert(sample_of("flash"), tmp_path / "out", keep_mtp=False)
    assert caught.value.exit_code == 2
    assert before == tree_of(tmp_path / "out")


def test_convert_other_options_into_an_unfinished_directory_is_refused(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    checkpoint = source.open_checkpoint(str(sample_of("flash")))
    made = plan.make_plan(survey.survey(checkpoint), ConvertOptions())
    stopper = Stopper(100)
    with pytest.raises(Interrupted):
        run.execute(made, checkpoint, str(tmp_path / "out"), on_event=stopper, stop=stopper.stop)
    with pytest.raises(ForeignOutput):
        convert(sample_of("flash"), tmp_path / "out", namespace=Namespace.TRANSFORMERS)


def test_convert_without_room_writes_nothing(
    sample_of: Sample, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = sample_of("flash")  # may be made now, which asks for space as well
    monkeypatch.setattr(outdir, "free_bytes", lambda path: 10_000_000)
    with pytest.raises(NoSpace) as caught:
        convert(src, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_convert_source_touched_meanwhile_is_noticed(sample_of: Sample, tmp_path: Path) -> None:
    shutil.copytree(sample_of("flash"), tmp_path / "src")
    checkpoint = source.open_checkpoint(str(tmp_path / "src"))
    made = plan.make_plan(survey.survey(checkpoint), ConvertOptions())
    victim = tmp_path / "src" / "model-00003-of-00007.safetensors"

    def touch(event: run.Event) -> None:
        if isinstance(event, run.Started):
            victim.write_bytes(victim.read_bytes())

    with pytest.raises(SourceChanged, match="model-00003"):
        run.execute(made, checkpoint, str(tmp_path / "out"), on_event=touch)
    assert not (tmp_path / "out" / "dsv4.manifest.json").exists()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the very headers of the flash sample and other values, as two revisions of a release are."""
    directory = tmp_path_factory.mktemp("twin") / "flash"
    sample.write_sample(sample.plan_sample(sample.SampleOptions(seed=1)), str(directory))
    return directory


@pytest.mark.slow
def test_convert_another_source_with_equal_headers_is_not_taken_for_complete(
    sample_of: Sample, twin: Path, convert: Convert, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "out")
    with pytest.raises(ForeignOutput, match="another source with the same headers"):
        convert(twin, tmp_path / "out")


def test_convert_another_source_with_equal_headers_does_not_continue_the_first_one(
    sample_of: Sample, twin: Path, convert: Convert, tmp_path: Path
) -> None:
    """The output would be a mixture of two models, and no later check would notice."""
    checkpoint = source.open_checkpoint(str(sample_of("flash")))
    made = plan.make_plan(survey.survey(checkpoint), ConvertOptions())
    stopper = Stopper(150)
    with pytest.raises(Interrupted):
        run.execute(made, checkpoint, str(tmp_path / "out"), on_event=stopper, stop=stopper.stop)
    assert list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(ForeignOutput, match="not those that the unfinished run read"):
        convert(twin, tmp_path / "out")


# ---- values that are no numbers


def spoiled(sample: Path, directory: Path, name: str, change: Callable[[torch.Tensor], None]) -> Path:
    """A copy of a sample with one tensor changed."""
    shutil.copytree(sample, directory)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    file = directory / weight_map[name]
    tensors = load_file(file)
    change(tensors[name].view(torch.uint8))
    save_file(tensors, file)
    return directory


def poke(row: int, col: int, byte: int) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor[row, col] = byte

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stored", "where", "byte", "found"),
    [
        ("layers.1.ffn.experts.3.w2.weight", "layers.1.ffn.experts.3.w2.scale", (7, 2), 0xFF, "block (7, 2)"),
        ("layers.2.attn.wq_b.weight", "layers.2.attn.wq_b.scale", (1, 0), 0xFF, "block (1, 0)"),
        (
            "layers.2.attn.wq_b.weight",
            "layers.2.attn.wq_b.weight",
            (130, 5),
            0x7F,
            "the first at row 130, column 5, block (1, 0)",
        ),
        (
            "layers.1.ffn.experts.3.w2.weight",
            "layers.1.ffn.experts.3.w2.scale",
            (7, 2),
            254,
            "the first at row 7, column ",
        ),
        (
            "layers.0.ffn.gate.weight",
            "layers.0.ffn.gate.weight",
            (2, 1),
            0x7F,
            "the first at row 2, column 0",
        ),
    ],
)
def test_convert_nan_or_infinity_is_refused_by_name_and_place(
    name: str,
    stored: str,
    where: tuple[int, int],
    byte: int,
    found: str,
    sample_of: Sample,
    convert: Convert,
    tmp_path: Path,
) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[where] = byte
        if stored.endswith("gate.weight"):  # the two bytes of a BF16 NaN
            tensor[where[0], 0:2] = torch.tensor([0xC0, 0x7F], dtype=torch.uint8)
            tensor[where] = 0x7F
        if byte == 254:  # 6 * 2**127 is beyond BF16
            tensor[where] = 254

    src = spoiled(sample_of("flash"), tmp_path / "src", stored, change)
    with pytest.raises(NotFinite) as caught:
        convert(src, tmp_path / "out")
    assert name in str(caught.value)
    assert caught.value.facts["found"].startswith(found)
    assert caught.value.facts["file"].endswith(".safetensors")
    assert f"--allow-nan {name}" in caught.value.facts["do"]
    assert not (tmp_path / "out" / "dsv4.manifest.json").exists()
    summary = convert(src, tmp_path / "allowed", allow_nan=frozenset({name}))
    assert summary.num_not_finite > 0


@pytest.mark.slow
def test_convert_f32_scale_that_is_no_power_of_two_is_rounded_once_and_counted(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    name = "layers.0.attn.wkv.scale"

    def change(tensor: torch.Tensor) -> None:
        tensor.view(torch.float32)[0, 1] = 0.3

    src = spoiled(sample_of("flash-base"), tmp_path / "src", name, change)
    summary = convert(src, tmp_path / "out")
    codes = everything(src)["layers.0.attn.wkv.weight"][:, 128:256].float().numpy().astype(np.float64)
    made = everything(tmp_path / "out")["layers.0.attn.wkv.weight"][:, 128:256].view(torch.uint16).numpy()
    product = codes * float(np.float32(0.3))
    held = torch.from_numpy(made.copy()).view(torch.bfloat16).double().numpy()
    assert summary.num_inexact == int((held != product).sum()) > 10_000
    # no other bfloat16 is nearer: the neighbours above and below lie at least as far
    for step in (-1, 1):
        near = torch.from_numpy((made.astype(np.int32) + step).astype(np.uint16)).view(torch.bfloat16)
        neighbour = np.nan_to_num(near.double().numpy(), nan=np.inf)
        assert (np.abs(held - product) <= np.abs(neighbour - product)).all()


# ---- smaller models


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "pro", "flash-0731", "vision-exp", "v4.1-flash"])
@pytest.mark.parametrize("keep_mtp", [True, False])
def test_convert_layer_subset_conforms(
    release: str, keep_mtp: bool, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    layers = (0, 1, 2) if release == "v4.1-flash" else (0, 2, 3)
    convert(sample_of(release), tmp_path / "out", layers=layers, keep_mtp=keep_mtp)
    found = survey.survey(source.open_checkpoint(str(tmp_path / "out")))
    assert found.deviations == []
    assert found.model.num_layers == 3
    assert (found.model.num_stages > 0) == keep_mtp
    manifest = json.loads((tmp_path / "out" / "dsv4.manifest.json").read_text())
    dropped = {item["name"] for item in manifest["dropped"]}
    gone = "layers.3." if release == "v4.1-flash" else "layers.1."
    expected = {
        name
        for name in everything(sample_of(release))
        if name.startswith(gone) or (name.startswith("mtp.") and not keep_mtp)
    }
    assert dropped == expected


@pytest.mark.slow
def test_convert_leaves_a_list_that_sha256sum_checks(
    checkpoint: Path, tmp_path: Path, convert: Convert
) -> None:
    """A backslash in a name is what coreutils escapes."""
    tools.require("sha256sum")
    tiny.replace(checkpoint / "odd \\name.txt", "text")
    out = tmp_path / "out"
    convert(checkpoint, out)
    command = ["sha256sum", "--check", "--strict", "--quiet", "dsv4.sha256"]
    assert subprocess.run(command, cwd=out, capture_output=True).returncode == 0
    told = {line.partition("  ")[2] for line in (out / "dsv4.sha256").read_text().splitlines()}
    there = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert there - {name.replace("\\\\", "\\") for name in told} == {"dsv4.manifest.json", "dsv4.sha256"}
    tiny.replace(out / "config.json", (out / "config.json").read_bytes() + b" ")
    assert subprocess.run(command, cwd=out, capture_output=True).returncode == 1


def load_by_transformers(directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-base", "flash-0731", "pro", "pro-base", "pro-0813"])
def test_convert_output_loads_strictly_in_transformers_with_equal_logits(
    release: str, sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, FineGrainedFP8Config

    reference, _ = load_by_transformers(
        sample_of(release), quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ids = torch.arange(7, 307).remainder(512)[None]
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    weights = reference.state_dict()
    assert 0.1 < float(expected.float().std()) < 10, "the sample's logits are sane"
    for namespace in Namespace:
        directory = tmp_path / namespace
        convert(sample_of(release), directory, namespace=namespace)
        model, info = load_by_transformers(directory)
        assert {key: list(value) for key, value in info.items()} == {
            "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []
        }  # fmt: skip
        for name, value in model.state_dict().items():
            assert torch.equal(value.float(), weights[name].float()), name
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert AutoTokenizer.from_pretrained(directory).decode([3, 40]) != ""


@pytest.mark.slow
def test_convert_layer_subset_runs_in_transformers_like_the_first_layers(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    convert(sample_of("flash"), tmp_path / "all")
    convert(sample_of("flash"), tmp_path / "two", layers=(0, 1), keep_mtp=False)
    whole, _ = load_by_transformers(tmp_path / "all")
    two, info = load_by_transformers(tmp_path / "two")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(50, 120)[None]
    seen: list[torch.Tensor] = []
    whole.model.layers[1].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    two.model.layers[1].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        whole(input_ids=ids)
        logits = two(input_ids=ids).logits
    assert torch.equal(seen[0], seen[1])
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_convert_checkpoint_without_its_draft_stages_is_refused_until_the_config_says_so(
    sample_of: Sample, convert: Convert, tmp_path: Path
) -> None:
    """What transformers saves has no mtp.*, and a config that still promises them."""
    src = tmp_path / "src"
    shutil.copytree(sample_of("flash"), src, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    kept = {
        name: value for name, value in everything(sample_of("flash")).items() if not name.startswith("mtp.")
    }
    save_file(kept, src / "model.safetensors")
    with pytest.raises(NotConform, match=r"mtp\.0\..*\n(.*\n)*.*set num_nextn_predict_layers to 0"):
        convert(src, tmp_path / "out")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    convert(src, tmp_path / "out")
    assert not [name for name in everything(tmp_path / "out") if name.startswith("mtp.")]
