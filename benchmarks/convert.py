"""End to end: `dsv4 convert --to bf16` beside cp + sync and beside the naive torch way, in one run on one disk.

    python benchmarks/convert.py [--size 1.5GB] [--repeat 3] [--dir DIR] [--no-naive] [--workers 2]
    python benchmarks/convert.py --across               every format from native, and native from each
    python benchmarks/convert.py --memory 4GB,16GB      peak memory only, there and back for each size

Every contender starts with the source out of the page cache and ends when its bytes are on the disk.  Times are
medians; compare the ratios, since machines differ.  Memory is the peak of RssAnon, sampled every 10 ms.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def dsv4(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dsv4cli", *arguments]


def shards(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.safetensors"), *directory.glob("*.distcp")])


def out_of_cache(directory: Path) -> None:
    os.sync()
    for file in shards(directory):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def num_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in shards(directory))


def timed(action: Callable[[], object], cold: Path) -> float:
    out_of_cache(cold)
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def copy(source: Path, target: Path) -> None:
    run("cp", "-r", str(source), str(target))
    run("sync", "-f", str(target))


def read_then_write(source: Path, size: int, target: Path) -> None:
    """The same bytes in and the same number of bytes out, with nothing in between."""
    target.mkdir()
    files = " ".join(str(file) for file in shards(source))
    run(
        "bash",
        "-c",
        f"cat {files} > /dev/null && head -c {size} /dev/zero > {target}/zeros && sync -f {target}",
    )


def naive(source: Path, target: Path) -> None:
    """What scripts in the field do: open a shard, unpack nibbles to floats, multiply, cast, save_file."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    target.mkdir()
    for file in shards(source):
        tensors = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if name.endswith(".scale"):
                    continue
                value = stored.get_tensor(name)
                if value.dtype == torch.int8:
                    packed = value.view(torch.uint8)
                    halves = torch.stack(
                        [grid[(packed & 15).long()], grid[(packed >> 4).long()]], -1
                    ).flatten(-2)
                    scale = stored.get_tensor(name.removesuffix("weight") + "scale").float()
                    value = (halves.unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2).to(torch.bfloat16)
                elif value.dtype == torch.float8_e4m3fn:
                    scale = stored.get_tensor(name.removesuffix("weight") + "scale").float()
                    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                    value = (value.float() * wide[: value.shape[0], : value.shape[1]]).to(torch.bfloat16)
                tensors[name] = value
        save_file(tensors, target / file.name)
    run("sync", "-f", str(target))


def convert(source: Path, target: Path, workers: int, to: str = "bf16") -> None:
    run(*dsv4("convert", str(source), str(target), "--to", to, "--workers", str(workers), "-q"))


def peak_anonymous(command: list[str]) -> int:
    """Bytes: the highest RssAnon of a process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"failed: {command}")
    return peak


def memory(sizes: list[str], base: Path, workers: int) -> None:
    print(f"{'sample':>10}  {'in':>9}  {'out':>9}  {'seconds':>7}  peak anonymous memory")
    for size in sizes:
        source, target = base / "source", base / "target"
        run(*dsv4("sample", str(source), "--target-size", size, "-q"))
        for names in ("deepseek", "transformers"):
            began = time.perf_counter()
            command = dsv4("convert", str(source), str(target), "--to", "bf16", "--names", names, "-q")
            peak = peak_anonymous([*command, "--workers", str(workers)])
            seconds = time.perf_counter() - began
            sent, came = num_bytes(source) / 1e9, num_bytes(target) / 1e9
            print(
                f"{size:>10}  {sent:6.2f} GB  {came:6.2f} GB  {seconds:7.1f}  {peak / 1e6:.0f} MB ({names} names)"
            )
            began = time.perf_counter()
            command = dsv4("convert", str(target), str(base / "back"), "--to", "native", "-q")
            peak = peak_anonymous([*command, "--workers", str(workers)])
            seconds = time.perf_counter() - began
            print(
                f"{size:>10}  {came:6.2f} GB  {sent:6.2f} GB  {seconds:7.1f}  {peak / 1e6:.0f} MB (and back)"
            )
            shutil.rmtree(target)
            shutil.rmtree(base / "back")
        shutil.rmtree(source)


def compare(size: str, repeat: int, base: Path, workers: int, with_naive: bool) -> None:
    source, out, scratch = base / "source", base / "out", base / "scratch"
    run(*dsv4("sample", str(source), "--target-size", size, "-q"))
    convert(source, out, workers)
    total = num_bytes(out)
    contenders: dict[str, tuple[Callable[[], object], Path]] = {
        "cp of the output + sync": (lambda: copy(out, scratch), out),
        "cat input, write zeros + sync": (lambda: read_then_write(source, total, scratch), source),
        "dsv4 convert --to bf16": (lambda: convert(source, scratch, workers), source),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, (action, cold) in contenders.items():
            times[name].append(timed(action, cold))
            shutil.rmtree(scratch)
    if with_naive:
        times["naive torch + save_file"] = [timed(lambda: naive(source, scratch), source)]
        shutil.rmtree(scratch)
    reference = statistics.median(times["cp of the output + sync"])
    print(
        f"{num_bytes(source) / 1e9:.2f} GB in, {total / 1e9:.2f} GB out, {workers} workers, median of {repeat}"
    )
    print(f"{'':32}{'seconds':>8}  {'out GB/s':>8}  time / cp")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:32}{median:8.2f}  {total / median / 1e9:8.2f}  {median / reference:9.2f}")
    print(json.dumps({name: [round(value, 2) for value in values] for name, values in times.items()}))


def across(size: str, repeat: int, base: Path, workers: int) -> None:
    """Each conversion beside reading its input and writing as many bytes as its output has."""
    source, scratch = base / "native", base / "scratch"
    run(*dsv4("sample", str(source), "--target-size", size, "-q"))
    ways = [("native", "bf16"), ("bf16", "native"), ("native", "fp8"), ("fp8", "native"), ("native", "fp8-f32scale"),
            ("native", "nvfp4"), ("nvfp4", "native"), ("native", "mxfp4-ct"), ("mxfp4-ct", "native")]  # fmt: skip
    print(
        f"{'from':>10}  {'to':14}{'in GB':>8}{'out GB':>8}{'same bytes':>12}{'dsv4':>8}  ratio   (medians of {repeat})"
    )
    for before, after in ways:
        if not (base / before).exists():
            convert(source, base / before, workers, before)
        convert(base / before, scratch, workers, after)
        out = num_bytes(scratch)
        shutil.rmtree(scratch)
        contenders = {
            "same bytes": functools.partial(read_then_write, base / before, out, scratch),
            "dsv4": functools.partial(convert, base / before, scratch, workers, after),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeat):
            for name, action in contenders.items():
                times[name].append(timed(action, base / before))
                shutil.rmtree(scratch)
        same, ours = statistics.median(times["same bytes"]), statistics.median(times["dsv4"])
        sizes = f"{num_bytes(base / before) / 1e9:8.2f}{out / 1e9:8.2f}"
        print(f"{before:>10}  {after:14}{sizes}{same:12.2f}{ours:8.2f}  {ours / same:5.2f}")
        if before != "native":
            shutil.rmtree(base / before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1.5GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", help="where the files go; a folder is made in it and removed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--memory", metavar="SIZES", help="measure peak memory for these sizes instead")
    parser.add_argument("--across", action="store_true", help="all formats, there and back")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="dsv4-bench-") as base:
        if given.memory:
            memory(given.memory.split(","), Path(base), given.workers)
        elif given.across:
            across(given.size, given.repeat, Path(base), given.workers)
        else:
            compare(given.size, given.repeat, Path(base), given.workers, not given.no_naive)


if __name__ == "__main__":
    main()
