"""The pieces of the oracle against closed forms; the whole of it is held against transformers in test_peer.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest

from dsv4ckpt import release

FLASH = release.shipped_config("flash")
EPS = 1e-6


def attention_of(ratio: int, **changes: Any) -> tuple[oracle.Weights, oracle.Document]:
    """Weights of one attention at this ratio, and the document that goes with them."""
    document = oracle.tiny_document(compress_ratios=[ratio, 0, 0, 0, 0], index_topk=64, **changes)
    return oracle.below(oracle.random_weights(document, 1), "layers.0.attn."), document


def inputs(num_tokens: int, width: int = 64) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((num_tokens, width))


def tokens_that_see(token: int, ratio: int, num_tokens: int, window: int) -> list[int]:
    """The positions whose attention output changes with the input at `token`."""
    p, document = attention_of(ratio, sliding_window=window)
    x = inputs(num_tokens)
    before = oracle.attention(p, document, ratio, x)["out"]
    x[token] += 1
    after = oracle.attention(p, document, ratio, x)["out"]
    return np.flatnonzero(np.abs(after - before).max(axis=1)).tolist()


# ---- hyper-connections


def test_sinkhorn_of_two_by_two_tends_to_its_closed_form() -> None:
    a, b, c, d = 0.3, -1.2, 2.0, 0.7
    straight, crossed = math.exp((a + d) / 2), math.exp((b + c) / 2)
    found = oracle.sinkhorn(np.array([[a, b], [c, d]]), iters=200, eps=0.0)
    assert found == pytest.approx(
        np.array([[straight, crossed], [crossed, straight]]) / (straight + crossed), abs=1e-12
    )


def test_sinkhorn_of_twenty_rounds_is_doubly_stochastic_and_ends_on_columns() -> None:
    C = oracle.sinkhorn(3 * inputs(50, 16).reshape(50, 4, 4), iters=20, eps=EPS)
    assert np.abs(C.sum(axis=-2) - 1).max() < 2 * EPS  # s / (s + eps) with s near 1
    assert 2 * EPS < np.abs(C.sum(axis=-1) - 1).max() < 0.05


def test_sinkhorn_of_one_round_adds_eps_after_the_softmax_and_to_the_column_sum() -> None:
    found = oracle.sinkhorn(np.zeros((4, 4)), iters=1, eps=0.5)
    assert found == pytest.approx(np.full((4, 4), 0.75 / (4 * 0.75 + 0.5)), abs=1e-15)


def test_mixing_without_projection_is_told_by_base_alone() -> None:
    K, base = 4, np.arange(24) / 10
    p = {"fn": np.zeros((24, 4 * 64)), "scale": np.ones(3), "base": base}
    pre, post, comb = oracle.mixing(p, oracle.tiny_document(hc_eps=EPS), inputs(K * 3).reshape(3, K, 64))
    assert pre[1] == pytest.approx(1 / (1 + np.exp(-base[:4])) + EPS, abs=1e-15)
    assert post[1] == pytest.approx(2 / (1 + np.exp(-base[4:8])), abs=1e-15)
    assert comb[1].sum(axis=0) == pytest.approx(np.ones(4), abs=2 * EPS)


def test_collapse_without_projection_weighs_the_streams_by_base_and_eps() -> None:
    p = {
        "hc_head_fn": np.zeros((4, 8)),
        "hc_head_scale": np.ones(1),
        "hc_head_base": np.array([0, 1, 2, 3.0]),
    }
    streams = inputs(12, 2).reshape(3, 4, 2)
    found = oracle.collapse(p, oracle.tiny_document(hc_eps=0.25), streams)
    shares = [0.25 + 1 / (1 + math.exp(-base)) for base in range(4)]
    assert found[2] == pytest.approx(sum(share * streams[2, j] for j, share in enumerate(shares)), abs=1e-14)


def test_rms_norm_adds_eps_to_the_mean_square() -> None:
    assert oracle.rms_norm(np.array([3.0, 4.0]), 12.5) == pytest.approx([3 / 5, 4 / 5], abs=1e-15)


# ---- rotary positions


def test_yarn_of_the_release_ramps_from_pair_15_to_pair_25_of_32() -> None:
    assert oracle.yarn_bounds(64, FLASH["compress_rope_theta"], FLASH["rope_scaling"]) == (15, 25)
    plain = 160000.0 ** (-np.arange(32) / 32)
    slowed = oracle.frequencies(FLASH, 4) / plain
    assert slowed[:16] == pytest.approx(np.ones(16), abs=1e-14)
    assert slowed[20] == pytest.approx((1 + 1 / 16) / 2, abs=1e-14)
    assert slowed[25:] == pytest.approx(np.full(7, 1 / 16), abs=1e-14)


def test_frequencies_without_compression_have_the_small_base_and_no_yarn() -> None:
    assert oracle.frequencies(FLASH, 0) == pytest.approx(10000.0 ** (-np.arange(32) / 32), abs=1e-15)


def test_yarn_of_the_tiny_document_is_neither_nothing_nor_everything() -> None:
    document = oracle.tiny_document()
    slowed = oracle.frequencies(document, 4) * 160000.0 ** (np.arange(8) / 8)
    assert slowed[0] == pytest.approx(1) and 1 / 16 < slowed[1] < 1 and slowed[-1] == pytest.approx(1 / 16)


def test_rope_turns_neighbours_of_the_last_dims_and_keeps_the_first() -> None:
    turned = oracle.rope(
        np.array([[7.0, 8.0, 1.0, 0.0, 0.0, 2.0]]), np.array([3]), np.array([math.pi / 6, 0])
    )
    assert turned[0] == pytest.approx([7, 8, 0, 1, 0, 2], abs=1e-15)


def test_rope_and_its_inverse_cancel() -> None:
    x, positions, speed = inputs(6, 2 * 40).reshape(6, 2, 40), np.arange(6) * 50, oracle.frequencies(FLASH, 4)
    speed = speed[:16]
    back = oracle.rope(oracle.rope(x, positions, speed), positions, speed, inverse=True)
    assert back == pytest.approx(x, abs=1e-13)


def test_rope_products_depend_on_the_distance_alone() -> None:
    q, k = inputs(2, 16)
    speed = oracle.frequencies(oracle.tiny_document(), 4)

    def product(at: int, other: int) -> float:
        return float(
            oracle.rope(q[None], np.array([at]), speed)[0] @ oracle.rope(k[None], np.array([other]), speed)[0]
        )

    assert product(210, 204) == pytest.approx(product(6, 0), abs=1e-12)
    assert abs(product(6, 0) - product(7, 0)) > 1e-3


# ---- attention


def test_window_holds_exactly_its_width_of_keys() -> None:
    assert tokens_that_see(5, ratio=0, num_tokens=20, window=6) == [5, 6, 7, 8, 9, 10]


def test_flat_entry_is_first_visible_to_the_last_token_of_its_group() -> None:
    assert tokens_that_see(8, ratio=8, num_tokens=20, window=2) == [8, 9, *range(15, 20)]


def test_overlap_entry_is_first_visible_to_the_last_token_of_its_group() -> None:
    assert tokens_that_see(4, ratio=4, num_tokens=16, window=1) == [4, *range(7, 16)]


def test_incomplete_group_makes_no_entry() -> None:
    assert tokens_that_see(9, ratio=8, num_tokens=15, window=1) == [9]


def test_sink_takes_its_share_of_the_softmax_and_gives_no_value() -> None:
    p, document = attention_of(0, num_attention_heads=1, o_groups=1)
    shown = oracle.attention({**p, "attn_sink": np.array([0.8])}, document, 0, inputs(1))
    alone = oracle.attention({**p, "attn_sink": np.array([-np.inf])}, document, 0, inputs(1))
    score = shown["q"][0, 0] @ shown["kv"][0] / math.sqrt(document["head_dim"])
    share = math.exp(score) / (math.exp(score) + math.exp(0.8))
    assert shown["out"] == pytest.approx(alone["out"] * share, abs=1e-14)


def test_query_heads_have_unit_mean_square() -> None:
    p, document = attention_of(0)
    q = oracle.attention(p, document, 0, inputs(3))["q"]
    assert np.mean(q * q, axis=-1) == pytest.approx(np.ones((3, 4)), abs=1e-4)


def test_groups_of_heads_are_projected_apart() -> None:
    p = {"wo_a.weight": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])}
    assert oracle.grouped(p, 2, np.array([[1.0, 10.0, 100.0, 1000.0]])).tolist() == [[21, 43, 6500, 8700]]


def entries_of(ratio: int, x: np.ndarray, **changes: np.ndarray) -> np.ndarray:
    """Entries of a compressor of width 20, of which the first 4 are not turned, with equal scores and unit norm."""
    channels, identity = (40, np.eye(20)) if ratio == 4 else (20, np.eye(20))
    wkv = np.concatenate([identity, 2 * identity]) if ratio == 4 else identity
    p = {
        "wkv.weight": wkv,
        "wgate.weight": np.zeros((channels, 20)),
        "ape": np.zeros((ratio, channels)),
        "norm.weight": np.ones(20),
    }
    return oracle.compressed({**p, **changes}, oracle.tiny_document(rms_norm_eps=0.0), ratio, x)


def unit(pooled: np.ndarray) -> np.ndarray:
    return pooled / np.sqrt(np.mean(pooled**2))


def test_flat_entry_of_equal_scores_is_the_mean_of_its_tokens_turned_to_the_first() -> None:
    x = inputs(16, 20)
    speed = oracle.frequencies(oracle.tiny_document(), 8)
    expected = oracle.rope(unit(x[8:16].mean(axis=0))[None], np.array([8]), speed)
    assert entries_of(8, x)[1] == pytest.approx(expected[0], abs=1e-13)


def test_overlap_entry_pools_first_channels_before_and_last_channels_of_its_own_group() -> None:
    x = inputs(8, 20)
    first, second = entries_of(4, x)
    assert first[:4] == pytest.approx(unit(2 * x[:4].mean(axis=0))[:4], abs=1e-13)
    assert second[:4] == pytest.approx(unit(x[:4].sum(axis=0) + 2 * x[4:].sum(axis=0))[:4], abs=1e-13)


def test_position_bias_is_added_by_place_in_the_group_to_both_halves() -> None:
    x, ape = inputs(8, 20), np.full((4, 40), -np.inf)
    ape[2] = 0  # only the third token of a group counts
    second = entries_of(4, x, ape=ape)[1]
    assert second[:4] == pytest.approx(unit(x[2] + 2 * x[6])[:4], abs=1e-13)


def test_indexer_with_room_for_all_picks_every_visible_entry() -> None:
    p, document = attention_of(4)
    picks = oracle.attention(p, document, 4, inputs(14))["picks"]
    assert picks.shape == (14, 3)
    assert picks[[2, 3, 7, 13]].tolist() == [[-1, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2]]


def test_indexer_with_little_room_picks_the_highest_relu_scores() -> None:
    p, document = attention_of(4)
    document["index_topk"], x = 2, inputs(40)
    shown = oracle.attention(p, document, 4, x)
    low = oracle.rms_norm(x @ p["wq_a.weight"].T, document["rms_norm_eps"]) * p["q_norm.weight"]
    keys = oracle.compressed(oracle.below(p, "indexer.compressor."), document, 4, x)
    q = (low[39] @ p["indexer.wq_b.weight"].T).reshape(1, 16, 32)
    q = oracle.rope(q, np.array([39]), oracle.frequencies(document, 4))[0]
    scores = [
        sum(
            float(p["indexer.weights_proj.weight"][head] @ x[39])
            * max(float(q[head] @ key), 0.0)
            / 32**0.5
            / 4
            for head in range(16)
        )
        for key in keys
    ]
    order = sorted(range(10), key=lambda entry: -scores[entry])
    assert shown["picks"][39].tolist() == sorted(order[:2])
    assert shown["pick_gap"][39] == pytest.approx(scores[order[1]] - scores[order[2]], abs=1e-12)
    assert np.isinf(shown["pick_gap"][:11]).all() and np.isfinite(shown["pick_gap"][11:]).all()


def test_best_of_equal_scores_are_the_lowest_indices() -> None:
    picks, gap = oracle.best(np.array([0.0, 1.0, 0.0, 0.0]), 3)
    assert picks.tolist() == [0, 1, 2] and gap == 0.0


def test_margin_is_the_smallest_gap_of_any_choice() -> None:
    shown = {
        "a.pick_gap": np.array([[np.inf, 0.5]]),
        "b.router_gap": np.array([[0.25]]),
        "b.out": np.zeros(1),
    }
    assert oracle.margin(shown) == 0.25


# ---- experts


def test_route_chooses_with_the_bias_and_weighs_without_it() -> None:
    document = oracle.tiny_document(n_routed_experts=4, routed_scaling_factor=2.5)
    p = {"weight": np.array([[0.0], [1.0], [2.0], [3.0]]), "bias": np.array([9.0, 0.0, 0.0, 0.0])}
    found = oracle.route(p, document, np.array([[1.0]]), np.array([0]))
    affinity = [math.sqrt(math.log1p(math.exp(logit))) for logit in (0.0, 3.0)]
    assert found["router_ids"].tolist() == [[0, 3]]
    assert found["router_weights"][0] == pytest.approx([2.5 * a / sum(affinity) for a in affinity], abs=1e-14)


def test_route_by_token_id_takes_the_experts_of_the_table_in_ascending_order() -> None:
    p = {"weight": np.zeros((4, 1)), "tid2eid": np.array([[0, 1], [3, 2]])}
    found = oracle.route(p, oracle.tiny_document(), np.ones((2, 1)), np.array([1, 0]))
    assert found["router_ids"].tolist() == [[2, 3], [0, 1]]
    assert found["router_weights"].tolist() == [[0.75, 0.75]] * 2


@pytest.mark.parametrize(
    ("gate", "up", "clamped"),
    [(50, 3, (10, 3)), (-50, 3, (-50, 3)), (2, 50, (2, 10)), (2, -50, (2, -10)), (-11, -11, (-11, -10))],
)
def test_swiglu_limits_the_gate_from_above_and_the_other_branch_on_both_sides(
    gate: float, up: float, clamped: tuple[float, float]
) -> None:
    p = {
        "w1.weight": np.array([[1.0, 0.0]]),
        "w3.weight": np.array([[0.0, 1.0]]),
        "w2.weight": np.ones((1, 1)),
    }
    found = oracle.swiglu(p, oracle.tiny_document(swiglu_limit=10.0), np.array([gate, up]), 0.5)
    g, u = clamped
    assert found == pytest.approx([0.5 * g * u / (1 + math.exp(-g))], rel=1e-13)


def test_swiglu_with_limit_zero_is_not_limited() -> None:
    p = {
        "w1.weight": np.array([[1.0, 0.0]]),
        "w3.weight": np.array([[0.0, 1.0]]),
        "w2.weight": np.ones((1, 1)),
    }
    found = oracle.swiglu(p, oracle.tiny_document(swiglu_limit=0.0), np.array([40.0, 40.0]), 1.0)
    assert found == pytest.approx([1600.0])


# ---- the whole


def whole(num_tokens: int, next_ids: np.ndarray | None = None, **changes: Any) -> oracle.Shown:
    document = oracle.tiny_document(**changes)
    ids = np.random.default_rng(3).integers(0, 128, (2, num_tokens))
    return oracle.forward(oracle.random_weights(document, 0), document, ids, next_ids)


def test_mtp_reads_the_token_that_follows_and_at_the_end_the_end_of_sequence() -> None:
    ids = np.random.default_rng(3).integers(0, 128, (2, 6))
    shifted = np.concatenate([ids[:, 1:], np.full((2, 1), 1)], axis=1)
    assert (whole(6)["mtp.0.logits"] == whole(6, shifted)["mtp.0.logits"]).all()
    other = whole(6, ids)
    assert (whole(6)["logits"] == other["logits"]).all()
    assert np.abs(whole(6)["mtp.0.logits"] - other["mtp.0.logits"]).max() > 0.1


def test_forward_of_a_batch_is_that_of_its_rows() -> None:
    document = oracle.tiny_document()
    weights, ids = oracle.random_weights(document, 0), np.arange(24).reshape(2, 12)
    both, second = oracle.forward(weights, document, ids), oracle.forward(weights, document, ids[1:])
    assert list(both) == list(second)
    assert all((both[name][1] == second[name][0]).all() for name in both)


def test_random_weights_are_held_exactly_by_float32_and_keep_their_values_when_other_shapes_change() -> None:
    weights = oracle.random_weights(oracle.tiny_document(), 0)
    other = oracle.random_weights(oracle.tiny_document(n_routed_experts=4), 0)
    for name, value in weights.items():
        assert value.dtype == (np.int64 if name.endswith("tid2eid") else np.float64), name
        assert (value == value.astype(np.float32)).all(), name
    assert (weights["layers.2.attn.wkv.weight"] == other["layers.2.attn.wkv.weight"]).all()


Change = Callable[[oracle.Document, dict[str, np.ndarray]], Any]
MECHANISMS: dict[str, Change] = {
    "limit": lambda document, _: document.update(swiglu_limit=0.0),
    "window": lambda document, _: document.update(sliding_window=17),
    "picks": lambda document, _: document.update(index_topk=7),
    "yarn": lambda document, _: document.update(rope_scaling=None),
    "base of compression": lambda document, _: document.update(compress_rope_theta=150000),
    "base": lambda document, _: document.update(rope_theta=9000),
    "rounds": lambda document, _: document.update(hc_sinkhorn_iters=2),
    "scaling": lambda document, _: document.update(routed_scaling_factor=1.6),
    "sinks": lambda _, weights: [weights[name].fill(-9.0) for name in weights if name.endswith("attn_sink")],
    "router bias": lambda _, weights: [
        weights[name].fill(0.0) for name in weights if name.endswith("e.bias")
    ],
    "position bias": lambda _, weights: [
        weights[name].fill(0.0) for name in weights if name.endswith("r.ape")
    ],
    "table": lambda _, weights: np.subtract(7, weights[TABLE], out=weights[TABLE]),
    "flat entries": lambda _, weights: weights["layers.3.attn.compressor.norm.weight"].fill(0.5),
}
TABLE = "layers.0.ffn.gate.tid2eid"


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_moves_the_logits_of_the_tiny_model(mechanism: str) -> None:
    document = oracle.tiny_document()
    weights = oracle.random_weights(document, 0)
    ids = np.random.default_rng(3).integers(0, 128, (1, 160))
    before = oracle.forward(weights, document, ids)["logits"]
    MECHANISMS[mechanism](document, weights)
    after = oracle.forward(weights, document, ids)["logits"]
    assert np.abs(after - before).max() > 0.01
