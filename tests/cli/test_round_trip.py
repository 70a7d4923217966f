"""There and back by the command: what it prints, what it refuses, which code it exits with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from forked import dsv4

EXPERT = "layers.1.ffn.experts.3.w1.weight"


@pytest.fixture(scope="module")
def bf16(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("round trip") / "bf16"
    assert dsv4("convert", flash, directory, "--to", "bf16").returncode == 0
    return directory


@pytest.fixture
def tuned(bf16: Path, tmp_path: Path) -> Path:
    """A conversion in which a trainer changed one expert by a hundredth."""
    directory = tiny.copy_of(bf16, tmp_path / "tuned")
    (directory / "dsv4.manifest.json").unlink()

    def change(tensors: dict[str, tiny.Tensor]) -> None:
        data = tensors[EXPERT].data
        assert isinstance(data, bytes)
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float()
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
        made = (values + 0.01 * values.square().mean().sqrt() * noise).to(torch.bfloat16)
        tensors[EXPERT] = tensors[EXPERT]._replace(data=made.view(torch.uint8).numpy().tobytes())

    tiny.edit_shard(tiny.shard_of(directory, EXPERT), change)
    return directory


@pytest.mark.slow
def test_native_comes_back_and_verify_proves_whole_files(flash: Path, bf16: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    done = dsv4("convert", bf16, back, "--to", "native")
    assert done.returncode == 0, done.stderr
    assert "253 tensors came out as the release has them, 0 had changed" in done.stdout
    proof = dsv4("verify", flash, back, "--level", "bytes")
    assert proof.returncode == 0
    assert "7 of 7 shards identical, config.json identical, index identical" in proof.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["fp8", "fp8-f32scale", "nvfp4", "mxfp4-ct"])
def test_other_formats_are_known_to_inspect_and_verify(flash: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    assert dsv4("convert", flash, out, "--to", target).returncode == 0
    shown = dsv4("inspect", out)
    assert shown.returncode == 0 and shown.stdout.startswith(f"flash, stored as {target},")
    assert dsv4("verify", flash, out).returncode == 0
    assert dsv4("verify", out).returncode == 0


@pytest.mark.slow
def test_vanishing_change_is_refused_then_finished_with_a_report(
    flash: Path, tuned: Path, tmp_path: Path
) -> None:
    command = ["convert", tuned, tmp_path / "out", "--to", "native", "--source", flash]
    refused = dsv4(*command)
    assert refused.returncode == 3
    assert EXPERT in refused.stderr and "--allow-lossy" in refused.stderr and "--to bf16" in refused.stderr
    allowed = dsv4(*command, "--allow-lossy")
    assert allowed.returncode == 0
    assert "kept delta" in allowed.stdout and EXPERT in allowed.stdout
    assert "was complete already" not in allowed.stdout


@pytest.mark.slow
def test_json_holds_every_quantized_tensor(flash: Path, tuned: Path, tmp_path: Path) -> None:
    arguments = ["--to", "native", "--source", flash, "--allow-lossy", "--json"]
    document = json.loads(dsv4("convert", tuned, tmp_path / "out", *arguments).stdout)
    (row,) = document["quantized"]
    assert row["name"] == EXPERT
    assert 0 <= row["kept_delta"] < 0.5 and row["same_blocks"] > 0.9 and row["rounded_values"] > 0
    assert (document["untouched"], document["changed"]) == (252, 1)


@pytest.mark.slow
def test_loss_without_the_release_at_hand_is_refused_and_leaves_nothing(tuned: Path, tmp_path: Path) -> None:
    done = dsv4("convert", tuned, tmp_path / "out", "--to", "native")
    assert done.returncode == 3
    assert "--source" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_edited_conversion_needs_a_word(bf16: Path, tuned: Path, flash: Path, tmp_path: Path) -> None:
    shutil.copy(bf16 / "dsv4.manifest.json", tuned / "dsv4.manifest.json")
    command = ["convert", tuned, tmp_path / "out", "--to", "native", "--source", flash, "--allow-lossy"]
    done = dsv4(*command)
    assert done.returncode == 3 and "--accept-changes" in done.stderr
    assert dsv4(*command, "--accept-changes").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--to", "nvfp4", "--names", "transformers"], 2, "--names deepseek"),
        (["--to", "bf16", "--source", "FLASH"], 2, "--to native"),
        (["--to", "native", "--sidecar", "nowhere"], 2, "there is no dsv4.roundtrip"),
        (["--to", "native", "--source", "nowhere"], 3, "no such file or directory"),
        (["--to", "native", "--source", "BF16"], 3, "as it was downloaded"),
        (["--to", "nvfp4", "--input-scales", "SCALES"], 2, "no object of numbers"),
    ],
)
def test_mistakes_get_their_exit_code_and_a_helpful_word(
    arguments: list[str], code: int, word: str, flash: Path, bf16: Path, tmp_path: Path
) -> None:
    scales = tmp_path / "scales.json"
    scales.write_text('{"layers.0.ffn.experts.0.w1.input_scale": "much"}')
    named = {"FLASH": str(flash), "BF16": str(bf16), "SCALES": str(scales)}
    done = dsv4("convert", bf16, tmp_path / "out", *(named.get(item, item) for item in arguments))
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_way_back_under_transformers_names_keeps_scales_of_what_is_called_alike_in_both(
    flash: Path, tmp_path: Path
) -> None:
    """mtp.0.e_proj.weight has one name in both namespaces; its scales have two, and once were left out."""
    bf16, out = tmp_path / "bf16", tmp_path / "out"
    assert dsv4("convert", flash, bf16, "--to", "bf16", "-q").returncode == 0
    back = ["convert", bf16, out, "--to", "native", "--names", "transformers", "--source", flash, "-q"]
    assert dsv4(*back).returncode == 0
    done = dsv4("verify", out, "--level", "structure")
    assert done.returncode == 0, done.stdout + done.stderr
    assert dsv4("verify", flash, out, "--level", "values").returncode == 0
