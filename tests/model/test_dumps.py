"""Dumps on disk: read back by the safetensors library and by us; damage of every kind; the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4ckpt.errors import (
    BadHeader,
    BadManifest,
    Dsv4Error,
    ForeignOutput,
    Interrupted,
    MissingFile,
    UnsafePath,
    Usage,
)
from dsv4ckpt.stop import StopFlag
from dsv4model import dumps

IDS = [[3, 1, 2], [0, 500, 7]]
WHAT = dumps.about("mine", "float32", IDS, {"release": "flash"})


def some_tensors() -> dict[str, Tensor]:
    """In an order that no sorting gives, with every dtype that a dump may hold."""
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    tensors: dict[str, Tensor] = {
        "z.first": values,
        "a.empty": torch.zeros(2, 0, 4),
        "m.scalar": torch.tensor(1.5),
    }
    for dtype in dumps.DTYPES:
        tensors[f"{str(dtype)[-3:]}.{len(tensors)}"] = values.to(dtype)
    return {**tensors, "b.last": torch.arange(6).view(2, 3)}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    dumps.write_dump(str(tmp_path / "dump"), some_tensors(), WHAT)
    return tmp_path / "dump"


# ---- writing


def test_dump_is_read_back_as_it_was(dump: Path) -> None:
    tensors = some_tensors()
    with dumps.open_dump(str(dump)) as found:
        assert found.about == WHAT
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found.looks[name] == (tensor.dtype, tuple(tensor.shape))
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
            assert found.size_of(name) == tensor.numel() * tensor.element_size()


def test_dump_is_a_safetensors_file_in_the_order_of_execution(dump: Path) -> None:
    tensors = some_tensors()
    loaded = load_file(dump / "tensors.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    stored = tiny.read_shard(dump / "tensors.safetensors")
    assert [name for name in stored if name != "a.empty"] == [name for name in tensors if name != "a.empty"]


def test_dump_json_says_what_it_is(dump: Path) -> None:
    document = json.loads((dump / "dump.json").read_bytes())
    assert sorted(file.name for file in dump.iterdir()) == ["dump.json", "tensors.safetensors"]
    assert list(document) == ["format", "impl", "dtype", "ids", "checkpoint", "tensors"]
    assert document["ids"] == {"shape": [2, 3], "sha256": hashlib.sha256(b"[[3,1,2],[0,500,7]]").hexdigest()}
    assert document["tensors"][0] == {
        "name": "z.first",
        "dtype": "F32",
        "shape": [2, 3, 5],
        "sha256": hashlib.sha256(some_tensors()["z.first"].numpy().tobytes()).hexdigest(),
    }


def test_equal_passes_make_equal_bytes_anywhere(dump: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "deeper"
    dumps.write_dump(str(other), some_tensors(), WHAT)
    assert tiny.tree_of(other) == tiny.tree_of(dump)
    assert str(tmp_path) not in (dump / "dump.json").read_text()


def test_large_tensors_are_written_in_pieces(
    monkeypatch: pytest.MonkeyPatch, dump: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(dumps, "_PIECE", 16)
    dumps.write_dump(str(tmp_path / "pieces"), some_tensors(), WHAT)
    assert tiny.tree_of(tmp_path / "pieces") == tiny.tree_of(dump)


def test_dump_goes_into_an_empty_directory_and_into_no_other(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    dumps.write_dump(str(tmp_path / "empty"), some_tensors(), WHAT)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    for taken in (dump, tmp_path / "file", tmp_path / "taken"):
        before = tiny.tree_of(taken)
        with pytest.raises(ForeignOutput):
            dumps.require_free(str(taken))
        with pytest.raises(ForeignOutput) as told:
            dumps.write_dump(str(taken), some_tensors(), WHAT)
        assert "do" in told.value.facts
        assert tiny.tree_of(taken) == before


def test_interrupted_dump_leaves_nothing_and_can_be_made_again(tmp_path: Path, dump: Path) -> None:
    stop = StopFlag()
    stop.signal_number = 2
    with pytest.raises(Interrupted):
        dumps.write_dump(str(tmp_path / "out"), some_tensors(), WHAT, stop)
    assert not (tmp_path / "out").exists()
    dumps.write_dump(str(tmp_path / "out"), some_tensors(), WHAT)
    assert tiny.tree_of(tmp_path / "out") == tiny.tree_of(dump)


def test_dump_that_died_before_its_last_file_is_finished_by_the_same_pass(
    tmp_path: Path, dump: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any, **named: Any) -> None:
        raise OSError(5, "the disk is gone")

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(dumps, "_document", die)
        dumps.write_dump(str(out), some_tensors(), WHAT)
    assert (out / "tensors.safetensors").exists()
    with pytest.raises(MissingFile, match="no finished dump"), dumps.open_dump(str(out)):
        pass
    dumps.write_dump(str(out), some_tensors(), WHAT)
    assert tiny.tree_of(out) == tiny.tree_of(dump)


def test_dtype_that_a_dump_does_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="'x'"):
        dumps.write_dump(str(tmp_path / "out"), {"x": torch.zeros(2, dtype=torch.complex64)}, WHAT)
    assert not (tmp_path / "out").exists()


# ---- damage


def test_flipped_bit_is_found_when_the_tensor_is_read(dump: Path) -> None:
    file = dump / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with dumps.open_dump(str(dump)) as found:
        assert torch.equal(found["z.first"], some_tensors()["z.first"])
        with pytest.raises(BadManifest, match=r"'b\.last' is damaged"):
            found["b.last"]


def opened(dump: Path) -> Dsv4Error:
    with pytest.raises(Dsv4Error) as told, dumps.open_dump(str(dump)):
        pass
    assert "do" in told.value.facts
    return told.value


def test_truncated_tensors_are_refused(dump: Path) -> None:
    file = dump / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert isinstance(opened(dump), BadHeader)


@pytest.mark.parametrize("name", ["dump.json", "tensors.safetensors"])
def test_missing_file_is_told(dump: Path, name: str) -> None:
    (dump / name).unlink()
    error = opened(dump)
    assert isinstance(error, MissingFile)
    assert error.facts["file"] == name


def test_missing_directory_is_told(tmp_path: Path) -> None:
    assert "no such directory" in str(opened(tmp_path / "nowhere"))


def test_link_out_of_the_dump_is_refused(dump: Path, tmp_path: Path) -> None:
    (dump / "dump.json").rename(tmp_path / "dump.json")
    (dump / "dump.json").symlink_to(tmp_path / "dump.json")
    assert isinstance(opened(dump), UnsafePath)


def _set(*path: Any, value: Any) -> Any:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (_set("format", value=2), "version does not know"),
        (_set("format", value=True), "`format`"),
        (_set("impl", value=None), "`impl`"),
        (_set("ids", value=[]), "`ids`"),
        (_set("ids", "shape", value=[1]), "`ids`"),
        (_set("ids", "sha256", value="0" * 63), "`sha256`"),
        (_set("checkpoint", value={"release": 4}), "`checkpoint`"),
        (_set("tensors", value={}), "`tensors`"),
        (_set("tensors", 0, "name", value="other"), "'other' is not in it"),
        (_set("tensors", 1, "name", value="z.first"), "listed twice"),
        (_set("tensors", 0, "shape", value=[2, 5, 3]), "'z.first'"),
        (_set("tensors", 0, "dtype", value="BF16"), "'z.first'"),
        (_set("tensors", 0, "sha256", value="A" * 64), "`sha256`"),
        (_set("tensors", 0, value=7), "`name`"),
        (lambda document: document["tensors"].pop(), "does not list 'b.last'"),
    ],
)
def test_wrong_dump_json_is_refused(dump: Path, edit: Any, word: str) -> None:
    tiny.edit_json(dump / "dump.json", edit)
    error = opened(dump)
    assert isinstance(error, BadManifest)
    assert word in str(error)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 1, "format": 1}', '{"format": -1}', "\x00", "[" * 9000]
)
def test_malformed_dump_json_is_refused(dump: Path, text: str) -> None:
    tiny.replace(dump / "dump.json", text)
    assert isinstance(opened(dump), BadManifest)


def test_dtype_of_a_stranger_is_refused(dump: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, dump / "tensors.safetensors")
    line = {"name": "x", "dtype": "F8_E4M3", "shape": [2], "sha256": "0" * 64}
    tiny.edit_json(dump / "dump.json", _set("tensors", value=[line]))
    assert "do not hold" in str(opened(dump))


# ---- small things


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_dtype_by_name(name: str) -> None:
    assert dumps.as_dtype(name) is getattr(torch, name)


def test_ids_become_a_tensor() -> None:
    assert dumps.as_ids(IDS).tolist() == IDS
    assert dumps.as_ids(IDS).dtype == torch.int64
