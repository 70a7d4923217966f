"""The source changes while it is read: an error that names file and tensor, and nothing is made of the other bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tools
import trials

from dsv4ckpt import compare, original, plan, run, sidecar, source, survey, verify
from dsv4ckpt.errors import (
    EXIT_BAD_INPUT,
    EXIT_ENVIRONMENT,
    Dsv4Error,
    EditedOutput,
    Environment,
    SourceChanged,
)
from dsv4ckpt.formats import MANIFEST_NAME, SIDECAR_NAME, Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.plan import ConvertOptions

Change = Callable[[Path], object]
TENSOR = "layers.0.ffn.shared_experts.w1.weight"  # its shard is the victim: a layer, read for many tensors
SHUTDOWN, NO_LOG_FLUSH = (
    0x8004587D,
    struct.pack("I", 2),
)  # EXT4_IOC_SHUTDOWN: the disk answers EIO from then on


# ---- what happens to a file


def rewritten(file: Path) -> None:
    """Other bytes in the same file."""
    with file.open("r+b") as same:
        same.seek(-100, os.SEEK_END)
        same.write(bytes(100))


def scrambled(file: Path) -> None:
    """Other bytes in most of the same file."""
    with file.open("r+b") as same:
        same.seek(-250_000, os.SEEK_END)
        same.write(random.Random(0).randbytes(250_000))


def replaced(file: Path) -> None:
    """The same bytes and times, another file."""
    other = file.with_name("other")
    shutil.copy2(file, other)
    other.rename(file)


def became_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def became_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


CHANGES: dict[str, Change] = {
    "truncated": lambda file: os.truncate(file, 3000),  # within its header
    "emptied": lambda file: os.truncate(file, 0),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 1),
    "rewritten": rewritten,
    "replaced": replaced,
    "removed": os.unlink,
    "now a directory": became_directory,
    "now a link": became_link,
}
CUT_OFF = ("truncated", "emptied")


# ---- and when


class Accident:
    """Something that happens once, when its time has come."""

    def __init__(self, file: Path, change: Change) -> None:
        self.has_happened = False
        self._file, self._change = file, change
        self._inode = file.stat().st_ino

    def happen(self) -> None:
        if not self.has_happened:
            self.has_happened = True
            self._change(self._file)

    def on_event(self, is_time: Callable[[object], bool]) -> Callable[[object], None]:
        """A listener for run or verify."""
        return lambda event: self.happen() if is_time(event) else None

    def on_read(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Just before the file is read for the number-th time."""
        plain, num_reads = os.preadv, 0

        def reading(fd: int, buffers: Any, offset: int) -> int:
            nonlocal num_reads
            if os.fstat(fd).st_ino == self._inode:
                num_reads += 1
                if num_reads == number:
                    self.happen()
            return plain(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", reading)


def begins(event: object) -> bool:
    return isinstance(event, run.Started | verify.Started)


def after(num_files: int) -> Callable[[object], bool]:
    """When so many files are done."""
    done = 0

    def is_time(event: object) -> bool:
        nonlocal done
        done += isinstance(event, run.FileDone)
        return done == num_files

    return is_time


def failing_reads(file: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the number-th on, reading the file is an I/O error."""
    plain, inode, num_reads = os.preadv, file.stat().st_ino, 0

    def reading(fd: int, buffers: Any, offset: int) -> int:
        nonlocal num_reads
        num_reads += os.fstat(fd).st_ino == inode
        if os.fstat(fd).st_ino == inode and num_reads >= number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", reading)


# ---- what it happens to

KINDS = {  # is the source a release; what is made of it
    "bf16": (True, Target.BF16, Namespace.DEEPSEEK),
    "bf16 under other names": (True, Target.BF16, Namespace.TRANSFORMERS),
    "nvfp4": (True, Target.NVFP4, Namespace.DEEPSEEK),
    "way back": (False, Target.NATIVE, Namespace.DEEPSEEK),
}


class Job(NamedTuple):
    """A conversion of a source that is the test's own."""

    src: Path
    victim: Path
    plan: plan.Plan
    checkpoint: source.Checkpoint
    expected: dict[str, str]

    def into(self, out: Path, **options: Any) -> None:
        run.execute(self.plan, self.checkpoint, str(out), **options)


def conversion(src: Path, target: Target, namespace: Namespace) -> tuple[plan.Plan, source.Checkpoint]:
    checkpoint = source.open_checkpoint(str(src))
    memory = sidecar.open_sidecar(str(src))
    options = ConvertOptions(target=target, namespace=namespace)
    known = original.of_sidecar(memory) if memory else None
    return plan.make_plan(survey.survey(checkpoint), options, known), checkpoint


@pytest.fixture(scope="module")
def bf16(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion of the smallest sample, with its sidecar."""
    out = tmp_path_factory.mktemp("changes") / "bf16"
    trials.Conversion(str(smallest), shard_bytes=400_000).into(out)  # some reads of each
    return out


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability is not on trial here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


References = Callable[[Path, Target, Namespace], dict[str, str]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """What undisturbed conversions give."""

    @functools.cache
    def reference(src: Path, target: Target, namespace: Namespace) -> dict[str, str]:
        out = tmp_path_factory.mktemp("reference") / "out"
        run.execute(*conversion(src, target, namespace), str(out))
        return trials.tree(out)

    return reference


Jobs = Callable[[str], Job]


@pytest.fixture
def job(smallest: Path, bf16: Path, references: References, tmp_path: Path) -> Jobs:
    """A planned conversion, by its name in KINDS, of a copy of its source."""

    def planned(kind: str) -> Job:
        of_release, *options = KINDS[kind]
        src = smallest if of_release else bf16
        expected = references(src, *options)
        own = Path(shutil.copytree(src, tmp_path / "src"))
        return Job(own, tiny.shard_of(own, TENSOR), *conversion(own, *options), expected)

    return planned


@pytest.fixture
def convert(job: Jobs) -> Job:
    return job("bf16")


def blamed(error: Dsv4Error, file: Path) -> str:
    """The message of an error that names this file; or of one for values that no longer are what a manifest says."""
    assert error.exit_code in (EXIT_BAD_INPUT, EXIT_ENVIRONMENT)
    assert isinstance(error, EditedOutput) or error.facts["file"] == file.name
    return error.what


def stopped(job: Job, out: Path, accident: Accident | None, **options: Any) -> str:
    """The message of a run that did not end well; what it left is right, and no manifest.

    With more than one worker, another one may notice at the end of what it reads, where it names no tensor.
    """
    with pytest.raises(Dsv4Error) as raised:
        job.into(out, **options)
    assert accident is None or accident.has_happened
    assert trials.torn(out, job.expected) == []
    assert not (out / MANIFEST_NAME).exists()
    return blamed(raised.value, job.victim)


# ---- convert


@pytest.mark.parametrize("change", CHANGES)
def test_convert_of_a_source_changed_after_the_plan_names_file_and_tensor(
    change: str, convert: Job, tmp_path: Path
) -> None:
    accident = Accident(convert.victim, CHANGES[change])
    accident.happen()
    what = stopped(convert, tmp_path / "out", accident, num_workers=1)
    assert what.startswith("tensor 'layers.0.")


@pytest.mark.parametrize("number", [1, 5, 30])
@pytest.mark.parametrize("change", CUT_OFF)
def test_convert_of_a_source_cut_off_while_it_is_read_names_file_and_tensor(
    change: str, number: int, convert: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accident = Accident(convert.victim, CHANGES[change])
    accident.on_read(number, monkeypatch)
    what = stopped(convert, tmp_path / "out", accident, num_workers=1)
    assert what.startswith("tensor 'layers.0.")


@pytest.mark.parametrize("change", CUT_OFF)
def test_convert_of_a_source_cut_off_while_it_is_read_past_the_page_cache_names_file_and_tensor(
    change: str, convert: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_DIRECT_BYTES", 1)
    accident = Accident(convert.victim, CHANGES[change])
    accident.on_read(5, monkeypatch)
    what = stopped(convert, tmp_path / "out", accident, num_workers=1)
    assert what.startswith("tensor 'layers.0.")


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("direct_bytes", [1, 1 << 40])
def test_convert_whose_source_gives_an_io_error_names_file_and_tensor(
    number: int, direct_bytes: int, convert: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_DIRECT_BYTES", direct_bytes)
    failing_reads(convert.victim, number, monkeypatch)
    what = stopped(convert, tmp_path / "out", None, num_workers=1)
    assert what.startswith("tensor 'layers.0.")
    assert what.endswith("cannot read: Input/output error")


def test_convert_whose_source_loses_its_disk_names_a_file_and_says_so(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything there is an I/O error from then on: open files as well as looking for names."""
    tools.require_mounts(tmp_path)
    tools.require("mkfs.ext4")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    image = tmp_path / "image"
    image.write_bytes(b"")
    os.truncate(image, 16 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(
                tools.mounted(tmp_path / "disk", "-t", "ext4", "-o", "loop", str(image))
            )
        except OSError as error:
            pytest.skip(f"loop devices are not allowed here: {error}")
        own = Path(shutil.copytree(smallest, disk / "src"))
        made, checkpoint = conversion(own, Target.BF16, Namespace.DEEPSEEK)
        accident = Accident(own, lost)
        with pytest.raises(Environment, match="Input/output error") as raised:
            run.execute(made, checkpoint, str(tmp_path / "out"), on_event=accident.on_event(begins))
        assert raised.value.facts["file"] in {shard.name for shard in checkpoint.shards.values()}


def lost(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH)
    os.close(fd)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["begun", "read", "one file written", "all written"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["bf16", "bf16 under other names", "way back"])
def test_conversion_of_a_source_changed_at_any_moment_publishes_nothing_of_it(
    kind: str,
    change: str,
    moment: str,
    job: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = job(kind)
    accident = Accident(planned.victim, CHANGES[change])
    times = {"begun": begins, "one file written": after(1), "all written": after(len(planned.plan.files))}
    if moment == "read":
        accident.on_read(7, monkeypatch)
    on_event = accident.on_event(times.get(moment, lambda event: False))
    stopped(planned, tmp_path / "out", accident, on_event=on_event)


@pytest.mark.parametrize("change", CUT_OFF)
def test_convert_of_a_source_cut_off_while_its_scales_are_proven_leaves_no_directory(
    change: str, job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvfp4 = job("nvfp4")
    accident = Accident(nvfp4.victim, CHANGES[change])
    accident.on_read(1, monkeypatch)
    what = stopped(nvfp4, tmp_path / "out", accident, num_workers=1)
    assert what.startswith("tensor 'layers.0.")
    assert not (tmp_path / "out").exists()


# ---- verify


@pytest.mark.parametrize("moment", ["opened", "first read", "fifth read"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [0, 1])
def test_verify_values_of_a_checkpoint_that_changes_names_the_file(
    side: int,
    change: str,
    moment: str,
    smallest: Path,
    bf16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [Path(shutil.copytree(src, tmp_path / src.name)) for src in (smallest, bf16)]
    surveys = [tiny.survey_of(src) for src in own]
    victim = tiny.shard_of(own[side], TENSOR)
    accident = Accident(victim, CHANGES[change])
    if moment == "opened":
        accident.happen()
    else:
        accident.on_read({"first read": 1, "fifth read": 5}[moment], monkeypatch)
    with pytest.raises(Dsv4Error) as raised:
        compare.verify_values(*surveys, num_workers=1)
    what = blamed(raised.value, victim)
    if moment == "opened" or change in CUT_OFF:
        assert what.startswith("tensor 'layers.0.")


@pytest.fixture
def output(bf16: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A conversion of the test's own, and the shard of it that something happens to."""
    own = Path(shutil.copytree(bf16, tmp_path / "own"))
    return own, tiny.shard_of(own, TENSOR)


@pytest.mark.parametrize("change", CUT_OFF)
def test_verify_bytes_of_a_file_cut_off_while_it_is_hashed_names_it(
    change: str, output: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, victim = output
    Accident(victim, CHANGES[change]).on_read(1, monkeypatch)
    with pytest.raises(SourceChanged) as raised:
        verify.verify_bytes(str(own))
    blamed(raised.value, victim)


def test_verify_bytes_of_a_file_that_gives_an_io_error_names_it(
    output: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, victim = output
    failing_reads(victim, 1, monkeypatch)
    with pytest.raises(Environment, match="Input/output error") as raised:
        verify.verify_bytes(str(own))
    blamed(raised.value, victim)


def test_verify_bytes_of_a_file_rewritten_before_it_is_hashed_tells_that_it_differs(
    output: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, victim = output
    Accident(victim, rewritten).on_read(1, monkeypatch)
    report = verify.verify_bytes(str(own))
    assert [file.name for file in report.files if file.verdict != "ok"] == [victim.name]


# ---- the command


@pytest.mark.slow
def test_command_whose_source_is_cut_off_meanwhile_names_the_file_and_exits_3(
    smallest: Path, tmp_path: Path
) -> None:
    """It is held still as soon as its output directory is there, and goes on with half a shard."""
    own = Path(shutil.copytree(smallest, tmp_path / "src"))
    victim, out = tiny.shard_of(own, TENSOR), tmp_path / "out"
    command = [sys.executable, "-m", "dsv4cli", "convert", str(own), str(out), "--to", "bf16"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not out.exists():
            time.sleep(0.0005)
        process.send_signal(signal.SIGSTOP)
        os.truncate(victim, victim.stat().st_size // 2)
        process.send_signal(signal.SIGCONT)
        _, shown = process.communicate(timeout=120)
    assert process.returncode == EXIT_BAD_INPUT, shown
    assert victim.name in shown
    assert "Traceback" not in shown
    assert not (out / MANIFEST_NAME).exists()


def test_convert_of_a_small_file_that_changes_publishes_nothing_of_it(convert: Job, tmp_path: Path) -> None:
    """Or a later run would find it done, and vouch for it."""
    small, out = convert.src / "tokenizer.json", tmp_path / "out"
    accident = Accident(small, rewritten)
    with pytest.raises(SourceChanged) as raised:
        convert.into(out, on_event=accident.on_event(begins))
    blamed(raised.value, small)
    assert trials.torn(out, convert.expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 5, 8, 11])
def test_way_back_whose_release_is_rewritten_meanwhile_publishes_nothing_of_it(
    number: int, job: Jobs, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release that --source names decides bytes as much as the source does."""
    back, release = job("way back"), Path(shutil.copytree(smallest, tmp_path / "release"))
    (back.src / SIDECAR_NAME).unlink()
    (back.src / MANIFEST_NAME).unlink()
    known = original.of_source(tiny.survey_of(release))
    made = plan.make_plan(tiny.survey_of(back.src), ConvertOptions(target=Target.NATIVE), known)
    victim = tiny.shard_of(release, TENSOR)
    accident = Accident(victim, scrambled)
    accident.on_read(number, monkeypatch)
    stopped(back._replace(victim=victim, plan=made), tmp_path / "out", accident)
