"""A sequence in pieces, with a cache, is the sequence at once; and the cache keeps no more than it says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from random_model import ALL_EXPERTS, VOCAB, WINDOWS_ONLY, distance, random_ids, random_model
from torch import Tensor

from dsv4ckpt.errors import Usage
from dsv4model.cache import Cache, LayerCache, PoolCache
from dsv4model.model import Model, Output

# Of the largest logit. Sums over the same terms, cut up otherwise; measured: 2e-15 and 9e-7.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
LENGTH = 270  # two groups of 128 and some; 67 entries of 4 tokens, of which 8 are picked


def in_pieces(model: Model, ids: Tensor, ends: list[int], cache: Cache | None = None) -> Output:
    """The outputs of calls that end at these tokens, one after the other."""
    cache = cache or Cache(model.config)
    following = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], model.config.eos)), 1)
    parts = []
    for begin, end in pairwise([0, *ends]):
        parts.append(model(ids[:, begin:end], next_ids=following[:, begin:end], cache=cache))
        assert cache.length == end
    return Output(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def assert_same(pieces: Output, whole: Output) -> None:
    within = CLOSE[whole.logits.dtype]
    assert distance(pieces.logits, whole.logits) < within
    assert distance(pieces.mtp_logits, whole.mtp_logits) < within


def random_ends(length: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(length - 1, generator=random)[: 3 + 9 * seed] + 1
    return [*cuts.sort().values.tolist(), length]


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors that a cache holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Cache | LayerCache | PoolCache):
        yield from tensors(list(vars(value).values()))


def held_bytes(value: object) -> int:
    """What its tensors keep alive: whole storages, not the views of them."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(value)}
    return sum(storage.nbytes() for storage in storages.values())


# ---- pieces


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@torch.no_grad()
def test_tokens_one_by_one_give_what_all_at_once_do(dtype: torch.dtype) -> None:
    model, ids = random_model(dtype), random_ids(2, 140)
    assert_same(in_pieces(model, ids, list(range(1, 141))), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_random_pieces_give_what_all_at_once_do(seed: int, dtype: torch.dtype) -> None:
    model, ids = random_model(dtype, seed=seed), random_ids(1 + seed % 2, LENGTH, seed=seed)
    assert_same(in_pieces(model, ids, random_ends(LENGTH, seed)), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("end", [1, 3, 4, 15, 16, 31, 32, 127, 128, 129, 269])
@torch.no_grad()
def test_two_pieces_that_meet_where_something_ends_give_what_one_does(end: int) -> None:
    model, ids = random_model(), random_ids(1, LENGTH)
    assert_same(in_pieces(model, ids, [end, LENGTH]), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        WINDOWS_ONLY,
        {"compress_ratios": [4, 4, 4, 4, 0]},
        {"compress_ratios": [128, 128, 128, 128, 0]},
        {"compress_ratios": [8, 4, 8, 4, 0]},
        {"compress_ratios": [4, 4, 4, 4, 0], "index_topk": 64},  # the choice binds after 256 tokens only
        {"compress_ratios": [4, 4, 4, 4, 0], "index_topk": 67},  # ... and never
        {"sliding_window": 1},
        {"sliding_window": 4096},
        {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 4, 128]},
    ],
    ids=str,
)
@torch.no_grad()
def test_pieces_of_models_of_other_layers_give_what_all_at_once_do(changes: dict[str, Any]) -> None:
    model, ids = random_model(**changes), random_ids(1, LENGTH)
    whole, cache = model(ids), Cache(model.config)
    ends = [5, 6, 7, 8, 9, 30, 31, 32, 33, 127, 128, 130, 250, 255, 256, 257, LENGTH]
    parts = [model(ids[:, begin:end], cache=cache).logits for begin, end in pairwise([0, *ends])]
    assert distance(torch.cat(parts, 1), whole.logits) < CLOSE[torch.float64]


@torch.no_grad()
def test_cache_without_next_ids_gives_no_mtp_logits() -> None:
    model = random_model()
    assert model(random_ids(1, 5), cache=Cache(model.config)).mtp_logits is None


@torch.no_grad()
def test_next_ids_are_what_the_mtp_block_reads() -> None:
    model, ids = random_model(**ALL_EXPERTS), random_ids(1, 40)
    following = random_ids(1, 40, seed=1)
    other = following.clone()
    other[:, 20] = (other[:, 20] + 1) % VOCAB
    one, two = model(ids, next_ids=following), model(ids, next_ids=other)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.mtp_logits[:, :20], two.mtp_logits[:, :20])
    assert not torch.equal(one.mtp_logits[:, 20], two.mtp_logits[:, 20])


@pytest.mark.slow
@torch.no_grad()
def test_rows_of_a_cache_know_nothing_of_each_other() -> None:
    model = random_model(**ALL_EXPERTS)
    ids = random_ids(2, 100)
    other = torch.stack((ids[0], random_ids(100, seed=5)))
    ends = [50, 51, 75, 100]
    one, two = (in_pieces(model, rows, ends) for rows in (ids, other))
    assert torch.equal(one.logits[0], two.logits[0]) and not torch.equal(one.logits[1], two.logits[1])


# ---- memory


@pytest.mark.slow
@pytest.mark.parametrize("piece", [50, 3000])
@torch.no_grad()
def test_cache_of_a_window_layer_holds_the_window_after_3000_tokens(piece: int) -> None:
    model = random_model(
        torch.float32, num_hidden_layers=1, compress_ratios=[0, 0], num_nextn_predict_layers=0
    )
    ids, cache = random_ids(1, 3000), Cache(model.config)
    for begin in range(0, 3000, piece):
        model(ids[:, begin : begin + piece], cache=cache)
        assert cache.length == begin + piece
    (layer,) = cache.layers
    assert layer.kv is not None and layer.kv.shape == (1, model.config.window - 1, model.config.head_dim)
    # a concatenation of at most W - 1 keys with those of the last call may be what lies behind it
    assert held_bytes(cache) <= 4 * model.config.head_dim * 2 * model.config.window


@pytest.mark.slow
@pytest.mark.parametrize("ends", [[300], [299, 300], [3, 7, 250, 300]], ids=len)
@pytest.mark.parametrize("ratio", [4, 8, 128])
@torch.no_grad()
def test_cache_of_a_compressed_layer_holds_entries_and_less_than_two_groups(
    ratio: int, ends: list[int]
) -> None:
    model = random_model(
        torch.float32, num_hidden_layers=1, compress_ratios=[ratio, 0], num_nextn_predict_layers=0
    )
    ids, cache, config = random_ids(1, 300), Cache(model.config), model.config
    for begin, end in pairwise([0, *ends]):
        model(ids[:, begin:end], cache=cache)
        for pool in [cache.layers[0].pool, *([cache.layers[0].index_pool] if ratio == 4 else [])]:
            assert pool.kv is not None and pool.gate is not None and pool.entries is not None
            assert pool.kv.shape == pool.gate.shape and pool.kv.shape[1] < 2 * ratio
            assert pool.entries.shape[1] == end // ratio
    channels = config.head_dim * (2 if ratio == 4 else 1) + (2 * config.index_head_dim if ratio == 4 else 0)
    entries = 300 // ratio * (config.head_dim + (config.index_head_dim if ratio == 4 else 0))
    window, pending = 2 * config.window * config.head_dim, 2 * 2 * ratio * channels
    assert held_bytes(cache) <= 4 * (window + pending + entries)


@torch.no_grad()
def test_caches_share_nothing_with_each_other() -> None:
    model, ids = random_model(), random_ids(1, 40)
    one, two = Cache(model.config), Cache(model.config)
    model(ids, cache=one)
    assert two.length == 0 and not list(tensors(two))
    assert one.layers is not two.layers and list(tensors(one))


# ---- refusals: the cache stays as it was


def state(cache: Cache) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors(cache)]


def assert_refused_and_unchanged(model: Model, cache: Cache, **call: Any) -> Usage:
    before, length = state(cache), cache.length
    with pytest.raises(Usage) as caught:
        model(cache=cache, **call)
    assert caught.value.facts.get("do")
    assert cache.length == length
    assert len(before) == len(state(cache)) and all(map(torch.equal, before, state(cache)))
    return caught.value


def filled(model: Model, length: int = 20, batch: int = 1) -> Cache:
    cache = Cache(model.config)
    ids = random_ids(batch, length)
    model(ids, next_ids=ids, cache=cache)
    return cache


@torch.no_grad()
def test_documents_with_a_filled_cache_are_refused() -> None:
    model = random_model()
    refused = {"input_ids": random_ids(1, 6), "documents": torch.tensor([[0, 0, 1, 1, 2, 2]])}
    assert "one document per row" in assert_refused_and_unchanged(model, filled(model), **refused).what


@torch.no_grad()
def test_documents_with_a_new_cache_are_refused() -> None:
    model = random_model()
    refused = {"input_ids": random_ids(1, 6), "documents": torch.tensor([[0, 0, 1, 1, 2, 2]])}
    assert_refused_and_unchanged(model, Cache(model.config), **refused)


@torch.no_grad()
def test_more_tokens_than_positions_with_those_of_the_cache_are_refused() -> None:
    model = random_model(max_position_embeddings=24)
    error = assert_refused_and_unchanged(model, filled(model), input_ids=random_ids(1, 5))
    assert error.facts["found"] == "25 tokens" and "24" in error.facts["expected"]
    model(random_ids(1, 4), cache=filled(model))


@pytest.mark.parametrize("bad", [-1, VOCAB])
@pytest.mark.parametrize("where", ["input_ids", "next_ids"])
@torch.no_grad()
def test_ids_out_of_range_leave_the_cache_as_it_was(where: str, bad: int) -> None:
    model, ids = random_model(), random_ids(1, 5)
    wrong = ids.clone()
    wrong[0, 3] = bad
    assert_refused_and_unchanged(model, filled(model), **({"input_ids": ids} | {where: wrong}))


@torch.no_grad()
def test_another_number_of_rows_than_the_cache_has_is_refused() -> None:
    model = random_model()
    assert_refused_and_unchanged(model, filled(model, batch=2), input_ids=random_ids(1, 5))


@torch.no_grad()
def test_next_ids_after_a_call_without_them_are_refused() -> None:
    """The MTP block's cache lacks the tokens of that call."""
    model, ids = random_model(), random_ids(1, 5)
    cache = Cache(model.config)
    model(ids, cache=cache)
    assert_refused_and_unchanged(model, cache, input_ids=ids, next_ids=ids)


@torch.no_grad()
def test_cache_of_another_config_is_refused() -> None:
    model = random_model()
    other = random_model(num_hidden_layers=2, compress_ratios=[0, 4, 0])
    assert_refused_and_unchanged(model, Cache(other.config), input_ids=random_ids(1, 5))
