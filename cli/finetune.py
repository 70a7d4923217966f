"""dsv4 finetune: a recipe into a run, told step by step."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from dsv4ckpt import hub, paper
from dsv4ckpt.errors import EXIT_OK, Diverged, Interrupted, MissingFile, Usage
from dsv4ckpt.stop import StopFlag
from dsv4ckpt.survey import survey
from dsv4model import recipe
from dsv4model.recipe import MAX_RECIPE_BYTES, Recipe, Told

from .common import common_options, ranks_of_this_job, stopping_on_signals
from .words import Console, human, plural, table

if TYPE_CHECKING:
    from dsv4model.outlook import Outlook
    from dsv4model.runs import RunDirectory
    from dsv4model.trainer import Outcome, Step, Trainer

_LINE_SECONDS = 10.0
_SHOWN_LINES = 5  # bad lines of data
_CURVE = "loss.svg"


@click.command("finetune")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(), required=False)
@click.argument("changes", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be trained, from headers and data; load no weights. With -v: every key.",
)
@click.option(
    "--ranks",
    "num_ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="--dry-run: say what each of N ranks would hold, divided as [parallel] says.",
)
@click.option(
    "--keys", "lists_keys", is_flag=True, help="List every key of a recipe: default, unit and meaning."
)
@common_options
def command(
    recipe_path: str | None,
    changes: tuple[str, ...],
    dry_run: bool,
    num_ranks: int | None,
    lists_keys: bool,
    console: Console,
) -> int:
    """Train a model as the TOML file RECIPE says, with KEY=VALUE after it in place of what stands there.

    The run's directory (train.run) gets checkpoints, metrics.jsonl and a picture of the losses. Stop it at any time:
    SIGTERM and Ctrl-C save a checkpoint after the step at hand, and the same command continues, to the bit. A loss that
    is not finite ends the run with exit code 5, and touches no checkpoint.

    \b
    Examples:
      dsv4 finetune recipes/sft.toml model.source=DeepSeek-V4-Flash train.run=runs/sft data.files='["chat.jsonl"]'
      dsv4 finetune recipes/sft.toml train.what=lora model.experts=packed --dry-run
      dsv4 finetune recipes/lora-packed.toml model.source=release:flash --dry-run --ranks 8 parallel.experts=8
      dsv4 finetune --keys
      dsv4 export runs/sft tuned --to native
    """
    if lists_keys:
        return _list_keys(console)
    if num_ranks and not dry_run:
        raise Usage("--ranks goes with --dry-run", do="leave it out; torchrun starts ranks")
    if recipe_path is None:
        raise Usage(
            "no recipe was named",
            do="dsv4 finetune RECIPE.toml; recipes/ has some, --keys lists what may stand there",
        )
    made = recipe.read_recipe(_contents(recipe_path), changes)
    on_paper = made.model.source.startswith(paper.PREFIX)
    if on_paper and not dry_run:
        raise Usage(
            f"{made.model.source} has no weights to train",
            do="add --dry-run, or name a directory with the checkpoint",
        )
    elsewhere = on_paper or made.model.source.startswith(hub.PREFIX)
    if not elsewhere and not os.path.isdir(made.model.source):
        raise MissingFile(
            "the checkpoint to start from is not there",
            found=repr(made.model.source),
            do="give model.source=DIR after the recipe; dsv4 sample DIR makes a small one to try",
        )
    from dsv4model.loading import surveyed
    from dsv4model.outlook import outlook
    from dsv4model.runs import RunDirectory
    from dsv4model.trainer import Trainer, read_data, train

    if on_paper:
        found, config = surveyed(survey(paper.on_paper(made.model.source.removeprefix(paper.PREFIX))))
    else:
        found, config = surveyed(made.model.source)
    if dry_run:
        ahead = outlook(made, found, config, num_ranks or 1)
        document = {"recipe": recipe.document_of(made), **_outlook_document(ahead)}
        data = None if on_paper else read_data(made, found, config)
        _say_outlook(made, ahead, console)
        if data is not None:
            _say_data(made, data.corpus, data.rows, console)
            document |= _data_document(data)
        console.document(document)
        if console.verbose:
            _say_recipe(made, console)
        console.say("nothing was loaded or written: this was a dry run")
        return EXIT_OK
    with ranks_of_this_job() as ranks:
        ahead = outlook(made, found, config, ranks.size)  # refuses what fits nothing, before weights are read
        trainer = Trainer(made, ranks)
        _say_outlook(made, ahead, console)
        _say_data(made, trainer.corpus, trainer.rows, console)
        run, stop = RunDirectory(made.train.run), StopFlag()
        if saved := _newest(run):
            console.say(f"  continues after step {saved:,}")
        with stopping_on_signals(stop), _Steps(trainer, console) as steps:
            try:
                outcome = train(trainer, stop, steps, time.perf_counter)
            except (Interrupted, Diverged):
                if ranks.rank == 0:
                    curve = _draw(made, run)
                    _say_end(run, curve, console)
                raise
        if ranks.rank == 0:
            _say_outcome(trainer, outcome, steps, _draw(made, run), console)
            console.document(_outcome_document(made, outcome))
    return EXIT_OK


def _contents(path: str) -> bytes:
    if not os.path.isfile(path):
        raise MissingFile(
            "there is no such recipe", found=repr(path), do="name a TOML file; recipes/ has some"
        )
    with open(path, "rb") as file:
        return file.read(MAX_RECIPE_BYTES + 1)


def _list_keys(console: Console) -> int:
    rows = [("key", "default", "meaning")]
    rows += [
        (told.name, _default(told), told.why + (f" [{told.unit}]" if told.unit else ""))
        for told in recipe.every_key()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        console.say(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")
    console.document(
        {
            told.name: {
                "default": None if _is_needed(told) else told.default,
                "needed": _is_needed(told),
                "unit": told.unit,
                "why": told.why,
            }
            for told in recipe.every_key()
        }
    )
    return EXIT_OK


def _is_needed(told: Told) -> bool:
    return not isinstance(told.default, bool | int | float | str | tuple | None)


def _default(told: Told) -> str:
    if _is_needed(told):
        return "(needed)"
    if told.default is None:
        return "-"
    return json.dumps(told.default)


def _say_recipe(made: Recipe, console: Console) -> None:
    """Every key as it will be used, in the words of a recipe."""
    for part, keys in recipe.document_of(made).items():
        for name, value in keys.items():
            console.say(f"  {part}.{name} = {'-' if value is None else json.dumps(value)}")


# ---- what lies ahead


def _say_outlook(made: Recipe, ahead: Outlook, console: Console) -> None:
    console.say(f"{made.model.source} -> {made.train.run}: {made.train.what}, {plural(made.train.steps, 'step')} of "
                f"{plural(made.train.rows, 'row')} of {made.data.length:,} tokens", bold=True)  # fmt: skip
    rows = [("parameters", "in all", "learning", "")]
    rows += [(group.name, f"{group.num:,}", f"{group.num_learning:,}", "") for group in ahead.groups]
    rows.append(("together", f"{sum(group.num for group in ahead.groups):,}", f"{ahead.num_learning:,}", ""))
    console.say(table(rows))
    by = f"AdamW {ahead.num_learning - ahead.num_muon:,}"
    by += f", Muon {ahead.num_muon:,}" if ahead.num_muon else ""
    console.say(f"  optimizer {by} parameters, lr {made.lr:g}")
    memory = ahead.memory
    console.say(f"  memory    weights {human(memory.weights)}, gradients {human(memory.gradients)}, optimizer "
                f"{human(memory.optimizer)}; activations come on top")  # fmt: skip
    if memory.offloaded:
        console.say(f"            {human(memory.offloaded)} of these in the CPU's memory")
    if sum(stage.num_ranks for stage in ahead.stages) > 1:
        _say_ranks(made, ahead, console)


def _say_ranks(made: Recipe, ahead: Outlook, console: Console) -> None:
    """How the ranks divide it, and what each holds."""
    num_parts, experts = ahead.stages[0].num_ranks, made.parallel.experts
    console.say(
        f"  ranks     {num_parts * len(ahead.stages):,}: {plural(len(ahead.stages), 'stage')} of "
        f"{plural(num_parts, 'rank')}, experts in {plural(experts, 'part')}; "
        f"{plural(made.train.rows // num_parts, 'row')} of a step each"
    )
    for stage in ahead.stages:
        layers = f"layers {stage.layers.start} to {stage.layers.stop - 1}"
        told = ", ".join(
            f"{name} {human(size)}" for name, size in stage.memory._asdict().items() if name != "offloaded"
        )
        console.say(f"            {layers}: {human(stage.memory.together)} a rank ({told})")


def _say_data(made: Recipe, corpus: Any, rows: Any, console: Console) -> None:
    epochs = made.train.steps * made.train.rows / rows.per_epoch
    told = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    console.say(f"  data      {plural(len(corpus.documents), 'document')}, {corpus.num_tokens:,} tokens of which "
                f"{corpus.num_counted:,} are learned; {plural(rows.per_epoch, 'row')} an epoch, "
                f"{rows.efficiency():.0%} filled; {told} epochs")  # fmt: skip
    for why, count in corpus.num_left.items():
        console.say(f"  left      {count:,} {why}")
    for error in corpus.told[:_SHOWN_LINES]:
        console.say(f"  left      {error.facts['file']}: {error.what}")
    if len(corpus.told) > _SHOWN_LINES:
        console.say(f"  left      ... and {len(corpus.told) - _SHOWN_LINES:,} more lines")


def _outlook_document(ahead: Outlook) -> dict[str, Any]:
    return {
        "parameters": [group._asdict() for group in ahead.groups],
        "learning": ahead.num_learning,
        "muon": ahead.num_muon,
        "bytes": ahead.memory._asdict(),
        "stages": [
            {
                "layers": [stage.layers.start, stage.layers.stop],
                "ranks": stage.num_ranks,
                "bytes_per_rank": stage.memory._asdict(),
            }
            for stage in ahead.stages
        ],
    }


def _data_document(data: Any) -> dict[str, Any]:
    corpus, rows = data.corpus, data.rows
    return {
        "data": {
            "documents": len(corpus.documents),
            "tokens": corpus.num_tokens,
            "learned": corpus.num_counted,
            "rows_per_epoch": rows.per_epoch,
            "filled": rows.efficiency(),
            "left": dict(corpus.num_left),
            "bad_lines": [{"file": error.facts["file"], "what": error.what} for error in corpus.told],
        }
    }


# ---- while it runs


class _Steps:
    """Told of every step: a bar on a terminal, a line every 10 s elsewhere."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self._trainer, self._num, self._quiet = trainer, trainer.recipe.train.steps, console.quiet
        self._bar: tqdm[None] | None = None
        self._spoke = 0.0
        self._num_made = 0
        self.seconds = 0.0  # of all steps that were made

    def __call__(self, step: Step, seconds: float) -> None:
        self._num_made += 1
        self.seconds += seconds
        if self._quiet:
            return
        indexer = ""
        if step.indexer_uniform:
            indexer = f"indexer {step.indexer:.4f} (uniform {step.indexer_uniform:.4f}), "
        said = (
            f"loss {step.loss:.4f}, MTP {step.mtp_loss:.4f}, {indexer}norm {step.grad_norm:.3g}, lr {step.lr:.3g}, "
            f"{step.tokens / max(seconds, 1e-9):,.0f} learned tokens/s, memory {human(_peak_bytes())}"
            f"{_of_gpu(self._trainer)}"
        )
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=self._num, initial=step.step - 1, unit="step", dynamic_ncols=True, file=sys.stderr
                )
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._spoke >= _LINE_SECONDS or step.step == self._num:
            self._spoke = time.monotonic()
            if num_left := self._num - step.step:
                said += f", {_lasting(num_left * self.seconds / self._num_made)} left"
            print(f"step {step.step:,} of {self._num:,}: {said}", file=sys.stderr, flush=True)

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _of_gpu(trainer: Trainer) -> str:
    held = trainer.peak_device_bytes
    return f" and {human(held)} of the GPU's" if held else ""


def _peak_bytes() -> int:
    """The most memory that this process has held, without a GPU's."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _lasting(seconds: float) -> str:
    """90.4 -> '90 s', 600 -> '10 min', 9000 -> '2.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- at the end


def _newest(run: RunDirectory) -> int:
    """The step of the newest checkpoint; 0: there is none."""
    return max((checkpoint.step for checkpoint in run.checkpoints()), default=0)


def _draw(made: Recipe, run: RunDirectory) -> str | None:
    """The picture of the losses, in the run's directory."""
    from dsv4model import curve
    from dsv4model.runs import METRICS

    path = os.path.join(made.train.run, METRICS)
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        lines = [json.loads(line) for line in file]
    if not lines:
        return None
    name = os.path.basename(os.path.normpath(made.train.run))
    run.publish(_CURVE, curve.svg(lines, f"{name}: {made.train.what}"))
    return os.path.join(made.train.run, _CURVE)


def _say_end(run: RunDirectory, curve: str | None, console: Console) -> None:
    """Of a run that did not come to its last step."""
    saved = _newest(run)
    console.say(f"checkpoint of step {saved:,} is saved" if saved else "there is no checkpoint yet")
    if curve:
        console.say(f"losses    {curve}")


def _say_outcome(
    trainer: Trainer, outcome: Outcome, steps: _Steps, curve: str | None, console: Console
) -> None:
    made = trainer.recipe
    if outcome.last is None:
        console.say(f"{made.train.run} was complete already: nothing to do")
    else:
        since = f" from step {outcome.first_step:,}" if outcome.first_step else ""
        console.say(f"step {outcome.num_steps:,} done{since} in {_lasting(steps.seconds)}, at most "
                    f"{human(_peak_bytes())} of memory{_of_gpu(trainer)}: loss {outcome.last.loss:.4f}")  # fmt: skip
    if outcome.eval_loss is not None:
        console.say(f"loss on data.eval_files: {outcome.eval_loss:.4f}")
    if curve:
        console.say(f"losses    {curve}")
    console.say(f"next: dsv4 export {made.train.run} DST")


def _outcome_document(made: Recipe, outcome: Outcome) -> dict[str, Any]:
    return {
        "run": made.train.run,
        "first_step": outcome.first_step,
        "steps": outcome.num_steps,
        "last": None if outcome.last is None else outcome.last._asdict(),
        "eval_loss": outcome.eval_loss,
    }
