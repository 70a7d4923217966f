"""The training loop: rows in, steps, checkpoints and metrics out.  Start here to read the trainer.

Owns what a step is and in which order things happen to a run; losses, optimizers, data and files have modules of their
own.  A step is a pure function of the state and its number, so that a run that is stopped anywhere ends in the same
weights as one that is not.
Source: paper sec. 4.2 (losses and their weights).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsv4ckpt.errors import Diverged, Interrupted, Usage
from dsv4ckpt.ranks import ALONE, Ranks
from dsv4ckpt.stop import StopFlag
from dsv4ckpt.survey import Survey

from . import learning, losses, recipe
from .config import Config
from .corpus import Corpus, read_corpus
from .generate import device_of
from .loading import load, surveyed
from .losses import IGNORED
from .model import Model, dtype_of, initialize
from .moe import Router
from .recipe import Kind, Recipe, Train
from .rows import Batch, Rows
from .runs import BadRun, RunDirectory
from .simulate import Simulation
from .tokenizer import Tokenizer

_FREE = frozenset(
    {"log", "checkpoint", "train.steps", "train.micro_rows", "train.run"}
)  # may change within a run


class Sums(NamedTuple):
    """What the losses add up to, over tokens."""

    loss: float = 0.0
    mtp: float = 0.0
    balance: float = 0.0  # of the mean router that learns


class Counts(NamedTuple):
    """Over how many tokens."""

    tokens: int  # that are learned
    mtp_tokens: int
    all_tokens: int  # but padding


class Step(NamedTuple):
    """What came of a step: means over the tokens of the global batch."""

    step: int  # counted from 0
    loss: float
    mtp_loss: float
    balance: float
    lr: float
    grad_norm: float
    tokens: int  # that were learned
    load: dict[str, float]  # of each router: the busiest expert's tokens over the mean


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    first_step: int  # that this call made
    num_steps: int  # in all
    last: Step | None  # None: the run was complete
    eval_loss: float | None


class Data(NamedTuple):
    """What is learned, and what is only looked at."""

    corpus: Corpus
    rows: Rows
    eval_rows: Rows | None


def read_data(made: Recipe, found: Survey, config: Config) -> Data:
    """Read and tokenise the files of a recipe. raises Usage, MissingFile, BadLine, BadTokenizer, Environment"""
    part = made.data
    if part.length > config.max_positions:
        raise Usage(
            "data.length is longer than the model's positions allow",
            expected=f"at most {config.max_positions:,}",
            found=f"{part.length:,}",
            do="take shorter rows",
        )
    tokenizer = None if part.kind is Kind.TOKENS else Tokenizer.open(found.checkpoint.directory)
    seed = made.train.seed if part.shuffle else None

    def rows_of(corpus: Corpus) -> Rows:
        return Rows(corpus.documents, part.length, pack=part.pack, seed=seed, end_id=config.eos)

    corpus = read_corpus(part.files, part, tokenizer, config.vocab)
    unseen = read_corpus(part.eval_files, part, tokenizer, config.vocab) if part.eval_files else None
    return Data(corpus, rows_of(corpus), rows_of(unseen) if unseen else None)


class Trainer:
    """Everything that a step needs. Made from a recipe; holds model, optimizers and rows."""

    def __init__(self, made: Recipe, ranks: Ranks = ALONE) -> None:
        """Read data and model. raises whatever reading them raises, before the first step

        ranks  that train together, each with rows of its own; what is trained in full is divided over them by FSDP2
        """
        _require_shared(made, ranks)
        self.recipe, self.device, self.ranks = made, device_of(made.model.device), ranks
        found, self.config = surveyed(made.model.source)
        self.corpus, self.rows, self.eval_rows = read_data(made, found, self.config)
        self.model = _model_of(made, found, self.config, ranks)
        self.parameters = _learners(self.model, made)
        self.optimizers = learning.optimizers_of(self.parameters, made.optimizer, made.lr)
        self._routers = {
            name: module for name, module in self.model.named_modules() if isinstance(module, Router)
        }
        self._num_choosing = max(1, sum(not router.hashes for router in self._routers.values()))

    @property
    def data_sha256(self) -> str:
        """Of every token, in order: another file under the same name is other data."""
        digest = hashlib.sha256()
        for document in self.corpus.documents:
            digest.update(len(document).to_bytes(8, "little") + document.ids.tobytes() + document.counted)
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds. Filling them in place continues a run."""
        if self.recipe.train.what is Train.LORA:
            model: Mapping[str, Tensor] = self.parameters
        else:
            model = self.model.state_dict()
        tensors = {f"model.{name}": tensor.detach() for name, tensor in model.items()}
        optim = learning.optimizer_tensors(self.parameters, self.optimizers)
        return tensors | {f"optim.{name}": tensor for name, tensor in optim.items()}

    # ---- a step

    def step(self, number: int) -> Step:
        """One optimizer step. raises Diverged, with model and optimizers as they were"""
        train = self.recipe.train
        first = number * train.rows
        batches = [
            self.rows.batch(begin, train.micro_rows).to(self.device)
            for begin in range(first, first + train.rows, train.micro_rows)
        ]
        counts = _counts(batches)
        learning.zero_grad(self.parameters.values())
        ranks = self.ranks
        loads = {
            name: torch.zeros(len(router.weight), dtype=torch.int64, device=self.device)
            for name, router in self._routers.items()
        }
        sums = Sums()
        for batch in batches[ranks.rank :: ranks.size]:
            sums = Sums(*map(sum, zip(sums, self._backward(batch, counts, loads), strict=True)))
        if ranks.size > 1:
            sums = self._over_ranks(sums, loads)
        norm = float(learning.clip(self.parameters.values(), self.recipe.optimizer.clip, self._total))
        means = _means(sums, counts)
        if not all(torch.isfinite(torch.tensor([*means, norm]))):
            learning.zero_grad(self.parameters.values())
            raise self._diverged(number, means, norm)
        lr = learning.rate(number, train.steps, self.recipe.optimizer, self.recipe.lr)
        learning.set_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.step()
        learning.zero_grad(self.parameters.values())
        self._move_biases(loads)
        load = {name: float(load.max() / load.float().mean().clamp(min=1)) for name, load in loads.items()}
        return Step(number, *means, lr, norm, counts.tokens, load)

    def _backward(self, batch: Batch, counts: Counts, loads: dict[str, Tensor]) -> Sums:
        """Gradients of one micro-batch's share of the global means."""
        part = self.recipe.loss
        with self._tapped() as routed:
            main, mtp = self._sums(batch)
        loss, documents = main / max(1, counts.tokens), _across_rows(batch.documents)
        if mtp is not None and part.mtp:
            loss = loss + mtp * (part.mtp / max(1, counts.mtp_tokens))
        balance = torch.zeros((), device=self.device)
        for name, calls in routed.items():
            for scores, ids in calls:
                loads[name] += ids[documents >= 0].flatten().bincount(minlength=len(loads[name]))
                if part.balance and not self._routers[name].hashes:
                    balance = balance + losses.balance(scores, ids, documents)
        if part.balance:
            loss = loss + balance * (part.balance / max(1, counts.all_tokens))
        (loss * self.ranks.size if self._is_divided else loss).backward()  # FSDP2 takes the mean over ranks
        mean_balance = float(balance.detach()) / self._num_choosing
        return Sums(float(main.detach()), 0.0 if mtp is None else float(mtp.detach()), mean_balance)

    def _over_ranks(self, sums: Sums, loads: dict[str, Tensor]) -> Sums:
        """Add up what all ranks have: losses, loads, and gradients that FSDP2 does not know."""
        from . import sharding

        sharding.add_gradients(self.parameters.values())
        for counted in loads.values():
            self._total(counted)
        return Sums(*self._total(torch.tensor(sums, dtype=torch.float64)).tolist())

    def _total(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.ranks.size > 1:
            from . import sharding

            sharding.total(values)
        return values

    @property
    def _is_divided(self) -> bool:
        return self.ranks.size > 1 and self.recipe.train.what is Train.FULL

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Cross entropies of the next token and of the one after it, summed over the tokens that are learned."""
        hidden, mtp_hidden = self.model.hidden(batch.ids, batch.next_ids, batch.documents)
        head = self.model.lm_head.weight
        main = losses.linear_cross_entropy(hidden.flatten(0, 1), head, batch.targets.flatten())
        if mtp_hidden is None:
            return main, None
        return main, losses.linear_cross_entropy(mtp_hidden.flatten(0, 1), head, batch.targets_mtp.flatten())

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
        """What the routers say while the block runs; what backward computes again is not heard."""
        heard: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._routers}

        def listener(name: str) -> Callable[[Tensor, Tensor], None]:
            return lambda scores, ids: heard[name].append((scores, ids))

        for name, router in self._routers.items():
            router.tap = listener(name)
        try:
            yield heard
        finally:
            for router in self._routers.values():
                router.tap = None

    @torch.no_grad()
    def _move_biases(self, loads: Mapping[str, Tensor]) -> None:
        step = self.recipe.loss.bias_update
        for name, router in self._routers.items() if step else ():
            if not router.hashes:
                router.e_score_correction_bias += losses.bias_steps(loads[name], step)

    def _diverged(self, number: int, means: tuple[float, ...], norm: float) -> Diverged:
        first = number * self.recipe.train.rows
        epoch, row = self.rows.epoch_of(first)
        return Diverged(
            "the loss or a gradient is not finite",
            expected="finite numbers",
            found=f"loss {means[0]}, MTP loss {means[1]}, balance {means[2]}, gradient norm {norm} in step "
            f"{number + 1:,}: rows {row:,} to {row + self.recipe.train.rows - 1:,} of epoch {epoch}",
            do="the last checkpoint is untouched: lower optimizer.lr or clip harder, and go on in another train.run",
        )

    def signal(self, stop: StopFlag) -> int:
        """The signal that any rank was sent; 0: none. All ranks ask at the same time."""
        if self.ranks.size == 1:
            return stop.signal_number
        found = torch.zeros(256, dtype=torch.int64)
        found[stop.signal_number] = 1
        sent = self._total(found).nonzero()[:, 0].tolist()
        return max(sent)

    @torch.no_grad()
    def evaluate(self, stop: StopFlag) -> float | None:
        """Mean loss over every document of data.eval_files, once; None without them. raises Interrupted"""
        if self.eval_rows is None:
            return None
        total, tokens = 0.0, 0
        for number in range(self.eval_rows.per_epoch):
            stop.check()
            batch = self.eval_rows.batch(number, 1).to(self.device)
            total += float(self._sums(batch)[0])
            tokens += int((batch.targets != IGNORED).sum())
        return total / max(1, tokens)


def train(
    trainer: Trainer,
    stop: StopFlag,
    on_step: Callable[[Step, float], None] = lambda step, seconds: None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Outcome:
    """Carry a run to its end, from its newest checkpoint if it has one.

    on_step  called after each step, with the seconds that it took
    clock    tells seconds
    raises   Interrupted after a signal, with a checkpoint of the last whole step; Diverged, Busy, BadRun, Environment
    """
    made, ranks = trainer.recipe, trainer.ranks
    run = RunDirectory(made.train.run, ranks)
    with run.locked() if ranks.rank == 0 else contextlib.nullcontext(), _noticed(ranks):
        ranks.meet(stop)  # nobody looks before rank 0 has tidied up
        document = recipe.document_of(made)
        run.require_same_recipe(document, _FREE)
        about = {"data_sha256": trainer.data_sha256}
        first = _continued(trainer, run, about)
        ranks.meet(stop)  # nobody writes before all have looked
        if ranks.rank == 0:
            run.write_recipe(document)
            run.cut_metrics(first)
        step: Step | None = None
        eval_loss: float | None = None
        for number in range(first, made.train.steps):
            began = clock()
            step = trainer.step(number)
            seconds = clock() - began
            line = {**step._asdict(), "seconds": round(seconds, 6)}
            done = number + 1
            if ranks.rank == 0 and (done % made.log.every == 0 or done == made.train.steps):
                run.add_metrics(line)
            on_step(step, seconds)
            stop.signal_number = trainer.signal(stop)
            due = made.checkpoint.every and done % made.checkpoint.every == 0
            if due or done == made.train.steps or stop.signal_number:
                run.write(done, trainer.state(), about)
                if ranks.rank == 0:
                    run.keep(made.checkpoint.keep)
            if stop.signal_number:
                raise Interrupted(stop.signal_number)
            every, is_last = made.log.eval_every, done == made.train.steps
            if trainer.eval_rows and (is_last or (every and done % every == 0)):
                eval_loss = trainer.evaluate(stop)
                if ranks.rank == 0:
                    run.add_metrics({"step": number, "eval_loss": eval_loss})
        return Outcome(first, made.train.steps, step, eval_loss)


def _noticed(ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """A rank that is gone is an Environment error on all others."""
    if ranks.size == 1:
        return contextlib.nullcontext()
    from dsv4ckpt.process_group import noticed

    return noticed(
        ranks.size, "the same command continues from the last checkpoint; torchrun --max-restarts gives it"
    )


def _continued(trainer: Trainer, run: RunDirectory, about: Mapping[str, Any]) -> int:
    """Fill the state from the newest checkpoint. Returns the step to make next. raises BadRun, Usage"""
    known = run.checkpoints()
    if not known:
        return 0
    found = run.about(known[-1])
    if found.get("data_sha256") != about["data_sha256"]:
        raise Usage(
            "the data is not what this run began with",
            file=known[-1].path,
            do="put the files back to go on, or name another train.run",
        )
    if known[-1].step > trainer.recipe.train.steps:
        raise BadRun(
            "the run has gone further than train.steps",
            expected=f"at most {trainer.recipe.train.steps:,} steps",
            found=f"{known[-1].step:,}",
            do="ask for more steps, or name another train.run",
        )
    run.read(known[-1], trainer.state())
    return known[-1].step


# ---- model and learners


def _require_shared(made: Recipe, ranks: Ranks) -> None:
    """raises Usage for what several ranks do not do together"""
    train, each = made.train, made.train.micro_rows * ranks.size
    if ranks.size == 1:
        return
    if train.rows % each:
        raise Usage(
            "the rows of a step cannot be divided over the ranks",
            expected=f"train.rows a multiple of train.micro_rows * ranks = {each:,}",
            found=f"{train.rows:,}",
            do="change train.rows, or start another number of ranks",
        )
    if made.model.device != "cpu":
        raise Usage(
            "several ranks train on CPUs only so far",
            found=f"model.device {made.model.device!r}",
            do="start one process for a GPU",
        )
    if train.what is Train.FULL and made.model.dtype != "float32":
        raise Usage(
            "several ranks train float32 weights only so far",
            found=f"model.dtype {made.model.dtype!r}",
            do="leave model.dtype out, or start one process",
        )


def _model_of(made: Recipe, found: Survey, config: Config, ranks: Ranks) -> Model:
    part = made.model
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[part.dtype]
    simulation = Simulation(experts_fp4=made.train.qat)
    is_divided = ranks.size > 1 and made.train.what is Train.FULL
    if is_divided and not part.initialize:
        from . import sharding

        return sharding.loaded(found, config, simulation, part.source, ranks).train()
    if not part.initialize:
        packed = part.experts == "packed"
        experts: Literal["dense", "packed"] = "packed" if packed else "dense"
        return load(found, dtype, experts, part.device, simulation).train()
    model = Model(config, simulation)
    initialize(model, torch.Generator().manual_seed(made.train.seed))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, dtype))
    model = model.to(part.device).train()
    if is_divided:
        from . import sharding

        model = sharding.divided(model, ranks)
    return model


def _learners(model: nn.Module, made: Recipe) -> dict[str, nn.Parameter]:
    if made.train.what is Train.LORA:
        from . import adapters

        return adapters.attach(model, made.lora, torch.Generator().manual_seed(made.train.seed))
    learning.freeze(
        model, made.train.freeze, optional=recipe.default_of("train.freeze")
    )  # there may be no indexer
    return learning.learning(model)


# ---- sums


def _counts(batches: list[Batch]) -> Counts:
    """Tokens of the global batch."""
    return Counts(
        tokens=sum(int((batch.targets != IGNORED).sum()) for batch in batches),
        mtp_tokens=sum(int((batch.targets_mtp != IGNORED).sum()) for batch in batches),
        all_tokens=sum(int((batch.documents >= 0).sum()) for batch in batches),
    )


def _means(sums: Sums, counts: Counts) -> tuple[float, float, float]:
    return (
        sums.loss / max(1, counts.tokens),
        sums.mtp / max(1, counts.mtp_tokens),
        sums.balance / max(1, counts.all_tokens),
    )


def _across_rows(documents_BS: Tensor) -> Tensor:
    """Numbers of the documents of all rows, [B * S], each its own; padding stays below 0."""
    most = documents_BS.shape[1]
    row = torch.arange(len(documents_BS), device=documents_BS.device)[:, None] * most
    return torch.where(documents_BS >= 0, documents_BS + row, -1).flatten()
