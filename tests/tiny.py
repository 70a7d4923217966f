"""Tiny checkpoints for tests: made once, copied in no time, broken on purpose; and the record of what is opened.

The safetensors reader and writer here are our own oracle: json and struct, nothing of dsv4ckpt.
Files of a copy are hard links into the sample, so they are replaced, never written into: use the functions below.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from dsv4ckpt import plan, run, sample, source, survey

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SMALLEST = {"layers": 1, "hidden": 128, "intermediate": 32, "experts": 6, "heads": 2, "vocab": 512}  # 0.9 MB
EMBED, FIRST_LAYER = "model-00001-of-00007.safetensors", "model-00002-of-00007.safetensors"


class Tensor(NamedTuple):
    """A stored tensor. `data` is its bytes, or their number: then the file is sparse and reads as zeros."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | int

    @property
    def size(self) -> int:
        return self.data if isinstance(self.data, int) else len(self.data)


def packed(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of this header, as it stands; `length` is what the length field says if not the truth."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header_of(tensors: dict[str, Tensor]) -> bytes:
    document, position = {}, 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.size]
        document[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    return json.dumps(document).encode()


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a shard."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(packed(header_of(tensors)))
        for tensor in tensors.values():
            if isinstance(tensor.data, int):
                file.truncate(file.tell() + tensor.data)
                file.seek(0, os.SEEK_END)
            else:
                file.write(tensor.data)


def read_shard(path: Path, *, with_data: bool = True) -> dict[str, Tensor]:
    """The tensors of a well-formed shard, in order of their bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        document = json.loads(file.read(length))
        document.pop("__metadata__", None)
        tensors = {}
        for name, fields in sorted(document.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = fields["data_offsets"]
            data = file.read(end - begin) if with_data else end - begin
            tensors[name] = Tensor(fields["dtype"], tuple(fields["shape"]), data)
    return tensors


def replace(path: Path, data: bytes | str) -> None:
    """Replace a file's bytes without touching the file that it is a link to."""
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    """Change a JSON document in place."""
    document = json.loads(path.read_bytes())
    edit(document)
    replace(path, json.dumps(document))


def edit_shard(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = read_shard(path)
    edit(tensors)
    write_shard(path, tensors)


def edit_weight_map(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_json(directory / INDEX, lambda document: edit(document["weight_map"]))


def shard_of(directory: Path, tensor: str) -> Path:
    """The shard that the index names for a tensor."""
    name = json.loads((directory / INDEX).read_bytes())["weight_map"][tensor]
    return directory / str(name)


def make_sample(release: str, path: Path, **options: Any) -> Path:
    sample.write_sample(sample.plan_sample(sample.SampleOptions(release=release, **options)), str(path))
    return path


def copy_of(directory: Path, target: Path) -> Path:
    """The same checkpoint under another path, by hard links."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            copy = target / file.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, copy)
    return target


def tree_of(directory: Path, *, without: str = "") -> dict[str, str]:
    """SHA-256 of every file below a directory, but those in folders of the name `without`."""
    return {
        str(name): hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in sorted(file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
        if without not in name.parts
    }


def survey_of(directory: Path, *, follow_links: bool = False) -> survey.Survey:
    return survey.survey(source.open_checkpoint(str(directory), follow_links=follow_links))


def plan_of(directory: Path, *, follow_links: bool = False) -> plan.Plan:
    """What `dsv4 convert --dry-run` does: everything before the first byte is written."""
    return plan.make_plan(survey_of(directory, follow_links=follow_links), plan.ConvertOptions())


def convert(src: Path, dst: Path, *, workers: int = 2, **options: Any) -> run.Summary:
    """Survey, plan, execute."""
    checkpoint = source.open_checkpoint(str(src))
    chosen = plan.ConvertOptions(**options)
    made = plan.make_plan(survey.survey(checkpoint, unit_scales=chosen.unit_scales), chosen)
    return run.execute(made, checkpoint, str(dst), num_workers=workers)


def is_plain(text: str) -> bool:
    """Whether a message can be shown on a terminal: no escape codes, no control characters, no surrogates."""
    return all(line.isprintable() for line in text.split("\n"))


# ---- what the process does, and hangs

READING = {"open", "os.listdir", "os.scandir"}
CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.utime", "os.setxattr", "shutil.rmtree", "shutil.copyfile", "shutil.move",
            "tempfile.mkstemp", "tempfile.mkdtemp"}  # fmt: skip
STARTING = {"exec", "compile", "import", "pickle.find_class", "marshal.loads", "ctypes.dlopen", "os.system",
            "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn", "subprocess.Popen",
            "socket.__new__", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
            "socket.gethostbyname", "urllib.Request", "sqlite3.connect", "webbrowser.open"}  # fmt: skip
HEARD = READING | CHANGING | STARTING
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Event(NamedTuple):
    """Something that Python did: an event of its audit hooks."""

    kind: str
    what: str | None  # the path as it was given, or the first argument; None: an open file
    flags: int  # of an open


_events: list[Event] | None = None


def _listen(kind: str, arguments: tuple[Any, ...]) -> None:
    if _events is None or kind not in HEARD:
        return
    what = arguments[0] if arguments else None
    if kind in STARTING:
        _events.append(Event(kind, repr(what)[:200], 0))
    elif isinstance(what, str | bytes):
        _events.append(Event(kind, os.fsdecode(what), arguments[2] if kind == "open" else 0))
    elif kind != "open":  # os.listdir() is told without an argument; an open file was told when it was opened
        _events.append(Event(kind, "." if what is None else None, 0))


@contextlib.contextmanager
def recorded_events() -> Iterator[list[Event]]:
    """What Python reads, changes and starts in the block. An audit hook cannot be taken off: it is muted."""
    global _events
    if not getattr(sys, "_dsv4_tests_listen", False):
        sys.addaudithook(_listen)
        sys._dsv4_tests_listen = True  # type: ignore[attr-defined]
    _events = []
    try:
        yield _events
    finally:
        _events = None


def opened_files(events: list[Event]) -> list[tuple[str, int]]:
    """(path, flags) of every file that was opened by its path."""
    return [(path, flags) for kind, path, flags in events if kind == "open" and path is not None]


def changed(events: list[Event]) -> list[tuple[str, int]]:
    """The same for what was renamed, made or removed by its path: the first path of each."""
    return [(path, os.O_NOFOLLOW) for kind, path, _ in events if kind in CHANGING and path is not None]


@contextlib.contextmanager
def recorded_opens() -> Iterator[list[tuple[str, int]]]:
    """(path, flags) of every file that Python opens in the block; there once it has ended."""
    opened: list[tuple[str, int]] = []
    with recorded_events() as events:
        try:
            yield opened
        finally:
            opened += opened_files(events)


def not_only_reading(events: list[Event], *allowed: Path) -> list[str]:
    """What a reader of these directories must not do: open or list anything outside, change or start anything."""
    reads = [(path, flags) for kind, path, flags in events if kind in READING and path is not None]
    found = [f"reads {path}" for path in outside(reads, *allowed)]
    found += [f"open to write {path}" for path, flags in opened_files(events) if flags & WRITE_FLAGS]
    return found + [f"{kind} {path}" for kind, path, _ in events if kind not in READING]


def outside(opened: list[tuple[str, int]], *allowed: Path) -> list[str]:
    """What stands outside these directories, with links resolved as the kernel did when it was opened."""
    roots = [os.path.realpath(path) for path in allowed]
    found = []
    for path, flags in opened:
        if flags & os.O_NOFOLLOW:
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        else:
            path = os.path.realpath(path)
        if not any(path == root or path.startswith(root + os.sep) for root in roots):
            found.append(path)
    return found


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """raises TimeoutError out of a system call that blocks, such as open on a fifo"""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
