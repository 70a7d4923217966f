"""There and back: whole releases come out as the very bytes that went in, through every chain of formats.

The oracle is the sample itself: its files are compared with what comes back by SHA-256.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from dsv4ckpt import errors, original, plan, run, sidecar, source, survey
from dsv4ckpt.formats import OUR_NAMES, SIDECAR_NAME, Storage, Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ConvertOptions
from dsv4ckpt.release import RELEASES

ALL = sorted(RELEASES)
OURS = {*OUR_NAMES}


def convert(
    src: Path,
    dst: Path,
    target: Target,
    *,
    released: Path | None = None,
    memory: Path | None = None,
    accept_changes: bool = False,
    **options: object,
) -> run.Summary:
    """As the command does it: the sidecar in SRC is used if there is one."""
    chosen = ConvertOptions(target=target, **options)  # type: ignore[arg-type]
    checkpoint = source.open_checkpoint(str(src))
    known = None
    if target is Target.NATIVE:
        found = sidecar.open_sidecar(str(memory or src))
        known = original.of_sidecar(found) if found else None
        if released:
            known = original.of_source(tiny.survey_of(released))
    made = plan.make_plan(survey.survey(checkpoint, unit_scales=chosen.unit_scales), chosen, known)
    return run.execute(made, checkpoint, str(dst), accept_changes=accept_changes)


def files_of(directory: Path) -> dict[str, str]:
    """SHA-256 of every file that is not our own bookkeeping."""
    return {name: sha256 for name, sha256 in tiny.tree_of(directory).items() if Path(name).name not in OURS}


@pytest.mark.slow
@pytest.mark.parametrize("namespace", Namespace)
@pytest.mark.parametrize("release", ALL)
def test_bf16_and_back_gives_every_file_of_the_release(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str, namespace: Namespace
) -> None:
    """Shards, index, config.json and small files, from the BF16 values and the sidecar alone."""
    convert(sample_of(release), tmp_path / "bf16", Target.BF16, namespace=namespace, max_shard_bytes=700_000)
    summary = convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(sample_of(release))
    assert summary.num_changed == 0
    assert not summary.losses


@pytest.mark.slow
@pytest.mark.parametrize("release", ALL)
def test_bf16_and_back_with_the_release_at_hand_needs_no_sidecar(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str
) -> None:
    convert(sample_of(release), tmp_path / "bf16", Target.BF16)
    (tmp_path / "bf16" / SIDECAR_NAME).unlink()
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE, released=sample_of(release))
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


TARGETS = [Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT]


# Base has FP8 experts, and fp8-f32scale is its own format
ACROSS = [
    (release, target)
    for release in ALL
    for target in TARGETS
    if RELEASES[release].storage is not Storage.FP8_F32SCALE or target is Target.FP8
]


@pytest.mark.slow
@pytest.mark.parametrize(("release", "target"), ACROSS)
def test_other_formats_and_back_give_every_file_of_the_release(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str, target: Target
) -> None:
    convert(sample_of(release), tmp_path / "there", target)
    convert(tmp_path / "there", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-0731", "v4.1-flash"])
def test_every_chain_of_formats_ends_in_the_release(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str
) -> None:
    """Sidecars are carried where bytes are only renamed; elsewhere values are all that is left, and are equal."""
    chain = [Target.FP8, Target.FP8_F32SCALE, Target.BF16, Target.NVFP4, Target.MXFP4_CT, Target.BF16]
    here = sample_of(release)
    for number, target in enumerate(chain):
        convert(here, tmp_path / str(number), target)
        here = tmp_path / str(number)
    convert(here, tmp_path / "back", Target.NATIVE, released=sample_of(release))
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


@pytest.mark.slow
def test_sidecar_is_carried_from_one_namespace_to_the_other(flash: Path, tmp_path: Path) -> None:
    convert(flash, tmp_path / "a", Target.BF16)
    convert(tmp_path / "a", tmp_path / "b", Target.BF16, namespace=Namespace.TRANSFORMERS)
    assert (tmp_path / "b" / SIDECAR_NAME).read_bytes() == (tmp_path / "a" / SIDECAR_NAME).read_bytes()
    convert(tmp_path / "b", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(flash)


# ---- DCP


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_detour_through_torch_dcp_ends_in_the_release(flash: Path, tmp_path: Path) -> None:
    """BF16 tensors as a trainer saves and loads them, then written as one plain safetensors file."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file, save_file

    convert(flash, tmp_path / "bf16", Target.BF16, namespace=Namespace.TRANSFORMERS)
    state = {}
    for shard in sorted((tmp_path / "bf16").glob("*.safetensors")):
        state.update(load_file(shard))
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "dcp"))
    (tmp_path / "tuned").mkdir()
    save_file(loaded, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    for small in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
    ):
        shutil.copy(tmp_path / "bf16" / small, tmp_path / "tuned" / small)
    shutil.copytree(tmp_path / "bf16" / "inference", tmp_path / "tuned" / "inference")
    convert(tmp_path / "tuned", tmp_path / "back", Target.NATIVE, memory=tmp_path / "bf16")
    assert files_of(tmp_path / "back") == files_of(flash)


# ---- values that changed


EXPERT, DENSE, NORM = (
    "layers.1.ffn.experts.3.w1.weight",
    "layers.2.attn.wq_a.weight",
    "layers.0.attn_norm.weight",
)


def tune(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a BF16 tensor by what `change` makes of it; the manifest goes, as a trainer would not write one."""

    def edit(tensors: dict[str, tiny.Tensor]) -> None:
        dtype, shape, data = tensors[name]
        assert isinstance(data, bytes)
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(shape)
        made = change(values).to(torch.bfloat16).contiguous()
        tensors[name] = tiny.Tensor(dtype, shape, made.view(torch.uint8).numpy().tobytes())

    tiny.edit_shard(tiny.shard_of(directory, name), edit)
    (directory / "dsv4.manifest.json").unlink(missing_ok=True)


def noise(share: float, seed: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of every value, `share` as large as the values."""

    def change(values: torch.Tensor) -> torch.Tensor:
        delta = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
        wide = values.float()
        return wide + delta * wide.square().mean().sqrt() * share

    return change


@pytest.fixture
def bf16(flash: Path, tmp_path: Path) -> Path:
    convert(flash, tmp_path / "bf16", Target.BF16)
    return tmp_path / "bf16"


def tensors_of(directory: Path) -> dict[str, tiny.Tensor]:
    found: dict[str, tiny.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= tiny.read_shard(shard)
    return found


def different(a: Path, b: Path) -> set[str]:
    one, two = tensors_of(a), tensors_of(b)
    assert one.keys() == two.keys()
    return {name for name in one if one[name] != two[name]}


@pytest.mark.slow
def test_only_changed_tensors_differ_from_the_release(flash: Path, bf16: Path, tmp_path: Path) -> None:
    for name in (EXPERT, DENSE, NORM):
        tune(bf16, name, noise(0.2))
    summary = convert(bf16, tmp_path / "out", Target.NATIVE, released=flash)
    changed = {
        name.removesuffix(".weight").removesuffix(".scale") for name in different(flash, tmp_path / "out")
    }
    assert changed == {name.removesuffix(".weight") for name in (EXPERT, DENSE, NORM)}
    assert (summary.num_changed, [loss.name for loss in summary.losses]) == (3, [EXPERT, DENSE])
    assert (tmp_path / "out" / "config.json").read_bytes() == (flash / "config.json").read_bytes()


@pytest.mark.slow
def test_kept_delta_is_what_plain_arithmetic_says(flash: Path, bf16: Path, tmp_path: Path) -> None:
    """Projection of what is left of the change on the change, in float64 numpy, from the files alone."""
    before = tensors_of(bf16)
    for name in (EXPERT, DENSE):
        tune(bf16, name, noise(0.2))
    after = tensors_of(bf16)
    summary = convert(bf16, tmp_path / "out", Target.NATIVE, released=flash)
    convert(tmp_path / "out", tmp_path / "again", Target.BF16)
    left = tensors_of(tmp_path / "again")

    def wide(tensor: tiny.Tensor) -> torch.Tensor:
        assert isinstance(tensor.data, bytes)
        return torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16).double()

    for loss in summary.losses:
        delta = wide(after[loss.name]) - wide(before[loss.name])
        kept = float(
            ((wide(left[loss.name]) - wide(before[loss.name])) * delta).sum() / (delta * delta).sum()
        )
        assert loss.kept_share == pytest.approx(kept, rel=1e-9)
        error = float((wide(left[loss.name]) - wide(after[loss.name])).norm() / wide(after[loss.name]).norm())
        assert loss.relative_error == pytest.approx(error, rel=1e-6)
        assert loss.num_inexact == int((wide(left[loss.name]) != wide(after[loss.name])).sum())


@pytest.mark.slow
def test_change_that_would_vanish_is_refused_and_finished_when_allowed(
    flash: Path, bf16: Path, tmp_path: Path
) -> None:
    tune(bf16, EXPERT, noise(0.01))
    with pytest.raises(errors.VanishingChange) as caught:
        convert(bf16, tmp_path / "out", Target.NATIVE, released=flash)
    assert caught.value.exit_code == 3
    assert EXPERT in caught.value.facts["found"]
    assert "--allow-lossy" in caught.value.facts["do"] and "--to bf16" in caught.value.facts["do"]
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    summary = convert(bf16, tmp_path / "out", Target.NATIVE, released=flash, allow_lossy=True)
    assert summary.num_resumed == len(list(flash.glob("*.safetensors")))
    assert summary.losses[0].kept_share is not None and summary.losses[0].kept_share < 0.5


@pytest.mark.slow
def test_loss_that_nobody_can_measure_is_refused_and_nothing_stays(bf16: Path, tmp_path: Path) -> None:
    """With the sidecar alone the values before training are not known."""
    tune(bf16, EXPERT, noise(0.2))
    with pytest.raises(errors.NotLossless, match="--source") as caught:
        convert(bf16, tmp_path / "out", Target.NATIVE)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    summary = convert(bf16, tmp_path / "out", Target.NATIVE, allow_lossy=True)
    (loss,) = summary.losses
    assert loss.kept_share is None and loss.num_inexact > 0


@pytest.mark.slow
def test_change_that_the_codes_can_hold_needs_no_permission(flash: Path, bf16: Path, tmp_path: Path) -> None:
    tune(bf16, EXPERT, lambda values: -values)
    summary = convert(bf16, tmp_path / "out", Target.NATIVE)
    assert summary.num_inexact == 0
    assert different(flash, tmp_path / "out") <= {EXPERT, EXPERT.replace("weight", "scale")}
    again = tiny.read_shard(tiny.shard_of(tmp_path / "out", EXPERT))[EXPERT]
    released = tiny.read_shard(tiny.shard_of(flash, EXPERT))[EXPERT]
    assert isinstance(again.data, bytes) and isinstance(released.data, bytes)
    assert again.data == bytes(byte ^ 0x88 for byte in released.data)


@pytest.mark.slow
def test_kept_scales_lose_less_than_fresh_ones(flash: Path, bf16: Path, tmp_path: Path) -> None:
    """The measured reason for the default: a small change must not double the scales of untouched-looking blocks."""
    tune(bf16, EXPERT, noise(0.01))
    found = {}
    for policy in plan.ScalePolicy:
        out = tmp_path / policy.value
        summary = convert(bf16, out, Target.NATIVE, released=flash, allow_lossy=True, scale_policy=policy)
        found[policy] = summary.losses[0]
    keep, fresh = found[plan.ScalePolicy.KEEP], found[plan.ScalePolicy.FRESH]
    assert keep.error < fresh.error / 3
    assert keep.num_same_blocks > max(0.95 * keep.num_blocks, fresh.num_same_blocks)


# ---- what does not belong together


@pytest.mark.slow
def test_edited_values_are_refused_while_a_manifest_vouches_for_them(bf16: Path, tmp_path: Path) -> None:
    manifest = (bf16 / "dsv4.manifest.json").read_bytes()
    tune(bf16, EXPERT, lambda values: -values)
    (bf16 / "dsv4.manifest.json").write_bytes(manifest)
    with pytest.raises(errors.EditedOutput, match="--accept-changes") as caught:
        convert(bf16, tmp_path / "out", Target.NATIVE)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert convert(bf16, tmp_path / "out", Target.NATIVE, accept_changes=True).num_changed == 1


@pytest.mark.slow
def test_edited_norm_is_refused_while_a_manifest_vouches_for_it(bf16: Path, tmp_path: Path) -> None:
    """Tensors that are only copied are hashed too."""
    manifest = (bf16 / "dsv4.manifest.json").read_bytes()
    tune(bf16, NORM, lambda values: -values)
    (bf16 / "dsv4.manifest.json").write_bytes(manifest)
    with pytest.raises(errors.EditedOutput, match="--accept-changes"):
        convert(bf16, tmp_path / "out", Target.NATIVE)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sidecar_of_another_release_is_refused(
    sample_of: Callable[[str], Path], flash: Path, bf16: Path, tmp_path: Path
) -> None:
    convert(sample_of("pro"), tmp_path / "pro", Target.BF16)
    with pytest.raises(errors.BadSidecar, match="belong"):
        convert(bf16, tmp_path / "out", Target.NATIVE, memory=tmp_path / "pro")
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.NotConform, match="belong"):
        convert(bf16, tmp_path / "out", Target.NATIVE, released=sample_of("pro"))


@pytest.mark.slow
def test_sidecar_of_another_size_is_refused(bf16: Path, tmp_path: Path) -> None:
    from dsv4ckpt import sample

    sample.write_sample(sample.plan_sample(sample.SampleOptions(experts=10)), str(tmp_path / "wide"))
    convert(tmp_path / "wide", tmp_path / "other", Target.BF16)
    with pytest.raises(errors.BadSidecar, match=r"differs|no tensor"):
        convert(bf16, tmp_path / "out", Target.NATIVE, memory=tmp_path / "other")


@pytest.mark.slow
def test_damaged_sidecar_never_gives_wrong_bytes(flash: Path, bf16: Path, tmp_path: Path) -> None:
    """Bits flipped all over it: refused, or everything still comes out right."""
    original_bytes = (bf16 / SIDECAR_NAME).read_bytes()
    (bf16 / "dsv4.manifest.json").unlink()
    refused = 0
    for number in range(60):
        data = bytearray(original_bytes)
        data[(number * 2654435761 + 977) % len(data)] ^= 1 << number % 8
        tiny.replace(bf16 / SIDECAR_NAME, bytes(data))
        out = tmp_path / f"out{number}"
        try:
            convert(bf16, out, Target.NATIVE)
        except errors.Dsv4Error as error:
            assert error.exit_code == 3
            refused += 1
        else:
            assert different(flash, out) == set()
        shutil.rmtree(out, ignore_errors=True)
    assert refused > 40


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_value_that_no_code_can_hold_is_refused_and_nothing_stays(
    bf16: Path, tmp_path: Path, bad: float
) -> None:
    def spoil(values: torch.Tensor) -> torch.Tensor:
        changed = values.clone()
        changed[5, 7] = bad
        return changed

    tune(bf16, EXPERT, spoil)
    with pytest.raises(errors.NotFinite, match="row 5, column 7") as caught:
        convert(bf16, tmp_path / "out", Target.NATIVE, allow_lossy=True)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-0731", "v4.1-flash"])
def test_draft_stages_that_a_trainer_dropped_come_back_from_the_release(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str
) -> None:
    """transformers does not save mtp.*; its config still promises them."""
    convert(sample_of(release), tmp_path / "whole", Target.BF16)
    tuned = tmp_path / "whole"
    (tuned / "dsv4.manifest.json").unlink()
    for shard in sorted(tuned.glob("*.safetensors")):
        kept = {name: t for name, t in tiny.read_shard(shard).items() if not name.startswith("mtp.")}
        tiny.write_shard(shard, kept)
        if not kept:
            shard.unlink()

    def forget(weight_map: dict[str, object]) -> None:
        for name in [name for name in weight_map if name.startswith("mtp.")]:
            del weight_map[name]

    tiny.edit_weight_map(tuned, forget)
    with pytest.raises(errors.NotConform, match="--source"):
        convert(tuned, tmp_path / "refused", Target.NATIVE)
    convert(tuned, tmp_path / "back", Target.NATIVE, released=sample_of(release))
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.BF16, *TARGETS])
@pytest.mark.parametrize("release", ["flash", "v4.1-flash"])
def test_tensors_of_many_pieces_come_back(
    sample_of: Callable[[str], Path],
    tmp_path: Path,
    release: str,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways cut tensors at the same rows, whatever the blocks of the two formats are."""
    monkeypatch.setattr(sidecar, "_PIECE_VALUES", 1)
    assert sidecar.piece_rows(256) == 128
    convert(sample_of(release), tmp_path / "there", target)
    summary = convert(tmp_path / "there", tmp_path / "back", Target.NATIVE)
    assert summary.num_changed == 0
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


@pytest.mark.slow
def test_only_the_changed_pieces_of_a_tensor_are_quantized(
    flash: Path, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "_PIECE_VALUES", 1)
    name = "layers.1.ffn.experts.3.w2.weight"  # [256, 128]: two pieces
    convert(flash, tmp_path / "again", Target.BF16)

    def change(values: torch.Tensor) -> torch.Tensor:
        changed = values.clone()
        changed[200:] *= 1.5
        return changed

    tune(tmp_path / "again", name, change)
    summary = convert(tmp_path / "again", tmp_path / "out", Target.NATIVE, released=flash, allow_lossy=True)
    (loss,) = summary.losses
    assert loss.num_blocks == 256 * 4
    assert loss.num_same_blocks >= 200 * 4
    before, after = tensors_of(flash)[name].data, tensors_of(tmp_path / "out")[name].data
    assert isinstance(before, bytes) and isinstance(after, bytes)
    assert before[: 128 * 64] == after[: 128 * 64] and before != after


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE, Target.NATIVE])
@pytest.mark.parametrize("release", ["flash", "flash-base", "v4.1-flash"])
def test_quantized_formats_under_transformers_names_come_back(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str, target: Target
) -> None:
    """Fused experts, codes and scales, in tiles and blocks."""
    convert(sample_of(release), tmp_path / "there", target, namespace=Namespace.TRANSFORMERS)
    assert tiny.survey_of(tmp_path / "there").deviations == []
    convert(tmp_path / "there", tmp_path / "back", Target.NATIVE, released=sample_of(release))
    assert files_of(tmp_path / "back") == files_of(sample_of(release))
