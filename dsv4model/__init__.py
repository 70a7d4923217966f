"""DeepSeek-V4 in readable PyTorch: `load` a checkpoint in any storage format, run or train it, `save` it back.

Start at model.py.  May import dsv4ckpt; importing dsv4model itself imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load
    from .saving import save

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .loading import load

        return load
    if name == "save":
        from .saving import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
