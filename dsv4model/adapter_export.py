"""A run's adapters -> a directory that PEFT loads, streamed: nothing is merged, nothing is rounded.

The files are those of peft.py, and beside them what every finished output has: a list of SHA-256 and the manifest,
which comes last.  One adapter is held at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4ckpt import __version__, contained, outdir, probe, strictjson
from dsv4ckpt.errors import Usage
from dsv4ckpt.formats import SUMS_NAME
from dsv4ckpt.manifest import read_manifest
from dsv4ckpt.run import Summary, write_sums
from dsv4ckpt.sink import Receipt
from dsv4ckpt.stop import StopFlag

from . import peft
from .adapters import Place
from .loading import surveyed
from .recipe import Train
from .runs import Checkpoint, RunDirectory
from .trained import Trained, left_by, recipe_of


@dataclass(frozen=True)
class AdapterPlan:
    """What is to be written, and from what."""

    files: peft.Files
    source: str  # the checkpoint that was trained from
    release: str
    step: int
    trained: Trained

    @property
    def sha256(self) -> str:
        """Also tells values apart: of steps, and of runs."""
        return hashlib.sha256((self.files.sha256 + self.trained.sample_sha256()).encode()).hexdigest()

    def values(self, place: Place) -> tuple[Tensor, Tensor]:
        """An adapter, read now. raises SourceChanged"""
        with self.trained.reading():
            name = place.adapter_name
            return self.trained.whole(f"{name}.lora_A"), self.trained.whole(f"{name}.lora_B")


def planned(run: RunDirectory, checkpoint: Checkpoint) -> AdapterPlan:
    """From headers. raises Usage if the run trains no adapters; BadRun, BadDcp, NotConform, MissingFile"""
    made = recipe_of(run)
    if made.train.what is not Train.LORA:
        raise Usage(
            "the run has no adapters: it trains the weights themselves",
            expected='train.what = "lora"',
            found=f'train.what = "{made.train.what.value}"',
            do="leave out --adapter",
        )
    about = run.about(checkpoint)
    like, config = surveyed(made.model.source)
    left = left_by(made, config)
    trained = Trained(made, checkpoint, about)
    trained.require(left.tensors)
    files = peft.files_of(left.adapted, made.model.source)
    return AdapterPlan(files, made.model.source, like.identity.release.name, checkpoint.step, trained)


def execute(
    plan: AdapterPlan,
    path: str,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
    stop: StopFlag | None = None,
) -> Summary:
    """Carry out a plan into a new directory, or continue where an earlier run of it stopped.

    on_bytes  told of bytes that are on their way
    raises    NoSpace before the first byte; NotFinite: nothing stays; Busy, ForeignOutput, SourceChanged, Interrupted,
              Environment
    """
    stop = stop or StopFlag()
    if files := _complete(plan, path):
        return Summary(files, 0, 0, len(files), was_complete=True)
    outdir.require_space(path, plan.files.num_bytes)

    def told(count: int) -> None:
        stop.check()
        on_bytes(count)

    known = {peft.TENSORS_NAME, peft.CONFIG_NAME, SUMS_NAME}
    stamps = plan.trained.checkpoint.stamps_sha256()
    with outdir.open_outdir(path, plan.sha256, known, stamps) as out:
        num_resumed = len(out.finished)
        peft.write_files(plan.files, out, plan.values, told)
        write_sums(out)
        files = tuple(receipt for _, receipt in sorted(out.finished.items()))
        out.finish(strictjson.pretty(_manifest(plan, files)))
    return Summary(files, 0, 0, num_resumed)


def _complete(plan: AdapterPlan, path: str) -> tuple[Receipt, ...]:
    """The files of a finished output of the same plan, tidied up; none if there is work to do."""
    found = read_manifest(path) if probe.is_directory(path) else None
    if found is None or found.plan_sha256 != plan.sha256:
        return ()
    if any(contained.size_of(path, file.name, follow_links=False) != file.size for file in found.files):
        return ()
    outdir.remove_leftovers(path)
    return tuple(Receipt(*file, {}) for file in found.files)


def _manifest(plan: AdapterPlan, files: tuple[Receipt, ...]) -> dict[str, Any]:
    """As of a conversion; its source is the run's checkpoint."""
    checkpoint = plan.trained.checkpoint
    return {
        "format": 1,
        "tool": f"dsv4ckpt {__version__}",
        "plan_sha256": plan.sha256,
        "release": plan.release,
        "options": {"adapter": True, "step": plan.step, "layers": None},
        "source": [
            {
                "file": name,
                "size": shard.stamp.size,
                "header_sha256": shard.header.sha256,
                **checkpoint.proof(name),
            }
            for name, shard in sorted(checkpoint.shards.items())
        ],
        "files": [{"file": file.name, "size": file.size, "sha256": file.sha256} for file in files],
        "values": {"not_exact": 0, "not_finite": 0},
        "dropped": [],
    }
