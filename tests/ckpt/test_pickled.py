"""A pickle in and out, as inert values: Python's own pickler and unpickler are the oracle, and nothing runs."""

from __future__ import annotations

import pytest

from dsv4ckpt import pickled
from dsv4ckpt.pickled import Global, Made, Malformed, Persistent

POINT = Global("torch", "Size")


def plain(value: object) -> object:
    """Global, Made and Persistent as tuples, so that they can be compared."""
    if isinstance(value, Global):
        return ("global", value.module, value.name)
    if isinstance(value, Made):
        return ("made", plain(value.of), plain(value.args), plain(value.state), value.called)
    if isinstance(value, Persistent):
        return ("persistent", plain(value.id))
    if isinstance(value, tuple | list):
        return type(value)(plain(item) for item in value)
    if isinstance(value, dict):
        return [(plain(key), plain(item)) for key, item in value.items()]
    return value


VALUES: list[object] = [
    None, True, False, 0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40, -1, -(2**31), "", "a", "\u00e9", "x" * 300,
    (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, "a"], list(range(2500)), {}, {"a": 1, "b": ("a", "a")},
    {f"name {number}": number for number in range(2500)},
    Made(POINT, ((1, 2),), called=True), Made(POINT, (), {"x": None}), [POINT, POINT], Persistent(("storage", "0")),
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("number", range(len(VALUES)))
def test_value_comes_back(number: int, protocol: int) -> None:
    value = VALUES[number]
    data = pickled.dumps(value, protocol)
    assert plain(pickled.loads(data, [POINT], with_persistent=True)) == plain(value)
    assert data == pickled.dumps(value, protocol)


def attack(*pieces: bytes) -> bytes:
    return b"\x80\x04" + b"".join(pieces) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


HOSTILE = {
    "os.system": attack(named("os", "system"), text("true"), b"\x85R"),
    "posix.system": attack(named("posix", "system"), text("true"), b"\x85R"),
    "eval": attack(named("builtins", "eval"), text("1"), b"\x85R"),
    "exec": attack(named("builtins", "exec"), text("1"), b"\x85R"),
    "getattr": attack(named("builtins", "getattr"), b"))R"),
    "torch.load": attack(named("torch", "load"), text("x"), b"\x85R"),
    "dotted name": attack(named("torch", "serialization.os.system"), text("true"), b"\x85R"),
    "copyreg": attack(named("copyreg", "_reconstructor"), b")R"),
    "partial": attack(named("functools", "partial"), b")R"),
    "by lines": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "INST": b"\x80\x04(S'true'\nios\nsystem\n.",
    "OBJ": attack(b"(", named("torch", "Size"), b"o"),
    "NEWOBJ_EX": attack(named("torch", "Size"), b")}\x92"),
    "EXT1": attack(b"\x82\x01"),
    "EXT4": attack(b"\x84\x01\x00\x00\x00"),
    "persistent by line": attack(b"Pabc\n"),
    "persistent unasked": attack(text("a"), b"Q"),
    "state of a class": attack(named("torch", "Size"), b"}b"),
    "state twice": attack(named("torch", "Size"), b")\x81}b}b"),
    "call of a call": attack(named("torch", "Size"), b")R)R"),
    "call of a text": attack(text("os"), b")R"),
    "memo far away": attack(b"Nr\xff\xff\xff\x7f"),
    "memo unknown": attack(b"h\x07"),
    "huge bytearray": attack(b"\x96\x00\x00\x00\x00\x00\x01\x00\x00"),
    "huge bytes": attack(b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00"),
    "huge text": attack(b"X\xff\xff\xff\x7f"),
    "huge integer": attack(b"\x8b\xff\xff\xff\x7f"),
    "deep": attack(b"(" * 1000),
    "doubling": attack(b")", b"2\x86" * 60),
    "many lists": attack(b"(" + b"]" * 100_000 + b"t"),
    "objects beyond its size": attack(b"](" + b"]" * 10_000 + b"e"),
    "long text": attack(b"X\x01\0\1\0" + b"x" * 65537),
    "integer of ten bytes": attack(b"\x8a\x0a" + bytes(10)),
    "many marks": attack(b"(" * 65 + b"t" * 65),
    "arguments as a list": attack(named("torch", "Size"), b"]R"),
    "call of a tuple": attack(b"))R"),
    "state as a list": attack(named("torch", "Size"), b")\x81]b"),
    "open mark": attack(b"(N"),
    "append to a tuple": attack(b")Na"),
    "append to a dict": attack(b"}(Ne"),
    "store in a list": attack(b"]" + text("a") + b"Ns"),
    "odd items of a dict": attack(b"}(" + text("a") + b"u"),
    "key twice": attack(b"}" + text("a") + b"Ns" + text("a") + b"Ns"),
    "other first byte": b"\x00\x04N.",
    "list as a key": attack(b"}]Ns"),
    "frame too long": attack(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN"),
    "two values": attack(b"NN"),
    "no value": attack(),
    "after the end": attack(b"N") + b"N",
    "protocol 1": b"\x80\x01N.",
    "no pickle": b"PK\x03\x04",
    "empty": b"",
}


def test_name_outside_the_list_is_refused_before_anything_is_done_with_it() -> None:
    for data in (attack(named("os", "system")), b"\x80\x02cos\nsystem\n."):
        with pytest.raises(Malformed, match="'os' 'system', which has no place there"):
            pickled.loads(data, [POINT])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused(name: str) -> None:
    with pytest.raises(Malformed):
        pickled.loads(HOSTILE[name], [POINT])


def test_pickle_cut_off_anywhere_is_refused() -> None:
    data = pickled.dumps({"a": Made(POINT, ((1, 2),), called=True), "b": [1, 2**40, "text"]}, 4)
    assert pickled.loads(data, [POINT])
    for length in range(len(data)):
        with pytest.raises(Malformed):
            pickled.loads(data[:length], [POINT])
