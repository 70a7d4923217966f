"""A released checkpoint as its inventory tells it: headers and no data, to plan with.  Opens nothing, knows no torch.

One shard for each layer, as the releases have them.  The vision side is not in the inventory, and small files are not
known: what is planned here lacks both.
"""

from __future__ import annotations

import os

from . import config as configs
from . import shard, strictjson
from .errors import Usage
from .formats import DTYPE_BITS
from .inventory import Stored, lay_out, logical_tensors, shard_groups
from .names import Namespace
from .release import RELEASES, shipped_config
from .shard import Header
from .source import Checkpoint, Location, Shard, SmallFile, Stamp

PREFIX = "release:"  # of a SRC that is no path


class PaperCheckpoint(Checkpoint):
    """Headers only. Its data cannot be read, which whoever makes it has to see to."""

    @property
    def has_sidecar(self) -> bool:
        return False

    def small_files(self) -> list[SmallFile]:
        return []

    def header_bytes(self, name: str) -> bytes:
        entries = self.shards[name].header.entries.items()
        return shard.encode_header((tensor, entry.dtype, entry.shape) for tensor, entry in entries)


def on_paper(name: str) -> PaperCheckpoint:
    """The release of that name, without its data. raises Usage"""
    release = RELEASES.get(name)
    if release is None:
        raise Usage(
            f"there is no release {name!r}",
            expected=", ".join(RELEASES),
            do=f"name one of these after {PREFIX}",
        )
    document = shipped_config(name)
    logicals = list(logical_tensors(configs.read(document), release.family))
    groups = shard_groups(lay_out(logicals, release.family.table, release.storage, Namespace.DEEPSEEK))
    checkpoint = PaperCheckpoint(os.devnull, False, strictjson.pretty(document))
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header = _header(group, file)
        end = max(entry.end for entry in header.entries.values())
        checkpoint.shards[file] = Shard(file, header, Stamp(end, 0, 0))
        checkpoint.tensors |= {name: Location(file, entry) for name, entry in header.entries.items()}
    return checkpoint


def _header(group: list[Stored], file: str) -> Header:
    ordered = sorted(group, key=lambda stored: -DTYPE_BITS[stored.dtype])
    described = ((stored.name, stored.dtype, stored.shape) for stored in ordered)
    return shard.parse_header(shard.encode_header(described), None, file)
