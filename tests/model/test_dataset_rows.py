"""Rows of the library `datasets`: a table learns what the same lines of a file do, whatever blanks it is filled with.

The library itself is not needed: a small module of its name keeps rows and records what it was asked for.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsv4ckpt.errors import Dsv4Error, Environment, Usage
from dsv4model.corpus import BadLine, Corpus, read_corpus
from dsv4model.recipe import DataPart, Kind
from dsv4model.tokenizer import Tokenizer

VOCAB = 512


class Table:
    """A data set, which gives plain values only where it is told to: it may have been saved to give tensors."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def with_format(self, kind: None) -> list[dict[str, Any]]:
        assert kind is None
        return self._rows


class Library(ModuleType):
    """What there is, by what it is asked for: a table, tables by split, or an error."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.there: dict[Any, Any] = {}

    def _found(self, *asked: Any) -> Any:
        found = self.there[asked]
        if isinstance(found, Exception):
            raise found
        return found

    def load_from_disk(self, directory: str) -> Any:
        return self._found(directory)

    def load_dataset(self, path: str, name: str | None, *, split: str, trust_remote_code: bool) -> Any:
        assert trust_remote_code is False
        return self._found(path, name, split)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "datasets", made)
    return made


@pytest.fixture(scope="module")
def tokenizer(flash: Path) -> Tokenizer:
    return Tokenizer.open(str(flash))


def corpus_of(tokenizer: Tokenizer | None, *files: str, **options: Any) -> Corpus:
    data = DataPart(**{"files": files, "length": 256, **options})
    return read_corpus(data.files, data, tokenizer, VOCAB)


def refused(kind: type[Dsv4Error], *files: str, **options: Any) -> Dsv4Error:
    with pytest.raises(kind) as caught:
        corpus_of(None, *files, kind=Kind.TOKENS, **options)
    return caught.value


def test_table_learns_what_the_lines_of_a_file_do(
    library: Library, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A table has every field in every message: one "mask" in one of them is None in all others."""
    lines = [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {
            "messages": [
                {"role": "user", "content": "é 1?"},
                {"role": "assistant", "content": "No.", "mask": 0},
                {"role": "user", "content": "2?"},
                {"role": "assistant", "content": "Yes.", "mask": 1},
            ]
        },
    ]
    blank = {"mask": None, "reasoning_content": None, "tool_calls": None}
    rows = [
        {"messages": [{**blank, **item} for item in line["messages"]], "tools": None, "id": 7}
        for line in lines
    ]
    library.there[("org/talks", None, "train")] = Table(rows)
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = corpus_of(tokenizer, "datasets:org/talks")
    wanted = corpus_of(tokenizer, str(file))
    assert found.documents == wanted.documents
    assert 0 < sum(found.documents[1].counted) < sum(found.documents[0].counted) + 10


def test_files_and_tables_are_read_in_their_order(library: Library, tmp_path: Path) -> None:
    for number in (1, 2):
        library.there[(f"table{number}", None, "train")] = Table([{"input_ids": [number] * 3}])
    file = tmp_path / "tokens.jsonl"
    file.write_text('{"input_ids": [9, 9]}\n')
    found = corpus_of(None, "datasets:table2", str(file), "datasets:table1", kind=Kind.TOKENS)
    assert [document.ids[0] for document in found.documents] == [2, 9, 1]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name@validation", ("org/name", None, "validation")),
        ("org/name:en@train[:1%]", ("org/name", "en", "train[:1%]")),
    ],
)
def test_name_configuration_and_split_are_asked_for(
    source: str, asked: tuple[Any, ...], library: Library
) -> None:
    library.there[asked] = Table([{"input_ids": [1, 2]}])
    assert len(corpus_of(None, f"datasets:{source}", kind=Kind.TOKENS).documents) == 1


def test_saved_directory_is_read_with_or_without_splits(library: Library, tmp_path: Path) -> None:
    one, other = Table([{"input_ids": [1, 2]}]), Table([{"input_ids": [3, 4, 5]}])
    source, directory = f"datasets:{tmp_path}", str(tmp_path)
    library.there[(directory,)] = one
    assert corpus_of(None, source, kind=Kind.TOKENS).num_tokens == 2
    library.there[(directory,)] = {"train": one, "test": other}
    assert corpus_of(None, source, kind=Kind.TOKENS).num_tokens == 2
    assert corpus_of(None, f"{source}@test", kind=Kind.TOKENS).num_tokens == 3
    assert refused(Usage, f"{source}@validation").facts["expected"] == "test or train"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, VOCAB]}, 'no "input_ids"'),
        ({"text": "no tokens"}, 'no "input_ids"'),
        ({"input_ids": [1, 2], "audio": b"RIFF"}, "bytes is not JSON"),
        ({"input_ids": [1, 2], "when": datetime.date(2026, 1, 1)}, "date is not JSON"),
        ({"input_ids": [1, 2], "score": float("nan")}, "not JSON compliant"),
    ],
)
def test_bad_row_is_named_or_left_and_counted(row: dict[str, Any], reason: str, library: Library) -> None:
    source = "datasets:numbers@test"
    library.there[("numbers", None, "test")] = Table([{"input_ids": [1, 2]}, row])
    error = refused(BadLine, source)
    assert error.what.startswith("row 2 cannot be trained on: ") and reason in error.what
    assert error.facts["file"] == source
    found = corpus_of(None, source, kind=Kind.TOKENS, bad_lines="skip")
    assert len(found.documents) == len(found.told) == 1


def test_error_of_the_library_is_told_as_its_own(library: Library) -> None:
    for raised in (
        FileNotFoundError("no such data set\nmore"),
        ConnectionError("offline"),
        ValueError("split"),
    ):
        library.there[("absent", None, "train")] = raised
        error = refused(Environment, "datasets:absent")
        assert error.facts["found"] == repr(str(raised).partition("\n")[0])
        assert error.facts["file"] == "datasets:absent"


def test_library_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused(Environment, "datasets:org/name")
    assert "not installed" in error.what and error.facts["do"] == "pip install datasets"
