"""The training loop: rows in, steps, checkpoints and metrics out.  Start here to read the trainer.

Owns what a step is and in which order things happen to a run; losses, optimizers, data and files have modules of their
own.  A step is a pure function of the state and its number, so that a run that is stopped anywhere ends in the same
weights as one that is not.
Source: paper sec. 4.2 (losses and their weights).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsv4ckpt.errors import Diverged, Interrupted, Usage
from dsv4ckpt.ranks import ALONE, Ranks
from dsv4ckpt.stop import StopFlag
from dsv4ckpt.survey import Survey

from . import eightbit, learning, loggers, losses, recipe, trusted
from .chat import Texts
from .compressor import Indexer
from .config import Config
from .corpus import Corpus, read_corpus
from .dumps import as_dtype
from .generate import device_of
from .loading import load, surveyed
from .losses import IGNORED
from .masters import Masters
from .model import Block, Model, dtype_of, initialize
from .moe import Router
from .place import Place, require_sound
from .recipe import Entries, Kind, Optimizer, Recipe, Recompute, Train
from .rows import Batch, Rows
from .runs import MODEL, OPTIM, BadRun, Checkpoint, RunDirectory
from .saver import Saver
from .simulate import Simulation
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # these load torch.distributed, which one process does without
    from .pipeline import Pipeline
    from .sharding import Grid

_FREE = frozenset(
    {
        "log",
        "checkpoint",
        "parallel",
        "model.matmul",
        "optimizer.offload",
        "train.steps",
        "train.micro_rows",
        "train.recompute",
        "train.run",
    }
)  # may change within a run


class Sums(NamedTuple):
    """What the losses add up to, over tokens."""

    loss: float = 0.0
    mtp: float = 0.0
    balance: float = 0.0  # of the mean router that learns
    indexer: float = 0.0  # of the mean indexer
    indexer_uniform: float = 0.0
    router_z: float = 0.0  # of the mean router that chooses
    router_entropy: float = 0.0


class Counts(NamedTuple):
    """Over how many tokens."""

    tokens: int  # that are learned
    mtp_tokens: int
    all_tokens: int  # but padding


class Step(NamedTuple):
    """What came of a step: means over the tokens of the global batch."""

    step: int  # how many there have been, this one included
    loss: float
    mtp_loss: float
    balance: float
    indexer: float  # 0: it is not trained
    indexer_uniform: float  # what it would be if every entry had the same score
    router_z: float  # logsumexp(logits) ** 2 of the mean router that chooses
    router_entropy: float  # of its normalised affinities, in nats
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
    """Read and tokenise the files of a recipe.

    raises Usage, MissingFile, BadLine, BadTokenizer, BadEncoding, Environment
    """
    part = made.data
    if part.length > config.max_positions:
        raise Usage(
            "data.length is longer than the model's positions allow",
            expected=f"at most {config.max_positions:,}",
            found=f"{part.length:,}",
            do="take shorter rows",
        )
    tokenizer = None if part.kind is Kind.TOKENS else Tokenizer.open(found.checkpoint.small_directory)
    seed = made.train.seed if part.shuffle else None

    def rows_of(corpus: Corpus) -> Rows:
        return Rows(corpus.documents, part.length, pack=part.pack, seed=seed, end_id=config.eos)

    @functools.cache
    def texts() -> Texts:
        return trusted.read_texts(found.checkpoint.small_directory)

    corpus = read_corpus(part.files, part, tokenizer, config.vocab, texts)
    unseen = read_corpus(part.eval_files, part, tokenizer, config.vocab, texts) if part.eval_files else None
    return Data(corpus, rows_of(corpus), rows_of(unseen) if unseen else None)


class Trainer:
    """Everything that a step needs. Made from a recipe; holds model, optimizers and rows."""

    def __init__(self, made: Recipe, ranks: Ranks = ALONE) -> None:
        """Read data and model. raises whatever reading them raises, before the first step

        ranks  that train together, each with rows of its own; what is trained in full is divided over them by FSDP2
        """
        self.recipe, self.device, self.ranks = made, device_of(made.model.device), ranks
        run = RunDirectory(made.train.run)
        run.require_same_recipe(recipe.document_of(made), _FREE)
        if ranks.rank == 0:
            loggers.require(made.log.to)
        if made.optimizer.kind is Optimizer.ADAMW8BIT:
            eightbit.require()
        found, self.config = surveyed(made.model.source)
        config = self.config
        self.place = Place.of(ranks, made.parallel, config.num_layers, config.num_experts, config.num_mtp)
        require_sound(made, self.place)
        self.corpus, self.rows, self.eval_rows = read_data(made, found, self.config)
        if made.model.weights:
            RunDirectory(made.model.weights).require_there()
        _newest(run, made, self.data_sha256)  # what does not continue is refused before weights are read
        self._grid: Grid | None = None
        self._pipeline: Pipeline | None = None
        if ranks.size > 1:
            from .sharding import Grid

            self._grid = Grid(self.place)
        self.model = _model_of(made, found, self.config, self._grid)
        if made.model.weights:
            state = self.model.state_dict()
            everyone = set(state) if self._grid is None else self._grid.everyone(state)
            RunDirectory(made.model.weights, ranks).read_weights(state, everyone)
        for block in self.model.modules():
            if isinstance(block, Block):
                block.recomputes = made.train.recompute is Recompute.BLOCKS
        self.parameters = _learners(self.model, made, self._grid)
        self._masters = Masters(self.parameters, made.optimizer)
        self.learners = self._masters.learners  # what the optimizers move
        self.optimizers = learning.optimizers_of(self.learners, made.optimizer, made.lr)
        self._routers = {
            name: module for name, module in self.model.named_modules() if isinstance(module, Router)
        }
        if self.place.num_stages == 1:  # else it is another stage that may have them
            learning.require_indexers(self.model, made.loss)
        self._indexers = [module for module in self.model.modules() if isinstance(module, Indexer)]
        for indexer in self._indexers:
            indexer.sees_all = made.loss.indexer_entries is Entries.DENSE
        self._num_choosing = max(1, _num_choosing(self.config))
        self._num_indexers = max(1, sum(map(self.config.overlaps, range(self.config.num_layers))))
        self._shared = {"model.embed_tokens.weight"} if self.place.shares_embedding else set()
        if self._grid is not None and self.place.num_stages > 1:
            from .pipeline import Pipeline

            shape = made.train.micro_rows, made.data.length, self.config.hc_mult, self.config.hidden
            dtype = as_dtype(made.model.dtype)
            self._pipeline = Pipeline(self.place, self._grid.stages, shape, dtype)

    @functools.cached_property
    def data_sha256(self) -> str:
        """Of every token, in order: another file under the same name is other data."""
        digest = hashlib.sha256()
        for document in self.corpus.documents:
            digest.update(len(document).to_bytes(8, "little") + document.ids.tobytes() + document.counted)
        return digest.hexdigest()

    @property
    def peak_device_bytes(self) -> int:
        """The most that tensors have held of a GPU's memory; 0: there is none."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds. Filling them in place continues a run."""
        if self.recipe.train.what is Train.LORA:
            model: Mapping[str, Tensor] = self.parameters
        else:
            model = self.model.state_dict()
        tensors = {
            f"{MODEL}{name}": tensor.detach() for name, tensor in model.items() if not self._is_copy(name)
        }
        optim = self.optimizer_tensors()
        return tensors | {
            f"{OPTIM}{name}": tensor for name, tensor in optim.items() if not self._is_copy(name)
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """State and masters, by "name.of.parameter/kind"."""
        return learning.optimizer_tensors(self.learners, self.optimizers) | self._masters.tensors()

    def names(self) -> set[str]:
        """What all ranks have in their state together."""
        names = set(self.state())
        return names if self._grid is None else self._grid.everyone(names)

    def settle(self) -> None:
        """After the state was filled: what two stages have is in the state of the first one only."""
        if self._pipeline is None or not self._shared or not (self.place.is_first or self.place.is_last):
            return
        optim = self.optimizer_tensors()
        parameters = dict(self.model.named_parameters())
        tensors: list[Tensor] = [parameters[name] for name in sorted(self._shared)]
        tensors += [optim[name] for name in sorted(optim) if name.partition("/")[0] in self._shared]
        self._pipeline.give_shared(tensors)

    def _is_copy(self, name: str) -> bool:
        """Whether another stage has this parameter, or what an optimizer keeps of it, in its state."""
        return not self.place.is_first and name.partition("/")[0] in self._shared

    # ---- a step

    def step(self, number: int) -> Step:
        """The optimizer step after `number` others. raises Diverged, with model and optimizers as they were"""
        with _float32_products(self.recipe.model.matmul):
            return self._step(number)

    def _step(self, number: int) -> Step:
        train = self.recipe.train
        first = number * train.rows
        batches = [
            self.rows.batch(begin, train.micro_rows).to(self.device)
            for begin in range(first, first + train.rows, train.micro_rows)
        ]
        counts = _counts(batches)
        learning.zero_grad(self.learners.values())
        loads = {
            name: torch.zeros(self.config.num_experts, dtype=torch.int64, device=self.device)
            for name in _router_names(self.config)
        }
        sums = self._backward(batches[self.place.part :: self.place.num_parts], counts, loads)
        if self._grid is not None:
            sums = self._over_ranks(self._grid, sums, loads)
        norm = self._clip()
        means = _means(sums, counts)
        if not all(torch.isfinite(torch.tensor([*means, norm]))):
            learning.zero_grad(self.learners.values())
            raise self._diverged(number, means, norm)
        lr = learning.rate(number, train.steps, self.recipe.optimizer, self.recipe.lr)
        learning.set_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.step()
        self._masters.round()
        learning.zero_grad(self.learners.values())
        self._move_biases(loads)
        load = {name: float(load.max() / load.float().mean().clamp(min=1)) for name, load in loads.items()}
        return Step(number + 1, *means, lr, norm, counts.tokens, load)

    def _clip(self) -> float:
        """Clip gradients, and those of the indexers by themselves: the rest learns as it would without their loss.

        returns  the norm of all before
        """
        of_indexers = {id(item) for module in self._indexers for item in module.parameters()}
        norms = []
        for is_indexer in (False, True):
            group = {
                name: self.learners[name]
                for name, item in self.parameters.items()
                if (id(item) in of_indexers) is is_indexer
            }
            once = [item for name, item in group.items() if not self._is_copy(name)]
            norms.append(learning.gradient_norm(once, self._squares))
            learning.clip(group.values(), norms[-1], self.recipe.optimizer.clip)
        return math.hypot(*map(float, norms))

    def _backward(self, batches: list[Batch], counts: Counts, loads: dict[str, Tensor]) -> Sums:
        """Gradients of this rank's micro-batches: their share of the global means."""
        sums: list[Sums] = []

        def through(number: int, streams: Tensor | None) -> tuple[Tensor | None, Tensor]:
            passed, loss, found = self._through(batches[number], streams, counts, loads)
            sums.append(found)
            return passed, loss

        if self._pipeline is not None:
            self._pipeline.step(len(batches), through)
        else:
            for number in range(len(batches)):
                through(number, None)[1].backward()
        return Sums(*map(sum, zip(*sums, strict=True)))

    def _through(
        self, batch: Batch, streams: Tensor | None, counts: Counts, loads: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor, Sums]:
        """A micro-batch through the layers of this rank: streams for the next stage, its loss, and its sums."""
        part = self.recipe.loss
        with self._tapped() as routed, self._compared() as told:
            passed = self._hidden(batch, streams)
        loss = main = mtp = torch.zeros((), device=self.device)
        if not isinstance(passed, Tensor):
            main, of_mtp = self._sums(batch, passed)
            mtp = mtp if of_mtp is None else of_mtp
            loss = main / max(1, counts.tokens)
            if part.mtp:
                loss = loss + mtp * (part.mtp / max(1, counts.mtp_tokens))
        documents = _across_rows(batch.documents)
        balance = torch.zeros((), device=self.device)
        of_routers = torch.zeros(2, device=self.device)
        for name, calls in routed.items():
            for scores, ids in calls:
                loads[name] += ids[documents >= 0].flatten().bincount(minlength=len(loads[name]))
                if self._routers[name].hashes:
                    continue
                of_routers += losses.router_sums(scores, documents)
                if part.balance:
                    balance = balance + losses.balance(scores, ids, documents)
        if part.balance:
            loss = loss + balance * (part.balance / max(1, counts.all_tokens))
        indexer = uniform = torch.zeros((), device=self.device)
        for divergence, even in told:
            indexer, uniform = indexer + divergence, uniform + even
        if part.indexer:
            loss = loss + indexer * (part.indexer / max(1, counts.all_tokens))
        mean_balance = float(balance.detach()) / self._num_choosing
        of_indexers = [float(total.detach()) / self._num_indexers for total in (indexer, uniform)]
        mean_routers = (of_routers / self._num_choosing).tolist()
        sums = Sums(float(main.detach()), float(mtp.detach()), mean_balance, *of_indexers, *mean_routers)
        return passed if isinstance(passed, Tensor) else None, loss, sums

    def _over_ranks(self, grid: Grid, sums: Sums, loads: dict[str, Tensor]) -> Sums:
        """Add up what all ranks have: losses, loads, and gradients that FSDP2 does not know."""
        grid.add_gradients(self.learners.values())
        if self._pipeline is not None and (self.place.is_first or self.place.is_last):
            self._pipeline.add_shared(
                [self.learners[name] for name in sorted(self._shared & self.learners.keys())]
            )
        for counted in loads.values():
            grid.total(counted)
        return Sums(*grid.total(torch.tensor(sums, dtype=torch.float64)).tolist())

    def _squares(self, squares: Tensor) -> Tensor:
        """Of gradients of which this rank has a part, and of those that all ranks of its stage have: over all."""
        if self._grid is not None:
            self._grid.total(squares[:1])
            self._grid.total_over_stages(squares[1:])
        return squares

    def _hidden(self, batch: Batch, streams: Tensor | None) -> Tensor | tuple[Tensor, Tensor | None]:
        """What the head takes, twice; or streams for the stage after this one."""
        if self._pipeline is None:
            hidden: tuple[Tensor, Tensor | None] = self.model.hidden(
                batch.ids, batch.next_ids, batch.documents
            )
            return hidden
        return self.model.stage(batch.ids, batch.next_ids, batch.documents, streams)

    def _sums(self, batch: Batch, hidden: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Cross entropies of the next token and of the one after it, summed over the tokens that are learned."""
        hidden_BSH, mtp_BSH = hidden
        head = self.model.lm_head.weight
        main = losses.linear_cross_entropy(hidden_BSH.flatten(0, 1), head, batch.targets.flatten())
        if mtp_BSH is None:
            return main, None
        return main, losses.linear_cross_entropy(mtp_BSH.flatten(0, 1), head, batch.targets_mtp.flatten())

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

    @contextlib.contextmanager
    def _compared(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """What the indexers say while the block runs, if they have a loss: sums of indexing.divergence."""
        heard: list[tuple[Tensor, Tensor]] = []
        for indexer in self._indexers if self.recipe.loss.indexer else ():
            indexer.tap = lambda divergence, uniform: heard.append((divergence, uniform))
        try:
            yield heard
        finally:
            for indexer in self._indexers:
                indexer.tap = None

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
            found=f"loss {means[0]}, MTP loss {means[1]}, balance {means[2]}, indexer {means[3]}, gradient norm {norm} "
            f"in step {number + 1:,}: rows {row:,} to {row + self.recipe.train.rows - 1:,} of epoch {epoch}",
            do="the last checkpoint is untouched: lower optimizer.lr or clip harder, and go on in another train.run",
        )

    def signal(self, stop: StopFlag) -> int:
        """The signal that any rank was sent; 0: none. All ranks ask at the same time."""
        if self._grid is None:
            return stop.signal_number
        found = torch.zeros(256, dtype=torch.int64)
        found[stop.signal_number] = 1
        sent = self._grid.total(found).nonzero()[:, 0].tolist()
        return max(sent)

    @torch.no_grad()
    def evaluate(self, stop: StopFlag) -> float | None:
        """Mean loss over every document of data.eval_files, once; None without them. raises Interrupted"""
        rows = self.eval_rows
        if rows is None:
            return None
        total, tokens = 0.0, 0

        def through(_: int, streams: Tensor | None) -> tuple[Tensor | None, Tensor]:
            nonlocal total
            passed = self._hidden(batch, streams)
            if isinstance(passed, Tensor):
                return passed, torch.zeros(())
            total += float(self._sums(batch, passed)[0])
            return None, torch.zeros(())

        for number in range(rows.per_epoch):
            stop.signal_number = self.signal(stop)
            stop.check()
            batch = rows.batch(number, 1).to(self.device)
            tokens += int((batch.targets != IGNORED).sum())
            with _float32_products(self.recipe.model.matmul):
                if self._pipeline is None:
                    through(number, None)
                else:
                    self._pipeline.forward(number, through)
        if self._grid is not None and self._pipeline is not None:
            total = float(self._grid.total_over_stages(torch.tensor(total, dtype=torch.float64)))
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(_noticed(ranks))
        if ranks.rank == 0:
            stack.enter_context(run.locked())
        ranks.meet(stop)  # nobody looks before rank 0 has tidied up
        document = recipe.document_of(made)
        run.require_same_recipe(document, _FREE)
        about = {"data_sha256": trainer.data_sha256}
        first = 0
        if found := _newest(run, made, trainer.data_sha256):
            run.read(found, trainer.state(), trainer.names())
            trainer.settle()
            first = found.step
        ranks.meet(stop)  # nobody writes before all have looked
        if ranks.rank == 0:
            run.write_recipe(document)
        tell = stack.enter_context(loggers.metrics(run, made, first, ranks.rank))
        saver = stack.enter_context(Saver(run, ranks, made.checkpoint))
        step: Step | None = None
        eval_loss: float | None = None
        for number in range(first, made.train.steps):
            began = clock()
            step = trainer.step(number)
            seconds = clock() - began
            done = step.step
            if done % made.log.every == 0 or done == made.train.steps:
                tell({**step._asdict(), "seconds": round(seconds, 6)})
            on_step(step, seconds)
            saver.look()
            stop.signal_number = trainer.signal(stop)
            due = made.checkpoint.every and done % made.checkpoint.every == 0
            if due or done == made.train.steps or stop.signal_number:
                saver.save(done, trainer.state(), about)
            if stop.signal_number:
                raise Interrupted(stop.signal_number)
            every, is_last = made.log.eval_every, done == made.train.steps
            if trainer.eval_rows and (is_last or (every and done % every == 0)):
                eval_loss = trainer.evaluate(stop)
                tell({"step": done, "eval_loss": eval_loss})
        return Outcome(first, made.train.steps, step, eval_loss)


def _noticed(ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """A rank that is gone is an Environment error on all others."""
    if ranks.size == 1:
        return contextlib.nullcontext()
    from dsv4ckpt.process_group import noticed

    return noticed(
        ranks.size, "the same command continues from the last checkpoint; torchrun --max-restarts gives it"
    )


def _newest(run: RunDirectory, made: Recipe, data_sha256: str) -> Checkpoint | None:
    """The checkpoint to continue from; None: there is none. raises BadRun, Usage for one that does not continue"""
    known = run.checkpoints()
    if not known:
        return None
    if run.about(known[-1]).get("data_sha256") != data_sha256:
        raise Usage(
            "the data is not what this run began with",
            file=known[-1].path,
            do="put the files back to go on, or name another train.run",
        )
    if known[-1].step > made.train.steps:
        raise BadRun(
            "the run has gone further than train.steps",
            expected=f"at most {made.train.steps:,} steps",
            found=f"{known[-1].step:,}",
            do="ask for more steps, or name another train.run",
        )
    return known[-1]


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Made with that precision meanwhile: to torch it is a setting of the whole process, which others may have made."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- model and learners


def _model_of(made: Recipe, found: Survey, config: Config, grid: Grid | None) -> Model:
    part = made.model
    dtype = as_dtype(part.dtype)
    simulation = Simulation(experts_fp4=made.train.qat)
    if grid is not None and made.train.what is Train.FULL:
        return _divided_model(made, found, config, grid, dtype)
    if not part.initialize:
        packed = part.experts == "packed"
        experts: Literal["dense", "packed"] = "packed" if packed else "dense"
        here = (grid.place.expert_part, grid.place.num_expert_parts) if grid else (0, 1)
        return load(found, dtype, experts, part.device, simulation, part=here).train()
    return _initialized(made, config, dtype).to(part.device).train()


def _divided_model(made: Recipe, found: Survey, config: Config, grid: Grid, dtype: torch.dtype) -> Model:
    """This rank's part of it."""
    from .pipeline import cut

    if made.model.initialize:
        return grid.divided(cut(_initialized(made, config, dtype), grid.place)).train()
    with torch.device("meta"):
        model = Model(config, Simulation(experts_fp4=made.train.qat)).float()
    return grid.loaded(cut(model, grid.place), found, made.model.source, dtype).train()


def _initialized(made: Recipe, config: Config, dtype: torch.dtype) -> Model:
    """With random weights."""
    model = Model(config, Simulation(experts_fp4=made.train.qat))
    initialize(model, torch.Generator().manual_seed(made.train.seed))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, dtype))
    return model


def _learners(model: Model, made: Recipe, grid: Grid | None) -> dict[str, nn.Parameter]:
    if made.train.what is Train.LORA:
        from . import adapters

        adapters.attach(model, made.lora, torch.Generator().manual_seed(made.train.seed))
        if grid is not None:
            grid.with_adapters(model)
        return learning.learning(model)
    is_stage = grid is not None and grid.place.num_stages > 1
    return learning.learners(model, made.train, made.loss, is_stage=is_stage)


def _router_names(config: Config) -> list[str]:
    """Of all of them, those of other stages too."""
    layers = [f"model.layers.{index}.mlp.gate" for index in range(len(config.compress_ratios))]
    return layers + [f"mtp.{index}.mlp.gate" for index in range(config.num_mtp)]


def _num_choosing(config: Config) -> int:
    """Routers that do not hash."""
    return len(_router_names(config)) - config.num_hash_layers


# ---- sums


def _counts(batches: list[Batch]) -> Counts:
    """Tokens of the global batch."""
    return Counts(
        tokens=sum(int((batch.targets != IGNORED).sum()) for batch in batches),
        mtp_tokens=sum(int((batch.targets_mtp != IGNORED).sum()) for batch in batches),
        all_tokens=sum(int((batch.documents >= 0).sum()) for batch in batches),
    )


def _means(sums: Sums, counts: Counts) -> tuple[float, float, float, float, float, float, float]:
    return (
        sums.loss / max(1, counts.tokens),
        sums.mtp / max(1, counts.mtp_tokens),
        sums.balance / max(1, counts.all_tokens),
        sums.indexer / max(1, counts.all_tokens),
        sums.indexer_uniform / max(1, counts.all_tokens),
        sums.router_z / max(1, counts.all_tokens),
        sums.router_entropy / max(1, counts.all_tokens),
    )


def _across_rows(documents_BS: Tensor) -> Tensor:
    """Numbers of the documents of all rows, [B * S], each its own; padding stays below 0."""
    most = documents_BS.shape[1]
    row = torch.arange(len(documents_BS), device=documents_BS.device)[:, None] * most
    return torch.where(documents_BS >= 0, documents_BS + row, -1).flatten()
