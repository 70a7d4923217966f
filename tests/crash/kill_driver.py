"""Kills conversions at random moments and looks at what is left."""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from trials import Conversion, attempt, leftovers, torn, tree


def main(src: str, base: str, num_outputs: int, seed: int, to: str) -> None:
    conversion = Conversion(src, to)
    times = []
    for number in range(3):
        began = time.monotonic()
        reference = Path(base) / f"reference{number}"
        if attempt(functools.partial(conversion.into, reference)):
            raise SystemExit("an undisturbed run failed")
        times.append(time.monotonic() - began)
    duration = min(times)  # the first run is slower
    expected = tree(Path(base) / "reference0")
    random.seed(seed)  # a resumed run has less to do: kills spread over the whole would come too late
    found = {"kills": 0, "torn": [], "different": [], "leftovers": [], "files": len(expected)}
    for number in range(num_outputs):
        out = Path(base) / str(number)
        for _ in range(3):
            work = functools.partial(conversion.into, out, random.choice([1, 2, 3]))
            ended = attempt(work, kill_after=random.uniform(0, 0.5 * duration))
            found["kills"] += ended == -signal.SIGKILL
            found["torn"] += torn(out, expected)
        attempt(functools.partial(conversion.into, out))
        if tree(out) != expected:
            found["different"].append(number)
        found["leftovers"] += leftovers(out)
        shutil.rmtree(out)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
