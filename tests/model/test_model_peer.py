"""Our model against the DeepSeek-V4 of transformers, and its gradients: against theirs, and against differences of the
oracle's loss for what transformers does not have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import peer
import pytest
import torch
from built import CLOSE, built, distances, expected, place_of, placed, shown

from dsv4model import trace_transformers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
]  # transformers alone takes seconds to import

CLOSE_OUTPUTS = 2e-5  # of logits and of the streams after a layer, which are at most 20; measured: 1.6e-5
CLOSE_GRADIENTS = (
    1e-5  # norm of the difference over norm; two float32 sums of some thousand terms; measured: 5.3e-6
)
# No input stands nearer to where a clamp, a ReLU or a choice of the best changes its mind, for there gradients jump;
# float32 moves what is compared by a tenth of it.
CLEAR = 2e-5
INDEXER = (
    "position_bias",
    "kv_proj.weight",
    "gate_proj.weight",
    "kv_norm.weight",
    "q_b_proj.weight",
    "scorer.weights_proj.weight",
)


class Case(NamedTuple):
    document: dict[str, Any]
    weights: dict[str, np.ndarray]
    ids: np.ndarray


def case_of(seed: int, rows: int, length: int, **changes: Any) -> Case:
    document = oracle.tiny_document(**changes)
    ids = np.random.default_rng(seed).integers(0, document["vocab_size"], (rows, length))
    return Case(document, oracle.random_weights(document, seed), ids)


# ---- values

OUTPUTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "other flat ratio": {"compress_ratios": [8, 4, 8, 0, 0], "num_hash_layers": 2},
    "like pro": {
        "compress_ratios": [128, 128, 4, 128, 0],
        "routed_scaling_factor": 2.5,
        "hc_sinkhorn_iters": 3,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("changes", OUTPUTS.values(), ids=OUTPUTS)
def test_model_shows_what_transformers_computes(changes: dict[str, Any], dtype: torch.dtype) -> None:
    case = case_of(0, 2, 300, num_nextn_predict_layers=0, **changes)
    assert oracle.margin(oracle.forward(case.weights, case.document, case.ids)) > 5e-6
    theirs, _ = peer.to_transformers(case.weights, case.document, dtype)
    truth = {
        name: value.numpy()
        for name, value in trace_transformers.record(theirs, torch.from_numpy(case.ids)).items()
    }
    found = shown(built(case.weights, case.document, dtype), case.ids)
    off = distances(found, truth)
    assert max(off.values()) < CLOSE, max(off, key=lambda name: off[name])
    outputs = [name for name in found if name == "logits" or (name.count(".") == 2 and name.endswith(".out"))]
    assert len(outputs) == 5
    for name in outputs:
        assert np.abs(found[name] - truth[name]).max() < CLOSE_OUTPUTS, name


# ---- gradients


def clamp_margin(case: Case, truth: oracle.Shown) -> float:
    """How near an input of a clamp is to its limit, of the experts that tokens do go to."""
    limit, nearest = case.document["swiglu_limit"], np.inf
    for block in {name.removesuffix("ffn.in") for name in truth if name.endswith("ffn.in")}:
        x, ids = truth[f"{block}ffn.in"], truth[f"{block}ffn.router_ids"]
        seen = {f"experts.{e}": x[(ids == e).any(axis=-1)] for e in range(case.document["n_routed_experts"])}
        for expert, rows in {**seen, "shared_experts": x.reshape(-1, x.shape[-1])}.items():
            gate, up = (rows @ case.weights[f"{block}ffn.{expert}.{w}.weight"].T for w in ("w1", "w3"))
            far = np.concatenate([np.abs(gate - limit).ravel(), np.abs(np.abs(up) - limit).ravel()])
            nearest = min(nearest, far.min(initial=np.inf))
    return float(nearest)


GRADIENTS: dict[str, tuple[int, dict[str, Any]]] = {
    # Seeds whose cases are clear, and where no gradient of a single number is nothing but a difference of large sums.
    "flash": (14, {"swiglu_limit": 2.0}),
    "other flat ratio": (13, {"swiglu_limit": 2.0, "compress_ratios": [8, 4, 8, 0, 0], "num_hash_layers": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_equal_those_of_transformers_in_every_parameter(kind: str, dtype: torch.dtype) -> None:
    seed, changes = GRADIENTS[kind]
    case = case_of(seed, 1, 140, num_nextn_predict_layers=0, **changes)
    truth = expected(case.weights, case.document, case.ids)
    assert min(oracle.margin(truth), clamp_margin(case, truth)) > CLEAR
    cotangent = torch.randn(truth["logits"].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, ours = torch.from_numpy(case.ids), built(case.weights, case.document, dtype)
    theirs, _ = peer.to_transformers(case.weights, case.document, dtype)
    (ours(ids).logits * cotangent).sum().backward()
    (theirs(ids).logits * cotangent).sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert set(found) == set(wanted)
    none = {name for name, grad in found.items() if grad is None}
    assert none == {name for name, grad in wanted.items() if grad is None} == indexers(case.document)
    off = {
        name: float((found[name] - wanted[name]).norm() / wanted[name].norm())
        for name in sorted(set(found) - none)
    }
    assert max(off.values()) < CLOSE_GRADIENTS, max(off, key=lambda name: off[name])


def indexers(document: dict[str, Any]) -> set[str]:
    """The parameters whose only use is a choice."""
    layers = [layer for layer, ratio in enumerate(document["compress_ratios"]) if ratio == 4]
    return {f"model.layers.{n}.self_attn.compressor.indexer.{leaf}" for n in layers for leaf in INDEXER}


# ---- gradients with an MTP block: differences of the oracle's loss, along a random direction for each parameter

STEP = 3e-6  # times a direction as large as the parameter: its square is left out, rounding is divided by it
CLOSE_SLOPES = 1e-6  # of a slope; measured: 2.3e-7 where one is 4e-4, and 1e-8 elsewhere
SMALL_SEED = 11
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "compress_ratios": [0, 4, 8, 0], "q_lora_rank": 16, "head_dim": 16,
    "qk_rope_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 12, "vocab_size": 40, "index_topk": 4,
    "sliding_window": 5, "swiglu_limit": 1.0,
}  # fmt: skip
OF_MAIN_ONLY = {"model.norm.weight", "model.hc_head.hc_fn", "model.hc_head.hc_base", "model.hc_head.hc_scale"}


class Slopes(NamedTuple):
    """By parameter, how two losses change along its direction: of the logits, of the MTP block's."""

    main: dict[str, float]
    mtp: dict[str, float]


class Losses(NamedTuple):
    """The directions, and the weights with which logits and the MTP block's logits are summed."""

    directions: dict[str, np.ndarray]
    main: np.ndarray
    mtp: np.ndarray


@pytest.fixture(scope="module")
def small() -> Case:
    case = case_of(SMALL_SEED, 1, 27, **SMALL)
    truth = expected(case.weights, case.document, case.ids)
    assert (truth["layers.1.attn.picks"] != -1).sum(axis=-1).max() == 4  # of 6 entries
    assert min(oracle.margin(truth), clamp_margin(case, truth)) > 100 * STEP
    return case


@pytest.fixture(scope="module")
def losses(small: Case) -> Losses:
    random = np.random.default_rng(0)
    shape = (*small.ids.shape, small.document["vocab_size"])
    directions = {
        name: random.standard_normal(value.shape) * np.abs(value).mean()
        for name, value in small.weights.items()
        if not name.endswith(("tid2eid", "gate.bias"))
    }
    return Losses(directions, *(random.standard_normal(shape) / 30 for _ in range(2)))


@pytest.fixture(scope="module")
def oracles(small: Case, losses: Losses) -> Slopes:
    slopes = Slopes({}, {})
    for parameter in {place_of(name).name for name in losses.directions}:
        ends = []
        for step in (STEP, -STEP):
            moved = {
                name: small.weights[name] + step * direction
                for name, direction in losses.directions.items()
                if place_of(name).name == parameter
            }
            truth = expected(small.weights | moved, small.document, small.ids)
            ends.append((truth["logits"] * losses.main, truth["mtp.0.logits"] * losses.mtp))
        for slope, above, below in zip(slopes, *ends, strict=True):
            slope[parameter] = float((above - below).sum() / (2 * STEP))
    return slopes


@pytest.mark.parametrize("which", [0, 1], ids=["logits", "mtp logits"])
def test_gradients_are_the_slopes_of_the_oracles_loss_in_every_parameter(
    which: int, small: Case, losses: Losses, oracles: Slopes
) -> None:
    model, along = built(small.weights, small.document), placed(losses.directions)
    logits = model(torch.from_numpy(small.ids))[which]
    (logits * torch.from_numpy((losses.main, losses.mtp)[which])).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(gradients) == set(oracles[which]) == set(along)
    not_reached = OF_MAIN_ONLY if which else {name for name in gradients if name.startswith("mtp.")}
    none = {name for name, grad in gradients.items() if grad is None}
    assert none == indexers(small.document) | not_reached
    assert {oracles[which][name] for name in none} == {0.0}
    slopes = {name: float((gradients[name] * along[name]).sum()) for name in gradients if name not in none}
    off = {name: abs(slope / oracles[which][name] - 1) for name, slope in slopes.items()}
    assert max(off.values()) < CLOSE_SLOPES, max(off, key=lambda name: off[name])
