"""Pickles as torch writes them: a few opcodes in and out, as inert values.  Knows no torch and no files.

A pickle is a program.  The machine here runs only the instructions that torch's metadata and tensors consist of, and
none of them calls anything: a name becomes a Global, a call or an object becomes a Made that tells of what and with
which arguments.  Python's own unpickler is not used, so nothing that it can do is in reach.
Source: Lib/pickletools.py of CPython (opcodes); torch 2.13 (which of them it writes).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

_PROTOCOLS = (2, 3, 4, 5)
_BYTES_PER_OBJECT = 5  # of a pickle; torch's metadata has 8 for each tuple, list, dict and object
_FREE_OBJECTS = 100  # that the smallest pickles may have all the same
_MOST_STACKED = 2**14  # values between two marks; picklers write 1,000 items at a time
_MOST_MARKS = 64  # open at once; metadata has 6
_MOST_TEXT_BYTES = 2**16
_MOST_NAME_BYTES = 256  # of a module or a class
_MOST_INT_BYTES = 9  # a size has 8, and room for its sign
_STEPS_BETWEEN_LOOKS = 4096
_BATCH = 1000  # items that picklers write at a time
_SHOWN = 80  # characters of a name in a message


class Malformed(Exception):
    """A pickle that is none of torch's. The message says why, for whoever knows the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or function that a pickle names. Equal only to itself: readers compare with `is`."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What a pickle wants to be made: a call (REDUCE) or a new object (NEWOBJ), and the state that it is given."""

    of: Global
    args: tuple[object, ...] = ()
    state: object = None
    called: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """What stands outside the pickle, under this id."""

    id: object


def call_args(value: object, of: Global, num_args: int) -> tuple[object, ...] | None:
    """The arguments, if a value is a call of this function or class with so many; else None."""
    if type(value) is not Made or value.of is not of or not value.called or value.state is not None:
        return None
    return value.args if len(value.args) == num_args else None


def loads(data: bytes, known: Iterable[Global], *, with_persistent: bool = False) -> object:
    """Read a pickle of None, booleans, integers, texts, tuples, lists, dicts, and these globals.

    returns  the value, with Global, Made and Persistent for what is none of the above; parts may be shared or contain
             themselves. Keys of dicts are texts or Made, which are equal only to themselves
    raises   Malformed
    Time and memory are linear in the size of the data: 10 times as many bytes for torch's metadata, 23 at worst.
    """
    return _Machine(data, {(item.module, item.name): item for item in known}, with_persistent).run()


class _Machine:
    """The stack machine of pickle, as far as torch needs it. A method is an instruction."""

    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Global], with_persistent: bool) -> None:
        self.data, self.position = data, 0
        self.known, self.with_persistent = known, with_persistent
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # the stacks under open marks
        self.memo: list[object] = []
        self.room = len(data) // _BYTES_PER_OBJECT + _FREE_OBJECTS

    def run(self) -> object:
        data = self.data
        if data[:1] != _PROTO or data[1:2] not in [bytes([number]) for number in _PROTOCOLS]:
            raise Malformed("it does not begin like a pickle of protocol 2 to 5")
        self.position = 2
        try:
            while True:
                for _ in range(_STEPS_BETWEEN_LOOKS):
                    opcode = data[self.position]
                    self.position += 1
                    if opcode == _STOP:
                        return self.result()
                    _INSTRUCTIONS[opcode](self)
                if len(self.stack) > _MOST_STACKED:
                    raise Malformed(f"more than {_MOST_STACKED:,} values wait on its stack")
        except IndexError:
            self.refuse("it ends early, or takes a value that is not there")

    def result(self) -> object:
        if len(self.stack) != 1 or self.below:
            self.refuse("it does not end with one value")
        if self.position != len(self.data):
            self.refuse("bytes follow its end")
        return self.stack[0]

    def refuse(self, what: str) -> NoReturn:
        raise Malformed(f"{what} (byte {self.position:,})")

    def unknown(self) -> None:
        self.refuse(f"it has an instruction that torch does not write, 0x{self.data[self.position - 1]:02X}")

    # ---- what instructions are made of

    def taken(self, num_bytes: int) -> bytes:
        piece = self.data[self.position : self.position + num_bytes]
        if len(piece) != num_bytes:
            self.refuse("it is cut off")
        self.position += num_bytes
        return piece

    def number(self, num_bytes: int) -> int:
        return int.from_bytes(self.taken(num_bytes), "little")

    def push_made(self, value: object) -> None:
        """Push something that takes memory of its own, of which a pickle gets as much as its size justifies."""
        self.room -= 1
        if self.room < 0:
            self.refuse("it makes more objects than its size justifies")
        self.stack.append(value)

    def marked(self) -> list[object]:
        """What was pushed since the last mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def push_text(self, num_bytes: int) -> None:
        if num_bytes > _MOST_TEXT_BYTES:
            self.refuse(f"a text has {num_bytes:,} bytes, which is more than {_MOST_TEXT_BYTES:,}")
        try:
            self.stack.append(self.taken(num_bytes).decode())
        except UnicodeDecodeError:
            self.refuse("a text is no UTF-8")

    def remember(self, index: int) -> None:
        if index != len(self.memo):  # picklers count; an index at will would be memory at will
            self.refuse(f"it remembers value {len(self.memo):,} as number {index:,}")
        self.memo.append(self.stack[-1])

    def push_global(self, module: object, name: object) -> None:
        found = self.known.get((module, name)) if type(module) is str and type(name) is str else None
        if found is None:
            self.refuse(f"it names {_shown(module)} {_shown(name)}, which has no place there")
        self.stack.append(found)

    def store(self, items: Mapping[int, object] | list[object]) -> None:
        """Put keys and values that alternate into the dict that waits for them."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            self.refuse("items are stored into what is no dict")
        for index in range(0, len(items), 2):
            key = items[index]
            if type(key) is not str and type(key) is not Made:  # others may nest too deep to be hashed
                self.refuse("a key is neither a text nor an object")
            if key in target:
                self.refuse(f"the key {_shown(key)} stands there twice")
            target[key] = items[index + 1]

    # ---- the instructions

    def proto(self) -> None:
        self.refuse("it begins twice")

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            self.refuse("a frame is longer than the rest")

    def none(self) -> None:
        self.stack.append(None)

    def true(self) -> None:
        self.stack.append(True)

    def false(self) -> None:
        self.stack.append(False)

    def int_1(self) -> None:
        self.stack.append(self.data[self.position])
        self.position += 1

    def int_2(self) -> None:
        self.stack.append(self.number(2))

    def int_4(self) -> None:
        self.stack.append(int.from_bytes(self.taken(4), "little", signed=True))

    def int_counted(self) -> None:
        num_bytes = self.number(1)
        if num_bytes > _MOST_INT_BYTES:
            self.refuse(f"an integer has {num_bytes} bytes")
        self.stack.append(int.from_bytes(self.taken(num_bytes), "little", signed=True))

    def text_1(self) -> None:
        self.push_text(self.number(1))

    def text_4(self) -> None:
        self.push_text(self.number(4))

    def empty_tuple(self) -> None:
        self.stack.append(())

    def tuple_1(self) -> None:
        self.push_made((self.stack.pop(),))

    def tuple_2(self) -> None:
        last = self.stack.pop()
        self.push_made((self.stack.pop(), last))

    def tuple_3(self) -> None:
        last, middle = self.stack.pop(), self.stack.pop()
        self.push_made((self.stack.pop(), middle, last))

    def tuple_marked(self) -> None:
        values = tuple(self.marked())
        self.push_made(values)

    def empty_list(self) -> None:
        self.push_made([])

    def append(self) -> None:
        value, target = self.stack.pop(), self.stack[-1]
        if type(target) is not list:
            self.refuse("an item is appended to what is no list")
        target.append(value)

    def append_marked(self) -> None:
        values, target = self.marked(), self.stack[-1]
        if type(target) is not list:
            self.refuse("items are appended to what is no list")
        target.extend(values)

    def empty_dict(self) -> None:
        self.push_made({})

    def store_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.store([key, value])

    def store_marked(self) -> None:
        values = self.marked()
        self.store(values)

    def mark(self) -> None:
        if len(self.below) == _MOST_MARKS:
            self.refuse(f"it opens more than {_MOST_MARKS} marks")
        self.below.append(self.stack)
        self.stack = []

    def memoize(self) -> None:  # the most frequent one, before get_1
        self.memo.append(self.stack[-1])

    def put_1(self) -> None:
        self.remember(self.number(1))

    def put_4(self) -> None:
        self.remember(self.number(4))

    def get_1(self) -> None:
        self.stack.append(self.memo[self.data[self.position]])
        self.position += 1

    def get_4(self) -> None:
        self.stack.append(self.memo[self.number(4)])

    def global_lines(self) -> None:
        lines = []
        for _ in range(2):
            end = self.data.find(b"\n", self.position, self.position + _MOST_NAME_BYTES)
            if end < 0:
                self.refuse("a name does not end")
            lines.append(self.taken(end - self.position).decode("ascii", "replace"))
            self.position += 1
        self.push_global(*lines)

    def global_stacked(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(module, name)

    def make(self, *, called: bool) -> None:
        args, of = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(of) is not Global:
            self.refuse("something is made of what is no name, or without a tuple of arguments")
        self.push_made(Made(of, args, called=called))

    def call(self) -> None:
        self.make(called=True)

    def new(self) -> None:
        self.make(called=False)

    def give_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Made or target.state is not None or type(state) not in (dict, tuple):
            self.refuse("a state is given to what cannot have it, or has one")
        target.state = state

    def persistent(self) -> None:
        if not self.with_persistent:
            self.refuse("it asks for something outside itself")
        self.push_made(Persistent(self.stack.pop()))


def _shown(value: object) -> str:
    """A name from a file, short enough for a message."""
    if type(value) is not str:
        return f"a {type(value).__name__}"
    return repr(value) if len(value) <= _SHOWN else repr(value[:_SHOWN]) + "..."


_PROTO = b"\x80"
_STOP = ord(".")
_TABLE: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b"N": _Machine.none,
    b"\x88": _Machine.true,
    b"\x89": _Machine.false,
    b"K": _Machine.int_1,
    b"M": _Machine.int_2,
    b"J": _Machine.int_4,
    b"\x8a": _Machine.int_counted,
    b"\x8c": _Machine.text_1,
    b"X": _Machine.text_4,
    b")": _Machine.empty_tuple,
    b"\x85": _Machine.tuple_1,
    b"\x86": _Machine.tuple_2,
    b"\x87": _Machine.tuple_3,
    b"t": _Machine.tuple_marked,
    b"]": _Machine.empty_list,
    b"a": _Machine.append,
    b"e": _Machine.append_marked,
    b"}": _Machine.empty_dict,
    b"s": _Machine.store_one,
    b"u": _Machine.store_marked,
    b"(": _Machine.mark,
    b"\x94": _Machine.memoize,
    b"q": _Machine.put_1,
    b"r": _Machine.put_4,
    b"h": _Machine.get_1,
    b"j": _Machine.get_4,
    b"c": _Machine.global_lines,
    b"\x93": _Machine.global_stacked,
    b"R": _Machine.call,
    b"\x81": _Machine.new,
    b"b": _Machine.give_state,
    b"Q": _Machine.persistent,
}
_INSTRUCTIONS = [_TABLE.get(bytes([code]), _Machine.unknown) for code in range(256)]


# ---- the way out


def dumps(value: object, protocol: int) -> bytes:
    """The pickle of a value such as `loads` returns, which Python's unpickler reads; equal values, equal bytes.

    Protocol 2 is written as Python's pickler does, byte for byte, where no value but texts and globals occurs twice.
    """
    writer = _Writer(protocol)
    writer.write(value)
    return b"".join([_PROTO, bytes([protocol]), *writer.pieces, b"."])


class _Writer:
    """Instructions for one value after the other. Texts and globals that come again are fetched from the memo."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol
        self.pieces: list[bytes] = []
        self.memo: dict[str | Global, bytes] = {}  # how to fetch it
        self.num_remembered = 0

    def write(self, value: object) -> None:
        if isinstance(value, str | Global) and value in self.memo:
            self.pieces.append(self.memo[value])
        else:
            _WRITERS[type(value)](self, value)

    def remember(self, value: object) -> None:
        index = self.num_remembered
        self.num_remembered += 1
        short = index < 2**8
        number = bytes([index]) if short else struct.pack("<I", index)
        put = b"\x94" if self.protocol >= 4 else (b"q" if short else b"r") + number
        self.pieces.append(put)
        if isinstance(value, str | Global):
            self.memo[value] = (b"h" if short else b"j") + number

    def write_none(self, _: None) -> None:
        self.pieces.append(b"N")

    def write_bool(self, value: bool) -> None:
        self.pieces.append(b"\x88" if value else b"\x89")

    def write_int(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.pieces.append(b"K" + bytes([value]))
        elif 0 <= value < 2**16:
            self.pieces.append(struct.pack("<cH", b"M", value))
        elif -(2**31) <= value < 2**31:
            self.pieces.append(struct.pack("<ci", b"J", value))
        else:
            number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.pieces.append(b"\x8a" + bytes([len(number)]) + number)

    def write_text(self, value: str) -> None:
        text = value.encode()
        if self.protocol >= 4 and len(text) < 2**8:
            self.pieces.append(b"\x8c" + bytes([len(text)]) + text)
        else:
            self.pieces.append(struct.pack("<cI", b"X", len(text)) + text)
        self.remember(value)

    def write_tuple(self, value: tuple[object, ...]) -> None:
        if len(value) > 3:
            self.pieces.append(b"(")
        for item in value:
            self.write(item)
        self.pieces.append((b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) <= 3 else b"t")
        if value:
            self.remember(value)

    def write_list(self, value: list[object]) -> None:
        self.pieces.append(b"]")
        self.remember(value)
        for first in range(0, len(value), _BATCH):
            self.pieces.append(b"(")
            for item in value[first : first + _BATCH]:
                self.write(item)
            self.pieces.append(b"e")

    def write_dict(self, value: dict[object, object]) -> None:
        self.pieces.append(b"}")
        self.remember(value)
        items = list(value.items())
        for first in range(0, len(items), _BATCH):
            self.pieces.append(b"(")
            for key, item in items[first : first + _BATCH]:
                self.write(key)
                self.write(item)
            self.pieces.append(b"u")

    def write_global(self, value: Global) -> None:
        if self.protocol >= 4:
            self.write(value.module)
            self.write(value.name)
            self.pieces.append(b"\x93")
        else:
            self.pieces.append(f"c{value.module}\n{value.name}\n".encode("ascii"))
        self.remember(value)

    def write_made(self, value: Made) -> None:
        self.write(value.of)
        self.write(value.args)
        self.pieces.append(b"R" if value.called else b"\x81")
        self.remember(value)
        if value.state is not None:
            self.write(value.state)
            self.pieces.append(b"b")

    def write_persistent(self, value: Persistent) -> None:
        self.write(value.id)
        self.pieces.append(b"Q")


_WRITERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): _Writer.write_none,
    bool: _Writer.write_bool,
    int: _Writer.write_int,
    str: _Writer.write_text,
    tuple: _Writer.write_tuple,
    list: _Writer.write_list,
    dict: _Writer.write_dict,
    Global: _Writer.write_global,
    Made: _Writer.write_made,
    Persistent: _Writer.write_persistent,
}
