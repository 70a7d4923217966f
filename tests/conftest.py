"""Puts tests/ on sys.path (pytest's rootdir import mode), so that every folder below can import tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flash sample, made once per session. Nobody writes into it: take tiny.copy_of."""
    return tiny.make_sample("flash", tmp_path_factory.mktemp("tiny") / "flash")


@pytest.fixture
def checkpoint(flash: Path, tmp_path: Path) -> Path:
    """A flash sample of the test's own, to be broken."""
    return tiny.copy_of(flash, tmp_path / "checkpoint")
