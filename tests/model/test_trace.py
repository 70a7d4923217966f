"""What is recorded of a pass: names, order, both implementations against the numpy oracle; nothing is left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from tiny_model import random_weights, tiny_document
from torch import Tensor, nn

from dsv4ckpt import inventory
from dsv4ckpt.errors import Environment, Usage
from dsv4ckpt.names import Experts, Namespace
from dsv4model import parity, trace, trace_transformers
from dsv4model.config import Config
from dsv4model.layers import Module
from dsv4model.model import Model

LENGTH = 150  # one entry of ratio 128; 37 of ratio 4, of which the indexer picks 8
IDS = torch.from_numpy(np.random.default_rng(5).integers(0, 128, (2, LENGTH)))
TOLERANCE = parity.Tolerance(
    atol=1e-4, rtol=1e-4
)  # float32 against float64, through four layers of gains above 1


pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(NamedTuple):
    document: dict[str, Any]
    weights: dict[str, np.ndarray]

    @property
    def config(self) -> Config:
        return Config.read(self.document)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    document = tiny_document(hc_eps=0.01)  # large enough to be seen
    return Tiny(document, random_weights(document, seed=3))


@pytest.fixture(scope="module")
def ours(tiny: Tiny) -> Model:
    """The released tensors, placed by the rename tables."""
    model = Model(tiny.config)
    state = model.state_dict()
    table = inventory.PREVIEW.table
    for name, value in tiny.weights.items():
        match = table.match(name)
        assert match is not None
        place = table.place(match, Namespace.TRANSFORMERS, Experts.FUSED)
        target = state[place.name]
        if place.parts_per_expert:
            expert, part = divmod(place.number, place.parts_per_expert)
            rows = value.shape[0]
            target = target[expert, part * rows : (part + 1) * rows]
        target.copy_(torch.from_numpy(value))
    return model


@pytest.fixture(scope="module")
def theirs(tiny: Tiny) -> nn.Module:
    import peer

    return peer.to_transformers(tiny.weights, tiny.document)[0]


@pytest.fixture(scope="module")
def truth(tiny: Tiny) -> dict[str, Tensor]:
    """In float64, by numpy."""
    shown = oracle.forward(tiny.weights, tiny.document, IDS.numpy())
    return {name: torch.from_numpy(value) for name, value in shown.items() if not name.endswith("_gap")}


def differing(found: dict[str, Tensor], truth: dict[str, Tensor]) -> list[parity.Row]:
    rows = parity.compare(found, truth, TOLERANCE)
    return [row for row in rows if row.verdict not in (parity.Verdict.EQUAL, parity.Verdict.CLOSE)]


# ---- names


def test_prefix_of_a_module_is_where_its_names_stand() -> None:
    assert trace.prefix_of("") == trace.prefix_of("model") == ""
    assert trace.prefix_of("model.layers.3") == "layers.3."
    assert trace.prefix_of("model.layers.3.self_attn") == "layers.3.attn."
    assert trace.prefix_of("model.layers.13.mlp") == "layers.13.ffn."
    assert trace.prefix_of("model.layers.0.ffn_hc") == "layers.0.ffn_hc."
    assert trace.prefix_of("mtp.0.self_attn") == "mtp.0.attn."


@pytest.mark.slow
def test_names_are_the_oracles_names_in_order(tiny: Tiny, truth: dict[str, Tensor]) -> None:
    assert trace.names(tiny.config) == list(truth)


def test_names_follow_ratios_and_mtp() -> None:
    config = Config.read(tiny_document(num_nextn_predict_layers=0, compress_ratios=[0, 128, 4, 4]))
    names = trace.names(config)
    assert not [name for name in names if name.startswith("mtp.")]
    assert [name for name in names if name.endswith("entries")] == [
        f"layers.{n}.attn.entries" for n in (1, 2, 3)
    ]
    assert [name for name in names if name.endswith("picks")] == [
        "layers.2.attn.picks",
        "layers.3.attn.picks",
    ]
    assert len(names) == len(set(names))


# ---- our model


@pytest.mark.slow
def test_record_of_our_model_is_the_oracles(ours: Model, truth: dict[str, Tensor]) -> None:
    found = trace.record(ours, IDS)
    assert list(found) == list(truth)
    assert differing(found, truth) == []


@pytest.fixture(scope="module")
def short(ours: Model) -> dict[str, Tensor]:
    return trace.record(ours, IDS[:, :9])


def test_record_changes_nothing_of_the_pass(ours: Model, short: dict[str, Tensor]) -> None:
    with torch.no_grad():
        out = ours.eval()(IDS[:, :9])
    assert torch.equal(out.logits, short["logits"])
    assert torch.equal(out.mtp_logits, short["mtp.0.logits"])


def test_record_takes_the_next_tokens_for_the_mtp_block(ours: Model, short: dict[str, Tensor]) -> None:
    found = trace.record(ours, IDS[:, :9], IDS[:, 1:10])
    names = [name for name in short if not torch.equal(found[name], short[name])]
    assert names[0] == "mtp.0.in"
    assert torch.equal(found["mtp.0.in"][:, :-1], short["mtp.0.in"][:, :-1]), (
        "only the last position has another"
    )


def test_record_keeps_what_is_wanted(ours: Model, short: dict[str, Tensor]) -> None:
    found = trace.record(ours, IDS[:, :9], wanted=lambda name: name.endswith(".out"))
    assert list(found) == [name for name in short if name.endswith(".out")]
    assert all(torch.equal(found[name], short[name]) for name in found)


def test_recorded_tensors_are_copies(ours: Model) -> None:
    """What stands in a record does not change with the tensor that was shown."""
    shown = torch.zeros(3)

    class Shows(Module):
        def forward(self, ids: Tensor, next_ids: Tensor | None) -> None:
            self.show("early", shown)
            shown.add_(1)
            self.show("late", shown.expand(2, 3))

    found = trace.record(Shows(), IDS)
    assert found["early"].tolist() == [0, 0, 0]
    assert found["late"].is_contiguous()
    assert not found["late"].requires_grad


def test_nobody_watches_after_a_record(ours: Model) -> None:
    trace.record(ours, IDS[:, :5])
    assert {module.watcher for module in ours.modules() if isinstance(module, Module)} == {None}


def test_earlier_watchers_are_back_even_after_an_error(ours: Model) -> None:
    heard: list[str] = []

    def listener(name: str, tensor: Tensor) -> None:
        heard.append(name)

    attention = ours.get_submodule("model.layers.1.self_attn")
    assert isinstance(attention, Module)
    attention.watcher = listener
    ours.train()
    try:
        with pytest.raises(Usage):
            trace.record(ours, IDS + 128)
        assert attention.watcher is listener
        assert ours.training
    finally:
        attention.watcher = None
        ours.eval()
    assert heard == []


# ---- transformers


@pytest.fixture(scope="module")
def theirs_recorded(theirs: nn.Module) -> dict[str, Tensor]:
    return trace_transformers.record(theirs, IDS)


@pytest.mark.slow
def test_record_of_transformers_is_the_oracles(
    theirs_recorded: dict[str, Tensor], truth: dict[str, Tensor], tiny: Tiny
) -> None:
    assert list(theirs_recorded) == [name for name in trace.names(tiny.config) if not name.startswith("mtp.")]
    assert differing(theirs_recorded, truth) == []


@pytest.mark.slow
def test_records_of_both_have_the_same_dtypes(ours: Model, theirs_recorded: dict[str, Tensor]) -> None:
    found = trace.record(ours, IDS)
    assert {name: found[name].dtype for name in theirs_recorded} == {
        name: tensor.dtype for name, tensor in theirs_recorded.items()
    }


@pytest.mark.slow
def test_transformers_record_keeps_what_is_wanted(theirs: nn.Module) -> None:
    found = trace_transformers.record(theirs, IDS[:, :9], wanted=lambda name: "picks" in name)
    assert list(found) == ["layers.2.attn.picks"]


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("ids", [IDS[:, :5], IDS + 128], ids=["a pass", "an error"])
def test_no_hook_is_left_on_transformers(theirs: nn.Module, ids: Tensor) -> None:
    before = hooks_on(theirs)
    try:
        trace_transformers.record(theirs, ids)
    except IndexError:
        assert int(ids.max()) > 127
    assert hooks_on(theirs) == before


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Environment, match="transformers") as told:
        trace_transformers.load("nowhere", {}, torch.float32)
    assert "pip install" in told.value.facts["do"]


@pytest.mark.parametrize(
    ("document", "dtype", "word"),
    [
        ({}, torch.float64, "float32 or bfloat16"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, torch.float32, "BF16"),
        ({"quantization_config": {"quant_method": "fp8", "quant_algo": "MIXED"}}, torch.float32, "BF16"),
    ],
)
def test_what_transformers_cannot_do_is_refused(
    document: dict[str, Any], dtype: torch.dtype, word: str
) -> None:
    with pytest.raises(Usage) as told:
        trace_transformers.load("nowhere", document, dtype)
    assert word in told.value.facts["expected"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ImportError("Using `x` requires accelerate\nmore"), "pip install accelerate"),
        (RuntimeError("size mismatch"), "--to bf16"),
    ],
)
def test_failure_of_transformers_is_told_as_its_own(
    error: Exception, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.DeepseekV4ForCausalLM, "from_pretrained", fail)
    verbosity = transformers.utils.logging.get_verbosity()
    with pytest.raises(Environment) as told:
        trace_transformers.load("nowhere", {}, torch.float32)
    assert word in told.value.facts["do"]
    assert str(error).partition("\n")[0] in told.value.facts["found"]
    assert transformers.utils.logging.get_verbosity() == verbosity


# ---- forms


def test_picks_ascend_and_end_with_minus_one() -> None:
    picks = torch.tensor([[3, -1, 0], [-1, -1, -1], [2, 1, 5]], dtype=torch.int32)
    assert trace.sorted_picks(picks).tolist() == [[0, 3, -1], [-1, -1, -1], [1, 2, 5]]
    assert trace.sorted_picks(picks).dtype == torch.int64
    assert trace.sorted_picks(picks[:, :0]).shape == (3, 0)


def test_routes_ascend_and_take_their_weights_along() -> None:
    ids, weights = trace.sorted_routes(torch.tensor([[5, 0, 3]]), torch.tensor([[0.5, 0.1, 0.3]]))
    assert ids.tolist() == [[0, 3, 5]]
    assert torch.equal(weights, torch.tensor([[0.1, 0.3, 0.5]]))


def listed(check: Callable[[str], bool]) -> list[str]:
    return [name for name in trace.names(Config.read(tiny_document())) if check(name)]


def test_everything_is_everything() -> None:
    assert listed(trace.everything) == trace.names(Config.read(tiny_document()))
