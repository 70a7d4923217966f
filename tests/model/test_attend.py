"""Attention against its slow twin and against a loop in numpy, for every view; its gradients by finite differences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from random_model import distance
from torch import Tensor

from dsv4model.attend import View, attend, attend_plain
from dsv4model.packing import pack
from dsv4model.rope import Turn, turn

EPS = 1e-6
CLOSE = 1e-12  # of the largest value, float64: the same sums in another order. Measured: 2e-15


class Case(NamedTuple):
    """All arguments of attend."""

    q: Tensor
    kv: Tensor
    entries: Tensor
    sinks: Tensor
    turn: Turn
    eps: float
    view: View

    def cast(self, dtype: torch.dtype) -> Case:
        """Sinks stay wide, as they do in a model."""
        q, kv, entries = (x.to(dtype) for x in self[:3])
        sinks = self.sinks.to(torch.promote_types(dtype, torch.float32))
        positions = torch.arange(self.q.shape[1])[None]
        return self._replace(q=q, kv=kv, entries=entries, sinks=sinks, turn=made_turn(positions, dtype))


def made_turn(positions: Tensor, dtype: torch.dtype = torch.float64) -> Turn:
    """Two pairs turn, one fast and one slow."""
    return turn(positions, torch.tensor([1.0, 0.03]), dtype)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def below(random: torch.Generator, bound: Tensor) -> Tensor:
    """Random whole numbers from 0 to each bound."""
    return (torch.rand(bound.shape, generator=random) * (bound + 1)).long()


def case(
    length: int, *, seed: int = 0, past: int = 0, num_entries: int = 0, picked: int | None = None, rows: int = 2,
    window: int = 5, heads: int = 3, width: int = 8, one_view: bool = False,
) -> Case:  # fmt: skip
    """Random tensors and a random view: each query has a start, and a range of entries or picks, of its own."""
    random = torch.Generator().manual_seed(seed)
    q, kv = normal(random, rows, length, heads, width), normal(random, rows, past + length, width)
    entries, sinks = normal(random, rows, num_entries, width), normal(random, heads)
    seen_rows = 1 if one_view else rows
    own = torch.arange(length).expand(seen_rows, -1)
    starts = own - below(random, (own + past).clamp_max(2 * window))
    first = below(random, torch.full((seen_rows, length), num_entries))
    end = first + below(random, num_entries - first)
    picks = None
    if picked is not None:
        order = torch.rand(rows, length, num_entries, generator=random).argsort(-1)[..., :picked]
        missing = torch.rand(rows, length, picked, generator=random) < 0.3
        picks = torch.where(missing, num_entries, order).sort(-1).values
        picks = torch.where(picks == num_entries, -1, picks)
        first, end = torch.zeros_like(first), torch.full_like(end, num_entries)
    view = View(window, past, starts, first, end, picks)
    return Case(q, kv, entries, sinks, made_turn(torch.arange(length)[None]), EPS, view)


CASES = {
    "one token": {"length": 1},
    "one token, past": {"length": 1, "past": 4},
    "one token, past and entries": {"length": 1, "past": 4, "num_entries": 7},
    "one token, picks": {"length": 1, "past": 2, "num_entries": 7, "picked": 3},
    "short": {"length": 7},
    "longer than the window": {"length": 23},
    "window of one": {"length": 23, "window": 1, "num_entries": 3},
    "window wider than all": {"length": 23, "window": 100, "num_entries": 3},
    "past": {"length": 23, "past": 4},
    "past, entries": {"length": 40, "past": 4, "num_entries": 11},
    "one view for all rows": {"length": 40, "past": 4, "num_entries": 11, "one_view": True},
    "picks": {"length": 40, "num_entries": 11, "picked": 4},
    "all picked": {"length": 40, "num_entries": 11, "picked": 11},
    "picks, past": {"length": 40, "past": 4, "num_entries": 11, "picked": 4},
    "one row": {"length": 70, "rows": 1, "num_entries": 5},
    "one head": {"length": 70, "heads": 1, "num_entries": 5, "picked": 2},
    "everything turns": {"length": 20, "width": 4, "num_entries": 5},
} | {
    # both sides of where a chunk of queries may end
    f"{length} tokens": {"length": length, "past": 3, "num_entries": 6, "picked": picked, "heads": 2}
    for length in (31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 256, 257)
    for picked in ([None, 3][length % 2],)
}
all_cases = pytest.mark.parametrize("name", CASES)


def made(name: str) -> Case:
    return case(**CASES[name], seed=len(name))  # type: ignore[arg-type]


def packed_case(lengths: tuple[tuple[int, ...], ...], ratio: int) -> Case:
    """Documents in rows, with the entries that their groups make."""
    documents = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    packing = pack(documents.shape, documents.device, documents, 0)
    groups = packing.groups(ratio)
    plain = case(documents.shape[1], rows=len(lengths), num_entries=groups.num)
    view = View(5, 0, packing.starts, groups.first, groups.end, None)
    return plain._replace(turn=made_turn(packing.positions), view=view)


PACKED = [((40,), 4), ((1, 2, 3, 34), 4), ((10, 10, 20), 8), ((64, 1, 31), 16)]
packed = pytest.mark.parametrize(("lengths", "ratio"), PACKED)


def with_gradients(function: object, case: Case) -> list[Tensor]:
    """The result, and the gradients of q, kv, entries and sinks for random weights of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in case[:4]]
    out = function(*leaves, *case[4:])  # type: ignore[operator]
    weights = normal(torch.Generator().manual_seed(9), *out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def loop(case: Case) -> np.ndarray:
    """One row, one query, one head after the other."""
    q, kv, entries, sinks = (x.numpy() for x in case[:4])
    cis, view = case.turn.cis.numpy(), case.view
    pairs = 2 * cis.shape[-1]
    out = np.zeros_like(q)

    def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        tail = (x[-pairs::2] + 1j * x[len(x) - pairs + 1 :: 2]) * angles
        return np.concatenate([x[:-pairs], np.stack([tail.real, tail.imag], 1).ravel()])

    for b, s, n in np.ndindex(q.shape[:3]):
        angles = cis[b % len(cis), s]
        starts, first, end = (x[b % len(x), s].item() for x in (view.starts, view.first, view.end))
        begin = max(starts, s - view.window + 1) + view.past
        if view.picks is None:
            chosen = list(range(first, end))
        else:
            chosen = [pick for pick in view.picks[b, s].tolist() if pick >= 0]
        seen = np.concatenate([kv[b, begin : view.past + s + 1], entries[b, chosen]])
        query = turned(q[b, s, n] / np.sqrt(np.mean(q[b, s, n] ** 2) + case.eps), angles)
        powers = np.exp(np.append(seen @ query / np.sqrt(len(query)), sinks[n]))
        out[b, s, n] = turned(powers[:-1] / powers.sum() @ seen, angles.conj())
    return out


# ---- values and gradients


@all_cases
def test_attend_gives_what_a_loop_over_queries_does(name: str) -> None:
    found = attend(*made(name))
    assert distance(found, torch.from_numpy(loop(made(name)))) < CLOSE


@packed
def test_attend_of_documents_gives_what_a_loop_over_queries_does(
    lengths: tuple[int, ...], ratio: int
) -> None:
    found = packed_case((lengths, lengths[::-1]), ratio)
    assert distance(attend(*found), torch.from_numpy(loop(found))) < CLOSE


def assert_twins(case: Case) -> None:
    for fast, slow, of in zip(
        with_gradients(attend, case),
        with_gradients(attend_plain, case),
        ("out", "q", "kv", "entries", "sinks"),
        strict=True,
    ):
        assert distance(fast, slow) < CLOSE, of


@all_cases
def test_attend_and_its_slow_twin_have_the_same_values_and_gradients(name: str) -> None:
    assert_twins(made(name))


@pytest.mark.parametrize("seed", range(12))
def test_attend_and_its_slow_twin_agree_on_random_sizes(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_entries = int(random.integers(0, 20))
    picked = int(random.integers(1, num_entries + 1)) if num_entries and seed % 2 else None
    assert_twins(
        case(
            int(random.integers(1, 150)), seed=seed, past=int(random.integers(0, 9)), num_entries=num_entries,
            picked=picked, rows=int(random.integers(1, 4)), window=int(random.integers(1, 50)),
            heads=int(random.integers(1, 5)), one_view=bool(seed % 3 == 0),
        )
    )  # fmt: skip


@packed
def test_attend_of_documents_and_its_slow_twin_agree(lengths: tuple[int, ...], ratio: int) -> None:
    assert_twins(packed_case((lengths, lengths[::-1]), ratio))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 5, "window": 3},
        {"length": 4, "window": 2, "past": 1, "num_entries": 3},
        {"length": 4, "window": 2, "past": 1, "num_entries": 4, "picked": 2},
        {"length": 34, "window": 2, "num_entries": 2, "rows": 1, "heads": 1},  # two chunks
    ],
    ids=str,
)
def test_gradients_of_attend_are_what_finite_differences_give(sizes: dict[str, int]) -> None:
    small = case(**{"heads": 2, "width": 4, "rows": 2, **sizes})  # type: ignore[arg-type]
    leaves = [x.clone().requires_grad_() for x in small[:4]]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, *small[4:]), leaves, fast_mode=sizes["length"] > 9)


# ---- what the formulas say in closed form


def test_attend_of_a_token_that_sees_itself_alone_gives_its_key_less_the_share_of_the_sink() -> None:
    alone = case(1, heads=1, rows=1)
    q = torch.nn.functional.rms_norm(alone.q, (8,), eps=EPS)[0, 0, 0]
    score = (q @ alone.kv[0, 0] / 8**0.5).item()
    share = 1 / (1 + np.exp(alone.sinks.item() - score))
    assert distance(attend(*alone)[0, 0, 0], share * alone.kv[0, 0]) < CLOSE  # at position 0 nothing turns


def test_attend_with_an_overwhelming_sink_gives_nothing_and_without_one_a_mean_of_keys() -> None:
    usual = case(20, num_entries=4)
    nothing = attend(*usual._replace(sinks=torch.full((3,), 1e4).double()))
    assert not nothing.any()
    ones = usual._replace(kv=torch.ones_like(usual.kv), entries=torch.ones_like(usual.entries))
    ones = ones._replace(sinks=torch.full((3,), -1e4).double(), turn=made_turn(torch.zeros(1, 20)))
    assert distance(attend(*ones), torch.ones_like(usual.q)) < CLOSE


def test_attend_of_one_common_entry_and_of_its_pick_is_the_same() -> None:
    usual = case(40, num_entries=6)
    lengths = usual.view.end - usual.view.first
    index = usual.view.first.unsqueeze(-1) + torch.arange(6)
    picks = torch.where(torch.arange(6) < lengths.unsqueeze(-1), index, -1)
    picked = usual._replace(view=usual.view._replace(picks=picks))
    assert distance(attend(*picked), attend(*usual)) < CLOSE


# ---- narrower dtypes

# Of the largest float64 value from the same operands.  float32: sums of some dozen products, each rounded by 6e-8.
# bfloat16: one rounding each of queries, shares and the result, by 2**-9, and of gradients, which cancel: 1e-2.
WITHIN = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (2**-7, 2**-6)}


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("name", ["past, entries", "picks, past", "257 tokens", "one token"])
def test_attend_in_narrower_dtypes_stays_near_float64(name: str, dtype: torch.dtype) -> None:
    narrow = made(name).cast(dtype)
    wide = narrow._replace(q=narrow.q.double(), kv=narrow.kv.double(), entries=narrow.entries.double())
    wide = wide._replace(sinks=narrow.sinks.double(), turn=made(name).turn)
    found, expected = with_gradients(attend, narrow), with_gradients(attend, wide)
    for of, value in enumerate(found):
        assert value.dtype == (dtype if of < 4 else torch.float32)
        assert distance(value.double(), expected[of]) < WITHIN[dtype][of > 0], of


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
def test_attend_and_its_slow_twin_agree_in_narrower_dtypes(dtype: torch.dtype) -> None:
    narrow = made("picks, past").cast(dtype)
    for fast, slow in zip(with_gradients(attend, narrow), with_gradients(attend_plain, narrow), strict=True):
        assert distance(fast.double(), slow.double()) < WITHIN[dtype][1]


def test_attend_changes_none_of_its_arguments() -> None:
    usual = made("picks, past")
    copies = [x.clone() for x in usual[:4]]
    with_gradients(attend, usual)
    attend(*usual)
    assert all(map(torch.equal, usual[:4], copies))
