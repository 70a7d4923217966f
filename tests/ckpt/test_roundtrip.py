"""There and back: whole releases come out as the very bytes that went in, through every chain of formats.

The oracle is the sample itself: its files are compared with what comes back by SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from dsv4ckpt import errors, formats, original, plan, run, sidecar, source, survey
from dsv4ckpt.formats import SIDECAR_NAME, Storage, Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ConvertOptions
from dsv4ckpt.release import RELEASES

ALL = sorted(RELEASES)
OURS = {"dsv4.manifest.json", SIDECAR_NAME}


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
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in OURS
    }


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


@pytest.mark.parametrize("release", ALL)
def test_bf16_and_back_with_the_release_at_hand_needs_no_sidecar(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str
) -> None:
    convert(sample_of(release), tmp_path / "bf16", Target.BF16)
    (tmp_path / "bf16" / SIDECAR_NAME).unlink()
    convert(tmp_path / "bf16", tmp_path / "back", Target.NATIVE, released=sample_of(release))
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


TARGETS = [Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("release", ALL)
def test_other_formats_and_back_give_every_file_of_the_release(
    sample_of: Callable[[str], Path], tmp_path: Path, release: str, target: Target
) -> None:
    native = RELEASES[release].storage
    if native is Storage.FP8_F32SCALE and target in (Target.NVFP4, Target.MXFP4_CT, Target.FP8_F32SCALE):
        pytest.skip("Base has FP8 experts; its own format is fp8-f32scale")
    convert(sample_of(release), tmp_path / "there", target)
    convert(tmp_path / "there", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(sample_of(release))


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


def test_sidecar_is_carried_from_one_namespace_to_the_other(flash: Path, tmp_path: Path) -> None:
    convert(flash, tmp_path / "a", Target.BF16)
    convert(tmp_path / "a", tmp_path / "b", Target.BF16, namespace=Namespace.TRANSFORMERS)
    assert (tmp_path / "b" / SIDECAR_NAME).read_bytes() == (tmp_path / "a" / SIDECAR_NAME).read_bytes()
    convert(tmp_path / "b", tmp_path / "back", Target.NATIVE)
    assert files_of(tmp_path / "back") == files_of(flash)


# ---- DCP


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
    for small in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        shutil.copy(tmp_path / "bf16" / small, tmp_path / "tuned" / small)
    shutil.copytree(tmp_path / "bf16" / "inference", tmp_path / "tuned" / "inference")
    convert(tmp_path / "tuned", tmp_path / "back", Target.NATIVE, memory=tmp_path / "bf16")
    assert files_of(tmp_path / "back") == files_of(flash)
