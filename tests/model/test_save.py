"""Saving: what the conversion of files would write, bit for bit; trained values; and nothing half written."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from dsv4cli.main import main
from safetensors import safe_open
from torch import Tensor

from dsv4ckpt import outdir, sink
from dsv4ckpt.errors import ForeignOutput, NoSpace, NotConform, NotFinite, Usage, VanishingChange
from dsv4ckpt.formats import MANIFEST_NAME, OUR_NAMES, SUMS_NAME, WORK_NAME, Storage, Target
from dsv4ckpt.names import Namespace
from dsv4model.loading import load
from dsv4model.memory import checkpoint_of
from dsv4model.model import Model
from dsv4model.saving import save

RELEASES = ["flash", "flash-base", "flash-0731"]
HEAD, EXPERT = "head.weight", "layers.1.ffn.experts.2.w1.weight"
Make = Callable[..., Path]


def trees(*directories: Path) -> list[dict[str, str]]:
    """Name -> SHA-256 of every file but those that tell how the directory came about."""
    return [
        {name: digest for name, digest in tiny.tree_of(directory).items() if name not in OUR_NAMES}
        for directory in directories
    ]


def dsv4(*arguments: object) -> str:
    """What a command prints. It must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0, err.getvalue()
    return out.getvalue()


def tensor_of(directory: Path, name: str) -> Tensor:
    with safe_open(tiny.shard_of(directory, name), "pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


def require_same(a: Model, b: Model) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


# ---- untouched values


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dense", "packed"])
@pytest.mark.parametrize("release", RELEASES)
def test_untouched_model_saved_as_native_is_the_release_byte_for_byte(
    release: str, how: Any, made: Make, tmp_path: Path
) -> None:
    done = save(
        load(made(release), experts=how), tmp_path / "out", like=made(release), to="native", names="deepseek"
    )
    assert trees(tmp_path / "out") == trees(made(release))
    assert done.num_changed == 0 and not done.losses
    assert "ok" in dsv4("verify", tmp_path / "out")
    assert "ok" in dsv4("verify", made(release), tmp_path / "out", "--level", "bytes")


@pytest.mark.slow
@pytest.mark.parametrize("space", [*Namespace])
@pytest.mark.parametrize("how", ["dense", "packed"])
@pytest.mark.parametrize("release", RELEASES)
def test_untouched_model_saved_as_bf16_is_what_the_conversion_writes(
    release: str, how: Any, space: Namespace, made: Make, tmp_path: Path
) -> None:
    """DSpark stages and Base's copies included; and the way back to the release's bytes is open."""
    out = tmp_path / "out"
    save(load(made(release), experts=how), out, like=made(release), names=space.value)
    assert trees(out) == trees(made(release, Target.BF16, space))
    assert "ok" in dsv4("verify", out)
    dsv4("convert", out, tmp_path / "back", "--to", "native", "--source", made(release))
    assert trees(tmp_path / "back") == trees(made(release))


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT])
def test_untouched_model_saved_in_other_storages_has_the_same_values(
    target: Target, made: Make, tmp_path: Path
) -> None:
    model = load(made("flash"))
    save(model, tmp_path / "out", like=made("flash"), to=target.value, names="deepseek")
    require_same(load(tmp_path / "out"), model)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-0731"])
def test_packed_model_saved_as_native_under_other_names_has_the_same_codes(
    release: str, made: Make, tmp_path: Path
) -> None:
    model = load(made(release), experts="packed")
    save(model, tmp_path / "out", like=made(release), to="native")
    again = load(tmp_path / "out", experts="packed")
    require_same(again, model)
    assert again.unused == model.unused
    dsv4("convert", tmp_path / "out", tmp_path / "back", "--to", "native", "--source", made(release))
    assert trees(tmp_path / "back") == trees(made(release))


@pytest.mark.slow
def test_packed_model_of_another_storage_is_saved_in_it_and_as_native(made: Make, tmp_path: Path) -> None:
    model = load(made("flash", Target.FP8), experts="packed")
    save(model, tmp_path / "fp8", like=made("flash", Target.FP8), to="fp8", names="deepseek")
    assert trees(tmp_path / "fp8") == trees(made("flash", Target.FP8))
    like = made("flash", Target.FP8)
    save(model, tmp_path / "native", like=like, to="native", names="deepseek", source=made("flash"))
    shards = [
        {k: v for k, v in tree.items() if "safetensors" in k}
        for tree in trees(tmp_path / "native", made("flash"))
    ]
    assert shards[0] == shards[1]


@pytest.mark.slow
def test_sidecar_of_a_conversion_gives_untouched_values_their_bytes(made: Make, tmp_path: Path) -> None:
    like = made("flash", Target.BF16)
    save(load(like), tmp_path / "out", like=like, to="native", names="deepseek")
    assert trees(tmp_path / "out") == trees(made("flash"))
    save(load(like), tmp_path / "on", like=like, names="deepseek")  # carried on, for whoever converts that
    dsv4("convert", tmp_path / "on", tmp_path / "back", "--to", "native")
    assert trees(tmp_path / "back") == trees(made("flash"))


@pytest.mark.slow
def test_loading_saving_and_loading_gives_equal_tensors(made: Make, tmp_path: Path) -> None:
    for release in RELEASES:
        model = load(made(release, Target.BF16))
        save(model, tmp_path / release, like=made(release, Target.BF16))
        again = load(tmp_path / release)
        require_same(again, model)
        assert (again.unused, again.notes) == (model.unused, model.notes)


@pytest.mark.slow
def test_saved_model_loads_in_transformers(made: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(made("flash"))
    save(model, tmp_path / "out", like=made("flash"))
    peer, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    state = model.state_dict()
    for name, tensor in peer.state_dict().items():
        assert torch.equal(tensor.to(torch.float32), state[name].to(torch.float32)), name


@pytest.mark.slow
def test_equal_models_give_equal_directories_for_any_number_of_workers(made: Make, tmp_path: Path) -> None:
    for workers in (1, 3):
        options = {"max_shard_bytes": 10**6, "num_workers": workers}
        save(load(made("flash")), tmp_path / str(workers), like=made("flash"), **options)  # type: ignore[arg-type]
    assert tiny.tree_of(tmp_path / "1") == tiny.tree_of(tmp_path / "3")
    assert len([*(tmp_path / "1").glob("*.safetensors")]) > 10


@pytest.mark.parametrize("how", ["dense", "packed"])
def test_any_range_of_a_tensors_bytes_can_be_read(how: Any, made: Make) -> None:
    """Copies go in pieces that begin and end within rows, and within the tiles of what is decoded."""
    shown = checkpoint_of(load(made("flash"), experts=how), tiny.survey_of(made("flash")), Storage.BF16)
    names = ["head.weight", "layers.0.attn.wq_b.weight", EXPERT, "layers.0.ffn.gate.tid2eid", "hc_head_fn"]
    with shown.reader() as reader:
        for name in names:
            place = shown.tensors[name].entry
            whole = bytearray(place.end - place.begin)
            reader.read_into(name, memoryview(whole), 0)
            for offset, size in (
                (0, 2),
                (514, 1000),
                (len(whole) - 8, 8),
                (len(whole) // 2 + 130, 2000),
                (16, 0),
            ):
                data = bytearray(size)
                reader.read_into(name, memoryview(data), offset)
                assert data == whole[offset : offset + size], (name, offset)


# ---- changed values


def trained(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Model:
    """A model whose head and one expert's gate doubled."""
    model = load(directory, dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, :128].mul_(2)
    return model


@pytest.mark.slow
def test_trained_values_are_saved_and_all_others_stay_the_releases_bytes(made: Make, tmp_path: Path) -> None:
    done = save(trained(made("flash")), tmp_path / "out", like=made("flash"), to="native", names="deepseek")
    assert [loss.name for loss in done.losses] == [EXPERT] and done.num_changed == 2
    assert done.losses[0].kept_share == pytest.approx(1)
    assert torch.equal(tensor_of(tmp_path / "out", HEAD), 2 * tensor_of(made("flash"), HEAD))
    mine, theirs = trees(tmp_path / "out", made("flash"))
    changed = {name for name in theirs if mine[name] != theirs[name]}
    assert changed == {tiny.shard_of(made("flash"), name).name for name in (HEAD, EXPERT)}
    require_same(load(tmp_path / "out"), trained(made("flash")))


@pytest.mark.slow
def test_manifest_of_like_vouches_for_its_own_values_only(made: Make, tmp_path: Path) -> None:
    like = made("flash", Target.BF16)
    options = {"to": "native", "names": "deepseek", "source": made("flash")}
    save(trained(like), tmp_path / "out", like=like, **options)  # type: ignore[arg-type]
    require_same(load(tmp_path / "out"), trained(like))


@pytest.mark.slow
def test_trained_model_goes_from_bf16_to_native_on_the_command_line(made: Make, tmp_path: Path) -> None:
    save(trained(made("flash")), tmp_path / "out", like=made("flash"))
    source = made("flash")
    dsv4(
        "convert",
        tmp_path / "out",
        tmp_path / "back",
        "--to",
        "native",
        "--source",
        source,
    )
    require_same(load(tmp_path / "back"), trained(source))


@pytest.mark.slow
def test_wider_models_are_rounded_to_nearest_even_once(made: Make, tmp_path: Path) -> None:
    """Midway between 1 and its neighbour, and a little beyond: float32 cannot hold the latter next to 1."""
    for dtype, beyond, rounded in (
        (torch.float32, 2.0**-8 + 2.0**-20, 1 + 2.0**-7),
        (torch.float64, 2.0**-8 + 2.0**-40, 1 + 2.0**-7),
    ):
        model = load(made("flash"), dtype)
        with torch.no_grad():
            model.lm_head.weight[0, :4] = 1 + torch.tensor(
                [0, 2.0**-8, 3 * 2.0**-8, beyond], dtype=torch.float64
            )
        out = tmp_path / str(dtype)
        save(model, out, like=made("flash"))
        found = tensor_of(out, "lm_head.weight")[0, :4].to(torch.float64)
        assert found.tolist() == [1, 1, 1 + 2.0**-6, rounded]


@pytest.mark.slow
def test_copies_in_base_follow_the_model_where_they_were_copies(made: Make, tmp_path: Path) -> None:
    base = tiny.copy_of(made("flash-base"), tmp_path / "base")
    copy, twin = "mtp.0.head.weight", tiny.read_shard(tiny.shard_of(base, HEAD))[HEAD]
    tiny.edit_shard(tiny.shard_of(base, copy), lambda tensors: tensors.update({copy: twin}))
    model = load(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.embed_tokens.weight.mul_(2)
    save(model, tmp_path / "out", like=base)
    assert torch.equal(tensor_of(tmp_path / "out", copy), model.lm_head.weight)
    kept = "mtp.0.emb.tok_emb.weight"
    assert torch.equal(tensor_of(tmp_path / "out", kept), tensor_of(base, kept))


# ---- what is refused, and leaves nothing


def test_values_that_are_not_finite_are_refused_and_leave_nothing(made: Make, tmp_path: Path) -> None:
    model = load(made("flash"))
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    with pytest.raises(NotFinite, match=r"head\.weight") as told:
        save(model, tmp_path / "out", like=made("flash"), max_shard_bytes=10**6)
    assert "row 3, column 5" in told.value.facts["found"] and "allow-nan" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_change_that_would_vanish_is_refused_and_leaves_nothing(made: Make, tmp_path: Path) -> None:
    model = load(made("flash"))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").mul_(1 + 2.0**-6)
    (tmp_path / "out").mkdir()
    options: dict[str, Any] = {"like": made("flash"), "to": "native", "names": "deepseek"}
    with pytest.raises(VanishingChange):
        save(model, tmp_path / "out", **options)
    assert not [*(tmp_path / "out").iterdir()]
    save(model, tmp_path / "out", **options, allow_lossy=True)
    assert (tmp_path / "out" / MANIFEST_NAME).exists()


def test_disk_that_fills_up_is_told_and_leaves_nothing(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, publish, published = load(made("flash")), sink.FileSink._publish, []

    def full(self: sink.FileSink) -> None:
        publish(self)
        published.append(self._name)
        if len(published) == 3:
            raise NoSpace("the output cannot grow", do="make room")

    monkeypatch.setattr(sink.FileSink, "_publish", full)
    with pytest.raises(NoSpace):
        save(model, tmp_path / "out", like=made("flash"), num_workers=1)
    assert len(published) == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("present", [MANIFEST_NAME, "notes.txt", f"{WORK_NAME}/plan"])
def test_directory_that_is_not_empty_is_refused_and_stays(present: str, made: Make, tmp_path: Path) -> None:
    """Also a finished save: the model may have other values by now."""
    (tmp_path / present).parent.mkdir(exist_ok=True)
    (tmp_path / present).write_text("mine")
    with pytest.raises(ForeignOutput):
        save(load(made("flash")), tmp_path, like=made("flash"))
    assert (tmp_path / present).read_text() == "mine" and len([*tmp_path.rglob("*")]) <= 2


def test_directory_that_somebody_takes_meanwhile_is_left_to_them(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_outdir = outdir.open_outdir

    def late(path: str, *arguments: Any) -> Any:
        Path(path).mkdir()
        (Path(path) / "model-00001-of-00007.safetensors").write_text("theirs")
        (Path(path) / WORK_NAME).mkdir()
        (Path(path) / WORK_NAME / "plan").write_text("another one's")
        return open_outdir(path, *arguments)

    monkeypatch.setattr(outdir, "open_outdir", late)
    with pytest.raises(ForeignOutput):
        save(load(made("flash")), tmp_path / "out", like=made("flash"))
    assert [file.read_text() for file in (tmp_path / "out").glob("*.safetensors")] == ["theirs"]


@pytest.mark.slow
def test_checkpoint_of_another_model_is_refused(made: Make, tmp_path: Path) -> None:
    with pytest.raises(NotConform, match="another model") as told:
        save(load(made("flash")), tmp_path / "out", like=made("pro"))
    assert "routed_scaling" in told.value.facts["expected"]
    other = tiny.make_sample("flash", tmp_path / "other", layers=1, experts=6)
    with pytest.raises(NotConform, match="another model"):
        save(load(other), tmp_path / "out", like=made("flash"))


def test_model_with_tensors_of_its_own_is_refused(made: Make, tmp_path: Path) -> None:
    model = load(made("flash"))
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(Usage, match="not one that load made"):
        save(model, tmp_path / "out", like=made("flash"))


@pytest.mark.parametrize(
    "options", [{"to": "gguf"}, {"names": "llama"}, {"scale_policy": "best"}, {"source": "x"}]
)
def test_requests_that_make_no_sense_are_refused(options: dict[str, Any], made: Make, tmp_path: Path) -> None:
    with pytest.raises(Usage):
        save(load(made("flash")), tmp_path / "out", like=made("flash"), **options)
    assert not (tmp_path / "out").exists()


def test_output_is_durable_in_the_form_of_a_conversion(made: Make, tmp_path: Path) -> None:
    save(load(made("flash")), tmp_path / "out", like=made("flash"))
    present = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", tiny.INDEX, MANIFEST_NAME, SUMS_NAME, "tokenizer.json"} <= present
    assert WORK_NAME not in present
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())
    assert [row["file"] for row in manifest["source"]] == ["model in memory"]
