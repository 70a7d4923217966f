"""Adapters: the outputs and gradients of the dense model whose weights are W + scale B A, whatever holds W."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import distance, random_ids, random_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dsv4model
from dsv4ckpt import release
from dsv4ckpt.errors import Usage
from dsv4model import adapters, learning, moe
from dsv4model.adapters import ExpertAdapter, LinearAdapter
from dsv4model.config import Config
from dsv4model.layers import GroupedLinear, Linear, WideLinear
from dsv4model.model import Model
from dsv4model.recipe import LoraPart, OptimizerPart
from dsv4model.simulate import Simulation

pytestmark = pytest.mark.usefixtures("one_thread")

PART = LoraPart(rank=4, alpha=6.0)
EVERYWHERE = LoraPart(rank=4, alpha=6.0, targets=("*_proj",))
EXACT = 1e-12  # sums of hundreds of products in float64, in another order; measured: 2e-14


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted(model: Model, part: LoraPart = PART) -> dict[str, nn.Parameter]:
    """Adapters that have learned something: B is random."""
    parameters = adapters.attach(model, part, seeded())
    random = seeded(1)
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    return parameters


def merged(model: Model) -> Model:
    """The dense model of W + scale B A, all of whose parameters learn."""
    found = copy.deepcopy(model)
    products = {
        place.name: adapter.alpha / PART.rank * (adapter.lora_B @ adapter.lora_A)
        for place, adapter in adapters.attached(found).items()
    }
    for place in adapters.attached(found):
        setattr(place.module, place.slot, None)
    parameters = dict(found.named_parameters())
    for name, product in products.items():
        parameters[name].data = parameters[name].data + product.detach()
    found.requires_grad_(True)
    return found


def learn(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits, after a backward pass."""
    out = model(ids)
    assert out.mtp_logits is not None
    (out.logits.sin().sum() + out.mtp_logits.sin().sum()).backward()
    return out.logits.detach(), out.mtp_logits.detach()


# ---- who gets one


@pytest.mark.parametrize("experts", ["dense", "packed"])
def test_default_targets_are_attention_shared_and_routed_experts(flash: Path, experts: Any) -> None:
    model = dsv4model.load(str(flash), torch.bfloat16, experts)
    parameters = adapters.attach(model, LoraPart(), seeded())
    found = {place.name for place in adapters.attached(model)}
    kinds = {re.sub(r"^(model\.layers|mtp)\.\d+\.", "", name) for name in found}
    assert kinds == {
        *(f"self_attn.{leaf}_proj.weight" for leaf in ("q_a", "q_b", "kv", "o_a", "o_b")),
        *(f"self_attn.compressor.{leaf}_proj.weight" for leaf in ("kv", "gate")),
        *(f"mlp.shared_experts.{leaf}_proj.weight" for leaf in ("gate", "up", "down")),
        *(f"mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")),
    }
    assert any(name.startswith("mtp.0.") for name in found)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert len(parameters) == 2 * len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in release.RELEASES.items() if not row.family.vision])
def test_default_targets_fit_every_release(name: str) -> None:
    document = release.shipped_config(name)
    if document.get("model_type") != "deepseek_v4":
        pytest.skip("dsv4model knows V4")
    with torch.device("meta"):
        model = Model(Config.read(document))
    parameters = adapters.attach(model, LoraPart(), seeded())
    assert all(parameter.is_meta for parameter in parameters.values())
    per_block = 5 + 3 + 2
    pooling = sum(ratio > 0 for ratio in model.config.compress_ratios)
    num_adapted = per_block * (model.config.num_layers + model.config.num_mtp) + 2 * pooling
    assert len(parameters) == 2 * num_adapted


def test_shapes_are_those_of_the_values_even_where_codes_are_held(smallest: Path) -> None:
    dense, packed = (dsv4model.load(str(smallest), torch.float32, how) for how in ("dense", "packed"))
    shapes = [
        {name: parameter.shape for name, parameter in adapters.attach(model, PART, seeded()).items()}
        for model in (dense, packed)
    ]
    assert shapes[0] == shapes[1]
    experts, rows, cols = dense.model.layers[0].mlp.experts.gate_up_proj.shape
    at = "model.layers.0.mlp.experts.gate_up_adapter.lora_"
    assert shapes[1][at + "A"] == (experts, 4, cols) and shapes[1][at + "B"] == (experts, rows, 4)


@pytest.mark.parametrize("experts", ["dense", "packed"])
def test_nothing_but_adapters_learns(smallest: Path, experts: Any) -> None:
    model = dsv4model.load(str(smallest), torch.float32, experts)
    parameters = adapters.attach(model, PART, seeded())
    assert learning.learning(model) == parameters
    learn(model, random_ids(1, 9))
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        *parameters
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.self_attn.robots", "fits no weight"),
        ("*.input_layernorm.weight", "cannot have an adapter"),
        ("*", "cannot have an adapter"),
        ("*.mlp.gate.weight", "cannot have an adapter"),
        ("lm_head.weight", "cannot have an adapter"),
        ("model.embed_tokens.weight", "cannot have an adapter"),
        ("*.indexer.q_b_proj", "the indexer only"),
    ],
)
def test_pattern_for_what_cannot_have_an_adapter_is_refused(pattern: str, message: str) -> None:
    model = random_model(torch.float32)
    with pytest.raises(Usage, match=message):
        adapters.attach(model, LoraPart(targets=("*.kv_proj", pattern) if "indexer" not in pattern else (pattern,)),
                        seeded())  # fmt: skip
    assert not adapters.attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "part", [LoraPart(rank=0), LoraPart(alpha=0.0), LoraPart(alpha=-1.0), LoraPart(alpha=float("nan"))]
)
def test_rank_or_alpha_that_means_nothing_is_refused(part: LoraPart) -> None:
    with pytest.raises(Usage, match="no adapters of this kind"):
        adapters.attach(random_model(torch.float32), part, seeded())


def test_second_set_of_adapters_is_refused() -> None:
    model = random_model(torch.float32)
    parameters = adapters.attach(model, PART, seeded())
    with pytest.raises(Usage, match="already"):
        adapters.attach(model, PART, seeded())
    assert learning.learning(model) == parameters


# ---- how it starts


def test_adapters_start_uniform_as_a_linear_layer_of_torch_and_change_nothing(smallest: Path) -> None:
    model, ids = dsv4model.load(str(smallest), torch.float32), random_ids(1, 9)
    with torch.no_grad():
        before = model(ids)
    parameters = adapters.attach(model, LoraPart(rank=16), seeded())
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            assert not parameter.any()
            continue
        bound = nn.Linear(parameter.shape[-1], 1).weight.shape[-1] ** -0.5
        assert 0.98 * bound < parameter.abs().max() <= bound
        assert abs(parameter.mean()) < 0.05 * bound
    with torch.no_grad():
        after = model(ids)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.mtp_logits, before.mtp_logits)


def test_start_depends_on_the_generator_and_nothing_else(smallest: Path) -> None:
    def start(seed: int, experts: Any, dtype: torch.dtype) -> list[Tensor]:
        torch.rand(seed + 1)
        model = dsv4model.load(str(smallest), dtype, experts)
        return [*adapters.attach(model, PART, seeded(seed)).values()]

    first, again, other = (
        start(3, "dense", torch.float32),
        start(3, "packed", torch.bfloat16),
        start(4, "dense", torch.float32),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.any())


# ---- what it adds


@pytest.mark.slow
def test_adapted_model_has_the_logits_of_the_merged_one() -> None:
    """Of every kind of target: linear, grouped, in float32 islands, experts, MTP. Hidden states as well."""
    model, ids = random_model(), random_ids(2, 150)
    with torch.no_grad():
        base = model(ids).logits
    adapted(model, EVERYWHERE)
    kinds = {type(place.module) for place in adapters.attached(model)}
    assert kinds == {Linear, GroupedLinear, WideLinear, moe.Experts}
    dense = merged(model)
    with torch.no_grad():
        for mine, theirs in zip(model(ids), dense(ids), strict=True):
            assert distance(mine, theirs) < EXACT
        for mine, theirs in zip(model.hidden(ids), dense.hidden(ids), strict=True):
            assert distance(mine, theirs) < EXACT
        assert distance(model(ids).logits, base) > 1e-2


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule() -> None:
    """dA = scale B' dW and dB = scale dW A'. Queries are made once more in backward: with their adapter."""
    model, ids = random_model(), random_ids(2, 150)
    adapted(model, EVERYWHERE)
    dense = merged(model)
    learn(model, ids)
    learn(dense, ids)
    weights = dict(dense.named_parameters())
    for place, adapter in adapters.attached(model).items():
        grad = weights[place.name].grad
        assert grad is not None and grad.any()
        assert adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
        assert distance(adapter.lora_A.grad, 1.5 * adapter.lora_B.mT @ grad) < EXACT, place.name
        assert distance(adapter.lora_B.grad, 1.5 * grad @ adapter.lora_A.mT) < EXACT, place.name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_model_has_the_logits_and_gradients_of_the_dense_one(flash: Path, dtype: torch.dtype) -> None:
    ids, found = random_ids(2, 24), []
    for how in ("dense", "packed"):
        model = dsv4model.load(str(flash), dtype, how)
        parameters = adapted(model)
        logits = learn(model, ids)
        found.append((*logits, *(parameter.grad for parameter in parameters.values())))
    for dense, packed in zip(*found, strict=True):
        assert torch.equal(packed, dense)


def test_adapter_reads_what_the_matrix_reads() -> None:
    prepare = Simulation(activations_fp8=True).prepare
    layer, x = Linear(128, 48, prepare).double(), torch.randn(3, 128, generator=seeded()).double()
    layer.weight.data.normal_(generator=seeded())
    layer.adapter = LinearAdapter(torch.ones(2, 128).double(), torch.ones(48, 2).double(), 1.0, layer.times)
    read = x if prepare is None else prepare(x)
    assert not torch.equal(read, x)
    assert distance(layer(x), nn.functional.linear(read, layer.weight + 1)) < EXACT


def test_products_in_a_bfloat16_model_are_bfloat16_and_gradients_float32() -> None:
    layer = Linear(64, 48).to(torch.bfloat16)
    layer.weight.data.zero_()
    layer.adapter = LinearAdapter(torch.randn(4, 64), torch.randn(48, 4), 8.0, layer.times)
    x = torch.randn(5, 64).bfloat16()
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    wanted = 2 * x.float() @ layer.adapter.lora_A.T @ layer.adapter.lora_B.T
    # A, B, what is between them and the result are rounded once each, by 2**-9 of terms as large as the result's norm
    assert distance(out.float(), wanted) < 4 * 2**-8
    assert layer.adapter.lora_A.grad.dtype == layer.adapter.lora_B.grad.dtype == torch.float32


# ---- experts


def expert_adapter(dtype: torch.dtype, experts: int = 5) -> tuple[ExpertAdapter, Tensor, moe.Pairs]:
    """16 pairs of 8 tokens; nobody goes to expert 3."""
    random = seeded(5)
    lora_A, lora_B = (
        torch.randn(experts, *shape, generator=random).to(dtype) for shape in ((4, 64), (32, 4))
    )
    ids = torch.tensor([[0, 1], [1, 2], [4, 0], [2, 1], [0, 4], [1, 0], [2, 4], [1, 2]])
    x = torch.randn(16, 64, generator=random).to(dtype)
    return ExpertAdapter(lora_A, lora_B, 6.0), x, moe.Pairs.of(ids, experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_of_experts_without_tokens_get_zero_gradients(dtype: torch.dtype) -> None:
    """Grouped in float32, one after the other in float64."""
    adapter, x, pairs = expert_adapter(dtype)
    out = adapter(x, pairs)
    out.sin().sum().contiguous().backward()
    begin = 0
    for expert, end in enumerate(pairs.ends.tolist()):
        wanted = 1.5 * x[begin:end] @ adapter.lora_A[expert].T @ adapter.lora_B[expert].T
        assert distance(out[begin:end], wanted) < 1e-5
        begin = end
    for parameter in (adapter.lora_A, adapter.lora_B):
        busy = parameter.grad.flatten(1).any(1).tolist()
        assert busy == [True, True, True, False, True]


def test_adapters_of_experts_that_nobody_goes_to_get_zero_gradients_not_none() -> None:
    adapter, x, _ = expert_adapter(torch.float32)
    none = moe.Pairs.of(torch.empty(0, 2, dtype=torch.int64), 5)
    adapter(x[:0], none).sin().sum().backward()
    assert not adapter.lora_A.grad.any() and not adapter.lora_B.grad.any()


@pytest.mark.parametrize("experts", ["dense", "packed"])
@pytest.mark.parametrize("length", [1, 3])
def test_every_adapter_has_a_gradient_on_documents_too_short_for_compression(
    flash: Path, experts: Any, length: int
) -> None:
    model = dsv4model.load(str(flash), torch.float32, experts)
    parameters = adapted(model)
    learn(model, random_ids(1, length))
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []


# ---- memory


class Largest(TorchDispatchMode):
    """Notes the most elements of a floating tensor that an operation makes in new memory."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.numel = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(made, Tensor) or not made.is_floating_point():
                continue
            if made.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, made.numel())
        return out


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "packed"])
def test_no_pass_makes_a_copy_of_the_experts_weights(smallest: Path, experts: Any) -> None:
    """The largest new tensor is smaller than the fused matrix, by far where codes are held."""
    model = dsv4model.load(str(smallest), torch.bfloat16, experts)
    adapted(model)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with Largest(known) as seen:
        hidden, ahead = model.hidden(random_ids(1, 4))
        assert ahead is not None
        (hidden.float().sum() + ahead.float().sum()).backward()
    experts_of = adapters.places(model)["model.layers.0.mlp.experts.gate_up_proj"]
    assert 0 < seen.numel < torch.Size(experts_of.shape).numel()


def test_nothing_is_kept_for_backward_that_is_as_large_as_a_weight_but_weights(smallest: Path) -> None:
    model = dsv4model.load(str(smallest), torch.float32, "packed")
    adapted(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.hidden(random_ids(1, 4))
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    new = [t.numel() for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in held]
    smallest_weight = min(torch.Size(place.shape).numel() for place in adapters.attached(model))
    assert max(new) < smallest_weight


# ---- merging


def test_rows_of_a_delta_are_those_of_the_whole_product_for_any_piece(smallest: Path) -> None:
    model = dsv4model.load(str(smallest), torch.float32)
    adapted(model)
    found = adapters.deltas(model)
    weights = dict(model.named_parameters())
    assert found.keys() == {place.name for place in adapters.attached(model)}
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.o_a_proj.weight"):
        delta, weight = found[name], weights[name]
        whole = 1.5 * torch.einsum("...or,...ri->...oi", delta.lora_B.double(), delta.lora_A.double())
        assert whole.shape == weight.shape
        whole = whole.flatten(0, -2)
        for first, count in ((0, len(whole)), (5, 100), (len(whole) - 1, 1), (63, 2), (7, 0)):
            rows = delta.rows(first, count)
            assert rows.dtype == torch.float64 and rows.shape == (count, weight.shape[-1])
            assert count == 0 or distance(rows, whole[first : first + count]) < 1e-15


def test_delta_of_a_start_is_zero_and_of_a_frozen_model_needs_no_gradient(smallest: Path) -> None:
    model = dsv4model.load(str(smallest), torch.float32, "packed")
    adapters.attach(model, PART, seeded())
    for delta in adapters.deltas(model).values():
        rows = delta.rows(0, 3)
        assert not rows.any() and not rows.requires_grad


# ---- learning


@pytest.mark.slow
@pytest.mark.parametrize("make", ["dense", "packed"])
def test_adapters_of_a_bfloat16_model_learn_at_the_rate_of_lora(smallest: Path, make: Any) -> None:
    model, ids = dsv4model.load(str(smallest), torch.bfloat16, make), random_ids(1, 24)
    parameters = adapters.attach(model, LoraPart(), seeded())
    (optimizer,) = learning.optimizers_of(parameters, OptimizerPart(), 1e-3)
    losses = []
    for _ in range(12):
        logits = model(ids).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(parameter.isfinite().all() for parameter in parameters.values())
