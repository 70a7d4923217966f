"""Loads a checkpoint, saves it as native, and says what each took.

load_save_driver.py SMALL SRC OUT dense|packed     prints {"model": bytes, "load": peak above before, "save": same}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest's conftest.py does this for tests

import torch
from peaks import kilobytes

from dsv4model.loading import load
from dsv4model.model import Model
from dsv4model.saving import save


def peak_of(work: Callable[[], object]) -> tuple[object, int]:
    """What it returns, and the most bytes that it held above what was held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    result = work()
    return result, (kilobytes("VmHWM") - before) * 1024


def main(small: Path, src: Path, out: Path, experts: str) -> None:
    torch.set_num_threads(1)
    # what is imported and made once, such as tables
    warm = load(small, experts=experts)  # type: ignore[arg-type]
    save(warm, out / "small", like=small, to="native", names="deepseek")
    del warm
    model, loading = peak_of(lambda: load(src, experts=experts))  # type: ignore[arg-type]
    assert isinstance(model, Model)
    _, saving = peak_of(lambda: save(model, out / "large", like=src, to="native", names="deepseek"))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(json.dumps({"model": size, "load": loading, "save": saving}))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4])
