"""The oracle against transformers: two models written apart, one in float64, from the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import peer
import pytest
import torch

pytestmark = pytest.mark.slow  # transformers alone takes seconds to import

# Of the largest value of a tensor (about 8 for the streams, so 2e-5).  Two causes, both float32: the angle of position
# 300 is known to 1.5e-5, half a unit in the last place, and every sum on the way is rounded.  Measured: 1.6e-6.
# A mistake in a formula moves the logits by 1e-2 and more: see test_oracle.
CLOSE = 2.5e-6
CLOSE_BUT_ANGLES = 1e-6  # the oracle rounds its angles too, transformers rounds in few places; measured: 5e-7

DOCUMENTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "other ratio": {"compress_ratios": [8, 4, 8, 0, 0], "num_hash_layers": 2},
    "like pro": {
        "compress_ratios": [128, 128, 4, 128, 0],
        "routed_scaling_factor": 2.5,
        "hc_sinkhorn_iters": 3,
    },
    "no mtp, loose limit": {"num_nextn_predict_layers": 0, "swiglu_limit": 10.0, "num_hash_layers": 0},
}


def random_ids(num_tokens: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 128, (2, num_tokens))


def in_transformers(
    weights: dict[str, np.ndarray], document: oracle.Document, ids: np.ndarray, dtype: torch.dtype
) -> oracle.Shown:
    """Logits and the streams after every layer, under the oracle's names."""
    model, _ = peer.to_transformers(weights, document, dtype)
    shown: oracle.Shown = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _module, _args, out, number=number: shown.update({f"layers.{number}.out": out.numpy()})
        )
    with torch.no_grad():
        shown["logits"] = model(torch.from_numpy(ids)).logits.numpy()
    return shown


def assert_close(found: oracle.Shown, expected: oracle.Shown, within: float) -> None:
    for name, value in found.items():
        assert distance(value, expected[name]) < within, name


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in parts of the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("changes", DOCUMENTS.values(), ids=DOCUMENTS)
def test_oracle_equals_transformers_in_every_layer_and_in_the_logits(changes: dict[str, Any]) -> None:
    document = oracle.tiny_document(**changes)
    weights, ids = oracle.random_weights(document, 0), random_ids()
    expected = oracle.forward(weights, document, ids)
    assert oracle.margin(expected) > 5e-6  # no choice is a coin toss
    found = in_transformers(weights, document, ids, torch.float32)
    assert len(found) == 5
    assert_close(found, expected, CLOSE)


def test_oracle_with_angles_in_float32_equals_transformers_in_float64_closer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = oracle.tiny_document()
    weights, ids = oracle.random_weights(document, 0), random_ids()
    monkeypatch.setattr(oracle, "rope", rope_with_float32_angles)
    expected = oracle.forward(weights, document, ids)
    assert_close(in_transformers(weights, document, ids, torch.float64), expected, CLOSE_BUT_ANGLES)


def rope_with_float32_angles(
    x: np.ndarray, positions_S: np.ndarray, frequencies_R: np.ndarray, *, inverse: bool = False
) -> np.ndarray:
    """Each pair by a 2x2 rotation whose angle, cosine and sine are float32."""
    angles = np.multiply.outer(positions_S.astype(np.float32), frequencies_R.astype(np.float32))
    shape = (len(x), *[1] * (x.ndim - 2), len(frequencies_R))
    cos, sin = np.cos(angles).reshape(shape), np.sin(angles).reshape(shape) * (-1 if inverse else 1)
    y, first = x.copy(), x.shape[-1] - 2 * len(frequencies_R)
    even, odd = x[..., first::2], x[..., first + 1 :: 2]
    y[..., first::2], y[..., first + 1 :: 2] = even * cos - odd * sin, even * sin + odd * cos
    return y


def test_tiny_model_leaves_entries_out_and_fills_every_kind_of_layer() -> None:
    document = oracle.tiny_document()
    shown = oracle.forward(oracle.random_weights(document, 0), document, random_ids())
    assert shown["layers.2.attn.picks"].shape == (2, 300, 8)
    assert np.isfinite(shown["layers.2.attn.pick_gap"][:, 35:]).all()
    assert shown["layers.3.attn.entries"].shape == (2, 2, 32)
    assert np.isinf(shown["layers.0.ffn.router_gap"]).all()


def test_oracle_draft_block_equals_a_layer_of_transformers_that_is_fed_its_streams() -> None:
    document = oracle.tiny_document()
    weights, ids = oracle.random_weights(document, 0), random_ids(60)
    shown = oracle.forward(weights, document, ids)
    alone = {"embed.weight": weights["embed.weight"], "head.weight": weights["head.weight"]}
    for name, value in oracle.below(weights, "mtp.0.").items():
        if name.startswith(("norm.", "hc_head_")):
            alone[name] = value
        elif not name.startswith(("e_proj.", "h_proj.", "enorm.", "hnorm.")):
            alone[f"layers.0.{name}"] = value
    one_layer = {**document, "num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
    model, _ = peer.to_transformers(alone, one_layer, torch.float32)
    streams = torch.from_numpy(shown["mtp.0.in"]).float()
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: (streams, *args[1:]))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    assert distance(logits, shown["mtp.0.logits"]) < CLOSE


def test_oracle_draft_input_is_the_next_token_and_every_stream_each_through_its_norm() -> None:
    document = oracle.tiny_document()
    weights, ids = oracle.random_weights(document, 0), random_ids(5)
    shown = oracle.forward(weights, document, ids, next_ids=ids[:, ::-1])
    w = {name: torch.from_numpy(value) for name, value in oracle.below(weights, "mtp.0.").items()}
    rms_norm, linear = torch.nn.functional.rms_norm, torch.nn.functional.linear
    token = torch.from_numpy(
        weights["embed.weight"][ids[1, 1]]
    )  # at position 3 of 5, what follows is said to be 1
    token = linear(rms_norm(token, (64,), w["enorm.weight"], 1e-6), w["e_proj.weight"])
    streams = torch.from_numpy(shown["layers.3.out"][1, 3])
    streams = linear(rms_norm(streams, (64,), w["hnorm.weight"], 1e-6), w["h_proj.weight"])
    assert np.abs(shown["mtp.0.in"][1, 3] - (token + streams).numpy()).max() < 1e-12
