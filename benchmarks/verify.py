"""How long `dsv4 verify` takes: headers of a whole release, and every byte of a conversion.

    python benchmarks/verify.py [--release flash-0731] [--size 2GB] [--repeat 3] [--dir DIR]

`--level structure` reads the true headers of a release out of sparse files.  `--level bytes` hashes a BF16 conversion
of about --size, beside sha256sum over the same files and hashlib over memory.  Each begins with the files out of the
page cache (cold) or in it (warm).  A rate per core is bytes divided by processor time, without what the structure of
the same directory takes (Python's start, headers).  Compare the ratios, since machines differ.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from convert import num_bytes, out_of_cache, run, shards
from dsv4cli.words import Size, human
from inspect_release import write_sparse

from dsv4ckpt.release import RELEASES

DSV4 = str(Path(sys.executable).with_name("dsv4"))  # the installed command
BF16_PER_BYTE = 3.4  # of a released checkpoint
IN_MEMORY = 256 * 1024 * 1024


class Cost(NamedTuple):
    seconds: float
    core_seconds: float  # user and system


def core_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def cost(action: Callable[[], object], repeat: int, before: Callable[[], object] = lambda: None) -> Cost:
    """Medians."""
    costs = []
    for _ in range(repeat):
        before()
        began, used = time.perf_counter(), core_seconds()
        action()
        costs.append(Cost(time.perf_counter() - began, core_seconds() - used))
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def structure(release: str, base: Path, repeat: int) -> None:
    base.mkdir()
    count = write_sparse(release, base)
    print(f"{release}: {count:,} tensors in {len(shards(base))} shards, headers only, median of {repeat}")
    print(
        f"  python -c pass            {cost(lambda: run(sys.executable, '-c', 'pass'), repeat).seconds:6.2f} s"
    )
    verify = cost(lambda: run(DSV4, "verify", str(base), "--level", "structure"), repeat)
    print(f"  verify --level structure  {verify.seconds:6.2f} s, {verify.core_seconds:.2f} s of a core")


def in_cache(directory: Path) -> None:
    for file in shards(directory):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def bytes_level(size: int, base: Path, repeat: int) -> None:
    base.mkdir()
    source, made = base / "source", base / "bf16"
    run(DSV4, "sample", str(source), "--target-size", str(int(size / BF16_PER_BYTE)), "-q")
    run(DSV4, "convert", str(source), str(made), "--to", "bf16", "-q")
    total = num_bytes(made)
    memory = bytearray(IN_MEMORY)
    hashed = cost(lambda: hashlib.sha256(memory).digest(), repeat)
    reference = IN_MEMORY / hashed.core_seconds
    print(f"\n{human(total)} in {len(shards(made))} shards, median of {repeat}")
    print(f"{'':36}{'seconds':>8}{'GB/s':>7}{'core s':>8}{'GB/s per core':>15}  / hashlib")
    row("hashlib.sha256 on memory", hashed, IN_MEMORY, reference)
    start = cost(lambda: run(DSV4, "verify", str(made), "--level", "structure"), repeat)
    print(f"{'verify --level structure':36}{start.seconds:8.2f}{'':7}{start.core_seconds:8.2f}")
    files = [str(file) for file in shards(made)]
    contenders = {
        "sha256sum": ["sha256sum", *files],
        "verify --level bytes --workers 1": [DSV4, "verify", str(made), "--level", "bytes", "--workers", "1"],
        "verify --level bytes --workers 2": [DSV4, "verify", str(made), "--level", "bytes"],
    }
    for state, prepare in (("cold", out_of_cache), ("warm", in_cache)):
        for name, command in contenders.items():
            measured = cost(lambda: run(*command), repeat, lambda: prepare(made))  # noqa: B023 - called at once
            before = start.core_seconds if command[0] == DSV4 else 0.0
            row(f"{name}, {state}", measured, total, reference, before)


def row(name: str, measured: Cost, total: int, reference: float, before: float = 0.0) -> None:
    """`before`: core seconds that are not counted."""
    per_core = total / (measured.core_seconds - before)
    print(
        f"{name:36}{measured.seconds:8.2f}{total / measured.seconds / 1e9:7.2f}{measured.core_seconds:8.2f}"
        f"{per_core / 1e9:15.2f}{per_core / reference:11.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", choices=list(RELEASES), default="flash-0731")
    parser.add_argument("--size", default="2GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", help="where the files go; a folder is made in it and removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="dsv4-bench-") as base:
        structure(given.release, Path(base) / "release", given.repeat)
        bytes_level(Size().convert(given.size, None, None), Path(base) / "bytes", given.repeat)


if __name__ == "__main__":
    main()
