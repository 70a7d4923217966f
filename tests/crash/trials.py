"""What the drivers of this folder share: one conversion tried again and again in forked children, and judged.

A driver is a program of its own (its name ends in _driver.py): it imports torch once and forks for every attempt, so
that an attempt costs milliseconds; it prints one JSON document, which the test beside it judges.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # for a driver, which is no test and has no conftest
import tiny

from dsv4ckpt import original, plan, run, sample, sidecar, source, survey
from dsv4ckpt.errors import Dsv4Error
from dsv4ckpt.formats import MANIFEST_NAME, WORK_NAME, Target
from dsv4ckpt.plan import ConvertOptions

SHARD_BYTES = 60_000  # many small shards give many moments to die at
CRASHED = 99  # exit code of a child that raised what no error of ours is


def drive(driver: str, *arguments: object, timeout: int = 900) -> Any:
    """Run a driver of this folder; what it printed."""
    script = Path(__file__).parent / f"{driver}_driver.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every visible file; the work directory is not part of the output."""
    return tiny.tree_of(directory, without=WORK_NAME)


class Conversion:
    """A planned conversion of one source, to be carried out into any directory."""

    def __init__(self, src: str, to: str = "bf16", shard_bytes: int = SHARD_BYTES) -> None:
        self.checkpoint = source.open_checkpoint(src)
        memory = sidecar.open_sidecar(src)
        options = ConvertOptions(target=Target(to), max_shard_bytes=shard_bytes)
        self.plan = plan.make_plan(
            survey.survey(self.checkpoint), options, original.of_sidecar(memory) if memory else None
        )

    def into(self, out: Path, workers: int = 2, **options: Any) -> None:
        run.execute(self.plan, self.checkpoint, str(out), num_workers=workers, **options)


def smallest_sample() -> sample.Sample:
    """What `sample` is to write: as the fixture `smallest`."""
    return sample.plan_sample(sample.SampleOptions(release="flash", **tiny.SMALLEST))  # type: ignore[arg-type]


def start(work: Callable[[], None]) -> int:
    """Run `work` in a forked child, as the command would: its exit code is that of the error. Returns the child."""
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        work()
        code = 0
    except Dsv4Error as error:
        code = error.exit_code
    except BaseException:  # noqa: BLE001 - told to whoever reads the driver's stderr, and by the code
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child: its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Start, perhaps kill -9 after some seconds, and wait. Returns as `ended`."""
    child = start(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return ended(child)


def torn(out: Path, expected: dict[str, str]) -> list[str]:
    """What a directory shows that a whole conversion does not: files of other bytes, or a manifest before its files."""
    if not out.exists():
        return []
    seen = tree(out)
    found = [name for name, sha256 in seen.items() if expected.get(name) != sha256]
    if MANIFEST_NAME in seen and seen.keys() != expected.keys():
        found.append(f"{MANIFEST_NAME} before {sorted(expected.keys() - seen.keys())}")
    return found


def leftovers(out: Path) -> list[str]:
    """What a finished run must not leave."""
    return [
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.name == WORK_NAME or path.suffix == ".part"
    ]
