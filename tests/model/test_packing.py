"""Several documents in one row are as if each had been alone: values, gradients, and what changes with what.

The index arithmetic is held against loops over the tokens; the model against itself on the separate documents.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from random_model import ALL_EXPERTS, distance, random_ids, random_model
from torch import Tensor

from dsv4ckpt.errors import Usage
from dsv4model.model import Model
from dsv4model.packing import pack, shifted_left

CLOSE = (
    1e-12  # of the largest value, in float64: sums of some hundred terms in another order. Measured: 2e-14
)
# Shorter than a group of 4, than the window of 16, than a group of 128; at its end, one off, with the choice of the
# indexer binding (more than 8 entries of 4 tokens) and not.
LENGTHS = (1, 2, 3, 130, 4, 8, 128, 15, 17, 1, 256, 40)


def numbered(lengths: tuple[int, ...]) -> Tensor:
    """The documents of one row [S]."""
    return torch.repeat_interleave(torch.tensor(lengths))


def spans(lengths: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor((0, *lengths)).cumsum(0).tolist()
    return [slice(begin, end) for begin, end in pairwise(ends)]


def cotangent(logits: Tensor, seed: int) -> Tensor:
    """Weights of a loss, one row of them for every token of the vocabulary's first sequence."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape, generator=random, dtype=logits.dtype)


def loss(model: Model, ids: Tensor, documents: Tensor | None, weights: tuple[Tensor, Tensor]) -> Tensor:
    out = model(ids, documents=documents)
    return (out.logits * weights[0]).sum() + (out.mtp_logits * weights[1]).sum()


def gradients(model: Model) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


# ---- index arithmetic


def documents_of(batch: int, length: int, seed: int) -> Tensor:
    """Rows of random documents, most of them short; numbers come back later in the row."""
    random = torch.Generator().manual_seed(seed)
    ends = torch.rand(batch, length, generator=random) < 0.15
    return ends.int().cumsum(1) % 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [4, 7])
def test_groups_of_packed_rows_are_those_that_counting_finds(ratio: int, seed: int) -> None:
    documents = documents_of(3, 90, seed)
    packing = pack(documents.shape, documents.device, documents, 0)
    groups = packing.groups(ratio)
    x = torch.arange(documents.numel()).view(3, 90, 1)
    taken = groups.take(x)[..., 0]
    for row, numbers in enumerate(documents.tolist()):
        begin, first, made = 0, 0, []
        for t, number in enumerate(numbers):
            if t and number != numbers[t - 1]:
                begin, first = t, len(made)
            assert (packing.starts[row, t], packing.positions[row, t]) == (begin, t - begin)
            if (t - begin + 1) % ratio == 0:
                made.append((t - ratio + 1, t - ratio + 1 - begin, t - ratio + 1 > begin))
            assert (groups.first[row, t], groups.end[row, t]) == (first, len(made))
        for entry, (token, position, follows) in enumerate(made):
            assert taken[row, entry].tolist() == [90 * row + token + i for i in range(ratio)]
            assert groups.positions[row, entry] == position
            assert groups.follows is not None and bool(groups.follows[row, entry]) is follows


def test_next_tokens_end_with_every_document() -> None:
    ids, documents = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 0, 0]])
    assert shifted_left(ids, None, 1).tolist() == [[6, 7, 8, 9, 1]]
    assert shifted_left(ids, documents, 1).tolist() == [[6, 1, 1, 9, 1]]
    assert ids.tolist() == [[5, 6, 7, 8, 9]]


# ---- as if each were alone


@pytest.mark.slow
def test_packed_documents_give_logits_and_summed_gradients_of_the_separate_ones() -> None:
    model, ids = random_model(), random_ids(1, sum(LENGTHS))
    weights = (
        cotangent(torch.empty(1, sum(LENGTHS), 128).double(), 1),
        cotangent(torch.empty(1, sum(LENGTHS), 128).double(), 2),
    )
    packed = model(ids, documents=numbered(LENGTHS)[None])
    loss(model, ids, numbered(LENGTHS)[None], weights).backward()
    together = gradients(model)
    for span in spans(LENGTHS):
        alone = model(ids[:, span])
        assert distance(packed.logits[:, span], alone.logits) < CLOSE, span
        assert distance(packed.mtp_logits[:, span], alone.mtp_logits) < CLOSE, span
        loss(model, ids[:, span], None, (weights[0][:, span], weights[1][:, span])).backward()
    for name, alone in gradients(model).items():
        if ".indexer." in name:
            assert alone is None and together[name] is None
        else:
            assert alone is not None and together[name] is not None, name
            # of 1 at least: a scale's gradient is one sum of hundreds of terms, and may come to nearly nothing
            assert (together[name] - alone).abs().max() < CLOSE * alone.abs().max().clamp_min(1), name


@pytest.mark.slow
def test_rows_with_different_numbers_of_entries_are_as_if_each_were_alone() -> None:
    rows = ((130,), (1, 3, 2, 3, 3, 3, 100, 15), (5,) * 26)
    model, ids = random_model(), random_ids(3, 130)
    packed = model(ids, documents=torch.stack([numbered(lengths) for lengths in rows]))
    for row, lengths in enumerate(rows):
        for span in spans(lengths):
            alone = model(ids[row : row + 1, span])
            assert distance(packed.logits[row : row + 1, span], alone.logits) < CLOSE, (row, span)
            assert distance(packed.mtp_logits[row : row + 1, span], alone.mtp_logits) < CLOSE, (row, span)


def test_padding_as_a_document_of_its_own_changes_no_token_before_it() -> None:
    model, ids = random_model(), random_ids(1, 60)
    padded = torch.cat((ids, torch.full((1, 20), 1)), 1)
    packed = model(padded, documents=torch.tensor([[0] * 60 + [1] * 20]))
    alone = model(ids)
    assert distance(packed.logits[:, :60], alone.logits) < CLOSE
    assert distance(packed.mtp_logits[:, :60], alone.mtp_logits) < CLOSE


def test_one_document_in_a_row_is_as_no_documents_at_all() -> None:
    model, ids = random_model(), random_ids(2, 140)
    packed, plain = model(ids, documents=torch.full((2, 140), 7)), model(ids)
    assert distance(packed.logits, plain.logits) < CLOSE
    assert distance(packed.mtp_logits, plain.mtp_logits) < CLOSE


def test_document_numbers_that_come_back_later_name_other_documents() -> None:
    model, ids, lengths = random_model(), random_ids(1, 60), (20, 3, 21, 16)
    different = numbered(lengths)[None]
    back = torch.tensor([-5, 9, -5, 9])[different]
    assert torch.equal(model(ids, documents=back).logits, model(ids, documents=different).logits), (
        "only neighbours are compared"
    )


@pytest.mark.parametrize("lengths", [(1,), (3,), (3, 1, 2)])
def test_documents_shorter_than_a_group_leave_every_gradient_defined(lengths: tuple[int, ...]) -> None:
    model, ids = random_model(), random_ids(1, sum(lengths))
    out = model(ids, documents=numbered(lengths)[None])
    (out.logits.sum() + out.mtp_logits.sum()).backward()
    for name, gradient in gradients(model).items():
        if ".indexer." in name:
            assert gradient is None, name
        else:
            assert gradient is not None and gradient.isfinite().all(), name
            assert not (".compressor." in name and gradient.any()), name


# ---- nothing of one reaches another

# ends where a group of 4, a window and a chunk of queries end or not, with a choice that binds
NEIGHBOURS = (3, 45, 1, 16, 150, 4, 61)


@pytest.mark.slow
@pytest.mark.parametrize("changed", range(len(NEIGHBOURS)))
def test_changed_tokens_of_one_document_change_no_bit_of_the_others(changed: int) -> None:
    model = random_model(**ALL_EXPERTS)
    ids, documents, total = random_ids(1, sum(NEIGHBOURS)), numbered(NEIGHBOURS)[None], sum(NEIGHBOURS)
    span = spans(NEIGHBOURS)[changed]
    others = (documents != changed)[0]
    with torch.no_grad():
        before = model(ids, documents=documents)
        for tokens in (slice(span.start, span.start + 1), slice(span.stop - 1, span.stop), span):
            altered = ids.clone()
            altered[:, tokens] = (
                altered[:, tokens] + 1 + random_ids(1, total, seed=3)[:, tokens] % 127
            ) % 128
            after = model(altered, documents=documents)
            for old, new in zip(before, after, strict=True):
                assert torch.equal(old[:, others], new[:, others]), tokens
            assert not torch.equal(before.logits[:, tokens], after.logits[:, tokens])


@pytest.mark.slow
@pytest.mark.parametrize("asked", range(len(NEIGHBOURS)))
def test_gradient_of_one_document_is_exactly_zero_at_the_others(asked: int) -> None:
    model, ids, documents = random_model(), random_ids(1, sum(NEIGHBOURS)), numbered(NEIGHBOURS)[None]
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    out = model(ids, documents=documents, inputs_embeds=embeds)
    span = spans(NEIGHBOURS)[asked]
    out_of_it = out.logits[:, span] * cotangent(out.logits[:, span], 1) + out.mtp_logits[:, span]
    (gradient,) = torch.autograd.grad(out_of_it.sum(), embeds)
    assert not gradient[:, (documents != asked)[0]].any()
    assert gradient[:, span].abs().amax(-1).min() > 0  # every token of it counts, its last one for itself


# ---- refusals


@pytest.mark.parametrize("shape", [(1, 9), (2, 10), (10,), (1, 10, 1)])
def test_documents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(Usage) as caught:
        random_model()(random_ids(1, 10), documents=torch.zeros(shape, dtype=torch.int64))
    assert "[1, 10]" in caught.value.facts["expected"]
    assert str(list(shape)) in caught.value.facts["found"]
    assert "do" in caught.value.facts
