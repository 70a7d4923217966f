"""`.metadata` of a torch DCP directory: which boxes of which tensors stand where.  Knows no torch and no files.

torch reads it with pickle, so a pickle it is, of torch's own classes, as its planner and its FileSystemWriter make it.
Source: torch 2.13 (torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import pickled
from .formats import Shape
from .pickled import Global, Made

_VERSION = "1.0.0"  # of what FileSystemWriter writes
_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _CHUNK = (
    Global(_MODULE, name) for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata")
)
_PROPERTIES, _INDEX, _STORAGE_META, _MEMORY_FORMAT = (
    Global(_MODULE, name)
    for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
)
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_LAYOUT = Global("torch.serialization", "_get_layout")
_DTYPES = {
    "BF16": Global("torch", "bfloat16"), "F16": Global("torch", "float16"), "F32": Global("torch", "float32"),
    "F64": Global("torch", "float64"), "I64": Global("torch", "int64"), "I32": Global("torch", "int32"),
    "I16": Global("torch", "int16"), "I8": Global("torch", "int8"), "U8": Global("torch", "uint8"),
    "BOOL": Global("torch", "bool"),
}  # fmt: skip


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
    properties = Made(_PROPERTIES, (), (_DTYPES[tensor.dtype], strided, False, contiguous, False))
    chunks = [_object(_CHUNK, offsets=_size(item.offsets), sizes=_size(item.sizes)) for item in tensor.chunks]
    return _object(_TENSOR, properties=properties, size=_size(tensor.shape), chunks=chunks)


def _object(of: Global, **state: object) -> Made:
    return Made(of, (), state)


def _size(shape: Shape) -> Made:
    return Made(_SIZE, (shape,), called=True)
