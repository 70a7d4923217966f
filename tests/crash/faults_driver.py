"""Lets every system call of a command fail once, each in a run of its own, and looks at what comes of it.

The functions of `os` are wrapped, which is where all calls of the product pass (test_faults.py holds that against
strace).  Errors are raised in this process, one run after the other, so that a descriptor which is not closed shows;
a kill needs a forked child.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials import CRASHED, Conversion, attempt, leftovers, torn, tree

from dsv4ckpt import compare, sample, source, survey, verify
from dsv4ckpt.errors import Dsv4Error
from dsv4ckpt.formats import MANIFEST_NAME

#  kind        functions                                              errors
CALLS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "write": (("write", "pwrite"), (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
    "fsync": (("fsync",), (errno.EIO, errno.ENOSPC, errno.EDQUOT)),
    "rename": (("rename",), (errno.ENOSPC, errno.EIO, errno.EROFS)),
    "open": (("open",), (errno.EMFILE, errno.EIO, errno.EROFS)),
    "read": (("read", "pread", "preadv"), (errno.EIO,)),
    "reserve": (("posix_fallocate", "ftruncate"), (errno.ENOSPC, errno.EIO)),
    "mkdir": (("mkdir",), (errno.ENOSPC, errno.EROFS)),
    "stat": (("stat", "lstat", "fstat", "statvfs", "listdir"), (errno.EIO,)),
    "unlink": (("unlink", "rmdir"), (errno.EIO,)),
}
KILL = -1  # in place of an error: the process dies instead of making the call
REPORTED = ("write", "fsync", "rename", "open", "read", "reserve", "mkdir")  # no run may pass over these


class Faults:
    """Counts the calls of one kind, and lets the n-th fail."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._functions: tuple[str, ...] = ()
        self._number = self._error = 0
        self.count = 0
        for functions, _ in CALLS.values():
            for name in functions:
                setattr(os, name, self._wrapped(name, getattr(os, name)))

    def arm(self, kind: str, number: int, error: int) -> None:
        self._functions, self._number, self._error, self.count = CALLS[kind][0], number, error, 0

    def disarm(self) -> None:
        self._functions = ()

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if name in self._functions:
                with self._lock:
                    self.count += 1
                    due = self.count == self._number
                if due and self._error == KILL:
                    os.kill(os.getpid(), signal.SIGKILL)
                if due:
                    raise OSError(self._error, os.strerror(self._error))
            return function(*arguments, **options)

        return call


def code_of(work: Callable[[], None]) -> tuple[int, str]:
    """Exit code and message of a command that is run in this process."""
    try:
        work()
    except Dsv4Error as error:
        return error.exit_code, str(error)
    except Exception as error:  # noqa: BLE001 - exactly what must not happen
        return CRASHED, "".join(traceback.format_exception(error))
    return 0, ""


class Writing:
    """A command that makes a directory."""

    def __init__(self, into: Callable[[Path], None], base: Path) -> None:
        self._into = into
        self.out = base / "out"
        into(base / "reference")
        self._expected = tree(base / "reference")
        self._has_manifest = MANIFEST_NAME in self._expected

    def run(self) -> None:
        self._into(self.out)

    def problems_after(self, code: int) -> list[str]:
        found = [f"torn: {name}" for name in torn(self.out, self._expected)]
        if code == 0 and tree(self.out) != self._expected:
            found.append("silent: exit 0 and other files")
        again, message = code_of(self.run)
        is_whole = tree(self.out) == self._expected
        # a sample looks like a release: nothing tells a second run that it is whole and only needs tidying
        if not is_whole or (again and self._has_manifest):
            found.append(f"not resumed: {again} {message}")
        if not again:
            found += [f"left: {name}" for name in leftovers(self.out)]
        shutil.rmtree(self.out, ignore_errors=True)
        return found


class Looking:
    """A command that reads, and finds nothing wrong where nothing fails."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self._look = look

    def run(self) -> None:
        if not self._look():
            raise AssertionError("it found a difference where there is none")

    def problems_after(self, code: int) -> list[str]:
        return []


def job_of(name: str, src: str, base: Path) -> Writing | Looking:
    if name == "sample":
        options = sample.SampleOptions(layers=1, hidden=64, intermediate=32, experts=6, heads=2, vocab=512)
        made = sample.plan_sample(options)
        return Writing(lambda out: sample.write_sample(made, str(out)), base)
    if name.startswith("convert"):
        to = name.partition(" ")[2]
        # opening the source is part of the command
        return Writing(lambda out: Conversion(src, to, shard_bytes=10**9).into(out, 1), base)
    if name == "verify bytes":
        return Looking(lambda: verify.verify_bytes(src, num_workers=1).ok)
    assert name == "verify values"
    a, b = src, str(Path(src).parent / "bf16")

    def compared() -> bool:
        opened = source.open_checkpoint(a), source.open_checkpoint(b)
        return compare.verify_values(*map(survey.survey, opened), num_workers=1).ok

    return Looking(compared)


def open_descriptors() -> int:
    return sum(os.path.exists(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))


def errors_at(kind: str, number: int, *, every: bool) -> tuple[int, ...]:
    """The errors to try at the n-th call of a kind: every one, or each in its turn."""
    errors = CALLS[kind][1]
    if kind not in ("read", "stat", "open"):  # between two writes one death is as good as another
        errors = (*errors, KILL)
    return errors if every else (errors[number % len(errors)],)


def main(name: str, src: str, base: str, thorough: str) -> None:
    source._NUM_SAMPLES = 8  # pieces of a shard that are read one like the other
    faults = Faults()
    job = job_of(name, src, Path(base))
    found: dict[str, Any] = {"points": Counter(), "runs": 0, "codes": Counter(), "problems": []}
    for kind in CALLS:
        faults.arm(kind, 0, 0)
        code, message = code_of(job.run)
        faults.disarm()
        if code:
            raise SystemExit(f"an undisturbed run failed: {message}")
        total = faults.count
        found["points"][kind] = total
        problems = job.problems_after(0)
        descriptors = open_descriptors()
        every = thorough == "thorough" or (name == "convert bf16" and kind in ("write", "fsync", "rename"))
        for number in range(1, total + 1, 1 if every or kind in REPORTED else 5):
            for error in errors_at(kind, number, every=every):
                faults.arm(kind, number, error)
                if error == KILL:
                    code, message = attempt(job.run), ""
                else:
                    code, message = code_of(job.run)
                was_hit = error == KILL or faults.count >= number
                faults.disarm()
                problems = job.problems_after(code)
                if error == KILL and code != -signal.SIGKILL:
                    problems.append(f"ended with {code} instead of being killed")
                elif error != KILL and was_hit:
                    allowed = (3, 4) if kind in REPORTED else (0, 3, 4)
                    if code not in allowed:
                        problems.append(f"exit {code}: {message}")
                    if code and "\n" not in message:
                        problems.append(f"the message does not say where or what to do: {message}")
                if open_descriptors() != descriptors:
                    problems.append("a descriptor was left open")
                    descriptors = open_descriptors()
                where = f"{kind} {number} of {total}, {errno.errorcode.get(error, 'KILL')}"
                found["problems"] += [f"{where}: {problem}" for problem in problems]
                found["codes"][str(code)] += 1
                found["runs"] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])
