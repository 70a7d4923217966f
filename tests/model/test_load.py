"""Loading: values as they stand in the files, in every release, storage and namespace; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from dsv4ckpt.errors import BadConfig, Dsv4Error, MissingScale, NotConform, NotFinite, Usage
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4model import loading, packed
from dsv4model.config import is_kept_wide
from dsv4model.loading import load

V4 = ["flash", "flash-base", "flash-0731", "pro", "pro-base", "pro-0813"]
COPIES = ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")
Make = Callable[..., Path]  # made(release, target, namespace)


def converted_values(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a BF16 checkpoint, by the reference reader."""
    found = {}
    for shard in directory.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return found


def require_same(model: torch.nn.Module, wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    state = model.state_dict()
    assert state.keys() <= wanted.keys()
    for name, tensor in state.items():
        theirs = wanted[name]
        if theirs.dtype.is_floating_point:
            held = torch.float32 if is_kept_wide(name) and dtype != torch.float64 else dtype
            assert tensor.dtype == held, name
            assert (tensor.signbit() == theirs.signbit()).all(), name
        assert torch.equal(tensor.to(torch.float64), theirs.to(torch.float64)), name


# ---- values


@pytest.mark.slow
@pytest.mark.parametrize("name", V4)
def test_model_holds_the_values_of_the_bf16_conversion(name: str, made: Make) -> None:
    """From the released files, and from both storages under transformers' names."""
    wanted = converted_values(made(name, Target.BF16, Namespace.TRANSFORMERS))
    for source in (
        made(name),
        made(name, Target.NATIVE, Namespace.TRANSFORMERS),
        made(name, Target.BF16, Namespace.TRANSFORMERS),
        made(name, Target.BF16, Namespace.DEEPSEEK),
    ):
        model = load(source)
        require_same(model, wanted, torch.bfloat16)
        left = wanted.keys() - model.state_dict().keys()
        if "base" in name:
            assert left == {*COPIES} and model.unused == COPIES
        elif name in ("flash-0731", "pro-0813"):
            assert left and all(tensor.startswith("mtp.") for tensor in left)
        else:
            assert not left and model.unused == ()


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT])
def test_model_holds_the_same_values_from_every_storage(target: Target, made: Make) -> None:
    wanted = converted_values(made("flash", Target.BF16, Namespace.TRANSFORMERS))
    require_same(load(made("flash", target)), wanted, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["flash", "flash-base"])
def test_wider_models_hold_the_same_values(name: str, dtype: torch.dtype, made: Make) -> None:
    require_same(
        load(made(name), dtype), converted_values(made(name, Target.BF16, Namespace.TRANSFORMERS)), dtype
    )


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp4(directory: Path, name: str) -> Any:
    """float64 [R, C] of an expert's matrix, straight from its file (OCP MX v1.0 sec. 5.3)."""
    with safe_open(tiny.shard_of(directory, name), "np") as file:
        codes = file.get_tensor(name).view(np.uint8)
    scale = tiny.read_shard(tiny.shard_of(directory, name))[name.replace("weight", "scale")]
    assert isinstance(scale.data, bytes)
    exponents = np.frombuffer(scale.data, np.uint8).reshape(scale.shape).astype(np.float64) - 127
    values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(codes.shape[0], -1)
    return values * np.repeat(2.0**exponents, 32, axis=1)


def test_fused_experts_hold_gate_then_up_of_each_expert(made: Make) -> None:
    """Against float64 arithmetic on the bytes, not against our own decoder."""
    state = load(made("flash")).state_dict()
    for expert in (0, 5, 7):
        prefix = f"layers.2.ffn.experts.{expert}."
        gate_up = state["model.layers.2.mlp.experts.gate_up_proj"][expert].double().numpy()
        wanted = np.concatenate([fp4(made("flash"), f"{prefix}{w}.weight") for w in ("w1", "w3")])
        assert (gate_up == wanted).all()
        down = state["model.layers.2.mlp.experts.down_proj"][expert].double().numpy()
        assert (down == fp4(made("flash"), f"{prefix}w2.weight")).all()


def test_model_comes_in_evaluation_mode_and_ready_to_train(made: Make) -> None:
    model = load(made("flash"))
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    buffers = {name.rpartition(".")[2]: buffer.dtype for name, buffer in model.named_buffers()}
    assert buffers == {"tid2eid": torch.int64, "e_score_correction_bias": torch.float32}


def test_loading_takes_a_survey_as_well_as_a_path(made: Make) -> None:
    a, b = load(made("flash")), load(tiny.survey_of(made("flash")))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)


@pytest.mark.slow
def test_cut_down_checkpoints_load(made: Make, tmp_path: Path) -> None:
    """--layers and --mtp drop make models that run."""
    tiny.convert(made("flash"), tmp_path / "cut", target=Target.BF16, layers=(1, 3), keep_mtp=False)
    model = load(tmp_path / "cut")
    assert model.config.num_layers == 2 and not model.mtp
    out = model(torch.zeros(1, 4, dtype=torch.int64))
    assert out.logits.isfinite().all() and out.mtp_logits is None


# ---- what is no part of the model


def test_every_tensor_of_a_checkpoint_is_used_or_named(made: Make) -> None:
    found = tiny.survey_of(made("flash-0731"))
    model = load(made("flash-0731"))
    assert list(model.unused) == sorted(model.unused)
    assert {*model.unused} == {item.name for item in found.logicals if item.name.startswith("mtp.")}
    assert "mtp.0.main_proj.weight" in model.unused and not model.mtp


def copies_made_equal(src: Path, out: Path, but: str = "") -> Path:
    """Base's copies of embed and head made what they copy, in all but one."""
    directory = tiny.copy_of(src, out)
    for copy, name in zip(COPIES, ("embed.weight", "head.weight"), strict=True):
        twin = tiny.read_shard(tiny.shard_of(directory, name))[name]
        if copy != but:
            tiny.edit_shard(
                tiny.shard_of(directory, copy), lambda tensors, c=copy, t=twin: tensors.update({c: t})
            )
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("different", ["", *COPIES])
def test_copies_in_base_that_differ_from_what_they_copy_are_told(
    different: str, made: Make, tmp_path: Path
) -> None:
    model = load(copies_made_equal(made("flash-base"), tmp_path / "base", different))
    assert model.unused == COPIES
    assert [note.split()[0] for note in model.notes] == [different] * bool(different)


# ---- what is refused


def refused(error: type[Dsv4Error], words: str, source: Path, **options: Any) -> Dsv4Error:
    """The error that loading raises, before it makes a model or a tensor, not even on the meta device."""

    def allocate(*arguments: object, **options: object) -> None:
        raise AssertionError("something was allocated")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=words) as told:
        patch.setattr(loading, "Model", allocate)
        patch.setattr(torch, "empty", allocate)
        load(source, **options)
    assert "do" in told.value.facts
    return told.value


def without(path: Path, *tensors: str) -> Path:
    for name in tensors:
        tiny.edit_shard(tiny.shard_of(path, name), lambda held, n=name: held.pop(n))
        tiny.edit_weight_map(path, lambda weight_map, n=name: weight_map.pop(n))
    return path


@pytest.mark.parametrize("how", ["dense", "packed"])
def test_missing_tensor_is_refused_by_name(how: Any, checkpoint: Path) -> None:
    refused(
        NotConform,
        r"layers\.2\.attn_norm\.weight",
        without(checkpoint, "layers.2.attn_norm.weight"),
        experts=how,
    )


def test_missing_scales_are_refused_by_name(checkpoint: Path) -> None:
    refused(MissingScale, r"layers\.1\.attn\.wq_a\.scale", without(checkpoint, "layers.1.attn.wq_a.scale"))


def test_extra_tensor_is_refused_by_name(checkpoint: Path) -> None:
    shard = tiny.shard_of(checkpoint, "norm.weight")
    extra = tiny.Tensor("BF16", (2,), bytes(4))
    tiny.edit_shard(shard, lambda held: held.update({"layers.9.attn_norm.weight": extra}))
    tiny.edit_weight_map(checkpoint, lambda held: held.update({"layers.9.attn_norm.weight": shard.name}))
    refused(NotConform, r"layers\.9\.attn_norm\.weight", checkpoint)


@pytest.mark.parametrize(("name", "words"), [("v4.1-flash", r"V4\.1"), ("vision-exp", "Vision-Exp")])
def test_other_architectures_are_refused_before_their_tensors_are_looked_at(
    name: str, words: str, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(name)
    monkeypatch.setattr(loading, "survey_of", None)
    refused(BadConfig, words, directory)


def test_vision_exp_whose_config_hides_it_is_refused(made: Make, tmp_path: Path) -> None:
    directory = tiny.copy_of(made("vision-exp"), tmp_path / "hidden")
    tiny.edit_json(directory / tiny.CONFIG, lambda document: document.pop("vision_config"))
    refused(NotConform, "Vision-Exp", directory)


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"dtype": torch.int64}, {"experts": "sparse"}])
def test_requests_that_make_no_sense_are_refused(options: dict[str, Any], made: Make) -> None:
    refused(Usage, "load", made("flash"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.BF16, Target.NVFP4])
def test_packed_asks_for_codes_that_it_knows(target: Target, made: Make) -> None:
    refused(Usage, "packed", made("flash", target), experts="packed")


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.FP8, Target.FP8_F32SCALE, Target.MXFP4_CT])
def test_packed_holds_the_values_of_the_other_storages_too(target: Target, made: Make) -> None:
    dense, model = load(made("flash", target)), load(made("flash", target), experts="packed")
    found = 0
    for path, module in model.named_modules():
        if isinstance(module, packed.PackedLinear):
            values = packed.decoded(module.weight, module.weight_scale_inv, module.quant, torch.bfloat16)
            assert torch.equal(values, dense.get_parameter(f"{path}.weight"))
            found += 1
        elif isinstance(module, packed.PackedExperts):
            for expert in range(len(module.down_proj)):
                codes, scales = module.gate_up_proj[expert], module.gate_up_proj_scale_inv[expert]
                values = packed.decoded(codes, scales, module.quant, torch.bfloat16, 2)
                assert torch.equal(values, dense.get_parameter(f"{path}.gate_up_proj")[expert])
                found += 1
    assert found > 50


def test_value_that_is_not_finite_ends_the_loading(checkpoint: Path) -> None:
    name = "layers.3.ffn.experts.1.w3.scale"

    def damage(tensors: dict[str, tiny.Tensor]) -> None:
        data = bytearray(tensors[name].data)  # type: ignore[arg-type]
        data[7] = 255
        tensors[name] = tensors[name]._replace(data=bytes(data))

    tiny.edit_shard(tiny.shard_of(checkpoint, name), damage)
    for how in ("dense", "packed"):
        with pytest.raises(NotFinite, match=r"layers\.3\.ffn\.experts\.1\.w3\.weight"):
            load(checkpoint, experts=how)  # type: ignore[arg-type]
