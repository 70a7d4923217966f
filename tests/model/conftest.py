"""Checkpoints that several tests of the model read; nobody writes into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from dsv4ckpt.formats import Target
from dsv4ckpt.names import Namespace


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made("flash", target, namespace): a release's sample, or a conversion of it; made once."""
    base, found = tmp_path_factory.mktemp("made"), dict[tuple[Any, ...], Path]()

    def directory(name: str, target: Target | None = None, space: Namespace = Namespace.DEEPSEEK) -> Path:
        key = (name, target, space)
        if key not in found:
            found[key] = where = base / "-".join(map(str, key))
            if target is None:
                tiny.make_sample(name, where)
            else:
                tiny.convert(directory(name), where, workers=1, target=target, namespace=space)
        return found[key]

    return directory
