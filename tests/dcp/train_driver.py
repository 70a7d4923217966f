"""`torchrun train_driver.py ARGUMENTS`: the command, whose rank 1 is killed in the third step unless it was before."""

from __future__ import annotations

import os
import signal
from typing import Any

from dsv4cli.main import main

from dsv4model.trainer import Trainer

whole = Trainer.step


def step(trainer: Trainer, number: int) -> Any:
    """As it is, but for one rank once."""
    if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(trainer, number)


Trainer.step = step  # type: ignore[method-assign]
main()
