"""Each switch of Simulation reaches what it is about in the model, and nothing else.

What the switches compute is test_simulate.py's; here a model with a switch is held against the same one without.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from random_model import random_ids, random_model
from torch import Tensor

from dsv4ckpt.formats import FP8_TILE
from dsv4model import compressor, trace
from dsv4model.layers import Linear
from dsv4model.model import Model
from dsv4model.simulate import KV_GROUP, Simulation, fp4_groups, fp4_weight, fp8_groups, hadamard

IDS = random_ids(2, 60)
ONE_LAYER: dict[str, Any] = {
    "num_hidden_layers": 1,
    "compress_ratios": [4, 0],
}  # 15 entries, of which 8 are picked


def model_of(**switches: bool) -> Model:
    return random_model(torch.float32, simulation=Simulation(**switches), **ONE_LAYER)


def shown(model: Model) -> dict[str, Tensor]:
    with torch.no_grad():
        return trace.record(model, IDS)


def first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    return next((name for name in a if not torch.equal(a[name], b[name])), None)


def test_no_switch_is_a_model_without_simulation() -> None:
    plain = random_model(torch.float32, **ONE_LAYER)
    assert first_difference(shown(plain), shown(model_of())) is None


@pytest.mark.parametrize("name", ["kv", "entries"])
def test_kv_fp8_rounds_what_is_not_rotated_of_window_and_entries(name: str) -> None:
    plain, simulated = shown(model_of()), shown(model_of(kv_fp8=True))
    rope_dim = model_of().config.rope_dim
    exact = plain[f"layers.0.attn.{name}"]
    expected = torch.cat((fp8_groups(exact[..., :-rope_dim], KV_GROUP), exact[..., -rope_dim:]), -1)
    assert torch.equal(simulated[f"layers.0.attn.{name}"], expected) and not torch.equal(exact, expected)
    assert first_difference(plain, simulated) == "layers.0.attn.kv"


def test_kv_fp8_rounds_the_mtp_blocks_window_too() -> None:
    plain, simulated = (model_of(kv_fp8=on).mtp[0].self_attn for on in (False, True))
    assert simulated.simulates_fp8 and not plain.simulates_fp8  # type: ignore[union-attr]


def test_indexer_fp4_turns_and_rounds_the_indexers_queries_and_keys() -> None:
    given = []
    for on in (False, True):
        with mock.patch.object(compressor, "index_scores", side_effect=compressor.index_scores) as scores:
            given.append((shown(model_of(indexer_fp4=on)), scores.call_args.args))
    (plain, (q, weight, keys)), (simulated, (q_4, weight_4, keys_4)) = given
    assert torch.equal(q_4, fp4_groups(hadamard(q))) and torch.equal(keys_4, fp4_groups(hadamard(keys)))
    assert torch.equal(weight_4, weight)
    assert first_difference(plain, simulated) == "layers.0.attn.picks"


def test_activations_fp8_is_about_the_inputs_of_the_matrices_that_the_release_quantizes() -> None:
    names = {
        name.rpartition(".")[2] if "indexer" not in name else "indexer." + name.rpartition(".")[2]
        for name, module in model_of(activations_fp8=True).named_modules()
        if isinstance(module, Linear) and module.prepare is not None
    }
    assert names == {
        "q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "indexer.q_b_proj", "gate_proj", "up_proj", "down_proj",
        "e_proj", "h_proj",
    }  # fmt: skip
    inner = model_of(activations_fp8=True).model.layers[0].self_attn.compressor  # type: ignore[union-attr]
    assert inner.kv_proj.prepare is None and inner.gate_proj.prepare is None  # type: ignore[union-attr]


def test_activations_fp8_rounds_the_inputs_of_a_linear_layer_in_groups_of_a_tile() -> None:
    layer = model_of(activations_fp8=True).model.layers[0].self_attn.q_a_proj  # type: ignore[union-attr]
    x = torch.randn(3, layer.weight.shape[1])
    expected = F.linear(fp8_groups(x, FP8_TILE.block.cols), layer.weight)
    assert torch.equal(layer(x), expected) and not torch.equal(expected, F.linear(x, layer.weight))


def test_activations_fp8_rounds_what_experts_read_before_both_matrices() -> None:
    experts = model_of(activations_fp8=True).model.layers[0].mlp.experts  # type: ignore[union-attr]
    x, ids, weights = torch.randn(5, 64), torch.tensor([[1, 3]]).expand(5, 2), torch.rand(5, 2)
    tile = FP8_TILE.block.cols
    expected = torch.zeros(5, 64)
    for k in range(2):
        gate, up = F.linear(fp8_groups(x, tile), experts.gate_up_proj[ids[0, k]]).chunk(2, -1)
        inner = F.silu(gate.clamp(max=experts.limit)) * up.clamp(-experts.limit, experts.limit)
        inner = fp8_groups(inner * weights[:, k, None], tile)
        expected += F.linear(inner, experts.down_proj[ids[0, k]])
    assert torch.allclose(experts(x, ids, weights), expected, rtol=0, atol=1e-5)


def test_experts_fp4_computes_with_the_rounded_weights() -> None:
    simulated, rounded = model_of(experts_fp4=True), model_of()
    for module in (block.mlp.experts for block in (*rounded.model.layers, *rounded.mtp)):  # type: ignore[union-attr]
        for name, parameter in module.named_parameters():  # type: ignore[union-attr]
            parameter.data = fp4_weight(parameter.data)
            assert parameter.shape[-1] % 32 == 0, name
    found = shown(simulated)
    assert first_difference(shown(rounded), found) is None
    assert first_difference(shown(model_of()), found) == "layers.0.ffn.experts"


def test_all_switches_leave_every_gradient_defined_and_finite() -> None:
    """But the indexer's, which has none without them either."""
    every = {"kv_fp8": True, "indexer_fp4": True, "activations_fp8": True, "experts_fp4": True}
    model = model_of(**every)
    out = model(IDS)
    (out.logits.sin().sum() + out.mtp_logits.sin().sum()).backward()
    lacking = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert lacking and all(".indexer." in name for name in lacking)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
