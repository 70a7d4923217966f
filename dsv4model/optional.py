"""Libraries that most people do without: imported when they are asked for.  Knows none of them."""

from __future__ import annotations

import importlib
from typing import Any

from dsv4ckpt.errors import Environment


def library(module: str, *, name: str, otherwise: str = "", **facts: Any) -> Any:
    """A module of a library that need not be here.

    name       what pip installs
    otherwise  what to do without it
    raises     Environment if it is not installed
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        do = f"pip install {name}" + (f", or {otherwise}" if otherwise else "")
        raise Environment(f"the library {name} is not installed", do=do, **facts) from None
