"""Decoding: tokens by the oracle, draws by their distribution, characters by Python's own decoder."""

from __future__ import annotations

import codecs
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
import tiny_model
import torch
from built import built
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4ckpt.errors import Environment, NotFinite, Usage
from dsv4model import generate as decoding
from dsv4model.generate import TextStream, generate, next_token, nucleus, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENT = tiny_model.tiny_document()
WEIGHTS = tiny_model.random_weights(DOCUMENT, seed=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return built(WEIGHTS, DOCUMENT).eval()


def prompt_of(length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(1).integers(0, DOCUMENT["vocab_size"], length).tolist()
    return ids


def followers(prompt: list[int], new: list[int]) -> tuple[np.ndarray, float]:
    """The oracle's logits [N, V] of what follows the prompt and each new token but the last; its least clear choice."""
    backbone = {name: value for name, value in WEIGHTS.items() if not name.startswith("mtp.")}
    shown = oracle.forward(backbone, DOCUMENT, np.array([prompt + new]))
    logits_NV = shown["logits"][0, len(prompt) - 1 : -1]
    two_N2 = np.sort(logits_NV, axis=1)[:, -2:]
    return logits_NV, min(oracle.margin(shown), float((two_N2[:, 1] - two_N2[:, 0]).min()))


# ---- on a model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "clear"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_greedy_tokens_are_the_oracles(dtype: torch.dtype, clear: float) -> None:
    """A prompt of two pieces; an entry of ratio 128, at 384 tokens, and five of ratio 4 are made while decoding."""
    prompt = prompt_of(370)
    assert decoding.PIECE < len(prompt) < 3 * 128 < len(prompt) + 20
    new = list(generate(built(WEIGHTS, DOCUMENT, dtype), prompt, max_new_tokens=20))
    logits_NV, margin = followers(prompt, new)
    assert margin > clear
    assert new == logits_NV.argmax(1).tolist()
    assert len(set(new)) > 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_tokens_are_those_of_full_passes(dtype: torch.dtype) -> None:
    model, ids = built(WEIGHTS, DOCUMENT, dtype), prompt_of(21)
    new = list(generate(model, ids, max_new_tokens=3))
    for token in new:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]


@pytest.mark.slow
def test_prompt_in_pieces_of_any_size_is_followed_by_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(generate(model, prompt_of(30), max_new_tokens=6))
    for piece in (1, 7, 29, 30, 31):
        monkeypatch.setattr(decoding, "PIECE", piece)
        assert list(generate(model, prompt_of(30), max_new_tokens=6)) == whole


class Watched:
    """Counts the tokens of each pass through a model."""

    def __init__(self, model: Any) -> None:
        self.config, self.lm_head, self.lengths = model.config, model.lm_head, list[int]()
        self._model = model

    def __call__(self, ids: torch.Tensor, **named: Any) -> Any:
        self.lengths.append(ids.shape[1])
        assert not torch.is_grad_enabled()
        return self._model(ids, **named)


def test_passes_are_bounded_pieces_then_single_tokens_and_no_more_than_needed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PIECE", 8)
    watched = Watched(model)
    tokens = generate(watched, prompt_of(20), max_new_tokens=3)  # type: ignore[arg-type]
    assert watched.lengths == []
    next(tokens)
    assert watched.lengths == [8, 8, 4]
    assert len(list(tokens)) == 2
    assert watched.lengths == [8, 8, 4, 1, 1]


def test_stops_after_the_first_stop_token(model: Any) -> None:
    free = list(generate(model, prompt_of(5), max_new_tokens=8))
    stop = next(token for token in free[2:] if token not in free[:2])
    ended = list(generate(model, prompt_of(5), max_new_tokens=8, stop_ids={stop, 999}))
    assert ended == free[: free.index(stop) + 1]
    assert len(ended) < len(free)


def test_stop_tokens_of_the_prompt_stop_nothing(model: Any) -> None:
    free = list(generate(model, prompt_of(5), max_new_tokens=3))
    stops = set(prompt_of(5)) - set(free)
    assert list(generate(model, prompt_of(5), max_new_tokens=3, stop_ids=stops)) == free


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_rows_without_a_token_are_never_chosen(temperature: float, model: Any) -> None:
    free = list(
        generate(model, prompt_of(5), max_new_tokens=12, temperature=temperature, generator=seeded(1))
    )
    most = max(free)
    masked = list(
        generate(
            model,
            prompt_of(5),
            max_new_tokens=12,
            temperature=temperature,
            generator=seeded(1),
            num_tokens=most,
        )
    )
    assert max(masked) < most


@pytest.mark.slow
def test_same_seed_draws_the_same_tokens_and_another_one_others(model: Any) -> None:
    def drawn(seed: int) -> list[int]:
        generator = seeded(seed)
        return list(generate(model, prompt_of(5), max_new_tokens=10, temperature=1.0, generator=generator))

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(seed)) for seed in range(3)}) == 3


def test_greedy_asks_the_generator_for_nothing(model: Any) -> None:
    generator = seeded(0)
    before = generator.get_state()
    list(generate(model, prompt_of(5), max_new_tokens=2, generator=generator))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.slow
def test_model_trains_as_before_between_tokens_and_after(model: Any) -> None:
    for _ in generate(model, prompt_of(5), max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    out = model(torch.tensor([prompt_of(5)])).logits
    out.sum().backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [0, 128]}, "not in the vocabulary"),
        ({"prompt_ids": [-1, 0]}, "not in the vocabulary"),
        ({"prompt_ids": [1] * 4096}, "more than the model's positions"),
        ({"max_new_tokens": 4095}, "more than the model's positions"),
        ({"max_new_tokens": 0}, "no tokens are asked for"),
        ({"temperature": -1.0}, "no temperature"),
        ({"temperature": math.inf}, "no temperature"),
        ({"temperature": math.nan}, "no temperature"),
        ({"top_p": 0.0}, "no top_p"),
        ({"top_p": 1.5}, "no top_p"),
        ({"top_p": math.nan}, "no top_p"),
        ({"temperature": 1.0, "generator": None}, "needs a generator"),
        ({"num_tokens": 0}, "no token may be chosen"),
    ],
)
def test_what_cannot_be_is_refused_before_a_token_is_asked_for(
    change: dict[str, Any], words: str, model: Any
) -> None:
    request: dict[str, Any] = {"prompt_ids": [1, 2], "max_new_tokens": 4, "generator": seeded(0)}
    with pytest.raises(Usage, match=words) as refused:
        generate(model, **request | change)
    assert "do" in refused.value.facts


def test_prompt_and_new_tokens_may_fill_all_positions(model: Any) -> None:
    assert next(generate(model, [1, 2], max_new_tokens=4094)) >= 0


def test_missing_device_is_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoding.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Environment, match="no CUDA device"):
        decoding.device_of("cuda")


# ---- the choice


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().clamp(min=-1e6)


@pytest.mark.parametrize("length", [3, 1000, 129_280])
def test_greedy_takes_the_lowest_id_of_equal_ones(length: int) -> None:
    logits = torch.zeros(length, dtype=torch.float64)
    assert next_token(logits, 0, 1, None) == 0
    logits[[length // 2, length - 1]] = 2.0
    assert next_token(logits, 0, 1, None) == length // 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(NotFinite, match="for 1 of 3 tokens"):
        next_token(torch.tensor([1.0, bad, 2.0], dtype=torch.float64), temperature, 1.0, seeded(0))


def frequencies(logits: torch.Tensor, temperature: float, top_p: float, draws: int) -> np.ndarray:
    generator = seeded(11)
    found = [next_token(logits, temperature, top_p, generator) for _ in range(draws)]
    return np.bincount(found, minlength=len(logits))


@pytest.mark.parametrize(
    ("temperature", "odds"), [(1.0, (3, 1)), (0.5, (9, 1)), (2.0, (math.sqrt(3), 1))], ids=str
)
def test_two_tokens_are_drawn_by_their_odds(temperature: float, odds: tuple[float, float]) -> None:
    """Chi-square of one degree of freedom: above 10.83 in one of a thousand seeds, and this one is fixed."""
    draws = 2000
    found = frequencies(logits_of(0.25, 0.75).flip(0), temperature, 1.0, draws)
    wanted = draws * np.array(odds) / sum(odds)
    assert ((found - wanted) ** 2 / wanted).sum() < 10.83


def test_many_tokens_are_drawn_by_their_probabilities() -> None:
    """Nine degrees of freedom: above 27.88 in one of a thousand seeds. Tokens are not in the order of probability."""
    parts, draws = np.array([1, 9, 4, 2, 8, 5, 10, 3, 7, 6]), 3000
    found = frequencies(logits_of(*(parts / parts.sum())), 1.0, 1.0, draws)
    wanted = draws * parts / parts.sum()
    assert ((found - wanted) ** 2 / wanted).sum() < 27.88


def test_what_top_p_cuts_off_is_not_drawn_and_the_rest_keeps_its_odds() -> None:
    draws = 2000
    found = frequencies(logits_of(0.1, 0.5, 0.15, 0.25), 1.0, 0.7, draws)
    wanted = draws * np.array([2, 1]) / 3
    assert (found[0], found[2]) == (0, 0)
    assert ((found[[1, 3]] - wanted) ** 2 / wanted).sum() < 10.83


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3])
def test_low_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1e4, 1e4 + 1, -3e38, 3.0], dtype=torch.float64)
    assert {next_token(logits, temperature, 1.0, seeded(seed)) for seed in range(20)} == {1}


def test_high_temperature_is_even() -> None:
    found = frequencies(torch.tensor([-50.0, 0, 50, 7], dtype=torch.float64), 1e300, 1.0, 2000)
    assert ((found - 500.0) ** 2 / 500).sum() < 16.27  # three degrees of freedom


def reference_nucleus(probabilities: Sequence[float], top_p: float) -> list[int]:
    """Ids in descending order until their sum, which is exact here, has reached top_p."""
    order = sorted(range(len(probabilities)), key=lambda index: (-probabilities[index], index))
    kept: list[int] = []
    while order and sum(Fraction(probabilities[index]) for index in kept) < Fraction(top_p):
        kept.append(order.pop(0))
    return kept


@pytest.mark.parametrize("top_p", [2**-60, 0.25, 0.375, 0.5, 0.5 + 2**-40, 0.75, 0.9375, 1 - 2**-40])
@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::17])
def test_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p(
    top_p: float, order: tuple[int, ...]
) -> None:
    """Eighths and sixteenths: sums are exact, so that a sum of just top_p is enough, and a step below is not."""
    probabilities = [(0.5, 0.25, 0.125, 0.0625, 0.0625)[index] for index in order]
    values, ids = nucleus(torch.tensor(probabilities, dtype=torch.float64), top_p)
    wanted = reference_nucleus(probabilities, top_p)
    assert ids.tolist() == wanted
    assert values.tolist() == [probabilities[index] for index in wanted]


@pytest.mark.parametrize("seed", range(4))
def test_nucleus_of_many_tokens_is_numpys(seed: int) -> None:
    """No sum comes near top_p in a way that rounding decides: 1e-9 apart, where sums are off by 1e-13."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(5000, 0.1))
    order = np.argsort(-probabilities, kind="stable")
    sums = np.cumsum(probabilities[order])
    for top_p in random.uniform(0.01, 0.999, 20):
        assert np.abs(sums - top_p).min() > 1e-9
        count = int(np.searchsorted(sums, top_p)) + 1
        assert nucleus(torch.from_numpy(probabilities), top_p)[1].tolist() == order[:count].tolist()


def test_nucleus_of_all_keeps_what_rounding_would_cut() -> None:
    """1 + 1e-17 is 1: the sums have reached 1 before the small ones come."""
    probabilities = torch.tensor([1.0, *[1e-17] * 8], dtype=torch.float64)
    assert nucleus(probabilities, 1.0)[1].tolist() == [*range(9)]


# ---- characters


def by_bytes(ids: Sequence[int]) -> str:
    """Tokens 0..255 are bytes, 256 is the last byte of a u with two dots and the first of another."""
    parts = (bytes([token]) if token < 256 else b"\xbc\xc3" for token in ids)
    return b"".join(parts).decode(errors="replace")


def streamed(ids: Sequence[int]) -> list[str]:
    """What each token makes certain, and the rest."""
    stream = TextStream(by_bytes)
    return [*map(stream.push, ids), stream.close()]


def test_character_of_four_bytes_comes_with_its_last() -> None:
    assert streamed(b"a\xf0\x9f\x98\x80b") == ["a", "", "", "", "\U0001f600", "b", ""]


def test_cut_character_comes_at_the_end_as_a_replacement() -> None:
    assert streamed(b"a\xe4\xb8") == ["a", "", "", "\ufffd"]


def test_broken_character_comes_when_it_can_be_no_other() -> None:
    assert streamed(b"\xe4a") == ["", "\ufffda", ""]


def test_real_replacement_character_comes_through() -> None:
    assert "".join(streamed("a\ufffdb\ufffd".encode())) == "a\ufffdb\ufffd"


def test_closed_stream_is_empty() -> None:
    stream = TextStream(by_bytes)
    stream.push(0xE4)
    assert (stream.close(), stream.close(), stream.push(0x61)) == ("\ufffd", "", "a")


def certain(data: bytes) -> str:
    """What Python's incremental decoder gives out of these bytes; it never takes anything back."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


BYTES = st.lists(
    st.sampled_from([0x61, 0x80, 0x9F, 0xBF, 0xC3, 0xE0, 0xE4, 0xF0, 0xF4, 0xFF, 0xEF, 0xBD]), max_size=60
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(BYTES)
@example([0x80] * 60)
@example([*"\u00fc\u4e2d\U0001f600\ufffd".encode()] * 6)
@example([0xF0, 0x9F, 0x98] * 20)
def test_stream_is_the_text_of_all_and_never_later_than_needed(ids: list[int]) -> None:
    stream, told = TextStream(by_bytes), ""
    for index, token in enumerate(ids):
        told += stream.push(token)
        assert certain(bytes(ids[: index + 1])).removesuffix("\ufffd") in (told, told.removesuffix("\ufffd"))
    assert told + stream.close() == by_bytes(ids)


def test_stream_of_tokens_that_end_within_characters_is_their_text() -> None:
    """No two of them can be parted, however many wait."""
    ids = [0xC3, *[256] * 40, 0xBC, 0x61]
    assert by_bytes(ids) == "\u00fc" * 41 + "a"
    assert "".join(streamed(ids)) == by_bytes(ids)


def test_stream_without_text_keeps_few_tokens_waiting() -> None:
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return by_bytes(ids)

    stream = TextStream(decode)
    text = "".join(stream.push(0x80) for _ in range(1000)) + stream.close()
    assert text == "\ufffd" * 1000
    assert max(asked) <= 20
