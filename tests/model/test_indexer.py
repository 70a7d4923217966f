"""The indexer's choice against a stable argsort of scores that are exact, so that ties are ties.

Queries, keys and head weights are small whole numbers: their products and sums are exact in float32, and the ReLU
leaves many scores at exactly 0, as it does in the model.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_model import random_ids, random_model
from tiny_model import tiny_document
from torch import Tensor

from dsv4model.compressor import Indexer, index_scores
from dsv4model.config import Config
from dsv4model.packing import Groups, pack
from dsv4model.simulate import Simulation

RATIO = 4


def indexer(topk: int) -> Indexer:
    return Indexer(Config.read(tiny_document(index_topk=topk)), RATIO, Simulation(), None)


def whole(random: np.random.Generator, most: int, *shape: int) -> Tensor:
    return torch.from_numpy(random.integers(-most, most + 1, shape)).float()


def groups_of(documents: Tensor | None, length: int, past: int = 0) -> Groups:
    shape = torch.Size((2, length)) if documents is None else documents.shape
    return pack(shape, torch.device("cpu"), documents, past).groups(RATIO)


def brute_force(q: Tensor, weight: Tensor, keys: Tensor, groups: Groups, topk: int) -> np.ndarray:
    """[B, S, topk]: of the visible entries the best by a stable sort, ascending, then -1; none whose score is NaN."""
    batch, length = q.shape[:2]
    picks = np.full((batch, length, topk), -1)
    for b, s in np.ndindex(batch, length):
        first, end = (int(x[b % len(x), s]) for x in (groups.first, groups.end))
        dots = np.maximum(q[b, s].double().numpy() @ keys[b, first:end].double().numpy().T, 0)
        scores = weight[b, s].double().numpy() @ dots
        order = [entry for entry in np.argsort(-scores, kind="stable") if not np.isnan(scores[entry])]
        best = np.sort(first + np.array(order[:topk], int))
        picks[b, s, : len(best)] = best
    return picks


def assert_picks(topk: int, groups: Groups, length: int, num_entries: int, *, seed: int, heads: int) -> None:
    random = np.random.default_rng(seed)
    q, keys = whole(random, 2, 2, length, heads, 3), whole(random, 2, 2, num_entries, 3)
    weight = whole(random, 2, 2, length, heads)
    expected = brute_force(q, weight, keys, groups, topk)
    scores = index_scores(q, weight, keys)
    assert (scores == 0).float().mean() > 0.1  # ties there are
    assert indexer(topk).picks(q, weight, keys, groups).tolist() == expected.tolist()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("topk", [1, 2, 8, 24])
def test_picks_are_the_best_and_of_equals_the_earliest(topk: int, heads: int) -> None:
    assert_picks(topk, groups_of(None, 100), 100, 25, seed=topk, heads=heads)


@pytest.mark.slow
def test_picks_of_more_queries_than_are_scored_at_a_time_are_the_same() -> None:
    assert_picks(8, groups_of(None, 1100), 1100, 275, seed=3, heads=2)


@pytest.mark.parametrize("past", [1, 77, 400])
def test_picks_after_a_cache_choose_among_all_earlier_entries(past: int) -> None:
    assert_picks(5, groups_of(None, 30, past), 30, (past + 30) // RATIO, seed=past, heads=2)


@pytest.mark.parametrize("seed", range(6))
def test_picks_of_packed_rows_stay_within_their_documents(seed: int) -> None:
    random = np.random.default_rng(seed)
    ends = random.random((2, 200)) < (0.02, 0.2)[seed % 2]
    groups = groups_of(torch.from_numpy(ends.cumsum(1)), 200)
    assert groups.num > 4
    assert_picks(4, groups, 200, groups.num, seed=seed, heads=2)


def test_picks_among_scores_of_zero_are_the_first_entries() -> None:
    q = torch.zeros(2, 100, 4, 3)
    picks = indexer(6).picks(q, torch.ones(2, 100, 4), torch.ones(2, 25, 3), groups_of(None, 100))
    for t, row in enumerate(picks[0].tolist()):
        visible = min(6, (t + 1) // RATIO)
        assert row == [*range(visible), *[-1] * (6 - visible)]


def test_picks_are_ascending_then_minus_one() -> None:
    random = np.random.default_rng(0)
    arguments = whole(random, 2, 2, 100, 4, 3), whole(random, 2, 2, 100, 4), whole(random, 2, 2, 25, 3)
    picks = indexer(8).picks(*arguments, groups_of(None, 100))
    assert picks.dtype == torch.int64 and picks.shape == (2, 100, 8)
    counts = (picks >= 0).sum(-1)
    assert counts[0].tolist() == [min(8, (t + 1) // RATIO) for t in range(100)]
    for row, count in zip(picks.flatten(0, 1).tolist(), counts.flatten().tolist(), strict=True):
        assert row[:count] == sorted(set(row[:count])) and row[count:] == [-1] * (8 - count)


def test_entries_of_which_the_score_is_nan_are_never_picked() -> None:
    random = np.random.default_rng(0)
    q, keys = whole(random, 2, 2, 100, 4, 3), whole(random, 2, 2, 25, 3)
    weight = whole(random, 2, 2, 100, 4)
    keys[:, [0, 7, 8]] = float("nan")
    weight[0, 50] = float("nan")
    picks = indexer(20).picks(q, weight, keys, groups_of(None, 100))
    assert picks.tolist() == brute_force(q, weight, keys, groups_of(None, 100), 20).tolist()
    assert (picks[0, 50] == -1).all() and not torch.isin(picks, torch.tensor([0, 7, 8])).any()
    assert (picks[1] >= 0).sum(-1)[79] == 17  # of 20 visible ones


def test_infinite_scores_are_picked_first() -> None:
    q, weight, keys = torch.ones(2, 100, 1, 1), torch.ones(2, 100, 1), torch.ones(2, 25, 1)
    keys[:, 13] = float("inf")
    assert indexer(1).picks(q, weight, keys, groups_of(None, 100))[0, 99].tolist() == [13]


def test_model_with_a_nan_in_it_gives_nan_and_does_not_crash() -> None:
    model, ids = random_model(torch.float32), random_ids(1, 100)
    model.model.layers[2].self_attn.compressor.indexer.q_b_proj.weight.data.fill_(float("nan"))
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()  # nothing is picked any more, the window remains
        model.model.embed_tokens.weight.data[ids[0, 0]] = float("nan")
        assert model(ids).logits[0, 0].isnan().all()


@pytest.mark.parametrize("topk", [24, 25, 26])
def test_choice_that_leaves_out_nothing_equals_no_choice(topk: int) -> None:
    """With 25 entries, 24 places bind for the last token only; 25 and more never do."""
    changes = {"num_hidden_layers": 1, "compress_ratios": [4, 0], "num_nextn_predict_layers": 0}
    ids = random_ids(1, 100)
    with torch.no_grad():
        few = random_model(index_topk=topk, **changes)(ids).logits
        many = random_model(index_topk=100, **changes)(ids).logits
    different = (few - many).abs().amax(-1)[0] > 1e-12
    assert not different[:99].any() and bool(different[99]) is (topk == 24)


def test_scores_are_differentiable_for_who_trains_the_indexer() -> None:
    q, weight, keys = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
                       for shape in ((1, 3, 2, 4), (1, 3, 2), (1, 5, 4)))  # fmt: skip
    dots = torch.einsum("bsad,btd->bsat", q, keys)
    assert dots.abs().min() > 1e-3  # steps of 1e-6 cross no ReLU
    assert torch.autograd.gradcheck(index_scores, [x.requires_grad_() for x in (q, weight, keys)])
    expected = torch.einsum("bsa,bsat->bst", weight, dots.relu())
    assert torch.allclose(index_scores(q, weight, keys), expected, atol=1e-14)
