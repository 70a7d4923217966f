"""`dsv4 reshard` there and back beside `cp`: time as a ratio, peak of anonymous memory for each size.

    python benchmarks/reshard.py [--sizes 4GB,16GB] [--workers 2] [--dir DIR]

There: a native sample to BF16 DCP.  Back: that directory to native again, against its release; the shards must be the
sample's, byte for byte.  cp copies as many bytes as the command writes, in the same run on the same disk, out of a cold
cache, until they are on the disk.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import tempfile
from pathlib import Path

from convert import copy, dsv4, peak_anonymous, run, shards, timed


def bytes_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())


def measured(command: list[str], source: Path, target: Path, reference: Path) -> tuple[float, float, int]:
    """Seconds, the same of cp for the bytes that were written, and the peak of memory."""
    peak = 0

    def act() -> None:
        nonlocal peak
        peak = peak_anonymous(command)
        run("sync", "-f", str(target))

    seconds = timed(act, source)
    copied = timed(lambda: copy(reference, target.parent / "copy"), reference)
    shutil.rmtree(target.parent / "copy")
    return seconds, copied, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="4GB,16GB")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--dir", type=Path, help="where; it needs about 6 times the largest size")
    options = parser.parse_args()
    print(f"{'sample':>8}  {'way':<6}{'written':>10}  {'seconds':>8}  {'of cp':>6}  peak anonymous memory")
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        base = Path(place)
        source, dcp, back = base / "source", base / "dcp", base / "back"
        for size in options.sizes.split(","):
            run(*dsv4("sample", str(source), "--target-size", size, "-q"))
            workers = ["--workers", options.workers, "-q"]
            there = dsv4("reshard", str(source), str(dcp), "--to", "dcp", *workers)
            again = dsv4("reshard", str(dcp), str(back), "--to", "safetensors", "--storage", "native")
            for way, command, read, target in (
                ("there", there, source, dcp),
                ("back", [*again, "--source", str(source), *workers], dcp, back),
            ):
                seconds, copied, peak = measured(command, read, target, target)
                print(f"{size:>8}  {way:<6}{bytes_of(target) / 1e9:7.2f} GB  {seconds:8.1f}  {seconds / copied:5.2f}x"
                      f"  {peak / 1e6:.0f} MB", flush=True)  # fmt: skip
            same = all(filecmp.cmp(file, back / file.name, shallow=False) for file in shards(source))
            print(f"{size:>8}  shards {'the same, byte for byte' if same else 'DIFFER'}", flush=True)
            for directory in (source, dcp, back):
                shutil.rmtree(directory)


if __name__ == "__main__":
    main()
