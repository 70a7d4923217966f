"""Equal sources and options give equal bytes, whatever the machine, the day, the place, the locale and the workers.

The outputs of `sample` and of three conversions, manifests included, are made in many environments and hashed.  This
file is also a program (`serve`): it imports torch once and forks for every environment that a process can give itself;
what is settled when an interpreter starts gets an interpreter of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES = ("--layers=1", "--hidden=128", "--intermediate=32", "--experts=6", "--heads=2", "--vocab=512")
SHARDS = "--max-shard-size=100KB"  # many, so that workers overtake each other
YEARS = {"1980": 315_532_800, "2038": 2_147_483_648, "2100": 4_102_444_800}
OUTPUTS = ("sample", "bf16", "named", "native")


class Given:
    """What the command is told, for an environment to change."""

    def __init__(self, src: Path, out: Path) -> None:
        self.src, self.out = str(src), str(out)
        self.made = out  # where the outputs are found
        self.more = ["-q"]
        self.workers = 2

    def make(self) -> None:
        """The four outputs, by the command."""
        src, out, sized = self.src, self.out, [SHARDS, f"--workers={self.workers}", *self.more]
        _dsv4("sample", f"{out}/sample", *SIZES, *self.more)
        _dsv4("convert", src, f"{out}/bf16", "--to=bf16", *sized)
        _dsv4("convert", src, f"{out}/named", "--to=bf16", "--names=transformers", *sized)
        _dsv4("convert", f"{out}/bf16", f"{out}/native/", "--to=native", *sized)


def _dsv4(*arguments: str) -> None:
    from dsv4cli.main import main

    try:
        main(list(arguments))
    except SystemExit as done:
        if done.code:
            raise RuntimeError(f"exit {done.code}: {arguments}") from None


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the names and bytes of all files of each output; modes and times are no part of it."""
    return {name: digest(out / name) for name in OUTPUTS}


def digest(directory: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        total.update(
            f"{file.relative_to(directory)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return total.hexdigest()


# ---- environments that a process can give itself


def number_of_workers(count: int) -> Callable[[Given], None]:
    return lambda given: setattr(given, "workers", count)


def torch_threads(count: int) -> Callable[[Given], None]:
    def choose(given: Given) -> None:
        import torch

        torch.set_num_threads(count)

    return choose


def cores(count: int) -> Callable[[Given], None]:
    def pretend(given: Given) -> None:
        os.cpu_count = lambda: count
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])

    return pretend


def umask(mask: int) -> Callable[[Given], None]:
    return lambda given: setattr(given, "umask", os.umask(mask))


def zone(name: str) -> Callable[[Given], None]:
    def move(given: Given) -> None:
        os.environ["TZ"] = name
        time.tzset()

    return move


def clock(year: str) -> Callable[[Given], None]:
    """Of another year, and running three times as fast, for all that asks Python."""

    def turn(given: Given) -> None:
        clocks = time.time, time.monotonic
        begin = clocks[0]()
        time.time = lambda: YEARS[year] + 3 * (clocks[0]() - begin)
        time.time_ns = lambda: int(time.time() * 1e9)
        time.monotonic = lambda: 1e6 + 3 * clocks[1]()

    return turn


def source_of(year: str) -> Callable[[Given], None]:
    def touch(given: Given) -> None:
        for second, file in enumerate(sorted(Path(given.src).rglob("*"), reverse=year == "2038")):
            os.utime(file, (YEARS[year] + second,) * 2)

    return touch


def other_host(given: Given) -> None:
    socket.gethostname = lambda: "another.example"


def homeless(given: Given) -> None:
    for name in ("HOME", "USER", "LOGNAME", "TMPDIR"):
        os.environ.pop(name, None)


def listed_backwards(given: Given) -> None:
    listdir = os.listdir
    os.listdir = lambda *path: sorted(listdir(*path), reverse=True)


def copied_backwards(given: Given) -> None:
    """Other inodes in another order, and so another order in the directory itself."""
    copy = Path(f"{given.src}-copy")
    for file in sorted(Path(given.src).rglob("*"), reverse=True):
        if file.is_file():
            target = copy / file.relative_to(given.src)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    given.src = str(copy)


def relative_paths(given: Given) -> None:
    os.chdir(Path(given.src).parent)
    given.src, given.out = os.path.relpath(given.src), os.path.relpath(given.out)


def roundabout_paths(given: Given) -> None:
    os.chdir("/")
    given.src, given.out = f"{given.src}/../{Path(given.src).name}//", f"{given.out}/."


def within_the_source(given: Given) -> None:
    os.chdir(given.src)
    given.src, given.out = ".", os.path.relpath(given.out)


def on_tmpfs(given: Given) -> None:
    given.made = Path(tempfile.mkdtemp(dir="/dev/shm"))
    given.out = str(given.made)


def without_direct_io(given: Given) -> None:
    from dsv4ckpt import sink

    sink._open_direct = lambda path, flags: (os.open(path, flags, 0o666), False)
    del os.posix_fadvise
    os.posix_fallocate = lambda fd, offset, size: None


def told_to_a_file(given: Given) -> None:
    given.more = ["-v"]
    fd = os.open(f"{given.out}.words", os.O_WRONLY | os.O_CREAT)
    os.dup2(fd, 1), os.dup2(fd, 2)


def told_to_a_terminal(given: Given) -> None:
    given.more = []
    ours, theirs = os.openpty()
    os.dup2(theirs, 1), os.dup2(theirs, 2)
    threading.Thread(target=lambda: [os.read(ours, 4096) for _ in iter(int, 1)], daemon=True).start()


def slow_reads(given: Given) -> None:
    """Of any length, while threads change as often as they can: workers end in another order."""
    whole, generator = os.preadv, random.Random(3)
    sys.setswitchinterval(1e-6)

    def late(*arguments: Any) -> int:
        time.sleep(generator.uniform(0, 0.002))
        return whole(*arguments)

    os.preadv, given.workers = late, 5


def short_writes(given: Given) -> None:
    pwrite, write = os.pwrite, os.write
    os.pwrite = lambda fd, data, at: pwrite(fd, data[: max(4096, len(data) // 3 // 4096 * 4096)], at)
    os.write = lambda fd, data: write(fd, data[: max(1, len(data) // 2)])


def few_open_files(given: Given) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


ENVIRONMENTS: dict[str, Callable[[Given], None]] = {
    "as it is": lambda given: None,
    "1 worker": number_of_workers(1),
    "3 workers": number_of_workers(3),
    "7 workers": number_of_workers(7),
    "1 torch thread": torch_threads(1),
    "2 torch threads": torch_threads(2),
    "8 torch threads": torch_threads(8),
    "1 core": cores(1),
    "64 cores": cores(64),
    "umask 022": umask(0o022),
    "umask 077": umask(0o077),
    "Kathmandu": zone("Asia/Kathmandu"),
    "Samoa": zone("SST11"),
    "clock of 1980": clock("1980"),
    "clock of 2100": clock("2100"),
    "source of 1980": source_of("1980"),
    "source of 2038": source_of("2038"),
    "other host": other_host,
    "homeless": homeless,
    "listed backwards": listed_backwards,
    "copied backwards": copied_backwards,
    "relative paths": relative_paths,
    "roundabout paths": roundabout_paths,
    "within the source": within_the_source,
    "on tmpfs": on_tmpfs,
    "without direct I/O": without_direct_io,
    "told to a file": told_to_a_file,
    "told to a terminal": told_to_a_terminal,
    "slow reads": slow_reads,
    "short writes": short_writes,
    "few open files": few_open_files,
}


def serve(src: Path, work: Path, names: list[str]) -> None:
    """Print the digests of these environments, each made in a child of its own; {} for what failed."""
    import dsv4ckpt.run
    import dsv4ckpt.sample  # noqa: F401 - once for all children

    found: dict[str, dict[str, str]] = {}
    for number, name in enumerate(names):
        result = work / f"{number}.json"
        child = os.fork()
        if not child:
            try:
                result.write_text(json.dumps(made_in(name, src, work / str(number))))
            except BaseException:  # noqa: BLE001 - shown, and told by what is missing
                traceback.print_exc()
            os._exit(0)
        os.waitpid(child, 0)
        found[name] = json.loads(result.read_text() or "{}") if result.exists() else {}
    print(json.dumps(found))


def made_in(name: str, src: Path, where: Path) -> dict[str, str]:
    given = Given(shutil.copytree(src, where / "a source"), where / "out")
    given.made.mkdir()
    ENVIRONMENTS[name](given)
    try:
        given.make()
        return digests(given.made)
    finally:
        shutil.rmtree(given.made)


# ---- what pytest sees

Served = dict[str, dict[str, str]]


def served(
    src: Path, work: Path, *names: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> Served:
    """Run this file as a program."""
    work.mkdir(exist_ok=True)
    command = [*prefix, sys.executable, __file__, str(src), str(work), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    sys.stderr.write(done.stderr)
    found: Served = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(smallest, tmp_path_factory.mktemp("environments"), *ENVIRONMENTS)


@pytest.fixture(scope="module")
def expected(found: Served) -> dict[str, str]:
    return found["as it is"]


@pytest.mark.slow
def test_reference_is_four_outputs_and_the_sample_is_the_known_one(
    expected: dict[str, str], smallest: Path
) -> None:
    assert len(set(expected.values())) == len(OUTPUTS)
    assert expected["sample"] == digest(smallest)


@pytest.mark.slow
@pytest.mark.parametrize("environment", list(ENVIRONMENTS)[1:])
def test_outputs_are_the_same_bytes_in_any_environment(
    environment: str, found: Served, expected: dict[str, str]
) -> None:
    assert found[environment] == expected


INTERPRETERS = {
    "hash seed 0, locale C": {"PYTHONHASHSEED": "0", "LC_ALL": "C"},
    "hash seed 1, LANG C": {"PYTHONHASHSEED": "1", "LANG": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "8"},
    "hash seed random, C.UTF-8": {"PYTHONHASHSEED": "random", "LC_ALL": "C.UTF-8", "PYTHONMALLOC": "malloc"},
}


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_outputs_are_the_same_bytes_in_any_interpreter(
    interpreter: str, smallest: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """With nothing else in its environment."""
    env = {"PATH": os.environ["PATH"], **INTERPRETERS[interpreter]}
    assert served(smallest, tmp_path / "work", "as it is", env=env) == {"as it is": expected}


CLOCK_C = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static const time_t later = 1000000000;  /* 31 years */
int clock_gettime(clockid_t id, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, id, now);
    if (!code && id == CLOCK_REALTIME) now->tv_sec += later;
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec, now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""
OTHER_HOST = 'echo another > /proc/sys/kernel/hostname && exec "$@"'


@pytest.mark.slow
def test_outputs_are_the_same_bytes_where_the_kernel_says_another_year_and_host(
    smallest: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """For C libraries as well, torch's among them."""
    import tools  # not at the top: as a program this file knows none of them

    tools.require("gcc", "unshare")
    tell = ("import socket, time; print(time.gmtime().tm_year, socket.gethostname())",)
    library, code = tmp_path / "clock.so", tmp_path / "clock.c"
    code.write_text(CLOCK_C)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    prefix = ("unshare", "--uts", "sh", "-c", OTHER_HOST, "sh")
    env = {**os.environ, "LD_PRELOAD": str(library)}
    told = subprocess.run([*prefix, sys.executable, "-c", *tell], env=env, capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"another host name is not allowed here: {told.stderr.strip()}")
    year, host = told.stdout.split()
    assert int(year) > time.gmtime().tm_year + 30 and host == "another"
    assert served(smallest, tmp_path / "work", "as it is", prefix=prefix, env=env) == {"as it is": expected}


@pytest.mark.slow
def test_output_of_the_installed_command_is_the_same_bytes(
    smallest: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "dsv4cli", "convert", "source/", "out/bf16", "--to", "bf16", SHARDS]
    shutil.copytree(smallest, tmp_path / "source")
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out" / "bf16") == expected["bf16"]


REMEMBER = {
    "dsv4.roundtrip",
    "dsv4.sha256",
    "dsv4.manifest.json",
}  # the index as it stood, and what hashes that


@pytest.mark.slow
def test_order_of_the_index_changes_only_what_remembers_the_index(
    smallest: Path, tmp_path: Path, convert: Callable[..., object], tree_of: Callable[[Path], dict[str, str]]
) -> None:
    import tiny

    shuffled = tiny.copy_of(smallest, tmp_path / "shuffled")

    def shuffle(document: dict[str, dict[str, str]]) -> None:
        names = sorted(document["weight_map"].items())
        random.Random(1).shuffle(names)
        document["weight_map"] = dict(names)

    tiny.edit_json(shuffled / tiny.INDEX, shuffle)
    trees = []
    for src in (smallest, shuffled):
        out = tmp_path / f"{src.name}-out"
        convert(src, out, max_shard_bytes=100_000)
        trees.append({name: sha for name, sha in tree_of(out).items() if name not in REMEMBER})
        part = tmp_path / f"{src.name}-part"  # of which nothing is remembered
        convert(src, part, max_shard_bytes=100_000, layers=(0,), keep_mtp=False)
        trees.append(tree_of(part))
    assert trees[:2] == trees[2:]


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
