"""Exporting a run: what was trained comes out as it must, everything else as it was, and nothing after an error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tools
import torch
from dsv4cli.main import main
from safetensors.torch import load_file
from torch import Tensor

from dsv4ckpt import run as runs
from dsv4ckpt.errors import (
    BadDcp,
    BadHeader,
    Dsv4Error,
    ForeignOutput,
    Interrupted,
    MissingFile,
    NotConform,
    NotFinite,
    NotLossless,
    SourceChanged,
    Usage,
    VanishingChange,
)
from dsv4ckpt.formats import MANIFEST_NAME, OUR_NAMES, Target
from dsv4ckpt.stop import StopFlag
from dsv4model import adapter_export, peft
from dsv4model.exporting import planned
from dsv4model.loading import load, model_layout, quantized_modules, surveyed
from dsv4model.model import Model
from dsv4model.recipe import document_of, read_recipe
from dsv4model.runs import BadRun, RunDirectory
from dsv4model.simulate import fp4_weight
from dsv4model.trained import Trained, checkpoint_at
from dsv4model.trainer import Trainer, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

MB = 10**6
EXPERTS, HEAD = ".mlp.experts.", "lm_head.weight"
Q_B = "model.layers.0.self_attn.q_b_proj.weight"
LORA = ("train.what=lora", "lora.rank=4", "lora.alpha=12")


class Ended(NamedTuple):
    """A run that has ended."""

    path: Path
    trainer: Trainer


Train = Callable[..., Ended]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """trained(source, "train.qat=true"): two steps, made once for each set of changes. Nobody writes into the run."""
    base, known = tmp_path_factory.mktemp("runs"), dict[tuple[Any, ...], Ended]()
    lines = [
        json.dumps({"input_ids": [10 + (7 * number + step) % 50 for step in range(20)]})
        for number in range(9)
    ]
    (base / "tokens.jsonl").write_text("\n".join(lines))

    def made(source: Path, *changes: str) -> Ended:
        key = (source, *changes)
        if key not in known:
            path = base / str(len(known))
            text = f"""
                [model]\nsource = "{source}"
                [train]\nrun = "{path}"\nsteps = 2\nrows = 2\nmicro_rows = 2
                [data]\nfiles = ["{base / "tokens.jsonl"}"]\nkind = "tokens"\nlength = 32
                [optimizer]\nlr = 0.05\nclip = 0\n[checkpoint]\nevery = 1
            """
            trainer = Trainer(read_recipe(text.encode(), changes))
            train(trainer, StopFlag())
            known[key] = Ended(path, trainer)
        return known[key]

    return made


def frozen_but(source: Path, *learners: str) -> str:
    """The change of a recipe that lets only parameters whose names hold one of these learn."""
    with torch.device("meta"):
        names = [name for name, _ in Model(surveyed(source)[1]).named_parameters()]
    return (
        f"train.freeze={json.dumps([name for name in names if not any(part in name for part in learners)])}"
    )


def export(
    run: Path, dst: Path, *, step: int | None = None, workers: int = 2, **options: Any
) -> runs.Summary:
    """What the command does, in this process."""
    on_event, stop = options.pop("on_event", lambda event: None), options.pop("stop", None)
    directory = RunDirectory(str(run))
    with planned(directory, checkpoint_at(directory, step), **options) as (made, shown):
        return runs.execute(
            made, shown, str(dst), num_workers=workers, accept_changes=True, on_event=on_event, stop=stop
        )


def dsv4(*arguments: object) -> tuple[int, str]:
    """Exit code and words of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue()


def files(directory: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file but those that tell how the directory came about."""
    return {name: digest for name, digest in tiny.tree_of(directory).items() if name not in OUR_NAMES}


def tensors(directory: Path) -> dict[str, tiny.Tensor]:
    found: dict[str, tiny.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= tiny.read_shard(shard)
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors whose bytes differ."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    return sorted(name for name in mine if mine[name] != theirs[name])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def rounded_once(values: Tensor) -> Tensor:
    """float64 to bfloat16, to nearest even, of normal numbers: the oracle of codec.to_bf16."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 256).round(), exponent - 8).to(torch.bfloat16)


def logits_of(model: Model) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(5, 69).remainder(50)[None]).logits
    return found


# ---- what was not trained


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "flash-base", "flash-0731"])
def test_one_weight_that_learns_changes_its_own_bytes_and_no_others(
    release: str, made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    """MTP, DSpark stages, Base's copies, config and tokenizer among what stays."""
    source = made(release)
    done = trained(source, frozen_but(source, Q_B))
    summary = export(done.path, tmp_path / "out")
    name = "layers.0.attn.wq_b"
    assert {
        item.removesuffix(".weight").removesuffix(".scale") for item in differing(tmp_path / "out", source)
    } == {name}
    mine, theirs = files(tmp_path / "out"), files(source)
    assert mine.keys() == theirs.keys()
    (changed,) = (file for file in mine if mine[file] != theirs[file])
    assert changed == tiny.shard_of(source, f"{name}.weight").name
    assert [loss.name for loss in summary.losses] == [f"{name}.weight"] and summary.num_changed == 1
    master = dict(done.trainer.model.named_parameters())[Q_B].detach()
    found = load(tmp_path / "out", torch.float32).get_parameter(Q_B)
    # E4M3 has 4 significant bits: half of the last one, and as much again for bfloat16; below it half of 2**-9 scales
    least = float(master.abs().max()) / 448 * 4 * 2.0**-9
    assert bool(((found - master).abs() <= master.abs() * (2.0**-4 + 2.0**-8) + least).all())
    assert summary.losses[0].kept_share == pytest.approx(1, abs=0.1)
    assert dsv4("verify", tmp_path / "out")[0] == 0


@pytest.mark.slow
def test_copies_in_base_follow_what_was_trained_where_they_were_copies(
    made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    base = tiny.copy_of(made("flash-base"), tmp_path / "base")
    copy, kept = "mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"
    twin = tensors(base)["embed.weight"]
    tiny.edit_shard(tiny.shard_of(base, copy), lambda found: found.update({copy: twin}))
    done = trained(base, frozen_but(base, HEAD, "embed_tokens"))
    export(done.path, tmp_path / "out")
    assert differing(tmp_path / "out", base) == ["embed.weight", "head.weight", copy]
    found = tensors(tmp_path / "out")
    assert found[copy] == found["embed.weight"] and found[kept] == tensors(base)[kept]


# ---- what was trained in full


@pytest.mark.slow
def test_full_run_as_bf16_is_its_weights_rounded_once_and_loads_strictly_in_transformers(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    done = trained(smallest)
    export(done.path, tmp_path / "out", to="bf16")
    state = done.trainer.model.state_dict()
    found = load(tmp_path / "out", torch.float32).state_dict()
    assert found.keys() == state.keys()
    kinds = {name: tensor.dtype for name, tensor in tensors(tmp_path / "out").items()}
    for name, tensor in state.items():
        parts = [kind for stored, kind in kinds.items() if stored == name]
        is_rounded = tensor.is_floating_point() and parts == ["BF16"]
        expected = rounded_once(tensor.double()).float() if is_rounded else tensor
        assert parts and torch.equal(found[name], expected), name
    peer, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(told.values()), told
    for name, tensor in peer.state_dict().items():
        assert torch.equal(tensor.float(), found[name].to(tensor.dtype).float()), name


@pytest.mark.slow
def test_random_weights_count_as_trained_though_they_are_frozen(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    done = trained(smallest, "model.initialize=true", frozen_but(smallest, "model.norm"))
    with pytest.raises(NotLossless):
        export(done.path, tmp_path / "fp8", to="fp8")
    export(done.path, tmp_path / "out", to="bf16")
    found, state = load(tmp_path / "out"), done.trainer.model.state_dict()
    assert torch.equal(found.get_parameter(Q_B), rounded_once(state[Q_B].double()))


# ---- quantization-aware training


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantization_aware_training_exports_the_logits_that_it_trained(
    dtype: str, made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    """In float32 if only experts learn; in bfloat16 also with all that is stored as it is held, unlike norms."""
    source = made("flash")
    found, config = surveyed(source)
    codes = quantized_modules(model_layout(found, found.identity.storage))
    with torch.device("meta"):
        names = [name for name, _ in Model(config).named_parameters()]
    plain = [
        name
        for name in names
        if EXPERTS in name or not (name.removesuffix(".weight") in codes or "norm" in name)
    ]
    learners = [EXPERTS] if dtype == "float32" else plain
    done = trained(source, "train.qat=true", f"model.dtype={dtype}", frozen_but(source, *learners))
    summary = export(done.path, tmp_path / "out")
    assert summary.num_inexact == 0 and not any(loss.num_inexact for loss in summary.losses)
    again = load(tmp_path / "out", getattr(torch, dtype))
    for name, master in done.trainer.model.named_parameters():
        if EXPERTS in name:
            expected = fp4_weight(master.detach()).float()
            assert torch.equal(bits(again.get_parameter(name).detach().float()), bits(expected)), name
            assert not torch.equal(expected, load(source).get_parameter(name).float()), "it learned"
    assert torch.equal(logits_of(again), logits_of(done.trainer.model))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["native", "nvfp4", "mxfp4-ct", "bf16"])
def test_experts_of_any_size_come_out_on_the_grid_that_they_were_computed_on(
    to: str, smallest: Path, trained: Train, tmp_path: Path
) -> None:
    """Tiny and zero groups, negative zeros, the edges of a scale."""
    done = trained(smallest, "train.qat=true", frozen_but(smallest, EXPERTS))
    run = tmp_path / "run"
    shutil.copytree(done.path, run)
    state = {name: tensor.clone() for name, tensor in done.trainer.state().items()}
    name = next(name for name in state if name.endswith("down_proj") and EXPERTS in name)
    generator = torch.Generator().manual_seed(3)
    groups = state[name].view(-1, 32)
    spread = 4 if to == "nvfp4" else 60  # NVFP4's scales span less, and say so
    exponents = torch.randint(-spread, spread, (len(groups), 1), generator=generator)
    groups.copy_(torch.ldexp(torch.randn(groups.shape, generator=generator), exponents))
    groups[0], groups[1], groups[2, ::2] = 0.0, -0.0, -0.0
    groups[3], groups[4] = 1.75 * 2.0**-3, torch.tensor([6.0, 5.0, 7.0, -0.25] * 8)
    if to != "nvfp4":
        groups[5], groups[6], groups[7] = 2.0**-124, 6 * 2.0**-125, 2.0**-149
        groups[8] = torch.tensor([2.0**-120, -(2.0**-149), 2.0**-128, 0.0] * 8)
    written = RunDirectory(str(run)).write(3, state, {})
    export(run, tmp_path / "out", step=written.step, to=to, names="deepseek")
    found = load(tmp_path / "out", torch.float32).state_dict()[name.removeprefix("model.")]
    expected = fp4_weight(state[name])
    assert torch.equal(bits(found), bits(expected))


# ---- adapters


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "packed"])
def test_adapters_are_added_in_float64_and_rounded_once(
    experts: str, made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    source = made("flash")
    done = trained(source, *LORA, f"model.experts={experts}")
    export(done.path, tmp_path / "out", to="bf16")
    before, found = (load(path, torch.float64) for path in (source, tmp_path / "out"))
    expected = {name: tensor.double() for name, tensor in before.state_dict().items()}
    state, adapted, moved = done.trainer.parameters, set(), 0
    for name, lora_A in state.items():
        if not name.endswith(".lora_A"):
            continue
        lora_B = state[name[:-1] + "B"]
        weight = name.replace(".adapter.lora_A", ".weight").replace("_adapter.lora_A", "_proj")
        delta = 3.0 * (lora_B.detach().double() @ lora_A.detach().double())
        moved += float(delta.abs().max()) > 0
        expected[weight] = rounded_once(expected[weight] + delta).double()
        adapted.add(weight)
    assert moved > 0.8 * len(adapted)  # documents are too short for some compressors
    assert {name.split(".")[-2 if name.endswith(".weight") else -1] for name in adapted} >= {
        "o_a_proj", "o_b_proj", "q_b_proj", "kv_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor.double(), expected[name]), name
    merged, apart = logits_of(load(tmp_path / "out", torch.float32)), logits_of(done.trainer.model)
    was = logits_of(load(source, torch.float32))
    assert float((merged - apart).norm()) < 0.03 * float((apart - was).norm())


@pytest.mark.slow
def test_adapters_whose_change_would_vanish_are_refused_until_allowed(
    made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    source = made("flash")
    done = trained(source, *LORA, "optimizer.lr=1e-5", 'lora.targets=["*.q_b_proj"]')
    with pytest.raises(VanishingChange) as told:
        export(done.path, tmp_path / "no")
    assert "wq_b" in told.value.facts["found"]
    assert not (tmp_path / "no" / MANIFEST_NAME).exists() and not (tmp_path / "no" / tiny.INDEX).exists()
    summary = export(done.path, tmp_path / "out", allow_lossy=True)
    assert {loss.name.split(".")[-2] for loss in summary.losses} == {"wq_b"}
    assert all("wq_b" in name for name in differing(tmp_path / "out", source))
    assert (tmp_path / "out" / MANIFEST_NAME).exists()


@pytest.mark.slow
def test_advice_for_a_change_that_vanishes_is_true(
    made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    """As FP8, the weight keeps the share that the error told."""
    source = made("flash")
    done = trained(source, *LORA, "optimizer.lr=0.02", 'lora.targets=["*.layers.1.mlp.experts.down_proj"]')
    with pytest.raises(VanishingChange) as told:
        export(done.path, tmp_path / "no")
    found = re.search(r"--to fp8 --allow-lossy keeps (\d+)%", str(told.value.facts["do"]))
    assert found
    expert = int(str(told.value.facts["found"]).split(".experts.")[1].split(".")[0])
    for to in ("fp8", "bf16"):
        assert dsv4("export", done.path, tmp_path / to, "--to", to, "--allow-lossy")[0] == 0
    name = "model.layers.1.mlp.experts.down_proj"
    before, wanted, kept = (
        load(path, torch.float64).get_parameter(name)[expert].detach()
        for path in (source, tmp_path / "bf16", tmp_path / "fp8")
    )
    delta = wanted - before
    assert float(((kept - before) * delta).sum() / delta.square().sum()) == pytest.approx(
        int(found[1]) / 100, abs=0.05
    )


@pytest.mark.slow
def test_adapters_on_a_packed_base_as_native_leave_all_else_alone(
    made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    source = made("flash")
    done = trained(source, *LORA, "model.experts=packed", 'lora.targets=["*.layers.1.mlp.experts.down_proj"]',
                   "optimizer.lr=0.5")  # fmt: skip
    summary = export(done.path, tmp_path / "out")
    changed = differing(tmp_path / "out", source)
    assert changed and all(name.startswith("layers.1.ffn.experts.") and ".w2." in name for name in changed)
    assert all(loss.kept_share and loss.kept_share > 0.5 for loss in summary.losses)


@pytest.mark.slow
def test_merging_holds_the_adapter_of_one_expert_at_a_time(
    made: Callable[..., Path], trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all experts of Flash are gigabytes."""
    done, asked = trained(made("flash"), *LORA, 'lora.targets=["*.experts.*"]'), []
    rows = Trained.rows
    monkeypatch.setattr(
        Trained,
        "rows",
        lambda self, name, first, count: asked.append((name, count)) or rows(self, name, first, count),
    )
    export(done.path, tmp_path / "out", to="bf16")
    assert {name for name, _ in asked} == done.trainer.parameters.keys()
    for name, count in asked:
        assert count <= done.trainer.parameters[name].shape[-2], name


# ---- adapters, not merged


PARTS = ("*.self_attn.kv_proj", "*.self_attn.o_a_proj", "*.mlp.experts.*_proj")  # of the stack and of MTP


def adapted(trained: Train, source: Path) -> Ended:
    return trained(source, *LORA, f"lora.targets={json.dumps(PARTS)}")


@pytest.mark.slow
def test_adapters_apart_are_the_runs_own_numbers_as_peft_lays_them_out(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    """lora.Linear: A [r, in], B [out, r]. lora.ParamWrapper of E experts: A [E * r, in], B [out, r * E], r outer."""
    done, out = adapted(trained, smallest), tmp_path / "out"
    code, words = dsv4("export", done.path, out, "--adapter")
    assert code == 0, words
    found, expected = load_file(out / "adapter_model.safetensors"), dict[str, Tensor]()
    for name, parameter in done.trainer.parameters.items():
        owner, slot, leaf = name.rsplit(".", 2)
        values = parameter.detach()
        if slot != "adapter":  # of experts; two in one module: gate_up is wrapped first
            experts, rank = len(values), 4
            owner += ".base_layer" if slot == "gate_up_adapter" else ""
            if leaf == "lora_A":
                values = torch.cat([values[expert] for expert in range(experts)])
            else:
                columns = [values[expert][:, number] for number in range(rank) for expert in range(experts)]
                values = torch.stack(columns, 1)
        expected[f"base_model.model.{owner}.{leaf}.weight"] = values
    assert found.keys() == expected.keys() and any(".mtp." in name for name in found)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
        assert name.endswith("lora_A.weight") or float(tensor.abs().max()) > 0, "it learned"
    config = json.loads((out / "adapter_config.json").read_bytes())
    state = done.trainer.model.state_dict()
    learners = [name for name in state if "adapter" not in name and any(
        part in name for part in ("kv_proj.weight", "o_a_proj.weight", ".experts."))]  # fmt: skip
    named = [*config["target_parameters"], *(f"{name}.weight" for name in config["target_modules"])]
    assert sorted(named) == sorted(learners)
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["base_model_name_or_path"] == str(smallest)


@pytest.mark.slow
def test_adapters_apart_are_what_the_model_saves_and_load_into_it(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    done, out = adapted(trained, smallest), tmp_path / "out"
    assert dsv4("export", done.path, out, "--adapter")[0] == 0
    peft.save_adapters(done.trainer.model, tmp_path / "saved", str(smallest))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    model = load(smallest, torch.float32)
    peft.load_adapters(model, out)
    assert torch.equal(logits_of(model), logits_of(done.trainer.model))
    sums = (out / "dsv4.sha256").read_text().splitlines()
    names = {"adapter_model.safetensors", "adapter_config.json"}
    told = {item["file"]: item["sha256"] for item in json.loads((out / MANIFEST_NAME).read_bytes())["files"]}
    digests = tiny.tree_of(out)
    assert sums == [f"{digests[name]}  {name}" for name in sorted(names)]
    assert told == {name: digest for name, digest in digests.items() if name != MANIFEST_NAME}
    assert digests.keys() == names | {"dsv4.sha256", MANIFEST_NAME}


@pytest.mark.slow
def test_adapters_apart_continue_and_are_not_mixed_with_those_of_another_step(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    directory, out = RunDirectory(str(adapted(trained, smallest).path)), tmp_path / "out"
    made, stop = adapter_export.planned(directory, checkpoint_at(directory, 2)), StopFlag()
    other = adapter_export.planned(directory, checkpoint_at(directory, 1))

    def interrupt(count: int) -> None:
        stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        adapter_export.execute(made, str(out), on_bytes=interrupt, stop=stop)
    assert not out.exists()
    program = """
import os, signal, sys
from dsv4model import adapter_export, peft
from dsv4model.runs import RunDirectory
from dsv4model.trained import checkpoint_at
directory, write = RunDirectory(sys.argv[1]), peft.write_files
def killed(files, out, values, on_bytes):
    out.publish_bytes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write(files, out, values, on_bytes)
peft.write_files = killed
adapter_export.execute(adapter_export.planned(directory, checkpoint_at(directory, 2)), sys.argv[2])
"""
    killed = subprocess.run([sys.executable, "-c", program, directory.path, str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(out)) == [".dsv4", "adapter_model.safetensors"]
    with pytest.raises(ForeignOutput):
        adapter_export.execute(other, str(out))
    assert adapter_export.execute(made, str(out)).num_resumed == 1
    adapter_export.execute(made, str(tmp_path / "whole"))
    assert tiny.tree_of(out) == tiny.tree_of(tmp_path / "whole")
    assert adapter_export.execute(made, str(out)).was_complete
    with pytest.raises(ForeignOutput):
        adapter_export.execute(other, str(out))
    assert tiny.tree_of(out) == tiny.tree_of(tmp_path / "whole")


@pytest.mark.slow
def test_adapters_that_are_not_finite_are_not_written(smallest: Path, trained: Train, tmp_path: Path) -> None:
    done, run = adapted(trained, smallest), tmp_path / "run"
    shutil.copytree(done.path, run)
    name = next(name for name in done.trainer.state() if name.endswith("down_adapter.lora_B"))
    rewritten(run, lambda state: state[name][-1].fill_(float("nan")), done.trainer)
    code, words = dsv4("export", run, tmp_path / "out", "--adapter")
    assert code == NotFinite.exit_code and "experts.down_proj" in words
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapters_apart_are_of_runs_that_have_some_and_of_nothing_that_merging_asks(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    code, words = dsv4("export", trained(smallest).path, tmp_path / "out", "--adapter")
    assert code == Usage.exit_code and "the run has no adapters" in words and "leave out --adapter" in words
    run = adapted(trained, smallest).path
    for flag in (
        ("--to", "native"),
        ("--names", "deepseek"),
        ("--scale-policy", "keep"),
        ("--max-shard-size", "5GB"),
        ("--workers", "2"),
        ("--allow-lossy",),
    ):
        code, words = dsv4("export", run, tmp_path / "out", "--adapter", *flag)
        assert code == Usage.exit_code and f"{flag[0]} goes with merged weights" in words
    code, words = dsv4("export", run, tmp_path / "out", "--adapter", "--dry-run")
    assert code == 0 and "this was a dry run" in words and not os.listdir(tmp_path)


# ---- other formats


@pytest.mark.slow
@pytest.mark.parametrize("to", ["fp8", "fp8-f32scale", "nvfp4", "mxfp4-ct"])
def test_format_that_cannot_be_measured_is_refused_before_anything_is_written(
    to: str, smallest: Path, trained: Train, tmp_path: Path
) -> None:
    run = trained(smallest).path
    code, words = dsv4("export", run, tmp_path / "out", "--to", to)
    assert code == NotLossless.exit_code and "--allow-lossy" in words and "--source" not in words
    assert not (tmp_path / "out").exists()
    code, words = dsv4("export", run, tmp_path / "out", "--to", to, "--allow-lossy")
    assert code == 0, words
    found, state = (model.state_dict() for model in (load(tmp_path / "out"), trained(smallest).trainer.model))
    for name, wanted in state.items():
        assert float((found[name].float() - wanted).norm()) <= 0.2 * float(wanted.float().norm()), name


@pytest.mark.slow
def test_other_formats_take_what_they_can_hold(smallest: Path, trained: Train, tmp_path: Path) -> None:
    """Without a word: what is stored as it is, and FP4 experts in formats that have FP4."""
    norm = trained(smallest, frozen_but(smallest, "model.norm")).path
    for to in ("fp8", "nvfp4"):
        assert export(norm, tmp_path / f"norm-{to}", to=to).num_inexact == 0
    experts = trained(smallest, "train.qat=true", frozen_but(smallest, EXPERTS)).path
    assert not any(loss.num_inexact for loss in export(experts, tmp_path / "ct", to="mxfp4-ct").losses)
    with pytest.raises(NotLossless, match=r"experts.*cannot be measured"):
        export(experts, tmp_path / "fp8", to="fp8")


@pytest.mark.slow
def test_run_from_a_conversion_cannot_be_measured_and_says_how_it_can(
    made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    source = made("flash", Target.BF16)
    done = trained(source, frozen_but(source, Q_B))
    with pytest.raises(NotLossless) as told:
        export(done.path, tmp_path / "out")
    assert "dsv4 convert --to native --source" in told.value.facts["do"] and not (tmp_path / "out").exists()
    export(done.path, tmp_path / "bf16", to="bf16", names="deepseek")
    code, words = dsv4(
        "convert", tmp_path / "bf16", tmp_path / "native", "--to", "native", "--source", made("flash")
    )
    assert code == 0, words
    assert {name.rpartition(".")[0] for name in differing(tmp_path / "native", made("flash"))} == {
        "layers.0.attn.wq_b"
    }
    norm = trained(source, frozen_but(source, "model.norm"))
    export(norm.path, tmp_path / "norm")  # the sidecar tells the rest
    assert differing(tmp_path / "norm", made("flash")) == ["norm.weight"]


# ---- what is refused


def reworded(path: Path, edit: Callable[[Any], object]) -> None:
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))


def rewritten(
    run: Path, edit: Callable[[dict[str, Tensor]], object], trainer: Trainer, step: int = 3
) -> None:
    """Another checkpoint, the newest, of an edited state."""
    state = {name: tensor.clone() for name, tensor in trainer.state().items()}
    edit(state)
    RunDirectory(str(run)).write(step, state, {})


def _cut(run: Path, _: Trainer) -> None:
    file = run / "checkpoints/step-2/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def _cut_and_agreed(run: Path, trainer: Trainer) -> None:
    _cut(run, trainer)
    size = (run / "checkpoints/step-2/__0_0.distcp").stat().st_size
    reworded(run / "checkpoints/step-2/run.json", lambda about: about["files"].update({"__0_0.distcp": size}))


def _source_cut(run: Path, trainer: Trainer) -> None:
    source = tiny.copy_of(Path(trainer.recipe.model.source), run / "source")
    shard = tiny.shard_of(source, "head.weight")
    tiny.replace(shard, shard.read_bytes()[:-1])
    reworded(run / "recipe.json", lambda recipe: recipe["model"].update(source=str(source)))


def _hostile(run: Path, _: Trainer) -> None:
    """As large as it was, so that its size tells nothing."""
    file = run / "checkpoints/step-2/.metadata"
    attack = b"\x80\x04cos\nsystem\n(X\x0e\x00\x00\x00touch executed\x8c\x00tR."
    file.write_bytes(attack.ljust(file.stat().st_size, b"."))


FULL: dict[str, tuple[type[Dsv4Error], Callable[[Path, Trainer], object]]] = {
    "no recipe": (MissingFile, lambda run, _: (run / "recipe.json").unlink()),
    "recipe is no JSON": (BadRun, lambda run, _: (run / "recipe.json").write_text("{")),
    "unknown key": (Usage, lambda run, _: reworded(run / "recipe.json", lambda r: r["train"].update(x=1))),
    "no checkpoints": (MissingFile, lambda run, _: shutil.rmtree(run / "checkpoints")),
    "cut": (BadRun, _cut),
    "cut, and run.json agrees": (BadDcp, _cut_and_agreed),
    "file gone": (BadRun, lambda run, _: (run / "checkpoints/step-2/__0_0.distcp").unlink()),
    "hostile": (BadDcp, _hostile),
    "no about": (BadRun, lambda run, _: (run / "checkpoints/step-2/run.json").write_text("{}")),
    "source gone": (
        MissingFile,
        lambda run, _: reworded(run / "recipe.json", lambda r: r["model"].update(source=str(run / "gone"))),
    ),
    "source cut": (BadHeader, _source_cut),
    "recipe of adapters": (
        BadRun,
        lambda run, _: reworded(run / "recipe.json", lambda r: r["train"].update(what="lora")),
    ),
    "a weight is missing": (
        BadRun,
        lambda run, trainer: rewritten(run, lambda state: state.pop(f"model.{HEAD}"), trainer),
    ),
    "a weight too many": (
        BadRun,
        lambda run, trainer: rewritten(run, lambda state: state.update({"model.x": torch.ones(2)}), trainer),
    ),
    "a weight of integers": (
        BadRun,
        lambda run, trainer: rewritten(
            run, lambda s: s.update({f"model.{HEAD}": s[f"model.{HEAD}"].to(torch.int64)}), trainer
        ),
    ),
    "a weight of another shape": (
        BadRun,
        lambda run, trainer: rewritten(
            run, lambda s: s.update({f"model.{HEAD}": s[f"model.{HEAD}"][:-1].contiguous()}), trainer
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
def test_run_that_is_not_whole_is_refused_and_nothing_is_written(
    what: str, smallest: Path, trained: Train, tmp_path: Path
) -> None:
    kind, damage = FULL[what]
    done = trained(smallest)
    run = tmp_path / "run"
    shutil.copytree(done.path, run)
    damage(run, done.trainer)
    with contextlib.chdir(tmp_path):
        code, words = dsv4("export", run, tmp_path / "out")
        assert code == kind.exit_code and "do " in words and "Traceback" not in words, words
        assert words.startswith(kind.__name__) or f"{kind.__name__}:" in words, words
    assert sorted(os.listdir(tmp_path)) == ["run"]


@pytest.mark.slow
def test_adapters_of_another_rank_than_the_recipe_says_are_refused(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    """Their scale would be another one."""
    run = tmp_path / "run"
    shutil.copytree(trained(smallest, *LORA).path, run)
    reworded(run / "recipe.json", lambda recipe: recipe["lora"].update(rank=8))
    with pytest.raises(BadRun):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_and_steps_that_are_not_there_are_refused(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    code, words = dsv4("export", tmp_path / "nothing", tmp_path / "out")
    assert code == MissingFile.exit_code, words
    code, words = dsv4("export", trained(smallest).path, tmp_path / "out", "--step", 7)
    assert code == MissingFile.exit_code and "1, 2" in words
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_source_of_another_model_is_refused(
    smallest: Path, made: Callable[..., Path], trained: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained(smallest).path, run)
    reworded(run / "recipe.json", lambda recipe: recipe["model"].update(source=str(made("flash"))))
    with pytest.raises((BadRun, NotConform)):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what is stopped, continued and told apart


@pytest.mark.slow
def test_export_that_was_interrupted_continues_to_the_same_bytes(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    run = trained(smallest).path
    export(run, tmp_path / "whole", max_shard_bytes=10**5)
    stop = StopFlag()

    def on_event(event: runs.Event) -> None:
        if isinstance(event, runs.FileDone):
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted):
        export(run, tmp_path / "out", max_shard_bytes=10**5, workers=1, on_event=on_event, stop=stop)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert export(run, tmp_path / "out", max_shard_bytes=10**5).num_resumed >= 1
    assert tiny.tree_of(tmp_path / "out") == tiny.tree_of(tmp_path / "whole")
    assert export(run, tmp_path / "out", max_shard_bytes=10**5).was_complete


@pytest.mark.slow
def test_export_that_was_killed_continues_to_the_same_bytes(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    run = trained(smallest).path
    export(run, tmp_path / "whole")
    program = """
import os, signal, sys
from dsv4ckpt import run
from dsv4model.exporting import planned
from dsv4model.runs import RunDirectory
from dsv4model.trained import checkpoint_at
directory = RunDirectory(sys.argv[1])
with planned(directory, checkpoint_at(directory, None)) as (made, shown):
    run.execute(made, shown, sys.argv[2], num_workers=1, accept_changes=True,
                on_event=lambda event: isinstance(event, run.FileDone) and os.kill(os.getpid(), signal.SIGKILL))
"""
    command = [sys.executable, "-c", program, str(run), str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert export(run, tmp_path / "out").num_resumed >= 1
    assert tiny.tree_of(tmp_path / "out") == tiny.tree_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("is_finished", [False, True])
def test_other_step_is_not_taken_for_what_an_export_began_with(
    is_finished: bool, smallest: Path, trained: Train, tmp_path: Path
) -> None:
    """Also if they differ in a row that no sample looks at."""
    done, stop = trained(smallest), StopFlag()
    run = tmp_path / "run"
    shutil.copytree(done.path, run)
    name = f"model.{HEAD}"
    rewritten(run, lambda state: None, done.trainer)
    rewritten(run, lambda state: state[name][-1].neg_(), done.trainer, step=4)
    about = json.loads((run / "checkpoints/step-3/run.json").read_bytes())
    assert about["files"] == json.loads((run / "checkpoints/step-4/run.json").read_bytes())["files"]

    def on_event(event: runs.Event) -> None:
        if isinstance(event, runs.FileDone) and not is_finished:
            stop.signal_number = signal.SIGTERM

    with contextlib.nullcontext() if is_finished else pytest.raises(Interrupted):
        export(run, tmp_path / "out", step=3, workers=1, on_event=on_event, stop=stop)
    before = tiny.tree_of(tmp_path / "out")
    with pytest.raises((ForeignOutput, SourceChanged)):
        export(run, tmp_path / "out", step=4)
    assert tiny.tree_of(tmp_path / "out") == before


@pytest.mark.slow
def test_checkpoint_that_changes_while_it_is_read_is_noticed_before_the_end(
    smallest: Path, trained: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained(smallest).path, run)

    def on_event(event: runs.Event) -> None:
        if isinstance(event, runs.FileDone):
            os.utime(run / "checkpoints/step-2/__0_0.distcp")

    with pytest.raises(SourceChanged):
        export(run, tmp_path / "out", workers=1, on_event=on_event)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


# ---- memory

MEASURED = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from peaks import kilobytes
from dsv4ckpt import run
from dsv4model.exporting import planned
from dsv4model.runs import RunDirectory
from dsv4model.trained import checkpoint_at

def export(path, out, to):
    directory = RunDirectory(path)
    with planned(directory, checkpoint_at(directory, None), to=to) as (made, shown):
        run.execute(made, shown, out, num_workers=1, accept_changes=True)

torch.set_num_threads(1)
small, large, out = sys.argv[2:5]
told = {}
for to in ("native", "bf16"):
    export(small, f"{out}/small-{to}", to)  # what is imported and made once, such as tables
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    export(large, f"{out}/large-{to}", to)
    told[to] = (kilobytes("VmHWM") - before) * 1024
print(json.dumps(told))
"""


def _run_of(source: Path, path: Path) -> int:
    """A run's directory as if nothing had been learned. Returns the bytes of its weights."""
    model = load(source)
    directory, text = RunDirectory(str(path)), f'[model]\nsource = "{source}"\ndtype = "bfloat16"\n'
    text += f'[train]\nrun = "{path}"\nsteps = 1\nqat = true\n[data]\nfiles = ["none"]\nkind = "tokens"\n'
    with directory.locked():
        directory.write_recipe(document_of(read_recipe(text.encode())))
        directory.write(1, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, {})
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_exporting_holds_no_model(tmp_path: Path) -> None:
    sizes = {"layers": 1, "experts": 16, "hidden": 1024, "intermediate": 1024, "vocab": 30000}
    with tools.roomy(1500 * MB, tmp_path) as base:
        small, large = (
            tiny.make_sample("flash", base / "small"),
            tiny.make_sample("flash", base / "large", **sizes),
        )
        _run_of(small, base / "small-run")
        model = _run_of(large, base / "large-run")
        command = [
            sys.executable,
            "-c",
            MEASURED,
            Path(__file__).parents[1],
            base / "small-run",
            base / "large-run",
            base,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    assert model > 300 * MB
    assert max(json.loads(done.stdout).values()) < 150 * MB, done.stdout
