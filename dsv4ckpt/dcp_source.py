"""A torch DCP directory as a Checkpoint: tensors are put together from the chunks that ranks saved.

Owns which of its entries are the model, what dtypes they are shown in, and where a tensor's bytes stand.  Knows no
outputs; what the pickles may say is dcp_metadata's and torchfile's.
Source: torch 2.13 (torch/distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch

from . import formats, names, shard, source, torchfile
from .codec import to_bf16
from .contained import io_errors, opened
from .dcp_metadata import Chunk, DcpContents, DcpTensor, Place, parse_metadata
from .errors import BadDcp, MissingFile, NotLossless, UnknownRelease, printable
from .formats import CONFIG_NAME, DCP_METADATA_NAME, QUANTS, Kind, Shape, Storage
from .names import Namespace
from .pickled import Malformed
from .shard import Entry, Header
from .source import Checkpoint, Landing, Location, Reader, Shard, SmallFile, Stamp
from .survey import Survey, survey

_ANCHORS = {  # a tensor that every model has: what stands before it stands before all
    "model.layers.0.input_layernorm.weight": Namespace.TRANSFORMERS,
    "layers.0.attn_norm.weight": Namespace.DEEPSEEK,
}
_HEADS = {  # first parts of the names of a model that stands there without a prefix
    Namespace.TRANSFORMERS: ("model", "lm_head", "mtp"),
    Namespace.DEEPSEEK: (
        "embed", "head", "norm", "layers", "mtp", "hc_head_fn", "hc_head_base", "hc_head_scale",
    ),
}  # fmt: skip
_WIDE = ("F16", "F32", "F64")  # what trainers keep for BF16
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_MOST_OPEN = 64  # files of a reader
_SUFFIX = ".distcp"
_SAVED_WHOLE = "take a complete copy of a checkpoint that torch.distributed.checkpoint.save has finished"


class DcpCheckpoint(Checkpoint):
    """Tensors are those of a DCP directory, under their names without the prefix; config and small files may come
    from elsewhere."""

    def __init__(self, path: str, config_at: str, config: bytes | None, follow_links: bool) -> None:
        super().__init__(config_at, follow_links, config)
        self.path = path
        self.pieces: dict[str, _Pieces] = {}

    @property
    def is_safetensors(self) -> bool:
        return False

    def place(self, shard: str) -> source.Place:
        return source.Place(self.path, shard, self.shards[shard].stamp)

    def small_files(self) -> list[SmallFile]:
        ours = [item for item in super().small_files() if not item.name.endswith(_SUFFIX)]
        return [item for item in ours if item.name != DCP_METADATA_NAME]

    @contextlib.contextmanager
    def reader(self, whole: Collection[str] = ()) -> Iterator[Reader]:  # noqa: ARG002 - all is here
        reader = _DcpReader(self)
        try:
            yield reader
            reader.check_unchanged()
        finally:
            reader.close()


def open_dcp(
    path: str,
    *,
    config_at: str | None = None,
    prefix: str | None = None,
    allow_lossy: bool = False,
    follow_links: bool = False,
) -> tuple[Survey, tuple[str, ...]]:
    """The model in a DCP directory of any world size, with every chunk looked at: headers, no values.

    config_at    a directory whose config.json and small files are taken. None: the DCP directory's own
    prefix       what stands before the model's names. None: what stands before those of the first layer
    allow_lossy  accept BF16 where the released model has F32: a trainer rounded it
    returns      its survey, and the entries that are not the model's: optimizer and other state. What a trainer holds
                 wider than BF16 is shown as BF16, rounded once, to nearest even
    raises       MissingFile, BadDcp, BadConfig, UnknownRelease, NotConform, UnsafePath, Environment
    """
    directory = path if config_at is None else config_at
    config = source.read_config(directory, follow_links)
    if config is None:
        raise MissingFile(
            "there is no config.json to tell what these tensors are",
            expected=CONFIG_NAME,
            do="copy the release's config.json into it; dsv4 reshard also takes --like DIR or --source DIR",
        )
    contents, sha256 = _read_metadata(path, follow_links)
    prefix, chosen, left = _choose(contents, prefix)
    pieces = {name: _Pieces(contents.tensors[prefix + name]) for name in chosen}
    checkpoint = DcpCheckpoint(path, directory, config, follow_links)
    stamps = _require_saved(path, pieces, follow_links)
    for storage in _candidates(pieces):
        shown = {name: _dtype(name, item.stored.dtype, storage) for name, item in pieces.items()}
        _show(checkpoint, pieces, shown, stamps, sha256)
        try:
            found = survey(checkpoint)
        except UnknownRelease:
            continue
        if found.identity.storage is storage:
            break
    else:
        found = survey(checkpoint)  # as they are: it says what is wrong
    asked = {name: stored.dtype for name, stored in found.layout.stored.items()}
    fitting = {
        name: _fitting(name, pieces[name].stored.dtype, asked.get(name, dtype), dtype, allow_lossy)
        for name, dtype in shown.items()
    }
    if fitting != shown:
        _show(checkpoint, pieces, fitting, stamps, sha256)
        found = survey(checkpoint)
    return found, left


def open_tensors(path: str, *, follow_links: bool = False) -> tuple[DcpCheckpoint, tuple[str, ...]]:
    """Every tensor of a DCP directory as it is stored, and the names of what else is in it.

    raises  MissingFile, BadDcp, UnsafePath, Environment
    """
    contents, sha256 = _read_metadata(path, follow_links)
    pieces = {name: _Pieces(tensor) for name, tensor in contents.tensors.items()}
    checkpoint = DcpCheckpoint(path, path, None, follow_links)
    stamps = _require_saved(path, pieces, follow_links)
    _show(checkpoint, pieces, {name: item.stored.dtype for name, item in pieces.items()}, stamps, sha256)
    return checkpoint, contents.others


# ---- which entries are the model


def _read_metadata(path: str, follow_links: bool) -> tuple[DcpContents, str]:
    if not source.is_dcp(path):
        raise MissingFile(
            "this is no torch DCP directory",
            expected=DCP_METADATA_NAME,
            do="name the directory that holds .metadata and __0_0.distcp; it is written last, by a finished save",
        )
    with io_errors("."):
        present = [name for name in sorted(os.listdir(path)) if name.endswith(_SUFFIX)]
    sizes = {}
    for name in present:
        with opened(path, name, follow_links) as fd:
            sizes[name] = os.fstat(fd).st_size
    with opened(path, DCP_METADATA_NAME, follow_links) as fd:
        size = os.fstat(fd).st_size
        if size > formats.MAX_DCP_METADATA_BYTES:
            raise BadDcp(
                f"{DCP_METADATA_NAME} is too large",
                file=DCP_METADATA_NAME,
                expected=f"at most {formats.MAX_DCP_METADATA_BYTES:,} bytes",
                found=f"{size:,} bytes",
                do=_SAVED_WHOLE,
            )
        data = shard.read_exactly(fd, size, 0, DCP_METADATA_NAME)
    return parse_metadata(data, sizes), hashlib.sha256(data).hexdigest()


def _choose(contents: DcpContents, prefix: str | None) -> tuple[str, list[str], tuple[str, ...]]:
    """Prefix, the model's names without it, and the whole names of everything else. raises BadDcp, Usage"""
    found = {}
    for name in contents.tensors:
        for anchor, space in _ANCHORS.items():
            if name == anchor or name.endswith("." + anchor):
                found[name.removesuffix(anchor)] = space
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
        found = {prefix: found[prefix]} if prefix in found else {}
    if len(found) != 1:
        raise BadDcp(
            "it holds more than one model" if found else "no model is in it",
            file=DCP_METADATA_NAME,
            expected=" or ".join((prefix or "") + anchor for anchor in _ANCHORS),
            found=", ".join(repr(printable(name)) for name in itertools.islice(found or contents.tensors, 3)),
            do="say what stands before the model's names: --prefix ema" if found
            else "see that the model's state is in the checkpoint, under the names of --names",
        )  # fmt: skip
    ((chosen, space),) = found.items()
    heads = (*_HEADS[space], *names.OPAQUE_HEADS)

    def is_ours(name: str) -> bool:
        return name.startswith(chosen) and (bool(chosen) or name.partition(".")[0] in heads)

    ours = [name.removeprefix(chosen) for name in contents.tensors if is_ours(name)]
    left = [name for name in contents.tensors if not is_ours(name)]
    return chosen, ours, tuple(sorted((*left, *contents.others)))


# ---- in what dtypes they are shown


def _candidates(pieces: Mapping[str, _Pieces]) -> list[Storage]:
    """What the tensors may be: with codes among them, whatever has codes."""
    if not any(item.stored.dtype == "U8" for item in pieces.values()):
        return [Storage.BF16]
    return [storage for storage, quants in QUANTS.items() if quants]


def _dtype(name: str, stored: str, storage: Storage) -> str:
    """What a tensor is in a storage: codes and E8M0 scales were kept as bytes."""
    if stored in _WIDE and storage is Storage.BF16:
        return "BF16"
    quant = QUANTS[storage].get(_kind(name))
    if stored != "U8" or quant is None:
        return stored
    wanted = quant.scale if "scale" in name.rpartition(".")[2] else quant.codes
    return wanted if formats.DTYPE_BITS[wanted] == 8 else stored


def _kind(name: str) -> Kind:
    if ".experts." in name:
        return Kind.DRAFT_EXPERT if name.startswith("mtp.") else Kind.EXPERT
    return Kind.TABLE if ".engram.embed." in name else Kind.DENSE


def _fitting(name: str, stored: str, asked: str, shown: str, allow_lossy: bool) -> str:
    """The dtype that the release has, where the values allow it. raises NotLossless"""
    if stored not in _WIDE and not (stored == "BF16" and asked == "F32"):
        return shown
    if asked == "F32" and stored in ("BF16", "F16") and not allow_lossy:
        raise NotLossless(
            f"tensor {name!r} is F32 in every release, and the trainer has rounded it",
            expected="F32",
            found=stored,
            do="keep it in float32 when training; --allow-lossy takes it as it is",
        )
    return asked if asked in ("BF16", "F32") else stored


# ---- what stands where


class Lie(NamedTuple):
    """How a chunk lies in its tensor: as runs of bytes, which in the file follow each other."""

    begin: int  # of the first run, in the tensor
    size: int  # bytes of each run
    counts: Shape  # of runs, along each outer dimension
    steps: Shape  # bytes of the tensor from run to run, along each

    @property
    def num_runs(self) -> int:
        return math.prod(self.counts)

    def at(self, number: int) -> int:
        """Where a run begins in the tensor; grows with its number."""
        position = self.begin
        for count, step in zip(reversed(self.counts), reversed(self.steps), strict=True):
            number, index = divmod(number, count)
            position += index * step
        return position

    def within(self, begin: int, end: int) -> range:
        """The runs that have bytes in [begin, end) of the tensor."""
        every = range(self.num_runs)
        first = bisect.bisect_right(every, begin - self.size, key=self.at)
        return range(first, bisect.bisect_left(every, end, lo=first, key=self.at))


def lie(chunk: Chunk, shape: Shape, width: int) -> Lie:
    """width: bytes of an element"""
    steps = [width * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    begin = sum(offset * step for offset, step in zip(chunk.offsets, steps, strict=True))
    inner = len(shape)  # dimensions from here on are whole
    while inner and chunk.sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(0, inner - 1)
    size = width * math.prod(chunk.sizes[outer:])
    return Lie(begin, size, chunk.sizes[:outer], tuple(steps[:outer]))


class _Pieces:
    """A tensor and its chunks, ready to be read."""

    def __init__(self, stored: DcpTensor) -> None:
        self.stored = stored
        width = formats.stored_bytes(stored.dtype, ())
        full = [
            (chunk, place)
            for chunk, place in zip(stored.chunks, stored.places, strict=True)
            if 0 not in chunk.sizes
        ]
        self.chunks = [chunk for chunk, _ in full]
        self.places = [place for _, place in full]
        self.lies = [lie(chunk, stored.shape, width) for chunk in self.chunks]
        self.begins: list[int] = []  # in the file, of each chunk's values


def _require_saved(path: str, pieces: Mapping[str, _Pieces], follow_links: bool) -> dict[str, Stamp]:
    """Look at what torch.save wrote of every chunk, and remember where its values begin. raises BadDcp"""
    at = [(place, name, number) for name, item in pieces.items() for number, place in enumerate(item.places)]
    for item in pieces.values():
        item.begins = [0] * len(item.places)
    stamps = {}
    for file, group in itertools.groupby(sorted(at), key=lambda item: item[0].file):
        with opened(path, file, follow_links) as fd, io_errors(file):
            stamps[file] = source.stamp(os.fstat(fd))
            for place, name, number in group:
                saved = _saved(fd, place, name)
                chunk = pieces[name].chunks[number]
                if (saved.dtype, saved.shape) != (pieces[name].stored.dtype, chunk.sizes):
                    raise BadDcp(
                        f"{DCP_METADATA_NAME} and the file do not agree on a chunk of {printable(name)!r}",
                        file=file,
                        expected=f"{pieces[name].stored.dtype} {list(chunk.sizes)}",
                        found=f"{saved.dtype} {list(saved.shape)}",
                        do=_SAVED_WHOLE,
                    )
                pieces[name].begins[number] = place.offset + saved.begin
    return stamps


def _saved(fd: int, place: Place, name: str) -> torchfile.Saved:
    def read(offset: int, count: int) -> bytes:
        return shard.read_exactly(fd, count, place.offset + offset, place.file)

    try:
        return torchfile.read_saved(read, place.length)
    except Malformed as error:
        raise BadDcp(
            f"a chunk of {printable(name)!r} is no tensor as torch.save writes it: {error}",
            file=place.file,
            do=_SAVED_WHOLE,
        ) from None


def _show(
    checkpoint: DcpCheckpoint,
    pieces: dict[str, _Pieces],
    dtypes: Mapping[str, str],
    stamps: Mapping[str, Stamp],
    sha256: str,
) -> None:
    """Let the checkpoint have these tensors, in these dtypes."""
    entries: dict[str, dict[str, Entry]] = {file: {} for file in stamps}
    checkpoint.pieces, checkpoint.tensors = pieces, {}
    for name, item in pieces.items():
        shape = item.stored.shape
        place = item.stored.places[0] if item.stored.places else Place(next(iter(stamps)), 0, 0)
        entry = Entry(
            dtypes[name], shape, place.offset, place.offset + formats.stored_bytes(dtypes[name], shape)
        )
        checkpoint.tensors[name] = Location(place.file, entry)
        entries.setdefault(place.file, {})[name] = entry
    checkpoint.shards = {
        file: Shard(file, Header(entries[file], {}, 0, sha256), stamp) for file, stamp in stamps.items()
    }


# ---- reading


class _DcpReader(Reader):
    """Puts ranges of tensors together, and gives them the dtype that they are shown in. For one thread."""

    def __init__(self, checkpoint: DcpCheckpoint) -> None:
        super().__init__(checkpoint)
        self._pieces = checkpoint.pieces
        self._shown = {name: place.entry.dtype for name, place in checkpoint.tensors.items()}
        self._scratch, self._wide = bytearray(), bytearray()

    def read(self, name: str, offset: int, size: int, landing: Landing) -> memoryview:
        view = landing.take(size)[:size]
        self.read_into(name, view, offset)
        return view

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        stored, shown = self._pieces[name].stored.dtype, self._shown[name]
        if stored == shown or stored not in _FLOATS:  # bytes under the name of what they are
            self._gather(name, view, offset)
            return
        held, wanted = formats.DTYPE_BITS[stored] // 8, formats.DTYPE_BITS[shown] // 8
        first, last = offset // wanted, formats.ceil_div(offset + len(view), wanted)
        if not last - first:
            return
        self._wide = _room(self._wide, (last - first) * held)
        raw = memoryview(self._wide)[: (last - first) * held]
        self._gather(name, raw, first * held)
        values = torch.frombuffer(raw, dtype=_FLOATS[stored])
        made = (to_bf16(values) if shown == "BF16" else values.to(torch.float32)).view(torch.uint8)
        into = offset - first * wanted
        torch.frombuffer(view, dtype=torch.uint8).copy_(made[into : into + len(view)])

    def will_need(self, name: str, offset: int, size: int) -> None:
        """Nothing: what is asked for stands in many places."""

    def _gather(self, name: str, view: memoryview, offset: int) -> None:
        """Bytes [offset, offset + len(view)) of a tensor as it is stored, from every chunk that has some."""
        pieces, end = self._pieces[name], offset + len(view)
        for chunk, place, begin in zip(pieces.lies, pieces.places, pieces.begins, strict=True):
            runs = chunk.within(offset, end)
            if not runs:
                continue
            # what of the first and of the last of these runs is wanted
            skipped = max(0, offset - chunk.at(runs[0]))
            left = max(0, chunk.at(runs[-1]) + chunk.size - end)
            size = len(runs) * chunk.size - skipped - left
            position = begin + runs[0] * chunk.size + skipped
            if len(runs) == 1:
                to = chunk.at(runs[0]) + skipped - offset
                self._fill(name, place.file, view[to : to + size], position)
                continue
            self._scratch = _room(self._scratch, size)
            raw = memoryview(self._scratch)[:size]
            self._fill(name, place.file, raw, position)
            done = 0
            for number in runs:
                at = chunk.at(number)
                first, last = max(at, offset), min(at + chunk.size, end)
                view[first - offset : last - offset] = raw[done : done + last - first]
                done += last - first

    def _fd(self, name: str) -> int:
        """As many files may be as there were ranks: not all stay open."""
        if name not in self._fds and len(self._fds) >= _MOST_OPEN:
            self.check_unchanged()
            self.close()
        return super()._fd(name)


def _room(memory: bytearray, size: int) -> bytearray:
    return memory if len(memory) >= size else bytearray(size)
