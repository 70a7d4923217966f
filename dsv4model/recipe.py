"""A training run as values: every key with its unit and reason, read strictly from TOML and key=value.

Owns what may be asked for and what goes together; knows no tensors, no files but the recipe's own, no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from dsv4ckpt.errors import Usage

MAX_RECIPE_BYTES = 1024 * 1024
LOGGERS = ("tensorboard", "wandb", "trackio")
_Part = TypeVar("_Part")


class Train(StrEnum):
    """Which weights learn."""

    FULL = "full"
    LORA = "lora"


class Kind(StrEnum):
    """What lines of data files are."""

    CHAT = "chat"
    TEXT = "text"
    TOKENS = "tokens"
    HELLASWAG = "hellaswag"


class Optimizer(StrEnum):
    ADAMW = "adamw"
    ADAMW8BIT = "adamw8bit"
    MUON = "muon"


class Recompute(StrEnum):
    """What backward computes again instead of keeping it."""

    NONE = "none"
    BLOCKS = "blocks"


class Entries(StrEnum):
    """Which of them an indexer learns from."""

    SPARSE = "sparse"
    DENSE = "dense"


class Decay(StrEnum):
    """The learning rate after its warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


def key(why: str, default: Any = MISSING, unit: str = "") -> Any:
    """A field of a recipe: what it means, in what unit. Without a default it must be given."""
    return field(default=default, metadata={"why": why, "unit": unit})


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """[model]"""

    source: str = key("checkpoint to start from, in any storage format", unit="path")
    dtype: str = key("of weights that are trained: float32, or bfloat16 for the memory", "float32")
    device: str = key("cpu or cuda", "cpu")
    matmul: str = key(
        "of float32 products: highest; high (TF32) and medium are faster on a GPU and round more (torch)",
        "highest",
    )
    experts: str = key("packed: routed experts and dense matrices stay FP4 and FP8; goes with lora", "dense")
    weights: str = key(
        "a run, or a torch DCP directory, whose weights are taken in place of the source's", "", "path"
    )
    initialize: bool = key("start from random weights of the source's config instead of its tensors", False)


@dataclass(frozen=True, kw_only=True)
class TrainPart:
    """[train]"""

    run: str = key(
        "directory of this run: checkpoints, metrics, the curve; the same one continues", unit="path"
    )
    what: Train = key("full: all weights but the frozen; lora: adapters only", Train.FULL)
    steps: int = key("optimizer steps in all", unit="steps")
    rows: int = key("rows in a global batch, over all ranks and micro batches", 8, "rows")
    micro_rows: int = key("rows in a forward pass; gradients are summed over the others", 1, "rows")
    seed: int = key("of the order of data, adapters and initial weights", 0)
    freeze: tuple[str, ...] = key(
        "patterns of parameters that stay, and !patterns of those that learn nevertheless: SFT leaves routers and "
        "indexers as they are",
        ("*.mlp.gate.*", "*.indexer.*"),
    )
    recompute: Recompute = key(
        "blocks: backward computes each layer again, with the same experts; less memory, more time",
        Recompute.NONE,
    )
    qat: bool = key(
        "routed experts through FP4 in the forward pass: what is exported is what was trained", False
    )


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """[data]"""

    files: tuple[str, ...] = key(
        "JSON lines, or datasets:NAME@SPLIT as the library datasets has it; read in this order", unit="paths"
    )
    kind: Kind = key(
        "chat: messages; text: a text each; tokens: ids each; hellaswag: as published", Kind.CHAT
    )
    eval_files: tuple[str, ...] = key("the same, for the loss on what is not trained on", (), "paths")
    length: int = key("tokens in a row", 2048, "tokens")
    pack: bool = key("fill rows with several documents, which do not see each other", True)
    thinking: str = key("chat: how reasoning is shown, as in dsv4 generate", "chat")
    shuffle: bool = key("another order in each epoch, by train.seed", True)
    too_long: str = key(
        "documents beyond data.length: split (the rest is a document of its own), cut or skip (counted), refuse",
        "cut",
    )
    bad_lines: str = key("refuse, or skip: such lines are left, named and counted", "refuse")


@dataclass(frozen=True, kw_only=True)
class OptimizerPart:
    """[optimizer]"""

    kind: Optimizer = key(
        "adamw; adamw8bit, whose moments are 8-bit codes (torchao); the paper's muon for matrices, AdamW for the rest",
        Optimizer.ADAMW,
    )
    lr: float | None = key("learning rate. None: 1e-5, with lora 1e-4", None)
    betas: tuple[float, float] = key("decay of the moments (paper)", (0.9, 0.95))
    eps: float = key("AdamW's; the paper trains with 1e-20, far below float32's use in the wild", 1e-8)
    weight_decay: float = key("per step and unit of lr; not on norms, biases and scales", 0.0)
    masters: bool = key(
        "move float32 copies of bfloat16 weights, which are then rounded: small steps add up", False
    )
    offload: bool = key("masters and their optimizer state in the CPU's memory", False)
    clip: float = key("largest norm of all gradients together; 0: none", 1.0)
    decay: Decay = key("of lr after the warm-up", Decay.COSINE)
    warmup: int = key("steps with a rising lr", 0, "steps")
    least: float = key("lr at the end, as a part of lr", 0.1)
    muon_momentum: float = key("Muon's (paper)", 0.95)


@dataclass(frozen=True, kw_only=True)
class LossPart:
    """[loss]: each is a mean over the tokens of the global batch"""

    mtp: float = key("weight of the MTP block's loss: 0.1 as in the paper's last phase, 0.3 before", 0.1)
    balance: float = key(
        "weight of the sequence-wise balance loss of each router that learns (paper: 1e-4)", 0.0
    )
    bias_update: float = key("step of the selection bias against load (paper: 1e-3); 0 for SFT", 0.0)
    indexer: float = key(
        "weight of the indexers' own loss, KL from where attention looks (DeepSeek-V3.2: 1); they must learn",
        0.0,
    )
    indexer_entries: Entries = key(
        "what it is over: sparse, the entries that are picked; dense, all of them, and attention sees all (warm-up)",
        Entries.SPARSE,
    )


@dataclass(frozen=True, kw_only=True)
class ParallelPart:
    """[parallel]: how several ranks divide what one has alone; rows are divided over what is left of them"""

    experts: int = key("parts that the routed experts are divided into, tokens go between", 1, "ranks")
    stages: int = key("parts that the layers are divided into, one after the other", 1, "ranks")
    layers: tuple[int, ...] = key("layers of each stage; empty: as even as can be", (), "layers")


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """[lora]"""

    rank: int = key("of the adapters", 16)
    alpha: float = key("adapters count alpha / rank", 32.0)
    targets: tuple[str, ...] = key(
        "patterns of weights that get one",
        ("*.self_attn.*_proj", "*.mlp.shared_experts.*", "*.mlp.experts.*"),
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointPart:
    """[checkpoint]"""

    every: int = key("steps between checkpoints; 0: only at the end and when stopped", 0, "steps")
    keep: int = key("how many stay; older ones are removed once a newer is whole", 2)
    background: bool = key("write while training goes on; takes CPU memory for a copy of the state", False)


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """[log]"""

    every: int = key("steps between lines", 1, "steps")
    eval_every: int = key("steps between looks at data.eval_files; 0: at the end", 0, "steps")
    to: tuple[str, ...] = key(
        "who gets the metrics too, if installed: tensorboard, wandb, trackio; metrics.jsonl is always there",
        (),
    )
    project: str = key("of wandb and trackio: where the run belongs", "dsv4")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    model: ModelPart
    train: TrainPart
    data: DataPart
    optimizer: OptimizerPart = OptimizerPart()
    loss: LossPart = LossPart()
    lora: LoraPart = LoraPart()
    parallel: ParallelPart = ParallelPart()
    checkpoint: CheckpointPart = CheckpointPart()
    log: LogPart = LogPart()

    @property
    def lr(self) -> float:
        """The learning rate, its default resolved."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        return 1e-4 if self.train.what is Train.LORA else 1e-5


class Told(NamedTuple):
    """A key of a recipe, for people."""

    name: str
    default: Any  # MISSING: it must be given
    unit: str
    why: str


def every_key() -> Iterator[Told]:
    """Every key, in order."""
    for part in dataclasses.fields(Recipe):
        for item in dataclasses.fields(_type(Recipe, part.name)):
            yield Told(f"{part.name}.{item.name}", item.default, item.metadata["unit"], item.metadata["why"])


def default_of(name: str, *otherwise: Any) -> Any:
    """What a key is if nobody says; there being no such key, or no default, what is said here."""
    known = (told.default for told in every_key() if told.name == name and told.default is not MISSING)
    return next(known, *otherwise)


def read_recipe(data: bytes, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file's bytes, and key=value after it.

    changes  "train.steps=10": values as in TOML; what is no TOML is a text
    raises   Usage: TOML errors with their line, an unknown key with the nearest name, a wrong type, what does not fit
    """
    if len(data) > MAX_RECIPE_BYTES:
        raise Usage(
            "the recipe is too large", expected=f"at most {MAX_RECIPE_BYTES:,} bytes", do="name a recipe"
        )
    try:
        document = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise Usage(f"the recipe is no TOML: {error}", do="mend it there") from None
    for change in changes:
        _apply(document, change)
    return read_document(document)


def read_document(document: Mapping[str, Any]) -> Recipe:
    """A recipe from its tables. raises Usage"""
    parts = {}
    for name in document:
        if name not in _names(Recipe):
            raise _unknown(name, _names(Recipe))
    for part in dataclasses.fields(Recipe):
        given = document.get(part.name, {})
        if not isinstance(given, dict):
            raise Usage(f"{part.name} is a table of the recipe", expected=f"[{part.name}]", do="write it so")
        parts[part.name] = _part(_type(Recipe, part.name), part.name, given)
    recipe = Recipe(**parts)
    _require_sound(recipe)
    return recipe


def document_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe with every default, as JSON holds it."""
    return dataclasses.asdict(recipe)


def _apply(document: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    part, dot, inner = name.strip().partition(".")
    if equals and part and not dot:
        raise _unknown(part, _names(Recipe))
    if not equals or not part:
        raise Usage(
            f"{change[:80]!r} changes no key of the recipe",
            expected="key=value, such as train.steps=10",
            do="write it so",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    table = document.setdefault(part, {})
    if isinstance(table, dict):
        table[inner] = value


def _part(kind: type[_Part], name: str, given: Mapping[str, Any]) -> _Part:
    known = _names(kind)
    for inner in given:
        if inner not in known:
            raise _unknown(f"{name}.{inner}", [f"{name}.{item}" for item in known])
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.default is MISSING and item.name not in given:
            raise Usage(
                f"the recipe lacks {name}.{item.name}: {item.metadata['why']}",
                do=f"write it below [{name}], or give {name}.{item.name}=... after the recipe",
            )
    return kind(
        **{inner: _value(f"{name}.{inner}", _type(kind, inner), value) for inner, value in given.items()}
    )


def _value(name: str, wanted: Any, value: Any) -> Any:
    """A value of a field's type. raises Usage"""
    made = _as(wanted, value)
    if made is MISSING:
        raise Usage(
            f"{name} has a value of the wrong kind",
            expected=_words(wanted),
            found=repr(value)[:80],
            do="see dsv4 finetune --keys for what it means",
        )
    return made


def _as(wanted: Any, value: Any) -> Any:
    """The value as that type; MISSING: it is none."""
    arguments = typing.get_args(wanted)
    if type(None) in arguments:
        return None if value is None else _as(arguments[0], value)
    if typing.get_origin(wanted) is tuple:
        value = [value] if isinstance(value, str) and arguments[-1] is ... else value  # one is a list of one
        kinds = arguments[:1] * len(value) if arguments[-1] is ... and isinstance(value, list) else arguments
        if not isinstance(value, list | tuple) or len(kinds) != len(value):
            return MISSING
        items = [_as(kind, item) for kind, item in zip(kinds, value, strict=True)]
        return MISSING if any(item is MISSING for item in items) else tuple(items)
    if issubclass(wanted, StrEnum):
        return wanted(value) if value in {item.value for item in wanted} else MISSING
    if wanted is float and type(value) is int:
        return float(value)
    return value if type(value) is wanted else MISSING


def _words(wanted: Any) -> str:
    arguments = typing.get_args(wanted)
    if type(None) in arguments:
        return _words(arguments[0])
    if typing.get_origin(wanted) is tuple:
        inner = _words(arguments[0])
        return f"a list of {inner}" if arguments[-1] is ... else f"{len(arguments)} of: {inner}"
    if issubclass(wanted, StrEnum):
        return " or ".join(item.value for item in wanted)
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[wanted]


def _unknown(name: str, known: Sequence[str]) -> Usage:
    inner = name.rpartition(".")[2]
    elsewhere = [told.name for told in every_key() if told.name.partition(".")[2] == inner]
    near = elsewhere or difflib.get_close_matches(name, known, 1, 0.5)
    return Usage(
        f"there is no key {name[:80]!r}",
        expected=f"{near[0]}?" if near else ", ".join(known),
        do="check the spelling; dsv4 finetune --keys lists all",
    )


def _names(kind: type) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _type(kind: type, name: str) -> Any:
    return typing.get_type_hints(kind)[name]


def _require_sound(recipe: Recipe) -> None:
    """What each number may be, and what goes together. raises Usage"""
    model, train, data = recipe.model, recipe.train, recipe.data
    _require_one_of("model.dtype", model.dtype, ("float32", "bfloat16"))
    _require_one_of("model.device", model.device, ("cpu", "cuda"))
    _require_one_of("model.matmul", model.matmul, ("highest", "high", "medium"))
    _require_one_of("model.experts", model.experts, ("dense", "packed"))
    _require_one_of("data.too_long", data.too_long, ("split", "cut", "skip", "refuse"))
    _require_one_of("data.bad_lines", data.bad_lines, ("refuse", "skip"))
    _require_one_of("data.thinking", data.thinking, ("chat", "thinking"))
    for name in recipe.log.to:
        _require_one_of("log.to", name, LOGGERS)
    for name in (
        "train.steps",
        "train.rows",
        "train.micro_rows",
        "parallel.experts",
        "parallel.stages",
        "lora.rank",
        "checkpoint.keep",
        "log.every",
    ):
        _require(_of(recipe, name) >= 1, name, "1 or more", _of(recipe, name))
    for name in ("optimizer.weight_decay", "optimizer.clip", "optimizer.warmup", "optimizer.least", "optimizer.eps",
                 "loss.mtp", "loss.balance", "loss.bias_update", "loss.indexer", "checkpoint.every",
                 "log.eval_every", "train.seed"):  # fmt: skip
        _require(_of(recipe, name) >= 0, name, "0 or more", _of(recipe, name))
    _require(data.length >= 2, "data.length", "2 or more", data.length)
    _require(bool(data.files), "data.files", "a file at least", list(data.files))
    _require(recipe.lr > 0, "optimizer.lr", "above 0", recipe.lr)
    _require(all(0 <= beta < 1 for beta in recipe.optimizer.betas), "optimizer.betas", "from 0 to below 1",
             list(recipe.optimizer.betas))  # fmt: skip
    _require(train.rows % train.micro_rows == 0, "train.rows", "a multiple of train.micro_rows", train.rows)
    is_lora = train.what is Train.LORA
    if model.experts == "packed" and not is_lora:
        raise Usage(
            'model.experts="packed" holds codes, which do not learn',
            expected='train.what = "lora"',
            do="train adapters, or leave experts dense",
        )
    if model.initialize and (is_lora or model.experts == "packed"):
        raise Usage("random weights are trained in full", expected='train.what = "full"', do="leave one out")
    if recipe.loss.indexer and is_lora:
        raise Usage(
            "loss.indexer moves the indexers themselves", expected='train.what = "full"', do="leave one out"
        )
    if recipe.loss.indexer_entries is Entries.DENSE and not recipe.loss.indexer:
        raise Usage(
            'loss.indexer_entries="dense" is for indexers that learn',
            expected="loss.indexer above 0",
            do="give it a weight, such as loss.indexer=1.0, or leave both out",
        )
    if recipe.optimizer.masters and (is_lora or model.dtype != "bfloat16"):
        raise Usage(
            "optimizer.masters has nothing to copy: what is trained is float32",
            expected='model.dtype = "bfloat16" and train.what = "full"',
            do="leave it out",
        )
    if recipe.optimizer.offload and not recipe.optimizer.masters:
        raise Usage("optimizer.offload moves masters", expected="optimizer.masters = true", do="give both")
    if recipe.optimizer.offload and recipe.optimizer.kind is Optimizer.MUON:
        raise Usage(
            "Muon multiplies matrices, which a CPU is too slow for",
            expected='optimizer.kind = "adamw"',
            do="leave optimizer.offload out",
        )
    if model.weights and (is_lora or model.initialize):
        raise Usage(
            "model.weights gives all weights of a model that is trained in full",
            expected='train.what = "full", model.initialize = false',
            do="leave one out; adapters start from what dsv4 export wrote of a run",
        )
    if train.qat and is_lora:
        raise Usage(
            "train.qat moves the experts themselves", expected='train.what = "full"', do="leave one out"
        )


def _of(recipe: Recipe, name: str) -> Any:
    part, _, inner = name.partition(".")
    return getattr(getattr(recipe, part), inner)


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, " or ".join(known), value)


def _require(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise Usage(f"{name} cannot be that", expected=expected, found=repr(found)[:80], do="change it")
