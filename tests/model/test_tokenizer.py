"""The tokenizer of a checkpoint, held token by token on the sample's 512 entries.

Expected ids are made here from the sample's rules: 7 special tokens, 256 bytes in the order of their values, pairs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4ckpt import formats
from dsv4ckpt import tokenizer as sample_tokenizer
from dsv4ckpt.errors import Environment, MissingFile, UnsafePath, Usage
from dsv4model import chat
from dsv4model.chat import Piece
from dsv4model.tokenizer import BadTokenizer, Tokenizer

BOS, EOS, USER, ASSISTANT, THINK, END_THINK = 0, 1, 3, 4, 5, 6
FILE = "tokenizer.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample's tokenizer files. Nobody writes into it."""
    path = tmp_path_factory.mktemp("tokenizer")
    for name, data in sample_tokenizer.tokenizer_files().items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.open(str(directory))


def in_bytes(text: str) -> list[int]:
    """Ids of a text without any of the sample's pairs."""
    return [7 + byte for byte in text.encode()]


def edited(directory: Path, at: Path, edit: Callable[[Any], object]) -> str:
    """A folder with a changed tokenizer.json."""
    document = json.loads((directory / FILE).read_bytes())
    edit(document)
    (at / FILE).write_text(json.dumps(document))
    return str(at)


# ---- ids


def test_encode_plain_text_is_its_bytes_and_pairs(tokenizer: Tokenizer) -> None:
    vocabulary = json.loads(sample_tokenizer.tokenizer_files()[FILE])["model"]["vocab"]
    assert tokenizer.encode("XYZ") == in_bytes("XYZ")
    assert tokenizer.encode("X\u00fc\n") == in_bytes("X\u00fc\n")
    assert tokenizer.encode("th") == [vocabulary["th"]]
    assert tokenizer.encode("") == []


@pytest.mark.parametrize(
    ("token", "number"),
    list(zip(chat.ALWAYS_USED, (BOS, EOS, USER, ASSISTANT, THINK, END_THINK), strict=True)),
    ids=lambda value: str(value),
)
def test_encode_special_token_is_a_single_id_wherever_it_stands(
    tokenizer: Tokenizer, token: str, number: int
) -> None:
    assert tokenizer.encode(token) == [number]
    assert tokenizer.encode(f"X{token}{token}Y") == [*in_bytes("X"), number, number, *in_bytes("Y")]


def test_encode_golden_conversation_token_by_token(tokenizer: Tokenizer) -> None:
    conversation: list[Any] = [
        {"role": "system", "content": "XY"},
        {"role": "user", "content": "Z?"},
        {"role": "assistant", "content": "8", "reasoning_content": "Q"},
        {"role": "user", "content": "K"},
    ]
    dropped = [BOS, *in_bytes("XY"), USER, *in_bytes("Z?"), ASSISTANT, END_THINK, *in_bytes("8"), EOS]
    assert tokenizer.encode(chat.encode(conversation, "thinking")) == [
        *dropped, USER, *in_bytes("K"), ASSISTANT, THINK,
    ]  # fmt: skip
    assert tokenizer.encode(chat.encode(conversation[:3], "thinking")) == [
        BOS, *in_bytes("XY"), USER, *in_bytes("Z?"), ASSISTANT, THINK, *in_bytes("Q"), END_THINK, *in_bytes("8"), EOS,
    ]  # fmt: skip


def test_bos_eos_and_number_of_tokens_are_the_samples(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.num_tokens) == (0, 1, 512)


def test_encode_special_token_that_this_tokenizer_lacks_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadTokenizer, match="not a single token"):
        tokenizer.encode("<｜latest_reminder｜>now")


def test_encode_half_a_character_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(Usage, match="half a character"):
        tokenizer.encode("X\ud800")


@pytest.mark.slow
def test_encode_agrees_with_transformers(tokenizer: Tokenizer, directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / FILE))
    text = chat.encode(
        [{"role": "user", "content": "In the end, 12345 \u00fcber there?\n\n  Yes"}], "thinking"
    )
    assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"]


# ---- and back


@pytest.mark.parametrize(
    "text", ["", " ", "  a\n\n", "\x00\x7f", "\u00fc\u4e2d\U0001f600", " the there", "'ll \u2581"]
)
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=12) | st.sampled_from(chat.ALWAYS_USED), max_size=6))
def test_decode_gives_any_text_back_special_tokens_included(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_of_half_a_character_shows_a_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(in_bytes("\u00fc")[:1]) == "\ufffd"


@pytest.mark.parametrize("number", [-1, 512, 129_280, 2**32, 2**70])
def test_decode_id_without_a_token_is_refused(tokenizer: Tokenizer, number: int) -> None:
    with pytest.raises(Usage, match="an id without a token"):
        tokenizer.decode([BOS, number])


# ---- which tokens the assistant wrote


def test_encode_pieces_marks_the_assistants_tokens(tokenizer: Tokenizer) -> None:
    conversation: list[Any] = [
        {"role": "user", "content": "Z\u00fc"},
        {"role": "assistant", "content": "the 8\u00fc", "reasoning_content": "Q"},
        {"role": "user", "content": "K"},
    ]
    pieces = chat.encode_with_spans(conversation, "thinking", drop_thinking=False)
    labelled = tokenizer.encode_pieces(pieces)
    assert labelled.ids == tokenizer.encode(chat.encode(conversation, "thinking", drop_thinking=False))
    runs = [
        (is_theirs, tokenizer.decode([token for token, _ in run]))
        for is_theirs, run in itertools.groupby(zip(*labelled, strict=True), key=lambda pair: pair[1])
    ]
    assert runs == [(piece.is_assistant, piece.text) for piece in pieces]


def test_encode_pieces_token_across_a_border_is_not_the_assistants(tokenizer: Tokenizer) -> None:
    labelled = tokenizer.encode_pieces([Piece("Xt", False), Piece("hY", True)])
    assert labelled.ids == tokenizer.encode("XthY")
    assert labelled.is_assistant == [False, False, True]


# ---- files


def test_open_reads_a_samples_tokenizer(smallest: Path) -> None:
    assert Tokenizer.open(str(smallest)).encode("X") == in_bytes("X")


def test_open_reads_nothing_outside_and_writes_nothing(directory: Path) -> None:
    import tokenizers  # noqa: F401 - importing it reads its own files

    with tiny.recorded_events() as events:
        Tokenizer.open(str(directory))
    assert tiny.not_only_reading(events, directory) == []


def test_open_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no tokenizer"):
        Tokenizer.open(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 10_000, b'{"version": "1.0", "model": null}'])
def test_open_malformed_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(BadTokenizer, match="not a tokenizer"):
        Tokenizer.open(str(tmp_path))


def test_open_too_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(formats.MAX_SMALL_FILE_BYTES + 1)
    with pytest.raises(BadTokenizer, match="too large"):
        Tokenizer.open(str(tmp_path))


@pytest.mark.parametrize("token", chat.ALWAYS_USED)
def test_open_tokenizer_that_lacks_a_special_token_is_refused(
    directory: Path, tmp_path: Path, token: str
) -> None:
    """Known to the vocabulary, but not matched on raw text: it would fall into pieces."""

    def forget(document: Any) -> None:
        document["added_tokens"] = [item for item in document["added_tokens"] if item["content"] != token]

    with pytest.raises(BadTokenizer, match="not a single token"):
        Tokenizer.open(edited(directory, tmp_path, forget))


def test_open_ignores_truncation_padding_and_added_tokens_of_the_file(
    directory: Path, tmp_path: Path
) -> None:
    def meddle(document: Any) -> None:
        document["truncation"] = {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        document["padding"] = {
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
            "pad_type_id": 0, "pad_token": "x",
        }  # fmt: skip
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<think>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<think>": {"id": "<think>", "ids": [THINK], "tokens": ["<think>"]}},
        }

    assert Tokenizer.open(edited(directory, tmp_path, meddle)).encode("XYZXYZ") == in_bytes("XYZXYZ")


def test_open_link_that_leads_outside_is_refused_unless_asked_for(directory: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to(directory / FILE)
    with pytest.raises(UnsafePath):
        Tokenizer.open(str(tmp_path))
    assert Tokenizer.open(str(tmp_path), follow_links=True).num_tokens == 512


def test_open_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with tiny.at_most(10), pytest.raises(UnsafePath):
        Tokenizer.open(str(tmp_path))


def test_open_without_the_library_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Environment, match="pip install tokenizers"):
        Tokenizer.open(str(directory))
