"""dsv4 finetune from the outside: what it says, what it leaves, which code it exits with; recipes and pages run.

The oracles: files in a run's directory, read by json, ElementTree and torch; the model's own parameters.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import forked
import pytest
import tiny
import torch
from in_process import Dsv4
from in_process import dsv4 as dsv4

import dsv4model
from dsv4ckpt.stop import StopFlag
from dsv4model import recipe, trainer
from dsv4model.recipe import Kind, read_recipe
from dsv4model.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


def commands_of(text: str) -> list[str]:
    """What the first console block of a text tells to type."""
    (block,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)[:1]
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def forked_line(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A line that is a command and nothing else."""
    program, *arguments = shlex.split(line)
    assert program == "dsv4"
    with contextlib.chdir(cwd):
        return forked.dsv4(*arguments)


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A line as one types it, with the installed command."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True)


def losses_of(run: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def lines_of(svg: Path) -> list[int]:
    """Points of each line in a picture."""
    root = ElementTree.parse(svg).getroot()
    return [len(line.attrib["points"].split()) for line in root.iter(f"{SVG}polyline")]


def words_of(svg: Path) -> str:
    return " | ".join(text.text or "" for text in ElementTree.parse(svg).getroot().iter(f"{SVG}text"))


# ---- the README's lines, and what they leave


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """The first block below "Train", typed in a directory that has the recipes."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "recipes", place / "recipes")
    done = [shell(line, place) for line in commands_of(README.partition("\n## Train\n")[2])]
    return place, done


@pytest.mark.slow
def test_two_lines_of_the_readme_end_in_a_verified_checkpoint(typed: Any) -> None:
    place, done = typed
    assert [item.returncode for item in done] == [0, 0], done[-1].stderr
    assert done[0].stdout.endswith("losses    runs/validate/loss.svg\nnext: dsv4 export runs/validate DST\n")
    assert done[1].stdout.endswith("ok\n")
    same, changed = [
        json.loads((place / name / "config.json").read_bytes()) for name in ("demo/flash", "tuned")
    ]
    assert same == changed
    spoken = shell("dsv4 generate tuned --text 'The river' --max-new-tokens 8 --json", place)
    assert spoken.returncode == 0 and json.loads(spoken.stdout)["num_new_tokens"] == 8


@pytest.mark.slow
def test_validate_learns_its_text_with_every_kind_of_layer(typed: Any) -> None:
    place, _ = typed
    config = json.loads((place / "demo/flash/config.json").read_bytes())
    assert config["num_hidden_layers"] == 4 and {0, 4, 128} == set(config["compress_ratios"])
    assert config["num_hash_layers"] and config["num_nextn_predict_layers"] == 1
    run = place / "runs/validate"
    for key, share in (("loss", 0.2), ("mtp_loss", 0.4)):
        told = losses_of(run, key)
        assert len(told) == 100 and all(map(math.isfinite, told))
        assert told[0] == pytest.approx(math.log(512), rel=0.15)  # chance
        assert sum(told[-8:]) < share * sum(told[:8])  # an epoch
    assert lines_of(run / "loss.svg") == [100, 100]
    assert "validate: full" in words_of(run / "loss.svg") and "MTP loss" in words_of(run / "loss.svg")


HOLDING = """
import sys
sys.path.insert(0, sys.argv[1])
import peaks
from dsv4ckpt.stop import StopFlag
from dsv4model.recipe import read_recipe
from dsv4model.trainer import Trainer, train
with open(sys.argv[2], "rb") as file:
    made = read_recipe(file.read(), sys.argv[3:])
train(Trainer(made), StopFlag(), lambda step, seconds: print(peaks.kilobytes("VmRSS")))
"""


@pytest.mark.slow
def test_validate_holds_its_memory(flash: Path, tmp_path: Path) -> None:
    changes = [f"model.source={flash}", f"train.run={tmp_path / 'run'}", "train.steps=40"]
    changes.append(f"data.files={ROOT / 'recipes' / 'validate.jsonl'}")
    command = [
        sys.executable,
        "-c",
        HOLDING,
        str(ROOT / "tests"),
        str(ROOT / "recipes" / "validate.toml"),
        *changes,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = [int(line) for line in done.stdout.split()]
    assert len(held) == 40
    assert max(held[20:]) < 1.1 * max(held[:20])


@pytest.mark.slow
def test_session_of_the_page_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    done = [forked_line(line, tmp_path) for line in commands_of(PAGE)]
    assert [item.returncode for item in done] == [0] * 6, [item.stderr for item in done]
    assert "nothing was loaded or written" in done[1].stdout
    assert "continues after step 4" in done[3].stdout and "step 5 done from step 4" in done[3].stdout
    assert done[5].stdout.endswith("ok\n")


def test_lines_of_data_on_the_page_are_of_the_kinds_in_their_order(flash: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    tokenizer = Tokenizer.open(str(flash))
    lines, file = block.splitlines(), tmp_path / "line.jsonl"
    kinds = (Kind.CHAT, Kind.TEXT, Kind.HELLASWAG, Kind.TOKENS)
    assert len(lines) == len(kinds)
    for kind, line in zip(kinds, lines, strict=True):
        file.write_text(line)
        data = recipe.DataPart(files=(str(file),), kind=kind)
        (document,) = trainer.read_corpus(data.files, data, tokenizer, 512).documents
        assert 0 < sum(document.counted) < len(document)


def test_promises_of_the_page_are_held_by_tests_that_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) >= 10 and named <= there


def test_page_and_recipes_name_only_keys_that_are_there() -> None:
    known = {told.name for told in recipe.every_key()}
    parts = "|".join(sorted({name.partition(".")[0] for name in known}))
    text = "\n".join([PAGE, README, *(file.read_text() for file in RECIPES)])
    named = set(re.findall(rf"(?<![\w./-])((?:{parts})\.[a-z_]+)(?=[=`\" ])", text))
    assert len(named) > 15
    assert named - known - {"model.safetensors", "model.state_dict"} == set()


# ---- recipes

CHAT = [
    ("What is a checkpoint?", "Names, and numbers behind each name."),
    ("Where does the river begin?", "At a spring below the ridge."),
    ("Name three colours.", "Red, grey and blue."),
    ("When does it open?", "At nine."),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four documents of each kind that recipes ask for."""
    place = tmp_path_factory.mktemp("data")
    made = {
        "chat": [
            {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
            for one, other in CHAT
        ],
        "hellaswag": [
            {"ctx": one, "endings": ["No.", other, "Yes.", "So."], "label": 1} for one, other in CHAT
        ],
        "text": [{"text": f"{one} {other}"} for one, other in CHAT],
        "tokens": [{"input_ids": [10 + (index * 7 + at) % 50 for at in range(30)]} for index in range(4)],
    }
    for kind, lines in made.items():
        (place / kind).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {kind: place / kind for kind in made}


def test_recipes_are_those_of_the_page_and_tell_how_they_are_run() -> None:
    assert {file.stem for file in RECIPES} == {
        "validate",
        "sft",
        "lora-packed",
        "hellaswag",
        "pretrain-small",
    }
    for file in RECIPES:
        assert f"`recipes/{file.name}`" in PAGE
        assert f"#   dsv4 finetune recipes/{file.name}" in file.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_trains_the_sample(file: Path, flash: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """Each step sees all documents, so that losses of steps can be compared."""
    kind = tomllib.loads(file.read_text(encoding="utf-8"))["data"]["kind"]
    files = f'data.files=["{data[kind]}"]'
    changes = [
        f"model.source={flash}",
        f"train.run={tmp_path / 'run'}",
        files,
        "train.steps=4",
        "data.length=64",
    ]
    changes += ["data.pack=false", "train.rows=4", "train.micro_rows=2", "optimizer.warmup=0"]
    if kind == "hellaswag":
        changes += [f'data.eval_files=["{data[kind]}"]', "log.eval_every=2"]
    made = read_recipe(file.read_bytes(), changes)
    outcome = trainer.train(trainer.Trainer(made), StopFlag())
    told = losses_of(tmp_path / "run"), losses_of(tmp_path / "run", "mtp_loss")
    assert all(len(values) == 4 and all(map(math.isfinite, values)) for values in told)
    assert told[0][0] > told[0][1] > told[0][2] > told[0][3]
    assert (outcome.eval_loss is not None) == (kind == "hellaswag")


@pytest.mark.slow
def test_steps_of_fine_tuning_are_rounded_away_in_bfloat16(
    flash: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """Why sft.toml says float32."""
    stayed = {}
    for dtype in ("float32", "bfloat16"):
        changes = [
            f"model.source={flash}",
            f"train.run={tmp_path / dtype}",
            "train.steps=2",
            "data.length=64",
        ]
        changes += [
            f'data.files=["{data["chat"]}"]',
            "train.rows=2",
            f"model.dtype={dtype}",
            "optimizer.warmup=0",
        ]
        made = trainer.Trainer(read_recipe((ROOT / "recipes/sft.toml").read_bytes(), changes))
        name = "model.layers.3.self_attn.q_a_proj.weight"
        before = made.parameters[name].detach().clone()
        made.step(0)
        stayed[dtype] = float((made.parameters[name] == before).float().mean())
    assert stayed["float32"] < 0.05 and stayed["bfloat16"] > 0.5


# ---- what the command says


def recipe_in(place: Path, source: Path, data: Path) -> Path:
    """A short run on the smallest sample."""
    file = place / "recipe.toml"
    file.write_text(f"""
        [model]\nsource = "{source}"
        [train]\nrun = "{place / "run"}"\nsteps = 3\nrows = 2
        [data]\nfiles = ["{data}"]\nkind = "tokens"\nlength = 32
        [optimizer]\nlr = 1e-3
    """)
    return file


@pytest.fixture
def written(smallest: Path, data: dict[str, Path], tmp_path: Path) -> Path:
    return recipe_in(tmp_path, smallest, data["tokens"])


def test_dry_run_counts_the_models_parameters_and_touches_nothing(
    written: Path,
    smallest: Path,
    dsv4: Dsv4,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = dsv4model.load(str(smallest))
    monkeypatch.delattr(trainer, "load")
    done = dsv4("finetune", written, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert not (written.parent / "run").exists()
    found = done.document
    learning = {name: one for name, one in model.named_parameters() if ".gate." not in name}
    assert not any("indexer" in name for name in learning)  # a sliding-window layer has none
    assert found["learning"] == sum(one.numel() for one in learning.values())
    assert sum(group["num"] for group in found["parameters"]) == sum(
        one.numel() for one in model.state_dict().values()
    )
    assert found["bytes"]["gradients"] == 4 * found["learning"]
    assert found["bytes"]["optimizer"] == 8 * found["learning"]
    assert found["data"] == {"documents": 4, "tokens": 120, "learned": 116, "rows_per_epoch": 4,
                             "filled": 120 / 128, "left": {}, "bad_lines": []}  # fmt: skip
    assert found["recipe"]["train"]["steps"] == 3
    told = dsv4("finetune", written, "--dry-run", "-v").out
    num = sum(group["num"] for group in found["parameters"])
    assert re.search(rf"\n  together +{num:,} +{found['learning']:,}\n", told)
    assert "\n  optimizer.eps = 1e-08\n" in told and told.endswith(
        "nothing was loaded or written: this was a dry run\n"
    )


@pytest.mark.slow
def test_dry_run_divides_a_release_over_ranks_without_its_files(dsv4: Dsv4) -> None:
    """The page's two commands, and its two numbers."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "release:flash" in line]
    per_rank = []
    for line in commands:
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in line.split()[1:]]
        done = dsv4(*words, "--json")
        assert done.code == 0, done.err
        found = done.document
        stages = found["stages"]
        assert stages[0]["layers"][0] == 0 and stages[-1]["layers"][1] == 43
        assert all(one["layers"][1] == other["layers"][0] for one, other in itertools.pairwise(stages))
        assert sum(stage["ranks"] for stage in stages) == int(words[words.index("--ranks") + 1])
        for kind in ("weights", "gradients", "optimizer"):
            held = sum(stage["ranks"] * stage["bytes_per_rank"][kind] for stage in stages)
            assert held >= found["bytes"][kind] * (1 - 1e-6)  # nobody keeps nothing of it
        per_rank.append(max(sum(stage["bytes_per_rank"].values()) for stage in stages))
    assert len(per_rank) == 2
    packed, full = (f"{size / 1e9:.0f} GB" for size in per_rank)
    assert f"is {packed} a rank, full AdamW in float32 on 64 ranks {full}." in PAGE


def test_release_on_paper_is_not_trained_and_ranks_are_for_dry_runs(written: Path, dsv4: Dsv4) -> None:
    done = dsv4("finetune", written, "model.source=release:flash")
    assert done.code == 2 and "add --dry-run" in done.err
    done = dsv4("finetune", written, "model.source=release:flesh", "--dry-run")
    assert done.code == 2 and "flash-base" in done.err
    done = dsv4("finetune", written, "--ranks", "2")
    assert done.code == 2 and "--ranks goes with --dry-run" in done.err
    done = dsv4("finetune", written, "--dry-run", "--ranks", "3")
    assert done.code == 2 and "a multiple of train.micro_rows * parts = 3" in done.err
    assert not (written.parent / "run").exists()


def test_keys_lists_every_key_with_default_unit_and_meaning(dsv4: Dsv4) -> None:
    told = dsv4("finetune", "--keys").out.splitlines()[1:]
    known = list(recipe.every_key())
    assert [line.split()[0] for line in told] == [key.name for key in known]
    assert all(key.why in line and key.unit in line for key, line in zip(known, told, strict=True))
    document = dsv4("finetune", "--keys", "--json").document
    assert document["train.steps"] == {
        "default": None, "needed": True, "unit": "steps", "why": "optimizer steps in all",
    }  # fmt: skip
    assert document["data.length"]["default"] == 2048 and not document["optimizer.lr"]["needed"]


LINE = re.compile(
    r"step (\d) of 3: loss \d\.\d{4}, MTP \d\.\d{4}, norm \S+, lr \S+, [\d,]+ learned tokens/s, memory [\d.]+ [MG]B"
    r"(, \d+ s left)?"
)


@pytest.mark.slow
def test_run_tells_its_first_and_last_step_and_leaves_files(written: Path, dsv4: Dsv4) -> None:
    done = dsv4("finetune", written)
    assert done.code == 0, done.err
    found = [LINE.fullmatch(line) for line in done.err.splitlines()]
    assert [match and (match[1], bool(match[2])) for match in found] == [("1", True), ("3", False)]
    run = written.parent / "run"
    assert sorted(os.listdir(run)) == [
        ".lock",
        "checkpoints",
        "latest",
        "loss.svg",
        "metrics.jsonl",
        "recipe.json",
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "step",
        "loss",
        "mtp_loss",
        "balance",
        "indexer",
        "indexer_uniform",
        "router_z",
        "router_entropy",
        "lr",
        "grad_norm",
        "tokens",
        "load",
        "seconds",
    }
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line.keys() == keys for line in lines)
    assert f"step 3 done in {sum(line['seconds'] for line in lines):.0f} s, at most " in done.out
    assert f"of memory: loss {lines[-1]['loss']:.4f}\n" in done.out
    assert lines_of(run / "loss.svg") == [3, 3]
    free = ("train.micro_rows=2", "log.every=2", "checkpoint.every=1", "checkpoint.keep=1")
    again = dsv4("finetune", written, *free)
    assert again.code == 0 and "continues after step 3" in again.out
    assert f"{run} was complete already: nothing to do" in again.out


@pytest.mark.slow
def test_json_is_one_document_and_quiet_says_nothing(
    written: Path, data: dict[str, Path], dsv4: Dsv4
) -> None:
    done = dsv4("finetune", written, "--json", f'data.eval_files=["{data["tokens"]}"]', "log.eval_every=1")
    assert done.code == 0, done.err
    document = done.document
    assert document.keys() == {"run", "first_step", "steps", "last", "eval_loss"}
    assert document["last"]["loss"] == losses_of(written.parent / "run")[-1]
    assert document["eval_loss"] == losses_of(written.parent / "run", "eval_loss")[-1]
    assert math.isfinite(document["eval_loss"])
    assert "step 3 of 3" in done.err
    assert "loss, unseen" in words_of(written.parent / "run/loss.svg")
    assert lines_of(written.parent / "run/loss.svg") == [3, 3, 3]
    quiet = dsv4("finetune", written, "-q", f"train.run={written.parent / 'other'}")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


@pytest.mark.slow
def test_terminal_gets_a_bar(written: Path, dsv4: Dsv4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = dsv4("finetune", written)
    assert done.code == 0
    assert "3/3" in done.err and "learned tokens/s" in done.err and "step 1 of 3" not in done.err


@pytest.mark.slow
def test_memory_of_a_gpu_is_told(written: Path, dsv4: Dsv4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Trainer, "peak_device_bytes", 20 * 10**9)
    done = dsv4("finetune", written, "train.steps=1")
    assert re.search(r"memory [\d.]+ [MG]B and 20\.00 GB of the GPU's\n", done.err)
    assert re.search(r"at most [\d.]+ [MG]B of memory and 20\.00 GB of the GPU's: loss", done.out)


# ---- how it ends


def started(written: Path, *changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dsv4cli", "finetune", str(written), *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(smallest: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that nobody stopped."""
    place = tmp_path_factory.mktemp("whole")
    made = read_recipe(recipe_in(place, smallest, data["tokens"]).read_bytes(), ["train.steps=40"])
    trainer.train(trainer.Trainer(made), StopFlag())
    return place / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_stopped_by_a_signal_continues_to_the_same_tensors(
    number: int, code: int, written: Path, whole: Path
) -> None:
    run = written.parent / "run"
    with started(written, "train.steps=40") as process:
        metrics = run / "metrics.jsonl"
        with tiny.at_most(120):
            while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
                assert process.poll() is None
                time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    made = metrics.read_bytes().count(b"\n")
    assert 2 <= made < 40
    assert f"checkpoint of step {made} is saved\nlosses    {run / 'loss.svg'}\n" in out
    assert "Interrupted: stopped by a signal\n    do        the same command continues" in err
    assert (run / "latest").read_text() == f"step-{made}\n"
    assert lines_of(run / "loss.svg") == [made, made]
    again = forked.dsv4("finetune", written, "train.steps=40")
    assert again.returncode == 0, again.stderr
    assert f"  continues after step {made}\n" in again.stdout
    assert f"step 40 done from step {made} in " in again.stdout
    assert losses_of(run) == losses_of(whole)
    found, wanted = [(place / "checkpoints/step-40/__0_0.distcp").read_bytes() for place in (run, whole)]
    assert found == wanted  # weights and the optimizer's state, all in one file


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_with_5(written: Path, dsv4: Dsv4) -> None:
    done = dsv4("finetune", written, "optimizer.lr=1e30", "train.steps=9")
    assert done.code == 5
    assert (
        "Diverged: the loss or a gradient is not finite" in done.err and "in step 2: rows 2 to 3" in done.err
    )
    assert "there is no checkpoint yet\n" in done.out
    run = written.parent / "run"
    assert len(losses_of(run)) == 1 and lines_of(run / "loss.svg") == [1, 1]
    assert os.listdir(run / "checkpoints") == []


@pytest.mark.slow
def test_second_process_is_turned_away(written: Path, dsv4: Dsv4) -> None:
    run = written.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = dsv4("finetune", written)
    assert done.code == 75 and "Busy: another process trains into this directory" in done.err
    assert sorted(os.listdir(run)) == [".lock", "checkpoints"]


BAD = {
    "no TOML": (b"[train\n", (), 2, "the recipe is no TOML"),
    "unknown key": (None, ("train.step=3",), 2, "there is no key 'train.step'\n    expected  train.steps?"),
    "wrong kind": (None, ("train.steps=many",), 2, "expected  a whole number"),
    "impossible": (None, ("train.rows=0",), 2, "train.rows cannot be that"),
    "no change": (None, ("steps",), 2, "'steps' changes no key of the recipe"),
    "missing key": (b"[model]\nsource='a'\n", (), 2, "the recipe lacks train.run"),
    "positions": (
        None,
        ("data.length=2000000",),
        2,
        "data.length is longer than the model's positions allow",
    ),
    "pattern": (None, ('train.freeze=["*.nothing"]',), 2, "train.freeze: '*.nothing' fits no parameter"),
    "no data": (None, ('data.files=["absent.jsonl"]',), 3, "there is no such data file"),
    "bad line": (None, ("data.kind=text",), 3, 'BadLine: line 1 cannot be trained on: it has no "text"'),
    "no source": (
        None,
        ("model.source=absent",),
        3,
        "found     'absent'\n    do        give model.source=DIR",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_told_before_anything_is_made(case: str, written: Path, dsv4: Dsv4) -> None:
    text, changes, code, message = BAD[case]
    if text is not None:
        written.write_bytes(text)
    done = dsv4("finetune", written, *changes)
    assert (done.code, message in done.err) == (code, True), done.err
    assert "    do        " in done.err
    assert not (written.parent / "run").exists()


def test_recipe_that_is_not_there_or_not_named_is_told(dsv4: Dsv4) -> None:
    assert dsv4("finetune", "absent.toml").code == 3
    done = dsv4("finetune")
    assert done.code == 2 and "recipes/ has some, --keys lists what may stand there" in done.err


def test_lines_that_are_left_are_named_and_counted(written: Path, tmp_path: Path, dsv4: Dsv4) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"input_ids": [1, 2, 3]}\n' + "{}\n" * 7)
    done = dsv4("finetune", written, "--dry-run", f'data.files=["{mixed}"]', "data.bad_lines=skip")
    assert done.code == 0, done.err
    assert (
        done.out.count("  left      mixed.jsonl: line ") == 5
        and "  left      ... and 2 more lines\n" in done.out
    )


def test_picture_of_a_single_step_is_a_point(tmp_path: Path) -> None:
    from dsv4model import curve

    file = tmp_path / "loss.svg"
    file.write_bytes(curve.svg([{"step": 1, "loss": 3.5, "mtp_loss": 0.0}], "a <b> & c"))
    root = ElementTree.parse(file).getroot()
    assert len(list(root.iter(f"{SVG}circle"))) == 1 and words_of(file).startswith("a <b> & c | ")
    assert torch.tensor([float(dot.attrib["cy"]) for dot in root.iter(f"{SVG}circle")]).isfinite().all()
