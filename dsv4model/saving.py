"""Model -> checkpoint: a durable directory in any storage and either namespace, by the machinery that converts files.

Owns what a model's checkpoint is compared with and when a directory may be written; the bytes are dsv4ckpt's.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from enum import StrEnum
from typing import NoReturn, TypeVar

from dsv4ckpt import formats, original, outdir, plan, probe, run, sidecar
from dsv4ckpt.errors import Dsv4Error, ForeignOutput, NotConform, NotFinite, Usage
from dsv4ckpt.formats import OUR_NAMES, WORK_NAME, Storage, Target
from dsv4ckpt.names import Namespace
from dsv4ckpt.original import Original
from dsv4ckpt.plan import ConvertOptions, ScalePolicy
from dsv4ckpt.run import Summary
from dsv4ckpt.survey import Survey
from dsv4ckpt.survey import survey as survey_of

from .loading import surveyed
from .memory import checkpoint_of, packed_storage
from .model import Model

Path = str | os.PathLike[str]
_Word = TypeVar("_Word", bound=StrEnum)


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
    options = ConvertOptions(
        target=_one_of(Target, to, "to"),
        namespace=_one_of(Namespace, names, "names"),
        max_shard_bytes=max_shard_bytes,
        scale_policy=_one_of(ScalePolicy, scale_policy, "scale_policy"),
        allow_lossy=allow_lossy,
    )
    if source is not None and options.target is not Target.NATIVE:
        raise Usage('source= goes with to="native"', do="leave it out")
    path = os.fspath(path)
    _require_new(path)
    found = _same_model(model, like)
    storage = formats.storage_of(options.target, found.identity.release.storage)
    shown = storage if storage is packed_storage(model) else Storage.BF16
    # codes that are copied under other names have nothing to ask a release about
    is_asked = shown is not storage or options.namespace is Namespace.DEEPSEEK
    known = _original(found, source) if options.target is Target.NATIVE and is_asked else None
    checkpoint = checkpoint_of(model, found, shown)
    made = plan.make_plan(survey_of(checkpoint), options, known)
    was_there, is_ours = probe.is_directory(path), False

    def on_event(event: run.Event) -> None:
        nonlocal is_ours
        is_ours = is_ours or isinstance(event, run.Started)

    try:
        return run.execute(
            made, checkpoint, path, num_workers=num_workers, accept_changes=True, on_event=on_event
        )
    except NotFinite as error:
        _refuse_not_finite(error)
    finally:
        if is_ours and not probe.is_there(os.path.join(path, formats.MANIFEST_NAME)):
            _discard(path, made, was_there=was_there)


def _one_of(words: type[_Word], given: str, what: str) -> _Word:
    if given not in [word.value for word in words]:
        raise Usage(
            f"{what}= names nothing that can be written",
            expected=", ".join(word.value for word in words),
            found=repr(given),
            do="choose one of these",
        )
    return words(given)


def _require_new(path: str) -> None:
    """raises ForeignOutput: a model's values cannot be told apart, so nothing that lies there is continued"""
    if probe.is_directory(path) and os.listdir(path):
        raise ForeignOutput(
            "the output directory is not empty",
            found=repr(path),
            do="save into a new directory, or remove this one first",
        )


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


def _original(like: Survey, source: Path | None) -> Original | None:
    """What untouched values are told by. raises NotConform, BadSidecar"""
    if source is not None:
        return original.of_source(surveyed(source)[0])
    if like.identity.storage is like.identity.release.storage:
        return original.of_source(like)
    found = sidecar.open_sidecar(like.checkpoint.directory)
    return original.of_sidecar(found) if found else None


def _refuse_not_finite(error: NotFinite) -> NoReturn:
    raise NotFinite(
        error.what,
        found=error.facts.get("found"),
        do="a training run that diverged leaves such values; go back to a state from before",
    ) from None


def _discard(path: str, made: plan.Plan, *, was_there: bool) -> None:
    """Remove what a failed save finished: nobody can continue it. Our claim goes last, so that nobody comes between."""
    if probe.is_real_directory(os.path.join(path, WORK_NAME)):
        names = [*(file.name for file in made.files), *(name for name, _, _ in made.copied), *made.written]
        folders = {os.path.dirname(name) for name in names} - {""}
        for name in (*names, *OUR_NAMES):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, name))
        for folder in sorted(folders, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(path, folder))
        with contextlib.suppress(Dsv4Error):  # the first error is the one to tell
            outdir.remove_leftovers(path)
    if not was_there:
        with contextlib.suppress(OSError):
            os.rmdir(path)
