"""`.metadata` in: what torch pickles is read as torch means it, whatever version wrote it; all else is refused.

Objects of torch's own classes, pickled by Python, are the oracle; for the tiling of tensors it is counting elements.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv4ckpt import dcp_metadata, formats, pickled, torchfile
from dsv4ckpt.dcp_metadata import Chunk, DcpContents, DcpTensor, Place, parse_metadata
from dsv4ckpt.errors import BadDcp
from dsv4ckpt.pickled import Global, Made

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZES = {"__0_0.distcp": 100_000, "__1_0.distcp": 100_000}
METADATA = Global("torch.distributed.checkpoint.metadata", "Metadata")
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
HALVES: list[Box] = [((0, 0), (2, 3)), ((2, 0), (2, 3))]


def tensor(shape: tuple[int, ...], boxes: Iterable[Box], **properties: Any) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
    return TensorStorageMetadata(
        TensorProperties(**{"dtype": torch.float32, **properties}), torch.Size(shape), chunks
    )


def metadata(**changes: Any) -> Metadata:
    """A tensor in two halves, a scalar and an object, as a planner tells of them."""
    entries = {"w": tensor((4, 3), HALVES), "n.s": tensor((), [((), ())]), "o": BytesStorageMetadata()}
    storage = {
        MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 1000),
        MetadataIndex("w", [2, 0], 1): _StorageInfo("__1_0.distcp", 0, 1000),
        MetadataIndex("n.s", [], 0): _StorageInfo("__1_0.distcp", 1000, 900),
        MetadataIndex("o"): _StorageInfo("__0_0.distcp", 1000, 500),
    }
    meta = StorageMeta(pathlib.PurePosixPath("/somewhere"), "id", None, [])
    meta.checkpoint_id = pathlib.Path("/somewhere")
    planner = {"w": ("w",), "n.s": ("n", "s"), "o": ("o", 0)}
    return Metadata(**{
        "state_dict_metadata": entries, "planner_data": planner, "storage_data": storage, "storage_meta": meta,
        "version": "1.0.0", **changes,
    })  # fmt: skip


WANTED = DcpContents(
    {
        "w": DcpTensor(
            "F32",
            (4, 3),
            (Chunk((0, 0), (2, 3)), Chunk((2, 0), (2, 3))),
            (Place("__0_0.distcp", 0, 1000), Place("__1_0.distcp", 0, 1000)),
        ),
        "n.s": DcpTensor("F32", (), (Chunk((), ()),), (Place("__1_0.distcp", 1000, 900),)),
    },
    ("o",),
)


def parsed(found: Metadata, protocol: int = 4) -> DcpContents:
    return parse_metadata(pickle.dumps(found, protocol), SIZES)


# ---- what torch writes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_is_read_in_every_protocol(protocol: int) -> None:
    assert parsed(metadata(), protocol) == WANTED


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None}, {"version": "1.0.1"}, {"storage_meta": None}, {"planner_data": None},
        {"storage_meta": StorageMeta("somewhere", "id", "id", ["m"])}, {"storage_meta": StorageMeta()},
        {"planner_data": {"a": ({"b": [1, ("c", None)]}, 2**40)}},
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_say_nothing_of_tensors_may_differ(changes: dict[str, Any]) -> None:
    assert parsed(metadata(**changes)) == WANTED


def test_attributes_that_older_torch_does_not_have_may_lack() -> None:
    found = metadata()
    del found.version, found.storage_meta
    assert parsed(found) == WANTED


def test_properties_of_torch_before_2_3_are_known() -> None:
    found = metadata()
    for name in ("w", "n.s"):
        found.state_dict_metadata[name].properties = OldProperties(dtype=torch.float32)
    assert parsed(found) == WANTED


def test_properties_may_be_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"dtype": torch.float32, "layout": torch.strided, "requires_grad": True, "pin_memory": False}
    state["memory_format"] = _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: state)
    assert parsed(metadata()) == WANTED


@pytest.mark.parametrize("member", _MEM_FORMAT_ENCODING)
def test_memory_format_is_known_by_name_as_python_3_11_0_pickles_it(
    member: _MEM_FORMAT_ENCODING, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda it, _: (getattr, (type(it), it.name)))
    state = (torch.float32, torch.strided, False, member, False)
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: state)
    assert b"getattr" in pickle.dumps(metadata(), 4)
    assert parsed(metadata()) == WANTED


@pytest.mark.parametrize("word", torchfile.TORCH_DTYPES)
def test_dtype_is_told_in_the_words_of_safetensors(word: str) -> None:
    dtype = getattr(torch, torchfile.TORCH_DTYPES[word].name)
    file = safetensors.torch.save({"x": torch.zeros(4, dtype=dtype)})
    assert f'"dtype":"{word}"'.encode() in file
    found = metadata(state_dict_metadata={"x": tensor((4,), [((0,), (4,))], dtype=dtype)})
    found.storage_data = {MetadataIndex("x", [0]): _StorageInfo("__0_0.distcp", 0, 1000)}
    assert parsed(found).tensors["x"].dtype == word


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 4)])
def test_tensor_without_elements_needs_no_chunk_with_some(shape: tuple[int, ...]) -> None:
    entry = tensor(shape, [((0,) * len(shape), shape)])
    storage = {MetadataIndex("x", [0] * len(shape)): _StorageInfo("__0_0.distcp", 0, 1000)}
    assert (
        parsed(metadata(state_dict_metadata={"x": entry}, storage_data=storage)).tensors["x"].shape == shape
    )


def test_chunks_of_ranks_that_got_nothing_are_taken() -> None:
    entry = tensor((1,), [((0,), (1,)), ((1,), (0,))])
    storage = {MetadataIndex("x", [at]): _StorageInfo("__0_0.distcp", 900 * at, 900) for at in (0, 1)}
    assert (
        len(parsed(metadata(state_dict_metadata={"x": entry}, storage_data=storage)).tensors["x"].chunks) == 2
    )


def test_what_we_write_we_read() -> None:
    data = dcp_metadata.encode_metadata(WANTED.tensors, "id")
    assert parse_metadata(data, SIZES) == WANTED._replace(others=())


@pytest.mark.slow
def test_state_of_one_process_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """Nested, with an optimizer's state, an object that is shared, numbers, views."""
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    shared = torch.arange(30.0).view(5, 6)
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "list": [1, shared, None],
        "columns": shared[:, 1:3], "rows": shared[2:], "scalar": torch.tensor(1.5), "empty": torch.empty(0, 2),
        "parameter": model.weight, "u16": torch.ones(5, dtype=torch.uint16),
    }  # fmt: skip
    dcp.save(state, checkpoint_id=tmp_path)
    data = (tmp_path / ".metadata").read_bytes()
    wanted: Metadata = pickle.loads(data)
    found = parse_metadata(data, {file.name: file.stat().st_size for file in tmp_path.iterdir()})
    assert as_torch_has_it(wanted) == found
    assert len(found.tensors) > 10 and len(found.others) > 10


def as_torch_has_it(found: Metadata) -> DcpContents:
    tensors, others = {}, []
    words = {getattr(torch, known.name): word for word, known in torchfile.TORCH_DTYPES.items()}
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            others.append(name)
            continue
        chunks = [Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        infos = [found.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in chunks]
        places = [Place(info.relative_path, info.offset, info.length) for info in infos]
        shape = tuple(entry.size)
        tensors[name] = DcpTensor(words[entry.properties.dtype], shape, tuple(chunks), tuple(places))
    return DcpContents(tensors, tuple(sorted(others)))


# ---- what nobody writes


def put(name: str, entry: Any) -> Callable[[Metadata], None]:
    return lambda found: found.state_dict_metadata.__setitem__(name, entry)


def stored(**changes: Any) -> Callable[[Metadata], None]:
    """The place of the scalar, with changes."""

    def change(found: Metadata) -> None:
        info = found.storage_data[MetadataIndex("n.s", [])]
        found.storage_data[MetadataIndex("n.s", [])] = _StorageInfo(**{**vars(info), **changes})

    return change


def placed(index: MetadataIndex, file: str = "__0_0.distcp", at: int = 5000) -> Callable[[Metadata], None]:
    return lambda found: found.storage_data.__setitem__(index, _StorageInfo(file, at, 900))


def properties(**changes: Any) -> Callable[[Metadata], None]:
    return put("w", tensor((4, 3), HALVES, **changes))


def given(**attributes: Any) -> Callable[[Metadata], None]:
    return lambda found: vars(found).update(attributes)


WRONG: dict[str, tuple[str, Callable[[Metadata], None]]] = {
    "gap": ("leave a gap", put("w", tensor((5, 3), HALVES))),
    "gap between": ("leave a gap", put("w", tensor((5, 3), [HALVES[0], ((2, 0), (3, 2))]))),
    "overlap": ("overlap", put("w", tensor((4, 3), [((0, 0), (3, 3)), HALVES[1]]))),
    "outside": ("ends outside", put("w", tensor((3, 3), HALVES))),
    "begin alike": ("are not those", put("w", tensor((4, 3), [HALVES[0], HALVES[0]]))),
    "fewer dimensions": ("other dimensions", put("w", tensor((4, 3), [((0, 0), (4,)), HALVES[1]]))),
    "a chunk without a place": ("one place for each", put("w", tensor((6, 3), [*HALVES, ((4, 0), (2, 3))]))),
    "a place without a chunk": ("one place for each", placed(MetadataIndex("w", [1, 0]))),
    "a place of a tensor without offset": ("one place for each", placed(MetadataIndex("w"))),
    "a place without an entry": ("is no entry", placed(MetadataIndex("x", [0]))),
    "two places of one name": ("has not one place", placed(MetadataIndex("o", [0]))),
    "an object without a place": ("has not one place", put("p", BytesStorageMetadata())),
    "no chunks": ("one place for each", put("x", tensor((0,), []))),
    "negative size": ("is none", put("w", tensor((-4, 3), HALVES))),
    "rank": ("is none", put("w", tensor((1,) * 9, [((0,) * 9, (1,) * 9)]))),
    "boolean as a size": ("is none", lambda found: found.state_dict_metadata["w"].chunks.__setitem__(
        0, ChunkStorageMetadata((False, False), (2, 3)))),  # type: ignore[arg-type]
    "no torch.Size": ("is none", lambda found: setattr(found.state_dict_metadata["w"], "size", (4, 3))),
    "huge": ("larger than any", put("w", tensor((2**62, 2**62), HALVES))),
    "sparse": ("another layout", properties(layout=torch.sparse_coo)),
    "dtype": ("no place there", properties(dtype=torch.complex128)),
    "layout as dtype": ("no dtype", properties(dtype=torch.strided)),
    "requires_grad": ("properties", properties(requires_grad=1)),
    "pin_memory": ("properties", properties(pin_memory=None)),
    "dtype as a text": ("no dtype", properties(dtype="float32")),
    "dtype as a list": ("no dtype", properties(dtype=["float32"])),
    "class as dtype": ("no dtype", properties(dtype=StorageMeta)),
    "properties as a text": ("no properties", lambda found: setattr(
        found.state_dict_metadata["w"], "properties", "float32")),
    "properties of another class": ("no properties", lambda found: setattr(
        found.state_dict_metadata["w"], "properties", StorageMeta())),
    "long name": ("512 characters", put("n" * 513, BytesStorageMetadata())),
    "long name of a place": ("512 characters", placed(MetadataIndex("n" * 513))),
    "name that is none": ("no text", placed(MetadataIndex(3))),  # type: ignore[arg-type]
    "index that is none": ("no number", placed(MetadataIndex("x", None, True))),
    "file elsewhere": ("torch does not write", stored(relative_path="../__0_0.distcp")),
    "file from the root": ("torch does not write", stored(relative_path="/etc/passwd")),
    "file in a folder": ("torch does not write", stored(relative_path="a/__0_0.distcp")),
    "file with NUL": ("torch does not write", stored(relative_path="__0_0.distcp\0")),
    "file with a line's end": ("torch does not write", stored(relative_path="__0_0.distcp\n")),
    "file with other digits": ("torch does not write", stored(relative_path="__\u0661_0.distcp")),
    "file that is none": ("torch does not write", stored(relative_path=None)),
    "file as a path": ("torch does not write", stored(relative_path=pathlib.Path("__0_0.distcp"))),
    "file that is not there": ("is not there", stored(relative_path="__7_0.distcp")),
    "beyond the end": ("stands outside", stored(length=99_001)),
    "far beyond the end": ("stands outside", stored(offset=2**62)),
    "negative offset": ("without numbers", stored(offset=-1)),
    "negative length": ("without numbers", stored(length=-900)),
    "boolean length": ("without numbers", stored(length=True)),
    "no length": ("without numbers", stored(length=None)),
    "places overlap": ("overlap", stored(offset=999)),
    "places overlap an object's": ("overlap", stored(relative_path="__0_0.distcp", offset=1400)),
    "same place": ("overlap", stored(offset=0, length=1000)),
    "no room": ("no room", stored(length=3)),
    "compressed": ("compressed", stored(transform_descriptors=["zstd"])),
    "compressed by nothing": ("compressed", stored(transform_descriptors=[])),
    "version": ("version", given(version="2.0.0")),
    "version as a number": ("version", given(version=1)),
    "no entries": ("no entries", given(state_dict_metadata=None)),
    "no places": ("no entries or no places", given(storage_data=None)),
    "more of the whole": ("attributes", given(extra=1)),
    "more of an object": ("attributes", lambda found: vars(found.state_dict_metadata["o"]).update(data="x")),
    "entry of another class": ("in place of", put("w", StorageMeta())),
    "entry as a text": ("in place of", put("w", "a text")),
    "chunks as a tuple": ("one place for each", lambda found: setattr(
        found.state_dict_metadata["w"], "chunks", tuple(found.state_dict_metadata["w"].chunks))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_nobody_writes_is_refused(name: str) -> None:
    message, change = WRONG[name]
    found = metadata()
    change(found)
    with pytest.raises(BadDcp, match=message) as error:
        parsed(found)
    assert error.value.facts["file"] == ".metadata"
    assert error.value.facts["do"]


@pytest.mark.parametrize(
    "state",
    [
        (torch.float32, torch.strided, False, _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST),
        (torch.float32, torch.strided, False, _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST, False, False),
        (torch.float32, torch.strided, False, 0, False),
        (torch.float32, torch.strided, False, StorageMeta, False),
        {"dtype": torch.float32},
        None,
    ],
    ids=["four", "six", "number", "class", "one by name", "none"],
)
def test_properties_that_torch_does_not_have_are_refused(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: state)
    with pytest.raises(BadDcp, match=r"properties|layout"):
        parsed(metadata())


def test_place_that_is_told_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetadataIndex, "__eq__", object.__eq__)
    monkeypatch.setattr(MetadataIndex, "__hash__", object.__hash__)
    found = metadata()
    placed(MetadataIndex("w", [0, 0]))(found)
    with pytest.raises(BadDcp, match="two places"):
        parsed(found)


def test_other_pickle_is_refused() -> None:
    for value in ({}, metadata().state_dict_metadata, StorageMeta(), None):
        with pytest.raises(BadDcp, match="in place of Metadata"):
            parse_metadata(pickle.dumps(value, 4), SIZES)


@pytest.mark.parametrize(
    "whole",
    [
        Made(METADATA, (), {"state_dict_metadata": {}, "storage_data": {}}, called=True),
        Made(METADATA, (1,), {"state_dict_metadata": {}, "storage_data": {}}),
        Made(METADATA, (), ({}, {})),
        Made(METADATA),
        METADATA,
    ],
    ids=["called", "with an argument", "state as a tuple", "without a state", "class"],
)
def test_object_that_is_made_in_another_way_is_refused(whole: object) -> None:
    with pytest.raises(BadDcp):
        parse_metadata(pickled.dumps(whole, 4), SIZES)
    good = Made(METADATA, (), {"state_dict_metadata": {}, "storage_data": {}})
    assert parse_metadata(pickled.dumps(good, 4), SIZES) == DcpContents({}, ())


def test_file_beyond_the_limit_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(metadata(), 4)
    monkeypatch.setattr(formats, "MAX_DCP_METADATA_BYTES", len(data))
    assert parse_metadata(data, SIZES) == WANTED
    monkeypatch.setattr(formats, "MAX_DCP_METADATA_BYTES", len(data) - 1)
    with pytest.raises(BadDcp, match="too large"):
        parse_metadata(data, SIZES)


# ---- tiles


def tiles(shape: tuple[int, ...], boxes: Iterable[Box]) -> bool:
    """Whether each element is in one box, by counting."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for at, sizes in boxes:
        counts[tuple(slice(begin, begin + size) for begin, size in zip(at, sizes, strict=True))] += 1
    return bool((counts == 1).all())


def is_taken(shape: tuple[int, ...], boxes: Iterable[Box]) -> bool:
    try:
        dcp_metadata._require_tiled("x", shape, [Chunk(*box) for box in boxes])
    except BadDcp:
        return False
    return True


def boxes_in(shape: tuple[int, ...]) -> list[Box]:
    """All of them, those without elements too."""
    ranges = [[(a, b - a) for a in range(n + 1) for b in range(a, n + 1)] for n in shape]
    return [
        (tuple(at for at, _ in item), tuple(size for _, size in item)) for item in itertools.product(*ranges)
    ]


@pytest.mark.parametrize(("shape", "most"), [((), 1), ((0,), 1), ((3,), 3), ((2, 2), 2), ((1, 2, 1), 2)])
def test_every_set_of_boxes_is_judged_as_counting_does(shape: tuple[int, ...], most: int) -> None:
    for count in range(most + 1):
        for boxes in itertools.combinations(boxes_in(shape), count):
            assert is_taken(shape, boxes) == tiles(shape, boxes), boxes


def cut_at_random(rng: random.Random, shape: tuple[int, ...], num_cuts: int) -> list[Box]:
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(num_cuts):
        at, sizes = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        first = rng.randint(0, sizes[axis])
        rest = sizes[axis] - first
        boxes.append((at, (*sizes[:axis], first, *sizes[axis + 1 :])))
        boxes.append(
            ((*at[:axis], at[axis] + first, *at[axis + 1 :]), (*sizes[:axis], rest, *sizes[axis + 1 :]))
        )
    return boxes


def test_random_cuts_are_taken_and_refused_once_a_box_is_moved_or_lost() -> None:
    rng = random.Random(0)
    for _ in range(200):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
        boxes = cut_at_random(rng, shape, rng.randint(0, 8))
        assert is_taken(shape, boxes)
        at, sizes = boxes.pop(rng.randrange(len(boxes)))
        assert is_taken(shape, boxes) == tiles(shape, boxes) == (0 in sizes)
        axis = rng.randrange(len(shape))
        if at[axis]:
            boxes.append(((*at[:axis], at[axis] - 1, *at[axis + 1 :]), sizes))
            assert is_taken(shape, boxes) == tiles(shape, boxes)


def test_pinwheel_is_taken() -> None:
    boxes: list[Box] = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    assert tiles((3, 3), boxes)
    assert is_taken((3, 3), boxes)


@pytest.mark.slow
def test_cuts_whose_cells_are_many_more_than_the_chunks_are_refused() -> None:
    """1,000 rows beside 1,000 columns: a million cells."""
    columns: list[Box] = [((0, at), (1000, 1)) for at in range(1000)]
    rows: list[Box] = [((at, 1000), (1, 1)) for at in range(1000)]
    with pytest.raises(BadDcp, match="too irregularly"):
        dcp_metadata._require_tiled("x", (1000, 1001), [Chunk(*box) for box in columns + rows])
    assert is_taken((1000, 1001), [*columns[:1], ((0, 1), (1000, 999)), *rows])


# ---- cost

_MEASURED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import peaks
from dsv4ckpt.dcp_metadata import parse_metadata
data = open(sys.argv[2], "rb").read()
sizes = {f"__{number}_0.distcp": 2**50 for number in range(2)}
before = peaks.kilobytes("VmRSS")
found = parse_metadata(data, sizes)
print(json.dumps([len(found.tensors), (peaks.kilobytes("VmHWM") - before) * 1024 / len(data)]))
"""


@pytest.mark.slow
def test_parsing_takes_13_times_the_bytes(tmp_path: Path) -> None:
    entries: dict[str, Any] = {}
    storage = {}
    for number in range(20_000):
        name = f"model.layers.{number // 1000}.mlp.experts.{number % 1000}.gate_proj.weight"
        boxes: list[Box] = [((at, 0), (64, 4096)) for at in (0, 64)]
        entries[name] = tensor((64 * len(boxes), 4096), boxes, dtype=torch.bfloat16)
        for rank, (at, _) in enumerate(boxes):
            storage[MetadataIndex(name, at, rank)] = _StorageInfo(f"__{rank}_0.distcp", number * 2**20, 2**20)
    file = tmp_path / "metadata"
    planner = {name: ("model", name[6:]) for name in entries}
    whole = metadata(state_dict_metadata=entries, storage_data=storage, planner_data=planner)
    file.write_bytes(pickle.dumps(whole, 4))
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, tests, str(file)], capture_output=True, text=True, check=True
    )
    num_tensors, factor = json.loads(done.stdout)
    assert num_tensors == 20_000
    assert factor < 13
