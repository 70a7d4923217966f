"""Values in memory -> a durable directory: what may be asked for, what they are compared with, and that nothing stays
of an export that failed.  The bytes are plan's and run's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from enum import StrEnum
from typing import NoReturn, TypeVar

from . import formats, original, outdir, probe, run, sidecar
from .errors import Dsv4Error, ForeignOutput, NotFinite, Usage
from .formats import OUR_NAMES, WORK_NAME, Storage, Target
from .held import HeldCheckpoint
from .names import Namespace
from .original import Original
from .plan import ConvertOptions, Plan, ScalePolicy
from .ranks import ALONE, Ranks
from .run import Summary
from .survey import Survey

Path = str | os.PathLike[str]
_Word = TypeVar("_Word", bound=StrEnum)


def options_of(
    *, to: str, names: str, source: Path | None, max_shard_bytes: int, scale_policy: str, allow_lossy: bool
) -> ConvertOptions:
    """raises Usage"""
    options = ConvertOptions(
        target=_one_of(Target, to, "to"),
        namespace=_one_of(Namespace, names, "names"),
        max_shard_bytes=max_shard_bytes,
        scale_policy=_one_of(ScalePolicy, scale_policy, "scale_policy"),
        allow_lossy=allow_lossy,
    )
    if source is not None and options.target is not Target.NATIVE:
        raise Usage('source= goes with to="native"', do="leave it out")
    return options


def _one_of(words: type[_Word], given: str, what: str) -> _Word:
    if given not in [word.value for word in words]:
        raise Usage(
            f"{what}= names nothing that can be written",
            expected=", ".join(word.value for word in words),
            found=repr(given),
            do="choose one of these",
        )
    return words(given)


def require_new(path: str) -> None:
    """raises ForeignOutput: values in memory cannot be told apart, so nothing that lies there is continued"""
    if probe.is_directory(path) and os.listdir(path):
        raise ForeignOutput(
            "the output directory is not empty",
            found=repr(path),
            do="save into a new directory, or remove this one first",
        )


def original_of(
    options: ConvertOptions, shown: Storage, like: Survey, source: Survey | None
) -> Original | None:
    """What untouched values are told by: `source`, or `like` if it is as released, or its sidecar.

    shown   the storage that the values are held in
    raises  NotConform, BadSidecar
    """
    storage = formats.storage_of(options.target, like.identity.release.storage)
    # codes that are copied under other names have nothing to ask a release about
    is_asked = shown is not storage or options.namespace is Namespace.DEEPSEEK
    if options.target is not Target.NATIVE or not is_asked:
        return None
    if source is not None:
        return original.of_source(source)
    if like.identity.storage is like.identity.release.storage:
        return original.of_source(like)
    path = like.checkpoint.sidecar_path
    found = sidecar.open_sidecar(path) if path else None
    return original.of_sidecar(found) if found else None


def write(
    plan: Plan,
    checkpoint: HeldCheckpoint,
    path: str,
    *,
    num_workers: int,
    ranks: Ranks = ALONE,
    is_quiet: Callable[[], bool] = lambda: True,
) -> Summary:
    """Carry out a plan into a new or empty directory; what a failed one finished is removed again.

    is_quiet  asked by every rank after an error: True once no rank writes any more
    raises    as run.execute
    """
    was_there, is_ours = probe.is_directory(path), False

    def on_event(event: run.Event) -> None:
        nonlocal is_ours
        is_ours = is_ours or (ranks.rank == 0 and isinstance(event, run.Started))

    try:
        return run.execute(
            plan,
            checkpoint,
            path,
            num_workers=num_workers,
            accept_changes=True,
            on_event=on_event,
            ranks=ranks,
        )
    except BaseException as error:
        if is_quiet() and is_ours and not probe.is_there(os.path.join(path, formats.MANIFEST_NAME)):
            _discard(path, plan, was_there=was_there)
        if isinstance(error, NotFinite):
            _refuse_not_finite(error)
        raise


def _refuse_not_finite(error: NotFinite) -> NoReturn:
    raise NotFinite(
        error.what,
        found=error.facts.get("found"),
        do="a training run that diverged leaves such values; go back to a state from before",
    ) from None


def _discard(path: str, plan: Plan, *, was_there: bool) -> None:
    """Remove what a failed save finished: nobody can continue it. Our claim goes last, so that nobody comes between."""
    if probe.is_real_directory(os.path.join(path, WORK_NAME)):
        names = [*(file.name for file in plan.files), *(name for name, _, _ in plan.copied), *plan.written]
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
