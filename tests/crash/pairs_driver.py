"""Starts two conversions into one output at about the same moment, again and again, and looks at what comes of it."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials import Conversion, attempt, ended, leftovers, start, torn, tree

from dsv4ckpt import outdir, prove, run
from dsv4ckpt.outdir import OutDir
from dsv4ckpt.sink import FileSink

APART = 0.03  # seconds between the two, at most; a conversion takes several times that


def reference(conversion: Conversion, out: Path) -> tuple[dict[str, str], float]:
    """The files of an undisturbed run, and the seconds of the faster one of two."""
    seconds = []
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        if attempt(functools.partial(conversion.into, out)):
            raise SystemExit("an undisturbed run failed")
        seconds.append(time.monotonic() - began)
    return tree(out), min(seconds)


def both(first: Conversion, second: Conversion, out: Path, apart: float) -> tuple[int, int]:
    """Exit codes of two runs, the second of which starts some seconds after the first."""
    one = start(functools.partial(first.into, out))
    time.sleep(apart)
    other = start(functools.partial(second.into, out))
    return ended(one), ended(other)


def main(src: str, base: Path, num_pairs: int, kind: str) -> dict[str, Any]:
    """kind: locked; unlocked, where locks lie; plans, two of them."""
    if kind == "unlocked":
        fcntl.flock = _lie
    first, second = Conversion(src), Conversion(src, "fp8" if kind == "plans" else "bf16")
    expected, seconds = reference(first, base / "first")
    other = reference(second, base / "second")[0] if kind == "plans" else expected
    generator = random.Random(7)
    codes: Counter[str] = Counter()
    found: dict[str, Any] = {"torn": [], "different": [], "leftovers": [], "half": 0}
    for number in range(num_pairs):
        out = base / str(number)
        if number % 2:  # on an output that an earlier run began
            attempt(functools.partial(first.into, out), kill_after=generator.uniform(0, 0.7 * seconds))
            found["half"] += out.exists()
        ends = both(first, second, out, generator.uniform(0, APART))
        codes[" ".join(map(str, ends))] += 1
        winner = expected if ends[0] == 0 else other
        found["torn"] += torn(out, winner)
        found["different"] += [number] if tree(out) != winner else []
        found["leftovers"] += leftovers(out)
        shutil.rmtree(out)
    return {**found, "codes": codes}


# ---- two runs, interleaved at chosen calls: (owner, function, whether it is carried out before the run halts)

Call = tuple[Any, str, bool]
LOOKED: Call = (prove, "require_lossless", False)  # and found nothing finished
# Where the one halts, and the other until the one has ended; None: it runs to its end meanwhile.
LOCKED: tuple[tuple[Call, Call | None], ...] = (
    (LOOKED, None),
    ((os, "makedirs", True), None),
    ((fcntl, "flock", False), None),
    (LOOKED, (os, "rmdir", False)),
    (LOOKED, (OutDir, "finish", True)),
    ((OutDir, "clean", False), (os, "makedirs", True)),
    ((OutDir, "clean", False), (fcntl, "flock", False)),
)
UNLOCKED: tuple[tuple[Call, Call | None], ...] = (
    ((OutDir, "load", False), None),
    ((OutDir, "load", False), (OutDir, "finish", False)),
    ((outdir, "_read_if_there", False), (OutDir, "finish", False)),
    ((outdir, "_read_if_there", True), (OutDir, "finish", False)),
    ((OutDir, "remove_dead_temporaries", False), None),
    ((OutDir, "new_file", True), None),
    ((OutDir, "new_part", False), None),
    ((FileSink, "_publish", False), None),
    ((run, "_write_sidecar", False), None),
    ((run, "_write_small", False), (OutDir, "finish", False)),
    ((OutDir, "finish", False), None),
    ((OutDir, "clean", False), None),
    ((OutDir, "clean", False), (OutDir, "clean", False)),
    ((OutDir, "clean", False), (OutDir, "remove_dead_temporaries", False)),
)


def _lie(fd: int, operation: int) -> None:
    """As the locks of some network file systems do."""


def halting(call: Call, work: Callable[[], None]) -> None:
    """Do the work, but stop this process at the first call of a function."""
    owner, name, carried_out = call
    whole = getattr(owner, name)

    def halts(*arguments: Any, **named: Any) -> Any:
        setattr(owner, name, whole)
        result = whole(*arguments, **named) if carried_out else None
        os.kill(os.getpid(), signal.SIGSTOP)
        return result if carried_out else whole(*arguments, **named)

    setattr(owner, name, halts)
    work()


def halted(call: Call, work: Callable[[], None]) -> int:
    """A child that has stopped itself at a call."""
    child = start(functools.partial(halting, call, work))
    _, status = os.waitpid(child, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        raise SystemExit(f"the run ended before it came to {call}")
    return child


def on(child: int) -> int:
    """Let a halted child go on. Its exit code."""
    os.kill(child, signal.SIGCONT)
    return ended(child)


def interleaved(src: str, base: Path, kind: str) -> list[str]:
    """What came out wrong, of all cases of a kind."""
    if kind == "unlocked":
        fcntl.flock = _lie
    conversion = Conversion(src)
    expected, _ = reference(conversion, base / "reference")
    wrong = []
    for number, (one, other) in enumerate(LOCKED if kind == "locked" else UNLOCKED):
        out = base / str(number)
        work = functools.partial(conversion.into, out, 1)
        first = halted(one, work)
        if other is None:
            codes = attempt(work), on(first)
        else:
            second = halted(other, work)
            codes = on(first), on(second)
        if codes != (0, 0) or tree(out) != expected or leftovers(out):
            wrong.append(f"{one[1]}, {other and other[1]}: {codes}, left {leftovers(out)}")
    return wrong


if __name__ == "__main__":
    if sys.argv[3] == "interleaved":
        print(json.dumps(interleaved(sys.argv[1], Path(sys.argv[2]), sys.argv[4])))
    else:
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
