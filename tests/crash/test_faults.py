"""Every system call of a command fails once: nothing passes over it, and the same command ends in the same bytes."""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import tools
import trials

Often = Callable[[int, int], int]

JOBS = {
    #  command         least numbers of points                              of all kinds in faults_driver.CALLS
    "convert bf16": {"write": 60, "fsync": 40, "rename": 15, "open": 80, "read": 150},
    "convert native": {"write": 60, "fsync": 30, "rename": 10, "open": 150, "read": 200},
    "sample": {"write": 20, "fsync": 30, "rename": 10, "open": 20},
    "verify bytes": {"open": 20, "read": 10},
    "verify values": {"open": 100, "read": 200},
}


@pytest.fixture(scope="module")
def sources(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command reads."""
    base = tmp_path_factory.mktemp("faults")
    native, bf16 = base / "native", base / "bf16"
    native.symlink_to(smallest)
    trials.Conversion(str(native), shard_bytes=10**9).into(bf16)
    return {name: bf16 if name in ("convert native", "verify bytes") else native for name in JOBS}


@pytest.fixture(scope="module")
def found(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, often: Often
) -> dict[str, dict[str, Any]]:
    """What the drivers found, one for each command, two at a time."""
    thorough = ("usual", "thorough")[often(0, 1)]

    def driven(name: str) -> tuple[str, dict[str, Any]]:
        # in memory if possible: what fails is decided above the disk, and thousands of fsyncs take minutes
        with tools.roomy(20_000_000, otherwise) as base:
            return name, trials.drive("faults", name, sources[name], base, thorough, timeout=7200)

    otherwise = tmp_path_factory.mktemp("out")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(driven, JOBS))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_command_whose_system_calls_fail_once_each_ends_in_an_error_and_resumes(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    report = found[name]
    assert report["problems"] == []
    for kind, least in JOBS[name].items():
        assert report["points"][kind] >= least, f"too few points of {kind} to mean anything"
    assert report["runs"] >= sum(report["points"][kind] for kind in JOBS[name])
    assert report["codes"].keys() <= {"0", "3", "4", "-9"}


# ---- the wrapped functions are all there is


TRACED = {
    "openat": "open", "open": "open", "creat": "open", "read": "read", "pread64": "read", "preadv": "read",
    "preadv2": "read", "write": "write", "pwrite64": "write", "pwritev": "write", "pwritev2": "write",
    "fsync": "fsync", "fdatasync": "fsync", "sync_file_range": "fsync", "rename": "rename", "renameat": "rename",
    "renameat2": "rename",
}  # fmt: skip
COUNTING = """
import sys
sys.path.insert(0, sys.argv[1])
import faults_driver
from pathlib import Path
faults = faults_driver.Faults()
into = lambda out: faults_driver.Conversion(sys.argv[2], "bf16", shard_bytes=10**9).into(out, 1)
def count(kind):
    faults.arm(kind, 0, 0)
    into(Path(sys.argv[3]) / kind)
    print(kind, faults.count, flush=True)
if not sys.argv[4:]:
    into(Path(sys.argv[3]))
for kind in sys.argv[4:]:  # each the first conversion of its process
    if code := faults_driver.attempt(lambda: count(kind)):
        sys.exit(code)
"""
ONLY_THESE = (
    "--seccomp-bpf"  # no other call is stopped at, which takes half the time; strace injects no signals then
)


@pytest.mark.slow
def test_wrapped_functions_see_every_system_call_that_strace_sees(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Counted by the kernel, on descriptors and paths of source, output and its parent."""
    tools.require("strace")
    src, out, log = sources["convert bf16"].resolve(), tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", COUNTING, str(Path(__file__).parent), str(src)]
    tracer = ["strace", "-f", ONLY_THESE, "-y", "-qq", "-o", str(log), "-e", "trace=" + ",".join(TRACED)]
    traced = [*tracer, *command, str(out)]
    done = subprocess.run(traced, capture_output=True, text=True)
    if done.returncode and "ptrace" in done.stderr.lower():
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    seen: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        is_listing = call and "O_NONBLOCK|O_CLOEXEC|O_DIRECTORY" in call[2]  # opendir: of kind stat
        if call and not is_listing and (str(src) in call[2] or str(tmp_path) in call[2]):
            seen[TRACED[call[1]]] += 1
    kinds = ("open", "read", "write", "fsync", "rename")
    counted = subprocess.run([*command, str(tmp_path), *kinds], capture_output=True, text=True, check=True)
    assert counted.stdout.splitlines() == [f"{kind} {seen[kind]}" for kind in kinds]
    assert sum(seen.values()) > 500


FAULTS = (
    "fsync:error=EIO:when=1",
    "fsync:error=EDQUOT:when=9",
    "rename:error=ENOSPC:when=1",
    "rename:error=EROFS:when=4",
    "pwrite64:error=ENOSPC:when=1",
    "preadv2:error=EIO:when=2",
    "fsync:signal=KILL:when=5",
    "rename:signal=KILL:when=2",
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_installed_command_with_a_fault_of_the_kernel_ends_well_and_resumes(
    fault: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    tools.require("strace")
    src, out, reference = sources["convert bf16"].resolve(), tmp_path / "out", tmp_path / "reference"
    trials.Conversion(str(src), shard_bytes=5 * 10**9).into(reference)
    expected = trials.tree(reference)
    arguments = ["convert", str(src), str(out), "--to", "bf16", "--quiet"]
    command = [sys.executable, "-m", "dsv4cli", *arguments]
    tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={fault}"]
    if "KILL" not in fault:
        tracer += [ONLY_THESE, "-e", f"trace={fault.partition(':')[0]}"]
    done = subprocess.run([*tracer, *command], capture_output=True, text=True)
    if "KILL" in fault:
        assert done.returncode in (-9, 137)
    else:
        assert done.returncode == 4, done.stderr
        assert done.stderr.startswith(("NoSpace: ", "Environment: ")), done.stderr
        assert "Traceback" not in done.stderr
    assert trials.torn(out, expected) == []
    again = forked.dsv4(*arguments)
    assert again.returncode == 0, again.stderr
    assert trials.tree(out) == expected
    assert trials.leftovers(out) == []
