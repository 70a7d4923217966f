"""Adapters on disk: what PEFT reads and writes, bit for bit, and nothing that is not understood."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from random_model import distance, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4model
from dsv4ckpt.errors import (
    BadConfig,
    BadHeader,
    Dsv4Error,
    ForeignOutput,
    MissingFile,
    NotConform,
    NotFinite,
    UnsafePath,
    Usage,
)
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4model import adapters, peft
from dsv4model.model import Model
from dsv4model.recipe import LoraPart

pytestmark = pytest.mark.usefixtures("one_thread")

PART = LoraPart(rank=4, alpha=6.0)
BASE = "somebody/DeepSeek-V4-Flash"
ATTENTION = "base_model.model.model.layers.0.self_attn."
EXPERTS = "base_model.model.model.layers.0.mlp.experts."


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned(model: Model, part: LoraPart = PART) -> Model:
    random = seeded(1)
    for name, parameter in adapters.attach(model, part, seeded()).items():
        if name.endswith("lora_B"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    return model


@pytest.fixture(scope="module")
def written(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model with adapters, and where they are written. Nobody writes into either: take a copy."""
    model, path = (
        learned(dsv4model.load(str(smallest), torch.float32)),
        tmp_path_factory.mktemp("peft") / "it",
    )
    peft.save_adapters(model, path, BASE)
    return model, path


@pytest.fixture
def mine(written: tuple[Model, Path], tmp_path: Path) -> Path:
    """Adapters of the test's own, to be broken."""
    return tiny.copy_of(written[1], tmp_path / "adapters")


@pytest.fixture
def bare(smallest: Path) -> Model:
    return dsv4model.load(str(smallest), torch.float32, "packed")


def same_adapters(a: Model, b: Model) -> bool:
    found, wanted = (adapters.deltas(model) for model in (a, b))
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].lora_A, wanted[name].lora_A)
        and torch.equal(found[name].lora_B, wanted[name].lora_B)
        and found[name].scale == wanted[name].scale
        for name in wanted
    )


# ---- there and back


def test_what_was_written_is_read_into_a_packed_model_bit_for_bit(
    written: tuple[Model, Path], bare: Model
) -> None:
    parameters = peft.load_adapters(bare, written[1])
    assert same_adapters(bare, written[0])
    assert {name for name, one in bare.named_parameters() if one.requires_grad} == parameters.keys()
    assert parameters.keys() == {name for name, one in written[0].named_parameters() if one.requires_grad}
    ids = random_ids(1, 9)
    assert torch.equal(bare(ids).logits, written[0](ids).logits)


def test_adapters_of_one_model_are_the_same_bytes_each_time(
    written: tuple[Model, Path], tmp_path: Path
) -> None:
    peft.save_adapters(written[0], tmp_path / "again", BASE)
    for file in written[1].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert len([*(tmp_path / "again").iterdir()]) == 2


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_experts_of_which_one_matrix_is_adapted_come_back(leaf: str, smallest: Path, tmp_path: Path) -> None:
    """The key does not tell which one it is; its shape does."""
    model = learned(dsv4model.load(str(smallest), torch.float32), LoraPart(targets=(f"*.experts.{leaf}",)))
    peft.save_adapters(model, tmp_path / "one", BASE)
    assert EXPERTS + "lora_A.weight" in load_file(tmp_path / "one" / peft.TENSORS_NAME)
    again = dsv4model.load(str(smallest), torch.float32)
    peft.load_adapters(again, tmp_path / "one")
    assert same_adapters(again, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_adapters_of_others_become_float32(dtype: torch.dtype, mine: Path, bare: Model) -> None:
    tensors = {name: value.to(dtype) for name, value in load_file(mine / peft.TENSORS_NAME).items()}
    rewrite(mine, tensors)
    for name, parameter in peft.load_adapters(bare, mine).items():
        assert parameter.dtype == torch.float32, name
    delta = adapters.deltas(bare)["model.layers.0.self_attn.kv_proj.weight"]
    assert torch.equal(delta.lora_A, tensors[ATTENTION + "kv_proj.lora_A.weight"].float())


# ---- the format


def test_tensors_have_the_names_and_shapes_of_pefts_layers(written: tuple[Model, Path]) -> None:
    tensors = load_file(written[1] / peft.TENSORS_NAME)
    state = written[0].state_dict()
    experts, wide, hidden = state["model.layers.0.mlp.experts.gate_up_proj"].shape
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert shapes[EXPERTS + "base_layer.lora_A.weight"] == (4 * experts, hidden)
    assert shapes[EXPERTS + "base_layer.lora_B.weight"] == (wide, 4 * experts)
    assert shapes[EXPERTS + "lora_A.weight"] == (4 * experts, wide // 2)
    assert shapes[EXPERTS + "lora_B.weight"] == (hidden, 4 * experts)
    rows, _ = state["model.layers.0.self_attn.o_a_proj.weight"].shape
    assert shapes[ATTENTION + "o_a_proj.lora_B.weight"] == (rows, 4)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * len(adapters.deltas(written[0]))


def test_experts_are_laid_out_as_pefts_formula_reads_them(written: tuple[Model, Path]) -> None:
    """lora.ParamWrapper.get_delta_weight: einsum "o r e, e r i -> e o i"."""
    tensors = load_file(written[1] / peft.TENSORS_NAME)
    for name, inner in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        lora_A, lora_B = (tensors[f"{EXPERTS}{inner}lora_{side}.weight"].double() for side in "AB")
        delta = adapters.deltas(written[0])[f"model.layers.0.mlp.experts.{name}"]
        experts = len(delta.lora_A)
        lora_A, lora_B = (
            lora_A.reshape(experts, -1, lora_A.shape[-1]),
            lora_B.reshape(len(lora_B), -1, experts),
        )
        whole = 1.5 * torch.einsum("o r e, e r i -> e o i", lora_B, lora_A).flatten(0, 1)
        assert distance(delta.rows(0, len(whole)), whole) < 1e-14


def test_config_names_every_adapted_weight_once(written: tuple[Model, Path]) -> None:
    config = json.loads((written[1] / peft.CONFIG_NAME).read_bytes())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert type(config["lora_alpha"]) is int and config["base_model_name_or_path"] == BASE
    parameters = config["target_parameters"]
    assert {name.split(".")[-2] for name in parameters} == {"experts", "o_a_proj"}
    named = {*parameters, *(f"{module}.weight" for module in config["target_modules"])}
    assert named == adapters.deltas(written[0]).keys()
    assert len(named) == len(parameters) + len(config["target_modules"])


@pytest.mark.slow
def test_peft_computes_with_our_adapters_what_we_do_and_we_read_what_it_writes(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    """In float32 of another model; MTP is no part of it, so its adapters stay behind."""
    package = pytest.importorskip("peft", reason="PEFT is not installed")
    from transformers import DeepseekV4ForCausalLM

    source = made("flash", Target.BF16, Namespace.TRANSFORMERS)
    model, ids = learned(dsv4model.load(str(source), torch.float32)), random_ids(1, 60)
    peft.save_adapters(model, tmp_path / "ours", str(source))
    base = DeepseekV4ForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    without = base.eval()(ids).logits
    theirs = package.PeftModel.from_pretrained(base, tmp_path / "ours")
    logits, wanted = model(ids).logits, theirs(ids).logits
    assert distance(logits, wanted) < 1e-5  # measured: 1.4e-6
    assert distance(without, wanted) > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    again = dsv4model.load(str(source), torch.float32)
    peft.load_adapters(again, tmp_path / "theirs")
    assert torch.equal(again(ids).logits, logits)


# ---- refusals


def test_nothing_is_written_over(written: tuple[Model, Path], tmp_path: Path) -> None:
    for path in (tmp_path, written[1] / peft.CONFIG_NAME):
        with pytest.raises(ForeignOutput, match="new directory"):
            peft.save_adapters(written[0], path, BASE)
    assert [*tmp_path.iterdir()] == []


def test_model_without_adapters_has_none_to_save(bare: Model, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="no adapters"):
        peft.save_adapters(bare, tmp_path / "none", BASE)
    assert [*tmp_path.iterdir()] == []


def test_second_set_of_adapters_is_not_loaded(written: tuple[Model, Path]) -> None:
    with pytest.raises(Usage, match="already"):
        peft.load_adapters(written[0], written[1])


def refused(model: Model, path: Path, kind: type[Dsv4Error], message: str) -> None:
    """The error, and the model as it was."""
    learns = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(kind, match=message):
        peft.load_adapters(model, path)
    assert not adapters.attached(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == learns


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    (path / peft.TENSORS_NAME).unlink()
    save_file(tensors, path / peft.TENSORS_NAME)


@pytest.mark.parametrize("name", [peft.CONFIG_NAME, peft.TENSORS_NAME])
def test_missing_or_linked_file_is_refused(name: str, mine: Path, bare: Model, tmp_path: Path) -> None:
    (mine / name).rename(tmp_path / "elsewhere")
    refused(bare, mine, MissingFile, "no adapters here")
    (mine / name).symlink_to(tmp_path / "elsewhere")
    refused(bare, mine, UnsafePath, "outside")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", "another method"),
        ("peft_type", None, "another method"),
        ("r", 0, "valid r"),
        ("r", True, "valid r"),
        ("r", 4.0, "valid r"),
        ("r", 10**30, "valid r"),
        ("lora_alpha", 0, "valid lora_alpha"),
        ("lora_alpha", -6, "valid lora_alpha"),
        ("lora_alpha", "6", "valid lora_alpha"),
        ("lora_alpha", None, "valid lora_alpha"),
        ("bias", "all", "biases"),
        ("use_rslora", True, "use_rslora"),
        ("use_dora", True, "use_dora"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("rank_pattern", {"kv_proj": 8}, "rank_pattern"),
        ("alpha_pattern", {"kv_proj": 8}, "alpha_pattern"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("layer_replication", [[0, 1]], "layer_replication"),
        ("trainable_token_indices", [1], "trainable_token_indices"),
        ("init_lora_weights", "pissa", "changes the base"),
        ("init_lora_weights", ["olora"], "changes the base"),
        ("something_new", 1, "something_new"),
    ],
)
def test_config_that_asks_for_more_than_lora_is_refused(
    key: str, value: Any, message: str, mine: Path, bare: Model
) -> None:
    tiny.edit_json(mine / peft.CONFIG_NAME, lambda config: config.update({key: value}))
    refused(bare, mine, BadConfig, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed"),
        ("[]", "no JSON object"),
        ('{"r": 4, "r": 4}', "twice"),
        ("[" * 2000, "malformed"),
        ('{"lora_alpha": NaN}', "malformed"),
        ('{"r": ' + "9" * 700 + "}", "malformed"),
        (" " * (1024 * 1024 + 1), "too large"),
    ],
)
def test_malformed_config_is_refused(text: str, message: str, mine: Path, bare: Model) -> None:
    tiny.replace(mine / peft.CONFIG_NAME, text)
    refused(bare, mine, BadConfig, message)


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


KV_A, KV_B = ATTENTION + "kv_proj.lora_A.weight", ATTENTION + "kv_proj.lora_B.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[Dsv4Error], str]] = {
    "no tensors": (lambda t: t.clear(), NotConform, "no tensors"),
    "A alone": (lambda t: t.pop(KV_B), NotConform, "does not fit"),
    "B alone": (lambda t: t.pop(KV_A), NotConform, "does not fit"),
    "another rank": (lambda t: t.update({KV_A: t[KV_A][:2].clone()}), NotConform, "does not fit"),
    "transposed": (lambda t: t.update({KV_A: t[KV_A].T.contiguous()}), NotConform, "does not fit"),
    "three dimensions": (lambda t: t.update({KV_A: t[KV_A][None]}), NotConform, "does not fit"),
    "integers": (lambda t: t.update({KV_A: t[KV_A].int()}), NotConform, "dtype"),
    "too wide": (lambda t: t.update({KV_A: t[KV_A].double()}), NotConform, "dtype"),
    "not finite": (lambda t: t[KV_B].__setitem__((3, 1), float("nan")), NotFinite, "kv_proj.lora_B"),
    "infinite": (lambda t: t[KV_A].__setitem__((3, 1), float("inf")), NotFinite, "kv_proj.lora_A"),
    "no prefix": (_renamed(KV_A, KV_A.removeprefix("base_model.model.")), NotConform, "no tensor of an adapter"),
    "a bias": (_renamed(KV_A, KV_A.replace("weight", "bias")), NotConform, "no tensor of an adapter"),
    "a magnitude": (
        lambda t: t.update({ATTENTION + "kv_proj.lora_magnitude_vector.weight": torch.ones(4)}),
        NotConform,
        "no tensor of an adapter",
    ),
    "another layer": (
        lambda t: [_renamed(key, key.replace("layers.0", "layers.7"))(t) for key in (KV_A, KV_B)],
        NotConform,
        "no weight for",
    ),
    "the head": (
        lambda t: [_renamed(key, key.replace(ATTENTION + "kv_proj", "base_model.model.lm_head"))(t)
                   for key in (KV_A, KV_B)],
        NotConform,
        "no weight for",
    ),
    "a norm": (
        lambda t: [_renamed(key, key.replace("kv_proj", "kv_norm"))(t) for key in (KV_A, KV_B)],
        NotConform,
        "no weight for",
    ),
    "two for one weight": (
        lambda t: t.update({key.replace("experts.lora", "experts.base_layer.lora"): t[key].clone()
                            for key in (EXPERTS + "lora_A.weight", EXPERTS + "lora_B.weight")}),
        NotConform,
        "two adapters",
    ),
    "wrapped twice": (
        lambda t: [_renamed(key, key.replace("kv_proj", "kv_proj.base_layer"))(t) for key in (KV_A, KV_B)],
        NotConform,
        "no weight for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_the_model_are_refused(damage: str, mine: Path, bare: Model) -> None:
    edit, kind, message = DAMAGE[damage]
    tensors = load_file(mine / peft.TENSORS_NAME)
    edit(tensors)
    rewrite(mine, tensors)
    refused(bare, mine, kind, message)


def test_file_that_is_no_safetensors_is_refused(mine: Path, bare: Model) -> None:
    data = (mine / peft.TENSORS_NAME).read_bytes()
    for broken, message in (
        (data[:-1], "truncated"),
        (data + b"\0", "bytes follow"),
        (b"\x80\x02}q\0.", "shorter"),
    ):
        tiny.replace(mine / peft.TENSORS_NAME, broken)
        refused(bare, mine, BadHeader, message)
