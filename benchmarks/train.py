"""Training steps beside transformers' DeepseekV4 in a plain loop; how well rows are filled; what checkpoints cost.

    python benchmarks/train.py                    the tables of docs/performance.md (about 15 minutes)
    python benchmarks/train.py --quick            a smaller model and short rows: does it all work?
    python benchmarks/train.py --only steps --lengths 2048 --with train.recompute=blocks
    python benchmarks/train.py --profile 2048     where the time of a step goes

Both sides train the model of benchmarks/model.py from the same weights on the same rows: AdamW, gradients clipped,
routers and indexers frozen, float32, a document of random tokens in each row.  Their losses and norms must be ours, or
the benchmark ends with an error.  transformers has no MTP block, so that ours with one is told beside it.  Every
measurement is a process of its own, and memory is measured apart from time, as benchmarks/model.py does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import model as models
import torch
import torch.distributed.checkpoint as dcp

from dsv4ckpt import config, formats, shard, strictjson
from dsv4ckpt.inventory import lay_out, logical_tensors
from dsv4ckpt.names import Namespace
from dsv4ckpt.release import RELEASES
from dsv4ckpt.stop import StopFlag
from dsv4model.recipe import Recipe, read_recipe
from dsv4model.rows import order_of, packed
from dsv4model.trainer import Trainer, train

LR, CLIP, SEED = 1e-4, 1.0, 0
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32,
    "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "index_n_heads": 4, "index_head_dim": 32, "index_topk": 16, "vocab_size": 512,
}  # fmt: skip
MTP = {"num_nextn_predict_layers": 1, "compress_ratios": [*models.SIZES["compress_ratios"], 0]}
OURS, OURS_MTP, THEIRS = "ours", "ours+mtp", "theirs"
FIRST = 5e-5  # of losses and norms: sums in another order
LATER = 1e-2  # AdamW's first steps follow the signs of gradients that are nearly 0
ROW, NUM_DOCUMENTS = 2048, 8192
DISTRIBUTIONS = ((400, 1.0), (800, 0.5), (1200, 0.5))  # of lengths of documents
Found = dict[str, Any]


# ---- a step


class Learner(NamedTuple):
    """Makes step 0, 1, ... and tells the loss and the norm; and what stays in memory between steps."""

    step: Callable[[int], Found]
    state_bytes: int  # weights and moments


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sizes(what: str, quick: bool) -> Found:
    return {**(SMALL if quick else {}), **(MTP if what == OURS_MTP else {})}


def our_document(what: str, quick: bool) -> Found:
    """The config of a checkpoint in BF16."""
    storage = ("quantization_config", "expert_dtype")
    return {key: value for key, value in models.document(**sizes(what, quick)).items() if key not in storage}


def write_headers(document: Found, directory: Path) -> None:
    """A checkpoint with true headers that takes no room: random weights read no more of it."""
    family = RELEASES["flash"].family
    logicals = list(logical_tensors(config.read(document), family))
    stored = lay_out(logicals, family.table, formats.Storage.BF16, Namespace.TRANSFORMERS).stored.values()
    header = shard.encode_header((item.name, item.dtype, item.shape) for item in stored)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(formats.stored_bytes(item.dtype, item.shape) for item in stored))
    (directory / "config.json").write_bytes(strictjson.pretty(document))


def random_rows(length: int, count: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab, (count, length), generator=generator).tolist()


def our_recipe(place: Path, document: Found, length: int, steps: int, changes: Sequence[str]) -> Recipe:
    """A run of one row a step, the rows in order. Writes its checkpoint and its data."""
    write_headers(document, place)
    rows = random_rows(length, steps, document["vocab_size"])
    (place / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    text = f"""
        [model]\nsource = "{place}"\ninitialize = true
        [train]\nrun = "{place / "run"}"\nsteps = {steps}\nrows = 1\nseed = {SEED}
        [data]\nfiles = ["{place / "rows.jsonl"}"]\nkind = "tokens"\nlength = {length}\nshuffle = false
        [optimizer]\nlr = {LR}\nclip = {CLIP}\ndecay = "constant"
    """
    return read_recipe(text.encode(), changes)


def our_step(place: Path, what: str, length: int, steps: int, chosen: argparse.Namespace) -> Learner:
    document = our_document(what, chosen.quick)
    trainer = Trainer(our_recipe(place, document, length, steps, chosen.changes))

    def step(number: int) -> Found:
        made = trainer.step(number)
        return {"loss": made.loss, "norm": made.grad_norm}

    return Learner(step, bytes_of(trainer.state().values()))


def their_step(length: int, steps: int, chosen: argparse.Namespace) -> Learner:
    changes = sizes(THEIRS, chosen.quick)
    model = models.their_model(torch.float32, "cpu", **changes).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.gate." not in name and ".indexer." not in name)
    learners = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(learners, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    rows = torch.tensor(random_rows(length, steps, models.document(**changes)["vocab_size"]))

    def step(number: int) -> Found:
        ids = rows[number : number + 1]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learners, CLIP)
        adamw.step()
        adamw.zero_grad()
        return {"loss": float(loss.detach()), "norm": float(norm)}

    return Learner(step, bytes_of([*model.state_dict().values(), *learners, *learners]))


def steps_of(what: str, measured: str, length: int, chosen: argparse.Namespace) -> Found:
    """Losses and norms, and seconds of a step or what the process held at the most; of this process."""
    before = models._resident()
    count = 1 + chosen.repeat
    with tempfile.TemporaryDirectory() as place:
        if what == THEIRS:
            learner = their_step(length, count, chosen)
        else:
            learner = our_step(Path(place), what, length, count, chosen)
        told, seconds, most = [], [], 0
        for number in range(count):
            began = time.perf_counter()
            if measured == "memory":
                with models.Peak("cpu") as peak:
                    held = models._resident()
                    told.append(learner.step(number))
                most = held + peak.bytes - before
            else:
                told.append(learner.step(number))
            seconds.append(time.perf_counter() - began)
    beside = most - learner.state_bytes
    return {"told": told, "seconds": statistics.median(seconds[1:]), "bytes": most, "beside": beside}


def in_own_process(*arguments: str, chosen: argparse.Namespace, give_back: bool = False) -> Found:
    command = [sys.executable, __file__, "--one", *arguments, "--repeat", str(chosen.repeat)]
    command += ["--quick"] * chosen.quick + ["--with", *chosen.changes] * bool(chosen.changes)
    command += ["--dir", chosen.dir] if chosen.dir else []
    environment = {**os.environ, **(models.GIVE_BACK if give_back else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def steps(chosen: argparse.Namespace) -> None:
    print(
        "float32   |  tokens/s                      |  memory, GB                    |  beside weights and moments"
    )
    print("S         " + "|  ours    +MTP    theirs  ratio  " * 3)
    for length in chosen.lengths:
        found = {}
        for what in (OURS, OURS_MTP, *([THEIRS] if length < models.OURS_ONLY else [])):
            found[what] = in_own_process(what, "memory", str(length), chosen=chosen, give_back=True)
            if not chosen.quick:
                timed = in_own_process(what, "time", str(length), chosen=chosen)
                found[what] |= {"seconds": timed["seconds"]}
        if THEIRS in found:
            require_same(found[OURS]["told"], found[THEIRS]["told"])
        speed = {what: length / one["seconds"] for what, one in found.items()}
        row = [cells(speed, 0, False)]
        for key in ("bytes", "beside"):
            row.append(cells({what: one[key] / 1e9 for what, one in found.items()}, 2, True))
        print(f"{length:<10}|  " + "  |  ".join(row), flush=True)


def require_same(ours: list[Found], theirs: list[Found]) -> None:
    """The same computation, or there is nothing to compare."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for key in ("loss", "norm"):
            if not math.isclose(one[key], other[key], rel_tol=LATER if number else FIRST):
                raise SystemExit(f"step {number + 1}: {key} {one[key]} is not transformers' {other[key]}")


def cells(values: dict[str, float], digits: int, less_is_better: bool) -> str:
    shown = [
        f"{values[what]:<8.{digits}f}" if what in values else f"{'-':<8}" for what in (OURS, OURS_MTP, THEIRS)
    ]
    ratio = "-"
    if THEIRS in values:
        one, other = values[OURS], values[THEIRS]
        ratio = f"{other / one if less_is_better else one / other:.1f}"
    return "".join(shown) + f"{ratio:<5}"


# ---- rows


def lengths_of(count: int, median: int, spread: float) -> list[int]:
    """Log-normal, as documents are; cut at a row."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(2))
    return [min(ROW, max(8, round(median * math.exp(spread * value)))) for value in normal.tolist()]


def first_fit(lengths: Sequence[int], order: Sequence[int]) -> int:
    """How many rows, each document into the first that has room."""
    rooms: list[int] = []
    for index in order:
        row = next((row for row, room in enumerate(rooms) if room >= lengths[index]), len(rooms))
        if row == len(rooms):
            rooms.append(ROW)
        rooms[row] -= lengths[index]
    return len(rooms)


def packing(chosen: argparse.Namespace) -> None:
    count = 512 if chosen.quick else NUM_DOCUMENTS
    print(f"\n{count:,} documents, rows of {ROW:,}: places that are tokens")
    print("  median, spread of log  |  one a row  first fit  best fit")
    for median, spread in DISTRIBUTIONS:
        lengths, order = lengths_of(count, median, spread), order_of(count, SEED, 0)
        ways = (count, first_fit(lengths, order), len(packed(lengths, order, ROW)))
        filled = "".join(f"{f'{sum(lengths) / (rows * ROW):.1%}':<11}" for rows in ways)
        print(f"  {median:<8}{spread:<15}|  {filled}")


# ---- checkpoints


def checkpoints_of(chosen: argparse.Namespace) -> Found:
    """Seconds of steps and of whole runs; seconds of saving the same tensors plainly."""
    length, steps = (128, 3) if chosen.quick else (512, 6)
    document = our_document(OURS, chosen.quick)
    every = "checkpoint.every=1"
    ways = {"none": [], "every step": [every], "in the background": [every, "checkpoint.background=true"]}
    with tempfile.TemporaryDirectory(dir=chosen.dir) as name:
        place, found = Path(name), {}
        for way, changes in ways.items():
            changes = [*chosen.changes, *changes, f"train.run={place / way}"]
            trainer = Trainer(our_recipe(place, document, length, steps, changes))
            taken: list[float] = []
            began = time.perf_counter()
            train(
                trainer, StopFlag(), lambda _, seconds, taken=taken: taken.append(seconds), time.perf_counter
            )
            found[way] = {
                "step": statistics.median(taken),
                "rest": time.perf_counter() - began - sum(taken),
                "count": 1 if way == "none" else steps,  # a run ends with one
            }
            shutil.rmtree(place / way)
        return {"runs": found, "length": length, **plain_saves(trainer.state(), place)}


def plain_saves(state: dict[str, torch.Tensor], place: Path) -> Found:
    """Median seconds of saving these tensors until they are on the disk."""

    def by_torch(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def by_dcp(path: Path) -> None:
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(path), no_dist=True)

    found = {}
    for name, save in {"torch.save": by_torch, "dcp.save": by_dcp}.items():
        seconds = []
        for number in range(3):
            began = time.perf_counter()
            save(place / f"{name}-{number}")
            seconds.append(time.perf_counter() - began)
        found[name] = statistics.median(seconds)
    return {"plain": found, "bytes": bytes_of(state.values())}


def checkpoints(chosen: argparse.Namespace) -> None:
    found = in_own_process("checkpoints", "time", "0", chosen=chosen)
    plain = found["plain"]
    print(f"\na checkpoint of {found['bytes'] / 1e6:,.0f} MB; a step has {found['length']} tokens")
    print("  checkpoints         s a step  s beside steps, each  of torch.save  of dcp.save")
    for way, one in found["runs"].items():
        each = one["rest"] / one["count"]
        ratios = "  ".join(f"{each / plain[name]:<13.2f}" for name in plain)
        print(f"  {way:<20}{one['step']:<10.2f}{each:<22.2f}{ratios}")
    print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in plain.items()))


# ---- the command


def profile(length: int, chosen: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        step = our_step(Path(place), OURS_MTP, length, 2, chosen).step
        step(0)
        with torch.profiler.profile() as found:
            step(1)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 512 2048 4096")
    parser.add_argument("--repeat", type=int, help="steps after the first; the median counts. Default: 3")
    parser.add_argument("--quick", action="store_true", help="a small model, rows of 128 tokens, one step")
    parser.add_argument("--only", choices=list(PARTS), help="one part of the tables")
    parser.add_argument(
        "--with", dest="changes", nargs="+", default=[], metavar="KEY=VALUE", help="changes of our recipe"
    )
    parser.add_argument("--dir", help="where checkpoints go; a folder is made in it and removed")
    parser.add_argument("--profile", type=int, metavar="S", help="print where the time of a step goes")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.lengths = chosen.lengths or ([128] if chosen.quick else [512, 2048, 4096])
    chosen.repeat = chosen.repeat or (1 if chosen.quick else 3)
    if chosen.profile:
        profile(chosen.profile, chosen)
    elif chosen.one:
        what, measured, length = chosen.one
        whole = what == "checkpoints"
        print(json.dumps(checkpoints_of(chosen) if whole else steps_of(what, measured, int(length), chosen)))
    else:
        for name, part in PARTS.items():
            if chosen.only in (None, name):
                part(chosen)


PARTS = {"steps": steps, "packing": packing, "checkpoints": checkpoints}

if __name__ == "__main__":
    main()
