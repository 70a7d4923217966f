"""What the model refuses, in words that help and before it has computed anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_model import VOCAB, random_ids, random_model
from torch import Tensor, nn

from dsv4ckpt.errors import Usage
from dsv4model.cache import Cache
from dsv4model.model import Model


def refused(model: Model, **call: Any) -> Usage:
    """The error, after making sure that no module ran and no cache changed."""
    ran: list[nn.Module] = []
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda module, _: ran.append(module))
    with pytest.raises(Usage) as caught:
        model(**call)
    assert not ran
    assert caught.value.what and caught.value.facts["do"]
    return caught.value


@pytest.fixture(scope="module")
def shared() -> Model:
    return random_model(torch.float32)


@pytest.fixture
def model(shared: Model) -> Model:
    for module in shared.modules():
        module._forward_pre_hooks.clear()
    return shared


@pytest.mark.parametrize("bad", [-1, -(2**40), VOCAB, 2**40])
@pytest.mark.parametrize("where", ["input_ids", "next_ids"])
def test_ids_that_the_vocabulary_does_not_have_are_refused(model: Model, where: str, bad: int) -> None:
    wrong = random_ids(2, 6)
    wrong[1, 4] = bad
    error = refused(model, **({"input_ids": random_ids(2, 6)} | {where: wrong}))
    assert error.what.startswith(where)
    assert error.facts["found"] == str(bad) and error.facts["expected"] == f"0 to {VOCAB - 1}"


def test_first_and_last_id_of_the_vocabulary_are_taken(model: Model) -> None:
    assert model(torch.tensor([[0, VOCAB - 1]])).logits.shape == (1, 2, VOCAB)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.zeros(5, dtype=torch.int64), "int64 [5]"),
        (torch.zeros(1, 5, 1, dtype=torch.int64), "int64 [1, 5, 1]"),
        (torch.zeros((), dtype=torch.int64), "int64 []"),
        (torch.zeros(1, 0, dtype=torch.int64), "int64 [1, 0]"),
        (torch.zeros(0, 5, dtype=torch.int64), "int64 [0, 5]"),
        (torch.zeros(1, 5, dtype=torch.int32), "int32 [1, 5]"),
        (torch.zeros(1, 5, dtype=torch.uint8), "uint8 [1, 5]"),
        (torch.zeros(1, 5), "float32 [1, 5]"),
        (torch.zeros(1, 5, dtype=torch.bool), "bool [1, 5]"),
    ],
    ids=str,
)
def test_ids_of_another_dtype_or_shape_are_refused(model: Model, ids: Tensor, found: str) -> None:
    error = refused(model, input_ids=ids)
    assert error.facts["found"] == found and "int64 [B, S]" in error.facts["expected"]


@pytest.mark.parametrize("shape", [(1, 6), (2, 5), (2, 7), (12,)])
def test_next_ids_of_another_shape_are_refused(model: Model, shape: tuple[int, ...]) -> None:
    error = refused(model, input_ids=random_ids(2, 6), next_ids=random_ids(*shape))
    assert error.what.startswith("next_ids") and "as input_ids" in error.facts["expected"]


@pytest.mark.parametrize("shape", [(1, 6), (2, 5), (12,), (2, 6, 1)])
def test_documents_of_another_shape_are_refused(model: Model, shape: tuple[int, ...]) -> None:
    error = refused(model, input_ids=random_ids(2, 6), documents=torch.zeros(shape, dtype=torch.int64))
    assert "[2, 6]" in error.facts["expected"] and str(list(shape)) in error.facts["found"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_that_are_no_whole_numbers_are_refused(model: Model, dtype: torch.dtype) -> None:
    """bfloat16 cannot tell 256 from 257, and so would join documents."""
    refused(model, input_ids=random_ids(2, 6), documents=torch.zeros(2, 6, dtype=dtype))


def test_nothing_at_all_is_refused(model: Model) -> None:
    assert "input_ids" in refused(model).what


def test_embeddings_without_ids_are_refused_where_hash_layers_need_these(model: Model) -> None:
    error = refused(model, inputs_embeds=torch.zeros(1, 6, 64))
    assert "hash layers" in error.what and "first 1 layers" in error.facts["expected"]


def test_embeddings_without_ids_are_taken_where_no_layer_hashes() -> None:
    model, ids = random_model(torch.float32, num_hash_layers=0), random_ids(1, 40)
    from_embeds = model(inputs_embeds=model.model.embed_tokens(ids))
    assert torch.equal(from_embeds.logits, model(ids).logits)
    assert from_embeds.mtp_logits is None  # nobody knows the next tokens
    assert model(inputs_embeds=model.model.embed_tokens(ids), next_ids=ids).mtp_logits is not None


def test_embeddings_with_ids_stand_in_for_the_table(model: Model) -> None:
    ids = random_ids(1, 40)
    assert torch.equal(model(ids, inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    other = model(ids, inputs_embeds=torch.zeros(1, 40, 64))
    assert not torch.equal(other.logits, model(ids).logits)


@pytest.mark.parametrize("shape", [(1, 6, 63), (1, 5, 64), (2, 6, 64), (6, 64), (1, 6, 64, 1), (64,)])
def test_embeddings_of_another_shape_are_refused(model: Model, shape: tuple[int, ...]) -> None:
    error = refused(model, input_ids=random_ids(1, 6), inputs_embeds=torch.zeros(shape))
    assert error.facts["found"] == f"float32 {list(shape)}"


@pytest.mark.parametrize("shape", [(1, 0, 64), (0, 3, 64), (6, 64), (64,)])
def test_embeddings_without_ids_of_no_tokens_or_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    refused(random_model(torch.float32, num_hash_layers=0), inputs_embeds=torch.zeros(shape))


def test_embeddings_of_another_dtype_are_refused(model: Model) -> None:
    refused(model, input_ids=random_ids(1, 6), inputs_embeds=torch.zeros(1, 6, 64, dtype=torch.bfloat16))


def test_more_tokens_than_positions_are_refused() -> None:
    model = random_model(torch.float32, max_position_embeddings=20)
    error = refused(model, input_ids=random_ids(1, 21))
    assert error.facts["found"] == "21 tokens" and "max_position_embeddings" in error.facts["expected"]
    refused(model, input_ids=random_ids(1, 21), documents=torch.arange(21)[None] // 7)


def test_as_many_tokens_as_positions_are_taken() -> None:
    model = random_model(torch.float32, max_position_embeddings=20)
    assert model(random_ids(1, 20)).logits.shape == (1, 20, VOCAB)


def test_refused_call_leaves_a_new_cache_new(model: Model) -> None:
    cache = Cache(model.config)
    refused(model, input_ids=torch.full((1, 4), VOCAB), cache=cache)
    assert cache == Cache(model.config)


def test_errors_say_what_is_wrong_and_what_to_do() -> None:
    error = refused(random_model(torch.float32), input_ids=torch.tensor([[VOCAB]]))
    assert str(error).splitlines() == [
        "input_ids holds a token id that the vocabulary does not have",
        "    expected  0 to 127",
        "    found     128",
        "    do        use the tokenizer that belongs to this checkpoint",
    ]
