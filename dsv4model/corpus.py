"""Data files -> documents: token ids, and which of them the model is to learn.  Knows no rows and no tensors.

A line that cannot be used is named, with its file and the reason, and counted; nothing is left out in silence.
Source: the released chat encoding (chat.py); HellaSwag as published (ctx, endings, label).
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4ckpt import strictjson
from dsv4ckpt.contained import io_errors, opened
from dsv4ckpt.errors import Dsv4Error, MissingFile, Usage

from . import dataset_rows
from .chat import NO_TEXTS, Piece, Texts, encode_with_spans
from .losses import IGNORED
from .recipe import DataPart, Kind
from .tokenizer import Tokenizer

_MOST_LINE_BYTES = 64 * 1024 * 1024
_LIMITS = strictjson.Limits(objects=100_000, lists=100_000, commas=20_000_000)
_MOST_LABELS = 100  # endings of a question


class BadLine(Dsv4Error):
    """A line of a data file that cannot be trained on."""


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that belong together. counted: for each, whether predicting it is learned."""

    ids: array[int]
    counted: bytes

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Corpus:
    """All documents, in the order of files and lines."""

    documents: list[Document] = field(default_factory=list)
    told: list[BadLine] = field(default_factory=list)  # lines that were left
    num_left: Counter[str] = field(default_factory=Counter)  # why documents or tokens were left -> how many

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def num_counted(self) -> int:
        return sum(sum(document.counted) for document in self.documents)


AskTexts = Callable[[], Texts]


def read_corpus(
    files: Sequence[str],
    data: DataPart,
    tokenizer: Tokenizer | None,
    vocab: int,
    texts: AskTexts = lambda: NO_TEXTS,
) -> Corpus:
    """Read and tokenise files. Five bytes a token stay in memory.

    files      paths, or what dataset_rows.py reads
    tokenizer  None goes with Kind.TOKENS only
    texts      asked by the first conversation with tools or a response format, which need words of the checkpoint
    raises     MissingFile, BadLine (if data.bad_lines is "refuse"), Usage if nothing is left; Environment; whatever
               `texts` raises
    """
    corpus = Corpus()
    for path in files:
        is_file = not path.startswith(dataset_rows.PREFIX)
        for number, line in _lines(path) if is_file else dataset_rows.rows(path):
            try:
                line = line if isinstance(line, bytes) else dataset_rows.as_line(line)
                documents = _documents(line, data, tokenizer, vocab, texts)
            except (strictjson.Malformed, Usage) as error:
                reason = error.what if isinstance(error, Usage) else str(error)
                bad = BadLine(
                    f"{'line' if is_file else 'row'} {number:,} cannot be trained on: {reason}",
                    file=os.path.basename(path) if is_file else path,
                    do='mend or remove it; data.bad_lines="skip" leaves such lines, and names and counts them',
                )
                if data.bad_lines != "skip":
                    raise bad from None
                corpus.told.append(bad)
                continue
            for document in documents:
                corpus.documents += _fitted(document, data, corpus.num_left)
    if not corpus.num_counted:
        raise Usage(
            "nothing in the data is to be learned",
            expected="a token at least",
            found=f"{len(corpus.documents):,} documents, {len(corpus.told):,} lines that cannot be trained on",
            do="look at data.files and data.kind",
        )
    return corpus


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank. raises MissingFile, BadLine, Environment"""
    if not os.path.isfile(path):
        raise MissingFile("there is no such data file", file=path, do="check data.files")
    directory, name = os.path.split(os.path.abspath(path))
    with opened(directory, name, True) as fd, io_errors(name), os.fdopen(os.dup(fd), "rb") as file:
        number = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > _MOST_LINE_BYTES:
                raise BadLine(
                    f"line {number:,} is longer than {_MOST_LINE_BYTES:,} bytes",
                    file=name,
                    do="write a JSON object on each line",
                )
            if line.strip():
                yield number, line


def _documents(
    line: bytes, data: DataPart, tokenizer: Tokenizer | None, vocab: int, texts: AskTexts
) -> list[Document]:
    """What a line holds. raises Usage, strictjson.Malformed"""
    strictjson.require_modest(line, _LIMITS)
    value = strictjson.loads(line, floats=True)
    if not isinstance(value, dict):
        raise Usage("it is no JSON object")
    if data.kind is Kind.TOKENS:
        return [_tokens(value, vocab)]
    assert tokenizer is not None
    if data.kind is Kind.CHAT:
        document = _chat(value, data, tokenizer, texts)
    else:
        document = {Kind.TEXT: _text, Kind.HELLASWAG: _hellaswag}[data.kind](value, tokenizer)
    if max(document.ids) >= vocab:
        raise Usage(f"token {max(document.ids):,} is beyond the model's vocabulary of {vocab:,}")
    return [document]


def _chat(value: dict[str, Any], data: DataPart, tokenizer: Tokenizer, texts: AskTexts) -> Document:
    """{"messages": [...], "tools": [...]}: what assistants wrote is learned, but for messages with "mask": 0."""
    messages = value.get("messages")
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise Usage('it has no list of "messages"')
    if value.get("tools"):
        messages = _with_tools(messages, value["tools"])
    needs_texts = any(message.get(key) for message in messages for key in ("tools", "response_format"))
    pieces = encode_with_spans(messages, data.thinking, texts=texts() if needs_texts else NO_TEXTS)
    labelled = tokenizer.encode_pieces(_unmasked(messages, pieces))
    if not any(labelled.is_assistant):
        raise Usage("no assistant says anything in it")
    return Document(array("i", labelled.ids), bytes(labelled.is_assistant))


def _with_tools(messages: list[Any], tools: Any) -> list[Any]:
    """Tools beside the messages belong to the system message."""
    if messages and messages[0].get("role") == "system":
        if messages[0].get("tools"):
            raise Usage("tools stand beside the messages and in the system message")
        return [{**messages[0], "tools": tools}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _unmasked(messages: list[Any], pieces: list[Piece]) -> list[Piece]:
    """Pieces of assistants whose message says "mask": 0 are not learned."""
    spoken = [message for message in messages if message.get("role") == "assistant"]
    if all(message.get("mask", 1) for message in spoken):
        return pieces
    if len(spoken) != sum(piece.is_assistant for piece in pieces):
        raise Usage('"mask" is not clear: two assistant messages follow each other')
    told = iter(spoken)
    return [
        piece._replace(is_assistant=bool(next(told).get("mask", 1))) if piece.is_assistant else piece
        for piece in pieces
    ]


def _text(value: dict[str, Any], tokenizer: Tokenizer) -> Document:
    """{"text": "..."}: all of it is learned, and that it ends."""
    text = value.get("text")
    if not isinstance(text, str) or not text:
        raise Usage('it has no "text"')
    ids = tokenizer.encode(text)
    return Document(array("i", [tokenizer.bos, *ids, tokenizer.eos]), b"\0" + b"\1" * (len(ids) + 1))


def _hellaswag(value: dict[str, Any], tokenizer: Tokenizer) -> Document:
    """The right ending is learned, after its context."""
    context, endings, label = value.get("ctx"), value.get("endings"), value.get("label")
    if isinstance(label, str) and label.isdecimal() and len(label) < 3:
        label = int(label)
    fits = (
        isinstance(context, str)
        and isinstance(endings, list)
        and type(label) is int
        and 0 <= label < min(len(endings), _MOST_LABELS)
        and isinstance(endings[label], str)
    )
    if not fits:
        raise Usage('it has no "ctx", "endings" and "label" that fit')
    assert isinstance(endings, list) and isinstance(label, int)
    pieces = [Piece(str(context) + " ", False), Piece(endings[label], True)]
    labelled = tokenizer.encode_pieces(pieces)
    return Document(
        array("i", [tokenizer.bos, *labelled.ids, tokenizer.eos]), bytes([0, *labelled.is_assistant, 1])
    )


def _tokens(value: dict[str, Any], vocab: int) -> Document:
    """{"input_ids": [...], "labels": [...]}: labels as transformers has them, -100 is not learned; without, all is."""
    ids, labels = value.get("input_ids"), value.get("labels")
    if (
        not isinstance(ids, list)
        or not ids
        or any(type(item) is not int or not 0 <= item < vocab for item in ids)
    ):
        raise Usage(f'it has no "input_ids" that are tokens below {vocab:,}')
    if labels is None:
        return Document(array("i", ids), b"\0" + b"\1" * (len(ids) - 1))
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise Usage('"labels" are not as many as "input_ids"')
    if any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
        raise Usage('"labels" are neither -100 nor the token itself: they are not to be shifted')
    return Document(array("i", ids), bytes(label != IGNORED for label in labels))


def _fitted(document: Document, data: DataPart, left: Counter[str]) -> Iterator[Document]:
    """The document in rows of data.length. raises Usage"""
    if len(document) <= data.length:
        yield document
        return
    if data.too_long == "refuse":
        raise Usage(
            "a document is longer than a row",
            expected=f"at most {data.length:,} tokens (data.length)",
            found=f"{len(document):,} tokens",
            do='take longer rows, or data.too_long="split", "cut" or "skip"',
        )
    if data.too_long == "skip":
        left["documents longer than a row"] += 1
        return
    for begin in range(0, len(document), data.length):
        part = slice(begin, begin + data.length)
        if begin and data.too_long == "cut":
            left["tokens beyond a row"] += len(document) - begin
            return
        yield Document(document.ids[part], document.counted[part])
