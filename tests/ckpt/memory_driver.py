"""Converts in forked children, and says how much memory each needed above what importing torch takes.

memory_driver.py SRC BASE           prints {way: bytes}
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest's conftest.py does this for tests

from peaks import kilobytes

from dsv4ckpt import original, plan, run, sidecar, source, survey
from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace


def convert(src: Path, out: Path, target: Target, namespace: Namespace) -> None:
    checkpoint = source.open_checkpoint(str(src))
    memory = sidecar.open_sidecar(str(src)) if target is Target.NATIVE else None
    made = plan.make_plan(
        survey.survey(checkpoint),
        plan.ConvertOptions(target=target, namespace=namespace),
        original.of_sidecar(memory) if memory else None,
    )
    run.execute(made, checkpoint, str(out), num_workers=2)


def peak_of(src: Path, out: Path, target: Target, namespace: Namespace) -> int:
    """Bytes above what the process held when it began. A forked child begins with its parent's memory as its peak."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            before = kilobytes("VmRSS")
            convert(src, out, target, namespace)
            os.write(writing, str((kilobytes("VmHWM") - before) * 1024).encode())
        except BaseException:  # noqa: BLE001 - whoever reads stderr is told
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="ascii") as file:
        told = file.read()
    os.waitpid(child, 0)
    if not told:
        raise SystemExit(f"{src.name} -> {target} failed")
    return int(told)


def main(src: Path, base: Path) -> None:
    found = {}
    for namespace in Namespace:
        there, back = base / "there", base / "back"
        found[f"to bf16, {namespace} names"] = peak_of(src, there, Target.BF16, namespace)
        found[f"back, {namespace} names"] = peak_of(there, back, Target.NATIVE, Namespace.DEEPSEEK)
        shutil.rmtree(there)
        shutil.rmtree(back)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
