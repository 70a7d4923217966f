"""Compares two checkpoints tensor by tensor, each in any storage format and namespace.

The level `values` of verify.  Decodes with decode_plain: shares no code with what writes (run, codec, outdir), so that
no mistake there can hide.  Memory is bounded: tensors pass in chunks of rows.
"""

from __future__ import annotations

import concurrent.futures
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from . import formats
from .errors import Usage
from .formats import Quant, Shape, Spelling, ceil_div
from .inventory import Logical
from .manifest import Listed, manifest_of
from .source import Checkpoint, Reader
from .stop import StopFlag
from .survey import Survey
from .verify import OnEvent, Started, Subset, Watch, ignore, part_of, without_none

if TYPE_CHECKING:
    from .decode_plain import Rows

_CHUNK_VALUES = 1024 * 1024  # compared at a time; memory is a few dozen bytes for each, and worker


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
    reason: str | None = None  # may stand beside `apart`
    apart: Apart | None = None

    def document(self) -> dict[str, Any]:
        return without_none({**self.__dict__, "apart": self.apart and self.apart._asdict()})


@dataclass(frozen=True)
class ValuesReport:
    """Counts of all verdicts, and every verdict that is not "same", in the order of a's inventory.

    `proven` tells of stored tensors of a how many of their bytes b holds under the same name in the same place.
    """

    counts: dict[Verdict, int]
    tensors: tuple[TensorVerdict, ...]
    notes: tuple[str, ...]
    proven: Mapping[str, int]

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
    on_event: OnEvent = ignore,
    stop: StopFlag | None = None,
) -> ValuesReport:
    """Compare two checkpoints tensor by tensor; b may be a conversion or a selection of layers of a.

    subset    every t-th tensor only
    tensors   only these, by their released names in a; empty: all
    on_event  called from worker threads
    raises    Usage for an unknown name, BadManifest, SourceChanged, Environment, and what `stop` raises
    """
    from .threads import one_torch_thread

    layers, dropped, notes = _selection(a, b)
    pairs = _pairs(a, b, layers, dropped)
    unknown = sorted(tensors - {pair.name for pair in pairs})
    if unknown:
        raise Usage(
            f"there is no tensor {unknown[0]!r} in either checkpoint",
            do="use the released name, such as layers.0.attn.wq_a.weight",
        )
    chosen = part_of([pair for pair in pairs if not tensors or pair.name in tensors], subset)
    on_event(Started(sum(pair.a.values.size + pair.b.values.size for pair in chosen if pair.a and pair.b)))
    watch = Watch(on_event, stop)
    with one_torch_thread(), concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        verdicts = list(pool.map(lambda pair: _verdict(pair, a.checkpoint, b.checkpoint, watch), chosen))
    counted = Counter(item.verdict for item in verdicts)
    same = (Verdict.SAME_BYTES, Verdict.SAME_VALUES)
    told = tuple(item for item in verdicts if item.verdict not in same)
    proven = _proven(chosen, verdicts)
    return ValuesReport({verdict: counted[verdict] for verdict in Verdict}, told, notes, proven)


def _proven(pairs: list[_Pair], verdicts: list[TensorVerdict]) -> Mapping[str, int]:
    num_bytes: Counter[str] = Counter()
    for pair, verdict in zip(pairs, verdicts, strict=True):
        in_place = pair.a and pair.b and pair.a.pieces() == pair.b.pieces()
        if pair.a and in_place and verdict.verdict is Verdict.SAME_BYTES:
            for piece in filter(None, pair.a.pieces()):
                num_bytes[piece.name] += piece.size
    return num_bytes


def _selection(a: Survey, b: Survey) -> tuple[tuple[int, ...] | None, frozenset[str], tuple[str, ...]]:
    """From b's manifest, if it fits: layers of a that b is made of, dropped tensors of a; else a note."""
    manifest = manifest_of(b.checkpoint)
    if manifest is None:
        return None, frozenset(), ()
    shards = {Listed(item.name, item.stamp.size, item.header.sha256) for item in a.checkpoint.shards.values()}
    fits = manifest.layers is None or len(manifest.layers) == b.model.num_layers
    if manifest.source == shards and fits:
        return manifest.layers, manifest.dropped, ()
    if manifest.layers is None and not manifest.dropped:  # it has nothing to say, such as after a way back
        return None, frozenset(), ()
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
    scale_2: _Piece | None = None  # one more factor of every value
    input_scale: _Piece | None = None  # of the activations: no part of the values
    problem: str | None = None  # why it cannot be decoded

    def pieces(self) -> tuple[_Piece | None, ...]:
        """Everything that it is made of, in one order for all forms."""
        return self.values, self.scales, self.scale_2, self.input_scale


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
    return {piece.name for piece in form.pieces() if piece} if form else set()


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
    numbers: dict[str, _Piece | None] = {}
    for leaf in quant.per_tensor:
        stored_name, index = layout.per_tensor[leaf][logical.name]
        numbers[leaf], deviation = _piece(side, stored_name, index)
        stored_leaf = stored_name.rpartition(".")[2]
        if numbers[leaf] is None:
            scale_problem = scale_problem or f"has no {stored_leaf}"
        elif deviation:
            scale_problem = scale_problem or f"has a {stored_leaf} that {deviation}"
    problem = problem or scale_problem
    return _Form(shape, values, quant, scales, numbers.get("scale_2"), numbers.get("input_scale"), problem)


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


def _verdict(pair: _Pair, checkpoint_a: Checkpoint, checkpoint_b: Checkpoint, watch: Watch) -> TensorVerdict:
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
            lane_a, lane_b = _Lane(reader_a, a), _Lane(reader_b, b)
            same_bytes, apart = _compare(lane_a, lane_b, watch)
            reason = _other_input_scale(lane_a, lane_b)
            if apart or reason:
                return TensorVerdict(name, Verdict.DIFFERS, reason, apart)
            return TensorVerdict(name, Verdict.SAME_BYTES if same_bytes else Verdict.SAME_VALUES)
        # What cannot be decoded is still the same if it is stored in the same way and equal.
        pieces = [(x, y) for x, y in zip(a.pieces(), b.pieces(), strict=True) if x or y]
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
        scale_2 = self.number(form.scale_2)
        self._scale_2 = _f32(scale_2) if scale_2 else 1.0

    def number(self, piece: _Piece | None) -> bytes | None:
        """The bytes of a tensor that is one F32 number."""
        return bytes(self._read(piece, 0, piece.size, bytearray())) if piece else None

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
        return Rows(count, form.values.dtype, data, form.quant, scales, first % height, self._scale_2)

    def _read(self, piece: _Piece, offset: int, size: int, buffer: bytearray) -> bytearray:
        if len(buffer) < size:
            buffer = bytearray(size)
        self._reader.read_into(piece.name, memoryview(buffer)[:size], piece.begin + offset)
        return buffer


def _compare(a: _Lane, b: _Lane, watch: Watch) -> tuple[bool, Apart | None]:
    """Whether all bytes are the same, and how the values differ if they do."""
    from . import decode_plain

    form, other = a.form, b.form
    alike = _unspelled(form.quant) == _unspelled(other.quant) and (form.scales is None) == (
        other.scales is None
    )
    alike = alike and a.number(form.scale_2) == b.number(other.scale_2)
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


def _unspelled(quant: Quant | None) -> Quant | None:
    """Names may differ: how the tensors of a matrix are called does not make its bytes others."""
    return quant and quant._replace(spelling=Spelling.RELEASED)


def _other_input_scale(a: _Lane, b: _Lane) -> str | None:
    """Values do not depend on it, what a server computes does: where both have one it must be the same."""
    x, y = a.number(a.form.input_scale), b.number(b.form.input_scale)
    if x is None or y is None or x == y:
        return None
    return f"its input_scale is {_f32(x)!r} in a, {_f32(y)!r} in b"


def _f32(data: bytes) -> float:
    (value,) = struct.unpack("<f", data)
    return float(value)
