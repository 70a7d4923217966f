"""The comparison with the oracle can fail: wrong models, many of which somebody has shipped, and where each is noticed.

A mutant is a private copy of dsv4model, in memory, with passages of one module replaced.  It has to differ from the
oracle, and first in the tensor that its mistake makes; copies that compute the same have to agree.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
from built import built, expected, first_difference, shown

import dsv4model

pytestmark = pytest.mark.usefixtures("one_thread")

PRODUCT = Path(dsv4model.__file__).parent
COPY = "dsv4model_mutant"
TOLERANCE = 1e-10  # a right model is 1e-14 away, the least of the mistakes below 1e-7
DOCUMENT = oracle.tiny_document(
    num_hidden_layers=3,
    compress_ratios=[0, 4, 8, 0],
    sliding_window=6,
    index_topk=3,
    swiglu_limit=0.5,
    hc_eps=0.01,  # large enough that it matters where it is added
)


class Edit(NamedTuple):
    """A passage that stands exactly once in its module, and what replaces it."""

    passage: str
    instead: str


class Mutant(NamedTuple):
    """A wrong model."""

    mistake: str
    module: str
    noticed_at: str | None  # None: it computes the same
    edits: tuple[Edit, ...]


def mutant(mistake: str, module: str, noticed_at: str | None, *texts: str) -> Mutant:
    """texts  passage, replacement, passage, replacement ..."""
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Mutant(mistake, module, noticed_at, tuple(Edit(*pair) for pair in pairs))


MUTANTS = (
    # ---- streams
    mutant(
        "comb not transposed",
        "hyper", "layers.0.ffn_hc.pre",
        "comb.mT @ wide(streams)", "comb @ wide(streams)",
    ),
    mutant(
        "post without the factor 2",
        "hyper", "layers.0.attn_hc.post",
        "post = 2 * torch.sigmoid(", "post = torch.sigmoid(",
    ),
    mutant(
        "eps in post",
        "hyper", "layers.0.attn_hc.post",
        "torch.sigmoid(to_post * scale[1] + base_post)", "(torch.sigmoid(to_post * scale[1] + base_post) + self.eps)",
    ),
    mutant(
        "no eps in pre",
        "hyper", "layers.0.attn_hc.pre",
        "torch.sigmoid(to_pre * scale[0] + base_pre) + self.eps", "torch.sigmoid(to_pre * scale[0] + base_pre)",
    ),
    mutant(
        "comb of sigmoids",
        "hyper", "layers.0.attn_hc.comb",
        "torch.softmax(logits_JKT, 1) + eps", "torch.sigmoid(logits_JKT) + eps",
    ),
    mutant(
        "Sinkhorn begins with rows",
        "hyper", "layers.0.attn_hc.comb",
        "return [0] + [1, 0]", "return [1] + [0, 1]",
    ),
    mutant(
        "one round of Sinkhorn too many",
        "hyper", "layers.0.attn_hc.comb",
        "(iters - 1)", "iters",
    ),
    mutant(
        "no eps in the last collapse",
        "hyper", "final.collapsed",
        "pre = torch.sigmoid(mixes * wide(self.hc_scale) + wide(self.hc_base)) + self.eps",
        "pre = torch.sigmoid(mixes * wide(self.hc_scale) + wide(self.hc_base))",
    ),
    mutant(
        "norms with eps outside the root",
        "layers", "layers.0.attn_hc.pre",
        "torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)",
        "1 / (wide(x).square().mean(-1, keepdim=True).sqrt() + eps)",
    ),
    # ---- rotary positions
    mutant(
        "halves rotated instead of neighbours",
        "rope", "layers.0.attn.q",
        "pairs = _pairs(wide(x[..., still:])) *",
        "pairs = torch.view_as_complex(wide(x[..., still:]).unflatten(-1, (2, -1)).mT.contiguous()) *",
        "torch.view_as_real(pairs).flatten(-2)", "torch.view_as_real(pairs).mT.flatten(-2)",
        "_pairs(x[..., x.shape[-1] - 2 * turn.cis.shape[-1] :]).mul_(_for_heads(turn, x))", "x.copy_(rotate(x, turn))",
    ),
    mutant(
        "one base for all layers",
        "rope", "layers.1.attn.q",
        "_plain(config.rope_dim, config.compress_theta)", "_plain(config.rope_dim, config.rope_theta)",
    ),
    mutant(
        "the base of window layers for queries and window keys of layers with compression",
        "attention", "layers.1.attn.q",
        "turn(packing.positions, inv_freq, dtype)", "turn(packing.positions, frequencies(config, 0), dtype)",
    ),
    mutant(
        "YaRN in layers without compression",
        "rope", "layers.0.attn.q",
        "        return _plain(config.rope_dim, config.rope_theta)\n",
        "        plain = _plain(config.rope_dim, config.rope_theta)\n"
        "        return plain if config.yarn is None else _stretched(plain, config.rope_theta, config.yarn)\n",
    ),
    mutant(
        "no YaRN",
        "rope", "layers.1.attn.q",
        "return inv_freq if config.yarn is None else _stretched(inv_freq, config.compress_theta, config.yarn)",
        "return inv_freq",
    ),
    mutant(
        "YaRN's attention factor",
        "attention", "layers.1.attn.q",
        "return cls(packing, turn(packing.positions, inv_freq, dtype), groups, entry_turn)",
        "factor = 0.1 * torch.log(torch.tensor(config.yarn.factor)) + 1 if ratio and config.yarn else 1\n"
        "        return cls(packing, Turn(turn(packing.positions, inv_freq, dtype).cis * factor), groups, entry_turn)",
    ),
    mutant(
        "entries at the last position of their group",
        "packing", "layers.1.attn.entries",
        "device=device)[None] * ratio", "device=device)[None] * ratio + ratio - 1",
    ),
    # ---- attention
    mutant(
        "query heads not normalized",
        "attend", "layers.0.attn.q",
        "rotate(unit_rms(q_BSND, eps)", "rotate(q_BSND",
        "(wide(self.projected) * self.inverse).to(q.dtype)", "self.projected",
    ),
    mutant(
        "a window of one more",
        "attend", "layers.0.attn.out",
        "own - view.window + 1)", "own - view.window)",
    ),
    mutant(
        "no sinks",
        "attend", "layers.0.attn.out",
        "scores[..., -1] = self.sinks", 'scores[..., -1] = float("-inf")',
    ),
    mutant(
        "values stay rotated",
        "attend", "layers.0.attn.out",
        "= rotate_(mixed, chunk.turn.back())", "= mixed",
    ),
    mutant(
        "window and entries under a softmax each",
        "attend", "layers.1.attn.out",
        "        return torch.softmax(scores, -1)\n",
        "        if num_keys + 1 == scores.shape[-1]:\n"
        "            return torch.softmax(scores, -1)\n"
        "        sink = scores[..., -1:]\n"
        "        keys = torch.softmax(torch.cat((scores[..., :num_keys], sink), -1), -1)[..., :-1]\n"
        "        return torch.cat((keys, torch.softmax(scores[..., num_keys:], -1)), -1)\n",
    ),
    mutant(
        "heads dealt out to the groups",
        "attention", "layers.0.attn.out",
        "out.flatten(2).unflatten(-1, (config.o_groups, -1))",
        "out.unflatten(2, (-1, config.o_groups)).transpose(2, 3).flatten(3)",
    ),
    # ---- compression
    mutant(
        "entries seen one token early",
        "packing", "layers.1.attn.picks",
        "end = (self.positions + 1) // ratio", "end = (self.positions + 2) // ratio",
    ),
    mutant(
        "flat entries seen one token early",
        "attention", "layers.2.attn.out",
        "first=groups.first, end=groups.end)",
        "first=groups.first, end=(setting.packing.positions + 2) // groups.ratio)",
    ),
    mutant(
        "an indexer that looks ahead",
        "compressor", "layers.1.attn.picks",
        "(entry < first) | (entry >= end) | scores.isnan()", "(entry < first) | scores.isnan()",
    ),
    mutant(
        "index scores without ReLU",
        "compressor", "layers.1.attn.picks",
        "torch.relu(dots)", "dots",
    ),
    mutant(
        "no overlap",
        "compressor", "layers.1.attn.entries",
        "torch.cat((torch.full_like(early[:, :1], nothing), early[:, :-1]), 1)", "torch.full_like(early, nothing)",
    ),
    mutant(
        "halves of an overlap the other way round",
        "compressor", "layers.1.attn.entries",
        "early, late = x_BTrC.chunk(2, -1)", "late, early = x_BTrC.chunk(2, -1)",
    ),
    mutant(
        "the first entry shares with the nothing before it",
        "compressor", "layers.1.attn.entries",
        '_with_previous(gate_BTrC, follows, float("-inf"))', "_with_previous(gate_BTrC, follows, 0.0)",
    ),
    mutant(
        "no position bias",
        "compressor", "layers.1.attn.entries",
        "groups.take(gate) + wide(self.position_bias)", "groups.take(gate)",
    ),
    mutant(
        "one weight per token for all channels",
        "compressor", "layers.1.attn.entries",
        "torch.softmax(gate_BTrC, 2)", "torch.softmax(gate_BTrC.mean(-1, keepdim=True), 2)",
    ),
    # ---- experts
    mutant(
        "shared expert not clamped",
        "moe", "layers.0.ffn.out",
        "self.limit = config.swiglu_limit if config.clamps_shared else 0.0", "self.limit = 0.0",
    ),
    mutant(
        "routed experts not clamped",
        "moe", "layers.0.ffn.experts",
        "= config.swiglu_limit, simulation", "= 0.0, simulation",
    ),
    mutant(
        "gate clamped on both sides",
        "moe", "layers.0.ffn.experts",
        "gate.clamp(max=limit)", "gate.clamp(-limit, limit)",
    ),
    mutant(
        "the other branch clamped from above only",
        "moe", "layers.0.ffn.experts",
        "up.clamp(-limit, limit)", "up.clamp(max=limit)",
    ),
    mutant(
        "gate and up in the wrong order",
        "moe", "layers.0.ffn.experts",
        "gate, up = _clamped(gate_up, limit)\n        out", "up, gate = _clamped(gate_up, limit)\n        out",
    ),
    mutant(
        "bias in the weights",
        "moe", "layers.1.ffn.router_weights",
        "chosen = scores_TE.gather(1, ids_TK)",
        "chosen = (scores_TE if self.hashes else scores_TE + self.e_score_correction_bias).gather(1, ids_TK)",
    ),
    mutant(
        "bias not in the choice",
        "moe", "layers.1.ffn.router_ids",
        "scores_TE + self.e_score_correction_bias", "scores_TE",
    ),
    mutant(
        "softplus without its root",
        "moe", "layers.0.ffn.router_weights",
        ".clamp_min(torch.finfo(softplus.dtype).tiny).sqrt()", "",
    ),
    mutant(
        "sigmoid instead of softplus",
        "moe", "layers.0.ffn.router_weights",
        "torch.logaddexp(logits_TE, torch.zeros_like(logits_TE))", "torch.sigmoid(logits_TE).square()",
    ),
    mutant(
        "weights not renormalized",
        "moe", "layers.0.ffn.router_weights",
        "chosen / chosen.sum(-1, keepdim=True) * self.scaling", "chosen * self.scaling",
    ),
    mutant(
        "no scaling of what is routed",
        "moe", "layers.0.ffn.router_weights",
        "chosen / chosen.sum(-1, keepdim=True) * self.scaling", "chosen / chosen.sum(-1, keepdim=True)",
    ),
    mutant(
        "hash layers weigh all alike",
        "moe", "layers.0.ffn.router_weights",
        "chosen = scores_TE.gather(1, ids_TK)",
        "chosen = scores_TE.gather(1, ids_TK)\n        chosen = torch.ones_like(chosen) if self.hashes else chosen",
    ),
    # ---- MTP
    mutant(
        "norms of token and streams swapped",
        "model", "mtp.0.in",
        "self.e_proj(self.enorm(", "self.e_proj(self.hnorm(",
        "self.h_proj(self.hnorm(", "self.h_proj(self.enorm(",
    ),
    mutant(
        "MTP embeds the token itself",
        "packing", "mtp.0.in",
        "following[:, :-1] = ids_BS[:, 1:]", "following[:, :-1] = ids_BS[:, :-1]",
    ),
    mutant(
        "MTP embeds the token after the next",
        "packing", "mtp.0.in",
        "following[:, :-1] = ids_BS[:, 1:]", "following[:, :-2] = ids_BS[:, 2:]",
    ),
    mutant(
        "an MTP block that rotates as a layer with compression",
        "model", "mtp.0.attn.q",
        "caches, ratios), settings[0])", "caches, ratios), settings[ratios[-1]])",
    ),
    mutant(
        "MTP through the main model's last collapse",
        "model", "mtp.0.collapsed",
        "self.mtp[0]\n", "self.mtp[0]\n        block.hc_head = self.model.hc_head\n",
    ),
)  # fmt: skip
EQUALS = (
    mutant("nothing changed", "moe", None),
    mutant(
        "routing weight after the last matrix",
        "moe", None,
        "limit, weight_P1)", "limit)",
        "return down(inner(x_TH, weights_TK), pairs)\n",
        "return down(inner(x_TH, weights_TK), pairs) * weights_TK.flatten()[pairs.place, None]\n",
    ),
    mutant(
        "softplus by another formula",
        "moe", None,
        "torch.logaddexp(logits_TE, torch.zeros_like(logits_TE))", "F.softplus(logits_TE)",
    ),
)  # fmt: skip


# ---- a copy of the package under another name


class _Copy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports COPY from the product's files, but for one module's edits."""

    def __init__(self, changed: Mutant) -> None:
        self.changed = changed

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COPY and not name.startswith(f"{COPY}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name == COPY)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix(COPY).removeprefix(".")
        exec(
            compiled(name or "__init__", self.changed.edits if name == self.changed.module else ()),
            vars(module),
        )


@functools.cache
def compiled(module: str, edits: tuple[Edit, ...]) -> CodeType:
    text = (PRODUCT / f"{module}.py").read_text()
    for passage, instead in edits:
        assert text.count(passage) == 1, f"{passage!r} stands {text.count(passage)} times in {module}.py"
        text = text.replace(passage, instead)
    return compile(text, f"{module}.py of a mutant", "exec")


@contextmanager
def copy_with(changed: Mutant) -> Iterator[str]:
    """The name under which the copy can be imported in the block."""
    finder = _Copy(changed)
    sys.meta_path.insert(0, finder)
    try:
        yield COPY
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name == COPY or name.startswith(f"{COPY}.")]:
            del sys.modules[name]


# ---- what the comparison says


class Truth(NamedTuple):
    weights: dict[str, np.ndarray]
    ids: np.ndarray
    shown: oracle.Shown


@pytest.fixture(scope="module")
def truth() -> Truth:
    weights = oracle.random_weights(DOCUMENT, seed=1)
    ids = np.random.default_rng(1).integers(0, DOCUMENT["vocab_size"], (2, 34))
    return Truth(weights, ids, expected(weights, DOCUMENT, ids))


def first_seen(changed: Mutant, truth: Truth) -> str | None:
    with copy_with(changed) as package:
        model = built(truth.weights, DOCUMENT, package=package)
        assert type(model).__module__ == f"{COPY}.model"
        found = shown(model, truth.ids)
    return first_difference(found, truth.shown, TOLERANCE)


@pytest.mark.parametrize("changed", MUTANTS, ids=lambda changed: changed.mistake)
def test_mutant_is_noticed_where_its_mistake_is(changed: Mutant, truth: Truth) -> None:
    assert first_seen(changed, truth) == changed.noticed_at


@pytest.mark.parametrize("changed", EQUALS, ids=lambda changed: changed.mistake)
def test_copy_that_computes_the_same_agrees_everywhere(changed: Mutant, truth: Truth) -> None:
    assert first_seen(changed, truth) is None


def test_mutants_move_the_logits_too(truth: Truth) -> None:
    """A comparison of the logits alone would do, of main or MTP; tried on one mistake of each part."""
    for changed in MUTANTS[::7]:
        with copy_with(changed) as package:
            found = shown(built(truth.weights, DOCUMENT, package=package), truth.ids)
        names = ("logits", "mtp.0.logits")
        assert max(np.abs(found[name] - truth.shown[name]).max() for name in names) > 1e-6, changed.mistake


def test_mutants_are_different() -> None:
    assert (
        len({changed.mistake for changed in MUTANTS})
        == len({changed.edits for changed in MUTANTS})
        == len(MUTANTS)
    )
