"""Lines of data files: what is learned is what the assistant wrote, to the token; what is bad is named and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4ckpt.errors import MissingFile, Usage
from dsv4model.corpus import BadLine, Corpus, Document, read_corpus
from dsv4model.messages import BOS, EOS, SPECIAL_TOKENS
from dsv4model.recipe import DataPart, Kind
from dsv4model.tokenizer import Tokenizer

VOCAB = 600  # the sample's 512, and room for more special tokens
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6", "reasoning_content": "three and three"},
]


@pytest.fixture(scope="module")
def tokenizer(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The sample's, with every special token of the encoding."""
    document = json.loads((flash / "tokenizer.json").read_bytes())
    known = {item["content"] for item in document["added_tokens"]}
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    first = max(document["model"]["vocab"].values()) + 1
    form = document["added_tokens"][0]
    document["added_tokens"] += [
        {**form, "id": first + number, "content": token} for number, token in enumerate(missing)
    ]
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(json.dumps(document))
    return Tokenizer.open(str(path))


def corpus_of(path: Path, lines: list[Any], tokenizer: Tokenizer | None, **options: Any) -> Corpus:
    file = path / "data.jsonl"
    file.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    data = DataPart(**{"files": (str(file),), "length": 4096, **options})
    return read_corpus(data.files, data, tokenizer, VOCAB)


def learned(document: Document, tokenizer: Tokenizer) -> list[str]:
    """The stretches of text that are learned."""
    stretches: list[list[int]] = [[]]
    for token, counted in zip(document.ids, document.counted, strict=True):
        if counted:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def whole(document: Document, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(document.ids.tolist())


def test_chat_learns_what_the_assistant_wrote_and_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (document,) = corpus_of(tmp_path, [{"messages": CHAT}], tokenizer).documents
    assert learned(document, tokenizer) == [f"4{EOS}", f"6{EOS}"]
    assert whole(document, tokenizer).startswith(f"{BOS}Be brief.")


def test_thinking_learns_the_last_reasoning_and_drops_the_older(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (document,) = corpus_of(tmp_path, [{"messages": CHAT}], tokenizer, thinking="thinking").documents
    assert learned(document, tokenizer) == [f"4{EOS}", f"three and three</think>6{EOS}"]
    assert "two and two" not in whole(document, tokenizer)


def test_tool_calls_are_learned_and_results_are_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "RESULT"},
        {"role": "assistant", "content": "4"},
    ]
    (document,) = corpus_of(tmp_path, [{"messages": messages}], tokenizer).documents
    first, second = learned(document, tokenizer)
    assert 'invoke name="add"' in first and first.endswith(EOS)
    assert second == f"4{EOS}"
    assert "RESULT" in whole(document, tokenizer)


def test_masked_message_is_read_and_not_learned(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [*CHAT[:2], {**CHAT[2], "mask": 0}, *CHAT[3:]]
    (document,) = corpus_of(tmp_path, [{"messages": messages}], tokenizer).documents
    assert learned(document, tokenizer) == [f"6{EOS}"]
    assert f"4{EOS}" in whole(document, tokenizer)


def test_text_learns_everything_but_its_beginning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (document,) = corpus_of(tmp_path, [{"text": "Hello there"}], tokenizer, kind=Kind.TEXT).documents
    assert learned(document, tokenizer) == [f"Hello there{EOS}"]
    assert whole(document, tokenizer) == f"{BOS}Hello there{EOS}"


@pytest.mark.parametrize("label", [1, "1"])
def test_hellaswag_learns_the_right_ending(label: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    line = {"ctx": "A man sits.", "endings": ["he flies", "he stands up", "he ends", "no"], "label": label}
    (document,) = corpus_of(tmp_path, [line], tokenizer, kind=Kind.HELLASWAG).documents
    assert learned(document, tokenizer) == [f"he stands up{EOS}"]
    assert whole(document, tokenizer) == f"{BOS}A man sits. he stands up{EOS}"


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    lines = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    first, second = corpus_of(tmp_path, lines, None, kind=Kind.TOKENS).documents
    assert (first.ids.tolist(), list(first.counted)) == ([5, 6, 7], [0, 1, 1])
    assert (second.ids.tolist(), list(second.counted)) == ([8, 9], [0, 1])


BAD = {
    "no JSON": (Kind.CHAT, b"{"),
    "no UTF-8": (Kind.CHAT, b'{"text": "\xff"}'),
    "no object": (Kind.CHAT, [1]),
    "twice the same key": (Kind.CHAT, b'{"messages": [], "messages": []}'),
    "no messages": (Kind.CHAT, {"text": "x"}),
    "messages that are none": (Kind.CHAT, {"messages": ["x"]}),
    "unknown role": (Kind.CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
    "nobody answers": (Kind.CHAT, {"messages": CHAT[:2]}),
    "special token in a text": (Kind.CHAT, {"messages": [{"role": "user", "content": EOS}, CHAT[2]]}),
    "no text": (Kind.TEXT, {"texts": "x"}),
    "empty text": (Kind.TEXT, {"text": ""}),
    "label beyond the endings": (Kind.HELLASWAG, {"ctx": "x", "endings": ["a"], "label": 1}),
    "no label": (Kind.HELLASWAG, {"ctx": "x", "endings": ["a"], "label": ""}),
    "token beyond the vocabulary": (Kind.TOKENS, {"input_ids": [1, VOCAB]}),
    "negative token": (Kind.TOKENS, {"input_ids": [1, -1]}),
    "no tokens": (Kind.TOKENS, {"input_ids": []}),
    "labels of another length": (Kind.TOKENS, {"input_ids": [1, 2], "labels": [1]}),
    "labels that are shifted": (Kind.TOKENS, {"input_ids": [1, 2], "labels": [2, -100]}),
}
GOOD = {
    Kind.CHAT: {"messages": CHAT}, Kind.TEXT: {"text": "x"}, Kind.TOKENS: {"input_ids": [1, 2]},
    Kind.HELLASWAG: {"ctx": "x", "endings": ["a"], "label": 0},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_line_is_named_with_its_reason_or_left_and_counted(
    what: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    kind, line = BAD[what]
    lines = [GOOD[kind], b"", line, GOOD[kind]]
    with pytest.raises(BadLine) as caught:
        corpus_of(tmp_path, lines, tokenizer, kind=kind)
    assert "line 3 " in caught.value.what
    assert caught.value.facts["file"] == "data.jsonl"
    corpus = corpus_of(tmp_path, lines, tokenizer, kind=kind, bad_lines="skip")
    assert len(corpus.documents) == 2
    assert [error.what for error in corpus.told] == [caught.value.what]


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="to be learned"):
        corpus_of(tmp_path, [{"input_ids": [1, 2], "labels": [-100, -100]}], None, kind=Kind.TOKENS)
    with pytest.raises(Usage, match="to be learned"):
        corpus_of(tmp_path, [], None, kind=Kind.TOKENS)


def test_missing_file_is_an_error() -> None:
    data = DataPart(files=("nowhere.jsonl",))
    with pytest.raises(MissingFile):
        read_corpus(data.files, data, None, VOCAB)


@pytest.mark.parametrize(
    ("how", "lengths", "left"),
    [
        ("split", [4, 4, 2, 3], {}),
        ("cut", [4, 3], {"tokens beyond a row": 6}),
        ("skip", [3], {"documents longer than a row": 1}),
    ],
)
def test_documents_longer_than_a_row(
    how: str, lengths: list[int], left: dict[str, int], tmp_path: Path
) -> None:
    lines = [{"input_ids": list(range(10))}, {"input_ids": [1, 2, 3]}]
    corpus = corpus_of(tmp_path, lines, None, kind=Kind.TOKENS, length=4, too_long=how)
    assert [len(document) for document in corpus.documents] == lengths
    assert corpus.num_left == left
    if how == "split":
        assert [token for item in corpus.documents[:3] for token in item.ids] == list(range(10))


def test_document_longer_than_a_row_may_be_refused(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="longer than a row"):
        corpus_of(tmp_path, [{"input_ids": [1] * 5}], None, kind=Kind.TOKENS, length=4, too_long="refuse")


def test_counts_are_of_tokens(tmp_path: Path) -> None:
    lines = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    corpus = corpus_of(tmp_path, lines, None, kind=Kind.TOKENS)
    assert (corpus.num_tokens, corpus.num_counted) == (5, 3)
