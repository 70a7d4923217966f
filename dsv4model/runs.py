"""A training run's directory: what stands in it when, and that nothing in it is ever half there.

    RUN/recipe.json              the recipe with every default
    RUN/metrics.jsonl            a line a step
    RUN/checkpoints/step-N/      a torch DCP directory, with run.json beside its files
    RUN/latest                   the name of the newest of them, written last

A checkpoint is written beside its place and renamed: it is there whole, or not at all.  Knows no models.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dsv4ckpt import strictjson
from dsv4ckpt.contained import opened
from dsv4ckpt.dcp_reader import DirectoryReader
from dsv4ckpt.errors import Busy, Dsv4Error, Environment, ForeignOutput, MissingFile, Usage, printable
from dsv4ckpt.outdir import make_directory, sync_directory, write_all
from dsv4ckpt.ranks import ALONE, Ranks
from dsv4ckpt.shard import read_exactly
from dsv4ckpt.stop import StopFlag

from .recipe import default_of

RECIPE, METRICS, LOGGERS, CHECKPOINTS, LATEST, ABOUT = (
    "recipe.json",
    "metrics.jsonl",
    "loggers.json",
    "checkpoints",
    "latest",
    "run.json",
)
MODEL, OPTIM = "model.", "optim."  # before the names of weights and of optimizer state in a checkpoint
_STEP = re.compile(r"step-([0-9]{1,12})")
_MOST_ABOUT_BYTES = 1024 * 1024
_LOCK = ".lock"


class BadRun(Dsv4Error):
    """A run's directory does not hold what a run leaves there."""


class Checkpoint(NamedTuple):
    """One that is whole."""

    step: int
    path: str


class RunDirectory:
    """For a process that reads, or for the ranks that train: rank 0 locks it and writes what is not tensors."""

    def __init__(self, path: str, ranks: Ranks = ALONE) -> None:
        self.path, self._ranks = path, ranks

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory if need be, and keep other trainers out. raises Busy, Environment"""
        with _errors(self.path):
            self._require_ours()
            make_directory(os.path.join(self.path, CHECKPOINTS))
            fd = os.open(os.path.join(self.path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with _errors(self.path):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Busy(
                        "another process trains into this directory",
                        file=_LOCK,
                        do="wait for it, or name another train.run",
                    ) from None
                self._remove_unfinished()
            yield
        finally:
            os.close(fd)

    # ---- checkpoints

    def checkpoints(self) -> list[Checkpoint]:
        """All that are whole, the oldest first. raises Environment"""
        below = os.path.join(self.path, CHECKPOINTS)
        with _errors(self.path):
            names = os.listdir(below) if os.path.isdir(below) else []
        found = [(int(match[1]), name) for name in names if (match := _STEP.fullmatch(name))]
        return [Checkpoint(step, os.path.join(below, name)) for step, name in sorted(found)]

    def write(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Checkpoint:
        """Save tensors, each rank its part. raises BadRun if the step is there already; Environment"""
        final = os.path.join(self.path, CHECKPOINTS, f"step-{step}")
        temporary = os.path.join(self.path, CHECKPOINTS, f".step-{step}.tmp")
        if os.path.lexists(final):
            raise BadRun(
                "a checkpoint of this step is there already", file=final, do="nothing is written over it"
            )
        with _errors(self.path):
            self._write_tensors(temporary, tensors)
            if self._ranks.rank == 0:
                self._publish(step, temporary, final, about)
        self._ranks.meet(StopFlag())
        return Checkpoint(step, final)

    def _write_tensors(self, directory: str, tensors: Mapping[str, Tensor]) -> None:
        """raises OSError; Environment for what torch makes of it"""
        writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
        ranks = self._ranks
        try:
            save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise _io_error(cause) or Environment(
                "cannot write the checkpoint",
                found=str(cause).partition("\n")[0][:200],
                do="check space and permissions; the same command continues from the last whole checkpoint",
            ) from None

    def _publish(self, step: int, temporary: str, final: str, about: Mapping[str, Any]) -> None:
        """All ranks have written: the checkpoint comes to its name."""
        sizes = {
            name: os.path.getsize(os.path.join(temporary, name)) for name in sorted(os.listdir(temporary))
        }
        _write(os.path.join(temporary, ABOUT), _json({**about, "step": step, "files": sizes}))
        sync_directory(temporary)
        os.rename(temporary, final)
        sync_directory(os.path.dirname(final))
        self.publish(LATEST, f"step-{step}\n".encode())

    def about(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What stands beside a checkpoint's tensors. raises BadRun, Environment"""
        with opened(checkpoint.path, ABOUT, False) as fd:
            size = os.fstat(fd).st_size
            if size > _MOST_ABOUT_BYTES:
                raise BadRun(f"{ABOUT} is too large", file=ABOUT, do="take another checkpoint")
            data = read_exactly(fd, size, 0, ABOUT)
        try:
            document = strictjson.loads(data, floats=True)
        except strictjson.Malformed as error:
            raise BadRun(f"{ABOUT} is malformed: {error}", file=ABOUT, do="take another checkpoint") from None
        if not isinstance(document, dict) or document.get("step") != checkpoint.step:
            raise BadRun(f"{ABOUT} is not of this step", file=ABOUT, do="take another checkpoint")
        files = document.get("files")
        for name, size in (files if isinstance(files, dict) else {}).items():
            path = os.path.join(checkpoint.path, os.path.basename(name))
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise BadRun(
                    "a file of the checkpoint is not as it was written",
                    file=printable(name),
                    expected=f"{size} bytes",
                    do="take another checkpoint, or a copy of this one",
                )
        return document

    def read(
        self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], names: Collection[str] = ()
    ) -> dict[str, Any]:
        """Fill tensors in place. raises BadRun, BadDcp, Usage, Environment

        names  of all that the ranks fill together, and the checkpoint holds no others; empty: those of this one
        """
        wanted = set(names) or set(tensors)
        about = self.about(checkpoint)
        reader = DirectoryReader(checkpoint.path)
        stored = set(reader.read_metadata().state_dict_metadata)
        if stored != wanted or reader.others:
            more, less = sorted(stored - wanted), sorted(wanted - stored)
            raise BadRun(
                "the checkpoint holds other tensors than this training has",
                file=checkpoint.path,
                expected=f"{len(wanted):,} tensors" + (f", among them {less[0]!r}" if less else ""),
                found=f"{len(stored):,}" + (f", among them {printable(more[0])!r}" if more else ""),
                do="go on with the recipe that it was made by",
            )
        try:
            load(dict(tensors), storage_reader=reader, no_dist=self._ranks.size == 1)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        return about

    def require_there(self) -> None:
        """raises MissingFile if there is no such directory"""
        if not os.path.isdir(self.path):
            raise MissingFile(
                "there is no run and no torch DCP directory there",
                found=repr(self.path),
                do="name a run's directory, or one of dsv4 reshard --to dcp, as model.weights",
            )

    def read_weights(self, tensors: Mapping[str, Tensor], names: Collection[str]) -> None:
        """Fill a model's tensors in place from this run's newest checkpoint, or from any torch DCP directory.

        names   of all that the ranks fill together, as the model calls them; nothing else may be there but what
                optimizers keep
        raises  MissingFile, BadRun, BadDcp, Usage, Environment
        """
        known = self.checkpoints()
        reader = DirectoryReader(known[-1].path if known else self.path, widens=True)
        stored = set(reader.read_metadata().state_dict_metadata)
        prefix = MODEL if known else ""
        wanted = {prefix + name for name in names}
        others = {name for name in stored - wanted if not (known and name.startswith(OPTIM))}
        if others or wanted - stored:
            raise BadRun(
                "these are not the weights of such a model",
                file=printable(os.path.basename(os.path.normpath(self.path))),
                expected=f"{len(wanted):,} tensors, called as transformers calls them, experts fused",
                found=f"{sorted(wanted - stored)[0]!r} is not there" if wanted - stored else
                f"{printable(sorted(others)[0])!r} is there as well",
                do="name a run of full training as model.weights, or a directory of dsv4 reshard --to dcp",
            )  # fmt: skip
        try:
            state = {prefix + name: tensor for name, tensor in tensors.items()}
            load(state, storage_reader=reader, no_dist=self._ranks.size == 1)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None

    def keep(self, count: int) -> None:
        """Remove all but the newest checkpoints. raises Environment"""
        with _errors(self.path):
            for checkpoint in self.checkpoints()[:-count]:
                # out of sight first, so that it is never half there
                gone = os.path.join(os.path.dirname(checkpoint.path), f".step-{checkpoint.step}.old")
                os.rename(checkpoint.path, gone)
                shutil.rmtree(gone)

    # ---- everything else

    def publish(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        temporary = os.path.join(self.path, f".{name}.tmp")
        with _errors(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            _write(temporary, data)
            os.rename(temporary, os.path.join(self.path, name))
            sync_directory(self.path)

    def require_same_recipe(self, document: Mapping[str, Any], free: frozenset[str]) -> None:
        """Compare the recipe with the one that the run began with, if it has begun.

        free     keys that may change: "part.key", or a whole "part"
        raises   Usage, ForeignOutput, BadRun, Environment
        """
        if not os.path.lexists(os.path.join(self.path, RECIPE)):
            with _errors(self.path):
                self._require_ours()
            return
        before = self.recipe()
        now = json.loads(_json(document))
        for part in sorted({*now, *before}):
            for key in sorted({*now.get(part, {}), *before.get(part, {})}):
                # a run that began before there was such a key had what its default keeps
                default = json.loads(json.dumps(default_of(f"{part}.{key}", None)))
                one, other = before.get(part, {}).get(key, default), now.get(part, {}).get(key)
                if one != other and not {part, f"{part}.{key}"} & free:
                    raise Usage(
                        f"{part}.{key} is not what this run began with",
                        file=RECIPE,
                        expected=json.dumps(one)[:80],
                        found=json.dumps(other)[:80],
                        do="put it back to go on, or name another train.run",
                    )

    def recipe(self) -> dict[str, Any]:
        """The recipe that the run was made by, with every default. raises MissingFile, BadRun, Environment"""
        path = os.path.join(self.path, RECIPE)
        if not os.path.isfile(path):
            raise MissingFile(
                "this is no run's directory", file=RECIPE, do="name the directory that train.run named"
            )
        document = self._document(RECIPE)
        if not all(isinstance(part, dict) for part in document.values()):
            raise BadRun(f"{RECIPE} holds no recipe", file=RECIPE, do="name another train.run")
        return document

    def _document(self, name: str) -> dict[str, Any]:
        with _errors(self.path), open(os.path.join(self.path, name), "rb") as file:
            data = file.read(_MOST_ABOUT_BYTES)
        try:
            document = strictjson.loads(data, floats=True)
        except strictjson.Malformed as error:
            raise BadRun(f"{name} is malformed: {error}", file=name, do="name another train.run") from None
        if not isinstance(document, dict):
            raise BadRun(f"{name} is no JSON object", file=name, do="name another train.run")
        return document

    def write_recipe(self, document: Mapping[str, Any]) -> None:
        """The recipe that the run goes on with. raises Environment"""
        self.publish(RECIPE, _json(document))

    def known_as(self) -> dict[str, str]:
        """What loggers know the run by, each its own. raises BadRun, Environment"""
        if not os.path.lexists(os.path.join(self.path, LOGGERS)):
            return {}
        return {name: str(value) for name, value in self._document(LOGGERS).items()}

    def keep_known_as(self, names: Mapping[str, str]) -> None:
        """raises Environment"""
        self.publish(LOGGERS, _json(names))

    def cut_metrics(self, step: int) -> None:
        """Drop lines of steps after `step`, which are to be made again."""
        path = os.path.join(self.path, METRICS)
        if not os.path.lexists(path):
            return
        with _errors(self.path), open(path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
        self.publish(METRICS, b"".join(kept))

    def add_metrics(self, document: Mapping[str, Any]) -> None:
        """One more line."""
        line = json.dumps(document, allow_nan=False).encode() + b"\n"
        with _errors(self.path):
            fd = os.open(
                os.path.join(self.path, METRICS), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
            try:
                write_all(fd, line)
            finally:
                os.close(fd)

    def _require_ours(self) -> None:
        names = set(os.listdir(self.path)) if os.path.isdir(self.path) else set()
        if RECIPE not in names and names - {_LOCK, CHECKPOINTS}:
            raise ForeignOutput(
                "the run's directory holds something else",
                file=os.path.basename(os.path.normpath(self.path)),
                do="name a new directory as train.run, or the one of a run to continue",
            )

    def _remove_unfinished(self) -> None:
        below = os.path.join(self.path, CHECKPOINTS)
        for name in os.listdir(below):
            if name.startswith(".step-"):
                shutil.rmtree(os.path.join(below, name))


def _io_error(error: BaseException | None) -> OSError | None:
    """What the file system said, where torch has an error of its own for it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _step_of(line: bytes) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 2**63
    return step if type(step) is int else 2**63


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Environment(
            f"cannot use the run's directory: {os.strerror(error.errno or 5)}",
            file=os.path.basename(path),
            do="check space and permissions; the same command continues from the last whole checkpoint",
        ) from None
