"""A release loaded by torch.distributed.checkpoint: every value, on any number of ranks, and nothing else read.

The oracle is the BF16 conversion's files, read by the safetensors package; other tests hold those to the definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gangs
import pytest
import reading
import tiny
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dsv4ckpt.dcp import ReleaseReader
from dsv4ckpt.errors import MissingScale, NotConform, NotFinite, Usage
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES

TRANSFORMERS = Namespace.TRANSFORMERS
EXPERT = "layers.0.ffn.experts.3.w2"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made("flash", target, namespace): a release's smallest sample, or a conversion of it; made once."""
    base, found = tmp_path_factory.mktemp("made"), dict[tuple[Any, ...], Path]()

    def directory(name: str, target: Target | None = None, space: Namespace = Namespace.DEEPSEEK) -> Path:
        key = (name, target, space)
        if key not in found:
            found[key] = where = base / "-".join(map(str, key))
            if target is None:
                tiny.make_sample(name, where)
            else:
                tiny.convert(directory(name), where, workers=1, target=target, namespace=space)
        return found[key]

    return directory


def loaded(reader: ReleaseReader, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All that a reader offers, in one process."""
    told = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.full(tuple(item.size), 7, dtype=dtype if dtype and item.properties.dtype.is_floating_point
                         else item.properties.dtype)
        for name, item in told.items()
    }  # fmt: skip
    dcp.load(state, storage_reader=reader)
    return state


def require_equal(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not reading.same_bits(state[name], wanted[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("release", sorted(RELEASES))
@pytest.mark.parametrize("space", list(Namespace))
def test_reader_gives_every_release_as_its_conversion(
    release: str, space: Namespace, made: Callable[..., Path]
) -> None:
    held = "fused" if space is TRANSFORMERS else "split"
    reader = ReleaseReader(made(release), names=space.value, experts=held)
    require_equal(loaded(reader), reading.values_of(made(release, Target.BF16, space)))
    assert reader.unread == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [Target.BF16, Target.FP8, Target.FP8_F32SCALE, Target.NVFP4, Target.MXFP4_CT]
)
def test_reader_gives_the_same_from_every_storage_format(target: Target, made: Callable[..., Path]) -> None:
    require_equal(
        loaded(ReleaseReader(made("flash", target))),
        reading.values_of(made("flash", Target.BF16, TRANSFORMERS)),
    )


def test_reader_of_transformers_names_gives_released_names(made: Callable[..., Path]) -> None:
    source = made("flash", Target.BF16, TRANSFORMERS)
    reader = ReleaseReader(source, names="deepseek", experts="split")
    require_equal(loaded(reader), reading.values_of(made("flash", Target.BF16)))


def test_reader_fills_wider_tensors_with_the_same_values(made: Callable[..., Path]) -> None:
    wanted = reading.values_of(made("flash", Target.BF16, TRANSFORMERS))
    state = loaded(ReleaseReader(made("flash")), torch.float32)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in state.values())
    assert [name for name in wanted if not torch.equal(state[name], wanted[name].to(state[name].dtype))] == []


def test_reader_tells_the_dtype_that_it_was_asked_for(made: Callable[..., Path]) -> None:
    told = ReleaseReader(made("flash"), dtype=torch.float32).read_metadata().state_dict_metadata
    assert told["model.embed_tokens.weight"].properties.dtype == torch.float32
    assert told["model.layers.0.mlp.gate.tid2eid"].properties.dtype == torch.int64


def test_reader_gives_codes_and_scales_as_stored(made: Callable[..., Path]) -> None:
    """Against the released bytes themselves, expert after expert: w1 above w3."""
    stored: dict[str, tiny.Tensor] = {}
    for file in sorted(made("flash").glob("*.safetensors")):
        stored |= tiny.read_shard(file)
    state = loaded(ReleaseReader(made("flash"), dtype="as-stored"))
    experts = "model.layers.0.mlp.experts"
    for leaf, suffix in (("weight", ""), ("scale", "_scale_inv")):
        for fused, inner in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            tensor = state[f"{experts}.{fused}{suffix}"]
            assert tensor.dtype == torch.uint8
            names = [f"layers.0.ffn.experts.{e}.{w}.{leaf}" for e in range(len(tensor)) for w in inner]
            assert bytes(tensor.view(-1).tolist()) == b"".join(bytes(stored[name].data) for name in names)  # type: ignore[arg-type]
    dense = "model.layers.0.self_attn.q_a_proj.weight"
    assert bytes(state[dense].view(-1).tolist()) == stored["layers.0.attn.wq_a.weight"].data
    assert state["model.norm.weight"].dtype == torch.bfloat16


def test_packed_model_takes_what_is_stored(made: Callable[..., Path]) -> None:
    import dsv4model

    model = dsv4model.load(made("flash"), experts="packed")
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(state, storage_reader=ReleaseReader(made("flash"), dtype="as-stored"))
    require_equal(state, wanted)


# ---- many ranks


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dimension"), [(1, 0), (2, 1), (3, 0), (4, 2)])
def test_ranks_get_their_rows(size: int, dimension: int, made: Callable[..., Path]) -> None:
    """Three ranks divide nothing evenly, and some of them hold nothing of a tensor."""
    source, converted = made("flash"), made("flash", Target.BF16, TRANSFORMERS)
    assert gangs.gang(size, reading.load_by_rows, source, converted, dimension) == [[]] * size


@pytest.mark.slow
def test_ranks_get_their_experts(made: Callable[..., Path]) -> None:
    source, converted = made("flash-base"), made("flash-base", Target.BF16, TRANSFORMERS)
    assert gangs.gang(4, reading.load_by_experts, source, converted) == [[]] * 4


@pytest.mark.slow
def test_sharded_model_computes_what_the_whole_one_does(made: Callable[..., Path]) -> None:
    import dsv4model

    model = dsv4model.load(made("flash"), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.arange(40)[None] % 500).logits
    whole = sum(parameter.numel() for parameter in model.parameters())
    (one, held), (other, held_too) = gangs.gang(2, reading.logits_of_a_sharded_model, made("flash"))
    assert torch.equal(one, other)
    assert torch.allclose(one, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert held + held_too == whole
    assert max(held, held_too) < 0.52 * whole


@pytest.mark.slow
def test_tensor_that_no_rank_asks_for_is_an_error_on_all(made: Callable[..., Path]) -> None:
    found = gangs.outcomes(2, reading.load_split, made("flash"), "lm_head.weight")
    for outcome in found:
        (error,) = gangs.rank_errors(outcome.error).values()
        assert isinstance(error, NotConform)
        assert "'lm_head.weight'" in str(error)
    assert gangs.gang(2, reading.load_split, made("flash"), "") == ["loaded"] * 2


# ---- what is refused


def test_left_out_tensors_are_refused_unless_they_were_named(made: Callable[..., Path]) -> None:
    reader = ReleaseReader(made("flash"), partial=("mtp.*",))
    told = reader.read_metadata().state_dict_metadata
    names = [name for name in told if not name.startswith("mtp.")]

    def state(chosen: list[str]) -> dict[str, Any]:
        return {name: torch.zeros(told[name].size, dtype=told[name].properties.dtype) for name in chosen}

    dcp.load(state(names), storage_reader=reader)
    assert reader.unread == tuple(sorted(told.keys() - set(names)))
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(state(names[1:]), storage_reader=reader)
    assert isinstance(caught.value.failures[0][0], NotConform)
    dcp.load(state(names[1:]), storage_reader=ReleaseReader(made("flash"), partial=True))


def test_key_that_the_checkpoint_lacks_is_named(made: Callable[..., Path]) -> None:
    state: dict[str, Any] = {"model.nothing.weight": torch.zeros(2)}
    with pytest.raises(dcp.api.CheckpointException, match=r"model\.nothing\.weight"):
        dcp.load(state, storage_reader=ReleaseReader(made("flash"), partial=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.int64])
def test_tensor_that_would_round_is_refused(dtype: torch.dtype, made: Callable[..., Path]) -> None:
    reader = ReleaseReader(made("flash"), partial=True)
    shape = tuple(reader.read_metadata().state_dict_metadata["lm_head.weight"].size)
    state: dict[str, Any] = {"lm_head.weight": torch.zeros(shape, dtype=dtype)}
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(state, storage_reader=reader)
    assert isinstance(caught.value.failures[0][0], Usage)


def test_scale_that_is_nan_is_refused_when_it_is_read(made: Callable[..., Path], tmp_path: Path) -> None:
    broken = tiny.copy_of(made("flash"), tmp_path / "broken")

    def damage(tensors: dict[str, tiny.Tensor]) -> None:
        old = tensors[f"{EXPERT}.scale"]
        tensors[f"{EXPERT}.scale"] = old._replace(data=b"\xff" + bytes(old.data)[1:])  # type: ignore[arg-type]

    tiny.edit_shard(tiny.shard_of(broken, f"{EXPERT}.scale"), damage)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        loaded(ReleaseReader(broken))
    error = caught.value.failures[0][0]
    assert isinstance(error, NotFinite)
    assert f"{EXPERT}.weight" in str(error)


def test_checkpoint_that_lacks_a_tensor_is_refused_before_anything_is_read(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tiny.copy_of(made("flash"), tmp_path / "broken")
    tiny.edit_shard(tiny.shard_of(broken, f"{EXPERT}.scale"), lambda tensors: tensors.pop(f"{EXPERT}.scale"))
    tiny.edit_weight_map(broken, lambda weights: weights.pop(f"{EXPERT}.scale"))
    with pytest.raises(MissingScale):
        ReleaseReader(broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": "deepseek"},
        {"names": "megatron"},
        {"experts": "stacked"},
        {"dtype": torch.float16},
        {"dtype": "packed"},
        {"num_threads": 0},
    ],
)
def test_wrong_wish_is_refused(wrong: dict[str, Any], made: Callable[..., Path]) -> None:
    with pytest.raises(Usage):
        ReleaseReader(made("flash"), **wrong)


def test_two_level_scales_are_not_given_as_stored(made: Callable[..., Path]) -> None:
    with pytest.raises(Usage):
        ReleaseReader(made("flash", Target.NVFP4), dtype="as-stored")


def test_reader_keeps_to_its_checkpoint(made: Callable[..., Path]) -> None:
    reader = ReleaseReader(made("flash"))
    reader.reset(str(made("flash")))
    with pytest.raises(Usage):
        reader.reset("elsewhere")


# ---- what is read


@pytest.mark.parametrize("count", [1, 4])
def test_rank_reads_no_other_experts(
    count: int, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a fused tensor: codes and scales of the experts asked for, to the byte."""
    from dsv4ckpt.source import Reader

    read: list[tuple[str, int]] = []
    plain = Reader.read

    def counting(self: Reader, name: str, offset: int, size: int, landing: Any) -> memoryview:
        read.append((name, size))
        return plain(self, name, offset, size, landing)

    monkeypatch.setattr(Reader, "read", counting)
    reader = ReleaseReader(made("flash"), partial=True, num_threads=1)
    name = "model.layers.1.mlp.experts.down_proj"
    item = reader.read_metadata().state_dict_metadata[name]
    whole = torch.zeros(item.size, dtype=torch.bfloat16)
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

    class Planner:
        def resolve_tensor(self, _: ReadItem) -> Tensor:
            return whole[2 : 2 + count]

        def commit_tensor(self, _: ReadItem, __: Tensor) -> None: ...

    zero = torch.Size([0, 0, 0])
    box = ReadItem(LoadItemType.TENSOR, MetadataIndex(name, zero), zero, MetadataIndex(name, zero),
                   torch.Size([2, 0, 0]), torch.Size([count, *item.size[1:]]))  # fmt: skip
    reader.read_data(LoadPlan([box]), Planner()).wait()  # type: ignore[arg-type]
    experts = range(2, 2 + count)
    assert {name for name, _ in read} == {
        f"layers.1.ffn.experts.{expert}.w2.{leaf}" for expert in experts for leaf in ("weight", "scale")
    }
    rows, cols = item.size[1:]
    assert sum(size for _, size in read) == count * (rows * cols // 2 + rows * cols // 32)
    assert bool(whole[2 : 2 + count].any()) and not bool(whole[:2].any())
