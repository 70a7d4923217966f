"""The durable output directory: bytes, sizes, modes, the journal, the lock, leftovers, and what it must not touch."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from dsv4ckpt import outdir, sink
from dsv4ckpt.errors import EXIT_BUSY, EXIT_ENVIRONMENT, Busy, Dsv4Error, Environment, ForeignOutput, NoSpace

PLAN = "ab" * 32
MIB = 1024 * 1024
SLAB = 8 * MIB
SIZES = (0, 1, 4095, 4096, 4097, SLAB - 1, SLAB, SLAB + 1, 2 * SLAB, 3 * SLAB + 5)
NAMES = {"a.safetensors", "b.safetensors", "config.json", "inference/config.json"}


@pytest.fixture(params=["direct", "buffered"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write; the first as the file system allows it."""
    if request.param == "buffered":
        monkeypatch.setattr(sink, "_open_direct", lambda path, flags: (os.open(path, flags, 0o666), False))
    return str(request.param)


@functools.cache
def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def opened(path: Path, plan: str = PLAN) -> outdir.Iterator[outdir.OutDir]:  # type: ignore[name-defined]
    return outdir.open_outdir(str(path), plan, NAMES)  # type: ignore[return-value]


def listing(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def parts(path: Path) -> list[str]:
    """Temporary files."""
    return sorted(file.name for file in (path / outdir.WORK_NAME).iterdir() if file.name.endswith(".part"))


def write(out: outdir.OutDir, name: str, data: bytes) -> None:
    with out.new_file(name, len(data)) as sink:
        sink.write(data)


# ---- bytes


@pytest.mark.parametrize("size", SIZES)
def test_file_sink_writes_the_bytes_and_their_sha256(size: int, mode: str, tmp_path: Path) -> None:
    data = noise(size)
    with opened(tmp_path) as out:
        write(out, "a.safetensors", data)
        receipt = out.finished["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == data
    assert receipt == ("a.safetensors", size, hashlib.sha256(data).hexdigest(), {})


@pytest.mark.parametrize("piece", [1000, 4096, MIB + 1, 9 * MIB])
def test_file_sink_pieces_of_any_size_give_the_same_file(piece: int, mode: str, tmp_path: Path) -> None:
    data = noise(2 * SLAB + 77)
    with opened(tmp_path) as out, out.new_file("a.safetensors", len(data)) as sink:
        for start in range(0, len(data), piece):
            sink.write(memoryview(data)[start : start + piece])
    assert (tmp_path / "a.safetensors").read_bytes() == data


@pytest.mark.parametrize("count", [4097, MIB, 3 * MIB + 1])
def test_file_sink_room_filled_in_place_gives_the_same_file(count: int, mode: str, tmp_path: Path) -> None:
    data = noise(2 * SLAB + 77)
    with opened(tmp_path) as out, out.new_file("a.safetensors", len(data)) as sink:
        done = 0
        while done < len(data):
            room = sink.room()
            filled = min(len(room), count, len(data) - done)
            room[:filled] = data[done : done + filled]
            sink.advance(filled)
            done += filled
    assert (tmp_path / "a.safetensors").read_bytes() == data


def test_file_sink_is_direct_where_the_file_system_allows_it(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O: the direct half of these tests ran buffered")
    with opened(tmp_path / "out") as out, out.new_file("a.safetensors", 1) as sink:
        assert sink._direct
        sink.write(b"x")


def test_file_sink_short_writes_are_continued(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, offset: whole(fd, data[: max(4096, len(data) // 8192 * 4096)], offset)
    )
    with opened(tmp_path) as out:
        write(out, "a.safetensors", noise(SLAB + 1))
    assert (tmp_path / "a.safetensors").read_bytes() == noise(SLAB + 1)


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_publish_bytes_writes_the_bytes_and_their_sha256(size: int, tmp_path: Path) -> None:
    with opened(tmp_path) as out:
        receipt = out.publish_bytes("inference/config.json", noise(size))
    assert (tmp_path / "inference" / "config.json").read_bytes() == noise(size)
    assert receipt.sha256 == hashlib.sha256(noise(size)).hexdigest()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_file_mode_follows_the_umask(umask: int, mode: str, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with opened(tmp_path / "out") as out:
            write(out, "a.safetensors", b"x")
            out.publish_bytes("config.json", b"{}")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "config.json"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o666 & ~umask


# ---- nothing unfinished is visible


class Stop(Exception):
    pass


@pytest.mark.parametrize("written", [0, 1, 5000, SLAB + 1])
def test_exception_within_the_block_leaves_nothing(written: int, mode: str, tmp_path: Path) -> None:
    with opened(tmp_path) as out:
        with pytest.raises(Stop), out.new_file("a.safetensors", SLAB * 2) as sink:
            sink.write(noise(written))
            raise Stop
        assert out.finished == {}
        assert parts(tmp_path) == []
        assert (tmp_path / outdir.WORK_NAME / "journal").read_bytes() == b""
    assert listing(tmp_path) == [
        outdir.WORK_NAME,
        *(f"{outdir.WORK_NAME}/{name}" for name in ("journal", "lock", "plan")),
    ]


@pytest.mark.parametrize(
    ("planned", "written"), [(1, 0), (0, 1), (10, 9), (10, 11), (SLAB, SLAB + 1), (4096, 4095)]
)
def test_file_of_another_size_than_planned_is_refused_and_removed(
    planned: int, written: int, mode: str, tmp_path: Path
) -> None:
    with opened(tmp_path) as out:
        with (
            pytest.raises(Environment, match="as planned") as raised,
            out.new_file("a.safetensors", planned) as sink,
        ):
            sink.write(noise(written))
        assert raised.value.exit_code == EXIT_ENVIRONMENT
        assert out.finished == {}
        assert parts(tmp_path) == []
    assert not (tmp_path / "a.safetensors").exists()


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "ftruncate", "rename", "close"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_system_call_that_fails_is_our_error_and_leaves_no_temporary(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Environment if code == errno.EIO else NoSpace
    with opened(tmp_path) as out:
        before = num_open_files()
        whole = getattr(os, call)

        def failing(*arguments: object) -> None:
            monkeypatch.setattr(os, call, whole)
            if call == "close":
                whole(*arguments)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, failing)
        with pytest.raises(kind) as raised:
            write(out, "a.safetensors", noise(10_000))
        assert raised.value.exit_code == EXIT_ENVIRONMENT
        assert parts(tmp_path) == []
        assert out.finished == {}
        assert num_open_files() == before
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_that_cannot_reserve_space_is_written_to_all_the_same(
    code: int, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """glibc imitates fallocate by writing single bytes, which direct I/O refuses with EINVAL (NFS, ZFS)."""

    def unsupported(fd: int, offset: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with opened(tmp_path) as out:
        write(out, "a.safetensors", noise(SLAB + 1))
    assert (tmp_path / "a.safetensors").read_bytes() == noise(SLAB + 1)


def test_names_in_the_work_directory_never_end_like_a_shard(mode: str, tmp_path: Path) -> None:
    with opened(tmp_path) as out, out.new_file("a.safetensors", 1) as sink:
        out.publish_bytes("config.json", b"{}")
        sink.write(b"x")
        assert len(parts(tmp_path)) == 1
        assert not list(tmp_path.rglob("*.safetensors"))


def test_temporary_names_differ_for_the_same_file(tmp_path: Path) -> None:
    with opened(tmp_path) as out, out.new_file("a.safetensors", 0), out.new_file("a.safetensors", 0):
        assert len(parts(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["shard", "small", "part"])
def test_temporary_that_is_there_already_is_not_written_into(
    kind: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outdir.secrets, "token_hex", lambda count: "00" * count)
    with opened(tmp_path) as out:
        theirs = Path(out._temporary(".dsv4/a.safetensors" if kind == "part" else "a.safetensors"))
        theirs.write_text("somebody else's")
        with pytest.raises(Environment, match="File exists"):
            if kind == "shard":
                write(out, "a.safetensors", b"ours")
            elif kind == "small":
                out.publish_bytes("a.safetensors", b"ours")
            else:
                with out.new_part("a.safetensors"):
                    pass
        assert theirs.read_text() == "somebody else's"


@pytest.mark.parametrize("kind", ["shard", "small", "part"])
def test_file_is_durable_before_it_has_its_name_and_the_name_before_it_counts(
    kind: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as out:
        order: list[tuple[str, str]] = []

        def listener(call: str) -> Callable[..., None]:
            whole = getattr(os, call)

            def listen(subject: int | str, *rest: str) -> None:
                path = Path(os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else subject)
                order.append((call, "temporary" if path.suffix == ".part" else path.name))
                whole(subject, *rest)

            return listen

        for call in ("fsync", "rename"):
            monkeypatch.setattr(os, call, listener(call))
        if kind == "shard":
            write(out, "a.safetensors", b"aaaa")
        elif kind == "small":
            out.publish_bytes("a.json", b"{}")
        else:
            with out.new_part("roundtrip.000000") as fd:
                os.write(fd, b"aaaa")
    place = [("fsync", ".dsv4")] if kind == "part" else [("fsync", tmp_path.name), ("fsync", "journal")]
    assert order == [("fsync", "temporary"), ("rename", "temporary"), *place]


@pytest.mark.parametrize("nth", [2, 3])
def test_file_whose_name_or_journal_line_is_not_durable_does_not_stay(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next run would find a stranger in a directory that holds nothing of ours."""
    whole, calls = os.fsync, []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == nth:
            raise OSError(errno.EIO, "lost")
        whole(fd)

    with pytest.raises(Environment), opened(tmp_path / "out") as out:
        monkeypatch.setattr(os, "fsync", failing)
        write(out, "a.safetensors", b"aaaa")
    assert len(calls) == nth
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["a" * 250 + ".json", "inference/" + "a" * 245 + ".json", "inference/" * 20 + "a.json"]
)
def test_publish_bytes_takes_every_name_that_a_file_system_takes(name: str, tmp_path: Path) -> None:
    with opened(tmp_path) as out:
        out.publish_bytes(name, b"{}")
    assert (tmp_path / name).read_bytes() == b"{}"


# ---- the journal


def journal(path: Path) -> Path:
    return path / outdir.WORK_NAME / "journal"


def with_two_files(path: Path) -> bytes:
    """The journal after two finished files."""
    with opened(path) as out:
        write(out, "a.safetensors", b"aaaa")
        write(out, "b.safetensors", b"bbbbb")
    return journal(path).read_bytes()


def finished(path: Path) -> set[str]:
    with opened(path) as out:
        return set(out.finished)


def test_journal_of_a_stopped_run_tells_what_is_finished(tmp_path: Path) -> None:
    with_two_files(tmp_path)
    with opened(tmp_path) as out:
        assert out.finished["a.safetensors"] == ("a.safetensors", 4, hashlib.sha256(b"aaaa").hexdigest(), {})
        assert set(out.finished) == {"a.safetensors", "b.safetensors"}


def test_journal_keeps_the_notes_of_the_writer(tmp_path: Path) -> None:
    with opened(tmp_path) as out, out.new_file("a.safetensors", 0) as sink:
        sink.notes = {"not_exact": 3}
    with opened(tmp_path) as out:
        assert out.finished["a.safetensors"].notes == {"not_exact": 3}


def test_journal_torn_at_any_byte_of_its_last_line_keeps_the_first(tmp_path: Path) -> None:
    whole = with_two_files(tmp_path)
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        journal(tmp_path).write_bytes(whole[:end])
        assert finished(tmp_path) == {"a.safetensors"}
        assert journal(tmp_path).read_bytes() == whole[:first]


def test_journal_with_any_byte_of_its_last_line_changed_keeps_the_first(tmp_path: Path) -> None:
    whole = with_two_files(tmp_path)
    for position in range(whole.index(b"\n") + 1, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        journal(tmp_path).write_bytes(changed)
        assert finished(tmp_path) == {"a.safetensors"}


@pytest.mark.parametrize("tail", [b"\n", b"x", b"\0" * 4096, b"00000000 []", b"00000000 []\n", b"\xff\xfe\n"])
def test_journal_with_garbage_after_it_is_continued_without_it(tail: bytes, tmp_path: Path) -> None:
    whole = with_two_files(tmp_path)
    journal(tmp_path).write_bytes(whole + tail)
    with opened(tmp_path) as out:
        out.publish_bytes("config.json", b"{}")
    assert finished(tmp_path) == {"a.safetensors", "b.safetensors", "config.json"}
    assert journal(tmp_path).read_bytes().startswith(whole)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_journal_line_whose_file_has_another_size_is_ignored(size: int, tmp_path: Path) -> None:
    with_two_files(tmp_path)
    os.truncate(tmp_path / "a.safetensors", size)
    assert finished(tmp_path) == {"b.safetensors"}


def test_journal_line_whose_file_is_gone_is_ignored(tmp_path: Path) -> None:
    with_two_files(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert finished(tmp_path) == {"a.safetensors"}


def test_journal_line_of_a_file_that_the_plan_does_not_make_is_ignored(tmp_path: Path) -> None:
    with_two_files(tmp_path / "out")
    (tmp_path / "outside").write_bytes(b"four")
    line = json.dumps(["../outside", 4, "00", {}])
    with journal(tmp_path / "out").open("ab") as file:
        file.write(f"{zlib.crc32(line.encode()):08x} {line}\n".encode())
    assert finished(tmp_path / "out") == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", "1", '["a.safetensors"]', "[1,2,3,4,5]", "[[],{},[],[]]", "no JSON"]
)
def test_journal_line_with_a_right_checksum_and_no_receipt_is_ignored(text: str, tmp_path: Path) -> None:
    with_two_files(tmp_path)
    with journal(tmp_path).open("ab") as file:
        file.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
    assert finished(tmp_path) == {"a.safetensors", "b.safetensors"}


def test_file_replaced_by_a_link_is_not_finished(tmp_path: Path) -> None:
    with_two_files(tmp_path / "out")
    (tmp_path / "other").write_bytes(b"evil")
    (tmp_path / "out" / "a.safetensors").unlink()
    (tmp_path / "out" / "a.safetensors").symlink_to(tmp_path / "other")
    assert finished(tmp_path / "out") == {"b.safetensors"}


# ---- the end


def test_finish_publishes_the_manifest_and_removes_the_work_directory(tmp_path: Path) -> None:
    with opened(tmp_path) as out:
        write(out, "a.safetensors", b"aaaa")
        out.finish(b"{}")
    assert listing(tmp_path) == ["a.safetensors", "dsv4.manifest.json"]


# ---- whose directory it is


@pytest.mark.parametrize("name", ["a.safetensors", "config.json", "stranger", ".hidden", "directory/x"])
def test_directory_that_is_not_empty_is_refused_and_left_as_it_was(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    before = listing(tmp_path)
    with pytest.raises(ForeignOutput) as raised, opened(tmp_path):
        pass
    assert raised.value.exit_code == 2
    assert listing(tmp_path) == before


def test_directory_of_another_plan_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    with_two_files(tmp_path)
    before = {
        name: (tmp_path / name).read_bytes() for name in listing(tmp_path) if name.endswith(("s", "n", "l"))
    }
    with (
        pytest.raises(ForeignOutput, match="another source or with other options"),
        opened(tmp_path, "cd" * 32),
    ):
        pass
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert finished(tmp_path) == {"a.safetensors", "b.safetensors"}


def test_stranger_in_a_directory_of_this_plan_is_refused(tmp_path: Path) -> None:
    with_two_files(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    with pytest.raises(ForeignOutput, match="not empty"), opened(tmp_path):
        pass


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\udcff"])
def test_stranger_with_an_odd_name_is_told_printably(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ForeignOutput) as raised, opened(tmp_path):
        pass
    assert tiny.is_plain(str(raised.value))


@pytest.mark.parametrize("file", ["plan", "lock"])
def test_work_file_with_escape_codes_is_told_printably(file: str, tmp_path: Path) -> None:
    work = tmp_path / outdir.WORK_NAME
    work.mkdir()
    (work / file).write_bytes(b"\x1b[2J\xff\n")
    with (work / file).open() as held:
        if file == "lock":
            outdir.fcntl.flock(held, outdir.fcntl.LOCK_EX)
        with pytest.raises(Dsv4Error) as raised, opened(tmp_path):
            pass
    assert tiny.is_plain(str(raised.value))


@pytest.mark.parametrize("name", ["precious", "notes.txt", "lock.bak"])
def test_file_of_somebody_else_in_the_work_directory_survives(name: str, tmp_path: Path) -> None:
    """.dsv4 may be anything before we come: never delete what we did not create."""
    mine = tmp_path / outdir.WORK_NAME / name
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    try:
        with opened(tmp_path) as out:
            out.finish(b"{}")
    except ForeignOutput:
        pass
    assert mine.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["precious", "lock", "journal", "plan"])
def test_work_directory_that_is_a_link_is_refused_and_its_target_left_alone(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / outdir.WORK_NAME).symlink_to(tmp_path / "home")
    with pytest.raises(Dsv4Error), opened(tmp_path / "out") as out:
        out.finish(b"{}")
    assert listing(tmp_path / "home") == [name]
    assert (tmp_path / "home" / name).read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["lock", "journal", "plan"])
def test_link_in_the_work_directory_does_not_change_its_target(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    work = tmp_path / "out" / outdir.WORK_NAME
    work.mkdir(parents=True)
    (work / name).symlink_to(victim)
    try:
        with opened(tmp_path / "out") as out:
            write(out, "a.safetensors", b"aaaa")
    except Dsv4Error:
        pass
    assert victim.read_bytes() == b"precious"


def test_linked_directory_in_an_output_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with_two_files(tmp_path / "out")
    (tmp_path / "out" / "inference").symlink_to(tmp_path / "elsewhere")
    try:
        with opened(tmp_path / "out") as out:
            out.publish_bytes("inference/config.json", b"{}")
    except Dsv4Error:
        pass
    assert listing(tmp_path / "elsewhere") == []


def test_output_path_that_is_a_file_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(Environment), opened(tmp_path / "out"):
        pass


# ---- the lock, and other processes

HOLD = """
import sys
from dsv4ckpt import outdir
if sys.argv[2] == "without the lock":
    outdir.fcntl.flock = lambda fd, how: None
with outdir.open_outdir(sys.argv[1], "ab" * 32, {"a.safetensors"}) as out:
    with out.new_file("a.safetensors", 4) as sink:
        sink.write(b"aaaa")
        print("ready", flush=True)
        sys.stdin.read()
"""
TRY = """
import sys
from dsv4ckpt import outdir
from dsv4ckpt.errors import Dsv4Error
try:
    with outdir.open_outdir(sys.argv[1], "ab" * 32, {"a.safetensors"}):
        pass
except Dsv4Error as error:
    print(error)
    sys.exit(error.exit_code)
"""
Held = Callable[[Path, str], "subprocess.Popen[bytes]"]


@pytest.fixture
def held() -> Iterator[Held]:
    """Start a process that is writing a.safetensors into a directory, and wait until it is."""
    children: list[subprocess.Popen[bytes]] = []

    def start(path: Path, how: str = "with the lock") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLD, str(path), how]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_second_process_on_a_directory_is_told_who_holds_it_and_exits_75(held: Held, tmp_path: Path) -> None:
    child = held(tmp_path, "with the lock")
    second = subprocess.run([sys.executable, "-c", TRY, str(tmp_path)], capture_output=True, check=False)
    assert second.returncode == EXIT_BUSY == 75
    assert f"process {child.pid} on ".encode() in second.stdout
    child.communicate(b"")
    assert child.returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == b"aaaa"


def test_second_open_in_the_same_process_is_busy(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(Busy), opened(tmp_path):
        pass


def test_busy_directory_stays_usable_for_its_holder(tmp_path: Path) -> None:
    with opened(tmp_path) as out:
        with pytest.raises(Busy), opened(tmp_path):
            pass
        write(out, "a.safetensors", b"aaaa")
        out.finish(b"{}")
    assert listing(tmp_path) == ["a.safetensors", "dsv4.manifest.json"]


def test_process_that_was_killed_leaves_no_lock_and_its_temporary_is_removed(
    held: Held, tmp_path: Path
) -> None:
    child = held(tmp_path, "with the lock")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(parts(tmp_path)) == 1
    with opened(tmp_path):
        assert parts(tmp_path) == []


def test_temporary_of_a_living_process_is_kept_and_both_end_well_where_locks_lie(
    held: Held, tmp_path: Path
) -> None:
    child = held(tmp_path, "without the lock")
    with opened(tmp_path) as out:
        assert len(parts(tmp_path)) == 1
        write(out, "a.safetensors", b"aaaa")
    child.communicate(b"")
    assert child.returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == b"aaaa"


def leftover(path: Path, **changed: str) -> Path:
    """A temporary file as a killed run leaves it, with another process or host in its name."""
    with opened(path) as out, out.new_file("a.safetensors", 0):
        (name,) = parts(path)
    *head, host, pid, token, part = name.split(".")
    assert (int(pid), part) == (os.getpid(), "part")
    file = (
        path
        / outdir.WORK_NAME
        / ".".join([*head, changed.get("host", host), changed.get("pid", pid), token, part])
    )
    file.write_bytes(b"left over")
    return file


@functools.cache
def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_leftover_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    file = leftover(tmp_path, pid=str(dead_pid()))
    with opened(tmp_path):
        assert not file.exists()


def test_leftover_of_a_dead_process_on_another_host_is_kept(tmp_path: Path) -> None:
    file = leftover(tmp_path, pid=str(dead_pid()), host="00000000")
    with opened(tmp_path):
        assert file.exists()


def test_leftover_with_our_own_number_is_removed(tmp_path: Path) -> None:
    """In a container the command is always process 1: what bears our number was left by the run before."""
    file = leftover(tmp_path)
    with opened(tmp_path):
        assert not file.exists()


@pytest.mark.parametrize("pid", [str(2**31), str(2**63), "9" * 60, "\u0663", "-1", "x", ""])
def test_leftover_with_an_impossible_number_does_not_matter(pid: str, tmp_path: Path) -> None:
    leftover(tmp_path, pid=pid)
    with opened(tmp_path) as out:
        write(out, "a.safetensors", b"aaaa")
    assert (tmp_path / "a.safetensors").read_bytes() == b"aaaa"


# ---- space


def test_free_bytes_of_a_path_that_is_not_there_is_that_of_its_parent(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = outdir.free_bytes(str(tmp_path / "not" / "yet" / "there"))
    assert abs(free - status.f_bavail * status.f_frsize) < 2**30
