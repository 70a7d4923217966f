"""Links, fifos, devices, sockets and directories in place of a checkpoint's files: nothing outside is ever opened.

Rule I3: a link is followed into the checkpoint's own directory or the Hub cache that it belongs to, else refused;
only regular files are read.  An audit hook sees every file that Python opens, and whatever else it does.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from refusals import attempted, refusal
from tiny import CONFIG, FIRST_LAYER, INDEX

from dsv4ckpt import plan, run, source
from dsv4ckpt.errors import BadHeader, Dsv4Error, Environment, MissingFile, UnsafePath

TOKENIZER = "tokenizer.json"
NESTED = "inference/config.json"
FILES = (FIRST_LAYER, CONFIG, INDEX, TOKENIZER, NESTED)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with tiny.at_most(20):
        yield


@pytest.fixture
def elsewhere(checkpoint: Path) -> Path:
    """A directory that does not belong to the checkpoint."""
    path = checkpoint.parent / "elsewhere"
    path.mkdir()
    return path


# ---- what may stand in a file's place: (path of the file, directory outside)


def link_outside(file: Path, outside: Path) -> None:
    """To a perfect copy, so that following it would go unnoticed."""
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)


def relative_link_outside(file: Path, outside: Path) -> None:
    file.rename(outside / file.name)
    file.symlink_to(os.path.relpath(outside / file.name, file.parent))


def link_to_a_sibling_with_our_prefix(file: Path, outside: Path) -> None:
    """.../checkpoint-evil starts like .../checkpoint."""
    evil = outside.parent / "checkpoint-evil"
    evil.mkdir()
    link_outside(file, evil)


def chain_outside(file: Path, outside: Path) -> None:
    file.rename(outside / file.name)
    (file.parent / "inner").symlink_to(outside / file.name)
    file.symlink_to("inner")


def link_through_a_linked_directory(file: Path, outside: Path) -> None:
    file.rename(outside / file.name)
    (file.parent / "inner").symlink_to(outside)
    file.symlink_to("inner/" + file.name)


def link_to(target: str) -> Callable[[Path, Path], None]:
    def put(file: Path, outside: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return put


def link_to_fifo_outside(file: Path, outside: Path) -> None:
    os.mkfifo(outside / "fifo")
    link_to(str(outside / "fifo"))(file, outside)


def dangling_link_outside(file: Path, outside: Path) -> None:
    link_to(str(outside / "nothing"))(file, outside)


def fifo(file: Path, outside: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_to_fifo_inside(file: Path, outside: Path) -> None:
    os.mkfifo(file.parent / "pipe")
    link_to("pipe")(file, outside)


def directory(file: Path, outside: Path) -> None:
    file.unlink()
    file.mkdir()


def bound_socket(file: Path, outside: Path) -> None:
    file.unlink()
    before = os.getcwd()
    os.chdir(file.parent)  # a socket's address holds 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(file.name)
    finally:
        os.chdir(before)


def device(file: Path, outside: Path) -> None:
    file.unlink()
    try:
        os.mknod(file, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # what /dev/zero is
    except PermissionError:
        pytest.skip("only root makes devices")


REFUSED = {
    "link outside": link_outside,
    "relative link outside": relative_link_outside,
    "link to a sibling with our prefix": link_to_a_sibling_with_our_prefix,
    "chain of links outside": chain_outside,
    "link through a linked directory": link_through_a_linked_directory,
    "link to /etc/passwd": link_to("/etc/passwd"),
    "link to /dev/zero": link_to("/dev/zero"),
    "link to /dev/stdin": link_to("/dev/stdin"),
    "link to /proc/self/mem": link_to("/proc/self/mem"),
    "link to /proc/self/environ": link_to("/proc/self/environ"),
    "link to /proc/self/fd/0": link_to("/proc/self/fd/0"),
    "link to /dev/tty": link_to("/dev/tty"),
    "link up and down again, elsewhere": link_to("../../../../../../../../../../etc/hostname"),
    "link to a name that is not UTF-8": link_to("/tmp/\udcff"),
    "link of 4,000 characters": link_to("/" + "x/" * 1999),
    "link to the root": link_to("/"),
    "link to a fifo outside": link_to_fifo_outside,
    "dangling link outside": dangling_link_outside,
    "fifo": fifo,
    "link to a fifo inside": link_to_fifo_inside,
    "directory": directory,
    "link to a directory inside": link_to("."),
    "socket": bound_socket,
    "device": device,
}
UNREADABLE: dict[str, tuple[Callable[[Path, Path], None], type[Dsv4Error]]] = {
    "link to itself": (lambda file, outside: link_to(file.name)(file, outside), UnsafePath),
    "dangling link inside": (link_to("nothing"), Environment),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", [case for case in REFUSED if case != "directory"])
def test_file_replaced_by_something_else_is_refused_and_nothing_outside_is_opened(
    case: str, name: str, checkpoint: Path, elsewhere: Path
) -> None:
    REFUSED[case](checkpoint / name, elsewhere)
    error = refusal(lambda: tiny.plan_of(checkpoint), UnsafePath, checkpoint)
    assert error.facts["file"] == name


@pytest.mark.parametrize("name", [FIRST_LAYER, CONFIG, INDEX])
def test_directory_in_place_of_a_file_is_refused(name: str, checkpoint: Path, elsewhere: Path) -> None:
    directory(checkpoint / name, elsewhere)
    refusal(lambda: tiny.plan_of(checkpoint), UnsafePath, checkpoint)


def test_directory_in_place_of_a_small_file_is_left_behind_by_name(checkpoint: Path, elsewhere: Path) -> None:
    directory(checkpoint / TOKENIZER, elsewhere)
    assert TOKENIZER + "/" in {item.name for item in tiny.plan_of(checkpoint).left}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", UNREADABLE)
def test_link_that_leads_nowhere_is_refused_by_name(
    case: str, name: str, checkpoint: Path, elsewhere: Path
) -> None:
    replace, kind = UNREADABLE[case]
    replace(checkpoint / name, elsewhere)
    attempt = attempted(lambda: tiny.plan_of(checkpoint), checkpoint)
    assert type(attempt.error) is kind
    assert attempt.error.facts["file"] == name
    assert attempt.deeds == []


@pytest.mark.parametrize("case", ["link to /dev/zero", "link to a fifo outside", "socket", "fifo", "device"])
def test_follow_links_still_reads_regular_files_only(case: str, checkpoint: Path, elsewhere: Path) -> None:
    REFUSED[case](checkpoint / FIRST_LAYER, elsewhere)
    allowed = (checkpoint, elsewhere, Path("/dev/zero"))
    error = refusal(lambda: tiny.plan_of(checkpoint, follow_links=True), UnsafePath, *allowed)
    assert "no regular file" in error.what


@pytest.mark.parametrize("target", ["/proc/self/mem", "/proc/self/environ"])
def test_follow_links_into_proc_reads_no_bytes(target: str, checkpoint: Path, elsewhere: Path) -> None:
    link_to(target)(checkpoint / FIRST_LAYER, elsewhere)
    error = refusal(lambda: tiny.plan_of(checkpoint, follow_links=True), BadHeader, checkpoint, Path(target))
    assert "shorter" in error.what


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/proc/self/mem", "/etc/passwd"])
def test_open_checkpoint_of_a_path_that_is_no_safetensors_file_opens_nothing(path: str) -> None:
    refusal(lambda: source.open_checkpoint(path), MissingFile)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("link to /dev/zero", UnsafePath),
        ("link outside", UnsafePath),
        ("fifo", UnsafePath),
        ("directory", MissingFile),  # a checkpoint's directory, then, without a shard in it
        ("socket", UnsafePath),
        ("device", UnsafePath),
    ],
)
def test_open_checkpoint_of_a_single_shard_that_is_no_file_of_its_directory_is_refused(
    case: str, kind: type[Dsv4Error], checkpoint: Path, elsewhere: Path
) -> None:
    REFUSED[case](checkpoint / FIRST_LAYER, elsewhere)
    refusal(lambda: source.open_checkpoint(str(checkpoint / FIRST_LAYER)), kind, checkpoint)


@pytest.mark.parametrize("path", ["", "nothing", "a\0b", "x" * 5000, "\udcff", "hf://org/name"])
def test_open_checkpoint_of_a_path_that_is_not_there_is_a_missing_file(path: str) -> None:
    attempt = attempted(lambda: source.open_checkpoint(path))
    assert type(attempt.error) is MissingFile
    assert attempt.deeds == []


# ---- links that belong to the checkpoint


def expected_plan(flash: Path) -> str:
    return tiny.plan_of(flash).sha256


@pytest.mark.parametrize("case", ["plain", "from the directory", "there and back", "absolute", "chain"])
def test_link_within_the_checkpoint_gives_the_same_plan(case: str, checkpoint: Path, flash: Path) -> None:
    hidden = checkpoint / ".blobs"
    hidden.mkdir()
    for number, name in enumerate((FIRST_LAYER, CONFIG, INDEX, TOKENIZER)):
        blob = hidden / f"{number:064x}"
        (checkpoint / name).rename(blob)
        if case == "chain":
            (hidden / f"link{number}").symlink_to(blob.name)
        target = {
            "plain": f".blobs/{blob.name}",
            "from the directory": f"./.blobs/../.blobs/{blob.name}",
            "there and back": f"../checkpoint/.blobs/{blob.name}",
            "absolute": str(blob),
            "chain": f".blobs/link{number}",
        }[case]
        (checkpoint / name).symlink_to(target)
    assert tiny.plan_of(checkpoint).sha256 == expected_plan(flash)


def test_checkpoint_named_by_a_link_gives_the_same_plan(checkpoint: Path, flash: Path) -> None:
    link = checkpoint.parent / "link"
    link.symlink_to(checkpoint)
    inner = checkpoint / "blob"
    (checkpoint / FIRST_LAYER).rename(inner)
    (checkpoint / FIRST_LAYER).symlink_to("blob")
    assert tiny.plan_of(link).source == tiny.plan_of(flash).source


def hub_cache(checkpoint: Path, repository: str = "models--deepseek-ai--DeepSeek-V4-Flash") -> Path:
    """The checkpoint as huggingface_hub keeps it: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    root = checkpoint.parent / repository
    snapshot = root / "snapshots" / ("0" * 40)
    for number, file in enumerate(sorted(path for path in checkpoint.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = root / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_hub_cache_links_are_followed(checkpoint: Path, flash: Path) -> None:
    snapshot = hub_cache(checkpoint)
    assert (snapshot / FIRST_LAYER).is_symlink()
    assert tiny.plan_of(snapshot).sha256 == expected_plan(flash)


def test_hub_cache_is_read_only_in_its_snapshot_and_blobs(checkpoint: Path) -> None:
    snapshot = hub_cache(checkpoint)
    attempt = attempted(lambda: tiny.plan_of(snapshot), snapshot, snapshot.parent.parent / "blobs")
    assert (attempt.error, attempt.deeds) == (None, [])


def test_hub_cache_single_shard_is_followed(checkpoint: Path) -> None:
    snapshot = hub_cache(checkpoint)
    assert source.open_checkpoint(str(snapshot / FIRST_LAYER)).tensors


@pytest.mark.parametrize(
    "repository", ["elsewhere", "datasets--org--name", "models-org-name", "xmodels--org--name"]
)
def test_links_like_a_hub_cache_in_another_directory_are_refused(repository: str, checkpoint: Path) -> None:
    snapshot = hub_cache(checkpoint, repository)
    refusal(lambda: tiny.plan_of(snapshot), UnsafePath, snapshot)


@pytest.mark.parametrize(
    "place", ["models--other--model/blobs", "models--deepseek-ai--DeepSeek-V4-Flash/refs"]
)
def test_hub_cache_link_to_another_place_of_the_cache_is_refused(place: str, checkpoint: Path) -> None:
    snapshot = hub_cache(checkpoint)
    other = snapshot.parent.parent.parent / place
    other.mkdir(parents=True)
    blob = (snapshot / FIRST_LAYER).resolve().rename(other / "blob")
    (snapshot / FIRST_LAYER).unlink()
    (snapshot / FIRST_LAYER).symlink_to(blob)
    refusal(lambda: tiny.plan_of(snapshot), UnsafePath, snapshot, snapshot.parent.parent / "blobs")


def test_hub_cache_whose_blobs_lead_elsewhere_is_refused(checkpoint: Path) -> None:
    snapshot = hub_cache(checkpoint)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(checkpoint.parent / "elsewhere")
    blobs.symlink_to("../elsewhere")
    refusal(lambda: tiny.plan_of(snapshot), UnsafePath, snapshot)


@pytest.mark.parametrize("name", FILES)
def test_follow_links_reads_what_the_user_linked(
    name: str, checkpoint: Path, elsewhere: Path, flash: Path
) -> None:
    link_outside(checkpoint / name, elsewhere)
    assert tiny.plan_of(checkpoint, follow_links=True).sha256 == expected_plan(flash)


# ---- directories and names


@pytest.mark.parametrize("name", ["inference", "encoding", "assets", "anything"])
def test_linked_directory_is_not_entered(name: str, checkpoint: Path, elsewhere: Path) -> None:
    tiny.replace(elsewhere / "secret.json", "{}")
    inner = checkpoint / name
    if inner.exists():
        (inner / "config.json").unlink()
        inner.rmdir()
    inner.symlink_to(elsewhere)
    with tiny.recorded_opens() as opened:
        made = tiny.plan_of(checkpoint)
    assert tiny.outside(opened, checkpoint) == []
    assert not any("secret" in file for file, _, _ in made.copied)


def test_links_of_a_kind_that_is_not_carried_are_not_opened(checkpoint: Path) -> None:
    for name in ("x.py", "x.bin", ".x.json", "id_rsa"):
        (checkpoint / name).symlink_to("/etc/passwd")
    with tiny.recorded_opens() as opened:
        made = tiny.plan_of(checkpoint)
    assert tiny.outside(opened, checkpoint) == []
    assert {"x.py", "x.bin", ".x.json", "id_rsa"} <= {item.name for item in made.left}


@pytest.mark.slow
def test_directories_1500_deep_are_left_or_refused_without_a_crash(checkpoint: Path) -> None:
    fd = os.open(checkpoint / "inference", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=fd)
        inner = os.open("a", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    try:
        tiny.plan_of(checkpoint)
    except Dsv4Error as error:
        assert tiny.is_plain(str(error))
    finally:
        subprocess.run(
            ["rm", "-r", str(checkpoint / "inference" / "a")], check=True
        )  # pytest's cleaning recurses


NAMES = {
    "escape codes": "\x1b[2J.json",
    "newline": "a\nb.json",
    "not UTF-8": "caf\udce9.json",
    "right-to-left": "\u202egpj.json",
    "in a directory with escape codes": "inference/\x1b[2J/x.json",
    "in a directory that is not UTF-8": "inference/\udce9/x.json",
    "240 characters": "README" + "a" * 234,
    "240 characters in a directory": "inference/" + "a" * 235 + ".json",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_small_file_with_an_odd_name_does_not_keep_a_conversion_from_ending(
    case: str, checkpoint: Path, tmp_path: Path
) -> None:
    file = checkpoint / NAMES[case]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"{}")
    made = tiny.plan_of(checkpoint)
    assert not any(not name.isprintable() for name, _, _ in made.copied)
    run.execute(made, source.open_checkpoint(str(checkpoint)), str(tmp_path / "out"))
    assert (tmp_path / "out" / "dsv4.manifest.json").exists()


@pytest.mark.slow
def test_convert_reads_and_changes_nothing_outside_source_and_output(
    checkpoint: Path, tmp_path: Path
) -> None:
    read, out = source.open_checkpoint(str(checkpoint)), tmp_path / "out"
    made = plan.make_plan(tiny.survey_of(checkpoint), plan.ConvertOptions())
    run.execute(made, read, str(tmp_path / "warm"), num_workers=1)  # what is imported late is imported now
    with tiny.recorded_events() as events:
        run.execute(made, read, str(out), num_workers=1)
    # the output's parent is opened once, to make the output's own name durable
    assert set(tiny.outside(tiny.opened_files(events), checkpoint, out)) <= {str(tmp_path)}
    assert tiny.outside(tiny.changed(events), out) == []
    assert [event for event in events if event.kind in tiny.STARTING] == []


@pytest.mark.slow
def test_convert_changes_nothing_in_its_source(checkpoint: Path, tmp_path: Path) -> None:
    """Not even for a moment, and whatever may be written there."""
    made = plan.make_plan(tiny.survey_of(checkpoint), plan.ConvertOptions())
    with tiny.recorded_events() as events:
        run.execute(made, source.open_checkpoint(str(checkpoint)), str(tmp_path / "out"))
    written = [
        *tiny.changed(events),
        *(item for item in tiny.opened_files(events) if item[1] & tiny.WRITE_FLAGS),
    ]
    assert written
    assert len(tiny.outside(written, checkpoint)) == len(written)


def test_corpus_holds_at_least_30_cases() -> None:
    assert len(REFUSED) * len(FILES) + len(UNREADABLE) * len(FILES) >= 30
