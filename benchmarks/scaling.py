"""The constants of dsv4ckpt/scaling.py on this machine, and how far its predictions are off.

    python benchmarks/scaling.py [--size 1.5GB] [--repeat 3] [--dir DIR]

Core-seconds are CPU time: of the thread that works on a shard for the operations, of the rest of the process for
hashing and writing.  What a sidecar adds is the difference to a conversion that has none.  Tables are as
docs/scaling.md has them: median, and the least and the most of all repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4ckpt import original, paper, plan, run, scaling, sidecar, source, survey, work
from dsv4ckpt.formats import Target

#  sample       then            to
CHAINS = (
    ("flash", ("bf16", "native")),
    ("flash", ("fp8",)),
    ("flash", ("fp8-f32scale",)),
    ("flash", ("nvfp4",)),
    ("flash-base", ("bf16", "native")),
    ("flash-base", ("fp8",)),
)
GB = 10**9
SCALES = "scales 8-bit"  # next to no bytes: what any step costs
Seen = dict[str, list[float]]
Sums = defaultdict[str, float]


def sample(path: Path, release: str, size: str) -> Path:
    if not path.exists():
        command = ["-m", "dsv4cli", "sample", str(path), "--release", release, "--target-size", size, "-q"]
        subprocess.run([sys.executable, *command], check=True)
    return path


def planned(src: Path, to: str, *, keep_mtp: bool = True) -> tuple[plan.Plan, source.Checkpoint]:
    checkpoint = source.open_checkpoint(str(src))
    options = plan.ConvertOptions(target=Target(to), keep_mtp=keep_mtp, max_shard_bytes=200_000_000)
    memory = sidecar.open_sidecar(str(src)) if to == "native" else None
    known = original.of_sidecar(memory) if memory else None
    return plan.make_plan(survey.survey(checkpoint), options, known), checkpoint


@contextlib.contextmanager
def watched() -> Iterator[tuple[Sums, Sums, Sums]]:
    """CPU seconds of the thread that carries out steps, their bytes and their number, by kind; of one worker."""
    seconds, sizes, counts = Sums(float), Sums(float), Sums(float)
    whole = work.Worker.carry_out

    def carry_out(self: work.Worker, step: Any, tensor: Any, begins: Any) -> None:
        began = time.thread_time()
        whole(self, step, tensor, begins)
        kind = scaling.kind_of(step)
        seconds[kind] += time.thread_time() - began
        sizes[kind] += scaling.weight_of(step)
        counts[kind] += 1

    work.Worker.carry_out = carry_out  # type: ignore[method-assign]
    try:
        yield seconds, sizes, counts
    finally:
        work.Worker.carry_out = whole  # type: ignore[method-assign]


def measure(src: Path, out: Path, to: str, seen: Seen) -> None:
    """One conversion without a sidecar, whose steps are pure, and one with what it has."""
    pure: dict[str, float] = {}
    for keep_mtp in (True,) if to == "native" else (False, True):
        shutil.rmtree(out, ignore_errors=True)
        made, checkpoint = planned(src, to, keep_mtp=keep_mtp)
        cpu = time.process_time()
        with watched() as (seconds, sizes, counts):
            run.execute(made, checkpoint, str(out), num_workers=1)
        rest = time.process_time() - cpu - sum(seconds.values())
        if SCALES in counts:
            seen["a step"].append(seconds[SCALES] / counts[SCALES])
        step = statistics.median(seen["a step"])
        net = {kind: seconds[kind] - step * counts[kind] for kind in seconds if kind and kind != SCALES}
        if not keep_mtp or to == "native":
            seen["write"].append(rest / made.shard_bytes * GB)
            pure = {kind: net[kind] / sizes[kind] for kind in net}
            for kind, cost in pure.items():
                seen[kind].append(cost * GB)
        elif made.remembered:
            recorded = sum(scaling.bytes_recorded(step) for step in steps_of(made))
            seen["record"].append(sum(net[kind] - pure[kind] * sizes[kind] for kind in pure) / recorded * GB)


def steps_of(made: plan.Plan) -> list[Any]:
    return [step for file in made.files for tensor in file.tensors for step in tensor.steps]


def start_and_finish(src: Path, out: Path, repeat: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of a job of two ranks with nothing to do; of planning, for each tensor; of the end, for each file."""
    shutil.rmtree(out, ignore_errors=True)
    starts, plans, ends = [], [], []
    finished = run._completed

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        summary = finished(*arguments)
        ends.append((time.perf_counter() - began) / (len(made.files) + len(made.source)))
        return summary

    run._completed = timed
    made, checkpoint = planned(src, "bf16")
    for _ in range(repeat):
        shutil.rmtree(out, ignore_errors=True)
        run.execute(made, checkpoint, str(out))
    run._completed = finished
    for _ in range(repeat):
        began = time.perf_counter()
        job(2, 1, src, out, "bf16")
        starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        options = plan.ConvertOptions(target=Target.BF16)
        gc.disable()  # as the command does
        on_paper = plan.make_plan(survey.survey(paper.on_paper("flash")), options)
        on_paper.sha256  # noqa: B018 - it is computed when first asked for
        gc.enable()
        plans.append((time.perf_counter() - began) / on_paper.num_tensors)
    return starts, plans, ends


def job(ranks: int, workers: int, src: Path, out: Path, to: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    verb = ["-m", "dsv4cli", "convert", str(src), str(out), "--to", to, "--max-shard-size", "200MB", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *verb, "--workers", str(workers)]
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)


def bandwidth(src: Path, out: Path, num_bytes: int) -> float:
    """Bytes per second of reading the source and writing so many, both past the page cache."""
    began = time.perf_counter()
    read = 0
    for file in sorted(src.glob("*.safetensors")):
        direct = ["dd", f"if={file}", "of=/dev/null", "bs=8M", "iflag=direct", "status=none"]
        subprocess.run(direct, check=True)
        read += file.stat().st_size
    blocks = str(num_bytes >> 23)
    subprocess.run(
        [
            "dd",
            "if=/dev/zero",
            f"of={out}",
            "bs=8M",
            f"count={blocks}",
            "oflag=direct",
            "conv=fsync",
            "status=none",
        ],
        check=True,
    )
    seconds = time.perf_counter() - began
    out.unlink()
    return (read + num_bytes) / seconds


def tell(name: str, values: list[float], digits: int = 2) -> None:
    told = [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    print(f"| {name} | {told[0]} | {told[1]} - {told[2]} |", flush=True)


def predictions(base: Path, samples: dict[str, Path], repeat: int) -> None:
    print(
        "\n| conversion | ranks x workers | predicted s | measured s | error | limit |\n|---|---|---|---|---|---|"
    )
    for release, to in (("flash", "bf16"), ("flash", "fp8"), ("flash-base", "bf16")):
        src, out = samples[release], base / "out"
        made, _ = planned(src, to)
        rate = int(bandwidth(src, base / "zeros", made.total_bytes))
        for ranks, workers in ((1, 1), (1, 2), (2, 1)):
            seconds = []
            for _ in range(repeat):
                shutil.rmtree(out, ignore_errors=True)
                began = time.perf_counter()
                job(ranks, workers, src, out, to)
                seconds.append(time.perf_counter() - began)
            told, took = scaling.predict(made, ranks, workers, rate), statistics.median(seconds)
            print(f"| {release} -> {to}, {made.total_bytes / GB:.1f} GB, {rate / GB:.2f} GB/s | {ranks} x {workers} | "
                  f"{told.seconds:.1f} | {took:.1f} | {told.seconds / took - 1:+.0%} | {told.bottleneck} |",
                  flush=True)  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1.5GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--only", choices=["constants", "predictions"], default=None)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.dir) as directory:
        base = Path(directory)
        samples = {name: sample(base / name, name, chosen.size) for name in ("flash", "flash-base")}
        if chosen.only != "predictions":
            constants(base, samples, chosen.repeat)
        if chosen.only != "constants":
            predictions(base, samples, chosen.repeat)


def constants(base: Path, samples: dict[str, Path], repeat: int) -> None:
    import torch

    torch.set_num_threads(1)
    seen: Seen = defaultdict(list)
    chains = sorted(
        CHAINS, key=lambda chain: chain[1] != ("fp8-f32scale",)
    )  # first, what tells the cost of a step
    for (release, chain), _ in itertools.product(chains, range(repeat)):
        src = samples[release]
        for number, to in enumerate(chain):
            out = base / f"out{number}"
            measure(src, out, to, seen)
            src = out
        for number in range(len(chain)):
            shutil.rmtree(base / f"out{number}", ignore_errors=True)
    steps, writes, records = (seen.pop(name) for name in ("a step", "write", "record"))
    print("\n| core-seconds for each GB | median | least - most |\n|---|---|---|")
    for kind in sorted(seen):
        tell(kind, seen[kind])
    tell("hashing and writing", writes)
    tell("records, for each GB of codes and values", records)
    tell("1,000 steps, whatever they do", [1000 * seconds for seconds in steps])
    starts, plans, ends = start_and_finish(samples["flash"], base / "out", repeat)
    print("\n| seconds | median | least - most |\n|---|---|---|")
    tell("start of a job of two ranks", starts)
    tell("planning, for 100,000 tensors", [seconds * 100_000 for seconds in plans])
    tell("finish, for 1,000 files", [seconds * 1000 for seconds in ends])
    assert threading.active_count() == 1


if __name__ == "__main__":
    main()
