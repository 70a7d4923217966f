"""The tokenizer files of samples: a real byte-level BPE of 512 entries, built from rules.  Knows no tensors.

Same pipeline and special tokens as the releases' (ByteLevel BPE, BOS 0, EOS 1, pad = EOS), so that loaders are
exercised; the merges are a few common English pairs.
Source: tokenizer.json of the releases (structure), the GPT-2 byte alphabet (bytes as printable letters).
"""

from __future__ import annotations

from typing import Any

from . import strictjson

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_SPECIAL = (_BOS, _EOS, "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
_PAIRS = "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri"
_NUM_ENTRIES = 512


def _byte_letters() -> dict[int, str]:
    """The printable letter for each byte, as byte-level BPE writes them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = (byte for byte in range(256) if byte not in letters)
    return {**letters, **{byte: chr(256 + index) for index, byte in enumerate(hidden)}}


def _added(index: int, token: str) -> dict[str, Any]:
    return {
        "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip


def tokenizer_files() -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json."""
    letters = _byte_letters()
    space = letters[32]
    merges = [(pair[0], pair[1]) for pair in _PAIRS.split()]
    merges += [(space, pair[0]) for pair in _PAIRS.split() if (space, pair[0]) not in merges]
    merges = list(dict.fromkeys(merges))
    tokens = [*_SPECIAL, *(letters[byte] for byte in range(256)), *(left + right for left, right in merges)]
    tokens += [f"<｜place▁holder▁no▁{number}｜>" for number in range(_NUM_ENTRIES - len(tokens))]
    special = [*enumerate(_SPECIAL), *((i, t) for i, t in enumerate(tokens) if "place▁holder" in t)]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token) for index, token in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _EOS,
        "model_max_length": 1048576,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": strictjson.pretty(document),
        "tokenizer_config.json": strictjson.pretty(settings),
    }
