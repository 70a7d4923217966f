"""The indexer's own loss and its gradients against numpy, token by token, and what it is over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import oracle
import peaks
import pytest
import torch
from built import built, expected
from random_model import random_ids, random_model
from torch import Tensor

from dsv4model import indexing
from dsv4model.attend import View, looks
from dsv4model.compressor import Indexer
from dsv4model.model import Model
from dsv4model.rope import Turn
from dsv4model.simulate import Simulation, fp4_groups, hadamard

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER, LENGTH = 2, 90  # the layer of the tiny model that has an indexer; so many tokens make 22 entries
SPARSE, DENSE = 8, 64  # places for picks: fewer than entries, and more
# Released name below an indexer -> its place in ours.
PARTS = {
    "wq_b.weight": "q_b_proj.weight",
    "weights_proj.weight": "scorer.weights_proj.weight",
    "compressor.wkv.weight": "kv_proj.weight",
    "compressor.wgate.weight": "gate_proj.weight",
    "compressor.ape": "position_bias",
    "compressor.norm.weight": "kv_norm.weight",
}


def indexer_of(model: Model) -> Indexer:
    (indexer,) = (module for module in model.modules() if isinstance(module, Indexer))
    return indexer


def told(model: Model, ids: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the only indexer's tap hears in a forward pass."""
    heard: list[tuple[Tensor, Tensor]] = []
    indexer_of(model).tap = lambda *sums: heard.append(sums)
    try:
        model.hidden(ids, None, documents)
    finally:
        indexer_of(model).tap = None
    (sums,) = heard
    return sums


# ---- the formula


class Case(NamedTuple):
    document: dict[str, Any]
    weights: dict[str, np.ndarray]
    ids: np.ndarray
    shown: oracle.Shown


def sums_of(case: Case, indexer: Mapping[str, np.ndarray]) -> np.ndarray:
    """KL(attention || indexer) and KL(attention || uniform), token by token as the formulas stand."""
    sums = np.zeros(2)
    for row in range(len(case.ids)):
        sums += row_sums(case, indexer, {name.removeprefix(f"layers.{LAYER}.attn."): value[row]
                                         for name, value in case.shown.items()})  # fmt: skip
    return sums


def row_sums(case: Case, indexer: Mapping[str, np.ndarray], shown: oracle.Shown) -> np.ndarray:
    p, document, sums = oracle.below(case.weights, f"layers.{LAYER}.attn."), case.document, np.zeros(2)
    low = oracle.rms_norm(shown["in"] @ p["wq_a.weight"].T, document["rms_norm_eps"]) * p["q_norm.weight"]
    scores = scores_of(indexer, document, shown["in"], low)
    for t in range(LENGTH):
        chosen = shown["picks"][t][shown["picks"][t] >= 0]
        first = max(0, t + 1 - document["sliding_window"])
        target = np.zeros(len(chosen))
        for head in range(document["num_attention_heads"]):
            keys = np.concatenate([shown["kv"][first : t + 1], shown["entries"][chosen]])
            logits = keys @ shown["q"][t, head] / math.sqrt(document["head_dim"])
            share = oracle.softmax(np.append(logits, p["attn_sink"][head]), 0)
            target += share[t + 1 - first : -1]
        if len(chosen):
            target /= target.sum()
            for at, guess in enumerate(
                (oracle.softmax(scores[t, chosen], 0), np.ones(len(chosen)) / len(chosen))
            ):
                sums[at] += sum(target[i] * math.log(target[i] / guess[i]) for i in range(len(chosen)))
    return sums


def scores_of(
    p: Mapping[str, np.ndarray], document: dict[str, Any], x: np.ndarray, low: np.ndarray
) -> np.ndarray:
    """Of all entries for all tokens."""
    heads, width = document["index_n_heads"], document["index_head_dim"]
    speed = oracle.frequencies(document, oracle.OVERLAP)
    q = oracle.rope((low @ p["wq_b.weight"].T).reshape(len(x), heads, width), np.arange(len(x)), speed)
    keys = oracle.compressed(oracle.below(p, "compressor."), document, oracle.OVERLAP, x)
    weight = x @ p["weights_proj.weight"].T / math.sqrt(heads * width)
    return np.einsum("sa,sat->st", weight, np.maximum(np.einsum("sad,td->sat", q, keys), 0))


@pytest.fixture(params=[SPARSE, DENSE], ids=["sparse", "dense"], scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    document = oracle.tiny_document(index_topk=request.param)
    weights = oracle.random_weights(document, seed=3)
    ids = np.random.default_rng(5).integers(0, document["vocab_size"], (2, LENGTH))
    return Case(document, weights, ids, expected(weights, document, ids))


@pytest.mark.slow
def test_loss_and_its_gradients_are_those_of_the_formula(case: Case) -> None:
    model = built(case.weights, case.document)
    divergence, uniform = told(model, torch.from_numpy(case.ids))
    indexer = oracle.below(case.weights, f"layers.{LAYER}.attn.indexer.")
    # the oracle's scores turn by float64 frequencies, the model's by the release's float32 ones
    wanted = sums_of(case, indexer)
    assert float(divergence.detach()) == pytest.approx(wanted[0], rel=1e-7)
    assert float(uniform) == pytest.approx(wanted[1], rel=1e-12)
    assert wanted[0] > 10 < wanted[1]
    (3 * divergence).backward()
    learners = {f"{name}" for name, p in model.named_parameters() if p.grad is not None}
    assert learners == {
        f"model.layers.{LAYER}.self_attn.compressor.indexer.{name}" for name in PARTS.values()
    }
    parameters = dict(indexer_of(model).named_parameters())
    for name, ours in PARTS.items():
        way = np.random.default_rng(1).standard_normal(indexer[name].shape) * 1e-6
        up, down = (sums_of(case, {**indexer, name: indexer[name] + sign * way})[0] for sign in (1, -1))
        grad = parameters[ours].grad
        assert grad is not None
        most = float(grad.norm()) * float(np.linalg.norm(way))
        assert float((grad.numpy() * way).sum()) == pytest.approx(3 * (up - down) / 2, abs=1e-6 * most), name


@pytest.mark.slow
def test_dense_loss_sees_all_that_sparse_does_not_pick() -> None:
    """Also attention does, but only while somebody listens."""
    ids = random_ids(1, LENGTH)
    few, many = (random_model(index_topk=places) for places in (SPARSE, DENSE))
    indexer_of(few).sees_all = True
    hidden = [model.hidden(ids)[0] for model in (few, many)]
    assert not torch.allclose(*hidden)
    assert told(few, ids) == told(many, ids)
    indexer_of(few).tap = lambda *_: None
    assert torch.equal(few.hidden(ids)[0], hidden[1])


@pytest.mark.slow
@pytest.mark.parametrize("places", [SPARSE, DENSE])
def test_packed_documents_add_up_and_padding_does_not_count(places: int) -> None:
    """One document is shorter than an entry."""
    model, lengths = random_model(index_topk=places), (50, 3, 61, 26)
    documents = torch.repeat_interleave(torch.tensor([4, 5, 7, -1]), torch.tensor(lengths))[None]
    ids = random_ids(1, sum(lengths))
    packed = told(model, ids, documents)
    packed[0].backward()
    found = {name: p.grad for name, p in indexer_of(model).named_parameters()}
    model.zero_grad()
    single = [told(model, part) for part in ids.split(lengths, 1)[:-1]]
    sum(divergence for divergence, _ in single).backward()  # type: ignore[union-attr]
    values = [[float(value.detach()) for value in sums] for sums in (packed, *single)]
    assert values[0] == pytest.approx([sum(column) for column in zip(*values[1:], strict=True)], rel=1e-12)
    assert values[2] == [0, 0]
    for name, parameter in indexer_of(model).named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-10, atol=1e-14), name


def test_rows_without_entries_have_no_loss_and_gradients_of_zero() -> None:
    """Zero and not none: ranks agree on which gradients there are."""
    model = random_model()
    divergence, uniform = told(model, random_ids(2, 3))
    divergence.backward()
    assert float(divergence.detach()) == float(uniform) == 0
    assert all(p.grad is not None and not p.grad.any() for p in indexer_of(model).parameters())


@pytest.mark.slow
def test_loss_of_a_quantized_indexer_passes_gradients_through() -> None:
    """As elsewhere in simulation: what is rounded is compared, and the gradient passes as if nothing were."""
    ids, model = random_ids(1, LENGTH), random_model(simulation=Simulation(indexer_fp4=True))
    indexer, found = indexer_of(model), []

    def straight(x: Tensor) -> Tensor:
        turned = hadamard(x)
        return turned + (fp4_groups(turned) - turned).detach()

    for simulated in (indexer.simulated, straight, hadamard):
        indexer.simulated = simulated  # type: ignore[method-assign, assignment]
        divergence, _ = told(model, ids)
        found.append((divergence, torch.autograd.grad(divergence, list(indexer.parameters()))))
    (loss, grads), (wanted, of_wanted), (unrounded, _) = found
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert abs(float((loss - unrounded).detach())) > 1e-3
    for grad, other in zip(grads, of_wanted, strict=True):
        assert torch.allclose(grad, other, rtol=1e-9, atol=1e-12) and grad.any()


def test_loss_never_has_all_scores() -> None:
    """2,048 queries of 64 heads and 512 entries: 268 MB of products, of which a chunk is there at a time."""
    random = torch.Generator().manual_seed(1)
    shapes = (1, 2048, 64, 16), (1, 2048, 64), (1, 512, 16)
    leaves = [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]

    def loss(length: int) -> Tensor:
        at = torch.arange(length)[None]
        view = View(16, 0, torch.zeros_like(at), torch.zeros_like(at), (at + 1) // 4, None)
        turn = Turn(torch.ones(1, length, 4, dtype=torch.complex64))
        q, kv = leaves[0][:, :length, :8], leaves[0][:, :length, 0]
        wanted = looks(q, kv, leaves[2], torch.zeros(8), turn, 1e-6, view)
        return indexing.divergence(leaves[0][:, :length], leaves[1][:, :length], leaves[2], wanted, None)[0]

    loss(64).backward()
    before = peaks.kilobytes("VmHWM")
    loss(2048).backward()
    assert (peaks.kilobytes("VmHWM") - before) * 1024 < 2048 * 64 * 512 * 4 / 3
