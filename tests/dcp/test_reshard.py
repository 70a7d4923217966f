"""dsv4 reshard --to dcp: plain torch.distributed.checkpoint.load gets every value, at any world size.

The oracle is the BF16 conversion, read by the safetensors package, and for what stays as stored the released bytes.
"""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import gangs
import pytest
import reading
import tiny
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result
from dsv4cli import main
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dsv4ckpt import plan, run, source, survey
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Experts, Namespace
from dsv4ckpt.release import RELEASES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WAYS = {
    "transformers fused": (Namespace.TRANSFORMERS, Experts.FUSED),
    "deepseek split": (Namespace.DEEPSEEK, Experts.SPLIT),
}
CHUNK = 64 * 1024


def reshard(src: Path, dst: Path, *, workers: int = 2, **options: Any) -> plan.Plan:
    checkpoint = source.open_checkpoint(str(src))
    chosen = plan.ConvertOptions(**{"chunk_bytes": CHUNK, **options})
    made = plan.make_plan(survey.survey(checkpoint), chosen)
    run.execute(made, checkpoint, str(dst), num_workers=workers)
    return made


def metadata_of(directory: Path) -> Metadata:
    """As torch itself reads it; the directory is our own."""
    with (directory / ".metadata").open("rb") as file:
        found: Metadata = pickle.load(file)
    return found


def loaded(directory: Path) -> dict[str, Tensor]:
    """Everything, in one process, by torch alone."""
    state: dict[str, Any] = {}
    for name, item in metadata_of(directory).state_dict_metadata.items():
        assert isinstance(item, TensorStorageMetadata)
        state[name] = torch.zeros(item.size, dtype=item.properties.dtype)
    dcp.load(state, checkpoint_id=directory)
    return state


def require_equal(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not reading.same_bits(state[name], wanted[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("release", sorted(RELEASES))
def test_torch_loads_every_release_as_its_conversion(release: str, way: str, tmp_path: Path) -> None:
    space, experts = WAYS[way]
    source_directory = tiny.make_sample(release, tmp_path / "source")
    tiny.convert(source_directory, tmp_path / "bf16", target=Target.BF16, namespace=space)
    reshard(source_directory, tmp_path / "dcp", namespace=space, experts=experts)
    require_equal(loaded(tmp_path / "dcp"), reading.values_of(tmp_path / "bf16"))


@pytest.mark.slow
def test_split_experts_of_transformers_names_are_rows_of_the_fused_ones(flash: Path, tmp_path: Path) -> None:
    reshard(flash, tmp_path / "split", namespace=Namespace.TRANSFORMERS, experts=Experts.SPLIT)
    reshard(flash, tmp_path / "fused", namespace=Namespace.TRANSFORMERS)
    split, fused = loaded(tmp_path / "split"), loaded(tmp_path / "fused")
    both = fused["model.layers.1.mlp.experts.gate_up_proj"]
    height = both.shape[1] // 2
    for expert in range(len(both)):
        gate = split[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"]
        up = split[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        assert torch.equal(both[expert, :height], gate)
        assert torch.equal(both[expert, height:], up)
    assert not any(name.endswith("experts.gate_up_proj") for name in split)


def test_codes_and_scales_stay_as_stored(flash: Path, tmp_path: Path) -> None:
    reshard(flash, tmp_path / "dcp", as_stored=True)
    state, stored = loaded(tmp_path / "dcp"), {}
    for file in sorted(flash.glob("*.safetensors")):
        stored |= tiny.read_shard(file)
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert bytes(state[name].view(-1).view(torch.uint8).tolist()) == tensor.data, name
        assert state[name].shape == tensor.shape
    kinds = {tensor.dtype for tensor in state.values()}
    assert kinds == {torch.uint8, torch.bfloat16, torch.float32, torch.int64}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_load_their_slices(size: int, flash: Path, tmp_path: Path) -> None:
    tiny.convert(flash, tmp_path / "bf16", target=Target.BF16, namespace=Namespace.TRANSFORMERS)
    reshard(flash, tmp_path / "dcp", namespace=Namespace.TRANSFORMERS)
    dimension = size % 3
    found = gangs.gang(size, reading.load_directory, tmp_path / "dcp", tmp_path / "bf16", dimension)
    assert found == [[]] * size


@pytest.mark.slow
def test_equal_sources_give_equal_bytes_in_any_chunks_equal_values(flash: Path, tmp_path: Path) -> None:
    for name, workers, more in (("one", 1, {}), ("two", 4, {}), ("large", 2, {"chunk_bytes": 10**9})):
        reshard(flash, tmp_path / name, workers=workers, max_shard_bytes=2 * 10**6, **more)
    assert tiny.tree_of(tmp_path / "one") == tiny.tree_of(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.distcp"))) > 3
    require_equal(loaded(tmp_path / "large"), loaded(tmp_path / "one"))


def test_experts_stand_one_after_the_other_and_chunks_are_small(flash: Path, tmp_path: Path) -> None:
    """A rank's experts are one run of bytes: chunks in the order of their offsets, without gaps but for alignment."""
    reshard(flash, tmp_path / "dcp", namespace=Namespace.TRANSFORMERS)
    metadata = metadata_of(tmp_path / "dcp")
    num_divided = 0
    for name, item in metadata.state_dict_metadata.items():
        assert isinstance(item, TensorStorageMetadata)
        offsets = [tuple(chunk.offsets) for chunk in item.chunks]
        assert offsets == sorted(offsets)
        num_divided += len(offsets) > 1
        places = [info for index, info in metadata.storage_data.items() if index.fqn == name]
        for before, after in itertools.pairwise(places):
            assert before.relative_path == after.relative_path
            assert 0 <= after.offset - (before.offset + before.length) < 64
            assert after.offset % 64 == 0
    assert num_divided > 10
    for item in metadata.state_dict_metadata.values():
        assert isinstance(item, TensorStorageMetadata)
        for chunk in item.chunks if len(item.size) == 3 else []:
            assert chunk.sizes.numel() * 2 <= CHUNK
            assert chunk.sizes[2] == item.size[2]


def test_metadata_names_no_place_of_this_machine(flash: Path, tmp_path: Path) -> None:
    reshard(flash, tmp_path / "dcp")
    assert str(tmp_path).encode() not in (tmp_path / "dcp" / ".metadata").read_bytes()
    meta = metadata_of(tmp_path / "dcp").storage_meta
    assert meta is not None
    assert meta.checkpoint_id == "."


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_plain_load_into_a_transformers_model_gives_the_tensors_of_the_release(
    flash: Path, tmp_path: Path
) -> None:
    """transformers reads the BF16 conversion; torch reads the DCP directory into a model of the same config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny.convert(flash, tmp_path / "bf16", target=Target.BF16, namespace=Namespace.TRANSFORMERS)
    reshard(flash, tmp_path / "dcp", namespace=Namespace.TRANSFORMERS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(tmp_path / "dcp")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wanted = theirs.state_dict()
    stored = metadata_of(tmp_path / "dcp").state_dict_metadata
    # what the release has in F32 is read in F32; transformers rounds it when it loads
    state = {
        name: tensor.to(stored[name].properties.dtype)  # type: ignore[union-attr]
        for name, tensor in model.state_dict().items()
    }
    assert len(state) > 80
    assert not all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in wanted.items())
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert state.keys() == wanted.keys()
    differing = [
        name for name, tensor in wanted.items() if not torch.equal(state[name].to(tensor.dtype), tensor)
    ]
    assert differing == []


# ---- the command


def dsv4(*arguments: str) -> Result:
    return CliRunner().invoke(main.dsv4, ["reshard", *arguments], catch_exceptions=True)


def test_command_writes_a_directory_with_config_and_sums(flash: Path, tmp_path: Path) -> None:
    done = dsv4(str(flash), str(tmp_path / "dcp"), "--to", "dcp", "--json")
    assert done.exit_code == 0, done.output
    names = {file.name for file in (tmp_path / "dcp").iterdir() if file.is_file()}
    assert names >= {".metadata", "__0_0.distcp", "config.json", "dsv4.manifest.json", "dsv4.sha256"}
    assert not any(name.endswith((".safetensors", ".index.json")) for name in names)
    assert "quantization_config" not in json.loads((tmp_path / "dcp" / "config.json").read_bytes())
    assert "model.layers.0.mlp.experts.down_proj" in metadata_of(tmp_path / "dcp").state_dict_metadata
    again = dsv4(str(flash), str(tmp_path / "dcp"), "--to", "dcp")
    assert again.exit_code == 0
    assert "nothing to do" in again.output


def dsv4_verb(*arguments: str | Path) -> str:
    """What another verb says, having found nothing wrong."""
    result = CliRunner().invoke(main.dsv4, [*map(str, arguments)], standalone_mode=False)
    assert result.return_value == 0, (result.output, result.exception)
    return result.output


@pytest.mark.slow
def test_directory_is_inspected_and_verified_like_any_checkpoint(flash: Path, tmp_path: Path) -> None:
    made = tmp_path / "dcp"
    assert dsv4(str(flash), str(made), "--to", "dcp").exit_code == 0
    assert "conform" in dsv4_verb("inspect", made)
    assert "have the SHA-256" in dsv4_verb("verify", made)
    assert "same values" in dsv4_verb("verify", flash, made, "--level", "values")
    file = made / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = CliRunner().invoke(main.dsv4, ["verify", str(made)], standalone_mode=False)
    assert found.return_value == 1
    assert "__0_0.distcp" in found.output


def test_dry_run_writes_nothing(flash: Path, tmp_path: Path) -> None:
    done = dsv4(str(flash), str(tmp_path / "dcp"), "--to", "dcp", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "__0_0.distcp" in done.output
    assert not (tmp_path / "dcp").exists()


@pytest.mark.parametrize(
    "wrong",
    [["--names", "deepseek", "--experts", "fused"], ["--chunk-bytes", "1KB"]],
)
def test_wrong_wish_is_refused(wrong: list[str], flash: Path, tmp_path: Path) -> None:
    from dsv4ckpt.errors import Usage

    done = dsv4(str(flash), str(tmp_path / "dcp"), "--to", "dcp", *wrong)
    assert isinstance(done.exception, Usage)
    assert not (tmp_path / "dcp").exists()


@pytest.mark.slow
def test_ranks_write_the_bytes_of_one_process(flash: Path, tmp_path: Path) -> None:
    options = ["--to", "dcp", "--max-file-size", "2MB", "--chunk-bytes", "64KiB", "-q"]
    assert dsv4(str(flash), str(tmp_path / "one"), *options).exit_code == 0
    done = gangs.torchrun(2, "-m", "dsv4cli", "reshard", str(flash), str(tmp_path / "two"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tiny.tree_of(tmp_path / "two") == tiny.tree_of(tmp_path / "one")
