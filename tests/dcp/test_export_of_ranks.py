"""What ranks have trained together, each with layers and experts of its own, is exported as one model."""

from __future__ import annotations

import json
from pathlib import Path

import gangs
import pytest
import tiny
import torch
import training

from dsv4ckpt import run
from dsv4model import adapter_export, loading
from dsv4model.exporting import planned
from dsv4model.runs import RunDirectory
from dsv4model.trained import checkpoint_at

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.slow,
]


@pytest.fixture
def text(flash: Path, tmp_path: Path) -> str:
    """A step of a recipe."""
    data = tmp_path / "tokens.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [10 + (7 * seed + at) % 50 for at in range(40)]}) + "\n"
                            for seed in range(8)))  # fmt: skip
    return f"""
        [model]\nsource = "{flash}"
        [train]\nrun = "{tmp_path / "run"}"\nsteps = 1\nrows = 4\nmicro_rows = 1
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 64
        [optimizer]\nlr = 0.01
    """


def test_weights_of_stages_and_divided_experts_are_exported_as_they_are(text: str, tmp_path: Path) -> None:
    changes = ["parallel.stages=2", "parallel.experts=2"]
    _, state = gangs.gang(4, training.run, text, changes)[0]
    directory = RunDirectory(str(tmp_path / "run"))
    with planned(directory, checkpoint_at(directory, None), to="bf16") as (made, shown):
        run.execute(made, shown, str(tmp_path / "out"), num_workers=1, accept_changes=True)
    held: dict[str, tiny.Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        held |= tiny.read_shard(shard)
    found = loading.load(tmp_path / "out", torch.float32).state_dict()
    assert {f"model.{name}" for name in found} == {name for name in state if name.startswith("model.")}
    for name, tensor in found.items():
        trained = state[f"model.{name}"]
        # of float32, so that a cast rounds once
        expected = trained.bfloat16().float() if held[name].dtype == "BF16" else trained
        assert torch.equal(tensor, expected), name


def test_adapters_of_divided_experts_are_exported_as_they_are(text: str, tmp_path: Path) -> None:
    changes = ["parallel.experts=2", "train.what=lora", "lora.rank=2", 'lora.targets=["*.experts.*"]']
    _, state = gangs.gang(2, training.run, text, changes)[0]
    directory = RunDirectory(str(tmp_path / "run"))
    plan = adapter_export.planned(directory, checkpoint_at(directory, None))
    for place in plan.files.places:
        for side, tensor in zip("AB", plan.values(place), strict=True):
            assert torch.equal(tensor, state[f"model.{place.adapter_name}.lora_{side}"]), place.name
    adapter_export.execute(plan, str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_config.json").is_file()
