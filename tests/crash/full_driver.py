"""Writes an output where there is too little room for it, then again where there is enough; tells what it saw.

Every attempt has a tmpfs of its own.  The free-space check asks for a margin that is far larger than these outputs; it
is blinded where a neighbour is to have eaten the space since it looked.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trials import Conversion, attempt, leftovers, smallest_sample, torn, tree

from dsv4ckpt import outdir, sample, sink
from dsv4ckpt.errors import Dsv4Error

PAGE = 4096
PLENTY = ("size=256M", "nr_inodes=10000")

Work = Callable[[Path], None]  # (directory)


class Bench:
    """One writer, tried on small file systems."""

    def __init__(self, work: Work, base: Path) -> None:
        self._work, self._base = work, base
        self._disk, self._out = base / "disk", base / "disk" / "out"
        self._disk.mkdir()
        (base / "first").mkdir()
        if attempt(functools.partial(work, base / "first" / "out")):
            raise SystemExit("an undisturbed run failed")
        self.expected = tree(base / "first" / "out")

    @property
    def used_bytes(self) -> int:
        """What the output takes, in whole pages, without what is needed on the way."""
        return sum(pages_of(path) for path in (self._base / "first").rglob("*") if path.is_file())

    def around_the_first_shard(self) -> Iterator[int]:
        """Sizes that have just room for it, or not for what is written down about it."""
        first = min((self._base / "first").rglob("model-*"))
        for extra in range(6):
            yield pages_of(first) + extra * PAGE

    def tried(self, *options: str, work: Work | None = None) -> dict[str, Any]:
        """One attempt on a file system mounted with these options, and one more after it has grown."""
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self._disk)], check=True
        )
        try:
            error = self._base / "error"
            error.unlink(missing_ok=True)
            code = attempt(functools.partial(telling, work or self._work, self._out, error))
            seen = {
                "options": options,
                "code": code,
                "error": error.read_text() if error.exists() else "",
                "torn": torn(self._out, self.expected),
                "parts": [path.name for path in self._disk.rglob("*.part")],
                "files": [str(path.relative_to(self._disk)) for path in self._disk.rglob("*")],
            }
            grown = ",".join(("remount", *PLENTY))
            subprocess.run(["mount", "-o", grown, str(self._disk)], check=True)
            again = attempt(functools.partial(self._work, self._out)) if code else 0
            same = not again and tree(self._out) == self.expected
            return {**seen, "again": again, "same": same, "leftovers": leftovers(self._out)}
        finally:
            subprocess.run(["umount", str(self._disk)], check=True)


def pages_of(file: Path) -> int:
    """Bytes, in whole pages."""
    return -(-file.stat().st_size // PAGE) * PAGE


def telling(work: Work, out: Path, error: Path) -> None:
    """Do the work; what an error says comes into a file."""
    try:
        work(out)
    except Dsv4Error as what:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        error.write_text(str(what))
        raise


def limited(work: Work, num_bytes: int, *, buffered: bool) -> Work:
    """The same writer, which may make no file larger than this; without direct I/O it learns so from a short write."""

    def small(out: Path) -> None:
        if buffered:
            sink._open_direct = lambda path, flags: (os.open(path, flags, 0o666), False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        work(out)

    return small


def steps(most: int, count: int) -> Iterator[int]:
    """`count` sizes from one page to 110 % of `most`, in whole pages."""
    for number in range(count):
        yield PAGE + int(1.1 * most * number / (count - 1)) // PAGE * PAGE


def writer(what: str, src: str) -> tuple[Work, int]:
    """The work, and the bytes that it asks the free-space check for. what: "sample", or a target of `src`"""
    if what == "sample":
        planned = smallest_sample()
        return lambda out: sample.write_sample(planned, str(out)), outdir.space_needed(planned.total_bytes)
    conversion = Conversion(src, what)
    return conversion.into, outdir.space_needed(conversion.plan.total_bytes)


def main(what: str, src: str, base: Path, case: str, count: int) -> list[dict[str, Any]]:
    work, needed = writer(what, src)
    bench = Bench(work, base)
    if case == "checked":
        return [bench.tried(f"size={size}") for size in steps(needed, count)]
    outdir.free_bytes = lambda path: 1 << 40
    if case == "blinded":
        sizes = (*steps(bench.used_bytes, count), *bench.around_the_first_shard())
        return [bench.tried(f"size={size}") for size in sizes]
    if case == "inodes":
        return [bench.tried("size=256M", f"nr_inodes={2 + number}") for number in range(count)]
    assert case == "limited"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    largest = max(file.stat().st_size for file in (base / "first").rglob("*") if file.is_file())
    sizes = [0, 1, 100, *(size + number % 3 - 1 for number, size in enumerate(steps(largest, count)))]
    return [
        bench.tried("size=256M", work=limited(work, size, buffered=buffered))
        for size in sizes
        for buffered in (False, True)
    ]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))))
