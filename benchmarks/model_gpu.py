"""dsv4model on a GPU at the true dimensions of Flash: exactness, speed, memory; beside transformers' DeepseekV4.

    python benchmarks/model_gpu.py --out result.json     the tables of docs/performance.md (about 7 minutes on an H200)
    python benchmarks/model_gpu.py --only speed profile
    python benchmarks/model_gpu.py --device cpu --tiny   the same at small sizes, to try the script

The model is a cut of four layers: windows, CSA (ratio 4) and HCA (ratio 128); the first three route by token id.  It
has as many experts as fit beside their gradients, and no MTP block.  Both implementations compute on the same tensors.
Every section is a process of its own, and one that fails is told by its error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from model import SIZES, Peak, _median_seconds, loss_of
from torch import Tensor, nn

CUT = {"num_hidden_layers": 4, "compress_ratios": [0, 0, 4, 128], "num_nextn_predict_layers": 0}
EXPERTS = (256, 128, 64, 32, 16, 8)  # that are tried, all of Flash first
LENGTHS, TINY_LENGTHS = [512, 2048, 4096, 8192, 16384], [64, 256]
PROFILED, PROMPT, NEW_TOKENS = 4096, 2048, 64
GB = 1e9


class Bench:
    """Where and at which sizes."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.lengths = TINY_LENGTHS if tiny else LENGTHS
        self.profiled = TINY_LENGTHS[-1] if tiny else PROFILED

    def document(self, experts: int) -> dict[str, Any]:
        """The config.json of the cut."""
        from dsv4ckpt.release import shipped_config

        sizes = SIZES if self.tiny else {"n_routed_experts": experts}
        return {**shipped_config("flash"), **sizes, **CUT}

    def experts(self, share: float) -> int:
        """The most experts with which bfloat16 weights and gradients take no more than a share of the GPU."""
        total = self.total_bytes()
        return next((n for n in EXPERTS if 4 * self.num_weights(n) <= share * total), EXPERTS[-1])

    def num_weights(self, experts: int) -> int:
        return sum(p.numel() for p in on_meta(self.document(experts)).parameters())

    def total_bytes(self) -> int:
        return torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else 8 * 2**30

    def ids(self, length: int) -> Tensor:
        vocab = self.document(8)["vocab_size"]
        return torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(1)).to(
            self.device
        )

    def ours(self, experts: int) -> nn.Module:
        """Our model with random bfloat16 weights, made on the device."""
        from dsv4model.model import initialize

        model = on_meta(self.document(experts)).to_empty(device=self.device)
        initialize(model, torch.Generator(self.device).manual_seed(0))
        return model


def on_meta(document: dict[str, Any]) -> Any:
    """Our model in bfloat16 without storage."""
    from dsv4model.config import Config
    from dsv4model.model import Model, dtype_of

    with torch.device("meta"):
        model = Model(Config.read(document))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, torch.bfloat16))
    return model


def theirs(document: dict[str, Any], ours: nn.Module, dtype: torch.dtype) -> nn.Module:
    """transformers' model on our tensors; what it keeps in another dtype is a copy."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    left_out = ("quantization_config", "torch_dtype", "expert_dtype")
    config = DeepseekV4Config(**{key: value for key, value in document.items() if key not in left_out})
    state = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("mtp.")}
    with next(ours.parameters()).device:
        model = DeepseekV4ForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager")
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in state.items():
        if mine[name].dtype == tensor.dtype:
            mine[name].data = tensor.data
        else:
            mine[name].data.copy_(tensor)
    return model.eval()


# ---- measuring


def step(model: nn.Module, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss_of(model(input_ids=ids).logits, ids).backward()


def forward(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids)


def costs(
    model: nn.Module, ids: Tensor, device: str, **jobs: Callable[[nn.Module, Tensor], None]
) -> dict[str, Any]:
    """Of each job tokens per second, and the peak of memory: on a GPU of all there is, on a CPU of what a job adds."""
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        try:
            job(model, ids)  # a warm-up
            model.zero_grad(set_to_none=True)
            held = torch.cuda.memory_allocated() if device == "cuda" else 0
            with Peak(device) as peak:
                job(model, ids)
            found[name + " GB"] = round((held + peak.bytes) / GB, 2)
            taken = _median_seconds(lambda job=job: job(model, ids), device, least=0.5)  # type: ignore[misc]
            found[name] = round(ids.numel() / taken)
        except torch.OutOfMemoryError:
            found[name] = "no memory"
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def divergence(exact: Tensor, found: Tensor) -> float:
    """The mean over tokens of KL(exact || found), of logits [B, S, V]."""
    p, q = (logits.double().log_softmax(-1) for logits in (exact, found.to(exact.device)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| over |exact|."""
    found, exact = found.double(), exact.to(found.device).double()
    return float((found - exact).norm() / exact.norm())


# ---- sections


def card(bench: Bench) -> dict[str, Any]:
    """What this machine is, and the rate of a large matrix product on it."""
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "device": bench.device}
    if bench.device == "cuda":
        found |= {"name": torch.cuda.get_device_name(), "GB": round(bench.total_bytes() / GB, 1)}
    size = 256 if bench.tiny else 8192
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"), ("float32", torch.float32, "highest"), ("tf32", torch.float32, "high")
    ):  # fmt: skip
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        taken = _median_seconds(lambda a=a, b=b: a @ b, bench.device, least=0.3)  # type: ignore[misc]
        found[f"{name} TFLOP/s"] = round(2 * size**3 / taken / 1e12, 2)
    return found


def exact(bench: Bench) -> dict[str, Any]:
    """A sample checkpoint loaded on the device: its logits against the CPU's, transformers' and float32's."""
    from dsv4ckpt import sample
    from dsv4model import load

    options = sample.SampleOptions(layers=4, experts=8, release_dims=not bench.tiny)
    ids, found = bench.ids(bench.lengths[0]) % 512 if bench.tiny else bench.ids(bench.lengths[0]), {}
    with tempfile.TemporaryDirectory() as base, torch.no_grad():
        made = sample.plan_sample(options)
        sample.write_sample(made, base + "/sample")
        found["checkpoint GB"] = round(made.total_bytes / GB, 2)

        def loaded(dtype: torch.dtype, device: str = bench.device, **options: Any) -> Any:
            begin = time.perf_counter()
            model = load(base + "/sample", dtype, device=device, **options)
            found[f"load {dtype} {device} {options.get('experts', 'dense')} s"] = round(
                time.perf_counter() - begin, 2
            )
            return model

        truth = loaded(torch.float32, "cpu")(ids.cpu()).logits
        model = loaded(torch.float32)
        here = model(ids).logits
        found["float32: distance to the CPU"] = distance(here, truth)
        found["float32: same likeliest token"] = float(
            (here.argmax(-1).cpu() == truth.argmax(-1)).double().mean()
        )
        other = theirs(made.document, model, torch.float32)(input_ids=ids, use_cache=False).logits
        found["float32: distance of transformers"] = distance(other, truth)
        torch.set_float32_matmul_precision("high")
        found["tf32: KL to float32"] = divergence(here, model(ids).logits)
        torch.set_float32_matmul_precision("highest")
        del model, other
        model = loaded(torch.bfloat16)
        found["bfloat16: KL to float32"] = divergence(here, model(ids).logits)
        torch.set_float32_matmul_precision("high")
        found["bfloat16, tf32: KL to float32"] = divergence(here, model(ids).logits)
        torch.set_float32_matmul_precision("highest")
        other = theirs(made.document, model, torch.bfloat16)(input_ids=ids, use_cache=False).logits
        found["bfloat16: KL of transformers to float32"] = divergence(here, other)
        del model, other
        packed = loaded(torch.bfloat16, experts="packed")
        found["packed: KL to float32"] = divergence(here, packed(ids).logits)
    return found


def speed(bench: Bench) -> dict[str, Any]:
    """Beside transformers, on a quarter of the GPU so that it has room."""
    experts = bench.experts(0.25)
    model = bench.ours(experts)
    other = theirs(bench.document(experts), model, torch.bfloat16)
    rows = [row(bench, model, "dsv4model", bench.profiled, "highest")]
    for length in bench.lengths:
        rows.append(row(bench, model, "dsv4model", length))
        rows.append(row(bench, other, "transformers", length))
    return {**sizes(bench, experts), "their experts": other.config._experts_implementation, "rows": rows}


def whole(bench: Bench) -> dict[str, Any]:
    """Alone, with as many experts as fit."""
    experts = bench.experts(0.75)
    model = bench.ours(experts)
    rows = [row(bench, model, "dsv4model", length) for length in bench.lengths]
    return {**sizes(bench, experts), "rows": rows}


def row(bench: Bench, model: nn.Module, impl: str, length: int, precision: str = "high") -> dict[str, Any]:
    """What forward, and forward + backward cost at one length."""
    torch.set_float32_matmul_precision(precision)
    told = {"impl": impl, "precision": precision, "tokens": length}
    return told | costs(model, bench.ids(length), bench.device, forward=forward, step=step)


def sizes(bench: Bench, experts: int) -> dict[str, Any]:
    return {"experts": experts, "weights GB": round(2 * bench.num_weights(experts) / GB, 2)}


def chunks(bench: Bench) -> dict[str, Any]:
    """How many queries attention best takes at a time."""
    from dsv4model import attend

    model = bench.ours(EXPERTS[-1])
    rows = []
    for size in (64, 128, 256, 512):
        attend._CHUNK[bench.device] = size
        for length in (bench.lengths[0], bench.profiled):
            rows.append({"queries": size, **row(bench, model, "dsv4model", length)})
    return {"rows": rows}


def decode(bench: Bench) -> dict[str, Any]:
    """Greedy decoding on a cache, one sequence."""
    from dsv4model.generate import generate

    torch.set_float32_matmul_precision("high")
    experts = bench.experts(0.25)
    model = bench.ours(experts).eval()
    prompt = bench.ids(64 if bench.tiny else PROMPT)
    for _ in range(2):  # the first is a warm-up
        begin = time.perf_counter()
        tokens = generate(model, prompt[0].tolist(), max_new_tokens=NEW_TOKENS)
        next(tokens)
        first = time.perf_counter()
        count = sum(1 for _ in tokens)
        end = time.perf_counter()
    found = {"experts": experts, "prompt": prompt.numel(), "prompt tokens/s": round(prompt.numel() / (first - begin)),
             "new tokens/s": round(count / (end - first), 1)}  # fmt: skip
    other = theirs(bench.document(experts), model, torch.bfloat16)
    taken = []
    for new in (1, 1, NEW_TOKENS):
        begin = time.perf_counter()
        other.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        taken.append(time.perf_counter() - begin)
    found["their prompt tokens/s"] = round(prompt.numel() / taken[1])
    found["their new tokens/s"] = round((NEW_TOKENS - 1) / (taken[2] - taken[1]), 1)
    return found


def packed(bench: Bench) -> dict[str, Any]:
    """Every quantized matrix as codes and scales against the dense model; a step gives gradients of what is dense."""
    experts = bench.experts(0.25)
    rows = []
    for kind in ("dense", "packed"):
        model = bench.ours(experts) if kind == "dense" else packed_model(bench, experts)
        held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        for length in (bench.lengths[0], bench.profiled):
            rows.append({"weights GB": round(held / GB, 2), **row(bench, model, kind, length)})
        del model
    return {"experts": experts, "rows": rows}


def packed_model(bench: Bench, experts: int) -> nn.Module:
    """Random codes: any of E2M1, those of E4M3 that are numbers; under scales that make the weights small."""
    from dsv4ckpt import config as configs
    from dsv4ckpt.inventory import lay_out, logical_tensors
    from dsv4ckpt.names import Namespace
    from dsv4ckpt.release import RELEASES
    from dsv4model.loading import quantized_modules
    from dsv4model.model import initialize
    from dsv4model.packed import SCALES, pack_modules

    document, flash = bench.document(experts), RELEASES["flash"]
    logicals = list(logical_tensors(configs.read(document), flash.family))
    layout = lay_out(logicals, flash.family.table, flash.storage, Namespace.TRANSFORMERS)
    model = on_meta(document)
    quants = quantized_modules(layout)
    pack_modules(model, quants)
    model = model.to_empty(device=bench.device)
    initialize(model, torch.Generator(bench.device).manual_seed(0))
    for name, codes in dict(model.named_buffers()).items():
        if codes.dtype != torch.uint8 or name.endswith(SCALES):
            continue
        is_fp4 = quants[name.rpartition(".")[0]].codes_per_element == 2
        codes.copy_(
            torch.randint(0, 256 if is_fp4 else 127, codes.shape, dtype=torch.uint8, device=bench.device)
        )
        model.get_buffer(name + SCALES).fill_(120 if is_fp4 else 113)  # 2**-7 of up to 6; 2**-14 of up to 448
    return model


def profile(bench: Bench) -> dict[str, Any]:
    """The ten operators that take most of a step."""
    torch.set_float32_matmul_precision("high")
    model, ids = bench.ours(bench.experts(0.25)), bench.ids(bench.profiled)
    step(model, ids)
    with torch.profiler.profile() as recorded:
        step(model, ids)
        if bench.device == "cuda":
            torch.cuda.synchronize()
    which = "self_device_time_total" if bench.device == "cuda" else "self_cpu_time_total"
    events = [e for e in recorded.key_averages() if e.key.startswith("aten::") or bench.device == "cpu"]
    total = sum(getattr(e, which) for e in events)
    top = sorted(events, key=lambda e: -getattr(e, which))[:10]
    rows = [
        {"operator": e.key, "ms": round(getattr(e, which) / 1e3, 2), "share": round(getattr(e, which) / total, 3),
         "calls": e.count} for e in top
    ]  # fmt: skip
    kernels = [e for e in recorded.key_averages() if e.device_type != torch.autograd.DeviceType.CPU]
    longest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:12]
    return {"tokens": ids.numel(), "all ms": round(total / 1e3, 1), "rows": rows,
            "kernels": [[e.key[:90], round(e.self_device_time_total / 1e3, 2), e.count] for e in longest]}  # fmt: skip


def repeat(bench: Bench) -> dict[str, Any]:
    """Are logits and gradients the same bits again, as it is and with deterministic algorithms?"""
    model, ids = bench.ours(EXPERTS[-1]), bench.ids(bench.profiled)
    with torch.no_grad():
        first, second = (model(ids).logits for _ in range(2))
    found: dict[str, Any] = {"tokens": ids.numel(), "logits": torch.equal(first, second)}
    del first, second
    for name, on in (("gradients", False), ("gradients, deterministic algorithms", True)):
        torch.use_deterministic_algorithms(on)
        runs = []
        for _ in range(2):
            step(model, ids)
            runs.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        same = [key for key in runs[0] if torch.equal(runs[0][key], runs[1][key])]
        found[name] = len(same) == len(runs[0])
        found[f"{name}, finite"] = all(bool(grad.isfinite().all()) for grad in runs[0].values())
        found[f"{name}, tensors"] = f"{len(same)} of {len(runs[0])}"
    return found


SECTIONS = {f.__name__: f for f in (card, exact, speed, whole, chunks, decode, packed, profile, repeat)}
ENVIRONMENT = {
    "repeat": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
}  # what torch's deterministic algorithms ask for


# ---- the command


def in_own_process(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a section found, or its error."""
    command = [sys.executable, __file__, "--one", name, *arguments]
    begin = time.perf_counter()
    environment = {**os.environ, **ENVIRONMENT.get(name, {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = (
        json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": done.stderr[-3000:]}
    )
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", help="write everything as JSON, after each section")
    parser.add_argument("--one", choices=SECTIONS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(SECTIONS[chosen.one](Bench(chosen.device, tiny=chosen.tiny))))
        return
    arguments = ["--device", chosen.device, *(["--tiny"] if chosen.tiny else [])]
    found = {}
    for name in chosen.only:
        found[name] = in_own_process(name, arguments)
        show(name, found[name])
        if chosen.out:
            with open(chosen.out, "w") as file:
                json.dump(found, file, indent=1)


def show(name: str, found: dict[str, Any]) -> None:
    rows = found.get("rows", [])
    print(
        f"\n{name}: "
        + ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("rows", "kernels"))
    )
    for row in rows:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
