"""The command, slowed down: `torchrun ranks_driver.py SECONDS ARGUMENTS`.

Each shard takes so long, and its rank looks whether to stop; SECONDS are one number, or one for each rank.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from dsv4cli.main import main

from dsv4ckpt import run

EACH = sys.argv.pop(1).split(",")
SECONDS = float(EACH[int(os.environ["RANK"]) % len(EACH)])
whole = run._write_shard


def slowly(*arguments: Any) -> Any:
    """The shard, after a rest in which its rank looks whether to stop."""
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        arguments[-1].stop.check()
        time.sleep(0.01)
    return whole(*arguments)


run._write_shard = slowly
main()
