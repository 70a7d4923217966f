"""Compares a checkpoint with its inventory and its manifest, or two checkpoints value by value.

Three levels: `structure` reads headers, `bytes` one directory and its manifest, `values` two checkpoints,
each in any storage format and namespace.  Shares no code with what writes (run, codec, outdir), so that no
mistake there can hide.  Only comparing values imports torch.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from . import formats, shard, source, strictjson
from .errors import BadManifest, MissingFile, UnsafePath, Usage
from .formats import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, Quant, Shape, ceil_div
from .inventory import Logical
from .source import Checkpoint, Reader
from .survey import Survey, survey

if TYPE_CHECKING:
    from .decode_plain import Rows

_WORK = ".dsv4"  # what outdir leaves beside an unfinished output
_HASH_BYTES = 4 * 1024 * 1024
_CHUNK_VALUES = 1024 * 1024  # compared at a time; memory is a few dozen bytes for each, and worker
_SHA256 = re.compile("[0-9a-f]{64}")
_REMAKE = "convert again into a new directory"
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Started:
    """The work that lies ahead. Scales are not counted."""

    total_bytes: int


@dataclass(frozen=True)
class Read:
    """More bytes were read and compared."""

    num_bytes: int


Event = Started | Read
OnEvent = Callable[[Event], None]
Subset = tuple[int, int]  # (n, t): the n-th of t parts, n from 1 on


class Stop(Protocol):
    """Looked at once per chunk, from worker threads."""

    def check(self) -> None:
        """Raise what is to end the work."""


def _ignore(_: Event) -> None:
    pass


@dataclass(frozen=True)
class _Watch:
    """Told of every chunk that was read."""

    on_event: OnEvent
    stop: Stop | None

    def read(self, num_bytes: int) -> None:
        if self.stop:
            self.stop.check()
        self.on_event(Read(num_bytes))


# ---- the manifest


class Listed(NamedTuple):
    """A file as the manifest describes it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What dsv4.manifest.json says, checked."""

    files: tuple[Listed, ...]
    source: frozenset[Listed]  # shards that the output was made from; the SHA-256 is their header's
    layers: tuple[int, ...] | None  # source layers that were selected; None: all
    dropped: frozenset[str]  # tensors of the source that were left out


def read_manifest(directory: str, *, follow_links: bool = False) -> Manifest | None:
    """Read a directory's manifest; None if it has none. raises BadManifest, UnsafePath, Environment"""
    if not os.path.lexists(os.path.join(directory, MANIFEST_NAME)):
        return None
    with source._opened(directory, MANIFEST_NAME, follow_links) as fd:
        size = os.fstat(fd).st_size
        if size > formats.MAX_INDEX_BYTES:
            raise _bad("too large", f"at most {formats.MAX_INDEX_BYTES:,} bytes", f"{size:,} bytes")
        data = shard.read_exactly(fd, size, 0, MANIFEST_NAME)
    try:
        document = strictjson.loads(data, floats=False)
    except strictjson.Malformed as error:
        raise _bad(f"malformed: {error}") from None
    if _field(document, "format", int) != 1:
        raise _bad("of a format that this version does not know", 1, document["format"])
    options = _field(document, "options", dict)
    layers = None if options.get("layers", ()) is None else _field(options, "layers", list)
    if layers and not _ascend(layers):
        raise _bad("wrong in `layers`", "ascending numbers", repr(layers)[:80])
    files = tuple(_listed(row, "sha256") for row in _field(document, "files", list))
    twice = [name for name, count in Counter(listed.name for listed in files).items() if count > 1]
    if twice:
        raise _bad("wrong in `files`", "every file once", f"{twice[0]!r} twice")
    return Manifest(
        files=files,
        source=frozenset(_listed(row, "header_sha256") for row in _field(document, "source", list)),
        layers=None if layers is None else tuple(layers),
        dropped=frozenset(_field(row, "name", str) for row in _field(document, "dropped", list)),
    )


def _bad(what: str, expected: object = None, found: object = None) -> BadManifest:
    return BadManifest(
        f"the manifest is {what}", file=MANIFEST_NAME, expected=expected, found=found, do=_REMAKE
    )


def _field(fields: Any, key: str, kind: type[_Item]) -> _Item:
    value = fields.get(key) if isinstance(fields, dict) else None
    if type(value) is not kind:
        raise _bad(f"wrong in `{key}`", kind.__name__, repr(value)[:80])
    return value


def _ascend(numbers: list[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers) and numbers == sorted({*numbers})


def _listed(row: Any, sha256_key: str) -> Listed:
    listed = Listed(_field(row, "file", str), _field(row, "size", int), _field(row, sha256_key, str))
    plain = listed.name.isprintable() and len(listed.name) <= formats.MAX_NAME_CHARS
    if not plain or {"", ".", ".."} & {*listed.name.split("/")}:
        raise UnsafePath(
            "the manifest lists something that is no plain relative file name",
            file=MANIFEST_NAME,
            found=repr(listed.name)[:200],
            do="do not use this directory: its manifest was tampered with",
        )
    if listed.size < 0 or not _SHA256.fullmatch(listed.sha256):
        raise _bad(f"wrong about {listed.name!r}", "a size and 64 hexadecimal digits", repr(row)[:200])
    return listed


def _size_of(directory: str, name: str, follow_links: bool) -> int | None:
    """Size of a listed file; None if it is missing. raises UnsafePath, Environment"""
    parent = os.path.dirname(name)
    direct = os.path.join(os.path.realpath(directory), parent)
    if parent and os.path.realpath(os.path.join(directory, parent)) != direct:
        raise UnsafePath(
            "a directory on the way to this file is a link", file=name, do="put its target there"
        )
    if not os.path.lexists(os.path.join(directory, name)):
        return None
    with source._opened(directory, name, follow_links) as fd:
        return os.fstat(fd).st_size


# ---- structure


class Problem(NamedTuple):
    """Something that a finished, complete checkpoint does not have."""

    what: str
    file: str | None = None
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class StructureReport:
    """What headers, index and manifest tell."""

    release: str
    storage: str
    namespace: str
    num_shards: int
    num_tensors: int
    has_manifest: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]  # worth knowing, no failure

    @property
    def ok(self) -> bool:
        return not self.problems

    def document(self) -> dict[str, Any]:
        problems = [_without_none(problem._asdict()) for problem in self.problems]
        return {
            "level": "structure",
            "ok": self.ok,
            **self.__dict__,
            "problems": problems,
            "notes": [*self.notes],
        }


def verify_structure(checkpoint: Checkpoint, *, unit_scales: frozenset[str] = frozenset()) -> StructureReport:
    """Compare headers with index, inventory and manifest; no tensor is read.

    raises  MissingFile, BadConfig, UnknownRelease if nothing says what to expect; BadManifest, UnsafePath
    """
    found = survey(checkpoint, unit_scales=unit_scales)
    problems = [
        Problem(error.what, *(error.facts.get(key) for key in Problem._fields[1:]))
        for error in checkpoint.problems
    ]
    problems += [Problem(item.sentence(), item.file, item.expected, item.found) for item in found.deviations]
    notes = []
    if checkpoint.index_total not in (None, checkpoint.total_size):
        notes.append(
            f"the index says {checkpoint.index_total:,} bytes of tensors, there are {checkpoint.total_size:,}"
        )
    manifest = read_manifest(checkpoint.directory, follow_links=checkpoint.follow_links)
    if manifest is not None:
        problems += _compare_with_manifest(checkpoint, manifest)
        listed = {file.name for file in manifest.files}
        others = [item.name for item in checkpoint.small_files() if not item.left and item.name not in listed]
        notes += [f"the manifest does not list {name!r}" for name in others]
    elif os.path.lexists(os.path.join(checkpoint.directory, _WORK)):
        problems.append(Problem("a conversion into this directory did not finish", file=_WORK))
    identity = found.identity
    return StructureReport(
        release=identity.release.name,
        storage=identity.storage.value,
        namespace=identity.namespace.value,
        num_shards=len(checkpoint.shards),
        num_tensors=len(checkpoint.tensors),
        has_manifest=manifest is not None,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _compare_with_manifest(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Problem]:
    listed = {file.name: file for file in manifest.files}
    for name, file in listed.items():
        size = _size_of(checkpoint.directory, name, checkpoint.follow_links)
        if size is None:
            yield Problem("a file that the manifest lists is missing", name, f"{file.size:,} bytes")
        elif size != file.size:
            what = "a file has not the size that the manifest says"
            yield Problem(what, name, f"{file.size:,} bytes", f"{size:,} bytes")
    with source._io_errors("."):
        present = [name for name in os.listdir(checkpoint.directory) if name.endswith(".safetensors")]
    needed = [CONFIG_NAME, *([INDEX_NAME] if checkpoint.has_index else [])]
    for name in sorted({*present, *checkpoint.shards, *needed} - listed.keys()):
        yield Problem("the manifest does not list this file", name)


# ---- bytes


class FileVerdict(NamedTuple):
    """What became of a listed file: ok, differs or missing."""

    name: str
    verdict: str
    expected: str
    found: str | None


@dataclass(frozen=True)
class BytesReport:
    """Every checked file, in the manifest's order."""

    files: tuple[FileVerdict, ...]
    num_listed: int
    num_bytes: int  # that the checked files should have

    @property
    def ok(self) -> bool:
        return all(file.verdict == "ok" for file in self.files)

    def document(self) -> dict[str, Any]:
        files = [_without_none(file._asdict()) for file in self.files]
        return {"level": "bytes", "ok": self.ok, **self.__dict__, "files": files}


def verify_bytes(
    directory: str,
    *,
    subset: Subset | None = None,
    follow_links: bool = False,
    num_workers: int = 2,
    on_event: OnEvent = _ignore,
    stop: Stop | None = None,
) -> BytesReport:
    """Compare the SHA-256 of every listed file, or of every t-th one, with the manifest.

    on_event  called from worker threads
    raises    MissingFile without a manifest, BadManifest, UnsafePath, Usage, Environment, what `stop` raises
    """
    manifest = read_manifest(directory, follow_links=follow_links)
    if manifest is None:
        raise _unverifiable(directory)
    chosen = _part(manifest.files, subset)
    num_bytes = sum(file.size for file in chosen)
    on_event(Started(num_bytes))
    watch = _Watch(on_event, stop)
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        verdicts = pool.map(lambda file: _verdict_of_file(directory, file, follow_links, watch), chosen)
        return BytesReport(tuple(verdicts), len(manifest.files), num_bytes)


def _unverifiable(directory: str) -> MissingFile:
    if os.path.lexists(os.path.join(directory, _WORK)):
        what, do = (
            "a conversion into this directory did not finish",
            "give the same command again: it continues",
        )
    else:
        what, do = "this directory has no manifest", "compare it with its source instead: --level values"
    return MissingFile(what, expected=MANIFEST_NAME, do=do)


def _verdict_of_file(directory: str, file: Listed, follow_links: bool, watch: _Watch) -> FileVerdict:
    size = _size_of(directory, file.name, follow_links)
    if size != file.size:
        watch.read(file.size)
        found = None if size is None else f"{size:,} bytes"
        return FileVerdict(file.name, "differs" if found else "missing", f"{file.size:,} bytes", found)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, _HASH_BYTES)))
    with source._opened(directory, file.name, follow_links) as fd:
        for offset in range(0, size, _HASH_BYTES):
            view = buffer[: size - offset]
            shard.read_into(fd, view, offset, file.name)
            digest.update(view)
            watch.read(len(view))
    same = digest.hexdigest() == file.sha256
    return FileVerdict(file.name, "ok" if same else "differs", file.sha256, digest.hexdigest())


# ---- values: two checkpoints


class Verdict(StrEnum):
    """What became of a tensor."""

    SAME_BYTES = "same bytes"
    SAME_VALUES = "same values"
    DIFFERS = "differs"
    MISSING = "missing"  # b has it not
    EXTRA = "extra"  # only b has it
    LEFT_OUT = "left out"  # b has it not, and its manifest says so


class Apart(NamedTuple):
    """How two tensors differ, and where first; `distance` and `unit` as in decode_plain.Difference.

    All leading dimensions count as rows; a vector is row 0.
    """

    num_values: int
    distance: int
    unit: str
    row: int
    col: int
    a: str
    b: str


@dataclass(frozen=True)
class TensorVerdict:
    """A logical tensor by its released name in a; or a stored one that no inventory knows."""

    name: str
    verdict: Verdict
    reason: str | None = None
    apart: Apart | None = None

    def document(self) -> dict[str, Any]:
        return _without_none({**self.__dict__, "apart": self.apart and self.apart._asdict()})


@dataclass(frozen=True)
class ValuesReport:
    """Counts of all verdicts, and every verdict that is not "same", in the order of a's inventory."""

    counts: dict[Verdict, int]
    tensors: tuple[TensorVerdict, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not any(self.counts[verdict] for verdict in (Verdict.DIFFERS, Verdict.MISSING, Verdict.EXTRA))

    def document(self) -> dict[str, Any]:
        tensors = [item.document() for item in self.tensors]
        counts = {verdict.value: count for verdict, count in self.counts.items()}
        return {
            "level": "values",
            "ok": self.ok,
            "counts": counts,
            "tensors": tensors,
            "notes": [*self.notes],
        }


def verify_values(
    a: Survey,
    b: Survey,
    *,
    subset: Subset | None = None,
    tensors: frozenset[str] = frozenset(),
    num_workers: int = 2,
    on_event: OnEvent = _ignore,
    stop: Stop | None = None,
) -> ValuesReport:
    """Compare two checkpoints tensor by tensor; b may be a conversion or a selection of layers of a.

    subset    every t-th tensor only
    tensors   only these, by their released names in a; empty: all
    on_event  called from worker threads
    raises    Usage for an unknown name, BadManifest, SourceChanged, Environment, and what `stop` raises
    """
    import torch  # here, because the other levels do without

    layers, dropped, notes = _selection(a, b)
    pairs = _pairs(a, b, layers, dropped)
    unknown = sorted(tensors - {pair.name for pair in pairs})
    if unknown:
        raise Usage(
            f"there is no tensor {unknown[0]!r} in either checkpoint",
            do="use the released name, such as layers.0.attn.wq_a.weight",
        )
    chosen = _part([pair for pair in pairs if not tensors or pair.name in tensors], subset)
    on_event(Started(sum(pair.a.values.size + pair.b.values.size for pair in chosen if pair.a and pair.b)))
    watch = _Watch(on_event, stop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallelism is across tensors
    try:
        with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
            verdicts = list(pool.map(lambda pair: _verdict(pair, a.checkpoint, b.checkpoint, watch), chosen))
    finally:
        torch.set_num_threads(threads)
    counted = Counter(item.verdict for item in verdicts)
    same = (Verdict.SAME_BYTES, Verdict.SAME_VALUES)
    told = tuple(item for item in verdicts if item.verdict not in same)
    return ValuesReport({verdict: counted[verdict] for verdict in Verdict}, told, notes)


def _selection(a: Survey, b: Survey) -> tuple[tuple[int, ...] | None, frozenset[str], tuple[str, ...]]:
    """From b's manifest, if it fits: layers of a that b is made of, dropped tensors of a; else a note."""
    manifest = read_manifest(b.checkpoint.directory, follow_links=b.checkpoint.follow_links)
    if manifest is None:
        return None, frozenset(), ()
    shards = {Listed(item.name, item.stamp.size, item.header.sha256) for item in a.checkpoint.shards.values()}
    fits = manifest.layers is None or len(manifest.layers) == b.model.num_layers
    if manifest.source == shards and fits:
        return manifest.layers, manifest.dropped, ()
    note = (
        "the manifest of b names another source than a: its lists of layers and dropped tensors are ignored"
    )
    return None, frozenset(), (note,)


class _Piece(NamedTuple):
    """Bytes [begin, begin + size) of a stored tensor, and what its header says."""

    name: str
    dtype: str
    stored_shape: Shape
    begin: int
    size: int


class _Form(NamedTuple):
    """How a checkpoint holds one tensor."""

    shape: Shape  # of the values
    values: _Piece  # or codes
    quant: Quant | None = None
    scales: _Piece | None = None
    problem: str | None = None  # why it cannot be decoded


class _Pair(NamedTuple):
    name: str
    a: _Form | None
    b: _Form | None
    left_out: bool


def _pairs(a: Survey, b: Survey, layers: tuple[int, ...] | None, dropped: frozenset[str]) -> list[_Pair]:
    """Everything that either checkpoint holds or should hold."""
    in_b = {_name_in_source(logical.name, layers): logical for logical in b.logicals}
    pairs = []
    for logical in a.logicals:
        twin = in_b.pop(logical.name, None)
        left_out = twin is None and a.layout.weights[logical.name][0] in dropped
        pairs.append(_Pair(logical.name, _form(a, logical), _form(b, twin) if twin else None, left_out))
    pairs += [_Pair(name, None, _form(b, logical), False) for name, logical in in_b.items()]
    rest_a, rest_b = set(a.checkpoint.tensors), set(b.checkpoint.tensors)
    for pair in pairs:
        rest_a -= _names(pair.a)
        rest_b -= _names(pair.b)
    for name in sorted(rest_a | rest_b):  # opaque, or in no inventory
        form_a = _as_stored(_whole(a, name)) if name in rest_a else None
        form_b = _as_stored(_whole(b, name)) if name in rest_b else None
        pairs.append(_Pair(name, form_a, form_b, name in dropped))
    return pairs


def _name_in_source(name: str, layers: tuple[int, ...] | None) -> str:
    head, _, rest = name.partition(".")
    if head != "layers" or layers is None:
        return name
    number, _, inner = rest.partition(".")
    return f"layers.{layers[int(number)]}.{inner}"


def _names(form: _Form | None) -> set[str]:
    return {piece.name for piece in (form.values, form.scales) if piece} if form else set()


def _whole(side: Survey, name: str) -> _Piece:
    entry = side.checkpoint.tensors[name].entry
    return _Piece(name, entry.dtype, entry.shape, 0, entry.end - entry.begin)


def _as_stored(piece: _Piece) -> _Form:
    return _Form(piece.stored_shape, piece)


def _form(side: Survey, logical: Logical) -> _Form | None:
    """How one side stores a logical tensor, as its headers say; None if it does not."""
    layout, quant = side.layout, side.layout.quant(logical)
    values, problem = _piece(side, *layout.weights[logical.name])
    if values is None:
        return None
    fits = values.stored_shape == layout.stored[values.name].shape
    shape = logical.shape if fits else values.stored_shape
    if quant is None:
        return _Form(shape, values, problem=None if values.size else problem)
    scales, scale_problem = _piece(side, *layout.scales[logical.name])
    if scales is None and logical.name not in side.unit_scales:
        scale_problem = "has no scales"
    return _Form(shape, values, quant, scales, problem or scale_problem)


def _piece(side: Survey, name: str, index: int) -> tuple[_Piece | None, str | None]:
    """The bytes of part number `index` of a stored tensor, and how the tensor deviates.

    Of a fused tensor whose shape is wrong nobody knows where the parts are: no bytes.
    """
    if name not in side.checkpoint.tensors:
        return None, None
    piece, stored, problem = _whole(side, name), side.layout.stored[name], None
    dtype, shape = piece.dtype, piece.stored_shape
    if (dtype, shape) != (stored.dtype, stored.shape):
        problem = f"is {dtype} {list(shape)} instead of {stored.dtype} {list(stored.shape)}"
    part = stored.parts[index]
    if len(stored.shape) <= len(part.logical.shape):
        return piece, problem
    if shape != stored.shape:
        return piece._replace(size=0), problem
    row_bytes = formats.stored_bytes(dtype, shape[-1:])
    return piece._replace(begin=part.begin * row_bytes, size=part.rows * row_bytes), problem


def _obstacle(a: _Form, b: _Form) -> str | None:
    """Why the values of two tensors cannot be compared."""
    for side, form in (("a", a), ("b", b)):
        if form.problem:
            return f"in {side} it {form.problem}"
    if a.shape != b.shape:
        return f"its shape is {list(a.shape)} in a, {list(b.shape)} in b"
    dtypes = {form.values.dtype for form in (a, b) if form.quant is None}
    if len(dtypes) > 1 or (dtypes and dtypes != {"BF16"} and (a.quant or b.quant)):
        return f"it is {a.values.dtype} in a, {b.values.dtype} in b"
    return None


def _verdict(pair: _Pair, checkpoint_a: Checkpoint, checkpoint_b: Checkpoint, watch: _Watch) -> TensorVerdict:
    a, b, name = pair.a, pair.b, pair.name
    if b is None:
        if pair.left_out:
            return TensorVerdict(name, Verdict.LEFT_OUT)
        return TensorVerdict(name, Verdict.MISSING, None if a else "in a as well")
    if a is None:
        return TensorVerdict(name, Verdict.EXTRA)
    reason = _obstacle(a, b)
    with checkpoint_a.reader() as reader_a, checkpoint_b.reader() as reader_b:
        if reason is None:
            same_bytes, apart = _compare(_Lane(reader_a, a), _Lane(reader_b, b), watch)
            if apart:
                return TensorVerdict(name, Verdict.DIFFERS, apart=apart)
            return TensorVerdict(name, Verdict.SAME_BYTES if same_bytes else Verdict.SAME_VALUES)
        # What cannot be decoded is still the same if it is stored in the same way and equal.
        pieces = [(x, y) for x, y in ((a.values, b.values), (a.scales, b.scales)) if x or y]
        same = all(x and y and x.size and x[1:] == y[1:] for x, y in pieces)
        for x, y in pieces:
            if same and x and y:
                same, _ = _compare(_Lane(reader_a, _as_stored(x)), _Lane(reader_b, _as_stored(y)), watch)
    return TensorVerdict(name, Verdict.SAME_BYTES) if same else TensorVerdict(name, Verdict.DIFFERS, reason)


class _Lane:
    """Reads a tensor of one checkpoint, some rows at a time."""

    def __init__(self, reader: Reader, form: _Form) -> None:
        self.form = form
        self._reader = reader
        self._values, self._scales = bytearray(), bytearray()

    def rows(self, first: int, count: int, num_rows: int) -> Rows:
        """`count` of the tensor's `num_rows` rows; in buffers that the next call uses again."""
        from .decode_plain import Rows

        form = self.form
        row_bytes = form.values.size // num_rows
        self._values = self._read(form.values, first * row_bytes, count * row_bytes, self._values)
        data = memoryview(self._values)[: count * row_bytes]
        if form.quant is None or form.scales is None:
            return Rows(count, form.values.dtype, data, form.quant)
        height = form.quant.block.rows
        scale_bytes = form.scales.size // ceil_div(num_rows, height)
        begin, end = first // height * scale_bytes, ceil_div(first + count, height) * scale_bytes
        self._scales = self._read(form.scales, begin, end - begin, self._scales)
        scales = memoryview(self._scales)[: end - begin]
        return Rows(count, form.values.dtype, data, form.quant, scales, first % height)

    def _read(self, piece: _Piece, offset: int, size: int, buffer: bytearray) -> bytearray:
        if len(buffer) < size:
            buffer = bytearray(size)
        self._reader.read_into(piece.name, memoryview(buffer)[:size], piece.begin + offset)
        return buffer


def _compare(a: _Lane, b: _Lane, watch: _Watch) -> tuple[bool, Apart | None]:
    """Whether all bytes are the same, and how the values differ if they do."""
    from . import decode_plain

    form, other = a.form, b.form
    alike = form.quant == other.quant and (form.scales is None) == (other.scales is None)
    width = formats.DTYPE_BITS[form.values.dtype] // 8 or 1
    plain = form.quant is None and other.quant is None
    num_rows, cols = (form.values.size // width, 1) if plain else (form.shape[0], form.shape[1])
    same_bytes, apart = True, None
    step = max(1, _CHUNK_VALUES // cols)
    for row in range(0, num_rows, step):
        count = min(step, num_rows - row)
        x, y = a.rows(row, count, num_rows), b.rows(row, count, num_rows)
        watch.read(len(x.data) + len(y.data))
        if alike and decode_plain.same_bytes(x, y):
            continue
        same_bytes = False
        found = decode_plain.compare(x, y)
        if found and apart:
            total = apart.num_values + found.num_values
            apart = apart._replace(num_values=total, distance=max(apart.distance, found.distance))
        elif found:
            at = divmod(row * cols + found.position, form.shape[-1] if form.shape else 1)
            apart = Apart(found.num_values, found.distance, found.unit, *at, found.a, found.b)
    return same_bytes, apart


def _part(items: Sequence[_Item], subset: Subset | None) -> list[_Item]:
    """Every t-th item. raises Usage"""
    number, count = subset or (1, 1)
    if not 1 <= number <= count:
        raise Usage("there is no such part", expected="n/t with n from 1 to t", found=f"{number}/{count}")
    return [item for index, item in enumerate(items) if index % count == number - 1]


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
