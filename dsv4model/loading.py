"""Checkpoint -> model: every parameter is allocated once and filled from the files, whatever they store.

Owns which tensor of a checkpoint becomes which parameter, and that none is forgotten; decoding is dsv4ckpt.values'.
A model is complete or there is none: what does not fit is refused from headers, before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container
from typing import Literal

import torch
from torch import Tensor, nn

from dsv4ckpt.errors import NotConform, Usage
from dsv4ckpt.formats import QUANTS, Kind, Quant, Storage
from dsv4ckpt.held import same_bytes, twins
from dsv4ckpt.hub_source import open_checkpoint
from dsv4ckpt.inventory import Layout, Stored, lay_out
from dsv4ckpt.names import Namespace
from dsv4ckpt.survey import Survey
from dsv4ckpt.survey import survey as survey_of
from dsv4ckpt.values import Values

from .config import Config
from .layers import dtype_name
from .model import Model, dtype_of
from .moe import Experts
from .packed import SCALES, pack_modules
from .simulate import Simulation

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def load(
    source: str | os.PathLike[str] | Survey,
    dtype: torch.dtype = torch.bfloat16,
    experts: Literal["dense", "packed"] = "dense",
    device: torch.device | str = "cpu",
    simulation: Simulation | None = None,
    *,
    follow_links: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Model:
    """The model that a checkpoint holds, in evaluation mode, all floating parameters with requires_grad.

    source      a directory with a checkpoint of a V4 text model, in any storage and either namespace; or its survey
    dtype       bfloat16, float32 or float64: the values are those of the BF16 conversion, exactly, in each of them.
                What config.is_kept_wide names stays float32 in a bfloat16 model
    experts     "packed": every matrix that the checkpoint quantizes stays codes and scales (packed.py), so that the
                model takes the memory of its files; only what stays is trained
    simulation  what of the reference's quantization a forward pass imitates
    part        which part of the routed experts is loaded, of how many, which divides them; the module then needs an
                Experts.elsewhere to be called
    memory      the model and less than 64 MB
    returns     model.unused names the checkpoint's tensors that are no part of it: DSpark stages, and Base's copies of
                embed and head, of which model.notes tells if they differ
    raises      Usage, BadConfig (V4.1, Vision-Exp), NotConform and its kin for a tensor that is missing or too many,
                UnknownRelease, MissingFile, BadIndex, BadHeader, UnsafePath: before anything is allocated;
                NotFinite, SourceChanged, Environment while it is filled
    """
    if dtype not in DTYPES:
        raise Usage(
            "a model cannot be loaded in this dtype",
            expected=", ".join(dtype_name(known) for known in DTYPES),
            found=str(dtype),
            do="leave dtype out for bfloat16",
        )
    found, config = surveyed(source, follow_links=follow_links)
    layout = _target_layout(found, experts)
    with torch.device("meta"):
        model = Model(config, simulation)
        if layout.storage is not Storage.BF16:
            pack_modules(model, quantized_modules(layout))
    wanted = model.state_dict()
    _require_equal(wanted, layout)
    model.unused = unused_tensors(found, layout, wanted)
    with found.checkpoint.reader() as reader:
        model.notes = tuple(
            f"{copy} is not the same as {twin}, which the model uses in its place"
            for copy, twin in twins(model.unused).items()
            if not same_bytes(found, reader, copy, twin)
        )
        values = Values(found, reader)
        for name in wanted:
            if not name.endswith(SCALES):
                _fill(model, layout, name, values, dtype, torch.device(device), part)
    for module in model.modules():
        if isinstance(module, Experts):
            module.part = part
    return model.eval()


def surveyed(source: str | os.PathLike[str] | Survey, *, follow_links: bool = False) -> tuple[Survey, Config]:
    """A checkpoint that conforms, of a model that we know. Reads headers only."""
    if isinstance(source, Survey):
        checkpoint = source.checkpoint
    else:
        checkpoint = open_checkpoint(os.fspath(source), follow_links=follow_links)
    # first of all: other architectures are refused before their tensors are looked at
    config = Config.read(checkpoint.config())
    found = source if isinstance(source, Survey) else survey_of(checkpoint)
    if found.identity.release.family.vision:
        raise NotConform(
            "this is a Vision-Exp checkpoint, and dsv4model knows the text models of V4 only",
            expected="a router with one bias",
            found="e_score_correction_bias_vl or bias_vl",
            do="dsv4 inspect, convert and verify work with it; to run it, take an engine that knows it",
        )
    found.require_conform()
    return found, config


def model_layout(found: Survey, storage: Storage) -> Layout:
    """The tensors of a model, and which rows of which of them are a released tensor."""
    return lay_out(found.logicals, found.identity.release.family.table, storage, Namespace.TRANSFORMERS)


def _target_layout(found: Survey, experts: str) -> Layout:
    if experts == "dense":
        return model_layout(found, Storage.BF16)
    if experts != "packed":
        raise Usage(
            "experts are loaded in one of two ways",
            expected="'dense' or 'packed'",
            found=repr(experts),
            do="leave experts out for dense",
        )
    storage = found.identity.storage
    if storage is Storage.BF16:
        raise Usage(
            'experts="packed" keeps codes as they are stored, and this checkpoint stores values (BF16)',
            do='load the released checkpoint, or one of dsv4 convert --to native; or leave experts="dense"',
        )
    if any(quant.per_tensor for quant in QUANTS[storage].values()):
        raise Usage(
            f'experts="packed" does not know the two-level scales of {storage.value}',
            do='load the released checkpoint: it has the same codes; or leave experts="dense"',
        )
    return model_layout(found, storage)


def quantized_modules(layout: Layout) -> dict[str, Quant]:
    """Which modules hold quantized matrices in a layout of the transformers namespace, and how."""
    modules = {}
    for name, stored in layout.stored.items():
        quant = layout.quant(stored.parts[0].logical)
        if quant and stored.leaf == "weight":
            modules[name.rpartition(".")[0]] = quant
    return modules


def _require_equal(wanted: dict[str, Tensor], layout: Layout) -> None:
    """The inventory and the modules were written apart; that they agree is tested for every release."""
    for name, tensor in wanted.items():
        stored = layout.stored.get(name)
        assert stored is not None and stored.shape == tuple(tensor.shape), (name, stored, tensor.shape)


def unused_tensors(found: Survey, layout: Layout, wanted: Container[str]) -> tuple[str, ...]:
    """Released names of the tensors that no parameter takes, sorted."""
    names = (logical.name for logical in found.logicals)
    return tuple(sorted(name for name in names if layout.weights[name][0] not in wanted))


# ---- one parameter


def _fill(
    model: Model,
    layout: Layout,
    name: str,
    values: Values,
    dtype: torch.dtype,
    device: torch.device,
    experts: tuple[int, int],
) -> None:
    """Allocate a parameter or buffer, with its scales if it has some, and fill it part by part."""
    stored = _of_experts(layout.stored[name], experts)
    if layout.quant(stored.parts[0].logical) is None:
        kind = stored.parts[0].logical.kind
        held = torch.int64 if kind is Kind.I64 else dtype_of(name, dtype)
        tensor = torch.empty(stored.shape, dtype=held, device=device)
        for part in stored.parts:
            values.fill(part.logical.name, rows_of(tensor, stored, part.logical.name))
        _put(model, name, tensor)
        return
    scales_name = layout.scales[stored.parts[0].logical.name][0]
    grids = _of_experts(layout.stored[scales_name], experts)
    codes = torch.empty(stored.shape, dtype=model.get_buffer(name).dtype, device=device)
    scales = torch.empty(grids.shape, dtype=model.get_buffer(scales_name).dtype, device=device)
    for part in stored.parts:
        mine = part.logical.name
        values.fill_raw(mine, rows_of(codes, stored, mine), rows_of(scales, grids, mine))
    _put(model, name, codes)
    _put(model, scales_name, scales)


def _of_experts(stored: Stored, part: tuple[int, int]) -> Stored:
    """The part of a tensor of all experts, [E, R, C]; any other as it is."""
    number, count = part
    if len(stored.shape) < 3 or count == 1:
        return stored
    experts, rows, cols = stored.shape
    first, last = (experts // count * rows * edge for edge in (number, number + 1))
    parts = [one._replace(begin=one.begin - first) for one in stored.parts if first <= one.begin < last]
    return dataclasses.replace(stored, shape=(experts // count, rows, cols), parts=parts)


def rows_of(tensor: Tensor, stored: Stored, logical: str) -> Tensor:
    """The part of a parameter that one released tensor is, as a view: [R, C], or [C]."""
    if tensor.dim() < 2:
        return tensor
    (part,) = (part for part in stored.parts if part.logical.name == logical)
    return tensor.flatten(0, -2)[part.begin : part.begin + part.rows]


def _put(model: Model, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(tensor) if is_parameter else tensor)
