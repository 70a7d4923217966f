"""Model -> checkpoint: a durable directory in any storage and either namespace, by the machinery that converts files.

Owns what a model may be saved like; everything else is dsv4ckpt's.
"""

from __future__ import annotations

import os
from dataclasses import replace

from dsv4ckpt import export, formats, plan
from dsv4ckpt.errors import NotConform
from dsv4ckpt.export import Path
from dsv4ckpt.formats import Storage
from dsv4ckpt.run import Summary
from dsv4ckpt.survey import Survey
from dsv4ckpt.survey import survey as survey_of

from .loading import surveyed
from .memory import checkpoint_of, packed_storage
from .model import Model


def save(
    model: Model,
    path: Path,
    *,
    like: Path,
    to: str = "bf16",
    names: str = "transformers",
    source: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    scale_policy: str = "keep",
    allow_lossy: bool = False,
    num_workers: int = 2,
) -> Summary:
    """Write a model as `dsv4 convert` would write it from files, with config, index, checksums and manifest.

    path             a new or empty directory: a save is never continued, and one that fails leaves nothing
    like             a checkpoint of the same model, in any storage: its config and small files are carried over, and so
                     are its tensors that the model does not use (model.unused). Base's copies of embed and head follow
                     the model's where they were the same
    to               bf16, native, fp8, ...: as --to of dsv4 convert. A wider model is rounded to bfloat16, to nearest
                     even, before anything else
    names            transformers or deepseek; other tools' formats go with deepseek
    source           to="native": the release that the model came from. What is untouched gets its bytes again, what
                     changed is measured against it. None: `like` itself if it is as released, else its sidecar
    max_shard_bytes  of a shard; one tensor may exceed it
    scale_policy     keep or fresh, as --scale-policy: of blocks that changed
    allow_lossy      accept that values are rounded without measure, or that a change vanishes
    memory           as a conversion; no second copy of the model, on no disk either
    returns          what was written, and what quantizing cost each tensor
    raises           Usage, ForeignOutput, NotConform before anything is written; NotFinite, NotLossless,
                     VanishingChange, NoSpace, Environment
    """
    options = export.options_of(
        to=to,
        names=names,
        source=source,
        max_shard_bytes=max_shard_bytes,
        scale_policy=scale_policy,
        allow_lossy=allow_lossy,
    )
    path = os.fspath(path)
    export.require_new(path)
    found = _same_model(model, like)
    storage = formats.storage_of(options.target, found.identity.release.storage)
    shown = storage if storage is packed_storage(model) else Storage.BF16
    known = export.original_of(options, shown, found, surveyed(source)[0] if source is not None else None)
    checkpoint = checkpoint_of(model, found, shown)
    made = plan.make_plan(survey_of(checkpoint), options, known)
    return export.write(made, checkpoint, path, num_workers=num_workers)


def _same_model(model: Model, like: Path) -> Survey:
    """raises NotConform if `like` describes another model"""
    found, config = surveyed(like)
    mine = replace(model.config, clamps_shared=config.clamps_shared)  # no config.json says it
    if mine != config:
        different = [key for key, value in vars(config).items() if getattr(mine, key) != value]
        raise NotConform(
            "the checkpoint that like= names is one of another model",
            file=formats.CONFIG_NAME,
            expected=", ".join(f"{key} {getattr(mine, key)!r}" for key in different[:3])[:200],
            found=", ".join(f"{key} {getattr(config, key)!r}" for key in different[:3])[:200],
            do="name the checkpoint that the model was loaded from",
        )
    return found
