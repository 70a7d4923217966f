"""Kills conversions at random moments and looks at what is left.  Started by test_kill.py as a process of its own.

Imports once and forks for every attempt, so that an attempt takes milliseconds; prints one JSON document.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from dsv4ckpt import original, plan, run, sidecar, source, survey
from dsv4ckpt.formats import Target
from dsv4ckpt.plan import ConvertOptions


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every visible file; the work directory is not part of the output."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and ".dsv4/" not in str(file)
    }


def attempt(
    made: plan.Plan, checkpoint: source.Checkpoint, out: Path, workers: int, seconds: float | None
) -> bool:
    """Run in a child; with `seconds`, kill it then. Returns whether the kill landed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            run.execute(made, checkpoint, str(out), num_workers=workers)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if seconds is None and status:
        raise SystemExit(f"an undisturbed run failed: {status}")
    return os.WIFSIGNALED(status)


def main(src: str, base: str, num_outputs: int, seed: int, to: str) -> None:
    checkpoint = source.open_checkpoint(src)
    memory = sidecar.open_sidecar(src)
    options = ConvertOptions(target=Target(to), max_shard_bytes=400_000)
    made = plan.make_plan(survey.survey(checkpoint), options, original.of_sidecar(memory) if memory else None)
    times = []
    for number in range(3):
        began = time.monotonic()
        attempt(made, checkpoint, Path(base) / f"reference{number}", 2, None)
        times.append(time.monotonic() - began)
    duration = min(times)  # the first run is slower; later moments would find nothing to kill
    expected = tree(Path(base) / "reference0")
    random.seed(seed)
    found = {
        "kills": 0,
        "torn": [],
        "early_manifest": 0,
        "different": [],
        "leftovers": 0,
        "files": len(expected),
    }
    for number in range(num_outputs):
        out = Path(base) / str(number)
        for _ in range(3):
            found["kills"] += attempt(
                made, checkpoint, out, random.choice([1, 2, 3]), random.uniform(0, duration)
            )
            if not out.exists():
                continue
            seen = tree(out)
            found["torn"] += [name for name, sha256 in seen.items() if expected.get(name) != sha256]
            found["early_manifest"] += "dsv4.manifest.json" in seen and seen.keys() != expected.keys()
        attempt(made, checkpoint, out, 2, None)
        if tree(out) != expected:
            found["different"].append(number)
        found["leftovers"] += (out / ".dsv4").exists()
        shutil.rmtree(out)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
