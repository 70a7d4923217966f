"""The same model in float64, float32 and bfloat16, and compiled: what comes out, how wide, and how near."""

from __future__ import annotations

import shutil

import pytest
import torch
from random_model import distance, random_ids, random_model

from dsv4model.model import Model

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def in_dtype(dtype: torch.dtype) -> Model:
    """Every token to every expert: a choice that rounding turns would be a difference of its own."""
    return random_model(dtype, n_routed_experts=2, num_experts_per_tok=2, index_topk=64)


@all_dtypes
def test_logits_are_float32_at_least(dtype: torch.dtype) -> None:
    out = random_model(dtype)(random_ids(1, 20))
    assert out.mtp_logits is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.logits.dtype == out.mtp_logits.dtype == wide
    assert out.logits.isfinite().all() and out.mtp_logits.isfinite().all()


@pytest.mark.slow
@all_dtypes
def test_gradients_have_the_dtypes_of_their_parameters_and_are_finite(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    out = model(random_ids(2, 140))
    (out.logits.square().mean() + out.mtp_logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


# Parts of the largest logit. A part rounds by 6e-8 or 4e-3, some hundred times on the way; measured: 2e-6 and 2e-2.
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_narrower_model_stays_near_that_of_float64(dtype: torch.dtype, within: float) -> None:
    narrow = in_dtype(dtype)
    wide = in_dtype(torch.float64)
    wide.load_state_dict({name: value.to(torch.float64) if value.is_floating_point() else value
                          for name, value in narrow.state_dict().items()})  # fmt: skip
    with torch.no_grad():
        found, expected = narrow(random_ids(1, 140)), wide(random_ids(1, 140))
    for one, other in zip(found, expected, strict=True):
        assert distance(one.double(), other) < within


@all_dtypes
def test_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    model, ids = random_model(dtype), random_ids(2, 70)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_gradients_are_computed_again_to_the_same_bits() -> None:
    model, ids = random_model(torch.float32), random_ids(2, 140)
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(ids).logits.square().mean().backward()
        found.append(
            [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        )
    assert all(map(torch.equal, *found))


@all_dtypes
def test_values_with_and_without_gradients_are_the_same_bits(dtype: torch.dtype) -> None:
    model, ids = random_model(dtype), random_ids(1, 140)
    with torch.no_grad():
        without = model(ids)
    with_them = model(ids)
    for one, other in zip(without, with_them, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_frozen_parameters_get_no_gradient_and_leave_the_others_as_they_are() -> None:
    model, ids = random_model(), random_ids(1, 140)
    model(ids).logits.square().mean().backward()
    usual = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    frozen = (
        "attn_hc",
        "experts.gate_up_proj",
        "kv_proj",
        "sinks",
        "embed_tokens",
        "norm.weight",
        "q_b_proj",
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    model(ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif usual[name] is not None:
            assert parameter.grad is not None and distance(parameter.grad, usual[name]) < 1e-12, name


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++"
)
def test_compiled_model_gives_what_the_eager_one_does() -> None:
    """Graph breaks are allowed: what is data-dependent runs as before."""
    changes = {"num_hidden_layers": 1, "compress_ratios": [4], "num_nextn_predict_layers": 0}
    model, ids = random_model(torch.float32, **changes, hc_sinkhorn_iters=2), random_ids(1, 50)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad():
        assert distance(compiled(ids).logits, model(ids).logits) < 1e-5
    found, expected = [], []
    for run, gradients in ((compiled, found), (model, expected)):
        run(ids).logits.square().mean().backward()
        gradients += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-4  # measured: 1e-5
