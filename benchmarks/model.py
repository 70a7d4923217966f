"""Tokens per second and memory of dsv4model, forward and forward + backward, beside transformers' DeepseekV4.

    python benchmarks/model.py                               the table of docs/performance.md (about 20 minutes)
    python benchmarks/model.py --lengths 512 2048 --dtypes float32
    python benchmarks/model.py --profile 4096                where the time goes

Both models have the same weights: 54 M parameters in 6 layers of every kind.  Every measurement is a process of its
own.  Memory is what a step adds to the process at its highest, after a warm-up with 16 tokens; it is measured apart
from time, with a C library told to give freed blocks back at once: so it counts tensors, and not what malloc hoards.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

SIZES = {
    "hidden_size": 512, "num_attention_heads": 16, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 256,
    "o_groups": 4, "o_lora_rank": 128, "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
    "index_n_heads": 16, "index_head_dim": 128, "index_topk": 128, "sliding_window": 128, "vocab_size": 4096,
    "num_hidden_layers": 6, "compress_ratios": [0, 0, 4, 128, 4, 128], "num_hash_layers": 2,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
OURS_ONLY = 4096  # transformers needs more memory than most machines have beyond this length


def document(**changes: Any) -> dict[str, Any]:
    from dsv4ckpt.release import shipped_config

    return {**shipped_config("flash"), **SIZES, **changes}


def our_model(dtype: torch.dtype, device: str, **changes: Any) -> torch.nn.Module:
    from dsv4model.config import Config
    from dsv4model.model import Model, dtype_of, initialize

    model = Model(Config.read(document(**changes)))
    initialize(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, dtype))
    return model.to(device)


def their_model(dtype: torch.dtype, device: str, **changes: Any) -> torch.nn.Module:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    document_ = {
        key: value
        for key, value in document(**changes).items()
        if key not in ("quantization_config", "torch_dtype")
    }
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**document_)).to(dtype)
    state = our_model(dtype, "cpu", **changes).state_dict()
    lacks = model.load_state_dict(state, strict=False)
    assert not lacks.unexpected_keys, lacks
    return model.to(device)


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


class Peak:
    """The highest resident memory of this process above what it was, in bytes."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> Peak:
        self.bytes = 0
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before, self._stop = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, _resident() - self._before)

    def __exit__(self, *_: object) -> None:
        if self._device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure(what: str, impl: str, length: int, dtype: str, device: str) -> dict[str, float]:
    """Median tokens per second of forward alone and of forward + backward; peak memory of the latter."""
    make = our_model if impl == "dsv4model" else their_model
    model = make(getattr(torch, dtype), device)
    ids = torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    for parameter in model.parameters():  # gradients exist before memory is measured
        parameter.grad = torch.zeros_like(parameter)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    def both() -> None:
        loss_of(model(input_ids=ids).logits, ids).backward()

    if what == "memory":
        whole, ids = ids, ids[:, :16]
        both()
        ids = whole
        with Peak(device) as peak:
            both()
        return {"bytes": peak.bytes}
    return {
        "forward": length / _median_seconds(forward, device),
        "both": length / _median_seconds(both, device),
    }


def _median_seconds(job: Callable[[], None], device: str, *, least: float = 4.0) -> float:
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < least:
        begin = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def in_own_process(impl: str, length: int, dtype: str, device: str) -> dict[str, float]:
    found: dict[str, float] = {}
    environments: dict[str, dict[str, str]] = {"time": {}, "memory": GIVE_BACK}
    for what, environment in environments.items():
        command = [sys.executable, __file__, "--one", what, impl, "--lengths", str(length), "--dtypes", dtype]
        command += ["--device", device]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            raise SystemExit(done.stderr)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def profile(length: int, dtype: str, device: str) -> None:
    model = our_model(getattr(torch, dtype), device)
    ids = torch.randint(0, SIZES["vocab_size"], (1, length)).to(device)

    def both() -> None:
        loss_of(model(input_ids=ids).logits, ids).backward()

    both()
    with torch.profiler.profile() as found:
        both()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--profile", type=int, metavar="S", help="print where the time of one length goes")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.profile:
        profile(chosen.profile, chosen.dtypes[0], chosen.device)
        return
    if chosen.one:
        print(json.dumps(measure(*chosen.one, chosen.lengths[0], chosen.dtypes[0], chosen.device)))
        return
    print("dtype     S       |  forward tokens/s       |  forward + backward     |  extra memory, GB")
    print("                  |  ours    theirs  ratio  |  ours    theirs  ratio  |  ours    theirs  ratio")
    for dtype in chosen.dtypes:
        for length in chosen.lengths:
            ours = in_own_process("dsv4model", length, dtype, chosen.device)
            theirs = None
            if not chosen.alone and length <= OURS_ONLY:
                theirs = in_own_process("transformers", length, dtype, chosen.device)
            print(f"{dtype:<9} {length:<7} |  {_row(ours, theirs)}", flush=True)


def _row(ours: dict[str, float], theirs: dict[str, float] | None) -> str:
    cells = []
    for key, unit, digits in (("forward", 1, 0), ("both", 1, 0), ("bytes", 1e9, 2)):
        mine = f"{ours[key] / unit:<8.{digits}f}"
        if theirs is None:
            cells.append(f"{mine}{'-':<8}{'-':<6}")
            continue
        ratio = theirs[key] / ours[key] if key == "bytes" else ours[key] / theirs[key]
        cells.append(f"{mine}{theirs[key] / unit:<8.{digits}f}{ratio:<6.1f}")
    return " |  ".join(cells)


if __name__ == "__main__":
    main()
