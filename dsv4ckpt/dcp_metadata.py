"""`.metadata` of a torch DCP directory: which boxes of which tensors stand where.  Knows no torch and no files.

torch reads it with pickle, so a pickle it is, of torch's own classes, as its planner and its FileSystemWriter make it.
What comes in is read as inert values, and must tell of tensors that their chunks tile and of places that exist.
Source: torch 2.13 (torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py).
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from . import formats, pickled
from .errors import BadDcp
from .formats import Shape
from .pickled import Global, Made, call_args
from .torchfile import DTYPE_WORDS, TORCH_DTYPES, is_count, is_shape

_VERSION = "1.0.0"  # of what FileSystemWriter writes
_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _CHUNK, _BYTES = (
    Global(_MODULE, name)
    for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")
)
_PROPERTIES, _INDEX, _STORAGE_META, _MEMORY_FORMAT = (
    Global(_MODULE, name)
    for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
)
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_LAYOUT = Global("torch.serialization", "_get_layout")

# ---- what else others write

_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_OLD_PROPERTIES = Global(_OLD_MODULE, "TensorProperties")
_OLD_MEMORY_FORMAT = Global(_OLD_MODULE, "MEM_FORMAT_ENCODING")
_GETATTR = Global("builtins", "getattr")  # by which Python 3.11.0 to 3.11.3 tell a member of an Enum
_PATHS = tuple(
    Global(module, name)
    for module in ("pathlib", "pathlib._local")  # the latter is Python 3.13's
    for name in ("PosixPath", "WindowsPath")
)
_FIELDS = {
    _METADATA: {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"},
    _TENSOR: {"properties", "size", "chunks"},
    _CHUNK: {"offsets", "sizes"},
    _BYTES: set[str](),
    _INDEX: {"fqn", "offset", "index"},
    _STORAGE_INFO: {"relative_path", "offset", "length", "transform_descriptors"},
}
_PROPERTIES_FIELDS = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory")
_MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
_KNOWN = (
    *_FIELDS, _STORAGE_META, _PROPERTIES, _OLD_PROPERTIES, _MEMORY_FORMAT, _OLD_MEMORY_FORMAT, _GETATTR, _LAYOUT,
    _SIZE, *_PATHS, *DTYPE_WORDS,
)  # fmt: skip
_FILE = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp", re.ASCII)
_CELLS_PER_CHUNK = 64  # of a grid each chunk fills one
_SHOWN = 80  # characters of a text in a message


class Chunk(NamedTuple):
    """A box of a tensor."""

    offsets: Shape
    sizes: Shape


class Place(NamedTuple):
    """Where a chunk stands, as torch.save writes it."""

    file: str
    offset: int
    length: int


class DcpTensor(NamedTuple):
    """A tensor, its chunks, and the place of each. dtype: in the words of safetensors"""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]
    places: tuple[Place, ...]


class DcpContents(NamedTuple):
    """The tensors of a directory, and the sorted names of what else it holds: pickled objects, which nobody loads."""

    tensors: dict[str, DcpTensor]
    others: tuple[str, ...]


# ---- the way out


def encode_metadata(tensors: Mapping[str, DcpTensor], save_id: str) -> bytes:
    """The file's bytes; equal arguments give equal bytes. Names no machine and no path."""
    storage: dict[object, object] = {}
    for name, tensor in tensors.items():
        for chunk, place in zip(tensor.chunks, tensor.places, strict=True):
            index = _object(_INDEX, fqn=name, offset=_size(chunk.offsets), index=None)
            storage[index] = _object(
                _STORAGE_INFO, relative_path=place.file, offset=place.offset, length=place.length
            )
    meta = _object(_STORAGE_META, checkpoint_id=".", save_id=save_id, load_id=None, modules=[])
    whole = _object(
        _METADATA,
        state_dict_metadata={name: _tensor(tensor) for name, tensor in tensors.items()},
        planner_data={name: (name,) for name in tensors},
        storage_data=storage,
        storage_meta=meta,
        version=_VERSION,
    )
    return pickled.dumps(whole, protocol=4)


def _tensor(tensor: DcpTensor) -> Made:
    strided = Made(_LAYOUT, ("torch.strided",), called=True)
    contiguous = Made(_MEMORY_FORMAT, (0,), called=True)
    properties = Made(_PROPERTIES, (), (TORCH_DTYPES[tensor.dtype], strided, False, contiguous, False))
    chunks = [_object(_CHUNK, offsets=_size(item.offsets), sizes=_size(item.sizes)) for item in tensor.chunks]
    return _object(_TENSOR, properties=properties, size=_size(tensor.shape), chunks=chunks)


def _object(of: Global, **state: object) -> Made:
    return Made(of, (), state)


def _size(shape: Shape) -> Made:
    return Made(_SIZE, (shape,), called=True)


# ---- the way in


def parse_metadata(data: bytes, file_sizes: Mapping[str, int]) -> DcpContents:
    """What a directory holds, by its `.metadata` and the sizes of its files.

    raises  BadDcp: not what torch's planner and FileSystemWriter write; chunks that do not tile their tensor; a place
            outside its file, or that overlaps another
    planner_data and storage_meta are for torch's loader: nothing follows from them here. Takes time and memory in
    proportion to the size of the data: 13 times its bytes for what torch writes, 25 at worst.
    """
    if len(data) > formats.MAX_DCP_METADATA_BYTES:
        limit = f"at most {formats.MAX_DCP_METADATA_BYTES:,} bytes"
        _refuse("it is too large", expected=limit, found=f"{len(data):,}")
    try:
        whole = pickled.loads(data, _KNOWN)
    except pickled.Malformed as error:
        _refuse(f"its pickle is not one that torch writes: {error}")
    fields = _fields(whole, _METADATA)
    entries, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(entries) is not dict or type(storage) is not dict:
        _refuse("it has no entries or no places")
    _require_version(fields.get("version"))
    places = _places(storage, file_sizes)
    tensors: dict[str, DcpTensor] = {}
    others = []
    for name, entry in entries.items():
        mine = places.pop(_name(name), {})
        if type(entry) is Made and entry.of is _BYTES:
            _fields(entry, _BYTES)
            if mine.keys() != {None}:
                _refuse(f"object {name!r} has not one place")
            others.append(name)
        else:
            tensors[name] = _parsed_tensor(name, entry, mine)
    for name in places:
        _refuse(f"{name!r} has a place and is no entry")
    return DcpContents(tensors, tuple(sorted(others)))


def _refuse(what: str, *, expected: object = None, found: object = None) -> NoReturn:
    raise BadDcp(
        f"the description of the checkpoint is malformed: {what}",
        file=formats.DCP_METADATA_NAME,
        expected=expected,
        found=found,
        do="copy the directory again, or save it anew with torch.distributed.checkpoint.save",
    )


def _shown(value: object) -> str:
    """Short, and no deep value in its length."""
    return repr(value[:_SHOWN]) if type(value) is str else f"a {type(value).__name__}"


def _fields(value: object, of: Global) -> dict[str, object]:
    """The attributes of an object of this class."""
    if type(value) is not Made or value.of is not of or value.called or value.args:
        _refuse(f"something else stands in place of {of.name}")
    state = {} if value.state is None else value.state
    if type(state) is not dict or not state.keys() <= _FIELDS[of]:
        _refuse(f"{of.name} has attributes that torch does not give it")
    return state


def _require_version(version: object) -> None:
    if version is not None and (type(version) is not str or not version.startswith("1.")):
        _refuse("its version is unknown", expected=_VERSION, found=_shown(version))


def _name(value: object) -> str:
    if type(value) is not str:
        _refuse("a name is no text")
    if len(value) > formats.MAX_NAME_CHARS:
        _refuse(f"a name has more than {formats.MAX_NAME_CHARS} characters", found=_shown(value))
    return value


def _shape(value: object, name: str) -> Shape:
    args = call_args(value, _SIZE, 1)
    if args is None or not is_shape(args[0]):
        _refuse(
            f"a size or an offset of {name!r} is none",
            expected=f"torch.Size of at most {formats.MAX_RANK} numbers",
        )
    return args[0]


# ---- places

_Places = dict[Shape | None, Place]  # of one entry, by the offsets of the chunk; None: of an object


def _places(storage: dict[object, object], file_sizes: Mapping[str, int]) -> dict[str, _Places]:
    """Where the chunks of each entry stand."""
    found: dict[str, _Places] = defaultdict(dict)
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, info in storage.items():
        fields = _fields(index, _INDEX)
        name, offset, hint = _name(fields.get("fqn")), fields.get("offset"), fields.get("index")
        if hint is not None and not is_count(hint):
            _refuse(f"a place of {name!r} has an index that is no number")
        offsets = None if offset is None else _shape(offset, name)
        if offsets in found[name]:
            _refuse(f"two places are told for one chunk of {name!r}", found=offsets)
        place = found[name][offsets] = _place(name, _fields(info, _STORAGE_INFO), file_sizes)
        ranges[place.file].append((place.offset, place.offset + place.length))
    for file, mine in ranges.items():
        _require_apart(file, mine)
    return dict(found)


def _place(name: str, fields: dict[str, object], file_sizes: Mapping[str, int]) -> Place:
    file, offset, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if fields.get("transform_descriptors") is not None:
        _refuse(f"{name!r} is compressed, or was saved through another extension of torch's")
    if type(file) is not str or not _FILE.fullmatch(file):
        example = "__0_0.distcp or the like"
        _refuse(f"{name!r} stands in a file that torch does not write", expected=example, found=_shown(file))
    if file not in file_sizes:
        _refuse(f"{name!r} stands in {file}, which is not there")
    if not is_count(offset) or not is_count(length):
        _refuse(f"the place of {name!r} is told without numbers")
    if offset + length > file_sizes[file]:
        _refuse(
            f"{name!r} stands outside {file}",
            expected=f"up to byte {file_sizes[file]:,}",
            found=f"up to byte {offset + length:,}",
        )
    return Place(file, offset, length)


def _require_apart(file: str, ranges: list[tuple[int, int]]) -> None:
    ranges.sort()
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        if begin < end:
            _refuse(f"two places in {file} overlap", found=f"byte {begin:,}")


# ---- tensors


def _parsed_tensor(name: str, entry: object, places: _Places) -> DcpTensor:
    fields = _fields(entry, _TENSOR)
    dtype, shape = _dtype(name, fields.get("properties")), _shape(fields.get("size"), name)
    if formats.stored_bytes(dtype, shape) > formats.MAX_COUNT:
        _refuse(f"{name!r} is larger than any storage", found=f"{dtype} {list(shape)}")
    told = fields.get("chunks")
    # lengths first: a pickle may show one list of chunks to many tensors
    if type(told) is not list or not told or len(told) != len(places):
        _refuse(f"{name!r} has not one place for each chunk")
    chunks = tuple(_chunk(name, item, shape) for item in told)
    if {chunk.offsets for chunk in chunks} != places.keys():
        _refuse(f"the places of {name!r} are not those of its chunks")
    _require_tiled(name, shape, chunks)
    tensor = DcpTensor(dtype, shape, chunks, tuple(places[chunk.offsets] for chunk in chunks))
    for chunk, place in zip(tensor.chunks, tensor.places, strict=True):
        if place.length < formats.stored_bytes(dtype, chunk.sizes):
            _refuse(f"a chunk of {name!r} has no room where it stands", expected=chunk, found=place)
    return tensor


def _dtype(name: str, properties: object) -> str:
    """In the words of safetensors. What else a tensor was like, torch ignores too."""
    if type(properties) is not Made or properties.of not in (_PROPERTIES, _OLD_PROPERTIES):
        _refuse(f"{name!r} has no properties")
    state = properties.state
    values = tuple(map(state.get, _PROPERTIES_FIELDS)) if type(state) is dict else state
    if type(values) is not tuple or len(values) != len(_PROPERTIES_FIELDS):
        _refuse(f"the properties of {name!r} are not {', '.join(_PROPERTIES_FIELDS)}")
    dtype, layout, requires_grad, memory_format, pin_memory = values
    if type(dtype) is not Global or dtype not in DTYPE_WORDS:
        _refuse(f"{name!r} has no dtype")
    if call_args(layout, _LAYOUT, 1) != ("torch.strided",):
        _refuse(f"{name!r} is sparse or has another layout than torch.strided")
    if not type(requires_grad) is type(pin_memory) is bool or not _is_memory_format(memory_format):
        _refuse(f"the properties of {name!r} are malformed")
    return DTYPE_WORDS[dtype]


def _is_memory_format(value: object) -> bool:
    return any(
        call_args(value, of, 1) == (number,) or call_args(value, _GETATTR, 2) == (of, word)
        for of in (_MEMORY_FORMAT, _OLD_MEMORY_FORMAT)
        for number, word in enumerate(_MEMORY_FORMATS)
    )


def _chunk(name: str, value: object, shape: Shape) -> Chunk:
    fields = _fields(value, _CHUNK)
    chunk = Chunk(_shape(fields.get("offsets"), name), _shape(fields.get("sizes"), name))
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        _refuse(f"a chunk of {name!r} has other dimensions than it", expected=shape, found=chunk)
    if any(map(operator.gt, map(operator.add, *chunk), shape)):
        _refuse(f"a chunk of {name!r} ends outside it", expected=shape, found=chunk)
    return chunk


def _require_tiled(name: str, shape: Shape, chunks: Sequence[Chunk]) -> None:
    """Every element stands in one chunk. Chunks without elements are what ranks have that got nothing."""
    filled = [chunk for chunk in chunks if 0 not in chunk.sizes]
    if 0 in shape or [chunk.sizes for chunk in filled] == [shape]:
        return
    room = _CELLS_PER_CHUNK * len(filled)
    for covering in _cells(filled, shape, 0):
        if len(covering) != 1:
            _refuse(f"the chunks of {name!r} {'overlap' if covering else 'leave a gap'}", expected=shape)
        room -= 1
        if room < 0:  # time is linear that way
            _refuse(f"the chunks of {name!r} are cut too irregularly")


def _cells(chunks: list[Chunk], shape: Shape, axis: int) -> Iterator[list[Chunk]]:
    """Which chunks cover each of the cells that all their edges cut a tensor into, from this axis on."""
    if axis == len(shape):
        yield chunks
        return
    beginning: dict[int, list[Chunk]] = defaultdict(list)
    cuts = {0, shape[axis]}
    for chunk in chunks:
        begin = chunk.offsets[axis]
        beginning[begin].append(chunk)
        cuts |= {begin, begin + chunk.sizes[axis]}
    active: list[Chunk] = []
    for cut in sorted(cuts - {shape[axis]}):
        active = [item for item in active if item.offsets[axis] + item.sizes[axis] > cut] + beginning[cut]
        yield from _cells(active, shape, axis + 1)
