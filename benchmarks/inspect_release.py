"""How long `dsv4 inspect` and `--dry-run` take for a whole release: real headers, data that takes no room.

    python benchmarks/inspect_release.py [--release flash] [--dir DIR]

Writes the shards of a release with their true headers as sparse files (they read as zeros), then times the commands,
beside starting Python alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsv4ckpt import sample, strictjson
from dsv4ckpt.release import RELEASES


def write_sparse(release: str, directory: Path) -> int:
    """The release's shards, index and config; returns the number of tensors."""
    made = sample.plan_sample(sample.SampleOptions(release=release, release_dims=True))
    weight_map = {}
    for file in made.files:
        with (directory / file.name).open("wb") as shard:
            shard.write(file.header)
            shard.truncate(file.size)
        weight_map.update({tensor.name: file.name for tensor in file.tensors})
    (directory / "config.json").write_bytes(strictjson.pretty(made.document))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_bytes(strictjson.pretty(index))
    return len(weight_map)


def seconds(*command: str) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        )
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", choices=list(RELEASES), default="flash")
    parser.add_argument("--dir", help="where the sparse files go; a folder is made in it and removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="dsv4-bench-") as name:
        count = write_sparse(given.release, Path(name))
        print(f"{given.release}: {count:,} tensors, median of 5")
        print(f"  python -c pass      {seconds('-c', 'pass'):6.2f} s")
        print(f"  dsv4 inspect        {seconds('-m', 'dsv4cli', 'inspect', name):6.2f} s")
        convert = ("-m", "dsv4cli", "convert", name, name + "/out", "--to", "bf16", "--names", "transformers")
        print(f"  convert --dry-run   {seconds(*convert, '--dry-run'):6.2f} s")


if __name__ == "__main__":
    main()
