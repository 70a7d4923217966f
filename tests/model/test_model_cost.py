"""What a token costs does not grow with the sequence, but for what is meant to: counted, not timed.

Every operation that torch dispatches is seen, those inside autograd functions and in backward too: multiplications of
its matrix products, elements that it writes, and which storages are alive after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from random_model import random_ids, random_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4model.cache import Cache
from dsv4model.compressor import Indexer
from dsv4model.model import Model

pytestmark = pytest.mark.slow

# product -> which of its arguments are the two factors
FACTORS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "_grouped_mm": (0, 1),
    "mv": (0, 1),
}
HEADS, HEAD_DIM, INDEX_HEADS, INDEX_DIM = 2, 16, 2, 16
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM, "qk_rope_head_dim": 8, "q_lora_rank": 16, "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_DIM, "n_routed_experts": 4, "moe_intermediate_size": 16, "max_position_embeddings": 8192,
}  # fmt: skip
LENGTHS = (1024, 2048, 4096)
FLAT = 1.05  # at most so much more per token with four times the tokens


class Counter(TorchDispatchMode):
    """flops of matrix products, elements written, the largest tensor, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.written = self.largest = self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # bytes alive, counting those that nobody has found to be gone
        self._aside = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile does not count as work; memory does."""
        self._aside = True
        yield
        self._aside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not self._aside:
            name = func.overloadpacket.__name__.removesuffix("_")
            if name in FACTORS:
                left, right = (args[i] for i in FACTORS[name])
                self.flops += 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
            if not func.is_view:
                self.written += sum(x.numel() for x in tensors)
        for x in tensors:
            self.largest = max(self.largest, x.numel())  # what is expanded, too
            self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        reference = StorageWeakRef(storage)
        known = self._alive.get(reference.cdata)
        if known is None or known[0].expired():
            self._at_most += storage.nbytes() - (known[1] if known else 0)
            self._alive[reference.cdata] = reference, storage.nbytes()
        if self._at_most > self.peak_bytes:
            self._alive = {key: item for key, item in self._alive.items() if not item[0].expired()}
            self._at_most = sum(num_bytes for _, num_bytes in self._alive.values())
            self.peak_bytes = max(self.peak_bytes, self._at_most)


def cost(model: Model, length: int, *, backward: bool = True) -> Counter:
    ids = random_ids(1, length)
    with Counter() as counter:
        if backward:
            model(ids).logits.square().mean().backward()
        else:
            with torch.no_grad():
                model(ids)
    model.zero_grad(set_to_none=True)
    return counter


def costs(ratio: int, **changes: Any) -> dict[int, Counter]:
    model = random_model(torch.float32, **(SMALL | {"compress_ratios": [ratio]} | changes))
    return {length: cost(model, length) for length in LENGTHS}


def growth(found: dict[int, Counter], of: Callable[[Counter], float]) -> float:
    """Per token: the longest sequence over the shortest."""
    return (of(found[LENGTHS[-1]]) / LENGTHS[-1]) / (of(found[LENGTHS[0]]) / LENGTHS[0])


def aside(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, whose work the counter at hand does not count."""

    def called(*args: Any, **kwargs: Any) -> Tensor:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        assert isinstance(mode, Counter)
        with mode.aside():
            return function(*args, **kwargs)

    return called


def test_counter_counts_products_elements_and_memory() -> None:
    x = torch.ones(8, 4, requires_grad=True)
    with Counter() as counter:
        (x @ torch.ones(4, 16)).square().sum().backward()
    assert counter.flops == 2 * 8 * 4 * 16 * 2  # forward, and the gradient of x
    assert counter.largest == 8 * 16
    assert 8 * 16 * 4 * 2 <= counter.peak_bytes <= 8 * 16 * 4 * 5
    with Counter() as counter:
        for _ in range(10):
            torch.ones(1000)
    assert counter.peak_bytes == 4000 and counter.written == 10_000


def test_window_layers_cost_the_same_per_token_at_any_length() -> None:
    found = costs(0, num_hidden_layers=2, compress_ratios=[0, 0])
    for of in (lambda c: c.flops, lambda c: c.written, lambda c: c.peak_bytes, lambda c: c.largest):
        assert growth(found, of) < FLAT
    # what attention must do at least, so that nothing escapes: q.k and p.v over the window, and in backward their twins
    least = 2 * LENGTHS[-1] * HEADS * HEAD_DIM * 16 * 2 * 6
    assert found[LENGTHS[-1]].flops > least


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_no_tensor_has_an_element_for_every_pair_of_tokens(ratio: int) -> None:
    found = costs(ratio)
    for length, counter in found.items():
        assert counter.largest < length * length / 4
    assert growth(found, lambda c: c.largest) < FLAT


def test_compressed_layer_grows_by_its_entries_only() -> None:
    found, window = costs(128), costs(0)
    for length in LENGTHS:
        # on average half of the entries; every product has 2 H D flops per pair, there are 2 forward and 5 backward
        pairs = length * (length / 128) / 2
        compressor = 2 * length * 32 * HEAD_DIM * 2 * 3  # two projections, and their gradients
        extra = found[length].flops - window[length].flops - compressor
        assert 0 < extra <= 7 * 2 * HEADS * HEAD_DIM * pairs * 1.1
    assert growth(found, lambda c: c.peak_bytes) < FLAT


def test_indexed_layer_is_flat_but_for_the_scores_of_its_indexer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = costs(4)
    monkeypatch.setattr(Indexer, "picks", aside(Indexer.picks))
    rest = costs(4)
    for of in (lambda c: c.flops, lambda c: c.written, lambda c: c.peak_bytes):
        assert growth(rest, of) < FLAT
    for length in LENGTHS:
        scores = whole[length].flops - rest[length].flops
        # each query against the entries before it, on average half of them; scored a few queries at a time
        exact = 2 * INDEX_HEADS * (INDEX_DIM + 1) * length * (length / 4) / 2
        assert 0.9 * exact < scores < 1.3 * exact
    assert growth(whole, lambda c: c.peak_bytes) < FLAT


def test_packed_documents_cost_no_more_than_the_same_tokens_in_one() -> None:
    model = random_model(torch.float32, **(SMALL | {"compress_ratios": [128]}))
    ids, documents = random_ids(1, 2048), torch.arange(2048)[None] // 300
    with Counter() as packed:
        model(ids, documents=documents).logits.square().mean().backward()
    assert packed.flops <= cost(model, 2048).flops * FLAT
    assert packed.largest < 2048 * 2048 / 4


def test_one_token_with_a_cache_costs_the_same_after_any_length_of_a_window() -> None:
    model = random_model(torch.float32, **(SMALL | {"compress_ratios": [0]}))
    found = []
    with torch.no_grad():
        for length in (100, 3000):
            cache = Cache(model.config)
            model(random_ids(1, length), cache=cache)
            with Counter() as counter:
                model(random_ids(1, 1), cache=cache)
            found.append((counter.flops, counter.written, counter.largest))
    assert found[0] == found[1]
    assert math.prod(found[0]) > 0
