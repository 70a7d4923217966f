"""Our model against the oracle, tensor by tensor: in float64 to the last digits, in float32 as its angles allow."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from built import CLOSE, CLOSE_LOGITS, EXACT, built, distances, expected, first_difference, shown

from dsv4model import trace
from dsv4model.config import Config

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS: dict[str, dict[str, Any]] = {
    "flash": {},  # ratios 0 0 4 128, hash then score, YaRN, clamps that bind, an MTP block
    "like pro": {
        "compress_ratios": [128, 128, 4, 128, 0],
        "routed_scaling_factor": 2.5,
        "hc_sinkhorn_iters": 3,
        "hc_eps": 0.01,
        "rms_norm_eps": 0.01,
    },
    "other flat ratio": {"compress_ratios": [8, 4, 8, 4, 0], "num_hash_layers": 3, "sliding_window": 5},
    "other widths": {
        "hidden_size": 48, "num_attention_heads": 6, "head_dim": 20, "qk_rope_head_dim": 8, "o_groups": 3,
        "o_lora_rank": 10, "q_lora_rank": 24, "n_routed_experts": 5, "num_experts_per_tok": 3, "hc_mult": 3,
        "moe_intermediate_size": 12, "index_n_heads": 24, "index_head_dim": 12, "index_topk": 5, "vocab_size": 90,
    },
    "no limit, no yarn, no mtp": {
        "swiglu_limit": 0.0, "rope_scaling": None, "num_nextn_predict_layers": 0, "num_hash_layers": 0,
        "compress_ratios": [4, 0, 4, 128],
    },
}  # fmt: skip
ROWS, LENGTH = 2, 301


class Case(NamedTuple):
    document: dict[str, Any]
    weights: dict[str, np.ndarray]
    ids: np.ndarray
    truth: oracle.Shown


_cases: dict[str, Case] = {}


@pytest.fixture(params=DOCUMENTS)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def case_of(name: str) -> Case:
    """Made once."""
    if name not in _cases:
        document = oracle.tiny_document(**DOCUMENTS[name])
        weights = oracle.random_weights(document, seed=7)
        ids = np.random.default_rng(7).integers(0, document["vocab_size"], (ROWS, LENGTH))
        _cases[name] = Case(document, weights, ids, expected(weights, document, ids))
    return _cases[name]


@pytest.mark.slow
def test_flash_case_has_every_kind_of_layer_and_a_choice_that_leaves_entries_out() -> None:
    document, _, _, truth = case_of("flash")
    assert document["compress_ratios"] == [0, 0, 4, 128, 0] and document["rope_scaling"]["factor"] == 16
    assert truth["layers.2.attn.picks"].shape == (ROWS, LENGTH, 8)
    assert np.isfinite(truth["layers.2.attn.pick_gap"][:, 36:]).all()  # 9 entries and more, 8 of them picked
    assert truth["layers.3.attn.entries"].shape[1] == 2
    assert np.isinf(truth["layers.0.ffn.router_gap"]).all()  # by token id
    assert np.isfinite(truth["layers.1.ffn.router_gap"]).all()  # by score


@pytest.mark.slow
def test_no_choice_of_a_case_is_a_coin_toss(case: Case) -> None:
    assert oracle.margin(case.truth) > 5e-6  # float32 moves scores by less


@pytest.mark.slow
def test_model_in_float64_shows_what_the_oracle_shows(case: Case) -> None:
    found = shown(built(case.weights, case.document), case.ids)
    assert list(found) == trace.names(Config.read(case.document))
    assert {value.dtype for value in found.values()} == {np.dtype(np.float64), np.dtype(np.int64)}
    assert first_difference(found, case.truth, EXACT) is None


@pytest.mark.slow
def test_model_in_float32_shows_what_the_oracle_shows_but_for_its_own_rounding(case: Case) -> None:
    found = shown(built(case.weights, case.document, torch.float32), case.ids)
    truth = oracle.forward(case.weights, case.document, case.ids)  # with frequencies of its own
    off = distances(found, truth)
    assert max(off.values()) < CLOSE, max(off, key=lambda name: off[name])
    assert np.abs(found["logits"] - truth["logits"]).max() < CLOSE_LOGITS
    assert all(
        (value == truth[name]).all()
        for name, value in found.items()
        if name.endswith(("picks", "router_ids"))
    )


@pytest.mark.slow
def test_model_unwatched_returns_the_logits_that_it_shows(case: Case) -> None:
    model = built(case.weights, case.document)
    with torch.no_grad():
        logits, mtp_logits = model(torch.from_numpy(case.ids))
    assert np.abs(logits.numpy() - case.truth["logits"]).max() < EXACT
    if "mtp.0.logits" in case.truth:
        assert np.abs(mtp_logits.numpy() - case.truth["mtp.0.logits"]).max() < EXACT
    else:
        assert mtp_logits is None


@pytest.mark.slow
def test_model_with_next_ids_predicts_from_them_and_by_default_from_the_ids_shifted_left() -> None:
    document, weights, ids, _ = case_of("flash")
    ids = ids[:, :40]
    other = np.random.default_rng(8).integers(0, document["vocab_size"], ids.shape)
    shifted = np.concatenate([ids[:, 1:], np.full((ROWS, 1), document["eos_token_id"])], axis=1)
    model = built(weights, document)
    for following in (other, shifted):
        truth = expected(weights, document, ids, following)
        assert first_difference(shown(model, ids, following), truth, EXACT) is None
    assert first_difference(shown(model, ids), truth, EXACT) is None
    assert first_difference(shown(model, ids, other), truth, EXACT) == "mtp.0.in"


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9])
def test_model_of_few_tokens_shows_what_the_oracle_shows(length: int) -> None:
    """With no entry, with the first one, and with a tail that waits."""
    document = oracle.tiny_document(**DOCUMENTS["other flat ratio"])
    weights = oracle.random_weights(document, seed=7)
    ids = np.random.default_rng(length).integers(0, document["vocab_size"], (ROWS, length))
    truth = expected(weights, document, ids)
    assert first_difference(shown(built(weights, document), ids), truth, EXACT) is None
