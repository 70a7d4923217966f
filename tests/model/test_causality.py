"""No token changes a bit of what stands before it, in any kind of layer, and it reaches as far as its layer says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_model import ALL_EXPERTS, random_ids, random_model

pytestmark = pytest.mark.slow
LENGTH = 270  # two groups of 128 and some; 67 entries of 4 tokens, of which 8 are picked
KINDS: dict[str, dict[str, Any]] = {
    "window": {"compress_ratios": [0, 0, 0, 0, 0]},
    "overlapping and indexed": {"compress_ratios": [4, 4, 4, 4, 0]},
    "compressed": {"compress_ratios": [128, 128, 128, 128, 0]},
    "all": {},
}
kinds = pytest.mark.parametrize("kind", KINDS)
# the first and the last token, and both sides of where a group, a window or a chunk of queries ends
TOKENS = (0, 3, 4, 15, 16, 31, 32, 127, 128, 269)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_changed_token_changes_no_bit_before_it(kind: str, dtype: torch.dtype) -> None:
    model, ids = random_model(dtype, **KINDS[kind], **ALL_EXPERTS), random_ids(1, LENGTH)
    with torch.no_grad():
        before = model(ids)
        for t in TOKENS:
            altered = ids.clone()
            altered[:, t] = (altered[:, t] + 64) % 128
            after = model(altered)
            assert torch.equal(before.logits[:, :t], after.logits[:, :t]), t
            assert not torch.equal(before.logits[:, t], after.logits[:, t]), t
            # the MTP block at t - 1 reads token t: it is the next one
            assert torch.equal(before.mtp_logits[:, : max(0, t - 1)], after.mtp_logits[:, : max(0, t - 1)]), t


@kinds
@pytest.mark.parametrize("t", [0, 15, 63, 127, 200])
def test_gradient_is_exactly_zero_at_all_later_tokens(kind: str, t: int) -> None:
    model, ids = random_model(**KINDS[kind]), random_ids(1, LENGTH)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    out = model(ids, next_ids=ids, inputs_embeds=embeds)
    (gradient,) = torch.autograd.grad(out.logits[:, t].sum() + out.mtp_logits[:, t].sum(), embeds)
    assert not gradient[:, t + 1 :].any()
    assert gradient[:, t].any()


@pytest.mark.parametrize(
    ("ratio", "first", "last"),
    [
        (0, 100, 115),  # the window of 16
        (128, 100, LENGTH - 1),  # in the entry of tokens 0..127 once 127 is there
    ],
)
def test_one_layer_carries_a_token_as_far_as_its_kind_says(ratio: int, first: int, last: int) -> None:
    """One attention only: token 100 reaches the rest of its window, and what sees its entry."""
    changes = {"num_hidden_layers": 1, "compress_ratios": [ratio, 0], "num_nextn_predict_layers": 0}
    model, ids = random_model(**changes, **ALL_EXPERTS), random_ids(1, LENGTH)
    altered = ids.clone()
    altered[:, 100] = (altered[:, 100] + 64) % 128
    with torch.no_grad():
        different = (model(ids).logits != model(altered).logits).any(-1)[0]
    reached = set(different.nonzero().flatten().tolist())
    window = set(range(100, 116))
    assert reached == (window if not ratio else window | set(range(127, LENGTH)))
    assert (min(reached), max(reached)) == (first, last)
