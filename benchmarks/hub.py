"""What the Hub costs: a release looked at from afar, and conversions from and to it, beside the same with directories.

    python benchmarks/hub.py [--release flash] [--size 500MB] [--latency 30] [--dir DIR]

The Hub is tests/hub/server.py in a process of its own on this machine; every request waits `--latency` milliseconds.
For the look, shards are sparse files with the true headers of the release.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from inspect_release import write_sparse

ROOT = Path(__file__).resolve().parents[1]
_THEIRS = """
import sys, huggingface_hub
found = huggingface_hub.HfApi().get_safetensors_metadata(sys.argv[1])
print(sum(len(item.tensors) for item in found.files_metadata.values()))
"""


def serve(seeds: list[str], latency: float) -> None:
    """The process of the Hub: its address on the first line; then, for each line it reads, what it has sent so far."""
    sys.path.insert(0, str(ROOT / "tests" / "hub"))
    import server

    with server.serving(part_bytes=64_000_000) as hub:
        for seed in seeds:
            name, _, at = seed.partition("=")
            _seed_mapped(server, hub, name, Path(at))
        hub.on_request = lambda request: time.sleep(latency / 1000)
        print(hub.endpoint, flush=True)
        for _ in sys.stdin:
            print(json.dumps([len(hub.requests), hub.fetched]), flush=True)
        threading.Event().wait()


def _seed_mapped(server: object, hub: object, name: str, directory: Path) -> None:
    """Hub.seed without reading: shards stay files, and their ids are those of their names unless they are small."""
    small = directory / "small"
    small.mkdir(exist_ok=True)
    for file in directory.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (small / file.name).write_bytes(file.read_bytes())
    hub.seed(name, small)  # type: ignore[attr-defined]
    files = hub.repos[name].files()  # type: ignore[attr-defined]
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        is_sparse = os.stat(file).st_blocks * 512 < len(data) // 2
        sha256 = hashlib.sha256(file.name.encode() if is_sparse else data).hexdigest()
        hub.blobs[sha256] = data  # type: ignore[attr-defined]
        files[file.name] = server.lfs_entry(sha256, len(data))  # type: ignore[attr-defined]


class Hub:
    """The Hub's process, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.endpoint = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def counts(self) -> tuple[int, int]:
        """Requests, and bytes of shards that were sent."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        requests, fetched = json.loads(self._line())
        return requests, fetched


@contextlib.contextmanager
def hub_process(latency: float, *seeds: str) -> Iterator[Hub]:
    command = [sys.executable, __file__, "--serve", str(latency), *seeds]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Hub(process)
    finally:
        process.kill()
        process.wait()


def timed(hub: Hub | None, home: str, *command: str) -> tuple[float, str]:
    """Seconds of a Python command with this Hub as the only one."""
    environment = {**os.environ, "HOME": home, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
    if hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_LocalHubOwner0123456789"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):  # sparse shards are no fault; 3: nothing is said of their values
        raise SystemExit(f"{command}: {done.stderr}")
    return time.perf_counter() - began, done.stdout


def look(release: str, latency: float, base: Path) -> None:
    directory = base / release
    directory.mkdir()
    count = write_sparse(release, directory)
    with hub_process(latency, f"org/{release}={directory}") as hub:
        there, _ = timed(None, str(base), "-m", "dsv4cli", "inspect", str(directory))
        before = hub.counts()
        afar, _ = timed(hub, str(base), "-m", "dsv4cli", "inspect", f"hf://org/{release}")
        requests, fetched = (now - then for now, then in zip(hub.counts(), before, strict=True))
        theirs, _ = timed(hub, str(base), "-c", _THEIRS, f"org/{release}")
    print(
        f"{release}: {count:,} tensors, {len([*directory.glob('*.safetensors')])} shards, {latency:g} ms a request"
    )
    print(f"  dsv4 inspect DIR                      {there:6.2f} s")
    print(
        f"  dsv4 inspect hf://                    {afar:6.2f} s   {requests} requests, {fetched / 1e6:.1f} MB of shards"
    )
    print(f"  huggingface_hub, headers alone        {theirs:6.2f} s   ours / theirs {afar / theirs:.2f}")


def convert(size: str, latency: float, base: Path) -> None:
    home = str(base)
    timed(None, home, "-m", "dsv4cli", "sample", "source", "--target-size", size)
    to = ("--to", "bf16", "--max-shard-size", "200MB")
    with hub_process(latency, f"org/flash={base / 'source'}") as hub:
        here, _ = timed(None, home, "-m", "dsv4cli", "convert", "source", "here", *to)
        fetched, _ = timed(hub, home, "-m", "dsv4cli", "convert", "hf://org/flash", "fetched", *to)
        pushed, _ = timed(hub, home, "-m", "dsv4cli", "push", "here", "tester/pushed")
        window = ("--scratch-limit", "1GB")
        relayed, _ = timed(
            hub, home, "-m", "dsv4cli", "convert", "hf://org/flash", "hf://tester/relayed", *to, *window
        )
        again, _ = timed(
            hub, home, "-m", "dsv4cli", "convert", "hf://org/flash", "hf://tester/relayed", *to, *window
        )
    print(f"a sample of {size} to BF16, {latency:g} ms a request")
    print(f"  convert DIR DST                       {here:6.2f} s")
    print(f"  convert hf:// DST                     {fetched:6.2f} s   {fetched / here:.2f}")
    print(f"  push DST                              {pushed:6.2f} s   {pushed / here:.2f}")
    both = fetched + pushed
    print(f"  convert hf:// hf://                   {relayed:6.2f} s   {relayed / both:.2f} of the two above")
    print(f"  the same again, when all is there     {again:6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", default="flash")
    parser.add_argument("--size", default="500MB", help="of the sample that is converted")
    parser.add_argument("--latency", type=float, default=30.0, help="milliseconds before each answer")
    parser.add_argument("--dir", help="where the files go; a folder is made in it and removed")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[1:], float(given.serve[0]))
        return
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="dsv4-bench-") as name:
        look(given.release, given.latency, Path(name))
        convert(given.size, given.latency, Path(name))


if __name__ == "__main__":
    main()
