"""Text <-> token ids with a checkpoint's tokenizer.json.  Knows no roles and no layout.

Owns the checks around the `tokenizers` library: the file is a regular one inside the checkpoint and not too large, the
special tokens of the encoding are single tokens, and nothing is cut, padded or added on the way.
Source: tokenizer.json of the releases (byte-level BPE, no normalizer; special tokens are matched on raw text).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dsv4ckpt import formats, probe, shard
from dsv4ckpt.contained import opened
from dsv4ckpt.errors import Dsv4Error, Environment, MissingFile, Usage

from .chat import Piece
from .messages import ALWAYS_USED, BOS, EOS, SPECIAL_TOKENS

if TYPE_CHECKING:
    import tokenizers

FILE_NAME = "tokenizer.json"
_PUBLISHED = "take the tokenizer.json that was published with this checkpoint"


class BadTokenizer(Dsv4Error):
    """tokenizer.json is malformed, or lacks a special token that the encoding needs."""


class Labelled(NamedTuple):
    """Token ids of a conversation, and which of them the assistant wrote."""

    ids: list[int]
    is_assistant: list[bool]


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """raises BadTokenizer: a special token that every conversation uses is missing or no single token"""
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        for token in ALWAYS_USED:
            self._require_single(token)

    @classmethod
    def open(cls, directory: str, *, follow_links: bool = False) -> Tokenizer:
        """The tokenizer of a checkpoint. raises MissingFile, BadTokenizer, UnsafePath, Environment"""
        data = _file_bytes(directory, follow_links)
        try:
            import tokenizers
        except ImportError:
            raise Environment(
                "the library `tokenizers` is not installed", file=FILE_NAME, do="pip install tokenizers"
            ) from None
        try:
            inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises no narrower class
            raise BadTokenizer(
                f"not a tokenizer: {str(error)[:200]!r}", file=FILE_NAME, do=_PUBLISHED
            ) from error
        return cls(inner)

    @property
    def bos(self) -> int:
        """Id of the token that begins every text."""
        return self._require_single(BOS)

    @property
    def eos(self) -> int:
        """Id of the token that ends an assistant's turn."""
        return self._require_single(EOS)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, special ones included; the model's vocabulary may have more rows."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it become single ids, and no others are added.

        raises BadTokenizer: the text has a special token of the encoding that this tokenizer does not know
        """
        return list(self._encoding(text).ids)

    def encode_pieces(self, pieces: Sequence[Piece]) -> Labelled:
        """Ids of the joined text, as `encode` gives them, each marked: does it lie wholly in an assistant's piece?

        The text is tokenized as a whole, because pieces need not end where tokens do.
        """
        encoding = self._encoding("".join(piece.text for piece in pieces))
        is_theirs = [piece.is_assistant for piece in pieces for _ in piece.text]
        return Labelled(list(encoding.ids), [all(is_theirs[begin:end]) for begin, end in encoding.offsets])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens included; bytes that are no UTF-8 become U+FFFD. raises Usage"""
        for token in ids:
            if not 0 <= token < 2**32 or self._inner.id_to_token(token) is None:
                raise Usage(
                    "an id without a token",
                    expected=f"ids of the {self.num_tokens:,} tokens in {FILE_NAME}",
                    found=str(token),
                )
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def _encoding(self, text: str) -> tokenizers.Encoding:
        for token in SPECIAL_TOKENS:
            if token in text:
                self._require_single(token)
        try:
            return self._inner.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # what the library says to half a character
            raise Usage("half a character (a lone surrogate) in a text", do="repair the text") from None

    def _require_single(self, token: str) -> int:
        number = self._inner.token_to_id(token)
        if number is None or self._inner.encode(token, add_special_tokens=False).ids != [number]:
            raise BadTokenizer(
                "a special token of the encoding is not a single token here",
                file=FILE_NAME,
                expected=repr(token),
                do=_PUBLISHED,
            )
        return int(number)


def _file_bytes(directory: str, follow_links: bool) -> bytes:
    if not probe.is_there(os.path.join(directory, FILE_NAME)):
        raise MissingFile("the checkpoint has no tokenizer", file=FILE_NAME, do=_PUBLISHED)
    with opened(directory, FILE_NAME, follow_links) as fd:
        size = os.fstat(fd).st_size
        if size > formats.MAX_SMALL_FILE_BYTES:
            raise BadTokenizer(
                "the file is too large",
                file=FILE_NAME,
                expected=f"at most {formats.MAX_SMALL_FILE_BYTES:,} bytes",
                found=f"{size:,} bytes",
                do=_PUBLISHED,
            )
        return shard.read_exactly(fd, size, 0, FILE_NAME)
