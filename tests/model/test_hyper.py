"""Hyper-connections against the oracle's formulas, finite differences, and what a doubly stochastic matrix is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from random_model import distance
from tiny_model import tiny_document
from torch import Tensor

from dsv4model.config import Config
from dsv4model.hyper import HyperConnection, HyperHead, collapse, doubly_stochastic, spread

K, H = 4, 64
CLOSE = 1e-12  # of the largest value, float64; measured: 1e-15
EPS = 1e-6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def connection(**changes: object) -> HyperConnection:
    """Float64, with weights that move the mixes by about 1."""
    made = HyperConnection(Config.read(tiny_document(**changes))).double()
    for seed, parameter in enumerate(made.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed) / (16 if parameter.dim() > 1 else 1)
    return made


def mixed(made: HyperConnection, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a sublayer reads [B, S, H], post and comb."""
    pre, post, comb = made(streams)
    return collapse(streams, pre), post, comb


def watched(made: HyperConnection, streams: Tensor) -> dict[str, Tensor]:
    shown: dict[str, Tensor] = {}
    made.watcher = shown.__setitem__
    made(streams)
    return shown


def numpy_mixing(made: HyperConnection, streams: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p = {name: value.detach().double().numpy() for name, value in made.named_parameters()}
    mixes = [oracle.mixing(p, tiny_document(), row.double().numpy()) for row in streams]
    return tuple(np.stack(parts) for parts in zip(*mixes, strict=True))  # type: ignore[return-value]


# ---- the mixes


def test_mixes_are_those_of_the_formulas() -> None:
    made, streams = connection(), normal(2, 7, K, H)
    x, post, comb = mixed(made, streams)
    pre_np, post_np, comb_np = numpy_mixing(made, streams)
    assert distance(post, torch.from_numpy(post_np)) < CLOSE
    assert distance(comb, torch.from_numpy(comb_np)) < CLOSE
    assert distance(x, torch.einsum("bsj,bsjh->bsh", torch.from_numpy(pre_np), streams)) < CLOSE


def test_watcher_sees_the_mixes_that_are_used() -> None:
    made, streams = connection(), normal(2, 7, K, H)
    shown = watched(made, streams)
    assert list(shown) == ["pre", "post", "comb"]
    assert all(map(torch.equal, shown.values(), made(streams)))


def test_comb_has_columns_that_sum_to_1_and_rows_that_nearly_do() -> None:
    _, _, comb = connection()(normal(2, 50, K, H))
    assert comb.min() > 0
    assert (comb.sum(-2) - 1).abs().max() < 2 * EPS  # s / (s + eps) with s near 1: columns come last
    assert 2 * EPS < (comb.sum(-1) - 1).abs().max() < 0.05


def test_comb_of_many_rounds_is_doubly_stochastic() -> None:
    comb = doubly_stochastic(normal(2, 50, K, K), 300, 0.0)
    for axis in (-1, -2):
        assert (comb.sum(axis) - 1).abs().max() < 1e-12


def test_comb_of_no_epsilon_keeps_the_cross_ratios_of_its_logits() -> None:
    """Dividing rows and columns leaves a_ij a_kl / (a_il a_kj) alone, so it tells the logits, untransposed."""
    logits = normal(1, 9, K, K, seed=3)
    comb = doubly_stochastic(logits, 50, 0.0).log()

    def cross(x: Tensor) -> Tensor:
        return x[..., :1, :1] + x[..., 1:, 1:] - x[..., :1, 1:] - x[..., 1:, :1]

    assert distance(cross(comb), cross(logits)) < 1e-11


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_comb_of_each_number_of_rounds_is_the_one_of_the_formula(iters: int) -> None:
    logits = 2 * normal(2, 5, K, K, seed=1)
    expected = torch.from_numpy(oracle.sinkhorn(logits.numpy(), iters, 1e-2))
    assert distance(doubly_stochastic(logits, iters, 1e-2), expected) < CLOSE


# ---- out of and into the streams


def test_collapse_is_the_sum_of_streams_by_weight() -> None:
    streams, pre = normal(2, 7, K, H), normal(2, 7, K, seed=1)
    assert distance(collapse(streams, pre), torch.einsum("bsj,bsjh->bsh", pre, streams)) < CLOSE


def test_spread_sums_over_the_first_index_of_comb() -> None:
    out, streams = normal(2, 7, H), normal(2, 7, K, H, seed=1)
    post, comb = normal(2, 7, K, seed=2), normal(2, 7, K, K, seed=3)
    expected = torch.einsum("bsk,bsh->bskh", post, out) + torch.einsum("bsjk,bsjh->bskh", comb, streams)
    assert distance(spread(out, streams, post, comb), expected) < CLOSE
    moved = torch.zeros(1, 1, K, K).double()
    moved[..., 0, 2] = 1  # from stream 0 to stream 2
    there = spread(torch.zeros(1, 1, H).double(), streams[:1, :1], torch.zeros(1, 1, K).double(), moved)
    assert torch.equal(there[0, 0, 2], streams[0, 0, 0]) and not there[0, 0, [0, 1, 3]].any()


def test_streams_that_are_one_tensor_expanded_are_taken_as_well() -> None:
    """The first layer's streams are the embedding, repeated without a copy."""
    made, embedded = connection(), normal(2, 7, H)
    expanded = embedded.unsqueeze(2).expand(-1, -1, K, -1)
    for one, other in zip(mixed(made, expanded), mixed(made, expanded.contiguous()), strict=True):
        assert torch.equal(one, other)
    _, post, comb = made(expanded)
    assert torch.equal(
        spread(embedded, expanded, post, comb), spread(embedded, expanded.contiguous(), post, comb)
    )


# ---- gradients


def assert_gradients(function: Callable[..., object], *inputs: Tensor) -> None:
    """Against finite differences, to gradcheck's own 1e-3 of relative and 1e-5 of absolute error."""
    assert torch.autograd.gradcheck(function, [x.detach().clone().requires_grad_() for x in inputs])


@pytest.mark.slow
def test_gradients_of_the_mixes_are_what_finite_differences_give() -> None:
    made = connection(hidden_size=4, head_dim=32, hc_sinkhorn_iters=5)
    names = [name for name, _ in made.named_parameters()]

    def of_all(streams: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (streams,))

    assert_gradients(of_all, normal(1, 3, K, 4), *made.parameters())


def test_gradients_of_collapse_and_spread_are_what_finite_differences_give() -> None:
    streams, post, comb = normal(2, 3, K, 5), normal(2, 3, K, seed=1), normal(2, 3, K, K, seed=2)
    assert_gradients(collapse, streams, post)
    assert_gradients(spread, normal(2, 3, 5, seed=3), streams, post, comb)


def test_gradients_of_sinkhorn_are_what_finite_differences_give() -> None:
    assert_gradients(lambda logits: doubly_stochastic(logits, 4, EPS), normal(1, 3, K, K))


def test_gradients_of_the_head_are_what_finite_differences_give() -> None:
    head = HyperHead(Config.read(tiny_document(hidden_size=4))).double()
    names = [name for name, _ in head.named_parameters()]

    def of_all(streams: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (streams,))

    assert_gradients(of_all, normal(1, 3, K, 4), normal(K, K * 4), normal(K), normal(1))


def test_gradients_of_the_mixes_follow_the_formulas_written_in_one_graph() -> None:
    """All at once, at full width, by autograd through the plainest spelling; weights and streams of random size."""
    made, streams = connection(), normal(2, 9, K, H).requires_grad_()
    out = normal(2, 9, H, seed=8)

    def plain(fn: Tensor, base: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        m = (flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ fn.T
        pre = torch.sigmoid(m[..., :K] * scale[0] + base[:K]) + EPS
        post = 2 * torch.sigmoid(m[..., K : 2 * K] * scale[1] + base[K : 2 * K])
        c = torch.softmax((m[..., 2 * K :] * scale[2] + base[2 * K :]).unflatten(-1, (K, K)), -1) + EPS
        c = c / (c.sum(-2, keepdim=True) + EPS)
        for _ in range(19):
            c = c / (c.sum(-1, keepdim=True) + EPS)
            c = c / (c.sum(-2, keepdim=True) + EPS)
        x_in = torch.einsum("bsj,bsjh->bsh", pre, x)
        return torch.einsum("bsk,bsh->bskh", post, x_in * out) + torch.einsum("bsjk,bsjh->bskh", c, x)

    def ours() -> Tensor:
        x, post, comb = mixed(made, streams)
        return spread(x * out, streams, post, comb)

    leaves = [made.fn, made.base, made.scale, streams]
    weights = normal(2, 9, K, H, seed=9)
    assert distance(ours(), plain(*leaves)) < CLOSE
    found = torch.autograd.grad(ours(), leaves, weights)
    expected = torch.autograd.grad(plain(*leaves), leaves, weights)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < CLOSE


# ---- width


def test_mixes_of_bfloat16_streams_are_float32_and_as_exact_as_float32_is() -> None:
    made, streams = connection(), normal(2, 7, K, H, dtype=torch.bfloat16)
    expected = numpy_mixing(made.float(), streams)
    x, post, comb = mixed(made, streams)
    assert (x.dtype, post.dtype, comb.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert watched(made, streams)["pre"].dtype == torch.float32
    # a rounding to bfloat16 anywhere on the way would leave 2e-3
    assert distance(post.double(), torch.from_numpy(expected[1])) < 2e-6
    assert distance(comb.double(), torch.from_numpy(expected[2])) < 1e-5
    wide = torch.einsum("bsj,bsjh->bsh", torch.from_numpy(expected[0]), streams.double())
    assert ((x.double() - wide).abs() <= wide.abs() * 2**-8 + 1e-6).all()  # half a unit, at most 2**-8 of it


def test_spread_of_bfloat16_rounds_once() -> None:
    out, streams = normal(2, 7, H, dtype=torch.bfloat16), normal(2, 7, K, H, seed=1, dtype=torch.bfloat16)
    post, comb = normal(2, 7, K, seed=2, dtype=torch.float32), normal(2, 7, K, K, seed=3, dtype=torch.float32)
    found = spread(out, streams, post, comb)
    wide = torch.einsum("bsk,bsh->bskh", post.double(), out.double())
    wide = wide + torch.einsum("bsjk,bsjh->bskh", comb.double(), streams.double())
    assert found.dtype == torch.bfloat16
    assert ((found.double() - wide).abs() <= wide.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_narrow_streams_stay_near_those_of_float64(dtype: torch.dtype) -> None:
    made, streams = connection(), normal(2, 9, K, H, dtype=dtype)
    within = {torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]  # x is rounded, and sums of it cancel: 2e-2

    def gradients(made: HyperConnection, streams: Tensor) -> tuple[Tensor, ...]:
        streams = streams.detach().requires_grad_()
        x, post, comb = mixed(made, streams)
        y = spread(x, streams, post, comb)
        return torch.autograd.grad(y, [*made.parameters(), streams], normal(*y.shape, seed=5).to(y.dtype))

    expected = gradients(made, streams.double())
    found = gradients(made.float(), streams)
    for one, other in zip(found, expected, strict=True):
        assert distance(one.double(), other) < within
    assert [one.dtype for one in found] == [torch.float32] * 3 + [dtype]
