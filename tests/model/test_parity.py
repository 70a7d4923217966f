"""Figures of two tensors against struct, math and numpy; verdicts; and where the first divergence is found."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4ckpt.errors import Usage
from dsv4model import parity
from dsv4model.parity import Row, Tolerance, Verdict

EXACT = Tolerance(atol=0, rtol=0)
LARGEST = torch.finfo(torch.float32).max


def row_of(a: Any, b: Any, tolerance: Tolerance = EXACT, dtype: torch.dtype = torch.float32) -> Row:
    a, b = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in (a, b))
    return parity.compare_tensors("x", a, b, tolerance)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- ulp


def steps(a: float, b: float) -> int:
    """Steps between two float32 numbers, counted on their bits by struct."""

    def place(x: float) -> int:
        (bits,) = struct.unpack("<I", struct.pack("<f", x))
        return -(bits & 0x7FFFFFFF) if bits >> 31 else bits

    return abs(place(a) - place(b))


@pytest.mark.parametrize(
    "a", [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.5e-39, LARGEST, -LARGEST, math.inf, 3e7]
)
@pytest.mark.parametrize("b", [0.0, -0.0, 1.0, 1.0000001, -1e-45, 2.0, LARGEST, math.inf, -math.inf])
def test_ulp_distance_of_float32_is_the_distance_of_the_bits(a: float, b: float) -> None:
    assert parity.ulp_distance(torch.tensor([a]), torch.tensor([b])).tolist() == [steps(a, b)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ulp_distance_counts_every_number_of_a_16_bit_dtype(dtype: torch.dtype) -> None:
    """All finite numbers in order, from the most negative one: neighbours are 1 apart, but -0 and 0 are one number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    ordered = torch.from_numpy(np.unique(every[every.isfinite()].double().numpy())).to(dtype)
    assert set(parity.ulp_distance(ordered[1:], ordered[:-1]).tolist()) == {1}
    whole = parity.ulp_distance(ordered[-1:], ordered[:1])
    assert whole.tolist() == [len(ordered) - 1]


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        (1.0, math.nextafter(1.0, 2.0), 1),
        (-5e-324, 5e-324, 2),
        (1.0, 2.0, 2**52),
        (-math.inf, math.inf, 2**63 - 1),  # more than int64 holds
        (1.0, -1.0, 2 * 1023 * 2**52),
    ],
)
def test_ulp_distance_of_float64_does_not_overflow(a: float, b: float, steps: int) -> None:
    found = parity.ulp_distance(
        torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    )
    assert found.tolist() == [min(steps, 2**63 - 1)]


@pytest.mark.parametrize(
    ("a", "b", "coarse"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_ulp_is_counted_in_the_coarser_dtype(a: torch.dtype, b: torch.dtype, coarse: torch.dtype) -> None:
    assert parity.coarser(a, b) == parity.coarser(b, a) == coarse
    one, next_one = torch.ones(1, dtype=a), torch.tensor([1 + torch.finfo(coarse).eps], dtype=b)
    assert row_of(one, next_one).max_ulp == 1


# ---- the other figures


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_figures_equal_numpys(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_PIECE", piece)
    a, b = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    row = row_of(a, b, Tolerance(atol=0.5, rtol=0.1))
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    apart, largest = np.abs(x - y), np.maximum(np.abs(x), np.abs(y)).max(-1, keepdims=True)
    assert row.cosine == pytest.approx(
        np.dot(x.ravel(), y.ravel()) / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-14
    )
    assert row.max_abs == apart.max()
    assert row.max_rel == pytest.approx((apart / largest).max(), rel=1e-15)
    assert row.max_ulp == max(
        steps(p, q) for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    )
    over = apart > 0.5 + 0.1 * largest
    assert 0 < row.num_over == over.sum() < row.num_in_all == 60
    worst = np.unravel_index(np.argmax(np.where(over, apart, -1)), over.shape)
    assert row.at == tuple(map(int, worst))
    assert [float(text) for text in row.values or ()] == pytest.approx([x[worst], y[worst]], rel=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "cosine"),
    [
        ([0, 0], [0, 0], 1),
        ([0, 0], [1, 0], 0),
        ([3, 4], [6, 8], 1),
        ([1, 0], [0, 2], 0),
        ([1, 2], [-1, -2], -1),
    ],
)
def test_cosine_of_special_vectors(a: list[float], b: list[float], cosine: float) -> None:
    assert row_of(a, b).cosine == pytest.approx(cosine, abs=1e-15)


def test_cosine_is_computed_in_float64() -> None:
    a = [1.0, 1.0, 1.0, 1.0]
    b = [1 + 2.0**-13, 1.0, 1.0, 1.0]
    cosine = math.fsum(b) / (2 * math.sqrt(math.fsum(x * x for x in b)))
    assert 0 < 1 - cosine < 2**-24, "float32 does not see it"
    assert row_of(a, b).cosine == pytest.approx(cosine, abs=1e-15)


def test_one_number_without_an_axis_is_compared() -> None:
    row = row_of(torch.tensor(1.0), torch.tensor(2.0))
    assert (row.shape, row.at, row.max_abs, row.verdict) == ((), (), 1.0, Verdict.DIFFERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 3, 0), (0,)])
def test_empty_tensors_are_equal(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    row = row_of(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    assert (row.verdict, row.num_over, row.shape) == (Verdict.EQUAL, 0, shape)


# ---- verdicts


def test_minus_zero_and_zero_are_equal() -> None:
    row = row_of([0.0, -0.0], [-0.0, 0.0])
    assert (row.verdict, row.max_abs, row.max_ulp) == (Verdict.EQUAL, 0.0, 0)


@pytest.mark.parametrize(("a", "b"), [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan)])
def test_nan_is_a_divergence_in_either_and_in_both(a: float, b: float) -> None:
    lenient = Tolerance(atol=1e9, rtol=1e9, max_ulp=2**40)
    row = row_of([[0.0, 1.0], [a, 2.0]], [[0.0, 1.0], [b, 2.0]], lenient)
    assert (row.verdict, row.num_over, row.at) == (Verdict.NAN, 1, (1, 0))
    assert row.values == (f"{a:.9g}", f"{b:.9g}")
    assert row.max_abs == 0, "the figures are about the other values"


def test_equal_infinities_are_equal_and_nothing_else_is_close_to_one() -> None:
    assert row_of([math.inf, -math.inf], [math.inf, -math.inf]).verdict is Verdict.EQUAL
    lenient = Tolerance(atol=1e30, rtol=1e30, max_ulp=2**40)
    for other in (LARGEST, 0.0, -math.inf):
        row = row_of([math.inf, 1.0], [other, 1.0], lenient)
        assert (row.verdict, row.num_over, row.at) == (Verdict.DIFFERS, 1, (0,))


def test_atol_is_the_largest_difference_that_passes() -> None:
    assert row_of([1.0], [1.25], Tolerance(atol=0.25, rtol=0)).verdict is Verdict.CLOSE
    assert row_of([1.0], [1.25], Tolerance(atol=math.nextafter(0.25, 0), rtol=0)).verdict is Verdict.DIFFERS


def test_rtol_counts_from_the_largest_value_of_the_same_row() -> None:
    a, b = torch.tensor([[100.0, 0.0], [1.0, 0.0]]), torch.tensor([[100.0, 0.5], [1.0, 0.5]])
    row = row_of(a, b, Tolerance(atol=0, rtol=0.01))
    assert (row.num_over, row.at) == (1, (1, 1)), "0.5 is 0.5 % of the first row and 50 % of the second"
    assert row.max_rel == 0.5


def test_rtol_does_not_count_from_an_infinity() -> None:
    row = row_of([math.inf, 1.0], [math.inf, 2.0], Tolerance(atol=0, rtol=0.1))
    assert (row.num_over, row.at) == (1, (1,))


def test_max_ulp_lets_neighbours_pass_and_no_others() -> None:
    a = torch.tensor([1.0, 1.0])
    b = torch.tensor([1 + 2 * 2.0**-23, 1 + 3 * 2.0**-23])
    row = row_of(a, b, Tolerance(atol=0, rtol=0, max_ulp=2))
    assert (row.num_over, row.at, row.max_ulp) == (1, (1,), 3)


def test_max_ulp_of_0_lets_nothing_pass_that_atol_does_not() -> None:
    assert row_of([1.0], [1 + 2.0**-23]).verdict is Verdict.DIFFERS


# ---- whole numbers


def test_whole_numbers_count_rows_that_differ_and_show_the_first() -> None:
    a = torch.arange(24).view(2, 4, 3)
    b = a.clone()
    b[0, 2, 1], b[1, 1, 0], b[1, 1, 2] = -1, 5, 5
    row = row_of(a, b.to(torch.int32))
    assert (row.verdict, row.num_over, row.num_in_all, row.at) == (Verdict.DIFFERS, 2, 8, (0, 2))
    assert row.values == ("6 7 8", "6 -1 8")
    assert row.cosine is row.max_abs is row.max_rel is row.max_ulp is None


def test_whole_numbers_have_no_tolerance() -> None:
    assert (
        row_of(torch.tensor([1]), torch.tensor([2]), Tolerance(atol=9, max_ulp=9)).verdict is Verdict.DIFFERS
    )
    assert row_of(torch.tensor([True]), torch.tensor([True])).verdict is Verdict.EQUAL


# ---- two passes


def passes() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    a = {f"layers.{layer}.out": normal(2, 3, seed=layer) for layer in range(5)}
    return a, {name: tensor.clone() for name, tensor in a.items()}


@pytest.mark.parametrize("place", range(5))
def test_planted_difference_is_found_at_its_tensor(place: int) -> None:
    a, b = passes()
    for layer in range(place, 5):
        b[f"layers.{layer}.out"][1, 2] += 1e-3
    first = parity.first_divergence(parity.compare(a, b))
    assert first is not None
    assert (first.name, first.at, first.num_over) == (f"layers.{place}.out", (1, 2), 1)
    assert first.max_abs == pytest.approx(1e-3, rel=1e-3)


def test_equal_passes_diverge_nowhere() -> None:
    rows = list(parity.compare(*passes()))
    assert parity.first_divergence(rows) is None
    assert [row.verdict for row in rows] == [Verdict.EQUAL] * 5


def test_rows_stand_in_the_order_of_the_first_pass() -> None:
    a, b = passes()
    shuffled = {name: b[name] for name in reversed(b)}
    assert [row.name for row in parity.compare(a, shuffled)] == list(a)


def test_names_in_one_pass_only_are_told_apart() -> None:
    both, only_a, only_b = parity.aligned(["embed", "q", "out"], ["kv", "out", "embed"])
    assert (both, only_a, only_b) == (["embed", "out"], ["q"], ["kv"])


class Lazy(Mapping[str, Tensor]):
    """Notes what is asked for."""

    def __init__(self, tensors: dict[str, Tensor], log: list[str]) -> None:
        self.tensors, self.log = tensors, log

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.log.append(name)
        return self.tensors[name]


def test_compare_asks_for_one_tensor_after_the_other() -> None:
    log: list[str] = []
    a, b = (Lazy(tensors, log) for tensors in passes())
    rows = parity.compare(a, b)
    assert log == []
    next(rows)
    assert log == ["layers.0.out"] * 2
    assert len(list(rows)) == 4
    assert len(log) == 10


@pytest.mark.parametrize(
    ("b", "word"),
    [
        (torch.zeros(3, 2), "float32 [3, 2]"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64 [2, 3]"),
    ],
)
def test_other_shape_or_kind_of_numbers_is_refused(b: Tensor, word: str) -> None:
    with pytest.raises(Usage, match="not the same kind of tensor") as told:
        row_of(torch.zeros(2, 3), b)
    assert told.value.facts["found"] == word
    assert "do" in told.value.facts


def test_passes_without_a_common_name_are_refused() -> None:
    with pytest.raises(Usage, match="no tensor in common"):
        parity.require_comparable(
            {"a": parity.Look(torch.float32, (1,))}, {"b": parity.Look(torch.float32, (1,))}
        )
