"""Compares a directory with a list of ids as the Hub publishes them; hashes every byte and believes no manifest.

Owns the four forms that such a list comes in.  It may come from a stranger: its file names must be plain and relative
before anything is opened.  Reads no headers and knows no tensors.
Source: Git LFS (the id is the SHA-256 of the file), git's blob id (SHA-1 over `blob SIZE NUL` and the file), the JSON
of the Hub's tree and model routes as huggingface_hub 2.4 reads them.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from . import contained, formats, probe, strictjson
from .errors import BadManifest, MissingFile, UnsafePath, printable
from .formats import CONFIG_NAME, INDEX_NAME
from .hub import Remote
from .stop import StopFlag
from .verify import (
    FileVerdict,
    OnEvent,
    Started,
    Subset,
    Watch,
    hash_file,
    ignore,
    part_of,
    without_none,
)

# `sha256sum` (text or binary mode), or `git lfs ls-files -l` (* the file is there, - only its pointer)
_LINE = re.compile(r"([0-9a-f]{64}) (?:[ *]|[*-] )(\S.*)")
_SHA256, _SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")
_MAX_SHOWN = 200  # characters of what a list says
_LIMITS = strictjson.Limits(objects=50_000, lists=50_000, commas=500_000)


class Published(NamedTuple):
    """A file as the Hub knows it: by the SHA-256 of its bytes if LFS keeps it, else by its git blob id."""

    name: str
    size: int | None
    sha256: str | None
    git_blob: str | None = None


@dataclass(frozen=True)
class OidsReport:
    """What became of the listed files. Failures: a checked file that is not ok, an unlisted shard, nothing checked."""

    files: tuple[FileVerdict, ...]  # that are here, or that no checkpoint can be without
    not_here: tuple[str, ...]  # other listed files: pictures, code
    unlisted: tuple[str, ...]  # shards in the directory that the list does not know
    num_listed: int
    num_bytes: int  # that were hashed

    @property
    def ok(self) -> bool:
        return bool(self.files) and not self.unlisted and all(file.verdict == "ok" for file in self.files)

    def document(self) -> dict[str, Any]:
        files = [without_none(file._asdict()) for file in self.files]
        lists = {"files": files, "not_here": [*self.not_here], "unlisted": [*self.unlisted]}
        return {"ok": self.ok, **self.__dict__, **lists}


def verify_oids(
    directory: str,
    published: tuple[Published, ...],
    *,
    subset: Subset | None = None,
    follow_links: bool = False,
    num_workers: int = 2,
    on_event: OnEvent = ignore,
    stop: StopFlag | None = None,
) -> OidsReport:
    """Compare the listed files, or every t-th one, with their ids; sizes first.

    Shards, index and config must be here if they are listed. Shards that are not listed are looked for in the directory
    itself, not below it: readers in the field do not look there either.
    on_event  called from worker threads
    raises    MissingFile, UnsafePath, Usage, SourceChanged, Environment, what `stop` raises
    """
    if not probe.is_directory(directory):
        raise MissingFile("there is no such directory", found=repr(directory), do="check the spelling of it")
    chosen = part_of(published, subset)
    sizes = {file.name: contained.size_of(directory, file.name, follow_links) for file in chosen}
    to_hash = [
        file for file in chosen if sizes[file.name] is not None and file.size in (None, sizes[file.name])
    ]
    num_bytes = sum(sizes[file.name] or 0 for file in to_hash)
    on_event(Started(num_bytes))
    watch = Watch(on_event, stop)
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        verdicts = pool.map(
            lambda file: _verdict(directory, file, sizes[file.name], follow_links, watch), chosen
        )
        checked = [item for item in verdicts if item.verdict != "missing" or _is_needed(item.name)]
    absent = [file.name for file in chosen if sizes[file.name] is None and not _is_needed(file.name)]
    with contained.io_errors("."):
        present = [name for name in os.listdir(directory) if name.endswith(".safetensors")]
    unlisted = sorted(printable(name) for name in {*present} - {file.name for file in published})
    return OidsReport(tuple(checked), tuple(absent), tuple(unlisted), len(published), num_bytes)


def _is_needed(name: str) -> bool:
    return name.endswith(".safetensors") or name in (CONFIG_NAME, INDEX_NAME)


def _verdict(
    directory: str, file: Published, size: int | None, follow_links: bool, watch: Watch
) -> FileVerdict:
    expected = file.sha256 or file.git_blob or ""
    if size is None:
        return FileVerdict(file.name, "missing", expected, None)
    if file.size not in (None, size):
        return FileVerdict(file.name, "differs", f"{file.size:,} bytes", f"{size:,} bytes")
    digest = Remote(size, file.sha256, file.git_blob or "").digest()
    found = hash_file(digest, directory, file.name, size, follow_links, watch)
    return FileVerdict(file.name, "ok" if found == expected else "differs", expected, found)


# ---- the list


def read_list(path: str) -> tuple[Published, ...]:
    """Read a list of ids in whatever form it has. raises BadManifest, UnsafePath, Environment

    Lines of `sha256sum` or `git lfs ls-files -l`; the Hub's tree, a JSON list of {type, path, size, oid, lfs}; or the
    Hub's model info, a JSON object whose siblings are {rfilename, size, blobId, lfs}.
    """
    with contained.io_errors(path), open(path, "rb") as file:
        data = file.read(formats.MAX_INDEX_BYTES + 1)
    source = _Source(os.path.basename(path))
    if len(data) > formats.MAX_INDEX_BYTES:
        source.refuse("is too large", f"at most {formats.MAX_INDEX_BYTES:,} bytes")
    is_json = data.lstrip()[:1] in (b"[", b"{")
    published = tuple(source.from_json(data) if is_json else source.from_lines(data))
    if not published:
        source.refuse("is empty", "one file at least")
    ((name, count),) = Counter(file.name for file in published).most_common(1)
    if count > 1:
        source.refuse("names a file twice", "every file once", repr(name))
    return published


class _Source(NamedTuple):
    """Where a list comes from, for messages."""

    name: str

    def refuse(self, what: str, expected: object = None, found: object = None) -> NoReturn:
        raise BadManifest(
            f"the list of ids {what}",
            file=self.name,
            expected=expected,
            found=None if found is None else str(found)[:_MAX_SHOWN],
            do="make it anew; dsv4 verify --help shows how",
        )

    def from_lines(self, data: bytes) -> Iterator[Published]:
        try:
            lines = data.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            self.refuse("is malformed", "UTF-8", f"{error.reason} at byte {error.start}")
        for number, line in enumerate(lines, 1):
            line = line.removesuffix("\r")
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if not match:
                expected = "64 hexadecimal digits and a name: `sha256sum *` or `git lfs ls-files -l`"
                self.refuse(f"is malformed in line {number:,}", expected, repr(line))
            yield Published(self.plain(match[2].removeprefix("./")), None, match[1])

    def from_json(self, data: bytes) -> Iterator[Published]:
        try:
            strictjson.require_modest(data, _LIMITS)
            document = strictjson.loads(data, floats=True)
        except strictjson.Malformed as error:
            self.refuse(f"is malformed: {error}")
        if isinstance(document, dict):
            rows = document.get("siblings")
            if not isinstance(rows, list):
                self.refuse("is malformed", "the Hub's model info, with `siblings`", repr(rows))
            for row in rows:
                yield self.from_row(row, "rfilename", ("blobId", "blob_id"), "sha256")
            return
        for row in document:
            kind = row.get("type") if isinstance(row, dict) else None
            if kind not in ("file", "directory"):
                self.refuse("is malformed", "an entry of type file or directory", repr(row))
            if kind == "file":
                yield self.from_row(row, "path", ("oid",), "oid")

    def from_row(self, row: Any, name_key: str, blob_keys: tuple[str, ...], sha256_key: str) -> Published:
        """One file. The Hub spells blobId, huggingface_hub blob_id; an LFS file's blob is its pointer."""
        if not isinstance(row, dict) or not isinstance(row.get(name_key), str):
            self.refuse("is malformed", f"an object with `{name_key}`", repr(row))
        name, lfs = self.plain(row[name_key]), row.get("lfs")
        if lfs is None:
            blob = next((row[key] for key in blob_keys if row.get(key) is not None), None)
            return Published(name, self.size(row, name), None, self.digits(blob, _SHA1, name))
        if not isinstance(lfs, dict):
            self.refuse(f"is malformed about {name!r}", "an object in `lfs`", repr(lfs))
        sha256 = lfs.get(sha256_key)
        sha256 = sha256.removeprefix("sha256:") if isinstance(sha256, str) else sha256
        size = self.size(lfs, name)
        if row.get("size", size) != size:
            self.refuse(f"contradicts itself about {name!r}", f"{size:,} bytes", repr(row["size"]))
        return Published(name, size, self.digits(sha256, _SHA256, name))

    def size(self, fields: dict[str, Any], name: str) -> int:
        size = fields.get("size")
        if type(size) is not int or not 0 <= size <= formats.MAX_COUNT:
            self.refuse(
                f"does not say how large {name!r} is",
                "a size (of model_info: files_metadata=True)",
                repr(size),
            )
        return size

    def digits(self, value: Any, form: re.Pattern[str], name: str) -> str:
        if not isinstance(value, str) or not form.fullmatch(value):
            self.refuse(
                f"has no id of {name!r}", f"{form.pattern} (of model_info: files_metadata=True)", repr(value)
            )
        return value

    def plain(self, name: str) -> str:
        harmless = name.isprintable() and len(name) <= formats.MAX_NAME_CHARS and "\\" not in name
        if not harmless or {"", ".", ".."} & {*name.split("/")}:
            raise UnsafePath(
                "the list of ids names something that is no plain relative file name",
                file=self.name,
                found=repr(name)[:_MAX_SHOWN],
                do="do not use this list: it was tampered with",
            )
        return name
