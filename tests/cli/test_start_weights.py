"""model.weights: a run that starts from the weights of another run, or of a torch DCP directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import Dsv4
from in_process import dsv4 as dsv4

import dsv4model
from dsv4ckpt.errors import BadDcp, Dsv4Error, MissingFile, Usage
from dsv4ckpt.stop import StopFlag
from dsv4model.recipe import Recipe, read_recipe
from dsv4model.runs import BadRun
from dsv4model.trainer import Trainer, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    base = tmp_path_factory.mktemp("start")
    (base / "tokens.jsonl").write_text(json.dumps({"input_ids": list(range(10, 40))}))

    def made(run: str, *changes: str) -> Recipe:
        text = f"""
            [model]\nsource = "{smallest}"
            [train]\nrun = "{base / run}"\nsteps = 1\nrows = 1
            [data]\nfiles = ["{base / "tokens.jsonl"}"]\nkind = "tokens"\nlength = 32
            [optimizer]\nlr = 0.05
        """
        return read_recipe(text.encode(), changes)

    return made


@pytest.fixture(scope="module")
def first(make: Make) -> Trainer:
    trainer = Trainer(make("first"))
    train(trainer, StopFlag())
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


def test_run_starts_from_another_runs_newest_weights_and_exports_them(
    make: Make, first: Trainer, smallest: Path, dsv4: Dsv4, tmp_path: Path
) -> None:
    """All but norms stay: an export of the second run then has the first one's numbers, not the source's."""
    second = make(
        "second", f"model.weights={first.recipe.train.run}", "train.freeze=['*proj*', '*hc*', '*.gate.*', "
        "'*experts*', '*embed*', '*lm_head*', '*sinks*']"
    )  # fmt: skip
    trainer = Trainer(second)
    assert all(torch.equal(one, weights_of(first)[name]) for name, one in weights_of(trainer).items())
    train(trainer, StopFlag())
    done = dsv4("export", second.train.run, tmp_path / "out", "--to", "bf16", "-q")
    assert done.code == 0, done.err
    released, found = dsv4model.load(str(smallest)), dsv4model.load(str(tmp_path / "out"))
    changed = 0
    for name, one in found.state_dict().items():
        if name.endswith("_proj.weight"):
            assert torch.equal(one, weights_of(first)[name].to(one.dtype)), name
            changed += not torch.equal(one, released.state_dict()[name])
    assert changed > 3


def test_run_starts_from_what_reshard_wrote(make: Make, smallest: Path, dsv4: Dsv4, tmp_path: Path) -> None:
    """BF16 in a torch DCP directory, float32 in the model; the source's own weights are not taken."""
    assert dsv4("reshard", smallest, tmp_path / "dcp", "--to", "dcp", "-q").code == 0
    trainer = Trainer(make("third", f"model.weights={tmp_path / 'dcp'}"))
    wanted = dsv4model.load(str(smallest), torch.float32).state_dict()
    assert weights_of(trainer).keys() == wanted.keys()
    assert all(torch.equal(one, wanted[name]) for name, one in weights_of(trainer).items())


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        (["model.weights=nowhere"], MissingFile, "nowhere"),
        (["model.weights={lora}"], BadRun, "is not there"),
        (["model.weights={first}", "train.what=lora"], Usage, "model.weights"),
        (["model.weights={first}", "model.initialize=true"], Usage, "model.weights"),
        (["model.weights={first}", "model.source={other}"], BadRun, "is not there"),
    ],
)
def test_what_is_no_such_models_weights_is_refused(
    changes: list[str], kind: type[Dsv4Error], word: str, make: Make, first: Trainer, flash: Path
) -> None:
    lora = make("lora", "train.what=lora", "lora.rank=2", "lora.targets=['*self_attn.*_proj']")
    if not Path(lora.train.run).exists():
        train(Trainer(lora), StopFlag())
    places = {"first": first.recipe.train.run, "lora": lora.train.run, "other": str(flash)}
    with pytest.raises(kind) as caught:
        Trainer(make("refused", *(change.format(**places) for change in changes)))
    assert word in str(caught.value)
    assert not Path(make("refused").train.run).exists()


def test_weights_that_would_round_are_refused(make: Make, first: Trainer) -> None:
    with pytest.raises((Usage, BadDcp)) as caught:
        Trainer(make("narrow", f"model.weights={first.recipe.train.run}", "model.dtype=bfloat16"))
    assert "dtype" in str(caught.value)
