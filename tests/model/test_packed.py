"""Packed matrices: the dense model's outputs and gradients, bit for bit, in the memory of the checkpoint."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_model import tiny_document
from torch import Tensor
from torch.nn.functional import linear

from dsv4ckpt import codec, encode, formats, inventory, names, release
from dsv4ckpt import config as configs
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE, FP8_TILE_F32, QUANTS, Block, Quant
from dsv4model import loading, moe, packed
from dsv4model.config import Config
from dsv4model.layers import GroupedLinear, Linear
from dsv4model.model import Model, dtype_of
from dsv4model.simulate import Simulation

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
SMALL_TILE = Quant("F8_E4M3", 1, "F8_E8M0", Block(16, 16))  # several in a small matrix, and some cut off
FORMATS = [FP4_EXPERT, FP8_TILE, FP8_TILE_F32, SMALL_TILE]


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def codes_of(rows: int, cols: int, quant: Quant) -> tuple[Tensor, Tensor]:
    """Codes and scales of a random matrix with a wide range of magnitudes."""
    values = (torch.randn(rows, cols) * torch.exp(torch.randn(rows, 1))).to(torch.bfloat16)
    if quant.codes_per_element == 2:
        scales = encode.fp4_fresh_scale(values, quant.block)
        return encode.encode_fp4(values, scales, quant.block), scales
    fresh = encode.fp8_fresh_scale_f32 if quant.scale == "F32" else encode.fp8_fresh_scale
    scales = fresh(values, quant.block)
    return encode.encode_fp8(values, scales, quant.block), scales


def filled_pair(dense: Linear, quant: Quant, dtype: torch.dtype) -> tuple[Linear, packed.PackedLinear]:
    """A dense layer and a packed one of the same values."""
    layer = packed._packed(dense, quant)
    assert isinstance(layer, packed.PackedLinear)
    codes, scales = codes_of(*dense.weight.shape, quant)
    layer.weight, layer.weight_scale_inv = codes, scales
    dense.weight = torch.nn.Parameter(packed.decoded(codes, scales, quant, dtype))
    return dense, layer


def both(dense: Any, layer: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient of the input) of each, for one incoming gradient."""
    found, grad = [], None
    for module in (dense, layer):
        mine = x.detach().clone().requires_grad_()
        out = module(mine)
        grad = torch.randn_like(out) if grad is None else grad
        out.backward(grad)
        assert mine.grad is not None
        found.append((out.detach(), mine.grad))
    return found


# ---- decoding


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("shape", [(32, 64), (50, 70), (1, 34)])
def test_decoding_agrees_with_its_slow_twin_bit_for_bit(quant: Quant, shape: tuple[int, int]) -> None:
    codes, scales = codes_of(*shape, quant)
    fast = packed.decoded(codes, scales, quant, torch.bfloat16)
    assert fast.shape == shape
    assert torch.equal(fast.view(torch.int16), packed.decoded_plain(codes, scales, quant).view(torch.int16))
    for dtype in DTYPES[1:]:
        assert torch.equal(packed.decoded(codes, scales, quant, dtype), fast.to(dtype))


def test_slow_twin_decodes_every_code_under_every_scale_as_codec_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(255, 256).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[:, None]  # 255 is NaN, which nobody loads
    for quant in (Quant("I8", 2, "F8_E8M0", Block(1, 512)), Quant("F8_E4M3", 1, "F8_E8M0", Block(1, 256))):
        wanted = (codec.decode_fp4 if quant.codes_per_element == 2 else codec.decode_fp8)(
            codes, scales, quant.block
        )
        found = packed.decoded_plain(codes, scales, quant)
        assert torch.equal(found.view(torch.int16), wanted.values.view(torch.int16))


def test_decoding_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = codes_of(48, 64, SMALL_TILE)
    whole = packed.decoded(codes, scales, SMALL_TILE, torch.float32)
    monkeypatch.setattr("dsv4ckpt.roundtrip._CHUNK_VALUES", 1)
    assert torch.equal(packed.decoded(codes, scales, SMALL_TILE, torch.float32), whole)


def test_matrices_one_below_the_other_have_tiles_of_their_own() -> None:
    """An expert's gate and up: 24 rows are one and a half tiles."""
    first, second = codes_of(24, 32, SMALL_TILE), codes_of(24, 32, SMALL_TILE)
    codes, scales = (torch.cat(pair) for pair in zip(first, second, strict=True))
    halves = [packed.decoded(*half, SMALL_TILE, torch.float32) for half in (first, second)]
    assert torch.equal(packed.decoded(codes, scales, SMALL_TILE, torch.float32, 2), torch.cat(halves))


def test_scales_that_a_cast_of_the_model_rounded_are_refused() -> None:
    codes, scales = codes_of(32, 32, FP8_TILE_F32)
    with pytest.raises(Usage, match="cast"):
        packed.decoded(codes, scales.to(torch.bfloat16), FP8_TILE_F32, torch.bfloat16)


# ---- linear layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("lead", [(1,), (2, 7), (33,)])
def test_packed_linear_has_the_outputs_and_gradients_of_the_dense_one(
    quant: Quant, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    dense, layer = filled_pair(Linear(64, 48), quant, dtype)
    (out, grad), (mine, my_grad) = both(dense, layer, torch.randn(*lead, 64, dtype=dtype))
    assert mine.dtype == dtype and torch.equal(mine, out)
    assert torch.equal(my_grad, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_grouped_linear_has_the_outputs_and_gradients_of_the_dense_one(dtype: torch.dtype) -> None:
    dense, layer = filled_pair(GroupedLinear(64, 48), SMALL_TILE, dtype)
    assert isinstance(layer, GroupedLinear)
    (out, grad), (mine, my_grad) = both(dense, layer, torch.randn(2, 5, 3, 64, dtype=dtype))
    assert mine.shape == (2, 5, 3, 16) and torch.equal(mine, out)
    assert torch.equal(my_grad, grad)


def test_packed_linear_prepares_its_inputs_as_the_dense_one_does() -> None:
    prepare = Simulation(activations_fp8=True).prepare
    dense, layer = filled_pair(Linear(64, 48, prepare), FP8_TILE, torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), dense(x))
    assert not torch.equal(layer(x), linear(x, dense.weight))


def test_gradient_of_the_input_is_that_of_numerical_differentiation() -> None:
    codes, scales = codes_of(12, 16, FP4_EXPERT)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packed.product(x, codes, scales, FP4_EXPERT), (x,))


def test_nothing_but_codes_and_scales_is_kept_for_the_backward_pass() -> None:
    _, layer = filled_pair(Linear(64, 48), FP8_TILE, torch.float32)
    kept: list[Tensor] = []
    x = torch.randn(3, 64, requires_grad=True) + 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    addresses = [layer.weight.data_ptr(), layer.weight_scale_inv.data_ptr()]
    assert [tensor.data_ptr() for tensor in kept] == addresses
    known = weakref.ref(x)
    del x
    assert out.requires_grad and known() is None


def test_codes_are_buffers_under_the_names_of_the_transformers_namespace() -> None:
    _, layer = filled_pair(Linear(64, 48), FP8_TILE, torch.float32)
    assert [*layer.state_dict()] == ["weight", "weight_scale_inv"]
    assert not [*layer.parameters()]
    assert layer.to(torch.bfloat16).weight.dtype == torch.uint8
    assert layer.weight_scale_inv.dtype == torch.uint8


# ---- experts


EXPERTS, HIDDEN, WIDTH = 5, 64, 32


def expert_pair(quant: Quant, dtype: torch.dtype) -> tuple[moe.Experts, packed.PackedExperts]:
    document = tiny_document(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS)
    dense = moe.Experts(Config.read(document), Simulation())
    layer = packed.PackedExperts(dense, quant)
    for name, parts, shape in (("gate_up_proj", 2, (WIDTH, HIDDEN)), ("down_proj", 1, (HIDDEN, WIDTH))):
        made = [[codes_of(*shape, quant) for _ in range(parts)] for _ in range(EXPERTS)]
        for suffix, side in (("", 0), (packed.SCALES, 1)):
            stacked = torch.stack([torch.cat([part[side] for part in expert]) for expert in made])
            assert getattr(layer, name + suffix).shape == stacked.shape
            setattr(layer, name + suffix, stacked)
        values = [torch.cat([packed.decoded(*part, quant, dtype) for part in expert]) for expert in made]
        setattr(dense, name, torch.nn.Parameter(torch.stack(values)))
    return dense, layer


def routing(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights; nobody goes to expert 3."""
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(tokens)])
    ids = torch.where(ids == 3, 4, ids)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(tokens, HIDDEN, dtype=dtype), ids, torch.rand(tokens, 2, dtype=wide)


def run(module: torch.nn.Module, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of x, gradient of the routing weights."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = module(x, ids, weights)
    out.backward(grad)
    assert x.grad is not None and weights.grad is not None
    return out.detach(), x.grad, weights.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", [FP4_EXPERT, FP8_TILE, FP8_TILE_F32])
def test_packed_experts_have_the_outputs_and_gradients_of_dense_ones(
    quant: Quant, dtype: torch.dtype
) -> None:
    """Bit for bit, for both multiply each expert's rows at once and add a token's experts in one order.

    float64 is summed in another order (the loop's): K = 2 terms and the two products into x's gradient, so 4 ulp.
    """
    dense, layer = expert_pair(quant, dtype)
    x, ids, weights = routing(17, dtype)
    grad = torch.randn(17, HIDDEN, dtype=weights.dtype)
    wanted, found = run(dense, x, ids, weights, grad), run(layer, x, ids, weights, grad)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        if dtype == torch.float64:
            assert (mine - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * theirs.abs().max()
        else:
            assert torch.equal(mine, theirs)


def test_experts_without_tokens_are_not_decoded_and_the_others_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, layer = expert_pair(FP4_EXPERT, torch.float32)
    x, ids, weights = routing(17, torch.float32)
    decode, seen = packed.decoded, []

    def counted(codes: Tensor, *arguments: Any) -> Tensor:
        seen.append((codes.shape, codes.data_ptr()))
        return decode(codes, *arguments)

    monkeypatch.setattr(packed, "decoded", counted)
    with torch.no_grad():
        layer(x, ids, weights)
    num_forward = len(seen)
    run(layer, x, ids, weights, torch.randn(17, HIDDEN))
    busy = ids.unique().tolist()
    assert 3 not in busy
    gates = [layer.gate_up_proj[expert].data_ptr() for expert in busy]
    downs = [layer.down_proj[expert].data_ptr() for expert in busy]
    assert {address for _, address in seen} == {*gates, *downs}
    assert [address for _, address in seen[:num_forward]] == gates + downs
    assert all(len(shape) == 2 for shape, _ in seen)


def test_packed_experts_take_no_tokens() -> None:
    _, layer = expert_pair(FP4_EXPERT, torch.bfloat16)
    empty = torch.empty(0, HIDDEN, dtype=torch.bfloat16)
    assert layer(empty, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).shape == (0, HIDDEN)


def test_memory_kept_for_backward_does_not_hold_values_of_experts() -> None:
    _, layer = expert_pair(FP4_EXPERT, torch.float32)
    kept: list[Tensor] = []
    x, ids, weights = routing(2, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_(), ids, weights)
    assert not [t for t in kept if t.is_floating_point() and t.numel() >= WIDTH * HIDDEN]


def test_experts_as_fp8_under_a_simulation_of_fp4_are_refused() -> None:
    dense = moe.Experts(Config.read(tiny_document()), Simulation(experts_fp4=True))
    packed.PackedExperts(dense, FP4_EXPERT)  # these are on that grid
    with pytest.raises(Usage, match="experts_fp4"):
        packed.PackedExperts(dense, FP8_TILE)


# ---- whole models


@pytest.fixture(scope="module")
def sample_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = tiny.make_sample(name, tmp_path_factory.mktemp("packed") / name)
        return made[name]

    return directory


def logits_and_gradient(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    out = model(ids)
    assert out.mtp_logits is not None
    (out.logits.sin().sum() + out.mtp_logits.sin().sum()).backward()
    grad = model.model.embed_tokens.weight.grad
    assert grad is not None
    return out.logits.detach(), grad


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", ["flash", "flash-base"])
def test_packed_model_has_the_logits_and_gradients_of_the_dense_one(
    name: str, dtype: torch.dtype, sample_of: Callable[[str], Path]
) -> None:
    ids = torch.randint(0, 512, (2, 24))
    dense = loading.load(sample_of(name), dtype)
    packed_one = loading.load(sample_of(name), dtype, "packed")
    for mine, theirs in zip(
        logits_and_gradient(packed_one, ids), logits_and_gradient(dense, ids), strict=True
    ):
        assert theirs.abs().max() > 0
        assert torch.equal(mine, theirs)
    left = {
        name for name, parameter in packed_one.named_parameters() if "experts" in name or "q_a_proj" in name
    }
    assert not left


def resident_bytes(model: Model, dtype: torch.dtype) -> int:
    total = 0
    for name, tensor in model.state_dict().items():
        held = (
            dtype_of(name, dtype)
            if tensor.dtype == torch.float32 and packed.SCALES not in name
            else tensor.dtype
        )
        total += tensor.numel() * held.itemsize
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "pro", "flash-base"])
def test_packed_model_of_a_release_takes_the_memory_of_its_files(name: str) -> None:
    """From shapes alone. Base's copies of embed and head are no part of the model."""
    row, document = release.RELEASES[name], release.shipped_config(name)
    logicals = [
        logical
        for logical in inventory.logical_tensors(configs.read(document), row.family)
        if logical.name not in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")
    ]
    layout = inventory.lay_out(logicals, row.family.table, row.storage, names.Namespace.TRANSFORMERS)
    on_disk = sum(formats.stored_bytes(stored.dtype, stored.shape) for stored in layout.stored.values())
    with torch.device("meta"):
        model = Model(Config.read(document))
        packed.pack_modules(model, loading.quantized_modules(layout))
    assert abs(resident_bytes(model, torch.bfloat16) / on_disk - 1) < 0.001


def test_packed_sample_takes_the_memory_of_its_files(sample_of: Callable[[str], Path]) -> None:
    model = loading.load(sample_of("flash"), experts="packed")
    held = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    tensors = itertools.chain.from_iterable(
        tiny.read_shard(shard).values() for shard in sample_of("flash").glob("*.safetensors")
    )
    assert abs(held / sum(tensor.size for tensor in tensors) - 1) < 0.03


def test_packed_buffers_are_the_bytes_of_the_files(sample_of: Callable[[str], Path]) -> None:
    state = loading.load(sample_of("flash"), experts="packed").state_dict()
    name = "layers.1.ffn.experts.3.w3.weight"
    for stored, found in (
        (name, state["model.layers.1.mlp.experts.gate_up_proj"][3, WIDTH * 4 :]),
        (
            name.replace("weight", "scale"),
            state["model.layers.1.mlp.experts.gate_up_proj_scale_inv"][3, WIDTH * 4 :],
        ),
    ):
        wanted = tiny.read_shard(tiny.shard_of(sample_of("flash"), stored))[stored]
        assert isinstance(wanted.data, bytes)
        assert (found.numpy() == np.frombuffer(wanted.data, np.uint8).reshape(wanted.shape)).all()


def test_every_matrix_that_a_release_quantizes_is_packed(sample_of: Callable[[str], Path]) -> None:
    model = loading.load(sample_of("flash"), experts="packed")
    left = [name for name, parameter in model.named_parameters() if name.endswith("_proj.weight")]
    kept = (
        "compressor.kv_proj",
        "compressor.gate_proj",
        "indexer.kv_proj",
        "indexer.gate_proj",
        "weights_proj",
    )
    assert left and all(name.removesuffix(".weight").endswith(kept) for name in left)
    assert {type(module) for name, module in model.named_modules() if name.endswith("experts")} == {
        packed.PackedExperts,
        moe.SharedExpert,
    }
    assert set(QUANTS[formats.Storage.FP4_FP8].values()) == {
        module.quant
        for module in model.modules()
        if isinstance(module, packed.PackedLinear | packed.PackedExperts)
    }
