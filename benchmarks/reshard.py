"""`dsv4 reshard` there and back beside `cp`: time as a ratio, peak of anonymous memory for each size.

    python benchmarks/reshard.py [--sizes 4GB,16GB] [--workers 2] [--dir DIR]

There: a native sample to DCP, in BF16 and as stored.  Back: that directory to native again, against its release; the
shards must be the sample's, byte for byte.  cp copies the files that the command wrote, in the same run on one disk,
from a cold cache until they are on the disk.  What does not fit the disk is left out, and said.
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


def peak_until_on_disk(command: list[str], target: Path) -> int:
    peak = peak_anonymous(command)
    run("sync", "-f", str(target))
    return peak


def measure(size: str, what: str, command: list[str], source: Path, target: Path) -> None:
    """Run a command and print what it took, beside cp of what it wrote."""
    peaks: list[int] = []
    seconds = timed(lambda: peaks.append(peak_until_on_disk(command, target)), source)
    written, ratio = bytes_of(target), "-"
    if shutil.disk_usage(target).free > written * 1.02:
        copied = target.with_name("copy")
        ratio = f"{seconds / timed(lambda: copy(target, copied), target):.2f}x"
        shutil.rmtree(copied)
    print(
        f"{size:>8}  {what:<16}{written / 1e9:7.2f} GB  {seconds:8.1f}  {ratio:>6}  {peaks[0] / 1e6:.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="4GB,16GB")
    parser.add_argument("--workers", default="2")
    parser.add_argument(
        "--dir", type=Path, help="where; it needs about 5 times the largest size, 9 times with cp"
    )
    options = parser.parse_args()
    workers = ["--workers", options.workers, "-q"]
    print(f"{'sample':>8}  {'way':<16}{'written':>10}  {'seconds':>8}  {'of cp':>6}  peak anonymous memory")
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        base = Path(place)
        source, dcp, back = base / "source", base / "dcp", base / "back"
        for size in options.sizes.split(","):
            run(*dsv4("sample", str(source), "--target-size", size, "-q"))
            for form, growth in (("bf16", 3.7), ("as-stored", 1.0)):
                if shutil.disk_usage(base).free < bytes_of(source) * growth * 1.01:
                    print(f"{size:>8}  there, {form}: no room", flush=True)
                    continue
                there = dsv4("reshard", str(source), str(dcp), "--to", "dcp", "--to-dtype", form, *workers)
                measure(size, f"there, {form}", there, source, dcp)
                if shutil.disk_usage(base).free > bytes_of(source) * 1.02:
                    native = ["--to", "safetensors", "--storage", "native", "--source", str(source)]
                    measure(
                        size,
                        f"back, {form}",
                        dsv4("reshard", str(dcp), str(back), *native, *workers),
                        dcp,
                        back,
                    )
                    same = all(filecmp.cmp(file, back / file.name, shallow=False) for file in shards(source))
                    print(f"{size:>8}  shards {'the same, byte for byte' if same else 'DIFFER'}", flush=True)
                    shutil.rmtree(back)
                else:
                    print(f"{size:>8}  no room for the way back", flush=True)
                shutil.rmtree(dcp)
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
