"""Fuzzes the header reader: changed headers, given to us and to the reference parser; prints what was found as JSON.

    python fuzz_driver.py SEED MUTATIONS SECONDS        ends at whichever comes first

We may refuse what the reference takes, but nothing else than BadHeader may come out, every message must be printable,
and what we accept the reference must accept and read in the same way. Starts without torch, so that it can run twice
beside other tests.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from safetensors import SafetensorError, deserialize

from dsv4ckpt import shard
from dsv4ckpt.errors import BadHeader

Seed = tuple[bytes, bytes]  # header, data
BITS = {"F4": 4, "U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F32": 32, "I64": 64}


# ---- headers to start from, of different character


def document(tensors: Iterable[tuple[str, str, list[int]]]) -> tuple[dict[str, Any], bytes]:
    """A header's JSON for tensors that stand in this order, and data."""
    found: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in tensors:
        begin, bits = end, BITS[dtype]
        for length in shape:
            bits *= length
        end = begin + bits // 8
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return found, bytes(number % 251 for number in range(end))


def experts() -> Iterable[tuple[str, str, list[int]]]:
    """As a released layer has them: codes and their scales."""
    for number in range(3):
        for inner in ("w1", "w2"):
            name = f"layers.0.ffn.experts.{number}.{inner}"
            yield name + ".weight", "I8", [4, 16]
            yield name + ".scale", "F8_E8M0", [4, 1]
    yield "layers.0.attn.wkv.weight", "F8_E4M3", [8, 8]
    yield "layers.0.ffn.gate.tid2eid", "I64", [5, 2]


def seeds() -> list[Seed]:
    one, four = document([("a", "U8", [4])])
    two, eight = document([("a", "U8", [4]), ("b", "BF16", [2, 1])])
    odd, odd_data = document(
        [("scalar", "F32", []), ("none", "I64", [0, 7]), ("deep", "U8", [1, 1, 1, 2, 1, 1, 1, 2])]
    )
    half, half_data = document([("x", "F4", [2, 4]), ("y", "F4", [8, 1]), ("z", "BOOL", [3])])
    layer, layer_data = document(experts())
    letters, letters_data = document([("\u5c42.0.\u00e9", "U8", [2]), ("\U0001f600", "I8", [1])])
    metadata = {"__metadata__": {"format": "pt", "a\u00e9": 'x"\\/'}}
    own = shard.encode_header([("b", "F32", (2,)), ("a", "U8", (3,))], {"format": "pt"})[8:]
    found = [
        (json.dumps(one, separators=(",", ":")), four),
        (json.dumps({**metadata, **one}), four),
        (json.dumps({**two, **metadata}, ensure_ascii=False), eight),
        (json.dumps(dict(reversed(two.items()))), eight),
        (json.dumps(two, indent=1) + " " * 9, eight),
        (json.dumps(odd), odd_data),
        (json.dumps(half), half_data),
        (json.dumps(layer), layer_data),
        (json.dumps(letters), letters_data),
        (json.dumps(letters, ensure_ascii=False), letters_data),
        (json.dumps(metadata), b""),
        ("{}", b""),
        (own.decode(), bytes(11)),
    ]
    return [(header.encode(), data) for header, data in found]


# ---- one small change of a header; `at` is a place in it

TOKENS = [
    *(b"{ } [ ] , : \" \\ - 0 1 9 . e E + t \xff \x00 \xef\xbb\xbf \xc3\xa9 \xed\xa0\x80".split(b" ")),
    *(b'-0 0.0 1e1 NaN true null "" {} [] \\u0000 \\ud800 \\u0061 9223372036854775808 "a":'.split(b" ")),
    *(b'"dtype" "shape" "data_offsets" "U8" "F4" "BF16" "__metadata__" "x":1, ,"x":1'.split(b" ")),
    b" ", b"\n", b"\t", b"  ",
]  # fmt: skip
NUMBERS = [b"%d" % number for number in (0, 1, 2, 3, 4, 8, 16, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64)]
VALUES = [*b'null true 0 -1 1.5 [] {} "" "U8" [0] [[0]] {"a":1} {"a":"b"} [1,2]'.split(b" ")]
_DECODER = json.JSONDecoder()
_COLON = re.compile(rb":\s*")
_DIGITS = re.compile(rb"\d+")
_STRING = re.compile(rb'"[^"\\]*"')


def bit_flipped(rng: random.Random, header: bytes, at: int) -> bytes:
    return (
        header[:at]
        + bytes([(header[at] if at < len(header) else 0) ^ 1 << rng.randrange(8)])
        + header[at + 1 :]
    )


def byte_replaced(rng: random.Random, header: bytes, at: int) -> bytes:
    return header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :]


def token_inserted(rng: random.Random, header: bytes, at: int) -> bytes:
    return header[:at] + rng.choice(TOKENS) + header[at:]


def token_put(rng: random.Random, header: bytes, at: int) -> bytes:
    token = rng.choice(TOKENS)
    return header[:at] + token + header[at + len(token) :]


def slice_deleted(rng: random.Random, header: bytes, at: int) -> bytes:
    return header[:at] + header[at + rng.randrange(1, 5) :]


def slice_doubled(rng: random.Random, header: bytes, at: int) -> bytes:
    end = at + rng.randrange(1, 80)
    return header[:end] + header[at:end] + header[end:]


def slice_moved(rng: random.Random, header: bytes, at: int) -> bytes:
    end = at + rng.randrange(1, 80)
    rest, to = header[:at] + header[end:], rng.randrange(len(header) + 1)
    return rest[:to] + header[at:end] + rest[to:]


def number_edited(rng: random.Random, header: bytes, at: int) -> bytes:
    """Replaced, or one more or less."""
    found = _DIGITS.search(header, at) or _DIGITS.search(header)
    if not found:
        return header
    value = int(found[0]) if len(found[0]) < 30 else 0
    new = rng.choice((*NUMBERS, b"%d" % (value + 1), b"%d" % (value - 1), b"%d" % (2 * value)))
    return header[: found.start()] + new + header[found.end() :]


def string_taken_from_elsewhere(rng: random.Random, header: bytes, at: int) -> bytes:
    strings = _STRING.findall(header)
    found = _STRING.search(header, at) or _STRING.search(header)
    if not found:
        return header
    return header[: found.start()] + rng.choice(strings) + header[found.end() :]


def value_replaced(rng: random.Random, header: bytes, at: int) -> bytes:
    """A whole value of an object, whatever it is, by another kind of value."""
    found = _COLON.search(header, at) or _COLON.search(header)
    if not found:
        return header
    rest = header[found.end() :].decode("latin-1")  # a byte is a character
    try:
        _, length = _DECODER.raw_decode(rest)
    except ValueError:
        return header
    return header[: found.end()] + rng.choice(VALUES) + rest[length:].encode("latin-1")


Change = Callable[[random.Random, bytes, int], bytes]
CHANGES: tuple[Change, ...] = (
    bit_flipped, byte_replaced, token_inserted, token_put, slice_deleted, slice_doubled, slice_moved, number_edited,
    string_taken_from_elsewhere, value_replaced,
)  # fmt: skip


def spliced(rng: random.Random, one: bytes, two: bytes) -> bytes:
    """The beginning of one header and the end of another."""
    return one[: rng.randrange(len(one) + 1)] + two[rng.randrange(len(two) + 1) :]


def mutated_file(rng: random.Random, known: list[Seed]) -> bytes:
    """A file whose header has one to three changes, rarely beside its length field or its data."""
    header, data = rng.choice(known)
    if rng.random() < 0.03:
        header = spliced(rng, header, rng.choice(known)[0])
    for _ in range(rng.choice((1, 1, 2, 3))):
        header = rng.choice(CHANGES)(rng, header, rng.randrange(len(header) + 1))
    length = len(header)
    dice = rng.random()
    if dice < 0.02:
        length = max(0, length + rng.choice((-8, -1, 1, 8, 2**32)))
    elif dice < 0.03:
        length ^= 1 << rng.randrange(64)
    elif dice < 0.05:
        data = rng.choice((data[:-1], data + b"\0", b"", data + header))
    return struct.pack("<Q", length) + header + data


# ---- the verdict


def disagreement(fd: int, file: bytes) -> str | bool:
    """What is wrong with our verdict about a file; False: we refuse it, True: both read it alike."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, file, 0)
    try:
        header = shard.read_header(fd, "model.safetensors")
    except BadHeader as error:
        text = str(error)
        is_plain = text.replace("\n", "").isprintable() and len(text) < 2000
        return False if is_plain else f"the message {text!r} for {file!r}"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return f"{error!r} for {file!r}"
    theirs = reference(file)
    if theirs is None:
        return f"the reference refuses {file!r}"
    ours = {
        name: (entry.dtype, entry.shape, file[entry.begin : entry.end])
        for name, entry in header.entries.items()
    }
    return ours == theirs or f"the reference reads {theirs} in {file!r}"


def reference(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the reference parser reads: (dtype, shape, data) of each tensor. None: it refuses the file."""
    try:
        found = deserialize(file)
    except (SafetensorError, ValueError, UnicodeDecodeError, OverflowError):
        return None
    return {name: (it["dtype"], tuple(it["shape"]), bytes(it["data"])) for name, it in found}


def fuzz(seed: int, num_mutations: float, seconds: float) -> dict[str, Any]:
    rng, known, fd = random.Random(seed), seeds(), os.memfd_create("header")
    num_done = num_accepted = 0
    wrong: list[str] = []
    ends = time.monotonic() + seconds
    while num_done < num_mutations and len(wrong) < 20 and (num_done % 1000 or time.monotonic() < ends):
        verdict = disagreement(fd, mutated_file(rng, known))
        num_done += 1
        if verdict is True:
            num_accepted += 1
        elif verdict:
            wrong.append(verdict)
    os.close(fd)
    return {"seed": seed, "mutations": num_done, "accepted": num_accepted, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(fuzz(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))))
