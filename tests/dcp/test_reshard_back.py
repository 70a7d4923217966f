"""dsv4 reshard --to safetensors: what any number of ranks saved becomes a checkpoint again, to the byte.

The oracles are torch's own dcp.save, the released files, and the conversion of the same values from files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gangs
import pytest
import reading
import tiny
import torch
import torch.distributed.checkpoint as dcp
import trainers
from click.testing import CliRunner, Result
from dsv4cli import main
from torch import Tensor

from dsv4ckpt import dcp_source
from dsv4ckpt.errors import BadDcp, Dsv4Error, MissingFile, NotConform, NotFinite, NotLossless, Usage
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MANIFEST = ("dsv4.manifest.json", "dsv4.sha256", "dsv4.roundtrip")


def dsv4(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.dsv4, ["reshard", *map(str, arguments)], catch_exceptions=True)


def done(*arguments: str | Path) -> Result:
    result = dsv4(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(kind: type[Dsv4Error], *arguments: str | Path) -> Dsv4Error:
    """The error that a command ends with; it has not begun to write."""
    result = dsv4(*arguments)
    assert isinstance(result.exception, kind), (result.output, result.exception)
    assert not Path(arguments[1]).exists()
    return result.exception


def shards_of(directory: Path) -> dict[str, str]:
    """SHA-256 of everything but what tells of the making."""
    return {name: digest for name, digest in tiny.tree_of(directory).items() if name not in MANIFEST}


@pytest.fixture(scope="module")
def bf16(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flash sample in BF16 under transformers names."""
    path = tmp_path_factory.mktemp("bf16") / "bf16"
    tiny.convert(flash, path, target=Target.BF16, namespace=Namespace.TRANSFORMERS)
    return path


@pytest.fixture(scope="module")
def smallest_bf16(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bf16") / "smallest"
    tiny.convert(smallest, path, target=Target.BF16, namespace=Namespace.TRANSFORMERS)
    return path


def saved(path: Path, state: dict[str, Any], config: Path | None = None) -> Path:
    """One process saves a state, by torch."""
    dcp.save(state, checkpoint_id=path, no_dist=True)
    if config is not None:
        shutil.copy(config / "config.json", path)
    return path


# ---- there and back


@pytest.mark.slow
@pytest.mark.parametrize("release", sorted(RELEASES))
def test_every_release_comes_back_byte_for_byte(release: str, tmp_path: Path) -> None:
    original = tiny.make_sample(release, tmp_path / "source")
    there_and_back(original, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "way"),
    [
        ("flash", ["--names", "deepseek"]),
        ("flash", ["--experts", "split"]),
        ("flash", ["--to-dtype", "as-stored"]),
        ("flash", ["--to-dtype", "as-stored", "--experts", "split"]),
        ("flash-base", ["--to-dtype", "as-stored", "--names", "deepseek"]),
        ("v4.1-flash", ["--to-dtype", "as-stored"]),
    ],
)
def test_every_way_leads_back(release: str, way: list[str], tmp_path: Path) -> None:
    there_and_back(tiny.make_sample(release, tmp_path / "source"), tmp_path, *way)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [target for target in Target if target not in (Target.BF16, Target.NATIVE)]
)
def test_codes_of_every_storage_come_back(target: Target, flash: Path, tmp_path: Path) -> None:
    """As uint8 in DCP, they are known again: by their shapes, and by the dtypes of what stands beside them."""
    tiny.convert(flash, tmp_path / "stored", target=target)
    done(
        tmp_path / "stored", tmp_path / "dcp", "--to", "dcp", "--to-dtype", "as-stored", "--names", "deepseek"
    )
    done(tmp_path / "dcp", tmp_path / "back", "--to", "safetensors", "--storage", target.value)
    assert shards_of(tmp_path / "back") == shards_of(tmp_path / "stored")


def there_and_back(original: Path, base: Path, *way: str) -> None:
    done(original, base / "dcp", "--to", "dcp", "--chunk-bytes", "64KiB", *way)
    done(base / "dcp", base / "back", "--to", "safetensors", "--storage", "native", "--source", original)
    assert shards_of(base / "back") == tiny.tree_of(original)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "division"),
    [(1, "rows"), (2, "columns"), (3, "rows"), (3, "columns"), (4, "experts rows"), (4, "experts columns")],
)
def test_what_ranks_save_comes_back_byte_for_byte(
    size: int, division: str, flash: Path, bf16: Path, tmp_path: Path
) -> None:
    """In float32, below a prefix, with an optimizer beside it."""
    gangs.gang(size, trainers.save, bf16, tmp_path / "step", division)
    options = ["--to", "safetensors", "--source", flash]
    done(tmp_path / "step", tmp_path / "native", *options, "--storage", "native")
    assert shards_of(tmp_path / "native") == tiny.tree_of(flash)


@pytest.mark.slow
def test_float32_beside_an_optimizer_below_a_prefix_comes_back(
    flash: Path, bf16: Path, tmp_path: Path
) -> None:
    gangs.gang(2, _save_all, bf16, tmp_path / "step")
    result = done(tmp_path / "step", tmp_path / "back", "--to", "safetensors", "--like", bf16, "--json",
                  "--names", "transformers")  # fmt: skip
    left = json.loads(result.stdout)["not_of_the_model"]
    assert {"step", "rng", "optim.param_groups.0.lr"} <= set(left)
    assert {name.split(".")[0] for name in left} == {"step", "optim", "rng"}
    assert shards_of(tmp_path / "back") == shards_of(bf16)


def _save_all(converted: Path, out: Path) -> None:
    trainers.save(converted, out, "rows", prefix="app.model.", wide=True, others=True)


@pytest.mark.slow
def test_from_one_dcp_directory_to_another(flash: Path, tmp_path: Path) -> None:
    """Other names and chunks, straight or by a detour."""
    done(flash, tmp_path / "one", "--to", "dcp", "--names", "deepseek", "--chunk-bytes", "64KiB")
    done(tmp_path / "one", tmp_path / "detour", "--to", "dcp", "--chunk-bytes", "1MiB")
    done(flash, tmp_path / "straight", "--to", "dcp", "--chunk-bytes", "1MiB")
    same = "__0_0.distcp"
    assert (tmp_path / "detour" / same).read_bytes() == (tmp_path / "straight" / same).read_bytes()


@pytest.mark.slow
def test_sidecar_travels_through_dcp(flash: Path, bf16: Path, tmp_path: Path) -> None:
    """From BF16 there is no release at hand: the conversion's sidecar goes along, and leads back."""
    done(bf16, tmp_path / "dcp", "--to", "dcp")
    assert (tmp_path / "dcp" / "dsv4.roundtrip").exists()
    done(tmp_path / "dcp", tmp_path / "back", "--to", "safetensors", "--storage", "native")
    assert shards_of(tmp_path / "back") == tiny.tree_of(flash)


@pytest.mark.slow
def test_what_was_tuned_is_requantized_and_the_rest_keeps_its_bytes(
    flash: Path, bf16: Path, tmp_path: Path
) -> None:
    values = reading.values_of(bf16)
    tuned = "model.layers.1.self_attn.q_a_proj.weight"
    values[tuned] = (values[tuned].float() * 1.5).to(torch.bfloat16)
    saved(tmp_path / "step", values)
    result = done(tmp_path / "step", tmp_path / "native", "--to", "safetensors", "--storage", "native", "--source",
                  flash, "--json")  # fmt: skip
    document = json.loads(result.stdout)
    assert document["changed"] == 1
    (loss,) = document["quantized"]
    assert loss["name"] == "layers.1.attn.wq_a.weight"
    assert loss["kept_delta"] > 0.9
    ours, theirs = shards_of(tmp_path / "native"), tiny.tree_of(flash)
    assert ours.keys() == theirs.keys()
    changed = [name for name in theirs if ours[name] != theirs[name]]
    assert changed == [tiny.shard_of(flash, loss["name"]).name]
    before, after = (tiny.read_shard(directory / changed[0]) for directory in (flash, tmp_path / "native"))
    touched = {name for name in before if before[name] != after[name]}
    assert touched <= {"layers.1.attn.wq_a.weight", "layers.1.attn.wq_a.scale"} and touched


@pytest.mark.slow
def test_draft_stages_that_the_trainer_dropped_come_from_the_release(
    flash: Path, bf16: Path, tmp_path: Path
) -> None:
    values = {name: tensor for name, tensor in reading.values_of(bf16).items() if not name.startswith("mtp.")}
    saved(tmp_path / "step", values)
    native = ["--to", "safetensors", "--storage", "native"]
    refused(NotConform, tmp_path / "step", tmp_path / "back", *native, "--like", bf16)
    done(tmp_path / "step", tmp_path / "back", *native, "--source", flash)
    assert shards_of(tmp_path / "back") == tiny.tree_of(flash)


# ---- ranges of tensors, from any chunks


@pytest.mark.slow
@pytest.mark.parametrize("division", ["rows", "columns", "experts rows", "experts columns"])
def test_any_range_of_a_tensor_is_what_torch_loads(
    division: str, smallest_bf16: Path, tmp_path: Path
) -> None:
    gangs.gang(4, _save_wide, smallest_bf16, tmp_path / "step", division)
    found, left = dcp_source.open_dcp(str(tmp_path / "step"), config_at=str(smallest_bf16))
    assert left == ()
    values, generator = reading.values_of(smallest_bf16), torch.Generator().manual_seed(5)
    with found.checkpoint.reader() as reader:
        for name, tensor in values.items():
            wanted = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
            ranges = [(0, len(wanted)), (0, 0), (len(wanted), len(wanted))]
            ranges += [
                sorted(torch.randint(len(wanted) + 1, (2,), generator=generator).tolist()) for _ in range(6)
            ]
            for begin, end in ranges:
                got = bytearray(end - begin)
                reader.read_into(name, memoryview(got), begin)
                assert got == wanted[begin:end], (name, begin, end)


def _save_wide(converted: Path, out: Path, division: str) -> None:
    trainers.save(converted, out, division, wide=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_values_are_rounded_once_to_nearest_even(
    dtype: torch.dtype, smallest_bf16: Path, tmp_path: Path
) -> None:
    """The oracle counts in fractions: the nearer neighbour, of two equally near ones the even."""
    name = "model.norm.weight"
    values = reading.values_of(smallest_bf16)
    step = 2.0**-7  # between neighbours in [1, 2)
    ties = [
        1 + step / 2,
        1 + 3 * step / 2,
        1 + step / 2 + 2.0**-20,
        1 + step / 2 - 2.0**-20,
        -1 - step / 2,
        0.0,
        -0.0,
    ]
    wanted = [1.0, 1 + 2 * step, 1 + step, 1.0, -1.0, 0.0, -0.0]
    if dtype == torch.float64:  # a cast by way of float32 would see a tie
        ties, wanted = [*ties, 1 + step / 2 + 2.0**-40], [*wanted, 1 + step]
    held = values[name].to(dtype)
    held[: len(ties)] = torch.tensor(ties, dtype=dtype)
    saved(tmp_path / "step", {**values, name: held}, smallest_bf16)
    done(tmp_path / "step", tmp_path / "back", "--to", "safetensors", "--names", "transformers")
    got = reading.values_of(tmp_path / "back")[name][: len(ties)]
    assert reading.same_bits(got, torch.tensor(wanted, dtype=torch.bfloat16))


# ---- what is refused, before anything is written


def broken(values: dict[str, Tensor], how: str) -> dict[str, Any]:
    state: dict[str, Any] = dict(values)
    if how == "missing":
        del state["model.norm.weight"]
    elif how == "unknown":
        state["model.layers.0.adapter.weight"] = torch.zeros(2, 2)
    elif how == "shape":
        state["model.norm.weight"] = state["model.norm.weight"][1:].clone()
    elif how == "rounded":
        state["model.layers.0.self_attn.sinks"] = state["model.layers.0.self_attn.sinks"].to(torch.bfloat16)
    elif how == "two":
        state |= {f"ema.{name}": tensor for name, tensor in values.items()}
    elif how == "none":
        state = {f"optim.{name}.exp_avg": tensor for name, tensor in values.items()}
    elif how == "integers":
        state["model.norm.weight"] = state["model.norm.weight"].to(torch.int32)
    return state


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("missing", NotConform), ("unknown", NotConform), ("shape", NotConform), ("rounded", NotLossless),
        ("two", BadDcp), ("none", BadDcp), ("integers", NotConform),
    ],
)  # fmt: skip
def test_state_that_is_not_the_model_is_refused(
    how: str, kind: type[Dsv4Error], smallest_bf16: Path, tmp_path: Path
) -> None:
    saved(tmp_path / "step", broken(reading.values_of(smallest_bf16), how), smallest_bf16)
    error = refused(kind, tmp_path / "step", tmp_path / "back", "--to", "safetensors")
    assert error.facts["do"]


def test_what_a_trainer_rounded_is_taken_if_you_say_so(smallest_bf16: Path, tmp_path: Path) -> None:
    state = broken(reading.values_of(smallest_bf16), "rounded")
    saved(tmp_path / "step", state, smallest_bf16)
    done(
        tmp_path / "step",
        tmp_path / "back",
        "--to",
        "safetensors",
        "--names",
        "transformers",
        "--allow-lossy",
    )
    got = reading.values_of(tmp_path / "back")["model.layers.0.self_attn.sinks"]
    assert got.dtype == torch.float32
    assert torch.equal(got, state["model.layers.0.self_attn.sinks"].float())


def test_one_of_two_models_is_chosen_by_its_prefix(smallest_bf16: Path, tmp_path: Path) -> None:
    values = reading.values_of(smallest_bf16)
    state = {f"net.{name}": tensor for name, tensor in values.items()}
    state |= {f"ema.{name}": tensor * 2 for name, tensor in values.items()}
    saved(tmp_path / "step", state)
    options = ["--to", "safetensors", "--names", "transformers", "--like", smallest_bf16]
    done(tmp_path / "step", tmp_path / "back", *options, "--prefix", "net")
    assert shards_of(tmp_path / "back") == shards_of(smallest_bf16)
    refused(BadDcp, tmp_path / "step", tmp_path / "other", *options, "--prefix", "model")


@pytest.mark.parametrize("how", ["unfinished", "file missing", "file cut", "file of another save"])
def test_directory_that_is_not_whole_is_refused(how: str, smallest_bf16: Path, tmp_path: Path) -> None:
    values = reading.values_of(smallest_bf16)
    step = saved(tmp_path / "step", values, smallest_bf16)
    file = next(step.glob("*.distcp"))
    if how == "unfinished":
        (step / ".metadata").unlink()
    elif how == "file missing":
        file.unlink()
    elif how == "file cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        other = saved(tmp_path / "other", {name: values[name] for name in sorted(values, reverse=True)})
        data = (other / file.name).read_bytes()
        file.write_bytes(data.ljust(file.stat().st_size, b"\0"))
    kind: type[Dsv4Error] = Usage if how == "unfinished" else BadDcp
    refused(kind, step, tmp_path / "back", "--to", "safetensors")


def test_without_a_config_the_command_says_where_to_take_it_from(smallest_bf16: Path, tmp_path: Path) -> None:
    saved(tmp_path / "step", reading.values_of(smallest_bf16))
    error = refused(MissingFile, tmp_path / "step", tmp_path / "back", "--to", "safetensors")
    assert "--like" in error.facts["do"]
    done(tmp_path / "step", tmp_path / "back", "--to", "safetensors", "--like", smallest_bf16)


def test_nan_is_refused_and_nothing_stays(smallest_bf16: Path, tmp_path: Path) -> None:
    values = reading.values_of(smallest_bf16)
    values["model.norm.weight"][3] = torch.nan
    saved(tmp_path / "step", values, smallest_bf16)
    refused(NotFinite, tmp_path / "step", tmp_path / "back", "--to", "safetensors", "--names", "deepseek")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--to", "dcp", "--storage", "native"],
        ["--to", "dcp", "--source", "somewhere"],
        ["--to", "safetensors", "--chunk-bytes", "1MiB"],
        ["--to", "safetensors", "--to-dtype", "bf16"],
        ["--to", "safetensors", "--source", "somewhere"],
    ],
    ids=" ".join,
)
def test_options_of_the_other_direction_are_refused(wrong: list[str], smallest: Path, tmp_path: Path) -> None:
    refused(Usage, smallest, tmp_path / "back", *wrong)


def test_checkpoint_in_place_of_a_dcp_directory_is_told_to_convert(smallest: Path, tmp_path: Path) -> None:
    error = refused(Usage, smallest, tmp_path / "back", "--to", "safetensors")
    assert "dsv4 convert" in error.facts["do"]
    refused(Usage, smallest, tmp_path / "back", "--to", "dcp", "--prefix", "model")
