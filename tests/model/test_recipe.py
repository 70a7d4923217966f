"""Recipes are read strictly: what is misspelled, of the wrong kind or does not go together is an error with advice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dsv4ckpt.errors import Usage
from dsv4model import recipe
from dsv4model.recipe import Optimizer, Train, read_recipe

LEAST = b'[model]\nsource = "flash"\n[train]\nrun = "run"\nsteps = 3\n[data]\nfiles = ["chat.jsonl"]\n'


def refused(*changes: str, data: bytes = LEAST) -> Usage:
    with pytest.raises(Usage) as caught:
        read_recipe(data, changes)
    assert caught.value.facts["do"]
    return caught.value


def test_least_recipe_has_the_defaults_of_fine_tuning() -> None:
    made = read_recipe(LEAST)
    assert (made.model.source, made.train.steps, made.data.files) == ("flash", 3, ("chat.jsonl",))
    assert made.lr == 1e-5
    assert made.loss.mtp == 0.1
    assert made.loss.bias_update == 0
    assert set(made.train.freeze) == {"*.mlp.gate.*", "*.indexer.*"}
    assert read_recipe(LEAST, ["train.what=lora"]).lr == 1e-4


def test_changes_come_after_the_file_and_are_toml_or_texts() -> None:
    made = read_recipe(
        LEAST,
        ["train.steps=7", "train.what=lora", 'data.files=["a", "b"]', "optimizer.lr=1", "optimizer.kind=muon",
         "optimizer.betas=[0.8, 0.9]", "model.initialize=false"],
    )  # fmt: skip
    assert made.train.steps == 7
    assert made.train.what is Train.LORA
    assert made.data.files == ("a", "b")
    assert made.lr == 1.0 and isinstance(made.lr, float)
    assert made.optimizer.kind is Optimizer.MUON
    assert made.optimizer.betas == (0.8, 0.9)
    assert made.model.initialize is False
    assert read_recipe(LEAST, ["data.files=one.jsonl"]).data.files == ("one.jsonl",)


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ("train.stepz=1", "train.steps?"),
        ("train.lr=1e-4", "optimizer.lr?"),
        ("trian.steps=1", "train?"),
        ("loss.mpt=0.1", "loss.mtp?"),
        ("steps=3", "train.steps?"),
        ("optimiser=adamw", "optimizer?"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(change: str, near: str) -> None:
    assert refused(change).facts["expected"] == near


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=many", "train.steps=1.5", "train.steps=true", "train.what=half", "model.source=3",
        "data.files=3", "data.files=[1]", "optimizer.betas=[0.9]", "data.pack=1", "optimizer.lr=[]",
    ],
)  # fmt: skip
def test_value_of_the_wrong_kind_says_what_it_should_be(change: str) -> None:
    error = refused(change)
    assert error.facts["expected"]
    assert change.partition("=")[0] in error.what


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=0", "train.rows=-1", "train.micro_rows=3", "data.length=1", "data.files=[]",
        "loss.mtp=-0.1", "optimizer.lr=0", "optimizer.betas=[0.9, 1.0]", "model.dtype=float16",
        "model.experts=packed", "model.matmul=tf32", "data.too_long=drop", "checkpoint.keep=0",
    ],
)  # fmt: skip
def test_number_that_cannot_be_is_refused(change: str) -> None:
    refused(change)


def test_what_does_not_go_together_is_refused() -> None:
    refused("train.what=lora", "train.qat=true")
    refused("train.what=lora", "model.initialize=true")
    read_recipe(LEAST, ["train.what=lora", "model.experts=packed"])


@pytest.mark.parametrize("missing", [b"source", b"run", b"steps", b"files"])
def test_key_without_a_default_must_be_given(missing: bytes) -> None:
    lines = [line for line in LEAST.split(b"\n") if not line.startswith(missing)]
    assert missing.decode() in refused(data=b"\n".join(lines)).what


@pytest.mark.parametrize("data", [b"[model", b"\xff\xfe", b"model = 3", b"x = " + b"[" * 100_000])
def test_no_toml_is_an_error(data: bytes) -> None:
    refused(data=data)


@pytest.mark.parametrize("change", ["train.steps", "=3", ""])
def test_change_that_names_no_key_is_refused(change: str) -> None:
    refused(change)


def test_every_key_tells_what_it_means() -> None:
    told = list(recipe.every_key())
    assert len({item.name for item in told}) == len(told) > 40
    for item in told:
        assert len(item.why) > 10, item.name


def test_document_is_json_and_reads_back_the_same() -> None:
    made = read_recipe(LEAST, ["train.what=lora"])
    document = json.loads(json.dumps(recipe.document_of(made)))
    assert document["train"]["what"] == "lora"
    assert document["optimizer"]["lr"] is None


def test_reading_a_recipe_loads_no_torch() -> None:
    program = "import sys, dsv4model.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
