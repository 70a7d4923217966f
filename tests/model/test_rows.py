"""Rows: nothing lost, nothing twice, documents apart, targets right; the same on every machine and at every step."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
import torch

from dsv4model.corpus import Document
from dsv4model.losses import IGNORED
from dsv4model.rows import Rows, order_of, packed

END = 1


def documents_of(*lengths: int) -> list[Document]:
    """Every token of all is another number; every third is not counted."""
    made, token = [], 100
    for length in lengths:
        ids = array("i", range(token, token + length))
        made.append(Document(ids, bytes(index % 3 != 0 for index in range(length))))
        token += length
    return made


def random_lengths(count: int, most: int) -> list[int]:
    return torch.randint(1, most + 1, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def test_every_document_stands_in_one_row_and_no_row_overflows() -> None:
    lengths = random_lengths(2000, 100)
    rows = packed(lengths, range(2000), 100)
    assert Counter(item for row in rows for item in row) == Counter(range(2000))
    assert all(0 < sum(lengths[item] for item in row) <= 100 for row in rows)


def test_packing_wastes_little_and_less_than_in_order() -> None:
    lengths = random_lengths(2000, 100)
    rows = packed(lengths, range(2000), 100)
    assert sum(lengths) / (len(rows) * 100) > 0.97
    in_order, room = 1, 100
    for length in lengths:
        if length > room:
            in_order, room = in_order + 1, 100
        room -= length
    assert len(rows) < 0.85 * in_order


def test_best_fit_is_the_row_that_is_filled_most() -> None:
    """3 fits the row with 7 and the one with 6: it goes where nothing is left."""
    assert packed([3, 6, 7, 2], range(4), 10) == [[0, 2], [1, 3]]
    assert packed([5, 5, 5], range(3), 10) == [[0, 1], [2]]


def test_order_is_a_permutation_that_another_epoch_and_seed_change() -> None:
    first = order_of(50, 3, 0)
    assert sorted(first) == list(range(50))
    assert first == order_of(50, 3, 0)
    assert len({tuple(first), tuple(order_of(50, 3, 1)), tuple(order_of(50, 4, 0)), tuple(range(50))}) == 4


def test_row_has_targets_of_the_next_and_the_one_after_within_documents() -> None:
    (row,) = [Rows(documents_of(4, 3), 9, pack=True, seed=None, end_id=END).batch(0, 1)]
    assert row.ids[0].tolist() == [100, 101, 102, 103, 104, 105, 106, END, END]
    assert row.documents[0].tolist() == [0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert row.next_ids[0].tolist() == [101, 102, 103, END, 105, 106, END, END, END]
    # the first and the fourth token of a document are not counted
    assert row.targets[0].tolist() == [101, 102, IGNORED, IGNORED, 105, 106, IGNORED, IGNORED, IGNORED]
    assert row.targets_mtp[0].tolist() == [102, IGNORED, IGNORED, IGNORED, 106, *[IGNORED] * 4]


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_learns_every_counted_token_once(pack: bool) -> None:
    documents = documents_of(*random_lengths(60, 20))
    rows = Rows(documents, 32, pack=pack, seed=5, end_id=END)
    batch = rows.batch(0, rows.per_epoch)
    wanted = [token for item in documents for token, is_counted in zip(item.ids, item.counted, strict=True)
              if is_counted]  # fmt: skip
    assert sorted(batch.targets[batch.targets != IGNORED].tolist()) == sorted(wanted)
    assert rows.efficiency() == pytest.approx(sum(map(len, documents)) / (rows.per_epoch * 32))
    if not pack:
        assert rows.per_epoch == 60


def test_rows_of_a_run_are_the_same_whoever_asks_first() -> None:
    documents = documents_of(*random_lengths(40, 20))

    def rows() -> Rows:
        return Rows(documents, 24, pack=True, seed=1, end_id=END)

    count = 3 * rows().per_epoch + 2
    whole = [rows().batch(number, 1).ids for number in range(count)]
    late = rows()
    assert torch.equal(late.batch(count - 1, 1).ids, whole[-1])
    assert torch.equal(late.batch(0, 5).ids, torch.cat(whole[:5]))
    assert rows().epoch_of(count - 1)[0] >= 2
    assert not torch.equal(whole[0], whole[rows().per_epoch])
