"""Training steps on a GPU at the true dimensions of Flash: beside transformers', and LoRA over packed weights.

    python benchmarks/train_gpu.py --out result.json           all of it (about 3 minutes on an H200)
    python benchmarks/train_gpu.py --only lora --source DIR    LoRA over a checkpoint in a released storage format
    python benchmarks/train_gpu.py --device cpu --tiny         the same at small sizes, to try the script

`full` trains the cut of benchmarks/model_gpu.py, in bfloat16 with random weights: Trainer, and transformers in a plain
loop, with fused AdamW, gradients clipped, routers and indexers frozen, a document of random tokens in each row.  `lora`
trains adapters of rank 16 over the same matrices as values and as codes, of a sample with four layers and MTP.

A row tells tokens per second, of the median step; the most memory that tensors took, weights and moments included; and
which part of the card's rate for a large bfloat16 product the weights' products alone come to: 6 per weight and token,
with LoRA 4, whatever is computed twice.  Each side is a process of its own, and one that fails is told by its error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model as models
import model_gpu
import torch
import train as train_cpu

from dsv4ckpt import config, formats, sample, shard, strictjson
from dsv4ckpt.inventory import lay_out, logical_tensors
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES
from dsv4model.loading import load, surveyed
from dsv4model.model import Block
from dsv4model.recipe import Recipe, read_recipe
from dsv4model.trainer import Trainer, read_data

LENGTHS, TINY_LENGTHS = [2048, 4096, 8192], [64, 128]
LORA_LENGTH, TINY_LORA_LENGTH = 4096, 128
WARM_UPS = 1
GB = 1e9
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
Found = dict[str, Any]
StepOf = Callable[[int], Found]  # makes a step and tells its loss and norm


# ---- checkpoints


def full_document(chosen: argparse.Namespace) -> Found:
    """The config of the cut in BF16."""
    cut = model_gpu.Bench(chosen.device, tiny=chosen.tiny).document(chosen.experts)
    return {key: value for key, value in cut.items() if key not in ("quantization_config", "expert_dtype")}


def write_full(chosen: argparse.Namespace, directory: Path) -> None:
    """Random weights as model_gpu makes them, in BF16."""
    document, family = full_document(chosen), RELEASES["flash"].family
    state = model_gpu.Bench(chosen.device, tiny=chosen.tiny).ours(chosen.experts).state_dict()
    logicals = list(logical_tensors(config.read(document), family))
    layout = lay_out(logicals, family.table, formats.Storage.BF16, Namespace.TRANSFORMERS)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(shard.encode_header((t.name, t.dtype, t.shape) for t in layout.stored.values()))
        for stored in layout.stored.values():
            values = state.pop(stored.name).detach()
            data = bytearray(formats.stored_bytes(stored.dtype, stored.shape))
            torch.frombuffer(data, dtype=DTYPES[stored.dtype]).copy_(values.flatten())
            file.write(data)
    (directory / "config.json").write_bytes(strictjson.pretty(document))


def write_lora(chosen: argparse.Namespace, directory: Path) -> None:
    """What dsv4 sample writes: codes and scales as released."""
    sizes = {"layers": 4, "experts": chosen.experts, "release_dims": not chosen.tiny}
    sample.write_sample(sample.plan_sample(sample.SampleOptions(**sizes)), str(directory))


# ---- sides


def recipe_of(source: Path, place: Path, length: int, steps: int, *, device: str, changes: str) -> Recipe:
    """A run of one row a step. Writes its data."""
    vocab = json.loads((source / "config.json").read_bytes())["vocab_size"]
    rows = train_cpu.random_rows(length, steps, vocab)
    data = place / f"rows-{length}.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    text = f"""
        [model]\nsource = "{source}"\ndevice = "{device}"\ndtype = "bfloat16"
        [train]\nrun = "{place / "run"}"\nsteps = {steps}\nrows = 1\nseed = {train_cpu.SEED}
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = {length}\nshuffle = false
        [optimizer]\nlr = {train_cpu.LR}\nclip = {train_cpu.CLIP}\ndecay = "constant"
    """
    return read_recipe(text.encode(), changes.split())


def sides_of(
    source: Path, lengths: list[int], chosen: argparse.Namespace, changes: str
) -> Iterator[tuple[Found, StepOf]]:
    """Our trainer, at each length and in each way."""
    steps = WARM_UPS + chosen.repeat
    with tempfile.TemporaryDirectory() as name:
        made = [
            recipe_of(source, Path(name), length, steps, device=chosen.device, changes=changes)
            for length in lengths
        ]
        trainer = Trainer(made[0])
        found, config = surveyed(str(source))

        def step(number: int) -> Found:
            told = trainer.step(number)
            return {"loss": told.loss, "norm": told.grad_norm}

        for recipe in made:
            trainer.rows = read_data(recipe, found, config).rows
            for precision, recomputes in (("high", False), ("high", True), ("highest", False)):
                if (precision, recomputes) != ("high", False) and recipe is not made[len(made) // 2]:
                    continue  # of one length
                trainer.recipe = dataclasses.replace(
                    recipe, model=dataclasses.replace(recipe.model, matmul=precision)
                )
                for block in trainer.model.modules():
                    if isinstance(block, Block):
                        block.recomputes = recomputes
                way = f"{precision}{', recompute' if recomputes else ''}"
                yield {"way": way, "tokens": recipe.data.length}, step


def their_sides(
    source: Path, lengths: list[int], chosen: argparse.Namespace
) -> Iterator[tuple[Found, StepOf]]:
    """transformers in a plain loop, at each length."""
    document = full_document(chosen)
    torch.set_float32_matmul_precision("high")
    weights = load(source, torch.bfloat16, device=chosen.device)
    model = model_gpu.theirs(document, weights, torch.bfloat16).train()
    del weights
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.gate." not in name and ".indexer." not in name)
    learners = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(learners, lr=train_cpu.LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for length in lengths:
        data = torch.tensor(train_cpu.random_rows(length, WARM_UPS + chosen.repeat, document["vocab_size"]))

        def step(number: int, data: torch.Tensor = data) -> Found:
            adamw.zero_grad()  # after a step that found no memory too
            ids = data[number : number + 1].to(chosen.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(learners, train_cpu.CLIP)
            adamw.step()
            adamw.zero_grad()
            return {"loss": float(loss.detach()), "norm": float(norm)}

        yield {"way": "high", "tokens": length}, step


SIDES = {  # of each part, what runs in a process of its own
    "full": {"ours": "train.what=full", "theirs": ""},
    "lora": {name: f"train.what=lora model.experts={name}" for name in ("dense", "packed")},
}


def rows_of(part: str, side: str, source: Path, chosen: argparse.Namespace) -> list[Found]:
    """Everything measured on one side."""
    rate = rate_of(chosen)
    if part == "full":
        lengths = chosen.lengths or (TINY_LENGTHS if chosen.tiny else LENGTHS)
    else:
        lengths = [TINY_LORA_LENGTH if chosen.tiny else LORA_LENGTH]
    products = (6 if part == "full" else 4) * active_weights(source)
    changes = SIDES[part][side]
    made = sides_of(source, lengths, chosen, changes) if changes else their_sides(source, lengths, chosen)
    rows = []
    for about, step in made:
        row = {"side": side, **about, **measured(step, about["tokens"], chosen)}
        if "tokens/s" in row:
            row["of the card"] = round(products * row["tokens/s"] / rate, 4)
        rows.append(row)
    return rows


def measured(step: StepOf, length: int, chosen: argparse.Namespace) -> Found:
    """The first step's loss and norm, seconds of the median step, and the most memory."""
    seconds = []
    try:
        with device_peak(chosen.device) as peak:
            told = [step(number) for number in range(WARM_UPS)]
            for number in range(WARM_UPS, WARM_UPS + chosen.repeat):
                began = time.perf_counter()
                step(number)  # ends with numbers on the CPU, and then so has the GPU
                if chosen.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        told = None
    if chosen.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    if told is None:
        return {"GB": "no memory"}
    return {"tokens/s": round(length / statistics.median(seconds)), "GB": round(peak() / GB, 2), **told[0]}


@contextlib.contextmanager
def device_peak(device: str) -> Iterator[Callable[[], int]]:
    """The most that tensors take of a GPU; on a CPU what the process takes beside what it had."""
    peak = models.Peak(device)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    with peak:
        yield lambda: held + peak.bytes


def active_weights(source: Path) -> float:
    """Weights that a token is multiplied with: of the experts, those that it goes to."""
    document = json.loads((source / "config.json").read_bytes())
    share = document["num_experts_per_tok"] / document["n_routed_experts"]
    heads = 1 + document["num_nextn_predict_layers"]
    return sum(
        weight.numel() * (share if weight.dim() == 3 else heads if name.startswith("lm_head") else 1)
        for name, weight in model_gpu.on_meta(document).named_parameters()
        if weight.dim() > 1 and "embed_tokens" not in name
    )


def rate_of(chosen: argparse.Namespace) -> float:
    """Of a large bfloat16 product here, per second."""
    size = 256 if chosen.tiny else 8192
    a, b = (torch.randn(size, size, device=chosen.device).bfloat16() for _ in range(2))
    return 2 * size**3 / models._median_seconds(lambda: a @ b, chosen.device, least=0.3)


# ---- the command


def in_own_process(part: str, side: str, source: Path, arguments: list[str]) -> Found:
    """Rows of one side, or its error."""
    command = [sys.executable, __file__, "--one", part, side, "--source", str(source), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-3000:]}
    return {"rows": json.loads(done.stdout.splitlines()[-1])}


def part_of(part: str, chosen: argparse.Namespace, arguments: list[str]) -> Iterator[Found]:
    """What each side found, beside its time."""
    with tempfile.TemporaryDirectory(dir=chosen.dir) as name:
        source = Path(chosen.source or name)
        if not chosen.source or part == "full":
            source = Path(name)
            (write_full if part == "full" else write_lora)(chosen, source)
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
        for side in SIDES[part]:
            began = time.perf_counter()
            found = in_own_process(part, side, source, arguments)
            yield {"side": side, **found, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of full. Default: {LENGTHS}")
    parser.add_argument("--experts", type=int, default=16, help="of what is made here. Default: 16")
    parser.add_argument("--repeat", type=int, default=4, help="steps that are measured. Default: 4")
    parser.add_argument("--source", help="lora: a checkpoint to take instead of making one")
    parser.add_argument("--dir", help="where checkpoints are made, and removed")
    parser.add_argument("--out", help="write everything as JSON, after each side")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        part, side = chosen.one
        print(json.dumps(rows_of(part, side, Path(chosen.source), chosen)))
        return
    arguments = ["--device", chosen.device, "--experts", str(chosen.experts), "--repeat", str(chosen.repeat)]
    arguments += ["--tiny"] * chosen.tiny
    arguments += ["--lengths", *map(str, chosen.lengths)] if chosen.lengths else []
    everything: dict[str, list[Found]] = {"about": [about(chosen)]}
    show("about", everything["about"][0])
    for part in chosen.only:
        everything[part] = []
        for found in part_of(part, chosen, arguments):
            everything[part].append(found)
            show(part, found)
            if chosen.out:
                Path(chosen.out).write_text(json.dumps(everything, indent=1))
        ratios(everything[part])


def about(chosen: argparse.Namespace) -> Found:
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else f"{os.cpu_count()} cores"
    return {"torch": torch.__version__, "device": name, "bfloat16 TFLOP/s": round(rate_of(chosen) / 1e12, 3)}


def show(part: str, found: Found) -> None:
    print(f"\n{part}: " + ", ".join(f"{key} {value}" for key, value in found.items() if key != "rows"))
    for row in found.get("rows", []):
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def ratios(sides: list[Found]) -> None:
    """The first side over the second, where both measured the same way and length; and their first step."""
    one, other = (
        {(row["way"], row["tokens"]): row for row in side.get("rows", []) if "tokens/s" in row}
        for side in sides
    )
    names = [side["side"] for side in sides]
    for key in (key for key in one if key in other):
        mine, its = one[key], other[key]
        print(
            f"  {names[0]} over {names[1]}, {key[1]} tokens, {key[0]}: "
            f"{mine['tokens/s'] / its['tokens/s']:.2f} of the speed, "
            f"{mine['GB'] / max(its['GB'], 1e-3):.2f} of the memory",
            flush=True,
        )
    firsts = [next(iter(side.get("rows", [])), {}) for side in sides]
    if all("loss" in row for row in firsts):
        apart = [abs(firsts[0][key] / firsts[1][key] - 1) for key in ("loss", "norm")]
        print(
            f"  first steps are apart by {apart[0]:.1e} of the loss and {apart[1]:.1e} of the norm",
            flush=True,
        )


if __name__ == "__main__":
    main()
