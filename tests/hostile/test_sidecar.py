"""dsv4.roundtrip from strangers: refused with exit 3, in bounded time and memory, and never obeyed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from refusals import MOST_BYTES, MOST_SECONDS, attempted

from dsv4ckpt import errors, original, plan, run, sidecar, source, survey
from dsv4ckpt.formats import SIDECAR_NAME, Target


@pytest.fixture(scope="module")
def converted(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 conversion with its sidecar, of one small layer's worth of samples; nobody writes into it."""
    out = tmp_path_factory.mktemp("hostile") / "bf16"
    checkpoint = source.open_checkpoint(str(flash))
    run.execute(plan.make_plan(survey.survey(checkpoint), plan.ConvertOptions()), checkpoint, str(out))
    return out


@pytest.fixture
def directory(converted: Path, tmp_path: Path) -> Path:
    made = tiny.copy_of(converted, tmp_path / "bf16")
    (made / "dsv4.manifest.json").unlink()
    return made


def sections(directory: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    raw = (directory / SIDECAR_NAME).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    document = json.loads(raw[8 : 8 + length])
    metadata = document.pop("__metadata__")
    data = {
        name: raw[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        for name, entry in document.items()
    }
    return metadata, data


def write(directory: Path, metadata: dict[str, str], data: dict[str, bytes]) -> None:
    header = {
        "__metadata__": metadata,
        **json.loads(tiny.header_of({n: tiny.Tensor("U8", (len(d),), d) for n, d in data.items()})),
    }
    tiny.replace(directory / SIDECAR_NAME, tiny.packed(json.dumps(header).encode(), b"".join(data.values())))


def require_refused(directory: Path, out: Path, kind: type[errors.Dsv4Error] = errors.BadSidecar) -> None:
    """The way back ends with this error, at little cost, and leaves nothing."""

    def work() -> None:
        checkpoint = source.open_checkpoint(str(directory))
        found = sidecar.open_sidecar(str(directory))
        assert found is not None
        options = plan.ConvertOptions(target=Target.NATIVE)
        made = plan.make_plan(survey.survey(checkpoint), options, original.of_sidecar(found))
        run.execute(made, checkpoint, str(out))

    with tiny.at_most(20):
        attempts = [attempted(work)]
        if attempts[0].seconds > MOST_SECONDS:
            attempts.append(attempted(work))
    error = attempts[0].error
    assert type(error) is kind, repr(error)[:500]
    assert error.exit_code == 3
    assert tiny.is_plain(str(error))
    assert min(attempt.seconds for attempt in attempts) <= MOST_SECONDS
    assert max(attempt.num_bytes for attempt in attempts) <= MOST_BYTES
    assert not out.exists()


Edit = Callable[[dict[str, str], dict[str, bytes]], object]


def table(data: dict[str, bytes], change: Callable[[list[object]], object], number: int = 1) -> None:
    rows = json.loads(zlib.decompress(data[f"table.{number}"]))
    change(rows)
    data[f"table.{number}"] = zlib.compress(json.dumps(rows).encode())


ONE, THREE = (f"header.model-0000{number}-of-00007.safetensors" for number in (1, 3))
OUTSIDE = "header.../../x.safetensors"
EDITS: dict[str, Edit] = {
    "another format": lambda metadata, data: metadata.update(format="dsv4ckpt roundtrip 9"),
    "no format": lambda metadata, data: metadata.pop("format"),
    "another release": lambda metadata, data: metadata.update(release="pro"),
    "escape codes as release": lambda metadata, data: metadata.update(release="\x1b[31mflash"),
    "another storage": lambda metadata, data: metadata.update(storage="fp8-f32scale"),
    "no config": lambda metadata, data: data.pop("config.json"),
    "config is no zlib": lambda metadata, data: data.update({"config.json": b"{}"}),
    "config is a bomb": lambda metadata, data: data.update({"config.json": zlib.compress(bytes(1 << 28))}),
    "config is no object": lambda metadata, data: data.update({"config.json": zlib.compress(b"[1]")}),
    "header that leads outside": lambda metadata, data: data.update({OUTSIDE: zlib.compress(b"x")}),
    "header of an absolute path": lambda metadata, data: data.update({"header./x.safetensors": zlib.compress(b"x")}),
    "header that is none": lambda metadata, data: data.update({ONE: zlib.compress(b"12345678{")}),
    "header bomb": lambda metadata, data: data.update({ONE: zlib.compress(bytes(1 << 27), 9)}),
    "a header missing": lambda metadata, data: data.pop(THREE),
    "a header twice under other names": lambda metadata, data: data.update({"header.more.safetensors": data[THREE]}),
    "table is no zlib": lambda metadata, data: data.update({"table.1": b"123"}),
    "table is no list": lambda metadata, data: data.update({"table.1": zlib.compress(b"{}")}),
    "table is empty": lambda metadata, data: data.update({"table.1": zlib.compress(b"[]")}),
    "table has nested lists": lambda metadata, data: data.update({"table.1": zlib.compress(b"[" * 100_000)}),
    "table number": lambda metadata, data: data.update({"table.x": data["table.1"]}),
    "row too short": lambda metadata, data: table(data, lambda rows: rows[1].pop()),  # type: ignore[attr-defined]
    "row of a wrong kind": lambda metadata, data: table(data, lambda rows: rows[1].__setitem__(1, "magic")),  # type: ignore[index]
    "row with more pieces": lambda metadata, data: table(data, lambda rows: rows[1].__setitem__(2, 10**9)),  # type: ignore[index]
    "row with a huge blob": lambda metadata, data: table(data, lambda rows: rows[-1].__setitem__(3, [10**15])),  # type: ignore[index]
    "hashes cut off": lambda metadata, data: data.update({"hashes.1": data["hashes.1"][:-32]}),
    "hashes changed": lambda metadata, data: data.update({"hashes.1": b"\0" * len(data["hashes.1"])}),
    "hashes missing": lambda metadata, data: data.pop("hashes.1"),
    "blobs missing": lambda metadata, data: data.pop("blobs.1"),
    "a layer unknown": lambda metadata, data: [data.pop(f"{kind}.1") for kind in ("table", "hashes", "blobs")],
}  # fmt: skip

OTHER_KINDS: dict[str, type[errors.Dsv4Error]] = {
    "config is no object": errors.BadConfig,
    "header that is none": errors.BadHeader,
    "a header twice under other names": errors.NotConform,
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_sidecar_is_refused(edit: str, directory: Path, tmp_path: Path) -> None:
    metadata, data = sections(directory)
    EDITS[edit](metadata, data)
    write(directory, metadata, data)
    require_refused(directory, tmp_path / "out", OTHER_KINDS.get(edit, errors.BadSidecar))


def blob_of(data: dict[str, bytes], name: str) -> tuple[int, int]:
    """(where the first blob of a tensor stands in part 1, its size)."""
    at = 0
    for row in json.loads(zlib.decompress(data["table.1"]))[1:]:
        if row[0] == name:
            return at, row[3][0]
        at += sum(row[3]) + sum(row[4].values())
    raise AssertionError(name)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xff\xff\x7f\x00",
        b"\0\0\0\x80\x7f",
        b"\0\0\0\0\xff",
        b"123",
        bytes(1 << 25),
        b"\x01\0\0\0" * 9 + b"\x7f" * 9,
    ],
    ids=["beyond the end", "negative gap", "NaN scale", "cut off", "bomb", "other scales"],
)
def test_exceptions_that_are_wrong_are_refused(content: bytes, directory: Path, tmp_path: Path) -> None:
    """A tensor that has exceptions gets others: its hash tells, whatever they are."""
    metadata, data = sections(directory)
    rows = json.loads(zlib.decompress(data["table.1"]))
    name = next(row[0] for row in rows[1:] if row[1] == "rule" and row[3][0])
    at, size = blob_of(data, name)
    packed = zlib.compress(content, 9)
    data["blobs.1"] = data["blobs.1"][:at] + packed + data["blobs.1"][at + size :]
    for row in rows[1:]:
        if row[0] == name:
            row[3] = [len(packed)]
    data["table.1"] = zlib.compress(json.dumps(rows).encode())
    write(directory, metadata, data)
    require_refused(directory, tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device"])
def test_sidecar_that_is_no_regular_file_is_refused(kind: str, directory: Path, tmp_path: Path) -> None:
    import os

    path = directory / SIDECAR_NAME
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_bytes(b"x" * 100)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with tiny.at_most(5), pytest.raises(errors.Dsv4Error) as caught:
        sidecar.open_sidecar(str(directory))
    assert caught.value.exit_code in (3, 4)
