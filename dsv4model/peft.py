"""Adapters on disk, as PEFT's LoRA writes and reads them: adapter_config.json and adapter_model.safetensors.

Owns names, layout and what a config may say.  A directory is complete or not there; nothing in it is run.
Source: PEFT 0.21, LoraConfig and lora.ParamWrapper; tests hold both directions against the package.

Modules are in target_modules, by their full names.  Parameters that are no module of their own are in
target_parameters: the experts', and o_a_proj, whose groups PEFT's layer for linear modules does not know.  Of two
adapted parameters of one module the first is wrapped first, and so called base_layer.
"""

#  E experts;  R rows, C columns of a matrix;  r rank

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from dsv4ckpt import contained, formats, outdir, probe, shard, strictjson
from dsv4ckpt.errors import BadConfig, ForeignOutput, MissingFile, NotConform, NotFinite, Usage
from dsv4ckpt.formats import Shape
from dsv4ckpt.outdir import OutDir
from dsv4ckpt.shard import Entry

from .adapters import Adapter, Place, attached, dtype_in, places, put, require_none
from .dumps import DTYPES
from .layers import GroupedLinear, Linear

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_KEY = re.compile(re.escape(_ROOT) + r"(?P<owner>.+)\.lora_(?P<side>[AB])\.weight")
_FLOATS = {stored: dtype for dtype, stored in DTYPES.items() if dtype.is_floating_point}
_LIMITS = strictjson.Limits(objects=1000, lists=1000, commas=200_000)
# Keys of a config that do not change what the tensors mean. Others are what we do not know: they must be off.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "target_modules", "target_parameters", "task_type",
}  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal")  # others change the base's weights as well
_AGAIN = "take the files as PEFT or dsv4 wrote them, both from one directory"


# ---- layout


def _owner(name: str, adapted: Container[str]) -> str:
    """What keys call the owner of an adapted weight."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.base_layer" if leaf == "gate_up_proj" and f"{owner}.down_proj" in adapted else owner


def _key(owner: str, side: str) -> str:
    return f"{_ROOT}{owner}.lora_{side}.weight"


def _stored(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A [E * r, C], expert by expert, and B [R, r * E], rank by rank."""
    if lora_A.dim() == 2:
        return lora_A, lora_B
    return lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)


def _fill(adapter: Adapter, lora_A: Tensor, lora_B: Tensor) -> None:
    if adapter.lora_A.dim() == 3:
        experts, rank, _ = adapter.lora_A.shape
        lora_A, lora_B = (
            lora_A.unflatten(0, (experts, rank)),
            lora_B.unflatten(1, (rank, experts)).permute(2, 0, 1),
        )
    adapter.lora_A.data.copy_(lora_A)
    adapter.lora_B.data.copy_(lora_B)


def _shapes(place: Place, rank: int) -> tuple[Shape, Shape]:
    """Of A and B as they are stored."""
    *lead, rows, cols = place.shape
    width = math.prod(lead) * rank
    return (width, cols), (rows, width)


# ---- writing

Values = Callable[[Place], tuple[Tensor, Tensor]]  # an adapter's A and B


class Files(NamedTuple):
    """What is to be written, but for the values."""

    places: tuple[Place, ...]  # in the order of their tensors
    header: bytes
    config: bytes
    data_bytes: int

    @property
    def num_bytes(self) -> int:
        return len(self.config) + self.tensors_bytes

    @property
    def tensors_bytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.config + self.header).hexdigest()


def files_of(adapters: Mapping[str, Place], base_name: str) -> Files:
    """From names, shapes and dtypes: the adapters may be on the meta device.

    adapters   places that have one, one or more, by the names of their weights
    base_name  what PEFT loads the base from: a repository or a directory
    """
    listed: list[tuple[str, str, Shape]] = []
    for name, place in adapters.items():
        assert place.adapter is not None
        shapes = zip("AB", _shapes(place, place.adapter.rank), strict=True)
        dtype = DTYPES[place.adapter.lora_A.dtype]
        listed += [(_key(_owner(name, adapters), side), dtype, shape) for side, shape in shapes]
    places = tuple(adapters.values())
    return Files(
        places=places,
        header=shard.encode_header(listed, {"format": "pt"}),
        config=strictjson.pretty(_config(places, base_name)),
        data_bytes=sum(formats.stored_bytes(dtype, shape) for _, dtype, shape in listed),
    )


def write_files(
    files: Files, out: OutDir, values: Values, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Both files, the config last, but for those that an earlier run has finished. One adapter is held at a time.

    on_bytes  told of bytes that are on their way
    raises    NotFinite, Environment, and whatever `values` raises
    """
    if TENSORS_NAME not in out.finished:
        with out.new_file(TENSORS_NAME, files.tensors_bytes) as sink:
            sink.write(files.header)
            for place in files.places:
                for tensor in _stored(*values(place)):
                    if not tensor.isfinite().all():
                        raise NotFinite(
                            f"the adapter of {place.name!r} holds NaN or infinity",
                            do="take an earlier checkpoint",
                        )
                    sink.write(_bytes(tensor))
                    on_bytes(tensor.nbytes)
    if CONFIG_NAME not in out.finished:
        out.publish_bytes(CONFIG_NAME, files.config)


def save_adapters(model: nn.Module, path: str | os.PathLike[str], base_name: str) -> None:
    """Write a model's adapters into a new directory.

    base_name  what PEFT loads the base from: a repository or a directory
    raises     Usage if there are no adapters; ForeignOutput if something is there; NotFinite, NoSpace, Environment
    """
    adapters = {place.name: place for place in attached(model)}
    if not adapters:
        raise Usage("the model has no adapters", do="attach some, or save the model itself")
    files, path = files_of(adapters, base_name), os.fspath(path)
    if probe.is_there(path):
        raise ForeignOutput(
            "adapters are written into a new directory, and this one is there",
            found=repr(os.path.basename(os.path.normpath(path))),
            do="choose another name, or remove it",
        )
    outdir.require_space(path, files.num_bytes, what="adapters", do="make room, or choose another disk")
    with outdir.open_outdir(path, files.sha256, {CONFIG_NAME, TENSORS_NAME}) as out:
        write_files(files, out, _of_model)
        out.clean()


def _of_model(place: Place) -> tuple[Tensor, Tensor]:
    assert place.adapter is not None
    return place.adapter.lora_A.detach(), place.adapter.lora_B.detach()


def _config(adapted: Sequence[Place], base_name: str) -> dict[str, Any]:
    adapter = adapted[0].adapter
    assert adapter is not None
    modules, parameters = [], []
    for place in adapted:
        if isinstance(place.module, Linear) and not isinstance(place.module, GroupedLinear):
            modules.append(place.name.removesuffix(".weight"))
        else:
            parameters.append(place.name)
    alpha = adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # vLLM takes whole numbers
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _bytes(tensor: Tensor) -> memoryview:
    data = bytearray(tensor.nbytes)
    torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return memoryview(data)


# ---- reading


def load_adapters(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, nn.Parameter]:
    """Attach the adapters of a directory to a model without any; then only they learn.

    returns  their parameters by name, as adapters.attach does
    raises   Usage if the model has adapters; MissingFile, UnsafePath, BadConfig, BadHeader; NotConform for tensors that
             do not fit the model; NotFinite, SourceChanged, Environment: the model is as it was
    """
    require_none(model)
    path = os.fspath(path)
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not probe.is_there(os.path.join(path, name)):
            raise MissingFile(
                "there are no adapters here", file=name, do="name the directory with both files"
            )
    with contained.opened(path, CONFIG_NAME, False) as fd:
        size = os.fstat(fd).st_size
        if size > formats.MAX_CONFIG_BYTES:
            _refuse("is too large", f"at most {formats.MAX_CONFIG_BYTES:,} bytes", f"{size:,} bytes")
        rank, alpha = _rank_and_alpha(shard.read_exactly(fd, size, 0, CONFIG_NAME))
    with contained.opened(path, TENSORS_NAME, False) as fd:
        entries = shard.read_header(fd, TENSORS_NAME).entries
        dtype, made = dtype_in(model), {}
        for owner, place in _matched(entries, places(model), rank, dtype).items():
            made[place] = place.blank(rank, alpha, dtype)
            sides = (_key(owner, side) for side in "AB")
            _fill(made[place], *(_tensor(fd, key, entries[key]) for key in sides))
    return put(model, made)


def _rank_and_alpha(data: bytes) -> tuple[int, float]:
    """From a config that asks for plain LoRA. raises BadConfig"""
    try:
        strictjson.require_modest(data, _LIMITS)
        config = strictjson.loads(data, floats=True)
    except strictjson.Malformed as error:
        _refuse(f"is malformed: {error}")
    if not isinstance(config, dict):
        _refuse("holds no JSON object")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if config.get("peft_type") != "LORA":
        _refuse("is of another method", "peft_type LORA", config.get("peft_type"))
    if type(rank) is not int or not 1 <= rank <= formats.MAX_COUNT:
        _refuse("has no valid r", "1 or more", rank)
    if type(alpha) not in (int, float) or not 0 < alpha <= formats.MAX_COUNT:
        _refuse("has no valid lora_alpha", "a number above 0", alpha)
    if config.get("bias", "none") != "none":
        _refuse("asks for biases, which V4 does not have", "none", config["bias"])
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        _refuse("has a start that changes the base's weights", "init_lora_weights true", start)
    known = _FREE | {"peft_type", "r", "lora_alpha", "bias", "init_lora_weights"}
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, []):
            _refuse(f"asks for {key[:80]!r}, which is not known here", "plain LoRA", value)
    return rank, float(alpha)


def _matched(
    entries: dict[str, Entry], known: dict[str, Place], rank: int, dtype: torch.dtype
) -> dict[str, Place]:
    """Owner as keys have it -> its place. Whatever is not understood is refused. raises NotConform"""
    owners = set()
    for key, entry in entries.items():
        match = _KEY.fullmatch(key)
        if match is None:
            _misfit(
                f"{key[:200]!r} is no tensor of an adapter", f"{_ROOT}MODULE.lora_A.weight or lora_B", None
            )
        stored = _FLOATS.get(entry.dtype)
        if stored is None or torch.promote_types(stored, dtype) != dtype:
            _misfit(f"{key[:200]!r} has a dtype that the model's adapters do not hold", dtype, entry.dtype)
        owners.add(match["owner"])
    if not owners:
        _misfit("there are no tensors", "adapters", None)
    matched = {owner: _place_of(owner, entries, known, rank) for owner in sorted(owners)}
    if len({place.name for place in matched.values()}) != len(matched):
        _misfit("two adapters are for one weight", "one each", None)
    return matched


def _place_of(owner: str, entries: dict[str, Entry], known: dict[str, Place], rank: int) -> Place:
    """The weight whose shape these tensors have: no two of one module are alike."""
    sides = [entries.get(_key(owner, side)) for side in "AB"]
    found = tuple(side.shape if side else None for side in sides)
    module = owner.removesuffix(".base_layer")
    names = [f"{module}.gate_up_proj", f"{module}.down_proj"]
    names += [f"{module}.weight"] if module == owner else []
    candidates = [known[name] for name in names if name in known]
    if not candidates:
        _misfit(f"the model has no weight for {owner[:200]!r}", "a module that can have adapters", None)
    fitting = [place for place in candidates if _shapes(place, rank) == found]
    if not fitting:
        shapes = " or ".join(str(_shapes(place, rank)) for place in candidates)
        _misfit(f"the adapter of {owner[:200]!r} does not fit its weight", shapes, found)
    return fitting[0]


def _tensor(fd: int, key: str, entry: Entry) -> Tensor:
    data = bytearray(entry.end - entry.begin)
    shard.read_into(fd, memoryview(data), entry.begin, TENSORS_NAME)
    tensor = torch.frombuffer(data, dtype=_FLOATS[entry.dtype]).view(entry.shape)
    if not tensor.isfinite().all():
        raise NotFinite(f"{key!r} holds NaN or infinity", file=TENSORS_NAME, do="take an earlier checkpoint")
    return tensor


def _refuse(what: str, expected: object = None, found: object = None) -> NoReturn:
    shown = None if found is None else repr(found)[:80]
    raise BadConfig(f"{CONFIG_NAME} {what}", file=CONFIG_NAME, expected=expected, found=shown, do=_AGAIN)


def _misfit(what: str, expected: object, found: object) -> NoReturn:
    raise NotConform(what, file=TENSORS_NAME, expected=expected, found=found, do=_AGAIN)
