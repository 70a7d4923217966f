"""Cuts the power of a small disk while an output is written to it, and looks at what is left when it comes back.

The disk is an ext4 image on a loop device.  EXT4_IOC_SHUTDOWN without a flush of the journal makes the file system
forget what it holds in memory, as a power cut does; mounting it again replays the journal.  A neighbour's fsync just
before the cut commits the journal, with names in it whose data may not be written yet: without it, the journal would
forget both together.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
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
from typing import Any

from trials import Conversion, attempt, ended, leftovers, smallest_sample, start, torn, tree

from dsv4ckpt import outdir, sample, sink
from dsv4ckpt.errors import EXIT_ENVIRONMENT, ForeignOutput

SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
DISK_BYTES = 64 * 1024 * 1024
CUTS_PER_OUTPUT = 2
MAX_TRIES = 5  # per cut: some come when the work is done
ENDS = (0, EXIT_ENVIRONMENT, -signal.SIGKILL)  # of a writer whose disk went away

Work = Callable[[Path, int], None]  # (directory, number of workers)


class Disk:
    """The image; `path` is where it is mounted between `plug_in` and `pull_out`."""

    def __init__(self, base: Path) -> None:
        self.path = base / "disk"
        self._image = base / "image"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self._image)], check=True)

    def plug_in(self) -> None:
        # flushes of the device below are not what is on trial: what the file system sent survives every cut
        options = "loop,barrier=0"
        subprocess.run(["mount", "-t", "ext4", "-o", options, str(self._image), str(self.path)], check=True)

    def pull_out(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)

    def cut(self, *, commits: bool) -> None:
        """Forget all that is in memory only. commits: what the journal holds is not"""
        neighbour = os.open(self.path / "neighbour", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if commits:
            os.write(neighbour, b"x")
            os.fsync(neighbour)
        fcntl.ioctl(neighbour, SHUTDOWN, NO_LOG_FLUSH)
        os.close(neighbour)


def lazily(work: Work) -> Work:
    """The same writer, but that nothing except fsync sends data to the disk: no direct I/O, no early write-back."""

    def lazy(out: Path, workers: int) -> None:
        sink._open_direct = lambda path, flags: (os.open(path, flags, 0o666), False)
        os.posix_fadvise = lambda *arguments: None
        work(out, workers)

    return lazy


def carelessly(work: Work) -> Work:
    """The same writer without fsync."""

    def careless(out: Path, workers: int) -> None:
        os.fsync = lambda fd: None
        work(out, workers)

    return careless


def cut_while(disk: Disk, work: Callable[[], None], after: float, *, commits: bool = True) -> int:
    """Cut the power `after` some seconds, and mount again. Returns how the work had ended; 0: before the cut"""
    child = start(work)
    try:
        time.sleep(after)
        disk.cut(commits=commits)
    finally:
        os.kill(child, signal.SIGKILL)
        code = ended(child)
    disk.pull_out()
    disk.plug_in()
    return code


def usual_duration(work: Work, out: Path) -> float:
    """Of an undisturbed run. The first one is slower."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        if attempt(functools.partial(work, out, 2)):
            raise SystemExit("an undisturbed run failed")
        times.append(time.monotonic() - began)
        shutil.rmtree(out)
    return min(times)


class Trials:
    """Outputs that one writer makes on a disk whose power is cut; `found` is what came of them."""

    def __init__(self, disk: Disk, work: Work, expected: dict[str, str]) -> None:
        self.found = {"cuts": 0, "torn": [], "odd_ends": [], "different": [], "leftovers": [], "lost": []}
        self._disk, self._work, self._expected = disk, work, expected
        self._duration = usual_duration(work, disk.path / "first")

    def interrupt(self, out: Path) -> None:
        """Cut once, and judge what is there."""
        work = functools.partial(self._work, out, random.choice([1, 2, 3]))
        code = cut_while(self._disk, work, random.uniform(0, self._duration))
        self.found["cuts"] += code != 0
        if code not in ENDS:
            self.found["odd_ends"].append(code)
        if seen := torn(out, self._expected):
            self.found["torn"].append([out.name, *seen[:3]])

    def finish(self, out: Path) -> None:
        """Continue to the end; what is finished then stays, whatever else the journal forgets."""
        if attempt(functools.partial(self._work, out, 2)) or tree(out) != self._expected:
            self.found["different"].append(out.name)
        self.found["leftovers"] += leftovers(out)
        cut_while(self._disk, lambda: None, 0, commits=False)
        if not out.exists() or tree(out) != self._expected:
            self.found["lost"].append(out.name)


def durable(disk: Disk, work: Work, expected: dict[str, str], num_cuts: int) -> list[dict[str, Any]]:
    """Outputs cut off up to twice, then continued to the end."""
    trials = [Trials(disk, work, expected), Trials(disk, lazily(work), expected)]
    for number in range(MAX_TRIES * num_cuts):
        if sum(trial.found["cuts"] for trial in trials) >= num_cuts:
            break
        out = disk.path / str(number)
        for _ in range(CUTS_PER_OUTPUT):
            trials[number % 2].interrupt(out)
        trials[number % 2].finish(out)
        shutil.rmtree(out, ignore_errors=True)
    return [trial.found for trial in trials]


def careless(disk: Disk, work: Work, expected: dict[str, str], num_cuts: int) -> list[dict[str, Any]]:
    """The control: outputs cut off once."""
    trial = Trials(disk, carelessly(lazily(work)), expected)
    for number in range(MAX_TRIES * num_cuts):
        if trial.found["cuts"] >= num_cuts:
            break
        out = disk.path / str(number)
        trial.interrupt(out)
        shutil.rmtree(out, ignore_errors=True)
    return [trial.found]


def writer(what: str, src: str) -> Work:
    """what: "sample", or the target of a conversion of `src`"""
    if what != "sample":
        return Conversion(src, what).into
    planned = smallest_sample()

    def write(out: Path, workers: int) -> None:
        with contextlib.suppress(ForeignOutput):  # a whole sample is not written again: its files are judged
            sample.write_sample(planned, str(out))

    return write


if __name__ == "__main__":
    what, src, base, num_cuts = sys.argv[1:5]
    random.seed(7)
    outdir.free_bytes = lambda path: 1 << 40  # the output fits, but not with the margin that is asked for
    plain = writer(what, src)
    reference = Path(base) / "reference"
    if attempt(functools.partial(plain, reference, 2)):
        raise SystemExit("an undisturbed run failed")
    disk = Disk(Path(base))
    disk.plug_in()
    mode = {"durable": durable, "careless": careless}[sys.argv[5]]
    found = mode(disk, plain, tree(reference), int(num_cuts))
    disk.pull_out()
    print(json.dumps(found))
