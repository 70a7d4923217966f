"""Losses against float64 formulas and plain torch; sums that no division of a batch changes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dsv4model import losses

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def targets_of(count: int, vocab: int) -> torch.Tensor:
    targets = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(3))
    targets[::3] = losses.IGNORED
    return targets


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight"])
def test_cross_entropy_and_gradients_are_those_of_whole_logits(
    chunk: int, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", chunk)
    targets = targets_of(13, 31)
    hidden, weight = random(13, 8, dtype=torch.float64), random(31, 8, seed=1, dtype=torch.float64)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=losses.IGNORED)
    learning = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    of_wanted = torch.autograd.grad(3 * wanted, learning)
    got = losses.linear_cross_entropy(hidden, weight, targets)
    of_got = torch.autograd.grad(3 * got, learning)
    assert torch.allclose(got, wanted, rtol=1e-13)
    for one, other in zip(of_got, of_wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


def test_cross_entropy_of_bfloat16_is_float32() -> None:
    """torch's own returns a sum of two thousand in steps of 8."""
    hidden = random(400, 64, dtype=torch.bfloat16)
    weight = random(97, 64, seed=1, dtype=torch.bfloat16).requires_grad_()
    targets = targets_of(400, 97)
    got = losses.linear_cross_entropy(hidden, weight, targets)
    wanted = F.cross_entropy(hidden.double() @ weight.detach().double().T, targets, reduction="sum")
    assert got.dtype == torch.float32
    assert abs(float(got.detach()) / float(wanted) - 1) < 1e-6
    got.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_cross_entropy_of_nothing_is_zero_and_has_zero_gradients() -> None:
    hidden, weight = random(5, 8).requires_grad_(), random(31, 8).requires_grad_()
    got = losses.linear_cross_entropy(hidden, weight, torch.full((5,), losses.IGNORED))
    got.backward()
    assert float(got) == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_cross_entropy_never_has_all_logits() -> None:
    """256 tokens of 400,000: 410 MB of logits, of which 64 MB and their like are there at a time."""
    import peaks

    hidden, weight = random(256, 16), random(400_000, 16, seed=1)
    losses.linear_cross_entropy(hidden[:4], weight, torch.zeros(4, dtype=torch.int64))
    before = peaks.kilobytes("VmHWM")
    losses.linear_cross_entropy(hidden, weight, torch.arange(256))
    assert (peaks.kilobytes("VmHWM") - before) * 1024 < 256 * 400_000 * 4 / 1.5


def naive_balance(scores: torch.Tensor, ids: torch.Tensor, documents: torch.Tensor) -> float:
    """Document by document, expert by expert, as the formulas stand."""
    total = 0.0
    num_experts, per_token = scores.shape[1], ids.shape[1]
    for document in set(documents.tolist()):
        rows = [t for t in range(len(documents)) if documents[t] == document and document >= 0]
        for expert in range(num_experts):
            chosen = sum(int(expert in ids[t].tolist()) for t in rows)
            load = num_experts / (per_token * max(1, len(rows))) * chosen
            mean = sum(float(scores[t, expert] / scores[t].sum()) for t in rows) / max(1, len(rows))
            total += load * mean * len(rows)
    return total


def test_balance_is_the_formula_per_document() -> None:
    scores = random(17, 6, dtype=torch.float64).abs()
    ids = scores.topk(2, -1).indices
    documents = torch.tensor([4] * 5 + [9] * 7 + [-1] * 2 + [4] * 3)
    got = losses.balance(scores, ids, documents)
    assert float(got) == pytest.approx(naive_balance(scores, ids, documents), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: losses.balance(x, ids, documents), scores.requires_grad_())


def test_balance_of_even_routing_is_one_a_token() -> None:
    scores = torch.ones(12, 4, dtype=torch.float64)
    ids = torch.arange(24).view(12, 2) % 4
    assert float(losses.balance(scores, ids, torch.zeros(12))) == pytest.approx(12)


def test_router_sums_are_those_of_the_logits() -> None:
    """Also of logits whose exponential float32 does not hold, and of such that have next to none."""
    from dsv4model.moe import affinity

    logits = random(9, 8, dtype=torch.float64) * 5
    logits[1], logits[2, 3], logits[3, 4] = -40, 120, -70
    documents = torch.tensor([0, 0, 1, 2, -1, 2, 2, -1, 3])
    wanted_z = wanted_entropy = 0.0
    for token in range(9):
        if documents[token] < 0:
            continue
        wanted_z += float(logits[token].logsumexp(0)) ** 2
        shares = [math.sqrt(math.log1p(math.exp(logit))) for logit in logits[token].tolist()]
        shares = [share / sum(shares) for share in shares]
        wanted_entropy -= sum(share * math.log(share) for share in shares)
    scores = affinity(logits.float()).requires_grad_()
    got = losses.router_sums(scores, documents)
    assert not got.requires_grad
    assert got.tolist() == pytest.approx([wanted_z, wanted_entropy], rel=1e-5)


def test_bias_rises_where_load_is_low() -> None:
    got = losses.bias_steps(torch.tensor([0, 4, 2, 2]), 1e-3)
    assert got.tolist() == pytest.approx([1e-3, -1e-3, 0, 0])
