"""What a process of ours holds, as Linux tells it; for drivers that run by themselves. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def kilobytes(key: str) -> int:
    """A line of this process's own status: VmRSS is what it holds, VmHWM the most it ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    raise KeyError(key)
